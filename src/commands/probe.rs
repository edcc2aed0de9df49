//! Queries peers by UDP and HTTP from sockets of the command's own, so that the result can be
//! compared with the daemon's status.

use super::{HTTP_TIMEOUT, RunningDaemon, get, list, text};
use crate::config::Config;
use crate::lan::Holder;
use crate::network::LanNetworks;
use crate::nix::{HashPart, NarInfo};
use crate::peers::client::{PeerClient, PeerError, PeerNarinfo};
use crate::time_scale::Timeout;
use crate::wire::Packet;
use crate::wire::tracker::{can_be_peer, lookup_target};
use serde_json::Value;
use socket2::{Domain, Protocol, Socket, Type};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs, UdpSocket};
use std::panic::resume_unwind;
use std::thread::ScopedJoinHandle;
use std::time::{Duration, Instant};

/// Minimum number of transmissions of a query, because datagrams may get lost. Without broadcast,
/// fewer if all nodes have answered.
const MIN_TRANSMISSIONS: u32 = 3;
/// Time after each transmission in which answers are read. Answers to earlier ones count too.
const ANSWER_WAIT: Duration = Duration::from_millis(200);
/// Time after the first transmission in which the query is repeated for a node that the daemon
/// considers live. The daemon also waits for up to 3 s before it considers a node silent.
const LIVE_WAIT: Timeout = Timeout::from_secs(3);

/// Maximum number of nodes whose answers are read; the rest is ignored. A daemon remembers as many
/// peers.
const MAX_HEARD: usize = 1024;

/// Maximum number of nodes on other networks that are asked; the rest is ignored. A tracker names
/// at most 64 candidates and 8 others for a lookup.
const MAX_WAN_NODES: usize = 72;

/// Answer of a node to a query.
pub struct ProbeReply {
    /// Address that the answer came from.
    pub from: SocketAddr,
    /// Where the node offers the path. `None` for a *have not*.
    pub holder: Option<Holder>,
    /// Time from the query to the answer.
    pub elapsed: Duration,
}

/// Queries the addresses in `named`, and if `everyone` is set also all nodes on the LAN by
/// broadcast to `port`. Returns the first answer of each node, at most [`MAX_HEARD`], without this
/// machine's own. Blocks for [`MIN_TRANSMISSIONS`] times [`ANSWER_WAIT`], and for up to
/// [`LIVE_WAIT`] plus [`ANSWER_WAIT`] while a node in `named` that the daemon considers live has
/// not answered. Without `everyone`, ends once all in `named` have answered.
///
/// # Errors
/// No UDP socket can be opened or configured.
pub fn ask(
    node: &RunningDaemon,
    networks: &LanNetworks,
    hash_part: &HashPart,
    port: u16,
    named: &[SocketAddr],
    everyone: bool,
) -> io::Result<Vec<ProbeReply>> {
    let mut targets = named.to_vec();
    if everyone {
        targets.extend(networks.broadcast_targets(port));
    }
    targets.sort_unstable();
    targets.dedup();
    let mut live = addresses(&node.status, |peer| peer["state"] == "live");
    live.retain(|address| named.contains(address));
    let (socket, is_v6) = open()?;
    let mut query = RunningQuery {
        socket,
        is_v6,
        hash_part,
        networks,
        targets: &targets,
        everyone,
        first_id: RandomState::new().build_hasher().finish() as u32,
        sent: Vec::new(),
        heard: Vec::new(),
    };
    while query.sent.len() < MIN_TRANSMISSIONS as usize
        || (!query.have_answered(&live) && query.sent[0].elapsed() < LIVE_WAIT.get())
    {
        let began = query.send();
        while let Some(left) =
            ANSWER_WAIT.checked_sub(began.elapsed()).filter(|left| !left.is_zero())
        {
            if !everyone && query.have_answered(&targets) {
                return Ok(query.heard);
            }
            query.receive(left)?;
        }
    }
    Ok(query.heard)
}

/// A query that is sent several times, and the answers to it.
struct RunningQuery<'a> {
    socket: UdpSocket,
    /// Whether the socket is dual-stack.
    is_v6: bool,
    hash_part: &'a HashPart,
    networks: &'a LanNetworks,
    /// Addresses that the query is sent to, broadcast addresses included.
    targets: &'a [SocketAddr],
    /// Whether answers of all nodes on the LAN count.
    everyone: bool,
    /// ID of the first transmission; each further one has the next. The ID in an answer tells which
    /// transmission it answers. It is random, so that only nodes that got a query know it.
    first_id: u32,
    /// Time of each transmission.
    sent: Vec<Instant>,
    /// First answer of each node.
    heard: Vec<ProbeReply>,
}

impl RunningQuery<'_> {
    /// Sends the query to all targets that have not answered. Returns the time before the first
    /// datagram was sent.
    fn send(&mut self) -> Instant {
        let began = Instant::now();
        let id = self.first_id.wrapping_add(self.sent.len() as u32);
        self.sent.push(began);
        let query = Packet::Query { id, hash_part: *self.hash_part }.encode();
        for target in self.targets.iter().filter(|target| !self.has_answered(target)) {
            // An address that cannot be sent to counts as one that does not answer.
            let _ = self.socket.send_to(&query, mapped(*target, self.is_v6));
        }
        began
    }

    /// Waits for at most `timeout` for a datagram, and records it if it is the first answer of a
    /// node that was asked.
    fn receive(&mut self, timeout: Duration) -> io::Result<()> {
        let mut buffer = [0; Packet::MAX_LEN + 1];
        self.socket.set_read_timeout(Some(timeout))?;
        let Ok((length, mut from)) = self.socket.recv_from(&mut buffer) else { return Ok(()) };
        from.set_ip(from.ip().to_canonical());
        let (id, holder) = match Packet::parse(&buffer[..length]) {
            Ok(Packet::Have { id, port, url_path }) => {
                let mut http = from;
                http.set_port(port);
                (id, Some(Holder { http, url_path }))
            }
            Ok(Packet::HaveNot { id }) => (id, None),
            _ => return Ok(()),
        };
        let transmission = id.wrapping_sub(self.first_id) as usize;
        let Some(elapsed) = self.sent.get(transmission).map(Instant::elapsed) else {
            return Ok(());
        };
        let was_asked =
            self.targets.contains(&from) || (self.everyone && self.networks.is_lan(from));
        let is_new = !self.networks.is_own(from.ip()) && !self.has_answered(&from);
        if was_asked && is_new && self.heard.len() < MAX_HEARD {
            self.heard.push(ProbeReply { from, holder, elapsed });
        }
        Ok(())
    }

    fn has_answered(&self, address: &SocketAddr) -> bool {
        self.heard.iter().any(|reply| reply.from == *address)
    }

    fn have_answered(&self, all: &[SocketAddr]) -> bool {
        all.iter().all(|address| self.has_answered(address))
    }
}

/// Opens a dual-stack socket, or one for IPv4 if the system has no IPv6. Returns whether it is
/// dual-stack.
fn open() -> io::Result<(UdpSocket, bool)> {
    let both = || -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
        socket.set_only_v6(false)?;
        socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)).into())?;
        Ok(socket)
    };
    let (socket, is_v6) = match both() {
        Ok(socket) => (UdpSocket::from(socket), true),
        Err(_) => (UdpSocket::bind("0.0.0.0:0")?, false),
    };
    socket.set_broadcast(true)?;
    Ok((socket, is_v6))
}

fn mapped(to: SocketAddr, is_v6: bool) -> SocketAddr {
    match to {
        SocketAddr::V4(v4) if is_v6 => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        _ => to,
    }
}

/// Result of an HTTP request to a node.
pub enum HttpProbe {
    /// The node shares with this machine. Contains the time that the request took.
    Shares(Duration),
    /// The node answers 403: it shares nothing with this machine.
    Refuses,
    /// The node answers otherwise, as the Python peerix does.
    Other,
    /// The node does not answer.
    Silent(io::Error),
}

/// Sends an HTTP request to all nodes at the same time. Connecting, writing and each read take at
/// most 2 s.
pub fn http(nodes: &[SocketAddr]) -> Vec<HttpProbe> {
    at_once(nodes, |node| {
        let began = Instant::now();
        match status(*node) {
            Ok(200) => HttpProbe::Shares(began.elapsed()),
            Ok(403) => HttpProbe::Refuses,
            Ok(_) => HttpProbe::Other,
            Err(e) => HttpProbe::Silent(e),
        }
    })
}

/// Requests `/store/nix-cache-info`, which a node serves only to those that it shares with, and
/// returns the status code. Does not use ureq, which cannot connect to link-local addresses.
fn status(node: SocketAddr) -> io::Result<u16> {
    let mut stream = TcpStream::connect_timeout(&node, HTTP_TIMEOUT.get())?;
    stream.set_read_timeout(Some(HTTP_TIMEOUT.get()))?;
    stream.set_write_timeout(Some(HTTP_TIMEOUT.get()))?;
    stream.write_all(
        b"GET /store/nix-cache-info HTTP/1.1\r\nHost: peer\r\nConnection: close\r\n\r\n",
    )?;
    let mut line = [0; "HTTP/1.1 200".len()];
    stream.read_exact(&mut line)?;
    let status = str::from_utf8(&line[9..]).ok().and_then(|digits| digits.parse().ok());
    status.ok_or_else(|| io::Error::other("not HTTP"))
}

/// Whether the daemon can hear a node at `ip`: it listens on all addresses of that family, or on an
/// address in the node's network.
pub fn hears(config: &Config, networks: &LanNetworks, ip: IpAddr) -> bool {
    config.bind.iter().any(|bind| match bind.is_unspecified() {
        true => bind.is_ipv6() == ip.is_ipv6(),
        false => networks.interfaces().iter().any(|i| i.address == *bind && i.reaches(ip)),
    })
}

/// Calls `work` for each element in a thread of its own, and returns the results in the same order.
/// Panics if a call panics. Suitable for some hundreds of elements.
pub fn at_once<T: Sync, U: Send>(all: &[T], work: impl Fn(&T) -> U + Sync) -> Vec<U> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = all.iter().map(|one| scope.spawn(|| work(one))).collect();
        let join =
            |thread: ScopedJoinHandle<'_, U>| thread.join().unwrap_or_else(|e| resume_unwind(e));
        threads.into_iter().map(join).collect()
    })
}

/// Addresses of the nodes that `--peer` names.
#[derive(Default)]
pub struct NamedAddresses {
    /// All addresses of all hosts.
    pub addresses: Vec<SocketAddr>,
    /// Hosts that cannot be resolved, each with the error.
    pub unresolved: Vec<(String, io::Error)>,
}

impl NamedAddresses {
    /// Resolves the hosts. Blocks as long as the system's resolver does.
    pub fn resolve(config: &Config) -> NamedAddresses {
        let mut named = NamedAddresses::default();
        for (host, port) in &config.peers {
            match (host.as_str(), *port).to_socket_addrs() {
                Ok(addresses) => named.addresses.extend(addresses),
                Err(e) => named.unresolved.push((host.clone(), e)),
            }
        }
        named
    }
}

/// LAN peers in the daemon's status, and nodes that `--peer` names. Blocks as long as the system's
/// resolver does.
pub fn known(node: &RunningDaemon) -> Vec<SocketAddr> {
    known_or_named(&node.status, &NamedAddresses::resolve(&node.config))
}

/// LAN peers in `status`, and nodes in `named`.
pub fn known_or_named(status: &Value, named: &NamedAddresses) -> Vec<SocketAddr> {
    // A host that has only sent requests need not run peerix.
    let is_peer = |peer: &Value| peer["network"] == "lan" && peer["found_by"] != "request";
    let mut all = addresses(status, is_peer);
    all.extend(&named.addresses);
    all.sort_unstable();
    all.dedup();
    all
}

/// Addresses of the peers in `status` that `is_included` selects.
fn addresses(status: &Value, is_included: impl Fn(&Value) -> bool) -> Vec<SocketAddr> {
    let peers = list(&status["peers"]).iter().filter(|peer| is_included(peer));
    peers.filter_map(|peer| text(&peer["address"]).parse().ok()).collect()
}

/// Nodes on other networks, with their peer IDs, as the trackers list them: all, or those that may
/// have `hash_part`. At most [`MAX_WAN_NODES`]; empty in mode `lan`. Blocks for at most 2 s for
/// each tracker, and while host names are resolved.
pub fn wan_nodes(node: &RunningDaemon, hash_part: Option<&HashPart>) -> Vec<(String, SocketAddr)> {
    let mut all = Vec::new();
    if !node.config.mode.has_wan() {
        return all;
    }
    for tracker in &node.config.tracker_urls {
        let target = hash_part.map_or_else(|| "/peers".to_owned(), lookup_target);
        let Ok(answer) = get(&format!("{tracker}{target}")) else { continue };
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        for candidate in ["peers", "candidates", "others"].iter().flat_map(|kind| list(&body[kind]))
        {
            let (id, addr) = (text(&candidate["peer_id"]), text(&candidate["addr"]));
            let port = candidate["port"].as_u64().and_then(|port| u16::try_from(port).ok());
            let is_own = candidate["peer_id"] == node.status["node"]["peer_id"];
            let bare = addr.trim_start_matches('[').trim_end_matches(']');
            let address = port.and_then(|port| {
                (bare, port).to_socket_addrs().ok()?.find(|to| can_be_peer(to.ip()))
            });
            if let Some(address) = address
                && !is_own
                && all.len() < MAX_WAN_NODES
                && !all.iter().any(|(_, other)| *other == address)
            {
                all.push((id.to_owned(), address));
            }
        }
    }
    all
}

/// A node that offers a path.
pub struct ProbeOffer {
    /// Address of its HTTP server.
    pub from: SocketAddr,
    /// Its peer ID at a tracker. Empty for a LAN peer.
    pub id: String,
    /// The narinfo, or why the node did not give one.
    pub narinfo: Result<NarInfo, PeerError>,
}

impl ProbeOffer {
    /// Address and peer ID for messages.
    pub fn who(&self) -> String {
        if self.id.is_empty() {
            self.from.to_string()
        } else {
            format!("{} ({})", self.from, self.id)
        }
    }
}

/// Asks all known nodes for a path. A lookup asks the same nodes, but stops at the first usable
/// offer.
pub fn offers(node: &RunningDaemon, hash_part: &HashPart) -> Vec<ProbeOffer> {
    let mut holders = Vec::new();
    if node.config.mode.has_lan() {
        // If the daemon knows no peer, a broadcast may still reach one.
        let known = known(node);
        let networks = node.networks();
        let port = node.config.port;
        let heard =
            ask(node, &networks, hash_part, port, &known, known.is_empty()).unwrap_or_default();
        holders.extend(heard.into_iter().filter_map(|heard| Some((String::new(), heard.holder?))));
    }
    let url_path = format!("local/{hash_part}.narinfo");
    let far = wan_nodes(node, Some(hash_part)).into_iter();
    holders.extend(far.map(|(id, http)| (id, Holder { http, url_path: url_path.clone() })));
    let client = PeerClient::new(node.config.store_dir.clone());
    let offers = at_once(&holders, |(id, holder)| {
        let narinfo =
            client.narinfo(holder, hash_part, HTTP_TIMEOUT.get()).map(PeerNarinfo::into_inner);
        ProbeOffer { from: holder.http, id: id.clone(), narinfo }
    });
    // A tracker's candidate is only likely to have the path. One that does not have it made no
    // offer.
    offers
        .into_iter()
        .filter(|o| o.id.is_empty() || !matches!(o.narinfo, Err(PeerError::NotThere)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A missing result would attribute the later ones to the wrong elements.
    #[test]
    fn panic_of_one_call_leaves_no_results() {
        let all = |wrong| {
            let work = |n: &u32| if *n == wrong { panic!("on purpose") } else { *n };
            std::panic::catch_unwind(|| at_once(&[1, 2, 3], work)).ok()
        };
        assert_eq!((all(0), all(2)), (Some(vec![1, 2, 3]), None));
    }
}
