//! Times and durations as the report has them.

use std::time::{Duration, Instant, SystemTime};

/// The monotonic and the wall clock at the same moment. Converts times of events, which are
/// monotonic, to the wall clock for reports.
#[derive(Clone, Copy)]
pub(super) struct ClockReading {
    pub instant: Instant,
    pub wall: SystemTime,
}

impl ClockReading {
    pub fn get() -> ClockReading {
        ClockReading { instant: Instant::now(), wall: SystemTime::now() }
    }

    /// The wall clock in seconds since 1970, to the millisecond.
    pub fn unix(&self) -> f64 {
        unix(self.wall)
    }

    /// Time of `instant` by the wall clock, in seconds since 1970, to the millisecond.
    pub fn of(&self, instant: Instant) -> f64 {
        let past = self.instant.saturating_duration_since(instant).as_secs_f64();
        let future = instant.saturating_duration_since(self.instant).as_secs_f64();
        round(self.unix() - past + future, 1e3)
    }
}

/// Seconds since 1970, to the millisecond. 0 for earlier times.
pub(super) fn unix(at: SystemTime) -> f64 {
    round(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(), 1e3)
}

/// Seconds, to the microsecond.
pub(super) fn seconds(duration: Duration) -> f64 {
    round(duration.as_secs_f64(), 1e6)
}

/// Rounds to a multiple of `1 / steps`.
pub(super) fn round(number: f64, steps: f64) -> f64 {
    (number * steps).round() / steps
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_times_are_converted_to_the_wall_clock() {
        let instant = Instant::now();
        let now =
            ClockReading { instant, wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1000) };
        assert_eq!(now.of(instant + Duration::from_millis(1500)), 1001.5);
        assert_eq!(now.of(instant), 1000.0);
        assert_eq!(
            unix(SystemTime::UNIX_EPOCH - Duration::from_secs(5)),
            0.0,
            "a clock that is wrong is no panic"
        );
    }
}
