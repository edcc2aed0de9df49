//! Serving connections: reading requests, having them answered, and closing in a way the client can
//! tell from success.
//!
//! One thread accepts, and watches the connections that wait for a request (`watch.rs`); a
//! connection at work has a thread of the pool. Knows nothing of what is served: that is a
//! [`Handler`]'s.

use super::body::RequestBody;
use super::connections::{Connection, ConnectionProgress, Connections, HEAD_TIMEOUT};
use super::event_loop::watch;
use super::handshakes::{HANDSHAKE_TIMEOUT, Handshakes};
use super::head::{self, HeadError, ReceiveBuffer, Request};
use super::response::{Exchange, ShortResponse, send_all};
use super::stream::{AuthenticatedKey, ConnectionStream};
use crate::deferred::Deferred;
use crate::upload_limit::UploadLimit;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustls::ServerConfig;
use std::cell::Cell;
use std::io::{self, Read};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most of it is never touched; what is, is under 64 KiB.
const STACK: usize = 512 * 1024;

/// A thread without a connection ends after this.
const THREAD_IDLE: Duration = Duration::from_secs(10);

/// After an answer, a thread waits so long for the next request before the connection goes back to
/// the watcher: who asks for one NAR mostly asks for another at once, and changing threads would
/// delay it.
const STAY: Duration = Duration::from_millis(100);

/// At the end, running answers have so long to end by themselves.
const STOP_GRACE: Duration = Duration::from_millis(1200);

/// After an answer to a request whose body nobody reads, so many bytes of it are taken, so long:
/// closing at once would reset the connection, and the client might never see the answer.
const LINGER_BYTES: u64 = 1 << 20;
/// See [`LINGER_BYTES`].
const LINGER: Duration = Duration::from_secs(1);

/// What a handler knows about one moment, in a number of its own.
pub type PollGeneration = Option<u64>;

/// What is served. A body that the handler does not read ends the connection.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request without a body if that takes next to no time: from memory, without waiting
    /// for the disk, the network or another thread. All connections wait meanwhile.
    ///
    /// `now` is the same for requests that were there at the same time: what the handler finds out
    /// about that moment for the first of them is true for the others.
    fn at_once(&self, _request: &Request<'_>, _now: &mut PollGeneration) -> Option<ShortResponse> {
        None
    }

    /// Answers one request.
    ///
    /// # Errors
    /// The connection's, or a body that cannot be completed: the connection is then cut.
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()>;

    /// Answers a request whose handler panicked before it said anything.
    ///
    /// # Errors
    /// The connection's.
    fn after_panic(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()>;

    /// How connections in TLS are accepted; `None`: not at all.
    fn tls(&self) -> Option<Arc<ServerConfig>> {
        None
    }

    /// Whether requests with that key, which was a friend's when its connection was accepted, are
    /// still answered.
    fn is_friend(&self, _key: &AuthenticatedKey) -> bool {
        false
    }

    /// Whether connections from outside are answered that are not in TLS.
    fn answers_outside(&self) -> bool {
        false
    }

    /// How much may be sent to other machines.
    fn upload_limit(&self) -> Option<&UploadLimit> {
        None
    }

    /// Nobody has been connected for a minute: memory may be given back.
    fn rest(&self) {}
}

/// The running server. Dropping it ends it, in `STOP_GRACE` or a little more.
pub struct Server {
    shared: Arc<ServerState>,
    wake: OwnedFd,
    watcher: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `handler` on the listeners. `on_end` runs when the watching thread ends, for whatever
    /// reason.
    ///
    /// # Errors
    /// No descriptor or no thread to be had.
    pub fn start(
        listeners: Vec<TcpListener>,
        handler: Arc<dyn Handler>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        Server::start_with_outside(listeners, None, handler, on_end)
    }

    /// Serves also a listener to which a router passes connections on from outside, whatever
    /// address they seem to come from: see [`Request::is_outside`].
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_with_outside(
        mut listeners: Vec<TcpListener>,
        outside: Option<TcpListener>,
        handler: Arc<dyn Handler>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        let inside = listeners.len();
        listeners.extend(outside);
        for listener in &listeners {
            listener.set_nonblocking(true)?;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = wake.try_clone()?;
        let shared = Arc::new(ServerState::new(handler)?);
        let watching = shared.clone();
        let watcher = thread::Builder::new().name("http-watch".into()).spawn(move || {
            let _end = Deferred::new(on_end);
            if let Err(e) = watch(&watching, &listeners, inside, &stop) {
                log::error!("watching connections: {e}");
            }
        })?;
        Ok(Server { shared, wake, watcher: Some(watcher) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        let until = Instant::now() + STOP_GRACE;
        self.shared.connections.end_idle();
        while !self.shared.connections.is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
            self.shared.connections.end_idle();
        }
        self.shared.connections.close_all();
    }
}

/// What the watcher and the threads of the pool have in common.
pub(super) struct ServerState {
    pub(super) handler: Arc<dyn Handler>,
    pub(super) connections: Connections,
    handshakes: Handshakes,
    /// Tells of what comes on the connections that are watched.
    pub(super) epoll: OwnedFd,
    threads: AtomicUsize,
    stopping: AtomicBool,
    /// To threads that are free: nothing is ever queued here.
    hand_over: Sender<Arc<Connection>>,
    free: Receiver<Arc<Connection>>,
}

impl ServerState {
    fn new(handler: Arc<dyn Handler>) -> io::Result<Self> {
        let (hand_over, free) = bounded(0);
        Ok(ServerState {
            handler,
            connections: Connections::new(),
            handshakes: Handshakes::default(),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            threads: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            hand_over,
            free,
        })
    }

    /// Whether what was received is the beginning of a connection in TLS, and there is TLS.
    pub(super) fn begins_tls(&self, received: &ReceiveBuffer) -> bool {
        ConnectionStream::begins_tls(received.split(received.len()).0)
            && self.handler.tls().is_some()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Gives a connection to the watcher, or ends it if that cannot be.
    ///
    /// One that a thread of the pool hands back has been idle since its last answer: the thread
    /// waited up to [`STAY`] for another request before.
    pub(super) fn watch(&self, connection: &Connection) {
        if !connection.is_idle() {
            self.connections.set_idle(connection, Instant::now());
        }
        let added = epoll::add(
            &self.epoll,
            connection.stream.socket(),
            EventData::new_u64(connection.id),
            EventFlags::IN,
        );
        if let Err(e) = added {
            log::error!("watching a connection: {e}");
            self.connections.end(connection);
        }
    }
}

/// Gives a connection at work to a thread of the pool, or ends it if there is none to be had.
pub(super) fn hand_over(shared: &Arc<ServerState>, connection: Arc<Connection>) {
    let rejected = match shared.hand_over.try_send(connection) {
        Ok(()) => return,
        Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
    };
    let number = shared.threads.fetch_add(1, Ordering::Relaxed);
    let (worker, job) = (shared.clone(), rejected.clone());
    let spawned = thread::Builder::new()
        .name(format!("http-{number}"))
        .stack_size(STACK)
        .spawn(move || work(&worker, job));
    if let Err(e) = spawned {
        shared.threads.fetch_sub(1, Ordering::Relaxed);
        shared.connections.end(&rejected);
        log::error!("thread for a connection: {e}");
    }
}

fn work(shared: &ServerState, first: Arc<Connection>) {
    // Both ends come also when something panics that no handler's guard covers.
    let _thread = Deferred::new(|| {
        shared.threads.fetch_sub(1, Ordering::Relaxed);
    });
    let mut job = Some(first);
    while let Some(connection) = job {
        let goes_on = Cell::new(false);
        let end = Deferred::new(|| match goes_on.get() {
            true => shared.watch(&connection),
            false => shared.connections.end(&connection),
        });
        match serve(shared, &connection) {
            Ok(more) => goes_on.set(more && !shared.is_stopping()),
            Err(e) => log::debug!("connection from {}: {e}", connection.peer),
        }
        drop(end);
        drop(connection);
        job = shared.free.recv_timeout(THREAD_IDLE).ok();
    }
}

/// What is next on a connection after a request.
enum NextStep {
    /// More requests, most likely soon.
    Stay,
    /// More requests, which the watcher may answer by itself.
    Watch,
    /// Nothing.
    End,
}

/// Serves one connection until nothing comes for a while; false when it has ended. An error, or a
/// body left short, is told by cutting it.
fn serve(shared: &ServerState, connection: &Connection) -> io::Result<bool> {
    let mut bytes = connection.bytes();
    let ConnectionProgress { received, unsent } = &mut *bytes;
    if !unsent.is_empty() {
        send_all(&connection.stream, unsent)?;
        *unsent = Vec::new();
    }
    // The watcher could not answer the first request at once.
    let (mut after, mut has_timeout, mut first) = (NextStep::Watch, false, true);
    if connection.stream.key().is_none() && shared.begins_tls(received) {
        accept_tls(shared, connection, received.split(received.len()).0)?;
        received.consume(received.len());
    }
    // Nobody else reads what is encrypted, and some of it may have been decrypted already: this
    // thread waits for more before the watcher has the connection again.
    let is_tls = connection.stream.key().is_some();
    if is_tls {
        after = NextStep::Stay;
    }
    loop {
        let Some(len) = received.head_len() else {
            if received.is_full() {
                return refuse(connection, &HeadError::TooLarge).map(|()| false);
            }
            // Requests already here keep a connection at work: it is idle when it waits for the
            // next, or the rest of it.
            if matches!(after, NextStep::Watch) || !received.is_empty() && !is_tls {
                received.shrink();
                return Ok(true);
            }
            // The watcher, which looks for heads that come slowly, does not see into TLS.
            if is_tls && received.began().is_some_and(|began| began.elapsed() >= HEAD_TIMEOUT.get())
            {
                return Ok(false);
            }
            shared.connections.set_idle(connection, Instant::now());
            if !has_timeout {
                connection.stream.set_read_timeout(Some(STAY))?;
                has_timeout = true;
            }
            match received.fill(&connection.stream, true) {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => after = NextStep::Watch,
                Err(e) => return Err(e),
            }
            continue;
        };
        connection.set_at_work();
        let (head, behind) = received.split(len);
        let (next, body) =
            head::parse(head, connection.peer, connection.stream.key().copied(), |request| {
                match request.map(|request| request.from(connection.is_outside)) {
                    Ok(request) => {
                        // Reading a body takes another one.
                        has_timeout &= request.body_len == 0;
                        answer(shared, connection, &request, behind, std::mem::take(&mut first))
                    }
                    Err(bad) => refuse(connection, &bad).map(|()| (NextStep::End, 0)),
                }
            })?;
        received.consume(len + body);
        after = if is_tls && matches!(next, NextStep::Watch) { NextStep::Stay } else { next };
        if matches!(after, NextStep::End) {
            return Ok(false);
        }
    }
}

/// Answers one request, of whose body `behind` may have the beginning. Tells also how many bytes of
/// that were of the body.
fn answer(
    shared: &ServerState,
    connection: &Connection,
    request: &Request<'_>,
    behind: &[u8],
    takes_time: bool,
) -> io::Result<(NextStep, usize)> {
    // Removed since: what was asked for before was answered.
    if request.key.is_some_and(|key| !shared.handler.is_friend(&key)) {
        return Err(io::Error::other("not a friend's any more"));
    }
    let keep_alive = request.keep_alive && !shared.is_stopping();
    let body = RequestBody::new(&connection.stream, request, behind);
    let is_own = request.key.is_none()
        && !request.is_outside
        && request.asker.ip().to_canonical().is_loopback();
    let limit = shared.handler.upload_limit().filter(|_| !is_own);
    let mut exchange =
        Exchange::new(&connection.stream, request.method == "HEAD", !keep_alive, body)
            .limited(limit);
    let mut after = NextStep::Stay;
    let at_once = || match takes_time || request.body_len > 0 {
        true => None,
        false => shared.handler.at_once(request, &mut None),
    };
    let handled = catch_unwind(AssertUnwindSafe(|| match at_once() {
        Some(answer) => {
            after = NextStep::Watch;
            exchange.answer(&answer)
        }
        None => shared.handler.handle(request, &mut exchange),
    }));
    match handled {
        Ok(result) => result?,
        Err(_) if !exchange.has_begun() => shared.handler.after_panic(request, &mut exchange)?,
        Err(_) => return Err(io::Error::other("the handler panicked amid its answer")),
    }
    if !exchange.is_whole() {
        return Err(io::Error::other("answer left incomplete"));
    }
    if exchange.body().is_left() {
        linger(connection.stream.socket())?;
        return Ok((NextStep::End, 0));
    }
    if !keep_alive {
        after = NextStep::End;
    }
    Ok((after, exchange.body().behind()))
}

fn refuse(connection: &Connection, bad: &HeadError) -> io::Result<()> {
    let mut exchange =
        Exchange::new(&connection.stream, false, true, RequestBody::none(&connection.stream));
    match bad {
        HeadError::TooLarge => exchange.say(431, "request head too large")?,
        HeadError::Malformed(why) => exchange.say(400, &format!("bad request: {why}"))?,
    }
    linger(connection.stream.socket())
}

/// The handshake of a connection in TLS, if it gets one of the places for that. Blocks for
/// [`HANDSHAKE_TIMEOUT`] at most.
fn accept_tls(shared: &ServerState, connection: &Connection, received: &[u8]) -> io::Result<()> {
    let config = shared.handler.tls().ok_or_else(|| io::Error::other("no TLS"))?;
    let close = connection.stream.socket().try_clone()?;
    let place = shared.handshakes.enter(connection.id, connection.peer.ip(), close);
    connection.stream.accept_tls(config, received, Instant::now() + HANDSHAKE_TIMEOUT.get())?;
    place.succeeded();
    Ok(())
}

fn linger(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let until = Instant::now() + LINGER;
    let mut taken = 0;
    let mut chunk = [0; 4096];
    while taken < LINGER_BYTES {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stream.set_read_timeout(Some(left))?;
        match (&*stream).read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => taken += n as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    /// Panics wherever it can.
    struct Panics;

    impl Handler for Panics {
        fn handle(&self, _: &Request<'_>, _: &mut Exchange<'_>) -> io::Result<()> {
            panic!("on purpose")
        }
        fn after_panic(&self, _: &Request<'_>, _: &mut Exchange<'_>) -> io::Result<()> {
            panic!("on purpose, again")
        }
    }

    #[test]
    fn connection_handed_back_is_idle_since_its_last_answer() {
        let shared = ServerState::new(Arc::new(Panics)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let connection = shared.connections.insert(1, stream, peer, false);
        let answered = Instant::now() + Duration::from_secs(1000);
        shared.connections.set_idle(&connection, answered);
        let since_answer = connection.idle_since();
        shared.watch(&connection);
        assert_eq!(connection.idle_since(), since_answer);

        // Handed back without an answer, as after the first part of a head.
        epoll::delete(&shared.epoll, connection.stream.socket()).unwrap();
        connection.set_at_work();
        shared.watch(&connection);
        assert!(connection.is_idle() && connection.idle_since() < since_answer);
    }

    #[test]
    fn a_panic_takes_its_connection_and_thread_along_and_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ended, end) = bounded(1);
        let server =
            Server::start(vec![listener], Arc::new(Panics), move || ended.send(()).unwrap())
                .unwrap();
        let shared = server.shared.clone();
        for _ in 0..3 {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
        }
        drop(server);
        assert_eq!(end.recv(), Ok(()));
        assert!(shared.connections.is_empty());
        // The last thread is on its way out; the others' going is what this waits for.
        while shared.threads.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
    }
}
