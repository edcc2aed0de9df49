//! The bound IDs in memory, and which requests for them are accepted: those that their keys signed,
//! each once. No I/O; the time is passed in.

use super::peers::MAX_PEERS;
use crate::clock::TrackerTime;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Maximum number of bound IDs in memory: live ones, and those whose last signed request could
/// still be replayed. At the bound, signed requests of further IDs are refused.
const MAX_KNOWN_IDENTITIES: usize = 2 * MAX_PEERS;

/// Maximum difference in milliseconds between a signed request's time and the tracker's clock.
/// Machines without a time service drift by less in a month, and refusals contain the tracker's
/// time. Requests beyond the bound are refused.
pub(super) const CLOCK_SKEW_MS: u64 = 5 * 60 * 1000;

/// Key and time of a signed request. The caller checks the signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Claim {
    /// The ed25519 public key.
    pub key: [u8; 32],
    /// Time of the request according to the node, in milliseconds since 1970.
    pub timestamp: u64,
}

/// Why a request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimRefusal {
    /// The ID is bound to a key, and the request is not signed.
    Bound,
    /// The ID is bound to another key.
    OtherKey,
    /// The request's time is out of range.
    Time {
        /// The reason.
        why: &'static str,
        /// The tracker's time, in milliseconds since 1970.
        now_ms: u64,
    },
    /// The peer is not live, or has no key.
    NotHere,
    /// The request is not signed, and came from another address than the announce.
    OtherAddress,
    /// Too soon after the last filter; the time left to wait.
    TooSoon(Duration),
    /// A table or the filter memory is full.
    Full,
}

/// A bound ID, known from a signed request.
#[derive(Debug, Clone, Copy)]
struct BoundIdentity {
    key: [u8; 32],
    /// Time of its last signed request, in milliseconds since 1970.
    timestamp: u64,
    /// The last day, counted from 1970, on which the database was told that the ID is in use.
    day: u64,
}

/// The bound IDs of live peers, and those whose last signed request could still be replayed.
pub(super) struct Identities {
    /// Signed requests from before this time are refused, as a former process may have accepted
    /// them.
    start: TrackerTime,
    by_id: HashMap<Arc<str>, BoundIdentity>,
}

impl Identities {
    /// Creates an empty table of a tracker that starts now.
    pub(super) fn new(start: TrackerTime) -> Identities {
        Identities { start, by_id: HashMap::new() }
    }

    pub(super) fn contains(&self, id: &str) -> bool {
        self.by_id.contains_key(id)
    }

    /// Returns the ID as the table stores it, so that it is in memory once.
    pub(super) fn shared_id(&self, id: &str) -> Option<Arc<str>> {
        self.by_id.get_key_value(id).map(|(id, _)| id.clone())
    }

    /// Adds an ID that was bound before the tracker's start.
    pub(super) fn restore(&mut self, id: Arc<str>, key: [u8; 32], now: TrackerTime) {
        self.by_id.insert(id, BoundIdentity { key, timestamp: 0, day: now.day() });
    }

    /// Checks whether a request for the ID with this claim is to be accepted.
    ///
    /// # Errors
    /// Returns why the request is refused.
    pub(super) fn check(
        &self,
        id: &str,
        claim: Option<&Claim>,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        let identity = self.by_id.get(id);
        match (identity, claim) {
            (Some(_), None) => return Err(ClaimRefusal::Bound),
            (Some(identity), Some(claim)) if identity.key != claim.key => {
                return Err(ClaimRefusal::OtherKey);
            }
            _ => {}
        }
        let Some(claim) = claim else { return Ok(()) };
        let refusal = |why| Err(ClaimRefusal::Time { why, now_ms: now.ms });
        if claim.timestamp.abs_diff(now.ms) > CLOCK_SKEW_MS {
            return refusal("timestamp: not within 5 minutes of the tracker's clock");
        }
        // Computed from the current clock, which may have been set since the start.
        let running = now.at.saturating_duration_since(self.start.at).as_millis() as u64;
        if claim.timestamp < now.ms.saturating_sub(running) {
            return refusal("timestamp: earlier than the tracker's start");
        }
        // The clock may have been set back. Requests signed with later times are now out of range,
        // so they cannot be replayed, and must not block the node's new ones.
        let last = identity
            .map(|identity| identity.timestamp)
            .filter(|last| *last <= now.ms.saturating_add(CLOCK_SKEW_MS));
        if last.is_some_and(|last| claim.timestamp <= last) {
            return refusal("timestamp: not later than the last one");
        }
        Ok(())
    }

    /// Stores the claim's time as that of the ID's last signed request. `shared_id` returns the ID
    /// for a new entry.
    ///
    /// # Errors
    /// Returns why the request is refused. Nothing is stored then.
    pub(super) fn record(
        &mut self,
        id: &str,
        claim: Option<&Claim>,
        now: TrackerTime,
        shared_id: impl FnOnce() -> Arc<str>,
    ) -> Result<(), ClaimRefusal> {
        // Checked again, as another request may have arrived while the signature was checked.
        self.check(id, claim, now)?;
        let Some(&Claim { key, timestamp }) = claim else { return Ok(()) };
        let known = self.by_id.len();
        match self.by_id.get_mut(id) {
            Some(identity) => identity.timestamp = timestamp,
            None if known >= MAX_KNOWN_IDENTITIES => return Err(ClaimRefusal::Full),
            None => {
                let identity = BoundIdentity { key, timestamp, day: now.day() };
                self.by_id.insert(shared_id(), identity);
            }
        }
        Ok(())
    }

    /// Stores the time of a filter's request. A later time stays, as an announce may have arrived
    /// since the request was checked.
    pub(super) fn record_filter_time(&mut self, id: &str, timestamp: u64) {
        if let Some(identity) = self.by_id.get_mut(id) {
            identity.timestamp = identity.timestamp.max(timestamp);
        }
    }

    /// Stores that the ID is in use today. Returns true if that is news: the first use of a known
    /// ID today.
    pub(super) fn record_day(&mut self, id: &str, now: TrackerTime) -> bool {
        let today = now.day();
        self.by_id
            .get_mut(id)
            .is_some_and(|identity| std::mem::replace(&mut identity.day, today) != today)
    }

    /// Removes the IDs that are not live and whose last signed request can no longer be replayed.
    pub(super) fn sweep(&mut self, now: TrackerTime, is_live: impl Fn(&str) -> bool) {
        self.by_id.retain(|id, identity| {
            is_live(id) || identity.timestamp.saturating_add(CLOCK_SKEW_MS) >= now.ms
        });
    }
}
