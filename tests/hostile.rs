//! Peers that lie. Nix gets the true bytes from the good peer, and never a complete bad NAR. The
//! good peer has a delay, so that peerix always hears and asks the bad one first.

use crate::common::fault::Delay;
use crate::common::http::{self, Reply, Request};
use crate::common::standin::{StandIn, StaticCache, have};
use crate::common::{Asker, Holder, Host, Lan, Scale, World, nar, nix, thread, wait_for, world};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Delay of the good peer, longer than the bad peer takes to answer on a busy machine.
const FAR: Duration = Duration::from_millis(200);

/// HTTP handler of a bad peer.
type Answers = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

/// A network with a good peer and a bad one, which answers *have* first and to every query.
struct Scene {
    world: World,
    asker: Asker,
    evil: StandIn,
    _evil: Host,
    _far: Delay,
    good: Holder,
    lan: Lan,
}

impl Scene {
    fn new(answers: impl FnOnce(&World) -> Answers) -> Scene {
        Scene::on(Lan::new(), answers)
    }

    fn on(lan: Lan, answers: impl FnOnce(&World) -> Answers) -> Scene {
        let world = World::on(&lan);
        let good = Holder::new(&lan, &world, "good");
        let asker = Asker::new(&lan, &world, &[&good]);
        let far = good.host.delay(FAR);
        let host = lan.host("evil");
        let evil = StandIn::start(&host, have(|_| true), answers(&world));
        evil.meet(&host, &asker.host);
        Scene { world, asker, evil, _evil: host, _far: far, good, lan }
    }

    /// Checks that Nix fetches `name` without a warning, though peerix asked the bad peer.
    fn assert_fetched_quietly(&self, name: &str) {
        let path = self.world.path(name);
        let closure = self.asker.fetch_and_check(&self.world, path);
        nix::assert_nothing_but(&self.asker.host, &closure);
        assert!(self.evil.was_asked(&narinfo(path)), "the bad peer was not asked first");
    }
}

fn narinfo(path: &str) -> String {
    format!("{}.narinfo", world::hash_part(path))
}

/// The hash part in `/local/<hash part>.narinfo`.
fn asked_for(request: &Request) -> Option<&str> {
    request.path.strip_prefix("/local/")?.strip_suffix(".narinfo")
}

/// Answers with the true narinfo of every path, and passes the true NAR through `nar`.
fn lying_nar(world: &World, nar: impl Fn(Vec<u8>) -> Reply + Send + Sync + 'static) -> Answers {
    let shelf = StaticCache::of(world);
    Box::new(move |request| {
        let missing = || Reply::Whole(404, vec![]);
        if let Some(hash_part) = asked_for(request) {
            let text = shelf.peer_narinfo(hash_part, &format!("local/nar/{hash_part}.nar"));
            return text.map_or_else(missing, |text| Reply::Whole(200, text.into_bytes()));
        }
        let hash_part =
            request.path.strip_prefix("/local/nar/").and_then(|rest| rest.strip_suffix(".nar"));
        hash_part.and_then(|hash_part| shelf.nar(hash_part)).map_or_else(missing, &nar)
    })
}

fn flipped(mut nar: Vec<u8>) -> Vec<u8> {
    let middle = nar.len() / 2;
    nar[middle] ^= 1;
    nar
}

#[test]
fn corrupt_small_nar_never_reaches_nix() {
    let scene = Scene::new(|world| lying_nar(world, |nar| Reply::Whole(200, flipped(nar))));
    scene.assert_fetched_quietly("little");
}

#[test]
fn corrupt_large_nar_is_never_completed() {
    // The next run must begin while peerix avoids the liar, which this extends from 1 s to 60 s.
    let lan = Lan::new().with_scale(Scale::intervals(60.0));
    let scene = Scene::on(lan, |world| lying_nar(world, |nar| Reply::Whole(200, flipped(nar))));
    let path = scene.world.path("large");
    // Nix has received a part of the NAR before peerix detects the fault, so this run may fail. The
    // store must stay unchanged then.
    let output = nix::realise(&scene.asker.host, &[path]);
    assert!(scene.evil.was_asked(&narinfo(path)), "the bad peer was not asked first");
    if !output.status.success() {
        nix::assert_nothing_but(&scene.asker.host, &[]);
        // peerix avoids the bad peer now.
        nix::assert_succeeded(&nix::realise(&scene.asker.host, &[path]));
    }
    let closure = scene.asker.assert_closure_complete(&scene.world, path);
    nix::assert_nothing_but(&scene.asker.host, &closure);
    drop(scene);

    // With another substituter, the first run succeeds.
    let scene = Scene::new(|world| lying_nar(world, |nar| Reply::Whole(200, flipped(nar))));
    let asker = Asker::with_next(&scene.lan, &scene.world, &[&scene.good]);
    let path = scene.world.path("large");
    nix::assert_succeeded(&nix::realise(&asker.host, &[path]));
    let closure = asker.assert_closure_complete(&scene.world, path);
    nix::assert_nothing_but(&asker.host, &closure);
}

#[test]
fn nar_of_another_path_never_reaches_nix() {
    let scene = Scene::new(|world| {
        let other = StaticCache::of(world).nar(world::hash_part(world.path("other"))).unwrap();
        lying_nar(world, move |_| Reply::Whole(200, other.clone()))
    });
    scene.assert_fetched_quietly("little");
}

#[test]
fn truncated_nar_is_finished_by_another_peer() {
    // Nix has received a part of the larger NAR when it ends. The rest comes from the good peer.
    for name in ["little", "large"] {
        let scene =
            Scene::new(|world| lying_nar(world, |nar| Reply::Cut(nar.clone(), nar.len() / 2)));
        scene.assert_fetched_quietly(name);
    }
}

#[test]
fn nar_with_trailing_bytes_never_reaches_nix() {
    let longer = |mut nar: Vec<u8>| {
        nar.extend([0; 64]);
        Reply::Chunked(200, nar)
    };
    let scene = Scene::new(|world| lying_nar(world, longer));
    scene.assert_fetched_quietly("little");
}

/// The narinfo of `little` has the NAR hash and size of `other`, with the signature of the true
/// narinfo and an invalid one.
#[test]
fn forged_narinfo_is_refused() {
    let scene = Scene::new(|world| {
        let shelf = StaticCache::of(world);
        let other = world::hash_part(world.path("other")).to_owned();
        Box::new(move |request| {
            let Some(hash_part) = asked_for(request) else {
                return Reply::Whole(200, shelf.nar(&other).unwrap());
            };
            let Some(lines) = shelf.narinfo(hash_part) else { return Reply::Whole(404, vec![]) };
            let forgery = shelf.narinfo(&other).unwrap();
            let mut text = String::from("URL: local/nar/x.nar\n");
            for (key, value) in &lines {
                match key.as_str() {
                    "NarHash" | "NarSize" => {
                        text +=
                            &format!("{key}: {}\n", crate::common::standin::field(&forgery, key));
                    }
                    "URL" | "FileHash" | "FileSize" => {}
                    _ => text += &format!("{key}: {value}\n"),
                }
            }
            text += &format!("Sig: cache-1:{}==\n", "A".repeat(86));
            Reply::Whole(200, text.into_bytes())
        })
    });
    scene.assert_fetched_quietly("little");
    assert!(!scene.evil.was_asked(".nar"), "a forged narinfo was believed");
}

#[test]
fn peer_with_false_haves_hides_no_path() {
    let scene = Scene::new(|_| Box::new(|_| Reply::Whole(404, b"no".to_vec())));
    scene.assert_fetched_quietly("closure300");
    // A path that no peer has is a miss, not an error.
    let answer =
        http::get_local(&scene.asker.host, &format!("/{}.narinfo", "0".repeat(32))).unwrap();
    assert_eq!(answer.status, 404);
}

#[test]
fn peer_with_silent_http_hides_no_path() {
    let scene = Scene::new(|_| Box::new(|_| Reply::Silence));
    scene.assert_fetched_quietly("closure300");
}

#[test]
fn peer_with_invalid_http_hides_no_path() {
    let scene = Scene::new(|_| {
        Box::new(|request| {
            match request.path.as_bytes().get(8).unwrap_or(&0) % 6 {
            0 => Reply::Raw(b"\0\xff\xfe noise \r\n\r\n".to_vec()),
            1 => Reply::Raw(vec![b'a'; 1 << 20]),
            2 => Reply::Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\nStorePath: ".to_vec()),
            3 => Reply::Raw([b"HTTP/1.1 200 OK\r\n".to_vec(), b"X: y\r\n".repeat(100_000)].concat()),
            4 => Reply::Raw(
                b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:12304/\r\nContent-Length: 0\r\n\r\n".to_vec(),
            ),
            _ => Reply::Whole(503, vec![]),
        }
        })
    });
    scene.assert_fetched_quietly("closure300");
}

/// Each of these narinfos breaks a build with some version of Nix if it gets there.
#[test]
fn malformed_narinfos_never_reach_nix() {
    let scene = Scene::new(|world| {
        let shelf = StaticCache::of(world);
        let other = world.path("other").to_owned();
        Box::new(move |request| {
            let text = asked_for(request)
                .and_then(|hash_part| shelf.peer_narinfo(hash_part, "local/nar/x.nar"));
            let Some(text) = text else { return Reply::Whole(404, vec![]) };
            let without = |field: &str| {
                text.lines()
                    .filter(|line| !line.starts_with(field))
                    .map(|line| format!("{line}\n"))
                    .collect()
            };
            let with = |field: &str, value: &str| -> String {
                let rest: String = without(field);
                format!("{rest}{field}: {value}\n")
            };
            let bad: String = match request.path.as_bytes().get(8).unwrap_or(&0) % 16 {
                0 => String::new(),
                1 => without("StorePath"),
                2 => without("NarHash"),
                3 => without("NarSize"),
                4 => without("URL"),
                5 => text.replace('\n', "\r\n"),
                6 => with("StorePath", &other),
                7 => with("StorePath", "/etc/passwd"),
                8 => with("NarSize", "-1"),
                9 => with("NarSize", "99999999999999999999999999"),
                10 => with("NarHash", "sha256:0"),
                11 => with("References", "../../../etc/passwd"),
                12 => with("URL", "http://127.0.0.1:12304/nix-cache-info"),
                13 => with("Compression", "bzip2"),
                14 => text.replace("/nix/store", "/gnu/store"),
                _ => format!("{text}{}", "Sig: x:y\n".repeat(100_000)),
            };
            Reply::Whole(200, bad.into_bytes())
        })
    });
    scene.assert_fetched_quietly("closure300");
}

/// Nix unpacks a NAR as root while it downloads, before it knows the hash. peerix must therefore
/// check the framing of the NAR.
#[test]
fn malformed_archives_never_reach_nix() {
    let entry = |name: &[u8]| nar::archive(&nar::directory(&[(name, nar::file(b"escaped"))]));
    // Longer than the longest possible path.
    let deep =
        (0..70).fold(nar::file(b"escaped"), |node, _| nar::directory(&[(&[b'd'; 255], node)]));
    let twice = nar::directory(&[
        (b"a", nar::link(b"/tmp")),
        (b"a", nar::directory(&[(b"b", nar::file(b"escaped"))])),
    ]);
    let backwards = nar::directory(&[(b"b", nar::file(b"escaped")), (b"a", nar::file(b"escaped"))]);
    let mut padding = nar::archive(&nar::file(b"escaped"));
    let at = padding.len() - 17;
    padding[at] = 1;
    let archives = [
        entry(b"../../../tmp/escaped"),
        entry(b".."),
        entry(b"."),
        entry(b""),
        entry(b"a\0b"),
        entry(b"/tmp/escaped"),
        nar::archive(&deep),
        nar::archive(&twice),
        nar::archive(&backwards),
        padding,
        b"not an archive, but escaped all the same".to_vec(),
    ];

    let lan = Lan::new();
    // The asker requires no signatures, so it accepts these narinfos.
    let asker = Asker::with(&lan, "", &[]);
    for (number, archive) in archives.into_iter().enumerate() {
        let what = String::from_utf8_lossy(&archive).into_owned();
        let hash_part = format!("{number:032}");
        let narinfo = format!(
            "StorePath: /nix/store/{hash_part}-evil\nURL: local/nar/evil.nar\nCompression: none\nNarHash: {}\n\
             NarSize: {}\nReferences: \n",
            nix::hash(&asker.host, &archive),
            archive.len()
        );
        // peerix avoids a liar for some time, so each archive has its own host.
        let host = lan.host("evil");
        let _evil =
            StandIn::start(&host, have(|_| true), move |request: &Request| {
                match asked_for(request) {
                    Some(_) => Reply::Whole(200, narinfo.clone().into_bytes()),
                    None => Reply::Whole(200, archive.clone()),
                }
            });
        let found = wait_for("the bad peer is believed", || {
            let answer = http::get_local(&asker.host, &format!("/{hash_part}.narinfo")).unwrap();
            (answer.status == 200).then(|| answer.text())
        });
        let url = found.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap();
        let answer = http::get_local(&asker.host, &format!("/{url}")).unwrap();
        assert!(answer.status != 200 || !answer.whole, "{what}: completed");
        assert!(!answer.text().contains("escaped"), "{what}: passed on");
    }
}

/// If peerix avoids the only holder of a path after a broken stream, its lookups miss, and Nix
/// remembers each miss for an hour.
#[test]
fn broken_stream_of_the_only_holder_hides_no_path() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    let whole = AtomicBool::new(false);
    let answers = lying_nar(&world, move |nar| match whole.swap(true, Ordering::Relaxed) {
        true => Reply::Whole(200, nar),
        false => Reply::Cut(nar.clone(), nar.len() / 2),
    });
    let only = StandIn::start(&lan.host("only"), have(|_| true), answers);
    let (little, other) = (world.path("little"), world.path("other"));
    wait_for("the only holder is known", || {
        let answer = http::get_local(&asker.host, &format!("/{}", narinfo(little))).unwrap();
        (answer.status == 200).then_some(())
    });
    std::thread::scope(|scope| {
        let fetching = thread::spawn_in(scope, "Nix", || asker.fetch_and_check(&world, little));
        wait_for("the stream broke", || asker.daemon.log().contains("stream broke").then_some(()));
        let answer = http::get_local(&asker.host, &format!("/{}", narinfo(other))).unwrap();
        assert_eq!(answer.status, 200);
        // Nix gets the rest of the broken NAR from the same peer.
        fetching.join().unwrap();
    });
    assert!(only.was_asked(&narinfo(other)));
}
