//! The process: why the main thread wakes up or ends, and what lasts over restarts of the services.

use crate::config::Config;
use crate::network::Networks;
use crate::service::{self, SignalWatch};
use crate::sockets::{self, BoundSockets};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fmt;
use std::sync::Arc;

/// Why the daemon cannot start or continue: one line with the remedy.
#[derive(Debug)]
pub struct FatalError(pub(super) String);

impl fmt::Display for FatalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FatalError {}

/// Converts the error of a step of the start into a [`FatalError`] that names the step.
pub(super) fn fatal<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> FatalError {
    move |e| FatalError(format!("{what}: {e}"))
}

/// Error of a thread that should run until the shutdown.
pub(super) fn thread_ended(what: &str) -> FatalError {
    FatalError(format!("the {what} thread ended; see the log"))
}

/// Reason why the main thread wakes up.
pub(super) enum Wakeup {
    /// SIGTERM or SIGINT.
    Signal,
    /// A thread ended that should run until the shutdown. Contains its name.
    Ended(&'static str),
    /// A resource that was missing at the start is available. The services restart with the same
    /// sockets.
    Restart,
}

/// Reason why the services stop.
pub(super) enum ExitReason {
    /// A signal.
    Stopped,
    /// A restart of the services.
    Restart,
}

/// Resources that last from the start of the process to its end.
pub(super) struct Process {
    pub(super) networks: Arc<Networks>,
    pub(super) sockets: BoundSockets,
    pub(super) wakeups: Sender<Wakeup>,
    pub(super) woken: Receiver<Wakeup>,
    _signals: SignalWatch,
}

impl Process {
    pub(super) fn start(config: &Config) -> Result<Process, FatalError> {
        let networks = Arc::new(Networks::read(config.networks.clone()));
        let (wakeups, woken) = bounded(8);
        let signal = wakeups.clone();
        let on_signal = move || drop(signal.try_send(Wakeup::Signal));
        let signals = service::watch_signals(on_signal).map_err(fatal("signals"))?;
        // The signal handlers are installed first, because another process may send a signal as
        // soon as the port is open.
        let sockets = sockets::open(config, &networks.current()).map_err(FatalError)?;
        Ok(Process { networks, sockets, wakeups, woken, _signals: signals })
    }

    /// Returns a callback that wakes the main thread when the thread `what` ends.
    pub(super) fn on_end(&self, what: &'static str) -> impl Fn() + Clone + Send + 'static {
        let wakeups = self.wakeups.clone();
        move || drop(wakeups.try_send(Wakeup::Ended(what)))
    }

    /// Discards the wakeups of threads that ended with a run. Returns [`ExitReason::Stopped`] if a
    /// signal was among them.
    pub(super) fn drain(&self) -> ExitReason {
        let is_signal = self.woken.try_iter().any(|wakeup| matches!(wakeup, Wakeup::Signal));
        if is_signal { ExitReason::Stopped } else { ExitReason::Restart }
    }
}
