//! The subset of HTTP/1.1 that the tests need, as a client and as a server.

use super::{DEADLINE, lan::Host, thread};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// The answer of a server.
#[derive(Debug)]
pub struct Answer {
    /// Status code.
    pub status: u16,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// The received part of the body.
    pub body: Vec<u8>,
    /// Whether the body is complete, by `Content-Length` or the last chunk.
    pub whole: bool,
}

impl Answer {
    /// The value of the first header with this lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A client connection that stays open between requests.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Wraps a connection. Reads and writes time out after [`DEADLINE`].
    pub fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    /// Sends a `GET` and returns the answer.
    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.ask("GET", path, "")
    }

    /// Sends a request without a body. Each line of `headers` ends in CR LF.
    pub fn ask(&mut self, method: &str, path: &str, headers: &str) -> io::Result<Answer> {
        self.send(
            format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n").as_bytes(),
        )?;
        self.answer(method != "HEAD")
    }

    /// Sends a request with a body. Each line of `headers` ends in CR LF.
    pub fn request_with_body(
        &mut self,
        method: &str,
        path: &str,
        headers: &str,
        body: &[u8],
    ) -> io::Result<Answer> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        );
        self.send(&[head.as_bytes(), body].concat())?;
        self.answer(true)
    }

    /// Sends raw bytes.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Waits until the first bytes of an answer arrive.
    pub fn wait_for_answer(&mut self) -> io::Result<()> {
        self.stream.fill_buf().map(drop)
    }

    /// Reads and discards until the server closes the connection or `done` returns true.
    pub fn drain(&mut self, done: impl Fn() -> bool) -> io::Result<()> {
        while !done() {
            let length = self.stream.fill_buf()?.len();
            if length == 0 {
                break;
            }
            self.stream.consume(length);
        }
        Ok(())
    }

    /// Reads one answer. `body` is false after a `HEAD`, whose answer has no body.
    pub fn answer(&mut self, body: bool) -> io::Result<Answer> {
        let head = read_head(&mut self.stream)?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let status = head.first.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or(io::ErrorKind::InvalidData)?;
        let mut answer = Answer { status, headers: head.headers, body: Vec::new(), whole: true };
        if !body || status == 304 {
            return Ok(answer);
        }
        if answer.header("transfer-encoding") == Some("chunked") {
            answer.whole = read_chunks(&mut self.stream, &mut answer.body).is_ok();
        } else {
            let length =
                answer.header("content-length").and_then(|length| length.parse::<u64>().ok());
            let wanted = length.unwrap_or(u64::MAX);
            let read = (&mut self.stream).take(wanted).read_to_end(&mut answer.body);
            answer.whole = read.is_ok() && (length.is_none() || answer.body.len() as u64 == wanted);
        }
        Ok(answer)
    }
}

/// Sends one `GET` from `host` on a new connection.
pub fn get(host: &Host, to: impl Into<SocketAddr>, path: &str) -> io::Result<Answer> {
    Connection::new(host.connect(to)?)?.get(path)
}

/// Sends one `GET` from `host` to its own peerix on a new connection, as the local Nix does.
pub fn get_local(host: &Host, path: &str) -> io::Result<Answer> {
    Connection::new(host.connect_local()?)?.get(path)
}

struct Head {
    first: String,
    headers: Vec<(String, String)>,
}

fn read_head(stream: &mut impl BufRead) -> io::Result<Option<Head>> {
    let mut first = String::new();
    if stream.read_line(&mut first)? == 0 {
        return Ok(None);
    }
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = line.trim_end().split_once(':') else {
            return Ok(Some(Head { first: first.trim_end().to_owned(), headers }));
        };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn read_chunks(stream: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut line = String::new();
        stream.read_line(&mut line)?;
        let length =
            u64::from_str_radix(line.trim(), 16).map_err(|_| io::ErrorKind::InvalidData)?;
        if stream.take(length).read_to_end(body)? as u64 != length {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.clear();
        stream.read_line(&mut line)?;
        if length == 0 {
            return Ok(());
        }
    }
}

/// A request that a [`Server`] received.
#[derive(Debug, Clone)]
pub struct Request {
    /// Method.
    pub method: String,
    /// Request target as sent.
    pub path: String,
    /// Header names in lower case, with their values.
    pub headers: Vec<(String, String)>,
    /// Body, of the length in `Content-Length`.
    pub body: Vec<u8>,
}

/// The reaction of a [`Server`] to a request.
pub enum Reply {
    /// Status and body with `Content-Length`. Without the body after `HEAD`.
    Whole(u16, Vec<u8>),
    /// Status and body in chunked encoding.
    Chunked(u16, Vec<u8>),
    /// A body that is cut after this many bytes of the promised `Content-Length`.
    Cut(Vec<u8>, usize),
    /// Raw bytes. Then the server closes the connection.
    Raw(Vec<u8>),
    /// A body with `Content-Length`, one byte at a time with a pause after each.
    Drip(Vec<u8>, Duration),
    /// A body with `Content-Length`, this many bytes at a time with a pause after each.
    Paced(Vec<u8>, usize, Duration),
    /// No answer. The connection stays open until the client closes it.
    Silence,
}

/// A server with scripted answers. Dropping it closes all connections. It panics then if a handler
/// panicked.
pub struct Server {
    listener: TcpListener,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
    /// Whether a handler panicked.
    failed: Arc<AtomicBool>,
}

impl Server {
    /// Serves on `listener` (from [`Host::listen`]), each connection in its own thread.
    pub fn start(
        listener: TcpListener,
        handle: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> Server {
        let connections: Arc<Mutex<Vec<TcpStream>>> = Arc::default();
        let accepting = listener.try_clone().expect("a second handle");
        let (opened, handle) = (Arc::clone(&connections), Arc::new(handle));
        let has_failed = Arc::<AtomicBool>::default();
        let failed = Arc::clone(&has_failed);
        let thread = thread::spawn("server", move || {
            // Ends when `drop` shuts the listener down.
            while let Ok((stream, _)) = accepting.accept() {
                let mut opened = opened.lock().expect("no connection panics while it is held");
                opened.push(stream.try_clone().expect("a second handle"));
                let (handle, failed) = (Arc::clone(&handle), Arc::clone(&failed));
                thread::spawn("server", move || {
                    // A client that disconnects early is not a failure.
                    let served = catch_unwind(AssertUnwindSafe(|| serve(&stream, handle.as_ref())));
                    failed.fetch_or(served.is_err(), Ordering::Relaxed);
                    let _ = stream.shutdown(Shutdown::Both);
                });
            }
        });
        Server { listener, connections, thread: Some(thread), failed: has_failed }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        if let Ok(connections) = self.connections.lock() {
            for connection in connections.iter() {
                let _ = connection.shutdown(Shutdown::Both);
            }
        }
        if self.failed.load(Ordering::Relaxed) && !std::thread::panicking() {
            panic!("a request was answered by a panic: its message is above");
        }
    }
}

fn serve(stream: &TcpStream, handle: &dyn Fn(&Request) -> Reply) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut writer = stream;
    while let Some(head) = read_head(&mut reader)? {
        let length = head.headers.iter().find(|(name, _)| name == "content-length");
        let length = length.and_then(|(_, length)| length.parse().ok()).unwrap_or(0);
        let mut body = Vec::new();
        (&mut reader).take(length).read_to_end(&mut body)?;
        let mut words = head.first.split(' ');
        let mut word = || words.next().unwrap_or_default().to_owned();
        let request = Request { method: word(), path: word(), headers: head.headers, body };
        match handle(&request) {
            Reply::Whole(status, body) => {
                let mut bytes =
                    format!("HTTP/1.1 {status} x\r\nContent-Length: {}\r\n\r\n", body.len())
                        .into_bytes();
                if request.method != "HEAD" {
                    bytes.extend(body);
                }
                writer.write_all(&bytes)?;
            }
            Reply::Chunked(status, body) => {
                let head = format!("HTTP/1.1 {status} x\r\nTransfer-Encoding: chunked\r\n\r\n");
                writer.write_all(head.as_bytes())?;
                for chunk in body.chunks(65536) {
                    write!(writer, "{:x}\r\n", chunk.len())?;
                    writer.write_all(chunk)?;
                    writer.write_all(b"\r\n")?;
                }
                writer.write_all(b"0\r\n\r\n")?;
            }
            Reply::Cut(body, end) => {
                write!(writer, "HTTP/1.1 200 x\r\nContent-Length: {}\r\n\r\n", body.len())?;
                return writer.write_all(&body[..end]);
            }
            Reply::Raw(bytes) => return writer.write_all(&bytes),
            Reply::Drip(body, pause) => {
                write!(writer, "HTTP/1.1 200 x\r\nContent-Length: {}\r\n\r\n", body.len())?;
                for byte in body {
                    writer.write_all(&[byte])?;
                    std::thread::sleep(pause);
                }
            }
            Reply::Paced(body, bytes, pause) => {
                write!(writer, "HTTP/1.1 200 x\r\nContent-Length: {}\r\n\r\n", body.len())?;
                for part in body.chunks(bytes) {
                    writer.write_all(part)?;
                    std::thread::sleep(pause);
                }
            }
            Reply::Silence => {
                io::copy(&mut reader, &mut io::sink())?;
                return Ok(());
            }
        }
    }
    Ok(())
}
