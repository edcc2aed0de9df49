//! A network of machines on one machine, for tests, benchmarks and the demonstration.
//!
//! * [`Lan`] and [`Host`]: each host is a network, mount and process namespace with a root
//!   directory and a `/nix` of its own, joined by a bridge. Nothing outside the namespaces is
//!   touched, and the kernel ends everything in them when this process ends, however it ends.
//! * [`Wan`], [`Nat`]: several such networks, joined by a router or behind one.
//! * [`fault`]: what networks and machines do: loss, delay, slow links, pulled cables, silence,
//!   busy processors.
//! * [`Holder`] and [`Asker`]: hosts that have everything, and hosts that want it. [`Bystander`]:
//!   hosts that have nothing, and are asked.
//! * [`Browser`]: a real Chromium on a host.
//! * [`World`]: real store paths made by real Nix, kept between runs.
//! * [`Daemon`]: a running peerix. [`Tracker`]: a running tracker. [`nix`]: Nix as a client.
//! * [`solo`]: a tracker on loopback, without any of that.
//! * [`http`], [`packet`], [`standin`]: a few lines of HTTP and UDP of our own, for peers that
//!   misbehave and for the original peerix.
//!
//! Needs root, or `unshare --map-root-user --net --mount`. The Nix is the one on `PATH`, or that of
//! `NIX_BIN_DIR` (also one inside a debootstrap directory); the daemon is the one cargo built, or
//! `PEERIX_BIN`, and so is the tracker, or `PEERIX_TRACKER_BIN`.

// Each test program uses a part of this.
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

/// The port every peerix listens on, TCP and UDP.
pub const PORT: u16 = 12304;

/// The longest that a test waits for anything. It bounds a hang: no test depends on how fast the
/// machine is, or on how much else it has to do.
pub const DEADLINE: Duration = Duration::from_secs(300);

/// Asks `done` until it answers, and panics after [`DEADLINE`].
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_with_pause(Duration::from_millis(2), what, done)
}

/// Asks `done` ten times a second until it answers, and panics after [`DEADLINE`]: for what a
/// tracker is asked, which limits the rate.
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

/// Where fixtures and logs are kept: cargo's directory for tests, or `PEERIX_TEST_DIR`.
pub fn directory() -> PathBuf {
    let dir = std::env::var_os("PEERIX_TEST_DIR")
        .map(PathBuf::from)
        .or_else(|| option_env!("CARGO_TARGET_TMPDIR").map(PathBuf::from))
        .expect("PEERIX_TEST_DIR is not set");
    std::fs::create_dir_all(&dir).expect("the directory for fixtures can be made");
    dir
}

/// Lines of a log, or of what a program said, that a failing test shows.
const SHOWN_LINES: usize = 40;

/// The last lines of a text, as many as a failing test shows.
pub fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    let omitted = lines.len().saturating_sub(SHOWN_LINES);
    let note =
        if omitted > 0 { format!("[{omitted} lines before these]\n") } else { String::new() };
    note + &lines[omitted..].join("\n")
}

/// Where the programs under test are.
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
