//! Peers on the LAN: which of those that say that they have a path gives its narinfo first.
//!
//! Discovery tells who has the path and how long to wait (see [`crate::lan::discovery`]). The first
//! holder is asked at once; for every 100 ms without a good narinfo, twice as many further holders
//! are asked. A holder that failed lately is asked when no other holder is left.

use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::health::{Eligibility, PeerHealth};
use super::request_pool::RequestPool;
use crate::lan::{
    DiscoveryClient, Holder, LOOKUP_TIMEOUT, LookupId, LookupUpdate, MAX_HOLDERS, Neighbour,
};
use crate::nix::HashPart;
use crate::stats::MissReason;
use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Without a good narinfo for this long, further holders are asked.
const HEDGE_DELAY: Duration = Duration::from_millis(100);
/// A narinfo that discovery does not wait for: of an alternate, after the lookup. Nix waits for a
/// NAR meanwhile.
const ALTERNATE_TIMEOUT: Duration = Duration::from_secs(2);
/// Least narinfo timeout for a holder that failed lately; four times its latency if that is longer.
const DOUBTFUL_TIMEOUT: Duration = Duration::from_millis(300);
/// When there are too many requests, the next attempt to begin one is after this.
const BLOCKED_DELAY: Duration = Duration::from_millis(2);
/// A holder that is busy, breaks or refuses the connection, or cannot be connected to in time, is
/// asked again after this, doubling, while discovery waits for it.
const RETRY_DELAY: Duration = Duration::from_millis(20);
/// Discovery lists its peers within this.
const LIST_TIMEOUT: Duration = Duration::from_millis(200);
/// Longest delay between two such requests.
const MAX_RETRY_DELAY: Duration = Duration::from_millis(320);
/// Narinfos of one lookup that wait to be looked at: one for each holder.
const MAX_FETCHED: usize = MAX_HOLDERS;

/// The peers on the LAN.
pub struct LanSource {
    pub(super) discovery: Arc<DiscoveryClient>,
    pub(super) client: Arc<PeerClient>,
    pub(super) standing: Arc<PeerHealth>,
    pub(super) requests: Arc<RequestPool>,
}

impl LanSource {
    /// The parts it works with.
    pub fn new(
        discovery: Arc<DiscoveryClient>,
        client: Arc<PeerClient>,
        standing: Arc<PeerHealth>,
        requests: Arc<RequestPool>,
    ) -> Self {
        LanSource { discovery, client, standing, requests }
    }

    /// The narinfo of a peer that says that it has the path, if it comes within `patience`.
    pub fn narinfo(
        &self,
        peer: SocketAddr,
        hash_part: &HashPart,
        patience: Duration,
    ) -> Option<PeerNarinfo> {
        let began = Instant::now();
        let holder = Holder { http: peer, url_path: narinfo_path(hash_part) };
        match self.client.narinfo(&holder, hash_part, patience) {
            Ok(narinfo) => Some(narinfo),
            Err(e) => {
                log::debug!("{hash_part}: peer {peer}: {e}");
                if let Some(fault) = e.fault() {
                    self.standing.failed(peer, fault, began, Instant::now(), &e);
                }
                None
            }
        }
    }

    /// The HTTP servers of those of these addresses that are live neighbours, in their order.
    pub fn live(&self, ips: &[IpAddr]) -> Vec<SocketAddr> {
        let neighbours = self.discovery.neighbours(LIST_TIMEOUT).unwrap_or_default();
        let server = |ip: &IpAddr| {
            let is_it = |n: &&Neighbour| {
                n.address.ip().to_canonical() == *ip
                    && n.silent_since.is_none()
                    && n.heard.is_some()
            };
            let neighbour = neighbours.iter().find(is_it)?;
            let mut server = neighbour.address;
            server.set_port(neighbour.http_port?);
            Some(server)
        };
        ips.iter().filter_map(server).collect()
    }

    /// Asks the peers for a path, and returns what they answer.
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> LanSearch {
        let (lookup, updates) = self.discovery.look_up(*hash_part);
        let (fetched, narinfos) = bounded(MAX_FETCHED);
        LanSearch {
            lan: self.clone(),
            hash_part: *hash_part,
            lookup,
            updates: Some(updates),
            is_open: true,
            untried: Vec::new(),
            doubtful: Vec::new(),
            last_resort: Vec::new(),
            under_way: Vec::new(),
            retries: Vec::new(),
            fetched,
            narinfos,
            most_under_way: 1,
            hedges: 1,
            next_hedge: None,
            until: Instant::now() + LOOKUP_TIMEOUT.get(),
            first_seen: None,
            failure: None,
            counts: None,
            interrupt: never(),
        }
    }
}

/// Where peerix has the narinfo of a path of its store.
fn narinfo_path(hash_part: &HashPart) -> String {
    format!("local/{hash_part}.narinfo")
}

/// A peer that says that it has the path.
#[derive(Debug, Clone)]
struct LanHolder {
    /// Its name in discovery.
    peer: SocketAddr,
    holder: Holder,
    /// Requests that failed for a reason that may pass.
    failures: u32,
    /// One of its failures was recorded.
    is_blamed: bool,
}

/// A request that is waited for.
struct NarinfoRequest {
    peer: SocketAddr,
    http: SocketAddr,
    began: Instant,
    /// Until when, if discovery does not tell.
    until: Option<Instant>,
}

/// A request to be made again.
struct NarinfoRetry {
    candidate: LanHolder,
    at: Instant,
}

/// A narinfo, or why there is none.
struct NarinfoResult {
    candidate: LanHolder,
    began: Instant,
    ended: Instant,
    result: Result<PeerNarinfo, PeerError>,
}

/// A narinfo of a peer. Its form is checked, its signatures are not.
pub struct LanOffer {
    candidate: LanHolder,
    /// Time from the request to the narinfo.
    latency: Duration,
    /// The narinfo.
    pub narinfo: PeerNarinfo,
}

impl LanOffer {
    /// The peer's HTTP server.
    pub fn http(&self) -> SocketAddr {
        self.candidate.holder.http
    }
}

/// The holders of one path on the LAN.
pub struct LanSearch {
    lan: Arc<LanSource>,
    hash_part: HashPart,
    lookup: LookupId,
    /// `None` when no further holder comes.
    updates: Option<Receiver<LookupUpdate>>,
    /// Discovery waits for what is under way, and is to be told of it.
    is_open: bool,
    untried: Vec<LanHolder>,
    /// Those that failed or hung lately.
    doubtful: Vec<LanHolder>,
    /// Those that are to be left alone for a while.
    last_resort: Vec<LanHolder>,
    under_way: Vec<NarinfoRequest>,
    retries: Vec<NarinfoRetry>,
    fetched: Sender<NarinfoResult>,
    narinfos: Receiver<NarinfoResult>,
    /// Requests that may be under way at once, and by how many the next hedge raises that.
    most_under_way: usize,
    hedges: usize,
    next_hedge: Option<Instant>,
    until: Instant,
    first_seen: Option<SocketAddr>,
    failure: Option<MissReason>,
    counts: Option<(u32, u32)>,
    /// Says that there is a holder elsewhere.
    interrupt: Receiver<()>,
}

impl LanSearch {
    /// Has the next offer be `None`, once, when there is something in `interrupt`: a holder
    /// elsewhere need not wait for the LAN.
    pub fn interrupted_by(mut self, interrupt: Receiver<()>) -> Self {
        self.interrupt = interrupt;
        self
    }

    /// A holder elsewhere was accepted: discovery waits for nobody any more.
    pub fn settle(&mut self) {
        if std::mem::replace(&mut self.is_open, false) {
            self.lan.discovery.settled(self.lookup, None);
        }
    }

    /// Gives the search, resumed for alternates, its time anew, but none after `until`.
    pub fn resume(&mut self, until: Instant) {
        self.until = until.min(Instant::now() + LOOKUP_TIMEOUT.get());
    }

    /// The holders that have not failed, without those that are left alone wholly, as far as they
    /// answer within `patience`. Holders of the original's kind, whose narinfos are elsewhere, are
    /// not among them.
    pub fn holders(&mut self, patience: Duration) -> Vec<SocketAddr> {
        let until = Instant::now() + patience;
        while let Some(Ok(update)) =
            self.updates.as_ref().map(|updates| updates.recv_deadline(until))
        {
            self.take_update(update, Instant::now());
        }
        let unasked = [&self.untried, &self.doubtful, &self.last_resort].into_iter().flatten();
        let usual = narinfo_path(&self.hash_part);
        let unasked = unasked
            .filter(|candidate| candidate.holder.url_path == usual)
            .map(|candidate| candidate.holder.http);
        unasked.chain(self.under_way.iter().map(|request| request.http)).collect()
    }

    /// Number of peers that were asked, and of those that gave no answer; `None` if there were too
    /// many lookups.
    pub fn asked_and_unanswered(&self) -> Option<(u32, u32)> {
        self.counts
    }

    /// Why the last holder gave no narinfo.
    pub fn take_failure(&mut self) -> Option<MissReason> {
        self.failure.take()
    }

    /// The holder that was met first.
    pub fn first_seen(&self) -> Option<SocketAddr> {
        self.first_seen
    }

    /// The next holder's narinfo. Blocks until there is one, or until no holder is waited for.
    pub fn next_offer(&mut self) -> Option<LanOffer> {
        self.next(false)
    }

    /// The next narinfo from a holder that is to be left alone, when nobody else has the path.
    pub fn next_last_resort(&mut self) -> Option<LanOffer> {
        self.next(true)
    }

    /// Nix gets this narinfo: discovery waits for no other.
    pub fn accept(&mut self, offer: &LanOffer) {
        let now = Instant::now();
        self.lan.standing.answered(offer.http(), offer.latency, now);
        if std::mem::replace(&mut self.is_open, false) {
            self.lan.discovery.settled(self.lookup, Some(offer.candidate.peer));
            for request in self.under_way.iter_mut().filter(|request| request.until.is_none()) {
                request.until = Some(now + ALTERNATE_TIMEOUT);
            }
        }
    }

    /// Nix cannot use this narinfo, for the given reason.
    pub fn reject(&mut self, offer: &LanOffer, why: MissReason) {
        self.failure = Some(why);
        self.lan.standing.alive(offer.http(), offer.latency, Instant::now());
        self.report_failed(offer.candidate.peer);
    }

    fn next(&mut self, with_last_resort: bool) -> Option<LanOffer> {
        loop {
            let now = Instant::now();
            self.take_updates(now);
            self.under_way.retain(|request| request.until.is_none_or(|until| now < until));
            let is_blocked = !self.ask(now, with_last_resort);
            let is_idle = self.under_way.is_empty() && self.updates.is_none() && !is_blocked;
            if now >= self.until || is_idle && self.narinfos.is_empty() {
                return None;
            }
            let deadlines = self.under_way.iter().filter_map(|request| request.until);
            let blocked = is_blocked.then(|| now + BLOCKED_DELAY);
            let retry = self.retries.iter().map(|retry| retry.at).min();
            let wake_up = deadlines
                .chain(blocked)
                .chain(retry)
                .chain(self.next_hedge)
                .fold(self.until, Instant::min);
            let no_updates = never();
            select! {
                recv(self.narinfos) -> fetched => if let Ok(fetched) = fetched
                    && let Some(offer) = self.take(fetched) {
                    return Some(offer);
                },
                recv(self.updates.as_ref().unwrap_or(&no_updates)) -> update => match update {
                    Ok(update) => self.take_update(update, now),
                    Err(_) => self.end(now),
                },
                recv(self.interrupt) -> _ => return None,
                default(wake_up.saturating_duration_since(now)) => {}
            }
        }
    }

    fn take_updates(&mut self, now: Instant) {
        while let Some(Ok(update)) = self.updates.as_ref().map(Receiver::try_recv) {
            self.take_update(update, now);
        }
    }

    fn take_update(&mut self, update: LookupUpdate, now: Instant) {
        match update {
            LookupUpdate::Holder { peer, holder } => {
                self.add(LanHolder { peer, holder, failures: 0, is_blamed: false }, now)
            }
            LookupUpdate::Ended { asked, unanswered } => {
                self.counts = Some((asked, unanswered));
                self.end(now);
            }
        }
    }

    /// Discovery waits for no peer any more.
    fn end(&mut self, now: Instant) {
        self.updates = None;
        if !std::mem::replace(&mut self.is_open, false) {
            return;
        }
        self.retries.clear();
        for request in self.under_way.iter_mut().filter(|request| request.until.is_none()) {
            request.until = Some(now);
            self.lan.standing.hung(request.http, now - request.began, request.began, now);
            self.failure = Some(MissReason::failed(request.http, &"its narinfo does not come"));
        }
    }

    fn add(&mut self, candidate: LanHolder, now: Instant) {
        let http = candidate.holder.http;
        self.first_seen.get_or_insert(http);
        let standing = &self.lan.standing;
        let list = match standing.turn(http, now) {
            Eligibility::Now if !standing.is_doubtful(http) => return self.untried.push(candidate),
            Eligibility::Now => Some(&mut self.doubtful),
            Eligibility::Last => Some(&mut self.last_resort),
            Eligibility::Never => None,
        };
        let peer = candidate.peer;
        list.into_iter().for_each(|list| list.push(candidate.clone()));
        self.report_failed(peer);
    }

    fn report_failed(&self, peer: SocketAddr) {
        if self.is_open {
            self.lan.discovery.failed(self.lookup, peer);
        }
    }

    /// Begins as many requests as there may be. Returns false if there are too many of all lookups.
    fn ask(&mut self, now: Instant, with_last_resort: bool) -> bool {
        if self.next_hedge.is_some_and(|at| at <= now) {
            self.hedges = MAX_HOLDERS.min(self.hedges * 2);
            self.most_under_way = MAX_HOLDERS.min(self.most_under_way + self.hedges);
            self.next_hedge = Some(now + HEDGE_DELAY);
        }
        let (due, later) = self.retries.drain(..).partition(|retry| retry.at <= now);
        self.retries = later;
        let due: Vec<NarinfoRetry> = due;
        self.untried.extend(due.into_iter().map(|retry| retry.candidate));
        self.lan.standing.sort(&mut self.untried, |candidate| candidate.holder.http);
        while self.under_way.len() < self.most_under_way {
            let is_hedging = self.most_under_way > 1;
            let nobody_else = self.updates.is_none() && self.under_way.is_empty();
            let (candidate, until) = if !self.untried.is_empty() {
                (self.untried.remove(0), (!self.is_open).then_some(now + ALTERNATE_TIMEOUT))
            } else if !self.doubtful.is_empty() && (nobody_else || is_hedging) {
                let candidate = self.doubtful.remove(0);
                let timeout = self.doubtful_timeout(&candidate);
                (candidate, Some(now + timeout))
            } else if !self.last_resort.is_empty() && nobody_else && with_last_resort {
                (self.last_resort.remove(0), Some(now + DOUBTFUL_TIMEOUT))
            } else {
                return true;
            };
            if !self.fetch(&candidate, now) {
                self.untried.insert(0, candidate);
                return false;
            }
            let LanHolder { peer, holder, .. } = candidate;
            self.under_way.push(NarinfoRequest { peer, http: holder.http, began: now, until });
            self.next_hedge.get_or_insert(now + HEDGE_DELAY);
        }
        true
    }

    fn doubtful_timeout(&self, candidate: &LanHolder) -> Duration {
        (self.lan.standing.latency(candidate.holder.http) * 4)
            .clamp(DOUBTFUL_TIMEOUT, ALTERNATE_TIMEOUT)
    }

    fn fetch(&self, candidate: &LanHolder, began: Instant) -> bool {
        let (client, standing) = (self.lan.client.clone(), self.lan.standing.clone());
        let (fetched, hash_part, candidate) =
            (self.fetched.clone(), self.hash_part, candidate.clone());
        let http = candidate.holder.http;
        let is_proven = !standing.latency(http).is_zero() && !standing.is_doubtful(http);
        self.lan.requests.start(http.ip(), is_proven, move || {
            let result = client.narinfo(&candidate.holder, &hash_part, LOOKUP_TIMEOUT.get());
            let ended = Instant::now();
            // However often a lookup asks, its failures are one.
            if let Err(e) = &result
                && let Some(fault) = e.fault().filter(|_| !candidate.is_blamed)
            {
                standing.failed(http, fault, began, ended, e);
            }
            let _ = fetched.try_send(NarinfoResult { candidate, began, ended, result });
        })
    }

    fn take(&mut self, fetched: NarinfoResult) -> Option<LanOffer> {
        let NarinfoResult { mut candidate, began, ended, result } = fetched;
        self.under_way.retain(|request| request.peer != candidate.peer);
        match result {
            Ok(narinfo) => Some(LanOffer { candidate, latency: ended - began, narinfo }),
            Err(e) => {
                log::debug!("{}: peer {}: {e}", self.hash_part, candidate.holder.http);
                self.failure = Some(MissReason::failed(candidate.holder.http, &e));
                if e.is_temporary() && self.is_open {
                    let delay = MAX_RETRY_DELAY.min(RETRY_DELAY * (1 << candidate.failures.min(8)));
                    candidate.failures += 1;
                    candidate.is_blamed |= e.fault().is_some();
                    self.retries.push(NarinfoRetry { candidate, at: Instant::now() + delay });
                } else {
                    self.report_failed(candidate.peer);
                }
                None
            }
        }
    }
}

impl Drop for LanSearch {
    fn drop(&mut self) {
        self.settle();
    }
}
