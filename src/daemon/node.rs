//! What the services of this node share: its settings, keys and policies.

use crate::access::AccessPolicy;
use crate::config::Config;
use crate::degraded::Degraded;
use crate::http::handler::signer;
use crate::http::narinfo::Signer;
use crate::identity;
use crate::key_file;
use crate::network::{LanNetworks, Networks};
use crate::nix::{SecretKey, StoreDir};
use crate::peers::client::PeerClient;
use crate::peers::health::PeerHealth;
use crate::peers::pace::Paces;
use crate::peers::request_pool::RequestPool;
use crate::stats::Stats;
use crate::status::PRIVATE_KEY;
use crate::store::Store;
use crate::wire::tracker::Identity;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Problem code of an unusable identity.
const IDENTITY_PROBLEM: &str = "identity";

/// Settings and state of this node that its services share.
pub(super) struct Node {
    pub(super) config: Config,
    /// Port that is served on. It may differ from the one in `config`.
    pub(super) port: u16,
    pub(super) networks: Arc<Networks>,
    pub(super) store: Arc<Store>,
    pub(super) stats: Arc<Stats>,
    pub(super) access: Arc<AccessPolicy>,
    /// What the node runs without.
    pub(super) degraded: Arc<Degraded>,
    /// Signs with the secret key of `--private-key`, which may become readable after the start.
    pub(super) signer: Arc<OnceLock<Signer>>,
    /// `None` if the node needs no identity, or if it cannot be loaded.
    pub(super) identity: Option<Arc<Identity>>,
}

impl Node {
    /// Reads the node's keys, and logs what is wrong with them. Blocks on the disk.
    pub(super) fn new(
        config: Config,
        port: u16,
        networks: Arc<Networks>,
        store: Arc<Store>,
        stats: Stats,
    ) -> Node {
        if config.mode.has_lan() {
            log_networks(&networks.current());
        }
        let mut node = Node {
            access: Arc::new(AccessPolicy::new(networks.clone(), &config)),
            config,
            port,
            networks,
            store,
            stats: Arc::new(stats),
            degraded: Arc::default(),
            signer: Arc::default(),
            identity: None,
        };
        node.read_own_key();
        node.identity = find_identity(&node.config, &node.degraded);
        node
    }

    /// Reads the secret key of `--private-key` if it has not been read yet. Returns true if this
    /// call read it. Blocks on the disk.
    pub(super) fn read_own_key(&self) -> bool {
        let file = self.config.private_key.as_deref().filter(|_| self.signer.get().is_none());
        let key = file.and_then(|file| self.degraded.note(PRIVATE_KEY, read_key(file)));
        let Some(key) = key else { return false };
        self.signer.get_or_init(|| signer(key));
        self.access.set_has_key();
        true
    }

    /// Tries to load an identity that could not be loaded at the start. Returns true if that works
    /// now. Blocks on the disk.
    pub(super) fn retry_identity(&self) -> bool {
        self.degraded.all().iter().any(|(code, _)| *code == IDENTITY_PROBLEM)
            && load_identity(&self.config).is_ok()
    }

    /// The identity, if it is kept in the state directory, so that it lasts over restarts. Friends
    /// need such an identity.
    pub(super) fn lasting_identity(&self) -> Option<&Arc<Identity>> {
        self.identity.as_ref().filter(|_| self.config.state_dir.is_some())
    }
}

/// What all requests to peers share: the HTTP client, the threads that wait for responses, and the
/// health and the pace of each peer.
pub(super) struct PeerRequests {
    pub(super) client: Arc<PeerClient>,
    pub(super) pool: Arc<RequestPool>,
    pub(super) health: Arc<PeerHealth>,
    pub(super) paces: Arc<Paces>,
}

impl PeerRequests {
    pub(super) fn new(store_dir: StoreDir) -> PeerRequests {
        PeerRequests {
            client: Arc::new(PeerClient::new(store_dir)),
            pool: Arc::default(),
            health: Arc::default(),
            paces: Arc::default(),
        }
    }
}

/// Reads the secret key of `--private-key`.
///
/// # Errors
/// One line: what is wrong with the file, and what the node does without the key.
fn read_key(path: &Path) -> Result<SecretKey, String> {
    let name = path.display();
    let without = "until --private-key names a file of nix-store --generate-binary-cache-key that this user can read, \
                   paths without another signature are not shared";
    let text = key_file::read(path).map_err(|e| format!("private key {name}: {e}; {without}"))?;
    // Content that the systemd units provide by SetCredential= if the file is missing.
    if text.trim() == "missing" {
        return Err(format!(
            "private key {name}: the file that systemd should take it from is missing; {without}"
        ));
    }
    SecretKey::parse(&text).map_err(|e| format!("private key {name}: {e}; {without}"))
}

/// Loads this node's identity, and creates it if there is a state directory, so that the user can
/// give it to friends in advance. `None` if the node needs no identity, or if it cannot be loaded.
/// In modes with WAN or with friends, a failure is recorded in `degraded` and retried.
fn find_identity(config: &Config, degraded: &Degraded) -> Option<Arc<Identity>> {
    if config.mode.has_wan() || config.has_friends() && config.state_dir.is_some() {
        return degraded.note(IDENTITY_PROBLEM, load_identity(config)).map(Arc::new);
    }
    identity::load(config.state_dir.as_ref()?).map_err(|e| log::warn!("{e}")).ok().map(Arc::new)
}

/// Loads the identity from the state directory, or creates one for this run if there is no
/// directory.
///
/// # Errors
/// One line: what is wrong with the file, and what the node does without it.
fn load_identity(config: &Config) -> Result<Identity, String> {
    let without = |e| {
        format!("{e}; until then, peers on other networks neither find this node nor are found")
    };
    match &config.state_dir {
        Some(dir) => identity::load(dir).map_err(without),
        None => {
            log::warn!(
                "no --state-dir: this node is another peer to its trackers after each start"
            );
            identity::for_this_run().map_err(without)
        }
    }
}

/// Logs the LAN networks, and warns of each `--lan` on an excluded interface.
fn log_networks(networks: &LanNetworks) {
    log::info!("LAN: {networks}");
    for (network, interface) in networks.ineffective_networks() {
        let remedy = format!("--interface {interface} uses it");
        log::warn!("--lan {network}: is on {interface}, which is excluded; {remedy}");
    }
}
