//! `--map-port`: has the router pass a port on to this machine, by PCP or NAT-PMP, and let
//! connections in by IPv6, by PCP.
//!
//! A thread asks for ten minutes at a time, asks again at half of that, when the network changes
//! and when the router says that it was restarted, and gives the mapping up at the end. It asks
//! only the gateway behind which it was used first: in a café nothing is opened.

use crate::network::Networks;
use crate::time_scale::{Interval, Timeout};
use crate::wire::port_mapping::{self, MappingGrant, MappingRequest, MappingResponse};
use crossbeam_channel::{Receiver, Sender, bounded};
use ring::rand::{SecureRandom, SystemRandom};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Seconds for which a mapping is asked: when this machine goes, it is open for no longer.
const LIFETIME_SECONDS: u32 = 600;

/// A mapping is asked for again after this, or after half of what the router gives if that is less.
const RENEWAL: Interval = Interval::from_secs(300);

/// Least time between two renewals, whatever the router says.
const LEAST_RENEWAL: Interval = Interval::from_secs(10);

/// A router that gives nothing is asked again after this.
const RETRY: Interval = Interval::from_secs(120);

/// First wait for an answer. It doubles with each of the [`TRIES`], so that a router that is silent
/// costs 3.75 s.
const FIRST_WAIT: Timeout = Timeout::from_millis(250);
/// Requests in all.
const TRIES: u32 = 4;

/// At the end the router's answer is not waited for longer.
const LAST_WAIT: Duration = Duration::from_millis(300);

/// It is looked this often whether the network is another, or the daemon ends.
const LOOK: Duration = Duration::from_secs(1);

/// The UDP port at which routers say that they forgot their mappings (RFC 6886, section 3.2.1, and
/// RFC 6887, section 14.1).
const NEWS_PORT: u16 = 5350;

/// Largest answer (RFC 6887, section 7).
const MAX_DATAGRAM: usize = 1100;

/// In the state directory: the hardware address of the gateway behind which ports may be mapped.
const FILE: &str = "gateway";

/// What is mapped at the moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Where the router passes connections on from.
    pub outside: Option<SocketAddr>,
    /// Where it lets connections in by IPv6.
    pub pinhole: Option<SocketAddr>,
    /// Why there is nothing, for people.
    pub problem: Option<String>,
}

/// The thread that keeps a mapping. Dropping it gives the mapping up, within `LAST_WAIT`.
pub struct PortMapper {
    current: Arc<Mutex<Mapping>>,
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PortMapper {
    /// Begins to map `port` of this machine. The first gateway is remembered in `state_dir`.
    ///
    /// # Errors
    /// No thread, or no random numbers.
    pub fn start(
        port: u16,
        state_dir: Option<PathBuf>,
        networks: Arc<Networks>,
    ) -> io::Result<PortMapper> {
        let current = Arc::new(Mutex::new(Mapping::default()));
        let (running, stopped) = bounded(0);
        let mut nonce = [0; 12];
        SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("no random numbers"))?;
        let keeper = MappingThread {
            port,
            nonce,
            state_dir,
            networks,
            current: current.clone(),
            stopped,
            was_said: None,
        };
        let thread = thread::Builder::new().name("gateway".into()).spawn(move || keeper.run())?;
        Ok(PortMapper { current, running: Some(running), thread: Some(thread) })
    }

    /// What is mapped at the moment; shared, as it changes.
    pub fn current(&self) -> Arc<Mutex<Mapping>> {
        self.current.clone()
    }
}

impl Drop for PortMapper {
    fn drop(&mut self) {
        drop(self.running.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct MappingThread {
    port: u16,
    nonce: [u8; 12],
    state_dir: Option<PathBuf>,
    networks: Arc<Networks>,
    current: Arc<Mutex<Mapping>>,
    stopped: Receiver<()>,
    /// The problem that was logged last.
    was_said: Option<String>,
}

/// A router, and how it was asked.
struct KnownRouter {
    router: SocketAddr,
    client: IpAddr,
    is_pcp: bool,
    mapped: MappingGrant,
}

impl MappingThread {
    fn run(mut self) {
        let news = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, NEWS_PORT)).ok();
        let news = news.filter(|news| news.set_nonblocking(true).is_ok());
        let mut held: Vec<KnownRouter> = Vec::new();
        loop {
            let seen = self.networks.current();
            let pause = self.renew(&mut held);
            let until = Instant::now() + pause;
            loop {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero()
                    || !Arc::ptr_eq(&seen, &self.networks.current())
                    || is_router_new(news.as_ref(), &held)
                {
                    break;
                }
                if !self.stopped.recv_timeout(left.min(LOOK)).is_err_and(|e| e.is_timeout()) {
                    return self.give_up(&held);
                }
            }
        }
    }

    /// Asks the router for all that it can give. Returns how long that is good for.
    fn renew(&mut self, held: &mut Vec<KnownRouter>) -> Duration {
        let before = std::mem::take(held);
        let mut mapping = Mapping::default();
        match self.map_v4(&before) {
            Ok((outside, one)) => {
                mapping.outside = Some(outside);
                held.push(one);
            }
            Err(why) => mapping.problem = Some(why),
        }
        if let Some(one) = self.pinhole(&before) {
            let ip = one.client;
            mapping.pinhole = Some(SocketAddr::new(ip, one.mapped.external_port));
            held.push(one);
        }
        self.tell(mapping);
        let shortest = held.iter().map(|one| one.mapped.lifetime / 2).min();
        let half = shortest.map(|seconds| Duration::from_secs(seconds.into()));
        half.map_or(RETRY.get(), |half| RENEWAL.get().min(half).max(LEAST_RENEWAL.get()))
    }

    fn tell(&mut self, mapping: Mapping) {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.outside != mapping.outside || current.pinhole != mapping.pinhole {
            mapping
                .outside
                .iter()
                .for_each(|at| log::info!("port mapping: reached from outside at {at}"));
            mapping
                .pinhole
                .iter()
                .for_each(|at| log::info!("port mapping: reached by IPv6 at {at}"));
        }
        *current = mapping.clone();
        drop(current);
        // A router that has neither protocol is said once.
        let problem = mapping.problem.filter(|_| mapping.pinhole.is_none());
        if problem != self.was_said {
            problem.iter().for_each(|problem| log::warn!("port mapping: {problem}"));
            self.was_said = problem;
        }
    }

    fn map_v4(&self, before: &[KnownRouter]) -> Result<(SocketAddr, KnownRouter), String> {
        let gateway = default_gateway_v4().ok_or("there is no router on this network")?;
        let router = SocketAddr::from((gateway, port_mapping::PORT));
        let socket =
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|e| format!("socket: {e}"))?;
        socket.connect(router).map_err(|e| format!("router {gateway}: {e}"))?;
        let client = socket.local_addr().map_err(|e| format!("socket: {e}"))?.ip();
        // Nothing is asked for before it is known which router this is. The answer is of no
        // interest, but ARP's is.
        let _ =
            exchange(&socket, &port_mapping::nat_pmp_address_request(), &self.wanted(client, 0), 1);
        self.check_gateway(gateway)?;
        let last = before
            .iter()
            .find(|one| one.router == router)
            .map_or(0, |one| one.mapped.external_port);
        let wanted = self.wanted(client, last);
        let (answer, is_pcp) =
            match exchange(&socket, &port_mapping::pcp_request(&wanted), &wanted, TRIES) {
                Some(MappingResponse::UnknownVersion) | None => (
                    exchange(&socket, &port_mapping::nat_pmp_request(&wanted), &wanted, TRIES),
                    false,
                ),
                answer => (answer, true),
            };
        let mapped = match answer {
            Some(MappingResponse::Mapped(mapped)) if mapped.external_port != 0 => mapped,
            Some(MappingResponse::Refused(code)) => {
                return Err(format!("router {gateway} refuses, with code {code}"));
            }
            Some(_) => return Err(format!("router {gateway} answers what makes no sense")),
            None => {
                return Err(format!(
                    "router {gateway} speaks neither PCP nor NAT-PMP, or has them switched off"
                ));
            }
        };
        let ip = match mapped.external_ip {
            Some(ip) => ip,
            None => {
                match exchange(&socket, &port_mapping::nat_pmp_address_request(), &wanted, TRIES) {
                    Some(MappingResponse::Address(ip)) => ip.into(),
                    _ => return Err(format!("router {gateway} does not say its address outside")),
                }
            }
        };
        let held = KnownRouter { router, client, is_pcp, mapped };
        if !is_public(ip) {
            self.release(&held);
            return Err(format!(
                "the address outside of router {gateway} is {ip}, which is private: there is another router"
            ));
        }
        Ok((SocketAddr::new(ip, mapped.external_port), held))
    }

    /// Has the router let connections in to this machine's IPv6 address, if it has a global one.
    fn pinhole(&self, before: &[KnownRouter]) -> Option<KnownRouter> {
        let router = default_gateway_v6(&self.networks)?;
        // Before anything is asked by IPv6, the router has to be the one that was allowed.
        self.check_gateway(default_gateway_v4()?).ok()?;
        let client = own_global_v6()?;
        let socket = UdpSocket::bind((client, 0)).ok()?;
        let to = SocketAddr::V6(SocketAddrV6::new(
            *router.ip(),
            port_mapping::PORT,
            0,
            router.scope_id(),
        ));
        socket.connect(to).ok()?;
        let last = before
            .iter()
            .find(|one| one.router == to)
            .map_or(self.port, |one| one.mapped.external_port);
        let wanted = self.wanted(client.into(), last);
        match exchange(&socket, &port_mapping::pcp_request(&wanted), &wanted, TRIES) {
            Some(MappingResponse::Mapped(mapped)) => {
                Some(KnownRouter { router: to, client: client.into(), is_pcp: true, mapped })
            }
            answer => {
                log::debug!("port mapping: no pinhole: {answer:?}");
                None
            }
        }
    }

    /// Allows the gateway behind which this was used first, and no other.
    fn check_gateway(&self, gateway: Ipv4Addr) -> Result<(), String> {
        let mac =
            hardware_address(gateway).ok_or_else(|| format!("router {gateway} does not answer"))?;
        let Some(dir) = &self.state_dir else { return Err("--map-port needs --state-dir".into()) };
        let file = dir.join(FILE);
        match read_gateway(&file) {
            Ok(known) if known == mac => Ok(()),
            Ok(known) => Err(format!(
                "router {gateway} is {mac}, and not {known} behind which --map-port was used first; remove {} to use it here",
                file.display()
            )),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::write(&file, format!("{mac}\n")).map_err(|e| format!("{}: {e}", file.display()))
            }
            Err(e) => Err(format!("{}: {e}", file.display())),
        }
    }

    fn wanted(&self, client: IpAddr, external_port: u16) -> MappingRequest {
        MappingRequest {
            client,
            nonce: self.nonce,
            internal_port: self.port,
            external_port,
            lifetime: LIFETIME_SECONDS,
        }
    }

    fn give_up(&self, held: &[KnownRouter]) {
        held.iter().for_each(|one| self.release(one));
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = Mapping::default();
    }

    fn release(&self, held: &KnownRouter) {
        let wanted = MappingRequest { lifetime: 0, ..self.wanted(held.client, 0) };
        let request = if held.is_pcp {
            port_mapping::pcp_request(&wanted)
        } else {
            port_mapping::nat_pmp_request(&wanted)
        };
        let Ok(socket) = UdpSocket::bind((held.client, 0)) else { return };
        if socket.connect(held.router).is_ok() && socket.send(&request).is_ok() {
            let _ = socket.set_read_timeout(Some(LAST_WAIT));
            let _ = socket.recv(&mut [0; MAX_DATAGRAM]);
        }
    }
}

/// Sends a request until there is an answer to it, `tries` times. Only the router is heard: the
/// socket is connected.
fn exchange(
    socket: &UdpSocket,
    request: &[u8],
    wanted: &MappingRequest,
    tries: u32,
) -> Option<MappingResponse> {
    let mut wait = FIRST_WAIT.get();
    for _ in 0..tries {
        // Nobody may be there, which the answer to an earlier datagram tells.
        let _ = socket.send(request);
        let until = Instant::now() + wait;
        while let Some(left) =
            until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            socket.set_read_timeout(Some(left)).ok()?;
            let mut datagram = [0; MAX_DATAGRAM];
            match socket.recv(&mut datagram) {
                Ok(len) => {
                    if let Ok(answer) = port_mapping::parse(&datagram[..len], wanted) {
                        return Some(answer);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => thread::sleep(left),
                Err(_) => break,
            }
        }
        wait *= 2;
    }
    None
}

/// Whether a router that holds a mapping has just said something: it says when it has forgotten all
/// of them.
fn is_router_new(news: Option<&UdpSocket>, held: &[KnownRouter]) -> bool {
    let mut datagram = [0; MAX_DATAGRAM];
    let Some(Ok((_, from))) = news.map(|news| news.recv_from(&mut datagram)) else { return false };
    held.iter().any(|one| one.router.ip() == from.ip())
}

/// Whether others reach this address: it is in none of the ranges that IANA has for other purposes.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            let is_shared = a == 100 && b & 0xc0 == 64;
            let is_special =
                v4.is_private() || v4.is_loopback() || v4.is_link_local() || v4.is_unspecified();
            !(is_shared
                || is_special
                || v4.is_multicast()
                || v4.is_broadcast()
                || a == 0
                || a >= 240)
        }
        IpAddr::V6(v6) => v6.segments()[0] & 0xe000 == 0x2000,
    }
}

/// The router of the default route with the lowest metric.
fn default_gateway_v4() -> Option<Ipv4Addr> {
    parse_routes_v4(&fs::read_to_string("/proc/self/net/route").ok()?)
}

/// Columns: interface, destination, gateway, flags, two counters, metric, mask; addresses in the
/// machine's byte order.
fn parse_routes_v4(table: &str) -> Option<Ipv4Addr> {
    const UP_AND_GATEWAY: u32 = 3;
    let route = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let hex = |at: usize| u32::from_str_radix(columns.get(at)?, 16).ok();
        let is_default = hex(1)? == 0 && hex(7)? == 0 && hex(3)? & UP_AND_GATEWAY == UP_AND_GATEWAY;
        let metric: u32 = columns.get(6)?.parse().ok()?;
        Some((metric, Ipv4Addr::from(hex(2)?.to_ne_bytes()))).filter(|_| is_default)
    };
    table
        .lines()
        .skip(1)
        .filter_map(route)
        .min_by_key(|(metric, _)| *metric)
        .map(|(_, gateway)| gateway)
}

/// The router of the IPv6 default route with the lowest metric.
fn default_gateway_v6(networks: &Networks) -> Option<SocketAddrV6> {
    let (gateway, name) = parse_routes_v6(&fs::read_to_string("/proc/self/net/ipv6_route").ok()?)?;
    let index =
        networks.current().interfaces().iter().find(|interface| interface.name == name)?.index;
    let scope = if gateway.is_unicast_link_local() { index } else { 0 };
    Some(SocketAddrV6::new(gateway, 0, 0, scope))
}

/// Columns: destination, its prefix, source, its prefix, next hop, metric, two counters, flags,
/// interface; all hexadecimal.
fn parse_routes_v6(table: &str) -> Option<(Ipv6Addr, String)> {
    let route = |line: &str| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let ip =
            |at: usize| u128::from_str_radix(columns.get(at)?, 16).ok().map(Ipv6Addr::from_bits);
        let gateway = ip(4)?;
        let is_default =
            ip(0)?.is_unspecified() && *columns.get(1)? == "00" && !gateway.is_unspecified();
        let metric = u32::from_str_radix(columns.get(5)?, 16).ok()?;
        Some((metric, gateway, (*columns.get(9)?).to_owned())).filter(|_| is_default)
    };
    let best = table.lines().filter_map(route).min_by_key(|(metric, ..)| *metric)?;
    Some((best.1, best.2))
}

/// This machine's IPv6 address towards the internet. Nothing is sent to find it out.
fn own_global_v6() -> Option<Ipv6Addr> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
    // Any global address: the kernel chooses a source for it.
    socket.connect((Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V6(v6) if is_public(v6.into()) => Some(v6),
        _ => None,
    }
}

/// A neighbour's hardware address, from the kernel's ARP table.
fn hardware_address(ip: Ipv4Addr) -> Option<String> {
    parse_arp(&fs::read_to_string("/proc/self/net/arp").ok()?, ip)
}

/// Columns: address, hardware type, flags, hardware address, mask, device.
fn parse_arp(table: &str, ip: Ipv4Addr) -> Option<String> {
    let of_ip =
        |line: &&str| line.split_whitespace().next().and_then(|word| word.parse().ok()) == Some(ip);
    let mac = table.lines().skip(1).find(of_ip)?.split_whitespace().nth(3)?;
    (mac != "00:00:00:00:00:00").then(|| mac.to_owned())
}

fn read_gateway(file: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(file)?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_routes_are_those_with_the_lowest_metric() {
        let gateway = u32::from_ne_bytes([192, 168, 1, 1]);
        let other = u32::from_ne_bytes([10, 0, 0, 1]);
        let network = u32::from_ne_bytes([192, 168, 1, 0]);
        let table = format!(
            "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n\
             wlan0 00000000 {other:08X} 0003 0 0 600 00000000 0 0 0\n\
             eth0 00000000 {gateway:08X} 0003 0 0 100 00000000 0 0 0\n\
             eth0 {network:08X} 00000000 0001 0 0 0 00FFFFFF 0 0 0\n"
        );
        assert_eq!(parse_routes_v4(&table), Some([192, 168, 1, 1].into()));
        assert_eq!(parse_routes_v4("Iface\n"), None);
        assert_eq!(parse_routes_v4("Iface\nnonsense\neth0 0 0 3\n"), None);

        let zeros = "0".repeat(32);
        let table = format!(
            "{zeros} 00 {zeros} 00 fe800000000000000000000000000001 00000064 1 0 00000003 eth0\n\
             {zeros} 00 {zeros} 00 {zeros} ffffffff 1 0 00200200 lo\n"
        );
        assert_eq!(parse_routes_v6(&table), Some(("fe80::1".parse().unwrap(), "eth0".into())));
        assert_eq!(parse_routes_v6("nonsense\n"), None);
    }

    #[test]
    fn hardware_addresses_are_those_of_neighbours_that_answered() {
        let table = "IP address HW type Flags HW address Mask Device\n\
                     192.168.1.1 0x1 0x2 02:00:00:00:00:01 * eth0\n\
                     192.168.1.9 0x1 0x0 00:00:00:00:00:00 * eth0\n";
        assert_eq!(parse_arp(table, [192, 168, 1, 1].into()).as_deref(), Some("02:00:00:00:00:01"));
        assert_eq!(parse_arp(table, [192, 168, 1, 9].into()), None);
        assert_eq!(parse_arp(table, [192, 168, 1, 10].into()), None);
    }

    #[test]
    fn addresses_that_nobody_reaches_are_not_public() {
        for ip in [
            "10.0.0.1",
            "192.168.1.1",
            "172.16.0.1",
            "100.64.0.1",
            "169.254.1.1",
            "0.0.0.0",
            "127.0.0.1",
            "240.0.0.1",
            "fe80::1",
            "fd00::1",
            "::",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in ["5.5.5.5", "100.128.0.1", "203.0.113.1", "2001:db8::1"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
    }
}
