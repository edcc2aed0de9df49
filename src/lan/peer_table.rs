//! The peers on the LAN: who they are, what they owe, and how long their answers usually take. No
//! I/O.
//!
//! Two clocks appear here. `now` is real time. `t` is lookup time, which counts at most 100 ms for
//! each turn of the discovery loop (see [`super::discovery`]), so that a pause of this machine is
//! not blamed on peers.

use super::budget::WaitBudget;
use super::lookups::LookupId;
use super::round_trip::RoundTrip;
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use crate::wire::Hello;
use std::collections::{BTreeMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Peers remembered at once: more than a /22 has. Beyond, a peer that never had a path makes room
/// for a newcomer, one that never answered first; so invented addresses cost no more memory.
const MAX_PEERS: usize = 1024;

/// Sent batches remembered for each peer, so that a late answer is understood: two seconds at the
/// longest batch interval. The oldest is forgotten first.
const MAX_SENT_BATCHES: usize = 256;

/// Queries that a peer may leave unanswered before it is behind. Of a peer that vanished as many
/// datagrams wait for ARP, about 1,280 bytes each in the send buffer, for 3 s. The 25 connections
/// of Nix make fewer batches in a round trip.
const MAX_IN_FLIGHT: usize = 16;

/// An answer is never due before this: scheduling and interrupt coalescing on a busy machine take
/// up to 20 ms.
const MIN_DUE: Duration = Duration::from_millis(50);
/// An answer of a peer through which nothing was found is due after this at the latest.
const MAX_SHARED_DUE: Duration = Duration::from_millis(200);
/// An answer of a peer through which something was found is due after this at the latest.
const MAX_OWN_DUE: Duration = Duration::from_secs(1);
/// An answer is due after so many usual answer times.
const DUE_FACTOR: u32 = 4;

/// A query is repeated after 1.5 usual answer times, and never before this.
const MIN_REPEAT: Duration = Duration::from_millis(3);
/// Delay of the first repeat to a peer that has not been measured.
const UNMEASURED_REPEAT: Duration = Duration::from_millis(30);
/// Repeats double their distance up to this.
const MAX_REPEAT: Duration = Duration::from_millis(500);
/// Longest delay between repeats to a peer that sends *no*, if a path was found through it or it
/// said *bye*: it is waited for, and is to be asked soon after it is back. A Python peerix works
/// for 20 ms on each query.
const MAX_OWN_REPEAT: Duration = Duration::from_millis(100);
/// Out-of-order answers to batches sent closer together than this say nothing of loss.
const REORDERING: Duration = Duration::from_micros(500);

/// First pause before a silent peer is probed; it doubles.
pub const FIRST_PROBE: Duration = Duration::from_secs(1);
/// Longest pause between two probes.
const MAX_PROBE: Duration = Duration::from_secs(30);
/// A peer that has been silent for this long is forgotten, unless `--peer` names it.
const FORGET_SILENT: Duration = Duration::from_secs(90);
/// A live peer that has not been heard for this long is probed: where broadcasts are filtered, it
/// may be well.
const PROBE_UNHEARD: Duration = Duration::from_secs(60);
/// Pause before the next such probe.
const PROBE_UNHEARD_AGAIN: Duration = Duration::from_secs(10);
/// A live peer that has not been heard for this long counts as silent: three hellos were lost, and
/// as many probes.
const UNHEARD: Duration = Duration::from_secs(90);
/// A Python peerix says no hello. It is remembered for this long after its last packet.
const REMEMBER_ORIGINAL: Duration = Duration::from_secs(3600);
/// A peer that has said no hello within this time after its first packet is a Python peerix.
const HELLO_PATIENCE: Duration = Duration::from_secs(1);

/// A peer that says *hello* as another instance more often than this is not believed: each causes
/// packets.
const HELLO_CHANGE: Duration = Duration::from_millis(200);

/// After a *bye* the peer is waited for this long: a restart is shorter.
const BYE_WAIT: Timeout = Timeout::from_secs(1);
/// Pause between probes in [`BYE_WAIT`]: one may be lost, or come before the daemon is back.
const PROBE_AFTER_BYE: Duration = Duration::from_millis(200);

/// How this node came to know a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetBy {
    /// It said *hello*.
    Hello,
    /// It said *hello* after this node had found its address in the kernel's neighbour table.
    NeighbourTable,
    /// It asked for a path.
    Query,
    /// It answered a broadcast.
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
    /// *Query many*, which it always answers.
    Batches,
    /// *Query*, which it answers also when it does not have the path (peerix 0.1).
    Singles,
    /// *Query*, which it answers only if it has the path (Python peerix; peerix 0.1 among many
    /// peers).
    HaveOnly,
}

/// A peer on the LAN, for commands and the status page.
#[derive(Debug, Clone)]
pub struct Neighbour {
    /// Where its datagrams come from.
    pub address: SocketAddr,
    /// The port of its HTTP server, if it said so.
    pub http_port: Option<u16>,
    /// How it was met.
    pub met_by: MetBy,
    /// When anything came from it last.
    pub heard: Option<Instant>,
    /// Since when it is silent; `None` for a live peer.
    pub silent_since: Option<Instant>,
    /// The smoothed round trip.
    pub round_trip: Option<Duration>,
}

/// An answer that a lookup still wants from a peer.
#[derive(Debug)]
pub struct AwaitedAnswer {
    /// When the answer was first wanted, even if the query was held back; after a *have*, when that
    /// came. Lookup time.
    pub since: Instant,
    /// When the query was last sent, in lookup time; `None` if it waits, as the peer is behind.
    sent: Option<Instant>,
    /// The peer said *have*, and its narinfo is being fetched: the query is not repeated.
    is_fetching: bool,
}

/// A query that was sent.
#[derive(Debug, Clone)]
pub struct SentBatch {
    /// Its request ID.
    pub id: u32,
    /// Lookup time.
    pub sent: Instant,
    /// The lookups whose hash parts it named, in that order.
    pub lookups: Arc<[LookupId]>,
}

#[derive(Debug)]
struct Silence {
    since: Instant,
    next_probe: Instant,
    pause: Duration,
}

/// What is known of one peer.
#[derive(Debug)]
pub struct LanPeer {
    /// Whether `--peer` names it.
    pub is_named: bool,
    met_by: MetBy,
    met: Option<Instant>,
    heard: Option<Instant>,
    /// What it said of itself last.
    pub hello: Option<Hello>,
    round_trip: Option<RoundTrip>,
    silence: Option<Silence>,
    last_probe: Option<Instant>,
    /// When it last answered a query, in lookup time.
    last_answer: Option<Instant>,
    /// When it said *bye*.
    said_bye: Option<Instant>,
    /// When it was first probed after its *bye*, in lookup time: it is waited for from then on.
    bye: Option<Instant>,
    /// Paths found through it.
    pub found: u32,
    /// The last of them.
    pub last_found: Option<HashPart>,
    /// A *have-only* peer that was given up is asked for what it had: when that was sent, in lookup
    /// time.
    verified_at: Option<Instant>,
    /// The budget of a peer through which something was found; the others share one.
    pub budget: Option<WaitBudget>,
    /// Whether it is counted as overdue in its budget.
    pub is_overdue: bool,
    owed: BTreeMap<LookupId, AwaitedAnswer>,
    sent: VecDeque<SentBatch>,
    /// Number of queries sent after the one that was answered last; they are at the end of `sent`.
    in_flight: usize,
    repeat_at: Option<Instant>,
    repeats: u32,
    last_early_repeat: Option<Instant>,
    /// When it last said hello as another instance.
    last_change: Option<Instant>,
    /// When it was last told of this node because it seemed not to know it.
    pub last_reminder: Option<Instant>,
}

impl LanPeer {
    fn new(met_by: MetBy, met: Option<Instant>) -> Self {
        LanPeer {
            is_named: met_by == MetBy::Named,
            met_by,
            met,
            heard: met,
            hello: None,
            round_trip: None,
            silence: None,
            last_probe: None,
            last_answer: None,
            said_bye: None,
            bye: None,
            found: 0,
            last_found: None,
            verified_at: None,
            budget: None,
            is_overdue: false,
            owed: BTreeMap::new(),
            sent: VecDeque::new(),
            in_flight: 0,
            repeat_at: None,
            repeats: 0,
            last_early_repeat: None,
            last_change: None,
            last_reminder: None,
        }
    }

    /// Which packets it understands.
    pub fn dialect(&self) -> Dialect {
        match self.hello {
            Some(hello) if hello.batches => Dialect::Batches,
            Some(hello) if !hello.crowded => Dialect::Singles,
            _ => Dialect::HaveOnly,
        }
    }

    /// Whether a broadcast query reaches it and is all that it is sent at first: it is a Python
    /// peerix here, which works for 20 ms on each copy.
    pub fn takes_broadcasts(&self) -> bool {
        self.hello.is_none() && !self.is_named
    }

    /// Whether it is asked: it has not been given up.
    pub fn is_live(&self) -> bool {
        self.silence.is_none()
    }

    /// Whether it is live and has answered before. Datagrams to others may wait for ARP and fill a
    /// socket's send buffer.
    pub fn is_proven(&self) -> bool {
        self.is_live() && self.last_answer.is_some()
    }

    /// Whether it has left queries unanswered, too many or for too long. It may have vanished, so
    /// that few datagrams to it may wait for ARP.
    pub fn is_behind(&self, t: Instant) -> bool {
        let oldest = self.sent.len().checked_sub(self.in_flight).and_then(|at| self.sent.get(at));
        self.in_flight >= MAX_IN_FLIGHT
            || oldest.is_some_and(|oldest| oldest.sent + self.first_repeat_gap() <= t)
    }

    /// Whether it is behind and was sent a query less than a repeat's distance ago.
    pub fn is_held_back(&self, t: Instant) -> bool {
        self.is_behind(t) && self.sent.back().is_some_and(|last| last.sent + self.repeat_gap() > t)
    }

    /// Whether a Python peerix was heard at this address within the last hour.
    fn is_original(&self, now: Instant) -> bool {
        let is_patient =
            self.met.is_some_and(|met| now.saturating_duration_since(met) >= HELLO_PATIENCE);
        self.hello.is_none()
            && (self.last_answer.is_some() || self.met_by == MetBy::Query && is_patient)
            && self
                .heard
                .is_some_and(|heard| now.saturating_duration_since(heard) < REMEMBER_ORIGINAL)
    }

    /// The usual answer time; `None` before the first answer.
    pub fn usual(&self) -> Option<Duration> {
        self.round_trip.map(|round_trip| round_trip.usual())
    }

    /// How long after a query an answer is due, where `median` is the usual time of the median
    /// peer.
    pub fn due_after(&self, median: Option<Duration>) -> Duration {
        if self.budget.is_some() {
            let usual = self.usual().unwrap_or(MAX_OWN_DUE);
            return (usual * DUE_FACTOR).clamp(MIN_DUE, MAX_OWN_DUE);
        }
        median.map_or(MAX_SHARED_DUE, |median| (median * DUE_FACTOR).clamp(MIN_DUE, MAX_SHARED_DUE))
    }

    /// When the oldest answer was asked for that is still wanted.
    pub fn oldest_owed(&self) -> Option<Instant> {
        self.owed.values().map(|owed| owed.since).min()
    }

    /// The lookups whose answers were asked for at `until` or before.
    pub fn owed_since(&self, until: Instant) -> Vec<LookupId> {
        self.owed.iter().filter(|(_, owed)| owed.since <= until).map(|(id, _)| *id).collect()
    }

    /// Notes that a query for `lookups` was sent with this request ID. Returns the lookups that
    /// were not owed before.
    pub fn record_sent(&mut self, id: u32, lookups: Arc<[LookupId]>, t: Instant) -> Vec<LookupId> {
        // That one which never says no is behind says nothing.
        let is_late =
            self.repeat_at.is_none() && self.is_behind(t) && self.dialect() != Dialect::HaveOnly;
        self.repeats += u32::from(is_late);
        let added = self.owe(&lookups, Some(t), t);
        if self.sent.len() >= MAX_SENT_BATCHES {
            self.sent.pop_front();
        }
        self.sent.push_back(SentBatch { id, sent: t, lookups });
        self.in_flight = self.sent.len().min(self.in_flight + 1);
        added
    }

    /// Notes that the peer is to answer for `lookups` although it is behind, and will be asked
    /// later. Returns the lookups that were not owed before.
    pub fn record_held_back(&mut self, lookups: &[LookupId], t: Instant) -> Vec<LookupId> {
        self.owe(lookups, None, t)
    }

    fn owe(&mut self, lookups: &[LookupId], sent: Option<Instant>, t: Instant) -> Vec<LookupId> {
        let mut added = Vec::new();
        for lookup in lookups {
            let owed = self.owed.entry(*lookup).or_insert_with(|| {
                added.push(*lookup);
                AwaitedAnswer { since: t, sent, is_fetching: false }
            });
            owed.sent = sent.or(owed.sent);
        }
        if self.repeat_at.is_none() && !self.owed.is_empty() {
            // What is held back leaves a repeat's distance after the last query.
            let last = self.sent.back().filter(|_| sent.is_none()).map_or(t, |last| last.sent);
            self.repeat_at = Some(last + self.repeat_gap());
        }
        added
    }

    /// It said hello. Returns whether it is another instance than before, and tells of such a
    /// change at most once in [`HELLO_CHANGE`].
    pub fn record_hello(&mut self, hello: Hello, now: Instant) -> bool {
        self.hasten_probe(now);
        let is_other = self.hello.is_none_or(|old| old.instance != hello.instance);
        if is_other && self.last_change.is_some_and(|last| last + HELLO_CHANGE > now) {
            return false;
        }
        if is_other {
            self.last_change = Some(now);
        }
        // Anybody may have sent it: a peer that understands batches goes on getting them until it
        // is silent.
        let answers_batches = self.is_live() && self.dialect() == Dialect::Batches;
        self.hello = Some(if answers_batches {
            Hello { batches: true, crowded: false, ..hello }
        } else {
            hello
        });
        is_other
    }

    /// Takes the query with this request ID, if it was sent to this peer and not yet answered.
    pub fn take_sent(&mut self, id: u32) -> Option<SentBatch> {
        let at = self.sent.iter().position(|batch| batch.id == id)?;
        self.sent.remove(at)
    }

    /// An answer came to a query sent at `sent`. Returns whether that made a silent peer live.
    pub fn record_answer(&mut self, sent: Instant, t: Instant) -> bool {
        let sample = t.saturating_duration_since(sent);
        match &mut self.round_trip {
            Some(round_trip) => round_trip.add(sample),
            None => self.round_trip = Some(RoundTrip::new(sample)),
        }
        self.last_answer = Some(t);
        self.verified_at = None;
        // An older one may have been answered late.
        self.in_flight = self
            .in_flight
            .min(self.sent.iter().rev().take_while(|batch| batch.sent > sent).count());
        if self.bye.is_some_and(|bye| sent >= bye) {
            (self.said_bye, self.bye) = (None, None);
        }
        if self.repeats > 0 {
            self.repeats = 0;
            self.repeat_at = (!self.owed.is_empty()).then(|| t + self.repeat_gap());
        }
        self.silence.take().is_some()
    }

    /// The peer owes this lookup nothing any more. Returns whether it did.
    pub fn settle(&mut self, lookup: LookupId) -> bool {
        let was_owed = self.owed.remove(&lookup).is_some();
        if self.owed.is_empty() {
            self.repeat_at = None;
            if self.dialect() == Dialect::HaveOnly {
                // It never says no: that a query is over says nothing of it.
                self.repeats = 0;
            }
        }
        was_owed
    }

    /// Whether the peer owes this lookup anything.
    pub fn owes(&self, lookup: LookupId) -> bool {
        self.owed.contains_key(&lookup)
    }

    /// Whether the peer said *have* for this lookup and owes the narinfo.
    pub fn owes_narinfo(&self, lookup: LookupId) -> bool {
        self.owed.get(&lookup).is_some_and(|owed| owed.is_fetching)
    }

    /// The peer said *have* for this lookup: from now on it owes the narinfo. Returns whether it
    /// owed an answer before.
    pub fn owe_narinfo(&mut self, lookup: LookupId, t: Instant) -> bool {
        self.owed
            .insert(lookup, AwaitedAnswer { since: t, sent: Some(t), is_fetching: true })
            .is_some()
    }

    fn first_repeat_gap(&self) -> Duration {
        self.usual().map_or(UNMEASURED_REPEAT, |usual| (usual * 3 / 2).max(MIN_REPEAT))
    }

    fn repeat_gap(&self) -> Duration {
        let first = self.first_repeat_gap();
        let is_waited_for = self.said_bye.is_some() || self.budget.is_some();
        let is_quick = is_waited_for && self.dialect() != Dialect::HaveOnly;
        let most = if is_quick { first.clamp(MAX_OWN_REPEAT, MAX_REPEAT) } else { MAX_REPEAT };
        most.min(first * (1 << self.repeats.min(8)))
    }

    /// When a repeat is due, in lookup time.
    pub fn repeat_at(&self) -> Option<Instant> {
        self.repeat_at.filter(|_| self.is_live())
    }

    /// The lookups to ask again now, the oldest first, if a repeat is due.
    pub fn due_repeats(&mut self, t: Instant, most: usize) -> Vec<LookupId> {
        if self.repeat_at().is_none_or(|at| at > t) {
            return Vec::new();
        }
        // What was sent meanwhile has most of its time still before it.
        let gap = self.repeat_gap();
        let repeats = self.unanswered(|sent| sent + gap * 9 / 10 <= t, most);
        if !repeats.is_empty() {
            self.repeats += 1;
        }
        let is_waiting = self.owed.values().any(|owed| !owed.is_fetching);
        self.repeat_at = is_waiting.then(|| t + self.repeat_gap());
        repeats
    }

    /// The lookups to ask again at once because a query sent at `answered` overtook theirs.
    pub fn overtaken(&mut self, answered: Instant, t: Instant, most: usize) -> Vec<LookupId> {
        let pause = self
            .round_trip
            .map_or(MIN_REPEAT, |round_trip| round_trip.smoothed().max(2 * REORDERING));
        if self.last_early_repeat.is_some_and(|at| at + pause > t) {
            return Vec::new();
        }
        let overtaken = self.unanswered(|sent| sent + REORDERING < answered, most);
        if !overtaken.is_empty() {
            self.last_early_repeat = Some(t);
        }
        overtaken
    }

    /// The lookups that wait for an answer to a query and not for a narinfo.
    pub fn all_unanswered(&self, most: usize) -> Vec<LookupId> {
        self.unanswered(|_| true, most)
    }

    fn unanswered(&self, is_meant: impl Fn(Instant) -> bool, most: usize) -> Vec<LookupId> {
        let meant = self
            .owed
            .iter()
            .filter(|(_, owed)| !owed.is_fetching && owed.sent.is_none_or(&is_meant));
        meant.map(|(id, _)| *id).take(most).collect()
    }

    /// Whether the peer has answered nothing since `since`.
    pub fn is_unanswered_since(&self, since: Instant) -> bool {
        self.last_answer.is_none_or(|answer| answer < since)
    }

    /// A *have-only* peer that was given up says nothing by its silence. Returns whether it now
    /// counts as silent: it also left a query unanswered for a path that it had.
    pub fn is_verified_silent(&self, t: Instant, due: Duration) -> bool {
        if self.last_found.is_none() {
            return true;
        }
        self.verified_at.is_some_and(|at| at + due <= t)
    }

    /// A query for a path that the peer had is sent now. Returns false if one is under way already.
    pub fn begin_verification(&mut self, t: Instant) -> bool {
        let begins = self.verified_at.is_none();
        self.verified_at.get_or_insert(t);
        begins
    }

    /// Gives the peer up. Returns the lookups that wanted an answer, and whether that was a
    /// narinfo.
    pub fn silence(&mut self, now: Instant) -> Vec<(LookupId, bool)> {
        let next_probe = now + FIRST_PROBE;
        self.silence.get_or_insert(Silence { since: now, next_probe, pause: FIRST_PROBE });
        (self.repeat_at, self.repeats, self.verified_at) = (None, 0, None);
        (self.said_bye, self.bye) = (None, None);
        std::mem::take(&mut self.owed)
            .into_iter()
            .map(|(lookup, owed)| (lookup, owed.is_fetching))
            .collect()
    }

    /// Whether it said *bye*, was probed, and has been waited for long enough.
    pub fn has_left(&self, t: Instant) -> bool {
        self.bye.is_some_and(|bye| bye + BYE_WAIT.get() <= t)
    }

    /// When the wait after its *bye* ends.
    pub fn leaves_at(&self) -> Option<Instant> {
        self.bye.map(|bye| bye + BYE_WAIT.get())
    }

    /// It said *bye*.
    pub fn record_bye(&mut self, now: Instant) {
        self.said_bye.get_or_insert(now);
        self.repeats = 0;
    }

    /// When it is probed next; a live peer only after its *bye*, and if its hellos do not come.
    pub fn next_probe(&self) -> Option<Instant> {
        if let Some(silence) = &self.silence {
            return Some(silence.next_probe);
        }
        let after_last = |pause| self.last_probe.map(|last| last + pause);
        if let Some(said_bye) = self.said_bye {
            return if self.bye.is_some() { after_last(PROBE_AFTER_BYE) } else { Some(said_bye) };
        }
        let unheard =
            self.heard.filter(|_| self.hello.is_some()).map(|heard| heard + PROBE_UNHEARD);
        unheard.map(|at| at.max(after_last(PROBE_UNHEARD_AGAIN).unwrap_or(at)))
    }

    /// Moves the next probe of a silent peer to now, at most once in [`FIRST_PROBE`].
    pub fn hasten_probe(&mut self, now: Instant) {
        if let Some(silence) = &mut self.silence {
            let earliest = self.last_probe.map_or(now, |last| last + FIRST_PROBE);
            silence.next_probe = silence.next_probe.min(earliest.max(now));
        }
    }

    /// A probe is sent now.
    pub fn record_probe(&mut self, now: Instant, t: Instant) {
        self.last_probe = Some(now);
        if self.said_bye.is_some() {
            self.bye.get_or_insert(t);
        }
        if let Some(silence) = &mut self.silence {
            silence.next_probe = now + silence.pause;
            silence.pause = MAX_PROBE.min(silence.pause * 2);
        }
    }

    /// Probes begin anew with short pauses: the network has changed.
    pub fn restart_probes(&mut self, now: Instant) {
        if let Some(silence) = &mut self.silence {
            silence.pause = FIRST_PROBE;
        }
        self.hasten_probe(now);
    }
}

/// All peers by the address that their datagrams come from.
#[derive(Default)]
pub struct PeerTable {
    peers: BTreeMap<SocketAddr, LanPeer>,
}

impl PeerTable {
    /// The peer at this address.
    pub fn get(&self, address: SocketAddr) -> Option<&LanPeer> {
        self.peers.get(&address)
    }

    /// The peer at this address.
    pub fn get_mut(&mut self, address: SocketAddr) -> Option<&mut LanPeer> {
        self.peers.get_mut(&address)
    }

    /// All of them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SocketAddr, &mut LanPeer)> {
        self.peers.iter_mut().map(|(address, peer)| (*address, peer))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (SocketAddr, &LanPeer)> {
        self.peers.iter().map(|(address, peer)| (*address, peer))
    }

    /// Number of peers that are asked.
    pub fn live(&self) -> usize {
        self.peers.values().filter(|peer| peer.is_live()).count()
    }

    /// A packet came from `address`. Returns the peer, and whether it is new; `None` if there is no
    /// room for it.
    pub fn record_heard(
        &mut self,
        address: SocketAddr,
        met_by: MetBy,
        now: Instant,
    ) -> Option<(&mut LanPeer, bool)> {
        let is_new = !self.peers.contains_key(&address);
        if is_new && self.peers.len() >= MAX_PEERS && !self.evict() {
            return None;
        }
        let peer = self.peers.entry(address).or_insert_with(|| LanPeer::new(met_by, Some(now)));
        let is_first = is_new || peer.heard.is_none();
        peer.heard = Some(now);
        peer.met.get_or_insert(now);
        Some((peer, is_first))
    }

    /// Sets the addresses that `--peer` names. Returns the new ones.
    pub fn set_named(&mut self, named: &[SocketAddr]) -> Vec<SocketAddr> {
        for (address, peer) in &mut self.peers {
            peer.is_named = named.contains(address);
        }
        let mut added = Vec::new();
        for address in named {
            self.peers.entry(*address).or_insert_with(|| {
                added.push(*address);
                LanPeer::new(MetBy::Named, None)
            });
        }
        added
    }

    /// The addresses that `--peer` names.
    pub fn named(&self) -> impl Iterator<Item = SocketAddr> {
        self.peers.iter().filter(|(_, peer)| peer.is_named).map(|(address, _)| *address)
    }

    /// Whether a Python peerix was heard within the last hour.
    pub fn has_original(&self, now: Instant) -> bool {
        self.peers.values().any(|peer| peer.is_original(now))
    }

    /// The usual answer time of the median peer; `None` while no peer is measured.
    pub fn median_usual(&self) -> Option<Duration> {
        let mut usual: Vec<Duration> = self.peers.values().filter_map(LanPeer::usual).collect();
        let middle = usual.len() / 2;
        (!usual.is_empty()).then(|| *usual.select_nth_unstable(middle).1)
    }

    /// Forgets peers that have been silent for too long, and the address of a peer that `--peer` no
    /// longer names. Returns the live ones that were not heard for long.
    pub fn forget_old(&mut self, now: Instant) -> Vec<SocketAddr> {
        let age = |at: Instant| now.saturating_duration_since(at);
        self.peers.retain(|_, peer| {
            let is_remembered = match &peer.silence {
                _ if peer.is_named || peer.is_original(now) => true,
                Some(silence) => age(silence.since) < FORGET_SILENT,
                None => peer.heard.is_some() || peer.last_answer.is_some(),
            };
            is_remembered || !peer.owed.is_empty()
        });
        let is_unheard = |peer: &LanPeer| {
            peer.is_live()
                && !peer.takes_broadcasts()
                && peer.owed.is_empty()
                && peer.heard.is_some_and(|at| age(at) > UNHEARD)
        };
        self.peers
            .iter()
            .filter(|(_, peer)| is_unheard(peer))
            .map(|(address, _)| *address)
            .collect()
    }

    /// All of them, for people.
    pub fn list(&self) -> Vec<Neighbour> {
        let neighbour = |(address, peer): (&SocketAddr, &LanPeer)| Neighbour {
            address: *address,
            http_port: peer.hello.map(|hello| hello.port),
            met_by: if peer.is_named { MetBy::Named } else { peer.met_by },
            heard: peer.heard,
            silent_since: peer.silence.as_ref().map(|silence| silence.since),
            round_trip: peer.round_trip.map(|round_trip| round_trip.smoothed()),
        };
        self.peers.iter().map(neighbour).collect()
    }

    /// Forgets the peer heard longest ago among those that never had a path, silent ones and those
    /// that never answered first. Returns false if there is none.
    fn evict(&mut self) -> bool {
        let is_candidate =
            |peer: &LanPeer| peer.found == 0 && !peer.is_named && peer.owed.is_empty();
        let candidates = self.peers.iter().filter(|(_, peer)| is_candidate(peer));
        let idlest = candidates.min_by_key(|(_, peer)| (peer.is_proven(), peer.heard));
        let Some(address) = idlest.map(|(address, _)| *address) else { return false };
        self.peers.remove(&address).is_some()
    }
}

#[cfg(test)]
impl PeerTable {
    /// Panics if the table, or what is kept of a peer, is larger than its bound.
    pub fn assert_bounds(&self) {
        assert!(self.peers.len() <= MAX_PEERS);
        for peer in self.peers.values() {
            assert!(
                peer.owed.len() <= super::lookups::MAX_LOOKUPS
                    && peer.sent.len() <= MAX_SENT_BATCHES
            );
        }
    }
}
