//! Second part of `make bench`: peers on other networks, simulated by namespaces with delayed and
//! slow links.
//!
//! 1. Lookups among 500 peers at 50 ms round trip, of a path that one peer has and of a path that
//!    none has; the result is in round trips. The tracker and the holder are real. The other 499
//!    peers are a stand-in with real filters.
//! 2. A NAR of 256 MiB of text over a link of 100 Mbit/s and 40 ms: through both daemons, compared
//!    with the uncompressed NAR.
//!
//! Flags: `--rounds N` (default 3), `--only 1,2`. Asserts that answers are right, and nothing about
//! time.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../shared/mod.rs"]
mod shared;

use common::http::{Connection, Reply, Server};
use common::tracker::{self, Tracker};
use common::{Daemon, Host, PORT, Wan, stock, wait_for, world};
use peerix::nix::{HashPart, nix32};
use peerix::wire::filter::BloomFilter;
use peerix::wire::tracker::{
    Announce, Identity, KEY_HEADER, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use shared::client::{Body, Client};
use shared::scene;
use shared::table::{Series, Table};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Number of stand-in peers beside the holder.
const CROWD: u32 = 499;
/// Paths in the filter of each stand-in peer.
const PATHS: u32 = 20_000;
/// Lookups per round.
const LOOKUPS: usize = 20;
/// Round-trip time of the first part.
const ROUND_TRIP: Duration = Duration::from_millis(50);
/// Link speed of the second part, in Mbit/s.
const MEGABITS: u32 = 100;
/// Round-trip time of the second part.
const LINK_ROUND_TRIP: Duration = Duration::from_millis(40);
/// Size of the NAR of the second part, in MiB.
const MEBIBYTES: u32 = 256;

fn main() {
    let (mut rounds, mut only) = (3usize, "1,2".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--bench", _) => break,
            ("--rounds", Some(value)) => rounds = value.parse().expect("--rounds N"),
            ("--only", Some(value)) => only = value,
            _ => panic!("--rounds N, --only 1,2"),
        }
    }
    let mut table = Table::new();
    for number in only.split(',') {
        match number {
            "1" => lookups(rounds, &mut table),
            "2" => compressed(rounds, &mut table),
            _ => panic!("--only 1,2"),
        }
    }
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    std::fs::create_dir_all(&results).expect("a directory for results");
    std::fs::write(results.join("wan.md"), table.text()).expect("the table is written");
}

fn lookups(rounds: usize, table: &mut Table) {
    let wan = Wan::new();
    let tracker = Tracker::start(wan.lan([10, 3, 0]).host("tracker"));
    let crowd = Crowd::start(&wan, &tracker);
    let away = wan.lan([10, 1, 0]);
    let holder = away.host("holder");
    stock::ready(&holder);
    let paths: Vec<String> = (0..LOOKUPS)
        .map(|i| stock::add(&holder, &format!("path{i}"), &format!("echo {i} > $n")))
        .collect();
    let _holding = node(&holder, &tracker);
    let asker = wan.lan([10, 2, 0]).host("asker");
    stock::ready(&asker);
    let _asking = node(&asker, &tracker);
    // Until the tracker has the holder's filter, a lookup treats it as a peer without a filter.
    wait_for("the holder is a candidate", || {
        let found = tracker.get(&format!("/lookup/{}", world::hash_part(&paths[0])));
        let listed = found["candidates"].as_array()?;
        listed.iter().any(|candidate| candidate["peer_id"] == "holder").then_some(())
    });
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    let present = scene::narinfos("", &scene::hash_parts(&paths));
    let _delay = asker.delay(ROUND_TRIP);
    for (what, status, goal) in [("hit", 200, "≤ 3"), ("miss", 404, "≤ 2")] {
        let (mut medians, mut worst) = (Series::default(), Series::default());
        for _ in 0..rounds {
            let routes = if status == 200 {
                present.clone()
            } else {
                scene::narinfos("", &scene::absent(LOOKUPS))
            };
            // The idle connections of the previous round close first. Reusing one would save a
            // round trip.
            std::thread::sleep(Duration::from_secs(31));
            let elapsed = scene::latencies(&asker, local, &routes, status);
            let trips = |ms: f64| ms / 1e3 / ROUND_TRIP.as_secs_f64();
            medians.push(trips(elapsed.median()));
            worst.push(trips(elapsed.percentile(100)));
        }
        table.alone(
            &format!("1. {what} among 500 WAN peers, median, in round trips of 50 ms"),
            &medians,
            goal,
        );
        table.alone(
            &format!("1. {what} among 500 WAN peers, the longest of {LOOKUPS}"),
            &worst,
            "",
        );
    }
    drop(crowd);
}

/// Starts a node that shares everything with everyone.
fn node(host: &Host, tracker: &Tracker) -> Daemon {
    let flags = tracker::open(host, "wan", &[&tracker.host]);
    Daemon::start(host, &flags.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Stand-in peers without the wanted paths, all on one host, each at its own address.
struct Crowd {
    _http: Server,
    stop: Arc<AtomicBool>,
    udp: Option<JoinHandle<()>>,
    _host: Host,
}

impl Crowd {
    fn start(wan: &Wan, tracker: &Tracker) -> Crowd {
        let host = wan.lan([10, 4, 0]).host("crowd");
        wan.all_at("10.9.0.0/16", &host);
        let addresses: Vec<Ipv4Addr> =
            (1..=CROWD).map(|i| Ipv4Addr::from_bits(0x0a09_0000 + i)).collect();
        let http = Server::start(host.listen(PORT), |_| Reply::Whole(404, b"not found\n".to_vec()));
        let sockets: Vec<UdpSocket> = host.in_net(|| {
            let bind = |address: &Ipv4Addr| {
                UdpSocket::bind((*address, PORT)).expect("an address of the host")
            };
            addresses.iter().map(bind).collect()
        });
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let udp = std::thread::spawn(move || say_no(&sockets, &stopped));
        addresses
            .iter()
            .enumerate()
            .for_each(|(number, address)| register(&host, tracker, number as u32, *address));
        Crowd { _http: http, stop, udp: Some(udp), _host: host }
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.udp.take() {
            let _ = thread.join();
        }
    }
}

/// Answers every query with *have not* until `stopped` is set.
fn say_no(sockets: &[UdpSocket], stopped: &AtomicBool) {
    let tick = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    while !stopped.load(Ordering::Relaxed) {
        let mut fds: Vec<PollFd<'_>> =
            sockets.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        if !poll(&mut fds, Some(&tick)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        let ready: Vec<bool> = fds.iter().map(|fd| fd.revents().contains(PollFlags::IN)).collect();
        for (socket, _) in sockets.iter().zip(ready).filter(|(_, ready)| *ready) {
            let mut query = [0; 300];
            if let Ok((len, from)) = socket.recv_from(&mut query)
                && len > 5
            {
                let _ = socket.send_to(&[2, query[1], query[2], query[3], query[4]], from);
            }
        }
    }
}

/// Announces a stand-in peer and uploads its filter, from the peer's own address.
fn register(host: &Host, tracker: &Tracker, number: u32, address: Ipv4Addr) {
    let to = SocketAddr::from((tracker.host.address, tracker::PORT));
    let stream = host.in_net(|| {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
            .expect("a socket");
        socket.bind(&SocketAddr::from((address, 0)).into()).expect("an address of the host");
        socket.connect(&to.into()).expect("the tracker is there");
        socket
    });
    let mut connection = Connection::new(stream.into()).expect("a connection");
    let peer_id = format!("crowd-{number}");
    let mut seed = [1; Identity::SEED_LEN];
    seed[..4].copy_from_slice(&number.to_be_bytes());
    let identity = Identity::from_seed(&seed);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set").as_millis()
        as u64;
    let statement = SignedText::Announce { peer_id: &peer_id, port: PORT, addr: "" };
    let proof = identity.sign(&statement, now);
    let announce = Announce {
        peer_id: Some(peer_id.clone()),
        port: Some(PORT),
        addr: None,
        instance: None,
        proof,
    };
    let body = serde_json::to_vec(&announce).expect("JSON");
    let json = "Content-Type: application/json\r\n";
    assert_eq!(
        connection.request_with_body("POST", "/announce", json, &body).expect("an answer").status,
        200
    );
    let mut filter = BloomFilter::for_paths(PATHS.into());
    for path in 0..PATHS {
        let mut name = [0; 8];
        name[..4].copy_from_slice(&number.to_be_bytes());
        name[4..].copy_from_slice(&path.to_be_bytes());
        let digest = ring::digest::digest(&ring::digest::SHA256, &name);
        let hash_part =
            HashPart::parse(nix32::encode(&digest.as_ref()[..20]).as_bytes()).expect("Nix32");
        filter.insert(&hash_part);
    }
    let digest = ring::digest::digest(&ring::digest::SHA256, filter.as_bytes());
    let proof =
        identity.sign(&SignedText::Filter { peer_id: &peer_id, digest: digest.as_ref() }, now + 1);
    let fields = format!(
        "{KEY_HEADER}: {}\r\n{TIMESTAMP_HEADER}: {}\r\n{SIGNATURE_HEADER}: {}\r\n",
        proof.public_key.expect("signed"),
        now + 1,
        proof.signature.expect("signed")
    );
    let answer = connection.request_with_body(
        "PUT",
        &format!("/filter/{peer_id}"),
        &fields,
        filter.as_bytes(),
    );
    let answer = answer.expect("an answer");
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn compressed(rounds: usize, table: &mut Table) {
    let wan = Wan::new();
    let tracker = Tracker::start(wan.lan([10, 3, 0]).host("tracker"));
    let holder = wan.lan([10, 1, 0]).host("holder");
    stock::ready(&holder);
    // Text of numbers from `seq` compresses better than most data; programs shrink to 40 %.
    let path = stock::add_large(&holder, "text", MEBIBYTES);
    let programs = stock::add(
        &holder,
        "programs",
        &format!("cat /usr/bin/* 2>/dev/null | head -c {MEBIBYTES}M > $n"),
    );
    let _holding = node(&holder, &tracker);
    let asker = wan.lan([10, 2, 0]).host("asker");
    stock::ready(&asker);
    // Set before any connection exists: the round-trip estimate of an older connection takes
    // seconds to adapt to the longer path.
    asker.slow(MEGABITS);
    let _delay = asker.delay(LINK_ROUND_TRIP);
    let _asking = node(&asker, &tracker);
    let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
    for (what, path, goal) in [("text", path, "≥ 2.5"), ("programs", programs, "")] {
        let narinfo = format!("/{}.narinfo", world::hash_part(&path));
        wait_for("the path is found", || {
            let answer = Connection::new(asker.connect_local().ok()?).ok()?.get(&narinfo).ok()?;
            (answer.status == 200).then_some(())
        });
        let plain = stock::nar_route(&asker, &holder, &path);
        let (mut ours, mut theirs) = (Series::default(), Series::default());
        for _ in 0..rounds {
            let began = Instant::now();
            let route = scene::nar_route(&asker, local, &narinfo);
            drop_body(&asker, local, &route);
            ours.push(began.elapsed().as_secs_f64());
            let began = Instant::now();
            drop_body(&asker, (holder.address, PORT), &plain);
            theirs.push(began.elapsed().as_secs_f64());
        }
        let megabytes =
            format!("2. NAR of {MEBIBYTES} MiB of {what} over {MEGABITS} Mbit/s, 40 ms, seconds");
        table.beside(
            &megabytes,
            &ours,
            "the same uncompressed, as the original sends it",
            &theirs,
            goal,
        );
    }
}

/// Requests a body and discards it.
fn drop_body(host: &Host, to: impl Into<SocketAddr>, route: &str) {
    Client::new(host.connect(to).expect("a server")).get(route, "", Body::Dropped);
}
