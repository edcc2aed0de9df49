//! Answers that come through a peer: large NARs, narinfos, and a closure that real Nix fetches.

use super::cache::Cache;
use super::fixture::BLOCK;
use super::large::{self, alone, check_resuming, each, resuming, stream};
use super::report::{Better, Contender, Report};
use super::scene::Bench;
use super::small::{self, asked};
use super::wrk::Load;
use crate::common::lan::Run;
use crate::common::{Host, PORT, nix, world};
use crate::shared::cost;
use crate::shared::scene::{Peer, client, timed};
use std::time::Instant;

/// Workload 9.
pub fn all(bench: &Bench, report: &mut Report) {
    let (caches, fixture) = (bench.through(), &bench.fixture);
    for (what, path, times, goals) in
        [("1 GiB", &fixture.large, 1, &[(0, 1, 0.7)][..]), ("20,000 files", &fixture.tree, 5, &[])]
    {
        caches.iter().for_each(|cache| cache.check(path));
        let run = |cache: &Cache| stream(cache, path, times, false);
        let mut contenders = each(&caches, path, &run);
        contenders.push(("sha256 alone".into(), Box::new(sha256)));
        report.compare(&format!("9. through a peer, {what}"), large::FIGURES, &contenders, goals);
    }
    let routes = |prefix: &str| -> Vec<String> {
        fixture
            .small
            .iter()
            .map(|path| format!("{prefix}{}.narinfo", world::hash_part(path)))
            .collect()
    };
    let loads =
        [&caches[0], &caches[2]].map(|cache| Load::new(cache, &routes(&cache.prefix), true));
    report.compare(
        "9. through a peer, narinfo, 25 connections",
        small::FIGURES,
        &asked(&loads, 25),
        &[],
    );
    let (own, nginx) = (&caches[0], &caches[2]);
    check_resuming(own, &fixture.large);
    let contenders: Vec<Contender<1>> = vec![
        (own.name.clone(), Box::new(|| [resuming(own, &fixture.large)])),
        ("a NAR as long as that".into(), Box::new(|| [alone(own, &fixture.last_of_large)])),
        (nginx.name.clone(), Box::new(|| [resuming(nginx, &fixture.large)])),
    ];
    report.compare(
        "9. through a peer, the last tenth of 1 GiB",
        [("ms", Better::Less)],
        &contenders,
        &[],
    );
}

/// GB/s of SHA-256 alone, an upper bound for a server that verifies what it passes on.
fn sha256() -> [f64; 2] {
    let zeros = vec![0; 1 << 20];
    let (began, mut digest) = (Instant::now(), ring::digest::Context::new(&ring::digest::SHA256));
    (0..1024).for_each(|_| digest.update(&zeros));
    std::hint::black_box(digest.finish());
    [cost::rates(1 << 30, began, f64::NAN).0, f64::NAN]
}

/// Workload 12.
pub fn closures(bench: &Bench, report: &mut Report) {
    let (key, root) = (&bench.fixture.key, bench.fixture.small[0].clone());
    let nginx = bench.through()[2].url();
    let outside = bench.outside.as_ref().map(|outside| outside.cache());
    for what in ["nix-store --realise", "nix copy --from"] {
        // Every run starts with an empty store.
        let run = |host: &Host, url: &str, outside: bool| {
            let mut command =
                if outside { host.cmd_outside("timeout") } else { host.cmd("timeout") };
            command.arg(crate::common::DEADLINE.as_secs().to_string());
            match what {
                "nix copy --from" => command.args(["nix", "copy", "--from", url, &root]),
                _ => command.args(["nix-store", "--no-gc-warning", "--realise", &root]),
            };
            let elapsed = timed(&mut command, nix::assert_quiet);
            assert_eq!(nix::closure(host, &[&root]).len(), BLOCK);
            host.cmd("nix-store").args(["--verify-path", &root]).okay();
            [elapsed]
        };
        let mut contenders: Vec<Contender<1>> = vec![
            (
                "peerix".into(),
                Box::new(|| {
                    let mut asker = Peer::asker(&bench.lan, key, &bench.fixture.update[..1]);
                    let elapsed = run(&asker.host, &format!("http://127.0.0.1:{PORT}"), false);
                    // The daemon sends bye on SIGTERM, so that no peer waits for its answers.
                    asker.daemon.terminate();
                    elapsed
                }),
            ),
            (
                "nginx, asked directly".into(),
                Box::new(|| run(&client(&bench.lan, key, &nginx), &nginx, false)),
            ),
        ];
        if let Some(cache) = &outside {
            let ask = || {
                let host = client(&bench.lan, key, &cache.url());
                // The cache may sign with an unknown key, or not at all.
                nix::configure(
                    &host,
                    &format!("substituters = {}\nrequire-sigs = false\n", cache.url()),
                );
                run(&host, &cache.url(), true)
            };
            contenders.push((cache.label(&root), Box::new(ask)));
        }
        report.compare(
            &format!("12. {what} of 1,000 paths"),
            [("s", Better::Less)],
            &contenders,
            &[(0, 1, 1.5)],
        );
    }
}
