//! The wait budget: how long lookups may wait for answers that are overdue.
//!
//! A budget runs down in lookup time while at least one lookup wants an overdue answer, once for
//! all lookups, and recovers at other times. A vanished peer therefore costs one wait of at most
//! [`WaitBudget::MAX`], and a peer that is always late costs the [`WaitBudget::RECOVERY`]th part of
//! the time.

use crate::time_scale::Timeout;
use std::time::{Duration, Instant};

/// Time that may be spent waiting for the overdue answers of one peer, or of all peers through
/// which nothing was found.
#[derive(Debug, Clone)]
pub struct WaitBudget {
    left: Duration,
    updated: Instant,
    /// Number of peers whose answers are overdue; the budget runs down while it is not 0.
    overdue: u32,
}

impl WaitBudget {
    /// A full budget. Longer than pauses of a busy disk, shorter than a person's patience.
    pub const MAX: Timeout = Timeout::from_secs(3);
    /// Time in which the budget regains one unit of time: 50 ms a second.
    pub const RECOVERY: u32 = 20;
    /// Regained for each path found through the peer.
    pub const FOUND_BONUS: Duration = Duration::from_millis(100);

    /// A full budget at `t`.
    pub fn full(t: Instant) -> Self {
        WaitBudget { left: Self::MAX.get(), updated: t, overdue: 0 }
    }

    /// Brings the budget up to `t` and returns what is left of it.
    pub fn update(&mut self, t: Instant) -> Duration {
        let elapsed = t.saturating_duration_since(self.updated);
        self.updated = self.updated.max(t);
        self.left = match self.overdue {
            0 => Self::MAX.get().min(self.left + elapsed / Self::RECOVERY),
            _ => self.left.saturating_sub(elapsed),
        };
        self.left
    }

    /// Counts one more peer whose answers are overdue.
    pub fn start(&mut self, t: Instant) {
        self.update(t);
        self.overdue += 1;
    }

    /// Counts one peer less.
    pub fn stop(&mut self, t: Instant) {
        self.update(t);
        self.overdue = self.overdue.saturating_sub(1);
    }

    /// Adds the bonus for a path that was found.
    pub fn reward(&mut self, t: Instant) {
        self.left = Self::MAX.get().min(self.update(t) + Self::FOUND_BONUS);
    }

    /// When it will be used up, while it runs down.
    pub fn used_up_at(&self) -> Option<Instant> {
        (self.overdue > 0).then(|| self.updated + self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn budget_runs_down_once_for_all_and_recovers_slowly() {
        let start = Instant::now();
        let mut budget = WaitBudget::full(start);
        assert_eq!(budget.used_up_at(), None);
        budget.start(start);
        budget.start(start);
        assert_eq!(budget.used_up_at(), Some(start + WaitBudget::MAX.get()));
        assert_eq!(budget.update(start + SECOND), 2 * SECOND);
        budget.stop(start + SECOND);
        assert_eq!(budget.update(start + 2 * SECOND), SECOND, "one peer is still overdue");
        budget.stop(start + 2 * SECOND);
        assert_eq!(budget.update(start + 22 * SECOND), 2 * SECOND);
        assert_eq!(budget.update(start + 222 * SECOND), WaitBudget::MAX.get());
    }

    #[test]
    fn budget_regains_a_bonus_for_each_path_found() {
        let start = Instant::now();
        let mut budget = WaitBudget::full(start);
        budget.start(start);
        budget.reward(start + 4 * SECOND);
        assert_eq!(budget.update(start + 4 * SECOND), WaitBudget::FOUND_BONUS);
        (0..100).for_each(|_| budget.reward(start + 4 * SECOND));
        assert_eq!(budget.update(start + 4 * SECOND), WaitBudget::MAX.get());
    }
}
