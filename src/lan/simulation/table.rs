//! Cost of lookups by number of nodes, for docs/protocol.md.

use super::{Kind, SECOND, Simulation, path};
use std::time::Duration;

/// Looks up 3,000 absent paths over 25 connections among `count` nodes, then one path alone.
/// Returns the packets and bytes for the 3,000, and the duration of the single lookup.
fn costs(count: usize) -> (u64, u64, Duration) {
    let mut simulation = Simulation::new(count as u64);
    let nodes = simulation.add_all(Kind::Node, count);
    simulation.run(3 * SECOND);
    let (packets, bytes) = (simulation.network.packets, simulation.network.bytes);
    simulation.clients.think = super::scenes::NIX_PACE;
    simulation.ask(nodes[0], (0..3000).map(path).collect(), 25, 3 * SECOND, false);
    simulation.run(100 * SECOND);
    let costs = (simulation.network.packets - packets, simulation.network.bytes - bytes);
    simulation.clients.outcomes.clear();
    let now = simulation.now + Duration::from_millis(20);
    simulation.ask(nodes[0], vec![path(5000)], 1, now, false);
    simulation.run(now + SECOND);
    (costs.0, costs.1, simulation.clients.outcomes[0].elapsed)
}

#[test]
fn packets_grow_slower_than_nodes() {
    println!("| nodes | packets | bytes | time of a lone miss |\n|---|---|---|---|");
    let mut last = 0;
    for count in [2, 8, 32, 64, 100, 300] {
        let (packets, bytes, time) = costs(count);
        println!("| {count} | {packets} | {bytes} | {:.2} ms |", time.as_secs_f64() * 1000.0);
        assert!(
            packets > last && packets < 3000 * 4 * count as u64 / 3,
            "{count} nodes: {packets} packets"
        );
        assert!(time < Duration::from_millis(60), "{count} nodes: {time:?}");
        last = packets;
    }
}
