//! Memory with many connections, some of which stopped reading in the middle of a NAR.

use super::cache::Cache;
use super::report::{Better, Contender, Report};
use super::scene::Bench;
use crate::common::{PORT, Process, daemon, wait_for};
use crate::shared::client::Client;
use crate::shared::{cost, scene};
use std::net::Ipv4Addr;
use std::process::Stdio;

/// Open connections.
const CONNECTIONS: usize = 256;
/// Connections among them that are in the middle of a NAR of 256 MiB.
const STREAMS: usize = 64;
/// Goal for the peak memory, in MiB.
const BOUND: f64 = 64.0;
/// Ports of the instances of this workload, which run beside those of the other workloads.
const OWN: u16 = PORT + 1000;
const NGINX: u16 = 8090;

/// Workload 11.
pub fn connections(bench: &Bench, report: &mut Report) {
    let host = &bench.holder.host;
    let outside = bench
        .outside
        .as_ref()
        .map(|outside| outside.cache())
        .filter(|cache| !cache.pids.is_empty());
    let cache = |port: u16, prefix: &str, process: &Process| {
        Cache::new("", Some(host), (Ipv4Addr::LOCALHOST, port).into(), prefix, &[process.pid()])
    };
    let mut contenders: Vec<Contender<3>> = vec![
        (
            "peerix".into(),
            Box::new(|| {
                let mut command = host.cmd(&daemon::binary().display().to_string());
                command.args(["--port", &OWN.to_string()]);
                command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
                let process = Process::start(command);
                wait_for("peerix answers", || host.connect((Ipv4Addr::LOCALHOST, OWN)).ok());
                memory(&cache(OWN, "/store/", &process), bench)
            }),
        ),
        ("the bound".into(), Box::new(|| [BOUND, f64::NAN, f64::NAN])),
        (
            "nginx, its processes together".into(),
            Box::new(|| {
                memory(
                    &cache(NGINX, "/", &scene::nginx(host, &[(NGINX, &bench.cache, true)])),
                    bench,
                )
            }),
        ),
    ];
    if let Some(cache) = &outside {
        contenders
            .push((format!("{}, which ran before", cache.name), Box::new(|| memory(cache, bench))));
    }
    let figures = [
        ("most MiB", Better::Less),
        ("MiB then", Better::Less),
        ("MiB when they are closed", Better::Less),
    ];
    report.compare(
        "11. 256 connections, 64 in the middle of a NAR",
        figures,
        &contenders,
        &[(0, 1, 1.0)],
    );
}

/// Returns MiB: the peak (`VmHWM`) and the current size (`VmRSS`) while all connections are open,
/// and `VmRSS` after they are closed.
fn memory(cache: &Cache, bench: &Bench) -> [f64; 3] {
    let of = |line| cache.pids.iter().map(|pid| cost::memory_of_all(*pid, line)).sum::<f64>();
    // All processes share one network namespace, so the tables of the first one cover all.
    let open = || cost::connections(cache.pids[0], cache.address.port());
    let nars: Vec<String> =
        bench.fixture.quarters.iter().map(|path| cache.narinfo(path).nar).collect();
    let before = open();
    let clients: Vec<Client> = (0..CONNECTIONS)
        .map(|n| {
            let mut client = cache.client();
            if n < STREAMS {
                assert_eq!(
                    client.ask(&nars[n % nars.len()], "").status,
                    200,
                    "{}: stream {n}",
                    cache.name
                );
            } else {
                cache.ask(&mut client, &bench.fixture.small[n]).expect("it is there");
            }
            client
        })
        .collect();
    assert!(open() >= CONNECTIONS, "{}: all are open", cache.name);
    let (most, now) = (of("VmHWM"), of("VmRSS"));
    drop(clients);
    wait_for("connections are closed", || (open() <= before).then_some(()));
    [most, now, of("VmRSS")]
}
