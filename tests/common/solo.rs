//! A tracker on the loopback interface of a network namespace of its own, with clients on any of
//! its addresses. Tests announce addresses that do not exist, and the tracker tries to reach them:
//! in this namespace that fails at once, and no packet leaves the machine.

use super::http::{Answer, Connection};
use super::lan::Scale;
use super::process::status_number;
use super::thread::test_name;
use super::{directory, last_lines, tracker, wait_for};
use peerix::wire::tracker::{
    Announce, Identity, KEY_HEADER, Proof, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER,
};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A temporary directory. Dropping it removes it.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates a directory.
    pub fn new() -> TempDir {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = directory().join(format!("tracker-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory");
        TempDir(path)
    }

    /// The path of the file `name` in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A running tracker on a free port. Dropping it kills it, and prints the end of its log if the
/// test failed.
pub struct LoopbackTracker {
    child: Child,
    log: PathBuf,
    /// TCP port.
    pub port: u16,
}

/// The tracker program with these arguments, not started.
pub fn command(args: &[&str]) -> Command {
    let mut command = Command::new(tracker::binary().expect("PEERIX_TRACKER_BIN is not set"));
    command.args(args).stdin(Stdio::null()).env_remove("RUST_LOG");
    command
}

/// Moves the calling thread to a new network namespace whose loopback interface is up. Does nothing
/// if the thread is in one already.
fn enter_own_network() {
    thread_local!(static IS_IN: Cell<bool> = const { Cell::new(false) });
    if !IS_IN.replace(true) {
        // SAFETY: unlike NEWNS and FILES, NEWNET takes nothing from this thread that others use.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
            .expect("a network namespace: run as root or under unshare");
        let status = Command::new("ip").args(["link", "set", "lo", "up"]).status();
        assert!(status.expect("ip starts (it is in iproute2)").success());
    }
}

impl LoopbackTracker {
    /// Starts a tracker with the database `db` and waits until it serves.
    pub fn start(db: &Path) -> LoopbackTracker {
        LoopbackTracker::start_with(db, Scale::default())
    }

    /// Starts a tracker with scaled times and waits until it serves.
    pub fn start_with(db: &Path, scale: Scale) -> LoopbackTracker {
        LoopbackTracker::flagged(db, scale, &[])
    }

    /// Starts a tracker with scaled times and additional flags, and waits until it serves. The
    /// calling thread, and threads that it starts from then on, are in the tracker's network.
    pub fn flagged(db: &Path, scale: Scale, flags: &[&str]) -> LoopbackTracker {
        enter_own_network();
        let log = db.with_extension("log");
        let file = File::create(&log).expect("a log");
        let mut command = command(&["--port", "0", "--host", "127.0.0.1", "--db-path"]);
        command.arg(db).args(flags).envs(scale.variables()).stdout(Stdio::null()).stderr(file);
        let mut child = command.spawn().expect("the tracker starts");
        let port = wait_for("a tracker that serves", || {
            let said = fs::read_to_string(&log).expect("its log");
            if let Some(status) = child.try_wait().expect("it is ours") {
                panic!("the tracker ended: {status}\n{said}");
            }
            let (_, rest) = said.split_once("serves on port ")?;
            rest.split_once('\n')?.0.parse().ok()
        });
        LoopbackTracker { child, log, port }
    }

    /// Process ID.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends `SIGKILL` and waits until the process has ended.
    pub fn kill(&mut self) {
        self.child.kill().expect("it is ours");
        self.child.wait().expect("it is ours");
    }

    /// Sends `SIGTERM` and waits until the process has ended. Panics after `DEADLINE`.
    pub fn terminate(&mut self) -> ExitStatus {
        let pid =
            i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).expect("a process id");
        kill_process(pid, Signal::TERM).expect("it is ours, and not yet reaped");
        wait_for("a tracker that was asked to stop", || self.child.try_wait().expect("it is ours"))
    }

    /// The exit status, if the process has ended. Does not block.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("it is ours")
    }

    /// The whole log so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Resident memory, in bytes.
    pub fn rss(&self) -> u64 {
        status_number(self.pid(), "VmRSS") * 1024
    }

    /// Connects from the loopback address `from`.
    pub fn connect_from(&self, from: Ipv4Addr) -> io::Result<Connection> {
        connect(self.port, from)
    }

    /// Connects from a loopback address that this process has not used before.
    pub fn connect(&self) -> Connection {
        self.connect_from(fresh_source()).expect("the tracker listens")
    }

    /// Sends a `GET` from a new address. Panics if the answer is not 200 with JSON.
    pub fn get(&self, path: &str) -> Value {
        let answer = self.connect().get(path).expect("the tracker answers");
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        serde_json::from_slice(&answer.body).expect("JSON")
    }
}

impl Drop for LoopbackTracker {
    fn drop(&mut self) {
        // `kill` fails if the process was reaped already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let panicked = !std::thread::panicking() && self.log().contains(" panicked at ");
        if panicked || std::thread::panicking() {
            eprintln!("---- {}: log of the tracker\n{}", test_name(), last_lines(&self.log()));
        }
        assert!(!panicked, "the tracker panicked");
    }
}

/// Connects to a port of 127.0.0.1 from the loopback address `from`. Times out after 10 s.
pub fn connect(port: u16, from: Ipv4Addr) -> io::Result<Connection> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
    // Without this, ports in TIME_WAIT are exhausted on addresses that were used before.
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddrV4::new(from, 0).into())?;
    let to: SocketAddr = (Ipv4Addr::LOCALHOST, port).into();
    socket.connect_timeout(&to.into(), Duration::from_secs(10))?;
    Connection::new(socket.into())
}

/// A different loopback address at each call.
pub fn fresh_source() -> Ipv4Addr {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    Ipv4Addr::from_bits(0x7f0a_0001 + COUNT.fetch_add(1, Ordering::Relaxed))
}

/// A loopback address in a different /24 at each call.
pub fn fresh_network() -> Ipv4Addr {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    Ipv4Addr::from_bits(0x7f40_0001 + (COUNT.fetch_add(1, Ordering::Relaxed) << 8))
}

/// A key with a seed derived from `number`.
pub fn identity(number: u64) -> Identity {
    let mut seed = [0x5a; Identity::SEED_LEN];
    seed[..8].copy_from_slice(&number.to_le_bytes());
    Identity::from_seed(&seed)
}

/// Milliseconds since the Unix epoch.
pub fn clock() -> u64 {
    u64::try_from(
        SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock that is set").as_millis(),
    )
    .expect("small")
}

/// Milliseconds since the Unix epoch, but at least one more than at the last call.
pub fn stamp() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    let now = clock();
    LAST.fetch_max(now, Ordering::Relaxed);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// The JSON body of an announce.
pub fn announce(peer_id: &str, port: u16, addr: &str, proof: Proof) -> Vec<u8> {
    let (peer_id, addr) = (Some(peer_id.into()), Some(addr.into()));
    let body = Announce { peer_id, port: Some(port), addr, instance: None, proof };
    serde_json::to_vec(&body).expect("JSON")
}

/// The JSON body of an announce, signed with the current time.
pub fn signed_announce(key: &Identity, peer_id: &str, port: u16, addr: &str) -> Vec<u8> {
    let proof = key.sign(&SignedText::Announce { peer_id, port, addr }, stamp());
    announce(peer_id, port, addr, proof)
}

/// The JSON body of a transfer report, signed with the current time.
pub fn signed_report(
    key: &Identity,
    transfer_id: u64,
    peer_id: &str,
    role: &str,
    bytes: u64,
) -> Vec<u8> {
    let proof = key.sign(&SignedText::Report { transfer_id, peer_id, role, bytes }, stamp());
    let mut body = serde_json::to_value(proof).expect("JSON");
    body["transfer_id"] = transfer_id.into();
    body["peer_id"] = peer_id.into();
    body["role"] = role.into();
    body["bytes"] = bytes.into();
    body.to_string().into_bytes()
}

/// The header lines that carry the signature of a filter.
pub fn filter_headers(proof: &Proof) -> String {
    let text = |field: &Option<String>| field.clone().unwrap_or_default();
    format!(
        "{KEY_HEADER}: {}\r\n{TIMESTAMP_HEADER}: {}\r\n{SIGNATURE_HEADER}: {}\r\n",
        text(&proof.public_key),
        proof.timestamp.unwrap_or_default(),
        text(&proof.signature)
    )
}

/// The header lines that carry the signature of a filter, signed with the current time.
pub fn signed_filter_headers(key: &Identity, peer_id: &str, bits: &[u8]) -> String {
    let digest = ring::digest::digest(&ring::digest::SHA256, bits);
    filter_headers(&key.sign(&SignedText::Filter { peer_id, digest: digest.as_ref() }, stamp()))
}

/// Sends a `POST` with a JSON body.
pub fn post(connection: &mut Connection, path: &str, body: &[u8]) -> Answer {
    connection
        .request_with_body("POST", path, "Content-Type: application/json\r\n", body)
        .expect("the tracker answers")
}
