//! `/metrics` in the Prometheus text format, version 0.0.4, and the text of `/health`.

use super::report::{NodeReport, PeerReport, PeerState, Problem, StatusReport, TrackerState};
use super::{StatusService, text};
use crate::stats::{Counter, Histogram, Stats};
use std::fmt::Write;

/// Names and values of a series' labels.
type MetricLabels<'a> = &'a [(&'a str, &'a str)];

struct MetricsText(String);

impl MetricsText {
    /// Writes the head of a metric. Its series have to follow.
    fn metric(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.0, "# HELP peerix_{name} {help}\n# TYPE peerix_{name} {kind}\n");
    }

    fn series(&mut self, name: &str, labels: MetricLabels<'_>, value: f64) {
        let _ = write!(self.0, "peerix_{name}");
        for (at, (label, value)) in labels.iter().enumerate() {
            let _ = write!(self.0, "{}{label}=\"", if at == 0 { '{' } else { ',' });
            for c in value.chars() {
                match c {
                    '\\' => self.0.push_str("\\\\"),
                    '"' => self.0.push_str("\\\""),
                    '\n' => self.0.push_str("\\n"),
                    c => self.0.push(c),
                }
            }
            self.0.push('"');
        }
        let _ = writeln!(self.0, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.metric(name, kind, help);
        self.series(name, &[], value);
    }

    /// Writes a metric with a series for each value of `label`.
    fn by<'a>(
        &mut self,
        label: &str,
        (name, kind, help): (&str, &str, &str),
        series: impl IntoIterator<Item = (&'a str, f64)>,
    ) {
        self.metric(name, kind, help);
        series.into_iter().for_each(|(value, number)| self.series(name, &[(label, value)], number));
    }

    fn histogram(&mut self, name: &str, label: (&str, &str), histogram: &Histogram) {
        let counts = histogram.cumulative();
        for (at, count) in counts.iter().enumerate() {
            let bound = Histogram::BOUNDS.get(at).map_or("+Inf".into(), f64::to_string);
            self.series(&format!("{name}_bucket"), &[label, ("le", &bound)], *count as f64);
        }
        self.series(&format!("{name}_sum"), &[label], histogram.sum_seconds());
        self.series(&format!("{name}_count"), &[label], counts[counts.len() - 1] as f64);
    }
}

impl StatusService {
    /// All metrics as text. Blocks for at most 7 s, for the store and for discovery.
    pub fn metrics(&self) -> String {
        let report = self.whole();
        let mut all = MetricsText(String::new());
        node(&mut all, &report);
        lookups(&mut all, &self.stats);
        nars(&mut all, &report);
        peers(&mut all, &report, self.discovery.dropped());
        self.peer_series(&mut all);
        all.0
    }

    /// Traffic of the peers that have a series, and of all others together. The number of series is
    /// bounded because Prometheus keeps each one that it has seen.
    fn peer_series(&self, all: &mut MetricsText) {
        let (peers, others) = (self.stats.traffic(), self.stats.others());
        for (at, name, help) in [
            (
                0,
                "peer_received_bytes_total",
                "Bytes of NARs from a peer; of most of them together if there are many.",
            ),
            (
                1,
                "peer_sent_bytes_total",
                "Bytes of NARs to a peer; to most of them together if there are many.",
            ),
        ] {
            all.metric(name, "counter", help);
            for (key, counts) in peers.iter().filter(|(_, counts)| counts.has_series()) {
                let counter = if at == 0 { &counts.received } else { &counts.sent };
                let count = counter.load(std::sync::atomic::Ordering::Relaxed) as f64;
                let address = if key.port == 0 {
                    key.ip.to_string()
                } else {
                    format!("{}:{}", key.ip, key.port)
                };
                all.series(name, &[("peer", &address), ("network", key.network.as_str())], count);
            }
            all.series(name, &[("peer", "others"), ("network", "any")], others[at] as f64);
        }
    }

    /// Body of `/health` and whether the node is healthy. An unhealthy node lists its serious
    /// problems, a healthy one the faults that it runs with. Other machines get no texts. Blocks
    /// for at most 7 s, for the store and for discovery.
    pub fn health_text(&self, is_this_machine: bool) -> (bool, String) {
        let health = self.health();
        if !health.ok {
            let serious = health.problems.iter().filter(|problem| problem.serious);
            let line =
                |problem: &Problem| health_line(problem.code, None, &problem.text, is_this_machine);
            return (false, serious.map(line).collect());
        }
        let mut text = "ok\n".to_owned();
        for (code, what) in self.degraded.all() {
            text += &health_line(code, None, &what, is_this_machine);
        }
        let lists = self.friends.iter().map(|friends| friends.list());
        for (list, what) in lists.filter_map(|list| Some((list, list.problem()?))) {
            text += &health_line("friends", list.problem_line(), &what, is_this_machine);
        }
        (true, text)
    }
}

/// Line of `/health` for one problem. Other machines get its code and the line in the file, because
/// its text may contain names of files and friends, and parts of a file.
fn health_line(code: &str, file_line: Option<usize>, what: &str, is_this_machine: bool) -> String {
    match file_line {
        _ if is_this_machine => format!("{code}: {}\n", text::line(what)),
        Some(number) => format!("{code}: line {number}\n"),
        None => format!("{code}\n"),
    }
}

/// Metrics of the node as a whole.
fn node(all: &mut MetricsText, report: &StatusReport) {
    let NodeReport { version, mode, started, .. } = report.node;
    all.metric("build_info", "gauge", "The version, as a label.");
    all.series("build_info", &[("version", version), ("mode", mode)], 1.0);
    all.one("start_time_seconds", "gauge", "When it started, since 1970.", started);
    let is_healthy = f64::from(u8::from(report.health.ok));
    all.one("healthy", "gauge", "Whether /health says 200.", is_healthy);
    let problems = report.health.problems.iter().map(|problem| (problem.code, 1.0));
    all.by("code", ("problem", "gauge", "What is wrong, 1 for each."), problems);
}

/// Metrics of what the own Nix asks for.
fn lookups(all: &mut MetricsText, stats: &Stats) {
    let (lookups, transfers) = (&stats.lookups, &stats.transfers);
    all.metric("lookup_seconds", "histogram", "Time of lookups for the own Nix.");
    all.histogram("lookup_seconds", ("result", "hit"), &lookups.hit_time);
    all.histogram("lookup_seconds", ("result", "miss"), &lookups.miss_time);
    let misses = lookups.misses().map(|(code, count)| (code, count as f64));
    let help = "Lookups that found nothing, by reason.";
    all.by("reason", ("lookup_misses_total", "counter", help), misses);
    let help = "Time from the own Nix's request for a NAR to its first piece.";
    all.metric("first_byte_seconds", "histogram", help);
    all.histogram("first_byte_seconds", ("network", "lan"), &transfers.first_byte_lan);
    all.histogram("first_byte_seconds", ("network", "wan"), &transfers.first_byte_wan);
}

/// Totals of the NARs that came from peers and went to them, and the running transfers.
fn nars(all: &mut MetricsText, report: &StatusReport) {
    let totals = &report.totals.start.totals;
    let get = |count| totals.get(count) as f64;
    for (name, help, lan, wan) in [
        (
            "received_bytes_total",
            "Bytes of NARs that came from peers.",
            Counter::ReceivedLan,
            Counter::ReceivedWan,
        ),
        (
            "sent_bytes_total",
            "Bytes of NARs that went to peers.",
            Counter::SentLan,
            Counter::SentWan,
        ),
    ] {
        all.by("network", (name, "counter", help), [("lan", get(lan)), ("wan", get(wan))]);
    }
    for (name, help, count) in [
        ("received_nars_total", "Whole NARs that came from peers.", Counter::ReceivedNars),
        ("failed_nars_total", "NARs that no peer could deliver.", Counter::FailedNars),
        ("sent_nars_total", "NARs that went to peers.", Counter::SentNars),
    ] {
        all.one(name, "counter", help, get(count));
    }
    let running =
        |way| report.transfers.iter().filter(|transfer| transfer.direction == way).count();
    let transfers = ["in", "out"].map(|way| (way, running(way) as f64));
    all.by("direction", ("transfers", "gauge", "NARs under way."), transfers);
}

/// Metrics of the peers and the trackers. `dropped` is the number of datagrams that were not sent.
fn peers(all: &mut MetricsText, report: &StatusReport, dropped: u64) {
    let is_known = |peer: &&PeerReport| peer.found_by != "request";
    let known = |network| {
        report.peers.iter().filter(is_known).filter(|peer| peer.network == network).count()
    };
    let known = ["lan", "wan"].map(|network| (network, known(network) as f64));
    all.by("network", ("peers", "gauge", "Peers that are known."), known);
    lan_peers(all, &report.peers);
    let help = "Datagrams not sent because a send buffer was full.";
    all.one("lan_dropped_datagrams_total", "counter", help, dropped as f64);
    let avoided = report.peers.iter().filter(|peer| peer.avoided.is_some()).count();
    all.one("peers_avoided", "gauge", "Peers that are avoided after failures.", avoided as f64);
    if !report.trackers.is_empty() {
        let is_reached =
            |tracker: &TrackerState| f64::from(u8::from(tracker.reached == Some(true)));
        let trackers = report.trackers.iter().map(|tracker| (&*tracker.url, is_reached(tracker)));
        all.by("tracker", ("tracker_reached", "gauge", "Whether a tracker answers."), trackers);
    }
}

/// Counts the live and the silent LAN peers. A `--peer` that was never heard is not counted.
fn lan_peers(all: &mut MetricsText, peers: &[PeerReport]) {
    let count = |state| peers.iter().filter(|peer| peer.state == Some(state)).count() as f64;
    let counts = [("live", count(PeerState::Live)), ("silent", count(PeerState::Silent))];
    let help = "Peers on the LAN that answer, and that were given up.";
    all.by("state", ("lan_peers", "gauge", help), counts);
}

#[cfg(test)]
mod tests {
    use super::super::peers::empty;
    use super::*;
    use crate::stats::Network;
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    #[test]
    fn texts_of_problems_are_for_this_machine() {
        let (code, what) = ("friends", "/etc/friends: line 3: a=secret: not a key");
        assert_eq!(health_line(code, Some(3), what, true), format!("{code}: {what}\n"));
        assert_eq!(health_line(code, Some(3), what, false), "friends: line 3\n");
        assert_eq!(health_line(code, None, what, false), "friends\n");
    }

    #[test]
    fn lan_peers_are_counted_by_state() {
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
        let peer = |network, state| PeerReport { state, ..empty(address, network) };
        let peers = [
            peer(Network::Lan, Some(PeerState::Live)),
            peer(Network::Lan, Some(PeerState::Live)),
            peer(Network::Lan, Some(PeerState::Silent)),
            peer(Network::Lan, Some(PeerState::Unheard)),
            peer(Network::Lan, None),
            peer(Network::Wan, None),
        ];
        let counts = |peers: &[PeerReport]| {
            let mut all = MetricsText(String::new());
            lan_peers(&mut all, peers);
            let (_, series) = all.0.split_once(" gauge\n").unwrap();
            series.to_owned()
        };
        let expected = "peerix_lan_peers{state=\"live\"} 2\npeerix_lan_peers{state=\"silent\"} 1\n";
        assert_eq!(counts(&peers), expected);
        // Series with the value 0 are written, because a missing series raises no alert.
        assert_eq!(counts(&[]), expected.replace("} 2", "} 0").replace("} 1", "} 0"));
    }

    #[test]
    fn metric_and_label_values_are_written_in_prometheus_format() {
        let mut all = MetricsText(String::new());
        all.one("x_total", "counter", "How many.", 3.0);
        all.series("y", &[("a", "b\\\"\n"), ("c", "")], 0.5);
        let expected = "# HELP peerix_x_total How many.\n# TYPE peerix_x_total counter\npeerix_x_total 3\n\
                        peerix_y{a=\"b\\\\\\\"\\n\",c=\"\"} 0.5\n";
        assert_eq!(all.0, expected);
    }

    #[test]
    fn histogram_is_cumulative_and_ends_with_inf() {
        let (mut all, histogram) = (MetricsText(String::new()), Histogram::default());
        histogram.observe(Duration::from_millis(3));
        histogram.observe(Duration::from_secs(60));
        all.histogram("t", ("n", "lan"), &histogram);
        for line in [
            "peerix_t_bucket{n=\"lan\",le=\"0.002\"} 0\n",
            "peerix_t_bucket{n=\"lan\",le=\"0.005\"} 1\n",
            "peerix_t_bucket{n=\"lan\",le=\"5\"} 1\n",
            "peerix_t_bucket{n=\"lan\",le=\"+Inf\"} 2\n",
            "peerix_t_sum{n=\"lan\"} 60.003\n",
            "peerix_t_count{n=\"lan\"} 2\n",
        ] {
            assert!(all.0.contains(line), "{line}{}", all.0);
        }
    }
}
