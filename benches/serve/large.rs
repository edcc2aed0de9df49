//! Large NARs and NARs of many files, served from the local store.

use super::cache::{Cache, Narinfo};
use super::report::{Better, Contender, Report};
use super::scene::Bench;
use crate::common::world;
use crate::shared::client::{Body, Client};
use crate::shared::cost;
use crate::shared::table::Series;
use std::time::{Duration, Instant};

/// Figures of a stream: throughput and CPU cost.
pub const FIGURES: [(&str, Better); 2] = [("GB/s", Better::More), ("CPU-s/GiB", Better::Less)];

/// Minimum duration of a stream: the kernel reports CPU time in hundredths of a second.
const MIN_STREAM_TIME: Duration = Duration::from_secs(1);
/// How many times each contender streams the tree.
const TREE: u32 = 10;
/// Repetitions of a short request; the result is their median.
const SHORT: usize = 10;
/// Pause after an aborted answer, so that the server is idle again.
const SETTLED: Duration = Duration::from_millis(20);

/// Repetitions of the measurement of the first byte.
const FIRST_BYTES: usize = 50;

/// Workload 4: one stream of 1 GiB.
pub fn one(bench: &Bench, report: &mut Report) {
    let servers = bench.servers();
    servers.iter().for_each(|server| server.check(&bench.fixture.large));
    for (what, read) in [("thrown away by the kernel", false), ("read", true)] {
        let run = |server: &Cache| stream(server, &bench.fixture.large, 1, read);
        let goals = [(0, 1, 1.0)];
        report.compare(
            &format!("4. 1 GiB, {what}"),
            FIGURES,
            &each(&servers, &bench.fixture.large, &run),
            &goals,
        );
    }
}

/// Workload 5: four parallel streams of 256 MiB.
pub fn four(bench: &Bench, report: &mut Report) {
    let (servers, quarters) = (bench.servers(), &bench.fixture.quarters);
    servers.iter().for_each(|server| quarters.iter().for_each(|path| server.check(path)));
    let run = |server: &Cache| {
        let mut readers: Vec<(Client, String)> =
            quarters.iter().map(|path| (server.client(), server.narinfo(path).nar)).collect();
        let (before, began, mut bytes) = (server.cpu(), Instant::now(), 0);
        while began.elapsed() < MIN_STREAM_TIME {
            std::thread::scope(|scope| {
                let read = readers
                    .iter_mut()
                    .map(|(client, nar)| scope.spawn(|| client.get(nar, "", Body::Dropped)));
                let read: Vec<_> = read.collect();
                bytes +=
                    read.into_iter().map(|reader| reader.join().expect("a stream")).sum::<u64>();
            });
        }
        rates(bytes, began, server.cpu() - before)
    };
    report.compare("5. four of 256 MiB at once", FIGURES, &each(&servers, &quarters[0], &run), &[]);
}

/// Workload 6: a NAR of 20,000 files, compared with `tar` and `nix-store --dump`.
pub fn tree(bench: &Bench, report: &mut Report) {
    let (servers, tree) = (bench.servers(), &bench.fixture.tree);
    servers.iter().for_each(|server| server.check(tree));
    let size = servers[0].narinfo(tree).size;
    let run = |server: &Cache| stream(server, tree, TREE, false);
    let mut contenders = each(&servers, tree, &run);
    for (name, program) in
        [("tar | cat", "tar -cPf -"), ("nix-store --dump | cat", "nix-store --dump")]
    {
        let program = format!("{program} {tree}");
        let written: u64 =
            bench.holder.host.sh(&format!("{program} | wc -c")).trim().parse().expect("a number");
        assert!(written >= size, "{program}: {written} bytes");
        let script = format!("for n in $(seq {TREE}); do {program} | cat >/dev/null; done");
        let run = move || {
            let (before, began) = (cost::cpu_of_ended(), Instant::now());
            bench.holder.host.sh(&script);
            // All contenders count the size of the NAR: the output of tar is half as long again.
            rates(size * u64::from(TREE), began, cost::cpu_of_ended() - before)
        };
        contenders.push((name.into(), Box::new(run)));
    }
    let last = contenders.len() - 1;
    let goals = [(0, last - 1, 1.0), (0, last, 1.5)];
    report.compare("6. 20,000 files", FIGURES, &contenders, &goals);
}

/// Workload 7: a range request for the last tenth of a NAR.
pub fn resume(bench: &Bench, report: &mut Report) {
    let (servers, fixture) = (bench.servers(), &bench.fixture);
    // To resume a NAR of many files, the server must compute the sizes of the earlier ones.
    for (what, whole, last, goals) in [
        ("1 GiB", &fixture.large, &fixture.last_of_large, &[(0, 1, 1.1)][..]),
        ("20,000 files", &fixture.tree, &fixture.last_of_tree, &[]),
    ] {
        let run = |server: &Cache| [resuming(server, whole)];
        let mut contenders = each(&servers, whole, &run);
        let alone = || [alone(&servers[0], last)];
        contenders.insert(1, ("a NAR as long as that".into(), Box::new(alone)));
        // The cache from outside, if any, need not support ranges.
        servers[..3].iter().for_each(|server| check_resuming(server, whole));
        report.compare(
            &format!("7. the last tenth of {what}"),
            [("ms", Better::Less)],
            &contenders,
            goals,
        );
    }
}

/// Workload 8: time to the first byte of a NAR of 20,000 files.
pub fn first_byte(bench: &Bench, report: &mut Report) {
    let (servers, fixture) = (bench.servers(), &bench.fixture);
    let run = |server: &Cache| [first(server, &fixture.tree)];
    let mut contenders = each(&servers, &fixture.tree, &run);
    contenders
        .insert(1, ("that of 4 KiB".into(), Box::new(|| [first(&servers[0], &fixture.small[0])])));
    report.compare(
        "8. first byte of 20,000 files",
        [("ms", Better::Less)],
        &contenders,
        &[(0, 1, 2.0)],
    );
}

/// Turns each server into a contender. `path` is the store path that `run` requests.
pub fn each<'a, const N: usize>(
    servers: &'a [Cache<'a>],
    path: &str,
    run: &'a impl Fn(&Cache) -> [f64; N],
) -> Vec<Contender<'a, N>> {
    let contender = |server: &'a Cache<'a>| -> Contender<'a, N> {
        (server.label(path), Box::new(move || run(server)))
    };
    servers.iter().map(contender).collect()
}

/// Streams a NAR `times` times, and for at least [`MIN_STREAM_TIME`]. Returns GB/s and CPU seconds
/// per GiB.
pub fn stream(server: &Cache, path: &str, times: u32, read: bool) -> [f64; 2] {
    let (nar, mut client) = (server.narinfo(path).nar, server.client());
    let (before, began, mut bytes, mut count) = (server.cpu(), Instant::now(), 0, 0);
    while count < times || began.elapsed() < MIN_STREAM_TIME {
        let body = if read { Body::Read(&mut |_| ()) } else { Body::Dropped };
        bytes += client.get(&nar, "", body);
        count += 1;
    }
    rates(bytes, began, server.cpu() - before)
}

fn rates(bytes: u64, began: Instant, cpu: f64) -> [f64; 2] {
    let (rate, cost) = cost::rates(bytes, began, cpu);
    [rate, cost]
}

/// Median milliseconds for the last tenth of a NAR, or NaN if the server cannot resume it.
pub fn resuming(server: &Cache, path: &str) -> f64 {
    let narinfo = server.narinfo(path);
    let (start, mut client) = (tenth(&narinfo), server.client());
    let range = format!("Range: bytes={start}-\r\n");
    if narinfo.compression != "none" || server.client().ask(&narinfo.nar, &range).status != 206 {
        return f64::NAN;
    }
    median(SHORT, || {
        let began = Instant::now();
        let came = client.get(&narinfo.nar, &range, Body::Dropped);
        let elapsed = began.elapsed();
        assert_eq!(came, narinfo.size - start, "{}: {}", server.name, narinfo.nar);
        elapsed
    })
}

/// Median milliseconds for a whole NAR.
pub fn alone(server: &Cache, path: &str) -> f64 {
    let (nar, mut client) = (server.narinfo(path).nar, server.client());
    median(SHORT, || {
        let began = Instant::now();
        client.get(&nar, "", Body::Dropped);
        began.elapsed()
    })
}

/// Panics if the resumed last tenth of a NAR differs from the end of the whole NAR.
pub fn check_resuming(server: &Cache, path: &str) {
    let narinfo = server.narinfo(path);
    let start = tenth(&narinfo);
    // Returns the digest of all bytes after the first `skip`.
    let digest = |headers: &str, mut skip: u64| {
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        let mut look = |bytes: &[u8]| {
            let skipped = skip.min(bytes.len() as u64);
            skip -= skipped;
            digest.update(&bytes[usize::try_from(skipped).expect("no more than there are")..]);
        };
        server.client().get(&narinfo.nar, headers, Body::Read(&mut look));
        digest.finish()
    };
    let (whole, resumed) = (digest("", start), digest(&format!("Range: bytes={start}-\r\n"), 0));
    assert_eq!(
        whole.as_ref(),
        resumed.as_ref(),
        "{}: {} resumes with other bytes",
        server.name,
        narinfo.nar
    );
}

/// Offset of the last tenth of a NAR, in bytes.
fn tenth(narinfo: &Narinfo) -> u64 {
    narinfo.size / 10 * 9
}

/// Median milliseconds from the request to the first byte of the body.
fn first(server: &Cache, path: &str) -> f64 {
    let nar = server.narinfo(path).nar;
    median(FIRST_BYTES, || {
        // The rest of the body stays unread, so each repetition needs a new connection. The
        // request for the narinfo warms it up.
        let mut client = server.client();
        client.text(&server.route(world::hash_part(path)));
        let began = Instant::now();
        assert_eq!(client.ask(&nar, "").status, 200, "{nar}");
        client.first_byte();
        let elapsed = began.elapsed();
        drop(client);
        // The server may still be writing to the closed connection.
        std::thread::sleep(SETTLED);
        elapsed
    })
}

/// Median of `times` durations, in milliseconds.
fn median(times: usize, mut timed: impl FnMut() -> Duration) -> f64 {
    let mut series = Series::default();
    (0..times).for_each(|_| series.push(timed().as_secs_f64() * 1e3));
    series.median()
}
