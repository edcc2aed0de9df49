//! Limits concurrent long responses: NARs, listings, logs and large narinfos. Short responses need
//! no permit, so they never wait for long ones.

use crate::time_scale::Timeout;
use crate::upload_limit::UploadLimit;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

/// Long responses at once. Each holds up to 1 MiB of buffers. At the bound, this machine waits and
/// peers are refused.
pub const MAX_STREAMS: usize = 64;
/// Long responses to peers at once. The rest of [`MAX_STREAMS`] is reserved for this machine's Nix,
/// so that slow or malicious readers do not delay it.
pub const MAX_PEER_STREAMS: usize = 48;
/// Long responses to one peer at once, so that one peer does not shut out the others. Nix requests
/// 16 NARs at once.
pub const MAX_STREAMS_PER_PEER: usize = 32;

/// NARs compressed at once, as many as one Nix requests. Each takes 1.5 MiB of memory; the link
/// limits their processor time. Further NARs are sent uncompressed.
pub const MAX_COMPRESSED: usize = 16;

/// Large narinfos built and sent at once, each up to 4 MiB. Further requests wait.
pub const MAX_LARGE_NARINFOS: usize = 4;

/// Longest wait for a permit. Afterwards this machine's Nix gets a 404 and tries its next
/// substituter.
const PERMIT_TIMEOUT: Timeout = Timeout::from_secs(30);

#[derive(Default)]
struct StreamCounts {
    own: usize,
    peers: HashMap<IpAddr, usize>,
    compressed: usize,
    large_narinfos: usize,
}

impl StreamCounts {
    fn by_peers(&self) -> usize {
        self.peers.values().sum()
    }
}

/// Issues permits for long responses.
pub struct StreamLimits {
    taken: Mutex<StreamCounts>,
    returned: Condvar,
    most_for_peers: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        StreamLimits::under(None)
    }
}

/// Permit for a long response. Dropping it returns it.
pub struct StreamPermit<'a> {
    permits: &'a StreamLimits,
    peer: Option<IpAddr>,
}

/// Permit to build a large narinfo. Dropping it returns it.
pub struct LargeNarinfoPermit<'a>(&'a StreamLimits);

/// Permit to compress a NAR. Dropping it returns it.
pub struct CompressionPermit<'a>(&'a StreamLimits);

impl StreamLimits {
    /// Creates the limits. An upload limit may allow fewer streams to peers.
    pub fn under(limit: Option<&UploadLimit>) -> Self {
        let most_for_peers =
            limit.map_or(MAX_PEER_STREAMS, |limit| limit.streams().min(MAX_PEER_STREAMS));
        StreamLimits { taken: Mutex::default(), returned: Condvar::new(), most_for_peers }
    }

    /// Waits up to 30 s for a permit for this machine's Nix; `None` after that.
    pub fn for_this_machine(&self) -> Option<StreamPermit<'_>> {
        let until = Instant::now() + PERMIT_TIMEOUT.get();
        let mut taken = self.lock();
        while taken.own + taken.by_peers() >= MAX_STREAMS {
            let left = until.checked_duration_since(Instant::now())?;
            taken = self.returned.wait_timeout(taken, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        taken.own += 1;
        Some(StreamPermit { permits: self, peer: None })
    }

    /// Returns a permit for a peer without waiting; `None` at one of the limits.
    pub fn for_peer(&self, peer: IpAddr) -> Option<StreamPermit<'_>> {
        let mut taken = self.lock();
        let by_peers = taken.by_peers();
        let its = taken.peers.get(&peer).copied().unwrap_or(0);
        if taken.own + by_peers >= MAX_STREAMS
            || by_peers >= self.most_for_peers
            || its >= MAX_STREAMS_PER_PEER
        {
            return None;
        }
        taken.peers.insert(peer, its + 1);
        Some(StreamPermit { permits: self, peer: Some(peer) })
    }

    /// Waits up to 30 s for a permit to build a large narinfo for any client; `None` after that.
    pub fn for_large_narinfo(&self) -> Option<LargeNarinfoPermit<'_>> {
        let until = Instant::now() + PERMIT_TIMEOUT.get();
        let mut taken = self.lock();
        while taken.large_narinfos >= MAX_LARGE_NARINFOS {
            let left = until.checked_duration_since(Instant::now())?;
            taken = self.returned.wait_timeout(taken, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        taken.large_narinfos += 1;
        Some(LargeNarinfoPermit(self))
    }

    /// Returns a permit to compress a NAR without waiting; `None` at the limit.
    pub fn try_compression_permit(&self) -> Option<CompressionPermit<'_>> {
        let mut taken = self.lock();
        if taken.compressed >= MAX_COMPRESSED {
            return None;
        }
        taken.compressed += 1;
        Some(CompressionPermit(self))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, StreamCounts> {
        self.taken.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Drop for LargeNarinfoPermit<'_> {
    fn drop(&mut self) {
        self.0.lock().large_narinfos -= 1;
        // The condition variable is shared, so one wake-up might reach a thread that waits for
        // another permit.
        self.0.returned.notify_all();
    }
}

impl Drop for StreamPermit<'_> {
    fn drop(&mut self) {
        let mut taken = self.permits.lock();
        match self.peer {
            None => taken.own -= 1,
            Some(peer) => {
                if let Some(its) = taken.peers.get_mut(&peer) {
                    *its -= 1;
                    if *its == 0 {
                        taken.peers.remove(&peer);
                    }
                }
            }
        }
        self.permits.returned.notify_all();
    }
}

impl Drop for CompressionPermit<'_> {
    fn drop(&mut self) {
        self.0.lock().compressed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_at_their_limits_leave_streams_for_this_machine() {
        let permits = StreamLimits::default();
        let peer = |last| IpAddr::from([10, 0, 0, last]);
        let greedy: Vec<_> = (0..100).map_while(|_| permits.for_peer(peer(1))).collect();
        assert_eq!(greedy.len(), MAX_STREAMS_PER_PEER);
        let others: Vec<_> = (2..100).map_while(|last| permits.for_peer(peer(last))).collect();
        assert_eq!(greedy.len() + others.len(), MAX_PEER_STREAMS);
        let own: Vec<_> =
            (MAX_PEER_STREAMS..MAX_STREAMS).map(|_| permits.for_this_machine().unwrap()).collect();
        // At the limit, this machine waits until a permit is returned.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| permits.for_this_machine().is_some());
            drop(greedy);
            assert!(waiting.join().unwrap());
        });
        drop((others, own));
        assert_eq!(permits.lock().own, 0);
        assert!(permits.lock().peers.is_empty());
    }

    #[test]
    fn compression_is_refused_at_its_limit() {
        let permits = StreamLimits::default();
        let all: Vec<_> = (0..100).map_while(|_| permits.try_compression_permit()).collect();
        assert_eq!(all.len(), MAX_COMPRESSED);
        drop(all);
        assert!(permits.try_compression_permit().is_some());
    }
}
