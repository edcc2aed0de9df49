//! `peerix-tracker`: tells nodes on different networks of one another. This file parses the command
//! line, starts the log and runs the tracker.
//!
//! ```text
//! node ──HTTP──> api ─┬─> limits         rate limits of each address
//!                     ├─> table ───────> bloom_index   live peers and their filters, in memory
//!                     ├─> meeting        addresses of friends, in memory
//!                     ├─> reachability   connections to announced addresses
//!                     └─> db_thread ───> database      bound IDs, reputations, in SQLite
//! ```
//!
//! Invariants: a change that was answered with 200 and has to last survives `kill -9`; a refused
//! request stores nothing; a wrong signature changes nothing; all tables that strangers can fill
//! are bounded.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod api;
mod bloom_index;
mod cli;
mod clock;
mod database;
mod db_thread;
mod limits;
mod meeting;
mod metrics;
mod reachability;
mod reputation;
mod run;
mod table;

use cli::TrackerCommand;
use peerix::service;
use std::process::ExitCode;

/// Exit status for a wrong command line.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match cli::parse(std::env::args_os().skip(1)) {
        Ok(TrackerCommand::Run(options)) => options,
        Ok(TrackerCommand::Help) => {
            print!("{}", cli::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(TrackerCommand::Version) => {
            println!("peerix-tracker {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(e) => {
            eprintln!("peerix-tracker: {e}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    service::log_to_stderr(options.verbose);
    match run::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("peerix-tracker: {e}");
            ExitCode::FAILURE
        }
    }
}
