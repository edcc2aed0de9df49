//! A process in a host, to be watched, signalled and ended.

use super::thread::test_name;
use super::{directory, last_lines, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// A running process. Dropping it kills it.
pub struct Process {
    /// `nsenter`, which waits for the process and passes on how it ended.
    nsenter: Child,
    pid: Pid,
}

impl Process {
    /// Starts what [`super::Host::cmd`] describes.
    pub fn start(mut command: Command) -> Process {
        let mut nsenter = command.spawn().expect("nsenter starts");
        let children = format!("/proc/{0}/task/{0}/children", nsenter.id());
        let pid = wait_for("a process in a host", || {
            if let Some(status) = nsenter.try_wait().expect("nsenter is ours") {
                panic!("{command:?} ended at once: {status}");
            }
            let pid: i32 = std::fs::read_to_string(&children).ok()?.trim().parse().ok()?;
            // Between fork and exec it is still called nsenter.
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name.trim() != "nsenter").then_some(pid)
        });
        Process { nsenter, pid: Pid::from_raw(pid).expect("children have a process id") }
    }

    /// The process id outside the host, as in `/proc` here.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal; nothing happens if the process has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // It may end between the two calls; it cannot be reaped and its number reused, as only
            // `nsenter` reaps it.
            let _ = kill_process(self.pid, signal);
            // `nsenter` stops when its child stops, and cannot tell us of anything until it goes
            // on.
            if signal != Signal::STOP {
                let nsenter = i32::try_from(self.nsenter.id()).ok().and_then(Pid::from_raw);
                let _ = kill_process(nsenter.expect("a process id"), Signal::CONT);
            }
        }
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.nsenter.try_wait().expect("nsenter is ours")
    }

    /// `kill -9`, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.nsenter.wait().expect("nsenter is ours");
    }

    /// `SIGTERM`, and waits until it is gone.
    pub fn terminate(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        wait_for("a process that was asked to stop", || self.ended())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A process that logs. Dropping it kills it, and shows the end of its log if the test failed. A
/// panic in it is a failure, too.
pub struct Logged {
    /// The process.
    pub process: Process,
    name: String,
    log: PathBuf,
}

impl Logged {
    /// Starts what [`super::Host::cmd`] describes, with its standard output and error in a log;
    /// `name` is for people.
    pub fn start(name: &str, command: Command) -> Logged {
        let (file, log) = log_file(name);
        let error = file.try_clone().expect("a second handle");
        Logged::run(name, command, log, error, Stdio::null(), file.into())
    }

    /// Starts what [`super::Host::cmd`] describes, with its standard error in a log, and standard
    /// input and output as given.
    pub fn start_with(name: &str, command: Command, input: Stdio, output: Stdio) -> Logged {
        let (file, log) = log_file(name);
        Logged::run(name, command, log, file, input, output)
    }

    fn run(
        name: &str,
        mut command: Command,
        log: PathBuf,
        error: File,
        input: Stdio,
        output: Stdio,
    ) -> Logged {
        command.stdin(input).stdout(output).stderr(error);
        Logged { process: Process::start(command), name: name.to_owned(), log }
    }

    /// Waits until `done` has an answer; panics if the process ends first.
    pub fn wait_until<T>(&mut self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        wait_for(what, || {
            if let Some(status) = self.process.ended() {
                panic!("{what}: {} ended: {status}", self.name);
            }
            done()
        })
    }

    /// Everything it has logged so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let panicked = !std::thread::panicking() && self.log().contains(" panicked at ");
        if panicked || std::thread::panicking() {
            eprintln!("---- {}: log of {}\n{}", test_name(), self.name, last_lines(&self.log()));
            eprintln!("---- all of it: {}", self.log.display());
        } else {
            let _ = fs::remove_file(&self.log);
        }
        assert!(!panicked, "{} panicked", self.name);
    }
}

/// Creates a log file, whose name begins with that of the test.
fn log_file(name: &str) -> (File, PathBuf) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let logs = directory().join("log");
    fs::create_dir_all(&logs).expect("a directory for logs");
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let test = test_name().replace("::", ".");
    let path = logs.join(format!("{test}-{}-{number}-{name}", std::process::id()));
    (File::create(&path).expect("a log"), path)
}
