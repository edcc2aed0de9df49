//! Format of `/status.json`, documented in docs/status.md. A change to the meaning of a field
//! increments [`VERSION`].

use crate::stats::Totals;
use serde::Serialize;

/// Version of the format.
pub const VERSION: u32 = 1;

/// A snapshot of the node. Moments are seconds since 1970, durations are seconds, sizes are bytes.
#[derive(Debug, Default, Serialize)]
pub struct StatusReport {
    /// [`VERSION`].
    pub version: u32,
    /// Time of the snapshot.
    pub time: f64,
    /// This node.
    pub node: NodeReport,
    /// Health of the node.
    pub health: HealthReport,
    /// The LAN networks.
    pub networks: Vec<OwnNetwork>,
    /// The trackers to which this node announces itself.
    pub trackers: Vec<TrackerState>,
    /// State of the port mapping. `None` without `--map-port`.
    pub port_mapping: Option<PortMapping>,
    /// The friends from `--friend` and the friends file.
    pub friends: Vec<FriendReport>,
    /// The peers: first those with most traffic, last those that only asked.
    pub peers: Vec<PeerReport>,
    /// Number of further peers, which are left out.
    pub peers_omitted: usize,
    /// The last lookups, the latest first.
    pub lookups: Vec<LookupReport>,
    /// Running transfers, the oldest first.
    pub transfers: Vec<TransferReport>,
    /// Totals since the start and since the installation.
    pub totals: AllTotals,
    /// Hourly totals.
    pub history: History,
}

/// This node.
#[derive(Debug, Clone, Default, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct NodeReport {
    pub name: String,
    pub version: &'static str,
    pub mode: &'static str,
    pub port: u16,
    pub store_dir: String,
    pub state_dir: Option<String>,
    pub peer_id: Option<String>,
    pub identity: Option<String>,
    pub started: f64,
    pub uptime_seconds: f64,
    pub serves: bool,
    pub shares: String,
    pub signs: bool,
    pub trusted_keys: Vec<String>,
    pub public_keys: Option<Vec<KeyReport>>,
    pub flags: Vec<String>,
}

/// A trusted key.
#[derive(Debug, Clone, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct KeyReport {
    pub key: String,
    pub source: &'static str,
}

/// Health of the node.
#[derive(Debug, Default, Serialize)]
pub struct HealthReport {
    /// Whether no problem is serious.
    pub ok: bool,
    /// Current problems.
    pub problems: Vec<Problem>,
}

/// A problem and its remedy.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// Code in JSON and metrics.
    pub code: &'static str,
    /// Description with the remedy, in one line.
    pub text: String,
    /// Whether the node cannot work because of it.
    pub serious: bool,
}

/// A LAN network of this machine.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct OwnNetwork {
    pub interface: Option<String>,
    pub address: String,
}

/// A tracker.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct TrackerState {
    pub url: String,
    pub reached: Option<bool>,
}

/// Addresses at which the router forwards connections to this node.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct PortMapping {
    pub outside: Option<String>,
    pub pinhole: Option<String>,
}

/// A friend.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct FriendReport {
    pub name: String,
    pub key: String,
    pub reached: bool,
    pub since: Option<f64>,
    pub address: Option<String>,
    pub found_by: Option<&'static str>,
    pub error: Option<String>,
}

/// State of a LAN peer in `/status.json`: whether lookups ask it, and whether it was ever heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PeerState {
    /// Lookups ask the peer, and it has been heard.
    Live,
    /// The peer was given up: lookups send it no queries until it answers a probe.
    Silent,
    /// `--peer` names the peer, lookups ask it, and it has not been heard yet.
    Unheard,
}

/// A peer.
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct PeerReport {
    pub address: String,
    pub network: &'static str,
    pub found_by: &'static str,
    pub id: Option<String>,
    pub last_heard: Option<f64>,
    pub state: Option<PeerState>,
    pub silent_since: Option<f64>,
    pub round_trip_seconds: Option<f64>,
    pub narinfo_seconds: Option<f64>,
    pub hits: u64,
    pub nars: u64,
    pub failures: u64,
    pub received_bytes: u64,
    pub sent_bytes: u64,
    pub avoided: Option<AvoidanceReport>,
}

/// Why and until when a peer is avoided.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct AvoidanceReport {
    pub until: f64,
    pub wholly: bool,
    pub reason: String,
}

/// A lookup.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct LookupReport {
    pub time: f64,
    pub hash_part: String,
    pub name: Option<String>,
    pub hit: bool,
    pub peer: Option<String>,
    pub network: Option<&'static str>,
    pub seconds: f64,
    pub miss: Option<MissReport>,
}

/// Why a lookup missed.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct MissReport {
    pub code: &'static str,
    pub text: String,
}

/// A running transfer of a NAR.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct TransferReport {
    pub id: u64,
    pub direction: &'static str,
    pub name: String,
    pub peer: Option<String>,
    pub network: Option<&'static str>,
    pub reason: Option<String>,
    pub started: f64,
    pub bytes: u64,
    pub size: u64,
    pub bytes_per_second: u64,
}

/// Totals since the start, and since the first start with this state directory.
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct AllTotals {
    pub start: TotalsSince,
    pub installation: Option<TotalsSince>,
}

/// Totals since a moment.
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct TotalsSince {
    pub since: f64,
    #[serde(flatten)]
    pub totals: Totals,
    pub upstream_seconds: f64,
}

/// Hourly totals.
#[derive(Debug, Default, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct History {
    pub hour_seconds: u64,
    pub hours: Vec<crate::stats::Hour>,
}
