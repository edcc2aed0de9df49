//! How nodes meet: *hello* to all, replies to the hellos of others, greetings for addresses of the
//! kernel's neighbour tables, and *bye*. No I/O.

use super::outgoing::DatagramTarget;
use super::peer::MetBy;
use super::querier::Querier;
use crate::bounded_map::BoundedMap;
use crate::wire::{Hello, Packet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Interval between two broadcasts of *hello*.
const HELLO_INTERVAL: Duration = Duration::from_secs(30);
/// First interval between hellos after a start or a change of network. It doubles up to
/// [`HELLO_INTERVAL`], as for announcements in RFC 6762, section 8.3. Three hellos leave within
/// 500 ms, in which no lookup ends as a miss, so one may be lost.
const FIRST_HELLO_INTERVAL: Duration = Duration::from_millis(100);
/// Maximum random delay of the reply to a hello. It keeps peers from answering a broadcast at the
/// same moment.
const REPLY_SPREAD: Duration = Duration::from_millis(200);
/// Maximum number of replies to hellos in one [`REPLY_WINDOW`]. At the bound no reply is sent; the
/// next broadcast hello reaches the peer. A datagram to a forged address stays in the socket's send
/// buffer of 416 KiB for 3 s and takes about 800 bytes of it.
const MAX_REPLIES: usize = 32;
/// Time in which at most [`MAX_REPLIES`] replies leave.
const REPLY_WINDOW: Duration = Duration::from_secs(1);
/// Maximum number of hellos to addresses from one reading of the kernel's neighbour tables. Further
/// addresses are greeted after a later reading.
const MAX_GREETINGS: usize = 64;
/// Interval after which known addresses of the neighbour tables are greeted again: a hello may have
/// been lost, or the host may have started peerix.
const GREETING_RESET_INTERVAL: Duration = Duration::from_secs(300);
/// Maximum number of greeted addresses that are remembered. At the bound the oldest is forgotten,
/// and greeted again.
const MAX_GREETED: usize = 4096;

/// A reply to a hello.
struct Reply {
    to: SocketAddr,
    /// When it leaves, in real time.
    at: Instant,
    is_sent: bool,
}

/// The hellos that this node sends, and what it does with those of others.
pub struct Hellos {
    /// The hello of this node.
    pub own: Hello,
    has_lan: bool,
    /// When the next hello is broadcast, and the interval to the one after it.
    next: Instant,
    interval: Duration,
    /// The replies that wait or were sent in the last [`REPLY_WINDOW`]; at most [`MAX_REPLIES`].
    replies: Vec<Reply>,
    /// The addresses that were greeted, until `next_greeting_reset`.
    greeted: BoundedMap<SocketAddr, (), MAX_GREETED>,
    next_greeting_reset: Instant,
}

impl Hellos {
    /// Creates the state of a node that starts at `now`. The first hello is due at once. `own`
    /// describes this node. Without a LAN it says no hello.
    pub fn new(own: Hello, has_lan: bool, now: Instant) -> Self {
        Hellos {
            own,
            has_lan,
            next: now,
            interval: FIRST_HELLO_INTERVAL,
            replies: Vec::new(),
            greeted: BoundedMap::default(),
            next_greeting_reset: now,
        }
    }

    /// When [`Hellos::send_due`] has to be called next.
    pub fn next_due(&self) -> Instant {
        let waiting = self.replies.iter().filter(|reply| !reply.is_sent);
        waiting.map(|reply| reply.at).fold(self.next, Instant::min)
    }

    /// Sends the hellos and replies that are due. With each hello, peers are forgotten from which
    /// nothing comes.
    pub fn send_due(&mut self, querier: &mut Querier) {
        let now = querier.now;
        if now >= self.next {
            self.next = now + self.interval;
            self.interval = HELLO_INTERVAL.min(self.interval * 2);
            self.send_to_all(Packet::Hello(self.own), querier);
            for address in querier.peers.forget_old(now) {
                querier.mark_silent(address);
            }
        }
        for reply in self.replies.iter_mut().filter(|reply| !reply.is_sent && reply.at <= now) {
            reply.is_sent = true;
            querier.out.push((DatagramTarget::Peer(reply.to), Packet::Hello(self.own)));
        }
    }

    /// Sends *bye* to all.
    pub fn bye(&self, querier: &mut Querier) {
        self.send_to_all(Packet::Bye(self.own), querier);
    }

    /// Broadcasts a packet, and sends it to each peer that `--peer` names.
    fn send_to_all(&self, packet: Packet, querier: &mut Querier) {
        if self.has_lan {
            querier.out.push((DatagramTarget::Everyone, packet.clone()));
            let named = querier.peers.iter().filter(|(_, peer)| peer.is_named);
            let to_named =
                named.map(|(address, _)| (DatagramTarget::Peer(address), packet.clone()));
            querier.out.extend(to_named);
        }
    }

    /// Schedules a hello to one peer.
    pub fn reply_to(&mut self, to: SocketAddr, querier: &mut Querier) {
        let now = querier.now;
        self.replies.retain(|reply| !reply.is_sent || reply.at + REPLY_WINDOW > now);
        let is_waiting = self.replies.iter().any(|reply| reply.to == to && !reply.is_sent);
        if self.replies.len() < MAX_REPLIES && !is_waiting {
            let spread = f64::from((querier.random)()) / f64::from(u32::MAX);
            let at = now + REPLY_SPREAD.mul_f64(spread);
            self.replies.push(Reply { to, at, is_sent: false });
        }
    }

    /// Sends hello to those of `addresses`, which are LAN addresses of the kernel's neighbour
    /// tables, that are no peers. Broadcasts may not reach these hosts.
    pub fn greet(&mut self, addresses: impl Iterator<Item = SocketAddr>, querier: &mut Querier) {
        if querier.now >= self.next_greeting_reset {
            self.next_greeting_reset = querier.now + GREETING_RESET_INTERVAL;
            self.greeted.clear();
        }
        let mut greetings = 0;
        for address in addresses {
            let is_met =
                querier.peers.get(address).is_some() || self.greeted.get(&address).is_some();
            if !is_met && greetings < MAX_GREETINGS {
                self.greeted.insert(address, ());
                querier.out.push((DatagramTarget::Peer(address), Packet::Hello(self.own)));
                greetings += 1;
            }
        }
    }

    /// Replaces the addresses that `--peer` names. Those that were no peers get a hello and the
    /// open lookups.
    pub fn set_named(&self, addresses: &[SocketAddr], querier: &mut Querier) {
        for address in querier.peers.set_named(addresses) {
            if self.has_lan {
                querier.out.push((DatagramTarget::Peer(address), Packet::Hello(self.own)));
                querier.ask_open(address);
            }
        }
    }

    /// Makes hellos due as after a start, because the network has changed.
    pub fn handle_network_change(&mut self, now: Instant) {
        (self.next, self.interval) = (now, FIRST_HELLO_INTERVAL);
        self.greeted.clear();
    }

    /// Handles a hello. Its sender becomes a peer.
    pub fn handle_hello(&mut self, from: SocketAddr, hello: Hello, querier: &mut Querier) {
        let met_by =
            if self.greeted.get(&from).is_some() { MetBy::NeighbourTable } else { MetBy::Hello };
        let heard = querier.peers.record_heard(from, met_by, querier.now);
        let Some((peer, is_first)) = heard else { return };
        if !peer.record_hello(hello, querier.now) {
            return;
        }
        let (is_live, unanswered) = (peer.is_live(), peer.unanswered(|_| true));
        log::debug!("peer {from}: hello");
        // A new instance does not know this node, and may have lost the queries to the one before
        // it.
        self.reply_to(from, querier);
        if is_first {
            querier.ask_open(from);
        } else if is_live {
            querier.ask_again(from, &unanswered);
        }
        if querier.peers.get(from).is_some_and(|peer| peer.oldest_owed().is_none()) {
            querier.probe(from);
        }
    }

    /// Handles a *bye*. Anybody can forge one. So the peer stays live and is probed: the *bye* only
    /// limits how long this node waits for an answer.
    pub fn handle_bye(&self, from: SocketAddr, bye: Hello, querier: &mut Querier) {
        let Some(peer) = querier.peers.get_mut(from).filter(|peer| peer.is_live()) else { return };
        if peer.hello().is_none_or(|hello| hello.instance == bye.instance) {
            log::debug!("peer {from}: bye");
            peer.record_bye(querier.now);
            querier.probe(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Hellos {
        /// Panics if a table is larger than its bound.
        pub fn assert_bounds(&self) {
            assert!(self.replies.len() <= MAX_REPLIES);
        }
    }
}
