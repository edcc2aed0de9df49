//! A running peerix.

use super::lan::{Host, Run};
use super::process::Process;
use super::{directory, http, wait_for, world};
use rustix::process::Signal;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The program under test: `PEERIX_BIN`, else the one cargo built for these tests (it builds none for examples).
pub fn binary() -> &'static Path {
    static PATH: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PATH.get_or_init(|| {
        let given = std::env::var_os("PEERIX_BIN").map(PathBuf::from);
        let built = || option_env!("CARGO_BIN_EXE_peerix").map(PathBuf::from);
        given.or_else(built).expect("PEERIX_BIN is not set")
    })
}

/// A peerix on a host. Dropping it kills it; what it logged is shown if the test failed.
pub struct Daemon {
    process: Process,
    log: PathBuf,
}

impl Daemon {
    /// Starts it as root with `--verbose` and `flags`, and waits until it answers.
    pub fn start(host: &Host, flags: &[&str]) -> Daemon {
        Self::start_as(host, 0, flags)
    }

    /// The same as another user.
    pub fn start_as(host: &Host, uid: u32, flags: &[&str]) -> Daemon {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let logs = directory().join("log");
        fs::create_dir_all(&logs).expect("a directory for logs");
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let log = logs.join(format!("{}-{number}-{}", std::process::id(), host.name));
        let file = File::create(&log).expect("a log");
        let mut command = host.cmd_as(uid, &binary().display().to_string());
        command.arg("--verbose").args(flags);
        command.stdin(Stdio::null()).stdout(file.try_clone().expect("a second handle")).stderr(file);
        let mut daemon = Daemon { process: Process::start(command), log };
        wait_for("peerix answers", || {
            if let Some(status) = daemon.process.ended() {
                panic!("peerix on {} ended: {status}\n{}", host.name, daemon.log());
            }
            host.connect_local().ok()
        });
        daemon
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Its process id in `/proc` here.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Sends it a signal.
    pub fn signal(&mut self, signal: Signal) {
        self.process.signal(signal);
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// `SIGTERM`, and waits until it has stopped.
    pub fn stop(&mut self) -> ExitStatus {
        self.process.terminate()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let shown = lines[lines.len().saturating_sub(150)..].join("\n");
            eprintln!("---- {} ({} lines)\n{shown}", self.log.display(), lines.len());
        } else {
            let _ = fs::remove_file(&self.log);
        }
    }
}

/// Adds to the store of `host` a small path that no other host has, and returns it.
pub fn mark(host: &Host) -> String {
    let file = format!("/tmp/only-on-{}", host.name);
    host.write(&file, &file);
    host.cmd("nix-store").arg("--add").arg(&file).okay().trim().to_owned()
}

/// Waits until peerix on `asker` finds what only `holder` has (by [`mark`]): then they know one another.
pub fn wait_until_known(asker: &Host, mark: &str) {
    let route = format!("/{}.narinfo", world::hash_part(mark));
    wait_for("peers find one another", || {
        let answer = http::get_local(asker, &route).expect("the own peerix answers");
        (answer.status == 200).then_some(())
    });
}
