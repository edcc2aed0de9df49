//! The other nodes: who they are, which of them has a path, and what they serve.

pub mod announce;
pub mod client;
mod friend_transport;
pub mod friends;
pub mod health;
pub mod lan;
pub mod meeting;
mod neighbour_requests;
pub mod pace;
pub mod picker;
mod read_timeout;
pub mod request_pool;
mod resolver;
pub mod saved_paces;
pub mod tracker;
pub mod wan;
mod zstd_reader;
