//! Limits concurrent long responses: NARs, listings, logs and large narinfos. Short responses need
//! no permit, so they never wait for long ones.

use super::send_progress::{STALL_TIMEOUT, SendProgress};
use crate::lock::{Condvar, Mutex, MutexGuard};
use crate::time_scale::Timeout;
use crate::upload_limit::UploadLimit;
use std::net::IpAddr;
use std::sync::Arc;
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

/// Requests of other machines that wait for a permit at once, each on a thread. Further ones are
/// refused at once.
const MAX_WAITING_STRANGERS: usize = 64;

/// Longest wait of a Nix for a permit. Afterwards it gets a 404 and tries its next substituter.
const PERMIT_TIMEOUT: Timeout = Timeout::from_secs(30);

/// Interval at which a request that waits for a permit checks whether another client is stalled or
/// its own connection was closed.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Default)]
struct StreamCounts {
    next_id: u64,
    /// The long responses under way.
    streams: Vec<Stream>,
    compressed: usize,
    large_narinfos: usize,
    waiting_for_streams: Waiting,
    waiting_for_narinfos: Waiting,
}

/// Numbers of requests that wait for one kind of permit.
#[derive(Default)]
struct Waiting {
    own: usize,
    strangers: usize,
}

impl Waiting {
    fn of(&mut self, is_own: bool) -> &mut usize {
        if is_own { &mut self.own } else { &mut self.strangers }
    }
}

/// Selects the numbers of requests that wait for one kind of permit.
type SelectWaiting = fn(&mut StreamCounts) -> &mut Waiting;

/// Wakes requests that wait for one kind of permit.
#[derive(Default)]
struct WaitQueue {
    own: Condvar,
    strangers: Condvar,
}

impl WaitQueue {
    fn of(&self, is_own: bool) -> &Condvar {
        if is_own { &self.own } else { &self.strangers }
    }
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
    fn make_room(&mut self, peer: Option<IpAddr>, max_for_peers: usize) -> bool {
        let count = |matches: &dyn Fn(Option<IpAddr>) -> bool| {
            self.streams.iter().filter(|stream| matches(stream.peer)).count()
        };
        let (from_peer, by_peers) =
            (count(&|other| other == peer), count(&|other| other.is_some()));
        let is_full = self.streams.len() >= MAX_STREAMS;
        if peer.is_some() && from_peer >= MAX_STREAMS_PER_PEER {
            return self.end_stalled(|other| other == peer);
        }
        if is_full || peer.is_some() && by_peers >= max_for_peers {
            return self.end_stalled(|other| other.is_some());
        }
        true
    }

    /// Ends the stream whose client has taken nothing for the longest time, of the other machines
    /// for which `may_end` returns true. Returns false if each took something within
    /// [`STALL_TIMEOUT`]. This machine's streams end by their write timeout only.
    fn end_stalled(&mut self, may_end: impl Fn(Option<IpAddr>) -> bool) -> bool {
        let stalled = self.streams.iter().enumerate().filter(|(_, stream)| may_end(stream.peer));
        let now = Instant::now();
        let longest_stalled =
            stalled.map(|(index, stream)| (stream.progress.stalled_for(now), index)).max();
        let Some((time, index)) = longest_stalled else { return false };
        if time < STALL_TIMEOUT.get() {
            return false;
        }
        self.streams.swap_remove(index).progress.give_way();
        true
    }
}

/// Issues permits for long responses.
pub struct StreamLimits {
    counts: Mutex<StreamCounts>,
    streams: WaitQueue,
    narinfos: WaitQueue,
    max_for_peers: usize,
}

impl Default for StreamLimits {
    fn default() -> Self {
        StreamLimits::new(None)
    }
}

/// Permit for a long response. Dropping it returns it.
pub struct StreamPermit<'a> {
    limits: &'a StreamLimits,
    id: u64,
}

/// Permit to build a large narinfo. Dropping it returns it.
pub struct LargeNarinfoPermit<'a>(&'a StreamLimits);

/// Permit to compress a NAR. Dropping it returns it.
pub struct CompressionPermit<'a>(&'a StreamLimits);

impl StreamLimits {
    /// Creates the limits. An upload limit may allow fewer streams to peers.
    pub fn new(limit: Option<&UploadLimit>) -> Self {
        let max_for_peers =
            limit.map_or(MAX_PEER_STREAMS, |limit| limit.streams().min(MAX_PEER_STREAMS));
        let (streams, narinfos) = Default::default();
        StreamLimits { counts: Mutex::default(), streams, narinfos, max_for_peers }
    }

    /// Returns a permit for a response to `peer`, which is `None` for this machine. At one of the
    /// limits, it ends a stream whose client takes nothing, or waits up to 30 s for a permit if
    /// `waits`. Returns `None` after that, and at once if too many wait already.
    pub(super) fn for_stream(
        &self,
        peer: Option<IpAddr>,
        progress: &Arc<SendProgress>,
        waits: bool,
    ) -> Option<StreamPermit<'_>> {
        let make_room = |counts: &mut StreamCounts| counts.make_room(peer, self.max_for_peers);
        let waiting: SelectWaiting = |counts| &mut counts.waiting_for_streams;
        let mut counts = self.counts.lock();
        if !make_room(&mut counts) {
            if !waits {
                return None;
            }
            counts = wait(counts, &self.streams, waiting, peer.is_none(), progress, make_room)?;
        }
        // This stream has not been told to give way, though an earlier one of the connection may.
        progress.clear_give_way();
        let id = counts.next_id;
        counts.next_id += 1;
        counts.streams.push(Stream { id, peer, progress: progress.clone() });
        Some(StreamPermit { limits: self, id })
    }

    /// Waits up to 30 s for a permit to build a large narinfo. Returns `None` after that, and at
    /// once if too many wait already.
    pub(super) fn for_large_narinfo(
        &self,
        is_own: bool,
        progress: &SendProgress,
    ) -> Option<LargeNarinfoPermit<'_>> {
        let make_room = |counts: &mut StreamCounts| counts.large_narinfos < MAX_LARGE_NARINFOS;
        let waiting: SelectWaiting = |counts| &mut counts.waiting_for_narinfos;
        let mut counts = self.counts.lock();
        if !make_room(&mut counts) {
            counts = wait(counts, &self.narinfos, waiting, is_own, progress, make_room)?;
        }
        counts.large_narinfos += 1;
        Some(LargeNarinfoPermit(self))
    }

    /// Returns a permit to compress a NAR without waiting; `None` at the limit.
    pub fn try_compression_permit(&self) -> Option<CompressionPermit<'_>> {
        let mut counts = self.counts.lock();
        if counts.compressed >= MAX_COMPRESSED {
            return None;
        }
        counts.compressed += 1;
        Some(CompressionPermit(self))
    }
}

/// Waits in `queue` until `make_room` returns true, for [`PERMIT_TIMEOUT`] at most. Returns `None`
/// after that, if the client's connection was closed, or if too many other machines wait. `waiting`
/// selects the numbers of requests in the queue.
fn wait<'a>(
    mut counts: MutexGuard<'a, StreamCounts>,
    queue: &WaitQueue,
    waiting: SelectWaiting,
    is_own: bool,
    progress: &SendProgress,
    make_room: impl Fn(&mut StreamCounts) -> bool,
) -> Option<MutexGuard<'a, StreamCounts>> {
    let strangers = counts.waiting_for_streams.strangers + counts.waiting_for_narinfos.strangers;
    if !is_own && strangers >= MAX_WAITING_STRANGERS {
        return None;
    }
    *waiting(&mut counts).of(is_own) += 1;
    let deadline = Instant::now() + PERMIT_TIMEOUT.get();
    let mut has_permit = false;
    while !has_permit
        && !progress.is_closed()
        && let Some(left) = deadline.checked_duration_since(Instant::now())
    {
        let left = left.min(CHECK_INTERVAL);
        counts = queue.of(is_own).wait_timeout(counts, left);
        has_permit = make_room(&mut counts);
    }
    *waiting(&mut counts).of(is_own) -= 1;
    has_permit.then_some(counts)
}

impl Drop for LargeNarinfoPermit<'_> {
    fn drop(&mut self) {
        let mut counts = self.0.counts.lock();
        counts.large_narinfos -= 1;
        // Every request in the queue can use the permit.
        self.0.narinfos.of(counts.waiting_for_narinfos.own > 0).notify_one();
    }
}

impl Drop for StreamPermit<'_> {
    fn drop(&mut self) {
        let mut counts = self.limits.counts.lock();
        counts.streams.retain(|stream| stream.id != self.id);
        // Every request of this machine can use the permit. Those of others may be at the limit of
        // their address, so all of them look.
        if counts.waiting_for_streams.own > 0 {
            self.limits.streams.own.notify_one();
        } else if counts.waiting_for_streams.strangers > 0 {
            self.limits.streams.strangers.notify_all();
        }
    }
}

impl Drop for CompressionPermit<'_> {
    fn drop(&mut self) {
        self.0.counts.lock().compressed -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

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
        assert!(permits.counts.lock().streams.is_empty());
    }

    #[test]
    fn stream_whose_client_takes_nothing_makes_room() {
        let permits = StreamLimits::default();
        let stalled = || Arc::new(SendProgress::stalled(STALL_TIMEOUT.get()));
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
            permits.counts.lock().streams.len(),
            next.len(),
            "ended permits are not returned twice"
        );
    }

    #[test]
    fn stalled_stream_of_this_machine_does_not_make_room() {
        let permits = StreamLimits::default();
        let stalled = || Arc::new(SendProgress::stalled(2 * STALL_TIMEOUT.get()));
        let at_once = |peer, progress| permits.for_stream(peer, &progress, false);
        let _own: Vec<_> = (1..MAX_STREAMS).map(|_| at_once(None, stalled()).unwrap()).collect();
        let stranger = Arc::new(SendProgress::stalled(STALL_TIMEOUT.get()));
        let _other = at_once(peer(1), stranger.clone()).unwrap();
        assert!(at_once(None, reads()).is_some() && stranger.has_to_give_way());
        let _last = at_once(None, reads()).unwrap();
        assert!(at_once(None, reads()).is_none());
    }

    /// Regression test: the next response on the connection of an ended stream was cut.
    #[test]
    fn next_stream_of_a_connection_need_not_give_way() {
        let (permits, progress) = (StreamLimits::default(), reads());
        let ended = permits.for_stream(peer(1), &progress, false);
        progress.give_way();
        drop(ended);
        let _next = permits.for_stream(peer(1), &progress, false).unwrap();
        assert!(!progress.has_to_give_way());
    }

    #[test]
    fn waiting_strangers_are_bounded_and_end_with_their_connection() {
        let permits = StreamLimits::default();
        let held: Vec<_> =
            (0..MAX_STREAMS).map(|_| permits.for_stream(None, &reads(), false).unwrap()).collect();
        let waiting = || permits.counts.lock().waiting_for_streams.strangers;
        let (closed, began) = (reads(), Instant::now());
        thread::scope(|scope| {
            let wait = || scope.spawn(|| permits.for_stream(peer(1), &closed, true).is_some());
            let waiters: Vec<_> = (0..MAX_WAITING_STRANGERS).map(|_| wait()).collect();
            while waiting() < MAX_WAITING_STRANGERS {
                thread::yield_now();
            }
            // Refused at once, although the permit is for another kind of response.
            let _narinfos: Vec<_> = (0..MAX_LARGE_NARINFOS)
                .map(|_| permits.for_large_narinfo(false, &reads()).unwrap())
                .collect();
            assert!(permits.for_large_narinfo(false, &reads()).is_none());
            assert!(permits.for_stream(peer(2), &reads(), true).is_none());
            // This machine's requests wait nevertheless.
            let own = scope.spawn(|| permits.for_stream(None, &reads(), true).is_some());
            while permits.counts.lock().waiting_for_streams.own == 0 {
                thread::yield_now();
            }
            closed.record_closed();
            assert!(waiters.into_iter().all(|waiter| !waiter.join().unwrap()));
            assert_eq!(waiting(), 0);
            assert!(began.elapsed() < PERMIT_TIMEOUT.get(), "waited for a permit");
            drop(held);
            assert!(own.join().unwrap());
        });
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
