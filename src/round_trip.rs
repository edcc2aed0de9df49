//! Estimate of a peer's answer time, computed as TCP estimates round trips (RFC 6298, section 2).

use std::time::Duration;

/// Smoothed round-trip time and its variation.
#[derive(Debug, Clone, Copy, Default)]
pub struct RoundTrip {
    smoothed: Option<Duration>,
    variation: Duration,
}

impl RoundTrip {
    /// Adds a measurement, with the gains of RFC 6298: 1/8 for the mean and 1/4 for the variation,
    /// which starts at half of the first measurement.
    pub fn add(&mut self, sample: Duration) {
        (self.smoothed, self.variation) = match self.smoothed {
            None => (Some(sample), sample / 2),
            Some(old) => {
                (Some((old * 7 + sample) / 8), (self.variation * 3 + old.abs_diff(sample)) / 4)
            }
        };
    }

    /// Raises the mean to `time` if it is less, because an answer takes longer than that.
    pub fn raise_to(&mut self, time: Duration) {
        self.smoothed = self.smoothed.max(Some(time));
    }

    /// Smoothed round-trip time. `None` before the first measurement.
    pub fn smoothed(&self) -> Option<Duration> {
        self.smoothed
    }

    /// Usual answer time: the mean plus four times the variation. RFC 6298 uses the same sum as
    /// retransmission timeout. `None` before the first measurement.
    pub fn usual(&self) -> Option<Duration> {
        Some(self.smoothed? + 4 * self.variation)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn usual_time_follows_the_samples() {
        let mut round_trip = RoundTrip::default();
        assert_eq!(round_trip.usual(), None);
        round_trip.add(10 * MS);
        assert_eq!((round_trip.smoothed(), round_trip.usual()), (Some(10 * MS), Some(30 * MS)));
        (0..100).for_each(|_| round_trip.add(10 * MS));
        assert!(round_trip.usual() < Some(11 * MS));
        round_trip.add(100 * MS);
        assert!(round_trip.usual() > Some(100 * MS), "one late answer widens the estimate");
    }
}
