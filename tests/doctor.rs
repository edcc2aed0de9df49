//! `peerix doctor` against what breaks in practice, each made for real, with real Nix; that what it
//! says mends it; and that it finds nothing wrong where nothing is.

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

/// What it found.
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

    fn is_well(&self) {
        assert!(self.faults().is_empty() && self.status == 0, "{:#?}", self.findings);
    }

    /// Checks that this is the only fault, that `words` are said of it, and returns what mends it.
    fn is(&self, what: &str, words: &[&str]) -> String {
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

/// Runs what doctor says. There is no systemd in these hosts, whose part therefore fails.
fn mend(host: &Host, remedy: &str) {
    let first = remedy.lines().next().unwrap();
    // Firewalls are of this machine's programs: the host's may be another Debian's.
    let mut shell = if first.starts_with("iptables") || first.starts_with("nft") {
        host.net_cmd("sh")
    } else {
        host.cmd("sh")
    };
    shell.args(["-c", &first.replace("&& systemctl", "; systemctl")]).ran();
}

/// Two neighbours that sign, trust and ask one another.
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
    host.sh(&format!(
        "nix-store --generate-binary-cache-key {}-1 /etc/peerix.sec /etc/peerix.pub",
        host.name
    ));
    fs::read_to_string(host.path("/etc/peerix.pub")).unwrap().trim().to_owned()
}

/// A path that is not content-addressed, so that it needs a signature: what `nix-store --add` makes
/// needs none.
fn build(host: &Host, name: &str) -> String {
    let expression = format!(
        "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-ec\" \"echo {name} > $out\" ]; }}"
    );
    host.write("/tmp/build.nix", expression);
    host.sh("nix-store --realise $(nix-instantiate /tmp/build.nix 2>/dev/null) 2>/dev/null")
        .trim()
        .to_owned()
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

    /// Starts peerix on b, and waits until they know one another.
    fn start(&mut self, flags: &[&str]) {
        self.daemons[1] = None;
        self.daemons[1] = Some(Daemon::start(&self.b, &[&SIGNING, flags].concat()));
    }

    fn meet(&mut self) {
        self.start(&[]);
        let mark = crate::common::daemon::mark(&self.a);
        wait_until_known(&self.b, &mark);
    }

    fn healed(&self, what: &str) {
        wait_for(what, || doctor(&self.b, &[]).faults().is_empty().then_some(()));
    }
}

#[test]
fn nothing_is_wrong() {
    let mut pair = Pair::new();
    // Alone: b's peerix is not there yet.
    doctor(&pair.a, &[]).is_well();
    pair.meet();
    let path = build(&pair.a, "greeting");
    nix::realise_quietly(&pair.b, &[&path]);
    for host in [&pair.a, &pair.b] {
        let found = doctor(host, &[]);
        found.is_well();
        for what in ["daemon", "secret", "substituter", "network", "memory"] {
            assert!(found.ok(what), "{what}: {:#?}", found.findings);
        }
    }
    assert!(doctor(&pair.b, &[]).ok("keys"), "the path that it fetched was looked at");
    // For people.
    let output = pair.b.cmd(&binary().display().to_string()).arg("doctor").ran();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(
        output.status.success()
            && text.lines().all(|line| line.starts_with("ok ") || line.starts_with("note ")),
        "{text}"
    );
    // One of the original: it says nothing of what it does not have, and answers HTTP in its own
    // way.
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
    found.is_well();
    assert!(
        found.findings.iter().any(|(.., text, _)| text.starts_with("2 of 2 peers")),
        "{:#?}",
        found.findings
    );
    drop(python);
    // IPv6 is heard where it is listened for, and no matter where not.
    let both = [&SIGNING[..], &["--bind", "[::]", "--bind", "0.0.0.0"]].concat();
    pair.daemons[0] = None;
    pair.daemons[0] = Some(Daemon::start(&pair.a, &both));
    doctor(&pair.b, &[]).is_well();
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
    // All is well but for Nix itself, which takes that for no network.
    doctor(&pair.b, &[]).is("substituter", &["finds no network", "nix --option substitute true"]);
    let settings = pair.b.cmd("nix").args(["--option", "substitute", "true", "show-config"]).okay();
    assert!(settings.contains("substitute = true"));
}

#[test]
fn no_daemon_and_no_database() {
    let lan = Lan::new();
    let host = lan.host("a");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    doctor(&host, &[]).is("daemon", &["12304", "systemctl start", "journalctl"]);
    let as_nobody = |flags: &[&str]| {
        let mut command = host.cmd_as(65534, &binary().display().to_string());
        command.args(["doctor", "--json"]).args(flags).env("HOME", "/tmp");
        Found::read(command)
    };

    // On another port, one is found, and is well when it is asked there.
    let daemon = Daemon::start_on(&host, 12399, &[]);
    let found = doctor(&host, &[]);
    assert!(
        found.findings.iter().any(|(.., remedy)| remedy.contains("peerix doctor --port 12399")),
        "{:#?}",
        found.findings
    );
    doctor(&host, &["--port", "12399"])
        .is("substituter", &["http://127.0.0.1:12304 is not this one", "127.0.0.1:12399"]);
    drop(daemon);

    // A database that only root may read, as root and as another user see it.
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

/// Whoever has the port while peerix is down had root open files and fetch addresses of their
/// choice. And what mends it was printed with names as they are, which a shell takes for commands.
#[test]
fn root_does_not_go_by_what_another_user_says_and_names_are_quoted() {
    let lan = Lan::new();
    let host = lan.host("a");
    let trusted = key(&host);
    nix::configure_client(&host, "", &[&trusted]);
    host.sh("install -o 65534 -m 644 /etc/peerix.sec \"/tmp/it's; a key.sec\"");
    let daemon = Daemon::start_as(&host, 65534, &["--private-key", "/tmp/it's; a key.sec"]);
    let found = doctor(&host, &[]);
    found.is(
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
    // That user risks nothing.
    let as_owner = |program: &str, words: &[&str]| {
        let mut command = host.cmd_as(65534, program);
        command.args(words).env("HOME", "/tmp");
        command
    };
    let program = binary().display().to_string();
    let remedy =
        Found::read(as_owner(&program, &["doctor", "--json"])).is("secret", &["it's; a key.sec"]);
    assert_eq!(remedy, r"chmod 600 '/tmp/it'\''s; a key.sec'");
    as_owner("sh", &["-c", &remedy]).okay();
    Found::read(as_owner(&program, &["doctor", "--json"])).is_well();
    assert!(as_owner(&program, &["status"]).ran().status.success());
    drop(daemon);
}

/// What `peerix status` says, and its exit status.
fn status(host: &Host) -> (Option<i32>, String) {
    let output = host.cmd(&binary().display().to_string()).arg("status").ran();
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn an_ill_daemon_says_why() {
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
    // As after a disk has lost what was written to it.
    host.sh(
        "cp -a /nix/var/nix/db /nix/var/nix/backup; cd /nix/var/nix/db; head -c 8192 /dev/zero > new; mv new db.sqlite",
    );
    let reason = health(503);
    let reason = reason.trim().strip_prefix("store: ").unwrap();
    assert!(reason.contains("/nix/var/nix/db/db.sqlite"), "{reason}");
    let (code, said) = status(&host);
    assert!(code == Some(1) && said.contains(&format!("! {reason}\n")), "{said}");
    doctor(&host, &[]).is("database", &[reason, "sqlite3 /nix/var/nix/db/db.sqlite", "backup"]);
    host.sh("rm -r /nix/var/nix/db; mv /nix/var/nix/backup /nix/var/nix/db");
    health(200);
    assert_eq!(status(&host).0, Some(0));
    doctor(&host, &[]).is_well();
}

/// A tracker's refusal cleared the screen of whoever looked at the log, and wrote lines of its own.
#[test]
fn what_others_say_is_text_in_a_log_and_on_a_terminal() {
    let lan = Lan::new();
    let (host, centre) = (lan.host("a"), lan.host("tracker"));
    key(&host);
    // Escape sequences in both forms, a line's end, and letters that run the other way.
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
            // To programs it is what it was.
            let read: Value = serde_json::from_str(&said).unwrap();
            assert!(read.to_string().contains("\u{9b}2J\\nok second\u{202e}driht"), "{said}");
        }
    }
}

#[test]
fn nix_is_not_told() {
    let mut pair = Pair::new();
    pair.meet();

    // Not asked.
    nix::configure(&pair.b, &format!("trusted-public-keys = {}\n", pair.keys.join(" ")));
    let remedy = doctor(&pair.b, &[])
        .is("substituter", &["extra-substituters = http://127.0.0.1:12304", "nix.conf"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).is_well();
    nix::configure(&pair.b, "substitute = false\n");
    let remedy = doctor(&pair.b, &[]).is("substituter", &["substitute is off"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).is("substituter", &["none of Nix's"]);

    // Told, but not nix-daemon, which has read its nix.conf.
    pair.configure();
    let nix_daemon = pair.b.spawn_sh("exec nix-daemon");
    wait_for("nix-daemon listens", || {
        pair.b.path("/nix/var/nix/daemon-socket/socket").exists().then_some(())
    });
    doctor(&pair.b, &[]).is_well();
    pair.b.sh("touch -d '5 minutes' /etc/nix/nix.conf");
    doctor(&pair.b, &[]).is("nix-daemon", &["5 min", "systemctl restart nix-daemon"]);
    drop(nix_daemon);
    doctor(&pair.b, &[]).is_well();
    pair.configure();

    // Not trusted: of what a peer offered, and of what peerix was told.
    nix::configure_client(&pair.b, "", &[&pair.keys[1]]);
    let path = build(&pair.a, "signed");
    assert!(!nix::realise(&pair.b, &[&path]).status.success());
    let remedy = doctor(&pair.b, &[]).is(
        "keys",
        &[
            &path,
            "signed by a-1",
            "extra-trusted-public-keys = a-1:KEY",
            "is what this prints on 10.77.0.1",
        ],
    );
    // What it says of the key is so.
    let (_, print) = remedy.rsplit_once("--private-key: ").unwrap();
    let public = pair.a.sh(&print.replace("FILE", "/etc/peerix.sec"));
    mend(&pair.b, &remedy.replace("a-1:KEY", public.trim()));
    doctor(&pair.b, &[]).is_well();
    nix::realise_quietly(&pair.b, &[&path]);
    nix::configure_client(&pair.b, "", &[&pair.keys[1]]);
    pair.start(&["--trusted-public-key", &pair.keys[0].clone()]);
    let remedy = doctor(&pair.b, &[]).is("keys", &["peerix accepts", "a-1:"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).is_well();
    pair.configure();

    // Asked too early, and remembered.
    pair.meet();
    let path = build(&pair.a, "later");
    pair.a.cmd("nix-store").args(["--delete", &path]).okay();
    assert!(!nix::realise(&pair.b, &[&path]).status.success());
    doctor(&pair.b, &[]).is_well();
    build(&pair.a, "later");
    assert!(
        !nix::realise(&pair.b, &[&path]).status.success(),
        "Nix did not remember: nothing is tested"
    );
    let remedy = doctor(&pair.b, &[]).is("memory", &[&path, "narinfo-cache-negative-ttl"]);
    mend(&pair.b, &remedy);
    assert!(pair.b.path(&path).exists());
    doctor(&pair.b, &[]).is_well();

    // A key that others can read.
    pair.b.sh("chmod 644 /etc/peerix.sec");
    let remedy = doctor(&pair.b, &[]).is("secret", &["/etc/peerix.sec", "chmod 600"]);
    mend(&pair.b, &remedy);
    doctor(&pair.b, &[]).is_well();
}

/// With the unit and the lines of nix.conf that the README has installed, nothing that was built
/// locally was shared: the unit named one key, and the others stood in nix.conf alone.
#[test]
fn units_and_nix_conf_of_the_readme_share_what_is_built_locally() {
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
        // Root asks nobody but root, to whom the socket belongs that systemd would pass.
        let mut command = host.cmd(&binary().display().to_string());
        command.args(&words[1..]).envs(key.map(|file| ("NIX_SECRET_KEY_FILE", file)));
        let mut program = crate::common::process::Logged::start(&host.name, command);
        program.wait_until("peerix answers", || host.connect_local().ok());
        program
    };
    // As the user's nix.conf is after the README: what is not said there is Nix's default.
    nix::configure(&a, &contrib("nix.conf"));
    nix::configure(&b, &format!("{}extra-trusted-public-keys = {key}\n", contrib("nix.conf")));
    let _daemons = [start(&a, Some("/etc/peerix.sec")), start(&b, None)];
    let path = build(&a, "built-here");
    wait_for("b's peerix finds it", || (narinfo_status(&b, &path) == 200).then_some(()));
    nix::realise_quietly(&b, &[&path]);
    for host in [&a, &b] {
        let found = doctor(host, &[]);
        found.is_well();
        assert!(found.ok("asked"), "{:#?}", found.findings);
    }
}

/// A host whose Nix is nix-daemon's, and that asks its own peerix.
fn multi_user(lan: &Lan) -> (Host, Daemon, String) {
    let host = lan.host("a");
    let key = key(&host);
    nix::configure_client(&host, "", &[&key]);
    let daemon = Daemon::start(&host, &[]);
    (host, daemon, key)
}

/// Starts nix-daemon with these variables, and waits until it listens.
fn nix_daemon(host: &Host, variables: &str) -> crate::common::Process {
    host.sh("rm -f /nix/var/nix/daemon-socket/socket");
    let process = host.spawn_sh(&format!("export {variables}; exec nix-daemon"));
    wait_for("nix-daemon listens", || {
        host.path("/nix/var/nix/daemon-socket/socket").exists().then_some(())
    });
    process
}

/// Nix asked the proxy for 127.0.0.1, and all was said to be well.
#[test]
fn proxy_of_nix_daemon_is_found_and_what_mends_it_is_right() {
    let lan = Lan::new();
    let (host, _daemon, _) = multi_user(&lan);
    let proxy = Server::start(host.listen(3128), |_| Reply::Whole(403, b"refused".to_vec()));
    // It is nix-daemon's environment that counts, and not that of whoever asks.
    let behind = nix_daemon(&host, "http_proxy=http://127.0.0.1:3128 no_proxy=localhost");
    let remedy = doctor(&host, &[])
        .is("proxy", &["http_proxy", "http://127.0.0.1:3128", "http://127.0.0.1:12304"]);
    assert!(remedy.contains("Environment=no_proxy=localhost,127.0.0.1"), "{remedy}");
    let output = host.cmd(&binary().display().to_string()).args(["why", &"0".repeat(32)]).ran();
    assert!(String::from_utf8_lossy(&output.stdout).contains("FAIL  proxy: "));
    drop(behind);
    let _direct =
        nix_daemon(&host, "http_proxy=http://127.0.0.1:3128 no_proxy=localhost,127.0.0.1");
    let found = doctor(&host, &[]);
    found.is_well();
    assert!(found.ok("asked"), "{:#?}", found.findings);
    drop(proxy);
}

/// Whatever the reason, a Nix that does not ask is found by having it ask.
#[test]
fn nix_daemon_that_does_not_ask_is_found_by_having_it_ask() {
    let lan = Lan::new();
    let (host, _daemon, key) = multi_user(&lan);
    // It has read its nix.conf, and the file says otherwise now; its time says nothing.
    nix::configure(&host, &format!("trusted-public-keys = {key}\n"));
    let stale = nix_daemon(&host, "X=");
    nix::configure_client(&host, "", &[&key]);
    host.sh("touch -d '5 minutes ago' /etc/nix/nix.conf");
    doctor(&host, &[]).is("asked", &["has not asked this peerix", "systemctl restart nix-daemon"]);
    drop(stale);
    let _fresh = nix_daemon(&host, "X=");
    let found = doctor(&host, &[]);
    found.is_well();
    assert!(
        found.findings.iter().any(|(.., text, _)| text.starts_with("nix-daemon asked this peerix"))
    );
}

#[test]
fn settings_are_those_of_nix_daemon() {
    let lan = Lan::new();
    let (host, daemon, key) = multi_user(&lan);
    let _nix_daemon = nix_daemon(&host, "X=");
    // In a file that is included.
    nix::configure(&host, "!include nix.custom.conf\n");
    host.write(
        "/etc/nix/nix.custom.conf",
        format!("extra-substituters = http://127.0.0.1:12304\ntrusted-public-keys = {key}\n"),
    );
    drop(_nix_daemon);
    let _nix_daemon = nix_daemon(&host, "X=");
    doctor(&host, &[]).is_well();
    wait_for("the daemon reads it too", || {
        let status = crate::common::daemon::status(&host);
        (status["node"]["trusted_keys"] == serde_json::json!([key.split(':').next().unwrap()]))
            .then_some(())
    });
    // In a user's own file, which nix-daemon ignores.
    host.write("/etc/nix/nix.custom.conf", format!("trusted-public-keys = {key}\n"));
    host.write("/tmp/alice/.config/nix/nix.conf", "extra-substituters = http://127.0.0.1:12304\n");
    let as_user = || {
        let mut command = host.cmd_as(65534, &binary().display().to_string());
        command.args(["doctor", "--json"]).env("HOME", "/tmp/alice");
        Found::read(command)
    };
    as_user()
        .is("substituter", &["nix-daemon ignores", "untrusted substituter", "extra-substituters"]);
    host.write(
        "/etc/nix/nix.custom.conf",
        format!("trusted-public-keys = {key}\ntrusted-substituters = http://127.0.0.1:12304\n"),
    );
    assert_eq!(as_user().faults(), ["substituter"], "nix-daemon itself does not ask, whoever may");
    // Keys that Nix fails at, or does not see.
    let write = |keys: &[&str]| {
        nix::configure_client(&host, "", keys);
        // For nix-daemon, which has started since, it is as old.
        host.sh("touch -d '5 minutes ago' /etc/nix/nix.conf");
    };
    write(&[&key, "broken-1:AAAA"]);
    doctor(&host, &[]).is("keys", &["broken-1:AAAA", "Nix fails"]);
    let other =
        format!("{}:bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=", key.split(':').next().unwrap());
    write(&[&other, &key]);
    doctor(&host, &[]).is("keys", &["two keys of the name a-1", "the first", &key]);
    write(&[&key]);
    doctor(&host, &[]).is_well();
    drop(daemon);
}

#[test]
fn cache_that_is_asked_before_peerix_is_named() {
    let lan = Lan::new();
    let (host, daemon, key) = multi_user(&lan);
    let info = b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 10\n";
    let _other = Server::start(host.listen(8080), |request| match request.path.as_str() {
        "/nix-cache-info" => Reply::Whole(200, info.to_vec()),
        _ => Reply::Whole(404, Vec::new()),
    });
    nix::configure_client(&host, "http://127.0.0.1:8080", &[&key]);
    doctor(&host, &[])
        .is("priority", &["http://127.0.0.1:8080 (10)", "peerix (20)", "--priority 9"]);
    // A place that its user has chosen is no fault.
    drop(daemon);
    let daemon = Daemon::start(&host, &["--priority", "30"]);
    doctor(&host, &[]).is_well();
    drop(daemon);
    let _daemon = Daemon::start(&host, &["--priority", "9"]);
    doctor(&host, &[]).is_well();
}

/// The rules of a firewall that lets in what was asked for, and nothing of peerix.
const STATEFUL: &str = "iptables -A INPUT -i lo -j ACCEPT
    iptables -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
    iptables -A INPUT -p tcp --dport 12304 -j ACCEPT
    iptables -A INPUT -i eth0 -j DROP";

#[test]
fn firewalls() {
    let mut pair = Pair::new();
    let mark = crate::common::daemon::mark(&pair.a);
    // Here.
    pair.b.net("iptables -A INPUT -p udp --dport 12304 -j DROP");
    pair.start(&[]);
    let words = ["10.77.0.1:12304", "UDP is blocked here", "--dport 12304"];
    let remedy = doctor(&pair.b, &[]).is("udp", &words);
    mend(&pair.b, &remedy);
    // It is known when it says hello, or answers.
    wait_until_known(&pair.b, &mark);
    pair.healed("UDP comes through");
    pair.b.net("iptables -F");
    // By nftables, whose rules iptables does not change.
    pair.daemons[1] = None;
    pair.b.net("nft add table inet guard");
    pair.b
        .net_cmd("nft")
        .arg("add chain inet guard input { type filter hook input priority 0; policy accept; }")
        .okay();
    pair.b.net("nft add rule inet guard input udp dport 12304 drop");
    pair.start(&[]);
    let remedy = doctor(&pair.b, &[]).is("udp", &["UDP is blocked here"]);
    assert_eq!(remedy, "nft insert rule inet guard input udp dport 12304 accept");
    mend(&pair.b, &remedy);
    wait_until_known(&pair.b, &mark);
    pair.healed("UDP comes through nftables");
    pair.b.net("nft delete table inet guard");
    // Here, but for answers. The kernel knows a by now, so that b says hello to it, and a's answer
    // comes through.
    pair.daemons[1] = None;
    pair.b.net_cmd("sh").args(["-ec", STATEFUL]).okay();
    pair.start(&[]);
    wait_until_known(&pair.b, &mark);
    pair.healed("answers come through");
    pair.b.net("iptables -F");
    // There.
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
        // Heard this moment, by its hello.
        pair.daemons[0] = None;
        pair.daemons[0] = Some(Daemon::start(&pair.a, &SIGNING));
        let remedy = doctor(&pair.b, &[]).is(what, words);
        if rule != "-i eth0" {
            mend(&pair.a, remedy.split_once(": ").unwrap().1);
            pair.healed("what was blocked");
        }
        pair.a.net("iptables -F");
    }
}

#[test]
fn two_ports() {
    let mut pair = Pair::new();
    drop(pair.daemons[1].take());
    let conf = format!(
        "substituters = http://127.0.0.1:12399\ntrusted-public-keys = {}\n",
        pair.keys.join(" ")
    );
    nix::configure(&pair.b, &conf);
    let _daemon = Daemon::start_on(&pair.b, 12399, &[]);
    doctor(&pair.b, &["--port", "12399"])
        .is("port", &["10.77.0.1:12304", "12399", "peerix --port 12304"]);
}

#[test]
fn a_peer_beyond_the_network_that_was_not_told() {
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
    // Nothing runs there yet.
    wait_for("b has resolved the name", || is_listed_as("unheard"));
    let never = ["--peer 10.2.0.1:12304 does not answer", "daemon: never heard"];
    let remedy = doctor(&b, &[]).is("peer", &never);
    assert!(remedy.starts_with("on 10.2.0.1: systemctl start peerix"), "{remedy}");
    {
        let _a = Daemon::start(&a, &[]);
        doctor(&b, &[]).is("share", &["10.2.0.1:12304", "on 10.2.0.1: peerix --peer 10.1.0.1"]);
    }
    let last = Daemon::start(&a, &["--peer", &to]);
    wait_for("they know one another", || doctor(&b, &[]).faults().is_empty().then_some(()));
    // It is gone, and the next lookups give it up.
    drop(last);
    wait_for("a is silent", || {
        assert_eq!(narinfo_status(&b, &format!("/nix/store/{}-x", "0".repeat(32))), 404);
        is_listed_as("silent")
    });
    doctor(&b, &[]).is("peer", &["--peer 10.2.0.1:12304 does not answer", "daemon: silent for "]);
}

/// Both were started within a second, one lookup was made, and doctor said that UDP was blocked.
#[test]
fn daemons_that_have_just_started_do_not_blame_udp() {
    let lan = Lan::new();
    let hosts = [lan.host("a"), lan.host("b")];
    let keys = hosts.each_ref().map(key);
    for host in &hosts {
        nix::configure_client(host, "", &keys.each_ref().map(String::as_str));
    }
    for _ in 0..3 {
        let _daemons = hosts.each_ref().map(|host| Daemon::start(host, &SIGNING));
        assert_eq!(narinfo_status(&hosts[1], &format!("/nix/store/{}-x", "0".repeat(32))), 404);
        doctor(&hosts[1], &[]).is_well();
        doctor(&hosts[0], &[]).is_well();
    }
}

/// A machine at home, behind a router, and a tracker outside.
#[test]
fn trackers() {
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
    // Closed at the router, with a word to who knocks and without.
    let words = ["203.0.113.1:12304 is not reached from", "forward TCP", "--announce-addr"];
    let remedy = doctor(&host, &[]).is("address", &words);
    assert!(remedy.contains("router"));
    home.router.net("iptables -A INPUT -i eth0 -p tcp --dport 12304 -j DROP");
    doctor(&host, &[]).is("address", &words);
    home.forward("tcp", PORT, &host, PORT);
    let found = doctor(&host, &[]);
    found.is_well();
    assert!(
        ["tracker", "clock", "address"].iter().all(|what| found.ok(what)),
        "{:#?}",
        found.findings
    );

    // Another address than its own is announced.
    drop(daemon);
    let _daemon =
        Daemon::start(&host, &[&flags[..], &["--announce-addr", "198.51.100.77"]].concat());
    doctor(&host, &[]).is("address", &["198.51.100.77 is announced", "203.0.113.1"]);
    drop(_daemon);
    let _daemon = Daemon::start(&host, &flags);
    doctor(&host, &[]).is_well();

    // A clock that is wrong, as every process here would see it. The library is this machine's,
    // whatever Nix is tested.
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
        Found::read(command).is("clock", &[way, "h ", "timedatectl set-ntp true"]);
    }

    tracker.kill();
    doctor(&host, &[]).is("tracker", &[&tracker.url(), "systemctl status peerix-tracker", "curl"]);
    tracker.start_again();
    doctor(&host, &[]).is_well();
    assert_eq!(narinfo_status(&host, &format!("/nix/store/{}-x", "0".repeat(32))), 404);
}
