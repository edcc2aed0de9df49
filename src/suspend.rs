//! Detects that the machine has been suspended.

use rustix::time::{ClockId, Timespec, clock_gettime};
use std::time::Duration;

/// Shortest suspension that counts. It is far above the time between two readings of clocks, and
/// far below what neighbours notice.
pub const MIN_SUSPENSION: Duration = Duration::from_secs(1);

/// Detects that the machine has been suspended: `CLOCK_BOOTTIME` goes on meanwhile, and
/// `CLOCK_MONOTONIC`, by which `Instant` and all timeouts go, stands still.
#[derive(Debug)]
pub struct SuspendDetector {
    /// Time spent suspended since the machine booted, as known so far.
    suspended: Duration,
}

impl SuspendDetector {
    /// Suspensions from now on are detected.
    pub fn new() -> Self {
        SuspendDetector { suspended: suspended() }
    }

    /// Reads the clocks; true if the machine has been suspended for [`MIN_SUSPENSION`] or longer
    /// since the last call, or since the detector was made. A wait does not end when the machine
    /// wakes up, because its time has stood still: call this at every turn of an event loop.
    pub fn detect(&mut self) -> bool {
        self.update(suspended())
    }

    fn update(&mut self, suspended: Duration) -> bool {
        // The reading is too small if the thread was interrupted between the two clocks. As it is
        // never too large, the largest is the right one.
        let known = self.suspended;
        self.suspended = known.max(suspended);
        suspended.saturating_sub(known) >= MIN_SUSPENSION
    }
}

impl Default for SuspendDetector {
    fn default() -> Self {
        SuspendDetector::new()
    }
}

/// Time spent suspended since the machine booted, or less.
fn suspended() -> Duration {
    let boot_time = duration(clock_gettime(ClockId::Boottime));
    boot_time.saturating_sub(duration(clock_gettime(ClockId::Monotonic)))
}

fn duration(time: Timespec) -> Duration {
    Duration::try_from(time).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suspension_is_detected_once() {
        let minutes = |n: u64| Duration::from_secs(60 * n);
        let mut detector = SuspendDetector { suspended: minutes(5) };
        assert!(!detector.update(minutes(5)));
        assert!(detector.update(minutes(7)));
        assert!(!detector.update(minutes(7)));
        assert!(detector.update(minutes(8)));
    }

    #[test]
    fn readings_that_are_too_small_are_no_suspension() {
        let second = Duration::from_secs(1);
        let mut detector = SuspendDetector { suspended: 100 * second };
        // Interrupted for 3 s between the two clocks, and not the next time.
        assert!(!detector.update(97 * second));
        assert!(!detector.update(100 * second));
        assert!(!detector.update(100 * second + second / 2));
        assert!(detector.update(102 * second));
    }

    #[test]
    fn short_suspensions_do_not_add_up() {
        let step = Duration::from_millis(400);
        let mut detector = SuspendDetector { suspended: Duration::ZERO };
        assert!((1..100).all(|count| !detector.update(step * count)));
    }

    #[test]
    fn a_machine_that_is_awake_is_not_suspended() {
        let mut detector = SuspendDetector::new();
        assert!((0..1000).all(|_| !detector.detect()));
    }
}
