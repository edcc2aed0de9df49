//! WAN mode under faults: packets are lost, trackers restart, lie or are overloaded, machines move.
//! Nix still gets the paths that peers have, and the status reports the problems that the operator
//! has to fix.

use crate::common::daemon::{found, narinfo_status, status};
use crate::common::http::{self, Reply, Request, Server};
use crate::common::lan::Run;
use crate::common::scene::WanScene;
use crate::common::standin::{Received, StaticCache};
use crate::common::tracker::{self, Tracker, open};
use crate::common::{
    Asker, Daemon, Holder, Host, PORT, Scale, Wan, World, nix, wait_for, wait_slowly_for, world,
};
use serde_json::Value;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Scale of the intervals: nodes announce themselves every 3 s instead of 60 s.
const SHORT_INTERVALS: f64 = 0.05;

/// Parallel connections of Nix.
const NIX_CONNECTIONS: usize = 25;

/// The paths of `closure1000`, which the holder has.
fn closure(holder: &Holder, places: &WanScene) -> Vec<String> {
    nix::closure(&holder.host, &[places.world.path("closure1000")])
}

/// A store path that no host has.
fn absent(number: usize) -> String {
    format!("/nix/store/{number:0>32}-absent")
}

/// The texts of the problems in the status of the peerix on a host.
fn problems(host: &Host) -> Vec<String> {
    let status = status(host);
    let problems = status["health"]["problems"].as_array().expect("a list").iter();
    problems.map(|problem| problem["text"].as_str().expect("a text").to_owned()).collect()
}

/// Waits until the peerix on `host` reports a problem whose text contains all `words`.
fn wait_for_problem(host: &Host, words: &[&str]) {
    wait_slowly_for(&format!("a problem about {words:?}"), || {
        problems(host).iter().any(|text| words.iter().all(|word| text.contains(word))).then_some(())
    });
}

/// A lost SYN of a connection to the tracker must not make all paths miss until the next announce.
#[test]
fn lost_packets_cause_no_misses() {
    let places = WanScene::new();
    let holder = places.holder("holder");
    let _far = holder.host.delay(Duration::from_millis(20));
    let asker = places.asker(&[&holder]);
    let paths = closure(&holder, &places);
    for host in [&asker.host, &places.tracker.host, &holder.host] {
        host.lose(1);
    }
    // Packet loss delays new connections most.
    for round in 0..4 {
        assert_eq!(found(&asker.host, &paths, NIX_CONNECTIONS), paths.len(), "round {round}");
    }
    assert_eq!(asker.fetch_and_check(&places.world, places.world.path("closure1000")).len(), 1000);
}

/// Lookups during a restart of the tracker wait for it.
#[test]
fn tracker_restart_causes_no_misses() {
    let mut places = WanScene::new();
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
            let lookups = scope.spawn(|| found(&asker.host, &paths, NIX_CONNECTIONS));
            tracker.kill();
            tracker.start_again();
            lookups.join().unwrap()
        });
        assert_eq!(all, paths.len());
        assert_eq!(found(&asker.host, &paths, NIX_CONNECTIONS), paths.len());
    }
    let WanScene { world, tracker, .. } = &mut places;
    asker.fetch_closure_during(world, || {
        tracker.kill();
        tracker.start_again();
    });
}

/// While lookups miss a tracker, the node tries it every two seconds, here every 0.4 s. Lookups use
/// it again once it has answered.
#[test]
fn tracker_after_outage_answers_lookups_again() {
    let mut places = WanScene::with_scale(Scale::intervals(0.2));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    places.tracker.kill();
    let left_out = || asker.daemon.log().contains("left out until it is reached again");
    wait_slowly_for("the tracker is left out", || {
        assert_eq!(narinfo_status(&asker.host, &holder.mark), 404);
        left_out().then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    narinfo_status(&asker.host, &holder.mark);
    places.tracker.start_again();
    let back = Instant::now();
    wait_slowly_for("the path is found", || {
        (narinfo_status(&asker.host, &holder.mark) == 200).then_some(())
    });
    println!("found {:?} after the tracker's return", back.elapsed());
}

/// The node keeps the reports for a tracker that is down, and sends them when it is back.
#[test]
fn reports_during_tracker_outage_are_sent_afterwards() {
    let mut places = WanScene::with_scale(Scale::intervals(SHORT_INTERVALS));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let path = places.world.path("closure1000");
    asker.host.slow(10);
    let child = nix::realising(&asker.host, &[path]).spawn().expect("nsenter starts");
    // Nix fetches the narinfos first, so the node has asked for IDs of all other transfers by then.
    let counted = |tracker: &Tracker| tracker.reputation("holder", "total_shared");
    wait_slowly_for("some of the transfers are counted", || {
        (counted(&places.tracker) > 0).then_some(())
    });
    let counted_before = counted(&places.tracker);
    places.tracker.kill();
    asker.host.quick();
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    wait_slowly_for("the outage is noticed", || {
        asker.daemon.log().contains("left out until it is reached again").then_some(())
    });
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

/// The node respects `Retry-After` of a busy tracker, instead of sending 600 reports in 0.2 s.
#[test]
fn busy_tracker_gets_few_requests() {
    let wan = Wan::new().with_scale(Scale::intervals(SHORT_INTERVALS));
    let (home, centre) = (wan.lan([10, 1, 0]), wan.lan([198, 51, 100]));
    let host = centre.host("tracker");
    let requests: Received<Instant> = Arc::default();
    let record = Arc::clone(&requests);
    let _server = Server::start(host.listen(tracker::PORT), move |_| {
        record.lock().unwrap().push(Instant::now());
        Reply::Raw(b"HTTP/1.1 429 x\r\nRetry-After: 5\r\nContent-Length: 2\r\n\r\n{}".to_vec())
    });
    let asker = Asker::flagged(&home, "", &[], |asker| tracker::flags(asker, "wan", &[&host]));
    // The answers to lookups do not wait for the busy tracker, and lookups send it no extra
    // requests.
    for number in 0..200 {
        assert_eq!(narinfo_status(&asker.host, &absent(number)), 404);
    }
    wait_slowly_for("it is asked again", || {
        let requests = requests.lock().unwrap();
        (*requests.last()? - requests[0] >= Duration::from_secs(5)).then_some(())
    });
    let requests = requests.lock().unwrap();
    let last = *requests.last().expect("it is asked");
    let seconds = last.duration_since(requests[0]).as_secs_f64();
    assert!(requests.len() as f64 <= 6.0 + seconds, "{} requests in {seconds} s", requests.len());
}

/// An upstream cache whose answers to narinfo requests come from `answer`, which gets the state of
/// the returned switch and the true narinfo.
fn upstream(
    places: &WanScene,
    answer: impl Fn(bool, Vec<u8>) -> Reply + Send + Sync + 'static,
) -> (String, Switch, Server) {
    let host = places.centre.host("upstream");
    let (shelf, switch) = (StaticCache::of(&places.world), Arc::new(AtomicBool::new(false)));
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

/// A holder that checks its paths at this upstream cache, because it trusts none of their
/// signatures.
fn verifying(places: &WanScene, url: &str) -> Holder {
    Holder::with(&places.away, &places.world, "holder", |host| {
        places.world.sign(host);
        let mut flags = tracker::flags(host, "wan", &[&places.tracker.host]);
        flags.extend(["--upstream-cache", url].map(str::to_owned));
        flags
    })
}

/// Checks that a holder publishes its paths once the answers of the upstream cache are usable.
fn assert_shared_once_upstream_answers(
    answer: impl Fn(bool, Vec<u8>) -> Reply + Send + Sync + 'static,
) {
    let places = WanScene::with_scale(Scale::intervals(SHORT_INTERVALS));
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
    asker.fetch_and_check(&places.world, path);
}

/// The holder repeats the check of a path that the upstream cache did not have.
#[test]
fn path_uploaded_upstream_after_build_is_shared() {
    assert_shared_once_upstream_answers(|is_uploaded, narinfo| match is_uploaded {
        true => Reply::Whole(200, narinfo),
        false => Reply::Whole(404, vec![]),
    });
}

/// The holder repeats the check of a path after a login page answered instead of the upstream
/// cache.
#[test]
fn login_page_instead_of_upstream_delays_sharing_only() {
    assert_shared_once_upstream_answers(|is_logged_in, narinfo| match is_logged_in {
        true => Reply::Whole(200, narinfo),
        false => Reply::Whole(200, b"<html>please log in</html>".to_vec()),
    });
}

/// The holder announces a new address before its next regular announce, which is ten minutes away.
#[test]
fn holder_with_new_address_is_found() {
    let places = WanScene::with_scale(Scale::intervals(10.0));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let [old, new] = [holder.host.address, places.away.address(77)];
    holder.host.net(&format!("ip addr del {old}/24 dev eth0"));
    holder.host.net(&format!("ip addr add {new}/24 brd + dev eth0"));
    holder.host.net(&format!("ip route add default via {}", places.away.address(254)));
    let is_there = || places.tracker.peers().contains(&("holder".into(), new.to_string()));
    wait_slowly_for("the tracker knows the new address", || is_there().then_some(()));
    wait_slowly_for("the path is found", || {
        (narinfo_status(&asker.host, &holder.mark) == 200).then_some(())
    });
    asker.fetch_and_check(&places.world, places.world.path("closure300"));
}

/// Peers find such machines only sometimes, because each announce replaces the other's address.
#[test]
fn identity_used_by_two_machines_is_reported() {
    let places = WanScene::with_scale(Scale::intervals(SHORT_INTERVALS));
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

/// The status reports a node that a tracker refuses.
#[test]
fn refused_announce_is_reported() {
    let places = WanScene::with_scale(Scale::intervals(SHORT_INTERVALS));
    let thief = places.away.host("thief");
    places.tracker.announce_with(&thief, PORT, "holder", &[]);
    let holder = places.holder("holder");
    wait_for_problem(&holder.host, &["does not take this node", "bound to another key"]);
    assert_eq!(status(&holder.host)["trackers"][0]["reached"], true);
}

/// The status reports a node that its tracker cannot reach.
#[test]
fn unreachable_address_is_reported_and_listed_last() {
    let places = WanScene::with_scale(Scale::intervals(SHORT_INTERVALS));
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
    asker.fetch_and_check(&places.world, path);
}

/// A tracker that records announces, answers them with `status` and `answer`, and knows no peers.
fn recording(host: &Host, answer: &'static str, status: u16) -> (Received<Value>, Server) {
    let announces: Received<Value> = Arc::default();
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

/// A node signs with a different key for each tracker, so that no tracker can replay announces at
/// another. It signs only timestamps near its own clock, so that no tracker can collect announces
/// for later.
#[test]
fn announces_are_bound_to_one_tracker_and_to_the_local_clock() {
    let wan = Wan::new().with_scale(Scale::intervals(SHORT_INTERVALS));
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

/// The original peerix's tracker has no lookups, so the node uses its list of peers.
#[test]
fn original_tracker_without_lookups_is_asked_for_its_list() {
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
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);
    assert_eq!(narinfo_status(&asker.host, &absent(1)), 404);
}

/// The answer to a lookup with these addresses and ports as candidates.
fn candidates(addresses: impl Iterator<Item = (String, u16)>) -> Reply {
    let one = |(addr, port)| {
        format!(r#"{{"peer_id":"{addr}:{port}","addr":"{addr}","port":{port},"score":9.5}}"#)
    };
    let list: Vec<String> = addresses.map(one).collect();
    Reply::Whole(200, format!(r#"{{"candidates":[{}],"others":[]}}"#, list.join(",")).into_bytes())
}

/// Without a limit, a hostile tracker makes one node send a victim 58,000 packets per second.
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
    assert_eq!(found(&asker.host, &paths, NIX_CONNECTIONS), 0);
    // Packets in both directions. The extra second allows for the initial burst.
    let seconds = began.elapsed().as_secs_f64() + 1.0;
    let packets = (victim.packets() - before) as f64;
    println!("{packets} packets in {seconds} s");
    assert!(packets <= 20.0 * seconds + 20.0, "{packets} packets in {seconds} s");
}

/// Requests to a tracker's invented peers must not use up the capacity for requests to neighbours.
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
        // Half of them are on the asker's own network, at unused addresses.
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
        let misses = scope.spawn(|| found(&asker.host, &missing, NIX_CONNECTIONS));
        for _ in 0..3 {
            assert_eq!(found(&asker.host, &paths, NIX_CONNECTIONS), paths.len());
        }
        assert_eq!(misses.join().unwrap(), 0);
    });
}

/// Peers that died recently and whose filters match must not displace a live candidate.
#[test]
fn dead_candidates_do_not_hide_a_living_one() {
    let places = WanScene::new();
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

/// The tracker reports a full disk in `/health`.
#[test]
fn tracker_with_full_disk_reports_it_in_health() {
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
fn first_lookup_after_start_waits_for_the_tracker() {
    let places = WanScene::new();
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
