//! Changes on a LAN while Nix fetches: neighbours vanish, holders pause and restart, cables are
//! unplugged. Nix must find every path that a live holder has, and receive it intact.

use crate::common::fault::Forger;
use crate::common::http::Connection;
use crate::common::standin::StandIn;
use crate::common::{
    Asker, Bystander, Daemon, Holder, Host, Lan, PORT, Scale, World, daemon, nix, stock, thread,
    world,
};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// Runs a scene whose event takes `time`, with normal timeouts. A failure counts only if the
/// machine kept pace: no thread waited for a processor for longer than [`MAX_WAIT`], and the event
/// took at most 10 % longer. Otherwise the scene runs again with doubled timeouts, up to 16 times
/// the normal ones.
fn play(time: Duration, scene: impl Fn(&Lan, &World) -> (Holder, Asker, Attempt)) {
    for patience in [1.0, 2.0, 4.0, 8.0, 16.0] {
        let lan = Lan::new().with_scale(Scale::timeouts(patience));
        let world = World::on(&lan);
        // Kept alive, so that a failing assertion prints their logs.
        let (_holder, _asker, attempt) = scene(&lan, &world);
        let Some(complaint) = attempt.complaint else { return };
        let (took, waited) = (attempt.took, attempt.waited);
        let kept_pace =
            waited < MAX_WAIT.mul_f64(patience) && took < (time + time / 10).mul_f64(patience);
        let complaint =
            format!("waited {waited:?} for a processor, event took {took:?}: {complaint}");
        assert!(!kept_pace && patience < 16.0, "{complaint}");
        eprintln!("again with more patience: {complaint}");
    }
}

/// Longest total time for which a thread waits for a processor on a machine that keeps pace.
const MAX_WAIT: Duration = Duration::from_millis(100);

/// Result of one fetch of `closure1000` during an event.
struct Attempt {
    /// Errors and warnings of Nix.
    complaint: Option<String>,
    /// Duration of the event.
    took: Duration,
    /// Longest time for which a thread of the asker's daemon waited for a processor.
    waited: Duration,
}

impl Attempt {
    /// Realises `closure1000`, runs `event` meanwhile, and compares the result byte for byte.
    fn new(asker: &Asker, world: &World, event: impl FnOnce()) -> Attempt {
        let path = world.path("closure1000");
        let before = processor_waits(asker.daemon.pid());
        let (output, took) = asker.realise_during(path, || {
            let start = Instant::now();
            event();
            start.elapsed()
        });
        let complaint = nix::complaint(&output);
        if complaint.is_none() {
            assert_eq!(asker.assert_closure_complete(world, path).len(), 1000);
        }
        let since = |(thread, wait): (String, Duration)| {
            wait - before.get(&thread).copied().unwrap_or_default()
        };
        let waited = processor_waits(asker.daemon.pid()).into_iter().map(since).max();
        Attempt { complaint, took, waited: waited.unwrap_or_default() }
    }
}

/// Total time for which each thread of a process has waited for a processor. Source: the second
/// number, in nanoseconds, of `schedstat` (Documentation/scheduler/sched-stats.rst).
fn processor_waits(pid: u32) -> BTreeMap<String, Duration> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let wait = |task: std::io::Result<std::fs::DirEntry>| {
        let task = task.ok()?;
        // The thread may have ended meanwhile.
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        let nanos = text.split_whitespace().nth(1)?.parse().ok()?;
        Some((task.file_name().into_string().ok()?, Duration::from_nanos(nanos)))
    };
    tasks.filter_map(wait).collect()
}

#[test]
fn vanished_neighbour_hides_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut neighbour = Bystander::new(&lan, "neighbour");
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_live(&asker.host, 2);
    asker.fetch_closure_during(&world, || neighbour.vanish());
    // Meanwhile its entry in the kernel's neighbour table fails, is tried again and disappears.
    asker.look_up_closure_during(&world, || std::thread::sleep(60 * SECOND));
}

#[test]
fn ten_vanished_neighbours_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut neighbours = Bystander::crowd(&lan, 10);
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_live(&asker.host, 11);
    asker.fetch_closure_during(&world, || neighbours.iter_mut().for_each(Bystander::vanish));
    asker.look_up_closure_during(&world, || std::thread::sleep(60 * SECOND));
}

#[test]
fn neighbours_that_vanish_one_by_one_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut neighbours = Bystander::crowd(&lan, 20);
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_live(&asker.host, 21);
    asker.look_up_closure_during(&world, || {
        for neighbour in &mut neighbours {
            neighbour.vanish();
            std::thread::sleep(4 * SECOND);
        }
    });
}

#[test]
fn named_peer_that_is_off_hides_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let nobody = lan.address(200).to_string();
    let asker = Asker::flagged(&lan, "", &[&world.cache_key], |_| vec!["--peer".into(), nobody]);
    asker.meet(&[&holder]);
    asker.fetch_closure_during(&world, || ());
    asker.look_up_closure_during(&world, || std::thread::sleep(10 * SECOND));
}

#[test]
fn paused_holder_is_waited_for() {
    for millis in [300, 1000, 2500] {
        let time = Duration::from_millis(millis);
        play(time, |lan, world| {
            let mut holder = Holder::new(lan, world, "holder");
            let asker = Asker::new(lan, world, &[&holder]);
            let attempt = Attempt::new(&asker, world, || {
                holder.daemon.signal(Signal::STOP);
                std::thread::sleep(time);
                holder.daemon.signal(Signal::CONT);
            });
            (holder, asker, attempt)
        });
    }
}

#[test]
fn stopped_holder_is_replaced_by_the_next_substituter() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let mut holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    let path = world.path("closure1000");
    let (output, ()) = asker.realise_during(path, || holder.daemon.signal(Signal::STOP));
    // The holder is still stopped, so the rest came from the next substituter.
    nix::assert_succeeded(&output);
    assert_eq!(asker.assert_closure_complete(&world, path).len(), 1000);
    holder.daemon.signal(Signal::CONT);
    // The asker finds the holder again.
    daemon::wait_until_known(&asker.host, &holder.mark);
}

#[test]
fn restarted_holder_is_waited_for() {
    for end in [Signal::TERM, Signal::KILL] {
        play(SECOND, |lan, world| {
            let mut holder = Holder::new(lan, world, "holder");
            let asker = Asker::new(lan, world, &[&holder]);
            let attempt = Attempt::new(&asker, world, || {
                if end == Signal::TERM {
                    holder.daemon.stop();
                } else {
                    holder.daemon.kill();
                }
                holder.daemon = Daemon::start(&holder.host, &[]);
            });
            (holder, asker, attempt)
        });
    }
}

#[test]
fn first_lookup_after_restart_of_both_nodes_finds() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let mut holder = Holder::new(&lan, &world, "holder");
    let mut asker = Asker::new(&lan, &world, &[&holder]);
    for round in 0..200 {
        holder.daemon.stop();
        asker.daemon.stop();
        // Alternate the order of the starts.
        if round % 2 == 0 {
            holder.daemon = Daemon::start(&holder.host, &[]);
            asker.daemon = Daemon::start(&asker.host, &["--trusted-public-key", &world.cache_key]);
        } else {
            asker.daemon = Daemon::start(&asker.host, &["--trusted-public-key", &world.cache_key]);
            holder.daemon = Daemon::start(&holder.host, &[]);
        }
        assert_eq!(daemon::narinfo_status(&asker.host, &holder.mark), 200, "round {round}");
    }
}

#[test]
fn lost_packets_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    for percent in [1, 5, 10] {
        let holder = Holder::new(&lan, &world, "holder");
        let asker = Asker::new(&lan, &world, &[&holder]);
        asker.fetch_closure_during(&world, || {
            holder.host.lose(percent);
            asker.host.lose(percent);
        });
    }
}

#[test]
fn longer_round_trip_hides_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let _far = asker.fetch_closure_during(&world, || holder.host.delay(Duration::from_millis(60)));
    asker.look_up_closure_during(&world, || ());
}

#[test]
fn full_link_of_the_holder_hides_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let others: Vec<Host> = (0..8).map(|number| lan.host(&format!("o{number}"))).collect();
    holder.host.slow_sending(100);
    let route = stock::nar_route(&asker.host, &holder.host, world.path("big"));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        asker.fetch_closure_during(&world, || {
            for other in &others {
                let (route, done, holder) = (&route, &done, &holder.host);
                thread::spawn_in(scope, "transfer", move || {
                    let mut connection =
                        Connection::new(other.connect((holder.address, PORT)).unwrap()).unwrap();
                    connection
                        .send(format!("GET {route} HTTP/1.1\r\nHost: holder\r\n\r\n").as_bytes())
                        .unwrap();
                    connection.drain(|| done.load(Ordering::Relaxed)).unwrap();
                });
            }
        });
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn forged_hellos_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let forger = lan.host("forger");
    let addresses: Vec<_> = (200..210).map(|number| lan.address(number)).collect();
    let forger = Forger::new(&forger, &addresses);
    forger.say_hello(asker.host.address, 0);
    addresses.iter().for_each(|address| daemon::wait_until_listed(&asker.host, *address));
    asker.look_up_closure_during(&world, || {
        for round in 1..20 {
            forger.say_hello(asker.host.address, round);
            std::thread::sleep(SECOND);
        }
    });
}

#[test]
fn replugged_cable_hides_no_path() {
    play(2 * SECOND, |lan, world| {
        let holder = Holder::new(lan, world, "holder");
        let asker = Asker::new(lan, world, &[&holder]);
        let attempt = Attempt::new(&asker, world, || {
            asker.host.unplug();
            std::thread::sleep(2 * SECOND);
            asker.host.plug();
        });
        (holder, asker, attempt)
    });
}

#[test]
fn holder_in_new_network_is_found_after_move() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let here = Holder::new(&lan, &world, "here");
    let there = Holder::new(&lan, &world, "there");
    there.host.switch("ip link add elsewhere type bridge mcast_snooping 0");
    there.host.switch("ip link set elsewhere up");
    move_to_elsewhere(&there.host, "10.78.0.1");
    let asker = Asker::new(&lan, &world, &[&here]);
    asker.fetch_closure_during(&world, || move_to_elsewhere(&asker.host, "10.78.0.2"));
}

/// Connects a host to the second switch, with another address.
fn move_to_elsewhere(host: &Host, address: &str) {
    host.switch("ip link set {port} master elsewhere");
    host.net(&format!("ip addr del {}/24 dev eth0", host.address));
    host.net(&format!("ip addr add {address}/24 brd + dev eth0"));
}

#[test]
fn original_peerix_among_new_nodes_is_found() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let old = lan.host("original");
    let _original = StandIn::original(&old, &world);
    let _first = Bystander::new(&lan, "first");
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    daemon::wait_until_known(&asker.host, world.path("little"));
    let mut more = asker.fetch_closure_during(&world, || {
        [1, 2, 3].map(|number| Bystander::new(&lan, &format!("n{number}")))
    });
    asker.look_up_closure_during(&world, || more.iter_mut().for_each(Bystander::vanish));
}

#[test]
fn newly_registered_path_is_found_at_once() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    for number in 0..50 {
        let path = stock::add(&holder.host, &format!("new-{number}"), "echo $n > $n");
        assert_eq!(daemon::narinfo_status(&asker.host, &path), 200, "{path}");
    }
    // A path is also found if an earlier lookup missed it.
    for number in 0..50 {
        let path = stock::add(&asker.host, &format!("late-{number}"), "echo $n > $n");
        assert_eq!(
            daemon::narinfo_status(&asker.host, &path),
            404,
            "the own store is not consulted"
        );
        assert_eq!(stock::add(&holder.host, &format!("late-{number}"), "echo $n > $n"), path);
        assert_eq!(daemon::narinfo_status(&asker.host, &path), 200, "{}", world::base_name(&path));
    }
}
