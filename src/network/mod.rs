//! The networks of this machine, and which of them are LAN.
//!
//! One rule, [`LanNetworks`], decides where broadcasts go, whose datagrams are answered, and which
//! addresses have the scope LAN. It applies the user's [`NetworkPolicy`] (`--lan`, `--interface`)
//! to the addresses that the kernel reports ([`interfaces`]). [`Networks`] shares the outcome
//! between threads.

pub mod cidr;
pub mod interfaces;
pub mod lan;
pub mod policy;

pub use cidr::Cidr;
pub use interfaces::Interface;
pub use lan::{LanNetworks, MULTICAST_GROUP};
pub use policy::NetworkPolicy;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

/// The LAN networks as last read from the kernel, shared by all threads.
pub struct Networks {
    policy: NetworkPolicy,
    latest: RwLock<Latest>,
}

struct Latest {
    networks: Arc<LanNetworks>,
    generation: u64,
}

impl Networks {
    /// Reads the addresses of this machine. If the kernel does not list them, the reason is logged
    /// and there are none until [`Networks::refresh`] succeeds: then no address is LAN, and
    /// nothing is shared with the LAN.
    pub fn read(policy: NetworkPolicy) -> Self {
        let interfaces = interfaces::read().unwrap_or_else(|e| {
            log::error!("network interfaces: {e}");
            Vec::new()
        });
        Self::new(policy, interfaces)
    }

    /// Networks from a given list of addresses.
    pub fn new(policy: NetworkPolicy, interfaces: Vec<Interface>) -> Self {
        let networks = Arc::new(LanNetworks::new(policy.clone(), interfaces));
        Networks { policy, latest: RwLock::new(Latest { networks, generation: 0 }) }
    }

    /// The networks as last read.
    pub fn current(&self) -> Arc<LanNetworks> {
        self.with(|latest| latest.networks.clone())
    }

    /// Number of changes seen so far. A thread that acts on changes compares it with the number it
    /// last acted on, because another thread may have been the one that refreshed.
    pub fn generation(&self) -> u64 {
        self.with(|latest| latest.generation)
    }

    /// Reads the addresses of this machine again.
    ///
    /// # Errors
    /// The kernel does not list them. What was read before stays.
    pub fn refresh(&self) -> io::Result<()> {
        self.replace(interfaces::read()?);
        Ok(())
    }

    fn replace(&self, interfaces: Vec<Interface>) {
        if self.with(|latest| latest.networks.interfaces() == interfaces) {
            return;
        }
        let networks = Arc::new(LanNetworks::new(self.policy.clone(), interfaces));
        let mut latest = self.latest.write().unwrap_or_else(PoisonError::into_inner);
        let generation = latest.generation + 1;
        *latest = Latest { networks, generation };
    }

    /// Whether a node at this address is on the LAN; see [`LanNetworks::is_lan`].
    pub fn is_lan(&self, address: SocketAddr) -> bool {
        self.with(|latest| latest.networks.is_lan(address))
    }

    /// Whether `ip` is an address of this machine, on whatever interface.
    pub fn is_own(&self, ip: IpAddr) -> bool {
        self.with(|latest| latest.networks.is_own(ip))
    }

    fn with<T>(&self, read: impl FnOnce(&Latest) -> T) -> T {
        read(&self.latest.read().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_counts_changes_and_not_readings() {
        let eth0 = Interface {
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
        networks.replace(vec![eth0.clone()]);
        assert_eq!(networks.generation(), 0);
        networks.replace(vec![Interface { running: false, ..eth0 }]);
        assert_eq!(networks.generation(), 1);
        networks.replace(Vec::new());
        assert_eq!(networks.generation(), 2);
        assert!(!networks.is_lan(neighbour) && !networks.is_own("192.168.10.5".parse().unwrap()));
    }
}
