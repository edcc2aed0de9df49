//! Wakes nix-daemon by the handshake of its worker protocol and nothing more (Nix source,
//! `worker-protocol.hh` and `daemon.cc`).
//!
//! The daemon opens its database before it answers, and keeps it open for the life of the
//! connection. SQLite then creates the `-wal` and `-shm` files, which an unprivileged reader cannot
//! create.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const DAEMON_MAGIC: u64 = 0x6478_696f;
/// Protocol version 1.21. Every daemon since Nix 2.0 and every current one supports it, and it is
/// below 1.33, from which on the daemon adds its own version string to the answer.
const CLIENT_VERSION: u64 = 0x0115;
/// The daemon sends this word when it is ready for the first operation.
const READY: u64 = 0x616c_7473;

/// Connects to nix-daemon and shakes hands. The daemon keeps its database open until the returned
/// stream is dropped. Blocks until `deadline` at the latest.
///
/// # Errors
/// No daemon, one that refuses this user, one whose backlog is full, or no answer by `deadline`.
pub(super) fn wake(socket: &Path, deadline: Instant) -> io::Result<UnixStream> {
    // Without NONBLOCK, connect would block without bound while the daemon's backlog is full.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let descriptor = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&descriptor, &SocketAddrUnix::new(socket)?)?;
    let mut stream = UnixStream::from(descriptor);
    stream.set_nonblocking(false)?;

    send(&mut stream, &[CLIENT_MAGIC], deadline)?;
    if receive(&mut stream, deadline)? != DAEMON_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a nix-daemon"));
    }
    receive(&mut stream, deadline)?; // its version; from 1.14 on the handshake is the same
    // This client's version, no CPU affinity, no reserved space.
    send(&mut stream, &[CLIENT_VERSION, 0, 0], deadline)?;
    if receive(&mut stream, deadline)? != READY {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "nix-daemon refused the connection",
        ));
    }
    Ok(stream)
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

fn send(stream: &mut UnixStream, words: &[u64], deadline: Instant) -> io::Result<()> {
    stream.set_write_timeout(Some(left(deadline)?))?;
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&bytes)
}

fn receive(stream: &mut UnixStream, deadline: Instant) -> io::Result<u64> {
    let mut word = [0; 8];
    let mut filled = 0;
    while filled < word.len() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut word[filled..]) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(u64::from_le_bytes(word))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::fixture::TempDir;
    use std::{os::unix::net::UnixListener, thread};

    fn served_by(answer: fn(UnixStream)) -> io::Result<UnixStream> {
        let dir = TempDir::new();
        let socket = dir.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let daemon = thread::spawn(move || answer(listener.accept().unwrap().0));
        let result = wake(&socket, Instant::now() + Duration::from_secs(5));
        daemon.join().unwrap();
        result
    }

    #[test]
    fn handshake_with_daemon_succeeds() {
        served_by(|mut stream| {
            let mut hello = [0; 8];
            stream.read_exact(&mut hello).unwrap();
            assert_eq!(&hello, b"cxin\0\0\0\0");
            stream.write_all(b"oixd\0\0\0\0\x21\x01\0\0\0\0\0\0").unwrap();
            let mut rest = [0; 24];
            stream.read_exact(&mut rest).unwrap();
            assert_eq!(&rest, b"\x15\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
            stream.write_all(b"stla\0\0\0\0").unwrap();
        })
        .unwrap();
    }

    #[test]
    fn wake_without_daemon_fails() {
        assert!(served_by(drop).is_err());
        assert!(
            served_by(|mut stream| stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap())
                .is_err()
        );
        assert!(
            wake(Path::new("/nonexistent/socket"), Instant::now() + Duration::from_secs(5))
                .is_err()
        );
        assert!(
            wake(Path::new(&"/x".repeat(200)), Instant::now() + Duration::from_secs(5)).is_err()
        );
    }

    #[test]
    fn silent_daemon_fails_at_deadline() {
        let dir = TempDir::new();
        let socket = dir.path().join("socket");
        let _listener = UnixListener::bind(&socket).unwrap();
        let error = wake(&socket, Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert!(
            matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
            "{error}"
        );
    }
}
