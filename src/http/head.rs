//! Reading the head of a request, strictly: what two parsers could understand in two ways is
//! refused.

use super::stream::{AuthenticatedKey, ConnectionStream};
use std::io;
use std::net::SocketAddr;
use std::time::Instant;

/// A head may be so long. Nix's have 200 bytes; 16 KiB leaves room for a proxy's.
pub const MAX_HEAD: usize = 16 * 1024;
/// A head may have so many fields.
const MAX_FIELDS: usize = 64;
/// Room that is made for what comes. A request of Nix fits.
const CHUNK: usize = 4096;

/// One request.
pub struct Request<'a> {
    /// `GET`, `HEAD`, …
    pub method: &'a str,
    /// The request target, as sent.
    pub target: &'a str,
    /// Address of the other end of the connection.
    pub asker: SocketAddr,
    /// The key with which the other end authenticated itself. It is a friend's.
    pub key: Option<AuthenticatedKey>,
    /// Whether a router passed the connection on. The address may then be the router's, and says
    /// nothing.
    pub is_outside: bool,
    fields: &'a [httparse::Header<'a>],
    /// Whether the asker knows chunked bodies: since HTTP/1.1.
    pub knows_chunks: bool,
    /// Whether the connection may be used again, if no body is left unread.
    pub keep_alive: bool,
    /// The length of the body that follows, in bytes.
    pub body_len: u64,
}

impl<'a> Request<'a> {
    /// The same of a connection that comes from outside, or does not.
    pub(super) fn from(self, is_outside: bool) -> Request<'a> {
        Request { is_outside, ..self }
    }
    /// The value of a field, if it is there and is text; the first one if there are several.
    pub fn field(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().find(|f| f.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(field.value).ok()
    }

    /// The value of the last field of that name, which is what the nearest proxy added.
    pub fn last_field(&self, name: &str) -> Option<&str> {
        let field = self.fields.iter().rfind(|f| f.name.eq_ignore_ascii_case(name))?;
        std::str::from_utf8(field.value).ok()
    }

    /// Whether there is such a field, whatever its value.
    pub fn has(&self, name: &str) -> bool {
        self.fields.iter().any(|f| f.name.eq_ignore_ascii_case(name))
    }
}

/// Why a head is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum HeadError {
    /// 431.
    TooLarge,
    /// 400, and why.
    Malformed(&'static str),
}

/// What was received and not yet consumed: part of a head, or the requests that were pipelined
/// behind it.
#[derive(Default)]
pub struct ReceiveBuffer {
    bytes: Vec<u8>,
    scanned: usize,
    began: Option<Instant>,
}

impl ReceiveBuffer {
    /// Takes more of what the other end sends, and says how many bytes came; 0 is the end. Without
    /// `wait`, or after the stream's timeout, nothing is [`io::ErrorKind::WouldBlock`].
    ///
    /// # Errors
    /// The socket's.
    pub(super) fn fill(&mut self, stream: &ConnectionStream, wait: bool) -> io::Result<usize> {
        self.bytes.reserve(CHUNK);
        let came = stream.append_to(&mut self.bytes, wait)?;
        // The end of one connection is not the beginning of a head on another.
        if came > 0 {
            self.began.get_or_insert_with(Instant::now);
        }
        Ok(came)
    }

    /// When the first of it came, unless there is nothing.
    pub fn began(&self) -> Option<Instant> {
        self.began.filter(|_| !self.is_empty())
    }

    /// Gives the memory back if there is nothing in it.
    pub fn shrink(&mut self) {
        if self.is_empty() {
            *self = ReceiveBuffer::default();
        }
    }

    /// Number of bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether it is more than a head may have.
    pub fn is_full(&self) -> bool {
        self.bytes.len() >= MAX_HEAD
    }

    /// The first `len` bytes, and what was received behind them.
    pub fn split(&self, len: usize) -> (&[u8], &[u8]) {
        self.bytes.split_at(len)
    }

    /// Drops the first `len` bytes.
    pub fn consume(&mut self, len: usize) {
        self.bytes.drain(..len);
        self.scanned = 0;
        self.began = (!self.bytes.is_empty()).then(Instant::now);
    }

    /// The length of the head in front, with its blank line.
    pub fn head_len(&mut self) -> Option<usize> {
        let from = self.scanned.saturating_sub(3);
        let end = self.bytes[from..].windows(4).position(|w| w == b"\r\n\r\n");
        // Up to the end that was found, so that it is found again.
        self.scanned = end.map_or(self.bytes.len(), |at| from + at + 3);
        end.map(|at| from + at + 4).filter(|&len| len <= MAX_HEAD)
    }
}

/// Reads a head and hands the request, or why it is refused, to `then`. `key`: what the asker
/// authenticated itself with.
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
            asker,
            key,
            is_outside: false,
            fields,
            knows_chunks,
            keep_alive,
            body_len,
        })
    }))
}

fn check(head: &[u8], parsed: httparse::Result<usize>) -> Result<(), HeadError> {
    // httparse takes a bare LF for a line's end; another parser on the way may not.
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

/// What is served under which name hangs on it. HTTP/1.1 asks for one; who sends none is no
/// browser, and told apart by nobody.
fn check_host(fields: &[httparse::Header<'_>]) -> Result<(), HeadError> {
    let mut hosts = fields.iter().filter(|f| f.name.eq_ignore_ascii_case("host"));
    let host = hosts.next().map_or(&[][..], |f| f.value);
    // RFC 3986: unreserved, percent-encoded, delimiters, brackets of an IPv6 address, and the colon
    // before a port.
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
    fn a_request_of_nix() {
        let head = "GET /x.narinfo HTTP/1.1\r\nHost: 127.0.0.1:12304\r\nUser-Agent: curl/8.13.0 Nix/2.26.3\r\nAccept: */*\r\nrange: bytes=1-\r\n\r\n";
        with(head, |request| {
            let request = request.unwrap();
            assert_eq!((request.method, request.target), ("GET", "/x.narinfo"));
            assert_eq!(request.field("Range"), Some("bytes=1-"));
            assert!(request.keep_alive && request.body_len == 0);
        });
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
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
        // Bytes that are no text used to be taken for no Host at all.
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
    fn when_a_connection_is_not_used_again() {
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
    fn a_head_is_found_however_it_is_cut() {
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
