//! Properties of the node that are constant while the daemon runs.

use super::report::NodeReport;
use crate::config::{Config, Mode, Sharing};
use crate::wire::NodeKey;

/// Properties of the node that are constant while the daemon runs.
pub struct NodeFacts {
    pub(super) mode: Mode,
    pub(super) has_private_key: bool,
    pub(super) wants_friends: bool,
    /// The constant part of the report on this node. Other fields are empty.
    pub(super) report: NodeReport,
}

impl NodeFacts {
    /// Takes the properties from `config`. `port` is the port that is served on, and `identity` the
    /// public key of this node.
    pub fn new(config: &Config, port: u16, identity: Option<NodeKey>) -> NodeFacts {
        NodeFacts {
            mode: config.mode,
            has_private_key: config.private_key.is_some(),
            wants_friends: config.has_friends(),
            report: NodeReport {
                name: rustix::system::uname().nodename().to_string_lossy().into_owned(),
                version: env!("CARGO_PKG_VERSION"),
                mode: match config.mode {
                    Mode::Lan => "lan",
                    Mode::Wan => "wan",
                    Mode::Both => "both",
                },
                port,
                store_dir: config.store_dir.as_str().to_owned(),
                identity: identity.map(|key| key.to_string()),
                serves: true,
                shares: shares(config),
                flags: config.flags.clone(),
                ..NodeReport::default()
            },
        }
    }
}

/// Describes in one to three sentences what is shared with whom.
fn shares(config: &Config) -> String {
    let friends = match (config.has_friends(), config.sharing) {
        (true, Sharing::All | Sharing::Lan | Sharing::Friends) => {
            " Friends may have every valid path, from anywhere."
        }
        _ => "",
    };
    match (config.sharing, config.mode) {
        (Sharing::All, _) => format!("{}{friends}", shares_by_mode(config)),
        (Sharing::Lan, Mode::Lan | Mode::Both) => {
            let config = Config { mode: Mode::Lan, ..config.clone() };
            format!("{}{friends}", shares_by_mode(&config))
        }
        (Sharing::Lan | Sharing::Friends, _) => {
            format!("Nothing is shared with strangers and neighbours.{friends}")
        }
        (Sharing::Nobody, _) => "Nothing is shared with other machines.".into(),
    }
}

fn shares_by_mode(config: &Config) -> String {
    let named = if config.peers.is_empty() { "" } else { ", and with those that --peer names" };
    let lan = format!(
        "Every valid path of {} is shared with the machines on its networks{named}",
        config.store_dir.as_str()
    );
    let name = if config.filter { " whose name no pattern keeps" } else { "" };
    let proof = match (config.verify, config.filter) {
        (true, true) => format!(", and that {} has too,", config.upstream_cache),
        (true, false) => format!(" that {} has too", config.upstream_cache),
        (false, true) => ",".into(),
        (false, false) => String::new(),
    };
    let wan = format!("very path{name}{proof} is shared with anybody who asks");
    match config.mode {
        Mode::Lan => format!("{lan}. Nobody else gets anything."),
        Mode::Wan => format!("E{wan}; neighbours are anybody."),
        Mode::Both => format!("{lan}. E{wan} from elsewhere."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_text_covers_every_mode() {
        let with =
            |mode, verify, filter| shares(&Config { mode, verify, filter, ..Config::default() });
        assert_eq!(
            with(Mode::Lan, true, true),
            "Every valid path of /nix/store is shared with the machines on its networks. Nobody else gets anything."
        );
        assert_eq!(
            with(Mode::Wan, true, true),
            "Every path whose name no pattern keeps, and that https://cache.nixos.org has too, is shared with anybody \
             who asks; neighbours are anybody."
        );
        assert!(
            with(Mode::Both, true, false)
                .contains("Every path that https://cache.nixos.org has too is shared")
        );
        assert!(
            with(Mode::Both, false, true)
                .contains("Every path whose name no pattern keeps, is shared")
        );
        assert!(
            with(Mode::Wan, false, false).starts_with("Every path is shared with anybody who asks")
        );
        let named = Config { peers: vec![("a".into(), 1)], ..Config::default() };
        assert!(shares(&named).contains("and with those that --peer names"));
    }

    #[test]
    fn shares_text_covers_every_share_flag() {
        let with = |sharing, mode| {
            let friends = vec![format!("home={}", NodeKey::from_bytes([1; 32])).parse().unwrap()];
            shares(&Config { mode, sharing, friends, ..Config::default() })
        };
        let friends = " Friends may have every valid path, from anywhere.";
        assert_eq!(with(Sharing::Nobody, Mode::Both), "Nothing is shared with other machines.");
        let nobody_else = format!("Nothing is shared with strangers and neighbours.{friends}");
        assert_eq!(with(Sharing::Friends, Mode::Both), nobody_else);
        assert_eq!(with(Sharing::Lan, Mode::Wan), nobody_else);
        let lan = with(Sharing::Lan, Mode::Both);
        assert!(
            lan.ends_with(&format!("Nobody else gets anything.{friends}"))
                && !lan.contains("anybody"),
            "{lan}"
        );
        assert!(with(Sharing::All, Mode::Both).ends_with(friends));
    }
}
