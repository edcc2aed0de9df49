//! Formats that peerix defines. No I/O happens here.

pub mod filter;
mod packet;
pub mod relay;
pub mod tracker;

pub use packet::{Bits, HashParts, Hello, MAX_BATCH, Packet};
