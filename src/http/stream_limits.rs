//! Limits concurrent long responses: NARs, listings, logs and large narinfos. Short responses need
//! no permit, so they never wait for long ones.

use super::send_progress::SendProgress;
use crate::time_scale::Timeout;
use crate::upload_limit::UploadLimit;
use std::net::IpAddr;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// Long responses at once. Each holds up to 1 MiB of buffers. At the bound, Nix waits and peers are
/// refused, unless a client takes nothing of its response.
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

/// Longest wait of a Nix for a permit. Afterwards it gets a 404 and tries its next substituter.
const PERMIT_TIMEOUT: Timeout = Timeout::from_secs(30);

/// Time for which a client takes nothing before its stream is ended for another client at a limit.
/// A Nix that unpacks a large file pauses for seconds.
const STALLED: Timeout = Timeout::from_secs(10);

/// Interval at which a client that waits for a permit checks whether another one is stalled.
const STALLED_CHECK: Duration = Duration::from_secs(1);

#[derive(Default)]
struct StreamCounts {
    next_id: u64,
    /// The long responses under way.
    streams: Vec<Stream>,
    compressed: usize,
    large_narinfos: usize,
}

/// A long response under way.
struct Stream {
    id: u64,
    /// The client's address; `None` for this machine.
    peer: Option<IpAddr>,
    progress: Arc<SendProgress>,
}

impl StreamCounts {
    /// Ends a stream if `peer` gets no permit at once. Returns whether it gets one now.
    fn make_room(&mut self, peer: Option<IpAddr>, most_for_peers: usize) -> bool {
        let count = |of: &dyn Fn(Option<IpAddr>) -> bool| {
            self.streams.iter().filter(|stream| of(stream.peer)).count()
        };
        let (its, by_peers) = (count(&|other| other == peer), count(&|other| other.is_some()));
        let is_full = self.streams.len() >= MAX_STREAMS;
        if peer.is_some() && its >= MAX_STREAMS_PER_PEER {
            return self.end_stalled(|other| other == peer);
        }
        if is_full || peer.is_some() && by_peers >= most_for_peers {
            return self.end_stalled(|other| peer.is_none() || other.is_some());
        }
        true
    }

    /// Ends the stream whose client has taken nothing for the longest time, of the clients for
    /// which `may_end` returns true. Returns false if each took something within [`STALLED`].
    fn end_stalled(&mut self, may_end: impl Fn(Option<IpAddr>) -> bool) -> bool {
        let stalled = self.streams.iter().enumerate().filter(|(_, stream)| may_end(stream.peer));
        let longest = stalled.map(|(at, stream)| (stream.progress.stalled_for(), at)).max();
        let Some((time, at)) = longest else { return false };
        if time < STALLED.get() {
            return false;
        }
        self.streams.swap_remove(at).progress.give_way();
        true
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
    id: u64,
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

    /// Returns a permit for a response to `peer`, which is `None` for this machine. At one of the
    /// limits, it ends a stream whose client takes nothing, or waits up to 30 s for a permit if
    /// `waits`. Returns `None` after that.
    pub(super) fn for_stream(
        &self,
        peer: Option<IpAddr>,
        progress: &Arc<SendProgress>,
        waits: bool,
    ) -> Option<StreamPermit<'_>> {
        let patience = if waits { PERMIT_TIMEOUT.get() } else { Duration::ZERO };
        let until = Instant::now() + patience;
        let mut taken = self.lock();
        while !taken.make_room(peer, self.most_for_peers) {
            let left = until.checked_duration_since(Instant::now())?.min(STALLED_CHECK);
            taken = self.returned.wait_timeout(taken, left).unwrap_or_else(|e| e.into_inner()).0;
        }
        let id = taken.next_id;
        taken.next_id += 1;
        taken.streams.push(Stream { id, peer, progress: progress.clone() });
        Some(StreamPermit { permits: self, id })
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
        self.permits.lock().streams.retain(|stream| stream.id != self.id);
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

    fn peer(last: u8) -> Option<IpAddr> {
        Some(IpAddr::from([10, 0, 0, last]))
    }

    fn reads() -> Arc<SendProgress> {
        Arc::default()
    }

    #[test]
    fn peers_at_their_limits_leave_streams_for_this_machine() {
        let permits = StreamLimits::default();
        let at_once = |peer| permits.for_stream(peer, &reads(), false);
        let greedy: Vec<_> = (0..100).map_while(|_| at_once(peer(1))).collect();
        assert_eq!(greedy.len(), MAX_STREAMS_PER_PEER);
        let others: Vec<_> = (2..100).map_while(|last| at_once(peer(last))).collect();
        assert_eq!(greedy.len() + others.len(), MAX_PEER_STREAMS);
        let own: Vec<_> = (MAX_PEER_STREAMS..MAX_STREAMS).map(|_| at_once(None).unwrap()).collect();
        assert!(at_once(None).is_none());
        // At the limit, this machine waits until a permit is returned.
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| permits.for_stream(None, &reads(), true).is_some());
            drop(greedy);
            assert!(waiting.join().unwrap());
        });
        drop((others, own));
        assert!(permits.lock().streams.is_empty());
    }

    #[test]
    fn stream_whose_client_takes_nothing_makes_room() {
        let permits = StreamLimits::default();
        let stalled = || Arc::new(SendProgress::stalled(STALLED.get()));
        let all: Vec<_> = (0..MAX_PEER_STREAMS)
            .map(|n| match n % 2 {
                0 => (peer(1 + n as u8), reads()),
                _ => (peer(1 + n as u8), stalled()),
            })
            .collect();
        let held: Vec<_> = all
            .iter()
            .map(|(peer, progress)| permits.for_stream(*peer, progress, false).unwrap())
            .collect();
        let next: Vec<_> =
            (100..200).map_while(|last| permits.for_stream(peer(last), &reads(), false)).collect();
        assert_eq!(next.len(), MAX_PEER_STREAMS / 2, "one for each that took nothing");
        assert!(all.iter().all(|(_, p)| p.stalled_since().is_some() == p.has_to_give_way()));
        drop(held);
        assert_eq!(
            permits.lock().streams.len(),
            next.len(),
            "ended permits are not returned twice"
        );
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
