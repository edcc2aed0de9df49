//! State of one tracker: whether lookups currently use it, and what it answered to announces.
//!
//! Lookups leave a tracker out after several failures in a row, until the announce thread has
//! reached it again. If many candidates of a tracker are silent, lookups wait less for those of its
//! candidates that have never answered. If none of its candidates has answered recently, lookups
//! leave it out for a while.

mod answer;
mod client;
mod clock;

pub use answer::TrackerError;
pub use client::NodeIdentity;

use crate::backoff::Backoff;
use crate::lock::{Condvar, Mutex};
use crate::nix::HashPart;
use crate::round_trip::RoundTrip;
use crate::time_scale::{Interval, Timeout};
use crate::wire::filter::{MAX_BITS_PER_PATH, MIN_BITS_PER_PATH};
use crate::wire::tracker::{AnnounceResponse, Candidate, CandidateList};
use client::TrackerClient;
use std::fmt;
use std::thread;
use std::time::{Duration, Instant};
use ureq::Agent;

/// Time limit of a lookup at one tracker. A tracker that restarts is back by then, and a lost
/// packet is repeated twice.
pub const LOOKUP_TIMEOUT: Timeout = Timeout::from_secs(2);
/// First delay before a failed call of a lookup is repeated: the tracker refused or broke the
/// connection, or is overloaded without a `Retry-After`. The delay doubles until the time limit is
/// reached.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Number of failures in a row after which lookups leave the tracker out.
const MAX_FAILURES: u32 = 3;
/// Lifetime of the peer list of an original tracker, which has no lookups. Its peers change within
/// minutes.
const LIST_TTL: Interval = Interval::from_secs(5);

/// Time after the start or a network change during which lookups wait for the tracker's first
/// answer. Nix remembers a wrong *not found* for an hour.
const START_GRACE: Duration = Duration::from_secs(2);

/// Number of silent candidates in one lookup from which on the tracker is suspected instead of the
/// candidates: a site without power, or a hostile tracker.
const MANY_SILENT: usize = 8;
/// Wait for unproven candidates of a suspected tracker, as a multiple of the tracker's own latency:
/// the candidates are probably about as far away.
const LATENCY_FACTOR: u32 = 4;
/// Shortest wait for unproven candidates of a suspected tracker.
const MIN_WAIT: Duration = Duration::from_millis(40);
/// Longest wait for unproven candidates of a suspected tracker.
const MAX_WAIT: Duration = Duration::from_millis(400);
/// Time since the last answer of one of its candidates during which a tracker is not left out.
const USEFUL_WINDOW: Duration = Duration::from_secs(600);
/// First pause of a tracker that is left out. It doubles each time.
const FIRST_PAUSE: Interval = Interval::from_secs(5);
/// Longest pause of a tracker that is left out.
const MAX_PAUSE: Interval = Interval::from_secs(300);

/// One tracker; shared by all threads.
pub struct Tracker {
    client: TrackerClient,
    state: Mutex<TrackerState>,
    changed: Condvar,
    original: Mutex<OriginalPeers>,
}

struct TrackerState {
    /// Whether the tracker is reachable; `None` while its first answer is awaited.
    reached: Option<bool>,
    /// End of the time during which lookups wait for the first answer.
    grace_until: Instant,
    /// Number of failures since the last success.
    failures: u32,
    /// Time when a failed lookup was last counted.
    last_failed_lookup: Option<Instant>,
    /// Number of times that lookups left the tracker out since a lookup succeeded.
    outages: u32,
    /// Pauses during which lookups leave the tracker out, although it is reached.
    pause: Backoff,
    /// End of the pause that the tracker requested.
    retry_at: Option<Instant>,
    /// True if a lookup failed, or found the tracker left out.
    wants_announce: bool,
    registration: Registration,
    suspicion: Suspicion,
}

impl TrackerState {
    /// State of a tracker of which nothing is known. Lookups wait for its first answer.
    fn new(now: Instant) -> Self {
        TrackerState {
            reached: None,
            grace_until: now + START_GRACE,
            failures: 0,
            last_failed_lookup: None,
            outages: 0,
            pause: Backoff::new(FIRST_PAUSE, MAX_PAUSE),
            retry_at: None,
            wants_announce: false,
            registration: Registration::default(),
            suspicion: Suspicion::default(),
        }
    }
}

/// How the tracker answered the announces of this node.
#[derive(Default)]
struct Registration {
    /// Answer to the last accepted announce.
    announced: Option<AnnounceResponse>,
    /// Reason why the last announce was refused.
    refused: Option<String>,
}

/// Whether a tracker names peers that do not exist, judged by how many of its candidates answer.
#[derive(Default)]
struct Suspicion {
    /// Smoothed duration of a lookup.
    latency: RoundTrip,
    /// Time of the last answer of one of its candidates.
    last_useful: Option<Instant>,
    /// Number of lookups in a row with many silent candidates.
    silent_lookups: u32,
    /// Time when `silent_lookups` was last counted. Lookups that ran at the same time count once.
    last_silent_lookup: Option<Instant>,
}

/// Peer list of a tracker without lookups, like the one of the original peerix.
#[derive(Default)]
struct OriginalPeers {
    /// True if the tracker has no lookups.
    is_original: bool,
    /// Last list, and the time when it arrived.
    list: Option<(Instant, Vec<Candidate>)>,
}

impl Tracker {
    /// Creates the state of the tracker at `url`, which must not end with a slash, for the node
    /// `me`.
    pub fn new(url: String, me: &NodeIdentity, now: Instant) -> Self {
        Tracker {
            client: TrackerClient::new(url, me),
            state: Mutex::new(TrackerState::new(now)),
            changed: Condvar::default(),
            original: Mutex::default(),
        }
    }

    /// Calls that do not depend on whether lookups use the tracker.
    pub(super) fn client(&self) -> &TrackerClient {
        &self.client
    }

    /// Base URL.
    pub fn url(&self) -> &str {
        &self.client.url
    }

    /// ID by which the tracker knows this node.
    pub fn peer_id(&self) -> &str {
        &self.client.peer_id
    }

    /// ID that the tracker gave itself; `None` if it has not sent one.
    pub fn id(&self) -> Option<String> {
        self.state.lock().registration.announced.as_ref()?.tracker.clone()
    }

    /// Bits per path that the tracker wants in filters, within the permitted range.
    pub fn bits_per_path(&self) -> u64 {
        let state = self.state.lock();
        let wanted = state.registration.announced.as_ref().and_then(|answer| answer.bits_per_path);
        wanted.map_or(MAX_BITS_PER_PATH, |bits| bits.clamp(MIN_BITS_PER_PATH, MAX_BITS_PER_PATH))
    }

    /// Message why peers cannot find this node through the tracker, with the remedy; `None` if
    /// nothing is known to be wrong.
    pub fn problem(&self) -> Option<String> {
        let state = self.state.lock();
        let Registration { refused, announced } = &state.registration;
        if let Some(why) = refused {
            return Some(format!("tracker {}: does not take this node: {why}", self.url()));
        }
        let announced = announced.as_ref()?;
        if let Some(address) = &announced.also_at {
            return Some(format!(
                "tracker {}: another machine, at {address}, announces itself with this node's identity; remove the file \
                 identity from the state directory of one of them",
                self.url()
            ));
        }
        (announced.reachable == Some(false)).then(|| {
            format!(
                "tracker {}: reaches no peerix at this node's announced address and port, so that peers will not either; \
                 open the port, or set --announce-addr",
                self.url()
            )
        })
    }

    /// Returns true if a lookup should use the tracker. Blocks for 2 s at most, right after the
    /// start or a network change, until it is known whether the tracker is reachable.
    pub fn await_usable(&self) -> bool {
        let state = self.state.lock();
        let grace = state.grace_until.saturating_duration_since(Instant::now());
        let mut state =
            self.changed.wait_timeout_while(state, grace, |state| state.reached.is_none());
        if state.reached != Some(true) {
            state.wants_announce = true;
            return false;
        }
        // After a pause one lookup tries the tracker; the others continue without it.
        state.pause.try_begin(Instant::now())
    }

    /// Returns true if a lookup failed, or found the tracker left out, since the last call of this
    /// function.
    pub fn take_announce_request(&self) -> bool {
        std::mem::take(&mut self.state.lock().wants_announce)
    }

    /// Discards what is known of the tracker, and its connections, because the network changed or
    /// the machine was suspended. Lookups wait for the tracker's next answer.
    pub fn reset(&self, now: Instant) {
        self.client.close_connections();
        *self.original.lock() = OriginalPeers::default();
        let mut state = self.state.lock();
        let registration = std::mem::take(&mut state.registration);
        let suspicion =
            Suspicion { last_useful: state.suspicion.last_useful, ..Suspicion::default() };
        *state = TrackerState { registration, suspicion, ..TrackerState::new(now) };
    }

    /// Longest wait for candidates that have never answered; `None` if there is no such limit.
    pub fn unproven_timeout(&self) -> Option<Duration> {
        let state = self.state.lock();
        let suspicion = &state.suspicion;
        let usual = suspicion.latency.smoothed().unwrap_or_default() * LATENCY_FACTOR;
        (suspicion.silent_lookups > 0).then(|| usual.clamp(MIN_WAIT, MAX_WAIT))
    }

    /// Records how many candidates of a lookup that began at `began` answered and how many were
    /// silent. The tracker has answered that lookup.
    pub fn record_candidates(&self, alive: usize, silent: usize, began: Instant, now: Instant) {
        let mut locked = self.state.lock();
        let TrackerState { pause, suspicion, .. } = &mut *locked;
        if alive > 0 {
            suspicion.last_useful = Some(now);
            pause.reset();
        }
        // Lookups that ran at the same time count once.
        let is_counted = suspicion.last_silent_lookup.is_some_and(|last| last >= began);
        if silent < MANY_SILENT || alive * 4 >= silent {
            if alive > 0 {
                suspicion.silent_lookups = 0;
            }
            // The lookup that tries the tracker after a pause does not suffer from it. One that
            // began before the pause proves nothing.
            if !is_counted {
                pause.reset();
            }
            return;
        }
        if is_counted {
            return;
        }
        suspicion.silent_lookups += 1;
        suspicion.last_silent_lookup = Some(now);
        let is_useful = suspicion
            .last_useful
            .is_some_and(|at| now.saturating_duration_since(at) < USEFUL_WINDOW);
        if suspicion.silent_lookups == 1 {
            drop(locked);
            log::warn!(
                "tracker {}: of the peers that it names, {silent} are silent and {alive} are not",
                self.url()
            );
        } else if !is_useful {
            pause.record_failure(None, now);
            drop(locked);
            log::debug!("tracker {}: left out for a while", self.url());
        }
    }

    /// Returns the peers that may have a path, without this node. Repeats the call while the
    /// tracker restarts or is overloaded. Blocks until `deadline` at most; only a request for the
    /// list of an original tracker can exceed it. `is_hedge` selects a new connection, because the
    /// one of an earlier call is stuck.
    ///
    /// # Errors
    /// See [`TrackerError`]. The caller counts failures with [`Tracker::record_failed_lookup`].
    pub fn lookup(
        &self,
        hash_part: &HashPart,
        is_hedge: bool,
        deadline: Instant,
    ) -> Result<CandidateList, TrackerError> {
        let agent = self.client.lookup_agent(is_hedge);
        let mut retry_pause = RETRY_PAUSE;
        loop {
            let now = Instant::now();
            // A separate statement, because the lock must not be held during the sleep.
            let retry_at = self.state.lock().retry_at;
            if let Some(pause) = retry_at.map(|at| at.saturating_duration_since(now)) {
                if now + pause >= deadline {
                    return Err(TrackerError::Refused(
                        429,
                        "it asked not to be asked yet".into(),
                        Some(pause),
                    ));
                }
                thread::sleep(pause);
            }
            let began = Instant::now();
            let e = match self.look_up_once(
                &agent,
                hash_part,
                deadline.saturating_duration_since(began),
            ) {
                Ok(found) => {
                    self.record_success(began.elapsed());
                    return Ok(found);
                }
                Err(e) => e,
            };
            let now = Instant::now();
            if let Some(pause) = e.retry_after() {
                // A proxy that answers while the tracker restarts only guesses the time.
                let is_ours = matches!(e, TrackerError::Refused(429, ..));
                let max_pause = if is_ours { MAX_PAUSE.get() } else { LOOKUP_TIMEOUT.get() };
                self.state.lock().retry_at = Some(now + pause.min(max_pause));
            } else if e.is_transient() && now + retry_pause < deadline {
                thread::sleep(retry_pause);
                retry_pause *= 2;
                continue;
            }
            if !e.is_transient() || e.retry_after().is_none_or(|pause| now + pause >= deadline) {
                return Err(e);
            }
        }
    }

    fn look_up_once(
        &self,
        agent: &Agent,
        hash_part: &HashPart,
        timeout: Duration,
    ) -> Result<CandidateList, TrackerError> {
        if !self.original.lock().is_original {
            match self.client.lookup(agent, hash_part, timeout) {
                Err(TrackerError::Refused(404 | 405 | 501, ..)) => {}
                answer => return answer,
            }
            self.original.lock().is_original = true;
        }
        Ok(CandidateList { candidates: Vec::new(), others: self.original_peers(agent, timeout)? })
    }

    /// Returns all peers, the best first, of a tracker that does not know which peers have a path.
    fn original_peers(
        &self,
        agent: &Agent,
        timeout: Duration,
    ) -> Result<Vec<Candidate>, TrackerError> {
        if let Some((at, list)) = &self.original.lock().list
            && at.elapsed() < LIST_TTL.get()
        {
            return Ok(list.clone());
        }
        let list = self.client.peers(agent, timeout)?;
        self.original.lock().list = Some((Instant::now(), list.clone()));
        Ok(list)
    }

    /// Announces this node, and records whether the tracker is reachable. Blocks for 10 s at most
    /// per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn announce(&self, me: &NodeIdentity) -> Result<AnnounceResponse, TrackerError> {
        let answer = self.client.announce(me);
        match &answer {
            Ok(announced) => self.record_announce(Ok(announced.clone())),
            // The tracker is reachable and can be used for lookups even if it rejects this node.
            Err(e @ (TrackerError::Refused(400..=428 | 430..500, ..) | TrackerError::Clock(_))) => {
                self.record_announce(Err(e.to_string()))
            }
            Err(TrackerError::Refused(429, ..)) => self.record_reached(),
            Err(e) => self.record_failure(e),
        }
        answer
    }

    /// Records the outcome of an announce that the tracker answered.
    fn record_announce(&self, outcome: Result<AnnounceResponse, String>) {
        let before = self.problem();
        match outcome {
            Ok(mut announced) => {
                // The original tracker sends no ID, so an earlier 404 to a lookup came from a proxy.
                self.original.lock().is_original &= announced.tracker.is_none();
                // A later answer without an ID does not remove the known one.
                let mut state = self.state.lock();
                let last = state.registration.announced.take();
                announced.tracker = announced.tracker.or(last.and_then(|last| last.tracker));
                state.registration = Registration { announced: Some(announced), refused: None };
            }
            Err(why) => self.state.lock().registration.refused = Some(why),
        }
        if let Some(problem) = self.problem().filter(|problem| before.as_ref() != Some(problem)) {
            log::warn!("{problem}");
        }
        self.record_reached();
    }

    fn record_reached(&self) {
        let mut state = self.state.lock();
        let is_news = state.reached.replace(true) != Some(true);
        if is_news {
            // The tracker may run another program now.
            self.original.lock().is_original = false;
            (state.failures, state.retry_at) = (0, None);
        }
        drop(state);
        self.changed.notify_all();
        if is_news {
            log::info!("tracker {}: reached", self.url());
        }
    }

    fn record_success(&self, elapsed: Duration) {
        let mut state = self.state.lock();
        (state.failures, state.outages, state.retry_at) = (0, 0, None);
        if state.suspicion.silent_lookups == 0 {
            state.pause.reset();
        }
        state.suspicion.latency.add(elapsed);
    }

    /// Records a failed lookup that began at `began`. Lookups that ran at the same time count once.
    /// After several failures in a row, lookups leave the tracker out until it is reached again.
    pub fn record_failed_lookup(&self, why: &dyn fmt::Display, began: Instant) {
        let is_counted = {
            let mut state = self.state.lock();
            state.wants_announce = true;
            let is_counted = state.last_failed_lookup.is_some_and(|last| last >= began);
            if !is_counted {
                state.last_failed_lookup = Some(Instant::now());
            }
            is_counted
        };
        if !is_counted {
            self.record_failure(why);
        }
    }

    fn record_failure(&self, why: &dyn fmt::Display) {
        log::debug!("tracker {}: {why}", self.url());
        let mut state = self.state.lock();
        state.failures = state.failures.saturating_add(1);
        if state.reached.is_none_or(|reached| reached && state.failures >= MAX_FAILURES) {
            state.reached = Some(false);
            // Announces may succeed at a tracker whose lookups fail.
            state.outages += 1;
            if state.outages > 1 {
                state.pause.record_failure(None, Instant::now());
            }
            drop(state);
            self.changed.notify_all();
            log::warn!("tracker {}: {why}; left out until it is reached again", self.url());
        }
    }

    /// Returns whether the tracker is reachable; `None` while its first answer is awaited.
    pub fn reached(&self) -> Option<bool> {
        self.state.lock().reached
    }

    /// Returns true if the tracker is known to be reachable.
    pub fn is_reached(&self) -> bool {
        self.state.lock().reached == Some(true)
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_server::{answer, serve};
    use super::*;

    fn tracker(now: Instant) -> Tracker {
        at("http://127.0.0.1:1".into(), now)
    }

    fn at(url: String, now: Instant) -> Tracker {
        Tracker::new(url, &NodeIdentity::for_test(), now)
    }

    /// Lets the current pause end now.
    fn end_pause(tracker: &Tracker) {
        let mut state = tracker.state.lock();
        state.pause = Backoff::new(FIRST_PAUSE, MAX_PAUSE);
        state.pause.record_failure(None, Instant::now() - FIRST_PAUSE.get());
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    fn any_path() -> HashPart {
        HashPart::ZERO
    }

    /// Starts a server that gives these answers on one connection, and returns a tracker that uses
    /// it.
    fn answering(answers: Vec<Vec<u8>>) -> (Tracker, thread::JoinHandle<Vec<(String, String)>>) {
        let (address, server) = serve(answers, false);
        let tracker = at(format!("http://{address}"), Instant::now());
        tracker.record_reached();
        (tracker, server)
    }

    const FOUND: &str =
        r#"{"candidates":[{"peer_id":"b","addr":"10.0.0.1","port":1,"score":0.0}],"others":[]}"#;

    #[test]
    fn failure_between_successes_does_not_exclude_tracker() {
        let tracker = tracker(Instant::now());
        tracker.record_reached();
        for _ in 0..100 {
            for _ in 0..2 {
                let began = Instant::now();
                // As many lookups as Nix runs at once.
                (0..25).for_each(|_| tracker.record_failed_lookup(&TrackerError::Malformed, began));
            }
            assert!(tracker.await_usable());
            tracker.record_success(Duration::ZERO);
        }
        tracker.take_announce_request();
        (0..MAX_FAILURES).for_each(|_| tracker.record_failure(&TrackerError::Malformed));
        assert!(!tracker.await_usable());
        assert!(tracker.take_announce_request() && !tracker.take_announce_request());
        tracker.record_announce(Ok(AnnounceResponse {
            tracker: Some("0123456789abcdef".into()),
            ..AnnounceResponse::default()
        }));
        assert!(tracker.await_usable());
        assert_eq!(tracker.id().as_deref(), Some("0123456789abcdef"));
        // A later answer without an ID does not remove the known one.
        tracker.record_announce(Ok(AnnounceResponse::default()));
        assert!(tracker.id().is_some());
    }

    /// Guards against a pause in which one lookup in five seconds uses the tracker and all others
    /// miss.
    #[test]
    fn success_after_two_outages_ends_pause() {
        let tracker = tracker(Instant::now());
        for _ in 0..2 {
            tracker.record_reached();
            (0..MAX_FAILURES).for_each(|_| tracker.record_failure(&TrackerError::Malformed));
        }
        tracker.record_reached();
        assert!(!tracker.await_usable(), "an announce succeeds at a tracker whose lookups fail");
        end_pause(&tracker);
        assert!(tracker.await_usable() && !tracker.await_usable(), "one tries");
        tracker.record_success(Duration::ZERO);
        assert!(tracker.await_usable() && tracker.await_usable());
    }

    #[test]
    fn first_failure_after_start_ends_wait() {
        let tracker = tracker(Instant::now());
        tracker.record_failure(&TrackerError::Malformed);
        assert!(!tracker.await_usable());
        assert_eq!(tracker.reached(), Some(false));
        tracker.reset(Instant::now());
        assert_eq!(tracker.reached(), None);
    }

    #[test]
    fn announce_problem_is_reported_until_resolved() {
        let tracker = tracker(Instant::now());
        assert_eq!(tracker.problem(), None);
        tracker.record_announce(Err("status 403 bound to another key".into()));
        assert!(tracker.problem().unwrap().contains("bound to another key"));
        assert!(tracker.is_reached());
        tracker.record_announce(Ok(AnnounceResponse {
            reachable: Some(false),
            ..AnnounceResponse::default()
        }));
        assert!(tracker.problem().unwrap().contains("--announce-addr"));
        tracker.record_announce(Ok(AnnounceResponse {
            also_at: Some("192.0.2.7".into()),
            ..AnnounceResponse::default()
        }));
        assert!(tracker.problem().unwrap().contains("192.0.2.7"));
        tracker.record_announce(Ok(AnnounceResponse {
            reachable: Some(true),
            ..AnnounceResponse::default()
        }));
        assert_eq!(tracker.problem(), None);
    }

    #[test]
    fn overloaded_tracker_is_asked_again_after_retry_after() {
        let (tracker, server) = answering(vec![
            answer("429 x", "{}"),
            answer("429 x\r\nRetry-After: 1", "{}"),
            answer("503 x", "{}"),
            answer("200 x", FOUND),
        ]);
        let began = Instant::now();
        assert_eq!(tracker.lookup(&any_path(), false, soon()).unwrap().candidates.len(), 1);
        assert!(began.elapsed() >= Duration::from_secs(1), "Retry-After was not obeyed");
        assert!(tracker.is_reached());
        server.join().unwrap();
    }

    #[test]
    fn retry_after_beyond_deadline_is_not_awaited() {
        let (tracker, server) = answering(vec![answer("429 x\r\nRetry-After: 3600", "{}")]);
        let e = tracker.lookup(&any_path(), false, soon()).unwrap_err();
        assert_eq!(e.retry_after(), Some(Duration::from_secs(3600)));
        server.join().unwrap();
    }

    #[test]
    fn original_tracker_is_asked_for_peer_list() {
        let list = r#"{"peers":[
            {"peer_id":"b","addr":"10.0.0.1","port":1,"last_seen":1.5,"reputation":{"score":0.5}},
            {"peer_id":"me","addr":"10.0.0.2","port":1,"last_seen":1.5,"reputation":{"score":9.5}},
            {"peer_id":"c","addr":"10.0.0.3","port":1,"last_seen":1.5,"reputation":{"score":1.5}}]}"#;
        let (tracker, server) =
            answering(vec![answer("404 x", r#"{"detail":"Not Found"}"#), answer("200 x", list)]);
        for _ in 0..3 {
            let found = tracker.lookup(&any_path(), false, soon()).unwrap();
            assert!(found.candidates.is_empty());
            let named: Vec<&str> = found.others.iter().map(|peer| &*peer.peer_id).collect();
            assert_eq!(named, ["c", "b"], "the best first, and not this node");
        }
        let requests = server.join().unwrap();
        assert!(
            requests[0].0.starts_with("GET /lookup/") && requests[1].0.starts_with("GET /peers "),
            "{requests:?}"
        );
    }

    #[test]
    fn tracker_with_only_silent_candidates_is_paused() {
        let now = Instant::now();
        let tracker = tracker(now);
        tracker.record_reached();
        tracker.record_candidates(0, MANY_SILENT - 1, now, now);
        assert_eq!(tracker.unproven_timeout(), None);
        let later = now + Duration::from_secs(2);
        for _ in 0..25 {
            tracker.record_candidates(0, MANY_SILENT, now, later);
        }
        // One such lookup may be an accident: only dead peers seemed to have the path.
        assert!(tracker.await_usable());
        assert_eq!(tracker.unproven_timeout(), Some(MIN_WAIT));
        let again = later + MIN_WAIT;
        tracker.record_candidates(0, MANY_SILENT, later + Duration::from_millis(1), again);
        assert_eq!(tracker.state.lock().pause.due(), Some(again + FIRST_PAUSE.get()));
        assert!(!tracker.await_usable());
        end_pause(&tracker);
        assert!(tracker.await_usable(), "one tries again");
        assert!(!tracker.await_usable(), "the others do not wait for it");
        tracker.record_candidates(
            0,
            MANY_SILENT,
            again + FIRST_PAUSE.get(),
            again + FIRST_PAUSE.get(),
        );
        assert_eq!(tracker.state.lock().pause.due(), Some(again + FIRST_PAUSE.get() * 3));
        tracker.record_candidates(1, 0, again, again);
        assert!(tracker.await_usable() && tracker.await_usable());
        assert_eq!(tracker.unproven_timeout(), None);
    }

    /// Guards against wrong misses without an end: with nobody to ask, nobody answers.
    #[test]
    fn lookup_after_pause_that_finds_few_silent_candidates_ends_it() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        for silent in [0, MANY_SILENT - 1] {
            let tracker = tracker(now);
            tracker.record_reached();
            for i in 1..=2 {
                tracker.record_candidates(0, MANY_SILENT, now + second * i, now + second * i);
            }
            assert!(!tracker.await_usable());
            // A lookup that began before the pause.
            tracker.record_candidates(0, silent, now + second, now + second * 3);
            assert!(!tracker.await_usable());
            end_pause(&tracker);
            assert!(tracker.await_usable() && !tracker.await_usable(), "one tries");
            tracker.record_candidates(0, silent, now + second * 9, now + second * 9);
            assert!(tracker.await_usable() && tracker.await_usable());
            assert!(tracker.unproven_timeout().is_some(), "nobody has answered");
        }
    }

    /// Guards against eight machines without power that hide all other peers of the tracker.
    #[test]
    fn recently_useful_tracker_is_not_paused() {
        let (now, second) = (Instant::now(), Duration::from_secs(1));
        let tracker = tracker(now);
        tracker.record_reached();
        tracker.record_candidates(1, 3, now, now);
        for i in 1..100 {
            tracker.record_candidates(0, MANY_SILENT, now + second * i, now + second * i);
            assert!(tracker.await_usable() && tracker.await_usable());
        }
        assert!(tracker.unproven_timeout().is_some());
        // A few candidates that answer do not outweigh many that do not.
        tracker.record_candidates(1, 2 * MANY_SILENT, now + second * 101, now + second * 101);
        assert!(tracker.unproven_timeout().is_some());
        tracker.record_candidates(4, 2 * MANY_SILENT, now + second * 102, now + second * 102);
        assert!(tracker.unproven_timeout().is_none());
        for i in 800..802 {
            tracker.record_candidates(0, MANY_SILENT, now + second * i, now + second * i);
        }
        assert!(!tracker.await_usable());
    }

    #[test]
    fn wait_for_unproven_candidates_follows_tracker_latency() {
        let now = Instant::now();
        let tracker = tracker(now);
        tracker.record_candidates(0, MANY_SILENT, now, now);
        for (millis, wait) in [(1, 40), (30, 120), (500, 400)] {
            let mut latency = RoundTrip::default();
            latency.add(Duration::from_millis(millis));
            tracker.state.lock().suspicion.latency = latency;
            assert_eq!(tracker.unproven_timeout(), Some(Duration::from_millis(wait)));
        }
    }
}
