//! Checks the bytes of one NAR on their way to this machine's Nix: their framing, size and hash.
//!
//! Nix unpacks during the download, as root, before it knows the hash. So malformed bytes are never
//! passed on, and the last piece only when size and hash are right. Most NARs have one piece, which
//! is checked before Nix gets any of it.

use crate::nix::{Framing, Malformed, NarHash};
use crate::wire::relay::DIGEST_PIECE;
use crossbeam_channel::{Receiver, Sender, bounded};
use ring::digest::{Context, SHA256};
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::thread;

/// Bytes that are read, checked and passed on together. Each relay digest covers as many.
pub(super) const PIECE: usize = DIGEST_PIECE;

/// Pieces that wait for the hashing thread. Two absorb short delays of either side.
const MAX_QUEUED_PIECES: usize = 2;

/// Why a NAR was not passed on completely.
#[derive(Debug)]
pub(super) enum IncompleteNar {
    /// The error of the reader or the writer.
    Io(io::Error),
    /// The hash is wrong. The last piece was not passed on.
    Hash,
    /// The hash is right, but peerix or Nix does not support the NAR. No piece was passed on from
    /// the unsupported bytes on.
    Unsupported(Malformed),
}

impl From<io::Error> for IncompleteNar {
    fn from(e: io::Error) -> Self {
        IncompleteNar::Io(e)
    }
}

/// The received part of a NAR.
pub(super) struct VerifiedStream {
    hash: NarHash,
    size: u64,
    framing: Framing,
    /// Why the NAR is not supported. Its framing is not checked any further, because only the hash
    /// of the whole NAR shows whether the peer invented the unsupported bytes.
    unsupported: Option<Malformed>,
    received: u64,
}

impl VerifiedStream {
    /// Starts at byte 0 of the NAR with this hash and size.
    pub(super) fn new(hash: NarHash, size: u64) -> Self {
        let framing = Framing::with_nar_size(size);
        VerifiedStream { hash, size, framing, unsupported: None, received: 0 }
    }

    /// Number of bytes that were received.
    pub(super) fn received(&self) -> u64 {
        self.received
    }

    /// Number of bytes that are missing.
    pub(super) fn rest(&self) -> u64 {
        self.size - self.received
    }

    /// Why peerix or Nix does not support the NAR, if the received bytes are part of it.
    pub(super) fn unsupported(&self) -> Option<Malformed> {
        self.unsupported
    }

    /// An empty piece for the next bytes.
    pub(super) fn piece(&self) -> Piece {
        Piece::new(self.size)
    }

    /// Checks and adds `bytes` bytes that were read into the piece's [`Piece::room`].
    ///
    /// # Errors
    /// The bytes are not valid NAR framing at this offset, whatever peerix supports.
    pub(super) fn accept_bytes(
        &mut self,
        piece: &mut Piece,
        bytes: usize,
    ) -> Result<(), Malformed> {
        if self.unsupported.is_none() {
            match self.framing.push(&piece.buffer[piece.filled..piece.filled + bytes]) {
                Err(e) if e.is_unsupported => self.unsupported = Some(e),
                checked => checked?,
            }
        }
        piece.filled += bytes;
        self.received += bytes as u64;
        Ok(())
    }

    /// Whether a piece that is the whole NAR has the right hash and, if it is supported, a complete
    /// framing.
    pub(super) fn is_right(&self, piece: &Piece) -> bool {
        ring::digest::digest(&SHA256, piece.bytes()).as_ref() == self.hash.as_bytes()
            && (self.unsupported.is_some() || self.framing.is_complete())
    }

    /// Writes `range` of the NAR to `out`. `piece` is the first piece. `next` fills each further
    /// piece, and is called until the range or the NAR ends. `keep` gets every piece, the last one
    /// only if the hash is right. Blocks as long as `next` and `out` do. An unsupported NAR is
    /// hashed to its end, but neither `out` nor `keep` gets its unsupported pieces.
    ///
    /// # Errors
    /// See [`IncompleteNar`]. Bytes that were written before are only checked for their framing.
    pub(super) fn pass_on(
        &mut self,
        mut piece: Piece,
        range: &Range<u64>,
        out: &mut dyn Write,
        mut next: impl FnMut(&mut Self, &mut Piece) -> io::Result<()>,
        mut keep: impl FnMut(Arc<Piece>),
    ) -> Result<(), IncompleteNar> {
        let (pieces, queue) = bounded(MAX_QUEUED_PIECES);
        let (recycle, recycled) = bounded(MAX_QUEUED_PIECES + 2);
        // `pieces` is dropped at the end of this closure at the latest, which ends the thread.
        thread::scope(move |scope| {
            let hashing = thread::Builder::new()
                .name("nar-hash".into())
                .spawn_scoped(scope, move || hash(&queue, &recycle))?;
            let mut from = 0;
            while self.received < self.size {
                let shared = Arc::new(piece);
                let _ = pieces.send(shared.clone());
                if self.unsupported.is_none() {
                    keep(shared.clone());
                    out.write_all(part(shared.bytes(), from, range))?;
                    from = self.received;
                    if from >= range.end {
                        // The range ends before the last piece. Nix cannot take a part for the
                        // whole.
                        return Ok(());
                    }
                }
                drop(shared);
                piece = recycled.try_recv().unwrap_or_else(|_| self.piece());
                piece.filled = 0;
                next(self, &mut piece)?;
            }
            let last = Arc::new(piece);
            let _ = pieces.send(last.clone());
            drop(pieces);
            if hashing.join().ok() != Some(self.hash) {
                return Err(IncompleteNar::Hash);
            }
            if let Some(why) = self.unsupported {
                return Err(IncompleteNar::Unsupported(why));
            }
            keep(last.clone());
            out.write_all(part(last.bytes(), from, range))?;
            Ok(())
        })
    }
}

/// A piece of a NAR. Buffers are reused, so their memory is zeroed only once.
pub(super) struct Piece {
    buffer: Box<[u8]>,
    filled: usize,
}

impl Piece {
    /// An empty piece of [`PIECE`] bytes, or of the NAR's size if that is less.
    fn new(nar_size: u64) -> Self {
        let len = usize::try_from(nar_size).unwrap_or(PIECE).min(PIECE);
        Piece { buffer: vec![0; len].into_boxed_slice(), filled: 0 }
    }

    /// The bytes that were received.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }

    /// Marks the whole buffer as received, for tests.
    #[cfg(test)]
    pub(super) fn filled(mut self) -> Piece {
        self.filled = self.buffer.len();
        self
    }

    /// The buffer for the next `max` bytes, shorter if the piece has less room.
    pub(super) fn room(&mut self, max: u64) -> &mut [u8] {
        let end = usize::try_from(max)
            .map_or(self.buffer.len(), |max| self.buffer.len().min(self.filled + max));
        &mut self.buffer[self.filled..end]
    }
}

/// The bytes of a piece at offset `from` of the NAR that lie in `range`.
pub(super) fn part<'a>(piece: &'a [u8], from: u64, range: &Range<u64>) -> &'a [u8] {
    let within = |at: u64| {
        usize::try_from(at.saturating_sub(from)).map_or(piece.len(), |at| at.min(piece.len()))
    };
    &piece[within(range.start)..within(range.end)]
}

/// Hashes pieces until the sender is dropped. Returns buffers that have no other user to `recycle`.
fn hash(pieces: &Receiver<Arc<Piece>>, recycle: &Sender<Piece>) -> NarHash {
    let mut context = Context::new(&SHA256);
    for piece in pieces {
        context.update(piece.bytes());
        if let Some(piece) = Arc::into_inner(piece) {
            let _ = recycle.try_send(piece);
        }
    }
    let digest = context.finish();
    NarHash::from_bytes(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::nar;

    #[test]
    fn part_of_piece_is_intersection_with_range() {
        let piece = b"0123456789";
        for (from, range, expected) in [
            (0, 0..10, &b"0123456789"[..]),
            (100, 0..200, b"0123456789"),
            (100, 103..105, b"34"),
            (100, 0..105, b"01234"),
            (100, 105..200, b"56789"),
            (100, 0..100, b""),
            (100, 110..200, b""),
            (u64::MAX - 10, 0..u64::MAX, b"0123456789"),
        ] {
            assert_eq!(part(piece, from, &range), expected, "{from} {range:?}");
        }
    }

    /// The NAR of a file of `size` bytes.
    fn file(size: usize) -> Vec<u8> {
        let mut nar = nar::MAGIC.to_vec();
        nar::regular_open(&mut nar, false, size as u64);
        nar.extend((0..size).map(|i| (i % 251) as u8));
        nar.extend_from_slice(nar::padding(size as u64));
        nar.extend_from_slice(&nar::CLOSE);
        nar
    }

    fn hash_of(nar: &[u8]) -> NarHash {
        NarHash::from_bytes(ring::digest::digest(&SHA256, nar).as_ref().try_into().unwrap())
    }

    /// Passes `nar` on with `hash` as its expected hash, in reads of `read` bytes. Returns the
    /// output.
    fn passed_on(
        nar: &[u8],
        hash: NarHash,
        range: Range<u64>,
        read: usize,
    ) -> (Vec<u8>, Result<(), IncompleteNar>) {
        let mut incoming = VerifiedStream::new(hash, nar.len() as u64);
        let fill = |incoming: &mut VerifiedStream, piece: &mut Piece| {
            loop {
                let at = incoming.received() as usize;
                let room = piece.room(incoming.rest().min(read as u64));
                let len = room.len();
                room.copy_from_slice(&nar[at..at + len]);
                if len == 0 {
                    return Ok(());
                }
                incoming.accept_bytes(piece, len).map_err(io::Error::other)?;
            }
        };
        let mut first = incoming.piece();
        fill(&mut incoming, &mut first).unwrap();
        let (mut out, mut kept) = (Vec::new(), Vec::new());
        let end = incoming
            .pass_on(first, &range, &mut out, fill, |piece| kept.extend_from_slice(piece.bytes()));
        assert!(end.is_err() || range.end < nar.len() as u64 || kept == nar);
        (out, end)
    }

    #[test]
    fn whole_nar_and_each_range_pass() {
        let nar = file(3 * PIECE + 1000);
        let size = nar.len() as u64;
        for range in [0..size, 5..size, PIECE as u64..size, size - 1..size, 100..PIECE as u64 + 5] {
            let (out, end) = passed_on(&nar, hash_of(&nar), range.clone(), 100_000);
            end.unwrap();
            assert!(out == nar[range.start as usize..range.end as usize], "{range:?}");
        }
    }

    #[test]
    fn wrong_hash_withholds_last_piece() {
        let mut nar = file(3 * PIECE);
        let (size, right) = (nar.len(), hash_of(&nar));
        nar[PIECE] ^= 1;
        let (out, end) = passed_on(&nar, right, 0..size as u64, PIECE);
        assert!(matches!(end, Err(IncompleteNar::Hash)));
        assert!(out.len() < size && size - out.len() <= PIECE, "{} of {size}", out.len());
    }
}
