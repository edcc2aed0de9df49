//! The live peers: their addresses, filters, reputations, and the times of their last signed
//! requests. All in memory. No I/O; the time is passed in.

use crate::address;
use crate::bloom_index::{BloomIndex, FilterPlace};
use crate::clock::TrackerTime;
use crate::reputation::Reputation;
use peerix::lock::RwLock;
use peerix::nix::HashPart;
use peerix::time_scale::{Interval, Timeout};
use peerix::wire::filter::{BloomFilter, MAX_BITS_PER_PATH, MIN_BITS_PER_PATH};
use peerix::wire::tracker::{Candidate, CandidateList, MAX_CANDIDATES, MAX_OTHERS};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Lifetime of an announce, as in the original. Peers announce themselves every 60 s.
pub const PEER_TTL: Timeout = Timeout::from_secs(120);

/// Maximum number of peers, about 150 MB without their filters. At the bound, new peers are
/// refused.
pub const MAX_PEERS: usize = 262_144;

/// Maximum number of bound IDs in memory: live ones, and those whose last signed request could
/// still be replayed. At the bound, signed requests of further IDs are refused.
const MAX_KNOWN_IDENTITIES: usize = 2 * MAX_PEERS;

/// Maximum difference in milliseconds between a signed request's time and the tracker's clock.
/// Machines without a time service drift by less in a month, and refusals contain the tracker's
/// time. Requests beyond the bound are refused.
pub const CLOCK_SKEW_MS: u64 = 5 * 60 * 1000;

/// Interval between reachability tests of a peer that was reached: 28 tests a second for 100,000
/// peers. A changed address is tested at once.
const REACH_TEST_INTERVAL: Interval = Interval::from_secs(3600);
/// Interval between reachability tests of a peer that was not reached, or whose test was skipped.
const REACH_RETRY_INTERVAL: Interval = Interval::from_secs(600);

/// Maximum number of peers without a filter that a lookup examines for networks that it does not
/// list yet.
const MAX_EXAMINED: usize = 256;

/// Milliseconds of a day. The database is told once a day that an ID is in use.
const DAY_MS: u64 = 24 * 3600 * 1000;

/// Minimum interval between two filters of a peer; earlier ones are refused. Nodes wait 30 s, which
/// the network's delays may shorten.
pub const FILTER_INTERVAL: Interval = Interval::from_secs(25);

/// Number of best peers among those without a filter in an answer. The other places rotate, so that
/// new peers without reputation are asked, too.
const BEST_OTHERS: usize = MAX_OTHERS / 2;

/// Maximum number of earlier instances that are remembered of one peer. Of more machines with one
/// identity that announce themselves in turn, none is noticed. The least that a queue allocates;
/// anybody can fill it for all peers.
const MAX_REPLACED: usize = 4;

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
    /// The request's time is out of range, for this reason.
    Time(&'static str),
    /// The peer is not live, or has no key.
    NotHere,
    /// The request is not signed, and came from another address than the announce.
    OtherAddress,
    /// Too soon after the last filter; the time left to wait.
    TooSoon(Duration),
    /// A table or the filter memory is full.
    Full,
}

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

struct PublishedFilter {
    place: FilterPlace,
    timestamp: u64,
    /// When the filter was published; `None` if that was before the tracker's start.
    at: Option<Instant>,
}

struct PeerEntry {
    id: Arc<str>,
    address: PeerAddress,
    last_seen_ms: u64,
    expires: Instant,
    reputation: Reputation,
    /// Sequence number; newer peers have greater ones.
    sequence: u64,
    published: Option<PublishedFilter>,
    reachable: Option<bool>,
    last_reach_test: Option<Instant>,
    /// Random number of the node's start, from its last announce.
    instance: Option<u64>,
    /// Earlier instances and when another one replaced each, the latest last.
    replaced: VecDeque<(u64, Instant)>,
}

impl PeerEntry {
    fn new(id: Arc<str>, address: PeerAddress, sequence: u64, now: TrackerTime) -> PeerEntry {
        PeerEntry {
            id,
            address,
            last_seen_ms: now.ms,
            expires: now.at + PEER_TTL.get(),
            reputation: Reputation::default(),
            sequence,
            published: None,
            reachable: None,
            last_reach_test: None,
            instance: None,
            replaced: VecDeque::new(),
        }
    }

    /// Sort key: reachable peers first, then the best score, then the oldest peer.
    fn rank(&self, slot: u32) -> CandidateRank {
        // Non-negative floats sort like their bits.
        (self.class(), !self.reputation.score().to_bits(), self.sequence, slot)
    }

    /// Reachable peers sort before untested ones, and those before unreachable ones.
    fn class(&self) -> u8 {
        match self.reachable {
            Some(true) => 0,
            None => 1,
            Some(false) => 2,
        }
    }

    /// The network of the announced IP address, or of the announce's source if a host name was
    /// announced.
    fn network(&self) -> u128 {
        address::network(self.address.addr.parse().unwrap_or(self.address.from))
    }

    /// Records the instance of an announce. Returns the address of another machine with the same
    /// identity if this instance was replaced before: after a restart, the old instance does not
    /// come back.
    fn record_instance(&mut self, instance: Option<u64>, now: Instant) -> Option<IpAddr> {
        let instance = instance?;
        self.replaced.retain(|(_, at)| now < *at + 2 * PEER_TTL.get());
        if self.replaced.is_empty() {
            self.replaced.shrink_to_fit();
        }
        let last = self.instance.replace(instance).filter(|last| *last != instance)?;
        let is_back = self.replaced.iter().any(|(id, _)| *id == instance);
        self.replaced.retain(|(id, _)| *id != instance);
        if self.replaced.len() >= MAX_REPLACED {
            self.replaced.pop_front();
        }
        self.replaced.push_back((last, now));
        is_back.then_some(self.address.from)
    }

    fn candidate(&self) -> Candidate {
        Candidate {
            peer_id: self.id.to_string(),
            addr: self.address.addr.clone(),
            port: self.address.port,
            score: self.reputation.rounded_score(),
        }
    }
}

type CandidateRank = (u8, u64, u64, u32);

/// A bound ID, known from a signed request.
#[derive(Debug, Clone, Copy)]
struct BoundIdentity {
    key: [u8; 32],
    /// Time of its last signed request, in milliseconds since 1970.
    timestamp: u64,
    /// The last day, counted from 1970, on which the database was told that the ID is in use.
    day: u64,
}

#[derive(Default)]
struct Peers {
    slots: Vec<Option<PeerEntry>>,
    free: Vec<u32>,
    by_id: HashMap<Arc<str>, u32>,
    identities: HashMap<Arc<str>, BoundIdentity>,
    /// All peers, best first.
    ranked: BTreeSet<CandidateRank>,
    /// Peers without a filter, best first.
    others: BTreeSet<CandidateRank>,
    /// Peers without a filter by sequence number, the order in which they take turns.
    turns: BTreeMap<u64, u32>,
    with_filter: usize,
    next_sequence: u64,
}

impl Peers {
    fn peer(&self, id: &str) -> Option<(u32, &PeerEntry)> {
        let slot = *self.by_id.get(id)?;
        Some((slot, self.slots.get(slot as usize)?.as_ref()?))
    }

    fn live(&self, slot: u32, now: Instant) -> Option<&PeerEntry> {
        self.slots.get(slot as usize)?.as_ref().filter(|peer| peer.expires > now)
    }

    /// Changes a peer, and updates the sorted sets and counts.
    fn change(&mut self, slot: u32, change: impl FnOnce(&mut PeerEntry)) {
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
            self.turns.remove(&old.2);
            if !has_filter {
                self.others.insert(new);
                self.turns.insert(new.2, slot);
            }
        }
        self.with_filter = self.with_filter + usize::from(has_filter) - usize::from(had_filter);
    }

    fn insert(&mut self, peer: PeerEntry) -> Result<u32, ClaimRefusal> {
        if self.by_id.len() >= MAX_PEERS {
            return Err(ClaimRefusal::Full);
        }
        let slot = self.free.pop().unwrap_or(self.slots.len() as u32);
        if slot as usize == self.slots.len() {
            self.slots.push(None);
        }
        self.by_id.insert(peer.id.clone(), slot);
        self.ranked.insert(peer.rank(slot));
        self.others.insert(peer.rank(slot));
        self.turns.insert(peer.sequence, slot);
        self.slots[slot as usize] = Some(peer);
        Ok(slot)
    }

    fn remove(&mut self, slot: u32) -> Option<PeerEntry> {
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

/// The table of live peers. Shared by all threads.
pub struct TrackerTable {
    /// Signed requests from before this time are refused, as a former process may have accepted
    /// them.
    start: TrackerTime,
    peers: RwLock<Peers>,
    bloom_index: BloomIndex,
}

impl TrackerTable {
    /// Creates an empty table with at most `filter_memory` bytes of filters.
    pub fn new(now: TrackerTime, filter_memory: usize) -> Self {
        TrackerTable {
            start: now,
            peers: RwLock::default(),
            bloom_index: BloomIndex::new(filter_memory),
        }
    }

    /// Adds a peer that was live when the tracker stopped. Its next signed request must be later
    /// than this start, so that nobody can replay its old ones.
    pub fn restore(&self, persisted: PersistedPeer, now: TrackerTime) {
        let (editor, mut peers) = (self.bloom_index.edit(), self.peers.write());
        let id: Arc<str> = persisted.id.into();
        let peer = PeerEntry::new(id.clone(), persisted.address, peers.next_sequence, now);
        let Ok(slot) = peers.insert(PeerEntry { reputation: persisted.reputation, ..peer }) else {
            return;
        };
        peers.next_sequence += 1;
        let Some(key) = persisted.key else { return };
        peers.identities.insert(id, BoundIdentity { key, timestamp: 0, day: now.ms / DAY_MS });
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
        let mut peers = self.peers.write();
        if let Some((slot, peer)) = peers.peer(id)
            && (&*peer.address.addr, peer.address.port) == at
        {
            peers.change(slot, |peer| peer.reachable = Some(reachable));
        }
    }

    /// Returns true if the peer is in the table, even if it has expired and is not swept yet.
    pub fn contains(&self, id: &str) -> bool {
        self.peers.read().by_id.contains_key(id)
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
        let peers = self.peers.read();
        self.check_claim(&peers, id, claim, now)?;
        let is_here = peers.peer(id).is_some_and(|(_, peer)| peer.expires > now.at);
        Ok(is_here && (claim.is_none() || peers.identities.contains_key(id)))
    }

    fn check_claim(
        &self,
        peers: &Peers,
        id: &str,
        claim: Option<&Claim>,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        let identity = peers.identities.get(id);
        match (identity, claim) {
            (Some(_), None) => return Err(ClaimRefusal::Bound),
            (Some(identity), Some(claim)) if identity.key != claim.key => {
                return Err(ClaimRefusal::OtherKey);
            }
            _ => {}
        }
        let Some(claim) = claim else { return Ok(()) };
        if claim.timestamp.abs_diff(now.ms) > CLOCK_SKEW_MS {
            return Err(ClaimRefusal::Time(
                "timestamp: not within 5 minutes of the tracker's clock",
            ));
        }
        // Computed from the current clock, which may have been set since the start.
        let running = now.at.saturating_duration_since(self.start.at).as_millis() as u64;
        if claim.timestamp < now.ms.saturating_sub(running) {
            return Err(ClaimRefusal::Time("timestamp: earlier than the tracker's start"));
        }
        // The clock may have been set back. Requests signed with later times are now out of range,
        // so they cannot be replayed, and must not block the node's new ones.
        let last = identity
            .map(|identity| identity.timestamp)
            .filter(|last| *last <= now.ms.saturating_add(CLOCK_SKEW_MS));
        if last.is_some_and(|last| claim.timestamp <= last) {
            return Err(ClaimRefusal::Time("timestamp: not later than the last one"));
        }
        Ok(())
    }

    /// Stores the claim's time as that of the ID's last signed request.
    fn record_claim(
        &self,
        peers: &mut Peers,
        id: &str,
        claim: Option<&Claim>,
        now: TrackerTime,
    ) -> Result<(), ClaimRefusal> {
        // Checked again, as another request may have arrived while the signature was checked.
        self.check_claim(peers, id, claim, now)?;
        let Some(claim) = claim else { return Ok(()) };
        let known = peers.identities.len();
        match peers.identities.get_mut(id) {
            Some(known) => known.timestamp = claim.timestamp,
            None if known >= MAX_KNOWN_IDENTITIES => return Err(ClaimRefusal::Full),
            None => {
                let id = peers.peer(id).map_or_else(|| id.into(), |(_, peer)| peer.id.clone());
                peers.identities.insert(
                    id,
                    BoundIdentity {
                        key: claim.key,
                        timestamp: claim.timestamp,
                        day: now.ms / DAY_MS,
                    },
                );
            }
        }
        Ok(())
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
        let mut peers = self.peers.write();
        if !peers.by_id.contains_key(id) && peers.by_id.len() >= MAX_PEERS {
            return Err(ClaimRefusal::Full);
        }
        self.record_claim(&mut peers, id, claim, now)?;
        let today = now.ms / DAY_MS;
        let first_today = peers
            .identities
            .get_mut(id)
            .is_some_and(|identity| std::mem::replace(&mut identity.day, today) != today);
        let is_new = !peers.by_id.contains_key(id);
        let slot = match peers.peer(id) {
            Some((slot, _)) => slot,
            None => {
                let sequence = peers.next_sequence;
                peers.next_sequence += 1;
                let id = peers
                    .identities
                    .get_key_value(id)
                    .map_or_else(|| id.into(), |(id, _)| id.clone());
                peers.insert(PeerEntry::new(id, address.clone(), sequence, now))?
            }
        };
        let mut outcome = AnnounceOutcome { first_today, ..AnnounceOutcome::default() };
        peers.change(slot, |peer| {
            let is_elsewhere = peer.address != address;
            outcome.also_at = peer.record_instance(instance, now.at);
            if is_elsewhere {
                (peer.reachable, peer.last_reach_test) = (None, None);
            }
            (peer.address, peer.last_seen_ms, peer.expires) =
                (address, now.ms, now.at + PEER_TTL.get());
            peer.reputation = peer.reputation.newest(stored_reputation.unwrap_or_default());
            outcome.has_moved = is_new || is_elsewhere;
            let interval = if peer.reachable == Some(true) {
                REACH_TEST_INTERVAL
            } else {
                REACH_RETRY_INTERVAL
            };
            outcome.needs_reach_test =
                peer.last_reach_test.is_none_or(|at| now.at >= at + interval.get());
            if outcome.needs_reach_test {
                peer.last_reach_test = Some(now.at);
            }
            outcome.reachable = peer.reachable;
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
        let mut peers = self.peers.write();
        if peers.identities.contains_key(id) {
            self.record_claim(&mut peers, id, Some(claim), now)
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
        let mut peers = self.peers.write();
        let (slot, peer) = peers
            .peer(id)
            .filter(|(_, peer)| peer.expires > now.at)
            .ok_or(ClaimRefusal::NotHere)?;
        if claim.is_none() && peer.address.from != from {
            self.check_claim(&peers, id, claim, now)?;
            return Err(ClaimRefusal::OtherAddress);
        }
        if claim.is_some() && !peers.identities.contains_key(id) {
            return Err(ClaimRefusal::OtherKey);
        }
        self.record_claim(&mut peers, id, claim, now)?;
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
        let peers = self.peers.read();
        let (_, peer) = peers
            .peer(id)
            .filter(|(_, peer)| peer.expires > now.at)
            .ok_or(ClaimRefusal::NotHere)?;
        if !peers.identities.contains_key(id) {
            return Err(ClaimRefusal::NotHere);
        }
        self.check_claim(&peers, id, Some(claim), now)?;
        let passed =
            |published: &PublishedFilter| Some(now.at.saturating_duration_since(published.at?));
        match peer
            .published
            .as_ref()
            .and_then(passed)
            .filter(|passed| *passed < FILTER_INTERVAL.get())
        {
            Some(passed) => Err(ClaimRefusal::TooSoon(FILTER_INTERVAL.get() - passed)),
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
            let peers = self.peers.read();
            let (slot, peer) = peers.peer(id).ok_or(ClaimRefusal::NotHere)?;
            (slot, peer.published.as_ref().map(|published| published.place))
        };
        let place = editor.set(slot, last, filter).ok_or(ClaimRefusal::Full)?;
        let mut peers = self.peers.write();
        let published = PublishedFilter { place, timestamp: claim.timestamp, at: Some(now.at) };
        peers.change(slot, |peer| peer.published = Some(published));
        // An announce with a later time may have arrived meanwhile. Then its time stays, and the
        // filter is stored all the same.
        if let Some(identity) = peers.identities.get_mut(id) {
            identity.timestamp = identity.timestamp.max(claim.timestamp);
        }
        Ok(())
    }

    /// Updates the reputation of a live peer after a transfer. Older counts are ignored.
    pub fn set_reputation(&self, id: &str, reputation: Reputation) {
        let mut peers = self.peers.write();
        if let Some((slot, _)) = peers.peer(id) {
            peers.change(slot, |peer| peer.reputation = peer.reputation.newest(reputation));
        }
    }

    /// Returns the peers that may have a path, best first, with networks taking turns.
    pub fn lookup(&self, hash_part: &HashPart, now: TrackerTime) -> CandidateList {
        let found = self.bloom_index.find(hash_part);
        let (salt, turn) = hash_part.prefixes();
        let peers = self.peers.read();
        // Number of peers of each class and network so far. Each network gets one place before any
        // gets a second.
        let mut network_counts: HashMap<(u8, u128), u32> = HashMap::new();
        let mut ranked: Vec<(u8, u64, u64, u32)> = found
            .into_iter()
            .filter_map(|slot| {
                let peer = peers.live(slot, now.at)?;
                // The order of peers with equal scores depends on the path, so that they share the
                // load.
                let tie_break = (peer.sequence ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                Some((peer.class(), !peer.reputation.score().to_bits(), tie_break, slot))
            })
            .collect();
        ranked.sort_unstable();
        let mut ordered: Vec<((u8, u32), u32)> = Vec::with_capacity(ranked.len());
        for (class, _, _, slot) in ranked {
            let Some(peer) = peers.live(slot, now.at) else { continue };
            let round = network_counts.entry((class, peer.network())).or_default();
            ordered.push(((class, *round), slot));
            *round += 1;
        }
        ordered.sort_by_key(|(turn, _)| *turn);
        let candidate = |slot: u32| peers.live(slot, now.at).map(PeerEntry::candidate);
        let candidates =
            ordered.iter().take(MAX_CANDIDATES).filter_map(|(_, slot)| candidate(*slot)).collect();
        let others =
            others(&peers, turn, now).iter().filter_map(|rank| candidate(rank.3)).collect();
        CandidateList { candidates, others }
    }

    /// Returns the best `max` live peers.
    pub fn best_peers(&self, max: usize, now: TrackerTime) -> Vec<PeerRow> {
        let peers = self.peers.read();
        let live = peers.ranked.iter().filter_map(|rank| peers.live(rank.3, now.at));
        live.take(max)
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
        let gone: Vec<u32> = {
            let peers = self.peers.read();
            let expired = |peer: &PeerEntry| peer.expires <= now.at;
            (0u32..)
                .zip(&peers.slots)
                .filter(|(_, p)| p.as_ref().is_some_and(expired))
                .map(|(slot, _)| slot)
                .collect()
        };
        // In chunks, so that lookups are not blocked for long.
        for some in gone.chunks(256) {
            let editor = self.bloom_index.edit();
            let mut peers = self.peers.write();
            for slot in some {
                // The peer may have announced itself since.
                let peer =
                    if peers.live(*slot, now.at).is_none() { peers.remove(*slot) } else { None };
                let Some(peer) = peer else { continue };
                ids.push(peer.id);
                if let Some(published) = peer.published {
                    editor.remove(*slot, published.place);
                }
            }
        }
        let stale =
            |identity: &BoundIdentity| identity.timestamp.saturating_add(CLOCK_SKEW_MS) < now.ms;
        let mut peers = self.peers.write();
        let Peers { identities, by_id, .. } = &mut *peers;
        identities.retain(|id, identity| by_id.contains_key(id) || !stale(identity));
        ids
    }

    /// The sizes of the table.
    pub fn counts(&self) -> TableCounts {
        let peers = self.peers.read();
        TableCounts {
            peers: peers.by_id.len(),
            with_filter: peers.with_filter,
            filter_bytes: self.bloom_index.bytes(),
        }
    }
}

/// Selects peers without a filter: the best ones, and some that the path determines. Each network
/// gets one place before any gets a second.
fn others(peers: &Peers, turn: u64, now: TrackerTime) -> Vec<CandidateRank> {
    let best = || peers.others.iter().copied().filter(|rank| peers.live(rank.3, now.at).is_some());
    if peers.others.len() <= MAX_OTHERS {
        return best().collect();
    }
    let from = turn % peers.next_sequence.max(1);
    let rank = |(_, slot): (&u64, &u32)| Some(peers.live(*slot, now.at)?.rank(*slot));
    let turns = || peers.turns.range(from..).chain(&peers.turns).filter_map(rank);
    let mut networks = HashSet::new();
    let mut is_new = |rank: &CandidateRank| {
        peers.live(rank.3, now.at).is_some_and(|peer| networks.insert(peer.network()))
    };
    let mut chosen: BTreeSet<CandidateRank> =
        best().take(MAX_EXAMINED).filter(&mut is_new).take(BEST_OTHERS).collect();
    chosen.extend(turns().take(MAX_EXAMINED).filter(&mut is_new).take(MAX_OTHERS - chosen.len()));
    for some in [best().take(BEST_OTHERS).collect::<Vec<_>>(), turns().take(MAX_EXAMINED).collect()]
    {
        let left = MAX_OTHERS.saturating_sub(chosen.len());
        let more: Vec<CandidateRank> =
            some.into_iter().filter(|rank| !chosen.contains(rank)).take(left).collect();
        chosen.extend(more);
    }
    chosen.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerix::nix::nix32;

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
            assert!(matches!(again, Err(ClaimRefusal::Time(_))), "after {seconds} s: {again:?}");
        }
        assert!(table.peers.read().identities.is_empty(), "and then it is forgotten");
    }

    #[test]
    fn request_with_wrong_time_or_key_is_refused() {
        let start = start();
        let table = TrackerTable::new(start, 1 << 30);
        let now = after(start, 1000);
        let time = |timestamp: u64| table.check("a", Some(&Claim { key: [1; 32], timestamp }), now);
        assert!(time(now.ms - CLOCK_SKEW_MS).is_ok() && time(now.ms + CLOCK_SKEW_MS).is_ok());
        for wrong in [0, now.ms - CLOCK_SKEW_MS - 1, now.ms + CLOCK_SKEW_MS + 1, u64::MAX] {
            assert!(matches!(time(wrong), Err(ClaimRefusal::Time(_))), "{wrong}");
        }
        table.announce("a", at(1), Some(&by(1, now)), None, None, now).unwrap();
        assert!(matches!(time(now.ms), Err(ClaimRefusal::Time(_))));
        assert_eq!(time(now.ms + 1), Ok(true));
        assert_eq!(table.check("a", None, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.announce("a", at(9), None, None, None, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.check("a", Some(&by(2, after(now, 1))), now), Err(ClaimRefusal::OtherKey));
        assert_eq!(table.leave("a", None, at(1).from, now), Err(ClaimRefusal::Bound));
        assert_eq!(table.best_peers(1, now)[0].address, at(1));
        // A former process may have accepted requests from before this start.
        let young = TrackerTable::new(now, 1 << 30);
        let before = Claim { key: [1; 32], timestamp: now.ms - 1 };
        assert!(matches!(young.check("a", Some(&before), now), Err(ClaimRefusal::Time(_))));
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
            assert!(matches!(again, Err(ClaimRefusal::Time(_))), "{again:?}");
            let before = Claim { key: [1; 32], timestamp: right.ms - 1 };
            assert!(matches!(table.check("b", Some(&before), set), Err(ClaimRefusal::Time(_))));
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
            Err(ClaimRefusal::Time(_))
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
        let ranks = table.peers.read().ranked.len();
        assert_eq!(
            (ranks, table.peers.read().others.len(), table.peers.read().turns.len()),
            (200, 200, 200)
        );
        table.sweep(after(start, 120));
        let peers = table.peers.read();
        assert!(peers.ranked.is_empty() && peers.others.is_empty() && peers.turns.is_empty());
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
        let capacity = || table.peers.read().peer("a").unwrap().1.replaced.capacity();
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
        assert!(matches!(table.check("a", Some(&before), start), Err(ClaimRefusal::Time(_))));
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
