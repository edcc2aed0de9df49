//! The networks this machine is on, as its interfaces tell: who is a neighbour, and where to broadcast.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

/// How old the table may be before somebody who needs it has it read again. Laptops change networks; reading
/// costs about 0.1 ms.
pub const REFRESH: Duration = Duration::from_secs(5);

/// One address of one interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Name, as `ip address` shows it.
    pub name: String,
    /// Kernel's number, the scope of link-local addresses.
    pub index: u32,
    /// The address.
    pub address: IpAddr,
    /// Bits of the address that name its network.
    pub prefix_len: u8,
    /// Where a datagram reaches everyone, on IPv4 networks that can.
    pub broadcast: Option<Ipv4Addr>,
    /// Whether it is up and has a link. If not, nobody is there to send to.
    pub running: bool,
}

impl Interface {
    /// Whether `ip` is in this address's network.
    pub fn reaches(&self, ip: IpAddr) -> bool {
        fn same_prefix<const N: usize>(a: [u8; N], b: [u8; N], len: u8) -> bool {
            let (whole, bits) = (usize::from(len / 8).min(N), len % 8);
            let tail = whole == N || bits == 0 || (a[whole] ^ b[whole]) >> (8 - bits) == 0;
            a[..whole] == b[..whole] && tail
        }
        match (self.address, ip) {
            (IpAddr::V4(a), IpAddr::V4(b)) => same_prefix(a.octets(), b.octets(), self.prefix_len),
            (IpAddr::V6(a), IpAddr::V6(b)) => same_prefix(a.octets(), b.octets(), self.prefix_len),
            _ => false,
        }
    }
}

/// Private IPv4 networks (RFC 1918), IPv4 and IPv6 link-local ones, and IPv6 unique local ones (RFC 4193).
pub fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_unique_local(),
    }
}

/// The interface table, shared by all threads.
pub struct Interfaces {
    table: RwLock<Table>,
}

struct Table {
    list: Arc<[Interface]>,
    read: Instant,
    generation: u64,
}

impl Interfaces {
    /// Reads the table. If the system does not give it, it is empty and the reason is logged: without interfaces
    /// nobody is a neighbour, and nothing is shared.
    pub fn read(now: Instant) -> Self {
        Self::new(enumerate(), now)
    }

    fn new(list: Arc<[Interface]>, now: Instant) -> Self {
        Interfaces { table: RwLock::new(Table { list, read: now, generation: 0 }) }
    }

    /// A table that was not read from the system.
    #[cfg(test)]
    pub fn fixed(list: Vec<Interface>, now: Instant) -> Self {
        Self::new(list.into(), now)
    }

    /// The table as last read.
    pub fn current(&self) -> Arc<[Interface]> {
        self.lock_read().list.clone()
    }

    /// How often the table has changed. Whoever has to act on changes compares it with the last that they saw: it
    /// may be somebody else who had the table read.
    pub fn generation(&self) -> u64 {
        self.lock_read().generation
    }

    /// Reads the table again if it is older than `max_age`.
    pub fn refresh(&self, now: Instant, max_age: Duration) {
        if now.saturating_duration_since(self.lock_read().read) >= max_age {
            self.replace(enumerate(), now);
        }
    }

    fn replace(&self, list: Arc<[Interface]>, now: Instant) {
        let mut table = self.table.write().unwrap_or_else(|e| e.into_inner());
        let generation = table.generation + u64::from(table.list != list);
        *table = Table { list, read: now, generation };
    }

    /// Whether `ip` is in a private network that this machine is directly connected to.
    pub fn is_neighbour(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        match ip {
            // Every link-local address is one hop away: the kernel routes it nowhere else.
            IpAddr::V6(v6) if v6.is_unicast_link_local() => true,
            _ => is_private(ip) && self.lock_read().list.iter().any(|i| i.reaches(ip)),
        }
    }

    /// Whether `ip` is an address of this machine.
    pub fn is_own(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || self.lock_read().list.iter().any(|i| i.address == ip)
    }

    fn lock_read(&self) -> std::sync::RwLockReadGuard<'_, Table> {
        self.table.read().unwrap_or_else(|e| e.into_inner())
    }
}

fn enumerate() -> Arc<[Interface]> {
    let all = if_addrs::get_if_addrs().unwrap_or_else(|e| {
        log::error!("network interfaces: {e}");
        Vec::new()
    });
    all.into_iter().filter(|i| !i.is_loopback()).map(Interface::from).collect()
}

impl From<if_addrs::Interface> for Interface {
    fn from(i: if_addrs::Interface) -> Self {
        let running = i.is_oper_up();
        let (address, prefix_len, broadcast) = match i.addr {
            if_addrs::IfAddr::V4(v4) => {
                // Addresses added by hand often have no broadcast address set; the network's last one is it then.
                // Point-to-point links and networks of one or two addresses have none.
                let host_bits = u32::MAX.checked_shr(u32::from(v4.prefixlen)).unwrap_or(0);
                let last = Ipv4Addr::from_bits(v4.ip.to_bits() | host_bits);
                let set = v4.broadcast.filter(|&b| b != v4.ip && !b.is_unspecified());
                let broadcast = (!i.is_p2p && v4.prefixlen < 31).then(|| set.unwrap_or(last));
                (IpAddr::V4(v4.ip), v4.prefixlen, broadcast)
            }
            if_addrs::IfAddr::V6(v6) => (IpAddr::V6(v6.ip), v6.prefixlen, None),
        };
        Interface { name: i.name, index: i.index.unwrap_or(0), address, prefix_len, broadcast, running }
    }
}

/// The link-local multicast group of peerix; its last four bytes spell "peer".
pub const MULTICAST_GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0x7065, 0x6572);

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(address: &str, prefix_len: u8) -> Interface {
        let address = address.parse().unwrap();
        Interface { name: "eth0".into(), index: 2, address, prefix_len, broadcast: None, running: true }
    }

    #[test]
    fn neighbours_are_private_and_directly_connected() {
        let interfaces = Interfaces::fixed(
            vec![interface("192.168.10.5", 22), interface("203.0.113.9", 24), interface("fd00:1::5", 64)],
            Instant::now(),
        );
        let neighbour = |ip: &str| interfaces.is_neighbour(ip.parse().unwrap());
        for ip in ["192.168.8.0", "192.168.11.255", "::ffff:192.168.9.1", "fd00:1::9", "fe80::1"] {
            assert!(neighbour(ip), "{ip}");
        }
        // The last: public addresses are no neighbours even on a directly connected network.
        for ip in ["192.168.12.1", "10.0.0.1", "fd00:2::9", "2001:db8::1", "127.0.0.1", "::1", "203.0.113.10"] {
            assert!(!neighbour(ip), "{ip}");
        }
        assert!(interfaces.is_own("::ffff:192.168.10.5".parse().unwrap()));
        assert!(!interfaces.is_own("192.168.10.6".parse().unwrap()));
    }

    #[test]
    fn a_change_is_seen_by_everyone_and_once() {
        let now = Instant::now();
        let table: Arc<[Interface]> = [interface("192.168.10.5", 24)].into();
        let interfaces = Interfaces::new(table.clone(), now);
        let seen = interfaces.generation();
        interfaces.replace(table.clone(), now);
        assert_eq!(interfaces.generation(), seen);
        let unplugged = Interface { running: false, ..table[0].clone() };
        interfaces.replace([unplugged].into(), now);
        assert_eq!(interfaces.generation(), seen + 1);
        // Looked at too early by another, it is still the change that this one has not seen.
        interfaces.refresh(now, REFRESH);
        assert_eq!(interfaces.generation(), seen + 1);
    }

    #[test]
    fn prefixes_of_every_length() {
        let base = interface("10.20.30.40", 0);
        for len in 0..=32u8 {
            let network = Interface { prefix_len: len, ..base.clone() };
            assert!(network.reaches("10.20.30.40".parse().unwrap()));
            // Flip the last bit inside the prefix, and the first one outside.
            let bits = u32::from_be_bytes([10, 20, 30, 40]);
            if len > 0 {
                assert!(!network.reaches(Ipv4Addr::from(bits ^ (1 << (32 - len))).into()), "/{len}");
            }
            if len < 32 {
                assert!(network.reaches(Ipv4Addr::from(bits ^ (1 << (31 - len))).into()), "/{len}");
            }
        }
    }
}
