//! Runs other programs, with a timeout.

use std::fmt;
use std::io::{self, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Timeout of a program. It is killed at the timeout.
pub const PROGRAM_TIMEOUT: Duration = Duration::from_secs(10);

/// Maximum size that is read of each output of a program, in bytes; the rest is cut off. Nix's
/// settings have 20 KiB.
const MAX_OUTPUT_BYTES: u64 = 1 << 20;

/// Interval between checks whether a program that has closed its output has ended.
const EXIT_POLL: Duration = Duration::from_millis(5);

/// Why a program gave no output. Each is displayed as one line.
#[derive(Debug)]
pub enum ProgramError {
    /// The program cannot be started.
    NotStarted(String),
    /// The program failed. Contains the last line of its standard error.
    Failed(String),
    /// The program did not end before the timeout and was killed.
    TimedOut(String),
}

impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (ProgramError::NotStarted(text)
        | ProgramError::Failed(text)
        | ProgramError::TimedOut(text)) = self;
        f.write_str(text)
    }
}

/// Runs a program and returns its standard output. An empty value in `environment` removes the
/// variable. Kills the program after [`PROGRAM_TIMEOUT`].
///
/// # Errors
/// See [`ProgramError`].
pub fn run(
    program: &str,
    words: &[&str],
    environment: &[(String, String)],
) -> Result<String, ProgramError> {
    run_within(program, words, environment, PROGRAM_TIMEOUT)
}

fn run_within(
    program: &str,
    words: &[&str],
    environment: &[(String, String)],
    timeout: Duration,
) -> Result<String, ProgramError> {
    let mut command = Command::new(program);
    for (name, value) in environment {
        // An empty NIX_USER_CONF_FILES disables users' configuration files; a missing one does not.
        match value.is_empty() && name != "NIX_USER_CONF_FILES" {
            true => command.env_remove(name),
            false => command.env(name, value),
        };
    }
    let mut child = command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| ProgramError::NotStarted(format!("cannot start {program}: {e}")))?;
    let deadline = Instant::now() + timeout;
    let (done, waited) = crossbeam_channel::bounded(1);
    let (out, err) = (child.stdout.take(), child.stderr.take());
    thread::spawn(move || {
        let (mut stdout, mut stderr) = (String::new(), String::new());
        let read = out.map(|out| out.take(MAX_OUTPUT_BYTES).read_to_string(&mut stdout));
        let _ = err.map(|err| err.take(MAX_OUTPUT_BYTES).read_to_string(&mut stderr));
        let _ = done.send((read.is_some_and(|read| read.is_ok()), stdout, stderr));
    });
    let answer = waited.recv_deadline(deadline);
    let status = exit_status(&mut child, deadline)
        .map_err(|e| ProgramError::Failed(format!("{program}: {e}")))?;
    match (status, answer) {
        (Some(status), Ok((true, stdout, _))) if status.success() => Ok(stdout),
        (Some(_), Ok((_, _, stderr))) => {
            let last = stderr.lines().next_back().unwrap_or("it said nothing");
            Err(ProgramError::Failed(last.to_owned()))
        }
        _ => Err(ProgramError::TimedOut(format!(
            "{program}: no answer within {} s",
            timeout.as_secs()
        ))),
    }
}

/// Waits until the program ends. Kills it at `deadline` and returns `None`.
///
/// # Errors
/// The system's error.
fn exit_status(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            return child.wait().map(|_| None);
        }
        thread::sleep(EXIT_POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_that_closes_its_output_and_goes_on_is_killed_at_the_timeout() {
        let began = Instant::now();
        let script = "exec >&- 2>&-; exec sleep 1000";
        let failed = run_within("sh", &["-c", script], &[], Duration::from_secs(1)).unwrap_err();
        assert!(matches!(failed, ProgramError::TimedOut(_)), "{failed}");
        assert_eq!(failed.to_string(), "sh: no answer within 1 s");
        assert!(began.elapsed() < Duration::from_secs(500));
    }

    #[test]
    fn run_returns_the_output_or_the_kind_of_error() {
        let prints = "echo yes; exec >&- 2>&-; sleep 0.2";
        assert_eq!(run("sh", &["-c", prints], &[]).unwrap(), "yes\n");
        let failed = run("sh", &["-c", "echo no >&2; exit 3"], &[]).unwrap_err();
        assert!(matches!(&failed, ProgramError::Failed(line) if line == "no"), "{failed}");
        let missing = run("/no/program", &[], &[]).unwrap_err();
        assert!(matches!(missing, ProgramError::NotStarted(_)), "{missing}");
    }
}
