//! One thread per tracker. It announces this node, publishes the filter of shared paths, and
//! reports transfers. All of these calls run here, so that no request of Nix waits for a tracker.

mod publication;
mod transfers;

pub use publication::Publication;
pub use transfers::PendingTransferName;

use super::tracker::{NodeIdentity, Tracker};
use crate::backoff::Backoff;
use crate::lock::Mutex;
use crate::network::Networks;
use crate::suspend::SuspendDetector;
use crate::time_scale::Interval;
use crate::wire::filter::MAX_BITS_PER_PATH;
use crate::wire::tracker::{Role, TransferName};
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded, select};
use publication::FilterUpload;
use scopeguard::defer;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};
use transfers::{MAX_JOBS, TransferJob, TransferQueue, TransferredBytes};

/// Interval between announces. A tracker drops a node after twice this.
const ANNOUNCE_INTERVAL: Interval = Interval::from_secs(60);
/// Interval at which the thread checks for a new filter, a network change, the end of a suspend,
/// and lookups that miss the tracker.
const POLL_INTERVAL: Interval = Interval::from_secs(1);
/// Pause after the first failure. It doubles with each further failure.
const FIRST_PAUSE: Interval = Interval::from_secs(1);
/// Longest pause after a failure.
const MAX_PAUSE: Interval = Interval::from_secs(300);
/// Longest pause while lookups miss the tracker.
const MAX_PAUSE_WHILE_WANTED: Interval = Interval::from_secs(2);

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
    jobs: Sender<TransferJob>,
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
            let (sender, jobs) = bounded(MAX_JOBS);
            let backoff = || Backoff::new(FIRST_PAUSE, MAX_PAUSE);
            let worker = AnnouncerThread {
                tracker: tracker.clone(),
                trackers: trackers.clone(),
                me: me.clone(),
                changes: ChangeDetector::new(networks.clone()),
                announces: AnnounceSchedule::new(backoff()),
                upload: FilterUpload::new(tracker.clone(), publication.clone(), backoff()),
                transfers: TransferQueue::new(tracker.clone(), backoff()),
                jobs,
                stopped: stopped.clone(),
            };
            let (on_end, end) = (on_end.clone(), end.clone());
            thread::Builder::new().name("announce".into()).spawn(move || {
                // Dropped when this thread ends, even by a panic.
                let _end = end;
                defer!(on_end());
                worker.run();
            })?;
            announcers.push(Announcer { tracker: tracker.clone(), jobs: sender });
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
            announcer.send_job(TransferJob::Begin {
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
            announcer.send_job(TransferJob::Report(TransferredBytes {
                transfer_id: transfer.id,
                role,
                bytes,
                ended: Instant::now(),
            }));
        }
    }
}

impl Announcer {
    fn send_job(&self, job: TransferJob) {
        if let Err(TrySendError::Full(_)) = self.jobs.try_send(job) {
            log::debug!(
                "tracker {}: too many transfers at once; one is not counted",
                self.tracker.url()
            );
        }
    }
}

/// Time of the next announce.
struct AnnounceSchedule {
    next: Instant,
    backoff: Backoff,
    /// True if the tracker said when it wants the next announce.
    is_asked_to_wait: bool,
}

impl AnnounceSchedule {
    fn new(backoff: Backoff) -> Self {
        AnnounceSchedule { next: Instant::now(), backoff, is_asked_to_wait: false }
    }

    /// Announces sooner because lookups fail or miss the tracker: an announce finds out whether it
    /// is reachable. A tracker that sent `Retry-After` is not asked sooner.
    fn hurry(&mut self, now: Instant) {
        if !self.is_asked_to_wait {
            let is_first = self.backoff.failures() == 0;
            let soonest = if is_first { now } else { now + MAX_PAUSE_WHILE_WANTED.get() };
            self.next = self.next.min(soonest);
        }
    }

    fn record_success(&mut self, now: Instant) {
        self.backoff.reset();
        self.is_asked_to_wait = false;
        self.next = now + ANNOUNCE_INTERVAL.get();
    }

    fn record_failure(&mut self, retry_after: Option<Duration>, now: Instant) {
        self.backoff.record_failure(retry_after, now);
        self.is_asked_to_wait = retry_after.is_some();
        self.next = self.backoff.due().unwrap_or(now);
    }
}

/// Detects that the network changed or the machine was suspended, so that earlier calls say nothing
/// about the next ones.
struct ChangeDetector {
    networks: Arc<Networks>,
    /// Number of network changes at the last check.
    network_changes: u64,
    suspend: SuspendDetector,
}

impl ChangeDetector {
    fn new(networks: Arc<Networks>) -> Self {
        let network_changes = networks.count_changes();
        ChangeDetector { networks, network_changes, suspend: SuspendDetector::new() }
    }

    /// Returns true if the network changed or the machine was suspended since the last call.
    fn detect(&mut self) -> bool {
        let network_changes = self.networks.count_changes();
        let has_moved =
            std::mem::replace(&mut self.network_changes, network_changes) != network_changes;
        let has_slept = self.suspend.detect();
        has_moved || has_slept
    }
}

/// State of the thread of one tracker.
struct AnnouncerThread {
    tracker: Arc<Tracker>,
    /// All trackers including this one, because they share one filter.
    trackers: Vec<Arc<Tracker>>,
    me: Arc<NodeIdentity>,
    changes: ChangeDetector,
    announces: AnnounceSchedule,
    upload: FilterUpload,
    transfers: TransferQueue,
    jobs: Receiver<TransferJob>,
    stopped: Receiver<()>,
}

impl AnnouncerThread {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            self.handle_changes(now);
            if now >= self.announces.next {
                self.announce();
            }
            if self.may_call() {
                self.upload.upload_if_due();
                self.transfers.send();
            }
            if !self.wait() {
                break;
            }
        }
        if self.tracker.is_reached()
            && let Err(e) = self.tracker.client().leave()
        {
            log::debug!("tracker {}: leaving: {e}", self.tracker.url());
        }
    }

    /// Returns true if calls other than announces have a chance.
    fn may_call(&self) -> bool {
        self.tracker.is_reached() && self.announces.backoff.failures() == 0
    }

    /// Announces sooner if the network changed, the machine was suspended, or lookups miss the
    /// tracker.
    fn handle_changes(&mut self, now: Instant) {
        if self.changes.detect() {
            self.tracker.reset(now);
            self.announces.backoff.reset();
            self.upload.backoff.reset();
            self.transfers.backoff.reset();
            self.announces.next = now;
        }
        if self.tracker.take_announce_request() {
            self.announces.hurry(now);
        }
    }

    fn announce(&mut self) {
        let answer = self.tracker.announce(&self.me);
        let now = Instant::now();
        match answer {
            Ok(announced) => {
                self.upload.record_timestamp(announced.filter);
                let min_bits = self.trackers.iter().map(|tracker| tracker.bits_per_path()).min();
                self.upload.request_bits_per_path(min_bits.unwrap_or(MAX_BITS_PER_PATH));
                self.announces.record_success(now);
            }
            Err(e) => self.announces.record_failure(e.retry_after(), now),
        }
    }

    /// Waits until there is something to do, for at most [`POLL_INTERVAL`]. Returns false if the
    /// thread must end.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let reports = self.transfers.reports_due(now).filter(|_| self.may_call());
        let deadline = self
            .announces
            .next
            .min(now + POLL_INTERVAL.get())
            .min(reports.unwrap_or(self.announces.next));
        select! {
            recv(self.stopped) -> _ => return false,
            recv(self.jobs) -> job => match job {
                Ok(job) => self.transfers.add(job),
                Err(_) => return false,
            },
            default(deadline.saturating_duration_since(now)) => {}
        }
        for job in self.jobs.try_iter() {
            self.transfers.add(job);
        }
        self.stopped.try_recv() != Err(TryRecvError::Disconnected)
    }
}
