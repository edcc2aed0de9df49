//! All peers in the table, and the orders in which answers list them. No I/O; the time is passed
//! in.

use super::peer::{CandidateRank, Instances, PEER_TTL, PeerAddress, PeerEntry, Reachability};
use crate::clock::TrackerTime;
use crate::reputation::Reputation;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// Maximum number of peers, about 150 MB without their filters. At the bound, new peers are
/// refused.
pub(super) const MAX_PEERS: usize = 262_144;

/// Peers in numbered slots. A new peer takes the slot of a removed one, if there is any. The filter
/// index knows a peer by its slot number.
#[derive(Default)]
pub(super) struct Peers {
    slots: Vec<Option<PeerEntry>>,
    free: Vec<u32>,
    by_id: HashMap<Arc<str>, u32>,
    /// All peers, best first.
    pub(super) ranked: BTreeSet<CandidateRank>,
    /// Peers without a filter, best first.
    pub(super) others: BTreeSet<CandidateRank>,
    /// Peers without a filter by sequence number, the order in which they take turns.
    pub(super) turns: BTreeMap<u64, u32>,
    pub(super) next_sequence: u64,
}

impl Peers {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Number of peers with a filter.
    pub(super) fn with_filter(&self) -> usize {
        self.ranked.len() - self.others.len()
    }

    /// Whether [`MAX_PEERS`] is reached.
    pub(super) fn is_full(&self) -> bool {
        self.by_id.len() >= MAX_PEERS
    }

    /// Returns true if the peer is in the table, even if it has expired and is not swept yet.
    pub(super) fn contains(&self, id: &str) -> bool {
        self.by_id.contains_key(id)
    }

    /// Returns the peer and its slot, even if it has expired and is not swept yet.
    pub(super) fn peer(&self, id: &str) -> Option<(u32, &PeerEntry)> {
        let slot = *self.by_id.get(id)?;
        Some((slot, self.slots.get(slot as usize)?.as_ref()?))
    }

    /// Returns the peer and its slot, unless it has expired.
    pub(super) fn live_peer(&self, id: &str, now: Instant) -> Option<(u32, &PeerEntry)> {
        self.peer(id).filter(|(_, peer)| peer.is_live(now))
    }

    /// Returns the peer in a slot, unless it has expired.
    pub(super) fn live_peer_in(&self, slot: u32, now: Instant) -> Option<&PeerEntry> {
        self.slots.get(slot as usize)?.as_ref().filter(|peer| peer.is_live(now))
    }

    /// The slots of expired peers.
    pub(super) fn expired(&self, now: Instant) -> Vec<u32> {
        let is_expired = |peer: &PeerEntry| !peer.is_live(now);
        (0u32..)
            .zip(&self.slots)
            .filter(|(_, peer)| peer.as_ref().is_some_and(is_expired))
            .map(|(slot, _)| slot)
            .collect()
    }

    /// Changes a peer, and updates the sorted sets.
    pub(super) fn change(&mut self, slot: u32, change: impl FnOnce(&mut PeerEntry)) {
        let Some(Some(peer)) = self.slots.get_mut(slot as usize) else { return };
        let (old, had_filter) = (peer.rank(slot), peer.published.is_some());
        change(peer);
        let (new, has_filter) = (peer.rank(slot), peer.published.is_some());
        if old != new {
            self.ranked.remove(&old);
            self.ranked.insert(new);
        }
        if (old, had_filter) != (new, has_filter) {
            self.others.remove(&old);
            self.turns.remove(&old.sequence);
            if !has_filter {
                self.others.insert(new);
                self.turns.insert(new.sequence, slot);
            }
        }
    }

    /// Adds a peer without a filter, and returns its slot. The caller has checked that the peer is
    /// not in the table, and that the table is not full.
    pub(super) fn insert(
        &mut self,
        id: Arc<str>,
        address: PeerAddress,
        reputation: Reputation,
        now: TrackerTime,
    ) -> u32 {
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        if slot as usize == self.slots.len() {
            self.slots.push(None);
        }
        let peer = PeerEntry {
            id: id.clone(),
            address,
            last_seen_ms: now.ms,
            expires: now.at + PEER_TTL.get(),
            reputation,
            sequence: self.next_sequence,
            published: None,
            reachability: Reachability::default(),
            instances: Instances::default(),
        };
        self.next_sequence += 1;
        self.by_id.insert(id, slot);
        let rank = peer.rank(slot);
        self.ranked.insert(rank);
        self.others.insert(rank);
        self.turns.insert(peer.sequence, slot);
        self.slots[slot as usize] = Some(peer);
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<PeerEntry> {
        let peer = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.by_id.remove(&peer.id);
        let rank = peer.rank(slot);
        self.ranked.remove(&rank);
        self.others.remove(&rank);
        self.turns.remove(&peer.sequence);
        Some(peer)
    }
}
