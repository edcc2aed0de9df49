//! Access control: every kind of answer, for shareable paths and others, as a stranger, a
//! neighbour, a friend and the machine itself get it.

use crate::common::friend::{self, TlsConnection};
use crate::common::http::{Answer, Connection, Reply, Server, get, get_local};
use crate::common::packet::Packet;
use crate::common::standin::receive;
use crate::common::stock::{self, line, query_has};
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, thread, wait_for, world};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::{Arc, Condvar, Mutex};

const STRANGER: &str = "203.0.113.9";
const UPSTREAM_PORT: u16 = 8000;

/// Number of the friend's identity.
const FRIEND: u8 = 3;

/// Names of the derivations in the table; each has a log. "broken" comes last, because its error
/// makes the node pause requests to upstream.
const NAMES: [&str; 7] =
    ["plain", "a-secret-b", "a-custom-b", "absent", "changed", "odd", "broken"];

/// Further derivations that upstream has.
const MORE_NAMES: [&str; 12] =
    ["m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "m9", "m10", "m11"];

/// A stand-in for the upstream cache: answers by hash part, and number of requests for each.
#[derive(Default)]
struct Upstream {
    answers: Mutex<BTreeMap<String, (u16, String)>>,
    asked: Mutex<BTreeMap<String, usize>>,
    gate: Mutex<Gate>,
    opened: Condvar,
}

/// Delays requests for some hash parts, and counts concurrent requests.
#[derive(Default)]
struct Gate {
    held: BTreeSet<String>,
    now: usize,
    most: usize,
}

impl Upstream {
    fn serve(self: &Arc<Self>, host: &Host) -> Server {
        let upstream = Arc::clone(self);
        Server::start(host.listen(UPSTREAM_PORT), move |request| {
            let hash_part =
                request.path.strip_prefix('/').and_then(|path| path.strip_suffix(".narinfo"));
            let hash_part =
                hash_part.unwrap_or_else(|| panic!("upstream was asked for {}", request.path));
            *upstream.asked.lock().unwrap().entry(hash_part.to_owned()).or_default() += 1;
            let mut gate = upstream.gate.lock().unwrap();
            gate.now += 1;
            gate.most = gate.most.max(gate.now);
            let is_held = |gate: &mut Gate| gate.held.contains(hash_part);
            let (mut gate, _) =
                upstream.opened.wait_timeout_while(gate, DEADLINE, is_held).unwrap();
            gate.now -= 1;
            let (status, body) = upstream
                .answers
                .lock()
                .unwrap()
                .get(hash_part)
                .cloned()
                .unwrap_or((404, "no".into()));
            Reply::Whole(status, body.into_bytes())
        })
    }

    /// Delays answers about these paths until [`Upstream::open`].
    fn hold<'a>(&self, paths: impl Iterator<Item = &'a String>) {
        self.gate.lock().unwrap().held.extend(paths.map(|path| world::hash_part(path).to_owned()));
    }

    fn open(&self) {
        self.gate.lock().unwrap().held.clear();
        self.opened.notify_all();
    }

    fn asked_for(&self, path: &str) -> usize {
        self.asked.lock().unwrap().get(world::hash_part(path)).copied().unwrap_or(0)
    }
}

struct Scene {
    node: Host,
    neighbour: Host,
    stranger: Host,
    cache: Host,
    /// Derivations by name.
    paths: BTreeMap<&'static str, String>,
    upstream: Arc<Upstream>,
    _lan: Lan,
}

impl Scene {
    fn new() -> Scene {
        let lan = Lan::new();
        let [node, neighbour, stranger, cache] =
            ["node", "neighbour", "stranger", "cache"].map(|name| lan.host(name));
        stock::ready(&node);
        // On the same link, but with an address outside the node's networks.
        stranger.net(&format!("ip addr add {STRANGER}/32 dev lo"));
        stranger.net(&format!("ip route add {}/32 dev eth0 src {STRANGER}", node.address));
        node.net(&format!("ip route add {STRANGER}/32 via {}", stranger.address));

        let names: Vec<&str> = NAMES.into_iter().chain(MORE_NAMES).collect();
        let list: String = names.iter().map(|name| format!("\"{name}\" ")).collect();
        let builder = "system = builtins.currentSystem; builder = \"/bin/sh\";";
        node.write(
            "/tmp/all.nix",
            format!("map (name: derivation {{ inherit name; {builder} }}) [ {list} ]"),
        );
        let made = node.sh("nix-instantiate /tmp/all.nix 2> /tmp/said");
        let paths: BTreeMap<_, _> =
            names.into_iter().zip(made.lines().map(str::to_owned)).collect();
        for path in paths.values() {
            let (shard, rest) = world::base_name(path).split_at(2);
            node.write(&format!("/nix/var/log/nix/drvs/{shard}/{rest}"), format!("log of {path}"));
        }
        let scene =
            Scene { node, neighbour, stranger, cache, paths, upstream: Arc::default(), _lan: lan };
        scene.fill_upstream();
        scene
    }

    /// Gives upstream the node's narinfos; some of them are absent, changed, invalid or an error.
    fn fill_upstream(&self) {
        let daemon = Daemon::start(&self.node, &[]);
        let mut answers = self.upstream.answers.lock().unwrap();
        for (name, path) in &self.paths {
            let own = get_local(&self.node, &format!("/store/{}.narinfo", world::hash_part(path)))
                .unwrap()
                .text();
            let theirs =
                own.replace("Compression: none", "Compression: xz").replace(".nar\n", ".nar.xz\n");
            let digit = line(&own, "NarHash").as_bytes()[20];
            let other = if digit == b'0' { '1' } else { '0' };
            let answer = match *name {
                "absent" => continue,
                "changed" => {
                    let hash = line(&own, "NarHash");
                    (200, theirs.replace(hash, &format!("{}{other}{}", &hash[..20], &hash[21..])))
                }
                "odd" => (200, "<html>not what was asked for</html>".into()),
                "broken" => (500, theirs),
                _ => (200, theirs),
            };
            answers.insert(world::hash_part(path).to_owned(), answer);
        }
        drop(daemon);
    }

    fn flags<'a>(&self, mode: &'a str, more: &[&'a str]) -> Vec<String> {
        let upstream = format!("http://{}:{UPSTREAM_PORT}", self.cache.address);
        let friend = format!("friend={}", friend::identity(FRIEND).key());
        let own =
            ["--mode", mode, "--tracker-url", "http://127.0.0.1:9", "--upstream-cache", &upstream];
        let own = [&own[..], &["--state-dir", friend::STATE, "--friend", &friend]].concat();
        own.iter().chain(more).map(|flag| (*flag).to_owned()).collect()
    }

    fn start(&self, mode: &str, more: &[&str]) -> Daemon {
        let flags = self.flags(mode, more);
        Daemon::start(&self.node, &flags.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn node(&self) -> SocketAddr {
        (self.node.address, PORT).into()
    }

    /// One route for each kind of answer about a path.
    fn routes(&self, path: &str) -> Vec<String> {
        let hash_part = world::hash_part(path);
        let own = get_local(&self.node, &format!("/store/{hash_part}.narinfo")).unwrap();
        let nar = line(&own.text(), "URL").to_owned();
        vec![
            format!("/local/{hash_part}.narinfo"),
            format!("/store/{hash_part}.narinfo"),
            format!("/local/{nar}"),
            format!("/store/{nar}"),
            format!("/store/{hash_part}.ls"),
            format!("/store/log/{}", world::base_name(path)),
        ]
    }

    /// Checks that `from` gets every answer about the path. If it is not shared, the answers must
    /// equal those about an absent path. Asks by UDP last.
    fn check(&self, from: &Host, path: &str, shared: bool, case: &str) {
        let nowhere = "0".repeat(32);
        let mut connection = Connection::new(from.connect(self.node()).unwrap()).unwrap();
        for route in self.routes(path) {
            for method in ["GET", "HEAD"] {
                let answer = connection.ask(method, &route, "").unwrap();
                if shared {
                    assert_eq!(answer.status, 200, "{case}: {method} {route}");
                    continue;
                }
                let route_nowhere = route.replace(world::hash_part(path), &nowhere);
                let absent = connection.ask(method, &route_nowhere, "").unwrap();
                assert_eq!(answer.status, 404, "{case}: {method} {route}");
                assert_eq!(
                    all_but_the_time(answer),
                    all_but_the_time(absent),
                    "{case}: {method} {route}"
                );
            }
        }
        assert_eq!(query_has(&self.udp(from), &self.node, path), shared, "{case}: UDP");
    }

    /// Checks that the friend gets every answer about the path, or 403, from any address.
    fn check_friend(&self, path: &str, shared: bool, case: &str) {
        let (identity, key) = (friend::identity(FRIEND), friend::key(&self.node));
        for from in [&self.neighbour, &self.stranger] {
            let mut connection = TlsConnection::open(from, self.node(), &identity, key).unwrap();
            for route in self.routes(path) {
                let (status, _) = connection.get(&route).unwrap();
                assert_eq!(
                    status,
                    if shared { 200 } else { 403 },
                    "{case} from {}: {route}",
                    from.name
                );
            }
        }
    }

    /// Checks that `from` gets 403 on every route about the path.
    fn check_refused(&self, from: &Host, path: &str, case: &str) {
        let mut connection = Connection::new(from.connect(self.node()).unwrap()).unwrap();
        for route in self.routes(path) {
            for method in ["GET", "HEAD"] {
                assert_eq!(
                    connection.ask(method, &route, "").unwrap().status,
                    403,
                    "{case}: {method} {route}"
                );
            }
        }
    }

    fn udp(&self, from: &Host) -> UdpSocket {
        from.in_net(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap())
    }

    /// Checks that this machine gets every answer. It sends itself no UDP queries.
    fn check_own(&self, path: &str, case: &str) {
        for route in self.routes(path) {
            assert_eq!(get_local(&self.node, &route).unwrap().status, 200, "{case}: {route}");
        }
    }
}

fn all_but_the_time(mut answer: Answer) -> String {
    answer.headers.retain(|(name, _)| name != "date");
    format!("{answer:?}")
}

/// Flags, and the names in [`NAMES`] that a stranger may get with them.
const TABLE: &[(&[&str], &[&str])] = &[
    (&[], &["plain", "a-custom-b"]),
    (&["--no-verify"], &["plain", "a-custom-b", "absent", "changed", "odd", "broken"]),
    (&["--no-filter"], &["plain", "a-secret-b", "a-custom-b"]),
    (&["--no-default-filters"], &["plain", "a-secret-b", "a-custom-b"]),
    (&["--filter-patterns", "*-custom-*"], &["plain"]),
    (&["--filter-patterns", "*-CUSTOM-*", "plain.drv", "*-odd[.]drv"], &["plain", "a-custom-b"]),
    (&["--no-default-filters", "--filter-patterns", "*-custom-*"], &["plain", "a-secret-b"]),
    (&["--no-filter", "--filter-patterns", "*-custom-*"], &["plain", "a-secret-b", "a-custom-b"]),
    (
        &["--no-verify", "--filter-patterns", "*-custom-*", "*-[o]??.drv"],
        &["plain", "absent", "changed", "broken"],
    ),
    (
        &["--no-verify", "--no-filter"],
        &["plain", "a-secret-b", "a-custom-b", "absent", "changed", "odd", "broken"],
    ),
];

/// Returns true if a filter pattern withholds the derivation of this name.
fn is_kept(name: &str, flags: &[&str]) -> bool {
    let has_flag = |flag| flags.contains(&flag);
    let default = name == "a-secret-b" && !has_flag("--no-default-filters");
    let own = name == "a-custom-b" && has_flag("*-custom-*")
        || name == "odd" && (has_flag("*-[o]??.drv") || has_flag("*-odd[.]drv"));
    !has_flag("--no-filter") && (default || own)
}

#[test]
fn flags_decide_which_paths_strangers_get_in_mode_both() {
    check_flags("both");
}

#[test]
fn flags_decide_which_paths_strangers_get_in_mode_wan() {
    check_flags("wan");
}

/// Checks which paths a node with each row of flags gives to whom.
fn check_flags(mode: &str) {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    for (flags, shared) in TABLE {
        scene.upstream.asked.lock().unwrap().clear();
        let daemon = scene.start(mode, flags);
        // In mode wan a neighbour is a stranger.
        if mode == "both" {
            for name in NAMES {
                let case = format!("{mode} {flags:?}: {name}");
                scene.check_own(&scene.paths[name], &format!("{case} for this machine"));
                scene.check(
                    &scene.neighbour,
                    &scene.paths[name],
                    true,
                    &format!("{case} for a neighbour"),
                );
            }
        }
        for name in NAMES {
            let case = format!("{mode} {flags:?}: {name} for a friend");
            scene.check_friend(&scene.paths[name], true, &case);
        }
        for name in NAMES {
            let case = format!("{mode} {flags:?}: {name}");
            let (path, shared) = (&scene.paths[name], shared.contains(&name));
            scene.check(&scene.stranger, path, shared, &format!("{case} for a stranger"));
            if mode == "wan" {
                scene.check_own(path, &format!("{case} for this machine"));
                scene.check(&scene.neighbour, path, shared, &format!("{case} for a neighbour"));
            }
            let asked = scene.upstream.asked_for(path);
            if flags.contains(&"--no-verify") || is_kept(name, flags) {
                assert_eq!(asked, 0, "{case}: what is not to be verified is nobody's business");
            } else if ["odd", "broken"].contains(&name) {
                assert!(asked >= 1, "{case}: upstream was not asked");
            } else {
                // The node verifies paths for its own announcements too. Both uses share one
                // request.
                assert_eq!(asked, 1, "{case}: requests to upstream");
            }
        }
        drop(daemon);
    }
}

#[test]
fn share_flag_restricts_clients() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    let path = &scene.paths["plain"];
    for mode in ["both", "wan", "lan"] {
        for (share, friend, lan) in
            [("lan", true, true), ("friends", true, false), ("nobody", false, false)]
        {
            scene.upstream.asked.lock().unwrap().clear();
            let _daemon = scene.start(mode, &["--no-verify", "--no-filter", "--share", share]);
            let case = format!("{mode} --share {share}");
            scene.check_own(path, &case);
            scene.check_friend(path, friend, &case);
            scene.check_refused(&scene.stranger, path, &format!("{case} for a stranger"));
            match lan && mode != "wan" {
                true => {
                    scene.check(&scene.neighbour, path, true, &format!("{case} for a neighbour"))
                }
                false => {
                    scene.check_refused(&scene.neighbour, path, &format!("{case} for a neighbour"))
                }
            }
            // A neighbour gets *have not*, so that it need not wait; a stranger gets no answer.
            if !lan && mode != "wan" {
                assert!(!query_has(&scene.udp(&scene.neighbour), &scene.node, path), "{case}: UDP");
            }
            assert_eq!(scene.upstream.asked_for(path), 0, "{case}: nothing is published");
        }
    }
}

#[test]
fn stranger_gains_nothing_by_headers() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    let (plain, absent) = (&scene.paths["plain"], &scene.paths["absent"]);
    let relay = format!("/{}.narinfo", world::hash_part(plain));
    let lan_mode = Daemon::start(&scene.node, &["--no-verify", "--no-filter"]);
    for route in scene.routes(plain) {
        assert_eq!(get(&scene.stranger, scene.node(), &route).unwrap().status, 403, "{route}");
    }
    drop(lan_mode);
    let _daemon = scene.start("both", &[]);
    let neighbour = scene.neighbour.address.to_string();
    for address in ["127.0.0.1", "::1", "[::1]", "localhost", &neighbour] {
        let mut connection =
            Connection::new(scene.stranger.connect(scene.node()).unwrap()).unwrap();
        let headers = format!(
            "X-Forwarded-For: {address}\r\nForwarded: for={address}\r\nX-Real-IP: {address}\r\nClient-IP: {address}\r\n\
             X-Client-IP: {address}\r\nTrue-Client-IP: {address}\r\nVia: 1.1 {address}\r\nReferer: http://{address}\r\n"
        );
        for route in scene.routes(absent) {
            assert_eq!(
                connection.ask("GET", &route, &headers).unwrap().status,
                404,
                "{address}: {route}"
            );
        }
        let relayed = relay
            .replace('/', "/peer/nar/")
            .replace(".narinfo", &format!("-{}.nar", "0".repeat(52)));
        assert_eq!(
            connection.ask("GET", &relayed, &headers).unwrap().status,
            403,
            "{address}: {relayed}"
        );
        // On this machine the route looks paths up at peers. For a stranger it is the local store.
        for route in [&relay, &format!("http://{address}:{PORT}{relay}")] {
            assert_eq!(
                connection.ask("GET", route, &headers).unwrap().status,
                200,
                "{address}: {route}"
            );
        }
    }
    assert_eq!(get(&scene.stranger, scene.node(), "/nix-cache-info").unwrap().status, 200);
    assert_eq!(get(&scene.stranger, scene.node(), "/store/nix-cache-info").unwrap().status, 200);
}

#[test]
fn udp_query_causes_no_request_to_upstream() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    // Without answers, the node stops at the first path that it verifies for its announcements.
    scene.upstream.hold(scene.paths.values());
    let _daemon = scene.start("both", &[]);
    let udp = scene.udp(&scene.stranger);
    for name in NAMES {
        assert!(!query_has(&udp, &scene.node, &scene.paths[name]), "{name}");
    }
    assert!(scene.upstream.asked.lock().unwrap().len() <= 1);
    scene.upstream.open();
    let plain = &scene.paths["plain"];
    assert_eq!(
        get(&scene.stranger, scene.node(), &stock::narinfo_route(plain)).unwrap().status,
        200
    );
    assert!(query_has(&udp, &scene.node, plain), "it is known now");
}

#[test]
fn path_without_nar_size_is_a_miss() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    let _daemon = scene.start("both", &["--no-verify", "--no-filter"]);
    let path = &scene.paths["plain"];
    let route = stock::narinfo_route(path);
    assert_eq!(get(&scene.stranger, scene.node(), &route).unwrap().status, 200);
    // Registered again without a NAR size: path, hash, size, deriver, number of references.
    scene.node.write("/tmp/dump", format!("{path}\n{}\n0\n\n0\n", "0".repeat(64)));
    scene.node.sh("nix-store --load-db < /tmp/dump");
    // The broken row makes only this path a miss, and is no reason to avoid the peer.
    assert_eq!(get(&scene.neighbour, scene.node(), &route).unwrap().status, 404);
    let absent = get(
        &scene.stranger,
        scene.node(),
        &stock::narinfo_route(&format!("/x/{}", "0".repeat(32))),
    )
    .unwrap();
    let answer = get(&scene.stranger, scene.node(), &route).unwrap();
    assert_eq!(answer.status, 404);
    assert_eq!(all_but_the_time(answer), all_but_the_time(absent));
}

#[test]
fn unreachable_upstream_withholds_only_unverified_paths() {
    let scene = Scene::new();
    let mut daemon = scene.start("both", &[]);
    for name in NAMES {
        let path = &scene.paths[name];
        scene.check(&scene.stranger, path, false, name);
        scene.check(&scene.neighbour, path, true, name);
    }
    assert!(daemon.log().contains("warn: upstream cache http://"));
    // A failed request is not cached: the node asks again when upstream is there.
    let plain = &scene.paths["plain"];
    let cache = scene.upstream.serve(&scene.cache);
    wait_for("upstream is asked again", || {
        let answer = get(&scene.stranger, scene.node(), &stock::narinfo_route(plain)).unwrap();
        (answer.status == 200).then_some(())
    });
    scene.check(&scene.stranger, plain, true, "upstream is back");
    // The answer stays cached after upstream is gone.
    drop(cache);
    scene.check(&scene.stranger, plain, true, "gone again");

    // An upstream that accepts connections and never answers.
    daemon.stop();
    let _silent = Server::start(scene.cache.listen(UPSTREAM_PORT), |_| Reply::Silence);
    let _daemon = scene.start("both", &[]);
    std::thread::scope(|scope| {
        let waiting = thread::spawn_in(scope, "stranger", || {
            scene.check(&scene.stranger, plain, false, "upstream is silent")
        });
        scene.check(&scene.neighbour, plain, true, "upstream is silent");
        waiting.join().unwrap();
    });
}

#[test]
fn upstream_gets_at_most_four_requests_and_one_per_path() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    let upstream = &scene.upstream;
    // The node would pause requests to an upstream with errors.
    upstream.answers.lock().unwrap().remove(world::hash_part(&scene.paths["broken"]));
    upstream.hold(MORE_NAMES.iter().map(|name| &scene.paths[name]));
    let _daemon = scene.start("both", &[]);
    let plain = &scene.routes(&scene.paths["plain"])[2];
    assert_eq!(get(&scene.stranger, scene.node(), plain).unwrap().status, 200);
    // For its announcements, the node verifies its paths one by one, up to the first held one.
    wait_for("one question", || (upstream.gate.lock().unwrap().now == 1).then_some(()));
    // Nearly three requests for each path: 32 NARs, as many as one peer may read at once, and
    // three narinfos.
    let asked: Vec<&String> =
        MORE_NAMES.iter().flat_map(|name| [&scene.paths[name]; 3]).skip(1).collect();
    let ask = |(at, path): (usize, &&String)| {
        let route = scene.routes(path).swap_remove(if at < 32 { 2 } else { 0 });
        let mut connection =
            Connection::new(scene.stranger.connect(scene.node()).unwrap()).unwrap();
        connection
            .send(format!("GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").as_bytes())
            .unwrap();
        connection
    };
    // As many requests as may wait, and three that ask upstream.
    let connections: Vec<Connection> = asked.iter().enumerate().map(ask).collect();
    wait_for("four questions", || (upstream.gate.lock().unwrap().now == 4).then_some(()));
    // The waiting requests do not block other clients.
    assert_eq!(get(&scene.stranger, scene.node(), plain).unwrap().status, 200);
    for name in MORE_NAMES {
        assert_eq!(stock::narinfo(&scene.neighbour, &scene.node, &scene.paths[name]).status, 200);
        assert_eq!(
            get_local(&scene.node, &stock::narinfo_route(&scene.paths[name])).unwrap().status,
            200
        );
    }
    upstream.open();
    for (mut connection, path) in connections.into_iter().zip(asked) {
        assert_eq!(connection.answer(true).unwrap().status, 200, "{path}");
        assert_eq!(upstream.asked_for(path), 1, "{path}");
    }
    assert_eq!(upstream.gate.lock().unwrap().most, 4);
}

#[test]
fn wan_mode_sends_no_unsolicited_datagram() {
    let scene = Scene::new();
    let _cache = scene.upstream.serve(&scene.cache);
    // From the peers' port, to which broadcasts also go.
    let udp = scene.neighbour.udp(PORT);
    let _daemon = scene.start("wan", &["--no-verify"]);
    let hello = Packet::Hello { version: 1, port: PORT, instance: [7; 8], flags: 0 };
    udp.send_to(&hello.write(), scene.node()).unwrap();
    assert_eq!(
        get_local(&scene.node, &format!("/{}.narinfo", "0".repeat(32))).unwrap().status,
        404
    );
    let hash_part = world::hash_part(&scene.paths["plain"]).to_owned();
    udp.send_to(&Packet::Query { id: 7, hash_part }.write(), scene.node()).unwrap();
    // A datagram that the node sent unasked would arrive before the answer.
    let (from, datagram) = receive(&udp, DEADLINE).expect("an answer");
    assert_eq!(from, scene.node());
    assert!(matches!(Packet::read(&datagram), Some(Packet::Have { id: 7, .. })), "{datagram:?}");
}
