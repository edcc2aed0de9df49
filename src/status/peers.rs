//! Rows of the peers. Discovery, the health of peers and their traffic each add to them.

use super::clock::{ClockReading, seconds};
use super::report::{AvoidanceReport, PeerReport, PeerState};
use crate::lan::Neighbour;
use crate::peers::health::PeerHealth;
use crate::stats::{Network, PeerTraffic, TrafficKey};
use std::cmp::Reverse;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A row for each peer. Several nodes of `--peer` may share an IP address: the first has the
/// address as its key, like other LAN peers, and the others have address and port.
#[derive(Default)]
pub(super) struct PeerRows(HashMap<TrafficKey, PeerReport>);

impl PeerRows {
    /// Adds a row for each LAN peer.
    pub fn add_neighbours(&mut self, neighbours: Vec<Neighbour>, now: ClockReading) {
        for neighbour in neighbours {
            let mut http = neighbour.address;
            http.set_port(neighbour.http_port.unwrap_or(http.port()));
            let mut key = TrafficKey::server(Network::Lan, http);
            if self.0.contains_key(&key) {
                key.port = http.port();
            }
            let row = PeerReport {
                found_by: neighbour.met_by.code(),
                last_heard: neighbour.heard.map(|heard| now.of(heard)),
                state: Some(peer_state(&neighbour)),
                silent_since: neighbour.silent_since.map(|since| now.of(since)),
                round_trip_seconds: neighbour.round_trip.map(seconds),
                ..empty(http, Network::Lan)
            };
            self.0.insert(key, row);
        }
    }

    /// Adds what requests to peers have shown.
    pub fn add_health(&mut self, health: &PeerHealth, now: ClockReading) {
        for seen in health.snapshots(now.instant) {
            let network = if seen.is_far { Network::Wan } else { Network::Lan };
            let key = self.key(network, seen.address);
            let row = self.0.entry(key).or_insert_with(|| empty(seen.address, network));
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
    }

    /// Adds the traffic of each peer, and rows for clients.
    pub fn add_traffic(&mut self, traffic: Vec<(TrafficKey, Arc<PeerTraffic>)>) {
        for (key, counts) in traffic {
            // A client's port is arbitrary. If exactly one known peer has its address, the counts
            // are that peer's.
            let mut far =
                self.0.keys().filter(|known| known.network == key.network && known.ip == key.ip);
            let key = match (far.next(), far.next()) {
                (Some(known), None) if key.port == 0 => *known,
                _ => key,
            };
            let row = self.0.entry(key).or_insert_with(|| {
                let row = empty(SocketAddr::new(key.ip, key.port), key.network);
                match key.port {
                    0 => PeerReport { found_by: "request", address: key.ip.to_string(), ..row },
                    _ => PeerReport { found_by: "tracker", ..row },
                }
            });
            row.id = row.id.take().or_else(|| counts.id());
            row.hits += counts.hits.load(Ordering::Relaxed);
            row.nars += counts.nars.load(Ordering::Relaxed);
            row.received_bytes += counts.received.load(Ordering::Relaxed);
            row.sent_bytes += counts.sent.load(Ordering::Relaxed);
        }
    }

    /// All rows: first those with most traffic, last those of clients.
    pub fn into_sorted(self) -> Vec<PeerReport> {
        let mut peers: Vec<(TrafficKey, PeerReport)> = self.0.into_iter().collect();
        let moved = |peer: &PeerReport| peer.received_bytes.saturating_add(peer.sent_bytes);
        // Known peers come first, so that clients do not displace them from the report.
        peers.sort_by_cached_key(|(key, peer)| {
            (peer.found_by == "request", Reverse(moved(peer)), key.ip, key.port)
        });
        peers.into_iter().map(|(_, peer)| peer).collect()
    }

    /// Key of the row for the peer with the HTTP server at `address`.
    fn key(&self, network: Network, address: SocketAddr) -> TrafficKey {
        let key = TrafficKey::server(network, address);
        let with_port = TrafficKey { port: address.port(), ..key };
        if self.0.contains_key(&with_port) { with_port } else { key }
    }
}

fn peer_state(neighbour: &Neighbour) -> PeerState {
    match (neighbour.silent_since, neighbour.heard) {
        (Some(_), _) => PeerState::Silent,
        (None, Some(_)) => PeerState::Live,
        (None, None) => PeerState::Unheard,
    }
}

/// Row of a peer of which only the address is known.
pub(super) fn empty(address: SocketAddr, network: Network) -> PeerReport {
    PeerReport {
        address: address.to_string(),
        network: network.as_str(),
        found_by: if network == Network::Lan { "broadcast" } else { "tracker" },
        ..PeerReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lan::MetBy;
    use std::time::{Duration, Instant, SystemTime};

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
        let mut rows = PeerRows::default();
        rows.add_neighbours(
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
            let row = &rows.0[&rows.key(Network::Lan, address)];
            assert_eq!(row.address, address.to_string());
            (row.found_by, row.state.unwrap(), row.last_heard, row.silent_since)
        };
        assert_eq!(row(at(1, 1)), ("query", PeerState::Live, Some(1001.0), None));
        assert_eq!(row(at(2, 1)), ("broadcast", PeerState::Silent, Some(1001.0), Some(1002.0)));
        assert_eq!(row(at(3, 1)), ("flag", PeerState::Unheard, None, None));
        assert_eq!(row(at(4, 1)), ("flag", PeerState::Live, Some(1001.0), None));
        assert_eq!(row(at(4, 2)), ("flag", PeerState::Silent, None, Some(1003.0)));
        // Traffic is counted by the IP address alone.
        assert!(rows.0.contains_key(&TrafficKey::asker(Network::Lan, at(4, 0).ip())));
    }
}
