//! Counters of the tracker, and their page in the text format of Prometheus, version 0.0.4.

use crate::db_thread::DatabaseStats;
use crate::table::TableCounts;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// Calls that are counted separately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountedCall {
    /// `POST /announce`.
    Announce,
    /// `DELETE /announce`.
    Leave,
    /// `POST /meet`.
    Meet,
    /// `PUT /filter`.
    Filter,
    /// `GET /lookup`.
    Lookup,
    /// `GET /peers`.
    Peers,
    /// `POST /transfer/init`.
    TransferInit,
    /// `POST /report`.
    Report,
    /// `GET /reputation`.
    Reputation,
    /// `GET /health`.
    Health,
    /// `GET /metrics`.
    Metrics,
    /// `GET /reach`.
    Reach,
    /// Any other request.
    Other,
}

/// Label of each [`CountedCall`], in order.
const CALLS: [&str; 13] = [
    "announce",
    "leave",
    "meet",
    "filter",
    "lookup",
    "peers",
    "transfer_init",
    "report",
    "reputation",
    "health",
    "metrics",
    "reach",
    "other",
];

/// Labels of status classes.
const CLASSES: [&str; 3] = ["2xx", "4xx", "5xx"];

/// The counters. All start at 0.
#[derive(Default)]
pub struct TrackerMetrics {
    requests: [[AtomicU64; CLASSES.len()]; CALLS.len()],
    limited: AtomicU64,
    candidates: AtomicU64,
    transfers: AtomicU64,
    agreed: AtomicU64,
    disagreed: AtomicU64,
}

impl TrackerMetrics {
    /// Counts an answered request.
    pub fn record_answer(&self, call: CountedCall, status: u16) {
        let class = match status {
            ..400 => 0,
            400..500 => 1,
            _ => 2,
        };
        add(&self.requests[call as usize][class], 1);
    }

    /// Counts a request that was refused by its address's rate limit.
    pub fn record_limited(&self) {
        add(&self.limited, 1);
    }

    /// Counts the candidates of a lookup.
    pub fn record_candidates(&self, candidates: usize) {
        add(&self.candidates, candidates as u64);
    }

    /// Counts transfers that began.
    pub fn record_transfers(&self, count: u32) {
        add(&self.transfers, count.into());
    }

    /// Counts a transfer of which both sides have reported.
    pub fn record_resolved(&self, consistent: bool) {
        add(if consistent { &self.agreed } else { &self.disagreed }, 1);
    }

    /// Returns the page of `GET /metrics`.
    pub fn page(&self, counts: TableCounts, database_stats: &DatabaseStats) -> String {
        let mut page = MetricsPage(String::new());
        page.one("peers", "gauge", "Peers that are here.", counts.peers as f64);
        page.one(
            "peers_with_filter",
            "gauge",
            "Those that have published a filter.",
            counts.with_filter as f64,
        );
        page.one("filter_bytes", "gauge", "Memory of filters.", counts.filter_bytes as f64);
        page.head("requests_total", "counter", "Requests answered, by call and status.");
        for (call, classes) in CALLS.iter().zip(&self.requests) {
            for (class, count) in CLASSES.iter().zip(classes) {
                page.row(
                    "requests_total",
                    &format!("{{call=\"{call}\",status=\"{class}\"}}"),
                    get(count),
                );
            }
        }
        page.one(
            "rate_limited_total",
            "counter",
            "Requests answered with 429 for their address.",
            get(&self.limited),
        );
        page.one(
            "lookup_candidates_total",
            "counter",
            "Candidates named by lookups.",
            get(&self.candidates),
        );
        page.one("transfers_begun_total", "counter", "Transfers begun.", get(&self.transfers));
        page.head(
            "transfers_resolved_total",
            "counter",
            "Transfers of which both sides have reported, by result.",
        );
        page.row("transfers_resolved_total", "{result=\"consistent\"}", get(&self.agreed));
        page.row("transfers_resolved_total", "{result=\"inconsistent\"}", get(&self.disagreed));
        page.head("ledger_commit_seconds", "summary", "Transactions, and the time they took.");
        page.row("ledger_commit_seconds_sum", "", get(&database_stats.commit_micros) / 1e6);
        page.row("ledger_commit_seconds_count", "", get(&database_stats.commits));
        page.one(
            "ledger_failures_total",
            "counter",
            "Transactions that failed.",
            get(&database_stats.failures),
        );
        page.0
    }
}

fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn get(counter: &AtomicU64) -> f64 {
    counter.load(Ordering::Relaxed) as f64
}

struct MetricsPage(String);

impl MetricsPage {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.0,
            "# HELP peerix_tracker_{name} {help}\n# TYPE peerix_tracker_{name} {kind}"
        );
    }

    fn row(&mut self, name: &str, labels: &str, value: f64) {
        let _ = writeln!(self.0, "peerix_tracker_{name}{labels} {value}");
    }

    fn one(&mut self, name: &str, kind: &str, help: &str, value: f64) {
        self.head(name, kind, help);
        self.row(name, "", value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_has_type_line_and_number_for_each_row() {
        let metrics = TrackerMetrics::default();
        metrics.record_answer(CountedCall::Other, 404);
        metrics.record_answer(CountedCall::Announce, 200);
        metrics.record_candidates(3);
        let page = metrics
            .page(TableCounts { peers: 2, ..TableCounts::default() }, &DatabaseStats::default());
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let (name, value) = line.split_once(' ').unwrap();
            assert!(value.parse::<f64>().is_ok(), "{line}");
            let base = name.split('{').next().unwrap();
            let base = base.strip_suffix("_sum").or(base.strip_suffix("_count")).unwrap_or(base);
            assert!(page.contains(&format!("# TYPE {base} ")), "{line}");
        }
        assert!(
            page.contains("\npeerix_tracker_requests_total{call=\"other\",status=\"4xx\"} 1\n")
        );
        assert!(
            page.contains("\npeerix_tracker_requests_total{call=\"announce\",status=\"2xx\"} 1\n")
        );
        assert!(page.contains("\npeerix_tracker_lookup_candidates_total 3\n"));
        assert!(page.contains("\npeerix_tracker_peers 2\n"));
    }
}
