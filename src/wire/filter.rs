//! Bloom filter over the hash parts of the paths that a node would share. Nodes publish it to
//! trackers.
//!
//! `PUT /filter/<peer id>` carries the bits: bit *i* is bit *i* mod 8, counted from the lowest, of
//! byte *i* / 8. The number of bits is a result of [`BloomFilter::size_for`], so that a tracker can
//! keep filters of equal size together. A hash part sets [`HASHES`] bits. Let *a* and *b* be the 60
//! bits of its digits 0–11 and 12–23, the first digit the highest, shifted up by 4, with *b* made
//! odd. Bit *k* is (*a* + *k b*) mod 2⁶⁴, scaled to the number of bits. Hash parts are digests
//! already, so no further hashing is needed. A node that chooses its own hash parts only misleads
//! peers that ask it.

use crate::nix::{HashPart, Malformed};

/// Number of bits that a hash part sets. Twelve is near the optimum for 16 to 20 bits a path.
pub const HASHES: usize = 12;

/// Default number of bits for each path. The false positive rate is 0.05 %.
pub const BITS_PER_PATH: u64 = 16;

/// Minimum number of bits for each path. The false positive rate is 1.4 %. Each peer adds that
/// share of wrong candidates to every lookup, so trackers refuse filters that are fuller.
pub const MIN_BITS_PER_PATH: u64 = 10;

/// Maximum number of bits for each path. The false positive rate is 0.007 %: 7 of 100,000 peers.
pub const MAX_BITS_PER_PATH: u64 = 20;

/// Maximum fraction of set bits: 1 - e^(-[`HASHES`] / [`MIN_BITS_PER_PATH`]), plus 0.02 for random
/// variation, four standard deviations in the smallest filter. Fuller filters are refused.
const MAX_SET_FRACTION: f64 = 0.72;

/// Size in bits of the smallest filter, 1 KiB. Most machines have more paths than fit into it.
const MIN_BITS: u64 = 8 * 1024;
/// Size in bytes of the largest filter, 4 MiB: 3 million paths. Also the limit of a request's body.
pub const MAX_BYTES: usize = 4 << 20;

/// Number of sizes from one power of two to the next. Rounding up adds at most an eighth.
const SIZES_PER_OCTAVE: u64 = 8;

/// A Bloom filter: a set that may also seem to contain what was not added.
#[derive(Clone, PartialEq, Eq)]
pub struct BloomFilter {
    bits: Vec<u8>,
}

impl BloomFilter {
    /// Creates an empty filter for `paths` paths of [`BITS_PER_PATH`] bits each. At the bound, it
    /// has the largest size.
    pub fn for_paths(paths: u64) -> Self {
        Self::with_bits(paths, BITS_PER_PATH)
    }

    /// Creates an empty filter for `paths` paths of `bits_per_path` bits each. At the bound, it has
    /// the largest size.
    pub fn with_bits(paths: u64, bits_per_path: u64) -> Self {
        let bytes = Self::size_for(paths.saturating_mul(bits_per_path)) / 8;
        BloomFilter { bits: vec![0; bytes as usize] }
    }

    /// Whether so many bits are set that the filter must have less than [`MIN_BITS_PER_PATH`] bits
    /// for each path.
    pub fn is_overfull(&self) -> bool {
        let set: u64 = self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum();
        set as f64 > self.len_bits() as f64 * MAX_SET_FRACTION
    }

    /// The size in bits of a filter that needs at least `bits`: 8 to 15 eighths of a power of two,
    /// from 1 KiB to 4 MiB. Larger numbers give 4 MiB.
    pub fn size_for(bits: u64) -> u64 {
        let bits = bits.clamp(MIN_BITS, 8 * MAX_BYTES as u64);
        let step = (1 << bits.ilog2()) / SIZES_PER_OCTAVE;
        bits.next_multiple_of(step)
    }

    /// Takes the bits of a request's body.
    ///
    /// # Errors
    /// The length is not a result of [`BloomFilter::size_for`].
    pub fn parse(bits: Vec<u8>) -> Result<Self, Malformed> {
        let len = bits.len() as u64 * 8;
        if Self::size_for(len) != len {
            return Err(Malformed::new("filter", "of a size that filters do not have"));
        }
        Ok(BloomFilter { bits })
    }

    /// The bytes of the filter, as in a request's body.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bits
    }

    /// The size in bits.
    pub fn len_bits(&self) -> u64 {
        self.bits.len() as u64 * 8
    }

    /// Adds a hash part. Returns true if that set a bit.
    pub fn insert(&mut self, hash_part: &HashPart) -> bool {
        let mut changed = false;
        for at in positions(hash_part, self.len_bits()) {
            let (byte, bit) = bit_position(at);
            changed |= self.bits[byte] & bit == 0;
            self.bits[byte] |= bit;
        }
        changed
    }

    /// Whether the hash part was added. May be true for one that was not.
    pub fn contains(&self, hash_part: &HashPart) -> bool {
        positions(hash_part, self.len_bits()).iter().all(|&at| {
            let (byte, bit) = bit_position(at);
            self.bits[byte] & bit != 0
        })
    }
}

fn bit_position(at: u64) -> (usize, u8) {
    ((at / 8) as usize, 1 << (at % 8))
}

/// The bits that a hash part sets in a filter of `bits` bits.
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
    fn added_parts_are_found_and_false_positives_are_rare() {
        for paths in [1, 700, 5_000, 20_000] {
            let filter = filter_of(paths);
            assert!((0..paths).all(|i| filter.contains(&part(i))));
            let wrong = (0..50_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
            assert!(wrong < 60, "{paths} paths: {wrong} of 50000 are taken for its own");
            assert!(!filter.is_overfull());
        }
        // The same for the fullest filter that is accepted.
        let mut filter = BloomFilter::for_paths(20_000);
        let max = filter.len_bits() / MIN_BITS_PER_PATH;
        (0..max).for_each(|i| {
            filter.insert(&part(i));
        });
        let wrong = (0..50_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
        assert!(wrong <= 750, "{wrong} of 50000");
        assert!(!filter.is_overfull());
    }

    #[test]
    fn filter_with_more_than_maximum_bits_is_overfull() {
        for paths in [0, 20_000] {
            let mut filter = BloomFilter::for_paths(paths);
            let fits = filter.len_bits() / MIN_BITS_PER_PATH;
            add(&mut filter, 0..fits);
            assert!(!filter.is_overfull(), "{paths}");
            add(&mut filter, fits..2 * fits);
            assert!(filter.is_overfull(), "{paths}");
        }
        assert!(BloomFilter::parse(vec![0xff; 1024]).unwrap().is_overfull());
    }

    #[test]
    fn filter_of_most_bits_has_few_false_positives() {
        let mut filter = BloomFilter::with_bits(20_000, MAX_BITS_PER_PATH);
        add(&mut filter, 0..20_000);
        let wrong = (0..200_000).filter(|i| filter.contains(&part(1 << 32 | i))).count();
        assert!(wrong <= 40, "{wrong} of 200000");
    }

    #[test]
    fn size_for_any_number_is_one_of_few_sizes_that_fit() {
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
        // a is 0, and b is 1 as it is made odd: all bits scale to 0.
        assert!(filter.insert(&HashPart::ZERO));
        assert_eq!(filter.as_bytes()[0], 1);
        assert!(filter.as_bytes()[1..].iter().all(|byte| *byte == 0));
        // a is half of 2⁶⁴, and b is too small to matter.
        let half = HashPart::parse(b"h0000000000000000000000000000000").unwrap();
        assert_eq!(positions(&half, 8192), [4096; HASHES]);
        // b is a quarter of 2⁶⁴, so every fourth bit is the same.
        let quarter = HashPart::parse(b"00000000000080000000000000000000").unwrap();
        let quarters = [0, 2048, 4096, 6144];
        assert_eq!(positions(&quarter, 8192)[..], [quarters; HASHES / 4].concat());
        assert!(!filter.insert(&HashPart::ZERO));
    }

    #[test]
    fn parse_of_other_length_is_refused() {
        let filter = filter_of(1000);
        assert!(BloomFilter::parse(filter.as_bytes().to_vec()).unwrap() == filter);
        for len in [0, 1, 1023, 1025, 1100, MAX_BYTES - 1, MAX_BYTES + 1, MAX_BYTES * 2] {
            assert!(BloomFilter::parse(vec![0; len]).is_err(), "{len}");
        }
    }
}
