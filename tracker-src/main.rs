//! `peerix-tracker`: where peers on different networks find one another. Read the command line, log, run.
//!
//! ```text
//! node ──HTTP──> api ─┬─> limits   how often may this address ask?
//!                     ├─> table ──> slices   who is here, and who may have a path: in memory
//!                     ├─> reach    is the one who asks reached from here?
//!                     └─> ledger ─> books    whose is an ID, who transferred what: in SQLite
//! ```
//!
//! What always holds: what was answered with 200 and has to last survives `kill -9`; nothing is stored for a request that
//! is refused; a wrong signature changes nothing; everything that a stranger can fill has a bound.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod address;
mod api;
mod books;
mod cli;
mod ledger;
mod limits;
mod meeting;
mod metrics;
mod reach;
mod run;
mod slices;
mod table;

use cli::Command;
use peerix::service;
use std::process::ExitCode;

/// A wrong command line.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let options = match cli::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => options,
        Ok(Command::Help) => {
            print!("{}", cli::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
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
