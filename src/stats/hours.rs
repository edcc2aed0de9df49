//! What happened in which hour. No I/O; time is passed in.

use super::counters::Totals;
use serde::{Deserialize, Serialize};

/// Seconds in an hour.
pub const HOUR: u64 = 3600;

/// Hours remembered: a week.
pub const MAX_HOURS: usize = 168;

/// One hour in which something happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hour {
    /// Its beginning, in seconds since 1970.
    pub start: u64,
    /// What came to be in it.
    #[serde(flatten)]
    pub totals: Totals,
}

/// The last hours, the oldest first.
#[derive(Debug, Default)]
pub struct Hours {
    hours: Vec<Hour>,
    /// What has been put into hours already.
    counted: Totals,
}

impl Hours {
    /// Takes in what another start has left.
    pub fn restore(&mut self, hours: Vec<Hour>, now: u64) {
        for hour in hours.into_iter().take(MAX_HOURS) {
            self.add(hour.start / HOUR * HOUR, &hour.totals, now);
        }
    }

    /// Puts what was counted since the last call into the hour of `now`, in seconds since 1970.
    /// `totals` is what the counters stand at.
    pub fn fold(&mut self, totals: &Totals, now: u64) {
        let new = totals.since(&self.counted);
        self.counted = *totals;
        if new != Totals::default() {
            self.add(now / HOUR * HOUR, &new, now);
        }
    }

    /// All of them.
    pub fn all(&self) -> &[Hour] {
        &self.hours
    }

    fn add(&mut self, start: u64, new: &Totals, now: u64) {
        match self.hours.binary_search_by_key(&start, |hour| hour.start) {
            Ok(at) => self.hours[at].totals = self.hours[at].totals.plus(new),
            Err(at) => self.hours.insert(at, Hour { start, totals: *new }),
        }
        if self.hours.len() > MAX_HOURS {
            // The one that is farthest: a clock that was once wrong leaves hours of the future
            // behind.
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
    fn what_came_is_put_into_its_hour() {
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
    fn a_week_is_kept_and_a_wrong_clock_does_not_stay() {
        let (counters, mut hours) = (Counters::default(), Hours::default());
        for hour in [5_000_000].into_iter().chain(1000..2000) {
            counters.add(Counter::Hits, 1);
            hours.fold(&counters.totals(), hour * HOUR);
            assert!(hours.all().len() <= MAX_HOURS);
        }
        // And set back.
        counters.add(Counter::Hits, 1);
        hours.fold(&counters.totals(), 1999 * HOUR);
        let all = hours.all();
        assert_eq!((all.len(), all[0].start / HOUR, all[167].start / HOUR), (168, 1832, 1999));
        assert_eq!(all[167].totals.get(Counter::Hits), 2);
    }

    #[test]
    fn what_was_left_is_taken_in() {
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
