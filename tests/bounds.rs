//! The daemon's limits: clients that send too much, read too slowly or send garbage. The daemon
//! always answers the other clients.

use crate::common::daemon::binary;
use crate::common::http::{Answer, Connection, Reply, Server, get, get_local};
use crate::common::packet::Packet;
use crate::common::process::{Logged, status_number};
use crate::common::standin::receive;
use crate::common::stock::{self, line, nar_route, narinfo};
use crate::common::{
    DEADLINE, Daemon, Host, Lan, PORT, Scale, thread, wait_for, wait_slowly_for, world,
};
use socket2::{Domain, Socket, Type};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

struct Scene {
    daemon: Daemon,
    path: String,
    server: Host,
    neighbour: Host,
    lan: Lan,
}

impl Scene {
    fn new() -> Scene {
        Self::on(Lan::new())
    }

    fn with_scale(scale: Scale) -> Scene {
        Self::on(Lan::new().with_scale(scale))
    }

    fn on(lan: Lan) -> Scene {
        let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
        stock::ready(&server);
        let path = stock::add(&server, "file", "echo file > $n");
        let daemon = Daemon::start(&server, &[]);
        Scene { daemon, path, server, neighbour, lan }
    }

    fn address(&self) -> SocketAddr {
        (self.server.address, PORT).into()
    }

    fn connect(&self) -> TcpStream {
        connect(&self.neighbour, self.address())
    }

    /// Checks that new connections from the network and from this machine get answers.
    fn answers(&self) {
        let answer = narinfo(&self.neighbour, &self.server, &self.path);
        assert_eq!((answer.status, line(&answer.text(), "StorePath")), (200, &*self.path));
        assert_eq!(get_local(&self.server, &stock::narinfo_route(&self.path)).unwrap().status, 200);
    }

    /// Waits until new connections from the network and from this machine get answers.
    fn wait_until_answers(&self) {
        for from in [&self.neighbour, &self.server] {
            wait_for("an answer", || {
                let route = stock::narinfo_route(&self.path);
                let answer = get(from, self.address(), &route).ok()?;
                (answer.status == 200).then_some(())
            });
        }
    }
}

fn connect(from: &Host, to: SocketAddr) -> TcpStream {
    let stream = from.connect(to).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.set_write_timeout(Some(DEADLINE)).unwrap();
    stream
}

fn loopback() -> SocketAddr {
    (IpAddr::from(Ipv4Addr::LOCALHOST), PORT).into()
}

/// Opens `count` connections from `from`.
fn many(from: &Host, to: SocketAddr, count: usize) -> Vec<TcpStream> {
    // One thread for all connections, so that it enters the host's network only once.
    from.in_net(|| (0..count).map(|_| TcpStream::connect(to).unwrap()).collect())
}

/// Whether the daemon has closed the connection.
fn is_closed(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let read = (&*stream).read(&mut [0]);
    stream.set_nonblocking(false).unwrap();
    match read {
        Ok(length) => length == 0,
        Err(e) => e.kind() != io::ErrorKind::WouldBlock,
    }
}

/// Everything received until the daemon closes or resets the connection.
fn rest(mut stream: &TcpStream) -> String {
    let mut answer = Vec::new();
    if let Err(e) = stream.read_to_end(&mut answer) {
        assert!(
            !matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            "it was left open"
        );
    }
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn oversized_heads_are_refused() {
    let scene = Scene::new();
    let mut shapes: Vec<Vec<u8>> = vec![
        [b"GET /nix-cache-info HTTP/1.1\r\nX: ", &vec![b'a'; 1 << 20][..], b"\r\n\r\n"].concat(),
        [b"GET /", &vec![b'a'; 1 << 20][..], b" HTTP/1.1\r\n\r\n"].concat(),
        vec![b'G'; 1 << 20],
        vec![0; 1 << 20],
        b"\r\n".repeat(1 << 19),
        [b"GET /nix-cache-info HTTP/1.1\r\n", &b"A: b\r\n".repeat(65)[..], b"\r\n"].concat(),
    ];
    for shape in &shapes {
        let mut stream = scene.connect();
        // The daemon may refuse the head before it is complete, so the write may fail.
        let _ = stream.write_all(shape);
        let answer = rest(&stream);
        let start = String::from_utf8_lossy(&shape[..20]).into_owned();
        let refused = answer.starts_with("HTTP/1.1 431 ")
            || answer.starts_with("HTTP/1.1 400 ")
            || answer.is_empty();
        assert!(refused, "{start:?}: {answer}");
        scene.answers();
    }
    // Heads just below the limits get an answer.
    shapes = vec![
        [
            b"GET /nix-cache-info HTTP/1.1\r\nConnection: close\r\nX: ",
            &vec![b'a'; 16_000][..],
            b"\r\n\r\n",
        ]
        .concat(),
        [
            b"GET /nix-cache-info HTTP/1.1\r\nConnection: close\r\n",
            &b"A: b\r\n".repeat(63)[..],
            b"\r\n",
        ]
        .concat(),
    ];
    for shape in &shapes {
        let mut stream = scene.connect();
        stream.write_all(shape).unwrap();
        assert!(rest(&stream).starts_with("HTTP/1.1 200 "));
    }
    assert!(resident(&scene.daemon) < 64 << 10);
    scene.wait_until_answers();
}

#[test]
fn unexpected_bodies_are_refused_or_cut_off() {
    let scene = Scene::new();
    for (head, status) in [
        ("GET /nix-cache-info HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n", "200"),
        ("POST /nix-cache-info HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n", "405"),
        ("PUT /x HTTP/1.1\r\nContent-Length: 18446744073709551615\r\n\r\n", "405"),
        ("PUT /x HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", "400"),
        ("PUT /x HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n", "400"),
        ("PUT /x HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", "400"),
        ("PUT /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "400"),
        ("GET /nix-cache-info HTTP/1.1\r\nTransfer-Encoding: identity\r\n\r\n", "400"),
    ] {
        let mut stream = scene.connect();
        stream.write_all(head.as_bytes()).unwrap();
        let answer = rest(&stream);
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{head:?}: {answer}");
        assert_eq!(answer.matches("Content-Length: ").count(), 1, "{head:?}: {answer}");
    }
    // The daemon reads only a limited part of an endless body.
    let mut stream = scene.connect();
    stream.write_all(b"PUT /x HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n").unwrap();
    let chunk = vec![b'x'; 1 << 20];
    let taken = (0..1000).take_while(|_| stream.write_all(&chunk).is_ok()).count();
    assert!(taken < 1000, "a body of {taken} MiB was taken");
    assert!(resident(&scene.daemon) < 64 << 10);
    scene.wait_until_answers();
}

/// Resident memory of the daemon, in KiB.
fn resident(daemon: &Daemon) -> u64 {
    status_number(daemon.pid(), "VmRSS")
}

#[test]
fn thousand_pipelined_requests_are_answered_in_order() {
    let scene = Scene::new();
    let nar = nar_route(&scene.neighbour, &scene.server, &scene.path);
    let dump = stock::dump(&scene.server, &scene.path);
    let mut connection = Connection::new(scene.connect()).unwrap();
    let mut all = String::new();
    for number in 0..1000 {
        let route = match number % 3 {
            0 => "/nix-cache-info".to_owned(),
            1 => nar.clone(),
            _ => format!("/nothing/{number}"),
        };
        let part = number % dump.len();
        all += &format!("GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nRange: bytes={part}-\r\n\r\n");
    }
    std::thread::scope(|scope| {
        let mut writer = scene.connect();
        let text = all.as_bytes();
        // A second connection sends the same requests in pieces of 77 bytes at the same time.
        thread::spawn_in(scope, "pieces", move || {
            for piece in text.chunks(77) {
                writer.write_all(piece).unwrap();
            }
            let mut connection = Connection::new(writer).unwrap();
            assert_eq!((0..1000).filter(|_| connection.answer(true).unwrap().whole).count(), 1000);
        });
        connection.send(text).unwrap();
        for number in 0..1000 {
            let answer = connection.answer(true).unwrap();
            match number % 3 {
                0 => assert!(answer.text().starts_with("StoreDir")),
                1 => assert!(answer.body == dump[number % dump.len()..], "{number}"),
                _ => assert_eq!(answer.status, 404),
            }
        }
    });
    assert_eq!(connection.get("/nix-cache-info").unwrap().status, 200);
}

/// NAR streams that one neighbour may have at the same time (`MAX_STREAMS_PER_PEER`).
const MAX_READERS: usize = 32;

/// Requests a NAR and reads only the status, which it returns.
fn begin(stream: &mut TcpStream, route: &str) -> io::Result<u16> {
    write!(stream, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")?;
    let mut start = [0; 16];
    stream.read_exact(&mut start)?;
    Ok(String::from_utf8_lossy(&start[9..12]).parse().unwrap())
}

#[test]
fn slow_clients_are_dropped() {
    let scene = Scene::with_scale(Scale::timeouts(0.2));
    let large = stock::add_large(&scene.server, "large", 64);
    let route = nar_route(&scene.neighbour, &scene.server, &large);
    // Readers stop after the first bytes, until their number reaches the limit for one neighbour.
    let mut readers: Vec<TcpStream> = Vec::new();
    let refused = wait_for("a reader too many", || {
        let mut reader = scene.connect();
        let status = begin(&mut reader, &route).ok()?;
        if status != 200 {
            return Some(status);
        }
        readers.push(reader);
        None
    });
    assert_eq!(refused, 503);

    // One head arrives byte by byte without long pauses, one stops in the middle, one never begins.
    let mut drip = scene.connect();
    let mut stopped = scene.connect();
    stopped.write_all(b"GET /nix-ca").unwrap();
    let silent = scene.connect();
    let mut pending = vec!["drip", "stopped", "silent", "readers"];
    wait_slowly_for("all of them are dropped", || {
        let _ = drip.write_all(b"G");
        pending.retain(|what| match *what {
            "drip" => !is_closed(&drip),
            "stopped" => !is_closed(&stopped),
            "silent" => !is_closed(&silent),
            // All streams of this neighbour are available again.
            _ => {
                let mut next: Vec<TcpStream> = (0..MAX_READERS).map(|_| scene.connect()).collect();
                !next
                    .iter_mut()
                    .all(|stream| begin(stream, &route).is_ok_and(|status| status == 200))
            }
        });
        // The slow clients do not delay others.
        scene.answers();
        pending.is_empty().then_some(())
    });
    assert!(resident(&scene.daemon) < 64 << 10);
    // The dropped readers get only the part of the NAR that was already sent.
    for reader in &mut readers {
        let mut all = Vec::new();
        let _ = reader.read_to_end(&mut all);
        assert!(all.len() < 64 << 20, "{} bytes", all.len());
    }
    scene.wait_until_answers();
}

#[test]
fn long_answers_do_not_delay_short_ones() {
    let scene = Scene::with_scale(Scale::without_timeouts());
    let large = stock::add_large(&scene.server, "large", 32);
    let other = scene.lan.host("other");
    let route = nar_route(&scene.neighbour, &scene.server, &large);
    let mut readers = Vec::new();
    let mut read = |from: &Host, to: SocketAddr, count: usize| {
        for _ in 0..count {
            let mut stream = connect(from, to);
            assert_eq!(begin(&mut stream, &route).unwrap(), 200);
            readers.push(stream);
        }
    };
    // 32 streams for one neighbour, 48 for all neighbours together, and the remaining 16 only for
    // this machine.
    read(&scene.neighbour, scene.address(), MAX_READERS);
    refused(&get(&scene.neighbour, scene.address(), &route).unwrap());
    read(&other, scene.address(), 16);
    refused(&get(&other, scene.address(), &route).unwrap());
    read(&scene.server, loopback(), 16);
    refused(&get(&other, scene.address(), &route).unwrap());

    // A Nix without peerix, which fails a build on a 503, waits for a free stream.
    let mut plain = connect(&other, scene.address());
    let store = route.replace("/local/", "/store/");
    write!(plain, "GET {store} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
    plain.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let early = plain.read(&mut [0]).map_err(|e| e.kind());
    assert!(matches!(early, Err(io::ErrorKind::WouldBlock)), "answered before its turn: {early:?}");
    plain.set_read_timeout(Some(DEADLINE)).unwrap();

    // With 64 slow readers, the daemon still answers narinfo requests and queries.
    scene.answers();
    let socket = other.udp(0);
    assert!(stock::query_has(&socket, &scene.server, &large));
    std::thread::scope(|scope| {
        for _ in 0..25 {
            thread::spawn_in(scope, "short answers", || {
                for _ in 0..20 {
                    scene.answers();
                }
            });
        }
    });

    // A request from this machine never gets a 503. It waits for a free stream.
    let mut own = connect(&scene.server, loopback());
    write!(own, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
    own.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    let early = own.read(&mut [0]).map_err(|e| e.kind());
    assert!(matches!(early, Err(io::ErrorKind::WouldBlock)), "answered before its turn: {early:?}");
    own.set_read_timeout(Some(DEADLINE)).unwrap();
    drop(readers.pop());
    let answer = rest(&own);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.len() > 32 << 20, "{}", answer.len());

    // After the readers have left, neighbours get streams again.
    readers.clear();
    let answer = rest(&plain);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.len() > 32 << 20, "{}", answer.len());
    for from in [&scene.neighbour, &other] {
        wait_for("a place", || {
            let answer = get(from, scene.address(), &route).unwrap();
            (answer.status == 200 && answer.whole).then_some(())
        });
    }
}

fn refused(answer: &Answer) {
    assert_eq!(answer.status, 503, "a reader too many");
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(answer.text().lines().count(), 1);
}

/// Sends a request without reading the answer.
fn ask_for_cache_info(mut stream: &TcpStream) {
    stream.write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
}

#[test]
fn longest_idle_connections_are_closed_at_the_limit() {
    let scene = Scene::with_scale(Scale::without_timeouts());
    let idle = many(&scene.server, loopback(), 1000);
    let connection = |stream: &TcpStream| Connection::new(stream.try_clone().unwrap()).unwrap();
    // First, all connections are in use at the same time, so that each gets its thread and buffers.
    idle.iter().for_each(ask_for_cache_info);
    for stream in &idle {
        assert_eq!(connection(stream).answer(true).unwrap().status, 200);
    }
    // Then they are used one after another, so that the first has been idle for the longest time.
    for stream in &idle {
        ask_for_cache_info(stream);
        assert_eq!(connection(stream).answer(true).unwrap().status, 200);
    }
    scene.answers();
    let memory = resident(&scene.daemon);
    assert!(memory < 64 << 10, "{memory} KiB");
    let count_closed = || idle.iter().filter(|stream| is_closed(stream)).count();
    assert_eq!(count_closed(), 0);

    // More connections than the limit of 1,024: the daemon closes those that have been idle
    // longest.
    let more = many(&scene.server, loopback(), 100);
    wait_for("idle connections make room", || (count_closed() >= 76).then_some(()));
    // These requests are accepted after all of `more`, so the daemon has closed connections for
    // those.
    scene.answers();
    let closed = count_closed();
    assert!((76..150).contains(&closed), "{closed} closed");
    // The scheduler may delay a thread between its answer and the update of its idle time. Such a
    // connection stays open a little longer, and the daemon closes the next one instead.
    let last_closed = idle.iter().rposition(is_closed).unwrap();
    assert!(last_closed < 500, "connection {last_closed} of 1,000 was closed");
    for stream in &more {
        assert_eq!(connection(stream).get("/nix-cache-info").unwrap().status, 200);
    }
    // One neighbour cannot displace this machine's connections, however many it opens.
    let greedy = many(&scene.neighbour, scene.address(), 1000);
    wait_for("its own idlest are closed", || {
        (greedy.iter().filter(|s| is_closed(s)).count() >= 104).then_some(())
    });
    let still_open = more.iter().filter(|stream| !is_closed(stream)).count();
    assert_eq!(still_open, 100);
    scene.wait_until_answers();
}

/// Opens `count` connections with small receive buffers from `from`, asks for more on each than all
/// buffers hold, and reads nothing.
fn many_that_never_read(from: &Host, to: SocketAddr, count: usize, route: &str) -> Vec<TcpStream> {
    let request = format!("GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").repeat(200);
    let open = |_| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.connect(&to.into()).unwrap();
        let mut stream = TcpStream::from(socket);
        // The daemon may have closed it already.
        let _ = stream.write_all(request.as_bytes());
        stream
    };
    from.in_net(|| (0..count).map(open).collect())
}

/// Regression: Nix got no answer while another program held 1,024 connections of this machine.
#[test]
fn local_clients_that_never_read_do_not_keep_nix_out() {
    let scene = Scene::with_scale(Scale::without_timeouts());
    let large = stock::add_large(&scene.server, "large", 32);
    let route = nar_route(&scene.neighbour, &scene.server, &large);
    let held = many_that_never_read(&scene.server, loopback(), 1100, &route);
    // Until then, connections whose request has not been read yet make room.
    wait_for("those beyond the limit are closed", || {
        (held.iter().filter(|stream| is_closed(stream)).count() >= 76).then_some(())
    });
    for _ in 0..100 {
        let answer = get_local(&scene.server, &stock::narinfo_route(&scene.path)).unwrap();
        assert_eq!(answer.status, 200);
    }
    let threads = status_number(scene.daemon.pid(), "Threads");
    assert!(threads < 1200, "{threads} threads");
    drop(held);
}

/// Four addresses hold all connections that neighbours may have, and all their streams.
#[test]
fn neighbours_that_never_read_do_not_keep_others_out() {
    let scene = Scene::with_scale(Scale::timeouts(0.2));
    let large = stock::add_large(&scene.server, "large", 32);
    let route = nar_route(&scene.neighbour, &scene.server, &large);
    let greedy: Vec<Host> = (0..4).map(|n| scene.lan.host(&format!("greedy{n}"))).collect();
    let narinfo = stock::narinfo_route(&scene.path);
    let _connections: Vec<_> = greedy
        .iter()
        .map(|host| many_that_never_read(host, scene.address(), 500, &narinfo))
        .collect();
    let _streams: Vec<_> =
        greedy.iter().map(|host| many_that_never_read(host, scene.address(), 12, &route)).collect();
    for _ in 0..20 {
        scene.answers();
    }
    wait_for("a stream", || {
        let answer = get(&scene.neighbour, scene.address(), &route).ok()?;
        (answer.status == 200 && answer.whole).then_some(())
    });
}

#[test]
fn parallel_connections_of_several_clients_all_get_answers() {
    let scene = Scene::new();
    let nix = |from: &Host, to: SocketAddr| {
        // Nix opens 25 connections, sends a request on each, and then reads all answers.
        let mut streams = many(from, to, 25);
        for _ in 0..20 {
            for stream in &mut streams {
                write!(
                    stream,
                    "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                    stock::narinfo_route(&scene.path)
                )
                .unwrap();
            }
            for stream in &streams {
                let mut connection = Connection::new(stream.try_clone().unwrap()).unwrap();
                let answer = connection.answer(true).unwrap();
                assert_eq!((answer.status, answer.whole), (200, true));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            thread::spawn_in(scope, "own Nix", || nix(&scene.server, loopback()));
            thread::spawn_in(scope, "neighbour", || nix(&scene.neighbour, scene.address()));
        }
    });
}

#[test]
fn reset_connections_release_their_streams() {
    let scene = Scene::new();
    let large = stock::add_large(&scene.server, "large", 8);
    let route = nar_route(&scene.neighbour, &scene.server, &large);
    let requests = [
        String::new(),
        "GET /nix-cache".to_owned(),
        "GET /nix-cache-info HTTP/1.1\r\n\r\n".to_owned(),
        "POST / HTTP/1.1\r\nContent-Length: 99\r\n\r\nabc".to_owned(),
        "nonsense\r\n\r\n".to_owned(),
        format!("GET {route} HTTP/1.1\r\n\r\n"),
        "GET /nix-cache-info HTTP/1.1\r\n\r\n".repeat(50),
    ];
    let stopped = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let storms: Vec<_> = (0..4)
            .map(|_| {
                thread::spawn_in(scope, "resets", || {
                    scene.neighbour.in_net(|| {
                        for number in 0..700 {
                            let Ok(mut stream) = TcpStream::connect(scene.address()) else {
                                continue;
                            };
                            socket2::SockRef::from(&stream)
                                .set_linger(Some(Duration::ZERO))
                                .unwrap();
                            let _ = stream.write_all(requests[number % requests.len()].as_bytes());
                        }
                    });
                })
            })
            .collect();
        // The daemon answers requests from this machine during the resets.
        let own = thread::spawn_in(scope, "own Nix", || {
            let mut count = 0;
            while !stopped.load(Ordering::Relaxed) {
                assert_eq!(
                    get_local(&scene.server, &stock::narinfo_route(&scene.path)).unwrap().status,
                    200
                );
                count += 1;
            }
            count
        });
        let ended: Vec<_> = storms.into_iter().map(|storm| storm.join()).collect();
        stopped.store(true, Ordering::Relaxed);
        assert!(own.join().unwrap() > 0);
        assert!(ended.iter().all(Result::is_ok));
    });
    // The resets released all streams.
    let mut readers: Vec<TcpStream> = (0..MAX_READERS).map(|_| scene.connect()).collect();
    for reader in &mut readers {
        wait_for("a place", || {
            let mut stream = scene.connect();
            let given = begin(&mut stream, &route).ok()? == 200;
            std::mem::swap(reader, &mut stream);
            given.then_some(())
        });
    }
    scene.wait_until_answers();
}

#[test]
fn daemon_out_of_descriptors_recovers() {
    // `prlimit` replaces itself with peerix (`exec`).
    let lan = Lan::new();
    let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
    stock::ready(&server);
    let path = stock::add(&server, "file", "echo file > $n");
    let large = stock::add_large(&server, "large", 32);
    let mut command = server.cmd("prlimit");
    command.arg("--nofile=60:60").arg(binary()).arg("--verbose");
    let mut daemon = Logged::start(&server.name, command);
    daemon.wait_until("peerix answers", || server.connect_local().ok());
    let address = SocketAddr::from((server.address, PORT));
    let route = nar_route(&neighbour, &server, &large);
    let answered = || {
        wait_for("an answer", || {
            let answer = get(&neighbour, address, &stock::narinfo_route(&path)).ok()?;
            (answer.status == 200).then_some(())
        });
    };
    for _ in 0..3 {
        // With more idle connections than descriptors, the daemon closes the oldest ones.
        let idle = many(&server, loopback(), 100);
        answered();
        // With all descriptors in use by requests, the daemon accepts no connections, and open ones
        // may fail to open files.
        let mut streams = many(&server, loopback(), 100);
        for stream in &mut streams {
            let _ = write!(stream, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
        }
        let socket = neighbour.udp(0);
        // A query needs no descriptor of its own, but its answer may have to wait for the database.
        let query = Packet::Query { id: 1, hash_part: world::hash_part(&path).to_owned() }.write();
        socket.send_to(&query, address).unwrap();
        drop((idle, streams));
        answered();
        assert!(stock::query_has(&socket, &server, &path));
        wait_for("a NAR", || {
            let answer = get(&neighbour, address, &route).ok()?;
            (answer.status == 200 && answer.whole).then_some(())
        });
    }
    assert!(
        daemon.log().contains("accepting connections: "),
        "descriptors were never used up: nothing was tested"
    );
    assert_eq!(daemon.process.terminate().code(), Some(0));
}

#[test]
fn descriptor_limit_is_raised_for_all_connections() {
    let lan = Lan::new();
    let server = lan.host("server");
    stock::ready(&server);
    let path = stock::add(&server, "file", "echo file > $n");
    // The limits that systemd and shells set: a low soft limit and a high hard limit.
    let mut command = server.cmd("prlimit");
    command.arg("--nofile=1024:8192").arg(binary());
    let mut daemon = Logged::start(&server.name, command);
    daemon.wait_until("peerix answers", || server.connect_local().ok());
    let idle = many(&server, loopback(), 1015);
    assert_eq!(get_local(&server, &stock::narinfo_route(&path)).unwrap().status, 200);
    assert_eq!(
        idle.iter().filter(|stream| is_closed(stream)).count(),
        0,
        "closed for want of descriptors"
    );
}

#[test]
fn flood_of_datagrams_leaves_the_daemon_working() {
    let scene = Scene::new();
    let socket = scene.neighbour.udp(PORT);
    let address = scene.address();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    // Random data of each length after each packet kind.
    for length in 0..1400 {
        for kind in [0, 1, 2, 3, 4, 5, 255] {
            let mut datagram: Vec<u8> = (0..length).map(|_| random()).collect();
            if let Some(first) = datagram.first_mut() {
                *first = kind;
            }
            let _ = socket.send_to(&datagram, address);
        }
    }
    let _ = socket.send_to(&vec![0; 60_000], address);
    scene.wait_until_answers();
    assert!(stock::query_has(&socket, &scene.server, &scene.path));
    // More queries than the daemon can answer.
    for id in 0..50_000_u32 {
        let hash_part = world::hash_part(&scene.path).to_owned();
        let _ = socket.send_to(&Packet::Query { id, hash_part }.write(), address);
    }
    scene.wait_until_answers();
    while receive(&socket, Duration::from_millis(100)).is_some() {}
    assert!(stock::query_has(&socket, &scene.server, &scene.path));
    assert!(resident(&scene.daemon) < 64 << 10);
}

/// Requests an unknown path and returns whether a query for it arrived at `heard`, which answers
/// *have not*.
fn lookup_sends_query(asker: &Host, heard: &UdpSocket, digit: char) -> bool {
    let wanted: String = std::iter::repeat_n(digit, 32).collect();
    std::thread::scope(|scope| {
        let asking = thread::spawn_in(scope, "lookup", || {
            get_local(asker, &format!("/{wanted}.narinfo")).unwrap().status
        });
        let mut came = false;
        loop {
            let ended = asking.is_finished();
            while let Some((from, datagram)) = receive(heard, Duration::from_millis(20)) {
                match Packet::read(&datagram) {
                    Some(Packet::Query { id, hash_part }) if hash_part == wanted => {
                        came = true;
                        heard.send_to(&Packet::HaveNot { id }.write(), from).unwrap();
                    }
                    _ => {}
                }
            }
            if ended {
                assert_eq!(asking.join().unwrap(), 404);
                return came;
            }
        }
    })
}

#[test]
fn bye_counts_only_from_its_peer_and_if_that_falls_silent() {
    let lan = Lan::new();
    let (asker, peer, other) = (lan.host("asker"), lan.host("peer"), lan.host("other"));
    stock::ready(&asker);
    asker.net("ip addr add 203.0.113.1/24 dev eth0");
    other.net("ip addr add 203.0.113.2/24 dev eth0");
    let _daemon = Daemon::start(&asker, &[]);
    let bind = |host: &Host, ip: Ipv4Addr| host.bind(|| UdpSocket::bind((ip, PORT)));
    // A socket that is bound to its address receives no broadcasts, so only unicast queries arrive.
    let socket = bind(&peer, peer.address);
    let send = |from: &UdpSocket, packet: &Packet| {
        from.send_to(&packet.write(), (asker.address, PORT)).unwrap();
    };
    let hello = Packet::Hello { version: 1, port: PORT, instance: *b"instance", flags: 0 };
    let bye = Packet::Bye { version: 1, port: PORT, instance: *b"instance", flags: 0 };
    assert!(!lookup_sends_query(&asker, &socket, '0'), "unicast to a host nobody has heard of");
    send(&socket, &hello);
    wait_for("the peer is known", || lookup_sends_query(&asker, &socket, '1').then_some(()));
    send(&bind(&other, other.address), &bye);
    send(&bind(&other, Ipv4Addr::new(203, 0, 113, 2)), &bye);
    assert!(lookup_sends_query(&asker, &socket, '2'), "somebody else's bye was believed");
    send(&socket, &bye);
    // A bye does not count if its sender still answers.
    assert!(
        lookup_sends_query(&asker, &socket, '3'),
        "a bye was believed though its sender answers"
    );
    // A sender that does not answer after its bye gets no further queries.
    send(&socket, &bye);
    wait_for("the peer counts as silent", || {
        let status = get_local(&asker, "/status.json").unwrap().text();
        status.contains("\"state\":\"silent\"").then_some(())
    });
    while receive(&socket, Duration::from_millis(20)).is_some() {}
    assert!(!lookup_sends_query(&asker, &socket, '4'), "a silent peer is asked");
}

#[test]
fn answers_from_unqueried_senders_are_ignored() {
    let lan = Lan::new();
    let (asker, other) = (lan.host("asker"), lan.host("other"));
    stock::ready(&asker);
    stock::ready(&other);
    asker.net("ip addr add 203.0.113.1/24 dev eth0");
    other.net("ip addr add 203.0.113.2/24 dev eth0");
    let path = stock::add(&other, "file", "echo file > $n");
    // A valid narinfo, which the asker accepts from any peer that it believes.
    let text = {
        let _real = Daemon::start(&other, &[]);
        narinfo(&other, &other, &path).text()
    };
    let _daemon = Daemon::start(&asker, &[]);
    let asked = Arc::new(AtomicBool::new(false));
    let was_asked = Arc::clone(&asked);
    let _server = Server::start(other.listen(PORT), move |_| {
        was_asked.store(true, Ordering::Relaxed);
        Reply::Whole(200, text.clone().into_bytes())
    });
    let listener = other.udp(PORT);
    let hash_part = world::hash_part(&path);
    let hello = Packet::Hello { version: 1, port: PORT, instance: *b"instance", flags: 0 }.write();
    listener.send_to(&hello, (asker.address, PORT)).unwrap();
    wait_for("the peer is met", || {
        let status = get_local(&asker, "/status.json").unwrap().text();
        status.contains(&format!("\"{}:{PORT}\"", other.address)).then_some(())
    });
    // Result of a lookup when `sender` answers the query with an ID that is off by `shift`.
    let answered_by = |sender: &UdpSocket, shift: u32| {
        std::thread::scope(|scope| {
            let asking = thread::spawn_in(scope, "lookup", || {
                get_local(&asker, &format!("/{hash_part}.narinfo")).unwrap().status
            });
            while !asking.is_finished() {
                let Some((from, datagram)) = receive(&listener, Duration::from_millis(20)) else {
                    continue;
                };
                if let (IpAddr::V4(_), Some(Packet::Query { id, .. })) =
                    (from.ip(), Packet::read(&datagram))
                {
                    let path = format!("local/{hash_part}.narinfo");
                    let have = Packet::Have { id: id.wrapping_add(shift), port: PORT.into(), path };
                    sender.send_to(&have.write(), from).unwrap();
                }
            }
            asking.join().unwrap()
        })
    };
    // Answers from another port, from another network, and with another ID.
    assert_eq!(answered_by(&other.udp(40_000), 0), 404);
    let strange = other.in_net(|| UdpSocket::bind((Ipv4Addr::new(203, 0, 113, 2), 0)).unwrap());
    assert_eq!(answered_by(&strange, 0), 404);
    assert_eq!(answered_by(&listener, 1), 404);
    assert!(!asked.load(Ordering::Relaxed), "a spoofed answer was followed");
    wait_for("the true answer is believed", || (answered_by(&listener, 0) == 200).then_some(()));
}
