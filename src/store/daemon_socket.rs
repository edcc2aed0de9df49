//! Wakes nix-daemon: the opening of its worker protocol and nothing more
//! (Nix source, `worker-protocol.hh` and `daemon.cc`).
//!
//! The daemon opens its database before it answers, and keeps it open as long as the connection
//! lives. That makes the `-wal` and `-shm` files appear that an unprivileged reader cannot create.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::{
    io::{self, Read, Write},
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

const CLIENT_MAGIC: u64 = 0x6e69_7863;
const DAEMON_MAGIC: u64 = 0x6478_696f;
/// 1.21: old enough for every daemon since Nix 2.0, new enough for today's, and before the version
/// (1.33) from which the daemon adds text of its own to its answer.
const CLIENT_VERSION: u64 = 0x0115;
/// What the daemon sends when it is ready for the first operation.
const READY: u64 = 0x616c_7473;

/// Connects and shakes hands. The daemon keeps its database open until the returned stream is
/// dropped.
///
/// # Errors
/// No daemon, one that does not let this user in, or no answer before the deadline.
pub(super) fn wake(socket: &Path, deadline: Instant) -> io::Result<UnixStream> {
    // A blocking connect waits without a bound while the daemon's backlog is full.
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let descriptor = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&descriptor, &SocketAddrUnix::new(socket)?)?;
    let mut stream = UnixStream::from(descriptor);
    stream.set_nonblocking(false)?;

    send(&mut stream, &[CLIENT_MAGIC], deadline)?;
    if receive(&mut stream, deadline)? != DAEMON_MAGIC {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a nix-daemon"));
    }
    receive(&mut stream, deadline)?; // its version: everything from 1.14 on goes on the same way
    // The version, no CPU affinity, no reserved space.
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
    fn a_daemon_that_answers() {
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
    fn what_is_no_daemon() {
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
    fn a_silent_one_ends_at_the_deadline() {
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
