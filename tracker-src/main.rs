//! `peerix-tracker`: where peers on different networks find one another. Read the command line,
//! log, run.
//!
//! ```text
//! node ──HTTP──> api ─┬─> limits   how often may this address ask?
//!                     ├─> table ──> slices   who is here, and who may have a path: in memory
//!                     ├─> reach    is the one who asks reached from here?
//!                     └─> ledger ─> books    whose is an ID, who transferred what: in SQLite
//! ```
//!
//! What always holds: what was answered with 200 and has to last survives `kill -9`; nothing is
//! stored for a request that is refused; a wrong signature changes nothing; everything that a
//! stranger can fill has a bound.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod api;
mod bloom_index;
mod cli;
mod database;
mod db_thread;
mod limits;
mod meeting;
mod metrics;
mod reachability;
mod run;
mod table;

use cli::TrackerCommand;
use peerix::service;
use std::process::ExitCode;

/// A wrong command line.
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
