//! NARs compressed between peers that are far from one another. The `zstd` program is the other end: it need not be
//! peerix.

mod common;

use common::http::{Answer, Connection, Reply, Request, Server};
use common::{Daemon, Host, Lan, PORT, SOON, nar, stock};
use peerix::nix::StoreDir;
use peerix::peers::client::{Client, Error, NarBody, Way};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// What `zstd` with `options` makes of bytes on its standard input.
fn zstd(options: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("zstd");
    command.args(["--quiet", "--stdout"]).args(options).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("zstd starts (Debian has it in zstd)");
    let mut stdin = child.stdin.take().expect("it was asked for");
    let output = std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input));
        child.wait_with_output().expect("zstd ends")
    });
    assert!(output.status.success());
    output.stdout
}

/// Several windows of text.
fn archive() -> Vec<u8> {
    let lines: String = (0..500_000u64).map(|n| format!("{n} {:x}\n", n * 7919 % 65_536)).collect();
    nar::archive(&nar::file(lines.as_bytes()))
}

fn chunked(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for chunk in body.chunks(10_000) {
        out.extend(format!("{:x}\r\n", chunk.len()).into_bytes());
        out.extend(chunk);
        out.extend(b"\r\n");
    }
    out.extend(b"0\r\n\r\n");
    out
}

/// A compressed answer that begins at byte `from`.
fn answer(body: &[u8], from: usize, size: usize) -> Vec<u8> {
    let status = match from {
        0 => "HTTP/1.1 200 OK\r\n".to_owned(),
        _ => format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}\r\n", size - 1),
    };
    let head = format!("{status}Content-Encoding: zstd\r\nTransfer-Encoding: chunked\r\n\r\n");
    [head.as_bytes(), &chunked(body)].concat()
}

/// A peer that answers every request so.
struct Peer {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Request>>>,
    _server: Server,
}

impl Peer {
    fn new(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Peer {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let asked: Arc<Mutex<Vec<Request>>> = Arc::default();
        let requests = asked.clone();
        let server = Server::start(listener, move |request| {
            requests.lock().unwrap().push(request.clone());
            answer(request)
        });
        Peer { address, asked, _server: server }
    }

    fn saying(bytes: Vec<u8>) -> Peer {
        Peer::new(move |_| Reply::Raw(bytes.clone()))
    }

    fn nar(&self, offset: usize, size: usize, is_far: bool) -> Result<NarBody, Error> {
        let way = if is_far { Way::Wan(None) } else { Way::Lan };
        client().nar(self.address, "local/nar/x.nar", offset as u64, size as u64, SOON, &way)
    }

    fn header(&self, name: &str) -> Option<String> {
        let asked = self.asked.lock().unwrap();
        let (_, value) = asked.last()?.headers.iter().find(|(found, _)| found == name)?;
        Some(value.clone())
    }
}

fn client() -> Client {
    Client::new(StoreDir::parse("/nix/store").unwrap())
}

/// The rest of a NAR, and that it is the end.
fn rest(mut body: NarBody, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; body.skip as usize + len];
    body.read_exact(&mut bytes)?;
    if body.read(&mut [0])? > 0 {
        return Err(io::Error::other("more than that"));
    }
    Ok(bytes.split_off(body.skip as usize))
}

/// Why a NAR of `size` bytes cannot be read from this body.
fn fails(body: &[u8], size: usize) -> io::Error {
    let peer = Peer::saying(answer(body, 0, size));
    rest(peer.nar(0, size, true).unwrap(), size).unwrap_err()
}

#[test]
fn whole_and_from_any_byte() {
    let nar = archive();
    for options in [&["-1"][..], &["-3"], &["-3", "--no-check"], &["--fast=5"]] {
        for from in [0, 1, nar.len() / 2, nar.len() - 1] {
            let peer = Peer::saying(answer(&zstd(options, &nar[from..]), from, nar.len()));
            let body = peer.nar(from, nar.len(), true).unwrap();
            assert!(rest(body, nar.len() - from).unwrap() == nar[from..], "{options:?} from {from}");
            assert_eq!(peer.header("accept-encoding").as_deref(), Some("zstd"));
            assert_eq!(peer.header("range"), (from > 0).then(|| format!("bytes={from}-")));
        }
    }
    // A peer without ranges sends all of it, of which the beginning is skipped.
    let peer = Peer::saying(answer(&zstd(&[], &nar), 0, nar.len()));
    let body = peer.nar(1000, nar.len(), true).unwrap();
    assert_eq!(body.skip, 1000);
    assert!(rest(body, nar.len() - 1000).unwrap() == nar[1000..]);
}

#[test]
fn a_peer_may_send_it_plain() {
    let nar = archive();
    let plain = nar.clone();
    let peer = Peer::new(move |_| Reply::Whole(200, plain.clone()));
    assert!(rest(peer.nar(0, nar.len(), true).unwrap(), nar.len()).unwrap() == nar);
    // Then its length has to be right, as ever.
    assert!(matches!(peer.nar(0, nar.len() + 1, true), Err(Error::Malformed(_))));
}

#[test]
fn nothing_encoded_comes_unasked() {
    let nar = archive();
    let peer = Peer::saying(answer(&zstd(&[], &nar), 0, nar.len()));
    assert!(matches!(peer.nar(0, nar.len(), false), Err(Error::Malformed(_))));
    assert_eq!(peer.header("accept-encoding").as_deref(), Some("identity"));
    for encoding in ["gzip", "zstd, gzip", "", "zstd2"] {
        let head = format!("HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: 4\r\n\r\nbody");
        let peer = Peer::saying(head.into_bytes());
        assert!(matches!(peer.nar(0, 4, true), Err(Error::Malformed(_))), "{encoding}");
    }
}

#[test]
fn a_stream_that_is_cut_never_looks_whole() {
    let nar = archive();
    let body = zstd(&[], &nar);
    // Ended in order, but too early.
    for len in [0, 1, 5, 20, body.len() / 2, body.len() - 5, body.len() - 1] {
        assert_eq!(fails(&body[..len], nar.len()).kind(), io::ErrorKind::UnexpectedEof, "{len} of {}", body.len());
    }
    // Cut anywhere in the chunks.
    let all = answer(&body, 0, nar.len());
    for len in [all.len() / 2, all.len() - 8, all.len() - 6, all.len() - 5] {
        let peer = Peer::saying(all[..len].to_vec());
        rest(peer.nar(0, nar.len(), true).unwrap(), nar.len()).unwrap_err();
    }
}

#[test]
fn what_is_no_zstd_or_more_than_that() {
    let nar = archive();
    let body = zstd(&[], &nar);
    fails(&nar, nar.len());
    fails(b"", nar.len());
    let flip = |at: usize| {
        let mut body = body.clone();
        body[at] ^= 0x55;
        body
    };
    fails(&flip(0), nar.len());
    fails(&flip(body.len() - 1), nar.len());
    for after in [&b"x"[..], &body] {
        fails(&[&body, after].concat(), nar.len());
    }
    // A shorter NAR than was promised, and one that is longer.
    fails(&zstd(&[], &nar[..nar.len() - 1]), nar.len());
    fails(&zstd(&[], &[&nar[..], b"x"].concat()), nar.len());
    // Windows that take more memory than any peer needs.
    for options in [["-19"], ["--long=27"]] {
        let error = fails(&zstd(&options, &nar), nar.len());
        assert!(error.to_string().contains("memory"), "{error}");
    }
}

#[test]
fn a_bomb_costs_no_more_than_what_was_wanted() {
    let bomb = zstd(&["-1"], &vec![0; 256 << 20]);
    let peer = Peer::saying(answer(&bomb, 0, 1000));
    let mut body = peer.nar(0, 1000, true).unwrap();
    let mut bytes = [1; 1000];
    body.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 1000]);
    body.finish();
}

#[test]
fn a_connection_is_used_again() {
    let nar = archive();
    let bodies = [answer(&zstd(&[], &nar), 0, nar.len()), answer(&zstd(&[], &nar[9..]), 9, nar.len())];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let peer = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        for body in bodies {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte).unwrap();
                head.push(byte[0]);
            }
            stream.write_all(&body).unwrap();
        }
    });
    let client = client();
    for from in [0, 9] {
        let mut body = client.nar(address, "x", from, nar.len() as u64, SOON, &Way::Wan(None)).unwrap();
        let mut bytes = vec![0; nar.len() - from as usize];
        body.read_exact(&mut bytes).unwrap();
        assert!(bytes == nar[from as usize..]);
        body.finish();
    }
    peer.join().unwrap();
}

/// A server and who asks it.
struct Scene {
    server: Host,
    neighbour: Host,
    _daemon: Daemon,
    _lan: Lan,
}

impl Scene {
    fn new(flags: &[&str]) -> Scene {
        let lan = Lan::new();
        let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
        stock::ready(&server);
        let daemon = Daemon::start(&server, flags);
        Scene { server, neighbour, _daemon: daemon, _lan: lan }
    }

    fn connect(&self) -> Connection {
        Connection::new(self.neighbour.connect((self.server.address, PORT)).unwrap()).unwrap()
    }

    fn ask(&self, route: &str, headers: &str) -> Answer {
        self.connect().ask("GET", route, headers).unwrap()
    }

    fn nar_route(&self, path: &str) -> String {
        stock::nar_route(&self.neighbour, &self.server, path)
    }
}

const ZSTD: &str = "Accept-Encoding: zstd\r\n";

fn is_zstd(answer: &Answer) -> bool {
    assert!(answer.whole);
    let is_zstd = answer.header("content-encoding") == Some("zstd");
    assert_eq!(is_zstd, answer.header("transfer-encoding") == Some("chunked"));
    assert_eq!(is_zstd, answer.header("content-length").is_none());
    is_zstd
}

#[test]
fn a_neighbour_gets_it_plain() {
    let scene = Scene::new(&[]);
    let path = stock::add_large(&scene.server, "large", 1);
    let answer = scene.ask(&scene.nar_route(&path), ZSTD);
    assert!(!is_zstd(&answer) && answer.header("vary").is_none());
    assert!(answer.body == stock::dump(&scene.server, &path));
}
