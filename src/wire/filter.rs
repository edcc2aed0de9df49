//! What a node would share, as a set of hash parts that it publishes to trackers: a Bloom filter.
//!
//! `PUT /filter/<peer id>` carries the bits as they are: bit *i* is bit *i* mod 8, counted from the
//! lowest, of byte *i* / 8. Their number is one of [`BloomFilter::size_for`], so that a tracker can keep
//! filters of equal size together. A hash part sets [`HASHES`] bits: with *a* and *b* the 60 bits
//! of its digits 0–11 and 12–23, the first digit the highest, shifted up by 4, and *b* made odd,
//! bit number *k* is (*a* + *k b*) mod 2⁶⁴, scaled to the number of bits. Hash parts are digests,
//! so that no further hashing is needed; a node that chooses its own misleads nobody but those who
//! ask it.

use crate::nix::{HashPart, Malformed};

/// Bits that a hash part sets. Twelve is near the best number from 16 to 20 bits a path.
pub const HASHES: usize = 12;

/// Bits for each path of a filter that is made for no tracker in particular: 0.05 % of other paths
/// are taken for its own.
pub const BITS_PER_PATH: u64 = 16;

/// Fewest bits for each path: 1.4 % of other paths are taken for its own. Each of a tracker's peers
/// adds that much to the candidates of every path, so trackers refuse filters that are fuller.
pub const LEAST_BITS_PER_PATH: u64 = 10;

/// Most bits for each path: 0.007 % of other paths are taken for its own, 7 of 100,000 peers.
pub const MOST_BITS_PER_PATH: u64 = 20;

/// Part of the bits that may be set: 1 - e^(-[`HASHES`] / [`LEAST_BITS_PER_PATH`]), and 0.02 for
/// chance, which in the smallest filter is four standard deviations.
const MOST_SET: f64 = 0.72;

/// The smallest, 1 KiB: most machines have more paths than fit one.
const MIN_BITS: u64 = 8 * 1024;
/// The largest, 4 MiB: 3 million paths. A request's body ends there.
pub const MAX_BYTES: usize = 4 << 20;

/// Sizes in each power of two: the rounding up costs an eighth at most.
const SIZES_PER_OCTAVE: u64 = 8;

/// A set that may contain a little more than was put in.
#[derive(Clone, PartialEq, Eq)]
pub struct BloomFilter {
    bits: Vec<u8>,
}

impl BloomFilter {
    /// An empty one for so many paths, of [`BITS_PER_PATH`]; for more than the largest holds, the
    /// largest.
    pub fn for_paths(paths: u64) -> Self {
        Self::with_bits(paths, BITS_PER_PATH)
    }

    /// An empty one for so many paths, of so many bits each; for more than the largest holds, the
    /// largest.
    pub fn with_bits(paths: u64, bits_per_path: u64) -> Self {
        let bytes = Self::size_for(paths.saturating_mul(bits_per_path)) / 8;
        BloomFilter { bits: vec![0; bytes as usize] }
    }

    /// Whether more bits are set than paths of [`LEAST_BITS_PER_PATH`] set.
    pub fn is_overfull(&self) -> bool {
        let set: u64 = self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
        set as f64 > self.len_bits() as f64 * MOST_SET
    }

    /// The number of bits a filter of at least so many has: an eighth of a power of two times 8 to
    /// 15, from 1 KiB to 4 MiB.
    pub fn size_for(bits: u64) -> u64 {
        let bits = bits.clamp(MIN_BITS, 8 * MAX_BYTES as u64);
        let step = (1 << bits.ilog2()) / SIZES_PER_OCTAVE;
        bits.next_multiple_of(step)
    }

    /// Reads the bits.
    ///
    /// # Errors
    /// A length that no filter has.
    pub fn parse(bits: Vec<u8>) -> Result<Self, Malformed> {
        let len = bits.len() as u64 * 8;
        if Self::size_for(len) != len {
            return Err(Malformed::new("filter", "of a size that filters do not have"));
        }
        Ok(BloomFilter { bits })
    }

    /// The bits, for a request's body.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// How many there are.
    pub fn len_bits(&self) -> u64 {
        self.bits.len() as u64 * 8
    }

    /// Adds a hash part. True if that changed anything.
    pub fn insert(&mut self, hash_part: &HashPart) -> bool {
        let mut changed = false;
        for at in positions(hash_part, self.len_bits()) {
            let (byte, bit) = place(at);
            changed |= self.bits[byte] & bit == 0;
            self.bits[byte] |= bit;
        }
        changed
    }

    /// Whether it was added, or seems so.
    pub fn contains(&self, hash_part: &HashPart) -> bool {
        positions(hash_part, self.len_bits()).iter().all(|&at| {
            let (byte, bit) = place(at);
            self.bits[byte] & bit != 0
        })
    }
}

fn place(at: u64) -> (usize, u8) {
    ((at / 8) as usize, 1 << (at % 8))
}

/// The bits of a hash part in a filter of so many.
pub fn positions(hash_part: &HashPart, bits: u64) -> [u64; HASHES] {
    let (a, b) = hash_part.prefixes();
    std::array::from_fn(|k| {
        let at = (a << 4).wrapping_add((b << 4 | 1).wrapping_mul(k as u64));
        ((u128::from(at) * u128::from(bits)) >> 64) as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::nix32;

    fn part(i: u64) -> HashPart {
        let digest = ring::digest::digest(&ring::digest::SHA256, &i.to_le_bytes());
        HashPart::parse(nix32::encode(&digest.as_ref()[..20]).as_bytes()).unwrap()
    }

    fn add(filter: &mut BloomFilter, paths: std::ops::Range<u64>) {
        paths.for_each(|i| {
            filter.insert(&part(i));
        });
    }

    fn filter_of(paths: u64) -> BloomFilter {
        let mut filter = BloomFilter::for_paths(paths);
        add(&mut filter, 0..paths);
        filter
    }

    #[test]
    fn what_was_added_is_found_and_little_else() {
        for paths in [1, 700, 5_000, 20_000] {
            let filter = filter_of(paths);
            assert!((0..paths).all(|i| filter.contains(&part(i))));
            let wrong = (0..50_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
            assert!(wrong < 60, "{paths} paths: {wrong} of 50000 are taken for its own");
            assert!(!filter.is_overfull());
        }
        // And when it is as full as it may become.
        let mut filter = BloomFilter::for_paths(20_000);
        let most = filter.len_bits() / LEAST_BITS_PER_PATH;
        (0..most).for_each(|i| {
            filter.insert(&part(i));
        });
        let wrong = (0..50_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
        assert!(wrong <= 750, "{wrong} of 50000");
        assert!(!filter.is_overfull());
    }

    #[test]
    fn fuller_filter_than_paths_make_is_overfull() {
        for paths in [0, 20_000] {
            let mut filter = BloomFilter::for_paths(paths);
            let fits = filter.len_bits() / LEAST_BITS_PER_PATH;
            add(&mut filter, 0..fits);
            assert!(!filter.is_overfull(), "{paths}");
            add(&mut filter, fits..2 * fits);
            assert!(filter.is_overfull(), "{paths}");
        }
        assert!(BloomFilter::parse(vec![0xff; 1024]).unwrap().is_overfull());
    }

    #[test]
    fn most_bits_take_few_paths_for_its_own() {
        let mut filter = BloomFilter::with_bits(20_000, MOST_BITS_PER_PATH);
        add(&mut filter, 0..20_000);
        let wrong = (0..200_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
        assert!(wrong <= 40, "{wrong} of 200000");
    }

    #[test]
    fn sizes_are_few_and_fit() {
        let mut sizes = std::collections::BTreeSet::new();
        for bits in (0..=8 * MAX_BYTES as u64).step_by(512) {
            let size = BloomFilter::size_for(bits);
            assert!(size >= bits && size <= MIN_BITS.max(bits * 9 / 8));
            assert_eq!(BloomFilter::size_for(size), size);
            sizes.insert(size);
        }
        assert_eq!(sizes.len(), 97);
        assert_eq!(BloomFilter::for_paths(20_000).as_bytes().len(), 40 * 1024);
        assert_eq!(BloomFilter::for_paths(u64::MAX).as_bytes().len(), MAX_BYTES);
    }

    #[test]
    fn bits_are_where_the_format_says() {
        let mut filter = BloomFilter::for_paths(0);
        // Only the lowest bit of b, which is made odd: bits 0, and 0 of each further k.
        assert!(filter.insert(&HashPart::parse(&[b'0'; 32]).unwrap()));
        assert_eq!(filter.as_bytes()[0], 1);
        assert!(filter.as_bytes()[1..].iter().all(|byte| *byte == 0));
        // a is half of 2^64, b nearly nothing.
        let half = HashPart::parse(b"h0000000000000000000000000000000").unwrap();
        assert_eq!(positions(&half, 8192), [4096; HASHES]);
        // b is a quarter: every fourth comes back.
        let quarter = HashPart::parse(b"00000000000080000000000000000000").unwrap();
        let quarters = [0, 2048, 4096, 6144];
        assert_eq!(positions(&quarter, 8192)[..], [quarters; HASHES / 4].concat());
        assert!(!filter.insert(&HashPart::parse(&[b'0'; 32]).unwrap()));
    }

    #[test]
    fn other_lengths_are_refused() {
        let filter = filter_of(1000);
        assert!(BloomFilter::parse(filter.as_bytes().to_vec()).unwrap() == filter);
        for len in [0, 1, 1023, 1025, 1100, MAX_BYTES - 1, MAX_BYTES + 1, MAX_BYTES * 2] {
            assert!(BloomFilter::parse(vec![0; len]).is_err(), "{len}");
        }
    }
}
