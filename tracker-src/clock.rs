//! The tracker's time, read from two clocks.

use std::time::{Instant, SystemTime};

/// Milliseconds of a day.
const DAY_MS: u64 = 24 * 3600 * 1000;

/// A point in time on two clocks.
#[derive(Debug, Clone, Copy)]
pub struct TrackerTime {
    /// Monotonic clock, for intervals.
    pub at: Instant,
    /// System clock in milliseconds since 1970, for the times of signed requests.
    pub ms: u64,
}

impl TrackerTime {
    /// Days since 1970.
    pub fn day(self) -> u64 {
        self.ms / DAY_MS
    }

    /// The current time.
    pub fn now() -> TrackerTime {
        // The monotonic clock is read first. If the thread is delayed between the two reads, the
        // tracker's start seems later than it was. The other order would make it seem earlier, and
        // statements from just before the start could be replayed.
        let at = Instant::now();
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        TrackerTime { at, ms: since.as_millis() as u64 }
    }
}
