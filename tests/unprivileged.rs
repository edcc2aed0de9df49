//! The daemon as `nobody`, with a store that belongs to root, in every state in which Nix leaves
//! its database; and store paths that are taken away while they are being sent.

use crate::common::lan::Run;
use crate::common::stock::{self, nar_route};
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, Process, Scale, nix, wait_for};
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};

const NOBODY: u32 = 65534;
const DB: &str = "/nix/var/nix/db/db.sqlite";
const DAEMON_SOCKET: &str = "/nix/var/nix/daemon-socket/socket";

/// A server whose store is root's, and who asks it.
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

    /// Files beside the database, as they are now.
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

    /// Checks that `path` is served as Nix has it, found by UDP and fetched by HTTP.
    fn is_served(&self, path: &str) {
        assert!(stock::has(&self.socket, &self.server, path), "{path}: have not");
        self.is_sent(path);
    }

    /// Checks that `path` is fetched by HTTP as Nix has it.
    fn is_sent(&self, path: &str) {
        let route = nar_route(&self.neighbour, &self.server, path);
        let nar =
            crate::common::http::get(&self.neighbour, (self.server.address, PORT), &route).unwrap();
        assert!(nar.status == 200 && nar.whole, "{path}: {}", nar.status);
        assert!(nar.body == stock::dump(&self.server, path), "{path}: another NAR");
    }

    /// Checks it of what was there, of what is registered this moment, and that what was never
    /// there, or is no longer, is missed.
    fn serves(&self, round: &str) {
        self.is_served(&self.old);
        let new = stock::add(&self.server, &format!("new-{round}"), &format!("echo {round} > $n"));
        self.is_served(&new);
        self.server.cmd("nix-store").args(["--delete", &new]).okay();
        assert!(!stock::has(&self.socket, &self.server, &new), "{new} is gone");
        assert_eq!(stock::narinfo(&self.neighbour, &self.server, &new).status, 404);
    }
}

/// A multi-user nix-daemon that listens.
fn nix_daemon(host: &Host) -> Process {
    let process = host.spawn_sh("exec nix-daemon 2> /tmp/nix-daemon");
    wait_for("nix-daemon listens", || host.path(DAEMON_SOCKET).exists().then_some(()));
    process
}

#[test]
fn nobody_has_the_database_open() {
    let scene = Scene::new();
    assert!(scene.beside().is_empty(), "Nix left {:?} behind", scene.beside());
    let daemon = scene.start();
    scene.serves("none");
    assert!(daemon.log().contains("read as immutable"));
    assert!(scene.beside().is_empty());
}

#[test]
fn only_some_of_the_files_are_there() {
    let scene = Scene::new();
    for (round, files) in [("wal", &["-wal"][..]), ("shm", &["-shm"]), ("both", &["-wal", "-shm"])]
    {
        for end in files {
            scene.server.write(&format!("{DB}{end}"), "");
        }
        let _daemon = scene.start();
        scene.is_served(&scene.old);
        // Reading changed nothing, so that this is the state that was tested.
        assert_eq!(scene.beside(), files, "{round}");
        scene.serves(round);
        for end in ["-wal", "-shm"] {
            let _ = std::fs::remove_file(scene.server.path(&format!("{DB}{end}")));
        }
    }
}

#[test]
fn a_nix_daemon_runs() {
    let scene = Scene::new();
    let mut nix_daemon = nix_daemon(&scene.server);
    // It listens, and has the database closed: peerix has it opened.
    assert!(scene.beside().is_empty());
    let daemon = scene.start();
    scene.serves("daemon");
    assert!(daemon.log().contains("after nix-daemon had opened it"));
    // From then on it stays open, also when nix-daemon ends.
    assert_eq!(scene.beside(), ["-wal", "-shm"]);
    nix_daemon.kill();
    scene.serves("ended");
    // Through the daemon, as users of the machine do it.
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
    scene.is_served(add.trim());
}

#[test]
fn nix_writes_all_the_time() {
    let scene = Scene::new();
    let writer = "cd /tmp; n=0; while :; do n=$((n+1)); echo $n > written; nix-store --add written > /tmp/last.part && mv /tmp/last.part /tmp/last; done";
    let writer = scene.server.spawn_sh(writer);
    let daemon = scene.start();
    let mut seen = std::collections::HashSet::new();
    for _ in 0..30 {
        // Registered by another process a moment ago.
        let path = wait_for("another path is registered", || {
            let path =
                std::fs::read_to_string(scene.server.path("/tmp/last")).ok()?.trim().to_owned();
            seen.insert(path.clone()).then_some(path)
        });
        is_found(&scene, &path);
    }
    for _ in 0..20 {
        is_found(&scene, &scene.old);
    }
    drop(writer);
    let log = daemon.log();
    assert!(
        log.lines()
            .all(|line| !line.contains("error:") || line.contains("no other process has it open"))
    );
    scene.serves("after");
}

/// Who asks by UDP waits 50 ms at most, and between one writer's end and the next one's beginning
/// nobody but root may open the database: then this machine has not for a moment. HTTP waits as
/// long as it takes.
fn is_found(scene: &Scene, path: &str) {
    wait_for("it is found", || stock::has(&scene.socket, &scene.server, path).then_some(()));
    scene.is_sent(path);
}

/// Begins a NAR and reads 1 MiB of it.
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

/// Checks that the rest of the NAR does not come whole.
fn is_cut((mut stream, missing): (TcpStream, usize), what: &str) {
    let mut rest = Vec::new();
    // A reset is a cut as well.
    let _ = stream.read_to_end(&mut rest);
    assert!(rest.len() < missing, "{what}: completed, {} bytes", rest.len());
}

#[test]
fn paths_that_go_away_while_they_are_sent() {
    const MIB: u32 = 64;
    let scene = Scene::new();
    // As it mostly is: with nix-daemon, and the database open.
    let _nix_daemon = nix_daemon(&scene.server);
    let daemon = scene.start();
    // The stream is whole if nothing happens, or the rest of this would be no test.
    let path = stock::add_large(&scene.server, "kept", MIB);
    let (mut stream, missing) = begin(&scene, &path);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len(), missing);

    // Nix spares what a process has open, if it sees that process; across containers it does not.
    let deleted = |path: &str| {
        scene.server.cmd("nix-store").args(["--delete", "--ignore-liveness", path]).okay()
    };
    let path = stock::add_large(&scene.server, "file", MIB);
    let begun = begin(&scene, &path);
    deleted(&path);
    // The file is open and all its bytes are there: that it is no longer valid is what counts.
    is_cut(begun, "a file that was collected");

    let make = "mkdir $n; seq 100000000 | head -c 64M > $n/a; echo b > $n/b; seq 100000 > $n/c";
    let path = stock::add(&scene.server, "directory", make);
    let begun = begin(&scene, &path);
    deleted(&path);
    is_cut(begun, "a directory that was collected");

    let path = stock::add_large(&scene.server, "shorter", MIB);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("truncate -s 32M {path}"));
    is_cut(begun, "a file that became shorter");

    let path = stock::add(&scene.server, "fewer", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("truncate -s 5 {path}/c"));
    is_cut(begun, "a later file that became shorter");

    let path = stock::add(&scene.server, "more", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("echo much more >> {path}/b"));
    is_cut(begun, "a later file that became longer");

    let path = stock::add(&scene.server, "swapped", make);
    let begun = begin(&scene, &path);
    scene.server.sh(&format!("rm {path}/c; ln -s /etc/passwd {path}/c"));
    is_cut(begun, "a file that became a symlink");

    let log = daemon.log();
    assert!(log.contains("NAR cut: "));
    scene.serves("after");
}

#[test]
fn a_store_this_user_may_not_read() {
    let scene = Scene::new();
    let daemon = scene.start();
    scene.is_served(&scene.old);
    // Files that only root may read: a miss for whoever asks, and never an empty or short archive
    // taken for whole.
    let secret = stock::add(&scene.server, "secret", "echo secret > $n");
    scene.server.sh(&format!("chmod 600 {secret}"));
    let route = nar_route(&scene.neighbour, &scene.server, &secret);
    let answer =
        crate::common::http::get(&scene.neighbour, (scene.server.address, PORT), &route).unwrap();
    assert_eq!(answer.status, 404);
    assert!(daemon.log().contains(&format!("{secret}: ")));
    nix::assert_nothing_but(&scene.server, &[scene.old.clone(), secret]);
}
