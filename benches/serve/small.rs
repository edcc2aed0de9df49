//! Many small answers: narinfos, and NARs of 4 KiB.

use super::cache::Cache;
use super::report::{Better, Contender, Goal, Report};
use super::scene::Bench;
use super::wrk::Load;
use crate::common::world;
use crate::shared::client::{Client, spread};
use crate::shared::scene::absent;

/// Numbers of persistent connections. Nix opens 25.
const CONNECTIONS: [u32; 5] = [1, 16, 25, 64, 256];

/// Figures that wrk reports.
pub const FIGURES: [(&str, Better); 4] = [
    ("requests/s", Better::More),
    ("median ms", Better::Less),
    ("p99 ms", Better::Less),
    ("CPU µs each", Better::Less),
];

/// Workload 1 (`present`) and 2 (absent).
pub fn narinfos(bench: &Bench, report: &mut Report, present: bool) {
    let servers = bench.servers();
    let hash_parts: Vec<String> = if present {
        bench.fixture.small.iter().map(|path| world::hash_part(path).to_owned()).collect()
    } else {
        absent(bench.fixture.small.len())
    };
    let what = if present { "1. narinfo, present" } else { "2. narinfo, absent" };
    let loads = servers.iter().map(|server| {
        let (status, text) = server.client().text(&server.route(&hash_parts[0]));
        let right = if present { text.contains(&bench.fixture.small[0]) } else { status == 404 };
        assert!(right, "{what}: {} says {status} {text}", server.name);
        let routes: Vec<String> = hash_parts.iter().map(|part| server.route(part)).collect();
        Load::new(server, &routes, present)
    });
    let loads: Vec<Load> = loads.collect();
    for connections in CONNECTIONS {
        // The goals hold for both configurations of nginx: for small answers it is quicker without
        // `sendfile`.
        let goals: &[Goal] = match (present, connections) {
            (true, 25) => {
                &[(0, 1, 1.0), (0, 2, 1.0), (2, 1, 1.0), (2, 2, 1.0), (3, 1, 1.5), (3, 2, 1.5)]
            }
            (false, 25) => &[(0, 1, 1.0), (0, 2, 1.0)],
            _ => &[],
        };
        report.compare(
            &format!("{what}, {}", plural(connections)),
            FIGURES,
            &asked(&loads, connections),
            goals,
        );
    }
}

/// Workload 3.
pub fn nars(bench: &Bench, report: &mut Report) {
    let small = &bench.fixture.small;
    let servers: Vec<Cache> =
        bench.servers().into_iter().map(|server| server.labelled(&small[0])).collect();
    let loads = servers.iter().map(|server| {
        server.check(&small[0]);
        // 25 connections, as Nix opens: some caches need time to make a narinfo.
        let mut clients: Vec<Client> = (0..25).map(|_| server.client()).collect();
        let routes: Vec<String> = spread(&mut clients, small, |client, path| {
            server.ask(client, path).unwrap_or_else(|status| panic!("{path}: {status}")).nar
        });
        Load::new(server, &routes, true)
    });
    let loads: Vec<Load> = loads.collect();
    report.compare(
        "3. NAR of 4 KiB, 16 connections",
        FIGURES,
        &asked(&loads, 16),
        &[(0, 1, 0.8), (0, 2, 0.8)],
    );
}

/// Turns each load into a contender.
pub fn asked<'a>(loads: &'a [Load], connections: u32) -> Vec<Contender<'a, 4>> {
    let run = |load: &'a Load| -> Contender<'a, 4> {
        (load.name(), Box::new(move || load.run(connections)))
    };
    loads.iter().map(run).collect()
}

fn plural(connections: u32) -> String {
    format!("{connections} connection{}", if connections == 1 { "" } else { "s" })
}
