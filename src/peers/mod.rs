//! The other nodes: who they are, which of them has a path, and what they serve.

pub mod announce;
mod asks;
pub mod client;
mod decoder;
pub mod discovery;
mod known;
mod names;
mod queries;
pub mod standing;
pub mod tracker;
pub mod wan;

pub use asks::Told;
pub use known::Neighbour;
pub use queries::Tally;

use std::net::SocketAddr;

/// A peer that said it has a path, and where.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Holder {
    /// The peer's HTTP server.
    pub http: SocketAddr,
    /// Its narinfo of the path, relative to the root of that server.
    pub url_path: String,
}
