//! `--map-port`: asks the router to forward a port to this machine by PCP (RFC 6887) or NAT-PMP
//! (RFC 6886), and to admit IPv6 connections by PCP.
//!
//! A thread requests a mapping for ten minutes and renews it after half of that, when the network
//! changes, and when the router announces a restart. It releases the mapping at the end. It uses
//! only the gateway at which the option was first used, so that it opens nothing in a café.

use crate::lock::Mutex;
use crate::network::Networks;
use crate::time_scale::{Interval, Timeout};
use crate::wire::port_mapping::{self, MappingGrant, MappingRequest, MappingResponse};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ring::rand::{SecureRandom, SystemRandom};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Requested lifetime of a mapping, in seconds. If this machine disappears, the mapping stays open
/// for at most this long.
const LIFETIME_SECONDS: u32 = 600;

/// Longest interval between renewals. Half of the granted lifetime applies if that is shorter.
const RENEWAL_INTERVAL: Interval = Interval::from_secs(300);

/// Shortest interval between renewals, whatever lifetime the router grants and however often it
/// seems to announce a restart. Only a change of the network renews sooner.
const MIN_RENEWAL_INTERVAL: Interval = Interval::from_secs(10);

/// Interval between attempts while the router grants nothing.
const RETRY_INTERVAL: Interval = Interval::from_secs(120);

/// Wait for the first answer. It doubles with each of the [`MAX_TRIES`], so a silent router costs
/// 3.75 s per exchange.
const FIRST_ANSWER_TIMEOUT: Timeout = Timeout::from_millis(250);
/// Largest number of requests in one exchange.
const MAX_TRIES: u32 = 4;

/// Longest wait for the router's answer when a mapping is released.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(300);

/// Interval at which a wait for the router checks for the end of the daemon.
const STOP_CHECK_INTERVAL: Duration = Duration::from_millis(100);

/// Interval at which the thread checks for a network change, news of the router, and the end of the
/// daemon.
const POLL_INTERVAL: Duration = Duration::from_secs(1);

/// UDP port at which routers announce that they lost their mappings (RFC 6886, section 3.2.1, and
/// RFC 6887, section 14.1).
const ANNOUNCEMENT_PORT: u16 = 5350;

/// Largest number of announcements that are read at once. Further ones are read at the next
/// renewal.
const MAX_ANNOUNCEMENTS: usize = 256;

/// Largest answer, in bytes (RFC 6887, section 7).
const MAX_DATAGRAM_BYTES: usize = 1100;

/// File in the state directory with the hardware address of the gateway at which ports may be
/// mapped.
const GATEWAY_FILE: &str = "gateway";

/// Current state of the mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mapping {
    /// Outside address from which the router forwards connections.
    pub outside: Option<SocketAddr>,
    /// IPv6 address for which the router admits connections.
    pub pinhole: Option<SocketAddr>,
    /// Message why the router forwards no IPv4 port; `None` if it does.
    pub problem: Option<String>,
}

/// Thread that maintains a mapping. Dropping it releases the mapping and waits for the thread. That
/// takes up to 300 ms per mapping, and 100 ms more while a renewal waits for a silent router.
pub struct PortMapper {
    current: Arc<Mutex<Mapping>>,
    running: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl PortMapper {
    /// Starts to map `port` of this machine. The first gateway is stored in `state_dir`; without
    /// one, nothing is mapped.
    ///
    /// # Errors
    /// The system cannot create a thread, or has no random numbers.
    pub fn start(
        port: u16,
        state_dir: Option<PathBuf>,
        networks: Arc<Networks>,
    ) -> io::Result<PortMapper> {
        let current = Arc::new(Mutex::new(Mapping::default()));
        let (running, stopped) = bounded(0);
        let mut nonce = [0; 12];
        SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("no random numbers"))?;
        let mapping_thread = MappingThread {
            port,
            nonce,
            state_dir,
            networks,
            current: current.clone(),
            stopped,
            last_problem: None,
        };
        let thread = thread::Builder::new()
            .name("port-mapper".into())
            .spawn(move || mapping_thread.run())?;
        Ok(PortMapper { current, running: Some(running), thread: Some(thread) })
    }

    /// The current state, shared with the thread that updates it.
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
    /// The last problem that was logged.
    last_problem: Option<String>,
}

/// A mapping that a router granted, and how it was requested.
struct KnownRouter {
    router: SocketAddr,
    client: IpAddr,
    is_pcp: bool,
    mapped: MappingGrant,
}

impl MappingThread {
    fn run(mut self) {
        let announcements = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, ANNOUNCEMENT_PORT)).ok();
        let announcements =
            announcements.filter(|announcements| announcements.set_nonblocking(true).is_ok());
        let mut mappings: Vec<KnownRouter> = Vec::new();
        loop {
            let seen = self.networks.current();
            let pause = self.renew(&mut mappings);
            let schedule = RenewalSchedule::new(pause, Instant::now());
            loop {
                let left = schedule.deadline.saturating_duration_since(Instant::now());
                if wait_for_stop(&self.stopped, left.min(POLL_INTERVAL)) {
                    return self.give_up(&mappings);
                }
                let has_restarted = || has_router_restarted(announcements.as_ref(), &mappings);
                if !Arc::ptr_eq(&seen, &self.networks.current())
                    || schedule.is_due(Instant::now(), has_restarted)
                {
                    break;
                }
            }
        }
    }

    /// Requests all mappings again and returns the time until the next renewal. Returns soon if the
    /// thread has to end; `mappings` then has what is to be released.
    fn renew(&mut self, mappings: &mut Vec<KnownRouter>) -> Duration {
        let before = std::mem::take(mappings);
        let mut mapping = Mapping::default();
        match self.map_v4(&before) {
            Ok((outside, one)) => {
                mapping.outside = Some(outside);
                mappings.push(one);
            }
            Err(why) => mapping.problem = Some(why),
        }
        if let Some(one) = self.pinhole(&before) {
            let ip = one.client;
            mapping.pinhole = Some(SocketAddr::new(ip, one.mapped.external_port));
            mappings.push(one);
        }
        if wait_for_stop(&self.stopped, Duration::ZERO) {
            let is_new = |one: &KnownRouter| mappings.iter().all(|new| new.router != one.router);
            let others: Vec<_> = before.into_iter().filter(is_new).collect();
            mappings.extend(others);
            return Duration::ZERO;
        }
        self.publish(mapping);
        let shortest = mappings.iter().map(|one| one.mapped.lifetime / 2).min();
        let half = shortest.map(|seconds| Duration::from_secs(seconds.into()));
        half.map_or(RETRY_INTERVAL.get(), |half| {
            RENEWAL_INTERVAL.get().min(half).max(MIN_RENEWAL_INTERVAL.get())
        })
    }

    fn publish(&mut self, mapping: Mapping) {
        let before = std::mem::replace(&mut *self.current.lock(), mapping.clone());
        if before.outside != mapping.outside || before.pinhole != mapping.pinhole {
            mapping
                .outside
                .iter()
                .for_each(|at| log::info!("port mapping: reached from outside at {at}"));
            mapping
                .pinhole
                .iter()
                .for_each(|at| log::info!("port mapping: reached by IPv6 at {at}"));
        }
        // Each problem is logged once, and none while the router admits IPv6 connections.
        let problem = mapping.problem.filter(|_| mapping.pinhole.is_none());
        if problem != self.last_problem {
            problem.iter().for_each(|problem| log::warn!("port mapping: {problem}"));
            self.last_problem = problem;
        }
    }

    fn map_v4(&self, before: &[KnownRouter]) -> Result<(SocketAddr, KnownRouter), String> {
        let gateway = default_gateway_v4().ok_or("there is no router on this network")?;
        let router = SocketAddr::from((gateway, port_mapping::PORT));
        let socket =
            UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).map_err(|e| format!("socket: {e}"))?;
        socket.connect(router).map_err(|e| format!("router {gateway}: {e}"))?;
        let client = socket.local_addr().map_err(|e| format!("socket: {e}"))?.ip();
        // Nothing may be requested before the router is identified. The datagram only makes the
        // kernel resolve the router's hardware address by ARP; its answer is ignored.
        let address_request = port_mapping::nat_pmp_address_request();
        let _ = self.exchange(&socket, &address_request, &self.request(client, 0), 1);
        self.check_gateway(gateway)?;
        let last = before
            .iter()
            .find(|one| one.router == router)
            .map_or(0, |one| one.mapped.external_port);
        let request = self.request(client, last);
        let (answer, is_pcp) =
            match self.exchange(&socket, &port_mapping::pcp_request(&request), &request, MAX_TRIES)
            {
                Some(MappingResponse::UnknownVersion) | None => {
                    let payload = port_mapping::nat_pmp_request(&request);
                    (self.exchange(&socket, &payload, &request, MAX_TRIES), false)
                }
                answer => (answer, true),
            };
        let mapped = match answer {
            Some(MappingResponse::Mapped(mapped)) => mapped,
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
            None => match self.exchange(&socket, &address_request, &request, MAX_TRIES) {
                Some(MappingResponse::Address(ip)) => ip.into(),
                _ => return Err(format!("router {gateway} does not say its address outside")),
            },
        };
        let router_mapping = KnownRouter { router, client, is_pcp, mapped };
        if !is_public(ip) {
            self.release(&router_mapping);
            return Err(format!(
                "the address outside of router {gateway} is {ip}, which is private: there is another router"
            ));
        }
        Ok((SocketAddr::new(ip, mapped.external_port), router_mapping))
    }

    /// Asks the router to admit connections to this machine's global IPv6 address, if there is one.
    fn pinhole(&self, before: &[KnownRouter]) -> Option<KnownRouter> {
        let router = default_gateway_v6(&self.networks)?;
        // The router must be the permitted one before anything is requested by IPv6.
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
        let request = self.request(client.into(), last);
        match self.exchange(&socket, &port_mapping::pcp_request(&request), &request, MAX_TRIES) {
            Some(MappingResponse::Mapped(mapped)) => {
                Some(KnownRouter { router: to, client: client.into(), is_pcp: true, mapped })
            }
            answer => {
                log::debug!("port mapping: no pinhole: {answer:?}");
                None
            }
        }
    }

    /// Accepts the gateway at which the option was first used, and no other. Stores the first one.
    ///
    /// # Errors
    /// A message for the user: another gateway, no ARP entry, no state directory, or a file error.
    fn check_gateway(&self, gateway: Ipv4Addr) -> Result<(), String> {
        let mac =
            hardware_address(gateway).ok_or_else(|| format!("router {gateway} does not answer"))?;
        let Some(dir) = &self.state_dir else { return Err("--map-port needs --state-dir".into()) };
        let file = dir.join(GATEWAY_FILE);
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

    /// Calls [`exchange`] until the thread has to end.
    fn exchange(
        &self,
        socket: &UdpSocket,
        payload: &[u8],
        request: &MappingRequest,
        tries: u32,
    ) -> Option<MappingResponse> {
        exchange(socket, payload, request, tries, &self.stopped)
    }

    fn request(&self, client: IpAddr, external_port: u16) -> MappingRequest {
        MappingRequest {
            client,
            nonce: self.nonce,
            internal_port: self.port,
            external_port,
            lifetime: LIFETIME_SECONDS,
        }
    }

    fn give_up(&self, mappings: &[KnownRouter]) {
        mappings.iter().for_each(|one| self.release(one));
        *self.current.lock() = Mapping::default();
    }

    fn release(&self, router_mapping: &KnownRouter) {
        let request = MappingRequest { lifetime: 0, ..self.request(router_mapping.client, 0) };
        let payload = if router_mapping.is_pcp {
            port_mapping::pcp_request(&request)
        } else {
            port_mapping::nat_pmp_request(&request)
        };
        let Ok(socket) = UdpSocket::bind((router_mapping.client, 0)) else { return };
        if socket.connect(router_mapping.router).is_ok() && socket.send(&payload).is_ok() {
            let _ = socket.set_read_timeout(Some(RELEASE_TIMEOUT));
            let _ = socket.recv(&mut [0; MAX_DATAGRAM_BYTES]);
        }
    }
}

/// Times of the next renewal.
struct RenewalSchedule {
    /// Soonest time, which applies to announcements of a router.
    earliest: Instant,
    deadline: Instant,
}

impl RenewalSchedule {
    /// Creates the schedule of a renewal that is due in `pause`.
    fn new(pause: Duration, now: Instant) -> Self {
        RenewalSchedule { earliest: now + MIN_RENEWAL_INTERVAL.get(), deadline: now + pause }
    }

    /// Returns true if mappings are to be requested at `now`. `has_restarted` tells whether a
    /// router has announced a restart; it is called only when that may matter.
    fn is_due(&self, now: Instant, has_restarted: impl FnOnce() -> bool) -> bool {
        now >= self.deadline || now >= self.earliest && has_restarted()
    }
}

/// Waits for `time`. Returns true at once if the thread has to end.
fn wait_for_stop(stopped: &Receiver<()>, time: Duration) -> bool {
    stopped.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
}

/// Sends a request up to `tries` times until a valid answer arrives. The socket is connected, so
/// only the router's datagrams are received. Blocks for up to 3.75 s with four tries, and at most
/// [`STOP_CHECK_INTERVAL`] after `stopped` is disconnected.
fn exchange(
    socket: &UdpSocket,
    payload: &[u8],
    request: &MappingRequest,
    tries: u32,
    stopped: &Receiver<()>,
) -> Option<MappingResponse> {
    let mut wait = FIRST_ANSWER_TIMEOUT.get();
    for _ in 0..tries {
        // Sending fails if an ICMP error for an earlier datagram is pending; the next try repeats
        // it.
        let _ = socket.send(payload);
        let deadline = Instant::now() + wait;
        while let Some(left) =
            deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
        {
            if wait_for_stop(stopped, Duration::ZERO) {
                return None;
            }
            socket.set_read_timeout(Some(left.min(STOP_CHECK_INTERVAL))).ok()?;
            let mut datagram = [0; MAX_DATAGRAM_BYTES];
            match socket.recv(&mut datagram) {
                Ok(len) => {
                    if let Ok(answer) = port_mapping::parse(&datagram[..len], request) {
                        return Some(answer);
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                    wait_for_stop(stopped, left);
                }
                Err(e)
                    if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {}
                Err(_) => break,
            }
        }
        wait *= 2;
    }
    None
}

/// Returns true if a router that holds a mapping has sent an announcement, which means that it lost
/// all mappings. Reads all announcements that have arrived. Does not block.
fn has_router_restarted(announcements: Option<&UdpSocket>, mappings: &[KnownRouter]) -> bool {
    let mut datagram = [0; MAX_DATAGRAM_BYTES];
    let receive = || Some(announcements?.recv_from(&mut datagram).ok()?.1.ip());
    let senders = std::iter::from_fn(receive).take(MAX_ANNOUNCEMENTS);
    senders.filter(|ip| mappings.iter().any(|one| one.router.ip() == *ip)).count() > 0
}

/// Returns true if the address is public: it is not private, shared (100.64.0.0/10), link-local,
/// loopback, multicast or reserved.
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

/// Gateway of the IPv4 default route with the lowest metric.
fn default_gateway_v4() -> Option<Ipv4Addr> {
    parse_routes_v4(&fs::read_to_string("/proc/self/net/route").ok()?)
}

/// Parses `/proc/net/route`. Columns: interface, destination, gateway, flags, two counters, metric,
/// mask. Addresses are in the machine's byte order.
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

/// Gateway of the IPv6 default route with the lowest metric.
fn default_gateway_v6(networks: &Networks) -> Option<SocketAddrV6> {
    let (gateway, name) = parse_routes_v6(&fs::read_to_string("/proc/self/net/ipv6_route").ok()?)?;
    let index =
        networks.current().interfaces().iter().find(|interface| interface.name == name)?.index;
    let scope = if gateway.is_unicast_link_local() { index } else { 0 };
    Some(SocketAddrV6::new(gateway, 0, 0, scope))
}

/// Parses `/proc/net/ipv6_route`. Columns: destination, its prefix length, source, its prefix
/// length, next hop, metric, two counters, flags, interface. All numbers are hexadecimal.
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

/// IPv6 address that this machine uses towards the internet. Sends nothing.
fn own_global_v6() -> Option<Ipv6Addr> {
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
    // Any global address: `connect` makes the kernel choose a source address.
    socket.connect((Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1), 9)).ok()?;
    match socket.local_addr().ok()?.ip() {
        IpAddr::V6(v6) if is_public(v6.into()) => Some(v6),
        _ => None,
    }
}

/// Hardware address of a neighbour, from the kernel's ARP table.
fn hardware_address(ip: Ipv4Addr) -> Option<String> {
    parse_arp(&fs::read_to_string("/proc/self/net/arp").ok()?, ip)
}

/// Parses `/proc/net/arp`. Columns: address, hardware type, flags, hardware address, mask, device.
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
    fn default_route_with_lowest_metric_is_chosen() {
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
    fn hardware_address_of_silent_neighbour_is_none() {
        let table = "IP address HW type Flags HW address Mask Device\n\
                     192.168.1.1 0x1 0x2 02:00:00:00:00:01 * eth0\n\
                     192.168.1.9 0x1 0x0 00:00:00:00:00:00 * eth0\n";
        assert_eq!(parse_arp(table, [192, 168, 1, 1].into()).as_deref(), Some("02:00:00:00:00:01"));
        assert_eq!(parse_arp(table, [192, 168, 1, 9].into()), None);
        assert_eq!(parse_arp(table, [192, 168, 1, 10].into()), None);
    }

    #[test]
    fn special_purpose_address_is_not_public() {
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

    fn request() -> MappingRequest {
        let client = IpAddr::from([127, 0, 0, 1]);
        MappingRequest { client, nonce: [0; 12], internal_port: 1, external_port: 0, lifetime: 600 }
    }

    /// Guards against a daemon that takes seconds to end because its router is silent.
    #[test]
    fn stop_ends_exchange_with_silent_router() {
        let router = UdpSocket::bind("127.0.0.1:0").unwrap();
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        socket.connect(router.local_addr().unwrap()).unwrap();
        let (running, stopped) = bounded(0);
        let (done, ended) = bounded(1);
        // So many tries take 17 minutes.
        thread::spawn(move || done.send(exchange(&socket, b"request", &request(), 12, &stopped)));
        router.recv(&mut [0; 16]).unwrap();
        drop(running);
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(None));
    }

    /// Guards against a host that makes this one ask the router without a pause, by datagrams that
    /// bear the router's address.
    #[test]
    fn announcements_of_router_renew_once_in_least_interval() {
        let now = Instant::now();
        let schedule = RenewalSchedule::new(RENEWAL_INTERVAL.get(), now);
        let earliest = now + MIN_RENEWAL_INTERVAL.get();
        assert!(!schedule.is_due(earliest - Duration::from_millis(1), || true));
        assert!(schedule.is_due(earliest, || true) && !schedule.is_due(earliest, || false));
        assert!(schedule.is_due(now + RENEWAL_INTERVAL.get(), || false));

        let announcements = UdpSocket::bind("127.0.0.1:0").unwrap();
        let router = UdpSocket::bind("127.0.0.1:0").unwrap();
        router.connect(announcements.local_addr().unwrap()).unwrap();
        (0..9).for_each(|_| assert_eq!(router.send(b"news").unwrap(), 4));
        announcements.set_nonblocking(true).unwrap();
        let mapped = MappingGrant { external_ip: None, external_port: 1, lifetime: 600, epoch: 0 };
        let (router, client) = (router.local_addr().unwrap(), request().client);
        let mappings = [KnownRouter { router, client, is_pcp: true, mapped }];
        assert!(
            has_router_restarted(Some(&announcements), &mappings)
                && !has_router_restarted(Some(&announcements), &mappings)
        );
    }
}
