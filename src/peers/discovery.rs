//! LAN discovery: one thread that owns the UDP sockets, asks the peers who has a path, and answers them.
//!
//! A query goes unicast to every known peer and by broadcast (IPv4) and link-local multicast (IPv6) to the rest. It
//! ends at the first answer that satisfies its asker, or when everyone who is waited for said *have not*: see
//! the table of known peers for who is waited for and how long. [`Discovery`] decides, without I/O; [`Handle`] runs it.
//!
//! Strangers, who are on no network of this machine, may be answered, but are never known: nobody is asked because
//! they said something.

use super::Holder;
use super::asks::{Asks, Question, Told};
use super::known::{Answer, CROWD, Known, Neighbour};
use super::queries::{Due, Queries, Query, Tally};
use crate::network::{Interface, LanNetworks, MULTICAST_GROUP, NetworkWatcher, Networks};
use crate::nix::HashPart;
use crate::on_drop::OnDrop;
use crate::wire::{Hello, Packet};
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Longest wait of the thread's loop, so that a watchdog which looks every 20 s sees it turn.
const MAX_WAIT: Duration = Duration::from_secs(15);

/// Pause before an interface on which the multicast group could not be joined is tried again.
const JOIN_RETRY: Duration = Duration::from_secs(5);

/// How often a node says *hello*.
const HELLO_INTERVAL: Duration = Duration::from_secs(30);

/// In the first moments after the start nobody is known because nobody had time to answer; a query waits so long
/// for the first peer. Once per start, and less than Nix takes to start.
const START_GRACE: Duration = Duration::from_millis(500);

/// With no peer known, one query in so much time waits for unknown ones; the others cost nothing. They are all still
/// broadcast, and whoever answers late is known from then on.
const QUIET: Duration = Duration::from_secs(30);

/// A query comes both unicast and by broadcast. The second copy within this time is not answered with a second
/// *have not*; a repeat, which comes later, is. (A second *have* is sent: it may be the one that arrives.)
const ECHO: Duration = Duration::from_millis(5);
/// Echoes looked back at: more than come in that time.
const ECHOES: usize = 64;

/// Holders one query delivers at most: alternates beyond that are not needed.
const MAX_HOLDERS: usize = 16;

/// Questions waiting for the thread; each belongs to a connection thread that waits, of which there are 1,024.
const MAX_WAITING: usize = 1024;

/// Datagrams read from one socket before the others and the waiting questions have their turn.
const BATCH: usize = 64;

/// What discovery needs to know of the rest of the daemon.
pub trait Neighbourhood: Send {
    /// Whether a peer may be at this address.
    fn is_lan(&self, address: SocketAddr) -> bool;
    /// Whether there is a LAN at all. Without one nothing is sent to anybody who did not ask.
    fn has_lan(&self) -> bool;
    /// Whether a node at this address, which is no LAN's, is to be answered. Packets from elsewhere are dropped.
    fn is_stranger(&self, address: SocketAddr) -> bool;
    /// Whether this is an address of this machine.
    fn is_own(&self, ip: IpAddr) -> bool;
    /// Whether this node would serve the path to that asker. Must not block.
    fn would_serve(&mut self, hash_part: &HashPart, asker: SocketAddr) -> bool;
}

/// Everything that happens to discovery.
pub enum Event<'a> {
    /// A datagram came.
    Datagram {
        /// From there.
        from: SocketAddr,
        /// With this content.
        bytes: &'a [u8],
    },
    /// Somebody here looks for a path.
    Ask(Ask),
    /// Somebody here asks those whom a tracker named.
    AskCandidates(Question),
    /// The nodes that `--peer` names have these addresses now.
    Named(Vec<SocketAddr>),
    /// Somebody here wants to know who is known.
    List(Sender<Vec<Neighbour>>),
    /// Time has passed.
    Tick,
    /// The interfaces changed.
    NetworkChanged,
}

/// A question to the LAN. The channel ends when the query does.
pub struct Ask {
    hash_part: HashPart,
    holders: Sender<Holder>,
    tally: Arc<Tally>,
}

/// Where a datagram goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// To one node.
    Peer(SocketAddr),
    /// To every network.
    Everyone,
}

/// The decisions of LAN discovery. No I/O; time is passed in.
pub struct Discovery<N> {
    neighbourhood: N,
    instance: [u8; 8],
    http_port: u16,
    udp_port: u16,
    timeout: Duration,
    known: Known,
    queries: Queries,
    asks: Asks,
    started: Instant,
    quiet_until: Option<Instant>,
    next_hello: Instant,
    was_crowded: bool,
    have_nots: VecDeque<(SocketAddr, u32, Instant)>,
}

impl<N: Neighbourhood> Discovery<N> {
    /// `timeout` is how long unknown peers may take; `random` makes the instance ID and the first request ID.
    pub fn new(
        neighbourhood: N,
        http_port: u16,
        udp_port: u16,
        timeout: Duration,
        random: [u8; 12],
        now: Instant,
    ) -> Self {
        let [a, b, c, d, instance @ ..] = random;
        Discovery {
            neighbourhood,
            instance,
            http_port,
            udp_port,
            timeout,
            known: Known::default(),
            queries: Queries::new(u32::from_be_bytes([a, b, c, d])),
            asks: Asks::new(u32::from_be_bytes([d, a, b, c])),
            started: now,
            quiet_until: None,
            next_hello: now,
            was_crowded: false,
            have_nots: VecDeque::new(),
        }
    }

    fn hello(&self) -> Hello {
        Hello { port: self.http_port, instance: self.instance, crowded: self.known.is_crowded() }
    }

    /// Handles one event; what is to be sent is added to `out`.
    pub fn handle(&mut self, event: Event<'_>, now: Instant, out: &mut Vec<(To, Packet)>) {
        match event {
            Event::Datagram { from, bytes } => self.datagram(from, bytes, now, out),
            Event::Ask(ask) => self.ask(ask, now, out),
            Event::AskCandidates(question) => self.asks.ask(question, now),
            Event::Named(addresses) => {
                if self.known.name(&addresses) {
                    self.greet(now);
                }
            }
            Event::List(list) => drop(list.try_send(self.known.list())),
            Event::NetworkChanged => self.greet(now),
            Event::Tick => {}
        }
        self.due(now, out);
    }

    /// Somebody may be there who was not.
    fn greet(&mut self, now: Instant) {
        self.next_hello = now;
        self.quiet_until = None;
    }

    /// When time alone makes something happen.
    pub fn next_due(&self) -> Instant {
        let queries = [self.queries.next_due(), self.asks.next_due()];
        queries.into_iter().flatten().fold(self.next_hello, Instant::min)
    }

    /// What is said at the end.
    pub fn bye(&self, out: &mut Vec<(To, Packet)>) {
        self.to_all(Packet::Bye(self.hello()), out);
    }

    fn due(&mut self, now: Instant, out: &mut Vec<(To, Packet)>) {
        let crowded = self.known.is_crowded();
        if now >= self.next_hello || crowded != self.was_crowded {
            self.was_crowded = crowded;
            self.next_hello = now + HELLO_INTERVAL;
            self.known.forget_old(now);
            self.to_all(Packet::Hello(self.hello()), out);
        }
        self.asks.due(now, |id, hash_part, to| out.push((To::Peer(to), Packet::Query { id, hash_part })));
        while let Some(due) = self.queries.due(now) {
            match due {
                Due::Repeat { id, hash_part, to, broadcast } => {
                    let query = Packet::Query { id, hash_part };
                    out.extend(to.into_iter().map(|peer| (To::Peer(peer), query.clone())));
                    if broadcast {
                        out.push((To::Everyone, query));
                    }
                }
                Due::Over { sent, unanswered, answered } => {
                    if unanswered.is_empty() && !answered && now > sent {
                        self.quiet_until = Some(now + QUIET);
                    }
                    unanswered.into_iter().for_each(|peer| self.known.left_unanswered(peer, sent, now));
                }
            }
        }
    }

    fn to_all(&self, packet: Packet, out: &mut Vec<(To, Packet)>) {
        if !self.neighbourhood.has_lan() {
            return;
        }
        out.extend(self.known.named().map(|peer| (To::Peer(peer), packet.clone())));
        out.push((To::Everyone, packet));
    }

    fn ask(&mut self, ask: Ask, now: Instant, out: &mut Vec<(To, Packet)>) {
        if !self.neighbourhood.has_lan() {
            return; // Its channel ends with it.
        }
        let to_ask = self.known.to_ask();
        let mut open_for = None::<Duration>;
        let mut keep_open = |wait: Duration| open_for = Some(open_for.map_or(wait, |open| open.max(wait)));
        let (mut slowest, mut shortest) = (Duration::ZERO, Duration::MAX);
        let mut anybody_expected = false;
        let asked: Vec<(SocketAddr, Option<Duration>)> = to_ask
            .iter()
            .map(|(address, peer)| {
                slowest = slowest.max(peer.usual_answer());
                match self.known.expect(peer, self.timeout) {
                    Answer::Due(wait) => {
                        anybody_expected = true;
                        shortest = shortest.min(wait);
                        (*address, Some(wait))
                    }
                    Answer::Maybe(wait) => {
                        anybody_expected = true;
                        keep_open(wait);
                        (*address, None)
                    }
                    Answer::Unknown | Answer::NotExpected => (*address, None),
                }
            })
            .collect();
        if self.known.len() > CROWD {
            keep_open(self.timeout);
        }
        if !anybody_expected {
            let grace = (self.started + START_GRACE).saturating_duration_since(now);
            if !grace.is_zero() {
                keep_open(grace.max(self.timeout));
            } else if self.quiet_until.is_none_or(|until| until <= now) {
                keep_open(self.timeout);
            }
        }
        // The slowest need not be asked again before they can have answered; but the fastest, which are waited for
        // less, have to be in time.
        let first_step = (self.timeout / 3).max(slowest.min(shortest / 3)).max(Duration::from_millis(1));
        let query = Query::new(ask.hash_part, asked.iter().copied(), open_for, first_step, ask.holders, ask.tally, now);
        let Some(id) = self.queries.insert(query, now) else {
            log::debug!("query for {}: too many in flight", ask.hash_part);
            return;
        };
        let packet = Packet::Query { id, hash_part: ask.hash_part };
        out.extend(asked.into_iter().map(|(peer, _)| (To::Peer(peer), packet.clone())));
        out.push((To::Everyone, packet));
    }

    fn datagram(&mut self, from: SocketAddr, bytes: &[u8], now: Instant, out: &mut Vec<(To, Packet)>) {
        if self.answers_ask(from, bytes) {
            return;
        }
        // Our own broadcasts come back to us.
        if from.port() == self.udp_port && self.neighbourhood.is_own(from.ip()) {
            return;
        }
        let is_lan = self.neighbourhood.is_lan(from);
        if !is_lan && !self.neighbourhood.is_stranger(from) {
            return;
        }
        let packet = match Packet::parse(bytes) {
            Ok(packet) => packet,
            Err(e) => return log::debug!("peer {from}: {e}"),
        };
        match packet {
            Packet::Query { id, hash_part } => {
                if is_lan && self.may_be_peer(from) && self.known.heard(from, now) {
                    out.push((To::Peer(from), Packet::Hello(self.hello())));
                }
                self.answer(from, id, hash_part, now, out);
            }
            Packet::Have { id, port, url_path } => {
                // A link-local address is only one together with the interface it was seen on.
                let mut http = from;
                http.set_port(port);
                self.answered(id, from, Some(Holder { http, url_path }), now);
            }
            Packet::HaveNot { id } => self.answered(id, from, None, now),
            Packet::Hello(_) | Packet::Bye(_) if !is_lan => {}
            Packet::Hello(hello) => {
                if hello.instance == self.instance || !self.may_be_peer(from) {
                    return;
                }
                if self.known.hello(from, hello, now) {
                    log::debug!("peer {from}: hello");
                    out.push((To::Peer(from), Packet::Hello(self.hello())));
                }
            }
            Packet::Bye(bye) => {
                log::debug!("peer {from}: bye");
                self.known.bye(from, bye);
            }
        }
    }

    /// Whether this answers a question to candidates, who may be anywhere.
    fn answers_ask(&mut self, from: SocketAddr, bytes: &[u8]) -> bool {
        // What it says of its port and path is its own view, behind a router perhaps.
        match Packet::parse(bytes) {
            Ok(Packet::Have { id, .. }) => self.asks.answered(id, from, true),
            Ok(Packet::HaveNot { id }) => self.asks.answered(id, from, false),
            _ => false,
        }
    }

    /// Peers use one port for everything, so that a neighbour is one peer; what `--peer` names may have another.
    fn may_be_peer(&self, from: SocketAddr) -> bool {
        from.port() == self.udp_port || self.known.is_named(from)
    }

    fn answered(&mut self, id: u32, from: SocketAddr, holder: Option<Holder>, now: Instant) {
        let has_it = holder.is_some();
        let is_lan = self.neighbourhood.is_lan(from);
        // Broadcasts go to this port, and only from there does a node answer them.
        let broadcast_to = from.port() == self.udp_port && is_lan;
        match self.queries.answered(id, from, broadcast_to, holder, now) {
            // A stranger's answer counts for the query that went to it, and makes it no peer.
            _ if !is_lan => {}
            Some(answer) => self.known.answered(from, has_it, answer.round_trip, now),
            // Too late for the query, but it tells how long the peer takes.
            None => match self.queries.late(id, now) {
                Some(round_trip) if self.may_be_peer(from) => {
                    self.known.answered(from, has_it, Some(round_trip), now);
                }
                _ => {}
            },
        }
    }

    fn answer(&mut self, from: SocketAddr, id: u32, hash_part: HashPart, now: Instant, out: &mut Vec<(To, Packet)>) {
        if self.neighbourhood.would_serve(&hash_part, from) {
            let url_path = format!("local/{hash_part}.narinfo");
            out.push((To::Peer(from), Packet::Have { id, port: self.http_port, url_path }));
            return;
        }
        // It spares the LAN an answer from everybody to every query; a stranger asks few.
        if self.known.is_crowded() && self.neighbourhood.is_lan(from) {
            return;
        }
        while self.have_nots.front().is_some_and(|(_, _, at)| now.saturating_duration_since(*at) > ECHO)
            || self.have_nots.len() >= ECHOES
        {
            self.have_nots.pop_front();
        }
        if !self.have_nots.iter().any(|(to, other, _)| *to == from && *other == id) {
            self.have_nots.push_back((from, id, now));
            out.push((To::Peer(from), Packet::HaveNot { id }));
        }
    }
}

/// The running thread. Dropping it says *bye* and ends it.
pub struct Handle {
    ask: Arc<Wake>,
    alive: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Sends questions to the thread, from any thread.
pub struct Wake {
    sender: Sender<Command>,
    event: OwnedFd,
    // Not commands: a full queue must not keep the thread from ending.
    bye: AtomicBool,
    stop: AtomicBool,
}

enum Command {
    Ask(Ask),
    AskCandidates(Question),
    Named(Vec<SocketAddr>),
    List(Sender<Vec<Neighbour>>),
}

impl Wake {
    /// Asks the LAN who has the path. The channel yields holders as they answer and ends when nobody is waited for
    /// any more, in one second or `--timeout` at most.
    /// `tally` tells who did not answer, and takes it that the asker needs no more.
    pub fn ask(&self, hash_part: HashPart, tally: Arc<Tally>) -> Receiver<Holder> {
        let (holders, receiver) = bounded(MAX_HOLDERS);
        // A full queue drops the question, and its channel ends: a miss, not a wait.
        self.send(Command::Ask(Ask { hash_part, holders, tally }));
        receiver
    }

    /// Asks each of these whether it has the path. The channel yields what they say and ends when all have answered, at
    /// `until` at the latest.
    pub fn ask_candidates(&self, hash_part: HashPart, candidates: Vec<SocketAddr>, until: Instant) -> Receiver<Told> {
        let (told, receiver) = bounded(candidates.len());
        self.send(Command::AskCandidates(Question { hash_part, candidates, told, until }));
        receiver
    }

    /// Tells the thread the addresses that `--peer` names.
    pub fn set_named(&self, addresses: Vec<SocketAddr>) {
        self.send(Command::Named(addresses));
    }

    /// The neighbours that are known now; `None` if the thread does not say so within `timeout`.
    pub fn neighbours(&self, timeout: Duration) -> Option<Vec<Neighbour>> {
        let (list, receiver) = bounded(1);
        let until = Instant::now() + timeout;
        // A queue that is full for a moment is no sign that the thread hangs.
        self.sender.send_deadline(Command::List(list), until).ok()?;
        self.ring();
        receiver.recv_deadline(until).ok()
    }

    fn send(&self, command: Command) {
        if self.sender.try_send(command).is_ok() {
            self.ring();
        }
    }

    fn ring(&self) {
        // Can only fail when the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }
}

impl Handle {
    /// Starts the thread on bound sockets. `on_end` runs when it ends, for whatever reason.
    ///
    /// # Errors
    /// No descriptor or no thread to be had.
    pub fn spawn<N: Neighbourhood + 'static>(
        discovery: Discovery<N>,
        sockets: Vec<UdpSocket>,
        networks: Arc<Networks>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Handle> {
        let (sender, commands) = bounded(MAX_WAITING);
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let ask = Arc::new(Wake { sender, event, bye: AtomicBool::new(false), stop: AtomicBool::new(false) });
        let wake = ask.clone();
        let alive = Arc::new(AtomicU64::new(0));
        let udp_port = discovery.udp_port;
        let sockets = Sockets::new(sockets, udp_port, networks, discovery.neighbourhood.has_lan())?;
        let turns = alive.clone();
        let thread = thread::Builder::new().name("discovery".into()).spawn(move || {
            let _end = OnDrop::new(|| {
                // What is left in the queue would keep its askers waiting for as long as somebody can send.
                commands.try_iter().for_each(drop);
                on_end();
            });
            run(discovery, sockets, &commands, &wake, &turns);
        })?;
        Ok(Handle { ask, alive, thread: Some(thread) })
    }

    /// Has the peers told that this node leaves. The thread goes on: questions under way still get their answers.
    pub fn say_bye(&self) {
        self.ask.bye.store(true, Ordering::SeqCst);
        self.ask.ring();
    }

    /// For those who ask.
    pub fn wake(&self) -> Arc<Wake> {
        self.ask.clone()
    }

    /// Turns of the thread's loop so far; it makes one every 15 s at least.
    pub fn turns(&self) -> u64 {
        self.alive.load(Ordering::Relaxed)
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.ask.stop.store(true, Ordering::SeqCst);
        self.ask.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run<N: Neighbourhood>(
    mut discovery: Discovery<N>,
    mut sockets: Sockets,
    commands: &Receiver<Command>,
    wake: &Wake,
    turns: &AtomicU64,
) {
    let mut out = Vec::new();
    let mut buffer = [0; Packet::MAX_LEN + 1];
    discovery.handle(Event::Tick, Instant::now(), &mut out);
    loop {
        sockets.send(&mut out);
        let now = Instant::now();
        let due = sockets.next_due().into_iter().fold(discovery.next_due(), Instant::min);
        let wait = due.saturating_duration_since(now).min(MAX_WAIT);
        sockets.wait(&wake.event, wait);
        turns.fetch_add(1, Ordering::Relaxed);
        let stop = wake.stop.load(Ordering::SeqCst);
        if wake.bye.swap(false, Ordering::SeqCst) || stop {
            // Said again at the end: a query that was sent since would have made this node known again.
            discovery.bye(&mut out);
            sockets.send(&mut out);
        }
        if stop {
            return;
        }
        while let Ok(command) = commands.try_recv() {
            let event = match command {
                Command::Ask(ask) => Event::Ask(ask),
                Command::AskCandidates(question) => Event::AskCandidates(question),
                Command::Named(addresses) => Event::Named(addresses),
                Command::List(list) => Event::List(list),
            };
            discovery.handle(event, Instant::now(), &mut out);
        }
        sockets.send(&mut out);
        for i in 0..sockets.sockets.len() {
            for _ in 0..BATCH {
                let Ok((len, from)) = sockets.receive(i, &mut buffer) else { break };
                discovery.handle(Event::Datagram { from, bytes: &buffer[..len] }, Instant::now(), &mut out);
            }
        }
        let event = if sockets.network_changed() { Event::NetworkChanged } else { Event::Tick };
        discovery.handle(event, Instant::now(), &mut out);
    }
}

/// The sockets, and which of them reaches whom.
struct Sockets {
    sockets: Vec<UdpSocket>,
    bound: Vec<Bound>,
    port: u16,
    networks: Arc<Networks>,
    watcher: NetworkWatcher,
    /// Which socket is in the multicast group on which interface.
    joined: HashSet<(usize, u32)>,
    /// When a join that failed is tried again.
    join_again: Option<Instant>,
    unreachable: bool,
    /// Without one, no group is joined.
    has_lan: bool,
}

/// What a socket is bound to.
#[derive(Debug, Clone, Copy)]
struct Bound {
    address: SocketAddr,
    /// An IPv6 socket that does IPv4 too, as systemd makes them by default.
    dual: bool,
}

impl Bound {
    fn does(&self, target: SocketAddr) -> bool {
        self.dual || self.address.is_ipv4() == target.is_ipv4()
    }
}

impl Sockets {
    fn new(sockets: Vec<UdpSocket>, port: u16, networks: Arc<Networks>, has_lan: bool) -> io::Result<Self> {
        let mut bound = Vec::new();
        for socket in &sockets {
            socket.set_nonblocking(true)?;
            let address = socket.local_addr()?;
            let socket = socket2::SockRef::from(socket);
            let dual = address.is_ipv6() && address.ip().is_unspecified() && !socket.only_v6()?;
            bound.push(Bound { address, dual });
            socket.set_broadcast(true)?;
            // Twenty-five queries at once to a busy machine should not overflow it; the kernel caps the value.
            socket.set_recv_buffer_size(1 << 20)?;
        }
        let mut sockets = Sockets {
            sockets,
            bound,
            port,
            watcher: NetworkWatcher::new(networks.clone(), Instant::now()),
            networks,
            joined: HashSet::new(),
            join_again: None,
            unreachable: false,
            has_lan,
        };
        sockets.join(Instant::now());
        Ok(sockets)
    }

    /// The next datagram of that socket, and whom it is from.
    fn receive(&self, at: usize, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr)> {
        let (len, from) = self.sockets[at].recv_from(buffer)?;
        let from = match from {
            SocketAddr::V6(v6) => match v6.ip().to_ipv4_mapped() {
                Some(v4) => SocketAddr::from((v4, v6.port())),
                None => from,
            },
            SocketAddr::V4(_) => from,
        };
        Ok((len, from))
    }

    fn wait(&self, wake: &OwnedFd, wait: Duration) {
        let mut fds: Vec<PollFd<'_>> = self.sockets.iter().map(|s| PollFd::new(s, PollFlags::IN)).collect();
        fds.push(PollFd::new(wake, PollFlags::IN));
        let news = self.watcher.as_fd();
        fds.extend(news.as_ref().map(|news| PollFd::new(news, PollFlags::IN)));
        // Rounded up, or the last fraction of a millisecond would be spent in a busy loop on old kernels.
        let timeout = Timespec::try_from(wait).unwrap_or(Timespec { tv_sec: 1, tv_nsec: 0 });
        if let Err(e) = poll(&mut fds, Some(&timeout))
            && e != rustix::io::Errno::INTR
        {
            log::error!("poll: {e}");
            thread::sleep(Duration::from_millis(100));
        }
        let _ = rustix::io::read(wake, &mut [0u8; 8]);
    }

    /// When [`Sockets::network_changed`] has to be called even if the kernel reports no change.
    fn next_due(&self) -> Option<Instant> {
        [self.watcher.next_due(), self.join_again].into_iter().flatten().min()
    }

    /// Reads the networks of this machine again if there is a reason to; true if they changed.
    fn network_changed(&mut self) -> bool {
        let now = Instant::now();
        let changed = self.watcher.update(std::mem::take(&mut self.unreachable), now);
        if changed || self.join_again.is_some_and(|at| at <= now) {
            self.join(now);
        }
        changed
    }

    /// Joins the multicast group on interfaces that are new, and forgets those that are gone.
    fn join(&mut self, now: Instant) {
        if !self.has_lan {
            return;
        }
        let indexes: HashSet<u32> = self.networks.current().multicast_interfaces().into_iter().collect();
        self.joined.retain(|(_, index)| indexes.contains(index));
        self.join_again = None;
        for (at, (socket, bound)) in self.sockets.iter().zip(&self.bound).enumerate() {
            let SocketAddr::V6(bound) = bound.address else { continue };
            let _ = socket.set_multicast_loop_v6(false);
            for &index in indexes.iter().filter(|&&index| hears_group(bound, index)) {
                if self.joined.contains(&(at, index)) {
                    continue;
                }
                match socket.join_multicast_v6(&MULTICAST_GROUP, index) {
                    Ok(()) => {}
                    // The kernel kept it over the time the interface was without IPv6.
                    Err(e) if e.kind() == io::ErrorKind::AddrInUse => {}
                    Err(e) => {
                        log::debug!("multicast on interface {index}: {e}");
                        self.join_again = Some(now + JOIN_RETRY);
                        continue;
                    }
                }
                self.joined.insert((at, index));
            }
        }
    }

    fn send(&mut self, out: &mut Vec<(To, Packet)>) {
        for (to, packet) in out.drain(..) {
            let bytes = packet.encode();
            match to {
                To::Peer(peer) => self.send_to(&bytes, peer),
                To::Everyone => {
                    for target in self.networks.current().broadcast_targets(self.port) {
                        self.send_to(&bytes, target);
                    }
                }
            }
        }
    }

    fn send_to(&mut self, bytes: &[u8], target: SocketAddr) {
        let Some(at) = socket_for(target, &self.bound, &self.networks.current()) else { return };
        let mapped = match target {
            SocketAddr::V4(v4) if self.bound[at].dual => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
            _ => target,
        };
        if let Err(e) = self.sockets[at].send_to(bytes, mapped)
            && e.kind() != io::ErrorKind::WouldBlock
        {
            log::debug!("datagram to {target}: {e}");
            self.unreachable = true;
        }
    }
}

/// Whether a socket bound to this can hear the multicast group on that interface: only if it is bound to everything,
/// or to the group there.
fn hears_group(bound: SocketAddrV6, index: u32) -> bool {
    bound.ip().is_unspecified() || *bound.ip() == MULTICAST_GROUP && bound.scope_id() == index
}

/// Which socket reaches the target: one bound to everything, or to the address in the target's network; a single node
/// elsewhere, which `--peer` names, through whichever is bound to an address of this machine.
fn socket_for(target: SocketAddr, bound: &[Bound], networks: &LanNetworks) -> Option<usize> {
    let interfaces = networks.interfaces();
    let group_on = match target {
        SocketAddr::V6(v6) if v6.ip().is_multicast() => Some(v6.scope_id()),
        _ => None,
    };
    let is_broadcast = |ip| interfaces.iter().any(|i| i.broadcast.map(IpAddr::V4) == Some(ip));
    let reaches = |i: &Interface| group_on.map_or_else(|| i.reaches(target.ip()), |index| i.index == index);
    let near = |bound: &Bound| {
        let ip = bound.address.ip();
        bound.does(target) && (ip.is_unspecified() || interfaces.iter().any(|i| i.address == ip && reaches(i)))
    };
    let far = |bound: &Bound| {
        let ip = bound.address.ip();
        bound.does(target) && !ip.is_loopback() && !ip.is_multicast() && !is_broadcast(ip)
    };
    let to_one = group_on.is_none() && !is_broadcast(target.ip());
    bound.iter().position(near).or_else(|| bound.iter().position(far).filter(|_| to_one))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkPolicy;
    use crossbeam_channel::TryRecvError;

    const MS: Duration = Duration::from_millis(1);
    const TIMEOUT: Duration = Duration::from_millis(50);
    const HELD: &str = "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz";

    /// 10.0.0.0/24 is the LAN, if there is one, 10.0.0.1 this node, which holds one path and answers 198.51.100.0/24.
    struct Net {
        has_lan: bool,
    }

    fn is_in(net: [u8; 3], ip: IpAddr) -> bool {
        matches!(ip, IpAddr::V4(v4) if v4.octets()[..3] == net)
    }

    impl Neighbourhood for Net {
        fn is_lan(&self, address: SocketAddr) -> bool {
            self.has_lan && is_in([10, 0, 0], address.ip())
        }
        fn has_lan(&self) -> bool {
            self.has_lan
        }
        fn is_stranger(&self, address: SocketAddr) -> bool {
            is_in([198, 51, 100], address.ip())
        }
        fn is_own(&self, ip: IpAddr) -> bool {
            ip == IpAddr::from([10, 0, 0, 1])
        }
        fn would_serve(&mut self, hash_part: &HashPart, _: SocketAddr) -> bool {
            hash_part.as_str() == HELD
        }
    }

    struct Node {
        discovery: Discovery<Net>,
        now: Instant,
    }

    fn peer(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 12304))
    }

    fn hello_of(last: u8) -> Packet {
        Packet::Hello(Hello { port: 12304, instance: [last; 8], crowded: false })
    }

    fn absent() -> HashPart {
        HashPart::parse(&[b'0'; 32]).unwrap()
    }

    impl Node {
        /// A node whose start is long past, so that no grace is left.
        fn settled() -> Node {
            let mut node = Node::fresh();
            node.now += Duration::from_secs(5);
            node
        }

        fn fresh() -> Node {
            Node::on(Net { has_lan: true })
        }

        fn on(net: Net) -> Node {
            let now = Instant::now();
            let mut node = Node { discovery: Discovery::new(net, 12304, 12304, TIMEOUT, [9; 12], now), now };
            node.event(Event::Tick);
            node
        }

        fn event(&mut self, event: Event<'_>) -> Vec<(To, Packet)> {
            let mut out = Vec::new();
            self.discovery.handle(event, self.now, &mut out);
            out
        }

        fn receive(&mut self, from: SocketAddr, packet: &Packet) -> Vec<(To, Packet)> {
            self.event(Event::Datagram { from, bytes: &packet.encode() })
        }

        /// Asks for an absent path; gives the query's ID, whom it went to, and the channel.
        fn ask(&mut self) -> (u32, Vec<To>, Receiver<Holder>) {
            let (holders, receiver) = bounded(4);
            let out = self.event(Event::Ask(Ask { hash_part: absent(), holders, tally: Arc::default() }));
            let queries = out.iter().filter_map(|(to, packet)| match packet {
                Packet::Query { id, .. } => Some((*id, *to)),
                _ => None,
            });
            let (ids, to): (Vec<u32>, Vec<To>) = queries.unzip();
            (ids[0], to, receiver)
        }

        fn after(&mut self, wait: Duration) -> Vec<(To, Packet)> {
            self.now += wait;
            self.event(Event::Tick)
        }
    }

    fn is_over(holders: &Receiver<Holder>) -> bool {
        holders.try_recv() == Err(TryRecvError::Disconnected)
    }

    #[test]
    fn a_thread_that_hangs_is_noticed() {
        let (sender, commands) = bounded(1);
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let wake = Wake { sender, event, bye: AtomicBool::new(false), stop: AtomicBool::new(false) };
        let patience = Duration::from_millis(20);
        assert!(wake.neighbours(patience).is_none(), "nobody takes it from the queue");
        assert!(wake.neighbours(patience).is_none(), "which is full now");
        commands.try_iter().for_each(drop);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let Ok(Command::List(list)) = commands.recv() else { panic!() };
                list.send(Known::default().list()).unwrap();
            });
            assert!(wake.neighbours(Duration::from_secs(30)).is_some_and(|all| all.is_empty()));
        });
    }

    #[test]
    fn newcomers_are_greeted_once() {
        let mut node = Node::settled();
        assert_eq!(node.receive(peer(2), &hello_of(2)).len(), 1);
        assert_eq!(node.receive(peer(2), &hello_of(2)), []);
        // A restart shows by its instance.
        assert_eq!(node.receive(peer(2), &hello_of(3)).len(), 1);
        // The original never says hello; its query makes it known, and a hello does it no harm.
        let query = Packet::Query { id: 1, hash_part: absent() };
        let out = node.receive(peer(4), &query);
        assert!(matches!(out[..], [(To::Peer(_), Packet::Hello(_)), (To::Peer(_), Packet::HaveNot { id: 1 })]));
    }

    #[test]
    fn queries_are_answered_from_the_store() {
        let mut node = Node::settled();
        let hash_part = HashPart::parse(HELD.as_bytes()).unwrap();
        let query = Packet::Query { id: 77, hash_part };
        node.receive(peer(2), &hello_of(2));
        let have = Packet::Have { id: 77, port: 12304, url_path: format!("local/{HELD}.narinfo") };
        // Both copies of a query, unicast and broadcast, are answered: one answer may be lost.
        for _ in 0..2 {
            assert_eq!(node.receive(peer(2), &query), [(To::Peer(peer(2)), have.clone())]);
        }
    }

    fn stranger() -> SocketAddr {
        SocketAddr::from(([198, 51, 100, 7], 12304))
    }

    #[test]
    fn a_stranger_is_answered_and_never_known() {
        let mut node = Node::settled();
        let held = Packet::Query { id: 77, hash_part: HashPart::parse(HELD.as_bytes()).unwrap() };
        let have = Packet::Have { id: 77, port: 12304, url_path: format!("local/{HELD}.narinfo") };
        assert_eq!(node.receive(stranger(), &held), [(To::Peer(stranger()), have.clone())]);
        let not_held = Packet::Query { id: 78, hash_part: absent() };
        let have_not = (To::Peer(stranger()), Packet::HaveNot { id: 78 });
        assert_eq!(node.receive(stranger(), &not_held), [have_not]);
        assert_eq!(node.receive(stranger(), &hello_of(7)), []);
        // Nobody asked it, and what it says of a query to others is nothing.
        let (id, to, holders) = node.ask();
        assert_eq!(to, [To::Everyone]);
        assert_eq!(node.receive(stranger(), &Packet::Have { id, port: 1, url_path: "x".into() }), []);
        assert_eq!(node.receive(stranger(), &Packet::HaveNot { id }), []);
        assert_eq!(holders.try_recv(), Err(TryRecvError::Empty));
        assert_eq!(node.discovery.known.len(), 0);
        // Elsewhere, where nobody is answered.
        assert_eq!(node.receive(SocketAddr::from(([192, 0, 2, 1], 12304)), &held), []);
    }

    #[test]
    fn a_stranger_that_was_asked_may_answer() {
        let mut node = Node::settled();
        let (holders, receiver) = bounded(4);
        let asked = [(stranger(), Some(TIMEOUT))].into_iter();
        let query = Query::new(absent(), asked, None, TIMEOUT, holders, Arc::default(), node.now);
        let id = node.discovery.queries.insert(query, node.now).unwrap();
        let have = Packet::Have { id, port: 4, url_path: "x".into() };
        let other = SocketAddr::from(([198, 51, 100, 8], 12304));
        node.receive(other, &have);
        assert_eq!(receiver.try_recv(), Err(TryRecvError::Empty));
        node.receive(stranger(), &have);
        let http = SocketAddr::from(([198, 51, 100, 7], 4));
        assert_eq!(receiver.try_recv(), Ok(Holder { http, url_path: "x".into() }));
        assert_eq!(node.discovery.known.len(), 0);
    }

    #[test]
    fn without_a_lan_nothing_is_said_unasked() {
        let mut node = Node::on(Net { has_lan: false });
        assert_eq!(node.after(HELLO_INTERVAL), []);
        assert_eq!(node.event(Event::NetworkChanged), []);
        assert_eq!(node.event(Event::Named(vec![peer(2)])), []);
        assert_eq!(node.receive(peer(2), &hello_of(2)), []);
        let (holders, receiver) = bounded(1);
        assert_eq!(node.event(Event::Ask(Ask { hash_part: absent(), holders, tally: Arc::default() })), []);
        assert!(is_over(&receiver));
        let mut out = Vec::new();
        node.discovery.bye(&mut out);
        assert_eq!(out, []);
        let query = Packet::Query { id: 1, hash_part: absent() };
        assert_eq!(node.receive(stranger(), &query), [(To::Peer(stranger()), Packet::HaveNot { id: 1 })]);
    }

    #[test]
    fn have_not_is_said_once_for_both_copies_and_again_for_a_repeat() {
        let mut node = Node::settled();
        node.receive(peer(2), &hello_of(2));
        let query = Packet::Query { id: 5, hash_part: absent() };
        assert_eq!(node.receive(peer(2), &query).len(), 1);
        assert_eq!(node.receive(peer(2), &query).len(), 0);
        node.now += 16 * MS;
        assert_eq!(node.receive(peer(2), &query).len(), 1);
    }

    #[test]
    fn a_miss_ends_when_every_live_peer_has_said_have_not() {
        let mut node = Node::settled();
        node.receive(peer(2), &hello_of(2));
        node.receive(peer(3), &hello_of(3));
        let (id, to, holders) = node.ask();
        assert_eq!(to.len(), 3);
        assert!(to.contains(&To::Peer(peer(2))) && to.contains(&To::Peer(peer(3))) && to.contains(&To::Everyone));
        node.now += MS;
        node.receive(peer(2), &Packet::HaveNot { id });
        assert!(!is_over(&holders));
        node.receive(peer(3), &Packet::HaveNot { id });
        assert!(is_over(&holders));
    }

    #[test]
    fn with_nobody_there_one_query_in_half_a_minute_waits() {
        let mut node = Node::settled();
        let (_, to, holders) = node.ask();
        assert_eq!(to, [To::Everyone]);
        node.after(TIMEOUT - MS);
        assert!(!is_over(&holders));
        node.after(MS);
        assert!(is_over(&holders));
        let (_, to, holders) = node.ask();
        assert_eq!(to, [To::Everyone], "it is asked all the same");
        assert!(is_over(&holders));
        node.now += QUIET;
        assert!(!is_over(&node.ask().2));
    }

    #[test]
    fn the_first_query_after_the_start_waits_for_the_first_hello() {
        let mut node = Node::fresh();
        let (_, _, holders) = node.ask();
        node.after(START_GRACE - MS);
        assert!(!is_over(&holders));
        node.after(MS);
        assert!(is_over(&holders));
    }

    #[test]
    fn the_original_gets_the_whole_timeout_because_its_silence_means_no() {
        let mut node = Node::settled();
        node.receive(peer(2), &Packet::Query { id: 1, hash_part: absent() });
        for _ in 0..2 {
            let (_, _, holders) = node.ask();
            node.after(TIMEOUT - MS);
            assert!(!is_over(&holders));
            node.after(MS);
            assert!(is_over(&holders));
        }
        // Late, and to a broadcast: it is a holder all the same while the query is open.
        let (id, _, holders) = node.ask();
        node.after(TIMEOUT / 2);
        node.receive(peer(9), &Packet::Have { id, port: 80, url_path: "local/x.narinfo".into() });
        assert_eq!(holders.try_recv().unwrap().http, SocketAddr::from(([10, 0, 0, 9], 80)));
    }

    #[test]
    fn a_live_peer_is_asked_again_and_a_vanished_one_waited_for_once() {
        let mut node = Node::settled();
        node.receive(peer(2), &hello_of(2));
        let (_, _, holders) = node.ask();
        let mut repeats = 0;
        for _ in 0..1100 {
            repeats += node.after(MS).iter().filter(|(to, _)| *to == To::Peer(peer(2))).count();
        }
        assert_eq!(repeats, 3);
        assert!(is_over(&holders));
        // Now it counts as nobody there.
        assert!(!is_over(&node.ask().2));
        node.after(TIMEOUT);
        let (id, to, holders) = node.ask();
        assert!(to.contains(&To::Peer(peer(2))) && is_over(&holders));
        // Its next sign of life brings it back.
        node.receive(peer(2), &Packet::HaveNot { id });
        assert!(!is_over(&node.ask().2));
    }

    #[test]
    fn packets_of_strangers_and_our_own_are_nothing() {
        let mut node = Node::settled();
        node.receive(peer(2), &hello_of(2));
        let (id, _, holders) = node.ask();
        let have = Packet::Have { id, port: 80, url_path: "local/x.narinfo".into() };
        let stranger = SocketAddr::from(([10, 9, 9, 9], 12304));
        let other_port = SocketAddr::from(([10, 0, 0, 9], 999));
        for from in [stranger, other_port, peer(1)] {
            node.receive(from, &have);
            assert_eq!(holders.try_recv(), Err(TryRecvError::Empty), "{from}");
        }
        let query = Packet::Query { id: 1, hash_part: HashPart::parse(HELD.as_bytes()).unwrap() };
        assert_eq!(node.receive(stranger, &query), []);
        assert_eq!(node.receive(peer(1), &query), []);
        for len in 0..64 {
            assert_eq!(node.event(Event::Datagram { from: peer(2), bytes: &vec![7; len] }), []);
        }
    }

    #[test]
    fn a_crowd_hears_no_have_not_and_gets_a_bounded_number_of_packets() {
        let mut node = Node::settled();
        for last in 2..=CROWD as u8 + 10 {
            node.receive(peer(last), &hello_of(last));
        }
        let (_, to, holders) = node.ask();
        assert_eq!(to.len(), CROWD + 1);
        assert!(!is_over(&holders));
        assert_eq!(node.receive(peer(2), &Packet::Query { id: 1, hash_part: absent() }), []);
        let mut out = Vec::new();
        node.discovery.bye(&mut out);
        assert!(matches!(out[..], [(To::Everyone, Packet::Bye(Hello { crowded: true, .. }))]));
    }

    fn interface(index: u32, address: &str, prefix_len: u8) -> Interface {
        let address: IpAddr = address.parse().unwrap();
        let broadcast = match address {
            IpAddr::V4(v4) => Some((v4.to_bits() | 0xff).into()),
            IpAddr::V6(_) => None,
        };
        Interface { name: format!("eth{index}"), index, address, prefix_len, broadcast, running: true }
    }

    #[test]
    fn which_socket_reaches_whom() {
        let interfaces = vec![
            interface(1, "10.0.0.1", 24),
            interface(2, "10.0.1.1", 24),
            interface(1, "fd00::1", 64),
            interface(2, "fd00:1::1", 64),
        ];
        let networks = LanNetworks::new(NetworkPolicy::default(), interfaces);
        let through = |bound: &[&str], target: &str| {
            let bind = |ip: &&str| Bound { address: SocketAddr::new(ip.parse().unwrap(), 12304), dual: *ip == "::" };
            let bound: Vec<Bound> = bound.iter().map(bind).collect();
            socket_for(target.parse().unwrap(), &bound, &networks).map(|at| bound[at].address.ip().to_string())
        };
        // In the order that `sockets::open` has them, the broadcast addresses last.
        let both = ["127.0.0.1", "10.0.0.1", "10.0.1.1", "10.0.0.255", "10.0.1.255"];
        assert_eq!(through(&both, "10.0.1.7:1").as_deref(), Some("10.0.1.1"));
        assert_eq!(through(&both, "10.0.1.255:1").as_deref(), Some("10.0.1.1"));
        assert_eq!(through(&both, "172.16.0.1:1").as_deref(), Some("10.0.0.1"), "a named peer far away");
        assert_eq!(through(&["10.0.0.255", "10.0.0.1"], "172.16.0.1:1").as_deref(), Some("10.0.0.1"));
        assert_eq!(through(&["10.0.0.1"], "10.0.1.255:1"), None, "no broadcast where it is not bound");
        assert_eq!(through(&["127.0.0.1"], "172.16.0.1:1"), None);
        assert_eq!(through(&["10.0.0.1"], "[fd00:2::1]:1"), None);
        assert_eq!(through(&["::"], "10.0.1.255:1").as_deref(), Some("::"));
        assert_eq!(through(&["0.0.0.0"], "10.0.1.255:1").as_deref(), Some("0.0.0.0"));
        let group = ["ff02::7065:6572", "fd00::1"];
        assert_eq!(through(&group, "[fd00:2::1]:1").as_deref(), Some("fd00::1"));
        assert_eq!(through(&group, "[ff02::7065:6572%1]:1").as_deref(), Some("fd00::1"));
        assert_eq!(through(&group, "[ff02::7065:6572%2]:1"), None);
        for (bound, index, hears) in [
            ("[::]:1", 3, true),
            ("[fd00::1]:1", 1, false),
            ("[ff02::7065:6572%1]:1", 1, true),
            ("[ff02::7065:6572%1]:1", 2, false),
        ] {
            assert_eq!(hears_group(bound.parse().unwrap(), index), hears, "{bound}");
        }
    }

    #[test]
    fn a_socket_for_both_families_speaks_ipv4() {
        let socket = socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::DGRAM, None).unwrap();
        socket.set_only_v6(false).unwrap();
        socket.bind(&SocketAddr::from(([0u16; 8], 0)).into()).unwrap();
        let socket = UdpSocket::from(socket);
        let here = SocketAddr::from(([127, 0, 0, 1], socket.local_addr().unwrap().port()));
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let mut sockets = Sockets::new(vec![socket], here.port(), networks, true).unwrap();
        let other = UdpSocket::bind("127.0.0.1:0").unwrap();
        sockets.send_to(b"to", other.local_addr().unwrap());
        let mut buffer = [0; 8];
        assert_eq!(other.recv_from(&mut buffer).unwrap(), (2, here));
        other.send_to(b"back", here).unwrap();
        // On loopback a datagram is there when it is sent.
        assert_eq!(sockets.receive(0, &mut buffer).unwrap(), (4, other.local_addr().unwrap()));
    }

    #[test]
    fn a_full_queue_does_not_keep_it_from_ending() {
        struct Stuck(Sender<()>, Receiver<()>);
        impl Neighbourhood for Stuck {
            fn is_lan(&self, _: SocketAddr) -> bool {
                self.0.send(()).unwrap();
                let _ = self.1.recv();
                false
            }
            fn has_lan(&self) -> bool {
                true
            }
            fn is_stranger(&self, _: SocketAddr) -> bool {
                false
            }
            fn is_own(&self, _: IpAddr) -> bool {
                false
            }
            fn would_serve(&mut self, _: &HashPart, _: SocketAddr) -> bool {
                false
            }
        }
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let here = socket.local_addr().unwrap();
        let now = Instant::now();
        let (enters, is_stuck) = bounded(1);
        let (go, stuck) = bounded(0);
        let discovery = Discovery::new(Stuck(enters, stuck), here.port(), here.port(), TIMEOUT, [9; 12], now);
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let (ended, end) = bounded(1);
        let handle = Handle::spawn(discovery, vec![socket], networks, move || ended.send(()).unwrap()).unwrap();
        let wake = handle.wake();
        UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", here).unwrap();
        is_stuck.recv().unwrap();
        // The thread is busy with the datagram; the queue fills, and the command to end finds no place in it.
        let waiting: Vec<_> = (0..=MAX_WAITING).map(|_| wake.ask(absent(), Arc::default())).collect();
        let ending = thread::spawn(move || drop(handle));
        while !wake.stop.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        drop(go);
        ending.join().unwrap();
        assert_eq!(end.recv(), Ok(()));
        assert!(waiting.iter().all(is_over));
    }
}
