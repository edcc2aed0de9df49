//! Starts the tracker's threads, waits for a signal, and stops them in order.

use crate::api::Api;
use crate::cli::Options;
use crate::clock::TrackerTime;
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
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Requested limit of file descriptors: one for each connection, and some others.
const FILE_DESCRIPTORS: u64 = 2048;

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
    service::allow_descriptors(FILE_DESCRIPTORS);
    let (listeners, port) = sockets::open_tcp(&options.hosts, options.port, "--host")?;
    let (wakeups, woken) = bounded(8);
    let ended = |what| {
        let wakeups = wakeups.clone();
        move || drop(wakeups.try_send(TrackerWakeup::Ended(what)))
    };
    let signal = wakeups.clone();
    let signals = service::watch_signals(move || drop(signal.try_send(TrackerWakeup::Signal)))
        .map_err(with_prefix("signals"))?;

    let now = TrackerTime::now();
    let table = Arc::new(TrackerTable::new(now, options.filter_memory));
    let reputation_table = table.clone();
    let on_change = move |id: &str, reputation| reputation_table.set_reputation(id, reputation);
    let (database, live_peers) =
        DatabaseThread::open(&options.db_path, on_change, ended("database"))?;
    log::info!("{} peers were here when the tracker ended", live_peers.len());
    live_peers.into_iter().for_each(|peer| table.restore(peer, now));
    let database = Arc::new(database);
    let reachability = reachability::start(&table, NameResolver::default(), ended("reach"))
        .map_err(with_prefix("reach"))?;
    let api =
        Arc::new(Api::new(table.clone(), database.clone(), reachability, options.proxies.clone()));
    let server =
        Server::start(listeners, api, ended("http")).map_err(with_prefix("http server"))?;

    log::info!("peerix-tracker {} serves on port {port}", env!("CARGO_PKG_VERSION"));
    notify(&[NotifyState::Ready]);
    let result = wait(&woken, &table, &database);
    notify(&[NotifyState::Stopping]);
    log::info!("stopping");
    // Requests under way need the database, so the server ends first. Its threads may keep a
    // reference to `database`, so it is closed explicitly.
    drop(server);
    database.close();
    drop(signals);
    result
}

fn with_prefix<E: Display>(what: &str) -> impl Fn(E) -> String {
    move |e| format!("{what}: {e}")
}

/// Blocks until the tracker has to stop. Removes expired peers meanwhile, and notifies systemd's
/// watchdog while the database thread makes progress.
fn wait(
    woken: &Receiver<TrackerWakeup>,
    table: &Arc<TrackerTable>,
    database: &DatabaseThread,
) -> Result<(), String> {
    let watchdog = sd_notify::watchdog_enabled();
    // The database thread makes at least one round a second.
    let interval = watchdog.map_or(SWEEP_INTERVAL, |limit| (limit / 3).min(SWEEP_INTERVAL));
    let mut last_turn = database.stats().turns.load(Ordering::Relaxed);
    let mut last_sweep = Instant::now();
    loop {
        match woken.recv_timeout(interval) {
            Ok(TrackerWakeup::Signal) => return Ok(()),
            Ok(TrackerWakeup::Ended(what)) => {
                return Err(format!("the {what} thread ended; see the log"));
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err("nobody is left to wake the tracker".into());
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if last_sweep.elapsed() >= SWEEP_INTERVAL {
            last_sweep = Instant::now();
            let gone = table.sweep(TrackerTime::now());
            if !gone.is_empty() {
                database.remove_live(gone, table.clone());
            }
        }
        let turn = database.stats().turns.load(Ordering::Relaxed);
        if turn != last_turn && watchdog.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        last_turn = turn;
    }
}
