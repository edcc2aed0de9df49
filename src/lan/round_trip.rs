//! Estimate of a peer's answer time, computed as TCP estimates round trips (RFC 6298, section 2).

use std::time::Duration;

/// Smoothed round-trip time and its variation.
#[derive(Debug, Clone, Copy)]
pub struct RoundTrip {
    smoothed: Duration,
    variation: Duration,
}

impl RoundTrip {
    /// Creates the estimate from the first measurement. As in RFC 6298, the variation starts at
    /// half of it.
    pub fn new(sample: Duration) -> Self {
        RoundTrip { smoothed: sample, variation: sample / 2 }
    }

    /// Adds a measurement, with the gains of RFC 6298: 1/8 for the mean and 1/4 for the variation.
    pub fn add(&mut self, sample: Duration) {
        self.variation = (self.variation * 3 + self.smoothed.abs_diff(sample)) / 4;
        self.smoothed = (self.smoothed * 7 + sample) / 8;
    }

    /// Smoothed round-trip time.
    pub fn smoothed(&self) -> Duration {
        self.smoothed
    }

    /// Usual answer time: the mean plus four times the variation. RFC 6298 uses the same sum as
    /// retransmission timeout.
    pub fn usual(&self) -> Duration {
        self.smoothed + 4 * self.variation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn usual_time_follows_the_samples() {
        let mut round_trip = RoundTrip::new(10 * MS);
        assert_eq!((round_trip.smoothed(), round_trip.usual()), (10 * MS, 30 * MS));
        (0..100).for_each(|_| round_trip.add(10 * MS));
        assert!(round_trip.usual() < 11 * MS);
        round_trip.add(100 * MS);
        assert!(round_trip.usual() > 100 * MS, "one late answer widens the estimate");
    }
}
