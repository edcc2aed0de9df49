//! The wait budget bounds the time that lookups spend waiting for overdue answers.
//!
//! A budget runs down in lookup time (see [`super`]) while lookups want at least one
//! overdue answer. It runs down once, not once for each lookup or peer, and recovers at other
//! times. A vanished peer therefore costs one wait of at most [`WaitBudget::MAX`]. A peer that is
//! always late costs about 1/[`WaitBudget::RECOVERY`] of the time.

use crate::time_scale::Timeout;
use std::time::{Duration, Instant};

/// Remaining time that lookups may wait for overdue answers: of one peer, or of all peers through
/// which no path was found.
#[derive(Debug, Clone)]
pub struct WaitBudget {
    left: Duration,
    updated: Instant,
    /// Whether it runs down, because answers are overdue.
    is_running: bool,
}

impl WaitBudget {
    /// Size of a full budget, and its upper bound. 3 s is longer than the pauses of a busy disk,
    /// and short enough for a user to wait.
    pub const MAX: Timeout = Timeout::from_secs(3);
    /// The budget regains 1/`RECOVERY` of the elapsed time: 50 ms per second.
    pub const RECOVERY: u32 = 20;
    /// Time regained for each path found through the peer. The budget never exceeds
    /// [`WaitBudget::MAX`].
    pub const FOUND_BONUS: Duration = Duration::from_millis(100);

    /// Creates a full budget at lookup time `t`.
    pub fn full(t: Instant) -> Self {
        WaitBudget { left: Self::MAX.get(), updated: t, is_running: false }
    }

    /// Advances the budget to lookup time `t`. Returns the remaining time, from 0 to
    /// [`WaitBudget::MAX`].
    pub fn update(&mut self, t: Instant) -> Duration {
        let elapsed = t.saturating_duration_since(self.updated);
        self.updated = self.updated.max(t);
        self.left = match self.is_running {
            true => self.left.saturating_sub(elapsed),
            false => Self::MAX.get().min(self.left + elapsed / Self::RECOVERY),
        };
        self.left
    }

    /// From lookup time `t` on, the budget runs down while `is_overdue`: an answer that it covers
    /// is overdue. It begins to do so only if `may_start`. Returns whether overdue answers have
    /// used it up.
    pub fn judge(&mut self, is_overdue: bool, may_start: bool, t: Instant) -> bool {
        let left = self.update(t);
        self.is_running = is_overdue && (may_start || self.is_running);
        self.is_running && left.is_zero()
    }

    /// Adds [`WaitBudget::FOUND_BONUS`] at lookup time `t`.
    pub fn reward(&mut self, t: Instant) {
        self.left = Self::MAX.get().min(self.update(t) + Self::FOUND_BONUS);
    }

    /// Lookup time at which the budget is used up. `None` while it does not run down.
    pub fn used_up_at(&self) -> Option<Instant> {
        self.is_running.then(|| self.updated + self.left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn budget_runs_down_while_an_answer_is_overdue_and_recovers_slowly() {
        let start = Instant::now();
        let mut budget = WaitBudget::full(start);
        assert!(!budget.judge(true, false, start), "it may not start yet");
        assert_eq!(budget.used_up_at(), None);
        assert!(!budget.judge(true, true, start));
        assert_eq!(budget.used_up_at(), Some(start + WaitBudget::MAX.get()));
        assert_eq!(budget.update(start + SECOND), 2 * SECOND);
        assert!(!budget.judge(true, false, start + SECOND), "it has started");
        assert_eq!(budget.update(start + 2 * SECOND), SECOND);
        assert!(!budget.judge(false, true, start + 2 * SECOND));
        assert_eq!(budget.update(start + 22 * SECOND), 2 * SECOND);
        assert_eq!(budget.update(start + 222 * SECOND), WaitBudget::MAX.get());
        assert!(!budget.judge(true, true, start + 222 * SECOND));
        assert!(budget.judge(true, false, start + 225 * SECOND), "used up");
    }

    #[test]
    fn budget_regains_a_bonus_for_each_path_found() {
        let start = Instant::now();
        let mut budget = WaitBudget::full(start);
        budget.judge(true, true, start);
        budget.reward(start + 4 * SECOND);
        assert_eq!(budget.update(start + 4 * SECOND), WaitBudget::FOUND_BONUS);
        (0..100).for_each(|_| budget.reward(start + 4 * SECOND));
        assert_eq!(budget.update(start + 4 * SECOND), WaitBudget::MAX.get());
    }
}
