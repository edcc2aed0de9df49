//! peerix: Nix on one machine fetches store paths from the Nix stores of the other machines.
//!
//! ```text
//! Nix (or a peer) ─> http ─> route ─┬─> narinfo ─┐            ┌─> store   this machine's Nix database and files
//!                                   ├─> nar ─────┼─> lookup ──┤
//!                                   └─> listing  │            └─> peers ──UDP──> LAN       who has it?
//!                                                │                  │
//!                                  share: may this asker have it?   └──HTTP─> a peer's http, which only ever asks its own store
//! ```
//!
//! What always holds:
//!
//! * a peer's request never causes a request to a peer;
//! * nothing from the network reaches SQLite or the file system before it is a typed
//!   [`nix::HashPart`];
//! * peerix never writes to the Nix store or its database;
//! * every wait has a deadline;
//! * no channel that the network can fill is unbounded.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod access;
pub mod backoff;
pub mod cli;
pub mod commands;
pub mod config;
pub mod connect_rate;
pub mod daemon;
pub mod deferred;
pub mod degraded;
pub mod fetch;
pub mod fnmatch;
pub mod friends;
pub mod http;
pub mod http_client;
pub mod identity;
pub mod key_file;
pub mod lan;
pub mod log_throttle;
pub mod lookup;
pub mod network;
pub mod nix;
pub mod peers;
pub mod port_mapper;
pub mod publish;
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
