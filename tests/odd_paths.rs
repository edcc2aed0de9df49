//! Unusual paths in real stores, and requests of real Nix for other things than paths. Each case
//! comes from bug reports of other caches. The doc comment of a test names the regression that
//! it guards against.

use crate::common::daemon::{
    self, add_unique_path, binary, narinfo_status, wait_until_known, wait_until_live,
};
use crate::common::fault::Delay;
use crate::common::http::{self, Reply, Request};
use crate::common::lan::Run;
use crate::common::process::status_number;
use crate::common::solo::TempDir;
use crate::common::standin::{StandIn, StaticCache, have};
use crate::common::stock;
use crate::common::{
    Asker, Bystander, Daemon, Holder, Host, Lan, PORT, World, nix, thread, wait_for, world,
};
use rustix::process::Signal;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::{ffi::OsStrExt, fs::PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

const DB: &str = "/nix/var/nix/db/db.sqlite";

/// Uses a copy of a host's database: SQLite would resolve `/proc/…/root/…` on this machine.
fn with_copy<T>(
    host: &Host,
    file: &str,
    work: impl FnOnce(&rusqlite::Connection) -> T,
) -> (T, Vec<u8>) {
    let dir = TempDir::new();
    fs::create_dir_all(dir.file("")).unwrap();
    let copy = dir.file("db.sqlite");
    for suffix in ["", "-wal"] {
        if let Ok(bytes) = fs::read(host.path(&format!("{file}{suffix}"))) {
            fs::write(format!("{}{suffix}", copy.display()), bytes).unwrap();
        }
    }
    let connection = rusqlite::Connection::open(&copy).unwrap();
    let result = work(&connection);
    drop(connection);
    (result, fs::read(&copy).unwrap())
}

/// Changes the Nix database, or another one, of a host. No process may have it open.
fn sql(host: &Host, file: &str, statements: &str) {
    let ((), changed) =
        with_copy(host, file, |connection| connection.execute_batch(statements).unwrap());
    for suffix in ["-wal", "-shm"] {
        let _ = fs::remove_file(host.path(&format!("{file}{suffix}")));
    }
    fs::write(host.path(file), changed).unwrap();
}

/// Builds an expression on a host whose Nix supports content-addressed derivations.
fn build(host: &Host, expression: &str, options: &[&str]) -> Output {
    let mut command = host.cmd("timeout");
    command.args(["300", "nix-build", "--no-out-link", "--expr", expression]).args(options);
    command.env("NIX_CONFIG", "extra-experimental-features = ca-derivations").ran()
}

fn built(host: &Host, expression: &str, options: &[&str]) -> String {
    let output = build(host, expression, options);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Adds a text file to the store of a host, and returns its path.
fn file(host: &Host, name: &str, text: &str) -> String {
    host.write(&format!("/tmp/{name}"), text);
    host.cmd("nix-store").args(["--add", &format!("/tmp/{name}")]).okay().trim().to_owned()
}

/// Regression: after four such paths the asker avoided the peer, and Nix cached misses for its 300
/// ordinary paths for an hour.
#[test]
fn rejected_narinfos_of_peer_hide_no_other_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    let shelf = StaticCache::of(&world);
    // Narinfos of a peer that this peerix or Nix does not accept.
    let narinfo = move |kind: usize, hash_part: &str| {
        let (hash, size, more) = match kind {
            0 => (
                "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
                "8",
                "x".repeat(1 << 20),
            ),
            1 => {
                ("sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73", "0", String::new())
            }
            2 => {
                ("sha512:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73", "8", String::new())
            }
            3 => (
                "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
                "17592186044417",
                String::new(),
            ),
            _ => {
                ("sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73", "8", String::new())
            }
        };
        let name = if kind == 4 { ".-name".to_owned() } else { "name".to_owned() };
        let compression = if kind == 5 { "xz" } else { "none" };
        format!(
            "StorePath: /nix/store/{hash_part}-{name}\nURL: x.nar\nCompression: {compression}\nNarHash: {hash}\n\
             NarSize: {size}\nReferences: \nX: {more}\n"
        )
    };
    let host = lan.host("odd");
    let peer = StandIn::start(&host, have(|_| true), move |request: &Request| {
        let missing = || Reply::Whole(404, vec![]);
        if let Some(name) =
            request.path.strip_prefix("/local/nar/").and_then(|rest| rest.strip_suffix(".nar"))
        {
            return shelf.nar(name).map_or_else(missing, |nar| Reply::Whole(200, nar));
        }
        let hash_part =
            request.path.strip_prefix("/local/").and_then(|rest| rest.strip_suffix(".narinfo"));
        let Some(hash_part) = hash_part else { return missing() };
        let kind =
            hash_part.strip_prefix(&"0".repeat(30)).and_then(|number| number.parse::<usize>().ok());
        let text = match kind {
            Some(number) => Some(narinfo(number % 6, hash_part)),
            None => shelf.peer_narinfo(hash_part, &format!("local/nar/{hash_part}.nar")),
        };
        text.map_or_else(missing, |text| Reply::Whole(200, text.into_bytes()))
    });
    peer.meet(&host, &asker.host);
    let path = world.path("closure300");
    std::thread::scope(|scope| {
        let fetching = thread::spawn_in(scope, "Nix", || asker.fetch_and_check(&world, path));
        for number in 0..50 {
            let answer = http::get_local(&asker.host, &format!("/{number:032}.narinfo")).unwrap();
            assert_eq!(answer.status, 404, "{number}");
        }
        assert_eq!(fetching.join().unwrap().len(), 300);
    });
    let log = asker.daemon.log();
    assert!(!log.contains("avoided for"), "{log}");
    for reason in
        ["larger than 1 MiB", "NarSize is 0", "not sha256", "dot directory", "of a compressed NAR"]
    {
        assert!(log.contains(reason), "{reason}: {log}");
    }
    // Each rejected path is logged once, however often Nix looks it up.
    for _ in 0..3 {
        assert_eq!(
            http::get_local(&asker.host, &format!("/{:032}.narinfo", 1)).unwrap().status,
            404
        );
    }
    let warned = format!("warn: {:032}: cannot be had", 1);
    assert_eq!(asker.daemon.log().matches(&warned).count(), 1, "{}", asker.daemon.log());
}

/// Regression: none of these paths was fetched. They have narinfos over 64 KiB, content addresses
/// of a later Nix, trees of more than 64 levels, a signature of another length, or an invalid
/// deriver.
#[test]
fn unusual_paths_that_nix_accepts_are_fetched() {
    const MANY: &str = r#"
        let member = number: builtins.toFile "member-of-a-large-collection-${toString number}" "${toString number}";
        in builtins.toFile "large-collection" (toString (builtins.genList member 1200))"#;
    let deep = |levels: usize| {
        format!(
            r#"derivation {{ name = "deep-{levels}"; system = builtins.currentSystem; builder = "/bin/sh";
                 PATH = "/usr/bin:/bin";
                 args = [ "-c" "mkdir -p $out/{} && echo bottom > $out/{0}/file" ]; }}"#,
            vec!["d"; levels].join("/")
        )
    };
    let lan = Lan::patient();
    let world = World::on(&lan);
    let mut paths = Vec::new();
    let holder = Holder::with(&lan, &world, "holder", |host| {
        let eval = host
            .cmd("nix-instantiate")
            .args(["--eval", "--read-write-mode", "--expr", MANY])
            .okay();
        paths.push(eval.trim().trim_matches('"').to_owned());
        paths.push(built(host, &deep(60), &[]));
        // Nix 2.34 refuses to build trees of more than 64 levels.
        let deeper = build(host, &deep(120), &[]);
        if deeper.status.success() {
            paths.push(String::from_utf8_lossy(&deeper.stdout).trim().to_owned());
        }
        let files =
            ["blake3", "git", "sha3", "signature", "deriver"].map(|name| file(host, name, name));
        paths.extend(files);
        paths.push(world.path("odd").to_owned());
        world.sign(host);
        let change = |name: &str, what: &str| {
            sql(
                host,
                DB,
                &format!("update ValidPaths set {what} where path like '/nix/store/%-{name}'"),
            );
        };
        let digest = "1c4n7q0z8y2v5x3s6w9r1a4b7d0f2g5h8i1j4k7l0m3n6p9q2r5s";
        change("blake3", &format!("ca = 'fixed:r:blake3:{digest}'"));
        change("git", "ca = 'fixed:git:sha1:00000000000000000000000000000000'");
        change("sha3", &format!("ca = 'fixed:sha3:{digest}'"));
        change("signature", &format!("ca = null, sigs = 'longer-1:{} ' || sigs", "A".repeat(128)));
        change("deriver", "ca = null, deriver = '/etc/passwd'");
        vec![]
    });
    let asker = Asker::new(&lan, &world, &[&holder]);
    let answer =
        http::get_local(&asker.host, &format!("/{}.narinfo", world::hash_part(&paths[0]))).unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.body.len() > 64 << 10, "{} bytes", answer.body.len());
    for path in &paths {
        nix::realise_quietly(&asker.host, &[path]);
        nix::assert_whole(&asker.host, &[path], &holder.host.path("/nix/store"));
    }
    let log = asker.daemon.log();
    assert!(!log.contains("avoided for") && !log.contains("cannot be had"), "{log}");
    // Nix refuses some content addresses that it cannot read. It gets those that are true of their
    // paths; peers get all.
    let blake3 = paths.iter().find(|path| path.ends_with("-blake3")).unwrap();
    let from_holder = stock::narinfo(&asker.host, &holder.host, blake3).text();
    assert!(from_holder.contains("\nCA: fixed:r:blake3:"), "{from_holder}");
    for (path, is_true) in [(blake3, false), (&paths[0], true)] {
        let route = format!("/{}.narinfo", world::hash_part(path));
        let answer = http::get_local(&asker.host, &route).unwrap();
        assert_eq!((answer.status, answer.text().contains("\nCA: ")), (200, is_true), "{path}");
    }
}

/// Looks up narinfos of almost 1 MiB over 25 connections.
#[test]
fn large_narinfos_keep_memory_bounded() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[]);
    let host = lan.host("large");
    let peer = StandIn::start(&host, have(|_| true), |request: &Request| {
        let hash_part =
            request.path.strip_prefix("/local/").and_then(|rest| rest.strip_suffix(".narinfo"));
        let Some(hash_part) = hash_part else { return Reply::Whole(404, vec![]) };
        let references: String =
            (0..13_900).map(|n| format!(" {n:032}-member-of-a-large-collection-{n}")).collect();
        let text = format!(
            "StorePath: /nix/store/{hash_part}-large\nURL: x.nar\nCompression: none\n\
             NarHash: sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73\nNarSize: 8\nReferences:{references}\n"
        );
        assert!((900 << 10..1 << 20).contains(&text.len()), "{}", text.len());
        Reply::Whole(200, text.into_bytes())
    });
    peer.meet(&host, &asker.host);
    drop(world);
    std::thread::scope(|scope| {
        for connection in 0..25 {
            let asker = &asker;
            thread::spawn_in(scope, "Nix", move || {
                let mut own = http::Connection::new(asker.host.connect_local().unwrap()).unwrap();
                for round in 0..4 {
                    let answer =
                        own.get(&format!("/{:032}.narinfo", 1 + connection * 4 + round)).unwrap();
                    assert_eq!(answer.status, 200);
                    assert!(answer.whole && answer.body.len() > 900 << 10);
                }
            });
        }
    });
    let peak = status_number(asker.daemon.pid(), "VmHWM");
    println!("peak {peak} KiB");
    assert!(peak <= 40 << 10, "peak of {peak} KiB");
}

/// Regression: builds failed with "does not exist in binary cache" for 30 days, as long as Nix
/// caches the URL of a NAR.
#[test]
fn nar_urls_cached_from_python_peerix_are_served() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let (path, large) = (world.path("little"), world.path("large"));
    // Nix caches narinfos from this peerix. The test then replaces one URL by the Python peerix's.
    let url = format!("http://127.0.0.1:{PORT}");
    asker.host.cmd("nix").args(["path-info", "--store", &url, path, large]).okay();
    let caches = asker.host.sh("ls /root/.cache/nix/binary-cache-v*.sqlite");
    let cache = caches.trim();
    let old = "update NARs set url = 'v2/remote/192.168.7.20/12304/' || hashPart || '/local/nar/remembered.nar'";
    sql(&asker.host, cache, &format!("{old} where namePart = 'little' and present = 1"));
    nix::realise_quietly(&asker.host, &[path, large]);
    nix::assert_whole(&asker.host, &[path, large], &world.store());
    // Two peers disagree about the path, so its URL is ambiguous. The daemon never contacts the
    // address in the URL.
    let other = lan.host("other");
    let shelf = StaticCache::of(&world);
    let _other = StandIn::start(&other, have(|_| true), move |request: &Request| {
        let hash_part =
            request.path.strip_prefix("/local/").and_then(|rest| rest.strip_suffix(".narinfo"));
        let text = hash_part.and_then(|hash_part| shelf.peer_narinfo(hash_part, "local/nar/x.nar"));
        let text = text.map(|text| {
            let ca = "CA: text:sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
            let lines = text.lines().map(|line| match line.split_once(": ") {
                Some(("NarHash", _)) => {
                    "NarHash: sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73"
                }
                _ => line,
            });
            lines.chain([ca]).map(|line| format!("{line}\n")).collect::<String>()
        });
        text.map_or(Reply::Whole(404, vec![]), |text| Reply::Whole(200, text.into_bytes()))
    });
    // This asker trusts no key, and accepts narinfos of any peer.
    let naive = Asker::with(&lan, "", &[]);
    naive.meet(&[&holder]);
    _other.meet(&other, &naive.host);
    let route = |name: &str| {
        format!(
            "/v2/remote/{}/{PORT}/{}/local/nar/x.nar",
            other.address,
            world::hash_part(world.path(name))
        )
    };
    assert_eq!(http::get_local(&naive.host, &route("little")).unwrap().status, 404);
    assert!(!_other.was_asked(".nar"));
}

/// Regression: `nix-cache-info` succeeded and every narinfo was 403, so Nix took the cache for
/// empty and reported nothing.
#[test]
fn neighbour_without_peerix_substitutes_from_root() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let plain = lan.host("plain");
    let url = format!("http://{}:{PORT}", holder.host.address);
    nix::configure(
        &plain,
        &format!(
            "substituters = {url}\nrequire-sigs = true\ntrusted-public-keys = {}\n",
            world.cache_key
        ),
    );
    nix::init_store(&plain);
    let path = world.path("closure300");
    nix::realise_quietly(&plain, &[path]);
    let closure = nix::closure(&plain, &[path]);
    assert_eq!(closure.len(), 300);
    nix::assert_whole(
        &plain,
        &closure.iter().map(String::as_str).collect::<Vec<_>>(),
        &world.store(),
    );
}

/// Regression: `nix log` requested `/log/…` at the root and got 404.
#[test]
fn build_logs_of_neighbours_are_served() {
    const LOGGED: &str = r#"derivation { name = "with-log"; system = builtins.currentSystem; builder = "/bin/sh";
        args = [ "-c" "printf 'a line of the log\\033]0;x\\007\\n'; echo done > $out" ]; }"#;
    let lan = Lan::patient();
    let world = World::on(&lan);
    let mut derivation = String::new();
    let holder = Holder::with(&lan, &world, "holder", |host| {
        built(host, LOGGED, &[]);
        derivation = host.cmd("nix-instantiate").args(["--expr", LOGGED]).okay().trim().to_owned();
        vec![]
    });
    let asker = Asker::new(&lan, &world, &[&holder]);
    let route = format!("/log/{}", world::base_name(&derivation));
    let answer = http::get_local(&asker.host, &route).unwrap();
    // The log is unsigned, and Nix prints it to a terminal, so control characters are replaced.
    assert_eq!((answer.status, answer.text().as_str()), (200, "a line of the log?]0;x?\n"));
    let shown = asker
        .host
        .cmd("nix")
        .args(["log", "--store", &format!("http://127.0.0.1:{PORT}"), &derivation])
        .ran();
    assert!(String::from_utf8_lossy(&shown.stdout).contains("a line of the log"), "{shown:?}");
    let unknown = format!("/log/{}-unknown.drv", "0".repeat(32));
    assert_eq!(http::get_local(&asker.host, &unknown).unwrap().status, 404);
}

/// A floating content-addressed derivation.
const FLOATING: &str = r#"derivation { name = "floating"; system = builtins.currentSystem; builder = "/bin/sh";
    args = [ "-c" "echo the same content everywhere > $out" ]; __contentAddressed = true;
    outputHashMode = "recursive"; outputHashAlgo = "sha256"; }"#;

/// A content-addressed derivation that depends on another one.
const DEPENDENT: &str = r#"let mk = name: script: more: derivation ({ inherit name; system = builtins.currentSystem;
    builder = "/bin/sh"; args = [ "-c" script ]; __contentAddressed = true; outputHashMode = "recursive";
    outputHashAlgo = "sha256"; } // more);
    floating = mk "inner" "echo inner > $out" { };
    in mk "dependent" "echo $inner > $out" { inner = floating; }"#;

/// A distant host with the realisations of both derivations, for askers on its LAN.
struct Realisations {
    lan: Lan,
    good: Host,
    _far: Delay,
    peerix: Daemon,
    mark: String,
    key: String,
    outputs: Vec<String>,
    /// The route of the realisation of [`FLOATING`].
    route: String,
}

impl Realisations {
    fn new() -> Realisations {
        let lan = Lan::patient();
        let good = lan.host("good");
        nix::configure(&good, "");
        let outputs = [FLOATING, DEPENDENT].map(|expression| built(&good, expression, &[])).into();
        let (key, mark) = (nix::generate_key(&good), add_unique_path(&good));
        let peerix = Daemon::start(&good, &["--private-key", "/etc/peerix.sec"]);
        let select = "select drvPath || '!' || outputName from Realisations join ValidPaths V on V.id = outputPath \
                      where V.path like '%-floating'";
        let (id, _) = with_copy(&good, DB, |database| {
            database.query_row(select, [], |row| row.get::<_, String>(0)).unwrap()
        });
        let far = good.delay(Duration::from_millis(100));
        Realisations {
            lan,
            good,
            _far: far,
            peerix,
            mark,
            key,
            outputs,
            route: format!("/realisations/{id}.doi"),
        }
    }

    fn asker(&self, keys: &[&str]) -> Asker {
        let asker = Asker::with(&self.lan, "", keys);
        wait_until_known(&asker.host, &self.mark);
        asker
    }

    /// A peer that claims for every derivation output that it is the peer's own content-addressed
    /// path.
    fn forger(&self) -> (StandIn, Host, String) {
        let host = self.lan.host("forger");
        nix::configure(&host, "");
        let path = file(&host, "evil", "evil content");
        host.sh(&format!("nix copy --to 'file:///tmp/cache?compression=none' {path}"));
        let cache = host.path("/tmp/cache");
        let out_path = world::base_name(&path).to_owned();
        let peer = StandIn::start(&host, have(|_| true), move |request: &Request| {
            let name = request
                .path
                .trim_start_matches('/')
                .trim_start_matches("local/")
                .replace("%21", "!");
            if let Some(id) =
                name.strip_prefix("realisations/").and_then(|rest| rest.strip_suffix(".doi"))
            {
                let signature = format!("good-1:{}==", "A".repeat(86));
                let text = format!(
                    r#"{{"dependentRealisations":{{}},"id":"{id}","outPath":"{out_path}","signatures":["{signature}"]}}"#
                );
                return Reply::Whole(200, text.into_bytes());
            }
            fs::read(cache.join(&name))
                .map_or(Reply::Whole(404, vec![]), |bytes| Reply::Whole(200, bytes))
        });
        (peer, host, path)
    }
}

/// Regression: no cache served realisations, so outputs of content-addressed derivations were never
/// substituted.
#[test]
fn content_addressed_derivations_are_substituted() {
    let scene = Realisations::new();
    let asker = scene.asker(&[&scene.key]);
    for (expression, output) in [FLOATING, DEPENDENT].iter().zip(&scene.outputs) {
        assert_eq!(built(&asker.host, expression, &["-j0"]), *output);
        nix::assert_whole(&asker.host, &[output], &scene.good.path("/nix/store"));
    }
    // Any cache serves the realisation, also to a Nix without peerix.
    let there = http::get(&asker.host, (scene.good.address, PORT), &scene.route).unwrap();
    let here = http::get_local(&asker.host, &scene.route.replace('!', "%21")).unwrap();
    assert_eq!((there.status, here.status), (200, 200));
    assert_eq!(there.text(), here.text());
    // The realisation disappears with its output path.
    scene.good.cmd("nix-store").args(["--delete", &scene.outputs[0]]).okay();
    wait_for("the realisation is gone", || {
        let answer = http::get(&asker.host, (scene.good.address, PORT), &scene.route).unwrap();
        (answer.status == 404).then_some(())
    });
}

/// Regression: the forger's content arrived although signatures were required. Nix registers
/// realisations of a substituter unchecked, and accepts content-addressed outputs unsigned.
#[test]
fn forged_realisations_never_reach_nix() {
    let mut scene = Realisations::new();
    let (forger, forging, evil) = scene.forger();
    let asker = scene.asker(&[&scene.key]);
    forger.meet(&forging, &asker.host);
    let answer = http::get_local(&asker.host, &scene.route).unwrap();
    assert_eq!(answer.status, 200);
    assert!(answer.text().contains(world::base_name(&scene.outputs[0])), "{}", answer.text());
    wait_for("the forger was asked", || forger.was_asked(".doi").then_some(()));
    assert_eq!(built(&asker.host, FLOATING, &["-j0"]), scene.outputs[0]);
    nix::assert_whole(&asker.host, &[&scene.outputs[0]], &scene.good.path("/nix/store"));

    // Without a trusted key, no realisation can be verified. Only `require-sigs = false` lifts that.
    let keyless = |host: &Host| {
        host.sh("sed -i '/require-sigs = false/d' /etc/nix/nix.conf");
        vec![]
    };
    let naive = Asker::flagged(&scene.lan, "", &[], keyless);
    daemon::wait_until_listed(&naive.host, scene.good.address);
    forger.meet(&forging, &naive.host);
    assert_eq!(http::get_local(&naive.host, &scene.route).unwrap().status, 404);

    // With the forger as the only peer, substitution fails and a local build succeeds. The store
    // must not contain the forger's path.
    scene.peerix.stop();
    // The asker's own store has the output now, and would share it.
    drop((asker, naive));
    let alone = Asker::with(&scene.lan, "", &[&scene.key]);
    forger.meet(&forging, &alone.host);
    assert_eq!(http::get_local(&alone.host, &scene.route).unwrap().status, 404);
    assert!(!build(&alone.host, FLOATING, &["-j0"]).status.success());
    assert!(!nix::valid_paths(&alone.host).contains(&evil));
    assert_eq!(built(&alone.host, FLOATING, &[]), scene.outputs[0]);
}

/// Regression: a neighbour that did not answer used up the allowed number of requests, and the next
/// neighbour was not asked.
#[test]
fn paused_neighbour_hides_no_realisation() {
    let scene = Realisations::new();
    let asker = scene.asker(&[&scene.key]);
    let mut near = Bystander::new(&scene.lan, "near");
    wait_until_live(&asker.host, 2);
    // This lookup lets the asker learn which neighbour is nearer.
    assert_eq!(narinfo_status(&asker.host, &format!("/nix/store/{}-absent", "0".repeat(32))), 404);
    near.daemon.signal(Signal::STOP);
    std::thread::scope(|scope| {
        let asks = (0..25)
            .map(|_| thread::spawn_in(scope, "ask", || http::get_local(&asker.host, &scene.route)));
        let asks: Vec<_> = asks.collect();
        for ask in asks {
            assert_eq!(ask.join().expect("it only asks").unwrap().status, 200);
        }
    });
    near.daemon.signal(Signal::CONT);
}

/// Regression: paths of a chroot store were announced, and their NARs were 404.
#[test]
fn chroot_store_is_served_with_root_flag() {
    let lan = Lan::patient();
    let host = lan.host("installer");
    nix::configure(&host, "");
    host.write("/tmp/in-chroot", "held by a chroot store");
    let added = ["store", "add-path", "--store", "/nix/target", "/tmp/in-chroot"];
    let path = host.cmd("nix").args(added).okay().trim().to_owned();
    // With the database alone the daemon can send no NAR. It answers misses and names the remedy.
    let database = "/nix/target/nix/var/nix/db/db.sqlite";
    let without_files = Daemon::start(&host, &["--db", database]);
    let own = format!("/local/{}.narinfo", world::hash_part(&path));
    assert_eq!(http::get_local(&host, &own).unwrap().status, 404);
    let health = http::get_local(&host, "/health").unwrap();
    assert!(health.status == 503 && health.text().contains("--root DIR"), "{health:?}");
    drop(without_files);
    let _peerix = Daemon::start(&host, &["--root", "/nix/target"]);
    let asker = Asker::with(&lan, "", &[]);
    wait_for("the peers find one another", || {
        (narinfo_status(&asker.host, &path) == 200).then_some(())
    });
    nix::realise_quietly(&asker.host, &[&path]);
    nix::assert_whole(&asker.host, &[&path], &host.path("/nix/target/nix/store"));
}

/// A store that differs from the default, and the user that the daemon runs as.
struct Store {
    name: &'static str,
    nix_conf: &'static str,
    /// Shell script that runs after the paths are added.
    script: &'static str,
    uid: u32,
}

/// Checks stores with other settings, permissions and mounts than the default.
#[test]
fn unusual_stores_and_databases_are_served() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let asker = Asker::with(&lan, "", &[]);
    let stores = [
        Store { name: "rollback", nix_conf: "use-sqlite-wal = false\n", script: "", uid: 65534 },
        Store { name: "rollback-root", nix_conf: "use-sqlite-wal = false\n", script: "", uid: 0 },
        Store {
            name: "hard-linked",
            nix_conf: "auto-optimise-store = true\n",
            script: "",
            uid: 65534,
        },
        Store { name: "root-only", nix_conf: "", script: "chmod 700 /nix/var/nix/db", uid: 0 },
        Store {
            name: "read-only",
            nix_conf: "",
            script: "mount --bind /nix /nix && mount -o remount,ro,bind /nix",
            uid: 65534,
        },
    ];
    for Store { name, nix_conf, script, uid } in stores {
        let host = lan.host(name);
        nix::configure(&host, nix_conf);
        // Both paths contain the same file, so that Nix hard-links it.
        let make = |tree: &str| {
            host.sh(&format!(
                "mkdir -p /tmp/{tree}; seq 1000 > /tmp/{tree}/same; echo {name}-{tree} > /tmp/{tree}/own"
            ));
            host.cmd("nix-store").args(["--add", &format!("/tmp/{tree}")]).okay().trim().to_owned()
        };
        let paths = ["one", "two"].map(make);
        host.sh(script);
        let peerix = Daemon::start_as(&host, uid, &[]);
        for path in &paths {
            wait_for("the path is found", || {
                (narinfo_status(&asker.host, path) == 200).then_some(())
            });
            nix::realise_quietly(&asker.host, &[path]);
            nix::assert_whole(&asker.host, &[path], &host.path("/nix/store"));
        }
        // This database has no tables for realisations, which must be a miss and no error.
        let route = format!("/store/realisations/sha256:{}!out.doi", "0".repeat(64));
        assert_eq!(http::get_local(&host, &route).unwrap().status, 404, "{name}");
        if script.is_empty() {
            let later = make("later");
            assert_eq!(
                http::get_local(&host, &format!("/local/{}.narinfo", world::hash_part(&later)))
                    .unwrap()
                    .status,
                200
            );
            host.cmd("nix-store").args(["--delete", &later]).okay();
            assert_eq!(
                http::get_local(&host, &format!("/local/{}.narinfo", world::hash_part(&later)))
                    .unwrap()
                    .status,
                404
            );
        }
        assert!(!peerix.log().contains("error"), "{name}: {}", peerix.log());
    }

    // An overlay store with a whiteout in its upper layer: the path is deleted, and still exists in
    // the lower layer.
    let overlaid = lan.host("overlaid");
    world.give(&overlaid);
    let (gone, kept) = (world.path("little"), world.path("other"));
    overlaid.cmd("nix-store").args(["--delete", gone]).okay();
    let _peerix = Daemon::start(&overlaid, &[]);
    wait_for("the path is found", || (narinfo_status(&asker.host, kept) == 200).then_some(()));
    assert_eq!(narinfo_status(&asker.host, gone), 404);

    // If the user may not enter the database directory, the daemon logs one line and does not
    // start.
    let closed = lan.host("closed");
    nix::configure(&closed, "");
    file(&closed, "closed", "closed");
    closed.sh("chmod 700 /nix/var/nix/db");
    let mut refused = closed.cmd_as(65534, "timeout");
    let refused =
        refused.args(["300", &binary().display().to_string()]).env("RUST_LOG", "off").ran();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(
        refused.status.code() == Some(1)
            && said.contains("/nix/var/nix/db")
            && said.lines().count() == 1,
        "{said}"
    );
}

/// A number from 0 to `below` - 1, deterministic for a seed (MMIX's constants by Knuth).
fn random(seed: &mut u64, below: u64) -> u64 {
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*seed >> 33) % below
}

/// Makes a tree with unusual names, depths and kinds of files.
fn grow(seed: &mut u64, at: &Path, levels: u64) {
    const BYTES: &[u8] = b"aZ0 .%\n\t\"'\\*?[~\xff\xc3\xa9-=+:;&|<>$`!#@\x01\x7f";
    if levels == 0 || random(seed, 4) == 0 {
        match random(seed, 4) {
            0 => std::os::unix::fs::symlink("../nowhere at all/\u{fc}", at).unwrap(),
            kind => {
                let len = [0, 1, 7, 8, 9, 4095, 4096, 70_000][random(seed, 8) as usize];
                fs::write(at, (0..len).map(|_| random(seed, 256) as u8).collect::<Vec<_>>())
                    .unwrap();
                fs::set_permissions(
                    at,
                    fs::Permissions::from_mode(if kind == 1 { 0o755 } else { 0o644 }),
                )
                .unwrap();
            }
        }
        return;
    }
    fs::create_dir(at).unwrap();
    for _ in 0..random(seed, 6) {
        let len = if random(seed, 8) == 0 { 255 } else { 1 + random(seed, 12) };
        let name: Vec<u8> =
            (0..len).map(|_| BYTES[random(seed, BYTES.len() as u64) as usize]).collect();
        let path = at.join(OsStr::from_bytes(&name));
        if name != b"." && name != b".." && path.symlink_metadata().is_err() {
            grow(seed, &path, levels - 1);
        }
    }
}

/// Nix accepts through peerix exactly the paths that it accepts from a `file://` cache of the same
/// store.
#[test]
fn peerix_serves_same_paths_as_static_cache() {
    const PATHS: u64 = 30;
    let lan = Lan::patient();
    let world = World::on(&lan);
    let seed =
        std::env::var("PEERIX_TEST_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(16);
    println!("PEERIX_TEST_SEED={seed}");
    let mut state = seed;
    let seed = &mut state;
    let mut paths = Vec::new();
    let holder = Holder::with(&lan, &world, "holder", |host| {
        for number in 0..PATHS {
            let name = format!(
                "t{number}{}",
                ["", ".x", "+-._?=", &"n".repeat(200)][random(seed, 4) as usize]
            );
            let levels = random(seed, 5);
            grow(seed, &host.path(&format!("/tmp/{name}")), levels);
            paths.push(
                host.cmd("nix-store")
                    .args(["--add", &format!("/tmp/{name}")])
                    .okay()
                    .trim()
                    .to_owned(),
            );
        }
        world.sign(host);
        let long = format!("longer-1:{}", "A".repeat(128));
        let foreign = format!("foreign-1:{}==", "A".repeat(86));
        let mut changes = String::new();
        for path in &paths {
            let sigs = match random(seed, 5) {
                0 => "null".to_owned(),
                1 => format!("'{foreign}'"),
                2 => format!("'{long} {foreign} ' || sigs"),
                _ => "sigs".to_owned(),
            };
            let ca = if random(seed, 2) == 0 { "null" } else { "ca" };
            let deriver = match random(seed, 3) {
                0 => format!("'/nix/store/{}-some.drv'", "7".repeat(32)),
                _ => "null".to_owned(),
            };
            let change = format!("sigs = {sigs}, ca = {ca}, deriver = {deriver}");
            changes += &format!("update ValidPaths set {change} where path = '{path}';");
        }
        sql(host, DB, &changes);
        host.cmd("nix")
            .args(["copy", "--to", "file:///tmp/static?compression=none"])
            .args(&paths)
            .okay();
        vec![]
    });
    let cache = holder.host.path("/tmp/static");
    let by_peerix = Asker::new(&lan, &world, &[&holder]);
    let by_file = lan.host("by-file");
    // Without peerix as a second substituter, which Nix would try for 4 s per path.
    let keys = &world.cache_key;
    nix::configure(
        &by_file,
        &format!(
            "substituters = file:///tmp/static\nrequire-sigs = true\ntrusted-public-keys = {keys}\n"
        ),
    );
    nix::init_store(&by_file);
    fs::create_dir_all(by_file.path("/tmp/static")).unwrap();
    for entry in walk(&cache) {
        by_file.write(
            &format!("/tmp/static/{}", entry.display()),
            fs::read(cache.join(&entry)).unwrap(),
        );
    }
    let mut accepted = 0;
    for path in &paths {
        let takes = |host: &Host| nix::realise(host, &[path]).status.success();
        let (file, peerix) = (takes(&by_file), takes(&by_peerix.host));
        assert_eq!(file, peerix, "{path}: the static cache says {file}, peerix {peerix}");
        if file {
            accepted += 1;
            nix::assert_whole(&by_peerix.host, &[path], &holder.host.path("/nix/store"));
        }
    }
    assert!((5..PATHS).contains(&accepted), "{accepted}");
    assert!(!by_peerix.daemon.log().contains("avoided for"), "{}", by_peerix.daemon.log());
}

/// All files below a directory, relative to it.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        let name = PathBuf::from(entry.file_name().unwrap());
        match entry.is_dir() {
            true => found.extend(walk(&entry).into_iter().map(|inner| name.join(inner))),
            false => found.push(name),
        }
    }
    found
}
