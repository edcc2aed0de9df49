//! The HTTP server: connections and their bounds ([`server`]), what a request asks for ([`route`]), and one module
//! per kind of answer, put together in [`cache`].
//!
//! tiny_http begins the heads of answers; the connections are ours: docs/dependencies.md tells why.

pub mod body;
mod browser;
pub mod cache;
mod connections;
pub mod crowd;
mod encoding;
mod handshakes;
mod head;
pub mod metrics;
pub mod misses;
mod nar;
pub mod narinfo;
pub mod permits;
mod range;
mod response;
mod room;
pub mod route;
pub mod server;
mod status;
mod stream;
mod watch;

pub use head::Request;
pub use response::{Answer, Exchange};
pub use stream::PeerKey;
