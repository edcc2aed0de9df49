//! Peers on other networks: which of those that trackers name has a path.
//!
//! Every tracker is asked at once; then every candidate by one datagram, and the best four over HTTP at the same time: a
//! miss is known when all have said no, which takes a round trip after the tracker's, and a hit takes two, for its
//! connection and its narinfo. The whole ends after two seconds, whatever trackers and peers do.

use super::announce::{Begun, Trackers};
use super::client::{Client, Error};
use super::names::Names;
use super::requests::Requests;
use super::standing::{Fault, Standing, Turn, Who};
use crate::lan::{CandidateAnswer, DiscoveryClient, Holder, LOOKUP_TIMEOUT};
use crate::network::Networks;
use crate::nix::{HashPart, NarInfo};
use crate::wire::tracker::{
    Candidate, Candidates, MAX_ADDR, MAX_CANDIDATES, MAX_OTHERS, Role, TransferName, can_be_peer, is_peer_id,
};
use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// The whole of a lookup beyond the LAN.
const WAN_TIMEOUT: Duration = Duration::from_secs(2);
/// Candidates asked over HTTP at once.
const AT_ONCE: usize = 4;
/// One that takes longer makes room for another; its answer still counts.
const SLOW: Duration = Duration::from_millis(500);
/// Names of candidates are waited for so long.
const NAMES_WAIT: Duration = Duration::from_millis(500);
/// Who is waited for is looked at this often, if nothing happens.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Who may not be asked for one of these reasons is looked at again after this.
const BLOCKED: Duration = Duration::from_millis(10);

/// The peers beyond the LAN.
pub struct Wan {
    trackers: Arc<Trackers>,
    client: Arc<Client>,
    standing: Arc<Standing>,
    discovery: Arc<DiscoveryClient>,
    networks: Arc<Networks>,
    names: Arc<Names>,
    requests: Arc<Requests>,
}

impl Wan {
    /// The parts it works with.
    pub fn new(
        trackers: Arc<Trackers>,
        client: Arc<Client>,
        standing: Arc<Standing>,
        discovery: Arc<DiscoveryClient>,
        networks: Arc<Networks>,
        requests: Arc<Requests>,
    ) -> Self {
        Wan { trackers, client, standing, discovery, networks, names: Arc::default(), requests }
    }

    /// A search for a path, which begins when it is asked for the first time.
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> WanSearch {
        let (answer, answers) = bounded(self.trackers.all().count() * (MAX_CANDIDATES + MAX_OTHERS));
        WanSearch {
            wan: self.clone(),
            hash_part: *hash_part,
            began: None,
            until: Instant::now(),
            latest: Instant::now() + WAN_TIMEOUT + LOOKUP_TIMEOUT.get(),
            entries: Vec::new(),
            told: never(),
            answer,
            answers,
            found: false,
            useless: None,
        }
    }

    fn is_own(&self, address: SocketAddr) -> bool {
        address.port() == self.trackers.me().port && self.networks.is_own(address.ip())
    }

    /// Whether it has answered before, and has done so since it failed.
    fn is_proven(&self, address: SocketAddr) -> bool {
        let who = Who::far(address);
        !self.standing.latency(who).is_zero() && !self.standing.is_doubtful(who)
    }

    /// What the trackers name, the first answer first; all are asked at once.
    fn list(&self, hash_part: &HashPart, until: Instant) -> Vec<(usize, Candidates)> {
        let of_use: Vec<_> = self.trackers.all().enumerate().filter(|(_, tracker)| tracker.is_of_use()).collect();
        if let [(at, tracker)] = of_use[..] {
            return tracker.lookup(hash_part, self.trackers.me()).map(|found| (at, found)).into_iter().collect();
        }
        let (found, answers) = bounded(of_use.len());
        for (at, tracker) in of_use {
            let (tracker, me, hash_part, found) =
                (tracker.clone(), self.trackers.me().clone(), *hash_part, found.clone());
            let asked = thread::Builder::new().name("tracker".into()).spawn(move || {
                if let Ok(candidates) = tracker.lookup(&hash_part, &me) {
                    let _ = found.try_send((at, candidates));
                }
            });
            if let Err(e) = asked {
                log::debug!("thread for a tracker: {e}");
            }
        }
        drop(found);
        let mut all = Vec::new();
        while let Ok(answer) = answers.recv_deadline(until) {
            all.push(answer);
        }
        all
    }
}

/// Where an offer comes from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The tracker that named the peer, by its place in [`Trackers::all`].
    pub tracker: usize,
    /// The peer's ID there.
    pub peer_id: String,
}

/// Whether what a tracker says of a peer is of the form that it has to be: names are remembered, and sent to others.
fn can_be_asked(candidate: &Candidate) -> bool {
    is_peer_id(&candidate.peer_id) && (1..=MAX_ADDR).contains(&candidate.addr.len()) && candidate.port != 0
}

/// A peer of another network that has the path, and its narinfo.
pub struct Offer {
    /// Its HTTP server.
    pub peer: SocketAddr,
    /// Who named it.
    pub origin: Origin,
    /// The narinfo; its form is checked, its signatures are not.
    pub narinfo: NarInfo,
}

/// The candidates of one path, in the order in which they are tried.
pub struct WanSearch {
    wan: Arc<Wan>,
    hash_part: HashPart,
    began: Option<Instant>,
    until: Instant,
    /// It ends by then, whenever it begins.
    latest: Instant,
    entries: Vec<Entry>,
    told: Receiver<CandidateAnswer>,
    answer: Sender<Answer>,
    answers: Receiver<Answer>,
    found: bool,
    /// Who answered last with something that is of no use, and what.
    useless: Option<(SocketAddr, Error)>,
}

struct Entry {
    address: SocketAddr,
    origin: Origin,
    has_filter: bool,
    /// If it has never answered, it is not waited for from then on.
    unproven_until: Option<Instant>,
    state: State,
    /// It has said something, whatever it was.
    answered: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not asked over HTTP.
    Untried,
    /// Not asked over HTTP, and said that it has the path.
    Promising,
    /// Asked then.
    Asked(Instant),
    /// There is nothing more to be had from it.
    Done,
}

struct Answer {
    at: usize,
    result: Box<Result<NarInfo, Error>>,
}

impl WanSearch {
    /// Gives the search, resumed for alternates, its time anew, but none after `until`.
    pub fn resume(&mut self, until: Instant) {
        self.latest = until;
        self.until = until.min(Instant::now() + WAN_TIMEOUT);
    }

    /// Whether the trackers have been asked.
    pub fn has_begun(&self) -> bool {
        self.began.is_some()
    }

    /// Whether somebody is left who may have the path.
    pub fn has_more(&self) -> bool {
        self.entries.iter().any(|entry| entry.state != State::Done)
    }

    /// How many candidates there were, and how many of them gave no sign of life.
    pub fn asked_and_silent(&self) -> (u32, u32) {
        let count = |entries: usize| u32::try_from(entries).unwrap_or(u32::MAX);
        (count(self.entries.len()), count(self.entries.iter().filter(|entry| !entry.answered).count()))
    }

    /// Who answered last with something that is of no use, and what that was.
    pub fn useless(&self) -> Option<&(SocketAddr, Error)> {
        self.useless.as_ref()
    }

    /// A candidate that is not asked, as it failed too often.
    pub fn avoided(&self) -> Option<SocketAddr> {
        let now = Instant::now();
        let is_avoided = |entry: &&Entry| self.wan.standing.turn(Who::far(entry.address), now) == Turn::Never;
        let promised = self.entries.iter().filter(|entry| entry.state == State::Promising);
        promised.into_iter().find(is_avoided).map(|entry| entry.address)
    }

    /// Whether any tracker is there to be asked.
    pub fn has_tracker(&self) -> bool {
        self.wan.trackers.all().any(|tracker| tracker.is_reached())
    }

    /// The next peer that has it, within two seconds of the first call or of [`WanSearch::resume`].
    pub fn next_offer(&mut self) -> Option<Offer> {
        if self.began.is_none() {
            self.begin();
        }
        loop {
            let now = Instant::now();
            if now >= self.until {
                break;
            }
            let is_blocked = !self.ask(now);
            if !is_blocked && !self.entries.iter().any(|entry| self.is_awaited(entry, now)) {
                break;
            }
            let look_again = if is_blocked { BLOCKED } else { LOOK_AGAIN };
            let wake_up = self.until.min(now + look_again);
            select! {
                recv(self.answers) -> answer => if let Ok(answer) = answer
                    && let Some(offer) = self.take(answer) {
                    self.found = true;
                    self.judge();
                    return Some(offer);
                },
                recv(self.told) -> told => match told {
                    Ok(told) => self.hear(told),
                    Err(_) => self.told = never(),
                },
                default(wake_up.saturating_duration_since(now)) => {}
            }
        }
        self.judge();
        None
    }

    fn begin(&mut self) {
        let began = Instant::now();
        self.began = Some(began);
        self.until = self.latest.min(began + WAN_TIMEOUT);
        let mut listed = self.wan.list(&self.hash_part, self.until);
        let others: Vec<_> = listed.iter_mut().map(|(at, found)| (*at, std::mem::take(&mut found.others))).collect();
        listed.into_iter().for_each(|(at, found)| self.add(at, found.candidates, true));
        others.into_iter().for_each(|(at, others)| self.add(at, others, false));
        if !self.entries.is_empty() {
            let addresses = self.entries.iter().map(|entry| entry.address).collect();
            self.told = self.wan.discovery.query_candidates(self.hash_part, addresses, self.until);
        }
    }

    fn add(&mut self, tracker: usize, mut candidates: Vec<Candidate>, has_filter: bool) {
        candidates.retain(can_be_asked);
        let ip = |addr: &str| addr.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        let names: Vec<&str> = candidates.iter().map(|c| &*c.addr).filter(|addr| ip(addr).is_none()).collect();
        let mut resolved = if names.is_empty() {
            Vec::new().into_iter()
        } else {
            self.wan.names.addresses(&names, self.until.min(Instant::now() + NAMES_WAIT)).into_iter()
        };
        let patience = self.wan.trackers.all().nth(tracker).and_then(|tracker| tracker.patience());
        let unproven_until = patience.map(|patience| Instant::now() + patience);
        for candidate in &candidates {
            let ip = ip(&candidate.addr).map_or_else(|| resolved.next().flatten(), |ip| Some(ip.to_canonical()));
            let Some(ip) = ip.filter(|ip| can_be_peer(*ip)) else { continue };
            let address = SocketAddr::new(ip, candidate.port);
            let known = self.entries.iter().any(|entry| entry.address == address);
            if !known && !self.wan.is_own(address) {
                let origin = Origin { tracker, peer_id: candidate.peer_id.clone() };
                self.entries.push(Entry {
                    address,
                    origin,
                    has_filter,
                    unproven_until,
                    state: State::Untried,
                    answered: false,
                });
            }
        }
    }

    /// Whether too much was made of candidates that have never answered, of which this is one.
    fn is_given_up(&self, entry: &Entry, now: Instant) -> bool {
        let is_over = entry.unproven_until.is_some_and(|until| now >= until);
        is_over && !entry.answered && !self.wan.is_proven(entry.address)
    }

    fn is_hopeful(&self, entry: &Entry, now: Instant) -> bool {
        matches!(entry.state, State::Untried | State::Promising)
            && !self.is_given_up(entry, now)
            && self.wan.standing.turn(Who::far(entry.address), now) != Turn::Never
    }

    /// Whether its answer is worth waiting for: of one that failed lately only for a moment.
    fn is_awaited(&self, entry: &Entry, now: Instant) -> bool {
        match entry.state {
            State::Asked(at) => {
                let is_early = now < at + SLOW || self.wan.standing.turn(Who::far(entry.address), now) == Turn::Now;
                is_early && !self.is_given_up(entry, now)
            }
            _ => false,
        }
    }

    /// Asks as many as may be asked now. False if somebody is left who may not be asked because of others.
    fn ask(&mut self, now: Instant) -> bool {
        let busy = |entry: &Entry| matches!(entry.state, State::Asked(at) if now < at + SLOW);
        let mut free = AT_ONCE.saturating_sub(self.entries.iter().filter(|entry| busy(entry)).count());
        let mut is_free_to_ask = true;
        for at in self.in_turn(now) {
            if free == 0 {
                break;
            }
            match self.start(at, now) {
                true => free -= 1,
                false => is_free_to_ask = false,
            }
        }
        is_free_to_ask
    }

    /// Who may be asked, in the order of their turns: who promised before who did not, and then as the trackers have it. Who
    /// failed lately has its turn when nobody else is left or awaited: its narinfo, which may well be the fastest, says
    /// nothing of its NAR.
    fn in_turn(&self, now: Instant) -> Vec<usize> {
        let standing = &self.wan.standing;
        let is_doubtful = |at: &usize| standing.is_doubtful(Who::far(self.entries[*at].address));
        let all = 0..self.entries.len();
        let mut turns: Vec<_> = all.clone().filter(|at| self.is_hopeful(&self.entries[*at], now)).collect();
        let is_awaited = |at: &usize| matches!(self.entries[*at].state, State::Asked(at) if now < at + SLOW);
        if turns.iter().any(|at| !is_doubtful(at)) || all.clone().any(|at| is_awaited(&at) && !is_doubtful(&at)) {
            turns.retain(|at| !is_doubtful(at));
        }
        turns.sort_by_cached_key(|at| {
            let Entry { address, state, .. } = &self.entries[*at];
            (standing.turn(Who::far(*address), now) == Turn::Last, *state != State::Promising)
        });
        turns
    }

    /// Asks one for its narinfo, in a thread of its own: a request cannot be taken back, and must not be waited for. False if
    /// there are too many.
    fn start(&mut self, at: usize, now: Instant) -> bool {
        let address = self.entries[at].address;
        let (client, standing) = (self.wan.client.clone(), self.wan.standing.clone());
        let (answer, hash_part) = (self.answer.clone(), self.hash_part);
        let timeout = self.until.saturating_duration_since(now);
        let holder = Holder { http: address, url_path: format!("local/{hash_part}.narinfo") };
        let is_proven = self.wan.is_proven(address);
        let started = self.wan.requests.start(address.ip(), is_proven, move || {
            let result = client.narinfo(&holder, &hash_part, timeout);
            let then = Instant::now();
            match &result {
                Ok(_) => standing.answered(Who::far(address), then - now, then),
                // It never said that it has the path; filters are wrong now and then.
                Err(Error::NotThere | Error::Busy) => standing.alive(Who::far(address), then - now, then),
                Err(e) => standing.failed(Who::far(address), e.fault().unwrap_or(Fault::Unreachable), now, then, e),
            }
            let _ = answer.try_send(Answer { at, result: Box::new(result) });
        });
        if started {
            self.entries[at].state = State::Asked(now);
        }
        started
    }

    fn take(&mut self, Answer { at, result }: Answer) -> Option<Offer> {
        let entry = &mut self.entries[at];
        entry.state = State::Done;
        entry.answered |= !matches!(*result, Err(Error::Unreachable(_)));
        let narinfo = match *result {
            Ok(narinfo) => narinfo,
            Err(e) => {
                log::debug!("{}: candidate {}: {e}", self.hash_part, entry.address);
                if !matches!(e, Error::NotThere | Error::Unreachable(_)) {
                    self.useless = Some((entry.address, e));
                }
                return None;
            }
        };
        Some(Offer { peer: entry.address, origin: entry.origin.clone(), narinfo })
    }

    fn hear(&mut self, told: CandidateAnswer) {
        let (CandidateAnswer::Have(from) | CandidateAnswer::HaveNot(from)) = told;
        let Some(entry) = self.entries.iter_mut().find(|entry| entry.address == from) else { return };
        entry.answered = true;
        match (told, entry.state) {
            (CandidateAnswer::Have(_), State::Untried) => entry.state = State::Promising,
            // Who has no filter yet may not know yet what it may share: by HTTP it finds out.
            (CandidateAnswer::HaveNot(_), State::Untried | State::Asked(_)) if entry.has_filter => {
                entry.state = State::Done
            }
            _ => {}
        }
    }

    /// Lets the trackers know what their candidates were worth: many from whom nothing came at all cost Nix time.
    fn judge(&self) {
        let now = Instant::now();
        let began = self.began.unwrap_or(now);
        for (at, tracker) in self.wan.trackers.all().enumerate() {
            let named = || self.entries.iter().filter(|entry| entry.origin.tracker == at);
            let alive = named().filter(|entry| entry.answered).count();
            // Who had no time to answer, as another was faster, is not silent.
            let silent = if self.found { 0 } else { named().count() - alive };
            tracker.proved(alive, silent, began, now);
        }
    }
}

impl Wan {
    /// Has a tracker told what was sent or received.
    pub fn report(&self, transfer: &TransferName, role: Role, bytes: u64) {
        self.trackers.report(transfer, role, bytes);
    }

    /// Has the transfer of an offered path counted; it gets its name soon.
    pub fn begin_transfer(&self, origin: &Origin) -> Begun {
        self.trackers.begin(origin.tracker, &origin.peer_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names used to be remembered however long they were: a tracker could fill the memory with them.
    #[test]
    fn what_is_no_peer_is_not_asked() {
        let candidate = |peer_id: &str, addr: &str, port| {
            can_be_asked(&Candidate { peer_id: peer_id.into(), addr: addr.into(), port, score: 0.0 })
        };
        assert!(candidate("a", "example.org", 1) && candidate("a", "203.0.113.1", 65535));
        assert!(!candidate("", "example.org", 1) && !candidate("a\n", "example.org", 1));
        assert!(!candidate(&"a".repeat(129), "example.org", 1));
        assert!(!candidate("a", "", 1) && !candidate("a", &"a".repeat(MAX_ADDR + 1), 1));
        assert!(!candidate("a", "example.org", 0));
    }
}
