//! A deterministic simulation of LAN discovery. It runs the real state machine on many nodes in
//! virtual time. The simulated network loses, delays, duplicates and reorders packets. Nodes pause,
//! vanish, restart, lie, or are of other versions.
//!
//! [`network`] carries the packets. [`scripts`] answers for hosts that do not run this release.
//! [`clients`] looks paths up as Nix does. All randomness comes from one seed. [`properties`]
//! checks invariants for many seeds. [`scenes`] checks named situations and their costs. [`table`]
//! prints costs by number of nodes. `make simulate` runs more seeds:
//! `PEERIX_SIMULATION_SEEDS=100000`. `PEERIX_SIMULATION_TRACE=<seed>` prints the packets of one
//! run.

use super::discovery::{Discovery, DiscoverySettings};
use super::environment::Environment;
use super::lookups::{LOOKUP_TIMEOUT, LookupId, LookupUpdate};
use super::outgoing::DatagramTarget;
use crate::lock::Mutex;
use crate::nix::HashPart;
use crate::wire::Packet;
use crossbeam_channel::Receiver;
use random::SeededRandom;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

mod clients;
mod network;
mod properties;
mod random;
mod scenes;
mod scripts;
mod table;

const PORT: u16 = 12304;
const US: Duration = Duration::from_micros(1);
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);

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

/// A host's connection to the network.
struct Link {
    /// Until when the host is disconnected from the network.
    unplugged_until: Duration,
    /// Datagrams that were delivered and not read yet.
    inbox: VecDeque<(SocketAddr, Rc<[u8]>)>,
    /// For each source port, the times until which datagrams wait for ARP.
    waiting_for_arp: BTreeMap<u16, VecDeque<Duration>>,
    /// Least and greatest latency.
    latency: (Duration, Duration),
}

struct Host {
    kind: Kind,
    machine: Option<Discovery<SimulatedStore>>,
    held: Arc<Mutex<BTreeSet<HashPart>>>,
    is_up: bool,
    paused_until: Option<Duration>,
    link: Link,
    wake: Duration,
    active: BTreeMap<LookupId, Active>,
    /// Until when a host of [`Kind::Original`] works on queries.
    busy_until: Duration,
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

/// The lookups that Nix makes on the nodes, and their outcomes.
struct Clients {
    workloads: BTreeMap<usize, Workload>,
    next_lookup: LookupId,
    /// Time from an answer to the next request of the same connection.
    think: Duration,
    outcomes: Vec<Outcome>,
}

/// Faults and traffic of the network.
struct SimulatedNetwork {
    /// Probability that a packet is lost.
    loss: f64,
    /// Probability that a packet is delivered twice.
    duplication: f64,
    packets: u64,
    bytes: u64,
    /// Number of datagrams dropped because the send buffer of a first or second socket was full.
    dropped: u64,
    /// Whether every packet is printed: `PEERIX_SIMULATION_TRACE` is the seed.
    is_traced: bool,
}

struct Simulation {
    seed: u64,
    random: SeededRandom,
    base: Instant,
    now: Duration,
    sequence: u64,
    queue: BTreeMap<(Duration, u64), Act>,
    hosts: Vec<Host>,
    clients: Clients,
    network: SimulatedNetwork,
}

/// Address of the first host.
const FIRST_IP: u32 = 0x0a00_0001;

fn ip_of(index: usize) -> IpAddr {
    Ipv4Addr::from_bits(FIRST_IP + u32::try_from(index).unwrap()).into()
}

/// The path with this number.
fn path(number: u64) -> HashPart {
    let mut bytes = [0; HashPart::BYTES];
    bytes[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    HashPart::from_bytes(&bytes)
}

impl Simulation {
    fn new(seed: u64) -> Self {
        let traced = std::env::var("PEERIX_SIMULATION_TRACE");
        let is_traced = traced.is_ok_and(|traced| traced == seed.to_string());
        Simulation {
            seed,
            random: SeededRandom::new(seed),
            base: Instant::now(),
            now: Duration::ZERO,
            sequence: 0,
            queue: BTreeMap::new(),
            hosts: Vec::new(),
            clients: Clients {
                workloads: BTreeMap::new(),
                next_lookup: 0,
                think: 10 * MS,
                outcomes: Vec::new(),
            },
            network: SimulatedNetwork {
                loss: 0.0,
                duplication: 0.0,
                packets: 0,
                bytes: 0,
                dropped: 0,
                is_traced,
            },
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
        let link = Link {
            unplugged_until: Duration::ZERO,
            inbox: VecDeque::new(),
            waiting_for_arp: BTreeMap::new(),
            latency: (50 * US, 100 * US),
        };
        self.hosts.push(Host {
            kind,
            machine: None,
            held: Arc::default(),
            is_up: false,
            paused_until: None,
            link,
            wake: Duration::MAX,
            active: BTreeMap::new(),
            busy_until: Duration::ZERO,
            instance: index as u64,
        });
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
            let store = SimulatedStore { own: ip_of(index), held: host.held.clone() };
            let ids = Box::new(move || random.next() as u32);
            host.machine = Some(Discovery::new(store, settings, ids, now));
            self.turn(index);
        } else if host.kind != Kind::Original {
            self.say_hello(index);
        }
    }

    /// Switches the host off. It sends nothing more.
    fn vanish(&mut self, index: usize) {
        let host = &mut self.hosts[index];
        host.is_up = false;
        host.machine = None;
        host.link.inbox.clear();
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
        self.hosts[index].link.unplugged_until = self.now + time;
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
            if !self.clients.workloads.is_empty() && self.clients.workloads.iter().all(is_done) {
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

    /// The host with this address.
    fn host_at(&self, ip: IpAddr) -> Option<usize> {
        let IpAddr::V4(ip) = ip else { return None };
        let index = usize::try_from(ip.to_bits().checked_sub(FIRST_IP)?).ok()?;
        (index < self.hosts.len()).then_some(index)
    }

    fn machine(&self, index: usize) -> &Discovery<SimulatedStore> {
        self.hosts[index].machine.as_ref().unwrap()
    }

    fn hold(&mut self, index: usize, paths: &[HashPart]) {
        self.hosts[index].held.lock().extend(paths.iter().copied());
    }
}

/// Upper bound of the duration of a lookup, with a margin for a turn of the loop.
fn longest() -> Duration {
    LOOKUP_TIMEOUT.get() + Duration::from_millis(250)
}
