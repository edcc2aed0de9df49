//! The user's network policy: `--lan` and `--interface`.

use super::cidr::Cidr;
use crate::fnmatch::Pattern;
use std::net::IpAddr;
use std::str::FromStr;

/// Patterns of interfaces of containers and virtual machines. These interfaces are excluded unless
/// `--interface` names them.
const EXCLUDED_BY_DEFAULT: [&str; 10] = [
    "docker*",  // Docker
    "br-*",     // Docker, one for each network
    "veth*",    // the host's ends of links into containers
    "virbr*",   // libvirt
    "cni*",     // Kubernetes
    "podman*",  // Podman
    "lxc*",     // LXC, and Cilium's links into pods
    "lxdbr*",   // LXD and Incus
    "vmnet*",   // VMware
    "vboxnet*", // VirtualBox
];

/// Maximum length of an interface name in bytes: the kernel's `IFNAMSIZ` without the terminating
/// zero.
const MAX_INTERFACE_NAME: usize = 15;

/// Which addresses and which interfaces belong to the LAN, by `--lan` and `--interface`. An address
/// is on the LAN only if both its range and its interface are allowed.
#[derive(Debug, Clone, Default)]
pub struct NetworkPolicy {
    /// Networks that are LAN even if their addresses are public. Empty by default.
    pub lan: Vec<LanRange>,
    /// Which interfaces are used. If empty, all except those of containers and virtual machines.
    pub interfaces: Vec<InterfacePattern>,
}

impl NetworkPolicy {
    /// Whether the interface `name` is used. It is not if an excluding pattern matches. Otherwise,
    /// if there are including patterns, one of them must match. Without any, all interfaces are
    /// used except those of containers and virtual machines.
    pub fn allows_interface(&self, name: &str) -> bool {
        let all = self.interfaces.iter();
        let (excluding, including): (Vec<_>, Vec<_>) = all.partition(|i| i.excludes);
        let matches = |interface: &&InterfacePattern| interface.pattern.matches(name);
        if excluding.iter().any(matches) {
            return false;
        }
        match including.is_empty() {
            true => !is_excluded_by_default(name),
            false => including.iter().any(matches),
        }
    }

    /// Whether `ip` is in an allowed range: private, IPv6 unique local, link-local, or in a network
    /// of `--lan`. The address is LAN only if an allowed interface is connected to that range.
    pub fn allows_address(&self, ip: IpAddr) -> bool {
        is_private(ip) || self.is_named(ip)
    }

    /// Whether `ip` is in a network of `--lan`.
    pub fn is_named(&self, ip: IpAddr) -> bool {
        self.lan.iter().any(|range| range.0.contains(ip))
    }
}

fn is_excluded_by_default(name: &str) -> bool {
    EXCLUDED_BY_DEFAULT.iter().any(|pattern| Pattern::parse(pattern).matches(name))
}

/// Whether `ip` is private (RFC 1918), unique local (RFC 4193), or link-local IPv4 or IPv6.
fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local() || ip.is_unique_local(),
    }
}

/// A network that `--lan` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LanRange(Cidr);

impl LanRange {
    /// The network.
    pub fn cidr(&self) -> Cidr {
        self.0
    }
}

impl FromStr for LanRange {
    type Err = String;

    /// The text is no valid [`Cidr`], or a network that cannot be a LAN: all addresses, loopback,
    /// multicast, IPv4-mapped IPv6 addresses, or link-local IPv6 addresses, which `--interface`
    /// selects.
    fn from_str(text: &str) -> Result<Self, String> {
        let cidr: Cidr = text.parse()?;
        let error = match cidr.address() {
            _ if cidr.prefix_len() == 0 => "every address there is; --mode wan shares with all",
            ip if ip.is_loopback() => "loopback addresses are always this machine",
            ip if ip.is_multicast() => "multicast addresses belong to no machine",
            IpAddr::V6(ip) if ip.is_unicast_link_local() => {
                "link-local IPv6 addresses belong to every network; --interface chooses those"
            }
            IpAddr::V6(ip) if ip.to_ipv4_mapped().is_some() => "write it as an IPv4 network",
            _ => return Ok(LanRange(cidr)),
        };
        Err(error.into())
    }
}

/// A pattern of `--interface`: a name in which `*` and `?` are wildcards. A leading `!` excludes
/// the interfaces that it matches.
#[derive(Debug, Clone)]
pub struct InterfacePattern {
    pattern: Pattern,
    excludes: bool,
}

impl FromStr for InterfacePattern {
    type Err = String;

    /// The text matches no valid interface name, or contains character sets of shell patterns.
    fn from_str(text: &str) -> Result<Self, String> {
        let (excludes, pattern) = match text.strip_prefix('!') {
            Some(pattern) => (true, pattern),
            None => (false, text),
        };
        let error = if pattern.is_empty() {
            "no name of an interface"
        } else if pattern.contains(['[', ']']) {
            "only * and ? are wildcards"
        } else if pattern.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
            "interfaces have no such names; see `ip link`"
        } else if pattern.bytes().filter(|byte| *byte != b'*').count() > MAX_INTERFACE_NAME {
            "names of interfaces have at most 15 bytes; see `ip link`"
        } else {
            return Ok(InterfacePattern { pattern: Pattern::parse(pattern), excludes });
        };
        Err(error.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(lan: &[&str], interfaces: &[&str]) -> NetworkPolicy {
        NetworkPolicy {
            lan: lan.iter().map(|text| text.parse().unwrap()).collect(),
            interfaces: interfaces.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    #[test]
    fn interfaces_of_containers_are_excluded_by_default() {
        let policy = NetworkPolicy::default();
        for name in [
            "docker0",
            "docker_gwbridge",
            "br-0123456789ab",
            "veth12ab34c",
            "virbr0",
            "virbr10",
            "cni0",
            "cni-podman0",
            "podman1",
            "lxcbr0",
            "lxdbr0",
            "vmnet8",
            "vboxnet0",
        ] {
            assert!(!policy.allows_interface(name), "{name}");
        }
        for name in ["eth0", "enp3s0", "wlan0", "br0", "bond0", "tailscale0", "wg0", "tun0"] {
            assert!(policy.allows_interface(name), "{name}");
        }
    }

    #[test]
    fn interface_patterns_select_interfaces() {
        for (patterns, allowed, denied) in [
            (&["eth0"][..], &["eth0"][..], &["eth1", "eth01", "wlan0", "docker0"][..]),
            (&["e*", "wlan?"], &["eth0", "enp3s0", "wlan0"], &["wlan10", "wlan", "docker0"]),
            // With an including pattern, the default exclusion does not apply.
            (&["docker0"], &["docker0"], &["docker1", "eth0"]),
            (&["*"], &["eth0", "docker0", "virbr0"], &[]),
            (&["br-*", "eth0"], &["br-lan", "eth0"], &["docker0"]),
            // Excluding patterns apply first, in any order.
            (&["!eth1", "eth*"], &["eth0"], &["eth1", "wlan0"]),
            (&["*", "!docker*"], &["eth0", "virbr0"], &["docker0"]),
            (&["docker0", "!docker0"], &[], &["docker0", "eth0"]),
            // Excluding patterns alone add to the default exclusion.
            (&["!wlan*"], &["eth0", "wg0"], &["wlan0", "docker0", "virbr0"]),
        ] {
            let policy = policy(&[], patterns);
            for name in allowed {
                assert!(policy.allows_interface(name), "{patterns:?}: {name}");
            }
            for name in denied {
                assert!(!policy.allows_interface(name), "{patterns:?}: {name}");
            }
        }
    }

    #[test]
    fn private_and_named_addresses_are_allowed() {
        let policy = policy(&["100.64.0.0/10", "2001:db8:1::/48"], &[]);
        for ip in [
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.1.1",
            "fd00::1",
            "fe80::1",
            "100.64.0.1",
            "100.127.255.255",
            "2001:db8:1:2::3",
        ] {
            assert!(policy.allows_address(ip.parse().unwrap()), "{ip}");
        }
        let others = ["100.128.0.1", "172.32.0.1", "8.8.8.8", "2001:db8:2::1", "127.0.0.1", "::1"];
        for ip in others {
            assert!(!policy.allows_address(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn range_that_cannot_be_a_lan_is_refused() {
        for (text, names) in [
            ("0.0.0.0/0", "--mode wan"),
            ("::/0", "--mode wan"),
            ("127.0.0.0/8", "this machine"),
            ("::1/128", "this machine"),
            ("224.0.0.0/4", "multicast"),
            ("ff02::/16", "multicast"),
            ("fe80::/10", "--interface"),
            ("fe80::/64", "--interface"),
            ("::ffff:10.0.0.0/104", "as an IPv4 network"),
            ("10.0.0.5/8", "did you mean 10.0.0.0/8?"),
        ] {
            let error = text.parse::<LanRange>().unwrap_err();
            assert!(error.contains(names), "{text}: {error}");
        }
        let range: LanRange = "100.64.0.0/10".parse().unwrap();
        assert_eq!(range.cidr().to_string(), "100.64.0.0/10");
    }

    #[test]
    fn pattern_that_matches_no_valid_name_is_refused() {
        for (text, names) in [
            ("", "no name"),
            ("!", "no name"),
            ("e[tn]h0", "only * and ?"),
            ("eth0:1", "ip link"),
            ("eth 0", "ip link"),
            ("a/b", "ip link"),
            ("abcdefghijklmnop", "at most 15 bytes"),
        ] {
            let error = text.parse::<InterfacePattern>().unwrap_err();
            assert!(error.contains(names), "{text}: {error}");
        }
        assert!("!*abcdefghijklmno*".parse::<InterfacePattern>().is_ok());
    }
}
