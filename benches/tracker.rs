//! Third part of `make bench`: the tracker alone, on loopback. Each loopback address stands for one
//! machine.
//!
//! 1. Lookups among 1,000, 10,000 and 100,000 peers with half-full filters, as real ones are: rate,
//!    latency, memory.
//! 2. Signed announces, for a minute.
//!
//! Flags: `--seconds N` (default 60), `--only 1,2`. Asserts that answers are right, and nothing
//! about time.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "shared/table.rs"]
#[allow(dead_code)]
mod table;

use common::http::Connection;
use common::solo::{LoopbackTracker, TempDir, announce, clock, filter_headers, identity, post};
use peerix::nix::nix32;
use peerix::wire::filter::{BITS_PER_PATH, BloomFilter};
use peerix::wire::tracker::{Identity, SignedText};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use table::{Series, Table};

/// Concurrent client threads.
const ASKERS: u64 = 16;
/// Duration of the measurement of lookups.
const LOOKUPS_FOR: Duration = Duration::from_secs(5);
/// Filters sent from one address. The tracker accepts a burst of 100.
const FILTERS_FROM_ONE: u64 = 90;
/// Lookups from one address. The tracker accepts a burst of 10,000.
const LOOKUPS_FROM_ONE: usize = 9_000;
/// Announces from one address. The tracker accepts a burst of 200.
const ANNOUNCES_FROM_ONE: u64 = 190;
/// Peers that announce themselves repeatedly in workload 2.
const ANNOUNCERS: u64 = 10_000;

fn main() {
    let (mut seconds, mut only) = (60u64, "1,2".to_owned());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match (argument.as_str(), arguments.next()) {
            ("--bench", _) => break,
            ("--seconds", Some(value)) => seconds = value.parse().expect("--seconds N"),
            ("--only", Some(value)) => only = value,
            _ => panic!("--seconds N, --only 1,2"),
        }
    }
    let mut table = Table::new();
    for number in only.split(',') {
        match number {
            "1" => [(1_000, 20_000), (10_000, 20_000), (100_000, 2_000)]
                .map(|(n, paths)| lookups(&mut table, n, paths))
                .len(),
            "2" => {
                announces(&mut table, seconds);
                1
            }
            _ => panic!("--only 1,2"),
        };
    }
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
    std::fs::create_dir_all(&results).expect("a directory for results");
    std::fs::write(results.join("tracker.md"), table.text()).expect("the table is written");
}

fn one(value: f64) -> Series {
    let mut series = Series::default();
    series.push(value);
    series
}

/// A random number generator (xorshift64*).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A filter of the size for `paths` paths, with half of its bits set like a full one.
    fn filter(&mut self, paths: u64) -> BloomFilter {
        let bytes = BloomFilter::size_for(paths * BITS_PER_PATH) / 64;
        BloomFilter::parse((0..bytes).flat_map(|_| self.next().to_le_bytes()).collect())
            .expect("a size that filters have")
    }

    fn hash_part(&mut self) -> String {
        let bytes: Vec<u8> = (0..3).flat_map(|_| self.next().to_le_bytes()).take(20).collect();
        nix32::encode(&bytes)
    }
}

/// Takes its timestamp from the clock: a counter would run ahead of it at this rate.
fn signed_announce(key: &Identity, peer_id: &str) -> Vec<u8> {
    let addr = "10.0.0.1";
    announce(
        peer_id,
        12304,
        addr,
        key.sign(&SignedText::Announce { peer_id, port: 12304, addr }, clock()),
    )
}

fn signed_filter(key: &Identity, peer_id: &str, bits: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bits);
    // Must be later than the announce, which may have the same millisecond.
    filter_headers(&key.sign(&SignedText::Filter { peer_id, digest: digest.as_ref() }, clock() + 1))
}

fn lookups(table: &mut Table, peers: u64, paths: u64) {
    let dir = TempDir::new();
    let tracker = LoopbackTracker::start(&dir.file("db"));
    let before = tracker.rss();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for thread in 0..ASKERS {
            let (tracker, next) = (&tracker, &next);
            scope.spawn(move || {
                let mut random = Random(thread + 1);
                let mut connection: Option<(Connection, u64)> = None;
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= peers {
                        return;
                    }
                    let (mut c, used) = connection.take().unwrap_or_else(|| (tracker.connect(), 0));
                    let (key, id) = (identity(number), format!("peer-{number}"));
                    assert_eq!(post(&mut c, "/announce", &signed_announce(&key, &id)).status, 200);
                    let filter = random.filter(paths);
                    loop {
                        let headers = signed_filter(&key, &id, filter.as_bytes());
                        let answer = c.request_with_body(
                            "PUT",
                            &format!("/filter/{id}"),
                            &headers,
                            filter.as_bytes(),
                        );
                        match answer {
                            Ok(answer) if answer.status == 200 => break,
                            // The tracker receives eight filters at once. It refuses more
                            // before it reads them, and closes the connection.
                            Ok(answer) => assert_eq!(answer.status, 503, "{}", answer.text()),
                            Err(_) => {}
                        }
                        std::thread::sleep(Duration::from_millis(5));
                        c = tracker.connect();
                    }
                    connection = (used + 1 < FILTERS_FROM_ONE).then_some((c, used + 1));
                }
            });
        }
    });
    let memory = (tracker.rss() - before) as f64 / peers as f64 / 1024.0;
    // The measurement must end within two minutes, when the first announces expire.
    let (times, named) = (Mutex::new(Series::default()), AtomicU64::new(0));
    let asked = AtomicU64::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..ASKERS {
            let (tracker, times, asked, named) = (&tracker, &times, &asked, &named);
            scope.spawn(move || {
                let mut random = Random(0xabcdef + thread);
                let (mut c, mut own) = (tracker.connect(), Vec::new());
                while began.elapsed() < LOOKUPS_FOR {
                    if own.len() % LOOKUPS_FROM_ONE == LOOKUPS_FROM_ONE - 1 {
                        c = tracker.connect();
                    }
                    let target = format!("/lookup/{}", random.hash_part());
                    let sent = Instant::now();
                    let answer = c.get(&target).expect("an answer");
                    own.push(sent.elapsed().as_secs_f64() * 1e3);
                    assert_eq!(answer.status, 200);
                    let count =
                        answer.body.windows(9).filter(|window| window == b"\"peer_id\"").count();
                    named.fetch_add(count as u64, Ordering::Relaxed);
                }
                asked.fetch_add(own.len() as u64, Ordering::Relaxed);
                let mut times = times.lock().expect("nobody panicked");
                own.into_iter().for_each(|time| times.push(time));
            });
        }
    });
    let elapsed = began.elapsed().as_secs_f64();
    let (asked, times) =
        (asked.load(Ordering::Relaxed) as f64, times.into_inner().expect("nobody panicked"));
    let what = format!("1. lookups, {peers} peers of {paths} paths");
    let is_the_goals = peers == 10_000;
    let goal = |text: &'static str| if is_the_goals { text } else { "" };
    table.alone(&format!("{what}: a second"), &one(asked / elapsed), goal("≥ 5,000"));
    table.alone(&format!("{what}: median ms"), &one(times.median()), "");
    table.alone(&format!("{what}: p99 ms"), &one(times.percentile(99)), goal("≤ 10"));
    table.alone(
        &format!("{what}: candidates named"),
        &one(named.load(Ordering::Relaxed) as f64 / asked),
        "",
    );
    table.alone(&format!("{what}: KiB of memory a peer"), &one(memory), goal("≤ 32"));
}

fn announces(table: &mut Table, seconds: u64) {
    let dir = TempDir::new();
    let tracker = LoopbackTracker::start(&dir.file("db"));
    let rates = Mutex::new(vec![0u64; seconds as usize + 1]);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..ASKERS {
            let (tracker, rates) = (&tracker, &rates);
            scope.spawn(move || {
                let mine = ANNOUNCERS / ASKERS;
                let keys: Vec<_> = (0..mine)
                    .map(|i| (identity(thread * mine + i), format!("peer-{thread}-{i}")))
                    .collect();
                let (mut c, mut used, mut counts) =
                    (tracker.connect(), 0, vec![0u64; seconds as usize + 1]);
                for (key, id) in keys.iter().cycle() {
                    let second = began.elapsed().as_secs();
                    if second >= seconds {
                        break;
                    }
                    if used == ANNOUNCES_FROM_ONE {
                        (c, used) = (tracker.connect(), 0);
                    }
                    let answer = post(&mut c, "/announce", &signed_announce(key, id));
                    assert_eq!(answer.status, 200, "{}", answer.text());
                    used += 1;
                    counts[second as usize] += 1;
                }
                let mut rates = rates.lock().expect("nobody panicked");
                rates.iter_mut().zip(counts).for_each(|(all, own)| *all += own);
            });
        }
    });
    let rates = rates.into_inner().expect("nobody panicked");
    let all: u64 = rates.iter().sum();
    let mut by_second = Series::default();
    rates[..seconds as usize].iter().for_each(|rate| by_second.push(*rate as f64));
    let what = format!("2. signed announces for {seconds} s, the signing among it");
    table.alone(&format!("{what}: a second"), &one(all as f64 / seconds as f64), "≥ 5,000");
    table.alone(&format!("{what}: in each second"), &by_second, "");
}
