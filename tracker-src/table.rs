//! The live peers: their addresses, filters, reputations, and the times of their last signed
//! requests. All in memory. No I/O; the time is passed in.
//!
//! `peers` stores what `peer` describes, `identities` decides which requests are accepted, and
//! `candidates` chooses the peers for an answer.

mod candidates;
mod identities;
mod peer;
mod peers;

use crate::bloom_index::BloomIndex;
use crate::clock::TrackerTime;
use crate::reputation::Reputation;
use identities::Identities;
pub use identities::{Claim, ClaimRefusal};
pub use peer::PeerAddress;
use peer::{PEER_TTL, PublishedFilter, Reachability};
use peerix::lock::RwLock;
use peerix::nix::HashPart;
use peerix::wire::filter::{BloomFilter, MAX_BITS_PER_PATH, MIN_BITS_PER_PATH};
use peerix::wire::tracker::CandidateList;
use peers::Peers;
use std::net::IpAddr;
use std::sync::Arc;

/// A peer that was live when the tracker stopped.
#[derive(Debug)]
pub struct PersistedPeer {
    /// Its peer ID.
    pub id: String,
    /// Its announced address.
    pub address: PeerAddress,
    /// The key that its ID is bound to.
    pub key: Option<[u8; 32]>,
    /// Its reputation.
    pub reputation: Reputation,
    /// Its filter, with the timestamp of the request that published it, in milliseconds since 1970.
    pub filter: Option<(u64, Vec<u8>)>,
}

/// A row of `GET /peers`.
#[derive(Debug, Clone)]
pub struct PeerRow {
    /// Its peer ID.
    pub peer_id: Arc<str>,
    /// Its announced address.
    pub address: PeerAddress,
    /// Time of its last announce, in milliseconds since 1970.
    pub last_seen_ms: u64,
    /// Its reputation.
    pub reputation: Reputation,
}

/// Result of [`TrackerTable::announce`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AnnounceOutcome {
    /// Timestamp of the peer's filter in the table, in milliseconds since 1970.
    pub filter: Option<u64>,
    /// Whether this is the bound ID's first announce today. False for IDs that the table did not
    /// know.
    pub first_today: bool,
    /// Whether the address has changed, or the peer is new.
    pub has_moved: bool,
    /// Result of the last reachability test; `None` if there was none.
    pub reachable: Option<bool>,
    /// Whether the address is to be tested now.
    pub needs_reach_test: bool,
    /// Address of another machine that announces itself with the same identity.
    pub also_at: Option<IpAddr>,
}

/// Sizes of the table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TableCounts {
    /// Peers in the table.
    pub peers: usize,
    /// Peers with a filter.
    pub with_filter: usize,
    /// Memory of the filters in bytes.
    pub filter_bytes: usize,
}

/// What the table's lock protects.
struct TableState {
    peers: Peers,
    identities: Identities,
}

/// The table of live peers. Shared by all threads.
pub struct TrackerTable {
    state: RwLock<TableState>,
    bloom_index: BloomIndex,
}

impl TrackerTable {
    /// Creates the empty table of a tracker that starts now, with at most `filter_memory` bytes of
    /// filters.
    pub fn new(now: TrackerTime, filter_memory: usize) -> Self {
        let state = TableState { peers: Peers::default(), identities: Identities::new(now) };
        TrackerTable { state: RwLock::new(state), bloom_index: BloomIndex::new(filter_memory) }
    }

    /// Adds a peer that was live when the tracker stopped. Its next signed request must be later
    /// than this start, so that nobody can replay its old ones.
    pub fn restore(&self, persisted: PersistedPeer, now: TrackerTime) {
        let (editor, mut state) = (self.bloom_index.edit(), self.state.write());
        let TableState { peers, identities } = &mut *state;
        if peers.is_full() {
            return;
        }
        let id: Arc<str> = persisted.id.into();
        let slot = peers.insert(id.clone(), persisted.address, persisted.reputation, now);
        let Some(key) = persisted.key else { return };
        identities.restore(id, key, now);
        let filter = persisted
            .filter
            .and_then(|(timestamp, bits)| Some((timestamp, BloomFilter::parse(bits).ok()?)));
        if let Some((timestamp, filter)) = filter
            && let Some(place) = editor.set(slot, None, filter)
        {
            // No publication time, so the node may replace the filter at once.
            peers.change(slot, |peer| {
                peer.published = Some(PublishedFilter { place, timestamp, at: None })
            });
        }
    }

    /// Bits for each path that new filters should have. It decreases from half of the memory limit
    /// on.
    pub fn bits_per_path(&self) -> u64 {
        match self.bloom_index.eighths_used() {
            0..4 => MAX_BITS_PER_PATH,
            4..6 => 16,
            6 => 12,
            _ => MIN_BITS_PER_PATH,
        }
    }

    /// Records the result of a reachability test, unless the peer's address has changed since.
    pub fn set_reachable(&self, id: &str, at: (&str, u16), reachable: bool) {
        let peers = &mut self.state.write().peers;
        if let Some((slot, peer)) = peers.peer(id)
            && (&*peer.address.addr, peer.address.port) == at
        {
            peers.change(slot, |peer| peer.reachability.reachable = Some(reachable));
        }
    }

    /// Returns true if the peer is in the table, even if it has expired and is not swept yet.
    pub fn contains(&self, id: &str) -> bool {
        self.state.read().peers.contains(id)
    }

    /// Checks everything about a request that does not need its signature. Returns true if the peer
    /// is live and the database need not be asked about it.
    ///
    /// # Errors
    /// Returns why the request is refused.
    pub fn check(
        &self,
        id: &str,
        claim: Option<&Claim>,
        now: TrackerTime,
    ) -> Result<bool, ClaimRefusal> {
        let TableState { peers, identities } = &*self.state.read();
        identities.check(id, claim, now)?;
        let is_live = peers.live_peer(id, now.at).is_some();
        Ok(is_live && (claim.is_none() || identities.contains(id)))
    }

    /// Adds or renews a peer. The caller has checked the claim's signature and that the ID is bound
    /// to its key. `stored_reputation` is the reputation in the database, if that was asked.
    ///
    /// # Errors
    /// Returns why the announce is refused. The table is then unchanged.
    pub fn announce(
        &self,
        id: &str,
        address: PeerAddress,
        claim: Option<&Claim>,
        instance: Option<u64>,
        stored_reputation: Option<Reputation>,
        now: TrackerTime,
    ) -> Result<AnnounceOutcome, ClaimRefusal> {
        let TableState { peers, identities } = &mut *self.state.write();
        let present = peers.peer(id);
        if present.is_none() && peers.is_full() {
            return Err(ClaimRefusal::Full);
        }
        identities.record(id, claim, now, || {
            present.map_or_else(|| id.into(), |(_, peer)| peer.id.clone())
        })?;
        let first_today = identities.record_day(id, now);
        let is_new = present.is_none();
        let slot = match present {
            Some((slot, _)) => slot,
            None => {
                let id = identities.shared_id(id).unwrap_or_else(|| id.into());
                peers.insert(id, address.clone(), Reputation::default(), now)
            }
        };
        let mut outcome = AnnounceOutcome { first_today, ..AnnounceOutcome::default() };
        peers.change(slot, |peer| {
            let is_elsewhere = peer.address != address;
            outcome.has_moved = is_new || is_elsewhere;
            outcome.also_at = peer.instances.record(instance, now.at).then_some(peer.address.from);
            if is_elsewhere {
                peer.reachability = Reachability::default();
            }
            (peer.address, peer.last_seen_ms, peer.expires) =
                (address, now.ms, now.at + PEER_TTL.get());
            peer.reputation = peer.reputation.newer(stored_reputation.unwrap_or_default());
            outcome.needs_reach_test = peer.reachability.request_due_test(now.at);
            outcome.reachable = peer.reachability.reachable;
            outcome.filter = peer.published.as_ref().map(|published| published.timestamp);
        });
        Ok(outcome)
    }

    /// Stores the time of a signed request that changes nothing else in the table, if the ID is
    /// known.
    ///
    /// # Errors
    /// Returns why the request is refused. The table is then unchanged.
    pub fn record_known_claim(
        &self,
        id: &str,
        claim: &Claim,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        let identities = &mut self.state.write().identities;
        if identities.contains(id) {
            identities.record(id, Some(claim), now, || id.into())
        } else {
            Ok(())
        }
    }

    /// Removes a peer. The caller has checked the claim's signature.
    ///
    /// # Errors
    /// Returns why the request is refused. The table is then unchanged.
    pub fn leave(
        &self,
        id: &str,
        claim: Option<&Claim>,
        from: IpAddr,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        let editor = self.bloom_index.edit();
        let TableState { peers, identities } = &mut *self.state.write();
        let (slot, peer) = peers.live_peer(id, now.at).ok_or(ClaimRefusal::NotHere)?;
        if claim.is_none() && peer.address.from != from {
            identities.check(id, claim, now)?;
            return Err(ClaimRefusal::OtherAddress);
        }
        if claim.is_some() && !identities.contains(id) {
            return Err(ClaimRefusal::OtherKey);
        }
        identities.record(id, claim, now, || id.into())?;
        if let Some(published) = peers.remove(slot).and_then(|peer| peer.published) {
            editor.remove(slot, published.place);
        }
        Ok(())
    }

    /// Checks that a peer may publish a filter now, provided that its signature is valid.
    ///
    /// # Errors
    /// Returns why it may not.
    pub fn may_publish(
        &self,
        id: &str,
        claim: &Claim,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        let TableState { peers, identities } = &*self.state.read();
        let (_, peer) = peers.live_peer(id, now.at).ok_or(ClaimRefusal::NotHere)?;
        if !identities.contains(id) {
            return Err(ClaimRefusal::NotHere);
        }
        identities.check(id, Some(claim), now)?;
        match peer.published.as_ref().and_then(|published| published.time_to_next(now.at)) {
            Some(wait) => Err(ClaimRefusal::TooSoon(wait)),
            None => Ok(()),
        }
    }

    /// Stores a peer's filter. The caller has checked the claim's signature.
    ///
    /// # Errors
    /// Returns why the filter is refused. The table is then unchanged.
    pub fn publish(
        &self,
        id: &str,
        claim: &Claim,
        filter: BloomFilter,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        // While this is held, no peer is removed and no other filter is published.
        let editor = self.bloom_index.edit();
        self.may_publish(id, claim, now)?;
        let (slot, last) = {
            let peers = &self.state.read().peers;
            let (slot, peer) = peers.peer(id).ok_or(ClaimRefusal::NotHere)?;
            (slot, peer.published.as_ref().map(|published| published.place))
        };
        let place = editor.set(slot, last, filter).ok_or(ClaimRefusal::Full)?;
        let TableState { peers, identities } = &mut *self.state.write();
        let published = PublishedFilter { place, timestamp: claim.timestamp, at: Some(now.at) };
        peers.change(slot, |peer| peer.published = Some(published));
        identities.record_filter_time(id, claim.timestamp);
        Ok(())
    }

    /// Updates the reputation of a live peer after a transfer. Older counts are ignored.
    pub fn set_reputation(&self, id: &str, reputation: Reputation) {
        let peers = &mut self.state.write().peers;
        if let Some((slot, _)) = peers.peer(id) {
            peers.change(slot, |peer| peer.reputation = peer.reputation.newer(reputation));
        }
    }

    /// Returns the peers that may have a path, best first, with networks taking turns.
    pub fn lookup(&self, hash_part: &HashPart, now: TrackerTime) -> CandidateList {
        let found = self.bloom_index.find(hash_part);
        let (salt, turn) = hash_part.prefixes();
        let peers = &self.state.read().peers;
        CandidateList {
            candidates: candidates::with_path(peers, found, salt, now.at),
            others: candidates::others(peers, turn, now.at),
        }
    }

    /// Returns the best `max` live peers.
    pub fn best_peers(&self, max: usize, now: TrackerTime) -> Vec<PeerRow> {
        let peers = &self.state.read().peers;
        let best = peers.ranked.iter().filter_map(|rank| peers.live_peer_in(rank.slot, now.at));
        best.take(max)
            .map(|peer| PeerRow {
                peer_id: peer.id.clone(),
                address: peer.address.clone(),
                last_seen_ms: peer.last_seen_ms,
                reputation: peer.reputation,
            })
            .collect()
    }

    /// Removes expired peers, and IDs whose last signed request can no longer be replayed. Returns
    /// the IDs of the removed peers.
    pub fn sweep(&self, now: TrackerTime) -> Vec<Arc<str>> {
        let mut ids = Vec::new();
        let expired = self.state.read().peers.expired(now.at);
        // In chunks, so that lookups are not blocked for long.
        for slots in expired.chunks(256) {
            let editor = self.bloom_index.edit();
            let peers = &mut self.state.write().peers;
            for slot in slots {
                // The peer may have announced itself since.
                if peers.live_peer_in(*slot, now.at).is_some() {
                    continue;
                }
                let Some(peer) = peers.remove(*slot) else { continue };
                ids.push(peer.id);
                if let Some(published) = peer.published {
                    editor.remove(*slot, published.place);
                }
            }
        }
        let TableState { peers, identities } = &mut *self.state.write();
        identities.sweep(now, |id| peers.contains(id));
        ids
    }

    /// The sizes of the table.
    pub fn counts(&self) -> TableCounts {
        let peers = &self.state.read().peers;
        TableCounts {
            peers: peers.len(),
            with_filter: peers.with_filter(),
            filter_bytes: self.bloom_index.bytes(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::identities::CLOCK_SKEW_MS;
    use super::peer::{FILTER_INTERVAL, REACH_RETRY_INTERVAL, REACH_TEST_INTERVAL};
    use super::*;
    use peerix::nix::nix32;
    use peerix::wire::tracker::{Candidate, MAX_CANDIDATES, MAX_OTHERS};
    use std::collections::BTreeSet;
    use std::time::{Duration, Instant};

    /// The start time of all tests, on both clocks.
    fn start() -> TrackerTime {
        TrackerTime { at: Instant::now(), ms: 1_800_000_000_000 }
    }

    fn after(start: TrackerTime, seconds: u64) -> TrackerTime {
        TrackerTime { at: start.at + Duration::from_secs(seconds), ms: start.ms + seconds * 1000 }
    }

    fn from(network: u8, last: u8) -> PeerAddress {
        let ip = IpAddr::from([10, 0, network, last]);
        PeerAddress { addr: ip.to_string(), port: 1, from: ip }
    }

    fn by(key: u8, now: TrackerTime) -> Claim {
        Claim { key: [key; 32], timestamp: now.ms }
    }

    fn at(port: u16) -> PeerAddress {
        PeerAddress { addr: "10.0.0.1".into(), port, from: IpAddr::from([10, 0, 0, 1]) }
    }

    fn part(i: u64) -> HashPart {
        let digest = ring::digest::digest(&ring::digest::SHA256, &i.to_le_bytes());
        HashPart::parse(nix32::encode(&digest.as_ref()[..20]).as_bytes()).unwrap()
    }

    fn filter(path: u64) -> BloomFilter {
        let mut filter = BloomFilter::for_paths(100);
        filter.insert(&part(path));
        filter
    }

    fn good(successful: u64) -> Reputation {
        Reputation { shared: 1_000_000, successful, ..Reputation::default() }
    }

    fn names(candidates: &[Candidate]) -> Vec<&str> {
        candidates.iter().map(|candidate| candidate.peer_id.as_str()).collect()
    }

    fn others(table: &TrackerTable, path: u64, now: TrackerTime) -> Vec<String> {
        table.lookup(&part(path), now).others.into_iter().map(|other| other.peer_id).collect()
    }

    #[test]
    fn peer_expires_after_two_minutes_with_its_filter() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        table.announce("filtered", at(1), Some(&by(1, start)), None, None, start).unwrap();
        table.announce("plain", at(2), None, None, None, start).unwrap();
        table.publish("filtered", &by(1, after(start, 1)), filter(7), after(start, 1)).unwrap();
        let last = after(start, 119);
        assert_eq!(names(&table.lookup(&part(7), last).candidates), ["filtered"]);
        assert_eq!(others(&table, 7, last), ["plain"]);
        table.announce("plain", at(2), None, None, None, last).unwrap();
        // Expired peers are invisible before and after the sweep.
        let over = after(start, 120);
        for _ in 0..2 {
            assert_eq!(names(&table.lookup(&part(7), over).candidates), [""; 0]);
            assert_eq!(others(&table, 7, over), ["plain"]);
            assert_eq!(table.best_peers(9, over).len(), 1);
            assert_eq!(
                table.may_publish("filtered", &by(1, over), over),
                Err(ClaimRefusal::NotHere)
            );
            table.sweep(over);
        }
        assert_eq!(table.counts(), TableCounts { peers: 1, with_filter: 0, filter_bytes: 0 });
        // A new peer in the freed slot does not inherit the filter.
        table.announce("new", at(3), None, None, None, over).unwrap();
        assert_eq!(names(&table.lookup(&part(7), over).candidates), [""; 0]);
    }

    #[test]
    fn announce_replayed_after_expiry_is_refused() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        // The node's clock is fast, so the request stays in the allowed range for the longest time.
        let said = by(1, after(start, 299));
        table.announce("a", at(1), Some(&said), None, None, start).unwrap();
        let mut seconds = 0;
        while seconds < 700 {
            seconds += 5;
            let now = after(start, seconds);
            table.sweep(now);
            if seconds > PEER_TTL.get().as_secs() {
                assert_eq!(table.counts().peers, 0);
            }
            let again = table.announce("a", at(1), Some(&said), None, None, now);
            assert!(
                matches!(again, Err(ClaimRefusal::Time { .. })),
                "after {seconds} s: {again:?}"
            );
        }
        assert!(!table.state.read().identities.contains("a"), "and then it is forgotten");
    }

    #[test]
    fn request_with_wrong_time_or_key_is_refused() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let now = after(start, 1000);
        let time = |timestamp: u64| table.check("a", Some(&Claim { key: [1; 32], timestamp }), now);
        assert!(time(now.ms - CLOCK_SKEW_MS).is_ok() && time(now.ms + CLOCK_SKEW_MS).is_ok());
        for wrong in [0, now.ms - CLOCK_SKEW_MS - 1, now.ms + CLOCK_SKEW_MS + 1, u64::MAX] {
            assert!(matches!(time(wrong), Err(ClaimRefusal::Time { .. })), "{wrong}");
        }
        table.announce("a", at(1), Some(&by(1, now)), None, None, now).unwrap();
        assert!(matches!(time(now.ms), Err(ClaimRefusal::Time { .. })));
        assert_eq!(time(now.ms + 1), Ok(true));
        assert_eq!(table.check("a", None, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.announce("a", at(9), None, None, None, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.check("a", Some(&by(2, after(now, 1))), now), Err(ClaimRefusal::OtherKey));
        assert_eq!(table.leave("a", None, at(1).from, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.best_peers(1, now)[0].address, at(1));
        // A former process may have accepted requests from before this start.
        let young = TrackerTable::new(now, 1 << 30);
        let before = Claim { key: [1; 32], timestamp: now.ms - 1 };
        assert!(matches!(young.check("a", Some(&before), now), Err(ClaimRefusal::Time { .. })));
    }

    /// The machine starts with a wrong clock, and a time service then sets it.
    #[test]
    fn announce_after_clock_change_is_accepted() {
        for wrong_by in [-7_200_000i64, 7_200_000] {
            let right = start();
            let wrong = |now: TrackerTime| TrackerTime {
                ms: now.ms.saturating_add_signed(wrong_by),
                ..now
            };
            let table = TrackerTable::new(wrong(right), 1 << 30);
            // Nodes use the tracker's clock, even if it is wrong.
            let early = wrong(after(right, 10));
            table.announce("a", at(1), Some(&by(1, early)), None, None, early).unwrap();
            let set = after(right, 20);
            table.announce("a", at(1), Some(&by(1, set)), None, None, set).unwrap();
            let again = table.announce("a", at(1), Some(&by(1, set)), None, None, set);
            assert!(matches!(again, Err(ClaimRefusal::Time { .. })), "{again:?}");
            let before = Claim { key: [1; 32], timestamp: right.ms - 1 };
            assert!(matches!(table.check("b", Some(&before), set), Err(ClaimRefusal::Time { .. })));
        }
    }

    #[test]
    fn leave_without_right_address_or_signature_is_refused() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let elsewhere = IpAddr::from([10, 0, 0, 2]);
        table.announce("plain", at(1), None, None, None, start).unwrap();
        assert_eq!(table.leave("plain", None, elsewhere, start), Err(ClaimRefusal::OtherAddress));
        assert_eq!(
            table.leave("plain", Some(&by(1, start)), at(1).from, start),
            Err(ClaimRefusal::OtherKey)
        );
        assert_eq!(table.leave("plain", None, at(1).from, start), Ok(()));
        assert_eq!(table.leave("plain", None, at(1).from, start), Err(ClaimRefusal::NotHere));
        table.announce("keyed", at(1), Some(&by(1, start)), None, None, start).unwrap();
        let later = after(start, 1);
        table.publish("keyed", &by(1, later), filter(1), later).unwrap();
        assert!(matches!(
            table.leave("keyed", Some(&by(1, later)), elsewhere, later),
            Err(ClaimRefusal::Time { .. })
        ));
        let later = after(start, 2);
        assert_eq!(table.leave("keyed", Some(&by(1, later)), elsewhere, later), Ok(()));
        assert_eq!(table.counts(), TableCounts::default());
    }

    #[test]
    fn publish_within_interval_is_refused() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        table.announce("a", at(1), Some(&by(1, start)), None, None, start).unwrap();
        let publish = |seconds: u64| {
            let now = after(start, seconds);
            table.publish("a", &by(1, now), filter(seconds), now)
        };
        assert_eq!(publish(1), Ok(()));
        assert_eq!(
            publish(2),
            Err(ClaimRefusal::TooSoon(FILTER_INTERVAL.get() - Duration::from_secs(1)))
        );
        assert_eq!(publish(26), Ok(()));
        let now = after(start, 27);
        assert_eq!(names(&table.lookup(&part(26), now).candidates), ["a"]);
        assert_eq!(names(&table.lookup(&part(1), now).candidates), [""; 0]);
        let outcome = table.announce("a", at(1), Some(&by(1, now)), None, None, now).unwrap();
        assert_eq!(outcome.filter, Some(after(start, 26).ms));
    }

    #[test]
    fn lookup_lists_best_peers_first_and_rotates_others() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        for n in 0..200u64 {
            let reputation = if n < 100 { good(n) } else { Reputation::default() };
            table.announce(&format!("{n}"), at(1), None, None, Some(reputation), start).unwrap();
        }
        let listed = |max| {
            table
                .best_peers(max, start)
                .iter()
                .map(|row| row.peer_id.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(listed(3), ["99", "98", "97"]);
        assert_eq!(listed(1000).len(), 200);
        assert_eq!(listed(1000)[99..102], ["0", "100", "101"], "then those who came first");
        let mut seen = BTreeSet::new();
        for path in 0..2000 {
            let others = others(&table, path, start);
            assert_eq!(others.len(), MAX_OTHERS);
            assert_eq!(others[..3], ["99", "98", "97"]);
            seen.extend(others);
        }
        assert_eq!(seen.len(), 200, "everybody is named for some path");
        table.set_reputation("150", good(1_000_000));
        assert_eq!(listed(1), ["150"]);
        // Updates that arrive late are ignored.
        table.set_reputation("150", good(5));
        assert_eq!(listed(1), ["150"]);
        let sizes = || {
            let peers = &table.state.read().peers;
            (peers.ranked.len(), peers.others.len(), peers.turns.len())
        };
        assert_eq!(sizes(), (200, 200, 200));
        table.sweep(after(start, 120));
        assert_eq!(sizes(), (0, 0, 0));
    }

    #[test]
    fn lookup_with_many_candidates_returns_best() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        for n in 0..100u64 {
            let (id, now) = (format!("{n}"), after(start, 1));
            table.announce(&id, at(1), Some(&by(1, start)), None, Some(good(n)), start).unwrap();
            table.publish(&id, &by(1, now), filter(7), now).unwrap();
        }
        let found = table.lookup(&part(7), after(start, 2)).candidates;
        let best: Vec<String> =
            (0..100).rev().take(MAX_CANDIDATES).map(|n| n.to_string()).collect();
        assert_eq!(names(&found), best);
        assert!(found.is_sorted_by(|a, b| a.score >= b.score));
    }

    /// 64 invented peers of one network, with any reputation, must not hide the peer that has the
    /// path.
    #[test]
    fn invented_peers_of_one_network_do_not_hide_another() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let join = |id: &str, at: PeerAddress, reputation| {
            let now = after(start, 1);
            table.announce(id, at, Some(&by(1, start)), None, Some(reputation), start).unwrap();
            table.publish(id, &by(1, now), filter(7), now).unwrap();
        };
        for n in 0..200u8 {
            join(&format!("invented{n}"), from(1, n), good(1000));
        }
        join("honest", from(2, 1), Reputation::default());
        let now = after(start, 2);
        let found = || table.lookup(&part(7), now).candidates;
        assert_eq!(found().len(), MAX_CANDIDATES);
        assert_eq!(names(&found())[1], "honest", "each network has one before any has two");
        // A reachable peer precedes all others.
        table.set_reachable("honest", ("10.0.2.1", 1), true);
        assert_eq!(names(&found())[0], "honest");
        table.set_reachable("honest", ("10.0.2.1", 2), false);
        assert_eq!(names(&found())[0], "honest", "that was said of another port");
        // An unreachable peer is listed only if there is room.
        table.set_reachable("honest", ("10.0.2.1", 1), false);
        assert!(!names(&found()).contains(&"honest"));
        for n in 1..200u8 {
            table.leave(&format!("invented{n}"), Some(&by(1, now)), from(1, n).from, now).unwrap();
        }
        assert_eq!(names(&found()), ["invented0", "honest"]);
    }

    #[test]
    fn invented_peers_without_filters_do_not_hide_others() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        for n in 0..250u8 {
            table
                .announce(&format!("invented{n}"), from(1, n), None, None, Some(good(9)), start)
                .unwrap();
        }
        for network in 2..5 {
            table
                .announce(&format!("honest{network}"), from(network, 1), None, None, None, start)
                .unwrap();
        }
        table.announce("last", from(1, 251), None, None, None, start).unwrap();
        for path in 0..100 {
            let named = others(&table, path, start);
            assert_eq!(named.len(), MAX_OTHERS);
            assert!((2..5).all(|network| named.contains(&format!("honest{network}"))), "{named:?}");
        }
    }

    #[test]
    fn alternating_instances_are_reported_and_restart_is_not() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let announce = |instance, last, seconds| {
            let now = after(start, seconds);
            table
                .announce("a", from(1, last), Some(&by(1, now)), Some(instance), None, now)
                .unwrap()
                .also_at
        };
        assert_eq!(announce(7, 1, 0), None);
        assert_eq!(announce(8, 1, 10), None, "a restart");
        assert_eq!(announce(8, 1, 70), None);
        assert_eq!(announce(9, 2, 80), None, "it may be a restart elsewhere");
        assert_eq!(announce(8, 1, 130), Some(from(1, 2).from), "which does not come back");
        assert_eq!(announce(9, 2, 140), Some(from(1, 1).from));
        // One of the machines is switched off.
        assert_eq!(announce(9, 2, 200), None);
        assert_eq!(announce(8, 1, 1000), None, "and on again, long after");
    }

    #[test]
    fn three_machines_with_one_identity_are_reported() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        for minute in 0..4 {
            for machine in 1..=3 {
                let now = after(start, minute * 60 + u64::from(machine));
                let claim = by(1, now);
                let instance = Some(machine.into());
                let outcome = table
                    .announce("a", from(1, machine), Some(&claim), instance, None, now)
                    .unwrap();
                let other = from(1, (machine + 1) % 3 + 1).from;
                assert_eq!(outcome.also_at, (minute > 0).then_some(other));
            }
        }
        let now = after(start, 300);
        for instance in 4..1000 {
            let now = after(now, instance);
            let claim = by(1, now);
            table.announce("a", at(1), Some(&claim), Some(instance), None, now).unwrap();
        }
        let capacity =
            || table.state.read().peers.peer("a").unwrap().1.instances.replaced.capacity();
        assert!((1..=4).contains(&capacity()), "{} entries", capacity());
        // The peer lives on, and its entries expire.
        for seconds in [1099, 1199, 1299] {
            let now = after(now, seconds);
            table.announce("a", at(1), Some(&by(1, now)), Some(999), None, now).unwrap();
        }
        assert_eq!(capacity(), 0);
    }

    #[test]
    fn peer_is_tested_when_new_or_moved_and_at_intervals() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let announce = |last, seconds| {
            let now = after(start, seconds);
            let outcome =
                table.announce("a", from(1, last), Some(&by(1, now)), None, None, now).unwrap();
            (outcome.has_moved, outcome.needs_reach_test, outcome.reachable)
        };
        assert_eq!(announce(1, 0), (true, true, None));
        assert_eq!(announce(1, 5), (false, false, None));
        table.set_reachable("a", ("10.0.1.1", 1), true);
        assert_eq!(announce(1, 60), (false, false, Some(true)));
        assert_eq!(announce(2, 61), (true, true, None), "it is somewhere else");
        let later = 61 + REACH_RETRY_INTERVAL.get().as_secs();
        let mut seconds = 61;
        while seconds + 60 < later {
            seconds += 60;
            assert!(!announce(2, seconds).1);
        }
        assert!(announce(2, later).1);
        table.set_reachable("a", ("10.0.1.2", 1), true);
        let mut seconds = later;
        while seconds + 60 < later + REACH_TEST_INTERVAL.get().as_secs() {
            seconds += 60;
            assert!(!announce(2, seconds).1);
        }
    }

    #[test]
    fn restored_peer_keeps_filter_and_refuses_replays() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let bits = filter(7).as_bytes().to_vec();
        let present = |id: &str, key| PersistedPeer {
            id: id.into(),
            address: from(1, 1),
            key,
            reputation: good(3),
            filter: Some((5, bits.clone())),
        };
        table.restore(present("a", Some([1; 32])), start);
        table.restore(
            PersistedPeer { filter: Some((5, vec![1; 7])), ..present("damaged", Some([2; 32])) },
            start,
        );
        table.restore(PersistedPeer { filter: None, ..present("plain", None) }, start);
        assert_eq!(names(&table.lookup(&part(7), start).candidates), ["a"]);
        assert_eq!(table.counts().peers, 3);
        let before = Claim { key: [1; 32], timestamp: start.ms - 1 };
        assert!(matches!(table.check("a", Some(&before), start), Err(ClaimRefusal::Time { .. })));
        assert_eq!(table.check("a", None, start), Err(ClaimRefusal::Bound));
        assert_eq!(table.check("a", Some(&by(2, start)), start), Err(ClaimRefusal::OtherKey));
        let now = after(start, 1);
        assert_eq!(table.may_publish("a", &by(1, now), now), Ok(()));
        let outcome = table.announce("a", from(1, 1), Some(&by(1, now)), None, None, now).unwrap();
        assert_eq!((outcome.filter, outcome.has_moved), (Some(5), false));
        let gone = table.sweep(after(start, 120));
        assert_eq!(
            gone.iter().map(|id| &**id).collect::<BTreeSet<_>>(),
            BTreeSet::from(["damaged", "plain"])
        );
    }

    #[test]
    fn bits_per_path_decreases_with_used_memory() {
        let start = start();
        let block = 8 * filter(0).len_bits() as usize;
        for (blocks, wanted) in [(100, 20), (2, 16), (1, 10)] {
            let table = TrackerTable::new(start, blocks * block);
            assert_eq!(table.bits_per_path(), MAX_BITS_PER_PATH);
            table.announce("a", at(1), Some(&by(1, start)), None, None, start).unwrap();
            let now = after(start, 1);
            table.publish("a", &by(1, now), filter(1), now).unwrap();
            assert_eq!(table.bits_per_path(), wanted, "one of {blocks} blocks is used");
        }
    }
}
