//! Counters and histograms that many threads update, and snapshots of them.

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::array;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A counted quantity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Lookups of this machine's Nix that found the path at a peer.
    Hits,
    /// Lookups of this machine's Nix that did not find the path.
    Misses,
    /// Bytes of NARs received from LAN peers.
    ReceivedLan,
    /// Bytes of NARs received from peers on other networks.
    ReceivedWan,
    /// Whole NARs received and verified.
    ReceivedNars,
    /// NARs that no peer could deliver.
    FailedNars,
    /// Bytes of NARs sent to LAN peers.
    SentLan,
    /// Bytes of NARs sent to peers on other networks.
    SentWan,
    /// NARs sent completely, or as far as they were requested.
    SentNars,
}

const COUNTS: usize = 9;

/// Values of all counters at one moment, or differences and sums of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals([u64; COUNTS]);

impl Totals {
    /// Names in JSON, in the order of [`Counter`].
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

    /// The value of one counter.
    pub fn get(&self, count: Counter) -> u64 {
        self.0[count as usize]
    }

    /// Bytes of NARs received from all networks.
    pub fn received(&self) -> u64 {
        self.get(Counter::ReceivedLan).saturating_add(self.get(Counter::ReceivedWan))
    }

    /// Bytes of NARs sent to all networks.
    pub fn sent(&self) -> u64 {
        self.get(Counter::SentLan).saturating_add(self.get(Counter::SentWan))
    }

    /// The sums; they saturate at `u64::MAX`.
    pub fn plus(&self, other: &Totals) -> Totals {
        Totals(array::from_fn(|i| self.0[i].saturating_add(other.0[i])))
    }

    /// The differences to `earlier`; 0 where `earlier` is larger.
    pub fn since(&self, earlier: &Totals) -> Totals {
        Totals(array::from_fn(|i| self.0[i].saturating_sub(earlier.0[i])))
    }
}

impl Serialize for Totals {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(Totals::NAMES.iter().zip(&self.0))
    }
}

/// A missing counter is 0 and an unknown name is ignored: the file may be of another version.
impl<'de> Deserialize<'de> for Totals {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let read = BTreeMap::<String, u64>::deserialize(deserializer)?;
        Ok(Totals(array::from_fn(|i| read.get(Totals::NAMES[i]).copied().unwrap_or_default())))
    }
}

/// The counters that are updated.
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

/// A histogram of durations.
#[derive(Default)]
pub struct Histogram {
    /// Number of durations in each bucket: longer than the previous bound and at most this one. The
    /// last bucket has no upper bound.
    buckets: [AtomicU64; Histogram::BOUNDS.len() + 1],
    nanos: AtomicU64,
}

impl Histogram {
    /// Upper bounds in seconds: from a round trip on Ethernet to the longest time that Nix waits.
    pub const BOUNDS: [f64; 15] = [
        0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
    ];

    /// Counts one duration.
    pub fn observe(&self, elapsed: Duration) {
        let seconds = elapsed.as_secs_f64();
        let bucket = Histogram::BOUNDS.partition_point(|bound| *bound < seconds);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.nanos
            .fetch_add(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Number of durations up to each bound; the last element is the number of all.
    pub fn cumulative(&self) -> [u64; Histogram::BOUNDS.len() + 1] {
        let mut sum = 0;
        array::from_fn(|i| {
            sum += self.buckets[i].load(Ordering::Relaxed);
            sum
        })
    }

    /// Sum of all durations, in seconds.
    pub fn sum_seconds(&self) -> f64 {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed)).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_counter_has_its_own_name_in_json() {
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
    fn totals_ignore_unknown_and_default_missing_counters() {
        let totals: Totals = serde_json::from_str(r#"{"hits":3,"something_new":4}"#).unwrap();
        assert_eq!((totals.get(Counter::Hits), totals.get(Counter::Misses)), (3, 0));
    }

    #[test]
    fn totals_saturate_at_the_bounds() {
        let max = Totals([u64::MAX; COUNTS]);
        assert_eq!(max.plus(&max), max);
        assert_eq!(Totals::default().since(&max), Totals::default());
        assert_eq!((max.received(), max.sent()), (u64::MAX, u64::MAX));
    }

    #[test]
    fn duration_is_in_the_first_bucket_that_holds_it() {
        let histogram = Histogram::default();
        for micros in [0, 100, 101, 5_000_000, 5_000_001, 600_000_000] {
            histogram.observe(Duration::from_micros(micros));
        }
        let counts = histogram.cumulative();
        assert_eq!((counts[0], counts[1], counts[14], counts[15]), (2, 3, 4, 6));
        assert!((histogram.sum_seconds() - 610.000_202).abs() < 1e-6);
    }
}
