//! Exponential backoff: computes when a failed operation may be retried. The module does no I/O;
//! the caller passes the current time.

use crate::time_scale::Interval;
use std::time::{Duration, Instant, SystemTime};
use ureq::http::HeaderMap;

/// Number of doublings after which the pause stops growing, at 2^20 times the first pause. Keeps
/// the shift from overflowing when the bound is very long.
const MAX_DOUBLINGS: u32 = 20;

/// Largest `Retry-After` that is taken over. A longer one is cut to this: it is a mistake or
/// hostile, and adding it to an `Instant` could overflow.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(24 * 3600);

/// Pause after `failures` earlier failures: `first`, doubled with each, up to `longest`.
pub fn pause(first: Duration, failures: u32, longest: Duration) -> Duration {
    first.saturating_mul(1 << failures.min(MAX_DOUBLINGS)).min(longest)
}

/// Retry schedule of one operation. The pause doubles with each failure, from `first` up to
/// `longest`.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Interval,
    longest: Interval,
    failures: u32,
    due: Option<Instant>,
}

impl Backoff {
    /// Creates a schedule without failures: the first attempt is due at once.
    pub fn new(first: Interval, longest: Interval) -> Self {
        Backoff { first, longest, failures: 0, due: None }
    }

    /// Number of failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// Time of the next attempt; `None` if an attempt may be made at once.
    pub fn due(&self) -> Option<Instant> {
        self.due
    }

    /// Returns true if an attempt may be made at `now`.
    pub fn is_due(&self, now: Instant) -> bool {
        self.due.is_none_or(|due| due <= now)
    }

    /// Returns true if an attempt may be made at `now`. After a pause only one caller gets true in
    /// each first pause, until the outcome of its attempt is recorded.
    pub fn try_begin(&mut self, now: Instant) -> bool {
        let is_due = self.is_due(now);
        if is_due && self.due.is_some() {
            self.due = Some(now + self.first.get());
        }
        is_due
    }

    /// Records a failed attempt. `retry_after` is the pause that the server requested; it can
    /// extend the pause up to `longest`, but not beyond, because the server may be hostile or its
    /// clock wrong.
    pub fn record_failure(&mut self, retry_after: Option<Duration>, now: Instant) {
        let longest = self.longest.get();
        let pause = pause(self.first.get(), self.failures, longest);
        self.failures = self.failures.saturating_add(1);
        self.due = Some(now + pause.max(retry_after.unwrap_or_default()).min(longest));
    }

    /// Clears the failures: an attempt succeeded, or the cause of the failures is known to be gone.
    pub fn reset(&mut self) {
        (self.failures, self.due) = (0, None);
    }
}

/// Parses `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date that is compared with this
/// machine's clock. At most 24 h; zero for a date in the past; `None` if the field is missing or
/// malformed.
pub fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let field = headers.get("retry-after")?.to_str().ok()?.trim();
    if let Ok(seconds) = field.parse() {
        return Some(Duration::from_secs(seconds).min(MAX_RETRY_AFTER));
    }
    let date = httpdate::parse_http_date(field).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default().min(MAX_RETRY_AFTER))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pause_after_failures_doubles_to_bound_and_reset_clears_it() {
        let (mut backoff, now) =
            (Backoff::new(Interval::from_secs(1), Interval::from_secs(60)), Instant::now());
        assert!(backoff.is_due(now));
        for seconds in [1, 2, 4, 8, 16, 32, 60, 60] {
            backoff.record_failure(None, now);
            assert_eq!(backoff.due(), Some(now + Duration::from_secs(seconds)));
        }
        assert!(
            !backoff.is_due(now + Duration::from_secs(59))
                && backoff.is_due(now + Duration::from_secs(60))
        );
        backoff.reset();
        assert!(backoff.is_due(now) && backoff.failures() == 0);
        (0..100).for_each(|_| backoff.record_failure(None, now));
        assert_eq!(backoff.due(), Some(now + Duration::from_secs(60)));
    }

    #[test]
    fn only_one_attempt_begins_after_pause() {
        let (mut backoff, now) =
            (Backoff::new(Interval::from_secs(1), Interval::from_secs(60)), Instant::now());
        assert!(backoff.try_begin(now) && backoff.try_begin(now));
        (0..3).for_each(|_| backoff.record_failure(None, now));
        let due = now + Duration::from_secs(4);
        assert!(!backoff.try_begin(now));
        assert!(backoff.try_begin(due) && !backoff.try_begin(due));
        assert!(backoff.try_begin(due + Duration::from_secs(1)));
        backoff.record_failure(None, due);
        assert_eq!(backoff.due(), Some(due + Duration::from_secs(8)));
    }

    #[test]
    fn requested_pause_extends_backoff_up_to_bound() {
        let (mut backoff, now) =
            (Backoff::new(Interval::from_secs(1), Interval::from_secs(60)), Instant::now());
        for (asked, seconds) in [(30, 30), (0, 2), (u64::MAX, 60)] {
            backoff.record_failure(Some(Duration::from_secs(asked)), now);
            assert_eq!(backoff.due(), Some(now + Duration::from_secs(seconds)));
        }
    }

    #[test]
    fn retry_after_as_seconds_or_date_is_parsed() {
        let parse = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("Retry-After", text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(parse(" 17 "), Some(Duration::from_secs(17)));
        let later = SystemTime::now() + Duration::from_secs(100);
        let pause = parse(&httpdate::fmt_http_date(later)).unwrap();
        assert!((90..=100).contains(&pause.as_secs()), "{pause:?}");
        assert_eq!(parse("Mon, 01 Jan 2001 00:00:00 GMT"), Some(Duration::ZERO));
        for endless in ["18446744073709551615", "Fri, 31 Dec 9999 23:59:59 GMT"] {
            assert_eq!(parse(endless), Some(MAX_RETRY_AFTER));
        }
        for none in ["", "-1", "soon", "1.5"] {
            assert_eq!(parse(none), None, "{none}");
        }
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
