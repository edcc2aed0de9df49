//! Peers on the LAN: finds the holder of a path that gives a good narinfo first.
//!
//! Discovery names the holders and decides how long to wait (see [`crate::lan`]). The
//! first holder is asked at once. Every 100 ms without a good narinfo, twice as many further
//! holders are asked as the time before. A holder that failed recently is asked when no other
//! holder is left.

mod holder_queue;

use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::concurrency_limit::ConcurrencyLimit;
use super::discovery_lookup::DiscoveryLookup;
use super::health::PeerHealth;
use super::picker::HealthRank;
use super::request_pool::{POOL_RETRY_DELAY, RequestPool};
use crate::backoff;
use crate::lan::{DiscoveryClient, Holder, LOOKUP_TIMEOUT, LookupUpdate, MAX_HOLDERS, Neighbour};
use crate::nix::HashPart;
use crate::stats::MissReason;
use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use holder_queue::{HolderQueue, LanHolder};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Timeout of a narinfo from an alternate holder. Discovery does not wait for it, as its lookup is
/// over, and Nix is waiting for a NAR meanwhile.
const ALTERNATE_TIMEOUT: Duration = Duration::from_secs(2);
/// Minimum narinfo timeout of a holder that failed recently. Four times its latency applies if that
/// is longer.
const DOUBTFUL_TIMEOUT: Duration = Duration::from_millis(300);
/// First delay before a holder is asked again after a temporary failure: it was busy, broke or
/// refused the connection, or did not accept it in time. The delay doubles. Retries end when
/// discovery stops waiting.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// Time limit for discovery to list its peers.
const LIST_TIMEOUT: Duration = Duration::from_millis(200);
/// Longest delay between two requests to a holder after temporary failures.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(320);
/// Capacity of the queue of received narinfos: one for each holder.
const MAX_RESULTS: usize = MAX_HOLDERS;

/// Finds and asks the peers on the LAN.
pub struct LanSource {
    pub(super) discovery: Arc<DiscoveryClient>,
    pub(super) client: Arc<PeerClient>,
    pub(super) health: Arc<PeerHealth>,
    pub(super) requests: Arc<RequestPool>,
}

impl LanSource {
    /// Creates a source from its parts.
    pub fn new(
        discovery: Arc<DiscoveryClient>,
        client: Arc<PeerClient>,
        health: Arc<PeerHealth>,
        requests: Arc<RequestPool>,
    ) -> Self {
        LanSource { discovery, client, health, requests }
    }

    /// Requests the narinfo from one peer that is said to have the path. `None` if the request
    /// fails; the failure is recorded. Blocks for about `timeout` at most.
    pub fn narinfo(
        &self,
        peer: SocketAddr,
        hash_part: &HashPart,
        timeout: Duration,
    ) -> Option<PeerNarinfo> {
        let began = Instant::now();
        let holder = Holder::peerix(peer, hash_part);
        match self.client.narinfo(&holder, hash_part, timeout) {
            Ok(narinfo) => Some(narinfo),
            Err(e) => {
                log::debug!("{hash_part}: peer {peer}: {e}");
                e.record(&self.health, peer, began);
                None
            }
        }
    }

    /// HTTP servers of those of the addresses `ips` that are live neighbours, in the order of
    /// `ips`. Blocks for 200 ms at most.
    pub fn live_http_servers(&self, ips: &[IpAddr]) -> Vec<SocketAddr> {
        let neighbours = self.discovery.neighbours(LIST_TIMEOUT).unwrap_or_default();
        let http = |ip: &IpAddr| {
            let is_live = |n: &&Neighbour| {
                n.address.ip().to_canonical() == *ip
                    && n.silent_since.is_none()
                    && n.heard.is_some()
            };
            neighbours.iter().find(is_live)?.http()
        };
        ips.iter().filter_map(http).collect()
    }

    /// Starts a search for the holders of a path. Does not wait for answers. Each message in
    /// `interrupt` makes [`LanSearch::next_offer`] return `None` once, so that a holder on another
    /// network does not wait for the LAN.
    pub fn search(self: &Arc<Self>, hash_part: &HashPart, interrupt: Receiver<()>) -> LanSearch {
        LanSearch {
            lan: self.clone(),
            hash_part: *hash_part,
            lookup: DiscoveryLookup::start(&self.discovery, hash_part),
            queue: HolderQueue::default(),
            requests: NarinfoRequests::new(),
            limit: ConcurrencyLimit::new(1),
            deadline: Instant::now() + LOOKUP_TIMEOUT.get(),
            first_seen: None,
            failure: None,
            interrupt,
        }
    }
}

/// A request whose answer is awaited.
struct NarinfoRequest {
    candidate: LanHolder,
    began: Instant,
    /// End of the wait; `None` if discovery decides it.
    deadline: Option<Instant>,
}

/// Outcome of a narinfo request.
struct NarinfoResult {
    candidate: LanHolder,
    began: Instant,
    ended: Instant,
    result: Result<PeerNarinfo, PeerError>,
}

/// Narinfo from a LAN peer. Its form is checked, its signatures are not.
pub struct LanOffer {
    candidate: LanHolder,
    /// Time from the request to the narinfo.
    latency: Duration,
    /// The narinfo.
    pub narinfo: PeerNarinfo,
}

impl LanOffer {
    /// Address of the peer's HTTP server.
    pub fn http(&self) -> SocketAddr {
        self.candidate.http()
    }
}

/// Narinfo requests in progress, and the queue of their results.
struct NarinfoRequests {
    in_flight: Vec<NarinfoRequest>,
    result_sender: Sender<NarinfoResult>,
    results: Receiver<NarinfoResult>,
}

impl NarinfoRequests {
    fn new() -> Self {
        let (result_sender, results) = bounded(MAX_RESULTS);
        NarinfoRequests { in_flight: Vec::new(), result_sender, results }
    }

    /// Requests for which discovery waits.
    fn awaited_by_discovery(&mut self) -> impl Iterator<Item = &mut NarinfoRequest> {
        self.in_flight.iter_mut().filter(|request| request.deadline.is_none())
    }
}

/// Search for the holders of one path on the LAN.
pub struct LanSearch {
    lan: Arc<LanSource>,
    hash_part: HashPart,
    lookup: DiscoveryLookup,
    queue: HolderQueue,
    requests: NarinfoRequests,
    limit: ConcurrencyLimit,
    deadline: Instant,
    first_seen: Option<SocketAddr>,
    failure: Option<MissReason>,
    /// Channel that signals a holder on another network.
    interrupt: Receiver<()>,
}

impl LanSearch {
    /// Tells discovery that a holder on another network was accepted, so that it stops waiting.
    pub fn settle(&mut self) {
        self.lookup.settle(None);
    }

    /// Restarts the time limit of the search for alternate holders. The search ends at `deadline`
    /// at the latest.
    pub fn resume(&mut self, deadline: Instant) {
        self.deadline = deadline.min(Instant::now() + LOOKUP_TIMEOUT.get());
    }

    /// Drops the narinfos that arrive until the search is resumed: large ones would keep their
    /// reservations, and nobody reads them. Their holders are asked again then.
    pub fn suspend(&mut self) {
        let dropped = std::mem::replace(&mut self.requests, NarinfoRequests::new());
        for request in dropped.in_flight {
            self.queue.add_again(request.candidate);
        }
    }

    /// Holders that have not failed and are not excluded, as far as they answer within `timeout`.
    /// Holders that serve their narinfos under other paths, as the original peerix does, are left
    /// out. Blocks for at most `timeout`.
    pub fn holders(&mut self, timeout: Duration) -> Vec<SocketAddr> {
        let deadline = Instant::now() + timeout;
        while let Some(Ok(update)) =
            self.lookup.updates.as_ref().map(|updates| updates.recv_deadline(deadline))
        {
            self.handle_update(update, Instant::now());
        }
        self.queue
            .iter()
            .chain(self.requests.in_flight.iter().map(|request| &request.candidate))
            .map(|candidate| &candidate.holder)
            .filter(|holder| **holder == Holder::peerix(holder.http, &self.hash_part))
            .map(|holder| holder.http)
            .collect()
    }

    /// Number of peers that discovery asked, and number of those that did not answer. `None` while
    /// the lookup runs, or if there were too many lookups.
    pub fn asked_and_unanswered(&self) -> Option<(u32, u32)> {
        self.lookup.counts
    }

    /// Takes the reason why the last holder gave no usable narinfo.
    pub fn take_failure(&mut self) -> Option<MissReason> {
        self.failure.take()
    }

    /// HTTP server of the first holder that was found.
    pub fn first_seen(&self) -> Option<SocketAddr> {
        self.first_seen
    }

    /// Records that Nix gets this narinfo, and tells discovery to stop waiting.
    pub fn accept(&mut self, offer: &LanOffer) {
        let now = Instant::now();
        self.lan.health.record_answer(offer.http(), offer.latency, now);
        if self.lookup.settle(Some(offer.candidate.peer)) {
            for request in self.requests.awaited_by_discovery() {
                request.deadline = Some(now + ALTERNATE_TIMEOUT);
            }
        }
    }

    /// Records that Nix cannot use this narinfo because of `why`.
    pub fn reject(&mut self, offer: &LanOffer, why: MissReason) {
        self.failure = Some(why);
        self.lan.health.record_miss(offer.http(), offer.latency, Instant::now());
        self.lookup.report_failed(offer.candidate.peer);
    }

    /// Returns the next holder's narinfo; `None` if no holder is awaited any more, time is up, or
    /// the search is interrupted. `with_last_resort` also asks holders that are in a pause, for
    /// when nobody else has the path. Blocks for 5 s at most.
    pub fn next_offer(&mut self, with_last_resort: bool) -> Option<LanOffer> {
        loop {
            let now = Instant::now();
            while let Some(Ok(update)) = self.lookup.updates.as_ref().map(Receiver::try_recv) {
                self.handle_update(update, now);
            }
            let in_flight = &mut self.requests.in_flight;
            in_flight.retain(|request| request.deadline.is_none_or(|deadline| now < deadline));
            let is_blocked = !self.send_requests(now, with_last_resort);
            let NarinfoRequests { in_flight, results, .. } = &self.requests;
            let is_idle = in_flight.is_empty() && self.lookup.updates.is_none() && !is_blocked;
            if now >= self.deadline || is_idle && results.is_empty() {
                return None;
            }
            let deadlines = in_flight.iter().filter_map(|request| request.deadline);
            let blocked = is_blocked.then(|| now + POOL_RETRY_DELAY);
            let wake_up = deadlines
                .chain(blocked)
                .chain(self.queue.next_retry())
                .chain(self.limit.next_increase())
                .fold(self.deadline, Instant::min);
            let no_updates = never();
            select! {
                recv(results) -> result => if let Ok(result) = result
                    && let Some(offer) = self.handle_result(result) {
                    return Some(offer);
                },
                recv(self.lookup.updates.as_ref().unwrap_or(&no_updates)) -> update => match update {
                    Ok(update) => self.handle_update(update, now),
                    Err(_) => self.handle_end(now),
                },
                recv(self.interrupt) -> _ => return None,
                default(wake_up.saturating_duration_since(now)) => {}
            }
        }
    }

    fn handle_update(&mut self, update: LookupUpdate, now: Instant) {
        match update {
            LookupUpdate::Holder { peer, holder } => {
                self.first_seen.get_or_insert(holder.http);
                if !self.queue.add(peer, holder, &self.lan.health, now) {
                    self.lookup.report_failed(peer);
                }
            }
            LookupUpdate::Ended { asked, unanswered } => {
                self.lookup.counts = Some((asked, unanswered));
                self.handle_end(now);
            }
        }
    }

    /// Handles the end of the wait in discovery: requests that are still running count as hung.
    fn handle_end(&mut self, now: Instant) {
        if !self.lookup.end() {
            return;
        }
        self.queue.clear_retries();
        for request in self.requests.awaited_by_discovery() {
            request.deadline = Some(now);
            let http = request.candidate.http();
            self.lan.health.record_timeout(http, now - request.began, request.began, now);
            self.failure = Some(MissReason::failed(http, &"its narinfo does not come"));
        }
    }

    /// Starts as many requests as the limit admits. Returns false if the request pool is full.
    fn send_requests(&mut self, now: Instant, with_last_resort: bool) -> bool {
        self.limit.increase_if_due(now, |max| MAX_HOLDERS.min(2 * max + 1));
        self.queue.update(&self.lan.health, now);
        while self.requests.in_flight.len() < self.limit.max() {
            let is_hedging = self.limit.max() > 1;
            let nobody_else = self.lookup.updates.is_none() && self.requests.in_flight.is_empty();
            let worst = if nobody_else && with_last_resort {
                HealthRank::LastResort
            } else if nobody_else || is_hedging {
                HealthRank::Doubtful
            } else {
                HealthRank::Good
            };
            let Some(candidate) = self.queue.pop(worst) else { return true };
            let deadline = self.narinfo_timeout(&candidate).map(|timeout| now + timeout);
            if !self.send_request(&candidate, now) {
                self.queue.put_back(candidate);
                return false;
            }
            self.requests.in_flight.push(NarinfoRequest { candidate, began: now, deadline });
            self.limit.start(now);
        }
        true
    }

    /// Longest wait for the narinfo of a holder; `None` if discovery decides it.
    fn narinfo_timeout(&self, candidate: &LanHolder) -> Option<Duration> {
        match candidate.rank {
            HealthRank::Good => (!self.lookup.is_open()).then_some(ALTERNATE_TIMEOUT),
            HealthRank::Doubtful => {
                let latency = self.lan.health.latency(candidate.http());
                Some((latency * 4).clamp(DOUBTFUL_TIMEOUT, ALTERNATE_TIMEOUT))
            }
            HealthRank::LastResort => Some(DOUBTFUL_TIMEOUT),
        }
    }

    fn send_request(&self, candidate: &LanHolder, began: Instant) -> bool {
        let (client, health) = (self.lan.client.clone(), self.lan.health.clone());
        let (result_sender, hash_part, candidate) =
            (self.requests.result_sender.clone(), self.hash_part, candidate.clone());
        let http = candidate.http();
        self.lan.requests.start(http.ip(), health.is_proven(http), move || {
            let result = client.narinfo(&candidate.holder, &hash_part, LOOKUP_TIMEOUT.get());
            let ended = Instant::now();
            // All failures of one lookup count once.
            if let Err(e) = &result
                && !candidate.is_blamed
            {
                e.record(&health, http, began);
            }
            let _ = result_sender.try_send(NarinfoResult { candidate, began, ended, result });
        })
    }

    fn handle_result(&mut self, result: NarinfoResult) -> Option<LanOffer> {
        let NarinfoResult { mut candidate, began, ended, result } = result;
        self.requests.in_flight.retain(|request| request.candidate.peer != candidate.peer);
        match result {
            Ok(narinfo) => Some(LanOffer { candidate, latency: ended - began, narinfo }),
            Err(e) => {
                log::debug!("{}: peer {}: {e}", self.hash_part, candidate.http());
                self.failure = Some(MissReason::failed(candidate.http(), &e));
                if e.is_temporary() && self.lookup.is_open() {
                    let delay = backoff::pause(RETRY_DELAY, candidate.failures, MAX_RETRY_DELAY);
                    candidate.failures += 1;
                    candidate.is_blamed |= e.fault().is_some();
                    self.queue.add_retry(candidate, Instant::now() + delay);
                } else {
                    self.lookup.report_failed(candidate.peer);
                }
                None
            }
        }
    }
}
