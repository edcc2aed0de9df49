//! An HTTP client that costs as little as possible, so that the server dominates the measurement.

use crate::common::DEADLINE;
use rustix::net::{RecvFlags, recv};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes read at once while the head of an answer is incomplete.
const HEAD: usize = 4096;

/// A persistent connection. Reads and writes time out after [`DEADLINE`].
pub struct Client {
    socket: TcpStream,
    buffer: Vec<u8>,
    /// Bounds of the unread bytes in `buffer`.
    start: usize,
    end: usize,
}

/// How the client consumes a body.
pub enum Body<'a> {
    /// The kernel discards it without a copy to user space (`MSG_TRUNC`, tcp(7)).
    Dropped,
    /// The client reads it in pieces of at most 256 KiB and passes each to the function.
    Read(&'a mut dyn FnMut(&[u8])),
}

/// Status line and framing of an answer.
pub struct Head {
    /// The status code.
    pub status: u16,
    /// `Content-Length`; `None` for a chunked body.
    length: Option<u64>,
}

impl Client {
    /// Takes over a connection.
    pub fn new(socket: TcpStream) -> Client {
        socket.set_nodelay(true).expect("a socket");
        socket.set_read_timeout(Some(DEADLINE)).expect("a socket");
        socket.set_write_timeout(Some(DEADLINE)).expect("a socket");
        Client { socket, buffer: vec![0; 256 << 10], start: 0, end: 0 }
    }

    /// Sends a request and reads the head of the answer. Each line of `headers` ends in CR LF.
    pub fn ask(&mut self, route: &str, headers: &str) -> Head {
        write!(self.socket, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}\r\n")
            .expect("a server");
        let (mut status, mut length) = (None, None);
        loop {
            let line = self.line();
            match line.split_once(": ") {
                _ if line.is_empty() => break,
                Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                    length = value.parse().ok()
                }
                _ => status = status.or_else(|| line.split(' ').nth(1)?.parse().ok()),
            }
        }
        Head { status: status.unwrap_or_else(|| panic!("{route}: not HTTP")), length }
    }

    /// Requests what must be present, consumes the body and returns its length in bytes. Panics if
    /// the status is not 200, or 206 for a range.
    pub fn get(&mut self, route: &str, headers: &str, body: Body) -> u64 {
        let head = self.ask(route, headers);
        let wanted = if headers.contains("Range") { 206 } else { 200 };
        assert_eq!(head.status, wanted, "{route}");
        self.body(&head, body)
    }

    /// Returns the status and the whole body as text.
    pub fn text(&mut self, route: &str) -> (u16, String) {
        let (head, mut all) = (self.ask(route, ""), Vec::new());
        self.body(&head, Body::Read(&mut |bytes| all.extend(bytes)));
        (head.status, String::from_utf8_lossy(&all).into_owned())
    }

    /// Consumes the body and returns its length in bytes.
    pub fn body(&mut self, head: &Head, mut body: Body) -> u64 {
        if let Some(length) = head.length {
            self.take(length, &mut body);
            return length;
        }
        let mut all = 0;
        loop {
            let line = self.line();
            let length = u64::from_str_radix(line.split(';').next().unwrap_or(""), 16)
                .expect("the length of a chunk");
            self.take(length, &mut body);
            self.line();
            all += length;
            if length == 0 {
                return all;
            }
        }
    }

    /// Blocks until the first bytes of the body are there, for at most [`DEADLINE`].
    pub fn first_byte(&mut self) {
        self.fill(self.buffer.len());
    }

    fn take(&mut self, mut left: u64, body: &mut Body) {
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let got = match body {
                Body::Dropped if self.start == self.end => {
                    let most = most.min(self.buffer.len());
                    let got = recv(&self.socket, &mut self.buffer[..most], RecvFlags::TRUNC)
                        .expect("the body")
                        .1;
                    assert!(got > 0, "a body was cut");
                    got
                }
                _ => {
                    self.fill(self.buffer.len());
                    let got = most.min(self.end - self.start);
                    if let Body::Read(look) = body {
                        look(&self.buffer[self.start..self.start + got]);
                    }
                    self.start += got;
                    got
                }
            };
            left -= got as u64;
        }
    }

    fn line(&mut self) -> String {
        let mut line = Vec::new();
        loop {
            // A small read, so that little of the body comes with its head.
            self.fill(HEAD);
            let rest = &self.buffer[self.start..self.end];
            let found = rest.iter().position(|byte| *byte == b'\n');
            let taken = found.map_or(rest.len(), |at| at + 1);
            line.extend(&rest[..taken]);
            self.start += taken;
            if found.is_some() {
                return String::from_utf8_lossy(&line).trim_end().to_owned();
            }
        }
    }

    /// Reads at most `most` bytes if the buffer is empty.
    fn fill(&mut self, most: usize) {
        if self.start == self.end {
            self.start = 0;
            self.end = self.socket.read(&mut self.buffer[..most]).expect("an answer");
            assert!(self.end > 0, "the connection was closed");
        }
    }
}

/// Distributes `work` among the clients: each free client takes the next piece.
pub fn spread<T: Sync, R: Send>(
    clients: &mut [Client],
    work: &[T],
    run: impl Fn(&mut Client, &T) -> R + Sync,
) -> Vec<R> {
    let (next, run) = (&AtomicUsize::new(0), &run);
    std::thread::scope(|scope| {
        let workers = clients.iter_mut().map(|client| {
            scope.spawn(move || {
                let pieces = std::iter::from_fn(|| work.get(next.fetch_add(1, Ordering::Relaxed)));
                pieces.map(|piece| run(client, piece)).collect::<Vec<R>>()
            })
        });
        let workers: Vec<_> = workers.collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker")).collect()
    })
}
