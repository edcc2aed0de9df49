//! The HTTP server: connections and their bounds ([`server`]), what a request asks for ([`route`]),
//! and one module per kind of answer, put together in [`handler`].
//!
//! tiny_http begins the heads of answers; the connections are ours: docs/dependencies.md tells why.

mod admission;
pub mod body;
mod connections;
pub mod crowd;
mod encoding;
mod event_loop;
pub mod handler;
mod handshakes;
mod head;
pub mod metrics;
pub mod miss_handler;
mod nar;
pub mod narinfo;
mod origin;
mod range;
mod response;
pub mod route;
pub mod server;
mod status;
mod stream;
pub mod stream_limits;

pub use head::Request;
pub use response::{Exchange, ShortResponse};
pub use stream::AuthenticatedKey;
