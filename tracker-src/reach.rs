//! Whether a node can be reached at the address it asks from, which it cannot see for itself from behind its router.
//!
//! Only that address is ever connected to, so that nobody can have a third party asked; and no more is told of what
//! answers there than whether it is a peerix. That nothing listens, that nothing answers, and that it is another program, is one
//! answer.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// A peer that takes longer to accept and answer is none that a lookup, which takes 2 s in all, would find.
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
