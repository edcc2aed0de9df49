//! Many machines that want the same large path at the same time and relay it to each other.

use crate::common::http::{Connection, Reply};
use crate::common::packet::Packet;
use crate::common::standin::{StandIn, StaticCache, field};
use crate::common::{Asker, Holder, Lan, PORT, Scale, World, daemon, nix, thread, wait_for, world};
use rustix::process::Signal;
use std::process::{Child, Output};
use std::time::Instant;

/// Rate of each link in Mbit/s. The NAR of 64 MiB takes 5.4 s.
const LINK: u32 = 100;

/// Size of the NAR of `middle`, in bytes, without framing.
const SIZE: u64 = 64 << 20;

/// Starts askers that relay large NARs while they receive them. Waits until they know each other.
fn crowd(lan: &Lan, world: &World, holder: &Holder, count: usize) -> Vec<Asker> {
    let asker = |_| {
        let asker = Asker::flagged(lan, "", &[&world.cache_key], |host| {
            host.sh("mkdir -p /var/lib/peerix");
            vec!["--state-dir".into(), "/var/lib/peerix".into()]
        });
        asker.host.slow(LINK);
        asker.host.slow_sending(LINK);
        asker
    };
    let askers: Vec<Asker> = (0..count).map(asker).collect();
    for asker in &askers {
        asker.meet(&[holder]);
        daemon::wait_until_live(&asker.host, count);
    }
    askers
}

fn realising(asker: &Asker, path: &str) -> Child {
    nix::realising(&asker.host, &[path]).spawn().expect("nsenter starts")
}

fn ended(nix: Child) -> Output {
    nix.wait_with_output().expect("it is ours")
}

/// Waits until a host has received more than `bytes` since its counter stood at `before`.
fn wait_until_received(asker: &Asker, before: u64, bytes: u64) {
    wait_for("a part of the NAR", || (asker.host.received() - before > bytes).then_some(()));
}

#[test]
fn crowd_relays_a_large_nar() {
    // With normal timeouts, a node on a busy machine may take its source for stalled.
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let askers = crowd(&lan, &world, &holder, 8);
    holder.host.slow_sending(LINK);
    let (before, began) = (holder.host.sent(), Instant::now());
    let nixes: Vec<Child> =
        askers.iter().map(|asker| realising(asker, world.path("middle"))).collect();
    nixes.into_iter().for_each(|nix| nix::assert_quiet(&ended(nix)));
    let (took, sent) = (began.elapsed(), holder.host.sent() - before);
    eprintln!("64 MiB to 8 machines at once: {took:?}, the holder sent {} MiB", sent >> 20);
    askers
        .iter()
        .for_each(|asker| drop(asker.assert_closure_complete(&world, world.path("middle"))));
    // Without relaying, the holder sends eight times the size.
    assert!(sent < 4 * SIZE, "{sent}");
    // No spooled files remain.
    for asker in &askers {
        wait_for("no file is left open", || {
            let open =
                std::fs::read_dir(format!("/proc/{}/fd", asker.daemon.pid())).expect("it runs");
            // Descriptors may close while this reads them.
            let mut files =
                open.flatten().filter_map(|entry| std::fs::read_link(entry.path()).ok());
            (!files.any(|file| file.to_string_lossy().ends_with("(deleted)"))).then_some(())
        });
        assert_eq!(
            asker
                .host
                .sh("ls /var/lib/peerix | grep -v -e counters -e identity -e paces || true")
                .trim(),
            ""
        );
    }
}

#[test]
fn crowd_survives_killed_stopped_and_slow_members() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut askers = crowd(&lan, &world, &holder, 6);
    holder.host.slow_sending(LINK);
    let before: Vec<u64> = askers.iter().map(|asker| asker.host.received()).collect();
    let mut nixes: Vec<Child> = Vec::new();
    for (at, asker) in askers.iter().enumerate() {
        nixes.push(realising(asker, world.path("middle")));
        // One after another, so that each node's source is known.
        wait_until_received(asker, before[at], 1 << 20);
    }
    // The link of another node becomes slow.
    askers[2].host.quick();
    askers[2].host.slow(LINK / 5);
    askers[1].daemon.kill();
    askers[3].daemon.signal(Signal::STOP);
    let outputs: Vec<Output> = nixes
        .into_iter()
        .enumerate()
        .filter_map(|(at, mut nix)| match at {
            1 | 3 => {
                nix.kill().expect("it is ours");
                nix.wait().expect("it is ours");
                None
            }
            _ => Some(ended(nix)),
        })
        .collect();
    outputs.iter().for_each(nix::assert_quiet);
    for at in [0, 2, 4, 5] {
        askers[at].assert_closure_complete(&world, world.path("middle"));
    }
}

/// The holder names a relaying node that sends a different NAR.
#[test]
fn member_that_relays_a_wrong_nar_is_the_only_one_blamed() {
    let lan = Lan::new().with_scale(Scale::without_timeouts());
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let host = lan.host("liar");
    let shelf = StaticCache::of(&world);
    let path = world.path("middle");
    let hash_part = world::hash_part(path).to_owned();
    let narinfo = shelf.narinfo(&hash_part).unwrap();
    let nar_hash = field(&narinfo, "NarHash").trim_start_matches("sha256:");
    let name = format!("/local/nar/{hash_part}-{nar_hash}.nar");
    let mut nar = shelf.nar(&hash_part).unwrap();
    let middle = nar.len() / 2;
    nar[middle] ^= 1;
    let has_not = |datagram: &[u8]| match Packet::read(datagram)? {
        Packet::Query { id, .. } => Some(Packet::HaveNot { id }.write()),
        _ => None,
    };
    let liar = StandIn::start(&host, has_not, move |_| Reply::Whole(200, nar.clone()));
    let asker = crowd(&lan, &world, &holder, 1).remove(0);
    liar.meet(&host, &asker.host);
    daemon::wait_until_live(&asker.host, 2);
    asker.host.quick();
    // The holder counts the liar as a receiver, because the liar requests the NAR without reading
    // it.
    let mut connection =
        Connection::new(host.connect((holder.host.address, PORT)).unwrap()).unwrap();
    let head = format!("GET {name} HTTP/1.1\r\nHost: x\r\nX-Peerix-Relay: 1\r\n\r\n");
    connection.send(head.as_bytes()).unwrap();
    connection.wait_for_answer().unwrap();
    asker.fetch_and_check(&world, path);
    assert!(liar.was_asked(&name), "{}", asker.daemon.log());
    let peers = daemon::status(&asker.host)["peers"].as_array().unwrap().clone();
    for peer in peers {
        let is_liar = peer["address"] == format!("{}:{PORT}", host.address);
        assert_eq!(peer["failures"], u64::from(is_liar), "{peer}");
    }
    drop(connection);
}

/// Nodes without a state directory cannot relay, so all get the path from the holder.
#[test]
fn crowd_without_state_directories_is_served_by_the_holder() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let askers: Vec<Asker> = (0..3).map(|_| Asker::new(&lan, &world, &[&holder])).collect();
    std::thread::scope(|scope| {
        for asker in &askers {
            let world = &world;
            thread::spawn_in(scope, "Nix", move || {
                asker.fetch_and_check(world, world.path("middle"))
            });
        }
    });
}

/// Small NARs arrive before the holder can name other receivers. Nodes that already have a path
/// answer when another node repeats its lookup.
#[test]
fn crowd_fetches_a_closure_from_members_with_parts_of_it() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let askers = crowd(&lan, &world, &holder, 6);
    holder.host.slow_sending(LINK / 10);
    let path = world.path("closure300");
    let (before, began) = (holder.host.sent(), Instant::now());
    let nixes: Vec<Child> = askers.iter().map(|asker| realising(asker, path)).collect();
    nixes.into_iter().for_each(|nix| nix::assert_quiet(&ended(nix)));
    let (took, sent) = (began.elapsed(), holder.host.sent() - before);
    let received = askers.iter().map(|asker| asker.host.received()).max().unwrap_or_default();
    eprintln!(
        "closure of 300 to 6 machines at once: {took:?}, the holder sent {} KiB, each took {} KiB",
        sent >> 10,
        received >> 10
    );
    askers
        .iter()
        .for_each(|asker| assert_eq!(asker.assert_closure_complete(&world, path).len(), 300));
}
