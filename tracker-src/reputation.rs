//! Reputations: what the resolved transfers of a peer add up to.

/// Totals of a peer's resolved transfers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reputation {
    /// Bytes sent.
    pub shared: u64,
    /// Bytes received.
    pub received: u64,
    /// Transfers on which both sides' reports agree.
    pub successful: u64,
    /// Transfers on which they do not agree.
    pub failed: u64,
}

impl Reputation {
    /// The score: ok / (ok + failed + 1) · ln(bytes shared + 1), as in the original. 0 without
    /// transfers.
    pub fn score(&self) -> f64 {
        let (ok, failed) = (self.successful as f64, self.failed as f64);
        if ok + failed == 0.0 {
            return 0.0;
        }
        ok / (ok + failed + 1.0) * (self.shared as f64 + 1.0).ln()
    }

    /// The score rounded to four decimal places.
    pub fn rounded_score(&self) -> f64 {
        format!("{:.4}", self.score()).parse().unwrap_or_default()
    }

    /// Returns the newer of two reputations of one peer: the one with more transfers, as counts
    /// only grow. Updates may arrive in any order.
    pub fn newer(self, other: Reputation) -> Reputation {
        if other.successful + other.failed > self.successful + self.failed { other } else { self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values printed by the original for the same counts.
    #[test]
    fn scores_are_those_of_the_original() {
        let of = |shared, successful, failed| {
            Reputation { shared, received: 9, successful, failed }.rounded_score()
        };
        assert_eq!(of(0, 0, 0), 0.0);
        assert_eq!(of(1000, 1, 1), 2.3029);
        assert_eq!(of(123_456_789, 7, 2), 13.042);
        assert_eq!(of(1 << 44, 1, 0), 15.2492);
        assert_eq!(of(0, 3, 0), 0.0);
    }
}
