//! The thread that all waiting connections have in common. It accepts them, and watches for the next request on each; what
//! can be answered from memory, it answers itself, and for all else it has a thread of the pool take the connection over.
//!
//! Most connections wait most of the time: so they cost no thread. And most requests are for narinfos, which take 2 µs
//! to answer, where to wake a thread takes 5.

use super::connections::{Bytes, Connection};
use super::head::{self, Buffer};
use super::response;
use super::server::{Moment, Shared, hand_over};
use rustix::event::Timespec;
use rustix::event::epoll::{self, Event, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{SendFlags, send};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// When no descriptor is left, accepting pauses for this long: others need time to close theirs.
pub(super) const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// When all connections are this machine's and at work, its next one waits so long for one to end. It delays others
/// that come; they would find no room either.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// How often overdue connections are looked for while there is any connection.
const SWEEP: Duration = Duration::from_secs(1);

/// While there is none, this thread wakes up so often.
const REST: Duration = Duration::from_secs(60);

/// Events taken at once.
const EVENTS: usize = 64;

/// IDs of what is watched beside connections, whose IDs begin above: the listeners, by their place, and the wake-up.
const STOP: u64 = 1 << 16;

/// Accepts and watches until the server stops.
pub(super) fn watch(shared: &Arc<Shared>, listeners: &[TcpListener], stop: &OwnedFd) -> io::Result<()> {
    for (place, listener) in listeners.iter().enumerate() {
        epoll::add(&shared.epoll, listener, EventData::new_u64(place as u64), EventFlags::IN)?;
    }
    epoll::add(&shared.epoll, stop, EventData::new_u64(STOP), EventFlags::IN)?;
    let mut watcher = Watcher { shared, next_id: STOP + 1, spare: Buffer::default(), out: Vec::new() };
    let mut events: Vec<Event> = Vec::with_capacity(EVENTS);
    let mut swept = Instant::now();
    loop {
        let patience = if shared.connections.is_empty() { REST } else { SWEEP };
        let patience = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: 0 };
        events.clear();
        match epoll::wait(&shared.epoll, rustix::buffer::spare_capacity(&mut events), Some(&patience)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if shared.is_stopping() {
            return Ok(());
        }
        // All that these events tell of was there before.
        let mut now = None;
        for event in &events {
            match event.data.u64() {
                STOP => {}
                id if id > STOP => watcher.look_at(id, &mut now),
                place => watcher.accept(&listeners[place as usize]),
            }
        }
        let now = Instant::now();
        if now.duration_since(swept) >= SWEEP {
            swept = now;
            shared.connections.end_overdue(now);
            if events.is_empty() && shared.connections.is_empty() {
                shared.handler.rest();
            }
        }
    }
}

struct Watcher<'a> {
    shared: &'a Arc<Shared>,
    next_id: u64,
    /// For what connections send that have none of their own, as nothing is left of it in the end.
    spare: Buffer,
    /// The answer under way.
    out: Vec<u8>,
}

/// What becomes of a connection.
enum Next {
    /// It is watched on.
    Watch,
    /// A thread of the pool has to take it over.
    HandOver,
    /// It has ended.
    End,
}

impl Watcher<'_> {
    fn accept(&mut self, listener: &TcpListener) {
        match listener.accept() {
            Ok((stream, peer)) => self.admit(stream, peer),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // The client gave up before it was accepted.
            Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(e) => {
                log::error!("accepting connections: {e}");
                self.shared.connections.close_idlest();
                thread::sleep(ACCEPT_PAUSE);
            }
        }
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr) {
        if !self.make_room(peer) {
            return log::debug!("connection from {peer}: refused, too many at work");
        }
        let prepared = stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_nodelay(true))
            .and_then(|()| stream.set_write_timeout(Some(response::WRITE_TIMEOUT)));
        if let Err(e) = prepared {
            return log::debug!("connection from {peer}: {e}");
        }
        self.next_id += 1;
        let connection = self.shared.connections.insert(self.next_id, stream, peer);
        self.shared.watch(&connection);
    }

    /// Makes room for a connection from `peer`. This machine's own waits for it a little.
    fn make_room(&self, peer: SocketAddr) -> bool {
        let until = Instant::now() + FULL_PAUSE;
        while !self.shared.connections.make_room(peer) {
            let own = peer.ip().to_canonical().is_loopback();
            if !own || Instant::now() >= until || self.shared.is_stopping() {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Something came on a connection, or it ended.
    fn look_at(&mut self, id: u64, now: &mut Moment) {
        // It may have been closed to make room, a moment ago.
        let Some(connection) = self.shared.connections.get(id) else { return };
        let next = catch_unwind(AssertUnwindSafe(|| self.receive(&connection, now)));
        match next.unwrap_or(Next::End) {
            Next::Watch => {}
            Next::End => self.shared.connections.end(&connection),
            Next::HandOver => {
                connection.is_at_work();
                match epoll::delete(&self.shared.epoll, &connection.stream) {
                    Ok(()) => hand_over(self.shared, connection),
                    Err(_) => self.shared.connections.end(&connection),
                }
            }
        }
    }

    fn receive(&mut self, connection: &Connection, now: &mut Moment) -> Next {
        let mut bytes = connection.bytes();
        let own = bytes.received.is_empty();
        if own {
            std::mem::swap(&mut bytes.received, &mut self.spare);
        }
        let next = match bytes.received.fill(&connection.stream, false) {
            Ok(0) => Next::End,
            Ok(_) => self.answer(connection, &mut bytes, now),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Next::Watch,
            Err(e) => {
                log::debug!("connection from {}: {e}", connection.peer);
                Next::End
            }
        };
        if own && bytes.received.is_empty() {
            std::mem::swap(&mut bytes.received, &mut self.spare);
        }
        next
    }

    /// Answers the request that was received, if there is no more to it than that.
    fn answer(&mut self, connection: &Connection, bytes: &mut Bytes, now: &mut Moment) -> Next {
        let received = &mut bytes.received;
        let len = match received.head_len() {
            Some(len) => len,
            None if received.is_full() => return Next::HandOver,
            None => return Next::Watch,
        };
        connection.is_at_work();
        let (shared, out) = (self.shared, &mut self.out);
        out.clear();
        let answered = head::parse(received.split(len).0, connection.peer, |request| {
            let request = request.ok().filter(|request| request.keep_alive && request.body_len == 0)?;
            let answer = shared.handler.at_once(&request, now)?;
            answer.print(out, request.method == "HEAD").ok()
        });
        if answered.is_none() {
            return Next::HandOver;
        }
        received.consume(len);
        let sent = match send(&connection.stream, out, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => return Next::End,
        };
        if sent < out.len() || received.head_len().is_some() {
            bytes.unsent.extend_from_slice(&out[sent..]);
            return Next::HandOver;
        }
        shared.connections.is_idle_at(connection, Instant::now());
        Next::Watch
    }
}
