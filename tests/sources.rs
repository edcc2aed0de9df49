//! Which holder a NAR comes from: the fastest one, and a slow one only if no other holder has the
//! path.

use crate::common::http::{self, Connection, Reply, Request, Server};
use crate::common::process::status_number;
use crate::common::standin::{StandIn, StaticCache, field, have};
use crate::common::{
    Asker, Daemon, Holder, Host, Lan, Scale, World, daemon, nix, thread, wait_for, world,
};
use std::time::{Duration, Instant};

/// Bytes that a slow neighbour sends before each pause, and the pause: 9,000 bytes per second.
const DRIP: (usize, Duration) = (900, Duration::from_millis(100));

/// Bound for a fetch that must not depend on a slow peer. A closure of 300 takes less on a busy
/// machine, and more from a peer at the pace of [`DRIP`].
const MAX_FETCH_TIME: Duration = Duration::from_secs(120);

/// Answers like a peer with all of the world's static cache; `send` makes the answers for NARs.
fn holding(
    world: &World,
    send: impl Fn(&Request, Vec<u8>) -> Reply + Send + Sync + 'static,
) -> impl Fn(&Request) -> Reply + Send + Sync + 'static {
    let shelf = StaticCache::of(world);
    move |request| {
        let missing = || Reply::Whole(404, vec![]);
        let Some(name) = request.path.strip_prefix("/local/") else { return missing() };
        if let Some(hash_part) = name.strip_suffix(".narinfo") {
            let hash = shelf
                .narinfo(hash_part)
                .map(|lines| field(&lines, "NarHash").trim_start_matches("sha256:").to_owned());
            let url = format!("local/nar/{hash_part}-{}.nar", hash.unwrap_or_default());
            let text = shelf.peer_narinfo(hash_part, &url);
            return text.map_or_else(missing, |text| Reply::Whole(200, text.into_bytes()));
        }
        let hash_part = name.strip_prefix("nar/").and_then(|name| name.split('-').next());
        hash_part
            .and_then(|hash_part| shelf.nar(hash_part))
            .map_or_else(missing, |nar| send(request, nar))
    }
}

/// Starts a slow neighbour known to `asker`. It sends `drip.0` bytes, then pauses for `drip.1`.
fn slow_neighbour(
    lan: &Lan,
    world: &World,
    asker: &Asker,
    drip: (usize, Duration),
) -> (Host, StandIn) {
    let host = lan.host("slow");
    let slow = StandIn::start(
        &host,
        have(|_| true),
        holding(world, move |_, nar| Reply::Paced(nar, drip.0, drip.1)),
    );
    slow.meet(&host, &asker.host);
    (host, slow)
}

/// Waits until a path is found, and returns the route of its NAR.
fn nar_url(asker: &Asker, path: &str) -> String {
    let narinfo = wait_for("the path is found", || {
        let answer =
            http::get_local(&asker.host, &format!("/{}.narinfo", world::hash_part(path))).ok()?;
        (answer.status == 200).then(|| answer.text())
    });
    let url =
        narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).expect("narinfos have a URL");
    format!("/{url}")
}

/// Number of complete NARs from each peer, by its address.
fn nars(asker: &Asker) -> Vec<(String, u64)> {
    let status = daemon::status(&asker.host);
    let peers = status["peers"].as_array().expect("a list").iter();
    peers
        .map(|peer| (peer["address"].as_str().unwrap().to_owned(), peer["nars"].as_u64().unwrap()))
        .collect()
}

#[test]
fn slow_neighbour_beside_good_one_does_not_delay_closure() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let good = Holder::new(&lan, &world, "good");
    let asker = Asker::new(&lan, &world, &[&good]);
    let (_host, slow) = slow_neighbour(&lan, &world, &asker, DRIP);
    let began = Instant::now();
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);
    eprintln!("closure of 300 beside a slow neighbour: {:?}", began.elapsed());
    assert!(began.elapsed() < MAX_FETCH_TIME, "{:?}", began.elapsed());
    // The asker tries the slow neighbour and leaves it.
    assert!(slow.was_asked(".nar"));
    assert!(asker.daemon.log().contains("leaves peer"));
}

#[test]
fn large_nar_continues_from_other_holder_after_slow_one() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    // 140 KB/s. The narinfo comes from this peer.
    let (_host, _slow) = slow_neighbour(&lan, &world, &asker, (14_000, Duration::from_millis(100)));
    nar_url(&asker, world.path("middle"));
    let good = Holder::new(&lan, &world, "good");
    asker.meet(&[&good]);
    let began = Instant::now();
    asker.fetch_and_check(&world, world.path("middle"));
    eprintln!("64 MiB, first from a slow neighbour: {:?}", began.elapsed());
    assert!(began.elapsed() < MAX_FETCH_TIME, "{:?}", began.elapsed());
}

#[test]
fn slow_sole_holder_is_not_left() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    // The transfer lasts several times as long as the period over which the pace is measured.
    let (_host, slow) = slow_neighbour(&lan, &world, &asker, (4000, Duration::from_millis(100)));
    let url = nar_url(&asker, world.path("large"));
    let size = StaticCache::of(&world).nar(world::hash_part(world.path("large"))).unwrap().len();
    assert!(size > 8 * 40_000, "{size} bytes are there in less than 8 s");
    assert_eq!(get_nar(&asker, &url), (size, true));
    let asked =
        slow.asked.lock().unwrap().iter().filter(|request| request.path.ends_with(".nar")).count();
    assert_eq!(asked, 1);
    assert!(!asker.daemon.log().contains("leaves peer"), "{}", asker.daemon.log());
}

#[test]
fn holder_that_becomes_slow_in_mid_nar_is_left() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holders = [Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two")];
    let asker = Asker::new(&lan, &world, &[&holders[0], &holders[1]]);
    // Slow enough for the test to act in the middle of the NAR.
    asker.host.slow(100);
    let before = holders.each_ref().map(|holder| holder.host.sent());
    let mut nix =
        nix::realising(&asker.host, &[world.path("middle")]).spawn().expect("nsenter starts");
    let sender = wait_for("half of the NAR", || {
        assert!(
            nix.try_wait().expect("it is ours").is_none(),
            "Nix was done before half of the NAR was sent"
        );
        (0..2).find(|at| holders[*at].host.sent() - before[*at] > 32 << 20)
    });
    holders[sender].host.slow_sending(2);
    nix::assert_quiet(&nix.wait_with_output().expect("it is ours"));
    asker.assert_closure_complete(&world, world.path("middle"));
    assert!(asker.daemon.log().contains("leaves peer"), "{}", asker.daemon.log());
    assert!(holders[1 - sender].host.sent() - before[1 - sender] > 16 << 20);
}

#[test]
fn closure_comes_from_all_holders() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holders: Vec<Holder> = ["one", "two", "three", "four"]
        .iter()
        .map(|name| Holder::new(&lan, &world, name))
        .collect();
    let asker = Asker::new(&lan, &world, &holders.iter().collect::<Vec<_>>());
    // At 5 Mbit/s the links are the bottleneck, even if processors are busy.
    holders.iter().for_each(|holder| holder.host.slow_sending(5));
    let began = Instant::now();
    assert_eq!(asker.fetch_and_check(&world, world.path("closure1000")).len(), 1000);
    let took = began.elapsed();
    let nars = nars(&asker);
    eprintln!("closure of 1000 from four holders: {took:?}, {nars:?}");
    assert!(nars.len() == 4 && nars.iter().all(|(_, count)| *count >= 100), "{nars:?}");
}

#[test]
fn nar_without_first_piece_in_time_gets_404() {
    // At a scale of 0.2, the first piece of a NAR must arrive within 4 s.
    let lan = Lan::new().with_scale(Scale::timeouts(0.2));
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    // This peer never stalls, but needs 13 s for the first piece.
    let (_host, _slow) = slow_neighbour(&lan, &world, &asker, (2000, Duration::from_millis(100)));
    let url = nar_url(&asker, world.path("large"));
    assert_eq!(http::get_local(&asker.host, &url).unwrap().status, 404);
}

/// Regression: the daemon closed the connection without an answer, and Nix asked again.
#[test]
fn range_missing_at_sole_holder_gets_404() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    let host = lan.host("short");
    let answers = holding(&world, |_, nar| Reply::Cut(nar.clone(), nar.len() * 3 / 4));
    let short = StandIn::start(&host, have(|_| true), answers);
    short.meet(&host, &asker.host);
    let url = nar_url(&asker, world.path("large"));
    let size = StaticCache::of(&world).nar(world::hash_part(world.path("large"))).unwrap().len();
    let mut connection = Connection::new(asker.host.connect_local().unwrap()).unwrap();
    let answer = connection
        .ask("GET", &url, &format!("Range: bytes={}-\r\n", size - 10))
        .expect("an answer");
    assert_eq!(answer.status, 404);
}

/// Regression: each lookup without a fetch used 4 KiB for good.
#[test]
fn lookups_without_fetch_keep_memory_bounded() {
    let lan = Lan::new();
    let host = lan.host("holder");
    let _holder = StandIn::start(&host, have(|_| true), |request: &Request| {
        let name =
            request.path.strip_prefix("/local/").and_then(|name| name.strip_suffix(".narinfo"));
        let narinfo = name.map(|hash_part| {
            format!(
                "StorePath: /nix/store/{hash_part}-package-1.0\nURL: local/nar/{hash_part}-{0}.nar\nCompression: none\n\
                 NarHash: sha256:{0}\nNarSize: 1000\nReferences: \n",
                "0".repeat(52)
            )
        });
        narinfo
            .map_or_else(|| Reply::Whole(404, vec![]), |text| Reply::Whole(200, text.into_bytes()))
    });
    let asker = Asker::with(&lan, "", &[]);
    nar_url(&asker, &format!("/nix/store/{}-x", "1".repeat(32)));
    let resident = || status_number(asker.daemon.pid(), "RssAnon");
    let before = resident();
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let asker = &asker;
            thread::spawn_in(scope, "lookups", move || {
                let mut connection = Connection::new(asker.host.connect_local().unwrap()).unwrap();
                for number in 0..625 {
                    let answer = connection
                        .get(&format!("/{:032}.narinfo", worker * 1000 + number))
                        .unwrap();
                    assert_eq!(answer.status, 200);
                }
            });
        }
    });
    let after = resident();
    eprintln!("RssAnon before {before} KiB, after 5,000 lookups {after} KiB");
    assert!(after < before + (8 << 10), "{before} KiB, then {after} KiB");
    // Nearly all of the memory is free again after the clients disconnect.
    let rest = wait_for("the memory is given back", || {
        Some(resident()).filter(|now| *now < before + (6 << 10))
    });
    eprintln!("RssAnon at rest {rest} KiB");
}

/// An upstream cache: the world's static cache by HTTP on its own host.
struct Cache {
    _server: Server,
    _host: Host,
    url: String,
}

impl Cache {
    fn start(lan: &Lan, world: &World) -> Cache {
        let host = lan.host("cache");
        let dir = world.cache();
        let server = Server::start(host.listen(8080), move |request| {
            let path = request.path.trim_start_matches('/');
            std::fs::read(dir.join(path))
                .map_or_else(|_| Reply::Whole(404, vec![]), |body| Reply::Whole(200, body))
        });
        let url = format!("http://{}:8080", host.address);
        Cache { _server: server, _host: host, url }
    }
}

/// An asker whose Nix and peerix have `url` as upstream cache.
fn beside_upstream(lan: &Lan, world: &World, url: &str) -> Asker {
    let flags = ["--upstream-cache", url].map(str::to_owned).to_vec();
    Asker::flagged(lan, url, &[&world.cache_key], |_| flags)
}

/// Returns the received bytes of a NAR, and true if it is complete; `(0, false)` for a 404.
fn get_nar(asker: &Asker, url: &str) -> (usize, bool) {
    let answer = http::get_local(&asker.host, url).expect("an answer");
    assert!(matches!(answer.status, 200 | 404), "{}", answer.status);
    if answer.status == 404 { (0, false) } else { (answer.body.len(), answer.whole) }
}

#[test]
fn slow_neighbour_is_left_for_upstream_cache_with_path() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let cache = Cache::start(&lan, &world);
    let asker = beside_upstream(&lan, &world, &cache.url);
    let (_host, _slow) = slow_neighbour(&lan, &world, &asker, DRIP);
    let began = Instant::now();
    let output = nix::realise(&asker.host, &[world.path("closure300"), world.path("large")]);
    eprintln!(
        "closure of 300 and a large path beside a slow neighbour and upstream: {:?}",
        began.elapsed()
    );
    nix::assert_succeeded(&output);
    assert_eq!(asker.assert_closure_complete(&world, world.path("closure300")).len(), 300);
    asker.assert_closure_complete(&world, world.path("large"));
    assert!(began.elapsed() < MAX_FETCH_TIME, "{:?}", began.elapsed());
    assert!(asker.daemon.log().contains("from the upstream cache"), "{}", asker.daemon.log());
}

#[test]
fn nar_left_to_upstream_is_served_slowly_on_retry() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let cache = Cache::start(&lan, &world);
    let asker = beside_upstream(&lan, &world, &cache.url);
    let (_host, _slow) = slow_neighbour(&lan, &world, &asker, (10_000, Duration::from_millis(100)));
    let url = nar_url(&asker, world.path("large"));
    let size = StaticCache::of(&world).nar(world::hash_part(world.path("large"))).unwrap().len();
    let (came, is_whole) = get_nar(&asker, &url);
    assert!(!is_whole && came < size, "{came} of {size}");
    // The rest is a 404, so that Nix turns to upstream.
    let mut connection = Connection::new(asker.host.connect_local().unwrap()).unwrap();
    let answer = connection
        .ask("GET", &url, &format!("Range: bytes={}-\r\n", came.max(1)))
        .expect("an answer");
    assert_eq!(answer.status, 404);
    assert_eq!(get_nar(&asker, &url), (size, true));
}

/// Without a reachable upstream cache, a slow neighbour is better than none.
#[test]
fn slow_neighbour_is_not_left_without_certain_upstream() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let cache = Cache::start(&lan, &world);
    let size = StaticCache::of(&world).nar(world::hash_part(world.path("large"))).unwrap().len();
    let nobody = format!("http://{}:8080", lan.address(99));
    let flags = ["--upstream-cache", &cache.url].map(str::to_owned).to_vec();
    let other_key = "other-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";
    for (what, asker) in [
        ("nobody is there", beside_upstream(&lan, &world, &nobody)),
        ("not a substituter", Asker::flagged(&lan, "", &[&world.cache_key], |_| flags.clone())),
        ("no signature that is trusted", {
            let host = lan.host("asker");
            nix::configure_client(&host, &cache.url, &[other_key]);
            // The slow neighbour's paths have no trusted signature either.
            host.sh("echo 'require-sigs = false' >> /etc/nix/nix.conf");
            let daemon = Daemon::start(&host, &["--upstream-cache", &cache.url]);
            Asker { daemon, host }
        }),
    ] {
        let (_host, slow) =
            slow_neighbour(&lan, &world, &asker, (10_000, Duration::from_millis(100)));
        let url = nar_url(&asker, world.path("large"));
        assert_eq!(get_nar(&asker, &url), (size, true), "{what}");
        let asked = slow
            .asked
            .lock()
            .unwrap()
            .iter()
            .filter(|request| request.path.ends_with(".nar"))
            .count();
        assert_eq!(asked, 1, "{what}");
    }
}
