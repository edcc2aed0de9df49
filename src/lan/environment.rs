//! What discovery needs of the rest of the daemon.

use crate::access::{AccessPolicy, Scope};
use crate::log_throttle::LogThrottle;
use crate::network::Networks;
use crate::nix::{HashPart, PathInfo};
use crate::store::Store;
use crate::wire::{HelloDigest, NodeKey};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What discovery needs of the rest of the daemon. A simulation has its own.
pub trait Environment: Send {
    /// Whether a peer of this network may be at this address.
    fn is_lan(&self, address: SocketAddr) -> bool;
    /// Whether there is a LAN at all. Without one, nothing is sent to a host that did not ask.
    fn has_lan(&self) -> bool;
    /// Whether a query from this address is answered. Other packets from it are dropped if it is
    /// not on the LAN.
    fn is_answered(&self, address: SocketAddr) -> bool;
    /// Whether this is an address of this machine.
    fn is_own(&self, ip: IpAddr) -> bool;
    /// Whether this node would serve each of the paths to that asker, in their order. `None` if it
    /// cannot tell now: it answers nothing then, as *no* would be remembered for an hour. Blocks
    /// for 50 ms at most.
    fn held(&mut self, hash_parts: &[HashPart], asker: SocketAddr) -> Option<Vec<bool>>;
    /// By what friends recognise this node in its hellos, with that instance ID.
    fn digest(&self, _instance: &[u8; 8]) -> Option<HelloDigest> {
        None
    }
    /// A hello with a digest came from a neighbour. It may be a friend's.
    fn heard_digest(&mut self, _instance: &[u8; 8], _digest: &HelloDigest, _http: SocketAddr) {}
}

/// What is told of digests in hellos.
pub type DigestObserver = Box<dyn FnMut(&[u8; 8], &HelloDigest, SocketAddr) + Send>;

/// The real one: the store of this machine, and what is shared of it.
pub struct StoreEnvironment {
    share: Arc<AccessPolicy>,
    store: Arc<Store>,
    networks: Arc<Networks>,
    /// Set while the daemon stops: it answers no queries then. *No* would be wrong after a restart.
    leaving: Arc<AtomicBool>,
    faults: LogThrottle,
    /// This node's key, if it has friends, and who is told of their hellos.
    friends: Option<(NodeKey, DigestObserver)>,
}

impl StoreEnvironment {
    /// The parts it works with. No query is answered once `leaving` is set.
    pub fn new(
        share: Arc<AccessPolicy>,
        store: Arc<Store>,
        networks: Arc<Networks>,
        leaving: Arc<AtomicBool>,
    ) -> Self {
        StoreEnvironment {
            share,
            store,
            networks,
            leaving,
            faults: LogThrottle::default(),
            friends: None,
        }
    }

    /// Lets friends recognise this node by its key, and tells `heard` of digests that may be
    /// theirs.
    pub fn with_friends(self, key: NodeKey, heard: DigestObserver) -> Self {
        StoreEnvironment { friends: Some((key, heard)), ..self }
    }
}

impl Environment for StoreEnvironment {
    fn is_lan(&self, address: SocketAddr) -> bool {
        self.share.datagram_scope(address) == Some(Scope::Lan)
    }

    fn has_lan(&self) -> bool {
        self.share.has_lan()
    }

    fn is_answered(&self, address: SocketAddr) -> bool {
        !self.leaving.load(Ordering::Relaxed) && self.share.datagram_scope(address).is_some()
    }

    fn digest(&self, instance: &[u8; 8]) -> Option<HelloDigest> {
        self.friends.as_ref().map(|(key, _)| key.digest(instance))
    }

    fn heard_digest(&mut self, instance: &[u8; 8], digest: &HelloDigest, http: SocketAddr) {
        if let Some((_, heard)) = &mut self.friends {
            heard(instance, digest, http);
        }
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.networks.is_own(ip)
    }

    fn held(&mut self, hash_parts: &[HashPart], asker: SocketAddr) -> Option<Vec<bool>> {
        let Some(scope) = self.share.datagram_scope(asker) else {
            return Some(vec![false; hash_parts.len()]);
        };
        if !self.share.serves(scope) {
            return Some(vec![false; hash_parts.len()]);
        }
        match self.store.path_infos_quickly(hash_parts) {
            Ok(infos) => {
                let is_held = |info: &Arc<PathInfo>| self.share.allows_now(scope, info);
                Some(infos.iter().map(|info| info.as_ref().is_some_and(is_held)).collect())
            }
            Err(e) => {
                if self.faults.now(Instant::now()) {
                    log::error!("{e}");
                }
                None
            }
        }
    }
}
