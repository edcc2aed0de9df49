//! Intervals and timeouts that tests can scale.
//!
//! A test of something that happens once per minute, or of a timeout, would take minutes, and a
//! test of a thousand idle connections fails if the machine opens them too slowly. Such tests set
//! [`INTERVAL_SCALE`] or [`TIMEOUT_SCALE`] for the daemons and trackers that they start: `0.1`
//! shortens all intervals or timeouts to a tenth. The variables are for tests only, because shorter
//! intervals burden trackers and peers.

use std::sync::OnceLock;
use std::time::Duration;

/// Name of the environment variable that scales every [`Interval`].
pub const INTERVAL_SCALE: &str = "PEERIX_TEST_INTERVAL_SCALE";

/// Name of the environment variable that scales every [`Timeout`].
pub const TIMEOUT_SCALE: &str = "PEERIX_TEST_TIMEOUT_SCALE";

/// Least factor. A smaller one is ignored: the node would do little but announce itself.
const MIN_SCALE: f64 = 0.01;

/// Greatest factor. A greater one is ignored: waits would not end within a test.
const MAX_SCALE: f64 = 100.0;

/// Time between two actions of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval(Duration);

impl Interval {
    /// Creates an interval of `seconds` before scaling.
    pub const fn from_secs(seconds: u64) -> Interval {
        Interval(Duration::from_secs(seconds))
    }

    /// Returns the interval, scaled by [`INTERVAL_SCALE`].
    pub fn get(self) -> Duration {
        static SCALE: OnceLock<Option<f64>> = OnceLock::new();
        scaled(self.0, *SCALE.get_or_init(|| read(INTERVAL_SCALE)))
    }
}

/// Longest duration of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeout(Duration);

impl Timeout {
    /// Creates a timeout of `seconds` before scaling.
    pub const fn from_secs(seconds: u64) -> Timeout {
        Timeout(Duration::from_secs(seconds))
    }

    /// Creates a timeout of `milliseconds` before scaling.
    pub const fn from_millis(milliseconds: u64) -> Timeout {
        Timeout(Duration::from_millis(milliseconds))
    }

    /// Returns the timeout, scaled by [`TIMEOUT_SCALE`].
    pub fn get(self) -> Duration {
        static SCALE: OnceLock<Option<f64>> = OnceLock::new();
        scaled(self.0, *SCALE.get_or_init(|| read(TIMEOUT_SCALE)))
    }
}

fn scaled(time: Duration, factor: Option<f64>) -> Duration {
    factor.map_or(time, |factor| time.mul_f64(factor))
}

/// Reads the factor from an environment variable. A malformed factor or one out of bounds is logged
/// and ignored.
fn read(variable: &str) -> Option<f64> {
    let factor = parse(&std::env::var(variable).ok()?);
    match factor {
        Some(factor) => log::info!("{variable} is {factor}: this is a test"),
        None => log::error!("{variable}: ignored, it is not from {MIN_SCALE} to {MAX_SCALE}"),
    }
    factor
}

fn parse(text: &str) -> Option<f64> {
    text.parse().ok().filter(|factor| (MIN_SCALE..=MAX_SCALE).contains(factor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scaled_without_factor_is_unchanged() {
        assert_eq!(scaled(Duration::from_secs(30), None), Duration::from_secs(30));
    }

    #[test]
    fn factor_within_bounds_scales_time() {
        let scaled = |text| scaled(Duration::from_secs(30), parse(text));
        assert_eq!(scaled("0.1"), Duration::from_secs(3));
        assert_eq!(scaled("20"), Duration::from_secs(600));
        for ignored in ["0", "-1", "0.001", "101", "inf", "NaN", "", "1s"] {
            assert_eq!(parse(ignored), None, "{ignored:?}");
        }
    }
}
