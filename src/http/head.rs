//! Parses request heads (RFC 9112) strictly: a head that two parsers could read differently is
//! refused.

use super::stream::{AuthenticatedKey, ConnectionStream};
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

/// Largest request head, in bytes. A longer one gets a 431. Nix's have 200 bytes; the rest is room
/// for the fields of proxies.
pub const MAX_HEAD_BYTES: usize = 16 * 1024;
/// Most header fields in a head. A head with more gets a 431.
const MAX_FIELDS: usize = 64;
/// Least free buffer space before a read, in bytes. A request of Nix fits.
const READ_CHUNK_BYTES: usize = 4096;

/// One parsed request head.
pub struct Request<'a> {
    /// `GET`, `HEAD`, …
    pub method: &'a str,
    /// The request target, as sent.
    pub target: &'a str,
    /// Address of the other end of the connection.
    pub peer_address: SocketAddr,
    /// The friend's public key with which the client authenticated itself; `None` without TLS.
    pub key: Option<AuthenticatedKey>,
    /// Whether the connection came through a port that a router forwards. Its address may then be
    /// the router's and proves nothing.
    pub is_outside: bool,
    /// Whether the client is on this machine.
    pub is_own: bool,
    fields: &'a [httparse::Header<'a>],
    /// Whether the client understands chunked bodies, as HTTP/1.1 clients do.
    pub knows_chunks: bool,
    /// Whether the connection can serve another request if the body was read.
    pub keep_alive: bool,
    /// Length of the body that follows, in bytes.
    pub body_len: u64,
}

impl<'a> Request<'a> {
    /// Returns the request with `is_outside` and `is_own` of its connection.
    pub(super) fn with_client(self, is_outside: bool, is_own: bool) -> Request<'a> {
        Request { is_outside, is_own, ..self }
    }

    /// The value of the first field of that name; `None` if there is none or it is not UTF-8.
    pub fn field(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().find(|f| f.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(field.value).ok()
    }

    /// The value of the last field of that name, which the nearest proxy added; `None` if there is
    /// none or it is not UTF-8.
    pub fn last_field(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().rfind(|f| f.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(field.value).ok()
    }

    /// Whether there is a field of that name, whatever its value.
    pub fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|f| f.name.eq_ignore_ascii_case(name))
    }
}

/// Why a head is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum HeadError {
    /// Too long, or too many fields: 431.
    TooLarge,
    /// Malformed or ambiguous: 400, with the reason.
    Malformed(&'static str),
}

/// Bytes received and not yet consumed: part of a head, or a head and what follows it, such as a
/// body or pipelined requests.
#[derive(Default)]
pub struct ReceiveBuffer {
    bytes: Vec<u8>,
    scanned: usize,
    first_byte_at: Option<Instant>,
}

impl ReceiveBuffer {
    /// Reads more bytes and returns their number; 0 means that the other end has closed. Without
    /// `wait` it does not block; otherwise it blocks up to the stream's read timeout.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if nothing arrived in that time; errors of the socket.
    pub(super) fn fill(&mut self, stream: &ConnectionStream, wait: bool) -> io::Result<usize> {
        self.bytes.reserve(READ_CHUNK_BYTES);
        let received = stream.append_to(&mut self.bytes, wait)?;
        // The end of one connection must not start the head of another that uses this buffer next.
        if received > 0 {
            self.first_byte_at.get_or_insert_with(Instant::now);
        }
        Ok(received)
    }

    /// When the first of the buffered bytes arrived; `None` if the buffer is empty.
    pub fn first_byte_at(&self) -> Option<Instant> {
        self.first_byte_at.filter(|_| !self.is_empty())
    }

    /// Frees the memory of an empty buffer.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = ReceiveBuffer::default();
        }
    }

    /// Number of buffered bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether no bytes are buffered.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether at least [`MAX_HEAD_BYTES`] bytes are buffered, so that a head that is still
    /// incomplete is too long.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= MAX_HEAD_BYTES
    }

    /// Splits the buffered bytes after the first `len`. Panics if there are fewer.
    pub fn split(&self, len: usize) -> (&[u8], &[u8]) {
        self.bytes.split_at(len)
    }

    /// Drops the first `len` bytes. Panics if there are fewer. The rest counts as just received.
    pub fn consume(&mut self, len: usize) {
        self.bytes.drain(..len);
        self.scanned = 0;
        self.first_byte_at = (!self.bytes.is_empty()).then(Instant::now);
    }

    /// Length of the first head, with its blank line; `None` if it is incomplete or longer than
    /// [`MAX_HEAD_BYTES`].
    pub fn head_len(&mut self) -> Option<usize> {
        let from = self.scanned.saturating_sub(3);
        let end = self.bytes[from..].windows(4).position(|w| w == b"\r\n\r\n");
        // Stops before the end that was found, so that the next call finds it again.
        self.scanned = end.map_or(self.bytes.len(), |at| from + at + 3);
        end.map(|at| from + at + 4).filter(|&len| len <= MAX_HEAD_BYTES)
    }
}

/// Parses a head and calls `then` with the request or the reason for refusing it. `key` is the key
/// with which the client authenticated itself.
pub fn parse<T>(
    head: &[u8],
    asker: SocketAddr,
    key: Option<AuthenticatedKey>,
    then: impl FnOnce(Result<Request<'_>, HeadError>) -> T,
) -> T {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    then(check(head, request.parse(head)).and_then(|()| {
        let (Some(method), Some(target), Some(minor)) =
            (request.method, request.path, request.version)
        else {
            return Err(HeadError::Malformed("request line incomplete"));
        };
        let body_len = body_length(request.headers)?;
        check_host(request.headers)?;
        let close = request.headers.iter().any(|f| {
            f.name.eq_ignore_ascii_case("connection")
                && f.value.to_ascii_lowercase().windows(5).any(|w| w == b"close")
        });
        let keep_alive = minor == 1 && !close;
        let knows_chunks = minor == 1;
        let fields = request.headers;
        Ok(Request {
            method,
            target,
            peer_address: asker,
            key,
            is_outside: false,
            is_own: false,
            fields,
            knows_chunks,
            keep_alive,
            body_len,
        })
    }))
}

fn check(head: &[u8], parsed: httparse::Result<usize>) -> Result<(), HeadError> {
    // httparse accepts a bare LF as the end of a line; a proxy before this server may not.
    let bare = |i: usize| match head[i] {
        b'\n' => i == 0 || head[i - 1] != b'\r',
        b'\r' => head.get(i + 1) != Some(&b'\n'),
        _ => false,
    };
    if (0..head.len()).any(bare) {
        return Err(HeadError::Malformed("bare CR or LF"));
    }
    match parsed {
        Ok(httparse::Status::Complete(len)) if len == head.len() => Ok(()),
        Ok(_) => Err(HeadError::Malformed("request line missing")),
        Err(httparse::Error::TooManyHeaders) => Err(HeadError::TooLarge),
        Err(_) => Err(HeadError::Malformed("not an HTTP/1.1 request")),
    }
}

fn body_length(fields: &[httparse::Header<'_>]) -> Result<u64, HeadError> {
    let named =
        |name: &'static str| fields.iter().filter(move |f| f.name.eq_ignore_ascii_case(name));
    if named("transfer-encoding").next().is_some() {
        return Err(HeadError::Malformed("Transfer-Encoding"));
    }
    let mut lengths = named("content-length");
    match (lengths.next(), lengths.next()) {
        (None, _) => Ok(0),
        (Some(_), Some(_)) => Err(HeadError::Malformed("two Content-Lengths")),
        (Some(field), None) => {
            let text = std::str::from_utf8(field.value).unwrap_or_default();
            let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            text.parse().ok().filter(|_| digits).ok_or(HeadError::Malformed("Content-Length"))
        }
    }
}

/// Access decisions depend on `Host`, so it must be unambiguous. A request without it is accepted
/// although RFC 9112, section 3.2 requires it in HTTP/1.1: browsers always send it.
fn check_host(fields: &[httparse::Header<'_>]) -> Result<(), HeadError> {
    let mut hosts = fields.iter().filter(|f| f.name.eq_ignore_ascii_case("host"));
    let host = hosts.next().map_or(&[][..], |f| f.value);
    // Characters of an authority (RFC 3986, section 3.2) without user information.
    let may_be = |b: &u8| b.is_ascii_alphanumeric() || b"-._~%!$&'()*+,;=:[]".contains(b);
    match hosts.next() {
        Some(_) => Err(HeadError::Malformed("two Hosts")),
        None if host.iter().all(may_be) => Ok(()),
        None => Err(HeadError::Malformed("Host")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<T>(
        head: impl AsRef<[u8]>,
        then: impl FnOnce(Result<Request<'_>, HeadError>) -> T,
    ) -> T {
        parse(head.as_ref(), "127.0.0.1:1".parse().unwrap(), None, then)
    }

    #[test]
    fn nix_request_is_parsed() {
        let head = "GET /x.narinfo HTTP/1.1\r\nHost: 127.0.0.1:12304\r\nUser-Agent: curl/8.13.0 Nix/2.26.3\r\nAccept: */*\r\nrange: bytes=1-\r\n\r\n";
        with(head, |request| {
            let request = request.unwrap();
            assert_eq!((request.method, request.target), ("GET", "/x.narinfo"));
            assert_eq!(request.field("Range"), Some("bytes=1-"));
            assert!(request.keep_alive && request.body_len == 0);
        });
    }

    #[test]
    fn ambiguous_or_malformed_head_is_refused() {
        for head in [
            "GET / HTTP/1.1\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\n\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
            "GET / HTTP/1.1\r\nA : b\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\rc\r\n\r\n",
            "GET / HTTP/1.1\r\nA: b\0c\r\n\r\n",
            "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: +1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 1, 1\r\n\r\n",
            "POST / HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: localhost\r\nhost:\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: evil.example/\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a@localhost\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: evil localhost\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: ev\u{ef}l.example\r\n\r\n",
            "GET / HTTP/2.0\r\n\r\n",
            "GET /\r\n\r\n",
            "\r\n\r\n",
            "nonsense\r\n\r\n",
        ] {
            with(head, |request| {
                assert!(matches!(request, Err(HeadError::Malformed(_))), "{head:?}");
            });
        }
        // Regression test: a value that is not UTF-8 was treated as a missing Host.
        with(b"GET / HTTP/1.1\r\nHost: ev\xefl.example\r\n\r\n", |request| {
            assert_eq!(request.err(), Some(HeadError::Malformed("Host")));
        });
        for head in ["", "Host:\r\n", "Host: [::1]:12304\r\n", "Host: a_b.example:1\r\n"] {
            with(format!("GET / HTTP/1.1\r\n{head}\r\n"), |request| {
                assert!(request.is_ok(), "{head:?}")
            });
        }
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MAX_FIELDS + 1));
        with(many, |request| assert_eq!(request.err(), Some(HeadError::TooLarge)));
    }

    #[test]
    fn keep_alive_depends_on_version_and_connection_field() {
        for (head, keep, body) in [
            ("GET / HTTP/1.1\r\n\r\n", true, 0),
            ("GET / HTTP/1.0\r\n\r\n", false, 0),
            ("GET / HTTP/1.1\r\nConnection: Close\r\n\r\n", false, 0),
            ("GET / HTTP/1.1\r\nContent-Length: 0\r\n\r\n", true, 0),
            ("PUT / HTTP/1.1\r\nContent-Length: 999999999999\r\n\r\n", true, 999_999_999_999),
        ] {
            with(head, |request| {
                let request = request.unwrap();
                assert_eq!((request.keep_alive, request.body_len), (keep, body), "{head:?}");
            });
        }
    }

    #[test]
    fn head_is_found_for_any_split_of_received_bytes() {
        let two = b"GET /1 HTTP/1.1\r\n\r\nGET /2 HTTP/1.1\r\nA: b\r\n\r\n";
        for cut in 0..two.len() {
            let mut buffer = ReceiveBuffer::default();
            buffer.bytes.extend_from_slice(&two[..cut]);
            if buffer.head_len().is_none() {
                buffer.bytes.extend_from_slice(&two[cut..]);
                assert_eq!(buffer.head_len(), Some(19), "{cut}");
            }
        }
        let mut buffer =
            ReceiveBuffer { bytes: two[..two.len() - 1].to_vec(), ..ReceiveBuffer::default() };
        assert_eq!(buffer.head_len(), Some(19));
        assert_eq!(buffer.head_len(), Some(19), "again");
        buffer.consume(19);
        assert_eq!(buffer.head_len(), None, "part of a pipelined head");
        buffer.bytes.push(b'\n');
        assert_eq!(buffer.head_len(), Some(two.len() - 19));
    }
}
