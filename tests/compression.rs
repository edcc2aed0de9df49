//! Compression of NARs between distant peers. The `zstd` program is the other end, so that peerix
//! is not only tested against itself.

use crate::common::http::{Answer, Connection, Reply, Request, Server};
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, Scale, nar, stock, thread};
use peerix::nix::StoreDir;
use peerix::peers::client::{LinkKind, NarBody, PeerClient, PeerError};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// The output of `zstd` with `options` for the bytes in `input`.
fn zstd(options: &[&str], input: &[u8]) -> Vec<u8> {
    let mut command = Command::new("zstd");
    command
        .args(["--quiet", "--stdout"])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = command.spawn().expect("zstd starts (Debian has it in zstd)");
    let mut stdin = child.stdin.take().expect("it was asked for");
    let output = std::thread::scope(|scope| {
        thread::spawn_in(scope, "writer", move || stdin.write_all(input));
        child.wait_with_output().expect("zstd ends")
    });
    assert!(output.status.success());
    output.stdout
}

/// A NAR with text, larger than several zstd windows.
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

/// A compressed answer with the NAR from byte `from`. `size` is the size of the whole NAR.
fn answer(body: &[u8], from: usize, size: usize) -> Vec<u8> {
    let status = match from {
        0 => "HTTP/1.1 200 OK\r\n".to_owned(),
        _ => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{}/{size}\r\n",
            size - 1
        ),
    };
    let head = format!("{status}Content-Encoding: zstd\r\nTransfer-Encoding: chunked\r\n\r\n");
    [head.as_bytes(), &chunked(body)].concat()
}

/// A peer that gives every request an answer from the same function.
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

    fn nar(&self, offset: usize, size: usize, is_far: bool) -> Result<NarBody, PeerError> {
        let way = if is_far { LinkKind::Wan(None) } else { LinkKind::Lan };
        client().nar(self.address, "local/nar/x.nar", offset as u64, size as u64, DEADLINE, &way)
    }

    fn header(&self, name: &str) -> Option<String> {
        let asked = self.asked.lock().unwrap();
        let (_, value) = asked.last()?.headers.iter().find(|(found, _)| found == name)?;
        Some(value.clone())
    }
}

fn client() -> PeerClient {
    PeerClient::new(StoreDir::parse("/nix/store").unwrap())
}

/// Reads the remaining `len` bytes of a NAR. Fails if the body does not end there.
fn rest(mut body: NarBody, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; body.skip as usize + len];
    body.read_exact(&mut bytes)?;
    if body.read(&mut [0])? > 0 {
        return Err(io::Error::other("more than that"));
    }
    Ok(bytes.split_off(body.skip as usize))
}

/// The error when a NAR of `size` bytes is read from this compressed body.
fn fails(body: &[u8], size: usize) -> io::Error {
    let peer = Peer::saying(answer(body, 0, size));
    rest(peer.nar(0, size, true).unwrap(), size).unwrap_err()
}

#[test]
fn compressed_nar_is_read_whole_and_from_any_byte() {
    let nar = archive();
    for options in [&["-1"][..], &["-3"], &["-3", "--no-check"], &["--fast=5"]] {
        for from in [0, 1, nar.len() / 2, nar.len() - 1] {
            let peer = Peer::saying(answer(&zstd(options, &nar[from..]), from, nar.len()));
            let body = peer.nar(from, nar.len(), true).unwrap();
            assert!(
                rest(body, nar.len() - from).unwrap() == nar[from..],
                "{options:?} from {from}"
            );
            assert_eq!(peer.header("accept-encoding").as_deref(), Some("zstd"));
            assert_eq!(peer.header("range"), (from > 0).then(|| format!("bytes={from}-")));
        }
    }
    // A peer without ranges sends the whole NAR, and the client skips the beginning.
    let peer = Peer::saying(answer(&zstd(&[], &nar), 0, nar.len()));
    let body = peer.nar(1000, nar.len(), true).unwrap();
    assert_eq!(body.skip, 1000);
    assert!(rest(body, nar.len() - 1000).unwrap() == nar[1000..]);
}

#[test]
fn uncompressed_answer_is_accepted() {
    let nar = archive();
    let plain = nar.clone();
    let peer = Peer::new(move |_| Reply::Whole(200, plain.clone()));
    assert!(rest(peer.nar(0, nar.len(), true).unwrap(), nar.len()).unwrap() == nar);
    // An uncompressed NAR must have the expected length.
    assert!(matches!(peer.nar(0, nar.len() + 1, true), Err(PeerError::Malformed(_))));
}

#[test]
fn unrequested_encoding_is_refused() {
    let nar = archive();
    let peer = Peer::saying(answer(&zstd(&[], &nar), 0, nar.len()));
    assert!(matches!(peer.nar(0, nar.len(), false), Err(PeerError::Malformed(_))));
    assert_eq!(peer.header("accept-encoding").as_deref(), Some("identity"));
    for encoding in ["gzip", "zstd, gzip", "", "zstd2"] {
        let head = format!(
            "HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\nContent-Length: 4\r\n\r\nbody"
        );
        let peer = Peer::saying(head.into_bytes());
        assert!(matches!(peer.nar(0, 4, true), Err(PeerError::Malformed(_))), "{encoding}");
    }
}

#[test]
fn cut_stream_is_an_error() {
    let nar = archive();
    let body = zstd(&[], &nar);
    // The chunked encoding ends properly, but the zstd frame does not.
    for len in [0, 1, 5, 20, body.len() / 2, body.len() - 5, body.len() - 1] {
        assert_eq!(
            fails(&body[..len], nar.len()).kind(),
            io::ErrorKind::UnexpectedEof,
            "{len} of {}",
            body.len()
        );
    }
    // The connection ends inside the chunked encoding.
    let all = answer(&body, 0, nar.len());
    for len in [all.len() / 2, all.len() - 8, all.len() - 6, all.len() - 5] {
        let peer = Peer::saying(all[..len].to_vec());
        rest(peer.nar(0, nar.len(), true).unwrap(), nar.len()).unwrap_err();
    }
}

#[test]
fn invalid_or_oversized_zstd_is_an_error() {
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
    // A NAR that is one byte shorter or longer than promised.
    fails(&zstd(&[], &nar[..nar.len() - 1]), nar.len());
    fails(&zstd(&[], &[&nar[..], b"x"].concat()), nar.len());
    // Frames with a window larger than the reader's limit of 2 MiB.
    for options in [["-19"], ["--long=27"]] {
        let error = fails(&zstd(&options, &nar), nar.len());
        assert!(error.to_string().contains("memory"), "{error}");
    }
}

#[test]
fn zip_bomb_is_decompressed_only_as_far_as_read() {
    let bomb = zstd(&["-1"], &vec![0; 256 << 20]);
    let peer = Peer::saying(answer(&bomb, 0, 1000));
    let mut body = peer.nar(0, 1000, true).unwrap();
    let mut bytes = [1; 1000];
    body.read_exact(&mut bytes).unwrap();
    assert_eq!(bytes, [0; 1000]);
    body.finish();
}

#[test]
fn connection_is_reused_after_a_compressed_nar() {
    let nar = archive();
    let bodies =
        [answer(&zstd(&[], &nar), 0, nar.len()), answer(&zstd(&[], &nar[9..]), 9, nar.len())];
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let peer = thread::spawn("peer", move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
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
        let mut body = client
            .nar(address, "x", from, nar.len() as u64, DEADLINE, &LinkKind::Wan(None))
            .unwrap();
        let mut bytes = vec![0; nar.len() - from as usize];
        body.read_exact(&mut bytes).unwrap();
        assert!(bytes == nar[from as usize..]);
        body.finish();
    }
    peer.join().unwrap();
}

/// A server, and a neighbour that sends it requests.
struct Scene {
    server: Host,
    neighbour: Host,
    _daemon: Daemon,
    _lan: Lan,
}

impl Scene {
    fn new(flags: &[&str]) -> Scene {
        let lan = Lan::new().with_scale(Scale::without_timeouts());
        let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
        stock::ready(&server);
        let daemon = Daemon::start(&server, flags);
        Scene { server, neighbour, _daemon: daemon, _lan: lan }
    }

    /// A server that shares everything and treats no address as a neighbour. No tracker listens on
    /// port 9.
    fn wan() -> Scene {
        Scene::new(&[
            "--mode",
            "wan",
            "--tracker-url",
            "http://127.0.0.1:9",
            "--no-verify",
            "--no-filter",
        ])
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
fn stranger_gets_compressed_nar_from_any_byte() {
    let scene = Scene::wan();
    let tree = "mkdir -p $n/d; seq 100000 > $n/a; seq 9 > $n/d/b; chmod +x $n/d/b; ln -s ../a $n/d/c; : > $n/e";
    let noise = "head -c 1000000 /dev/urandom > $n";
    for path in [
        stock::add_large(&scene.server, "large", 5),
        stock::add(&scene.server, "tree", tree),
        stock::add(&scene.server, "noise", noise),
        stock::add(&scene.server, "empty", ": > $n"),
    ] {
        let nar = stock::dump(&scene.server, &path);
        let route = scene.nar_route(&path);
        let mut connection = scene.connect();
        let whole = connection.ask("GET", &route, ZSTD).unwrap();
        assert!(whole.status == 200 && is_zstd(&whole));
        assert!(zstd(&["--decompress"], &whole.body) == nar, "{path}");
        let size = nar.len();
        for from in [0, 1, size / 2, size - 1] {
            let part =
                connection.ask("GET", &route, &format!("{ZSTD}Range: bytes={from}-\r\n")).unwrap();
            assert!(part.status == 206 && is_zstd(&part));
            assert_eq!(
                part.header("content-range"),
                Some(&*format!("bytes {from}-{}/{size}", size - 1))
            );
            assert!(zstd(&["--decompress"], &part.body) == nar[from..], "{path} from {from}");
        }
        let end =
            connection.ask("GET", &route, &format!("{ZSTD}Range: bytes={size}-\r\n")).unwrap();
        assert_eq!(
            (end.status, end.header("content-range")),
            (416, Some(&*format!("bytes */{size}")))
        );
    }
}

#[test]
fn requests_without_zstd_get_uncompressed_nar() {
    let scene = Scene::wan();
    let path = stock::add_large(&scene.server, "large", 1);
    let nar = stock::dump(&scene.server, &path);
    let route = scene.nar_route(&path);
    let plain = scene.ask(&route, "");
    assert!(!is_zstd(&plain) && plain.body == nar);
    for headers in
        ["Accept-Encoding: zstd;q=0\r\n", "Accept-Encoding: *\r\n", "Accept-Encoding: gzip, br\r\n"]
    {
        let answer = scene.ask(&route, headers);
        assert!(!is_zstd(&answer) && answer.body == nar, "{headers}");
        assert_eq!(answer.header("vary"), Some("Accept-Encoding"));
    }
    // Only `/local`, the view for peers, is compressed.
    let answer = scene.ask(&route.replace("/local/", "/store/"), ZSTD);
    assert!(!is_zstd(&answer) && answer.header("vary").is_none() && answer.body == nar);
    // HTTP/1.0 has no chunked encoding.
    let mut old = scene.connect();
    old.send(format!("GET {route} HTTP/1.0\r\n{ZSTD}\r\n").as_bytes()).unwrap();
    assert!(!is_zstd(&old.answer(true).unwrap()));
    // A request from the same machine.
    let mut own = Connection::new(scene.server.connect_local().unwrap()).unwrap();
    assert!(!is_zstd(&own.ask("GET", &route, ZSTD).unwrap()));

    // The two encodings have different entity tags.
    let compressed = scene.ask(&route, ZSTD);
    let tags = [&plain, &compressed].map(|answer| answer.header("etag").unwrap().to_owned());
    assert_ne!(tags[0], tags[1]);
    assert_eq!(compressed.header("vary"), Some("Accept-Encoding"));
    assert_eq!(compressed.header("accept-ranges"), Some("bytes"));
    for (tag, status) in [(&tags[0], 200), (&tags[1], 206)] {
        let answer = scene.ask(&route, &format!("{ZSTD}Range: bytes=5-\r\nIf-Range: {tag}\r\n"));
        assert_eq!(answer.status, status, "{tag}");
    }
    // HEAD returns the same headers as GET, and the connection stays usable.
    let mut connection = scene.connect();
    let head = connection.ask("HEAD", &route, ZSTD).unwrap();
    assert!(head.status == 200 && is_zstd(&head) && head.body.is_empty());
    assert!(is_zstd(&connection.ask("GET", &route, ZSTD).unwrap()));
}

#[test]
fn neighbour_gets_uncompressed_nar() {
    let scene = Scene::new(&[]);
    let path = stock::add_large(&scene.server, "large", 1);
    let answer = scene.ask(&scene.nar_route(&path), ZSTD);
    assert!(!is_zstd(&answer) && answer.header("vary").is_none());
    assert!(answer.body == stock::dump(&scene.server, &path));
}

#[test]
fn compressed_stream_of_changed_file_is_cut() {
    let scene = Scene::wan();
    let path = stock::add(&scene.server, "noise", "head -c 50000000 /dev/urandom > $n");
    let mut connection = scene.connect();
    connection
        .send(format!("GET {} HTTP/1.1\r\n{ZSTD}\r\n", scene.nar_route(&path)).as_bytes())
        .unwrap();
    // The file shrinks while more of it than the buffers hold is still to be sent.
    connection.wait_for_answer().unwrap();
    scene.server.sh(&format!("chmod +w {path}; truncate -s 49999999 {path}"));
    let answer = connection.answer(true).unwrap();
    assert_eq!((answer.status, answer.header("content-encoding")), (200, Some("zstd")));
    assert!(!answer.whole);
}

#[test]
fn compressed_streams_beyond_sixteen_are_uncompressed() {
    let scene = Scene::wan();
    let path = stock::add(&scene.server, "noise", "head -c 50000000 /dev/urandom > $n");
    let route = scene.nar_route(&path);
    // Each stream stays active, because its client does not read on.
    let streams: Vec<Connection> = (0..16)
        .map(|_| {
            let mut connection = scene.connect();
            connection.send(format!("GET {route} HTTP/1.1\r\n{ZSTD}\r\n").as_bytes()).unwrap();
            connection.wait_for_answer().unwrap();
            connection
        })
        .collect();
    assert!(!is_zstd(&scene.ask(&route, ZSTD)));
    for mut stream in streams {
        assert!(is_zstd(&stream.answer(true).unwrap()));
    }
    assert!(is_zstd(&scene.ask(&route, ZSTD)));
}
