//! Lookups under way on the LAN. No I/O; time is passed in, as lookup time (see
//! [`super::discovery`]).

use super::Holder;
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use crossbeam_channel::Sender;
use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Lookups that wait at once. Each belongs to a thread that serves a connection, of which there are
/// 1,024. Beyond, a lookup ends at once without an answer.
pub const MAX_LOOKUPS: usize = 1024;

/// The whole of a lookup, whatever peers do.
pub const LOOKUP_TIMEOUT: Timeout = Timeout::from_secs(5);

/// After the first good narinfo, holders are still passed on for this long, as alternates for the
/// NAR.
const ALTERNATES_TIMEOUT: Duration = Duration::from_millis(200);
/// Lookups in that state. Beyond, the oldest gets no further alternates.
const MAX_ALTERNATES: usize = 4096;

/// Holders of one lookup that are asked for the narinfo at once, and alternates for the NAR. A
/// further one takes the place of one that fails.
pub const MAX_HOLDERS: usize = 16;

/// Holders that wait for such a place: as many as are asked by unicast.
const MAX_SURPLUS: usize = 256;

/// Names a lookup within this process.
pub type LookupId = u64;

/// What discovery tells the thread that looks something up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LookupUpdate {
    /// A peer says that it has the path.
    Holder {
        /// The peer, by the address its datagrams come from: to be named in
        /// [`super::Event::Failed`] and [`super::Event::Settled`].
        peer: SocketAddr,
        /// Where its narinfo is.
        holder: Holder,
    },
    /// No peer is waited for any more.
    Ended {
        /// Number of peers that were asked.
        asked: u32,
        /// Number of those that gave no answer.
        unanswered: u32,
    },
}

/// One lookup.
#[derive(Debug)]
pub struct LanLookup {
    /// The path.
    pub hash_part: HashPart,
    updates: Sender<LookupUpdate>,
    /// When it began.
    pub began: Instant,
    /// It does not end before this, except by a good narinfo: peers that are not known may still
    /// answer.
    pub open_until: Instant,
    /// Number of peers that owe it an answer.
    pub waiting: u32,
    asked: u32,
    answered: u32,
    /// Request ID of the query that was broadcast for it.
    pub broadcast: Option<u32>,
    is_sent: bool,
    /// The addresses of its holders: one address has one server, however many it claims.
    holders: Vec<IpAddr>,
    /// Number of holders that were passed on and have not failed.
    passed_on: usize,
    /// Holders beyond [`MAX_HOLDERS`], for when one of those fails.
    surplus: VecDeque<(SocketAddr, Holder)>,
}

/// What becomes of a holder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HolderPlace {
    /// It was passed on: its narinfo is waited for.
    Now,
    /// It takes the place of one that fails.
    Later,
    /// Nobody needs it.
    Never,
}

impl LanLookup {
    /// One more peer owes an answer.
    pub fn record_asked(&mut self) {
        self.asked += 1;
        self.waiting += 1;
    }

    fn add_holder(&mut self, peer: SocketAddr, holder: Holder) -> HolderPlace {
        let ip = holder.http.ip();
        if self.holders.contains(&ip) || self.surplus.len() >= MAX_SURPLUS {
            return HolderPlace::Never;
        }
        self.holders.push(ip);
        if self.passed_on >= MAX_HOLDERS {
            self.surplus.push_back((peer, holder));
            return HolderPlace::Later;
        }
        self.pass_on(peer, holder);
        HolderPlace::Now
    }

    fn pass_on(&mut self, peer: SocketAddr, holder: Holder) {
        self.passed_on += 1;
        // The channel has room for all holders that are asked at once, and the end. It may be
        // closed: nobody listens any more.
        let _ = self.updates.try_send(LookupUpdate::Holder { peer, holder });
    }

    fn ends_at(&self) -> Instant {
        let limit = self.began + LOOKUP_TIMEOUT.get();
        if self.waiting > 0 { limit } else { self.open_until.min(limit) }
    }
}

/// All lookups under way.
#[derive(Default)]
pub struct LanLookups {
    open: BTreeMap<LookupId, LanLookup>,
    /// Those not yet sent, the oldest first.
    unsent: VecDeque<LookupId>,
    /// Those that got a good narinfo and still take alternates; and until when, in that order.
    settled: BTreeMap<LookupId, LanLookup>,
    settled_until: VecDeque<(Instant, LookupId)>,
    /// Nothing ends before this.
    next_end: Option<Instant>,
}

impl LanLookups {
    /// Takes a lookup. Returns false, and drops `updates`, if there are too many.
    pub fn insert(
        &mut self,
        id: LookupId,
        hash_part: HashPart,
        updates: Sender<LookupUpdate>,
        t: Instant,
    ) -> bool {
        if self.open.len() >= MAX_LOOKUPS {
            return false;
        }
        let lookup = LanLookup {
            hash_part,
            updates,
            began: t,
            open_until: t,
            waiting: 0,
            asked: 0,
            answered: 0,
            broadcast: None,
            is_sent: false,
            holders: Vec::new(),
            passed_on: 0,
            surplus: VecDeque::new(),
        };
        self.open.insert(id, lookup);
        self.unsent.push_back(id);
        true
    }

    /// The open lookup with this ID.
    pub fn get_mut(&mut self, id: LookupId) -> Option<&mut LanLookup> {
        self.open.get_mut(&id)
    }

    /// Number of open lookups.
    pub fn len(&self) -> usize {
        self.open.len()
    }

    /// Whether no lookup waits.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }

    /// Number of lookups that were not sent yet.
    pub fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Takes up to `most` lookups to send them, the oldest first.
    pub fn take_unsent(&mut self, most: usize) -> Vec<(LookupId, HashPart)> {
        let mut taken = Vec::new();
        while taken.len() < most
            && let Some(id) = self.unsent.pop_front()
        {
            if let Some(lookup) = self.open.get_mut(&id) {
                lookup.is_sent = true;
                taken.push((id, lookup.hash_part));
            }
        }
        taken
    }

    /// The lookups that were sent and still wait.
    pub fn sent(&self) -> Vec<LookupId> {
        self.open.iter().filter(|(_, lookup)| lookup.is_sent).map(|(id, _)| *id).collect()
    }

    /// The hash parts of those lookups that are still open, with their IDs.
    pub fn hash_parts(&self, ids: &[LookupId]) -> Vec<(LookupId, HashPart)> {
        ids.iter()
            .filter_map(|id| self.open.get(id).map(|lookup| (*id, lookup.hash_part)))
            .collect()
    }

    /// Something about the lookup has changed: it may end now.
    pub fn touch(&mut self, id: LookupId) {
        if let Some(lookup) = self.open.get(&id) {
            let ends_at = lookup.ends_at();
            self.next_end = Some(self.next_end.map_or(ends_at, |next| next.min(ends_at)));
        }
    }

    /// A peer that owed the lookup an answer owes it no longer; `answered` tells whether it gave
    /// one.
    pub fn record_settled(&mut self, id: LookupId, answered: bool) {
        if let Some(lookup) = self.open.get_mut(&id) {
            lookup.waiting = lookup.waiting.saturating_sub(1);
            lookup.answered += u32::from(answered);
            self.touch(id);
        }
    }

    /// A peer said *have* and now owes the narinfo. `was_asked`: it owed an answer before.
    pub fn record_holder(&mut self, id: LookupId, was_asked: bool) {
        if let Some(lookup) = self.open.get_mut(&id) {
            lookup.answered += u32::from(was_asked);
            lookup.waiting += u32::from(!was_asked);
        }
    }

    /// The path of a lookup that is open or takes alternates.
    pub fn hash_part(&self, id: LookupId) -> Option<HashPart> {
        self.open.get(&id).or_else(|| self.settled.get(&id)).map(|lookup| lookup.hash_part)
    }

    /// Takes a holder of the path.
    pub fn add_holder(&mut self, id: LookupId, peer: SocketAddr, holder: Holder) -> HolderPlace {
        if let Some(lookup) = self.open.get_mut(&id) {
            return lookup.add_holder(peer, holder);
        }
        if let Some(lookup) = self.settled.get_mut(&id) {
            lookup.add_holder(peer, holder);
        }
        HolderPlace::Never
    }

    /// A holder that was passed on gave no good narinfo. The next one is passed on, and returned.
    pub fn replace_holder(&mut self, id: LookupId) -> Option<SocketAddr> {
        let lookup = self.open.get_mut(&id)?;
        lookup.passed_on = lookup.passed_on.saturating_sub(1);
        let (peer, holder) = lookup.surplus.pop_front()?;
        lookup.pass_on(peer, holder);
        Some(peer)
    }

    /// A good narinfo came: the lookup waits for no peer any more, but takes alternates for a
    /// while.
    pub fn settle(&mut self, id: LookupId, t: Instant) {
        let Some(lookup) = self.open.remove(&id) else { return };
        if self.settled_until.len() >= MAX_ALTERNATES
            && let Some((_, oldest)) = self.settled_until.pop_front()
        {
            self.settled.remove(&oldest);
        }
        self.settled.insert(id, lookup);
        self.settled_until.push_back((t + ALTERNATES_TIMEOUT, id));
    }

    /// Ends the lookups whose time is over. Returns those that peers may still owe answers to.
    pub fn end_due(&mut self, t: Instant) -> Vec<LookupId> {
        while self.settled_until.front().is_some_and(|(until, _)| *until <= t) {
            if let Some((_, id)) = self.settled_until.pop_front() {
                self.settled.remove(&id);
            }
        }
        if self.next_end.is_none_or(|next| next > t) {
            return Vec::new();
        }
        let is_due = |lookup: &LanLookup| lookup.is_sent && lookup.ends_at() <= t;
        let due: Vec<LookupId> =
            self.open.iter().filter(|(_, lookup)| is_due(lookup)).map(|(id, _)| *id).collect();
        for id in &due {
            if let Some(lookup) = self.open.remove(id) {
                let unanswered = lookup.asked.saturating_sub(lookup.answered);
                let _ = lookup
                    .updates
                    .try_send(LookupUpdate::Ended { asked: lookup.asked, unanswered });
            }
        }
        self.next_end =
            self.open.values().filter(|lookup| lookup.is_sent).map(LanLookup::ends_at).min();
        due
    }

    /// When [`LanLookups::end_due`] has something to do next.
    pub fn next_end(&self) -> Option<Instant> {
        let settled = self.settled_until.front().map(|(until, _)| *until);
        self.next_end.into_iter().chain(settled).min()
    }
}

#[cfg(test)]
impl LanLookups {
    /// Panics if more lookups are kept than may be.
    pub fn assert_bounds(&self) {
        assert!(self.open.len() <= MAX_LOOKUPS && self.unsent.len() <= MAX_LOOKUPS);
        assert!(self.open.values().all(|lookup| lookup.surplus.len() <= MAX_SURPLUS));
        assert!(self.settled.len() <= MAX_ALTERNATES && self.settled_until.len() <= MAX_ALTERNATES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::bounded;
    use std::net::Ipv4Addr;

    #[test]
    fn further_holder_takes_the_place_of_one_that_fails() {
        let now = Instant::now();
        let mut lookups = LanLookups::default();
        let (updates, receiver) = bounded(MAX_HOLDERS + 1);
        assert!(lookups.insert(1, HashPart::from_bytes(&[0; HashPart::BYTES]), updates, now));
        let holder = |number: u8| {
            let http = SocketAddr::from((Ipv4Addr::new(10, 0, 0, number), 1));
            (http, Holder { http, url_path: String::new() })
        };
        for number in 0..20 {
            let (peer, holder) = holder(number);
            let taken = if number < 16 { HolderPlace::Now } else { HolderPlace::Later };
            assert_eq!(lookups.add_holder(1, peer, holder.clone()), taken);
            assert_eq!(lookups.add_holder(1, peer, holder), HolderPlace::Never);
        }
        assert_eq!(receiver.try_iter().count(), MAX_HOLDERS);
        let (peer, next) = holder(16);
        assert_eq!(lookups.replace_holder(1), Some(peer));
        assert_eq!(
            receiver.try_iter().collect::<Vec<_>>(),
            [LookupUpdate::Holder { peer, holder: next }]
        );
        // Those that come later find the places of those that failed when nobody waited.
        let replaced = (0..4).filter_map(|_| lookups.replace_holder(1));
        assert_eq!(replaced.count(), 3);
        let (peer, last) = holder(20);
        assert_eq!(lookups.add_holder(1, peer, last), HolderPlace::Now);
        lookups.assert_bounds();
    }
}
