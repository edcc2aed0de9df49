//! Status of this node for its own machine: a snapshot ([`report`]), also as an HTML page and as
//! metrics. Reads the statistics, discovery and the store; changes nothing, but has nix.conf read
//! again if it has changed.

mod metrics;
mod page;
pub mod report;
pub mod text;

pub use page::{StatusPage, page};

use crate::config::{Config, Mode, Sharing};
use crate::degraded::Degraded;
use crate::lan::{DiscoveryClient, Neighbour};
use crate::lock::Mutex;
use crate::network::Networks;
use crate::nix::HashPart;
use crate::peers::announce::Trackers;
use crate::peers::friends::{self, Friends};
use crate::peers::health::PeerHealth;
use crate::port_mapper::Mapping;
use crate::stats::{self, HOUR, MAX_PEERS, Network, Stats, Totals, TrafficKey};
use crate::store::Store;
use crate::trust::{TrustedKey, TrustedKeys};
use crate::wire::NodeKey;
use report::{
    AllTotals, AvoidanceReport, FriendReport, HealthReport, History, KeyReport, Liveness,
    LookupReport, MissReport, NodeReport, OwnNetwork, PeerReport, PortMapping, Problem,
    StatusReport, TotalsSince, TrackerState, TransferReport, VERSION,
};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

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

/// Properties of the node that are constant while the daemon runs.
pub struct NodeFacts {
    name: String,
    port: u16,
    mode: Mode,
    store_dir: String,
    shares: String,
    has_private_key: bool,
    flags: Vec<String>,
    identity: Option<String>,
    wants_friends: bool,
}

impl NodeFacts {
    /// Takes the properties from `config`. `port` is the port that is served on, and `identity` the
    /// public key of this node.
    pub fn new(config: &Config, port: u16, identity: Option<NodeKey>) -> NodeFacts {
        NodeFacts {
            name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            port,
            mode: config.mode,
            store_dir: config.store_dir.as_str().to_owned(),
            shares: shares(config),
            has_private_key: config.private_key.is_some(),
            flags: config.flags.clone(),
            identity: identity.map(|key| key.to_string()),
            wants_friends: config.has_friends(),
        }
    }
}

impl NodeFacts {
    /// The constant part of the report on this node.
    fn node(&self, started: f64, age: Duration) -> NodeReport {
        NodeReport {
            name: self.name.clone(),
            version: env!("CARGO_PKG_VERSION"),
            mode: match self.mode {
                Mode::Lan => "lan",
                Mode::Wan => "wan",
                Mode::Both => "both",
            },
            port: self.port,
            store_dir: self.store_dir.clone(),
            state_dir: None,
            peer_id: None,
            identity: self.identity.clone(),
            started,
            uptime_seconds: seconds(age),
            serves: true,
            shares: self.shares.clone(),
            signs: false,
            trusted_keys: Vec::new(),
            public_keys: None,
            flags: self.flags.clone(),
        }
    }
}

/// Describes in one to three sentences what is shared with whom.
fn shares(config: &Config) -> String {
    let friends = match (config.has_friends(), config.sharing) {
        (true, Sharing::All | Sharing::Lan | Sharing::Friends) => {
            " Friends may have every valid path, from anywhere."
        }
        _ => "",
    };
    match (config.sharing, config.mode) {
        (Sharing::All, _) => format!("{}{friends}", shares_by_mode(config)),
        (Sharing::Lan, Mode::Lan | Mode::Both) => {
            let config = Config { mode: Mode::Lan, ..config.clone() };
            format!("{}{friends}", shares_by_mode(&config))
        }
        (Sharing::Lan | Sharing::Friends, _) => {
            format!("Nothing is shared with strangers and neighbours.{friends}")
        }
        (Sharing::Nobody, _) => "Nothing is shared with other machines.".into(),
    }
}

fn shares_by_mode(config: &Config) -> String {
    let named = if config.peers.is_empty() { "" } else { ", and with those that --peer names" };
    let lan = format!(
        "Every valid path of {} is shared with the machines on its networks{named}",
        config.store_dir.as_str()
    );
    let name = if config.filter { " whose name no pattern keeps" } else { "" };
    let proof = match (config.verify, config.filter) {
        (true, true) => format!(", and that {} has too,", config.upstream_cache),
        (true, false) => format!(" that {} has too", config.upstream_cache),
        (false, true) => ",".into(),
        (false, false) => String::new(),
    };
    let wan = format!("very path{name}{proof} is shared with anybody who asks");
    match config.mode {
        Mode::Lan => format!("{lan}. Nobody else gets anything."),
        Mode::Wan => format!("E{wan}; neighbours are anybody."),
        Mode::Both => format!("{lan}. E{wan} from elsewhere."),
    }
}

/// The monotonic and the wall clock at the same moment. Converts times of events, which are
/// monotonic, to the wall clock for reports.
#[derive(Clone, Copy)]
struct ClockReading {
    instant: Instant,
    wall: SystemTime,
}

impl ClockReading {
    fn get() -> ClockReading {
        ClockReading { instant: Instant::now(), wall: SystemTime::now() }
    }

    /// The wall clock in seconds since 1970, to the millisecond.
    fn unix(&self) -> f64 {
        unix(self.wall)
    }

    fn of(&self, instant: Instant) -> f64 {
        let past = self.instant.saturating_duration_since(instant).as_secs_f64();
        let future = instant.saturating_duration_since(self.instant).as_secs_f64();
        round(self.unix() - past + future, 1e3)
    }
}

/// Seconds since 1970, to the millisecond. 0 for earlier times.
fn unix(at: SystemTime) -> f64 {
    round(at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs_f64(), 1e3)
}

/// Seconds, to the microsecond.
fn seconds(duration: Duration) -> f64 {
    round(duration.as_secs_f64(), 1e6)
}

fn round(number: f64, steps: f64) -> f64 {
    (number * steps).round() / steps
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
        let keys = self.trusted.keys();
        let now = ClockReading::get();
        let (peers, discovery_answers) = self.peers(now);
        let started = unix(self.stats.started(now.wall));
        let problems = self.problems(discovery_answers);
        StatusReport {
            version: VERSION,
            time: now.unix(),
            node: NodeReport {
                state_dir: self.stats.state_dir().map(|dir| dir.display().to_string()),
                peer_id: self
                    .trackers
                    .iter()
                    .flat_map(|t| t.all())
                    .next()
                    .map(|tracker| tracker.peer_id().to_owned()),
                signs: self.signs(),
                trusted_keys: keys
                    .iter()
                    .flatten()
                    .map(|known| known.key.name().to_owned())
                    .collect(),
                public_keys: keys.map(|keys| keys.iter().map(key_report).collect()),
                ..self.facts.node(started, self.stats.age())
            },
            health: HealthReport { ok: !problems.iter().any(|problem| problem.serious), problems },
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
            peers,
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

    /// Checks the store, discovery and all other services. Blocks for at most 7 s, for the store
    /// and for discovery.
    pub fn health(&self) -> HealthReport {
        let answers = self.discovery.neighbours(DISCOVERY_TIMEOUT).is_some();
        let problems = self.problems(answers);
        HealthReport { ok: !problems.iter().any(|problem| problem.serious), problems }
    }

    fn problems(&self, discovery_answers: bool) -> Vec<Problem> {
        let mut problems = Vec::new();
        let mut add = |code, text: String, serious| problems.push(Problem { code, text, serious });
        let any = HashPart::parse(&[b'0'; HashPart::LEN]).expect("zeros are Nix32");
        if let Err(e) = self.store.path_info(&any)
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
                let error = friend
                    .error
                    .map(|error| format!("friend {} is not reached: {error}", friend.name));
                error.into_iter().for_each(|error| add("friend", error, false));
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

    /// All peers, and whether discovery answered within [`DISCOVERY_TIMEOUT`].
    fn peers(&self, now: ClockReading) -> (Vec<PeerReport>, bool) {
        let neighbours = self.discovery.neighbours(DISCOVERY_TIMEOUT);
        let answers = neighbours.is_some();
        let mut rows = neighbour_rows(neighbours.unwrap_or_default(), now);
        for seen in self.health.snapshots(now.instant) {
            let network = if seen.is_far { Network::Wan } else { Network::Lan };
            let key = row_of(&rows, network, seen.address);
            let row = rows.entry(key).or_insert_with(|| empty(seen.address, network));
            row.narinfo_seconds = seen.latency.map(seconds);
            row.last_heard = row.last_heard.or(seen.answered.map(|at| now.of(at)));
            row.failures = seen.faults;
            let reason = seen.reason;
            row.avoided = seen.avoided.map(|(until, wholly)| AvoidanceReport {
                until: now.of(until),
                wholly,
                reason,
            });
        }
        for (key, counts) in self.stats.traffic() {
            // A client's port is arbitrary. If exactly one known peer has its address, the counts
            // are that peer's.
            let mut far =
                rows.keys().filter(|known| known.network == key.network && known.ip == key.ip);
            let key = match (far.next(), far.next()) {
                (Some(known), None) if key.port == 0 => *known,
                _ => key,
            };
            let row = rows.entry(key).or_insert_with(|| PeerReport {
                found_by: if key.port == 0 { "request" } else { "tracker" },
                address: if key.port == 0 {
                    key.ip.to_string()
                } else {
                    SocketAddr::new(key.ip, key.port).to_string()
                },
                ..empty(SocketAddr::new(key.ip, key.port), key.network)
            });
            row.id = row.id.take().or_else(|| counts.id());
            row.hits += counts.hits.load(Ordering::Relaxed);
            row.nars += counts.nars.load(Ordering::Relaxed);
            row.received_bytes += counts.received.load(Ordering::Relaxed);
            row.sent_bytes += counts.sent.load(Ordering::Relaxed);
        }
        let mut peers: Vec<(TrafficKey, PeerReport)> = rows.into_iter().collect();
        let moved = |peer: &PeerReport| peer.received_bytes.saturating_add(peer.sent_bytes);
        // Known peers come first, so that clients do not displace them from the report.
        peers.sort_by_cached_key(|(key, peer)| {
            (peer.found_by == "request", std::cmp::Reverse(moved(peer)), key.ip, key.port)
        });
        (peers.into_iter().map(|(_, peer)| peer).collect(), answers)
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

/// A row for each LAN peer. Several nodes of `--peer` may share an IP address: the first has the
/// address as its key, like other LAN peers, and the others have address and port.
fn neighbour_rows(
    neighbours: Vec<Neighbour>,
    now: ClockReading,
) -> HashMap<TrafficKey, PeerReport> {
    let mut rows = HashMap::new();
    for neighbour in neighbours {
        let mut http = neighbour.address;
        http.set_port(neighbour.http_port.unwrap_or(http.port()));
        let mut key = TrafficKey::server(Network::Lan, http);
        if rows.contains_key(&key) {
            key.port = http.port();
        }
        let row = PeerReport {
            found_by: neighbour.met_by.code(),
            last_heard: neighbour.heard.map(|heard| now.of(heard)),
            state: Some(liveness(&neighbour)),
            silent_since: neighbour.silent_since.map(|since| now.of(since)),
            round_trip_seconds: neighbour.round_trip.map(seconds),
            ..empty(http, Network::Lan)
        };
        rows.insert(key, row);
    }
    rows
}

fn liveness(neighbour: &Neighbour) -> Liveness {
    match (neighbour.silent_since, neighbour.heard) {
        (Some(_), _) => Liveness::Silent,
        (None, Some(_)) => Liveness::Live,
        (None, None) => Liveness::Unheard,
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
            ..facts.node(now.unix(), Duration::ZERO)
        },
        health: HealthReport { ok: false, problems: vec![problem] },
        networks: Vec::new(),
        trackers: Vec::new(),
        port_mapping: None,
        friends: Vec::new(),
        peers: Vec::new(),
        peers_omitted: 0,
        lookups: Vec::new(),
        transfers: Vec::new(),
        totals: AllTotals { start: totals(now.unix(), Totals::default()), installation: None },
        history: History { hour_seconds: HOUR, hours: Vec::new() },
    }
}

/// Key of the row for the peer with the HTTP server at `address`, as [`neighbour_rows`] assigns it.
fn row_of(
    rows: &HashMap<TrafficKey, PeerReport>,
    network: Network,
    address: SocketAddr,
) -> TrafficKey {
    let key = TrafficKey::server(network, address);
    let with_port = TrafficKey { port: address.port(), ..key };
    if rows.contains_key(&with_port) { with_port } else { key }
}

fn empty(address: SocketAddr, network: Network) -> PeerReport {
    PeerReport {
        address: address.to_string(),
        network: network.as_str(),
        found_by: if network == Network::Lan { "broadcast" } else { "tracker" },
        id: None,
        last_heard: None,
        state: None,
        silent_since: None,
        round_trip_seconds: None,
        narinfo_seconds: None,
        hits: 0,
        nars: 0,
        failures: 0,
        received_bytes: 0,
        sent_bytes: 0,
        avoided: None,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lan::MetBy;

    #[test]
    fn neighbours_are_live_silent_or_unheard() {
        let instant = Instant::now();
        let now =
            ClockReading { instant, wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1000) };
        let later = |seconds| Some(instant + Duration::from_secs(seconds));
        let at = |last: u8, port| SocketAddr::from(([10, 0, 0, last], port));
        let neighbour = |address, met_by, heard, silent_since| Neighbour {
            address,
            http_port: None,
            met_by,
            heard,
            silent_since,
            round_trip: None,
        };
        let rows = neighbour_rows(
            vec![
                neighbour(at(1, 1), MetBy::Query, later(1), None),
                neighbour(at(2, 1), MetBy::Hello, later(1), later(2)),
                neighbour(at(3, 1), MetBy::Named, None, None),
                // Two nodes with one IP address and different ports.
                neighbour(at(4, 1), MetBy::Named, later(1), None),
                neighbour(at(4, 2), MetBy::Named, None, later(3)),
            ],
            now,
        );
        let row = |address| {
            let row = &rows[&row_of(&rows, Network::Lan, address)];
            assert_eq!(row.address, address.to_string());
            (row.found_by, row.state.unwrap(), row.last_heard, row.silent_since)
        };
        assert_eq!(row(at(1, 1)), ("query", Liveness::Live, Some(1001.0), None));
        assert_eq!(row(at(2, 1)), ("broadcast", Liveness::Silent, Some(1001.0), Some(1002.0)));
        assert_eq!(row(at(3, 1)), ("flag", Liveness::Unheard, None, None));
        assert_eq!(row(at(4, 1)), ("flag", Liveness::Live, Some(1001.0), None));
        assert_eq!(row(at(4, 2)), ("flag", Liveness::Silent, None, Some(1003.0)));
        // Traffic is counted by the IP address alone.
        assert!(rows.contains_key(&TrafficKey::asker(Network::Lan, at(4, 0).ip())));
    }

    #[test]
    fn shares_text_covers_every_mode() {
        let with =
            |mode, verify, filter| shares(&Config { mode, verify, filter, ..Config::default() });
        assert_eq!(
            with(Mode::Lan, true, true),
            "Every valid path of /nix/store is shared with the machines on its networks. Nobody else gets anything."
        );
        assert_eq!(
            with(Mode::Wan, true, true),
            "Every path whose name no pattern keeps, and that https://cache.nixos.org has too, is shared with anybody \
             who asks; neighbours are anybody."
        );
        assert!(
            with(Mode::Both, true, false)
                .contains("Every path that https://cache.nixos.org has too is shared")
        );
        assert!(
            with(Mode::Both, false, true)
                .contains("Every path whose name no pattern keeps, is shared")
        );
        assert!(
            with(Mode::Wan, false, false).starts_with("Every path is shared with anybody who asks")
        );
        let named = Config { peers: vec![("a".into(), 1)], ..Config::default() };
        assert!(shares(&named).contains("and with those that --peer names"));
    }

    #[test]
    fn shares_text_covers_every_share_flag() {
        let with = |sharing, mode| {
            let friends = vec![format!("home={}", NodeKey::from_bytes([1; 32])).parse().unwrap()];
            shares(&Config { mode, sharing, friends, ..Config::default() })
        };
        let friends = " Friends may have every valid path, from anywhere.";
        assert_eq!(with(Sharing::Nobody, Mode::Both), "Nothing is shared with other machines.");
        let nobody_else = format!("Nothing is shared with strangers and neighbours.{friends}");
        assert_eq!(with(Sharing::Friends, Mode::Both), nobody_else);
        assert_eq!(with(Sharing::Lan, Mode::Wan), nobody_else);
        let lan = with(Sharing::Lan, Mode::Both);
        assert!(
            lan.ends_with(&format!("Nobody else gets anything.{friends}"))
                && !lan.contains("anybody"),
            "{lan}"
        );
        assert!(with(Sharing::All, Mode::Both).ends_with(friends));
    }

    #[test]
    fn monotonic_times_are_converted_to_the_wall_clock() {
        let instant = Instant::now();
        let now =
            ClockReading { instant, wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1000) };
        assert_eq!(now.of(instant + Duration::from_millis(1500)), 1001.5);
        assert_eq!(now.of(instant), 1000.0);
        assert_eq!(
            unix(SystemTime::UNIX_EPOCH - Duration::from_secs(5)),
            0.0,
            "a clock that is wrong is no panic"
        );
    }
}
