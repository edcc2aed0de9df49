//! The UDP sockets of discovery: which of them reaches a target, and how datagrams are sent.
//! Datagrams to hosts that may not answer leave from extra sockets, so that they cannot fill the
//! send buffer for peers that do answer.

use super::outgoing::{DatagramTarget, OutgoingDatagrams};
use crate::network::{InterfaceAddress, LanNetworks, MULTICAST_GROUP, NetworkWatcher, Networks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Size of the send and the receive buffer requested from the kernel, in bytes. The kernel caps it
/// at `wmem_max` or `rmem_max` and doubles it (socket(7)).
const RECEIVE_BUFFER_BYTES: usize = 1 << 20;

/// Maximum time that one turn of the loop waits for room in the send buffer, in all. At 1 Mbit/s a
/// buffer of 416 KiB empties in 3.4 s. At the bound datagrams are dropped; discovery repeats
/// queries.
const SEND_TIMEOUT: Duration = Duration::from_millis(20);

/// Pause before discovery retries an interface on which it could not join the multicast group.
const JOIN_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// Maximum number of datagrams sent before the sockets are read again.
pub(super) const MAX_SENDS_PER_TURN: usize = 32;

/// The sockets of discovery, and what is known of the networks that they reach.
pub(super) struct DiscoverySockets {
    /// The first sockets of all `bound` addresses, in their order, and then the others.
    sockets: Vec<UdpSocket>,
    bound: Vec<BoundAddress>,
    port: u16,
    networks: Arc<Networks>,
    watcher: NetworkWatcher,
    /// When a failed join of the multicast group is retried.
    next_join: Option<Instant>,
    has_send_failure: bool,
    /// Whether this node uses the LAN. If not, it joins no group and has no extra sockets.
    has_lan: bool,
    /// Remainder of [`SEND_TIMEOUT`] in this turn.
    send_time_left: Duration,
    /// Number of datagrams that found the send buffer full. The caller resets it.
    pub(super) dropped_datagrams: u64,
}

/// Address to which sockets are bound.
#[derive(Debug, Clone, Copy)]
struct BoundAddress {
    /// Address of the first socket.
    address: SocketAddr,
    /// Indexes of its three sockets. The second and the third have other ports, for
    /// [`DatagramTarget::Behind`] and [`DatagramTarget::Unproven`]. Datagrams that wait for ARP
    /// fill the send buffer of one of these, and not that of the first socket.
    sockets: [usize; 3],
    /// Whether it is an IPv6 socket that also carries IPv4, as systemd makes them by default.
    is_dual_stack: bool,
}

impl DiscoverySockets {
    /// Prepares `sockets`, which are bound, opens the extra ones, and joins the multicast group. The
    /// datagrams of an extra socket that cannot be opened leave from the first one.
    ///
    /// # Errors
    /// An option of one of `sockets` cannot be read or set.
    pub(super) fn new(
        mut sockets: Vec<UdpSocket>,
        port: u16,
        networks: Arc<Networks>,
        has_lan: bool,
    ) -> io::Result<Self> {
        let mut bound = Vec::new();
        for (at, socket) in sockets.iter().enumerate() {
            let address = socket.local_addr()?;
            let is_dual_stack = address.is_ipv6()
                && address.ip().is_unspecified()
                && !socket2::SockRef::from(socket).only_v6()?;
            bound.push(BoundAddress { address, sockets: [at; 3], is_dual_stack });
            set_options(socket)?;
        }
        for bound in bound.iter_mut().filter(|_| has_lan) {
            for rank in 1..3 {
                match bind_extra(*bound) {
                    Ok(socket) => {
                        bound.sockets[rank] = sockets.len();
                        sockets.push(socket);
                    }
                    Err(e) => log::debug!("another socket on {}: {e}", bound.address),
                }
            }
        }
        let mut sockets = DiscoverySockets {
            sockets,
            bound,
            port,
            watcher: NetworkWatcher::new(networks.clone(), Instant::now()),
            networks,
            next_join: None,
            has_send_failure: false,
            has_lan,
            send_time_left: SEND_TIMEOUT,
            dropped_datagrams: 0,
        };
        sockets.join(Instant::now());
        Ok(sockets)
    }

    /// Number of sockets: [`DiscoverySockets::receive`] takes an index below it.
    pub(super) fn len(&self) -> usize {
        self.sockets.len()
    }

    /// Receives a datagram from the socket with index `at`. Returns its length and source address;
    /// an IPv4-mapped IPv6 address is returned as IPv4. Does not block.
    pub(super) fn receive(&self, at: usize, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (len, mut from) = self.sockets[at].recv_from(buffer)?;
        if let IpAddr::V4(v4) = from.ip().to_canonical() {
            from = SocketAddr::from((v4, from.port()));
        }
        Ok((len, from))
    }

    /// Blocks until a datagram can be read, one of `wakers` is readable, the kernel reports a
    /// change of network, or `wait` is over. Resets `wakers`. Returns the indexes of the sockets
    /// that have datagrams, for [`DiscoverySockets::receive`].
    pub(super) fn wait(&mut self, wakers: &[&OwnedFd], wait: Duration) -> Vec<usize> {
        self.send_time_left = SEND_TIMEOUT;
        let mut fds: Vec<PollFd<'_>> =
            self.sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        fds.extend(wakers.iter().map(|waker| PollFd::new(*waker, PollFlags::IN)));
        let network_events = self.watcher.as_fd();
        fds.extend(network_events.as_ref().map(|events| PollFd::new(events, PollFlags::IN)));
        if let Err(e) = poll(&mut fds, Timespec::try_from(wait).ok().as_ref())
            && e != rustix::io::Errno::INTR
        {
            log::error!("poll: {e}");
            thread::sleep(Duration::from_millis(100));
        }
        let sockets = fds.iter().take(self.sockets.len()).enumerate();
        let ready = sockets.filter(|(_, fd)| !fd.revents().is_empty()).map(|(at, _)| at).collect();
        for waker in wakers {
            let _ = rustix::io::read(waker, &mut [0u8; 8]);
        }
        ready
    }

    /// When [`DiscoverySockets::update_networks`] must be called even if the kernel reports no
    /// change.
    pub(super) fn next_due(&self) -> Option<Instant> {
        [self.watcher.next_due(), self.next_join].into_iter().flatten().min()
    }

    /// Reads the addresses of this machine again if there is a reason to, and joins the multicast
    /// group on new interfaces. Returns whether the interfaces in use or their addresses changed.
    pub(super) fn update_networks(&mut self) -> bool {
        let now = Instant::now();
        let changed = self.watcher.update(std::mem::take(&mut self.has_send_failure), now);
        if changed || self.next_join.is_some_and(|at| at <= now) {
            self.join(now);
        }
        changed
    }

    /// Joins the multicast group on all interfaces in use.
    fn join(&mut self, now: Instant) {
        self.next_join = None;
        for bound in self.bound.iter().filter(|_| self.has_lan) {
            let SocketAddr::V6(address) = bound.address else { continue };
            let socket = &self.sockets[bound.sockets[0]];
            let _ = socket.set_multicast_loop_v6(false);
            for index in self.networks.current().multicast_interfaces() {
                // `AddrInUse`: the socket is a member already.
                if hears_group(address, index)
                    && let Err(e) = socket.join_multicast_v6(&MULTICAST_GROUP, index)
                    && e.kind() != io::ErrorKind::AddrInUse
                {
                    log::debug!("multicast on interface {index}: {e}");
                    self.next_join = Some(now + JOIN_RETRY_INTERVAL);
                }
            }
        }
    }

    /// Sends up to [`MAX_SENDS_PER_TURN`] datagrams of `out`, those for the first socket before the
    /// others. Returns whether any are left. While send buffers are full, blocks for
    /// [`SEND_TIMEOUT`] per turn at most.
    pub(super) fn send(&mut self, out: &mut OutgoingDatagrams) -> bool {
        out.sort_by_key(|(to, _)| to.socket());
        for (to, packet) in out.drain(..out.len().min(MAX_SENDS_PER_TURN)) {
            let bytes = packet.encode();
            match to {
                DatagramTarget::Peer(peer)
                | DatagramTarget::Behind(peer)
                | DatagramTarget::Unproven(peer) => self.send_to(&bytes, peer, to.socket()),
                DatagramTarget::Everyone => {
                    for target in self.networks.current().broadcast_targets(self.port) {
                        self.send_to(&bytes, target, to.socket());
                    }
                }
            }
        }
        !out.is_empty()
    }

    /// Sends a datagram. `from` is 0 for the first socket, 1 and 2 for the extra ones. Waits for
    /// room only in the send buffer of the first one.
    fn send_to(&mut self, bytes: &[u8], target: SocketAddr, from: usize) {
        let bound = socket_for(target, &self.bound, &self.networks.current());
        let Some(bound) = bound else { return };
        let mapped = match target {
            SocketAddr::V4(v4) if bound.is_dual_stack => {
                (v4.ip().to_ipv6_mapped(), v4.port()).into()
            }
            _ => target,
        };
        let socket = &self.sockets[bound.sockets[from]];
        let mut sent = socket.send_to(bytes, mapped);
        while is_full(&sent) && from == 0 && !self.send_time_left.is_zero() {
            let began = Instant::now();
            let timeout = Timespec::try_from(self.send_time_left).ok();
            let _ = poll(&mut [PollFd::new(socket, PollFlags::OUT)], timeout.as_ref());
            self.send_time_left = self.send_time_left.saturating_sub(began.elapsed());
            sent = socket.send_to(bytes, mapped);
        }
        self.dropped_datagrams += u64::from(is_full(&sent));
        if let Err(e) = sent {
            // Not an error: discovery repeats lost queries.
            log::debug!("datagram to {target}: {e}");
            self.has_send_failure |= e.kind() != io::ErrorKind::WouldBlock;
        }
    }
}

fn is_full(sent: &io::Result<usize>) -> bool {
    sent.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::WouldBlock)
}

fn set_options(socket: &UdpSocket) -> io::Result<()> {
    socket.set_nonblocking(true)?;
    socket.set_broadcast(true)?;
    let socket = socket2::SockRef::from(socket);
    socket.set_recv_buffer_size(RECEIVE_BUFFER_BYTES)?;
    socket.set_send_buffer_size(RECEIVE_BUFFER_BYTES)
}

/// Binds another socket to the same address, with a port that the kernel chooses.
fn bind_extra(bound: BoundAddress) -> io::Result<UdpSocket> {
    let domain = socket2::Domain::for_address(bound.address);
    let socket = socket2::Socket::new(domain, socket2::Type::DGRAM, Some(socket2::Protocol::UDP))?;
    if bound.address.is_ipv6() {
        socket.set_only_v6(!bound.is_dual_stack)?;
    }
    let mut address = bound.address;
    address.set_port(0);
    socket.bind(&address.into())?;
    let socket = UdpSocket::from(socket);
    set_options(&socket)?;
    Ok(socket)
}

/// Whether a socket bound to `bound` receives datagrams to the multicast group on interface
/// `index`: it is bound to all addresses, or to the group on that interface.
fn hears_group(bound: SocketAddrV6, index: u32) -> bool {
    bound.ip().is_unspecified() || *bound.ip() == MULTICAST_GROUP && bound.scope_id() == index
}

/// Returns the address whose sockets reach `target`: one bound to all addresses, or to an address
/// in the target's network. A unicast target on no connected network, which `--peer` names, is
/// reached through any socket bound to an address of this machine.
fn socket_for(
    target: SocketAddr,
    bound: &[BoundAddress],
    networks: &LanNetworks,
) -> Option<BoundAddress> {
    let interfaces = networks.interfaces();
    let on_interface = match target {
        SocketAddr::V6(v6) if v6.ip().is_multicast() || v6.ip().is_unicast_link_local() => {
            Some(v6.scope_id())
        }
        _ => None,
    };
    let is_broadcast = |ip| interfaces.iter().any(|i| i.broadcast.map(IpAddr::V4) == Some(ip));
    let reaches = |i: &InterfaceAddress| {
        on_interface.map_or_else(|| i.reaches(target.ip()), |index| i.index == index)
    };
    let near = |ip: IpAddr| {
        ip.is_unspecified() || interfaces.iter().any(|i| i.address == ip && reaches(i))
    };
    let far = |ip: IpAddr| !ip.is_loopback() && !ip.is_multicast() && !is_broadcast(ip);
    let to_one = !target.ip().is_multicast() && !is_broadcast(target.ip());
    let mut same_family = bound
        .iter()
        .filter(|bound| bound.is_dual_stack || bound.address.is_ipv4() == target.is_ipv4());
    let found = same_family.clone().find(|bound| near(bound.address.ip()));
    found.or_else(|| same_family.find(|bound| to_one && far(bound.address.ip()))).copied()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkPolicy;

    fn interface(index: u32, address: &str, prefix_len: u8) -> InterfaceAddress {
        let address: IpAddr = address.parse().unwrap();
        let broadcast = match address {
            IpAddr::V4(v4) => Some((v4.to_bits() | 0xff).into()),
            IpAddr::V6(_) => None,
        };
        InterfaceAddress {
            name: format!("eth{index}"),
            index,
            address,
            prefix_len,
            broadcast,
            running: true,
        }
    }

    #[test]
    fn socket_for_target_is_one_bound_in_its_network() {
        let interfaces = vec![
            interface(1, "10.0.0.1", 24),
            interface(2, "10.0.1.1", 24),
            interface(1, "fd00::1", 64),
            interface(2, "fd00:1::1", 64),
            interface(1, "fe80::1", 64),
            interface(2, "fe80::2", 64),
        ];
        let networks = LanNetworks::new(NetworkPolicy::default(), interfaces);
        let through = |bound: &[&str], target: &str| {
            let bind = |ip: &&str| BoundAddress {
                address: SocketAddr::new(ip.parse().unwrap(), 12304),
                is_dual_stack: *ip == "::",
                sockets: [0; 3],
            };
            let bound: Vec<BoundAddress> = bound.iter().map(bind).collect();
            socket_for(target.parse().unwrap(), &bound, &networks)
                .map(|bound| bound.address.ip().to_string())
        };
        // In the order of `sockets::open`: the broadcast addresses come last.
        let both = ["127.0.0.1", "10.0.0.1", "10.0.1.1", "10.0.0.255", "10.0.1.255"];
        assert_eq!(through(&both, "10.0.1.7:1").as_deref(), Some("10.0.1.1"));
        assert_eq!(through(&both, "10.0.1.255:1").as_deref(), Some("10.0.1.1"));
        assert_eq!(
            through(&both, "172.16.0.1:1").as_deref(),
            Some("10.0.0.1"),
            "a named peer far away"
        );
        assert_eq!(
            through(&["10.0.0.255", "10.0.0.1"], "172.16.0.1:1").as_deref(),
            Some("10.0.0.1")
        );
        assert_eq!(
            through(&["10.0.0.1"], "10.0.1.255:1"),
            None,
            "no broadcast where it is not bound"
        );
        assert_eq!(through(&["127.0.0.1"], "172.16.0.1:1"), None);
        assert_eq!(through(&["10.0.0.1"], "[fd00:2::1]:1"), None);
        assert_eq!(through(&["::"], "10.0.1.255:1").as_deref(), Some("::"));
        assert_eq!(through(&["0.0.0.0"], "10.0.1.255:1").as_deref(), Some("0.0.0.0"));
        let group = ["ff02::7065:6572", "fd00::1"];
        assert_eq!(through(&group, "[fd00:2::1]:1").as_deref(), Some("fd00::1"));
        assert_eq!(through(&group, "[ff02::7065:6572%1]:1").as_deref(), Some("fd00::1"));
        assert_eq!(through(&group, "[ff02::7065:6572%2]:1"), None);
        let link_local = ["fe80::1", "fe80::2"];
        assert_eq!(through(&link_local, "[fe80::9%1]:1").as_deref(), Some("fe80::1"));
        assert_eq!(through(&link_local, "[fe80::9%2]:1").as_deref(), Some("fe80::2"));
        for (bound, index, hears) in [
            ("[::]:1", 3, true),
            ("[fd00::1]:1", 1, false),
            ("[ff02::7065:6572%1]:1", 1, true),
            ("[ff02::7065:6572%1]:1", 2, false),
        ] {
            assert_eq!(hears_group(bound.parse().unwrap(), index), hears, "{bound}");
        }
    }

    #[test]
    fn dual_stack_socket_sends_and_receives_ipv4() {
        let socket =
            socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.bind(&SocketAddr::from(([0u16; 8], 0)).into()).unwrap();
        let socket = UdpSocket::from(socket);
        let here = SocketAddr::from(([127, 0, 0, 1], socket.local_addr().unwrap().port()));
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let mut sockets = DiscoverySockets::new(vec![socket], here.port(), networks, true).unwrap();
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        sockets.send_to(b"to", other.local_addr().unwrap(), 0);
        let mut buffer = [0; 8];
        assert_eq!(other.recv_from(&mut buffer).unwrap(), (2, here));
        other.send_to(b"back", here).unwrap();
        // On loopback a datagram can be received as soon as it is sent.
        assert_eq!(sockets.receive(0, &mut buffer).unwrap(), (4, other.local_addr().unwrap()));
    }
}
