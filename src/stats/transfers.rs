//! Running transfers of NARs in both directions.

use super::counters::{Counter, Histogram};
use super::traffic::{PeerTraffic, TrafficKey};
use super::{Network, Stats};
use crate::lock::Mutex;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime};

/// Direction of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From a peer to this machine's Nix.
    In,
    /// From this machine's store to a peer.
    Out,
}

/// State of a transfer for readers.
pub struct RunningTransfer {
    /// Unique number; later transfers have higher ones.
    pub id: u64,
    /// Direction of the transfer.
    pub direction: Direction,
    /// Base name of the store path.
    pub name: String,
    /// Number of bytes to transfer.
    pub size: u64,
    /// Time of the start.
    pub at: SystemTime,
    /// Time of the start by the monotonic clock.
    pub began: Instant,
    bytes: AtomicU64,
    peer: Mutex<Option<(Network, SocketAddr)>>,
    reason: Mutex<Option<String>>,
}

impl RunningTransfer {
    /// Number of bytes transferred so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The current peer. `None` while one is being chosen.
    pub fn peer(&self) -> Option<(Network, SocketAddr)> {
        *self.peer.lock()
    }

    /// Why the peer was chosen. `None` if there was no choice.
    pub fn reason(&self) -> Option<String> {
        self.reason.lock().clone()
    }
}

/// Statistics of the transfers of NARs.
#[derive(Default)]
pub struct TransferStats {
    /// Time from this machine's request for a NAR to its first piece from a LAN peer.
    pub first_byte_lan: Histogram,
    /// Time from this machine's request for a NAR to its first piece from a WAN peer.
    pub first_byte_wan: Histogram,
    /// Running transfers by ID. Bounded by the permits for streams.
    running: Mutex<BTreeMap<u64, Arc<RunningTransfer>>>,
    last_id: AtomicU64,
}

impl TransferStats {
    pub(super) fn begin(
        &self,
        direction: Direction,
        name: &str,
        size: u64,
    ) -> Arc<RunningTransfer> {
        let running = Arc::new(RunningTransfer {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            direction,
            name: name.to_owned(),
            size,
            at: SystemTime::now(),
            began: Instant::now(),
            bytes: AtomicU64::new(0),
            peer: Mutex::default(),
            reason: Mutex::default(),
        });
        self.running.lock().insert(running.id, running.clone());
        running
    }

    /// Running transfers, the oldest first.
    pub fn running(&self) -> Vec<Arc<RunningTransfer>> {
        self.running.lock().values().cloned().collect()
    }
}

/// Handle of the thread that moves a NAR. Dropping it ends the transfer.
pub struct TransferGuard<'a> {
    stats: &'a Stats,
    running: Option<Arc<RunningTransfer>>,
    peer: Option<(Network, Arc<PeerTraffic>)>,
}

impl<'a> TransferGuard<'a> {
    /// Returns a handle of a transfer that is `running`. `None` records nothing.
    pub(super) fn new(stats: &'a Stats, running: Option<Arc<RunningTransfer>>) -> Self {
        TransferGuard { stats, running, peer: None }
    }

    /// Sets the current peer.
    pub fn set_peer(&mut self, network: Network, peer: SocketAddr) {
        let Some(running) = &self.running else { return };
        *running.peer.lock() = Some((network, peer));
        let key = match running.direction {
            Direction::In => TrafficKey::server(network, peer),
            Direction::Out => TrafficKey::asker(network, peer.ip()),
        };
        self.peer = Some((network, self.stats.peer_traffic(key)));
    }

    /// Sets the reason for the choice of the peer, as text for the status.
    pub fn set_reason(&self, reason: &str) {
        let Some(running) = &self.running else { return };
        *running.reason.lock() = Some(reason.to_owned());
    }

    /// Counts bytes that were received from, or sent to, the current peer.
    pub fn record_bytes(&self, bytes: u64) {
        let (Some(running), Some((network, counts))) = (&self.running, &self.peer) else { return };
        let (count, of_peer) = match (running.direction, network) {
            (Direction::In, Network::Lan) => (Counter::ReceivedLan, &counts.received),
            (Direction::In, Network::Wan) => (Counter::ReceivedWan, &counts.received),
            (Direction::Out, Network::Lan) => (Counter::SentLan, &counts.sent),
            (Direction::Out, Network::Wan) => (Counter::SentWan, &counts.sent),
        };
        self.stats.add(count, bytes);
        of_peer.fetch_add(bytes, Ordering::Relaxed);
        // Counted immediately, because the peer's counts may be dropped during the transfer.
        if !counts.has_series() {
            self.stats.others[running.direction as usize].fetch_add(bytes, Ordering::Relaxed);
        }
    }

    /// Sets the number of bytes transferred. It decreases if the transfer starts again.
    pub fn set_progress(&self, bytes: u64) {
        self.running.iter().for_each(|running| running.bytes.store(bytes, Ordering::Relaxed));
    }

    /// Counts the NAR as completely transferred.
    pub fn record_whole(&self) {
        let Some(running) = &self.running else { return };
        match running.direction {
            Direction::In => self.stats.add(Counter::ReceivedNars, 1),
            Direction::Out => self.stats.add(Counter::SentNars, 1),
        }
    }

    /// Counts the NAR as one that no peer could deliver.
    pub fn record_failure(&self) {
        if self.running.is_some() {
            self.stats.add(Counter::FailedNars, 1);
        }
    }
}

impl Drop for TransferGuard<'_> {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            self.stats.transfers.running.lock().remove(&running.id);
        }
    }
}
