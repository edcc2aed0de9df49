//! The thread that owns the database. It runs all waiting jobs in one transaction, commits, and
//! only then answers. So an answered change survives a crash, and thousands of changes a second
//! share a few hundred commits.

use crate::clock::TrackerTime;
use crate::database::{BindOutcome, KnownIdentity, ReportOutcome, SideReport, TrackerDatabase};
use crate::reputation::Reputation;
use crate::table::{PeerAddress, PersistedPeer, TrackerTable};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use peerix::lock::{Mutex, RwLock};
use peerix::log_throttle::LogThrottle;
use scopeguard::{defer, guard};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, io};

/// Maximum number of waiting jobs: one for each possible connection. At the bound, callers that
/// need an answer block, and other jobs are dropped.
const MAX_QUEUED_JOBS: usize = 1024;
/// Maximum number of jobs in one transaction.
const MAX_BATCH_JOBS: usize = 512;
/// Maximum wait for an answer of the database. After it, the caller gets [`DatabaseUnavailable`].
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between pruning steps.
const PRUNE_INTERVAL: Duration = Duration::from_secs(1);
/// Interval between pruning steps that scan a whole table.
const FULL_PRUNE_INTERVAL: Duration = Duration::from_secs(3600);
/// Interval at which the time is stored as that of the running tracker, which a restart reads.
const ALIVE_INTERVAL: Duration = Duration::from_secs(60);
/// Maximum bytes of filters that wait to be written. At the bound, a filter is not stored, and the
/// tracker requests it from its node after a restart.
const MAX_WAITING_FILTERS: usize = 64 << 20;
/// Free disk space in bytes below which [`DatabaseThread::probe`] fails. It leaves room for the
/// write-ahead log, and time to act.
const MIN_FREE_BYTES: u64 = 16 << 20;
/// Minimum interval between tests whether the database is writable.
const PROBE_INTERVAL: Duration = Duration::from_secs(5);

/// The database cannot be used now, for this reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseUnavailable(pub String);

impl fmt::Display for DatabaseUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "database: {}", self.0)
    }
}

impl std::error::Error for DatabaseUnavailable {}

/// Counters of the database thread.
#[derive(Default)]
pub struct DatabaseStats {
    /// Committed transactions.
    pub commits: AtomicU64,
    /// Time of these transactions in microseconds.
    pub commit_micros: AtomicU64,
    /// Batches in which a job or the commit failed.
    pub failures: AtomicU64,
    /// Rounds of the thread. The watchdog checks that the number grows.
    pub turns: AtomicU64,
}

/// A unit of work for the database thread.
trait DatabaseJob: Send {
    fn run(&mut self, database: &mut TrackerDatabase) -> rusqlite::Result<()>;
    fn answer(self: Box<Self>, outcome: Result<(), DatabaseUnavailable>);
}

struct JobRequest<T, F> {
    work: Option<F>,
    value: Option<T>,
    reply: Sender<Result<T, DatabaseUnavailable>>,
}

impl<T: Send, F: FnOnce(&mut TrackerDatabase) -> rusqlite::Result<T> + Send> DatabaseJob
    for JobRequest<T, F>
{
    fn run(&mut self, database: &mut TrackerDatabase) -> rusqlite::Result<()> {
        if let Some(work) = self.work.take() {
            self.value = Some(work(database)?);
        }
        Ok(())
    }

    fn answer(self: Box<Self>, outcome: Result<(), DatabaseUnavailable>) {
        let JobRequest { value, reply, .. } = *self;
        let value =
            outcome.and_then(|()| value.ok_or_else(|| DatabaseUnavailable("not done".into())));
        // The caller may have given up.
        let _ = reply.try_send(value);
    }
}

/// Handle of the database thread. Dropping it ends the thread and closes the database.
pub struct DatabaseThread {
    /// `None` once the handle is closed.
    jobs: RwLock<Option<Sender<Box<dyn DatabaseJob>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    stats: Arc<DatabaseStats>,
    tracker_id: String,
    dir: PathBuf,
    waiting_filters: Arc<AtomicUsize>,
    last_probe: Mutex<Option<(Instant, Result<(), DatabaseUnavailable>)>>,
}

impl DatabaseThread {
    /// Opens the database and starts its thread. Returns the peers that were live when the tracker
    /// stopped. `on_change` gets each changed reputation after its commit, in order. `on_end` runs
    /// when the thread ends, even by a panic.
    ///
    /// # Errors
    /// Returns one line that says what is wrong.
    pub fn open(
        path: &Path,
        on_change: impl Fn(&str, Reputation) + Send + 'static,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<(DatabaseThread, Vec<PersistedPeer>), String> {
        let mut database = TrackerDatabase::open(path)?;
        let now = TrackerTime::now().ms;
        let present = database
            .live_peers(now)
            .and_then(|present| database.record_alive(now).map(|()| present))
            .map_err(|e| format!("database {}: {e}", path.display()))?;
        let dir = path
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
            .to_owned();
        let tracker_id = database.tracker_id().to_owned();
        let (jobs, queue) = bounded(MAX_QUEUED_JOBS);
        let stats = Arc::new(DatabaseStats::default());
        let database_loop = DatabaseLoop {
            database,
            stats: stats.clone(),
            on_change,
            faults: LogThrottle::default(),
            last_prune: Instant::now(),
            last_full_prune: None,
            alive_recorded: None,
        };
        let thread = thread::Builder::new().name("database".into()).spawn(move || {
            defer!(on_end());
            database_loop.run(&queue);
        });
        let thread = thread.map_err(|e: io::Error| format!("database thread: {e}"))?;
        let (jobs, thread) = (RwLock::new(Some(jobs)), Mutex::new(Some(thread)));
        let (waiting_filters, last_probe) = Default::default();
        Ok((
            DatabaseThread { jobs, thread, stats, tracker_id, dir, waiting_filters, last_probe },
            present,
        ))
    }

    /// The tracker's random ID.
    pub fn tracker_id(&self) -> &str {
        &self.tracker_id
    }

    /// The counters of the thread.
    pub fn stats(&self) -> &DatabaseStats {
        &self.stats
    }

    /// Returns the key and reputation of an ID. Blocks for at most 10 s.
    ///
    /// # Errors
    /// The database cannot be used.
    pub fn known_identity(&self, id: &str) -> Result<KnownIdentity, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |database| database.known_identity(&id))
    }

    /// Binds an ID to a key, unless it is bound to another. Blocks for at most 10 s. After an
    /// error, the ID may be bound all the same.
    pub fn bind(&self, id: &str, key: [u8; 32]) -> Result<BindOutcome, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |database| database.bind(&id, &key, today()))
    }

    /// Records that a bound ID was seen today. Does not block; may be lost.
    pub fn record_seen(&self, id: &str) {
        let id = id.to_owned();
        self.submit(move |database| database.record_seen(&id, today()));
    }

    /// Records the address of a live peer. Does not block; may be lost.
    pub fn record_address(&self, id: &str, at: &PeerAddress) {
        let (id, at) = (id.to_owned(), at.clone());
        self.submit(move |database| database.record_address(&id, &at));
    }

    /// Records that these peers are no longer live, except those that are in `table` again by the
    /// time the database is written: their [`DatabaseThread::record_address`] may come first. Does
    /// not block; may be lost.
    pub fn remove_live(&self, ids: Vec<Arc<str>>, table: Arc<TrackerTable>) {
        self.submit(move |database| {
            ids.iter().filter(|id| !table.contains(id)).try_for_each(|id| database.remove_live(id))
        });
    }

    /// Records a peer's new filter. Does not block; may be lost.
    pub fn record_filter(&self, id: &str, timestamp: u64, filter: Vec<u8>) {
        let (id, len, waiting) = (id.to_owned(), filter.len(), self.waiting_filters.clone());
        let fits = waiting.fetch_add(len, Ordering::Relaxed) + len <= MAX_WAITING_FILTERS;
        let written = guard((), move |()| {
            waiting.fetch_sub(len, Ordering::Relaxed);
        });
        if fits {
            self.submit(move |database| {
                let _written = written;
                database.record_filter(&id, timestamp, &filter)
            });
        }
    }

    /// Returns the reputation of an ID. Blocks for at most 10 s.
    pub fn reputation(&self, id: &str) -> Result<Reputation, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |database| database.reputation(&id))
    }

    /// Begins transfers, and returns the first one's ID. Blocks for at most 10 s. After an error,
    /// they may have begun all the same.
    pub fn begin_transfers(
        &self,
        sender: String,
        receiver: String,
        count: u32,
    ) -> Result<u64, DatabaseUnavailable> {
        self.ask(move |database| database.begin_transfers(&sender, &receiver, count, seconds()))
    }

    /// Records one side's report of a transfer. Blocks for at most 10 s. After an error, the report
    /// may be recorded all the same.
    pub fn report(&self, report: SideReport) -> Result<ReportOutcome, DatabaseUnavailable> {
        self.ask(move |database| database.report(&report, today()))
    }

    /// Checks that the database can be written to. The result may be up to 5 s old. Blocks for 10 s
    /// at most for each caller that is waiting.
    pub fn probe(&self) -> Result<(), DatabaseUnavailable> {
        let mut last_probe = self.last_probe.lock();
        match &*last_probe {
            Some((at, outcome)) if at.elapsed() < PROBE_INTERVAL => outcome.clone(),
            _ => {
                let outcome = self
                    .check_disk_space()
                    .and_then(|()| self.ask(|database| database.probe(seconds())));
                *last_probe = Some((Instant::now(), outcome.clone()));
                outcome
            }
        }
    }

    /// Checks that the disk has free space. The write test does not show that, as overwriting a row
    /// succeeds on a full disk.
    fn check_disk_space(&self) -> Result<(), DatabaseUnavailable> {
        let Ok(disk) = rustix::fs::statvfs(&self.dir) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if disk.f_blocks > 0 && free < MIN_FREE_BYTES {
            return Err(DatabaseUnavailable(format!(
                "the disk is full: {} KiB are free at {}",
                free >> 10,
                self.dir.display()
            )));
        }
        Ok(())
    }

    /// Runs the waiting jobs, ends the thread and closes the database. Blocks until that is done.
    /// Later calls fail.
    pub fn close(&self) {
        // The thread ends when the last sender is dropped.
        *self.jobs.write() = None;
        let thread = self.thread.lock().take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn jobs(&self) -> Option<Sender<Box<dyn DatabaseJob>>> {
        self.jobs.read().clone()
    }

    fn submit(
        &self,
        work: impl FnOnce(&mut TrackerDatabase) -> rusqlite::Result<()> + Send + 'static,
    ) {
        let (reply, _) = bounded(1);
        if let Some(jobs) = self.jobs() {
            let _ = jobs.try_send(Box::new(JobRequest { work: Some(work), value: None, reply }));
        }
    }

    fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut TrackerDatabase) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, DatabaseUnavailable> {
        let (reply, answer) = bounded(1);
        let job = Box::new(JobRequest { work: Some(work), value: None, reply });
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let ended = || DatabaseUnavailable("its thread has ended".into());
        let late = || DatabaseUnavailable(format!("no answer in {} s", ANSWER_TIMEOUT.as_secs()));
        let jobs = self.jobs().ok_or_else(ended)?;
        jobs.send_timeout(job, ANSWER_TIMEOUT).map_err(|e| match e {
            SendTimeoutError::Timeout(_) => late(),
            SendTimeoutError::Disconnected(_) => ended(),
        })?;
        drop(jobs);
        match answer.recv_deadline(deadline) {
            Ok(outcome) => outcome,
            Err(RecvTimeoutError::Timeout) => Err(late()),
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
        }
    }
}

impl Drop for DatabaseThread {
    fn drop(&mut self) {
        self.close();
    }
}

/// Days since 1970.
fn today() -> i64 {
    TrackerTime::now().day() as i64
}

/// Seconds since 1970.
fn seconds() -> f64 {
    TrackerTime::now().ms as f64 / 1000.0
}

/// State of the database thread.
struct DatabaseLoop<F> {
    database: TrackerDatabase,
    stats: Arc<DatabaseStats>,
    /// Gets each changed reputation after its commit.
    on_change: F,
    faults: LogThrottle,
    last_prune: Instant,
    /// When a pruning step last scanned a whole table; `None` before the first one.
    last_full_prune: Option<Instant>,
    /// When the time was last stored as that of the running tracker.
    alive_recorded: Option<Instant>,
}

impl<F: Fn(&str, Reputation)> DatabaseLoop<F> {
    /// Runs jobs and prunes until all senders of `queue` are dropped.
    fn run(mut self, queue: &Receiver<Box<dyn DatabaseJob>>) {
        loop {
            self.stats.turns.fetch_add(1, Ordering::Relaxed);
            let mut batch = Vec::new();
            match queue.recv_timeout(PRUNE_INTERVAL.saturating_sub(self.last_prune.elapsed())) {
                Ok(job) => batch.push(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    if let Err(e) = self.database.record_alive(TrackerTime::now().ms) {
                        log::debug!("database: {e}");
                    }
                    return;
                }
            }
            batch.extend(queue.try_iter().take(MAX_BATCH_JOBS - batch.len()));
            let is_prune_due = self.last_prune.elapsed() >= PRUNE_INTERVAL;
            if !batch.is_empty() || is_prune_due {
                self.run_batch(batch);
            }
            if is_prune_due {
                self.prune();
            }
        }
    }

    /// Runs jobs in one transaction, commits, and answers them.
    fn run_batch(&mut self, mut batch: Vec<Box<dyn DatabaseJob>>) {
        let began = Instant::now();
        let mut outcomes = Vec::with_capacity(batch.len());
        let committed = transact(&mut self.database, |database| {
            for job in &mut batch {
                outcomes.push(
                    database
                        .run_job(|database| job.run(database))
                        .map_err(|e| DatabaseUnavailable(e.to_string())),
                );
            }
            Ok(())
        });
        match committed {
            Ok(changed) => {
                self.stats.commits.fetch_add(1, Ordering::Relaxed);
                self.stats
                    .commit_micros
                    .fetch_add(began.elapsed().as_micros() as u64, Ordering::Relaxed);
                // Before the answers, so that a client that has one sees the new reputation.
                changed.iter().for_each(|(id, reputation)| (self.on_change)(id, *reputation));
            }
            Err(e) => outcomes = vec![Err(DatabaseUnavailable(e.to_string())); batch.len()],
        }
        if let Some(Err(e)) = outcomes.iter().find(|outcome| outcome.is_err()) {
            self.stats.failures.fetch_add(1, Ordering::Relaxed);
            if self.faults.allow(began) {
                log::error!("{e}");
            }
        }
        batch.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
    }

    /// Deletes old rows in small steps, and stores that the tracker is running.
    fn prune(&mut self) {
        let now = Instant::now();
        let is_due = |last: Option<Instant>, interval| {
            last.is_none_or(|at| now.saturating_duration_since(at) >= interval)
        };
        let is_full_prune_due = is_due(self.last_full_prune, FULL_PRUNE_INTERVAL);
        let is_alive_due = is_due(self.alive_recorded, ALIVE_INTERVAL);
        let done = transact(&mut self.database, |database| {
            database.prune_transfers(seconds())?;
            database.prune_identities(today())?;
            if is_full_prune_due {
                database.prune_reputations(today())?;
            }
            if is_alive_due {
                database.record_alive(TrackerTime::now().ms)?;
            }
            Ok(())
        });
        self.last_prune = now;
        if is_full_prune_due {
            self.last_full_prune = Some(now);
        }
        if is_alive_due {
            self.alive_recorded = Some(now);
        }
        if let Err(e) = done
            && self.faults.allow(now)
        {
            log::error!("database: pruning: {e}");
        }
    }
}

fn transact(
    database: &mut TrackerDatabase,
    work: impl FnOnce(&mut TrackerDatabase) -> rusqlite::Result<()>,
) -> rusqlite::Result<Vec<(String, Reputation)>> {
    let done = database.begin().and_then(|()| work(database)).and_then(|()| database.commit());
    if done.is_err() {
        database.roll_back();
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a peer that announces itself between the sweep and the deletion of its row,
    /// and so is missing after a restart of the tracker.
    #[test]
    fn peer_that_is_back_stays_in_database() {
        let dir = std::env::temp_dir().join(format!("peerix-ledger-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        defer!(drop(std::fs::remove_dir_all(&dir)));
        let file = dir.join("tracker.db");
        let now = TrackerTime::now();
        let table = Arc::new(TrackerTable::new(now, 1 << 20));
        let at = PeerAddress { addr: "a.example".into(), port: 1, from: [203, 0, 113, 1].into() };
        let (database, _) = DatabaseThread::open(&file, |_, _| {}, || {}).unwrap();
        for id in ["back", "away"] {
            database.record_address(id, &at);
        }
        table.announce("back", at, None, None, None, now).unwrap();
        database.remove_live(vec!["back".into(), "away".into()], table);
        database.close();
        let (_ledger, present) = DatabaseThread::open(&file, |_, _| {}, || {}).unwrap();
        let present: Vec<_> = present.into_iter().map(|peer| peer.id).collect();
        assert_eq!(present, ["back"]);
    }
}
