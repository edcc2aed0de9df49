//! The byte stream of a connection: plain, or TLS after a handshake.
//!
//! The first byte tells the two apart. A TLS handshake record begins with 0x16, which no HTTP
//! request does.

use super::send_progress::{SendProgress, WRITE_TIMEOUT};
use crate::lock::Mutex;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, recv, sendmsg};
use rustls::{ServerConfig, ServerConnection};
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, OnceLock};
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
    progress: Arc<SendProgress>,
    tls: OnceLock<Box<TlsStream>>,
}

struct TlsStream {
    /// Locked only by the connection's current owner, so never contended.
    session: Mutex<ServerConnection>,
    key: AuthenticatedKey,
}

impl ConnectionStream {
    /// Wraps a blocking socket. `has_min_rate` says that the client has to take what it is sent at
    /// a least rate.
    pub(super) fn new(socket: TcpStream, has_min_rate: bool) -> Self {
        let progress = Arc::new(SendProgress::new(has_min_rate));
        ConnectionStream { socket, progress, tls: OnceLock::new() }
    }

    /// The socket. After a TLS handshake, its bytes are TLS records.
    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// How the client takes what it is sent.
    pub(super) fn progress(&self) -> &Arc<SendProgress> {
        &self.progress
    }

    /// Waits until the client takes some bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if it takes nothing for [`WRITE_TIMEOUT`], takes too little, or
    /// has to give way to others.
    pub(super) fn wait_for_room(&self) -> io::Result<()> {
        self.progress.wait_for_room(|time| {
            let time =
                Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
            let mut polled = [PollFd::new(&self.socket, PollFlags::OUT)];
            Ok(retry_on_intr(|| poll(&mut polled, Some(&time)))? > 0)
        })
    }

    /// Sends the first bytes of `parts` to the socket, as many as its buffer takes, and returns
    /// their number. Blocks while the buffer is full, as [`ConnectionStream::wait_for_room`] does.
    fn send(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        loop {
            let mut control = SendAncillaryBuffer::default();
            match retry_on_intr(|| sendmsg(&self.socket, parts, &mut control, flags)) {
                Err(Errno::AGAIN) => self.wait_for_room()?,
                Err(e) => return Err(e.into()),
                Ok(sent) => {
                    self.progress.record_taken(sent);
                    return Ok(sent);
                }
            }
        }
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
    /// socket. Blocks until `deadline`, and for at most one [`WRITE_TIMEOUT`] more.
    ///
    /// # Errors
    /// The socket or the handshake fails, the handshake takes too long, or the client presents no
    /// ed25519 key.
    pub(super) fn accept_tls(
        &self,
        config: Arc<ServerConfig>,
        mut received: &[u8],
        deadline: Instant,
    ) -> io::Result<()> {
        let mut session = ServerConnection::new(config).map_err(io::Error::other)?;
        let result = self.complete_handshake(&mut session, &mut received, deadline);
        // After a failure, the remaining record is an alert with the reason.
        let sent = send_records(&mut session, self, deadline);
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
        deadline: Instant,
    ) -> io::Result<()> {
        while session.is_handshaking() {
            send_records(session, self, deadline)?;
            let count = if received.is_empty() {
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                self.socket.set_read_timeout(Some(left))?;
                session.read_tls(&mut &self.socket)?
            } else {
                session.read_tls(received)?
            };
            if count == 0 {
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
                recv(&self.socket, spare_capacity(buffer), flags).map(|(received, _)| received)
            })?);
        }
        let (at, room) = (buffer.len(), buffer.capacity());
        buffer.resize(room, 0);
        let received = (&mut &*self).read(&mut buffer[at..]);
        buffer.truncate(at + *received.as_ref().unwrap_or(&0));
        received
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
    fn read(&self, stream: &ConnectionStream, buffer: &mut [u8]) -> io::Result<usize> {
        let mut session = self.session.lock();
        loop {
            match session.reader().read(buffer) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                read => return read,
            }
            match session.read_tls(&mut &stream.socket) {
                Ok(0) => return Ok(0),
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            }
            session.process_new_packets().map_err(io::Error::other)?;
            // TLS may have to respond, for example to a key update.
            send_records(&mut session, stream, Instant::now() + WRITE_TIMEOUT.get())?;
        }
    }

    fn write(&self, stream: &ConnectionStream, bytes: &[u8]) -> io::Result<usize> {
        let mut session = self.session.lock();
        let taken = session.writer().write(&bytes[..bytes.len().min(TLS_PIECE)])?;
        send_records(&mut session, stream, Instant::now() + WRITE_TIMEOUT.get())?;
        Ok(taken)
    }
}

/// Sends pending TLS records. Blocks until `deadline`, and for at most one [`WRITE_TIMEOUT`] more.
fn send_records(
    session: &mut ServerConnection,
    stream: &ConnectionStream,
    deadline: Instant,
) -> io::Result<()> {
    while session.wants_write() {
        session.write_tls(&mut RecordWriter(stream))?;
        if session.wants_write() && Instant::now() >= deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    Ok(())
}

/// Writes TLS records to the socket.
struct RecordWriter<'a>(&'a ConnectionStream);

impl Write for RecordWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(&[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.send(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the key in an ed25519 SubjectPublicKeyInfo (RFC 8410): the last 32 of 44 bytes. The
/// check of the handshake's signature has verified the algorithm.
fn key_of(info: &[u8]) -> Option<AuthenticatedKey> {
    info.last_chunk().copied().filter(|_| info.len() == 44)
}

impl Read for &ConnectionStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.read(self, buffer),
            None => (&self.socket).read(buffer),
        }
    }
}

impl Write for &ConnectionStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.tls.get() {
            Some(tls) => tls.write(self, bytes),
            None => self.send(&[IoSlice::new(bytes)]),
        }
    }

    fn write_vectored(&mut self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self.tls.get() {
            // Send the head and the beginning of the body in one record.
            Some(tls) => {
                let mut all: Vec<u8> =
                    Vec::with_capacity(TLS_PIECE.min(parts.iter().map(|part| part.len()).sum()));
                for part in parts {
                    all.extend_from_slice(&part[..part.len().min(TLS_PIECE - all.len())]);
                }
                tls.write(self, &all)
            }
            None => self.send(parts),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
