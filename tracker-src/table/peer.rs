//! What the table stores of one peer. No I/O; the time is passed in.

use crate::address;
use crate::bloom_index::FilterPlace;
use crate::reputation::Reputation;
use peerix::time_scale::{Interval, Timeout};
use peerix::wire::tracker::Candidate;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lifetime of an announce, as in the original. Peers announce themselves every 60 s.
pub(super) const PEER_TTL: Timeout = Timeout::from_secs(120);

/// Minimum interval between two filters of a peer; earlier ones are refused. Nodes wait 30 s, which
/// the network's delays may shorten.
pub(super) const FILTER_INTERVAL: Interval = Interval::from_secs(25);

/// Interval between reachability tests of a peer that was reached: 28 tests a second for 100,000
/// peers. A changed address is tested at once.
pub(super) const REACH_TEST_INTERVAL: Interval = Interval::from_secs(3600);
/// Interval between reachability tests of a peer that was not reached, or whose test was skipped.
pub(super) const REACH_RETRY_INTERVAL: Interval = Interval::from_secs(600);

/// Maximum number of earlier instances that are remembered of one peer. Of more machines with one
/// identity that announce themselves in turn, none is noticed. The least that a queue allocates;
/// anybody can fill it for all peers.
const MAX_REPLACED: usize = 4;

/// The announced address of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// Address or host name.
    pub addr: String,
    /// Port for HTTP (TCP) and queries (UDP).
    pub port: u16,
    /// Source address of the announce.
    pub from: IpAddr,
}

/// A filter in the index.
pub(super) struct PublishedFilter {
    pub(super) place: FilterPlace,
    /// Time of the request that published it, in milliseconds since 1970.
    pub(super) timestamp: u64,
    /// When the filter was published; `None` if that was before the tracker's start.
    pub(super) at: Option<Instant>,
}

impl PublishedFilter {
    /// Time until the peer may publish another filter; `None` if it may now.
    pub(super) fn time_to_next(&self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.at?);
        FILTER_INTERVAL.get().checked_sub(passed).filter(|wait| !wait.is_zero())
    }
}

/// What reachability tests of a peer's address have shown.
#[derive(Default)]
pub(super) struct Reachability {
    /// Result of the last test; `None` if there was none.
    pub(super) reachable: Option<bool>,
    /// When the last test was requested.
    last_test: Option<Instant>,
}

impl Reachability {
    /// Returns true if a test is due, and counts it as requested now.
    pub(super) fn request_due_test(&mut self, now: Instant) -> bool {
        let interval =
            if self.reachable == Some(true) { REACH_TEST_INTERVAL } else { REACH_RETRY_INTERVAL };
        let is_due = self.last_test.is_none_or(|at| now >= at + interval.get());
        if is_due {
            self.last_test = Some(now);
        }
        is_due
    }
}

/// The instances of a node that have announced themselves with one identity. Each start of a node
/// is an instance with a random number.
#[derive(Default)]
pub(super) struct Instances {
    /// Random number of the latest instance.
    last: Option<u64>,
    /// Earlier instances, each with the time when another replaced it; the latest last.
    pub(super) replaced: VecDeque<(u64, Instant)>,
}

impl Instances {
    /// Records the instance of an announce. Returns true if it was replaced before: after a
    /// restart, the old instance does not come back, so another machine has the same identity.
    pub(super) fn record(&mut self, instance: Option<u64>, now: Instant) -> bool {
        let Some(instance) = instance else { return false };
        self.replaced.retain(|(_, at)| now < *at + 2 * PEER_TTL.get());
        if self.replaced.is_empty() {
            self.replaced.shrink_to_fit();
        }
        let Some(last) = self.last.replace(instance).filter(|last| *last != instance) else {
            return false;
        };
        let is_back = self.replaced.iter().any(|(id, _)| *id == instance);
        self.replaced.retain(|(id, _)| *id != instance);
        if self.replaced.len() >= MAX_REPLACED {
            self.replaced.pop_front();
        }
        self.replaced.push_back((last, now));
        is_back
    }
}

/// Sort key of a peer in answers: reachable peers first, then the best score, then the oldest peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CandidateRank {
    /// Reachable peers sort before untested ones, and those before unreachable ones.
    pub(super) class: u8,
    /// The inverted bits of the score. Non-negative floats sort like their bits.
    pub(super) inverted_score: u64,
    pub(super) sequence: u64,
    pub(super) slot: u32,
}

/// A peer in the table.
pub(super) struct PeerEntry {
    pub(super) id: Arc<str>,
    pub(super) address: PeerAddress,
    pub(super) last_seen_ms: u64,
    pub(super) expires: Instant,
    pub(super) reputation: Reputation,
    /// Sequence number; newer peers have greater ones.
    pub(super) sequence: u64,
    pub(super) published: Option<PublishedFilter>,
    pub(super) reachability: Reachability,
    pub(super) instances: Instances,
}

impl PeerEntry {
    pub(super) fn is_live(&self, now: Instant) -> bool {
        self.expires > now
    }

    /// The rank of a peer in this slot of the table.
    pub(super) fn rank(&self, slot: u32) -> CandidateRank {
        let class = match self.reachability.reachable {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        };
        let inverted_score = !self.reputation.score().to_bits();
        CandidateRank { class, inverted_score, sequence: self.sequence, slot }
    }

    /// The network of the announced IP address, or of the announce's source if a host name was
    /// announced.
    pub(super) fn network(&self) -> u128 {
        address::network(self.address.addr.parse().unwrap_or(self.address.from))
    }

    pub(super) fn candidate(&self) -> Candidate {
        Candidate {
            peer_id: self.id.to_string(),
            addr: self.address.addr.clone(),
            port: self.address.port,
            score: self.reputation.rounded_score(),
        }
    }
}
