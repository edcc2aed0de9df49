//! What leaves this machine, and to whom. Every answer to somebody else, over HTTP or UDP, asks here first.
//!
//! Who asks is told by the socket's address alone. This machine has everything, the LAN every valid path, and anybody
//! else what has no name to be kept (`filter.rs`) and is the upstream cache's as well (`verify.rs`).

mod filter;
mod verify;

use crate::config::{Config, Mode};
use crate::interfaces::{self, Interfaces};
use crate::nix::PathInfo;
use filter::Filter;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;
pub use verify::UPSTREAM_KEY;
use verify::Verifier;

/// Who asks, by the address of the socket and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A loopback address: this machine's Nix and its users.
    ThisMachine,
    /// A neighbour in a directly connected private network, or a node named by `--peer`; in modes that have a LAN.
    Lan,
    /// Anybody else.
    Wan,
}

/// Tells scopes apart, and what each may have.
pub struct Share {
    interfaces: Arc<Interfaces>,
    named_peers: std::sync::RwLock<Vec<IpAddr>>,
    mode: Mode,
    filter: Filter,
    /// None where nothing is verified.
    verifier: Option<Verifier>,
}

impl Share {
    /// As the user chose.
    pub fn new(interfaces: Arc<Interfaces>, config: &Config) -> Self {
        let filter = match config.filter {
            true => Filter::new(config.default_filters, &config.filter_patterns),
            false => Filter::default(),
        };
        let verifier = (config.mode.has_wan() && config.verify).then(|| Verifier::new(config));
        Share { interfaces, named_peers: Default::default(), mode: config.mode, filter, verifier }
    }

    /// The addresses that `--peer` names now: who names a node shares with it as with a neighbour.
    pub fn set_named_peers(&self, addresses: Vec<IpAddr>) {
        *self.named_peers.write().unwrap_or_else(|e| e.into_inner()) = addresses;
    }

    /// The scope of an asker. A private address that the interface table does not know makes the table be read
    /// again: a laptop's new neighbours should not wait for the next regular look.
    pub fn scope(&self, asker: IpAddr) -> Scope {
        let asker = asker.to_canonical();
        if asker.is_loopback() {
            return Scope::ThisMachine;
        }
        if !self.mode.has_lan() {
            return Scope::Wan;
        }
        let is_lan = || {
            self.interfaces.is_neighbour(asker)
                || self.named_peers.read().unwrap_or_else(|e| e.into_inner()).contains(&asker)
        };
        if is_lan() {
            return Scope::Lan;
        }
        // At most once a second, however many strangers ask.
        let stale = std::time::Duration::from_secs(1);
        if interfaces::is_private(asker) {
            self.interfaces.refresh(Instant::now(), stale);
            if is_lan() {
                return Scope::Lan;
            }
        }
        Scope::Wan
    }

    /// Whether an asker of that scope may have any valid path at all.
    pub fn serves(&self, scope: Scope) -> bool {
        match scope {
            Scope::ThisMachine => true,
            Scope::Lan => self.mode.has_lan(),
            Scope::Wan => self.mode.has_wan(),
        }
    }

    /// Whether an asker of that scope may have this valid path. For WAN the upstream cache may be asked, which takes
    /// 15 s at most; what cannot be told then, they may not. Who may not is told that there is no such path.
    pub fn may_have(&self, scope: Scope, info: &PathInfo) -> bool {
        self.decide(scope, info, |verifier| verifier.verified(info))
    }

    /// The same from what is known already, without waiting.
    pub fn may_have_now(&self, scope: Scope, info: &PathInfo) -> bool {
        self.decide(scope, info, |verifier| verifier.verified_now(info) == Some(true))
    }

    /// Whether it takes a question to the upstream cache to know if strangers may have this path. Where upstream's key is
    /// known, its paths have a signature, and nothing is asked that no stranger wants to know.
    pub fn is_open_question(&self, info: &PathInfo) -> bool {
        let verifier = self.verifier.as_ref().filter(|verifier| !verifier.has_key());
        verifier.is_some_and(|verifier| !self.filter.keeps(&info.path) && verifier.verified_now(info).is_none())
    }

    /// Why strangers may not have this valid path, for the user who asks; none if they may. `config` is what this was made
    /// of. Takes as long as [`Share::may_have`].
    pub fn why_kept(&self, config: &Config, info: &PathInfo) -> Option<String> {
        if !self.serves(Scope::Wan) {
            return Some("in mode lan, only the networks that this machine is on get anything".into());
        }
        if self.filter.keeps(&info.path) {
            let pattern = filter::kept_by(config.default_filters, &config.filter_patterns, &info.path);
            return Some(format!("its name matches the pattern {}", pattern.unwrap_or_default()));
        }
        let verifier = self.verifier.as_ref().filter(|verifier| !verifier.verified(info))?;
        let upstream = &config.upstream_cache;
        Some(match verifier.verified_now(info) {
            Some(_) => format!("{upstream} does not have it, or with another NAR"),
            None => format!("{upstream} did not say whether it has it"),
        })
    }

    fn decide(&self, scope: Scope, info: &PathInfo, verified: impl FnOnce(&Verifier) -> bool) -> bool {
        let serves = self.serves(scope);
        match scope {
            Scope::ThisMachine | Scope::Lan => serves,
            Scope::Wan => serves && !self.filter.keeps(&info.path) && self.verifier.as_ref().is_none_or(verified),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::Interface;
    use crate::nix::{NarHash, StorePath};
    use std::net::TcpListener;

    fn share(mode: Mode) -> Share {
        let eth0 = Interface {
            name: "eth0".into(),
            index: 2,
            address: "192.168.10.5".parse().unwrap(),
            prefix_len: 24,
            broadcast: None,
            running: true,
        };
        // Read in the future, so that no stranger's address makes the test read the real machine's interfaces.
        let later = Instant::now() + std::time::Duration::from_secs(3600);
        Share::new(Arc::new(Interfaces::fixed(vec![eth0], later)), &Config { mode, ..Config::default() })
    }

    #[test]
    fn scope_is_decided_by_address() {
        let share = share(Mode::Lan);
        share.set_named_peers(vec!["10.9.8.7".parse().unwrap()]);
        for (ip, scope) in [
            ("127.0.0.1", Scope::ThisMachine),
            ("127.8.8.8", Scope::ThisMachine),
            ("::1", Scope::ThisMachine),
            ("::ffff:127.0.0.1", Scope::ThisMachine),
            ("192.168.10.77", Scope::Lan),
            ("::ffff:192.168.10.77", Scope::Lan),
            ("10.9.8.7", Scope::Lan),
            ("192.168.11.1", Scope::Wan),
            ("10.9.8.8", Scope::Wan),
            ("8.8.8.8", Scope::Wan),
            ("2001:db8::1", Scope::Wan),
        ] {
            assert_eq!(share.scope(ip.parse().unwrap()), scope, "{ip}");
        }
    }

    #[test]
    fn a_node_without_a_lan_has_no_neighbours() {
        let share = share(Mode::Wan);
        share.set_named_peers(vec!["10.9.8.7".parse().unwrap()]);
        for ip in ["192.168.10.77", "fe80::1", "10.9.8.7", "8.8.8.8"] {
            assert_eq!(share.scope(ip.parse().unwrap()), Scope::Wan, "{ip}");
        }
        assert_eq!(share.scope("::ffff:127.0.0.1".parse().unwrap()), Scope::ThisMachine);
    }

    #[test]
    fn who_is_served_in_which_mode() {
        for (mode, lan, wan) in [(Mode::Lan, true, false), (Mode::Both, true, true), (Mode::Wan, false, true)] {
            let share = share(mode);
            assert!(share.serves(Scope::ThisMachine));
            assert_eq!(share.serves(Scope::Lan), lan, "{mode:?}");
            assert_eq!(share.serves(Scope::Wan), wan, "{mode:?}");
        }
    }

    fn info(name: &str) -> PathInfo {
        PathInfo {
            path: StorePath::parse(&format!("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-{name}")).unwrap(),
            nar_hash: NarHash::from_bytes([7; 32]),
            nar_size: 8,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        }
    }

    #[test]
    fn upstream_is_asked_for_strangers_alone() {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        upstream.set_nonblocking(true).unwrap();
        let upstream_cache = format!("http://{}", upstream.local_addr().unwrap());
        let config = Config { mode: Mode::Both, upstream_cache, ..Config::default() };
        let share = Share::new(Arc::new(Interfaces::fixed(Vec::new(), Instant::now())), &config);
        for info in [info("hello"), info("a-secret-b")] {
            assert!(share.may_have(Scope::ThisMachine, &info) && share.may_have(Scope::Lan, &info));
            assert!(!share.may_have_now(Scope::Wan, &info));
        }
        assert!(!share.may_have(Scope::Wan, &info("a-secret-b")));
        assert_eq!(upstream.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn what_each_may_have() {
        let with = |mode, verify, filter| {
            let upstream_cache = "http://127.0.0.1:9".to_owned();
            let config = Config { mode, verify, filter, upstream_cache, ..Config::default() };
            Share::new(Arc::new(Interfaces::fixed(Vec::new(), Instant::now())), &config)
        };
        let (plain, secret) = (info("hello"), info("a-secret-b"));
        for (mode, verify, filter, wan) in [
            // Nobody is at that port, so nothing is known of upstream.
            (Mode::Both, true, true, [false, false]),
            (Mode::Wan, true, false, [false, false]),
            (Mode::Both, false, true, [true, false]),
            (Mode::Wan, false, false, [true, true]),
            (Mode::Lan, false, false, [false, false]),
        ] {
            let share = with(mode, verify, filter);
            for (info, wan) in [&plain, &secret].into_iter().zip(wan) {
                let all = [(Scope::ThisMachine, true), (Scope::Lan, mode.has_lan()), (Scope::Wan, wan)];
                for (scope, expected) in all {
                    let case = format!("{mode:?} verify {verify} filter {filter}: {} for {scope:?}", info.path);
                    assert_eq!(share.may_have(scope, info), expected, "{case}");
                    assert_eq!(share.may_have_now(scope, info), expected, "{case}");
                }
            }
        }
    }
}
