//! `peerix why`: checks each condition for getting one path from a peer: whether the path is valid
//! here, which peers offer it, whether peerix and Nix accept the offers, and whether Nix asks
//! peerix.

use super::nix::{self, NixSettings, trusted_by};
use super::nix_cache;
use super::probe::{self, ProbeOffer};
use super::report::Findings;
use super::{EXIT_USAGE, RunningDaemon, get, list, long, moment, peer_at, peer_state, text};
use crate::access::AccessPolicy;
use crate::config::Sharing;
use crate::network::Networks;
use crate::nix::{HashPart, NarInfo, PathInfo, PublicKey, StorePath};
use crate::status::PRIVATE_KEY;
use serde_json::Value;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of silent peers that are listed. Of the others only the number is shown.
const MAX_SILENT_SHOWN: usize = 8;

pub fn run(node: &RunningDaemon, path: &str, json: bool) -> u8 {
    let Some(hash_part) = hash_part(node, path) else {
        let dir = node.config.store_dir.as_str();
        eprintln!(
            "peerix: why {}: no store path; they look like {dir}/<32 digits>-<name>",
            crate::service::clean(path)
        );
        return EXIT_USAGE;
    };
    let mut report = Findings::default();
    let here = here(&mut report, node, &hash_part);
    let settings = NixSettings::read();
    let offered = offered(&mut report, node, &hash_part, settings.as_ref().ok());
    let asks = nix_asks(&mut report, node, &hash_part, &offered, settings);
    let peerix_gives = offered.iter().any(|offer| offer.passes);
    let nix_takes = offered.iter().any(|offer| offer.passes && offer.is_trusted);
    let is_refused = offered.iter().any(|offer| offer.info.is_some())
        && !offered.iter().any(|offer| offer.is_trusted);
    let verdict = match () {
        () if here => "Nix has it here, and asks nobody",
        () if offered.is_empty() => {
            "Nix gets it from no peer: none has it, or none shares it with this machine"
        }
        () if is_refused => "Nix gets it from no peer: it would not trust what they have",
        () if !peerix_gives => {
            "Nix gets it from no peer: those that have it are passed over, see above"
        }
        () if !nix_takes => "Nix gets it from no peer: it would not trust what they have",
        () if !asks => "Nix could get it from a peer, but does not ask for it, see above",
        () => "Nix gets it from a peer",
    };
    let well = here || (nix_takes && asks);
    match well {
        true => report.ok("verdict", verdict.into()),
        false => report.fail("verdict", verdict.into(), String::new()),
    }
    report.print(json, well)
}

/// Parses a store path, a path below one, its base name or its hash part. Follows symbolic links to
/// the store.
fn hash_part(node: &RunningDaemon, path: &str) -> Option<HashPart> {
    let target = store_path_behind(path, node.config.store_dir.as_str());
    let path = target.as_deref().unwrap_or(path);
    let base = path
        .strip_prefix(node.config.store_dir.as_str())
        .map_or(path, |rest| rest.trim_start_matches('/'));
    let base = base.split('/').next()?;
    StorePath::parse(base)
        .map(|path| path.hash_part())
        .ok()
        .or_else(|| HashPart::parse(base.as_bytes()).ok())
}

/// Target of a symbolic link such as `./result`, whether or not the store path exists. Follows up
/// to 8 links, because profiles consist of several.
fn store_path_behind(path: &str, store_dir: &str) -> Option<String> {
    const MAX_LINKS: usize = 8;
    let mut at = PathBuf::from(path);
    for _ in 0..MAX_LINKS {
        let target = fs::read_link(&at).ok()?;
        at = at.parent().unwrap_or(Path::new("/")).join(target);
        if at.starts_with(store_dir) {
            return at.to_str().map(str::to_owned);
        }
    }
    None
}

/// Reports whether the path is valid here and who may have it. Returns whether it is valid.
fn here(report: &mut Findings, node: &RunningDaemon, hash_part: &HashPart) -> bool {
    let url = format!("http://127.0.0.1:{}/local/{hash_part}.narinfo", node.config.port);
    let answer = match get(&url) {
        Ok(answer) if answer.status == 200 => {
            NarInfo::parse(&answer.body, &node.config.store_dir).ok()
        }
        Ok(answer) if answer.status == 404 => {
            report.note("here", "not valid in this machine's store".into());
            return false;
        }
        _ => None,
    };
    let Some(NarInfo { info, .. }) = answer else {
        report.note(
            "here",
            "the daemon does not say whether it is valid here; peerix doctor may tell why".into(),
        );
        return false;
    };
    let signers: Vec<&str> = info.signatures.iter().map(|signature| signature.name()).collect();
    let signers = if signers.is_empty() {
        "unsigned".into()
    } else {
        format!("signed by {}", signers.join(", "))
    };
    let addressed = if info.ca.is_some() { ", content-addressed" } else { "" };
    let dir = node.config.store_dir.join(&info.path);
    report
        .ok("here", format!("{dir} is valid here: {} bytes, {signers}{addressed}", info.nar_size));
    report_sharing(report, node, &info);
    true
}

/// Reports who may have a path of this machine's store.
fn report_sharing(report: &mut Findings, node: &RunningDaemon, info: &PathInfo) {
    let networks: Vec<&str> =
        list(&node.status["networks"]).iter().map(|network| text(&network["address"])).collect();
    match node.config.mode.has_lan() {
        true if !matches!(node.config.sharing, Sharing::All | Sharing::Lan) => {
            report.note("lan", "--share keeps it from neighbours".into());
        }
        true => report.ok(
            "lan",
            format!("shared with the networks that this machine is on ({})", networks.join(", ")),
        ),
        false => report.note("lan", "not shared with neighbours as such: the mode is wan".into()),
    }
    let friends: Vec<&str> =
        list(&node.status["friends"]).iter().map(|friend| text(&friend["name"])).collect();
    match node.config.sharing {
        _ if friends.is_empty() => {}
        Sharing::Nobody => report.note(
            "friends",
            format!("--share nobody keeps it from friends ({})", friends.join(", ")),
        ),
        _ => report.ok("friends", format!("shared with friends ({})", friends.join(", "))),
    }
    let networks = Networks::read(node.config.networks.clone());
    let access = AccessPolicy::new(Arc::new(networks), &node.config);
    let mut problems = list(&node.status["health"]["problems"]).iter();
    if !problems.any(|problem| text(&problem["code"]) == PRIVATE_KEY) {
        access.set_has_key();
    }
    match access.withheld_reason(&node.config, info) {
        None => report.ok("wan", "shared with everybody who knows its hash".into()),
        Some(why) => report.note("wan", format!("not shared with other networks: {why}")),
    }
}

/// An offer of a peer, and whether this machine's peerix passes it on and Nix accepts it.
struct PeerOffer {
    passes: bool,
    is_trusted: bool,
    /// `None` if the peer did not give its narinfo.
    info: Option<PathInfo>,
}

/// Asks all known nodes for the path. Reports and returns their offers.
fn offered(
    report: &mut Findings,
    node: &RunningDaemon,
    hash_part: &HashPart,
    settings: Option<&NixSettings>,
) -> Vec<PeerOffer> {
    let trusted = node.trusted_keys();
    let trusted = trusted.map(|keys| keys.into_iter().map(|(key, _)| key).collect::<Vec<_>>());
    let trusted = trusted.as_deref();
    let offers = probe::offers(node, hash_part).into_iter();
    let all: Vec<PeerOffer> = offers
        .map(|offer| report_offer(report, node, hash_part, trusted, settings, offer))
        .collect();
    silent_peers(report, &node.status);
    if all.is_empty() {
        let peers = list(&node.status["peers"]).len();
        report.note(
            "peer",
            format!(
                "nobody who answers has it; the daemon knows {peers} peers, peerix peers asks them"
            ),
        );
    }
    report_last_miss(report, &node.status, hash_part);
    all
}

/// Reports an offer: whether lookups ask the peer, whether peerix accepts the path by the keys in
/// `trusted`, and whether Nix accepts it by `settings`. Without `trusted`, peerix accepts every
/// path. Returns the offer with these verdicts.
fn report_offer(
    report: &mut Findings,
    node: &RunningDaemon,
    hash_part: &HashPart,
    trusted: Option<&[PublicKey]>,
    settings: Option<&NixSettings>,
    offer: ProbeOffer,
) -> PeerOffer {
    let who = offer.who();
    let info = match offer.narinfo {
        Ok(narinfo) => narinfo.info,
        Err(e) => {
            let text = format!("{who} says it has it, and does not give it: {e}");
            report.fail("peer", text, format!("on that machine: peerix why {hash_part}"));
            return PeerOffer { passes: false, is_trusted: false, info: None };
        }
    };
    let path = node.config.store_dir.join(&info.path);
    report.ok("peer", format!("{who} has {path}, {} bytes", info.nar_size));
    let mut passes = check_peer(report, &node.status, &who, offer.from);
    let taken = match settings {
        Some(settings) => settings.trusts(&info, &node.config),
        // Without Nix's settings, the other conditions are still reported.
        None => Ok("whether Nix would take it, it does not say".into()),
    };
    let remedy = || nix::trust(&info, &offer.from.ip().to_string());
    if let Some(keys) = trusted
        && let Err(why) = trusted_by(&info, keys, &node.config.store_dir)
    {
        passes = false;
        // If Nix refuses it too, that is reported below.
        if taken.is_ok() {
            report.fail("trust", format!("peerix passes {who} over: {why}"), remedy());
        }
    }
    let is_trusted = taken.is_ok();
    match taken {
        Ok(why) => report.ok("trust", why),
        Err(why) => report.fail("trust", format!("Nix would refuse it: {why}"), remedy()),
    }
    PeerOffer { passes, is_trusted, info: Some(info) }
}

/// Reports why lookups do not ask the peer at `address`. Returns true if they ask it.
fn check_peer(report: &mut Findings, status: &Value, who: &str, address: SocketAddr) -> bool {
    let peer = peer_at(status, address);
    // A broadcast query reaches silent neighbours, but need not reach a node that `--peer` names.
    let silent = peer.filter(|peer| peer["state"] == "silent" && peer["found_by"] == "flag");
    if let Some(state) = silent.and_then(|peer| peer_state(peer, moment(status))) {
        let text = format!("{who} is not asked until it answers a probe: {state}");
        report.fail("peer", text, "peerix doctor".into());
    }
    let avoided = peer.filter(|peer| peer["avoided"]["wholly"] == true);
    if let Some(peer) = avoided {
        let reason = text(&peer["avoided"]["reason"]);
        report.fail("peer", format!("{who} is avoided at the moment: {reason}"), String::new());
    }
    silent.is_none() && avoided.is_none()
}

/// Reports why the last lookup of the path for Nix missed.
fn report_last_miss(report: &mut Findings, status: &Value, hash_part: &HashPart) {
    let mut lookups = list(&status["lookups"]).iter();
    let last = lookups.find(|lookup| text(&lookup["hash_part"]) == hash_part.as_str());
    if let Some(last) = last.filter(|last| last["hit"] == false) {
        let ago = last["time"].as_f64().map_or(0.0, |then| moment(status) - then);
        let why = text(&last["miss"]["text"]);
        report.note("asked", format!("when Nix asked {ago:.0} s ago, it missed: {why}"));
    }
}

/// Reports which peers lookups do not ask because they are silent.
fn silent_peers(report: &mut Findings, status: &Value) {
    let is_silent = |peer: &&Value| peer["state"] == "silent";
    let silent: Vec<&Value> = list(&status["peers"]).iter().filter(is_silent).collect();
    if silent.is_empty() {
        return;
    }
    let now = moment(status);
    let age = |peer: &&Value| {
        let since = peer["silent_since"].as_f64().unwrap_or_default();
        format!("{} for {}", text(&peer["address"]), long(now - since))
    };
    let mut shown: Vec<String> = silent.iter().take(MAX_SILENT_SHOWN).map(age).collect();
    if silent.len() > MAX_SILENT_SHOWN {
        shown.push(format!("{} more", silent.len() - MAX_SILENT_SHOWN));
    }
    let shown = shown.join(", ");
    report.note("peer", format!("silent, and so not asked except by broadcast: {shown}"));
}

/// Reports whether Nix would ask this machine's peerix for the path, and the order of its
/// substituters. Returns true if Nix's settings are not known.
fn nix_asks(
    report: &mut Findings,
    node: &RunningDaemon,
    hash_part: &HashPart,
    offered: &[PeerOffer],
    settings: Result<NixSettings, String>,
) -> bool {
    let settings = match settings {
        Ok(settings) => settings,
        Err(e) => {
            report.note("nix", format!("Nix does not tell its settings: {e}"));
            return true;
        }
    };
    let mut paths = offered.iter().filter_map(|offer| Some(&offer.info.as_ref()?.path));
    let path = paths.next().map(|path| node.config.store_dir.join(path));
    let mut asks = check_obstacles(report, node, &settings, hash_part, path.as_deref(), offered);
    if let Some(path) = path
        && settings.get("always-allow-substitutes") != "true"
        && let Some(derivation) = nix::forbidding_derivation(&node.config.db, &path)
    {
        asks = false;
        let remedy = format!("to fetch it all the same: nix-store --realise {path}");
        report.fail(
            "derivation",
            format!("{derivation} has allowSubstitutes = false: Nix builds it here"),
            remedy,
        );
    }
    let order: Vec<String> =
        nix::order(&settings).iter().map(|rank| format!("{} ({})", rank.url, rank.says)).collect();
    if !order.is_empty() {
        report
            .note("order", format!("Nix asks by priority, the lowest first: {}", order.join(", ")));
    }
    asks
}

/// Reports what keeps Nix from asking this machine's peerix for the path. Returns true if nothing
/// does. `path` is the store path of an offer.
fn check_obstacles(
    report: &mut Findings,
    node: &RunningDaemon,
    settings: &NixSettings,
    hash_part: &HashPart,
    path: Option<&str>,
    offered: &[PeerOffer],
) -> bool {
    let urls = settings.peerix(node.config.port);
    let Some(url) = urls.first() else {
        let text = "peerix is none of Nix's substituters";
        report.fail("substituter", text.into(), nix::substitute(node.config.port));
        return false;
    };
    let misses = nix_cache::misses(settings, url, Some(hash_part.as_str()));
    for miss in &misses {
        let (ago, left) = (miss.age.as_secs(), miss.left.as_secs());
        let text = format!(
            "Nix learned {ago} s ago that no peer has it, and believes it for another {left} s"
        );
        // Without an offer, another request would miss again.
        let remedy = path.map(nix::ask_again).unwrap_or_default();
        report.fail("memory", format!("{text} ({})", miss.file.display()), remedy);
    }
    let is_right = check_cached_narinfo(report, node, settings, url, offered);
    let proxy = settings.proxy(url);
    if let Some((variable, proxy)) = &proxy {
        report.fail("proxy", nix::asks_by_proxy(variable, proxy, url), nix::no_proxy(settings));
    }
    misses.is_empty() && is_right && proxy.is_none()
}

/// Whether the NAR hash that Nix has cached for the path is one that a peer offers, and reports it
/// if not. Nix requests the cached NAR; a missing one makes it fail or build.
fn check_cached_narinfo(
    report: &mut Findings,
    node: &RunningDaemon,
    settings: &NixSettings,
    url: &str,
    offered: &[PeerOffer],
) -> bool {
    let infos: Vec<&PathInfo> = offered.iter().filter_map(|offer| offer.info.as_ref()).collect();
    let Some(first) = infos.first() else { return true };
    let known: Vec<String> =
        infos.iter().map(|info| format!("sha256:{}", info.nar_hash.to_nix32())).collect();
    let mut is_right = true;
    for remembered in nix_cache::narinfos(settings, url, first.path.hash_part().as_str()) {
        let Some(nar_hash) = remembered.nar_hash.filter(|hash| !known.contains(hash)) else {
            continue;
        };
        is_right = false;
        let text = format!(
            "Nix remembers it with the NAR hash {nar_hash}, which no peer has, and believes that for another {} ({})",
            long(remembered.left.as_secs_f64()),
            remembered.file.display()
        );
        let path = node.config.store_dir.join(&first.path);
        let remedy = format!("nix-store --realise --option narinfo-cache-positive-ttl 0 {path}");
        report.fail("memory", text, remedy);
    }
    is_right
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Findings for one live peer, and for peers that have been silent for `silent` seconds.
    fn said(silent: &[u64]) -> Vec<Value> {
        let silent = silent.iter().zip(1..).map(|(age, number): (_, u32)| {
            let address = format!("10.0.0.{number}:1");
            json!({"address": address, "state": "silent", "silent_since": 5000 - age})
        });
        let live = json!({"address": "10.0.0.99:1", "state": "live", "silent_since": null});
        let peers: Vec<Value> = silent.chain([live]).collect();
        let mut report = Findings::default();
        silent_peers(&mut report, &json!({"time": 5000.0, "peers": peers}));
        report.findings()
    }

    #[test]
    fn silent_peers_are_reported_as_not_asked() {
        let told = said(&[180, 20]);
        assert_eq!(told.len(), 1);
        assert_eq!(told[0]["state"], "note");
        let text = told[0]["text"].as_str().unwrap();
        assert!(text.starts_with("silent, and so not asked except by broadcast: "), "{text}");
        assert!(text.ends_with(": 10.0.0.1:1 for 3 min, 10.0.0.2:1 for 20 s"), "{text}");
        assert!(said(&[]).is_empty());
    }

    #[test]
    fn silent_peers_beyond_the_maximum_are_counted() {
        let told = said(&[60; 12]);
        let text = told[0]["text"].as_str().unwrap();
        assert!(text.ends_with(", 10.0.0.8:1 for 1 min, 4 more"), "{text}");
    }
}
