//! A process in a host, with its signals, exit status and log.

use super::thread::test_name;
use super::{directory, last_lines, wait_for};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::panic;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// A running process. Dropping it kills it.
pub struct Process {
    /// `nsenter`, which waits for the process and ends with its exit status.
    nsenter: Child,
    pid: Pid,
}

impl Process {
    /// Starts a command from [`super::Host::cmd`] and waits until it runs. Panics if it ends at
    /// once.
    pub fn start(mut command: Command) -> Process {
        let mut nsenter = command.spawn().expect("nsenter starts");
        let children = format!("/proc/{0}/task/{0}/children", nsenter.id());
        let pid = wait_for("a process in a host", || {
            if let Some(status) = nsenter.try_wait().expect("nsenter is ours") {
                panic!("{command:?} ended at once: {status}");
            }
            let pid: i32 = std::fs::read_to_string(&children).ok()?.trim().parse().ok()?;
            // Between fork and exec the child is still called nsenter.
            let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
            (name.trim() != "nsenter").then_some(pid)
        });
        Process { nsenter, pid: Pid::from_raw(pid).expect("children have a process id") }
    }

    /// Process ID in this machine's `/proc`, outside the host.
    pub fn pid(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Sends a signal. Does nothing if the process has ended.
    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // The process may end between the two calls. Linux assigns process IDs in turn, so the
            // ID does not belong to another process that soon.
            let _ = kill_process(self.pid, signal);
            // `nsenter` stops when its child stops, and reports nothing until it continues.
            if signal != Signal::STOP {
                let nsenter = i32::try_from(self.nsenter.id()).ok().and_then(Pid::from_raw);
                let _ = kill_process(nsenter.expect("a process id"), Signal::CONT);
            }
        }
    }

    /// The exit status, if the process has ended. Does not block.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.nsenter.try_wait().expect("nsenter is ours")
    }

    /// Sends `SIGKILL` and waits until the process has ended.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.nsenter.wait().expect("nsenter is ours");
    }

    /// Sends `SIGTERM` and waits until the process has ended. Panics after `DEADLINE`.
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

/// A number in `/proc/<pid>/status`, such as `VmRSS` in KiB.
pub fn status_number(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = value.and_then(|value| value.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no number {field} in\n{status}"))
}

/// A process with a log. Dropping it kills it, and prints the end of the log if the test failed. A
/// panic in the process fails the test.
pub struct Logged {
    /// The process.
    pub process: Process,
    name: String,
    log: PathBuf,
}

impl Logged {
    /// Starts a command from [`super::Host::cmd`] with its standard output and error in a log.
    /// `name` occurs in messages and in the name of the log.
    pub fn start(name: &str, command: Command) -> Logged {
        let (file, log) = log_file(name);
        let error = file.try_clone().expect("a second handle");
        Logged::run(name, command, log, error, Stdio::null(), file.into())
    }

    /// Starts a command from [`super::Host::cmd`] with its standard error in a log, and the given
    /// standard input and output.
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

    /// Calls `done` until it returns a value. Panics if the process ends first, or after
    /// `DEADLINE`.
    pub fn wait_until<T>(&mut self, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
        wait_for(what, || {
            if let Some(status) = self.process.ended() {
                panic!("{what}: {} ended: {status}", self.name);
            }
            done()
        })
    }

    /// The whole log so far.
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
            // Again after the logs, because some viewers show only the end of the output.
            for message in panic_messages() {
                eprintln!("---- {message}");
            }
        } else {
            let _ = fs::remove_file(&self.log);
        }
        assert!(!panicked, "{} panicked", self.name);
    }
}

/// Test and message of each panic since the first process was started.
static PANICS: Mutex<Vec<(String, String)>> = Mutex::new(Vec::new());

/// Records the messages of panics in [`PANICS`] from now on.
fn record_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            print(panic);
            let mut panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
            panics.push((test_name(), panic.to_string()));
        }));
    });
}

/// Messages of the panics of this test.
fn panic_messages() -> Vec<String> {
    let panics = PANICS.lock().unwrap_or_else(PoisonError::into_inner);
    let own = panics.iter().filter(|(test, _)| *test == test_name());
    own.map(|(_, message)| message.clone()).collect()
}

/// Creates a log file. Its name begins with that of the test.
fn log_file(name: &str) -> (File, PathBuf) {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    record_panics();
    let logs = directory().join("log");
    fs::create_dir_all(&logs).expect("a directory for logs");
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let test = test_name().replace("::", ".");
    let path = logs.join(format!("{test}-{}-{number}-{name}", std::process::id()));
    (File::create(&path).expect("a log"), path)
}
