//! Faults of the sending peer in the middle of a NAR.

use crate::common::{Asker, Holder, Lan, Scale, World, nix, wait_for};
use rustix::process::Signal;
use std::process::Output;

/// Half the size of the NAR of `middle`, in bytes.
const HALF: u64 = 32 << 20;

/// Link rate in Mbit/s. The second half takes almost three seconds, so the test sees the first half
/// before the transfer ends, also on a busy machine.
const SLOW: u32 = 100;

/// Scale of the timeouts, such as the 10 s after which the node gives up a peer that sends nothing.
const IMPATIENT: f64 = 0.3;

/// Realises `middle` over a slow link. When half of the NAR is sent, calls `strike` with the
/// sending holder and removes the limit of the link.
fn realise_with_fault_at_half(
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
fn another_peer_finishes_nar_of_killed_peer() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output = realise_with_fault_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| {
        holder.daemon.kill()
    });
    nix::assert_quiet(&output);
    asker.assert_closure_complete(&world, world.path("middle"));
}

#[test]
fn another_peer_finishes_nar_of_unplugged_peer() {
    let lan = Lan::new().with_scale(Scale::timeouts(IMPATIENT));
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output = realise_with_fault_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| {
        holder.host.unplug()
    });
    nix::assert_quiet(&output);
    asker.assert_closure_complete(&world, world.path("middle"));
}

#[test]
fn another_peer_finishes_nar_of_hanging_peer() {
    let lan = Lan::new().with_scale(Scale::timeouts(IMPATIENT));
    let world = World::on(&lan);
    let (mut one, mut two) = (Holder::new(&lan, &world, "one"), Holder::new(&lan, &world, "two"));
    let asker = Asker::new(&lan, &world, &[&one, &two]);
    let output = realise_with_fault_at_half(&asker, &world, &mut [&mut one, &mut two], |holder| {
        holder.daemon.signal(Signal::STOP)
    });
    nix::assert_quiet(&output);
    asker.assert_closure_complete(&world, world.path("middle"));
}

#[test]
fn next_substituter_finishes_nar_of_killed_only_peer() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let mut holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    let output = realise_with_fault_at_half(&asker, &world, &mut [&mut holder], |holder| {
        holder.daemon.kill()
    });
    nix::assert_succeeded(&output);
    let closure = asker.assert_closure_complete(&world, world.path("middle"));
    nix::assert_nothing_but(&asker.host, &closure);
}
