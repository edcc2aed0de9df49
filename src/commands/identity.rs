//! `peerix identity`: prints the public key that friends give to `--friend`.

use super::report::{print, say};
use super::{EXIT_NO, EXIT_YES, RunningDaemon};
use crate::config::Config;
use crate::identity;
use serde_json::json;

/// Prints the public key. With `--state-dir`, reads it from there and creates the identity if it is
/// missing. Otherwise asks the running daemon. Returns the exit status.
pub fn run(config: &Config, json: bool) -> u8 {
    match key(config) {
        Ok(key) => {
            if json {
                print(&json!({"version": 1, "identity": key}));
            } else {
                say(&format!("{key}\n"));
            }
            EXIT_YES
        }
        Err(e) => {
            eprintln!("peerix: {e}");
            EXIT_NO
        }
    }
}

fn key(config: &Config) -> Result<String, String> {
    if let Some(dir) = &config.state_dir {
        return identity::load(dir).map(|identity| identity.key().to_string());
    }
    let node = RunningDaemon::find(config)
        .map_err(|e| format!("{e}; start it, or say where its --state-dir is"))?;
    let key = node.status["node"]["identity"].as_str();
    key.map(str::to_owned)
        .ok_or("the daemon has no identity: it needs --state-dir, and its log says more".into())
}
