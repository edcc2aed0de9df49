//! The peer that is sending goes away in the middle of a NAR.

use crate::common::{Asker, Holder, Lan, Scale, World, nix, wait_for};
use rustix::process::Signal;
use std::process::Output;

/// Half of the NAR of `middle`.
const HALF: u64 = 32 << 20;

/// Mbit/s at which the other half takes seconds: however busy the machine is, the test sees that
/// one half is there before the other is.
const SLOW: u32 = 100;

/// Scale of time-outs, among them the 10 s after which a peer that sends nothing is given up.
const IMPATIENT: f64 = 0.3;

/// Realises `middle` over a link slow enough to see it half done, and then lets `strike` hit the
/// holder that is sending it. The rest comes at full speed.
fn struck_at_half(
    asker: &Asker,
    world: &World,
    holders: &mut [&mut Holder],
    strike: impl Fn(&mut Holder),
) -> Output {
    asker.host.slow(SLOW);
    let before: Vec<u64> = holders.iter().map(|holder| holder.host.sent()).collect();
    let mut child =
        nix::realising(&asker.host, &[world.path("middle")]).spawn().expect("nsenter starts");
    let sender = wait_for("half of the NAR", || {
        assert!(
            child.try_wait().expect("it is ours").is_none(),
            "Nix was done before half of the NAR was sent"
        );
        holders.iter().zip(&before).position(|(holder, before)| holder.host.sent() - before > HALF)
    });
    strike(holders[sender]);
    assert!(
        child.try_wait().expect("it is ours").is_none(),
        "Nix was done before the peer was struck"
    );
    asker.host.quick();
    child.wait_with_output().expect("it is ours")
}

#[test]
fn another_peer_finishes_what_a_killed_one_began() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output =
        struck_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| holder.daemon.kill());
    nix::assert_quiet(&output);
    asker.has_whole(&world, world.path("middle"));
}

#[test]
fn another_peer_finishes_when_the_cable_is_pulled() {
    let lan = Lan::new().with_scale(Scale::timeouts(IMPATIENT));
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output =
        struck_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| holder.host.unplug());
    nix::assert_quiet(&output);
    asker.has_whole(&world, world.path("middle"));
}

#[test]
fn another_peer_finishes_when_one_hangs() {
    let lan = Lan::new().with_scale(Scale::timeouts(IMPATIENT));
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output = struck_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| {
        holder.daemon.signal(Signal::STOP)
    });
    nix::assert_quiet(&output);
    asker.has_whole(&world, world.path("middle"));
}

#[test]
fn with_no_other_peer_nix_takes_the_next_substituter() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let mut holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    let output = struck_at_half(&asker, &world, &mut [&mut holder], |holder| holder.daemon.kill());
    nix::assert_succeeded(&output);
    let closure = asker.has_whole(&world, world.path("middle"));
    nix::assert_nothing_but(&asker.host, &closure);
}
