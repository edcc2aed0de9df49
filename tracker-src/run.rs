//! Starts the tracker's threads, waits for a signal, and stops them in order.

use crate::api::{self, Api};
use crate::cli::Options;
use crate::db_thread::DatabaseThread;
use crate::reachability;
use crate::table::TrackerTable;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use peerix::http::server::Server;
use peerix::resolver::NameResolver;
use peerix::service::{self, notify};
use peerix::sockets;
use sd_notify::NotifyState;
use std::fmt::Display;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Interval at which expired peers are removed. Answers omit them as soon as they expire.
const SWEEP: Duration = Duration::from_secs(5);

/// Requested limit of file descriptors: one for each connection, and some others.
const DESCRIPTORS: u64 = 2048;

/// Why the main thread wakes up.
enum TrackerWakeup {
    /// SIGTERM or SIGINT arrived.
    Signal,
    /// A thread ended that should run until the tracker stops.
    Ended(&'static str),
}

/// Runs the tracker. Blocks until SIGTERM or SIGINT.
///
/// # Errors
/// Returns one line: why it cannot start, or which thread has ended.
pub fn run(options: &Options) -> Result<(), String> {
    service::allow_descriptors(DESCRIPTORS);
    let (listeners, port) = sockets::open_tcp(&options.hosts, options.port, "--host")?;
    let (wakeups, woken) = bounded(8);
    let ended = |what| {
        let wakeups = wakeups.clone();
        move || drop(wakeups.try_send(TrackerWakeup::Ended(what)))
    };
    let signal = wakeups.clone();
    let signals = service::watch_signals(move || drop(signal.try_send(TrackerWakeup::Signal)))
        .map_err(in_front("signals"))?;

    let now = api::now();
    let table = Arc::new(TrackerTable::new(now, options.filter_memory));
    let changed = table.clone();
    let on_change = move |id: &str, reputation| changed.set_reputation(id, reputation);
    let (ledger, present) = DatabaseThread::open(&options.db_path, on_change, ended("ledger"))?;
    log::info!("{} peers were here when the tracker ended", present.len());
    present.into_iter().for_each(|peer| table.restore(peer, now));
    let ledger = Arc::new(ledger);
    let reach = reachability::start(&table, NameResolver::default(), ended("reach"))
        .map_err(in_front("reach"))?;
    let api = Arc::new(Api::new(table.clone(), ledger.clone(), reach, options.proxies.clone()));
    let server = Server::start(listeners, api, ended("http")).map_err(in_front("http server"))?;

    log::info!("peerix-tracker {} serves on port {port}", env!("CARGO_PKG_VERSION"));
    notify(&[NotifyState::Ready]);
    let result = wait(&woken, &table, &ledger);
    notify(&[NotifyState::Stopping]);
    log::info!("stopping");
    // Requests under way need the database, so the server ends first. Its threads may keep a
    // reference to `ledger`, so it is closed explicitly.
    drop(server);
    ledger.close();
    drop(signals);
    result
}

fn in_front<E: Display>(what: &str) -> impl Fn(E) -> String {
    move |e| format!("{what}: {e}")
}

/// Blocks until the tracker has to stop. Removes expired peers meanwhile, and notifies systemd's
/// watchdog while the database thread makes progress.
fn wait(
    woken: &Receiver<TrackerWakeup>,
    table: &Arc<TrackerTable>,
    ledger: &DatabaseThread,
) -> Result<(), String> {
    let watchdog = sd_notify::watchdog_enabled();
    // The database thread makes at least one round a second.
    let look = watchdog.map_or(SWEEP, |limit| (limit / 3).min(SWEEP));
    let mut turns = ledger.numbers().turns.load(Ordering::Relaxed);
    let mut swept = Instant::now();
    loop {
        match woken.recv_timeout(look) {
            Ok(TrackerWakeup::Signal) => return Ok(()),
            Ok(TrackerWakeup::Ended(what)) => {
                return Err(format!("the {what} thread ended; see the log"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err("nobody is left to wake the tracker".into());
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if swept.elapsed() >= SWEEP {
            swept = Instant::now();
            let gone = table.sweep(api::now());
            if !gone.is_empty() {
                ledger.gone(gone, table.clone());
            }
        }
        let now = ledger.numbers().turns.load(Ordering::Relaxed);
        if now != turns && watchdog.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        turns = now;
    }
}
