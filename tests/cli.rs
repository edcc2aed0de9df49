//! The daemon as its user and systemd see it: the command line, what it says when it cannot start, how it stops, and
//! the sockets that outlive it.

use crate::common::daemon::binary;
use crate::common::http::get_local;
use crate::common::lan::Run;
use crate::common::packet::Packet;
use crate::common::process::Logged;
use crate::common::standin::{BROADCAST, receive};
use crate::common::stock::{self, nar_route, narinfo};
use crate::common::world::hash_part;
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, directory, wait_for};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output, Stdio};

/// Runs it here, for what it answers before it touches anything.
fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Checks that a run failed with `status` after saying one line that has all of `words`, and nothing else.
fn assert_one_line(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(said.starts_with("peerix: ") && said.ends_with('\n') && said.lines().count() == 1, "{said:?}");
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn help_and_version() {
    for flag in ["--help", "-h"] {
        let output = run(&[flag]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && output.stderr.is_empty());
        for word in ["--port", "--trusted-public-key", "extra-substituters", "Exit status"] {
            assert!(text.contains(word), "no {word} in\n{text}");
        }
    }
    for flag in ["--version", "-V"] {
        let output = run(&[flag]);
        let expected = format!("peerix {}\n", env!("CARGO_PKG_VERSION"));
        assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap()), (Some(0), expected));
    }
}

#[test]
fn a_wrong_command_line() {
    for (args, names) in [
        (&["--prot", "1"][..], "--prot"),
        (&["word"], "word"),
        (&["-x"], "-x"),
        (&["--port"], "--port"),
        (&["--port", "65536"], "--port 65536"),
        (&["--port", "ten"], "--port ten"),
        (&["--timeout", "0"], "--timeout 0"),
        (&["--bind", "localhost"], "--bind localhost"),
        (&["--peer", "host:0"], "--peer host:0"),
        (&["--mode", "internet"], "--mode internet"),
        (&["--mode", "wan"], "--tracker-url"),
        (&["--tracker-url", "tracker"], "--tracker-url tracker"),
        (&["--trusted-public-key", "key"], "--trusted-public-key key"),
        (&["--store-dir", "store"], "--store-dir store"),
        (&["--filter-patterns"], "--filter-patterns"),
        (&["--verbose=yes"], "--verbose"),
    ] {
        assert_one_line(&run(args), 2, &[names]);
    }
}

/// A host with a path in its store.
fn host(lan: &Lan) -> (Host, String) {
    let host = lan.host("server");
    stock::ready(&host);
    let path = stock::add(&host, "file", "echo file > $n");
    (host, path)
}

/// Runs it on a host where it cannot start.
fn fail(host: &Host, uid: u32, flags: &[&str]) -> Output {
    let mut command = host.cmd_as(uid, "timeout");
    command.arg(DEADLINE.as_secs().to_string()).arg(binary()).args(flags).env("RUST_LOG", "off").ran()
}

#[test]
fn what_keeps_it_from_starting() {
    let lan = Lan::new();
    let (host, _) = host(&lan);
    assert_one_line(&fail(&host, 0, &["--bind", "10.99.99.99"]), 1, &["10.99.99.99", "--bind"]);
    assert_one_line(&fail(&host, 65534, &["--port", "80"]), 1, &["80", "--port"]);

    let taken = host.listen(PORT);
    assert_one_line(&fail(&host, 0, &[]), 1, &["TCP 0.0.0.0:12304", "another", "--port"]);
    drop(taken);
    let taken = host.udp(PORT);
    assert_one_line(&fail(&host, 0, &[]), 1, &["UDP 0.0.0.0:12304", "another", "--port"]);
    drop(taken);

    host.sh("nix-store --generate-binary-cache-key a-1 /etc/good.sec /etc/good.pub; chmod 600 /etc/good.sec");
    host.write("/etc/bad.sec", "a-1:bm9uc2Vuc2U=\n");
    host.write("/etc/huge.sec", vec![b'a'; 1 << 20]);
    for (uid, file, words) in [
        (0, "/etc/missing.sec", &["/etc/missing.sec", "--private-key", "generate-binary-cache-key"][..]),
        (65534, "/etc/good.sec", &["/etc/good.sec", "ermission denied"]),
        (0, "/etc/bad.sec", &["/etc/bad.sec", "key"]),
        (0, "/etc/good.pub", &["/etc/good.pub", "key"]),
        (0, "/etc/huge.sec", &["/etc/huge.sec", "not a key file"]),
        (0, "/etc", &["/etc", "not a key file"]),
        (0, "/dev/zero", &["/dev/zero", "not a key file"]),
    ] {
        let output = fail(&host, uid, &["--private-key", file]);
        assert_one_line(&output, 1, words);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let secret = std::fs::read_to_string(host.path("/etc/good.sec")).unwrap();
        assert!(!said.contains(secret.trim().split_once(':').unwrap().1) && !said.contains("bm9uc2Vuc2U="), "{said}");
    }

    assert_one_line(&fail(&host, 0, &["--db", "/no/db.sqlite"]), 1, &["/no/db.sqlite", "not found", "--db"]);
    host.write("/tmp/other/db.sqlite", "this is no database, and long enough to look like one ".repeat(100));
    assert_one_line(&fail(&host, 0, &["--db", "/tmp/other/db.sqlite"]), 1, &["/tmp/other/db.sqlite"]);
    host.write("/nix/var/nix/db/schema", "9");
    assert_one_line(&fail(&host, 0, &[]), 1, &["schema 10 is needed", "9"]);
    host.write("/nix/var/nix/db/schema", "10");
    host.sh("chmod 700 /nix/var/nix/db");
    assert_one_line(&fail(&host, 65534, &[]), 1, &["/nix/var/nix/db", "readable"]);
    host.sh("chmod 755 /nix/var/nix/db");
    // Nothing of it was the host's fault.
    Daemon::start(&host, &["--private-key", "/etc/good.sec"]);

    host.write("/etc/empty.pub", "\n");
    for (file, words) in [
        ("/etc", &["/etc", "--trusted-public-key-file"][..]),
        ("/etc/empty.pub", &["/etc/empty.pub", "none"]),
        ("/etc/good.sec", &["/etc/good.sec", "key"]),
        ("/dev/zero", &["/dev/zero", "not a key file"]),
    ] {
        assert_one_line(&fail(&host, 0, &["--trusted-public-key-file", file]), 1, words);
    }
    // It kept peerix from starting, and so its port closed.
    let daemon = Daemon::start(&host, &["--trusted-public-key-file", "/etc/missing.pub"]);
    assert!(daemon.log().contains("warn: public key /etc/missing.pub: not there"));
}

/// Reads the head of an answer and a little of its body.
/// Who has another key is another peer to the trackers, so that one that cannot be read is never replaced.
#[test]
fn an_identity_that_cannot_be_had() {
    let lan = Lan::new();
    let (host, _) = host(&lan);
    let wan = |state_dir| ["--mode", "wan", "--tracker-url", "http://10.77.0.9:12305", "--state-dir", state_dir];
    host.write("/var/damaged/identity", "peerix-identity:AAAA\n");
    host.write("/var/file", "");
    host.sh("mkdir -m 755 /var/others; chmod 755 /var/damaged");
    for (uid, state_dir, words) in [
        (0, "/var/damaged", &["/var/damaged/identity", "damaged", "backup", "remove"][..]),
        (0, "/var/file", &["/var/file/identity", "--state-dir"]),
        (65534, "/var/others", &["/var/others/identity", "ermission denied", "--state-dir"]),
    ] {
        assert_one_line(&fail(&host, uid, &wan(state_dir)), 1, words);
    }
    assert_eq!(host.sh("cat /var/damaged/identity"), "peerix-identity:AAAA\n");
    let mut daemon = Daemon::start(&host, &wan("/var/new"));
    // The port takes connections before that.
    wait_for("an identity", || host.path("/var/new/identity").exists().then_some(()));
    assert_eq!(host.sh("stat -c '%a %U' /var/new/identity"), "600 root\n");
    let kept = host.sh("cat /var/new/identity");
    assert!(daemon.stop().success());
    let _daemon = Daemon::start(&host, &wan("/var/new"));
    assert_eq!(host.sh("cat /var/new/identity"), kept);
}

fn begin(stream: &mut TcpStream, route: &str) {
    write!(stream, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut piece = [0; 100_000];
    stream.read_exact(&mut piece).unwrap();
    assert!(piece.starts_with(b"HTTP/1.1 200 "));
}

#[test]
fn stopping_ends_streams_short() {
    const MIB: u32 = 96;
    let lan = Lan::new();
    let (server, _) = host(&lan);
    let neighbour = lan.host("neighbour");
    let path = stock::add_large(&server, "large", MIB);
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start(&server, &[]);
        let route = nar_route(&neighbour, &server, &path);
        let mut streaming = neighbour.connect((server.address, PORT)).unwrap();
        begin(&mut streaming, &route);
        let idle = neighbour.connect((server.address, PORT)).unwrap();
        daemon.signal(signal);
        // It does not wait for a reader that reads nothing meanwhile.
        let status = daemon.stop();
        assert_eq!(status.code(), Some(0));
        let mut rest = Vec::new();
        // A reset is as short as an end.
        let _ = streaming.read_to_end(&mut rest);
        assert!(rest.len() < (MIB as usize - 1) << 20, "the stream was completed: nothing was tested");
        idle.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!((&idle).read(&mut [0]).unwrap_or(0), 0, "an idle connection was left open");
        assert!(neighbour.connect((server.address, PORT)).is_err(), "the port is still open");
    }
}

#[test]
fn neighbours_learn_that_it_leaves() {
    let lan = Lan::new();
    let (server, _) = host(&lan);
    let neighbour = lan.host("neighbour");
    let socket = neighbour.udp(PORT);
    let mut daemon = Daemon::start(&server, &[]);
    assert_eq!(daemon.stop().code(), Some(0));
    let heard: Vec<u8> = std::iter::from_fn(|| receive(&socket, DEADLINE).map(|(_, datagram)| datagram[0]))
        .take_while(|&kind| kind != 4)
        .collect();
    assert!(heard.contains(&3), "no hello before the bye: {heard:?}");
}

#[test]
fn systemd_is_told() {
    let lan = Lan::new();
    let (server, _) = host(&lan);
    let file = directory().join(format!("notify-{}", std::process::id()));
    let _ = std::fs::remove_file(&file);
    let socket = UnixDatagram::bind(&file).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut command = server.cmd(&binary().display().to_string());
    // Discovery turns every five seconds at least; a watchdog asks for a third of its time.
    command.env("NOTIFY_SOCKET", &file).env("WATCHDOG_USEC", "16000000");
    let mut daemon = Logged::start(&server.name, command);
    let hear = |wanted: &str| {
        let mut buffer = [0; 1024];
        loop {
            let length = socket.recv(&mut buffer).unwrap_or_else(|e| panic!("no {wanted}: {e}"));
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if text.lines().any(|line| line == wanted) {
                return;
            }
            assert!(!text.contains("STOPPING"), "{text} instead of {wanted}");
        }
    };
    hear("READY=1");
    // Ready is when it answers.
    let answer = get_local(&server, "/nix-cache-info").unwrap();
    assert_eq!(answer.status, 200);
    hear("WATCHDOG=1");
    hear("WATCHDOG=1");
    daemon.process.signal(Signal::TERM);
    hear("STOPPING=1");
    assert_eq!(wait_for("the end", || daemon.process.ended()).code(), Some(0));
    std::fs::remove_file(&file).unwrap();
}

#[test]
fn sockets_that_systemd_holds() {
    let lan = Lan::new();
    let (server, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    // What systemd does: it holds the sockets, and passes copies to each daemon it starts.
    let (tcp, udp) = (server.listen(PORT), server.udp(PORT));
    let start = |flags: &str| {
        let mut command = server.cmd("bash");
        let peerix = binary().display();
        // The copies come as standard input and output: descriptors that are inherited by number
        // would be inherited by the processes that other tests start at this moment, too.
        command.arg("-ec").arg(format!(
            "exec 3<&0 4<&1 </dev/null >/dev/null; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=tcp:udp
             exec {peerix} {flags}"
        ));
        let copies = [OwnedFd::from(tcp.try_clone().unwrap()), OwnedFd::from(udp.try_clone().unwrap())];
        let [stream, datagram] = copies.map(Stdio::from);
        Logged::start_with(&server.name, command, stream, datagram)
    };
    let query = Packet::Query { id: 9, hash_part: hash_part(&path).into() }.write();
    // `--port` is not what it binds: that port is somebody else's on this host.
    let _somebody = server.listen(PORT + 1);
    let mut daemon = start(&format!("--verbose --port {}", PORT + 1));
    for _ in 0..3 {
        assert_eq!(narinfo(&neighbour, &server, &path).status, 200);
        assert!(stock::has(&neighbour.udp(0), &server, &path));
        assert_eq!(daemon.process.terminate().code(), Some(0));
        // Between two daemons: the connection is made, and the query sent, and both are answered by the next one.
        let asker = neighbour.udp(0);
        asker.send_to(&query, (server.address, PORT)).unwrap();
        let mut waiting = neighbour.connect((server.address, PORT)).expect("the port is never closed");
        write!(waiting, "GET {} HTTP/1.1\r\nConnection: close\r\n\r\n", stock::narinfo_route(&path)).unwrap();
        daemon = start("--verbose");
        waiting.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut answer = String::new();
        waiting.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains(&path), "{answer}");
        wait_for("the query is answered", || {
            let (_, datagram) = receive(&asker, DEADLINE)?;
            (datagram[0] == 1).then_some(())
        });
    }
    drop(daemon);

    // Only one of the two, or another kind, is a mistake in the unit that somebody has to learn of.
    let mut command = server.cmd("bash");
    let peerix = binary().display();
    command
        .arg("-ec")
        .arg(format!("exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec {peerix}"))
        .stdin(OwnedFd::from(tcp))
        .env("RUST_LOG", "off");
    assert_one_line(&command.output().unwrap(), 1, &["ListenDatagram="]);
}

/// With sockets from systemd, `--bind` was ignored without a word; without them, an address that was not there yet was an
/// exit.
#[test]
fn bind_is_kept_for_passed_sockets_and_late_addresses() {
    let lan = Lan::new();
    let (server, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    let (tcp, udp) = (server.listen(PORT), server.udp(PORT));
    let start = |flags: &str| {
        let mut command = server.cmd("bash");
        let peerix = binary().display();
        command.arg("-ec").arg(format!(
            "exec 3<&0 4<&1 </dev/null >/dev/null; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=tcp:udp
             exec {peerix} {flags}"
        ));
        let copies = [OwnedFd::from(tcp.try_clone().unwrap()), OwnedFd::from(udp.try_clone().unwrap())];
        let [stream, datagram] = copies.map(Stdio::from);
        Logged::start_with(&server.name, command, stream, datagram)
    };
    let second = Ipv4Addr::new(10, 77, 0, 200);
    server.net(&format!("ip addr add {second}/24 dev eth0"));
    let local = || get_local(&server, &stock::narinfo_route(&path)).is_ok_and(|answer| answer.status == 200);
    // A connection that is dropped takes as long to fail as it is waited for.
    let connects = |to: Ipv4Addr| {
        let within = std::time::Duration::from_secs(2);
        neighbour.in_net(|| TcpStream::connect_timeout(&(to, PORT).into(), within)).is_ok()
    };
    let mut daemon = start(&format!("--verbose --bind {second}"));
    wait_for("peerix answers", || local().then_some(()));
    assert!(daemon.log().contains(&format!("--bind {second}: systemd passed sockets on 0.0.0.0")), "{}", daemon.log());
    assert!(connects(second) && !connects(server.address));
    // Datagrams to the one address are answered, and to the other not; what everybody hears comes through its interface.
    let asker = neighbour.udp(0);
    let query = |to: Ipv4Addr, id: u32| {
        asker.send_to(&Packet::Query { id, hash_part: hash_part(&path).into() }.write(), (to, PORT)).unwrap();
    };
    query(server.address, 1);
    query(second, 2);
    let first = |asker: &std::net::UdpSocket| {
        let (_, datagram) = receive(asker, DEADLINE).expect("an answer");
        u32::from_be_bytes(datagram[1..5].try_into().unwrap())
    };
    assert_eq!(first(&asker), 2);
    query(BROADCAST, 3);
    assert_eq!(first(&asker), 3);
    assert_eq!(daemon.process.terminate().code(), Some(0));
    // The next one, without the flag, takes it off again.
    let mut daemon = start("--verbose");
    wait_for("peerix answers", || local().then_some(()));
    assert!(connects(second) && connects(server.address));
    assert_eq!(daemon.process.terminate().code(), Some(0));
    drop((tcp, udp));

    // An address that comes later, as by DHCP.
    let late = Ipv4Addr::new(10, 77, 0, 201);
    let daemon = Daemon::start(&server, &["--bind", &late.to_string()]);
    assert!(daemon.log().contains(&format!("--bind {late}: this machine does not have that address")));
    server.net(&format!("ip addr add {late}/24 dev eth0"));
    wait_for("the late address is served", || connects(late).then_some(()));
    assert!(!connects(server.address) && local());
    let asker = neighbour.udp(0);
    wait_for("a query to it is answered", || {
        asker.send_to(&Packet::Query { id: 4, hash_part: hash_part(&path).into() }.write(), (late, PORT)).unwrap();
        receive(&asker, std::time::Duration::from_millis(500))
    });
}
