//! The byte stream of a connection: plain, or TLS after a handshake.
//!
//! The first byte tells the two apart. A TLS handshake record begins with 0x16, which no HTTP
//! request does.

use super::response::WRITE_TIMEOUT;
use rustix::buffer::spare_capacity;
use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, recv};
use rustls::{ServerConfig, ServerConnection};
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// First byte of a TLS handshake record (RFC 8446, section 5.1).
const HANDSHAKE_RECORD: u8 = 0x16;

/// Bytes that are encrypted at once. It bounds the encrypted bytes that wait in memory.
const TLS_PIECE: usize = 64 * 1024;

/// An ed25519 public key with which the other end of a connection authenticated itself.
pub type AuthenticatedKey = [u8; 32];

/// The byte stream of a connection.
pub struct ConnectionStream {
    socket: TcpStream,
    tls: OnceLock<Box<TlsStream>>,
}

struct TlsStream {
    /// Locked only by the connection's current owner, so never contended.
    session: Mutex<ServerConnection>,
    key: AuthenticatedKey,
}

impl From<TcpStream> for ConnectionStream {
    fn from(socket: TcpStream) -> Self {
        ConnectionStream { socket, tls: OnceLock::new() }
    }
}

impl ConnectionStream {
    /// The socket. After a TLS handshake, its bytes are TLS records.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// The key with which the other end authenticated itself; `None` without TLS.
    pub(super) fn key(&self) -> Option<&AuthenticatedKey> {
        self.tls.get().map(|tls| &tls.key)
    }

    /// Whether these first bytes of a connection begin a TLS handshake.
    pub(super) fn begins_tls(first: &[u8]) -> bool {
        first.first() == Some(&HANDSHAKE_RECORD)
    }

    /// Performs the server's side of a TLS handshake. `received` are bytes already read from the
    /// socket. Blocks until `until`, and for at most one write timeout of the socket more.
    ///
    /// # Errors
    /// The socket or the handshake fails, the handshake takes too long, or the client presents no
    /// ed25519 key.
    pub(super) fn accept_tls(
        &self,
        config: Arc<ServerConfig>,
        mut received: &[u8],
        until: Instant,
    ) -> io::Result<()> {
        let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
        let result = self.complete_handshake(&mut session, &mut received, until);
        // After a failure, the remaining record is an alert with the reason.
        let sent = send_records(&mut session, &self.socket, until);
        result?;
        sent?;
        let raw_key =
            session.peer_certificates().and_then(|keys| keys.first()).and_then(|key| key_of(key));
        let key = raw_key.ok_or_else(|| io::Error::other("no ed25519 key"))?;
        let tls = TlsStream { session: Mutex::new(session), key };
        self.tls.set(Box::new(tls)).map_err(|_| io::Error::other("a second handshake"))
    }

    fn complete_handshake(
        &self,
        session: &mut ServerConnection,
        received: &mut &[u8],
        until: Instant,
    ) -> io::Result<()> {
        while session.is_handshaking() {
            send_records(session, &self.socket, until)?;
            let came = if received.is_empty() {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                self.socket.set_read_timeout(Some(left))?;
                session.read_tls(&mut &self.socket)?
            } else {
                session.read_tls(received)?
            };
            if came == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            session.process_new_packets().map_err(io::Error::other)?;
        }
        // The client may have sent its first request with its last handshake message.
        while !received.is_empty() {
            session.read_tls(received)?;
            session.process_new_packets().map_err(io::Error::other)?;
        }
        Ok(())
    }

    /// Reads into the spare capacity of `buffer`, which must not be empty, and returns the number
    /// of bytes; 0 means that the other end has closed. A plain stream does not block without
    /// `wait`. Otherwise this blocks up to the read timeout.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing arrived in that time; errors of the socket; invalid
    /// TLS records.
    pub(super) fn append_to(&self, buffer: &mut Vec<u8>, wait: bool) -> io::Result<usize> {
        if self.tls.get().is_none() {
            let flags = if wait { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
            return Ok(retry_on_intr(|| {
                recv(&self.socket, spare_capacity(buffer), flags).map(|(came, _)| came)
            })?);
        }
        let (at, room) = (buffer.len(), buffer.capacity());
        buffer.resize(room, 0);
        let came = (&mut &*self).read(&mut buffer[at..]);
        buffer.truncate(at + *came.as_ref().unwrap_or(&0));
        came
    }

    /// Sets the time after which a blocking read fails; `None` is no limit.
    ///
    /// # Errors
    /// The timeout is zero, or the socket fails.
    pub(super) fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_read_timeout(timeout)
    }
}

impl TlsStream {
    fn session(&self) -> MutexGuard<'_, ServerConnection> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, socket: &TcpStream, buffer: &mut [u8]) -> io::Result<usize> {
        let mut session = self.session();
        loop {
            match session.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            match session.read_tls(&mut &*socket) {
                Ok(0) => return Ok(0),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            session.process_new_packets().map_err(io::Error::other)?;
            // TLS may have to respond, for example to a key update.
            send_records(&mut session, socket, Instant::now() + WRITE_TIMEOUT.get())?;
        }
    }

    fn write(&self, socket: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
        let mut session = self.session();
        let taken = session.writer().write(&bytes[..bytes.len().min(TLS_PIECE)])?;
        send_records(&mut session, socket, Instant::now() + WRITE_TIMEOUT.get())?;
        Ok(taken)
    }
}

/// Sends pending TLS records. Blocks until `until`, and for at most one write timeout of the socket
/// more.
fn send_records(
    session: &mut ServerConnection,
    socket: &TcpStream,
    until: Instant,
) -> io::Result<()> {
    while session.wants_write() {
        match session.write_tls(&mut &*socket) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(e) => return Err(e),
            Ok(_) if session.wants_write() && Instant::now() >= until => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Returns the key in an ed25519 SubjectPublicKeyInfo (RFC 8410): the last 32 of 44 bytes. The
/// check of the handshake's signature has verified the algorithm.
fn key_of(info: &[u8]) -> Option<AuthenticatedKey> {
    info.last_chunk().copied().filter(|_| info.len() == 44)
}

impl Read for &ConnectionStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.read(&self.socket, buffer),
            None => (&self.socket).read(buffer),
        }
    }
}

impl Write for &ConnectionStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.write(&self.socket, bytes),
            None => (&self.socket).write(bytes),
        }
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self.tls.get() {
            // Send the head and the beginning of the body in one record.
            Some(tls) => {
                let mut all: Vec<u8> =
                    Vec::with_capacity(TLS_PIECE.min(parts.iter().map(|part| part.len()).sum()));
                for part in parts {
                    all.extend_from_slice(&part[..part.len().min(TLS_PIECE - all.len())]);
                }
                tls.write(&self.socket, &all)
            }
            None => (&self.socket).write_vectored(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
