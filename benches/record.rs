//! Fourth part of `make bench`: what the statistics of the status page cost. Two instances of this
//! program, one with statistics and one without, take turns in answering requests.
//!
//! Measures narinfos of a peer (found and not found) and of the local store, one at a time on one
//! connection; the time of one update of the statistics; and memory, idle and after all requests.
//!
//! Flag: `--rounds N` (default 30). Asserts that answers are right, and nothing about time.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "shared/table.rs"]
#[allow(dead_code)]
mod table;

use common::daemon::add_unique_path;
use common::http::Connection;
use common::process::Logged;
use common::{Host, Lan, World, directory, nix, wait_for, world};
use peerix::cli::{self, Command};
use peerix::nix::StorePath;
use peerix::stats::{MissReason, Network, Stats};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use table::{Series, Table};

/// Consecutive requests to one contender before the other one's turn.
const IN_A_ROW: usize = 50;
/// Number of updates over which the time of one update is averaged.
const STATS_UPDATES: u32 = 1_000_000;

/// Runs this program as the daemon. Arguments: `--serve on` or `--serve off`, then daemon flags.
fn serve(mode: &str) -> ! {
    let flags = std::env::args_os().skip(3);
    let Ok(Command::Run(config)) = cli::parse(flags, |_| None) else { panic!("a daemon's flags") };
    let stats = if mode == "on" { Stats::new() } else { Stats::off() };
    peerix::daemon::run_with(*config, stats).expect("it serves");
    std::process::exit(0)
}

struct Contender {
    daemon: Logged,
    host: Host,
    connection: Connection,
}

impl Contender {
    fn start(lan: &Lan, program: &Path, mode: &str) -> Contender {
        let host = lan.host(mode);
        nix::configure_client(&host, "", &[]);
        let mut command = host.cmd(&program.display().to_string());
        command.args(["--serve", mode]);
        let mut daemon = Logged::start(mode, command);
        let stream = daemon.wait_until("it answers", || host.connect_local().ok());
        Contender { daemon, host, connection: Connection::new(stream).expect("a connection") }
    }

    fn status_of(&mut self, route: &str) -> u16 {
        self.connection.get(route).expect("an answer").status
    }

    /// Requests [`IN_A_ROW`] of `routes` in turn and returns the mean time of one, in microseconds.
    /// Panics if an answer has another status than `status`.
    fn asks(&mut self, routes: &[String], status: u16) -> f64 {
        let began = Instant::now();
        for at in 0..IN_A_ROW {
            assert_eq!(self.status_of(&routes[at % routes.len()]), status);
        }
        began.elapsed().as_secs_f64() * 1e6 / IN_A_ROW as f64
    }

    /// Anonymous memory of the process (`RssAnon`), in MiB.
    fn memory(&self) -> f64 {
        let file = format!("/proc/{}/status", self.daemon.process.pid());
        let text = std::fs::read_to_string(file).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix("RssAnon:")).expect("its memory");
        line.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
    }
}

fn both(contenders: &[Contender; 2], of: fn(&Contender) -> f64) -> [Series; 2] {
    contenders.each_ref().map(|contender| {
        let mut series = Series::default();
        series.push(of(contender));
        series
    })
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let rounds = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--serve", mode, ..] => serve(mode),
        ["--rounds", rounds, ..] => rounds.parse().expect("--rounds N"),
        _ => 30,
    };
    let program: PathBuf = directory().join("record-bench");
    std::fs::copy(std::env::current_exe().expect("this program"), &program)
        .expect("a copy that hosts can see");
    let mut table = Table::new();
    let (other, goal) = ("without the record", "ratio ≤ 1.03");
    telling(&mut table);

    let route = |number: usize| format!("/{number:032}.narinfo");
    let absent: Vec<String> = (0..200).map(route).collect();
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = common::Holder::new(&lan, &world, "holder");
    let mut contenders = ["on", "off"].map(|mode| Contender::start(&lan, &program, mode));
    let [own, its] = both(&contenders, Contender::memory);
    table.beside("memory of its own when idle, MiB", &own, other, &its, "1 MiB more at most");
    let found: Vec<String> = nix::closure(&holder.host, &[world.path("closure300")])
        .iter()
        .map(|path| format!("/{}.narinfo", world::hash_part(path)))
        .collect();
    for contender in &mut contenders {
        let of_holder = format!("/{}.narinfo", world::hash_part(&holder.mark));
        wait_for("the holder is known", || (contender.status_of(&of_holder) == 200).then_some(()));
        contender.asks(&found, 200);
    }
    let [own, its] = turns(&mut contenders, rounds, [&found, &found], 200);
    table.beside("a narinfo of a neighbour, µs", &own, other, &its, goal);
    let [own, its] = turns(&mut contenders, rounds, [&absent, &absent], 404);
    table.beside("a narinfo that no neighbour has, µs", &own, other, &its, goal);
    let own = contenders.each_ref().map(|contender| {
        let mark = add_unique_path(&contender.host);
        vec![format!("/local/{}.narinfo", world::hash_part(&mark))]
    });
    let [own, its] = turns(&mut contenders, rounds, [&own[0], &own[1]], 200);
    table.beside("a narinfo of the own store, µs", &own, other, &its, goal);
    let [own, its] = both(&contenders, Contender::memory);
    table.beside("memory of its own after that, MiB", &own, other, &its, "1 MiB more at most");
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    std::fs::create_dir_all(&results).expect("a directory for results");
    std::fs::write(results.join("record.md"), table.text()).expect("the table is written");
}

/// Measures the time of one update of the statistics, without a lookup.
fn telling(table: &mut Table) {
    let stats = Stats::new();
    let path =
        StorePath::parse("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-hello-2.12.1").expect("a store path");
    let (hash_part, peer) = (path.hash_part(), SocketAddr::from(([10, 0, 0, 1], 12304)));
    let elapsed = Duration::from_micros(200);
    let nanos = |tell: &dyn Fn()| {
        let mut series = Series::default();
        for _ in 0..5 {
            let began = Instant::now();
            (0..STATS_UPDATES).for_each(|_| tell());
            series.push(began.elapsed().as_secs_f64() * 1e9 / f64::from(STATS_UPDATES));
        }
        series
    };
    let hit = nanos(&|| stats.record_hit(&path, Network::Lan, peer, None, elapsed));
    table.alone("telling the record of a hit, ns", &hit, "");
    let miss = nanos(&|| stats.record_miss(&hash_part, MissReason::Nobody { asked: 2 }, elapsed));
    table.alone("telling the record of a miss, ns", &miss, "");
}

/// Alternates between the two contenders; microseconds per request. Each round takes the quickest
/// of ten turns, because other work of the machine only makes turns slower.
fn turns(
    contenders: &mut [Contender; 2],
    rounds: usize,
    routes: [&[String]; 2],
    status: u16,
) -> [Series; 2] {
    let mut series = [Series::default(), Series::default()];
    for _ in 0..rounds {
        let mut quickest = [f64::INFINITY; 2];
        for turn in 0..10 {
            // The first of the two finds a warmer processor, so the order alternates.
            for at in [turn % 2, 1 - turn % 2] {
                quickest[at] = quickest[at].min(contenders[at].asks(routes[at], status));
            }
        }
        series.iter_mut().zip(quickest).for_each(|(series, time)| series.push(time));
    }
    series
}
