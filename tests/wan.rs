//! Peers on other networks, found through a tracker: real Nix fetches real paths from a network
//! that no broadcast reaches.

use crate::common::daemon::narinfo_status;
use crate::common::http::{Reply, Request, Server};
use crate::common::lan::Run;
use crate::common::scene::WanScene;
use crate::common::standin::{self, StandIn, StaticCache, field};
use crate::common::tracker::{self, Tracker, open};
use crate::common::{
    Asker, Daemon, Holder, Host, Nat, PORT, Scale, Wan, World, nix, stock, wait_for,
    wait_slowly_for, world,
};
use std::fs;
use std::time::Duration;

const MIB: u64 = 1 << 20;

/// Size of the file in the NAR of `middle`, in bytes; the NAR is slightly larger.
const MIDDLE: u64 = 64 * MIB;

/// Scale of intervals: peers announce themselves and report transfers every six seconds.
const INTERVAL_SCALE: f64 = 0.1;

/// Total size of the NARs of `paths`, in bytes.
fn nar_bytes(host: &Host, paths: &[String]) -> u64 {
    let sizes = host.cmd("nix-store").args(["--query", "--size"]).args(paths).okay();
    sizes.lines().map(|size| size.parse::<u64>().expect("a number")).sum()
}

#[test]
fn closure_is_fetched_from_peer_on_other_network() {
    let places = WanScene::new();
    let (world, trackers) = (&places.world, [&places.tracker.host]);
    let mut key = String::new();
    let holder = Holder::with(&places.away, world, "holder", |host| {
        key = nix::generate_key(host);
        let mut flags = open(host, "wan", &trackers);
        flags.extend(["--private-key", "/etc/peerix.sec"].map(str::to_owned));
        flags
    });
    let asker =
        Asker::flagged(&places.home, "", &[&key], |host| tracker::flags(host, "wan", &trackers));
    asker.meet(&[&holder]);
    let mut all = asker.fetch_and_check(world, world.path("closure300"));
    assert_eq!(all.len(), 300);
    for name in ["odd", "large", "many"] {
        all.extend(asker.fetch_and_check(world, world.path(name)));
    }
    nix::assert_nothing_but(&asker.host, &all);
    let signatures =
        asker.host.cmd("nix").args(["path-info", "--sigs", world.path("closure300")]).okay();
    assert!(signatures.contains("holder-1:"), "{signatures}");
    // A content-addressed path without a signature that only the holder has.
    nix::realise_quietly(&asker.host, &[&holder.mark]);
    nix::assert_whole(&asker.host, &[&holder.mark], &holder.host.path("/nix/store"));

    // A client that trusts only another key takes nothing.
    let stranger = places.asker(&[&holder]);
    let output = nix::realise(&stranger.host, &[world.path("little")]);
    assert!(!output.status.success(), "a path was taken that no trusted key has signed");
    nix::assert_nothing_but(&stranger.host, &[]);
}

#[test]
fn distant_peer_causes_no_false_miss() {
    let places = WanScene::new();
    let holder = places.holder("holder");
    let _far = holder.host.delay(Duration::from_millis(60));
    let asker = places.asker(&[&holder]);
    assert_eq!(asker.fetch_and_check(&places.world, places.world.path("closure1000")).len(), 1000);
}

#[test]
fn path_added_later_is_found() {
    let places = WanScene::with_scale(Scale::intervals(INTERVAL_SCALE));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let later = stock::add(&holder.host, "later", "echo later > $n");
    // Before the tracker has a filter of the holder, it may name the holder for any path.
    wait_slowly_for("the filter has the new path", || {
        let found = places.tracker.get(&format!("/lookup/{}", world::hash_part(&later)));
        (!found["candidates"].as_array()?.is_empty()).then_some(())
    });
    nix::realise_quietly(&asker.host, &[&later]);
    nix::assert_whole(&asker.host, &[&later], &holder.host.path("/nix/store"));
}

/// Serves the world's static cache over HTTP as an upstream cache. The narinfo of `other` has the
/// hash of another NAR.
fn upstream(places: &WanScene) -> (String, Server) {
    let host = places.centre.host("upstream");
    let (dir, other) =
        (places.world.cache(), world::hash_part(places.world.path("other")).to_owned());
    let little = field(
        &StaticCache::of(&places.world)
            .narinfo(world::hash_part(places.world.path("little")))
            .unwrap(),
        "NarHash",
    )
    .to_owned();
    let server = Server::start(host.listen(8080), move |request| {
        let path = request.path.trim_start_matches('/');
        let Ok(body) = fs::read(dir.join(path)) else { return Reply::Whole(404, b"404".to_vec()) };
        if path != format!("{other}.narinfo") {
            return Reply::Whole(200, body);
        }
        let text = String::from_utf8(body).expect("a narinfo is text");
        let lines: Vec<String> = text
            .lines()
            .map(|line| {
                if line.starts_with("NarHash: ") {
                    format!("NarHash: {little}\n")
                } else {
                    format!("{line}\n")
                }
            })
            .collect();
        Reply::Whole(200, lines.concat().into_bytes())
    });
    (format!("http://{}:8080", host.address), server)
}

#[test]
fn only_paths_of_upstream_cache_are_shared() {
    let places = WanScene::new();
    let (world, trackers) = (&places.world, [&places.tracker.host]);
    let (url, _server) = upstream(&places);
    let mut key = String::new();
    let holder = Holder::with(&places.away, world, "holder", |host| {
        key = nix::generate_key(host);
        let mut flags = tracker::flags(host, "wan", &trackers);
        flags.extend(
            ["--private-key", "/etc/peerix.sec", "--upstream-cache", &url].map(str::to_owned),
        );
        flags
    });
    let asker =
        Asker::flagged(&places.home, "", &[&key], |host| tracker::flags(host, "wan", &trackers));
    wait_for("the holder is known", || {
        (narinfo_status(&asker.host, world.path("little")) == 200).then_some(())
    });
    let closure = asker.fetch_and_check(world, world.path("closure300"));
    assert_eq!(closure.len(), 300);
    // The first two paths are not upstream; the third has another NAR there.
    for path in [&holder.mark, world.path("big"), world.path("other")] {
        assert_eq!(narinfo_status(&asker.host, path), 404, "{path}");
        let status = stock::narinfo(&asker.host, &holder.host, path).status;
        assert!([403, 404].contains(&status), "{path}: {status}");
        assert_eq!(
            narinfo_status(&holder.host, path),
            404,
            "what the own Nix asks has nothing to do with it"
        );
    }
}

#[test]
fn peer_on_own_network_is_preferred() {
    let places = WanScene::new();
    let (world, trackers) = (&places.world, [&places.tracker.host]);
    let far = places.holder("far");
    let near = Holder::with(&places.home, world, "near", |host| {
        world.sign(host);
        open(host, "both", &trackers)
    });
    let asker = Asker::flagged(&places.home, "", &[&world.cache_key], |host| {
        tracker::flags(host, "both", &trackers)
    });
    asker.meet(&[&far, &near]);
    let before = [far.host.sent(), near.host.sent()];
    asker.fetch_and_check(world, world.path("middle"));
    asker.fetch_and_check(world, world.path("closure300"));
    let sent = [far.host.sent() - before[0], near.host.sent() - before[1]];
    assert!(sent[1] > MIDDLE && sent[0] < MIB, "{sent:?} bytes came from far and near");
    // A path that only the remote holder has still comes from there.
    nix::realise_quietly(&asker.host, &[&far.mark]);
}

/// Fetches from a holder behind a router that forwards `port` to it by `protocols`. The tracker is
/// behind the same router, so the address that it sees is useless to others. The asker is behind
/// another router that forwards nothing.
fn behind_a_router(protocols: &[&str], port: u16) {
    let wan = Wan::new();
    let (here, there) = (wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
    let world = World::on(&here);
    let (nat, own) = (Nat::new(&here, [192, 168, 1]), Nat::new(&there, [192, 168, 7]));
    let tracker = Tracker::start(nat.lan.host("tracker"));
    nat.forward("tcp", tracker::PORT, &tracker.host, tracker::PORT);
    let holder = Holder::with(&nat.lan, &world, "holder", |host| {
        world.sign(host);
        for protocol in protocols {
            nat.forward(protocol, port, host, PORT);
        }
        let address = if port == PORT {
            nat.address().to_string()
        } else {
            format!("{}:{port}", nat.address())
        };
        let mut flags = open(host, "wan", &[&tracker.host]);
        flags.extend(["--announce-addr".to_owned(), address]);
        flags
    });
    let asker = Asker::flagged(&own.lan, "", &[&world.cache_key], |host| {
        // From outside, the tracker is at the router's address.
        tracker::flags(host, "wan", &[&nat.router])
    });
    asker.meet(&[&holder]);
    assert!(
        tracker.peers().contains(&("holder".to_owned(), nat.address().to_string())),
        "{:?}",
        tracker.peers()
    );
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);
    asker.fetch_and_check(&world, world.path("large"));
}

#[test]
fn peer_behind_router_with_forwarded_port_is_reached() {
    behind_a_router(&["tcp", "udp"], PORT);
}

#[test]
fn peer_behind_router_with_other_outer_port_is_reached() {
    behind_a_router(&["tcp", "udp"], 20_000);
}

#[test]
fn peer_behind_router_with_tcp_only_is_reached() {
    behind_a_router(&["tcp"], PORT);
}

#[test]
fn one_of_two_trackers_is_enough() {
    let places = WanScene::with_scale(Scale::intervals(INTERVAL_SCALE));
    let WanScene { tracker: mut first, home, away, centre, world, wan: _wan } = places;
    let second = centre.host("second");
    let trackers = [&first.host, &second];
    let holder = Holder::with(&away, &world, "holder", |host| {
        world.sign(host);
        open(host, "wan", &trackers)
    });
    let asker = Asker::flagged(&home, "", &[&world.cache_key], |host| {
        tracker::flags(host, "wan", &trackers)
    });
    asker.meet(&[&holder]);
    asker.fetch_and_check(&world, world.path("little"));

    // The second tracker starts, and then the first one is killed.
    let mut second = Tracker::start(second);
    wait_slowly_for("the second tracker has the holder", || second.lists("holder").then_some(()));
    first.kill();
    let found = || (narinfo_status(&asker.host, &holder.mark) == 200).then_some(());
    wait_slowly_for("the holder is found by the second tracker", found);
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);

    // The same with exchanged roles.
    first.start_again();
    wait_slowly_for("the first tracker has the holder again", || {
        first.lists("holder").then_some(())
    });
    second.kill();
    wait_slowly_for("the holder is found by the first tracker", found);
    asker.fetch_and_check(&world, world.path("other"));
}

#[test]
fn stopped_node_leaves_tracker_list() {
    let places = WanScene::new();
    let mut holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let listed = || -> Vec<String> {
        places.tracker.peers().into_iter().map(|(peer_id, _)| peer_id).collect()
    };
    wait_for("both are listed", || {
        (places.tracker.lists("holder") && places.tracker.lists("asker")).then_some(())
    });
    assert!(holder.daemon.stop().success());
    assert_eq!(listed(), ["asker"]);
    let path = places.world.path("little");
    assert_eq!(narinfo_status(&asker.host, path), 404);

    // The same node with the same key is listed and found again after a restart.
    let flags = open(&holder.host, "wan", &[&places.tracker.host]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let _daemon = Daemon::start(&holder.host, &flags);
    wait_for("it is found again", || (narinfo_status(&asker.host, path) == 200).then_some(()));
    asker.fetch_and_check(&places.world, path);
}

#[test]
fn reported_transfers_survive_tracker_kill() {
    let mut places = WanScene::with_scale(Scale::intervals(INTERVAL_SCALE));
    let holder = places.holder("holder");
    let asker = places.asker(&[&holder]);
    let paths = asker.fetch_and_check(&places.world, places.world.path("closure300"));
    let bytes = nar_bytes(&asker.host, &paths);
    let tracker = &mut places.tracker;
    wait_slowly_for("all transfers are resolved", || {
        assert!(tracker.reputation("holder", "total_shared") <= bytes);
        (tracker.reputation("holder", "total_shared") == bytes).then_some(())
    });
    assert_eq!(tracker.reputation("asker", "total_received"), bytes);
    for peer in ["holder", "asker"] {
        assert_eq!(tracker.reputation(peer, "failed_transfers"), 0, "{peer}");
    }
    let successful = tracker.reputation("holder", "successful_transfers");
    assert!(successful > 0);
    assert_eq!(tracker.reputation("asker", "successful_transfers"), successful);
    assert_eq!(tracker.reputation("holder", "total_received"), 0);

    // After it is killed, the tracker starts again with all reputation.
    let said = ["holder", "asker"].map(|peer| tracker.get(&format!("/reputation/{peer}")));
    tracker.kill();
    tracker.start_again();
    assert_eq!(["holder", "asker"].map(|peer| tracker.get(&format!("/reputation/{peer}"))), said);
    // The holder announces itself again soon.
    wait_slowly_for("the holder is listed again", || tracker.lists("holder").then_some(()));
    let listed = tracker.get("/peers");
    let listed = listed["peers"]
        .as_array()
        .unwrap()
        .iter()
        .find(|peer| peer["peer_id"] == "holder")
        .unwrap();
    assert_eq!(listed["reputation"]["total_shared"], bytes);
}

#[test]
fn nars_are_compressed_only_between_networks() {
    const SIZE: u32 = 48;
    let places = WanScene::new();
    let (world, trackers) = (&places.world, [&places.tracker.host]);
    // A private network, so that its machines belong to one LAN.
    let office = places.wan.lan([10, 5, 0]);
    let mut text = String::new();
    let holder = Holder::with(&office, world, "holder", |host| {
        world.sign(host);
        text = stock::add_large(host, "text", SIZE);
        open(host, "both", &trackers)
    });
    let neighbour = Asker::flagged(&office, "", &[&world.cache_key], |host| {
        tracker::flags(host, "both", &trackers)
    });
    neighbour.meet(&[&holder]);
    let asker = places.asker(&[&holder]);
    let takes = |asker: &Asker, path: &str| {
        let before = holder.host.sent();
        nix::realise_quietly(&asker.host, &[path]);
        nix::assert_whole(&asker.host, &[path], &holder.host.path("/nix/store"));
        holder.host.sent() - before
    };
    let nar = nar_bytes(&holder.host, std::slice::from_ref(&text));
    let near = takes(&neighbour, &text);
    assert!(near > nar, "{near} bytes on the own network for a NAR of {nar}");
    let far = takes(&asker, &text);
    assert!(far < nar / 2, "{far} bytes to another network for a NAR of {nar}");
    // Incompressible data arrives without growing noticeably.
    let random = takes(&asker, world.path("middle"));
    assert!(
        (MIDDLE..MIDDLE + MIDDLE / 8).contains(&random),
        "{random} bytes for a NAR of {MIDDLE}"
    );
}

/// Realises `path` over a link of 100 Mbit/s, and kills the sending holder after half of `size`
/// bytes.
fn killed_at_half(places: &WanScene, path: &str, size: u64) {
    let mut holders = [places.holder("one"), places.holder("two")];
    let [one, two] = &holders;
    let asker = places.asker(&[one, two]);
    asker.host.slow(100);
    let before = holders.each_ref().map(|holder| holder.host.sent());
    let mut child = nix::realising(&asker.host, &[path]).spawn().expect("nsenter starts");
    let sender = wait_for("half of what is sent", || {
        assert!(
            child.try_wait().expect("it is ours").is_none(),
            "Nix was done before half was sent"
        );
        holders
            .iter()
            .zip(&before)
            .position(|(holder, before)| holder.host.sent() - before > size / 2)
    });
    holders[sender].daemon.kill();
    assert!(
        child.try_wait().expect("it is ours").is_none(),
        "Nix was done before the peer was struck"
    );
    asker.host.quick();
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    nix::assert_whole(&asker.host, &[path], &holders[sender].host.path("/nix/store"));
    let log = asker.daemon.log();
    let other = holders[1 - sender].host.address.to_string();
    let continued =
        log.lines().any(|line| line.contains("continued from peer") && line.contains(&other));
    assert!(continued, "the log tells of no continuation");
    // The transfer did not start again: both holders together sent the NAR once.
    let sent: u64 =
        holders.iter().zip(&before).map(|(holder, before)| holder.host.sent() - before).sum();
    assert!(sent < size + size / 4, "{sent} bytes were sent for {size}");
}

#[test]
fn nar_of_killed_peer_continues_from_other_peer() {
    let places = WanScene::new();
    killed_at_half(&places, places.world.path("middle"), MIDDLE);
}

#[test]
fn original_peer_is_found_through_tracker() {
    let places = WanScene::new();
    let old = places.away.host("original");
    let shelf = StaticCache::of(&places.world);
    // The original ignores datagrams from other networks.
    let original = StandIn::start(&old, |_| None, standin::original(&shelf));
    places.tracker.announce_original(&old, "9f1b8a62-7a4e-4c8e-9a39-0b7f8e6b1d11");
    let asker = places.asker(&[]);
    let probe = places.world.path("little");
    wait_for("the original is found", || (narinfo_status(&asker.host, probe) == 200).then_some(()));
    assert_eq!(asker.fetch_and_check(&places.world, places.world.path("closure300")).len(), 300);
    asker.fetch_and_check(&places.world, places.world.path("large"));
    asker.fetch_and_check(&places.world, places.world.path("odd"));
    assert_eq!(narinfo_status(&asker.host, &format!("/nix/store/{}-x", "0".repeat(32))), 404);
    // The asker sends it only requests that the original understands, and the tracker one probe.
    let is_usual = |request: &Request| {
        request.method == "GET"
            && (request.path.starts_with("/local/") || request.path == "/nix-cache-info")
    };
    let asked = original.asked.lock().unwrap();
    let strange: Vec<&Request> = asked.iter().filter(|request| !is_usual(request)).collect();
    assert!(strange.is_empty(), "{strange:?}");
}
