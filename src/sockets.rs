//! The listening sockets, inherited from systemd or bound by this process.

mod address_filter;

use crate::config::Config;
use crate::network::{InterfaceAddress, LanNetworks, MULTICAST_GROUP};
use listenfd::ListenFd;
use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, UdpSocket};

/// Connections that the kernel queues before they are accepted. Nix and the peers open 25 each at
/// once.
const BACKLOG: i32 = 1024;

/// The daemon's sockets.
pub struct BoundSockets {
    /// TCP sockets for HTTP.
    pub listeners: Vec<TcpListener>,
    /// UDP sockets for discovery.
    pub datagrams: Vec<UdpSocket>,
    /// The port of the first listener, and of all sockets that this process binds.
    pub port: u16,
    /// Whether systemd passed the sockets. It then keeps the port open while the daemon does not
    /// run.
    pub are_passed: bool,
}

impl BoundSockets {
    /// Duplicates the sockets, for another run with them.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn try_clone(&self) -> io::Result<BoundSockets> {
        Ok(BoundSockets {
            listeners: self
                .listeners
                .iter()
                .map(TcpListener::try_clone)
                .collect::<io::Result<_>>()?,
            datagrams: self
                .datagrams
                .iter()
                .map(UdpSocket::try_clone)
                .collect::<io::Result<_>>()?,
            ..*self
        })
    }
}

/// Whether systemd passed sockets to this process (sd_listen_fds(3)).
pub fn are_passed() -> bool {
    std::env::var("LISTEN_PID").is_ok_and(|pid| pid == std::process::id().to_string())
}

/// Takes the sockets that systemd passes (`LISTEN_FDS`), or binds the addresses of `config.bind`,
/// and 127.0.0.1 for HTTP. An address that this machine does not have yet is bound too, and works
/// as soon as the machine has it.
///
/// # Errors
/// A message for the user: the port is taken, a passed socket is of a wrong kind, or the kernel
/// cannot enforce `--bind` on passed sockets.
pub fn open(config: &Config, networks: &LanNetworks) -> Result<BoundSockets, String> {
    let (mut listeners, mut datagrams) = inherited()?;
    let are_passed = !listeners.is_empty();
    if are_passed {
        keep_to_bind(config, networks, &listeners, &datagrams)?;
    } else {
        warn_of_missing_addresses(config, networks);
        let mut port = config.port;
        for ip in with_loopback(&config.bind) {
            let listener =
                bind(ip, port, Type::STREAM).map_err(|e| explain(ip, port, "TCP", &e))?;
            let listener = TcpListener::from(listener);
            // With `--port 0` the kernel chooses a port for the first socket, and the others use
            // it.
            port = listener.local_addr().map_err(|e| format!("socket: {e}"))?.port();
            listeners.push(listener);
        }
    }
    let port = listeners[0].local_addr().map_err(|e| format!("socket: {e}"))?.port();
    if port != config.port && config.port != 0 {
        log::error!(
            "--port {}: systemd passed sockets on port {port}, which are used; see its .socket unit",
            config.port
        );
    }
    if datagrams.is_empty() {
        for ip in &config.bind {
            let socket = bind(*ip, port, Type::DGRAM).map_err(|e| explain(*ip, port, "UDP", &e))?;
            datagrams.push(socket.into());
        }
        // A socket bound to an interface's address receives no broadcasts, so the network's
        // broadcast address is bound too.
        let is_bound = |i: &&InterfaceAddress| config.bind.contains(&i.address);
        for interface in networks.lan_addresses().iter().filter(is_bound) {
            if let Some(broadcast) = interface.broadcast {
                let socket = bind(broadcast.into(), port, Type::DGRAM);
                datagrams
                    .push(socket.map_err(|e| explain(broadcast.into(), port, "UDP", &e))?.into());
            }
        }
        datagrams.extend(multicast_sockets(config, networks, port));
    }
    Ok(BoundSockets { listeners, datagrams, port, are_passed })
}

/// Distance of the port for forwarded connections from the main port. It is fixed, so that this
/// machine's firewall can open the port. The port in between is the tracker's default.
const OUTSIDE_OFFSET: u16 = 2;

/// Binds a TCP socket for connections that a router forwards, over IPv4 and IPv6 where possible. It
/// uses `port` + 2, or any port if that one is taken.
///
/// # Errors
/// No file descriptor is left.
pub fn open_outside(port: u16) -> io::Result<TcpListener> {
    let port = port.checked_add(OUTSIDE_OFFSET).unwrap_or_default();
    let bind_v4 = |port| bind(Ipv4Addr::UNSPECIFIED.into(), port, Type::STREAM);
    let socket = bind_both(port)
        .or_else(|_| bind_v4(port))
        .or_else(|_| bind_both(0))
        .or_else(|_| bind_v4(0));
    Ok(socket?.into())
}

fn bind_both(port: u16) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_only_v6(false)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Takes the TCP sockets that systemd passes, or binds one per address, for a server without UDP.
/// Returns them with the first one's port. With port 0 the kernel chooses a port for the first, and
/// the others use it. `flag` is the name of the addresses' option, for error messages.
///
/// # Errors
/// A message for the user: the port is taken, a passed socket is not TCP, or there is no address.
pub fn open_tcp(
    addresses: &[IpAddr],
    mut port: u16,
    flag: &str,
) -> Result<(Vec<TcpListener>, u16), String> {
    let (mut listeners, datagrams) = passed()?;
    if !datagrams.is_empty() {
        return Err(
            "systemd passed a datagram socket; the .socket unit needs ListenStream= only".into()
        );
    }
    let port_of = |listener: &TcpListener| {
        listener.local_addr().map(|a| a.port()).map_err(|e| format!("socket: {e}"))
    };
    if listeners.is_empty() {
        for ip in addresses {
            let listener = bind(*ip, port, Type::STREAM)
                .map_err(|e| explain_for(*ip, port, "TCP", &e, flag))?;
            let listener = TcpListener::from(listener);
            port = port_of(&listener)?;
            listeners.push(listener);
        }
    }
    let first = listeners.first().ok_or_else(|| format!("no address to listen on; see {flag}"))?;
    let port = port_of(first)?;
    Ok((listeners, port))
}

/// Binds a socket to the multicast group on each LAN interface that has a bound IPv6 address. A
/// failure is only logged: other nodes then find this one only after it sends to them.
fn multicast_sockets(config: &Config, networks: &LanNetworks, port: u16) -> Vec<UdpSocket> {
    let mut indexes = networks.multicast_interfaces();
    indexes.retain(|index| {
        let on_interface = networks.interfaces().iter().filter(|i| i.index == *index);
        on_interface.map(|i| i.address).any(|ip| ip.is_ipv6() && config.bind.contains(&ip))
    });
    let bind_on = |index| {
        let address = SocketAddrV6::new(MULTICAST_GROUP, port, 0, index).into();
        let socket = bind_to(address, Type::DGRAM);
        socket
            .inspect_err(|e| {
                log::warn!("UDP {address}: {e}; queries by multicast are not heard there")
            })
            .ok()
    };
    indexes.into_iter().filter_map(bind_on).map(UdpSocket::from).collect()
}

/// Enforces `--bind` on sockets that systemd passed, with a filter that drops packets to other
/// addresses. systemd owns the sockets too, so a filter stays until the next daemon replaces it.
///
/// # Errors
/// The kernel does not accept the filter.
fn keep_to_bind(
    config: &Config,
    networks: &LanNetworks,
    listeners: &[TcpListener],
    datagrams: &[UdpSocket],
) -> Result<(), String> {
    let sockets: Vec<SockRef<'_>> =
        listeners.iter().map(SockRef::from).chain(datagrams.iter().map(SockRef::from)).collect();
    // Removing a filter fails if there is none.
    sockets.iter().for_each(|socket| drop(socket.detach_filter()));
    let is_bound = |ip: IpAddr| ip.is_loopback() || config.bind.contains(&ip);
    let address =
        |socket: &SockRef<'_>| socket.local_addr().ok().and_then(|address| address.as_socket());
    let elsewhere: Vec<SocketAddr> =
        sockets.iter().filter_map(address).filter(|at| !is_bound(at.ip())).collect();
    if elsewhere.is_empty() || config.bind.iter().any(IpAddr::is_unspecified) {
        return Ok(());
    }
    let interfaces: Vec<u32> = networks
        .interfaces()
        .iter()
        .filter(|i| config.bind.contains(&i.address))
        .map(|i| i.index)
        .collect();
    let program = address_filter::program(&config.bind, &interfaces);
    for socket in &sockets {
        socket
            .attach_filter(&program)
            .map_err(|e| format!("--bind: cannot be enforced for passed sockets: {e}"))?;
    }
    let list = |all: &[String]| all.join(", ");
    let (elsewhere, bind): (Vec<_>, Vec<_>) = (
        elsewhere.iter().map(ToString::to_string).collect(),
        config.bind.iter().map(ToString::to_string).collect(),
    );
    log::error!(
        "--bind {}: systemd passed sockets on {}; what arrives at other addresses is dropped; give the .socket unit \
         the addresses of --bind",
        list(&bind),
        list(&elsewhere)
    );
    Ok(())
}

/// Logs the addresses of `--bind` that this machine does not have now.
fn warn_of_missing_addresses(config: &Config, networks: &LanNetworks) {
    let is_here =
        |ip: &IpAddr| networks.interfaces().iter().any(|interface| interface.address == *ip);
    for ip in
        config.bind.iter().filter(|ip| !ip.is_unspecified() && !ip.is_loopback() && !is_here(ip))
    {
        log::warn!(
            "--bind {ip}: this machine does not have that address; it is served as soon as it has"
        );
    }
}

/// Adds 127.0.0.1, where this machine's Nix connects: Nix fails a build when the port of a
/// configured cache is closed.
fn with_loopback(bind: &[IpAddr]) -> Vec<IpAddr> {
    let mut all = bind.to_vec();
    if !all
        .iter()
        .any(|ip| [Ipv4Addr::UNSPECIFIED, Ipv4Addr::LOCALHOST].map(IpAddr::V4).contains(ip))
    {
        all.push(Ipv4Addr::LOCALHOST.into());
    }
    all
}

fn inherited() -> Result<(Vec<TcpListener>, Vec<UdpSocket>), String> {
    let (listeners, datagrams) = passed()?;
    if listeners.is_empty() != datagrams.is_empty() {
        return Err(
            "systemd passed only one kind of socket; the .socket unit needs ListenStream= and ListenDatagram=".into()
        );
    }
    Ok((listeners, datagrams))
}

fn passed() -> Result<(Vec<TcpListener>, Vec<UdpSocket>), String> {
    let mut fds = ListenFd::from_env();
    let (mut listeners, mut datagrams) = (Vec::new(), Vec::new());
    for at in 0..fds.len() {
        // A socket's kind is known only by trying. A failed attempt leaves the descriptor in the
        // list.
        if let Ok(Some(listener)) = fds.take_tcp_listener(at) {
            listeners.push(listener);
        } else {
            match fds.take_udp_socket(at) {
                Ok(Some(socket)) => datagrams.push(socket),
                Ok(None) => {}
                Err(e) => {
                    return Err(format!(
                        "socket {at} that systemd passed: {e}; only ListenStream= and ListenDatagram= are used"
                    ));
                }
            }
        }
    }
    Ok((listeners, datagrams))
}

fn bind(ip: IpAddr, port: u16, kind: Type) -> io::Result<Socket> {
    bind_to(SocketAddr::new(ip, port), kind)
}

fn bind_to(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::STREAM { Protocol::TCP } else { Protocol::UDP };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    // DHCP or a VPN may assign the address later. The socket works from then on.
    match address.is_ipv6() {
        true => socket.set_freebind_v6(true)?,
        false => socket.set_freebind_v4(true)?,
    }
    if address.is_ipv6() {
        // IPv4 has sockets of its own, so that `--bind 0.0.0.0 --bind [::]` works.
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // A restart must not wait for old connections in TIME_WAIT.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SockAddr::from(address))?;
    if kind == Type::STREAM {
        socket.listen(BACKLOG)?;
    }
    Ok(socket)
}

fn explain(ip: IpAddr, port: u16, kind: &str, e: &io::Error) -> String {
    explain_for(ip, port, kind, e, "--bind")
}

fn explain_for(ip: IpAddr, port: u16, kind: &str, e: &io::Error, flag: &str) -> String {
    let remedy = match e.kind() {
        io::ErrorKind::AddrInUse => {
            "another program, perhaps another peerix, has it; --port names another".into()
        }
        io::ErrorKind::AddrNotAvailable => {
            format!("this machine does not have that address; see {flag}")
        }
        io::ErrorKind::PermissionDenied => {
            "ports below 1024 need privileges; --port names another".into()
        }
        _ => format!("see {flag} and --port"),
    };
    format!("{kind} {}: {e}; {remedy}", SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkPolicy;

    #[test]
    fn open_adds_loopback_for_http_only() {
        for (bind, expected) in [
            (&["0.0.0.0"][..], &["0.0.0.0"][..]),
            (&["127.0.0.1", "10.0.0.1"], &["127.0.0.1", "10.0.0.1"]),
            (&["10.0.0.1"], &["10.0.0.1", "127.0.0.1"]),
            (&["::"], &["::", "127.0.0.1"]),
            (&["::1", "127.0.0.2"], &["::1", "127.0.0.2", "127.0.0.1"]),
        ] {
            let parse = |list: &[&str]| -> Vec<IpAddr> {
                list.iter().map(|ip| ip.parse().unwrap()).collect()
            };
            assert_eq!(with_loopback(&parse(bind)), parse(expected));
        }
        let config =
            Config { port: 0, bind: vec!["127.0.0.2".parse().unwrap()], ..Config::default() };
        let sockets =
            open(&config, &LanNetworks::new(NetworkPolicy::default(), Vec::new())).unwrap();
        let at: Vec<SocketAddr> =
            sockets.listeners.iter().map(|l| l.local_addr().unwrap()).collect();
        assert_eq!(
            at,
            ["127.0.0.2", "127.0.0.1"].map(|ip| SocketAddr::new(ip.parse().unwrap(), sockets.port))
        );
        assert_eq!(sockets.datagrams.len(), 1, "discovery stays where it was put");
    }
}
