//! What discovery needs of the rest of the daemon.

use crate::network::Networks;
use crate::nix::HashPart;
use crate::seldom::Seldom;
use crate::share::{Scope, Share};
use crate::store::Store;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Whether this node would serve a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// The asker may have it.
    Held,
    /// It is not there, or the asker may not have it.
    Absent,
    /// This node cannot tell now. It answers nothing then: *no* would be remembered for an hour.
    Unknown,
}

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
    /// Whether this node would serve the path to that asker. Blocks for 50 ms at most.
    fn presence(&mut self, hash_part: &HashPart, asker: SocketAddr) -> Presence;
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

    fn presence(&mut self, hash_part: &HashPart, asker: SocketAddr) -> Presence {
        let Some(scope) = self.share.datagram_scope(asker) else { return Presence::Absent };
        match self.store.path_info_quickly(hash_part) {
            Ok(Some(info)) if self.share.may_have_now(scope, &info) => Presence::Held,
            Ok(_) => Presence::Absent,
            Err(e) => {
                if self.faults.now(Instant::now()) {
                    log::error!("{e}");
                }
                Presence::Unknown
            }
        }
    }
}
