//! A LAN with many nodes, and with many lookups at the same time.

use crate::common::lan::introduce;
use crate::common::{Asker, Bystander, Daemon, Holder, Host, Lan, World, daemon, nix, thread};
use std::process::Output;

/// Parallel connections of Nix.
const CONNECTIONS: usize = 25;

/// Store paths that no host has.
fn absent(count: u32) -> Vec<String> {
    (0..count).map(|number| format!("/nix/store/{number:032}-absent")).collect()
}

#[test]
fn lookups_among_64_nodes_hit_and_miss_correctly() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut neighbours = Bystander::crowd(&lan, 62);
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_live(&asker.host, 63);
    assert_eq!(daemon::found(&asker.host, &absent(1000), CONNECTIONS), 0);
    asker.fetch_closure_during(&world, || neighbours[0].vanish());
    assert_eq!(daemon::found(&asker.host, &absent(1000), CONNECTIONS), 0);
}

#[test]
fn parallel_lookups_of_29_nodes_find_all_paths() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let closure = nix::closure(&holder.host, &[world.path("closure300")]);
    let hosts: Vec<Host> = (0..29).map(|number| lan.host(&format!("asker-{number}"))).collect();
    introduce(&hosts.iter().chain([&holder.host]).collect::<Vec<_>>());
    let askers = hosts.into_iter().map(|host| Asker::on(host, "", &[&world.cache_key], |_| vec![]));
    let askers: Vec<Asker> = askers.collect();
    askers.iter().for_each(|asker| asker.meet(&[&holder]));
    let found: Vec<usize> = std::thread::scope(|scope| {
        let found = askers.iter().map(|asker| {
            let closure = &closure;
            thread::spawn_in(scope, "asker", move || {
                daemon::found(&asker.host, closure, CONNECTIONS)
            })
        });
        let found: Vec<_> = found.collect();
        found.into_iter().map(|thread| thread.join().expect("lookups")).collect()
    });
    assert_eq!(found, [300; 29]);
}

#[test]
fn parallel_fetches_of_8_nodes_over_one_link_succeed() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let askers: Vec<_> = (0..8).map(|_| Asker::new(&lan, &world, &[&holder])).collect();
    holder.host.slow_sending(100);
    let path = world.path("closure1000");
    let realising: Vec<_> = askers
        .iter()
        .map(|asker| nix::realising(&asker.host, &[path]).spawn().expect("nsenter starts"))
        .collect();
    let outputs: Vec<Output> =
        realising.into_iter().map(|nix| nix.wait_with_output().expect("nsenter is ours")).collect();
    for (asker, output) in askers.iter().zip(&outputs) {
        nix::assert_quiet(output);
        assert_eq!(asker.assert_closure_complete(&world, path).len(), 1000);
    }
}

#[test]
fn nodes_without_broadcasts_meet_by_neighbour_table() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let asker = lan.host("asker");
    // Like a Wi-Fi access point that isolates its clients: the switch drops broadcasts and
    // multicasts, except for ARP and neighbour discovery.
    asker.switch("ebtables -A FORWARD -d Broadcast -p IPv4 -j DROP");
    asker.switch("ebtables -A FORWARD -d Multicast -p IPv6 --ip6-proto udp -j DROP");
    nix::configure_client(&asker, "", &[&world.cache_key]);
    let holder = Holder::new(&lan, &world, "holder");
    let daemon = Daemon::start(&asker, &["--trusted-public-key", &world.cache_key]);
    assert_eq!(daemon::narinfo_status(&asker, &holder.mark), 404, "nobody has introduced them");
    // Any packet between them creates entries in the neighbour tables of their kernels.
    let _ = asker.connect((holder.host.address, 1));
    daemon::wait_until_known(&asker, &holder.mark);
    let asker = Asker { daemon, host: asker };
    assert_eq!(asker.fetch_and_check(&world, world.path("closure1000")).len(), 1000);
}
