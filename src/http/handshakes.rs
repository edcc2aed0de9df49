//! Places for TLS handshakes. Anybody can begin one and leave it half done, and each holds a
//! thread, so there are few, and one that is begun when all are taken ends another: strangers shut
//! out nobody but themselves.

use crate::time_scale::Timeout;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv6Addr, Shutdown, TcpStream};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A handshake takes at most this. Over the slowest link it takes three round trips.
pub(super) const HANDSHAKE_TIMEOUT: Timeout = Timeout::from_secs(10);

/// Handshakes under way at once.
const MAX_HANDSHAKES: usize = 64;

/// Of these, those for addresses at which friends were authenticated: strangers have the others.
const FRIENDS_HANDSHAKES: usize = 16;

/// Addresses of friends that are remembered: 16 friends, and where they were before.
const MAX_ADDRESSES: usize = 64;

/// The places.
#[derive(Default)]
pub(super) struct Handshakes {
    state: Mutex<HandshakesState>,
}

#[derive(Default)]
struct HandshakesState {
    /// The oldest first.
    places: Vec<PendingHandshake>,
    /// Where friends were authenticated, the latest last.
    addresses: VecDeque<IpAddr>,
}

/// A handshake under way.
struct PendingHandshake {
    id: u64,
    group: IpAddr,
    is_known: bool,
    socket: TcpStream,
}

/// The place of one handshake; dropping it returns it.
pub(super) struct HandshakePermit<'a> {
    handshakes: &'a Handshakes,
    id: u64,
    ip: IpAddr,
}

impl Handshakes {
    /// Takes a place. If there is none, the oldest handshake of the network that has the most of
    /// them is ended.
    pub(super) fn enter(&self, id: u64, ip: IpAddr, socket: TcpStream) -> HandshakePermit<'_> {
        let ip = ip.to_canonical();
        let mut state = self.lock();
        let is_known = state.addresses.contains(&ip);
        let strangers = state.places.iter().filter(|seat| !seat.is_known).count();
        let is_full = match is_known {
            true => state.places.len() >= MAX_HANDSHAKES,
            false => strangers >= MAX_HANDSHAKES - FRIENDS_HANDSHAKES,
        };
        if is_full && let Some(at) = state.victim() {
            let _ = state.places.remove(at).socket.shutdown(Shutdown::Both);
        }
        state.places.push(PendingHandshake { id, group: group(ip), is_known, socket });
        HandshakePermit { handshakes: self, id, ip }
    }

    fn lock(&self) -> MutexGuard<'_, HandshakesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HandshakesState {
    /// The oldest stranger of the fullest group; without strangers, the oldest of all.
    fn victim(&self) -> Option<usize> {
        let size = |group: IpAddr| {
            self.places.iter().filter(|seat| !seat.is_known && seat.group == group).count()
        };
        let strangers = self.places.iter().enumerate().filter(|(_, seat)| !seat.is_known);
        // Of equals the last one counts, so that the oldest has to come last.
        let oldest = strangers.rev().max_by_key(|(_, seat)| size(seat.group)).map(|(at, _)| at);
        oldest.or((!self.places.is_empty()).then_some(0))
    }
}

impl HandshakePermit<'_> {
    /// The handshake is over, and a friend is at that address.
    pub(super) fn succeeded(self) {
        let mut state = self.handshakes.lock();
        state.addresses.retain(|known| *known != self.ip);
        if state.addresses.len() >= MAX_ADDRESSES {
            state.addresses.pop_front();
        }
        state.addresses.push_back(self.ip);
    }
}

impl Drop for HandshakePermit<'_> {
    fn drop(&mut self) {
        self.handshakes.lock().places.retain(|seat| seat.id != self.id);
    }
}

/// What one stranger is likely to have: a /24 of IPv4, a /56 of IPv6. On the LAN it is an address,
/// as all are in one network.
fn group(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(v4) if v4.is_private() || v4.is_loopback() || v4.is_link_local() => ip,
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            [a, b, c, 0].into()
        }
        IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_unique_local() => ip,
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() & !(u128::MAX >> 56)).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn socket() -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        TcpStream::connect(listener.local_addr().unwrap()).unwrap()
    }

    fn ids(handshakes: &Handshakes) -> Vec<u64> {
        handshakes.lock().places.iter().map(|seat| seat.id).collect()
    }

    #[test]
    fn flood_of_one_network_ends_its_own_handshakes() {
        let handshakes = Handshakes::default();
        let flood = |n: u64| IpAddr::from([203, 0, 113, n as u8]);
        let _victim = handshakes.enter(9999, "198.51.100.1".parse().unwrap(), socket());
        let _places: Vec<_> = (0..200).map(|n| handshakes.enter(n, flood(n), socket())).collect();
        let open = ids(&handshakes);
        assert_eq!(open.len(), MAX_HANDSHAKES - FRIENDS_HANDSHAKES);
        assert!(open.contains(&9999), "another network was shut out");
        assert!(open.contains(&199) && !open.contains(&0), "not the oldest ended: {open:?}");
    }

    #[test]
    fn places_of_friends_are_out_of_reach_of_strangers() {
        let handshakes = Handshakes::default();
        let friend: IpAddr = "192.0.2.7".parse().unwrap();
        handshakes.enter(1, friend, socket()).succeeded();
        assert!(ids(&handshakes).is_empty(), "a place was not returned");
        let friends: Vec<_> =
            (0..FRIENDS_HANDSHAKES as u64).map(|n| handshakes.enter(n, friend, socket())).collect();
        let stranger = |n: u64| IpAddr::from([10, 0, n as u8, 1]);
        let _strangers: Vec<_> =
            (100..300).map(|n| handshakes.enter(n, stranger(n), socket())).collect();
        let open = ids(&handshakes);
        assert_eq!(open.len(), MAX_HANDSHAKES);
        assert!((0..FRIENDS_HANDSHAKES as u64).all(|id| open.contains(&id)), "{open:?}");
        drop(friends);
        assert_eq!(ids(&handshakes).len(), MAX_HANDSHAKES - FRIENDS_HANDSHAKES);
    }

    #[test]
    fn groups_are_what_one_stranger_has() {
        let same = |a: &str, b: &str| group(a.parse().unwrap()) == group(b.parse().unwrap());
        assert!(same("203.0.113.1", "203.0.113.200") && !same("203.0.113.1", "203.0.114.1"));
        assert!(
            same("2001:db8:0:ff::1", "2001:db8:0:1::2")
                && !same("2001:db8:0:100::1", "2001:db8:0:ff::1")
        );
        assert!(!same("192.168.1.1", "192.168.1.2") && !same("fd00::1", "fd00::2"));
    }
}
