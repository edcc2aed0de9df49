//! Formats that peerix defines. No I/O happens here.

pub mod filter;
mod packet;
pub mod tracker;

pub use packet::{Hello, Packet};
