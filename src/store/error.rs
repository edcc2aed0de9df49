//! Errors of the store. Each prints as one line that says what the operator can do.

use crate::nix::Malformed;
use std::{
    error, fmt, io,
    path::{Path, PathBuf},
};

/// Why Nix's database or a build log could not be read. A path that does not exist is not an error.
#[derive(Debug)]
pub enum StoreError {
    /// The database file does not exist.
    Missing {
        /// The database.
        db: PathBuf,
    },
    /// None of a sample of valid paths has files.
    NoFiles {
        /// The database.
        db: PathBuf,
        /// The directory in which the files were expected.
        files: PathBuf,
    },
    /// A file exists, but this user may not read it or the disk fails.
    Unreadable {
        /// The file: the database, its `-wal` or `-shm` file, or `schema`.
        file: PathBuf,
        /// The error of the system call.
        cause: io::Error,
    },
    /// The database has another schema than the supported one.
    Schema {
        /// The database.
        db: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// This user cannot open the write-ahead log, and no workaround succeeded (see `pool.rs`).
    WalUnavailable {
        /// The database.
        db: PathBuf,
        /// Why waking nix-daemon did not help.
        daemon: String,
    },
    /// The database was locked by another process, or all connections were in use, until the
    /// caller's deadline.
    Busy {
        /// The database.
        db: PathBuf,
    },
    /// The row of a valid path, or of a realisation, is not what Nix writes.
    Row {
        /// The path in the row, or the ID of the realisation.
        path: String,
        /// The defect of the row.
        cause: Malformed,
    },
    /// Any other failure of SQLite, such as a damaged file or a failing disk.
    Database {
        /// The database.
        db: PathBuf,
        /// The error of SQLite.
        cause: rusqlite::Error,
    },
    /// A build log cannot be read: damaged bzip2 data, over 64 MiB, not a regular file, or an I/O
    /// error.
    Log {
        /// The log file.
        file: PathBuf,
        /// What is wrong with it.
        cause: io::Error,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut database =
            |db: &Path, why: fmt::Arguments<'_>| write!(f, "nix database {}: {why}", db.display());
        match self {
            StoreError::Missing { db } => {
                database(db, format_args!("not found; is Nix installed? --db names another place"))
            }
            StoreError::NoFiles { db, files } => database(
                db,
                format_args!(
                    "its paths are not in {}; for the store of `nix --store DIR` give --root DIR",
                    files.display()
                ),
            ),
            StoreError::Unreadable { file, cause } => write!(
                f,
                "{}: not readable; the user that runs peerix must be able to: {cause}",
                file.display()
            ),
            StoreError::Schema { db, found } => database(
                db,
                format_args!(
                    "schema {} is needed, this is {found}; another version of Nix or of peerix \
                     is needed",
                    super::SCHEMA
                ),
            ),
            StoreError::WalUnavailable { db, daemon } => database(
                db,
                format_args!(
                    "no other process has it open and this user may not open its write-ahead log; \
                     see that nix-daemon runs and answers, or open the database once as root \
                     (nix-daemon: {daemon})"
                ),
            ),
            StoreError::Busy { db } => database(
                db,
                format_args!("locked or overloaded; another process may be upgrading it"),
            ),
            StoreError::Row { path, cause } => write!(
                f,
                "nix database: {}: {cause}; `nix-store --verify --check-contents` may mend it",
                path.escape_debug()
            ),
            StoreError::Database { db, cause } => database(
                db,
                format_args!("{cause}; `nix-store --verify` tells whether it is damaged"),
            ),
            StoreError::Log { file, cause } => write!(f, "build log {}: {cause}", file.display()),
        }
    }
}

impl error::Error for StoreError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            StoreError::Unreadable { cause, .. } | StoreError::Log { cause, .. } => Some(cause),
            StoreError::Row { cause, .. } => Some(cause),
            StoreError::Database { cause, .. } => Some(cause),
            _ => None,
        }
    }
}

/// Why a NAR or a listing is incomplete. The caller must make the truncation visible to the
/// receiver.
#[derive(Debug)]
pub enum NarError {
    /// The receiving end failed; usually the client closed the connection.
    Write(io::Error),
    /// The range is not inside the NAR.
    Range,
    /// The files differ from the registered ones (changed or removed), or the path is no longer
    /// valid.
    Changed {
        /// The file or directory.
        path: String,
        /// The difference.
        why: &'static str,
    },
    /// A file cannot be read.
    Read {
        /// The file or directory.
        path: String,
        /// The error of the system call.
        cause: io::Error,
    },
    /// A file type that a NAR cannot hold (device, socket, FIFO), or a tree over a bound.
    Unsupported {
        /// The file or directory.
        path: String,
        /// The file type, or the bound.
        why: &'static str,
    },
    /// The database could not be read to check whether the path is still valid.
    Store(StoreError),
}

impl fmt::Display for NarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NarError::Write(cause) => write!(f, "receiver: {cause}"),
            NarError::Range => f.write_str("range: not inside the NAR"),
            NarError::Changed { path, why } | NarError::Unsupported { path, why } => {
                write!(f, "{}: {why}", path.escape_debug())
            }
            NarError::Read { path, cause } => write!(f, "{}: {cause}", path.escape_debug()),
            NarError::Store(cause) => cause.fmt(f),
        }
    }
}

impl error::Error for NarError {
    fn source(&self) -> Option<&(dyn error::Error + 'static)> {
        match self {
            NarError::Write(cause) | NarError::Read { cause, .. } => Some(cause),
            NarError::Store(cause) => Some(cause),
            _ => None,
        }
    }
}

impl From<StoreError> for NarError {
    fn from(cause: StoreError) -> Self {
        NarError::Store(cause)
    }
}
