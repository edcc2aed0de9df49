//! Time at which the daemon started, by the clock since boot and by the wall clock, which may be
//! set later.

use crate::lock::Mutex;
use std::time::{Duration, SystemTime};

/// Clock difference above which the clock counts as set. Smaller ones come from slewing.
const MIN_CLOCK_CHANGE: Duration = Duration::from_secs(10);

/// Time of the start, since boot and by the wall clock.
pub struct StartTime {
    since_boot: Duration,
    pub(super) wall: Mutex<SystemTime>,
}

impl StartTime {
    pub(super) fn now() -> Self {
        StartTime { since_boot: since_boot(), wall: Mutex::new(SystemTime::now()) }
    }

    /// Time since the start, including suspends.
    pub fn age(&self) -> Duration {
        since_boot().saturating_sub(self.since_boot)
    }

    /// Time of the start by the wall clock, which reads `now`. Differs from earlier results if the
    /// clock has been set by more than 10 s, as on machines that boot in 1970.
    pub fn by_wall_clock(&self, now: SystemTime) -> SystemTime {
        let mut start = self.wall.lock();
        let by_now = now.checked_sub(self.age()).unwrap_or(SystemTime::UNIX_EPOCH);
        let difference = by_now.duration_since(*start).unwrap_or_else(|e| e.duration());
        // Keeps the result stable while the clock is slewed.
        if difference > MIN_CLOCK_CHANGE {
            *start = by_now;
        }
        *start
    }
}

/// Time since boot, including suspends (CLOCK_BOOTTIME).
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}
