//! This machine's Nix store, read-only: path metadata from Nix's database, and the files of a path
//! as a NAR or a listing.
//!
//! Requests name a path by a typed [`HashPart`], [`PathInfo`] or [`StorePath`], and only files of
//! paths that are valid in the database are read. The module writes nothing and starts no process.
//! It does not know peers, HTTP or the access policy.

mod build_log;
mod daemon_socket;
mod database;
mod error;
mod listing;
mod nar;
mod path_info_cache;
mod pool;
mod walk;

pub use build_log::BuildLog;
pub use database::StoreVersion;
pub use error::{NarError, StoreError};
pub use nar::NarSink;

use crate::nix::{DrvOutput, HashPart, PathInfo, Realisation, StoreDir, StorePath};
use crate::time_scale::Timeout;
use database::SCHEMA;
use path_info_cache::PathInfoCache;
use pool::{ConnectionPool, DatabaseLocation};
use rustix::fs::{Mode, OFlags, open};
use std::{ops::Range, path::PathBuf, sync::Arc, time::Duration};
use walk::Walk;

/// Most connections to the database for lookups, shared by all threads; further lookups wait for
/// one. A lookup takes some 10 µs, so more connections than processors gain little, and each costs
/// memory and three file descriptors.
const MAX_CONNECTIONS: usize = 4;
/// Longest wait of a lookup for locks and for a free connection; then it fails with
/// [`StoreError::Busy`].
const LOOKUP_TIMEOUT: Timeout = Timeout::from_secs(5);
/// Longest wait of [`Store::path_infos_quickly`] for locks and its connection; then it fails with
/// [`StoreError::Busy`].
const QUICK_TIMEOUT: Duration = Duration::from_millis(50);
/// Number of paths whose files are checked when the store is opened. If none of them has files, the
/// store's files are in another directory.
const SAMPLE_PATHS: usize = 16;

/// Location of the store.
#[derive(Debug, Clone)]
pub struct StoreConfig {
    /// The store directory, mostly `/nix/store`.
    pub store_dir: StoreDir,
    /// The database, mostly `/nix/var/nix/db/db.sqlite`. The paths of nix-daemon's socket
    /// (`/nix/var/nix/daemon-socket/socket`) and of the build logs (`/nix/var/log/nix`) are derived
    /// from it.
    pub db: PathBuf,
    /// The directory below which the files are, as `<root><store dir>`. `/`, except for a store of
    /// `nix --store DIR`.
    pub root: PathBuf,
}

impl StoreConfig {
    fn ancestor(&self, levels: usize) -> PathBuf {
        let mut dir = self.db.clone();
        for _ in 0..levels {
            dir.pop();
        }
        dir
    }

    /// Returns the directory that contains the files of the store paths.
    fn files(&self) -> PathBuf {
        self.root.join(self.store_dir.as_str().trim_start_matches('/'))
    }

    fn daemon_socket(&self) -> PathBuf {
        self.ancestor(2).join("daemon-socket/socket")
    }

    fn log_dir(&self) -> PathBuf {
        self.ancestor(3).join("log/nix")
    }
}

/// This machine's Nix store, read-only. All threads share one.
#[derive(Debug)]
pub struct Store {
    config: StoreConfig,
    path_info_cache: PathInfoCache,
    lookups: ConnectionPool,
    /// One connection of its own, so that quick lookups never queue behind the others.
    quick_lookups: ConnectionPool,
    /// One connection for scans of all paths, opened by the first scan.
    scans: ConnectionPool,
}

impl Store {
    /// Opens the database, looks up one path, and checks that some valid path has files. Logs how
    /// the database was opened. Waits for at most 5 s for each of the two queries.
    ///
    /// # Errors
    /// The database is missing, unreadable or of another schema, or the files are elsewhere
    /// ([`StoreError::NoFiles`]).
    pub fn open(config: StoreConfig) -> Result<Store, StoreError> {
        let store = Store::open_database(config)?;
        let files = store.config.files();
        let some = store.paths_after(0, SAMPLE_PATHS)?;
        let is_there = |path: &StorePath| files.join(path.base_name()).symlink_metadata().is_ok();
        if !some.is_empty() && !some.iter().any(|(_, info)| is_there(&info.path)) {
            return Err(StoreError::NoFiles { db: store.config.db, files });
        }
        Ok(store)
    }

    fn open_database(config: StoreConfig) -> Result<Store, StoreError> {
        let store = Store::new(config);
        match store.path_info(&HashPart::ZERO) {
            Ok(_) | Err(StoreError::Row { .. }) => Ok(store),
            Err(error) => Err(error),
        }
    }

    fn new(config: StoreConfig) -> Store {
        let location = DatabaseLocation {
            store_dir: config.store_dir.clone(),
            db: config.db.clone(),
            daemon_socket: config.daemon_socket(),
        };
        Store {
            path_info_cache: PathInfoCache::default(),
            lookups: ConnectionPool::new(
                location.clone(),
                MAX_CONNECTIONS,
                LOOKUP_TIMEOUT.get(),
                log::Level::Info,
            ),
            quick_lookups: ConnectionPool::new(
                location.clone(),
                1,
                QUICK_TIMEOUT,
                log::Level::Debug,
            ),
            scans: ConnectionPool::new(location, 1, LOOKUP_TIMEOUT.get(), log::Level::Debug),
            config,
        }
    }

    /// Looks up the valid path with this hash part. The answer is current at the time of the call.
    /// Waits for locks and connections for at most 5 s.
    ///
    /// # Errors
    /// The database cannot be read, or the path's row is malformed. A row without NAR size counts
    /// as malformed.
    pub fn path_info(&self, part: &HashPart) -> Result<Option<Arc<PathInfo>>, StoreError> {
        self.lookups.path_info(&self.path_info_cache, part)
    }

    /// Returns the cached and still current answer of [`Store::path_info`], for threads that must
    /// not block; the inner `None` means that no such path is valid. Returns `None` if there is no
    /// such answer. It waits for no database lock, no connection and no disk.
    ///
    /// `generation` is the cache generation. If it is `None`, the generation is read from the
    /// database and stored there, for reuse in further lookups that were requested before this
    /// call.
    pub fn try_path_info(
        &self,
        part: &HashPart,
        generation: &mut Option<u64>,
    ) -> Option<Option<Arc<PathInfo>>> {
        let generation = match *generation {
            Some(generation) => generation,
            None => *generation.insert(self.lookups.try_generation(&self.path_info_cache)?),
        };
        self.path_info_cache.get(part, generation)
    }

    /// Frees the memory of the cached answers. Call it when the server becomes idle.
    pub fn clear_cache(&self) {
        self.path_info_cache.clear();
    }

    /// Looks up the valid paths with these hash parts, in their order. Waits for locks and its
    /// connection for at most 50 ms. Meant for one thread at a time, as it has a single connection.
    /// A path whose row is malformed counts as absent.
    ///
    /// # Errors
    /// The database cannot be read, or not within that time.
    pub fn path_infos_quickly(
        &self,
        parts: &[HashPart],
    ) -> Result<Vec<Option<Arc<PathInfo>>>, StoreError> {
        self.quick_lookups.path_infos(&self.path_info_cache, parts)
    }

    /// Returns the valid paths with row IDs above `row_id`, in the order of these IDs and with
    /// them. At most `limit` are returned; fewer only at the end of the table. Malformed rows are
    /// skipped. Takes some 30 µs per path, and waits for locks and the connection for at most 5 s.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn paths_after(
        &self,
        row_id: i64,
        limit: usize,
    ) -> Result<Vec<(i64, PathInfo)>, StoreError> {
        self.scans.read(&|database| database.paths_after(&self.config.store_dir, row_id, limit))
    }

    /// Returns the number of valid paths and a version that tells whether anything was committed
    /// since. Takes some 10 µs if nothing was; otherwise it counts, which takes some 10 ms for
    /// 200,000 paths. Waits for locks and the connection for at most 5 s.
    ///
    /// # Errors
    /// The database cannot be read.
    pub fn census(&self) -> Result<StoreVersion, StoreError> {
        self.scans.read(&|database| database.census())
    }

    /// Looks up the realisation of a derivation's output. Its store path may no longer be valid.
    /// Waits for locks and connections for at most 5 s.
    ///
    /// # Errors
    /// The database cannot be read, or the row is malformed.
    pub fn realisation(&self, id: &DrvOutput) -> Result<Option<Realisation>, StoreError> {
        self.lookups.read(&|database| database.realisation(&self.config.store_dir, id))
    }

    /// Returns the NAR of a path that is a single regular file, if the NAR has at most 16 KiB and
    /// the kernel has the file in memory. Never blocks on the disk.
    pub fn try_nar(&self, info: &PathInfo) -> Option<Vec<u8>> {
        nar::try_small(&self.config.files(), info)
    }

    /// Writes the bytes `range` of the NAR of a path, in pieces of at most 256 KiB. Blocks on the
    /// disk and on `out`, without a time limit.
    ///
    /// The last piece is written only after all files turned out to make up exactly `nar_size`
    /// bytes and, unless it is the only piece, the path is still valid with the same NAR hash. So a
    /// receiver of all bytes got them from a complete path. The bytes are not hashed.
    ///
    /// # Errors
    /// `out` failed, the files differ from the registered ones, or they cannot be read. Part of the
    /// range may have been written, but never all of it.
    pub fn write_nar(
        &self,
        info: &PathInfo,
        range: Range<u64>,
        out: &mut dyn NarSink,
    ) -> Result<(), NarError> {
        let still_valid = || match self.path_info(&info.path.hash_part())? {
            Some(now) if now.path == info.path && now.nar_hash == info.nar_hash => Ok(()),
            _ => Err(NarError::Changed {
                path: self.config.store_dir.join(&info.path),
                why: "no longer valid",
            }),
        };
        nar::write(self.walk(info)?, info.nar_size, range, out, &still_valid)
    }

    /// Returns the listing of a path: JSON, version 1, with the offset of each file in the NAR.
    /// Blocks on the disk.
    ///
    /// # Errors
    /// The files differ from the registered ones or cannot be read, or the listing exceeds 16 MiB.
    pub fn listing(&self, info: &PathInfo) -> Result<Vec<u8>, NarError> {
        listing::listing(self.walk(info)?, info.nar_size)
    }

    /// Opens the build log of a derivation, decompressed. `None` if there is none, or the path is
    /// no derivation. Blocks while it decompresses the log once to find its length.
    ///
    /// # Errors
    /// The log cannot be read, or its text exceeds 64 MiB.
    pub fn log(&self, derivation: &StorePath) -> Result<Option<BuildLog>, StoreError> {
        BuildLog::open(&self.config.log_dir(), derivation)
    }

    fn walk(&self, info: &PathInfo) -> Result<Walk, NarError> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let files = self.config.files();
        let store = open(&files, flags, Mode::empty()).map_err(|error| NarError::Read {
            path: files.display().to_string(),
            cause: error.into(),
        })?;
        Ok(Walk::new(store, &files.display().to_string(), &info.path))
    }
}

#[cfg(test)]
pub(crate) mod fixture;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::Signature;
    use fixture::Fixture;
    use std::{fs, thread, time::Instant};

    fn part(digit: char) -> HashPart {
        HashPart::parse(digit.to_string().repeat(32).as_bytes()).unwrap()
    }

    #[test]
    fn socket_and_log_dir_are_derived_from_database_path() {
        let config = StoreConfig {
            store_dir: StoreDir::parse("/nix/store").unwrap(),
            db: PathBuf::from("/nix/var/nix/db/db.sqlite"),
            root: "/".into(),
        };
        assert_eq!(config.files(), PathBuf::from("/nix/store"));
        assert_eq!(
            StoreConfig { root: "/mnt".into(), ..config.clone() }.files(),
            PathBuf::from("/mnt/nix/store")
        );
        assert_eq!(config.daemon_socket(), PathBuf::from("/nix/var/nix/daemon-socket/socket"));
        assert_eq!(config.log_dir(), PathBuf::from("/nix/var/log/nix"));
    }

    #[test]
    fn path_info_has_every_column() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let first = fixture.register(&"1".repeat(32), 120);
        let other = fixture.register(&format!("{}2", "1".repeat(31)), 120);
        let full = fixture.register(&"3".repeat(32), 4096);
        fixture.refers(&full, &[&full, &other, &first]);
        let signature = format!("cache.nixos.org-1:{}==", "A".repeat(86));
        fixture.execute(&format!(
            "update ValidPaths set deriver = '{}', sigs = '{signature} {signature}', ca = 'fixed:r:sha256:x' \
             where path like '%/3%'",
            fixture.absolute(&format!("{}-x.drv", "4".repeat(32)))
        ));
        let info = store.path_info(&full.hash_part()).unwrap().unwrap();
        assert_eq!(info.path, full);
        assert_eq!(info.nar_size, 4096);
        assert_eq!(info.references, [first.clone(), other, full]);
        assert_eq!(info.deriver.as_ref().unwrap().base_name(), format!("{}-x.drv", "4".repeat(32)));
        assert_eq!(info.signatures.len(), 2);
        assert_eq!(info.ca.as_deref(), Some("fixed:r:sha256:x"));
        assert_eq!(store.path_infos_quickly(&[info.path.hash_part()]).unwrap(), [Some(info)]);

        let plain = store.path_info(&first.hash_part()).unwrap().unwrap();
        assert!(plain.references.is_empty() && plain.signatures.is_empty());
        assert!(plain.deriver.is_none() && plain.ca.is_none());
        // Hash parts before, between and after the registered ones.
        for digit in ['0', '2', 'z'] {
            assert_eq!(store.path_info(&part(digit)).unwrap(), None);
        }
    }

    #[test]
    fn malformed_row_is_error_naming_path() {
        let fixture = Fixture::new();
        let path = fixture.register(&"1".repeat(32), 120);
        let store = fixture.open();
        for (change, says) in [
            ("hash = 'md5:00000000000000000000000000000000'", "NAR hash"),
            ("hash = 'sha256:12'", "NAR hash"),
            ("hash = x'00'", "row"),
            ("narSize = null", "NAR size: not recorded"),
            ("narSize = 0", "NAR size: not recorded"),
            ("narSize = -5", "NAR size"),
            ("narSize = 'many'", "NAR size"),
            ("ca = cast(x'ff' as text)", "UTF-8"),
        ] {
            fixture.execute(&format!("update ValidPaths set {change}"));
            let error = store.path_info(&path.hash_part()).unwrap_err();
            assert!(matches!(error, StoreError::Row { .. }), "{change}: {error}");
            let line = error.to_string();
            assert!(
                line.contains(path.base_name()) && line.contains(says) && !line.contains('\n'),
                "{line}"
            );
            fixture.execute("delete from ValidPaths");
            fixture.register(&"1".repeat(32), 120);
            assert!(store.path_info(&path.hash_part()).unwrap().is_some());
        }
    }

    /// Nix ignores a signature of a wrong length, so such a signature must not hide the path.
    #[test]
    fn malformed_signature_or_deriver_does_not_hide_path() {
        let fixture = Fixture::new();
        let path = fixture.register(&"1".repeat(32), 120);
        let store = fixture.open();
        let (good, long) =
            (format!("good-1:{}==", "A".repeat(86)), format!("longer-1:{}", "A".repeat(128)));
        for (change, signatures) in [
            (format!("sigs = '{long} {good} unsigned :'"), &[good.as_str()][..]),
            ("sigs = 'unsigned'".into(), &[]),
            ("deriver = '/etc/passwd'".into(), &[]),
            ("sigs = null, deriver = null, ca = null, ultimate = null".into(), &[]),
            ("sigs = '', deriver = '', ca = ''".into(), &[]),
        ] {
            fixture.execute(&format!("update ValidPaths set {change}"));
            let info = store.path_info(&path.hash_part()).unwrap().unwrap();
            let found: Vec<String> = info.signatures.iter().map(Signature::to_string).collect();
            assert_eq!(found, signatures, "{change}");
            assert!(info.deriver.is_none() && info.ca.is_none());
            fixture.execute("update ValidPaths set sigs = null, deriver = null");
        }
    }

    #[test]
    fn open_error_is_one_line() {
        let fails = |fixture: &Fixture| {
            let error = Store::open(fixture.config()).unwrap_err();
            assert!(!error.to_string().contains('\n'));
            error
        };
        let fixture = Fixture::new();
        fixture.execute("alter table ValidPaths drop column ca");
        assert!(
            matches!(fails(&fixture), StoreError::Schema { found, .. } if found.contains("ca"))
        );
        fs::write(fixture.db().with_file_name("schema"), "11\n").unwrap();
        assert!(
            matches!(fails(&fixture), StoreError::Schema { found, .. } if found.starts_with("\"11\""))
        );
        fs::remove_file(fixture.db().with_file_name("schema")).unwrap();
        assert!(
            matches!(fails(&fixture), StoreError::Schema { found, .. } if found.contains("missing"))
        );

        let fixture = Fixture::new();
        fixture.close();
        fs::remove_file(fixture.db()).unwrap();
        let error = fails(&fixture);
        assert!(matches!(error, StoreError::Missing { .. }));
        assert_eq!(
            error.to_string(),
            format!(
                "nix database {}: not found; is Nix installed? --db names another place",
                fixture.db().display()
            )
        );
        fs::write(fixture.db(), "nothing like SQLite".repeat(1000)).unwrap();
        assert!(matches!(fails(&fixture), StoreError::Database { .. }));
    }

    #[test]
    fn locked_database_is_busy() {
        let fixture = Fixture::new();
        let path = fixture.register(&"1".repeat(32), 120);
        fixture.execute("pragma locking_mode = exclusive; begin exclusive; delete from Refs");
        let store = fixture.closed();
        assert!(matches!(
            store.path_infos_quickly(&[path.hash_part()]),
            Err(StoreError::Busy { .. })
        ));
        fixture.execute("commit; pragma locking_mode = normal; select * from ValidPaths");
        assert!(store.path_infos_quickly(&[path.hash_part()]).unwrap()[0].is_some());
    }

    #[test]
    fn paths_after_returns_all_paths_in_row_order() {
        let fixture = Fixture::new();
        let store = fixture.open();
        assert_eq!(store.paths_after(0, 10).unwrap(), []);
        let paths: Vec<StorePath> =
            "9183204567".chars().map(|c| fixture.register(&c.to_string().repeat(32), 8)).collect();
        fixture.refers(&paths[4], &[&paths[0], &paths[4]]);
        let signature = format!("cache.nixos.org-1:{}==", "A".repeat(86));
        fixture
            .execute(&format!("update ValidPaths set sigs = '{signature}' where path like '%/2%'"));
        // All in one call, and in steps.
        let all = store.paths_after(0, 100).unwrap();
        assert_eq!(
            all.iter().map(|(_, info)| &info.path).collect::<Vec<_>>(),
            paths.iter().collect::<Vec<_>>()
        );
        assert!(all.is_sorted_by_key(|(id, _)| *id));
        for (_, info) in &all {
            assert_eq!(store.path_info(&info.path.hash_part()).unwrap().as_deref(), Some(info));
        }
        for limit in 1..4 {
            let (mut last, mut steps) = (0, Vec::new());
            loop {
                let step = store.paths_after(last, limit).unwrap();
                assert!(step.len() <= limit);
                let Some((id, _)) = step.last() else { break };
                last = *id;
                steps.extend(step);
            }
            assert_eq!(steps, all, "{limit}");
        }
        // Malformed rows, however many, do not count toward the limit.
        fixture.execute("update ValidPaths set narSize = null where path not like '%/7%'");
        assert_eq!(store.paths_after(0, 1).unwrap(), all[9..]);
        assert_eq!(store.paths_after(all[9].0, 1).unwrap(), []);
    }

    #[test]
    fn census_version_changes_with_every_commit() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let mut last = store.census().unwrap();
        assert_eq!((last.count, last.last_id), (0, 0));
        let mut changed = |change: &str, count, last_id| {
            fixture.execute(change);
            let census = store.census().unwrap();
            assert_eq!((census.count, census.last_id), (count, last_id), "{change}");
            assert_ne!(census.version, last.version, "{change}");
            assert_eq!(store.census().unwrap(), census, "{change}");
            last = census;
        };
        let insert = |digit: &str| {
            let path = fixture.absolute(&format!("{}-name", digit.repeat(32)));
            format!(
                "insert into ValidPaths (path, hash, registrationTime, narSize) values ('{path}', 'x', 1, 8)"
            )
        };
        changed(&insert("1"), 1, 1);
        changed(&insert("2"), 2, 2);
        changed("update ValidPaths set sigs = 'x' where id = 1", 2, 2);
        changed("delete from ValidPaths where id = 2", 1, 1);
        changed(&insert("3"), 2, 3);
        // After a checkpoint, from another connection.
        fixture.execute("pragma wal_checkpoint(truncate)");
        let version = store.census().unwrap().version;
        assert_ne!(fixture.open().census().unwrap().version, version);
    }

    #[test]
    fn new_path_is_found_at_once_by_every_thread() {
        let fixture = Fixture::new();
        let store = fixture.open();
        // A quick lookup does not wait for the other threads' lookups.
        let deadline = Instant::now() + Duration::from_secs(60);
        let find_quickly = |part: HashPart| loop {
            match store.path_infos_quickly(&[part]) {
                Err(StoreError::Busy { .. }) if Instant::now() < deadline => thread::yield_now(),
                found => break found.unwrap().remove(0),
            }
        };
        thread::scope(|scope| {
            for thread in 0..16 {
                let (store, fixture, find_quickly) = (&store, &fixture, &find_quickly);
                scope.spawn(move || {
                    for round in 0..20 {
                        let path = fixture.register(&format!("{thread:016}{round:016}"), 120);
                        assert!(store.path_info(&path.hash_part()).unwrap().is_some());
                        assert!(find_quickly(path.hash_part()).is_some());
                        assert!(store.path_info(&part('z')).unwrap().is_none());
                    }
                });
            }
        });
    }

    #[test]
    fn replaced_database_file_is_reopened() {
        let (old, new) = (Fixture::new(), Fixture::new());
        let gone = old.register(&"1".repeat(32), 120);
        let store = old.open();
        assert!(store.path_info(&gone.hash_part()).unwrap().is_some());
        let (db, new_db) = (old.db(), new.db());
        new.execute(&format!(
            "insert into ValidPaths (path, hash, registrationTime, narSize) \
             values ('{}', 'sha256:{}', 1, 8)",
            old.absolute(&format!("{}-new", "2".repeat(32))),
            "0".repeat(64)
        ));
        new.close();
        old.close();
        fs::remove_dir_all(db.parent().unwrap()).unwrap();
        assert!(db.parent().unwrap().parent().unwrap().is_dir());
        fs::rename(new_db.parent().unwrap(), db.parent().unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(30);
        while store.path_info(&part('2')).unwrap().is_none() {
            assert!(Instant::now() < deadline);
            thread::yield_now();
        }
        assert!(store.path_info(&gone.hash_part()).unwrap().is_none());
    }
}
