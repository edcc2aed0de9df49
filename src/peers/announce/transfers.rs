//! Transfers between this node and the peers that one tracker names. The tracker names each
//! transfer and counts its bytes.

use crate::backoff::Backoff;
use crate::peers::tracker::Tracker;
use crate::time_scale::Interval;
use crate::wire::tracker::{MAX_TRANSFERS_AT_ONCE, Role, TransferName};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// Queue of transfers to begin and to report, sized for the NARs of a large closure. Further ones
/// are not counted.
pub(super) const MAX_JOBS: usize = 8192;
/// Transfers that wait for the tracker to name them, as many as the queue holds. Further ones are
/// not counted.
const MAX_PENDING_TRANSFERS: usize = MAX_JOBS;
/// Reports that are kept while the tracker is unreachable, about 200 KiB. When full, the oldest
/// report is dropped.
const MAX_REPORTS: usize = 8192;
/// Reports that are sent before new transfers get their turn.
const MAX_REPORTS_PER_ROUND: usize = 16;
/// Longest time that a report is kept for an unreachable tracker. Trackers keep a transfer that
/// lacks one report for 2 h.
const REPORT_TTL: Interval = Interval::from_secs(2 * 3600);

/// Name of a transfer; empty until the tracker has assigned it.
pub type PendingTransferName = Arc<OnceLock<TransferName>>;

/// A transfer to begin or to report.
pub(super) enum TransferJob {
    Begin { sender_id: String, name: PendingTransferName },
    Report(TransferredBytes),
}

/// Bytes that one side of a transfer reports.
pub(super) struct TransferredBytes {
    pub(super) transfer_id: u64,
    pub(super) role: Role,
    pub(super) bytes: u64,
    pub(super) ended: Instant,
}

/// Transfers that wait for a call of one tracker.
pub(super) struct TransferQueue {
    tracker: Arc<Tracker>,
    /// Transfers that wait for their names, by the sender's peer ID.
    pending: BTreeMap<String, Vec<PendingTransferName>>,
    reports: VecDeque<TransferredBytes>,
    pub(super) backoff: Backoff,
}

impl TransferQueue {
    /// Creates an empty queue for `tracker`.
    pub(super) fn new(tracker: Arc<Tracker>, backoff: Backoff) -> Self {
        TransferQueue { tracker, pending: BTreeMap::new(), reports: VecDeque::new(), backoff }
    }

    /// Adds a job. A transfer that begins is dropped if the tracker cannot count it.
    pub(super) fn add(&mut self, job: TransferJob) {
        match job {
            // A tracker that is unreachable, or that has no ID to name transfers by, cannot count
            // this transfer.
            TransferJob::Begin { .. }
                if !self.tracker.is_reached()
                    || self.tracker.id().is_none()
                    || self.pending.values().map(Vec::len).sum::<usize>()
                        >= MAX_PENDING_TRANSFERS => {}
            TransferJob::Begin { sender_id, name } => {
                self.pending.entry(sender_id).or_default().push(name)
            }
            TransferJob::Report(report) => {
                if self.reports.len() >= MAX_REPORTS {
                    self.reports.pop_front();
                }
                self.reports.push_back(report);
            }
        }
    }

    /// Begins and reports the waiting transfers, unless a call failed just now. Blocks for 10 s at
    /// most per call.
    pub(super) fn send(&mut self) {
        if self.backoff.is_due(Instant::now()) {
            self.begin_transfers();
            self.send_reports();
        }
    }

    /// Time at which the waiting reports may be sent; `None` if there are none.
    pub(super) fn reports_due(&self, now: Instant) -> Option<Instant> {
        (!self.reports.is_empty()).then(|| self.backoff.due().unwrap_or(now))
    }

    /// Begins the waiting transfers. After an error the others wait for the next attempt, and so do
    /// those of the failed call unless the tracker refused them.
    fn begin_transfers(&mut self) {
        while let Some(mut waiting) = self.pending.first_entry() {
            // A transfer that has ended meanwhile needs no name.
            waiting.get_mut().retain(|name| Arc::strong_count(name) > 1);
            let count = waiting.get().len().min(MAX_TRANSFERS_AT_ONCE as usize);
            if count == 0 {
                waiting.remove();
                continue;
            }
            match self.tracker.client().begin_transfers(waiting.key(), count as u32) {
                Ok((first, named)) => {
                    // Reports that are left may be what fails.
                    if self.reports.is_empty() {
                        self.backoff.reset();
                    }
                    let Some(tracker) = self.tracker.id() else {
                        return self.pending.clear();
                    };
                    let some = waiting.get_mut().drain(..count).take(named as usize);
                    for (id, name) in (first..).zip(some) {
                        let _ = name.set(TransferName { tracker: tracker.clone(), id });
                    }
                }
                Err(e) => {
                    log::debug!("tracker {}: transfers: {e}", self.tracker.url());
                    if !e.is_temporary() {
                        waiting.get_mut().drain(..count);
                    }
                    return self.backoff.record_failure(e.retry_after(), Instant::now());
                }
            }
        }
    }

    fn send_reports(&mut self) {
        for _ in 0..MAX_REPORTS_PER_ROUND {
            let Some(report) = self.reports.front() else { return };
            match self.tracker.client().report(report.transfer_id, report.role, report.bytes) {
                Err(e) if e.is_temporary() && report.ended.elapsed() < REPORT_TTL.get() => {
                    log::debug!("tracker {}: report: {e}", self.tracker.url());
                    return self.backoff.record_failure(e.retry_after(), Instant::now());
                }
                // A report that the tracker refused would be refused again.
                Err(e) => log::debug!("tracker {}: report lost: {e}", self.tracker.url()),
                Ok(()) => self.backoff.reset(),
            }
            self.reports.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::test_server::{answer, serve};
    use crate::peers::tracker::NodeIdentity;
    use std::thread;

    /// Creates a queue whose tracker accepts an announce and then gives these answers, one on each
    /// connection. The server returns the requests.
    fn queue(
        answers: &[(u16, &str)],
    ) -> (TransferQueue, thread::JoinHandle<Vec<(String, String)>>) {
        let announced = (200, r#"{"status":"ok","tracker":"0123456789abcdef"}"#);
        let answers = std::iter::once(&announced).chain(answers);
        let answers = answers.map(|(status, body)| answer(&format!("{status} x"), body));
        let (address, server) = serve(answers.collect(), true);
        let me = NodeIdentity::for_test();
        let tracker = Tracker::new(format!("http://{address}"), &me, Instant::now());
        tracker.announce(&me).unwrap();
        let backoff = Backoff::new(Interval::from_secs(1), Interval::from_secs(300));
        (TransferQueue::new(Arc::new(tracker), backoff), server)
    }

    fn begin(queue: &mut TransferQueue, sender_id: &str) -> PendingTransferName {
        let name = PendingTransferName::default();
        queue.add(TransferJob::Begin { sender_id: sender_id.to_owned(), name: name.clone() });
        name
    }

    fn ids(names: &[PendingTransferName]) -> Vec<Option<u64>> {
        names.iter().map(|name| name.get().map(|name| name.id)).collect()
    }

    #[test]
    fn failed_call_keeps_waiting_transfers_and_refused_one_drops_its_own() {
        let (mut queue, server) =
            queue(&[(503, "{}"), (400, "{}"), (200, r#"{"transfer_id":7,"count":2}"#)]);
        let mut names: Vec<_> = ["a", "b", "b", "b"].map(|id| begin(&mut queue, id)).into();
        // A transfer that nobody waits for.
        names.pop();
        queue.begin_transfers();
        assert!(!queue.backoff.is_due(Instant::now()));
        assert_eq!(ids(&names), [None; 3]);
        queue.begin_transfers();
        assert_eq!(ids(&names), [None; 3], "the sender a is refused");
        queue.begin_transfers();
        assert_eq!(ids(&names), [None, Some(7), Some(8)]);
        assert_eq!((queue.backoff.failures(), queue.pending.len()), (0, 0));
        let requests = server.join().unwrap();
        let senders = requests[1..].iter().zip(["a", "a", "b"]);
        let is_of = |((_, body), id): (&(String, String), &str)| {
            body.contains(&format!("\"sender_id\":\"{id}\""))
        };
        assert!(senders.clone().all(is_of), "{requests:?}");
    }

    #[test]
    fn pause_after_failed_reports_grows_although_transfers_begin() {
        let begun = (200, r#"{"transfer_id":7,"count":1}"#);
        let (mut queue, server) = queue(&[begun, (503, "{}"), begun, (503, "{}")]);
        let (transfer_id, role, bytes, at) = (7, Role::Receiver, 1, Instant::now());
        queue.add(TransferJob::Report(TransferredBytes { transfer_id, role, bytes, ended: at }));
        for failures in [1, 2] {
            let name = begin(&mut queue, "a");
            queue.begin_transfers();
            assert!(name.get().is_some());
            queue.send_reports();
            assert_eq!(queue.backoff.failures(), failures);
        }
        server.join().unwrap();
    }

    #[test]
    fn transfers_beyond_limit_are_not_counted() {
        let (mut queue, server) = queue(&[]);
        server.join().unwrap();
        let names: Vec<_> = (0..2 * MAX_PENDING_TRANSFERS)
            .map(|n| begin(&mut queue, &(n % 9).to_string()))
            .collect();
        let waiting = names.iter().filter(|name| Arc::strong_count(name) > 1).count();
        assert_eq!(waiting, MAX_PENDING_TRANSFERS);
    }
}
