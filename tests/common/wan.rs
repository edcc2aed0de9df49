//! Networks joined by a router, as the internet joins them: each reaches the others' addresses, and
//! no broadcast or multicast leaves any.

use super::lan::{Host, Lan, Namespace, Run, Scale, Subnet, run};
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// A router. Networks are joined by [`Wan::lan`], and hosts plugged into those.
pub struct Wan {
    router: Arc<Namespace>,
    lans: AtomicU8,
    scale: Scale,
}

impl Wan {
    /// No networks yet.
    pub fn new() -> Wan {
        let router = Namespace::bare();
        router.forward();
        Wan { router: Arc::new(router), lans: AtomicU8::new(0), scale: Scale::default() }
    }

    /// The same, where programs on networks still to come scale their times.
    pub fn with_scale(mut self, scale: Scale) -> Wan {
        self.scale = scale;
        self
    }

    /// A network of the internet; its hosts get a way out.
    pub fn lan(&self, subnet: Subnet) -> Lan {
        let number = self.lans.fetch_add(1, Ordering::Relaxed) + 1;
        Lan::routed(&self.router, &format!("lan{number}"), subnet).with_scale(self.scale)
    }

    /// Has packets to a range of addresses that is nobody's, given as `10.9.0.0/16`, dropped
    /// without a word.
    pub fn blackhole(&self, range: &str) {
        run(&self.router, &format!("ip route add blackhole {range}"));
    }

    /// Has them answered with *host unreachable*, at once.
    pub fn unreachable(&self, range: &str) {
        run(&self.router, &format!("ip route add unreachable {range}"));
    }

    /// Has `host` take all of them for its own, so that connections are refused where it does not
    /// listen.
    pub fn all_at(&self, range: &str, host: &Host) {
        run(&self.router, &format!("ip route add {range} via {}", host.address));
        host.net(&format!("ip route add local {range} dev lo"));
    }
}

/// A network behind a router that has one address for all of it, as at home: its hosts reach out,
/// and from outside nothing reaches them but what is forwarded.
pub struct Nat {
    /// The network inside.
    pub lan: Lan,
    /// The router, a host of the network outside.
    pub router: Host,
}

impl Nat {
    /// Plugs a router into `outside`, and a new network into the router.
    pub fn new(outside: &Lan, inside: Subnet) -> Nat {
        let router = outside.host("nat");
        router.namespace.forward();
        let lan = Lan::routed(&router.namespace, "inside", inside).with_scale(outside.scale);
        router.net("iptables -t nat -A POSTROUTING -o eth0 -j MASQUERADE");
        // What nobody inside asked for, and nobody forwarded, stays outside, whoever knows the
        // addresses inside.
        router.net(
            "iptables -A FORWARD -i eth0 -m conntrack --ctstate ESTABLISHED,RELATED,DNAT -j ACCEPT",
        );
        router.net("iptables -A FORWARD -i eth0 -j DROP");
        Nat { lan, router }
    }

    /// The address that everything inside has outside.
    pub fn address(&self) -> Ipv4Addr {
        self.router.address
    }

    /// Has what comes to a port from outside, by `tcp` or `udp`, passed on to a port of `host`.
    pub fn forward(&self, protocol: &str, port: u16, host: &Host, inside: u16) {
        let (port, to) = (port.to_string(), format!("{}:{inside}", host.address));
        self.router
            .net_cmd("iptables")
            .args(["-t", "nat", "-A", "PREROUTING", "-i", "eth0", "-p", protocol, "--dport", &port])
            .args(["-j", "DNAT", "--to-destination", &to])
            .okay();
    }
}
