//! State of one tracker: its calls, by blocking ureq, and whether lookups currently use it.
//!
//! Lookups leave a tracker out after several failures in a row, until the announce thread has
//! reached it again. If many candidates of a tracker are silent, lookups wait less for those of its
//! candidates that have never answered. If none of its candidates has answered recently, lookups
//! leave it out for a while.

use crate::backoff::{Backoff, retry_after};
use crate::http_client::{self, retry_once_if_stale};
use crate::lock::{Condvar, Mutex, RwLock};
use crate::nix::HashPart;
use crate::round_trip::RoundTrip;
use crate::time_scale::{Interval, Timeout};
use crate::wire::filter::{BloomFilter, MAX_BITS_PER_PATH, MIN_BITS_PER_PATH};
use crate::wire::tracker::{
    Announce, AnnounceResponse, Candidate, CandidateList, Identity, KEY_HEADER, MAX_CANDIDATES,
    MAX_OTHERS, Proof, Role, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER, TransferInit,
    TransferInitResponse, TransferReportBody, lookup_target,
};
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use std::fmt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use ureq::Agent;
use ureq::http::{Response, Uri};

/// Time limit of a lookup at one tracker. A tracker that restarts is back by then, and a lost
/// packet is repeated twice.
pub const LOOKUP_TIMEOUT: Timeout = Timeout::from_secs(2);
/// First delay before a failed call of a lookup is repeated: the tracker refused or broke the
/// connection, or is overloaded without a `Retry-After`. The delay doubles until the time limit is
/// reached.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Number of failures in a row after which lookups leave the tracker out.
const MAX_FAILURES: u32 = 3;
/// Time limit of a call outside of lookups. No request of Nix waits for such a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of the upload of a filter, which has up to 4 MiB.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of the sign-off, which delays the end of the daemon.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(700);

/// Largest answer, in bytes; a larger one is malformed. 72 candidates with the longest IDs and
/// names take 30 KiB. The list of 1,000 peers of the original peerix takes 250 KiB.
const MAX_ANSWER_BYTES: u64 = 512 * 1024;
/// Largest number of idle connections: as many as Nix runs lookups.
const MAX_IDLE: usize = 25;
/// Age after which an idle connection is closed. Trackers close theirs after 30 s.
const MAX_IDLE_AGE: Timeout = Timeout::from_secs(25);
/// Lifetime of the peer list of an original tracker, which has no lookups. Its peers change within
/// minutes.
const LIST_TTL: Interval = Interval::from_secs(5);

/// Time after the start or a network change during which lookups wait for the tracker's first
/// answer. Nix remembers a wrong *not found* for an hour.
const START_GRACE: Duration = Duration::from_secs(2);

/// Largest accepted difference between the tracker's clock and this machine's, in milliseconds.
/// Nothing is signed beyond it: a tracker that could choose the time would get statements for later
/// use.
const MAX_CLOCK_OFFSET_MS: u64 = 5 * 60 * 1000;

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

/// This node as trackers know it.
#[derive(Debug)]
pub struct NodeIdentity {
    /// The node's key, from which a separate key for each tracker is derived.
    pub identity: Arc<Identity>,
    /// Peer ID that the user chose; without one, the key for the tracker determines it.
    pub peer_id: Option<String>,
    /// Port of the node's HTTP server.
    pub port: u16,
    /// Address to announce, if it differs from the one that the tracker sees.
    pub addr: Option<String>,
    /// Random number of this run of the daemon.
    pub instance: u64,
}

#[cfg(test)]
impl NodeIdentity {
    /// A node with the peer ID `me`.
    pub fn for_test() -> Self {
        let identity = Identity::from_seed(&[1; 32]).into();
        NodeIdentity { identity, peer_id: Some("me".into()), port: 1, addr: None, instance: 1 }
    }
}

/// Error of a call.
#[derive(Debug)]
pub enum TrackerError {
    /// No connection, no answer in time, or the connection broke.
    Unreachable(ureq::Error),
    /// A status other than 200, the tracker's message, and its `Retry-After`.
    Refused(u16, String, Option<Duration>),
    /// The answer violates its format.
    Malformed,
    /// The tracker's clock is this many milliseconds ahead of this machine's, which is more than
    /// the accepted difference.
    Clock(i64),
}

impl TrackerError {
    /// Returns true if the same call may succeed later: the tracker is unreachable or overloaded.
    pub fn is_temporary(&self) -> bool {
        matches!(self, TrackerError::Unreachable(_) | TrackerError::Refused(429 | 500.., ..))
    }

    /// Time after which the tracker wants the next call, if it sent `Retry-After`.
    pub fn retry_after(&self) -> Option<Duration> {
        if let TrackerError::Refused(_, _, retry_after) = self { *retry_after } else { None }
    }

    /// Returns true if a lookup may try again at once: the tracker restarts, or the connection
    /// broke.
    fn is_transient(&self) -> bool {
        self.is_temporary() && !matches!(self, TrackerError::Unreachable(ureq::Error::Timeout(_)))
    }
}

impl fmt::Display for TrackerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrackerError::Unreachable(e) => write!(f, "{e}"),
            TrackerError::Refused(status, why, _) => write!(f, "status {status} {why}"),
            TrackerError::Malformed => f.write_str("its answer is none of a tracker"),
            TrackerError::Clock(ahead) => {
                let (seconds, direction) = (ahead / 1000, if *ahead > 0 { "slow" } else { "fast" });
                write!(
                    f,
                    "this machine's clock is {} s {direction} by the tracker's; set it",
                    seconds.abs()
                )
            }
        }
    }
}

impl std::error::Error for TrackerError {}

/// One tracker; shared by all threads.
pub struct Tracker {
    url: String,
    peer_id: String,
    identity: Identity,
    /// HTTP client with kept connections.
    agent: RwLock<Agent>,
    /// HTTP client without kept connections, for a call while the kept ones may be dead.
    unpooled: Agent,
    state: Mutex<TrackerConnection>,
    changed: Condvar,
    clock: Mutex<SigningClock>,
    cached_list: Mutex<Option<(Instant, Vec<Candidate>)>>,
}

struct TrackerConnection {
    /// Whether the tracker is reachable; `None` while its first answer is awaited.
    reached: Option<bool>,
    /// End of the time during which lookups wait for the first answer.
    grace_until: Instant,
    /// Number of failures since the last success.
    failures: u32,
    /// True if a lookup failed, or found the tracker left out.
    wants_announce: bool,
    /// Time when a failed lookup was last counted.
    last_failed_lookup: Option<Instant>,
    /// Number of times that lookups left the tracker out since a lookup succeeded.
    outages: u32,
    /// End of the pause that the tracker requested.
    retry_at: Option<Instant>,
    /// True if the tracker has no lookups, like the one of the original peerix.
    is_original: bool,
    /// Answer to the last accepted announce.
    announced: Option<AnnounceResponse>,
    /// Reason why the last announce was refused.
    refused: Option<String>,
    /// Smoothed duration of a lookup.
    latency: RoundTrip,
    /// Time of the last answer of one of its candidates.
    last_useful: Option<Instant>,
    /// Number of lookups in a row with many silent candidates.
    silent_lookups: u32,
    /// Time when `silent_lookups` was last counted. Lookups that ran at the same time count once.
    last_silent_lookup: Option<Instant>,
    /// Pauses during which lookups leave the tracker out, although it is reached.
    pause: Backoff,
}

impl TrackerConnection {
    /// State of a tracker of which nothing is known. Lookups wait for its first answer.
    fn new(now: Instant) -> Self {
        TrackerConnection {
            reached: None,
            grace_until: now + START_GRACE,
            failures: 0,
            wants_announce: false,
            last_failed_lookup: None,
            outages: 0,
            retry_at: None,
            is_original: false,
            announced: None,
            refused: None,
            latency: RoundTrip::default(),
            last_useful: None,
            silent_lookups: 0,
            last_silent_lookup: None,
            pause: Backoff::new(FIRST_PAUSE, MAX_PAUSE),
        }
    }
}

/// Clock for the timestamps of statements. Each timestamp is later than the one before, and follows
/// the tracker's clock if this machine's is slightly wrong.
#[derive(Default)]
struct SigningClock {
    /// Milliseconds to add to this machine's clock.
    offset: i64,
    last: u64,
}

#[derive(Deserialize, Default)]
struct ServerRefusal {
    error: Option<String>,
    now: Option<u64>,
}

impl Tracker {
    /// Creates the state of the tracker at `url`, which must not end with a slash, for the node
    /// `me`.
    pub fn new(url: String, me: &NodeIdentity, now: Instant) -> Self {
        let identity = me.identity.for_tracker(&authority(&url));
        let peer_id = me.peer_id.clone().unwrap_or_else(|| identity.peer_id());
        Tracker {
            url,
            peer_id,
            identity,
            agent: RwLock::new(agent(MAX_IDLE)),
            unpooled: agent(0),
            state: Mutex::new(TrackerConnection::new(now)),
            changed: Condvar::default(),
            clock: Mutex::default(),
            cached_list: Mutex::default(),
        }
    }

    /// Base URL.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// ID by which the tracker knows this node.
    pub fn peer_id(&self) -> &str {
        &self.peer_id
    }

    /// ID that the tracker gave itself; `None` if it has not sent one.
    pub fn id(&self) -> Option<String> {
        self.state.lock().announced.as_ref()?.tracker.clone()
    }

    /// Bits per path that the tracker wants in filters, within the permitted range.
    pub fn bits_per_path(&self) -> u64 {
        let bits_per_path =
            self.state.lock().announced.as_ref().and_then(|announced| announced.bits_per_path);
        bits_per_path
            .map_or(MAX_BITS_PER_PATH, |bits| bits.clamp(MIN_BITS_PER_PATH, MAX_BITS_PER_PATH))
    }

    /// Message why peers cannot find this node through the tracker, with the remedy; `None` if
    /// nothing is known to be wrong.
    pub fn problem(&self) -> Option<String> {
        let state = self.state.lock();
        if let Some(why) = &state.refused {
            return Some(format!("tracker {}: does not take this node: {why}", self.url));
        }
        let announced = state.announced.as_ref()?;
        if let Some(address) = &announced.also_at {
            return Some(format!(
                "tracker {}: another machine, at {address}, announces itself with this node's identity; remove the file \
                 identity from the state directory of one of them",
                self.url
            ));
        }
        (announced.reachable == Some(false)).then(|| {
            format!(
                "tracker {}: reaches no peerix at this node's announced address and port, so that peers will not either; \
                 open the port, or set --announce-addr",
                self.url
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
        *self.agent.write() = agent(MAX_IDLE);
        *self.cached_list.lock() = None;
        let mut state = self.state.lock();
        let (announced, refused, last_useful) =
            (state.announced.take(), state.refused.take(), state.last_useful);
        *state =
            TrackerConnection { announced, refused, last_useful, ..TrackerConnection::new(now) };
    }

    /// Longest wait for candidates that have never answered; `None` if there is no such limit.
    pub fn unproven_timeout(&self) -> Option<Duration> {
        let state = self.state.lock();
        let usual = state.latency.smoothed().unwrap_or_default() * LATENCY_FACTOR;
        (state.silent_lookups > 0).then(|| usual.clamp(MIN_WAIT, MAX_WAIT))
    }

    /// Records how many candidates of a lookup that began at `began` answered and how many were
    /// silent. The tracker has answered that lookup.
    pub fn record_candidates(&self, alive: usize, silent: usize, began: Instant, now: Instant) {
        let mut state = self.state.lock();
        if alive > 0 {
            state.last_useful = Some(now);
            state.pause.reset();
        }
        if silent < MANY_SILENT || alive * 4 >= silent {
            if alive > 0 {
                state.silent_lookups = 0;
            }
            // The lookup that tries the tracker after a pause does not suffer from it. One that
            // began before the pause proves nothing.
            if state.last_silent_lookup.is_none_or(|last_silent_lookup| last_silent_lookup < began)
            {
                state.pause.reset();
            }
            return;
        }
        // Lookups that ran at the same time count once.
        if state.last_silent_lookup.is_some_and(|last_silent_lookup| last_silent_lookup >= began) {
            return;
        }
        state.silent_lookups += 1;
        state.last_silent_lookup = Some(now);
        let is_useful =
            state.last_useful.is_some_and(|at| now.saturating_duration_since(at) < USEFUL_WINDOW);
        if state.silent_lookups == 1 {
            drop(state);
            log::warn!(
                "tracker {}: of the peers that it names, {silent} are silent and {alive} are not",
                self.url
            );
        } else if !is_useful {
            state.pause.record_failure(None, now);
            drop(state);
            log::debug!("tracker {}: left out for a while", self.url);
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
        let agent = if is_hedge { self.unpooled.clone() } else { self.agent() };
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
        if self.state.lock().is_original {
            return self.original_list(agent, timeout);
        }
        let answer =
            self.get(agent, &lookup_target(hash_part), timeout).and_then(read::<CandidateList>);
        if let Err(TrackerError::Refused(404 | 405 | 501, ..)) = answer {
            self.state.lock().is_original = true;
            return self.original_list(agent, timeout);
        }
        let mut found = answer?;
        found.candidates.truncate(MAX_CANDIDATES);
        found.others.truncate(MAX_OTHERS);
        for list in [&mut found.candidates, &mut found.others] {
            list.retain(|candidate| candidate.peer_id != self.peer_id);
        }
        Ok(found)
    }

    /// Returns all peers, the best first, of a tracker that does not know which peers have a path.
    fn original_list(
        &self,
        agent: &Agent,
        timeout: Duration,
    ) -> Result<CandidateList, TrackerError> {
        let cached_list = || self.cached_list.lock();
        let known = cached_list()
            .as_ref()
            .filter(|(at, _)| at.elapsed() < LIST_TTL.get())
            .map(|(_, list)| list.clone());
        let others = match known {
            Some(others) => others,
            None => {
                let answer: Value = self.get(agent, "/peers", timeout).and_then(read)?;
                let candidate = |peer: &Value| {
                    let text = |field: &str| peer[field].as_str().map(str::to_owned);
                    let port = u16::try_from(peer["port"].as_u64()?).ok()?;
                    let score = peer["reputation"]["score"].as_f64().unwrap_or_default();
                    Some(Candidate { peer_id: text("peer_id")?, addr: text("addr")?, port, score })
                };
                let peers = answer["peers"].as_array().ok_or(TrackerError::Malformed)?;
                let mut others: Vec<Candidate> = peers.iter().filter_map(candidate).collect();
                others.retain(|peer| peer.peer_id != self.peer_id);
                others.sort_by(|a, b| b.score.total_cmp(&a.score));
                others.truncate(MAX_CANDIDATES);
                *cached_list() = Some((Instant::now(), others.clone()));
                others
            }
        };
        Ok(CandidateList { candidates: Vec::new(), others })
    }

    fn get(
        &self,
        agent: &Agent,
        path: &str,
        timeout: Duration,
    ) -> Result<Response<ureq::Body>, TrackerError> {
        let url = format!("{}{path}", self.url);
        let call = |left| agent.get(&url).config().timeout_global(Some(left)).build().call();
        retry_once_if_stale(timeout, call).map_err(TrackerError::Unreachable)
    }

    /// Announces this node, and records whether the tracker is reachable. Blocks for 10 s at most
    /// per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn announce(&self, me: &NodeIdentity) -> Result<AnnounceResponse, TrackerError> {
        let addr = me.addr.as_deref().unwrap_or_default();
        let signed_text = SignedText::Announce { peer_id: &self.peer_id, port: me.port, addr };
        let answer: Result<AnnounceResponse, TrackerError> =
            self.send_signed(&signed_text, |proof| {
                let announce = Announce {
                    peer_id: Some(self.peer_id.clone()),
                    port: Some(me.port),
                    addr: me.addr.clone(),
                    instance: Some(me.instance),
                    proof,
                };
                self.post("/announce", &announce)
            });
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

    /// Signs off at the tracker. Blocks for 700 ms at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn leave(&self) -> Result<(), TrackerError> {
        self.send_signed(&SignedText::Leave { peer_id: &self.peer_id }, |proof| {
            let body =
                Announce { peer_id: Some(self.peer_id.clone()), proof, ..Announce::default() };
            self.agent()
                .delete(format!("{}/announce", self.url))
                .header("Content-Type", "application/json")
                .config()
                .timeout_global(Some(LEAVE_TIMEOUT))
                .build()
                .force_send_body()
                .send(json(&body))
        })
        .map(|_: IgnoredAny| ())
    }

    /// Uploads the filter of shared paths and returns the timestamp by which the tracker identifies
    /// it. Blocks for 60 s at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn put_filter(&self, filter: &BloomFilter) -> Result<u64, TrackerError> {
        let digest = ring::digest::digest(&ring::digest::SHA256, filter.as_bytes());
        let signed_text = SignedText::Filter { peer_id: &self.peer_id, digest: digest.as_ref() };
        let id = percent_encoding::utf8_percent_encode(
            &self.peer_id,
            percent_encoding::NON_ALPHANUMERIC,
        );
        let url = format!("{}/filter/{id}", self.url);
        let mut timestamp = 0;
        let answer: Result<IgnoredAny, TrackerError> = self.send_signed(&signed_text, |proof| {
            timestamp = proof.timestamp.unwrap_or_default();
            self.agent()
                .put(&url)
                .header(KEY_HEADER, proof.public_key.unwrap_or_default())
                .header(TIMESTAMP_HEADER, timestamp.to_string())
                .header(SIGNATURE_HEADER, proof.signature.unwrap_or_default())
                .config()
                .timeout_global(Some(UPLOAD_TIMEOUT))
                .build()
                .send(filter.as_bytes())
        });
        answer.map(|_| timestamp)
    }

    /// Begins up to `count` transfers from the peer `sender_id` to this node. Returns the first ID
    /// and the number of transfers, which have consecutive IDs. Blocks for 10 s at most.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn begin_transfers(&self, sender_id: &str, count: u32) -> Result<(u64, u32), TrackerError> {
        let init = TransferInit {
            sender_id: Some(sender_id.to_owned()),
            receiver_id: Some(self.peer_id.clone()),
            count: Some(count),
        };
        let response: TransferInitResponse =
            self.post("/transfer/init", &init).map_err(TrackerError::Unreachable).and_then(read)?;
        // The original tracker begins one transfer regardless of `count`.
        Ok((response.transfer_id, response.count.unwrap_or(1).min(count)))
    }

    /// Reports the bytes that this node sent or received. Blocks for 10 s at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn report(&self, transfer_id: u64, role: Role, bytes: u64) -> Result<(), TrackerError> {
        let signed_text =
            SignedText::Report { transfer_id, peer_id: &self.peer_id, role: role.as_str(), bytes };
        self.send_signed(&signed_text, |proof| {
            let report = TransferReportBody {
                transfer_id: Some(transfer_id),
                peer_id: Some(self.peer_id.clone()),
                role: Some(role.as_str().to_owned()),
                bytes: Some(bytes),
                proof,
            };
            self.post("/report", &report)
        })
        .map(|_: IgnoredAny| ())
    }

    fn agent(&self) -> Agent {
        self.agent.read().clone()
    }

    fn post(
        &self,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        self.agent()
            .post(format!("{}{path}", self.url))
            .header("Content-Type", "application/json")
            .send(json(body))
    }

    /// Signs and sends a statement. Repeats it once with the tracker's time if the tracker rejects
    /// the timestamp and its clock differs only slightly.
    fn send_signed<T: DeserializeOwned>(
        &self,
        signed_text: &SignedText<'_>,
        mut send: impl FnMut(Proof) -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<T, TrackerError> {
        let mut send = || {
            send(self.identity.sign(signed_text, self.timestamp()))
                .map_err(TrackerError::Unreachable)
        };
        let response = send()?;
        if response.status() != 403 {
            return read(response);
        }
        let refusal: ServerRefusal = body(response).unwrap_or_default();
        match refusal.now {
            Some(now) => {
                self.set_clock(now)?;
                read(send()?)
            }
            None => Err(TrackerError::Refused(403, refusal.error.unwrap_or_default(), None)),
        }
    }

    fn timestamp(&self) -> u64 {
        let mut clock = self.clock.lock();
        clock.last =
            unix_time_ms().saturating_add_signed(clock.offset).max(clock.last.saturating_add(1));
        clock.last
    }

    /// Adopts the tracker's time `now`, in milliseconds since 1970, for further statements.
    ///
    /// # Errors
    /// [`TrackerError::Clock`] if it differs from this machine's time by more than 5 min.
    fn set_clock(&self, now: u64) -> Result<(), TrackerError> {
        let offset =
            i64::try_from(i128::from(now) - i128::from(unix_time_ms())).unwrap_or(i64::MAX);
        if offset.unsigned_abs() > MAX_CLOCK_OFFSET_MS {
            return Err(TrackerError::Clock(offset));
        }
        *self.clock.lock() = SigningClock { offset, last: 0 };
        log::debug!("tracker {}: its clock is {offset} ms ahead of ours", self.url);
        Ok(())
    }

    /// Records the outcome of an announce that the tracker answered.
    fn record_announce(&self, outcome: Result<AnnounceResponse, String>) {
        let before = self.problem();
        {
            let mut state = self.state.lock();
            match outcome {
                Ok(mut announced) => {
                    // The original tracker sends no ID, so an earlier 404 to a lookup came from a
                    // proxy.
                    state.is_original &= announced.tracker.is_none();
                    // A later answer without an ID does not remove the known one.
                    announced.tracker =
                        announced.tracker.or(state.announced.take().and_then(|last| last.tracker));
                    (state.announced, state.refused) = (Some(announced), None);
                }
                Err(why) => state.refused = Some(why),
            }
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
            (state.is_original, state.failures, state.retry_at) = (false, 0, None);
        }
        drop(state);
        self.changed.notify_all();
        if is_news {
            log::info!("tracker {}: reached", self.url);
        }
    }

    fn record_success(&self, elapsed: Duration) {
        let mut state = self.state.lock();
        (state.failures, state.outages, state.retry_at) = (0, 0, None);
        if state.silent_lookups == 0 {
            state.pause.reset();
        }
        state.latency.add(elapsed);
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
        log::debug!("tracker {}: {why}", self.url);
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
            log::warn!("tracker {}: {why}; left out until it is reached again", self.url);
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

/// Creates a client that keeps up to `idle` connections.
fn agent(idle: usize) -> Agent {
    http_client::https_config()
        .timeout_global(Some(CALL_TIMEOUT))
        .max_idle_connections(idle)
        .max_idle_connections_per_host(idle)
        .max_idle_age(MAX_IDLE_AGE.get())
        .build()
        .into()
}

/// Host and port of a URL; the whole text if it is not a valid URL.
fn authority(url: &str) -> String {
    let Ok(uri) = url.parse::<Uri>() else { return url.to_owned() };
    let port = uri.port_u16().unwrap_or(if uri.scheme_str() == Some("https") { 443 } else { 80 });
    format!("{}:{port}", uri.host().unwrap_or_default().to_ascii_lowercase())
}

/// Milliseconds since 1970 by this machine's clock, which may be wrong.
fn unix_time_ms() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn json(body: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("text and numbers are JSON")
}

fn body<T: DeserializeOwned>(response: Response<ureq::Body>) -> Option<T> {
    let bytes =
        response.into_body().into_with_config().limit(MAX_ANSWER_BYTES).read_to_vec().ok()?;
    serde_json::from_slice(&bytes).ok()
}

fn read<T: DeserializeOwned>(response: Response<ureq::Body>) -> Result<T, TrackerError> {
    match response.status().as_u16() {
        200 => body(response).ok_or(TrackerError::Malformed),
        status => {
            let retry_after = retry_after(response.headers());
            let why = body::<ServerRefusal>(response)
                .and_then(|refusal| refusal.error)
                .unwrap_or_default();
            Err(TrackerError::Refused(status, why, retry_after))
        }
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
        HashPart::parse(&[b'0'; 32]).unwrap()
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
    fn authority_is_host_and_port_of_url() {
        for (url, name) in [
            ("http://Tracker.example:12305", "tracker.example:12305"),
            ("https://tracker.example", "tracker.example:443"),
            ("http://tracker.example/path", "tracker.example:80"),
            ("http://[2001:db8::1]:9", "[2001:db8::1]:9"),
        ] {
            assert_eq!(authority(url), name);
        }
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
            tracker.state.lock().latency = latency;
            assert_eq!(tracker.unproven_timeout(), Some(Duration::from_millis(wait)));
        }
    }

    #[test]
    fn timestamps_increase_and_follow_tracker_clock() {
        let tracker = tracker(Instant::now());
        let stamps: Vec<u64> = (0..100).map(|_| tracker.timestamp()).collect();
        assert!(stamps.windows(2).all(|pair| pair[0] < pair[1]));
        for ahead in [-240_000, 240_000] {
            let now = unix_time_ms().saturating_add_signed(ahead);
            tracker.set_clock(now).unwrap();
            assert!(tracker.timestamp().abs_diff(now) < 60_000);
        }
    }

    #[test]
    fn tracker_clock_far_from_own_is_rejected() {
        let tracker = tracker(Instant::now());
        for now in [0, unix_time_ms() - 3_600_000, unix_time_ms() + 3_600_000, u64::MAX] {
            let Err(TrackerError::Clock(_)) = tracker.set_clock(now) else { panic!("{now}") };
            assert!(tracker.timestamp().abs_diff(unix_time_ms()) < 60_000);
        }
        assert!(TrackerError::Clock(3_600_000).to_string().contains("3600 s slow"));
    }
}
