//! A peer on the LAN: what it says of itself, what it owes to lookups, and when it is asked again.
//! No I/O. `now` is real time, `t` is lookup time (see [`super`]).

use super::budget::WaitBudget;
use super::liveness::Liveness;
use super::lookups::LookupId;
use super::sent_queries::{SentBatch, SentQueries};
use crate::backoff;
use crate::nix::HashPart;
use crate::wire::{Hello, MAX_BATCH};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Minimum due time of an answer. Scheduling and interrupt coalescing on a busy machine take up to
/// 20 ms.
const MIN_DUE: Duration = Duration::from_millis(50);
/// Maximum due time of an answer from a peer through which no path was found. Also the due time
/// while no peer has been measured.
const MAX_SHARED_DUE: Duration = Duration::from_millis(200);
/// Maximum due time of an answer from a peer through which a path was found.
const MAX_OWN_DUE: Duration = Duration::from_secs(1);
/// Due time of an answer as a multiple of the usual answer time.
const DUE_FACTOR: u32 = 4;

/// Maximum delay between repeats. The delay doubles with each repeat.
const MAX_REPEAT: Duration = Duration::from_millis(500);
/// Maximum delay between repeats to a peer that sends *no*, if a path was found through it or it
/// said *bye*. Lookups wait for such a peer, so it is asked soon after it is back. A Python peerix
/// is excluded, because it works for 20 ms on each query.
const MAX_OWN_REPEAT: Duration = Duration::from_millis(100);
/// Answers to batches that were sent closer together than this may be out of order without any
/// loss.
const REORDERING: Duration = Duration::from_micros(500);

/// A peer that has been silent for this long is removed, unless `--peer` names it.
const FORGET_SILENT: Duration = Duration::from_secs(90);
/// A live peer from which nothing came for this long becomes silent. By then three hellos and three
/// probes were lost.
const UNHEARD: Duration = Duration::from_secs(90);
/// A Python peerix, which says no hello, is remembered for this long after its last packet.
const PYTHON_PEER_EXPIRY: Duration = Duration::from_secs(3600);
/// A peer that sends queries but no hello within this time after its first packet is a Python
/// peerix.
const HELLO_TIMEOUT: Duration = Duration::from_secs(1);

/// Minimum interval between two changes of a peer's instance ID. A *hello* with another ID within
/// it is ignored, because each change causes packets.
const HELLO_CHANGE: Duration = Duration::from_millis(200);

/// Minimum interval between two hellos to a peer that seems not to know this node.
const REMINDER_INTERVAL: Duration = Duration::from_secs(10);

/// How this node came to know a peer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MetBy {
    /// It sent a *hello*.
    #[default]
    Hello,
    /// It sent a *hello* after this node had greeted its address, which the kernel's neighbour
    /// table had.
    NeighbourTable,
    /// It sent a query.
    Query,
    /// It answered a broadcast query.
    Answer,
    /// `--peer` names it.
    Named,
}

impl MetBy {
    /// The value of `found_by` in docs/status.md.
    pub fn code(self) -> &'static str {
        match self {
            MetBy::Hello => "broadcast",
            MetBy::NeighbourTable => "neighbour-table",
            MetBy::Query => "query",
            MetBy::Answer => "answer",
            MetBy::Named => "flag",
        }
    }
}

/// Which packets a peer understands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// It understands *query many* and always answers it.
    Batches,
    /// It understands only *query*, and answers *have not* if it does not have the path (peerix
    /// 0.1).
    Singles,
    /// It understands only *query*, and does not answer if it does not have the path (Python
    /// peerix, and peerix 0.1 among many peers).
    HaveOnly,
}

/// Description of a peer on the LAN, for commands and the status page.
#[derive(Debug, Clone)]
pub struct Neighbour {
    /// Address from which its datagrams come.
    pub address: SocketAddr,
    /// TCP port of its HTTP server. `None` if it has said no hello.
    pub http_port: Option<u16>,
    /// How this node came to know it.
    pub met_by: MetBy,
    /// When its last packet came. `None` if none came.
    pub heard: Option<Instant>,
    /// Since when it is silent. `None` for a live peer.
    pub silent_since: Option<Instant>,
    /// Smoothed round-trip time. `None` before the first answer.
    pub round_trip: Option<Duration>,
}

impl Neighbour {
    /// Address of its HTTP server. `None` if it has said no hello.
    pub fn http(&self) -> Option<SocketAddr> {
        // Keeps the scope of a link-local address.
        let mut http = self.address;
        http.set_port(self.http_port?);
        Some(http)
    }
}

/// An answer or a narinfo that a peer owes to a lookup.
#[derive(Debug)]
struct AwaitedAnswer {
    /// When it was first owed, in lookup time, even if the query was held back. After a *have*,
    /// when that came.
    since: Instant,
    /// When the query was last sent, in lookup time. `None` if it is held back, because the peer is
    /// behind.
    sent: Option<Instant>,
    /// Whether the peer said *have* and owes the narinfo. Then the query is not repeated.
    is_fetching: bool,
}

/// When a peer is asked again for what it owes, in lookup time.
#[derive(Debug, Default)]
struct RepeatTimer {
    /// When the next repeat is due. `None` if the peer owes no answer to a query.
    at: Option<Instant>,
    /// Number of repeats since the last answer. The delay doubles with each.
    count: u32,
    /// When queries were last repeated because an answer had overtaken theirs.
    last_early: Option<Instant>,
}

/// The paths that were found through a peer, and the peer's own wait budget.
#[derive(Debug)]
pub struct Hits {
    /// Number of the paths.
    pub count: u32,
    /// Hash part of the last path. `None` if it is not known.
    last: Option<HashPart>,
    /// The peer's own wait budget. Peers without hits share one.
    pub budget: WaitBudget,
}

/// State of one peer on the LAN.
#[derive(Debug, Default)]
pub struct LanPeer {
    /// Whether `--peer` names it.
    pub is_named: bool,
    met_by: MetBy,
    /// When the first and the last packet came from it, in real time.
    heard: Option<(Instant, Instant)>,
    /// Content of its last accepted *hello*, and when its instance ID last changed, in real time.
    hello: Option<(Hello, Instant)>,
    /// When this node last sent it a hello because it seemed not to know this node, in real time.
    last_reminder: Option<Instant>,
    /// Whether it is live, and when it is probed.
    pub liveness: Liveness,
    /// The queries that were sent to it.
    pub queries: SentQueries,
    /// The paths that were found through it. `None` if none was.
    pub hits: Option<Hits>,
    owed: BTreeMap<LookupId, AwaitedAnswer>,
    repeats: RepeatTimer,
}

impl LanPeer {
    /// Creates a live peer from which no packet came yet.
    pub fn new(met_by: MetBy) -> Self {
        LanPeer { is_named: met_by == MetBy::Named, met_by, ..LanPeer::default() }
    }

    /// Which packets the peer understands, by its last hello. Without a hello it is a *have-only*
    /// peer.
    pub fn dialect(&self) -> Dialect {
        match self.hello {
            Some((hello, _)) if hello.batches => Dialect::Batches,
            Some((hello, _)) if !hello.crowded => Dialect::Singles,
            _ => Dialect::HaveOnly,
        }
    }

    /// Content of its last accepted *hello*.
    pub fn hello(&self) -> Option<Hello> {
        self.hello.map(|(hello, _)| hello)
    }

    /// Whether its first query is only broadcast. It is a Python peerix, which works for 20 ms on
    /// each copy of a query; but no broadcast may reach a peer that `--peer` names.
    pub fn takes_broadcasts(&self) -> bool {
        self.hello.is_none() && !self.is_named
    }

    /// Whether the peer gets queries: it is not silent.
    pub fn is_live(&self) -> bool {
        self.liveness.silent_since().is_none()
    }

    /// Whether the peer is live and has answered before. Datagrams to any other peer may wait for
    /// ARP and fill a socket's send buffer.
    pub fn is_proven(&self) -> bool {
        self.is_live() && self.queries.last_answer.is_some()
    }

    /// Whether a query has to wait: the peer is behind, and its last query is more recent than the
    /// delay of a repeat. A *have-only* peer is always behind, because it never says *no*.
    pub fn is_held_back(&self, t: Instant) -> bool {
        self.dialect() != Dialect::HaveOnly
            && self.queries.is_behind(t)
            && self
                .queries
                .latest_unanswered_sent()
                .is_some_and(|last| last + self.repeat_gap() > t)
    }

    /// Whether the peer is a Python peerix from which a packet came within [`PYTHON_PEER_EXPIRY`].
    pub fn is_python(&self, now: Instant) -> bool {
        self.heard.is_some_and(|(first, last)| {
            let says_no_hello = self.met_by == MetBy::Query && first + HELLO_TIMEOUT <= now;
            self.hello.is_none()
                && (self.queries.last_answer.is_some() || says_no_hello)
                && last + PYTHON_PEER_EXPIRY > now
        })
    }

    /// Records that a packet came from the peer. Returns whether it is the first one.
    pub fn record_heard(&mut self, now: Instant) -> bool {
        let first = self.heard.map_or(now, |(first, _)| first);
        self.heard.replace((first, now)).is_none()
    }

    /// When the last packet came from the peer. `None` if none came.
    pub fn heard(&self) -> Option<Instant> {
        self.heard.map(|(_, last)| last)
    }

    /// Whether the peer stays in the table: it has not been silent for [`FORGET_SILENT`], and it is
    /// not an address that `--peer` no longer names and from which nothing came.
    pub fn is_remembered(&self, now: Instant) -> bool {
        let is_recent = match self.liveness.silent_since() {
            Some(since) => since + FORGET_SILENT > now,
            None => self.heard.is_some(),
        };
        is_recent || self.is_named || self.is_python(now) || !self.owed.is_empty()
    }

    /// Whether the peer is live and owes nothing, but nothing came from it for [`UNHEARD`].
    pub fn is_unheard(&self, now: Instant) -> bool {
        self.is_live()
            && !self.takes_broadcasts()
            && self.owed.is_empty()
            && self.heard().is_some_and(|heard| heard + UNHEARD < now)
    }

    /// Describes the peer for commands and the status page.
    pub fn describe(&self, address: SocketAddr) -> Neighbour {
        Neighbour {
            address,
            http_port: self.hello().map(|hello| hello.port),
            met_by: if self.is_named { MetBy::Named } else { self.met_by },
            heard: self.heard(),
            silent_since: self.liveness.silent_since(),
            round_trip: self.queries.round_trip.smoothed(),
        }
    }

    /// Due time of an answer, from the query on. `median` is the usual answer time of the median
    /// peer.
    pub fn due_after(&self, median: Option<Duration>) -> Duration {
        if self.hits.is_some() {
            let usual = self.queries.round_trip.usual().unwrap_or(MAX_OWN_DUE);
            return (usual * DUE_FACTOR).clamp(MIN_DUE, MAX_OWN_DUE);
        }
        median.map_or(MAX_SHARED_DUE, |median| (median * DUE_FACTOR).clamp(MIN_DUE, MAX_SHARED_DUE))
    }

    /// When the oldest answer that the peer still owes was first owed, in lookup time. `None` if it
    /// owes nothing.
    pub fn oldest_owed(&self) -> Option<Instant> {
        self.owed.values().map(|owed| owed.since).min()
    }

    /// Records that a query for `lookups` with request ID `id` was sent. Returns the lookups that
    /// the peer owed nothing before.
    pub fn record_sent(&mut self, id: u32, lookups: Arc<[LookupId]>, t: Instant) -> Vec<LookupId> {
        // A *have-only* peer is always behind, because it never says no.
        let is_late = self.repeats.at.is_none()
            && self.queries.is_behind(t)
            && self.dialect() != Dialect::HaveOnly;
        self.repeats.count += u32::from(is_late);
        let added = self.owe(&lookups, true, t);
        self.queries.record_sent(SentBatch { id, sent: t, lookups });
        added
    }

    /// Records that the peer owes `lookups` answers. Unless `is_sent`, the query is held back
    /// because the peer is behind. Returns the lookups that the peer owed nothing before.
    pub fn owe(&mut self, lookups: &[LookupId], is_sent: bool, t: Instant) -> Vec<LookupId> {
        let sent = is_sent.then_some(t);
        let mut added = Vec::new();
        for lookup in lookups {
            let owed = self.owed.entry(*lookup).or_insert_with(|| {
                added.push(*lookup);
                AwaitedAnswer { since: t, sent, is_fetching: false }
            });
            owed.sent = sent.or(owed.sent);
        }
        if self.repeats.at.is_none() && !self.owed.is_empty() {
            // A query that is held back leaves one repeat delay after the last query.
            let last = sent.or(self.queries.latest_unanswered_sent()).unwrap_or(t);
            self.repeats.at = Some(last + self.repeat_gap());
        }
        added
    }

    /// Records that a path was found through the peer. `hash_part` is `None` if it is not known.
    pub fn record_found(&mut self, hash_part: Option<HashPart>, t: Instant) {
        let new = || Hits { count: 0, last: None, budget: WaitBudget::full(t) };
        let hits = self.hits.get_or_insert_with(new);
        hits.count = hits.count.saturating_add(1);
        hits.last = hash_part.or(hits.last);
        hits.budget.reward(t);
    }

    /// The last path found through the peer.
    pub fn last_found(&self) -> Option<HashPart> {
        self.hits.as_ref()?.last
    }

    /// Records that the peer seems not to know this node. Returns whether it gets another hello: at
    /// most once in [`REMINDER_INTERVAL`].
    pub fn record_reminder(&mut self, now: Instant) -> bool {
        let is_due = self.last_reminder.is_none_or(|last| last + REMINDER_INTERVAL <= now);
        self.last_reminder = if is_due { Some(now) } else { self.last_reminder };
        is_due
    }

    /// Records a *hello*. Returns whether its instance ID is new for this peer. Within
    /// [`HELLO_CHANGE`] of the last change a *hello* with a new ID is ignored, and the result is
    /// false.
    pub fn record_hello(&mut self, mut hello: Hello, now: Instant) -> bool {
        self.liveness.advance_probe(now);
        let (changed, is_other) = match self.hello {
            Some((old, changed)) if old.instance == hello.instance => (changed, false),
            Some((_, changed)) if changed + HELLO_CHANGE > now => return false,
            _ => (now, true),
        };
        // Anybody can forge a hello. So a peer that understands batches goes on getting them until
        // it is silent.
        if self.is_live() && self.dialect() == Dialect::Batches {
            (hello.batches, hello.crowded) = (true, false);
        }
        self.hello = Some((hello, changed));
        is_other
    }

    /// Records an answer to a query sent at `sent`. Returns whether that made a silent peer live.
    pub fn record_answer(&mut self, sent: Instant, t: Instant) -> bool {
        let was_silent = self.liveness.record_answer(sent);
        self.queries.record_answer(sent, t);
        if self.repeats.count > 0 {
            self.repeats.count = 0;
            self.repeats.at = (!self.owed.is_empty()).then(|| t + self.repeat_gap());
        }
        was_silent
    }

    /// Clears what the peer owes the lookup. Returns whether it owed anything.
    pub fn settle(&mut self, lookup: LookupId) -> bool {
        let was_owed = self.owed.remove(&lookup).is_some();
        if self.owed.is_empty() {
            self.repeats.at = None;
            if self.dialect() == Dialect::HaveOnly {
                // It never says no, so unanswered repeats say nothing about it.
                self.repeats.count = 0;
            }
        }
        was_owed
    }

    /// Whether the peer owes the lookup an answer or a narinfo.
    pub fn owes(&self, lookup: LookupId) -> bool {
        self.owed.contains_key(&lookup)
    }

    /// Whether the peer said *have* for the lookup and owes the narinfo.
    pub fn owes_narinfo(&self, lookup: LookupId) -> bool {
        self.owed.get(&lookup).is_some_and(|owed| owed.is_fetching)
    }

    /// Records that the peer said *have* for the lookup and owes the narinfo from `t` on. Returns
    /// whether it owed anything before.
    pub fn owe_narinfo(&mut self, lookup: LookupId, t: Instant) -> bool {
        self.owed
            .insert(lookup, AwaitedAnswer { since: t, sent: Some(t), is_fetching: true })
            .is_some()
    }

    fn repeat_gap(&self) -> Duration {
        let first = self.queries.first_repeat_gap();
        let is_waited_for = self.liveness.is_leaving() || self.hits.is_some();
        let is_quick = is_waited_for && self.dialect() != Dialect::HaveOnly;
        let max = if is_quick { first.clamp(MAX_OWN_REPEAT, MAX_REPEAT) } else { MAX_REPEAT };
        backoff::pause(first, self.repeats.count, max)
    }

    /// When the next repeat is due, in lookup time. `None` for a silent peer.
    pub fn repeat_at(&self) -> Option<Instant> {
        self.repeats.at.filter(|_| self.is_live())
    }

    /// Returns up to [`MAX_BATCH`] lookups to ask again if a repeat is due at `t`, the oldest first.
    pub fn due_repeats(&mut self, t: Instant) -> Vec<LookupId> {
        if self.repeat_at().is_none_or(|at| at > t) {
            return Vec::new();
        }
        // Leaves out queries that were sent meanwhile: most of their delay is still to come.
        let gap = self.repeat_gap();
        let repeats = self.unanswered(|sent| sent + gap * 9 / 10 <= t);
        self.repeats.count += u32::from(!repeats.is_empty());
        let is_waiting = self.owed.values().any(|owed| !owed.is_fetching);
        self.repeats.at = is_waiting.then(|| t + self.repeat_gap());
        repeats
    }

    /// Returns up to [`MAX_BATCH`] lookups to ask again at once, because the peer answered a query
    /// sent at `answered`, later than theirs. Returns some at most once in a round trip, and once
    /// in 1 ms.
    pub fn overtaken(&mut self, answered: Instant, t: Instant) -> Vec<LookupId> {
        let pause = self.queries.round_trip.smoothed().unwrap_or_default().max(2 * REORDERING);
        if self.repeats.last_early.is_some_and(|at| at + pause > t) {
            return Vec::new();
        }
        let overtaken = self.unanswered(|sent| sent + REORDERING < answered);
        if !overtaken.is_empty() {
            self.repeats.last_early = Some(t);
        }
        overtaken
    }

    /// Up to [`MAX_BATCH`] lookups that wait for an answer to a query and not for a narinfo, if the
    /// query was held back or `is_meant` accepts the time when it was sent.
    pub fn unanswered(&self, is_meant: impl Fn(Instant) -> bool) -> Vec<LookupId> {
        let is_meant = |owed: &AwaitedAnswer| !owed.is_fetching && owed.sent.is_none_or(&is_meant);
        let meant = self.owed.iter().filter(|(_, owed)| is_meant(owed));
        meant.map(|(id, _)| *id).take(MAX_BATCH).collect()
    }

    /// Whether the peer becomes silent when its wait budget is used up: it has answered nothing
    /// since it was asked. A *have-only* peer through which a path was found must also have left a
    /// query for that path unanswered for `due`, because it does not answer all queries.
    pub fn has_vanished(&self, due: Duration, t: Instant) -> bool {
        let is_verified = self.dialect() != Dialect::HaveOnly
            || self.last_found().is_none()
            || self.queries.verified_at.is_some_and(|at| at + due <= t);
        is_verified && self.has_answered_nothing()
    }

    /// Whether the peer has answered nothing since it was asked.
    fn has_answered_nothing(&self) -> bool {
        self.oldest_owed().is_none_or(|since| self.queries.last_answer < Some(since))
    }

    /// Returns the path for which a *have-only* peer is asked before it becomes silent. `None` if
    /// no query is needed, or one is under way already.
    pub fn begin_verification(&mut self, t: Instant) -> Option<HashPart> {
        let is_needed = self.dialect() == Dialect::HaveOnly && self.has_answered_nothing();
        let wanted =
            self.last_found().filter(|_| is_needed && self.queries.verified_at.is_none())?;
        self.queries.verified_at = Some(t);
        Some(wanted)
    }

    /// The lookups to which the peer has owed an answer for `due` or longer.
    pub fn overdue(&self, due: Duration, t: Instant) -> impl Iterator<Item = LookupId> {
        let overdue = self.owed.iter().filter(move |(_, owed)| owed.since + due <= t);
        overdue.map(|(lookup, _)| *lookup)
    }

    /// Makes the peer silent. Returns the lookups to which it owes something; the caller settles
    /// them.
    pub fn mark_silent(&mut self, now: Instant) -> Vec<LookupId> {
        self.liveness.mark_silent(now);
        (self.repeats.at, self.repeats.count, self.queries.verified_at) = (None, 0, None);
        self.owed.keys().copied().collect()
    }

    /// Records a *bye*.
    pub fn record_bye(&mut self, now: Instant) {
        self.liveness.record_bye(now);
        self.repeats.count = 0;
    }

    /// When the peer is probed next, in real time. `None` if it needs no probe.
    pub fn next_probe(&self) -> Option<Instant> {
        self.liveness.next_probe(self.heard().filter(|_| self.hello.is_some()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl LanPeer {
        /// Panics if the state of the peer is larger than its bound.
        pub fn assert_bounds(&self) {
            assert!(self.owed.len() <= super::super::lookups::MAX_LOOKUPS);
            self.queries.assert_bounds();
        }
    }
}
