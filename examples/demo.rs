//! peerix at work: three machines in namespaces of this one, each with a Nix store of its own. Real Nix on the third
//! gets its paths from the other two, and goes on when one of them dies. Run it by `make demo`.
//!
//! Ends with an error if anything is not as it says.

#[path = "../tests/common/mod.rs"]
mod common;

use common::lan::Run;
use common::{Daemon, Host, Lan, PORT, daemon, http, nix, world};
use std::collections::BTreeMap;
use std::fmt::Display;
use std::io::{Write, stdout};
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

const STEPS: usize = 7;
const MIB: u64 = 1 << 20;
const IMAGE_MIB: u64 = 256;

fn main() {
    let mut steps = Steps { began: Instant::now(), done: 0 };

    steps.next("three machines, a, b and c, on one network, each with an empty Nix store");
    let lan = Lan::new();
    let (a, b, c) = (lan.host("a"), lan.host("b"), lan.host("c"));
    for host in [&a, &b, &c] {
        steps.say(format_args!("{} is 10.77.0.{}", host.name, host.address.octets()[3]));
    }

    steps.next("Nix builds `editor` on a, `shell` on b, and `image`, 256 MiB, on both");
    let (a_key, b_key) = (make_ready(&a), make_ready(&b));
    let editor = build(&a, "editor");
    let shell = build(&b, "shell");
    let image = build(&a, "image");
    assert_eq!(image, build(&b, "image"), "`image` is the same wherever it is built");
    let wanted = nix::closure(&a, &[&editor]).len() + nix::closure(&b, &[&shell]).len();
    steps.say(format_args!("{wanted} paths with references, and the large one"));

    steps.next("peerix starts on all three; nobody tells them of one another");
    let (a_mark, b_mark) = (daemon::mark(&a), daemon::mark(&b));
    nix::configure_client(&c, "", &[&a_key, &b_key]);
    let began = Instant::now();
    let mut senders = [start(&a), start(&b)];
    let asker = Daemon::start(&c, &[]);
    daemon::wait_until_known(&c, &a_mark);
    daemon::wait_until_known(&c, &b_mark);
    steps.say(format_args!("started, and c found a and b: {} ms in all", began.elapsed().as_millis()));
    steps.say(format_args!("a path that nobody has: c's Nix is told so after {:.2} ms (median)", median_miss(&c)));

    steps.next("c: nix-store --realise editor shell, with require-sigs and the keys of a and b");
    let began = Instant::now();
    nix::realise_quietly(&c, &[&editor, &shell]);
    let mut paths = nix::closure(&c, &[&editor, &shell]);
    assert_eq!(paths.len(), wanted);
    steps.say(format_args!("{wanted} paths in {:.1} s", began.elapsed().as_secs_f64()));

    steps.next("c: nix-store --realise image, over 1 Gbit/s; the machine that sends it dies half-way");
    c.slow(1000);
    let hosts = [&a, &b];
    let before = hosts.map(Host::sent);
    let mut child = nix::realising(&c, &[&image]).spawn().expect("nsenter starts");
    let victim = watch(&mut child, &steps, &hosts, before, IMAGE_MIB / 2).expect("half of the image");
    senders[victim].kill();
    steps.say(format_args!("kill -9 peerix on {}", hosts[victim].name));
    assert_eq!(watch(&mut child, &steps, &hosts, before, u64::MAX), None);
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    let log = asker.log();
    let other = hosts[1 - victim];
    let continued = log.lines().find(|line| line.contains("continued from peer"));
    assert!(continued.is_some_and(|line| line.contains(&other.address.to_string())), "{continued:?}");
    steps.say(format_args!("{} went on at the same byte; Nix noticed nothing", other.name));
    paths.push(image.clone());

    steps.next("c: nix-store --verify-path of everything, and what came from where");
    c.cmd("nix-store").arg("--verify-path").args(&paths).okay();
    steps.say(format_args!("{} paths, every hash right", paths.len()));
    println!();
    table(&log, &hosts, &paths, &[(&editor, &a), (&shell, &b)]);

    steps.next("everything was as it should be");
    println!("{}", for_real());
}

/// The lines that tell how far it is.
struct Steps {
    began: Instant,
    done: usize,
}

impl Steps {
    fn next(&mut self, what: &str) {
        self.done += 1;
        println!("\n{}/{STEPS} {what}", self.done);
        let _ = stdout().flush();
    }

    fn say(&self, what: impl Display) {
        println!("    {:5.1} s  {what}", self.began.elapsed().as_secs_f64());
        let _ = stdout().flush();
    }
}

/// Nix with a key to sign with; returns the public one.
fn make_ready(host: &Host) -> String {
    nix::configure(host, "secret-key-files = /etc/peerix.sec\n");
    host.sh(&format!("nix-store --generate-binary-cache-key {}-1 /etc/peerix.sec /etc/peerix.pub", host.name));
    host.write("/tmp/demo.nix", include_str!("demo.nix"));
    std::fs::read_to_string(host.path("/etc/peerix.pub")).expect("Nix wrote it").trim().to_owned()
}

fn build(host: &Host, name: &str) -> String {
    let script = format!(
        "nix-store --realise $(nix-instantiate /tmp/demo.nix -A {name}) 2>/tmp/said || {{ cat /tmp/said >&2; exit 1; }}"
    );
    host.sh(&script).trim().to_owned()
}

fn start(host: &Host) -> Daemon {
    Daemon::start(host, &["--private-key", "/etc/peerix.sec"])
}

/// The time in milliseconds that a miss takes at c's own peerix.
fn median_miss(host: &Host) -> f64 {
    let mut connection = http::Connection::new(host.connect_local().expect("peerix answers")).expect("a connection");
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

/// Tells how much came from whom, until one of `hosts` has sent so many MiB (and is returned) or Nix is done.
fn watch(child: &mut Child, steps: &Steps, hosts: &[&Host; 2], before: [u64; 2], until: u64) -> Option<usize> {
    let mut told = Instant::now();
    loop {
        if child.try_wait().expect("it is ours").is_some() {
            return None;
        }
        let sent: Vec<u64> = hosts.iter().zip(before).map(|(host, before)| (host.sent() - before) / MIB).collect();
        let reached = sent.iter().position(|mib| *mib >= until);
        if reached.is_some() || told.elapsed() >= Duration::from_millis(500) {
            told = Instant::now();
            let from: Vec<String> =
                hosts.iter().zip(&sent).map(|(host, mib)| format!("{mib} from {}", host.name)).collect();
            steps.say(format_args!("{} of {IMAGE_MIB} MiB: {}", sent.iter().sum::<u64>(), from.join(", ")));
        }
        if reached.is_some() {
            return reached;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// What c's peerix logged of where each NAR came from, against what was where.
fn table(log: &str, hosts: &[&Host; 2], paths: &[String], belongs: &[(&String, &Host)]) {
    // `debug: <hash part>: NAR of <size> bytes from peer <address> and <address>`
    let mut nars: BTreeMap<&str, (u64, String)> = BTreeMap::new();
    for line in log.lines() {
        if let Some((hash_part, rest)) = line.strip_prefix("debug: ").and_then(|line| line.split_once(": NAR of "))
            && let Some((size, peers)) = rest.split_once(" bytes from peer ")
        {
            let names = hosts
                .iter()
                .fold(peers.to_owned(), |peers, host| peers.replace(&format!("{}:{PORT}", host.address), &host.name));
            nars.insert(hash_part, (size.parse().expect("a number"), names));
        }
    }
    let mut rows: BTreeMap<&str, (usize, u64, &str)> = BTreeMap::new();
    for path in paths {
        let (size, from) = nars.get(world::hash_part(path)).unwrap_or_else(|| panic!("{path} came from nowhere"));
        let row = rows.entry(from).or_insert((0, 0, world::base_name(path)));
        (row.0, row.1) = (row.0 + 1, row.1 + size);
    }
    println!("    {:<10}{:>6}{:>14}   for example", "from", "paths", "bytes");
    for (from, (count, bytes, example)) in &rows {
        println!("    {from:<10}{count:>6}{bytes:>14}   {example}");
    }
    let sent: Vec<String> = hosts.iter().map(|host| format!("{} by {}", host.sent() / MIB, host.name)).collect();
    println!("    MiB sent, as the network cards counted: {}", sent.join(", "));
    for (path, host) in belongs {
        assert_eq!(nars[world::hash_part(path)].1, host.name, "{path} came from elsewhere");
    }
    assert!(!Path::new(&paths[0]).exists(), "this machine's own store was touched");
}

fn for_real() -> String {
    format!(
        "
    On every machine of your network, with Nix:

      target/release/peerix                        (or make run)

    and in /etc/nix/nix.conf:

      extra-substituters = http://127.0.0.1:{PORT}

    TCP and UDP port {PORT} must be open between them. README.md tells the rest: whom it trusts, and
    how paths you built yourself are signed."
    )
}
