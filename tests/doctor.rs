//! `peerix doctor` with real Nix and real faults. It must find each fault, give a remedy that
//! works, and find nothing in a working setup.

use crate::common::daemon::{binary, narinfo_status, wait_until_known};
use crate::common::http::{self, Reply, Server};
use crate::common::lan::Run;
use crate::common::packet::Packet;
use crate::common::standin::StandIn;
use crate::common::tracker::{self, Tracker};
use crate::common::{Daemon, Host, Lan, Nat, PORT, Wan, nix, stock, wait_for};
use serde_json::Value;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// The findings and the exit status of one run.
struct Found {
    status: i32,
    findings: Vec<(String, String, String, String)>,
}

impl Found {
    fn read(mut command: Command) -> Found {
        let output = command.ran();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        let all: Value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
        let text =
            |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        let findings = all["findings"].as_array().unwrap().iter();
        let findings = findings
            .map(|f| (text(f, "state"), text(f, "what"), text(f, "text"), text(f, "remedy")));
        let found = Found { status: output.status.code().unwrap(), findings: findings.collect() };
        assert_eq!(all["ok"], found.status == 0);
        assert!(said.is_empty(), "{said}");
        for (state, _, text, remedy) in &found.findings {
            assert!(
                !text.contains('\n') && (state != "fail" || !remedy.is_empty()),
                "{:#?}",
                found.findings
            );
        }
        found
    }

    fn faults(&self) -> Vec<&str> {
        self.findings
            .iter()
            .filter(|(state, ..)| state == "fail")
            .map(|(_, what, ..)| what.as_str())
            .collect()
    }

    fn assert_no_faults(&self) {
        assert!(self.faults().is_empty() && self.status == 0, "{:#?}", self.findings);
    }

    /// Checks that `what` is the only fault and that its texts contain `words`. Returns the remedy.
    fn assert_only_fault(&self, what: &str, words: &[&str]) -> String {
        assert_eq!((self.faults(), self.status), (vec![what], 1), "{:#?}", self.findings);
        let (_, _, text, remedy) =
            self.findings.iter().find(|(state, ..)| state == "fail").unwrap();
        for word in words {
            assert!(text.contains(word) || remedy.contains(word), "no {word}: {text}\n{remedy}");
        }
        remedy.clone()
    }

    fn ok(&self, what: &str) -> bool {
        self.findings.iter().any(|(state, of, ..)| state == "ok" && of == what)
    }
}

fn doctor(host: &Host, flags: &[&str]) -> Found {
    let mut command = host.cmd(&binary().display().to_string());
    command.args(["doctor", "--json"]).args(flags);
    Found::read(command)
}

/// Runs the first line of a remedy. Its `systemctl` part fails, because the hosts have no systemd.
fn mend(host: &Host, remedy: &str) {
    let first = remedy.lines().next().unwrap();
    // Firewall tools come from the real machine, because the host's Debian may have other versions.
    let mut shell = if first.starts_with("iptables") || first.starts_with("nft") {
        host.net_cmd("sh")
    } else {
        host.cmd("sh")
    };
    shell.args(["-c", &first.replace("&& systemctl", "; systemctl")]).ran();
}

/// Two neighbours that sign their paths, trust each other's keys and query each other.
struct Pair {
    a: Host,
    b: Host,
    daemons: [Option<Daemon>; 2],
    keys: [String; 2],
    lan: Lan,
}

const SIGNING: [&str; 2] = ["--private-key", "/etc/peerix.sec"];

fn key(host: &Host) -> String {
    stock::ready(host);
    nix::generate_key(host)
}

impl Pair {
    fn new() -> Pair {
        let lan = Lan::new();
        let (a, b) = (lan.host("a"), lan.host("b"));
        let keys = [key(&a), key(&b)];
        let pair = Pair { daemons: [Some(Daemon::start(&a, &SIGNING)), None], a, b, keys, lan };
        pair.configure();
        pair
    }

    fn configure(&self) {
        for host in [&self.a, &self.b] {
            nix::configure_client(host, "", &self.keys.each_ref().map(String::as_str));
        }
    }

    /// Starts peerix on `b` again, with these flags.
    fn start(&mut self, flags: &[&str]) {
        self.daemons[1] = None;
        self.daemons[1] = Some(Daemon::start(&self.b, &[&SIGNING, flags].concat()));
    }

    fn meet(&mut self) {
        self.start(&[]);
        let mark = crate::common::daemon::add_unique_path(&self.a);
        wait_until_known(&self.b, &mark);
    }

    fn healed(&self, what: &str) {
        wait_for(what, || doctor(&self.b, &[]).faults().is_empty().then_some(()));
    }
}

#[test]
fn working_setup_has_no_faults() {
    let mut pair = Pair::new();
    // The peerix on `b` does not run yet.
    doctor(&pair.a, &[]).assert_no_faults();
    pair.meet();
    let path = stock::build(&pair.a, "greeting");
    nix::realise_quietly(&pair.b, &[&path]);
    for host in [&pair.a, &pair.b] {
        let found = doctor(host, &[]);
        found.assert_no_faults();
        for what in ["daemon", "secret", "substituter", "network", "memory"] {
            assert!(found.ok(what), "{what}: {:#?}", found.findings);
        }
    }
    assert!(doctor(&pair.b, &[]).ok("keys"), "the path that it fetched was looked at");
    // Text output.
    let output = pair.b.cmd(&binary().display().to_string()).arg("doctor").ran();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success()
            && text.lines().all(|line| line.starts_with("ok ") || line.starts_with("note ")),
        "{text}"
    );
    // An original peerix does not answer a query for a path that it lacks, and its HTTP answers
    // differ.
    let python = pair.lan.host("python");
    let query = Packet::Query { id: 1, hash_part: "0".repeat(32) };
    let socket = python.udp(PORT);
    wait_for("it is heard", || {
        socket.send_to(&query.write(), (pair.b.address, PORT)).unwrap();
        let status = http::get_local(&pair.b, "/status.json").unwrap().text();
        status.contains(&format!("{}:{PORT}", python.address)).then_some(())
    });
    drop(socket);
    let python = StandIn::start(&python, |_| None, |_| Reply::Whole(404, b"Not Found".to_vec()));
    let found = doctor(&pair.b, &[]);
    found.assert_no_faults();
    assert!(
        found.findings.iter().any(|(.., text, _)| text.starts_with("2 of 2 peers")),
        "{:#?}",
        found.findings
    );
    drop(python);
    // IPv6 discovery works where both listen on IPv6, and does no harm where only one does.
    let both = [&SIGNING[..], &["--bind", "[::]", "--bind", "0.0.0.0"]].concat();
    pair.daemons[0] = None;
    pair.daemons[0] = Some(Daemon::start(&pair.a, &both));
    doctor(&pair.b, &[]).assert_no_faults();
    for host in [&pair.a, &pair.b] {
        host.net(&format!("ip addr del {}/24 dev eth0", host.address));
    }
    pair.daemons[1] = None;
    pair.daemons[1] = Some(Daemon::start(&pair.b, &both));
    let greeted = || {
        doctor(&pair.b, &[])
            .findings
            .iter()
            .any(|(.., text, _)| text.starts_with("1 of 1 peers"))
            .then_some(())
    };
    wait_for("they greet one another", greeted);
    // Only Nix has a fault: with link-local addresses alone, it assumes that there is no network.
    doctor(&pair.b, &[])
        .assert_only_fault("substituter", &["finds no network", "nix --option substitute true"]);
    let settings = pair.b.cmd("nix").args(["--option", "substitute", "true", "show-config"]).okay();
    assert!(settings.contains("substitute = true"));
}

/// Guards against a report of blocked UDP when a live neighbour answers only the sixth query.
#[test]
fn live_neighbour_that_answers_late_is_no_fault() {
    let mut pair = Pair::new();
    pair.start(&[]);
    let slow = pair.lan.host("slow");
    let queries = AtomicU32::new(0);
    let say = move |datagram: &[u8]| match Packet::read(datagram)? {
        // `doctor` repeats this query each 200 ms.
        Packet::Query { hash_part, .. }
            if hash_part == "0".repeat(32) && queries.fetch_add(1, Ordering::Relaxed) < 5 =>
        {
            None
        }
        Packet::Query { id, .. } => Some(Packet::HaveNot { id }.write()),
        _ => None,
    };
    let info = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n";
    let peer = StandIn::start(&slow, say, |_| Reply::Whole(200, info.to_vec()));
    peer.meet(&slow, &pair.b);
    let found = doctor(&pair.b, &[]);
    found.assert_no_faults();
    let (.., text, _) = found.findings.iter().find(|(_, what, ..)| what == "network").unwrap();
    assert!(text.starts_with("2 of 2 peers"), "{text}");
}

/// Guards against a report that Nix does not query peerix, with the advice to restart nix-daemon,
/// when Nix waits for another substituter.
#[test]
fn substituter_that_keeps_nix_waiting_is_no_fault_of_peerix() {
    let lan = Lan::new();
    let (host, cache) = (lan.host("a"), lan.host("cache"));
    key(&host);
    let _daemon = Daemon::start(&host, &SIGNING);
    let _cache = Server::start(cache.listen(PORT), |request| match request.path.as_str() {
        "/nix-cache-info" => Reply::Whole(200, b"StoreDir: /nix/store\nPriority: 10\n".to_vec()),
        _ => Reply::Silence,
    });
    nix::configure(
        &host,
        &format!(
            "substituters = http://{}:{PORT} http://127.0.0.1:{PORT}?priority=20\n",
            cache.address
        ),
    );
    let found = doctor(&host, &[]);
    found.assert_no_faults();
    let (state, _, text, _) = found.findings.iter().find(|(_, what, ..)| what == "asked").unwrap();
    assert!(state == "note" && text.contains("no answer within 10 s"), "{state} {text}");
}

#[test]
fn missing_daemon_and_unreadable_database_are_found() {
    let lan = Lan::new();
    let host = lan.host("a");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    doctor(&host, &[]).assert_only_fault("daemon", &["12304", "systemctl start", "journalctl"]);
    let as_nobody = |flags: &[&str]| {
        let mut command = host.cmd_as(65534, &binary().display().to_string());
        command.args(["doctor", "--json"]).args(flags).env("HOME", "/tmp");
        Found::read(command)
    };

    // `doctor` finds a daemon on another port, and accepts it if `--port` names it.
    let daemon = Daemon::start_on(&host, 12399, &[]);
    let found = doctor(&host, &[]);
    assert!(
        found.findings.iter().any(|(.., remedy)| remedy.contains("peerix doctor --port 12399")),
        "{:#?}",
        found.findings
    );
    doctor(&host, &["--port", "12399"]).assert_only_fault(
        "substituter",
        &["http://127.0.0.1:12304 is not this one", "127.0.0.1:12399"],
    );
    drop(daemon);

    // A database that only root can read, checked as root and as another user.
    host.sh("chmod 700 /nix/var/nix/db");
    for found in [doctor(&host, &[]), as_nobody(&[])] {
        assert_eq!(found.faults(), ["daemon", "database"], "{:#?}", found.findings);
        assert!(
            found.findings.iter().any(|(.., remedy)| remedy == "chmod -R o+rX /nix/var/nix/db")
        );
    }
    mend(&host, "chmod -R o+rX /nix/var/nix/db");
    assert_eq!(as_nobody(&[]).faults(), ["daemon"]);
    let elsewhere = as_nobody(&["--db", "/no/db.sqlite"]);
    assert_eq!(elsewhere.faults(), ["daemon", "database"]);
}

/// While peerix is down, another user may listen on its port. `doctor` as root must not open files
/// or URLs that such a daemon names. Remedies quote names for the shell.
#[test]
fn daemon_of_another_user_is_not_trusted_by_root() {
    let lan = Lan::new();
    let host = lan.host("a");
    let trusted = key(&host);
    nix::configure_client(&host, "", &[&trusted]);
    host.sh("install -o 65534 -m 644 /etc/peerix.sec \"/tmp/it's; a key.sec\"");
    let daemon = Daemon::start_as(&host, 65534, &["--private-key", "/tmp/it's; a key.sec"]);
    let found = doctor(&host, &[]);
    found.assert_only_fault(
        "daemon",
        &["user 65534 listens on port 12304", "sudo -u '#65534' peerix doctor", "ss -ltnp"],
    );
    assert!(
        !found.findings.iter().any(|(.., text, _)| text.contains("it's")),
        "{:#?}",
        found.findings
    );
    for command in ["status", "peers", "why"] {
        let mut asked = host.cmd(&binary().display().to_string());
        let output = asked.arg(command).args((command == "why").then_some("/nix/store/x")).ran();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(3) && said.contains("user 65534"),
            "{command}: {said}"
        );
    }
    // The owner of that daemon may trust it.
    let as_owner = |program: &str, words: &[&str]| {
        let mut command = host.cmd_as(65534, program);
        command.args(words).env("HOME", "/tmp");
        command
    };
    let program = binary().display().to_string();
    let remedy = Found::read(as_owner(&program, &["doctor", "--json"]))
        .assert_only_fault("secret", &["it's; a key.sec"]);
    assert_eq!(remedy, r"chmod 600 '/tmp/it'\''s; a key.sec'");
    as_owner("sh", &["-c", &remedy]).okay();
    Found::read(as_owner(&program, &["doctor", "--json"])).assert_no_faults();
    assert!(as_owner(&program, &["status"]).ran().status.success());
    drop(daemon);
}

/// Exit status and output of `peerix status`.
fn status(host: &Host) -> (Option<i32>, String) {
    let output = host.cmd(&binary().display().to_string()).arg("status").ran();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn faulty_daemon_reports_the_cause() {
    let lan = Lan::new();
    let host = lan.host("a");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    let _daemon = Daemon::start(&host, &[]);
    let health = |status: u16| {
        let ask =
            || http::get_local(&host, "/health").ok().filter(|answer| answer.status == status);
        wait_for("health notices", ask).text()
    };
    health(200);
    assert_eq!(status(&host).0, Some(0));
    // A corrupt database, as after a disk error.
    host.sh(
        "cp -a /nix/var/nix/db /nix/var/nix/backup; cd /nix/var/nix/db; head -c 8192 /dev/zero > new; mv new db.sqlite",
    );
    let reason = health(503);
    let reason = reason.trim().strip_prefix("store: ").unwrap();
    assert!(reason.contains("/nix/var/nix/db/db.sqlite"), "{reason}");
    let (code, said) = status(&host);
    assert!(code == Some(1) && said.contains(&format!("! {reason}\n")), "{said}");
    doctor(&host, &[])
        .assert_only_fault("database", &[reason, "sqlite3 /nix/var/nix/db/db.sqlite", "backup"]);
    host.sh("rm -r /nix/var/nix/db; mv /nix/var/nix/backup /nix/var/nix/db");
    health(200);
    assert_eq!(status(&host).0, Some(0));
    doctor(&host, &[]).assert_no_faults();
}

/// A tracker's texts must not control the terminal or add lines to the log.
#[test]
fn control_characters_from_trackers_are_escaped() {
    let lan = Lan::new();
    let (host, centre) = (lan.host("a"), lan.host("tracker"));
    key(&host);
    // Escape sequences in both encodings, a line feed, and a right-to-left override.
    const REFUSAL: &str = r#"{"error":"first\u001b[2J\u009b2J\nerror: second\u202edriht"}"#;
    const PEERS: &str = r#"{"peers":[{"peer_id":"first\u001b[2J\u009b2J\nok second\u202edriht","addr":"10.77.0.99","port":12304}]}"#;
    let _tracker =
        Server::start(centre.listen(tracker::PORT), |request| match request.path.as_str() {
            "/peers" => Reply::Whole(200, PEERS.into()),
            _ => Reply::Whole(403, REFUSAL.into()),
        });
    let url = format!("http://{}:{}", centre.address, tracker::PORT);
    let daemon = Daemon::start(
        &host,
        &["--mode", "both", "--state-dir", "/var/lib/peerix", "--tracker-url", &url],
    );
    let is_text =
        |text: &str| text.chars().all(|c| c == '\n' || !(c.is_control() || c == '\u{202e}'));
    let line = wait_for("the refusal is logged", || {
        daemon.log().lines().find(|line| line.starts_with("warn: tracker")).map(str::to_owned)
    });
    assert!(
        line.contains("first") && line.contains("second") && is_text(&daemon.log()),
        "{line:?}"
    );
    for flags in [&["peers"][..], &["peers", "--json"]] {
        let output = host.cmd(&binary().display().to_string()).args(flags).ran();
        let said = String::from_utf8(output.stdout).unwrap();
        let line = said.lines().find(|line| line.contains("10.77.0.99")).unwrap();
        assert!(line.contains("first") && line.contains("second") && is_text(&said), "{said:?}");
        if flags.contains(&"--json") {
            // The JSON output preserves the text, in escaped form.
            let read: Value = serde_json::from_str(&said).unwrap();
            assert!(read.to_string().contains("\u{9b}2J\\nok second\u{202e}driht"), "{said}");
        }
    }
}

#[test]
fn wrong_nix_settings_are_found_and_mended() {
    let mut pair = Pair::new();
    pair.meet();

    // Nix does not use peerix as a substituter.
    nix::configure(&pair.b, &format!("trusted-public-keys = {}\n", pair.keys.join(" ")));
    let remedy = doctor(&pair.b, &[]).assert_only_fault(
        "substituter",
        &["extra-substituters = http://127.0.0.1:12304", "nix.conf"],
    );
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).assert_no_faults();
    nix::configure(&pair.b, "substitute = false\n");
    let remedy = doctor(&pair.b, &[]).assert_only_fault("substituter", &["substitute is off"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).assert_only_fault("substituter", &["none of Nix's"]);

    // nix-daemon started before the last change of nix.conf.
    pair.configure();
    let nix_daemon = pair.b.spawn_sh("exec nix-daemon");
    wait_for("nix-daemon listens", || {
        pair.b.path("/nix/var/nix/daemon-socket/socket").exists().then_some(())
    });
    doctor(&pair.b, &[]).assert_no_faults();
    pair.b.sh("touch -d '5 minutes' /etc/nix/nix.conf");
    doctor(&pair.b, &[])
        .assert_only_fault("nix-daemon", &["5 min", "systemctl restart nix-daemon"]);
    drop(nix_daemon);
    doctor(&pair.b, &[]).assert_no_faults();
    pair.configure();

    // Nix does not trust the key of the offered path, or peerix does not.
    nix::configure_client(&pair.b, "", &[&pair.keys[1]]);
    let path = stock::build(&pair.a, "signed");
    assert!(!nix::realise(&pair.b, &[&path]).status.success());
    let remedy = doctor(&pair.b, &[]).assert_only_fault(
        "keys",
        &[
            &path,
            "signed by a-1",
            "extra-trusted-public-keys = a-1:KEY",
            "is what this prints on 10.77.0.1",
        ],
    );
    // The command in the remedy prints the peer's public key.
    let (_, print) = remedy.rsplit_once("--private-key: ").unwrap();
    let public = pair.a.sh(&print.replace("FILE", "/etc/peerix.sec"));
    mend(&pair.b, &remedy.replace("a-1:KEY", public.trim()));
    doctor(&pair.b, &[]).assert_no_faults();
    nix::realise_quietly(&pair.b, &[&path]);
    nix::configure_client(&pair.b, "", &[&pair.keys[1]]);
    pair.start(&["--trusted-public-key", &pair.keys[0].clone()]);
    let remedy = doctor(&pair.b, &[]).assert_only_fault("keys", &["peerix accepts", "a-1:"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).assert_no_faults();
    pair.configure();

    // Nix remembers a miss from a lookup before the path existed.
    pair.meet();
    let path = stock::build(&pair.a, "later");
    pair.a.cmd("nix-store").args(["--delete", &path]).okay();
    assert!(!nix::realise(&pair.b, &[&path]).status.success());
    doctor(&pair.b, &[]).assert_no_faults();
    stock::build(&pair.a, "later");
    assert!(
        !nix::realise(&pair.b, &[&path]).status.success(),
        "Nix did not remember: nothing is tested"
    );
    let remedy =
        doctor(&pair.b, &[]).assert_only_fault("memory", &[&path, "narinfo-cache-negative-ttl"]);
    mend(&pair.b, &remedy);
    assert!(pair.b.path(&path).exists());
    doctor(&pair.b, &[]).assert_no_faults();

    // A secret key file that other users can read.
    pair.b.sh("chmod 644 /etc/peerix.sec");
    let remedy =
        doctor(&pair.b, &[]).assert_only_fault("secret", &["/etc/peerix.sec", "chmod 600"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).assert_no_faults();
}

/// The unit and the nix.conf lines from the README must be enough to share local builds, including
/// the keys that only nix.conf names.
#[test]
fn readme_unit_and_nix_conf_share_local_builds() {
    let lan = Lan::new();
    let (a, b) = (lan.host("a"), lan.host("b"));
    let key = key(&a);
    stock::ready(&b);
    let contrib = |name: &str| {
        let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
        fs::read_to_string(root.join("contrib").join(name)).unwrap()
    };
    let unit = contrib("systemd/peerix.service");
    let line = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let words: Vec<String> =
        line.split(' ').map(|word| word.trim_matches('"').to_owned()).collect();
    let start = |host: &Host, key: Option<&str>| {
        // No socket activation: `doctor` as root only trusts a daemon whose socket belongs to root.
        let mut command = host.cmd(&binary().display().to_string());
        command.args(&words[1..]).envs(key.map(|file| ("NIX_SECRET_KEY_FILE", file)));
        let mut program = crate::common::process::Logged::start(&host.name, command);
        program.wait_until("peerix answers", || host.connect_local().ok());
        program
    };
    // The nix.conf from the README. All other settings are Nix's defaults.
    nix::configure(&a, &contrib("nix.conf"));
    nix::configure(&b, &format!("{}extra-trusted-public-keys = {key}\n", contrib("nix.conf")));
    let _daemons = [start(&a, Some("/etc/peerix.sec")), start(&b, None)];
    let path = stock::build(&a, "built-here");
    wait_for("b's peerix finds it", || (narinfo_status(&b, &path) == 200).then_some(()));
    nix::realise_quietly(&b, &[&path]);
    for host in [&a, &b] {
        let found = doctor(host, &[]);
        found.assert_no_faults();
        assert!(found.ok("asked"), "{:#?}", found.findings);
    }
}

/// A host with a peerix that its Nix uses, for tests that start nix-daemon.
fn multi_user(lan: &Lan) -> (Host, Daemon, String) {
    let host = lan.host("a");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    let daemon = Daemon::start(&host, &[]);
    (host, daemon, key)
}

/// Starts nix-daemon with these environment variables and waits until it listens.
fn nix_daemon(host: &Host, variables: &str) -> crate::common::Process {
    host.sh("rm -f /nix/var/nix/daemon-socket/socket");
    let process = host.spawn_sh(&format!("export {variables}; exec nix-daemon"));
    wait_for("nix-daemon listens", || {
        host.path("/nix/var/nix/daemon-socket/socket").exists().then_some(())
    });
    process
}

/// Nix sends requests for 127.0.0.1 to a proxy unless `no_proxy` excludes it.
#[test]
fn proxy_of_nix_daemon_is_found_and_mended() {
    let lan = Lan::new();
    let (host, _daemon, _) = multi_user(&lan);
    let proxy = Server::start(host.listen(3128), |_| Reply::Whole(403, b"refused".to_vec()));
    // The environment of nix-daemon counts, not that of the user who runs `doctor`.
    let behind = nix_daemon(&host, "http_proxy=http://127.0.0.1:3128 no_proxy=localhost");
    let remedy = doctor(&host, &[]).assert_only_fault(
        "proxy",
        &["http_proxy", "http://127.0.0.1:3128", "http://127.0.0.1:12304"],
    );
    assert!(remedy.contains("Environment=no_proxy=localhost,127.0.0.1"), "{remedy}");
    let output = host.cmd(&binary().display().to_string()).args(["why", &"0".repeat(32)]).ran();
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAIL  proxy: "));
    drop(behind);
    let _direct =
        nix_daemon(&host, "http_proxy=http://127.0.0.1:3128 no_proxy=localhost,127.0.0.1");
    let found = doctor(&host, &[]);
    found.assert_no_faults();
    assert!(found.ok("asked"), "{:#?}", found.findings);
    drop(proxy);
}

/// `doctor` makes nix-daemon ask this peerix, which finds faults that no other check finds.
#[test]
fn nix_daemon_that_does_not_ask_is_found() {
    let lan = Lan::new();
    let (host, _daemon, key) = multi_user(&lan);
    // nix-daemon has read another nix.conf than the present one, and the file's time does not show
    // it.
    nix::configure(&host, &format!("trusted-public-keys = {key}\n"));
    let stale = nix_daemon(&host, "X=");
    nix::configure_client(&host, "", &[&key]);
    host.sh("touch -d '5 minutes ago' /etc/nix/nix.conf");
    doctor(&host, &[])
        .assert_only_fault("asked", &["has not asked this peerix", "systemctl restart nix-daemon"]);
    drop(stale);
    let _fresh = nix_daemon(&host, "X=");
    let found = doctor(&host, &[]);
    found.assert_no_faults();
    assert!(
        found.findings.iter().any(|(.., text, _)| text.starts_with("nix-daemon asked this peerix"))
    );
}

#[test]
fn settings_of_nix_daemon_are_checked() {
    let lan = Lan::new();
    let (host, daemon, key) = multi_user(&lan);
    let _nix_daemon = nix_daemon(&host, "X=");
    // Settings in an included file.
    nix::configure(&host, "!include nix.custom.conf\n");
    host.write(
        "/etc/nix/nix.custom.conf",
        format!("extra-substituters = http://127.0.0.1:12304\ntrusted-public-keys = {key}\n"),
    );
    drop(_nix_daemon);
    let _nix_daemon = nix_daemon(&host, "X=");
    doctor(&host, &[]).assert_no_faults();
    wait_for("the daemon reads it too", || {
        let status = crate::common::daemon::status(&host);
        (status["node"]["trusted_keys"] == serde_json::json!([key.split(':').next().unwrap()]))
            .then_some(())
    });
    // Settings in the nix.conf of a user, whose substituters nix-daemon ignores.
    host.write("/etc/nix/nix.custom.conf", format!("trusted-public-keys = {key}\n"));
    host.write("/tmp/alice/.config/nix/nix.conf", "extra-substituters = http://127.0.0.1:12304\n");
    let as_user = || {
        let mut command = host.cmd_as(65534, &binary().display().to_string());
        command.args(["doctor", "--json"]).env("HOME", "/tmp/alice");
        Found::read(command)
    };
    as_user().assert_only_fault(
        "substituter",
        &["nix-daemon ignores", "untrusted substituter", "extra-substituters"],
    );
    host.write(
        "/etc/nix/nix.custom.conf",
        format!("trusted-public-keys = {key}\ntrusted-substituters = http://127.0.0.1:12304\n"),
    );
    assert_eq!(as_user().faults(), ["substituter"], "nix-daemon itself does not ask, whoever may");
    // Keys that Nix rejects, and keys that it ignores.
    let write = |keys: &[&str]| {
        nix::configure_client(&host, "", keys);
        // The file must look older than nix-daemon, which has started since.
        host.sh("touch -d '5 minutes ago' /etc/nix/nix.conf");
    };
    write(&[&key, "broken-1:AAAA"]);
    doctor(&host, &[]).assert_only_fault("keys", &["broken-1:AAAA", "Nix fails"]);
    let other =
        format!("{}:bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=", key.split(':').next().unwrap());
    write(&[&other, &key]);
    doctor(&host, &[]).assert_only_fault("keys", &["two keys of the name a-1", "the first", &key]);
    write(&[&key]);
    doctor(&host, &[]).assert_no_faults();
    drop(daemon);
}

#[test]
fn cache_with_better_priority_is_named() {
    let lan = Lan::new();
    let (host, daemon, key) = multi_user(&lan);
    let info = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 10\n";
    let _other = Server::start(host.listen(8080), |request| match request.path.as_str() {
        "/nix-cache-info" => Reply::Whole(200, info.to_vec()),
        _ => Reply::Whole(404, Vec::new()),
    });
    nix::configure_client(&host, "http://127.0.0.1:8080", &[&key]);
    doctor(&host, &[]).assert_only_fault(
        "priority",
        &["http://127.0.0.1:8080 (10)", "peerix (20)", "--priority 9"],
    );
    // A priority that the user has set is no fault.
    drop(daemon);
    let daemon = Daemon::start(&host, &["--priority", "30"]);
    doctor(&host, &[]).assert_no_faults();
    drop(daemon);
    let _daemon = Daemon::start(&host, &["--priority", "9"]);
    doctor(&host, &[]).assert_no_faults();
}

/// A firewall that accepts answers and TCP to peerix, and no unsolicited UDP.
const STATEFUL: &str = "iptables -A INPUT -i lo -j ACCEPT
    iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    iptables -A INPUT -p tcp --dport 12304 -j ACCEPT
    iptables -A INPUT -i eth0 -j DROP";

#[test]
fn blocking_firewalls_are_found_and_mended() {
    let mut pair = Pair::new();
    let mark = crate::common::daemon::add_unique_path(&pair.a);
    // iptables on this machine blocks UDP.
    pair.b.net("iptables -A INPUT -p udp --dport 12304 -j DROP");
    pair.start(&[]);
    let words = ["10.77.0.1:12304", "UDP is blocked here", "--dport 12304"];
    let remedy = doctor(&pair.b, &[]).assert_only_fault("udp", &words);
    mend(&pair.b, &remedy);
    // The next hello or answer of `a` makes it known to `b`.
    wait_until_known(&pair.b, &mark);
    pair.healed("UDP comes through");
    pair.b.net("iptables -F");
    // nftables on this machine blocks UDP. iptables cannot change its rules.
    pair.daemons[1] = None;
    pair.b.net("nft add table inet guard");
    pair.b
        .net_cmd("nft")
        .arg("add chain inet guard input { type filter hook input priority 0; policy accept; }")
        .okay();
    pair.b.net("nft add rule inet guard input udp dport 12304 drop");
    pair.start(&[]);
    let remedy = doctor(&pair.b, &[]).assert_only_fault("udp", &["UDP is blocked here"]);
    let rule = "nft insert rule inet guard input udp dport 12304 accept";
    assert_eq!(remedy.lines().next(), Some(rule));
    mend(&pair.b, &remedy);
    wait_until_known(&pair.b, &mark);
    pair.healed("UDP comes through nftables");
    pair.b.net("nft delete table inet guard");
    // This machine accepts only answers. `b` sends a hello to `a`, which is in its kernel's
    // neighbour table by now, and the firewall accepts the answer.
    pair.daemons[1] = None;
    pair.b.net_cmd("sh").args(["-ec", STATEFUL]).okay();
    pair.start(&[]);
    wait_until_known(&pair.b, &mark);
    pair.healed("answers come through");
    pair.b.net("iptables -F");
    // The firewall of the other machine blocks UDP, TCP or both.
    for (rule, what, words) in [
        (
            "-i eth0 -p udp --dport 12304",
            "udp",
            &["10.77.0.1:12304", "UDP is blocked there", "on 10.77.0.1: iptables"][..],
        ),
        (
            "-i eth0 -p tcp --dport 12304",
            "tcp",
            &["10.77.0.1:12304", "TCP is blocked there", "on 10.77.0.1: iptables"],
        ),
        ("-i eth0", "udp", &["was heard", "neither", "on 10.77.0.1: iptables"]),
    ] {
        pair.meet();
        pair.a.net(&format!("iptables -A INPUT {rule} -j DROP"));
        // The restarted `a` sends a hello, so `b` has just heard it.
        pair.daemons[0] = None;
        pair.daemons[0] = Some(Daemon::start(&pair.a, &SIGNING));
        let remedy = doctor(&pair.b, &[]).assert_only_fault(what, words);
        if rule != "-i eth0" {
            mend(&pair.a, remedy.split_once(": ").unwrap().1);
            pair.healed("what was blocked");
        }
        pair.a.net("iptables -F");
    }
}

#[test]
fn peer_on_another_port_is_found() {
    let mut pair = Pair::new();
    drop(pair.daemons[1].take());
    let conf = format!(
        "substituters = http://127.0.0.1:12399\ntrusted-public-keys = {}\n",
        pair.keys.join(" ")
    );
    nix::configure(&pair.b, &conf);
    let _daemon = Daemon::start_on(&pair.b, 12399, &[]);
    doctor(&pair.b, &["--port", "12399"])
        .assert_only_fault("port", &["10.77.0.1:12304", "12399", "peerix --port 12304"]);
}

#[test]
fn named_peer_without_access_is_found() {
    let wan = Wan::new();
    let (here, there) = (wan.lan([10, 1, 0]), wan.lan([10, 2, 0]));
    let (a, b) = (there.host("a"), here.host("b"));
    let keys = [key(&a), key(&b)];
    nix::configure_client(&b, "", &keys.each_ref().map(String::as_str));
    let (from, to) = (a.address.to_string(), b.address.to_string());
    let _b = Daemon::start(&b, &["--peer", &from]);
    let is_listed_as = |state: &str| {
        let status = http::get_local(&b, "/status.json").unwrap();
        let status: Value = serde_json::from_slice(&status.body).unwrap();
        (status["peers"][0]["state"] == state).then_some(())
    };
    // No peerix runs on `a` yet.
    wait_for("b has resolved the name", || is_listed_as("unheard"));
    let never = ["--peer 10.2.0.1:12304 does not answer", "daemon: never heard"];
    let remedy = doctor(&b, &[]).assert_only_fault("peer", &never);
    assert!(remedy.starts_with("on 10.2.0.1: systemctl start peerix"), "{remedy}");
    {
        let _a = Daemon::start(&a, &[]);
        doctor(&b, &[])
            .assert_only_fault("share", &["10.2.0.1:12304", "on 10.2.0.1: peerix --peer 10.1.0.1"]);
    }
    let last = Daemon::start(&a, &["--peer", &to]);
    wait_for("they know one another", || doctor(&b, &[]).faults().is_empty().then_some(()));
    // `a` stops, and `b` considers it silent after some lookups.
    drop(last);
    wait_for("a is silent", || {
        assert_eq!(narinfo_status(&b, &format!("/nix/store/{}-x", "0".repeat(32))), 404);
        is_listed_as("silent")
    });
    doctor(&b, &[]).assert_only_fault(
        "peer",
        &["--peer 10.2.0.1:12304 does not answer", "daemon: silent for "],
    );
}

/// A lookup within a second of both starts must not make `doctor` report blocked UDP.
#[test]
fn just_started_daemons_have_no_faults() {
    let lan = Lan::patient();
    let hosts = [lan.host("a"), lan.host("b")];
    let keys = hosts.each_ref().map(key);
    for host in &hosts {
        nix::configure_client(host, "", &keys.each_ref().map(String::as_str));
    }
    for _ in 0..3 {
        let _daemons = hosts.each_ref().map(|host| Daemon::start(host, &SIGNING));
        assert_eq!(narinfo_status(&hosts[1], &format!("/nix/store/{}-x", "0".repeat(32))), 404);
        doctor(&hosts[1], &[]).assert_no_faults();
        doctor(&hosts[0], &[]).assert_no_faults();
    }
}

/// A machine behind NAT and a tracker outside.
#[test]
fn tracker_address_and_clock_faults_are_found() {
    let wan = Wan::new();
    let (outside, centre) = (wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
    let home = Nat::new(&outside, [192, 168, 1]);
    let mut tracker = Tracker::start(centre.host("tracker"));
    let host = home.lan.host("home");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    let flags = tracker::flags(&host, "both", &[&tracker.host]);
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let daemon = Daemon::start(&host, &flags);
    // The router refuses the port, and then drops packets to it.
    let words = ["203.0.113.1:12304 is not reached from", "forward TCP", "--announce-addr"];
    let remedy = doctor(&host, &[]).assert_only_fault("address", &words);
    assert!(remedy.contains("router"));
    home.router.net("iptables -A INPUT -i eth0 -p tcp --dport 12304 -j DROP");
    doctor(&host, &[]).assert_only_fault("address", &words);
    home.forward("tcp", PORT, &host, PORT);
    let found = doctor(&host, &[]);
    found.assert_no_faults();
    assert!(
        ["tracker", "clock", "address"].iter().all(|what| found.ok(what)),
        "{:#?}",
        found.findings
    );

    // peerix announces an address that is not the router's.
    drop(daemon);
    let _daemon =
        Daemon::start(&host, &[&flags[..], &["--announce-addr", "198.51.100.77"]].concat());
    doctor(&host, &[]).assert_only_fault("address", &["198.51.100.77 is announced", "203.0.113.1"]);
    drop(_daemon);
    let _daemon = Daemon::start(&host, &flags);
    doctor(&host, &[]).assert_no_faults();

    // A wrong clock, simulated by faketime. The library comes from the real machine, whichever Nix
    // is under test.
    let mut places = fs::read_dir("/usr/lib")
        .unwrap()
        .map(|dir| dir.unwrap().path().join("faketime/libfaketime.so.1"));
    let library = places.find(|file| file.exists()).expect("scripts/deps installs faketime");
    fs::copy(library, host.path("/tmp/faketime.so")).unwrap();
    for (offset, way) in [("+5h", "ahead of"), ("-5h", "behind")] {
        let mut command = host.cmd("env");
        command.args([
            "LD_PRELOAD=/tmp/faketime.so",
            "FAKETIME_DONT_FAKE_MONOTONIC=1",
            &format!("FAKETIME={offset}"),
        ]);
        command.arg(binary()).args(["doctor", "--json"]);
        Found::read(command).assert_only_fault("clock", &[way, "h ", "timedatectl set-ntp true"]);
    }

    tracker.kill();
    doctor(&host, &[])
        .assert_only_fault("tracker", &[&tracker.url(), "systemctl status peerix-tracker", "curl"]);
    tracker.start_again();
    doctor(&host, &[]).assert_no_faults();
    assert_eq!(narinfo_status(&host, &format!("/nix/store/{}-x", "0".repeat(32))), 404);
}

#[test]
fn interface_without_link_is_named() {
    let lan = Lan::new();
    let (host, _daemon, _) = multi_user(&lan);
    let note = |found: &Found| {
        let mut notes = found.findings.iter().filter(|f| (&*f.0, &*f.1) == ("note", "network"));
        notes.next().map(|(.., text, _)| text.clone()).unwrap_or_default()
    };
    assert!(note(&doctor(&host, &[])).contains("no other peerix answers on 10.77.0.1/24"));
    // The other end of the cable is down, so that the interface is up and has no link.
    host.unplug();
    wait_for("the daemon has noticed", || {
        let status = crate::common::daemon::status(&host);
        status["networks"].as_array().unwrap().is_empty().then_some(())
    });
    let found = doctor(&host, &[]);
    assert!(note(&found).contains("has a link (eth0)"), "{:#?}", found.findings);
}

#[test]
fn neighbour_in_mode_wan_is_not_blamed_on_a_firewall_alone() {
    let mut pair = Pair::new();
    pair.daemons[0] = None;
    let flags = ["--mode", "wan", "--tracker-url", "http://10.77.0.9:12305"];
    pair.daemons[0] = Some(Daemon::start(&pair.a, &[&SIGNING, &flags[..]].concat()));
    pair.start(&[]);
    // `a` is in the kernel's neighbour table of `b`.
    http::get(&pair.b, (pair.a.address, PORT), "/nix-cache-info").unwrap();
    // Until the daemon has run for 3 s, it is no fault that it has not heard a neighbour.
    let found = wait_for("a fault is found", || {
        Some(doctor(&pair.b, &[])).filter(|found| !found.faults().is_empty())
    });
    found.assert_only_fault("udp", &["10.77.0.1:12304", "or its mode is wan", "--mode both"]);
}

#[test]
fn networks_of_different_size_on_one_link_need_named_peers() {
    let mut pair = Pair::new();
    pair.daemons[0] = None;
    pair.a.net("ip addr flush dev eth0 scope global");
    pair.a.net("ip addr add 10.77.0.1/16 brd + dev eth0");
    pair.daemons[0] = Some(Daemon::start(&pair.a, &SIGNING));
    pair.start(&[]);
    let found = doctor(&pair.b, &[]);
    found.assert_no_faults();
    let advice = "those beyond need --peer HOST on both sides";
    assert!(found.findings.iter().any(|f| f.2.contains(advice)), "{:#?}", found.findings);
    pair.daemons[0] = None;
    let flags = [&SIGNING[..], &["--peer", "10.77.0.2"]].concat();
    pair.daemons[0] = Some(Daemon::start(&pair.a, &flags));
    pair.start(&["--peer", "10.77.0.1"]);
    let mark = crate::common::daemon::add_unique_path(&pair.a);
    wait_until_known(&pair.b, &mark);
    pair.healed("both are named");
    assert!(doctor(&pair.b, &[]).ok("network"));
}
