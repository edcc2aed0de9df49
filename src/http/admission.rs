//! Admission control: decides whether the server accepts a new connection, and which open
//! connection it closes to make room.
//!
//! Connections from loopback have priority, because Nix fails a build when a configured cache is
//! unreachable. Among other addresses, a group that holds many connections loses one first, so that
//! no group shuts out the others. The functions never block.

use std::collections::HashMap;
use std::net::IpAddr;

/// Connections open at the same time. Each may hold a thread. At the bound, [`admit`] decides which
/// connection is closed or that the new one is refused.
pub const MAX_CONNECTIONS: usize = 1024;

/// Connections of [`MAX_CONNECTIONS`] that are reserved for loopback: five times the 25 that Nix
/// opens. Other addresses share the rest.
pub const OWN_CONNECTIONS: usize = 128;

/// Connections that a group of addresses may keep when the server is full. A group with more loses
/// its longest idle connection, or its oldest if none is idle. One machine needs fewer.
pub const FAIR_SHARE: usize = 64;

/// The properties of an open connection that admission depends on.
#[derive(Debug, Clone, Copy)]
pub struct OpenConnection {
    /// Connection ID. Later connections have greater IDs.
    pub id: u64,
    /// Address of the client.
    pub peer: IpAddr,
    /// Time at which the connection became idle, in units of any one clock; `None` while a request
    /// is being answered.
    pub idle_since: Option<u64>,
}

/// Decision about a new connection.
#[derive(Debug, PartialEq, Eq)]
pub enum Admission {
    /// Accept it.
    Free,
    /// Accept it and close the connection with this ID.
    Replace(u64),
    /// Refuse it.
    Full,
}

/// Decides whether a connection from `newcomer` is accepted beside the connections in `open`.
pub fn admit(newcomer: IpAddr, open: impl Iterator<Item = OpenConnection> + Clone) -> Admission {
    let newcomer = newcomer.to_canonical();
    let strangers = open.clone().filter(|seat| !is_own(seat.peer));
    if is_own(newcomer) {
        if open.clone().count() < MAX_CONNECTIONS {
            return Admission::Free;
        }
        // Prefer an idle connection of another machine, then an idle one from loopback. As a last
        // resort, cut the oldest connection of another machine: its Nix gets the path elsewhere.
        let victim = idlest(strangers.clone())
            .or_else(|| idlest(open))
            .or_else(|| strangers.map(|s| s.id).min());
        return victim.map_or(Admission::Full, Admission::Replace);
    }
    let has_room = strangers.clone().count() < MAX_CONNECTIONS - OWN_CONNECTIONS;
    if has_room && open.clone().count() < MAX_CONNECTIONS {
        return Admission::Free;
    }
    // Other machines are below their bound, so loopback exceeds its reservation and may lose an
    // idle connection.
    let victim = if has_room { idlest(open) } else { victim_for(newcomer, strangers) };
    victim.map_or(Admission::Full, Admission::Replace)
}

/// Returns the connection that makes room for `newcomer` when the places for other machines are
/// taken. A group above [`FAIR_SHARE`] can only replace its own idle connections. Otherwise the
/// largest group loses a connection, if it is above its share and at least twice as large as the
/// newcomer's group; else the longest idle connection is closed.
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
    // A group above its share replaces only its own connections.
    let largest = if is_greedy { group(newcomer) } else { largest };
    let its = strangers.filter(|seat| group(seat.peer) == largest);
    idlest(its.clone()).or_else(|| its.map(|seat| seat.id).min().filter(|_| !is_greedy))
}

/// Returns the group to which an address belongs. A private IPv4 address is its own group. Other
/// addresses are grouped by /24 (IPv4) or /56 (IPv6), because one client may control all addresses
/// of such a prefix.
fn group(ip: IpAddr) -> u128 {
    match ip.to_canonical() {
        IpAddr::V4(ip) if ip.is_private() || ip.is_loopback() => u128::from(u32::from(ip)),
        IpAddr::V4(ip) => u128::from(u32::from(ip) >> 8 << 8),
        IpAddr::V6(ip) => u128::from(ip) >> 72 << 72,
    }
}

/// Returns the ID of the connection that has been idle longest, or `None` if none is idle.
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

    /// `count` connections, two per address, none of them idle. IDs count from 0.
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
        admit(newcomer, seats.iter().copied())
    }

    #[test]
    fn strangers_at_their_bound_leave_reserved_connections_free() {
        assert_eq!(find(stranger(999), &strangers(STRANGERS - 1)), Admission::Free);
        let mut seats = strangers(STRANGERS);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        assert_eq!(find(own(), &seats), Admission::Free);
        seats[7].idle_since = Some(70);
        seats[8].idle_since = Some(60);
        assert_eq!(find(stranger(999), &seats), Admission::Replace(8));
    }

    #[test]
    fn stranger_does_not_replace_reserved_connection() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats[STRANGERS].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        let mut seats = and_own(strangers(10), MAX_CONNECTIONS - 10);
        assert_eq!(find(stranger(999), &seats), Admission::Full);
        seats[500].idle_since = Some(1);
        assert_eq!(find(stranger(999), &seats), Admission::Replace(500));
    }

    #[test]
    fn loopback_is_admitted_when_strangers_fill_the_server() {
        let mut seats = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        seats.rotate_left(100);
        assert_eq!(
            find(own(), &seats),
            Admission::Replace(0),
            "the oldest stranger, though at work"
        );
        let last = seats.iter_mut().find(|s| s.peer == own()).unwrap();
        last.idle_since = Some(1);
        let last = last.id;
        assert_eq!(find(own(), &seats), Admission::Replace(last));
        seats[0].idle_since = Some(9);
        assert_eq!(find(own(), &seats), Admission::Replace(100), "a stranger that is idle");
        assert_eq!(find(own(), &and_own(Vec::new(), MAX_CONNECTIONS)), Admission::Full);
    }

    /// Regression test: slow requests from four addresses shut out all others.
    #[test]
    fn groups_above_fair_share_do_not_shut_out_others() {
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
            let Admission::Replace(id) = find(stranger(999), &few(groups)) else {
                panic!("{groups} groups shut out others")
            };
            assert!(id < groups as u64, "the oldest of a group");
            // A large group gains nothing by another connection.
            assert_eq!(find(stranger(0), &few(groups)), Admission::Full);
            // Nor does it take the idle connections of other groups.
            let mut seats = few(groups);
            seats.push(OpenConnection { id: 5000, peer: stranger(998), idle_since: Some(1) });
            assert_eq!(find(stranger(0), &seats), Admission::Full);
        }
        assert_eq!(find(stranger(999), &few(20)), Admission::Full, "each has its share");
        let mut seats = few(4);
        seats[9].idle_since = Some(5);
        let of_four = find(stranger(999), &seats);
        assert!(
            of_four == Admission::Replace(9) || matches!(of_four, Admission::Replace(id) if id < 4)
        );
    }

    /// Regression test: machines behind one router lost connections from the 257th on although the
    /// server was not full.
    #[test]
    fn one_address_may_exceed_fair_share_while_there_is_room() {
        let seat = |n| OpenConnection { id: n, peer: stranger(1), idle_since: None };
        let seats: Vec<OpenConnection> = (0..600).map(seat).collect();
        assert_eq!(find(stranger(1), &seats), Admission::Free);
    }

    #[test]
    fn addresses_of_one_prefix_are_one_group() {
        let same = |a: &str, b: &str| group(a.parse().unwrap()) == group(b.parse().unwrap());
        assert!(same("203.0.113.1", "203.0.113.2") && !same("203.0.113.1", "203.0.112.1"));
        assert!(!same("10.0.0.1", "10.0.0.2") && same("10.0.0.1", "::ffff:10.0.0.1"));
        assert!(
            same("2001:db8::1", "2001:db8:0:ff::1") && !same("2001:db8::1", "2001:db8:0:100::1")
        );
    }
}
