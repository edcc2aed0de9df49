//! Checks that the daemon runs, and gives a remedy for each problem that its status reports.

use super::files;
use crate::cli::{self, Command};
use crate::commands::report::Findings;
use crate::commands::shell::quote;
use crate::commands::{RunningDaemon, list, listener, long, text};
use crate::config::Config;
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

/// Checks the daemon on the port of `asked`. Returns `None` if none runs there. Blocks for at most
/// 8 s for its status.
pub(super) fn check(report: &mut Findings, asked: &Config) -> Option<RunningDaemon> {
    let node = RunningDaemon::find(asked)
        .map_err(|e| report.fail("daemon", e, start_remedy(asked.port)))
        .ok()?;
    let node_report = &node.status["node"];
    let (version, mode) = (text(&node_report["version"]), text(&node_report["mode"]));
    let up = long(node_report["uptime_seconds"].as_f64().unwrap_or_default());
    report.ok(
        "daemon",
        format!("peerix {version} runs on port {}, mode {mode}, for {up}", node.config.port),
    );
    for problem in list(&node.status["health"]["problems"]) {
        report_problem(report, &node.config, problem);
    }
    Some(node)
}

/// Returns the remedy for a port on which no daemon answers.
fn start_remedy(port: u16) -> String {
    let whose = format!("whose the port is: ss -ltnp 'sport = :{port}'");
    let elsewhere = running_on().filter(|other| *other != port);
    match (listener::foreign_listener_uid(port), elsewhere) {
        (Some(uid), _) => {
            format!("if peerix runs as that user: sudo -u '#{uid}' peerix doctor\n{whose}")
        }
        (None, Some(other)) => format!("one runs on port {other}: peerix doctor --port {other}"),
        (None, None) => format!(
            "systemctl start peerix.socket peerix.service\n\
             if it does not stay: journalctl -u peerix -n 20\n{whose}\n\
             to build meanwhile, without any cache: nix-build --option substituters ''"
        ),
    }
}

/// Finds the port of a running peerix by the command lines in `/proc`.
fn running_on() -> Option<u16> {
    fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
        let line = fs::read(process.path().join("cmdline")).ok()?;
        let mut words = line.split(|byte| *byte == 0).map(|word| OsString::from_vec(word.to_vec()));
        words.next().filter(|program| Path::new(program).file_name() == Some("peerix".as_ref()))?;
        match cli::parse(words.filter(|word| !word.is_empty()), |_| None) {
            Ok(Command::Run(config)) => Some(config.port),
            _ => None,
        }
    })
}

/// Reports a problem of the daemon's status. Leaves out its trackers, which `doctor` asks itself.
fn report_problem(report: &mut Findings, config: &Config, problem: &Value) {
    let (code, message) = (text(&problem["code"]), text(&problem["text"]).to_owned());
    let is_serious = problem["serious"] == true;
    match (code, configuration_remedy(code, config)) {
        ("trackers", _) => {}
        // The file may contain secrets, so that the daemon's user is not allowed to read it.
        ("nix-conf", _) if message.contains("Permission denied") => report.note(
            "nix-conf",
            format!("{message}; keys in files that all may read, or in flags, count in any case"),
        ),
        (_, Some((what, remedy))) => report.fail(what, message, remedy),
        ("store", None) if is_serious => {
            report.fail("database", message, files::database_remedy(config));
        }
        ("store", None) => report.note("database", message),
        (_, None) if is_serious => {
            report.fail("daemon", message, "systemctl restart peerix".into());
        }
        (_, None) => report.note("daemon", message),
    }
}

/// Maps the code of a problem in the daemon's configuration to the name of the finding and its
/// remedy. `None` for other codes.
fn configuration_remedy(code: &str, config: &Config) -> Option<(&'static str, String)> {
    const RESTART: &str = "then: systemctl restart peerix";
    Some(match code {
        "flags" => (
            "flags",
            format!("the flags: systemctl cat peerix\nothers: systemctl edit peerix\n{RESTART}"),
        ),
        "private-key" => {
            let file = config.private_key.as_deref().unwrap_or(Path::new("FILE"));
            let word = quote(&file.display().to_string());
            let remedy = match file.starts_with("/run/credentials") {
                true => format!(
                    "where systemd takes it from: systemctl cat peerix | grep LoadCredential\nput it there, {RESTART}"
                ),
                false => format!(
                    "put it back from a backup; if there is none: \
                     nix-store --generate-binary-cache-key $(hostname)-1 {word} {word}.pub\n\
                     a user that may not read it: chown USER {word}"
                ),
            };
            ("private-key", remedy)
        }
        "public-key" => {
            ("public-key", "a file with NAME:KEY in it, that the daemon's user can read".into())
        }
        "nix-conf" => (
            "nix-conf",
            "mend the line that is named, or what includes the file; Nix stumbles over it, too"
                .into(),
        ),
        "identity" => (
            "identity",
            "put it back from a backup, or remove it to be a new peer to the trackers".into(),
        ),
        "friends" => (
            "friends",
            "in --friends-file, at most 16 lines NAME=ed25519:KEY[@HOST[:PORT]], that the daemon's \
             user can read\nfriends need --state-dir, where the daemon's user can write"
                .into(),
        ),
        "metrics" => (
            "metrics",
            "an address of this machine, and a port that is free: ss -ltnp; ip -brief address"
                .into(),
        ),
        _ => return None,
    })
}
