//! Named situations with upper bounds of their cost, the same as in the model from which the rules
//! of discovery come.

use super::{Act, Kind, MS, PORT, SECOND, Simulation, US, ip_of, path};
use crate::nix::HashPart;
use crate::wire::{Hello, Packet};
use std::net::SocketAddr;
use std::time::Duration;

/// Number of lookups in one run.
const LOOKUPS: u64 = 3000;
/// Measured time from an answer to Nix's next request on the same connection.
pub(super) const NIX_PACE: Duration = Duration::from_micros(200);
/// When lookups begin. By then all hosts know one another.
const START: Duration = Duration::from_secs(1);

/// Creates 32 nodes. Node 0 asks; node 1 holds every second path.
fn thirty_two(seed: u64) -> (Simulation, Vec<usize>) {
    let mut simulation = Simulation::new(seed);
    let nodes = simulation.add_all(Kind::Node, 32);
    let held: Vec<HashPart> = (0..LOOKUPS).filter(|number| number % 2 == 0).map(path).collect();
    simulation.hold(nodes[1], &held);
    (simulation, nodes)
}

fn all() -> Vec<HashPart> {
    (0..LOOKUPS).map(path).collect()
}

fn no_wrong_miss(simulation: &Simulation) {
    let wrong = simulation.wrong_misses();
    assert!(
        wrong.is_empty(),
        "seed {}: {} wrong misses: {:?}",
        simulation.seed,
        wrong.len(),
        wrong[0]
    );
}

/// Time from the first lookup to the last outcome.
fn time_of(simulation: &Simulation) -> Duration {
    let end =
        simulation.clients.outcomes.iter().map(|outcome| outcome.began + outcome.elapsed).max();
    end.unwrap_or_default().saturating_sub(START)
}

#[test]
fn undisturbed_lookups_find_every_path_with_few_packets() {
    let (mut simulation, nodes) = thirty_two(1);
    simulation.run(START);
    let before = simulation.network.packets;
    simulation.clients.think = NIX_PACE;
    simulation.ask(nodes[0], all(), 25, START, false);
    simulation.run(60 * SECOND);
    no_wrong_miss(&simulation);
    assert_eq!(simulation.clients.outcomes.len() as u64, LOOKUPS);
    let packets = simulation.network.packets - before;
    assert!(packets <= 30_000, "{packets} packets for {LOOKUPS} lookups among 32 nodes");
    assert!(simulation.slowest() < 100 * MS, "{:?}", simulation.slowest());
}

#[test]
fn late_peer_costs_one_wait_and_one_due_time_per_lookup() {
    let (mut simulation, nodes) = thirty_two(2);
    simulation.add(Kind::Late, Duration::ZERO);
    simulation.ask(nodes[0], all(), 25, START, false);
    simulation.run(120 * SECOND);
    no_wrong_miss(&simulation);
    assert!(time_of(&simulation) < 12 * SECOND, "{:?}", time_of(&simulation));
}

#[test]
fn slow_peer_without_paths_delays_lookups_by_one_due_time() {
    let (mut simulation, nodes) = thirty_two(3);
    simulation.hosts[nodes[5]].link.latency = (50 * MS, 150 * MS);
    simulation.ask(nodes[0], all(), 25, START, false);
    simulation.run(120 * SECOND);
    no_wrong_miss(&simulation);
    assert!(time_of(&simulation) < 24 * SECOND, "{:?}", time_of(&simulation));
}

/// Looks paths up for 20 s. Returns how many lookups took longer than 0.5 s. The model has 25 in a
/// minute.
fn long_waits(simulation: &mut Simulation, asker: usize) -> usize {
    simulation.ask(asker, all(), 25, START, true);
    simulation.run(START + 20 * SECOND);
    no_wrong_miss(simulation);
    simulation.longer_than(500 * MS)
}

#[test]
fn flapping_neighbour_causes_few_long_waits() {
    let (mut simulation, nodes) = thirty_two(4);
    let flapping = nodes[7];
    for round in 0..4 {
        let down = START + 5 * SECOND * round + SECOND;
        simulation.run_at(down, move |simulation| simulation.unplug(flapping, 4 * SECOND));
    }
    let waits = long_waits(&mut simulation, nodes[0]);
    assert!(waits <= 50, "{waits} lookups took longer than 0.5 s");
}

#[test]
fn twenty_neighbours_that_vanish_cause_few_long_waits() {
    let (mut simulation, nodes) = thirty_two(5);
    for (round, vanishing) in nodes[5..25].iter().copied().enumerate() {
        let at = START + SECOND * u32::try_from(round).unwrap();
        simulation.run_at(at, move |simulation| simulation.vanish(vanishing));
    }
    let waits = long_waits(&mut simulation, nodes[0]);
    assert!(waits <= 50, "{waits} lookups took longer than 0.5 s");
}

#[test]
fn datagrams_to_vanished_peers_do_not_displace_those_to_live_peers() {
    for (seed, vanishing) in [(20, 10), (21, 90)] {
        let mut simulation = Simulation::new(seed);
        let nodes = simulation.add_all(Kind::Node, vanishing + 5);
        // Every path is found at once, so no answer is overdue.
        simulation.hold(nodes[1], &all());
        for node in nodes.iter().skip(2).take(vanishing).copied() {
            simulation.run_at(START + SECOND, move |simulation| simulation.vanish(node));
        }
        simulation.clients.think = NIX_PACE;
        simulation.ask(nodes[0], all(), 25, START, true);
        simulation.run(START + 10 * SECOND);
        no_wrong_miss(&simulation);
        assert_eq!(simulation.network.dropped, 0, "datagrams that found the send buffer full");
        assert!(simulation.slowest() < 100 * MS, "{:?}", simulation.slowest());
    }
}

#[test]
fn holder_not_used_before_is_found_among_vanished_peers() {
    for seed in 100..110 {
        let mut simulation = Simulation::new(seed);
        let nodes = simulation.add_all(Kind::Node, 24);
        // Paths of the first holder are found at once, so no answer is overdue. The paths of the
        // second are asked for last.
        let (early, late): (Vec<HashPart>, Vec<HashPart>) =
            (all()[..1500].to_vec(), all()[1500..].to_vec());
        simulation.hold(nodes[1], &early);
        simulation.hold(nodes[2], &late);
        simulation.network.loss = 0.05;
        for node in nodes[3..].iter().copied() {
            simulation.run_at(START + SECOND / 10, move |simulation| simulation.vanish(node));
        }
        simulation.clients.think = NIX_PACE;
        simulation.ask(nodes[0], early.into_iter().chain(late).collect(), 25, START, false);
        simulation.run(START + 60 * SECOND);
        no_wrong_miss(&simulation);
    }
}

#[test]
fn firewalled_newcomers_cause_few_long_waits() {
    let (mut simulation, nodes) = thirty_two(6);
    for round in 0..5 {
        simulation.add(Kind::Firewalled, START + 4 * SECOND * round);
    }
    let waits = long_waits(&mut simulation, nodes[0]);
    assert!(waits <= 50, "{waits} lookups took longer than 0.5 s");
}

#[test]
fn forged_hellos_delay_each_lookup_by_one_due_time() {
    let (mut simulation, nodes) = thirty_two(7);
    // Ten hellos a second, from addresses without a host.
    for round in 0..100 {
        simulation.add(Kind::Forged, START + 100 * MS * round);
    }
    simulation.ask(nodes[0], all(), 25, START, true);
    simulation.run(START + 10 * SECOND);
    no_wrong_miss(&simulation);
    let rate = simulation.clients.outcomes.len() / 10;
    assert!(rate >= 300, "{rate} lookups a second");
}

#[test]
fn forged_hellos_of_a_holder_do_not_disturb_lookups() {
    let (mut simulation, nodes) = thirty_two(11);
    let (asker, forged) = (nodes[0], SocketAddr::new(ip_of(nodes[1]), PORT));
    for round in 0..100_u64 {
        // The hello claims a node that never says no, with a new instance ID each time.
        let hello = Hello {
            port: 1,
            instance: round.to_le_bytes(),
            crowded: true,
            batches: false,
            digest: None,
        };
        let bytes = Packet::Hello(hello).encode().into();
        simulation.at(
            START + 100 * MS * u32::try_from(round).unwrap(),
            Act::Deliver { to: asker, from: forged, bytes },
        );
    }
    simulation.clients.think = NIX_PACE;
    simulation.ask(asker, all(), 25, START, true);
    simulation.run(START + 10 * SECOND);
    no_wrong_miss(&simulation);
    assert!(simulation.slowest() < 100 * MS, "{:?}", simulation.slowest());
}

#[test]
fn paused_holder_is_waited_for() {
    for (seed, pause) in [(8, 300 * MS), (9, 1000 * MS), (10, 2500 * MS)] {
        let (mut simulation, nodes) = thirty_two(seed);
        let holder = nodes[1];
        simulation.run_at(START + SECOND / 4, move |simulation| simulation.pause(holder, pause));
        simulation.ask(nodes[0], all(), 25, START, true);
        simulation.run(START + 6 * SECOND);
        no_wrong_miss(&simulation);
        assert!(
            simulation.clients.outcomes.len() > 1000,
            "{pause:?}: {}",
            simulation.clients.outcomes.len()
        );
    }
}

#[test]
fn holder_that_pauses_for_a_minute_costs_one_wait_of_three_seconds() {
    let (mut simulation, nodes) = thirty_two(11);
    let holder = nodes[1];
    simulation.run_at(START + SECOND / 4, move |simulation| simulation.pause(holder, 60 * SECOND));
    simulation.ask(nodes[0], all(), 25, START, true);
    simulation.run(START + 30 * SECOND);
    let waited = simulation.longer_than(SECOND);
    assert!((1..=25).contains(&waited), "{waited} lookups waited");
    assert!(simulation.slowest() < 3500 * MS, "{:?}", simulation.slowest());
}

#[test]
fn ten_percent_loss_causes_no_wrong_miss() {
    for seed in 20..22 {
        let (mut simulation, nodes) = thirty_two(seed);
        let other: Vec<HashPart> =
            (0..LOOKUPS).filter(|number| number % 4 == 1).map(path).collect();
        simulation.hold(nodes[2], &other);
        simulation.network.loss = 0.1;
        simulation.ask(nodes[0], all(), 25, START, false);
        simulation.run(120 * SECOND);
        no_wrong_miss(&simulation);
    }
}

#[test]
fn holder_that_restarts_is_waited_for() {
    for seed in 30..32 {
        let (mut simulation, nodes) = thirty_two(seed);
        let holder = nodes[1];
        simulation
            .run_at(START + SECOND / 4, move |simulation| simulation.restart(holder, 700 * MS));
        simulation.ask(nodes[0], all(), 25, START, true);
        simulation.run(START + 5 * SECOND);
        no_wrong_miss(&simulation);
    }
}

#[test]
fn unplugged_asker_reports_no_wrong_miss() {
    for seed in 40..42 {
        let (mut simulation, nodes) = thirty_two(seed);
        let asker = nodes[0];
        simulation
            .run_at(START + SECOND / 4, move |simulation| simulation.unplug(asker, 2 * SECOND));
        simulation.ask(asker, all(), 25, START, true);
        simulation.run(START + 5 * SECOND);
        no_wrong_miss(&simulation);
    }
}

#[test]
fn paused_asker_does_not_give_up_holders() {
    let (mut simulation, nodes) = thirty_two(45);
    let asker = nodes[0];
    simulation.run_at(START + SECOND / 4, move |simulation| simulation.pause(asker, 20 * SECOND));
    simulation.ask(asker, all(), 25, START, true);
    simulation.run(START + 22 * SECOND);
    no_wrong_miss(&simulation);
    assert!(simulation.clients.outcomes.len() > 1000, "{}", simulation.clients.outcomes.len());
}

#[test]
fn python_holder_among_new_nodes_is_found() {
    for seed in 50..54 {
        let mut simulation = Simulation::new(seed);
        let nodes = simulation.add_all(Kind::Node, 8);
        let original = simulation.add(Kind::Original, Duration::ZERO);
        let paths: Vec<HashPart> = (0..500).map(path).collect();
        simulation.hold(original, &paths);
        simulation.ask(nodes[0], paths, 25, START, false);
        simulation.run(120 * SECOND);
        no_wrong_miss(&simulation);
        assert_eq!(simulation.clients.outcomes.len(), 500);
    }
}

#[test]
fn holder_of_peerix_0_1_among_new_nodes_is_found() {
    let mut simulation = Simulation::new(55);
    let nodes = simulation.add_all(Kind::Node, 8);
    let old = simulation.add(Kind::Single, Duration::ZERO);
    simulation.hold(old, &(0..LOOKUPS / 2).map(path).collect::<Vec<_>>());
    simulation.ask(nodes[0], all(), 25, START, false);
    simulation.run(120 * SECOND);
    no_wrong_miss(&simulation);
    assert!(simulation.slowest() < 100 * MS, "{:?}", simulation.slowest());
}

#[test]
fn first_lookup_after_a_common_start_finds_the_path() {
    for seed in 60..260 {
        let mut simulation = Simulation::new(seed);
        let start = simulation.random.between(Duration::ZERO, SECOND);
        let asker = simulation.add(Kind::Node, Duration::ZERO);
        let holder = simulation.add(Kind::Node, start);
        simulation.hold(holder, &[path(1)]);
        // The lookup begins when both nodes run.
        let first = simulation.random.between(start, SECOND).max(100 * US);
        simulation.ask(asker, vec![path(1)], 1, first, false);
        simulation.run(20 * SECOND);
        assert!(
            simulation.clients.outcomes[0].found,
            "seed {seed}: holder started at {start:?}, lookup at {first:?}"
        );
    }
}

#[test]
fn path_registered_after_a_no_is_found_at_once() {
    let (mut simulation, nodes) = thirty_two(70);
    let holder = nodes[3];
    for number in 0..100 {
        let new = path(1_000_000 + number);
        simulation.ask(nodes[0], vec![new], 1, simulation.now.max(START), false);
        simulation.run(simulation.now.max(START) + SECOND);
        simulation.hold(holder, &[new]);
        simulation.ask(nodes[0], vec![new], 1, simulation.now, false);
        simulation.run(simulation.now + SECOND);
        let found: Vec<bool> =
            simulation.clients.outcomes.drain(..).map(|outcome| outcome.found).collect();
        assert_eq!(found, [false, true], "path {number}");
    }
}

#[test]
fn thirty_nodes_that_ask_at_once_find_everything() {
    let mut simulation = Simulation::new(80);
    let nodes = simulation.add_all(Kind::Node, 30);
    for (number, node) in nodes.iter().enumerate() {
        let paths: Vec<HashPart> = (0..300).map(|at| path(at * 30 + number as u64)).collect();
        simulation.hold(*node, &paths);
    }
    for (number, node) in nodes.iter().enumerate() {
        let other = (number as u64 + 7) % 30;
        simulation.ask(*node, (0..300).map(|at| path(at * 30 + other)).collect(), 25, START, false);
    }
    simulation.run(60 * SECOND);
    no_wrong_miss(&simulation);
    assert_eq!(simulation.clients.outcomes.len(), 30 * 300);
}
