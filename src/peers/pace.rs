//! Measures how fast each peer sends NARs to this node, and how many bytes are outstanding.
//!
//! [`PaceMeter`] holds the arithmetic, without I/O or clock. [`Paces`] shares the meters of all
//! peers between threads. [`IncomingNar`] is the contribution of one NAR.

use super::health::PeerKey;
use crate::lock::Mutex;
use crate::time_scale::Timeout;
use std::collections::HashMap;
use std::fmt;
use std::time::{Duration, Instant};

/// Bytes per sample. A pace is unknown before one sample is complete, because the first bytes wait
/// for Wi-Fi cards in power-save mode.
pub const SAMPLE_BYTES: u64 = 256 * 1024;
/// Time after which a sample is complete with fewer than [`SAMPLE_BYTES`] bytes, counted from its first
/// bytes. A Wi-Fi card that sleeps 100 ms before each answer has sent [`SAMPLE_BYTES`] by then.
const SAMPLE_TIME: Timeout = Timeout::from_secs(2);
/// Age after which an unused pace is dropped: the peer may have moved to another network.
const PACE_TTL: Duration = Duration::from_secs(600);
/// Smallest valid pace, in bytes per second. Lower values are neither saved nor restored.
const MIN_PACE: f64 = 1.0;
/// Weight of a new sample in the smoothed pace.
const SAMPLE_WEIGHT: f64 = 0.25;
/// Largest number of measured peers. When it is reached, peers without a NAR in progress are
/// dropped.
const MAX_PEERS: usize = 1024;

/// Estimate of a pace, in bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PaceEstimate {
    /// The pace, if a sample is complete. It drops at once while nothing arrives.
    pub known: Option<f64>,
    /// Like `known`, but it drops only after a sample has waited `SAMPLE_TIME` for few bytes, so
    /// that a single stall does not lower it.
    pub lasting: Option<f64>,
    /// Pace within the current sample; zero before the first wait.
    pub measured: f64,
    /// Upper bound of the pace, from the bytes and the waiting time of the current sample.
    pub upper_bound: f64,
    /// Waiting time of the current sample.
    pub waited: Duration,
}

/// Load of a peer, as seen by this node. Input of the choice among peers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PeerLoad {
    /// Number of NARs in progress from the peer.
    pub streams: u32,
    /// Outstanding bytes of these NARs.
    pub outstanding: u64,
    /// Pace of NARs including the wait for their first bytes.
    pub pace: PaceEstimate,
    /// Pace of NARs after their first bytes.
    pub after_begin: PaceEstimate,
    /// Sequence number of the last NAR that was requested from the peer; zero if there is none.
    pub chosen: u64,
    /// True if the peer has sent a complete NAR.
    pub is_proven: bool,
}

/// Meter of bytes per waiting time.
///
/// Time during which several streams wait for the peer counts once, so the result is the pace of
/// the peer and not of one stream.
#[derive(Debug, Default)]
pub struct PaceMeter {
    /// Number of streams that wait now, and the start of the uncounted waiting time if there is
    /// one.
    waiting: u32,
    waiting_since: Option<Instant>,
    /// Bytes and waiting time of the current sample.
    bytes: u64,
    waited: Duration,
    /// Waiting time of the current sample when its first bytes came.
    waited_before_bytes: Option<Duration>,
    pace: Option<f64>,
    last_wait: Option<Instant>,
}

impl PaceMeter {
    /// A stream starts to wait.
    pub fn start_waiting(&mut self, now: Instant) {
        if self.waiting == 0 {
            self.waiting_since = Some(now);
        }
        self.waiting += 1;
    }

    /// A stream stops waiting without having received bytes.
    pub fn stop_waiting(&mut self, now: Instant) {
        if let Some(since) = self.waiting_since {
            self.waited += now.saturating_duration_since(since);
            (self.waiting_since, self.last_wait) = (Some(now), Some(now));
        }
        self.waiting = self.waiting.saturating_sub(1);
        if self.waiting == 0 {
            self.waiting_since = None;
        }
    }

    /// A stream stops waiting because `bytes` arrived. Completes the sample if it is large enough.
    pub fn record_bytes(&mut self, bytes: u64, now: Instant) {
        self.stop_waiting(now);
        if bytes == 0 {
            return;
        }
        self.bytes += bytes;
        // A single late answer says nothing about the pace: bytes must have arrived for
        // `SAMPLE_TIME`.
        let waited_before = *self.waited_before_bytes.get_or_insert(self.waited);
        if !self.waited.is_zero()
            && (self.bytes >= SAMPLE_BYTES || self.waited - waited_before >= SAMPLE_TIME.get())
        {
            let sample = self.bytes as f64 / self.waited.as_secs_f64();
            self.pace =
                Some(self.pace.map_or(sample, |pace| pace + SAMPLE_WEIGHT * (sample - pace)));
            (self.bytes, self.waited, self.waited_before_bytes) = (0, Duration::ZERO, None);
        }
    }

    /// The estimate at `now`.
    pub fn pace(&self, now: Instant) -> PaceEstimate {
        let waited = self.waited
            + self
                .waiting_since
                .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        let per_second = |bytes: u64| {
            if waited.is_zero() { f64::INFINITY } else { bytes as f64 / waited.as_secs_f64() }
        };
        let is_recent = self.waiting_since.is_some()
            || self
                .last_wait
                .is_some_and(|last_wait| now.saturating_duration_since(last_wait) < PACE_TTL);
        let upper_bound =
            if is_recent { per_second(self.bytes + SAMPLE_BYTES) } else { f64::INFINITY };
        let smoothed = self.pace.filter(|_| is_recent);
        let known = smoothed.map(|pace| pace.min(upper_bound));
        let lasting = if waited < SAMPLE_TIME.get() { smoothed } else { known };
        let measured = if waited.is_zero() { 0.0 } else { per_second(self.bytes) };
        PaceEstimate { known, lasting, measured, upper_bound, waited }
    }
}

/// Measurements of one peer.
#[derive(Debug, Default)]
struct PeerPace {
    streams: u32,
    outstanding: u64,
    chosen: u64,
    is_proven: bool,
    meter: PaceMeter,
    /// Excludes the first bytes of each NAR and the wait for them. A Wi-Fi card in power-save mode
    /// makes small NARs slow, but not large ones.
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
    /// Returns the load with one more NAR of `bytes` bytes.
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

/// Paces of all peers; shared by all threads.
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
    /// Load of a peer at `now`.
    pub fn load(&self, peer_key: PeerKey, now: Instant) -> PeerLoad {
        self.state.lock().peers.get(&peer_key).unwrap_or(&PeerPace::default()).load(now)
    }

    /// Registers a request for `bytes` of a NAR. The peer counts as waited for from `now` on.
    pub fn begin(&self, peer_key: PeerKey, bytes: u64, now: Instant) -> IncomingNar<'_> {
        let mut state = self.state.lock();
        state.turn += 1;
        if state.peers.len() >= MAX_PEERS && !state.peers.contains_key(&peer_key) {
            // Fewer than `MAX_PEERS` NARs run at once, so at least one peer is idle.
            state.peers.retain(|_, peer| peer.streams > 0);
        }
        let turn = state.turn;
        let peer = state.peers.entry(peer_key).or_default();
        peer.streams += 1;
        peer.outstanding += bytes;
        peer.chosen = turn;
        peer.meter.start_waiting(now);
        IncomingNar {
            paces: self,
            peer_key,
            remaining: bytes,
            is_waiting: true,
            has_begun: false,
            own: PaceMeter::default(),
        }
    }

    /// The peers with a known pace at `now`, in bytes per second.
    pub fn known_paces(&self, now: Instant) -> Vec<(PeerKey, f64)> {
        let state = self.state.lock();
        let pace = |peer: &PeerPace| peer.meter.pace(now).known.filter(|pace| *pace >= MIN_PACE);
        state.peers.iter().filter_map(|(peer_key, peer)| Some((*peer_key, pace(peer)?))).collect()
    }

    /// Sets a peer's pace from an earlier run, in bytes per second, until it is measured. Ignores
    /// invalid paces, and all paces once `MAX_PEERS` peers are known.
    pub fn restore(&self, peer_key: PeerKey, bytes_per_second: f64, now: Instant) {
        let mut state = self.state.lock();
        let is_pace = bytes_per_second.is_finite() && bytes_per_second >= MIN_PACE;
        if is_pace && state.peers.len() < MAX_PEERS {
            let meter = &mut state.peers.entry(peer_key).or_default().meter;
            (meter.pace, meter.last_wait) = (Some(bytes_per_second), Some(now));
        }
    }
}

/// One NAR that arrives from a peer. Dropping it removes it from the peer's load.
pub struct IncomingNar<'a> {
    paces: &'a Paces,
    peer_key: PeerKey,
    remaining: u64,
    is_waiting: bool,
    has_begun: bool,
    /// Pace of this NAR alone, after its first bytes.
    own: PaceMeter,
}

impl IncomingNar<'_> {
    /// Starts to wait for the peer. Does nothing if this NAR already waits.
    pub fn start_waiting(&mut self, now: Instant) {
        if !std::mem::replace(&mut self.is_waiting, true) {
            self.update(|peer| peer.meter.start_waiting(now));
            if self.has_begun {
                self.own.start_waiting(now);
                self.update(|peer| peer.after_begin.start_waiting(now));
            }
        }
    }

    /// Stops waiting for a reason that is not the peer's, so that the time does not count for it.
    pub fn stop_waiting(&mut self, now: Instant) {
        if std::mem::replace(&mut self.is_waiting, false) {
            self.update(|peer| peer.meter.stop_waiting(now));
            if self.has_begun {
                self.own.stop_waiting(now);
                self.update(|peer| peer.after_begin.stop_waiting(now));
            }
        }
    }

    /// Stops waiting because `bytes` arrived.
    pub fn record_bytes(&mut self, bytes: u64, now: Instant) {
        if !std::mem::replace(&mut self.is_waiting, false) {
            return;
        }
        let has_begun = std::mem::replace(&mut self.has_begun, true);
        if has_begun {
            self.own.record_bytes(bytes, now);
        }
        let bytes = bytes.min(self.remaining);
        self.remaining -= bytes;
        self.update(|peer| {
            peer.outstanding = peer.outstanding.saturating_sub(bytes);
            peer.meter.record_bytes(bytes, now);
            if has_begun {
                peer.after_begin.record_bytes(bytes, now);
            }
        });
    }

    /// Records that the NAR was complete.
    pub fn record_proven(&mut self) {
        self.update(|peer| peer.is_proven = true);
    }

    /// Load of the peer at `now`.
    pub fn load(&self, now: Instant) -> PeerLoad {
        self.paces.load(self.peer_key, now)
    }

    /// Pace of this NAR alone at `now`, after its first bytes.
    pub fn own_pace(&self, now: Instant) -> PaceEstimate {
        self.own.pace(now)
    }

    fn update(&self, change: impl FnOnce(&mut PeerPace)) {
        if let Some(peer) = self.paces.state.lock().peers.get_mut(&self.peer_key) {
            change(peer);
        }
    }
}

impl Drop for IncomingNar<'_> {
    fn drop(&mut self) {
        self.stop_waiting(Instant::now());
        self.update(|peer| {
            peer.streams = peer.streams.saturating_sub(1);
            peer.outstanding = peer.outstanding.saturating_sub(self.remaining);
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

    /// Returns a meter whose peer was waited for `waits` times and sent `bytes` each time.
    fn waited(waits: u32, each: Duration, bytes: u64) -> (PaceMeter, Instant) {
        let (mut meter, mut now) = (PaceMeter::default(), Instant::now());
        for _ in 0..waits {
            meter.start_waiting(now);
            now += each;
            meter.record_bytes(bytes, now);
            // Time in which Nix does not read does not count for the peer.
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

    fn peer_key() -> PeerKey {
        PeerKey::from(std::net::SocketAddr::from(([10, 0, 0, 1], 1)))
    }

    #[test]
    fn pace_before_256_kib_is_unknown() {
        let (meter, now) = waited(3, ms(10), 64 * KIB);
        assert_eq!(known(&meter, now), None);
        let (meter, now) = waited(4, ms(10), 64 * KIB);
        assert!(is_near(known(&meter, now).unwrap(), 256.0 * 1024.0 / 0.04));
    }

    #[test]
    fn pace_after_two_seconds_of_few_bytes_is_known() {
        let (meter, now) = waited(20, ms(100), 900);
        assert_eq!(known(&meter, now), None);
        let (meter, now) = waited(21, ms(100), 900);
        assert!(is_near(known(&meter, now).unwrap(), 9000.0));
    }

    #[test]
    fn single_late_or_missing_answer_is_no_pace() {
        let (meter, now) = waited(1, Duration::from_secs(9), 900);
        assert_eq!(known(&meter, now), None);
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        let before = known(&meter, now).unwrap();
        meter.start_waiting(now);
        meter.record_bytes(0, now + Duration::from_secs(4));
        assert!(is_near(meter.pace.unwrap(), before), "{meter:?}");
        // The time of the wait without a result still counts.
        assert!(known(&meter, now + Duration::from_secs(4)).unwrap() <= 64.0 * 1024.0);
    }

    #[test]
    fn invalid_pace_is_not_restored() {
        let (paces, now) = (Paces::default(), Instant::now());
        for wrong in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            paces.restore(peer_key(), wrong, now);
            assert_eq!(paces.load(peer_key(), now).pace.known, None, "{wrong}");
        }
        paces.restore(peer_key(), 5e6, now);
        assert_eq!(paces.known_paces(now).len(), 1);
    }

    #[test]
    fn concurrent_streams_count_waiting_time_once() {
        let (paces, now) = (Paces::default(), Instant::now());
        let mut intakes: Vec<IncomingNar> =
            (0..8).map(|_| paces.begin(peer_key(), 32 * KIB, now)).collect();
        let load = paces.load(peer_key(), now);
        assert_eq!((load.streams, load.outstanding), (8, 256 * KIB));
        for (i, intake) in (1..).zip(&mut intakes) {
            intake.record_bytes(32 * KIB, now + ms(100 * i / 8));
        }
        drop(intakes);
        let load = paces.load(peer_key(), now + ms(100));
        assert!(is_near(load.pace.known.unwrap(), 256.0 * 1024.0 / 0.1), "{load:?}");
        assert_eq!((load.streams, load.outstanding), (0, 0));
    }

    #[test]
    fn known_pace_drops_while_peer_is_silent() {
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        meter.start_waiting(now);
        let later = now + Duration::from_secs(4);
        assert!(known(&meter, now + ms(1)).unwrap() > 6e6);
        assert!(known(&meter, later).unwrap() <= 64.0 * 1024.0);
        assert_eq!(meter.pace(later).measured, 0.0);
    }

    #[test]
    fn lasting_pace_survives_one_stall() {
        let (mut meter, now) = waited(4, ms(10), 64 * KIB);
        meter.start_waiting(now);
        let pace = meter.pace(now + ms(100));
        assert!(pace.known.unwrap() < 2.7e6 && pace.lasting.unwrap() > 6e6, "{pace:?}");
        assert!(meter.pace(now + Duration::from_secs(4)).lasting.unwrap() <= 64.0 * 1024.0);
        // Time that this node spends on other work does not count for the peer.
        meter.stop_waiting(now + ms(100));
        assert_eq!(meter.pace(now + Duration::from_secs(9)).waited, ms(100));
    }

    #[test]
    fn pace_of_unused_peer_expires() {
        let (meter, now) = waited(4, ms(10), 64 * KIB);
        assert!(known(&meter, now + PACE_TTL - Duration::from_secs(2)).is_some());
        assert!(known(&meter, now + PACE_TTL).is_none());
        // An old wait without a result does not make the peer slow either.
        let (mut meter, now) = (PaceMeter::default(), Instant::now());
        meter.start_waiting(now);
        meter.record_bytes(0, now + ms(500));
        assert!(meter.pace(now + ms(500)).upper_bound < 600e3);
        assert_eq!(meter.pace(now + ms(500) + PACE_TTL).upper_bound, f64::INFINITY);
    }

    /// A card that sleeps 100 ms is not slow. A peer that drips is slow, however small its NARs
    /// are.
    #[test]
    fn pace_after_begin_ignores_sleeping_card_but_measures_dripping_peer() {
        let (paces, mut now) = (Paces::default(), Instant::now());
        for _ in 0..100 {
            let mut intake = paces.begin(peer_key(), 20 * KIB, now);
            now += ms(100);
            intake.record_bytes(20 * KIB, now);
        }
        let load = paces.load(peer_key(), now);
        assert!(load.pace.known.unwrap() < 210.0 * 1024.0);
        assert_eq!(load.after_begin.known, None);
        let mut intake = paces.begin(peer_key(), 20 * KIB, now);
        for _ in 0..22 {
            intake.start_waiting(now);
            now += ms(100);
            intake.record_bytes(900, now);
        }
        assert!(is_near(paces.load(peer_key(), now).after_begin.known.unwrap(), 9000.0));
    }

    #[test]
    fn dropped_nar_leaves_no_load() {
        let (paces, now) = (Paces::default(), Instant::now());
        let mut intake = paces.begin(peer_key(), 1000, now);
        intake.record_bytes(400, now);
        intake.start_waiting(now);
        assert_eq!(paces.load(peer_key(), now).outstanding, 600);
        drop(intake);
        let load = paces.load(peer_key(), Instant::now());
        assert_eq!((load.streams, load.outstanding), (0, 0));
        let state = paces.state.lock();
        assert_eq!(
            (state.peers[&peer_key()].meter.waiting, state.peers[&peer_key()].after_begin.waiting),
            (0, 0)
        );
    }

    #[test]
    fn peer_table_is_bounded() {
        let paces = Paces::default();
        for i in 0..5000u32 {
            let peer_key =
                PeerKey::from(std::net::SocketAddr::from((std::net::Ipv4Addr::from_bits(i), 1)));
            drop(paces.begin(peer_key, 1, Instant::now()));
        }
        assert!(paces.state.lock().peers.len() <= MAX_PEERS);
    }
}
