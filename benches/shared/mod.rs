//! Code shared by the benchmarks: hosts, clients, costs, command-line flags, and the table of
//! results.

// Each benchmark uses only a part of this module.
#![allow(dead_code)]

pub mod client;
pub mod cost;
pub mod options;
pub mod scene;
pub mod table;
