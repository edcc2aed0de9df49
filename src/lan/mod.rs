//! Discovery of peers on the LAN, and of the peers that have a path (docs/protocol.md).
//!
//! [`Discovery`] is a state machine without I/O. [`DiscoveryThread`] runs it on its sockets. Other
//! threads use it through [`DiscoveryClient`].
//!
//! # Two clocks
//!
//! Waits are measured in *lookup time*, called `t`. While lookups are open, each turn of the event
//! loop adds at most 100 ms to it, so that a pause of this machine does not count against peers.
//! Hellos and probes use real time, called `now`.

mod broadcasts;
mod budget;
mod discovery;
mod environment;
mod hellos;
mod liveness;
mod lookups;
mod outgoing;
mod overdue;
mod peer;
mod peer_table;
mod querier;
mod sent_queries;
#[cfg(test)]
mod simulation;
mod sockets;
mod thread;

pub use discovery::{Discovery, DiscoverySettings, Event};
pub use environment::{DigestObserver, Environment, StoreEnvironment};
pub use lookups::{Holder, LOOKUP_TIMEOUT, LookupId, LookupRequest, LookupUpdate, MAX_HOLDERS};
pub use peer::{MetBy, Neighbour};
pub use querier::RandomSource;
pub use thread::{DiscoveryClient, DiscoveryThread};
