//! The kernel's tables of neighbours (ARP and IPv6 neighbour discovery): the machines on connected
//! networks that this one has exchanged packets with.

use super::netlink::{self, u16_at, u32_at};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};

/// Most entries that are read. The tables hold 1,024 each unless the administrator raised that;
/// entries beyond are left out.
pub const MAX_ENTRIES: usize = 2048;

/// What the kernel knows of a neighbour: the states of an entry with a link-layer address that
/// packets are sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NeighbourState {
    /// It answered within the last half minute or so.
    Reachable,
    /// It answered earlier.
    Stale,
    /// It answered earlier, and a packet was sent to it a moment ago.
    Delay,
    /// It is being asked whether it is still there.
    Probe,
}

/// An entry of a neighbour table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeighbourEntry {
    /// The neighbour's address.
    pub ip: IpAddr,
    /// The kernel's number of the interface that leads to it.
    pub interface: u32,
    /// What the kernel knows of it.
    pub state: NeighbourState,
}

impl NeighbourEntry {
    /// The address of a port of the neighbour. For a link-local IPv6 address the interface is its
    /// scope ID.
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

/// Type of an entry for the address of one machine: `RTN_UNICAST`.
const UNICAST: u8 = 1;

/// Reads the IPv4 and IPv6 tables, at most [`MAX_ENTRIES`] entries. Entries that do not lead to a
/// machine are left out: addresses that did not answer, multicast, and entries that are permanent
/// or need no address. Blocks for 0.1 ms, or 1 ms with 1,000 entries.
///
/// # Errors
/// The kernel does not list them: no netlink socket is allowed, or no descriptor is left.
pub fn read() -> io::Result<Vec<NeighbourEntry>> {
    let mut entries = Vec::new();
    netlink::dump(&netlink::NEIGHBOURS, |body| {
        if entries.len() < MAX_ENTRIES {
            entries.extend(parse(body));
        }
    })?;
    Ok(entries)
}

/// The entry that a message describes, if it leads to a machine.
fn parse(body: &[u8]) -> Option<NeighbourEntry> {
    let interface = u32_at(body, 4)?;
    // The states are `NUD_…`; only one bit is set.
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

    /// The answer of Linux 6.18 on a machine where `ip neighbour show nud all` prints entries in
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
            // Made in the state DELAY, which the kernel turned to PROBE before it was listed.
            entry("fe80::9", NeighbourState::Probe),
        ];
        assert_eq!(entries, expected);
        // A message that is cut anywhere is no entry, and no panic.
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
