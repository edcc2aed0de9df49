//! Keeps a fault that comes with every request from flooding the log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The same fault is logged this often.
const INTERVAL: Duration = Duration::from_secs(10);

/// Says when it is time to log again.
#[derive(Default)]
pub struct LogThrottle(Mutex<Option<Instant>>);

impl LogThrottle {
    /// True the first time, and then once in ten seconds.
    pub fn now(&self, now: Instant) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
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
    fn once_in_ten_seconds() {
        let (seldom, start) = (LogThrottle::default(), Instant::now());
        let said = (0..100).filter(|s| seldom.now(start + Duration::from_secs(*s))).count();
        assert_eq!(said, 10);
    }
}
