//! Who is let in when there are many connections, and which connection ends for it.
//!
//! This machine's Nix comes first: a cache that it knows and cannot reach fails its builds.
//! Neighbours are kept from shutting out one another, and never make anybody wait.

use std::collections::HashMap;
use std::net::IpAddr;

/// Connections at once, each with a thread.
pub const MAX_CONNECTIONS: usize = 1024;

/// Of these, so many are for loopback alone, whatever the neighbours do: five times the 25 that Nix
/// opens.
pub const OWN_CONNECTIONS: usize = 128;

/// When there is no room, a group that has more than this loses its idlest connection, or its
/// oldest if all are at work: slow requests of ten groups must not shut out the others. Fewer are
/// what one machine needs.
pub const FAIR_SHARE: usize = 64;

/// An open connection, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub struct OpenConnection {
    /// Greater for later ones.
    pub id: u64,
    /// Who has it.
    pub peer: IpAddr,
    /// Since when it is idle, on any clock; `None` while it is at work.
    pub idle_since: Option<u64>,
}

/// What a newcomer finds.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// There is room.
    Free,
    /// There is, once the connection with this ID is closed.
    Instead(u64),
    /// There is none.
    Full,
}

/// Whether there is room for a connection from `newcomer` beside the open ones.
pub fn room(newcomer: IpAddr, open: impl Iterator<Item = OpenConnection> + Clone) -> Admission {
    let newcomer = newcomer.to_canonical();
    let strangers = open.clone().filter(|seat| !is_own(seat.peer));
    if is_own(newcomer) {
        if open.clone().count() < MAX_CONNECTIONS {
            return Admission::Free;
        }
        // Of the strangers one that is idle; else one of our own that is; else a stranger's answer
        // is cut, and its Nix takes the path elsewhere.
        let victim = idlest(strangers.clone())
            .or_else(|| idlest(open))
            .or_else(|| strangers.map(|s| s.id).min());
        return victim.map_or(Admission::Full, Admission::Instead);
    }
    let has_room = strangers.clone().count() < MAX_CONNECTIONS - OWN_CONNECTIONS;
    if has_room && open.clone().count() < MAX_CONNECTIONS {
        return Admission::Free;
    }
    // If strangers have room, this machine has more than its own, and may lose an idle one.
    let victim = if has_room { idlest(open) } else { victim_for(newcomer, strangers) };
    victim.map_or(Admission::Full, Admission::Instead)
}

/// Which stranger's connection a newcomer may have: its own group's idlest if that has more than
/// its share; one of the group that has the most, if that is more than its share and twice as much
/// as the newcomer's; else the idlest.
fn victim_for(
    newcomer: IpAddr,
    strangers: impl Iterator<Item = OpenConnection> + Clone,
) -> Option<u64> {
    let mut counts: HashMap<u128, usize> = HashMap::new();
    strangers.clone().for_each(|seat| *counts.entry(group(seat.peer)).or_default() += 1);
    let newcomers = counts.get(&group(newcomer)).copied().unwrap_or_default();
    let (largest, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    let is_greedy = newcomers > FAIR_SHARE;
    if !is_greedy && (count <= FAIR_SHARE || count < 2 * newcomers) {
        return idlest(strangers);
    }
    // One that has more than its share takes nothing from others.
    let largest = if is_greedy { group(newcomer) } else { largest };
    let its = strangers.filter(|seat| group(seat.peer) == largest);
    idlest(its.clone()).or_else(|| its.map(|seat| seat.id).min().filter(|_| !is_greedy))
}

/// Addresses that are counted together: one of a private IPv4 network, else a /24 or a /56, which
/// one can come by together.
fn group(ip: IpAddr) -> u128 {
    match ip.to_canonical() {
        IpAddr::V4(ip) if ip.is_private() || ip.is_loopback() => u128::from(u32::from(ip)),
        IpAddr::V4(ip) => u128::from(u32::from(ip) >> 8 << 8),
        IpAddr::V6(ip) => u128::from(ip) >> 72 << 72,
    }
}

/// The one that is idle longest.
pub fn idlest(seats: impl Iterator<Item = OpenConnection>) -> Option<u64> {
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
    fn strangers(count: usize) -> Vec<OpenConnection> {
        (0..count)
            .map(|n| OpenConnection { id: n as u64, peer: stranger(n / 2), idle_since: None })
            .collect()
    }

    fn and_own(mut seats: Vec<OpenConnection>, count: usize) -> Vec<OpenConnection> {
        let from = seats.len();
        seats.extend((from..from + count).map(|n| OpenConnection {
            id: n as u64,
            peer: own(),
            idle_since: None,
        }));
        seats
    }

    fn find(newcomer: IpAddr, seats: &[OpenConnection]) -> Admission {
        room(newcomer, seats.iter().copied())
    }

    #[test]
    fn strangers_leave_room_for_this_machine() {
        assert_eq!(find(stranger(999), &strangers(STRANGERS - 1)), Admission::Free);
        let mut seats = strangers(STRANGERS);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        assert_eq!(find(own(), &seats), Admission::Free);
        seats[7].idle_since = Some(70);
        seats[8].idle_since = Some(60);
        assert_eq!(find(stranger(999), &seats), Admission::Instead(8));
    }

    #[test]
    fn strangers_take_nothing_of_what_is_reserved() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats[STRANGERS].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        let mut seats = and_own(strangers(10), MAX_CONNECTIONS - 10);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        seats[500].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Admission::Instead(500));
    }

    #[test]
    fn this_machine_is_let_in_whatever_strangers_do() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats.rotate_left(100);
        assert_eq!(
            find(own(), &seats),
            Admission::Instead(0),
            "the oldest stranger, though at work"
        );
        let last = seats.iter_mut().find(|s| s.peer == own()).unwrap();
        last.idle_since = Some(1);
        let last = last.id;
        assert_eq!(find(own(), &seats), Admission::Instead(last));
        seats[0].idle_since = Some(9);
        assert_eq!(find(own(), &seats), Admission::Instead(100), "a stranger that is idle");
        assert_eq!(find(own(), &and_own(Vec::new(), MAX_CONNECTIONS)), Admission::Full);
    }

    /// Four addresses with slow requests used to shut out all others.
    #[test]
    fn few_groups_do_not_shut_out_the_others() {
        let few = |groups: usize| -> Vec<OpenConnection> {
            (0..STRANGERS)
                .map(|n| OpenConnection {
                    id: n as u64,
                    peer: stranger(n % groups),
                    idle_since: None,
                })
                .collect()
        };
        for groups in [1, 4, 10] {
            let Admission::Instead(id) = find(stranger(999), &few(groups)) else {
                panic!("{groups} groups shut out others")
            };
            assert!(id < groups as u64, "the oldest of a group");
            // One of them gains nothing by coming again.
            assert_eq!(find(stranger(0), &few(groups)), Admission::Full);
            // Nor takes it what others leave idle.
            let mut seats = few(groups);
            seats.push(OpenConnection { id: 5000, peer: stranger(998), idle_since: Some(1) });
            assert_eq!(find(stranger(0), &seats), Admission::Full);
        }
        assert_eq!(find(stranger(999), &few(20)), Admission::Full, "each has its share");
        let mut seats = few(4);
        seats[9].idle_since = Some(5);
        let of_four = find(stranger(999), &seats);
        assert!(
            of_four == Admission::Instead(9) || matches!(of_four, Admission::Instead(id) if id < 4)
        );
    }

    /// Machines behind one router used to lose connections from the 257th on, however much room
    /// there was.
    #[test]
    fn one_address_may_have_what_nobody_else_wants() {
        let seat = |n| OpenConnection { id: n, peer: stranger(1), idle_since: None };
        let seats: Vec<OpenConnection> = (0..600).map(seat).collect();
        assert_eq!(find(stranger(1), &seats), Admission::Free);
    }

    #[test]
    fn addresses_that_one_can_come_by_together_are_one_group() {
        let same = |a: &str, b: &str| group(a.parse().unwrap()) == group(b.parse().unwrap());
        assert!(same("203.0.113.1", "203.0.113.2") && !same("203.0.113.1", "203.0.112.1"));
        assert!(!same("10.0.0.1", "10.0.0.2") && same("10.0.0.1", "::ffff:10.0.0.1"));
        assert!(
            same("2001:db8::1", "2001:db8:0:ff::1") && !same("2001:db8::1", "2001:db8:0:100::1")
        );
    }
}
