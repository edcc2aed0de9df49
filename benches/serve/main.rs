//! First part of `make bench`: what peerix serves from the local store and through a peer. nginx
//! with a static cache of the same paths takes turns with peerix in every round.
//!
//! Prints medians, ranges and ratios as a table, and writes it and a chart to
//! `bench/results/<name>.{md,svg}`. It asserts that answers are right and nothing about time. Needs
//! what the tests need, and nginx and wrk.
//!
//! Flags: `--rounds N` (default 5, or `PEERIX_BENCH_ROUNDS`), `--name NAME` (default `serve`),
//! `--only 1,4` (workloads by number; default all). `CACHE_URL=http://host:port[/prefix]` adds
//! another cache; `CACHE_PID` is its process, for the CPU and memory figures, and `CACHE_FILL=1`
//! adds the paths to this machine's store.

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../shared/mod.rs"]
mod shared;

mod cache;
mod chart;
mod fixture;
mod large;
mod memory;
mod outside;
mod report;
mod scene;
mod small;
mod through;
mod update;
mod wrk;

use shared::options::Options;
use std::path::PathBuf;

fn main() {
    let options = Options::read("serve", 12);
    let bench = scene::Bench::new();
    let place = if bench.on_tmpfs { "a tmpfs" } else { "the disk" };
    let machine = format!(
        "{} The store and the static cache are on {place}. ↑: more is better, ↓: less is better; ratios are of medians, \
         peerix to what it is compared with.",
        options.machine()
    );
    println!("{machine}\n");
    let mut report = report::Report::new(options.rounds);
    let mut files = [PathBuf::new(), PathBuf::new()];
    for number in &options.only {
        match number {
            1 => small::narinfos(&bench, &mut report, true),
            2 => small::narinfos(&bench, &mut report, false),
            3 => small::nars(&bench, &mut report),
            4 => large::one(&bench, &mut report),
            5 => large::four(&bench, &mut report),
            6 => large::tree(&bench, &mut report),
            7 => large::resume(&bench, &mut report),
            8 => large::first_byte(&bench, &mut report),
            9 => through::all(&bench, &mut report),
            10 => update::both(&bench, &mut report),
            11 => memory::connections(&bench, &mut report),
            _ => through::closures(&bench, &mut report),
        }
        // Saved after every workload, so that a later failure loses no results.
        files = [
            options.save("md", &format!("{machine}\n\n{}", report.text())),
            options.save("svg", &chart::draw(report.bars(), &machine)),
        ];
    }
    println!("\n{}", files.map(|file| file.display().to_string()).join("\n"));
}
