//! Limits how often a repeated fault is logged.

use crate::lock::Mutex;
use std::time::{Duration, Instant};

/// Shortest interval between two log messages.
const INTERVAL: Duration = Duration::from_secs(10);

/// Permits one log message per 10 s. Messages in between are dropped.
#[derive(Default)]
pub struct LogThrottle(Mutex<Option<Instant>>);

impl LogThrottle {
    /// Returns true at most once per 10 s, and at the first call.
    pub fn allow(&self, now: Instant) -> bool {
        let mut last = self.0.lock();
        let due = last.is_none_or(|last| now.saturating_duration_since(last) >= INTERVAL);
        if due {
            *last = Some(now);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttle_permits_one_message_per_ten_seconds() {
        let (log_throttle, start) = (LogThrottle::default(), Instant::now());
        let allowed =
            (0..100).filter(|s| log_throttle.allow(start + Duration::from_secs(*s))).count();
        assert_eq!(allowed, 10);
    }
}
