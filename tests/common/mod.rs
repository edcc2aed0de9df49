//! Several machines simulated on one, for the tests, the benchmarks and the demonstration.
//!
//! * [`Lan`] and [`Host`]: each host is a network, mount and process namespace with its own root
//!   directory and `/nix`. A bridge joins the hosts. Nothing outside the namespaces changes, and
//!   the kernel ends everything in them when this process ends, also after a crash.
//! * [`Wan`], [`Nat`]: several such networks behind one router, or one network behind NAT.
//! * [`fault`]: faults of networks and machines: packet loss, delay, slow links, unplugged cables,
//!   silent hosts, busy processors.
//! * [`Holder`], [`Asker`], [`Bystander`]: hosts with all store paths, hosts that fetch them, and
//!   neighbours without any.
//! * [`Browser`]: a real Chromium on a host.
//! * [`World`]: store paths built by real Nix and kept between runs.
//! * [`Daemon`]: a running peerix. [`Tracker`]: a running tracker. [`nix`]: Nix as the client.
//! * [`solo`]: a tracker on the loopback interface, without namespaces.
//! * [`http`], [`packet`], [`standin`]: a minimal implementation of HTTP and of the UDP protocol,
//!   for misbehaving peers and for the original peerix.
//!
//! The namespaces need root, or `unshare --map-root-user --net --mount`. Nix comes from `PATH` or
//! `NIX_BIN_DIR` (which may lie inside a debootstrap directory). The programs under test are those
//! that cargo built, or `PEERIX_BIN` and `PEERIX_TRACKER_BIN`.

// Each test program uses only some of these items.
#![allow(dead_code, unused_imports)]

pub mod browser;
pub mod daemon;
pub mod fault;
pub mod friend;
pub mod http;
pub mod lan;
pub mod nar;
pub mod nix;
pub mod packet;
pub mod process;
pub mod scene;
pub mod solo;
pub mod standin;
pub mod stock;
pub mod thread;
pub mod tracker;
pub mod tree;
pub mod wan;
pub mod world;

pub use browser::Browser;
pub use daemon::Daemon;
pub use lan::{Host, Lan, Scale};
pub use process::Process;
pub use scene::{Asker, Bystander, Holder};
pub use tracker::Tracker;
pub use wan::{Nat, Wan};
pub use world::World;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// TCP and UDP port of every peerix.
pub const PORT: u16 = 12304;

/// Longest wait of a test for any event. A test that reaches it fails. It only bounds hangs: no
/// result depends on the speed or the load of the machine.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Calls `done` every 2 ms until it returns a value. Panics after [`DEADLINE`].
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_with_pause(Duration::from_millis(2), what, done)
}

/// Calls `done` every 100 ms until it returns a value. Panics after [`DEADLINE`]. For requests to a
/// tracker, which limits their rate.
pub fn wait_slowly_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_with_pause(Duration::from_millis(100), what, done)
}

fn wait_with_pause<T>(pause: Duration, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + DEADLINE;
    loop {
        if let Some(answer) = done() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(pause);
    }
}

/// The directory of fixtures and logs: `PEERIX_TEST_DIR`, else cargo's directory for tests.
pub fn directory() -> PathBuf {
    let dir = std::env::var_os("PEERIX_TEST_DIR")
        .map(PathBuf::from)
        .or_else(|| option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from))
        .expect("PEERIX_TEST_DIR is not set");
    std::fs::create_dir_all(&dir).expect("the directory for fixtures can be made");
    dir
}

/// Lines of a log or of a program's output that a failing test prints.
const SHOWN_LINES: usize = 40;

/// The last `SHOWN_LINES` lines of a text.
pub fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let omitted = lines.len().saturating_sub(SHOWN_LINES);
    let note =
        if omitted > 0 { format!("[{omitted} lines before these]\n") } else { String::new() };
    note + &lines[omitted..].join("\n")
}

/// The directories of the programs under test.
fn program_dirs() -> Vec<PathBuf> {
    let programs = [Some(daemon::binary()), tracker::binary()];
    let mut dirs: Vec<PathBuf> = programs
        .into_iter()
        .flatten()
        .map(|path| path.parent().expect("a program is in a directory").into())
        .collect();
    dirs.dedup();
    dirs
}
