//! What discovery needs of the rest of the daemon.

use crate::network::Networks;
use crate::nix::{HashPart, PathInfo};
use crate::seldom::Seldom;
use crate::share::{Scope, Share};
use crate::store::Store;
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
    /// Whether a query from this address is answered. Other packets from it are dropped if it is not on the LAN.
    fn is_answered(&self, address: SocketAddr) -> bool;
    /// Whether this is an address of this machine.
    fn is_own(&self, ip: IpAddr) -> bool;
    /// Whether this node would serve each of the paths to that asker, in their order. `None` if it cannot tell now: it
    /// answers nothing then, as *no* would be remembered for an hour. Blocks for 50 ms at most.
    fn held(&mut self, hash_parts: &[HashPart], asker: SocketAddr) -> Option<Vec<bool>>;
}

/// The real one: the store of this machine, and what is shared of it.
pub struct StoreEnvironment {
    share: Arc<Share>,
    store: Arc<Store>,
    networks: Arc<Networks>,
    /// Set while the daemon stops: it answers no queries then. *No* would be wrong after a restart.
    leaving: Arc<AtomicBool>,
    faults: Seldom,
}

impl StoreEnvironment {
    /// The parts it works with. No query is answered once `leaving` is set.
    pub fn new(share: Arc<Share>, store: Arc<Store>, networks: Arc<Networks>, leaving: Arc<AtomicBool>) -> Self {
        StoreEnvironment { share, store, networks, leaving, faults: Seldom::default() }
    }
}

impl Environment for StoreEnvironment {
    fn is_lan(&self, address: SocketAddr) -> bool {
        self.share.datagram_scope(address) == Some(Scope::Lan)
    }

    fn has_lan(&self) -> bool {
        self.share.serves(Scope::Lan)
    }

    fn is_answered(&self, address: SocketAddr) -> bool {
        !self.leaving.load(Ordering::Relaxed) && self.share.datagram_scope(address).is_some()
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.networks.is_own(ip)
    }

    fn held(&mut self, hash_parts: &[HashPart], asker: SocketAddr) -> Option<Vec<bool>> {
        let Some(scope) = self.share.datagram_scope(asker) else { return Some(vec![false; hash_parts.len()]) };
        match self.store.path_infos_quickly(hash_parts) {
            Ok(infos) => {
                let is_held = |info: &Arc<PathInfo>| self.share.may_have_now(scope, info);
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
