//! Part of `make bench`: lookups among peers on one LAN of namespaces, and what peerix costs at
//! rest. nginx, asked directly, takes turns with peerix in every round.
//!
//! Prints medians, ranges and ratios as a table, and writes it to `bench/results/<name>.md`. It
//! asserts that answers are right and nothing about time. Needs what the tests need, and nginx.
//!
//! Flags: `--rounds N` (default 5, or `PEERIX_BENCH_ROUNDS`), `--name NAME` (default `peers`),
//! `--only 1,3` (workloads by number; default all).

#[path = "../../tests/common/mod.rs"]
mod common;
mod crowd;
mod loads;
#[path = "../shared/mod.rs"]
mod shared;

use shared::options::Options;

fn main() {
    let options = Options::read("peers", 5);
    let machine = options.machine() + " Hosts are namespaces on a bridge, stores are on tmpfs.\n";
    println!("{machine}");
    let mut bench = loads::Bench::new(options.rounds);
    for number in &options.only {
        match number {
            1 => bench.lookups(),
            2 => bench.misses(),
            3 => bench.footprint(),
            4 => bench.crowds(),
            _ => bench.neighbours(),
        }
    }
    options.save("md", &format!("{machine}\n{}", bench.table.text()));
}
