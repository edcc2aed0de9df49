//! Checks that Nix would take what peers offer: that it trusts their signatures, and has not cached
//! a miss for it.

use crate::commands::nix::{self, NixSettings};
use crate::commands::report::Findings;
use crate::commands::{RunningDaemon, get, list, nix_cache, probe, text};
use crate::nix::{HashPart, NarInfo};

/// Number of recent lookups, and of cached misses, that are checked with the peers.
const SAMPLES: usize = 4;

/// Checks whether Nix would accept the signatures of paths that peers offered in recent lookups.
pub(super) fn check_keys(report: &mut Findings, node: &RunningDaemon, settings: &NixSettings) {
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
pub(super) fn check_cached_misses(
    report: &mut Findings,
    node: &RunningDaemon,
    settings: &NixSettings,
) {
    let urls = settings.peerix(node.config.port);
    let misses = urls.iter().flat_map(|url| nix_cache::misses(settings, url, None));
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
        None if !rustix::process::getuid().is_root() => {
            let text = "this user's Nix remembers no miss that has become wrong; what nix-daemon remembers, root sees";
            report.note("memory", text.into());
        }
        None => report.ok("memory", "Nix remembers no miss that has become wrong".into()),
    }
}
