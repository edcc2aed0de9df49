//! Detects that the machine has been suspended.

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::os::fd::OwnedFd;
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
    alarm: Option<OwnedFd>,
}

impl SuspendDetector {
    /// Suspensions from now on are detected.
    pub fn new() -> Self {
        let alarm = alarm().inspect_err(|e| log::debug!("alarm for wake-ups: {e}")).ok();
        SuspendDetector { suspended: suspended(), alarm }
    }

    /// Becomes readable when the machine wakes up, and when somebody sets its clock. Reading it,
    /// which fails, resets it. `None` if the kernel has no such thing.
    pub fn alarm(&self) -> Option<&OwnedFd> {
        self.alarm.as_ref()
    }

    /// Reads the clocks; true if the machine has been suspended for [`MIN_SUSPENSION`] or longer
    /// since the last call, or since the detector was made. A wait does not end when the machine
    /// wakes up, because its time has stood still: call this at every turn of an event loop that
    /// also waits for [`SuspendDetector::alarm`].
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

/// A timer that never expires, but is cancelled when the wall clock jumps (timerfd_create(2)): the
/// kernel counts waking up as such a jump.
fn alarm() -> rustix::io::Result<OwnedFd> {
    let alarm =
        timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    let never = Timespec { tv_sec: i64::MAX / 2, tv_nsec: 0 };
    let timer = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
    timerfd_settime(&alarm, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &timer)?;
    Ok(alarm)
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
        let mut detector = SuspendDetector { suspended: minutes(5), alarm: None };
        assert!(!detector.update(minutes(5)));
        assert!(detector.update(minutes(7)));
        assert!(!detector.update(minutes(7)));
        assert!(detector.update(minutes(8)));
    }

    #[test]
    fn readings_that_are_too_small_are_no_suspension() {
        let second = Duration::from_secs(1);
        let mut detector = SuspendDetector { suspended: 100 * second, alarm: None };
        // Interrupted for 3 s between the two clocks, and not the next time.
        assert!(!detector.update(97 * second));
        assert!(!detector.update(100 * second));
        assert!(!detector.update(100 * second + second / 2));
        assert!(detector.update(102 * second));
    }

    #[test]
    fn short_suspensions_do_not_add_up() {
        let step = Duration::from_millis(400);
        let mut detector = SuspendDetector { suspended: Duration::ZERO, alarm: None };
        assert!((1..100).all(|count| !detector.update(step * count)));
    }

    #[test]
    fn a_machine_that_is_awake_is_not_suspended() {
        let mut detector = SuspendDetector::new();
        assert!((0..1000).all(|_| !detector.detect()));
        let alarm = detector.alarm().expect("Linux has had it since 2.6.38");
        assert_eq!(rustix::io::read(alarm, &mut [0u8; 8]), Err(rustix::io::Errno::AGAIN));
    }
}
