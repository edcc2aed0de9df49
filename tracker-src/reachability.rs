//! Tests whether a node accepts connections at its announced address. A node behind a router cannot
//! test that itself.
//!
//! `GET /reach` only connects to the client's own address. Threads test announced addresses, at
//! most at the rates of [`peerix::connect_rate`], as anyone can announce any address. The result
//! only tells whether a peerix answers: a closed port, no answer, and another program give the same
//! result.

use crate::address;
use crate::table::TrackerTable;
use crossbeam_channel::{Receiver, Sender, bounded};
use peerix::connect_rate::{ConnectDecision, ConnectRate};
use peerix::lock::Mutex;
use peerix::resolver::{NameResolver, parse_address};
use peerix::wire::tracker::can_be_peer;
use scopeguard::defer;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Maximum time for connection and answer. A lookup takes at most 2 s in all, so it could not use a
/// slower peer.
const TEST_TIMEOUT: Duration = Duration::from_secs(2);

/// Maximum bytes of the answer that are read. A peerix sends about 300.
const MAX_ANSWER_BYTES: usize = 2048;

/// Number of threads that test announced addresses. A test takes at most 2 s each for the host
/// name, the rate limit and the connection.
const THREADS: usize = 8;

/// Maximum number of addresses that wait for a test. At the bound, a peer is tested after a later
/// announce.
const MAX_WAITING: usize = 4096;

/// Maximum wait for the address of a host name. After it, the address is not tested: peers with
/// slow names would otherwise block the threads.
const NAME_TIMEOUT: Duration = Duration::from_secs(2);

/// Pause before another attempt, if the rate limit does not allow the connection yet.
const RATE_RETRY_PAUSE: Duration = Duration::from_millis(100);
/// Maximum number of such attempts. At the bound, the address is not tested: peers with many ports
/// of one address would otherwise block the threads.
const MAX_RATE_TRIES: u32 = 20;

/// Maximum number of clients that are tested at once, each of which blocks a thread of the server;
/// one per household. Further ones are refused.
const MAX_CLIENT_TESTS: usize = 16;

/// An announced address that is to be tested.
pub struct AnnouncedAddress {
    /// The peer's ID.
    pub id: String,
    /// Address or host name of its HTTP server.
    pub addr: String,
    /// TCP port of its HTTP server.
    pub port: u16,
}

/// Why a client's own address is not tested now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientTestRefusal {
    /// A client of the same household is being tested.
    SameHousehold,
    /// Too many clients are being tested.
    TooMany,
}

/// Tests announced addresses and those of clients. The threads end when it is dropped.
pub struct ReachabilityTester {
    announced: Sender<AnnouncedAddress>,
    /// Households (see [`address::limit_key`]) whose clients are being tested.
    households: Mutex<Vec<u128>>,
}

impl ReachabilityTester {
    /// Requests a test of an announced address. Does not block. If too many are waiting, the
    /// address is not tested until a later announce.
    pub fn request_test(&self, announced: AnnouncedAddress) {
        let _ = self.announced.try_send(announced);
    }

    /// Returns whether a peerix answers at the client's address. Blocks for at most 2 s. The reason
    /// why none does is only logged: other machines behind the same address could scan their
    /// router's ports by it.
    ///
    /// # Errors
    /// Returns why the address is not tested.
    pub fn test_client(&self, client: SocketAddr) -> Result<bool, ClientTestRefusal> {
        let household = address::limit_key(client.ip());
        {
            let mut households = self.households.lock();
            if households.contains(&household) {
                return Err(ClientTestRefusal::SameHousehold);
            }
            if households.len() >= MAX_CLIENT_TESTS {
                return Err(ClientTestRefusal::TooMany);
            }
            households.push(household);
        }
        defer!(self.households.lock().retain(|other| *other != household));
        let reached = test(client);
        if let Err(e) = &reached {
            log::debug!("{}: port {} is not reached: {e}", client.ip(), client.port());
        }
        Ok(reached.is_ok())
    }
}

/// Starts the threads, which write their results into `table` and find host names by `names`.
/// `on_end` runs when a thread ends, even by a panic.
///
/// # Errors
/// A thread cannot be started.
pub fn start(
    table: &Arc<TrackerTable>,
    names: NameResolver,
    on_end: impl Fn() + Clone + Send + 'static,
) -> io::Result<ReachabilityTester> {
    let (announced, waiting) = bounded(MAX_WAITING);
    let connect_rate = Arc::new(Mutex::new(ConnectRate::default()));
    let names = Arc::new(names);
    for _ in 0..THREADS {
        let (table, names, waiting, connect_rate, on_end) =
            (table.clone(), names.clone(), waiting.clone(), connect_rate.clone(), on_end.clone());
        thread::Builder::new().name("reach".into()).spawn(move || {
            defer!(on_end());
            test_announced(&table, &names, &waiting, &connect_rate);
        })?;
    }
    Ok(ReachabilityTester { announced, households: Mutex::default() })
}

fn test_announced(
    table: &TrackerTable,
    names: &Arc<NameResolver>,
    waiting: &Receiver<AnnouncedAddress>,
    connect_rate: &Mutex<ConnectRate>,
) {
    for AnnouncedAddress { id, addr, port } in waiting {
        let ip = match parse_address(&addr) {
            Some(ip) => Some(ip).filter(|ip| can_be_peer(*ip)),
            None => {
                let found = names.addresses(&[&addr], Instant::now() + NAME_TIMEOUT).pop();
                // The result stays unknown, which ranks behind peers that are reachable.
                let Some(found) = found.flatten() else { continue };
                found
            }
        };
        let Some(ip) = ip else {
            table.set_reachable(&id, (&addr, port), false);
            continue;
        };
        let address = SocketAddr::new(ip, port);
        let decide = || connect_rate.lock().take(address.ip(), Instant::now());
        if !(0..MAX_RATE_TRIES).any(|_| {
            let is_allowed = decide() == ConnectDecision::Now;
            if !is_allowed {
                thread::sleep(RATE_RETRY_PAUSE);
            }
            is_allowed
        }) {
            continue;
        }
        let reached = test(address);
        if let Err(e) = &reached {
            log::debug!("{id} is not reached at {address}: {e}");
        }
        table.set_reachable(&id, (&addr, port), reached.is_ok());
    }
}

/// Requests `/nix-cache-info`, which every peerix serves to everyone. Blocks for at most 2 s.
///
/// # Errors
/// No connection, no answer in time, or an answer of another program.
fn test(node: SocketAddr) -> io::Result<()> {
    let deadline = Instant::now() + TEST_TIMEOUT;
    let mut stream = TcpStream::connect_timeout(&node, TEST_TIMEOUT)?;
    stream.set_write_timeout(Some(TEST_TIMEOUT))?;
    stream.write_all(b"GET /nix-cache-info HTTP/1.1\r\nHost: peer\r\nConnection: close\r\n\r\n")?;
    let (mut answer, mut length) = ([0; MAX_ANSWER_BYTES], 0);
    // Does not wait for the end of the connection, which a server may keep open.
    while !answer[..length].windows(9).any(|window| window == b"StoreDir:") {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut answer[length..])? {
            // The answer has ended, or is longer than that of a peerix.
            0 => return Err(io::Error::other("what answers there is no peerix")),
            read => length += read,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::TrackerTime;
    use crate::table::PeerAddress;

    /// Guards against peers whose name servers do not answer, and which block all threads.
    #[test]
    fn slow_names_do_not_block_tests_of_other_addresses() {
        let (release, released) = bounded::<()>(0);
        let names = NameResolver::new(move |name| {
            if name.starts_with("slow") {
                let _ = released.recv();
            }
            Vec::new()
        });
        let table = Arc::new(TrackerTable::new(TrackerTime::now(), 1 << 20));
        let tester = start(&table, names, || {}).unwrap();
        let reachable = |addr: &str| {
            let from = [203, 0, 113, 1].into();
            let at = PeerAddress { addr: addr.into(), port: 1, from };
            table.announce(addr, at, None, None, None, TrackerTime::now()).unwrap().reachable
        };
        // One name fewer than are resolved at once.
        for n in 0..2 * THREADS {
            let addr = format!("slow{}.example", n % (THREADS - 1));
            reachable(&addr);
            tester.request_test(AnnouncedAddress { id: addr.clone(), addr, port: 1 });
        }
        let addr = String::from("none.example");
        reachable(&addr);
        tester.request_test(AnnouncedAddress { id: addr.clone(), addr, port: 1 });
        let deadline = Instant::now() + Duration::from_secs(60);
        while reachable("none.example").is_none() {
            assert!(Instant::now() < deadline, "it is not tested");
            thread::sleep(RATE_RETRY_PAUSE);
        }
        assert_eq!(reachable("slow0.example"), None, "which is not known");
        drop(release);
    }
}
