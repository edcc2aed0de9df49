//! Intervals and time-outs that tests may scale.
//!
//! A test of what happens once a minute would take minutes, and so would a test of a time-out; and
//! a test of a thousand idle connections fails on a machine that takes longer than their time-out
//! to open them. Such tests set [`INTERVAL_SCALE`] or [`TIMEOUT_SCALE`] for the daemons and
//! trackers that they start: `0.1` makes everything of that kind a tenth as long. The variables are
//! for tests alone, and no part of the documentation for users: with shorter intervals a node
//! burdens its trackers and peers.

use std::sync::OnceLock;
use std::time::Duration;

/// The environment variable by whose value every [`Interval`] is multiplied.
pub const INTERVAL_SCALE: &str = "PEERIX_TEST_INTERVAL_SCALE";

/// The environment variable by whose value every [`Timeout`] is multiplied.
pub const TIMEOUT_SCALE: &str = "PEERIX_TEST_TIMEOUT_SCALE";

/// The least factor. Below, a node would do little else than announce itself.
const MIN_SCALE: f64 = 0.01;

/// The greatest factor. Beyond, waits would have no end that anybody sees.
const MAX_SCALE: f64 = 100.0;

/// Time between two actions of the same kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval(Duration);

impl Interval {
    /// An interval of that many seconds, unless a test scales it.
    pub const fn from_secs(seconds: u64) -> Interval {
        Interval(Duration::from_secs(seconds))
    }

    /// The interval, scaled by [`INTERVAL_SCALE`].
    pub fn get(self) -> Duration {
        static SCALE: OnceLock<Option<f64>> = OnceLock::new();
        scaled(self.0, *SCALE.get_or_init(|| read(INTERVAL_SCALE)))
    }
}

/// The longest that something may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeout(Duration);

impl Timeout {
    /// A time-out of that many seconds, unless a test scales it.
    pub const fn from_secs(seconds: u64) -> Timeout {
        Timeout(Duration::from_secs(seconds))
    }

    /// A time-out of that many milliseconds, unless a test scales it.
    pub const fn from_millis(milliseconds: u64) -> Timeout {
        Timeout(Duration::from_millis(milliseconds))
    }

    /// The time-out, scaled by [`TIMEOUT_SCALE`].
    pub fn get(self) -> Duration {
        static SCALE: OnceLock<Option<f64>> = OnceLock::new();
        scaled(self.0, *SCALE.get_or_init(|| read(TIMEOUT_SCALE)))
    }
}

fn scaled(time: Duration, factor: Option<f64>) -> Duration {
    factor.map_or(time, |factor| time.mul_f64(factor))
}

/// The factor in a variable. One that is malformed or out of bounds is logged and ignored.
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
    fn time_without_a_factor_is_unchanged() {
        assert_eq!(scaled(Duration::from_secs(30), None), Duration::from_secs(30));
    }

    #[test]
    fn time_is_scaled_within_bounds() {
        let scaled = |text| scaled(Duration::from_secs(30), parse(text));
        assert_eq!(scaled("0.1"), Duration::from_secs(3));
        assert_eq!(scaled("20"), Duration::from_secs(600));
        for ignored in ["0", "-1", "0.001", "101", "inf", "NaN", "", "1s"] {
            assert_eq!(parse(ignored), None, "{ignored:?}");
        }
    }
}
