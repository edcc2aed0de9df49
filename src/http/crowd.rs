//! Who else is getting a large NAR from this node: so that the next neighbour may get it from one
//! of them.
//!
//! Times are passed in. Only [`Crowds::to_hash`] blocks.

use crate::nix::NarHash;
use crate::wire::relay::{DIGEST_LEN, MAX_NAMED};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Before this the pace of a crowd is not known: buffers fill first.
const LEAST_TIME: Duration = Duration::from_millis(500);
/// Neighbours remembered of a NAR. Those who come later are not named.
const MAX_GETTING: usize = 64;

/// Answers hashed at once: one takes a processor, and reads 16 MiB.
const MAX_HASHING: u32 = 2;
/// Longest wait for a place among these: who asks waits 5 s.
const HASHING_PATIENCE: Duration = Duration::from_secs(3);
/// Digests remembered of one NAR: of 2 GiB, as much as neighbours keep of those on their way. Later
/// ones are hashed each time.
const MAX_DIGESTS_KEPT: usize = 8192;

/// A digest of a piece of a NAR.
pub type PieceDigest = [u8; DIGEST_LEN as usize];

/// The NARs that are being sent to neighbours.
#[derive(Default)]
pub struct Crowds {
    crowds: Mutex<HashMap<NarHash, Crowd>>,
    hashing: Mutex<u32>,
    hashed: Condvar,
}

/// A place among those that hash. Dropping it leaves it to the next.
pub struct HashingPermit<'a>(&'a Crowds);

struct Crowd {
    /// Streams of the NAR from this node.
    streams: u32,
    /// Bytes that they have sent, those that have ended included, since the first one began.
    sent: u64,
    began: Instant,
    /// Who gets it, from here or from another one that was named to them, in the order in which
    /// they asked.
    getting: Vec<IpAddr>,
    /// Digests that were asked for, by the piece.
    digests: HashMap<u64, PieceDigest>,
}

/// A stream of a NAR to a neighbour. Dropping it ends it.
pub struct CrowdStream<'a> {
    crowds: &'a Crowds,
    hash: NarHash,
}

/// What a neighbour gets that asks for a NAR.
pub enum CrowdAnswer<'a> {
    /// The NAR from this node.
    Send(CrowdStream<'a>),
    /// The names of others that are getting it.
    Name(Vec<IpAddr>),
}

impl Crowds {
    /// A neighbour asks for a NAR. `may_name`: it understands names, and may be named to others.
    pub fn ask(
        &self,
        hash: NarHash,
        asker: IpAddr,
        may_name: bool,
        now: Instant,
    ) -> CrowdAnswer<'_> {
        let mut crowds = self.lock();
        let new = || Crowd {
            streams: 0,
            sent: 0,
            began: now,
            getting: Vec::new(),
            digests: HashMap::new(),
        };
        let crowd = crowds.entry(hash).or_insert_with(new);
        if may_name && !crowd.getting.contains(&asker) {
            let names = crowd.getting[crowd.getting.len().saturating_sub(MAX_NAMED)..].to_vec();
            if crowd.getting.len() < MAX_GETTING {
                crowd.getting.push(asker);
            }
            if crowd.streams > 0 && !names.is_empty() {
                return CrowdAnswer::Name(names);
            }
        }
        crowd.streams += 1;
        CrowdAnswer::Send(CrowdStream { crowds: self, hash })
    }

    /// Bytes per second that one more neighbour would get of a NAR that is being sent; `None` if
    /// that is not known.
    pub fn pace_of_one_more(&self, hash: NarHash, now: Instant) -> Option<u64> {
        let crowds = self.lock();
        let crowd = crowds.get(&hash)?;
        let time = now.saturating_duration_since(crowd.began);
        let pace = crowd.sent as f64 / time.as_secs_f64() / f64::from(crowd.streams + 1);
        (time >= LEAST_TIME).then_some(pace as u64)
    }

    /// The digests of these pieces, if all are remembered.
    pub fn digests(&self, hash: NarHash, mut pieces: Range<u64>) -> Option<Vec<PieceDigest>> {
        let crowds = self.lock();
        let known = &crowds.get(&hash)?.digests;
        pieces.try_fold(Vec::new(), |mut all, piece| {
            all.push(*known.get(&piece)?);
            Some(all)
        })
    }

    /// Remembers digests of the pieces from `first` on, as long as the NAR is being sent.
    pub fn keep_digests(&self, hash: NarHash, first: u64, digests: &[PieceDigest]) {
        if let Some(crowd) = self.lock().get_mut(&hash)
            && crowd.digests.len() + digests.len() <= MAX_DIGESTS_KEPT
        {
            crowd.digests.extend((first..).zip(digests.iter().copied()));
        }
    }

    /// Blocks until few others hash, for 3 s at most. `None`: there are too many.
    pub fn to_hash(&self) -> Option<HashingPermit<'_>> {
        let hashing = self.hashing.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = |hashing: &mut u32| *hashing >= MAX_HASHING;
        let waited = self.hashed.wait_timeout_while(hashing, HASHING_PATIENCE, is_full);
        let (mut hashing, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return None;
        }
        *hashing += 1;
        Some(HashingPermit(self))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NarHash, Crowd>> {
        self.crowds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl CrowdStream<'_> {
    /// So many more bytes were sent.
    pub fn moved(&self, bytes: u64) {
        if let Some(crowd) = self.crowds.lock().get_mut(&self.hash) {
            crowd.sent += bytes;
        }
    }
}

impl Drop for HashingPermit<'_> {
    fn drop(&mut self) {
        *self.0.hashing.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.hashed.notify_one();
    }
}

impl Drop for CrowdStream<'_> {
    fn drop(&mut self) {
        let mut crowds = self.crowds.lock();
        if let Some(crowd) = crowds.get_mut(&self.hash) {
            crowd.streams -= 1;
            // Whoever got the first stream whole is a holder now, and found as such.
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
    fn neighbours_after_the_first_are_told_of_those_before_them_once() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        let first = crowds.ask(hash, host(1), true, now);
        assert_eq!(names(&first), None);
        assert_eq!(names(&crowds.ask(hash, host(2), true, now)), Some(vec![1]));
        assert_eq!(names(&crowds.ask(hash, host(3), true, now)), Some(vec![1, 2]));
        // It comes again, as those did not have it.
        let second = crowds.ask(hash, host(3), true, now);
        assert_eq!(names(&second), None);
        // One that does not understand names, and another NAR.
        assert_eq!(names(&crowds.ask(hash, host(4), false, now)), None);
        assert_eq!(names(&crowds.ask(NarHash::from_bytes([2; 32]), host(5), true, now)), None);
        drop(first);
        assert_eq!(names(&crowds.ask(hash, host(6), true, now)), Some(vec![1, 2, 3]));
        drop(second);
        assert_eq!(names(&crowds.ask(hash, host(7), true, now)), None);
        assert!(crowds.lock().is_empty());
    }

    #[test]
    fn pace_of_one_more_is_its_part_of_what_was_sent() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        assert_eq!(crowds.pace_of_one_more(hash, now), None);
        let CrowdAnswer::Send(sending) = crowds.ask(hash, host(1), true, now) else {
            panic!("it is the first")
        };
        sending.moved(1_000_000);
        assert_eq!(crowds.pace_of_one_more(hash, now + Duration::from_millis(100)), None);
        assert_eq!(crowds.pace_of_one_more(hash, now + Duration::from_secs(1)), Some(500_000));
        drop(sending);
        assert_eq!(crowds.pace_of_one_more(hash, now + Duration::from_secs(1)), None);
    }

    #[test]
    fn digests_are_kept_while_the_nar_is_being_sent_and_bounded() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        crowds.keep_digests(hash, 0, &[[1; 32]]);
        assert_eq!(crowds.digests(hash, 0..1), None);
        let sending = crowds.ask(hash, host(1), true, now);
        crowds.keep_digests(hash, 4, &[[4; 32], [5; 32]]);
        assert_eq!(crowds.digests(hash, 4..6), Some(vec![[4; 32], [5; 32]]));
        assert_eq!(crowds.digests(hash, 4..7), None);
        crowds.keep_digests(hash, 6, &vec![[6; 32]; MAX_DIGESTS_KEPT]);
        assert_eq!(crowds.digests(hash, 6..7), None);
        drop(sending);
        assert_eq!(crowds.digests(hash, 4..6), None);
    }

    #[test]
    fn few_hash_at_once_and_the_next_ones_wait_for_them() {
        let crowds = Crowds::default();
        let mut places: Vec<_> = (0..MAX_HASHING).map(|_| crowds.to_hash().unwrap()).collect();
        assert!(crowds.to_hash().is_none());
        places.pop();
        assert!(crowds.to_hash().is_some());
    }

    #[test]
    fn names_and_memory_are_bounded() {
        let (crowds, hash, now) = (Crowds::default(), NarHash::from_bytes([1; 32]), Instant::now());
        let _first = crowds.ask(hash, host(1), true, now);
        let all: Vec<_> = (2..=200)
            .map(|last| names(&crowds.ask(hash, host(last), true, now)).unwrap())
            .collect();
        assert_eq!(all[198], (49..=64).collect::<Vec<u8>>());
        assert_eq!(crowds.lock()[&hash].getting.len(), MAX_GETTING);
    }
}
