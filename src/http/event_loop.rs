//! The event loop, a single thread that accepts connections and waits for requests on all idle ones
//! with epoll. It answers requests that need only memory, and hands the connection to a thread of
//! the pool for all others.
//!
//! An idle connection thus costs no thread. Most requests are for narinfos, which take 2 µs to
//! answer, where waking a thread takes 5 µs.

use super::connections::{Connection, ConnectionProgress, is_own};
use super::head::{self, ReceiveBuffer};
use super::server::{PollGeneration, ServerState, hand_over};
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

/// Pause after a failure to accept, for example when no file descriptor is left, if no idle
/// connection can be closed. Other threads need time to close theirs.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Time that a new connection of this machine waits for room when the server is full. All other
/// connections wait meanwhile. If there is still no room, the new connection is closed.
const ROOM_TIMEOUT: Duration = Duration::from_millis(100);

/// Interval between searches for overdue connections while any connection is open.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Longest wait for events while no connection is open.
const IDLE_POLL_TIMEOUT: Duration = Duration::from_secs(60);

/// Events taken from epoll at once.
const MAX_EVENTS: usize = 64;

/// epoll ID of the wake-up event. Listeners have smaller IDs, their index; connections have greater
/// ones.
const WAKE_EVENT_ID: u64 = 1 << 16;

/// Runs the event loop until the server stops. The listeners from index `inside` on accept
/// connections from outside, which a router forwards.
pub(super) fn run(
    state: &Arc<ServerState>,
    listeners: &[TcpListener],
    inside: usize,
    stop: &OwnedFd,
) -> io::Result<()> {
    for (index, listener) in listeners.iter().enumerate() {
        epoll::add(&state.epoll, listener, EventData::new_u64(index as u64), EventFlags::IN)?;
    }
    epoll::add(&state.epoll, stop, EventData::new_u64(WAKE_EVENT_ID), EventFlags::IN)?;
    let mut event_loop = EventLoop {
        state,
        next_id: WAKE_EVENT_ID + 1,
        spare_buffer: ReceiveBuffer::default(),
        response: Vec::new(),
    };
    let mut events: Vec<Event> = Vec::with_capacity(MAX_EVENTS);
    let mut swept = Instant::now();
    loop {
        let timeout = if state.connections.is_empty() { IDLE_POLL_TIMEOUT } else { SWEEP_INTERVAL };
        let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: 0 };
        events.clear();
        match epoll::wait(&state.epoll, rustix::buffer::spare_capacity(&mut events), Some(&timeout))
        {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if state.is_stopping() {
            return Ok(());
        }
        // All these events are older, so one database generation serves them all.
        let mut now = None;
        for event in &events {
            match event.data.u64() {
                WAKE_EVENT_ID => {}
                id if id > WAKE_EVENT_ID => event_loop.handle_event(id, &mut now),
                index => event_loop.accept(&listeners[index as usize], index as usize >= inside),
            }
        }
        let now = Instant::now();
        if now.duration_since(swept) >= SWEEP_INTERVAL {
            swept = now;
            state.connections.end_overdue(now);
            if events.is_empty() && state.connections.is_empty() {
                state.handler.on_idle();
            }
        }
    }
}

struct EventLoop<'a> {
    state: &'a Arc<ServerState>,
    next_id: u64,
    /// Receive buffer lent to connections that have none. It comes back empty after a complete
    /// request.
    spare_buffer: ReceiveBuffer,
    /// The response being built.
    response: Vec<u8>,
}

/// What happens to a connection after an event.
enum ConnectionFate {
    /// The event loop keeps watching it.
    Watch,
    /// A thread of the pool takes it over.
    HandOver,
    /// It is closed.
    End,
}

impl EventLoop<'_> {
    fn accept(&mut self, listener: &TcpListener, is_outside: bool) {
        match listener.accept() {
            Ok((stream, peer)) => self.admit(stream, peer, is_outside),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            // The client gave up before its connection was accepted.
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) => {}
            Err(e) => {
                self.state.record_fault("accepting connections", &e);
                // All other connections wait during the pause.
                if !self.state.connections.close_idlest() {
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }

    fn admit(&mut self, stream: TcpStream, peer: SocketAddr, is_outside: bool) {
        let Ok(local) = stream.local_addr() else { return };
        let is_own = is_own(peer, local, is_outside);
        let is_prepared = stream.set_nonblocking(false).and_then(|()| stream.set_nodelay(true));
        if is_prepared.is_err() || !self.make_room(peer, is_own) {
            return;
        }
        self.next_id += 1;
        let connections = &self.state.connections;
        let connection = connections.insert(self.next_id, stream, peer, is_outside, is_own);
        self.state.watch(&connection);
    }

    /// Makes room for a connection from `peer`. For this machine it waits up to [`ROOM_TIMEOUT`].
    fn make_room(&self, peer: SocketAddr, is_own: bool) -> bool {
        let deadline = Instant::now() + ROOM_TIMEOUT;
        while !self.state.connections.make_room(peer, is_own) {
            if !is_own || Instant::now() >= deadline || self.state.is_stopping() {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
        true
    }

    /// Handles an event on a connection: bytes arrived, or it ended.
    fn handle_event(&mut self, id: u64, generation: &mut PollGeneration) {
        // The connection may have been closed since, to make room.
        let Some(connection) = self.state.connections.get(id) else { return };
        let next = catch_unwind(AssertUnwindSafe(|| self.receive(&connection, generation)));
        // After a panic, a thread of the pool answers the request.
        match next.unwrap_or(ConnectionFate::HandOver) {
            ConnectionFate::Watch => {}
            ConnectionFate::End => self.state.connections.end(&connection),
            ConnectionFate::HandOver => {
                connection.set_busy();
                match epoll::delete(&self.state.epoll, connection.stream.socket()) {
                    Ok(()) => hand_over(self.state, connection),
                    Err(_) => self.state.connections.end(&connection),
                }
            }
        }
    }

    fn receive(
        &mut self,
        connection: &Connection,
        generation: &mut PollGeneration,
    ) -> ConnectionFate {
        // Decrypting takes time, and may have to wait for the rest of a record.
        if connection.stream.key().is_some() {
            return ConnectionFate::HandOver;
        }
        let mut bytes = connection.bytes();
        let uses_spare = bytes.received.is_empty();
        if uses_spare {
            std::mem::swap(&mut bytes.received, &mut self.spare_buffer);
        }
        let next = match bytes.received.fill(&connection.stream, false) {
            Ok(0) => ConnectionFate::End,
            Ok(_) => self.answer(connection, &mut bytes, generation),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => ConnectionFate::Watch,
            Err(_) => ConnectionFate::End,
        };
        match uses_spare && bytes.received.is_empty() {
            true => std::mem::swap(&mut bytes.received, &mut self.spare_buffer),
            false => bytes.received.shrink(),
        }
        next
    }

    /// Answers the received request if the handler can do so at once. A thread of the pool sends
    /// what the socket's buffer does not take, and answers pipelined requests.
    fn answer(
        &mut self,
        connection: &Connection,
        bytes: &mut ConnectionProgress,
        generation: &mut PollGeneration,
    ) -> ConnectionFate {
        let received = &mut bytes.received;
        if self.state.begins_tls(received) {
            return ConnectionFate::HandOver;
        }
        if connection.is_outside && !self.state.handler.answers_outside() {
            return ConnectionFate::End;
        }
        let len = match received.head_len() {
            Some(len) => len,
            None if received.is_full() => return ConnectionFate::HandOver,
            None => return ConnectionFate::Watch,
        };
        connection.set_busy();
        let (state, response) = (self.state, &mut self.response);
        response.clear();
        let answered = head::parse(received.split(len).0, connection.peer, None, |request| {
            let client = (connection.is_outside, connection.is_own);
            let request = request.map(|request| request.with_client(client.0, client.1));
            let request =
                request.ok().filter(|request| request.keep_alive && request.body_len == 0)?;
            let answer = state.handler.try_cached(&request, generation)?;
            answer.print(response, request.method == "HEAD").ok()
        });
        if answered.is_none() {
            return ConnectionFate::HandOver;
        }
        received.consume(len);
        let sent = match send(
            connection.stream.socket(),
            response,
            SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
        ) {
            Ok(sent) => sent,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(_) => return ConnectionFate::End,
        };
        if sent < response.len() || received.head_len().is_some() {
            bytes.unsent.extend_from_slice(&response[sent..]);
            return ConnectionFate::HandOver;
        }
        state.connections.set_idle(connection, Instant::now());
        ConnectionFate::Watch
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::{Handler, Server};
    use super::super::stream::ConnectionStream;
    use super::super::{Exchange, Request, ShortResponse};
    use super::*;
    use crossbeam_channel::{Receiver, Sender, unbounded};
    use std::io::{Read, Write};

    /// More bytes than the socket buffers of both ends hold.
    const LARGE: usize = 32 << 20;

    /// Responds with the request target and reports the name of the answering thread.
    struct Echo(Sender<(String, String)>);

    impl Echo {
        fn tell(&self, request: &Request<'_>) {
            let thread = thread::current().name().unwrap_or_default().to_owned();
            self.0.send((request.target.to_owned(), thread)).unwrap();
        }
    }

    impl Handler for Echo {
        fn try_cached(
            &self,
            request: &Request<'_>,
            _: &mut PollGeneration,
        ) -> Option<ShortResponse> {
            assert_ne!(request.target, "/panic", "on purpose");
            let body = match request.target.strip_prefix("/at-once") {
                Some("/large") => vec![b'#'; LARGE],
                Some(_) => request.target.into(),
                None => return None,
            };
            self.tell(request);
            Some(ShortResponse::new(200, "text/plain", body))
        }

        fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
            assert_ne!(request.target, "/panic", "on purpose, again");
            self.tell(request);
            exchange.send(200, &[("Content-Type", "text/plain")], request.target.as_bytes())
        }

        fn after_panic(&self, _: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
            exchange.say(500, "panic")
        }
    }

    fn start() -> (Server, SocketAddr, Receiver<(String, String)>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (tell, told) = unbounded();
        (Server::start(vec![listener], Arc::new(Echo(tell)), || ()).unwrap(), address, told)
    }

    fn connect(address: SocketAddr) -> TcpStream {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        stream
    }

    fn get(target: &str) -> String {
        format!("GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    }

    /// Reads `count` responses and returns their bodies.
    fn bodies(mut stream: &TcpStream, count: usize) -> Vec<String> {
        let (mut bytes, mut bodies) = (Vec::new(), Vec::new());
        while bodies.len() < count {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            if let Some((head, rest)) = text.split_once("\r\n\r\n") {
                let len: usize =
                    head.rsplit_once("Content-Length: ").unwrap().1.trim().parse().unwrap();
                if rest.len() >= len {
                    bodies.push(rest[..len].to_owned());
                    bytes.drain(..head.len() + 4 + len);
                    continue;
                }
            }
            let mut chunk = vec![0; 1 << 20];
            let came = stream.read(&mut chunk).unwrap();
            assert!(came > 0, "cut after {bodies:?}");
            bytes.extend_from_slice(&chunk[..came]);
        }
        bodies
    }

    #[test]
    fn request_is_answered_by_event_loop_or_pool() {
        let (_server, address, told) = start();
        let mut stream = connect(address);
        let mut ask = |target: &str| {
            stream.write_all(get(target).as_bytes()).unwrap();
            assert_eq!(bodies(&stream, 1), [target]);
            let (asked, thread) = told.recv().unwrap();
            assert_eq!(asked, target);
            thread
        };
        assert_eq!(ask("/at-once/1"), "http-watch");
        assert_eq!(ask("/2"), "http-0");
        // The thread may still own the connection. After it answers a request that the event loop
        // could answer, it hands the connection back.
        ask("/at-once/3");
        assert_eq!(ask("/at-once/4"), "http-watch");
        // The pool's first thread may not be idle yet, so a second one may answer.
        assert_ne!(ask("/5"), "http-watch");
    }

    #[test]
    fn pipelined_requests_are_answered_in_order() {
        let (_server, address, _told) = start();
        let mut stream = connect(address);
        let targets: Vec<String> = (0..100)
            .map(|n| if n % 3 == 0 { format!("/{n}") } else { format!("/at-once/{n}") })
            .collect();
        let all: String = targets.iter().map(|target| get(target)).collect();
        // Cut within a head.
        let (first, rest) = all.split_at(get("/0").len() + 10);
        stream.write_all(first.as_bytes()).unwrap();
        assert_eq!(bodies(&stream, 1), targets[..1]);
        stream.write_all(rest.as_bytes()).unwrap();
        assert_eq!(bodies(&stream, 99), targets[1..]);
    }

    #[test]
    fn slow_reader_delays_no_other_and_gets_whole_response() {
        let (_server, address, _told) = start();
        let (mut slow, mut other) = (connect(address), connect(address));
        slow.write_all((get("/at-once/large") + &get("/at-once/next")).as_bytes()).unwrap();
        for _ in 0..10 {
            other.write_all(get("/at-once/1").as_bytes()).unwrap();
            assert_eq!(bodies(&other, 1), ["/at-once/1"]);
        }
        let mut head = [0; 15];
        slow.read_exact(&mut head).unwrap();
        let mut left = LARGE;
        let mut chunk = vec![0; 1 << 20];
        let mut text = Vec::new();
        while left > 0 || !text.ends_with(b"/at-once/next") {
            let came = slow.read(&mut chunk).unwrap();
            assert!(came > 0, "cut with {left} bytes to come");
            left -= chunk[..came].iter().filter(|b| **b == b'#').count();
            text.extend(chunk[..came].iter().filter(|b| **b != b'#'));
            text.drain(..text.len().saturating_sub(100));
        }
    }

    #[test]
    fn panic_in_event_loop_is_answered_by_pool() {
        let (_server, address, _told) = start();
        let (mut bad, mut other) = (connect(address), connect(address));
        bad.write_all(get("/panic").as_bytes()).unwrap();
        assert_eq!(bodies(&bad, 1), ["panic\n"]);
        other.write_all(get("/at-once/1").as_bytes()).unwrap();
        assert_eq!(bodies(&other, 1), ["/at-once/1"]);
    }

    /// Regression test: a head was taken to have begun when an earlier connection ended, and the
    /// sweep closed the connection.
    #[test]
    fn head_starts_with_its_first_byte() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let pair = || {
            (
                connect(listener.local_addr().unwrap()),
                ConnectionStream::new(listener.accept().unwrap().0, false),
            )
        };
        let mut buffer = ReceiveBuffer::default();
        let (client, stream) = pair();
        drop(client);
        assert_eq!(buffer.fill(&stream, true).unwrap(), 0);
        let (mut client, stream) = pair();
        let before = Instant::now();
        client.write_all(b"GET").unwrap();
        assert_eq!(buffer.fill(&stream, true).unwrap(), 3);
        assert!(buffer.first_byte_at().unwrap() >= before);
    }
}
