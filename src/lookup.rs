//! The one decision of the program: which peer does this machine's Nix get a path from?
//!
//! A lookup asks the LAN, takes the narinfo of the first holder that gives a good one, and
//! remembers the addresses of all holders for the NAR request that follows. If nobody there has the
//! path, the peers that trackers name are asked. Requests of peers never come here.

mod found;

use crate::nix::{DrvOutput, HashPart, NarHash, NarInfo, PathInfo, Realisation, StorePath};
use crate::peers::announce::PendingTransferName;
use crate::peers::client::{LinkKind, LogBody, PeerClient, PeerNarinfo};
use crate::peers::friends::{FriendLink, FriendOffer, FriendSearch, Friends, nobody};
use crate::peers::health::PeerKey;
use crate::peers::lan::{LanOffer, LanSearch, LanSource};
use crate::peers::wan::{WanOffer, WanSearch, WanSource};
use crate::stats::{MissReason, Network, Stats};
use crate::trust::TrustedKeys;
use crate::wire::tracker::{Role, TransferName};
use found::{FoundPaths, MAX_SOURCES};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A thread that waits for another one's lookup of the same path gives up after this. The first one
/// ends by itself; the deadline is for the case that its thread does not.
const FLIGHT_TIMEOUT: Duration = Duration::from_secs(15);

/// A NAR's URL is kept with what was found. Ours have 95 bytes, those of the original 200.
const MAX_NAR_URL: usize = 1024;

/// A NAR, and the peers that are known to have it.
#[derive(Debug)]
pub struct FoundNar {
    /// The path.
    pub path: StorePath,
    /// The hash that the NAR must have.
    pub nar_hash: NarHash,
    /// The size that it must have.
    pub nar_size: u64,
    /// The peers, that with the narinfo first.
    pub sources: Vec<NarSource>,
}

/// A peer that has a NAR.
#[derive(Debug, Clone)]
pub struct NarSource {
    /// The peer's HTTP server.
    pub peer: SocketAddr,
    /// The NAR there, relative to the server's root, if it is not at its usual place
    /// ([`NarSource::nar_path`]).
    pub url_path: Option<Box<str>>,
    /// Set if the peer is one that a tracker named: how the tracker calls the transfer, as soon as
    /// it does.
    pub wan: Option<PendingTransferName>,
    /// Set if the peer is a friend.
    pub friend: Option<Arc<FriendLink>>,
}

impl NarSource {
    /// A peer on the LAN that says that it has the path.
    fn neighbour(peer: SocketAddr) -> NarSource {
        NarSource { peer, url_path: None, wan: None, friend: None }
    }

    /// The peer, as far as its standing goes.
    pub fn who(&self) -> PeerKey {
        if self.network() == Network::Wan { PeerKey::far(self.peer) } else { self.peer.into() }
    }

    /// Where it is.
    pub fn network(&self) -> Network {
        let is_far = self.friend.as_ref().is_some_and(|friend| !friend.is_near(self.peer));
        if self.wan.is_some() || is_far { Network::Wan } else { Network::Lan }
    }

    /// What asks it, where `others` asks all that are no friends.
    pub fn client<'a>(&'a self, others: &'a PeerClient) -> &'a PeerClient {
        self.friend.as_ref().map_or(others, |friend| &friend.client)
    }

    /// Where its NAR is, relative to the root of its server.
    pub fn nar_path(&self, hash_part: &HashPart, nar_hash: &NarHash) -> String {
        self.url_path.as_deref().map_or_else(|| usual_nar_path(hash_part, nar_hash), str::to_owned)
    }

    /// What lies between it and this node. A transfer is named only once: if this is asked again,
    /// it is not counted.
    pub fn take_way(&mut self) -> LinkKind {
        let is_far = self.network() == Network::Wan;
        match (&mut self.wan, is_far) {
            (Some(begun), _) => LinkKind::Wan(std::mem::take(begun).get().cloned()),
            (None, true) => LinkKind::Wan(None),
            (None, false) => LinkKind::Lan,
        }
    }
}

/// What peerix calls a NAR.
pub fn nar_name(hash_part: &HashPart, nar_hash: &NarHash) -> String {
    format!("{hash_part}-{}.nar", nar_hash.to_nix32())
}

/// Where peerix has a NAR of its store.
fn usual_nar_path(hash_part: &HashPart, nar_hash: &NarHash) -> String {
    format!("local/nar/{}", nar_name(hash_part, nar_hash))
}

/// Looks up paths for this machine's Nix.
pub struct LookupService {
    lan: Option<Arc<LanSource>>,
    wan: Option<Arc<WanSource>>,
    friends: Option<Arc<Friends>>,
    trusted: Arc<TrustedKeys>,
    record: Arc<Stats>,
    flights: Mutex<HashMap<HashPart, Arc<Flight>>>,
    found: FoundPaths,
}

/// A lookup under way, for those who ask the same.
#[derive(Default)]
struct Flight {
    landed: Mutex<Option<Option<Arc<PeerNarinfo>>>>,
    condition: Condvar,
}

impl LookupService {
    /// `lan` and `wan`: where it looks. `trusted` decides whose paths are taken. Every lookup is
    /// told to `record`.
    pub fn new(
        lan: Option<Arc<LanSource>>,
        wan: Option<Arc<WanSource>>,
        trusted: Arc<TrustedKeys>,
        record: Arc<Stats>,
    ) -> Self {
        let (flights, found) = Default::default();
        LookupService { lan, wan, friends: None, trusted, record, flights, found }
    }

    /// A neighbour's realisation of `id` that a trusted key signed. Nix 2.8 to 2.34 register what a
    /// substituter says here unchecked, and take the content that it leads to without a signature.
    /// So without any trusted key there is none, also where Nix would decide about a narinfo.
    pub fn realisation(&self, id: &DrvOutput) -> Option<Realisation> {
        let is_good = |realisation: &Realisation| {
            self.trusted.has_signed(&realisation.fingerprint(), &realisation.signatures)
        };
        self.lan.as_ref()?.realisation(id, is_good)
    }

    /// The build log of a derivation, of a neighbour that has it. Nobody has signed it.
    pub fn log(&self, derivation: &StorePath) -> Option<LogBody> {
        self.lan.as_ref()?.log(derivation)
    }

    /// The hash of the NAR of a path, if all peers whose narinfo Nix would be offered agree on it.
    pub fn agreed_nar_hash(&self, hash_part: &HashPart) -> Option<NarHash> {
        let mut search = self.search(hash_part);
        let first = self.next_offer(&mut search)?.narinfo.info.nar_hash;
        while let Some(offered) = self.next_offer(&mut search) {
            if offered.narinfo.info.nar_hash != first {
                log::debug!(
                    "{hash_part}: peers have different NARs, and the URL that Nix remembers tells none"
                );
                return None;
            }
        }
        Some(first)
    }

    /// Looks at friends too.
    pub fn with_friends(self, friends: Option<Arc<Friends>>) -> Self {
        LookupService { friends, ..self }
    }

    /// The narinfo of a peer that has the path; its `URL` is the peer's. Equal lookups at the same
    /// time are one.
    pub fn narinfo(&self, hash_part: &HashPart) -> Option<Arc<PeerNarinfo>> {
        match self.join_or_search(hash_part) {
            // A miss of a lookup that began before this one may be older than the path. One joined
            // now began later.
            (None, true) => self.join_or_search(hash_part).0,
            (narinfo, _) => narinfo,
        }
    }

    /// The narinfo, and whether it is of a lookup that was under way already.
    fn join_or_search(&self, hash_part: &HashPart) -> (Option<Arc<PeerNarinfo>>, bool) {
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
            return (flight.wait(), true);
        }
        // Lands also when the search panics, with a miss.
        let mut landing = FlightGuard { lookup: self, hash_part, flight: &flight, narinfo: None };
        landing.narinfo = self.search_and_keep(hash_part).map(Arc::new);
        (landing.narinfo.clone(), false)
    }

    /// The NAR of the path, if it has that hash: looked up before, or now, until `until` at the
    /// latest.
    pub fn find(
        &self,
        hash_part: &HashPart,
        nar_hash: &NarHash,
        until: Instant,
    ) -> Option<FoundNar> {
        let found = self.found.take(hash_part, Instant::now());
        if let Some(found) = found.filter(|found| found.nar_hash == *nar_hash) {
            return Some(found);
        }
        let mut search = self.search(hash_part);
        let FoundNarinfo { source, narinfo, .. } = self.next_of(&mut search, nar_hash, until)?;
        Some(search.found(source, &narinfo.info))
    }

    /// The next peer that has this very NAR, of that size, if it is found until `until`.
    pub fn next_source(
        &self,
        search: &mut HolderSearch,
        found: &FoundNar,
        until: Instant,
    ) -> Option<NarSource> {
        loop {
            let FoundNarinfo { source, narinfo, .. } =
                self.next_of(search, &found.nar_hash, until)?;
            if narinfo.info.nar_size == found.nar_size {
                return Some(source);
            }
        }
    }

    fn next_of(
        &self,
        search: &mut HolderSearch,
        nar_hash: &NarHash,
        until: Instant,
    ) -> Option<FoundNarinfo> {
        search.resume(until);
        loop {
            let offered = self.next_offer(search)?;
            if offered.narinfo.info.nar_hash == *nar_hash {
                return Some(offered);
            }
            log::debug!("{}: peer {} has another NAR", search.hash_part, offered.source.peer);
        }
    }

    /// Asks the LAN again who has the path, and returns those that say so within `patience`. That
    /// their NAR is the one that is wanted is not known.
    pub fn holders(&self, hash_part: &HashPart, patience: Duration) -> Vec<NarSource> {
        let addresses = self.lan.as_ref().map(|lan| lan.search(hash_part).holders(patience));
        addresses.into_iter().flatten().map(NarSource::neighbour).collect()
    }

    /// Where the NAR is at a peer, by its narinfo; `None` if it has no such NAR.
    pub fn nar_place(
        &self,
        peer: SocketAddr,
        found: &FoundNar,
        patience: Duration,
    ) -> Option<NarSource> {
        let hash_part = found.path.hash_part();
        let narinfo = self.lan.as_ref()?.narinfo(peer, &hash_part, patience)?;
        let source = self.accept(peer, &narinfo).ok()?;
        let is_it =
            narinfo.info.nar_hash == found.nar_hash && narinfo.info.nar_size == found.nar_size;
        is_it.then_some(source)
    }

    /// Those of these addresses that are live neighbours, as sources of a NAR, in their order.
    pub fn live_neighbours(&self, ips: &[IpAddr]) -> Vec<NarSource> {
        let live = self.lan.as_ref().map(|lan| lan.live(ips)).unwrap_or_default();
        live.into_iter().map(NarSource::neighbour).collect()
    }

    /// Whether trackers may name further holders when the LAN has none.
    pub fn has_trackers(&self) -> bool {
        self.wan.is_some()
    }

    /// Gives back the memory of what nobody asked for.
    pub fn rest(&self) {
        self.found.clear();
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
    pub fn search(&self, hash_part: &HashPart) -> HolderSearch {
        let friends = self.friends.as_ref().map(|friends| friends.search(hash_part));
        let is_found = friends.as_ref().map_or_else(nobody, |friends| friends.is_found().clone());
        HolderSearch {
            hash_part: *hash_part,
            friends,
            lan: self.lan.as_ref().map(|lan| lan.search(hash_part).interrupted_by(is_found)),
            wan: self.wan.as_ref().map(|wan| wan.search(hash_part)),
            unusable: None,
        }
    }

    fn search_and_keep(&self, hash_part: &HashPart) -> Option<PeerNarinfo> {
        let began = Instant::now();
        let mut search = self.search(hash_part);
        let Some(FoundNarinfo { source, narinfo, peer_id }) = self.next_offer(&mut search) else {
            let (took, why) = (began.elapsed(), search.why_not());
            log::debug!("{hash_part}: no peer has it ({took:?})");
            self.record.missed(hash_part, why, took);
            return None;
        };
        let now = Instant::now();
        log::debug!("{}: peer {} has it ({:?})", narinfo.info.path, source.peer, now - began);
        self.record.hit(
            &narinfo.info.path,
            source.network(),
            source.peer,
            peer_id.as_deref(),
            now - began,
        );
        self.found.put(search.found(source, &narinfo.info), now);
        Some(narinfo)
    }

    /// The next holder with a good narinfo: on the LAN, else beyond it, else one that is to be left
    /// alone for a while.
    fn next_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        self.next_near_offer(search)
            .or_else(|| self.next_wan_offer(search))
            .or_else(|| self.next_lan_offer(search, LanSearch::next_last_resort))
    }

    /// The next holder on the LAN, or a friend that has it before the LAN's answers are in.
    fn next_near_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        loop {
            if let Some(offered) = self.next_lan_offer(search, LanSearch::next_offer) {
                return Some(offered);
            }
            let FriendOffer { link, address, narinfo } = search.friends.as_mut()?.next_offer()?;
            match self.accept(address, &narinfo) {
                Ok(mut source) => {
                    let name = Some(link.friend.name.clone());
                    source.friend = Some(link);
                    search.lan.iter_mut().for_each(LanSearch::settle);
                    return Some(FoundNarinfo { source, narinfo, peer_id: name });
                }
                Err(why) => search.unusable = Some(why),
            }
        }
    }

    fn next_lan_offer(
        &self,
        search: &mut HolderSearch,
        next: impl Fn(&mut LanSearch) -> Option<LanOffer>,
    ) -> Option<FoundNarinfo> {
        let lan = search.lan.as_mut()?;
        loop {
            let offer = next(lan)?;
            match self.accept(offer.http(), &offer.narinfo) {
                Ok(source) => {
                    lan.accept(&offer);
                    return Some(FoundNarinfo { source, narinfo: offer.narinfo, peer_id: None });
                }
                Err(why) => lan.reject(&offer, why),
            }
        }
    }

    /// The next good narinfo of a peer that a tracker named.
    fn next_wan_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        let (wan, unusable, search) =
            (self.wan.as_ref()?, &mut search.unusable, search.wan.as_mut()?);
        loop {
            let WanOffer { peer, origin, narinfo } = search.next_offer()?;
            match self.accept(peer, &narinfo) {
                Ok(mut source) => {
                    source.wan = Some(wan.begin_transfer(&origin));
                    return Some(FoundNarinfo { source, narinfo, peer_id: Some(origin.peer_id) });
                }
                Err(why) => *unusable = Some(why),
            }
        }
    }

    /// The source of a narinfo's NAR, if Nix may be offered it; else why not.
    fn accept(&self, peer: SocketAddr, narinfo: &NarInfo) -> Result<NarSource, MissReason> {
        if narinfo.url.len() > MAX_NAR_URL || narinfo.url.contains("://") {
            log::debug!("peer {peer}: NAR URL too long or elsewhere");
            return Err(MissReason::failed(peer, &"the URL of its NAR is too long, or elsewhere"));
        }
        if !self.trusted.accepts(&narinfo.info) {
            log::debug!("{}: peer {peer} has it without a trusted signature", narinfo.info.path);
            return Err(MissReason::Untrusted(peer));
        }
        let usual = usual_nar_path(&narinfo.info.path.hash_part(), &narinfo.info.nar_hash);
        let url_path = (narinfo.url != usual).then(|| narinfo.url.as_str().into());
        Ok(NarSource { peer, url_path, wan: None, friend: None })
    }
}

/// A good narinfo, and where its NAR is to be had.
struct FoundNarinfo {
    source: NarSource,
    narinfo: PeerNarinfo,
    /// What a tracker, or for a friend the user, calls the peer.
    peer_id: Option<String>,
}

/// The holders of one path: those that answered, and those that still may.
pub struct HolderSearch {
    hash_part: HashPart,
    lan: Option<LanSearch>,
    friends: Option<FriendSearch>,
    /// Peers that trackers name, whose turn comes when no peer of the LAN has it.
    wan: Option<WanSearch>,
    /// Why the last one beyond the LAN that has it is of no use.
    unusable: Option<MissReason>,
}

impl HolderSearch {
    /// What was offered, with the other holders that have answered by now.
    fn found(&mut self, source: NarSource, info: &PathInfo) -> FoundNar {
        let others = self.lan.as_mut().map(|lan| lan.holders(Duration::ZERO)).unwrap_or_default();
        let others = others
            .into_iter()
            .filter(|other| other.ip() != source.peer.ip())
            .map(NarSource::neighbour);
        let sources = std::iter::once(source.clone()).chain(others).take(MAX_SOURCES).collect();
        FoundNar {
            path: info.path.clone(),
            nar_hash: info.nar_hash,
            nar_size: info.nar_size,
            sources,
        }
    }

    /// Why nothing was found.
    fn why_not(&mut self) -> MissReason {
        let lan_failure = self.lan.as_mut().and_then(LanSearch::take_failure);
        if let Some(why) = self.unusable.take().or(lan_failure) {
            return why;
        }
        let far = self.wan.as_ref();
        if let Some((peer, e)) = far.and_then(WanSearch::useless) {
            return MissReason::failed(*peer, e);
        }
        // One that says that it has the path and was not asked for it is avoided.
        let first_seen = self.lan.as_ref().and_then(LanSearch::first_seen);
        if let Some(peer) = first_seen.or_else(|| far.and_then(WanSearch::avoided)) {
            return MissReason::Avoided(peer);
        }
        let near = self.lan.as_ref().map_or(Some((0, 0)), LanSearch::asked_and_unanswered);
        let Some((near, near_silent)) = near else { return MissReason::Busy };
        let friends =
            self.friends.as_ref().map(FriendSearch::asked_and_unanswered).unwrap_or_default();
        let (near, near_silent) = (near + friends.0, near_silent + friends.1);
        let (far_asked, far_silent) = far.map(WanSearch::asked_and_silent).unwrap_or_default();
        match (near + far_asked, near_silent + far_silent) {
            (0, _) => MissReason::Alone { no_tracker: far.is_some_and(|wan| !wan.has_tracker()) },
            (asked, 0) => MissReason::Nobody { asked },
            (asked, silent) => MissReason::Silent { asked, silent },
        }
    }

    /// Gives the search, resumed for alternates, its time anew, but none after `until`.
    fn resume(&mut self, until: Instant) {
        self.lan.iter_mut().for_each(|lan| lan.resume(until));
        self.friends.iter_mut().for_each(|friends| friends.resume(until));
        self.wan.iter_mut().for_each(|wan| wan.resume(until));
    }
}

impl Flight {
    fn wait(&self) -> Option<Arc<PeerNarinfo>> {
        let landed = lock(&self.landed);
        let waited =
            self.condition.wait_timeout_while(landed, FLIGHT_TIMEOUT, |landed| landed.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.clone().flatten()
    }
}

struct FlightGuard<'a> {
    lookup: &'a LookupService,
    hash_part: &'a HashPart,
    flight: &'a Flight,
    narinfo: Option<Arc<PeerNarinfo>>,
}

impl Drop for FlightGuard<'_> {
    fn drop(&mut self) {
        let listed = lock(&self.lookup.flights).remove(self.hash_part);
        // Nobody joins any more. Those who did have the flight, too; without them a system call is
        // saved.
        if listed.is_none_or(|flight| Arc::strong_count(&flight) > 2) {
            *lock(&self.flight.landed) = Some(self.narinfo.clone());
            self.flight.condition.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
