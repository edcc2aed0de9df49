//! Checks the peers on the LAN: whether they hear this machine's daemon, answer it and share with
//! it.

use super::firewall::{open_port, open_port_there};
use crate::commands::probe::{self, HttpProbe, NamedAddresses};
use crate::commands::report::Findings;
use crate::commands::shell::quote;
use crate::commands::{RunningDaemon, long, moment, peer_at, peer_state};
use crate::config::DEFAULT_PORT;
use crate::network::{LanNetworks, neighbours};
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use serde_json::Value;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

/// Age limit of recent contact with a peer, in seconds. Peers send a *hello* every 30 s, so a peer
/// that was heard within this time is probably still there. The daemon probes a silent peer at
/// least every 30 s, so a peer that has been silent for longer has left a probe unanswered.
const RECENT_CONTACT_SECONDS: f64 = 40.0;

/// Time after its start in which a daemon meets the neighbours that are there. It sends a *hello*
/// after 0, 0.1, 0.3, 0.7 and 1.5 s, and each is answered within 0.2 s. Until then, an unheard peer
/// is no sign of a fault.
const MEETING_TIME: Timeout = Timeout::from_secs(3);

/// Interval between requests for the status of a daemon that has just started.
const MEETING_POLL: Duration = Duration::from_millis(100);

/// Maximum number of status requests to a daemon that has just started. After the last one,
/// `doctor` uses the last status.
const MAX_MEETING_POLLS: u32 = 30;

/// Largest number of peers at which missing UDP answers are reported as a fault. A peerix 0.1 node
/// that knows more peers sends no *have not*.
const MAX_PEERS_WITH_HAVE_NOT: usize = 32;

/// Maximum number of addresses from the kernel's neighbour table that are queried. The others are
/// ignored.
const MAX_NEIGHBOURS: usize = 256;

/// Queries the known peers, the machines in the kernel's neighbour table and everybody by
/// broadcast, and compares the answers with the daemon's status. Blocks for some seconds.
pub(super) fn check(report: &mut Findings, node: &RunningDaemon) {
    let port = node.config.port;
    let networks = node.networks();
    let named = NamedAddresses::resolve(&node.config);
    for (host, e) in &named.unresolved {
        report_unresolved(report, host, e);
    }
    let mut asked = probe::known_or_named(&node.status, &named);
    asked.extend(neighbours(&networks, port));
    let heard = match probe::ask(node, &networks, &HashPart::ZERO, port, &asked, true) {
        Ok(heard) => heard,
        Err(e) => return report.note("network", format!("cannot ask it: {e}")),
    };
    // The daemon listens only where the user chose by `--bind`.
    let hears = |ip| probe::hears(&node.config, &networks, ip);
    let answering: Vec<SocketAddr> =
        heard.iter().map(|heard| heard.from).filter(|from| hears(from.ip())).collect();
    // The daemon may have met peers since its status was read, or may be about to meet them.
    let fresh = wait_until_met(|| RunningDaemon::find(&node.config).ok(), &answering);
    let status = &fresh.as_ref().unwrap_or(node).status;
    let unmet = unmet(status, &answering);
    report_unmet(report, status, &unmet, port);
    let known = probe::known_or_named(status, &named);
    let others = answering.iter().filter(|from| !known.contains(from));
    let all: Vec<SocketAddr> = known.iter().chain(others).copied().collect();
    let expects_have_not = all.len() <= MAX_PEERS_WITH_HAVE_NOT;
    let mut well = 0;
    for (address, http) in all.iter().zip(probe::http(&all)) {
        let peer = ProbedPeer {
            address: *address,
            answers: answering.contains(address),
            http,
            heard_ago: last_heard(status, *address).map(|at| moment(status) - at),
            silence: silence(status, *address),
            named_state: named_peer(status, &named, *address),
            is_unmet: unmet.contains(address),
        };
        well += u32::from(report_peer(report, &peer, &networks, port, expects_have_not));
    }
    report_networks(report, node, &networks, all.len(), well);
    if port != DEFAULT_PORT {
        check_default_port(report, node, &networks);
    }
}

/// What this command and the daemon know of one peer.
struct ProbedPeer {
    address: SocketAddr,
    /// Whether it answers this command's queries.
    answers: bool,
    /// Its answer to this command's HTTP request.
    http: HttpProbe,
    /// Time since the daemon last heard it, in seconds. `None` if it never did.
    heard_ago: Option<f64>,
    /// How long it has been silent to the daemon, in seconds. `None` if it is not silent.
    silence: Option<f64>,
    /// Its state in the daemon's status. `None` if `--peer` does not name it.
    named_state: Option<String>,
    /// Whether it answers this command and the daemon has never heard it.
    is_unmet: bool,
}

/// Reports what is wrong with a peer. Returns true if it is heard and answers. `port` is that of
/// this machine's daemon. With `expects_have_not`, a peer that answers no query is a fault.
fn report_peer(
    report: &mut Findings,
    peer: &ProbedPeer,
    networks: &LanNetworks,
    port: u16,
    expects_have_not: bool,
) -> bool {
    let address = peer.address;
    match (&peer.http, peer.heard_ago, peer.silence) {
        (HttpProbe::Refuses, ..) => {
            let to = networks.interfaces().iter().map(|i| i.address).find(IpAddr::is_ipv4);
            let to = to.map_or("this machine".into(), |ip| ip.to_string());
            report.fail(
                "share",
                format!("{address} shares nothing with this machine: to it, this is no neighbour"),
                format!("on {}: peerix --peer {to}", address.ip()),
            );
        }
        (HttpProbe::Silent(e), ..) => report_no_http(report, peer, e),
        (_, Some(_), Some(silence)) if peer.answers => {
            report_silent(report, address, silence, port);
        }
        // A Python node answers only queries for paths that it has, so its silence is no sign of a
        // fault.
        (HttpProbe::Other, _, Some(silence)) if peer.named_state.is_some() => {
            let ago = long(silence);
            let text = format!("{address} is a Python peerix, and has been silent for {ago}");
            report.note("peer", text);
        }
        (HttpProbe::Shares(_), ..) if !peer.answers && expects_have_not => {
            let text = format!(
                "{address} answers by TCP, and UDP is blocked there, or by an access point in between"
            );
            report.fail("udp", text, open_port_there(address.ip(), "udp", address.port()));
        }
        (_, None, _) if peer.named_state.is_none() || peer.is_unmet => {}
        _ => return true,
    }
    false
}

/// Reports a peer that does not answer HTTP because of `e`.
fn report_no_http(report: &mut Findings, peer: &ProbedPeer, e: &io::Error) {
    let address = peer.address;
    let open_there = |protocol| open_port_there(address.ip(), protocol, address.port());
    let why = explain_connect_error(e);
    match (peer.heard_ago, &peer.named_state) {
        _ if peer.answers => report.fail(
            "tcp",
            format!("{address} answers by UDP, and TCP is blocked there: {e}"),
            open_there("tcp"),
        ),
        // A refused connection means that the machine runs and its peerix does not.
        (Some(ago), _)
            if ago < RECENT_CONTACT_SECONDS && e.kind() != ErrorKind::ConnectionRefused =>
        {
            let text = format!(
                "{address} was heard {ago:.0} s ago, and answers neither by UDP nor by TCP: it has just gone, or both are \
                 blocked there{why}"
            );
            report.fail("udp", text, ["udp", "tcp"].map(open_there).join("\n"));
        }
        (_, Some(state)) => report_unreachable(report, address, state, e),
        (_, None) => report.note("peer", format!("{address} does not answer: {e}{why}")),
    }
}

/// Reports on which networks the daemon is, and how many of the `known` peers are `well`.
fn report_networks(
    report: &mut Findings,
    node: &RunningDaemon,
    networks: &LanNetworks,
    known: usize,
    well: u32,
) {
    let connected = networks.lan_addresses().iter();
    let connected =
        connected.filter(|i| i.running && probe::hears(&node.config, networks, i.address));
    let connected: Vec<String> =
        connected.map(|i| format!("{}/{}", i.address, i.prefix_len)).collect();
    match connected.join(", ") {
        none if none.is_empty() => report.note("network", networks.why_none()),
        networks if known == 0 => {
            let text = format!(
                "no other peerix answers on {networks}; those beyond need --peer HOST on both sides"
            );
            report.note("network", text);
        }
        networks if well > 0 => report
            .ok("network", format!("{well} of {known} peers are heard and answer, on {networks}")),
        _ => {}
    }
}

/// Checks whether nodes on the LAN use the default port, if this machine's daemon uses another.
fn check_default_port(report: &mut Findings, node: &RunningDaemon, networks: &LanNetworks) {
    let port = node.config.port;
    let others =
        probe::ask(node, networks, &HashPart::ZERO, DEFAULT_PORT, &[], true).unwrap_or_default();
    let others: Vec<String> = others.iter().map(|other| other.from.to_string()).collect();
    if !others.is_empty() {
        let text = format!(
            "{} is on another port than this machine's {port}: they do not hear each other",
            others.join(", ")
        );
        let remedy = format!("peerix --port {DEFAULT_PORT} here, or --port {port} on all");
        report.fail("port", text, remedy);
    }
}

/// Polls the status until the daemon has heard all of `peers` or has run for [`MEETING_TIME`].
/// Makes at most [`MAX_MEETING_POLLS`] further requests. Returns the last status; `None` if the
/// first request fails.
fn wait_until_met(
    find: impl Fn() -> Option<RunningDaemon>,
    peers: &[SocketAddr],
) -> Option<RunningDaemon> {
    let mut node = find()?;
    for _ in 0..MAX_MEETING_POLLS {
        if unmet(&node.status, peers).is_empty() || !is_young(&node.status) {
            break;
        }
        thread::sleep(MEETING_POLL);
        let Some(next) = find() else { break };
        node = next;
    }
    Some(node)
}

/// Whether the daemon has run for less than [`MEETING_TIME`], so that it may not have met its
/// neighbours yet.
fn is_young(status: &Value) -> bool {
    let uptime = status["node"]["uptime_seconds"].as_f64();
    uptime.is_some_and(|seconds| seconds < MEETING_TIME.get().as_secs_f64())
}

/// Returns those of `peers` that the daemon has never heard. Empty if its status omits peers.
fn unmet(status: &Value, peers: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_whole = status["peers_omitted"].as_u64().unwrap_or_default() == 0;
    peers.iter().copied().filter(|peer| is_whole && last_heard(status, *peer).is_none()).collect()
}

/// When the daemon last heard a peer, in seconds since 1970. `None` if it never did.
fn last_heard(status: &Value, address: SocketAddr) -> Option<f64> {
    peer_at(status, address)?["last_heard"].as_f64()
}

/// How long the daemon has had no answer from a silent peer, in seconds. `None` for other peers.
fn silence(status: &Value, address: SocketAddr) -> Option<f64> {
    Some(moment(status) - peer_at(status, address)?["silent_since"].as_f64()?)
}

/// The state that the daemon reports of a node that `--peer` names. `None` for other nodes.
fn named_peer(status: &Value, named: &NamedAddresses, address: SocketAddr) -> Option<String> {
    match peer_at(status, address) {
        Some(peer) if peer["found_by"] == "flag" => peer_state(peer, moment(status)),
        None if named.addresses.contains(&address) => Some("not listed".into()),
        _ => None,
    }
}

/// Reports peers that answer this command and that the daemon has never heard. A daemon that has
/// just started may still hear them.
fn report_unmet(report: &mut Findings, status: &Value, unmet: &[SocketAddr], port: u16) {
    let peers = unmet.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
    if peers.is_empty() {
        return;
    }
    let text = format!("{peers} answers this command, and the daemon has never heard it");
    match is_young(status) {
        true => report.note("udp", format!("{text}: the daemon has just started")),
        false => {
            // A node in mode wan answers queries, and sends none to its neighbours.
            let remedy =
                format!("{}\nif its mode is wan: peerix --mode both there", open_port("udp", port));
            report.fail("udp", format!("{text}: UDP is blocked here, or its mode is wan"), remedy);
        }
    }
}

/// Reports a node that `--peer` names and that answers neither UDP queries nor HTTP. `state` is its
/// state in the daemon's status.
fn report_unreachable(report: &mut Findings, address: SocketAddr, state: &str, e: &io::Error) {
    let ip = address.ip();
    let gone = format!("if there is no such node any more: peerix without --peer {ip}");
    let start = format!("on {ip}: systemctl start peerix.socket peerix.service");
    // A host that refuses the connection lets packets in, so its firewall is not the cause.
    let remedy = match e.kind() {
        ErrorKind::ConnectionRefused => format!("{start}\n{gone}"),
        ErrorKind::NetworkUnreachable => {
            format!("the way there: ip route get {ip}; ip -brief link\n{gone}")
        }
        _ => {
            let ports =
                ["udp", "tcp"].map(|protocol| open_port_there(ip, protocol, address.port()));
            format!("{start}\nif it runs there, {}\n{gone}", ports.join("\n"))
        }
    };
    let text = format!(
        "--peer {address} does not answer: {e}{}; daemon: {state}",
        explain_connect_error(e)
    );
    report.fail("peer", text, remedy);
}

/// Explains an error of a connection to a host. Empty if the error speaks for itself.
fn explain_connect_error(e: &io::Error) -> &'static str {
    match e.kind() {
        ErrorKind::HostUnreachable => {
            " (no machine at that address answers ARP: it is switched off, or an access point keeps its clients apart)"
        }
        ErrorKind::NetworkUnreachable => {
            " (this machine has no route there: the link is down, or the network another)"
        }
        ErrorKind::ConnectionRefused => " (the machine is there, and its peerix does not run)",
        _ => "",
    }
}

/// Reports a host that `--peer` names and that has no address.
fn report_unresolved(report: &mut Findings, host: &str, e: &io::Error) {
    let find = format!("what the resolver finds: getent ahosts {}", quote(host));
    let remedy = format!("{find}\nif the name is wrong: peerix with the right --peer");
    report.fail("peer", format!("--peer {host} has no address: {e}"), remedy);
}

/// Reports a peer that answers this command and has been silent to the daemon for `silence`
/// seconds. It is a failure after [`RECENT_CONTACT_SECONDS`], when the daemon has probed the peer in
/// vain.
fn report_silent(report: &mut Findings, address: SocketAddr, silence: f64, port: u16) {
    let silent = format!("has been silent to the daemon for {}", long(silence));
    let text = format!("{address} answers this command, and {silent}");
    match silence > RECENT_CONTACT_SECONDS {
        true => {
            let text = format!("{text}: it has just come back, or UDP is blocked here");
            report.fail("udp", text, open_port("udp", port));
        }
        false => report.note("peer", format!("{text}, which probes it again")),
    }
}

/// Addresses on the LAN in the kernel's neighbour table, at most [`MAX_NEIGHBOURS`].
fn neighbours(networks: &LanNetworks, port: u16) -> Vec<SocketAddr> {
    let entries = neighbours::read().unwrap_or_default().into_iter();
    let addresses = entries.map(|entry| entry.socket_addr(port));
    addresses.filter(|address| networks.is_lan(*address)).take(MAX_NEIGHBOURS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::text;
    use crate::config::Config;
    use serde_json::json;
    use std::cell::Cell;

    const PORT: u16 = 12304;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], PORT))
    }

    /// Status of a daemon that has run for `uptime` seconds and has heard one peer.
    fn status(uptime: f64, heard: SocketAddr) -> Value {
        json!({
            "time": 1180.0,
            "node": {"uptime_seconds": uptime},
            "peers": [{"address": heard.to_string(), "found_by": "query", "last_heard": 1000.0}],
            "peers_omitted": 0,
        })
    }

    fn node(status: Value) -> Option<RunningDaemon> {
        Some(RunningDaemon { config: Config::default(), status })
    }

    /// State, name and text of each finding.
    fn told(report: &Findings) -> Vec<(String, String, String)> {
        let word = |finding: &Value, key: &str| text(&finding[key]).to_owned();
        let findings = report.findings();
        findings.iter().map(|f| (word(f, "state"), word(f, "what"), word(f, "text"))).collect()
    }

    /// Remedy of the first finding.
    fn remedy(report: &Findings) -> String {
        text(&report.findings()[0]["remedy"]).to_owned()
    }

    #[test]
    fn young_daemon_is_polled_until_it_has_met_all() {
        let polls = Cell::new(0);
        let meets_at_the_third = || {
            polls.set(polls.get() + 1);
            node(status(0.3, at(if polls.get() < 3 { 1 } else { 2 })))
        };
        let last = wait_until_met(meets_at_the_third, &[at(2)]).unwrap();
        assert_eq!((polls.get(), unmet(&last.status, &[at(2)])), (3, vec![]));
    }

    #[test]
    fn daemon_past_the_meeting_time_is_not_polled() {
        let polls = Cell::new(0);
        let grows_old = || {
            polls.set(polls.get() + 1);
            node(status(if polls.get() < 3 { 2.9 } else { 3.1 }, at(1)))
        };
        let last = wait_until_met(grows_old, &[at(2)]).unwrap();
        assert_eq!((polls.get(), unmet(&last.status, &[at(2)])), (3, vec![at(2)]));
    }

    #[test]
    fn daemon_that_stops_ends_the_polling() {
        let polls = Cell::new(0);
        let stops = || {
            polls.set(polls.get() + 1);
            if polls.get() < 2 { node(status(0.3, at(1))) } else { None }
        };
        assert!(wait_until_met(stops, &[at(2)]).is_some_and(|node| is_young(&node.status)));
        assert!(wait_until_met(|| None, &[at(2)]).is_none());
    }

    #[test]
    fn unmet_peer_is_a_udp_fault_unless_the_daemon_is_young() {
        let found = |uptime| {
            let mut report = Findings::default();
            let status = status(uptime, at(1));
            report_unmet(&mut report, &status, &unmet(&status, &[at(1), at(2)]), PORT);
            told(&report)
        };
        let text = "10.0.0.2:12304 answers this command, and the daemon has never heard it";
        let finding = |state: &str, why: &str| {
            let text = format!("{text}: {why}");
            vec![(state.to_owned(), "udp".to_owned(), text)]
        };
        assert_eq!(found(0.9), finding("note", "the daemon has just started"));
        assert_eq!(found(60.0), finding("fail", "UDP is blocked here, or its mode is wan"));
        let mut report = Findings::default();
        report_unmet(&mut report, &status(60.0, at(1)), &[], PORT);
        assert!(told(&report).is_empty());
    }

    #[test]
    fn peers_that_a_status_omits_are_not_unmet() {
        let mut status = status(60.0, at(1));
        assert_eq!(unmet(&status, &[at(1), at(2)]), [at(2)]);
        status["peers_omitted"] = 1.into();
        assert_eq!(unmet(&status, &[at(1), at(2)]), []);
    }

    #[test]
    fn named_peer_has_the_state_that_the_daemon_reports() {
        let named =
            NamedAddresses { addresses: vec![at(1), at(2), at(3)], ..NamedAddresses::default() };
        let peer = |last, found_by: &str, state: &str| {
            let since = (state == "silent").then_some(1000.0);
            let address = at(last).to_string();
            json!({"address": address, "found_by": found_by, "state": state, "silent_since": since})
        };
        let (silent, unheard) = (peer(1, "flag", "silent"), peer(2, "flag", "unheard"));
        let peers = [silent, unheard, peer(4, "query", "silent")];
        let status = json!({"time": 1180.0, "peers": peers});
        let state = |last| named_peer(&status, &named, at(last)).unwrap_or_default();
        assert_eq!([1, 2, 3, 4].map(state), ["silent for 3 min", "never heard", "not listed", ""]);
        let silence = |last| silence(&status, at(last));
        assert_eq!([1, 2, 4].map(silence), [Some(180.0), None, Some(180.0)]);
    }

    #[test]
    fn named_peer_that_does_not_answer_is_a_fault_with_a_remedy() {
        let mut report = Findings::default();
        let refused = io::Error::from(ErrorKind::ConnectionRefused);
        report_unreachable(&mut report, at(1), "silent for 3 min", &refused);
        let (state, what, text) = told(&report).remove(0);
        assert_eq!((&*state, &*what), ("fail", "peer"));
        assert!(
            text.starts_with("--peer 10.0.0.1:12304 does not answer: ")
                && text.contains("does not run"),
            "{text}"
        );
        assert!(text.ends_with("; daemon: silent for 3 min"), "{text}");
        let remedy = remedy(&report);
        assert!(remedy.starts_with("on 10.0.0.1: systemctl start peerix.socket "), "{remedy}");
        assert!(remedy.contains("without --peer 10.0.0.1"), "{remedy}");
    }

    #[test]
    fn name_without_an_address_is_a_fault_with_a_remedy() {
        // The resolver rejects a name with a zero byte without a network request.
        let peers = vec![("127.0.0.1".to_owned(), PORT), ("a\0b".to_owned(), PORT)];
        let named = NamedAddresses::resolve(&Config { peers, ..Config::default() });
        assert_eq!(named.addresses, [SocketAddr::from(([127, 0, 0, 1], PORT))]);
        let [(host, e)] = &named.unresolved[..] else { panic!("one name has no address") };
        assert_eq!(host, "a\0b");
        let mut report = Findings::default();
        report_unresolved(&mut report, "desk.example", e);
        assert!(!report.is_well() && remedy(&report).contains("getent ahosts desk.example"));
        assert!(told(&report)[0].2.starts_with("--peer desk.example has no address: "));
    }

    #[test]
    fn peer_silent_to_the_daemon_alone_is_a_fault_after_the_probe_interval() {
        let found = |seconds| {
            let mut report = Findings::default();
            report_silent(&mut report, at(1), seconds, PORT);
            told(&report).remove(0)
        };
        assert_eq!(found(20.0).0, "note");
        let (state, what, text) = found(180.0);
        assert_eq!((&*state, &*what), ("fail", "udp"));
        assert!(text.contains("silent to the daemon for 3 min: it has just come back"), "{text}");
    }
}
