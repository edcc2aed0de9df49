//! `peerix doctor`: looks for faults that are common in practice, and prints a remedy for each.
//!
//! Only a state that no user wants is a failure. A network without peers is a note. A peer that is
//! heard but cannot be fetched from is a failure.

mod daemon;
mod files;
mod firewall;
mod network;
mod offers;
mod substituter;
mod trackers;

use super::report::Findings;
use crate::config::Config;

/// Runs all checks and prints their findings. Without a daemon, checks what can be checked by the
/// settings in `asked`. Returns the exit status.
pub fn run(asked: &Config, json: bool) -> u8 {
    let report = &mut Findings::default();
    let node = daemon::check(report, asked);
    let config = node.as_ref().map_or(asked, |node| &node.config);
    if node.is_none() {
        files::check_database(report, config);
    }
    files::check_secrets(report, config);
    let settings = substituter::check_settings(report, config, node.as_ref());
    // A daemon that does not serve has already reported the cause; further findings would follow
    // from it.
    if let Some(node) = node.as_ref().filter(|node| node.status["node"]["serves"] != false) {
        if config.mode.has_lan() {
            network::check(report, node);
        }
        if let Some(settings) = &settings {
            offers::check_keys(report, node, settings);
            offers::check_cached_misses(report, node, settings);
            substituter::check_order(report, config, settings);
            if !settings.peerix(config.port).is_empty()
                && !report.has_failed(&["database", "nix-daemon", "proxy", "substituter"])
            {
                substituter::check_nix_asks(report, node, settings);
            }
        }
    }
    if config.mode.has_wan() {
        trackers::check(report, config);
    }
    report.print(json, report.is_well())
}
