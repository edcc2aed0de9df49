//! The counters of a node survive a restart. A problem with their file is reported and affects
//! nothing else.

use crate::common::daemon::status;
use crate::common::{Daemon, Host, Lan, http, nix, wait_for};
use serde_json::Value;
use std::fs;

const STATE: &str = "/var/lib/peerix";

/// A host without peers, on which every lookup is a miss.
fn host(lan: &Lan) -> Host {
    let host = lan.host("node");
    nix::configure_client(&host, "", &[]);
    host
}

fn start(host: &Host) -> Daemon {
    Daemon::start(host, &["--state-dir", STATE])
}

fn miss(host: &Host, times: u64) {
    for number in 0..times {
        let answer = http::get_local(host, &format!("/{number:032}.narinfo")).unwrap();
        assert_eq!(answer.status, 404);
    }
}

/// Misses since the start, and since installation if the counters are kept.
fn misses(host: &Host) -> (u64, Option<u64>) {
    let totals = status(host)["totals"].take();
    (totals["start"]["misses"].as_u64().unwrap(), totals["installation"]["misses"].as_u64())
}

/// The problem that the node reports about its counters.
fn problem(host: &Host) -> Option<String> {
    let problems = status(host)["health"]["problems"].take();
    let counters =
        problems.as_array().unwrap().iter().find(|problem| problem["code"] == "counters")?;
    assert_eq!(counters["serious"], false);
    Some(counters["text"].as_str().unwrap().to_owned())
}

/// The misses in the file. Waits until the file exists.
fn kept(host: &Host) -> u64 {
    let text = wait_for("the counters are written", || {
        fs::read(host.path(&format!("{STATE}/counters"))).ok()
    });
    serde_json::from_slice::<Value>(&text).unwrap()["totals"]["misses"].as_u64().unwrap()
}

#[test]
fn counters_survive_stops_and_kills() {
    let lan = Lan::new();
    let host = host(&lan);
    let mut daemon = start(&host);
    assert_eq!((kept(&host), misses(&host)), (0, (0, Some(0))));
    miss(&host, 7);
    assert!(daemon.stop().success());
    assert_eq!(kept(&host), 7);
    let since = |host: &Host| status(host)["totals"]["installation"]["since"].as_f64().unwrap();

    let mut daemon = start(&host);
    assert_eq!(misses(&host), (0, Some(7)));
    let first = since(&host);
    miss(&host, 5);
    let hours = status(&host)["history"]["hours"].take();
    assert_eq!(
        hours.as_array().unwrap().iter().map(|hour| hour["misses"].as_u64().unwrap()).sum::<u64>(),
        12
    );
    // The file is written every 60 s, so the last misses are lost.
    daemon.kill();
    let mut daemon = start(&host);
    assert_eq!((misses(&host), problem(&host)), ((0, Some(7)), None));
    assert_eq!(since(&host), first);

    // Kills at random moments leave the file intact, and the next write replaces a temporary file.
    for _ in 0..20 {
        daemon.kill();
        daemon = start(&host);
        assert_eq!((misses(&host).1, problem(&host)), (Some(7), None));
    }
    assert!(daemon.stop().success());
    let mut left: Vec<_> =
        fs::read_dir(host.path(STATE)).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["counters", "identity"]);
}

#[test]
fn damaged_file_is_reported_and_replaced() {
    let lan = Lan::new();
    let host = host(&lan);
    host.write(&format!("{STATE}/counters"), "{\"version\":1,\"since\":1,\"tot");
    host.write(&format!("{STATE}/identity"), "is another's");
    let mut daemon = start(&host);
    let told = problem(&host).unwrap();
    assert!(told.contains("damaged") && told.contains("counters.damaged"), "{told}");
    assert!(daemon.log().contains("warn: counters /var/lib/peerix/counters: damaged"));
    assert!(http::get_local(&host, "/").unwrap().text().contains("counters.damaged"));
    assert_eq!(http::get_local(&host, "/health").unwrap().status, 200);
    miss(&host, 3);
    assert!(daemon.stop().success());
    assert_eq!(kept(&host), 3);
    let read = |name: &str| fs::read_to_string(host.path(&format!("{STATE}/{name}"))).unwrap();
    assert_eq!((read("counters.damaged").len(), read("identity").as_str()), (27, "is another's"));
    let _daemon = start(&host);
    assert_eq!((misses(&host), problem(&host)), ((0, Some(3)), None));
}

#[test]
fn node_that_cannot_save_counters_still_serves() {
    let lan = Lan::new();
    let host = host(&lan);
    // Without a state directory.
    let mut daemon = Daemon::start(&host, &[]);
    miss(&host, 2);
    assert_eq!((misses(&host), problem(&host)), ((2, None), None));
    assert!(http::get_local(&host, "/").unwrap().text().contains("Since the start"));
    assert!(daemon.stop().success());

    // On a full disk, with an older file.
    host.sh(&format!("mkdir -p {STATE}; mount -t tmpfs -o size=16k none {STATE}"));
    let mut daemon = start(&host);
    miss(&host, 4);
    assert!(daemon.stop().success());
    let fill = format!("cat /dev/zero > {STATE}/large 2>/dev/null || true");
    host.sh(&fill);
    let mut daemon = start(&host);
    miss(&host, 2);
    let told = wait_for("a full disk is told", || problem(&host));
    assert!(told.contains("No space left on device") && told.contains(STATE), "{told}");
    assert_eq!(misses(&host), (2, Some(6)));
    assert!(daemon.stop().success());
    assert_eq!(kept(&host), 4, "the old file is as it was");
    host.sh(&format!("umount {STATE}"));

    // In a directory that belongs to another user.
    host.sh(&format!("chmod 755 {STATE}; chown 0:0 {STATE}; ls -ld {STATE}"));
    let mut daemon = Daemon::start_as(&host, 1000, &["--state-dir", STATE]);
    miss(&host, 2);
    let told = wait_for("it is told that nothing is kept", || problem(&host));
    assert!(told.contains("Permission denied"), "{told}");
    assert_eq!(misses(&host), (2, Some(2)));
    assert_eq!(daemon.log().matches("warn: counters").count(), 1);
    assert!(daemon.stop().success());
}

/// A tracker that does not answer at shutdown must not use up the time to write the counters.
#[test]
fn silent_tracker_does_not_prevent_saving_at_stop() {
    let lan = Lan::new();
    let host = host(&lan);
    // The kernel completes connections, but nothing accepts them.
    let _silent = host.listen(8300);
    let flags = ["--state-dir", STATE, "--mode", "both", "--tracker-url", "http://127.0.0.1:8300"];
    let mut daemon = Daemon::start(&host, &flags);
    assert_eq!(kept(&host), 0);
    miss(&host, 4);
    assert!(daemon.stop().success());
    assert_eq!(kept(&host), 4);
}

/// The metrics count all peers, and the page lists only the first 256.
#[test]
fn peers_beyond_the_listed_ones_are_counted() {
    let lan = Lan::new();
    let host = host(&lan);
    let names: Vec<String> =
        (0..300).map(|number| format!("10.99.{}.{}", number / 100, number % 100 + 1)).collect();
    let flags: Vec<&str> = names.iter().flat_map(|name| ["--peer", name]).collect();
    let _daemon = Daemon::start(&host, &flags);
    let metrics = wait_for("they are resolved", || {
        let metrics = http::get_local(&host, "/metrics").unwrap().text();
        (!metrics.contains("peerix_peers{network=\"lan\"} 0\n")).then_some(metrics)
    });
    assert!(metrics.contains("peerix_peers{network=\"lan\"} 300\n"), "{metrics}");
    let status = status(&host);
    assert_eq!(
        (status["peers"].as_array().unwrap().len(), &status["peers_omitted"]),
        (256, &Value::from(44))
    );
    // No peer has sent anything.
    for state in ["live", "silent"] {
        let series = format!("peerix_lan_peers{{state=\"{state}\"}} 0\n");
        assert!(metrics.contains(&series), "{series}{metrics}");
    }
    let is_unheard = |peer: &Value| peer["state"] == "unheard" && peer["found_by"] == "flag";
    assert!(status["peers"].as_array().unwrap().iter().all(is_unheard), "{}", status["peers"][0]);
    let marked = "<span class=\"bad\">never heard</span>";
    assert!(http::get_local(&host, "/").unwrap().text().contains(marked));
}
