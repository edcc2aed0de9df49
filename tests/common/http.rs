//! As much HTTP/1.1 as the tests need, both sides.

use super::{DEADLINE, lan::Host, thread};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What a server answered.
#[derive(Debug)]
pub struct Answer {
    /// 200.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// As much of the body as came.
    pub body: Vec<u8>,
    /// Whether that is all of it, by `Content-Length` or the last chunk.
    pub whole: bool,
}

impl Answer {
    /// The first header of that (lower-case) name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that is kept open from request to request.
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Takes over a connection.
    pub fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        stream.set_write_timeout(Some(DEADLINE))?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    /// `GET` and its answer.
    pub fn get(&mut self, path: &str) -> io::Result<Answer> {
        self.ask("GET", path, "")
    }

    /// Any method, with further header lines, each ending in CR LF.
    pub fn ask(&mut self, method: &str, path: &str, headers: &str) -> io::Result<Answer> {
        self.send(
            format!("{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n").as_bytes(),
        )?;
        self.answer(method != "HEAD")
    }

    /// A request with a body, and its answer. Further header lines each end in CR LF.
    pub fn tell(
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

    /// Bytes as they are.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Waits until an answer begins.
    pub fn wait_for_answer(&mut self) -> io::Result<()> {
        self.stream.fill_buf().map(drop)
    }

    /// Reads and throws away until the other end closes the connection or `done` says so.
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

    /// Reads one answer.
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

/// One `GET` on a connection of its own from `host`.
pub fn get(host: &Host, to: impl Into<SocketAddr>, path: &str) -> io::Result<Answer> {
    Connection::new(host.connect(to)?)?.get(path)
}

/// One `GET` to the peerix of `host` itself, as its Nix does.
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

/// A request as a [`Server`] sees it.
#[derive(Debug, Clone)]
pub struct Request {
    /// `GET`.
    pub method: String,
    /// As sent.
    pub path: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// By `Content-Length`.
    pub body: Vec<u8>,
}

/// What a [`Server`] does about a request.
pub enum Reply {
    /// An answer with its length; for `HEAD` without its body.
    Whole(u16, Vec<u8>),
    /// An answer in chunks.
    Chunked(u16, Vec<u8>),
    /// An answer that promises all of these bytes and ends after so many.
    Cut(Vec<u8>, usize),
    /// Bytes as they are; then the connection is closed.
    Raw(Vec<u8>),
    /// An answer with its length, a byte at a time with a pause after each.
    Drip(Vec<u8>, Duration),
    /// An answer with its length, so many bytes at a time with a pause after each.
    Paced(Vec<u8>, usize, Duration),
    /// Nothing: the connection stays open until the asker gives up.
    Silence,
}

/// A server that does whatever it is told. Dropping it closes every connection, and panics if one
/// of its answers did.
pub struct Server {
    listener: TcpListener,
    connections: Arc<Mutex<Vec<TcpStream>>>,
    thread: Option<JoinHandle<()>>,
    /// Whether `handle` has panicked.
    failed: Arc<AtomicBool>,
}

impl Server {
    /// Serves on `listener` (from [`Host::listen`]).
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
            // Ends when the listener is shut down.
            while let Ok((stream, _)) = accepting.accept() {
                let mut opened = opened.lock().expect("no connection panics while it is held");
                opened.push(stream.try_clone().expect("a second handle"));
                let (handle, failed) = (Arc::clone(&handle), Arc::clone(&failed));
                thread::spawn("server", move || {
                    // An asker that goes away is none of the server's business.
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
