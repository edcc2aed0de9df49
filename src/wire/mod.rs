//! Formats that peerix defines. No I/O happens here.

mod packet;

pub use packet::{Hello, Packet};
