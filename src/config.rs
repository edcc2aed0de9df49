//! Settings of the daemon, with their units and defaults.

use crate::network::NetworkPolicy;
use crate::nix::{PublicKey, StoreDir};
use crate::wire::NodeKey;
use crate::wire::tracker::MAX_ADDR;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Networks on which this node looks for peers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// On directly connected networks.
    Lan,
    /// Through a tracker.
    Wan,
    /// On directly connected networks and through a tracker.
    Both,
}

impl Mode {
    /// Whether this node looks for peers on the LAN and shares with them.
    pub fn has_lan(self) -> bool {
        self != Mode::Wan
    }

    /// Whether this node looks for peers through trackers and shares with WAN peers.
    pub fn has_wan(self) -> bool {
        self != Mode::Lan
    }
}

impl FromStr for Mode {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "lan" => Ok(Mode::Lan),
            "wan" => Ok(Mode::Wan),
            "both" => Ok(Mode::Both),
            _ => Err("not lan, wan or both"),
        }
    }
}

/// Restriction of what the mode shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Share with all peers that the mode allows.
    All,
    /// Share only with the LAN and with friends.
    Lan,
    /// Share only with friends, in every mode.
    Friends,
    /// Share nothing; this node only fetches.
    Nobody,
}

impl FromStr for Sharing {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "all" => Ok(Sharing::All),
            "lan" => Ok(Sharing::Lan),
            "friends" => Ok(Sharing::Friends),
            "nobody" => Ok(Sharing::Nobody),
            _ => Err("not all, lan, friends or nobody"),
        }
    }
}

/// Maximum number of friends. More `--friend` flags are an error; more lines of the friends file
/// are ignored and reported. Each friend costs a thread, and a query for each path that the LAN
/// lacks.
pub const MAX_FRIENDS: usize = 16;

/// Maximum length of a friend's name, in bytes; a longer one is an error. It appears in logs and
/// tables.
const MAX_FRIEND_NAME: usize = 32;

/// A machine that is identified by its key and may have every path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FriendConfig {
    /// Name in logs and status.
    pub name: String,
    /// Public key of its identity.
    pub key: NodeKey,
    /// Host and port, if they are known.
    pub host: Option<(String, u16)>,
    /// Key that signs the friend's paths. peerix accepts paths that it signed; Nix accepts them
    /// only if nix.conf trusts the key too.
    pub signing_key: Option<PublicKey>,
}

impl FromStr for FriendConfig {
    type Err = String;

    /// Parses `NAME=ed25519:KEY[@HOST[:PORT]][,sign=NAME:BASE64]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("not NAME=ed25519:KEY")?;
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || name.len() > MAX_FRIEND_NAME || !name.bytes().all(is_plain) {
            return Err(format!(
                "a name has 1 to {MAX_FRIEND_NAME} letters, digits, dots, - and _"
            ));
        }
        let mut parts = rest.split(',');
        let location = parts.next().unwrap_or_default();
        let (key, host) =
            location.split_once('@').map_or((location, None), |(key, host)| (key, Some(host)));
        let key = key.parse::<NodeKey>().map_err(|e| e.to_string())?;
        let host = host
            .map(parse_host)
            .transpose()?
            .map(|(host, port)| (host, port.unwrap_or(DEFAULT_PORT)));
        let mut signing_key = None;
        for option in parts {
            let value = option
                .strip_prefix("sign=")
                .ok_or_else(|| format!("{option}: not sign=NAME:KEY"))?;
            if signing_key.is_some() {
                return Err(format!("{option}: sign= is given twice"));
            }
            signing_key = Some(PublicKey::parse(value).map_err(|e| format!("{value}: {e}"))?);
        }
        Ok(FriendConfig { name: name.to_owned(), key, host, signing_key })
    }
}

/// Parses `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
///
/// # Errors
/// The port is not from 1 to 65535, or the host is empty, longer than 253 bytes or malformed.
pub fn parse_host(value: &str) -> Result<(String, Option<u16>), &'static str> {
    let (host, port) = match value.rsplit_once(':') {
        _ if value.parse::<IpAddr>().is_ok() || value.ends_with(']') => (value, None),
        Some((host, port)) => (host, Some(port)),
        None => (value, None),
    };
    let port = match port.map(str::parse) {
        None => None,
        Some(Ok(port)) if port != 0 => Some(port),
        Some(_) => return Err("not a port from 1 to 65535"),
    };
    let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
    if host.is_empty()
        || host.len() > MAX_ADDR
        || host.contains(|c: char| c.is_whitespace() || c == '/')
    {
        return Err("not a host name or address");
    }
    Ok((host.to_owned(), port))
}

/// All settings. [`Config::default`] has the values of `peerix` without flags and environment.
#[derive(Debug, Clone)]
pub struct Config {
    /// TCP and UDP port. 0 takes a free one. Defaults to 12304.
    pub port: u16,
    /// Addresses to listen on. HTTP is also served on 127.0.0.1. Defaults to `0.0.0.0`.
    pub bind: Vec<IpAddr>,
    /// Networks that count as LAN. Defaults to the private and link-local networks of all
    /// interfaces except those of containers and virtual machines.
    pub networks: NetworkPolicy,
    /// Time that a lookup waits for broadcast answers of unknown LAN peers. Defaults to 50 ms.
    pub timeout: Duration,
    /// Whether each request is logged. Defaults to false.
    pub verbose: bool,
    /// File of the secret key that signs this node's own paths. Defaults to `$NIX_SECRET_KEY_FILE`,
    /// else none.
    pub private_key: Option<PathBuf>,
    /// Networks on which this node looks for peers. Defaults to [`Mode::Lan`].
    pub mode: Mode,
    /// Restriction of what the mode shares. Defaults to [`Sharing::All`].
    pub sharing: Sharing,
    /// Machines that may have every path; at most [`MAX_FRIENDS`]. Defaults to none.
    pub friends: Vec<FriendConfig>,
    /// File with further friends, one a line. The daemon reads it again when it changes. Defaults
    /// to none.
    pub friends_file: Option<PathBuf>,
    /// Whether the router is asked to forward a port to this node. Defaults to false.
    pub map_port: bool,
    /// Limit of the bytes per second that are sent over HTTP to other machines, all connections
    /// together. Defaults to no limit.
    pub upload_limit: Option<u64>,
    /// URLs of the trackers, without a slash at the end. Defaults to none.
    pub tracker_urls: Vec<String>,
    /// This node's ID at the trackers. Defaults to one derived from its identity.
    pub peer_id: Option<String>,
    /// Host to announce to trackers, and its port if it differs from `port`. Defaults to the
    /// address that the tracker sees.
    pub announce_addr: Option<(String, Option<u16>)>,
    /// Whether WAN peers get only paths that the upstream cache has too. Defaults to true.
    pub verify: bool,
    /// URL of the upstream cache, without a slash at the end. Defaults to [`DEFAULT_UPSTREAM`].
    pub upstream_cache: String,
    /// Whether paths with certain names are withheld from WAN peers. Defaults to true.
    pub filter: bool,
    /// Whether the name filter uses the built-in patterns. Defaults to true.
    pub default_filters: bool,
    /// Further patterns of the name filter. Defaults to none.
    pub filter_patterns: Vec<String>,
    /// Host and port of nodes beyond the broadcast domain. Defaults to none.
    pub peers: Vec<(String, u16)>,
    /// `Priority` in nix-cache-info. Nix asks caches with lower values first; cache.nixos.org has
    /// 40. Defaults to 20.
    pub priority: u32,
    /// Store directory. Defaults to `/nix/store`.
    pub store_dir: StoreDir,
    /// Root directory of the store, as of `nix --store DIR`. Files are below it; store paths do not
    /// contain it. Defaults to `/`.
    pub root: PathBuf,
    /// File of Nix's database. Defaults to `/nix/var/nix/db/db.sqlite`.
    pub db: PathBuf,
    /// Directory for the identity, the counters and other state. Defaults to `$STATE_DIRECTORY`,
    /// else none.
    pub state_dir: Option<PathBuf>,
    /// Keys that are trusted in addition to those of nix.conf. Defaults to none.
    pub trusted_public_keys: Vec<PublicKey>,
    /// Flags that restore these settings except `nix_conf_dir`, including those from the
    /// environment. Bytes that are not UTF-8 are replaced by U+FFFD.
    pub flags: Vec<String>,
    /// Files with further trusted keys, read at the start and once a minute. Defaults to none.
    pub trusted_public_key_files: Vec<PathBuf>,
    /// Address that serves `/metrics` and `/health` to every client. Defaults to none.
    pub metrics: Option<SocketAddr>,
    /// Directory of nix.conf, whose keys are trusted too. Defaults to `$NIX_CONF_DIR`, else
    /// `/etc/nix`.
    pub nix_conf_dir: PathBuf,
}

/// Default TCP and UDP port of peerix.
pub const DEFAULT_PORT: u16 = 12304;

/// Default substituter of Nix (Nix manual, "substituters").
pub const DEFAULT_UPSTREAM: &str = "https://cache.nixos.org";

/// Key of [`DEFAULT_UPSTREAM`], which Nix trusts by default (Nix manual, "trusted-public-keys").
pub const UPSTREAM_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

impl Config {
    /// Whether friends are configured, by flag or by file. The file may be empty.
    pub fn has_friends(&self) -> bool {
        !self.friends.is_empty() || self.friends_file.is_some()
    }

    /// Host and port to announce to trackers. `port` is that of the daemon, and is announced unless
    /// `--announce-addr` has one. The host is `None` if trackers are to take the source address of
    /// the request.
    pub fn announced_address(&self, port: u16) -> (Option<String>, u16) {
        let (host, announced) = self.announce_addr.clone().unzip();
        (host, announced.flatten().unwrap_or(port))
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            port: DEFAULT_PORT,
            bind: vec![Ipv4Addr::UNSPECIFIED.into()],
            networks: NetworkPolicy::default(),
            timeout: Duration::from_millis(50),
            verbose: false,
            private_key: None,
            mode: Mode::Lan,
            sharing: Sharing::All,
            friends: Vec::new(),
            friends_file: None,
            map_port: false,
            upload_limit: None,
            tracker_urls: Vec::new(),
            peer_id: None,
            announce_addr: None,
            verify: true,
            upstream_cache: DEFAULT_UPSTREAM.into(),
            filter: true,
            default_filters: true,
            filter_patterns: Vec::new(),
            peers: Vec::new(),
            priority: 20,
            store_dir: StoreDir::parse("/nix/store").expect("an absolute path"),
            root: "/".into(),
            db: "/nix/var/nix/db/db.sqlite".into(),
            state_dir: None,
            trusted_public_keys: Vec::new(),
            flags: Vec::new(),
            trusted_public_key_files: Vec::new(),
            metrics: None,
            nix_conf_dir: "/etc/nix".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_signing_key_of_a_friend_is_an_error_that_names_it() {
        let key = NodeKey::from_bytes([1; 32]);
        let sign = |name: &str| format!(",sign={name}:{}", UPSTREAM_KEY.split_once(':').unwrap().1);
        let parse = |text: String| text.parse::<FriendConfig>();
        let one = parse(format!("home={key}@host{}", sign("a-1"))).unwrap();
        assert_eq!(one.signing_key.unwrap().name(), "a-1");
        let error = parse(format!("home={key}{}{}", sign("a-1"), sign("b-1"))).unwrap_err();
        assert!(error.contains("sign=b-1:") && error.contains("twice"), "{error}");
    }
}
