//! No false misses. Nix caches a miss for an hour, so peerix must find every path that a peer has,
//! at Nix's own 25 connections. Where peers are unreachable, Nix must succeed without them.

use crate::common::{Asker, Holder, Lan, World, daemon, nix};
use std::time::Duration;

/// Fetches of the same closure by new askers.
const RUNS: usize = 2;

/// Fetches a closure of 1,000 paths that only the peers have. Nix has no other substituter and
/// fails at the first miss.
fn fetch_all(lan: &Lan, world: &World, holders: &[&Holder], prepare: impl Fn(&Asker)) {
    let asker = Asker::new(lan, world, holders);
    prepare(&asker);
    let closure = asker.fetch_and_check(world, world.path("closure1000"));
    assert_eq!(closure.len(), 1000);
}

#[test]
fn closure_from_one_peer_has_no_false_miss() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    for _ in 0..RUNS {
        fetch_all(&lan, &world, &[&holder], |_| {});
    }
}

#[test]
fn closure_from_two_peers_has_no_false_miss() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let (one, two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    for _ in 0..RUNS {
        fetch_all(&lan, &world, &[&one, &two], |_| {});
    }
}

#[test]
fn one_percent_packet_loss_causes_no_false_miss() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let (one, two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    one.host.lose(1);
    two.host.lose(1);
    fetch_all(&lan, &world, &[&one, &two], |asker| asker.host.lose(1));
    drop(two);
    fetch_all(&lan, &world, &[&one], |asker| asker.host.lose(1));
}

#[test]
fn sixty_ms_round_trip_causes_no_false_miss() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let _far = holder.host.delay(Duration::from_millis(60));
    fetch_all(&lan, &world, &[&holder], |_| {});
}

#[test]
fn busy_peer_causes_no_false_miss() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let _busy = holder.host.be_busy();
    fetch_all(&lan, &world, &[&holder], |_| {});
}

#[test]
fn ten_percent_packet_loss_hides_at_most_one_percent_of_paths() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let closure = nix::closure(&holder.host, &[world.path("closure300")]);
    holder.host.lose(10);
    asker.host.lose(10);
    let found = daemon::found(&asker.host, &closure, 4);
    assert!(found * 100 >= closure.len() * 99, "{found} of {} found", closure.len());
}

/// Checks that Nix gets the closure from peers and, for the rest, from the next substituter.
fn assert_nix_succeeds(asker: &Asker, world: &World) {
    nix::assert_succeeded(&nix::realise(&asker.host, &[world.path("closure300")]));
    assert_eq!(asker.assert_closure_complete(world, world.path("closure300")).len(), 300);
}

#[test]
fn nix_without_peers_uses_next_substituter() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with_next(&lan, &world, &[]);
    asker.fetch_and_check(&world, world.path("closure300"));
}

#[test]
fn nix_without_network_uses_next_substituter() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    asker.host.unplug();
    assert_nix_succeeds(&asker, &world);
    // After the cable is plugged in again, peerix finds its peers.
    asker.host.plug();
    asker.meet(&[&holder]);
}

#[test]
fn nix_with_silent_peer_uses_next_substituter() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    holder.host.fall_silent();
    assert_nix_succeeds(&asker, &world);
}

#[test]
fn nix_at_thirty_percent_packet_loss_succeeds() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    // 60 paths are enough: at this loss TCP retransmits most bytes after seconds.
    let mut paths = nix::closure(&holder.host, &[world.path("closure300")]);
    paths.truncate(60);
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    holder.host.lose(30);
    asker.host.lose(30);
    nix::assert_succeeded(&nix::realise(&asker.host, &paths));
    nix::assert_whole(&asker.host, &paths, &world.store());
}
