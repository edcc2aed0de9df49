//! A thread for each tracker, which says there that this node is here, publishes what it would share, and counts
//! transfers: all that the tracker is told, so that no request ever waits for it.

use super::tracker::{Error, Me, Tracker};
use crate::time_scale::Interval;
use crate::wire::filter::Filter;
use crate::wire::tracker::{MAX_TRANSFERS_AT_ONCE, Role, TransferName};
use crossbeam_channel::{Receiver, Sender, TryRecvError, TrySendError, bounded, select};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;
use std::{io, thread};

/// How often a node announces itself; trackers forget it after twice that.
const INTERVAL: Interval = Interval::from_secs(60);
/// A filter is published at most this often.
const FILTER_INTERVAL: Interval = Interval::from_secs(30);
/// How often it is looked whether there is a new one.
const LOOK: Interval = Interval::from_secs(2);
/// The first pause after a failure; it doubles.
const FIRST_PAUSE: Interval = Interval::from_secs(1);
/// The longest.
const LONGEST_PAUSE: Interval = Interval::from_secs(300);

/// Transfers to begin or report that wait for the thread: the NARs of a large closure. Beyond, they are not counted.
const MAX_JOBS: usize = 8192;
/// Reports that wait while the tracker is away. The oldest go first.
const MAX_REPORTS: usize = 8192;
/// Reports sent before new transfers have their turn.
const REPORTS_AT_ONCE: usize = 16;
/// A report that the tracker did not take is tried again with the next ones, so often in all.
const MAX_TRIES: u32 = 3;

/// What this node would share, as it is published.
#[derive(Default)]
pub struct Publication(Mutex<Option<(u64, Arc<Filter>)>>);

impl Publication {
    /// Another filter takes the place of the last.
    pub fn set(&self, filter: Filter) {
        let mut current = self.lock();
        let version = current.as_ref().map_or(0, |(version, _)| version + 1);
        *current = Some((version, Arc::new(filter)));
    }

    fn get(&self) -> Option<(u64, Arc<Filter>)> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<(u64, Arc<Filter>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A transfer's name, once the tracker has given it one.
pub type Begun = Arc<OnceLock<TransferName>>;

/// All trackers and their threads.
pub struct Trackers {
    me: Arc<Me>,
    announcers: Vec<Announcer>,
}

struct Announcer {
    tracker: Arc<Tracker>,
    jobs: Sender<Job>,
    /// Closing it ends the thread.
    running: Mutex<Option<Sender<()>>>,
    ended: Receiver<()>,
}

enum Job {
    Begin { sender_id: String, begun: Begun },
    Report(Counted),
}

/// Bytes of one side of a transfer.
struct Counted {
    transfer_id: u64,
    role: Role,
    bytes: u64,
    tries: u32,
}

impl Trackers {
    /// Starts the threads. `on_end` is called when one ends that should not.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(
        urls: Vec<String>,
        me: Me,
        publication: &Arc<Publication>,
        on_end: impl Fn() + Clone + Send + 'static,
    ) -> io::Result<Trackers> {
        let me = Arc::new(me);
        let mut announcers = Vec::new();
        for url in urls {
            let tracker = Arc::new(Tracker::new(url, Instant::now()));
            let (jobs, queue) = bounded(MAX_JOBS);
            let (running, stopped) = bounded(0);
            let (end, ended) = bounded(0);
            let worker = Worker {
                tracker: tracker.clone(),
                me: me.clone(),
                publication: publication.clone(),
                queue,
                stopped,
                failures: 0,
                next_announce: Instant::now(),
                published: None,
                next_filter: Instant::now(),
                begin: BTreeMap::new(),
                reports: VecDeque::new(),
            };
            let on_end = on_end.clone();
            thread::Builder::new().name("announce".into()).spawn(move || {
                // Closes when this thread ends, however that comes about.
                let _end = end;
                let _on_end = crate::on_drop::OnDrop::new(on_end);
                worker.run();
            })?;
            announcers.push(Announcer { tracker, jobs, running: Mutex::new(Some(running)), ended });
        }
        Ok(Trackers { me, announcers })
    }

    /// This node.
    pub fn me(&self) -> &Arc<Me> {
        &self.me
    }

    /// The trackers, in the order of the command line.
    pub fn all(&self) -> impl Iterator<Item = &Arc<Tracker>> {
        self.announcers.iter().map(|announcer| &announcer.tracker)
    }

    /// Has the trackers told that this node leaves. What is reported from now on is lost.
    pub fn leave(&self) {
        for announcer in &self.announcers {
            drop(announcer.running.lock().unwrap_or_else(PoisonError::into_inner).take());
        }
    }

    /// Waits until they have been told; one that hangs in a call is left behind at `until`.
    pub fn wait(&self, until: Instant) {
        for announcer in &self.announcers {
            let _ = announcer.ended.recv_deadline(until);
        }
    }

    /// Has a transfer from that peer begun at the tracker with that place in [`Trackers::all`]. It gets its name soon.
    pub fn begin(&self, tracker: usize, sender_id: &str) -> Begun {
        let begun = Begun::default();
        if let Some(announcer) = self.announcers.get(tracker) {
            announcer.give(Job::Begin { sender_id: sender_id.to_owned(), begun: begun.clone() });
        }
        begun
    }

    /// Reports bytes of a transfer to the tracker that counts it, if that is one of ours.
    pub fn report(&self, transfer: &TransferName, role: Role, bytes: u64) {
        let counts = |announcer: &&Announcer| announcer.tracker.id().as_deref() == Some(&*transfer.tracker);
        if let Some(announcer) = self.announcers.iter().find(counts) {
            announcer.give(Job::Report(Counted { transfer_id: transfer.id, role, bytes, tries: 0 }));
        }
    }
}

impl Announcer {
    fn give(&self, job: Job) {
        if let Err(TrySendError::Full(_)) = self.jobs.try_send(job) {
            log::debug!("tracker {}: too many transfers at once; one is not counted", self.tracker.url());
        }
    }
}

/// What the thread owns.
struct Worker {
    tracker: Arc<Tracker>,
    me: Arc<Me>,
    publication: Arc<Publication>,
    queue: Receiver<Job>,
    stopped: Receiver<()>,
    failures: u32,
    next_announce: Instant,
    /// The version of the filter that the tracker has, and the timestamp by which it knows it.
    published: Option<(u64, u64)>,
    next_filter: Instant,
    begin: BTreeMap<String, Vec<Begun>>,
    reports: VecDeque<Counted>,
}

impl Worker {
    fn run(mut self) {
        loop {
            let now = Instant::now();
            // A lookup has found out that the tracker is away.
            if !self.tracker.is_reached() && self.failures == 0 {
                self.next_announce = self.next_announce.min(now + FIRST_PAUSE.get());
            }
            if now >= self.next_announce {
                self.announce();
            }
            if self.tracker.is_reached() {
                self.publish();
                self.begin_transfers();
                self.send_reports();
            }
            if !self.wait() {
                break;
            }
        }
        if self.tracker.is_reached()
            && let Err(e) = self.tracker.leave(&self.me)
        {
            log::debug!("tracker {}: leaving: {e}", self.tracker.url());
        }
    }

    fn announce(&mut self) {
        let pause = match self.tracker.announce(&self.me) {
            Ok(announced) => {
                self.failures = 0;
                // It has none, or an old one: it was started anew, or forgot this node.
                if self.published.is_some_and(|(_, timestamp)| announced.filter != Some(timestamp)) {
                    self.published = None;
                }
                INTERVAL.get()
            }
            Err(e) => {
                if let Error::Refused(..) = e
                    && self.failures == 0
                {
                    log::warn!("tracker {}: does not take this node: {e}", self.tracker.url());
                }
                self.failures = self.failures.saturating_add(1);
                FIRST_PAUSE.get().saturating_mul(1 << (self.failures - 1).min(10)).min(LONGEST_PAUSE.get())
            }
        };
        self.next_announce = Instant::now() + pause;
    }

    fn publish(&mut self) {
        let Some((version, filter)) = self.publication.get() else { return };
        let now = Instant::now();
        if now < self.next_filter || self.failures > 0 || self.published.is_some_and(|(last, _)| last == version) {
            return;
        }
        self.next_filter = now + FILTER_INTERVAL.get();
        match self.tracker.put_filter(&self.me, &filter) {
            Ok(timestamp) => self.published = Some((version, timestamp)),
            Err(e) => log::debug!("tracker {}: filter: {e}", self.tracker.url()),
        }
    }

    fn begin_transfers(&mut self) {
        for (sender_id, waiting) in std::mem::take(&mut self.begin) {
            for some in waiting.chunks(MAX_TRANSFERS_AT_ONCE as usize) {
                match self.tracker.begin_transfers(&self.me, &sender_id, some.len() as u32) {
                    Ok((first, count)) => {
                        let Some(tracker) = self.tracker.id() else { return };
                        for (id, begun) in (first..).zip(some.iter().take(count as usize)) {
                            let _ = begun.set(TransferName { tracker: tracker.clone(), id });
                        }
                    }
                    Err(e) => return log::debug!("tracker {}: transfers: {e}", self.tracker.url()),
                }
            }
        }
    }

    fn send_reports(&mut self) {
        for _ in 0..REPORTS_AT_ONCE {
            let Some(mut counted) = self.reports.pop_front() else { return };
            let sent = self.tracker.report(&self.me, counted.transfer_id, counted.role, counted.bytes);
            let Err(e) = sent else { continue };
            log::debug!("tracker {}: report: {e}", self.tracker.url());
            // What it refused once it refuses again, unless it has too much to do.
            if matches!(e, Error::Refused(400..=428 | 430..500, _)) {
                continue;
            }
            counted.tries += 1;
            if counted.tries < MAX_TRIES {
                self.reports.push_back(counted);
            }
            return;
        }
    }

    /// Waits for something to do. False: it is time to end.
    fn wait(&mut self) -> bool {
        let now = Instant::now();
        let until = if self.tracker.is_reached() && !self.reports.is_empty() {
            now
        } else {
            self.next_announce.min(now + LOOK.get())
        };
        select! {
            recv(self.stopped) -> _ => return false,
            recv(self.queue) -> job => match job {
                Ok(job) => self.take(job),
                Err(_) => return false,
            },
            default(until.saturating_duration_since(now)) => {}
        }
        while let Ok(job) = self.queue.try_recv() {
            self.take(job);
        }
        self.stopped.try_recv() != Err(TryRecvError::Disconnected)
    }

    fn take(&mut self, job: Job) {
        match job {
            // Of a tracker that is away, or that has no ID to name transfers by, nothing is expected.
            Job::Begin { .. } if !self.tracker.is_reached() || self.tracker.id().is_none() => {}
            Job::Begin { sender_id, begun } => self.begin.entry(sender_id).or_default().push(begun),
            Job::Report(counted) => {
                if self.reports.len() >= MAX_REPORTS {
                    self.reports.pop_front();
                }
                self.reports.push_back(counted);
            }
        }
    }
}
