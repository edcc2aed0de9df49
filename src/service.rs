//! What both programs do as services: log, watch for signals, tell systemd, take the descriptors
//! they need.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{self, Write};
use std::thread::{self, JoinHandle};

/// Sends the log to standard error, without times, as journald adds them. `verbose` shows what each
/// request does; `RUST_LOG` overrides it.
pub fn log_to_stderr(verbose: bool) {
    // It is the beginning of the tracker's name too.
    let default = if verbose { "info,peerix=debug" } else { "info" };
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(default))
        .format(|out, record| {
            let text = clean(&record.args().to_string());
            writeln!(out, "{}: {text}", record.level().as_str().to_lowercase())
        })
        .init();
}

/// Whether a terminal takes a character for nothing but text: it is no control character, and does
/// not turn the direction of what follows.
pub fn is_plain(c: char) -> bool {
    !c.is_control() && !matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The text without characters that are not plain, and so in one line. Much of what is logged and
/// printed is of other machines: a tracker's refusal cleared the screen, and wrote lines of its
/// own.
pub fn clean(text: &str) -> String {
    text.chars().map(|c| if is_plain(c) { c } else { '\u{fffd}' }).collect()
}

/// Tells systemd; elsewhere nothing.
pub fn notify(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::error!("notifying systemd: {e}");
    }
}

/// Takes as many descriptors as are wanted, or as many of them as the system allows. With fewer,
/// idle connections are closed earlier.
pub fn allow_descriptors(wanted: u64) {
    let limit = getrlimit(Resource::Nofile);
    // No number is no limit.
    let wanted = limit.maximum.map_or(wanted, |most| most.min(wanted));
    if limit.current.is_some_and(|current| current < wanted)
        && let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), ..limit })
    {
        log::debug!("limit of descriptors: {e}");
    }
}

/// The thread that waits for signals; dropping it ends it.
pub struct SignalWatch {
    handle: signal_hook::iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

/// Calls `on_signal` at every SIGTERM and SIGINT.
///
/// # Errors
/// The system's, or no thread to be had.
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
