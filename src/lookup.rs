//! Finds a peer from which this machine's Nix gets a store path.
//!
//! A lookup asks the LAN and friends, and accepts the first good narinfo of a holder. It remembers
//! the addresses of all holders for the NAR request that follows. If none has the path, the lookup
//! asks the peers that trackers name. Only local requests come here: a peer's request never starts
//! a lookup.

mod found;

use crate::lock::{Condvar, Mutex};
use crate::nix::{DrvOutput, HashPart, NarHash, NarInfo, PathInfo, Realisation, StorePath};
use crate::peers::announce::PendingTransferName;
use crate::peers::client::{LinkKind, LogBody, PeerClient, PeerNarinfo};
use crate::peers::friends::{FriendLink, FriendOffer, FriendSearch, Friends};
use crate::peers::health::PeerKey;
use crate::peers::lan::{LanSearch, LanSource};
use crate::peers::wan::{WanOffer, WanSearch, WanSource};
use crate::stats::{MissReason, Network, Stats};
use crate::trust::TrustedKeys;
use crate::wire::NodeKey;
use crate::wire::tracker::{Role, TransferName};
use crossbeam_channel::never;
use found::{FoundPaths, MAX_SOURCES};
use scopeguard::guard;
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum wait for another thread's lookup of the same path. At the bound, the waiting thread
/// reports a miss. Lookups have shorter timeouts of their own, so the bound matters only if the
/// other thread hangs.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);

/// Maximum length in bytes of a narinfo's `URL`, which is stored with the found path. Narinfos with
/// longer ones are refused. URLs of peerix have 95 bytes, those of the Python peerix about 200.
const MAX_NAR_URL: usize = 1024;

/// A NAR, and the peers that are known to have it.
#[derive(Debug)]
pub struct FoundNar {
    /// The store path.
    pub path: StorePath,
    /// The hash that the NAR must have.
    pub nar_hash: NarHash,
    /// The size in bytes that the NAR must have.
    pub nar_size: u64,
    /// The peers, starting with the one whose narinfo was accepted.
    pub sources: Vec<NarSource>,
}

impl FoundNar {
    /// The NAR of a path, and peers that have it.
    pub fn new(info: &PathInfo, sources: Vec<NarSource>) -> FoundNar {
        let PathInfo { path, nar_hash, nar_size, .. } = info;
        FoundNar { path: path.clone(), nar_hash: *nar_hash, nar_size: *nar_size, sources }
    }

    /// Whether `info`, which another server gave for the path, describes the same NAR.
    pub fn is_nar_of(&self, info: &PathInfo) -> bool {
        info.nar_hash == self.nar_hash && info.nar_size == self.nar_size
    }
}

/// A peer that has a NAR.
#[derive(Debug, Clone)]
pub struct NarSource {
    /// Address and port of the peer's HTTP server.
    pub peer: SocketAddr,
    /// Path of the NAR relative to the root of that server; `None` for the default path that
    /// [`NarSource::nar_path`] returns.
    pub url_path: Option<Box<str>>,
    /// Set if a tracker named the peer: the tracker's name of the transfer, once it has assigned
    /// one.
    pub wan: Option<PendingTransferName>,
    /// Set if the peer is a friend: its client and addresses.
    pub friend: Option<Arc<FriendLink>>,
}

impl NarSource {
    /// A LAN peer that claims to have the path.
    fn neighbour(peer: SocketAddr) -> NarSource {
        NarSource { peer, url_path: None, wan: None, friend: None }
    }

    /// The key of the peer in health and pace records.
    pub fn peer_key(&self) -> PeerKey {
        if self.network() == Network::Wan { PeerKey::far(self.peer) } else { self.peer.into() }
    }

    /// Whether the peer is on the LAN or beyond it.
    pub fn network(&self) -> Network {
        let is_far = self.friend.as_ref().is_some_and(|friend| !friend.is_near(self.peer));
        if self.wan.is_some() || is_far { Network::Wan } else { Network::Lan }
    }

    /// The HTTP client for this peer: the friend's own, or `others`.
    pub fn client<'a>(&'a self, others: &'a PeerClient) -> &'a PeerClient {
        self.friend.as_ref().map_or(others, |friend| &friend.client)
    }

    /// Path of the NAR relative to the root of the peer's server.
    pub fn nar_path(&self, hash_part: &HashPart, nar_hash: &NarHash) -> String {
        self.url_path
            .as_deref()
            .map_or_else(|| default_nar_path(hash_part, nar_hash), str::to_owned)
    }

    /// The kind of link to the peer. Takes the transfer's name out of this source: a further
    /// request to the peer is not counted as a second transfer.
    pub fn take_link_kind(&mut self) -> LinkKind {
        match self.network() {
            Network::Lan => LinkKind::Lan,
            Network::Wan => {
                let name = self.wan.as_mut().map(std::mem::take);
                LinkKind::Wan(name.and_then(|name| name.get().cloned()))
            }
        }
    }
}

/// File name of a NAR in URLs: `<hash part>-<NAR hash>.nar`.
pub fn nar_name(hash_part: &HashPart, nar_hash: &NarHash) -> String {
    format!("{hash_part}-{}.nar", nar_hash.to_nix32())
}

/// URL path at which a peerix serves a NAR of its store.
fn default_nar_path(hash_part: &HashPart, nar_hash: &NarHash) -> String {
    format!("local/nar/{}", nar_name(hash_part, nar_hash))
}

/// Looks up paths for this machine's Nix. Shared by all threads.
pub struct LookupService {
    lan: Option<Arc<LanSource>>,
    wan: Option<Arc<WanSource>>,
    friends: Option<Arc<Friends>>,
    trusted: Arc<TrustedKeys>,
    stats: Arc<Stats>,
    pending: Mutex<HashMap<HashPart, Arc<PendingLookup>>>,
    found: FoundPaths,
}

/// A lookup under way, which further requests for the same path join.
#[derive(Default)]
struct PendingLookup {
    result: Mutex<Option<Option<Arc<PeerNarinfo>>>>,
    ended: Condvar,
}

impl LookupService {
    /// Creates a service that searches `lan`, `wan` and `friends`. `trusted` decides which narinfos
    /// are accepted. `stats` counts every lookup.
    pub fn new(
        lan: Option<Arc<LanSource>>,
        wan: Option<Arc<WanSource>>,
        friends: Option<Arc<Friends>>,
        trusted: Arc<TrustedKeys>,
        stats: Arc<Stats>,
    ) -> Self {
        let (pending, found) = Default::default();
        LookupService { lan, wan, friends, trusted, stats, pending, found }
    }

    /// Returns a neighbour's realisation of `id` that [`TrustedKeys::accepts_realisation`] accepts.
    /// Blocks for at most 2 s.
    pub fn realisation(&self, id: &DrvOutput) -> Option<Realisation> {
        self.lan.as_ref()?.realisation(id, |found| self.trusted.accepts_realisation(found))
    }

    /// Records that the friend with this key has sent a request.
    pub fn record_friend_request(&self, key: &NodeKey) {
        self.friends.iter().for_each(|friends| friends.record_request(key));
    }

    /// Returns the build log of a derivation from a neighbour that has it. Build logs are not
    /// signed. Blocks for at most 2 s.
    pub fn log(&self, derivation: &StorePath) -> Option<LogBody> {
        self.lan.as_ref()?.log(derivation)
    }

    /// Returns the NAR hash of a path if all peers with an acceptable narinfo agree on it. Blocks
    /// until all holders have answered or timed out.
    pub fn agreed_nar_hash(&self, hash_part: &HashPart) -> Option<NarHash> {
        let mut search = self.search(hash_part);
        let first = self.next_offer(&mut search)?.narinfo.info.nar_hash;
        while let Some(found) = self.next_offer(&mut search) {
            if found.narinfo.info.nar_hash != first {
                log::debug!(
                    "{hash_part}: peers have different NARs, and the URL that Nix remembers tells none"
                );
                return None;
            }
        }
        Some(first)
    }

    /// Returns the narinfo of a peer that has the path, with the `URL` on that peer. Concurrent
    /// lookups of one path share one search. A search blocks for at most 5 s on the LAN, 2 s on
    /// friends and 4 s on peers that trackers name. A call that joins a search waits for at most 15
    /// s, and starts its own after a miss.
    pub fn narinfo(&self, hash_part: &HashPart) -> Option<Arc<PeerNarinfo>> {
        match self.join_or_search(hash_part) {
            // The joined lookup began before this one, so its miss may be older than the path. A
            // lookup that is joined now began later.
            (None, true) => self.join_or_search(hash_part).0,
            (narinfo, _) => narinfo,
        }
    }

    /// Returns the narinfo, and whether it comes from a lookup that was already under way.
    fn join_or_search(&self, hash_part: &HashPart) -> (Option<Arc<PeerNarinfo>>, bool) {
        let (pending_lookup, is_leader) = {
            let mut pending = self.pending.lock();
            match pending.get(hash_part) {
                Some(pending_lookup) => (pending_lookup.clone(), false),
                None => {
                    let pending_lookup = Arc::new(PendingLookup::default());
                    pending.insert(*hash_part, pending_lookup.clone());
                    (pending_lookup, true)
                }
            }
        };
        if !is_leader {
            return (pending_lookup.wait(), true);
        }
        // The guard wakes the waiting threads even if the search panics, with a miss.
        let mut result = guard(None, |narinfo| {
            // No thread can join the lookup any more.
            self.pending.lock().remove(hash_part);
            *pending_lookup.result.lock() = Some(narinfo);
            pending_lookup.ended.notify_all();
        });
        *result = self.search_and_remember(hash_part).map(Arc::new);
        (result.clone(), false)
    }

    /// Finds peers that have the path with this NAR hash: from an earlier lookup, or by a new
    /// search until `deadline`. Blocks until then at most.
    pub fn find(
        &self,
        hash_part: &HashPart,
        nar_hash: &NarHash,
        deadline: Instant,
    ) -> Option<FoundNar> {
        let found = self.found.take(hash_part, Instant::now());
        if let Some(found) = found.filter(|found| found.nar_hash == *nar_hash) {
            return Some(found);
        }
        let mut search = self.search(hash_part);
        let FoundNarinfo { source, narinfo, .. } =
            self.next_matching(&mut search, nar_hash, deadline)?;
        Some(search.found(source, &narinfo.info))
    }

    /// Returns the next peer of `search` that has the same NAR, hash and size. Blocks until
    /// `deadline` at most.
    pub fn next_source(
        &self,
        search: &mut HolderSearch,
        found: &FoundNar,
        deadline: Instant,
    ) -> Option<NarSource> {
        loop {
            let FoundNarinfo { source, narinfo, .. } =
                self.next_matching(search, &found.nar_hash, deadline)?;
            if narinfo.info.nar_size == found.nar_size {
                return Some(source);
            }
        }
    }

    fn next_matching(
        &self,
        search: &mut HolderSearch,
        nar_hash: &NarHash,
        deadline: Instant,
    ) -> Option<FoundNarinfo> {
        search.resume(deadline);
        loop {
            let found = self.next_offer(search)?;
            if found.narinfo.info.nar_hash == *nar_hash {
                return Some(found);
            }
            log::debug!("{}: peer {} has another NAR", search.hash_part, found.source.peer);
        }
    }

    /// Asks the LAN for holders of the path, and returns those that answer within `timeout`. Their
    /// NARs may differ from the wanted one. Blocks for `timeout` at most.
    pub fn holders(&self, hash_part: &HashPart, timeout: Duration) -> Vec<NarSource> {
        let search = self.lan.as_ref().map(|lan| lan.search(hash_part, never()));
        let addresses = search.map(|mut search| search.holders(timeout)).unwrap_or_default();
        addresses.into_iter().map(NarSource::neighbour).collect()
    }

    /// Requests the narinfo of a peer, and returns the peer as a source with the NAR's URL. Returns
    /// `None` if it has another NAR or does not answer within `timeout`.
    pub fn locate_nar(
        &self,
        peer: SocketAddr,
        found: &FoundNar,
        timeout: Duration,
    ) -> Option<NarSource> {
        let hash_part = found.path.hash_part();
        let narinfo = self.lan.as_ref()?.narinfo(peer, &hash_part, timeout)?;
        let source = self.accept(peer, &narinfo).ok()?;
        found.is_nar_of(&narinfo.info).then_some(source)
    }

    /// Returns those of `ips` that are live neighbours, in the same order, as sources of a NAR.
    /// Blocks for at most 200 ms.
    pub fn live_neighbours(&self, ips: &[IpAddr]) -> Vec<NarSource> {
        let live = self.lan.as_ref().map(|lan| lan.live_http_servers(ips)).unwrap_or_default();
        live.into_iter().map(NarSource::neighbour).collect()
    }

    /// Whether trackers are configured, which may name holders beyond the LAN.
    pub fn has_trackers(&self) -> bool {
        self.wan.is_some()
    }

    /// Frees the memory of found paths.
    pub fn free_memory(&self) {
        self.found.clear();
    }

    /// Reports the bytes of a transfer to the tracker that counts it. Does not block.
    pub fn report(&self, transfer: &TransferName, role: Role, bytes: u64) {
        if let Some(wan) = &self.wan {
            wan.report(transfer, role, bytes);
        }
    }

    /// Starts a search: asks the LAN and friends now, and the trackers when the LAN has no holder.
    pub fn search(&self, hash_part: &HashPart) -> HolderSearch {
        let friends = self.friends.as_ref().map(|friends| friends.search(hash_part));
        let found_signal =
            friends.as_ref().map_or_else(never, |friends| friends.found_signal().clone());
        HolderSearch {
            hash_part: *hash_part,
            friends,
            lan: self.lan.as_ref().map(|lan| lan.search(hash_part, found_signal)),
            wan: self.wan.as_ref().map(|wan| wan.search(hash_part)),
            refusal: None,
        }
    }

    fn search_and_remember(&self, hash_part: &HashPart) -> Option<PeerNarinfo> {
        let began = Instant::now();
        let mut search = self.search(hash_part);
        let Some(FoundNarinfo { source, narinfo, peer_id }) = self.next_offer(&mut search) else {
            let (elapsed, why) = (began.elapsed(), search.miss_reason());
            log::debug!("{hash_part}: no peer has it ({elapsed:?})");
            self.stats.record_miss(hash_part, why, elapsed);
            return None;
        };
        let now = Instant::now();
        log::debug!("{}: peer {} has it ({:?})", narinfo.info.path, source.peer, now - began);
        self.stats.record_hit(
            &narinfo.info.path,
            source.network(),
            source.peer,
            peer_id.as_deref(),
            now - began,
        );
        self.found.put(search.found(source, &narinfo.info), now);
        Some(narinfo)
    }

    /// Returns the next holder with an acceptable narinfo: on the LAN or a friend, then beyond,
    /// then a LAN peer that is only asked as a last resort.
    fn next_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        self.next_near_offer(search)
            .or_else(|| self.next_wan_offer(search))
            .or_else(|| self.next_lan_offer(search, true))
    }

    /// Returns the next holder on the LAN, or a friend that answers before the LAN has.
    fn next_near_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        loop {
            if let Some(found) = self.next_lan_offer(search, false) {
                return Some(found);
            }
            let FriendOffer { link, address, narinfo } = search.friends.as_mut()?.next_offer()?;
            match self.accept(address, &narinfo) {
                Ok(mut source) => {
                    let name = Some(link.friend.name.clone());
                    source.friend = Some(link);
                    search.lan.iter_mut().for_each(LanSearch::settle);
                    return Some(FoundNarinfo { source, narinfo, peer_id: name });
                }
                Err(why) => search.refusal = Some(why),
            }
        }
    }

    fn next_lan_offer(
        &self,
        search: &mut HolderSearch,
        with_last_resort: bool,
    ) -> Option<FoundNarinfo> {
        let lan = search.lan.as_mut()?;
        loop {
            let offer = lan.next_offer(with_last_resort)?;
            match self.accept(offer.http(), &offer.narinfo) {
                Ok(source) => {
                    lan.accept(&offer);
                    return Some(FoundNarinfo { source, narinfo: offer.narinfo, peer_id: None });
                }
                Err(why) => lan.reject(&offer, why),
            }
        }
    }

    /// Returns the next peer named by a tracker that has an acceptable narinfo.
    fn next_wan_offer(&self, search: &mut HolderSearch) -> Option<FoundNarinfo> {
        let (wan, refusal, search) =
            (self.wan.as_ref()?, &mut search.refusal, search.wan.as_mut()?);
        loop {
            let WanOffer { peer, origin, narinfo } = search.next_offer()?;
            match self.accept(peer, &narinfo) {
                Ok(mut source) => {
                    source.wan = Some(wan.begin_transfer(&origin));
                    return Some(FoundNarinfo { source, narinfo, peer_id: Some(origin.peer_id) });
                }
                Err(why) => *refusal = Some(why),
            }
        }
    }

    /// Returns the NAR source of a narinfo that may be passed on to Nix, or the reason why it may
    /// not.
    fn accept(&self, peer: SocketAddr, narinfo: &NarInfo) -> Result<NarSource, MissReason> {
        if narinfo.url.len() > MAX_NAR_URL || narinfo.url.contains("://") {
            log::debug!("peer {peer}: NAR URL too long or elsewhere");
            return Err(MissReason::failed(peer, &"the URL of its NAR is too long, or elsewhere"));
        }
        if !self.trusted.accepts(&narinfo.info) {
            log::debug!("{}: peer {peer} has it without a trusted signature", narinfo.info.path);
            return Err(MissReason::Untrusted(peer));
        }
        let default_path = default_nar_path(&narinfo.info.path.hash_part(), &narinfo.info.nar_hash);
        let url_path = (narinfo.url != default_path).then(|| narinfo.url.as_str().into());
        Ok(NarSource { peer, url_path, wan: None, friend: None })
    }
}

/// An accepted narinfo, and the source of its NAR.
struct FoundNarinfo {
    source: NarSource,
    narinfo: PeerNarinfo,
    /// The ID of a tracker's peer, or the name that the user gave a friend.
    peer_id: Option<String>,
}

/// A search for the holders of one path: those that answered, and those that still may.
pub struct HolderSearch {
    hash_part: HashPart,
    lan: Option<LanSearch>,
    friends: Option<FriendSearch>,
    /// Peers that trackers name. They are asked when no LAN peer has the path.
    wan: Option<WanSearch>,
    /// Why the last narinfo from beyond the LAN was refused.
    refusal: Option<MissReason>,
}

impl HolderSearch {
    /// The accepted source, with the other LAN holders that have answered by now.
    fn found(&mut self, source: NarSource, info: &PathInfo) -> FoundNar {
        let others = self.lan.as_mut().map(|lan| lan.holders(Duration::ZERO)).unwrap_or_default();
        let others = others
            .into_iter()
            .filter(|other| other.ip() != source.peer.ip())
            .map(NarSource::neighbour);
        let sources = std::iter::once(source.clone()).chain(others).take(MAX_SOURCES);
        FoundNar::new(info, sources.collect())
    }

    /// Why the search found nothing.
    fn miss_reason(&mut self) -> MissReason {
        let lan_failure = self.lan.as_mut().and_then(LanSearch::take_failure);
        if let Some(why) = self.refusal.take().or(lan_failure) {
            return why;
        }
        let wan = self.wan.as_ref();
        if let Some((peer, e)) = wan.and_then(WanSearch::unusable) {
            return MissReason::failed(*peer, e);
        }
        // A peer that claims to have the path but was not asked is an avoided one.
        let first_seen = self.lan.as_ref().and_then(LanSearch::first_seen);
        if let Some(peer) = first_seen.or_else(|| wan.and_then(WanSearch::avoided)) {
            return MissReason::Avoided(peer);
        }
        let near_asked = self.lan.as_ref().map_or(Some((0, 0)), LanSearch::asked_and_unanswered);
        let Some((near_asked, near_silent)) = near_asked else { return MissReason::Busy };
        let friends =
            self.friends.as_ref().map(FriendSearch::asked_and_unanswered).unwrap_or_default();
        let (near_asked, near_silent) = (near_asked + friends.0, near_silent + friends.1);
        let (far_asked, far_silent) = wan.map(WanSearch::asked_and_silent).unwrap_or_default();
        match (near_asked + far_asked, near_silent + far_silent) {
            (0, _) => MissReason::Alone { no_tracker: wan.is_some_and(|wan| !wan.has_tracker()) },
            (asked, 0) => MissReason::Nobody { asked },
            (asked, silent) => MissReason::Silent { asked, silent },
        }
    }

    /// Drops what arrives until the search is resumed, which may be long.
    pub fn suspend(&mut self) {
        self.lan.iter_mut().for_each(LanSearch::suspend);
    }

    /// Restarts the timeouts of a search that is resumed for further holders; none ends after
    /// `deadline`.
    fn resume(&mut self, deadline: Instant) {
        self.lan.iter_mut().for_each(|lan| lan.resume(deadline));
        self.friends.iter_mut().for_each(|friends| friends.resume(deadline));
        self.wan.iter_mut().for_each(|wan| wan.resume(deadline));
    }
}

impl PendingLookup {
    fn wait(&self) -> Option<Arc<PeerNarinfo>> {
        let result = self.result.lock();
        let waited = self.ended.wait_timeout_while(result, JOIN_TIMEOUT, |result| result.is_none());
        waited.clone().flatten()
    }
}
