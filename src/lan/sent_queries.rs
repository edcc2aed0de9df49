//! The queries that were sent to one peer, and how fast it answers them. No I/O. Time is passed in
//! as lookup time (see [`super`]).

use super::lookups::LookupId;
use crate::round_trip::RoundTrip;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of sent batches remembered for each peer, so that a late answer is understood:
/// 2 s of batches at the longest batch interval. At the bound the oldest is forgotten.
const MAX_SENT_BATCHES: usize = 256;

/// Number of unanswered queries at which a peer is behind. If it vanished, as many datagrams wait
/// for ARP for 3 s, and each takes about 1,280 bytes of the send buffer. The 25 connections of Nix
/// make fewer batches in a round trip.
const MAX_IN_FLIGHT: usize = 16;

/// Minimum delay of the first repeat of a query. The delay is 1.5 usual answer times.
const MIN_REPEAT: Duration = Duration::from_millis(3);
/// Delay of the first repeat to a peer that has not been measured.
const UNMEASURED_REPEAT: Duration = Duration::from_millis(30);

/// A query that was sent, to one peer or as a broadcast.
#[derive(Debug, Clone)]
pub struct SentBatch {
    /// Its request ID.
    pub id: u32,
    /// When it was sent, in lookup time.
    pub sent: Instant,
    /// The lookups whose hash parts it contains, in the same order.
    pub lookups: Arc<[LookupId]>,
}

/// The latest queries to one peer, and its answer times.
#[derive(Debug, Default)]
pub struct SentQueries {
    /// Queries without an answer so far, the oldest first.
    unanswered: VecDeque<SentBatch>,
    /// When the latest query that was answered was sent.
    latest_answered_sent: Option<Instant>,
    /// When the peer last answered a query.
    pub last_answer: Option<Instant>,
    /// When a *have-only* peer that was given up was asked for a path that was found through it.
    /// `None` if it has answered since.
    pub verified_at: Option<Instant>,
    /// The peer's answer times.
    pub round_trip: RoundTrip,
}

impl SentQueries {
    /// Records that a query was sent.
    pub fn record_sent(&mut self, batch: SentBatch) {
        if self.unanswered.len() >= MAX_SENT_BATCHES {
            self.unanswered.pop_front();
        }
        self.unanswered.push_back(batch);
    }

    /// Removes and returns the unanswered query that `is_answer` accepts.
    pub fn take(&mut self, is_answer: impl Fn(&SentBatch) -> bool) -> Option<SentBatch> {
        let at = self.unanswered.iter().position(is_answer)?;
        self.unanswered.remove(at)
    }

    /// Records an answer to a query sent at `sent`.
    pub fn record_answer(&mut self, sent: Instant, t: Instant) {
        self.round_trip.add(t.saturating_duration_since(sent));
        self.last_answer = Some(t);
        self.verified_at = None;
        // `max`, because this answer may be a late one to an older query.
        self.latest_answered_sent = self.latest_answered_sent.max(Some(sent));
    }

    /// When the latest unanswered query was sent.
    pub fn latest_unanswered_sent(&self) -> Option<Instant> {
        self.unanswered.back().map(|last| last.sent)
    }

    /// Delay of the first repeat of a query.
    pub fn first_repeat_gap(&self) -> Duration {
        self.round_trip.usual().map_or(UNMEASURED_REPEAT, |usual| (usual * 3 / 2).max(MIN_REPEAT))
    }

    /// Whether [`MAX_IN_FLIGHT`] queries are unanswered, or one for longer than the delay of a
    /// first repeat. The peer may have vanished, and then datagrams to it wait for ARP.
    pub fn is_behind(&self, t: Instant) -> bool {
        // Only queries sent after the latest answered one count: its answer showed that the peer is
        // up.
        let newest_first = self.unanswered.iter().rev();
        let in_flight =
            newest_first.take_while(|query| Some(query.sent) > self.latest_answered_sent);
        in_flight.clone().nth(MAX_IN_FLIGHT - 1).is_some()
            || in_flight.last().is_some_and(|oldest| oldest.sent + self.first_repeat_gap() <= t)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl SentQueries {
        /// Panics if more queries are remembered than the bound.
        pub fn assert_bounds(&self) {
            assert!(self.unanswered.len() <= MAX_SENT_BATCHES);
        }
    }
}
