//! Encoding and parsing of the formats that nodes and trackers exchange. No I/O happens here.

pub mod filter;
mod node_key;
mod packet;
pub mod port_mapping;
pub mod relay;
pub mod tracker;
mod tracker_name;

pub use node_key::{HelloDigest, NodeKey};
pub use packet::{AnswerBits, HashParts, Hello, MAX_BATCH, Packet};
pub use tracker_name::TrackerName;
