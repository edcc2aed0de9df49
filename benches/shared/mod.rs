//! What the benchmarks have in common: hosts, clients, costs, and the table that the figures end up
//! in.

// Each of them uses a part of this.
#![allow(dead_code)]

pub mod client;
pub mod cost;
pub mod options;
pub mod scene;
pub mod table;
