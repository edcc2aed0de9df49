//! Every setting of the daemon, with its unit and default.

use crate::network::NetworkPolicy;
use crate::nix::{PublicKey, StoreDir};
use crate::wire::NodeKey;
use crate::wire::tracker::MAX_ADDR;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Where peers are looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// On directly connected networks.
    Lan,
    /// Through a tracker.
    Wan,
    /// Both.
    Both,
}

impl Mode {
    /// Whether this node looks on the LAN and shares with it.
    pub fn has_lan(self) -> bool {
        self != Mode::Wan
    }

    /// Whether this node looks beyond it, and shares with anybody.
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

/// How much of what the mode shares is shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// All of it.
    All,
    /// What the LAN and friends may have.
    Lan,
    /// What friends may have, in every mode.
    Friends,
    /// Nothing: this node only fetches.
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

/// Friends at most: each is asked for every path that the LAN does not have, and each has a thread.
pub const MAX_FRIENDS: usize = 16;

/// Longest name of a friend, in bytes. It is for people, in the log and in tables.
const MAX_FRIEND_NAME: usize = 32;

/// A machine that is known by its key, and may have every path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FriendConfig {
    /// For people.
    pub name: String,
    /// Of its identity.
    pub key: NodeKey,
    /// Where it is, if that is known: host and port.
    pub host: Option<(String, u16)>,
    /// The key that signs its paths: peerix lets through what this key signed. What Nix takes is
    /// nix.conf's.
    pub signing_key: Option<PublicKey>,
}

impl FromStr for FriendConfig {
    type Err = String;

    /// Reads `NAME=ed25519:KEY[@HOST[:PORT]][,sign=NAME:BASE64]`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, rest) = text.split_once('=').ok_or("not NAME=ed25519:KEY")?;
        let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
        if name.is_empty() || name.len() > MAX_FRIEND_NAME || !name.bytes().all(is_plain) {
            return Err(format!(
                "a name has 1 to {MAX_FRIEND_NAME} letters, digits, dots, - and _"
            ));
        }
        let mut parts = rest.split(',');
        let place = parts.next().unwrap_or_default();
        let (key, host) =
            place.split_once('@').map_or((place, None), |(key, host)| (key, Some(host)));
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
            signing_key = Some(PublicKey::parse(value).map_err(|e| format!("{value}: {e}"))?);
        }
        Ok(FriendConfig { name: name.to_owned(), key, host, signing_key })
    }
}

/// Reads `host`, `host:port`, `[v6]`, `[v6]:port` or a bare IPv6 address.
///
/// # Errors
/// What is wrong with it.
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

/// Every setting. [`Config::default`] is what `peerix` without flags does.
#[derive(Debug, Clone)]
pub struct Config {
    /// TCP and UDP port. Defaults to 12304; 0 takes a free one.
    pub port: u16,
    /// Addresses to listen on; for HTTP 127.0.0.1 is always one. Defaults to `0.0.0.0`.
    pub bind: Vec<IpAddr>,
    /// Which networks are LAN. Defaults to the private and link-local networks of all interfaces
    /// but those of containers and virtual machines.
    pub networks: NetworkPolicy,
    /// How long unknown LAN peers may take to answer. Defaults to 50 ms.
    pub timeout: Duration,
    /// Log what each request does. Defaults to false.
    pub verbose: bool,
    /// The secret key to sign this node's own paths with. Defaults to `$NIX_SECRET_KEY_FILE`, else
    /// none.
    pub private_key: Option<PathBuf>,
    /// Defaults to [`Mode::Lan`].
    pub mode: Mode,
    /// How much of what the mode shares is shared. Defaults to [`Sharing::All`].
    pub sharing: Sharing,
    /// Machines that may have every path. Defaults to none.
    pub friends: Vec<FriendConfig>,
    /// A file with more of them, one a line, which is followed. Defaults to none.
    pub friends_file: Option<PathBuf>,
    /// Whether the router is asked to let connections in. Defaults to false.
    pub map_port: bool,
    /// Bytes a second that may be sent over HTTP to other machines. Defaults to no limit.
    pub upload_limit: Option<u64>,
    /// Trackers, for modes with WAN. Defaults to none.
    pub tracker_urls: Vec<String>,
    /// This node's ID at the trackers. Defaults to one that is made at the first start.
    pub peer_id: Option<String>,
    /// The host, and the port if it is another, to announce to trackers. Defaults to what they see.
    pub announce_addr: Option<(String, Option<u16>)>,
    /// Whether WAN peers get only what the upstream cache has too. Defaults to true.
    pub verify: bool,
    /// Without a slash at its end. Defaults to [`DEFAULT_UPSTREAM`].
    pub upstream_cache: String,
    /// Whether paths are kept from WAN peers by name. Defaults to true.
    pub filter: bool,
    /// Whether that uses the built-in patterns. Defaults to true.
    pub default_filters: bool,
    /// Further patterns. Defaults to none.
    pub filter_patterns: Vec<String>,
    /// Nodes beyond the broadcast domain, `host` and port. Defaults to none.
    pub peers: Vec<(String, u16)>,
    /// `Priority` in nix-cache-info; lower is asked earlier, cache.nixos.org has 40. Defaults to
    /// 20.
    pub priority: u32,
    /// Defaults to `/nix/store`.
    pub store_dir: StoreDir,
    /// The root directory of the store: its files are below it, while their names do not have it.
    /// Defaults to `/`.
    pub root: PathBuf,
    /// Nix's database. Defaults to `/nix/var/nix/db/db.sqlite`.
    pub db: PathBuf,
    /// Where identity, peer ID and counters are kept. Defaults to `$STATE_DIRECTORY`, else none.
    pub state_dir: Option<PathBuf>,
    /// Keys that are trusted beside those of nix.conf. Defaults to none.
    pub trusted_public_keys: Vec<PublicKey>,
    /// The flags that say all of this, those that stood in the environment among them; what is not
    /// UTF-8 is as good as it can be shown.
    pub flags: Vec<String>,
    /// Files with more of them, read at the start and each minute. Defaults to none.
    pub trusted_public_key_files: Vec<PathBuf>,
    /// Where `/metrics` and `/health` are served to others. Defaults to nowhere.
    pub metrics: Option<SocketAddr>,
    /// Where nix.conf is, whose keys are trusted too. Defaults to `$NIX_CONF_DIR`, else `/etc/nix`.
    pub nix_conf_dir: PathBuf,
}

/// The port of peerix, TCP and UDP.
pub const DEFAULT_PORT: u16 = 12304;

/// The cache that Nix itself asks by default.
pub const DEFAULT_UPSTREAM: &str = "https://cache.nixos.org";

/// The key of [`DEFAULT_UPSTREAM`], which Nix trusts by default (Nix manual,
/// "trusted-public-keys").
pub const UPSTREAM_KEY: &str = "cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=";

impl Config {
    /// Whether there may be friends.
    pub fn has_friends(&self) -> bool {
        !self.friends.is_empty() || self.friends_file.is_some()
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
