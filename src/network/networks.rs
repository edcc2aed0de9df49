//! The LAN networks as last read from the kernel, shared by all threads.

use super::interfaces::{self, InterfaceAddress};
use super::lan::LanNetworks;
use super::policy::NetworkPolicy;
use crate::lock::RwLock;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The LAN networks as last read from the kernel, shared by all threads. The discovery thread's
/// [`NetworkWatcher`](super::NetworkWatcher) keeps them up to date.
pub struct Networks {
    policy: NetworkPolicy,
    latest: RwLock<Arc<LanNetworks>>,
    changes: AtomicU64,
}

impl Networks {
    /// Reads the addresses of this machine. On an error it logs the reason and continues without
    /// addresses: then no address is LAN and nothing is shared with the LAN. Blocks as long as
    /// [`interfaces::read`].
    pub fn read(policy: NetworkPolicy) -> Self {
        let interfaces = interfaces::read().unwrap_or_else(|e| {
            log::error!("network interfaces: {e}");
            Vec::new()
        });
        Self::new(policy, interfaces)
    }

    /// Creates the networks from a given list of addresses.
    pub fn new(policy: NetworkPolicy, interfaces: Vec<InterfaceAddress>) -> Self {
        let networks = Arc::new(LanNetworks::new(policy.clone(), interfaces));
        Networks { policy, latest: RwLock::new(networks), changes: AtomicU64::new(0) }
    }

    /// The networks as last read.
    pub fn current(&self) -> Arc<LanNetworks> {
        self.latest.read().clone()
    }

    /// Replaces the addresses of this machine. Returns whether the interfaces in use or their
    /// addresses changed. Changes of excluded interfaces do not count, because containers cause
    /// many of them.
    pub fn replace(&self, interfaces: Vec<InterfaceAddress>) -> bool {
        let before = self.current();
        if before.interfaces() == interfaces {
            return false;
        }
        let after = Arc::new(LanNetworks::new(self.policy.clone(), interfaces));
        let allowed = |networks: &LanNetworks| -> Vec<InterfaceAddress> {
            let is_allowed =
                |interface: &&InterfaceAddress| self.policy.allows_interface(&interface.name);
            networks.interfaces().iter().filter(is_allowed).cloned().collect()
        };
        let has_changed = allowed(&before) != allowed(&after);
        *self.latest.write() = after;
        self.changes.fetch_add(u64::from(has_changed), Ordering::Relaxed);
        has_changed
    }

    /// Number of changes so far of the interfaces in use or their addresses.
    pub fn count_changes(&self) -> u64 {
        self.changes.load(Ordering::Relaxed)
    }

    /// Whether a node at this address is on the LAN; see [`LanNetworks::is_lan`].
    pub fn is_lan(&self, address: SocketAddr) -> bool {
        self.current().is_lan(address)
    }

    /// Whether `ip` is an address of this machine, on any interface, or a loopback address.
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.current().is_own(ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replace_with_equal_addresses_is_no_change() {
        let eth0 = InterfaceAddress {
            name: "eth0".into(),
            index: 2,
            address: "192.168.10.5".parse().unwrap(),
            prefix_len: 24,
            broadcast: None,
            running: true,
        };
        let networks = Networks::new(NetworkPolicy::default(), vec![eth0.clone()]);
        let neighbour: SocketAddr = "192.168.10.7:1".parse().unwrap();
        assert!(networks.is_lan(neighbour));
        assert!(!networks.replace(vec![eth0.clone()]));
        assert!(networks.replace(vec![InterfaceAddress { running: false, ..eth0 }]));
        assert!(networks.replace(Vec::new()));
        assert_eq!(networks.count_changes(), 2);
        assert!(!networks.is_lan(neighbour) && !networks.is_own("192.168.10.5".parse().unwrap()));
    }
}
