//! The thread that runs [`Discovery`] on its sockets, and the client through which other threads
//! use it.

use super::discovery::{Discovery, Event};
use super::environment::Environment;
use super::lookups::{LookupId, LookupRequest, LookupUpdate};
use super::peer::Neighbour;
use super::sockets::{DiscoverySockets, MAX_SENDS_PER_TURN};
use crate::network::{Networks, neighbours};
use crate::nix::HashPart;
use crate::suspend::SuspendDetector;
use crate::wire::Packet;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};
use scopeguard::defer;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Maximum number of events that wait for the thread. Each of at most 1,024 connection threads has
/// one lookup, and a few reports on its holders. At the bound a lookup ends at once without an
/// answer, and a report is dropped: the lookup then ends by its time-outs.
const MAX_QUEUED_EVENTS: usize = 4096;

/// Maximum number of datagrams read in one turn. At the bound no answer is judged overdue in this
/// turn, because it may still be in a receive buffer.
const MAX_DATAGRAMS_PER_TURN: usize = 4096;

/// Maximum number of sending rounds in one turn, each of [`MAX_SENDS_PER_TURN`] datagrams: enough
/// for a batch to 256 peers, its repeats, and answers. The rest leaves in the next turn.
const MAX_SEND_ROUNDS: usize = 64;

/// Maximum number of datagrams that wait to be sent. At the bound no datagram is read, so that the
/// kernel's receive buffers limit what a flood takes.
const MAX_QUEUED_DATAGRAMS: usize = 8192;

/// Interval between two readings of the kernel's neighbour tables.
const NEIGHBOURS_INTERVAL: Duration = Duration::from_secs(30);

/// Handle of the running discovery thread. Dropping it makes the thread send *bye* and end, and
/// blocks until it has ended.
pub struct DiscoveryThread {
    client: Arc<DiscoveryClient>,
    thread: Option<JoinHandle<()>>,
}

/// Interface of the discovery thread for other threads.
pub struct DiscoveryClient {
    events: Sender<Event<'static>>,
    wake: OwnedFd,
    /// Set from a write to `wake` until the thread has woken, so that one system call wakes it for
    /// many events.
    is_woken: AtomicBool,
    next_lookup: AtomicU64,
    dropped: AtomicU64,
    /// Number of turns of the thread's loop so far.
    turns: AtomicU64,
    // These are no events, because a full channel must not keep the thread from ending.
    bye_requested: AtomicBool,
    stop_requested: AtomicBool,
}

impl DiscoveryClient {
    /// Starts a lookup of the path on the LAN. Does not block. The channel yields holders as they
    /// answer. It closes at a miss, or 200 ms after a hit. A miss takes
    /// [`LOOKUP_TIMEOUT`](super::LOOKUP_TIMEOUT) at most, not counting pauses of this machine. The
    /// caller must report every holder by [`DiscoveryClient::settle`] or
    /// [`DiscoveryClient::report_failed`]: until then the lookup waits for its narinfo.
    pub fn look_up(&self, hash_part: HashPart) -> (LookupId, Receiver<LookupUpdate>) {
        let id = self.next_lookup.fetch_add(1, Ordering::Relaxed);
        let (updates, receiver) = bounded(LookupRequest::CAPACITY);
        // If the channel of events is full, the lookup's channel closes without
        // `LookupUpdate::Ended`.
        self.send(Event::LookUp(LookupRequest { id, hash_part, updates }));
        (id, receiver)
    }

    /// Reports a good narinfo, which ends the lookup. `found` is the LAN peer from which it came,
    /// if any. Does not block.
    pub fn settle(&self, lookup: LookupId, found: Option<SocketAddr>) {
        self.send(Event::Settled { lookup, found });
    }

    /// Reports that the lookup no longer waits for the narinfo of a peer that said *have*. Does not
    /// block.
    pub fn report_failed(&self, lookup: LookupId, peer: SocketAddr) {
        self.send(Event::Failed { lookup, peer });
    }

    /// Replaces the addresses that `--peer` names. Does not block.
    pub fn set_named(&self, addresses: Vec<SocketAddr>) {
        self.send(Event::SetNamed(addresses));
    }

    /// Returns all peers on the LAN, or `None` if the thread does not answer. Blocks for `timeout`
    /// at most.
    pub fn neighbours(&self, timeout: Duration) -> Option<Vec<Neighbour>> {
        let (list, receiver) = bounded(1);
        let deadline = Instant::now() + timeout;
        // A full channel does not prove that the thread hangs, so this waits for room.
        self.events.send_deadline(Event::ListPeers(list), deadline).ok()?;
        self.wake();
        receiver.recv_deadline(deadline).ok()
    }

    /// Number of datagrams so far that were not sent because a send buffer was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn send(&self, event: Event<'static>) {
        if self.events.try_send(event).is_ok() {
            self.wake();
        }
    }

    fn wake(&self) {
        if self.is_woken.swap(true, Ordering::SeqCst) {
            return;
        }
        // Fails only if the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl DiscoveryThread {
    /// Starts the thread on bound sockets. It calls `on_end` when it ends, even by a panic.
    ///
    /// # Errors
    /// No file descriptor or no thread is available, or a socket option cannot be set.
    pub fn spawn<E: Environment + 'static>(
        discovery: Discovery<E>,
        sockets: Vec<UdpSocket>,
        networks: Arc<Networks>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<DiscoveryThread> {
        let (event_sender, events) = bounded(MAX_QUEUED_EVENTS);
        let client = Arc::new(DiscoveryClient {
            events: event_sender,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_woken: AtomicBool::new(false),
            next_lookup: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            turns: AtomicU64::new(0),
            bye_requested: AtomicBool::new(false),
            stop_requested: AtomicBool::new(false),
        });
        let settings = discovery.settings();
        let sockets = DiscoverySockets::new(sockets, settings.port, networks, settings.has_lan)?;
        let discovery_loop = DiscoveryLoop {
            discovery,
            sockets,
            suspend: SuspendDetector::new(),
            next_neighbours: Instant::now(),
            buffer: [0; Packet::MAX_LEN + 1],
        };
        let own_client = client.clone();
        let thread = thread::Builder::new().name("discovery".into()).spawn(move || {
            defer! {
                // While a sender exists, events left in the channel would keep their senders
                // waiting for updates.
                events.try_iter().for_each(drop);
                on_end();
            }
            discovery_loop.run(&events, &own_client);
        })?;
        Ok(DiscoveryThread { client, thread: Some(thread) })
    }

    /// Makes the thread send *bye* to peers. The thread continues: open lookups still get their
    /// answers. Does not block.
    pub fn say_bye(&self) {
        self.client.bye_requested.store(true, Ordering::SeqCst);
        self.client.wake();
    }

    /// The interface of the thread for other threads.
    pub fn client(&self) -> Arc<DiscoveryClient> {
        self.client.clone()
    }

    /// Returns the number of turns of the thread's loop so far, and wakes the thread for another
    /// one. If the number does not grow, the thread hangs. Does not block.
    pub fn request_turn(&self) -> u64 {
        self.client.wake();
        self.client.turns.load(Ordering::Relaxed)
    }
}

impl Drop for DiscoveryThread {
    fn drop(&mut self) {
        self.client.stop_requested.store(true, Ordering::SeqCst);
        self.client.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct DiscoveryLoop<E> {
    discovery: Discovery<E>,
    sockets: DiscoverySockets,
    suspend: SuspendDetector,
    /// When the kernel's neighbour tables are read next.
    next_neighbours: Instant,
    buffer: [u8; Packet::MAX_LEN + 1],
}

impl<E: Environment> DiscoveryLoop<E> {
    fn run(mut self, events: &Receiver<Event<'static>>, client: &DiscoveryClient) {
        loop {
            let next_turn =
                self.sockets.next_due().into_iter().fold(self.discovery.next_turn(), Instant::min);
            let timeout = next_turn.saturating_duration_since(Instant::now());
            let wakers: Vec<_> =
                [Some(&client.wake), self.suspend.alarm()].into_iter().flatten().collect();
            let is_idle = self.discovery.outgoing().is_empty();
            let ready = self.sockets.wait(&wakers, if is_idle { timeout } else { Duration::ZERO });
            client.turns.fetch_add(1, Ordering::Relaxed);
            // Must precede the reads below: a caller of [`DiscoveryClient::wake`] queues its event
            // first and then tests this flag.
            client.is_woken.store(false, Ordering::SeqCst);
            let stop = client.stop_requested.load(Ordering::SeqCst);
            let is_leaving = client.bye_requested.swap(false, Ordering::SeqCst) || stop;
            let has_slept = self.suspend.detect();
            if self.sockets.update_networks() || has_slept {
                self.handle(Event::NetworkChanged);
            }
            self.read_neighbours();
            while let Ok(event) = events.try_recv() {
                self.handle(event);
            }
            // If no turn was due yet, no answer can be overdue, and sockets without datagrams need
            // not be read.
            let drained = if next_turn <= Instant::now() {
                self.read(0..self.sockets.len(), MAX_DATAGRAMS_PER_TURN)
            } else {
                self.read(ready, MAX_DATAGRAMS_PER_TURN);
                false
            };
            self.handle(Event::Tick { drained });
            if is_leaving {
                // Follows a hello that was due. The thread says *bye* again at the end, because a
                // query sent since the first *bye* makes this node known again.
                self.discovery.bye();
            }
            // Under a flood some datagrams may be left. They leave in the next turn.
            for _ in 0..MAX_SEND_ROUNDS {
                if !self.sockets.send(self.discovery.outgoing()) {
                    break;
                }
                self.read(0..self.sockets.len(), MAX_SENDS_PER_TURN);
            }
            let dropped = std::mem::take(&mut self.sockets.dropped_datagrams);
            client.dropped.fetch_add(dropped, Ordering::Relaxed);
            if stop {
                return;
            }
        }
    }

    /// Reads the kernel's neighbour tables if [`NEIGHBOURS_INTERVAL`] is over. Usually blocks for
    /// 1 ms, at most for 2 s.
    fn read_neighbours(&mut self) {
        let now = Instant::now();
        if now < self.next_neighbours || !self.discovery.settings().has_lan {
            return;
        }
        self.next_neighbours = now + NEIGHBOURS_INTERVAL;
        let port = self.discovery.settings().port;
        match neighbours::read() {
            Ok(entries) => {
                let addresses = entries.iter().map(|entry| entry.socket_addr(port)).collect();
                self.handle(Event::KernelNeighbours(addresses));
            }
            Err(e) => log::debug!("neighbour tables: {e}"),
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        self.discovery.handle(event, Instant::now());
    }

    /// Handles up to `max` datagrams of these sockets. Returns false if more may be left.
    fn read(&mut self, sockets: impl IntoIterator<Item = usize>, max: usize) -> bool {
        let mut left =
            max.min(MAX_QUEUED_DATAGRAMS.saturating_sub(self.discovery.outgoing().len()));
        for at in sockets {
            while left > 0
                && let Ok((len, from)) = self.sockets.receive(at, &mut self.buffer)
            {
                let event = Event::Datagram { from, bytes: &self.buffer[..len] };
                self.discovery.handle(event, Instant::now());
                left -= 1;
            }
        }
        left > 0
    }
}
