//! The LAN: which peers there are, and which of them has a path (docs/protocol.md).
//!
//! [`discovery`] decides, without I/O. [`DiscoveryThread`] runs it on its sockets, and
//! [`DiscoveryClient`] is what other threads see of it.

mod budget;
pub mod discovery;
mod environment;
mod lookups;
mod peer_table;
mod round_trip;
#[cfg(test)]
mod simulation;
mod sockets;
mod thread;

pub use discovery::{Discovery, DiscoverySettings, Event, LookupRequest, RandomSource};
pub use environment::{DigestObserver, Environment, StoreEnvironment};
pub use lookups::{LOOKUP_TIMEOUT, LookupId, LookupUpdate, MAX_HOLDERS};
pub use peer_table::{MetBy, Neighbour};
pub use thread::{DiscoveryClient, DiscoveryThread};

use std::net::SocketAddr;

/// A peer that says that it has a path, and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The peer's HTTP server.
    pub http: SocketAddr,
    /// Its narinfo of the path, relative to the root of that server.
    pub url_path: String,
}
