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
    /// It was never heard, only named by the user.
    Unknown,
    /// It left queries unanswered: it is asked, not waited for.
    NotExpected,
}

/// In so much time so many newcomers are waited for in vain: a neighbour that invents peers costs no more.
const VAIN_WINDOW: Duration = Duration::from_secs(60);
const MAX_VAIN: u32 = 10;

/// A silent peer's hello brings it back this often: a little less than the time between two hellos.
const BENEFIT: Duration = Duration::from_secs(25);

/// What is known of one peer.
pub struct Peer {
    heard: Option<Instant>,
    last_answer: Option<Instant>,
    hello: Option<Hello>,
    says_have_not: bool,
    named: bool,
    /// Smoothed round trip and its variation, as TCP keeps them (RFC 6298).
    round_trip: Option<(Duration, Duration)>,
    /// Not waited for, since then, until it answers or says hello again after a while.
    silent: Option<Instant>,
    /// Left a query unanswered and has not answered one since. A hello does not change that, nor a restart.
    doubtful: bool,
    last_have: Option<Instant>,
    haves: u32,
}

impl Peer {
    fn new(named: bool) -> Self {
        Peer {
            heard: None,
            last_answer: None,
            hello: None,
            says_have_not: false,
            named,
            round_trip: None,
            silent: None,
            doubtful: false,
            last_have: None,
            haves: 0,
        }
    }

    /// What to expect of this peer, when unknown peers get `timeout`.
    fn expect(&self, timeout: Duration) -> Answer {
        let crowded = self.hello.is_some_and(|h| h.crowded);
        if self.silent.is_some() {
            Answer::NotExpected
        } else if self.heard.is_none() {
            Answer::Unknown
        } else if (self.says_have_not || self.hello.is_some()) && !crowded {
            Answer::Due(self.patience(timeout, LIVE_FACTOR))
        } else {
            Answer::Maybe(self.patience(timeout, 1))
        }
    }

    fn patience(&self, timeout: Duration, factor: u32) -> Duration {
        let most = MAX_WAIT.max(timeout);
        let least = (timeout * factor).clamp(timeout, most);
        if self.doubtful { timeout } else { (self.usual_answer() * 4).clamp(least, most) }
    }

    /// By when an answer has usually come: the smoothed round trip and four variations, zero if never measured.
    pub fn usual_answer(&self) -> Duration {
        self.round_trip.map_or(Duration::ZERO, |(smoothed, variation)| smoothed + 4 * variation)
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

/// A peer on the LAN, for people.
#[derive(Debug, Clone)]
pub struct Neighbour {
    /// Where its datagrams come from.
    pub address: SocketAddr,
    /// The port of its HTTP server, if it said so.
    pub http_port: Option<u16>,
    /// Whether `--peer` names it.
    pub named: bool,
    /// When anything came from it last.
    pub heard: Option<Instant>,
    /// The smoothed round trip.
    pub round_trip: Option<Duration>,
}

/// All known peers, by the address their datagrams come from.
#[derive(Default)]
pub struct Known {
    peers: HashMap<SocketAddr, Peer>,
    /// Newcomers that were waited for in vain, since then.
    vain: u32,
    vain_since: Option<Instant>,
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
        is_new
    }

    /// A *hello*. True if the peer is new or was started anew, and so may not know this node.
    pub fn hello(&mut self, from: SocketAddr, hello: Hello, now: Instant) -> bool {
        self.heard(from, now);
        let Some(peer) = self.peers.get_mut(&from) else { return false };
        let restarted = peer.hello.is_none_or(|old| old.instance != hello.instance);
        if restarted {
            let (named, doubtful, silent) = (peer.named, peer.doubtful, peer.silent);
            *peer = Peer { heard: Some(now), doubtful, silent, ..Peer::new(named) };
        }
        if peer.silent.is_some_and(|since| now.saturating_duration_since(since) >= BENEFIT) {
            peer.silent = None;
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
        peer.last_answer = Some(now);
        peer.silent = None;
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
    /// now on, unless it answered another one meanwhile: then packets were lost, and the peer is there. What else
    /// it says is no answer: behind a firewall it asks and never hears.
    pub fn left_unanswered(&mut self, peer: SocketAddr, sent: Instant, now: Instant) {
        let Some(peer) = self.peers.get_mut(&peer) else { return };
        if peer.last_answer.is_some_and(|answer| answer > sent) {
            return;
        }
        let first = !std::mem::replace(&mut peer.doubtful, true);
        peer.silent = Some(now);
        if first && peer.last_answer.is_none() {
            let since = *self.vain_since.get_or_insert(now);
            if now.saturating_duration_since(since) > VAIN_WINDOW {
                (self.vain_since, self.vain) = (Some(now), 0);
            }
            self.vain += 1;
        }
    }

    /// What to expect of `peer`. Once many newcomers were waited for in vain, only those that ever answered are.
    pub fn expect(&self, peer: &Peer, timeout: Duration) -> Answer {
        let tired = self.vain >= MAX_VAIN && self.vain_since.is_some();
        if tired && peer.last_answer.is_none() { Answer::NotExpected } else { peer.expect(timeout) }
    }

    /// Sets the nodes beyond the broadcast domain, which are always asked. True if there are new ones.
    pub fn name(&mut self, named: &[SocketAddr]) -> bool {
        let new = named.iter().any(|address| !self.is_named(*address));
        self.peers.retain(|address, peer| {
            peer.named = named.contains(address);
            peer.named || peer.heard.is_some()
        });
        for address in named {
            self.peers.entry(*address).or_insert_with(|| Peer::new(true));
        }
        new
    }

    /// Whether [`Known::name`] named it.
    pub fn is_named(&self, address: SocketAddr) -> bool {
        self.peers.get(&address).is_some_and(|peer| peer.named)
    }

    /// The nodes set by [`Known::name`].
    pub fn named(&self) -> impl Iterator<Item = SocketAddr> {
        self.peers.iter().filter(|(_, peer)| peer.named).map(|(address, _)| *address)
    }

    /// Drops who was not heard for [`REMEMBERED`].
    pub fn forget_old(&mut self, now: Instant) {
        if self.vain_since.is_some_and(|since| now.saturating_duration_since(since) > VAIN_WINDOW) {
            (self.vain_since, self.vain) = (None, 0);
        }
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
        self.peers.len() > CROWD && self.peers.values().filter(|p| p.silent.is_none()).count() > CROWD
    }

    /// The peers a query goes to: at most [`CROWD`], named ones first, then those that had something most often
    /// and latest.
    pub fn to_ask(&self) -> Vec<(SocketAddr, &Peer)> {
        let mut all: Vec<(SocketAddr, &Peer)> = self.peers.iter().map(|(address, peer)| (*address, peer)).collect();
        if all.len() > CROWD {
            all.sort_by_key(|(_, p)| std::cmp::Reverse((p.named, p.silent.is_none(), p.haves, p.last_have)));
            all.truncate(CROWD);
        }
        all
    }

    /// All of them, for people.
    pub fn list(&self) -> Vec<Neighbour> {
        let neighbour = |(address, peer): (&SocketAddr, &Peer)| Neighbour {
            address: *address,
            http_port: peer.hello.map(|hello| hello.port),
            named: peer.named,
            heard: peer.heard,
            round_trip: peer.round_trip.map(|(smoothed, _)| smoothed),
        };
        self.peers.iter().map(neighbour).collect()
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
        known.expect(&known.peers[&peer], TIMEOUT)
    }

    #[test]
    fn waits_follow_the_measured_round_trip() {
        let (mut known, now) = (Known::default(), Instant::now());
        let peer = address(1);
        assert!(known.hello(peer, hello(1), now));
        assert_eq!(expect(&known, peer), Answer::Due(4 * TIMEOUT), "not measured yet");
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
        known.left_unanswered(peer, sent, sent);
        assert_eq!(expect(&known, peer), Answer::NotExpected);
        // Its next hello brings it back, in doubt until it answers.
        let again = start + Duration::from_secs(30);
        assert!(!known.hello(peer, hello(1), again));
        assert_eq!(expect(&known, peer), Answer::Due(TIMEOUT));
        known.answered(peer, false, None, again);
        assert_eq!(expect(&known, peer), Answer::Due(4 * TIMEOUT));
    }

    /// A neighbour whose firewall lets nothing in used to cost a second for every miss, as its own queries made it
    /// count as alive.
    #[test]
    fn a_peer_that_asks_and_never_answers_costs_one_wait() {
        let (mut known, now) = (Known::default(), Instant::now());
        let peer = address(1);
        known.hello(peer, hello(1), now);
        known.left_unanswered(peer, now, now);
        known.heard(peer, now + Duration::from_secs(1));
        assert_eq!(expect(&known, peer), Answer::NotExpected);
        // Nor does it help it to seem restarted.
        known.hello(peer, hello(2), now + Duration::from_secs(2));
        assert_eq!(expect(&known, peer), Answer::NotExpected);
        known.hello(peer, hello(3), now + Duration::from_secs(30));
        assert_eq!(expect(&known, peer), Answer::Due(TIMEOUT));
    }

    #[test]
    fn invented_peers_cost_ten_waits_a_minute() {
        let (mut known, now) = (Known::default(), Instant::now());
        known.answered(address(255), true, None, now);
        known.hello(address(255), hello(255), now);
        known.answered(address(255), true, None, now);
        for last in 1..=MAX_VAIN as u8 {
            known.hello(address(last), hello(last), now);
            assert!(matches!(expect(&known, address(last)), Answer::Due(_)));
            // However often one peer is silent, it is one.
            known.left_unanswered(address(last), now, now);
            known.left_unanswered(address(last), now, now);
        }
        known.hello(address(99), hello(99), now);
        assert_eq!(expect(&known, address(99)), Answer::NotExpected);
        assert!(matches!(expect(&known, address(255)), Answer::Due(_)), "one that answered is waited for");
        known.forget_old(now + VAIN_WINDOW + Duration::from_secs(1));
        known.hello(address(99), hello(99), now);
        assert!(matches!(expect(&known, address(99)), Answer::Due(_)));
    }

    #[test]
    fn a_lost_answer_is_no_silence_of_a_peer_that_answers_others() {
        let (mut known, start) = (Known::default(), Instant::now());
        let peer = address(1);
        known.hello(peer, hello(1), start);
        known.answered(peer, true, None, start + Duration::from_millis(30));
        known.left_unanswered(peer, start + Duration::from_millis(10), start + Duration::from_millis(210));
        assert_eq!(expect(&known, peer), Answer::Due(4 * TIMEOUT));
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
