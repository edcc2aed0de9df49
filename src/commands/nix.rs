//! Nix's settings, which Nix prints, and remedies that change them. Only commands use this module,
//! never the daemon.

use super::program::{ProgramError, run};
use super::shell::quote;
use crate::config::{Config, UPSTREAM_KEY};
use crate::nix::{PathInfo, PublicKey, StoreDir, is_content_addressed};
use crate::trust::Substituter;
use rusqlite::{Connection, OpenFlags};
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// Returns the program `name` of Nix in `PATH`, and its installation paths, which are tried if that
/// fails.
fn programs(name: &str) -> [String; 3] {
    let dirs = ["", "/run/current-system/sw/bin/", "/nix/var/nix/profiles/default/bin/"];
    dirs.map(|dir| format!("{dir}{name}"))
}

/// Maximum number of signatures that are verified per path; the rest is ignored. Real paths have
/// one to three.
const MAX_SIGNATURES: usize = 16;

/// First half of hash parts that no store path has, used with [`make_nix_query`].
/// [`misses`](super::nix_cache::misses) leaves them out of the misses that Nix caches.
pub const MISSING_HASH_PREFIX: &str = "0000000000000000";

/// Effective settings of Nix.
pub struct NixSettings {
    values: HashMap<String, String>,
    /// The nix-daemon that asks substituters for the users of this machine. `None` if none runs, so
    /// that each Nix process asks for itself.
    pub daemon: Option<NixDaemon>,
}

impl NixSettings {
    /// Reads the settings of the process that asks substituters: nix-daemon's if one runs,
    /// otherwise this user's. Runs `nix` up to six times, for at most
    /// [`PROGRAM_TIMEOUT`](super::program::PROGRAM_TIMEOUT) each.
    ///
    /// # Errors
    /// One line: why Nix does not print its settings.
    pub fn read() -> Result<NixSettings, String> {
        let daemon = NixDaemon::find();
        let values = match &daemon {
            None => NixSettings::show(&[])?,
            Some(daemon) => NixSettings::show(&daemon.environment())?,
        };
        Ok(NixSettings { values, daemon })
    }

    /// Reads the settings of this user's Nix. nix-daemon may ignore some of them. Runs `nix` up to
    /// six times, for at most
    /// [`PROGRAM_TIMEOUT`](super::program::PROGRAM_TIMEOUT) each.
    ///
    /// # Errors
    /// One line: why Nix does not print its settings.
    pub fn of_this_user() -> Result<NixSettings, String> {
        Ok(NixSettings { values: NixSettings::show(&[])?, daemon: None })
    }

    fn show(environment: &[(String, String)]) -> Result<HashMap<String, String>, String> {
        let mut why = String::new();
        for program in programs("nix") {
            // Nix 2.20 renamed `nix show-config` to `nix config show`.
            for words in [&["config", "show"][..], &["show-config"]] {
                let nix_command = ["--extra-experimental-features", "nix-command"];
                match run(&program, &[&nix_command, words].concat(), environment) {
                    Ok(printed) => {
                        let lines = printed.lines().filter_map(|line| line.split_once(" = "));
                        return Ok(lines.map(|(key, value)| (key.into(), value.into())).collect());
                    }
                    Err(e) if why.is_empty() => why = e.to_string(),
                    Err(_) => {}
                }
            }
        }
        Err(why)
    }

    /// A setting's value as Nix prints it. Empty if the setting is unknown.
    pub fn get(&self, key: &str) -> &str {
        self.values.get(key).map_or("", String::as_str)
    }

    /// The words of a list setting, in their order.
    pub fn words(&self, key: &str) -> Vec<&str> {
        self.get(key).split_whitespace().collect()
    }

    /// Substituters that are the peerix on `port`, as the user wrote them.
    pub fn peerix(&self, port: u16) -> Vec<&str> {
        let is_it = |word: &&str| Substituter::parse(word).is_peerix(port);
        self.words("substituters").into_iter().filter(is_it).collect()
    }

    /// The keys that Nix trusts. Of several keys with one name, Nix uses the first.
    fn public_keys(&self) -> Vec<PublicKey> {
        let mut keys: Vec<PublicKey> = Vec::new();
        for key in
            self.words("trusted-public-keys").iter().filter_map(|key| PublicKey::parse(key).ok())
        {
            if !keys.iter().any(|known| known.name() == key.name()) {
                keys.push(key);
            }
        }
        keys
    }

    /// Faults in `trusted-public-keys`, one line each.
    pub fn key_faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        let first = self.public_keys();
        for word in self.words("trusted-public-keys") {
            match PublicKey::parse(word) {
                Err(e) => faults.push(format!("trusted-public-keys has {word}, which is none: {e}; Nix fails at it")),
                Ok(key) if first.contains(&key) => {}
                Ok(key) => faults.push(format!(
                    "trusted-public-keys has two keys of the name {}; Nix goes by the first and ignores {key}",
                    key.name()
                )),
            }
        }
        faults
    }

    /// Environment of the process that asks substituters. `None` if this user cannot read it.
    fn asking_environment(&self) -> Option<HashMap<String, String>> {
        match &self.daemon {
            Some(daemon) => daemon.variables.clone(),
            None => Some(
                std::env::vars_os()
                    .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                    .collect(),
            ),
        }
    }

    /// The variable and the proxy that Nix uses for `url`. `None` if it connects directly.
    pub fn proxy(&self, url: &str) -> Option<(String, String)> {
        proxy_for(&self.asking_environment()?, url)
    }

    /// The setting by which Nix accepts every path of the peerix on `port`. `None` if it requires
    /// signatures.
    pub fn takes_unsigned(&self, port: u16) -> Option<&'static str> {
        if self.get("require-sigs") == "false" {
            return Some("require-sigs is off");
        }
        let is_trusted = |word: &&str| Substituter::parse(word).is_trusted();
        self.peerix(port).iter().any(is_trusted).then_some("its URL of peerix has trusted=true")
    }

    /// Tells why Nix would accept a path with these signatures from the peerix of `config`.
    ///
    /// # Errors
    /// One line: why Nix would refuse it.
    pub fn trusts(&self, info: &PathInfo, config: &Config) -> Result<String, String> {
        if let Some(why) = self.takes_unsigned(config.port) {
            return Ok(format!("Nix takes it as it takes everything: {why}"));
        }
        trusted_by(info, &self.public_keys(), &config.store_dir)
            .map(|why| format!("Nix takes it: {why}"))
    }
}

/// Tells why a path is trusted by `keys`: its content address, or one of its signatures.
///
/// # Errors
/// One line: why it is not trusted.
pub fn trusted_by(
    info: &PathInfo,
    keys: &[PublicKey],
    store_dir: &StoreDir,
) -> Result<String, String> {
    if is_content_addressed(info, store_dir) {
        return Ok("its content makes its name, which needs no signature".into());
    }
    let fingerprint = info.fingerprint(store_dir);
    let signatures = info.signatures.iter().take(MAX_SIGNATURES);
    for signature in signatures.clone() {
        if keys.iter().any(|key| key.verify(fingerprint.as_bytes(), signature)) {
            return Ok(format!("signed by {}", signature.name()));
        }
    }
    let names: Vec<&str> = signatures.map(|signature| signature.name()).collect();
    if names.is_empty() {
        return Err("it has no signature".into());
    }
    if keys.iter().any(|key| names.contains(&key.name())) {
        return Err(format!(
            "the signature by {} is not of the key that is trusted by that name",
            names.join(", ")
        ));
    }
    Err(format!("it is signed by {}, whose key is not trusted", names.join(", ")))
}

/// A running nix-daemon. It asks substituters for all users, with its own configuration and
/// environment.
pub struct NixDaemon {
    /// Its environment. `None` if this user cannot read it.
    variables: Option<HashMap<String, String>>,
}

impl NixDaemon {
    /// Finds the running nix-daemon.
    fn find() -> Option<NixDaemon> {
        let (_, dir) = oldest_nix_daemon()?;
        let environ = fs::read(dir.join("environ")).ok();
        let variables = environ.map(|bytes| {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        });
        Some(NixDaemon { variables })
    }

    /// Environment in which another Nix process reads the same configuration: the daemon's
    /// variables. If they are unknown, at least no user's configuration files.
    fn environment(&self) -> Vec<(String, String)> {
        let user_files = ("NIX_USER_CONF_FILES".to_owned(), String::new());
        let Some(variables) = &self.variables else { return vec![user_files] };
        let matters = |name: &str| {
            name.starts_with("NIX_") || name.starts_with("XDG_CONFIG") || name == "HOME"
        };
        // An empty value removes a variable that the daemon does not have.
        let own = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
        let gone = own
            .filter(|name| matters(name) && !variables.contains_key(name))
            .map(|name| (name, String::new()));
        let mut all: Vec<(String, String)> = gone.collect();
        all.extend(
            variables.iter().filter(|(name, _)| matters(name)).map(|(n, v)| (n.clone(), v.clone())),
        );
        all
    }
}

/// The variable and the proxy that libcurl uses for an `http://` URL. `None` if it connects
/// directly. Nix uses libcurl.
fn proxy_for(environment: &HashMap<String, String>, url: &str) -> Option<(String, String)> {
    let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let rest = url.strip_prefix("http://")?;
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host).trim_matches(['[', ']']);
    let exempt = get("no_proxy").or_else(|| get("NO_PROXY")).map_or("", String::as_str);
    let is_exempt = exempt.split([',', ' ']).filter(|word| !word.is_empty()).any(|word| {
        let word = word.trim_start_matches('.');
        // curl supports CIDR networks in `no_proxy` since 7.86.
        word == "*" || word == host || (word == "127.0.0.0/8" && host.starts_with("127."))
    });
    // curl ignores HTTP_PROXY in capitals, which in CGI is the `Proxy` header of a request.
    let proxy = ["http_proxy", "all_proxy", "ALL_PROXY"]
        .into_iter()
        .find_map(|name| Some((name, get(name)?)));
    proxy.filter(|_| !is_exempt).map(|(name, proxy)| (name.to_owned(), proxy.clone()))
}

/// Makes nix-daemon, or this user's Nix if there is none, ask its substituters for `path`. Blocks
/// until it has asked all of them, for at most [`PROGRAM_TIMEOUT`](super::program::PROGRAM_TIMEOUT).
///
/// # Errors
/// Nix cannot be started, or has not asked all of them before the timeout.
pub fn make_nix_query(path: &str, settings: &NixSettings) -> Result<(), ProgramError> {
    let mut environment = vec![("NIX_USER_CONF_FILES".to_owned(), String::new())];
    match settings.daemon {
        Some(_) => environment.push(("NIX_REMOTE".to_owned(), "daemon".to_owned())),
        None => environment.clear(),
    }
    let mut result = Ok(());
    for program in programs("nix-store") {
        result = match run(&program, &["--realise", "--dry-run", path], &environment) {
            Err(e @ ProgramError::NotStarted(_)) => Err(e),
            // Nix fails after it has asked, because the path does not exist.
            Ok(_) | Err(ProgramError::Failed(_)) => return Ok(()),
            Err(e) => return Err(e),
        };
    }
    result
}

/// Position of a substituter in the order in which Nix asks.
pub struct SubstituterRank {
    /// URL as nix.conf has it.
    pub url: String,
    /// Priority; Nix asks the lowest first. `None` if it is not known.
    pub priority: Option<u32>,
    /// The priority as text, or why it is not known.
    pub says: String,
}

/// Priorities of all substituters, the lowest first: from the URL, or from `nix-cache-info`. Asks
/// all of them at the same time and blocks for at most 2 s.
pub fn order(settings: &NixSettings) -> Vec<SubstituterRank> {
    let urls = settings.words("substituters");
    let mut all = super::probe::at_once(&urls, |url| {
        let cache = Substituter::parse(url);
        let (given, bare) = (cache.setting("priority"), cache.url);
        let info = match bare.strip_prefix("file://") {
            Some(dir) => fs::read(Path::new(dir).join("nix-cache-info")).map_err(|e| e.to_string()),
            None if bare.starts_with("http") => {
                super::get(&format!("{bare}/nix-cache-info")).map(|answer| answer.body)
            }
            None => Err("not asked".into()),
        };
        let field = |text: &str| {
            Some(text.lines().find_map(|line| line.strip_prefix("Priority:"))?.trim().to_owned())
        };
        let cache_info = info.map(|info| field(&String::from_utf8_lossy(&info)));
        let number = given
            .map(str::to_owned)
            .or_else(|| cache_info.as_ref().ok()?.clone())
            .and_then(|n| n.parse::<u32>().ok());
        let says = match (number, cache_info) {
            (Some(number), _) => number.to_string(),
            (None, Ok(_)) => "no priority".into(),
            (None, Err(e)) => e,
        };
        SubstituterRank { url: (*url).to_owned(), priority: number, says }
    });
    all.sort_by_key(|rank| rank.priority.unwrap_or(u32::MAX));
    all
}

/// Returns the command, or the NixOS option, that changes a setting.
pub fn set(conf: &str, nixos: &str) -> String {
    match Path::new("/etc/NIXOS").exists() {
        true => format!("nix.settings.{nixos}"),
        false => {
            format!("echo {} >> /etc/nix/nix.conf && systemctl try-restart nix-daemon", quote(conf))
        }
    }
}

/// Returns the command, or the NixOS option, that adds `value` to a list setting.
pub fn add(setting: &str, value: &str) -> String {
    set(&format!("{setting} = {value}"), &format!("{setting} = [ \"{value}\" ];"))
}

/// Returns the remedy that makes Nix ask peerix.
pub fn substitute(port: u16) -> String {
    add("extra-substituters", &format!("http://127.0.0.1:{port}"))
}

/// Returns the remedy that makes Nix trust the first signer of a path that `who` has.
pub fn trust(info: &PathInfo, who: &str) -> String {
    let Some(signature) = info.signatures.first() else {
        return format!(
            "on {who}: nix-store --generate-binary-cache-key {who}-1 /etc/nix/peerix.sec /etc/nix/peerix.pub, and \
             peerix --private-key /etc/nix/peerix.sec"
        );
    };
    // The peer chooses this name, and the user may paste it into a shell.
    let plain = |c: &char| c.is_ascii_alphanumeric() || "._+-".contains(*c);
    let name: String = signature.name().chars().filter(plain).collect();
    let (key, from) = match UPSTREAM_KEY.split_once(':') {
        Some((upstream, _)) if upstream == name => (UPSTREAM_KEY.to_owned(), String::new()),
        _ => {
            let print =
                "nix --extra-experimental-features nix-command key convert-secret-to-public < FILE";
            (
                format!("{name}:KEY"),
                format!(
                    "\n{name}:KEY is what this prints on {who}, FILE being its --private-key: {print}"
                ),
            )
        }
    };
    add("extra-trusted-public-keys", &key) + &from
}

/// Returns the command that makes Nix ask for a path again in spite of a cached miss.
pub fn ask_again(path: &str) -> String {
    format!("nix-store --realise --option narinfo-cache-negative-ttl 0 {}", quote(path))
}

/// How many seconds after the start of nix-daemon `/etc/nix/nix.conf` was written. `None` if it was
/// written before, at most 2 s after, or if no nix-daemon runs.
pub fn outdated() -> Option<u64> {
    /// Ticks per second in `/proc/PID/stat`: USER_HZ, which is 100 on the Linux platforms that Rust
    /// supports.
    const TICKS: u64 = 100;
    let written = fs::metadata("/etc/nix/nix.conf").and_then(|meta| meta.modified()).ok()?;
    let written = written.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    let (started, _) = oldest_nix_daemon()?;
    written.checked_sub(booted + started / TICKS).filter(|after| *after > 2)
}

/// Start time of the running nix-daemon in ticks since boot, and its directory in `/proc`. Its
/// oldest process is the daemon; it forks one for each connection.
fn oldest_nix_daemon() -> Option<(u64, PathBuf)> {
    let processes = fs::read_dir("/proc").ok()?.flatten().map(|process| process.path());
    processes.filter_map(|dir| Some((started_as(&dir, "nix-daemon")?, dir))).min()
}

/// Start time of the process with the directory `process` in `/proc`, in ticks since boot. `None`
/// if the process has another name.
fn started_as(process: &Path, name: &str) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // `12 (nix-daemon) S …`: the fields after the name begin with field 3; the start time is field
    // 22 (proc_pid_stat(5)).
    let (start, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().nth(19)?.parse().ok()?;
    start.ends_with(&format!("({name}")).then_some(ticks)
}

/// Whether nix-daemon ignores the peerix on `port` in this user's nix.conf, because the user is not
/// in `trusted-users` and the URL is not in `trusted-substituters`. Runs `nix` and `id`.
pub fn query_ignored_substituter(settings: &NixSettings, port: u16) -> bool {
    let Some(_) = settings.daemon else { return false };
    let Ok(own) = NixSettings::of_this_user() else { return false };
    let urls = own.peerix(port);
    let id = |flag: &str| run("id", &[flag], &[]).unwrap_or_default();
    let (user, groups) = (id("-un"), id("-Gn"));
    let is_trusted =
        settings.words("trusted-users").iter().any(|word| match word.strip_prefix('@') {
            Some(group) => groups.split_whitespace().any(|own| own == group),
            None => *word == "*" || *word == user.trim(),
        });
    let may = settings.words("trusted-substituters");
    !is_trusted && !urls.is_empty() && !urls.iter().any(|url| may.contains(url))
}

/// Text that Nix asks peerix through a proxy, for which 127.0.0.1 is another machine.
pub fn asks_by_proxy(variable: &str, proxy: &str, url: &str) -> String {
    format!(
        "Nix asks {url} by the proxy {proxy}, as {variable} says in its environment, and never reaches peerix"
    )
}

/// Returns the remedy that makes nix-daemon, or this user's Nix, ask peerix without the proxy.
pub fn no_proxy(settings: &NixSettings) -> String {
    let had = settings.asking_environment().unwrap_or_default();
    let had = ["no_proxy", "NO_PROXY"]
        .iter()
        .find_map(|name| had.get(*name))
        .filter(|list| !list.is_empty());
    let list = had.map_or("127.0.0.1".to_owned(), |list| format!("{list},127.0.0.1"));
    match settings.daemon {
        _ if Path::new("/etc/NIXOS").exists() => format!("networking.proxy.noProxy = \"{list}\";"),
        None => format!("export no_proxy={}", quote(&list)),
        Some(_) => {
            let dir = "/etc/systemd/system/nix-daemon.service.d";
            let lines = quote(&format!("Environment=no_proxy={list}"));
            format!(
                "mkdir -p {dir} && printf '[Service]\\n%s\\n' {lines} > {dir}/no-proxy.conf && \
                 systemctl daemon-reload && systemctl restart nix-daemon"
            )
        }
    }
}

/// Derivation in this machine's store that produces `path` and disables `allowSubstitutes`. Looks
/// at 16 derivations at most.
pub fn forbidding_derivation(db: &Path, path: &str) -> Option<String> {
    let connection = Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    connection.busy_timeout(Duration::from_secs(1)).ok()?;
    let mut statement = connection
        .prepare("select v.path from DerivationOutputs d join ValidPaths v on v.id = d.drv where d.path = ?1 limit 16")
        .ok()?;
    let derivations = statement.query_map([path], |row| row.get::<_, String>(0)).ok()?;
    // The ATerm of a derivation encodes false as the empty string.
    let forbids = |file: &String| {
        let text = fs::read(file).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.contains(r#"("allowSubstitutes","")"#)
            || text.contains(r#"\"allowSubstitutes\":false"#)
    };
    derivations.flatten().find(forbids)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::{NarHash, Signature, StorePath};

    #[test]
    fn proxy_is_the_one_that_curl_would_use() {
        let proxy = |variables: &[(&str, &str)]| {
            let environment = variables
                .iter()
                .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
                .collect();
            proxy_for(&environment, "http://127.0.0.1:12304").map(|(name, _)| name)
        };
        let p = "http://proxy:3128";
        for (variables, expected) in [
            (&[][..], None),
            (&[("http_proxy", p)], Some("http_proxy")),
            (&[("HTTP_PROXY", p)], None),
            (&[("https_proxy", p)], None),
            (&[("ALL_PROXY", p)], Some("ALL_PROXY")),
            (&[("http_proxy", ""), ("all_proxy", p)], Some("all_proxy")),
            (&[("http_proxy", p), ("no_proxy", "localhost")], Some("http_proxy")),
            (&[("http_proxy", p), ("no_proxy", "localhost, 127.0.0.1")], None),
            (&[("http_proxy", p), ("NO_PROXY", "127.0.0.0/8")], None),
            (&[("http_proxy", p), ("no_proxy", "*")], None),
            (&[("http_proxy", p), ("no_proxy", "127.0.0.10")], Some("http_proxy")),
        ] {
            assert_eq!(proxy(variables).as_deref(), expected, "{variables:?}");
        }
    }

    fn settings(values: &[(&str, &str)]) -> NixSettings {
        let values = values.iter().map(|(name, value)| ((*name).into(), (*value).into()));
        NixSettings { values: values.collect(), daemon: None }
    }

    #[test]
    fn peerix_is_found_in_every_spelling_of_its_url() {
        let urls = [
            "http://127.0.0.1:12304/?priority=1",
            "http://127.0.0.1:12304",
            "http://[::1]:12304",
            "http://localhost:12304/",
            "http://127.0.0.1:12305",
            "http://10.0.0.1:12304",
            "https://cache.nixos.org",
        ];
        let settings = settings(&[("substituters", &urls.join(" "))]);
        assert_eq!(settings.peerix(12304), urls[..4]);
        assert_eq!(settings.peerix(12305), urls[4..5]);
    }

    #[test]
    fn trusted_url_of_peerix_needs_no_signature() {
        let info = signed("a-1");
        let trusts = |substituters: &str| {
            let settings = settings(&[("substituters", substituters), ("require-sigs", "true")]);
            settings.trusts(&info, &Config::default())
        };
        assert!(trusts("http://[::1]:12304/?priority=1&trusted=true").is_ok());
        assert!(trusts("http://127.0.0.1:12304 http://other?trusted=true").is_err());
    }

    #[test]
    fn malformed_and_duplicate_key_names_are_faults() {
        let (a, b) = (
            "dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=",
            "bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=",
        );
        let faults = |keys: &str| settings(&[("trusted-public-keys", keys)]).key_faults();
        assert!(faults(&format!("x-1:{a} y-1:{b} x-1:{a}")).is_empty());
        let two = faults(&format!("x-1:{a} x-1:{b}"));
        assert!(two.len() == 1 && two[0].contains("the name x-1") && two[0].contains(b), "{two:?}");
        assert!(faults("x-1:nonsense")[0].contains("x-1:nonsense"));
    }

    fn signed(name: &str) -> PathInfo {
        let signature = Signature::parse(&format!("{name}:{}==", "A".repeat(86))).unwrap();
        PathInfo {
            path: StorePath::parse("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-x").unwrap(),
            nar_hash: NarHash::from_bytes([0; 32]),
            nar_size: 1,
            references: Vec::new(),
            deriver: None,
            signatures: vec![signature],
            ca: None,
        }
    }

    #[test]
    fn remedy_removes_shell_syntax_from_a_signer_name() {
        let remedy = trust(&signed("a-1'$(reboot)`;>|&"), "10.0.0.1");
        assert!(remedy.contains("'extra-trusted-public-keys = a-1reboot:KEY'"), "{remedy}");
        let remedy = trust(&signed("cache.nixos.org-1"), "10.0.0.1");
        assert!(remedy.contains(UPSTREAM_KEY) && !remedy.contains("convert"), "{remedy}");
    }
}
