//! How well each peer serves: whom to try first, and whom to leave alone for a while. No I/O; time
//! is passed in.
//!
//! A neighbour is an address, whatever ports it claims; a peer that a tracker named is an address
//! and a port, and never the same as a neighbour, as anybody can announce any address. One that
//! failed is tried last for a while, and one that keeps failing not at all: the only holder of a
//! path must not be lost to one broken connection, as Nix remembers a wrong *not there* for an
//! hour.

use crate::stats::Network;
use crate::time_scale::Interval;
use std::collections::HashMap;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The first pause after a failure; it doubles with each further one.
const FIRST_PAUSE: Interval = Interval::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Interval = Interval::from_secs(300);

/// A path can be collected between *have* and the request, and one narinfo can be odd, so that a
/// few broken promises are no failure.
const PROMISES_FORGIVEN: u32 = 3;

/// After so many failures a peer is not tried at all in its pauses, and the log has its one
/// warning.
const HOPELESS: u32 = 3;

/// A peer that gave this many odd paths within [`ODD_WINDOW`] is asked after all others. An honest
/// one has them in bursts, when Nix asks for a closure that is odd as a whole.
const MANY_ODD: u32 = 8;
/// Time in which odd paths are counted.
const ODD_WINDOW: Duration = Duration::from_secs(60);

/// Peers remembered at once; as many as discovery knows.
const MAX_PEERS: usize = 1024;

/// As much of a reason as people read, in characters.
const MAX_REASON: usize = 200;

/// A peer, as far as its standing goes.
#[derive(Debug, Clone, Copy)]
pub struct PeerKey {
    address: SocketAddr,
    is_far: bool,
}

impl PeerKey {
    /// One that a tracker named.
    pub fn far(address: SocketAddr) -> Self {
        PeerKey { address, is_far: true }
    }

    /// Its HTTP server.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it is.
    pub fn network(&self) -> Network {
        if self.is_far { Network::Wan } else { Network::Lan }
    }

    fn key(&self) -> (bool, IpAddr, u16) {
        (self.is_far, self.address.ip(), if self.is_far { self.address.port() } else { 0 })
    }
}

/// A neighbour.
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

/// What went wrong with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It cannot be reached, or hangs. Any answer makes up for it.
    Unreachable,
    /// It broke off or hung amid a NAR, or was too slow. A whole NAR makes up for it.
    BrokenStream,
    /// It sent a wrong NAR. A whole one makes up for it.
    BadData,
    /// It said *have*, and then has not, or has a narinfo that is none. Any good narinfo makes up
    /// for it.
    BrokenPromise,
    /// It gave what may be true, but is beyond what peerix or Nix handles. That is the path's
    /// fault: it is a miss, and the peer is not avoided.
    OddPath,
}

/// Whether to ask a peer at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eligibility {
    /// As the order has it.
    Now,
    /// Only if nobody else can help.
    Last,
    /// Not now.
    Never,
}

#[derive(Default)]
struct HealthRecord {
    unreachable: u32,
    bad_nars: u32,
    broken_promises: u32,
    was_slow: bool,
    avoided_until: Option<Instant>,
    last_fault: Option<Instant>,
    /// Odd paths since this window began.
    odd: Option<(Instant, u32)>,
    /// Smoothed time to a narinfo.
    latency: Option<Duration>,
    /// When it last answered anything.
    answered: Option<Instant>,
    /// Requests that failed, in all; those that were under way together are one.
    faults: u64,
    /// Why the last one did.
    reason: Box<str>,
}

/// A peer's standing, for people.
#[derive(Debug)]
pub struct HealthSnapshot {
    /// Its HTTP server, as it was first met.
    pub address: SocketAddr,
    /// Whether a tracker named it.
    pub is_far: bool,
    /// Smoothed time to a narinfo.
    pub latency: Option<Duration>,
    /// When it last answered anything.
    pub answered: Option<Instant>,
    /// Requests that failed.
    pub faults: u64,
    /// Until when it is avoided, if it is; and whether it is not even the last resort.
    pub avoided: Option<(Instant, bool)>,
    /// What went wrong last; what the peer sent may be in it.
    pub reason: String,
}

impl HealthRecord {
    fn failures(&self) -> u32 {
        self.unreachable
            .saturating_add(self.bad_nars)
            .saturating_add(self.broken_promises.saturating_sub(PROMISES_FORGIVEN))
    }

    fn note_odd_path(&mut self, now: Instant) {
        let (began, count) =
            self.odd.filter(|(began, _)| now < *began + ODD_WINDOW).unwrap_or((now, 0));
        self.odd = Some((began, count.saturating_add(1)));
    }

    fn has_many_odd_paths(&self, now: Instant) -> bool {
        self.odd.is_some_and(|(began, count)| count >= MANY_ODD && now < began + ODD_WINDOW)
    }

    fn see(&mut self, latency: Duration, now: Instant) {
        self.answered = Some(now);
        self.latency = Some(self.latency.map_or(latency, |old| (old * 7 + latency) / 8));
    }
}

/// The standing of every peer; shared by all threads.
#[derive(Default)]
pub struct PeerHealth {
    peers: Mutex<HashMap<PeerKey, HealthRecord>>,
}

impl PeerHealth {
    /// When the peer's turn is, at `now`.
    pub fn turn(&self, peer: impl Into<PeerKey>, now: Instant) -> Eligibility {
        match self.lock().get(&peer.into()) {
            Some(p) if p.avoided_until.is_some_and(|until| until > now) => {
                if p.failures() >= HOPELESS { Eligibility::Never } else { Eligibility::Last }
            }
            _ => Eligibility::Now,
        }
    }

    /// Whether it failed or hung lately and has not made up for it.
    pub fn is_doubtful(&self, peer: impl Into<PeerKey>) -> bool {
        self.lock().get(&peer.into()).is_some_and(|p| p.failures() > 0 || p.was_slow)
    }

    /// The smoothed time to the peer's narinfos, zero if unknown.
    pub fn latency(&self, peer: impl Into<PeerKey>) -> Duration {
        self.lock().get(&peer.into()).and_then(|p| p.latency).unwrap_or_default()
    }

    /// All of them at `now`.
    pub fn all(&self, now: Instant) -> Vec<HealthSnapshot> {
        let seen = |(who, peer): (&PeerKey, &HealthRecord)| HealthSnapshot {
            address: who.address,
            is_far: who.is_far,
            latency: peer.latency,
            answered: peer.answered,
            faults: peer.faults,
            avoided: peer
                .avoided_until
                .filter(|until| *until > now)
                .map(|until| (until, peer.failures() >= HOPELESS)),
            reason: peer.reason.to_string(),
        };
        self.lock().iter().map(seen).collect()
    }

    /// Sorts the most reliable first, then those that are known to answer, then the fastest. Peers
    /// that gave many odd paths come last.
    pub fn sort<T>(&self, peers: &mut [T], address: impl Fn(&T) -> SocketAddr) {
        let standing = self.lock();
        let now = Instant::now();
        peers.sort_by_cached_key(|peer| {
            let known = standing.get(&address(peer).into());
            known.map_or((false, 0, false, Duration::MAX), |p| {
                (
                    p.has_many_odd_paths(now),
                    p.failures(),
                    p.was_slow,
                    p.latency.unwrap_or(Duration::MAX),
                )
            })
        });
    }

    /// A good narinfo came, `latency` after it was asked for.
    pub fn answered(&self, peer: impl Into<PeerKey>, latency: Duration, now: Instant) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, peer.into(), now);
        peer.unreachable = 0;
        peer.broken_promises = 0;
        peer.was_slow = false;
        if peer.bad_nars == 0 {
            peer.avoided_until = None;
        }
        peer.see(latency, now);
    }

    /// It answered that it has no such path, which it had not promised: that tells only how fast it
    /// is.
    pub fn alive(&self, peer: impl Into<PeerKey>, latency: Duration, now: Instant) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, peer.into(), now);
        peer.unreachable = 0;
        peer.was_slow = false;
        if peer.failures() == 0 {
            peer.avoided_until = None;
        }
        peer.see(latency, now);
    }

    /// No narinfo came within `patience`, and another peer is tried. The second time in a row it is
    /// a failure.
    pub fn hung(&self, peer: impl Into<PeerKey>, patience: Duration, began: Instant, now: Instant) {
        let who = peer.into();
        let twice = {
            let mut standing = self.lock();
            let peer = entry(&mut standing, who, now);
            peer.latency = Some(peer.latency.map_or(patience, |old| old.max(patience)));
            std::mem::replace(&mut peer.was_slow, true)
        };
        if twice {
            self.failed(who, Fault::Unreachable, began, now, &"hangs");
        }
    }

    /// A whole NAR came, and it was right.
    pub fn delivered(&self, peer: impl Into<PeerKey>, now: Instant) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, peer.into(), now);
        peer.unreachable = 0;
        peer.bad_nars = 0;
        peer.avoided_until = None;
    }

    /// A request that began at `began` failed. Requests that were under way together count as one
    /// failure.
    pub fn failed(
        &self,
        who: impl Into<PeerKey>,
        fault: Fault,
        began: Instant,
        now: Instant,
        reason: &dyn std::fmt::Display,
    ) {
        let who = who.into();
        let mut standing = self.lock();
        let peer = entry(&mut standing, who, now);
        log::debug!("peer {who}: {reason}");
        let count = match fault {
            Fault::Unreachable => &mut peer.unreachable,
            Fault::BrokenStream | Fault::BadData => &mut peer.bad_nars,
            Fault::BrokenPromise => &mut peer.broken_promises,
            Fault::OddPath => return peer.note_odd_path(now),
        };
        if peer.last_fault.is_some_and(|last| last >= began) {
            return;
        }
        peer.faults += 1;
        peer.reason = reason.to_string().chars().take(MAX_REASON).collect::<String>().into();
        *count = count.saturating_add(1);
        let failures = peer.failures();
        if failures == 0 {
            return;
        }
        peer.last_fault = Some(now);
        let pause =
            FIRST_PAUSE.get().saturating_mul(1 << (failures - 1).min(20)).min(LONGEST_PAUSE.get());
        peer.avoided_until = Some(now + pause);
        if failures == HOPELESS || fault == Fault::BadData && failures < HOPELESS {
            log::warn!("peer {who}: {reason}; avoided for {} s", pause.as_secs());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerKey, HealthRecord>> {
        self.peers.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn entry(
    standing: &mut HashMap<PeerKey, HealthRecord>,
    who: PeerKey,
    now: Instant,
) -> &mut HealthRecord {
    if standing.len() >= MAX_PEERS && !standing.contains_key(&who) {
        // Those who are not avoided have nothing to lose but a latency.
        standing.retain(|_, p| p.avoided_until.is_some_and(|until| until > now));
        if standing.len() >= MAX_PEERS {
            standing.clear();
        }
    }
    standing.entry(who).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    #[test]
    fn pauses_grow_from_one_second_to_five_minutes() {
        let (standing, mut now) = (PeerHealth::default(), Instant::now());
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            standing.failed(address(1), Fault::BadData, now, now, &"test");
            let last_moment = now + Duration::from_secs(expected) - Duration::from_millis(1);
            assert_ne!(standing.turn(address(1), last_moment), Eligibility::Now);
            now += Duration::from_secs(expected);
            assert_eq!(standing.turn(address(1), now), Eligibility::Now);
            now += Duration::from_millis(1);
        }
        // A narinfo is no proof of better NARs; a whole NAR is.
        standing.failed(address(1), Fault::BrokenStream, now, now, &"test");
        standing.answered(address(1), Duration::from_millis(1), now);
        assert_eq!(standing.turn(address(1), now), Eligibility::Never);
        standing.delivered(address(1), now);
        assert_eq!(standing.turn(address(1), now), Eligibility::Now);
    }

    /// One broken stream used to make all that its only holder has "not there".
    #[test]
    fn after_one_failure_a_peer_is_the_last_resort_and_only_after_three_none() {
        let (standing, mut now) = (PeerHealth::default(), Instant::now());
        for expected in [Eligibility::Last, Eligibility::Last, Eligibility::Never] {
            now += Duration::from_millis(1);
            standing.failed(address(1), Fault::BrokenStream, now, now, &"test");
            assert_eq!(standing.turn(address(1), now), expected);
        }
    }

    #[test]
    fn twenty_five_requests_that_fail_together_are_one_failure() {
        let (standing, now) = (PeerHealth::default(), Instant::now());
        let failed = now + Duration::from_millis(300);
        for _ in 0..25 {
            standing.failed(address(1), Fault::Unreachable, now, failed, &"test");
        }
        assert_eq!(standing.turn(address(1), failed), Eligibility::Last);
        assert_eq!(standing.turn(address(1), failed + FIRST_PAUSE.get()), Eligibility::Now);
    }

    #[test]
    fn a_few_broken_promises_are_forgiven() {
        let (standing, mut now) = (PeerHealth::default(), Instant::now());
        for i in 0..=PROMISES_FORGIVEN {
            assert_eq!(standing.turn(address(1), now), Eligibility::Now, "{i}");
            now += Duration::from_millis(1);
            standing.failed(address(1), Fault::BrokenPromise, now, now, &"test");
        }
        assert_eq!(standing.turn(address(1), now), Eligibility::Last);
    }

    /// One path that peerix could not read used to hide everything else that its only holder has.
    #[test]
    fn odd_paths_are_no_failures_and_many_make_a_peer_the_last() {
        let (standing, now) = (PeerHealth::default(), Instant::now());
        standing.answered(address(1), Duration::from_micros(1), now);
        standing.answered(address(2), Duration::from_millis(9), now);
        let order = || {
            let mut peers = [address(1), address(2)];
            standing.sort(&mut peers, |peer| *peer);
            peers
        };
        for count in 1..=100 {
            standing.failed(address(1), Fault::OddPath, now, now, &"test");
            assert_eq!(standing.turn(address(1), now), Eligibility::Now);
            assert!(!standing.is_doubtful(address(1)));
            let is_last = count >= MANY_ODD;
            assert_eq!(
                order(),
                if is_last { [address(2), address(1)] } else { [address(1), address(2)] }
            );
        }
        assert!(!standing.lock()[&address(1).into()].has_many_odd_paths(now + ODD_WINDOW));
    }

    /// A peer whose HTTP hangs used to be tried first for every path, as its unknown latency
    /// counted as none.
    #[test]
    fn reliable_first_then_proven_then_fast() {
        let (standing, now) = (PeerHealth::default(), Instant::now());
        standing.answered(address(1), Duration::from_millis(9), now);
        standing.answered(address(2), Duration::from_millis(1), now);
        standing.answered(address(3), Duration::from_micros(1), now);
        standing.failed(address(3), Fault::BadData, now, now, &"test");
        standing.hung(address(4), Duration::from_millis(300), now, now);
        let mut peers = [address(3), address(4), address(5), address(1), address(2)];
        standing.sort(&mut peers, |p| *p);
        assert_eq!(peers, [address(2), address(1), address(5), address(4), address(3)]);
        assert!(standing.is_doubtful(address(4)));
        let later = now + Duration::from_secs(1);
        standing.hung(address(4), Duration::from_millis(300), later, later);
        assert_eq!(standing.turn(address(4), later), Eligibility::Last);
    }

    /// Who announced a neighbour's address at a tracker, with a port where nobody is, used to have
    /// it avoided by all.
    #[test]
    fn what_a_tracker_names_does_not_speak_for_a_neighbour_or_another_port() {
        let (standing, mut now) = (PeerHealth::default(), Instant::now());
        for _ in 0..HOPELESS {
            now += Duration::from_millis(1);
            standing.failed(PeerKey::far(address(1)), Fault::Unreachable, now, now, &"test");
        }
        assert_eq!(standing.turn(PeerKey::far(address(1)), now), Eligibility::Never);
        assert_eq!(standing.turn(address(1), now), Eligibility::Now);
        assert_eq!(
            standing.turn(PeerKey::far(SocketAddr::new(address(1).ip(), 999)), now),
            Eligibility::Now
        );
    }

    #[test]
    fn another_port_is_no_other_peer() {
        let (standing, now) = (PeerHealth::default(), Instant::now());
        standing.failed(address(1), Fault::BadData, now, now, &"test");
        let other_port = SocketAddr::new(address(1).ip(), 999);
        assert_eq!(standing.turn(other_port, now), Eligibility::Last);
    }

    #[test]
    fn memory_is_bounded() {
        let (standing, now) = (PeerHealth::default(), Instant::now());
        for i in 0..5000u32 {
            let peer = SocketAddr::from((std::net::Ipv4Addr::from_bits(i), 1));
            standing.failed(peer, Fault::BadData, now, now, &"test");
        }
        assert!(standing.lock().len() <= MAX_PEERS);
    }
}
