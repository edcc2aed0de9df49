//! Status of this node for its own machine: a snapshot ([`report`]), also as an HTML page and as
//! metrics. Reads the statistics, discovery and the store; changes nothing, but has nix.conf read
//! again if it has changed.

mod clock;
mod metrics;
mod node;
mod page;
mod peers;
pub mod report;
pub mod text;

pub use node::NodeFacts;
pub use page::{StatusPage, page};

use crate::config::Config;
use crate::degraded::Degraded;
use crate::lan::DiscoveryClient;
use crate::lock::Mutex;
use crate::network::Networks;
use crate::nix::HashPart;
use crate::peers::announce::Trackers;
use crate::peers::friends::{self, Friends};
use crate::peers::health::PeerHealth;
use crate::port_mapper::Mapping;
use crate::stats::{self, HOUR, MAX_PEERS, Stats, Totals};
use crate::store::Store;
use crate::trust::{TrustedKey, TrustedKeys};
use clock::{ClockReading, round, seconds, unix};
use peers::PeerRows;
use report::{
    AllTotals, FriendReport, HealthReport, History, KeyReport, LookupReport, MissReport,
    NodeReport, OwnNetwork, PortMapping, Problem, StatusReport, TotalsSince, TrackerState,
    TransferReport, VERSION,
};
use std::sync::Arc;
use std::time::Duration;

/// Timeout of a request to the discovery thread. At the timeout, discovery counts as hung: it waits
/// for the database for at most 50 ms, and for nothing else.
const DISCOVERY_TIMEOUT: Duration = Duration::from_secs(2);

/// Problem code of an unusable `--private-key` file.
pub const PRIVATE_KEY: &str = "private-key";

/// Assumed rate of a download from upstream, in bytes of NARs per second: 50 Mbit/s, with NARs that
/// xz compresses to a quarter.
pub const UPSTREAM_RATE: f64 = 25e6;

/// Sources of the status.
pub struct StatusService {
    /// Statistics of this run.
    pub stats: Arc<Stats>,
    /// The LAN peers.
    pub discovery: Arc<DiscoveryClient>,
    /// Health of the peers.
    pub health: Arc<PeerHealth>,
    /// The trackers. `None` in mode `lan`.
    pub trackers: Option<Arc<Trackers>>,
    /// The friends. `None` if there are none.
    pub friends: Option<Arc<Friends>>,
    /// State of the port mapping. `None` without `--map-port`.
    pub mapping: Option<Arc<Mutex<Mapping>>>,
    /// The store, to check that its database can be read.
    pub store: Arc<Store>,
    /// The networks of this machine.
    pub networks: Arc<Networks>,
    /// Keys by which peers' paths are accepted.
    pub trusted: Arc<TrustedKeys>,
    /// Faults of the configuration.
    pub degraded: Arc<Degraded>,
    /// Properties that are constant.
    pub facts: NodeFacts,
}

impl StatusService {
    /// A snapshot with at most [`MAX_PEERS`] peers. Blocks for at most 7 s, for the store and for
    /// discovery, and on the disk, for nix.conf and key files.
    pub fn report(&self) -> StatusReport {
        let mut report = self.whole();
        report.peers_omitted = report.peers.len().saturating_sub(MAX_PEERS);
        report.peers.truncate(MAX_PEERS);
        report
    }

    /// A snapshot with all peers.
    fn whole(&self) -> StatusReport {
        // `why` and `doctor` judge by these keys what the user has just changed in nix.conf.
        self.trusted.refresh(&self.degraded);
        let now = ClockReading::get();
        let neighbours = self.discovery.neighbours(DISCOVERY_TIMEOUT);
        let discovery_answers = neighbours.is_some();
        let mut peers = PeerRows::default();
        peers.add_neighbours(neighbours.unwrap_or_default(), now);
        peers.add_health(&self.health, now);
        peers.add_traffic(self.stats.traffic());
        let started = unix(self.stats.start.by_wall_clock(now.wall));
        StatusReport {
            version: VERSION,
            time: now.unix(),
            node: self.node(started),
            health: self.checked(discovery_answers),
            networks: self.networks(),
            trackers: self.tracker_states(),
            port_mapping: self.mapping().map(|mapping| PortMapping {
                outside: mapping.outside.map(|at| at.to_string()),
                pinhole: mapping.pinhole.map(|at| at.to_string()),
            }),
            friends: self
                .friends
                .iter()
                .flat_map(|friends| friends.snapshots())
                .map(|seen| friend(seen, now))
                .collect(),
            peers: peers.into_sorted(),
            peers_omitted: 0,
            lookups: self.stats.lookups.recent().into_iter().map(lookup).collect(),
            transfers: self
                .stats
                .transfers
                .running()
                .iter()
                .map(|running| transfer(running, now))
                .collect(),
            totals: AllTotals {
                start: totals(started, self.stats.totals()),
                installation: self
                    .stats
                    .totals_ever()
                    .map(|(since, ever)| totals(since as f64, ever)),
            },
            history: History { hour_seconds: HOUR, hours: self.stats.hours() },
        }
    }

    /// The report on this node, which has run since `started`, in seconds since 1970.
    fn node(&self, started: f64) -> NodeReport {
        let keys = self.trusted.keys();
        let tracker = self.trackers.iter().flat_map(|trackers| trackers.all()).next();
        let names = keys.iter().flatten().map(|known| known.key.name().to_owned());
        NodeReport {
            state_dir: self.stats.state_dir().map(|dir| dir.display().to_string()),
            peer_id: tracker.map(|tracker| tracker.peer_id().to_owned()),
            signs: self.signs(),
            trusted_keys: names.collect(),
            public_keys: keys.as_ref().map(|keys| keys.iter().map(key_report).collect()),
            started,
            uptime_seconds: seconds(self.stats.start.age()),
            ..self.facts.report.clone()
        }
    }

    /// Checks the store, discovery and all other services. Blocks for at most 7 s, for the store
    /// and for discovery.
    pub fn health(&self) -> HealthReport {
        self.checked(self.discovery.neighbours(DISCOVERY_TIMEOUT).is_some())
    }

    fn checked(&self, discovery_answers: bool) -> HealthReport {
        let problems = self.problems(discovery_answers);
        HealthReport { ok: !problems.iter().any(|problem| problem.serious), problems }
    }

    fn problems(&self, discovery_answers: bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut add = |code, text: String, serious| problems.push(Problem { code, text, serious });
        if let Err(e) = self.store.path_info(&HashPart::ZERO)
            && !matches!(e, crate::store::StoreError::Row { .. })
        {
            add("store", e.to_string(), true);
        }
        self.degraded.all().into_iter().for_each(|(code, text)| add(code, text, false));
        if !discovery_answers {
            let text = "the thread that asks and answers peers does not turn; restart peerix, and please report it with its log";
            add("discovery", text.into(), true);
        }
        if self.facts.mode.has_lan() && self.networks().is_empty() {
            add("network", self.networks.current().why_none(), false);
        }
        let states = self.tracker_states();
        if !states.is_empty() && states.iter().all(|tracker| tracker.reached == Some(false)) {
            let text = "no tracker is reached, so that peers on other networks are not found; see the log for why";
            add("trackers", text.into(), false);
        }
        for problem in self
            .trackers
            .iter()
            .flat_map(|trackers| trackers.all())
            .filter_map(|tracker| tracker.problem())
        {
            add("announce", problem, false);
        }
        if let Some(problem) = self.mapping().and_then(|mapping| mapping.problem) {
            add("port_mapping", format!("--map-port: {problem}"), false);
        }
        if self.facts.wants_friends && self.friends.is_none() {
            add(
                "friends",
                "there are no friends: the log says why; they need an identity in --state-dir"
                    .into(),
                false,
            );
        }
        if let Some(friends) = &self.friends {
            friends.list().problem().into_iter().for_each(|problem| add("friends", problem, false));
            for friend in friends.snapshots().into_iter().filter(|friend| !friend.is_up) {
                let Some(error) = friend.error else { continue };
                add("friend", format!("friend {} is not reached: {error}", friend.name), false);
            }
        }
        if let Some(problem) = self.stats.problem() {
            add("counters", format!("counters {problem}"), false);
        }
        problems
    }

    /// Whether this node signs the paths of its store. False while the key file is unusable.
    fn signs(&self) -> bool {
        self.facts.has_private_key
            && self.degraded.all().iter().all(|(code, _)| *code != PRIVATE_KEY)
    }

    fn mapping(&self) -> Option<Mapping> {
        let mapping = self.mapping.as_ref()?;
        Some(mapping.lock().clone())
    }

    /// The LAN networks of interfaces with a link, and those of `--lan` behind routers.
    fn networks(&self) -> Vec<OwnNetwork> {
        let networks = self.networks.current();
        let connected = networks.lan_addresses().iter().filter(|i| i.running).map(|i| {
            let address = format!("{}/{}", i.address, i.prefix_len);
            OwnNetwork { interface: Some(i.name.clone()), address }
        });
        let routed = networks.routed_networks();
        let routed = routed.map(|n| OwnNetwork { interface: None, address: n.to_string() });
        connected.chain(routed).collect()
    }

    fn tracker_states(&self) -> Vec<TrackerState> {
        let all = self.trackers.iter().flat_map(|trackers| trackers.all());
        all.map(|tracker| TrackerState {
            url: tracker.url().to_owned(),
            reached: tracker.reached(),
        })
        .collect()
    }
}

fn key_report(known: &TrustedKey) -> KeyReport {
    KeyReport { key: known.key.to_string(), source: known.source.code() }
}

fn friend(seen: friends::FriendSnapshot, now: ClockReading) -> FriendReport {
    FriendReport {
        name: seen.name,
        key: seen.key.to_string(),
        reached: seen.is_up,
        since: seen.since.map(|since| now.of(since)),
        address: seen.address.map(|address| address.to_string()),
        found_by: seen.found_by.map(friends::FoundBy::code),
        error: seen.error,
    }
}

/// Snapshot of a node that cannot serve because of `problem`.
pub fn of_problem(config: &Config, port: u16, code: &'static str, problem: &str) -> StatusReport {
    let (facts, now) = (NodeFacts::new(config, port, None), ClockReading::get());
    let problem = Problem { code, text: problem.to_owned(), serious: true };
    StatusReport {
        version: VERSION,
        time: now.unix(),
        node: NodeReport {
            serves: false,
            shares: "Nothing is shared with anybody.".into(),
            started: now.unix(),
            ..facts.report
        },
        health: HealthReport { ok: false, problems: vec![problem] },
        totals: AllTotals { start: totals(now.unix(), Totals::default()), installation: None },
        history: History { hour_seconds: HOUR, hours: Vec::new() },
        ..StatusReport::default()
    }
}

fn lookup(lookup_record: stats::LookupRecord) -> LookupReport {
    let (hit, miss) = match lookup_record.result {
        Ok(hit) => (Some(hit), None),
        Err(miss) => (None, Some(MissReport { code: miss.code(), text: miss.to_string() })),
    };
    LookupReport {
        time: unix(lookup_record.at),
        hash_part: lookup_record.hash_part.to_string(),
        name: hit.as_ref().map(|hit| hit.name.to_string()),
        hit: hit.is_some(),
        peer: hit.as_ref().map(|hit| hit.peer.to_string()),
        network: hit.as_ref().map(|hit| hit.network.as_str()),
        seconds: seconds(lookup_record.elapsed),
        miss,
    }
}

fn transfer(running: &stats::RunningTransfer, now: ClockReading) -> TransferReport {
    let peer = running.peer();
    let elapsed = now.instant.saturating_duration_since(running.began).as_secs_f64();
    let bytes = running.bytes();
    TransferReport {
        id: running.id,
        direction: match running.direction {
            stats::Direction::In => "in",
            stats::Direction::Out => "out",
        },
        name: running.name.clone(),
        peer: peer.map(|(_, address)| address.to_string()),
        network: peer.map(|(network, _)| network.as_str()),
        reason: running.reason(),
        started: unix(running.at),
        bytes,
        size: running.size,
        // Too short for a meaningful rate.
        bytes_per_second: if elapsed < 1e-3 { 0 } else { (bytes as f64 / elapsed) as u64 },
    }
}

fn totals(since: f64, totals: Totals) -> TotalsSince {
    TotalsSince {
        since,
        totals,
        upstream_seconds: round(totals.received() as f64 / UPSTREAM_RATE, 1e3),
    }
}
