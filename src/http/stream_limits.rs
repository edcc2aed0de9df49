//! Permits for the long answers: NARs, listings and logs. Short answers need none, so that they
//! never wait for long ones.

use crate::time_scale::Timeout;
use crate::upload_limit::UploadLimit;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Condvar, Mutex};
use std::time::Instant;

/// Long answers at once. Each holds up to 1 MiB of buffers.
pub const MAX_STREAMS: usize = 64;
/// Of these, so many for others than this machine's Nix, which otherwise would stand behind
/// neighbours that read slowly or maliciously.
pub const MAX_PEER_STREAMS: usize = 48;
/// Of these, so many for one peer: Nix asks for 16 NARs at once, and one peer alone must not shut
/// out the others.
pub const MAX_STREAMS_PER_PEER: usize = 32;

/// NARs compressed at once, as many as one Nix asks for. It bounds the memory, 1.5 MiB each; the
/// processor time is bounded by the link, which each of them waits for. Beyond, they go out plain.
pub const MAX_COMPRESSED: usize = 16;

/// Narinfos of paths with many references that are made and sent at once, 4 MiB each at most.
pub const MAX_LARGE_NARINFOS: usize = 4;

/// How long this machine's Nix waits for its turn before it is told 404 and goes to its next
/// substituter.
const OWN_PATIENCE: Timeout = Timeout::from_secs(30);

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

/// The permits that are left.
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

/// A permit; dropping it returns it.
pub struct StreamPermit<'a> {
    permits: &'a StreamLimits,
    peer: Option<IpAddr>,
}

/// A permit to make a narinfo with many references; dropping it returns it.
pub struct LargeNarinfoPermit<'a>(&'a StreamLimits);

/// A permit to compress; dropping it returns it.
pub struct CompressionPermit<'a>(&'a StreamLimits);

impl StreamLimits {
    /// As many as there may be under that limit of what is sent.
    pub fn under(limit: Option<&UploadLimit>) -> Self {
        let most_for_peers =
            limit.map_or(MAX_PEER_STREAMS, |limit| limit.streams().min(MAX_PEER_STREAMS));
        StreamLimits { taken: Mutex::default(), returned: Condvar::new(), most_for_peers }
    }

    /// For this machine's Nix: waits for its turn, up to 30 seconds.
    pub fn for_this_machine(&self) -> Option<StreamPermit<'_>> {
        let until = Instant::now() + OWN_PATIENCE.get();
        let mut taken = self.lock();
        while taken.own + taken.by_peers() >= MAX_STREAMS {
            let left = until.checked_duration_since(Instant::now())?;
            taken = self.returned.wait_timeout(taken, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        taken.own += 1;
        Some(StreamPermit { permits: self, peer: None })
    }

    /// For a peer: now or not at all.
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

    /// To make a narinfo with many references, for anybody: waits for its turn, up to 30 seconds.
    pub fn for_large_narinfo(&self) -> Option<LargeNarinfoPermit<'_>> {
        let until = Instant::now() + OWN_PATIENCE.get();
        let mut taken = self.lock();
        while taken.large_narinfos >= MAX_LARGE_NARINFOS {
            let left = until.checked_duration_since(Instant::now())?;
            taken = self.returned.wait_timeout(taken, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        taken.large_narinfos += 1;
        Some(LargeNarinfoPermit(self))
    }

    /// To compress what a permit is held for: now or not at all.
    pub fn to_compress(&self) -> Option<CompressionPermit<'_>> {
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
        // Those who wait for something else wait on.
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
    fn peers_cannot_take_everything() {
        let permits = StreamLimits::default();
        let peer = |last| IpAddr::from([10, 0, 0, last]);
        let greedy: Vec<_> = (0..100).map_while(|_| permits.for_peer(peer(1))).collect();
        assert_eq!(greedy.len(), MAX_STREAMS_PER_PEER);
        let others: Vec<_> = (2..100).map_while(|last| permits.for_peer(peer(last))).collect();
        assert_eq!(greedy.len() + others.len(), MAX_PEER_STREAMS);
        let own: Vec<_> =
            (MAX_PEER_STREAMS..MAX_STREAMS).map(|_| permits.for_this_machine().unwrap()).collect();
        // With none left, this machine waits until one comes back.
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
    fn few_are_compressed_at_once() {
        let permits = StreamLimits::default();
        let all: Vec<_> = (0..100).map_while(|_| permits.to_compress()).collect();
        assert_eq!(all.len(), MAX_COMPRESSED);
        drop(all);
        assert!(permits.to_compress().is_some());
    }
}
