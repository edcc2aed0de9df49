//! Shared parts of the demonstrations: they print progress, build paths with Nix, watch the bytes
//! sent by each machine, and print a table of the results.

use crate::common::{Host, PORT, http, nix, world};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{Write, stdout};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

/// Bytes per MiB.
pub const MIB: u64 = 1 << 20;

/// Prints numbered steps, and lines with the elapsed time.
pub struct Steps {
    began: Instant,
    done: usize,
    all: usize,
}

impl Steps {
    /// Prepares `all` steps, none of which has begun.
    pub fn new(all: usize) -> Steps {
        Steps { began: Instant::now(), done: 0, all }
    }

    /// Begins the next step and prints its title.
    pub fn next(&mut self, what: &str) {
        self.done += 1;
        println!("\n{}/{} {what}", self.done, self.all);
        let _ = stdout().flush();
    }

    /// Prints a line within the current step.
    pub fn say(&self, what: impl Display) {
        println!("    {:5.1} s  {what}", self.began.elapsed().as_secs_f64());
        let _ = stdout().flush();
    }
}

/// Configures Nix with a new signing key; returns the public key.
pub fn make_ready(host: &Host) -> String {
    nix::configure(host, "secret-key-files = /etc/peerix.sec\n");
    host.sh(&format!(
        "nix-store --generate-binary-cache-key {}-1 /etc/peerix.sec /etc/peerix.pub",
        host.name
    ));
    host.write("/tmp/demo.nix", include_str!("../demo.nix"));
    std::fs::read_to_string(host.path("/etc/peerix.pub")).expect("Nix wrote it").trim().to_owned()
}

/// Builds the attribute `name` of `demo.nix`, and returns its path.
pub fn build(host: &Host, name: &str) -> String {
    let script = format!(
        "nix-store --realise $(nix-instantiate /tmp/demo.nix -A {name}) 2>/tmp/said || {{ cat /tmp/said >&2; exit 1; }}"
    );
    host.sh(&script).trim().to_owned()
}

/// Median time in milliseconds of 25 misses at the host's own peerix.
pub fn median_miss(host: &Host) -> f64 {
    let mut connection =
        http::Connection::new(host.connect_local().expect("peerix answers")).expect("a connection");
    let mut times: Vec<Duration> = (0..25)
        .map(|i| {
            let began = Instant::now();
            let answer = connection.get(&format!("/{i:0>32}.narinfo")).expect("peerix answers");
            assert_eq!(answer.status, 404);
            began.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1000.0
}

/// A machine that paths come from.
#[derive(Clone, Copy)]
pub struct Maker<'a> {
    /// The machine.
    pub host: &'a Host,
    /// The address at which others reach it.
    pub address: Ipv4Addr,
}

/// Prints how many MiB each machine has sent since `before`, twice a second. Blocks until Nix ends
/// (returns `None`) or a machine has sent `until` MiB (returns its index). `of` describes the MiB
/// in the output.
pub fn watch(
    child: &mut Child,
    steps: &Steps,
    makers: &[Maker<'_>; 2],
    before: [u64; 2],
    until: u64,
    of: &str,
) -> Option<usize> {
    let mut told = Instant::now();
    loop {
        if child.try_wait().expect("it is ours").is_some() {
            return None;
        }
        let sent: Vec<u64> = makers
            .iter()
            .zip(before)
            .map(|(maker, before)| (maker.host.sent() - before) / MIB)
            .collect();
        let reached = sent.iter().position(|mib| *mib >= until);
        if reached.is_some() || told.elapsed() >= Duration::from_millis(500) {
            told = Instant::now();
            let from: Vec<String> = makers
                .iter()
                .zip(&sent)
                .map(|(maker, mib)| format!("{mib} from {}", maker.host.name))
                .collect();
            steps.say(format_args!("{} {of}: {}", sent.iter().sum::<u64>(), from.join(", ")));
        }
        if reached.is_some() {
            return reached;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Prints a table of the NARs by origin, from the asker's log. Panics if a path of `belongs` did
/// not come from its host.
pub fn table(log: &str, makers: &[Maker<'_>; 2], paths: &[String], belongs: &[(&String, &Host)]) {
    // Format of a line: `debug: <hash part>: NAR of <size> bytes from peer <address> and <address>`
    let mut nars: BTreeMap<&str, (u64, String)> = BTreeMap::new();
    for line in log.lines() {
        if let Some((hash_part, rest)) =
            line.strip_prefix("debug: ").and_then(|line| line.split_once(": NAR of "))
            && let Some((size, peers)) = rest.split_once(" bytes from peer ")
        {
            let names = makers.iter().fold(peers.to_owned(), |peers, maker| {
                peers.replace(&format!("{}:{PORT}", maker.address), &maker.host.name)
            });
            nars.insert(hash_part, (size.parse().expect("a number"), names));
        }
    }
    let mut rows: BTreeMap<&str, (usize, u64, &str)> = BTreeMap::new();
    for path in paths {
        let (size, from) =
            nars.get(world::hash_part(path)).unwrap_or_else(|| panic!("{path} came from nowhere"));
        let row = rows.entry(from).or_insert((0, 0, world::base_name(path)));
        (row.0, row.1) = (row.0 + 1, row.1 + size);
    }
    println!("    {:<10}{:>6}{:>14}   for example", "from", "paths", "bytes");
    for (from, (count, bytes, example)) in &rows {
        println!("    {from:<10}{count:>6}{bytes:>14}   {example}");
    }
    let sent: Vec<String> = makers
        .iter()
        .map(|maker| format!("{} by {}", maker.host.sent() / MIB, maker.host.name))
        .collect();
    println!("    MiB sent, as the network cards counted: {}", sent.join(", "));
    for (path, host) in belongs {
        assert_eq!(nars[world::hash_part(path)].1, host.name, "{path} came from elsewhere");
    }
    assert!(!Path::new(&paths[0]).exists(), "this machine's own store was touched");
}
