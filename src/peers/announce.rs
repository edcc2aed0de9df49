//! One thread per tracker. It announces this node, publishes the filter of shared paths, and
//! reports transfers. All of these calls run here, so that no request of Nix waits for a tracker.

use super::tracker::{NodeIdentity, Tracker};
use crate::backoff::Backoff;
use crate::lock::Mutex;
use crate::network::Networks;
use crate::suspend::SuspendDetector;
use crate::time_scale::Interval;
use crate::wire::filter::{BloomFilter, MAX_BITS_PER_PATH};
use crate::wire::tracker::{MAX_TRANSFERS_AT_ONCE, Role, TransferName};
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded, select};
use scopeguard::defer;
use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use std::{io, thread};

/// Interval between announces. A tracker drops a node after twice this.
const ANNOUNCE_INTERVAL: Interval = Interval::from_secs(60);
/// Shortest interval between two uploads of a filter.
const FILTER_INTERVAL: Interval = Interval::from_secs(30);
/// Interval at which the thread checks for a new filter, a network change, the end of a suspend,
/// and lookups that miss the tracker.
const POLL_INTERVAL: Interval = Interval::from_secs(1);
/// Pause after the first failure. It doubles with each further failure.
const FIRST_PAUSE: Interval = Interval::from_secs(1);
/// Longest pause after a failure.
const MAX_PAUSE: Interval = Interval::from_secs(300);
/// Longest pause while lookups miss the tracker.
const MAX_PAUSE_WHILE_WANTED: Interval = Interval::from_secs(2);

/// Queue of transfers to begin and to report, sized for the NARs of a large closure. Further ones
/// are not counted.
const MAX_JOBS: usize = 8192;
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

/// The filter of the paths that this node shares, as the trackers get it.
pub struct Publication {
    current: Mutex<Option<(u64, Arc<BloomFilter>)>>,
    bits_per_path: AtomicU64,
}

impl Default for Publication {
    fn default() -> Self {
        Publication { current: Mutex::default(), bits_per_path: AtomicU64::new(MAX_BITS_PER_PATH) }
    }
}

impl Publication {
    /// Bits per path of the next filter: the smallest number that a tracker wants.
    pub fn bits_per_path(&self) -> u64 {
        self.bits_per_path.load(Ordering::Relaxed)
    }

    /// Publication of a node that shares nothing with strangers: an empty filter. A tracker
    /// sometimes names a peer without a filter, but never one with an empty filter.
    pub fn empty() -> Self {
        let current = Mutex::new(Some((0, Arc::new(BloomFilter::for_paths(0)))));
        Publication { current, ..Publication::default() }
    }

    /// Replaces the filter.
    pub fn set(&self, filter: BloomFilter) {
        let mut current = self.current.lock();
        let version = current.as_ref().map_or(0, |(version, _)| version + 1);
        *current = Some((version, Arc::new(filter)));
    }

    fn get(&self) -> Option<(u64, Arc<BloomFilter>)> {
        self.current.lock().clone()
    }
}

/// Name of a transfer; empty until the tracker has assigned it.
pub type PendingTransferName = Arc<OnceLock<TransferName>>;

/// All trackers and their threads.
pub struct Trackers {
    port: u16,
    announcers: Vec<Announcer>,
    /// Dropping the sender ends the threads.
    running: Mutex<Option<Sender<()>>>,
    /// Disconnected when all threads have ended.
    ended: Receiver<()>,
}

struct Announcer {
    tracker: Arc<Tracker>,
    jobs: Sender<AnnouncerJob>,
}

enum AnnouncerJob {
    Begin { sender_id: String, name: PendingTransferName },
    Report(TransferredBytes),
}

/// Bytes that one side of a transfer reports.
struct TransferredBytes {
    transfer_id: u64,
    role: Role,
    bytes: u64,
    ended: Instant,
}

impl Trackers {
    /// Starts one thread per URL. `on_end` is called whenever a thread ends, also by a panic.
    ///
    /// # Errors
    /// The system cannot create a thread.
    pub fn start(
        urls: Vec<String>,
        me: NodeIdentity,
        publication: &Arc<Publication>,
        networks: &Arc<Networks>,
        on_end: impl Fn() + Clone + Send + 'static,
    ) -> io::Result<Trackers> {
        let me = Arc::new(me);
        let trackers: Vec<_> =
            urls.into_iter().map(|url| Arc::new(Tracker::new(url, &me, Instant::now()))).collect();
        let mut announcers = Vec::new();
        let (running, stopped) = bounded(0);
        let (end, ended) = bounded(0);
        for tracker in &trackers {
            log::info!("tracker {}: knows this node as {}", tracker.url(), tracker.peer_id());
            let (jobs, queue) = bounded(MAX_JOBS);
            let worker = AnnouncerThread::new(
                tracker.clone(),
                trackers.clone(),
                me.clone(),
                publication.clone(),
                networks.clone(),
                queue,
                stopped.clone(),
            );
            let (on_end, end) = (on_end.clone(), end.clone());
            thread::Builder::new().name("announce".into()).spawn(move || {
                // Dropped when this thread ends, even by a panic.
                let _end = end;
                defer!(on_end());
                worker.run();
            })?;
            announcers.push(Announcer { tracker: tracker.clone(), jobs });
        }
        Ok(Trackers { port: me.port, announcers, running: Mutex::new(Some(running)), ended })
    }

    /// Port that this node announces.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The trackers, in the order of the command line.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Tracker>> {
        self.announcers.iter().map(|announcer| &announcer.tracker)
    }

    /// Tells the threads to sign off at their trackers and to end. Does not block. Reports that are
    /// made after this are lost.
    pub fn leave(&self) {
        drop(self.running.lock().take());
    }

    /// Waits until all threads have signed off and ended. Blocks until `deadline` at most; a thread
    /// that hangs in a call is left behind.
    pub fn wait(&self, deadline: Instant) {
        let _ = self.ended.recv_deadline(deadline);
    }

    /// Begins a transfer from the peer `sender_id` at the tracker with the index `tracker` in
    /// [`Trackers::all`]. Does not block; the name is set later, or never if the tracker is
    /// unreachable.
    pub fn begin_transfer(&self, tracker: usize, sender_id: &str) -> PendingTransferName {
        let name = PendingTransferName::default();
        if let Some(announcer) = self.announcers.get(tracker) {
            announcer.send_job(AnnouncerJob::Begin {
                sender_id: sender_id.to_owned(),
                name: name.clone(),
            });
        }
        name
    }

    /// Reports the bytes of a transfer to the tracker that named it. Does nothing if no configured
    /// tracker did. Does not block.
    pub fn report(&self, transfer: &TransferName, role: Role, bytes: u64) {
        let is_named =
            |announcer: &&Announcer| announcer.tracker.id().as_deref() == Some(&*transfer.tracker);
        if let Some(announcer) = self.announcers.iter().find(is_named) {
            announcer.send_job(AnnouncerJob::Report(TransferredBytes {
                transfer_id: transfer.id,
                role,
                bytes,
                ended: Instant::now(),
            }));
        }
    }
}

impl Announcer {
    fn send_job(&self, job: AnnouncerJob) {
        if let Err(TrySendError::Full(_)) = self.jobs.try_send(job) {
            log::debug!(
                "tracker {}: too many transfers at once; one is not counted",
                self.tracker.url()
            );
        }
    }
}

/// State of the thread of one tracker.
struct AnnouncerThread {
    tracker: Arc<Tracker>,
    /// All trackers including this one, because they share one filter.
    trackers: Vec<Arc<Tracker>>,
    me: Arc<NodeIdentity>,
    publication: Arc<Publication>,
    networks: Arc<Networks>,
    /// Number of network changes at the last check.
    network_changes: u64,
    suspend: SuspendDetector,
    queue: Receiver<AnnouncerJob>,
    stopped: Receiver<()>,
    announce_backoff: Backoff,
    /// True if the tracker said when it wants the next announce.
    is_asked_to_wait: bool,
    next_announce: Instant,
    /// Version of the filter that the tracker has, and the timestamp of its upload.
    published: Option<(u64, u64)>,
    publish_backoff: Backoff,
    next_filter: Instant,
    /// Transfers that wait for their names, by the sender's peer ID.
    pending_transfers: BTreeMap<String, Vec<PendingTransferName>>,
    /// Backoff of reports and of transfers to begin.
    report_backoff: Backoff,
    reports: VecDeque<TransferredBytes>,
}

impl AnnouncerThread {
    fn new(
        tracker: Arc<Tracker>,
        trackers: Vec<Arc<Tracker>>,
        me: Arc<NodeIdentity>,
        publication: Arc<Publication>,
        networks: Arc<Networks>,
        queue: Receiver<AnnouncerJob>,
        stopped: Receiver<()>,
    ) -> Self {
        let (backoff, now) = (|| Backoff::new(FIRST_PAUSE, MAX_PAUSE), Instant::now());
        AnnouncerThread {
            tracker,
            trackers,
            me,
            publication,
            network_changes: networks.count_changes(),
            networks,
            suspend: SuspendDetector::new(),
            queue,
            stopped,
            announce_backoff: backoff(),
            is_asked_to_wait: false,
            next_announce: now,
            published: None,
            publish_backoff: backoff(),
            next_filter: now,
            pending_transfers: BTreeMap::new(),
            report_backoff: backoff(),
            reports: VecDeque::new(),
        }
    }

    fn run(mut self) {
        loop {
            let now = Instant::now();
            self.handle_changes(now);
            if now >= self.next_announce {
                self.announce();
            }
            if self.tracker.is_reached() && self.announce_backoff.failures() == 0 {
                self.publish();
                if self.report_backoff.is_due(Instant::now()) {
                    self.begin_transfers();
                    self.send_reports();
                }
            }
            if !self.wait() {
                break;
            }
        }
        if self.tracker.is_reached()
            && let Err(e) = self.tracker.leave()
        {
            log::debug!("tracker {}: leaving: {e}", self.tracker.url());
        }
    }

    /// Announces sooner if the network changed, the machine was suspended, or lookups miss the
    /// tracker.
    fn handle_changes(&mut self, now: Instant) {
        let network_changes = self.networks.count_changes();
        let has_moved =
            std::mem::replace(&mut self.network_changes, network_changes) != network_changes;
        let has_slept = self.suspend.detect();
        if has_moved || has_slept {
            self.tracker.reset(now);
            for backoff in
                [&mut self.announce_backoff, &mut self.publish_backoff, &mut self.report_backoff]
            {
                backoff.reset();
            }
            self.next_announce = now;
        }
        // Lookups fail or miss the tracker; an announce finds out whether it is reachable. A
        // tracker that sent `Retry-After` is not asked sooner.
        if self.tracker.take_announce_request() && !self.is_asked_to_wait {
            let is_first = self.announce_backoff.failures() == 0;
            let soonest = if is_first { now } else { now + MAX_PAUSE_WHILE_WANTED.get() };
            self.next_announce = self.next_announce.min(soonest);
        }
    }

    fn announce(&mut self) {
        let answer = self.tracker.announce(&self.me);
        let now = Instant::now();
        match answer {
            Ok(announced) => {
                self.announce_backoff.reset();
                self.is_asked_to_wait = false;
                // The tracker has no filter, or one that this node did not publish last: it lost
                // it, or another machine uses the same identity.
                if self.published.is_some_and(|(_, timestamp)| announced.filter != Some(timestamp))
                {
                    self.published = None;
                }
                let min_bits = self.trackers.iter().map(|tracker| tracker.bits_per_path()).min();
                self.publication
                    .bits_per_path
                    .store(min_bits.unwrap_or(MAX_BITS_PER_PATH), Ordering::Relaxed);
                self.next_announce = now + ANNOUNCE_INTERVAL.get();
            }
            Err(e) => {
                self.announce_backoff.record_failure(e.retry_after(), now);
                self.is_asked_to_wait = e.retry_after().is_some();
                self.next_announce = self.announce_backoff.due().unwrap_or(now);
            }
        }
    }

    fn publish(&mut self) {
        let Some((version, filter)) = self.publication.get() else { return };
        let now = Instant::now();
        let has_it = self.published.is_some_and(|(last, _)| last == version);
        if now < self.next_filter || has_it || !self.publish_backoff.is_due(now) {
            return;
        }
        match self.tracker.put_filter(&filter) {
            Ok(timestamp) => {
                self.published = Some((version, timestamp));
                self.publish_backoff.reset();
                self.next_filter = Instant::now() + FILTER_INTERVAL.get();
            }
            Err(e) => {
                log::debug!("tracker {}: filter: {e}", self.tracker.url());
                self.publish_backoff.record_failure(e.retry_after(), Instant::now());
            }
        }
    }

    /// Begins the waiting transfers. After an error the others wait for the next attempt, and so do
    /// those of the failed call unless the tracker refused them.
    fn begin_transfers(&mut self) {
        while let Some(mut waiting) = self.pending_transfers.first_entry() {
            // A transfer that has ended meanwhile needs no name.
            waiting.get_mut().retain(|name| Arc::strong_count(name) > 1);
            let count = waiting.get().len().min(MAX_TRANSFERS_AT_ONCE as usize);
            if count == 0 {
                waiting.remove();
                continue;
            }
            match self.tracker.begin_transfers(waiting.key(), count as u32) {
                Ok((first, named)) => {
                    // Reports that are left may be what fails.
                    if self.reports.is_empty() {
                        self.report_backoff.reset();
                    }
                    let Some(tracker) = self.tracker.id() else {
                        return self.pending_transfers.clear();
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
                    return self.report_backoff.record_failure(e.retry_after(), Instant::now());
                }
            }
        }
    }

    fn send_reports(&mut self) {
        for _ in 0..MAX_REPORTS_PER_ROUND {
            let Some(report) = self.reports.front() else { return };
            match self.tracker.report(report.transfer_id, report.role, report.bytes) {
                Err(e) if e.is_temporary() && report.ended.elapsed() < REPORT_TTL.get() => {
                    log::debug!("tracker {}: report: {e}", self.tracker.url());
                    return self.report_backoff.record_failure(e.retry_after(), Instant::now());
                }
                // A report that the tracker refused would be refused again.
                Err(e) => log::debug!("tracker {}: report lost: {e}", self.tracker.url()),
                Ok(()) => self.report_backoff.reset(),
            }
            self.reports.pop_front();
        }
    }

    /// Waits until there is something to do, for at most [`POLL_INTERVAL`]. Returns false if the thread must
    /// end.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let has_reports = !self.reports.is_empty()
            && self.tracker.is_reached()
            && self.announce_backoff.failures() == 0;
        let reports = has_reports.then(|| self.report_backoff.due().unwrap_or(now));
        let deadline = self
            .next_announce
            .min(now + POLL_INTERVAL.get())
            .min(reports.unwrap_or(self.next_announce));
        select! {
            recv(self.stopped) -> _ => return false,
            recv(self.queue) -> job => match job {
                Ok(job) => self.handle_job(job),
                Err(_) => return false,
            },
            default(deadline.saturating_duration_since(now)) => {}
        }
        while let Ok(job) = self.queue.try_recv() {
            self.handle_job(job);
        }
        self.stopped.try_recv() != Err(TryRecvError::Disconnected)
    }

    fn handle_job(&mut self, job: AnnouncerJob) {
        match job {
            // A tracker that is unreachable, or that has no ID to name transfers by, cannot count
            // this transfer.
            AnnouncerJob::Begin { .. }
                if !self.tracker.is_reached()
                    || self.tracker.id().is_none()
                    || self.pending_transfers.values().map(Vec::len).sum::<usize>()
                        >= MAX_PENDING_TRANSFERS => {}
            AnnouncerJob::Begin { sender_id, name } => {
                self.pending_transfers.entry(sender_id).or_default().push(name)
            }
            AnnouncerJob::Report(report) => {
                if self.reports.len() >= MAX_REPORTS {
                    self.reports.pop_front();
                }
                self.reports.push_back(report);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkPolicy;
    use crate::peers::test_server::{answer, serve};

    /// Creates the state of a thread whose tracker accepts its announce and then gives these
    /// answers, one on each connection. The server returns the requests.
    fn announcer(
        answers: &[(u16, &str)],
    ) -> (AnnouncerThread, thread::JoinHandle<Vec<(String, String)>>) {
        let announced = (200, r#"{"status":"ok","tracker":"0123456789abcdef"}"#);
        let answers = std::iter::once(&announced).chain(answers);
        let answers = answers.map(|(status, body)| answer(&format!("{status} x"), body));
        let (address, server) = serve(answers.collect(), true);
        let me = Arc::new(NodeIdentity::for_test());
        let tracker = Arc::new(Tracker::new(format!("http://{address}"), &me, Instant::now()));
        let trackers = vec![tracker.clone()];
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let (_, queue) = bounded(0);
        let (_, stopped) = bounded(0);
        let mut thread =
            AnnouncerThread::new(tracker, trackers, me, Arc::default(), networks, queue, stopped);
        thread.announce();
        (thread, server)
    }

    fn begin(thread: &mut AnnouncerThread, sender_id: &str) -> PendingTransferName {
        let name = PendingTransferName::default();
        thread.handle_job(AnnouncerJob::Begin {
            sender_id: sender_id.to_owned(),
            name: name.clone(),
        });
        name
    }

    fn ids(names: &[PendingTransferName]) -> Vec<Option<u64>> {
        names.iter().map(|name| name.get().map(|name| name.id)).collect()
    }

    #[test]
    fn failed_call_keeps_waiting_transfers_and_refused_one_drops_its_own() {
        let (mut thread, server) =
            announcer(&[(503, "{}"), (400, "{}"), (200, r#"{"transfer_id":7,"count":2}"#)]);
        let mut names: Vec<_> = ["a", "b", "b", "b"].map(|id| begin(&mut thread, id)).into();
        // A transfer that nobody waits for.
        names.pop();
        thread.begin_transfers();
        assert!(!thread.report_backoff.is_due(Instant::now()));
        assert_eq!(ids(&names), [None; 3]);
        thread.begin_transfers();
        assert_eq!(ids(&names), [None; 3], "the sender a is refused");
        thread.begin_transfers();
        assert_eq!(ids(&names), [None, Some(7), Some(8)]);
        assert_eq!((thread.report_backoff.failures(), thread.pending_transfers.len()), (0, 0));
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
        let (mut thread, server) = announcer(&[begun, (503, "{}"), begun, (503, "{}")]);
        let (transfer_id, role, bytes, at) = (7, Role::Receiver, 1, Instant::now());
        thread.handle_job(AnnouncerJob::Report(TransferredBytes {
            transfer_id,
            role,
            bytes,
            ended: at,
        }));
        for failures in [1, 2] {
            let name = begin(&mut thread, "a");
            thread.begin_transfers();
            assert!(name.get().is_some());
            thread.send_reports();
            assert_eq!(thread.report_backoff.failures(), failures);
        }
        server.join().unwrap();
    }

    #[test]
    fn transfers_beyond_limit_are_not_counted() {
        let (mut thread, server) = announcer(&[]);
        server.join().unwrap();
        let names: Vec<_> = (0..2 * MAX_PENDING_TRANSFERS)
            .map(|n| begin(&mut thread, &(n % 9).to_string()))
            .collect();
        let waiting = names.iter().filter(|name| Arc::strong_count(name) > 1).count();
        assert_eq!(waiting, MAX_PENDING_TRANSFERS);
    }
}
