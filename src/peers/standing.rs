//! How well each peer serves: whom to try first, and whom to leave alone for a while. No I/O; time is passed in.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// The first pause after a failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// A path can be collected between *have* and the request, so that a few broken promises are no failure.
const PROMISES_FORGIVEN: u32 = 3;

/// Failures in a row at which the log has its one warning of a peer.
const WARN_AT: u32 = 3;

/// Peers remembered at once; as many as discovery knows.
const MAX_PEERS: usize = 1024;

/// What went wrong with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It cannot be reached, hangs, or breaks off.
    Unreachable,
    /// It sent what it must not send: a malformed narinfo, a wrong NAR.
    BadData,
    /// It said *have* and then has not.
    BrokenPromise,
}

#[derive(Default)]
struct Peer {
    unreachable: u32,
    bad_data: u32,
    broken_promises: u32,
    avoided_until: Option<Instant>,
    last_fault: Option<Instant>,
    /// Smoothed time to the first byte of an answer.
    latency: Duration,
}

/// The standing of every peer by the address of its HTTP server; shared by all threads.
#[derive(Default)]
pub struct Standing {
    peers: Mutex<HashMap<SocketAddr, Peer>>,
}

impl Standing {
    /// Whether the peer is to be left alone at `now`.
    pub fn is_avoided(&self, peer: SocketAddr, now: Instant) -> bool {
        self.lock().get(&peer).and_then(|p| p.avoided_until).is_some_and(|until| until > now)
    }

    /// Whether it failed lately and has not made up for it.
    pub fn is_doubtful(&self, peer: SocketAddr) -> bool {
        self.lock().get(&peer).is_some_and(|p| p.bad_data + p.unreachable > 0)
    }

    /// The smoothed time to the first byte of the peer's answers, zero if unknown.
    pub fn latency(&self, peer: SocketAddr) -> Duration {
        self.lock().get(&peer).map_or(Duration::ZERO, |p| p.latency)
    }

    /// Sorts the most reliable first, and of those the fastest.
    pub fn sort<T>(&self, peers: &mut [T], address: impl Fn(&T) -> SocketAddr) {
        let standing = self.lock();
        peers.sort_by_cached_key(|peer| {
            standing.get(&address(peer)).map_or((0, Duration::ZERO), |p| (p.bad_data + p.unreachable, p.latency))
        });
    }

    /// A narinfo came, `latency` after it was asked for.
    pub fn answered(&self, peer: SocketAddr, latency: Duration, now: Instant) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, peer, now);
        peer.unreachable = 0;
        peer.broken_promises = 0;
        peer.latency = if peer.latency.is_zero() { latency } else { (peer.latency * 7 + latency) / 8 };
    }

    /// A whole NAR came, and it was right.
    pub fn delivered(&self, peer: SocketAddr, now: Instant) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, peer, now);
        peer.unreachable = 0;
        peer.bad_data = 0;
        peer.avoided_until = None;
    }

    /// A request that began at `began` failed. Requests that were under way together count as one failure.
    pub fn failed(
        &self,
        address: SocketAddr,
        fault: Fault,
        began: Instant,
        now: Instant,
        reason: &dyn std::fmt::Display,
    ) {
        let mut standing = self.lock();
        let peer = entry(&mut standing, address, now);
        log::debug!("peer {address}: {reason}");
        if peer.last_fault.is_some_and(|last| last >= began) {
            return;
        }
        match fault {
            Fault::Unreachable => peer.unreachable = peer.unreachable.saturating_add(1),
            Fault::BadData => peer.bad_data = peer.bad_data.saturating_add(1),
            Fault::BrokenPromise => peer.broken_promises = peer.broken_promises.saturating_add(1),
        }
        let failures =
            peer.unreachable.saturating_add(peer.bad_data) + peer.broken_promises.saturating_sub(PROMISES_FORGIVEN);
        if failures == 0 {
            return;
        }
        peer.last_fault = Some(now);
        let pause = FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(20)).min(LONGEST_PAUSE);
        peer.avoided_until = Some(now + pause);
        if failures == WARN_AT || fault == Fault::BadData && failures < WARN_AT {
            log::warn!("peer {address}: {reason}; avoided for {} s", pause.as_secs());
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<SocketAddr, Peer>> {
        self.peers.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn entry(standing: &mut HashMap<SocketAddr, Peer>, address: SocketAddr, now: Instant) -> &mut Peer {
    if standing.len() >= MAX_PEERS && !standing.contains_key(&address) {
        // Those who are not avoided have nothing to lose but a latency.
        standing.retain(|_, p| p.avoided_until.is_some_and(|until| until > now));
        if standing.len() >= MAX_PEERS {
            standing.clear();
        }
    }
    standing.entry(address).or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    #[test]
    fn pauses_grow_from_one_second_to_five_minutes() {
        let (standing, mut now) = (Standing::default(), Instant::now());
        for expected in [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            standing.failed(address(1), Fault::BadData, now, now, &"test");
            assert!(standing.is_avoided(address(1), now + Duration::from_secs(expected) - Duration::from_millis(1)));
            now += Duration::from_secs(expected);
            assert!(!standing.is_avoided(address(1), now));
            now += Duration::from_millis(1);
        }
        // A narinfo is no proof of better data; a whole NAR is.
        standing.failed(address(1), Fault::BadData, now, now, &"test");
        standing.answered(address(1), Duration::from_millis(1), now);
        assert!(standing.is_avoided(address(1), now));
        standing.delivered(address(1), now);
        assert!(!standing.is_avoided(address(1), now));
    }

    #[test]
    fn twenty_five_requests_that_fail_together_are_one_failure() {
        let (standing, now) = (Standing::default(), Instant::now());
        let failed = now + Duration::from_millis(300);
        for _ in 0..25 {
            standing.failed(address(1), Fault::Unreachable, now, failed, &"test");
        }
        assert!(standing.is_avoided(address(1), failed));
        assert!(!standing.is_avoided(address(1), failed + FIRST_PAUSE));
    }

    #[test]
    fn a_few_broken_promises_are_forgiven() {
        let (standing, mut now) = (Standing::default(), Instant::now());
        for i in 0..=PROMISES_FORGIVEN {
            assert!(!standing.is_avoided(address(1), now), "{i}");
            now += Duration::from_millis(1);
            standing.failed(address(1), Fault::BrokenPromise, now, now, &"test");
        }
        assert!(standing.is_avoided(address(1), now));
    }

    #[test]
    fn reliable_first_then_fast() {
        let (standing, now) = (Standing::default(), Instant::now());
        standing.answered(address(1), Duration::from_millis(9), now);
        standing.answered(address(2), Duration::from_millis(1), now);
        standing.answered(address(3), Duration::from_micros(1), now);
        standing.failed(address(3), Fault::BadData, now, now, &"test");
        let mut peers = [address(3), address(1), address(2)];
        standing.sort(&mut peers, |p| *p);
        assert_eq!(peers, [address(2), address(1), address(3)]);
    }

    #[test]
    fn memory_is_bounded() {
        let (standing, now) = (Standing::default(), Instant::now());
        for i in 0..5000u32 {
            let peer = SocketAddr::from((std::net::Ipv4Addr::from_bits(i), 1));
            standing.failed(peer, Fault::BadData, now, now, &"test");
        }
        assert!(standing.lock().len() <= MAX_PEERS);
    }
}
