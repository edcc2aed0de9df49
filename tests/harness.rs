//! The test network itself: were it not what it claims to be, the other tests would prove nothing.

mod common;

use common::http::{self, Reply, Server};
use common::lan::Run;
use common::{Lan, PORT, World, nix, tree, world};
use std::fs;
use std::time::{Duration, Instant};

#[test]
fn hosts_are_machines_of_their_own() {
    let lan = Lan::new();
    let (one, two) = (lan.host("one"), lan.host("two"));
    nix::configure(&one, "");
    nix::configure(&two, "");
    one.write("/tmp/file", "content");
    let path = one.cmd("nix-store").args(["--add", "/tmp/file"]).okay();
    let path = path.trim();
    assert!(one.path(path).exists());
    assert!(!two.path(path).exists());
    assert!(!std::path::Path::new(path).exists(), "this machine's store was touched");
    let _server = Server::start(two.listen(PORT), |_| Reply::Whole(200, b"two".to_vec()));
    assert_eq!(http::get(&one, (two.address, PORT), "/").unwrap().text(), "two");
    assert_eq!(http::get_local(&two, "/").unwrap().text(), "two");
    assert!(http::get_local(&one, "/").is_err());
    let mut sleeper = one.spawn_sh("sleep 600");
    let proc = format!("/proc/{}", sleeper.pid());
    assert!(fs::read_to_string(format!("{proc}/comm")).unwrap().contains('s'));
    sleeper.kill();
    assert!(!fs::exists(proc).unwrap());
}

#[test]
fn broadcast_is_heard_and_faults_happen() {
    let lan = Lan::new();
    let (one, two) = (lan.host("one"), lan.host("two"));
    let (from, to) = (one.udp(PORT), two.udp(PORT));
    let trip = |count: usize| {
        let start = Instant::now();
        for _ in 0..count {
            from.send_to(b"x", (common::standin::BROADCAST, PORT)).unwrap();
        }
        let heard = (0..count).take_while(|_| {
            common::standin::receive(&to, Duration::from_millis(300)).is_some_and(|(who, _)| who.ip() == one.address)
        });
        (heard.count(), start.elapsed())
    };
    assert_eq!(trip(1).0, 1);
    {
        let _delay = two.delay(Duration::from_millis(100));
        let (heard, time) = trip(1);
        assert_eq!(heard, 1);
        assert!(time >= Duration::from_millis(100), "{time:?}");
    }
    two.net("iptables -F");
    two.lose(30);
    // No more than a socket's buffer holds.
    let (heard, _) = trip(200);
    assert!((100..180).contains(&heard), "{heard} of 200");
    two.net("iptables -F");
    two.unplug();
    assert_eq!(trip(1).0, 0);
    two.plug();
    assert_eq!(trip(1).0, 1);
    two.fall_silent();
    assert_eq!(trip(1).0, 0);
}

#[test]
fn the_world_is_fetched_from_a_static_cache() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let client = lan.host("client");
    nix::configure_client(&client, &world.next(), &[&world.cache_key]);
    let roots = [world.path("closure300"), world.path("odd")];
    nix::realise(&client, &roots);
    let closure = nix::closure(&client, &roots[..1]);
    assert_eq!(closure.len(), 300);
    let all: Vec<&str> = closure.iter().map(String::as_str).chain([roots[1]]).collect();
    nix::assert_whole(&client, &all, &world.store());
    assert!(!nix::valid_paths(&client).iter().any(|path| path == world.path("many")));

    let server = lan.host("server");
    world.give(&server);
    let all = nix::closure(&server, &[world.path("closure1000")]);
    assert_eq!(all.len(), 1000);
    tree::assert_same(&world.store().join(world::base_name(roots[1])), &server.path(roots[1]));
    world.sign(&server);
    let shown = server.cmd("nix").args(["path-info", "--sigs", roots[1]]).okay();
    assert!(shown.contains("cache-1:"), "{shown}");
}
