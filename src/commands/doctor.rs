//! `peerix doctor`: looks for faults that are common in practice, and prints a remedy for each.
//!
//! Only a state that no user wants is a failure. A network without peers is a note. A peer that is
//! heard but cannot be fetched from is a failure.

use super::listener;
use super::nix::{self, NixSettings};
use super::peers::NO_PATH;
use super::probe::{self, HttpProbe, NamedAddresses};
use super::program;
use super::report::Findings;
use super::shell::quote;
use super::{RunningDaemon, get, get_within, list, liveness, long, moment, peer_at, text};
use crate::cli::{self, Command};
use crate::config::{Config, DEFAULT_PORT};
use crate::network::{LanNetworks, Networks, neighbours};
use crate::nix::{HashPart, NarInfo};
use crate::store::{Store, StoreConfig, StoreError};
use crate::time_scale::Timeout;
use crate::trust::{KeySource, Substituter};
use rustix::fs::{Access, access};
use serde_json::Value;
use std::ffi::OsString;
use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, SystemTime};

/// Clock difference to a tracker that is reported as a fault, in seconds. A wrong clock affects the
/// validity of certificates and the expiry of Nix's binary-cache cache.
const MAX_CLOCK_DIFFERENCE_SECONDS: u64 = 120;

/// Age limit of recent contact with a peer, in seconds. Peers send a *hello* every 30 s, so a peer
/// that was heard within this time is probably still there. The daemon probes a silent peer at
/// least every 30 s, so a peer that has been silent for longer has left a probe unanswered.
const RECENT_CONTACT_SECONDS: f64 = 40.0;

/// Time after its start in which a daemon meets the neighbours that are there. It sends a *hello*
/// after 0, 0.1, 0.3, 0.7 and 1.5 s, and each is answered within 0.2 s. Until then, an unheard peer
/// is no sign of a fault.
const MEETING_TIME: Timeout = Timeout::from_secs(3);

/// Interval between requests for the status of a daemon that has just started.
const MEETING_POLL: Duration = Duration::from_millis(100);

/// Maximum number of status requests to a daemon that has just started. After the last one,
/// `doctor` uses the last status.
const MAX_MEETING_POLLS: u32 = 30;

/// Largest number of peers at which missing UDP answers are reported as a fault. A peerix 0.1 node
/// that knows more peers sends no *have not*.
const MAX_PEERS_WITH_HAVE_NOT: usize = 32;

/// Maximum number of addresses from the kernel's neighbour table that are queried. The others are
/// ignored.
const MAX_NEIGHBOURS: usize = 256;

/// Timeout of a request to a tracker's `/reach`. The tracker tries for up to 2 s to connect to this
/// machine before it answers.
const REACH_TIMEOUT: Duration = Duration::from_secs(5);

/// Number of recent lookups, and of cached misses, that are checked with the peers.
const SAMPLES: usize = 4;

pub fn run(asked: &Config, json: bool) -> u8 {
    let report = &mut Findings::default();
    let node = daemon(report, asked);
    let config = node.as_ref().map_or(asked, |node| &node.config);
    if node.is_none() {
        database(report, config);
    }
    secrets(report, config);
    let settings = nix_conf(report, config, node.as_ref());
    // A daemon that does not serve has already reported the cause; further findings would follow
    // from it.
    if let Some(node) = node.as_ref().filter(|node| node.status["node"]["serves"] != false) {
        if config.mode.has_lan() {
            network(report, node);
        }
        if let Some(settings) = &settings {
            keys(report, node, settings);
            check_cached_misses(report, node, settings);
            order(report, config, settings);
            if !settings.peerix(config.port).is_empty()
                && !report.has_failed(&["database", "nix-daemon", "proxy", "substituter"])
            {
                check_nix_asks(report, node, settings);
            }
        }
    }
    if config.mode.has_wan() {
        trackers(report, config);
    }
    report.print(json, report.is_well())
}

fn daemon(report: &mut Findings, asked: &Config) -> Option<RunningDaemon> {
    let node = match RunningDaemon::find(asked) {
        Ok(node) => node,
        Err(e) => {
            let whose = format!("whose the port is: ss -ltnp 'sport = :{}'", asked.port);
            let elsewhere = running_on().filter(|port| *port != asked.port);
            let remedy = match (listener::foreign_listener_uid(asked.port), elsewhere) {
                (Some(uid), _) => {
                    format!("if peerix runs as that user: sudo -u '#{uid}' peerix doctor\n{whose}")
                }
                (None, Some(port)) => {
                    format!("one runs on port {port}: peerix doctor --port {port}")
                }
                (None, None) => format!(
                    "systemctl start peerix.socket peerix.service\n\
                     if it does not stay: journalctl -u peerix -n 20\n{whose}\n\
                     to build meanwhile, without any cache: nix-build --option substituters ''"
                ),
            };
            report.fail("daemon", e, remedy);
            return None;
        }
    };
    let node_report = &node.status["node"];
    let (version, mode) = (text(&node_report["version"]), text(&node_report["mode"]));
    let up = long(node_report["uptime_seconds"].as_f64().unwrap_or_default());
    report.ok(
        "daemon",
        format!("peerix {version} runs on port {}, mode {mode}, for {up}", node.config.port),
    );
    // [`trackers`] reports on the trackers.
    for problem in list(&node.status["health"]["problems"])
        .iter()
        .filter(|problem| problem["code"] != "trackers")
    {
        let (is_store, message) = (problem["code"] == "store", text(&problem["text"]).to_owned());
        // The file may contain secrets, so that the daemon's user is not allowed to read it.
        if problem["code"] == "nix-conf" && message.contains("Permission denied") {
            report.note(
                "nix-conf",
                format!(
                    "{message}; keys in files that all may read, or in flags, count in any case"
                ),
            );
            continue;
        }
        if let Some((what, remedy)) = configuration_remedy(text(&problem["code"]), &node.config) {
            report.fail(what, message, remedy);
            continue;
        }
        let what = if is_store { "database" } else { "daemon" };
        match problem["serious"] == true {
            true if is_store => {
                let remedy = match Store::open(store_config(&node.config)) {
                    Err(e) => store_remedy(&e, &node.config.db),
                    // This user can open the database, and the daemon's user cannot.
                    Ok(_) => readable(&node.config.db),
                };
                report.fail(what, message, remedy);
            }
            true => report.fail(what, message, "systemctl restart peerix".into()),
            false => report.note(what, message),
        }
    }
    Some(node)
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

fn database(report: &mut Findings, config: &Config) {
    let (db, uid) = (config.db.display(), uid());
    match Store::open(store_config(config)) {
        Err(e) => report.fail("database", e.to_string(), store_remedy(&e, &config.db)),
        // Root can read every file, and the daemon may run as another user.
        Ok(_) if uid == 0 && !is_readable(&config.db) => {
            report.fail(
                "database",
                format!("{db}: only its owner may read it, and peerix may run as another user"),
                readable(&config.db),
            );
        }
        Ok(_) => report.ok("database", format!("{db} can be read by this user ({uid})")),
    }
}

fn store_config(config: &Config) -> StoreConfig {
    StoreConfig {
        store_dir: config.store_dir.clone(),
        db: config.db.clone(),
        root: config.root.clone(),
    }
}

fn store_remedy(e: &StoreError, db: &Path) -> String {
    let file = quote(&db.display().to_string());
    match e {
        StoreError::Unreadable { .. } => readable(db),
        StoreError::WalUnavailable { .. } => "systemctl enable --now nix-daemon.socket".into(),
        StoreError::Missing { .. } => "install Nix, or name the place by --db FILE".into(),
        // `nix-store --verify` would remove these paths from the database.
        StoreError::NoFiles { .. } => {
            "mount the store, or name the one that the database is of by --root DIR".into()
        }
        StoreError::Busy { .. } => format!("whose lock it is: fuser -v {file}"),
        StoreError::Database { .. } => {
            format!(
                "what is wrong with it: sqlite3 {file} 'pragma integrity_check'\nif it is damaged, put it back from a backup"
            )
        }
        _ => "nix-store --verify".into(),
    }
}

fn uid() -> u32 {
    rustix::process::getuid().as_raw()
}

/// Whether every user can read `file`, judged by its mode and the modes of its directories.
fn is_readable(file: &Path) -> bool {
    let may = |path: &Path, bit| {
        fs::metadata(path).is_ok_and(|meta| meta.permissions().mode() & bit != 0)
    };
    may(file, 0o004)
        && file.ancestors().skip(1).all(|dir| dir.as_os_str().is_empty() || may(dir, 0o001))
}

fn readable(db: &Path) -> String {
    format!("chmod -R o+rX {}", quote(&db.parent().unwrap_or(db).display().to_string()))
}

/// Checks that other users cannot read the private key and the identity.
fn secrets(report: &mut Findings, config: &Config) {
    let identity = config.state_dir.as_ref().map(|dir| dir.join("identity"));
    for file in config.private_key.iter().chain(identity.iter()) {
        let name = file.display();
        let word = quote(&name.to_string());
        match fs::metadata(file) {
            // systemd gives a service access to its credentials by group permissions.
            Ok(meta) if meta.permissions().mode() & 0o007 != 0 => {
                let remedy = match file.starts_with("/nix/store") {
                    true => format!(
                        "install -m 600 {word} /etc/nix/peerix.sec, name that file, and make another key"
                    ),
                    false => format!("chmod 600 {word}"),
                };
                report.fail(
                    "secret",
                    format!("{name}: every user of this machine may read it, and sign as it"),
                    remedy,
                );
            }
            Ok(_) => report.ok("secret", format!("{name} cannot be read by others")),
            // The daemon creates a missing identity at its start.
            Err(e)
                if e.kind() == ErrorKind::NotFound && config.private_key.as_ref() != Some(file) => {
            }
            Err(e) => report.note("secret", format!("{name}: cannot be looked at: {e}")),
        }
    }
}

fn nix_conf(
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
    substituter(report, &settings, config.port);
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
        keys_unknown_to_nix(report, node, &settings);
    }
    Some(settings)
}

/// Reports keys of flags and friends that Nix does not trust.
fn keys_unknown_to_nix(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
    let known = settings.words("trusted-public-keys");
    let keys = node.trusted_keys().unwrap_or_default().into_iter();
    let keys = keys.filter(|(_, source)| *source != KeySource::NixConf.code());
    for key in keys.map(|(key, _)| key.to_string()).filter(|key| !known.contains(&key.as_str())) {
        let conf = format!("extra-trusted-public-keys = {key}");
        let remedy = nix::set(&conf, &format!("extra-trusted-public-keys = [ \"{key}\" ];"));
        report.fail("keys", format!("peerix accepts what {key} signed, and Nix does not"), remedy);
    }
}

/// Checks by Nix's settings and environment that Nix asks peerix.
fn substituter(report: &mut Findings, settings: &NixSettings, port: u16) {
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
fn order(report: &mut Findings, config: &Config, settings: &NixSettings) {
    let own = settings.peerix(config.port);
    let ranks = nix::order(settings);
    let Some(at) = ranks.iter().position(|rank| own.contains(&rank.url.as_str())) else { return };
    let Some(priority) = ranks[at].priority else { return };
    let before: Vec<&nix::SubstituterRank> =
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
fn check_nix_asks(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
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
        // Another substituter may keep Nix waiting, and this peerix the longer the fewer peers
        // answer.
        (false, Err(e)) => report.note(
            "asked",
            format!(
                "{whose} has not finished to ask for a path that is nowhere, so whether it asks this \
                 peerix is not known: {e}"
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

/// Returns the command or setting that opens a port in this machine's firewall. Runs `firewall-cmd`
/// and `nft` to find out which firewall is in use, and blocks for at most 10 s for each.
fn open_port(protocol: &str, port: u16) -> String {
    let output_of = |name: &str, words: &[&str]| program::run(name, words, &[]).unwrap_or_default();
    if Path::new("/etc/NIXOS").exists() {
        return format!(
            "networking.firewall.allowed{}Ports = [ {port} ];",
            protocol.to_uppercase()
        );
    }
    if output_of("firewall-cmd", &["--state"]).trim() == "running" {
        return format!(
            "firewall-cmd --permanent --add-port={port}/{protocol} && firewall-cmd --reload"
        );
    }
    if fs::read_to_string("/etc/ufw/ufw.conf").is_ok_and(|conf| conf.contains("ENABLED=yes")) {
        return format!("ufw allow {port}/{protocol}");
    }
    if let Some(chain) = nft_input_chain(&output_of("nft", &["list", "chains"])) {
        return format!("nft insert rule {chain} {protocol} dport {port} accept");
    }
    format!("iptables -I INPUT -p {protocol} --dport {port} -j ACCEPT")
}

/// Returns family, table and name of the first chain with an input filter hook in the output of
/// `nft list chains`. Skips chains called `INPUT`, which iptables creates.
fn nft_input_chain(listed: &str) -> Option<String> {
    let (mut table, mut chain) = ("", "");
    for line in listed.lines().map(str::trim) {
        let name =
            |word: &str| line.strip_prefix(word).map(|rest| rest.trim_end_matches('{').trim());
        if let Some(named) = name("table ") {
            table = named;
        } else if let Some(named) = name("chain ") {
            chain = named;
        } else if line.starts_with("type filter hook input") && chain != "INPUT" {
            return Some(format!("{table} {chain}"));
        }
    }
    None
}

/// Returns a remedy that opens a port on the machine `ip`. It assumes the same firewall as on this
/// machine and says so, because that machine's firewall is not known.
fn open_port_there(ip: IpAddr, protocol: &str, port: u16) -> String {
    let here = open_port(protocol, port);
    format!(
        "on {ip}: {here}\nthat is for a firewall like this machine's; with another one: let in {protocol} port {port}"
    )
}

fn network(report: &mut Findings, node: &RunningDaemon) {
    let port = node.config.port;
    let networks = Networks::read(node.config.networks.clone()).current();
    let hears = |ip| probe::hears(&node.config, &networks, ip);
    let nothing = HashPart::parse(&NO_PATH).expect("zeros are Nix32");
    let named = NamedAddresses::resolve(&node.config);
    for (host, e) in &named.unresolved {
        report_unresolved(report, host, e);
    }
    let known = probe::known_or_named(&node.status, &named);
    let asked: Vec<SocketAddr> = known.iter().copied().chain(neighbours(&networks, port)).collect();
    let mut heard = match probe::ask(node, &nothing, port, &asked, true) {
        Ok(heard) => heard,
        Err(e) => return report.note("network", format!("cannot ask it: {e}")),
    };
    // The daemon listens only where the user chose by `--bind`.
    heard.retain(|heard| hears(heard.from.ip()));
    let answering: Vec<SocketAddr> = heard.iter().map(|heard| heard.from).collect();
    // The daemon may have met peers since its status was read, or may be about to meet them.
    let fresh = wait_until_met(|| RunningDaemon::find(&node.config).ok(), &answering);
    let node = fresh.as_ref().unwrap_or(node);
    let now = moment(&node.status);
    let last = |address: &SocketAddr| last_heard(&node.status, *address).map(|at| now - at);
    let named_peer = |address: &SocketAddr| named_peer(&node.status, &named, *address);

    let unmet = unmet(&node.status, &answering);
    report_unmet(report, &node.status, &unmet, port);
    let mut all = probe::known_or_named(&node.status, &named);
    all.extend(
        heard.iter().map(|heard| heard.from).filter(|from| !all.contains(from)).collect::<Vec<_>>(),
    );
    let mut well = 0;
    for (address, http) in all.iter().zip(probe::http(&all)) {
        let answers = answering.contains(address);
        let silence = silence(&node.status, *address);
        let there = format!("on {}: ", address.ip());
        let tcp = open_port_there(address.ip(), "tcp", address.port());
        match (http, last(address)) {
            (HttpProbe::Refuses, _) => {
                let to = networks.interfaces().iter().map(|i| i.address).find(IpAddr::is_ipv4);
                let to = to.map_or("this machine".into(), |ip| ip.to_string());
                report.fail(
                    "share",
                    format!(
                        "{address} shares nothing with this machine: to it, this is no neighbour"
                    ),
                    format!("{there}peerix --peer {to}"),
                );
            }
            (HttpProbe::Silent(e), _) if answers => {
                report.fail(
                    "tcp",
                    format!("{address} answers by UDP, and TCP is blocked there: {e}"),
                    tcp,
                );
            }
            // A refused connection means that the machine runs and its peerix does not.
            (HttpProbe::Silent(e), Some(ago))
                if ago < RECENT_CONTACT_SECONDS && e.kind() != ErrorKind::ConnectionRefused =>
            {
                let udp = open_port_there(address.ip(), "udp", address.port());
                let text = format!(
                    "{address} was heard {ago:.0} s ago, and answers neither by UDP nor by TCP: it has just gone, or both are \
                     blocked there{}",
                    explain_connect_error(&e)
                );
                report.fail("udp", text, format!("{udp}\n{tcp}"));
            }
            (HttpProbe::Silent(e), _) => match named_peer(address) {
                Some(state) => report_unreachable(report, *address, &state, &e),
                None => report.note(
                    "peer",
                    format!("{address} does not answer: {e}{}", explain_connect_error(&e)),
                ),
            },
            (_, Some(_)) if answers && silence.is_some() => {
                report_silent(report, *address, silence.unwrap_or_default(), port);
            }
            // A Python node answers only queries for paths that it has, so its silence is no sign
            // of a fault.
            (HttpProbe::Other, _) if silence.is_some() && named_peer(address).is_some() => {
                let ago = long(silence.unwrap_or_default());
                let text = format!("{address} is a Python peerix, and has been silent for {ago}");
                report.note("peer", text);
            }
            (HttpProbe::Shares(_), _) if !answers && all.len() <= MAX_PEERS_WITH_HAVE_NOT => {
                let udp = open_port_there(address.ip(), "udp", address.port());
                let text = format!(
                    "{address} answers by TCP, and UDP is blocked there, or by an access point in between"
                );
                report.fail("udp", text, udp);
            }
            (_, None) if named_peer(address).is_none() || unmet.contains(address) => {}
            _ => well += 1,
        }
    }
    let connected = networks.lan_addresses().iter();
    let connected = connected.filter(|i| i.running && hears(i.address));
    let connected: Vec<String> =
        connected.map(|i| format!("{}/{}", i.address, i.prefix_len)).collect();
    match connected.join(", ") {
        none if none.is_empty() => report.note("network", networks.why_none()),
        networks if all.is_empty() => {
            let text = format!(
                "no other peerix answers on {networks}; those beyond need --peer HOST on both sides"
            );
            report.note("network", text);
        }
        networks if well > 0 => report.ok(
            "network",
            format!("{well} of {} peers are heard and answer, on {networks}", all.len()),
        ),
        _ => {}
    }
    if port != DEFAULT_PORT {
        let others = probe::ask(node, &nothing, DEFAULT_PORT, &[], true).unwrap_or_default();
        let others: Vec<String> = others.iter().map(|other| other.from.to_string()).collect();
        if !others.is_empty() {
            let text = format!(
                "{} is on another port than this machine's {port}: they do not hear each other",
                others.join(", ")
            );
            report.fail(
                "port",
                text,
                format!("peerix --port {DEFAULT_PORT} here, or --port {port} on all"),
            );
        }
    }
}

/// Polls the status until the daemon has heard all of `peers` or has run for [`MEETING_TIME`].
/// Makes at most [`MAX_MEETING_POLLS`] further requests. Returns the last status; `None` if the
/// first request fails.
fn wait_until_met(
    find: impl Fn() -> Option<RunningDaemon>,
    peers: &[SocketAddr],
) -> Option<RunningDaemon> {
    let mut node = find()?;
    for _ in 0..MAX_MEETING_POLLS {
        if unmet(&node.status, peers).is_empty() || !is_young(&node.status) {
            break;
        }
        thread::sleep(MEETING_POLL);
        let Some(next) = find() else { break };
        node = next;
    }
    Some(node)
}

/// Whether the daemon has run for less than [`MEETING_TIME`], so that it may not have met its
/// neighbours yet.
fn is_young(status: &Value) -> bool {
    let uptime = status["node"]["uptime_seconds"].as_f64();
    uptime.is_some_and(|seconds| seconds < MEETING_TIME.get().as_secs_f64())
}

/// Returns those of `peers` that the daemon has never heard. Empty if its status omits peers.
fn unmet(status: &Value, peers: &[SocketAddr]) -> Vec<SocketAddr> {
    let is_whole = status["peers_omitted"].as_u64().unwrap_or_default() == 0;
    peers.iter().copied().filter(|peer| is_whole && last_heard(status, *peer).is_none()).collect()
}

/// When the daemon last heard a peer, in seconds since 1970. `None` if it never did.
fn last_heard(status: &Value, address: SocketAddr) -> Option<f64> {
    peer_at(status, address)?["last_heard"].as_f64()
}

/// How long the daemon has had no answer from a silent peer, in seconds. `None` for other peers.
fn silence(status: &Value, address: SocketAddr) -> Option<f64> {
    Some(moment(status) - peer_at(status, address)?["silent_since"].as_f64()?)
}

/// The liveness that the daemon reports of a node that `--peer` names. `None` for other nodes.
fn named_peer(status: &Value, named: &NamedAddresses, address: SocketAddr) -> Option<String> {
    match peer_at(status, address) {
        Some(peer) if peer["found_by"] == "flag" => liveness(peer, moment(status)),
        None if named.addresses.contains(&address) => Some("not listed".into()),
        _ => None,
    }
}

/// Reports peers that answer this command and that the daemon has never heard. A daemon that has
/// just started may still hear them.
fn report_unmet(report: &mut Findings, status: &Value, unmet: &[SocketAddr], port: u16) {
    let peers = unmet.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
    if peers.is_empty() {
        return;
    }
    let text = format!("{peers} answers this command, and the daemon has never heard it");
    match is_young(status) {
        true => report.note("udp", format!("{text}: the daemon has just started")),
        false => {
            // A node in mode wan answers queries, and sends none to its neighbours.
            let remedy =
                format!("{}\nif its mode is wan: peerix --mode both there", open_port("udp", port));
            report.fail("udp", format!("{text}: UDP is blocked here, or its mode is wan"), remedy);
        }
    }
}

/// Reports a node that `--peer` names and that answers neither UDP queries nor HTTP. `state` is its
/// liveness in the daemon's status.
fn report_unreachable(report: &mut Findings, address: SocketAddr, state: &str, e: &io::Error) {
    let ip = address.ip();
    let gone = format!("if there is no such node any more: peerix without --peer {ip}");
    let start = format!("on {ip}: systemctl start peerix.socket peerix.service");
    // A host that refuses the connection lets packets in, so its firewall is not the cause.
    let remedy = match e.kind() {
        ErrorKind::ConnectionRefused => format!("{start}\n{gone}"),
        ErrorKind::NetworkUnreachable => {
            format!("the way there: ip route get {ip}; ip -brief link\n{gone}")
        }
        _ => {
            let ports =
                ["udp", "tcp"].map(|protocol| open_port_there(ip, protocol, address.port()));
            format!("{start}\nif it runs there, {}\n{gone}", ports.join("\n"))
        }
    };
    let text = format!(
        "--peer {address} does not answer: {e}{}; daemon: {state}",
        explain_connect_error(e)
    );
    report.fail("peer", text, remedy);
}

/// Explains an error of a connection to a host. Empty if the error speaks for itself.
fn explain_connect_error(e: &io::Error) -> &'static str {
    match e.kind() {
        ErrorKind::HostUnreachable => {
            " (no machine at that address answers ARP: it is switched off, or an access point keeps its clients apart)"
        }
        ErrorKind::NetworkUnreachable => {
            " (this machine has no route there: the link is down, or the network another)"
        }
        ErrorKind::ConnectionRefused => " (the machine is there, and its peerix does not run)",
        _ => "",
    }
}

/// Reports a host that `--peer` names and that has no address.
fn report_unresolved(report: &mut Findings, host: &str, e: &io::Error) {
    let find = format!("what the resolver finds: getent ahosts {}", quote(host));
    let remedy = format!("{find}\nif the name is wrong: peerix with the right --peer");
    report.fail("peer", format!("--peer {host} has no address: {e}"), remedy);
}

/// Reports a peer that answers this command and has been silent to the daemon for `silence`
/// seconds. It is a failure after [`RECENT_CONTACT_SECONDS`], when the daemon has probed the peer in vain.
fn report_silent(report: &mut Findings, address: SocketAddr, silence: f64, port: u16) {
    let silent = format!("has been silent to the daemon for {}", long(silence));
    let text = format!("{address} answers this command, and {silent}");
    match silence > RECENT_CONTACT_SECONDS {
        true => {
            let text = format!("{text}: it has just come back, or UDP is blocked here");
            report.fail("udp", text, open_port("udp", port));
        }
        false => report.note("peer", format!("{text}, which probes it again")),
    }
}

/// Addresses on the LAN in the kernel's neighbour table, at most [`MAX_NEIGHBOURS`].
fn neighbours(networks: &LanNetworks, port: u16) -> Vec<SocketAddr> {
    let entries = neighbours::read().unwrap_or_default().into_iter();
    let addresses = entries.map(|entry| entry.socket_addr(port));
    addresses.filter(|address| networks.is_lan(*address)).take(MAX_NEIGHBOURS).collect()
}

/// Checks whether Nix would accept the signatures of paths that peers offered in recent lookups.
fn keys(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
    let lookups = list(&node.status["lookups"]).iter();
    let offered =
        lookups.filter(|lookup| lookup["hit"] == true || lookup["miss"]["code"] == "untrusted");
    let parts: Vec<HashPart> = offered
        .filter_map(|l| HashPart::parse(text(&l["hash_part"]).as_bytes()).ok())
        .take(SAMPLES)
        .collect();
    let mut accepted = 0;
    let mut remedies = Vec::new();
    for offers in probe::at_once(&parts, |part| probe::offers(node, part)) {
        for offer in offers {
            let (who, from) = (offer.who(), offer.from.ip().to_string());
            let Ok(NarInfo { info, .. }) = offer.narinfo else { continue };
            match settings.trusts(&info, &node.config) {
                Ok(_) => accepted += 1,
                Err(why) => {
                    let remedy = nix::trust(&info, &from);
                    if !remedies.contains(&remedy) {
                        let path = node.config.store_dir.join(&info.path);
                        report.fail(
                            "keys",
                            format!("{who} has {path}, and Nix would refuse it: {why}"),
                            remedy.clone(),
                        );
                        remedies.push(remedy);
                    }
                }
            }
        }
    }
    if accepted > 0 && remedies.is_empty() {
        report.ok("keys", "Nix trusts what peers offered last".into());
    }
}

/// Checks whether Nix has cached a miss for a path that a peer has now.
fn check_cached_misses(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
    let urls = settings.peerix(node.config.port);
    let misses = urls.iter().flat_map(|url| nix::misses(settings, url, None));
    let misses: Vec<_> = misses.take(SAMPLES).collect();
    let found = probe::at_once(&misses, |miss| {
        let part = HashPart::parse(miss.hash_part.as_bytes()).ok()?;
        // Nix does not ask for a path that has been built here since.
        let here = get(&format!("http://127.0.0.1:{}/local/{part}.narinfo", node.config.port));
        if here.is_ok_and(|answer| answer.status == 200) {
            return None;
        }
        let mut infos = probe::offers(node, &part)
            .into_iter()
            .filter_map(|offer| Some(offer.narinfo.ok()?.info));
        infos.find(|info| settings.trusts(info, &node.config).is_ok())
    });
    match misses.iter().zip(found).find_map(|(miss, info)| Some((miss, info?))) {
        Some((miss, info)) => {
            let path = node.config.store_dir.join(&info.path);
            let left = miss.left.as_secs();
            let text = format!(
                "a peer has {path}, and Nix, which asked before it had, believes for another {left} s that none has"
            );
            let often =
                "or, where stores change often, in nix.conf: narinfo-cache-negative-ttl = 60";
            report.fail("memory", text, format!("{}\n{often}", nix::ask_again(&path)));
        }
        None if uid() != 0 => {
            let text = "this user's Nix remembers no miss that has become wrong; what nix-daemon remembers, root sees";
            report.note("memory", text.into());
        }
        None => report.ok("memory", "Nix remembers no miss that has become wrong".into()),
    }
}

fn trackers(report: &mut Findings, config: &Config) {
    if config.state_dir.is_none() {
        report.note(
            "tracker",
            "no --state-dir: this is another peer to the trackers after each start".into(),
        );
    }
    let (host, port) = config.announce_addr.clone().unzip();
    let port = port.flatten().unwrap_or(config.port);
    for url in &config.tracker_urls {
        let began = SystemTime::now();
        let answer = match get(&format!("{url}/health")) {
            // A Python tracker has no `/health` and answers 404.
            Ok(answer) if answer.status < 500 => answer,
            other => {
                let why = other.map_or_else(|e| e, |answer| format!("status {}", answer.status));
                let curl = format!("curl {}", quote(&format!("{url}/health")));
                let remedy =
                    format!("on that machine: systemctl status peerix-tracker\nfrom here: {curl}");
                report.fail("tracker", format!("{url} does not answer: {why}"), remedy);
                continue;
            }
        };
        report.ok("tracker", format!("{url} answers"));
        let seconds = |time: SystemTime| {
            time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs())
        };
        if let Some(date) = answer.date {
            let (here, there) = (seconds(began), seconds(date));
            match here.abs_diff(there) {
                ..MAX_CLOCK_DIFFERENCE_SECONDS => {
                    report.ok("clock", "it agrees with the tracker's".into())
                }
                off => {
                    let way = if here < there { "behind" } else { "ahead of" };
                    let text =
                        format!("this machine's is {} {way} that of {url}", long(off as f64));
                    report.fail(
                        "clock",
                        text,
                        "timedatectl set-ntp true, on whichever of the two is wrong".into(),
                    );
                }
            }
        }
        check_reachability(report, url, host.as_deref(), port);
    }
}

/// Checks by a tracker's `/reach` whether other machines can connect to the announced address.
fn check_reachability(report: &mut Findings, tracker: &str, host: Option<&str>, port: u16) {
    let outcome = get_within(&format!("{tracker}/reach/{port}"), REACH_TIMEOUT)
        .ok()
        .filter(|answer| answer.status == 200);
    let outcome: Option<Value> =
        outcome.and_then(|answer| serde_json::from_slice(&answer.body).ok());
    let Some(outcome) = outcome else {
        return report
            .note("address", format!("{tracker} does not tell whether it reaches this machine"));
    };
    let seen: Option<IpAddr> = text(&outcome["addr"]).parse().ok();
    let resolved = host.map(|host| {
        (host, port).to_socket_addrs().map(Iterator::collect::<Vec<_>>).unwrap_or_default()
    });
    if let (Some(seen), Some(host), Some(resolved)) = (seen, host, resolved)
        && !resolved.iter().any(|address| address.ip().to_canonical() == seen)
    {
        // The announced host may be a second address of this machine.
        let reached = resolved
            .first()
            .map_or(Err("no such name".into()), |at| get(&format!("http://{at}/nix-cache-info")));
        match reached {
            Ok(_) => report.note(
                "address",
                format!(
                    "{host} is announced, and the tracker sees {seen}; from here it is reached"
                ),
            ),
            Err(e) => {
                let remedy = format!(
                    "peerix --announce-addr {seen}, or the name that this machine has outside"
                );
                report.fail(
                    "address",
                    format!("{host} is announced, and not reached: {e}; the tracker sees {seen}"),
                    remedy,
                );
            }
        }
        return;
    }
    let at = format!("{}:{port}", text(&outcome["addr"]));
    if outcome["reached"] == true {
        return report.ok("address", format!("{at} is reached from {tracker}"));
    }
    let remedy = format!(
        "on the router: forward TCP (and UDP) port {port} to this machine\nhere: {}\nif the router has another port for it: --announce-addr HOST:PORT",
        open_port("tcp", port)
    );
    report.fail("address", format!("{at} is not reached from {tracker}"), remedy);
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::cell::Cell;

    const PORT: u16 = 12304;

    fn at(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], PORT))
    }

    /// Status of a daemon that has run for `uptime` seconds and has heard one peer.
    fn status(uptime: f64, heard: SocketAddr) -> Value {
        json!({
            "time": 1180.0,
            "node": {"uptime_seconds": uptime},
            "peers": [{"address": heard.to_string(), "found_by": "query", "last_heard": 1000.0}],
            "peers_omitted": 0,
        })
    }

    fn node(status: Value) -> Option<RunningDaemon> {
        Some(RunningDaemon { config: Config::default(), status })
    }

    /// State, name and text of each finding.
    fn told(report: &Findings) -> Vec<(String, String, String)> {
        let word = |finding: &Value, key: &str| text(&finding[key]).to_owned();
        let findings = report.findings();
        findings.iter().map(|f| (word(f, "state"), word(f, "what"), word(f, "text"))).collect()
    }

    /// Remedy of the first finding.
    fn remedy(report: &Findings) -> String {
        text(&report.findings()[0]["remedy"]).to_owned()
    }

    #[test]
    fn nft_input_chain_skips_the_chain_of_iptables() {
        let native = "table inet filter {\n\tchain forward {\n\t\ttype filter hook forward priority filter; policy drop;\n\t}\n\
                      \tchain input {\n\t\ttype filter hook input priority filter; policy drop;\n\t}\n}\n";
        assert_eq!(nft_input_chain(native).as_deref(), Some("inet filter input"));
        let of_iptables = "table ip filter {\n\tchain INPUT {\n\t\ttype filter hook input priority filter; policy accept;\n\t}\n}\n";
        assert_eq!(nft_input_chain(of_iptables), None);
        assert_eq!(
            nft_input_chain(&format!("{of_iptables}{native}")).as_deref(),
            Some("inet filter input")
        );
        assert_eq!(nft_input_chain(""), None);
    }

    #[test]
    fn young_daemon_is_polled_until_it_has_met_all() {
        let polls = Cell::new(0);
        let meets_at_the_third = || {
            polls.set(polls.get() + 1);
            node(status(0.3, at(if polls.get() < 3 { 1 } else { 2 })))
        };
        let last = wait_until_met(meets_at_the_third, &[at(2)]).unwrap();
        assert_eq!((polls.get(), unmet(&last.status, &[at(2)])), (3, vec![]));
    }

    #[test]
    fn daemon_past_the_meeting_time_is_not_polled() {
        let polls = Cell::new(0);
        let grows_old = || {
            polls.set(polls.get() + 1);
            node(status(if polls.get() < 3 { 2.9 } else { 3.1 }, at(1)))
        };
        let last = wait_until_met(grows_old, &[at(2)]).unwrap();
        assert_eq!((polls.get(), unmet(&last.status, &[at(2)])), (3, vec![at(2)]));
    }

    #[test]
    fn daemon_that_stops_ends_the_polling() {
        let polls = Cell::new(0);
        let stops = || {
            polls.set(polls.get() + 1);
            if polls.get() < 2 { node(status(0.3, at(1))) } else { None }
        };
        assert!(wait_until_met(stops, &[at(2)]).is_some_and(|node| is_young(&node.status)));
        assert!(wait_until_met(|| None, &[at(2)]).is_none());
    }

    #[test]
    fn unmet_peer_is_a_udp_fault_unless_the_daemon_is_young() {
        let found = |uptime| {
            let mut report = Findings::default();
            let status = status(uptime, at(1));
            report_unmet(&mut report, &status, &unmet(&status, &[at(1), at(2)]), PORT);
            told(&report)
        };
        let text = "10.0.0.2:12304 answers this command, and the daemon has never heard it";
        let finding = |state: &str, why: &str| {
            let text = format!("{text}: {why}");
            vec![(state.to_owned(), "udp".to_owned(), text)]
        };
        assert_eq!(found(0.9), finding("note", "the daemon has just started"));
        assert_eq!(found(60.0), finding("fail", "UDP is blocked here, or its mode is wan"));
        let mut report = Findings::default();
        report_unmet(&mut report, &status(60.0, at(1)), &[], PORT);
        assert!(told(&report).is_empty());
    }

    #[test]
    fn peers_that_a_status_omits_are_not_unmet() {
        let mut status = status(60.0, at(1));
        assert_eq!(unmet(&status, &[at(1), at(2)]), [at(2)]);
        status["peers_omitted"] = 1.into();
        assert_eq!(unmet(&status, &[at(1), at(2)]), []);
    }

    #[test]
    fn named_peer_has_the_state_that_the_daemon_reports() {
        let named =
            NamedAddresses { addresses: vec![at(1), at(2), at(3)], ..NamedAddresses::default() };
        let peer = |last, found_by: &str, state: &str| {
            let since = (state == "silent").then_some(1000.0);
            let address = at(last).to_string();
            json!({"address": address, "found_by": found_by, "state": state, "silent_since": since})
        };
        let (silent, unheard) = (peer(1, "flag", "silent"), peer(2, "flag", "unheard"));
        let peers = [silent, unheard, peer(4, "query", "silent")];
        let status = json!({"time": 1180.0, "peers": peers});
        let state = |last| named_peer(&status, &named, at(last)).unwrap_or_default();
        assert_eq!([1, 2, 3, 4].map(state), ["silent for 3 min", "never heard", "not listed", ""]);
        let silence = |last| silence(&status, at(last));
        assert_eq!([1, 2, 4].map(silence), [Some(180.0), None, Some(180.0)]);
    }

    #[test]
    fn named_peer_that_does_not_answer_is_a_fault_with_a_remedy() {
        let mut report = Findings::default();
        let refused = io::Error::from(ErrorKind::ConnectionRefused);
        report_unreachable(&mut report, at(1), "silent for 3 min", &refused);
        let (state, what, text) = told(&report).remove(0);
        assert_eq!((&*state, &*what), ("fail", "peer"));
        assert!(
            text.starts_with("--peer 10.0.0.1:12304 does not answer: ")
                && text.contains("does not run"),
            "{text}"
        );
        assert!(text.ends_with("; daemon: silent for 3 min"), "{text}");
        let remedy = remedy(&report);
        assert!(remedy.starts_with("on 10.0.0.1: systemctl start peerix.socket "), "{remedy}");
        assert!(remedy.contains("without --peer 10.0.0.1"), "{remedy}");
    }

    #[test]
    fn name_without_an_address_is_a_fault_with_a_remedy() {
        // The resolver rejects a name with a zero byte without a network request.
        let peers = vec![("127.0.0.1".to_owned(), PORT), ("a\0b".to_owned(), PORT)];
        let named = NamedAddresses::resolve(&Config { peers, ..Config::default() });
        assert_eq!(named.addresses, [SocketAddr::from(([127, 0, 0, 1], PORT))]);
        let [(host, e)] = &named.unresolved[..] else { panic!("one name has no address") };
        assert_eq!(host, "a\0b");
        let mut report = Findings::default();
        report_unresolved(&mut report, "desk.example", e);
        assert!(!report.is_well() && remedy(&report).contains("getent ahosts desk.example"));
        assert!(told(&report)[0].2.starts_with("--peer desk.example has no address: "));
    }

    #[test]
    fn peer_silent_to_the_daemon_alone_is_a_fault_after_the_probe_interval() {
        let found = |seconds| {
            let mut report = Findings::default();
            report_silent(&mut report, at(1), seconds, PORT);
            told(&report).remove(0)
        };
        assert_eq!(found(20.0).0, "note");
        let (state, what, text) = found(180.0);
        assert_eq!((&*state, &*what), ("fail", "udp"));
        assert!(text.contains("silent to the daemon for 3 min: it has just come back"), "{text}");
    }
}
