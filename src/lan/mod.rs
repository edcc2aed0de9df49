//! Discovery of peers on the LAN, and of the peers that have a path (docs/protocol.md).
//!
//! [`discovery`] is a state machine without I/O. [`DiscoveryThread`] runs it on its sockets. Other
//! threads use it through [`DiscoveryClient`].

mod budget;
pub mod discovery;
mod environment;
mod lookups;
mod peer_table;
#[cfg(test)]
mod simulation;
mod sockets;
mod thread;

pub use discovery::{Discovery, DiscoverySettings, Event, LookupRequest, RandomSource};
pub use environment::{DigestObserver, Environment, StoreEnvironment};
pub use lookups::{LOOKUP_TIMEOUT, LookupId, LookupUpdate, MAX_HOLDERS};
pub use peer_table::{MetBy, Neighbour};
pub use thread::{DiscoveryClient, DiscoveryThread};

use crate::nix::HashPart;
use std::net::SocketAddr;

/// A peer that says that it has a path, and where its narinfo of the path is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// Address of the peer's HTTP server.
    pub http: SocketAddr,
    /// URL path of the narinfo, relative to the root of that server.
    pub url_path: String,
}

impl Holder {
    /// A peerix, which serves the narinfos of its own store under `local/`.
    pub fn peerix(http: SocketAddr, hash_part: &HashPart) -> Holder {
        Holder { http, url_path: format!("local/{hash_part}.narinfo") }
    }
}
