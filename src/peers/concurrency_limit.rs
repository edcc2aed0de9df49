//! Limit of the concurrent requests of one search. It is low while peers answer, and grows while
//! they do not.

use std::time::{Duration, Instant};

/// Time without a good narinfo after which further peers are asked.
const INCREASE_INTERVAL: Duration = Duration::from_millis(100);

/// Largest number of concurrent requests of one search, which grows at regular intervals.
pub(super) struct ConcurrencyLimit {
    max: usize,
    /// Time of the next increase; `None` before the first request.
    next_increase: Option<Instant>,
}

impl ConcurrencyLimit {
    /// Creates a limit of `first` requests, which does not grow before [`ConcurrencyLimit::start`].
    pub(super) fn new(first: usize) -> Self {
        ConcurrencyLimit { max: first, next_increase: None }
    }

    /// Largest number of concurrent requests.
    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// Time of the next increase; `None` before the first request.
    pub(super) fn next_increase(&self) -> Option<Instant> {
        self.next_increase
    }

    /// Starts the time until the first increase. Does nothing if it was started already.
    pub(super) fn start(&mut self, now: Instant) {
        self.next_increase.get_or_insert(now + INCREASE_INTERVAL);
    }

    /// Replaces the limit by what `increased` returns for it, if an increase is due at `now`.
    pub(super) fn increase_if_due(&mut self, now: Instant, increased: impl FnOnce(usize) -> usize) {
        if self.next_increase.is_some_and(|at| at <= now) {
            self.max = increased(self.max);
            self.next_increase = Some(now + INCREASE_INTERVAL);
        }
    }
}
