//! The filter of the paths that this node shares, and its upload to one tracker.

use crate::backoff::Backoff;
use crate::lock::Mutex;
use crate::peers::tracker::Tracker;
use crate::time_scale::Interval;
use crate::wire::filter::{BloomFilter, MAX_BITS_PER_PATH};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Shortest interval between two uploads of a filter.
const FILTER_INTERVAL: Interval = Interval::from_secs(30);

/// The filter of the paths that this node shares, as the trackers get it.
pub struct Publication {
    current: Mutex<Option<(u64, Arc<BloomFilter>)>>,
    bits_per_path: AtomicU64,
}

impl Default for Publication {
    fn default() -> Self {
        Publication { current: Mutex::default(), bits_per_path: AtomicU64::new(MAX_BITS_PER_PATH) }
    }
}

impl Publication {
    /// Bits per path of the next filter: the smallest number that a tracker wants.
    pub fn bits_per_path(&self) -> u64 {
        self.bits_per_path.load(Ordering::Relaxed)
    }

    /// Publication of a node that shares nothing with strangers: an empty filter. A tracker
    /// sometimes names a peer without a filter, but never one with an empty filter.
    pub fn empty() -> Self {
        let current = Mutex::new(Some((0, Arc::new(BloomFilter::for_paths(0)))));
        Publication { current, ..Publication::default() }
    }

    /// Replaces the filter.
    pub fn set(&self, filter: BloomFilter) {
        let mut current = self.current.lock();
        let version = current.as_ref().map_or(0, |(version, _)| version + 1);
        *current = Some((version, Arc::new(filter)));
    }

    fn get(&self) -> Option<(u64, Arc<BloomFilter>)> {
        self.current.lock().clone()
    }
}

/// Upload of the current filter to one tracker.
pub(super) struct FilterUpload {
    tracker: Arc<Tracker>,
    publication: Arc<Publication>,
    /// Version of the filter that the tracker has, and the timestamp of its upload.
    published: Option<(u64, u64)>,
    pub(super) backoff: Backoff,
    next: Instant,
}

impl FilterUpload {
    /// Creates the state of a tracker that has no filter.
    pub(super) fn new(
        tracker: Arc<Tracker>,
        publication: Arc<Publication>,
        backoff: Backoff,
    ) -> Self {
        FilterUpload { tracker, publication, published: None, backoff, next: Instant::now() }
    }

    /// Records the timestamp of the filter that the tracker has. If that is not the last one that
    /// this node uploaded, the tracker lost the filter or another machine uses the same identity,
    /// and the filter is uploaded again.
    pub(super) fn record_timestamp(&mut self, timestamp: Option<u64>) {
        self.published = self.published.filter(|(_, published)| timestamp == Some(*published));
    }

    /// Sets the bits per path of the next filter, for all trackers.
    pub(super) fn request_bits_per_path(&self, bits: u64) {
        self.publication.bits_per_path.store(bits, Ordering::Relaxed);
    }

    /// Uploads the filter if the tracker does not have it and an upload is due. Blocks for 60 s at
    /// most per attempt.
    pub(super) fn upload_if_due(&mut self) {
        let Some((version, filter)) = self.publication.get() else { return };
        let now = Instant::now();
        let has_it = self.published.is_some_and(|(last, _)| last == version);
        if now < self.next || has_it || !self.backoff.is_due(now) {
            return;
        }
        match self.tracker.client().put_filter(&filter) {
            Ok(timestamp) => {
                self.published = Some((version, timestamp));
                self.backoff.reset();
                self.next = Instant::now() + FILTER_INTERVAL.get();
            }
            Err(e) => {
                log::debug!("tracker {}: filter: {e}", self.tracker.url());
                self.backoff.record_failure(e.retry_after(), Instant::now());
            }
        }
    }
}
