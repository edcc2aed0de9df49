//! Totals of each hour. No I/O; the caller passes the time.

use super::counters::Totals;
use serde::{Deserialize, Serialize};

/// Seconds in an hour.
pub const HOUR: u64 = 3600;

/// Maximum number of hours that are kept: a week.
pub const MAX_HOURS: usize = 168;

/// Totals of one hour in which something was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hour {
    /// Start of the hour, in seconds since 1970.
    pub start: u64,
    /// What was counted in the hour.
    #[serde(flatten)]
    pub totals: Totals,
}

/// The last hours, the oldest first, at most [`MAX_HOURS`].
#[derive(Debug, Default)]
pub struct Hours {
    hours: Vec<Hour>,
    /// Totals that are already in hours.
    counted: Totals,
}

impl Hours {
    /// Adds the hours that an earlier start saved. `now` is in seconds since 1970.
    pub fn restore(&mut self, hours: Vec<Hour>, now: u64) {
        for hour in hours.into_iter().take(MAX_HOURS) {
            self.add(hour.start / HOUR * HOUR, &hour.totals, now);
        }
    }

    /// Adds what was counted since the last call to the hour of `now`, in seconds since 1970.
    /// `totals` are the current values of the counters.
    pub fn fold(&mut self, totals: &Totals, now: u64) {
        let new = totals.since(&self.counted);
        self.counted = *totals;
        if new != Totals::default() {
            self.add(now / HOUR * HOUR, &new, now);
        }
    }

    /// All hours, the oldest first.
    pub fn all(&self) -> &[Hour] {
        &self.hours
    }

    fn add(&mut self, start: u64, new: &Totals, now: u64) {
        match self.hours.binary_search_by_key(&start, |hour| hour.start) {
            Ok(at) => self.hours[at].totals = self.hours[at].totals.plus(new),
            Err(at) => self.hours.insert(at, Hour { start, totals: *new }),
        }
        if self.hours.len() > MAX_HOURS {
            // Removes the hour farthest from `now`, because a wrong clock may have left hours in
            // the future.
            let farthest =
                (0..self.hours.len()).max_by_key(|at| self.hours[*at].start.abs_diff(now));
            farthest.map(|at| self.hours.remove(at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::counters::{Counter, Counters};
    use super::*;

    #[test]
    fn counts_are_added_to_the_hour_of_the_call() {
        let (counters, mut hours) = (Counters::default(), Hours::default());
        hours.fold(&counters.totals(), 10 * HOUR);
        assert!(hours.all().is_empty(), "nothing happened");
        for (now, hits) in
            [(10 * HOUR, 1), (10 * HOUR + 3599, 2), (11 * HOUR, 4), (13 * HOUR + 1, 8)]
        {
            counters.add(Counter::Hits, hits);
            hours.fold(&counters.totals(), now);
            hours.fold(&counters.totals(), now);
        }
        let found: Vec<_> = hours
            .all()
            .iter()
            .map(|hour| (hour.start / HOUR, hour.totals.get(Counter::Hits)))
            .collect();
        assert_eq!(found, [(10, 3), (11, 4), (13, 8)]);
    }

    #[test]
    fn hours_are_bounded_and_those_of_a_wrong_clock_go_first() {
        let (counters, mut hours) = (Counters::default(), Hours::default());
        for hour in [5_000_000].into_iter().chain(1000..2000) {
            counters.add(Counter::Hits, 1);
            hours.fold(&counters.totals(), hour * HOUR);
            assert!(hours.all().len() <= MAX_HOURS);
        }
        // The clock is set back.
        counters.add(Counter::Hits, 1);
        hours.fold(&counters.totals(), 1999 * HOUR);
        let all = hours.all();
        assert_eq!((all.len(), all[0].start / HOUR, all[167].start / HOUR), (168, 1832, 1999));
        assert_eq!(all[167].totals.get(Counter::Hits), 2);
    }

    #[test]
    fn restored_hours_are_sorted_and_merged() {
        let mut hours = Hours::default();
        let left: Vec<Hour> = [7, 5, 5]
            .map(|hour| Hour { start: hour * HOUR + 12, totals: Totals::default() })
            .to_vec();
        hours.restore(left, 8 * HOUR);
        assert_eq!(
            hours.all().iter().map(|hour| hour.start).collect::<Vec<_>>(),
            [5 * HOUR, 7 * HOUR]
        );
    }
}
