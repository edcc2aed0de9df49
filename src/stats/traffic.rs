//! Traffic of each peer. When the table is full, the peer that was counted longest ago is dropped.
//! A peer with a metrics series is never dropped, so that its series never goes down.

use super::Network;
use crate::lock::Mutex;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Maximum number of peers with counts of their own: as many as the status lists.
pub const MAX_PEERS: usize = 256;

/// Maximum number of peers with a metrics series. Prometheus keeps each series that it has seen.
pub const MAX_SERIES: usize = 32;

/// Maximum length of a peer ID, in bytes; a longer one is ignored. Trackers have the same limit.
const MAX_ID: usize = 128;

/// Identifies a peer in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TrafficKey {
    /// Network of the peer.
    pub network: Network,
    /// IP address of the peer.
    pub ip: IpAddr,
    /// Port of the HTTP server of a WAN peer that was asked. 0 for LAN peers and for clients.
    pub port: u16,
}

impl TrafficKey {
    /// Key of a peer that this node asks, by the address of its HTTP server.
    pub fn server(network: Network, address: SocketAddr) -> TrafficKey {
        let port = if network == Network::Wan { address.port() } else { 0 };
        TrafficKey { network, ip: address.ip().to_canonical(), port }
    }

    /// Key of a peer that asks this node.
    pub fn asker(network: Network, ip: IpAddr) -> TrafficKey {
        TrafficKey { network, ip: ip.to_canonical(), port: 0 }
    }
}

/// Counts of one peer.
#[derive(Debug, Default)]
pub struct PeerTraffic {
    /// Bytes of NARs received from it.
    pub received: AtomicU64,
    /// Bytes of NARs sent to it.
    pub sent: AtomicU64,
    /// Number of its narinfos that were used.
    pub hits: AtomicU64,
    /// Number of whole NARs to which it contributed.
    pub nars: AtomicU64,
    /// Time of the last count, in milliseconds since the start.
    last: AtomicU64,
    has_series: bool,
    /// Its ID at a tracker, which may contain any characters.
    id: Mutex<Option<Box<str>>>,
}

impl PeerTraffic {
    /// Its ID at a tracker, which may contain any characters. `None` if it is not known.
    pub fn id(&self) -> Option<String> {
        self.id.lock().as_deref().map(str::to_owned)
    }

    /// Sets its ID at a tracker. Ignores an ID of more than 128 bytes.
    pub fn set_id(&self, id: &str) {
        let mut known = self.id.lock();
        if id.len() <= MAX_ID && known.as_deref() != Some(id) {
            *known = Some(id.into());
        }
    }

    /// Whether the peer has a metrics series. The others share one.
    pub fn has_series(&self) -> bool {
        self.has_series
    }
}

/// The table of all peers, at most [`MAX_PEERS`].
pub(super) struct Traffic {
    peers: HashMap<TrafficKey, Arc<PeerTraffic>>,
    started: Instant,
}

impl Traffic {
    pub fn new(started: Instant) -> Self {
        Traffic { peers: HashMap::new(), started }
    }

    pub fn entry(&mut self, key: TrafficKey, now: Instant) -> Arc<PeerTraffic> {
        let at = u64::try_from(now.saturating_duration_since(self.started).as_millis())
            .unwrap_or(u64::MAX);
        if let Some(counts) = self.peers.get(&key) {
            counts.last.store(at, Ordering::Relaxed);
            return counts.clone();
        }
        if self.peers.len() >= MAX_PEERS {
            self.evict_oldest();
        }
        // A WAN client may use any number of addresses.
        let may_have = key.network == Network::Lan || key.port != 0;
        let has_series =
            may_have && self.peers.values().filter(|counts| counts.has_series).count() < MAX_SERIES;
        let counts =
            Arc::new(PeerTraffic { last: at.into(), has_series, ..PeerTraffic::default() });
        self.peers.insert(key, counts.clone());
        counts
    }

    fn evict_oldest(&mut self) {
        // Peers with a series come last: a replacement would get a new series, and their number
        // would grow.
        let age = |counts: &PeerTraffic| (counts.has_series(), counts.last.load(Ordering::Relaxed));
        let oldest = self.peers.iter().min_by_key(|(_, counts)| age(counts));
        oldest.map(|(key, _)| *key).and_then(|key| self.peers.remove(&key));
    }

    pub fn all(&self) -> Vec<(TrafficKey, Arc<PeerTraffic>)> {
        self.peers.iter().map(|(key, counts)| (*key, counts.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use std::time::Duration;

    fn lan(number: u32) -> TrafficKey {
        TrafficKey::server(Network::Lan, (Ipv4Addr::from_bits(0x0a00_0000 + number), 1).into())
    }

    #[test]
    fn lan_peers_are_keyed_by_address_and_wan_peers_also_by_port() {
        let at =
            |network, port| TrafficKey::server(network, (Ipv4Addr::new(10, 0, 0, 1), port).into());
        assert_eq!(at(Network::Lan, 1), at(Network::Lan, 2));
        assert_ne!(at(Network::Wan, 1), at(Network::Wan, 2));
        assert_ne!(at(Network::Lan, 1), at(Network::Wan, 1));
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(TrafficKey::asker(Network::Lan, mapped), at(Network::Lan, 7));
    }

    #[test]
    fn peers_and_series_are_bounded() {
        let start = Instant::now();
        let mut traffic = Traffic::new(start);
        for number in 0..2000 {
            let now = start + Duration::from_secs(number);
            traffic.entry(lan(number as u32), now);
            // A peer that is always active.
            traffic.entry(lan(0), now);
        }
        let all = traffic.all();
        assert_eq!(all.len(), MAX_PEERS);
        assert!(all.iter().any(|(key, _)| *key == lan(0)));
        assert_eq!(all.iter().filter(|(_, counts)| counts.has_series()).count(), MAX_SERIES);
    }

    /// A client with many addresses could create any number of series.
    #[test]
    fn wan_clients_have_no_series() {
        let (mut traffic, now) = (Traffic::new(Instant::now()), Instant::now());
        let stranger = TrafficKey::asker(Network::Wan, Ipv4Addr::new(203, 0, 113, 1).into());
        assert!(!traffic.entry(stranger, now).has_series());
        assert!(traffic.entry(lan(1), now).has_series());
    }

    #[test]
    fn too_long_peer_id_is_ignored() {
        let counts = PeerTraffic::default();
        counts.set_id(&"x".repeat(MAX_ID + 1));
        assert_eq!(counts.id(), None);
        counts.set_id("<img src=x>");
        assert_eq!(counts.id().as_deref(), Some("<img src=x>"));
    }

    /// Regression: a dropped peer passed its series on, so that one neighbour with many addresses
    /// created any number of series.
    #[test]
    fn series_stay_bounded_after_peers_are_dropped() {
        let start = Instant::now();
        let mut traffic = Traffic::new(start);
        let has_series = |number: u32| {
            let now = start + Duration::from_secs(number.into());
            traffic.entry(lan(number), now).has_series()
        };
        assert_eq!((0..5000).map(has_series).filter(|has| *has).count(), MAX_SERIES);
    }
}
