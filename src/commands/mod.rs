//! The subcommands. They query the running daemon, the network and Nix, and print what they find;
//! the exit status sums it up. They change nothing, but `identity` may create the identity.
//!
//! The daemon serves its status on loopback (docs/status.md). The status contains the daemon's
//! flags, which the commands parse to restore its settings, and the keys that it trusts. Only
//! `doctor` and `identity` work without a daemon.

mod doctor;
mod identity;
mod listener;
mod nix;
mod nix_cache;
mod peers;
mod probe;
mod program;
mod report;
mod shell;
mod status;
mod why;

use crate::cli::{self, Command, CommandOptions, Subcommand};
use crate::config::Config;
use crate::http_client;
use crate::network::{LanNetworks, Networks};
use crate::nix::PublicKey;
use crate::status::text::{bytes, found_by, long, short};
use crate::time_scale::Timeout;
use serde_json::Value;
use std::io::Read;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use ureq::Agent;

/// Timeout of a whole HTTP request, the body included. A server that takes longer counts as absent.
const HTTP_TIMEOUT: Timeout = Timeout::from_secs(2);

/// Timeout of a request for the daemon's status. A daemon with a fault needs up to 5 s for its
/// database and 2 s for discovery before it answers.
const STATUS_TIMEOUT: Duration = Duration::from_secs(8);

/// Maximum size of a response body, in bytes; the rest is cut off. A status with 200 lookups and
/// 256 peers, or a tracker's list of 1,000 peers, has 300 KiB.
const MAX_ANSWER_BYTES: u64 = 4 << 20;

/// Exit status if all is well, or if the answer is yes.
const EXIT_YES: u8 = 0;
/// Exit status if something is wrong, or if the answer is no.
const EXIT_NO: u8 = 1;
/// Exit status for an invalid argument.
const EXIT_USAGE: u8 = 2;
/// Exit status if no daemon runs.
const EXIT_NOT_RUNNING: u8 = 3;

/// Runs a command and returns its exit status, as documented in [`cli::HELP`]. Blocks until the
/// network and Nix have answered; each request has a timeout of at most 10 s.
pub fn run(ask: &CommandOptions) -> u8 {
    if ask.subcommand == Subcommand::Doctor {
        return doctor::run(&ask.config, ask.json);
    }
    if ask.subcommand == Subcommand::Identity {
        return identity::run(&ask.config, ask.json);
    }
    let node = match RunningDaemon::find(&ask.config) {
        Ok(node) => node,
        Err(e) => {
            eprintln!("peerix: {e}; peerix doctor says more");
            return EXIT_NOT_RUNNING;
        }
    };
    match &ask.subcommand {
        Subcommand::Why(path) => why::run(&node, path, ask.json),
        Subcommand::Peers => peers::run(&node, ask.json),
        _ => status::run(&node, ask.json),
    }
}

/// The running daemon.
struct RunningDaemon {
    /// The daemon's settings.
    config: Config,
    /// The daemon's `/status.json`.
    status: Value,
}

impl RunningDaemon {
    /// Reads this machine's networks, with the daemon's flags about them.
    fn networks(&self) -> Arc<LanNetworks> {
        Networks::read(self.config.networks.clone()).current()
    }

    /// Requests the status of the daemon on the port of `asked`. Blocks for at most
    /// [`STATUS_TIMEOUT`].
    ///
    /// # Errors
    /// One line: another user listens there, nothing answers, or the answer is of another version
    /// of peerix.
    fn find(asked: &Config) -> Result<RunningDaemon, String> {
        if let Some(uid) = listener::foreign_listener_uid(asked.port) {
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
            // systemd chooses the port of the sockets that it passes, whatever `--port` says.
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

    /// The keys by which the daemon accepts paths from peers, each with the code of its source.
    /// `None` if it accepts paths without a signature.
    fn trusted_keys(&self) -> Option<Vec<(PublicKey, &str)>> {
        let keys = self.status["node"]["public_keys"].as_array()?;
        let key = |row: &'_ Value| PublicKey::parse(text(&row["key"])).ok();
        Some(keys.iter().filter_map(|row| Some((key(row)?, text(&row["source"])))).collect())
    }
}

/// An HTTP response.
struct HttpAnswer {
    status: u16,
    body: Vec<u8>,
    /// Time of the server's `Date` header.
    date: Option<SystemTime>,
}

/// Sends a `GET` within [`HTTP_TIMEOUT`]. Uses no proxy and follows no redirect.
///
/// # Errors
/// One line: why there is no whole response.
fn get(url: &str) -> Result<HttpAnswer, String> {
    get_within(url, HTTP_TIMEOUT.get())
}

/// Sends a `GET` within `timeout`. Uses no proxy and follows no redirect.
///
/// # Errors
/// One line: why there is no whole response.
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
        .take(MAX_ANSWER_BYTES)
        .read_to_end(&mut body)
        .map_err(|e| e.to_string())?;
    Ok(HttpAnswer { status, body, date })
}

/// State of `peer`, a row of the status that was made at `now`, in seconds since 1970: `live`,
/// `silent for 3 min` or `never heard`. `None` if LAN discovery does not know the peer.
fn peer_state(peer: &Value, now: f64) -> Option<String> {
    match (text(&peer["state"]), peer["silent_since"].as_f64()) {
        ("live", _) => Some("live".into()),
        ("silent", Some(since)) => Some(format!("silent for {}", long(now - since))),
        ("unheard", _) => Some("never heard".into()),
        _ => None,
    }
}

/// Time at which a status was made, in seconds since 1970.
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
    fn peer_state_is_known_of_lan_peers_only() {
        let said = |state, silent_since| {
            let peer = json!({"state": state, "silent_since": silent_since});
            peer_state(&peer, 1180.0).unwrap_or_default()
        };
        assert_eq!(said("live".into(), Value::Null), "live");
        assert_eq!(said("silent".into(), 1000.0.into()), "silent for 3 min");
        assert_eq!(said("unheard".into(), Value::Null), "never heard");
        assert_eq!(said(Value::Null, Value::Null), "");
    }
}
