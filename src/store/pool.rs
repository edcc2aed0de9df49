//! The connections to Nix's database: how they come to be open, how many there are, and when they
//! are too old.
//!
//! A database in WAL mode can be read only while the two files `-wal` and `-shm` are there, or by a
//! user that may create them. SQLite removes them when its last process closes the database, which
//! on an idle machine is always. So an unprivileged peerix tries, in this order:
//!
//! 1. to open and query;
//! 2. to have nix-daemon open it ([`super::daemon_socket`]), and then 1. again while the daemon
//!    still has it. As long as this process keeps a connection, the files stay, so this is needed
//!    once;
//! 3. to read it as immutable, for one query, if the log is empty and the file was the same before
//!    and after.
//!
//! (As root, 1. always works, and it is SQLite that creates the two files. The database itself is
//! never written to.)
//!
//! Every query without a lasting connection begins at 1. again. (The service's unit also opens the
//! database once as root before peerix starts, so that 1. holds from the beginning.)

use super::{
    StoreError, daemon_socket,
    database::{Database, DatabaseError, FileId, FileStamp, OpenMode},
    path_info_cache::{CachedInfo, PathInfoCache},
};
use crate::nix::{HashPart, StoreDir};
use crate::time_scale::Timeout;
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How often the path of the database is looked at, for a file that took the place of the open one.
const REPLACEMENT_CHECK: Duration = Duration::from_secs(1);
/// The longest wait for nix-daemon, which starts a process for each connection.
const DAEMON_PATIENCE: Timeout = Timeout::from_secs(2);
/// The pause between two attempts at nix-daemon.
const DAEMON_PAUSE: Duration = Duration::from_secs(5);

/// How often reading it as immutable is tried while nobody seems to write.
const ATTEMPTS: u32 = 10;
/// The pause between two of them.
const PAUSE: Duration = Duration::from_millis(2);

/// Where the database is and what surrounds it.
#[derive(Debug, Clone)]
pub(super) struct DatabaseLocation {
    pub(super) store_dir: StoreDir,
    pub(super) db: PathBuf,
    pub(super) daemon_socket: PathBuf,
}

/// What had to be done to read the database.
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

/// What is asked of an open database.
type DatabaseQuery<'a, T> = dyn Fn(&Database) -> Result<T, DatabaseError> + 'a;

/// Connections, at most so many, each used by one thread at a time.
#[derive(Debug)]
pub(super) struct ConnectionPool {
    place: DatabaseLocation,
    /// At most so many connections exist; who comes later waits for one.
    connections: usize,
    /// One lookup takes no longer than this, locks and waiting for a connection included.
    patience: Duration,
    /// How loudly it says how it opened the database.
    level: log::Level,
    state: Mutex<PoolState>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct PoolState {
    /// Those not in use, the one used last at the end. One stays open for ever, and with it
    /// SQLite's files.
    idle: Vec<Database>,
    in_use: usize,
    file: Option<FileId>,
    file_checked: Option<Instant>,
    daemon_tried: Option<Instant>,
    way: Option<OpenMethod>,
}

impl ConnectionPool {
    pub(super) fn new(
        place: DatabaseLocation,
        connections: usize,
        patience: Duration,
        level: log::Level,
    ) -> Self {
        ConnectionPool {
            place,
            connections,
            patience,
            level,
            state: Mutex::default(),
            returned: Condvar::new(),
        }
    }

    /// The valid path with this hash part, from the database or from what it said before.
    pub(super) fn path_info(
        &self,
        kept: &PathInfoCache,
        part: &HashPart,
    ) -> Result<CachedInfo, StoreError> {
        self.read(&|database| self.look_up(database, kept, generation(database, kept)?, part))
    }

    /// The valid paths with these hash parts. A row that cannot be read is passed over, as if it
    /// were not there.
    pub(super) fn path_infos(
        &self,
        kept: &PathInfoCache,
        parts: &[HashPart],
    ) -> Result<Vec<CachedInfo>, StoreError> {
        self.read(&|database| {
            // Before the transaction: what is read in it is of this state or a later one.
            let generation = generation(database, kept)?;
            let look_up = |part| match self.look_up(database, kept, generation, part) {
                Err(DatabaseError::Error(error @ StoreError::Row { .. })) => {
                    log::debug!("{error}");
                    Ok(None)
                }
                answer => answer,
            };
            let read = || parts.iter().map(look_up).collect();
            // For one path, two statements more would cost more than they save.
            if parts.len() > 1 { database.in_transaction(read) } else { read() }
        })
    }

    fn look_up(
        &self,
        database: &Database,
        kept: &PathInfoCache,
        generation: Option<u64>,
        part: &HashPart,
    ) -> Result<CachedInfo, DatabaseError> {
        if let Some(answer) = generation.and_then(|generation| kept.get(part, generation)) {
            return Ok(answer);
        }
        let answer = database.path_info(&self.place.store_dir, part)?.map(Arc::new);
        if let Some(generation) = generation {
            kept.put(*part, generation, &answer);
        }
        Ok(answer)
    }

    /// The state that the database is in, if that can be told without waiting for a connection or a
    /// lock.
    pub(super) fn generation_at_once(&self, kept: &PathInfoCache) -> Option<u64> {
        self.notice_replacement().ok()?;
        let now = Instant::now();
        let mut lease = self.lease(now).ok()?;
        let database = lease.database.take()?;
        let generation = ask(&database, &|database| kept.generation(database), now);
        // That somebody writes is no reason to open it anew.
        if matches!(generation, Ok(_) | Err(DatabaseError::Error(StoreError::Busy { .. }))) {
            lease.database = Some(database);
        }
        generation.ok()
    }

    /// What a question to the database gives. It may be asked more than once.
    pub(super) fn read<T>(&self, question: &DatabaseQuery<'_, T>) -> Result<T, StoreError> {
        let deadline = Instant::now() + self.patience;
        self.notice_replacement()?;
        let mut lease = self.lease(deadline)?;
        if let Some(database) = lease.database.take() {
            match ask(&database, question, deadline) {
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
                // A new connection may do better, or will say the same.
                Err(_) => drop(database),
            }
        }
        self.open_and_ask(&mut lease, question, deadline)
    }

    fn open_and_ask<T>(
        &self,
        lease: &mut ConnectionLease<'_>,
        question: &DatabaseQuery<'_, T>,
        deadline: Instant,
    ) -> Result<T, StoreError> {
        if let Some(told) =
            self.told(self.attempt(lease, OpenMode::Shared, question, deadline), OpenMethod::Plain)
        {
            return told;
        }
        let mut daemon_said = "not asked again so soon".to_owned();
        if self.may_wake_daemon() {
            match daemon_socket::wake(
                &self.place.daemon_socket,
                deadline.min(Instant::now() + DAEMON_PATIENCE.get()),
            ) {
                Ok(_awake_until_we_have_opened_it) => {
                    if let Some(told) = self.told(
                        self.attempt(lease, OpenMode::Shared, question, deadline),
                        OpenMethod::Daemon,
                    ) {
                        return told;
                    }
                    daemon_said = "connected, but has another database open".to_owned();
                }
                Err(error) => daemon_said = error.to_string(),
            }
        }
        let mut fruitless = 0;
        while fruitless < ATTEMPTS && !left(deadline).is_zero() {
            let before = FileStamp::observe(&self.place.db);
            // Whoever has written a moment ago opens and closes the database, and will be through
            // in another moment.
            let is_settled =
                before.as_ref().is_none_or(|still| still.unsettled(SystemTime::now()).is_none());
            fruitless = if is_settled { fruitless + 1 } else { 0 };
            if let Some(before) = before.filter(|_| is_settled) {
                let answer = self.attempt(lease, OpenMode::Immutable, question, deadline);
                lease.database = None; // for this one query only
                if FileStamp::observe(&self.place.db) == Some(before)
                    && let Some(told) = self.told(answer, OpenMethod::Immutable)
                {
                    return told;
                }
            }
            // If somebody writes, the files are there now.
            if let Some(told) = self
                .told(self.attempt(lease, OpenMode::Shared, question, deadline), OpenMethod::Plain)
            {
                return told;
            }
            thread::sleep(PAUSE.min(left(deadline)));
        }
        Err(StoreError::Asleep { db: self.place.db.clone(), daemon: daemon_said })
    }

    /// What an attempt told, by which way; `None` if the database was asleep and another way is to
    /// be tried.
    fn told<T>(
        &self,
        answer: Result<T, DatabaseError>,
        way: OpenMethod,
    ) -> Option<Result<T, StoreError>> {
        match answer {
            Ok(answer) => {
                self.note(way);
                Some(Ok(answer))
            }
            Err(DatabaseError::Error(error)) => Some(Err(error)),
            Err(DatabaseError::Asleep) => None,
        }
    }

    fn attempt<T>(
        &self,
        lease: &mut ConnectionLease<'_>,
        mode: OpenMode,
        question: &DatabaseQuery<'_, T>,
        deadline: Instant,
    ) -> Result<T, DatabaseError> {
        let database = Database::open(&self.place.db, mode, left(deadline))?;
        // A connection is opened in earnest by its first query only.
        let answer = ask(&database, question, deadline);
        if matches!(answer, Ok(_) | Err(DatabaseError::Error(StoreError::Row { .. }))) {
            lease.database = Some(database);
        }
        answer
    }

    fn state(&self) -> MutexGuard<'_, PoolState> {
        // No code that can panic runs while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for an idle connection, or for the right to open one.
    fn lease(&self, deadline: Instant) -> Result<ConnectionLease<'_>, StoreError> {
        let full =
            |state: &mut PoolState| state.idle.is_empty() && state.in_use >= self.connections;
        let (mut state, waited) = self
            .returned
            .wait_timeout_while(self.state(), left(deadline), full)
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(StoreError::Busy { db: self.place.db.clone() });
        }
        state.in_use += 1;
        let database = state.idle.pop();
        Ok(ConnectionLease { pool: self, database })
    }

    fn notice_replacement(&self) -> Result<(), StoreError> {
        let now = Instant::now();
        {
            let mut state = self.state();
            if state
                .file_checked
                .is_some_and(|checked| now.duration_since(checked) < REPLACEMENT_CHECK)
            {
                return Ok(());
            }
            state.file_checked = Some(now);
        }
        let found = FileId::of(&self.place.db);
        let mut outdated = Vec::new();
        {
            let mut state = self.state();
            let file = found.as_ref().ok().copied();
            if state.file.is_some() && state.file != file {
                log::log!(
                    self.level,
                    "nix database {}: the file was replaced or removed",
                    self.place.db.display()
                );
                outdated = std::mem::take(&mut state.idle);
            }
            state.file = file;
            if file.is_none() {
                state.file_checked = None;
            }
        }
        drop(outdated); // closed here, with the lock free
        found.map(drop)
    }

    fn may_wake_daemon(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state();
        let may = state.daemon_tried.is_none_or(|tried| now.duration_since(tried) >= DAEMON_PAUSE);
        if may {
            state.daemon_tried = Some(now);
        }
        may
    }

    fn note(&self, way: OpenMethod) {
        let before = self.state().way.replace(way);
        if before != Some(way) {
            log::log!(self.level, "nix database {}: {way}", self.place.db.display());
        }
    }
}

/// The right to use one connection, and that connection if it is open.
struct ConnectionLease<'pool> {
    pool: &'pool ConnectionPool,
    database: Option<Database>,
}

impl Drop for ConnectionLease<'_> {
    fn drop(&mut self) {
        let mut outdated = None;
        {
            let mut state = self.pool.state();
            state.in_use -= 1;
            match self.database.take() {
                Some(database) if state.file == Some(database.file) => state.idle.push(database),
                other => outdated = other,
            }
        }
        self.pool.returned.notify_one();
        drop(outdated); // closed here, with the lock free
    }
}

/// The state of the database under which its answers are kept; none are while it is read as
/// immutable, as whether they are right is known only afterwards.
fn generation(database: &Database, kept: &PathInfoCache) -> Result<Option<u64>, DatabaseError> {
    if database.mode == OpenMode::Immutable {
        Ok(None)
    } else {
        kept.generation(database).map(Some)
    }
}

fn ask<T>(
    database: &Database,
    question: &DatabaseQuery<'_, T>,
    deadline: Instant,
) -> Result<T, DatabaseError> {
    database.set_patience(left(deadline))?;
    question(database)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}
