//! Reads the kernel's neighbour tables (ARP and IPv6 neighbour discovery): the machines on
//! connected networks with which this one has exchanged packets.

use super::netlink::{self, u16_at, u32_at};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// Maximum number of entries that are read. Each table holds 1,024 unless the administrator raised
/// that (`gc_thresh3`). Further entries are left out.
pub const MAX_ENTRIES: usize = 2048;

/// State of a neighbour entry with a link-layer address to which the kernel sends packets (the
/// `NUD_…` states of rtnetlink(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourState {
    /// The neighbour answered within the last half minute or so.
    Reachable,
    /// The neighbour answered earlier.
    Stale,
    /// The neighbour answered earlier, and a packet was sent to it up to 5 s ago.
    Delay,
    /// The kernel is asking the neighbour whether it is still there.
    Probe,
}

/// An entry of a neighbour table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighbourEntry {
    /// The neighbour's address.
    pub ip: IpAddr,
    /// The kernel's index of the interface that leads to it.
    pub interface: u32,
    /// The kernel's state of the entry.
    pub state: NeighbourState,
}

impl NeighbourEntry {
    /// Socket address of the neighbour's port `port`. A link-local IPv6 address gets the interface
    /// as scope ID.
    pub fn socket_addr(&self, port: u16) -> SocketAddr {
        match self.ip {
            IpAddr::V6(v6) if v6.is_unicast_link_local() => {
                let scope_id = self.interface;
                SocketAddrV6::new(v6, port, 0, scope_id).into()
            }
            ip => SocketAddr::new(ip, port),
        }
    }
}

/// Attribute with the neighbour's address: `NDA_DST`.
const DESTINATION: u16 = 1;

/// Type of an entry for a single machine: `RTN_UNICAST`.
const UNICAST: u8 = 1;

/// Reads the IPv4 and IPv6 tables, [`MAX_ENTRIES`] entries at most. Leaves out entries that lead to
/// no machine: addresses that did not answer, multicast addresses, and entries that are permanent
/// or need no link-layer address. Usually blocks for 0.1 ms, or 1 ms with 1,000 entries, and for
/// 2 s at most.
///
/// # Errors
/// No netlink socket is allowed, no file descriptor is left, or the kernel does not answer in time.
pub fn read() -> io::Result<Vec<NeighbourEntry>> {
    let mut entries = Vec::new();
    netlink::dump(&netlink::NEIGHBOURS, |body| {
        if entries.len() < MAX_ENTRIES {
            entries.extend(parse(body));
        }
    })?;
    Ok(entries)
}

/// Parses an `RTM_NEWNEIGH` message. Returns `None` if the entry leads to no machine.
fn parse(body: &[u8]) -> Option<NeighbourEntry> {
    let interface = u32_at(body, 4)?;
    // The states are `NUD_…` bits, of which one is set.
    let state = match u16_at(body, 8)? {
        0x02 => NeighbourState::Reachable,
        0x04 => NeighbourState::Stale,
        0x08 => NeighbourState::Delay,
        0x10 => NeighbourState::Probe,
        _ => return None,
    };
    if *body.get(11)? != UNICAST {
        return None;
    }
    let ip = netlink::attribute(body, &netlink::NEIGHBOURS, DESTINATION).and_then(netlink::ip)?;
    Some(NeighbourEntry { ip, interface, state })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answer of Linux 6.18 on a machine on which `ip neighbour show nud all` prints entries in
    /// every state.
    #[cfg(target_endian = "little")]
    const CAPTURED: &[u8] = include_bytes!("../../tests/data/netlink/neighbours");

    #[test]
    #[cfg(target_endian = "little")]
    fn captured_entries_that_lead_to_machines_are_parsed() {
        let bodies: Vec<&[u8]> = netlink::messages(CAPTURED)
            .filter(|message| message.kind == netlink::NEIGHBOUR)
            .map(|message| message.body)
            .collect();
        assert_eq!(bodies.len(), 13);
        let mut entries: Vec<_> = bodies.iter().filter_map(|body| parse(body)).collect();
        entries.sort_by_key(|entry| entry.ip);
        let entry = |ip: &str, state| {
            let ip = ip.parse().unwrap();
            NeighbourEntry { ip, interface: 3, state }
        };
        let expected = [
            entry("192.168.1.2", NeighbourState::Reachable),
            entry("192.168.1.3", NeighbourState::Stale),
            entry("fd00::7", NeighbourState::Probe),
            // Created in the state DELAY. The kernel changed it to PROBE before it listed the
            // entry.
            entry("fe80::9", NeighbourState::Probe),
        ];
        assert_eq!(entries, expected);
        // A truncated message yields no entry and no panic.
        for body in bodies {
            for len in 0..body.len() {
                let _ = parse(&body[..len]);
            }
            assert_eq!(parse(&body[..netlink::NEIGHBOURS.fixed_len]), None);
        }
    }

    #[test]
    fn state_and_type_decide_which_entries_count() {
        let body = |state: u16, kind: u8| {
            let mut body = vec![0; netlink::NEIGHBOURS.fixed_len];
            body[4..8].copy_from_slice(&3u32.to_ne_bytes());
            body[8..10].copy_from_slice(&state.to_ne_bytes());
            body[11] = kind;
            body.extend(8u16.to_ne_bytes());
            body.extend(DESTINATION.to_ne_bytes());
            body.extend([10, 0, 0, 7]);
            body
        };
        for (state, expected) in [
            (0x00, None),
            (0x01, None), // INCOMPLETE
            (0x02, Some(NeighbourState::Reachable)),
            (0x04, Some(NeighbourState::Stale)),
            (0x08, Some(NeighbourState::Delay)),
            (0x10, Some(NeighbourState::Probe)),
            (0x20, None), // FAILED
            (0x40, None), // NOARP
            (0x80, None), // PERMANENT
        ] {
            let entry = parse(&body(state, UNICAST));
            assert_eq!(entry.map(|entry| entry.state), expected, "{state:#x}");
            for kind in [2, 3, 5] {
                assert_eq!(parse(&body(state, kind)), None, "local, broadcast or multicast");
            }
        }
    }

    #[test]
    fn link_local_neighbours_are_addressed_through_their_interface() {
        let at = |ip: &str| {
            let (ip, state) = (ip.parse().unwrap(), NeighbourState::Stale);
            let entry = NeighbourEntry { ip, interface: 3, state };
            entry.socket_addr(1).to_string()
        };
        assert_eq!(at("fe80::9"), "[fe80::9%3]:1");
        assert_eq!(at("fd00::9"), "[fd00::9]:1");
        assert_eq!(at("10.0.0.9"), "10.0.0.9:1");
    }
}
