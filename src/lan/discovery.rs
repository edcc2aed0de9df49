//! State machine of LAN discovery: which packets to send, which peers to wait for, and when a
//! lookup ends. It does no I/O. The caller passes in time and random numbers, so the simulation
//! runs the same code.
//!
//! # Life of a lookup
//!
//! 1. [`Event::LookUp`] queues the lookup. It leaves with the next batch: at once if no other
//!    lookup is open or the batch is full, else one batch interval after the last batch.
//! 2. The batch goes by unicast to every live peer that is not behind, at most [`MAX_UNICAST`].
//!    Queries are also broadcast where peers may be that understand no batches or are not known.
//! 3. Each peer that was asked owes an answer. *No* settles it. *Have* passes the holder on as
//!    [`LookupUpdate::Holder`]. The peer then owes the narinfo until [`Event::Settled`] or
//!    [`Event::Failed`]. Queries that stay unanswered for too long are repeated.
//! 4. An overdue answer uses up the peer's *wait budget*. When the budget is used up, the peer is
//!    given up. It becomes silent if it has answered nothing since.
//! 5. The lookup ends when no peer owes it anything, at the first good narinfo, or after 5 s.
//!
//! # Two clocks
//!
//! Waits are measured in *lookup time*, called `t`. While lookups are open, each turn of the event
//! loop adds at most 100 ms to it, so that a pause of this machine does not count against peers.
//! Hellos and probes use real time, called `now`.

use super::Holder;
use super::budget::WaitBudget;
use super::environment::Environment;
use super::lookups::{HolderPlace, LanLookups, LookupId, LookupUpdate};
use super::peer_table::{Dialect, LanPeer, MetBy, Neighbour, PeerTable, SentBatch};
use crate::bounded_map::BoundedMap;
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use crate::wire::{AnswerBits, HashParts, Hello, MAX_BATCH, Packet};
use crossbeam_channel::Sender;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Interval between two broadcasts of *hello*.
const HELLO_INTERVAL: Duration = Duration::from_secs(30);
/// First interval between hellos after a start or a change of network. It doubles up to
/// [`HELLO_INTERVAL`], as for announcements in RFC 6762, section 8.3. Three hellos leave within
/// [`HELLO_GRACE`], so one may be lost.
const FIRST_HELLO_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum random delay of the reply to a hello. It keeps peers from answering a broadcast at the
/// same moment.
const HELLO_REPLY_SPREAD: Duration = Duration::from_millis(200);
/// Maximum number of replies to hellos in one [`HELLO_REPLY_WINDOW`]. At the bound no reply is
/// sent; the next broadcast hello reaches the peer. A datagram to a forged address stays in the
/// socket's send buffer of 416 KiB for 3 s and takes about 800 bytes of it.
const MAX_HELLO_REPLIES: usize = 32;
/// Time in which at most [`MAX_HELLO_REPLIES`] replies leave.
const HELLO_REPLY_WINDOW: Duration = Duration::from_secs(1);
/// Minimum interval between two hellos to a peer that seems not to know this node.
const REMINDER_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum number of hellos to addresses from one reading of the kernel's neighbour tables. Further
/// addresses are greeted after a later reading.
const MAX_GREETINGS: usize = 64;
/// Interval after which known addresses of the neighbour tables are greeted again: a hello may have
/// been lost, or the host may have started peerix.
const GREETING_RESET_INTERVAL: Duration = Duration::from_secs(300);
/// Maximum number of greeted addresses that are remembered. At the bound the oldest is forgotten,
/// and greeted again.
const MAX_GREETED: usize = 4096;

/// After a start, a wake-up or a change of network, no lookup ends as a miss before this time:
/// peers may still answer the hellos.
const HELLO_GRACE: Timeout = Timeout::from_millis(500);

/// Maximum number of live peers that are asked by unicast. If more are live, the most useful ones
/// are asked by unicast, and the batch is also broadcast.
pub const MAX_UNICAST: usize = 256;
/// How long a lookup waits for answers to a broadcast batch.
const BROADCAST_BATCH_WAIT: Duration = Duration::from_millis(50);
/// Minimum interval between windows of one `--timeout`, in which lookups are broadcast as single
/// queries. While a Python peerix is known, all lookups are broadcast so.
const BROADCAST_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of broadcast queries whose answers are understood. At the bound the oldest is
/// forgotten.
const MAX_BROADCASTS: usize = 1024;

/// Interval between two batches for each live peer. Sending a datagram to one peer and handling its
/// answer takes 20 to 40 µs of CPU time, so lookups use about half of one processor at most.
const BATCH_INTERVAL_PER_PEER: Duration = Duration::from_micros(60);
/// Minimum interval between two batches.
const MIN_BATCH_INTERVAL: Duration = Duration::from_millis(1);
/// Maximum interval between two batches.
const MAX_BATCH_INTERVAL: Duration = Duration::from_millis(8);

/// Minimum interval between two probes, to whatever peers: at most ten leave per second.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// Maximum time that one turn of the event loop adds to lookup time while lookups are open.
const MAX_TURN: Duration = Duration::from_millis(100);

/// Maximum age of the cached median of the usual answer times.
const MEDIAN_AGE: Duration = Duration::from_millis(50);

/// An input of [`Discovery::handle`].
pub enum Event<'a> {
    /// A datagram was received.
    Datagram {
        /// Its source address.
        from: SocketAddr,
        /// Its payload.
        bytes: &'a [u8],
    },
    /// A thread looks for a path.
    LookUp(LookupRequest),
    /// A lookup has got a good narinfo. It ends.
    Settled {
        /// The lookup.
        lookup: LookupId,
        /// The LAN peer from which the narinfo came. `None` if it came from elsewhere.
        found: Option<SocketAddr>,
    },
    /// A peer that said *have* gave no good narinfo, or will not be asked for it. The lookup no
    /// longer waits for it.
    Failed {
        /// The lookup.
        lookup: LookupId,
        /// The peer.
        peer: SocketAddr,
    },
    /// The addresses of the nodes that `--peer` names. They replace the previous ones.
    SetNamed(Vec<SocketAddr>),
    /// A thread requests the list of all peers. Discovery sends it without blocking.
    ListPeers(Sender<Vec<Neighbour>>),
    /// The interfaces changed, or the machine woke from suspend.
    NetworkChanged,
    /// Addresses in the kernel's neighbour tables.
    KernelNeighbours(Vec<SocketAddr>),
    /// A turn of the event loop ends.
    Tick {
        /// Whether all received datagrams were handled. If not, no answer is judged overdue,
        /// because it may be among the others.
        drained: bool,
    },
}

/// A lookup for discovery to run. Its channel closes after the last update.
pub struct LookupRequest {
    /// ID of the lookup in later events.
    pub id: LookupId,
    /// Hash part of the path to look for.
    pub hash_part: HashPart,
    /// Receives the holders and the end of the lookup. Its capacity must be
    /// [`LookupRequest::CAPACITY`]: discovery never blocks, so an update that finds the channel
    /// full is lost.
    pub updates: Sender<LookupUpdate>,
}

impl LookupRequest {
    /// Number of updates that may be unread at once: [`MAX_HOLDERS`](super::MAX_HOLDERS) holders
    /// and the end.
    pub const CAPACITY: usize = super::lookups::MAX_HOLDERS + 1;
}

/// Where a datagram goes, and which socket sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramTarget {
    /// To a peer from the first socket: everything but the datagrams of the other variants.
    Peer(SocketAddr),
    /// To a peer from the second socket: queries to a peer that is behind and through which paths
    /// were found. These may wait for ARP. In the first socket's send buffer they would displace
    /// datagrams to peers that answer.
    Behind(SocketAddr),
    /// To a peer from the third socket: probes, and queries to any other peer that is behind or has
    /// not answered yet. There may be many, because anybody can forge source addresses.
    Unproven(SocketAddr),
    /// To the broadcast address or multicast group of every LAN network, from the first socket.
    Everyone,
}

/// Datagrams to send, each with its target.
pub type OutgoingDatagrams = Vec<(DatagramTarget, Packet)>;

/// Source of random numbers. They must be unpredictable, because request IDs are: else other hosts
/// could forge answers.
pub type RandomSource = Box<dyn FnMut() -> u32 + Send>;

/// A peer's answer to a query.
enum QueryAnswer {
    /// The peer has the path.
    Have(Holder),
    /// The peer does not have the path.
    HaveNot,
    /// One bit for each path of the query, set if the peer has the path.
    Many(AnswerBits),
}

impl QueryAnswer {
    /// Whether this can be the answer to a query for `count` paths. A single *have* or *have not*
    /// answers one path at most.
    fn fits(&self, count: usize) -> bool {
        match self {
            QueryAnswer::Have(_) | QueryAnswer::HaveNot => count <= 1,
            QueryAnswer::Many(held) => held.fits(count),
        }
    }

    /// Returns the holder of the path at index `at` of the query, or `None` if the peer does not
    /// have it. `http` is the peer's datagram address. A node that understands batches uses the
    /// same port for HTTP. The port in its hello is not used, because anybody can forge a hello.
    fn holder(&self, at: usize, hash_part: HashPart, http: SocketAddr) -> Option<Holder> {
        match self {
            QueryAnswer::Have(holder) => Some(holder.clone()),
            QueryAnswer::HaveNot => None,
            QueryAnswer::Many(held) => {
                held.is_set(at).then(|| Holder { http, url_path: url_path(hash_part) })
            }
        }
    }
}

/// URL path of a narinfo on a node of this version.
fn url_path(hash_part: HashPart) -> String {
    format!("local/{hash_part}.narinfo")
}

/// Settings of a node that do not change while it runs.
#[derive(Debug, Clone)]
pub struct DiscoverySettings {
    /// TCP port of the node's HTTP server.
    pub http_port: u16,
    /// UDP port of this node and of its peers.
    pub udp_port: u16,
    /// How long a lookup waits for answers of unknown peers to a broadcast: `--timeout`.
    pub timeout: Duration,
}

/// State machine of LAN discovery, without I/O. The caller passes it [`Event`]s and sends the
/// datagrams that it returns.
pub struct Discovery<E> {
    environment: E,
    settings: DiscoverySettings,
    instance: [u8; 8],
    random: RandomSource,
    peers: PeerTable,
    lookups: LanLookups,
    /// Wait budget shared by all peers through which no path was found.
    shared_budget: WaitBudget,
    /// Real time of the event.
    now: Instant,
    /// Lookup time of the event.
    t: Instant,
    out: OutgoingDatagrams,
    last_batch: Option<Instant>,
    last_looked_up: Option<HashPart>,
    median: Option<Duration>,
    median_until: Option<Instant>,
    /// No answer becomes overdue, and no budget is used up, before this lookup time.
    next_overdue_check: Option<Instant>,
    /// The latest broadcast queries by request ID.
    broadcasts: BoundedMap<u32, SentBatch, MAX_BROADCASTS>,
    /// End of the window in which lookups are broadcast as single queries. The first lookup after
    /// `next_broadcast` opens the next window.
    broadcast_until: Instant,
    next_broadcast: Instant,
    grace_until: Instant,
    next_hello: Instant,
    hello_interval: Duration,
    hello_replies: BTreeMap<SocketAddr, Instant>,
    /// When the replies of the last [`HELLO_REPLY_WINDOW`] were or will be sent.
    recent_replies: Vec<Instant>,
    greeted: BoundedMap<SocketAddr, (), MAX_GREETED>,
    /// When `greeted` is cleared.
    next_greeting_reset: Instant,
    next_probe: Instant,
    /// No peer's [`LanPeer::next_probe`] is earlier, so before it the peers need not be searched
    /// for one. `None` if no probe is planned.
    earliest_probe: Option<Instant>,
    /// No peer's [`LanPeer::repeat_at`] is earlier, in lookup time.
    earliest_repeat: Option<Instant>,
}

impl<E: Environment> Discovery<E> {
    /// Creates the state of a node that starts at `now`. The first hello is due at once.
    pub fn new(
        environment: E,
        settings: DiscoverySettings,
        mut random: RandomSource,
        now: Instant,
    ) -> Self {
        let (high, low) = (random().to_be_bytes(), random().to_be_bytes());
        let mut instance = [0; 8];
        instance[..4].copy_from_slice(&high);
        instance[4..].copy_from_slice(&low);
        Discovery {
            environment,
            settings,
            instance,
            random,
            peers: PeerTable::default(),
            lookups: LanLookups::default(),
            shared_budget: WaitBudget::full(now),
            now,
            t: now,
            out: Vec::new(),
            last_batch: None,
            last_looked_up: None,
            median: None,
            median_until: None,
            next_overdue_check: None,
            broadcasts: BoundedMap::default(),
            broadcast_until: now,
            next_broadcast: now,
            grace_until: now + HELLO_GRACE.get(),
            next_hello: now,
            hello_interval: FIRST_HELLO_INTERVAL,
            hello_replies: BTreeMap::new(),
            recent_replies: Vec::new(),
            greeted: BoundedMap::default(),
            next_greeting_reset: now,
            next_probe: now,
            earliest_probe: None,
            earliest_repeat: None,
        }
    }

    /// Handles one event at real time `now`. The caller ends each turn of its loop with
    /// [`Event::Tick`], and then sends [`Discovery::outgoing`]. Blocks only for
    /// [`Environment::query_held_paths`], which takes 50 ms at most.
    pub fn handle(&mut self, event: Event<'_>, now: Instant) {
        let turn = now.saturating_duration_since(self.now);
        self.now += turn;
        // While no lookup is open, long turns count in full, so that budgets recover meanwhile.
        self.t += if self.lookups.is_empty() { turn } else { turn.min(MAX_TURN) };
        match event {
            Event::Datagram { from, bytes } => self.handle_datagram(from, bytes),
            Event::LookUp(lookup) => self.handle_lookup(lookup),
            Event::Settled { lookup, found } => self.handle_settled(lookup, found),
            Event::Failed { lookup, peer } => {
                if self.peers.get_mut(peer).is_some_and(|peer| peer.settle(lookup)) {
                    self.lookups.record_settled(lookup, false);
                    self.replace_holder(lookup);
                    self.stop_budget_if_not_overdue(peer);
                }
            }
            Event::SetNamed(addresses) => self.set_named(&addresses),
            Event::ListPeers(list) => drop(list.try_send(self.peers.list())),
            Event::NetworkChanged => self.handle_network_change(),
            Event::KernelNeighbours(addresses) => self.greet(&addresses),
            Event::Tick { drained } => self.handle_tick(drained),
        }
    }

    /// The datagrams to send. The caller removes those that it has sent.
    pub fn outgoing(&mut self) -> &mut OutgoingDatagrams {
        &mut self.out
    }

    /// Returns when the caller has to run the next turn if no event comes before.
    pub fn next_turn(&self) -> Instant {
        let waits = [
            self.next_batch_at(),
            self.next_overdue_check,
            self.lookups.next_end(),
            self.earliest_repeat.filter(|_| !self.lookups.is_empty()),
        ];
        let waits = waits.into_iter().flatten().map(|at| self.now + (at - self.t));
        // While lookups wait, a turn is due every `MAX_TURN`. Otherwise lookup time would fall
        // behind although the machine does not pause.
        let counted = (!self.lookups.is_empty()).then(|| self.now + MAX_TURN);
        let probe = self.earliest_probe.map(|at| at.max(self.next_probe));
        let reply = self.hello_replies.values().min().copied();
        let others = [counted, reply, probe, Some(self.next_hello)];
        waits.chain(others.into_iter().flatten()).min().unwrap_or(self.next_hello)
    }

    /// Adds the *bye* packets to [`Discovery::outgoing`]: a broadcast, and one for each peer that `--peer` names.
    pub fn bye(&mut self) {
        self.send_to_all(Packet::Bye(self.hello()));
    }

    /// UDP port of this node and of its peers.
    pub fn udp_port(&self) -> u16 {
        self.settings.udp_port
    }

    /// Whether this node uses the LAN.
    pub fn has_lan(&self) -> bool {
        self.environment.has_lan()
    }

    fn hello(&self) -> Hello {
        let digest = self.environment.digest(&self.instance);
        Hello {
            port: self.settings.http_port,
            instance: self.instance,
            crowded: false,
            batches: true,
            digest,
        }
    }

    fn send_to_all(&mut self, packet: Packet) {
        if self.environment.has_lan() {
            self.out.push((DatagramTarget::Everyone, packet.clone()));
            self.out.extend(
                self.peers.named().map(|peer| (DatagramTarget::Peer(peer), packet.clone())),
            );
        }
    }

    /// Whether a packet from `from` may come from a peer. Peers send from the port that they listen
    /// on, so each neighbour is one peer. Only a peer that `--peer` names may use another port.
    fn may_be_peer(&self, from: SocketAddr) -> bool {
        let is_named = || self.peers.get(from).is_some_and(|peer| peer.is_named);
        self.environment.is_lan(from) && (from.port() == self.settings.udp_port || is_named())
    }

    // Lookups.

    fn handle_lookup(&mut self, request: LookupRequest) {
        let LookupRequest { id, hash_part, updates } = request;
        if !self.environment.has_lan() {
            let _ = updates.try_send(LookupUpdate::Ended { asked: 0, unanswered: 0 });
            return;
        }
        if !self.lookups.insert(id, hash_part, updates, self.t) {
            return log::debug!("lookup of {hash_part}: too many under way");
        }
        self.last_looked_up = Some(hash_part);
        if let Some(lookup) = self.lookups.get_mut(id) {
            lookup.open_until = self.t + self.grace_until.saturating_duration_since(self.now);
        }
    }

    fn next_batch_at(&self) -> Option<Instant> {
        let unsent = self.lookups.unsent();
        if unsent == 0 {
            return None;
        }
        let last = self.last_batch.filter(|_| self.lookups.len() > 1 && unsent < MAX_BATCH);
        let interval = || {
            let live = u32::try_from(self.peers.live().count()).unwrap_or(u32::MAX);
            (BATCH_INTERVAL_PER_PEER * live).clamp(MIN_BATCH_INTERVAL, MAX_BATCH_INTERVAL)
        };
        Some(last.map_or(self.t, |last| last + interval()))
    }

    fn send_batches(&mut self) {
        while self.next_batch_at().is_some_and(|at| at <= self.t) {
            let batch = self.lookups.take_unsent(MAX_BATCH);
            // Lookups that ended before they were sent leave the queue without a packet.
            if !batch.is_empty() {
                self.last_batch = Some(self.t);
                self.send_batch(&batch);
            }
        }
    }

    fn send_batch(&mut self, batch: &[(LookupId, HashPart)]) {
        let mut live: Vec<SocketAddr> = self.peers.live().collect();
        if live.len() > MAX_UNICAST {
            let usefulness = |address: &SocketAddr| {
                let peer = self.peers.get(*address);
                std::cmp::Reverse(peer.map(|peer| (peer.is_named, peer.found, peer.is_proven())))
            };
            live.sort_by_cached_key(usefulness);
            live.truncate(MAX_UNICAST);
            self.broadcast_batch(batch);
        }
        self.broadcast_singles(batch);
        for address in live {
            // A Python peerix does not answer if it has nothing, and so is always behind.
            let waits = |peer: &&mut LanPeer| {
                peer.is_held_back(self.t) && peer.dialect() != Dialect::HaveOnly
            };
            match self.peers.get_mut(address).filter(waits) {
                Some(peer) => {
                    let lookups: Vec<LookupId> = batch.iter().map(|(id, _)| *id).collect();
                    let added = peer.record_held_back(&lookups, self.t);
                    self.record_asked(&added, address);
                }
                None => self.send_query(address, batch),
            }
        }
        batch.iter().for_each(|(id, _)| self.lookups.update_next_end(*id));
    }

    /// Broadcasts `batch` as one *query many*. Only holders answer it.
    fn broadcast_batch(&mut self, batch: &[(LookupId, HashPart)]) {
        let id = (self.random)();
        let hash_parts = HashParts::pack(batch.iter().map(|(_, hash_part)| hash_part));
        self.out.push((
            DatagramTarget::Everyone,
            Packet::QueryMany { id, hash_parts, holders_only: true },
        ));
        self.record_broadcast(id, batch.iter().map(|(id, _)| *id).collect(), BROADCAST_BATCH_WAIT);
    }

    /// Broadcasts single queries for nodes that understand no batches or are not known. This
    /// happens while a Python peerix is known, and otherwise in windows of one `--timeout`, at most
    /// one per [`BROADCAST_INTERVAL`]. All lookups in a window are broadcast, because Nix begins
    /// with 25 at once.
    ///
    /// If no peer is live, the broadcast is the only packet of the lookup, and is always sent: a
    /// late answer makes its sender known.
    fn broadcast_singles(&mut self, batch: &[(LookupId, HashPart)]) {
        if self.now >= self.next_broadcast {
            self.broadcast_until = self.now + self.settings.timeout;
            self.next_broadcast = self.now + BROADCAST_INTERVAL;
        }
        let is_waited = self.now < self.broadcast_until || self.peers.has_python_peer(self.now);
        if !is_waited && self.peers.live().next().is_some() {
            return;
        }
        let wait = if is_waited { self.settings.timeout } else { Duration::ZERO };
        for (lookup, hash_part) in batch {
            let id = (self.random)();
            self.out.push((DatagramTarget::Everyone, Packet::Query { id, hash_part: *hash_part }));
            self.record_broadcast(id, Arc::new([*lookup]), wait);
            if let Some(lookup) = self.lookups.get_mut(*lookup) {
                lookup.broadcast = Some(id);
            }
        }
    }

    fn record_broadcast(&mut self, id: u32, lookups: Arc<[LookupId]>, wait: Duration) {
        for lookup in lookups.iter() {
            if let Some(lookup) = self.lookups.get_mut(*lookup) {
                lookup.open_until = lookup.open_until.max(self.t + wait);
            }
        }
        self.broadcasts.insert(id, SentBatch { id, sent: self.t, lookups });
    }

    /// Sends `batch` to one peer in packets that it understands, and records that it owes answers.
    fn send_query(&mut self, address: SocketAddr, batch: &[(LookupId, HashPart)]) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        let to = match peer.is_proven() {
            true if !peer.is_behind(self.t) => DatagramTarget::Peer(address),
            true if peer.found > 0 => DatagramTarget::Behind(address),
            _ => DatagramTarget::Unproven(address),
        };
        let mut added = Vec::new();
        match peer.dialect() {
            Dialect::Batches => {
                for batch in batch.chunks(MAX_BATCH) {
                    let id = (self.random)();
                    let hash_parts = HashParts::pack(batch.iter().map(|(_, hash_part)| hash_part));
                    self.out.push((to, Packet::QueryMany { id, hash_parts, holders_only: false }));
                    added.extend(peer.record_sent(
                        id,
                        batch.iter().map(|(id, _)| *id).collect(),
                        self.t,
                    ));
                }
            }
            Dialect::Singles | Dialect::HaveOnly => {
                for (lookup, hash_part) in batch {
                    let was_broadcast =
                        self.lookups.get_mut(*lookup).and_then(|lookup| lookup.broadcast);
                    let is_first = !peer.owes(*lookup);
                    let id = match was_broadcast.filter(|_| is_first && peer.takes_broadcasts()) {
                        Some(id) => id,
                        None => {
                            let id = (self.random)();
                            self.out.push((to, Packet::Query { id, hash_part: *hash_part }));
                            id
                        }
                    };
                    added.extend(peer.record_sent(id, Arc::new([*lookup]), self.t));
                }
            }
        }
        self.record_asked(&added, address);
    }

    /// Records in `lookups` that the peer owes them an answer.
    fn record_asked(&mut self, lookups: &[LookupId], address: SocketAddr) {
        for lookup in lookups {
            if let Some(lookup) = self.lookups.get_mut(*lookup) {
                lookup.record_asked();
            }
        }
        self.plan(address);
        self.expect_judgement(address);
    }

    /// Moves the next judgement forward to when an answer owed from `t` on becomes overdue.
    fn expect_judgement(&mut self, address: SocketAddr) {
        let median = self.median_usual();
        let at = self.peers.get(address).map(|peer| self.t + peer.due_after(median));
        self.next_overdue_check = self.next_overdue_check.into_iter().chain(at).min();
    }

    /// Asks a peer that has just become live for all lookups that were sent to other peers already.
    fn ask_open(&mut self, address: SocketAddr) {
        let sent = self.lookups.sent();
        if !sent.is_empty() {
            let batch = self.lookups.hash_parts(&sent);
            self.send_query(address, &batch);
        }
    }

    fn ask_again(&mut self, address: SocketAddr, lookups: &[LookupId]) {
        let batch = self.lookups.hash_parts(lookups);
        if !batch.is_empty() {
            self.send_query(address, &batch);
        }
    }

    fn handle_settled(&mut self, lookup: LookupId, found: Option<SocketAddr>) {
        let hash_part = self.lookups.get_mut(lookup).map(|lookup| lookup.hash_part);
        if let Some(peer) = found.and_then(|address| self.peers.get_mut(address)) {
            peer.found = peer.found.saturating_add(1);
            peer.last_found = hash_part.or(peer.last_found);
            match &mut peer.budget {
                Some(budget) => budget.reward(self.t),
                None => {
                    // The peer takes its overdue answers from the shared budget to one of its own.
                    let mut budget = WaitBudget::full(self.t);
                    if peer.is_overdue {
                        self.shared_budget.stop(self.t);
                        budget.start(self.t);
                    }
                    peer.budget = Some(budget);
                }
            }
        }
        self.lookups.settle(lookup, self.t);
        self.release(lookup);
    }

    /// Clears what peers owe the lookup.
    fn release(&mut self, lookup: LookupId) {
        let owing = self
            .peers
            .iter_mut()
            .filter_map(|(address, peer)| peer.settle(lookup).then_some(address));
        let owing: Vec<SocketAddr> = owing.collect();
        owing.into_iter().for_each(|address| self.stop_budget_if_not_overdue(address));
    }

    // Answers.

    fn handle_datagram(&mut self, from: SocketAddr, bytes: &[u8]) {
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(e) => return log::debug!("peer {from}: {e}"),
        };
        // This node receives its own broadcasts.
        if from.port() == self.settings.udp_port && self.environment.is_own(from.ip()) {
            return;
        }
        let is_peer = self.may_be_peer(from);
        match packet {
            Packet::Query { id, hash_part } => self.handle_query(from, id, hash_part),
            Packet::QueryMany { id, hash_parts, holders_only } => {
                self.handle_query_many(from, id, &hash_parts, holders_only);
            }
            _ if !is_peer => {}
            Packet::Have { id, port, url_path } => {
                // Keeps the scope ID of `from`: a link-local address is valid only with its
                // interface.
                let mut http = from;
                http.set_port(port);
                self.handle_answer(from, id, &QueryAnswer::Have(Holder { http, url_path }));
            }
            Packet::HaveNot { id } => self.handle_answer(from, id, &QueryAnswer::HaveNot),
            Packet::AnswerMany { id, held } => {
                self.handle_answer(from, id, &QueryAnswer::Many(held))
            }
            Packet::Hello(hello) => self.handle_hello(from, hello),
            Packet::Bye(bye) => self.handle_bye(from, bye),
        }
    }

    /// Handles an answer to the query with request ID `id`.
    fn handle_answer(&mut self, from: SocketAddr, id: u32, answer: &QueryAnswer) {
        let is_answer = |batch: &SentBatch| batch.id == id && answer.fits(batch.lookups.len());
        let asked = self.peers.get_mut(from).and_then(|peer| peer.take_sent(is_answer));
        let is_broadcast = asked.is_none();
        let broadcast = || self.broadcasts.get(&id).filter(|batch| is_answer(batch)).cloned();
        let Some(SentBatch { sent, lookups, .. }) = asked.or_else(broadcast) else { return };
        let Some((peer, is_first)) = self.peers.record_heard(from, MetBy::Answer, self.now) else {
            return;
        };
        let is_unknown = is_first && peer.hello.is_none();
        let became_live = peer.record_answer(sent, self.t) || is_first;
        let overtaken = peer.overtaken(sent, self.t, MAX_BATCH);
        for (at, lookup) in lookups.iter().enumerate() {
            let Some(hash_part) = self.lookups.hash_part(*lookup) else { continue };
            match answer.holder(at, hash_part, from) {
                Some(holder) => self.handle_have(from, *lookup, holder),
                None if is_broadcast => {}
                None => self.record_have_not(from, *lookup),
            }
        }
        self.stop_budget_if_not_overdue(from);
        if is_unknown {
            self.reply_to_hello(from);
        }
        self.plan(from);
        if became_live {
            self.ask_open(from);
        } else {
            self.ask_again(from, &overtaken);
        }
    }

    /// Records that the peer has answered the lookup and owes it nothing more.
    fn record_have_not(&mut self, from: SocketAddr, lookup: LookupId) {
        if self.peers.get_mut(from).is_some_and(|peer| peer.settle(lookup)) {
            self.lookups.record_settled(lookup, true);
        }
    }

    fn handle_have(&mut self, from: SocketAddr, lookup: LookupId, holder: Holder) {
        let Some(peer) = self.peers.get_mut(from) else { return };
        if peer.owes_narinfo(lookup) {
            return;
        }
        if self.lookups.add_holder(lookup, from, holder) != HolderPlace::Now {
            return self.record_have_not(from, lookup);
        }
        let was_asked = peer.owe_narinfo(lookup, self.t);
        self.lookups.record_holder(lookup, was_asked);
        self.expect_judgement(from);
    }

    /// Passes on the next holder in place of one that failed. A live one owes the narinfo from then
    /// on.
    fn replace_holder(&mut self, lookup: LookupId) {
        while let Some(address) = self.lookups.replace_holder(lookup) {
            if let Some(peer) = self.peers.get_mut(address).filter(|peer| peer.is_live()) {
                let was_asked = peer.owe_narinfo(lookup, self.t);
                self.lookups.record_holder(lookup, was_asked);
                return self.expect_judgement(address);
            }
        }
    }

    // Queries of peers.

    fn handle_query(&mut self, from: SocketAddr, id: u32, hash_part: HashPart) {
        if !self.environment.is_answered(from) {
            return;
        }
        self.record_query(from);
        let Some(held) = self.environment.query_held_paths(&[hash_part], from) else { return };
        if held.contains(&true) {
            self.out.push((
                DatagramTarget::Peer(from),
                Packet::Have { id, port: self.settings.http_port, url_path: url_path(hash_part) },
            ));
        } else if self.speaks_batches(from) {
            // The peer sends single queries only by broadcast and waits for holders only. Or it has
            // missed this node's hello and needs another one.
            self.remind_of_hello(from);
        } else {
            self.out.push((DatagramTarget::Peer(from), Packet::HaveNot { id }));
        }
    }

    fn handle_query_many(
        &mut self,
        from: SocketAddr,
        id: u32,
        hash_parts: &HashParts,
        holders_only: bool,
    ) {
        if !self.environment.is_answered(from) {
            return;
        }
        self.record_query(from);
        let hash_parts: Vec<HashPart> = hash_parts.iter().collect();
        let Some(held) = self.environment.query_held_paths(&hash_parts, from) else { return };
        let held = AnswerBits::pack(held);
        if held.any() || !holders_only {
            self.out.push((DatagramTarget::Peer(from), Packet::AnswerMany { id, held }));
        }
    }

    /// Schedules another hello to a peer, at most once in [`REMINDER_INTERVAL`].
    fn remind_of_hello(&mut self, address: SocketAddr) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        if peer.last_reminder.is_none_or(|last| last + REMINDER_INTERVAL <= self.now) {
            peer.last_reminder = Some(self.now);
            self.reply_to_hello(address);
        }
    }

    fn speaks_batches(&self, address: SocketAddr) -> bool {
        self.peers.get(address).is_some_and(|peer| peer.dialect() == Dialect::Batches)
    }

    /// Records a query from `from`. If that may be a peer and is new, this node replies with a
    /// hello and sends it the open lookups.
    fn record_query(&mut self, from: SocketAddr) {
        if !self.may_be_peer(from) {
            return;
        }
        let Some((peer, is_first)) = self.peers.record_heard(from, MetBy::Query, self.now) else {
            return;
        };
        peer.advance_probe(self.now);
        self.plan(from);
        if is_first {
            self.reply_to_hello(from);
            self.ask_open(from);
        }
    }

    // Hello, bye and probes.

    fn handle_hello(&mut self, from: SocketAddr, hello: Hello) {
        if hello.instance == self.instance {
            return;
        }
        if let Some(digest) = &hello.digest {
            self.environment.record_digest(&hello.instance, digest, from);
        }
        let met_by =
            if self.greeted.get(&from).is_some() { MetBy::NeighbourTable } else { MetBy::Hello };
        let Some((peer, is_first)) = self.peers.record_heard(from, met_by, self.now) else {
            return;
        };
        if !peer.record_hello(hello, self.now) {
            return self.plan(from);
        }
        let is_live = peer.is_live();
        let unanswered = peer.all_unanswered(MAX_BATCH);
        log::debug!("peer {from}: hello");
        self.plan(from);
        // A new instance does not know this node, and may have lost the queries to the one before
        // it.
        self.reply_to_hello(from);
        if is_first {
            self.ask_open(from);
        } else if is_live {
            self.ask_again(from, &unanswered);
        }
        if self.peers.get(from).is_some_and(|peer| peer.oldest_owed().is_none()) {
            self.probe(from);
        }
    }

    fn reply_to_hello(&mut self, to: SocketAddr) {
        self.recent_replies.retain(|at| *at + HELLO_REPLY_WINDOW > self.now);
        if self.recent_replies.len() < MAX_HELLO_REPLIES && self.environment.has_lan() {
            let spread =
                HELLO_REPLY_SPREAD.mul_f64(f64::from((self.random)()) / f64::from(u32::MAX));
            self.recent_replies.push(self.now + spread);
            self.hello_replies.entry(to).or_insert(self.now + spread);
        }
    }

    fn handle_bye(&mut self, from: SocketAddr, bye: Hello) {
        let Some(peer) = self.peers.get(from).filter(|peer| peer.is_live()) else { return };
        if peer.hello.is_some_and(|hello| hello.instance != bye.instance) {
            return;
        }
        log::debug!("peer {from}: bye");
        // Anybody can forge a bye. So the peer stays live and is probed: the bye only limits how
        // long this node waits for an answer.
        if let Some(peer) = self.peers.get_mut(from) {
            peer.record_bye(self.now);
        }
        self.plan(from);
        self.probe(from);
        self.next_overdue_check = Some(self.t);
    }

    fn set_named(&mut self, addresses: &[SocketAddr]) {
        for address in self.peers.set_named(addresses) {
            if self.environment.has_lan() {
                self.out.push((DatagramTarget::Peer(address), Packet::Hello(self.hello())));
                self.ask_open(address);
            }
        }
    }

    fn handle_network_change(&mut self) {
        (self.next_hello, self.hello_interval) = (self.now, FIRST_HELLO_INTERVAL);
        self.grace_until = self.now + HELLO_GRACE.get();
        self.next_broadcast = self.now;
        self.peers.iter_mut().for_each(|(_, peer)| peer.restart_probes(self.now));
        self.earliest_probe = Some(self.now);
        self.greeted.clear();
    }

    /// Sends hello to LAN addresses of the kernel's neighbour tables that are no peers. Broadcasts
    /// may not reach these hosts.
    fn greet(&mut self, addresses: &[SocketAddr]) {
        let mut greetings = 0;
        for address in addresses {
            let is_met = self.peers.get(*address).is_some() || self.greeted.get(address).is_some();
            let is_wanted = !is_met
                && self.environment.is_lan(*address)
                && !self.environment.is_own(address.ip());
            if is_wanted && greetings < MAX_GREETINGS {
                self.greeted.insert(*address, ());
                self.out.push((DatagramTarget::Peer(*address), Packet::Hello(self.hello())));
                greetings += 1;
            }
        }
    }

    /// Sends a probe to a peer, unless one left to any peer within [`PROBE_INTERVAL`]. Returns
    /// whether a probe was sent.
    fn probe(&mut self, address: SocketAddr) -> bool {
        if self.now < self.next_probe || !self.environment.has_lan() {
            return false;
        }
        let Some(peer) = self.peers.get_mut(address) else { return false };
        peer.record_probe(self.now, self.t);
        let id = (self.random)();
        let packet = match peer.dialect() {
            Dialect::Batches => {
                Packet::QueryMany { id, hash_parts: HashParts::pack([]), holders_only: false }
            }
            dialect => {
                let any = match dialect {
                    Dialect::Singles => Some(HashPart::from_bytes(&[0; HashPart::BYTES])),
                    // The path that Nix asked for last: the peer may have it.
                    _ => self.last_looked_up.filter(|_| peer.is_named),
                };
                match peer.last_found.or(any) {
                    Some(hash_part) => Packet::Query { id, hash_part },
                    // Broadcast queries serve as probes of this peer.
                    None => return false,
                }
            }
        };
        peer.record_sent(id, Arc::new([]), self.t);
        self.plan(address);
        self.next_probe = self.now + PROBE_INTERVAL;
        self.out.push((DatagramTarget::Unproven(address), packet));
        true
    }

    // The end of a turn.

    fn handle_tick(&mut self, drained: bool) {
        self.say_hello();
        self.send_batches();
        self.send_repeats();
        if drained {
            self.check_overdue();
        }
        for lookup in self.lookups.end_due(self.t) {
            self.release(lookup);
        }
        self.send_probes();
    }

    fn say_hello(&mut self) {
        if self.now >= self.next_hello {
            self.next_hello = self.now + self.hello_interval;
            self.hello_interval = HELLO_INTERVAL.min(self.hello_interval * 2);
            self.send_to_all(Packet::Hello(self.hello()));
            for address in self.peers.forget_old(self.now) {
                self.mark_silent(address);
            }
            if self.now >= self.next_greeting_reset {
                self.next_greeting_reset = self.now + GREETING_RESET_INTERVAL;
                self.greeted.clear();
            }
        }
        let hello = self.hello();
        self.hello_replies.retain(|to, at| {
            if *at <= self.now {
                self.out.push((DatagramTarget::Peer(*to), Packet::Hello(hello)));
            }
            *at > self.now
        });
    }

    fn send_repeats(&mut self) {
        if self.earliest_repeat.is_none_or(|at| at > self.t) {
            return;
        }
        let is_due = |peer: &LanPeer| peer.repeat_at().is_some_and(|at| at <= self.t);
        let due = self.peers.iter_mut().filter(|(_, peer)| is_due(peer));
        let repeats: Vec<_> =
            due.map(|(address, peer)| (address, peer.due_repeats(self.t, MAX_BATCH))).collect();
        self.earliest_repeat = self.peers.iter().filter_map(|(_, peer)| peer.repeat_at()).min();
        for (address, lookups) in repeats {
            self.ask_again(address, &lookups);
        }
    }

    fn median_usual(&mut self) -> Option<Duration> {
        if self.median_until.is_none_or(|until| until <= self.t) {
            self.median = self.peers.median_usual();
            self.median_until = Some(self.t + MEDIAN_AGE);
        }
        self.median
    }

    /// Starts and stops wait budgets as answers become overdue or come, and gives up the peers
    /// whose budget is used up.
    fn check_overdue(&mut self) {
        if self.next_overdue_check.is_none_or(|at| at > self.t) {
            return;
        }
        let median = self.median_usual();
        let mut given_up = Vec::new();
        for (address, peer) in self.peers.iter_mut() {
            let is_overdue =
                peer.oldest_owed().is_some_and(|since| since + peer.due_after(median) <= self.t);
            let budget = peer.budget.as_mut().unwrap_or(&mut self.shared_budget);
            if is_overdue != std::mem::replace(&mut peer.is_overdue, is_overdue) {
                if is_overdue { budget.start(self.t) } else { budget.stop(self.t) }
            }
            let is_used_up = is_overdue && budget.update(self.t).is_zero();
            if is_used_up || peer.has_left(self.t) {
                given_up.push(address);
            }
        }
        // If the shared budget is used up already, a peer is given up in the turn in which it
        // becomes overdue.
        for address in given_up {
            self.give_up(address);
        }
        self.plan_judgement();
    }

    fn plan_judgement(&mut self) {
        let median = self.median_usual();
        let mut next = self.shared_budget.used_up_at();
        for (_, peer) in self.peers.iter() {
            let overdue = peer
                .oldest_owed()
                .filter(|_| !peer.is_overdue)
                .map(|since| since + peer.due_after(median));
            let used_up = peer.budget.as_ref().and_then(WaitBudget::used_up_at);
            next = [next, overdue, used_up, peer.leaves_at()].into_iter().flatten().min();
        }
        self.next_overdue_check = next;
    }

    fn give_up(&mut self, address: SocketAddr) {
        let median = self.median_usual();
        let Some(peer) = self.peers.get_mut(address) else { return };
        let due = peer.due_after(median);
        let until = self.t.checked_sub(due).unwrap_or(self.t);
        let oldest = peer.oldest_owed();
        let is_unanswered = oldest.is_none_or(|since| peer.is_unanswered_since(since));
        let is_silent = match peer.dialect() {
            Dialect::HaveOnly => is_unanswered && peer.is_verified_silent(self.t, due),
            _ => is_unanswered,
        };
        if peer.has_left(self.t) || is_silent {
            log::debug!("peer {address}: silent");
            return self.mark_silent(address);
        }
        let owed = peer.owed_since(until);
        let narinfos: Vec<LookupId> =
            owed.iter().copied().filter(|lookup| peer.owes_narinfo(*lookup)).collect();
        for lookup in owed {
            peer.settle(lookup);
            self.lookups.record_settled(lookup, false);
        }
        if peer.dialect() == Dialect::HaveOnly
            && is_unanswered
            && let Some(hash_part) = peer.last_found
            && peer.begin_verification(self.t)
        {
            let id = (self.random)();
            peer.record_sent(id, Arc::new([]), self.t);
            self.out.push((DatagramTarget::Peer(address), Packet::Query { id, hash_part }));
            self.plan(address);
        }
        narinfos.into_iter().for_each(|lookup| self.replace_holder(lookup));
        self.stop_budget_if_not_overdue(address);
    }

    /// Makes the peer silent: it gets no queries until it answers a probe.
    fn mark_silent(&mut self, address: SocketAddr) {
        let Some(peer) = self.peers.get_mut(address) else { return };
        let owed = peer.silence(self.now);
        self.plan(address);
        for (lookup, is_narinfo) in owed {
            self.lookups.record_settled(lookup, false);
            if is_narinfo {
                self.replace_holder(lookup);
            }
        }
        self.stop_budget_if_not_overdue(address);
    }

    /// Stops the peer's wait budget if it owes less than before and is no longer overdue.
    fn stop_budget_if_not_overdue(&mut self, address: SocketAddr) {
        if !self.peers.get(address).is_some_and(|peer| peer.is_overdue) {
            return;
        }
        let median = self.median_usual();
        let Some(peer) = self.peers.get_mut(address) else { return };
        let is_overdue =
            peer.oldest_owed().is_some_and(|since| since + peer.due_after(median) <= self.t);
        if !is_overdue && std::mem::replace(&mut peer.is_overdue, false) {
            peer.budget.as_mut().unwrap_or(&mut self.shared_budget).stop(self.t);
        }
    }

    fn send_probes(&mut self) {
        if self.earliest_probe.is_none_or(|at| self.now < at.max(self.next_probe)) {
            return;
        }
        let is_due = |peer: &LanPeer| peer.next_probe().is_some_and(|at| at <= self.now);
        let due = self.peers.iter().filter(|(_, peer)| is_due(peer));
        let order = |peer: &LanPeer| (!peer.is_named, peer.found == 0, peer.next_probe());
        let mut due: Vec<_> = due.map(|(address, peer)| (order(peer), address)).collect();
        due.sort();
        for (_, address) in due {
            if self.probe(address) {
                break;
            }
        }
        self.earliest_probe = self.peers.iter().filter_map(|(_, peer)| peer.next_probe()).min();
    }

    /// Moves the search for due probes and repeats forward to this peer's next ones. To be called
    /// after each change that may make them earlier.
    fn plan(&mut self, address: SocketAddr) {
        let Some(peer) = self.peers.get(address) else { return };
        let (probe, repeat) = (peer.next_probe(), peer.repeat_at());
        self.earliest_probe = self.earliest_probe.into_iter().chain(probe).min();
        self.earliest_repeat = self.earliest_repeat.into_iter().chain(repeat).min();
    }
}

#[cfg(test)]
impl<E: Environment> Discovery<E> {
    /// Panics if a table is larger than its bound.
    pub(super) fn assert_bounds(&self) {
        self.peers.assert_bounds();
        self.lookups.assert_bounds();
        assert!(self.hello_replies.len() <= MAX_HELLO_REPLIES + 1);
        assert!(self.recent_replies.len() <= MAX_HELLO_REPLIES);
        let is_known = |at: Option<Instant>, earliest: Option<Instant>| {
            at.is_none_or(|at| earliest.is_some_and(|earliest| earliest <= at))
        };
        for (_, peer) in self.peers.iter() {
            assert!(is_known(peer.next_probe(), self.earliest_probe), "a probe would be late");
            assert!(is_known(peer.repeat_at(), self.earliest_repeat), "a repeat would be late");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Alone;

    impl Environment for Alone {
        fn is_lan(&self, _: SocketAddr) -> bool {
            true
        }
        fn has_lan(&self) -> bool {
            true
        }
        fn is_answered(&self, _: SocketAddr) -> bool {
            true
        }
        fn is_own(&self, _: std::net::IpAddr) -> bool {
            false
        }
        fn query_held_paths(&mut self, paths: &[HashPart], _: SocketAddr) -> Option<Vec<bool>> {
            Some(vec![false; paths.len()])
        }
    }

    /// Answers that fit no query: one answer for all of its paths, and too few bits. Neither
    /// decides a lookup, and the right answer after them does.
    #[test]
    fn answer_that_does_not_fit_its_query_is_ignored() {
        let start = Instant::now();
        let mut numbers = 0;
        let random = Box::new(move || {
            numbers += 1;
            numbers
        });
        let settings = DiscoverySettings {
            http_port: 12304,
            udp_port: 12304,
            timeout: Duration::from_millis(200),
        };
        let mut discovery = Discovery::new(Alone, settings, random, start);
        let peer = SocketAddr::from(([10, 0, 0, 2], 12304));
        let hello =
            Hello { port: 12304, instance: [7; 8], batches: true, crowded: false, digest: None };
        let receive = |discovery: &mut Discovery<Alone>, packet: Packet| {
            let bytes = packet.encode();
            discovery.handle(Event::Datagram { from: peer, bytes: &bytes }, start);
        };
        receive(&mut discovery, Packet::Hello(hello));
        // Nine paths, so that an answer has two bytes.
        let updates: Vec<_> = (0..9)
            .map(|number| {
                let (updates, receiver) = crossbeam_channel::bounded(LookupRequest::CAPACITY);
                let hash_part = HashPart::from_bytes(&[number; HashPart::BYTES]);
                let lookup = LookupRequest { id: u64::from(number), hash_part, updates };
                discovery.handle(Event::LookUp(lookup), start);
                receiver
            })
            .collect();
        discovery.handle(Event::Tick { drained: true }, start);
        let id = discovery.outgoing().iter().find_map(|(_, packet)| match packet {
            Packet::QueryMany { id, hash_parts, .. } => {
                (hash_parts.iter().count() == 9).then_some(*id)
            }
            _ => None,
        });
        let id = id.expect("a query to the peer");
        receive(&mut discovery, Packet::Have { id, port: 12304, url_path: "local/x".into() });
        receive(&mut discovery, Packet::HaveNot { id });
        receive(&mut discovery, Packet::AnswerMany { id, held: AnswerBits::pack([true]) });
        assert!(updates.iter().all(|updates| updates.try_recv().is_err()), "ignored");
        let held = AnswerBits::pack((0..9).map(|number| number == 8));
        receive(&mut discovery, Packet::AnswerMany { id, held });
        let found = updates
            .iter()
            .map(|updates| matches!(updates.try_recv(), Ok(LookupUpdate::Holder { .. })));
        assert_eq!(found.collect::<Vec<_>>(), (0..9).map(|number| number == 8).collect::<Vec<_>>());
    }
}
