//! Checks that the trackers answer, and that other machines reach this one.

use super::firewall::open_port;
use crate::commands::report::Findings;
use crate::commands::shell::quote;
use crate::commands::{get, get_within, long, text};
use crate::config::Config;
use serde_json::Value;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::time::{Duration, SystemTime};

/// Clock difference to a tracker that is reported as a fault, in seconds. A wrong clock affects the
/// validity of certificates and the expiry of Nix's binary-cache cache.
const MAX_CLOCK_DIFFERENCE_SECONDS: u64 = 120;

/// Timeout of a request to a tracker's `/reach`. The tracker tries for up to 2 s to connect to this
/// machine before it answers.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// Checks all trackers. Blocks for at most 7 s for each, and while the announced host is resolved.
pub(super) fn check(report: &mut Findings, config: &Config) {
    if config.state_dir.is_none() {
        report.note(
            "tracker",
            "no --state-dir: this is another peer to the trackers after each start".into(),
        );
    }
    let (host, port) = config.announced_address(config.port);
    for url in &config.tracker_urls {
        let began = SystemTime::now();
        let answer = match get(&format!("{url}/health")) {
            // A Python tracker has no `/health` and answers 404.
            Ok(answer) if answer.status < 500 => answer,
            other => {
                let why = other.map_or_else(|e| e, |answer| format!("status {}", answer.status));
                let curl = format!("curl {}", quote(&format!("{url}/health")));
                let remedy =
                    format!("on that machine: systemctl status peerix-tracker\nfrom here: {curl}");
                report.fail("tracker", format!("{url} does not answer: {why}"), remedy);
                continue;
            }
        };
        report.ok("tracker", format!("{url} answers"));
        if let Some(date) = answer.date {
            check_clock(report, url, began, date);
        }
        check_reachability(report, url, host.as_deref(), port);
    }
}

/// Compares this machine's clock, which read `here` before the request, with a tracker's.
fn check_clock(report: &mut Findings, tracker: &str, here: SystemTime, there: SystemTime) {
    let seconds =
        |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (here, there) = (seconds(here), seconds(there));
    let off = here.abs_diff(there);
    if off < MAX_CLOCK_DIFFERENCE_SECONDS {
        return report.ok("clock", "it agrees with the tracker's".into());
    }
    let way = if here < there { "behind" } else { "ahead of" };
    let text = format!("this machine's is {} {way} that of {tracker}", long(off as f64));
    let remedy = "timedatectl set-ntp true, on whichever of the two is wrong";
    report.fail("clock", text, remedy.into());
}

/// Checks by a tracker's `/reach` whether other machines can connect to the announced address.
fn check_reachability(report: &mut Findings, tracker: &str, host: Option<&str>, port: u16) {
    let outcome = get_within(&format!("{tracker}/reach/{port}"), REACH_TIMEOUT)
        .ok()
        .filter(|answer| answer.status == 200);
    let outcome: Option<Value> =
        outcome.and_then(|answer| serde_json::from_slice(&answer.body).ok());
    let Some(outcome) = outcome else {
        return report
            .note("address", format!("{tracker} does not tell whether it reaches this machine"));
    };
    let seen: Option<IpAddr> = text(&outcome["addr"]).parse().ok();
    if let Some((host, seen)) = host.zip(seen) {
        let addresses = (host, port).to_socket_addrs();
        let addresses: Vec<SocketAddr> = addresses.map(Iterator::collect).unwrap_or_default();
        if !addresses.iter().any(|address| address.ip().to_canonical() == seen) {
            return check_announced(report, host, seen, addresses.first());
        }
    }
    let at = format!("{}:{port}", text(&outcome["addr"]));
    if outcome["reached"] == true {
        return report.ok("address", format!("{at} is reached from {tracker}"));
    }
    let remedy = format!(
        "on the router: forward TCP (and UDP) port {port} to this machine\nhere: {}\nif the router has another port for it: --announce-addr HOST:PORT",
        open_port("tcp", port)
    );
    report.fail("address", format!("{at} is not reached from {tracker}"), remedy);
}

/// Checks an announced host that does not resolve to `seen`, the address that the tracker sees.
/// Sends a request to its `first` address, because it may be a second address of this machine.
fn check_announced(report: &mut Findings, host: &str, seen: IpAddr, first: Option<&SocketAddr>) {
    let reached =
        first.map_or(Err("no such name".into()), |at| get(&format!("http://{at}/nix-cache-info")));
    match reached {
        Ok(_) => report.note(
            "address",
            format!("{host} is announced, and the tracker sees {seen}; from here it is reached"),
        ),
        Err(e) => report.fail(
            "address",
            format!("{host} is announced, and not reached: {e}; the tracker sees {seen}"),
            format!("peerix --announce-addr {seen}, or the name that this machine has outside"),
        ),
    }
}
