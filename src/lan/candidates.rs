//! Queries to candidates: peers that a tracker named, asked by the packets of the LAN, each at its own address. One
//! datagram each way tells who of many has a path, before any connection is made. No I/O; time is passed in.
//!
//! A candidate that does not answer (a peer of the original; a firewall that lets only TCP through) is asked over HTTP
//! like the others, so that nothing depends on these.

use crate::nix::HashPart;
use crossbeam_channel::Sender;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// In flight at once: one for each connection thread that can wait.
const MAX_PENDING_QUERIES: usize = 1024;
/// Sendings of each, the first one counted: at 5 % loss one in 160,000 is lost.
const MAX_SENDS: u32 = 4;
/// From the first to the second sending; it doubles. Longer than most round trips.
const FIRST_STEP: Duration = Duration::from_millis(150);

/// What a candidate said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CandidateAnswer {
    /// It has the path.
    Have(SocketAddr),
    /// It has not.
    HaveNot(SocketAddr),
}

/// A question to candidates. Its channel ends when all have answered, at `until`, or when nobody listens.
pub struct CandidateQuery {
    /// The path that is looked up.
    pub hash_part: HashPart,
    /// Addresses to query.
    pub candidates: Vec<SocketAddr>,
    /// Receives one answer for each candidate; its capacity must be their number.
    pub answers: Sender<CandidateAnswer>,
    /// The query ends then.
    pub until: Instant,
}

struct PendingQuery {
    hash_part: HashPart,
    silent: Vec<SocketAddr>,
    answers: Sender<CandidateAnswer>,
    until: Instant,
    sends: u32,
    step: Duration,
    next_send: Instant,
}

/// All pending queries.
pub struct Candidates {
    pending: HashMap<u32, PendingQuery>,
    next_id: u32,
}

impl Candidates {
    /// IDs count up from `first_id`, which should be random.
    pub fn new(first_id: u32) -> Self {
        Candidates { pending: HashMap::new(), next_id: first_id }
    }

    /// Takes a question; [`Candidates::due`] then has its first sending.
    pub fn ask(&mut self, question: CandidateQuery, now: Instant) {
        if self.pending.len() >= MAX_PENDING_QUERIES {
            return log::debug!("query for {}: too many in flight", question.hash_part);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        let CandidateQuery { hash_part, candidates, answers, until } = question;
        let ask =
            PendingQuery { hash_part, silent: candidates, answers, until, sends: 0, step: FIRST_STEP, next_send: now };
        self.pending.insert(id, ask);
    }

    /// An answer came. False if nobody at that address was asked, or not this, or it has answered before.
    pub fn answered(&mut self, id: u32, from: SocketAddr, has_it: bool) -> bool {
        let Some(ask) = self.pending.get_mut(&id) else { return false };
        let Some(at) = ask.silent.iter().position(|candidate| *candidate == from) else { return false };
        ask.silent.swap_remove(at);
        // The channel has room for an answer of everyone who is asked.
        let heard = ask
            .answers
            .try_send(if has_it { CandidateAnswer::Have(from) } else { CandidateAnswer::HaveNot(from) })
            .is_ok();
        if !heard || ask.silent.is_empty() {
            self.pending.remove(&id);
        }
        true
    }

    /// Whom to send what now: ID, hash part and address.
    pub fn due(&mut self, now: Instant, mut send: impl FnMut(u32, HashPart, SocketAddr)) {
        self.pending.retain(|_, ask| ask.until > now && !ask.silent.is_empty());
        for (id, ask) in &mut self.pending {
            if ask.sends < MAX_SENDS && ask.next_send <= now {
                ask.silent.iter().for_each(|to| send(*id, ask.hash_part, *to));
                ask.sends += 1;
                ask.next_send = now + ask.step;
                ask.step *= 2;
            }
        }
    }

    /// When [`Candidates::due`] has something next.
    pub fn next_due(&self) -> Option<Instant> {
        let due = |ask: &PendingQuery| if ask.sends < MAX_SENDS { ask.next_send.min(ask.until) } else { ask.until };
        self.pending.values().map(due).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crossbeam_channel::{Receiver, TryRecvError, bounded};

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([203, 0, 113, last], 12304))
    }

    fn asked(candidates: &[u8], now: Instant) -> (Candidates, Receiver<CandidateAnswer>) {
        let mut asks = Candidates::new(u32::MAX);
        let (answers, receiver) = bounded(candidates.len());
        let hash_part = HashPart::parse(&[b'1'; 32]).unwrap();
        let candidates = candidates.iter().map(|c| at(*c)).collect();
        asks.ask(CandidateQuery { hash_part, candidates, answers, until: now + Duration::from_secs(2) }, now);
        (asks, receiver)
    }

    fn due(asks: &mut Candidates, now: Instant) -> Vec<SocketAddr> {
        let mut to = Vec::new();
        asks.due(now, |_, _, address| to.push(address));
        to.sort();
        to
    }

    #[test]
    fn each_answers_once_and_the_last_ends_it() {
        let now = Instant::now();
        let (mut asks, answers) = asked(&[1, 2], now);
        assert_eq!(due(&mut asks, now), [at(1), at(2)]);
        assert!(due(&mut asks, now).is_empty());
        assert!(!asks.answered(u32::MAX, at(3), true), "nobody asked it");
        assert!(!asks.answered(7, at(1), true), "nor this");
        assert!(asks.answered(u32::MAX, at(1), true));
        assert!(!asks.answered(u32::MAX, at(1), true), "a second time");
        assert_eq!(answers.try_recv(), Ok(CandidateAnswer::Have(at(1))));
        assert_eq!(answers.try_recv(), Err(TryRecvError::Empty));
        assert!(asks.answered(u32::MAX, at(2), false));
        assert_eq!(answers.try_recv(), Ok(CandidateAnswer::HaveNot(at(2))));
        assert_eq!(answers.try_recv(), Err(TryRecvError::Disconnected));
        assert_eq!(asks.next_due(), None);
    }

    #[test]
    fn only_the_silent_are_asked_again_and_not_for_ever() {
        let now = Instant::now();
        let (mut asks, answers) = asked(&[1, 2], now);
        due(&mut asks, now);
        asks.answered(u32::MAX, at(1), false);
        let mut sent = 0;
        while let Some(next) = asks.next_due() {
            sent += due(&mut asks, next).len();
            assert!(next <= now + Duration::from_secs(2));
        }
        assert_eq!(sent, 3);
        assert_eq!(answers.recv(), Ok(CandidateAnswer::HaveNot(at(1))));
        assert_eq!(answers.try_recv(), Err(TryRecvError::Disconnected));
    }

    #[test]
    fn those_in_flight_are_bounded() {
        let now = Instant::now();
        let (mut asks, first) = asked(&[1], now);
        let mut others = Vec::new();
        for _ in 0..2 * MAX_PENDING_QUERIES {
            let (answers, receiver) = bounded(1);
            let hash_part = HashPart::parse(&[b'1'; 32]).unwrap();
            asks.ask(CandidateQuery { hash_part, candidates: vec![at(1)], answers, until: now + FIRST_STEP }, now);
            others.push(receiver);
        }
        assert_eq!(asks.pending.len(), MAX_PENDING_QUERIES);
        assert_eq!(first.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(others[2 * MAX_PENDING_QUERIES - 1].try_recv(), Err(TryRecvError::Disconnected));
    }
}
