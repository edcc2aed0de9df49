//! Clock for the timestamps of signed statements.

use super::answer::TrackerError;
use std::time::SystemTime;

/// Largest accepted difference between the tracker's clock and this machine's, in milliseconds.
/// Nothing is signed beyond it: a tracker that could choose the time would get statements for later
/// use.
const MAX_CLOCK_OFFSET_MS: u64 = 5 * 60 * 1000;

/// Clock for the timestamps of statements. Each timestamp is later than the one before, and follows
/// the tracker's clock if this machine's is slightly wrong.
#[derive(Default)]
pub(super) struct SigningClock {
    /// Milliseconds to add to this machine's clock.
    offset: i64,
    last: u64,
}

impl SigningClock {
    /// Timestamp of the next statement, in milliseconds since 1970.
    pub(super) fn timestamp(&mut self) -> u64 {
        self.last =
            unix_time_ms().saturating_add_signed(self.offset).max(self.last.saturating_add(1));
        self.last
    }

    /// Adopts the tracker's time `now`, in milliseconds since 1970, for further statements. Returns
    /// how many milliseconds it is ahead of this machine's time.
    ///
    /// # Errors
    /// [`TrackerError::Clock`] if it differs from this machine's time by more than 5 min.
    pub(super) fn set(&mut self, now: u64) -> Result<i64, TrackerError> {
        let offset =
            i64::try_from(i128::from(now) - i128::from(unix_time_ms())).unwrap_or(i64::MAX);
        if offset.unsigned_abs() > MAX_CLOCK_OFFSET_MS {
            return Err(TrackerError::Clock(offset));
        }
        *self = SigningClock { offset, last: 0 };
        Ok(offset)
    }
}

/// Milliseconds since 1970 by this machine's clock, which may be wrong.
fn unix_time_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamps_increase_and_follow_tracker_clock() {
        let mut clock = SigningClock::default();
        let stamps: Vec<u64> = (0..100).map(|_| clock.timestamp()).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
        for ahead in [-240_000, 240_000] {
            let now = unix_time_ms().saturating_add_signed(ahead);
            clock.set(now).unwrap();
            assert!(clock.timestamp().abs_diff(now) < 60_000);
        }
    }

    #[test]
    fn tracker_clock_far_from_own_is_rejected() {
        let mut clock = SigningClock::default();
        for now in [0, unix_time_ms() - 3_600_000, unix_time_ms() + 3_600_000, u64::MAX] {
            let Err(TrackerError::Clock(_)) = clock.set(now) else { panic!("{now}") };
            assert!(clock.timestamp().abs_diff(unix_time_ms()) < 60_000);
        }
        assert!(TrackerError::Clock(3_600_000).to_string().contains("3600 s slow"));
    }
}
