//! Cache of the database's answers about paths. A path is usually looked up several times in a row:
//! by a query, for its narinfo and for its NAR, and by every machine that updates at the same time.
//!
//! The cache never returns an outdated answer. SQLite tells each connection whether another one has
//! committed since it last looked (`pragma data_version`, 2 µs, while a lookup takes 15 µs). Each
//! connection that notices a commit invalidates the whole cache, for all connections.

use super::database::{Database, DatabaseError, FileId};
use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
use crate::nix::{HashPart, PathInfo};
use std::{mem, sync::Arc};

/// Most memory of the cache, in bytes; beyond it, the oldest answers are dropped. It holds 25,000
/// paths with five references each, more than the update of one machine looks up.
const MAX_BYTES: usize = 24 << 20;
/// Largest answer that is cached, in bytes. Few paths have so many references, and each of them
/// would displace more than a hundred others.
const MAX_ENTRY_BYTES: usize = 256 << 10;
/// Estimated size of an answer beyond its [`PathInfo`], in bytes: the map's entry and the overhead
/// of the allocator.
const ENTRY_OVERHEAD_BYTES: usize = 128;
/// Estimated overhead of the allocator per string, in bytes.
const STRING_OVERHEAD_BYTES: usize = 16;

/// A cached answer; `None` if no such path is valid.
pub(super) type CachedInfo = Option<Arc<PathInfo>>;

/// The cached answers, all of one generation of the database.
#[derive(Debug, Default)]
pub(super) struct PathInfoCache {
    newest: Mutex<CacheGeneration>,
    infos: Mutex<CachedInfos>,
}

/// The newest state of the database that some connection has seen.
#[derive(Debug, Default)]
struct CacheGeneration {
    /// Incremented whenever a connection sees a change.
    generation: u64,
    /// The file that it was read from. After the file was replaced, connections to both files exist
    /// for a while.
    file: Option<FileId>,
}

#[derive(Debug, Default)]
struct CachedInfos {
    generation: u64,
    infos: BoundedMap<HashPart, CachedInfo, MAX_BYTES>,
}

impl PathInfoCache {
    /// Returns the current generation. Later reads from the same connection see this generation, or
    /// a later state that no connection has seen yet.
    ///
    /// # Errors
    /// Errors of the database.
    pub(super) fn generation(&self, database: &Database) -> Result<u64, DatabaseError> {
        let has_changed = database.record_data_version()?;
        let mut newest = self.newest.lock();
        if has_changed || newest.file != Some(database.file) {
            *newest =
                CacheGeneration { generation: newest.generation + 1, file: Some(database.file) };
        }
        Ok(newest.generation)
    }

    /// Returns the cached answer, if the cache is of that generation.
    pub(super) fn get(&self, part: &HashPart, generation: u64) -> Option<CachedInfo> {
        let infos = self.infos.lock();
        if infos.generation == generation { infos.infos.get(part).cloned() } else { None }
    }

    /// Caches an answer that was read after [`PathInfoCache::generation`] returned `generation`. An
    /// answer of an older generation than the cache's, or a too large one, is not cached.
    pub(super) fn put(&self, part: HashPart, generation: u64, answer: &CachedInfo) {
        let bytes = cost(answer);
        let mut outdated = BoundedMap::default();
        let mut infos = self.infos.lock();
        if generation < infos.generation || bytes > MAX_ENTRY_BYTES {
            return;
        }
        if generation > infos.generation {
            infos.generation = generation;
            outdated = mem::take(&mut infos.infos);
        }
        infos.infos.insert_with_cost(part, answer.clone(), bytes);
        drop(infos);
        drop(outdated); // after unlocking: it may have thousands of entries
    }

    /// Drops all answers and frees their memory.
    pub(super) fn clear(&self) {
        let outdated = mem::take(&mut self.infos.lock().infos);
        drop(outdated); // after unlocking
    }
}

/// Returns the estimated memory of a cached answer, in bytes.
fn cost(answer: &CachedInfo) -> usize {
    ENTRY_OVERHEAD_BYTES + answer.as_deref().map_or(0, size)
}

/// Returns the estimated memory of `info`, in bytes.
fn size(info: &PathInfo) -> usize {
    let text = |text: &str| text.len() + STRING_OVERHEAD_BYTES;
    let path = |path: &crate::nix::StorePath| size_of_val(path) + text(path.base_name());
    size_of_val(info)
        + path(&info.path)
        + info.references.iter().map(path).sum::<usize>()
        + info.deriver.as_ref().map_or(0, path)
        + info
            .signatures
            .iter()
            .map(|signature| size_of_val(signature) + text(signature.name()))
            .sum::<usize>()
        + info.ca.as_deref().map_or(0, text)
}

#[cfg(test)]
mod tests {
    use super::super::database::OpenMode;
    use super::super::fixture::Fixture;
    use super::*;
    use std::time::Duration;

    fn part(n: usize) -> HashPart {
        HashPart::parse(format!("{n:032}").as_bytes()).unwrap()
    }

    #[test]
    fn commit_invalidates_cache_of_every_connection() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let path = fixture.register(&"1".repeat(32), 120);
        let size = |store: &super::super::Store| {
            let of = |info: Option<Arc<PathInfo>>| info.map(|info| info.nar_size);
            let part = path.hash_part();
            // Each of these uses another connection or the cache alone.
            let slow = of(store.path_info(&part).unwrap());
            assert_eq!(of(store.path_infos_quickly(&[part]).unwrap().remove(0)), slow);
            assert_eq!(store.try_path_info(&part, &mut None).map(of), Some(slow));
            slow
        };
        for n in 1..50 {
            assert_eq!(size(&store), Some(119 + n));
            fixture.execute(&format!("update ValidPaths set narSize = {}", 120 + n));
        }
        fixture.execute("delete from ValidPaths");
        assert_eq!(size(&store), None);
        fixture.register(&"1".repeat(32), 7);
        assert_eq!(size(&store), Some(7));
    }

    /// After a file was replaced, an answer from a connection to the old file must not count for
    /// the new file.
    #[test]
    fn answer_from_replaced_file_is_not_returned() {
        let (old, new) = (Fixture::new(), Fixture::new());
        let path = old.register(&"1".repeat(32), 120);
        let open = |fixture: &Fixture| {
            Database::open(&fixture.db(), OpenMode::Shared, Duration::from_secs(5)).unwrap()
        };
        let (of_old, of_new) = (open(&old), open(&new));
        let kept = PathInfoCache::default();
        kept.generation(&of_old).unwrap();
        kept.generation(&of_new).unwrap();
        let late = kept.generation(&of_old).unwrap();
        let answer =
            of_old.path_info(&old.config().store_dir, &path.hash_part()).unwrap().map(Arc::new);
        assert!(answer.is_some());
        kept.put(path.hash_part(), late, &answer);
        assert_eq!(kept.get(&path.hash_part(), kept.generation(&of_new).unwrap()), None);
    }

    #[test]
    fn busy_database_keeps_connection_open() {
        let fixture = Fixture::new();
        fixture.execute("pragma journal_mode = delete");
        let store = fixture.open();
        let part = fixture.register(&"1".repeat(32), 120).hash_part();
        store.path_info(&part).unwrap();
        fixture.execute("begin exclusive");
        assert_eq!(store.try_path_info(&part, &mut None), None);
        // Nothing was committed, so the cached answer is still valid.
        fixture.execute("rollback");
        assert!(store.try_path_info(&part, &mut None).is_some());
    }

    #[test]
    fn path_info_at_once_returns_only_cached_answers() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let path = fixture.register(&"1".repeat(32), 120);
        assert_eq!(store.try_path_info(&path.hash_part(), &mut None), None);
        store.path_info(&path.hash_part()).unwrap().unwrap();
        assert!(store.try_path_info(&path.hash_part(), &mut None).unwrap().is_some());
        assert_eq!(store.try_path_info(&part(7), &mut None), None);
        assert_eq!(store.path_info(&part(7)).unwrap(), None);
        assert_eq!(store.try_path_info(&part(7), &mut None), Some(None));
        store.clear_cache();
        assert_eq!(store.try_path_info(&part(7), &mut None), None);
    }

    #[test]
    fn answer_of_older_generation_is_not_cached() {
        let kept = PathInfoCache::default();
        kept.put(part(1), 5, &None);
        assert_eq!(kept.get(&part(1), 5), Some(None));
        assert_eq!(kept.get(&part(1), 6), None);
        // Read before the change, and put after it.
        kept.put(part(2), 4, &None);
        assert_eq!(kept.get(&part(2), 4), None);
        assert_eq!(kept.get(&part(2), 5), None);
        kept.put(part(3), 6, &None);
        assert_eq!(kept.get(&part(1), 6), None);
        assert_eq!(kept.get(&part(3), 6), Some(None));
    }

    #[test]
    fn replaced_answer_counts_with_its_own_size() {
        let fixture = Fixture::new();
        let path = fixture.register(&"1".repeat(32), 120);
        let info = fixture.open().path_info(&path.hash_part()).unwrap();
        let (kept, large) = (PathInfoCache::default(), cost(&info));
        assert!(large > ENTRY_OVERHEAD_BYTES);
        for (answer, bytes) in
            [(&None, ENTRY_OVERHEAD_BYTES), (&info, large), (&None, ENTRY_OVERHEAD_BYTES)]
        {
            kept.put(part(1), 1, answer);
            assert_eq!(kept.infos.lock().infos.used(), bytes);
        }
    }

    #[test]
    fn cache_size_is_bounded() {
        let (kept, last) = (PathInfoCache::default(), MAX_BYTES / ENTRY_OVERHEAD_BYTES);
        (0..=last).for_each(|n| kept.put(part(n), 1, &None));
        assert_eq!(
            kept.infos.lock().infos.used(),
            MAX_BYTES / ENTRY_OVERHEAD_BYTES * ENTRY_OVERHEAD_BYTES
        );
        assert_eq!((kept.get(&part(0), 1), kept.get(&part(last), 1)), (None, Some(None)));
    }
}
