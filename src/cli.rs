//! Parses the command line of `peerix`. Environment variables replace missing flags:
//! `NIX_SECRET_KEY_FILE` replaces `--private-key`, `STATE_DIRECTORY` replaces `--state-dir`.

use crate::config::{Config, DEFAULT_PORT, MAX_FRIENDS, Mode, parse_host};
use crate::nix::{PublicKey, StoreDir};
use crate::upload_limit::UploadLimit;
use crate::wire::tracker::{MAX_PEER_ID, is_peer_id};
use lexopt::prelude::*;
use std::ffi::OsString;
use std::fmt::Display;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Upper bound of `--timeout`, in milliseconds; a larger value is an error. On a network with
/// Python peers, a miss can take the whole timeout.
const MAX_TIMEOUT_MS: u64 = 10_000;

/// Maximum number of `--filter-patterns`; more are an error. The built-in patterns do not count.
/// Each path that a WAN peer asks for is matched against all patterns, at about 1 µs each.
const MAX_PATTERNS: usize = 128;

/// Maximum length of a name pattern, in bytes; a longer one is an error. A match takes at most as
/// many steps as the product of the lengths of pattern and name. Base names of store paths have at
/// most 244 bytes.
const MAX_PATTERN: usize = 256;

/// Maximum number of `--lan` networks; more are an error. Each address outside the directly
/// connected networks is compared with all of them.
const MAX_LAN_NETWORKS: usize = 64;

/// Maximum number of `--interface` patterns; more are an error. Each interface is compared with all
/// of them whenever the networks of this machine change.
const MAX_INTERFACE_PATTERNS: usize = 64;

/// Text that `--help` prints.
pub const HELP: &str = "\
peerix fetches Nix store paths from the machines around you: it answers Nix on
http://127.0.0.1:12304/ like a binary cache, and asks the other machines that run it.

Usage: peerix [OPTIONS]                    runs the daemon, until SIGTERM or SIGINT
       peerix status|peers|doctor|identity [OPTIONS]
       peerix why PATH [OPTIONS]

Commands ask the daemon that runs on this machine, and change nothing:

  status                   what it does: peers, transfers, totals, the last lookups
  peers                    asks the network now, and lists who answers
  why PATH                 all that decides about a store path: who may have it, who has it,
                           would Nix take it, and does Nix ask
  doctor                   looks for what breaks in practice, and says what mends it
  identity                 prints this machine's key, which its friends give to --friend
  --json                   the same for programs

Options of the daemon. Commands need none but the port, if it is another; they take the
others for a daemon that does not run:

  --port N                 TCP and UDP port                             [default: 12304]
  --bind ADDR              address to listen on, repeatable; [::] adds IPv6.
                           127.0.0.1 is always listened on            [default: 0.0.0.0]
  --lan CIDR               a network that is LAN whatever its addresses, as 100.64.0.0/10
                           (Tailscale); repeatable
  --interface NAME         use only interfaces of that name, or with ! in front, not those;
                           * and ? are wildcards; repeatable   [default: all but those of
                           containers and virtual machines]
  --timeout MS             how long answers to a broadcast are waited for  [default: 50]
  --peer HOST[:PORT]       a node beyond the broadcast domain (VLAN, VPN) to ask, and to
                           share with, like a neighbour; repeatable; name each other
  --private-key FILE       secret key to sign this machine's paths with, as made by
                           nix-store --generate-binary-cache-key  [env: NIX_SECRET_KEY_FILE]
  --trusted-public-key KEY accept from peers what this key signed, beside what the keys of
                           nix.conf signed; repeatable
  --trusted-public-key-file FILE
                           the same with a key, or several, in a file
  --priority N             Priority in nix-cache-info; cache.nixos.org has 40 [default: 20]

  --mode lan|wan|both      where to look for peers                         [default: lan]
  --tracker-url URL        tracker for wan and both, repeatable
  --peer-id ID             name at the tracker               [default: made at first start]
  --announce-addr HOST[:PORT]
                           where others reach this machine [default: as the tracker sees it]
  --no-verify              share with WAN peers also what the upstream cache does not have
  --upstream-cache URL                                [default: https://cache.nixos.org]
  --no-filter              share with WAN peers whatever the name
  --no-default-filters     leave out the built-in name patterns
  --filter-patterns P...   more name patterns to keep from WAN peers

  --friend NAME=ed25519:KEY[@HOST[:PORT]][,sign=NAME:KEY]
                           a machine that may have every path, wherever it is, encrypted; its
                           peerix identity prints the key; repeatable; name each other. What
                           the key after sign= signed is accepted from peers
  --friends-file FILE      more of them, one a line; read again when it changes
  --map-port               have the router let friends in from outside, by PCP or NAT-PMP;
                           only behind the router where it is used first
  --share all|lan|friends|nobody
                           with whom this machine's paths are shared: all that the mode has,
                           not beyond the LAN, only friends, or nobody      [default: all]
  --upload-limit RATE      bytes a second sent to other machines, as 500K or 2M
                                                                        [default: none]

  --metrics ADDR:PORT      serve /metrics and /health there, to anybody who reaches that address
  --root DIR               share the store that `nix --store DIR` uses      [default: /]
  --store-dir DIR                                                  [default: /nix/store]
  --db FILE                Nix's database           [default: /nix/var/nix/db/db.sqlite]
  --state-dir DIR          identity and counters                  [env: STATE_DIRECTORY]
  -v, --verbose            log what each request does; RUST_LOG is read as well
  -h, --help
  -V, --version

To let Nix use it, put this into /etc/nix/nix.conf and restart nix-daemon:

  extra-substituters = http://127.0.0.1:12304

Exit status: 0 when stopped by SIGTERM or SIGINT, 1 when it cannot start or go on,
2 for a wrong command line. Of commands: 0 when all is well (why: when Nix has the path or
would get it from a peer; peers: when one answers), 1 when not, 2 as above, 3 when no daemon
runs (doctor: 1).
";

/// Result of parsing the command line.
#[derive(Debug)]
pub enum Command {
    /// Run the daemon.
    Run(Box<Config>),
    /// Run a command against the running daemon.
    Ask(Box<CommandOptions>),
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
}

/// A subcommand and its options.
#[derive(Debug)]
pub struct CommandOptions {
    /// The subcommand.
    pub subcommand: Subcommand,
    /// Settings from the flags. [`Config::port`] locates the daemon, whose settings replace the
    /// others. Only `identity` uses `state_dir`, and `doctor` uses all if no daemon runs.
    pub config: Config,
    /// Print JSON instead of text.
    pub json: bool,
}

/// A subcommand of `peerix`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subcommand {
    /// Prints the state of the daemon.
    Status,
    /// Queries the network and lists the peers that answer.
    Peers,
    /// Explains whether Nix would get a store path from a peer. Contains the path as the user wrote
    /// it.
    Why(String),
    /// Looks for faults and prints remedies.
    Doctor,
    /// Prints the public key of this machine.
    Identity,
}

impl Subcommand {
    /// The subcommand that `word` names. The path of `why` is empty; a later argument replaces it.
    fn of_word(word: &str) -> Option<Subcommand> {
        match word {
            "status" => Some(Subcommand::Status),
            "peers" => Some(Subcommand::Peers),
            "why" => Some(Subcommand::Why(String::new())),
            "doctor" => Some(Subcommand::Doctor),
            "identity" => Some(Subcommand::Identity),
            _ => None,
        }
    }
}

/// Parses the arguments after the program's name. `env` looks up environment variables.
///
/// # Errors
/// One line that names the flag and what is wrong with it.
pub fn parse(
    args: impl IntoIterator<Item = OsString>,
    env: impl Fn(&str) -> Option<OsString>,
) -> Result<Command, String> {
    let mut args: Vec<OsString> = args.into_iter().collect();
    let mut subcommand = args.first().and_then(|word| Subcommand::of_word(word.to_str()?));
    if subcommand.is_some() {
        args.remove(0);
    }
    let mut builder = ConfigBuilder::default();
    builder.config.flags = args.iter().map(|arg| arg.to_string_lossy().into_owned()).collect();
    let mut json = false;
    let mut parser = lexopt::Parser::from_args(args);
    while let Some(arg) = parser.next().map_err(|e| e.to_string())? {
        match arg {
            Short('h') | Long("help") => return Ok(Command::Help),
            Short('V') | Long("version") => return Ok(Command::Version),
            Short('v') | Long("verbose") => builder.config.verbose = true,
            Long("json") if subcommand.is_some() => json = true,
            Long("map-port") => builder.config.map_port = true,
            Long("no-verify") => builder.config.verify = false,
            Long("no-filter") => builder.config.filter = false,
            Long("no-default-filters") => builder.config.default_filters = false,
            Long(name) => {
                let name = name.to_owned();
                builder.set(Flag { name: &name, parser: &mut parser })?;
            }
            Value(path) if subcommand == Some(Subcommand::Why(String::new())) => {
                subcommand = Some(Subcommand::Why(path.to_string_lossy().into_owned()));
            }
            Short(_) | Value(_) => return Err(format!("{}; see --help", arg.unexpected())),
        }
    }
    let config = builder.into_config(env)?;
    match subcommand {
        None => Ok(Command::Run(Box::new(config))),
        Some(Subcommand::Why(path)) if path.is_empty() => Err("why: needs a store path".into()),
        Some(subcommand) => Ok(Command::Ask(Box::new(CommandOptions { subcommand, config, json }))),
    }
}

/// Reads `--store-dir`, `--priority` and `--port` from a command line that contains an error
/// elsewhere. The daemon needs them to answer `nix-cache-info`, which Nix caches for a week. If one
/// of the three is invalid, all have their defaults.
pub fn salvage(args: &[OsString]) -> Config {
    let mut kept = Vec::new();
    for (at, arg) in args.iter().enumerate() {
        let text = arg.to_string_lossy();
        let is = |flag: &&str| text == **flag || text.starts_with(&format!("{flag}="));
        if ["--store-dir", "--priority", "--port"].iter().any(is) {
            kept.push(arg.clone());
            kept.extend(args.get(at + 1).filter(|_| !text.contains('=')).cloned());
        }
    }
    match parse(kept, |_| None) {
        Ok(Command::Run(config)) => Config { flags: Vec::new(), ..*config },
        _ => Config::default(),
    }
}

/// Configuration under construction while the flags are parsed.
#[derive(Default)]
struct ConfigBuilder {
    config: Config,
    /// Addresses of `--bind`. They replace the default.
    bind: Vec<IpAddr>,
    /// File of `--db`. Its default depends on `--root`.
    db: Option<PathBuf>,
}

impl ConfigBuilder {
    /// Applies a flag that has a value.
    fn set(&mut self, mut flag: Flag<'_>) -> Result<(), String> {
        let config = &mut self.config;
        match flag.name {
            "port" => config.port = flag.number(0, u16::MAX.into())? as u16,
            "bind" => self.bind.push(flag.parse(bind_address)?),
            "lan" => flag.push(&mut config.networks.lan, str::parse, MAX_LAN_NETWORKS)?,
            "interface" => {
                flag.push(&mut config.networks.interfaces, str::parse, MAX_INTERFACE_PATTERNS)?
            }
            "timeout" => config.timeout = Duration::from_millis(flag.number(1, MAX_TIMEOUT_MS)?),
            "peer" => {
                let (host, port) = flag.parse(parse_host)?;
                config.peers.push((host, port.unwrap_or(DEFAULT_PORT)));
            }
            "private-key" => config.private_key = Some(flag.value()?.into()),
            "trusted-public-key" => {
                // One value may contain several keys, as in nix.conf.
                for key in flag.text()?.split_whitespace() {
                    let key = PublicKey::parse(key).map_err(|e| flag.wrong(key, e))?;
                    config.trusted_public_keys.push(key);
                }
            }
            "trusted-public-key-file" => config.trusted_public_key_files.push(flag.value()?.into()),
            "metrics" => {
                let address = flag.parse(|text| text.parse().map_err(|_| "not ADDR:PORT"))?;
                config.metrics = Some(address);
            }
            "priority" => config.priority = flag.number(0, u32::MAX.into())? as u32,
            "mode" => config.mode = flag.parse(str::parse)?,
            "share" => config.sharing = flag.parse(str::parse)?,
            "friend" => flag.push(&mut config.friends, str::parse, MAX_FRIENDS)?,
            "friends-file" => config.friends_file = Some(flag.value()?.into()),
            "upload-limit" => config.upload_limit = Some(flag.parse(UploadLimit::parse_rate)?),
            "tracker-url" => config.tracker_urls.push(flag.parse(url)?),
            "peer-id" => config.peer_id = Some(flag.parse(peer_id)?),
            "announce-addr" => config.announce_addr = Some(flag.parse(parse_host)?),
            "upstream-cache" => config.upstream_cache = flag.parse(url)?,
            "filter-patterns" => flag.add_patterns(&mut config.filter_patterns)?,
            "store-dir" => config.store_dir = flag.parse(StoreDir::parse)?,
            "root" => config.root = flag.value()?.into(),
            "db" => self.db = Some(flag.value()?.into()),
            "state-dir" => config.state_dir = Some(flag.value()?.into()),
            _ => return Err(format!("--{}: no such option; see --help", flag.name)),
        }
        Ok(())
    }

    /// Adds the defaults that depend on other settings, and the environment.
    ///
    /// # Errors
    /// The mode needs a flag that is missing.
    fn into_config(self, env: impl Fn(&str) -> Option<OsString>) -> Result<Config, String> {
        let ConfigBuilder { mut config, bind, db } = self;
        if !bind.is_empty() {
            config.bind = bind;
        }
        config.db = db
            .unwrap_or_else(|| config.root.join(config.db.strip_prefix("/").unwrap_or(&config.db)));
        let env = |name: &str| env(name).filter(|value| !value.is_empty());
        if let Some(dir) = env("NIX_CONF_DIR") {
            config.nix_conf_dir = dir.into();
        }
        let mut from_env = |given: Option<PathBuf>, name, flag: &str| {
            given.or_else(|| {
                let value = env(name)?;
                config.flags.splice(0..0, [flag.to_owned(), value.to_string_lossy().into_owned()]);
                Some(value.into())
            })
        };
        config.private_key =
            from_env(config.private_key.take(), "NIX_SECRET_KEY_FILE", "--private-key");
        config.state_dir = from_env(config.state_dir.take(), "STATE_DIRECTORY", "--state-dir");
        if config.mode != Mode::Lan && config.tracker_urls.is_empty() {
            return Err("--mode wan and --mode both need --tracker-url".into());
        }
        Ok(config)
    }
}

/// A flag whose value has not been read yet. Errors are one line that names the flag.
struct Flag<'a> {
    name: &'a str,
    parser: &'a mut lexopt::Parser,
}

impl Flag<'_> {
    fn value(&mut self) -> Result<OsString, String> {
        self.parser.value().map_err(|_| format!("--{}: needs a value", self.name))
    }

    fn text(&mut self) -> Result<String, String> {
        let value = self.value()?;
        self.utf8(value)
    }

    fn utf8(&self, value: OsString) -> Result<String, String> {
        value.into_string().map_err(|value| self.wrong(&value.to_string_lossy(), "not UTF-8"))
    }

    /// Reads the value and converts it by `parse`.
    fn parse<T, E: Display>(
        &mut self,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Result<T, String> {
        let text = self.text()?;
        parse(&text).map_err(|e| self.wrong(&text, e))
    }

    fn number(&mut self, min: u64, max: u64) -> Result<u64, String> {
        self.parse(|text| match text.parse() {
            Ok(number) if (min..=max).contains(&number) => Ok(number),
            _ => Err(format!("not a number from {min} to {max}")),
        })
    }

    /// Adds the value of a repeatable flag to `all`, which may have at most `max` values.
    fn push<T, E: Display>(
        &mut self,
        all: &mut Vec<T>,
        parse: impl FnOnce(&str) -> Result<T, E>,
        max: usize,
    ) -> Result<(), String> {
        let value = self.parse(parse)?;
        if all.len() >= max {
            return Err(format!("--{}: given more than {max} times", self.name));
        }
        all.push(value);
        Ok(())
    }

    /// Adds all values of `--filter-patterns` to `patterns`.
    fn add_patterns(&mut self, patterns: &mut Vec<String>) -> Result<(), String> {
        let words = self.parser.values();
        let words: Vec<OsString> =
            words.map_err(|_| format!("--{}: needs at least one pattern", self.name))?.collect();
        for word in words {
            let word = self.utf8(word)?;
            if word.len() > MAX_PATTERN {
                return Err(self.wrong(&word, format_args!("longer than {MAX_PATTERN} bytes")));
            }
            patterns.push(word);
        }
        if patterns.len() > MAX_PATTERNS {
            return Err(format!("--{}: more than {MAX_PATTERNS} patterns", self.name));
        }
        Ok(())
    }

    fn wrong(&self, value: &str, why: impl Display) -> String {
        format!("--{} {value}: {why}", self.name)
    }
}

fn bind_address(value: &str) -> Result<IpAddr, &'static str> {
    let bare = value.strip_prefix('[').and_then(|v| v.strip_suffix(']')).unwrap_or(value);
    bare.parse().map_err(|_| "not an IP address")
}

fn peer_id(value: &str) -> Result<String, String> {
    match is_peer_id(value) {
        true => Ok(value.to_owned()),
        false => Err(format!("not 1 to {MAX_PEER_ID} printable bytes")),
    }
}

fn url(value: &str) -> Result<String, &'static str> {
    let rest = value.strip_prefix("http://").or_else(|| value.strip_prefix("https://"));
    match rest {
        Some(rest) if !rest.is_empty() && !value.contains(char::is_whitespace) => {
            Ok(value.trim_end_matches('/').to_owned())
        }
        _ => Err("not an http:// or https:// URL"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(args: &[&str]) -> Result<Config, String> {
        run_with(args, |_| None)
    }

    fn run_with(args: &[&str], env: impl Fn(&str) -> Option<OsString>) -> Result<Config, String> {
        match parse(args.iter().map(OsString::from), env)? {
            Command::Run(config) => Ok(*config),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_of_the_python_peerix_are_accepted() {
        let config = run(&[
            "--port",
            "12399",
            "--timeout",
            "80",
            "--verbose",
            "--private-key",
            "/key",
            "--mode",
            "both",
            "--tracker-url",
            "http://tracker:12305/",
            "--peer-id",
            "me",
            "--announce-addr",
            "example.org",
            "--no-verify",
            "--upstream-cache",
            "https://cache.example",
            "--filter-patterns",
            "*-secret",
            "a b",
            "--no-filter",
            "--no-default-filters",
        ])
        .unwrap();
        assert_eq!((config.port, config.timeout), (12399, Duration::from_millis(80)));
        assert_eq!(config.mode, Mode::Both);
        assert_eq!(config.tracker_urls, ["http://tracker:12305"]);
        assert_eq!(config.filter_patterns, ["*-secret", "a b"]);
        assert_eq!(config.announce_addr, Some(("example.org".into(), None)));
        assert!(config.verbose && !config.verify && !config.filter && !config.default_filters);
    }

    #[test]
    fn no_flags_gives_the_defaults_of_the_python_peerix() {
        let config = run(&[]).unwrap();
        assert_eq!(
            (config.port, config.timeout, config.priority),
            (12304, Duration::from_millis(50), 20)
        );
        assert_eq!(config.bind, ["0.0.0.0".parse::<IpAddr>().unwrap()]);
        assert_eq!(config.mode, Mode::Lan);
        assert_eq!(config.upstream_cache, "https://cache.nixos.org");
        assert!(config.verify && config.filter && config.default_filters && !config.verbose);
    }

    #[test]
    fn environment_variables_replace_missing_flags() {
        let env = |name: &str| match name {
            "NIX_SECRET_KEY_FILE" => Some("/env/key".into()),
            "STATE_DIRECTORY" => Some("/env/state".into()),
            _ => None,
        };
        let config = run_with(&[], env).unwrap();
        assert_eq!(config.private_key, Some("/env/key".into()));
        assert_eq!(config.state_dir, Some("/env/state".into()));
        let config = run_with(&["--private-key", "/flag"], env).unwrap();
        assert_eq!(config.private_key, Some("/flag".into()));
    }

    /// The daemon reports its flags, and commands parse them to restore its settings.
    #[test]
    fn reported_flags_restore_the_same_config() {
        let env = |name: &str| (name == "STATE_DIRECTORY").then(|| "/env/state".into());
        let config = run_with(
            &[
                "--port",
                "1",
                "--filter-patterns",
                "a",
                "b",
                "--mode=both",
                "--tracker-url",
                "http://t",
            ],
            env,
        );
        let config = config.unwrap();
        let flags: Vec<&str> = config.flags.iter().map(String::as_str).collect();
        let again = run(&flags).unwrap();
        assert_eq!(format!("{config:?}"), format!("{again:?}"));
        assert_eq!(again.state_dir, Some("/env/state".into()));
    }

    #[test]
    fn subcommands_are_parsed_with_their_options() {
        let ask = |args: &[&str]| match parse(args.iter().map(OsString::from), |_| None) {
            Ok(Command::Ask(ask)) => *ask,
            other => panic!("{other:?}"),
        };
        let path = "/nix/store/7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-x";
        for (args, what, json, port) in [
            (&["status"][..], Subcommand::Status, false, 12304),
            (&["peers", "--json"], Subcommand::Peers, true, 12304),
            (&["why", path], Subcommand::Why(path.into()), false, 12304),
            (&["why", "--port", "1", path, "--json"], Subcommand::Why(path.into()), true, 1),
            (&["doctor", "--port=1", "--verbose"], Subcommand::Doctor, false, 1),
        ] {
            let ask = ask(args);
            assert_eq!((ask.subcommand, ask.json, ask.config.port), (what, json, port));
        }
        // A command name is a plain word as the value of a flag or after the first argument.
        assert_eq!(
            run(&["--filter-patterns", "status", "why"]).unwrap().filter_patterns,
            ["status", "why"]
        );
        assert!(matches!(parse(["peers".into(), "--help".into()], |_| None), Ok(Command::Help)));
    }

    #[test]
    fn hosts_and_addresses_in_every_spelling_are_parsed() {
        let config = run(&[
            "--peer",
            "host",
            "--peer=host:1",
            "--peer",
            "10.0.0.1:2",
            "--peer",
            "fd00::1",
            "--peer",
            "[fd00::1]",
            "--peer",
            "[fd00::1]:3",
            "--bind",
            "[::]",
            "--bind",
            "127.0.0.1",
        ])
        .unwrap();
        let expected = [
            ("host", 12304),
            ("host", 1),
            ("10.0.0.1", 2),
            ("fd00::1", 12304),
            ("fd00::1", 12304),
            ("fd00::1", 3),
        ];
        assert_eq!(config.peers, expected.map(|(host, port)| (host.to_owned(), port)));
        assert_eq!(config.bind.len(), 2);
        assert!(config.bind[0].is_ipv6());
    }

    #[test]
    fn repeated_networks_and_interfaces_are_all_kept() {
        let config = run(&["--lan", "100.64.0.0/10", "--lan=fd7a::/48", "--interface", "!wlan*"]);
        let networks = config.unwrap().networks;
        let lan: Vec<String> = networks.lan.iter().map(|range| range.cidr().to_string()).collect();
        assert_eq!(lan, ["100.64.0.0/10", "fd7a::/48"]);
        assert!(networks.allows_interface("eth0") && !networks.allows_interface("wlan0"));
    }

    #[test]
    fn invalid_arguments_give_one_line_that_names_the_flag() {
        for (args, names) in [
            (&["--prot", "1"][..], "--prot"),
            (&["--port"], "--port"),
            (&["--port", "x"], "--port x"),
            (&["--port", "70000"], "65535"),
            (&["--port", "-1"], "--port"),
            (&["--timeout", "0"], "--timeout 0"),
            (&["--timeout", "99999999999999999999"], "--timeout"),
            (&["--mode", "lna"], "--mode lna"),
            (&["--mode", "wan"], "--tracker-url"),
            (&["--bind", "eth0"], "--bind eth0"),
            (&["--peer", "a b"], "--peer a b"),
            (&["--metrics", "9100"], "--metrics 9100: not ADDR:PORT"),
            (
                &["--lan", "10.0.0.5/8"],
                "--lan 10.0.0.5/8: host bits are set; did you mean 10.0.0.0/8?",
            ),
            (&["--lan", "0.0.0.0/0"], "--lan 0.0.0.0/0: every address"),
            (&["--lan"], "--lan: needs a value"),
            (&["--interface", "e[tn]h0"], "--interface e[tn]h0: only * and ?"),
            (&["--interface", "!"], "--interface !: no name"),
            (&["--lan", "10.0.0.0/8"].repeat(65), "--lan: given more than 64 times"),
            (&["--interface", "eth0"].repeat(65), "--interface: given more than 64 times"),
            (&["--peer", "a:0"], "--peer a:0"),
            (&["--tracker-url", "tracker"], "--tracker-url tracker"),
            (&["--peer-id", ""], "--peer-id"),
            (&["--announce-addr", "a b"], "--announce-addr a b"),
            (&["--announce-addr", "a:99999"], "--announce-addr a:99999"),
            (&["--trusted-public-key", "nope"], "--trusted-public-key nope"),
            (&["--store-dir", "nix"], "--store-dir nix"),
            (&["--json"], "--json"),
            (&["--port", "1", "status"], "status"),
            (&["status", "word"], "word"),
            (&["why"], "store path"),
            (&["why", "--json"], "store path"),
            (&["why", "a", "b"], "b"),
            (&["--filter-patterns"], "--filter-patterns"),
            (&["--filter-patterns", &"p".repeat(257)], "longer than 256"),
            (&[&["--filter-patterns"][..], &["p"; 129]].concat(), "more than 128"),
            (&["--no-verify=yes"], "--no-verify"),
            (&["extra"], "extra"),
            (&["-x"], "-x"),
        ] {
            let error = run(args).unwrap_err();
            assert!(error.contains(names) && !error.contains('\n'), "{args:?}: {error}");
        }
    }

    #[test]
    fn salvage_keeps_store_dir_priority_and_port() {
        let salvaged = |args: &[&str]| {
            let config = salvage(&args.iter().map(OsString::from).collect::<Vec<_>>());
            (config.store_dir.as_str().to_owned(), config.priority, config.port)
        };
        let args = [
            "--prot",
            "1",
            "--store-dir=/gnu/store",
            "--priority",
            "50",
            "--mode",
            "nonsense",
            "--port=7",
        ];
        assert_eq!(salvaged(&args), ("/gnu/store".to_owned(), 50, 7));
        assert_eq!(salvaged(&["--priority", "x"]), ("/nix/store".to_owned(), 20, 12304));
        assert_eq!(salvaged(&["--port"]), ("/nix/store".to_owned(), 20, 12304));
    }

    #[test]
    fn help_text_names_every_flag() {
        for flag in [
            "port",
            "bind",
            "lan",
            "interface",
            "timeout",
            "peer",
            "private-key",
            "trusted-public-key",
            "trusted-public-key-file",
            "priority",
            "mode",
            "tracker-url",
            "peer-id",
            "announce-addr",
            "no-verify",
            "upstream-cache",
            "no-filter",
            "no-default-filters",
            "filter-patterns",
            "store-dir",
            "db",
            "metrics",
            "state-dir",
            "verbose",
            "help",
            "version",
        ] {
            assert!(
                HELP.contains(&format!("--{flag} ")) || HELP.contains(&format!("--{flag}\n")),
                "{flag}"
            );
        }
        assert!(matches!(parse(["-h".into()], |_| None), Ok(Command::Help)));
        assert!(matches!(parse(["--version".into()], |_| None), Ok(Command::Version)));
    }
}
