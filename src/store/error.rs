//! What can go wrong with the store, each as one line that says what to do.

use crate::nix::Malformed;
use std::{error, fmt, io, path::PathBuf};

/// Why Nix's database or a build log gave no answer. A path that is not there is never one of
/// these.
#[derive(Debug)]
pub enum StoreError {
    /// There is no such database file.
    Missing {
        /// The database.
        db: PathBuf,
    },
    /// None of the files of some valid paths is there.
    NoFiles {
        /// The database.
        db: PathBuf,
        /// Where they should be.
        files: PathBuf,
    },
    /// A file is there and this user may not read it, or the disk fails.
    Unreadable {
        /// The file: the database, one of the two files beside it, `schema`, or a build log.
        file: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// The database has another schema than the one peerix knows.
    Schema {
        /// The database.
        db: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// The write-ahead log cannot be opened by this user, and no way around that worked.
    Asleep {
        /// The database.
        db: PathBuf,
        /// Why nix-daemon could not be asked to open the database.
        daemon: String,
    },
    /// Locked by another process, or all connections in use, for as long as the caller would wait.
    Busy {
        /// The database.
        db: PathBuf,
    },
    /// The row of a valid path is not what Nix writes.
    Row {
        /// The path as the row has it.
        path: String,
        /// What is wrong with it.
        cause: Malformed,
    },
    /// SQLite failed in any other way: damaged file, failing disk.
    Database {
        /// The database.
        db: PathBuf,
        /// What SQLite said.
        cause: rusqlite::Error,
    },
    /// A build log cannot be read: damaged bzip2 data, or larger than the bound.
    Log {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        cause: io::Error,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            StoreError::Missing { db } => {
                write!(
                    f,
                    "nix database {}: not found; is Nix installed? --db names another place",
                    db.display()
                )
            }
            StoreError::NoFiles { db, files } => {
                write!(
                    f,
                    "nix database {}: its paths are not in {}; for the store of `nix --store DIR` give --root DIR",
                    db.display(),
                    files.display()
                )
            }
            StoreError::Unreadable { file, cause } => {
                write!(
                    f,
                    "{}: not readable; the user that runs peerix must be able to: {cause}",
                    file.display()
                )
            }
            StoreError::Schema { db, found } => {
                write!(
                    f,
                    "nix database {}: schema {} is needed, this is {found}; another version of Nix or of peerix is needed",
                    db.display(),
                    super::SCHEMA
                )
            }
            StoreError::Asleep { db, daemon } => {
                write!(
                    f,
                    "nix database {}: no other process has it open and this user may not open its write-ahead log; \
                     see that nix-daemon runs and answers, or open the database once as root (nix-daemon: {daemon})",
                    db.display()
                )
            }
            StoreError::Busy { db } => {
                write!(
                    f,
                    "nix database {}: locked or overloaded; another process may be upgrading it",
                    db.display()
                )
            }
            StoreError::Row { path, cause } => {
                write!(
                    f,
                    "nix database: {}: {cause}; `nix-store --verify --check-contents` may mend it",
                    path.escape_debug()
                )
            }
            StoreError::Database { db, cause } => {
                write!(
                    f,
                    "nix database {}: {cause}; `nix-store --verify` tells whether it is damaged",
                    db.display()
                )
            }
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

/// Why a NAR or a listing was not completed. Whoever reads the stream must find it cut.
#[derive(Debug)]
pub enum NarError {
    /// The receiving end failed: usually a client that went away.
    Write(io::Error),
    /// The range does not lie inside the NAR.
    Range,
    /// The files are not those that were registered: changed, removed, or the path is no longer
    /// valid.
    Changed {
        /// The file or directory.
        path: String,
        /// What shows it.
        why: &'static str,
    },
    /// A file cannot be read.
    Read {
        /// The file or directory.
        path: String,
        /// What the system said.
        cause: io::Error,
    },
    /// Nothing that a NAR can hold (device, socket, FIFO), or beyond a bound.
    Unsupported {
        /// The file or directory.
        path: String,
        /// What it is.
        why: &'static str,
    },
    /// The database did not say whether the path is still valid.
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
