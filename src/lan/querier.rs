//! This node's own lookups: which queries to send, which peers to wait for, and when a lookup ends.
//! No I/O.
//!
//! # Life of a lookup
//!
//! 1. [`Querier::handle_lookup`] queues the lookup. It leaves with the next batch: at once if no other
//!    lookup is open or the batch is full, else one batch interval after the last batch.
//! 2. The batch goes by unicast to every live peer that is not behind, at most [`MAX_UNICAST`].
//!    Queries are also broadcast where peers may be that understand no batches or are not known.
//! 3. Each peer that was asked owes an answer. *No* settles it. *Have* passes the holder on as
//!    [`LookupUpdate::Holder`]. The peer then owes the narinfo until [`Querier::handle_settled`] or
//!    [`Querier::handle_failed`]. Queries that stay unanswered for too long are repeated.
//! 4. An overdue answer uses up the peer's *wait budget*. When the budget is used up, the peer is
//!    given up. It becomes silent if it has answered nothing since. Silent peers get probes.
//! 5. The lookup ends when no peer owes it anything, at the first good narinfo, or after 5 s.
//!
//! [`LookupUpdate::Holder`]: super::lookups::LookupUpdate::Holder

use super::broadcasts::Broadcasts;
use super::lookups::{Holder, LanLookups, LookupId, LookupRequest, Wanted};
use super::outgoing::{DatagramTarget, OutgoingDatagrams};
use super::overdue::OverdueCheck;
use super::peer::{Dialect, LanPeer, MetBy};
use super::peer_table::PeerTable;
use super::sent_queries::SentBatch;
use crate::nix::HashPart;
use crate::wire::{AnswerBits, HashParts, MAX_BATCH, Packet};
use std::cmp::Reverse;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of live peers that are asked by unicast. If more are live, the most useful ones
/// are asked by unicast, and the batch is also broadcast.
pub const MAX_UNICAST: usize = 256;
/// How long a lookup waits for answers to a broadcast batch.
const BROADCAST_BATCH_WAIT: Duration = Duration::from_millis(50);
/// Minimum interval between two probes, to whatever peers: at most ten leave per second.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum time that one turn of the event loop adds to lookup time while lookups are open.
const MAX_TURN: Duration = Duration::from_millis(100);

/// Source of random numbers. They must be unpredictable, because request IDs are: else other hosts
/// could forge answers.
pub type RandomSource = Box<dyn FnMut() -> u32 + Send>;

/// A peer's answer to a query.
pub enum QueryAnswer {
    /// To a *query*: the holder, or `None` if the peer does not have the path.
    One(Option<Holder>),
    /// To a *query many*: one bit for each path, set if the peer has the path.
    Many(AnswerBits),
}

impl QueryAnswer {
    /// Whether this can be the answer to a query for `count` paths. A single *have* or *have not*
    /// answers one path at most.
    fn fits(&self, count: usize) -> bool {
        match self {
            QueryAnswer::One(_) => count <= 1,
            QueryAnswer::Many(held) => held.fits(count),
        }
    }

    /// Returns the holder of the path at index `at` of the query, or `None` if the peer does not
    /// have it. `http` is the peer's datagram address. A node that understands batches uses the
    /// same port for HTTP. The port in its hello is not used, because anybody can forge a hello.
    fn holder(&self, at: usize, hash_part: HashPart, http: SocketAddr) -> Option<Holder> {
        match self {
            QueryAnswer::One(holder) => holder.clone(),
            QueryAnswer::Many(held) => held.is_set(at).then(|| Holder::peerix(http, &hash_part)),
        }
    }
}

/// State of this node's own lookups and of the peers that are asked.
pub struct Querier {
    /// Real time of the event that is handled.
    pub now: Instant,
    /// Lookup time of the event that is handled.
    t: Instant,
    /// Datagrams to send.
    pub out: OutgoingDatagrams,
    /// All peers.
    pub peers: PeerTable,
    /// Source of random numbers.
    pub random: RandomSource,
    lookups: LanLookups,
    overdue: OverdueCheck,
    broadcasts: Broadcasts,
    /// No probe to any peer leaves before this time, because of [`PROBE_INTERVAL`]. Real time.
    probe_allowed_at: Instant,
}

impl Querier {
    /// Creates the state of a node that starts at `now`. `timeout` is `--timeout`.
    pub fn new(timeout: Duration, random: RandomSource, now: Instant) -> Self {
        Querier {
            now,
            t: now,
            out: Vec::new(),
            peers: PeerTable::default(),
            random,
            lookups: LanLookups::default(),
            overdue: OverdueCheck::new(now),
            broadcasts: Broadcasts::new(timeout, now),
            probe_allowed_at: now,
        }
    }

    /// Advances both clocks to real time `now`. To be called before each event.
    pub fn advance(&mut self, now: Instant) {
        let turn = now.saturating_duration_since(self.now);
        self.now += turn;
        // While no lookup is open, long turns count in full, so that budgets recover meanwhile.
        self.t += if self.lookups.is_empty() { turn } else { turn.min(MAX_TURN) };
    }

    /// Returns when [`Querier::end_turn`] has to be called next, in real time.
    pub fn next_turn(&self) -> Option<Instant> {
        let is_open = !self.lookups.is_empty();
        let waits = [
            self.next_batch_at(),
            self.peers.next_check,
            self.lookups.next_end(),
            self.peers.next_repeat.filter(|_| is_open),
        ];
        let waits = waits.into_iter().flatten().map(|at| self.now + (at - self.t));
        // While lookups wait, a turn is due every `MAX_TURN`. Otherwise lookup time would fall
        // behind although the machine does not pause.
        let counted = is_open.then(|| self.now + MAX_TURN);
        let probe = self.peers.next_probe.map(|at| at.max(self.probe_allowed_at));
        waits.chain(counted).chain(probe).min()
    }

    /// Does what is due at the end of a turn: sends batches, repeats and probes, gives up peers and
    /// ends lookups. `drained` tells whether all received datagrams were handled. If not, no answer
    /// becomes overdue, because it may be among the others.
    pub fn end_turn(&mut self, drained: bool) {
        while self.next_batch_at().is_some_and(|at| at <= self.t) {
            let batch = self.lookups.take_batch(self.t);
            self.send_batch(&batch);
        }
        self.peers.plan();
        for (address, lookups) in self.peers.due_repeats(self.t) {
            self.ask_again(address, &lookups);
        }
        loop {
            self.lookups.end_due(self.t).into_iter().for_each(|lookup| self.release(lookup));
            let given_up = self.overdue.run(&mut self.peers, drained, self.t);
            if given_up.is_empty() {
                break;
            }
            let median = self.peers.median_usual();
            given_up.into_iter().for_each(|address| self.give_up(address, median));
        }
        if self.now >= self.probe_allowed_at {
            let due = self.peers.due_probes(self.now);
            // Peers of which no path is known get no probe, so the next one is tried.
            for address in due {
                if self.probe(address) {
                    break;
                }
            }
        }
        self.peers.plan();
    }

    // Queries.

    /// Starts a lookup.
    pub fn handle_lookup(&mut self, request: LookupRequest) {
        let hash_part = request.hash_part;
        let open_until = self.t + self.broadcasts.grace(self.now);
        if !self.lookups.insert(request, open_until, self.t) {
            log::debug!("lookup of {hash_part}: too many under way");
        }
    }

    fn next_batch_at(&self) -> Option<Instant> {
        self.lookups.next_batch_at(|| self.peers.live().count(), self.t)
    }

    fn send_batch(&mut self, batch: &[Wanted]) {
        let mut live: Vec<SocketAddr> = self.peers.live().collect();
        if live.len() > MAX_UNICAST {
            let found = |peer: &LanPeer| peer.hits.as_ref().map(|hits| hits.count);
            let usefulness = |peer: &LanPeer| (peer.is_named, found(peer), peer.is_proven());
            live.sort_by_cached_key(|address| Reverse(self.peers.get(*address).map(usefulness)));
            live.truncate(MAX_UNICAST);
            self.broadcast(batch, Dialect::Batches, BROADCAST_BATCH_WAIT);
        }
        self.broadcast_singles(batch, live.is_empty());
        for address in live {
            let t = self.t;
            match self.peers.get_mut(address).filter(|peer| peer.is_held_back(t)) {
                Some(peer) => self.lookups.record_asked(&peer.owe(&ids(batch), false, t)),
                None => self.send_query(address, batch),
            }
        }
    }

    /// Broadcasts single queries for nodes that understand no batches or are not known. This
    /// happens while a Python peerix is known, and otherwise in the windows of [`Broadcasts`]. All
    /// lookups in a window are broadcast, because Nix begins with 25 at once.
    ///
    /// If no peer is live, the broadcast is the only packet of the lookup, and is always sent: a
    /// late answer makes its sender known.
    fn broadcast_singles(&mut self, batch: &[Wanted], is_alone: bool) {
        let has_python_peer = || self.peers.iter().any(|(_, peer)| peer.is_python(self.now));
        let is_waited = self.broadcasts.enter_window(self.now) || has_python_peer();
        if is_waited || is_alone {
            let wait = if is_waited { self.broadcasts.timeout } else { Duration::ZERO };
            batch.chunks(1).for_each(|single| self.broadcast(single, Dialect::HaveOnly, wait));
        }
    }

    /// Broadcasts one query for `batch`. The lookups wait for its answers for `wait`.
    fn broadcast(&mut self, batch: &[Wanted], dialect: Dialect, wait: Duration) {
        let id = (self.random)();
        self.out.push((DatagramTarget::Everyone, query(id, batch, dialect, true)));
        for (lookup, _) in batch {
            if let Some(lookup) = self.lookups.get_mut(*lookup) {
                lookup.open_until = lookup.open_until.max(self.t + wait);
                lookup.broadcast = (dialect != Dialect::Batches).then_some(id).or(lookup.broadcast);
            }
        }
        self.broadcasts.sent.insert(id, SentBatch { id, sent: self.t, lookups: ids(batch) });
    }

    /// Sends `batch` to one peer in packets that it understands, and records that it owes answers.
    fn send_query(&mut self, address: SocketAddr, batch: &[Wanted]) {
        let peer = self.peers.get_mut(address).filter(|_| !batch.is_empty());
        let Some(peer) = peer else { return };
        let to = match peer.is_proven() {
            true if !peer.queries.is_behind(self.t) => DatagramTarget::Peer(address),
            true if peer.hits.is_some() => DatagramTarget::Behind(address),
            _ => DatagramTarget::Unproven(address),
        };
        let dialect = peer.dialect();
        let mut added = Vec::new();
        for batch in batch.chunks(if dialect == Dialect::Batches { MAX_BATCH } else { 1 }) {
            let is_new = |lookup| peer.takes_broadcasts() && !peer.owes(lookup);
            let new = batch.first().filter(|(lookup, _)| is_new(*lookup));
            let broadcast = new.and_then(|(lookup, _)| self.lookups.get_mut(*lookup)?.broadcast);
            let id = broadcast.unwrap_or_else(|| {
                let id = (self.random)();
                self.out.push((to, query(id, batch, dialect, false)));
                id
            });
            added.extend(peer.record_sent(id, ids(batch), self.t));
        }
        self.lookups.record_asked(&added);
    }

    /// Asks a peer that has just become live for all lookups that were sent to other peers already.
    pub fn ask_open(&mut self, address: SocketAddr) {
        let batch = self.lookups.sent();
        self.send_query(address, &batch);
    }

    /// Asks a peer for those of `lookups` that are still open.
    pub fn ask_again(&mut self, address: SocketAddr, lookups: &[LookupId]) {
        let batch = self.lookups.still_open(lookups);
        self.send_query(address, &batch);
    }

    // Answers.

    /// Handles an answer to the query with request ID `id`. Returns whether it comes from a peer
    /// that was not known and may not know this node.
    pub fn handle_answer(&mut self, from: SocketAddr, id: u32, answer: &QueryAnswer) -> bool {
        let is_answer = |batch: &SentBatch| batch.id == id && answer.fits(batch.lookups.len());
        let asked = self.peers.get_mut(from).and_then(|peer| peer.queries.take(is_answer));
        let is_broadcast = asked.is_none();
        let broadcast = || self.broadcasts.sent.get(&id).filter(|batch| is_answer(batch)).cloned();
        let Some(SentBatch { sent, lookups, .. }) = asked.or_else(broadcast) else { return false };
        let heard = self.peers.record_heard(from, MetBy::Answer, self.now);
        let Some((peer, is_first)) = heard else { return false };
        let is_unknown = is_first && peer.hello().is_none();
        let became_live = peer.record_answer(sent, self.t) || is_first;
        let overtaken = peer.overtaken(sent, self.t);
        for (at, lookup) in lookups.iter().enumerate() {
            let Some(hash_part) = self.lookups.hash_part(*lookup) else { continue };
            match answer.holder(at, hash_part, from) {
                Some(holder) => self.handle_have(from, *lookup, holder),
                None if is_broadcast => {}
                None => self.settle(from, *lookup, true),
            }
        }
        if became_live {
            self.ask_open(from);
        } else {
            self.ask_again(from, &overtaken);
        }
        is_unknown
    }

    /// Records that the peer owes the lookup nothing more. `answered` tells whether it answered.
    fn settle(&mut self, address: SocketAddr, lookup: LookupId, answered: bool) {
        if self.peers.get_mut(address).is_some_and(|peer| peer.settle(lookup)) {
            self.lookups.record_settled(lookup, answered);
        }
    }

    fn handle_have(&mut self, from: SocketAddr, lookup: LookupId, holder: Holder) {
        if self.peers.get(from).is_some_and(|peer| peer.owes_narinfo(lookup)) {
            return;
        }
        if self.lookups.add_holder(lookup, from, holder) {
            self.owe_narinfo(from, lookup);
        } else {
            self.settle(from, lookup, true);
        }
    }

    /// Records that the peer said *have* and owes the narinfo. Returns false if the peer is silent.
    fn owe_narinfo(&mut self, address: SocketAddr, lookup: LookupId) -> bool {
        let peer = self.peers.get_mut(address).filter(|peer| peer.is_live());
        let Some(peer) = peer else { return false };
        let was_asked = peer.owe_narinfo(lookup, self.t);
        self.lookups.record_holder(lookup, was_asked);
        true
    }

    /// A peer gives no good narinfo or no answer: the lookup no longer waits for it. If it is a
    /// holder, the next live holder takes its place.
    pub fn handle_failed(&mut self, lookup: LookupId, address: SocketAddr) {
        let was_holder = self.peers.get(address).is_some_and(|peer| peer.owes_narinfo(lookup));
        self.settle(address, lookup, false);
        while was_holder
            && let Some(next) = self.lookups.replace_holder(lookup)
            && !self.owe_narinfo(next, lookup)
        {}
    }

    /// Ends a lookup that has got a good narinfo. `found` is the LAN peer from which it came.
    pub fn handle_settled(&mut self, lookup: LookupId, found: Option<SocketAddr>) {
        let hash_part = self.lookups.settle(lookup, self.t);
        if let Some(peer) = found.and_then(|address| self.peers.get_mut(address)) {
            peer.record_found(hash_part, self.t);
        }
        self.release(lookup);
    }

    /// Clears what peers owe the lookup.
    fn release(&mut self, lookup: LookupId) {
        for (_, peer) in self.peers.iter_mut() {
            peer.settle(lookup);
        }
    }

    // Overdue answers.

    /// Ends the wait for the overdue answers of a peer. It becomes silent if it has left or
    /// answered nothing since it was asked. `median` is the usual answer time of the median peer.
    fn give_up(&mut self, address: SocketAddr, median: Option<Duration>) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        let due = peer.due_after(median);
        if peer.liveness.has_left(self.t) || peer.has_vanished(due, self.t) {
            return self.mark_silent(address);
        }
        let verification = peer.begin_verification(self.t);
        for lookup in peer.overdue(due, self.t).collect::<Vec<_>>() {
            self.handle_failed(lookup, address);
        }
        if verification.is_some() {
            self.send_probe(address, DatagramTarget::Peer(address), verification);
        }
    }

    /// Makes the peer silent: it gets no queries until it answers a probe.
    pub fn mark_silent(&mut self, address: SocketAddr) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        log::debug!("peer {address}: silent");
        for lookup in peer.mark_silent(self.now) {
            self.handle_failed(lookup, address);
        }
    }

    // Probes.

    /// Makes probes due, because the network has changed. Lookups wait for peers that are not
    /// known, and the next one is broadcast.
    pub fn handle_network_change(&mut self) {
        self.broadcasts.restart(self.now);
        self.peers.restart_probes(self.now);
    }

    /// Sends a probe to a peer, unless one left to any peer within [`PROBE_INTERVAL`]. Returns
    /// whether a probe was sent.
    pub fn probe(&mut self, address: SocketAddr) -> bool {
        let is_allowed = self.now >= self.probe_allowed_at;
        let Some(peer) = self.peers.get_mut(address).filter(|_| is_allowed) else { return false };
        peer.liveness.record_probe(self.now, self.t);
        let wanted = match peer.dialect() {
            Dialect::Batches => None,
            Dialect::Singles => peer.last_found().or(Some(HashPart::ZERO)),
            // The path that Nix asked for last: the peer may have it.
            Dialect::HaveOnly => {
                peer.last_found().or(self.lookups.last_path.filter(|_| peer.is_named))
            }
        };
        // Broadcast queries serve as probes of a peer for which no path is known.
        let is_sent = wanted.is_some() || peer.dialect() == Dialect::Batches;
        if is_sent {
            self.probe_allowed_at = self.now + PROBE_INTERVAL;
            self.send_probe(address, DatagramTarget::Unproven(address), wanted);
        }
        is_sent
    }

    /// Sends a query to whose answer no lookup waits: for one path, or for none.
    fn send_probe(&mut self, address: SocketAddr, to: DatagramTarget, path: Option<HashPart>) {
        let id = (self.random)();
        let nothing = HashParts::pack([]);
        let packet = match path {
            Some(hash_part) => Packet::Query { id, hash_part },
            None => Packet::QueryMany { id, hash_parts: nothing, holders_only: false },
        };
        self.out.push((to, packet));
        if let Some(peer) = self.peers.get_mut(address) {
            peer.record_sent(id, Arc::new([]), self.t);
        }
    }
}

/// The IDs of the lookups of a batch.
fn ids(batch: &[Wanted]) -> Arc<[LookupId]> {
    batch.iter().map(|(id, _)| *id).collect()
}

/// Makes a query for `batch`, which must have one path unless `dialect` is [`Dialect::Batches`].
fn query(id: u32, batch: &[Wanted], dialect: Dialect, holders_only: bool) -> Packet {
    match batch {
        [(_, hash_part)] if dialect != Dialect::Batches => {
            Packet::Query { id, hash_part: *hash_part }
        }
        _ => {
            let hash_parts = HashParts::pack(batch.iter().map(|(_, hash_part)| hash_part));
            Packet::QueryMany { id, hash_parts, holders_only }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Querier {
        /// Panics if a table is larger than its bound, or if a search would be late.
        pub fn assert_bounds(&self) {
            self.peers.assert_bounds();
            self.lookups.assert_bounds();
            let is_late = |next: Option<Instant>, planned: Option<Instant>| {
                next.is_some_and(|next| planned.is_none_or(|planned| planned > next))
            };
            for (_, peer) in self.peers.iter() {
                assert!(
                    !is_late(peer.next_probe(), self.peers.next_probe),
                    "a probe would be late"
                );
                assert!(
                    !is_late(peer.repeat_at(), self.peers.next_repeat),
                    "a repeat would be late"
                );
                assert!(
                    !is_late(peer.liveness.leaves_at(), self.peers.next_check),
                    "a wait would be long"
                );
            }
        }
    }
}
