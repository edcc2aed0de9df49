//! A deterministic simulation of LAN discovery. It runs the real state machine on many nodes in
//! virtual time. The simulated network loses, delays, duplicates and reorders packets. Nodes pause,
//! vanish, restart, lie, or are of other versions.
//!
//! All randomness comes from one seed. [`properties`] checks invariants for many seeds. [`scenes`]
//! checks named situations and their costs. [`table`] prints costs by number of nodes. `make
//! simulate` runs more seeds: `PEERIX_SIMULATION_SEEDS=100000`. `PEERIX_SIMULATION_TRACE=<seed>`
//! prints the packets of one run.

use super::discovery::{Discovery, DiscoverySettings, Event};
use super::environment::Environment;
use super::lookups::{LOOKUP_TIMEOUT, LookupId, LookupRequest, LookupUpdate};
use super::outgoing::DatagramTarget;
use crate::lock::Mutex;
use crate::nix::HashPart;
use crate::wire::{AnswerBits, Hello, Packet};
use crossbeam_channel::{Receiver, TryRecvError, bounded};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod properties;
mod scenes;
mod table;

const PORT: u16 = 12304;
/// Source ports of a node's second and third socket.
const SECOND_PORT: u16 = 40_000;
const THIRD_PORT: u16 = 40_001;
/// Capacity of a node's receive buffer, in datagrams. A full buffer drops further datagrams.
const RECEIVE_BUFFER: usize = 1000;
/// Capacity of a socket's send buffer, in datagrams: the kernel grants 416 KiB, of which a datagram
/// with 25 hash parts takes 1,280 bytes. A full buffer drops further datagrams.
const SEND_BUFFER: usize = 332;
/// Time for which a datagram to a host that does not answer ARP stays in the send buffer.
const ARP_TIMEOUT: Duration = Duration::from_secs(3);

const US: Duration = Duration::from_micros(1);
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

/// A generator of pseudo-random numbers (xorshift64*). The same seed gives the same numbers.
#[derive(Clone)]
struct SeededRandom(u64);

impl SeededRandom {
    fn new(seed: u64) -> Self {
        // A small seed would yield small numbers at first.
        let mut random =
            SeededRandom(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5851_f42d_4c95_7f2d);
        for _ in 0..4 {
            random.next();
        }
        random
    }

    fn next(&mut self) -> u64 {
        self.0 = if self.0 == 0 { 1 } else { self.0 };
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number from 0 to `below - 1`; 0 if `below` is 0.
    fn below(&mut self, below: u64) -> u64 {
        (self.next() >> 11) % below.max(1)
    }

    /// Returns true with this probability.
    fn chance(&mut self, probability: f64) -> bool {
        (self.next() >> 11) as f64 / ((1u64 << 53) as f64) < probability
    }

    fn between(&mut self, low: Duration, high: Duration) -> Duration {
        low + US
            * u32::try_from(self.below((high.saturating_sub(low)).as_micros() as u64 + 1))
                .unwrap_or(0)
    }
}

/// Implementation or fault of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// This release.
    Node,
    /// peerix 0.1: single queries, *have* and *have not*.
    Single,
    /// The Python peerix: works for 20 ms on each query, one at a time, and answers only *have*.
    Original,
    /// A node that answers probes at once and queries after 2.9 s.
    Late,
    /// A node that ignores half of the paths: it does not answer a batch that contains one of them.
    Half,
    /// A node that says hello and answers no query.
    Firewalled,
    /// A hello from an address without a host.
    Forged,
}

struct SimulatedStore {
    own: IpAddr,
    held: Arc<Mutex<BTreeSet<HashPart>>>,
}

impl Environment for SimulatedStore {
    fn is_lan(&self, address: SocketAddr) -> bool {
        matches!(address.ip(), IpAddr::V4(ip) if ip.octets()[0] == 10)
    }
    fn is_answered(&self, address: SocketAddr) -> bool {
        self.is_lan(address)
    }
    fn is_own(&self, ip: IpAddr) -> bool {
        ip == self.own
    }
    fn query_held_paths(&mut self, hash_parts: &[HashPart], _: SocketAddr) -> Option<Vec<bool>> {
        let held = self.held.lock();
        Some(hash_parts.iter().map(|hash_part| held.contains(hash_part)).collect())
    }
}

/// A lookup under way.
struct Active {
    path: HashPart,
    began: Duration,
    updates: Receiver<LookupUpdate>,
    /// Holders that were not asked for the narinfo yet.
    waiting: VecDeque<SocketAddr>,
    requests: u32,
    connection: u32,
}

/// The outcome of a lookup.
#[derive(Debug, Clone)]
struct Outcome {
    path: HashPart,
    node: usize,
    began: Duration,
    elapsed: Duration,
    found: bool,
}

struct Host {
    ip: IpAddr,
    kind: Kind,
    machine: Option<Discovery<SimulatedStore>>,
    held: Arc<Mutex<BTreeSet<HashPart>>>,
    is_up: bool,
    paused_until: Option<Duration>,
    /// Until when the host is disconnected from the network.
    unplugged_until: Duration,
    inbox: VecDeque<(SocketAddr, Rc<[u8]>)>,
    /// For each source port, the times until which datagrams wait for ARP.
    waiting_for_arp: BTreeMap<u16, VecDeque<Duration>>,
    wake: Duration,
    active: BTreeMap<LookupId, Active>,
    /// Until when a host of [`Kind::Original`] works on queries.
    busy_until: Duration,
    latency: (Duration, Duration),
    instance: u64,
}

enum Act {
    Deliver { to: usize, from: SocketAddr, bytes: Rc<[u8]> },
    Wake(usize),
    Answer { from: usize, to: SocketAddr, packet: Packet },
    Begin { node: usize, connection: u32 },
    Hedge { node: usize, lookup: LookupId },
    Narinfo { node: usize, lookup: LookupId, peer: SocketAddr, holder: usize },
    Run(Box<dyn FnOnce(&mut Simulation)>),
}

/// The paths that a node looks up.
struct Workload {
    paths: Vec<HashPart>,
    next: usize,
    /// Whether it starts again after the last path.
    repeats: bool,
}

struct Simulation {
    seed: u64,
    random: SeededRandom,
    base: Instant,
    now: Duration,
    sequence: u64,
    queue: BTreeMap<(Duration, u64), Act>,
    hosts: Vec<Host>,
    by_ip: BTreeMap<IpAddr, usize>,
    workloads: BTreeMap<usize, Workload>,
    next_lookup: LookupId,
    loss: f64,
    duplication: f64,
    /// Time from an answer to the next request of the same connection.
    think: Duration,
    outcomes: Vec<Outcome>,
    packets: u64,
    bytes: u64,
    /// Number of datagrams dropped because the send buffer of a first or second socket was full.
    dropped: u64,
    /// Whether every packet is printed: `PEERIX_SIMULATION_TRACE` is the seed.
    is_traced: bool,
}

fn ip_of(index: usize) -> IpAddr {
    Ipv4Addr::from_bits(0x0a00_0001 + u32::try_from(index).unwrap()).into()
}

/// The path with this number.
fn path(number: u64) -> HashPart {
    let mut bytes = [0; HashPart::BYTES];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    HashPart::from_bytes(&bytes)
}

impl Simulation {
    fn new(seed: u64) -> Self {
        Simulation {
            seed,
            random: SeededRandom::new(seed),
            base: Instant::now(),
            now: Duration::ZERO,
            sequence: 0,
            queue: BTreeMap::new(),
            hosts: Vec::new(),
            by_ip: BTreeMap::new(),
            workloads: BTreeMap::new(),
            next_lookup: 0,
            loss: 0.0,
            duplication: 0.0,
            think: 10 * MS,
            outcomes: Vec::new(),
            packets: 0,
            bytes: 0,
            dropped: 0,
            is_traced: std::env::var("PEERIX_SIMULATION_TRACE")
                .is_ok_and(|traced| traced == seed.to_string()),
        }
    }

    fn at(&mut self, time: Duration, act: Act) {
        self.sequence += 1;
        self.queue.insert((time.max(self.now), self.sequence), act);
    }

    fn run_at(&mut self, time: Duration, act: impl FnOnce(&mut Simulation) + 'static) {
        self.at(time, Act::Run(Box::new(act)));
    }

    /// Adds a host that starts at `start`.
    fn add(&mut self, kind: Kind, start: Duration) -> usize {
        let index = self.hosts.len();
        let ip = ip_of(index);
        self.hosts.push(Host {
            ip,
            kind,
            machine: None,
            held: Arc::default(),
            is_up: false,
            paused_until: None,
            unplugged_until: Duration::ZERO,
            inbox: VecDeque::new(),
            waiting_for_arp: BTreeMap::new(),
            wake: Duration::MAX,
            active: BTreeMap::new(),
            busy_until: Duration::ZERO,
            latency: (50 * US, 100 * US),
            instance: index as u64,
        });
        self.by_ip.insert(ip, index);
        self.run_at(start, move |simulation| simulation.start(index));
        index
    }

    /// Adds `count` hosts that start within the first 100 ms.
    fn add_all(&mut self, kind: Kind, count: usize) -> Vec<usize> {
        (0..count)
            .map(|_| {
                let start = self.random.between(Duration::ZERO, 100 * MS);
                self.add(kind, start)
            })
            .collect()
    }

    fn start(&mut self, index: usize) {
        let now = self.base + self.now;
        let mut random = SeededRandom::new(self.random.next());
        let host = &mut self.hosts[index];
        host.is_up = true;
        host.instance = random.next();
        if host.kind == Kind::Node {
            let settings = DiscoverySettings { port: PORT, has_lan: true, timeout: 50 * MS };
            let store = SimulatedStore { own: host.ip, held: host.held.clone() };
            let ids = Box::new(move || random.next() as u32);
            host.machine = Some(Discovery::new(store, settings, ids, now));
            self.turn(index);
        } else if host.kind != Kind::Original {
            self.say_hello(index);
        }
    }

    /// Makes a host of a scripted kind say hello now and every 30 s.
    fn say_hello(&mut self, index: usize) {
        let host = &self.hosts[index];
        if host.is_up && host.kind != Kind::Original {
            let hello = self.hello_of(index);
            self.send(index, PORT, DatagramTarget::Everyone, &hello);
            self.run_at(self.now + 30 * SECOND, move |simulation| simulation.say_hello(index));
        }
    }

    fn hello_of(&self, index: usize) -> Packet {
        let host = &self.hosts[index];
        let batches = host.kind != Kind::Single;
        Packet::Hello(Hello {
            port: PORT,
            instance: host.instance.to_le_bytes(),
            crowded: false,
            batches,
            digest: None,
        })
    }

    /// Switches the host off. It sends nothing more.
    fn vanish(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        host.is_up = false;
        host.machine = None;
        host.inbox.clear();
    }

    /// Makes the daemon say *bye* and stop, and start again after `pause`.
    fn restart(&mut self, index: usize, pause: Duration) {
        if let Some(machine) = &mut self.hosts[index].machine {
            machine.bye();
        }
        self.send_all(index);
        self.vanish(index);
        self.run_at(self.now + pause, move |simulation| simulation.start(index));
    }

    fn pause(&mut self, index: usize, time: Duration) {
        let until = self.now + time;
        self.hosts[index].paused_until = Some(until);
        self.run_at(until, move |simulation| {
            simulation.hosts[index].paused_until = None;
            simulation.turn(index);
        });
    }

    fn unplug(&mut self, index: usize, time: Duration) {
        self.hosts[index].unplugged_until = self.now + time;
    }

    /// Looks up `paths` over `connections` connections from `start` on.
    fn ask(
        &mut self,
        node: usize,
        paths: Vec<HashPart>,
        connections: u32,
        start: Duration,
        repeats: bool,
    ) {
        self.workloads.insert(node, Workload { paths, next: 0, repeats });
        for connection in 0..connections {
            let jitter = self.random.between(Duration::ZERO, MS);
            self.at(start + jitter, Act::Begin { node, connection });
        }
    }

    /// Runs until no lookup is left, or until `limit`.
    fn run(&mut self, limit: Duration) {
        while let Some(((time, _), act)) = self.queue.pop_first() {
            if time > limit {
                self.queue.insert((time, u64::MAX), act);
                break;
            }
            self.now = time;
            self.act(act);
            let is_done = |(node, work): (&usize, &Workload)| {
                !work.repeats
                    && work.next >= work.paths.len()
                    && self.hosts[*node].active.is_empty()
            };
            if !self.workloads.is_empty() && self.workloads.iter().all(is_done) {
                return;
            }
        }
        self.now = self.now.max(limit);
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Deliver { to, from, bytes } => self.deliver(to, from, bytes),
            Act::Wake(index) => {
                if self.hosts[index].wake == self.now {
                    self.turn(index);
                }
            }
            Act::Answer { from, to, packet } => {
                if self.hosts[from].is_up {
                    self.send(from, PORT, DatagramTarget::Peer(to), &packet);
                }
            }
            Act::Begin { node, connection } => self.begin(node, connection),
            Act::Hedge { node, lookup } => self.hedge(node, lookup),
            Act::Narinfo { node, lookup, peer, holder } => self.narinfo(node, lookup, peer, holder),
            Act::Run(run) => run(self),
        }
    }

    fn is_reachable(&self, index: usize) -> bool {
        self.hosts[index].is_up && self.hosts[index].unplugged_until <= self.now
    }

    /// Whether the host answers ARP. As the worst case, no host has a valid ARP entry of another.
    fn answers_arp(&self, index: usize) -> bool {
        self.is_reachable(index) && self.hosts[index].kind != Kind::Forged
    }

    fn send(&mut self, from: usize, port: u16, to: DatagramTarget, packet: &Packet) {
        let bytes: Rc<[u8]> = packet.encode().into();
        self.packets += 1;
        self.bytes += bytes.len() as u64 + 28;
        let source = SocketAddr::new(self.hosts[from].ip, port);
        if self.is_traced {
            println!("{:?} {source} to {to:?}: {packet:?}", self.now);
        }
        if self.hosts[from].unplugged_until > self.now {
            return;
        }
        let waiting = self.hosts[from].waiting_for_arp.entry(port).or_default();
        while waiting.front().is_some_and(|until| *until <= self.now) {
            waiting.pop_front();
        }
        if waiting.len() >= SEND_BUFFER {
            self.dropped += u64::from(port != THIRD_PORT);
            return;
        }
        let targets: Vec<usize> = match to {
            DatagramTarget::Peer(to)
            | DatagramTarget::Behind(to)
            | DatagramTarget::Unproven(to) => {
                let target = self.by_ip.get(&to.ip()).copied();
                if target.is_none_or(|target| !self.answers_arp(target)) {
                    let until = self.now + ARP_TIMEOUT;
                    self.hosts[from].waiting_for_arp.entry(port).or_default().push_back(until);
                    return;
                }
                target.into_iter().collect()
            }
            DatagramTarget::Everyone => {
                (0..self.hosts.len()).filter(|index| *index != from).collect()
            }
        };
        for to in targets {
            let copies =
                1 + u32::from(self.duplication > 0.0 && self.random.chance(self.duplication));
            for _ in 0..copies {
                if self.loss > 0.0 && self.random.chance(self.loss) || !self.is_reachable(to) {
                    continue;
                }
                let (low, high) = self.hosts[to].latency.max(self.hosts[from].latency);
                let latency = self.random.between(low, high);
                self.at(
                    self.now + latency,
                    Act::Deliver { to, from: source, bytes: bytes.clone() },
                );
            }
        }
    }

    /// Sends the datagrams that the node's state machine has ready.
    fn send_all(&mut self, from: usize) {
        let Some(machine) = &mut self.hosts[from].machine else { return };
        for (to, packet) in std::mem::take(machine.outgoing()) {
            let port = match to {
                DatagramTarget::Peer(_) | DatagramTarget::Everyone => PORT,
                DatagramTarget::Behind(_) => SECOND_PORT,
                DatagramTarget::Unproven(_) => THIRD_PORT,
            };
            self.send(from, port, to, &packet);
        }
    }

    fn deliver(&mut self, to: usize, from: SocketAddr, bytes: Rc<[u8]>) {
        let host = &mut self.hosts[to];
        if !host.is_up {
            return;
        }
        if host.inbox.len() < RECEIVE_BUFFER {
            host.inbox.push_back((from, bytes));
        }
        if host.paused_until.is_none() {
            self.turn(to);
        }
    }

    /// Runs one turn of a node's event loop, or the script of another kind.
    fn turn(&mut self, index: usize) {
        let now = self.base + self.now;
        let host = &mut self.hosts[index];
        if !host.is_up || host.paused_until.is_some() {
            return;
        }
        let inbox = std::mem::take(&mut host.inbox);
        if let Some(machine) = &mut host.machine {
            for (from, bytes) in inbox {
                machine.handle(Event::Datagram { from, bytes: &bytes }, now);
            }
            machine.handle(Event::Tick { drained: true }, now);
            self.send_all(index);
            self.collect(index);
            self.plan(index);
        } else {
            for (from, bytes) in inbox {
                self.script(index, from, &bytes);
            }
        }
    }

    fn plan(&mut self, index: usize) {
        let Some(machine) = &self.hosts[index].machine else { return };
        // A turn takes some time, even if the next one is due at once.
        let wake =
            (machine.next_turn().saturating_duration_since(self.base)).max(self.now + 5 * US);
        // A turn that comes too early plans the next one.
        if wake < self.hosts[index].wake || self.hosts[index].wake <= self.now {
            self.hosts[index].wake = wake;
            self.at(wake, Act::Wake(index));
        }
    }

    fn event(&mut self, index: usize, event: Event<'_>) {
        let now = self.base + self.now;
        if let Some(machine) = &mut self.hosts[index].machine {
            machine.handle(event, now);
        }
        self.send_all(index);
        self.turn(index);
    }

    /// Handles a datagram at a host of a scripted kind.
    fn script(&mut self, index: usize, from: SocketAddr, bytes: &[u8]) {
        let Ok(packet) = Packet::parse(bytes) else { return };
        let (kind, now) = (self.hosts[index].kind, self.now);
        let has = |host: &Host, hash_part: &HashPart| host.held.lock().contains(hash_part);
        let have = |id, hash_part: HashPart| {
            let url_path = format!("local/{hash_part}.narinfo");
            Packet::Have { id, port: PORT, url_path }
        };
        match (kind, packet) {
            (Kind::Single, Packet::Query { id, hash_part }) => {
                let held = has(&self.hosts[index], &hash_part);
                let packet = if held { have(id, hash_part) } else { Packet::HaveNot { id } };
                self.at(now, Act::Answer { from: index, to: from, packet });
            }
            (Kind::Original, Packet::Query { id, hash_part }) => {
                let host = &mut self.hosts[index];
                host.busy_until = host.busy_until.max(now) + 20 * MS;
                let (at, held) = (host.busy_until, has(host, &hash_part));
                if held {
                    self.at(at, Act::Answer { from: index, to: from, packet: have(id, hash_part) });
                }
            }
            (Kind::Late | Kind::Half, Packet::QueryMany { id, hash_parts, holders_only }) => {
                let is_ignored = |part: HashPart| part.to_bytes()[1] & 1 == 1;
                if kind == Kind::Half && hash_parts.iter().any(is_ignored) {
                    return;
                }
                let held =
                    AnswerBits::pack(hash_parts.iter().map(|part| has(&self.hosts[index], &part)));
                let is_probe = hash_parts.is_empty();
                let delay =
                    if kind == Kind::Late && !is_probe { 2900 * MS } else { Duration::ZERO };
                if held.any() || !holders_only {
                    let packet = Packet::AnswerMany { id, held };
                    self.at(now + delay, Act::Answer { from: index, to: from, packet });
                }
            }
            (
                Kind::Single | Kind::Late | Kind::Half | Kind::Firewalled | Kind::Forged,
                Packet::Hello(_),
            ) => {
                let packet = self.hello_of(index);
                let delay = self.random.between(Duration::ZERO, 50 * MS);
                // Half of the hellos get no reply, so that two such hosts stop greeting each other.
                if self.random.chance(0.5) {
                    self.at(now + delay, Act::Answer { from: index, to: from, packet });
                }
            }
            _ => {}
        }
    }

    fn begin(&mut self, node: usize, connection: u32) {
        let Some(work) = self.workloads.get_mut(&node) else { return };
        if work.next >= work.paths.len() && work.repeats {
            work.next = 0;
        }
        let Some(path) = work.paths.get(work.next).copied() else { return };
        work.next += 1;
        let id = self.next_lookup;
        self.next_lookup += 1;
        let (updates, receiver) = bounded(LookupRequest::CAPACITY);
        let active = Active {
            path,
            began: self.now,
            updates: receiver,
            waiting: VecDeque::new(),
            requests: 0,
            connection,
        };
        self.hosts[node].active.insert(id, active);
        self.event(node, Event::LookUp(LookupRequest { id, hash_part: path, updates }));
    }

    /// Handles the updates of all lookups of a node.
    fn collect(&mut self, node: usize) {
        let ids: Vec<LookupId> = self.hosts[node].active.keys().copied().collect();
        for id in ids {
            while let Some(active) = self.hosts[node].active.get_mut(&id) {
                match active.updates.try_recv() {
                    Ok(LookupUpdate::Holder { peer, .. }) => {
                        active.waiting.push_back(peer);
                        if active.requests == 0 {
                            self.hedge(node, id);
                        }
                    }
                    Ok(LookupUpdate::Ended { .. }) | Err(TryRecvError::Disconnected) => {
                        self.end(node, id, false)
                    }
                    Err(TryRecvError::Empty) => break,
                }
            }
        }
    }

    /// Requests the narinfo from the next holder, and from another one after 100 ms.
    fn hedge(&mut self, node: usize, lookup: LookupId) {
        let Some(active) = self.hosts[node].active.get_mut(&lookup) else { return };
        let Some(peer) = active.waiting.pop_front() else { return };
        active.requests += 1;
        let Some(&holder) = self.by_ip.get(&peer.ip()) else { return };
        let (low, high) = self.hosts[holder].latency.max(self.hosts[node].latency);
        // Time of connection, request and answer. TCP repeats a lost segment after 200 ms.
        let lost = if self.loss > 0.0 && self.random.chance(self.loss * 2.0) {
            200 * MS
        } else {
            Duration::ZERO
        };
        let time = 300 * US + self.random.between(low, high) * 2 + lost;
        self.at(self.now + time, Act::Narinfo { node, lookup, peer, holder });
        self.at(self.now + 100 * MS, Act::Hedge { node, lookup });
    }

    fn narinfo(&mut self, node: usize, lookup: LookupId, peer: SocketAddr, holder: usize) {
        let Some(active) = self.hosts[node].active.get(&lookup) else { return };
        let (path, host) = (active.path, &self.hosts[holder]);
        let until = host.paused_until.unwrap_or_default().max(host.unplugged_until);
        let until = until.max(self.hosts[node].unplugged_until);
        if until > self.now || !host.is_up {
            // The answer comes once both hosts are reachable. TCP, or the next request, needs up to
            // 200 ms more.
            let again = until.max(self.now) + self.random.between(MS, 200 * MS);
            return self.at(again, Act::Narinfo { node, lookup, peer, holder });
        }
        if host.held.lock().contains(&path) {
            self.end(node, lookup, true);
            self.event(node, Event::Settled { lookup, found: Some(peer) });
        } else {
            self.failed(node, lookup, peer);
        }
    }

    fn failed(&mut self, node: usize, lookup: LookupId, peer: SocketAddr) {
        if let Some(active) = self.hosts[node].active.get_mut(&lookup) {
            active.requests = 0;
        }
        self.event(node, Event::Failed { lookup, peer });
        self.hedge(node, lookup);
    }

    fn end(&mut self, node: usize, lookup: LookupId, found: bool) {
        let Some(active) = self.hosts[node].active.remove(&lookup) else { return };
        let elapsed = self.now - active.began;
        self.outcomes.push(Outcome {
            path: active.path,
            node,
            began: active.began,
            elapsed,
            found,
        });
        self.at(self.now + self.think, Act::Begin { node, connection: active.connection });
    }

    /// The misses of paths that a live host has.
    fn wrong_misses(&self) -> Vec<&Outcome> {
        let is_live =
            |host: &Host| host.is_up && !matches!(host.kind, Kind::Firewalled | Kind::Forged);
        let is_wrong = |outcome: &&Outcome| {
            let mut others =
                self.hosts.iter().enumerate().filter(|(index, _)| *index != outcome.node);
            !outcome.found
                && others.any(|(_, host)| is_live(host) && host.held.lock().contains(&outcome.path))
        };
        self.outcomes.iter().filter(is_wrong).collect()
    }

    fn machine(&self, index: usize) -> &Discovery<SimulatedStore> {
        self.hosts[index].machine.as_ref().unwrap()
    }

    fn hold(&mut self, index: usize, paths: &[HashPart]) {
        self.hosts[index].held.lock().extend(paths.iter().copied());
    }

    fn slowest(&self) -> Duration {
        self.outcomes.iter().map(|outcome| outcome.elapsed).max().unwrap_or_default()
    }

    fn longer_than(&self, time: Duration) -> usize {
        self.outcomes.iter().filter(|outcome| outcome.elapsed > time).count()
    }
}

/// Upper bound of the duration of a lookup, with a margin for a turn of the loop.
fn longest() -> Duration {
    LOOKUP_TIMEOUT.get() + Duration::from_millis(250)
}
