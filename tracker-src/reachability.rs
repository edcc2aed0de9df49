//! Whether a node can be reached where it says that it is, which it cannot see for itself from
//! behind its router.
//!
//! `GET /reach` connects to no address but the asker's. Announced addresses are tried by threads of
//! their own, no faster than [`peerix::connect_rate`] allows: anybody can announce any address. No more is
//! told of what answers there than whether it is a peerix. That nothing listens, that nothing
//! answers, and that it is another program, is one answer.

use crate::table::TrackerTable;
use crossbeam_channel::{Receiver, Sender, bounded};
use peerix::connect_rate::{ConnectDecision, ConnectRate};
use peerix::deferred::Deferred;
use peerix::wire::tracker::can_be_peer;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Threads that try announced addresses. Each try takes 2 s at most, and a name server's time.
const THREADS: usize = 8;

/// Announced addresses that wait to be tried. Beyond, a peer is tried after its next announce that
/// is due.
const MAX_WAITING: usize = 4096;

/// An address that may not be tried yet is tried after this: one of another peer's was a moment
/// ago.
const PACE_PAUSE: Duration = Duration::from_millis(100);
/// And so often: whoever announces the ports of one address keeps a thread from the others for 2 s.
const PACE_TRIES: u32 = 20;

/// An announced address.
pub struct AnnouncedAddress {
    /// The peer's ID.
    pub id: String,
    /// Address or host name.
    pub addr: String,
    /// TCP.
    pub port: u16,
}

/// Starts the threads, which tell the table what they find until the sender that is returned is
/// dropped. `on_end` runs when one ends, for whatever reason.
///
/// # Errors
/// No thread to be had.
pub fn start(
    table: &Arc<TrackerTable>,
    on_end: impl Fn() + Clone + Send + 'static,
) -> io::Result<Sender<AnnouncedAddress>> {
    let (announced, waiting) = bounded(MAX_WAITING);
    let pace = Arc::new(Mutex::new(ConnectRate::default()));
    for _ in 0..THREADS {
        let (table, waiting, pace, on_end) =
            (table.clone(), waiting.clone(), pace.clone(), on_end.clone());
        thread::Builder::new().name("reach".into()).spawn(move || {
            let _end = Deferred::new(on_end);
            try_announced(&table, &waiting, &pace);
        })?;
    }
    Ok(announced)
}

fn try_announced(
    table: &TrackerTable,
    waiting: &Receiver<AnnouncedAddress>,
    pace: &Mutex<ConnectRate>,
) {
    for AnnouncedAddress { id, addr, port } in waiting {
        let found = (&*addr, port)
            .to_socket_addrs()
            .ok()
            .and_then(|mut all| all.find(|at| can_be_peer(at.ip())));
        let Some(at) = found else {
            table.set_reachable(&id, (&addr, port), false);
            continue;
        };
        let take =
            || pace.lock().unwrap_or_else(PoisonError::into_inner).take(at.ip(), Instant::now());
        if !(0..PACE_TRIES).any(|_| {
            let may = take() == ConnectDecision::Now;
            if !may {
                thread::sleep(PACE_PAUSE);
            }
            may
        }) {
            // Not known, which ranks behind those that are reached.
            continue;
        }
        let reached = ask(at);
        if let Err(e) = &reached {
            log::debug!("{id} is not reached at {at}: {e}");
        }
        table.set_reachable(&id, (&addr, port), reached.is_ok());
    }
}

/// A peer that takes longer to accept and answer is none that a lookup, which takes 2 s in all,
/// would find.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Its answer has 300 bytes.
const MAX_ANSWER: usize = 2048;

/// Asks for `/nix-cache-info`, which every peerix tells everybody.
///
/// # Errors
/// No connection, no answer in time, or another program's.
pub fn ask(node: SocketAddr) -> io::Result<()> {
    let until = Instant::now() + TIMEOUT;
    let mut stream = TcpStream::connect_timeout(&node, TIMEOUT)?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    stream.write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: peer\r\nConnection: close\r\n\r\n")?;
    let (mut answer, mut length) = ([0; MAX_ANSWER], 0);
    // Whoever keeps the connection open has said it by then.
    while !answer[..length].windows(9).any(|window| window == b"StoreDir:") {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut answer[length..])? {
            // Its end, or more than a peerix says.
            0 => return Err(io::Error::other("what answers there is no peerix")),
            read => length += read,
        }
    }
    Ok(())
}
