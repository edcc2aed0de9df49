//! The one decision of the program: which peer does this machine's Nix get a path from?
//!
//! A lookup asks the LAN, takes the narinfo of the first holder that gives a good one, and keeps the other holders as
//! alternates for the NAR request that follows. If nobody there has the path, the peers that trackers name are asked.
//! Requests of peers never come here.

use crate::nix::{HashPart, NarHash, NarInfo, PathInfo, PublicKey, StoreDir, StorePath, is_content_addressed};
use crate::peers::announce::Begun;
use crate::peers::client::{Client, Error, Way};
use crate::peers::discovery::Wake;
use crate::peers::standing::{Standing, Turn, Who};
use crate::peers::wan::{Offer, Wan, WanSearch};
use crate::peers::{Holder, Tally};
use crate::record::{Miss, Network, Record};
use crate::wire::tracker::{Role, TransferName};
use crossbeam_channel::{Receiver, RecvTimeoutError, TryRecvError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The whole of a lookup ends by then. Reached only if many peers claim a path and none delivers.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);

/// While there is hope for another holder, a narinfo may take so long, or four times the peer's usual.
const FIRST_TRY: Duration = Duration::from_millis(300);
/// When there is not, so long.
const LAST_TRY: Duration = Duration::from_secs(2);

/// Found paths whose NAR Nix has not asked for yet. Nix asks for all narinfos of a closure first; beyond so many, the
/// NAR request looks up again.
const MAX_FOUND: usize = 4096;
/// And so long.
const FOUND_FOR: Duration = Duration::from_secs(600);

/// A narinfo's signatures that are checked, 0.1 ms each; real ones have one to three.
const MAX_SIGNATURES: usize = 16;

/// A NAR's URL is kept with what was found. Ours have 95 bytes, those of the original 200.
const MAX_NAR_URL: usize = 1024;

/// A peer's NAR of a path.
#[derive(Debug, Clone)]
pub struct Source {
    /// The peer's HTTP server.
    pub peer: SocketAddr,
    /// Relative to its root.
    pub url_path: String,
    /// The hash it must have.
    pub nar_hash: NarHash,
    /// And the size.
    pub nar_size: u64,
    /// The path.
    pub path: StorePath,
    /// Set if the peer is one that a tracker named: how the tracker calls the transfer, as soon as it does.
    pub wan: Option<Begun>,
}

impl Source {
    /// The peer, as far as its standing goes.
    pub fn who(&self) -> Who {
        if self.wan.is_some() { Who::far(self.peer) } else { self.peer.into() }
    }

    /// Where it is.
    pub fn network(&self) -> Network {
        if self.wan.is_some() { Network::Wan } else { Network::Lan }
    }

    /// What lies between it and this node. A transfer is named only once: if this is asked again, it is not counted.
    pub fn take_way(&mut self) -> Way {
        match &mut self.wan {
            Some(begun) => Way::Wan(std::mem::take(begun).get().cloned()),
            None => Way::Lan,
        }
    }
}

/// Looks up paths for this machine's Nix.
pub struct Lookup {
    lan: Option<Arc<Wake>>,
    wan: Option<Arc<Wan>>,
    client: Arc<Client>,
    standing: Arc<Standing>,
    trusted: Vec<PublicKey>,
    store_dir: StoreDir,
    record: Arc<Record>,
    flights: Mutex<HashMap<HashPart, Arc<Flight>>>,
    found: Mutex<HashMap<HashPart, Found>>,
}

struct Found {
    source: Source,
    alternates: Search,
    at: Instant,
}

/// A lookup under way, for those who ask the same.
#[derive(Default)]
struct Flight {
    landed: Mutex<Option<Option<NarInfo>>>,
    condition: Condvar,
}

impl Lookup {
    /// `lan` and `wan`: where it looks. `trusted`: keys one of which must have signed what is found; none leaves that to
    /// Nix. Every lookup is told to `record`.
    pub fn new(
        lan: Option<Arc<Wake>>,
        wan: Option<Arc<Wan>>,
        client: Arc<Client>,
        standing: Arc<Standing>,
        trusted: Vec<PublicKey>,
        store_dir: StoreDir,
        record: Arc<Record>,
    ) -> Self {
        let (flights, found) = Default::default();
        Lookup { lan, wan, client, standing, trusted, store_dir, record, flights, found }
    }

    /// The narinfo of a peer that has the path; its `URL` is the peer's. Equal lookups at the same time are one.
    pub fn narinfo(&self, hash_part: &HashPart) -> Option<NarInfo> {
        let (flight, is_first) = {
            let mut flights = lock(&self.flights);
            match flights.get(hash_part) {
                Some(flight) => (flight.clone(), false),
                None => {
                    let flight = Arc::new(Flight::default());
                    flights.insert(*hash_part, flight.clone());
                    (flight, true)
                }
            }
        };
        if !is_first {
            return flight.wait();
        }
        // Lands also when the search panics, with a miss.
        let mut landing = Landing { lookup: self, hash_part, flight: &flight, narinfo: None };
        landing.narinfo = self.search_and_keep(hash_part);
        landing.narinfo.clone()
    }

    /// What was found for the path, if its NAR has that hash: looked up before, or now. The search gives alternates.
    pub fn sources(&self, hash_part: &HashPart, nar_hash: &NarHash) -> Option<(Source, Search)> {
        let found = lock(&self.found).remove(hash_part);
        if let Some(found) = found
            && found.source.nar_hash == *nar_hash
            && found.at.elapsed() < FOUND_FOR
            && self.standing.turn(found.source.who(), Instant::now()) == Turn::Now
            // One that failed since is asked only if nobody else has it.
            && !self.standing.is_doubtful(found.source.who())
        {
            return Some((found.source, found.alternates));
        }
        let mut search = self.search(hash_part);
        let source = self.next_source(&mut search, nar_hash, None)?;
        Some((source, search))
    }

    /// The next peer that has this very NAR, of that size if one is given.
    pub fn next_source(&self, search: &mut Search, nar_hash: &NarHash, nar_size: Option<u64>) -> Option<Source> {
        loop {
            let Offered { source, .. } = self.next_offer(search)?;
            if source.nar_hash == *nar_hash && nar_size.is_none_or(|size| source.nar_size == size) {
                return Some(source);
            }
            log::debug!("{}: peer {} has another NAR", search.hash_part, source.peer);
        }
    }

    /// Has a tracker told what came of a transfer to this node.
    pub fn received(&self, transfer: &TransferName, bytes: u64) {
        if let Some(wan) = &self.wan {
            wan.report(transfer, Role::Receiver, bytes);
        }
    }

    /// And of one from this node.
    pub fn sent(&self, transfer: &TransferName, bytes: u64) {
        if let Some(wan) = &self.wan {
            wan.report(transfer, Role::Sender, bytes);
        }
    }

    /// Asks the LAN anew, and the trackers after it.
    pub fn search(&self, hash_part: &HashPart) -> Search {
        let tally = Arc::new(Tally::default());
        Search {
            hash_part: *hash_part,
            holders: self.lan.as_ref().map(|lan| lan.ask(*hash_part, tally.clone())),
            wan: self.wan.as_ref().map(|wan| wan.search(hash_part)),
            tally,
            unusable: None,
            seen: Vec::new(),
            untried: Vec::new(),
            slow: Vec::new(),
            last_resort: Vec::new(),
            until: Instant::now() + LOOKUP_TIMEOUT,
            has_lan: self.lan.is_some(),
        }
    }

    fn search_and_keep(&self, hash_part: &HashPart) -> Option<NarInfo> {
        let began = Instant::now();
        let mut search = self.search(hash_part);
        let Some(Offered { source, narinfo, peer_id }) = self.next_offer(&mut search) else {
            let (took, why) = (began.elapsed(), search.why_not());
            log::debug!("{hash_part}: no peer has it ({took:?})");
            self.record.missed(hash_part, why, took);
            return None;
        };
        let now = Instant::now();
        log::debug!("{}: peer {} has it ({:?})", narinfo.info.path, source.peer, now - began);
        self.record.hit(&source.path, source.network(), source.peer, peer_id.as_deref(), now - began);
        let mut found = lock(&self.found);
        if found.len() >= MAX_FOUND {
            found.retain(|_, f| now.saturating_duration_since(f.at) < FOUND_FOR);
            if found.len() >= MAX_FOUND {
                found.clear();
            }
        }
        // Candidates are many; who needs others asks the trackers again.
        search.wan = self.wan.as_ref().map(|wan| wan.search(hash_part));
        found.insert(*hash_part, Found { source, alternates: search, at: now });
        Some(narinfo)
    }

    /// The next holder with a good narinfo. Reliable and fast peers first; one that hangs is not waited for while there
    /// is another.
    fn next_offer(&self, search: &mut Search) -> Option<Offered> {
        loop {
            let now = Instant::now();
            search.take_in(&self.standing, now);
            // A doubtful peer's turn comes when nobody else may still answer.
            let doubtful = |holder: &Holder| search.holders.is_some() && self.standing.is_doubtful(holder.http);
            let ready = search.untried.first().is_some_and(|holder| !doubtful(holder));
            if now >= search.until {
                return None;
            } else if ready {
                let holder = search.untried.remove(0);
                let hope = search.holders.is_some() || !search.untried.is_empty() || !search.slow.is_empty();
                let usual = (self.standing.latency(holder.http) * 4).min(LAST_TRY);
                let timeout = if hope { FIRST_TRY.max(usual) } else { LAST_TRY };
                match self.try_holder(search, &holder, timeout, hope) {
                    Tried::Good(offer) => return Some(*offer),
                    Tried::Slow => search.slow.push(holder),
                    Tried::Bad => {}
                }
            } else if search.holders.is_some() {
                search.wait();
            } else {
                // Those that hung get more time; then there may be somebody elsewhere; and those that failed lately get a
                // little.
                let (holder, timeout) = match search.slow.pop() {
                    Some(holder) => (holder, LAST_TRY),
                    None => {
                        if let Some(offer) = self.next_wan_offer(search) {
                            return Some(offer);
                        }
                        (search.last_resort.pop()?, FIRST_TRY)
                    }
                };
                if let Tried::Good(offer) = self.try_holder(search, &holder, timeout, false) {
                    return Some(*offer);
                }
            }
        }
    }

    fn try_holder(&self, search: &mut Search, holder: &Holder, timeout: Duration, may_be_slow: bool) -> Tried {
        let began = Instant::now();
        let answer = self.client.narinfo(holder, &search.hash_part, timeout);
        let now = Instant::now();
        match answer {
            Ok(narinfo) => {
                self.standing.answered(holder.http, now - began, now);
                let Some(source) = self.accept(holder.http, &narinfo, &mut search.unusable) else { return Tried::Bad };
                search.tally.content.store(true, Ordering::Relaxed);
                Tried::Good(Box::new(Offered { source, narinfo, peer_id: None }))
            }
            Err(Error::Unreachable(ureq::Error::Timeout(_))) if may_be_slow => {
                self.standing.hung(holder.http, timeout, began, now);
                search.unusable = Some(Miss::failed(holder.http, &"its narinfo does not come"));
                Tried::Slow
            }
            Err(e) => {
                if let Some(fault) = e.fault() {
                    self.standing.failed(holder.http, fault, began, now, &e);
                }
                search.unusable = Some(Miss::failed(holder.http, &e));
                Tried::Bad
            }
        }
    }

    /// The next good narinfo of a peer that a tracker named.
    fn next_wan_offer(&self, search: &mut Search) -> Option<Offered> {
        let (wan, unusable, search) = (self.wan.as_ref()?, &mut search.unusable, search.wan.as_mut()?);
        loop {
            let Offer { peer, origin, narinfo } = search.next_offer()?;
            if let Some(mut source) = self.accept(peer, &narinfo, unusable) {
                source.wan = Some(wan.begin_transfer(&origin));
                return Some(Offered { source, narinfo, peer_id: Some(origin.peer_id) });
            }
        }
    }

    /// Where the NAR of a narinfo is to be had, if Nix may be offered it; else why not.
    fn accept(&self, peer: SocketAddr, narinfo: &NarInfo, unusable: &mut Option<Miss>) -> Option<Source> {
        if narinfo.url.len() > MAX_NAR_URL || narinfo.url.contains("://") {
            log::debug!("peer {peer}: NAR URL too long or elsewhere");
            *unusable = Some(Miss::failed(peer, &"the URL of its NAR is too long, or elsewhere"));
            return None;
        }
        if !self.is_trusted(&narinfo.info) {
            log::debug!("{}: peer {peer} has it without a trusted signature", narinfo.info.path);
            *unusable = Some(Miss::Untrusted(peer));
            return None;
        }
        let (nar_hash, nar_size) = (narinfo.info.nar_hash, narinfo.info.nar_size);
        let path = narinfo.info.path.clone();
        Some(Source { peer, url_path: narinfo.url.clone(), nar_hash, nar_size, path, wan: None })
    }

    fn is_trusted(&self, info: &PathInfo) -> bool {
        if self.trusted.is_empty() || is_content_addressed(info, &self.store_dir) {
            return true;
        }
        let fingerprint = info.fingerprint(&self.store_dir);
        let signatures = info.signatures.iter().take(MAX_SIGNATURES);
        signatures.into_iter().any(|s| self.trusted.iter().any(|key| key.verify(fingerprint.as_bytes(), s)))
    }
}

/// A good narinfo, and where its NAR is to be had.
struct Offered {
    source: Source,
    narinfo: NarInfo,
    /// What a tracker calls the peer.
    peer_id: Option<String>,
}

enum Tried {
    Good(Box<Offered>),
    Slow,
    Bad,
}

/// The holders of one path: those that answered, and those that still may.
pub struct Search {
    hash_part: HashPart,
    /// `None` when nobody can answer any more.
    holders: Option<Receiver<Holder>>,
    /// Those that trackers name, whose turn comes when nobody of the LAN has it.
    wan: Option<WanSearch>,
    /// Tells discovery that a good one was found, and how many answered.
    tally: Arc<Tally>,
    /// Why the last one that has it is of no use.
    unusable: Option<Miss>,
    seen: Vec<Holder>,
    untried: Vec<Holder>,
    slow: Vec<Holder>,
    /// Those that failed lately.
    last_resort: Vec<Holder>,
    until: Instant,
    /// Whether neighbours are asked at all.
    has_lan: bool,
}

impl Search {
    /// The path that is looked for.
    pub fn hash_part(&self) -> &HashPart {
        &self.hash_part
    }

    /// Whether there is another holder.
    pub fn has_more(&self) -> bool {
        !self.untried.is_empty()
            || !self.slow.is_empty()
            || self.holders.as_ref().is_some_and(|h| !h.is_empty())
            || self.wan.as_ref().is_some_and(WanSearch::has_more)
    }

    /// Whether there may be one: the trackers have not been asked yet.
    pub fn may_have_more(&self) -> bool {
        self.has_more() || self.wan.as_ref().is_some_and(|wan| !wan.has_begun())
    }

    /// Why nothing was found.
    fn why_not(&mut self) -> Miss {
        if let Some(why) = self.unusable.take() {
            return why;
        }
        let far = self.wan.as_ref();
        if let Some((peer, e)) = far.and_then(WanSearch::useless) {
            return Miss::failed(*peer, e);
        }
        // Who is seen and was not tried is avoided.
        if let Some(peer) = self.seen.first().map(|holder| holder.http).or_else(|| far.and_then(WanSearch::avoided)) {
            return Miss::Avoided(peer);
        }
        let Some((near, near_silent)) = self.near() else { return Miss::Busy };
        let (far_asked, far_silent) = far.map(WanSearch::asked_and_silent).unwrap_or_default();
        match (near + far_asked, near_silent + far_silent) {
            (0, _) => Miss::Alone { no_tracker: far.is_some_and(|wan| !wan.has_tracker()) },
            (asked, 0) => Miss::Nobody { asked },
            (asked, silent) => Miss::Silent { asked, silent },
        }
    }

    /// How many neighbours were asked, and how many of them did not answer.
    fn near(&self) -> Option<(u32, u32)> {
        if self.has_lan { self.tally.asked_and_silent() } else { Some((0, 0)) }
    }

    /// Gives the search, resumed for alternates, its time anew.
    pub fn resume(&mut self) {
        self.until = Instant::now() + LOOKUP_TIMEOUT;
        self.wan.iter_mut().for_each(WanSearch::resume);
    }

    /// Takes in everyone who has answered.
    fn take_in(&mut self, standing: &Standing, now: Instant) {
        while let Some(holders) = &self.holders {
            match holders.try_recv() {
                Ok(holder) => self.add(holder),
                Err(TryRecvError::Empty) => break,
                Err(TryRecvError::Disconnected) => self.holders = None,
            }
        }
        self.untried.retain(|holder| match standing.turn(holder.http, now) {
            Turn::Now => true,
            Turn::Last => {
                self.last_resort.push(holder.clone());
                false
            }
            Turn::Never => false,
        });
        standing.sort(&mut self.untried, |holder| holder.http);
    }

    /// Waits for one more answer.
    fn wait(&mut self) {
        let Some(holders) = &self.holders else { return };
        match holders.recv_deadline(self.until) {
            Ok(holder) => self.add(holder),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => self.holders = None,
        }
    }

    fn add(&mut self, holder: Holder) {
        if !self.seen.contains(&holder) {
            self.seen.push(holder.clone());
            self.untried.push(holder);
        }
    }
}

impl Flight {
    fn wait(&self) -> Option<NarInfo> {
        let landed = lock(&self.landed);
        // The first one ends by itself; the deadline is for the case that its thread does not.
        let timeout = LOOKUP_TIMEOUT + LAST_TRY * 2;
        let waited = self.condition.wait_timeout_while(landed, timeout, |landed| landed.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone().flatten()
    }
}

struct Landing<'a> {
    lookup: &'a Lookup,
    hash_part: &'a HashPart,
    flight: &'a Flight,
    narinfo: Option<NarInfo>,
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        lock(&self.lookup.flights).remove(self.hash_part);
        *lock(&self.flight.landed) = Some(self.narinfo.clone());
        self.flight.condition.notify_all();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
