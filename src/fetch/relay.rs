//! Relays: peers that send a NAR that they are still downloading. A holder names relays instead of
//! sending; each of their pieces must match the holder's digest (docs/protocol.md, "Crowds").

use super::peer_stream::StreamError;
use crate::lookup::NarSource;
use crate::peers::client::{PeerClient, PeerError};
use crate::peers::health::Fault;
use crate::peers::pace::PaceEstimate;
use crate::time_scale::Timeout;
use crate::wire::relay::MAX_DIGESTS;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A relay is left after this time, multiplied by its position in the chain, without a byte or
/// while the holder is twice as fast. Also the interval at which the holder is asked for its pace,
/// and the timeout of that request.
const RELAY_STEP: Timeout = Timeout::from_secs(1);
/// Maximum time for a holder to return digests. It may have to hash the pieces first.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(5);

/// The relays of a NAR that a holder named.
pub(super) struct Relays {
    pub(super) holder: SocketAddr,
    /// The relays that were not asked yet. The last one is asked first.
    pub(super) unasked: Vec<NarSource>,
    /// Deadline for the first piece from any of them; `None` once it is there.
    pub(super) deadline: Option<Instant>,
}

/// Compares a relay that sends a NAR with the holder that named it: its pieces and its pace.
pub(super) struct RelayCheck<'a> {
    client: &'a PeerClient,
    pub(super) holder: SocketAddr,
    /// File name of the NAR at the holder.
    nar_name: String,
    /// Position of the relay in the chain, from 1: one more than the named relays not yet asked.
    position: u32,
    /// SHA-256 digests of pieces according to the holder, and the index of the first of them.
    digests: Vec<[u8; 32]>,
    first: u64,
    /// When the holder was last asked for its pace.
    asked: Instant,
    /// Since when the holder is twice as fast as the relay.
    slow_since: Option<Instant>,
}

impl<'a> RelayCheck<'a> {
    /// Begins to check the relay that was asked last. Its holder knows the NAR as `nar_name`.
    pub(super) fn new(relays: &Relays, client: &'a PeerClient, nar_name: String) -> Self {
        RelayCheck {
            client,
            holder: relays.holder,
            nar_name,
            position: relays.unasked.len() as u32 + 1,
            digests: Vec::new(),
            first: 0,
            asked: Instant::now(),
            slow_since: None,
        }
    }

    /// The SHA-256 of a piece according to the holder. Blocks for `left` at most, if the holder
    /// has to be asked.
    pub(super) fn digest(&mut self, piece: u64, left: Duration) -> Result<[u8; 32], StreamError> {
        let index = piece.checked_sub(self.first).and_then(|index| usize::try_from(index).ok());
        if let Some(digest) = index.and_then(|index| self.digests.get(index)) {
            return Ok(*digest);
        }
        let unchecked = |e: PeerError| {
            StreamError::Unchecked(e.fault() == Some(Fault::BrokenPromise), e.to_string())
        };
        let timeout = DIGEST_TIMEOUT.min(left);
        let answer = self.client.digests(self.holder, &self.nar_name, piece, MAX_DIGESTS, timeout);
        (self.first, self.digests) = (piece, answer.map_err(unchecked)?.0);
        let first = self.digests.first().copied();
        first.ok_or_else(|| StreamError::Unchecked(true, "no digests".into()))
    }

    /// Returns an error if the relay is to be left for the holder. `own` is the pace of the relay,
    /// which has sent nothing for `silent`. A slow relay slows all behind it in the chain. The node
    /// next to it leaves it first, so that the others, whose limits are longer, become fast again
    /// and stay. Blocks for one request to the holder at most.
    pub(super) fn check_pace(
        &mut self,
        own: PaceEstimate,
        silent: Duration,
        now: Instant,
    ) -> Result<(), StreamError> {
        let limit = RELAY_STEP.get() * self.position;
        if silent >= limit {
            return Err(StreamError::Slow(format!("nothing came for {silent:.1?}")));
        }
        if now.saturating_duration_since(self.asked) < RELAY_STEP.get() || own.waited.is_zero() {
            return Ok(());
        }
        self.asked = now;
        let answer = self.client.digests(self.holder, &self.nar_name, 0, 1, RELAY_STEP.get());
        let Ok((_, Some(holder_pace))) = answer else { return Ok(()) };
        let relay_pace = own.known.unwrap_or(own.measured);
        if holder_pace < 2.0 * relay_pace {
            self.slow_since = None;
            return Ok(());
        }
        let since = *self.slow_since.get_or_insert(now);
        if now.saturating_duration_since(since) < limit {
            return Ok(());
        }
        Err(StreamError::Slow(format!(
            "{:.0} KiB/s, the holder has {:.0} KiB/s",
            relay_pace / 1024.0,
            holder_pace / 1024.0
        )))
    }
}
