//! The addresses of this machine's interfaces, as the kernel reports them.

use super::cidr::Cidr;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name of the interface, as `ip address` shows it.
    pub name: String,
    /// The kernel's number of the interface, which is the scope ID of its link-local addresses.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Number of leading bits that the addresses of its network share.
    pub prefix_len: u8,
    /// The broadcast address, on IPv4 networks that have one.
    pub broadcast: Option<Ipv4Addr>,
    /// Whether the interface is up and has a link. Without, nothing sent there arrives.
    pub running: bool,
}

impl Interface {
    /// The network that the address is in.
    pub fn network(&self) -> Cidr {
        Cidr::of(self.address, self.prefix_len)
    }

    /// Whether `ip` is in the address's network.
    pub fn reaches(&self, ip: IpAddr) -> bool {
        self.network().contains(ip)
    }
}

/// Reads all addresses but those of loopback from the kernel. Blocks for 0.1 ms, or 1 ms with 100
/// interfaces.
///
/// # Errors
/// The kernel does not list them: no netlink socket is allowed, or no descriptor is left.
pub fn read() -> io::Result<Vec<Interface>> {
    let all = if_addrs::get_if_addrs()?;
    Ok(all.into_iter().filter(|i| !i.is_loopback()).map(Interface::from).collect())
}

impl From<if_addrs::Interface> for Interface {
    fn from(i: if_addrs::Interface) -> Self {
        let running = i.is_oper_up();
        let (address, prefix_len, broadcast) = match i.addr {
            if_addrs::IfAddr::V4(v4) => {
                // Addresses added by hand often have no broadcast address; then the last address
                // of the network is taken. Point-to-point links and networks of one or two
                // addresses have none.
                let host_bits = u32::MAX.checked_shr(u32::from(v4.prefixlen)).unwrap_or(0);
                let last = Ipv4Addr::from_bits(v4.ip.to_bits() | host_bits);
                let set = v4.broadcast.filter(|&b| b != v4.ip && !b.is_unspecified());
                let has_one = !i.is_p2p && v4.prefixlen < 31;
                (IpAddr::V4(v4.ip), v4.prefixlen, has_one.then(|| set.unwrap_or(last)))
            }
            if_addrs::IfAddr::V6(v6) => (IpAddr::V6(v6.ip), v6.prefixlen, None),
        };
        // The C library reports the label of an IPv4 address, which may be `eth0:1`.
        let name = match i.name.split_once(':') {
            Some((name, _)) => name.to_owned(),
            None => i.name,
        };
        let index = i.index.unwrap_or(0);
        Interface { name, index, address, prefix_len, broadcast, running }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use if_addrs::{IfAddr, IfOperStatus, Ifv4Addr};

    fn v4(name: &str, prefixlen: u8, broadcast: Option<[u8; 4]>, is_p2p: bool) -> Interface {
        let addr = Ifv4Addr {
            ip: [10, 0, 3, 1].into(),
            netmask: [0; 4].into(),
            prefixlen,
            broadcast: broadcast.map(Ipv4Addr::from),
        };
        let oper_status = IfOperStatus::Up;
        let name = name.into();
        let addr = IfAddr::V4(addr);
        if_addrs::Interface { name, addr, index: Some(3), oper_status, is_p2p }.into()
    }

    #[test]
    fn broadcast_address_is_the_one_set_or_the_last_of_the_network() {
        for (prefix_len, set, is_p2p, expected) in [
            (24, Some([10, 0, 3, 255]), false, Some([10, 0, 3, 255])),
            (24, Some([10, 0, 255, 255]), false, Some([10, 0, 255, 255])),
            (24, None, false, Some([10, 0, 3, 255])),
            (24, Some([0, 0, 0, 0]), false, Some([10, 0, 3, 255])),
            (24, Some([10, 0, 3, 1]), false, Some([10, 0, 3, 255])),
            (24, Some([10, 0, 3, 255]), true, None),
            (30, None, false, Some([10, 0, 3, 3])),
            (31, None, false, None),
            (32, None, false, None),
        ] {
            let interface = v4("eth0", prefix_len, set, is_p2p);
            assert_eq!(interface.broadcast, expected.map(Ipv4Addr::from), "/{prefix_len} {set:?}");
        }
    }

    #[test]
    fn label_of_an_address_is_not_part_of_the_name() {
        assert_eq!(v4("docker0:1", 24, None, false).name, "docker0");
        assert_eq!(v4("eth0", 24, None, false).name, "eth0");
    }
}
