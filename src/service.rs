//! Functions that both programs need as services: logging, signals, systemd notification, and the
//! limit of file descriptors.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Write};
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
        .init();
}

/// Whether a terminal shows a character as text only: it is no control character and does not
/// change the direction of text.
pub fn is_plain(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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

/// Raises the soft limit of file descriptors to `wanted`, or to the hard limit if that is lower.
/// With fewer, the server closes idle connections earlier.
pub fn allow_descriptors(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    // `None` means unlimited.
    let wanted = limit.maximum.map_or(wanted, |most| most.min(wanted));
    if limit.current.is_some_and(|current| current < wanted)
        && let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit })
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
