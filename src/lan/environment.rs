//! What discovery needs from the rest of the daemon: the access policy, the addresses of this
//! machine and its store. The simulation has its own implementation.

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

/// What discovery needs from the rest of the daemon.
pub trait Environment: Send {
    /// Whether a peer on the LAN may have this address.
    fn is_lan(&self, address: SocketAddr) -> bool;
    /// Whether queries from this address are answered. Packets of other kinds are dropped if the
    /// address is not on the LAN.
    fn is_answered(&self, address: SocketAddr) -> bool;
    /// Whether `ip` is an address of this machine.
    fn is_own(&self, ip: IpAddr) -> bool;
    /// For each of `hash_parts`, in their order, whether this node would serve the path to `asker`.
    /// Returns `None` if it cannot tell. The caller then sends no answer, because Nix caches a
    /// wrong *no* for an hour. Blocks for at most 50 ms.
    fn query_held_paths(&mut self, hash_parts: &[HashPart], asker: SocketAddr)
    -> Option<Vec<bool>>;
    /// Digest by which friends recognise this node's hellos with this instance ID. `None` if the
    /// node has no friends.
    fn digest(&self, _instance: &[u8; 8]) -> Option<HelloDigest> {
        None
    }
    /// Called for each hello of a neighbour that carries a digest. The neighbour may be a friend.
    /// `_http` is the address from which the hello came, which is also that of the neighbour's HTTP
    /// server.
    fn record_digest(&mut self, _instance: &[u8; 8], _digest: &HelloDigest, _http: SocketAddr) {}
}

/// Called on the discovery thread with the instance ID, the digest and the HTTP address of each
/// hello that carries a digest.
pub type DigestObserver = Box<dyn FnMut(&[u8; 8], &HelloDigest, SocketAddr) + Send>;

/// The [`Environment`] of the daemon: this machine's store, and the policy of what is shared from
/// it.
pub struct StoreEnvironment {
    policy: Arc<AccessPolicy>,
    store: Arc<Store>,
    networks: Arc<Networks>,
    /// Set while the daemon stops. It then answers no queries: a *no* would be wrong after a
    /// restart.
    is_stopping: Arc<AtomicBool>,
    faults: LogThrottle,
    /// This node's key, and the observer of digests in hellos. `None` if the node has no friends.
    friends: Option<(NodeKey, DigestObserver)>,
}

impl StoreEnvironment {
    /// Combines the parts. No query is answered once `is_stopping` is set.
    pub fn new(
        policy: Arc<AccessPolicy>,
        store: Arc<Store>,
        networks: Arc<Networks>,
        is_stopping: Arc<AtomicBool>,
    ) -> Self {
        StoreEnvironment {
            policy,
            store,
            networks,
            is_stopping,
            faults: LogThrottle::default(),
            friends: None,
        }
    }

    /// Makes hellos carry a digest of `key`, and calls `observer` for each digest in a neighbour's
    /// hello.
    pub fn with_friends(self, key: NodeKey, observer: DigestObserver) -> Self {
        StoreEnvironment { friends: Some((key, observer)), ..self }
    }
}

impl Environment for StoreEnvironment {
    fn is_lan(&self, address: SocketAddr) -> bool {
        self.policy.datagram_scope(address) == Some(Scope::Lan)
    }

    fn is_answered(&self, address: SocketAddr) -> bool {
        !self.is_stopping.load(Ordering::Relaxed) && self.policy.datagram_scope(address).is_some()
    }

    fn digest(&self, instance: &[u8; 8]) -> Option<HelloDigest> {
        self.friends.as_ref().map(|(key, _)| key.digest(instance))
    }

    fn record_digest(&mut self, instance: &[u8; 8], digest: &HelloDigest, http: SocketAddr) {
        if let Some((_, observer)) = &mut self.friends {
            observer(instance, digest, http);
        }
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.networks.is_own(ip)
    }

    fn query_held_paths(
        &mut self,
        hash_parts: &[HashPart],
        asker: SocketAddr,
    ) -> Option<Vec<bool>> {
        let scope = self.policy.datagram_scope(asker).filter(|scope| self.policy.serves(*scope));
        let Some(scope) = scope else { return Some(vec![false; hash_parts.len()]) };
        match self.store.path_infos_quickly(hash_parts) {
            Ok(infos) => {
                let is_held = |info: &Arc<PathInfo>| self.policy.allows_now(scope, info);
                Some(infos.iter().map(|info| info.as_ref().is_some_and(is_held)).collect())
            }
            Err(e) => {
                if self.faults.allow(Instant::now()) {
                    log::error!("{e}");
                }
                None
            }
        }
    }
}
