//! Reads the addresses of this machine's interfaces from the kernel, over rtnetlink(7).

use super::cidr::Cidr;
use super::netlink::{self, u32_at};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InterfaceAddress {
    /// Name of the interface, as `ip link` shows it.
    pub name: String,
    /// The kernel's index of the interface, which is the scope ID of its link-local addresses.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Prefix length of the network that the address is in, in bits.
    pub prefix_len: u8,
    /// Broadcast address of the network. `None` for IPv6 and for IPv4 networks without one.
    pub broadcast: Option<Ipv4Addr>,
    /// Whether the interface is up and has a link (`IFF_RUNNING`). If not, packets sent there do
    /// not arrive.
    pub running: bool,
}

impl InterfaceAddress {
    /// The network that the address is in.
    pub fn network(&self) -> Cidr {
        Cidr::of(self.address, self.prefix_len)
    }

    /// Whether `ip` is in the network of this address.
    pub fn reaches(&self, ip: IpAddr) -> bool {
        self.network().contains(ip)
    }
}

/// Reads all usable addresses of this machine but those of loopback. An IPv6 address is left out
/// while duplicate address detection runs (RFC 4862, section 5.4), unless it is optimistic
/// (RFC 4429). Usually blocks for 0.1 ms, or 1 ms with 100 interfaces, and for 2 s at most.
///
/// # Errors
/// No netlink socket is allowed, no file descriptor is left, or the kernel does not answer in time.
pub fn read() -> io::Result<Vec<InterfaceAddress>> {
    let mut links = HashMap::new();
    netlink::dump(&netlink::LINKS, |body| links.extend(link(body)))?;
    let mut interfaces = Vec::new();
    netlink::dump(&netlink::ADDRESSES, |body| interfaces.extend(interface(body, &links)))?;
    Ok(interfaces)
}

/// Properties of an interface that its addresses need.
struct InterfaceProperties {
    name: String,
    running: bool,
    is_point_to_point: bool,
}

/// Attribute with the name of an interface: `IFLA_IFNAME`.
const LINK_NAME: u16 = 3;
/// Flag of a point-to-point interface: `IFF_POINTOPOINT`.
const LINK_POINT_TO_POINT: u32 = 0x10;
/// Flag of an interface that is up and has a link: `IFF_RUNNING`.
const LINK_RUNNING: u32 = 0x40;

/// Attribute with the address, or with that of the peer on point-to-point links: `IFA_ADDRESS`.
const ADDRESS_OR_PEER: u16 = 1;
/// Attribute with this machine's IPv4 address: `IFA_LOCAL`.
const ADDRESS_LOCAL: u16 = 2;
/// Attribute with the broadcast address: `IFA_BROADCAST`.
const ADDRESS_BROADCAST: u16 = 4;
/// Attribute with all flags, of which the fixed part holds only the lowest eight: `IFA_FLAGS`.
const ADDRESS_FLAGS: u16 = 8;
/// Flag of an address that is used although it is tentative: `IFA_F_OPTIMISTIC`.
const ADDRESS_OPTIMISTIC: u32 = 0x04;
/// Flag of an address during duplicate address detection: `IFA_F_TENTATIVE`.
const ADDRESS_TENTATIVE: u32 = 0x40;

/// Parses an `RTM_NEWLINK` message. Returns the index and the properties of the interface.
fn link(body: &[u8]) -> Option<(u32, InterfaceProperties)> {
    let (index, flags) = (u32_at(body, 4)?, u32_at(body, 8)?);
    let name = netlink::attribute(body, &netlink::LINKS, LINK_NAME)?.strip_suffix(b"\0")?;
    let name = String::from_utf8_lossy(name).into_owned();
    let running = flags & LINK_RUNNING != 0;
    let is_point_to_point = flags & LINK_POINT_TO_POINT != 0;
    Some((index, InterfaceProperties { name, running, is_point_to_point }))
}

/// Parses an `RTM_NEWADDR` message. Returns `None` for loopback and tentative addresses, and if
/// `links` lacks the interface, because it appeared after they were listed.
fn interface(body: &[u8], links: &HashMap<u32, InterfaceProperties>) -> Option<InterfaceAddress> {
    let (prefix_len, index) = (*body.get(1)?, u32_at(body, 4)?);
    let attribute = |kind| netlink::attribute(body, &netlink::ADDRESSES, kind);
    let flags = attribute(ADDRESS_FLAGS).and_then(|value| u32_at(value, 0));
    let flags = flags.unwrap_or(u32::from(*body.get(2)?));
    if flags & ADDRESS_TENTATIVE != 0 && flags & ADDRESS_OPTIMISTIC == 0 {
        return None;
    }
    let address = attribute(ADDRESS_LOCAL).or_else(|| attribute(ADDRESS_OR_PEER))?;
    let address = netlink::ip(address).filter(|ip| !ip.is_loopback())?;
    let link = links.get(&index)?;
    let broadcast = match address {
        IpAddr::V4(v4) if !link.is_point_to_point => {
            let set = attribute(ADDRESS_BROADCAST).and_then(netlink::ip);
            broadcast(v4, prefix_len, set)
        }
        _ => None,
    };
    let (name, running) = (link.name.clone(), link.running);
    Some(InterfaceAddress { name, index, address, prefix_len, broadcast, running })
}

/// Returns the broadcast address `set` by the kernel. Addresses added by hand often have none; then
/// it is the last address of the network. /31 and /32 networks have no broadcast address
/// (RFC 3021).
fn broadcast(address: Ipv4Addr, prefix_len: u8, set: Option<IpAddr>) -> Option<Ipv4Addr> {
    if prefix_len >= 31 {
        return None;
    }
    let set = match set {
        Some(IpAddr::V4(set)) if set != address && !set.is_unspecified() => Some(set),
        _ => None,
    };
    let last = Ipv4Addr::from_bits(address.to_bits() | u32::MAX >> prefix_len);
    set.or(Some(last)).filter(|broadcast| *broadcast != address)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of Linux 6.18 in a network namespace with the interfaces lo, far, eth0, docker0
    /// (down) and tun0 (no carrier).
    #[cfg(target_endian = "little")]
    const LINKS: &[u8] = include_bytes!("../../tests/data/netlink/links");
    #[cfg(target_endian = "little")]
    const ADDRESSES: &[u8] = include_bytes!("../../tests/data/netlink/addresses");

    #[cfg(target_endian = "little")]
    fn bodies(captured: &[u8], kind: u16) -> Vec<&[u8]> {
        let all = netlink::messages(captured).filter(|message| message.kind == kind);
        all.map(|message| message.body).collect()
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn captured_addresses_are_parsed_with_their_interfaces() {
        let links = bodies(LINKS, netlink::LINK).into_iter().filter_map(link);
        let links: HashMap<u32, InterfaceProperties> = links.collect();
        assert_eq!(links.len(), 5);
        let addresses = bodies(ADDRESSES, netlink::ADDRESS);
        assert_eq!(addresses.len(), 10);
        let parsed = addresses.iter().filter_map(|body| interface(body, &links));
        let mut shown: Vec<String> = parsed
            .map(|i| {
                let broadcast = i.broadcast.map(|ip| ip.to_string()).unwrap_or_default();
                let (name, address, len) = (i.name, i.address, i.prefix_len);
                format!("{} {name} {address}/{len} {broadcast} {}", i.index, i.running)
            })
            .collect();
        shown.sort();
        let expected = [
            "2 far fe80::cb5:a0ff:fe25:59bb/64  true",
            // Labelled eth0:1. No broadcast address is set, and the address is the last of its
            // network.
            "3 eth0 10.1.2.3/30  true",
            "3 eth0 192.168.1.5/24 192.168.1.255 true",
            // fd00::6 is tentative.
            "3 eth0 fd00::5/64  true",
            "3 eth0 fe80::84a2:95ff:fe6b:d33c/64  true",
            "4 docker0 172.17.0.1/16 172.17.255.255 false",
            // The peer is 10.8.0.5.
            "5 tun0 10.8.0.6/32  false",
        ];
        assert_eq!(shown, expected);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn truncated_messages_do_not_panic() {
        let links = HashMap::new();
        for (captured, kind) in [(LINKS, netlink::LINK), (ADDRESSES, netlink::ADDRESS)] {
            for body in bodies(captured, kind) {
                for len in 0..body.len() {
                    let _ = (link(&body[..len]), interface(&body[..len], &links));
                }
            }
        }
    }

    #[test]
    fn broadcast_address_is_the_one_set_or_the_last_of_the_network() {
        let address = Ipv4Addr::new(10, 0, 3, 1);
        for (prefix_len, set, expected) in [
            (24, Some([10, 0, 3, 255]), Some([10, 0, 3, 255])),
            (24, Some([10, 0, 255, 255]), Some([10, 0, 255, 255])),
            (24, None, Some([10, 0, 3, 255])),
            (24, Some([0, 0, 0, 0]), Some([10, 0, 3, 255])),
            (24, Some([10, 0, 3, 1]), Some([10, 0, 3, 255])),
            (30, None, Some([10, 0, 3, 3])),
            (31, None, None),
            (32, None, None),
            (0, None, Some([255, 255, 255, 255])),
        ] {
            let found = broadcast(address, prefix_len, set.map(IpAddr::from));
            assert_eq!(found, expected.map(Ipv4Addr::from), "/{prefix_len} {set:?}");
        }
    }

    #[test]
    fn addresses_of_this_machine_are_read_without_loopback() {
        // Which addresses exist depends on the machine.
        let interfaces = read().unwrap();
        let is_fine = |i: &InterfaceAddress| !i.address.is_loopback() && i.index > 0;
        assert!(interfaces.iter().all(is_fine), "{interfaces:?}");
    }
}
