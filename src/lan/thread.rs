//! The thread that runs [`Discovery`] on its sockets, and what other threads see of it.

use super::discovery::{Discovery, Event, LookupRequest, OutgoingDatagrams};
use super::environment::Environment;
use super::lookups::{LookupId, LookupUpdate};
use super::peer_table::Neighbour;
use super::sockets::{DiscoverySockets, SENDS_AT_ONCE};
use crate::deferred::Deferred;
use crate::network::{Networks, neighbours};
use crate::nix::HashPart;
use crate::suspend::SuspendDetector;
use crate::wire::Packet;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::event::{EventfdFlags, eventfd};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Events that wait for the thread. Each connection thread, of which there are 1,024, has at most
/// one lookup, and a few reports on its holders. Beyond, a lookup ends at once without an answer,
/// and a report is left to the lookup's end.
const MAX_WAITING: usize = 4096;

/// Datagrams read in one turn. Beyond, no wait is judged in this turn, as answers may still be in
/// the buffer.
const MAX_READ: usize = 4096;

/// Rounds of sending in one turn, each of [`SENDS_AT_ONCE`] datagrams: a batch to 256 peers, its
/// repeats, and answers.
const MAX_ROUNDS: usize = 64;

/// Datagrams that wait to be sent. Beyond, none is read: the kernel's buffer bounds what a flood
/// may take.
const MAX_OUTGOING: usize = 8192;

/// Interval between two readings of the kernel's neighbour tables.
const NEIGHBOURS_INTERVAL: Duration = Duration::from_secs(30);

/// The running thread. Dropping it says *bye* and waits for its end.
pub struct DiscoveryThread {
    client: Arc<DiscoveryClient>,
    turns: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Sends events to the thread, from any thread.
pub struct DiscoveryClient {
    events: Sender<Event<'static>>,
    wake: OwnedFd,
    /// Set from a write to `wake` until the thread has woken: one system call wakes it for many
    /// events.
    is_woken: AtomicBool,
    next_lookup: AtomicU64,
    dropped: AtomicU64,
    // Not events: a full channel must not keep the thread from ending.
    bye: AtomicBool,
    stop: AtomicBool,
}

impl DiscoveryClient {
    /// Asks the LAN who has the path. The channel yields holders as they answer and ends with the
    /// lookup, within 5 s. Every holder is to be reported by [`DiscoveryClient::settled`] or
    /// [`DiscoveryClient::failed`]: until then the lookup waits for its narinfo.
    pub fn look_up(&self, hash_part: HashPart) -> (LookupId, Receiver<LookupUpdate>) {
        let id = self.next_lookup.fetch_add(1, Ordering::Relaxed);
        let (updates, receiver) = bounded(LookupRequest::CAPACITY);
        // If the channel of events is full, the lookup's own channel ends without `Update::Ended`.
        self.send(Event::LookUp(LookupRequest { id, hash_part, updates }));
        (id, receiver)
    }

    /// The lookup has a good narinfo, from `found` if that is a peer of the LAN, and waits no more.
    pub fn settled(&self, lookup: LookupId, found: Option<SocketAddr>) {
        self.send(Event::Settled { lookup, found });
    }

    /// The peer that said *have* is not waited for in this lookup.
    pub fn failed(&self, lookup: LookupId, peer: SocketAddr) {
        self.send(Event::Failed { lookup, peer });
    }

    /// Tells the thread the addresses that `--peer` names.
    pub fn set_named(&self, addresses: Vec<SocketAddr>) {
        self.send(Event::SetNamed(addresses));
    }

    /// All peers on the LAN; `None` if the thread does not say so within `timeout`.
    pub fn neighbours(&self, timeout: Duration) -> Option<Vec<Neighbour>> {
        let (list, receiver) = bounded(1);
        let until = Instant::now() + timeout;
        // A channel that is full for a moment is no sign that the thread hangs.
        self.events.send_deadline(Event::ListPeers(list), until).ok()?;
        self.ring();
        receiver.recv_deadline(until).ok()
    }

    /// Datagrams so far that were not sent because a send buffer was full.
    pub fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn send(&self, event: Event<'static>) {
        if self.events.try_send(event).is_ok() {
            self.ring();
        }
    }

    fn ring(&self) {
        if self.is_woken.swap(true, Ordering::SeqCst) {
            return;
        }
        // Can only fail when the counter is full, and then the thread is awake anyway.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }
}

impl DiscoveryThread {
    /// Starts the thread on bound sockets. `on_end` runs when it ends, for whatever reason.
    ///
    /// # Errors
    /// No descriptor or no thread is available.
    pub fn spawn<E: Environment + 'static>(
        discovery: Discovery<E>,
        sockets: Vec<UdpSocket>,
        networks: Arc<Networks>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<DiscoveryThread> {
        let (sender, events) = bounded(MAX_WAITING);
        let client = Arc::new(DiscoveryClient {
            events: sender,
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            is_woken: AtomicBool::new(false),
            next_lookup: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            bye: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let turns = Arc::new(AtomicU64::new(0));
        let sockets =
            DiscoverySockets::new(sockets, discovery.udp_port(), networks, discovery.has_lan())?;
        let runner = DiscoveryLoop {
            discovery,
            sockets,
            suspend: SuspendDetector::new(),
            next_neighbours: Instant::now(),
            out: Vec::new(),
            buffer: [0; Packet::MAX_LEN + 1],
        };
        let (own_client, own_turns) = (client.clone(), turns.clone());
        let thread = thread::Builder::new().name("discovery".into()).spawn(move || {
            let _end = Deferred::new(|| {
                // What is left in the channel would keep its askers waiting while a sender exists.
                events.try_iter().for_each(drop);
                on_end();
            });
            runner.run(&events, &own_client, &own_turns);
        })?;
        Ok(DiscoveryThread { client, turns, thread: Some(thread) })
    }

    /// Tells the peers that this node leaves. The thread goes on: lookups under way still get their
    /// answers.
    pub fn say_bye(&self) {
        self.client.bye.store(true, Ordering::SeqCst);
        self.client.ring();
    }

    /// What other threads use.
    pub fn client(&self) -> Arc<DiscoveryClient> {
        self.client.clone()
    }

    /// Turns of the thread's loop so far, and begins another one: if the number does not grow, the
    /// thread hangs.
    pub fn count_turns(&self) -> u64 {
        self.client.ring();
        self.turns.load(Ordering::Relaxed)
    }
}

impl Drop for DiscoveryThread {
    fn drop(&mut self) {
        self.client.stop.store(true, Ordering::SeqCst);
        self.client.ring();
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
    out: OutgoingDatagrams,
    buffer: [u8; Packet::MAX_LEN + 1],
}

impl<E: Environment> DiscoveryLoop<E> {
    fn run(
        mut self,
        events: &Receiver<Event<'static>>,
        client: &DiscoveryClient,
        turns: &AtomicU64,
    ) {
        loop {
            let next =
                self.sockets.next_due().into_iter().fold(self.discovery.next_turn(), Instant::min);
            let wait = next.saturating_duration_since(Instant::now());
            let wakers: Vec<_> =
                [Some(&client.wake), self.suspend.alarm()].into_iter().flatten().collect();
            self.sockets.wait(&wakers, if self.out.is_empty() { wait } else { Duration::ZERO });
            turns.fetch_add(1, Ordering::Relaxed);
            // Before anything is read that a caller of `ring` has written.
            client.is_woken.store(false, Ordering::SeqCst);
            let stop = client.stop.load(Ordering::SeqCst);
            let leaves = client.bye.swap(false, Ordering::SeqCst) || stop;
            let has_slept = self.suspend.detect();
            if self.sockets.network_changed() || has_slept {
                self.handle(Event::NetworkChanged);
            }
            self.read_neighbours();
            while let Ok(event) = events.try_recv() {
                self.handle(event);
            }
            // When nothing was due before these datagrams, no wait is judged, and the other sockets
            // need not be read.
            let drained = if next <= Instant::now() {
                self.read(0..self.sockets.len(), MAX_READ)
            } else {
                self.read(self.sockets.ready().to_vec(), MAX_READ);
                false
            };
            self.handle(Event::Tick { drained });
            if leaves {
                // After a hello that was due. Said again at the end: a query that was sent since
                // made this node known again.
                self.discovery.bye(&mut self.out);
            }
            // What is left after some rounds, as under a flood, leaves in the next turn.
            for _ in 0..MAX_ROUNDS {
                if !self.sockets.send(&mut self.out) {
                    break;
                }
                self.read(0..self.sockets.len(), SENDS_AT_ONCE);
            }
            client.dropped.fetch_add(self.sockets.take_dropped(), Ordering::Relaxed);
            if stop {
                return;
            }
        }
    }

    /// Reads the kernel's neighbour tables from time to time. Blocks for 1 ms as a rule, 1 s at
    /// most.
    fn read_neighbours(&mut self) {
        let now = Instant::now();
        if now < self.next_neighbours || !self.discovery.has_lan() {
            return;
        }
        self.next_neighbours = now + NEIGHBOURS_INTERVAL;
        let port = self.discovery.udp_port();
        match neighbours::read() {
            Ok(entries) => {
                let addresses = entries.iter().map(|entry| entry.socket_addr(port)).collect();
                self.handle(Event::KernelNeighbours(addresses));
            }
            Err(e) => log::debug!("neighbour tables: {e}"),
        }
    }

    fn handle(&mut self, event: Event<'_>) {
        self.discovery.handle(event, Instant::now(), &mut self.out);
    }

    /// Handles up to `most` datagrams of these sockets. Returns whether there are no more.
    fn read(&mut self, sockets: impl IntoIterator<Item = usize>, most: usize) -> bool {
        let mut left = most.min(MAX_OUTGOING.saturating_sub(self.out.len()));
        if left == 0 {
            return false;
        }
        for at in sockets {
            while let Ok((len, from)) = self.sockets.receive(at, &mut self.buffer) {
                let event = Event::Datagram { from, bytes: &self.buffer[..len] };
                self.discovery.handle(event, Instant::now(), &mut self.out);
                left = left.saturating_sub(1);
                if left == 0 {
                    return false;
                }
            }
        }
        true
    }
}
