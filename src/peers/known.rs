//! The peers on the LAN that were heard from, and how long each usually takes to answer. No I/O; time is passed in.

use crate::wire::Hello;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// A peer not heard from for this long is forgotten: three hellos lost in a row.
const REMEMBERED: Duration = Duration::from_secs(90);

/// Peers remembered at once. More than a /22 has; a neighbour that invents addresses gets no more memory.
const MAX_PEERS: usize = 1024;

/// A query goes unicast to at most so many peers, and beyond so many a node sends no *have not* and expects none,
/// so that the packets of one query stay bounded in large networks.
pub const CROWD: usize = 32;

/// No peer is waited for longer than this, whatever its round trip: so long a miss may take at the most.
pub const MAX_WAIT: Duration = Duration::from_secs(1);

/// A live peer gets so many times `--timeout` at least. A *have* that comes after the wait is a wrong *not there*,
/// which Nix remembers for an hour; waiting longer costs only where a live peer is silent, which is rare. With 4,
/// the query and its repeats survive one packet in ten lost and a busy processor.
const LIVE_FACTOR: u32 = 4;

/// How a peer answers a query for a path it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// With *have not*: it is waited for until it answered, for so long at most.
    Due(Duration),
    /// Not at all (a Python peerix, a crowded node): for so long it may still say *have*.
    Maybe(Duration),
    /// It left queries unanswered: it is asked, not waited for.
    NotExpected,
}

/// What is known of one peer.
pub struct Peer {
    heard: Option<Instant>,
    hello: Option<Hello>,
    says_have_not: bool,
    named: bool,
    /// Smoothed round trip and its variation, as TCP keeps them (RFC 6298).
    round_trip: Option<(Duration, Duration)>,
    /// Not waited for until heard again.
    silent: bool,
    /// Left a query unanswered and has not answered one since.
    doubtful: bool,
    last_have: Option<Instant>,
    haves: u32,
}

impl Peer {
    fn new(named: bool) -> Self {
        Peer {
            heard: None,
            hello: None,
            says_have_not: false,
            named,
            round_trip: None,
            silent: false,
            doubtful: false,
            last_have: None,
            haves: 0,
        }
    }

    /// What to expect of this peer, when unknown peers get `timeout`.
    pub fn expect(&self, timeout: Duration) -> Answer {
        let crowded = self.hello.is_some_and(|h| h.crowded);
        if self.silent {
            Answer::NotExpected
        } else if self.heard.is_none() {
            Answer::Maybe(timeout)
        } else if (self.says_have_not || self.hello.is_some()) && !crowded {
            Answer::Due(self.patience(timeout, LIVE_FACTOR))
        } else {
            Answer::Maybe(self.patience(timeout, 1))
        }
    }

    fn patience(&self, timeout: Duration, factor: u32) -> Duration {
        let most = MAX_WAIT.max(timeout);
        let least = (timeout * factor).clamp(timeout, most);
        match self.round_trip {
            _ if self.doubtful => timeout,
            None if factor > 1 => most,
            None => least,
            Some(_) => (self.usual_answer() * 4).clamp(least, most),
        }
    }

    /// By when an answer has usually come: the smoothed round trip and four variations, zero if never measured.
    pub fn usual_answer(&self) -> Duration {
        self.round_trip.map_or(Duration::ZERO, |(smoothed, variation)| smoothed + 4 * variation)
    }

    /// Whether anything was ever heard: not of a peer that only `--peer` names.
    pub fn was_heard(&self) -> bool {
        self.heard.is_some()
    }

    /// Whether anything was heard after `then`.
    pub fn heard_since(&self, then: Instant) -> bool {
        self.heard.is_some_and(|heard| heard > then)
    }

    fn measured(&mut self, sample: Duration) {
        self.round_trip = Some(match self.round_trip {
            None => (sample, sample / 2),
            Some((smoothed, variation)) => {
                ((smoothed * 7 + sample) / 8, (variation * 3 + smoothed.abs_diff(sample)) / 4)
            }
        });
    }
}

/// All known peers, by the address their datagrams come from.
#[derive(Default)]
pub struct Known {
    peers: HashMap<SocketAddr, Peer>,
}

impl Known {
    /// Anything at all came from `from`. True if it is a newcomer.
    pub fn heard(&mut self, from: SocketAddr, now: Instant) -> bool {
        let is_new = !self.peers.contains_key(&from);
        if is_new && self.peers.len() >= MAX_PEERS && !self.make_room() {
            return false;
        }
        let peer = self.peers.entry(from).or_insert_with(|| Peer::new(false));
        peer.heard = Some(now);
        peer.silent = false;
        is_new
    }

    /// A *hello*. True if the peer is new or was started anew, and so may not know this node.
    pub fn hello(&mut self, from: SocketAddr, hello: Hello, now: Instant) -> bool {
        self.heard(from, now);
        let Some(peer) = self.peers.get_mut(&from) else { return false };
        let restarted = peer.hello.is_none_or(|old| old.instance != hello.instance);
        if restarted {
            let named = peer.named;
            *peer = Peer { heard: Some(now), named, ..Peer::new(named) };
        }
        peer.hello = Some(hello);
        restarted
    }

    /// A *bye*, believed only of the instance that said *hello*.
    pub fn bye(&mut self, from: SocketAddr, bye: Hello) {
        if self.peers.get(&from).and_then(|p| p.hello).is_some_and(|hello| hello.instance == bye.instance) {
            self.forget(from);
        }
    }

    /// A *have* or *have not*; `round_trip` where the query was sent once, so that it is known which copy was
    /// answered.
    pub fn answered(&mut self, from: SocketAddr, has_it: bool, round_trip: Option<Duration>, now: Instant) {
        self.heard(from, now);
        let Some(peer) = self.peers.get_mut(&from) else { return };
        peer.doubtful = false;
        if has_it {
            peer.haves = peer.haves.saturating_add(1);
            peer.last_have = Some(now);
        } else {
            peer.says_have_not = true;
        }
        if let Some(sample) = round_trip {
            peer.measured(sample);
        }
    }

    /// A query and its repeats that were sent from `sent` on stayed unanswered. The peer is not waited for from
    /// now on, unless it was heard meanwhile: then packets were lost, and the peer is there.
    pub fn left_unanswered(&mut self, peer: SocketAddr, sent: Instant) {
        if let Some(peer) = self.peers.get_mut(&peer)
            && !peer.heard_since(sent)
        {
            peer.silent = true;
            peer.doubtful = true;
        }
    }

    /// Sets the nodes beyond the broadcast domain, which are always asked.
    pub fn name(&mut self, named: &[SocketAddr]) {
        self.peers.retain(|address, peer| {
            peer.named = named.contains(address);
            peer.named || peer.heard.is_some()
        });
        for address in named {
            self.peers.entry(*address).or_insert_with(|| Peer::new(true));
        }
    }

    /// The nodes set by [`Known::name`].
    pub fn named(&self) -> impl Iterator<Item = SocketAddr> {
        self.peers.iter().filter(|(_, peer)| peer.named).map(|(address, _)| *address)
    }

    /// Drops who was not heard for [`REMEMBERED`].
    pub fn forget_old(&mut self, now: Instant) {
        let old: Vec<SocketAddr> = self
            .peers
            .iter()
            .filter(|(_, p)| p.heard.is_some_and(|heard| now.saturating_duration_since(heard) > REMEMBERED))
            .map(|(address, _)| *address)
            .collect();
        old.into_iter().for_each(|address| self.forget(address));
    }

    /// Whether there are too many live peers for *have not*.
    pub fn is_crowded(&self) -> bool {
        self.peers.len() > CROWD && self.peers.values().filter(|p| !p.silent).count() > CROWD
    }

    /// The peers a query goes to: at most [`CROWD`], named ones first, then those that had something most often
    /// and latest.
    pub fn to_ask(&self) -> Vec<(SocketAddr, &Peer)> {
        let mut all: Vec<(SocketAddr, &Peer)> = self.peers.iter().map(|(address, peer)| (*address, peer)).collect();
        if all.len() > CROWD {
            all.sort_by_key(|(_, p)| std::cmp::Reverse((p.named, !p.silent, p.haves, p.last_have)));
            all.truncate(CROWD);
        }
        all
    }

    /// How many peers are known.
    pub fn len(&self) -> usize {
        self.peers.len()
    }

    fn forget(&mut self, address: SocketAddr) {
        if let Some(peer) = self.peers.get_mut(&address) {
            if peer.named {
                *peer = Peer::new(true);
            } else {
                self.peers.remove(&address);
            }
        }
    }

    /// Forgets the peer that was heard longest ago among those that never had anything. False if there is none.
    fn make_room(&mut self) -> bool {
        let idlest = self.peers.iter().filter(|(_, p)| p.haves == 0 && !p.named).min_by_key(|(_, p)| p.heard);
        let Some(address) = idlest.map(|(address, _)| *address) else { return false };
        self.peers.remove(&address);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_millis(50);

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    fn hello(instance: u8) -> Hello {
        Hello { port: 12304, instance: [instance; 8], crowded: false }
    }

    fn expect(known: &Known, peer: SocketAddr) -> Answer {
        known.peers[&peer].expect(TIMEOUT)
    }

    #[test]
    fn waits_follow_the_measured_round_trip() {
        let (mut known, now) = (Known::default(), Instant::now());
        let peer = address(1);
        assert!(known.hello(peer, hello(1), now));
        assert_eq!(expect(&known, peer), Answer::Due(MAX_WAIT), "not measured yet");
        for _ in 0..50 {
            known.answered(peer, true, Some(Duration::from_micros(300)), now);
        }
        assert_eq!(expect(&known, peer), Answer::Due(4 * TIMEOUT), "fast ones get the least wait");
        for _ in 0..50 {
            known.answered(peer, true, Some(Duration::from_millis(100)), now);
        }
        let Answer::Due(wait) = expect(&known, peer) else { panic!() };
        assert!(wait >= Duration::from_millis(400) && wait <= Duration::from_millis(500), "{wait:?}");
        for _ in 0..50 {
            known.answered(peer, true, Some(Duration::from_secs(3)), now);
        }
        assert_eq!(expect(&known, peer), Answer::Due(MAX_WAIT));
    }

    #[test]
    fn a_vanished_peer_costs_one_wait() {
        let (mut known, start) = (Known::default(), Instant::now());
        let peer = address(1);
        known.hello(peer, hello(1), start);
        let sent = start + Duration::from_secs(1);
        known.left_unanswered(peer, sent);
        assert_eq!(expect(&known, peer), Answer::NotExpected);
        // Its next hello brings it back, in doubt until it answers.
        let again = start + Duration::from_secs(30);
        assert!(!known.hello(peer, hello(1), again));
        assert_eq!(expect(&known, peer), Answer::Due(TIMEOUT));
        known.answered(peer, false, None, again);
        assert_eq!(expect(&known, peer), Answer::Due(MAX_WAIT));
    }

    #[test]
    fn a_lost_answer_is_no_silence_of_a_peer_that_answers_others() {
        let (mut known, start) = (Known::default(), Instant::now());
        let peer = address(1);
        known.hello(peer, hello(1), start);
        known.answered(peer, true, None, start + Duration::from_millis(30));
        known.left_unanswered(peer, start + Duration::from_millis(10));
        assert_eq!(expect(&known, peer), Answer::Due(MAX_WAIT));
    }

    #[test]
    fn the_original_is_never_due() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.answered(address(1), true, Some(Duration::from_millis(1)), now);
        known.heard(address(2), now);
        assert_eq!(expect(&known, address(1)), Answer::Maybe(TIMEOUT));
        assert_eq!(expect(&known, address(2)), Answer::Maybe(TIMEOUT));
        known.answered(address(2), false, None, now);
        assert!(matches!(expect(&known, address(2)), Answer::Due(_)));
    }

    #[test]
    fn peers_are_forgotten_after_90_seconds_and_at_bye() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.hello(address(1), hello(1), now);
        known.hello(address(2), hello(2), now + Duration::from_secs(60));
        known.name(&[address(3)]);
        known.forget_old(now + Duration::from_secs(91));
        assert_eq!(known.len(), 2);
        known.bye(address(2), hello(9));
        assert_eq!(known.len(), 2, "a bye of another instance is not believed");
        known.bye(address(2), hello(2));
        assert_eq!(known.len(), 1);
        assert_eq!(known.named().collect::<Vec<_>>(), [address(3)]);
    }

    #[test]
    fn invented_peers_do_not_push_out_proven_ones() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.answered(address(1), true, None, now);
        for i in 0..3000u32 {
            let ip = std::net::Ipv4Addr::from_bits(0x0a01_0000 + i);
            known.heard(SocketAddr::from((ip, 12304)), now + Duration::from_millis(u64::from(i)));
        }
        assert_eq!(known.len(), MAX_PEERS);
        assert!(known.is_crowded());
        let asked = known.to_ask();
        assert_eq!(asked.len(), CROWD);
        assert_eq!(asked[0].0, address(1));
    }
}
