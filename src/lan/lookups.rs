//! Lookups under way on the LAN, with their holders and the number of peers that owe them an
//! answer. No I/O. Time is passed in as lookup time (see [`super`]).

use crate::bounded_map::BoundedMap;
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use crate::wire::MAX_BATCH;
use crossbeam_channel::Sender;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Maximum number of open lookups. Each belongs to a thread that serves a connection, of which
/// there are at most 1,024. At the bound a further lookup ends at once without an answer.
pub const MAX_LOOKUPS: usize = 1024;

/// Maximum lookup time that a lookup takes. At the bound it ends as a miss.
pub const LOOKUP_TIMEOUT: Timeout = Timeout::from_secs(5);

/// Lookup time for which holders are still passed on after the first good narinfo, as alternates
/// for the NAR.
const ALTERNATES_TIMEOUT: Duration = Duration::from_millis(200);
/// Maximum number of lookups that still take alternates. At the bound the oldest gets no more.
const MAX_ALTERNATES: usize = 4096;

/// Maximum number of holders of one lookup that are passed on at once, to be asked for the narinfo
/// and as alternates for the NAR. A further holder takes the place of one that fails.
pub const MAX_HOLDERS: usize = 16;

/// Maximum number of holders that wait for a place among [`MAX_HOLDERS`]: as many as are asked by
/// unicast. At the bound a further holder is dropped.
const MAX_SURPLUS: usize = 256;

/// Interval between two batches for each live peer. Sending a datagram to one peer and handling its
/// answer takes 20 to 40 µs of CPU time, so lookups use about half of one processor at most.
const BATCH_INTERVAL_PER_PEER: Duration = Duration::from_micros(60);
/// Minimum interval between two batches.
const MIN_BATCH_INTERVAL: Duration = Duration::from_millis(1);
/// Maximum interval between two batches.
const MAX_BATCH_INTERVAL: Duration = Duration::from_millis(8);

/// Identifies a lookup within this process. IDs ascend.
pub type LookupId = u64;

/// A lookup and the hash part of its path.
pub type Wanted = (LookupId, HashPart);

/// A peer that says that it has a path, and where its narinfo of the path is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// Address of the peer's HTTP server.
    pub http: SocketAddr,
    /// URL path of the narinfo, relative to the root of that server.
    pub url_path: String,
}

impl Holder {
    /// A peerix, which serves the narinfos of its own store under `local/`.
    pub fn peerix(http: SocketAddr, hash_part: &HashPart) -> Holder {
        Holder { http, url_path: format!("local/{hash_part}.narinfo") }
    }
}

/// A lookup for discovery to run. Its channel closes after the last update.
pub struct LookupRequest {
    /// ID of the lookup in later events.
    pub id: LookupId,
    /// Hash part of the path to look for.
    pub hash_part: HashPart,
    /// Receives the holders and the end of the lookup. Its capacity must be
    /// [`LookupRequest::CAPACITY`]: discovery never blocks, so an update that finds the channel
    /// full is lost.
    pub updates: Sender<LookupUpdate>,
}

impl LookupRequest {
    /// Number of updates that may be unread at once: [`MAX_HOLDERS`] holders and the end.
    pub const CAPACITY: usize = MAX_HOLDERS + 1;
}

/// What discovery sends to the thread that looks a path up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LookupUpdate {
    /// A peer says that it has the path.
    Holder {
        /// Address from which the peer's datagrams come. [`super::Event::Failed`] and
        /// [`super::Event::Settled`] name the peer by it.
        peer: SocketAddr,
        /// Where the peer's narinfo is.
        holder: Holder,
    },
    /// The lookup ended without a good narinfo: it waits for no peer any more.
    Ended {
        /// Number of peers that were asked.
        asked: u32,
        /// Number of asked peers that gave no answer.
        unanswered: u32,
    },
}

/// State of one lookup.
pub struct LanLookup {
    request: LookupRequest,
    /// When it began, in lookup time.
    began: Instant,
    /// The lookup does not end as a miss before this lookup time: peers that are not known may
    /// still answer.
    pub open_until: Instant,
    /// Number of peers that owe the lookup an answer or a narinfo.
    waiting: u32,
    asked: u32,
    answered: u32,
    /// Request ID of the single query that was broadcast for the lookup.
    pub broadcast: Option<u32>,
    /// IP addresses of its holders. Each counts once, however many ports a peer claims.
    holders: Vec<IpAddr>,
    /// Number of holders that were passed on and have not failed.
    passed_on: usize,
    /// Holders beyond [`MAX_HOLDERS`], for when one of those fails.
    surplus: VecDeque<(SocketAddr, Holder)>,
}

impl LanLookup {
    /// Adds a holder. Returns whether it was passed on. If not, it takes the place of a holder that
    /// fails, or it is dropped because it is a duplicate or one too many.
    fn add_holder(&mut self, peer: SocketAddr, holder: Holder) -> bool {
        let ip = holder.http.ip();
        if self.holders.contains(&ip) || self.surplus.len() >= MAX_SURPLUS {
            return false;
        }
        self.holders.push(ip);
        if self.passed_on >= MAX_HOLDERS {
            self.surplus.push_back((peer, holder));
            return false;
        }
        self.pass_on(peer, holder);
        true
    }

    fn pass_on(&mut self, peer: SocketAddr, holder: Holder) {
        self.passed_on += 1;
        // The channel has room for `MAX_HOLDERS` holders and the end. It is closed if the thread
        // has stopped listening.
        let _ = self.request.updates.try_send(LookupUpdate::Holder { peer, holder });
    }

    fn ends_at(&self) -> Instant {
        let limit = self.began + LOOKUP_TIMEOUT.get();
        if self.waiting > 0 { limit } else { self.open_until.min(limit) }
    }
}

/// All lookups under way.
#[derive(Default)]
pub struct LanLookups {
    /// Open lookups that wait for the next batch. The first one is the oldest.
    unsent: BTreeMap<LookupId, LanLookup>,
    /// Open lookups that were sent.
    sent: BTreeMap<LookupId, LanLookup>,
    /// When the last batch was sent.
    last_batch: Option<Instant>,
    /// The path of the latest lookup.
    pub last_path: Option<HashPart>,
    /// Lookups that got a good narinfo, and the end of the time in which they take alternates.
    settled: BoundedMap<LookupId, (Instant, LanLookup), MAX_ALTERNATES>,
    /// No lookup that was sent ends before this lookup time.
    next_end: Option<Instant>,
}

impl LanLookups {
    /// Adds a lookup that begins at lookup time `t`, and does not end as a miss before `open_until`.
    /// Returns false and drops the request if [`MAX_LOOKUPS`] are open.
    pub fn insert(&mut self, request: LookupRequest, open_until: Instant, t: Instant) -> bool {
        if self.len() >= MAX_LOOKUPS {
            return false;
        }
        self.last_path = Some(request.hash_part);
        let id = request.id;
        let lookup = LanLookup {
            request,
            began: t,
            open_until,
            waiting: 0,
            asked: 0,
            answered: 0,
            broadcast: None,
            holders: Vec::new(),
            passed_on: 0,
            surplus: VecDeque::new(),
        };
        self.unsent.insert(id, lookup);
        true
    }

    /// The open lookup with this ID, if it was sent.
    pub fn get_mut(&mut self, id: LookupId) -> Option<&mut LanLookup> {
        self.sent.get_mut(&id)
    }

    /// Number of open lookups.
    fn len(&self) -> usize {
        self.unsent.len() + self.sent.len()
    }

    /// Whether no lookup is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// When the next batch leaves, in lookup time: at once if it is full or has the only open
    /// lookup, else one interval after the last batch. `None` if no lookup waits for it.
    /// `live_peers` counts the live peers.
    pub fn next_batch_at(&self, live_peers: impl FnOnce() -> usize, t: Instant) -> Option<Instant> {
        if self.unsent.is_empty() {
            return None;
        }
        let last = self.last_batch.filter(|_| self.len() > 1 && self.unsent.len() < MAX_BATCH);
        let interval = || {
            let live = u32::try_from(live_peers()).unwrap_or(u32::MAX);
            (BATCH_INTERVAL_PER_PEER * live).clamp(MIN_BATCH_INTERVAL, MAX_BATCH_INTERVAL)
        };
        Some(last.map_or(t, |last| last + interval()))
    }

    /// Returns the next batch, which is sent at lookup time `t`: up to [`MAX_BATCH`] lookups, the
    /// oldest first.
    pub fn take_batch(&mut self, t: Instant) -> Vec<Wanted> {
        self.last_batch = Some(t);
        let mut batch = Vec::new();
        while batch.len() < MAX_BATCH
            && let Some((id, lookup)) = self.unsent.pop_first()
        {
            batch.push((id, lookup.request.hash_part));
            self.sent.insert(id, lookup);
            self.update_next_end(id);
        }
        batch
    }

    /// The open lookups that were sent.
    pub fn sent(&self) -> Vec<Wanted> {
        self.sent.iter().map(|(id, lookup)| (*id, lookup.request.hash_part)).collect()
    }

    /// Those of the lookups `ids` that are still open.
    pub fn still_open(&self, ids: &[LookupId]) -> Vec<Wanted> {
        let open = |id: &LookupId| self.sent.get(id).map(|lookup| (*id, lookup.request.hash_part));
        ids.iter().filter_map(open).collect()
    }

    /// Moves [`LanLookups::next_end`] forward if the lookup ends before it. To be called after each
    /// change by which a lookup may end earlier.
    fn update_next_end(&mut self, id: LookupId) {
        let ends_at = self.sent.get(&id).map(LanLookup::ends_at);
        self.next_end = self.next_end.into_iter().chain(ends_at).min();
    }

    /// Records that one more peer owes each of these lookups an answer.
    pub fn record_asked(&mut self, ids: &[LookupId]) {
        for id in ids {
            if let Some(lookup) = self.sent.get_mut(id) {
                lookup.asked += 1;
                lookup.waiting += 1;
            }
        }
    }

    /// Records that a peer no longer owes the lookup anything. `answered` tells whether it
    /// answered.
    pub fn record_settled(&mut self, id: LookupId, answered: bool) {
        if let Some(lookup) = self.sent.get_mut(&id) {
            lookup.waiting = lookup.waiting.saturating_sub(1);
            lookup.answered += u32::from(answered);
            self.update_next_end(id);
        }
    }

    /// Records that a peer said *have* and owes the narinfo. `was_asked` tells whether it owed an
    /// answer before.
    pub fn record_holder(&mut self, id: LookupId, was_asked: bool) {
        if let Some(lookup) = self.sent.get_mut(&id) {
            lookup.answered += u32::from(was_asked);
            lookup.waiting += u32::from(!was_asked);
        }
    }

    /// Hash part of a lookup that was sent, and is open or takes alternates.
    pub fn hash_part(&self, id: LookupId) -> Option<HashPart> {
        let settled = || self.settled.get(&id).map(|(_, lookup)| lookup);
        self.sent.get(&id).or_else(settled).map(|lookup| lookup.request.hash_part)
    }

    /// Adds a holder of the path, and passes it on if fewer than [`MAX_HOLDERS`] are. Returns
    /// whether the lookup waits for its narinfo: it is open, and the holder was passed on.
    pub fn add_holder(&mut self, id: LookupId, peer: SocketAddr, holder: Holder) -> bool {
        match self.sent.get_mut(&id) {
            Some(lookup) => lookup.add_holder(peer, holder),
            None => {
                self.settled.get_mut(&id).map(|(_, lookup)| lookup.add_holder(peer, holder));
                false
            }
        }
    }

    /// Records that a holder that was passed on gave no good narinfo. Passes on the next holder and
    /// returns its address, or `None` if no holder is left.
    pub fn replace_holder(&mut self, id: LookupId) -> Option<SocketAddr> {
        let lookup = self.sent.get_mut(&id)?;
        lookup.passed_on = lookup.passed_on.saturating_sub(1);
        let (peer, holder) = lookup.surplus.pop_front()?;
        lookup.pass_on(peer, holder);
        Some(peer)
    }

    /// Records a good narinfo, and returns the path. The lookup no longer waits for peers, but
    /// takes alternates for [`ALTERNATES_TIMEOUT`]. `None` if it is not open.
    pub fn settle(&mut self, id: LookupId, t: Instant) -> Option<HashPart> {
        let lookup = self.sent.remove(&id).or_else(|| self.unsent.remove(&id))?;
        let hash_part = lookup.request.hash_part;
        self.settled.insert(id, (t + ALTERNATES_TIMEOUT, lookup));
        Some(hash_part)
    }

    /// Ends the lookups whose time is over at `t`, and sends each [`LookupUpdate::Ended`]. Returns
    /// them: peers may still owe them answers.
    pub fn end_due(&mut self, t: Instant) -> Vec<LookupId> {
        while self.settled.oldest().is_some_and(|(until, _)| *until <= t) {
            self.settled.pop_oldest();
        }
        if self.next_end.is_none_or(|next| next > t) {
            return Vec::new();
        }
        let due = self.sent.iter().filter(|(_, lookup)| lookup.ends_at() <= t);
        let due: Vec<LookupId> = due.map(|(id, _)| *id).collect();
        for lookup in due.iter().filter_map(|id| self.sent.remove(id)) {
            let unanswered = lookup.asked.saturating_sub(lookup.answered);
            let ended = LookupUpdate::Ended { asked: lookup.asked, unanswered };
            let _ = lookup.request.updates.try_send(ended);
        }
        self.next_end = self.sent.values().map(LanLookup::ends_at).min();
        due
    }

    /// Lookup time at which [`LanLookups::end_due`] has to be called next.
    pub fn next_end(&self) -> Option<Instant> {
        let settled = self.settled.oldest().map(|(until, _)| *until);
        self.next_end.into_iter().chain(settled).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::net::Ipv4Addr;

    impl LanLookups {
        /// Panics if a table is larger than its bound.
        pub fn assert_bounds(&self) {
            assert!(self.len() <= MAX_LOOKUPS);
            assert!(self.sent.values().all(|lookup| lookup.surplus.len() <= MAX_SURPLUS));
        }
    }

    #[test]
    fn further_holder_takes_the_place_of_one_that_fails() {
        let now = Instant::now();
        let mut lookups = LanLookups::default();
        let (updates, receiver) = bounded(LookupRequest::CAPACITY);
        let hash_part = HashPart::ZERO;
        assert!(lookups.insert(LookupRequest { id: 1, hash_part, updates }, now, now));
        assert_eq!(lookups.take_batch(now), [(1, hash_part)]);
        let holder = |number: u8| {
            let http = SocketAddr::from((Ipv4Addr::new(10, 0, 0, number), 1));
            (http, Holder { http, url_path: String::new() })
        };
        for number in 0..20 {
            let (peer, holder) = holder(number);
            assert_eq!(lookups.add_holder(1, peer, holder.clone()), number < 16);
            assert!(!lookups.add_holder(1, peer, holder), "a duplicate");
        }
        assert_eq!(receiver.try_iter().count(), MAX_HOLDERS);
        let (peer, next) = holder(16);
        assert_eq!(lookups.replace_holder(1), Some(peer));
        assert_eq!(
            receiver.try_iter().collect::<Vec<_>>(),
            [LookupUpdate::Holder { peer, holder: next }]
        );
        // A holder that comes later takes the place of one that failed while no holder waited.
        let replaced = (0..4).filter_map(|_| lookups.replace_holder(1));
        assert_eq!(replaced.count(), 3);
        let (peer, last) = holder(20);
        assert!(lookups.add_holder(1, peer, last));
        lookups.assert_bounds();
    }
}
