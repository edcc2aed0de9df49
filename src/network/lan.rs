//! The rule that decides which addresses are LAN: it applies the user's policy to the addresses of
//! this machine.

use super::cidr::Cidr;
use super::interfaces::InterfaceAddress;
use super::policy::NetworkPolicy;
use std::cmp::Reverse;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The link-local multicast group of peerix; its last four bytes spell "peer".
pub const MULTICAST_GROUP: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0x7065, 0x6572);

/// The LAN networks of this machine at one moment.
///
/// An address is LAN if its range is allowed (private, link-local, unique local, or a `--lan`
/// network) and
///
/// * the most specific directly connected network that contains it is on an allowed interface, or
/// * no directly connected network contains it, and a `--lan` network does. Such an address is
///   behind a router or VPN: it is answered and may be a peer, but no broadcast reaches it.
///
/// A link-local IPv6 address is LAN if its scope ID names an allowed interface, because all
/// networks share the same link-local addresses.
#[derive(Debug)]
pub struct LanNetworks {
    policy: NetworkPolicy,
    interfaces: Vec<InterfaceAddress>,
    /// Those of `interfaces` whose addresses are on the LAN.
    lan_addresses: Vec<InterfaceAddress>,
    /// Indexes of the allowed interfaces.
    allowed: Vec<u32>,
    /// The networks of all interfaces except the link-local IPv6 one. The most specific come first,
    /// and among equals those of allowed interfaces.
    connected: Vec<ConnectedNetwork>,
}

#[derive(Debug)]
struct ConnectedNetwork {
    network: Cidr,
    is_allowed: bool,
}

impl LanNetworks {
    /// Applies the policy to the addresses of this machine. `interfaces` must not include loopback.
    pub fn new(policy: NetworkPolicy, interfaces: Vec<InterfaceAddress>) -> Self {
        let (mut lan_addresses, mut allowed, mut connected) = (Vec::new(), Vec::new(), Vec::new());
        for i in &interfaces {
            let is_allowed = policy.allows_interface(&i.name);
            if is_allowed {
                allowed.push(i.index);
                lan_addresses.extend(policy.allows_address(i.address).then(|| i.clone()));
            }
            if !is_link_local_v6(i.address) {
                connected.push(ConnectedNetwork { network: i.network(), is_allowed });
            }
        }
        connected.sort_by_key(|c| Reverse((c.network.prefix_len(), c.is_allowed)));
        let allowed = each_once(allowed);
        LanNetworks { policy, interfaces, lan_addresses, allowed, connected }
    }

    /// Whether a node at this address is on the LAN. A link-local IPv6 address needs the scope ID
    /// that the receiving socket reports. An IPv4-mapped address counts as IPv4.
    pub fn is_lan(&self, address: SocketAddr) -> bool {
        if let SocketAddr::V6(v6) = address
            && v6.ip().is_unicast_link_local()
        {
            return self.allowed.contains(&v6.scope_id());
        }
        let ip = address.ip().to_canonical();
        let connected = self.connected.iter().find(|c| c.network.contains(ip));
        match connected {
            Some(connected) => connected.is_allowed && self.policy.allows_address(ip),
            None => self.policy.is_named(ip),
        }
    }

    /// Whether `ip` is an address of this machine, on any interface, or a loopback address.
    pub fn is_own(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        ip.is_loopback() || self.interfaces.iter().any(|i| i.address == ip)
    }

    /// All addresses of this machine but those of loopback.
    pub fn interfaces(&self) -> &[InterfaceAddress] {
        &self.interfaces
    }

    /// The addresses of this machine that are on the LAN.
    pub fn lan_addresses(&self) -> &[InterfaceAddress] {
        &self.lan_addresses
    }

    /// The `--lan` networks that are not part of one connected network. All or some of their
    /// addresses are behind a router or VPN.
    pub fn routed_networks(&self) -> impl Iterator<Item = Cidr> {
        let all = self.policy.lan.iter().map(|range| range.cidr());
        all.filter(|named| self.connected_network_around(named).is_none())
    }

    /// Names of the excluded interfaces with an address in an allowed range, each once. Link-local
    /// IPv6 addresses do not count.
    pub fn excluded_interfaces(&self) -> Vec<&str> {
        let is_excluded = |i: &&InterfaceAddress| {
            !self.policy.allows_interface(&i.name)
                && !is_link_local_v6(i.address)
                && self.policy.allows_address(i.address)
        };
        each_once(self.interfaces.iter().filter(is_excluded).map(|i| &*i.name))
    }

    /// The `--lan` networks that are part of the network of an excluded interface, each with the
    /// name of the interface. Naming them has no effect.
    pub fn ineffective_networks(&self) -> impl Iterator<Item = (Cidr, &str)> {
        let all = self.policy.lan.iter().map(|range| range.cidr());
        all.filter_map(|named| {
            let around = self.connected_network_around(&named).filter(|c| !c.is_allowed)?;
            let interface = self.interfaces.iter().find(|i| i.network() == around.network)?;
            Some((named, &*interface.name))
        })
    }

    /// The most specific connected network that contains all of `named`.
    fn connected_network_around(&self, named: &Cidr) -> Option<&ConnectedNetwork> {
        let is_wider = |c: &&ConnectedNetwork| c.network.prefix_len() <= named.prefix_len();
        let mut wider = self.connected.iter().filter(is_wider);
        wider.find(|c| c.network.contains(named.address()))
    }

    /// Explains to the user why no address of this machine is on the LAN, and what to do about it.
    /// Valid only in that case.
    pub fn why_none(&self) -> String {
        let names = each_once(self.lan_addresses.iter().map(|i| &*i.name));
        if !names.is_empty() && self.lan_addresses.iter().all(|i| !i.running) {
            return format!(
                "there are no neighbours, because no interface with a LAN address has a link \
                 ({}); see `ip -brief link`",
                names.join(", ")
            );
        }
        let excluded = self.excluded_interfaces();
        if excluded.is_empty() {
            return "no interface that is up has a private address, so that there are no \
                    neighbours; see `ip address`. --lan names networks of other addresses"
                .into();
        }
        format!(
            "there are no neighbours, because every interface with a private address is excluded \
             ({}); --interface NAME uses it nevertheless",
            excluded.join(", ")
        )
    }

    /// Targets of a datagram to all nodes of the LAN: the broadcast address of each IPv4 network,
    /// and the multicast group on each interface with a link-local IPv6 address. Interfaces without
    /// a link are left out.
    pub fn broadcast_targets(&self, port: u16) -> Vec<SocketAddr> {
        let target = |i: &InterfaceAddress| match (i.address, i.broadcast) {
            (IpAddr::V4(_), Some(broadcast)) => Some(SocketAddr::new(broadcast.into(), port)),
            (IpAddr::V6(ip), _) if ip.is_unicast_link_local() => {
                Some(SocketAddrV6::new(MULTICAST_GROUP, port, 0, i.index).into())
            }
            _ => None,
        };
        each_once(self.lan_addresses.iter().filter(|i| i.running).filter_map(target))
    }

    /// Indexes of the allowed interfaces that have an IPv6 address. The multicast group is joined
    /// there.
    pub fn multicast_interfaces(&self) -> Vec<u32> {
        let v6 = self.interfaces.iter().filter(|i| i.address.is_ipv6());
        let has_v6 = |index: &u32| v6.clone().any(|i| i.index == *index);
        self.allowed.iter().copied().filter(has_v6).collect()
    }
}

impl fmt::Display for LanNetworks {
    /// Writes the LAN addresses of this machine and the networks behind routers, then the excluded
    /// interfaces. Of each list it writes at most four entries and the number of the others.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let connected = self.lan_addresses.iter();
        let connected = connected.map(|i| format!("{}/{} on {}", i.address, i.prefix_len, i.name));
        let routed = self.routed_networks().map(|network| format!("{network} behind a router"));
        let networks: Vec<String> = connected.chain(routed).collect();
        f.write_str(if networks.is_empty() { "none" } else { "" })?;
        write_some(f, &networks)?;
        let excluded = self.excluded_interfaces();
        f.write_str(if excluded.is_empty() { "" } else { "; excluded: " })?;
        write_some(f, &excluded)
    }
}

/// Maximum number of entries of one list that [`LanNetworks`] displays. For the others it displays
/// their number.
const MAX_SHOWN: usize = 4;

fn write_some(f: &mut fmt::Formatter<'_>, names: &[impl AsRef<str>]) -> fmt::Result {
    for (at, name) in names.iter().take(MAX_SHOWN).enumerate() {
        f.write_str(if at > 0 { ", " } else { "" })?;
        f.write_str(name.as_ref())?;
    }
    match names.len().saturating_sub(MAX_SHOWN) {
        0 => Ok(()),
        more => write!(f, " and {more} more"),
    }
}

/// The items in their order, without repetitions.
fn each_once<T: PartialEq>(items: impl IntoIterator<Item = T>) -> Vec<T> {
    let mut once = Vec::new();
    for item in items {
        if !once.contains(&item) {
            once.push(item);
        }
    }
    once
}

fn is_link_local_v6(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parses an interface: `2 eth0 10.0.0.1/24`.
    fn interface(text: &str) -> InterfaceAddress {
        let words: Vec<&str> = text.split(' ').collect();
        let [index, name, network] = words[..] else { panic!("{text}") };
        let (address, prefix_len) = network.split_once('/').unwrap();
        let address: IpAddr = address.parse().unwrap();
        let prefix_len: u8 = prefix_len.parse().unwrap();
        let host_bits = u32::MAX.checked_shr(prefix_len.into()).unwrap_or(0);
        let broadcast = match address {
            IpAddr::V4(v4) if prefix_len < 31 => Some((v4.to_bits() | host_bits).into()),
            _ => None,
        };
        let (name, index) = (name.into(), index.parse().unwrap());
        InterfaceAddress { name, index, address, prefix_len, broadcast, running: true }
    }

    fn networks(interfaces: &[&str], lan: &[&str], patterns: &[&str]) -> LanNetworks {
        let policy = NetworkPolicy {
            lan: lan.iter().map(|text| text.parse().unwrap()).collect(),
            interfaces: patterns.iter().map(|text| text.parse().unwrap()).collect(),
        };
        LanNetworks::new(policy, interfaces.iter().map(|text| interface(text)).collect())
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap_or_else(|_| SocketAddr::new(text.parse().unwrap(), 12304))
    }

    fn check(networks: &LanNetworks, lan: &[&str], others: &[&str]) {
        for text in lan {
            assert!(networks.is_lan(address(text)), "{text} is LAN");
        }
        for text in others {
            assert!(!networks.is_lan(address(text)), "{text} is not LAN");
        }
    }

    fn targets(networks: &LanNetworks) -> Vec<String> {
        networks.broadcast_targets(1).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn private_directly_connected_networks_are_lan() {
        let networks = networks(
            &[
                "2 eth0 192.168.10.5/22",
                "2 eth0 fe80::5/64",
                "2 eth0 fd00:1::5/64",
                "3 eth1 203.0.113.9/24",
                "3 eth1 fe80::5/64",
            ],
            &[],
            &[],
        );
        check(
            &networks,
            &[
                "192.168.8.0",
                "192.168.11.255",
                "::ffff:192.168.9.1",
                "fd00:1::9",
                "[fe80::1%2]:1",
                "[fe80::1%3]:1",
                "192.168.10.5",
            ],
            &[
                "192.168.12.1",
                "10.0.0.1",
                "fd00:2::9",
                "2001:db8::1",
                "127.0.0.1",
                "::1",
                // Public addresses, though directly connected.
                "203.0.113.10",
                // Link-local, with the scope ID of an unknown interface, and without one.
                "[fe80::1%4]:1",
                "fe80::1",
            ],
        );
        let expected = ["192.168.11.255:1", "[ff02::7065:6572%2]:1", "[ff02::7065:6572%3]:1"];
        assert_eq!(targets(&networks), expected);
        assert_eq!(networks.multicast_interfaces(), [2, 3]);
        assert!(networks.is_own("::ffff:192.168.10.5".parse().unwrap()));
        assert!(networks.is_own("203.0.113.9".parse().unwrap()));
        assert!(!networks.is_own("192.168.10.6".parse().unwrap()));
    }

    #[test]
    fn networks_of_excluded_interfaces_are_not_lan() {
        let networks = networks(
            &[
                "2 eth0 10.0.0.5/8",
                "2 eth0 fe80::5/64",
                "3 docker0 172.17.0.1/16",
                "3 docker0 fe80::1/64",
                "4 br-0a 10.9.0.1/24",
                "5 virbr0 192.168.122.1/24",
            ],
            &[],
            &[],
        );
        check(
            &networks,
            &["10.8.0.1", "[fe80::9%2]:1", "::ffff:10.1.1.1"],
            // 10.9.0.2 is in the network of eth0 too, but packets for it go to br-0a.
            &["172.17.0.2", "10.9.0.2", "192.168.122.9", "[fe80::9%3]:1", "::ffff:172.17.0.2"],
        );
        assert_eq!(targets(&networks), ["10.255.255.255:1", "[ff02::7065:6572%2]:1"]);
        assert_eq!(networks.multicast_interfaces(), [2]);
        assert_eq!(networks.excluded_interfaces(), ["docker0", "br-0a", "virbr0"]);
        assert!(networks.is_own("172.17.0.1".parse().unwrap()));
    }

    #[test]
    fn why_none_names_the_option_that_helps() {
        let none = networks(&["2 eth0 203.0.113.9/24", "3 docker0 fe80::1/64"], &[], &[]);
        assert!(none.why_none().contains("--lan"), "{}", none.why_none());
        let excluded = networks(&["2 br-lan 10.0.0.5/8", "3 docker0 172.17.0.1/16"], &[], &[]);
        let why = excluded.why_none();
        assert!(why.contains("(br-lan, docker0); --interface NAME"), "{why}");
        // The addresses of two interfaces may alternate.
        let addresses = ["2 eth0 10.0.0.5/8", "3 wlan0 10.1.0.5/16", "2 eth0 fe80::5/64"];
        let unplugged = |text| InterfaceAddress { running: false, ..interface(text) };
        let unplugged = addresses.map(unplugged).into();
        let why = LanNetworks::new(NetworkPolicy::default(), unplugged).why_none();
        assert!(why.contains("(eth0, wlan0); see `ip -brief link`"), "{why}");
    }

    #[test]
    fn most_specific_connected_network_decides() {
        // A bridge does not hide the LAN if its wider network contains that of the LAN.
        let both = ["2 eth0 192.168.1.5/24", "3 br-1 192.168.0.1/20"];
        check(&networks(&both, &[], &[]), &["192.168.1.7"], &["192.168.2.7"]);
        // A network on two interfaces is LAN if one of them is allowed.
        let twice = ["2 wlan0 192.168.1.6/24", "3 eth0 192.168.1.5/24"];
        for patterns in [&["!wlan*"], &["!eth*"]] {
            check(&networks(&twice, &[], patterns), &["192.168.1.7"], &[]);
        }
        check(&networks(&twice, &[], &["wg0"]), &[], &["192.168.1.7"]);
    }

    #[test]
    fn two_networks_of_different_size_are_both_lan() {
        let networks = networks(&["2 eth0 10.77.0.5/24", "3 eth1 172.20.1.5/16"], &[], &[]);
        check(&networks, &["10.77.0.9", "172.20.200.9"], &["10.77.1.9", "172.21.0.1"]);
        assert_eq!(targets(&networks), ["10.77.0.255:1", "172.20.255.255:1"]);
    }

    #[test]
    fn named_public_network_is_lan() {
        let public = ["2 eth0 203.0.113.9/24", "2 eth0 2001:db8::9/64", "2 eth0 fe80::9/64"];
        let networks = networks(&public, &["203.0.113.0/24", "2001:db8::/64"], &["eth0"]);
        check(
            &networks,
            &["203.0.113.77", "2001:db8::1", "[fe80::1%2]:1"],
            &["203.0.112.1", "2001:db8:1::1", "10.0.0.1"],
        );
        assert_eq!(targets(&networks), ["203.0.113.255:1", "[ff02::7065:6572%2]:1"]);
        assert_eq!(networks.routed_networks().count(), 0);
    }

    #[test]
    fn named_part_of_a_connected_network_is_lan() {
        let public = ["2 eth0 203.0.113.9/24"];
        let lower = networks(&public, &["203.0.113.0/25"], &[]);
        check(&lower, &["203.0.113.77"], &["203.0.113.177"]);
        assert_eq!(targets(&lower), ["203.0.113.255:1"]);
        // The range does not contain this machine's address, so nothing is broadcast.
        let upper = networks(&public, &["203.0.113.128/25"], &[]);
        check(&upper, &["203.0.113.177"], &["203.0.113.77"]);
        assert!(targets(&upper).is_empty());
    }

    #[test]
    fn named_network_behind_a_router_is_lan_without_broadcast() {
        let networks = networks(
            &["2 eth0 192.168.1.5/24", "5 tailscale0 100.64.1.2/32"],
            &["100.64.0.0/10", "172.30.0.0/16"],
            &["eth0"],
        );
        let lan = ["100.100.1.1", "172.30.9.9", "192.168.1.1"];
        check(&networks, &lan, &["172.31.0.1", "100.1.1.1"]);
        assert_eq!(targets(&networks), ["192.168.1.255:1"]);
        let routed: Vec<String> = networks.routed_networks().map(|n| n.to_string()).collect();
        assert_eq!(routed, ["100.64.0.0/10", "172.30.0.0/16"]);
    }

    #[test]
    fn named_network_does_not_allow_an_excluded_interface() {
        let both = ["2 eth0 192.168.1.5/24", "3 docker0 10.9.0.1/24"];
        let named = networks(&both, &["10.0.0.0/8"], &[]);
        check(&named, &["10.8.0.1"], &["10.9.0.2"]);
        assert_eq!(targets(&named), ["192.168.1.255:1"]);
        assert_eq!(named.ineffective_networks().count(), 0, "a part of it has an effect");
        assert_eq!(named.routed_networks().count(), 1);
        let part = networks(&both, &["10.9.0.0/25"], &[]);
        let ineffective: Vec<_> = part.ineffective_networks().collect();
        assert_eq!(ineffective, [("10.9.0.0/25".parse().unwrap(), "docker0")]);
        let taken = networks(&both, &["10.0.0.0/8"], &["*"]);
        assert_eq!(taken.ineffective_networks().count(), 0);
        check(&taken, &["10.8.0.1", "10.9.0.2"], &[]);
        assert_eq!(targets(&taken), ["192.168.1.255:1", "10.9.0.255:1"]);
    }

    #[test]
    fn display_lists_networks_in_one_line() {
        let interfaces = ["2 eth0 192.168.1.5/24", "2 eth0 fe80::5/64", "3 docker0 172.17.0.1/16"];
        assert_eq!(
            networks(&interfaces, &["100.64.0.0/10"], &[]).to_string(),
            "192.168.1.5/24 on eth0, fe80::5/64 on eth0, 100.64.0.0/10 behind a router; \
             excluded: docker0"
        );
        assert_eq!(networks(&[], &[], &[]).to_string(), "none");
        let many = ["2 a 10.1.0.1/24", "3 b 10.2.0.1/24", "4 c 10.3.0.1/24", "5 d 10.4.0.1/24"];
        let all = [&many[..], &["6 e 10.5.0.1/24", "7 f 10.6.0.1/24"]].concat();
        let shown = networks(&all, &[], &["x"]).to_string();
        assert_eq!(shown, "none; excluded: a, b, c, d and 2 more");
    }

    #[test]
    fn interface_without_link_gets_no_broadcast() {
        let unplugged = InterfaceAddress { running: false, ..interface("2 eth0 10.0.0.5/8") };
        let networks = LanNetworks::new(NetworkPolicy::default(), vec![unplugged]);
        assert!(targets(&networks).is_empty());
        check(&networks, &["10.0.0.1"], &[]);
    }

    #[test]
    fn network_with_two_addresses_gets_one_broadcast() {
        let networks = networks(&["2 eth0 10.0.0.5/24", "2 eth0 10.0.0.6/24"], &[], &[]);
        assert_eq!(targets(&networks), ["10.0.0.255:1"]);
    }
}
