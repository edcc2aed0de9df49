//! Tracks which neighbours are downloading a large NAR from this node, so that the node can refer
//! the next one to them (docs/protocol.md, "Crowds").
//!
//! Callers pass the current time in. Only [`Crowds::acquire_hashing_permit`] waits.

use crate::lock::{Condvar, Mutex};
use crate::nix::NarHash;
use crate::wire::relay::{DIGEST_LEN, MAX_NAMED};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

/// Time a crowd must have existed before its pace is reported. Earlier, the bytes mostly fill
/// buffers.
const MIN_CROWD_AGE: Duration = Duration::from_millis(500);
/// Neighbours remembered per NAR. Later ones are not named to others.
const MAX_RECEIVERS: usize = 64;

/// Requests for digests that are hashed at the same time. One keeps a processor busy and reads up
/// to 16 MiB.
const MAX_HASHING: u32 = 2;
/// Time a request waits for a [`HashingPermit`] before it fails. The client waits 5 s.
const HASHING_TIMEOUT: Duration = Duration::from_secs(3);
/// Digests remembered per NAR. They cover 2 GiB, as much as neighbours keep of NARs during their
/// download. Digests beyond the bound are computed for each request.
const MAX_STORED_DIGESTS: usize = 8192;

/// SHA-256 digest of a piece of a NAR.
pub type PieceDigest = [u8; DIGEST_LEN as usize];

/// The NARs that this node is sending to neighbours.
#[derive(Default)]
pub struct Crowds {
    crowds: Mutex<HashMap<NarHash, Crowd>>,
    hashing: Mutex<u32>,
    hashed: Condvar,
}

/// Permission to hash pieces of a NAR. Dropping it releases it to a waiting request.
pub struct HashingPermit<'a>(&'a Crowds);

struct Crowd {
    /// Number of streams of the NAR from this node.
    streams: u32,
    /// Bytes sent in all streams, ended ones included, since the first one began.
    sent: u64,
    began: Instant,
    /// Neighbours that are getting the NAR, from this node or from a neighbour that was named to
    /// them, in the order of their requests.
    receivers: Vec<IpAddr>,
    /// Digests computed for earlier requests, by the piece's number.
    digests: HashMap<u64, PieceDigest>,
}

/// A stream of a NAR to a neighbour. Dropping it removes it from the crowd.
pub struct CrowdStream<'a> {
    crowds: &'a Crowds,
    hash: NarHash,
}

/// Response to a neighbour's request for a NAR.
pub enum CrowdAnswer<'a> {
    /// Send the NAR from this node.
    Send(CrowdStream<'a>),
    /// Refer the neighbour to these addresses, which are getting the NAR.
    Name(Vec<IpAddr>),
}

impl Crowds {
    /// Decides how to answer a neighbour that requests a NAR. `accepts_relays` says that the
    /// neighbour understands a referral and that its address may be named to others.
    pub fn answer_request(
        &self,
        hash: NarHash,
        asker: IpAddr,
        accepts_relays: bool,
        now: Instant,
    ) -> CrowdAnswer<'_> {
        let mut crowds = self.crowds.lock();
        let new = || Crowd {
            streams: 0,
            sent: 0,
            began: now,
            receivers: Vec::new(),
            digests: HashMap::new(),
        };
        let crowd = crowds.entry(hash).or_insert_with(new);
        if accepts_relays && !crowd.receivers.contains(&asker) {
            let referrals =
                crowd.receivers[crowd.receivers.len().saturating_sub(MAX_NAMED)..].to_vec();
            if crowd.receivers.len() < MAX_RECEIVERS {
                crowd.receivers.push(asker);
            }
            if crowd.streams > 0 && !referrals.is_empty() {
                return CrowdAnswer::Name(referrals);
            }
        }
        crowd.streams += 1;
        CrowdAnswer::Send(CrowdStream { crowds: self, hash })
    }

    /// Bytes per second that one more neighbour would get of a NAR that is being sent; `None` if
    /// the NAR is not being sent, or for less than 500 ms.
    pub fn pace_for_next(&self, hash: NarHash, now: Instant) -> Option<u64> {
        let crowds = self.crowds.lock();
        let crowd = crowds.get(&hash)?;
        let time = now.saturating_duration_since(crowd.began);
        let pace = crowd.sent as f64 / time.as_secs_f64() / f64::from(crowd.streams + 1);
        (time >= MIN_CROWD_AGE).then_some(pace as u64)
    }

    /// Returns the digests of these pieces, or `None` unless all of them are remembered.
    pub fn digests(&self, hash: NarHash, mut pieces: Range<u64>) -> Option<Vec<PieceDigest>> {
        let crowds = self.crowds.lock();
        let known = &crowds.get(&hash)?.digests;
        pieces.try_fold(Vec::new(), |mut all, piece| {
            all.push(*known.get(&piece)?);
            Some(all)
        })
    }

    /// Remembers digests of the pieces from `first` on while the NAR is being sent. At
    /// `MAX_STORED_DIGESTS` digests it drops the new ones.
    pub fn store_digests(&self, hash: NarHash, first: u64, digests: &[PieceDigest]) {
        if let Some(crowd) = self.crowds.lock().get_mut(&hash)
            && crowd.digests.len() + digests.len() <= MAX_STORED_DIGESTS
        {
            crowd.digests.extend((first..).zip(digests.iter().copied()));
        }
    }

    /// Waits for permission to hash, for at most 3 s; `None` if it gets none in that time.
    pub fn acquire_hashing_permit(&self) -> Option<HashingPermit<'_>> {
        let hashing = self.hashing.lock();
        let is_full = |hashing: &mut u32| *hashing >= MAX_HASHING;
        let mut hashing = self.hashed.wait_timeout_while(hashing, HASHING_TIMEOUT, is_full);
        if is_full(&mut hashing) {
            return None;
        }
        *hashing += 1;
        Some(HashingPermit(self))
    }
}

impl CrowdStream<'_> {
    /// Adds `bytes` to the bytes that were sent.
    pub fn record_sent(&self, bytes: u64) {
        if let Some(crowd) = self.crowds.crowds.lock().get_mut(&self.hash) {
            crowd.sent += bytes;
        }
    }
}

impl Drop for HashingPermit<'_> {
    fn drop(&mut self) {
        *self.0.hashing.lock() -= 1;
        self.0.hashed.notify_one();
    }
}

impl Drop for CrowdStream<'_> {
    fn drop(&mut self) {
        let mut crowds = self.crowds.crowds.lock();
        if let Some(crowd) = crowds.get_mut(&self.hash) {
            crowd.streams -= 1;
            // The neighbour that received the first stream has the whole NAR now, and lookups find
            // it.
            if crowd.streams == 0 {
                crowds.remove(&self.hash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    fn names(turn: &CrowdAnswer) -> Option<Vec<u8>> {
        let last = |address: &IpAddr| match address {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => 0,
        };
        match turn {
            CrowdAnswer::Send(_) => None,
            CrowdAnswer::Name(all) => Some(all.iter().map(last).collect()),
        }
    }

    #[test]
    fn later_neighbour_is_referred_to_earlier_ones_once() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        let first = crowds.answer_request(hash, host(1), true, now);
        assert_eq!(names(&first), None);
        assert_eq!(names(&crowds.answer_request(hash, host(2), true, now)), Some(vec![1]));
        assert_eq!(names(&crowds.answer_request(hash, host(3), true, now)), Some(vec![1, 2]));
        // It returns because the neighbours that were named did not have the NAR.
        let second = crowds.answer_request(hash, host(3), true, now);
        assert_eq!(names(&second), None);
        // A neighbour that does not understand referrals, and another NAR.
        assert_eq!(names(&crowds.answer_request(hash, host(4), false, now)), None);
        assert_eq!(
            names(&crowds.answer_request(NarHash::from_bytes([2; 32]), host(5), true, now)),
            None
        );
        drop(first);
        assert_eq!(names(&crowds.answer_request(hash, host(6), true, now)), Some(vec![1, 2, 3]));
        drop(second);
        assert_eq!(names(&crowds.answer_request(hash, host(7), true, now)), None);
        assert!(crowds.crowds.lock().is_empty());
    }

    #[test]
    fn pace_is_divided_among_streams_and_one_more() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        assert_eq!(crowds.pace_for_next(hash, now), None);
        let CrowdAnswer::Send(sending) = crowds.answer_request(hash, host(1), true, now) else {
            panic!("it is the first")
        };
        sending.record_sent(1_000_000);
        assert_eq!(crowds.pace_for_next(hash, now + Duration::from_millis(100)), None);
        assert_eq!(crowds.pace_for_next(hash, now + Duration::from_secs(1)), Some(500_000));
        drop(sending);
        assert_eq!(crowds.pace_for_next(hash, now + Duration::from_secs(1)), None);
    }

    #[test]
    fn digests_are_bounded_and_dropped_with_the_last_stream() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        crowds.store_digests(hash, 0, &[[1; 32]]);
        assert_eq!(crowds.digests(hash, 0..1), None);
        let sending = crowds.answer_request(hash, host(1), true, now);
        crowds.store_digests(hash, 4, &[[4; 32], [5; 32]]);
        assert_eq!(crowds.digests(hash, 4..6), Some(vec![[4; 32], [5; 32]]));
        assert_eq!(crowds.digests(hash, 4..7), None);
        crowds.store_digests(hash, 6, &vec![[6; 32]; MAX_STORED_DIGESTS]);
        assert_eq!(crowds.digests(hash, 6..7), None);
        drop(sending);
        assert_eq!(crowds.digests(hash, 4..6), None);
    }

    #[test]
    fn hashing_permit_is_refused_until_one_is_dropped() {
        let crowds = Crowds::default();
        let mut places: Vec<_> =
            (0..MAX_HASHING).map(|_| crowds.acquire_hashing_permit().unwrap()).collect();
        assert!(crowds.acquire_hashing_permit().is_none());
        places.pop();
        assert!(crowds.acquire_hashing_permit().is_some());
    }

    #[test]
    fn crowd_at_its_bound_names_no_later_neighbours() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        let _first = crowds.answer_request(hash, host(1), true, now);
        let all: Vec<_> = (2..=200)
            .map(|last| names(&crowds.answer_request(hash, host(last), true, now)).unwrap())
            .collect();
        assert_eq!(all[198], (49..=64).collect::<Vec<u8>>());
        assert_eq!(crowds.crowds.lock()[&hash].receivers.len(), MAX_RECEIVERS);
    }
}
