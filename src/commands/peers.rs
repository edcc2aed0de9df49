//! `peerix peers`: asks the network now, and lists who answers.

use super::probe::{self, Http};
use super::report::{Report, State};
use super::{Node, list, text};
use crate::network::Networks;
use crate::nix::HashPart;
use std::net::SocketAddr;

/// Asked for by nobody else: no path has this name.
pub const NO_PATH: [u8; HashPart::LEN] = [b'0'; HashPart::LEN];

pub fn run(node: &Node, json: bool) -> u8 {
    let nothing = HashPart::parse(&NO_PATH).expect("zeros are Nix32");
    let mut report = Report::default();
    let known = probe::known(node);
    let far = probe::far(node, None);
    let mut asked: Vec<SocketAddr> = known.iter().copied().chain(far.iter().map(|(_, address)| *address)).collect();
    let networks = Networks::read(node.config.networks.clone()).current();
    let has_lan = node.config.mode.has_lan();
    let heard = match probe::ask(&nothing, &networks, node.config.port, &asked, has_lan) {
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
        let udp = by_udp.map_or("does not answer queries".into(), |h| format!("answers queries, {:.1?}", h.took));
        let shares = matches!(http, Http::Shares(_));
        let http = match http {
            Http::Shares(took) => format!("shares with this machine, {took:.1?}"),
            Http::Refuses => "shares nothing with this machine".into(),
            Http::Other => "answers HTTP as another kind of peerix".into(),
            Http::Silent(e) => format!("does not answer HTTP: {e}"),
        };
        let at = list(&node.status["peers"]).iter().find(|peer| text(&peer["address"]) == address.to_string());
        let avoided = at.map(|peer| text(&peer["avoided"]["reason"])).filter(|reason| !reason.is_empty());
        let avoided = avoided.map(|reason| format!("; avoided at the moment: {reason}"));
        let state = if by_udp.is_some() && shares { State::Ok } else { State::Note };
        answering += u32::from(by_udp.is_some() || shares);
        let (id, avoided) = (id.unwrap_or_default(), avoided.unwrap_or_default());
        report.add(state, "peer", format!("{address}{id}: {udp}; {http}{avoided}"));
    }
    if answering == 0 {
        report.note("peers", "nobody answers".into());
    }
    report.print(json, answering > 0)
}
