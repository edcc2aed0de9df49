//! Parses the command line of `peerix-tracker`.

use lexopt::prelude::*;
use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::PathBuf;

/// Text that `--help` prints.
pub const HELP: &str = "\
peerix-tracker tells nodes of peerix on different networks of one another: who is there, and
who may have a store path. Paths go from node to node, never through the tracker.

Usage: peerix-tracker [OPTIONS]

  --port N                 TCP port                                     [default: 12305]
  --host ADDR              address or name of this machine to listen on, repeatable;
                           [::] adds IPv6                             [default: 0.0.0.0]
  --db-path FILE           database of peer IDs, transfers and reputation, made if there
                           is none; that of the Python tracker is taken over
                                                         [default: ./peerix-tracker.db]
  --filter-memory MIB      memory for the filters of peers, from 16; nodes are told to make
                           smaller ones when it is half used               [default: 1024]
  --proxy ADDR             address of a reverse proxy in front of the tracker, repeatable:
                           the last address in its X-Forwarded-For is the client's
  -v, --verbose            log what each request does; RUST_LOG is read as well
  -h, --help
  -V, --version

Nodes use it with

  peerix --mode both --tracker-url http://<this machine>:12305

GET /health says whether all is well, GET /metrics has numbers for Prometheus. Everyone who
reaches the port can use the tracker; what nodes then give to whom is their own decision.

Exit status: 0 when stopped by SIGTERM or SIGINT, 1 when it cannot start or go on,
2 for a wrong command line.
";

/// Default memory for filters in MiB: 20,000 peers with 20,000 paths of 20 bits.
const DEFAULT_FILTER_MIB: usize = 1024;
/// Minimum memory for filters in MiB: one block of the largest size that blocks have (8 MiB), and
/// some small ones. Less is refused.
const MIN_FILTER_MIB: usize = 16;
/// Maximum memory for filters in MiB, 1 TiB. More is refused.
const MAX_FILTER_MIB: usize = 1 << 20;

/// The settings of the tracker.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// TCP port. Defaults to 12305. With 0, the system chooses a free port, which the log names.
    pub port: u16,
    /// Addresses to listen on. Defaults to `0.0.0.0`.
    pub hosts: Vec<IpAddr>,
    /// Path of the SQLite database. Defaults to `./peerix-tracker.db`.
    pub db_path: PathBuf,
    /// Memory limit for the filters of peers in bytes. Defaults to 1 GiB.
    pub filter_memory: usize,
    /// Trusted reverse proxies, which report the client's address. Defaults to none.
    pub proxies: Vec<IpAddr>,
    /// Whether to log each request. Defaults to false.
    pub verbose: bool,
}

impl Default for Options {
    fn default() -> Self {
        let hosts = vec![Ipv4Addr::UNSPECIFIED.into()];
        let (filter_memory, proxies) = (DEFAULT_FILTER_MIB << 20, Vec::new());
        Options {
            port: 12305,
            hosts,
            db_path: "./peerix-tracker.db".into(),
            filter_memory,
            proxies,
            verbose: false,
        }
    }
}

/// What the command line requests.
#[derive(Debug)]
pub enum TrackerCommand {
    /// Run the tracker.
    Run(Options),
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
}

/// Parses the arguments after the program's name. Resolves names in `--host`, which may block.
///
/// # Errors
/// Returns one line that names the option and its problem.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<TrackerCommand, String> {
    let mut options = Options::default();
    let mut hosts = Vec::new();
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        let flag = match &arg {
            Short('h') | Long("help") => return Ok(TrackerCommand::Help),
            Short('V') | Long("version") => return Ok(TrackerCommand::Version),
            Short('v') | Long("verbose") => {
                options.verbose = true;
                continue;
            }
            Long(name) => name.to_string(),
            Short(_) | Value(_) => return Err(format!("{}; see --help", arg.unexpected())),
        };
        let mut value = || parser.value().map_err(|_| format!("--{flag}: needs a value"));
        match flag.as_str() {
            "port" => {
                let port = value()?;
                let number = port.to_str().and_then(|port| port.parse().ok());
                options.port = number.ok_or_else(|| {
                    format!(
                        "--port {}: not a number from 0 to {}",
                        port.to_string_lossy(),
                        u16::MAX
                    )
                })?;
            }
            "host" => hosts.extend(addresses(&value()?)?),
            "db-path" => options.db_path = value()?.into(),
            "filter-memory" => {
                let text = value()?;
                let mib = text.to_str().and_then(|mib| mib.parse().ok());
                let (min, max) = (MIN_FILTER_MIB, MAX_FILTER_MIB);
                let mib = mib.filter(|mib| (min..=max).contains(mib)).ok_or_else(|| {
                    let text = text.to_string_lossy();
                    format!("--filter-memory {text}: not a number from {min} to {max}")
                })?;
                options.filter_memory = mib << 20;
            }
            "proxy" => {
                let text = value()?;
                let ip = text.to_str().and_then(|ip| ip.parse::<IpAddr>().ok());
                let ip = ip.ok_or_else(|| {
                    format!("--proxy {}: not an IP address", text.to_string_lossy())
                })?;
                options.proxies.push(ip.to_canonical());
            }
            _ => return Err(format!("--{flag}: no such option; see --help")),
        }
    }
    if !hosts.is_empty() {
        options.hosts = hosts;
    }
    Ok(TrackerCommand::Run(options))
}

fn addresses(host: &OsString) -> Result<Vec<IpAddr>, String> {
    let wrong = |why: &str| format!("--host {}: {why}", host.to_string_lossy());
    let text = host.to_str().ok_or_else(|| wrong("not UTF-8"))?;
    let bare = text.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(text);
    let found = (bare, 0)
        .to_socket_addrs()
        .map_err(|e| wrong(&format!("not an address of this machine: {e}")))?;
    let mut all: Vec<IpAddr> = found.map(|address| address.ip()).collect();
    all.dedup();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Options, String> {
        match parse(args.iter().map(OsString::from))? {
            TrackerCommand::Run(options) => Ok(options),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn parse_of_original_and_new_options_succeeds() {
        assert_eq!(run(&[]).unwrap(), Options::default());
        let options =
            run(&["--verbose", "--port", "1", "--host", "127.0.0.1", "--db-path", "/x"]).unwrap();
        let hosts = vec!["127.0.0.1".parse().unwrap()];
        assert_eq!(
            options,
            Options { port: 1, hosts, db_path: "/x".into(), verbose: true, ..Options::default() }
        );
        let options =
            run(&["--filter-memory", "64", "--proxy", "::ffff:10.0.0.1", "--proxy=fd00::1"])
                .unwrap();
        assert_eq!(options.filter_memory, 64 << 20);
        assert_eq!(
            options.proxies,
            ["10.0.0.1", "fd00::1"].map(|ip| ip.parse::<IpAddr>().unwrap())
        );
        assert_eq!(run(&["--host", "[::]", "--host=0.0.0.0"]).unwrap().hosts.len(), 2);
        assert!(run(&["--host", "localhost"]).unwrap().hosts.iter().all(IpAddr::is_loopback));
    }

    #[test]
    fn parse_of_wrong_option_fails_with_one_line_naming_it() {
        for (args, names) in [
            (&["--prot", "1"][..], "--prot"),
            (&["--port"], "--port"),
            (&["--port", "65536"], "--port 65536"),
            (&["--port", "-1"], "--port -1"),
            (&["--host", "a b"], "--host a b"),
            (&["--db-path"], "--db-path"),
            (&["--filter-memory", "15"], "--filter-memory 15"),
            (&["--filter-memory", "x"], "--filter-memory x"),
            (&["--proxy", "proxy.example"], "--proxy proxy.example"),
            (&["--verbose=yes"], "--verbose"),
            (&["extra"], "extra"),
            (&["-x"], "-x"),
        ] {
            let error = run(args).unwrap_err();
            assert!(error.contains(names) && !error.contains('\n'), "{args:?}: {error}");
        }
    }

    #[test]
    fn help_names_every_flag() {
        for flag in
            ["port", "host", "db-path", "filter-memory", "proxy", "verbose", "help", "version"]
        {
            assert!(
                HELP.contains(&format!("--{flag} ")) || HELP.contains(&format!("--{flag}\n")),
                "{flag}"
            );
        }
        assert!(matches!(parse(["-h".into()]), Ok(TrackerCommand::Help)));
        assert!(matches!(parse(["--version".into()]), Ok(TrackerCommand::Version)));
    }
}
