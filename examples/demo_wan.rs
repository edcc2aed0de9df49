//! Demonstration between networks: machines in namespaces on three networks joined by a router, one
//! of them behind a home router. They find each other through a tracker. Run it with
//! `make demo-wan`.
//!
//! Panics if a result differs from what it prints.

#[path = "../tests/common/mod.rs"]
mod common;
mod show;

use common::daemon::{self, narinfo_status};
use common::lan::Run;
use common::{Daemon, Host, Nat, PORT, Tracker, Wan, nix, stock, tracker, wait_slowly_for};
use show::{MIB, Maker, Steps, build, make_ready, median_miss, table, watch};
use std::time::Instant;

const BOOK_MIB: u64 = 256;

/// The sender of the large path is killed after it has sent this many MiB.
const KILL_AFTER_MIB: u64 = 4;

fn main() {
    let mut steps = Steps::new(9);

    steps.next("three networks, and a router between them that passes on no broadcast");
    let wan = Wan::new();
    let (one, two, three) = (wan.lan([203, 0, 113]), wan.lan([198, 51, 100]), wan.lan([10, 1, 0]));
    let home = Nat::new(&two, [192, 168, 1]);
    let (t, a, b, c) = (one.host("t"), one.host("a"), home.lan.host("b"), three.host("c"));
    steps.say(format_args!(
        "t, the tracker, is {}; a is {}; c is {}",
        t.address, a.address, c.address
    ));
    steps.say(format_args!(
        "b is {} behind a router that is {} to the others",
        b.address,
        home.address()
    ));
    for protocol in ["tcp", "udp"] {
        home.forward(protocol, PORT, &b, PORT);
    }
    steps.say(format_args!("which forwards port {PORT}, and nothing else, to b"));

    steps.next("Nix builds `editor` on a, `shell` on b, and `book`, 256 MiB, on both");
    let (a_key, b_key) = (make_ready(&a), make_ready(&b));
    let editor = build(&a, "editor");
    let shell = build(&b, "shell");
    let book = build(&a, "book");
    assert_eq!(book, build(&b, "book"), "`book` is the same wherever it is built");
    let password = stock::add(&a, "wifi-password-home", "echo 123456 > $n");
    let wanted = nix::closure(&a, &[&editor]).len() + nix::closure(&b, &[&shell]).len();
    steps.say(format_args!(
        "{wanted} paths with references, and the large one; a also has a path that is called"
    ));
    steps.say(&password);

    steps
        .next("the tracker starts, and peerix on all three, who know its address and nothing else");
    let tracker = Tracker::start(t);
    let (a_mark, b_mark) = (daemon::add_unique_path(&a), daemon::add_unique_path(&b));
    nix::configure_client(&c, "", &[&a_key, &b_key]);
    let began = Instant::now();
    let mut senders = [
        start(&a, &tracker, &[]),
        start(&b, &tracker, &["--announce-addr", &home.address().to_string()]),
    ];
    let asker = start(&c, &tracker, &[]);
    daemon::wait_until_known(&c, &a_mark);
    daemon::wait_until_known(&c, &b_mark);
    steps.say(format_args!(
        "started, and c found a and b: {} ms in all",
        began.elapsed().as_millis()
    ));
    for (peer, address) in tracker.peers() {
        steps.say(format_args!("the tracker has {peer} at {address}"));
    }
    steps.say(format_args!(
        "a path that nobody has: c's Nix is told so after {:.2} ms (median)",
        median_miss(&c)
    ));

    steps.next("c: nix-store --realise editor shell, with require-sigs and the keys of a and b");
    let began = Instant::now();
    nix::realise_quietly(&c, &[&editor, &shell]);
    let mut paths = nix::closure(&c, &[&editor, &shell]);
    assert_eq!(paths.len(), wanted);
    steps.say(format_args!("{wanted} paths in {:.1} s", began.elapsed().as_secs_f64()));

    steps.next("what a does not share with other networks, whoever asks");
    assert_eq!(narinfo_status(&c, &password), 404);
    let status = stock::narinfo(&c, &a, &password).status;
    assert!([403, 404].contains(&status), "{status}");
    steps.say(format_args!(
        "c's Nix is told that {} is not there; asked directly, a says {status}",
        &password[44..]
    ));

    steps.next(
        "c: nix-store --realise book, over 100 Mbit/s; the machine that sends it dies on the way",
    );
    c.slow(100);
    let makers =
        [Maker { host: &a, address: a.address }, Maker { host: &b, address: home.address() }];
    let before = makers.map(|maker| maker.host.sent());
    let of = format!("MiB sent for a NAR of {BOOK_MIB} MiB");
    let began = Instant::now();
    let mut child = nix::realising(&c, &[&book]).spawn().expect("nsenter starts");
    let victim = watch(&mut child, &steps, &makers, before, KILL_AFTER_MIB, &of)
        .expect("a part of the book");
    senders[victim].kill();
    steps.say(format_args!("kill -9 peerix on {}", makers[victim].host.name));
    assert_eq!(watch(&mut child, &steps, &makers, before, u64::MAX, &of), None);
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    let took = began.elapsed().as_secs_f64();
    let log = asker.log();
    let other = makers[1 - victim];
    let continued = log.lines().find(|line| line.contains("continued from peer"));
    assert!(
        continued.is_some_and(|line| line.contains(&other.address.to_string())),
        "{continued:?}"
    );
    steps.say(format_args!("{} went on at the same byte; Nix noticed nothing", other.host.name));
    let sent: u64 =
        makers.iter().zip(before).map(|(maker, before)| maker.host.sent() - before).sum();
    assert!(sent < BOOK_MIB * MIB / 2, "{sent} bytes were sent");
    steps.say(format_args!(
        "{BOOK_MIB} MiB in {took:.1} s, sent as {} by zstd; as it is, the link would have taken {:.0} s",
        sent / MIB,
        (BOOK_MIB * MIB * 8) as f64 / 100e6
    ));
    paths.push(book.clone());

    steps.next("c: nix-store --verify-path of everything, and what came from where");
    c.cmd("nix-store").arg("--verify-path").args(&paths).okay();
    steps.say(format_args!("{} paths, every hash right", paths.len()));
    println!();
    table(&log, &makers, &paths, &[(&editor, &a), (&shell, &b)]);

    steps.next("what the tracker thinks of them, from what both sides of each transfer reported");
    let survivor = &makers[1 - victim].host.name;
    wait_slowly_for("both sides have reported", || {
        (tracker.reputation(survivor, "successful_transfers") > 0).then_some(())
    });
    println!(
        "    {:<10}{:>16}{:>16}{:>8}{:>8}{:>8}",
        "", "bytes shared", "received", "well", "badly", "score"
    );
    for name in ["a", "b", "c"] {
        let number = |field| tracker.reputation(name, field);
        println!(
            "    {name:<10}{:>16}{:>16}{:>8}{:>8}{:>8.2}",
            number("total_shared"),
            number("total_received"),
            number("successful_transfers"),
            number("failed_transfers"),
            tracker.get(&format!("/reputation/{name}"))["score"].as_f64().expect("a number"),
        );
    }

    steps.next("everything was as it should be");
    println!("{}", for_real());
}

/// Starts peerix with `--no-verify`, because there is no upstream cache here. It shares every path
/// that its filter permits.
fn start(host: &Host, tracker: &Tracker, more: &[&str]) -> Daemon {
    let mut flags = tracker::flags(host, "wan", &[&tracker.host]);
    flags.push("--no-verify".to_owned());
    if host.path("/etc/peerix.sec").exists() {
        flags.extend(["--private-key", "/etc/peerix.sec"].map(str::to_owned));
    }
    flags.extend(more.iter().map(|flag| (*flag).to_owned()));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    Daemon::start(host, &flags)
}

fn for_real() -> String {
    format!(
        "
    On one machine that all can reach:

      target/release/peerix-tracker

    and on every machine with Nix:

      target/release/peerix --mode both --tracker-url http://TRACKER:{} --state-dir /var/lib/peerix

    and in /etc/nix/nix.conf:

      extra-substituters = http://127.0.0.1:{PORT}

    TCP port {} must be open on the tracker, TCP (and better UDP too) port {PORT} on the others; behind a router
    it has to be forwarded, with --announce-addr ADDRESS. README.md tells the rest.",
        tracker::PORT,
        tracker::PORT
    )
}
