//! The HTTP server. [`server`] accepts connections and enforces their limits, [`route`] maps
//! requests to resources, [`handler`] decides the response, and one module per kind of response
//! writes it.
//!
//! tiny_http formats the heads of responses; peerix manages the connections itself
//! (docs/dependencies.md).

mod admission;
pub mod binary_cache;
pub mod body;
mod connections;
pub mod crowd;
mod encoding;
mod error;
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
mod send_progress;
pub mod server;
mod status;
mod stream;
pub mod stream_limits;

pub use head::Request;
pub use response::{Exchange, ShortResponse};
pub use stream::AuthenticatedKey;
