//! `peerix peers`: queries the network and lists the peers that answer.

use super::probe::{self, HttpProbe};
use super::report::{Findings, Severity};
use super::status::friend_line;
use super::{RunningDaemon, found_by, list, moment, peer_at, peer_state, text};
use crate::nix::HashPart;
use serde_json::Value;
use std::net::SocketAddr;

pub fn run(node: &RunningDaemon, json: bool) -> u8 {
    let mut report = Findings::default();
    let known = probe::known(node);
    let far = probe::wan_nodes(node, None);
    let mut asked: Vec<SocketAddr> =
        known.iter().copied().chain(far.iter().map(|(_, address)| *address)).collect();
    let has_lan = node.config.mode.has_lan();
    let networks = node.networks();
    let heard =
        match probe::ask(node, &networks, &HashPart::ZERO, node.config.port, &asked, has_lan) {
            Ok(heard) => heard,
            Err(e) => {
                report.fail("udp", format!("cannot ask: {e}"), String::new());
                Vec::new()
            }
        };
    asked.extend(heard.iter().map(|heard| heard.from));
    asked.sort_unstable();
    asked.dedup();
    let mut answering = 0;
    for (address, http) in asked.iter().zip(probe::http(&asked)) {
        let id = far.iter().find(|(_, other)| other == address).map(|(id, _)| format!(" ({id})"));
        let by_udp = heard.iter().find(|heard| heard.from == *address);
        let udp = by_udp.map_or("does not answer queries".into(), |h| {
            format!("answers queries, {:.1?}", h.elapsed)
        });
        let shares = matches!(http, HttpProbe::Shares(_));
        let http = match http {
            HttpProbe::Shares(elapsed) => format!("shares with this machine, {elapsed:.1?}"),
            HttpProbe::Refuses => "shares nothing with this machine".into(),
            HttpProbe::Other => "answers HTTP as another kind of peerix".into(),
            HttpProbe::Silent(e) => format!("does not answer HTTP: {e}"),
        };
        let now = moment(&node.status);
        let view = peer_at(&node.status, *address).map(|peer| daemon_view(peer, now));
        let state = if by_udp.is_some() && shares { Severity::Ok } else { Severity::Note };
        answering += u32::from(by_udp.is_some() || shares);
        let (id, view) = (id.unwrap_or_default(), view.unwrap_or_default());
        report.add(state, "peer", format!("{address}{id}: {udp}; {http}{view}"));
    }
    for friend in list(&node.status["friends"]) {
        let line = friend_line(friend, moment(&node.status));
        match friend["reached"] == true {
            true => report.ok("friend", line),
            false => report.note("friend", line),
        }
        answering += u32::from(friend["reached"] == true);
    }
    if answering == 0 {
        report.note("peers", "nobody answers".into());
    }
    report.print(json, answering > 0)
}

/// End of a peer's line: its state in the daemon's status, how it was found, and why it is
/// avoided.
fn daemon_view(peer: &Value, now: f64) -> String {
    let how = found_by(text(&peer["found_by"]));
    let state = peer_state(peer, now).map(|state| format!("; daemon: {state}, found by {how}"));
    let avoided = Some(text(&peer["avoided"]["reason"])).filter(|reason| !reason.is_empty());
    let avoided = avoided.map(|reason| format!("; avoided at the moment: {reason}"));
    [state, avoided].into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn daemon_view_contains_state_and_how_the_peer_was_found() {
        let silent = json!({"found_by": "flag", "state": "silent", "silent_since": 1000.0});
        assert_eq!(daemon_view(&silent, 1180.0), "; daemon: silent for 3 min, found by --peer");
        let avoided = json!({"reason": "status 500"});
        let avoided = json!({"found_by": "answer", "state": "live", "avoided": avoided});
        let view = daemon_view(&avoided, 1180.0);
        assert!(view.starts_with("; daemon: live, found by answer to a broadcast; "), "{view}");
        assert!(view.ends_with("; avoided at the moment: status 500"), "{view}");
        assert_eq!(daemon_view(&json!({"found_by": "tracker", "state": null}), 1180.0), "");
    }
}
