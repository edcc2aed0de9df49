//! The daemon as `nobody` with a store that belongs to root, in every state in which Nix leaves its
//! database; and store paths that change or disappear while they are sent.

use crate::common::lan::Run;
use crate::common::stock::{self, nar_route};
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, Process, Scale, nix, wait_for};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

const NOBODY: u32 = 65534;
const DB: &str = "/nix/var/nix/db/db.sqlite";
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// A server whose store belongs to root, and a neighbour that sends requests.
struct Scene {
    server: Host,
    neighbour: Host,
    socket: UdpSocket,
    old: String,
    _lan: Lan,
}

impl Scene {
    fn new() -> Scene {
        let lan = Lan::new().with_scale(Scale::without_timeouts());
        let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
        stock::ready(&server);
        let old =
            stock::add(&server, "old", "mkdir $n; seq 100000 > $n/numbers; ln -s numbers $n/link");
        let socket = neighbour.udp(PORT);
        Scene { server, neighbour, socket, old, _lan: lan }
    }

    /// The files of SQLite beside the database that exist now.
    fn beside(&self) -> Vec<&'static str> {
        let there = |end: &&str| self.server.path(&format!("{DB}{end}")).exists();
        ["-wal", "-shm"].into_iter().filter(there).collect()
    }

    fn start(&self) -> Daemon {
        let daemon = Daemon::start_as(&self.server, NOBODY, &[]);
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid())).unwrap();
        assert!(status.contains("Uid:\t65534\t65534\t65534\t65534"), "not nobody:\n{status}");
        daemon
    }

    /// Checks that `path` is found by UDP, and that its NAR by HTTP equals Nix's own.
    fn assert_served(&self, path: &str) {
        assert!(stock::query_has(&self.socket, &self.server, path), "{path}: have not");
        self.assert_nar_served(path);
    }

    /// Checks that the NAR of `path` by HTTP equals Nix's own.
    fn assert_nar_served(&self, path: &str) {
        let route = nar_route(&self.neighbour, &self.server, path);
        let nar =
            crate::common::http::get(&self.neighbour, (self.server.address, PORT), &route).unwrap();
        assert!(nar.status == 200 && nar.whole, "{path}: {}", nar.status);
        assert!(nar.body == stock::dump(&self.server, path), "{path}: another NAR");
    }

    /// Checks that old paths and a path registered just now are served, and that a deleted path is
    /// a miss.
    fn serves(&self, round: &str) {
        self.assert_served(&self.old);
        let new = stock::add(&self.server, &format!("new-{round}"), &format!("echo {round} > $n"));
        self.assert_served(&new);
        self.server.cmd("nix-store").args(["--delete", &new]).okay();
        assert!(!stock::query_has(&self.socket, &self.server, &new), "{new} is gone");
        assert_eq!(stock::narinfo(&self.neighbour, &self.server, &new).status, 404);
    }
}

/// Starts a multi-user nix-daemon and waits until it listens.
fn nix_daemon(host: &Host) -> Process {
    let process = host.spawn_sh("exec nix-daemon 2> /tmp/nix-daemon");
    wait_for("nix-daemon listens", || host.path(DAEMON_SOCKET).exists().then_some(()));
    process
}

#[test]
fn closed_database_is_read_as_immutable() {
    let scene = Scene::new();
    assert!(scene.beside().is_empty(), "Nix left {:?} behind", scene.beside());
    let daemon = scene.start();
    scene.serves("none");
    assert!(daemon.log().contains("read as immutable"));
    assert!(scene.beside().is_empty());
}

#[test]
fn database_with_partial_wal_files_is_served() {
    let scene = Scene::new();
    for (round, files) in [("wal", &["-wal"][..]), ("shm", &["-shm"]), ("both", &["-wal", "-shm"])]
    {
        for end in files {
            scene.server.write(&format!("{DB}{end}"), "");
        }
        let _daemon = scene.start();
        scene.assert_served(&scene.old);
        // Reading must not change the files under test.
        assert_eq!(scene.beside(), files, "{round}");
        scene.serves(round);
        for end in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(scene.server.path(&format!("{DB}{end}")));
        }
    }
}

#[test]
fn idle_nix_daemon_opens_database_for_peerix() {
    let scene = Scene::new();
    let mut nix_daemon = nix_daemon(&scene.server);
    // nix-daemon listens with the database closed; peerix connects to it, so that it opens it.
    assert!(scene.beside().is_empty());
    let daemon = scene.start();
    scene.serves("daemon");
    assert!(daemon.log().contains("after nix-daemon had opened it"));
    // The files stay, also after nix-daemon ends.
    assert_eq!(scene.beside(), ["-wal", "-shm"]);
    nix_daemon.kill();
    scene.serves("ended");
    // A user of the machine adds a path through nix-daemon.
    std::fs::remove_file(scene.server.path(DAEMON_SOCKET)).unwrap();
    let _again = self::nix_daemon(&scene.server);
    scene.server.write("/tmp/user", "by a user");
    let add = scene
        .server
        .cmd_as(NOBODY, "nix-store")
        .env("NIX_REMOTE", "daemon")
        .env("HOME", "/tmp")
        .args(["--add", "/tmp/user"])
        .okay();
    scene.assert_served(add.trim());
}

#[test]
fn paths_are_found_while_nix_writes() {
    let scene = Scene::new();
    let writer = "cd /tmp; n=0; while :; do n=$((n+1)); echo $n > written; nix-store --add written > /tmp/last.part && mv /tmp/last.part /tmp/last; done";
    let writer = scene.server.spawn_sh(writer);
    let daemon = scene.start();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..30 {
        // Another process registered the path just now.
        let path = wait_for("another path is registered", || {
            let path =
                std::fs::read_to_string(scene.server.path("/tmp/last")).ok()?.trim().to_owned();
            seen.insert(path.clone()).then_some(path)
        });
        wait_until_found_and_served(&scene, &path);
    }
    for _ in 0..20 {
        wait_until_found_and_served(&scene, &scene.old);
    }
    drop(writer);
    let log = daemon.log();
    assert!(
        log.lines()
            .all(|line| !line.contains("error:") || line.contains("no other process has it open"))
    );
    scene.serves("after");
}

/// Waits until `path` is found by UDP, and checks its NAR. Between two writers, only root can open
/// the database. A UDP query waits for it at most 50 ms, so its answer may be *have not* for a
/// moment. HTTP waits longer.
fn wait_until_found_and_served(scene: &Scene, path: &str) {
    wait_for("it is found", || stock::query_has(&scene.socket, &scene.server, path).then_some(()));
    scene.assert_nar_served(path);
}

/// Begins a NAR and reads 1 MiB of it. Returns the stream and the number of missing bytes.
fn begin(scene: &Scene, path: &str) -> (TcpStream, usize) {
    let route = nar_route(&scene.neighbour, &scene.server, path);
    let size: usize =
        stock::line(&stock::narinfo(&scene.neighbour, &scene.server, path).text(), "NarSize")
            .parse()
            .unwrap();
    let mut stream = scene.neighbour.connect((scene.server.address, PORT)).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    write!(stream, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut begun = vec![0; 1 << 20];
    stream.read_exact(&mut begun).unwrap();
    assert!(begun.starts_with(b"HTTP/1.1 200 "));
    let head = begun.windows(4).position(|window| window == b"\r\n\r\n").unwrap() + 4;
    (stream, size - (begun.len() - head))
}

/// Checks that the connection ends before the whole NAR has arrived.
fn assert_nar_truncated((mut stream, missing): (TcpStream, usize), what: &str) {
    let mut rest = Vec::new();
    // A connection reset also ends the NAR early.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < missing, "{what}: completed, {} bytes", rest.len());
}

#[test]
fn changed_path_cuts_running_nar() {
    const MIB: u32 = 64;
    let scene = Scene::new();
    // The usual state: nix-daemon runs, and has the database open.
    let _nix_daemon = nix_daemon(&scene.server);
    let daemon = scene.start();
    // Control: without a change the stream arrives whole.
    let path = stock::add_large(&scene.server, "kept", MIB);
    let (mut stream, missing) = begin(&scene, &path);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), missing);

    // Nix spares files that a process has open, but does not see processes in other containers.
    let deleted = |path: &str| {
        scene.server.cmd("nix-store").args(["--delete", "--ignore-liveness", path]).okay()
    };
    let path = stock::add_large(&scene.server, "file", MIB);
    let begun = begin(&scene, &path);
    deleted(&path);
    // The open file still has all its bytes. The stream ends because the path is no longer valid.
    assert_nar_truncated(begun, "a file that was collected");

    let make = "mkdir $n; seq 100000000 | head -c 64M > $n/a; echo b > $n/b; seq 100000 > $n/c";
    let path = stock::add(&scene.server, "directory", make);
    let begun = begin(&scene, &path);
    deleted(&path);
    assert_nar_truncated(begun, "a directory that was collected");

    let path = stock::add_large(&scene.server, "shorter", MIB);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("truncate -s 32M {path}"));
    assert_nar_truncated(begun, "a file that became shorter");

    let path = stock::add(&scene.server, "fewer", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("truncate -s 5 {path}/c"));
    assert_nar_truncated(begun, "a later file that became shorter");

    let path = stock::add(&scene.server, "more", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("echo much more >> {path}/b"));
    assert_nar_truncated(begun, "a later file that became longer");

    let path = stock::add(&scene.server, "swapped", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("rm {path}/c; ln -s /etc/passwd {path}/c"));
    assert_nar_truncated(begun, "a file that became a symlink");

    let log = daemon.log();
    assert!(log.contains("NAR cut: "));
    scene.serves("after");
}

#[test]
fn unreadable_path_is_a_miss() {
    let scene = Scene::new();
    let daemon = scene.start();
    scene.assert_served(&scene.old);
    // A path with a file that only root can read is a miss. Peers must never get an empty or short
    // archive as a whole one.
    let secret = stock::add(&scene.server, "secret", "echo secret > $n");
    scene.server.sh(&format!("chmod 600 {secret}"));
    let route = nar_route(&scene.neighbour, &scene.server, &secret);
    let answer =
        crate::common::http::get(&scene.neighbour, (scene.server.address, PORT), &route).unwrap();
    assert_eq!(answer.status, 404);
    assert!(daemon.log().contains(&format!("{secret}: ")));
    nix::assert_nothing_but(&scene.server, &[scene.old.clone(), secret]);
}
