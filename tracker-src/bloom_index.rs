//! Index over the Bloom filters of all peers. One lookup tests 64 filters at a time.
//!
//! Filters of one size are stored in blocks of 64, transposed: one word for each bit position,
//! whose bit *p* belongs to the filter in slot *p*. The AND of a hash part's twelve words gives the
//! peers that may have it. That takes 12 independent loads instead of 768. Writing a filter touches
//! its whole block (2.6 MB for 20,000 paths of 16 bits), which takes about a millisecond and does
//! not block lookups.

use peerix::lock::{Mutex, MutexGuard, RwLock};
use peerix::nix::HashPart;
use peerix::wire::filter::{BloomFilter, HASHES, positions};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// Number of filters in a block: the bits of a word.
const SLOTS: u32 = 64;

/// Maximum size in bits of a filter in a block: 52,000 paths. Larger filters are stored separately.
/// They are rare, and a block with one used slot costs as much memory as 64 filters.
const MAX_BLOCK_FILTER_BITS: u64 = 16 * 64 * 1024;

/// Where a filter is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FilterPlace {
    /// In a block of filters of equal size.
    Slot {
        /// Size of each filter in bits.
        bits: u64,
        /// Index of the block among those of this size.
        block: u32,
        /// Slot in the block, from 0 to 63.
        slot: u32,
    },
    /// Stored separately; its size in bits.
    Alone(u64),
}

struct FilterBlock {
    words: Box<[AtomicU64]>,
    owners: Vec<AtomicU32>,
    /// Bit mask of the slots in use.
    live: AtomicU64,
}

impl FilterBlock {
    fn new(bits: u64) -> Self {
        FilterBlock {
            words: (0..bits).map(|_| AtomicU64::new(0)).collect(),
            owners: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            live: AtomicU64::new(0),
        }
    }

    /// Writes a filter into a slot. A concurrent lookup may see a mix of old and new bits. The new
    /// filter usually has all bits of the old one, and lookups tolerate a wrong or a missing
    /// candidate.
    fn write(&self, slot: u32, owner: u32, filter: &BloomFilter) {
        for (byte, words) in filter.as_bytes().iter().zip(self.words.chunks_exact(8)) {
            for (k, word) in words.iter().enumerate() {
                let old = word.load(Ordering::Relaxed);
                let new = old & !(1 << slot) | u64::from(byte >> k & 1) << slot;
                if new != old {
                    word.store(new, Ordering::Relaxed);
                }
            }
        }
        self.owners[slot as usize].store(owner, Ordering::Relaxed);
        self.live.fetch_or(1 << slot, Ordering::Release);
    }

    fn find(&self, positions: &[u64], found: &mut Vec<u32>) {
        let word = |at: &u64| self.words[*at as usize].load(Ordering::Relaxed);
        let (first, rest) = positions.split_at(HASHES / 2);
        let mut hits =
            first.iter().map(word).fold(self.live.load(Ordering::Acquire), |all, word| all & word);
        // Mostly no candidate is left after half of the words.
        if hits != 0 {
            hits &= rest.iter().map(word).fold(u64::MAX, |all, word| all & word);
        }
        while hits != 0 {
            found.push(self.owners[hits.trailing_zeros() as usize].load(Ordering::Relaxed));
            hits &= hits - 1;
        }
    }
}

fn block_bytes(bits: u64) -> usize {
    bits as usize * 8
}

/// The blocks of one filter size.
#[derive(Default)]
struct BlockGroup {
    blocks: Vec<Option<Arc<FilterBlock>>>,
    /// Unused slots of the existing blocks: block and slot.
    free: BTreeSet<(u32, u32)>,
}

#[derive(Default)]
struct IndexLayout {
    groups: BTreeMap<u64, BlockGroup>,
    alone: HashMap<u32, Arc<BloomFilter>>,
}

/// The index. Owners are numbers that the caller chooses.
pub struct BloomIndex {
    max_bytes: usize,
    layout: RwLock<IndexLayout>,
    bytes: AtomicUsize,
    edit: Mutex<()>,
}

/// The exclusive right to change filters.
pub struct IndexEditor<'a> {
    index: &'a BloomIndex,
    _guard: MutexGuard<'a, ()>,
}

impl BloomIndex {
    /// Creates an empty index that uses at most `max_bytes` bytes for filters.
    pub fn new(max_bytes: usize) -> Self {
        BloomIndex {
            max_bytes,
            layout: RwLock::default(),
            bytes: AtomicUsize::new(0),
            edit: Mutex::new(()),
        }
    }

    /// Used eighths of the memory limit, rounded down.
    pub fn eighths_used(&self) -> usize {
        self.bytes() / (self.max_bytes / 8).max(1)
    }

    /// Returns the owners whose filters contain the hash part, in no particular order. Blocks
    /// only while a block is added or removed.
    pub fn find(&self, hash_part: &HashPart) -> Vec<u32> {
        let mut found = Vec::new();
        let layout = self.layout.read();
        for (bits, group) in &layout.groups {
            let positions = positions(hash_part, *bits);
            group.blocks.iter().flatten().for_each(|block| block.find(&positions, &mut found));
        }
        found.extend(
            layout
                .alone
                .iter()
                .filter(|(_, filter)| filter.contains(hash_part))
                .map(|(owner, _)| *owner),
        );
        found
    }

    /// Acquires the right to change filters. Blocks while another thread has it, which is as long
    /// as writing a few filters takes.
    pub fn edit(&self) -> IndexEditor<'_> {
        IndexEditor { index: self, _guard: self.edit.lock() }
    }

    /// Memory of the filters in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn reserve(&self, bytes: usize) -> bool {
        let fits = |used: usize| used.checked_add(bytes).filter(|sum| *sum <= self.max_bytes);
        self.bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }
}

impl IndexEditor<'_> {
    /// Stores a filter in place of `last`, the owner's previous one. Returns `None` if the memory
    /// limit is reached; `last` then remains.
    pub fn set(
        &self,
        owner: u32,
        last: Option<FilterPlace>,
        filter: BloomFilter,
    ) -> Option<FilterPlace> {
        let bits = filter.len_bits();
        let place = match last {
            Some(FilterPlace::Slot { bits: same, .. }) if same == bits => last?,
            _ if bits > MAX_BLOCK_FILTER_BITS => {
                let freed =
                    if let Some(FilterPlace::Alone(bits)) = last { bits as usize / 8 } else { 0 };
                if !self.index.reserve((bits as usize / 8).saturating_sub(freed)) {
                    return None;
                }
                self.index
                    .bytes
                    .fetch_sub(freed.saturating_sub(bits as usize / 8), Ordering::Relaxed);
                let mut layout = self.index.layout.write();
                layout.alone.insert(owner, Arc::new(filter));
                drop(layout);
                if let Some(place @ FilterPlace::Slot { .. }) = last {
                    self.remove(owner, place);
                }
                return Some(FilterPlace::Alone(bits));
            }
            _ => self.take_slot(bits)?,
        };
        if let FilterPlace::Slot { bits, block, slot } = place {
            let block = {
                let layout = self.index.layout.read();
                layout.groups.get(&bits)?.blocks.get(block as usize)?.clone()?
            };
            block.write(slot, owner, &filter);
        }
        if let Some(last) = last.filter(|last| *last != place) {
            self.remove(owner, last);
        }
        Some(place)
    }

    /// Removes the owner's filter, and its block if that is empty then.
    pub fn remove(&self, owner: u32, place: FilterPlace) {
        let mut layout = self.index.layout.write();
        match place {
            FilterPlace::Alone(bits) => {
                if layout.alone.remove(&owner).is_some() {
                    self.index.bytes.fetch_sub(bits as usize / 8, Ordering::Relaxed);
                }
            }
            FilterPlace::Slot { bits, block: at, slot } => {
                let Some(group) = layout.groups.get_mut(&bits) else { return };
                let Some(Some(block)) = group.blocks.get(at as usize) else { return };
                if block.live.fetch_and(!(1 << slot), Ordering::Release) == 1 << slot {
                    group.blocks[at as usize] = None;
                    group.free.retain(|(block, _)| *block != at);
                    self.index.bytes.fetch_sub(block_bytes(bits), Ordering::Relaxed);
                } else {
                    group.free.insert((at, slot));
                }
            }
        }
    }

    fn take_slot(&self, bits: u64) -> Option<FilterPlace> {
        let write = || self.index.layout.write();
        if let Some((block, slot)) = write().groups.entry(bits).or_default().free.pop_first() {
            return Some(FilterPlace::Slot { bits, block, slot });
        }
        if !self.index.reserve(block_bytes(bits)) {
            return None;
        }
        // The block is allocated without the lock, so that lookups continue.
        let new = Arc::new(FilterBlock::new(bits));
        let mut layout = write();
        let group = layout.groups.entry(bits).or_default();
        let at = group.blocks.iter().position(Option::is_none).unwrap_or(group.blocks.len());
        if at == group.blocks.len() {
            group.blocks.push(None);
        }
        group.blocks[at] = Some(new);
        let block = at as u32;
        group.free.extend((1..SLOTS).map(|slot| (block, slot)));
        Some(FilterPlace::Slot { bits, block, slot: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerix::nix::nix32;

    fn part(i: u64) -> HashPart {
        let digest = ring::digest::digest(&ring::digest::SHA256, &i.to_le_bytes());
        HashPart::parse(nix32::encode(&digest.as_ref()[..20]).as_bytes()).unwrap()
    }

    fn filter(owner: u32, paths: u64, room: u64) -> BloomFilter {
        let mut filter = BloomFilter::for_paths(room);
        (0..paths).for_each(|i| {
            filter.insert(&part(u64::from(owner) << 32 | i));
        });
        filter
    }

    /// Changes, enlarges and removes the filters of 300 owners, and compares each lookup with a
    /// test of each filter.
    #[test]
    fn find_matches_test_of_each_filter() {
        let index = BloomIndex::new(1 << 30);
        let mut expected: HashMap<u32, BloomFilter> = HashMap::new();
        let mut places: HashMap<u32, FilterPlace> = HashMap::new();
        let mut step = 0u64;
        for round in 0..3 {
            for owner in 0..300 {
                step += 1;
                let room = [50, 700, 900, 60_000][(step * 7919 % 31 % 4) as usize];
                let edit = index.edit();
                if round > 0 && step.is_multiple_of(5) {
                    if let Some(place) = places.remove(&owner) {
                        edit.remove(owner, place);
                        expected.remove(&owner);
                    }
                } else {
                    let filter = filter(owner, 20 + round * 10, room);
                    let place =
                        edit.set(owner, places.get(&owner).copied(), filter.clone()).unwrap();
                    places.insert(owner, place);
                    expected.insert(owner, filter);
                }
            }
            for owner in 0..300u32 {
                for i in [0, 19, 29, 39, 1000] {
                    let part = part(u64::from(owner) << 32 | i);
                    let mut found = index.find(&part);
                    found.sort_unstable();
                    let mut wanted: Vec<u32> = expected
                        .iter()
                        .filter(|(_, filter)| filter.contains(&part))
                        .map(|(owner, _)| *owner)
                        .collect();
                    wanted.sort_unstable();
                    assert_eq!(found, wanted, "round {round}, owner {owner}, path {i}");
                }
            }
        }
        for (owner, place) in places {
            index.edit().remove(owner, place);
        }
        assert_eq!(index.bytes(), 0, "all memory was given back");
        assert!(index.layout.read().groups.values().all(|g| g.free.is_empty()));
    }

    #[test]
    fn set_beyond_memory_limit_keeps_last_filter() {
        let index = BloomIndex::new(1 << 30);
        let edit = index.edit();
        let small = edit.set(0, None, filter(0, 10, 10)).unwrap();
        index.bytes.store((1 << 30) - 1000, Ordering::Relaxed);
        assert_eq!(edit.set(0, Some(small), filter(0, 10, 20_000)), None);
        assert_eq!(edit.set(0, Some(small), filter(0, 10, 1_000_000)), None);
        assert_eq!(index.find(&part(5)), [0]);
        // A filter that fits into an existing block needs no memory.
        assert!(edit.set(1, None, filter(1, 10, 10)).is_some());
        assert_eq!(index.find(&part(1 << 32)), [1]);
    }
}
