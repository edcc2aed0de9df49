//! Health of each peer: which peers to try first, and which to leave alone for a while. The module
//! does no I/O; the caller passes the current time.
//!
//! A neighbour is identified by its IP address, whatever ports it claims. A peer that a tracker
//! named is identified by address and port and is never the same as a neighbour, because anybody
//! can announce any address. A peer that failed is tried last for a while; one that keeps failing
//! is not tried at all. One failure does not exclude a peer, because it may be the only holder of a
//! path, and Nix remembers a wrong *not found* for an hour.

use crate::backoff;
use crate::lock::Mutex;
use crate::round_trip::RoundTrip;
use crate::stats::Network;
use crate::time_scale::Interval;
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

/// Pause after the first failure. It doubles with each further failure, up to [`MAX_PAUSE`].
const FIRST_PAUSE: Interval = Interval::from_secs(1);
/// Longest pause after a failure.
const MAX_PAUSE: Interval = Interval::from_secs(300);

/// Number of broken promises that do not count as failures. A holder may garbage-collect a path
/// between its answer and the request, and a single narinfo may be odd.
const MAX_FORGIVEN_PROMISES: u32 = 3;

/// Number of failures from which on a peer is not tried at all during its pauses. Reaching it logs
/// one warning.
const MAX_FAILURES: u32 = 3;

/// Number of odd paths within [`ODD_PATH_WINDOW`] after which a peer is asked after all others. An
/// honest peer gives them in bursts, when Nix requests a closure that is odd as a whole.
const MANY_ODD_PATHS: u32 = 8;
/// Time window in which odd paths are counted.
const ODD_PATH_WINDOW: Duration = Duration::from_secs(60);

/// Largest number of peers in the table, as many as discovery knows. When it is reached, the peers
/// that are not in a pause are dropped, and all peers if none can be dropped.
const MAX_PEERS: usize = 1024;

/// Longest stored failure reason, in characters. The rest is cut off.
const MAX_REASON_CHARS: usize = 200;

/// Identifies a peer in [`PeerHealth`].
#[derive(Debug, Clone, Copy)]
pub struct PeerKey {
    address: SocketAddr,
    is_far: bool,
}

impl PeerKey {
    /// Key of a peer that a tracker named.
    pub fn far(address: SocketAddr) -> Self {
        PeerKey { address, is_far: true }
    }

    /// Address of the peer's HTTP server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Network on which the peer was found: WAN if a tracker named it, else LAN.
    pub fn network(&self) -> Network {
        if self.is_far { Network::Wan } else { Network::Lan }
    }

    fn key(&self) -> (bool, IpAddr, u16) {
        (self.is_far, self.address.ip(), if self.is_far { self.address.port() } else { 0 })
    }
}

/// Key of a neighbour on the LAN.
impl From<SocketAddr> for PeerKey {
    fn from(address: SocketAddr) -> Self {
        PeerKey { address, is_far: false }
    }
}

impl PartialEq for PeerKey {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for PeerKey {}

impl Hash for PeerKey {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl fmt::Display for PeerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address.fmt(f)
    }
}

/// Kind of failure of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The peer cannot be reached, or hangs. Any answer clears it.
    Unreachable,
    /// The peer broke off or stalled during a NAR, or was too slow. A complete NAR clears it.
    BrokenStream,
    /// The peer sent a wrong NAR. A complete, correct NAR clears it.
    BadData,
    /// The peer said that it has a path, but then did not have it or sent an invalid narinfo. Any
    /// good narinfo clears it.
    BrokenPromise,
    /// The peer sent something that may be correct but that peerix or Nix does not support. The
    /// path is at fault: it is a miss, and the peer is not avoided.
    OddPath,
}

/// Whether and when a peer may be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eligibility {
    /// In its normal order.
    Now,
    /// Only if no other peer can help.
    Last,
    /// Not at all for now.
    Never,
}

/// Failures of one peer. Successes clear the counts that [`Failures::count`] adds up.
#[derive(Default)]
struct Failures {
    unreachable: u32,
    bad_nars: u32,
    broken_promises: u32,
    /// Time of the last failure. Forgiven promises are not in it, so that a peer cannot hide a
    /// wrong NAR behind one.
    last: Option<Instant>,
    /// Time of the last broken promise, which may be forgiven.
    last_broken_promise: Option<Instant>,
    /// Total of failed requests. Requests that ran at the same time count as one failure.
    total: u64,
    /// Reason of the last failure.
    reason: Box<str>,
}

impl Failures {
    /// Number of failures that no success has cleared, without forgiven promises.
    fn count(&self) -> u32 {
        self.unreachable
            .saturating_add(self.bad_nars)
            .saturating_add(self.broken_promises.saturating_sub(MAX_FORGIVEN_PROMISES))
    }

    /// Records that a request that began at `began` failed, and returns the number of failures.
    /// `None` if a failure since then was recorded, or this one is forgiven.
    fn record(
        &mut self,
        fault: Fault,
        began: Instant,
        now: Instant,
        reason: &dyn fmt::Display,
    ) -> Option<u32> {
        let is_promise = fault == Fault::BrokenPromise;
        let last = if is_promise { self.last.max(self.last_broken_promise) } else { self.last };
        if last.is_some_and(|last| last >= began) {
            return None;
        }
        let count = match fault {
            Fault::Unreachable => &mut self.unreachable,
            Fault::BrokenStream | Fault::BadData => &mut self.bad_nars,
            Fault::BrokenPromise => &mut self.broken_promises,
            Fault::OddPath => return None,
        };
        *count = count.saturating_add(1);
        self.total += 1;
        self.reason = reason.to_string().chars().take(MAX_REASON_CHARS).collect::<String>().into();
        if is_promise {
            self.last_broken_promise = Some(now);
        }
        let failures = self.count();
        if failures == 0 {
            return None;
        }
        self.last = Some(now);
        Some(failures)
    }
}

#[derive(Default)]
struct HealthRecord {
    failures: Failures,
    was_slow: bool,
    avoided_until: Option<Instant>,
    /// Start of the current window, and the number of odd paths in it.
    odd_paths: Option<(Instant, u32)>,
    /// Smoothed time from a narinfo request to its answer.
    latency: RoundTrip,
    /// Time of the last answer of any kind.
    answered: Option<Instant>,
}

/// Health of a peer, for the status output.
#[derive(Debug)]
pub struct HealthSnapshot {
    /// Address of the peer's HTTP server, as it was first seen.
    pub address: SocketAddr,
    /// True if a tracker named the peer.
    pub is_far: bool,
    /// Smoothed time from a narinfo request to its answer.
    pub latency: Option<Duration>,
    /// Time of the last answer of any kind.
    pub answered: Option<Instant>,
    /// Total of failed requests.
    pub faults: u64,
    /// End of the current pause, if there is one, and whether the peer is excluded even as a last
    /// resort.
    pub avoided: Option<(Instant, bool)>,
    /// Reason of the last failure. It may contain text that the peer sent.
    pub reason: String,
}

impl HealthRecord {
    fn record_odd_path(&mut self, now: Instant) {
        let (began, count) =
            self.odd_paths.filter(|(began, _)| now < *began + ODD_PATH_WINDOW).unwrap_or((now, 0));
        self.odd_paths = Some((began, count.saturating_add(1)));
    }

    fn has_many_odd_paths(&self, now: Instant) -> bool {
        self.odd_paths
            .is_some_and(|(began, count)| count >= MANY_ODD_PATHS && now < began + ODD_PATH_WINDOW)
    }

    fn record_latency(&mut self, latency: Duration, now: Instant) {
        self.answered = Some(now);
        self.latency.add(latency);
    }
}

/// Health of all peers; shared by all threads.
#[derive(Default)]
pub struct PeerHealth {
    peers: Mutex<HashMap<PeerKey, HealthRecord>>,
}

impl PeerHealth {
    /// Returns whether and when the peer may be asked at `now`.
    pub fn eligibility(&self, peer: impl Into<PeerKey>, now: Instant) -> Eligibility {
        match self.peers.lock().get(&peer.into()) {
            Some(p) if p.avoided_until.is_some_and(|end| end > now) => {
                if p.failures.count() >= MAX_FAILURES {
                    Eligibility::Never
                } else {
                    Eligibility::Last
                }
            }
            _ => Eligibility::Now,
        }
    }

    /// Returns true if the peer failed or hung recently and no later success has cleared that.
    pub fn is_doubtful(&self, peer: impl Into<PeerKey>) -> bool {
        self.peers.lock().get(&peer.into()).is_some_and(|p| p.failures.count() > 0 || p.was_slow)
    }

    /// Returns true if the peer has answered since its last failure.
    pub fn is_proven(&self, peer: impl Into<PeerKey>) -> bool {
        let peer = peer.into();
        !self.latency(peer).is_zero() && !self.is_doubtful(peer)
    }

    /// Returns true if the peer gave many odd paths lately.
    pub fn has_many_odd_paths(&self, peer: impl Into<PeerKey>, now: Instant) -> bool {
        self.peers.lock().get(&peer.into()).is_some_and(|p| p.has_many_odd_paths(now))
    }

    /// Smoothed time from a narinfo request to the peer's answer; zero if unknown.
    pub fn latency(&self, peer: impl Into<PeerKey>) -> Duration {
        self.peers.lock().get(&peer.into()).and_then(|p| p.latency.smoothed()).unwrap_or_default()
    }

    /// Health of all known peers at `now`.
    pub fn snapshots(&self, now: Instant) -> Vec<HealthSnapshot> {
        let snapshot = |(peer_key, peer): (&PeerKey, &HealthRecord)| HealthSnapshot {
            address: peer_key.address,
            is_far: peer_key.is_far,
            latency: peer.latency.smoothed(),
            answered: peer.answered,
            faults: peer.failures.total,
            avoided: peer
                .avoided_until
                .filter(|end| *end > now)
                .map(|end| (end, peer.failures.count() >= MAX_FAILURES)),
            reason: peer.failures.reason.to_string(),
        };
        self.peers.lock().iter().map(snapshot).collect()
    }

    /// Sorts peers by reliability, then by whether they are known to answer, then by latency. Peers
    /// that gave many odd paths come last.
    pub fn sort_by_health<T>(&self, peers: &mut [T], address: impl Fn(&T) -> SocketAddr) {
        let health = self.peers.lock();
        let now = Instant::now();
        peers.sort_by_cached_key(|peer| {
            let known = health.get(&address(peer).into());
            known.map_or((false, 0, false, Duration::MAX), |p| {
                (
                    p.has_many_odd_paths(now),
                    p.failures.count(),
                    p.was_slow,
                    p.latency.smoothed().unwrap_or(Duration::MAX),
                )
            })
        });
    }

    /// Records a good narinfo that arrived `latency` after its request.
    pub fn record_answer(&self, peer: impl Into<PeerKey>, latency: Duration, now: Instant) {
        let mut health = self.peers.lock();
        let peer = entry(&mut health, peer.into(), now);
        peer.failures.unreachable = 0;
        peer.failures.broken_promises = 0;
        peer.was_slow = false;
        if peer.failures.bad_nars == 0 {
            peer.avoided_until = None;
        }
        peer.record_latency(latency, now);
    }

    /// Records an answer without the path from a peer that had not promised it. The answer shows
    /// that the peer is up and how fast it is, and nothing else.
    pub fn record_miss(&self, peer: impl Into<PeerKey>, latency: Duration, now: Instant) {
        let mut health = self.peers.lock();
        let peer = entry(&mut health, peer.into(), now);
        peer.failures.unreachable = 0;
        peer.was_slow = false;
        if peer.failures.count() == 0 {
            peer.avoided_until = None;
        }
        peer.record_latency(latency, now);
    }

    /// Records that no narinfo came within `timeout`, so that another peer is tried. The second
    /// such timeout in a row counts as a failure.
    pub fn record_timeout(
        &self,
        peer: impl Into<PeerKey>,
        timeout: Duration,
        began: Instant,
        now: Instant,
    ) {
        let peer_key = peer.into();
        let twice = {
            let mut health = self.peers.lock();
            let peer = entry(&mut health, peer_key, now);
            peer.latency.raise_to(timeout);
            std::mem::replace(&mut peer.was_slow, true)
        };
        if twice {
            self.record_failure(peer_key, Fault::Unreachable, began, now, &"hangs");
        }
    }

    /// Records that the peer sent a complete, correct NAR.
    pub fn record_delivered(&self, peer: impl Into<PeerKey>, now: Instant) {
        let mut health = self.peers.lock();
        let peer = entry(&mut health, peer.into(), now);
        peer.failures.unreachable = 0;
        peer.failures.bad_nars = 0;
        peer.avoided_until = None;
    }

    /// Records that a request that began at `began` failed. Requests that ran at the same time
    /// count as one failure.
    pub fn record_failure(
        &self,
        peer_key: impl Into<PeerKey>,
        fault: Fault,
        began: Instant,
        now: Instant,
        reason: &dyn fmt::Display,
    ) {
        let peer_key = peer_key.into();
        log::debug!("peer {peer_key}: {reason}");
        let mut health = self.peers.lock();
        let peer = entry(&mut health, peer_key, now);
        if fault == Fault::OddPath {
            return peer.record_odd_path(now);
        }
        let Some(failures) = peer.failures.record(fault, began, now, reason) else { return };
        let pause = backoff::pause(FIRST_PAUSE.get(), failures - 1, MAX_PAUSE.get());
        peer.avoided_until = Some(now + pause);
        drop(health);
        if failures == MAX_FAILURES || fault == Fault::BadData && failures < MAX_FAILURES {
            log::warn!("peer {peer_key}: {reason}; avoided for {} s", pause.as_secs());
        }
    }
}

fn entry(
    peers: &mut HashMap<PeerKey, HealthRecord>,
    peer_key: PeerKey,
    now: Instant,
) -> &mut HealthRecord {
    if peers.len() >= MAX_PEERS && !peers.contains_key(&peer_key) {
        // Peers that are not in a pause lose only their measured latency.
        peers.retain(|_, p| p.avoided_until.is_some_and(|end| end > now));
        if peers.len() >= MAX_PEERS {
            peers.clear();
        }
    }
    peers.entry(peer_key).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    #[test]
    fn pause_after_failures_grows_from_one_second_to_five_minutes() {
        let (health, mut now) = (PeerHealth::default(), Instant::now());
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            health.record_failure(address(1), Fault::BadData, now, now, &"test");
            let last_moment = now + Duration::from_secs(expected) - Duration::from_millis(1);
            assert_ne!(health.eligibility(address(1), last_moment), Eligibility::Now);
            now += Duration::from_secs(expected);
            assert_eq!(health.eligibility(address(1), now), Eligibility::Now);
            now += Duration::from_millis(1);
        }
        // A narinfo does not clear a NAR failure; a complete NAR does.
        health.record_failure(address(1), Fault::BrokenStream, now, now, &"test");
        health.record_answer(address(1), Duration::from_millis(1), now);
        assert_eq!(health.eligibility(address(1), now), Eligibility::Never);
        health.record_delivered(address(1), now);
        assert_eq!(health.eligibility(address(1), now), Eligibility::Now);
    }

    /// Guards against losing every path of an only holder after one broken stream.
    #[test]
    fn peer_is_last_resort_after_one_failure_and_excluded_after_three() {
        let (health, mut now) = (PeerHealth::default(), Instant::now());
        for expected in [Eligibility::Last, Eligibility::Last, Eligibility::Never] {
            now += Duration::from_millis(1);
            health.record_failure(address(1), Fault::BrokenStream, now, now, &"test");
            assert_eq!(health.eligibility(address(1), now), expected);
        }
    }

    #[test]
    fn concurrent_failures_count_once() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        let failed = now + Duration::from_millis(300);
        for _ in 0..25 {
            health.record_failure(address(1), Fault::Unreachable, now, failed, &"test");
        }
        assert_eq!(health.eligibility(address(1), failed), Eligibility::Last);
        assert_eq!(health.eligibility(address(1), failed + FIRST_PAUSE.get()), Eligibility::Now);
    }

    /// Guards against one collection of garbage that uses up all that is forgiven.
    #[test]
    fn concurrent_broken_promises_count_once() {
        let (health, mut now) = (PeerHealth::default(), Instant::now());
        for burst in 0..=MAX_FORGIVEN_PROMISES {
            assert_eq!(health.eligibility(address(1), now), Eligibility::Now, "{burst}");
            for _ in 0..25 {
                let failed = now + Duration::from_millis(300);
                health.record_failure(address(1), Fault::BrokenPromise, now, failed, &"test");
            }
            now += Duration::from_millis(301);
        }
        assert_eq!(health.eligibility(address(1), now), Eligibility::Last);
    }

    /// Guards against a liar that 25 lookups ask at all times: each broken promise overlapped the
    /// one before, and none but the first was counted.
    #[test]
    fn steady_broken_promises_of_overlapping_requests_are_counted() {
        let (health, start) = (PeerHealth::default(), Instant::now());
        for i in 0..25 {
            let began = start + Duration::from_millis(100 * i);
            let failed = began + Duration::from_millis(300);
            health.record_failure(address(1), Fault::BrokenPromise, began, failed, &"test");
        }
        let end = start + Duration::from_millis(2700);
        assert_ne!(health.eligibility(address(1), end), Eligibility::Now);
    }

    #[test]
    fn forgiven_promise_does_not_hide_wrong_nar() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        let later = now + Duration::from_millis(1);
        health.record_failure(address(1), Fault::BrokenPromise, now, later, &"test");
        health.record_failure(address(1), Fault::BadData, now, later, &"test");
        assert_eq!(health.eligibility(address(1), later), Eligibility::Last);
    }

    /// Guards against losing every path of an only holder because peerix could not read one of
    /// them.
    #[test]
    fn odd_paths_are_no_failure_but_many_sort_peer_last() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        health.record_answer(address(1), Duration::from_micros(1), now);
        health.record_answer(address(2), Duration::from_millis(9), now);
        let order = || {
            let mut peers = [address(1), address(2)];
            health.sort_by_health(&mut peers, |peer| *peer);
            peers
        };
        for count in 1..=100 {
            health.record_failure(address(1), Fault::OddPath, now, now, &"test");
            assert_eq!(health.eligibility(address(1), now), Eligibility::Now);
            assert!(!health.is_doubtful(address(1)));
            let is_last = count >= MANY_ODD_PATHS;
            assert_eq!(
                order(),
                if is_last { [address(2), address(1)] } else { [address(1), address(2)] }
            );
        }
        assert!(!health.peers.lock()[&address(1).into()].has_many_odd_paths(now + ODD_PATH_WINDOW));
    }

    /// Guards against trying a hanging peer first for every path because its unknown latency counts
    /// as zero.
    #[test]
    fn peers_are_sorted_by_reliability_then_latency() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        health.record_answer(address(1), Duration::from_millis(9), now);
        health.record_answer(address(2), Duration::from_millis(1), now);
        health.record_answer(address(3), Duration::from_micros(1), now);
        health.record_failure(address(3), Fault::BadData, now, now, &"test");
        health.record_timeout(address(4), Duration::from_millis(300), now, now);
        let mut peers = [address(3), address(4), address(5), address(1), address(2)];
        health.sort_by_health(&mut peers, |p| *p);
        assert_eq!(peers, [address(2), address(1), address(5), address(4), address(3)]);
        assert!(health.is_doubtful(address(4)));
        let later = now + Duration::from_secs(1);
        health.record_timeout(address(4), Duration::from_millis(300), later, later);
        assert_eq!(health.eligibility(address(4), later), Eligibility::Last);
    }

    /// Guards against an announcement that makes all nodes avoid a neighbour: it names the
    /// neighbour's address with a closed port.
    #[test]
    fn failure_of_tracker_peer_does_not_affect_neighbour_or_other_port() {
        let (health, mut now) = (PeerHealth::default(), Instant::now());
        for _ in 0..MAX_FAILURES {
            now += Duration::from_millis(1);
            health.record_failure(PeerKey::far(address(1)), Fault::Unreachable, now, now, &"test");
        }
        assert_eq!(health.eligibility(PeerKey::far(address(1)), now), Eligibility::Never);
        assert_eq!(health.eligibility(address(1), now), Eligibility::Now);
        assert_eq!(
            health.eligibility(PeerKey::far(SocketAddr::new(address(1).ip(), 999)), now),
            Eligibility::Now
        );
    }

    #[test]
    fn neighbour_with_another_port_is_same_peer() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        health.record_failure(address(1), Fault::BadData, now, now, &"test");
        let other_port = SocketAddr::new(address(1).ip(), 999);
        assert_eq!(health.eligibility(other_port, now), Eligibility::Last);
    }

    #[test]
    fn peer_table_is_bounded() {
        let (health, now) = (PeerHealth::default(), Instant::now());
        for i in 0..5000u32 {
            let peer = SocketAddr::from((std::net::Ipv4Addr::from_bits(i), 1));
            health.record_failure(peer, Fault::BadData, now, now, &"test");
        }
        assert!(health.peers.lock().len() <= MAX_PEERS);
    }
}
