//! Functions that both programs need as services: logging, signals, systemd notification, and the
//! limit of file descriptors.

use env_logger::Target;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::thread::{self, JoinHandle};

/// Logs to standard error, without timestamps because journald adds them. `verbose` also logs each
/// request; `RUST_LOG` overrides it.
pub fn log_to_stderr(verbose: bool) {
    // The filter matches module prefixes, so it covers the tracker's program too.
    let default = if verbose { "info,peerix=debug" } else { "info" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(default))
        .format(|out, record| {
            let text = clean(&record.args().to_string());
            writeln!(out, "{}: {text}", record.level().as_str().to_lowercase())
        })
        .target(Target::Pipe(Box::new(LogWriter { out: io::stderr(), dropped: 0 })))
        .init();
}

/// Longest log line, in bytes; the rest is cut off. A pipe that is ready takes as many at once
/// (pipe(7), `PIPE_BUF`).
const MAX_LINE: usize = 4096;

/// Writes log lines without blocking. A line that its reader does not take is dropped and counted:
/// threads that log may hold locks, or be the one that serves all connections.
struct LogWriter<W> {
    out: W,
    dropped: u64,
}

impl<W: Write + AsFd> Write for LogWriter<W> {
    /// Takes one whole line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut polled = [PollFd::new(&self.out, PollFlags::OUT)];
        let is_ready = retry_on_intr(|| poll(&mut polled, Some(&Timespec::default())))? > 0;
        if !is_ready {
            self.dropped += 1;
            return Ok(line.len());
        }
        let mut text = Vec::new();
        if self.dropped > 0 {
            writeln!(text, "warn: {} log lines dropped, nobody read them", self.dropped)?;
            self.dropped = 0;
        }
        text.extend_from_slice(line);
        if text.len() > MAX_LINE {
            text.truncate(MAX_LINE - 1);
            text.push(b'\n');
        }
        self.out.write_all(&text)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Whether a terminal shows a character as text only: it is no control character and does not
/// change the direction of text or begin a line.
pub fn is_plain(c: char) -> bool {
    let is_mark = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}');
    !c.is_control() && !is_mark && !matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Replaces every character that is not plain, line breaks included, by U+FFFD. Other machines
/// determine much of what peerix logs and prints; a tracker's error message could clear the screen
/// or forge log lines.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if is_plain(c) { c } else { '\u{fffd}' }).collect()
}

/// Sends a notification to systemd (sd_notify(3)). Without systemd it does nothing.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::error!("notifying systemd: {e}");
    }
}

/// Raises the soft limit of file descriptors to `count`, or to the hard limit if that is lower.
/// With fewer, the server closes idle connections earlier.
pub fn allow_descriptors(count: u64) {
    let limit = getrlimit(Resource::Nofile);
    // `None` means unlimited.
    let count = limit.maximum.map_or(count, |max| max.min(count));
    if limit.current.is_some_and(|current| current < count)
        && let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: Some(count), ..limit })
    {
        log::debug!("limit of descriptors: {e}");
    }
}

/// The thread that waits for signals. Dropping this ends it.
pub struct SignalWatch {
    handle: signal_hook::iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

/// Starts a thread that calls `on_signal` for every SIGTERM and SIGINT.
///
/// # Errors
/// The handlers cannot be installed, or no thread can be started.
pub fn watch_signals(on_signal: impl Fn() + Send + 'static) -> io::Result<SignalWatch> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    let thread = thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            on_signal();
        }
    })?;
    Ok(SignalWatch { handle, thread: Some(thread) })
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn log_lines_that_nobody_reads_are_dropped_and_counted() {
        let (mut reader, out) = io::pipe().unwrap();
        let mut log = LogWriter { out, dropped: 0 };
        let line = [&[b'x'; 999][..], b"\n"].concat();
        // The pipe of 64 KiB takes some of them.
        (0..1000).for_each(|_| log.write_all(&line).unwrap());
        assert!(log.dropped > 900, "{}", log.dropped);
        let mut taken = vec![0; 32 << 10];
        reader.read_exact(&mut taken).unwrap();
        let dropped = log.dropped;
        log.write_all(b"next\n").unwrap();
        log.write_all(&[b'y'; 10_000]).unwrap();
        drop(log);
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let told = format!("\nwarn: {dropped} log lines dropped, nobody read them\nnext\ny");
        assert!(rest.contains(&told) && rest.ends_with("y\n"), "{rest}");
    }

    #[test]
    fn marks_that_change_direction_or_line_are_not_plain() {
        let text = "a\u{2028}b\u{2029}c\u{200e}d\u{200f}e\u{61c}f\u{202e}g\u{85}h\nä";
        assert_eq!(
            clean(text),
            "a\u{fffd}b\u{fffd}c\u{fffd}d\u{fffd}e\u{fffd}f\u{fffd}g\u{fffd}h\u{fffd}ä"
        );
    }
}
