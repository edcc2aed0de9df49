//! A network of machines on one machine, for tests, benchmarks and the demonstration.
//!
//! * [`Lan`] and [`Host`]: each host is a network, mount and process namespace with a root directory and a
//!   `/nix` of its own, joined by a bridge. Nothing outside the namespaces is touched, and the kernel ends
//!   everything in them when this process ends, however it ends.
//! * [`Wan`], [`Nat`]: several such networks, joined by a router or behind one.
//! * [`fault`]: what networks and machines do: loss, delay, slow links, pulled cables, silence, busy processors.
//! * [`Holder`] and [`Asker`]: hosts that have everything, and hosts that want it.
//! * [`Browser`]: a real Chromium on a host.
//! * [`World`]: real store paths made by real Nix, kept between runs.
//! * [`Daemon`]: a running peerix. [`Tracker`]: a running tracker. [`nix`]: Nix as a client.
//! * [`solo`]: a tracker on loopback, without any of that.
//! * [`http`], [`packet`], [`standin`]: a few lines of HTTP and UDP of our own, for peers that misbehave and for
//!   the original peerix.
//!
//! Needs root, or `unshare --map-root-user --net --mount`. The Nix is the one on `PATH`, or that of
//! `NIX_BIN_DIR` (also one inside a debootstrap directory); the daemon is the one cargo built, or `PEERIX_BIN`,
//! and so is the tracker, or `PEERIX_TRACKER_BIN`.

// Each test program uses a part of this.
#![allow(dead_code, unused_imports)]

pub mod browser;
pub mod daemon;
pub mod fault;
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
pub mod tracker;
pub mod tree;
pub mod wan;
pub mod world;

pub use browser::Browser;
pub use daemon::Daemon;
pub use lan::{Host, Lan};
pub use process::Process;
pub use scene::{Asker, Holder};
pub use tracker::Tracker;
pub use wan::{Nat, Wan};
pub use world::World;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// The port every peerix listens on, TCP and UDP.
pub const PORT: u16 = 12304;

/// How long anything may take to come about that should come about at once, on a machine with other work.
pub const SOON: Duration = Duration::from_secs(30);

/// How long Nix may take for anything, at most, on a bad network: it has nothing like it in mind.
pub const NIX_LIMIT: Duration = Duration::from_secs(120);

/// Asks `done` until it answers, and panics when [`SOON`] is over.
pub fn wait_for<T>(what: &str, done: impl FnMut() -> Option<T>) -> T {
    wait_at_most(SOON, what, done)
}

/// The same for what takes its time by design.
pub fn wait_at_most<T>(limit: Duration, what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    // What may take long is not asked for all the time: a tracker has its limits.
    let pause = if limit > SOON { Duration::from_millis(100) } else { Duration::from_millis(2) };
    loop {
        if let Some(answer) = done() {
            return answer;
        }
        assert!(Instant::now() < deadline, "{what}: not within {limit:?}");
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

/// The name of the running test, which is that of its thread; a helper thread's own name in one.
pub fn test_name() -> String {
    std::thread::current().name().unwrap_or("unnamed").to_owned()
}

/// Where the programs under test are.
fn program_dirs() -> Vec<PathBuf> {
    let programs = [Some(daemon::binary()), tracker::binary()];
    let mut dirs: Vec<PathBuf> =
        programs.into_iter().flatten().map(|path| path.parent().expect("a program is in a directory").into()).collect();
    dirs.dedup();
    dirs
}
