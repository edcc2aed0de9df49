//! All peers in the table, and the orders in which answers list them. No I/O; the time is passed
//! in.

use super::peer::{CandidateRank, PeerAddress, PeerEntry};
use crate::clock::TrackerTime;
use crate::reputation::Reputation;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Instant;

/// Maximum number of peers, about 150 MB without their filters. At the bound, new peers are
/// refused.
pub(super) const MAX_PEERS: usize = 262_144;

/// Peers in numbered slots, which a removed peer leaves to a new one. The slot's number is the
/// owner of the peer's filter in the index.
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
    with_filter: usize,
    next_sequence: u64,
}

impl Peers {
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Number of peers with a filter.
    pub(super) fn with_filter(&self) -> usize {
        self.with_filter
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
    pub(super) fn live(&self, slot: u32, now: Instant) -> Option<&PeerEntry> {
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

    /// The live peers, best first.
    pub(super) fn best(&self, now: Instant) -> impl Iterator<Item = &PeerEntry> {
        self.ranked.iter().filter_map(move |rank| self.live(rank.slot, now))
    }

    /// The live peers without a filter, best first.
    pub(super) fn best_others(
        &self,
        now: Instant,
    ) -> impl Iterator<Item = (CandidateRank, &PeerEntry)> {
        self.others.iter().filter_map(move |rank| Some((*rank, self.live(rank.slot, now)?)))
    }

    /// The live peers without a filter in the order of their turns, from one on that `turn`
    /// determines. At the end they begin again, once.
    pub(super) fn others_in_turn(
        &self,
        turn: u64,
        now: Instant,
    ) -> impl Iterator<Item = (CandidateRank, &PeerEntry)> {
        let from = turn % self.next_sequence.max(1);
        self.turns.range(from..).chain(&self.turns).filter_map(move |(_, slot)| {
            let peer = self.live(*slot, now)?;
            Some((peer.rank(*slot), peer))
        })
    }

    /// Changes a peer, and updates the sorted sets and counts.
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
        self.with_filter = self.with_filter + usize::from(has_filter) - usize::from(had_filter);
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
        let peer = PeerEntry::new(id.clone(), address, reputation, self.next_sequence, now);
        self.next_sequence += 1;
        self.by_id.insert(id, slot);
        self.ranked.insert(peer.rank(slot));
        self.others.insert(peer.rank(slot));
        self.turns.insert(peer.sequence, slot);
        self.slots[slot as usize] = Some(peer);
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<PeerEntry> {
        let peer = self.slots.get_mut(slot as usize)?.take()?;
        self.free.push(slot);
        self.by_id.remove(&peer.id);
        self.ranked.remove(&peer.rank(slot));
        self.others.remove(&peer.rank(slot));
        self.turns.remove(&peer.sequence);
        self.with_filter -= usize::from(peer.published.is_some());
        Some(peer)
    }
}
