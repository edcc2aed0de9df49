//! Reads the bytes of one NAR from the best peer, and continues with another peer at the same byte
//! when the current one fails or is slow.

use super::contributors::{Contributors, DigestMismatch};
use super::peer_stream::{CHECK_INTERVAL, StreamError};
use super::relay::RelayCheck;
use super::requests::{ActiveSource, NarRequests};
use super::verified::{PIECE, Piece, VerifiedStream};
use super::{DownloadError, Downloader};
use crate::lookup::{FoundNar, NarSource};
use crate::nix::Malformed;
use crate::peers::client::READ_TIMEOUT;
use crate::peers::health::{Fault, PeerKey};
use crate::peers::picker;
use crate::stats::TransferGuard;
use crate::time_scale::Timeout;
use ring::digest::{SHA256, digest};
use std::fmt;
use std::time::{Duration, Instant};

/// Maximum time for the rest of a NAR that is not supported, whose hash shows whether the peer
/// invented the unsupported bytes. Nix gets nothing meanwhile. A peer that takes longer counts as
/// too slow, because a liar could take any time.
const UNSUPPORTED_TIMEOUT: Timeout = Timeout::from_secs(10);

/// If Nix did not read for this long, a stream that then breaks is not counted against the peer.
const LONG_PAUSE: Duration = Duration::from_secs(20);

/// A download of one NAR from one peer after the other.
pub(super) struct FailoverReader<'a> {
    downloader: &'a Downloader,
    /// Counts this transfer in the statistics.
    transfer: TransferGuard<'a>,
    requests: NarRequests<'a>,
    /// The peer that sent the last piece.
    current: Option<ActiveSource<'a>>,
    contributors: Contributors,
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
        FailoverReader {
            downloader,
            transfer: downloader.stats.begin_receive(found.path.base_name(), found.nar_size),
            requests: NarRequests::new(downloader, found, deadline, may_leave),
            current: None,
            contributors: Contributors::default(),
        }
    }

    fn nar(&self) -> &FoundNar {
        &self.requests.sources.found
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
        loop {
            // Nix has no bytes yet, so each peer can start at byte 0.
            let mut incoming = VerifiedStream::new(self.nar().nar_hash, self.nar().nar_size);
            let mut piece = incoming.piece();
            self.contributors.forget_peers();
            let mut current = self
                .connect(0)?
                .ok_or_else(|| DownloadError::NoPeer("no peer begins to send".into()))?;
            let filled = self.fill(&mut current, &mut incoming, &mut piece);
            match filled.and_then(|()| check_first_piece(&incoming, &piece)) {
                Ok(()) => {
                    self.current = Some(current);
                    self.contributors.judge_mismatches(0, &piece);
                    self.requests.deadline = None;
                    self.requests.relays.iter_mut().for_each(|relays| relays.deadline = None);
                    return Ok((incoming, piece));
                }
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.leave(current, &broken, 0),
            }
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
            let connected = match self.current.take() {
                None => self.connect(offset)?,
                current => current,
            };
            let Some(mut current) = connected else {
                let FoundNar { nar_hash, nar_size, .. } = self.nar();
                let why = format!("NAR {nar_hash}: no peer left at byte {offset} of {nar_size}");
                log::warn!("{why}");
                return Err(DownloadError::NoPeer(why));
            };
            match self.fill(&mut current, incoming, piece) {
                Ok(()) => {
                    self.current = Some(current);
                    self.contributors.judge_mismatches(offset, piece);
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
                    self.leave(current, &slow, incoming.received());
                    return Err(DownloadError::Unsupported(why.into()));
                }
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.leave(current, &broken, incoming.received()),
            }
        }
    }

    /// Connects to the best source at byte `offset`. Returns `None` if there is none.
    fn connect(&mut self, offset: u64) -> Result<Option<ActiveSource<'a>>, DownloadError> {
        let connected = self.requests.connect(offset)?;
        if let Some(ActiveSource { source, reason, relay_check, .. }) = &connected {
            // The holder's digests confirm a relay's pieces, so the holder is the contributor.
            let holder = relay_check.as_ref().map(|check| check.holder.into());
            self.contributors.add(holder.unwrap_or(source.peer_key()));
            self.transfer.set_peer(source.network(), source.peer);
            self.transfer.set_reason(reason);
        }
        Ok(connected)
    }

    /// Reads the rest of `piece` from the current peer.
    fn fill(
        &mut self,
        current: &mut ActiveSource<'a>,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        if current.relay_check.is_some() {
            return self.fill_compared(current, incoming, piece);
        }
        while incoming.rest() > 0 {
            let skip = current.stream.body.skip;
            // Skipped bytes go to the same place and are overwritten.
            let room = piece.room(if skip > 0 { skip } else { incoming.rest() });
            if room.is_empty() {
                break;
            }
            let received = self.read(current, room, incoming.received(), incoming.rest())?;
            if skip > 0 {
                current.stream.body.skip -= received as u64;
                continue;
            }
            self.accept_bytes(incoming, piece, received)?;
        }
        self.requests.sources.reset_broken();
        Ok(())
    }

    /// Reads a whole piece from a relay, and accepts it if it matches the holder's digest.
    fn fill_compared(
        &mut self,
        current: &mut ActiveSource<'a>,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        let (offset, rest) = (incoming.received(), incoming.rest());
        let len = piece.room(rest).len();
        let mut filled = 0;
        while filled < len {
            let room = &mut piece.room(rest)[filled..];
            filled += self.read(current, room, offset + filled as u64, rest - filled as u64)?;
        }
        if let Some(check) = &mut current.relay_check {
            let left = self.requests.relay_time_left(Instant::now());
            let expected = check.digest(offset / PIECE as u64, left)?;
            if digest(&SHA256, piece.room(rest)).as_ref() != expected {
                return Err(StreamError::WrongPiece(expected));
            }
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
            self.requests
                .deadline
                .get_or_insert_with(|| Instant::now() + UNSUPPORTED_TIMEOUT.get());
        }
        self.transfer.set_progress(incoming.received());
        Ok(())
    }

    /// Reads at least one byte from the current peer. `rest` bytes of the NAR are missing, from
    /// byte `offset` on. Fails after [`READ_TIMEOUT`] without a byte.
    fn read(
        &mut self,
        current: &mut ActiveSource<'a>,
        room: &mut [u8],
        offset: u64,
        rest: u64,
    ) -> Result<usize, StreamError> {
        let broken = |why: fmt::Arguments| StreamError::failed(Fault::BrokenStream, why);
        let began = Instant::now();
        current.stream.begin_read(began);
        loop {
            let before = Instant::now();
            let timeout = CHECK_INTERVAL.min(self.requests.time_left(before));
            let read = current.stream.read_within(room, timeout, before);
            let now = Instant::now();
            match read {
                Ok(Some(0)) => {
                    let size = self.nar().nar_size;
                    return Err(broken(format_args!("stream ended at byte {offset} of {size}")));
                }
                Ok(Some(received)) => {
                    self.transfer.record_bytes(received as u64);
                    self.check_pace(current, now, rest - (received as u64).min(rest))?;
                    return Ok(received);
                }
                Ok(None) if now - began >= READ_TIMEOUT.get() => {
                    return Err(broken(format_args!("sent nothing more at byte {offset}")));
                }
                Ok(None) => {
                    // The checks may query other peers or upstream. That time does not count as
                    // this peer's.
                    current.stream.incoming_nar.stop_waiting(now);
                    self.check_pace(current, now, rest)?;
                    current.stream.incoming_nar.start_waiting(Instant::now());
                }
                Err(e) => {
                    return Err(broken(format_args!("stream broke at byte {offset}: {e}")));
                }
            }
        }
    }

    /// Returns an error if the current peer is to be left. `rest` bytes of the NAR are missing.
    fn check_pace(
        &mut self,
        current: &mut ActiveSource<'a>,
        now: Instant,
        rest: u64,
    ) -> Result<(), StreamError> {
        if self.requests.deadline.is_some_and(|deadline| now >= deadline) {
            return Err(StreamError::Late);
        }
        let ActiveSource { source, stream, relay_check, .. } = current;
        stream.check_min_pace()?;
        if rest == 0 || !stream.begin_check() {
            return Ok(());
        }
        let own = stream.incoming_nar.own_pace(now);
        if let Some(check) = relay_check {
            if self.requests.relay_time_left(now).is_zero() {
                return Err(StreamError::Slow("the first piece has not come in time".into()));
            }
            return check.check_pace(own, stream.silent_for(now), now);
        }
        let (load, waited) = (stream.incoming_nar.load(now), stream.total_wait);
        if let Some(why) = self.requests.sources.find_faster(
            source,
            &load,
            waited,
            rest,
            self.requests.deadline,
            now,
        ) {
            return Err(StreamError::Slow(why));
        }
        match picker::time_left(&load, own.lasting, rest)
            .and_then(|time| self.requests.upstream_is_faster(time))
        {
            // If upstream was slow to answer, the next check decides, with what the peer sent
            // meanwhile.
            Some(why) if now.elapsed() < CHECK_INTERVAL => Err(StreamError::Upstream(why)),
            _ => Ok(()),
        }
    }

    /// Leaves the current peer at byte `offset`, and records its fault if it has one.
    fn leave(&mut self, current: ActiveSource<'a>, broken: &StreamError, offset: u64) {
        let ActiveSource { source, began, stream, relay_check, .. } = current;
        let (hash, peer, peer_key) = (self.nar().nar_hash, source.peer, source.peer_key());
        match (broken, relay_check) {
            (StreamError::WrongPiece(digest), Some(RelayCheck { holder, .. })) => {
                log::debug!(
                    "NAR {hash}: peer {peer} passed on another piece than the holder has, at byte {offset}"
                );
                let (relay, holder, digest) = (peer_key, holder.into(), *digest);
                let mismatch = DigestMismatch { relay, holder, began, offset, digest };
                self.contributors.mismatches.push(mismatch);
            }
            // The holder named relays, so it has to return digests.
            (StreamError::Unchecked(is_broken, why), Some(RelayCheck { holder, .. })) => {
                self.requests.relays.iter_mut().for_each(|relays| relays.unasked.clear());
                log::debug!("NAR {hash}: peer {holder} does not tell digests: {why}");
                if *is_broken {
                    self.record_failure(holder.into(), Fault::BrokenPromise, began, why);
                }
            }
            (StreamError::Failed(Fault::OddPath, why), _) => {
                let hash_part = self.nar().path.hash_part();
                self.downloader.client.log_unsupported_path(&hash_part, peer, why);
                self.record_failure(peer_key, Fault::OddPath, began, why);
            }
            // A relay may have lost its own source, or its Nix was stopped, so it is not blamed.
            (StreamError::Failed(_, why) | StreamError::Slow(why), Some(_)) => {
                log::debug!(
                    "NAR {hash}: leaves peer {peer}, which is getting it, at byte {offset}: {why}"
                );
            }
            (StreamError::Slow(why), None) => {
                log::debug!("NAR {hash}: leaves peer {peer} at byte {offset}: {why}");
                self.requests.sources.add(source);
            }
            (StreamError::Late, _) => {
                log::debug!("NAR {hash}: the first piece has not come in time from peer {peer}")
            }
            (StreamError::Failed(Fault::BrokenStream, why), None) if stream.pause >= LONG_PAUSE => {
                log::debug!("NAR {hash}: peer {peer} closed in a pause: {why}");
                self.requests.sources.add(source);
            }
            (StreamError::Failed(fault, why), None) => {
                log::debug!("NAR {hash}: peer {peer}: {why}");
                self.contributors.record_failure(peer_key);
                self.record_failure(peer_key, *fault, began, why);
                if *fault == Fault::BrokenStream {
                    self.requests.sources.retry_broken(source);
                }
            }
            // The caller leaves the NAR to the upstream cache.
            (StreamError::Upstream(_), _) => {}
            (StreamError::WrongPiece(_) | StreamError::Unchecked(..), None) => {}
        }
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

    /// Records that the NAR is wrong. Nix has a part of it already.
    pub(super) fn record_wrong_nar(&mut self, why: &dyn fmt::Display) {
        self.transfer.record_failure();
        for (peer_key, fault) in self.contributors.faults_of_wrong_nar() {
            self.record_failure(peer_key, fault, Instant::now(), why);
        }
    }

    /// Records that the whole NAR has the right hash but is not supported. That is no peer's fault.
    pub(super) fn record_unsupported(&mut self, why: Malformed) {
        if let Some(current) = self.current.take() {
            let size = self.nar().nar_size;
            self.leave(current, &StreamError::failed(Fault::OddPath, why), size);
        }
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
            current.stream.incoming_nar.record_proven();
            current.stream.body.finish();
        }
        let FoundNar { path, nar_size, .. } = self.nar();
        let peers: Vec<String> =
            self.contributors.peer_keys().map(|peer_key| peer_key.to_string()).collect();
        let (hash_part, peers) = (path.hash_part(), peers.join(" and "));
        log::debug!("{hash_part}: NAR of {nar_size} bytes from peer {peers}");
        for peer_key in self.contributors.peer_keys() {
            self.downloader.health.record_delivered(peer_key, now);
            self.downloader.stats.record_delivered(peer_key.network(), peer_key.address());
        }
        for (peer_key, began, why) in &self.contributors.wrong_in_mismatches {
            self.record_failure(*peer_key, Fault::BadData, *began, why);
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

#[cfg(test)]
mod tests {
    use super::super::relay::Relays;
    use super::super::tests::{downloader, odd_nar, peer_with};
    use super::*;

    /// Regression test: the deadline for the first piece from a relay, which had passed, cut the
    /// rest of an unsupported NAR.
    #[test]
    fn first_piece_ends_its_deadlines_for_relays() {
        let (downloader, now) = (downloader(), Instant::now());
        let (found, serving) = peer_with(odd_nar(2 << 20), None, usize::MAX);
        let [two, five] = [2, 5].map(|seconds| now + Duration::from_secs(seconds));
        let holder = found.sources[0].peer;
        let relays =
            |deadline| Some(Relays { holder, unasked: Vec::new(), deadline: Some(deadline) });
        let mut reader = FailoverReader::new(&downloader, found, five, false);
        assert_eq!(reader.requests.relay_time_left(two), Duration::from_secs(3));
        reader.requests.relays = relays(two);
        assert_eq!(reader.requests.relay_time_left(now), Duration::from_secs(2));
        reader.requests.deadline = Some(now + Duration::from_secs(60));
        reader.requests.relays = relays(now);
        let (mut incoming, _) = reader.first_piece().unwrap();
        assert_eq!(reader.requests.relay_time_left(Instant::now()), Duration::MAX);
        while incoming.unsupported().is_none() {
            let mut piece = incoming.piece();
            reader.next_piece(&mut incoming, &mut piece).unwrap();
        }
        let left = reader.requests.relay_time_left(Instant::now());
        assert!(!left.is_zero() && left <= UNSUPPORTED_TIMEOUT.get(), "{left:?}");
        serving.join().unwrap();
    }
}
