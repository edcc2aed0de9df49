//! Detects that the machine has been suspended.

use rustix::time::{
    ClockId, Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, clock_gettime,
    timerfd_create, timerfd_settime,
};
use std::os::fd::OwnedFd;
use std::time::Duration;

/// Minimum duration of a suspension that is detected. It is far above the time between two clock
/// readings, and too short for peers to notice.
pub const MIN_SUSPENSION: Duration = Duration::from_secs(1);

/// Detects that the machine was suspended. Meanwhile `CLOCK_BOOTTIME` advances, and
/// `CLOCK_MONOTONIC` stands still, and with it `Instant` and all timeouts (clock_gettime(2)).
#[derive(Debug)]
pub struct SuspendDetector {
    /// Total time spent suspended since boot, as known so far.
    suspended: Duration,
    alarm: Option<OwnedFd>,
}

impl SuspendDetector {
    /// Creates a detector of suspensions from now on.
    pub fn new() -> Self {
        let alarm = alarm().inspect_err(|e| log::debug!("alarm for wake-ups: {e}")).ok();
        SuspendDetector { suspended: suspended(), alarm }
    }

    /// File descriptor that becomes readable when the machine wakes up, and when its clock is set.
    /// A read from it fails with `ECANCELED` and resets it. `None` if it could not be created.
    pub fn alarm(&self) -> Option<&OwnedFd> {
        self.alarm.as_ref()
    }

    /// Reads the clocks. Returns whether the machine was suspended for [`MIN_SUSPENSION`] or longer
    /// since the last call, or since the detector was created. A wait does not end at a wake-up,
    /// because its clock stood still. So call this in every turn of an event loop that also waits
    /// for [`SuspendDetector::alarm`]. Does not block.
    pub fn detect(&mut self) -> bool {
        self.update(suspended())
    }

    fn update(&mut self, suspended: Duration) -> bool {
        // A reading is too small if the thread was interrupted between the two clocks. It is never
        // too large, so the largest one is kept.
        let previous = self.suspended;
        self.suspended = previous.max(suspended);
        suspended.saturating_sub(previous) >= MIN_SUSPENSION
    }
}

impl Default for SuspendDetector {
    fn default() -> Self {
        SuspendDetector::new()
    }
}

/// Creates a timer that never expires. The kernel cancels it when the wall clock jumps
/// (`TFD_TIMER_CANCEL_ON_SET` of timerfd_create(2)), and counts a wake-up as a jump.
fn alarm() -> rustix::io::Result<OwnedFd> {
    let alarm =
        timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    let never = Timespec { tv_sec: i64::MAX / 2, tv_nsec: 0 };
    let timer = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
    timerfd_settime(&alarm, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &timer)?;
    Ok(alarm)
}

/// Total time spent suspended since boot, or less.
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
    fn suspension_is_detected_once() {
        let minutes = |n: u64| Duration::from_secs(60 * n);
        let mut detector = SuspendDetector { suspended: minutes(5), alarm: None };
        assert!(!detector.update(minutes(5)));
        assert!(detector.update(minutes(7)));
        assert!(!detector.update(minutes(7)));
        assert!(detector.update(minutes(8)));
    }

    #[test]
    fn too_small_readings_are_no_suspension() {
        let second = Duration::from_secs(1);
        let mut detector = SuspendDetector { suspended: 100 * second, alarm: None };
        // The thread is interrupted for 3 s between the two clocks in the first reading only.
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
    fn awake_machine_is_not_suspended() {
        let mut detector = SuspendDetector::new();
        assert!((0..1000).all(|_| !detector.detect()));
        let alarm = detector.alarm().expect("Linux has had it since 2.6.38");
        assert_eq!(rustix::io::read(alarm, &mut [0u8; 8]), Err(rustix::io::Errno::AGAIN));
    }
}
