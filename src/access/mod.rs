//! Access policy: which store paths this machine shares, and with which peers. Every HTTP and UDP
//! answer to another machine passes through [`AccessPolicy`].
//!
//! The scope of a request follows from the socket's address or from the key that the other end
//! proved to hold, and from nothing else. This machine, friends and LAN peers may have every valid
//! path. WAN peers may have a path if no name pattern matches it (`filter.rs`) and the upstream
//! cache has it too (`verify.rs`). `--share` restricts this further.

mod filter;
mod verify;

use crate::config::{Config, Mode, Sharing};
use crate::lock::RwLock;
use crate::network::Networks;
use crate::nix::PathInfo;
use filter::NameFilter;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;
use verify::Verifier;

/// The relation of a requester to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A client on this machine: its Nix and its users.
    ThisMachine,
    /// A node that has authenticated with the key of a friend, at any address.
    Friend,
    /// A node on a LAN network (see [`crate::network::LanNetworks`]) or at an address named by
    /// `--peer`, in modes that have a LAN.
    Lan,
    /// Any other node.
    Wan,
}

/// Determines the [`Scope`] of a requester and which paths it may have.
pub struct AccessPolicy {
    networks: Arc<Networks>,
    named_peers: RwLock<Vec<SocketAddr>>,
    mode: Mode,
    sharing: Sharing,
    filter: NameFilter,
    /// `None` if the policy compares no path with the upstream cache.
    verifier: Option<Verifier>,
    /// Set until the secret key that signs this machine's paths has been read.
    lacks_key: AtomicBool,
}

impl AccessPolicy {
    /// Creates the policy that `config` describes.
    pub fn new(networks: Arc<Networks>, config: &Config) -> Self {
        let filter = match config.filter {
            true => NameFilter::new(config.default_filters, &config.filter_patterns),
            false => NameFilter::default(),
        };
        let has_wan = config.mode.has_wan() && config.sharing == Sharing::All;
        let verifier = (has_wan && config.verify).then(|| Verifier::new(config));
        let (mode, sharing) = (config.mode, config.sharing);
        let lacks_key = AtomicBool::new(config.private_key.is_some());
        AccessPolicy {
            networks,
            named_peers: Default::default(),
            mode,
            sharing,
            filter,
            verifier,
            lacks_key,
        }
    }

    /// Records that the secret key has been read. Before that, a node with a configured key shares
    /// no path that has neither a signature nor a content address: Nix would cache the unsigned
    /// narinfo for 30 days (`narinfo-cache-positive-ttl`).
    pub fn set_has_key(&self) {
        self.lacks_key.store(false, Ordering::Relaxed);
    }

    /// Replaces the addresses that `--peer` names. Nodes at these addresses have the scope
    /// [`Scope::Lan`], whatever their port.
    pub fn set_named_peers(&self, addresses: Vec<SocketAddr>) {
        *self.named_peers.write() = addresses;
    }

    /// Returns the scope of another machine at this socket address: [`Scope::Lan`] or
    /// [`Scope::Wan`]. For link-local IPv6 the scope ID of the address counts too. The HTTP server
    /// decides which connections are this machine's.
    pub fn scope(&self, asker: SocketAddr) -> Scope {
        let is_lan =
            self.mode.has_lan() && (self.networks.is_lan(asker) || self.is_named_peer(asker));
        if is_lan { Scope::Lan } else { Scope::Wan }
    }

    /// Returns the scope in which to answer a datagram from this address, or `None` to drop it.
    /// Datagrams are dropped if they come from loopback, from an address that cannot receive an
    /// answer (port 0, unspecified, multicast, broadcast), or from WAN while nothing is shared over
    /// WAN. LAN peers always get an answer, so that they do not wait for a timeout when nothing is
    /// shared with them. No datagram has the scope [`Scope::Friend`].
    pub fn datagram_scope(&self, from: SocketAddr) -> Option<Scope> {
        let ip = from.ip().to_canonical();
        let is_broadcast = ip == IpAddr::V4(Ipv4Addr::BROADCAST);
        let has_no_answer = from.port() == 0 || ip.is_unspecified() || ip.is_multicast();
        if has_no_answer || is_broadcast || ip.is_loopback() {
            return None;
        }
        // Another node may run on this machine.
        let scope = self.scope(from);
        (scope == Scope::Lan || self.serves(scope)).then_some(scope)
    }

    fn is_named_peer(&self, asker: SocketAddr) -> bool {
        let host = host_of(asker);
        let named = self.named_peers.read();
        named.iter().any(|peer| host_of(*peer) == host)
    }

    /// Returns whether the requester is outside the LAN, where the network is slower than
    /// compression.
    pub fn is_outside_lan(&self, scope: Scope, asker: SocketAddr) -> bool {
        match scope {
            Scope::ThisMachine | Scope::Lan => false,
            Scope::Friend => self.scope(asker) == Scope::Wan,
            Scope::Wan => true,
        }
    }

    /// Returns whether a requester of this scope may have any valid path at all.
    pub fn serves(&self, scope: Scope) -> bool {
        match scope {
            Scope::ThisMachine => true,
            Scope::Friend => self.sharing != Sharing::Nobody,
            Scope::Lan => {
                self.mode.has_lan() && matches!(self.sharing, Sharing::All | Sharing::Lan)
            }
            Scope::Wan => self.mode.has_wan() && self.sharing == Sharing::All,
        }
    }

    /// Returns whether a requester of this scope may have this valid path. For [`Scope::Wan`] this
    /// may ask the upstream cache, which blocks for at most 15 s; the answer is false if upstream
    /// gives none by then. Callers answer a refused requester as if the path did not exist.
    pub fn allows(&self, scope: Scope, info: &PathInfo) -> bool {
        self.decide(scope, info, |verifier| verifier.verified(info))
    }

    /// Like [`AccessPolicy::allows`], but uses only cached upstream answers and signatures, and
    /// never blocks on the network. A path whose upstream answer is unknown is refused.
    pub fn allows_now(&self, scope: Scope, info: &PathInfo) -> bool {
        self.decide(scope, info, |verifier| verifier.cached_result(info) == Some(true))
    }

    /// Returns when [`AccessPolicy::allows`] should next ask the upstream cache about this path, or
    /// `None` if it need not: nothing is verified, the name filter withholds the path, upstream is
    /// known to have it, or upstream's key is known. In the last case a signature proves upstream's
    /// own paths, so paths without one are asked about only when a WAN peer requests them.
    pub fn next_upstream_request(&self, info: &PathInfo) -> Option<Instant> {
        self.verifier.as_ref().filter(|_| !self.filter.matches(&info.path))?.next_request_at(info)
    }

    /// Explains to the user why WAN peers may not have this valid path, or returns `None` if they
    /// may. `config` must be the one that this policy was created from. May ask the upstream cache
    /// and blocks for at most 15 s.
    pub fn withheld_reason(&self, config: &Config, info: &PathInfo) -> Option<String> {
        if self.sharing != Sharing::All {
            return Some("--share keeps everything from strangers".into());
        }
        if !self.serves(Scope::Wan) {
            return Some(
                "in mode lan, only the networks that this machine is on get anything".into(),
            );
        }
        if self.awaits_signature(info) {
            return Some("the secret key cannot be read, and nobody else signed it".into());
        }
        if self.filter.matches(&info.path) {
            let pattern = filter::matching_pattern(
                config.default_filters,
                &config.filter_patterns,
                &info.path,
            );
            return Some(format!("its name matches the pattern {}", pattern.unwrap_or_default()));
        }
        let verifier = self.verifier.as_ref().filter(|verifier| !verifier.verified(info))?;
        let upstream = &config.upstream_cache;
        Some(match verifier.cached_result(info) {
            Some(_) => format!("{upstream} does not have it, or with another NAR"),
            None => format!("{upstream} did not say whether it has it"),
        })
    }

    /// Whether only the secret key, which has not been read yet, would sign the path.
    fn awaits_signature(&self, info: &PathInfo) -> bool {
        self.lacks_key.load(Ordering::Relaxed) && info.signatures.is_empty() && info.ca.is_none()
    }

    fn decide(
        &self,
        scope: Scope,
        info: &PathInfo,
        verified: impl FnOnce(&Verifier) -> bool,
    ) -> bool {
        let serves = self.serves(scope);
        if scope != Scope::ThisMachine && self.awaits_signature(info) {
            return false;
        }
        match scope {
            Scope::ThisMachine | Scope::Friend | Scope::Lan => serves,
            Scope::Wan => {
                serves
                    && !self.filter.matches(&info.path)
                    && self.verifier.as_ref().is_none_or(verified)
            }
        }
    }
}

/// Returns the key that identifies a host: its address, and for a link-local IPv6 address also the
/// interface (scope ID).
fn host_of(address: SocketAddr) -> (IpAddr, u32) {
    match address {
        SocketAddr::V6(v6) if v6.ip().is_unicast_link_local() => (address.ip(), v6.scope_id()),
        _ => (address.ip().to_canonical(), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::{InterfaceAddress, NetworkPolicy};
    use crate::nix::{NarHash, Signature, StorePath};
    use std::net::TcpListener;

    fn policy(mode: Mode) -> AccessPolicy {
        let eth0 = InterfaceAddress {
            name: "eth0".into(),
            index: 2,
            address: "192.168.10.5".parse().unwrap(),
            prefix_len: 24,
            broadcast: None,
            running: true,
        };
        let docker0 = InterfaceAddress {
            name: "docker0".into(),
            index: 3,
            address: "172.17.0.1".parse().unwrap(),
            prefix_len: 16,
            broadcast: None,
            running: true,
        };
        policy_on(vec![eth0, docker0], &Config { mode, ..Config::default() })
    }

    fn policy_on(interfaces: Vec<InterfaceAddress>, config: &Config) -> AccessPolicy {
        AccessPolicy::new(Arc::new(Networks::new(NetworkPolicy::default(), interfaces)), config)
    }

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap_or_else(|_| SocketAddr::new(text.parse().unwrap(), 12304))
    }

    fn named() -> Vec<SocketAddr> {
        ["10.9.8.7:12399", "[fe80::7%3]:12304"].map(address).into()
    }

    #[test]
    fn scope_is_decided_by_address() {
        let access = policy(Mode::Lan);
        access.set_named_peers(named());
        for (asker, scope) in [
            ("127.0.0.1", Scope::Wan),
            ("192.168.10.77", Scope::Lan),
            ("::ffff:192.168.10.77", Scope::Lan),
            ("10.9.8.7", Scope::Lan),
            ("[::ffff:10.9.8.7]:1", Scope::Lan),
            ("[fe80::1%2]:1", Scope::Lan),
            ("[fe80::7%3]:1", Scope::Lan),
            ("[fe80::1%3]:1", Scope::Wan),
            ("fe80::1", Scope::Wan),
            ("172.17.0.2", Scope::Wan),
            ("192.168.11.1", Scope::Wan),
            ("10.9.8.8", Scope::Wan),
            ("8.8.8.8", Scope::Wan),
            ("2001:db8::1", Scope::Wan),
        ] {
            assert_eq!(access.scope(address(asker)), scope, "{asker}");
        }
    }

    #[test]
    fn datagram_scope_is_none_where_nothing_is_served() {
        let (lan, both, wan) = (policy(Mode::Lan), policy(Mode::Both), policy(Mode::Wan));
        for (from, in_lan, in_both) in [
            ("192.168.10.77", Some(Scope::Lan), Some(Scope::Lan)),
            ("192.168.10.5", Some(Scope::Lan), Some(Scope::Lan)),
            ("[fe80::1%2]:1", Some(Scope::Lan), Some(Scope::Lan)),
            ("172.17.0.2", None, Some(Scope::Wan)),
            ("[fe80::1%3]:1", None, Some(Scope::Wan)),
            ("8.8.8.8", None, Some(Scope::Wan)),
            ("127.0.0.1", None, None),
            ("[::ffff:127.0.0.1]:1", None, None),
            ("0.0.0.0", None, None),
            ("255.255.255.255", None, None),
            ("224.0.0.1", None, None),
            ("[ff02::1%2]:1", None, None),
            ("192.168.10.77:0", None, None),
        ] {
            assert_eq!(lan.datagram_scope(address(from)), in_lan, "{from}");
            assert_eq!(both.datagram_scope(address(from)), in_both, "{from}");
            // In mode wan, LAN addresses have the scope WAN.
            let in_wan = in_both.map(|_| Scope::Wan);
            assert_eq!(wan.datagram_scope(address(from)), in_wan, "{from}");
        }
    }

    #[test]
    fn lan_address_in_mode_wan_has_scope_wan() {
        let access = policy(Mode::Wan);
        access.set_named_peers(named());
        for asker in ["192.168.10.77", "[fe80::1%2]:1", "10.9.8.7", "8.8.8.8"] {
            assert_eq!(access.scope(address(asker)), Scope::Wan, "{asker}");
        }
    }

    #[test]
    fn mode_decides_which_scopes_are_served() {
        for (mode, lan, wan) in
            [(Mode::Lan, true, false), (Mode::Both, true, true), (Mode::Wan, false, true)]
        {
            let access = policy(mode);
            assert!(access.serves(Scope::ThisMachine));
            assert_eq!(access.serves(Scope::Lan), lan, "{mode:?}");
            assert_eq!(access.serves(Scope::Wan), wan, "{mode:?}");
        }
    }

    #[test]
    fn share_option_restricts_scopes_in_every_mode() {
        use Sharing::{All, Friends, Lan, Nobody};
        for (sharing, friend, lan, wan) in [
            (All, true, true, true),
            (Lan, true, true, false),
            (Friends, true, false, false),
            (Nobody, false, false, false),
        ] {
            for mode in [Mode::Lan, Mode::Both, Mode::Wan] {
                let config =
                    Config { mode, sharing, verify: false, filter: false, ..Config::default() };
                let access = policy_on(Vec::new(), &config);
                let (lan, wan) = (lan && mode.has_lan(), wan && mode.has_wan());
                let all = [
                    (Scope::ThisMachine, true),
                    (Scope::Friend, friend),
                    (Scope::Lan, lan),
                    (Scope::Wan, wan),
                ];
                for (scope, expected) in all {
                    let case = format!("{mode:?} {sharing:?} {scope:?}");
                    assert_eq!(access.serves(scope), expected, "{case}");
                    assert_eq!(access.allows(scope, &info("hello")), expected, "{case}");
                    assert_eq!(access.allows_now(scope, &info("hello")), expected, "{case}");
                }
            }
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
    fn upstream_is_not_asked_for_lan_or_filtered_paths() {
        let upstream = TcpListener::bind("127.0.0.1:0").unwrap();
        upstream.set_nonblocking(true).unwrap();
        let upstream_cache = format!("http://{}", upstream.local_addr().unwrap());
        let config = Config { mode: Mode::Both, upstream_cache, ..Config::default() };
        let access = policy_on(Vec::new(), &config);
        for info in [info("hello"), info("a-secret-b")] {
            assert!(access.allows(Scope::ThisMachine, &info) && access.allows(Scope::Lan, &info));
            assert!(!access.allows_now(Scope::Wan, &info));
        }
        assert!(!access.allows(Scope::Wan, &info("a-secret-b")));
        assert_eq!(upstream.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    }

    #[test]
    fn unsigned_path_is_withheld_until_key_is_read() {
        let config = Config {
            private_key: Some("/missing".into()),
            mode: Mode::Both,
            verify: false,
            ..Config::default()
        };
        let access = policy_on(Vec::new(), &config);
        let signed = PathInfo {
            signatures: vec![Signature::parse(&format!("a-1:{}==", "A".repeat(86))).unwrap()],
            ..info("signed")
        };
        let ca = Some("text:sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73".into());
        let addressed = PathInfo { ca, ..info("addressed") };
        for has_key in [false, true] {
            assert_eq!(access.allows(Scope::Lan, &info("built-here")), has_key);
            assert_eq!(access.allows_now(Scope::Lan, &info("built-here")), has_key);
            assert!(access.allows(Scope::Lan, &signed) && access.allows(Scope::Lan, &addressed));
            assert!(access.allows(Scope::ThisMachine, &info("built-here")));
            assert_eq!(access.withheld_reason(&config, &info("built-here")).is_none(), has_key);
            assert_eq!(access.withheld_reason(&config, &signed), None);
            access.set_has_key();
        }
    }

    #[test]
    fn verify_and_filter_restrict_wan_scope_alone() {
        let with = |mode, verify, filter| {
            let upstream_cache = "http://127.0.0.1:9".to_owned();
            let config = Config { mode, verify, filter, upstream_cache, ..Config::default() };
            policy_on(Vec::new(), &config)
        };
        let (plain, secret) = (info("hello"), info("a-secret-b"));
        for (mode, verify, filter, wan) in [
            // No server listens on this port, so no answer of upstream is known.
            (Mode::Both, true, true, [false, false]),
            (Mode::Wan, true, false, [false, false]),
            (Mode::Both, false, true, [true, false]),
            (Mode::Wan, false, false, [true, true]),
            (Mode::Lan, false, false, [false, false]),
        ] {
            let access = with(mode, verify, filter);
            for (info, wan) in [&plain, &secret].into_iter().zip(wan) {
                let all =
                    [(Scope::ThisMachine, true), (Scope::Lan, mode.has_lan()), (Scope::Wan, wan)];
                for (scope, expected) in all {
                    let case = format!(
                        "{mode:?} verify {verify} filter {filter}: {} for {scope:?}",
                        info.path
                    );
                    assert_eq!(access.allows(scope, info), expected, "{case}");
                    assert_eq!(access.allows_now(scope, info), expected, "{case}");
                }
            }
        }
    }
}
