//! No false misses. Nix remembers a *not there* for an hour, so a path that a peer has must be
//! found, every time, at Nix's own 25 connections; and where peers cannot be reached Nix must go on
//! without them.

use crate::common::{Asker, Holder, Lan, World, daemon, nix};
use std::time::Duration;

const RUNS: usize = 5;

/// All of the closure comes from the peers: there is no other substituter, and Nix fails at the
/// first miss.
fn fetch_all(lan: &Lan, world: &World, holders: &[&Holder], prepare: impl Fn(&Asker)) {
    let asker = Asker::new(lan, world, holders);
    prepare(&asker);
    let closure = asker.fetches(world, world.path("closure1000"));
    assert_eq!(closure.len(), 1000);
}

#[test]
fn one_peer_has_everything() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    for _ in 0..RUNS {
        fetch_all(&lan, &world, &[&holder], |_| {});
    }
}

#[test]
fn two_peers_have_everything() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let (one, two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    for _ in 0..RUNS {
        fetch_all(&lan, &world, &[&one, &two], |_| {});
    }
}

#[test]
fn one_percent_of_packets_is_lost() {
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
fn sixty_milliseconds_round_trip() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let _far = holder.host.delay(Duration::from_millis(60));
    fetch_all(&lan, &world, &[&holder], |_| {});
}

#[test]
fn the_peer_is_busy() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let _busy = holder.host.be_busy();
    fetch_all(&lan, &world, &[&holder], |_| {});
}

#[test]
fn ten_percent_of_packets_is_lost() {
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

/// Nix succeeds, from peers as far as they can be reached and from the next substituter for the
/// rest.
fn goes_on(asker: &Asker, world: &World) {
    nix::assert_succeeded(&nix::realise(&asker.host, &[world.path("closure300")]));
    assert_eq!(asker.has_whole(world, world.path("closure300")).len(), 300);
}

#[test]
fn without_peers_nix_goes_on() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let asker = Asker::with_next(&lan, &world, &[]);
    asker.fetches(&world, world.path("closure300"));
}

#[test]
fn without_a_network_nix_goes_on() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    asker.host.unplug();
    goes_on(&asker, &world);
    // And when the cable is back, so are the peers.
    asker.host.plug();
    asker.meet(&[&holder]);
}

#[test]
fn when_the_peer_falls_silent_nix_goes_on() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    holder.host.fall_silent();
    goes_on(&asker, &world);
}

#[test]
fn at_thirty_percent_loss_nix_goes_on() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    // Some paths are enough: TCP sends most of their bytes again after seconds.
    let mut paths = nix::closure(&holder.host, &[world.path("closure300")]);
    paths.truncate(60);
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    holder.host.lose(30);
    asker.host.lose(30);
    nix::assert_succeeded(&nix::realise(&asker.host, &paths));
    nix::assert_whole(&asker.host, &paths, &world.store());
}
