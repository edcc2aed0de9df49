//! Nix, as its users run it: its settings, and what it remembers of binary caches. The daemon never
//! does this; commands may.

use super::shell::quote;
use crate::config::UPSTREAM_KEY;
use crate::nix::{PathInfo, PublicKey, StoreDir, is_content_addressed};
use rusqlite::{Connection, OpenFlags};
use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use std::{fs, thread};

/// Nix says what its settings are within this, or is broken.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Where else Nix is, for users whose `PATH` does not say.
const ELSEWHERE: [&str; 2] =
    ["/run/current-system/sw/bin/nix", "/nix/var/nix/profiles/default/bin/nix"];

/// A narinfo's signatures that are looked at; real ones have one to three.
const MAX_SIGNATURES: usize = 16;

/// How hash parts begin that no path has, and that [`have_asked_for`] is used with: Nix remembers
/// them, too.
pub const NOWHERE: &str = "0000000000000000";

/// Misses that are read back, the latest first.
const MAX_MISSES: usize = 16;

/// Nix's settings, and who has them.
pub struct NixSettings {
    values: HashMap<String, String>,
    /// The process that asks substituters for this machine's users. None where each Nix asks by
    /// itself.
    pub daemon: Option<NixDaemon>,
}

impl NixSettings {
    /// Those of the process that asks substituters: nix-daemon's where one runs, else this user's.
    /// Blocks for some seconds at most, while Nix tells them.
    ///
    /// # Errors
    /// One line: why Nix does not tell them.
    pub fn read() -> Result<NixSettings, String> {
        let daemon = NixDaemon::find();
        let values = match &daemon {
            None => NixSettings::show(&[])?,
            Some(daemon) => NixSettings::show(&daemon.environment())?,
        };
        Ok(NixSettings { values, daemon })
    }

    /// Those of this user's Nix, of which nix-daemon may ignore some.
    ///
    /// # Errors
    /// As [`NixSettings::read`].
    pub fn of_this_user() -> Result<NixSettings, String> {
        Ok(NixSettings { values: NixSettings::show(&[])?, daemon: None })
    }

    fn show(environment: &[(String, String)]) -> Result<HashMap<String, String>, String> {
        let mut why = String::new();
        for program in ["nix"].iter().chain(&ELSEWHERE) {
            // What it was called until 2.19, and since.
            for words in [&["config", "show"][..], &["show-config"]] {
                let nix_command = ["--extra-experimental-features", "nix-command"];
                match run(program, &[&nix_command, words].concat(), environment) {
                    Ok(printed) => {
                        let lines = printed.lines().filter_map(|line| line.split_once(" = "));
                        return Ok(lines.map(|(key, value)| (key.into(), value.into())).collect());
                    }
                    Err(e) if why.is_empty() => why = e,
                    Err(_) => {}
                }
            }
        }
        Err(why)
    }

    /// A setting's value.
    pub fn get(&self, key: &str) -> &str {
        self.values.get(key).map_or("", String::as_str)
    }

    /// Those that are lists, in their order.
    pub fn words(&self, key: &str) -> Vec<&str> {
        self.get(key).split_whitespace().collect()
    }

    /// The substituters that are the peerix on `port`, as the user wrote them.
    pub fn peerix(&self, port: u16) -> Vec<&str> {
        let hosts = [format!("http://127.0.0.1:{port}"), format!("http://localhost:{port}")];
        let is_it = |url: &&str| {
            hosts.iter().any(|host| url.trim_end_matches('/').split('?').next() == Some(host))
        };
        self.words("substituters").into_iter().filter(is_it).collect()
    }

    /// The keys that Nix trusts: the first of each name.
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

    /// What is wrong with the keys that Nix trusts, each in a line.
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

    /// The environment of whoever asks substituters; `None` if this user may not read it.
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

    /// The variable and the proxy by which Nix asks `url`, if by one.
    pub fn proxy(&self, url: &str) -> Option<(String, String)> {
        proxy_for(&self.asking_environment()?, url)
    }

    /// Why Nix would not take a path with these signatures; or what makes it.
    pub fn trusts(&self, info: &PathInfo, store_dir: &StoreDir) -> Result<String, String> {
        if self.get("require-sigs") == "false" {
            return Ok("Nix takes it as it takes everything: require-sigs is off".into());
        }
        trusted_by(info, &self.public_keys(), store_dir).map(|why| format!("Nix takes it: {why}"))
    }
}

/// What makes a path trusted to who has these keys, or why it is not.
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

/// A running nix-daemon, which asks substituters for others, by its own configuration and
/// environment.
pub struct NixDaemon {
    /// What its environment has; `None` if this user may not read it.
    variables: Option<HashMap<String, String>>,
}

impl NixDaemon {
    /// The one that runs, if any does.
    fn find() -> Option<NixDaemon> {
        let processes = fs::read_dir("/proc").ok()?.flatten().map(|process| process.path());
        let mut all: Vec<(u64, PathBuf)> =
            processes.filter_map(|dir| Some((started_as(&dir, "nix-daemon")?, dir))).collect();
        // The first one: each connection has one more.
        all.sort();
        let (_, dir) = all.into_iter().next()?;
        let environ = fs::read(dir.join("environ")).ok();
        let variables = environ.map(|bytes| {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
            pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
        });
        Some(NixDaemon { variables })
    }

    /// What makes another Nix find the same configuration: the variables of nix-daemon, or at least
    /// no user's files.
    fn environment(&self) -> Vec<(String, String)> {
        let user_files = ("NIX_USER_CONF_FILES".to_owned(), String::new());
        let Some(variables) = &self.variables else { return vec![user_files] };
        let matters = |name: &str| {
            name.starts_with("NIX_") || name.starts_with("XDG_CONFIG") || name == "HOME"
        };
        // What nix-daemon has not, this user's Nix must not have either.
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

/// The variable and the proxy by which libcurl, and so Nix, asks an `http://` URL; `None` if it
/// asks directly.
fn proxy_for(environment: &HashMap<String, String>, url: &str) -> Option<(String, String)> {
    let get = |name: &str| environment.get(name).filter(|value| !value.is_empty());
    let rest = url.strip_prefix("http://")?;
    let host = rest.split(['/', '?']).next().unwrap_or_default();
    let host = host.rsplit_once(':').map_or(host, |(host, _)| host).trim_matches(['[', ']']);
    let exempt = get("no_proxy").or_else(|| get("NO_PROXY")).map_or("", String::as_str);
    let is_exempt = exempt.split([',', ' ']).filter(|word| !word.is_empty()).any(|word| {
        let word = word.trim_start_matches('.');
        // curl knows networks since 7.86.
        word == "*" || word == host || (word == "127.0.0.0/8" && host.starts_with("127."))
    });
    // HTTP_PROXY in capitals is a header's name in CGI, so that curl does not read it.
    let proxy = ["http_proxy", "all_proxy", "ALL_PROXY"]
        .into_iter()
        .find_map(|name| Some((name, get(name)?)));
    proxy.filter(|_| !is_exempt).map(|(name, proxy)| (name.to_owned(), proxy.clone()))
}

/// Has nix-daemon, or this user's Nix where there is none, ask its substituters for `path`. Blocks
/// until it has asked all, for [`TIMEOUT`] at most.
pub fn have_asked_for(path: &str, settings: &NixSettings) {
    let mut environment = vec![("NIX_USER_CONF_FILES".to_owned(), String::new())];
    match settings.daemon {
        Some(_) => environment.push(("NIX_REMOTE".to_owned(), "daemon".to_owned())),
        None => environment.clear(),
    }
    let ask = ["--realise", "--dry-run", path];
    for program in [
        "nix-store",
        "/run/current-system/sw/bin/nix-store",
        "/nix/var/nix/profiles/default/bin/nix-store",
    ] {
        // It fails, as the path is nowhere.
        if !run(program, &ask, &environment).is_err_and(|e| e.starts_with(NOT_STARTED)) {
            return;
        }
    }
}

/// How the error of a program begins that is not there.
const NOT_STARTED: &str = "cannot start ";

/// What a program prints, with changes to its environment; an empty value removes a variable.
/// Blocks for [`TIMEOUT`] at most.
///
/// # Errors
/// One line: it cannot be started, or what it said last when it failed.
pub fn run(
    program: &str,
    words: &[&str],
    environment: &[(String, String)],
) -> Result<String, String> {
    let mut command = Command::new(program);
    for (name, value) in environment {
        // Files of a user are left out by an empty list, and only by that.
        match value.is_empty() && name != "NIX_USER_CONF_FILES" {
            true => command.env_remove(name),
            false => command.env(name, value),
        };
    }
    let mut child = command
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{NOT_STARTED}{program}: {e}"))?;
    let (done, waited) = crossbeam_channel::bounded(1);
    let (mut out, mut err) = (child.stdout.take(), child.stderr.take());
    thread::spawn(move || {
        let (mut printed, mut said) = (String::new(), String::new());
        let read = out.as_mut().map(|out| out.read_to_string(&mut printed));
        let _ = err.as_mut().map(|err| err.read_to_string(&mut said));
        let _ = done.send((read.is_some_and(|read| read.is_ok()), printed, said));
    });
    let answer = waited.recv_timeout(TIMEOUT);
    // It has closed what it prints to: it is at its end, or has to come there.
    if answer.is_err() {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| format!("{program}: {e}"))?;
    match answer {
        Ok((true, printed, _)) if status.success() => Ok(printed),
        Ok((_, _, said)) => Err(said.lines().next_back().unwrap_or("it said nothing").to_owned()),
        Err(_) => Err(format!("{program}: no answer within {} s", TIMEOUT.as_secs())),
    }
}

/// A path that Nix remembers not to be at a substituter.
pub struct CachedMiss {
    /// Its hash part.
    pub hash_part: String,
    /// How long ago that was.
    pub age: Duration,
    /// And how long Nix will go on to believe it.
    pub left: Duration,
    /// Where it is written.
    pub file: PathBuf,
}

/// The misses at `url` that Nix still believes in, of one path or the latest ones: those of this
/// user, and those of root, whose nix-daemon asks for others. What cannot be read is passed over:
/// there may be nothing.
pub fn misses(settings: &NixSettings, url: &str, hash_part: Option<&str>) -> Vec<CachedMiss> {
    let believed: u64 = settings.get("narinfo-cache-negative-ttl").parse().unwrap_or(3600);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut misses = Vec::new();
    for file in memories() {
        let rows = read(&file, url.trim_end_matches('/'), hash_part, now.saturating_sub(believed))
            .unwrap_or_default();
        misses.extend(rows.into_iter().map(|(hash_part, at)| {
            let age = now.saturating_sub(at);
            let left = Duration::from_secs(believed.saturating_sub(age));
            CachedMiss { hash_part, age: Duration::from_secs(age), left, file: file.clone() }
        }));
    }
    misses
}

/// The files in which Nix remembers what substituters said: of this user, and of root, whose
/// nix-daemon asks for others.
fn memories() -> Vec<PathBuf> {
    let home = |home: PathBuf| home.join(".cache");
    let user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let user = user.or_else(|| std::env::var_os("HOME").map(|dir| home(dir.into())));
    let mut caches: Vec<PathBuf> = user.into_iter().chain([home("/root".into())]).collect();
    caches.dedup();
    caches.iter().flat_map(|dir| databases(&dir.join("nix"))).collect()
}

fn open_memory(file: &Path) -> rusqlite::Result<Connection> {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    Ok(connection)
}

fn databases(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_it = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("binary-cache-v") && name.ends_with(".sqlite")
    };
    entries.filter(is_it).collect()
}

fn read(
    file: &Path,
    url: &str,
    hash_part: Option<&str>,
    since: u64,
) -> rusqlite::Result<Vec<(String, u64)>> {
    let connection = open_memory(file)?;
    let mut statement = connection.prepare(
        "select hashPart, NARs.timestamp from NARs join BinaryCaches on BinaryCaches.id = NARs.cache \
         where rtrim(BinaryCaches.url, '/') = ?1 and present = 0 and NARs.timestamp > ?2 \
         and (?3 is null or hashPart = ?3) and hashPart not like '0000000000000000%' order by NARs.timestamp desc limit ?4",
    )?;
    let since = i64::try_from(since).unwrap_or(i64::MAX);
    let rows = statement.query_map((url, since, hash_part, MAX_MISSES as i64), |row| {
        Ok((row.get(0)?, row.get::<_, i64>(1)?.max(0) as u64))
    })?;
    rows.collect()
}

/// A substituter's place in Nix's order.
pub struct SubstituterRank {
    /// As nix.conf has it.
    pub url: String,
    /// What counts, the lowest first; `None` if it does not say.
    pub priority: Option<u32>,
    /// For people: the priority, or why it is not known.
    pub says: String,
}

/// What substituters say of their priorities, the lowest first.
pub fn order(settings: &NixSettings) -> Vec<SubstituterRank> {
    let urls = settings.words("substituters");
    let mut all = super::probe::at_once(&urls, |url| {
        let given = url.split(['?', '&']).find_map(|word| word.strip_prefix("priority="));
        let bare = url.split('?').next().unwrap_or_default().trim_end_matches('/');
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
        let said = info.map(|info| field(&String::from_utf8_lossy(&info)));
        let number = given
            .map(str::to_owned)
            .or_else(|| said.as_ref().ok()?.clone())
            .and_then(|n| n.parse::<u32>().ok());
        let says = match (number, said) {
            (Some(number), _) => number.to_string(),
            (None, Ok(_)) => "no priority".into(),
            (None, Err(e)) => e,
        };
        SubstituterRank { url: (*url).to_owned(), priority: number, says }
    });
    all.sort_by_key(|rank| rank.priority.unwrap_or(u32::MAX));
    all
}

/// A setting, as a command that makes it.
pub fn set(conf: &str, nixos: &str) -> String {
    match Path::new("/etc/NIXOS").exists() {
        true => format!("nix.settings.{nixos}"),
        false => {
            format!("echo {} >> /etc/nix/nix.conf && systemctl try-restart nix-daemon", quote(conf))
        }
    }
}

/// How Nix comes to ask peerix.
pub fn substitute(port: u16) -> String {
    let url = format!("http://127.0.0.1:{port}");
    set(&format!("extra-substituters = {url}"), &format!("extra-substituters = [ \"{url}\" ];"))
}

/// How Nix comes to trust who signed a path that `who` has.
pub fn trust(info: &PathInfo, who: &str) -> String {
    let Some(signature) = info.signatures.first() else {
        return format!(
            "on {who}: nix-store --generate-binary-cache-key {who}-1 /etc/nix/peerix.sec /etc/nix/peerix.pub, and \
             peerix --private-key /etc/nix/peerix.sec"
        );
    };
    // Somebody else's word, in what the user may well paste into a shell.
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
    let conf = format!("extra-trusted-public-keys = {key}");
    set(&conf, &format!("extra-trusted-public-keys = [ \"{key}\" ];")) + &from
}

/// How Nix comes to ask for a path again.
pub fn ask_again(path: &str) -> String {
    format!("nix-store --realise --option narinfo-cache-negative-ttl 0 {}", quote(path))
}

/// When nix-daemon was started, if it runs, and `nix.conf` was written after that: how many seconds
/// after.
pub fn outdated() -> Option<u64> {
    /// The unit of times in `/proc`, on every Linux that Rust knows.
    const TICKS: u64 = 100;
    let written = fs::metadata("/etc/nix/nix.conf").and_then(|meta| meta.modified()).ok()?;
    let written = written.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    let started = fs::read_dir("/proc")
        .ok()?
        .flatten()
        .filter_map(|process| Some(booted + started_as(&process.path(), "nix-daemon")? / TICKS));
    // The first one: each connection has one more.
    written.checked_sub(started.min()?).filter(|after| *after > 2)
}

/// When the process with this directory in `/proc` was started, in ticks since the boot, if it has
/// that name.
fn started_as(process: &Path, name: &str) -> Option<u64> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // `12 (nix-daemon) S …`: what follows the name begins with field 3, and the start is field 22.
    let (start, rest) = stat.rsplit_once(')')?;
    let ticks = rest.split_whitespace().nth(19)?.parse().ok()?;
    start.ends_with(&format!("({name}")).then_some(ticks)
}

/// What a user, other than one that nix-daemon trusts, is told of substituters in their own
/// nix.conf: nix-daemon ignores them. Whether that is so of the peerix on `port`.
pub fn is_ignored(settings: &NixSettings, port: u16) -> bool {
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

/// That Nix asks peerix by a proxy, which has another 127.0.0.1.
pub fn asks_by_proxy(variable: &str, proxy: &str, url: &str) -> String {
    format!(
        "Nix asks {url} by the proxy {proxy}, as {variable} says in its environment, and never reaches peerix"
    )
}

/// How nix-daemon, or this user's Nix, comes to ask without the proxy.
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

/// A narinfo of a path that Nix remembers from a substituter.
pub struct CachedNarinfo {
    /// The NAR hash in it, as narinfos have it.
    pub nar_hash: String,
    /// How long Nix will go on to believe it.
    pub left: Duration,
    /// Where it is written.
    pub file: PathBuf,
}

/// The narinfos of a path at `url` that Nix still believes in: those of this user, and those of
/// root. What cannot be read is passed over.
pub fn remembered(settings: &NixSettings, url: &str, hash_part: &str) -> Vec<CachedNarinfo> {
    let believed: u64 = settings.get("narinfo-cache-positive-ttl").parse().unwrap_or(30 * 86400);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut all = Vec::new();
    for file in memories() {
        let since = i64::try_from(now.saturating_sub(believed)).unwrap_or(i64::MAX);
        let row = open_memory(&file).and_then(|connection| {
            connection.query_row(
                "select narHash, NARs.timestamp from NARs join BinaryCaches on BinaryCaches.id = NARs.cache \
                 where rtrim(BinaryCaches.url, '/') = ?1 and hashPart = ?2 and present = 1 and NARs.timestamp > ?3",
                (url.trim_end_matches('/'), hash_part, since),
                |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?.max(0) as u64)),
            )
        });
        if let Ok((nar_hash, at)) = row {
            let left = Duration::from_secs(believed.saturating_sub(now.saturating_sub(at)));
            all.push(CachedNarinfo { nar_hash, left, file });
        }
    }
    all
}

/// The derivation in this machine's store that makes a path, if its own text forbids that the path
/// is fetched.
pub fn forbidding_derivation(db: &Path, path: &str) -> Option<String> {
    let connection = Connection::open_with_flags(db, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    connection.busy_timeout(Duration::from_secs(1)).ok()?;
    let mut statement = connection
        .prepare("select v.path from DerivationOutputs d join ValidPaths v on v.id = d.drv where d.path = ?1 limit 16")
        .ok()?;
    let derivations = statement.query_map([path], |row| row.get::<_, String>(0)).ok()?;
    // In a derivation's file, which is an ATerm, false is an empty text.
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
    fn proxies_are_those_that_curl_would_use() {
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

    #[test]
    fn malformed_keys_and_second_ones_of_a_name_are_faults() {
        let (a, b) = (
            "dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=",
            "bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=",
        );
        let faults = |keys: &str| {
            let values = [("trusted-public-keys".to_owned(), keys.to_owned())].into();
            NixSettings { values, daemon: None }.key_faults()
        };
        assert!(faults(&format!("x-1:{a} y-1:{b} x-1:{a}")).is_empty());
        let two = faults(&format!("x-1:{a} x-1:{b}"));
        assert!(two.len() == 1 && two[0].contains("the name x-1") && two[0].contains(b), "{two:?}");
        assert!(faults("x-1:nonsense")[0].contains("x-1:nonsense"));
    }

    #[test]
    fn what_is_to_be_pasted_has_nothing_of_a_stranger_in_it() {
        let signed = |name: &str| {
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
        };
        let remedy = trust(&signed("a-1'$(reboot)`;>|&"), "10.0.0.1");
        assert!(remedy.contains("'extra-trusted-public-keys = a-1reboot:KEY'"), "{remedy}");
        let remedy = trust(&signed("cache.nixos.org-1"), "10.0.0.1");
        assert!(remedy.contains(UPSTREAM_KEY) && !remedy.contains("convert"), "{remedy}");
    }
}
