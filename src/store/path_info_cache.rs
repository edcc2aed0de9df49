//! What the database said of the paths that were asked for last. A path is asked for several times
//! in a row: by a query, for its narinfo, for its NAR; and by all the machines that update at the
//! same time.
//!
//! Nothing is told from here that is not what the database says at that moment. SQLite tells each
//! connection whether another one has committed anything since it last looked (`pragma
//! data_version`, 2 µs where a path takes 15), and each that notices makes everything here too old,
//! for all connections.

use super::database::{Database, DatabaseError, FileId};
use crate::nix::{HashPart, PathInfo};
use std::{
    collections::HashMap,
    mem,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// What all of it may take, in bytes: 25,000 paths with five references each, more than one
/// machine's update asks for.
const MAX_BYTES: usize = 24 << 20;
/// An answer that takes more is not kept. Few paths have so many references, and each of these
/// would displace a hundred others.
const MAX_ANSWER: usize = 256 << 10;
/// What an answer takes beside what [`PathInfo`] holds: its place in the map, and what the
/// allocator adds.
const OVERHEAD: usize = 128;
/// What the allocator adds to a text.
const TEXT: usize = 16;

/// An answer: the path, or that there is none.
pub(super) type CachedInfo = Option<Arc<PathInfo>>;

/// The answers, all from the same state of the database.
#[derive(Debug, Default)]
pub(super) struct PathInfoCache {
    newest: Mutex<CacheGeneration>,
    answers: Mutex<CachedInfos>,
}

/// The newest state of the database that some connection has seen.
#[derive(Debug, Default)]
struct CacheGeneration {
    /// Grows whenever some connection sees a change.
    generation: u64,
    /// What it was read from. After another file took its place, there are connections to both for
    /// a while.
    file: Option<FileId>,
}

#[derive(Debug, Default)]
struct CachedInfos {
    generation: u64,
    bytes: usize,
    map: HashMap<HashPart, CachedInfo>,
}

impl PathInfoCache {
    /// The state that the database is in now. What is then read from the same connection is of this
    /// state or a later one, which no connection has seen yet.
    ///
    /// # Errors
    /// The database's.
    pub(super) fn generation(&self, database: &Database) -> Result<u64, DatabaseError> {
        let has_changed = database.has_changed()?;
        // No code that can panic runs while it is held.
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        if has_changed || newest.file != Some(database.file) {
            *newest =
                CacheGeneration { generation: newest.generation + 1, file: Some(database.file) };
        }
        Ok(newest.generation)
    }

    /// The answer, if it is of that state.
    pub(super) fn get(&self, part: &HashPart, generation: u64) -> Option<CachedInfo> {
        let answers = self.lock();
        if answers.generation == generation { answers.map.get(part).cloned() } else { None }
    }

    /// Keeps an answer that was read after `generation` was told.
    pub(super) fn put(&self, part: HashPart, generation: u64, answer: &CachedInfo) {
        let bytes = OVERHEAD + answer.as_deref().map_or(0, size);
        let mut outdated = CachedInfos::default();
        let mut answers = self.lock();
        if generation < answers.generation || bytes > MAX_ANSWER {
            return;
        }
        if generation > answers.generation || answers.bytes + bytes > MAX_BYTES {
            // All of it: to tell what is asked for again would cost every request more than it
            // saves.
            outdated =
                mem::replace(&mut *answers, CachedInfos { generation, ..CachedInfos::default() });
        }
        if answers.map.insert(part, answer.clone()).is_none() {
            answers.bytes += bytes;
        }
        drop(answers);
        drop(outdated); // with the lock free: it may be thousands
    }

    /// Gives the memory back.
    pub(super) fn clear(&self) {
        let mut answers = self.lock();
        let generation = answers.generation;
        let outdated =
            mem::replace(&mut *answers, CachedInfos { generation, ..CachedInfos::default() });
        drop(answers);
        drop(outdated);
    }

    fn lock(&self) -> MutexGuard<'_, CachedInfos> {
        // No code that can panic runs while it is held.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// About so many bytes.
fn size(info: &PathInfo) -> usize {
    let text = |text: &str| text.len() + TEXT;
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
    fn nothing_is_kept_over_a_change_whichever_connection_sees_it() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let path = fixture.register(&"1".repeat(32), 120);
        let size = |store: &super::super::Store| {
            let of = |info: Option<Arc<PathInfo>>| info.map(|info| info.nar_size);
            let part = path.hash_part();
            // Two connections, and what is there at once.
            let slow = of(store.path_info(&part).unwrap());
            assert_eq!(of(store.path_infos_quickly(&[part]).unwrap().remove(0)), slow);
            assert_eq!(store.path_info_at_once(&part, &mut None).map(of), Some(slow));
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

    /// An answer from the old file was told for ever, if it was given after the new one had been
    /// noticed.
    #[test]
    fn connections_to_two_files_share_nothing() {
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
    fn a_writer_without_a_log_makes_nobody_open_the_database_anew() {
        let fixture = Fixture::new();
        fixture.execute("pragma journal_mode = delete");
        let store = fixture.open();
        let part = fixture.register(&"1".repeat(32), 120).hash_part();
        store.path_info(&part).unwrap();
        fixture.execute("begin exclusive");
        assert_eq!(store.path_info_at_once(&part, &mut None), None);
        // Nothing was written, and what was kept is still there.
        fixture.execute("rollback");
        assert!(store.path_info_at_once(&part, &mut None).is_some());
    }

    #[test]
    fn at_once_is_only_what_is_known() {
        let fixture = Fixture::new();
        let store = fixture.open();
        let path = fixture.register(&"1".repeat(32), 120);
        assert_eq!(store.path_info_at_once(&path.hash_part(), &mut None), None);
        store.path_info(&path.hash_part()).unwrap().unwrap();
        assert!(store.path_info_at_once(&path.hash_part(), &mut None).unwrap().is_some());
        assert_eq!(store.path_info_at_once(&part(7), &mut None), None);
        assert_eq!(store.path_info(&part(7)).unwrap(), None);
        assert_eq!(store.path_info_at_once(&part(7), &mut None), Some(None));
        store.rest();
        assert_eq!(store.path_info_at_once(&part(7), &mut None), None);
    }

    #[test]
    fn an_answer_of_an_older_state_is_not_kept() {
        let kept = PathInfoCache::default();
        kept.put(part(1), 5, &None);
        assert_eq!(kept.get(&part(1), 5), Some(None));
        assert_eq!(kept.get(&part(1), 6), None);
        // Read before the change, and told after it.
        kept.put(part(2), 4, &None);
        assert_eq!(kept.get(&part(2), 4), None);
        assert_eq!(kept.get(&part(2), 5), None);
        kept.put(part(3), 6, &None);
        assert_eq!(kept.get(&part(1), 6), None);
        assert_eq!(kept.get(&part(3), 6), Some(None));
    }

    #[test]
    fn it_does_not_grow_without_end() {
        let (kept, mut most) = (PathInfoCache::default(), 0);
        for n in 0..2 * MAX_BYTES / OVERHEAD {
            kept.put(part(n), 1, &None);
            kept.put(part(n), 1, &None);
            let answers = kept.lock();
            assert_eq!(answers.map.len() * OVERHEAD, answers.bytes);
            most = most.max(answers.bytes);
        }
        assert!((MAX_BYTES - 1000..=MAX_BYTES).contains(&most), "{most}");
    }
}
