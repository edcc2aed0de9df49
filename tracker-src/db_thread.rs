//! The thread that owns the database. What waits for it is done together, committed together, and
//! only then answered, so that what was answered survives whatever happens next, and thousands of
//! writes a second share a few hundred commits.

use crate::database::{
    BindOutcome, KnownIdentity, PersistedPeer, ReportOutcome, SideReport, TrackerDatabase,
};
use crate::table::{PeerAddress, Reputation};
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender, bounded};
use peerix::deferred::Deferred;
use peerix::log_throttle::LogThrottle;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};

/// Jobs that wait: one of each connection that there can be.
const QUEUE: usize = 1024;
/// Jobs in one transaction.
const BATCH: usize = 512;
/// Who asks the database waits so long.
const PATIENCE: Duration = Duration::from_secs(10);
/// Old rows are looked for this often, between jobs.
const PRUNE: Duration = Duration::from_secs(1);
/// And those that take a look at everything, this often.
const PRUNE_ALL: Duration = Duration::from_secs(3600);
/// That the tracker runs is written this often, so that who is here is known after a restart.
const ALIVE: Duration = Duration::from_secs(60);
/// Filters that wait to be written, in bytes. Beyond, one is not: after a restart its node is asked
/// for it.
const MAX_WAITING_FILTERS: usize = 64 << 20;
/// Free space of the disk below which the tracker is not well: room for its write-ahead log, and
/// time for somebody to act.
const LEAST_FREE: u64 = 16 << 20;
/// Whether the database can be written to is tried this often at most.
const PROBE: Duration = Duration::from_secs(5);

/// The database cannot be used now; why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatabaseUnavailable(pub String);

impl fmt::Display for DatabaseUnavailable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "database: {}", self.0)
    }
}

impl std::error::Error for DatabaseUnavailable {}

/// What the database does, in numbers.
#[derive(Default)]
pub struct DatabaseStats {
    /// Transactions committed.
    pub commits: AtomicU64,
    /// Time that took, in microseconds.
    pub commit_micros: AtomicU64,
    /// Transactions that failed.
    pub failures: AtomicU64,
    /// Rounds of the thread, by which a watchdog sees that it turns.
    pub turns: AtomicU64,
}

/// Something to do with the database.
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
        // Who asked may have gone.
        let _ = reply.try_send(value);
    }
}

/// The ledger's handle. Dropping it closes it.
pub struct DatabaseThread {
    /// `None` once it is closed.
    jobs: RwLock<Option<Sender<Box<dyn DatabaseJob>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    numbers: Arc<DatabaseStats>,
    tracker_id: String,
    dir: PathBuf,
    waiting_filters: Arc<AtomicUsize>,
    probed: Mutex<Option<(Instant, Result<(), DatabaseUnavailable>)>>,
}

impl DatabaseThread {
    /// Opens the database, and gives who was here when it was closed. `on_change` is told every
    /// reputation that a commit has changed, in order; `on_end` runs when the thread ends, for
    /// whatever reason.
    ///
    /// # Errors
    /// One line that says what is wrong.
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
            let _end = Deferred::new(on_end);
            keep(books, &waiting, &shared, on_change);
        });
        let thread = thread.map_err(|e: io::Error| format!("ledger: {e}"))?;
        let (jobs, thread) = (RwLock::new(Some(jobs)), Mutex::new(Some(thread)));
        let (waiting_filters, probed) = Default::default();
        Ok((
            DatabaseThread { jobs, thread, numbers, tracker_id, dir, waiting_filters, probed },
            present,
        ))
    }

    /// The tracker's ID.
    pub fn tracker_id(&self) -> &str {
        &self.tracker_id
    }

    /// What it does.
    pub fn numbers(&self) -> &DatabaseStats {
        &self.numbers
    }

    /// What is known of an ID.
    ///
    /// # Errors
    /// The database cannot be used, as for all that follow: then nothing was done, or, if it took
    /// too long, perhaps.
    pub fn meet(&self, id: &str) -> Result<KnownIdentity, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.meet(&id))
    }

    /// Binds an ID to a key.
    pub fn bind(&self, id: &str, key: [u8; 32]) -> Result<BindOutcome, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.bind(&id, &key, today()))
    }

    /// A bound ID was seen today. Not waited for, like the next three: it does not matter if it is
    /// lost.
    pub fn seen(&self, id: &str) {
        let id = id.to_owned();
        self.tell(move |books| books.seen(&id, today()));
    }

    /// A peer is here, or is elsewhere than before.
    pub fn arrived(&self, id: &str, at: &PeerAddress) {
        let (id, at) = (id.to_owned(), at.clone());
        self.tell(move |books| books.arrived(&id, &at));
    }

    /// These peers are gone.
    pub fn gone(&self, ids: Vec<Arc<str>>) {
        self.tell(move |books| ids.iter().try_for_each(|id| books.gone(id)));
    }

    /// A peer has another filter.
    pub fn published(&self, id: &str, stamp: u64, filter: Vec<u8>) {
        let (id, len, waiting) = (id.to_owned(), filter.len(), self.waiting_filters.clone());
        let fits = waiting.fetch_add(len, Ordering::Relaxed) + len <= MAX_WAITING_FILTERS;
        let written = Deferred::new(move || {
            waiting.fetch_sub(len, Ordering::Relaxed);
        });
        if fits {
            self.tell(move |books| {
                let _written = written;
                books.published(&id, stamp, &filter)
            });
        }
    }

    /// What an ID did.
    pub fn reputation(&self, id: &str) -> Result<Reputation, DatabaseUnavailable> {
        let id = id.to_owned();
        self.ask(move |books| books.reputation(&id))
    }

    /// Begins transfers. `None` if there are too many.
    pub fn begin_transfers(
        &self,
        sender: String,
        receiver: String,
        count: u32,
    ) -> Result<Option<u64>, DatabaseUnavailable> {
        self.ask(move |books| books.begin_transfers(&sender, &receiver, count, seconds()))
    }

    /// One side's report.
    pub fn report(&self, report: SideReport) -> Result<ReportOutcome, DatabaseUnavailable> {
        self.ask(move |books| books.report(&report, today()))
    }

    /// Whether the database can be written to, as of the last few seconds.
    pub fn probe(&self) -> Result<(), DatabaseUnavailable> {
        let mut probed = self.probed.lock().unwrap_or_else(PoisonError::into_inner);
        match &*probed {
            Some((at, outcome)) if at.elapsed() < PROBE => outcome.clone(),
            _ => {
                let outcome = self.room().and_then(|()| self.ask(|books| books.probe(seconds())));
                *probed = Some((Instant::now(), outcome.clone()));
                outcome
            }
        }
    }

    /// Whether the disk has room for what is written next: what is overwritten in place succeeds on
    /// a full disk.
    fn room(&self) -> Result<(), DatabaseUnavailable> {
        let Ok(disk) = rustix::fs::statvfs(&self.dir) else { return Ok(()) };
        let free = disk.f_bavail.saturating_mul(disk.f_frsize);
        if disk.f_blocks > 0 && free < LEAST_FREE {
            return Err(DatabaseUnavailable(format!(
                "the disk is full: {} KiB are free at {}",
                free >> 10,
                self.dir.display()
            )));
        }
        Ok(())
    }

    /// Ends the thread, after what waits is done, and closes the database. Whoever asks afterwards
    /// is told so.
    pub fn close(&self) {
        // The thread ends when the last sender is gone.
        *self.jobs.write().unwrap_or_else(PoisonError::into_inner) = None;
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }

    fn jobs(&self) -> Option<Sender<Box<dyn DatabaseJob>>> {
        self.jobs.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn tell(
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
        let until = Instant::now() + PATIENCE;
        let ended = || DatabaseUnavailable("the ledger has ended".into());
        let late = || DatabaseUnavailable(format!("no answer in {} s", PATIENCE.as_secs()));
        let jobs = self.jobs().ok_or_else(ended)?;
        jobs.send_timeout(job, PATIENCE).map_err(|e| match e {
            SendTimeoutError::Timeout(_) => late(),
            SendTimeoutError::Disconnected(_) => ended(),
        })?;
        drop(jobs);
        match answer.recv_deadline(until) {
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

fn keep(
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
                // Before the answers, so that who got one sees it.
                changed.iter().for_each(|(id, reputation)| on_change(id, *reputation));
            }
            Err(e) => outcomes = vec![Err(DatabaseUnavailable(e.to_string())); batch.len()],
        }
        if let Some(Err(e)) = outcomes.iter().find(|outcome| outcome.is_err()) {
            numbers.failures.fetch_add(1, Ordering::Relaxed);
            if faults.now(began) {
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
                && faults.now(pruned)
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
