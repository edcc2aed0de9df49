//! Other networks on a bad day: packets are lost, trackers restart, lie or are flooded, machines
//! move. Nix gets what peers have all the same, and who runs a node is told what only a person can
//! mend.

use crate::common::daemon::{found, narinfo_status, status};
use crate::common::http::{self, Reply, Request, Server};
use crate::common::lan::Run;
use crate::common::scene::Places;
use crate::common::standin::{Record, Shelf};
use crate::common::tracker::{self, Tracker, open};
use crate::common::{
    Asker, Daemon, Holder, Host, PORT, Scale, Wan, World, nix, wait_for, wait_slowly_for, world,
};
use serde_json::Value;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Intervals of a twentieth: nodes announce themselves every three seconds.
const OFTEN: f64 = 0.05;

/// Connections that Nix asks on.
const NIX: usize = 25;

/// The paths of the closure of 1,000, of which the holder knows.
fn closure(holder: &Holder, places: &Places) -> Vec<String> {
    nix::closure(&holder.host, &[places.world.path("closure1000")])
}

/// A path that is nowhere.
fn absent(number: usize) -> String {
    format!("/nix/store/{number:0>32}-absent")
}

/// The problems that the peerix on a host tells of.
fn problems(host: &Host) -> Vec<String> {
    let status = status(host);
    let problems = status["health"]["problems"].as_array().expect("a list").iter();
    problems.map(|problem| problem["text"].as_str().expect("a text").to_owned()).collect()
}

/// Waits until the peerix on `host` tells of a problem of which the text has all of `words`.
fn wait_for_problem(host: &Host, words: &[&str]) {
    wait_slowly_for(&format!("a problem about {words:?}"), || {
        problems(host).iter().any(|text| words.iter().all(|word| text.contains(word))).then_some(())
    });
}

/// One lost SYN of a tracker's connection used to make every path missing until the next announce.
#[test]
fn lost_packets_are_no_misses() {
    let places = Places::new();
    let holder = places.holder("holder");
    let _far = holder.host.delay(Duration::from_millis(20));
    let asker = places.asker(&[&holder]);
    let paths = closure(&holder, &places);
    for host in [&asker.host, &places.tracker.host, &holder.host] {
        host.lose(1);
    }
    // New connections are where it hurts.
    for round in 0..4 {
        assert_eq!(found(&asker.host, &paths, NIX), paths.len(), "round {round}");
    }
    assert_eq!(asker.fetches(&places.world, places.world.path("closure1000")).len(), 1000);
}

/// Every lookup used to be a miss for 50 s.
#[test]
fn restart_of_the_tracker_is_no_miss() {
    let mut places = Places::new();
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let paths = closure(&holder, &places);
    wait_for("the tracker has the filter", || {
        let found = places.tracker.get(&format!("/lookup/{}", world::hash_part(&paths[0])));
        (!found["candidates"].as_array()?.is_empty()).then_some(())
    });
    for _ in 0..3 {
        let tracker = &mut places.tracker;
        let all = std::thread::scope(|scope| {
            let lookups = scope.spawn(|| found(&asker.host, &paths, NIX));
            tracker.kill();
            tracker.start_again();
            lookups.join().unwrap()
        });
        assert_eq!(all, paths.len());
        assert_eq!(found(&asker.host, &paths, NIX), paths.len());
    }
    let Places { world, tracker, .. } = &mut places;
    asker.fetches_while(world, || {
        tracker.kill();
        tracker.start_again();
    });
}

/// A tracker that was away for long is used again two seconds after it is back, for as long as Nix
/// wants paths.
#[test]
fn tracker_that_was_away_is_used_again_soon() {
    let mut places = Places::new();
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    places.tracker.kill();
    let left_out = || asker.daemon.log().contains("left out until it is reached again");
    wait_slowly_for("the tracker is left out", || {
        assert_eq!(narinfo_status(&asker.host, &holder.mark), 404);
        left_out().then_some(())
    });
    std::thread::sleep(Duration::from_secs(10));
    narinfo_status(&asker.host, &holder.mark);
    places.tracker.start_again();
    let back = Instant::now();
    wait_slowly_for("the path is found", || {
        (narinfo_status(&asker.host, &holder.mark) == 200).then_some(())
    });
    println!("found {:?} after the tracker's return", back.elapsed());
}

/// Of a tracker that was away for a second, every report used to be lost.
#[test]
fn reports_wait_until_the_tracker_is_back() {
    let mut places = Places::with_scale(Scale::intervals(OFTEN));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let path = places.world.path("closure1000");
    asker.host.slow(10);
    let child = nix::realising(&asker.host, &[path]).spawn().expect("nsenter starts");
    // Narinfos come first, so that the other transfers have their names by then.
    let counted = |tracker: &Tracker| tracker.reputation("holder", "total_shared");
    wait_slowly_for("some of the transfers are counted", || {
        (counted(&places.tracker) > 0).then_some(())
    });
    let counted_before = counted(&places.tracker);
    places.tracker.kill();
    asker.host.quick();
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    // Longer than a report used to be tried.
    std::thread::sleep(Duration::from_secs(10));
    places.tracker.start_again();
    let paths = nix::closure(&asker.host, &[path]);
    let sizes = asker.host.cmd("nix-store").args(["--query", "--size"]).args(paths).okay();
    let bytes: u64 = sizes.lines().map(|size| size.parse::<u64>().expect("a number")).sum();
    assert!(counted_before < bytes, "the tracker was killed too late");
    let tracker = &places.tracker;
    wait_slowly_for("all transfers are counted", || {
        (tracker.reputation("holder", "total_shared") == bytes).then_some(())
    });
    assert_eq!(tracker.reputation("holder", "failed_transfers"), 0);
}

/// Reports to a tracker that has too much to do used to be 600 requests in 0.2 s, and to be lost.
#[test]
fn tracker_that_asks_for_patience_gets_it() {
    let wan = Wan::new().with_scale(Scale::intervals(OFTEN));
    let (home, centre) = (wan.lan([10, 1, 0]), wan.lan([198, 51, 100]));
    let host = centre.host("tracker");
    let requests: Record<Instant> = Arc::default();
    let record = Arc::clone(&requests);
    let _server = Server::start(host.listen(tracker::PORT), move |_| {
        record.lock().unwrap().push(Instant::now());
        Reply::Raw(b"HTTP/1.1 429 x\r\nRetry-After: 5\r\nContent-Length: 2\r\n\r\n{}".to_vec())
    });
    let asker = Asker::flagged(&home, "", &[], |asker| tracker::flags(asker, "wan", &[&host]));
    let began = Instant::now();
    // Lookups do not hang for it, and do not hurry it either.
    for number in 0..200 {
        assert_eq!(narinfo_status(&asker.host, &absent(number)), 404);
    }
    wait_slowly_for("ten seconds", || (began.elapsed() > Duration::from_secs(10)).then_some(()));
    let requests = requests.lock().unwrap();
    let last = *requests.last().expect("it is asked");
    let seconds = last.duration_since(requests[0]).as_secs_f64();
    assert!(requests.len() >= 2, "it is asked again");
    assert!(requests.len() as f64 <= 6.0 + seconds, "{} requests in {seconds} s", requests.len());
}

/// An upstream cache that answers narinfos as `answer` does, which is told whether they were
/// uploaded.
fn upstream(
    places: &Places,
    answer: impl Fn(bool, Vec<u8>) -> Reply + Send + Sync + 'static,
) -> (String, Switch, Server) {
    let host = places.centre.host("upstream");
    let (shelf, switch) = (Shelf::of(&places.world), Arc::new(AtomicBool::new(false)));
    let is_on = Arc::clone(&switch);
    let server = Server::start(host.listen(8080), move |request: &Request| {
        let hash_part = request.path.trim_start_matches('/').trim_end_matches(".narinfo");
        match shelf.narinfo(hash_part) {
            Some(fields) => {
                let text: String =
                    fields.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
                answer(is_on.load(Ordering::SeqCst), text.into_bytes())
            }
            None => Reply::Whole(404, vec![]),
        }
    });
    (format!("http://{}:8080", host.address), switch, server)
}

type Switch = Arc<AtomicBool>;

/// A holder that verifies with that upstream cache, whose signatures prove nothing.
fn verifying(places: &Places, url: &str) -> Holder {
    Holder::with(&places.away, &places.world, "holder", |host| {
        places.world.sign(host);
        let mut flags = tracker::flags(host, "wan", &[&places.tracker.host]);
        flags.extend(["--upstream-cache", url].map(str::to_owned));
        flags
    })
}

/// Checks that a holder of which upstream's answers were of no use shares its paths once they are.
fn is_shared_once_upstream_has_it(answer: impl Fn(bool, Vec<u8>) -> Reply + Send + Sync + 'static) {
    let places = Places::with_scale(Scale::intervals(OFTEN));
    let (url, switch, _server) = upstream(&places, answer);
    let holder = verifying(&places, &url);
    let asker = places.asker(&[]);
    let path = places.world.path("little");
    wait_slowly_for("the holder's filter", || {
        let found = places.tracker.get(&format!("/lookup/{}", world::hash_part(path)));
        assert!(found["candidates"].as_array()?.is_empty(), "it is in the filter");
        holder.daemon.log().contains("would be shared with strangers").then_some(())
    });
    assert_eq!(narinfo_status(&asker.host, path), 404);
    switch.store(true, Ordering::SeqCst);
    wait_slowly_for("the filter has the path", || {
        let found = places.tracker.get(&format!("/lookup/{}", world::hash_part(path)));
        (!found["candidates"].as_array()?.is_empty()).then_some(())
    });
    asker.fetches(&places.world, path);
}

/// Upstream used to be asked once: what was built before it was uploaded was never published.
#[test]
fn path_uploaded_after_it_was_built_is_shared() {
    is_shared_once_upstream_has_it(|is_uploaded, narinfo| match is_uploaded {
        true => Reply::Whole(200, narinfo),
        false => Reply::Whole(404, vec![]),
    });
}

/// What was asked about at the login page of a network was never published.
#[test]
fn login_page_in_front_of_upstream_is_no_answer() {
    is_shared_once_upstream_has_it(|is_logged_in, narinfo| match is_logged_in {
        true => Reply::Whole(200, narinfo),
        false => Reply::Whole(200, b"<html>please log in</html>".to_vec()),
    });
}

/// A holder that gets another address used not to be found for a minute.
#[test]
fn holder_that_moves_is_found() {
    let places = Places::new();
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let [old, new] = [holder.host.address, places.away.address(77)];
    holder.host.net(&format!("ip addr del {old}/24 dev eth0"));
    holder.host.net(&format!("ip addr add {new}/24 brd + dev eth0"));
    holder.host.net(&format!("ip route add default via {}", places.away.address(254)));
    let moved = Instant::now();
    let is_there = || places.tracker.peers().contains(&("holder".into(), new.to_string()));
    wait_slowly_for("the tracker knows the new address", || is_there().then_some(()));
    println!("announced {:?} after the move", moved.elapsed());
    wait_slowly_for("the path is found", || {
        (narinfo_status(&asker.host, &holder.mark) == 200).then_some(())
    });
    println!("found {:?} after the move", moved.elapsed());
    assert!(moved.elapsed() < Duration::from_secs(50), "only at the next regular announce");
    asker.fetches(&places.world, places.world.path("closure300"));
}

/// Each path used to be found now and then, and nothing said why.
#[test]
fn two_machines_with_one_identity_are_told() {
    let places = Places::with_scale(Scale::intervals(OFTEN));
    let seed: &str = "peerix-identity:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\n";
    let clone = |name: &str| {
        Holder::with(&places.away, &places.world, name, |host| {
            host.write("/var/lib/peerix/identity", seed);
            let mut flags = open(host, "wan", &[&places.tracker.host]);
            let at = flags.iter().position(|flag| flag == "--peer-id").unwrap();
            flags.drain(at..at + 2);
            flags
        })
    };
    let clones = ["one", "two"].map(clone);
    for (of, other) in [(0, 1), (1, 0)] {
        wait_for_problem(&clones[of].host, &["identity", &clones[other].host.address.to_string()]);
    }
}

/// Refused, a node used to be as well as any.
#[test]
fn refused_announce_is_a_problem() {
    let places = Places::with_scale(Scale::intervals(OFTEN));
    let thief = places.away.host("thief");
    places.tracker.announce_with(&thief, PORT, "holder", &[]);
    let holder = places.holder("holder");
    wait_for_problem(&holder.host, &["does not take this node", "bound to another key"]);
    assert_eq!(status(&holder.host)["trackers"][0]["reached"], true);
}

/// Where nobody reaches it, a node used to be as well as any.
#[test]
fn unreachable_address_is_a_problem_and_comes_last() {
    let places = Places::with_scale(Scale::intervals(OFTEN));
    places.wan.blackhole("10.8.0.0/16");
    let wrong = Holder::with(&places.away, &places.world, "wrong", |host| {
        places.world.sign(host);
        let mut flags = open(host, "wan", &[&places.tracker.host]);
        flags.extend(["--announce-addr", "10.8.0.1"].map(str::to_owned));
        flags
    });
    wait_for_problem(&wrong.host, &["reaches no peerix", "--announce-addr"]);
    let holder = places.holder("holder");
    let path = places.world.path("little");
    let candidates = || {
        let found = places.tracker.get(&format!("/lookup/{}", world::hash_part(path)));
        let ids = found["candidates"].as_array().unwrap().iter();
        ids.map(|candidate| candidate["peer_id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    wait_slowly_for("the reached one comes first", || {
        (candidates() == ["holder", "wrong"]).then_some(())
    });
    let problems = problems(&holder.host);
    assert!(problems.iter().all(|text| !text.contains("tracker")), "{problems:?}");
    let asker = places.asker(&[&holder]);
    asker.fetches(&places.world, path);
}

/// A tracker that records announces, refuses them as told, and names nobody.
fn recording(host: &Host, answer: &'static str, status: u16) -> (Record<Value>, Server) {
    let announces: Record<Value> = Arc::default();
    let record = Arc::clone(&announces);
    let server = Server::start(host.listen(tracker::PORT), move |request: &Request| match request
        .path
        .as_str()
    {
        "/announce" if request.method == "POST" => {
            record.lock().unwrap().push(serde_json::from_slice(&request.body).expect("JSON"));
            Reply::Whole(status, answer.into())
        }
        _ => Reply::Whole(200, br#"{"candidates": [], "others": []}"#.to_vec()),
    });
    (announces, server)
}

/// A tracker used to be able to replay a node's announces at other trackers, as they were signed by
/// one key, and to have it sign for any time.
#[test]
fn tracker_gets_nothing_that_means_anything_elsewhere_or_later() {
    let wan = Wan::new().with_scale(Scale::intervals(OFTEN));
    let (home, centre) = (wan.lan([10, 1, 0]), wan.lan([198, 51, 100]));
    let hosts = ["one", "two"].map(|name| centre.host(name));
    let (one, _first) = recording(&hosts[0], r#"{"status": "ok"}"#, 200);
    let far_future = r#"{"error": "timestamp: not within 5 minutes of the tracker's clock", "now": 4000000000000}"#;
    let (two, _second) = recording(&hosts[1], far_future, 403);
    let asker = Asker::flagged(&home, "", &[], |host| {
        let mut flags = tracker::flags(host, "wan", &hosts.each_ref());
        let at = flags.iter().position(|flag| flag == "--peer-id").unwrap();
        flags.drain(at..at + 2);
        flags
    });
    wait_for_problem(&asker.host, &["clock", "slow"]);
    wait_for("both were told", || (!one.lock().unwrap().is_empty()).then_some(()));
    let (one, two) = (one.lock().unwrap(), two.lock().unwrap());
    assert_ne!(one[0]["public_key"], two[0]["public_key"]);
    assert_ne!(one[0]["peer_id"], two[0]["peer_id"]);
    let tomorrow =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis()
            + 86_400_000;
    for announce in one.iter().chain(two.iter()) {
        assert!(u128::from(announce["timestamp"].as_u64().unwrap()) < tomorrow, "{announce}");
    }
}

/// The original's tracker has no lookups: nothing used to be found.
#[test]
fn original_tracker_is_asked_for_its_list() {
    let wan = Wan::new();
    let (home, away, centre) =
        (wan.lan([10, 1, 0]), wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
    let (world, host) = (World::on(&home), centre.host("tracker"));
    let peers: Arc<std::sync::Mutex<Vec<(String, Value)>>> = Arc::default();
    let listed = Arc::clone(&peers);
    let _server = Server::start(host.listen(tracker::PORT), move |request: &Request| {
        match (request.method.as_str(), request.path.as_str()) {
            ("POST", "/announce") => {
                let announce: Value = serde_json::from_slice(&request.body).expect("JSON");
                let id = announce["peer_id"].as_str().unwrap().to_owned();
                let mut peers = listed.lock().unwrap();
                peers.retain(|(known, _)| *known != id);
                peers.push((id, announce["port"].clone()));
                Reply::Whole(200, br#"{"status":"ok"}"#.to_vec())
            }
            ("GET", "/peers") => {
                let reputation = r#"{"total_shared":0,"total_received":0,"successful_transfers":0,"failed_transfers":0,"score":0.0}"#;
                let row = |(id, port): &(String, Value)| {
                    let addr = if id == "holder" { "203.0.113.1" } else { "10.1.0.99" };
                    format!(
                        r#"{{"peer_id":"{id}","addr":"{addr}","port":{port},"last_seen":1.5,"reputation":{reputation}}}"#
                    )
                };
                let rows: Vec<String> = listed.lock().unwrap().iter().map(row).collect();
                Reply::Whole(200, format!(r#"{{"peers":[{}]}}"#, rows.join(",")).into_bytes())
            }
            _ => Reply::Whole(404, br#"{"detail":"Not Found"}"#.to_vec()),
        }
    });
    let holder = Holder::with(&away, &world, "holder", |host_of| {
        world.sign(host_of);
        open(host_of, "wan", &[&host])
    });
    assert_eq!(holder.host.address.to_string(), "203.0.113.1");
    let asker = Asker::flagged(&home, "", &[&world.cache_key], |host_of| {
        tracker::flags(host_of, "wan", &[&host])
    });
    asker.meet(&[&holder]);
    assert_eq!(asker.fetches(&world, world.path("closure300")).len(), 300);
    assert_eq!(narinfo_status(&asker.host, &absent(1)), 404);
}

/// An answer to a lookup that names these addresses and ports.
fn candidates(addresses: impl Iterator<Item = (String, u16)>) -> Reply {
    let one = |(addr, port)| {
        format!(r#"{{"peer_id":"{addr}:{port}","addr":"{addr}","port":{port},"score":9.5}}"#)
    };
    let list: Vec<String> = addresses.map(one).collect();
    Reply::Whole(200, format!(r#"{{"candidates":[{}],"others":[]}}"#, list.join(",")).into_bytes())
}

/// A hostile tracker used to have one node send a victim 58,000 datagrams a second.
#[test]
fn victim_that_a_tracker_names_is_not_flooded() {
    let wan = Wan::new();
    let (home, away, centre) =
        (wan.lan([10, 1, 0]), wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
    let (host, victim) = (centre.host("tracker"), away.host("victim"));
    let (address, next) = (victim.address.to_string(), AtomicUsize::new(0));
    let _server = Server::start(host.listen(tracker::PORT), move |request: &Request| {
        if !request.path.starts_with("/lookup/") {
            return Reply::Whole(200, br#"{"status":"ok"}"#.to_vec());
        }
        let from = next.fetch_add(64, Ordering::Relaxed) % 60_000;
        candidates((from..from + 64).map(|port| (address.clone(), 1000 + port as u16)))
    });
    let asker = Asker::flagged(&home, "", &[], |asker| tracker::flags(asker, "wan", &[&host]));
    wait_for("the tracker is reached", || {
        (status(&asker.host)["trackers"][0]["reached"] == true).then_some(())
    });
    let (before, began) = (victim.packets(), Instant::now());
    let paths: Vec<String> = (0..1000).map(absent).collect();
    assert_eq!(found(&asker.host, &paths, NIX), 0);
    // What came and what was answered, with a second that a burst is ahead.
    let seconds = began.elapsed().as_secs_f64() + 1.0;
    let packets = (victim.packets() - before) as f64;
    println!("{packets} packets in {seconds} s");
    assert!(packets <= 20.0 * seconds + 20.0, "{packets} packets in {seconds} s");
}

/// Invented peers of a tracker used to take all requests there may be, and neighbours were asked
/// for nothing.
#[test]
fn invented_peers_do_not_hide_neighbours() {
    let wan = Wan::new();
    let (home, centre) = (wan.lan([10, 1, 0]), wan.lan([198, 51, 100]));
    let (world, host) = (World::on(&home), centre.host("tracker"));
    wan.blackhole("10.8.0.0/16");
    let _server = Server::start(host.listen(tracker::PORT), move |request: &Request| {
        if !request.path.starts_with("/lookup/") {
            return Reply::Whole(200, br#"{"status":"ok"}"#.to_vec());
        }
        // Half of them are on the asker's own network, where nobody answers for them.
        let address = |n: u8| {
            if n.is_multiple_of(2) { format!("10.1.0.{}", 100 + n) } else { format!("10.8.0.{n}") }
        };
        candidates((1..65).map(|n| (address(n), 12304)))
    });
    let holder = Holder::with(&home, &world, "holder", |host| {
        world.sign(host);
        vec![]
    });
    let asker = Asker::flagged(&home, "", &[&world.cache_key], |asker| {
        tracker::flags(asker, "both", &[&host])
    });
    asker.meet(&[&holder]);
    let paths = nix::closure(&holder.host, &[world.path("closure300")]);
    let missing: Vec<String> = (0..200).map(absent).collect();
    std::thread::scope(|scope| {
        let misses = scope.spawn(|| found(&asker.host, &missing, NIX));
        for _ in 0..3 {
            assert_eq!(found(&asker.host, &paths, NIX), paths.len());
        }
        assert_eq!(misses.join().unwrap(), 0);
    });
}

/// Peers that died a moment ago, and whose filters match, used to hide the one that lives.
#[test]
fn dead_candidates_do_not_hide_a_living_one() {
    let places = Places::new();
    let holder = places.holder("holder");
    let paths = closure(&holder, &places);
    let asker = places.asker(&[&holder]);
    let dead = places.away.host("dead");
    for number in 0..50 {
        places.tracker.announce_with(
            &dead,
            20_000 + number,
            &format!("dead-{number}"),
            &paths[..40],
        );
    }
    dead.fall_silent();
    for path in &paths[..40] {
        assert_eq!(narinfo_status(&asker.host, path), 200, "{path}");
    }
}

/// A full disk used to be none of the tracker's business.
#[test]
fn tracker_whose_disk_is_full_is_not_well() {
    let wan = Wan::new();
    let host = wan.lan([198, 51, 100]).host("tracker");
    host.sh("mkdir -p /var/lib/peerix-tracker && mount -t tmpfs -o size=40m none /var/lib/peerix-tracker");
    let tracker = Tracker::start(host);
    tracker.host.sh("dd if=/dev/zero of=/var/lib/peerix-tracker/full bs=1M 2>/dev/null || true");
    let health =
        || http::get(&tracker.host, (tracker.host.address, tracker::PORT), "/health").unwrap();
    wait_slowly_for("it says so", || {
        let answer = health();
        (answer.status == 503 && answer.text().contains("the disk is full")).then_some(())
    });
    fs::remove_file(tracker.host.path("/var/lib/peerix-tracker/full")).unwrap();
    wait_slowly_for("it is well again", || (health().status == 200).then_some(()));
}

/// The first lookup after a start waits for the tracker's first answer.
#[test]
fn first_lookup_after_a_start_is_no_miss() {
    let places = Places::new();
    let holder = places.holder("holder");
    let mut asker = places.asker(&[&holder]);
    let flags = tracker::flags(&asker.host, "wan", &[&places.tracker.host]);
    let mut flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    flags.extend(["--trusted-public-key", &places.world.cache_key]);
    for _ in 0..5 {
        assert!(asker.daemon.stop().success());
        asker.daemon = Daemon::start(&asker.host, &flags);
        assert_eq!(narinfo_status(&asker.host, places.world.path("little")), 200);
    }
}
