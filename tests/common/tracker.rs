//! A tracker on a host, and the flags with which peerix uses it.

use super::http::{self, Connection};
use super::lan::Host;
use super::process::Logged;
use super::{wait_for, world};
use data_encoding::{BASE64, HEXLOWER};
use ed25519_compact::{KeyPair, Seed};
use peerix::nix::HashPart;
use peerix::wire::filter::BloomFilter;
use rustix::process::Signal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// TCP port of every tracker.
pub const PORT: u16 = 12305;

/// Path of the database on the tracker's host.
const DATABASE: &str = "/var/lib/peerix-tracker/db";

/// Directory in which a node keeps its identity.
const STATE: &str = "/var/lib/peerix";

/// The program under test: `PEERIX_TRACKER_BIN`, else the one that cargo built for these tests, if
/// any.
pub fn binary() -> Option<&'static Path> {
    static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
    let find = || {
        let given = std::env::var_os("PEERIX_TRACKER_BIN").map(PathBuf::from);
        given.or_else(|| option_env!("CARGO_BIN_EXE_peerix-tracker").map(PathBuf::from))
    };
    PATH.get_or_init(find).as_deref()
}

/// A running tracker and its host. Dropping it kills the tracker, and prints the end of its log if
/// the test failed.
pub struct Tracker {
    program: Logged,
    /// The machine.
    pub host: Host,
}

impl Tracker {
    /// Starts the tracker with `--verbose` and waits until `/health` answers 200.
    pub fn start(host: Host) -> Tracker {
        Tracker { program: start(&host), host }
    }

    /// Starts the tracker with the same database again, after [`Tracker::kill`] or
    /// [`Tracker::stop`].
    pub fn start_again(&mut self) {
        self.program = start(&self.host);
    }

    /// Sends `SIGKILL` and waits until the process has ended.
    pub fn kill(&mut self) {
        self.program.process.kill();
    }

    /// Sends `SIGTERM` and waits until the process has ended.
    pub fn stop(&mut self) -> ExitStatus {
        self.program.process.terminate()
    }

    /// Sends a signal to the process.
    pub fn signal(&mut self, signal: Signal) {
        self.program.process.signal(signal);
    }

    /// The log since the last start.
    pub fn log(&self) -> String {
        self.program.log()
    }

    /// The value of `--tracker-url`.
    pub fn url(&self) -> String {
        url(&self.host)
    }

    /// Sends a `GET` and returns the JSON of the answer. After a 429, waits for `Retry-After` and
    /// repeats. Panics if the answer is not 200.
    pub fn get(&self, path: &str) -> Value {
        let answer = wait_for("the tracker has time", || {
            let answer = http::get(&self.host, (self.host.address, PORT), path)
                .expect("the tracker answers");
            if answer.status != 429 {
                return Some(answer);
            }
            let seconds = answer.header("retry-after").and_then(|seconds| seconds.parse().ok());
            std::thread::sleep(Duration::from_secs(seconds.expect("it says when it has")));
            None
        });
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        serde_json::from_slice(&answer.body).expect("the tracker's answers are JSON")
    }

    /// The listed peers, as pairs of peer ID and address.
    pub fn peers(&self) -> Vec<(String, String)> {
        let list = self.get("/peers");
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let peers = list["peers"].as_array().expect("a list of peers");
        peers.iter().map(|peer| (text(&peer["peer_id"]), text(&peer["addr"]))).collect()
    }

    /// Whether the tracker lists this peer ID.
    pub fn lists(&self, peer_id: &str) -> bool {
        self.peers().iter().any(|(listed, _)| listed == peer_id)
    }

    /// A count from the peer's reputation: the field `name` of `GET /reputation/<peer id>`.
    pub fn reputation(&self, peer_id: &str, name: &str) -> u64 {
        self.get(&format!("/reputation/{peer_id}"))[name].as_u64().expect("a count")
    }

    /// Announces a peer on `host` without a key and a filter, like the original peerix.
    pub fn announce_original(&self, host: &Host, peer_id: &str) {
        let body = json!({ "peer_id": peer_id, "port": super::PORT });
        self.request_ok(
            host,
            "POST",
            "/announce",
            "Content-Type: application/json\r\n",
            body.to_string().as_bytes(),
        );
    }

    /// Announces a peer on a port of `host` with a key, and uploads a filter with all of `paths`.
    pub fn announce_with(&self, host: &Host, port: u16, peer_id: &str, paths: &[String]) {
        let keys = KeyPair::from_seed(Seed::new(sha256(peer_id.as_bytes())));
        let public_key = BASE64.encode(keys.pk.as_ref());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set");
        let mut timestamp = u64::try_from(now.as_millis()).expect("a clock that is set");
        let mut sign = |call: &str, fields: &str| {
            timestamp += 1;
            let text = format!(
                "peerix tracker 1\ncall: {call}\npeer_id: {peer_id}\n{fields}timestamp: {timestamp}\n\
                 public_key: {public_key}\n"
            );
            (timestamp, BASE64.encode(keys.sk.sign(text, None).as_ref()))
        };
        let (timestamp, signature) = sign("announce", &format!("port: {port}\naddr: \n"));
        let body = json!({
            "peer_id": peer_id, "port": port,
            "public_key": public_key, "timestamp": timestamp, "signature": signature,
        });
        self.request_ok(
            host,
            "POST",
            "/announce",
            "Content-Type: application/json\r\n",
            body.to_string().as_bytes(),
        );
        let mut filter = BloomFilter::for_paths(paths.len() as u64);
        for path in paths {
            filter
                .insert(&HashPart::parse(world::hash_part(path).as_bytes()).expect("a hash part"));
        }
        let digest = HEXLOWER.encode(&sha256(filter.as_bytes()));
        let (timestamp, signature) = sign("filter", &format!("sha256: {digest}\n"));
        let headers = format!(
            "X-Peerix-Public-Key: {public_key}\r\nX-Peerix-Timestamp: {timestamp}\r\nX-Peerix-Signature: {signature}\r\n"
        );
        self.request_ok(host, "PUT", &format!("/filter/{peer_id}"), &headers, filter.as_bytes());
    }

    /// Sends a request from `host`. Panics if the answer is not 200.
    fn request_ok(&self, host: &Host, method: &str, path: &str, headers: &str, body: &[u8]) {
        let stream = host.connect((self.host.address, PORT)).expect("the tracker is there");
        let mut connection = Connection::new(stream).expect("a connection");
        let answer =
            connection.request_with_body(method, path, headers, body).expect("the tracker answers");
        assert_eq!(answer.status, 200, "{method} {path}: {}", answer.text());
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, bytes);
    digest.as_ref().try_into().expect("it has 32 bytes")
}

fn start(host: &Host) -> Logged {
    make_dir(host, DATABASE.trim_end_matches("/db"));
    let program = binary().expect("PEERIX_TRACKER_BIN is not set");
    let mut command = host.cmd(&program.display().to_string());
    let port = PORT.to_string();
    command.args(["--port", &port, "--host", "0.0.0.0", "--db-path", DATABASE, "--verbose"]);
    let mut program = Logged::start(&host.name, command);
    program.wait_until("the tracker is well", || {
        let answer = http::get(host, (host.address, PORT), "/health").ok()?;
        (answer.status == 200).then_some(())
    });
    program
}

/// The value of `--tracker-url` for a tracker on `host`, running or not.
pub fn url(host: &Host) -> String {
    format!("http://{}:{PORT}", host.address)
}

/// Flags for a peerix on `host` with the host's name as peer ID, which finds peers through trackers
/// on the hosts `trackers`. `mode` is the value of `--mode` (`wan`, `both`).
pub fn flags(host: &Host, mode: &str, trackers: &[&Host]) -> Vec<String> {
    make_dir(host, STATE);
    let fixed = ["--mode", mode, "--peer-id", &host.name, "--state-dir", STATE].map(str::to_owned);
    let urls = trackers.iter().flat_map(|host| ["--tracker-url".to_owned(), url(host)]);
    fixed.into_iter().chain(urls).collect()
}

/// The flags of [`flags`], and those that share every path with everyone.
pub fn open(host: &Host, mode: &str, trackers: &[&Host]) -> Vec<String> {
    let mut flags = flags(host, mode, trackers);
    flags.extend(["--no-verify", "--no-filter"].map(str::to_owned));
    flags
}

fn make_dir(host: &Host, path: &str) {
    std::fs::create_dir_all(host.path(path)).expect("the host's directories");
}
