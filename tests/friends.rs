//! Friends: machines that know each other's keys and share paths that no other machine gets.

use crate::common::daemon::{add_unique_path, narinfo_status, wait_until_known};
use crate::common::friend::{
    self, STATE, TlsConnection, friend, identity, key, seen, wait_until_reached,
};
use crate::common::http::{Connection, get};
use crate::common::stock::{self, narinfo_route, query_has};
use crate::common::{
    DEADLINE, Daemon, Host, Lan, Nat, PORT, Scale, Tracker, Wan, nix, thread, wait_for, world,
};
use peerix::wire::{NodeKey, TrackerName};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

/// Starts peerix with an identity and additional flags.
fn start(host: &Host, flags: &[&str]) -> Daemon {
    Daemon::start(host, &[&["--state-dir", STATE], flags].concat())
}

/// Configures Nix on a host to ask its own peerix.
fn ready(host: &Host) {
    nix::configure_client(host, "", &[]);
}

fn at(host: &Host) -> SocketAddr {
    (host.address, PORT).into()
}

/// Checks that `machine` gets nothing about `path` from `holder`, which it reaches at `address`: no
/// narinfo, NAR or listing of the path, no *have*, no build log, and no status.
fn assert_gets_nothing(machine: &Host, holder: &Host, address: SocketAddr, path: &str) {
    let hash_part = world::hash_part(path);
    let own =
        crate::common::http::get_local(holder, &format!("/store/{hash_part}.narinfo")).unwrap();
    let nar = stock::line(&own.text(), "URL").to_owned();
    let routes = [
        format!("/local/{hash_part}.narinfo"),
        format!("/store/{hash_part}.narinfo"),
        format!("/local/{nar}"),
        format!("/store/{nar}"),
        format!("/store/{hash_part}.ls"),
        "/status.json".to_owned(),
    ];
    let built = stock::build(holder, "logged");
    let log = format!("log/{}", world::base_name(&stock::deriver(holder, &built)));
    let logs = ["local", "store"].map(|prefix| format!("/{prefix}/{log}"));
    for route in &logs {
        let own = crate::common::http::get_local(holder, route).unwrap();
        assert_eq!(own.status, 200, "{route}: the holder has no log");
    }
    for route in routes.iter().chain(&logs) {
        let answer = get(machine, address, route).unwrap();
        assert!(
            [403, 404].contains(&answer.status),
            "{} of {route} got {}",
            machine.name,
            answer.status
        );
    }
    assert!(!stock::is_told_have(machine, address, path), "{} got a have", machine.name);
}

/// Whether `holder` answers a UDP query of `machine` with *have*. Panics if it does not answer.
fn query_is_answered_have(machine: &Host, holder: &Host, path: &str) -> bool {
    let udp = machine.in_net(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap());
    query_has(&udp, holder, path)
}

#[test]
fn friends_on_one_lan_share_paths_that_neighbours_do_not_get() {
    let lan = Lan::new();
    let [home, laptop, neighbour] = ["home", "laptop", "neighbour"].map(|name| lan.host(name));
    [&home, &laptop, &neighbour].into_iter().for_each(ready);
    let (path, own) = (add_unique_path(&home), add_unique_path(&laptop));
    // The flags give no addresses.
    let _home = start(&home, &["--share", "friends", "--friend", &friend(&laptop, None)]);
    let _laptop = start(&laptop, &["--share", "friends", "--friend", &friend(&home, None)]);
    let _neighbour = start(&neighbour, &[]);
    let reached = wait_until_reached(&laptop, "home", true);
    assert_eq!(
        (reached["found_by"].as_str(), reached["address"].as_str()),
        (Some("hello"), Some(&*at(&home).to_string()))
    );
    nix::realise_quietly(&laptop, &[&path]);
    wait_until_reached(&home, "laptop", true);
    nix::realise_quietly(&home, &[&own]);

    assert_eq!(narinfo_status(&neighbour, &path), 404);
    assert_gets_nothing(&neighbour, &home, at(&home), &path);
    assert!(!query_is_answered_have(&neighbour, &home, &path));
    assert!(!query_is_answered_have(&laptop, &home, &path), "a datagram has a friend's scope");
    // The neighbour shares its paths with both.
    let theirs = add_unique_path(&neighbour);
    wait_until_known(&laptop, &theirs);
}

/// Two networks behind NAT, one of which forwards a port to `home`, and a host outside.
struct Scene {
    home: Host,
    laptop: Host,
    housemate: Host,
    guest: Host,
    stranger: Host,
    /// Outer address of the port that is forwarded to `home`.
    outside: SocketAddr,
    path: String,
    inside: Nat,
    _cafe: Nat,
}

impl Scene {
    fn new(scale: Scale) -> Scene {
        let wan = Wan::new().with_scale(scale);
        let (here, there) = (wan.lan([198, 51, 100]), wan.lan([203, 0, 113]));
        let (inside, cafe) = (Nat::new(&here, [192, 168, 1]), Nat::new(&there, [192, 168, 7]));
        let (home, housemate) = (inside.lan.host("home"), inside.lan.host("housemate"));
        let (laptop, guest) = (cafe.lan.host("laptop"), cafe.lan.host("guest"));
        let stranger = there.host("stranger");
        [&home, &laptop].into_iter().for_each(ready);
        [&housemate, &guest, &stranger].into_iter().for_each(stock::ready);
        inside.forward("tcp", 4000, &home, PORT);
        let path = add_unique_path(&home);
        let outside = (inside.address(), 4000).into();
        Scene { home, laptop, housemate, guest, stranger, outside, path, inside, _cafe: cafe }
    }

    fn start_home(&self, more: &[&str]) -> Daemon {
        start(
            &self.home,
            &[&["--share", "friends", "--friend", &friend(&self.laptop, None)], more].concat(),
        )
    }

    fn start_laptop(&self) -> Daemon {
        start(
            &self.laptop,
            &["--share", "friends", "--friend", &friend(&self.home, Some(self.outside))],
        )
    }
}

#[test]
fn friend_behind_nat_is_reached_only_by_its_friend() {
    let scene = Scene::new(Scale::intervals(0.2));
    let mut home = scene.start_home(&[]);
    let _laptop = scene.start_laptop();
    let _others = [&scene.housemate, &scene.guest, &scene.stranger].map(|host| start(host, &[]));
    let reached = wait_until_reached(&scene.laptop, "home", true);
    assert_eq!(reached["found_by"], "flag");

    // A router that also masquerades forwarded packets makes strangers look like LAN hosts.
    scene.inside.router.net("iptables -t nat -A POSTROUTING -o inside -j MASQUERADE");
    for (machine, address) in [
        (&scene.housemate, at(&scene.home)),
        (&scene.stranger, scene.outside),
        (&scene.guest, scene.outside),
    ] {
        assert_eq!(narinfo_status(machine, &scene.path), 404, "{}", machine.name);
        assert_gets_nothing(machine, &scene.home, address, &scene.path);
    }
    assert!(!query_is_answered_have(&scene.housemate, &scene.home, &scene.path));
    nix::realise_quietly(&scene.laptop, &[&scene.path]);

    // The friend vanishes and returns.
    home.kill();
    wait_until_reached(&scene.laptop, "home", false);
    let path = stock::add(&scene.home, "later", "echo later > $n");
    let began = Instant::now();
    assert_eq!(narinfo_status(&scene.laptop, &path), 404);
    assert!(began.elapsed() < Duration::from_secs(60), "a friend that is away was waited for");
    let _home = scene.start_home(&[]);
    wait_until_reached(&scene.laptop, "home", true);
    wait_until_known(&scene.laptop, &stock::add(&scene.home, "last", "echo last > $n"));
}

#[test]
fn silent_friend_does_not_delay_lookups() {
    let scene = Scene::new(Scale::intervals(0.2));
    let mut home = scene.start_home(&[]);
    let _laptop = scene.start_laptop();
    wait_until_reached(&scene.laptop, "home", true);
    home.signal(rustix::process::Signal::STOP);
    wait_until_reached(&scene.laptop, "home", false);
    let absent = |n: u32| format!("/nix/store/{n:032}-absent");
    // Some lookups may be slow because the machine pauses.
    let fast = (0..20).filter(|n| {
        let began = Instant::now();
        assert_eq!(narinfo_status(&scene.laptop, &absent(*n)), 404);
        began.elapsed() < Duration::from_secs(1)
    });
    assert!(fast.count() >= 15, "lookups wait for a friend that is away");
    home.signal(rustix::process::Signal::CONT);
    wait_until_known(&scene.laptop, &scene.path);
}

#[test]
fn wrong_keys_give_errors_with_remedies() {
    let lan = Lan::new().with_scale(Scale::intervals(0.2));
    let [home, laptop, other] = ["home", "laptop", "other"].map(|name| lan.host(name));
    [&home, &laptop, &other].into_iter().for_each(ready);
    let path = add_unique_path(&home);
    let _home = start(&home, &["--share", "friends", "--friend", &friend(&other, None)]);
    // `home` does not know the key of `laptop`, and `other` has a different key than `laptop`
    // expects.
    let stolen = format!("other={}@{}", identity(7).key(), at(&other));
    let _other = start(&other, &["--friend", &friend(&laptop, None)]);
    let flags =
        ["--share", "friends", "--friend", &friend(&home, Some(at(&home))), "--friend", &stolen];
    let _laptop = start(&laptop, &flags);
    let error =
        |name| wait_for("an error", || seen(&laptop, name)["error"].as_str().map(str::to_owned));
    let denied = error("home");
    assert!(denied.contains(&format!("--friend NAME={}", key(&laptop))), "{denied}");
    let mismatch = error("other");
    let keys = [key(&other), identity(7).key()];
    assert!(keys.iter().all(|key| mismatch.contains(&key.to_string())), "{mismatch}");
    assert_eq!(narinfo_status(&laptop, &path), 404);
    let health = get(&laptop, (Ipv4Addr::LOCALHOST, PORT), "/health").unwrap();
    assert_eq!(health.status, 200, "a friend that is away is no reason to be ill");
}

#[test]
fn friend_removed_at_run_time_gets_nothing_more() {
    let lan = Lan::new().with_scale(Scale::intervals(0.2));
    let [home, laptop] = ["home", "laptop"].map(|name| lan.host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let path = add_unique_path(&home);
    let mine = identity(3);
    let file = "/etc/peerix-friends";
    home.write(file, format!("# who\nlaptop={}\n", mine.key()));
    let home_key = key(&home);
    let _home = start(&home, &["--share", "friends", "--friends-file", file]);
    let open = || TlsConnection::open(&laptop, at(&home), &mine, home_key);
    let mut kept = open().unwrap();
    let (status, body) = kept.get(&narinfo_route(&path)).unwrap();
    assert_eq!(status, 200);
    let nar = stock::line(std::str::from_utf8(&body).unwrap(), "URL").to_owned();
    let (status, body) = kept.get(&format!("/{nar}")).unwrap();
    assert!(status == 200 && body == stock::dump(&home, &path));
    // A friend gets neither the status nor `/peer/nar`, which only this machine may request.
    assert_eq!(kept.get("/status.json").unwrap().0, 403);
    assert_eq!(
        kept.get(&format!("/peer/nar/{}-{}.nar", world::hash_part(&path), "0".repeat(52)))
            .unwrap()
            .0,
        403
    );
    // For all other machines, the root routes serve only this machine's store.
    assert_eq!(kept.get(&format!("/{}.narinfo", world::hash_part(&path))).unwrap().0, 200);

    home.write(file, "# nobody\n");
    wait_for("the friend is removed", || kept.get(&narinfo_route(&path)).is_err().then_some(()));
    assert!(open().unwrap().get(&narinfo_route(&path)).is_err(), "a new connection was let in");
    home.write(file, format!("laptop={}\n", mine.key()));
    wait_for("the friend is back", || open().unwrap().get(&narinfo_route(&path)).ok());
}

#[test]
fn tls_strangers_get_nothing_and_half_open_handshakes_do_not_block() {
    let lan = Lan::new();
    let [home, laptop, attacker] = ["home", "laptop", "attacker"].map(|name| lan.host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let path = add_unique_path(&home);
    let (mine, home_key) = (identity(3), key(&home));
    let flag = format!("laptop={}", mine.key());
    let _home = start(&home, &["--share", "friends", "--friend", &flag]);
    let friend = |host: &Host| TlsConnection::open(host, at(&home), &mine, home_key).unwrap();
    assert_eq!(friend(&laptop).get(&narinfo_route(&path)).unwrap().0, 200);
    // A stranger's key, and the friend's key with the wrong expectation of the server's key.
    for (identity, key) in [(identity(9), home_key), (identity(3), identity(9).key())] {
        let got = TlsConnection::open(&attacker, at(&home), &identity, key)
            .unwrap()
            .get("/nix-cache-info");
        assert!(got.is_err(), "a stranger was answered: {got:?}");
    }
    // Invalid records: too large, TLS 1.2, truncated, and not TLS at all.
    for bytes in [
        &[0x16, 3, 1, 0xff, 0xff, 1, 2][..],
        &[0x16; 4096],
        b"\x16\x03\x03\x00\x02ab",
        b"\x17\x03\x03\x00\x01a",
    ] {
        let mut stream = attacker.connect(at(&home)).unwrap();
        stream.write_all(bytes).unwrap();
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        assert!(!rest.starts_with(b"HTTP/1.1 200"), "{rest:?}");
    }

    let half_open = |_| {
        let mut stream = attacker.connect(at(&home))?;
        stream.write_all(&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3])?;
        Ok::<_, std::io::Error>(stream)
    };
    let _half_open: Vec<_> = (0..1000).filter_map(|n| half_open(n).ok()).collect();
    for _ in 0..5 {
        assert_eq!(friend(&laptop).get(&narinfo_route(&path)).unwrap().0, 200);
        assert_eq!(narinfo_status(&home, &path), 404, "the own Nix is answered");
        assert_eq!(
            get(&attacker, at(&home), "/nix-cache-info").map(|answer| answer.status).ok(),
            Some(200)
        );
    }
}

#[test]
fn node_without_friends_refuses_tls() {
    let lan = Lan::new();
    let [node, other] = ["node", "other"].map(|name| lan.host(name));
    ready(&node);
    let path = add_unique_path(&node);
    let _node = start(&node, &[]);
    let mut stream = other.connect(at(&node)).unwrap();
    stream.write_all(b"\x16\x03\x01\x00\x05hello\r\n\r\n").unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer:?}");
    assert_eq!(get(&other, at(&node), &narinfo_route(&path)).unwrap().status, 200);
}

#[test]
fn forged_hellos_do_not_displace_a_friend() {
    let lan = Lan::new().with_scale(Scale::intervals(0.2));
    let [home, laptop, forger] = ["home", "laptop", "forger"].map(|name| lan.host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let path = add_unique_path(&home);
    let home_key = key(&home);
    let _home = start(&home, &["--share", "friends", "--friend", &friend(&laptop, None)]);
    let _laptop = start(&laptop, &["--share", "friends", "--friend", &friend(&home, None)]);
    wait_until_reached(&laptop, "home", true);
    // The friend's digest from another address, with many instance IDs. A silent server listens
    // there.
    let _listener = forger.listen(PORT);
    let udp = forger.udp(PORT);
    for n in 0..200u8 {
        udp.send_to(&forged_hello(&home_key, [n; 8]), at(&laptop)).unwrap();
    }
    assert_eq!(narinfo_status(&laptop, &path), 200);
    let friend = seen(&laptop, "home");
    assert_eq!(friend["address"].as_str(), Some(&*at(&home).to_string()), "{friend}");
}

/// A hello with the digest of `key` and port 12304.
fn forged_hello(key: &NodeKey, instance: [u8; 8]) -> Vec<u8> {
    [&[3, 1][..], &PORT.to_be_bytes(), &instance, &[2 | 4], &key.digest(&instance)].concat()
}

#[test]
fn status_and_peers_list_friends() {
    let lan = Lan::new();
    let [home, laptop] = ["home", "laptop"].map(|name| lan.host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let path = add_unique_path(&home);
    let _home = start(&home, &["--friend", &friend(&laptop, None)]);
    let _laptop = start(&laptop, &["--friend", &friend(&home, None)]);
    wait_until_reached(&laptop, "home", true);
    let binary = crate::common::daemon::binary().display().to_string();
    let run = |host: &Host, words: &[&str]| {
        let output = host.cmd(&binary).args(words).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let line = format!("friend home {}: reached at {}", friend::key(&home), at(&home));
    for words in [["status"], ["peers"]] {
        let said = run(&laptop, &words);
        assert!(said.contains(&line), "{words:?}: {said}");
    }
    assert!(run(&home, &["why", &path]).contains("shared with friends (laptop)"));
    assert_eq!(run(&home, &["identity"]).trim(), friend::key(&home).to_string());
    let page = get(&laptop, (Ipv4Addr::LOCALHOST, PORT), "/").unwrap().text();
    assert!(page.contains(&format!("home, reached at {}", at(&home))), "{page}");
}

#[test]
fn upload_limit_applies_to_all_streams_together() {
    let lan = Lan::new();
    let [home, other] = ["home", "other"].map(|name| lan.host(name));
    ready(&home);
    let path = stock::add_large(&home, "large", 64);
    const RATE: u64 = 2 << 20;
    let limited = start(&home, &["--upload-limit", "2M"]);
    let route = stock::nar_route(&other, &home, &path);
    let read = |for_at_most: Duration| {
        let until = Instant::now() + for_at_most;
        let mut connection = Connection::new(other.connect(at(&home)).unwrap()).unwrap();
        connection.send(format!("GET {route} HTTP/1.1\r\nHost: home\r\n\r\n").as_bytes()).unwrap();
        connection.drain(|| Instant::now() >= until).unwrap();
    };
    let time = Duration::from_secs(20);
    // A busy machine sends less than the limit, but not all the time.
    wait_for("half of the limit", || {
        let (before, began) = (other.received(), Instant::now());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                thread::spawn_in(scope, "reader", || read(time));
            }
        });
        let (took, received) = (began.elapsed(), other.received() - before);
        // Ethernet, IP and TCP headers take up to 66 of 1,514 bytes.
        let limit = RATE as f64 * took.as_secs_f64() * 1514.0 / 1448.0;
        let share = received as f64 / limit;
        println!("{received} bytes in {took:?}: {:.1} % of the limit", share * 100.0);
        assert!(share < 1.05, "{received} bytes in {took:?}");
        (share > 0.5).then_some(())
    });
    // The limit does not apply to the local Nix. At 200 KiB/s, its NAR would take 327 s.
    drop(limited);
    let _home = start(&home, &["--upload-limit", "200K"]);
    let began = Instant::now();
    let nar = crate::common::http::get_local(&home, &route).unwrap();
    assert!(nar.whole && began.elapsed() < DEADLINE, "the own Nix is limited");
}

#[test]
fn friends_meet_at_a_tracker_and_strangers_learn_nothing() {
    let wan = Wan::new().with_scale(Scale::intervals(0.1));
    let (here, there) = (wan.lan([198, 51, 100]), wan.lan([203, 0, 113]));
    let (home, laptop, stranger) =
        (here.host("home"), there.host("laptop"), there.host("stranger"));
    [&home, &laptop].into_iter().for_each(ready);
    stock::ready(&stranger);
    let mut tracker = Tracker::start(here.host("tracker"));
    let url = tracker.url();
    let path = add_unique_path(&home);
    // In mode `lan`, peerix uses the tracker only to find friends.
    let flags = ["--share", "friends", "--tracker-url", &url];
    let _home = start(&home, &[&flags[..], &["--friend", &friend(&laptop, None)]].concat());
    let _laptop = start(&laptop, &[&flags[..], &["--friend", &friend(&home, None)]].concat());
    let reached = wait_until_reached(&laptop, "home", true);
    assert_eq!(
        (reached["found_by"].as_str(), reached["address"].as_str()),
        (Some("tracker"), Some(&*at(&home).to_string()))
    );
    nix::realise_quietly(&laptop, &[&path]);
    wait_until_reached(&home, "laptop", true);

    // The tracker lists neither friend, and only the two friends know the tag of their meeting.
    assert_eq!(tracker.get("/peers")["peers"], serde_json::json!([]));
    let own = key(&stranger).tag(&key(&home), &TrackerName::of_url(&url));
    let body = format!("{{\"port\": 1, \"tags\": [\"{own}\"]}}");
    let mut connection =
        Connection::new(stranger.connect((tracker.host.address, 12305)).unwrap()).unwrap();
    let met = connection
        .request_with_body("POST", "/meet", "Content-Type: application/json\r\n", body.as_bytes())
        .unwrap();
    assert_eq!(met.status, 200);
    assert!(met.text().contains("\"places\":[[]]"), "{}", met.text());
    assert_gets_nothing(&stranger, &home, at(&home), &path);

    // The friends stay connected when the tracker ends.
    tracker.kill();
    assert_eq!(narinfo_status(&laptop, &stock::add(&home, "later", "echo later > $n")), 200);
}

#[test]
fn signing_key_in_friends_file_counts_while_it_is_there() {
    let lan = Lan::new().with_scale(Scale::intervals(0.2));
    let [home, laptop] = ["home", "laptop"].map(|name| lan.host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let public = nix::generate_key(&home);
    let path = stock::build(&home, "signed");
    let file = "/etc/peerix-friends";
    let line = friend(&home, Some(at(&home)));
    laptop.write(file, &line);
    let flags = ["--private-key", "/etc/peerix.sec", "--friend", &friend(&laptop, None)];
    let _home = start(&home, &flags);
    let _laptop = start(&laptop, &["--friends-file", file]);
    wait_until_reached(&laptop, "home", true);
    assert_eq!(narinfo_status(&laptop, &path), 404, "no key signed it that counts");
    laptop.write(file, format!("{line},sign={public}\n"));
    wait_until_known(&laptop, &path);
    let node = crate::common::daemon::status(&laptop)["node"].clone();
    let keys = serde_json::json!([{"key": public, "source": "friend"}]);
    assert_eq!(node["public_keys"], keys);
    // The friend is removed, and is a neighbour without a trusted key.
    laptop.write(file, "# nobody\n");
    wait_for("the key is gone", || (narinfo_status(&laptop, &path) == 404).then_some(()));
}

/// The scale makes the pause after the first failure 100 s.
#[test]
fn request_of_a_friend_ends_the_pause_before_it_is_tried_again() {
    let wan = Wan::new().with_scale(Scale::intervals(100.0));
    let [home, laptop] = [([198, 51, 100], "home"), ([203, 0, 113], "laptop")]
        .map(|(subnet, name)| wan.lan(subnet).host(name));
    [&home, &laptop].into_iter().for_each(ready);
    let _laptop = start(&laptop, &["--friend", &friend(&home, Some(at(&home)))]);
    wait_for("the first attempt fails", || seen(&laptop, "home")["error"].as_str().map(drop));
    let failed = Instant::now();
    let _home = start(&home, &["--friend", &friend(&laptop, Some(at(&laptop)))]);
    wait_until_reached(&home, "laptop", true);
    wait_until_reached(&laptop, "home", true);
    assert!(failed.elapsed() < Duration::from_secs(95), "reached only after the pause");
}

#[test]
fn missing_friends_file_leaves_the_port_open() {
    let lan = Lan::new().with_scale(Scale::intervals(0.2));
    let host = lan.host("home");
    ready(&host);
    let _daemon = start(&host, &["--friends-file", "/etc/peerix-friends"]);
    let names_it = || {
        let health = crate::common::http::get_local(&host, "/health").unwrap();
        assert_eq!(health.status, 200);
        health.text().contains("/etc/peerix-friends")
    };
    assert!(names_it());
    assert_eq!(crate::common::http::get_local(&host, "/nix-cache-info").unwrap().status, 200);
    host.write("/etc/peerix-friends", "# nobody yet\n");
    wait_for("the file is read", || (!names_it()).then_some(()));
}
