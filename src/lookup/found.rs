//! Remembers the NAR and the holders that lookups found, until Nix requests the NAR.
//!
//! Nix requests all narinfos of a closure before the first NAR, and with `--dry-run` no NAR at all.
//! So the memory is bounded in bytes, and the oldest entries are dropped first.

use super::{FoundNar, NarSource};
use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
use crate::nix::HashPart;
use std::mem::size_of;
use std::time::{Duration, Instant};

/// Maximum memory in bytes: about 10,000 paths with one holder, or 4,000 with eight. Beyond, the
/// oldest entry is dropped, and its path is looked up again when its NAR is requested.
const MAX_BYTES: usize = 3 << 20;
/// Maximum number of holders of a path. Further ones are dropped.
pub(super) const MAX_SOURCES: usize = 16;
/// Lifetime of an entry. Stores collect garbage, and peers leave.
const TTL: Duration = Duration::from_secs(600);
/// Assumed bytes of an entry beyond its own size, name and holders: its place in the map, and
/// allocator overhead.
const ENTRY_OVERHEAD_BYTES: usize = 160;

/// The found paths; shared by all threads.
#[derive(Default)]
pub(super) struct FoundPaths(Mutex<BoundedMap<HashPart, (FoundNar, Instant), MAX_BYTES>>);

impl FoundPaths {
    /// Adds an entry found at `now`. Replaces an earlier entry of the same path.
    pub(super) fn put(&self, mut found: FoundNar, now: Instant) {
        found.sources.truncate(MAX_SOURCES);
        found.sources.shrink_to_fit();
        let (hash_part, cost) = (found.path.hash_part(), cost(&found));
        self.0.lock().insert_with_cost(hash_part, (found, now), cost);
    }

    /// Removes and returns the entry of a path, if it is younger than [`TTL`].
    pub(super) fn take(&self, hash_part: &HashPart, now: Instant) -> Option<FoundNar> {
        let (found, at) = self.0.lock().remove(hash_part)?;
        (now.saturating_duration_since(at) < TTL).then_some(found)
    }

    /// Drops all entries and frees their memory.
    pub(super) fn clear(&self) {
        self.0.lock().clear();
    }
}

fn cost(found: &FoundNar) -> usize {
    let urls: usize =
        found.sources.iter().filter_map(|source| source.url_path.as_deref()).map(str::len).sum();
    ENTRY_OVERHEAD_BYTES
        + size_of::<FoundNar>()
        + found.path.base_name().len()
        + found.sources.len() * size_of::<NarSource>()
        + urls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::{NarHash, StorePath};
    use std::net::SocketAddr;

    fn found(number: u32, holders: usize) -> FoundNar {
        let path = StorePath::parse(&format!("{number:032}-some-package-1.0")).unwrap();
        let source = |n| NarSource::neighbour(SocketAddr::from(([10, 0, 0, n as u8], 1)));
        let sources = (0..holders).map(source).collect();
        FoundNar { path, nar_hash: NarHash::from_bytes([1; 32]), nar_size: number.into(), sources }
    }

    fn hash_part(number: u32) -> HashPart {
        found(number, 0).path.hash_part()
    }

    #[test]
    fn found_path_is_taken_once_and_expires_after_ten_minutes() {
        let (memory, now) = (FoundPaths::default(), Instant::now());
        memory.put(found(1, 2), now);
        memory.put(found(2, 2), now);
        memory.put(FoundNar { nar_size: 7, ..found(1, 3) }, now);
        let first = memory.take(&hash_part(1), now).unwrap();
        assert_eq!((first.nar_size, first.sources.len()), (7, 3));
        assert!(memory.take(&hash_part(1), now).is_none());
        assert!(memory.take(&hash_part(2), now + TTL).is_none());
        assert_eq!(memory.0.lock().used(), 0);
    }

    #[test]
    fn full_memory_drops_oldest_paths() {
        let (memory, now) = (FoundPaths::default(), Instant::now());
        for number in 0..20_000 {
            memory.put(found(number, 1 + number as usize % 40), now);
        }
        let entries = memory.0.lock();
        let is_kept = |number: &u32| entries.get(&hash_part(*number)).is_some();
        assert!((18_000..20_000).all(|number| is_kept(&number)) && !is_kept(&0));
    }

    #[test]
    fn five_thousand_lookups_of_one_holder_are_remembered() {
        let (memory, now) = (FoundPaths::default(), Instant::now());
        (0..5000).for_each(|number| memory.put(found(number, 1), now));
        assert!(memory.take(&hash_part(0), now).is_some());
    }
}
