//! The table of open connections, with their timeouts and the closing of connections to make room.

use super::admission::{self, Admission, Newcomer, OpenConnection};
use super::head::ReceiveBuffer;
use super::stream::ConnectionStream;
use crate::lock::{Mutex, MutexGuard};
use crate::time_scale::Timeout;
use std::collections::HashMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Time from a head's first byte to its last. The server closes a connection that takes longer.
pub const HEAD_TIMEOUT: Timeout = Timeout::from_secs(10);
/// Time that a connection may wait for a request before the server closes it.
pub const IDLE_TIMEOUT: Timeout = Timeout::from_secs(30);

/// One open connection. Its owner is the event loop while it waits for a request, and otherwise a
/// thread of the pool.
pub(super) struct Connection {
    pub(super) id: u64,
    pub(super) stream: ConnectionStream,
    pub(super) peer: SocketAddr,
    /// Whether the connection comes from outside the LAN, through a port that a router forwards.
    pub(super) is_outside: bool,
    /// Whether a client on this machine opened the connection (see [`is_own`]).
    pub(super) is_own: bool,
    /// Milliseconds since the table was created at which the connection became idle; 0 while it is
    /// at work.
    idle_since: AtomicU64,
    /// Locked by the connection's current owner. Others only try the lock, so that the owner never
    /// waits.
    bytes: Mutex<ConnectionProgress>,
}

/// Buffers of a connection between two steps of serving it.
#[derive(Default)]
pub(super) struct ConnectionProgress {
    /// Bytes received and not yet answered.
    pub(super) received: ReceiveBuffer,
    /// The rest of a response that the socket's buffer did not take.
    pub(super) unsent: Vec<u8>,
}

impl Connection {
    /// Milliseconds from the table's creation to when the connection became idle; `None` while a
    /// request is being answered.
    pub(super) fn idle_since(&self) -> Option<u64> {
        Some(self.idle_since.load(Ordering::Relaxed)).filter(|&since| since != 0)
    }

    pub(super) fn is_idle(&self) -> bool {
        self.idle_since().is_some()
    }

    pub(super) fn set_busy(&self) {
        self.idle_since.store(0, Ordering::Relaxed);
    }

    pub(super) fn bytes(&self) -> MutexGuard<'_, ConnectionProgress> {
        // The value stays consistent when a handler panics, because handlers do not change it.
        self.bytes.lock()
    }

    pub(super) fn close(&self) {
        self.stream.progress().record_closed();
        let _ = self.stream.socket().shutdown(Shutdown::Both);
    }
}

/// All open connections by ID. IDs increase.
pub(super) struct Connections {
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    started: Instant,
}

impl Connections {
    pub(super) fn new() -> Self {
        Connections { open: Mutex::default(), started: Instant::now() }
    }

    pub(super) fn insert(
        &self,
        id: u64,
        stream: TcpStream,
        peer: SocketAddr,
        is_outside: bool,
        is_own: bool,
    ) -> Arc<Connection> {
        let stream = ConnectionStream::new(stream, !is_own);
        let idle_since = AtomicU64::new(self.milliseconds(Instant::now()));
        let connection = Arc::new(Connection {
            id,
            stream,
            peer,
            is_outside,
            is_own,
            idle_since,
            bytes: Mutex::default(),
        });
        self.open.lock().insert(id, connection.clone());
        connection
    }

    pub(super) fn get(&self, id: u64) -> Option<Arc<Connection>> {
        self.open.lock().get(&id).cloned()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.lock().is_empty()
    }

    /// Shuts a connection down and removes it from the table. Its owner still has to drop it.
    pub(super) fn end(&self, connection: &Connection) {
        connection.close();
        self.open.lock().remove(&connection.id);
    }

    /// Marks a connection as waiting for its next request since `now`.
    pub(super) fn set_idle(&self, connection: &Connection, now: Instant) {
        connection.idle_since.store(self.milliseconds(now), Ordering::Relaxed);
    }

    /// Ends all idle connections.
    pub(super) fn end_idle(&self) {
        self.end_where(Connection::is_idle);
    }

    /// Ends all connections that exceed [`IDLE_TIMEOUT`], or [`HEAD_TIMEOUT`] for an incomplete
    /// head.
    pub(super) fn end_overdue(&self, now: Instant) {
        let now_ms = self.milliseconds(now);
        self.end_where(|connection| {
            // A connection at work has time limits of its own.
            let Some(idle_since) = connection.idle_since() else { return false };
            let began = || connection.bytes.try_lock()?.received.first_byte_at();
            match began() {
                Some(began) => now.saturating_duration_since(began) >= HEAD_TIMEOUT.get(),
                None => now_ms.saturating_sub(idle_since) >= IDLE_TIMEOUT.get().as_millis() as u64,
            }
        });
    }

    /// Shuts all connections down. Their owners remove them from the table.
    pub(super) fn close_all(&self) {
        self.open.lock().values().for_each(|connection| connection.close());
    }

    fn end_where(&self, condition: impl Fn(&Connection) -> bool) {
        self.open.lock().retain(|_, connection| {
            let ends = condition(connection);
            if ends {
                connection.close();
            }
            !ends
        });
    }

    /// Closes the connection that has been idle longest. Returns false if none is idle.
    pub(super) fn close_idlest(&self) -> bool {
        let mut open = self.open.lock();
        let idlest = admission::idlest(open_connections(&open, Instant::now()));
        if let Some(id) = idlest {
            close(&mut open, id);
        }
        idlest.is_some()
    }

    /// Makes room for a connection from `peer` and closes another one if necessary. Returns false
    /// if there is no room.
    pub(super) fn make_room(&self, peer: SocketAddr, is_own: bool) -> bool {
        let newcomer = Newcomer { peer: peer.ip(), is_own };
        let mut open = self.open.lock();
        match admission::admit(newcomer, open_connections(&open, Instant::now())) {
            Admission::Free => true,
            Admission::Replace(id) => {
                close(&mut open, id);
                true
            }
            Admission::Full => false,
        }
    }

    /// Milliseconds since the table was created, plus 1, because 0 means at work.
    fn milliseconds(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.started).as_millis() as u64 + 1
    }
}

fn open_connections(
    open: &HashMap<u64, Arc<Connection>>,
    now: Instant,
) -> impl Iterator<Item = OpenConnection> + Clone {
    open.iter().map(move |(id, connection)| OpenConnection {
        id: *id,
        peer: connection.peer.ip(),
        is_own: connection.is_own,
        idle_since: connection.idle_since(),
        stalled_for: connection.stream.progress().stalled_for(now),
    })
}

/// Whether a connection from `peer` to the address `local` comes from this machine. The kernel
/// gives a connection of this machine to itself one address at both ends, and drops packets from
/// elsewhere that have an address of this machine as their source. A router may forward connections
/// from outside under an address of its own choice.
pub(super) fn is_own(peer: SocketAddr, local: SocketAddr, is_outside: bool) -> bool {
    let (peer, local) = (peer.ip().to_canonical(), local.ip().to_canonical());
    !is_outside && (peer.is_loopback() || peer == local)
}

fn close(open: &mut HashMap<u64, Arc<Connection>>, id: u64) {
    if let Some(connection) = open.remove(&id) {
        connection.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::net::TcpListener;
    use std::time::Duration;

    /// Regression test: a connection to this machine's LAN address had its scope, but neither its
    /// place nor its rates.
    #[test]
    fn connection_from_its_destination_is_own_unless_it_comes_from_outside() {
        let address = |text: &str| SocketAddr::new(text.parse().unwrap(), 1);
        for (peer, local, expected) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("::ffff:127.8.8.8", "::ffff:127.0.0.1", true),
            ("192.168.10.5", "192.168.10.5", true),
            ("::ffff:192.168.10.5", "192.168.10.5", true),
            ("fe80::1", "fe80::1", true),
            ("192.168.10.6", "192.168.10.5", false),
            ("fe80::2", "fe80::1", false),
        ] {
            assert_eq!(is_own(address(peer), address(local), false), expected, "{peer} {local}");
            assert!(!is_own(address(peer), address(local), true), "{peer} {local} from outside");
        }
    }

    #[test]
    fn overdue_connections_are_closed_and_others_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let open = || {
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (stream, peer) = listener.accept().unwrap();
            (client, stream, peer)
        };
        let (head_timeout, idle_timeout) = (HEAD_TIMEOUT.get(), IDLE_TIMEOUT.get());
        let connections =
            Connections { open: Mutex::default(), started: Instant::now() - 2 * idle_timeout };
        let (mut clients, start) = (Vec::new(), Instant::now());
        for id in 0..3 {
            let (mut client, stream, peer) = open();
            let connection = connections.insert(id, stream, peer, false, true);
            // The first is idle, the second has part of a head, the third is at work.
            connections.set_idle(&connection, start);
            if id == 1 {
                client.write_all(b"GET / HT").unwrap();
                connection.bytes().received.fill(&connection.stream, true).unwrap();
            }
            if id == 2 {
                connection.set_busy();
            }
            clients.push(client);
        }
        let left = |after: Duration| {
            connections.end_overdue(start + after);
            (0..3).filter(|id| connections.get(*id).is_some()).collect::<Vec<_>>()
        };
        // The second connection's head began slightly after `start`.
        let moment = Duration::from_secs(1);
        assert_eq!(left(head_timeout - moment), [0, 1, 2]);
        assert_eq!(left(head_timeout + moment), [0, 2]);
        // The head of a long idle connection gets the full `HEAD_TIMEOUT`.
        let late = connections.get(0).unwrap();
        clients[0].write_all(b"GET / HT").unwrap();
        late.bytes().received.fill(&late.stream, true).unwrap();
        connections.set_idle(&late, start - idle_timeout);
        assert_eq!(left(moment), [0, 2]);
        late.bytes().received = ReceiveBuffer::default();
        connections.set_idle(&late, start);
        assert_eq!(left(idle_timeout - moment), [0, 2]);
        assert_eq!(left(idle_timeout + moment), [2]);
        assert_eq!(left(100 * idle_timeout), [2]);
    }
}
