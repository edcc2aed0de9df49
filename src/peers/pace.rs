//! How fast each peer sends NARs to this node, and how much of them is still to come from it.
//!
//! [`PaceMeter`] is the arithmetic, without I/O or clock. [`Paces`] shares the meters of each peer
//! between threads, and [`IncomingNar`] is one NAR's part in them.

use super::health::PeerKey;
use crate::time_scale::Timeout;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes that are measured before a pace is known: the first ones wait for Wi-Fi cards that sleep.
pub const ENOUGH: u64 = 256 * 1024;
/// Time that a peer was waited for, from its first bytes on, after which its pace is known with
/// fewer. A Wi-Fi card that sleeps 100 ms before each answer has sent [`ENOUGH`] by then.
const ENOUGH_TIME: Timeout = Timeout::from_secs(2);
/// A pace is forgotten when the peer was not waited for in this time: it may have moved to another
/// network.
const KEPT: Duration = Duration::from_secs(600);
/// A pace below this, in bytes per second, is none, and is not kept.
const LEAST: f64 = 1.0;
/// Part of a new sample in the smoothed pace.
const GAIN: f64 = 0.25;
/// Peers measured at once. Beyond, those without a NAR under way are forgotten.
const MAX_PEERS: usize = 1024;

/// What is known of a pace, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaceEstimate {
    /// The pace, if enough was measured. It drops at once while nothing comes.
    pub known: Option<f64>,
    /// The pace, if enough was measured, which drops only when little came in `ENOUGH_TIME`: one
    /// stall says nothing of it.
    pub lasting: Option<f64>,
    /// What came while it was waited for, in the sample under way; zero before the first wait.
    pub measured: f64,
    /// It is slower than this.
    pub at_most: f64,
    /// Time that the sample under way has waited.
    pub waited: Duration,
}

/// What this node expects of a peer: an input of the choice among peers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeerLoad {
    /// NARs under way from it.
    pub streams: u32,
    /// Bytes of these that are still to come.
    pub outstanding: u64,
    /// How fast NARs come from it, the waits for their beginnings included.
    pub pace: PaceEstimate,
    /// How fast they come once they have begun.
    pub after_begin: PaceEstimate,
    /// When it was last chosen, as a number that grows with every choice.
    pub chosen: u64,
    /// Whether a NAR was whole that it sent.
    pub is_proven: bool,
}

/// Bytes per time that was waited for them.
///
/// Time counts once in which several streams wait for the peer, so the pace is that of the peer and
/// not of one stream.
#[derive(Debug, Default)]
pub struct PaceMeter {
    /// Streams that wait at this moment, and since when there is one.
    waiting: u32,
    since: Option<Instant>,
    /// Of the sample under way.
    bytes: u64,
    waited: Duration,
    /// What it had waited when its first bytes came.
    waited_first: Option<Duration>,
    pace: Option<f64>,
    last: Option<Instant>,
}

impl PaceMeter {
    /// A stream waits from now on.
    pub fn wait(&mut self, now: Instant) {
        if self.waiting == 0 {
            self.since = Some(now);
        }
        self.waiting += 1;
    }

    /// The wait of a stream is interrupted: nothing came.
    pub fn pause(&mut self, now: Instant) {
        self.count_time(now);
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            self.since = None;
        }
    }

    /// The wait of a stream ends with so many bytes.
    pub fn got(&mut self, bytes: u64, now: Instant) {
        self.pause(now);
        if bytes == 0 {
            return;
        }
        self.bytes += bytes;
        // One answer that is late is no pace: bytes have come for as long as it takes to tell.
        let since = *self.waited_first.get_or_insert(self.waited);
        if !self.waited.is_zero()
            && (self.bytes >= ENOUGH || self.waited - since >= ENOUGH_TIME.get())
        {
            let sample = self.bytes as f64 / self.waited.as_secs_f64();
            self.pace = Some(self.pace.map_or(sample, |pace| pace + GAIN * (sample - pace)));
            (self.bytes, self.waited, self.waited_first) = (0, Duration::ZERO, None);
        }
    }

    fn count_time(&mut self, now: Instant) {
        if let Some(since) = self.since {
            self.waited += now.saturating_duration_since(since);
            self.since = Some(now);
            self.last = Some(now);
        }
    }

    /// What is known at `now`.
    pub fn pace(&self, now: Instant) -> PaceEstimate {
        let waited = self.waited
            + self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let per_second = |bytes: u64| {
            if waited.is_zero() { f64::INFINITY } else { bytes as f64 / waited.as_secs_f64() }
        };
        let is_recent = self.since.is_some()
            || self.last.is_some_and(|last| now.saturating_duration_since(last) < KEPT);
        let at_most = if is_recent { per_second(self.bytes + ENOUGH) } else { f64::INFINITY };
        let smoothed = self.pace.filter(|_| is_recent);
        let known = smoothed.map(|pace| pace.min(at_most));
        let lasting = if waited < ENOUGH_TIME.get() { smoothed } else { known };
        let measured = if waited.is_zero() { 0.0 } else { per_second(self.bytes) };
        PaceEstimate { known, lasting, measured, at_most, waited }
    }
}

/// One peer.
#[derive(Debug, Default)]
struct PeerPace {
    streams: u32,
    outstanding: u64,
    chosen: u64,
    is_proven: bool,
    meter: PaceMeter,
    /// Without the first bytes of each NAR, and the wait for them: a Wi-Fi card that sleeps makes
    /// small NARs slow, and says nothing of large ones.
    after_begin: PaceMeter,
}

impl PeerPace {
    fn load(&self, now: Instant) -> PeerLoad {
        PeerLoad {
            streams: self.streams,
            outstanding: self.outstanding,
            pace: self.meter.pace(now),
            after_begin: self.after_begin.pace(now),
            chosen: self.chosen,
            is_proven: self.is_proven,
        }
    }
}

impl PeerLoad {
    /// The load with one more NAR of so many bytes.
    pub fn with(self, bytes: u64) -> PeerLoad {
        PeerLoad { streams: self.streams + 1, outstanding: self.outstanding + bytes, ..self }
    }
}

impl fmt::Display for PeerLoad {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pace.known {
            Some(pace) => write!(f, "{:.0} KiB/s", pace / 1024.0)?,
            None => f.write_str("pace unknown")?,
        }
        write!(f, ", {} under way with {} KiB to come", self.streams, self.outstanding / 1024)
    }
}

/// The paces of all peers; shared by all threads.
#[derive(Default)]
pub struct Paces {
    state: Mutex<PacesState>,
}

#[derive(Default)]
struct PacesState {
    peers: HashMap<PeerKey, PeerPace>,
    turn: u64,
}

impl Paces {
    /// What is expected of a peer at `now`.
    pub fn load(&self, who: PeerKey, now: Instant) -> PeerLoad {
        self.lock()
            .peers
            .get(&who)
            .map_or_else(|| PeerPace::default().load(now), |peer| peer.load(now))
    }

    /// `bytes` of a NAR are asked of a peer, which is waited for from now on.
    pub fn begin(&self, who: PeerKey, bytes: u64, now: Instant) -> IncomingNar<'_> {
        let mut state = self.lock();
        state.turn += 1;
        if state.peers.len() >= MAX_PEERS && !state.peers.contains_key(&who) {
            // Long answers have fewer permits than there are places, so some peer sends nothing.
            state.peers.retain(|_, peer| peer.streams > 0);
        }
        let turn = state.turn;
        let peer = state.peers.entry(who).or_default();
        peer.streams += 1;
        peer.outstanding += bytes;
        peer.chosen = turn;
        peer.meter.wait(now);
        IncomingNar { paces: self, who, left: bytes, is_waiting: true, has_begun: false }
    }

    /// The peers whose paces are known at `now`, in bytes per second.
    pub fn known(&self, now: Instant) -> Vec<(PeerKey, f64)> {
        let state = self.lock();
        let pace = |peer: &PeerPace| peer.meter.pace(now).known.filter(|pace| *pace >= LEAST);
        state.peers.iter().filter_map(|(who, peer)| Some((*who, pace(peer)?))).collect()
    }

    /// A peer's pace is as it was before, until it is measured.
    pub fn restore(&self, who: PeerKey, bytes_per_second: f64, now: Instant) {
        let mut state = self.lock();
        let is_pace = bytes_per_second.is_finite() && bytes_per_second >= LEAST;
        if is_pace && state.peers.len() < MAX_PEERS {
            let meter = &mut state.peers.entry(who).or_default().meter;
            (meter.pace, meter.last) = (Some(bytes_per_second), Some(now));
        }
    }

    fn lock(&self) -> MutexGuard<'_, PacesState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One NAR that comes from a peer. Dropping it ends its part in the peer's load.
pub struct IncomingNar<'a> {
    paces: &'a Paces,
    who: PeerKey,
    left: u64,
    is_waiting: bool,
    has_begun: bool,
}

impl IncomingNar<'_> {
    /// The peer is waited for from now on.
    pub fn wait(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.is_waiting, true) {
            let has_begun = self.has_begun;
            self.with(|peer| {
                peer.meter.wait(now);
                if has_begun {
                    peer.after_begin.wait(now);
                }
            });
        }
    }

    /// The wait is interrupted by something else than bytes, which is not the peer's time.
    pub fn pause(&mut self, now: Instant) {
        if std::mem::replace(&mut self.is_waiting, false) {
            let has_begun = self.has_begun;
            self.with(|peer| {
                peer.meter.pause(now);
                if has_begun {
                    peer.after_begin.pause(now);
                }
            });
        }
    }

    /// The wait ended with so many bytes.
    pub fn got(&mut self, bytes: u64, now: Instant) {
        if !std::mem::replace(&mut self.is_waiting, false) {
            return;
        }
        let bytes = bytes.min(self.left);
        self.left -= bytes;
        let has_begun = std::mem::replace(&mut self.has_begun, true);
        self.with(|peer| {
            peer.outstanding = peer.outstanding.saturating_sub(bytes);
            peer.meter.got(bytes, now);
            if has_begun {
                peer.after_begin.got(bytes, now);
            }
        });
    }

    /// The NAR was whole.
    pub fn prove(&mut self) {
        self.with(|peer| peer.is_proven = true);
    }

    /// What is expected of the peer at `now`.
    pub fn load(&self, now: Instant) -> PeerLoad {
        self.paces.load(self.who, now)
    }

    fn with(&self, change: impl FnOnce(&mut PeerPace)) {
        if let Some(peer) = self.paces.lock().peers.get_mut(&self.who) {
            change(peer);
        }
    }
}

impl Drop for IncomingNar<'_> {
    fn drop(&mut self) {
        self.pause(Instant::now());
        self.with(|peer| {
            peer.streams = peer.streams.saturating_sub(1);
            peer.outstanding = peer.outstanding.saturating_sub(self.left);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A meter whose peer was waited for `waits` times, and sent that many bytes each time.
    fn waited(waits: u32, each: Duration, bytes: u64) -> (PaceMeter, Instant) {
        let (mut meter, mut now) = (PaceMeter::default(), Instant::now());
        for _ in 0..waits {
            meter.wait(now);
            now += each;
            meter.got(bytes, now);
            // Nix keeps us from reading: that is not the peer's time.
            now += Duration::from_secs(1);
        }
        (meter, now)
    }

    fn known(meter: &PaceMeter, now: Instant) -> Option<f64> {
        meter.pace(now).known
    }

    fn is_near(pace: f64, expected: f64) -> bool {
        (pace / expected - 1.0).abs() < 1e-6
    }

    fn who() -> PeerKey {
        PeerKey::from(std::net::SocketAddr::from(([10, 0, 0, 1], 1)))
    }

    #[test]
    fn pace_is_bytes_per_time_waited_and_unknown_before_256_kib() {
        let (meter, now) = waited(3, ms(10), 64 * KIB);
        assert_eq!(known(&meter, now), None);
        let (meter, now) = waited(4, ms(10), 64 * KIB);
        assert!(is_near(known(&meter, now).unwrap(), 256.0 * 1024.0 / 0.04));
    }

    #[test]
    fn little_in_two_seconds_is_a_pace_too() {
        let (meter, now) = waited(20, ms(100), 900);
        assert_eq!(known(&meter, now), None);
        let (meter, now) = waited(21, ms(100), 900);
        assert!(is_near(known(&meter, now).unwrap(), 9000.0));
    }

    #[test]
    fn one_late_answer_and_none_at_all_are_no_pace() {
        let (meter, now) = waited(1, Duration::from_secs(9), 900);
        assert_eq!(known(&meter, now), None);
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        let before = known(&meter, now).unwrap();
        meter.wait(now);
        meter.got(0, now + Duration::from_secs(4));
        assert!(is_near(meter.pace.unwrap(), before), "{meter:?}");
        // What was waited for in vain is not forgotten.
        assert!(known(&meter, now + Duration::from_secs(4)).unwrap() <= 64.0 * 1024.0);
    }

    #[test]
    fn zero_is_neither_kept_nor_restored() {
        let (paces, now) = (Paces::default(), Instant::now());
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            paces.restore(who(), wrong, now);
            assert_eq!(paces.load(who(), now).pace.known, None, "{wrong}");
        }
        paces.restore(who(), 5e6, now);
        assert_eq!(paces.known(now).len(), 1);
    }

    #[test]
    fn streams_that_wait_together_count_their_time_once() {
        let (paces, now) = (Paces::default(), Instant::now());
        let mut intakes: Vec<IncomingNar> =
            (0..8).map(|_| paces.begin(who(), 32 * KIB, now)).collect();
        let load = paces.load(who(), now);
        assert_eq!((load.streams, load.outstanding), (8, 256 * KIB));
        for (i, intake) in (1..).zip(&mut intakes) {
            intake.got(32 * KIB, now + ms(100 * i / 8));
        }
        drop(intakes);
        let load = paces.load(who(), now + ms(100));
        assert!(is_near(load.pace.known.unwrap(), 256.0 * 1024.0 / 0.1), "{load:?}");
        assert_eq!((load.streams, load.outstanding), (0, 0));
    }

    #[test]
    fn pace_that_drops_is_seen_while_the_peer_is_silent() {
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        meter.wait(now);
        let later = now + Duration::from_secs(4);
        assert!(known(&meter, now + ms(1)).unwrap() > 6e6);
        assert!(known(&meter, later).unwrap() <= 64.0 * 1024.0);
        assert_eq!(meter.pace(later).measured, 0.0);
    }

    #[test]
    fn lasting_pace_is_not_that_of_one_stall() {
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        meter.wait(now);
        let pace = meter.pace(now + ms(100));
        assert!(pace.known.unwrap() < 2.7e6 && pace.lasting.unwrap() > 6e6, "{pace:?}");
        assert!(meter.pace(now + Duration::from_secs(4)).lasting.unwrap() <= 64.0 * 1024.0);
        // What this node does meanwhile is not the peer's time.
        meter.pause(now + ms(100));
        assert_eq!(meter.pace(now + Duration::from_secs(9)).waited, ms(100));
    }

    #[test]
    fn pace_of_a_peer_that_was_not_asked_for_long_is_forgotten() {
        let (meter, now) = waited(4, ms(10), 64 * KIB);
        assert!(known(&meter, now + KEPT - Duration::from_secs(2)).is_some());
        assert!(known(&meter, now + KEPT).is_none());
        // Nor is it said to be slow, after what it once did not send.
        let (mut meter, now) = (PaceMeter::default(), Instant::now());
        meter.wait(now);
        meter.got(0, now + ms(500));
        assert!(meter.pace(now + ms(500)).at_most < 600e3);
        assert_eq!(meter.pace(now + ms(500) + KEPT).at_most, f64::INFINITY);
    }

    /// A card that sleeps 100 ms is not slow; a peer that drips is, however small its NARs are.
    #[test]
    fn small_nars_of_a_sleeping_card_are_no_measure_and_those_that_drip_are() {
        let (paces, mut now) = (Paces::default(), Instant::now());
        for _ in 0..100 {
            let mut intake = paces.begin(who(), 20 * KIB, now);
            now += ms(100);
            intake.got(20 * KIB, now);
        }
        let load = paces.load(who(), now);
        assert!(load.pace.known.unwrap() < 210.0 * 1024.0);
        assert_eq!(load.after_begin.known, None);
        let mut intake = paces.begin(who(), 20 * KIB, now);
        for _ in 0..22 {
            intake.wait(now);
            now += ms(100);
            intake.got(900, now);
        }
        assert!(is_near(paces.load(who(), now).after_begin.known.unwrap(), 9000.0));
    }

    #[test]
    fn intake_leaves_no_load_behind_however_it_ends() {
        let (paces, now) = (Paces::default(), Instant::now());
        let mut intake = paces.begin(who(), 1000, now);
        intake.got(400, now);
        intake.wait(now);
        assert_eq!(paces.load(who(), now).outstanding, 600);
        drop(intake);
        let load = paces.load(who(), Instant::now());
        assert_eq!((load.streams, load.outstanding), (0, 0));
        let state = paces.lock();
        assert_eq!(
            (state.peers[&who()].meter.waiting, state.peers[&who()].after_begin.waiting),
            (0, 0)
        );
    }

    #[test]
    fn memory_is_bounded() {
        let paces = Paces::default();
        for i in 0..5000u32 {
            let who =
                PeerKey::from(std::net::SocketAddr::from((std::net::Ipv4Addr::from_bits(i), 1)));
            drop(paces.begin(who, 1, Instant::now()));
        }
        assert!(paces.lock().peers.len() <= MAX_PEERS);
    }
}
