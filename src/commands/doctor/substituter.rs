//! Checks Nix's settings, and that Nix asks this machine's peerix.

use crate::commands::nix::{self, NixSettings, SubstituterRank};
use crate::commands::report::Findings;
use crate::commands::{RunningDaemon, list, long};
use crate::config::Config;
use crate::trust::{KeySource, Substituter};
use rustix::fs::{Access, access};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::Path;

/// Checks the settings of nix-daemon, or of this user's Nix if none runs. Returns `None` if Nix
/// does not print them.
pub(super) fn check_settings(
    report: &mut Findings,
    config: &Config,
    node: Option<&RunningDaemon>,
) -> Option<NixSettings> {
    let settings = match NixSettings::read() {
        Ok(settings) => settings,
        Err(e) => {
            report.note("nix", format!("Nix does not tell its settings: {e}"));
            return None;
        }
    };
    check_substituter(report, &settings, config.port);
    if let Some(after) = nix::outdated() {
        let text = format!(
            "nix.conf was written {} after nix-daemon had started, which goes by the old one",
            long(after as f64)
        );
        report.fail("nix-daemon", text, "systemctl restart nix-daemon".into());
    }
    for fault in settings.key_faults() {
        let conf = if Path::new("/etc/NIXOS").exists() {
            "nix.settings.trusted-public-keys"
        } else {
            "/etc/nix/nix.conf"
        };
        report.fail(
            "keys",
            fault,
            format!("take it out of {conf}, or of a file that is included there"),
        );
    }
    if let Some(node) = node.filter(|_| settings.takes_unsigned(config.port).is_none()) {
        check_known_keys(report, node, &settings);
    }
    Some(settings)
}

/// Reports keys of flags and friends that Nix does not trust.
fn check_known_keys(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
    let known = settings.words("trusted-public-keys");
    let keys = node.trusted_keys().unwrap_or_default().into_iter();
    let keys = keys.filter(|(_, source)| *source != KeySource::NixConf.code());
    for key in keys.map(|(key, _)| key.to_string()).filter(|key| !known.contains(&key.as_str())) {
        let text = format!("peerix accepts what {key} signed, and Nix does not");
        report.fail("keys", text, nix::add("extra-trusted-public-keys", &key));
    }
}

/// Checks by Nix's settings and environment that Nix asks peerix.
fn check_substituter(report: &mut Findings, settings: &NixSettings, port: u16) {
    let whose = if settings.daemon.is_some() { "nix-daemon" } else { "Nix" };
    let local = |word: &&&str| Substituter::parse(word).local_port().is_some();
    match settings.peerix(port).first() {
        _ if settings.get("substitute") == "false" => {
            // nix.conf can turn it off. Nix also does so if it finds only loopback and link-local
            // addresses.
            let text =
                "substitute is off, by nix.conf or because Nix finds no network: Nix asks nobody";
            let remedy = nix::set("substitute = true", "substitute = true;");
            let remedy =
                format!("{remedy}\nif nix.conf does not say so: nix --option substitute true ...");
            report.fail("substituter", text.into(), remedy);
        }
        Some(url) => match settings.proxy(url) {
            Some((variable, proxy)) => {
                report.fail(
                    "proxy",
                    nix::asks_by_proxy(&variable, &proxy, url),
                    nix::no_proxy(settings),
                );
            }
            None => report.ok("substituter", format!("{whose} is to ask {url}")),
        },
        None if nix::query_ignored_substituter(settings, port) => {
            let text = "nix-daemon ignores the peerix in this user's nix.conf: it is an untrusted substituter, and the user is none of its trusted-users";
            report.fail("substituter", text.into(), nix::substitute(port));
        }
        None => {
            let substituters = settings.words("substituters");
            let other =
                substituters.iter().find(local).map(|url| format!("; {url} is not this one"));
            let other = other.unwrap_or_default();
            report.fail(
                "substituter",
                format!("peerix is none of Nix's substituters{other}"),
                nix::substitute(port),
            );
        }
    }
}

/// Reports the caches that Nix asks before peerix. A path that they have never comes from a peer.
pub(super) fn check_order(report: &mut Findings, config: &Config, settings: &NixSettings) {
    let own = settings.peerix(config.port);
    let ranks = nix::order(settings);
    let Some(at) = ranks.iter().position(|rank| own.contains(&rank.url.as_str())) else { return };
    let Some(priority) = ranks[at].priority else { return };
    let before: Vec<&SubstituterRank> =
        ranks[..at].iter().filter(|rank| rank.priority.is_some_and(|p| p < priority)).collect();
    let Some(lowest) = before.iter().filter_map(|rank| rank.priority).min() else { return };
    let names: Vec<String> =
        before.iter().map(|rank| format!("{} ({})", rank.url, rank.says)).collect();
    let text = format!(
        "Nix asks {} before peerix ({priority}): what is there never comes from a peer",
        names.join(", ")
    );
    // An explicit priority means that the user chose the order.
    let is_chosen =
        config.priority != Config::default().priority || ranks[at].url.contains("priority=");
    match (is_chosen, lowest.checked_sub(1)) {
        (false, Some(lower)) => report.fail("priority", text, format!("peerix --priority {lower}")),
        (false, None) => report.fail(
            "priority",
            text,
            "a priority for the other in nix.conf: its URL and ?priority=50".into(),
        ),
        (true, _) => report.note("priority", text),
    }
}

/// Makes Nix ask for a path that does not exist, and checks that this peerix got the lookup. Blocks
/// until Nix has asked all substituters, for at most 10 s, and for at most 8 s more for the status.
pub(super) fn check_nix_asks(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
    let whose = if settings.daemon.is_some() { "nix-daemon" } else { "Nix" };
    let state = node.config.db.parent().unwrap_or(Path::new("/"));
    if settings.daemon.is_none() && access(state, Access::WRITE_OK).is_err() {
        return report.note(
            "asked",
            "whether Nix asks this peerix, a user finds out who may write to the store".into(),
        );
    }
    // Random, because Nix caches the miss for each path.
    let nowhere = format!(
        "{}{:016}",
        nix::MISSING_HASH_PREFIX,
        RandomState::new().build_hasher().finish() % 10_000_000_000_000_000
    );
    let query = nix::make_nix_query(
        &format!("{}/{nowhere}-peerix-doctor", node.config.store_dir.as_str()),
        settings,
    );
    let Ok(after) = RunningDaemon::find(&node.config) else { return };
    let mut lookups = list(&after.status["lookups"]).iter();
    match (lookups.any(|lookup| lookup["hash_part"] == nowhere.as_str()), query) {
        (true, _) => report.ok(
            "asked",
            format!("{whose} asked this peerix for a path that is nowhere, and goes on"),
        ),
        // Another substituter may delay Nix. So may this peerix, for longer if fewer peers answer.
        (false, Err(e)) => report.note(
            "asked",
            format!(
                "{whose} has not finished asking for a path that is nowhere, so it is not known \
                 whether it asks this peerix: {e}"
            ),
        ),
        (false, Ok(())) => report.fail(
            "asked",
            format!(
                "{whose} was made to ask for a path that is nowhere, and has not asked this peerix"
            ),
            "systemctl restart nix-daemon\nwhat it says: journalctl -u nix-daemon -n 20".into(),
        ),
    }
}
