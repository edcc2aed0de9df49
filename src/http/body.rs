//! Reads a request's body as its `Content-Length` delimits it, up to the limit that the handler
//! sets.

use super::head::Request;
use super::stream::ConnectionStream;
use std::fmt;
use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

/// Base time limit for a body, from the start of [`RequestBody::read`]. The time that the body
/// takes at [`MIN_RATE`] is added: 10 s for 64 KiB, 30 s for 4 MiB. A slower body is an error, and
/// the connection is cut.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// Rate that a body must have after [`BODY_TIMEOUT`], in bytes per second.
pub const MIN_RATE: u64 = 200 * 1024;

/// Bytes allocated at a time. A client that announces a large body and sends nothing costs no more.
const INITIAL_CAPACITY: usize = 64 * 1024;

/// Interim response for a client that sent `Expect: 100-continue` (RFC 9110, section 10.1.1).
const CONTINUE: &[u8] = b"HTTP/1.1 100 Continue\r\n\r\n";

/// The body of one request.
pub struct RequestBody<'a> {
    stream: &'a ConnectionStream,
    /// Bytes received after the head. Bytes after the body belong to the next request.
    received: &'a [u8],
    len: u64,
    is_unread: bool,
    expects: bool,
}

/// Why a body could not be read.
#[derive(Debug)]
pub enum BodyError {
    /// The body is longer than the limit. Nothing of it was read.
    TooLarge,
    /// The connection failed, ended before the body did, or was too slow. No response can be sent.
    Io(io::Error),
}

impl fmt::Display for BodyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            BodyError::TooLarge => f.write_str("body: too large"),
            BodyError::Io(e) => write!(f, "body: {e}"),
        }
    }
}

impl std::error::Error for BodyError {}

impl<'a> RequestBody<'a> {
    pub(super) fn new(
        stream: &'a ConnectionStream,
        request: &Request<'_>,
        received: &'a [u8],
    ) -> Self {
        let expects =
            request.field("Expect").is_some_and(|e| e.eq_ignore_ascii_case("100-continue"));
        RequestBody {
            stream,
            received,
            len: request.body_len,
            is_unread: request.body_len > 0,
            expects,
        }
    }

    pub(super) fn none(stream: &'a ConnectionStream) -> Self {
        RequestBody { stream, received: &[], len: 0, is_unread: false, expects: false }
    }

    /// Whether the request has a body that was not read completely.
    pub(super) fn is_unread(&self) -> bool {
        self.is_unread
    }

    /// Number of bytes received after the head that belong to the body.
    pub(super) fn received_len(&self) -> usize {
        self.len.min(self.received.len() as u64) as usize
    }

    /// Reads the whole body. Returns an empty vector if there is no body or it was already read.
    /// Blocks for at most [`BODY_TIMEOUT`] plus the time that the body takes at [`MIN_RATE`].
    ///
    /// # Errors
    /// [`BodyError::TooLarge`] if the body has more than `limit` bytes; [`BodyError::Io`] if it
    /// does not arrive completely and in time.
    pub fn read(&mut self, limit: usize) -> Result<Vec<u8>, BodyError> {
        if !self.is_unread {
            return Ok(Vec::new());
        }
        let len = usize::try_from(self.len)
            .ok()
            .filter(|len| *len <= limit)
            .ok_or(BodyError::TooLarge)?;
        let deadline =
            Instant::now() + BODY_TIMEOUT + Duration::from_millis(self.len * 1000 / MIN_RATE);
        let mut bytes = Vec::with_capacity(len.min(INITIAL_CAPACITY));
        bytes.extend_from_slice(&self.received[..self.received_len()]);
        if self.expects && bytes.len() < len {
            let mut stream = self.stream;
            stream.write_all(CONTINUE).map_err(BodyError::Io)?;
        }
        while bytes.len() < len {
            self.read_more(&mut bytes, len, deadline).map_err(BodyError::Io)?;
        }
        self.is_unread = false;
        Ok(bytes)
    }

    fn read_more(&self, bytes: &mut Vec<u8>, len: usize, deadline: Instant) -> io::Result<()> {
        let time_left = deadline.saturating_duration_since(Instant::now());
        if time_left.is_zero() {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "came too slowly"));
        }
        self.stream.set_read_timeout(Some(time_left))?;
        let at = bytes.len();
        bytes.resize(len.min(at + INITIAL_CAPACITY), 0);
        let mut stream = self.stream;
        let read = stream.read(&mut bytes[at..]);
        bytes.truncate(at + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::{Handler, Server};
    use super::super::{Exchange, Request};
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::sync::Arc;

    /// Echoes the body if it has at most ten bytes.
    struct Measures;

    impl Handler for Measures {
        fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
            if request.method == "DELETE" {
                return exchange.say(200, "unread");
            }
            match exchange.body().read(10) {
                Ok(body) => exchange.say(200, &format!("[{}]", String::from_utf8_lossy(&body))),
                Err(BodyError::TooLarge) => exchange.say(413, "too large"),
                Err(BodyError::Io(e)) => Err(e),
            }
        }
        fn after_panic(&self, _: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
            exchange.say(500, "panic")
        }
    }

    /// Sends each piece after the response to the one before, or after `100 Continue`, and returns
    /// all that the server sends.
    fn all_answers(pieces: &[&str]) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let _server = Server::start(vec![listener], Arc::new(Measures), || ()).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        let mut all = Vec::new();
        for piece in pieces {
            stream.write_all(piece.as_bytes()).unwrap();
            let mut chunk = [0; 4096];
            let n = stream.read(&mut chunk).unwrap();
            all.extend_from_slice(&chunk[..n]);
        }
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.read_to_end(&mut all).unwrap();
        String::from_utf8(all).unwrap()
    }

    #[test]
    fn pipelined_bodies_are_delimited_by_content_length() {
        let all = all_answers(&[
            "POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nabcPOST / HTTP/1.1\r\nContent-Length: 2\r\n\r\ndeGET / HTTP/1.1\r\n\r\n",
        ]);
        let at = ["[abc]", "[de]", "[]"]
            .map(|body| all.find(body).unwrap_or_else(|| panic!("{body}: {all}")));
        assert!(at.is_sorted() && !all.contains("close"), "{all}");
    }

    #[test]
    fn expect_continue_is_answered_unless_the_body_is_refused() {
        let all = all_answers(&[
            "POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n",
            "abc",
        ]);
        assert!(all.starts_with("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200"), "{all}");
        assert!(all.contains("[abc]"), "{all}");
        // A client whose body is refused gets no `100 Continue`.
        let all =
            all_answers(&["POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 11\r\n\r\n"]);
        assert!(all.starts_with("HTTP/1.1 413") && all.contains("Connection: close"), "{all}");
    }

    #[test]
    fn unread_body_ends_the_connection() {
        let rest = "GET / HTTP/1.1\r\n\r\n";
        for head in
            ["POST / HTTP/1.1\r\nContent-Length: 99", "DELETE / HTTP/1.1\r\nContent-Length: 3"]
        {
            let all = all_answers(&[&format!("{head}\r\n\r\n{rest}")]);
            assert_eq!(all.matches("HTTP/1.1 ").count(), 1, "{all}");
            assert!(all.contains("Connection: close"), "{all}");
        }
        // A body that stays incomplete gets no response.
        let cut = all_answers(&[
            "GET / HTTP/1.1\r\n\r\n",
            "POST / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n",
        ]);
        assert!(cut.ends_with("100 Continue\r\n\r\n"), "{cut}");
    }
}
