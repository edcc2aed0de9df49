//! `make bench`: peerix and what it competes with, on one network of namespaces, in turn, round after round.
//!
//! Prints medians, ranges and ratios as a table, and writes it to `bench/results/<name>.md`. It asserts that answers
//! are right and nothing about time. Needs what the tests need, and nginx and wrk.
//!
//! `--rounds N` (or `PEERIX_BENCH_ROUNDS`; 5), `--name NAME` (peers), `--only 1,4` (workloads, by number).

#[path = "../../tests/common/mod.rs"]
mod common;
mod loads;
mod scene;
mod table;

use std::path::Path;

fn main() {
    let mut rounds = std::env::var("PEERIX_BENCH_ROUNDS").unwrap_or_else(|_| "5".into());
    let (mut name, mut only) = ("peers".to_owned(), "1,2,3,4,5,6,7".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| usage(&argument));
        match argument.as_str() {
            "--rounds" => rounds = value(),
            "--name" => name = value(),
            "--only" => only = value(),
            // cargo's own.
            "--bench" => {}
            _ => usage(&argument),
        }
    }
    let rounds: usize = rounds.parse().ok().filter(|n| *n > 0).unwrap_or_else(|| usage("--rounds"));
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    std::fs::create_dir_all(&results).expect("a directory for results");
    let machine = machine(rounds);
    println!("{machine}");
    let mut bench = loads::Bench::new(rounds);
    for number in only.split(',') {
        match number {
            "1" => bench.lookups(),
            "2" => bench.misses(),
            "3" => bench.closures(),
            "4" => bench.large_nar(),
            "5" => bench.many_files(),
            "6" => bench.footprint(),
            "7" => bench.narinfos(),
            _ => usage(number),
        }
    }
    let text = format!("{machine}\n{}", bench.table.text());
    std::fs::write(results.join(name + ".md"), text).expect("the table is written");
}

fn usage(what: &str) -> ! {
    eprintln!("{what}: --rounds N, --name NAME, --only 1,2,3,4,5,6,7");
    std::process::exit(2)
}

/// What was measured on, in words.
fn machine(rounds: usize) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let info = read("/proc/cpuinfo");
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ")).map_or("", |(_, m)| m);
    let kernel = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    let nix = std::process::Command::new("nix-store").arg("--version").output();
    let nix = nix.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default();
    format!(
        "{cores} cores ({model}), Linux {}, {nix}, load {load} at the start. Medians of {rounds} rounds, in brackets \
         the least and the most; contenders take turns. Hosts are namespaces on a bridge, stores are on tmpfs.\n",
        kernel.trim()
    )
}
