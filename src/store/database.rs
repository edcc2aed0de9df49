//! One read-only connection to Nix's SQLite database: opening it, its queries, and the conversion
//! of rows to typed values.

use super::StoreError;
use crate::nix::{
    DerivationId, DrvOutput, HashPart, Malformed, NarHash, NarInfo, PathInfo, Realisation,
    Signature, StoreDir, StorePath,
};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_encode};
use rusqlite::{Connection, ErrorCode, OpenFlags, Row, types::ValueRef};
use rustix::fs::{Access, Stat, access, stat};
use std::{
    cell::Cell,
    ffi::OsString,
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime},
};

/// The only supported schema version; Nix has had it since 2015.
pub(super) const SCHEMA: &str = "10";

/// Page cache of one connection, in KiB. It holds the inner pages of the two indexes that a lookup
/// uses. SQLite's default of 2 MiB for each pooled connection would exceed the memory budget of the
/// whole program. Mapping the file instead would halve the time of a lookup, but every connection
/// would count the whole file as its own memory, and an I/O error would kill the process (SIGBUS).
const CACHE_KIB: i64 = 512;

/// The longest text of one column, in bytes; a row with a longer one is malformed. The references
/// of the largest narinfo that peers accept fit, each with the store directory before it.
const MAX_COLUMN: usize = 2 * NarInfo::MAX_LEN;

/// Granularity of file times: a clock tick of 1 to 10 ms, doubled.
const CLOCK_TICK: Duration = Duration::from_millis(20);

// One statement, so that a path and its references come from one snapshot.
macro_rules! paths {
    ($which:literal) => {
        concat!(
            "select path, hash, narSize, deriver, sigs, ca, \
             (select group_concat(target.path, ' ') from Refs join ValidPaths target on target.id = Refs.reference \
              where Refs.referrer = ValidPaths.id), id from ValidPaths where ",
            $which
        )
    };
}

const TABLE_EXISTS: &str = "select 1 from sqlite_master where type = 'table' and name = ?1";

// The range selects the paths with the hash part: '.' is the successor of '-' in ASCII.
const LOOKUP_SQL: &str = paths!("path >= ?1 and path < ?2 order by path limit 1");

// No LIMIT: rows that cannot be parsed are skipped and must not count.
const AFTER_SQL: &str = paths!("id > ?1 order by id");

/// A table of realisations. Nix creates it only if `ca-derivations` is enabled, and each format has
/// its own table.
struct RealisationTable {
    name: &'static str,
    /// Selects output path, signatures and row ID of the output `?2` of the derivation `?1`.
    select: &'static str,
    /// Selects IDs and paths of the outputs that the row `?1` depends on; empty if none are
    /// recorded.
    dependencies: &'static str,
}

/// Tables of Nix 2.4 to 2.34.
const BY_HASH: &[RealisationTable] = &[RealisationTable {
    name: "Realisations",
    select: "select V.path, R.signatures, R.id from Realisations R join ValidPaths V on V.id = R.outputPath \
             where R.drvPath = ?1 and R.outputName = ?2",
    dependencies: "select D.drvPath || '!' || D.outputName, V.path from RealisationsRefs \
                   join Realisations D on D.id = realisationReference join ValidPaths V on V.id = D.outputPath \
                   where referrer = ?1",
}];

/// Tables of Nix 2.35 and later, newest first.
const BY_PATH: &[RealisationTable] = &[RealisationTable {
    name: "BuildTraceV3",
    select: "select outputPath, signatures, id from BuildTraceV3 where drvPath = ?1 and outputName = ?2",
    dependencies: "",
}];

const COUNT_SQL: &str = "select count(*), coalesce(max(id), 0) from ValidPaths";

/// Identity of a file: device and inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FileId(u64, u64);

impl FileId {
    /// Reads the identity by `stat`. The file is never opened for this: closing it would drop the
    /// POSIX locks that SQLite's descriptors hold in this process.
    ///
    /// # Errors
    /// The file does not exist, or its directory is not accessible.
    pub(super) fn of(db: &Path) -> Result<Self, StoreError> {
        let stat = stat(db).map_err(|error| missing_or_unreadable(db, error.into()))?;
        Ok(FileId(stat.st_dev, stat.st_ino))
    }
}

/// How a connection treats the write-ahead log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OpenMode {
    /// Normal locking between processes.
    Shared,
    /// No locks and no log, as if the database never changed. Correct only under the conditions in
    /// [`FileStamp`].
    Immutable,
}

/// Why an operation failed, classified by what to do next.
#[derive(Debug)]
pub(super) enum DatabaseError {
    /// The `-wal` and `-shm` files do not exist and this user may not create them: another process
    /// has to open the database first.
    WalUnavailable,
    /// Any other error.
    Error(StoreError),
}

impl From<StoreError> for DatabaseError {
    fn from(error: StoreError) -> Self {
        DatabaseError::Error(error)
    }
}

/// An open connection whose database has the supported schema.
#[derive(Debug)]
pub(super) struct Database {
    connection: Connection,
    path: PathBuf,
    pub(super) file: FileId,
    pub(super) mode: OpenMode,
    /// Result of the last count, with the `data_version` at which it was taken. Only this
    /// connection can compare that value.
    cached_census: Cell<Option<(i64, StoreVersion)>>,
    /// `data_version` at the last call of [`Database::record_data_version`].
    data_version: Cell<Option<i64>>,
}

impl Database {
    /// Opens the database and checks its schema. Waits for locks for at most `timeout`.
    pub(super) fn open(
        path: &Path,
        mode: OpenMode,
        timeout: Duration,
    ) -> Result<Self, DatabaseError> {
        // Taken before the file is opened, so that a file that replaces it in between is noticed
        // later.
        let file = FileId::of(path)?;
        check_access(path)?;
        check_schema(path)?;
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = match mode {
            OpenMode::Shared => Connection::open_with_flags(path, flags),
            OpenMode::Immutable => {
                Connection::open_with_flags(immutable_uri(path), flags | OpenFlags::SQLITE_OPEN_URI)
            }
        };
        let connection = opened.map_err(|error| classify(path, error))?;
        let database = Database {
            connection,
            path: path.to_owned(),
            file,
            mode,
            cached_census: Cell::default(),
            data_version: Cell::default(),
        };
        database.set_busy_timeout(timeout)?;
        database
            .connection
            .pragma_update(None, "cache_size", -CACHE_KIB)
            .map_err(|error| classify(path, error))?;
        Ok(database)
    }

    /// Sets how long each statement may wait for locks from now on.
    pub(super) fn set_busy_timeout(&self, timeout: Duration) -> Result<(), DatabaseError> {
        self.connection.busy_timeout(timeout).map_err(|error| classify(&self.path, error))
    }

    /// Looks up the valid path with this hash part.
    pub(super) fn path_info(
        &self,
        store_dir: &StoreDir,
        part: &HashPart,
    ) -> Result<Option<PathInfo>, DatabaseError> {
        let fail = |error| classify(&self.path, error);
        let mut statement = self.connection.prepare_cached(LOOKUP_SQL).map_err(fail)?;
        let from = format!("{}/{part}-", store_dir.as_str());
        let to = format!("{}/{part}.", store_dir.as_str());
        let mut rows = statement.query([from, to]).map_err(fail)?;
        match rows.next().map_err(fail)? {
            None => Ok(None),
            Some(row) => {
                Ok(Some(parse_path_info(store_dir, row).map_err(|cause| unreadable(row, cause))?))
            }
        }
    }

    /// Looks up the realisation of a derivation's output, in one snapshot.
    pub(super) fn realisation(
        &self,
        store_dir: &StoreDir,
        id: &DrvOutput,
    ) -> Result<Option<Realisation>, DatabaseError> {
        self.in_transaction(|| self.read_realisation(store_dir, id))
    }

    fn read_realisation(
        &self,
        store_dir: &StoreDir,
        id: &DrvOutput,
    ) -> Result<Option<Realisation>, DatabaseError> {
        let fail = |error| classify(&self.path, error);
        let (tables, derivation) = match &id.derivation {
            DerivationId::Hash(hash) => (BY_HASH, hash.as_str()),
            DerivationId::Path(path) => (BY_PATH, path.base_name()),
        };
        for table in tables {
            let mut exists = self.connection.prepare_cached(TABLE_EXISTS).map_err(fail)?;
            if !exists.exists([table.name]).map_err(fail)? {
                continue;
            }
            let mut statement = self.connection.prepare_cached(table.select).map_err(fail)?;
            let mut rows = statement.query([derivation, &id.output]).map_err(fail)?;
            let Some(row) = rows.next().map_err(fail)? else { continue };
            let unreadable = |cause| StoreError::Row { path: id.to_string(), cause };
            let mut realisation = parse_realisation(store_dir, id, row).map_err(unreadable)?;
            if !table.dependencies.is_empty() {
                let row_id: i64 = row.get(2).map_err(fail)?;
                let mut statement =
                    self.connection.prepare_cached(table.dependencies).map_err(fail)?;
                let mut rows = statement.query([row_id]).map_err(fail)?;
                while let Some(row) = rows.next().map_err(fail)? {
                    let (id, path) = dependency(store_dir, row).map_err(unreadable)?;
                    realisation.dependencies.insert(id, path);
                }
            }
            return Ok(Some(realisation));
        }
        Ok(None)
    }

    /// Runs `read` in one read transaction: locks are taken once, and all of it sees one snapshot.
    pub(super) fn in_transaction<T>(
        &self,
        read: impl FnOnce() -> Result<T, DatabaseError>,
    ) -> Result<T, DatabaseError> {
        let run = |sql| {
            let statement = self.connection.prepare_cached(sql);
            statement
                .and_then(|mut statement| statement.execute([]))
                .map_err(|error| classify(&self.path, error))
        };
        run("begin")?;
        let answer = read();
        // Nothing was written, so there is nothing to commit.
        run("rollback")?;
        answer
    }

    /// Returns up to `limit` valid paths with row IDs above `row_id`, in the order of their row
    /// IDs. Rows that cannot be parsed are skipped.
    pub(super) fn paths_after(
        &self,
        store_dir: &StoreDir,
        row_id: i64,
        limit: usize,
    ) -> Result<Vec<(i64, PathInfo)>, DatabaseError> {
        let fail = |error| classify(&self.path, error);
        let mut statement = self.connection.prepare_cached(AFTER_SQL).map_err(fail)?;
        let mut rows = statement.query([row_id]).map_err(fail)?;
        let mut paths = Vec::new();
        while paths.len() < limit
            && let Some(row) = rows.next().map_err(fail)?
        {
            match parse_path_info(store_dir, row) {
                Ok(info) => paths.push((row.get(7).map_err(fail)?, info)),
                Err(cause) => log::debug!("{}", unreadable(row, cause)),
            }
        }
        Ok(paths)
    }

    /// Returns whether another connection has committed anything since the last call; true on the
    /// first call. Stores the current state for the next call. Takes 2 µs.
    pub(super) fn record_data_version(&self) -> Result<bool, DatabaseError> {
        let now = Some(self.data_version()?);
        Ok(self.data_version.replace(now) != now)
    }

    /// Returns SQLite's `data_version`, which differs after another connection of any process has
    /// committed (SQLite, "PRAGMA data_version").
    fn data_version(&self) -> Result<i64, DatabaseError> {
        let fail = |error| classify(&self.path, error);
        let mut statement = self.connection.prepare_cached("pragma data_version").map_err(fail)?;
        statement.query_one([], |row| row.get(0)).map_err(fail)
    }

    /// Counts the valid paths. The count scans a whole index, so it is repeated only after a
    /// commit.
    pub(super) fn census(&self) -> Result<StoreVersion, DatabaseError> {
        let fail = |error| classify(&self.path, error);
        // Read before counting, so that a commit in between causes another count next time.
        let data_version = self.data_version()?;
        if let Some((counted_at, census)) = self.cached_census.get()
            && counted_at == data_version
        {
            return Ok(census);
        }
        let mut statement = self.connection.prepare_cached(COUNT_SQL).map_err(fail)?;
        let (count, last_id): (i64, i64) =
            statement.query_one([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(fail)?;
        let census = StoreVersion {
            count: count.unsigned_abs(),
            last_id,
            version: NEXT_VERSION.fetch_add(1, Ordering::Relaxed),
        };
        self.cached_census.set(Some((data_version, census)));
        Ok(census)
    }
}

/// Number of valid paths at some moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreVersion {
    /// Number of valid paths.
    pub count: u64,
    /// The highest row ID, or 0 if there is none. Nix never reuses a row ID (`autoincrement`).
    pub last_id: i64,
    /// Equal versions mean that nothing was committed in between. Valid within one process only.
    pub version: u64,
}

/// Version of the next count, over all connections.
static NEXT_VERSION: AtomicU64 = AtomicU64::new(1);

/// State of the database's files. Reading the database as immutable is correct if the write-ahead
/// log is empty and this is equal before and after the read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FileStamp {
    file: FileId,
    size: i64,
    /// Modification time since 1970.
    modified: Duration,
}

impl FileStamp {
    /// Reads the state; `None` if the write-ahead log is not empty or a file cannot be examined.
    pub(super) fn observe(db: &Path) -> Option<Self> {
        match stat(beside(db, "-wal")) {
            Ok(wal) if wal.st_size == 0 => {}
            Err(rustix::io::Errno::NOENT) => {}
            _ => return None,
        }
        let Stat { st_dev, st_ino, st_size, st_mtime, st_mtime_nsec, .. } = stat(db).ok()?;
        let modified = Duration::new(st_mtime.unsigned_abs(), u32::try_from(st_mtime_nsec).ok()?);
        Some(FileStamp { file: FileId(st_dev, st_ino), size: st_size, modified })
    }

    /// Returns how long to wait until a further write is certain to change the modification time;
    /// `None` if that is so already.
    pub(super) fn unsettled(&self, now: SystemTime) -> Option<Duration> {
        let modified = SystemTime::UNIX_EPOCH.checked_add(self.modified)?;
        let age = now.duration_since(modified).unwrap_or_else(|ahead| ahead.duration());
        CLOCK_TICK.checked_sub(age).filter(|wait| !wait.is_zero())
    }
}

fn unreadable(row: &Row<'_>, cause: Malformed) -> StoreError {
    let path = text(row, 0).ok().flatten().unwrap_or("a path that is no text").to_owned();
    StoreError::Row { path, cause }
}

fn parse_path_info(store_dir: &StoreDir, row: &Row<'_>) -> Result<PathInfo, Malformed> {
    let required = |column, what| text(row, column)?.ok_or(Malformed::new(what, "null"));
    let path = store_dir.parse_path(required(0, "store path")?)?;
    let nar_hash = NarHash::parse(required(1, "NAR hash")?)?;
    // Nix writes null if it does not know the size, as in rows older than 2010. Such a path has no
    // valid narinfo.
    let nar_size = match row.get_ref(2) {
        Ok(ValueRef::Integer(size)) if size > 0 => size.unsigned_abs(),
        Ok(ValueRef::Null | ValueRef::Integer(0)) => {
            return Err(Malformed::new("NAR size", "not recorded"));
        }
        _ => return Err(Malformed::new("NAR size", "not a positive number")),
    };
    let present = |column| Ok::<_, Malformed>(text(row, column)?.filter(|text| !text.is_empty()));
    // Nix ignores a malformed deriver, and malformed signatures beside valid ones, so they must not
    // hide the path.
    let deriver = present(3)?.and_then(|deriver| store_dir.parse_path(deriver).ok());
    let signatures = words(present(4)?).flat_map(Signature::parse).collect();
    let ca = present(5)?.map(str::to_owned);
    let mut references: Vec<StorePath> =
        words(present(6)?).map(|path| store_dir.parse_path(path)).collect::<Result<_, _>>()?;
    references.sort_unstable();
    references.dedup();
    Ok(PathInfo { path, nar_hash, nar_size, references, deriver, signatures, ca })
}

fn parse_realisation(
    store_dir: &StoreDir,
    id: &DrvOutput,
    row: &Row<'_>,
) -> Result<Realisation, Malformed> {
    let path = text(row, 0)?.ok_or(Malformed::new("output path", "null"))?;
    let out_path =
        if path.starts_with('/') { store_dir.parse_path(path)? } else { StorePath::parse(path)? };
    let signatures = words(text(row, 1)?).flat_map(Signature::parse).collect();
    Ok(Realisation { id: id.clone(), out_path, dependencies: Default::default(), signatures })
}

fn dependency(store_dir: &StoreDir, row: &Row<'_>) -> Result<(String, StorePath), Malformed> {
    let required =
        |column| text(row, column)?.ok_or(Malformed::new("dependency of a realisation", "null"));
    let id = required(0)?;
    DrvOutput::parse_id(id)?;
    Ok((id.to_owned(), store_dir.parse_path(required(1)?)?))
}

fn words(text: Option<&str>) -> impl Iterator<Item = &str> {
    text.unwrap_or_default().split(' ').filter(|word| !word.is_empty())
}

fn text<'row>(row: &'row Row<'_>, column: usize) -> Result<Option<&'row str>, Malformed> {
    const WHAT: &str = "row";
    match row.get_ref(column) {
        Ok(ValueRef::Null) => Ok(None),
        Ok(ValueRef::Text(bytes)) if bytes.len() > MAX_COLUMN => {
            Err(Malformed::new(WHAT, "text larger than 2 MiB"))
        }
        Ok(ValueRef::Text(bytes)) => std::str::from_utf8(bytes)
            .map(Some)
            .map_err(|_| Malformed::new(WHAT, "text that is not UTF-8")),
        _ => Err(Malformed::new(WHAT, "a column that is no text")),
    }
}

/// Returns `<db><suffix>`, the name of a file that SQLite keeps beside a database.
pub(super) fn beside(db: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(db);
    name.push(suffix);
    name.into()
}

fn immutable_uri(db: &Path) -> String {
    const KEPT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'/').remove(b'.').remove(b'-').remove(b'_');
    format!("file:{}?immutable=1", percent_encode(db.as_os_str().as_bytes(), KEPT))
}

// SQLite reports "unable to open database file" for all of these errors alike.
fn check_access(db: &Path) -> Result<(), StoreError> {
    for (file, must_exist) in
        [(db.to_owned(), true), (beside(db, "-wal"), false), (beside(db, "-shm"), false)]
    {
        match access(&file, Access::READ_OK) {
            Err(rustix::io::Errno::NOENT) if !must_exist => {}
            Err(error) => return Err(missing_or_unreadable(&file, error.into())),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn check_schema(db: &Path) -> Result<(), StoreError> {
    let file = db.with_file_name("schema");
    let unlike = |found: String| StoreError::Schema { db: db.to_owned(), found };
    match fs::read(&file) {
        Ok(content) if content.trim_ascii() == SCHEMA.as_bytes() => Ok(()),
        Ok(content) => {
            let start: String = String::from_utf8_lossy(&content).chars().take(16).collect();
            Err(unlike(format!("{:?} by {}", start.trim_end(), file.display())))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(unlike(format!("unknown, as {} is missing", file.display())))
        }
        Err(cause) => Err(StoreError::Unreadable { file, cause }),
    }
}

fn missing_or_unreadable(file: &Path, cause: io::Error) -> StoreError {
    match cause.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => {
            StoreError::Missing { db: file.to_owned() }
        }
        _ => StoreError::Unreadable { file: file.to_owned(), cause },
    }
}

// Result codes observed as an unprivileged user on files that Nix wrote. With neither file, or only
// -shm: SQLITE_READONLY_DIRECTORY (1544). With only -wal, or on a read-only file system:
// SQLITE_CANTOPEN (14). With both files: no error.
fn classify(db: &Path, error: rusqlite::Error) -> DatabaseError {
    let db = db.to_owned();
    // A missing table or column fails when a statement is prepared. Only the message is kept, as
    // the error contains the whole statement.
    if let rusqlite::Error::SqlInputError { msg, .. } = &error {
        return DatabaseError::Error(StoreError::Schema {
            db,
            found: format!("another one ({msg})"),
        });
    }
    match error.sqlite_error_code() {
        Some(ErrorCode::ReadOnly | ErrorCode::CannotOpen) => DatabaseError::WalUnavailable,
        Some(
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::FileLockingProtocolFailed,
        ) => DatabaseError::Error(StoreError::Busy { db }),
        _ => DatabaseError::Error(StoreError::Database { db, cause: error }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recently_written_file_is_unsettled() {
        let modified = Duration::from_secs(1_000_000);
        let still = FileStamp { file: FileId(1, 2), size: 3, modified };
        let at = |millis| {
            SystemTime::UNIX_EPOCH + Duration::from_secs(999_999) + Duration::from_millis(millis)
        };
        for (millis, wait) in [(1000, 20), (1005, 15), (1019, 1), (995, 15)] {
            assert_eq!(still.unsettled(at(millis)), Some(Duration::from_millis(wait)));
        }
        for millis in [1020, 5000, 980, 0] {
            assert_eq!(still.unsettled(at(millis)), None);
        }
    }

    #[test]
    fn special_characters_in_uri_path_are_escaped() {
        assert_eq!(
            immutable_uri(Path::new("/a b/c?mode=rw#%/d.sqlite")),
            "file:/a%20b/c%3Fmode%3Drw%23%25/d.sqlite?immutable=1"
        );
    }
}
