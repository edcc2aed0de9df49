//! Limits concurrent TLS handshakes. Anyone can leave a handshake half done, and each holds a
//! thread. A new handshake at the limit ends an old one of the network that has the most, so that a
//! flood hits the network it comes from, also if a friend shares that network's address.

use super::admission::group;
use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
use crate::time_scale::Timeout;
use std::net::{IpAddr, Shutdown, TcpStream};

/// Time limit for a handshake, which takes up to three round trips. Afterwards the connection is
/// closed.
pub(super) const HANDSHAKE_TIMEOUT: Timeout = Timeout::from_secs(10);

/// Handshakes under way at which a new one ends another one.
const MAX_HANDSHAKES: usize = 64;

/// Handshakes of [`MAX_HANDSHAKES`] that strangers cannot use. At the difference, a stranger's new
/// one ends another stranger's. Beyond them, those from friends' addresses are the first to end at
/// the limit. An address is a friend's if a friend was authenticated there.
const FRIENDS_HANDSHAKES: usize = 16;

/// Addresses of friends that are remembered: those of 16 friends, and their earlier ones. At the
/// bound, the oldest is dropped.
const MAX_ADDRESSES: usize = 64;

/// The handshakes under way, and the addresses known to be friends'.
#[derive(Default)]
pub(super) struct Handshakes {
    state: Mutex<HandshakesState>,
}

#[derive(Default)]
struct HandshakesState {
    /// Handshakes under way, oldest first.
    pending: Vec<PendingHandshake>,
    /// Addresses at which friends were authenticated.
    addresses: BoundedMap<IpAddr, (), MAX_ADDRESSES>,
}

/// A handshake under way.
struct PendingHandshake {
    id: u64,
    group: IpAddr,
    is_known: bool,
    socket: TcpStream,
}

/// The registration of one handshake. Dropping it removes the handshake.
pub(super) struct HandshakePermit<'a> {
    handshakes: &'a Handshakes,
    id: u64,
    ip: IpAddr,
}

impl Handshakes {
    /// Registers a handshake. At the limit, it first ends the oldest handshake of the network that
    /// has the most of them. Does not wait.
    pub(super) fn register(&self, id: u64, ip: IpAddr, socket: TcpStream) -> HandshakePermit<'_> {
        let ip = ip.to_canonical();
        let mut state = self.state.lock();
        let is_known = state.addresses.get(&ip).is_some();
        let friends = state.pending.iter().filter(|handshake| handshake.is_known).count();
        let strangers = state.pending.len() - friends;
        let is_full = state.pending.len() >= MAX_HANDSHAKES
            || !is_known && strangers >= MAX_HANDSHAKES - FRIENDS_HANDSHAKES;
        // Below the limit, a stranger is beyond the strangers' share.
        let ends_known = friends > FRIENDS_HANDSHAKES && state.pending.len() >= MAX_HANDSHAKES;
        if is_full && let Some(index) = state.victim(ends_known) {
            let _ = state.pending.remove(index).socket.shutdown(Shutdown::Both);
        }
        state.pending.push(PendingHandshake { id, group: group(ip), is_known, socket });
        HandshakePermit { handshakes: self, id, ip }
    }
}

impl HandshakesState {
    /// Index of the oldest handshake in the largest group, of those from friends' addresses or of
    /// the others.
    fn victim(&self, is_known: bool) -> Option<usize> {
        let size = |group: IpAddr| {
            self.pending
                .iter()
                .filter(|handshake| handshake.is_known == is_known && handshake.group == group)
                .count()
        };
        let candidates =
            self.pending.iter().enumerate().filter(|(_, handshake)| handshake.is_known == is_known);
        // `max_by_key` returns the last of equal elements, so the order is reversed.
        candidates.rev().max_by_key(|(_, handshake)| size(handshake.group)).map(|(index, _)| index)
    }
}

impl HandshakePermit<'_> {
    /// Ends the registration and remembers that a friend is at this address.
    pub(super) fn record_friend(self) {
        self.handshakes.state.lock().addresses.insert(self.ip, ());
    }
}

impl Drop for HandshakePermit<'_> {
    fn drop(&mut self) {
        self.handshakes.state.lock().pending.retain(|handshake| handshake.id != self.id);
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
        handshakes.state.lock().pending.iter().map(|handshake| handshake.id).collect()
    }

    #[test]
    fn flood_from_one_network_ends_only_its_own_handshakes() {
        let handshakes = Handshakes::default();
        let flood = |n: u64| IpAddr::from([203, 0, 113, n as u8]);
        let _victim = handshakes.register(9999, "198.51.100.1".parse().unwrap(), socket());
        let _places: Vec<_> =
            (0..200).map(|n| handshakes.register(n, flood(n), socket())).collect();
        let open = ids(&handshakes);
        assert_eq!(open.len(), MAX_HANDSHAKES - FRIENDS_HANDSHAKES);
        assert!(open.contains(&9999), "another network was shut out");
        assert!(open.contains(&199) && !open.contains(&0), "not the oldest ended: {open:?}");
    }

    #[test]
    fn strangers_do_not_end_handshakes_of_friends() {
        let handshakes = Handshakes::default();
        let friend: IpAddr = "192.0.2.7".parse().unwrap();
        handshakes.register(1, friend, socket()).record_friend();
        assert!(ids(&handshakes).is_empty(), "a place was not returned");
        let friends: Vec<_> = (0..FRIENDS_HANDSHAKES as u64)
            .map(|n| handshakes.register(n, friend, socket()))
            .collect();
        let stranger = |n: u64| IpAddr::from([10, 0, n as u8, 1]);
        let _strangers: Vec<_> =
            (100..300).map(|n| handshakes.register(n, stranger(n), socket())).collect();
        let open = ids(&handshakes);
        assert_eq!(open.len(), MAX_HANDSHAKES);
        assert!((0..FRIENDS_HANDSHAKES as u64).all(|id| open.contains(&id)), "{open:?}");
        drop(friends);
        assert_eq!(ids(&handshakes).len(), MAX_HANDSHAKES - FRIENDS_HANDSHAKES);
    }

    /// Regression test: half-done handshakes from one friend's address shut out all others.
    #[test]
    fn flood_from_a_friends_address_shuts_out_nobody() {
        let handshakes = Handshakes::default();
        let friend = IpAddr::from([192, 0, 2, 7]);
        let other = IpAddr::from([198, 51, 100, 1]);
        handshakes.register(999, friend, socket()).record_friend();
        handshakes.register(999, other, socket()).record_friend();
        let flood = |from: u64| -> Vec<_> {
            (from..from + 100).map(|n| handshakes.register(n, friend, socket())).collect()
        };
        let mut places = flood(0);
        places.push(handshakes.register(1000, other, socket()));
        let stranger = |n: u64| IpAddr::from([10, 0, 0, n as u8]);
        places.extend((2000..2050).map(|n| handshakes.register(n, stranger(n), socket())));
        places.extend(flood(100));
        let open = ids(&handshakes);
        assert!(open.len() <= MAX_HANDSHAKES, "{open:?}");
        assert!(open.contains(&1000), "another friend was shut out: {open:?}");
        let strangers = open.iter().filter(|&&id| id >= 2000).count();
        assert!(strangers + 1 >= MAX_HANDSHAKES - FRIENDS_HANDSHAKES, "{open:?}");
    }
}
