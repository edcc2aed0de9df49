//! Admission control: decides whether the server accepts a new connection, and which open
//! connection it closes to make room.
//!
//! Connections from loopback have priority, because Nix fails a build when a configured cache is
//! unreachable. Among other addresses, a group that holds many connections loses one first, so that
//! no group shuts out the others. The functions never block.

use super::send_progress::STALL_TIMEOUT;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// Connections open at the same time. Each may hold a thread. At the bound, [`admit`] decides which
/// connection is closed or that the new one is refused.
pub const MAX_CONNECTIONS: usize = 1024;

/// Connections of [`MAX_CONNECTIONS`] that are reserved for loopback: five times the 25 that Nix
/// opens. Other addresses share the rest.
pub const OWN_CONNECTIONS: usize = 128;

/// Connections that a group of addresses may keep when the server is full. A group with more loses
/// its longest idle connection, or its oldest if none is idle. One machine needs fewer.
pub const FAIR_SHARE: usize = 64;

/// Connections that the addresses of one IPv6 network of a LAN may have together, half of those for
/// other machines: one host can take every address of its /64. At the bound, a new one replaces
/// another one of that network or is refused.
const MAX_PER_PREFIX: usize = (MAX_CONNECTIONS - OWN_CONNECTIONS) / 2;

/// The properties of an open connection that admission depends on.
#[derive(Debug, Clone, Copy)]
pub struct OpenConnection {
    /// Connection ID. Later connections have greater IDs.
    pub id: u64,
    /// Address of the client.
    pub peer: IpAddr,
    /// Whether the client is on this machine.
    pub is_own: bool,
    /// Time at which the connection became idle, in units of any one clock; `None` while a request
    /// is being answered.
    pub idle_since: Option<u64>,
    /// Time for which the client has taken nothing of a response that does not fit the send
    /// buffer.
    pub stalled_for: Duration,
}

/// The client of a new connection.
#[derive(Debug, Clone, Copy)]
pub struct Newcomer {
    /// Address of the client.
    pub peer: IpAddr,
    /// Whether the client is on this machine.
    pub is_own: bool,
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
pub fn admit(newcomer: Newcomer, open: impl Iterator<Item = OpenConnection> + Clone) -> Admission {
    let strangers = open.clone().filter(|connection| !connection.is_own);
    if newcomer.is_own {
        if open.clone().count() < MAX_CONNECTIONS {
            return Admission::Free;
        }
        // Prefer an idle connection of another machine, then an idle one from loopback, then the
        // client that is stalled longest, in the same order, then the oldest connection of another
        // machine: its Nix gets the path elsewhere. If all are from loopback, one that takes nothing
        // at the moment makes room: a program that never reads must not keep Nix out for a second.
        let victim = idlest(strangers.clone())
            .or_else(|| idlest(open.clone()))
            .or_else(|| longest_stalled(strangers.clone(), STALL_TIMEOUT.get()))
            .or_else(|| longest_stalled(open.clone(), STALL_TIMEOUT.get()))
            .or_else(|| strangers.map(|connection| connection.id).min())
            .or_else(|| longest_stalled(open, Duration::from_nanos(1)));
        return victim.map_or(Admission::Full, Admission::Replace);
    }
    if let Some(prefix) = lan_prefix(newcomer.peer) {
        let prefix_connections =
            strangers.clone().filter(|connection| lan_prefix(connection.peer) == Some(prefix));
        if prefix_connections.clone().count() >= MAX_PER_PREFIX {
            return victim_for(newcomer.peer, prefix_connections)
                .map_or(Admission::Full, Admission::Replace);
        }
    }
    let has_room = strangers.clone().count() < MAX_CONNECTIONS - OWN_CONNECTIONS;
    if has_room && open.clone().count() < MAX_CONNECTIONS {
        return Admission::Free;
    }
    // Other machines are below their bound, so loopback exceeds its reservation and may lose an
    // idle connection.
    let victim = if has_room { idlest(open) } else { victim_for(newcomer.peer, strangers) };
    victim.map_or(Admission::Full, Admission::Replace)
}

/// Returns the connection of `strangers` that makes room for `newcomer` when their places are
/// taken. A group above [`FAIR_SHARE`] can only replace its own idle connections. Otherwise the
/// largest group loses a connection, if it is above its share and at least twice as large as the
/// newcomer's group; else the longest idle connection is closed.
fn victim_for(
    newcomer: IpAddr,
    strangers: impl Iterator<Item = OpenConnection> + Clone,
) -> Option<u64> {
    let mut counts: HashMap<IpAddr, usize> = HashMap::new();
    strangers
        .clone()
        .for_each(|connection| *counts.entry(group(connection.peer)).or_default() += 1);
    let newcomer_count = counts.get(&group(newcomer)).copied().unwrap_or_default();
    let (largest, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
    let is_greedy = newcomer_count > FAIR_SHARE;
    if !is_greedy && (count <= FAIR_SHARE || count < 2 * newcomer_count) {
        return idlest(strangers);
    }
    // A group above its share replaces only its own connections.
    let largest = if is_greedy { group(newcomer) } else { largest };
    let group_connections = strangers.filter(|connection| group(connection.peer) == largest);
    let stalled_or_oldest = || {
        longest_stalled(group_connections.clone(), STALL_TIMEOUT.get())
            .or_else(|| group_connections.clone().map(|connection| connection.id).min())
    };
    idlest(group_connections.clone()).or_else(|| stalled_or_oldest().filter(|_| !is_greedy))
}

/// Returns the group of an address: its /24 (IPv4) or /56 (IPv6), which one stranger may control as
/// a whole. A private, unique local or link-local address is its own group, because a LAN is one
/// network.
pub(super) fn group(ip: IpAddr) -> IpAddr {
    let ip = ip.to_canonical();
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

/// Returns the first half of a unique local or link-local IPv6 address, each of which is a group;
/// `None` for other addresses.
fn lan_prefix(ip: IpAddr) -> Option<u64> {
    match ip.to_canonical() {
        IpAddr::V6(v6) if v6.is_unicast_link_local() || v6.is_unique_local() => {
            Some((v6.to_bits() >> 64) as u64)
        }
        _ => None,
    }
}

/// Returns the ID of the connection that has been idle longest, or `None` if none is idle.
pub fn idlest(connections: impl Iterator<Item = OpenConnection>) -> Option<u64> {
    connections
        .filter_map(|connection| Some((connection.idle_since?, connection.id)))
        .min()
        .map(|(_, id)| id)
}

/// Returns the ID of the connection whose client has taken nothing for the longest time, or `None`
/// if each took something within `at_least`.
fn longest_stalled(
    connections: impl Iterator<Item = OpenConnection>,
    at_least: Duration,
) -> Option<u64> {
    let stalled = connections.filter(|connection| connection.stalled_for >= at_least);
    stalled.max_by_key(|connection| connection.stalled_for).map(|connection| connection.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRANGERS: usize = MAX_CONNECTIONS - OWN_CONNECTIONS;

    fn own() -> Newcomer {
        Newcomer { peer: "::ffff:127.0.0.1".parse().unwrap(), is_own: true }
    }

    fn stranger(n: usize) -> Newcomer {
        let peer = IpAddr::from([10, 0, (n / 200) as u8, (n % 200) as u8]);
        Newcomer { peer, is_own: false }
    }

    /// A connection at work.
    fn connection(id: usize, of: Newcomer) -> OpenConnection {
        let Newcomer { peer, is_own } = of;
        let stalled_for = Duration::ZERO;
        OpenConnection { id: id as u64, peer, is_own, idle_since: None, stalled_for }
    }

    /// `count` connections, two per address, none of them idle. IDs count from 0.
    fn strangers(count: usize) -> Vec<OpenConnection> {
        (0..count).map(|n| connection(n, stranger(n / 2))).collect()
    }

    fn and_own(mut connections: Vec<OpenConnection>, count: usize) -> Vec<OpenConnection> {
        let from = connections.len();
        connections.extend((from..from + count).map(|n| connection(n, own())));
        connections
    }

    fn find(newcomer: Newcomer, connections: &[OpenConnection]) -> Admission {
        admit(newcomer, connections.iter().copied())
    }

    #[test]
    fn strangers_at_their_bound_leave_reserved_connections_free() {
        assert_eq!(find(stranger(999), &strangers(STRANGERS - 1)), Admission::Free);
        let mut connections = strangers(STRANGERS);
        assert_eq!(find(stranger(999), &connections), Admission::Full);
        assert_eq!(find(own(), &connections), Admission::Free);
        connections[7].idle_since = Some(70);
        connections[8].idle_since = Some(60);
        assert_eq!(find(stranger(999), &connections), Admission::Replace(8));
    }

    #[test]
    fn stranger_does_not_replace_reserved_connection() {
        let mut connections = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        connections[STRANGERS].idle_since = Some(1);
        assert_eq!(find(stranger(999), &connections), Admission::Full);
        let mut connections = and_own(strangers(10), MAX_CONNECTIONS - 10);
        assert_eq!(find(stranger(999), &connections), Admission::Full);
        connections[500].idle_since = Some(1);
        assert_eq!(find(stranger(999), &connections), Admission::Replace(500));
    }

    #[test]
    fn loopback_is_admitted_when_strangers_fill_the_server() {
        let mut connections = and_own(strangers(STRANGERS), OWN_CONNECTIONS);
        connections.rotate_left(100);
        assert_eq!(
            find(own(), &connections),
            Admission::Replace(0),
            "the oldest stranger, though at work"
        );
        let last = connections.iter_mut().find(|s| s.is_own).unwrap();
        last.idle_since = Some(1);
        let last = last.id;
        assert_eq!(find(own(), &connections), Admission::Replace(last));
        connections[0].idle_since = Some(9);
        assert_eq!(find(own(), &connections), Admission::Replace(100), "a stranger that is idle");
        assert_eq!(find(own(), &and_own(Vec::new(), MAX_CONNECTIONS)), Admission::Full);
    }

    /// Regression test: slow requests from four addresses shut out all others.
    #[test]
    fn groups_above_fair_share_do_not_shut_out_others() {
        let few = |groups: usize| -> Vec<OpenConnection> {
            (0..STRANGERS).map(|n| connection(n, stranger(n % groups))).collect()
        };
        for groups in [1, 4, 10] {
            let Admission::Replace(id) = find(stranger(999), &few(groups)) else {
                panic!("{groups} groups shut out others")
            };
            assert!(id < groups as u64, "the oldest of a group");
            // A large group gains nothing by another connection.
            assert_eq!(find(stranger(0), &few(groups)), Admission::Full);
            // Nor does it take the idle connections of other groups.
            let mut connections = few(groups);
            connections
                .push(OpenConnection { idle_since: Some(1), ..connection(5000, stranger(998)) });
            assert_eq!(find(stranger(0), &connections), Admission::Full);
        }
        assert_eq!(find(stranger(999), &few(20)), Admission::Full, "each has its share");
        let mut connections = few(4);
        connections[9].idle_since = Some(5);
        let of_four = find(stranger(999), &connections);
        assert!(
            of_four == Admission::Replace(9) || matches!(of_four, Admission::Replace(id) if id < 4)
        );
    }

    /// Regression test: machines behind one router lost connections from the 257th on although the
    /// server was not full.
    #[test]
    fn one_address_may_exceed_fair_share_while_there_is_room() {
        let connections: Vec<OpenConnection> =
            (0..600).map(|n| connection(n, stranger(1))).collect();
        assert_eq!(find(stranger(1), &connections), Admission::Free);
    }

    #[test]
    fn client_that_reads_nothing_makes_room_for_loopback() {
        let mut connections = and_own(Vec::new(), MAX_CONNECTIONS);
        assert_eq!(find(own(), &connections), Admission::Full, "all of them read");
        let moment = Duration::from_millis(1);
        connections[6].stalled_for = STALL_TIMEOUT.get() - moment;
        assert_eq!(find(own(), &connections), Admission::Replace(6), "none else makes room");
        let mut mixed = connections.clone();
        mixed[3].is_own = false;
        assert_eq!(find(own(), &mixed), Admission::Replace(3), "another machine first");
        connections[7].stalled_for = STALL_TIMEOUT.get();
        connections[8].stalled_for = STALL_TIMEOUT.get() + moment;
        assert_eq!(find(own(), &connections), Admission::Replace(8));
        assert_eq!(find(stranger(1), &connections), Admission::Full);
        connections[9].is_own = false;
        connections[9].stalled_for = STALL_TIMEOUT.get();
        assert_eq!(find(own(), &connections), Admission::Replace(9), "another machine first");
        // In a group above its share, too, before its oldest.
        let mut connections: Vec<_> =
            (0..STRANGERS).map(|n| connection(n, stranger(n % 4))).collect();
        (0..4).for_each(|n| connections[400 + n].stalled_for = STALL_TIMEOUT.get());
        let Admission::Replace(id) = find(stranger(999), &connections) else { panic!("shut out") };
        assert!((400..404).contains(&id), "{id}");
    }

    /// Regression test: one host took all places with one address for each.
    #[test]
    fn addresses_of_one_lan_prefix_leave_places_for_others() {
        let of = |prefix: u16, n: usize| Newcomer {
            peer: Ipv6Addr::new(prefix, 0, 0, 0, 0, 0, 0, n as u16).into(),
            is_own: false,
        };
        let mut connections: Vec<_> =
            (0..MAX_PER_PREFIX).map(|n| connection(n, of(0xfd00, n))).collect();
        assert_eq!(find(of(0xfd00, 9999), &connections[1..]), Admission::Free);
        assert_eq!(find(of(0xfd00, 9999), &connections), Admission::Full);
        assert_eq!(find(of(0xfd01, 1), &connections), Admission::Free);
        assert_eq!(find(stranger(1), &connections), Admission::Free);
        connections.push(OpenConnection { idle_since: Some(1), ..connection(5000, stranger(1)) });
        connections[7].idle_since = Some(2);
        assert_eq!(find(of(0xfd00, 9999), &connections), Admission::Replace(7), "its own prefix");
    }

    #[test]
    fn connection_from_outside_is_a_strangers_whatever_its_address() {
        let outside = Newcomer { is_own: false, ..own() };
        assert_eq!(find(outside, &strangers(STRANGERS)), Admission::Full);
        let mut connections = strangers(STRANGERS - 1);
        connections.push(connection(STRANGERS, outside));
        assert_eq!(find(stranger(999), &connections), Admission::Full);
    }

    #[test]
    fn addresses_of_one_prefix_are_one_group() {
        let same = |a: &str, b: &str| group(a.parse().unwrap()) == group(b.parse().unwrap());
        assert!(same("203.0.113.1", "203.0.113.2") && !same("203.0.113.1", "203.0.112.1"));
        assert!(!same("10.0.0.1", "10.0.0.2") && same("10.0.0.1", "::ffff:10.0.0.1"));
        // Neighbours on a LAN, which share a prefix.
        assert!(!same("169.254.1.1", "169.254.1.2"));
        assert!(!same("fd00::1", "fd00::2") && !same("fe80::1", "fe80::2"));
        assert!(
            same("2001:db8::1", "2001:db8:0:ff::1") && !same("2001:db8::1", "2001:db8:0:100::1")
        );
    }
}
