//! The `peerix` program: parses the command line, then runs the daemon or a command.
#![forbid(unsafe_code)]

use peerix::cli::{self, Command};
use peerix::{commands, daemon, service, sockets};
use std::process::ExitCode;

/// Exit status for an invalid command line.
const EXIT_USAGE: u8 = 2;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let config = match cli::parse(args.clone(), |name| std::env::var_os(name)) {
        Ok(Command::Run(config)) => config,
        Ok(Command::Ask(ask)) => return ExitCode::from(commands::run(&ask)),
        Ok(Command::Help) => {
            print!("{}", cli::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("peerix {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(e) if sockets::are_passed() => {
            service::log_to_stderr(false);
            return ended(daemon::run_without_flags(&cli::salvage(&args), &e));
        }
        Err(e) => {
            eprintln!("peerix: {e}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    service::log_to_stderr(config.verbose);
    ended(daemon::run(*config))
}

fn ended(result: Result<(), daemon::FatalError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("peerix: {e}");
            ExitCode::FAILURE
        }
    }
}
