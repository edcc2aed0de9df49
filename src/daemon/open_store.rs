//! Opens Nix's database at the start, and answers lookups with misses while that is not possible.

use super::process::{ExitReason, FatalError, Process, Wakeup, fatal, thread_ended};
use super::retries::RETRY_INTERVAL;
use crate::backoff::Backoff;
use crate::config::Config;
use crate::http::miss_handler::MissHandler;
use crate::http::server::Server;
use crate::service::notify;
use crate::store::{Store, StoreConfig, StoreError};
use crate::time_scale::{Interval, Timeout};
use crossbeam_channel::{Receiver, RecvError, at, bounded, select};
use sd_notify::NotifyState;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// First pause after a failure to open the store. It doubles up to [`RETRY_INTERVAL`].
const FIRST_RETRY_PAUSE: Interval = Interval::from_secs(1);

/// Longest wait for the store at the start, before lookups are answered with misses. Three tries
/// fit, with pauses of 1 s and 2 s between them, if each takes at most 1 s. So a nix-daemon that
/// starts at the same time has 5 s to accept connections.
const FIRST_OPEN_TIMEOUT: Timeout = Timeout::from_secs(6);

/// Opens Nix's database. If that fails for a time, or if systemd passed the sockets, answers misses
/// until it succeeds. `None` if a signal came first.
///
/// # Errors
/// There is no usable database, and without systemd's sockets the port may as well be closed.
pub(super) fn open_store(
    config: &Config,
    process: &Process,
) -> Result<Option<Arc<Store>>, FatalError> {
    let store = StoreConfig {
        store_dir: config.store_dir.clone(),
        db: config.db.clone(),
        root: config.root.clone(),
    };
    let opened = open_with_retries(move || Store::open(store.clone()).map(Arc::new));
    let opened = opened.map_err(fatal("store"))?;
    let problem =
        match first_store(&opened, &process.woken, Instant::now() + FIRST_OPEN_TIMEOUT.get())? {
            FirstStore::Opened(store) => return Ok(Some(store)),
            FirstStore::Stopped => return Ok(None),
            FirstStore::Opening => {
                "nix database: it takes long to open; another process may be upgrading it".into()
            }
            FirstStore::Failed(e) if process.sockets.are_passed || may_recover(&e) => e.to_string(),
            FirstStore::Failed(e) => return Err(FatalError(e.to_string())),
        };
    let misses = MissHandler::new(config, process.sockets.port, "store", problem);
    answer_misses(misses, process, &opened)
}

/// Starts a thread that calls `open` until it succeeds, after pauses that grow from 1 s to
/// [`RETRY_INTERVAL`]. Returns the channel of the results. It is a thread of its own because a
/// locked database delays each call by seconds. The thread ends after the first call that follows
/// the drop of the channel.
///
/// # Errors
/// No thread can be started.
fn open_with_retries<T: Send + 'static>(
    open: impl Fn() -> Result<T, StoreError> + Send + 'static,
) -> io::Result<Receiver<Result<T, StoreError>>> {
    let (sender, results) = bounded(1);
    let mut backoff = Backoff::new(FIRST_RETRY_PAUSE, RETRY_INTERVAL);
    thread::Builder::new().name("store".into()).spawn(move || {
        loop {
            let opened = open();
            let is_open = opened.is_ok();
            if sender.send(opened).is_err() || is_open {
                return;
            }
            let now = Instant::now();
            backoff.record_failure(None, now);
            thread::sleep(backoff.due().unwrap_or(now).saturating_duration_since(now));
        }
    })?;
    Ok(results)
}

/// What the first tries to open the store came to.
enum FirstStore<T> {
    Opened(T),
    /// A signal came.
    Stopped,
    /// The last error, or the first one that does not pass within seconds.
    Failed(StoreError),
    /// No try has ended.
    Opening,
}

/// Waits until the store is open, until `deadline` at most if it may open within seconds. Requests
/// wait in the backlog of the sockets meanwhile, because Nix remembers a miss for an hour.
///
/// # Errors
/// A thread ended.
fn first_store<T>(
    opened: &Receiver<Result<T, StoreError>>,
    woken: &Receiver<Wakeup>,
    deadline: Instant,
) -> Result<FirstStore<T>, FatalError> {
    let mut first = FirstStore::Opening;
    loop {
        select! {
            recv(opened) -> result => match result {
                Ok(Ok(store)) => return Ok(FirstStore::Opened(store)),
                Ok(Err(e)) if may_recover_soon(&e) => {
                    log::info!("{e}; trying again");
                    first = FirstStore::Failed(e);
                }
                Ok(Err(e)) => return Ok(FirstStore::Failed(e)),
                Err(_) => return Err(thread_ended("store")),
            },
            recv(woken) -> wakeup => if handle_early_wakeup(wakeup)? {
                return Ok(FirstStore::Stopped);
            },
            recv(at(deadline)) -> _ => return Ok(first),
        }
    }
}

/// Handles a wakeup before the store is open. Returns true after a signal, of which it notifies
/// systemd.
///
/// # Errors
/// A thread ended.
fn handle_early_wakeup(wakeup: Result<Wakeup, RecvError>) -> Result<bool, FatalError> {
    match wakeup {
        Ok(Wakeup::Signal) => {
            notify(&[NotifyState::Stopping]);
            Ok(true)
        }
        Ok(Wakeup::Ended(what)) => Err(thread_ended(what)),
        Ok(Wakeup::Restart) | Err(_) => Ok(false),
    }
}

/// Whether a store that failed with `e` may work later without a change of the settings: its files
/// may be mounted late, and the database may be locked or lack a running nix-daemon.
fn may_recover(e: &StoreError) -> bool {
    may_recover_soon(e) || matches!(e, StoreError::NoFiles { .. })
}

/// Whether a store that failed with `e` may work within seconds, as when nix-daemon starts.
fn may_recover_soon(e: &StoreError) -> bool {
    matches!(e, StoreError::Busy { .. } | StoreError::WalUnavailable { .. })
}

/// Answers lookups with misses until `opened` receives a value, and returns that value. `None` if a
/// signal came.
pub(super) fn answer_misses<T>(
    misses: MissHandler,
    process: &Process,
    opened: &Receiver<Result<T, StoreError>>,
) -> Result<Option<T>, FatalError> {
    log::error!("{}", misses.problem());
    let sockets = process.sockets.try_clone().map_err(fatal("sockets"))?;
    let server = Server::start(sockets.listeners, Arc::new(misses), process.on_end("http"));
    let server = server.map_err(fatal("http server"))?;
    notify(&[NotifyState::Ready]);
    let pause = sd_notify::watchdog_enabled()
        .map_or(RETRY_INTERVAL.get(), |limit| RETRY_INTERVAL.get().min(limit / 3));
    loop {
        select! {
            recv(process.woken) -> wakeup => if handle_early_wakeup(wakeup)? {
                return Ok(None);
            },
            recv(opened) -> result => match result {
                Ok(Ok(value)) => {
                    drop(server);
                    return Ok(match process.drain() {
                        ExitReason::Stopped => None,
                        ExitReason::Restart => Some(value),
                    });
                }
                Ok(Err(e)) => log::debug!("{e}"),
                Err(_) => return Err(thread_ended("store")),
            },
            default(pause) => notify(&[NotifyState::Watchdog]),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::never;
    use std::path::PathBuf;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    fn busy() -> StoreError {
        StoreError::Busy { db: PathBuf::from("/db") }
    }

    /// Guards against misses that Nix remembers for an hour, because nix-daemon starts a second
    /// after this node.
    #[test]
    fn store_that_opens_at_second_try_is_awaited() {
        let was_tried = AtomicBool::new(false);
        let opened = open_with_retries(move || {
            if was_tried.swap(true, Ordering::Relaxed) { Ok("store") } else { Err(busy()) }
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let first = first_store(&opened.unwrap(), &never(), deadline).unwrap();
        assert!(matches!(first, FirstStore::Opened("store")));
    }

    #[test]
    fn store_that_does_not_open_soon_is_not_awaited_longer() {
        let (opened, results) = bounded::<Result<(), _>>(1);
        let past = Instant::now();
        let first = |deadline| first_store(&results, &never(), deadline).unwrap();
        assert!(matches!(first(past), FirstStore::Opening));
        opened.send(Err(StoreError::Missing { db: PathBuf::from("/db") })).unwrap();
        let late = past + Duration::from_secs(3600);
        assert!(matches!(first(late), FirstStore::Failed(StoreError::Missing { .. })));
    }

    #[test]
    fn signal_ends_wait_for_store_that_hangs() {
        let (_opened, results) = bounded::<Result<(), _>>(1);
        let (wakeups, woken) = bounded(1);
        wakeups.send(Wakeup::Signal).unwrap();
        let late = Instant::now() + Duration::from_secs(3600);
        assert!(matches!(first_store(&results, &woken, late).unwrap(), FirstStore::Stopped));
    }
}
