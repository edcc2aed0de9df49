//! State machine of LAN discovery: passes each [`Event`] on to this node's own lookups
//! ([`Querier`]) and to the hellos ([`Hellos`]), and answers the queries of other nodes. It does no
//! I/O. The caller passes in time and random numbers, so the simulation runs the same code.

use super::environment::Environment;
use super::hellos::Hellos;
use super::lookups::{Holder, LookupId, LookupRequest, LookupUpdate};
use super::outgoing::{DatagramTarget, OutgoingDatagrams};
use super::peer::{Dialect, MetBy, Neighbour};
use super::querier::{Querier, QueryAnswer, RandomSource};
use crate::nix::HashPart;
use crate::wire::{AnswerBits, HashParts, Hello, Packet};
use crossbeam_channel::Sender;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

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

/// Settings of a node that do not change while it runs.
#[derive(Debug, Clone)]
pub struct DiscoverySettings {
    /// UDP port of this node and of its peers, and TCP port of this node's HTTP server.
    pub port: u16,
    /// Whether this node uses the LAN. If not, it only answers queries and sends nothing else.
    pub has_lan: bool,
    /// How long a lookup waits for answers of unknown peers to a broadcast: `--timeout`.
    pub timeout: Duration,
}

/// State machine of LAN discovery, without I/O. The caller passes it [`Event`]s and sends the
/// datagrams that it returns.
pub struct Discovery<E> {
    environment: E,
    settings: DiscoverySettings,
    hellos: Hellos,
    querier: Querier,
}

impl<E: Environment> Discovery<E> {
    /// Creates the state of a node that starts at `now`. The first hello is due at once.
    pub fn new(
        environment: E,
        settings: DiscoverySettings,
        mut random: RandomSource,
        now: Instant,
    ) -> Self {
        let instance = (u64::from(random()) << 32 | u64::from(random())).to_be_bytes();
        let digest = environment.digest(&instance);
        let hello = Hello { port: settings.port, instance, crowded: false, batches: true, digest };
        Discovery {
            environment,
            hellos: Hellos::new(hello, settings.has_lan, now),
            querier: Querier::new(settings.timeout, random, now),
            settings,
        }
    }

    /// Handles one event at real time `now`. The caller ends each turn of its loop with
    /// [`Event::Tick`], and then sends [`Discovery::outgoing`]. Blocks only for
    /// [`Environment::query_held_paths`], which takes 50 ms at most.
    pub fn handle(&mut self, event: Event<'_>, now: Instant) {
        self.querier.advance(now);
        match event {
            Event::Datagram { from, bytes } => self.handle_datagram(from, bytes),
            Event::LookUp(request) if self.settings.has_lan => self.querier.handle_lookup(request),
            Event::LookUp(request) => {
                let ended = LookupUpdate::Ended { asked: 0, unanswered: 0 };
                let _ = request.updates.try_send(ended);
            }
            Event::Settled { lookup, found } => self.querier.handle_settled(lookup, found),
            Event::Failed { lookup, peer } => self.querier.handle_failed(lookup, peer),
            Event::SetNamed(addresses) => self.hellos.set_named(&addresses, &mut self.querier),
            Event::ListPeers(list) => {
                let peers = self.querier.peers.iter();
                let _ =
                    list.try_send(peers.map(|(address, peer)| peer.describe(address)).collect());
            }
            Event::NetworkChanged => {
                self.hellos.handle_network_change(now);
                self.querier.handle_network_change();
            }
            Event::KernelNeighbours(addresses) => {
                let is_wanted = |address: &SocketAddr| {
                    self.environment.is_lan(*address) && !self.environment.is_own(address.ip())
                };
                self.hellos.greet(addresses.into_iter().filter(is_wanted), &mut self.querier);
            }
            Event::Tick { drained } => {
                self.hellos.send_due(&mut self.querier);
                self.querier.end_turn(drained);
            }
        }
    }

    /// The datagrams to send. The caller removes those that it has sent.
    pub fn outgoing(&mut self) -> &mut OutgoingDatagrams {
        &mut self.querier.out
    }

    /// Returns when the caller has to run the next turn if no event comes before.
    pub fn next_turn(&self) -> Instant {
        self.querier.next_turn().into_iter().fold(self.hellos.next_due(), Instant::min)
    }

    /// Adds the *bye* packets to [`Discovery::outgoing`]: a broadcast, and one for each peer that
    /// `--peer` names.
    pub fn bye(&mut self) {
        self.hellos.bye(&mut self.querier);
    }

    /// Settings of the node.
    pub fn settings(&self) -> &DiscoverySettings {
        &self.settings
    }

    fn handle_datagram(&mut self, from: SocketAddr, bytes: &[u8]) {
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(e) => return log::debug!("peer {from}: {e}"),
        };
        // This node receives its own broadcasts.
        if from.port() == self.settings.port && self.environment.is_own(from.ip()) {
            return;
        }
        match packet {
            Packet::Query { id, hash_part } => self.handle_query(from, id, hash_part),
            Packet::QueryMany { id, hash_parts, holders_only } => {
                self.handle_query_many(from, id, &hash_parts, holders_only);
            }
            _ if !self.may_be_peer(from) => {}
            Packet::Have { id, port, url_path } => {
                // Keeps the scope ID of `from`: a link-local address is valid only with its
                // interface.
                let mut http = from;
                http.set_port(port);
                self.handle_answer(from, id, &QueryAnswer::One(Some(Holder { http, url_path })));
            }
            Packet::HaveNot { id } => self.handle_answer(from, id, &QueryAnswer::One(None)),
            Packet::AnswerMany { id, held } => {
                self.handle_answer(from, id, &QueryAnswer::Many(held))
            }
            Packet::Hello(hello) if hello.instance == self.hellos.own.instance => {}
            Packet::Hello(hello) => {
                if let Some(digest) = &hello.digest {
                    self.environment.record_digest(&hello.instance, digest, from);
                }
                self.hellos.handle_hello(from, hello, &mut self.querier);
            }
            Packet::Bye(bye) => self.hellos.handle_bye(from, bye, &mut self.querier),
        }
    }

    /// Whether a packet from `from` may come from a peer. Peers send from the port that they listen
    /// on, so each neighbour is one peer. Only a peer that `--peer` names may use another port.
    fn may_be_peer(&self, from: SocketAddr) -> bool {
        let is_named = || self.querier.peers.get(from).is_some_and(|peer| peer.is_named);
        self.environment.is_lan(from) && (from.port() == self.settings.port || is_named())
    }

    fn handle_answer(&mut self, from: SocketAddr, id: u32, answer: &QueryAnswer) {
        if self.querier.handle_answer(from, id, answer) {
            self.hellos.reply_to(from, &mut self.querier);
        }
    }

    // Queries of other nodes.

    fn handle_query(&mut self, from: SocketAddr, id: u32, hash_part: HashPart) {
        let Some(held) = self.held_paths(from, &[hash_part]) else { return };
        let peer = self.querier.peers.get_mut(from);
        let packet = match peer.filter(|peer| peer.dialect() == Dialect::Batches) {
            _ if held.contains(&true) => {
                let Holder { url_path, .. } = Holder::peerix(from, &hash_part);
                Packet::Have { id, port: self.settings.port, url_path }
            }
            // The peer sends single queries only by broadcast and waits for holders only. Or it has
            // missed this node's hello and needs another one.
            Some(peer) => {
                if peer.record_reminder(self.querier.now) {
                    self.hellos.reply_to(from, &mut self.querier);
                }
                return;
            }
            None => Packet::HaveNot { id },
        };
        self.querier.out.push((DatagramTarget::Peer(from), packet));
    }

    fn handle_query_many(
        &mut self,
        from: SocketAddr,
        id: u32,
        parts: &HashParts,
        holders_only: bool,
    ) {
        let hash_parts: Vec<HashPart> = parts.iter().collect();
        let Some(held) = self.held_paths(from, &hash_parts) else { return };
        let held = AnswerBits::pack(held);
        if held.any() || !holders_only {
            self.querier.out.push((DatagramTarget::Peer(from), Packet::AnswerMany { id, held }));
        }
    }

    /// Records a query, and returns which of the paths this node has for the sender. Returns `None`
    /// if the query is not answered. If the sender may be a peer and is new, this node replies with
    /// a hello and sends it the open lookups.
    fn held_paths(&mut self, from: SocketAddr, hash_parts: &[HashPart]) -> Option<Vec<bool>> {
        if !self.environment.is_answered(from) {
            return None;
        }
        let now = self.querier.now;
        if self.may_be_peer(from)
            && let Some((peer, is_first)) = self.querier.peers.record_heard(from, MetBy::Query, now)
        {
            peer.liveness.advance_probe(now);
            if is_first {
                self.hellos.reply_to(from, &mut self.querier);
                self.querier.ask_open(from);
            }
        }
        self.environment.query_held_paths(hash_parts, from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl<E: Environment> Discovery<E> {
        /// Panics if a table is larger than its bound.
        pub fn assert_bounds(&self) {
            self.hellos.assert_bounds();
            self.querier.assert_bounds();
        }
    }

    struct Alone;

    impl Environment for Alone {
        fn is_lan(&self, _: SocketAddr) -> bool {
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
        let settings =
            DiscoverySettings { port: 12304, has_lan: true, timeout: Duration::from_millis(200) };
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
