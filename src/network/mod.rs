//! The networks of this machine, and which of them are LAN.
//!
//! One rule, [`LanNetworks`], decides where broadcasts go, whose datagrams are answered, and which
//! addresses have the scope LAN. It applies the user's [`NetworkPolicy`] (`--lan`, `--interface`)
//! to the addresses that the kernel reports ([`interfaces`]). [`Networks`] shares the outcome
//! between threads, and a [`NetworkWatcher`] updates it when the kernel reports a change.
//! [`neighbours`] are the machines that the kernel knows on these networks.

pub mod cidr;
pub mod interfaces;
pub mod lan;
pub mod neighbours;
mod netlink;
pub mod networks;
pub mod policy;
pub mod watcher;

pub use cidr::Cidr;
pub use interfaces::Interface;
pub use lan::{LanNetworks, MULTICAST_GROUP};
pub use networks::Networks;
pub use policy::NetworkPolicy;
pub use watcher::{ChangeMonitor, NetworkWatcher};
