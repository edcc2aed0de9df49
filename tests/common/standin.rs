//! Simulated peers that are not peerix: their answers to datagrams and HTTP requests are scripted.
//! Also the original peerix, with the NARs of a static cache.

use super::http::{Reply, Request, Server};
use super::lan::Host;
use super::packet::Packet;
use super::world::hash_part;
use super::{PORT, World, thread};
use data_encoding::BASE64;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Received items, oldest first.
pub type Received<T> = Arc<Mutex<Vec<T>>>;

/// A peer made of two functions, one for datagrams and one for HTTP requests.
pub struct StandIn {
    /// Datagrams received, with their senders.
    pub heard: Received<(SocketAddr, Vec<u8>)>,
    /// HTTP requests received.
    pub asked: Received<Request>,
    _server: Server,
    socket: UdpSocket,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl StandIn {
    /// Starts the peer on [`PORT`] of `host`. It ignores its own broadcasts.
    pub fn start(
        host: &Host,
        say: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static,
        answer: impl Fn(&Request) -> Reply + Send + Sync + 'static,
    ) -> StandIn {
        let heard: Received<_> = Arc::default();
        let asked: Received<_> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let requests = Arc::clone(&asked);
        let server = Server::start(host.listen(PORT), move |request| {
            requests.lock().expect("nothing panics while it is held").push(request.clone());
            answer(request)
        });
        let socket = host.udp(PORT);
        let (own, second) = (host.address, socket.try_clone().expect("a second handle"));
        let (datagrams, stopped) = (Arc::clone(&heard), Arc::clone(&stop));
        let thread = thread::spawn("stand-in", move || {
            while !stopped.load(Ordering::Relaxed) {
                let Some((from, datagram)) = receive(&socket, Duration::from_millis(50)) else {
                    continue;
                };
                if from.ip() == own {
                    continue;
                }
                datagrams
                    .lock()
                    .expect("nothing panics while it is held")
                    .push((from, datagram.clone()));
                if let Some(reply) = say(&datagram) {
                    let _ = socket.send_to(&reply, from);
                }
            }
        });
        StandIn { heard, asked, _server: server, socket: second, stop, thread: Some(thread) }
    }

    /// Starts an original peerix that has all paths of the world's static cache.
    pub fn original(host: &Host, world: &World) -> StandIn {
        let shelf = StaticCache::of(world);
        let answers = original(&shelf);
        StandIn::start(host, have(move |hash_part| shelf.narinfo(hash_part).is_some()), answers)
    }

    /// Sends hello packets to the peerix on `host` until it lists this peer, which runs on `own`.
    /// From then on it queries this peer by unicast.
    pub fn meet(&self, own: &Host, host: &Host) {
        let hello =
            Packet::Hello { version: 1, port: PORT, instance: *b"stand-in", flags: 0 }.write();
        super::wait_for("the stand-in is met", || {
            let _ = self.socket.send_to(&hello, (host.address, PORT));
            super::daemon::is_listed(host, own.address).then_some(())
        });
    }

    /// Whether the peer received a request whose path ends in `end`.
    pub fn was_asked(&self, end: &str) -> bool {
        self.asked
            .lock()
            .expect("nothing panics while it is held")
            .iter()
            .any(|request| request.path.ends_with(end))
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The next datagram, if one arrives within this time.
pub fn receive(socket: &UdpSocket, within: Duration) -> Option<(SocketAddr, Vec<u8>)> {
    socket.set_read_timeout(Some(within)).expect("not zero");
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).ok()?;
    Some((from, buffer[..length].to_vec()))
}

/// Answers *have* to every query for a hash part that `knows` accepts, and nothing to others.
pub fn have(knows: impl Fn(&str) -> bool) -> impl Fn(&[u8]) -> Option<Vec<u8>> {
    move |datagram| match Packet::read(datagram)? {
        Packet::Query { id, hash_part } if knows(&hash_part) => {
            let path = format!("local/{hash_part}.narinfo");
            Some(Packet::Have { id, port: PORT.into(), path }.write())
        }
        _ => None,
    }
}

/// The content of a static cache.
#[derive(Clone)]
pub struct StaticCache {
    dir: PathBuf,
}

impl StaticCache {
    /// The world's static cache.
    pub fn of(world: &World) -> StaticCache {
        StaticCache { dir: world.cache() }
    }

    /// The lines of a narinfo of the cache, as pairs of key and value.
    pub fn narinfo(&self, hash_part: &str) -> Option<Vec<(String, String)>> {
        let text = fs::read_to_string(self.dir.join(format!("{hash_part}.narinfo"))).ok()?;
        let lines = text.lines().filter_map(|line| line.split_once(": "));
        Some(lines.map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// The NAR of a path.
    pub fn nar(&self, hash_part: &str) -> Option<Vec<u8>> {
        let narinfo = self.narinfo(hash_part)?;
        fs::read(self.dir.join(field(&narinfo, "URL"))).ok()
    }

    /// The narinfo of a path as a peer sends it, with the given `URL` and without `FileHash` and
    /// `FileSize`.
    pub fn peer_narinfo(&self, hash_part: &str, url: &str) -> Option<String> {
        let mut text = String::new();
        for (key, value) in self.narinfo(hash_part)? {
            match key.as_str() {
                "FileHash" | "FileSize" => {}
                "URL" => text += &format!("URL: {url}\n"),
                _ => text += &format!("{key}: {value}\n"),
            }
        }
        Some(text)
    }
}

/// The value of a line of a narinfo. Empty if there is no such line.
pub fn field<'a>(narinfo: &'a [(String, String)], name: &str) -> &'a str {
    narinfo.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
}

/// The HTTP handler of the original peerix: it names a NAR by the base64 of the store path, sends
/// it in chunks, and omits `CA` from narinfos.
pub fn original(shelf: &StaticCache) -> impl Fn(&Request) -> Reply + Send + Sync + 'static {
    let shelf = shelf.clone();
    move |request| {
        let missing = || Reply::Whole(404, b"Not found".to_vec());
        if let Some(hash_part) =
            request.path.strip_prefix("/local/").and_then(|rest| rest.strip_suffix(".narinfo"))
        {
            let Some(lines) = shelf.narinfo(hash_part) else { return missing() };
            let path = field(&lines, "StorePath");
            let name = BASE64.encode(path.as_bytes()).replace('/', "_");
            let mut text =
                format!("StorePath: {path}\nURL: local/nar/{name}.nar\nCompression: none\n");
            for name in ["NarHash", "NarSize", "References", "Deriver", "Sig"] {
                for (key, value) in &lines {
                    if key == name && !value.is_empty() {
                        text += &format!("{key}: {value}\n");
                    }
                }
            }
            return Reply::Whole(200, text.into_bytes());
        }
        let name =
            request.path.strip_prefix("/local/nar/").and_then(|rest| rest.strip_suffix(".nar"));
        let path = name.and_then(|name| {
            BASE64.decode(name.replace("%3D", "=").replace('_', "/").as_bytes()).ok()
        });
        let path = path.and_then(|path| String::from_utf8(path).ok());
        path.and_then(|path| shelf.nar(hash_part(&path)))
            .map_or_else(missing, |nar| Reply::Chunked(200, nar))
    }
}

/// The broadcast address of the network of [`super::Lan::new`].
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 255);
