//! Writes one response. The head is sent in one write with the first bytes of the body. Files are
//! sent with sendfile(2) where the connection is not encrypted.

use super::body::RequestBody;
use super::send_progress::SendProgress;
use super::stream::ConnectionStream;
use crate::store::NarSink;
use crate::upload_limit::UploadLimit;
use rustix::fs::sendfile;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::sockopt::set_tcp_cork;
use std::borrow::Cow;
use std::cell::RefCell;
use std::io::{self, IoSlice, Write};
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::SystemTime;
use tiny_http::{HTTPVersion, Header, Response, StatusCode};

/// Header fields of a response, as names and values.
pub type HeaderFields = Vec<(&'static str, Cow<'static, str>)>;

/// A complete short response.
pub struct ShortResponse {
    /// The HTTP status code.
    pub status: u16,
    /// Header fields, without those that every response has.
    pub fields: HeaderFields,
    /// The body.
    pub body: Vec<u8>,
}

impl ShortResponse {
    /// Creates a response whose only field here is `Content-Type`.
    pub fn new(status: u16, content_type: &'static str, body: Vec<u8>) -> ShortResponse {
        ShortResponse { status, fields: vec![("Content-Type", content_type.into())], body }
    }

    /// Creates a plain text response of one line.
    pub fn text(status: u16, line: &str) -> ShortResponse {
        ShortResponse::new(status, PLAIN, format!("{line}\n").into())
    }

    /// Appends the response to `out`, or only its head for a HEAD request.
    ///
    /// # Errors
    /// A field's value is not printable ASCII, which no caller passes.
    pub(super) fn print(&self, out: &mut Vec<u8>, head_only: bool) -> io::Result<()> {
        print_head(out, self.status, &self.fields, Some(self.body.len() as u64), false)?;
        if !head_only {
            out.extend_from_slice(&self.body);
        }
        Ok(())
    }
}

/// `Content-Type` of responses in plain text.
const PLAIN: &str = "text/plain; charset=utf-8";

/// One response on one connection. Each write blocks while the client takes nothing, for at most 30
/// s, and then fails. Under an upload limit, it first waits up to 20 s for its turn.
pub struct Exchange<'a> {
    stream: &'a ConnectionStream,
    /// Upload rate limit; `None` for requests from this machine.
    limit: Option<&'a UploadLimit>,
    /// Bytes that the upload limit permits already.
    prepaid: usize,
    head_only: bool,
    close: bool,
    head: Vec<u8>,
    has_begun: bool,
    remaining: u64,
    /// Whether the final chunk is still to be sent.
    in_chunks: bool,
    body: RequestBody<'a>,
}

impl<'a> Exchange<'a> {
    pub(super) fn new(
        stream: &'a ConnectionStream,
        head_only: bool,
        close: bool,
        body: RequestBody<'a>,
    ) -> Self {
        let (limit, head) = (None, Vec::new());
        Exchange {
            stream,
            limit,
            prepaid: 0,
            head_only,
            close,
            head,
            has_begun: false,
            remaining: 0,
            in_chunks: false,
            body,
        }
    }

    /// Sets the upload rate limit.
    pub(super) fn with_limit(self, limit: Option<&'a UploadLimit>) -> Self {
        Exchange { limit, ..self }
    }

    /// How the client takes the response.
    pub(super) fn progress(&self) -> &Arc<SendProgress> {
        self.stream.progress()
    }

    /// The request's body.
    pub fn body(&mut self) -> &mut RequestBody<'a> {
        &mut self.body
    }

    /// Sends a complete response.
    ///
    /// # Errors
    /// The client took nothing for 30 s, or the socket fails.
    pub fn send(
        &mut self,
        status: u16,
        fields: &[(&str, impl AsRef<str>)],
        body: &[u8],
    ) -> io::Result<()> {
        self.begin(status, fields, body.len() as u64)?;
        if !self.head_only { self.write_all(body) } else { Ok(()) }
    }

    /// Sends a plain text response of one line.
    ///
    /// # Errors
    /// As [`Exchange::send`].
    pub fn say(&mut self, status: u16, line: &str) -> io::Result<()> {
        self.answer(&ShortResponse::text(status, line))
    }

    /// Sends a short response.
    ///
    /// # Errors
    /// As [`Exchange::send`].
    pub fn answer(&mut self, answer: &ShortResponse) -> io::Result<()> {
        self.send(answer.status, &answer.fields, &answer.body)
    }

    /// Begins a response with a body of `len` bytes, which the caller then writes to this exchange.
    /// If the body stays shorter, the server cuts the connection, so that the client does not take
    /// it for complete. A longer body is an error of the write.
    ///
    /// # Errors
    /// As [`Exchange::send`].
    pub fn begin(
        &mut self,
        status: u16,
        fields: &[(&str, impl AsRef<str>)],
        len: u64,
    ) -> io::Result<()> {
        self.prepare_head(status, fields, Some(len))?;
        self.remaining = if self.head_only { 0 } else { len };
        if self.remaining == 0 { self.flush_head() } else { Ok(()) }
    }

    /// Begins a response of unknown length, for a client that [understands
    /// chunks](super::Request::knows_chunks). The caller passes the body to [`Exchange::chunk`]. If
    /// the last chunk is missing, the server cuts the connection.
    ///
    /// # Errors
    /// As [`Exchange::send`].
    pub(super) fn begin_chunked(
        &mut self,
        status: u16,
        fields: &[(&str, impl AsRef<str>)],
    ) -> io::Result<()> {
        self.prepare_head(status, fields, None)?;
        self.in_chunks = !self.head_only;
        if self.head_only { self.flush_head() } else { Ok(()) }
    }

    /// Sends part of a chunked body (RFC 9112, section 7.1) in one write, after the head if that is
    /// still unsent, and followed by the final chunk if `is_last`.
    ///
    /// # Errors
    /// As [`Exchange::send`]; also if no chunked response has begun or it has ended.
    pub(super) fn chunk(&mut self, part: &[u8], is_last: bool) -> io::Result<()> {
        if !self.in_chunks {
            return Err(io::Error::other("body longer than promised"));
        }
        if part.is_empty() && !is_last {
            return Ok(());
        }
        let mut bytes = std::mem::take(&mut self.head);
        // An empty chunk would end the body.
        if !part.is_empty() {
            write!(bytes, "{:x}\r\n", part.len())?;
            bytes.extend_from_slice(part);
            bytes.extend_from_slice(b"\r\n");
        }
        if is_last {
            bytes.extend_from_slice(b"0\r\n\r\n");
        }
        let mut stream = self.stream;
        match self.limit {
            Some(limit) => bytes.chunks(limit.piece()).try_for_each(|piece| {
                limit.take(piece.len())?;
                stream.write_all(piece)
            })?,
            None => stream.write_all(&bytes)?,
        }
        self.in_chunks = !is_last;
        Ok(())
    }

    fn prepare_head(
        &mut self,
        status: u16,
        fields: &[(&str, impl AsRef<str>)],
        len: Option<u64>,
    ) -> io::Result<()> {
        self.head.clear();
        print_head(&mut self.head, status, fields, len, self.close || self.body.is_unread())?;
        self.has_begun = true;
        self.remaining = 0;
        self.in_chunks = false;
        Ok(())
    }

    /// Whether the request asks for a body: false for HEAD.
    pub fn wants_body(&self) -> bool {
        !self.head_only
    }

    /// Whether a response has begun.
    pub(super) fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Whether the response was sent completely.
    pub(super) fn is_whole(&self) -> bool {
        self.has_begun && self.remaining == 0 && !self.in_chunks && self.head.is_empty()
    }

    /// Discards a begun response of which nothing was sent yet, so that another one can begin.
    /// Returns false if it is too late.
    pub(super) fn discard_unsent(&mut self) -> bool {
        // The head is unsent until the first bytes of the body are sent.
        let unsent = self.has_begun && !self.head.is_empty();
        if unsent {
            self.head.clear();
            self.has_begun = false;
            self.remaining = 0;
            self.in_chunks = false;
        }
        unsent
    }

    fn flush_head(&mut self) -> io::Result<()> {
        let head = std::mem::take(&mut self.head);
        self.reserve(head.len())?;
        let mut stream = self.stream;
        stream.write_all(&head)
    }

    /// Number of bytes of the body to send at once.
    fn piece(&self, max: usize) -> usize {
        self.limit.map_or(max, |limit| max.min(limit.piece()))
    }

    /// Waits until the upload limit permits `bytes` more bytes.
    fn reserve(&mut self, bytes: usize) -> io::Result<()> {
        let due = bytes.saturating_sub(self.prepaid);
        self.prepaid = self.prepaid.saturating_sub(bytes);
        // Even a reservation of no bytes would wait for those of other connections.
        self.limit.filter(|_| due > 0).map_or(Ok(()), |limit| limit.take(due))
    }

    /// Returns `bytes` that were reserved and not sent, for which the next bytes need not wait.
    fn give_back(&mut self, bytes: usize) {
        self.prepaid += bytes;
    }

    fn count(&mut self, written: usize) -> io::Result<usize> {
        let left = self.remaining.checked_sub(written as u64);
        self.remaining = left.ok_or_else(|| io::Error::other("body longer than promised"))?;
        Ok(written)
    }
}

/// Appends a response head to `out`. Without `len`, the body is chunked.
fn print_head(
    out: &mut Vec<u8>,
    status: u16,
    fields: &[(&str, impl AsRef<str>)],
    len: Option<u64>,
    close: bool,
) -> io::Result<()> {
    begin_head(out, status)?;
    let mut field = |name: &str, value: &str| {
        // A line break in a value would start another field.
        if !value.bytes().all(|b| matches!(b, b' '..=b'~')) {
            return Err(io::Error::other(format!("header {name}: not ASCII")));
        }
        [name, ": ", value, "\r\n"].iter().for_each(|part| out.extend_from_slice(part.as_bytes()));
        Ok(())
    };
    fields.iter().try_for_each(|(name, value)| field(name, value.as_ref()))?;
    match len {
        Some(len) => field("Content-Length", &len.to_string())?,
        None => field("Transfer-Encoding", "chunked")?,
    }
    if close {
        field("Connection", "close")?;
    }
    out.extend_from_slice(b"\r\n");
    Ok(())
}

/// Beginnings of heads that tiny_http made in one second, by status.
#[derive(Default)]
struct HeadCache {
    second: u64,
    heads: Vec<(u16, Vec<u8>)>,
}

/// Appends the status line, `Date` and `Server`, which tiny_http formats. They change once per
/// second and cost as much as the rest of a narinfo response, so each thread caches them.
fn begin_head(out: &mut Vec<u8>, status: u16) -> io::Result<()> {
    thread_local! {
        static BEGUN: RefCell<HeadCache> = RefCell::default();
    }
    BEGUN.with_borrow_mut(|cached| {
        let second =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        if cached.second != second {
            *cached = HeadCache { second, heads: Vec::new() };
        }
        if let Some((_, bytes)) = cached.heads.iter().find(|(of, _)| *of == status) {
            out.extend_from_slice(bytes);
            return Ok(());
        }
        let server = Header::from_bytes("Server", concat!("peerix/", env!("CARGO_PKG_VERSION")))
            .into_iter()
            .collect();
        let mut bytes = Vec::new();
        let response = Response::new(StatusCode(status), server, io::empty(), Some(0), None);
        response.raw_print(&mut bytes, HTTPVersion(1, 1), &[], true, None)?;
        bytes.truncate(bytes.len() - b"Content-Length: 0\r\n\r\n".len());
        out.extend_from_slice(&bytes);
        cached.heads.push((status, bytes));
        Ok(())
    })
}

/// Bytes of a file per call of sendfile(2), as nginx's `sendfile_max_chunk`.
const FILE_PIECE: u64 = 2 << 20;

impl NarSink for Exchange<'_> {
    /// Sends part of a file with sendfile(2). Waits only when the socket's buffer is full. The
    /// socket is corked meanwhile: otherwise the kernel pushes a segment after each 64 KiB of the
    /// file, which costs 50 % more processor time under BBR.
    fn send_file(
        &mut self,
        file: BorrowedFd<'_>,
        mut at: u64,
        len: u64,
    ) -> io::Result<Option<u64>> {
        // TLS needs the bytes in memory to encrypt them.
        if self.stream.key().is_some() {
            return Ok(None);
        }
        if !self.head.is_empty() {
            self.flush_head()?;
        }
        // The result fits a usize on every platform, because `FILE_PIECE` does.
        let max = self.piece(len.min(FILE_PIECE).min(self.remaining) as usize);
        self.reserve(max)?;
        let socket = self.stream.socket();
        // On an error the caller cuts the connection, so the socket's modes need no reset.
        socket.set_nonblocking(true)?;
        set_tcp_cork(socket, true)?;
        let mut sent = Ok(0);
        while let Ok(before) = sent
            && before < max
        {
            sent = match retry_on_intr(|| sendfile(socket, file, Some(&mut at), max - before)) {
                Ok(0) => break,
                Ok(more) => {
                    self.stream.progress().record_taken(more);
                    Ok(before + more)
                }
                Err(Errno::AGAIN) => {
                    self.stream.wait_for_room()?;
                    Ok(before)
                }
                Err(e) => Err(e),
            };
        }
        set_tcp_cork(socket, false)?;
        socket.set_nonblocking(false)?;
        match sent {
            Ok(sent) => {
                self.give_back(max - sent);
                self.count(sent).map(|sent| Some(sent as u64))
            }
            // The file system does not support sendfile(2).
            Err(Errno::INVAL | Errno::NOSYS) => {
                self.give_back(max);
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }
}

impl Write for Exchange<'_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if piece.len() as u64 > self.remaining {
            return Err(io::Error::other("body longer than promised"));
        }
        let piece = &piece[..self.piece(piece.len())];
        let mut stream = self.stream;
        self.reserve(self.head.len() + piece.len())?;
        let mut written = 0;
        if !self.head.is_empty() {
            let parts = [IoSlice::new(&self.head), IoSlice::new(piece)];
            let of_both = stream.write_vectored(&parts)?;
            let head = std::mem::take(&mut self.head);
            written = of_both.saturating_sub(head.len());
            stream.write_all(&head[of_both.min(head.len())..])?;
        }
        if written == 0 {
            written = stream.write(piece)?;
        }
        // The socket, or a TLS record, may take only a part.
        self.give_back(piece.len() - written);
        self.count(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::sockopt::set_socket_send_buffer_size;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn rest_of_partly_sent_piece_does_not_wait_for_upload_limit() {
        let limit = UploadLimit::new(1 << 30);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        set_socket_send_buffer_size(&socket, 4096).unwrap();
        let stream = ConnectionStream::new(socket, false);
        let body = RequestBody::none(&stream);
        let mut exchange = Exchange::new(&stream, false, true, body).with_limit(Some(&limit));
        let piece = vec![7; limit.piece()];
        exchange.begin(200, &[("Content-Type", "x")], 2 * piece.len() as u64).unwrap();
        // The client reads nothing, so the socket takes a part of the piece.
        let written = exchange.write(&piece).unwrap();
        assert!(0 < written && written < piece.len(), "{written}");
        // Other connections reserve more than the longest wait, so any further reservation fails.
        limit.take(30 << 30).unwrap();
        exchange.reserve(piece.len() - written).unwrap();
        assert_eq!(exchange.reserve(1).unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
