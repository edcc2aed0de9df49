//! Peers on other networks: finds a holder of a path among the peers that trackers name.
//!
//! All trackers are asked at once. A tracker that is slow is asked again on a new connection. The
//! candidates are asked over HTTP as soon as the first tracker names them, or their host names are
//! resolved: four at once, and twice as many after each 100 ms without a good narinfo. A path is a
//! miss when all candidates have denied it. The whole search ends after 4 s.

mod addresses;
mod tracker_lookups;

use super::announce::{PendingTransferName, Trackers};
use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::concurrency_limit::ConcurrencyLimit;
use super::health::{Eligibility, PeerHealth, PeerKey};
use super::request_pool::{RequestPool, RequestTarget};
use crate::backoff;
use crate::connect_rate::{ConnectDecision, ConnectRate};
use crate::lan::{Holder, LOOKUP_TIMEOUT};
use crate::lock::Mutex;
use crate::network::Networks;
use crate::nix::HashPart;
use crate::resolver::NameResolver;
use crate::time_scale::Timeout;
use crate::wire::tracker::{Role, TransferName};
use addresses::LocatedCandidate;
use crossbeam_channel::{Receiver, Sender, select, unbounded};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracker_lookups::{TrackerAnswer, TrackerLookups};

/// Time limit of a search on other networks. It covers the restart of a tracker, and after that a
/// connection to a peer that loses a packet twice.
const WAN_TIMEOUT: Timeout = Timeout::from_secs(4);
/// Candidates that are asked at first.
const FIRST_IN_FLIGHT: usize = 4;
/// Longest wait for a candidate that failed recently.
const DOUBTFUL_TIMEOUT: Duration = Duration::from_millis(500);
/// First delay before a proven candidate that is busy or restarts is asked again. The delay
/// doubles up to [`MAX_RETRY_DELAY`].
const RETRY_DELAY: Duration = Duration::from_millis(50);
/// Longest delay before such a candidate is asked again.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(800);
/// Delay before the next attempt at a request that the request pool, the common connection rate or
/// a request in progress to the same address blocks.
const BLOCKED_RETRY_DELAY: Duration = Duration::from_millis(10);
/// Delay before the next attempt at an address whose connection rate is used up: the interval at
/// which that rate admits connections. Also the longest wait for such an address if none of its
/// candidates has ever answered, as many ports of one victim do not.
const RATE_RETRY_DELAY: Duration = Duration::from_millis(200);
/// Longest wait for an address whose connection rate is used up, if another candidate there
/// answers. There are several nodes behind one router.
const MAX_RATE_WAIT: Duration = Duration::from_millis(600);

/// Finds and asks the peers on other networks.
pub struct WanSource {
    trackers: Arc<Trackers>,
    client: Arc<PeerClient>,
    health: Arc<PeerHealth>,
    networks: Arc<Networks>,
    names: Arc<NameResolver>,
    requests: Arc<RequestPool>,
    connect_rate: Mutex<ConnectRate>,
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
            connect_rate: Mutex::default(),
        }
    }

    /// Creates a search for a path. It sends nothing before the first call of
    /// [`WanSearch::next_offer`].
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> WanSearch {
        // The number of requests bounds the channel: two calls per tracker with one message each
        // and one for each name, and one request at a time per candidate.
        let (sender, answers) = unbounded();
        WanSearch {
            wan: self.clone(),
            hash_part: *hash_part,
            deadline: Instant::now() + WAN_TIMEOUT.get() + LOOKUP_TIMEOUT.get(),
            tracker_lookups: TrackerLookups::default(),
            candidates: Vec::new(),
            limit: ConcurrencyLimit::new(FIRST_IN_FLIGHT),
            sender,
            answers,
            found: false,
            unusable: None,
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
        self.trackers.begin_transfer(origin.tracker, &origin.peer_id)
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
    /// End of the search. It may come sooner once the search has begun.
    deadline: Instant,
    tracker_lookups: TrackerLookups,
    candidates: Vec<CandidateState>,
    limit: ConcurrencyLimit,
    sender: Sender<NarinfoAnswer>,
    answers: Receiver<NarinfoAnswer>,
    found: bool,
    /// Last candidate whose answer was useless, and that answer.
    unusable: Option<(SocketAddr, PeerError)>,
}

struct CandidateState {
    address: SocketAddr,
    origin: OfferOrigin,
    /// Position in the tracker's list.
    rank: usize,
    phase: CandidatePhase,
    /// Number of requests that failed for a temporary reason.
    failures: u32,
    /// When a limit of its address began to delay it.
    delayed_since: Option<Instant>,
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

enum NarinfoAnswer {
    /// From the tracker with the index `index` in [`Trackers::all`].
    Tracker { index: usize, answer: TrackerAnswer },
    /// From the candidate with the index `index`.
    Peer { index: usize, result: Box<Result<PeerNarinfo, PeerError>> },
}

impl WanSearch {
    /// Restarts the time limit of the search for alternate holders. The search ends at `deadline`
    /// at the latest.
    pub fn resume(&mut self, deadline: Instant) {
        let has_begun = self.tracker_lookups.began().is_some();
        self.deadline =
            if has_begun { deadline.min(Instant::now() + WAN_TIMEOUT.get()) } else { deadline };
    }

    /// Number of candidates that were asked, and number of those that sent no answer.
    pub fn asked_and_silent(&self) -> (u32, u32) {
        let asked = || self.candidates.iter().filter(|candidate| candidate.was_asked);
        let count = |candidates: usize| u32::try_from(candidates).unwrap_or(u32::MAX);
        (count(asked().count()), count(asked().filter(|candidate| !candidate.answered).count()))
    }

    /// Last candidate whose answer was useless, and that answer.
    pub fn unusable(&self) -> Option<&(SocketAddr, PeerError)> {
        self.unusable.as_ref()
    }

    /// A candidate that was not asked because it failed too often.
    pub fn avoided(&self) -> Option<SocketAddr> {
        let now = Instant::now();
        let is_avoided = |candidate: &&CandidateState| {
            !candidate.was_asked
                && self.wan.health.eligibility(PeerKey::far(candidate.address), now)
                    == Eligibility::Never
        };
        self.candidates.iter().find(is_avoided).map(|candidate| candidate.address)
    }

    /// Returns true if at least one tracker is reachable.
    pub fn has_tracker(&self) -> bool {
        self.wan.trackers.all().any(|tracker| tracker.is_reached())
    }

    /// Returns the next narinfo of a holder; `None` if no candidate is left or time is up. Blocks
    /// for at most 4 s from the first call, or from the last [`WanSearch::resume`].
    pub fn next_offer(&mut self) -> Option<WanOffer> {
        if self.tracker_lookups.began().is_none() {
            self.tracker_lookups.begin(&self.wan.trackers);
            self.deadline = self.deadline.min(Instant::now() + WAN_TIMEOUT.get());
        }
        loop {
            let now = Instant::now();
            if now >= self.deadline {
                break;
            }
            let sender = self.sender.clone();
            let send = move |index, answer| {
                let _ = sender.send(NarinfoAnswer::Tracker { index, answer });
            };
            let WanSource { requests, names, .. } = &*self.wan;
            let is_blocked = !self.tracker_lookups.call(self.hash_part, requests, names, now, send)
                | !self.send_requests(now);
            let Some(wake_up) = self.next_wake_up(is_blocked, now) else { break };
            select! {
                recv(self.answers) -> answer => if let Ok(answer) = answer
                    && let Some(offer) = self.handle_answer(answer) {
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

    /// Time of the next action if no answer arrives; `None` if nothing is awaited.
    fn next_wake_up(&self, is_blocked: bool, now: Instant) -> Option<Instant> {
        let candidate = |candidate: &CandidateState| match candidate.phase {
            CandidatePhase::Untried(at) if self.may_be_asked(candidate, now) && at > now => {
                Some(at)
            }
            CandidatePhase::Asked(at) => {
                Some(self.answer_deadline(candidate, at, now)).filter(|deadline| *deadline > now)
            }
            _ => None,
        };
        // Only the end of the search bounds this wait: `NAMES_TIMEOUT` bounds the resolution
        // itself.
        let names = self.tracker_lookups.is_resolving().then_some(self.deadline);
        let candidates = self.candidates.iter().filter_map(candidate);
        let blocked = is_blocked.then(|| now + BLOCKED_RETRY_DELAY);
        let lookups = self.tracker_lookups.next_wake_up(now).into_iter();
        let awaited = lookups.chain(names).chain(candidates).chain(blocked).min()?;
        let increase = self.limit.next_increase();
        Some(increase.map_or(awaited, |increase| awaited.min(increase)).min(self.deadline))
    }

    fn add_candidates(&mut self, tracker: usize, located: Vec<LocatedCandidate>) {
        let now = Instant::now();
        for LocatedCandidate { address, peer_id, rank } in located {
            let known = self.candidates.iter().any(|candidate| candidate.address == address);
            if !known && !self.wan.is_own(address) {
                self.candidates.push(CandidateState {
                    address,
                    origin: OfferOrigin { tracker, peer_id },
                    rank,
                    phase: CandidatePhase::Untried(now),
                    failures: 0,
                    delayed_since: None,
                    was_asked: false,
                    answered: false,
                });
            }
        }
    }

    fn may_be_asked(&self, candidate: &CandidateState, now: Instant) -> bool {
        matches!(candidate.phase, CandidatePhase::Untried(_))
            && self.wan.health.eligibility(PeerKey::far(candidate.address), now)
                != Eligibility::Never
    }

    /// Time until which the answer of a candidate that was asked at `asked` is awaited. The wait is
    /// short for a candidate that failed recently, and for one that has never answered and was
    /// named by a tracker that names many dead peers.
    fn answer_deadline(&self, candidate: &CandidateState, asked: Instant, now: Instant) -> Instant {
        let peer_key = PeerKey::far(candidate.address);
        let timeout = match self.wan.health.eligibility(peer_key, now) {
            Eligibility::Now if self.wan.is_proven(candidate.address) => None,
            Eligibility::Now => self.unproven_timeout(candidate),
            Eligibility::Last | Eligibility::Never => Some(DOUBTFUL_TIMEOUT),
        };
        timeout.map_or(self.deadline, |timeout| self.deadline.min(asked + timeout))
    }

    /// Longest wait for a candidate that has never answered; `None` if there is no such limit.
    fn unproven_timeout(&self, candidate: &CandidateState) -> Option<Duration> {
        self.wan.trackers.all().nth(candidate.origin.tracker)?.unproven_timeout()
    }

    /// Returns true if a candidate at this IP address has answered.
    fn has_answered_at(&self, ip: IpAddr) -> bool {
        let mut at_ip = self.candidates.iter().filter(|candidate| candidate.address.ip() == ip);
        at_ip.any(|candidate| candidate.answered || self.wan.is_proven(candidate.address))
    }

    /// Returns true if the candidate is asked, or waits for the connection rate, in vain. A
    /// candidate that was not asked counts like the others at its address.
    fn is_silent(&self, candidate: &CandidateState) -> bool {
        if candidate.was_asked {
            return !candidate.answered;
        }
        candidate.delayed_since.is_some() && !self.has_answered_at(candidate.address.ip())
    }

    fn is_awaited(&self, candidate: &CandidateState, now: Instant) -> bool {
        let is_in_time = |at| now < self.answer_deadline(candidate, at, now);
        matches!(candidate.phase, CandidatePhase::Asked(at) if is_in_time(at))
    }

    /// Asks as many candidates as the limit admits. Returns false if other requests block a
    /// candidate.
    fn send_requests(&mut self, now: Instant) -> bool {
        self.limit.increase_if_due(now, |max| max.saturating_mul(2));
        let in_flight =
            self.candidates.iter().filter(|candidate| self.is_awaited(candidate, now)).count();
        let mut free = self.limit.max().saturating_sub(in_flight);
        let mut may_ask = true;
        for index in self.asking_order(now) {
            if free == 0 {
                break;
            }
            match self.send_request(index, now) {
                ConnectDecision::Now => free -= 1,
                ConnectDecision::Later => may_ask = false,
                ConnectDecision::NotThis => may_ask &= self.delay(index, now),
            }
        }
        if self.candidates.iter().any(|candidate| candidate.was_asked) {
            self.limit.start(now);
        }
        may_ask
    }

    /// Delays a candidate because others at its address were asked just now: it may be another node
    /// behind the same router. Gives it up after some time, soon if nobody there has ever answered.
    /// Returns false if a request in progress will show whether somebody is there: only after that
    /// the time begins.
    fn delay(&mut self, index: usize, now: Instant) -> bool {
        let candidate = &self.candidates[index];
        let ip = candidate.address.ip();
        let is_asked = self.wan.requests.has_request_to(ip);
        let limit = match self.unproven_timeout(candidate) {
            None if is_asked => {
                self.candidates[index].delayed_since = Some(now);
                return false;
            }
            _ if self.has_answered_at(ip) => MAX_RATE_WAIT,
            Some(timeout) => timeout,
            None => RATE_RETRY_DELAY,
        };
        let candidate = &mut self.candidates[index];
        let deadline = *candidate.delayed_since.get_or_insert(now) + limit;
        candidate.phase = if now >= deadline {
            CandidatePhase::Done
        } else {
            let pause = if is_asked { BLOCKED_RETRY_DELAY } else { RATE_RETRY_DELAY };
            CandidatePhase::Untried(deadline.min(now + pause))
        };
        true
    }

    /// Candidates that may be asked, in order: proven ones first, then by the position in the
    /// tracker's list. Candidates that failed recently are returned only when no other candidate is
    /// left or awaited: even a fast narinfo from them does not make their NARs reliable.
    fn asking_order(&self, now: Instant) -> Vec<usize> {
        let health = &self.wan.health;
        let is_doubtful =
            |index: &usize| health.is_doubtful(PeerKey::far(self.candidates[*index].address));
        let phase = |index: &usize| self.candidates[*index].phase;
        let is_due =
            |index: &usize| matches!(phase(index), CandidatePhase::Untried(due) if due <= now);
        let all = 0..self.candidates.len();
        let hopeful = all.clone().filter(|index| self.may_be_asked(&self.candidates[*index], now));
        let mut order: Vec<_> = hopeful.filter(is_due).collect();
        let is_awaited = |index: &usize| self.is_awaited(&self.candidates[*index], now);
        let others_are_left = order.iter().any(|index| !is_doubtful(index))
            || all.clone().any(|index| is_awaited(&index) && !is_doubtful(&index))
            || self.tracker_lookups.may_name_more(now);
        if others_are_left {
            order.retain(|index| !is_doubtful(index));
        }
        order.sort_by_cached_key(|index| {
            let CandidateState { address, rank, .. } = &self.candidates[*index];
            (
                health.eligibility(PeerKey::far(*address), now) == Eligibility::Last,
                !self.wan.is_proven(*address),
                *rank,
            )
        });
        order
    }

    /// Requests the narinfo from one candidate in another thread, because a request cannot be
    /// cancelled.
    fn send_request(&mut self, index: usize, now: Instant) -> ConnectDecision {
        let address = self.candidates[index].address;
        let is_proven = self.wan.is_proven(address);
        let target = if is_proven {
            RequestTarget::Proven(address.ip())
        } else {
            RequestTarget::Stranger(address.ip())
        };
        // Checked first, because a permit of the rate limiter cannot be returned.
        match self.wan.requests.admits(target) {
            ConnectDecision::Now => {}
            // Its answers make room.
            ConnectDecision::NotThis if is_proven => return ConnectDecision::Later,
            refusal => return refusal,
        }
        if !is_proven {
            let mut connect_rate = self.wan.connect_rate.lock();
            match connect_rate.take(address.ip(), now) {
                ConnectDecision::Now => {}
                refusal => return refusal,
            }
        }
        let (client, health) = (self.wan.client.clone(), self.wan.health.clone());
        let (sender, hash_part) = (self.sender.clone(), self.hash_part);
        let timeout = self.deadline.saturating_duration_since(now);
        let holder = Holder::peerix(address, &hash_part);
        let started = self.wan.requests.run(target, move || {
            let result = client.narinfo(&holder, &hash_part, timeout);
            let ended = Instant::now();
            match &result {
                Ok(_) => health.record_answer(PeerKey::far(address), ended - now, ended),
                // The peer did not promise the path: filters have false positives.
                Err(PeerError::NotThere | PeerError::Busy) => {
                    health.record_miss(PeerKey::far(address), ended - now, ended)
                }
                Err(e) => e.record(&health, PeerKey::far(address), now),
            }
            let _ = sender.send(NarinfoAnswer::Peer { index, result: Box::new(result) });
        });
        if !started {
            return ConnectDecision::Later;
        }
        let candidate = &mut self.candidates[index];
        (candidate.phase, candidate.was_asked) = (CandidatePhase::Asked(now), true);
        ConnectDecision::Now
    }

    fn handle_answer(&mut self, answer: NarinfoAnswer) -> Option<WanOffer> {
        match answer {
            NarinfoAnswer::Tracker { index, answer } => {
                let located = self.tracker_lookups.handle(index, answer);
                self.add_candidates(index, located);
                None
            }
            NarinfoAnswer::Peer { index, result } => self.handle_narinfo(index, *result),
        }
    }

    fn handle_narinfo(
        &mut self,
        index: usize,
        result: Result<PeerNarinfo, PeerError>,
    ) -> Option<WanOffer> {
        let candidate = &mut self.candidates[index];
        candidate.answered |= !matches!(result, Err(PeerError::Unreachable(_)));
        candidate.phase = CandidatePhase::Done;
        match result {
            Ok(narinfo) => {
                return Some(WanOffer {
                    peer: candidate.address,
                    origin: candidate.origin.clone(),
                    narinfo,
                });
            }
            // A proven peer restarts or is overloaded.
            Err(e)
                if e.is_temporary()
                    && !self.wan.health.latency(PeerKey::far(candidate.address)).is_zero() =>
            {
                let pause = backoff::pause(RETRY_DELAY, candidate.failures, MAX_RETRY_DELAY);
                candidate.failures += 1;
                candidate.phase = CandidatePhase::Untried(Instant::now() + pause);
                log::debug!(
                    "{}: candidate {}: {e}; asked again",
                    self.hash_part,
                    candidate.address
                );
            }
            Err(e) => {
                log::debug!("{}: candidate {}: {e}", self.hash_part, candidate.address);
                if !matches!(e, PeerError::NotThere | PeerError::Unreachable(_)) {
                    self.unusable = Some((candidate.address, e));
                }
            }
        }
        None
    }

    /// Reports to each tracker whether its lookup failed and how many of its candidates answered.
    /// Many silent candidates delay Nix.
    fn record_results(&mut self) {
        let now = Instant::now();
        let began = self.tracker_lookups.began().unwrap_or(now);
        for lookup in &self.tracker_lookups.lookups {
            let named = || {
                self.candidates.iter().filter(|candidate| candidate.origin.tracker == lookup.index)
            };
            let alive = named().filter(|candidate| candidate.answered).count();
            // A candidate that had no time to answer because another was faster is not silent.
            if lookup.is_answered && !self.found {
                let silent = named().filter(|candidate| self.is_silent(candidate)).count();
                lookup.tracker.record_candidates(alive, silent, began, now);
            } else if alive > 0 {
                lookup.tracker.record_candidates(alive, 0, began, now);
            }
        }
        self.tracker_lookups.record_failures(self.found, now);
    }
}

#[cfg(test)]
mod tests {
    use super::super::announce::Publication;
    use super::super::tracker::NodeIdentity;
    use super::addresses::{NamedCandidate, resolve, split};
    use super::tracker_lookups::{FoundCandidates, NAMES_TIMEOUT};
    use super::*;
    use crate::network::NetworkPolicy;
    use crate::nix::StoreDir;
    use crate::wire::tracker::{Candidate, CandidateList};

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
        let mut search = Arc::new(wan).search(&HashPart::ZERO);
        let now = Instant::now();
        let tracker = search.wan.trackers.all().next().unwrap().clone();
        search.tracker_lookups = TrackerLookups::asked(tracker, now);
        search.deadline = now + Duration::from_secs(3600);
        search
    }

    fn candidate(addr: &str, port: u16) -> Candidate {
        Candidate { peer_id: format!("{addr}:{port}"), addr: addr.into(), port, score: 0.0 }
    }

    /// Hands in a tracker's answer, and returns the candidates with host names.
    fn name_candidates(search: &mut WanSearch, candidates: Vec<Candidate>) -> Vec<NamedCandidate> {
        let (located, named) = split(CandidateList { candidates, others: Vec::new() });
        let found = FoundCandidates { located, has_names: !named.is_empty() };
        let answer = TrackerAnswer::List(Ok(found));
        search.handle_answer(NarinfoAnswer::Tracker { index: 0, answer });
        named
    }

    fn addresses(search: &WanSearch) -> Vec<SocketAddr> {
        search.candidates.iter().map(|candidate| candidate.address).collect()
    }

    fn is_over(search: &WanSearch) -> bool {
        search.candidates.iter().all(|candidate| candidate.phase == CandidatePhase::Done)
    }

    /// Uses up the connection rate of an address, so that nothing is sent to it.
    fn use_up_rate(search: &WanSearch, last: u8, now: Instant) {
        let mut connect_rate = search.wan.connect_rate.lock();
        while connect_rate.take(peer(last, 1).ip(), now) == ConnectDecision::Now {}
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
        let (names, sender) = (search.wan.names.clone(), search.sender.clone());
        let deadline = Instant::now() + Duration::from_secs(60);
        let send = move |located| {
            let answer = TrackerAnswer::Name(located);
            let _ = sender.send(NarinfoAnswer::Tracker { index: 0, answer });
        };
        let thread = std::thread::spawn(move || resolve(&names, &named, deadline, send));
        let first = search.answers.recv().unwrap();
        search.handle_answer(first);
        assert_eq!(addresses(&search), [peer(1, 3), peer(9, 4)], "one name is slow");
        search.candidates.iter_mut().for_each(|candidate| candidate.phase = CandidatePhase::Done);
        assert!(search.next_wake_up(false, Instant::now()).is_some(), "the name is awaited");
        drop(release);
        thread.join().unwrap();
        for sender in search.answers.clone().try_iter() {
            search.handle_answer(sender);
        }
        assert_eq!(addresses(&search)[2], peer(12, 2));
        assert_eq!(search.candidates[2].rank, 0);
        search.candidates[2].phase = CandidatePhase::Done;
        assert_eq!(search.next_wake_up(false, Instant::now()), None);
    }

    #[test]
    fn search_waits_for_last_names_and_ends_with_them() {
        let mut search = search(|_| Vec::new());
        name_candidates(&mut search, vec![candidate("a.example", 2)]);
        let late = Instant::now() + 2 * NAMES_TIMEOUT;
        assert!(search.next_wake_up(false, late).is_some(), "the answer is under way");
        let answer = TrackerAnswer::Name(None);
        search.handle_answer(NarinfoAnswer::Tracker { index: 0, answer });
        assert_eq!(search.next_wake_up(false, late), None);
    }

    /// Guards against a tracker that names many ports of a victim: each lookup waited 600 ms for
    /// its turn to connect, and the tracker was never suspected.
    #[test]
    fn candidates_at_address_without_answers_are_given_up_soon_and_count_as_silent() {
        let mut search = search(|_| Vec::new());
        let ports = (1..=64).map(|port| candidate("203.0.113.1", port)).collect();
        name_candidates(&mut search, ports);
        let tracker = search.tracker_lookups.lookups[0].tracker.clone();
        let now = Instant::now();
        use_up_rate(&search, 1, now);
        for (millis, ends) in [(0, false), (199, false), (200, true)] {
            let then = now + Duration::from_millis(millis);
            use_up_rate(&search, 1, then);
            search.send_requests(then);
            assert_eq!(is_over(&search), ends, "{millis} ms");
        }
        assert_eq!(tracker.unproven_timeout(), None);
        search.record_results();
        let timeout = tracker.unproven_timeout().unwrap();
        // A later lookup waits no longer than for candidates that are asked.
        search.tracker_lookups.lookups[0].is_answered = false;
        let ports = (1..=64).map(|port| candidate("203.0.113.2", port)).collect();
        name_candidates(&mut search, ports);
        let later = Instant::now();
        for (then, ends) in [(later, false), (later + timeout, true)] {
            use_up_rate(&search, 2, then);
            search.send_requests(then);
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
        let tracker = search.tracker_lookups.lookups[0].tracker.clone();
        assert!(!search.send_requests(Instant::now()));
        assert!(!is_over(&search), "one of the requests may show that somebody is there");
        search.record_results();
        let timeout = tracker.unproven_timeout().expect("64 silent candidates");
        let later = Instant::now();
        for (then, ends) in [(later, false), (later + timeout, true)] {
            search.send_requests(then);
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
            let tracker = search.tracker_lookups.lookups[0].tracker.clone();
            let now = Instant::now();
            if is_suspected {
                tracker.record_candidates(0, 64, now, now);
            }
            (search.candidates[0].phase, search.candidates[0].answered) =
                (CandidatePhase::Done, true);
            for (millis, ends) in [(0, false), (599, false), (600, true)] {
                let then = now + Duration::from_millis(millis);
                use_up_rate(&search, 1, then);
                search.send_requests(then);
                assert_eq!(is_over(&search), ends, "{millis} ms");
            }
            search.record_results();
            assert_eq!(tracker.unproven_timeout(), None);
        }
    }
}
