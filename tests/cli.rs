//! The daemon as its user and systemd see it: command line, error messages at start, shutdown, and
//! sockets that systemd passes.

use crate::common::daemon::binary;
use crate::common::http::{self, get_local};
use crate::common::lan::Run;
use crate::common::packet::Packet;
use crate::common::process::Logged;
use crate::common::standin::{BROADCAST, receive};
use crate::common::stock::{self, nar_route, narinfo};
use crate::common::world::hash_part;
use crate::common::{DEADLINE, Daemon, Host, Lan, PORT, Scale, directory, wait_for};
use rustix::process::Signal;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::process::{Command, Output, Stdio};

/// Runs the program on this machine, for command lines that end before it opens anything.
fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).stdin(Stdio::null()).output().unwrap()
}

/// Checks that a run exited with `status` and printed one line with all of `words`, to standard
/// error only.
fn assert_one_line(output: &Output, status: i32, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(
        said.starts_with("peerix: ") && said.ends_with('\n') && said.lines().count() == 1,
        "{said:?}"
    );
    for word in words {
        assert!(said.contains(word), "no {word:?} in {said:?}");
    }
    assert!(output.stdout.is_empty());
}

#[test]
fn help_and_version_are_printed() {
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
        assert_eq!(
            (output.status.code(), String::from_utf8(output.stdout).unwrap()),
            (Some(0), expected)
        );
    }
}

#[test]
fn wrong_command_line_exits_with_one_line() {
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

/// Runs the daemon on a host where its start fails.
fn fail(host: &Host, uid: u32, flags: &[&str]) -> Output {
    let mut command = host.cmd_as(uid, "timeout");
    command
        .arg(DEADLINE.as_secs().to_string())
        .arg(binary())
        .args(flags)
        .env("RUST_LOG", "off")
        .ran()
}

#[test]
fn start_failures_exit_with_one_line() {
    let lan = Lan::new();
    let (host, _) = host(&lan);
    assert_one_line(&fail(&host, 65534, &["--port", "80"]), 1, &["80", "--port"]);

    let taken = host.listen(PORT);
    assert_one_line(&fail(&host, 0, &[]), 1, &["TCP 0.0.0.0:12304", "another", "--port"]);
    drop(taken);
    let taken = host.udp(PORT);
    assert_one_line(&fail(&host, 0, &[]), 1, &["UDP 0.0.0.0:12304", "another", "--port"]);
    drop(taken);

    assert_one_line(
        &fail(&host, 0, &["--db", "/no/db.sqlite"]),
        1,
        &["/no/db.sqlite", "not found", "--db"],
    );
    host.write(
        "/tmp/other/db.sqlite",
        "this is no database, and long enough to look like one ".repeat(100),
    );
    assert_one_line(
        &fail(&host, 0, &["--db", "/tmp/other/db.sqlite"]),
        1,
        &["/tmp/other/db.sqlite"],
    );
    host.write("/nix/var/nix/db/schema", "9");
    assert_one_line(&fail(&host, 0, &[]), 1, &["schema 10 is needed", "9"]);
    host.write("/nix/var/nix/db/schema", "10");
    host.sh("chmod 700 /nix/var/nix/db");
    assert_one_line(&fail(&host, 65534, &[]), 1, &["/nix/var/nix/db", "readable"]);
    host.sh("chmod 755 /nix/var/nix/db");
    // The daemon starts once all faults are fixed.
    Daemon::start(&host, &[]);
}

/// Whether `/health` of the daemon on `host` lists the fault `code`.
fn has_fault(host: &Host, code: &str) -> bool {
    let health = get_local(host, "/health").unwrap();
    assert!(health.status == 200 && health.text().starts_with("ok\n"), "{health:?}");
    health.text().lines().any(|line| line.starts_with(&format!("{code}: ")))
}

/// The port stays open with an unusable key. A closed port would stop every build of the machine.
#[test]
fn unusable_key_files_leave_the_port_open_and_reduce_sharing() {
    let lan = Lan::new();
    let (host, addressed) = host(&lan);
    let neighbour = lan.host("neighbour");
    let built = stock::build(&host, "built");
    host.sh("nix-store --generate-binary-cache-key a-1 /etc/good.sec /etc/good.pub; chmod 600 /etc/good.sec");
    host.write("/etc/bad.sec", "a-1:bm9uc2Vuc2U=\n");
    host.write("/etc/huge.sec", vec![b'a'; 1 << 20]);
    host.write("/etc/placeholder.sec", "missing");
    host.write("/etc/empty.pub", "\n");
    let secret = std::fs::read_to_string(host.path("/etc/good.sec")).unwrap();
    let secret = secret.trim().split_once(':').unwrap().1.to_owned();
    for (uid, flag, file, words) in [
        (
            0,
            "--private-key",
            "/etc/missing.sec",
            &["/etc/missing.sec", "--private-key", "generate-binary-cache-key"][..],
        ),
        (65534, "--private-key", "/etc/good.sec", &["/etc/good.sec", "ermission denied"]),
        (0, "--private-key", "/etc/bad.sec", &["/etc/bad.sec", "key"]),
        (0, "--private-key", "/etc/good.pub", &["/etc/good.pub", "key"]),
        (0, "--private-key", "/etc/huge.sec", &["/etc/huge.sec", "not a key file"]),
        (0, "--private-key", "/etc", &["/etc", "not a key file"]),
        (0, "--private-key", "/dev/zero", &["/dev/zero", "not a key file"]),
        (0, "--private-key", "/etc/placeholder.sec", &["systemd", "is missing"]),
        (0, "--trusted-public-key-file", "/etc/missing.pub", &["/etc/missing.pub", "No such file"]),
        (0, "--trusted-public-key-file", "/etc/empty.pub", &["/etc/empty.pub", "none"]),
        (0, "--trusted-public-key-file", "/etc/good.sec", &["/etc/good.sec", "key"]),
    ] {
        let daemon = Daemon::start_as(&host, uid, &[flag, file]);
        let code = if flag == "--private-key" { "private-key" } else { "public-key" };
        assert!(has_fault(&host, code), "{file}");
        assert_eq!(get_local(&host, "/nix-cache-info").unwrap().status, 200);
        let log = daemon.log();
        let errors: Vec<&str> = log.lines().filter(|line| line.starts_with("error: ")).collect();
        assert!(
            errors.len() == 1 && words.iter().all(|word| errors[0].contains(word)),
            "{errors:?}"
        );
        assert!(!log.contains(&secret) && !log.contains("bm9uc2Vuc2U="), "{log}");
        let withheld = flag == "--private-key";
        assert_eq!(
            narinfo(&neighbour, &host, &built).status,
            if withheld { 404 } else { 200 },
            "{file}"
        );
        assert_eq!(stock::query_has(&neighbour.udp(0), &host, &built), !withheld, "{file}");
        assert_eq!(narinfo(&neighbour, &host, &addressed).status, 200, "{file}");
    }
}

#[test]
fn late_key_is_used_without_a_restart() {
    let lan = Lan::new().with_scale(Scale::intervals(0.02));
    let (host, _) = host(&lan);
    let neighbour = lan.host("neighbour");
    let built = stock::build(&host, "built");
    let daemon = Daemon::start(
        &host,
        &["--private-key", "/etc/late.sec", "--trusted-public-key-file", "/etc/late.pub"],
    );
    assert!(has_fault(&host, "private-key") && has_fault(&host, "public-key"));
    host.sh("nix-store --generate-binary-cache-key late-1 /etc/late.sec /etc/late.pub");
    wait_for("the keys are read", || {
        (!has_fault(&host, "private-key") && !has_fault(&host, "public-key")).then_some(())
    });
    let signed = narinfo(&neighbour, &host, &built).text();
    assert!(signed.contains("\nSig: late-1:"), "{signed}");
    assert!(stock::query_has(&neighbour.udp(0), &host, &built));
    assert!(daemon.log().contains("no longer so: private key /etc/late.sec"));
    let status = crate::common::daemon::status(&host);
    assert!(
        status["node"]["signs"] == true
            && status["node"]["trusted_keys"].to_string().contains("late-1")
    );
}

/// The daemon never replaces an unreadable identity, because trackers treat a new key as a new
/// peer.
#[test]
fn unusable_identity_disables_wan_but_not_lan() {
    let lan = Lan::new().with_scale(Scale::intervals(0.02));
    let (host, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    let flags = |state_dir| {
        ["--mode", "both", "--tracker-url", "http://10.77.0.9:12305", "--state-dir", state_dir]
    };
    host.write("/var/damaged/identity", "peerix-identity:AAAA\n");
    host.write("/var/file", "");
    host.sh("mkdir -m 755 /var/others; chmod 755 /var/damaged");
    for (uid, state_dir, words) in [
        (0, "/var/file", &["/var/file/identity", "--state-dir"][..]),
        (65534, "/var/others", &["/var/others/identity", "ermission denied", "--state-dir"]),
        (0, "/var/damaged", &["/var/damaged/identity", "damaged", "backup", "remove"]),
    ] {
        let mut daemon = Daemon::start_as(&host, uid, &flags(state_dir));
        assert!(has_fault(&host, "identity"), "{state_dir}");
        let log = daemon.log();
        let errors: Vec<&str> =
            log.lines().filter(|line| line.contains("error: identity")).collect();
        assert!(
            errors.len() == 1 && words.iter().all(|word| errors[0].contains(word)),
            "{errors:?}"
        );
        assert_eq!(narinfo(&neighbour, &host, &path).status, 200);
        let trackers =
            || crate::common::daemon::status(&host)["trackers"].as_array().unwrap().len();
        assert_eq!(trackers(), 0);
        if state_dir != "/var/damaged" {
            assert!(daemon.stop().success());
            continue;
        }
        // The identity is repaired while the daemon runs. It restarts without closing its port.
        assert_eq!(host.sh("cat /var/damaged/identity"), "peerix-identity:AAAA\n");
        host.sh("rm /var/damaged/identity");
        let has_trackers = |status: serde_json::Value| {
            status["trackers"].as_array().is_some_and(|all| all.len() == 1)
        };
        wait_for("WAN is on", || {
            crate::common::daemon::try_status(&host).filter(|s| has_trackers(s.clone())).map(drop)
        });
        wait_for("no fault is left", || {
            assert!(host.connect_local().is_ok(), "the port is closed");
            (get_local(&host, "/health").ok()?.text() == "ok\n").then_some(())
        });
        assert_eq!(host.sh("stat -c '%a %U' /var/damaged/identity"), "600 root\n");
        let kept = host.sh("cat /var/damaged/identity");
        assert_eq!(narinfo(&neighbour, &host, &path).status, 200);
        assert!(daemon.stop().success());
        let _daemon = Daemon::start(&host, &flags(state_dir));
        assert_eq!(host.sh("cat /var/damaged/identity"), kept);
    }
}

/// The daemon retries an unusable identity and reports it in `/health`, without a restart.
#[test]
fn unusable_identity_disables_friends_until_repaired() {
    let lan = Lan::new().with_scale(Scale::intervals(0.02));
    let (host, _) = host(&lan);
    host.write("/var/damaged/identity", "peerix-identity:AAAA\n");
    let friend = "laptop=ed25519:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=";
    let _daemon = Daemon::start(&host, &["--state-dir", "/var/damaged", "--friend", friend]);
    assert!(has_fault(&host, "identity"));
    let friends = |status: &serde_json::Value| status["friends"].as_array().unwrap().len();
    assert_eq!(friends(&crate::common::daemon::status(&host)), 0);
    host.sh("rm /var/damaged/identity");
    wait_for("there are friends", || {
        crate::common::daemon::try_status(&host).filter(|status| friends(status) == 1).map(drop)
    });
    wait_for("no fault is left", || {
        (!get_local(&host, "/health").ok()?.text().contains("identity")).then_some(())
    });
}

/// `--metrics` lets a Prometheus on another machine read the metrics.
#[test]
fn metrics_flag_serves_metrics_to_others() {
    let lan = Lan::new().with_scale(Scale::intervals(0.02));
    let (host, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    let ask = |port, route: &str| crate::common::http::get(&neighbour, (host.address, port), route);
    let taken = host.listen(9100);
    let mut daemon = Daemon::start(&host, &["--metrics", &format!("{}:9100", host.address)]);
    // A failure of the metrics listener affects nothing else.
    assert!(has_fault(&host, "metrics"));
    assert_eq!(narinfo(&neighbour, &host, &path).status, 200);
    drop(taken);
    wait_for("it is listened there", || (!has_fault(&host, "metrics")).then_some(()));
    let metrics = ask(9100, "/metrics").unwrap();
    assert!(
        metrics.status == 200 && metrics.text().contains("\npeerix_received_bytes_total"),
        "{metrics:?}"
    );
    assert_eq!(ask(9100, "/health").unwrap().text(), "ok\n");
    // The metrics port serves nothing else, and the main port still refuses metrics to others.
    let route = stock::narinfo_route(&path);
    for route in ["/", "/status.json", "/nix-cache-info", &route] {
        assert_eq!(ask(9100, route).unwrap().status, 404, "{route}");
    }
    assert_eq!(ask(PORT, "/metrics").unwrap().status, 403);
    assert!(
        host.connect((std::net::Ipv4Addr::LOCALHOST, 9100)).is_err(),
        "it listens at another address too"
    );
    assert!(daemon.stop().success());
}

/// Holds the sockets like systemd, and passes copies to each daemon.
struct HeldSockets(std::net::TcpListener, std::net::UdpSocket);

impl HeldSockets {
    fn start(&self, host: &Host, flags: &str) -> Logged {
        let mut command = host.cmd("bash");
        let peerix = binary().display();
        // The copies are passed as standard input and output. Processes that other tests start at
        // the same time would inherit other descriptors too.
        command.arg("-ec").arg(format!(
            "exec 3<&0 4<&1 </dev/null >/dev/null; export LISTEN_PID=$$ LISTEN_FDS=2 LISTEN_FDNAMES=tcp:udp
             exec {peerix} {flags}"
        ));
        let copies = [
            OwnedFd::from(self.0.try_clone().unwrap()),
            OwnedFd::from(self.1.try_clone().unwrap()),
        ];
        let [stream, datagram] = copies.map(Stdio::from);
        Logged::start_with(&host.name, command, stream, datagram)
    }
}

/// The port stays open with an unknown flag in the unit. Without a listener, Nix fails or waits.
#[test]
fn daemon_with_passed_sockets_and_a_fault_answers_misses() {
    let lan = Lan::new().with_scale(Scale::intervals(0.02));
    let (server, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    let sockets = HeldSockets(server.listen(PORT), server.udp(PORT));
    let route = format!("/{}.narinfo", hash_part(&path));
    let misses = |code: &str, words: &[&str]| {
        let health = wait_for("an answer", || get_local(&server, "/health").ok());
        assert!(
            health.status == 503 && health.text().starts_with(&format!("{code}: ")),
            "{health:?}"
        );
        assert!(words.iter().all(|word| health.text().contains(word)), "{health:?}");
        assert_eq!(get_local(&server, &route).unwrap().status, 404);
        assert_eq!(narinfo(&neighbour, &server, &path).status, 404);
        // Other machines get no details.
        for route in ["/", "/status.json", "/health"] {
            let answer =
                crate::common::http::get(&neighbour, (server.address, PORT), route).unwrap();
            assert_eq!((answer.status, answer.text().as_str()), (404, "not found\n"));
        }
        let page = get_local(&server, "/").unwrap().text();
        assert!(
            words.iter().all(|word| page.contains(word))
                && page.contains("id=\"last-asked\">never<"),
            "{page}"
        );
    };

    let mut daemon =
        sockets.start(&server, "--mode lan --flag-of-tomorrow=x --priority 33 --interface '!eth0'");
    misses("flags", &["--flag-of-tomorrow", "no such option"]);
    let info = get_local(&server, "/nix-cache-info").unwrap().text();
    assert!(info.contains("StoreDir: /nix/store\n") && info.contains("Priority: 33\n"), "{info}");
    assert!(daemon.log().contains("--option substituters ''"), "{}", daemon.log());
    // A local build succeeds, and `doctor` says why the daemon gets nothing from peers.
    crate::common::nix::configure_client(&server, "", &[]);
    stock::build(&server, "local");
    let output = server.cmd(&binary().display().to_string()).arg("doctor").ran();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("FAIL  flags: --flag-of-tomorrow") && said.contains("systemctl edit peerix"),
        "{said}"
    );
    assert_eq!(daemon.process.terminate().code(), Some(0));

    server.sh("mv /nix/var/nix/db /nix/var/nix/away");
    let mut daemon = sockets.start(&server, "--verbose");
    misses("store", &["/nix/var/nix/db/db.sqlite"]);
    // With the database back, the daemon serves without a restart.
    server.sh("mv /nix/var/nix/away /nix/var/nix/db");
    // A connection may end without an answer when the server of misses stops; Nix asks again.
    wait_for("it serves", || {
        let route = stock::narinfo_route(&path);
        let answer = http::get(&neighbour, (server.address, PORT), &route).ok()?;
        (answer.status == 200).then_some(())
    });
    assert!(stock::query_has(&neighbour.udp(0), &server, &path));
    assert_eq!(get_local(&server, "/health").unwrap().text(), "ok\n");
    assert_eq!(daemon.process.terminate().code(), Some(0));
}

/// Sends a request and reads the first 100,000 bytes of the answer.
fn begin(stream: &mut TcpStream, route: &str) {
    write!(stream, "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut piece = [0; 100_000];
    stream.read_exact(&mut piece).unwrap();
    assert!(piece.starts_with(b"HTTP/1.1 200 "));
}

#[test]
fn stop_cuts_streams_and_exits() {
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
        // The daemon does not wait for a client that reads nothing.
        let status = daemon.stop();
        assert_eq!(status.code(), Some(0));
        let mut rest = Vec::new();
        // The daemon may end the stream with a reset.
        let _ = streaming.read_to_end(&mut rest);
        assert!(
            rest.len() < (MIB as usize - 1) << 20,
            "the stream was completed: nothing was tested"
        );
        idle.set_read_timeout(Some(DEADLINE)).unwrap();
        assert_eq!((&idle).read(&mut [0]).unwrap_or(0), 0, "an idle connection was left open");
        assert!(neighbour.connect((server.address, PORT)).is_err(), "the port is still open");
    }
}

#[test]
fn stop_sends_a_bye_to_neighbours() {
    let lan = Lan::new();
    let (server, _) = host(&lan);
    let neighbour = lan.host("neighbour");
    let socket = neighbour.udp(PORT);
    let mut daemon = Daemon::start(&server, &[]);
    let hear = |kind: u8| {
        let datagrams = || receive(&socket, DEADLINE).map(|(_, datagram)| datagram[0]);
        std::iter::from_fn(datagrams).any(|heard| heard == kind)
    };
    assert!(hear(3), "no hello");
    assert_eq!(daemon.stop().code(), Some(0));
    assert!(hear(4), "no bye");
}

#[test]
fn systemd_gets_ready_watchdog_and_stopping() {
    let lan = Lan::new();
    let (server, _) = host(&lan);
    let file = directory().join(format!("notify-{}", std::process::id()));
    let _ = std::fs::remove_file(&file);
    let socket = UnixDatagram::bind(&file).unwrap();
    socket.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut command = server.cmd(&binary().display().to_string());
    // After each third of this time, the main thread notifies systemd if discovery still runs.
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
    // The daemon answers requests by the time it reports READY=1.
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
fn passed_sockets_stay_open_between_daemons() {
    let lan = Lan::new();
    let (server, path) = host(&lan);
    let neighbour = lan.host("neighbour");
    let sockets = HeldSockets(server.listen(PORT), server.udp(PORT));
    let start = |flags: &str| sockets.start(&server, flags);
    let query = Packet::Query { id: 9, hash_part: hash_part(&path).into() }.write();
    // The daemon ignores `--port` for passed sockets: another program uses that port on this host.
    let _somebody = server.listen(PORT + 1);
    let mut daemon = start(&format!("--verbose --port {}", PORT + 1));
    for _ in 0..3 {
        assert_eq!(narinfo(&neighbour, &server, &path).status, 200);
        assert!(stock::query_has(&neighbour.udp(0), &server, &path));
        assert_eq!(daemon.process.terminate().code(), Some(0));
        // No daemon runs now. The next one answers this connection and this query.
        let asker = neighbour.udp(0);
        asker.send_to(&query, (server.address, PORT)).unwrap();
        let mut waiting =
            neighbour.connect((server.address, PORT)).expect("the port is never closed");
        write!(
            waiting,
            "GET {} HTTP/1.1\r\nConnection: close\r\n\r\n",
            stock::narinfo_route(&path)
        )
        .unwrap();
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

    // The daemon exits if the unit passes only one of the two sockets.
    let mut command = server.cmd("bash");
    let peerix = binary().display();
    command
        .arg("-ec")
        .arg(format!("exec 3<&0 </dev/null; export LISTEN_PID=$$ LISTEN_FDS=1; exec {peerix}"))
        .stdin(OwnedFd::from(sockets.0))
        .env("RUST_LOG", "off");
    assert_one_line(&command.output().unwrap(), 1, &["ListenDatagram="]);
}

/// `--bind` applies to passed sockets too, and the daemon waits for an address that is not there
/// yet.
#[test]
fn bind_applies_to_passed_sockets_and_late_addresses() {
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
        let copies =
            [OwnedFd::from(tcp.try_clone().unwrap()), OwnedFd::from(udp.try_clone().unwrap())];
        let [stream, datagram] = copies.map(Stdio::from);
        Logged::start_with(&server.name, command, stream, datagram)
    };
    let second = Ipv4Addr::new(10, 77, 0, 200);
    server.net(&format!("ip addr add {second}/24 dev eth0"));
    let local = || {
        get_local(&server, &stock::narinfo_route(&path)).is_ok_and(|answer| answer.status == 200)
    };
    // A connection to a filtered address fails only after this timeout.
    let connects = |to: Ipv4Addr| {
        let within = std::time::Duration::from_secs(2);
        neighbour.in_net(|| TcpStream::connect_timeout(&(to, PORT).into(), within)).is_ok()
    };
    let mut daemon = start(&format!("--verbose --bind {second}"));
    wait_for("peerix answers", || local().then_some(()));
    assert!(
        daemon.log().contains(&format!("--bind {second}: systemd passed sockets on 0.0.0.0")),
        "{}",
        daemon.log()
    );
    assert!(connects(second) && !connects(server.address));
    // The daemon answers datagrams to the bound address and to the broadcast address of its
    // interface, and none to its other address.
    let asker = neighbour.udp(0);
    let query = |to: Ipv4Addr, id: u32| {
        asker
            .send_to(&Packet::Query { id, hash_part: hash_part(&path).into() }.write(), (to, PORT))
            .unwrap();
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
    // The next daemon, without `--bind`, removes the restriction from the sockets.
    let mut daemon = start("--verbose");
    wait_for("peerix answers", || local().then_some(()));
    assert!(connects(second) && connects(server.address));
    assert_eq!(daemon.process.terminate().code(), Some(0));
    drop((tcp, udp));

    // An address that is assigned later, for example by DHCP.
    let late = Ipv4Addr::new(10, 77, 0, 201);
    let daemon = Daemon::start(&server, &["--bind", &late.to_string()]);
    assert!(
        daemon.log().contains(&format!("--bind {late}: this machine does not have that address"))
    );
    server.net(&format!("ip addr add {late}/24 dev eth0"));
    wait_for("the late address is served", || connects(late).then_some(()));
    assert!(!connects(server.address) && local());
    let asker = neighbour.udp(0);
    wait_for("a query to it is answered", || {
        asker
            .send_to(
                &Packet::Query { id: 4, hash_part: hash_part(&path).into() }.write(),
                (late, PORT),
            )
            .unwrap();
        receive(&asker, std::time::Duration::from_millis(500))
    });
}
