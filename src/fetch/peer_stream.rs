//! Reads a NAR from one peer, and measures how long the peer is waited for.

use crate::lookup::LookupService;
use crate::peers::client::{MIN_BYTES_PER_SECOND, NarBody};
use crate::peers::health::Fault;
use crate::peers::pace::IncomingNar;
use crate::time_scale::Timeout;
use crate::wire::tracker::{Role, TransferName};
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

/// Interval of the checks whether another peer or the upstream cache is faster.
pub(super) const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Time waited for a peer over which its pace must be [`MIN_BYTES_PER_SECOND`] or more. Slower
/// peers are left.
const PACE_WINDOW: Timeout = Timeout::from_secs(5);

/// Why reading from a peer ended.
#[derive(Debug)]
pub(super) enum StreamError {
    /// The peer is at fault.
    Failed(Fault, String),
    /// Another peer is twice as fast, or a relay sends too little.
    Slow(String),
    /// The upstream cache is certain to be faster.
    Upstream(String),
    /// A relay sent a piece whose SHA-256 is not this one, which the holder returned.
    WrongPiece([u8; 32]),
    /// The holder returned no digests. True if that is the holder's fault; it may also be busy, or
    /// the time is over.
    Unchecked(bool, String),
    /// The deadline of the first piece, or of the rest of an unsupported NAR, has passed.
    Late,
}

impl StreamError {
    pub(super) fn failed(fault: Fault, why: impl fmt::Display) -> Self {
        StreamError::Failed(fault, why.to_string())
    }
}

/// A NAR that a peer is sending.
pub(super) struct PeerStream<'a> {
    pub(super) body: NarBody,
    pub(super) incoming_nar: IncomingNar<'a>,
    /// Set if a tracker counts the transfer.
    counted: Option<CountedTransfer<'a>>,
    /// When the last bytes arrived, or when the current read began if that is later.
    waiting_since: Instant,
    /// Time between the last two reads, in which Nix took no bytes.
    pub(super) pause: Duration,
    /// Time waited for the peer in the current [`PACE_WINDOW`], and bytes received in it.
    waited: Duration,
    received: u64,
    /// Total time waited for the peer.
    pub(super) total_wait: Duration,
    /// Time waited since the last check for a faster source.
    unchecked_wait: Duration,
}

impl<'a> PeerStream<'a> {
    /// A stream whose body begins now.
    pub(super) fn new(
        body: NarBody,
        incoming_nar: IncomingNar<'a>,
        counted: Option<CountedTransfer<'a>>,
    ) -> Self {
        PeerStream {
            body,
            incoming_nar,
            counted,
            waiting_since: Instant::now(),
            pause: Duration::ZERO,
            waited: Duration::ZERO,
            received: 0,
            total_wait: Duration::ZERO,
            unchecked_wait: Duration::ZERO,
        }
    }

    /// Starts to wait for bytes that Nix is ready to take.
    pub(super) fn begin_read(&mut self, now: Instant) {
        self.pause = now - self.waiting_since;
        self.waiting_since = now;
        self.incoming_nar.start_waiting(now);
    }

    /// Reads what has arrived, and counts the time since `now` as waited for the peer. Returns 0 at
    /// the end of the stream, and `None` if nothing arrives within `timeout`, for which it blocks
    /// at most.
    ///
    /// # Errors
    /// Errors of the connection and of the decoder.
    pub(super) fn read_within(
        &mut self,
        room: &mut [u8],
        timeout: Duration,
        now: Instant,
    ) -> io::Result<Option<usize>> {
        let read = self.body.read_within(room, timeout);
        let end = Instant::now();
        self.unchecked_wait += end - now;
        self.total_wait += end - now;
        if let Ok(Some(received @ 1..)) = read {
            self.incoming_nar.record_bytes(received as u64, end);
            self.waited += end - self.waiting_since;
            self.waiting_since = end;
            self.received += received as u64;
            self.counted.iter_mut().for_each(|counted| counted.bytes += received as u64);
        }
        read
    }

    /// Fails if the peer sent too little in the last [`PACE_WINDOW`].
    pub(super) fn check_min_pace(&mut self) -> Result<(), StreamError> {
        if self.waited < PACE_WINDOW.get() {
            return Ok(());
        }
        let pace = (self.received as f64 / self.waited.as_secs_f64()) as u64;
        if pace < MIN_BYTES_PER_SECOND {
            let why = format_args!("too slow, {pace} bytes a second");
            return Err(StreamError::failed(Fault::BrokenStream, why));
        }
        (self.waited, self.received) = (Duration::ZERO, 0);
        Ok(())
    }

    /// Begins the next [`CHECK_INTERVAL`] and returns true if the last one is over.
    pub(super) fn begin_check(&mut self) -> bool {
        let is_due = self.unchecked_wait >= CHECK_INTERVAL;
        if is_due {
            self.unchecked_wait = Duration::ZERO;
        }
        is_due
    }

    /// Time for which the current read has waited without a byte.
    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.waiting_since)
    }
}

/// A transfer that a tracker counts. Dropping it reports the received bytes to the tracker.
pub(super) struct CountedTransfer<'a> {
    pub(super) lookup: &'a LookupService,
    pub(super) transfer: TransferName,
    pub(super) bytes: u64,
}

impl Drop for CountedTransfer<'_> {
    fn drop(&mut self) {
        self.lookup.report(&self.transfer, Role::Receiver, self.bytes);
    }
}
