//! Demonstration on one LAN: three machines in namespaces, each with its own Nix store. Real Nix on
//! the third fetches paths from the other two, and continues when one of them is killed. Run it
//! with `make demo`.
//!
//! Panics if a result differs from what it prints.

#[path = "../tests/common/mod.rs"]
mod common;
mod show;

use common::lan::Run;
use common::{Daemon, Host, Lan, PORT, daemon, nix};
use show::{Maker, Steps, build, make_ready, median_miss, table, watch};
use std::time::Instant;

const IMAGE_MIB: u64 = 256;

fn main() {
    let mut steps = Steps::new(7);

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
    let (a_mark, b_mark) = (daemon::add_unique_path(&a), daemon::add_unique_path(&b));
    nix::configure_client(&c, "", &[&a_key, &b_key]);
    let began = Instant::now();
    let mut senders = [start(&a), start(&b)];
    let asker = Daemon::start(&c, &[]);
    daemon::wait_until_known(&c, &a_mark);
    daemon::wait_until_known(&c, &b_mark);
    steps.say(format_args!(
        "started, and c found a and b: {} ms in all",
        began.elapsed().as_millis()
    ));
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

    steps.next(
        "c: nix-store --realise image, over 1 Gbit/s; the machine that sends it dies half-way",
    );
    c.slow(1000);
    let makers = [&a, &b].map(|host| Maker { host, address: host.address });
    let before = makers.map(|maker| maker.host.sent());
    let of = format!("of {IMAGE_MIB} MiB");
    let mut child = nix::realising(&c, &[&image]).spawn().expect("nsenter starts");
    let victim =
        watch(&mut child, &steps, &makers, before, IMAGE_MIB / 2, &of).expect("half of the image");
    senders[victim].kill();
    steps.say(format_args!("kill -9 peerix on {}", makers[victim].host.name));
    assert_eq!(watch(&mut child, &steps, &makers, before, u64::MAX, &of), None);
    nix::assert_quiet(&child.wait_with_output().expect("it is ours"));
    let log = asker.log();
    let other = makers[1 - victim].host;
    let continued = log.lines().find(|line| line.contains("continued from peer"));
    assert!(
        continued.is_some_and(|line| line.contains(&other.address.to_string())),
        "{continued:?}"
    );
    steps.say(format_args!("{} went on at the same byte; Nix noticed nothing", other.name));
    paths.push(image.clone());

    steps.next("c: nix-store --verify-path of everything, and what came from where");
    c.cmd("nix-store").arg("--verify-path").args(&paths).okay();
    steps.say(format_args!("{} paths, every hash right", paths.len()));
    println!();
    table(&log, &makers, &paths, &[(&editor, &a), (&shell, &b)]);

    steps.next("everything was as it should be");
    println!("{}", for_real());
}

fn start(host: &Host) -> Daemon {
    Daemon::start(host, &["--private-key", "/etc/peerix.sec"])
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
