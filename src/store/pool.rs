//! Pool of connections to Nix's database: how they are opened, how many exist, and when they are
//! replaced.
//!
//! A database in WAL mode is readable only while the files `-wal` and `-shm` exist, or by a user
//! that may create them. SQLite removes them when the last process closes the database, so on an
//! idle machine they are usually missing. An unprivileged peerix therefore tries, in this order:
//!
//! 1. Open the database and query it.
//! 2. Make nix-daemon open it ([`super::daemon_socket`]) and repeat step 1 while the daemon has it
//!    open. The files exist as long as this process keeps a connection, so this is needed once.
//! 3. Read it as immutable, for one query, if the write-ahead log is empty and the file is the same
//!    before and after.
//!
//! For root step 1 always works: SQLite creates the two files, and the database itself is never
//! written. Every query without an open connection begins with step 1. The service's unit also
//! opens the database once as root before peerix starts, so that step 1 works from the beginning.

use super::{
    StoreError, daemon_socket,
    database::{Database, DatabaseError, FileId, FileStamp, OpenMode},
    path_info_cache::{CachedInfo, PathInfoCache},
};
use crate::lock::{Condvar, Mutex};
use crate::nix::{HashPart, StoreDir};
use crate::time_scale::Timeout;
use std::{
    fmt,
    path::PathBuf,
    sync::Arc,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// Interval between checks whether another file has replaced the open database. A replaced file is
/// read for at most this much longer.
const REPLACEMENT_CHECK_INTERVAL: Duration = Duration::from_secs(1);
/// Longest wait for nix-daemon, which starts a process for each connection; then it counts as
/// unavailable.
const DAEMON_TIMEOUT: Timeout = Timeout::from_secs(2);
/// Least time between two attempts to wake nix-daemon.
const DAEMON_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Time that a process can need to open or close the database if it is preempted meanwhile. Once
/// attempts have failed for this long without a success between them, queries fail with
/// [`StoreError::WalUnavailable`] after one attempt.
const TRANSITION_TIMEOUT: Timeout = Timeout::from_secs(1);
/// Pause between two attempts to read a database that another process opens or closes.
const TRANSITION_POLL: Duration = Duration::from_millis(2);

/// Location of the database and of what belongs to it.
#[derive(Debug, Clone)]
pub(super) struct DatabaseLocation {
    pub(super) store_dir: StoreDir,
    pub(super) db: PathBuf,
    pub(super) daemon_socket: PathBuf,
}

/// How the database could be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum OpenMethod {
    Plain,
    Daemon,
    Immutable,
}

impl fmt::Display for OpenMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OpenMethod::Plain => "opened read-only",
            OpenMethod::Daemon => "opened read-only after nix-daemon had opened it",
            OpenMethod::Immutable => {
                "read as immutable, one query at a time, as nobody has it open and its log is empty"
            }
        })
    }
}

/// A query on an open database.
type DatabaseQuery<'a, T> = dyn Fn(&Database) -> Result<T, DatabaseError> + 'a;

/// A bounded set of connections, each used by one thread at a time.
#[derive(Debug)]
pub(super) struct ConnectionPool {
    location: DatabaseLocation,
    /// Most connections; further queries wait until one is returned.
    max_connections: usize,
    /// Longest wait of one query for locks and for a connection; then it fails with
    /// [`StoreError::Busy`].
    timeout: Duration,
    /// Level at which the pool logs how it opened the database.
    level: log::Level,
    state: Mutex<PoolState>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct PoolState {
    /// Connections that are not in use, the most recently used last. At least one stays open once a
    /// query has succeeded, so that SQLite's files continue to exist.
    idle: Vec<Database>,
    in_use: usize,
    file: Option<FileId>,
    file_checked: Option<Instant>,
    daemon_tried: Option<Instant>,
    /// Attempts that failed since the last one that succeeded.
    failing: Option<FailingAttempts>,
    open_method: Option<OpenMethod>,
}

/// Attempts to read the database that failed in a row.
#[derive(Debug, Clone, Copy)]
struct FailingAttempts {
    first: Instant,
    last: Instant,
}

impl ConnectionPool {
    pub(super) fn new(
        location: DatabaseLocation,
        max_connections: usize,
        timeout: Duration,
        level: log::Level,
    ) -> Self {
        ConnectionPool {
            location,
            max_connections,
            timeout,
            level,
            state: Mutex::default(),
            returned: Condvar::default(),
        }
    }

    /// Looks up the valid path with this hash part, in the cache or in the database. Blocks for at
    /// most `timeout` on locks and connections.
    pub(super) fn path_info(
        &self,
        cache: &PathInfoCache,
        part: &HashPart,
    ) -> Result<CachedInfo, StoreError> {
        self.read(&|database| self.look_up(database, cache, generation(database, cache)?, part))
    }

    /// Looks up the valid paths with these hash parts. A malformed row counts as absent. Blocks for
    /// at most `timeout` on locks and connections.
    pub(super) fn path_infos(
        &self,
        cache: &PathInfoCache,
        parts: &[HashPart],
    ) -> Result<Vec<CachedInfo>, StoreError> {
        self.read(&|database| {
            // Taken before the transaction, whose reads then see this generation or a later state.
            let generation = generation(database, cache)?;
            let look_up = |part| match self.look_up(database, cache, generation, part) {
                Err(DatabaseError::Error(error @ StoreError::Row { .. })) => {
                    log::debug!("{error}");
                    Ok(None)
                }
                answer => answer,
            };
            let read = || parts.iter().map(look_up).collect();
            // For one path, the two more statements would cost more than they save.
            if parts.len() > 1 { database.in_transaction(read) } else { read() }
        })
    }

    fn look_up(
        &self,
        database: &Database,
        cache: &PathInfoCache,
        generation: Option<u64>,
        part: &HashPart,
    ) -> Result<CachedInfo, DatabaseError> {
        if let Some(answer) = generation.and_then(|generation| cache.get(part, generation)) {
            return Ok(answer);
        }
        let answer = database.path_info(&self.location.store_dir, part)?.map(Arc::new);
        if let Some(generation) = generation {
            cache.put(*part, generation, &answer);
        }
        Ok(answer)
    }

    /// Returns the cache generation of the database; `None` if that would wait for a connection or
    /// a lock, or if no connection is open.
    pub(super) fn try_generation(&self, cache: &PathInfoCache) -> Option<u64> {
        self.check_replacement().ok()?;
        let now = Instant::now();
        let mut lease = self.lease(now).ok()?;
        let database = lease.database.take()?;
        let generation = run_query(&database, &|database| cache.generation(database), now);
        // A lock held by a writer is no reason to reopen the database.
        if matches!(generation, Ok(_) | Err(DatabaseError::Error(StoreError::Busy { .. }))) {
            lease.database = Some(database);
        }
        generation.ok()
    }

    /// Runs `query` on a connection, and on a new one if the open one fails. It may run more than
    /// once. Blocks for at most `timeout` on locks and connections.
    pub(super) fn read<T>(&self, query: &DatabaseQuery<'_, T>) -> Result<T, StoreError> {
        let deadline = Instant::now() + self.timeout;
        self.check_replacement()?;
        let mut lease = self.lease(deadline)?;
        if let Some(database) = lease.database.take() {
            match run_query(&database, query, deadline) {
                Ok(answer) => {
                    lease.database = Some(database);
                    return Ok(answer);
                }
                Err(DatabaseError::Error(
                    error @ (StoreError::Row { .. } | StoreError::Busy { .. }),
                )) => {
                    lease.database = Some(database);
                    return Err(error);
                }
                // A new connection may succeed, or fails with the cause.
                Err(_) => drop(database),
            }
        }
        self.open_and_query(&mut lease, query, deadline)
    }

    fn open_and_query<T>(
        &self,
        lease: &mut ConnectionLease<'_>,
        query: &DatabaseQuery<'_, T>,
        deadline: Instant,
    ) -> Result<T, StoreError> {
        if let Some(result) = self.finish_attempt(
            self.attempt(lease, OpenMode::Shared, query, deadline),
            OpenMethod::Plain,
        ) {
            return result;
        }
        let mut daemon_error = "not asked again so soon".to_owned();
        if self.try_begin_daemon_wake() {
            match daemon_socket::wake(
                &self.location.daemon_socket,
                deadline.min(Instant::now() + DAEMON_TIMEOUT.get()),
            ) {
                Ok(_awake_until_we_have_opened_it) => {
                    if let Some(result) = self.finish_attempt(
                        self.attempt(lease, OpenMode::Shared, query, deadline),
                        OpenMethod::Daemon,
                    ) {
                        return result;
                    }
                    daemon_error = "connected, but has another database open".to_owned();
                }
                Err(error) => daemon_error = error.to_string(),
            }
        }
        self.query_during_transition(lease, query, deadline).unwrap_or_else(|| {
            Err(StoreError::WalUnavailable { db: self.location.db.clone(), daemon: daemon_error })
        })
    }

    /// Queries the database as immutable, or as soon as another process has it open. `None` if
    /// neither becomes possible in time.
    fn query_during_transition<T>(
        &self,
        lease: &mut ConnectionLease<'_>,
        query: &DatabaseQuery<'_, T>,
        deadline: Instant,
    ) -> Option<Result<T, StoreError>> {
        let db = &self.location.db;
        loop {
            // A process that wrote a moment ago opens and closes the database, and is done in
            // another moment.
            if let Some(before) = FileStamp::observe(db)
                .filter(|before| before.unsettled(SystemTime::now()).is_none())
            {
                let answer = self.attempt(lease, OpenMode::Immutable, query, deadline);
                lease.database = None; // for this one query only
                if FileStamp::observe(db) == Some(before)
                    && let Some(result) = self.finish_attempt(answer, OpenMethod::Immutable)
                {
                    return Some(result);
                }
            }
            // If a process is writing, the files exist now.
            let answer = self.attempt(lease, OpenMode::Shared, query, deadline);
            if let Some(result) = self.finish_attempt(answer, OpenMethod::Plain) {
                return Some(result);
            }
            if left(deadline).is_zero() || self.record_failed_attempt(Instant::now()) {
                return None;
            }
            thread::sleep(TRANSITION_POLL.min(left(deadline)));
        }
    }

    /// Records a failed attempt at `now`. Returns true if all attempts have failed for
    /// [`TRANSITION_TIMEOUT`].
    fn record_failed_attempt(&self, now: Instant) -> bool {
        let timeout = TRANSITION_TIMEOUT.get();
        let mut state = self.state.lock();
        // A failure long before says nothing about this one.
        let failing = state.failing.filter(|failing| now - failing.last < timeout);
        let first = failing.map_or(now, |failing| failing.first);
        state.failing = Some(FailingAttempts { first, last: now });
        now - first >= timeout
    }

    /// Converts the result of an attempt and records the method that succeeded. `None` if the
    /// database was asleep, so that the caller tries another method.
    fn finish_attempt<T>(
        &self,
        answer: Result<T, DatabaseError>,
        method: OpenMethod,
    ) -> Option<Result<T, StoreError>> {
        match answer {
            Ok(answer) => {
                self.record_open_method(method);
                Some(Ok(answer))
            }
            Err(DatabaseError::Error(error)) => Some(Err(error)),
            Err(DatabaseError::WalUnavailable) => None,
        }
    }

    fn attempt<T>(
        &self,
        lease: &mut ConnectionLease<'_>,
        mode: OpenMode,
        query: &DatabaseQuery<'_, T>,
        deadline: Instant,
    ) -> Result<T, DatabaseError> {
        let database = Database::open(&self.location.db, mode, left(deadline))?;
        // SQLite opens the files only at the first query.
        let answer = run_query(&database, query, deadline);
        if matches!(answer, Ok(_) | Err(DatabaseError::Error(StoreError::Row { .. }))) {
            lease.database = Some(database);
        }
        answer
    }

    /// Waits until `deadline` for an idle connection or for the right to open one.
    fn lease(&self, deadline: Instant) -> Result<ConnectionLease<'_>, StoreError> {
        let full =
            |state: &mut PoolState| state.idle.is_empty() && state.in_use >= self.max_connections;
        let state = self.state.lock();
        let mut state = self.returned.wait_timeout_while(state, left(deadline), full);
        if full(&mut state) {
            return Err(StoreError::Busy { db: self.location.db.clone() });
        }
        state.in_use += 1;
        let database = state.idle.pop();
        Ok(ConnectionLease { pool: self, database })
    }

    fn check_replacement(&self) -> Result<(), StoreError> {
        let now = Instant::now();
        {
            let mut state = self.state.lock();
            if state
                .file_checked
                .is_some_and(|checked| now.duration_since(checked) < REPLACEMENT_CHECK_INTERVAL)
            {
                return Ok(());
            }
            state.file_checked = Some(now);
        }
        let found = FileId::of(&self.location.db);
        let mut outdated = Vec::new();
        {
            let mut state = self.state.lock();
            let file = found.as_ref().ok().copied();
            if state.file.is_some() && state.file != file {
                log::log!(
                    self.level,
                    "nix database {}: the file was replaced or removed",
                    self.location.db.display()
                );
                outdated = std::mem::take(&mut state.idle);
            }
            state.file = file;
            if file.is_none() {
                state.file_checked = None;
            }
        }
        drop(outdated); // closed here, after unlocking
        found.map(drop)
    }

    fn try_begin_daemon_wake(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_due = state
            .daemon_tried
            .is_none_or(|tried| now.duration_since(tried) >= DAEMON_RETRY_INTERVAL);
        if is_due {
            state.daemon_tried = Some(now);
        }
        is_due
    }

    fn record_open_method(&self, method: OpenMethod) {
        let mut state = self.state.lock();
        state.failing = None;
        let before = state.open_method.replace(method);
        drop(state);
        if before != Some(method) {
            log::log!(self.level, "nix database {}: {method}", self.location.db.display());
        }
    }
}

/// The right to use one connection, and that connection if it is open. Returns both on drop.
struct ConnectionLease<'pool> {
    pool: &'pool ConnectionPool,
    database: Option<Database>,
}

impl Drop for ConnectionLease<'_> {
    fn drop(&mut self) {
        let mut outdated = None;
        {
            let mut state = self.pool.state.lock();
            state.in_use -= 1;
            match self.database.take() {
                Some(database) if state.file == Some(database.file) => state.idle.push(database),
                other => outdated = other,
            }
        }
        self.pool.returned.notify_one();
        drop(outdated); // closed here, after unlocking
    }
}

/// Returns the generation under which answers are cached. `None` for an immutable database: whether
/// its answers are correct is known only afterwards, so they are not cached.
fn generation(database: &Database, cache: &PathInfoCache) -> Result<Option<u64>, DatabaseError> {
    if database.mode == OpenMode::Immutable {
        Ok(None)
    } else {
        cache.generation(database).map(Some)
    }
}

fn run_query<T>(
    database: &Database,
    query: &DatabaseQuery<'_, T>,
    deadline: Instant,
) -> Result<T, DatabaseError> {
    database.set_busy_timeout(left(deadline))?;
    query(database)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Fixture;
    use super::*;
    use std::cell::Cell;

    /// A pool of one connection to the database of `fixture`, without a nix-daemon.
    fn pool(fixture: &Fixture) -> ConnectionPool {
        let config = fixture.config();
        let location = DatabaseLocation {
            store_dir: config.store_dir,
            db: config.db,
            daemon_socket: fixture.db().with_file_name("no-socket"),
        };
        ConnectionPool::new(location, 1, Duration::from_secs(60), log::Level::Debug)
    }

    #[test]
    fn attempts_that_failed_for_a_second_without_a_success_are_recognized() {
        let fixture = Fixture::new();
        let pool = pool(&fixture);
        let (timeout, moment) = (TRANSITION_TIMEOUT.get(), Duration::from_millis(1));
        let began = Instant::now();
        assert!(!pool.record_failed_attempt(began));
        assert!(!pool.record_failed_attempt(began + timeout - moment));
        assert!(pool.record_failed_attempt(began + timeout));
        assert!(pool.record_failed_attempt(began + timeout * 2 - moment));
        // After a success, or a time without attempts, another process may be opening it again.
        pool.record_open_method(OpenMethod::Plain);
        assert!(!pool.record_failed_attempt(began + timeout * 2));
        assert!(!pool.record_failed_attempt(began + timeout * 4));
    }

    #[test]
    fn query_fails_without_a_wait_once_attempts_have_failed_for_a_second() {
        let fixture = Fixture::new();
        let pool = pool(&fixture);
        let attempts = Cell::new(0);
        let query = |_: &Database| {
            attempts.set(attempts.get() + 1);
            Err::<(), _>(DatabaseError::WalUnavailable)
        };
        let now = Instant::now();
        // The last attempt is far in the future, so that the speed of the machine does not matter.
        let hour = Duration::from_secs(3600);
        pool.state.lock().failing = Some(FailingAttempts { first: now - hour, last: now + hour });
        assert!(matches!(pool.read(&query), Err(StoreError::WalUnavailable { .. })));
        // Shared, as immutable if the file has not changed for a while, and shared again.
        assert!((2..=3).contains(&attempts.get()), "{attempts:?}");
    }
}
