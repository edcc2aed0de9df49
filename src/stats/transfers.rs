//! NARs under way, in either direction.

use super::counters::Counter;
use super::traffic::{PeerTraffic, TrafficKey};
use super::{Network, Stats};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

/// Which way a NAR goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a peer to this machine's Nix.
    In,
    /// From the own store to a peer.
    Out,
}

/// A NAR under way, as others see it.
pub struct RunningTransfer {
    /// A number of its own, the later the higher.
    pub id: u64,
    /// Which way it goes.
    pub direction: Direction,
    /// The store path's base name.
    pub name: String,
    /// How many bytes are to pass.
    pub size: u64,
    /// When it began.
    pub at: SystemTime,
    /// The same.
    pub began: Instant,
    bytes: AtomicU64,
    peer: Mutex<Option<(Network, SocketAddr)>>,
    why: Mutex<Option<String>>,
}

impl RunningTransfer {
    /// Bytes that have passed.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// With whom; `None` while that is sought.
    pub fn peer(&self) -> Option<(Network, SocketAddr)> {
        *self.peer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why that peer was chosen, if there was a choice.
    pub fn why(&self) -> Option<String> {
        self.why.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A NAR under way, for who moves it. When it is dropped it is over.
pub struct TransferGuard<'a> {
    record: &'a Stats,
    running: Option<Arc<RunningTransfer>>,
    peer: Option<(Network, Arc<PeerTraffic>)>,
}

impl<'a> TransferGuard<'a> {
    /// One that nobody sees.
    pub(super) fn none(record: &'a Stats) -> Self {
        TransferGuard { record, running: None, peer: None }
    }

    pub(super) fn begin(
        record: &'a Stats,
        id: u64,
        direction: Direction,
        name: String,
        size: u64,
    ) -> Self {
        let running = RunningTransfer {
            id,
            direction,
            name,
            size,
            at: SystemTime::now(),
            began: Instant::now(),
            bytes: AtomicU64::new(0),
            peer: Mutex::default(),
            why: Mutex::default(),
        };
        TransferGuard { record, running: Some(Arc::new(running)), peer: None }
    }

    pub(super) fn running(&self) -> Option<&Arc<RunningTransfer>> {
        self.running.as_ref()
    }

    /// From now on it is with this peer.
    pub fn with(&mut self, network: Network, peer: SocketAddr) {
        let Some(running) = &self.running else { return };
        *running.peer.lock().unwrap_or_else(PoisonError::into_inner) = Some((network, peer));
        let who = match running.direction {
            Direction::In => TrafficKey::server(network, peer),
            Direction::Out => TrafficKey::asker(network, peer.ip()),
        };
        self.peer = Some((network, self.record.counts(who)));
    }

    /// Why the peer was chosen, for people.
    pub fn explain(&self, why: &str) {
        let Some(running) = &self.running else { return };
        *running.why.lock().unwrap_or_else(PoisonError::into_inner) = Some(why.to_owned());
    }

    /// So many more bytes came from, or went to, the peer.
    pub fn moved(&self, bytes: u64) {
        let (Some(running), Some((network, counts))) = (&self.running, &self.peer) else { return };
        let (count, of_peer) = match (running.direction, network) {
            (Direction::In, Network::Lan) => (Counter::ReceivedLan, &counts.received),
            (Direction::In, Network::Wan) => (Counter::ReceivedWan, &counts.received),
            (Direction::Out, Network::Lan) => (Counter::SentLan, &counts.sent),
            (Direction::Out, Network::Wan) => (Counter::SentWan, &counts.sent),
        };
        self.record.add(count, bytes);
        of_peer.fetch_add(bytes, Ordering::Relaxed);
        // At once, for a peer may be forgotten while this goes on.
        if !counts.has_series() {
            self.record.others[running.direction as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// So many bytes have passed; fewer than before if it begins anew.
    pub fn progress(&self, bytes: u64) {
        self.running.iter().for_each(|running| running.bytes.store(bytes, Ordering::Relaxed));
    }

    /// All of it has passed.
    pub fn record_whole(&self) {
        let Some(running) = &self.running else { return };
        match running.direction {
            Direction::In => self.record.add(Counter::ReceivedNars, 1),
            Direction::Out => self.record.add(Counter::SentNars, 1),
        }
    }

    /// No peer could deliver it.
    pub fn record_failure(&self) {
        if self.running.is_some() {
            self.record.add(Counter::FailedNars, 1);
        }
    }
}

impl Drop for TransferGuard<'_> {
    fn drop(&mut self) {
        self.running.iter().for_each(|running| self.record.ended(running.id));
    }
}
