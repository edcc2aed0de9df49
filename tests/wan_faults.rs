//! Failing or hostile trackers and peers on other networks. Nix must never hang because of them,
//! and must get every path that good peers have. The tests do not measure time.

use crate::common::daemon::{self, narinfo_status};
use crate::common::http::{self, Connection, Reply, Request, Server};
use crate::common::scene::WanScene;
use crate::common::standin::{Received, StandIn, StaticCache, have};
use crate::common::tracker;
use crate::common::{Asker, Host, Lan, PORT, Wan, World, nix, thread, wait_for, world};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Number of absent paths that each client looks up.
const MISSES: usize = 300;

/// Upper bound of the lookups that reach a faulty tracker for [`MISSES`] paths, after its fault is
/// known.
const MAX_LOOKUPS_AT_FAULTY_TRACKER: usize = 60;

/// A path that no peer has.
fn absent(number: usize) -> String {
    format!("/nix/store/{number:0>32}-absent")
}

/// Reserves `count` numbers of absent paths, and returns the first.
fn unused(count: usize) -> usize {
    static USED: AtomicUsize = AtomicUsize::new(0);
    USED.fetch_add(count, Ordering::Relaxed)
}

/// Checks that real Nix finds none of these absent paths, without an error.
fn missed_by_nix(asker: &Host, numbers: Range<usize>) {
    let paths: Vec<String> = numbers.map(absent).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let output = nix::realising(asker, &paths).arg("--dry-run").output().expect("nsenter starts");
    nix::assert_quiet(&output);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        paths.iter().all(|path| said.contains(path)),
        "Nix was told that a path is there\n{said}"
    );
}

/// Looks up [`MISSES`] absent paths by real Nix, and as many others by HTTP. All must be misses.
/// Every call uses new paths, so that no cached answer helps.
fn misses(asker: &Host) {
    let first = unused(2 * MISSES);
    missed_by_nix(asker, first..first + MISSES);

    let rest: Vec<String> = (first + MISSES..first + 2 * MISSES).map(absent).collect();
    std::thread::scope(|scope| {
        // 25 connections, as many as Nix opens.
        for part in rest.chunks(MISSES / 25) {
            thread::spawn_in(scope, "lookups", move || {
                let mut connection = Connection::new(asker.connect_local().unwrap()).unwrap();
                for path in part {
                    let answer =
                        connection.get(&format!("/{}.narinfo", world::hash_part(path))).unwrap();
                    assert_eq!(answer.status, 404, "{answer:?}");
                }
            });
        }
    });
}

/// A network with an asker whose tracker is a stand-in.
struct Tracked {
    asker: Asker,
    /// Lookups that reached the tracker.
    lookups: Received<Request>,
    _server: Option<Server>,
    world: World,
    wan: Wan,
    centre: Lan,
}

/// The behaviour of a stand-in for a tracker.
type Answers = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

impl Tracked {
    /// Starts a tracker with these answers; `None` leaves its port closed.
    fn by(answer: Option<Answers>) -> Tracked {
        let wan = Wan::new();
        let (home, centre) = (wan.lan([10, 1, 0]), wan.lan([198, 51, 100]));
        let world = World::on(&home);
        let host = centre.host("tracker");
        let lookups: Received<Request> = Arc::default();
        let record = Arc::clone(&lookups);
        let server = answer.map(|answer| {
            Server::start(host.listen(tracker::PORT), move |request| {
                if request.path.starts_with("/lookup/") {
                    record.lock().expect("nothing panics while it is held").push(request.clone());
                }
                answer(request)
            })
        });
        let next = world.next();
        let asker = Asker::flagged(&home, &next, &[&world.cache_key], |asker| {
            tracker::flags(asker, "both", &[&host])
        });
        Tracked { asker, lookups, _server: server, world, wan, centre }
    }

    fn lookups(&self) -> usize {
        self.lookups.lock().expect("nothing panics while it is held").len()
    }

    /// Checks that misses end, and that Nix gets a closure from the next substituter. The first
    /// miss lets the asker learn of the tracker's fault. Returns the number of later lookups that
    /// reached the tracker.
    fn assert_nix_does_not_hang(&self) -> usize {
        let first = unused(1);
        missed_by_nix(&self.asker.host, first..first + 1);
        let before = self.lookups();
        misses(&self.asker.host);
        let lookups = self.lookups() - before;
        // The next substituter has the closure.
        self.asker.fetch_and_check(&self.world, self.world.path("closure300"));
        lookups
    }
}

/// Valid answers of a tracker to all requests except lookups.
fn valid_tracker_answer(request: &Request) -> Reply {
    let body = match request.path.as_str() {
        "/peers" => r#"{"peers": []}"#,
        "/transfer/init" => r#"{"transfer_id": 1}"#,
        _ => r#"{"status": "ok"}"#,
    };
    Reply::Whole(200, body.into())
}

#[test]
fn tracker_where_nobody_listens_does_not_hang_nix() {
    Tracked::by(None).assert_nix_does_not_hang();
}

#[test]
fn tracker_that_is_not_reached_does_not_hang_nix() {
    let tracked = Tracked::by(Some(Box::new(valid_tracker_answer)));
    // From now on, packets to the tracker are lost.
    tracked.wan.blackhole("198.51.100.1/32");
    tracked.assert_nix_does_not_hang();
}

#[test]
fn tracker_that_never_answers_does_not_hang_nix() {
    let lookups = Tracked::by(Some(Box::new(|_| Reply::Silence))).assert_nix_does_not_hang();
    assert!(
        lookups < MAX_LOOKUPS_AT_FAULTY_TRACKER,
        "{lookups} lookups at a tracker that does not answer"
    );
}

#[test]
fn tracker_that_answers_a_byte_at_a_time_does_not_hang_nix() {
    let answer = |_: &Request| Reply::Drip(vec![b' '; 4096], Duration::from_millis(100));
    let lookups = Tracked::by(Some(Box::new(answer))).assert_nix_does_not_hang();
    assert!(
        lookups < MAX_LOOKUPS_AT_FAULTY_TRACKER,
        "{lookups} lookups at a tracker that does not come to an end"
    );
}

#[test]
fn tracker_that_answers_garbage_does_not_hang_nix() {
    let deep = "[".repeat(60_000);
    let answers: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"\xff\xfe not JSON".to_vec(),
        b"{\"candidates\": 5}".to_vec(),
        b"{\"candidates\": [{\"peer_id\": 1, \"addr\": [], \"port\": -1}]}".to_vec(),
        b"{\"candidates\": [{\"peer_id\": \"x\", \"addr\": \"a b\\n\", \"port\": 1e308, \"score\": 1}]}".to_vec(),
        deep.into_bytes(),
        vec![b' '; 8 << 20],
    ];
    let count = AtomicUsize::new(0);
    let answer = move |_: &Request| {
        let number = count.fetch_add(1, Ordering::Relaxed);
        Reply::Whole(200, answers[number % answers.len()].clone())
    };
    Tracked::by(Some(Box::new(answer))).assert_nix_does_not_hang();
    let raw = |_: &Request| Reply::Raw(b"SSH-2.0-OpenSSH_9.2\r\n".to_vec());
    Tracked::by(Some(Box::new(raw))).assert_nix_does_not_hang();
    let failing = |_: &Request| Reply::Whole(500, b"{\"error\": \"out of order\"}".to_vec());
    Tracked::by(Some(Box::new(failing))).assert_nix_does_not_hang();
}

/// Answer to a lookup that lists peers at these addresses as candidates.
fn candidates(addresses: &[String]) -> Reply {
    let one = |(number, address): (usize, &String)| {
        format!(
            r#"{{"peer_id": "dead-{number}", "addr": "{address}", "port": 12304, "score": 1.5}}"#
        )
    };
    let list: Vec<String> = addresses.iter().enumerate().map(one).collect();
    Reply::Whole(
        200,
        format!(r#"{{"candidates": [{}], "others": []}}"#, list.join(", ")).into_bytes(),
    )
}

/// Lists the next `at_once` of 1,000 addresses in `networks` as candidates in every lookup.
fn dead_peers(networks: &[&str], at_once: usize) -> Answers {
    let all: Vec<String> = (0..1000)
        .map(|i| format!("{}.{}.{}", networks[i % networks.len()], i / 250, 1 + i % 250))
        .collect();
    let next = AtomicUsize::new(0);
    Box::new(move |request| {
        if !request.path.starts_with("/lookup/") {
            return valid_tracker_answer(request);
        }
        let from = next.fetch_add(at_once, Ordering::Relaxed);
        let some: Vec<String> =
            (from..from + at_once).map(|i| all[i % all.len()].clone()).collect();
        candidates(&some)
    })
}

impl Tracked {
    /// Checks [`Tracked::does_not_hang`], and that the asker soon stops asking a tracker whose
    /// peers never answer.
    fn assert_dead_peers_do_not_hang_nix(&self) {
        let lookups = self.assert_nix_does_not_hang();
        assert!(self.lookups() > 0, "it was not asked at all");
        assert!(
            lookups < MAX_LOOKUPS_AT_FAULTY_TRACKER,
            "{lookups} lookups at a tracker whose peers are dead"
        );
    }
}

/// Number of candidates that a tracker lists at most in one answer.
const AT_ONCE: usize = 64;

#[test]
fn unreachable_dead_peers_do_not_hang_nix() {
    let tracked = Tracked::by(Some(dead_peers(&["10.7"], AT_ONCE)));
    tracked.wan.unreachable("10.7.0.0/16");
    tracked.assert_dead_peers_do_not_hang_nix();
}

#[test]
fn blackholed_dead_peers_do_not_hang_nix() {
    let tracked = Tracked::by(Some(dead_peers(&["10.8"], AT_ONCE)));
    tracked.wan.blackhole("10.8.0.0/16");
    tracked.assert_dead_peers_do_not_hang_nix();
}

#[test]
fn dead_peers_that_refuse_connections_do_not_hang_nix() {
    let tracked = Tracked::by(Some(dead_peers(&["10.9"], AT_ONCE)));
    let refuses = tracked.centre.host("refuses");
    tracked.wan.all_at("10.9.0.0/16", &refuses);
    tracked.assert_dead_peers_do_not_hang_nix();
}

#[test]
fn dead_peers_of_every_kind_do_not_hang_nix() {
    let tracked = Tracked::by(Some(dead_peers(&["10.7", "10.8", "10.9"], 1000)));
    tracked.wan.unreachable("10.7.0.0/16");
    tracked.wan.blackhole("10.8.0.0/16");
    let refuses = tracked.centre.host("refuses");
    tracked.wan.all_at("10.9.0.0/16", &refuses);
    tracked.assert_dead_peers_do_not_hang_nix();
}

/// A tracker may list any address. The node must not connect to its own addresses.
#[test]
fn tracker_that_names_the_own_machine_does_not_hang_nix() {
    let own = Arc::new(OnceLock::<Vec<String>>::new());
    let named = Arc::clone(&own);
    let tracked = Tracked::by(Some(Box::new(move |request| match named.get() {
        Some(named) if request.path.starts_with("/lookup/") => candidates(named),
        _ => valid_tracker_answer(request),
    })));
    // The last address is the asker's own.
    let address = tracked.asker.host.address.to_string();
    let all = [
        "127.0.0.1",
        "::1",
        "0.0.0.0",
        "localhost",
        "169.254.169.254",
        "255.255.255.255",
        &address,
    ];
    own.set(all.map(str::to_owned).to_vec()).expect("it is set once");
    tracked.assert_nix_does_not_hang();
    let mark = daemon::add_unique_path(&tracked.asker.host);
    assert_eq!(
        narinfo_status(&tracked.asker.host, &mark),
        404,
        "it took its own store for a peer's"
    );
}

/// Number of paths fetched beside hostile peers.
const FETCHED: usize = 100;

/// Fetches paths beside two hostile peers that claim every path, one with a full filter, one
/// without a filter. Both answer HTTP with `answer`, and sooner than the good peer. All paths must
/// arrive, from the good peer.
fn beside_hostile_peers(answer: impl Fn(&StaticCache, &Request) -> Reply + Send + Sync + 'static) {
    let places = WanScene::new();
    let good = places.holder("good");
    let asker = places.asker(&[&good]);
    let _far = good.host.delay(Duration::from_millis(20));
    let (claims, original) = (places.away.host("claims"), places.away.host("original"));
    let answer = Arc::new(answer);
    let hostile = [&claims, &original].map(|host| {
        let (shelf, answer) = (StaticCache::of(&places.world), Arc::clone(&answer));
        StandIn::start(host, have(|_| true), move |request| answer(&shelf, request))
    });
    // The closure lists references first, so its beginning is closed under references.
    let mut paths = nix::closure(&good.host, &[places.world.path("closure300")]);
    paths.truncate(FETCHED);
    places.tracker.announce_with(&claims, PORT, "claims", &paths);
    places.tracker.announce_original(&original, "original");
    wait_for("all are listed", || {
        ["good", "claims", "original"]
            .iter()
            .all(|peer_id| places.tracker.lists(peer_id))
            .then_some(())
    });

    let wanted: Vec<&str> = paths.iter().map(String::as_str).collect();
    let sent = good.host.sent();
    nix::realise_quietly(&asker.host, &wanted);
    assert_eq!(nix::valid_paths(&asker.host).len(), FETCHED);
    nix::assert_whole(&asker.host, &wanted, &places.world.store());
    assert!(good.host.sent() > sent);
    for (hostile, name) in hostile.iter().zip(["claims", "original"]) {
        let was_asked =
            !hostile.heard.lock().unwrap().is_empty() || !hostile.asked.lock().unwrap().is_empty();
        assert!(was_asked, "{name} was not asked at all");
    }
    // A path that only hostile peers claim is a miss.
    assert_eq!(narinfo_status(&asker.host, &absent(unused(1))), 404);
    assert_eq!(http::get_local(&asker.host, "/nix-cache-info").unwrap().status, 200);
}

#[test]
fn dead_peers_that_claim_all_do_not_hide_a_good_one() {
    let places = WanScene::new();
    let good = places.holder("good");
    let asker = places.asker(&[&good]);
    // More dead peers than the asker queries at once; no process listens on their ports.
    let dead = places.away.host("dead");
    let paths = nix::closure(&good.host, &[places.world.path("closure300")]);
    for number in 0..12 {
        places.tracker.announce_with(&dead, 20_000 + number, &format!("dead-{number}"), &paths);
    }
    for path in &paths[..20] {
        assert_eq!(narinfo_status(&asker.host, &absent(unused(1))), 404);
        assert_eq!(narinfo_status(&asker.host, path), 200, "{path} is there");
    }
}

/// The hash part in `/local/<hash part>.narinfo`.
fn asked_for(request: &Request) -> Option<&str> {
    request.path.strip_prefix("/local/")?.strip_suffix(".narinfo")
}

/// Answers with true narinfos, and passes each NAR through `nar`.
fn answer_with_modified_nar(
    shelf: &StaticCache,
    request: &Request,
    nar: impl Fn(Vec<u8>) -> Reply,
) -> Reply {
    let missing = || Reply::Whole(404, vec![]);
    if let Some(hash_part) = asked_for(request) {
        let text = shelf.peer_narinfo(hash_part, &format!("local/nar/{hash_part}.nar"));
        return text.map_or_else(missing, |text| Reply::Whole(200, text.into_bytes()));
    }
    let hash_part =
        request.path.strip_prefix("/local/nar/").and_then(|rest| rest.strip_suffix(".nar"));
    hash_part.and_then(|hash_part| shelf.nar(hash_part)).map_or_else(missing, nar)
}

#[test]
fn peers_with_false_claims_hide_no_path() {
    beside_hostile_peers(|_, _| Reply::Whole(404, vec![]));
}

#[test]
fn peers_with_invalid_narinfos_hide_no_path() {
    beside_hostile_peers(|_, _| Reply::Whole(200, b"StorePath: /etc/shadow\n\xff".to_vec()));
}

#[test]
fn peers_with_dripping_narinfos_hide_no_path() {
    beside_hostile_peers(|_, _| Reply::Drip(vec![b'x'; 2000], Duration::from_millis(200)));
}

#[test]
fn peers_that_never_answer_hide_no_path() {
    beside_hostile_peers(|_, _| Reply::Silence);
}

#[test]
fn peers_with_wrong_nars_hide_no_path() {
    beside_hostile_peers(|shelf, request| {
        answer_with_modified_nar(shelf, request, |mut nar| {
            let middle = nar.len() / 2;
            nar[middle] ^= 1;
            Reply::Whole(200, nar)
        })
    });
}

#[test]
fn peers_with_truncated_nars_hide_no_path() {
    beside_hostile_peers(|shelf, request| {
        answer_with_modified_nar(shelf, request, |nar| {
            let half = nar.len() / 2;
            Reply::Cut(nar, half)
        })
    });
}

#[test]
fn peers_with_silent_nar_routes_hide_no_path() {
    beside_hostile_peers(|shelf, request| {
        answer_with_modified_nar(shelf, request, |_| Reply::Silence)
    });
}
