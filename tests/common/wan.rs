//! Networks joined by a router, like the internet: hosts reach each other's addresses, and the
//! router forwards no broadcast and no multicast.

use super::lan::{Host, Lan, Namespace, Run, Scale, Subnet, run};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// A router between the networks that [`Wan::lan`] adds.
pub struct Wan {
    router: Arc<Namespace>,
    lans: AtomicU8,
    scale: Scale,
}

impl Wan {
    /// A router without networks.
    pub fn new() -> Wan {
        let router = Namespace::bare();
        router.forward();
        Wan { router: Arc::new(router), lans: AtomicU8::new(0), scale: Scale::default() }
    }

    /// Sets the factors for the programs on networks that are added later.
    pub fn with_scale(mut self, scale: Scale) -> Wan {
        self.scale = scale;
        self
    }

    /// Adds a network whose gateway is the router.
    pub fn lan(&self, subnet: Subnet) -> Lan {
        let number = self.lans.fetch_add(1, Ordering::Relaxed) + 1;
        Lan::routed(&self.router, &format!("lan{number}"), subnet).with_scale(self.scale)
    }

    /// Makes the router silently drop packets to an unused range of addresses, such as
    /// `10.9.0.0/16`.
    pub fn blackhole(&self, range: &str) {
        run(&self.router, &format!("ip route add blackhole {range}"));
    }

    /// Makes the router answer packets to a range of addresses with *host unreachable* at once.
    pub fn unreachable(&self, range: &str) {
        run(&self.router, &format!("ip route add unreachable {range}"));
    }

    /// Makes `host` accept packets to all addresses of a range. It refuses connections to ports on
    /// which nothing listens.
    pub fn all_at(&self, range: &str, host: &Host) {
        run(&self.router, &format!("ip route add {range} via {}", host.address));
        host.net(&format!("ip route add local {range} dev lo"));
    }
}

/// A network behind a router that translates addresses (NAT), as in a home: hosts inside can
/// connect out, and from outside only forwarded ports are reachable.
pub struct Nat {
    /// The network inside.
    pub lan: Lan,
    /// The router, which is a host of the outer network.
    pub router: Host,
}

impl Nat {
    /// Connects a router to the network `outside`, and adds the network `inside` behind it.
    pub fn new(outside: &Lan, inside: Subnet) -> Nat {
        let router = outside.host("nat");
        router.namespace.forward();
        let lan = Lan::routed(&router.namespace, "inside", inside).with_scale(outside.scale);
        router.net("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE");
        // The router drops packets that belong to no connection from inside and no forwarded port,
        // also if the sender knows an inside address.
        router.net(
            "iptables -A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED,DNAT -j ACCEPT",
        );
        router.net("iptables -A FORWARD -i eth0 -j DROP");
        Nat { lan, router }
    }

    /// The outer address of the router, which all hosts inside share.
    pub fn address(&self) -> Ipv4Addr {
        self.router.address
    }

    /// Forwards the `protocol` (`tcp`, `udp`) port `port` of the router to the port `inside` of
    /// `host`.
    pub fn forward(&self, protocol: &str, port: u16, host: &Host, inside: u16) {
        let (port, to) = (port.to_string(), format!("{}:{inside}", host.address));
        self.router
            .net_cmd("iptables")
            .args(["-t", "nat", "-A", "PREROUTING", "-i", "eth0", "-p", protocol, "--dport", &port])
            .args(["-j", "DNAT", "--to-destination", &to])
            .okay();
    }
}
