//! This machine's Nix store: what its database says of a path, and the path's files as a NAR.
//!
//! Everything here is asked for by a typed [`HashPart`], [`PathInfo`] or [`StorePath`]; only paths that are valid in
//! the database are ever read. Nothing is written, and no process is started. It knows nothing of peers, of HTTP and of
//! who may have what.

mod build_log;
mod daemon_socket;
mod database;
mod error;
mod listing;
mod nar;
mod pool;
mod walk;

pub use build_log::BuildLog;
pub use error::{NarError, StoreError};

use crate::nix::{HashPart, PathInfo, StoreDir, StorePath};
use database::SCHEMA;
use pool::{Place, Pool};
use rustix::fs::{Mode, OFlags, open};
use std::{io::Write, ops::Range, path::PathBuf, time::Duration};
use walk::Walk;

/// Connections to the database that all threads share. A lookup takes some 10 µs, so more than the machine has
/// processors help little, and each costs memory and three file descriptors.
const CONNECTIONS: usize = 4;
/// How long a lookup may take, waiting for locks and for a free connection included.
const LOOKUP_PATIENCE: Duration = Duration::from_secs(5);
/// The same for [`Store::path_info_quickly`].
const QUICK_PATIENCE: Duration = Duration::from_millis(50);

/// Where the store is.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The store directory, `/nix/store`.
    pub store_dir: StoreDir,
    /// The database, `/nix/var/nix/db/db.sqlite`. nix-daemon's socket (`/nix/var/nix/daemon-socket/socket`) and the
    /// directory of build logs (`/nix/var/log/nix`) have their places relative to it.
    pub db: PathBuf,
}

impl StoreConfig {
    fn ancestor(&self, levels: usize) -> PathBuf {
        let mut dir = self.db.clone();
        for _ in 0..levels {
            dir.pop();
        }
        dir
    }

    fn daemon_socket(&self) -> PathBuf {
        self.ancestor(2).join("daemon-socket/socket")
    }

    fn log_dir(&self) -> PathBuf {
        self.ancestor(3).join("log/nix")
    }
}

/// This machine's Nix store, read-only. Shared by all threads.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    lookups: Pool,
    /// One connection of its own, so that no crowd of lookups is before it in the queue.
    quick_lookups: Pool,
}

impl Store {
    /// Opens the database and makes one lookup. How it had to be opened goes to the log.
    ///
    /// # Errors
    /// No database, one of another schema, or one that cannot be read.
    pub fn open(config: StoreConfig) -> Result<Store, StoreError> {
        let place =
            Place { store_dir: config.store_dir.clone(), db: config.db.clone(), daemon_socket: config.daemon_socket() };
        let store = Store {
            lookups: Pool::new(place.clone(), CONNECTIONS, LOOKUP_PATIENCE, log::Level::Info),
            quick_lookups: Pool::new(place, 1, QUICK_PATIENCE, log::Level::Debug),
            config,
        };
        let any = HashPart::parse(&[b'0'; HashPart::LEN]).expect("zeros are Nix32");
        match store.lookups.path_info(&any) {
            Ok(_) | Err(StoreError::Row { .. }) => Ok(store),
            Err(error) => Err(error),
        }
    }

    /// What the database says, at this moment, of the valid path with this hash part. Takes at most 5 s.
    ///
    /// # Errors
    /// The database cannot be read, or the path's row is malformed; a row without NAR size counts as that.
    pub fn path_info(&self, part: &HashPart) -> Result<Option<PathInfo>, StoreError> {
        self.lookups.path_info(part)
    }

    /// The same within 50 ms, for a thread that others wait for; for one thread.
    ///
    /// # Errors
    /// As [`Store::path_info`]; [`StoreError::Busy`] comes sooner.
    pub fn path_info_quickly(&self, part: &HashPart) -> Result<Option<PathInfo>, StoreError> {
        self.quick_lookups.path_info(part)
    }

    /// Writes the bytes `range` of the NAR of a path, in pieces of at most 256 KiB.
    ///
    /// The last piece is written only when all files turned out to make up exactly `nar_size` bytes and, if it is not
    /// the only piece, the path is still valid with the same NAR hash. So a reader that got all bytes got them from a
    /// path that was whole. The bytes are not hashed.
    ///
    /// # Errors
    /// `out` failed, the files are not those that were registered, or they cannot be read. Part of the range may have
    /// been written, but never all of it.
    pub fn write_nar(&self, info: &PathInfo, range: Range<u64>, out: &mut dyn Write) -> Result<(), NarError> {
        let still_valid = || match self.path_info(&info.path.hash_part())? {
            Some(now) if now.path == info.path && now.nar_hash == info.nar_hash => Ok(()),
            _ => Err(NarError::Changed { path: self.config.store_dir.join(&info.path), why: "no longer valid" }),
        };
        nar::write(self.walk(info)?, info.nar_size, range, out, &still_valid)
    }

    /// The listing of a path: JSON, version 1, with the place of each file in the NAR. At most 16 MiB.
    ///
    /// # Errors
    /// As [`Store::write_nar`], or a listing larger than that.
    pub fn listing(&self, info: &PathInfo) -> Result<Vec<u8>, NarError> {
        listing::listing(self.walk(info)?, info.nar_size)
    }

    /// The build log of a derivation, uncompressed. `None` if there is none, or the path is no derivation.
    ///
    /// # Errors
    /// A log that cannot be read or is larger than 64 MiB.
    pub fn log(&self, derivation: &StorePath) -> Result<Option<BuildLog>, StoreError> {
        BuildLog::open(&self.config.log_dir(), derivation)
    }

    fn walk(&self, info: &PathInfo) -> Result<Walk, NarError> {
        let dir = self.config.store_dir.as_str();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let store = open(dir, flags, Mode::empty())
            .map_err(|error| NarError::Read { path: dir.to_owned(), cause: error.into() })?;
        Ok(Walk::new(store, dir, &info.path))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::{
        fs,
        path::{Path, PathBuf},
        sync::atomic::{AtomicU32, Ordering},
    };

    /// A directory that is removed in the end.
    pub(crate) struct TempDir(PathBuf);

    impl TempDir {
        pub(crate) fn new() -> Self {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let name = format!("peerix-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let dir = std::env::temp_dir().join(name);
            fs::create_dir(&dir).unwrap();
            TempDir(dir)
        }

        pub(crate) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for TempDir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }
}
