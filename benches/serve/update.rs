//! A system update: narinfos of many paths, then the NARs of those that are missing.

use super::cache::{Cache, Narinfo};
use super::large::each;
use super::report::{Better, Report};
use super::scene::Bench;
use crate::shared::client::{Body, Client, spread};
use std::cell::Cell;
use std::collections::HashSet;
use std::time::Instant;

/// Connections that Nix opens for narinfos.
const CONNECTIONS: usize = 25;
/// Connections among them that Nix uses for NARs.
const NARS: usize = 16;
/// Narinfos that are requested without their NARs.
const OTHERS: usize = 700;

/// Workload 10.
pub fn both(bench: &Bench, report: &mut Report) {
    let turn = Cell::new(0);
    let [own, _, nginx] = bench.through();
    let path = &bench.fixture.update[0];
    // An update from the local store is too short to measure alone, so it runs five times.
    for (what, times, caches) in
        [("the own store", 5, bench.servers()), ("a peer", 1, vec![own, nginx])]
    {
        caches
            .iter()
            .for_each(|cache| bench.fixture.update.iter().for_each(|path| cache.check(path)));
        let one = |cache: &Cache| {
            // Other paths in every turn, so that no server has their narinfos cached.
            turn.set((turn.get() + OTHERS) % (bench.fixture.small.len() - OTHERS));
            update(cache, &bench.fixture.update, &bench.fixture.small[turn.get()..][..OTHERS])
        };
        let run = |cache: &Cache| [(0..times).map(|_| one(cache)).sum::<f64>() / f64::from(times)];
        report.compare(
            &format!("10. update from {what}"),
            [("s", Better::Less)],
            &each(&caches, path, &run),
            &[],
        );
    }
}

/// Returns the seconds for 1,000 narinfos followed by the NARs of 300 of them.
fn update(cache: &Cache, paths: &[String], others: &[String]) -> f64 {
    let wanted: HashSet<&String> = paths.iter().collect();
    let all: Vec<&String> = paths.iter().chain(others).collect();
    let mut clients: Vec<Client> = (0..CONNECTIONS).map(|_| cache.client()).collect();
    let began = Instant::now();
    let narinfos: Vec<Option<Narinfo>> = spread(&mut clients, &all, |client, path| {
        let narinfo = cache
            .ask(client, path)
            .unwrap_or_else(|status| panic!("{}: {path}: {status}", cache.name));
        wanted.contains(path).then_some(narinfo)
    });
    let nars: Vec<Narinfo> = narinfos.into_iter().flatten().collect();
    assert_eq!(nars.len(), paths.len(), "one for each");
    spread(&mut clients[..NARS], &nars, |client, narinfo| {
        let came = client.get(&narinfo.nar, "", Body::Dropped);
        assert!(came == narinfo.size || narinfo.compression != "none", "{}", narinfo.nar);
    });
    began.elapsed().as_secs_f64()
}
