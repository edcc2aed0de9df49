//! The thread that owns the database. It runs all waiting jobs in one transaction, commits, and
//! only then answers. So an answered change survives a crash, and thousands of changes a second
//! share a few hundred commits.

use crate::database::{
    BindOutcome, KnownIdentity, PersistedPeer, ReportOutcome, SideReport, TrackerDatabase,
};
use crate::table::{PeerAddress, Reputation, TrackerTable};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use peerix::lock::{Mutex, RwLock};
use peerix::log_throttle::LogThrottle;
use scopeguard::{defer, guard};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};

/// Maximum number of waiting jobs: one for each possible connection. At the bound, callers that
/// need an answer block, and other jobs are dropped.
const QUEUE: usize = 1024;
/// Maximum number of jobs in one transaction.
const BATCH: usize = 512;
/// Maximum wait for an answer of the database. After it, the caller gets [`DatabaseUnavailable`].
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval between pruning steps.
const PRUNE: Duration = Duration::from_secs(1);
/// Interval between pruning steps that scan a whole table.
const PRUNE_ALL: Duration = Duration::from_secs(3600);
/// Interval at which the time is stored as that of the running tracker, which a restart reads.
const ALIVE: Duration = Duration::from_secs(60);
/// Maximum bytes of filters that wait to be written. At the bound, a filter is not stored, and the
/// tracker requests it from its node after a restart.
const MAX_WAITING_FILTERS: usize = 64 << 20;
/// Free disk space in bytes below which [`DatabaseThread::probe`] fails. It leaves room for the
/// write-ahead log, and time to act.
const MIN_FREE_BYTES: u64 = 16 << 20;
/// Minimum interval between tests whether the database is writable.
const PROBE: Duration = Duration::from_secs(5);

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
    fn run(&mut self, books: &mut TrackerDatabase) -> rusqlite::Result<()>;
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
    fn run(&mut self, books: &mut TrackerDatabase) -> rusqlite::Result<()> {
        if let Some(work) = self.work.take() {
            self.value = Some(work(books)?);
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
    numbers: Arc<DatabaseStats>,
    tracker_id: String,
    dir: PathBuf,
    waiting_filters: Arc<AtomicUsize>,
    probed: Mutex<Option<(Instant, Result<(), DatabaseUnavailable>)>>,
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
        let mut books = TrackerDatabase::open(path)?;
        let present = books.present(milliseconds());
        let present = present.and_then(|present| books.alive(milliseconds()).map(|()| present));
        let present = present.map_err(|e| format!("database {}: {e}", path.display()))?;
        let dir = path
            .parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .unwrap_or(Path::new("."))
            .to_owned();
        let tracker_id = books.tracker_id().to_owned();
        let (jobs, waiting) = bounded(QUEUE);
        let numbers = Arc::new(DatabaseStats::default());
        let shared = numbers.clone();
        let thread = thread::Builder::new().name("ledger".into()).spawn(move || {
            defer!(on_end());
            run_jobs(books, &waiting, &shared, on_change);
        });
        let thread = thread.map_err(|e: io::Error| format!("ledger: {e}"))?;
        let (jobs, thread) = (RwLock::new(Some(jobs)), Mutex::new(Some(thread)));
        let (waiting_filters, probed) = Default::default();
        Ok((
            DatabaseThread { jobs, thread, numbers, tracker_id, dir, waiting_filters, probed },
            present,
        ))
    }

    /// The tracker's random ID.
    pub fn tracker_id(&self) -> &str {
        &self.tracker_id
    }

    /// The counters of the thread.
    pub fn numbers(&self) -> &DatabaseStats {
        &self.numbers
    }

    /// Returns the key and reputation of an ID. Blocks for at most 10 s.
    ///
    /// # Errors
    /// The database cannot be used.
    pub fn meet(&self, id: &str) -> Result<KnownIdentity, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.meet(&id))
    }

    /// Binds an ID to a key, unless it is bound to another. Blocks for at most 10 s. After an
    /// error, the ID may be bound all the same.
    pub fn bind(&self, id: &str, key: [u8; 32]) -> Result<BindOutcome, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.bind(&id, &key, today()))
    }

    /// Records that a bound ID was seen today. Does not block; may be lost.
    pub fn seen(&self, id: &str) {
        let id = id.to_owned();
        self.submit(move |books| books.seen(&id, today()));
    }

    /// Records the address of a live peer. Does not block; may be lost.
    pub fn arrived(&self, id: &str, at: &PeerAddress) {
        let (id, at) = (id.to_owned(), at.clone());
        self.submit(move |books| books.arrived(&id, &at));
    }

    /// Records that these peers are no longer live, except those that are in `table` again by the
    /// time the database is written: their [`DatabaseThread::arrived`] may come first. Does not
    /// block; may be lost.
    pub fn gone(&self, ids: Vec<Arc<str>>, table: Arc<TrackerTable>) {
        self.submit(move |books| {
            ids.iter().filter(|id| !table.has(id)).try_for_each(|id| books.gone(id))
        });
    }

    /// Records a peer's new filter. Does not block; may be lost.
    pub fn published(&self, id: &str, stamp: u64, filter: Vec<u8>) {
        let (id, len, waiting) = (id.to_owned(), filter.len(), self.waiting_filters.clone());
        let fits = waiting.fetch_add(len, Ordering::Relaxed) + len <= MAX_WAITING_FILTERS;
        let written = guard((), move |()| {
            waiting.fetch_sub(len, Ordering::Relaxed);
        });
        if fits {
            self.submit(move |books| {
                let _written = written;
                books.published(&id, stamp, &filter)
            });
        }
    }

    /// Returns the reputation of an ID. Blocks for at most 10 s.
    pub fn reputation(&self, id: &str) -> Result<Reputation, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.reputation(&id))
    }

    /// Begins transfers, and returns the first one's ID. Blocks for at most 10 s. After an error,
    /// they may have begun all the same.
    pub fn begin_transfers(
        &self,
        sender: String,
        receiver: String,
        count: u32,
    ) -> Result<u64, DatabaseUnavailable> {
        self.ask(move |books| books.begin_transfers(&sender, &receiver, count, seconds()))
    }

    /// Records one side's report of a transfer. Blocks for at most 10 s. After an error, the report
    /// may be recorded all the same.
    pub fn report(&self, report: SideReport) -> Result<ReportOutcome, DatabaseUnavailable> {
        self.ask(move |books| books.report(&report, today()))
    }

    /// Checks that the database can be written to. The result may be up to 5 s old. Blocks for 10 s
    /// at most for each caller that is waiting.
    pub fn probe(&self) -> Result<(), DatabaseUnavailable> {
        let mut probed = self.probed.lock();
        match &*probed {
            Some((at, outcome)) if at.elapsed() < PROBE => outcome.clone(),
            _ => {
                let outcome = self.room().and_then(|()| self.ask(|books| books.probe(seconds())));
                *probed = Some((Instant::now(), outcome.clone()));
                outcome
            }
        }
    }

    /// Checks that the disk has free space. The write test does not show that, as overwriting a row
    /// succeeds on a full disk.
    fn room(&self) -> Result<(), DatabaseUnavailable> {
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
        let ended = || DatabaseUnavailable("the ledger has ended".into());
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
    (seconds() / 86_400.0) as i64
}

/// Milliseconds since 1970.
fn milliseconds() -> u64 {
    (seconds() * 1000.0) as u64
}

/// Seconds since 1970.
fn seconds() -> f64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}

fn run_jobs(
    mut books: TrackerDatabase,
    waiting: &Receiver<Box<dyn DatabaseJob>>,
    numbers: &DatabaseStats,
    on_change: impl Fn(&str, Reputation),
) {
    let faults = LogThrottle::default();
    let mut pruned = Instant::now();
    let (mut pruned_all, mut said_alive): (Option<Instant>, Option<Instant>) = (None, None);
    loop {
        numbers.turns.fetch_add(1, Ordering::Relaxed);
        let mut batch: Vec<Box<dyn DatabaseJob>> = Vec::new();
        match waiting.recv_timeout(PRUNE.saturating_sub(pruned.elapsed())) {
            Ok(job) => batch.push(job),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => {
                if let Err(e) = books.alive(milliseconds()) {
                    log::debug!("database: {e}");
                }
                return;
            }
        }
        batch.extend(waiting.try_iter().take(BATCH - batch.len()));
        let prune = pruned.elapsed() >= PRUNE;
        let prune_all = prune && pruned_all.is_none_or(|at| at.elapsed() >= PRUNE_ALL);
        if batch.is_empty() && !prune {
            continue;
        }
        let began = Instant::now();
        let mut outcomes = Vec::with_capacity(batch.len());
        let committed = transact(&mut books, |books| {
            for job in &mut batch {
                outcomes.push(
                    books
                        .job(|books| job.run(books))
                        .map_err(|e| DatabaseUnavailable(e.to_string())),
                );
            }
            Ok(())
        });
        match &committed {
            Ok(changed) => {
                numbers.commits.fetch_add(1, Ordering::Relaxed);
                numbers
                    .commit_micros
                    .fetch_add(began.elapsed().as_micros() as u64, Ordering::Relaxed);
                // Before the answers, so that a client that has one sees the new reputation.
                changed.iter().for_each(|(id, reputation)| on_change(id, *reputation));
            }
            Err(e) => outcomes = vec![Err(DatabaseUnavailable(e.to_string())); batch.len()],
        }
        if let Some(Err(e)) = outcomes.iter().find(|outcome| outcome.is_err()) {
            numbers.failures.fetch_add(1, Ordering::Relaxed);
            if faults.allow(began) {
                log::error!("{e}");
            }
        }
        batch.into_iter().zip(outcomes).for_each(|(job, outcome)| job.answer(outcome));
        if prune {
            pruned = Instant::now();
            let say_alive = said_alive.is_none_or(|at| at.elapsed() >= ALIVE);
            let done = transact(&mut books, |books| {
                books.prune_transfers(seconds())?;
                books.prune_identities(today())?;
                if prune_all {
                    books.prune_reputations(today())?;
                }
                if say_alive {
                    books.alive(milliseconds())?;
                }
                Ok(())
            });
            pruned_all = if prune_all { Some(pruned) } else { pruned_all };
            said_alive = if say_alive { Some(pruned) } else { said_alive };
            if let Err(e) = done
                && faults.allow(pruned)
            {
                log::error!("database: pruning: {e}");
            }
        }
    }
}

fn transact(
    books: &mut TrackerDatabase,
    work: impl FnOnce(&mut TrackerDatabase) -> rusqlite::Result<()>,
) -> rusqlite::Result<Vec<(String, Reputation)>> {
    let done = books.begin().and_then(|()| work(books)).and_then(|()| books.commit());
    if done.is_err() {
        books.roll_back();
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::TrackerTime;

    /// Guards against a peer that announces itself between the sweep and the deletion of its row,
    /// and so is missing after a restart of the tracker.
    #[test]
    fn peer_that_is_back_stays_in_database() {
        let dir = std::env::temp_dir().join(format!("peerix-ledger-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        defer!(drop(std::fs::remove_dir_all(&dir)));
        let file = dir.join("tracker.db");
        let now = TrackerTime { at: Instant::now(), ms: milliseconds() };
        let table = Arc::new(TrackerTable::new(now, 1 << 20));
        let at = PeerAddress { addr: "a.example".into(), port: 1, from: [203, 0, 113, 1].into() };
        let (ledger, _) = DatabaseThread::open(&file, |_, _| {}, || {}).unwrap();
        for id in ["back", "away"] {
            ledger.arrived(id, &at);
        }
        table.announce("back", at, None, None, None, now).unwrap();
        ledger.gone(vec!["back".into(), "away".into()], table);
        ledger.close();
        let (_ledger, present) = DatabaseThread::open(&file, |_, _| {}, || {}).unwrap();
        let present: Vec<_> = present.into_iter().map(|peer| peer.id).collect();
        assert_eq!(present, ["back"]);
    }
}
