//! A running peerix daemon on a host, its program and log, and requests to its HTTP server for
//! narinfos and the status.

use super::http::{self, Connection};
use super::lan::{Host, Run};
use super::process::Logged;
use super::{thread, wait_for, world};
use rustix::process::Signal;
use serde_json::Value;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::atomic::{AtomicUsize, Ordering};

/// The program under test: `PEERIX_BIN`, else the one that cargo built for these tests. Cargo
/// builds none for examples.
pub fn binary() -> &'static Path {
    static PATH: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    PATH.get_or_init(|| {
        let given = std::env::var_os("PEERIX_BIN").map(PathBuf::from);
        let built = || option_env!("CARGO_BIN_EXE_peerix").map(PathBuf::from);
        given.or_else(built).expect("PEERIX_BIN is not set")
    })
}

/// A running peerix on a host. Dropping it kills it, and prints the end of its log if the test
/// failed.
pub struct Daemon {
    program: Logged,
}

impl Daemon {
    /// Starts peerix as root with `--verbose` and `flags`, and waits until it accepts connections.
    pub fn start(host: &Host, flags: &[&str]) -> Daemon {
        Self::start_as(host, 0, flags)
    }

    /// Starts peerix as root on a port other than [`super::PORT`], and waits until it accepts
    /// connections.
    pub fn start_on(host: &Host, port: u16, flags: &[&str]) -> Daemon {
        let mut command = host.cmd(&binary().display().to_string());
        command.args(["--verbose", "--port", &port.to_string()]).args(flags);
        let mut program = Logged::start(&host.name, command);
        program.wait_until("peerix answers", || host.connect((Ipv4Addr::LOCALHOST, port)).ok());
        Daemon { program }
    }

    /// Starts peerix as the user `uid`, and waits until it accepts connections.
    pub fn start_as(host: &Host, uid: u32, flags: &[&str]) -> Daemon {
        let mut command = host.cmd_as(uid, &binary().display().to_string());
        command.arg("--verbose").args(flags);
        Self::start_command(host, command)
    }

    /// Starts peerix as root with these environment variables, and waits until it accepts
    /// connections.
    pub fn start_with(host: &Host, environment: &[(&str, &str)], flags: &[&str]) -> Daemon {
        let mut command = host.cmd(&binary().display().to_string());
        command.arg("--verbose").args(flags).envs(environment.iter().copied());
        Self::start_command(host, command)
    }

    fn start_command(host: &Host, command: Command) -> Daemon {
        let mut program = Logged::start(&host.name, command);
        program.wait_until("peerix answers", || host.connect_local().ok());
        Daemon { program }
    }

    /// The whole log so far.
    pub fn log(&self) -> String {
        self.program.log()
    }

    /// Process ID in this machine's `/proc`, outside the host.
    pub fn pid(&self) -> u32 {
        self.program.process.pid()
    }

    /// Sends a signal to the process.
    pub fn signal(&mut self, signal: Signal) {
        self.program.process.signal(signal);
    }

    /// Sends `SIGKILL` and waits until the process has ended.
    pub fn kill(&mut self) {
        self.program.process.kill();
    }

    /// Sends `SIGTERM` and waits until the process has ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.program.process.terminate()
    }
}

/// Adds a small path that no other host has to the store of `host`, and returns its store path.
pub fn add_unique_path(host: &Host) -> String {
    let file = format!("/tmp/only-on-{}", host.name);
    host.write(&file, &file);
    host.cmd("nix-store").arg("--add").arg(&file).okay().trim().to_owned()
}

/// Status (200 or 404) with which the peerix on `host` answers the local Nix for the narinfo of
/// `path`.
pub fn narinfo_status(host: &Host, path: &str) -> u16 {
    let route = format!("/{}.narinfo", world::hash_part(path));
    http::get_local(host, &route).expect("the own peerix answers").status
}

/// Waits until the peerix on `asker` finds a path that only one holder has (from [`mark`]). From
/// then on it knows that holder.
pub fn wait_until_known(asker: &Host, mark: &str) {
    wait_for("peers find one another", || (narinfo_status(asker, mark) == 200).then_some(()));
}

/// Number of `paths` that the peerix on `host` finds, over at most `connections` parallel
/// connections.
pub fn found(host: &Host, paths: &[String], connections: usize) -> usize {
    let found = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for part in paths.chunks(paths.len().div_ceil(connections)) {
            let found = &found;
            thread::spawn_in(scope, "lookups", move || {
                let mut connection = Connection::new(host.connect_local().expect("the own peerix"))
                    .expect("a socket");
                for path in part {
                    let answer = connection
                        .get(&format!("/{}.narinfo", world::hash_part(path)))
                        .expect("an answer");
                    assert!([200, 404].contains(&answer.status), "{answer:?}");
                    if answer.status == 200 {
                        found.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    found.into_inner()
}

/// `/status.json` of the peerix on `host`. `None` if it does not answer.
pub fn try_status(host: &Host) -> Option<Value> {
    let answer = http::get_local(host, "/status.json").ok()?;
    assert_eq!(answer.status, 200);
    Some(serde_json::from_slice(&answer.body).expect("JSON"))
}

/// `/status.json` of the peerix on `host`. Panics if it does not answer.
pub fn status(host: &Host) -> Value {
    try_status(host).expect("the own peerix answers")
}

/// The peers in the status of the peerix on `host`. Empty if it does not answer.
fn peers(host: &Host) -> Vec<Value> {
    try_status(host).and_then(|status| status["peers"].as_array().cloned()).unwrap_or_default()
}

/// Waits until the peerix on `host` lists at least `count` peers as live.
pub fn wait_until_live(host: &Host, count: usize) {
    let is_live = |peer: &&Value| peer["state"] == "live";
    wait_for("live peers", || (peers(host).iter().filter(is_live).count() >= count).then_some(()));
}

/// Whether the peerix on `host` lists a peer at this address, on [`super::PORT`].
pub fn is_listed(host: &Host, address: Ipv4Addr) -> bool {
    let address = format!("{address}:{}", super::PORT);
    peers(host).iter().any(|peer| peer["address"] == address.as_str())
}

/// Waits until the peerix on `host` lists a peer at this address, on [`super::PORT`].
pub fn wait_until_listed(host: &Host, address: Ipv4Addr) {
    wait_for("the peer is listed", || is_listed(host, address).then_some(()));
}
