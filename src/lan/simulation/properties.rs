//! Invariants of discovery, checked in random networks for many seeds: every lookup ends in time,
//! no lookup misses a path that a host has, tables keep their bounds, and traffic is bounded.

use super::{Kind, MS, SECOND, Simulation, longest, path};
use crate::nix::HashPart;
use std::time::Duration;

/// Number of seeds in an ordinary test run.
const SEEDS: u64 = 2000;
const PATHS: u64 = 200;
/// Number of paths that the asker looks up before the disturbances, so that paths were found
/// through the holders.
const WARM_UP: u64 = 40;

/// Number of seeds: `PEERIX_SIMULATION_SEEDS`, or [`SEEDS`].
fn seeds() -> u64 {
    std::env::var("PEERIX_SIMULATION_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(SEEDS)
}

/// Number of nodes for a seed: mostly as many as in a home, sometimes as in an office. Only long
/// runs have networks of 1,000 nodes, because each takes minutes.
fn size(seed: u64, simulation: &mut Simulation) -> usize {
    let small = 2 + simulation.random.below(14);
    let size = match seed % 1000 {
        999 if seed % 20_000 == 19_999 => 1000,
        999 => 300,
        499 => 150,
        n if n % 50 == 49 => 17 + simulation.random.below(48),
        _ => small,
    };
    usize::try_from(size).unwrap()
}

/// Checks one random network. One holder or the asker is disturbed at most once. Neighbours that
/// hold nothing vanish, pause, restart or lie.
fn check(seed: u64) {
    let mut simulation = Simulation::new(seed);
    let count = size(seed, &mut simulation);
    let nodes = simulation.add_all(Kind::Node, count);
    let asker = nodes[0];
    simulation.network.loss =
        [0.0, 0.0, 0.01, 0.05, 0.1][usize::try_from(simulation.random.below(5)).unwrap()];
    simulation.network.duplication = if simulation.random.chance(0.3) { 0.05 } else { 0.0 };
    // Delays vary by more than the time between packets, so packets overtake one another.
    let slow = simulation.random.chance(0.2);
    for node in &nodes {
        let high = if slow { 30 * MS } else { MS };
        let low = simulation.random.between(Duration::from_micros(30), high);
        simulation.hosts[*node].link.latency = (low, low * 2);
    }
    let holders = 1 + usize::try_from(simulation.random.below(3)).unwrap();
    let holders: Vec<usize> = nodes[1..].iter().copied().take(holders).collect();
    for number in 0..PATHS {
        if simulation.random.chance(0.6) {
            let holder =
                holders[usize::try_from(simulation.random.below(holders.len() as u64)).unwrap()];
            simulation.hold(holder, &[path(number)]);
        }
    }
    let warm = 2 * SECOND;
    let trouble = warm + SECOND;
    neighbours(&mut simulation, &nodes[1 + holders.len()..], trouble);
    let (what, own_pause) = disturb(&mut simulation, asker, holders[0], trouble);
    let warm_up: Vec<HashPart> = (0..WARM_UP).map(path).collect();
    simulation.ask(asker, warm_up, 5, warm, false);
    simulation.run(trouble);
    let (before, packets) = (simulation.clients.outcomes.len(), simulation.network.packets);
    let all: Vec<HashPart> = (0..PATHS).map(path).collect();
    let connections = 1 + u32::try_from(simulation.random.below(25)).unwrap();
    simulation.ask(asker, all, connections, trouble, false);
    simulation.run(trouble + 120 * SECOND);

    let context = format!("seed {seed}: {count} nodes, loss {}, {what}", simulation.network.loss);
    let ended = simulation.clients.outcomes.len() - before;
    assert!(ended as u64 >= PATHS, "{context}: {ended} lookups ended");
    assert!(
        simulation.slowest() <= longest() + own_pause,
        "{context}: a lookup took {:?}",
        simulation.slowest()
    );
    let wrong = simulation.wrong_misses();
    assert!(wrong.is_empty(), "{context}: {} wrong misses, {:?}", wrong.len(), wrong[0]);
    simulation.machine(asker).assert_bounds();
    // Allows each lookup a batch of its own, with query, answer and six repeats. More packets are a
    // storm.
    let max = (PATHS + WARM_UP) * (count as u64 + 30) * 14 + 20_000 + 40 * (count * count) as u64;
    let sent = simulation.network.packets - packets;
    assert!(sent <= max, "{context}: {sent} packets");
}

/// Schedules one disturbance of the asker or a holder. Returns its description, and how long the
/// asker itself is paused.
fn disturb(
    simulation: &mut Simulation,
    asker: usize,
    holder: usize,
    after: Duration,
) -> (String, Duration) {
    let at = after + simulation.random.between(Duration::ZERO, 300 * MS);
    let long = simulation.random.between(50 * MS, 2000 * MS);
    let what = simulation.random.below(6);
    simulation.run_at(at, move |simulation| match what {
        1 => simulation.pause(holder, long),
        2 => simulation.unplug(asker, long),
        3 => simulation.restart(holder, long.min(300 * MS)),
        4 => simulation.pause(asker, long * 10),
        5 => simulation.unplug(holder, long),
        _ => {}
    });
    let names = [
        "nothing",
        "holder paused",
        "asker unplugged",
        "holder restarted",
        "asker paused",
        "holder unplugged",
    ];
    let own_pause = if what == 4 { long * 10 } else { Duration::ZERO };
    (format!("{} for {long:?} at {at:?}", names[usize::try_from(what).unwrap()]), own_pause)
}

/// Schedules disturbances of neighbours that hold nothing, and adds neighbours of other kinds.
fn neighbours(simulation: &mut Simulation, others: &[usize], after: Duration) {
    for &other in others {
        let at = after + simulation.random.between(Duration::ZERO, 3 * SECOND);
        match simulation.random.below(8) {
            0 => simulation.run_at(at, move |simulation| simulation.vanish(other)),
            1 => simulation.run_at(at, move |simulation| simulation.pause(other, 5 * SECOND)),
            2 => simulation.run_at(at, move |simulation| simulation.restart(other, SECOND)),
            3 => simulation.run_at(at, move |simulation| simulation.unplug(other, 3 * SECOND)),
            _ => {}
        }
    }
    for kind in [Kind::Late, Kind::Half, Kind::Firewalled, Kind::Single] {
        if simulation.random.chance(0.15) {
            let start = simulation.random.between(Duration::ZERO, after + SECOND);
            simulation.add(kind, start);
        }
    }
    if simulation.random.chance(0.1) {
        for _ in 0..simulation.random.below(50) {
            let start = simulation.random.between(after, after + 5 * SECOND);
            simulation.add(Kind::Firewalled, start);
        }
    }
}

#[test]
fn random_networks_keep_invariants() {
    let seeds = seeds();
    let threads = std::thread::available_parallelism().map_or(2, usize::from) as u64;
    std::thread::scope(|scope| {
        if let Some(seed) =
            std::env::var("PEERIX_SIMULATION_TRACE").ok().and_then(|text| text.parse().ok())
        {
            return check(seed);
        }
        let workers: Vec<_> = (0..threads)
            .map(|first| {
                scope.spawn(move || (first..seeds).step_by(threads as usize).for_each(check))
            })
            .collect();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
    });
}
