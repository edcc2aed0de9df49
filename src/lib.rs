//! peerix lets Nix on one machine fetch store paths from the Nix stores of other machines.
//!
//! ```text
//!                               ┌─> store: this machine's Nix database and files
//! Nix, peers ─> http ─> access ─┤
//!                               └─> lookup, fetch ─> peers ─┬─ UDP ──> lan: who has the path?
//!                                                           └─ HTTP ─> http of a peer
//! ```
//!
//! `access` decides whether a client may have a path. Requests of this machine's Nix go to `lookup`
//! and `fetch`. Requests of peers get paths of `store` and NARs that `fetch` has on disk.
//!
//! Invariants:
//!
//! * a peer's request never causes a request to a peer;
//! * data from the network reaches SQLite and the file system only as a typed [`nix::HashPart`];
//! * peerix never writes to the Nix store or its database;
//! * every wait has a deadline;
//! * writing a log line blocks no thread;
//! * every channel that the network can fill is bounded.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod access;
pub mod backoff;
pub mod bounded_map;
pub mod cli;
pub mod commands;
pub mod config;
pub mod connect_rate;
pub mod daemon;
pub mod degraded;
pub mod fetch;
pub mod fnmatch;
pub mod friends;
pub mod http;
pub mod http_client;
pub mod identity;
pub mod key_file;
pub mod lan;
pub mod lock;
pub mod log_throttle;
pub mod lookup;
pub mod network;
pub mod nix;
pub mod peers;
pub mod port_mapper;
pub mod publish;
pub mod resolver;
pub mod round_trip;
pub mod service;
pub mod sockets;
pub mod stats;
pub mod status;
pub mod store;
pub mod suspend;
pub mod time_scale;
pub mod trust;
pub mod upload_limit;
pub mod upstream;
pub mod wire;
