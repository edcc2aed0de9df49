//! Connections: accepting, bounding, reading requests, and closing in a way the client can tell from success.
//!
//! One thread accepts; each connection has a thread of a pool while it lasts. Knows nothing of what is served: that is
//! a [`Handler`]'s.

use super::body::Body;
use super::head::{self, BadHead, Buffer, Received, Request};
use super::response::{Exchange, WRITE_TIMEOUT};
use super::room::{self, Room, Seat};
use crate::on_drop::OnDrop;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::HashMap;
use std::io::{self, Read};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Most of it is never touched; what is, is under 64 KiB.
const STACK: usize = 512 * 1024;

/// A thread without a connection ends after this.
const THREAD_IDLE: Duration = Duration::from_secs(10);

/// When no descriptor is left, accepting pauses for this long: others need time to close theirs.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// When all connections are this machine's and at work, its next one waits so long for one to end. It delays others
/// that come; they would find no room either.
const FULL_PAUSE: Duration = Duration::from_millis(100);

/// At the end, running answers have so long to end by themselves.
const STOP_GRACE: Duration = Duration::from_millis(1200);

/// After an answer to a request whose body nobody reads, so many bytes of it are taken, so long: closing at once
/// would reset the connection, and the client might never see the answer.
const LINGER_BYTES: u64 = 1 << 20;
/// See [`LINGER_BYTES`].
const LINGER: Duration = Duration::from_secs(1);

/// What is served. A body that the handler does not read ends the connection.
pub trait Handler: Send + Sync + 'static {
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
}

/// The running server. Dropping it ends it, in `STOP_GRACE` or a little more.
pub struct Server {
    shared: Arc<Shared>,
    wake: OwnedFd,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `handler` on the listeners. `on_end` runs when the accepting thread ends, for whatever reason.
    ///
    /// # Errors
    /// No descriptor or no thread to be had.
    pub fn start(
        listeners: Vec<TcpListener>,
        handler: Arc<dyn Handler>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Server> {
        for listener in &listeners {
            listener.set_nonblocking(true)?;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stop = wake.try_clone()?;
        let shared = Arc::new(Shared::new(handler));
        let acceptor = shared.clone();
        let acceptor = thread::Builder::new().name("http-accept".into()).spawn(move || {
            let _end = OnDrop::new(on_end);
            accept(&acceptor, &listeners, &stop);
        })?;
        Ok(Server { shared, wake, acceptor: Some(acceptor) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        let until = Instant::now() + STOP_GRACE;
        self.shared.close_where(|connection| connection.is_idle());
        while !self.shared.lock().is_empty() && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
            self.shared.close_where(|connection| connection.is_idle());
        }
        self.shared.close_where(|_| true);
    }
}

/// One open connection, as the others see it.
struct Connection {
    stream: TcpStream,
    peer: SocketAddr,
    /// Milliseconds since the server's start at which it became idle; 0 while it is at work.
    idle_since: AtomicU64,
}

impl Connection {
    fn is_idle(&self) -> bool {
        self.idle_since.load(Ordering::Relaxed) != 0
    }

    fn close(&self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

struct Shared {
    handler: Arc<dyn Handler>,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    threads: AtomicUsize,
    stopping: AtomicBool,
    started: Instant,
    /// To threads that are free: nothing is ever queued here.
    hand_over: Sender<(u64, Arc<Connection>)>,
    free: Receiver<(u64, Arc<Connection>)>,
}

impl Shared {
    fn new(handler: Arc<dyn Handler>) -> Self {
        let (hand_over, free) = bounded(0);
        Shared {
            handler,
            connections: Mutex::default(),
            threads: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            started: Instant::now(),
            hand_over,
            free,
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.connections.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn close_where(&self, condition: impl Fn(&Connection) -> bool) {
        self.lock().values().filter(|c| condition(c)).for_each(|c| c.close());
    }

    /// Never 0, which means at work.
    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64 + 1
    }

    /// Closes the connection that is idle longest, if one is.
    fn close_idlest(&self) {
        let mut connections = self.lock();
        if let Some(id) = room::idlest(seats(&connections)) {
            close(&mut connections, id);
        }
    }

    /// Makes room for a connection from `peer`, closing another if need be. False if there is none.
    fn make_room(&self, peer: SocketAddr) -> bool {
        let until = Instant::now() + FULL_PAUSE;
        loop {
            let mut connections = self.lock();
            match room::room(peer.ip(), seats(&connections)) {
                Room::Free => return true,
                Room::Instead(id) => {
                    close(&mut connections, id);
                    return true;
                }
                Room::Full => {}
            }
            drop(connections);
            let own = peer.ip().to_canonical().is_loopback();
            if !own || Instant::now() >= until || self.stopping.load(Ordering::Relaxed) {
                return false;
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

fn seats(connections: &HashMap<u64, Arc<Connection>>) -> impl Iterator<Item = Seat> + Clone {
    connections.iter().map(|(id, connection)| {
        let idle_since = connection.idle_since.load(Ordering::Relaxed);
        Seat { id: *id, peer: connection.peer.ip(), idle_since: (idle_since != 0).then_some(idle_since) }
    })
}

fn close(connections: &mut HashMap<u64, Arc<Connection>>, id: u64) {
    if let Some(connection) = connections.remove(&id) {
        connection.close();
    }
}

fn accept(shared: &Arc<Shared>, listeners: &[TcpListener], stop: &OwnedFd) {
    let mut next_id = 0;
    loop {
        let mut fds: Vec<PollFd<'_>> = listeners.iter().map(|l| PollFd::new(l, PollFlags::IN)).collect();
        fds.push(PollFd::new(stop, PollFlags::IN));
        let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
        let _ = poll(&mut fds, Some(&minute));
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        for listener in listeners {
            match listener.accept() {
                Ok((stream, peer)) => {
                    next_id += 1;
                    admit(shared, next_id, stream, peer);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // The client gave up before it was accepted.
                Err(e) if matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
                Err(e) => {
                    log::error!("accepting connections: {e}");
                    shared.close_idlest();
                    thread::sleep(ACCEPT_PAUSE);
                }
            }
        }
    }
}

fn admit(shared: &Arc<Shared>, id: u64, stream: TcpStream, peer: SocketAddr) {
    if !shared.make_room(peer) {
        return log::debug!("connection from {peer}: refused, too many at work");
    }
    let prepared = stream
        .set_nonblocking(false)
        .and_then(|()| stream.set_nodelay(true))
        .and_then(|()| stream.set_write_timeout(Some(WRITE_TIMEOUT)));
    if let Err(e) = prepared {
        return log::debug!("connection from {peer}: {e}");
    }
    let connection = Arc::new(Connection { stream, peer, idle_since: AtomicU64::new(shared.now()) });
    shared.lock().insert(id, connection.clone());
    let rejected = match shared.hand_over.try_send((id, connection)) {
        Ok(()) => return,
        Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
    };
    let number = shared.threads.fetch_add(1, Ordering::Relaxed);
    let worker = shared.clone();
    let spawned =
        thread::Builder::new().name(format!("http-{number}")).stack_size(STACK).spawn(move || work(&worker, rejected));
    if let Err(e) = spawned {
        shared.threads.fetch_sub(1, Ordering::Relaxed);
        shared.lock().remove(&id);
        log::error!("thread for a connection: {e}");
        thread::sleep(ACCEPT_PAUSE);
    }
}

fn work(shared: &Shared, first: (u64, Arc<Connection>)) {
    // Both ends come also when something panics that no handler's guard covers.
    let _thread = OnDrop::new(|| {
        shared.threads.fetch_sub(1, Ordering::Relaxed);
    });
    let mut job = Some(first);
    while let Some((id, connection)) = job {
        let end = OnDrop::new(|| {
            connection.close();
            shared.lock().remove(&id);
        });
        if let Err(e) = serve(shared, &connection) {
            log::debug!("connection from {}: {e}", connection.peer);
        }
        drop(end);
        drop(connection);
        job = shared.free.recv_timeout(THREAD_IDLE).ok();
    }
}

/// Serves one connection to its end. An error, or a body left short, is told by cutting it.
fn serve(shared: &Shared, connection: &Connection) -> io::Result<()> {
    let mut buffer = Buffer::default();
    loop {
        // Requests already here keep a connection at work: it is idle when it waits for the next, or the rest of it.
        let idle = if buffer.has_head() { 0 } else { shared.now() };
        connection.idle_since.store(idle, Ordering::Relaxed);
        let received = buffer.receive(&connection.stream)?;
        connection.idle_since.store(0, Ordering::Relaxed);
        let len = match received {
            Received::Head(len) => len,
            Received::Nothing => return Ok(()),
            Received::Bad(bad) => return refuse(connection, &bad),
        };
        let (head, behind) = buffer.split(len);
        let again = head::parse(head, connection.peer, |request| match request {
            Ok(request) => answer(shared, connection, &request, behind),
            Err(bad) => refuse(connection, &bad).map(|()| None),
        })?;
        let Some(body) = again else { return Ok(()) };
        buffer.consume(len + body);
    }
}

/// Answers one request, of whose body `behind` may have the beginning. If the connection can be used again, tells how many
/// bytes of that were of the body.
fn answer(shared: &Shared, connection: &Connection, request: &Request<'_>, behind: &[u8]) -> io::Result<Option<usize>> {
    let keep_alive = request.keep_alive && !shared.stopping.load(Ordering::Relaxed);
    let body = Body::new(&connection.stream, request, behind);
    let mut exchange = Exchange::new(&connection.stream, request.method == "HEAD", !keep_alive, body);
    let handled = catch_unwind(AssertUnwindSafe(|| shared.handler.handle(request, &mut exchange)));
    match handled {
        Ok(result) => result?,
        Err(_) if !exchange.has_begun() => shared.handler.after_panic(request, &mut exchange)?,
        Err(_) => return Err(io::Error::other("the handler panicked amid its answer")),
    }
    if !exchange.is_whole() {
        return Err(io::Error::other("answer left incomplete"));
    }
    if exchange.body().is_left() {
        linger(&connection.stream)?;
        return Ok(None);
    }
    Ok(keep_alive.then(|| exchange.body().behind()))
}

fn refuse(connection: &Connection, bad: &BadHead) -> io::Result<()> {
    let mut exchange = Exchange::new(&connection.stream, false, true, Body::none(&connection.stream));
    match bad {
        BadHead::TooLarge => exchange.say(431, "request head too large")?,
        BadHead::Malformed(why) => exchange.say(400, &format!("bad request: {why}"))?,
    }
    linger(&connection.stream)
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
    fn a_panic_takes_its_connection_and_thread_along_and_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ended, end) = bounded(1);
        let server = Server::start(vec![listener], Arc::new(Panics), move || ended.send(()).unwrap()).unwrap();
        let shared = server.shared.clone();
        for _ in 0..3 {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            assert_eq!(stream.read(&mut [0; 9]).unwrap(), 0);
        }
        drop(server);
        assert_eq!(end.recv(), Ok(()));
        assert!(shared.lock().is_empty());
        // The last thread is on its way out; the others' going is what this waits for.
        while shared.threads.load(Ordering::Relaxed) > 0 {
            thread::yield_now();
        }
    }
}
