//! Reads the bytes of one NAR from the best peer, and continues with another peer at the same byte
//! when the current one fails or is slow.
//!
//! A *relay* is a peer that is still downloading the NAR itself. A holder names relays instead of
//! sending; each of their pieces must match the holder's digest (docs/protocol.md, "Crowds").

use super::verified::{PIECE, Piece, VerifiedStream};
use super::{DownloadError, Downloader, spool};
use crate::lookup::{FoundNar, HolderSearch, NarSource, nar_name};
use crate::nix::{HashPart, Malformed};
use crate::peers::client::{LinkKind, MIN_BYTES_PER_SECOND, NarBody, PeerError, READ_TIMEOUT};
use crate::peers::health::{Eligibility, Fault, PeerKey};
use crate::peers::pace::{IncomingNar, PaceEstimate};
use crate::peers::picker::{self, HealthRank, HolderFacts};
use crate::stats::TransferGuard;
use crate::time_scale::Timeout;
use crate::wire::relay::MAX_DIGESTS;
use crate::wire::tracker::{Role, TransferName};
use ring::digest::SHA256;
use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum number of requests for one NAR, without those to relays. At the bound, the NAR fails.
const MAX_TRIES: u32 = 12;
/// Pause before a busy peer (503), or one that broke off, is asked again. Only if no other is left.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of 503 answers to one NAR's requests after which the peer is asked again. Beyond,
/// Nix is better served by its next substituter.
const MAX_BUSY: u32 = 10;
/// Maximum number of broken streams in a row after which the same peer is asked again. Each piece
/// that arrives resets the count.
const MAX_BROKEN: u32 = 1;
/// Maximum number of searches for further holders of one NAR. At the bound, none follows.
const MAX_SEARCHES: u32 = 3;
/// Maximum number of moves of one NAR to a faster peer. At the bound, it stays with its peer.
const MAX_MOVES: u32 = 3;

/// Expected transfer time from which on the LAN is asked again for further holders.
const MIN_TIME_TO_ASK: Duration = Duration::from_millis(50);
/// Minimum interval between two such queries for one NAR.
const HOLDER_QUERY_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum wait for the answers to such a query.
const HOLDER_QUERY_TIMEOUT: Duration = Duration::from_millis(20);

/// A NAR is left to the upstream cache only if its rest takes longer from peers than this plus
/// twice the time of the whole NAR from upstream.
const UPSTREAM_GRACE: Duration = Duration::from_secs(2);

/// Maximum time for the first piece from any of the relays that a holder named. After it, the
/// holder is asked again. Relays may wait for further relays, so this ends before the NAR's own
/// deadline.
const RELAY_TIMEOUT: Timeout = Timeout::from_secs(5);
/// A relay is left after this time, multiplied by its position in the chain, without a byte or
/// while the holder is twice as fast. Also the interval at which the holder is asked for its pace,
/// and the timeout of that request.
const RELAY_STEP: Timeout = Timeout::from_secs(1);
/// Maximum time for a holder to return digests. It may have to hash the pieces first.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(5);

/// Interval of the checks whether another peer or the upstream cache is faster.
const CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Time waited for a peer over which its pace must be [`MIN_BYTES_PER_SECOND`] or more. Slower peers are left.
const PACE_WINDOW: Timeout = Timeout::from_secs(5);

/// Maximum wait for the first byte if there may be another peer; otherwise [`READ_TIMEOUT`].
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum time for the rest of a NAR that is not supported, whose hash shows whether the peer
/// invented the unsupported bytes. Nix gets nothing meanwhile. A peer that takes longer counts as
/// too slow, because a liar could take any time.
const UNSUPPORTED_TIMEOUT: Timeout = Timeout::from_secs(10);

/// If Nix did not read for this long, a stream that then breaks is not counted against the peer.
const LONG_PAUSE: Duration = Duration::from_secs(20);

/// The sources of one NAR, and the peer that is currently sending.
pub(super) struct FailoverReader<'a> {
    downloader: &'a Downloader,
    found: FoundNar,
    hash_part: HashPart,
    /// Counts this transfer in the statistics.
    transfer: TransferGuard<'a>,
    search: Option<HolderSearch>,
    searches: u32,
    tries: u32,
    /// The last peer that was busy or broke off, to be asked again if no other is left.
    retry_source: Option<NarSource>,
    /// How often a peer that is busy, or that breaks off, may still be asked again.
    busy_left: u32,
    broken_left: u32,
    moves_left: u32,
    /// The faster peer for which the last one was left.
    faster_peer: Option<PeerKey>,
    /// Whether the NAR may be left to the upstream cache. False if that happened lately, and Nix
    /// asked here again.
    may_leave: bool,
    /// When the LAN was last asked for further holders.
    last_holder_query: Option<Instant>,
    /// Whether a holder may name relays. True until a holder has named some, so that no two nodes
    /// wait for each other.
    accepts_relays: bool,
    /// Relays that a holder named, each with that holder. The last one is asked first.
    relays: Vec<(NarSource, SocketAddr)>,
    /// Deadline for the first piece from a relay that a holder named; `None` once it is there.
    relay_deadline: Option<Instant>,
    current: Option<ActiveSource<'a>>,
    contributors: Vec<Contributor>,
    mismatches: Vec<DigestMismatch>,
    /// Deadline for the first piece; `None` once it is there. Later, the deadline for the rest of
    /// an unsupported NAR.
    deadline: Option<Instant>,
}

/// A peer that may have sent a part of the NAR.
struct Contributor {
    peer_key: PeerKey,
    /// Its stream failed.
    has_failed: bool,
}

/// A relay sent a piece that does not match the holder's digest. The whole NAR's hash shows later
/// which of the two was wrong.
struct DigestMismatch {
    relay: PeerKey,
    holder: PeerKey,
    began: Instant,
    /// Offset of the piece in the NAR, and its SHA-256 according to the holder.
    offset: u64,
    digest: [u8; 32],
    /// Whether the digest matched the piece that was accepted; `None` until that piece is there.
    holder_is_right: Option<bool>,
}

/// The peer that is currently sending.
struct ActiveSource<'a> {
    source: NarSource,
    body: NarBody,
    incoming_nar: IncomingNar<'a>,
    counted: Option<CountedTransfer<'a>>,
    began: Instant,
    last_read: Instant,
    /// When the current or last read began.
    read_began: Instant,
    /// Time between the last two reads, in which Nix took no bytes.
    pause: Duration,
    /// Time waited for the peer in the current [`PACE_WINDOW`], and bytes received in it.
    waited: Duration,
    received: u64,
    /// Total time waited for the peer.
    total_wait: Duration,
    /// Time waited since the last check for a faster source.
    unchecked_wait: Duration,
    /// Set if the peer is a relay: the holder's digests, with which its pieces are compared.
    digests: Option<PieceDigests>,
}

/// Digests of pieces according to a holder.
struct PieceDigests {
    holder: SocketAddr,
    /// Index of the piece to which the first entry of `entries` belongs.
    first: u64,
    entries: Vec<[u8; 32]>,
    /// Position of the relay in the chain, from 1: one more than the named relays not yet asked.
    position: u32,
    /// When the holder was last asked for its pace, and since when it is twice as fast as the
    /// relay.
    asked: Instant,
    slow_since: Option<Instant>,
}

/// A transfer that a tracker counts. Dropping it reports the received bytes to the tracker.
struct CountedTransfer<'a> {
    downloader: &'a Downloader,
    transfer: TransferName,
    bytes: u64,
}

impl Drop for CountedTransfer<'_> {
    fn drop(&mut self) {
        self.downloader.lookup.report(&self.transfer, Role::Receiver, self.bytes);
    }
}

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
    fn failed(fault: Fault, why: impl fmt::Display) -> Self {
        StreamError::Failed(fault, why.to_string())
    }
}

impl<'a> FailoverReader<'a> {
    /// Sends no request yet. `deadline` is that of the first piece. `may_leave`: the NAR may be
    /// left to the upstream cache.
    pub(super) fn new(
        downloader: &'a Downloader,
        found: FoundNar,
        deadline: Instant,
        may_leave: bool,
    ) -> Self {
        let transfer = downloader.stats.begin_receive(found.path.base_name(), found.nar_size);
        let found_size = found.nar_size;
        FailoverReader {
            downloader,
            hash_part: found.path.hash_part(),
            found,
            transfer,
            search: None,
            searches: 0,
            tries: 0,
            retry_source: None,
            busy_left: MAX_BUSY,
            broken_left: MAX_BROKEN,
            moves_left: MAX_MOVES,
            faster_peer: None,
            may_leave,
            last_holder_query: None,
            accepts_relays: found_size >= spool::MIN_SIZE,
            relays: Vec::new(),
            relay_deadline: None,
            current: None,
            contributors: Vec::new(),
            mismatches: Vec::new(),
            deadline: Some(deadline),
        }
    }

    /// The peer that is currently sending.
    pub(super) fn current(&self) -> Option<&NarSource> {
        self.current.as_ref().map(|current| &current.source)
    }

    /// Gets the first piece, from any peer. If it is the whole NAR, its hash is right. Blocks until
    /// the deadline of [`FailoverReader::new`] at most.
    ///
    /// # Errors
    /// Returns [`DownloadError::NoPeer`] if no peer sends the piece in time, or
    /// [`DownloadError::Upstream`].
    pub(super) fn first_piece(&mut self) -> Result<(VerifiedStream, Piece), DownloadError> {
        let mut incoming = VerifiedStream::new(self.found.nar_hash, self.found.nar_size);
        let mut piece = incoming.piece();
        loop {
            self.connect(0)?
                .ok_or_else(|| DownloadError::NoPeer("no peer begins to send".into()))?;
            let filled = self.fill(&mut incoming, &mut piece);
            match filled.and_then(|()| check_first_piece(&incoming, &piece)) {
                Ok(()) => {
                    self.judge_mismatches(0, &piece);
                    (self.deadline, self.relay_deadline) = (None, None);
                    return Ok((incoming, piece));
                }
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.drop_current(&broken, 0),
            }
            // Nix has no bytes yet, so the next peer can start at byte 0.
            incoming = VerifiedStream::new(self.found.nar_hash, self.found.nar_size);
            piece = incoming.piece();
            self.contributors.clear();
        }
    }

    /// Gets the next piece from any peer. Blocks until it is there or no peer is left.
    ///
    /// # Errors
    /// Returns [`DownloadError::NoPeer`] if no peer is left, [`DownloadError::Wrong`] if the bytes
    /// are not part of a NAR, [`DownloadError::Unsupported`] if the rest of an unsupported NAR is
    /// late, or [`DownloadError::Upstream`].
    pub(super) fn next_piece(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), DownloadError> {
        loop {
            let offset = incoming.received();
            if self.current.is_none() && self.connect(offset)?.is_none() {
                let hash = self.found.nar_hash;
                let why =
                    format!("NAR {hash}: no peer left at byte {offset} of {}", self.found.nar_size);
                log::warn!("{why}");
                return Err(DownloadError::NoPeer(why));
            }
            match self.fill(incoming, piece) {
                Ok(()) => {
                    self.judge_mismatches(offset, piece);
                    return Ok(());
                }
                // Bytes before the malformed ones may be wrong, too, and Nix has them: no other
                // peer can continue.
                Err(StreamError::Failed(Fault::BadData, why)) => {
                    return Err(DownloadError::Wrong(why));
                }
                Err(StreamError::Late) => {
                    let why = "the rest of an unsupported NAR is late";
                    let slow = StreamError::failed(Fault::BrokenStream, why);
                    self.drop_current(&slow, incoming.received());
                    return Err(DownloadError::Unsupported(why.into()));
                }
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.drop_current(&broken, incoming.received()),
            }
        }
    }

    /// Reads the rest of `piece` from the current peer.
    fn fill(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        if self.current.as_ref().is_some_and(|current| current.digests.is_some()) {
            return self.fill_compared(incoming, piece);
        }
        while incoming.rest() > 0 {
            let skip = self.current.as_ref().map_or(0, |current| current.body.skip);
            // Skipped bytes go to the same place and are overwritten.
            let room = piece.room(if skip > 0 { skip } else { incoming.rest() });
            if room.is_empty() {
                break;
            }
            let received = self.read(room, incoming.received(), incoming.rest())?;
            if skip > 0 {
                if let Some(current) = &mut self.current {
                    current.body.skip -= received as u64;
                }
                continue;
            }
            self.accept_bytes(incoming, piece, received)?;
        }
        self.broken_left = MAX_BROKEN;
        Ok(())
    }

    /// Reads a whole piece from a relay, and accepts it if it matches the holder's digest.
    fn fill_compared(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        let (offset, rest) = (incoming.received(), incoming.rest());
        let len = piece.room(rest).len();
        let mut filled = 0;
        while filled < len {
            let room = &mut piece.room(rest)[filled..];
            filled += self.read(room, offset + filled as u64, rest - filled as u64)?;
        }
        let digest = self.digest(offset / PIECE as u64)?;
        if ring::digest::digest(&SHA256, piece.room(rest)).as_ref() != digest {
            return Err(StreamError::WrongPiece(digest));
        }
        // The digest matched, so the holder has the same malformed bytes.
        self.accept_bytes(incoming, piece, len)
    }

    /// Adds `bytes` received bytes to the piece. The first unsupported ones after the first piece
    /// set the deadline for the rest.
    fn accept_bytes(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
        bytes: usize,
    ) -> Result<(), StreamError> {
        incoming.accept_bytes(piece, bytes).map_err(|e| StreamError::failed(Fault::BadData, e))?;
        if incoming.unsupported().is_some() {
            self.deadline.get_or_insert_with(|| Instant::now() + UNSUPPORTED_TIMEOUT.get());
        }
        self.transfer.set_progress(incoming.received());
        Ok(())
    }

    /// Compares the accepted piece at byte `offset` with the digests that relays did not match.
    fn judge_mismatches(&mut self, offset: u64, piece: &Piece) {
        for mismatch in self.mismatches.iter_mut().filter(|mismatch| mismatch.offset == offset) {
            mismatch.holder_is_right =
                Some(ring::digest::digest(&SHA256, piece.bytes()).as_ref() == mismatch.digest);
        }
    }

    /// The SHA-256 of a piece according to the holder, which is asked if the list does not have it.
    fn digest(&mut self, piece: u64) -> Result<[u8; 32], StreamError> {
        let left = self.relay_time_left(Instant::now());
        let Some(digests) = self.current.as_mut().and_then(|current| current.digests.as_mut())
        else {
            return Err(StreamError::Unchecked(false, "not compared".into()));
        };
        let index = piece.checked_sub(digests.first).and_then(|index| usize::try_from(index).ok());
        if let Some(digest) = index.and_then(|index| digests.entries.get(index)) {
            return Ok(*digest);
        }
        let name = nar_name(&self.hash_part, &self.found.nar_hash);
        let asked = self.downloader.client.digests(
            digests.holder,
            &name,
            piece,
            MAX_DIGESTS,
            DIGEST_TIMEOUT.min(left),
        );
        digests.first = piece;
        let unchecked = |e: PeerError| {
            StreamError::Unchecked(e.fault() == Some(Fault::BrokenPromise), e.to_string())
        };
        digests.entries = asked.map_err(unchecked)?.0;
        digests
            .entries
            .first()
            .copied()
            .ok_or_else(|| StreamError::Unchecked(true, "no digests".into()))
    }

    /// Reads at least one byte from the current peer. `rest` bytes of the NAR are missing, from
    /// byte `offset` on. Fails after [`READ_TIMEOUT`] without a byte.
    fn read(&mut self, room: &mut [u8], offset: u64, rest: u64) -> Result<usize, StreamError> {
        let began = Instant::now();
        let Some(current) = &mut self.current else {
            return Err(StreamError::failed(Fault::BrokenStream, "not connected"));
        };
        current.pause = began - current.last_read;
        current.read_began = began;
        current.incoming_nar.start_waiting(began);
        loop {
            let timeout = CHECK_INTERVAL.min(self.time_left(Instant::now()));
            let Some(current) = &mut self.current else { break };
            let before = Instant::now();
            let read = current.body.read_within(room, timeout);
            let now = Instant::now();
            current.unchecked_wait += now - before;
            current.total_wait += now - before;
            match read {
                Ok(Some(0)) => {
                    let why =
                        format_args!("stream ended at byte {offset} of {}", self.found.nar_size);
                    return Err(StreamError::failed(Fault::BrokenStream, why));
                }
                Ok(Some(received)) => {
                    self.record_received(received as u64, began, now);
                    self.check_pace(now, rest - (received as u64).min(rest))?;
                    return Ok(received);
                }
                Ok(None) if now - began >= READ_TIMEOUT.get() => {
                    return Err(StreamError::failed(
                        Fault::BrokenStream,
                        format_args!("sent nothing more at byte {offset}"),
                    ));
                }
                Ok(None) => {
                    // The checks may query other peers or upstream. That time does not count as
                    // this peer's.
                    current.incoming_nar.stop_waiting(now);
                    self.check_pace(now, rest)?;
                    if let Some(current) = &mut self.current {
                        current.incoming_nar.start_waiting(Instant::now());
                    }
                }
                Err(e) => {
                    return Err(StreamError::failed(
                        Fault::BrokenStream,
                        format_args!("stream broke at byte {offset}: {e}"),
                    ));
                }
            }
        }
        Err(StreamError::Late)
    }

    /// Counts received bytes, and the wait for them since `began`.
    fn record_received(&mut self, received: u64, began: Instant, now: Instant) {
        let Some(current) = &mut self.current else { return };
        current.last_read = now;
        current.incoming_nar.record_bytes(received, now);
        current.waited += now - began;
        current.received += received;
        self.transfer.record_bytes(received);
        if let Some(counted) = &mut current.counted {
            counted.bytes += received;
        }
    }

    /// Returns an error if the current peer is to be left. `rest` bytes of the NAR are missing.
    fn check_pace(&mut self, now: Instant, rest: u64) -> Result<(), StreamError> {
        if self.deadline.is_some_and(|deadline| now >= deadline) {
            return Err(StreamError::Late);
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        if current.waited >= PACE_WINDOW.get() {
            let pace = (current.received as f64 / current.waited.as_secs_f64()) as u64;
            if pace < MIN_BYTES_PER_SECOND {
                return Err(StreamError::failed(
                    Fault::BrokenStream,
                    format_args!("too slow, {pace} bytes a second"),
                ));
            }
            (current.waited, current.received) = (Duration::ZERO, 0);
        }
        if rest == 0 || current.unchecked_wait < CHECK_INTERVAL {
            return Ok(());
        }
        current.unchecked_wait = Duration::ZERO;
        let load = current.incoming_nar.load(now);
        let own = current.incoming_nar.own_pace(now);
        if current.digests.is_some() {
            return self.check_relay(own, now);
        }
        let waited = current.total_wait;
        if self.moves_left > 0 && waited >= picker::MIN_WAIT {
            self.find_holders(rest as f64 / load.pace.known.unwrap_or(load.pace.measured));
            let (indices, others) = self.holders(now);
            // The last allowed move only goes to a peer whose pace is known.
            let is_fit =
                |holder: &HolderFacts| self.moves_left > 1 || holder.load.pace.known.is_some();
            let (indices, others): (Vec<usize>, Vec<HolderFacts>) =
                indices.into_iter().zip(others).filter(|(_, holder)| is_fit(holder)).unzip();
            if let Some(at) = picker::faster(&load, waited, rest, &others) {
                self.faster_peer = Some(self.found.sources[indices[at]].peer_key());
                return Err(StreamError::Slow(format!(
                    "slow ({load}), another has {}",
                    others[at].load
                )));
            }
        }
        match picker::time_left(&load, own.lasting, rest)
            .and_then(|time| self.upstream_is_faster(time))
        {
            // If upstream was slow to answer, the next check decides, with what the peer sent
            // meanwhile.
            Some(why) if now.elapsed() < CHECK_INTERVAL => Err(StreamError::Upstream(why)),
            _ => Ok(()),
        }
    }

    /// Returns an error if the current peer, a relay, is to be left for the holder. A slow relay
    /// slows all behind it in the chain. The node next to it leaves it first, so that the others,
    /// whose limits are longer, become fast again and stay.
    fn check_relay(&mut self, own: PaceEstimate, now: Instant) -> Result<(), StreamError> {
        if self.relay_time_left(now).is_zero() {
            return Err(StreamError::Slow("the first piece has not come in time".into()));
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        let silent = now.saturating_duration_since(current.read_began.max(current.last_read));
        let Some(digests) = &mut current.digests else { return Ok(()) };
        if silent >= RELAY_STEP.get() * digests.position {
            return Err(StreamError::Slow(format!("nothing came for {silent:.1?}")));
        }
        if now.saturating_duration_since(digests.asked) < RELAY_STEP.get() || own.waited.is_zero() {
            return Ok(());
        }
        digests.asked = now;
        let name = nar_name(&self.hash_part, &self.found.nar_hash);
        let holder_pace =
            match self.downloader.client.digests(digests.holder, &name, 0, 1, RELAY_STEP.get()) {
                Ok((_, Some(holder_pace))) => holder_pace,
                _ => return Ok(()),
            };
        let relay_pace = own.known.unwrap_or(own.measured);
        if holder_pace < 2.0 * relay_pace {
            digests.slow_since = None;
            return Ok(());
        }
        let since = *digests.slow_since.get_or_insert(now);
        if now.saturating_duration_since(since) < RELAY_STEP.get() * digests.position {
            return Ok(());
        }
        Err(StreamError::Slow(format!(
            "{:.0} KiB/s, the holder has {:.0} KiB/s",
            relay_pace / 1024.0,
            holder_pace / 1024.0
        )))
    }

    /// The reason why the upstream cache is certain to be faster than a peer that needs `time` for
    /// the rest; `None` if it is not. Blocks for at most two requests to upstream, and never beyond
    /// the deadline of the first piece.
    fn upstream_is_faster(&mut self, time: Duration) -> Option<String> {
        if !self.may_leave || time <= UPSTREAM_GRACE {
            return None;
        }
        let upstream_time =
            self.downloader.upstream.time(&self.found, self.time_left(Instant::now()))?;
        let why = || {
            format!(
                "{time:.1?} more from the best peer, {upstream_time:.1?} from the upstream cache"
            )
        };
        (time > UPSTREAM_GRACE + 2 * upstream_time).then(why)
    }

    /// Indices of the known sources that may be asked, and what is known of each.
    fn holders(&self, now: Instant) -> (Vec<usize>, Vec<HolderFacts>) {
        let health = &self.downloader.health;
        let holder = |(index, source): (usize, &NarSource)| {
            let peer_key = source.peer_key();
            let health = match health.eligibility(peer_key, now) {
                Eligibility::Now if health.has_many_odd_paths(peer_key, now) => {
                    HealthRank::LastResort
                }
                Eligibility::Now if !health.is_doubtful(peer_key) => HealthRank::Good,
                Eligibility::Now => HealthRank::Doubtful,
                Eligibility::Last => HealthRank::LastResort,
                Eligibility::Never => return None,
            };
            Some((index, HolderFacts { health, load: self.downloader.paces.load(peer_key, now) }))
        };
        self.found.sources.iter().enumerate().filter_map(holder).unzip()
    }

    /// Asks the LAN for further holders if the rest takes [`MIN_TIME_TO_ASK`] or longer. Blocks for
    /// [`HOLDER_QUERY_TIMEOUT`] at most.
    fn find_holders(&mut self, seconds: f64) {
        let now = Instant::now();
        let is_early = self
            .last_holder_query
            .is_some_and(|at| now.saturating_duration_since(at) < HOLDER_QUERY_INTERVAL);
        if is_early || seconds < MIN_TIME_TO_ASK.as_secs_f64() {
            return;
        }
        self.last_holder_query = Some(now);
        let left = HOLDER_QUERY_TIMEOUT.min(self.time_left(now));
        for source in self.downloader.lookup.holders(&self.hash_part, left) {
            let is_same = |known: &NarSource| known.peer.ip() == source.peer.ip();
            if !self.found.sources.iter().chain(self.current()).any(is_same) {
                self.found.sources.push(source);
            }
        }
    }

    /// Connects to the best source at byte `offset`. Returns `None` if there is none.
    fn connect(&mut self, offset: u64) -> Result<Option<()>, DownloadError> {
        while offset == 0
            && let Some((relay, holder)) = self.relays.pop()
        {
            let now = Instant::now();
            let timeout = self.relay_time_left(now);
            if timeout.is_zero() {
                self.relays.clear();
                break;
            }
            if self.request(relay, offset, timeout, "it is getting the NAR, too", Some(holder)) {
                return Ok(Some(()));
            }
        }
        while self.tries < MAX_TRIES {
            let rest = self.found.nar_size - offset;
            let Some((source, why)) = self.next_source(rest) else { break };
            // Checked before the request: a NAR of a peer that is known to be slow need not wait
            // for it.
            let load = self.downloader.paces.load(source.peer_key(), Instant::now());
            let time = picker::time_left(&load.with(rest), None, rest);
            if let Some(why) = time.and_then(|time| self.upstream_is_faster(time)) {
                return Err(DownloadError::Upstream(why));
            }
            let timeout =
                if self.may_have_another() { FIRST_BYTE_TIMEOUT } else { READ_TIMEOUT.get() };
            let timeout = timeout.min(self.time_left(Instant::now()));
            if timeout.is_zero() {
                break;
            }
            self.tries += 1;
            if self.request(source, offset, timeout, &why, None) {
                return Ok(Some(()));
            }
            if !self.relays.is_empty() {
                return self.connect(offset);
            }
        }
        Ok(None)
    }

    /// Requests the NAR from byte `offset` on. Returns false if the peer does not begin to send
    /// within `timeout`. If `holder` is set, the source is a relay that this holder named.
    fn request(
        &mut self,
        mut source: NarSource,
        offset: u64,
        timeout: Duration,
        why: &str,
        holder: Option<SocketAddr>,
    ) -> bool {
        let (peer_key, began) = (source.peer_key(), Instant::now());
        let (hash, peer) = (self.found.nar_hash, source.peer);
        let mut incoming_nar =
            self.downloader.paces.begin(peer_key, self.found.nar_size - offset, began);
        if holder.is_some() {
            // A relay may wait for its own source before it answers.
            incoming_nar.stop_waiting(began);
        }
        let url_path = source.nar_path(&self.hash_part, &self.found.nar_hash);
        let mut link = source.take_link_kind();
        if link == LinkKind::Lan
            && source.friend.is_none()
            && self.accepts_relays
            && offset == 0
            && holder.is_none()
        {
            link = LinkKind::LanOrOthers;
        }
        let client = source.client(&self.downloader.client);
        match client.nar(peer, &url_path, offset, self.found.nar_size, timeout, &link) {
            Ok(body) => {
                log::debug!("NAR {hash}: from peer {peer} at byte {offset}: {why}");
                if offset > 0 {
                    log::info!("NAR {hash}: continued from peer {peer} at byte {offset}");
                }
                // The holder's digests confirm a relay's pieces, so the holder is the contributor.
                let peer_key = holder.map_or(peer_key, PeerKey::from);
                if !self.contributors.iter().any(|contributor| contributor.peer_key == peer_key) {
                    self.contributors.push(Contributor { peer_key, has_failed: false });
                }
                self.transfer.set_peer(source.network(), peer);
                self.transfer.set_reason(why);
                let counted = match link {
                    LinkKind::Wan(Some(transfer)) => {
                        Some(CountedTransfer { downloader: self.downloader, transfer, bytes: 0 })
                    }
                    _ => None,
                };
                self.current = Some(ActiveSource {
                    source,
                    body,
                    incoming_nar,
                    counted,
                    began,
                    last_read: Instant::now(),
                    read_began: Instant::now(),
                    pause: Duration::ZERO,
                    waited: Duration::ZERO,
                    received: 0,
                    total_wait: Duration::ZERO,
                    unchecked_wait: Duration::ZERO,
                    digests: holder.map(|holder| PieceDigests {
                        holder,
                        first: 0,
                        entries: Vec::new(),
                        position: self.relays.len() as u32 + 1,
                        asked: Instant::now(),
                        slow_since: None,
                    }),
                });
                return true;
            }
            Err(PeerError::Named(ips)) => {
                self.accepts_relays = false;
                self.relay_deadline = Some(Instant::now() + RELAY_TIMEOUT.get());
                log::debug!("NAR {hash}: peer {peer} names {ips:?}");
                let mut relays = self.downloader.lookup.live_neighbours(&ips);
                relays
                    .retain(|relay| self.is_good(relay.peer_key()) && relay.peer_key() != peer_key);
                let mut seen = HashSet::new();
                relays.retain(|relay| seen.insert(relay.peer_key()));
                self.relays = relays.into_iter().map(|relay| (relay, peer)).collect();
                self.found.sources.push(source);
            }
            // The relay has not begun its download, or cannot pass it on.
            Err(e) if holder.is_some() => log::debug!("NAR {hash}: peer {peer}: {e}"),
            Err(PeerError::Busy) => {
                if let Some(left) = self.busy_left.checked_sub(1) {
                    self.busy_left = left;
                    self.retry_source = Some(source);
                }
            }
            // The peer only answered that it has the path. It may have another NAR, or the same one
            // at another URL, as the Python peerix has. Its narinfo tells.
            Err(PeerError::NotThere)
                if source.url_path.is_none() && source.wan.is_none() && source.friend.is_none() =>
            {
                log::debug!("NAR {hash}: peer {peer} has it elsewhere, or another one");
                let left = timeout.min(self.time_left(Instant::now()));
                match self.downloader.lookup.locate_nar(peer, &self.found, left) {
                    Some(elsewhere) if elsewhere.url_path.is_some() => {
                        self.found.sources.push(elsewhere)
                    }
                    Some(_) => {
                        let why = "says that it has a NAR, and has not";
                        self.record_failure(peer_key, Fault::BrokenPromise, began, &why);
                    }
                    None => {}
                }
            }
            Err(e) => {
                log::debug!("NAR {hash}: peer {peer}: {e}");
                e.record(&self.downloader.health, peer_key, began);
            }
        }
        false
    }

    /// Records the failure of a request that began at `began`.
    fn record_failure(
        &self,
        peer_key: PeerKey,
        fault: Fault,
        began: Instant,
        why: &dyn fmt::Display,
    ) {
        self.downloader.health.record_failure(peer_key, fault, began, Instant::now(), why);
    }

    /// Whether no recent failure of the peer is on record.
    fn is_good(&self, peer_key: PeerKey) -> bool {
        let health = &self.downloader.health;
        health.eligibility(peer_key, Instant::now()) == Eligibility::Now
            && !health.is_doubtful(peer_key)
    }

    /// Time until the deadline of the first piece; [`Duration::MAX`] once that is there.
    fn time_left(&self, now: Instant) -> Duration {
        time_left(self.deadline, now)
    }

    /// Time left for relays and digests: until the deadline for relays or that of
    /// [`FailoverReader::time_left`], whichever is earlier.
    fn relay_time_left(&self, now: Instant) -> Duration {
        self.time_left(now).min(time_left(self.relay_deadline, now))
    }

    fn may_have_another(&self) -> bool {
        !self.found.sources.is_empty() || self.downloader.lookup.has_trackers()
    }

    /// Removes the best source from the known ones, and returns it with the reason for the choice.
    fn next_source(&mut self, rest: u64) -> Option<(NarSource, String)> {
        // The pace of the peer that was left is smoothed, so it may still look best.
        let faster_peer = self.faster_peer.take();
        let sources = &mut self.found.sources;
        if let Some(index) =
            sources.iter().position(|source| Some(source.peer_key()) == faster_peer)
        {
            return Some((sources.swap_remove(index), "twice as fast as the last one".into()));
        }
        if let Some(best) = self.best_source(rest) {
            return Some(best);
        }
        if let Some(source) = self.next_searched_source() {
            return Some((source, "the only one found by another search".into()));
        }
        let source = self.retry_source.take()?;
        thread::sleep(RETRY_DELAY.min(self.time_left(Instant::now())));
        Some((source, "asked again, as there is no other".into()))
    }

    fn best_source(&mut self, bytes: u64) -> Option<(NarSource, String)> {
        let (_, holders) = self.holders(Instant::now());
        let choice = picker::choose(&holders, bytes)?;
        self.find_holders(choice.expected.as_secs_f64());
        let (indices, holders) = self.holders(Instant::now());
        let choice = picker::choose(&holders, bytes)?;
        let why = format!("best of {}: {}", holders.len(), holders[choice.index].load);
        Some((self.found.sources.swap_remove(indices[choice.index]), why))
    }

    /// Returns a further source from a search that checks narinfos.
    fn next_searched_source(&mut self) -> Option<NarSource> {
        let deadline = self.deadline.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
        loop {
            if let Some(search) = &mut self.search
                && let Some(source) =
                    self.downloader.lookup.next_source(search, &self.found, deadline)
            {
                // The next source is wanted only if this one fails.
                search.suspend();
                return Some(source);
            }
            if self.searches >= MAX_SEARCHES || Instant::now() >= deadline {
                return None;
            }
            self.searches += 1;
            self.search = Some(self.downloader.lookup.search(&self.hash_part));
        }
    }

    /// Drops the current peer at byte `offset`, and records its fault if it has one.
    fn drop_current(&mut self, broken: &StreamError, offset: u64) {
        let Some(current) = self.current.take() else { return };
        let (hash, peer) = (self.found.nar_hash, current.source.peer);
        let (peer_key, began) = (current.source.peer_key(), current.began);
        match broken {
            StreamError::WrongPiece(digest) => {
                log::debug!(
                    "NAR {hash}: peer {peer} passed on another piece than the holder has, at byte {offset}"
                );
                let holder = current.digests.as_ref().map(|digests| PeerKey::from(digests.holder));
                self.mismatches.extend(holder.map(|holder| DigestMismatch {
                    relay: peer_key,
                    holder,
                    began,
                    offset,
                    digest: *digest,
                    holder_is_right: None,
                }));
            }
            // The holder named relays, so it has to return digests.
            StreamError::Unchecked(is_broken, why) => {
                self.relays.clear();
                if let Some(digests) = &current.digests {
                    log::debug!("NAR {hash}: peer {} does not tell digests: {why}", digests.holder);
                    if *is_broken {
                        let holder = digests.holder.into();
                        self.record_failure(holder, Fault::BrokenPromise, began, why);
                    }
                }
            }
            StreamError::Failed(Fault::OddPath, why) => {
                self.downloader.client.log_unsupported_path(&self.hash_part, peer, why);
                self.record_failure(peer_key, Fault::OddPath, began, why);
            }
            // A relay may have lost its own source, or its Nix was stopped, so it is not blamed.
            StreamError::Failed(_, why) | StreamError::Slow(why) if current.digests.is_some() => {
                log::debug!(
                    "NAR {hash}: leaves peer {peer}, which is getting it, at byte {offset}: {why}"
                );
            }
            StreamError::Slow(why) => {
                log::debug!("NAR {hash}: leaves peer {peer} at byte {offset}: {why}");
                self.moves_left -= 1;
                self.found.sources.push(current.source);
            }
            // The caller leaves the NAR to the upstream cache.
            StreamError::Upstream(_) => {}
            StreamError::Late => {
                log::debug!("NAR {hash}: the first piece has not come in time from peer {peer}")
            }
            StreamError::Failed(Fault::BrokenStream, why) if current.pause >= LONG_PAUSE => {
                log::debug!("NAR {hash}: peer {peer} closed in a pause: {why}");
                self.found.sources.push(current.source);
            }
            StreamError::Failed(fault, why) => {
                log::debug!("NAR {hash}: peer {peer}: {why}");
                let its = self.contributors.iter_mut().filter(|c| c.peer_key == peer_key);
                its.for_each(|c| c.has_failed = true);
                self.record_failure(peer_key, *fault, began, why);
                if *fault == Fault::BrokenStream
                    && let Some(left) = self.broken_left.checked_sub(1)
                {
                    self.broken_left = left;
                    self.retry_source = Some(current.source);
                }
            }
        }
    }

    /// Records that the NAR is wrong. Nix has a part of it already, and which peer sent the wrong
    /// bytes is unknown. Peers whose streams failed get the greater fault. If none failed, as the
    /// NAR moved to faster peers, all get it.
    pub(super) fn record_wrong_nar(&mut self, why: &dyn fmt::Display) {
        self.transfer.record_failure();
        for (peer, fault) in faults_of(&self.contributors) {
            self.record_failure(peer, fault, Instant::now(), why);
        }
    }

    /// Records that the whole NAR has the right hash but is not supported. That is no peer's fault.
    pub(super) fn record_unsupported(&mut self, why: Malformed) {
        self.drop_current(&StreamError::failed(Fault::OddPath, why), self.found.nar_size);
        self.record_failed();
    }

    /// Records that no peer could deliver the NAR.
    pub(super) fn record_failed(&self) {
        self.transfer.record_failure();
    }

    /// Records that the whole NAR arrived and its hash is right.
    pub(super) fn record_delivered(&mut self) {
        let now = Instant::now();
        if let Some(mut current) = self.current.take() {
            current.incoming_nar.record_proven();
            current.body.finish();
        }
        let peers: Vec<String> =
            self.contributors.iter().map(|contributor| contributor.peer_key.to_string()).collect();
        log::debug!(
            "{}: NAR of {} bytes from peer {}",
            self.hash_part,
            self.found.nar_size,
            peers.join(" and ")
        );
        self.contributors.iter().for_each(|Contributor { peer_key, .. }| {
            self.downloader.health.record_delivered(*peer_key, now);
            self.downloader.stats.record_delivered(peer_key.network(), peer_key.address());
        });
        for mismatch in &self.mismatches {
            let (peer, why) = match mismatch.holder_is_right {
                Some(true) => (mismatch.relay, "passed on another piece than the holder has"),
                Some(false) => (mismatch.holder, "told a wrong digest"),
                None => continue,
            };
            self.record_failure(peer, Fault::BadData, mismatch.began, &why);
        }
        self.transfer.record_whole();
    }
}

/// Checks a first piece, of which Nix has nothing yet. So it need not be known whether the peer
/// invented unsupported bytes in it: another peer is asked from the beginning.
fn check_first_piece(incoming: &VerifiedStream, piece: &Piece) -> Result<(), StreamError> {
    if incoming.rest() == 0 && !incoming.is_right(piece) {
        return Err(StreamError::failed(Fault::BadData, "sent a NAR with another hash"));
    }
    incoming.unsupported().map_or(Ok(()), |why| Err(StreamError::failed(Fault::OddPath, why)))
}

fn time_left(deadline: Option<Instant>, now: Instant) -> Duration {
    deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(now))
}

/// The fault of each peer that may have sent a part of a wrong NAR.
fn faults_of(contributors: &[Contributor]) -> Vec<(PeerKey, Fault)> {
    let is_known = contributors.iter().any(|contributor| contributor.has_failed);
    let fault = |contributor: &Contributor| {
        if is_known && !contributor.has_failed { Fault::BrokenPromise } else { Fault::BadData }
    };
    contributors.iter().map(|contributor| (contributor.peer_key, fault(contributor))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{downloader, odd_nar, peer_with};
    use super::*;

    fn contributor(last: u8, has_failed: bool) -> Contributor {
        Contributor { peer_key: PeerKey::from(SocketAddr::from(([10, 0, 0, last], 1))), has_failed }
    }

    /// Regression test: the deadline for the first piece from a relay, which had passed, cut the
    /// rest of an unsupported NAR.
    #[test]
    fn first_piece_ends_its_deadlines_for_relays() {
        let (downloader, now) = (downloader(), Instant::now());
        let (found, serving) = peer_with(odd_nar(2 << 20), None, usize::MAX);
        let [two, five] = [2, 5].map(|seconds| now + Duration::from_secs(seconds));
        let mut reader = FailoverReader::new(&downloader, found, five, false);
        assert_eq!(reader.relay_time_left(two), Duration::from_secs(3));
        reader.relay_deadline = Some(two);
        assert_eq!(reader.relay_time_left(now), Duration::from_secs(2));
        (reader.deadline, reader.relay_deadline) = (Some(now + Duration::from_secs(60)), Some(now));
        let (mut incoming, _) = reader.first_piece().unwrap();
        assert_eq!(reader.relay_time_left(Instant::now()), Duration::MAX);
        while incoming.unsupported().is_none() {
            let mut piece = incoming.piece();
            reader.next_piece(&mut incoming, &mut piece).unwrap();
        }
        let left = reader.relay_time_left(Instant::now());
        assert!(!left.is_zero() && left <= UNSUPPORTED_TIMEOUT.get(), "{left:?}");
        serving.join().unwrap();
    }

    #[test]
    fn wrong_nar_blames_failed_peers_or_all() {
        let faults = |contributors: &[Contributor]| -> Vec<Fault> {
            faults_of(contributors).into_iter().map(|(_, fault)| fault).collect()
        };
        let (bad, little) = (Fault::BadData, Fault::BrokenPromise);
        assert_eq!(faults(&[contributor(1, false)]), [bad]);
        assert_eq!(faults(&[contributor(1, true), contributor(2, false)]), [bad, little]);
        // The NAR moved to a faster peer: no stream failed, so both are suspects.
        assert_eq!(faults(&[contributor(1, false), contributor(2, false)]), [bad, bad]);
        assert_eq!(
            faults(&[contributor(1, false), contributor(2, true), contributor(3, false)]),
            [little, bad, little]
        );
    }
}
