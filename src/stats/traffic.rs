//! What went to and came from each peer. Bounded; who was not heard of longest goes first. Those
//! with a series never go, so that sums never go down.

use super::Network;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Peers with counts of their own: as many as are shown.
pub const MAX_PEERS: usize = 256;

/// Of these, so many have series of their own in metrics, of which a server keeps each for ever.
pub const MAX_SERIES: usize = 32;

/// The longest name that a peer may have: as trackers allow.
const MAX_ID: usize = 128;

/// Whose counts these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TrafficKey {
    /// Where it is.
    pub network: Network,
    /// Its address.
    pub ip: IpAddr,
    /// The port of one that a tracker named; 0 for a neighbour, whatever its port, and for somebody
    /// who only asks.
    pub port: u16,
}

impl TrafficKey {
    /// A peer that is asked, at its HTTP server.
    pub fn server(network: Network, address: SocketAddr) -> TrafficKey {
        let port = if network == Network::Wan { address.port() } else { 0 };
        TrafficKey { network, ip: address.ip().to_canonical(), port }
    }

    /// A peer that asks.
    pub fn asker(network: Network, ip: IpAddr) -> TrafficKey {
        TrafficKey { network, ip: ip.to_canonical(), port: 0 }
    }
}

/// The counts of one peer.
#[derive(Debug, Default)]
pub struct PeerTraffic {
    /// Bytes of NARs from it.
    pub received: AtomicU64,
    /// Bytes of NARs to it.
    pub sent: AtomicU64,
    /// Narinfos from it that were used.
    pub hits: AtomicU64,
    /// Whole NARs to which it gave a part.
    pub nars: AtomicU64,
    /// Milliseconds since the start when it was last counted.
    last: AtomicU64,
    has_series: bool,
    /// What a tracker calls it. Anything may be in it.
    id: Mutex<Option<Box<str>>>,
}

impl PeerTraffic {
    /// What a tracker calls it.
    pub fn id(&self) -> Option<String> {
        self.id.lock().unwrap_or_else(PoisonError::into_inner).as_deref().map(str::to_owned)
    }

    /// Remembers that.
    pub fn set_id(&self, id: &str) {
        let mut known = self.id.lock().unwrap_or_else(PoisonError::into_inner);
        if id.len() <= MAX_ID && known.as_deref() != Some(id) {
            *known = Some(id.into());
        }
    }

    /// Whether metrics name it; the others are counted together.
    pub fn has_series(&self) -> bool {
        self.has_series
    }
}

/// All peers.
pub(super) struct Traffic {
    peers: HashMap<TrafficKey, Arc<PeerTraffic>>,
    started: Instant,
}

impl Traffic {
    pub fn new(started: Instant) -> Self {
        Traffic { peers: HashMap::new(), started }
    }

    pub fn of(&mut self, who: TrafficKey, now: Instant) -> Arc<PeerTraffic> {
        let at = u64::try_from(now.saturating_duration_since(self.started).as_millis())
            .unwrap_or(u64::MAX);
        if let Some(counts) = self.peers.get(&who) {
            counts.last.store(at, Ordering::Relaxed);
            return counts.clone();
        }
        if self.peers.len() >= MAX_PEERS {
            self.forget_one();
        }
        // Who only asks may be anybody, and come under any address.
        let may_have = who.network == Network::Lan || who.port != 0;
        let has_series =
            may_have && self.peers.values().filter(|counts| counts.has_series).count() < MAX_SERIES;
        let counts =
            Arc::new(PeerTraffic { last: at.into(), has_series, ..PeerTraffic::default() });
        self.peers.insert(who, counts.clone());
        counts
    }

    fn forget_one(&mut self) {
        // Who has a series keeps it: its place would be another's, and there would be more of them
        // as time goes by.
        let age = |counts: &PeerTraffic| (counts.has_series(), counts.last.load(Ordering::Relaxed));
        let oldest = self.peers.iter().min_by_key(|(_, counts)| age(counts));
        oldest.map(|(who, _)| *who).and_then(|who| self.peers.remove(&who));
    }

    pub fn all(&self) -> Vec<(TrafficKey, Arc<PeerTraffic>)> {
        self.peers.iter().map(|(who, counts)| (*who, counts.clone())).collect()
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
    fn a_neighbour_is_an_address_and_a_far_peer_an_address_and_a_port() {
        let at =
            |network, port| TrafficKey::server(network, (Ipv4Addr::new(10, 0, 0, 1), port).into());
        assert_eq!(at(Network::Lan, 1), at(Network::Lan, 2));
        assert_ne!(at(Network::Wan, 1), at(Network::Wan, 2));
        assert_ne!(at(Network::Lan, 1), at(Network::Wan, 1));
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        assert_eq!(TrafficKey::asker(Network::Lan, mapped), at(Network::Lan, 7));
    }

    #[test]
    fn memory_and_series_are_bounded() {
        let start = Instant::now();
        let mut traffic = Traffic::new(start);
        for number in 0..2000 {
            let now = start + Duration::from_secs(number);
            traffic.of(lan(number as u32), now);
            // One that is always here.
            traffic.of(lan(0), now);
        }
        let all = traffic.all();
        assert_eq!(all.len(), MAX_PEERS);
        assert!(all.iter().any(|(who, _)| *who == lan(0)));
        assert_eq!(all.iter().filter(|(_, counts)| counts.has_series()).count(), MAX_SERIES);
    }

    /// Else whoever has many addresses could make as many series as they like.
    #[test]
    fn strangers_who_ask_have_no_series() {
        let (mut traffic, now) = (Traffic::new(Instant::now()), Instant::now());
        let stranger = TrafficKey::asker(Network::Wan, Ipv4Addr::new(203, 0, 113, 1).into());
        assert!(!traffic.of(stranger, now).has_series());
        assert!(traffic.of(lan(1), now).has_series());
    }

    #[test]
    fn a_name_is_bounded() {
        let counts = PeerTraffic::default();
        counts.set_id(&"x".repeat(MAX_ID + 1));
        assert_eq!(counts.id(), None);
        counts.set_id("<img src=x>");
        assert_eq!(counts.id().as_deref(), Some("<img src=x>"));
    }

    /// Who was forgotten left its series to the next one: a neighbour with many addresses got as
    /// many as it liked.
    #[test]
    fn series_are_bounded_over_all_time() {
        let start = Instant::now();
        let mut traffic = Traffic::new(start);
        let has_series = |number: u32| {
            let now = start + Duration::from_secs(number.into());
            traffic.of(lan(number), now).has_series()
        };
        assert_eq!((0..5000).map(has_series).filter(|has| *has).count(), MAX_SERIES);
    }
}
