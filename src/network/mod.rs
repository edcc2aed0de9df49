//! The networks of this machine, and which of them are LAN.
//!
//! [`LanNetworks`] decides which addresses are LAN: where broadcasts go, and, apart from peers that
//! `--peer` names, whose datagrams are answered and which addresses have the scope LAN. It applies
//! the user's [`NetworkPolicy`] (`--lan`, `--interface`) to the addresses that the kernel reports
//! ([`interfaces`]). [`Networks`] shares the result between threads. A [`NetworkWatcher`] updates
//! it when the kernel reports a change. [`neighbours`] reads which machines on these networks the
//! kernel knows.

pub mod cidr;
pub mod interfaces;
pub mod lan;
pub mod neighbours;
mod netlink;
pub mod networks;
pub mod policy;
pub mod watcher;

pub use cidr::Cidr;
pub use interfaces::InterfaceAddress;
pub use lan::{LanNetworks, MULTICAST_GROUP};
pub use networks::Networks;
pub use policy::NetworkPolicy;
pub use watcher::{ChangeMonitor, NetworkWatcher};
