//! Who is let in when there are many connections, and which connection ends for it.
//!
//! This machine's Nix comes first: a cache that it knows and cannot reach fails its builds. Neighbours are kept from
//! shutting out one another, and never make anybody wait.

use std::net::IpAddr;

/// Connections at once, each with a thread.
pub const MAX_CONNECTIONS: usize = 1024;

/// Of these, so many are for loopback alone, whatever the neighbours do: five times the 25 that Nix opens.
pub const OWN_CONNECTIONS: usize = 128;

/// Of these, so many for one address other than loopback: a neighbour alone must not shut out the others.
pub const MAX_CONNECTIONS_PER_PEER: usize = 256;

/// An open connection, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub struct Seat {
    /// Greater for later ones.
    pub id: u64,
    /// Who has it.
    pub peer: IpAddr,
    /// Since when it is idle, on any clock; `None` while it is at work.
    pub idle_since: Option<u64>,
}

/// What a newcomer finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Room {
    /// There is room.
    Free,
    /// There is, once the connection with this ID is closed.
    Instead(u64),
    /// There is none.
    Full,
}

/// Whether there is room for a connection from `newcomer` beside the open ones.
pub fn room(newcomer: IpAddr, open: impl Iterator<Item = Seat> + Clone) -> Room {
    let newcomer = newcomer.to_canonical();
    let strangers = open.clone().filter(|seat| !is_own(seat.peer));
    if is_own(newcomer) {
        if open.clone().count() < MAX_CONNECTIONS {
            return Room::Free;
        }
        // Of the strangers one that is idle; else one of our own that is; else a stranger's answer is cut, and its
        // Nix takes the path elsewhere.
        let victim = idlest(strangers.clone()).or_else(|| idlest(open)).or_else(|| strangers.map(|s| s.id).min());
        return victim.map_or(Room::Full, Room::Instead);
    }
    let its = strangers.clone().filter(|seat| seat.peer.to_canonical() == newcomer);
    let room_among = |victim: Option<u64>| victim.map_or(Room::Full, Room::Instead);
    if its.clone().count() >= MAX_CONNECTIONS_PER_PEER {
        room_among(idlest(its))
    } else if strangers.clone().count() >= MAX_CONNECTIONS - OWN_CONNECTIONS {
        room_among(idlest(strangers))
    } else if open.clone().count() >= MAX_CONNECTIONS {
        // This machine has more than its own then, and may lose an idle one.
        room_among(idlest(open))
    } else {
        Room::Free
    }
}

/// The one that is idle longest.
pub fn idlest(seats: impl Iterator<Item = Seat>) -> Option<u64> {
    seats.filter_map(|seat| Some((seat.idle_since?, seat.id))).min().map(|(_, id)| id)
}

fn is_own(ip: IpAddr) -> bool {
    ip.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGERS: usize = MAX_CONNECTIONS - OWN_CONNECTIONS;

    fn own() -> IpAddr {
        "::ffff:127.0.0.1".parse().unwrap()
    }

    fn stranger(n: usize) -> IpAddr {
        IpAddr::from([10, 0, (n / 200) as u8, (n % 200) as u8])
    }

    /// Two connections for each stranger, all at work; IDs count from 0.
    fn strangers(count: usize) -> Vec<Seat> {
        (0..count).map(|n| Seat { id: n as u64, peer: stranger(n / 2), idle_since: None }).collect()
    }

    fn and_own(mut seats: Vec<Seat>, count: usize) -> Vec<Seat> {
        let from = seats.len();
        seats.extend((from..from + count).map(|n| Seat { id: n as u64, peer: own(), idle_since: None }));
        seats
    }

    fn find(newcomer: IpAddr, seats: &[Seat]) -> Room {
        room(newcomer, seats.iter().copied())
    }

    #[test]
    fn strangers_leave_room_for_this_machine() {
        assert_eq!(find(stranger(999), &strangers(STRANGERS - 1)), Room::Free);
        let mut seats = strangers(STRANGERS);
        assert_eq!(find(stranger(999), &seats), Room::Full);
        assert_eq!(find(own(), &seats), Room::Free);
        seats[7].idle_since = Some(70);
        seats[8].idle_since = Some(60);
        assert_eq!(find(stranger(999), &seats), Room::Instead(8));
    }

    #[test]
    fn strangers_take_nothing_of_what_is_reserved() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats[STRANGERS].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Room::Full);
        let mut seats = and_own(strangers(10), MAX_CONNECTIONS - 10);
        assert_eq!(find(stranger(999), &seats), Room::Full);
        seats[500].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Room::Instead(500));
    }

    #[test]
    fn this_machine_is_let_in_whatever_strangers_do() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats.rotate_left(100);
        assert_eq!(find(own(), &seats), Room::Instead(0), "the oldest stranger, though at work");
        let last = seats.iter_mut().find(|s| s.peer == own()).unwrap();
        last.idle_since = Some(1);
        let last = last.id;
        assert_eq!(find(own(), &seats), Room::Instead(last));
        seats[0].idle_since = Some(9);
        assert_eq!(find(own(), &seats), Room::Instead(100), "a stranger that is idle");
        assert_eq!(find(own(), &and_own(Vec::new(), MAX_CONNECTIONS)), Room::Full);
    }

    #[test]
    fn one_stranger_does_not_shut_out_the_others() {
        let seat = |n| Seat { id: n, peer: stranger(1), idle_since: (n == 9).then_some(5) };
        let mut seats: Vec<Seat> = (0..MAX_CONNECTIONS_PER_PEER as u64).map(seat).collect();
        assert_eq!(find(stranger(2), &seats), Room::Free);
        assert_eq!(find(stranger(1), &seats), Room::Instead(9));
        seats[9].idle_since = None;
        assert_eq!(find(stranger(1), &seats), Room::Full);
    }
}
