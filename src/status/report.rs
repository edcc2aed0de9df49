//! The shape of `/status.json`. docs/status.md describes it; a field that changes its meaning makes
//! another version.

use crate::stats::Totals;
use serde::Serialize;

/// Of the shape.
pub const VERSION: u32 = 1;

/// Everything, at one moment. Moments are seconds since 1970, durations seconds, sizes bytes.
#[derive(Debug, Serialize)]
pub struct StatusReport {
    /// [`VERSION`].
    pub version: u32,
    /// The moment.
    pub time: f64,
    /// This node.
    pub node: NodeReport,
    /// Whether it is well.
    pub health: HealthReport,
    /// Where neighbours are looked for.
    pub networks: Vec<OwnNetwork>,
    /// Those that are told of this node.
    pub trackers: Vec<TrackerState>,
    /// What the router lets in; `None` without `--map-port`.
    pub port_mapping: Option<PortMapping>,
    /// Those that `--friend` and the friends' file name.
    pub friends: Vec<FriendReport>,
    /// Those that gave and took most first.
    pub peers: Vec<PeerReport>,
    /// How many there are beside them.
    pub peers_omitted: usize,
    /// The latest first.
    pub lookups: Vec<LookupReport>,
    /// The oldest first.
    pub transfers: Vec<TransferReport>,
    /// What it all came to.
    pub totals: AllTotals,
    /// And when.
    pub history: History,
}

/// This node.
#[derive(Debug, Serialize)]
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
    pub flags: Vec<String>,
}

/// Whether the node is well.
#[derive(Debug, Serialize)]
pub struct HealthReport {
    /// Whether no problem is serious.
    pub ok: bool,
    /// What a person should know.
    pub problems: Vec<Problem>,
}

/// Something that is not as it should be.
#[derive(Debug, Serialize)]
pub struct Problem {
    /// For programs.
    pub code: &'static str,
    /// With the remedy.
    pub text: String,
    /// Whether the node is of no use like that.
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

/// What the router lets in.
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

/// Whether lookups ask a peer on the LAN.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Liveness {
    /// Lookups ask it, and it has been heard.
    Live,
    /// It was given up: lookups send it no queries until it answers a probe.
    Silent,
    /// `--peer` names it, lookups ask it, and nothing has come from it yet.
    Unheard,
}

/// A peer.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct PeerReport {
    pub address: String,
    pub network: &'static str,
    pub found_by: &'static str,
    pub id: Option<String>,
    pub last_heard: Option<f64>,
    pub state: Option<Liveness>,
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

/// That a peer is avoided.
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

/// Why a lookup found nothing.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct MissReport {
    pub code: &'static str,
    pub text: String,
}

/// A NAR under way.
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

/// Since the start, and since the first one.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct AllTotals {
    pub start: TotalsSince,
    pub installation: Option<TotalsSince>,
}

/// What it came to since some moment.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct TotalsSince {
    pub since: f64,
    #[serde(flatten)]
    pub totals: Totals,
    pub upstream_seconds: f64,
}

/// Hour by hour.
#[derive(Debug, Serialize)]
#[expect(missing_docs, reason = "docs/status.md has them")]
pub struct History {
    pub hour_seconds: u64,
    pub hours: Vec<crate::stats::Hour>,
}
