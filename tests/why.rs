//! `peerix why` for each of its reasons, `peerix peers` and `peerix status`: findings, exit
//! statuses and JSON.

use crate::common::daemon::{binary, narinfo_status, wait_until_known};
use crate::common::http::{self, Reply, Server};
use crate::common::lan::Run;
use crate::common::scene::WanScene;
use crate::common::standin::{self, StandIn, StaticCache};
use crate::common::tracker::flags;
use crate::common::{Asker, Daemon, Holder, Host, Lan, Scale, World, nix, stock, wait_for, world};
use serde_json::Value;
use std::process::Output;

const NOWHERE: &str = "/nix/store/00000000000000000000000000000000-nowhere";

fn peerix(host: &Host, args: &[&str]) -> Output {
    host.cmd(&binary().display().to_string()).args(args).ran()
}

/// The findings of a command (state, kind and text of each), and its exit status.
struct CommandReport {
    status: i32,
    findings: Vec<(String, String, String)>,
}

impl CommandReport {
    fn by(host: &Host, args: &[&str]) -> CommandReport {
        let output = peerix(host, &[args, &["--json"]].concat());
        let all: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| {
            panic!("{args:?}: {e}: {}", String::from_utf8_lossy(&output.stderr))
        });
        let text =
            |finding: &Value, key: &str| finding[key].as_str().unwrap_or_default().to_owned();
        let findings = all["findings"].as_array().unwrap().iter();
        let findings = findings.map(|f| (text(f, "state"), text(f, "what"), text(f, "text")));
        let told =
            CommandReport { status: output.status.code().unwrap(), findings: findings.collect() };
        assert_eq!(
            (all["version"].as_u64(), &all["ok"]),
            (Some(1), &Value::Bool(told.status == 0))
        );
        told
    }

    /// Checks that a finding of this state and kind contains all of `words`.
    fn says(&self, state: &str, what: &str, words: &[&str]) -> &CommandReport {
        let is_it = |(s, w, text): &(String, String, String)| {
            s == state && w == what && words.iter().all(|word| text.contains(word))
        };
        assert!(
            self.findings.iter().any(is_it),
            "no {state} {what} {words:?}: {:#?}",
            self.findings
        );
        self
    }

    /// Checks the exit status, and that the last finding is a verdict with `words`.
    fn ends(&self, status: i32, words: &str) -> &CommandReport {
        assert_eq!(self.status, status, "{:#?}", self.findings);
        let state = if status == 0 { "ok" } else { "fail" };
        let last = self.findings.last().unwrap();
        assert!(
            (&*last.0, &*last.1) == (state, "verdict") && last.2.contains(words),
            "{:#?}",
            self.findings
        );
        self
    }
}

fn why(host: &Host, path: &str) -> CommandReport {
    CommandReport::by(host, &["why", path])
}

#[test]
fn missing_daemon_or_invalid_path_is_one_error_line() {
    let lan = Lan::new();
    let host = lan.host("a");
    stock::ready(&host);
    for args in [&["status"][..], &["peers"], &["why", NOWHERE], &["status", "--json"]] {
        let output = peerix(&host, args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.lines().count()), (Some(3), 1), "{said}");
        assert!(
            said.starts_with("peerix: no peerix answers on port 12304")
                && said.contains("peerix doctor"),
            "{said}"
        );
        assert!(output.stdout.is_empty());
    }
    // Another program listens on the port.
    let other =
        Server::start(host.listen(crate::common::PORT), |_| Reply::Whole(200, b"{}".to_vec()));
    assert_eq!(peerix(&host, &["status"]).status.code(), Some(3));
    drop(other);

    let _daemon = Daemon::start(&host, &[]);
    for path in
        ["hello", "/nix/store", "/nix/store/", "/etc/passwd", "/nix/store/short-name", "\u{1b}[2J"]
    {
        let output = peerix(&host, &["why", path]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{path}: {said}");
        assert!(
            said.contains("no store path")
                && said.contains("/nix/store/")
                && !said.contains('\u{1b}'),
            "{said}"
        );
    }
    assert_eq!(peerix(&host, &["why"]).status.code(), Some(2));
    assert_eq!(peerix(&host, &["peers"]).status.code(), Some(1), "nobody is there");
    let status = peerix(&host, &["status"]);
    assert!(
        status.status.success()
            && String::from_utf8_lossy(&status.stdout).contains("mode lan, port 12304")
    );
}

/// Changes one row of Nix's cache of narinfos on a host. Works on a copy, because SQLite does not
/// open files of another root directory.
fn change_memory(host: &Host, statement: &str) {
    let dir = host.path("/root/.cache/nix");
    let is_memory = |name: &str| name.starts_with("binary-cache-v") && name.ends_with(".sqlite");
    let mut files = std::fs::read_dir(&dir)
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap());
    let name = files.find(|name| is_memory(name)).unwrap();
    let copy = crate::common::directory().join(format!("memory-{}", std::process::id()));
    std::fs::copy(dir.join(&name), &copy).unwrap();
    let connection = rusqlite::Connection::open(&copy).unwrap();
    assert_eq!(connection.execute(statement, ()).unwrap(), 1);
    drop(connection);
    std::fs::copy(&copy, dir.join(&name)).unwrap();
    std::fs::remove_file(copy).unwrap();
}

/// Nix does not ask peerix if the derivation forbids substitution, or if Nix has cached another
/// answer.
#[test]
fn why_reports_forbidden_substitution_and_cached_narinfos() {
    let lan = Lan::new();
    let (a, b) = (lan.host("a"), lan.host("b"));
    stock::ready(&a);
    nix::configure_client(&b, "", &[&nix::generate_key(&a)]);
    let expression = |text: &str| {
        format!(
            "derivation {{ name = \"local\"; allowSubstitutes = false; system = builtins.currentSystem; \
             builder = \"/bin/sh\"; args = [ \"-ec\" \"echo {text} > $out\" ]; }}"
        )
    };
    let _daemons =
        [Daemon::start(&a, &["--private-key", "/etc/peerix.sec"]), Daemon::start(&b, &[])];
    a.write("/tmp/local.nix", expression("text"));
    let path = a.sh("nix-build --no-out-link /tmp/local.nix 2>/dev/null").trim().to_owned();
    wait_for("b finds it", || (narinfo_status(&b, &path) == 200).then_some(()));
    // Host b does not have the derivation yet.
    why(&b, &path).ends(0, "Nix gets it from a peer");
    b.write("/tmp/local.nix", expression("text"));
    let derivation = b.sh("nix-instantiate /tmp/local.nix 2>/dev/null").trim().to_owned();
    why(&b, &path).ends(1, "does not ask").says(
        "fail",
        "derivation",
        &[&derivation, "allowSubstitutes"],
    );
    // The argument may be a symlink to the missing path, as nix-build makes one.
    b.sh(&format!("ln -s {path} /tmp/result"));
    why(&b, "/tmp/result").ends(1, "does not ask").says("ok", "peer", &[&path]);

    // Nix caches the narinfo of another build that no peer has.
    b.sh(&format!("nix path-info --store http://127.0.0.1:12304 {path}"));
    why(&b, &path).says("fail", "derivation", &[]);
    let is_remembered = |told: &CommandReport| {
        told.findings.iter().any(|(state, what, _)| state == "fail" && what == "memory")
    };
    assert!(!is_remembered(&why(&b, &path)), "what is remembered is what a has");
    let hash = format!("sha256:{}", "0".repeat(52));
    change_memory(&b, &format!("update NARs set narHash = '{hash}' where present = 1"));
    why(&b, &path).ends(1, "does not ask").says("fail", "memory", &[&hash, "no peer has"]);
}

#[test]
fn why_on_lan_reports_each_reason() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::with_next(&lan, &world, &[&holder]);
    let at = format!("{}:12304", holder.host.address);
    let (host, little) = (&asker.host, world.path("little"));

    let told = why(host, little);
    told.ends(0, "Nix gets it from a peer").says("note", "here", &["not valid"]).says(
        "ok",
        "peer",
        &[&at, little],
    );
    told.says("ok", "trust", &["signed by cache-1"]).says(
        "note",
        "order",
        &["http://127.0.0.1:12304 (20), file://", "(90)"],
    );
    // All spellings of a store path are accepted.
    for path in [world::hash_part(little), world::base_name(little), &format!("{little}/data")] {
        why(host, path).ends(0, "Nix gets it from a peer");
    }
    // A content-addressed path needs no signature.
    why(host, &holder.mark).ends(0, "from a peer").says("ok", "trust", &["content"]);
    why(host, NOWHERE).ends(1, "none has it").says("note", "peer", &["nobody"]);
    let text = String::from_utf8(peerix(host, &["why", NOWHERE]).stdout).unwrap();
    assert!(text.lines().last().unwrap().starts_with("FAIL  verdict: "), "{text}");

    // Paths in the local store.
    let here = why(&holder.host, little);
    here.ends(0, "Nix has it here").says(
        "ok",
        "here",
        &[little, "is valid here", "signed by cache-1"],
    );
    here.says("ok", "lan", &[&format!("{}/24", holder.host.address)]).says(
        "note",
        "wan",
        &["in mode lan"],
    );

    // peerix is not among the substituters.
    nix::configure(host, &format!("trusted-public-keys = {}\n", world.cache_key));
    why(host, little).ends(1, "does not ask").says("fail", "substituter", &["none of Nix's"]);
    // Nix trusts no key, and neither does peerix.
    nix::configure_client(host, "", &[]);
    why(host, little).ends(1, "would not trust").says(
        "fail",
        "trust",
        &["Nix would refuse it", "cache-1", "not trusted"],
    );
    nix::configure_client(host, "", &["cache-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="]);
    why(host, little).ends(1, "would not trust").says("fail", "trust", &["not of the key"]);
    nix::configure(host, "extra-substituters = http://127.0.0.1:12304\nrequire-sigs = false\n");
    why(host, little).ends(0, "from a peer").says("ok", "trust", &["require-sigs is off"]);
    nix::configure_client(host, "", &[&world.cache_key]);

    // Nix has cached a miss.
    holder.host.write("/tmp/later", "later");
    let later = mark_of(&holder.host, "/tmp/later");
    holder.host.cmd("nix-store").args(["--delete", &later]).okay();
    assert!(!nix::realise(host, &[&later]).status.success());
    why(host, &later).ends(1, "none has it").says("note", "asked", &["it missed"]);
    mark_of(&holder.host, "/tmp/later");
    why(host, &later).ends(1, "does not ask").says(
        "fail",
        "memory",
        &["another", "binary-cache-v"],
    );
    let text = String::from_utf8(peerix(host, &["why", &later]).stdout).unwrap();
    assert!(text.contains(&format!("narinfo-cache-negative-ttl 0 {later}\n")), "{text}");
    // The user's and the daemon's URL of peerix may have settings, under which Nix remembers it
    // without.
    let conf = |url: &str| {
        let keys = format!("trusted-public-keys = {}\n", world.cache_key);
        nix::configure(host, &format!("extra-substituters = {url}\n{keys}"));
    };
    conf("http://127.0.0.1:12304/?priority=1");
    why(host, &later).says("fail", "memory", &["another", "binary-cache-v"]);
    nix::configure_client(host, "", &[&world.cache_key]);

    // The holder answers queries, but its TCP port is closed.
    holder.host.net("iptables -A INPUT -p tcp --dport 12304 -j REJECT");
    why(host, little).ends(1, "passed over").says("fail", "peer", &[&at, "does not give it"]);
    holder.host.net("iptables -F");

    // `peerix peers` lists the peers that answer.
    let peers = CommandReport::by(host, &["peers"]);
    let words = ["answers queries", "shares with this machine", "daemon: live, found by "];
    peers.says("ok", "peer", &[&words[..], &[&*at]].concat());
    assert_eq!((peers.status, peers.findings.len()), (0, 1), "{:#?}", peers.findings);
    // `peerix status` lists the lookups.
    nix::realise_quietly(host, &[little]);
    let shown = String::from_utf8(peerix(host, &["status"]).stdout).unwrap();
    let peer = format!("  {at}: live, found by ");
    let hit = format!("hit  {}", world::base_name(little));
    for words in ["peerix 0.1.0, mode lan, port 12304", &peer, "peers: 1", &hit] {
        assert!(shown.contains(words), "no {words} in\n{shown}");
    }
    assert!(!shown.contains('\u{fffd}'), "{shown}");
    let json: Value = serde_json::from_slice(&peerix(host, &["status", "--json"]).stdout).unwrap();
    assert_eq!((json["version"].as_u64(), json["node"]["mode"].as_str()), (Some(1), Some("lan")));
}

fn mark_of(host: &Host, file: &str) -> String {
    host.cmd("nix-store").args(["--add", file]).okay().trim().to_owned()
}

#[test]
fn why_reports_silent_peer_as_not_asked() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let at = format!("{}:12304", holder.host.address);
    holder.host.fall_silent();
    wait_for("the holder is silent", || {
        assert_eq!(narinfo_status(&asker.host, NOWHERE), 404);
        let status = http::get_local(&asker.host, "/status.json").unwrap();
        let status: Value = serde_json::from_slice(&status.body).unwrap();
        (status["peers"][0]["state"] == "silent").then_some(())
    });
    let told = why(&asker.host, world.path("little"));
    told.ends(1, "none has it").says("note", "peer", &["silent, and so not asked", &at]);
    CommandReport::by(&asker.host, &["peers"]).says("note", "peer", &[&at, "daemon: silent for "]);
}

/// A peer whose paths no trusted key has signed.
#[test]
fn why_reports_untrusted_signature() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::with(&lan, &world, "holder", |_| vec![]);
    let asker = Asker::new(&lan, &world, &[&holder]);
    let at = format!("{}:12304", holder.host.address);
    let little = world.path("little");
    let told = why(&asker.host, little);
    told.ends(1, "it would not trust what they have").says("ok", "peer", &[&at]);
    told.says("fail", "trust", &["Nix would refuse it", "no signature"]);
    // A Nix without `require-sigs` accepts them.
    drop(asker);
    let asker = Asker::flagged(&lan, "", &[], |host| {
        nix::configure(host, "substituters = http://127.0.0.1:12304\nrequire-sigs = false\n");
        vec![]
    });
    wait_for("peers are not held to keys", || {
        (narinfo_status(&asker.host, little) == 200).then_some(())
    });
    why(&asker.host, little).ends(0, "Nix gets it from a peer").says(
        "ok",
        "trust",
        &["require-sigs is off"],
    );
}

/// A peer with a trusted narinfo that sends another NAR.
#[test]
fn why_reports_avoided_peer() {
    // The longer interval keeps the liar avoided for a minute instead of a second.
    let lan = Lan::new().with_scale(Scale::intervals(60.0));
    let world = World::on(&lan);
    let (liar, shelf, little) = (lan.host("liar"), StaticCache::of(&world), world.path("little"));
    let at = format!("{}:12304", liar.address);
    let part = world::hash_part(little).to_owned();
    let mine = part.clone();
    let narinfo = shelf.peer_narinfo(&part, "local/nar/x.nar").unwrap();
    let nar = vec![b'x'; shelf.nar(&part).unwrap().len()];
    let _liar = StandIn::start(&liar, standin::have(move |asked| asked == mine), move |request| {
        match request.path.ends_with(".narinfo") {
            true => Reply::Whole(200, narinfo.clone().into_bytes()),
            false => Reply::Whole(200, nar.clone()),
        }
    });
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    wait_for("it is avoided", || {
        let answer = http::get_local(&asker.host, &format!("/{part}.narinfo"))
            .ok()
            .filter(|answer| answer.status == 200);
        if let Some(url) = answer.map(|answer| stock::line(&answer.text(), "URL").to_owned()) {
            let _ = http::get_local(&asker.host, &format!("/{url}"));
        }
        let status: Value =
            serde_json::from_slice(&peerix(&asker.host, &["status", "--json"]).stdout).unwrap();
        status["peers"]
            .as_array()?
            .iter()
            .any(|peer| peer["avoided"]["wholly"] == true)
            .then_some(())
    });
    let told = why(&asker.host, little);
    told.ends(1, "passed over").says("ok", "trust", &["signed by cache-1"]);
    told.says("fail", "peer", &[&at, "avoided at the moment"]);
    CommandReport::by(&asker.host, &["peers"]).says("note", "peer", &["avoided at the moment"]);
}

#[test]
fn why_on_wan_reports_each_reason() {
    let places = WanScene::new();
    let (world, trackers) = (&places.world, [&places.tracker.host]);
    let upstream = places.centre.host("upstream");
    let dir = world.cache();
    let serving = |host: &Host| {
        let dir = dir.clone();
        Server::start(host.listen(8080), move |request| {
            let file = std::fs::read(dir.join(request.path.trim_start_matches('/')));
            file.map_or_else(|_| Reply::Whole(404, b"404".to_vec()), |body| Reply::Whole(200, body))
        })
    };
    let server = serving(&upstream);
    let url = format!("http://{}:8080", upstream.address);
    let holder = Holder::with(&places.away, world, "holder", |host| {
        world.sign(host);
        let mut all = flags(host, "wan", &trackers);
        all.extend(
            ["--upstream-cache", &url, "--filter-patterns", "*-other", "*-odd"].map(str::to_owned),
        );
        all
    });
    let asker =
        Asker::flagged(&places.home, "", &[&world.cache_key], |host| flags(host, "wan", &trackers));
    let little = world.path("little");
    wait_for("what is shared is found", || {
        (narinfo_status(&asker.host, little) == 200).then_some(())
    });

    let told = why(&asker.host, little);
    told.ends(0, "from a peer").says("ok", "peer", &["203.0.113.1:12304 (holder)", little]);
    let here = |path: &str| why(&holder.host, path);
    here(little).ends(0, "has it here").says("note", "lan", &["the mode is wan"]).says(
        "ok",
        "wan",
        &["everybody"],
    );
    here(world.path("other")).says("note", "wan", &["its name matches the pattern *-other"]);
    here(&holder.mark).says("note", "wan", &[&url, "does not have it"]);
    // A path that is not shared is a miss.
    why(&asker.host, world.path("other")).ends(1, "none shares it");
    drop(server);
    here(world.path("closure300")).says("note", "wan", &[&url, "did not say"]);
    let peers = CommandReport::by(&asker.host, &["peers"]);
    assert_eq!((peers.status, peers.findings.len()), (0, 1), "{:#?}", peers.findings);
    peers.says("ok", "peer", &["203.0.113.1:12304 (holder)", "answers queries", "shares"]);
}

/// nix.conf of the daemon may be another one than that of the user.
#[test]
fn why_goes_by_the_keys_of_the_daemon() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = lan.host("asker");
    nix::configure_client(&asker, "", &[&world.cache_key]);
    asker.write("/etc/daemons/nix.conf", "trusted-public-keys =\n");
    let little = world.path("little");
    {
        let _daemon = Daemon::start_with(&asker, &[("NIX_CONF_DIR", "/etc/daemons")], &[]);
        wait_until_known(&asker, &holder.mark);
        let told = why(&asker, little);
        told.ends(1, "passed over").says("fail", "trust", &["peerix passes", "not trusted"]);
    }
    let _daemon = Daemon::start(&asker, &[]);
    wait_until_known(&asker, &holder.mark);
    why(&asker, little).ends(0, "from a peer");
}
