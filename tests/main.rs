//! End-to-end tests. Most of them run peerix on hosts made of namespaces: see [`common`].
//!
//! `make test` runs all of them, `make test ONLY=bounds` those whose name contains `bounds`.

mod common;

mod bad_day;
mod bounds;
mod changing_lan;
mod cli;
mod compression;
mod counters;
mod crowded_lan;
mod crowds;
mod doctor;
mod faults;
mod friends;
mod harness;
mod hostile;
mod https;
mod lan;
mod layout;
mod manual;
mod misses;
mod module;
mod networks;
mod odd_neighbours;
mod odd_paths;
mod original;
mod page;
mod port_mapping;
mod routes;
mod sharing;
mod sources;
mod store_states;
mod tracker;
mod tracker_lasts;
mod unprivileged;
mod wan;
mod wan_faults;
mod which_networks;
mod why;
