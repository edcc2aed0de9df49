//! The simulated network itself. Tests that rely on it prove nothing if it does not work as
//! claimed.

use crate::common::http::{self, Reply, Server};
use crate::common::lan::{Host, Run};
use crate::common::standin::{BROADCAST, receive};
use crate::common::{DEADLINE, Lan, Nat, PORT, Wan, World, nix, thread, tree, wait_for, world};
use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

#[test]
fn hosts_are_isolated_machines() {
    let lan = Lan::new();
    let (one, two) = (lan.host("one"), lan.host("two"));
    nix::configure(&one, "");
    nix::configure(&two, "");
    one.write("/tmp/file", "content");
    let path = one.cmd("nix-store").args(["--add", "/tmp/file"]).okay();
    let path = path.trim();
    assert!(one.path(path).exists());
    assert!(!two.path(path).exists());
    assert!(!std::path::Path::new(path).exists(), "this machine's store was touched");
    let _server = Server::start(two.listen(PORT), |_| Reply::Whole(200, b"two".to_vec()));
    assert_eq!(http::get(&one, (two.address, PORT), "/").unwrap().text(), "two");
    assert_eq!(http::get_local(&two, "/").unwrap().text(), "two");
    assert!(http::get_local(&one, "/").is_err());
    let mut sleeper = one.spawn_sh("sleep 600");
    let proc = format!("/proc/{}", sleeper.pid());
    assert!(fs::read_to_string(format!("{proc}/comm")).unwrap().contains('s'));
    sleeper.kill();
    assert!(!fs::exists(proc).unwrap());
}

/// Wait before a test concludes that nothing arrives. A slow machine cannot make such a test fail.
const NOTHING_COMES: Duration = Duration::from_millis(300);

/// Sockets for broadcasts from one host to another.
struct Broadcasts {
    from: UdpSocket,
    to: UdpSocket,
}

impl Broadcasts {
    fn new(from: &Host, to: &Host) -> Broadcasts {
        Broadcasts { from: from.udp(PORT), to: to.udp(PORT) }
    }

    fn send(&self, datagram: &[u8]) {
        self.from.send_to(datagram, (BROADCAST, PORT)).unwrap();
    }

    /// Sends broadcasts until one arrives, and discards the rest.
    fn wait_until_heard(&self) {
        wait_for("a broadcast is heard", || {
            self.send(b"first");
            receive(&self.to, NOTHING_COMES)
        });
        self.drain();
    }

    /// Discards the datagrams that are still in transit.
    fn drain(&self) {
        while receive(&self.to, NOTHING_COMES).is_some() {}
    }

    /// Sends a broadcast and returns the time until it arrives.
    fn time(&self) -> Duration {
        let start = Instant::now();
        self.send(b"timed");
        receive(&self.to, DEADLINE).expect("a broadcast is heard");
        start.elapsed()
    }

    /// Sends `count` broadcasts and returns how many arrive.
    fn count(&self, count: usize) -> usize {
        for _ in 0..count {
            self.send(b"counted");
        }
        let mut heard = 0;
        wait_for("a broadcast after those that are counted", || {
            self.send(b"last");
            while let Some((_, datagram)) = receive(&self.to, NOTHING_COMES) {
                if datagram == b"last" {
                    return Some(heard);
                }
                heard += 1;
            }
            None
        })
    }

    fn assert_not_heard(&self) {
        self.send(b"lost");
        assert_eq!(receive(&self.to, NOTHING_COMES), None);
    }
}

#[test]
fn port_of_another_socket_is_waited_for() {
    let lan = Lan::new();
    let host = lan.host("a");
    let held = host.udp(PORT);
    let attempts = AtomicU32::new(0);
    std::thread::scope(|scope| {
        let waiting = thread::spawn_in(scope, "waiting", || {
            host.bind(|| {
                attempts.fetch_add(1, Ordering::Relaxed);
                UdpSocket::bind((Ipv4Addr::UNSPECIFIED, PORT))
            })
        });
        wait_for("two attempts", || (attempts.load(Ordering::Relaxed) > 1).then_some(()));
        drop(held);
        waiting.join().unwrap();
    });
}

#[test]
fn broadcasts_arrive_unless_a_fault_drops_them() {
    let lan = Lan::new();
    let (one, two) = (lan.host("one"), lan.host("two"));
    let broadcasts = Broadcasts::new(&one, &two);
    broadcasts.wait_until_heard();
    {
        let _delay = two.delay(Duration::from_millis(100));
        let time = broadcasts.time();
        assert!(time >= Duration::from_millis(100), "{time:?}");
    }
    two.net("iptables -F");
    two.lose(30);
    // Few enough for the receive buffer of a socket.
    let heard = broadcasts.count(200);
    assert!((100..180).contains(&heard), "{heard} of 200");
    two.net("iptables -F");
    broadcasts.drain();
    two.unplug();
    broadcasts.assert_not_heard();
    two.plug();
    broadcasts.wait_until_heard();
    two.fall_silent();
    broadcasts.assert_not_heard();
}

/// A server on `host` that answers with the host's name.
fn echo(host: &Host) -> Server {
    let name = host.name.clone();
    Server::start(host.listen(PORT), move |_| Reply::Whole(200, name.clone().into_bytes()))
}

fn reached(from: &Host, address: Ipv4Addr) -> Option<String> {
    http::get(from, (address, PORT), "/").ok().map(|answer| answer.text())
}

/// Connects, and returns the kind of the error if that fails.
fn connects(from: &Host, address: Ipv4Addr, within: Duration) -> Result<(), ErrorKind> {
    let to = SocketAddr::from((address, PORT));
    let connection = from.in_net(|| TcpStream::connect_timeout(&to, within));
    connection.map(drop).map_err(|error| error.kind())
}

#[test]
fn router_forwards_packets_but_no_broadcasts() {
    let wan = Wan::new();
    let (home, office, public) = (wan.lan([10, 1, 0]), wan.lan([10, 2, 0]), wan.lan([203, 0, 113]));
    let hosts = [home.host("a"), home.host("b"), office.host("c"), public.host("d")];
    assert_eq!(hosts[3].address, Ipv4Addr::new(203, 0, 113, 1));
    let _servers = hosts.each_ref().map(echo);
    for from in &hosts {
        for to in &hosts {
            assert_eq!(
                reached(from, to.address).as_deref(),
                Some(to.name.as_str()),
                "{} to {}",
                from.name,
                to.name
            );
        }
    }

    let sockets = hosts.each_ref().map(|host| host.udp(PORT));
    for to in [home.address(255), office.address(255), Ipv4Addr::BROADCAST] {
        sockets[0].send_to(b"all", (to, PORT)).unwrap();
    }
    for (socket, host) in sockets.iter().zip(&hosts).skip(1) {
        // It takes the same route, so all earlier broadcasts have arrived when it arrives.
        sockets[0].send_to(b"last", (host.address, PORT)).unwrap();
        let heard = std::iter::from_fn(|| receive(socket, DEADLINE))
            .inspect(|(from, _)| assert_eq!(from.ip(), hosts[0].address))
            .take_while(|(_, datagram)| datagram != b"last");
        let expected = if host.name == "b" { 2 } else { 0 };
        assert_eq!(heard.count(), expected, "{}", host.name);
    }
}

#[test]
fn unused_addresses_fail_as_configured() {
    let wan = Wan::new();
    let (home, office) = (wan.lan([10, 1, 0]), wan.lan([10, 2, 0]));
    let (a, b) = (home.host("a"), office.host("b"));
    let nobody = |second| Ipv4Addr::new(10, second, 4, 4);
    wan.unreachable("10.7.0.0/16");
    wan.blackhole("10.8.0.0/16");
    wan.all_at("10.9.0.0/16", &b);
    assert_eq!(connects(&a, nobody(7), DEADLINE), Err(ErrorKind::HostUnreachable));
    assert_eq!(connects(&a, nobody(8), NOTHING_COMES), Err(ErrorKind::TimedOut));
    assert_eq!(connects(&a, nobody(9), DEADLINE), Err(ErrorKind::ConnectionRefused));
    let _server = echo(&b);
    assert_eq!(reached(&a, nobody(9)).as_deref(), Some("b"));
}

#[test]
fn faults_apply_across_a_router() {
    let wan = Wan::new();
    let (home, office) = (wan.lan([10, 1, 0]), wan.lan([10, 2, 0]));
    let (a, b) = (home.host("a"), office.host("b"));
    let _server = Server::start(b.listen(PORT), |_| Reply::Whole(200, vec![0; 2 << 20]));
    let begin = Instant::now();
    {
        let _delay = b.delay(Duration::from_millis(60));
        assert_eq!(connects(&a, b.address, DEADLINE), Ok(()));
    }
    assert!(begin.elapsed() >= Duration::from_millis(60), "{:?}", begin.elapsed());
    b.net("iptables -F");

    let (received, sent) = (a.received(), b.sent());
    a.slow(80);
    let begin = Instant::now();
    let answer = http::get(&a, (b.address, PORT), "/").unwrap();
    assert!(
        answer.whole && begin.elapsed() >= Duration::from_millis(150),
        "2 MiB at 80 Mbit/s: {:?}",
        begin.elapsed()
    );
    assert!(b.sent() - sent > 2 << 20 && a.received() - received > 2 << 20);
    b.unplug();
    assert!(connects(&a, b.address, NOTHING_COMES).is_err());
}

#[test]
fn nat_forwards_only_configured_ports() {
    let wan = Wan::new();
    let (internet, elsewhere) = (wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
    let nat = Nat::new(&internet, [192, 168, 1]);
    let (inside, outside) = (nat.lan.host("inside"), elsewhere.host("outside"));
    assert_eq!((nat.address(), inside.address), (internet.address(1), nat.lan.address(1)));
    let _servers = [echo(&inside), echo(&outside)];

    // Outgoing connections have the router's address.
    assert_eq!(reached(&inside, outside.address).as_deref(), Some("outside"));
    let (heard, sends) = (outside.udp(PORT), inside.udp(PORT));
    sends.send_to(b"x", (outside.address, PORT)).unwrap();
    let (from, _) = receive(&heard, DEADLINE).unwrap();
    assert_eq!(from.ip(), nat.address());

    // Only forwarded ports accept incoming connections, and these keep the sender's address.
    assert!(reached(&outside, nat.address()).is_none());
    nat.forward("tcp", PORT, &inside, PORT);
    assert_eq!(reached(&outside, nat.address()).as_deref(), Some("inside"));
    let other = elsewhere.host("other").udp(PORT);
    other.send_to(b"lost", (nat.address(), PORT)).unwrap();
    nat.forward("udp", 20_000, &inside, PORT);
    // A new sender, so that the router's connection tracking has no entry for it.
    let third = elsewhere.host("third");
    third.udp(PORT).send_to(b"comes", (nat.address(), 20_000)).unwrap();
    let (from, datagram) = receive(&sends, DEADLINE).unwrap();
    assert_eq!((from.ip(), &datagram[..]), (third.address.into(), &b"comes"[..]));

    // The router drops other packets, also from a sender that has a route to the inside addresses.
    let neighbour = internet.host("neighbour");
    neighbour.net(&format!("ip route add 192.168.1.0/24 via {}", nat.address()));
    assert_eq!(connects(&neighbour, inside.address, NOTHING_COMES), Err(ErrorKind::TimedOut));
}

#[test]
fn world_is_fetched_from_its_static_cache() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let client = lan.host("client");
    nix::configure_client(&client, &world.next(), &[&world.cache_key]);
    let roots = [world.path("closure300"), world.path("odd")];
    nix::realise(&client, &roots);
    let closure = nix::closure(&client, &roots[..1]);
    assert_eq!(closure.len(), 300);
    let all: Vec<&str> = closure.iter().map(String::as_str).chain([roots[1]]).collect();
    nix::assert_whole(&client, &all, &world.store());
    assert!(!nix::valid_paths(&client).iter().any(|path| path == world.path("many")));

    let server = lan.host("server");
    world.give(&server);
    let all = nix::closure(&server, &[world.path("closure1000")]);
    assert_eq!(all.len(), 1000);
    tree::assert_same(&world.store().join(world::base_name(roots[1])), &server.path(roots[1]));
    world.sign(&server);
    let shown = server.cmd("nix").args(["path-info", "--sigs", roots[1]]).okay();
    assert!(shown.contains("cache-1:"), "{shown}");
}
