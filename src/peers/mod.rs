//! Other nodes: which of them are reachable, which of them have a path, and the requests to them.

pub mod announce;
pub mod client;
mod concurrency_limit;
mod discovery_lookup;
mod friend_transport;
pub mod friends;
pub mod health;
pub mod lan;
mod neighbour_requests;
pub mod pace;
pub mod picker;
mod read_timeout;
pub mod rendezvous;
pub mod request_pool;
pub mod saved_paces;
#[cfg(test)]
pub mod test_server;
pub mod tracker;
pub mod wan;
mod zstd_reader;
