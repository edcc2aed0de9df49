//! Remembers which peers sent parts of one NAR, so that wrong bytes are held against the right one.

use super::verified::Piece;
use crate::peers::health::{Fault, PeerKey};
use ring::digest::{SHA256, digest};
use std::time::Instant;

/// The peers that may have sent a part of one NAR.
#[derive(Default)]
pub(super) struct Contributors {
    peers: Vec<Contributor>,
    /// Mismatches of pieces that were not accepted yet.
    pub(super) mismatches: Vec<DigestMismatch>,
    /// The peers that were wrong in mismatches, if the whole NAR is right, each with the time when
    /// the relay was asked, and what the peer did.
    pub(super) wrong_in_mismatches: Vec<(PeerKey, Instant, &'static str)>,
}

/// A peer that may have sent a part of the NAR.
struct Contributor {
    peer_key: PeerKey,
    /// Its stream failed.
    has_failed: bool,
}

/// A relay sent a piece that does not match the holder's digest. The piece that is accepted later
/// shows which of the two was wrong.
pub(super) struct DigestMismatch {
    pub(super) relay: PeerKey,
    pub(super) holder: PeerKey,
    /// When the relay was asked.
    pub(super) began: Instant,
    /// Offset of the piece in the NAR, and its SHA-256 according to the holder.
    pub(super) offset: u64,
    pub(super) digest: [u8; 32],
}

impl Contributors {
    /// Adds a peer that begins to send.
    pub(super) fn add(&mut self, peer_key: PeerKey) {
        if !self.peers.iter().any(|peer| peer.peer_key == peer_key) {
            self.peers.push(Contributor { peer_key, has_failed: false });
        }
    }

    /// Forgets all peers, because their bytes were discarded. Mismatches are still judged.
    pub(super) fn forget_peers(&mut self) {
        self.peers.clear();
    }

    /// Records that the stream of a peer failed.
    pub(super) fn record_failure(&mut self, peer_key: PeerKey) {
        if let Some(peer) = self.peers.iter_mut().find(|peer| peer.peer_key == peer_key) {
            peer.has_failed = true;
        }
    }

    /// Compares the accepted piece at byte `offset` with the digests that relays did not match.
    pub(super) fn judge_mismatches(&mut self, offset: u64, piece: &Piece) {
        for mismatch in self.mismatches.extract_if(.., |mismatch| mismatch.offset == offset) {
            let DigestMismatch { relay, holder, began, .. } = mismatch;
            let holder_is_right = digest(&SHA256, piece.bytes()).as_ref() == mismatch.digest;
            self.wrong_in_mismatches.push(if holder_is_right {
                (relay, began, "passed on another piece than the holder has")
            } else {
                (holder, began, "told a wrong digest")
            });
        }
    }

    /// The peers, in the order in which they began to send.
    pub(super) fn peer_keys(&self) -> impl Iterator<Item = PeerKey> {
        self.peers.iter().map(|peer| peer.peer_key)
    }

    /// The fault of each peer if the NAR is wrong. Which peer sent the wrong bytes is unknown.
    /// Peers whose streams failed get the greater fault. If none failed, as the NAR moved to faster
    /// peers, all get it.
    pub(super) fn faults_of_wrong_nar(&self) -> impl Iterator<Item = (PeerKey, Fault)> {
        let is_known = self.peers.iter().any(|peer| peer.has_failed);
        self.peers.iter().map(move |peer| {
            let is_lesser = is_known && !peer.has_failed;
            (peer.peer_key, if is_lesser { Fault::BrokenPromise } else { Fault::BadData })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn wrong_nar_blames_failed_peers_or_all() {
        let faults = |has_failed: &[bool]| -> Vec<Fault> {
            let mut contributors = Contributors::default();
            for (last, has_failed) in (1..).zip(has_failed) {
                let peer_key = PeerKey::from(SocketAddr::from(([10, 0, 0, last], 1)));
                contributors.add(peer_key);
                if *has_failed {
                    contributors.record_failure(peer_key);
                }
            }
            contributors.faults_of_wrong_nar().map(|(_, fault)| fault).collect()
        };
        let (bad, little) = (Fault::BadData, Fault::BrokenPromise);
        assert_eq!(faults(&[false]), [bad]);
        assert_eq!(faults(&[true, false]), [bad, little]);
        // The NAR moved to a faster peer: no stream failed, so both are suspects.
        assert_eq!(faults(&[false, false]), [bad, bad]);
        assert_eq!(faults(&[false, true, false]), [little, bad, little]);
    }
}
