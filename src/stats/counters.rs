//! Counters that many threads count up, and what they stood at.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::array;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Lookups of this machine's Nix that found the path at a peer.
    Hits,
    /// And those that did not.
    Misses,
    /// Bytes of NARs that came from neighbours.
    ReceivedLan,
    /// And from peers of other networks.
    ReceivedWan,
    /// Whole NARs that came and were right.
    ReceivedNars,
    /// NARs that no peer could deliver.
    FailedNars,
    /// Bytes of NARs that went to neighbours.
    SentLan,
    /// And to others.
    SentWan,
    /// NARs that went out as far as they were asked for.
    SentNars,
}

const COUNTS: usize = 9;

/// How much of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals([u64; COUNTS]);

impl Totals {
    /// What each is called in JSON, in the order of [`Counter`].
    const NAMES: [&'static str; COUNTS] = [
        "hits",
        "misses",
        "received_lan_bytes",
        "received_wan_bytes",
        "received_nars",
        "failed_nars",
        "sent_lan_bytes",
        "sent_wan_bytes",
        "sent_nars",
    ];

    /// How much of one.
    pub fn get(&self, count: Counter) -> u64 {
        self.0[count as usize]
    }

    /// Bytes of NARs that came, from wherever.
    pub fn received(&self) -> u64 {
        self.get(Counter::ReceivedLan).saturating_add(self.get(Counter::ReceivedWan))
    }

    /// Bytes of NARs that went out, to whomever.
    pub fn sent(&self) -> u64 {
        self.get(Counter::SentLan).saturating_add(self.get(Counter::SentWan))
    }

    /// Both together.
    pub fn plus(&self, other: &Totals) -> Totals {
        Totals(array::from_fn(|i| self.0[i].saturating_add(other.0[i])))
    }

    /// What came since it stood at `earlier`.
    pub fn since(&self, earlier: &Totals) -> Totals {
        Totals(array::from_fn(|i| self.0[i].saturating_sub(earlier.0[i])))
    }
}

impl Serialize for Totals {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Totals::NAMES.iter().zip(&self.0))
    }
}

/// What is missing is 0, and what is not known is passed over: a file may be of another version.
impl<'de> Deserialize<'de> for Totals {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = BTreeMap::<String, u64>::deserialize(deserializer)?;
        Ok(Totals(array::from_fn(|i| read.get(Totals::NAMES[i]).copied().unwrap_or_default())))
    }
}

/// The running counters.
#[derive(Default)]
pub(super) struct Counters([AtomicU64; COUNTS]);

impl Counters {
    pub fn add(&self, count: Counter, more: u64) {
        self.0[count as usize].fetch_add(more, Ordering::Relaxed);
    }

    pub fn totals(&self) -> Totals {
        Totals(array::from_fn(|i| self.0[i].load(Ordering::Relaxed)))
    }
}

/// How often something took how long.
#[derive(Default)]
pub struct Histogram {
    /// How often it took longer than the bound before and not longer than this one; the last one
    /// has no bound.
    buckets: [AtomicU64; Histogram::BOUNDS.len() + 1],
    nanos: AtomicU64,
}

impl Histogram {
    /// Seconds. From a round trip on a wire to the longest that Nix waits.
    pub const BOUNDS: [f64; 15] = [
        0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    ];

    /// Counts one.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = Histogram::BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How often it took no longer than each bound, and how often in all.
    pub fn cumulative(&self) -> [u64; Histogram::BOUNDS.len() + 1] {
        let mut sum = 0;
        array::from_fn(|i| {
            sum += self.buckets[i].load(Ordering::Relaxed);
            sum
        })
    }

    /// All of it together, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_count_has_its_name() {
        for (count, name) in [
            (Counter::Hits, "hits"),
            (Counter::ReceivedWan, "received_wan_bytes"),
            (Counter::FailedNars, "failed_nars"),
            (Counter::SentNars, "sent_nars"),
        ] {
            let counters = Counters::default();
            counters.add(count, 7);
            let json = serde_json::to_value(counters.totals()).unwrap();
            assert_eq!(json[name], 7);
            assert_eq!(json.as_object().unwrap().values().filter(|value| **value != 0).count(), 1);
            assert_eq!(serde_json::from_value::<Totals>(json).unwrap(), counters.totals());
        }
    }

    #[test]
    fn another_versions_file_is_read_as_far_as_it_goes() {
        let totals: Totals = serde_json::from_str(r#"{"hits":3,"something_new":4}"#).unwrap();
        assert_eq!((totals.get(Counter::Hits), totals.get(Counter::Misses)), (3, 0));
    }

    #[test]
    fn the_end_of_numbers_is_no_panic() {
        let most = Totals([u64::MAX; COUNTS]);
        assert_eq!(most.plus(&most), most);
        assert_eq!(Totals::default().since(&most), Totals::default());
        assert_eq!((most.received(), most.sent()), (u64::MAX, u64::MAX));
    }

    #[test]
    fn a_duration_is_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for micros in [0, 100, 101, 5_000_000, 5_000_001, 600_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let counts = histogram.cumulative();
        assert_eq!((counts[0], counts[1], counts[14], counts[15]), (2, 3, 4, 6));
        assert!((histogram.sum_seconds() - 610.000_202).abs() < 1e-6);
    }
}
