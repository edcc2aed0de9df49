//! The commands: they ask the running daemon, the network and Nix, and say what they find, in words
//! and by their exit status. Nothing is changed by them.
//!
//! The daemon tells of itself on loopback (docs/status.md), its flags among the rest, from which
//! its settings are made again here. Only `doctor` can do without it.

mod doctor;
mod identity;
mod listener;
mod nix;
mod peers;
mod probe;
mod report;
mod shell;
mod status;
mod why;

use crate::cli::{self, Command, CommandOptions, Subcommand};
use crate::config::Config;
use crate::degraded::Degraded;
use crate::http_client;
use crate::status::text::{bytes, found_by, long, short};
use crate::trust::TrustedKeys;
use serde_json::Value;
use std::io::Read;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};
use ureq::Agent;

/// An answer comes whole within this, as to a lookup, or nobody is there.
const HTTP_TIMEOUT: Duration = Duration::from_secs(2);

/// And for the daemon's status. One that is ill has a reason to tell, once it has waited 5 s for
/// its database and 2 s for its discovery.
const STATUS_TIMEOUT: Duration = Duration::from_secs(8);

/// An answer's body: the status of a node with 200 lookups and 256 peers, or a tracker's list of
/// 1,000 peers, has 300 KiB.
const MAX_ANSWER: u64 = 4 << 20;

/// All is well, or the answer is yes.
const YES: u8 = 0;
/// It is not.
const NO: u8 = 1;
/// What was asked for makes no sense.
const USAGE: u8 = 2;
/// No daemon runs.
const NOT_RUNNING: u8 = 3;

/// Runs a command; gives the exit status that the help describes.
pub fn run(ask: &CommandOptions) -> u8 {
    if ask.what == Subcommand::Doctor {
        return doctor::run(&ask.config, ask.json);
    }
    if ask.what == Subcommand::Identity {
        return identity::run(&ask.config, ask.json);
    }
    let node = match RunningDaemon::find(&ask.config) {
        Ok(node) => node,
        Err(e) => {
            eprintln!("peerix: {e}; peerix doctor says more");
            return NOT_RUNNING;
        }
    };
    match &ask.what {
        Subcommand::Why(path) => why::run(&node, path, ask.json),
        Subcommand::Peers => peers::run(&node, ask.json),
        _ => status::run(&node, ask.json),
    }
}

/// The running daemon.
struct RunningDaemon {
    /// Its settings.
    config: Config,
    /// What it tells of itself.
    status: Value,
}

impl RunningDaemon {
    /// Asks the daemon on the port that `asked` names.
    fn find(asked: &Config) -> Result<RunningDaemon, String> {
        if let Some(uid) = listener::stranger(asked.port) {
            return Err(format!(
                "user {uid} listens on port {}, whom root does not take at their word",
                asked.port
            ));
        }
        let url = format!("http://127.0.0.1:{}/status.json", asked.port);
        let answer = get_within(&url, STATUS_TIMEOUT)
            .map_err(|e| format!("no peerix answers on port {}: {e}", asked.port))?;
        let status: Value = match answer.status {
            200 => serde_json::from_slice(&answer.body).unwrap_or_default(),
            _ => Value::Null,
        };
        if status["version"] != 1 {
            return Err(format!(
                "what answers on port {} is no peerix of this version",
                asked.port
            ));
        }
        let flags = list(&status["node"]["flags"]).iter().map(|flag| text(flag).into());
        let config = match cli::parse(flags, |_| None) {
            // Sockets that systemd passes have the port that it chose.
            Ok(Command::Run(config)) => Config { port: asked.port, ..*config },
            _ => {
                return Err(format!(
                    "the peerix on port {} has flags that this one does not know",
                    asked.port
                ));
            }
        };
        Ok(RunningDaemon { config, status })
    }

    /// The keys by which the daemon chooses peers, as far as this user can read them.
    fn trusted(&self) -> TrustedKeys {
        TrustedKeys::read(&self.config, self.config.port, &Degraded::default())
    }
}

/// What a server answered.
struct HttpAnswer {
    status: u16,
    body: Vec<u8>,
    /// What its clock said.
    date: Option<SystemTime>,
}

/// `GET`, by no proxy and no redirect.
fn get(url: &str) -> Result<HttpAnswer, String> {
    get_within(url, HTTP_TIMEOUT)
}

/// The same of who needs time.
fn get_within(url: &str, timeout: Duration) -> Result<HttpAnswer, String> {
    let agent: Agent =
        http_client::https_config().proxy(None).timeout_global(Some(timeout)).build().into();
    let mut answer = agent.get(url).call().map_err(|e| e.to_string())?;
    let date = answer
        .headers()
        .get("date")
        .and_then(|date| httpdate::parse_http_date(date.to_str().ok()?).ok());
    let status = answer.status().as_u16();
    let mut body = Vec::new();
    answer
        .body_mut()
        .as_reader()
        .take(MAX_ANSWER)
        .read_to_end(&mut body)
        .map_err(|e| e.to_string())?;
    Ok(HttpAnswer { status, body, date })
}

/// Whether lookups ask `peer`, a row of the status made at `now`: `live`, `silent for 3 min` or
/// `never heard`. `None` if LAN discovery does not know it.
fn liveness(peer: &Value, now: f64) -> Option<String> {
    match (text(&peer["state"]), peer["silent_since"].as_f64()) {
        ("live", _) => Some("live".into()),
        ("silent", Some(since)) => Some(format!("silent for {}", long(now - since))),
        ("unheard", _) => Some("never heard".into()),
        _ => None,
    }
}

/// The moment at which a status was made, in seconds since 1970.
fn moment(status: &Value) -> f64 {
    status["time"].as_f64().unwrap_or_default()
}

/// The row of the peer whose HTTP server has this address.
fn peer_at(status: &Value, address: SocketAddr) -> Option<&Value> {
    let address = address.to_string();
    list(&status["peers"]).iter().find(|peer| text(&peer["address"]) == address)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn liveness_is_said_of_lan_peers_alone() {
        let said = |state, silent_since| {
            let peer = json!({"state": state, "silent_since": silent_since});
            liveness(&peer, 1180.0).unwrap_or_default()
        };
        assert_eq!(said("live".into(), Value::Null), "live");
        assert_eq!(said("silent".into(), 1000.0.into()), "silent for 3 min");
        assert_eq!(said("unheard".into(), Value::Null), "never heard");
        assert_eq!(said(Value::Null, Value::Null), "");
    }
}
