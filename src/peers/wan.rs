//! Peers on other networks: finds a holder of a path among the peers that trackers name.
//!
//! All trackers are asked at once. A tracker that is slow is asked again on a new connection. The
//! candidates are asked over HTTP as soon as the first tracker names them, or their host names are
//! resolved: four at once, and twice as many after each 100 ms without a good narinfo. A path is a
//! miss when all candidates have denied it. The whole search ends after 4 s.

use super::announce::{PendingTransferName, Trackers};
use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::health::{Eligibility, PeerHealth, PeerKey};
use super::request_pool::{RequestPool, RequestTarget};
use super::tracker::{self, Tracker};
use crate::backoff;
use crate::connect_rate::{ConnectDecision, ConnectRate};
use crate::lan::{Holder, LOOKUP_TIMEOUT};
use crate::lock::Mutex;
use crate::network::Networks;
use crate::nix::HashPart;
use crate::resolver::{NameResolver, parse_address};
use crate::time_scale::Timeout;
use crate::wire::tracker::{
    Candidate, CandidateList, MAX_ADDR, Role, TransferName, can_be_peer, is_peer_id,
};
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Time limit of a search on other networks. It covers the restart of a tracker, and after that a
/// connection to a peer that loses a packet twice.
const WAN_TIMEOUT: Timeout = Timeout::from_secs(4);
/// Delay after which a tracker is asked again on another connection. Most trackers answer sooner.
/// The kernel repeats a lost packet after 200 ms on an established connection, but only after 1 s
/// on a new one.
const HEDGE_DELAY: Duration = Duration::from_millis(300);
/// Candidates that are asked at first.
const AT_ONCE: usize = 4;
/// Time without a good narinfo after which further candidates are asked.
const WAVE: Duration = Duration::from_millis(100);
/// Longest wait for a candidate that failed recently.
const SLOW: Duration = Duration::from_millis(500);
/// Longest wait for the addresses of the host names in one list of candidates.
const NAMES_WAIT: Duration = Duration::from_millis(500);
/// Delay before the next attempt of a request that other requests block.
const BLOCKED: Duration = Duration::from_millis(10);
/// First delay before a proven candidate that is busy or restarts is asked again. The delay
/// doubles up to [`MAX_RETRY_DELAY`].
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// Longest delay before such a candidate is asked again.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(800);
/// Delay before the next attempt at an address whose connection rate is used up: the interval at
/// which that rate admits connections. Also the longest wait for such an address if none of its
/// candidates has ever answered, as many ports of one victim do not.
const PACE_DELAY: Duration = Duration::from_millis(200);
/// Longest wait for an address whose connection rate is used up, if another candidate there
/// answers. There are several nodes behind one router.
const PACE_WAIT: Duration = Duration::from_millis(600);

/// Finds and asks the peers on other networks.
pub struct WanSource {
    trackers: Arc<Trackers>,
    client: Arc<PeerClient>,
    health: Arc<PeerHealth>,
    networks: Arc<Networks>,
    names: Arc<NameResolver>,
    requests: Arc<RequestPool>,
    pace: Mutex<ConnectRate>,
}

impl WanSource {
    /// Creates a source from its parts.
    pub fn new(
        trackers: Arc<Trackers>,
        client: Arc<PeerClient>,
        health: Arc<PeerHealth>,
        networks: Arc<Networks>,
        requests: Arc<RequestPool>,
    ) -> Self {
        WanSource {
            trackers,
            client,
            health,
            networks,
            names: Arc::default(),
            requests,
            pace: Mutex::default(),
        }
    }

    /// Creates a search for a path. It sends nothing before the first call of
    /// [`WanSearch::next_offer`].
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> WanSearch {
        // The number of requests bounds the channel: two calls per tracker with one message each
        // and one for each name, and one request at a time per candidate.
        let (answer, answers) = unbounded();
        WanSearch {
            wan: self.clone(),
            hash_part: *hash_part,
            began: None,
            deadline: Instant::now(),
            latest_deadline: Instant::now() + WAN_TIMEOUT.get() + LOOKUP_TIMEOUT.get(),
            calls: Vec::new(),
            entries: Vec::new(),
            at_once: AT_ONCE,
            next_wave: None,
            answer,
            answers,
            found: false,
            useless: None,
        }
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        address.port() == self.trackers.port() && self.networks.is_own(address.ip())
    }

    /// Returns true if the peer has answered since its last failure.
    fn is_proven(&self, address: SocketAddr) -> bool {
        self.health.is_proven(PeerKey::far(address))
    }

    /// Reports the bytes of a transfer to the tracker that named it. Does not block.
    pub fn report(&self, transfer: &TransferName, role: Role, bytes: u64) {
        self.trackers.report(transfer, role, bytes);
    }

    /// Begins a transfer at the tracker that named the peer. The transfer gets its name later. Does
    /// not block.
    pub fn begin_transfer(&self, origin: &OfferOrigin) -> PendingTransferName {
        self.trackers.begin(origin.tracker, &origin.peer_id)
    }
}

/// Origin of an offer.
#[derive(Debug, Clone)]
pub struct OfferOrigin {
    /// Index of the tracker that named the peer, in [`Trackers::all`].
    pub tracker: usize,
    /// The peer's ID at that tracker.
    pub peer_id: String,
}

/// Returns true if a candidate has a valid form. IDs and host names are stored and sent to others,
/// so their length and characters are checked.
fn can_be_asked(candidate: &Candidate) -> bool {
    is_peer_id(&candidate.peer_id)
        && (1..=MAX_ADDR).contains(&candidate.addr.len())
        && candidate.port != 0
}

/// Narinfo from a peer on another network.
pub struct WanOffer {
    /// Address of the peer's HTTP server.
    pub peer: SocketAddr,
    /// Tracker that named the peer.
    pub origin: OfferOrigin,
    /// The narinfo. Its form is checked, its signatures are not.
    pub narinfo: PeerNarinfo,
}

/// Search for one path among the peers that trackers name.
pub struct WanSearch {
    wan: Arc<WanSource>,
    hash_part: HashPart,
    began: Option<Instant>,
    deadline: Instant,
    /// Latest end of the search, even if it starts late.
    latest_deadline: Instant,
    calls: Vec<TrackerLookup>,
    entries: Vec<CandidateState>,
    /// Number of candidates that may be asked at once.
    at_once: usize,
    next_wave: Option<Instant>,
    answer: Sender<NarinfoAnswer>,
    answers: Receiver<NarinfoAnswer>,
    found: bool,
    /// Last candidate whose answer was useless, and that answer.
    useless: Option<(SocketAddr, PeerError)>,
}

/// Lookup at one tracker.
struct TrackerLookup {
    tracker: Arc<Tracker>,
    /// Index of the tracker in [`Trackers::all`].
    at: usize,
    /// Number of connections on which the tracker was asked, and number of those that failed.
    begun: u32,
    failed: u32,
    error: Option<tracker::TrackerError>,
    is_answered: bool,
    /// Number of answers whose host names are being resolved. [`NarinfoAnswer::Name`] says when
    /// that ends.
    unresolved: u32,
    /// True if the failure of this lookup was recorded.
    is_judged: bool,
}

impl TrackerLookup {
    fn new(tracker: Arc<Tracker>, at: usize) -> Self {
        TrackerLookup {
            tracker,
            at,
            begun: 0,
            failed: 0,
            error: None,
            is_answered: false,
            unresolved: 0,
            is_judged: false,
        }
    }

    fn is_awaited(&self) -> bool {
        !self.is_answered && (self.begun == 0 || self.failed < self.begun)
    }
}

/// Candidate with its IP address.
struct LocatedCandidate {
    address: SocketAddr,
    peer_id: String,
    /// Position in the tracker's list.
    rank: usize,
}

/// Candidate with a host name, and its position in the tracker's list.
type NamedCandidate = (usize, Candidate);

/// Splits the valid candidates of a list into those with IP addresses and those with host names.
fn split(list: CandidateList) -> (Vec<LocatedCandidate>, Vec<NamedCandidate>) {
    let (mut located, mut named) = (Vec::new(), Vec::new());
    let CandidateList { candidates, others } = list;
    for (rank, candidate) in
        candidates.into_iter().enumerate().chain(others.into_iter().enumerate())
    {
        if !can_be_asked(&candidate) {
            continue;
        }
        match parse_address(&candidate.addr) {
            Some(ip) => located.extend(locate(candidate, rank, ip)),
            None => named.push((rank, candidate)),
        }
    }
    (located, named)
}

/// Resolves the host names that the tracker with the index `at` names, and sends each candidate as
/// soon as its address is known. Blocks until `deadline` at most; later names are left out.
fn resolve(
    names: &Arc<NameResolver>,
    named: &[NamedCandidate],
    at: usize,
    deadline: Instant,
    answer: &Sender<NarinfoAnswer>,
) {
    let hosts: Vec<&str> = named.iter().map(|(_, candidate)| &*candidate.addr).collect();
    names.resolve(&hosts, deadline, |index, ip| {
        let (rank, candidate) = &named[index];
        let located = ip.and_then(|ip| locate(candidate.clone(), *rank, ip));
        if located.is_some() {
            let _ = answer.send(NarinfoAnswer::Name { at, located });
        }
    });
    let _ = answer.send(NarinfoAnswer::Name { at, located: None });
}

fn locate(candidate: Candidate, rank: usize, ip: IpAddr) -> Option<LocatedCandidate> {
    let Candidate { peer_id, port, .. } = candidate;
    let address = SocketAddr::new(ip, port);
    can_be_peer(ip).then_some(LocatedCandidate { address, peer_id, rank })
}

struct CandidateState {
    address: SocketAddr,
    origin: OfferOrigin,
    /// Position in the tracker's list.
    rank: usize,
    state: CandidatePhase,
    /// Number of requests that failed for a temporary reason.
    failures: u32,
    /// When a limit of its address began to delay it.
    delayed: Option<Instant>,
    was_asked: bool,
    /// True if the candidate has sent any answer.
    answered: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum CandidatePhase {
    /// To be asked, at this time or later.
    Untried(Instant),
    /// Asked at this time.
    Asked(Instant),
    /// No further request will be made.
    Done,
}

/// Candidates of a tracker.
struct FoundCandidates {
    /// Those with IP addresses.
    located: Vec<LocatedCandidate>,
    /// True if those with host names follow, each in [`NarinfoAnswer::Name`].
    has_names: bool,
}

enum NarinfoAnswer {
    /// From the tracker with the index `at` in [`Trackers::all`].
    Tracker { at: usize, result: Result<FoundCandidates, tracker::TrackerError> },
    /// A candidate of that tracker whose host name was resolved; `None` at the end of the list.
    Name { at: usize, located: Option<LocatedCandidate> },
    /// From the candidate with the index `at`.
    Peer { at: usize, result: Box<Result<PeerNarinfo, PeerError>> },
}

impl WanSearch {
    /// Restarts the time limit of the search for alternate holders. The search ends at `deadline`
    /// at the latest.
    pub fn resume(&mut self, deadline: Instant) {
        self.latest_deadline = deadline;
        self.deadline = deadline.min(Instant::now() + WAN_TIMEOUT.get());
    }

    /// Number of candidates that were asked, and number of those that sent no answer.
    pub fn asked_and_silent(&self) -> (u32, u32) {
        let asked = || self.entries.iter().filter(|entry| entry.was_asked);
        let count = |entries: usize| u32::try_from(entries).unwrap_or(u32::MAX);
        (count(asked().count()), count(asked().filter(|entry| !entry.answered).count()))
    }

    /// Last candidate whose answer was useless, and that answer.
    pub fn useless(&self) -> Option<&(SocketAddr, PeerError)> {
        self.useless.as_ref()
    }

    /// A candidate that was not asked because it failed too often.
    pub fn avoided(&self) -> Option<SocketAddr> {
        let now = Instant::now();
        let is_avoided = |entry: &&CandidateState| {
            !entry.was_asked
                && self.wan.health.eligibility(PeerKey::far(entry.address), now)
                    == Eligibility::Never
        };
        self.entries.iter().find(is_avoided).map(|entry| entry.address)
    }

    /// Returns true if at least one tracker is reachable.
    pub fn has_tracker(&self) -> bool {
        self.wan.trackers.all().any(|tracker| tracker.is_reached())
    }

    /// Returns the next narinfo of a holder; `None` if no candidate is left or time is up. Blocks
    /// for at most 4 s from the first call, or from the last [`WanSearch::resume`].
    pub fn next_offer(&mut self) -> Option<WanOffer> {
        if self.began.is_none() {
            self.begin();
        }
        loop {
            let now = Instant::now();
            if now >= self.deadline {
                break;
            }
            let is_blocked = !self.call_trackers(now) | !self.ask(now);
            let Some(wake_up) = self.next_wake_up(is_blocked, now) else { break };
            select! {
                recv(self.answers) -> answer => if let Ok(answer) = answer
                    && let Some(offer) = self.take(answer) {
                    self.found = true;
                    self.record_results();
                    return Some(offer);
                },
                default(wake_up.saturating_duration_since(now)) => {}
            }
        }
        self.record_results();
        None
    }

    fn begin(&mut self) {
        let usable = |(at, tracker): (usize, &Arc<Tracker>)| {
            tracker.await_usable().then(|| TrackerLookup::new(tracker.clone(), at))
        };
        self.calls = self.wan.trackers.all().enumerate().filter_map(usable).collect();
        let began = Instant::now();
        self.began = Some(began);
        self.deadline = self.latest_deadline.min(began + WAN_TIMEOUT.get());
    }

    fn trackers_deadline(&self) -> Instant {
        self.began.unwrap_or(self.deadline) + tracker::LOOKUP_TIMEOUT.get()
    }

    /// Asks each tracker, and asks a slow one a second time. Returns false if the request pool is
    /// full.
    fn call_trackers(&mut self, now: Instant) -> bool {
        let (deadline, hedge) = (self.trackers_deadline(), self.began.unwrap_or(now) + HEDGE_DELAY);
        let mut may_ask = true;
        for call in self.calls.iter_mut().filter(|call| now < deadline && call.is_awaited()) {
            if call.begun == 0 || call.begun == 1 && now >= hedge {
                let (tracker, at, is_hedge) = (call.tracker.clone(), call.at, call.begun == 1);
                let (answer, hash_part) = (self.answer.clone(), self.hash_part);
                let names = self.wan.names.clone();
                let began = self.wan.requests.run(RequestTarget::Tracker, move || {
                    let found = tracker.lookup(&hash_part, is_hedge, deadline).map(split);
                    let mut named = Vec::new();
                    let result = found.map(|(located, with_names)| {
                        named = with_names;
                        FoundCandidates { located, has_names: !named.is_empty() }
                    });
                    let _ = answer.send(NarinfoAnswer::Tracker { at, result });
                    // Candidates with IP addresses do not wait for these.
                    if !named.is_empty() {
                        resolve(&names, &named, at, Instant::now() + NAMES_WAIT, &answer);
                    }
                });
                call.begun += u32::from(began);
                may_ask &= began;
            }
        }
        may_ask
    }

    /// Time of the next action if no answer arrives; `None` if nothing is awaited.
    fn next_wake_up(&self, is_blocked: bool, now: Instant) -> Option<Instant> {
        let hedge = self.began.unwrap_or(now) + HEDGE_DELAY;
        let call = |call: &TrackerLookup| {
            if call.begun < 2 { hedge.max(now + BLOCKED) } else { self.trackers_deadline() }
        };
        let calls = self
            .calls
            .iter()
            .filter(|call| now < self.trackers_deadline() && call.is_awaited())
            .map(call);
        let entry = |entry: &CandidateState| match entry.state {
            CandidatePhase::Untried(at) if self.is_hopeful(entry, now) && at > now => Some(at),
            CandidatePhase::Asked(at) => {
                Some(self.answer_deadline(entry, at, now)).filter(|deadline| *deadline > now)
            }
            _ => None,
        };
        // Only the end of the search bounds this wait: `NAMES_WAIT` bounds the resolution itself.
        let names = self.calls.iter().filter(|call| call.unresolved > 0).map(|_| self.deadline);
        let entries = self.entries.iter().filter_map(entry);
        let blocked = is_blocked.then(|| now + BLOCKED);
        let awaited = calls.chain(names).chain(entries).chain(blocked).min()?;
        Some(self.next_wave.map_or(awaited, |wave| awaited.min(wave)).min(self.deadline))
    }

    fn add(&mut self, tracker: usize, located: Vec<LocatedCandidate>) {
        let now = Instant::now();
        for LocatedCandidate { address, peer_id, rank } in located {
            let known = self.entries.iter().any(|entry| entry.address == address);
            if !known && !self.wan.is_own(address) {
                self.entries.push(CandidateState {
                    address,
                    origin: OfferOrigin { tracker, peer_id },
                    rank,
                    state: CandidatePhase::Untried(now),
                    failures: 0,
                    delayed: None,
                    was_asked: false,
                    answered: false,
                });
            }
        }
    }

    fn is_hopeful(&self, entry: &CandidateState, now: Instant) -> bool {
        matches!(entry.state, CandidatePhase::Untried(_))
            && self.wan.health.eligibility(PeerKey::far(entry.address), now) != Eligibility::Never
    }

    /// Time until which the answer of a candidate that was asked at `asked` is awaited. The wait is
    /// short for a candidate that failed recently, and for one that has never answered and was
    /// named by a tracker that names many dead peers.
    fn answer_deadline(&self, entry: &CandidateState, asked: Instant, now: Instant) -> Instant {
        let peer_key = PeerKey::far(entry.address);
        let timeout = match self.wan.health.eligibility(peer_key, now) {
            Eligibility::Now if self.wan.is_proven(entry.address) => None,
            Eligibility::Now => self.unproven_timeout(entry),
            Eligibility::Last | Eligibility::Never => Some(SLOW),
        };
        timeout.map_or(self.deadline, |timeout| self.deadline.min(asked + timeout))
    }

    /// Longest wait for a candidate that has never answered; `None` if there is no such limit.
    fn unproven_timeout(&self, entry: &CandidateState) -> Option<Duration> {
        self.wan.trackers.all().nth(entry.origin.tracker)?.unproven_timeout()
    }

    /// Returns true if a candidate at this IP address has answered.
    fn answers(&self, ip: IpAddr) -> bool {
        let mut there = self.entries.iter().filter(|entry| entry.address.ip() == ip);
        there.any(|entry| entry.answered || self.wan.is_proven(entry.address))
    }

    /// Returns true if the candidate is asked, or waits for the connection rate, in vain. A
    /// candidate that was not asked counts like the others at its address.
    fn is_silent(&self, entry: &CandidateState) -> bool {
        if entry.was_asked {
            return !entry.answered;
        }
        entry.delayed.is_some() && !self.answers(entry.address.ip())
    }

    fn is_awaited(&self, entry: &CandidateState, now: Instant) -> bool {
        matches!(entry.state, CandidatePhase::Asked(at) if now < self.answer_deadline(entry, at, now))
    }

    /// Asks as many candidates as the limit admits. Returns false if other requests block a
    /// candidate.
    fn ask(&mut self, now: Instant) -> bool {
        if self.next_wave.is_some_and(|at| at <= now) {
            self.at_once = self.at_once.saturating_mul(2);
            self.next_wave = Some(now + WAVE);
        }
        let in_flight = self.entries.iter().filter(|entry| self.is_awaited(entry, now)).count();
        let mut free = self.at_once.saturating_sub(in_flight);
        let mut may_ask = true;
        for at in self.in_turn(now) {
            if free == 0 {
                break;
            }
            match self.start(at, now) {
                ConnectDecision::Now => free -= 1,
                ConnectDecision::Later => may_ask = false,
                ConnectDecision::NotThis => may_ask &= self.delay(at, now),
            }
        }
        if self.entries.iter().any(|entry| entry.was_asked) {
            self.next_wave.get_or_insert(now + WAVE);
        }
        may_ask
    }

    /// Delays a candidate because others at its address were asked just now: it may be another node
    /// behind the same router. Gives it up after some time, soon if nobody there has ever answered.
    /// Returns false if a request in progress will show whether somebody is there: only after that
    /// the time begins.
    fn delay(&mut self, at: usize, now: Instant) -> bool {
        let entry = &self.entries[at];
        let ip = entry.address.ip();
        let is_asked = self.wan.requests.is_asked(ip);
        let limit = match self.unproven_timeout(entry) {
            None if is_asked => {
                self.entries[at].delayed = Some(now);
                return false;
            }
            _ if self.answers(ip) => PACE_WAIT,
            Some(timeout) => timeout,
            None => PACE_DELAY,
        };
        let entry = &mut self.entries[at];
        let deadline = *entry.delayed.get_or_insert(now) + limit;
        entry.state = if now >= deadline {
            CandidatePhase::Done
        } else {
            let pause = if is_asked { BLOCKED } else { PACE_DELAY };
            CandidatePhase::Untried(deadline.min(now + pause))
        };
        true
    }

    /// Candidates that may be asked, in order: proven ones first, then by the position in the
    /// tracker's list. Candidates that failed recently are returned only when no other candidate is
    /// left or awaited: even a fast narinfo from them does not make their NARs reliable.
    fn in_turn(&self, now: Instant) -> Vec<usize> {
        let health = &self.wan.health;
        let is_doubtful = |at: &usize| health.is_doubtful(PeerKey::far(self.entries[*at].address));
        let is_due = |at: &usize| matches!(self.entries[*at].state, CandidatePhase::Untried(due) if due <= now);
        let all = 0..self.entries.len();
        let hopeful = all.clone().filter(|at| self.is_hopeful(&self.entries[*at], now));
        let mut turns: Vec<_> = hopeful.filter(is_due).collect();
        let is_awaited = |at: &usize| self.is_awaited(&self.entries[*at], now);
        let may_name_more = self.calls.iter().any(TrackerLookup::is_awaited)
            && now < self.trackers_deadline()
            || self.calls.iter().any(|call| call.unresolved > 0);
        let others_are_left = turns.iter().any(|at| !is_doubtful(at))
            || all.clone().any(|at| is_awaited(&at) && !is_doubtful(&at))
            || may_name_more;
        if others_are_left {
            turns.retain(|at| !is_doubtful(at));
        }
        turns.sort_by_cached_key(|at| {
            let CandidateState { address, rank, .. } = &self.entries[*at];
            (
                health.eligibility(PeerKey::far(*address), now) == Eligibility::Last,
                !self.wan.is_proven(*address),
                *rank,
            )
        });
        turns
    }

    /// Requests the narinfo from one candidate in another thread, because a request cannot be
    /// cancelled.
    fn start(&mut self, at: usize, now: Instant) -> ConnectDecision {
        let address = self.entries[at].address;
        let is_proven = self.wan.is_proven(address);
        let to = if is_proven {
            RequestTarget::Proven(address.ip())
        } else {
            RequestTarget::Stranger(address.ip())
        };
        // Checked first, because a permit of the rate limiter cannot be returned.
        match self.wan.requests.admits(to) {
            ConnectDecision::Now => {}
            // Its answers make room.
            ConnectDecision::NotThis if is_proven => return ConnectDecision::Later,
            not_now => return not_now,
        }
        if !is_proven {
            let mut pace = self.wan.pace.lock();
            match pace.take(address.ip(), now) {
                ConnectDecision::Now => {}
                not_now => return not_now,
            }
        }
        let (client, health) = (self.wan.client.clone(), self.wan.health.clone());
        let (answer, hash_part) = (self.answer.clone(), self.hash_part);
        let timeout = self.deadline.saturating_duration_since(now);
        let holder = Holder::peerix(address, &hash_part);
        let started = self.wan.requests.run(to, move || {
            let result = client.narinfo(&holder, &hash_part, timeout);
            let then = Instant::now();
            match &result {
                Ok(_) => health.answered(PeerKey::far(address), then - now, then),
                // The peer did not promise the path: filters have false positives.
                Err(PeerError::NotThere | PeerError::Busy) => {
                    health.record_miss(PeerKey::far(address), then - now, then)
                }
                Err(e) => e.record(&health, PeerKey::far(address), now),
            }
            let _ = answer.send(NarinfoAnswer::Peer { at, result: Box::new(result) });
        });
        if !started {
            return ConnectDecision::Later;
        }
        let entry = &mut self.entries[at];
        (entry.state, entry.was_asked) = (CandidatePhase::Asked(now), true);
        ConnectDecision::Now
    }

    fn take(&mut self, answer: NarinfoAnswer) -> Option<WanOffer> {
        match answer {
            NarinfoAnswer::Tracker { at, result } => {
                self.take_candidates(at, result);
                None
            }
            NarinfoAnswer::Name { at, located: Some(located) } => {
                self.add(at, vec![located]);
                None
            }
            NarinfoAnswer::Name { at, located: None } => {
                let call = self.calls.iter_mut().find(|call| call.at == at);
                call.into_iter().for_each(|call| call.unresolved -= 1);
                None
            }
            NarinfoAnswer::Peer { at, result } => self.take_narinfo(at, *result),
        }
    }

    fn take_candidates(
        &mut self,
        at: usize,
        result: Result<FoundCandidates, tracker::TrackerError>,
    ) {
        let Some(call) = self.calls.iter_mut().find(|call| call.at == at) else { return };
        match result {
            Ok(found) => {
                call.unresolved += u32::from(found.has_names);
                if !std::mem::replace(&mut call.is_answered, true) {
                    self.add(at, found.located);
                }
            }
            Err(e) => {
                call.failed += 1;
                call.error = Some(e);
            }
        }
    }

    fn take_narinfo(
        &mut self,
        at: usize,
        result: Result<PeerNarinfo, PeerError>,
    ) -> Option<WanOffer> {
        let entry = &mut self.entries[at];
        entry.answered |= !matches!(result, Err(PeerError::Unreachable(_)));
        entry.state = CandidatePhase::Done;
        match result {
            Ok(narinfo) => {
                return Some(WanOffer {
                    peer: entry.address,
                    origin: entry.origin.clone(),
                    narinfo,
                });
            }
            // A proven peer restarts or is overloaded.
            Err(e)
                if e.is_temporary()
                    && !self.wan.health.latency(PeerKey::far(entry.address)).is_zero() =>
            {
                let pause = backoff::pause(RETRY_DELAY, entry.failures, MAX_RETRY_DELAY);
                entry.failures += 1;
                entry.state = CandidatePhase::Untried(Instant::now() + pause);
                log::debug!("{}: candidate {}: {e}; asked again", self.hash_part, entry.address);
            }
            Err(e) => {
                log::debug!("{}: candidate {}: {e}", self.hash_part, entry.address);
                if !matches!(e, PeerError::NotThere | PeerError::Unreachable(_)) {
                    self.useless = Some((entry.address, e));
                }
            }
        }
        None
    }

    /// Reports to each tracker whether its lookup failed and how many of its candidates answered.
    /// Many silent candidates delay Nix.
    fn record_results(&mut self) {
        let now = Instant::now();
        let began = self.began.unwrap_or(now);
        for call in &self.calls {
            let named = || self.entries.iter().filter(|entry| entry.origin.tracker == call.at);
            let alive = named().filter(|entry| entry.answered).count();
            // A candidate that had no time to answer because another was faster is not silent.
            if call.is_answered && !self.found {
                let silent = named().filter(|entry| self.is_silent(entry)).count();
                call.tracker.record_candidates(alive, silent, began, now);
            } else if alive > 0 {
                call.tracker.record_candidates(alive, 0, began, now);
            }
        }
        for call in &mut self.calls {
            if call.is_answered
                || self.found && call.is_awaited()
                || std::mem::replace(&mut call.is_judged, true)
            {
                continue;
            }
            match &call.error {
                // The tracker is reachable but overloaded.
                Some(tracker::TrackerError::Refused(429, ..)) => {}
                Some(e) => call.tracker.record_failed_lookup(e, began),
                None => call.tracker.record_failed_lookup(&"lookups take too long", began),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::announce::Publication;
    use super::super::tracker::NodeIdentity;
    use super::*;
    use crate::network::NetworkPolicy;
    use crate::nix::StoreDir;

    /// Guards against a tracker that fills the memory with long host names.
    #[test]
    fn malformed_candidate_is_not_asked() {
        let candidate = |peer_id: &str, addr: &str, port| {
            can_be_asked(&Candidate {
                peer_id: peer_id.into(),
                addr: addr.into(),
                port,
                score: 0.0,
            })
        };
        assert!(candidate("a", "example.org", 1) && candidate("a", "203.0.113.1", 65535));
        assert!(!candidate("", "example.org", 1) && !candidate("a\n", "example.org", 1));
        assert!(!candidate(&"a".repeat(129), "example.org", 1));
        assert!(!candidate("a", "", 1) && !candidate("a", &"a".repeat(MAX_ADDR + 1), 1));
        assert!(!candidate("a", "example.org", 0));
    }

    fn peer(last: u8, port: u16) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, last], port))
    }

    /// Creates a search at one reached tracker that was asked, and that answers nothing. The test
    /// hands in its answers. Host names are resolved by `look_up`.
    fn search(look_up: impl Fn(&str) -> Vec<IpAddr> + Send + Sync + 'static) -> WanSearch {
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let publication = Arc::new(Publication::default());
        let urls = vec!["http://127.0.0.1:1".into()];
        let trackers =
            Trackers::start(urls, NodeIdentity::for_test(), &publication, &networks, || {})
                .unwrap();
        let client = Arc::new(PeerClient::new(StoreDir::parse("/nix/store").unwrap()));
        let wan = WanSource {
            names: Arc::new(NameResolver::new(look_up)),
            ..WanSource::new(Arc::new(trackers), client, Arc::default(), networks, Arc::default())
        };
        let mut search = Arc::new(wan).search(&HashPart::parse(&[b'0'; 32]).unwrap());
        let now = Instant::now();
        (search.began, search.deadline) = (Some(now), now + Duration::from_secs(3600));
        let tracker = search.wan.trackers.all().next().unwrap().clone();
        search.calls = vec![TrackerLookup { begun: 1, ..TrackerLookup::new(tracker, 0) }];
        search
    }

    fn candidate(addr: &str, port: u16) -> Candidate {
        Candidate { peer_id: format!("{addr}:{port}"), addr: addr.into(), port, score: 0.0 }
    }

    /// Hands in a tracker's answer, and returns the candidates with host names.
    fn name_candidates(search: &mut WanSearch, candidates: Vec<Candidate>) -> Vec<NamedCandidate> {
        let (located, named) = split(CandidateList { candidates, others: Vec::new() });
        let result = Ok(FoundCandidates { located, has_names: !named.is_empty() });
        search.take(NarinfoAnswer::Tracker { at: 0, result });
        named
    }

    fn addresses(search: &WanSearch) -> Vec<SocketAddr> {
        search.entries.iter().map(|entry| entry.address).collect()
    }

    fn is_over(search: &WanSearch) -> bool {
        search.entries.iter().all(|entry| entry.state == CandidatePhase::Done)
    }

    /// Uses up the connection rate of an address, so that nothing is sent to it.
    fn use_up_rate(search: &WanSearch, last: u8, now: Instant) {
        let mut pace = search.wan.pace.lock();
        while pace.take(peer(last, 1).ip(), now) == ConnectDecision::Now {}
    }

    /// Guards against a name server that delays candidates whose addresses are known.
    #[test]
    fn candidates_with_known_addresses_do_not_wait_for_names() {
        let (release, released) = crossbeam_channel::bounded::<()>(0);
        let mut search = search(move |name| {
            if name == "slow.example" {
                let _ = released.recv();
            }
            vec![peer(name.len() as u8, 1).ip()]
        });
        let list = ["slow.example", "203.0.113.1", "a.example"];
        let list = list.into_iter().zip(2..).map(|(addr, port)| candidate(addr, port)).collect();
        let named = name_candidates(&mut search, list);
        assert_eq!(addresses(&search), [peer(1, 3)]);
        let (names, answer) = (search.wan.names.clone(), search.answer.clone());
        let deadline = Instant::now() + Duration::from_secs(60);
        let thread = std::thread::spawn(move || resolve(&names, &named, 0, deadline, &answer));
        let first = search.answers.recv().unwrap();
        search.take(first);
        assert_eq!(addresses(&search), [peer(1, 3), peer(9, 4)], "one name is slow");
        search.entries.iter_mut().for_each(|entry| entry.state = CandidatePhase::Done);
        assert!(search.next_wake_up(false, Instant::now()).is_some(), "the name is awaited");
        drop(release);
        thread.join().unwrap();
        for answer in search.answers.clone().try_iter() {
            search.take(answer);
        }
        assert_eq!(addresses(&search)[2], peer(12, 2));
        assert_eq!(search.entries[2].rank, 0);
        search.entries[2].state = CandidatePhase::Done;
        assert_eq!(search.next_wake_up(false, Instant::now()), None);
    }

    #[test]
    fn search_waits_for_last_names_and_ends_with_them() {
        let mut search = search(|_| Vec::new());
        name_candidates(&mut search, vec![candidate("a.example", 2)]);
        let late = Instant::now() + 2 * NAMES_WAIT;
        assert!(search.next_wake_up(false, late).is_some(), "the answer is under way");
        search.take(NarinfoAnswer::Name { at: 0, located: None });
        assert_eq!(search.next_wake_up(false, late), None);
    }

    /// Guards against a tracker that names many ports of a victim: each lookup waited 600 ms for
    /// its turn to connect, and the tracker was never suspected.
    #[test]
    fn candidates_at_address_without_answers_are_given_up_soon_and_count_as_silent() {
        let mut search = search(|_| Vec::new());
        let ports = (1..=64).map(|port| candidate("203.0.113.1", port)).collect();
        name_candidates(&mut search, ports);
        let tracker = search.calls[0].tracker.clone();
        let now = Instant::now();
        use_up_rate(&search, 1, now);
        for (millis, ends) in [(0, false), (199, false), (200, true)] {
            let then = now + Duration::from_millis(millis);
            use_up_rate(&search, 1, then);
            search.ask(then);
            assert_eq!(is_over(&search), ends, "{millis} ms");
        }
        assert_eq!(tracker.unproven_timeout(), None);
        search.record_results();
        let timeout = tracker.unproven_timeout().unwrap();
        // A later lookup waits no longer than for candidates that are asked.
        search.calls[0].is_answered = false;
        let ports = (1..=64).map(|port| candidate("203.0.113.2", port)).collect();
        name_candidates(&mut search, ports);
        let later = Instant::now();
        for (then, ends) in [(later, false), (later + timeout, true)] {
            use_up_rate(&search, 2, then);
            search.ask(then);
            assert_eq!(is_over(&search), ends);
        }
    }

    /// Guards against a tracker that names many ports of a victim that drops packets: the four
    /// requests that hang used up the limit of the request pool, and the other candidates neither
    /// ended nor counted.
    #[test]
    fn candidates_at_address_whose_requests_hang_count_as_silent() {
        let mut search = search(|_| Vec::new());
        let (release, released) = crossbeam_channel::bounded::<()>(0);
        let to = RequestTarget::Stranger(peer(1, 1).ip());
        let hang = || {
            let released = released.clone();
            search.wan.requests.run(to, move || {
                let _ = released.recv();
            })
        };
        while hang() {}
        let ports = || (1..=64).map(|port| candidate("203.0.113.1", port)).collect();
        name_candidates(&mut search, ports());
        let tracker = search.calls[0].tracker.clone();
        assert!(!search.ask(Instant::now()));
        assert!(!is_over(&search), "one of the requests may show that somebody is there");
        search.record_results();
        let timeout = tracker.unproven_timeout().expect("64 silent candidates");
        let later = Instant::now();
        for (then, ends) in [(later, false), (later + timeout, true)] {
            search.ask(then);
            assert_eq!(is_over(&search), ends);
        }
        drop(release);
    }

    /// Several nodes may be behind one router.
    #[test]
    fn candidates_at_address_with_answers_wait_for_connection_rate() {
        for is_suspected in [false, true] {
            let mut search = search(|_| Vec::new());
            let ports = (1..=64).map(|port| candidate("203.0.113.1", port)).collect();
            name_candidates(&mut search, ports);
            let tracker = search.calls[0].tracker.clone();
            let now = Instant::now();
            if is_suspected {
                tracker.record_candidates(0, 64, now, now);
            }
            (search.entries[0].state, search.entries[0].answered) = (CandidatePhase::Done, true);
            for (millis, ends) in [(0, false), (599, false), (600, true)] {
                let then = now + Duration::from_millis(millis);
                use_up_rate(&search, 1, then);
                search.ask(then);
                assert_eq!(is_over(&search), ends, "{millis} ms");
            }
            search.record_results();
            assert_eq!(tracker.unproven_timeout(), None);
        }
    }
}
