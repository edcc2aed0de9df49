//! Serves connections: reads requests, calls the [`Handler`], and closes connections so that
//! clients can tell an incomplete response from a complete one.
//!
//! One event loop accepts connections and watches idle ones (`event_loop.rs`). A thread of the pool
//! owns a connection while it is at work. The server is independent of what the handler serves.

use super::admission::{MAX_CONNECTIONS, OWN_CONNECTIONS};
use super::body::RequestBody;
use super::connections::{Connection, ConnectionProgress, Connections, HEAD_TIMEOUT};
use super::event_loop::run;
use super::handshakes::{HANDSHAKE_TIMEOUT, Handshakes};
use super::head::{self, HeadError, ReceiveBuffer, Request};
use super::response::{Exchange, ShortResponse};
use super::stream::{AuthenticatedKey, ConnectionStream};
use crate::log_throttle::LogThrottle;
use crate::upload_limit::UploadLimit;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, eventfd};
use rustls::ServerConfig;
use scopeguard::{defer, guard};
use std::cell::Cell;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Stack of a thread of the pool, in bytes. Less than 64 KiB of it is used.
const STACK_BYTES: usize = 512 * 1024;

/// Threads of the pool. A connection that was closed to make room holds its thread until that
/// notices, so there are some more threads than connections. At the bound, a connection of this
/// machine waits for a thread.
const MAX_THREADS: usize = MAX_CONNECTIONS + 64;

/// Threads at work for other machines. A closed connection may hold its thread for up to 20 s,
/// which waits for the upload limit or the upstream cache meanwhile. At the bound, further
/// connections of other machines are closed, so that threads for this machine are left.
const MAX_STRANGER_THREADS: usize = MAX_THREADS - OWN_CONNECTIONS;

/// Wait of a connection of this machine for a thread at [`MAX_THREADS`], after which it is closed.
/// The event loop waits meanwhile. Threads for this machine notice within microseconds that their
/// connection was closed.
const THREAD_TIMEOUT: Duration = Duration::from_millis(100);

/// Time without a connection after which a thread of the pool ends.
const THREAD_IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// Time that a thread waits for the next request after a response before it returns the connection
/// to the event loop. A client that requests one NAR mostly requests another at once, and changing
/// threads would delay that.
const NEXT_REQUEST_TIMEOUT: Duration = Duration::from_millis(100);

/// Time that running responses have to finish when the server stops. The rest are cut.
const STOP_GRACE: Duration = Duration::from_millis(1200);

/// Bytes of an unread body that are discarded after its response. Closing the socket at once would
/// reset the connection, and the client might not receive the response.
const LINGER_BYTES: u64 = 1 << 20;
/// Longest time for discarding [`LINGER_BYTES`].
const LINGER_TIMEOUT: Duration = Duration::from_secs(1);

/// Database generation shared by all requests read in one poll; `None` until the handler needs it.
pub type PollGeneration = Option<u64>;

/// Responds to requests. If a handler leaves a body unread, the server closes the connection.
pub trait Handler: Send + Sync + 'static {
    /// Returns the response to a request without a body if that takes microseconds: from memory,
    /// without waiting for the disk, the network or another thread. `None` leaves the request to
    /// [`Handler::handle`]. The event loop calls this, so all connections wait for it.
    ///
    /// `generation` is shared by requests that arrived before the same poll. The handler may store
    /// in it the generation of its data at the first of them and use that for the others.
    fn try_cached(
        &self,
        _request: &Request<'_>,
        _generation: &mut PollGeneration,
    ) -> Option<ShortResponse> {
        None
    }

    /// Answers one request. May block.
    ///
    /// # Errors
    /// The connection fails, or a begun body cannot be completed. The server then cuts the
    /// connection.
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()>;

    /// Answers a request whose handler panicked before it began a response.
    ///
    /// # Errors
    /// The connection fails.
    fn after_panic(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()>;

    /// TLS settings for connections that begin a TLS handshake; `None` disables TLS.
    fn tls(&self) -> Option<Arc<ServerConfig>> {
        None
    }

    /// Whether requests with this key are still answered. The key was a friend's when its
    /// connection was accepted.
    fn is_friend(&self, _key: &AuthenticatedKey) -> bool {
        false
    }

    /// Whether requests from outside are answered without TLS.
    fn answers_outside(&self) -> bool {
        false
    }

    /// Upload rate limit for other machines together; `None` is no limit.
    fn upload_limit(&self) -> Option<&UploadLimit> {
        None
    }

    /// Frees memory. Called about once per minute while no connection is open.
    fn on_idle(&self) {}
}

/// The running server. Dropping it stops it and blocks for about 1.2 s at most; responses that have
/// not finished then are cut.
pub struct Server {
    state: Arc<ServerState>,
    wake: OwnedFd,
    event_loop: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `handler` on the listeners. `on_end` runs when the event loop ends, for whatever
    /// reason.
    ///
    /// # Errors
    /// No file descriptor is left, or no thread can be started.
    pub fn start(
        listeners: Vec<TcpListener>,
        handler: Arc<dyn Handler>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        Server::start_with_outside(listeners, None, handler, on_end)
    }

    /// Serves `handler` also on `outside`, a listener whose connections a router forwards. Their
    /// requests have [`Request::is_outside`] set, whatever their address.
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
        let state = Arc::new(ServerState::new(handler)?);
        let loop_state = state.clone();
        let event_loop = thread::Builder::new().name("http-watch".into()).spawn(move || {
            defer!(on_end());
            if let Err(e) = run(&loop_state, &listeners, inside, &stop) {
                log::error!("watching connections: {e}");
            }
        })?;
        Ok(Server { state, wake, event_loop: Some(event_loop) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state.is_stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(event_loop) = self.event_loop.take() {
            let _ = event_loop.join();
        }
        let deadline = Instant::now() + STOP_GRACE;
        self.state.connections.end_idle();
        while !self.state.connections.is_empty() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
            self.state.connections.end_idle();
        }
        self.state.connections.close_all();
    }
}

/// State shared by the event loop and the threads of the pool.
pub(super) struct ServerState {
    pub(super) handler: Arc<dyn Handler>,
    pub(super) connections: Connections,
    handshakes: Handshakes,
    /// Reports events on the listeners and on idle connections.
    pub(super) epoll: OwnedFd,
    threads: AtomicUsize,
    /// Each [`Job`] for another machine holds a clone, so that they can be counted.
    stranger_jobs: Arc<()>,
    is_stopping: AtomicBool,
    /// Limits log lines about failures of the event loop.
    faults: LogThrottle,
    /// Rendezvous channel to idle threads. It holds no connections.
    job_sender: Sender<Job>,
    job_receiver: Receiver<Job>,
}

/// A connection for a thread of the pool to serve.
struct Job {
    connection: Arc<Connection>,
    _stranger_job: Option<Arc<()>>,
}

impl ServerState {
    fn new(handler: Arc<dyn Handler>) -> io::Result<Self> {
        let (job_sender, job_receiver) = bounded(0);
        Ok(ServerState {
            handler,
            connections: Connections::new(),
            handshakes: Handshakes::default(),
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            threads: AtomicUsize::new(0),
            stranger_jobs: Arc::new(()),
            is_stopping: AtomicBool::new(false),
            faults: LogThrottle::default(),
            job_sender,
            job_receiver,
        })
    }

    /// Whether the handler supports TLS and these first bytes of a connection begin a handshake.
    pub(super) fn begins_tls(&self, received: &ReceiveBuffer) -> bool {
        ConnectionStream::begins_tls(received.split(received.len()).0)
            && self.handler.tls().is_some()
    }

    /// Returns a job for a thread, or `None` at [`MAX_STRANGER_THREADS`].
    fn job(&self, connection: Arc<Connection>) -> Option<Job> {
        let _stranger_job = (!connection.is_own).then(|| self.stranger_jobs.clone());
        let has_thread =
            connection.is_own || Arc::strong_count(&self.stranger_jobs) - 1 <= MAX_STRANGER_THREADS;
        has_thread.then_some(Job { connection, _stranger_job })
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.is_stopping.load(Ordering::Relaxed)
    }

    /// Returns a connection to the event loop, or ends it if epoll does not accept it. A connection
    /// that is already idle keeps its time: a thread waited up to [`NEXT_REQUEST_TIMEOUT`] for another request.
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
            self.record_fault("watching a connection", &e.into());
            self.connections.end(connection);
        }
    }

    /// Logs a failure of the event loop, at most one in 10 s.
    pub(super) fn record_fault(&self, what: &str, e: &io::Error) {
        if self.faults.allow(Instant::now()) {
            log::error!("{what}: {e}");
        }
    }
}

/// Passes a connection to an idle thread of the pool or to a new one, or ends it if there is no
/// thread for it. Called by the event loop alone. At [`MAX_THREADS`] a connection of this machine
/// waits up to [`THREAD_TIMEOUT`].
pub(super) fn hand_over(state: &Arc<ServerState>, connection: Arc<Connection>) {
    let Some(job) = state.job(connection.clone()) else {
        return state.connections.end(&connection);
    };
    let job = match state.job_sender.try_send(job) {
        Ok(()) => return,
        Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
    };
    if state.threads.load(Ordering::Relaxed) >= MAX_THREADS {
        let timeout = if connection.is_own { THREAD_TIMEOUT } else { Duration::ZERO };
        if state.job_sender.send_timeout(job, timeout).is_err() {
            state.connections.end(&connection);
        }
        return;
    }
    let number = state.threads.fetch_add(1, Ordering::Relaxed);
    let worker = state.clone();
    let spawned = thread::Builder::new()
        .name(format!("http-{number}"))
        .stack_size(STACK_BYTES)
        .spawn(move || work(&worker, job));
    if let Err(e) = spawned {
        state.threads.fetch_sub(1, Ordering::Relaxed);
        state.connections.end(&connection);
        state.record_fault("thread for a connection", &e);
    }
}

fn work(state: &ServerState, first: Job) {
    // Both guards also run on panics outside a handler.
    defer! {
        state.threads.fetch_sub(1, Ordering::Relaxed);
    }
    let mut job = Some(first);
    while let Some(Job { connection, _stranger_job }) = job {
        let is_kept = Cell::new(false);
        let end = guard((), |()| match is_kept.get() {
            true => state.watch(&connection),
            false => state.connections.end(&connection),
        });
        match serve(state, &connection) {
            Ok(more) => is_kept.set(more && !state.is_stopping()),
            Err(e) => log::debug!("connection from {}: {e}", connection.peer),
        }
        drop(end);
        drop((connection, _stranger_job));
        job = state.job_receiver.recv_timeout(THREAD_IDLE_TIMEOUT).ok();
    }
}

/// What to do with a connection after a request.
enum NextStep {
    /// Wait on this thread, because another request is likely soon.
    Stay,
    /// Return it to the event loop, which can answer such requests.
    Watch,
    /// End it.
    End,
}

/// Serves the requests on a connection. Returns true when the event loop is to watch it again, and
/// false when it has ended. After an error or an incomplete body, the caller cuts it.
fn serve(state: &ServerState, connection: &Connection) -> io::Result<bool> {
    let mut bytes = connection.bytes();
    let ConnectionProgress { received, unsent } = &mut *bytes;
    if !unsent.is_empty() {
        (&connection.stream).write_all(unsent)?;
        *unsent = Vec::new();
    }
    if connection.stream.key().is_none() && state.begins_tls(received) {
        accept_tls(state, connection, received.split(received.len()).0)?;
        received.consume(received.len());
    }
    // Only this thread can read an encrypted connection, and some bytes may be decrypted already.
    // It waits for more before it returns the connection to the event loop.
    let is_tls = connection.stream.key().is_some();
    let mut next_step = if is_tls { NextStep::Stay } else { NextStep::Watch };
    // The event loop could not answer the first request at once.
    let (mut has_timeout, mut first) = (false, true);
    loop {
        let Some(len) = received.head_len() else {
            if received.is_full() {
                return refuse(connection, &HeadError::TooLarge).map(|()| false);
            }
            // A connection is idle only while it waits for a request or the rest of one, not while
            // buffered requests are answered.
            if matches!(next_step, NextStep::Watch) || !received.is_empty() && !is_tls {
                received.shrink();
                return Ok(true);
            }
            if !std::mem::replace(&mut has_timeout, true) {
                connection.stream.set_read_timeout(Some(NEXT_REQUEST_TIMEOUT))?;
            }
            next_step = receive(state, connection, received)?;
            if matches!(next_step, NextStep::End) {
                return Ok(false);
            }
            continue;
        };
        connection.set_busy();
        let (head, after_head) = received.split(len);
        let (next, body) =
            head::parse(head, connection.peer, connection.stream.key().copied(), |request| {
                match request
                    .map(|request| request.with_client(connection.is_outside, connection.is_own))
                {
                    Ok(request) => {
                        // Reading a body changes the socket's read timeout.
                        has_timeout &= request.body_len == 0;
                        answer(state, connection, &request, after_head, std::mem::take(&mut first))
                    }
                    Err(error) => refuse(connection, &error).map(|()| (NextStep::End, 0)),
                }
            })?;
        received.consume(len + body);
        next_step = if is_tls && matches!(next, NextStep::Watch) { NextStep::Stay } else { next };
        if matches!(next_step, NextStep::End) {
            return Ok(false);
        }
    }
}

/// Waits for more bytes of a request, up to [`NEXT_REQUEST_TIMEOUT`].
fn receive(
    state: &ServerState,
    connection: &Connection,
    received: &mut ReceiveBuffer,
) -> io::Result<NextStep> {
    // The event loop enforces `HEAD_TIMEOUT`, but it cannot see heads inside TLS.
    let is_late = |began: Instant| began.elapsed() >= HEAD_TIMEOUT.get();
    if connection.stream.key().is_some() && received.first_byte_at().is_some_and(is_late) {
        return Ok(NextStep::End);
    }
    state.connections.set_idle(connection, Instant::now());
    match received.fill(&connection.stream, true) {
        Ok(0) => Ok(NextStep::End),
        Ok(_) => Ok(NextStep::Stay),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(NextStep::Watch),
        Err(e) => Err(e),
    }
}

/// Answers one request. `after_head` are the bytes received after the head. Returns the number of
/// them that belong to the body.
fn answer(
    state: &ServerState,
    connection: &Connection,
    request: &Request<'_>,
    after_head: &[u8],
    takes_time: bool,
) -> io::Result<(NextStep, usize)> {
    // The friend was removed after its connection was accepted.
    if request.key.is_some_and(|key| !state.handler.is_friend(&key)) {
        return Err(io::Error::other("not a friend's any more"));
    }
    let keep_alive = request.keep_alive && !state.is_stopping();
    let body = RequestBody::new(&connection.stream, request, after_head);
    let is_own = request.key.is_none() && connection.is_own;
    let limit = state.handler.upload_limit().filter(|_| !is_own);
    let mut exchange =
        Exchange::new(&connection.stream, request.method == "HEAD", !keep_alive, body)
            .with_limit(limit);
    let mut next_step = NextStep::Stay;
    let at_once = || match takes_time || request.body_len > 0 {
        true => None,
        false => state.handler.try_cached(request, &mut None),
    };
    let handled = catch_unwind(AssertUnwindSafe(|| match at_once() {
        Some(answer) => {
            next_step = NextStep::Watch;
            exchange.answer(&answer)
        }
        None => state.handler.handle(request, &mut exchange),
    }));
    match handled {
        Ok(result) => result?,
        Err(_) if !exchange.has_begun() => state.handler.after_panic(request, &mut exchange)?,
        Err(_) => return Err(io::Error::other("the handler panicked amid its answer")),
    }
    if !exchange.is_whole() {
        return Err(io::Error::other("answer left incomplete"));
    }
    if exchange.body().is_unread() {
        linger(connection.stream.socket())?;
        return Ok((NextStep::End, 0));
    }
    if !keep_alive {
        next_step = NextStep::End;
    }
    Ok((next_step, exchange.body().received_len()))
}

fn refuse(connection: &Connection, error: &HeadError) -> io::Result<()> {
    let mut exchange =
        Exchange::new(&connection.stream, false, true, RequestBody::none(&connection.stream));
    match error {
        HeadError::TooLarge => exchange.say(431, "request head too large")?,
        HeadError::Malformed(why) => exchange.say(400, &format!("bad request: {why}"))?,
    }
    linger(connection.stream.socket())
}

/// Performs the TLS handshake. Blocks for [`HANDSHAKE_TIMEOUT`], and for at most one write timeout
/// more. Another handshake may end it.
fn accept_tls(state: &ServerState, connection: &Connection, received: &[u8]) -> io::Result<()> {
    let config = state.handler.tls().ok_or_else(|| io::Error::other("no TLS"))?;
    let close = connection.stream.socket().try_clone()?;
    let permit = state.handshakes.register(connection.id, connection.peer.ip(), close);
    connection.stream.accept_tls(config, received, Instant::now() + HANDSHAKE_TIMEOUT.get())?;
    permit.record_friend();
    Ok(())
}

fn linger(stream: &TcpStream) -> io::Result<()> {
    stream.shutdown(Shutdown::Write)?;
    let deadline = Instant::now() + LINGER_TIMEOUT;
    let mut discarded = 0;
    let mut chunk = [0; 4096];
    while discarded < LINGER_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        stream.set_read_timeout(Some(left))?;
        match (&*stream).read(&mut chunk) {
            Ok(0) | Err(_) => break,
            Ok(n) => discarded += n as u64,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Panics in both methods.
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
        let state = ServerState::new(Arc::new(Panics)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (stream, peer) = listener.accept().unwrap();
        let connection = state.connections.insert(1, stream, peer, false, true);
        let answered = Instant::now() + Duration::from_secs(1000);
        state.connections.set_idle(&connection, answered);
        let since_answer = connection.idle_since();
        state.watch(&connection);
        assert_eq!(connection.idle_since(), since_answer);

        // Handed back without a response, as after the first part of a head.
        epoll::delete(&state.epoll, connection.stream.socket()).unwrap();
        connection.set_busy();
        state.watch(&connection);
        assert!(connection.is_idle() && connection.idle_since() < since_answer);
    }

    /// Regression test: threads of closed connections of other machines held up the event loop.
    #[test]
    fn threads_for_other_machines_leave_some_for_this_machine() {
        let state = ServerState::new(Arc::new(Panics)).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let connect = |id: u64, is_own: bool| {
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, peer) = listener.accept().unwrap();
            state.connections.insert(id, stream, peer, false, is_own)
        };
        let (own, other) = (connect(1, true), connect(2, false));
        let mut jobs: Vec<Job> =
            (0..2 * MAX_THREADS).map_while(|_| state.job(other.clone())).collect();
        assert_eq!(jobs.len(), MAX_THREADS - OWN_CONNECTIONS);
        assert!(state.job(own).is_some());
        jobs.pop();
        assert!(state.job(other).is_some());
    }

    #[test]
    fn panic_ends_its_connection_and_thread_only() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ended, end) = bounded(1);
        let server =
            Server::start(vec![listener], Arc::new(Panics), move || ended.send(()).unwrap())
                .unwrap();
        let state = server.state.clone();
        for _ in 0..3 {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
        }
        drop(server);
        assert_eq!(end.recv(), Ok(()));
        assert!(state.connections.is_empty());
        // Wait for threads that are still ending.
        while state.threads.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
    }
}
