//! What a system update asks for: narinfos of many paths, then the NARs of those that are missing.

use super::cache::{Cache, Narinfo};
use super::large::each;
use super::report::{Better, Report};
use super::scene::Bench;
use crate::shared::client::{Body, Client, spread};
use std::cell::Cell;
use std::collections::HashSet;
use std::time::Instant;

/// As Nix has them: for narinfos, and of those for NARs.
const CONNECTIONS: usize = 25;
const NARS: usize = 16;
/// Narinfos beside those whose NARs are asked for.
const OTHERS: usize = 700;

/// 10.
pub fn both(bench: &Bench, report: &mut Report) {
    let turn = Cell::new(0);
    let [own, _, nginx] = bench.through();
    let path = &bench.fixture.update[0];
    // From the own store it is over too soon to be told apart.
    for (what, times, caches) in
        [("the own store", 5, bench.servers()), ("a peer", 1, vec![own, nginx])]
    {
        caches
            .iter()
            .for_each(|cache| bench.fixture.update.iter().for_each(|path| cache.check(path)));
        let one = |cache: &Cache| {
            // Others each time, so that nobody has kept them.
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

/// Seconds for 1,000 narinfos, and then for the NARs of 300.
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
