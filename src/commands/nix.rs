//! Nix, as its users run it: its settings, and what it remembers of binary caches. The daemon never does this; commands may.

use super::shell::quote;
use crate::nix::{PathInfo, PublicKey, StoreDir, is_content_addressed};
use crate::share::UPSTREAM_KEY;
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
const ELSEWHERE: [&str; 2] = ["/run/current-system/sw/bin/nix", "/nix/var/nix/profiles/default/bin/nix"];

/// A narinfo's signatures that are looked at; real ones have one to three.
const MAX_SIGNATURES: usize = 16;

/// Misses that are read back, the latest first.
const MAX_MISSES: usize = 16;

/// Nix's settings.
pub struct Settings(HashMap<String, String>);

impl Settings {
    /// As Nix tells them: those of this user.
    pub fn read() -> Result<Settings, String> {
        let mut why = String::new();
        for program in ["nix"].iter().chain(&ELSEWHERE) {
            // What it was called until 2.19, and since.
            for words in [&["config", "show"][..], &["show-config"]] {
                match run(program, words) {
                    Ok(printed) => {
                        let lines = printed.lines().filter_map(|line| line.split_once(" = "));
                        return Ok(Settings(lines.map(|(key, value)| (key.into(), value.into())).collect()));
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
        self.0.get(key).map_or("", String::as_str)
    }

    /// Those that are lists, in their order.
    pub fn words(&self, key: &str) -> Vec<&str> {
        self.get(key).split_whitespace().collect()
    }

    /// The substituters that are the peerix on `port`, as the user wrote them.
    pub fn peerix(&self, port: u16) -> Vec<&str> {
        let hosts = [format!("http://127.0.0.1:{port}"), format!("http://localhost:{port}")];
        let is_it = |url: &&str| hosts.iter().any(|host| url.trim_end_matches('/').split('?').next() == Some(host));
        self.words("substituters").into_iter().filter(is_it).collect()
    }

    /// Why Nix would not take a path with these signatures; or what makes it.
    pub fn trusts(&self, info: &PathInfo, store_dir: &StoreDir) -> Result<String, String> {
        let keys: Vec<PublicKey> =
            self.words("trusted-public-keys").iter().filter_map(|key| PublicKey::parse(key).ok()).collect();
        if self.get("require-sigs") == "false" {
            return Ok("Nix takes it as it takes everything: require-sigs is off".into());
        }
        trusted_by(info, &keys, store_dir).map(|why| format!("Nix takes it: {why}"))
    }
}

/// What makes a path trusted to who has these keys, or why it is not.
pub fn trusted_by(info: &PathInfo, keys: &[PublicKey], store_dir: &StoreDir) -> Result<String, String> {
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
        return Err(format!("the signature by {} is not of the key that is trusted by that name", names.join(", ")));
    }
    Err(format!("it is signed by {}, whose key is not trusted", names.join(", ")))
}

fn run(program: &str, words: &[&str]) -> Result<String, String> {
    let mut child = Command::new(program)
        .args(["--extra-experimental-features", "nix-command"])
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| format!("{program}: {e}"))?;
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
pub struct Miss {
    /// Its hash part.
    pub hash_part: String,
    /// How long ago that was.
    pub age: Duration,
    /// And how long Nix will go on to believe it.
    pub left: Duration,
    /// Where it is written.
    pub file: PathBuf,
}

/// The misses at `url` that Nix still believes in, of one path or the latest ones: those of this user, and those of root, whose
/// nix-daemon asks for others. What cannot be read is passed over: there may be nothing.
pub fn misses(settings: &Settings, url: &str, hash_part: Option<&str>) -> Vec<Miss> {
    let believed: u64 = settings.get("narinfo-cache-negative-ttl").parse().unwrap_or(3600);
    let home = |home: PathBuf| home.join(".cache");
    let user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let user = user.or_else(|| std::env::var_os("HOME").map(|dir| home(dir.into())));
    let mut caches: Vec<PathBuf> = user.into_iter().chain([home("/root".into())]).collect();
    caches.dedup();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut misses = Vec::new();
    for file in caches.iter().flat_map(|dir| databases(&dir.join("nix"))) {
        let rows = read(&file, url.trim_end_matches('/'), hash_part, now.saturating_sub(believed)).unwrap_or_default();
        misses.extend(rows.into_iter().map(|(hash_part, at)| {
            let age = now.saturating_sub(at);
            let left = Duration::from_secs(believed.saturating_sub(age));
            Miss { hash_part, age: Duration::from_secs(age), left, file: file.clone() }
        }));
    }
    misses
}

fn databases(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_it = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("binary-cache-v") && name.ends_with(".sqlite")
    };
    entries.filter(is_it).collect()
}

fn read(file: &Path, url: &str, hash_part: Option<&str>, since: u64) -> rusqlite::Result<Vec<(String, u64)>> {
    let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    connection.busy_timeout(Duration::from_secs(1))?;
    let mut statement = connection.prepare(
        "select hashPart, NARs.timestamp from NARs join BinaryCaches on BinaryCaches.id = NARs.cache \
         where rtrim(BinaryCaches.url, '/') = ?1 and present = 0 and NARs.timestamp > ?2 \
         and (?3 is null or hashPart = ?3) order by NARs.timestamp desc limit ?4",
    )?;
    let since = i64::try_from(since).unwrap_or(i64::MAX);
    let rows = statement.query_map((url, since, hash_part, MAX_MISSES as i64), |row| {
        Ok((row.get(0)?, row.get::<_, i64>(1)?.max(0) as u64))
    })?;
    rows.collect()
}

/// What a substituter says of its priority.
pub fn order(settings: &Settings) -> Vec<(String, String)> {
    let urls = settings.words("substituters");
    let mut all = super::probe::at_once(&urls, |url| {
        let given = url.split(['?', '&']).find_map(|word| word.strip_prefix("priority="));
        let bare = url.split('?').next().unwrap_or_default().trim_end_matches('/');
        let info = match bare.strip_prefix("file://") {
            Some(dir) => fs::read(Path::new(dir).join("nix-cache-info")).map_err(|e| e.to_string()),
            None if bare.starts_with("http") => super::get(&format!("{bare}/nix-cache-info")).map(|answer| answer.body),
            None => Err("not asked".into()),
        };
        let field = |text: &str| Some(text.lines().find_map(|line| line.strip_prefix("Priority:"))?.trim().to_owned());
        let said = info.map(|info| field(&String::from_utf8_lossy(&info)));
        let number =
            given.map(str::to_owned).or_else(|| said.as_ref().ok()?.clone()).and_then(|n| n.parse::<u32>().ok());
        let says = match (number, said) {
            (Some(number), _) => number.to_string(),
            (None, Ok(_)) => "no priority".into(),
            (None, Err(e)) => e,
        };
        (number, (*url).to_owned(), says)
    });
    all.sort_by_key(|(number, ..)| number.unwrap_or(u32::MAX));
    all.into_iter().map(|(_, url, says)| (url, says)).collect()
}

/// A setting, as a command that makes it.
pub fn set(conf: &str, nixos: &str) -> String {
    match Path::new("/etc/NIXOS").exists() {
        true => format!("nix.settings.{nixos}"),
        false => format!("echo {} >> /etc/nix/nix.conf && systemctl try-restart nix-daemon", quote(conf)),
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
            let print = "nix --extra-experimental-features nix-command key convert-secret-to-public < FILE";
            (
                format!("{name}:KEY"),
                format!("\n{name}:KEY is what this prints on {who}, FILE being its --private-key: {print}"),
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

/// When nix-daemon was started, if it runs, and `nix.conf` was written after that: how many seconds after.
pub fn outdated() -> Option<u64> {
    /// The unit of times in `/proc`, on every Linux that Rust knows.
    const TICKS: u64 = 100;
    let written = fs::metadata("/etc/nix/nix.conf").and_then(|meta| meta.modified()).ok()?;
    let written = written.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let booted: u64 = stat.lines().find_map(|line| line.strip_prefix("btime ")?.parse().ok())?;
    let started = fs::read_dir("/proc").ok()?.flatten().filter_map(|process| {
        let stat = fs::read_to_string(process.path().join("stat")).ok()?;
        // `12 (nix-daemon) S …`: what follows the name begins with field 3, and the start is field 22.
        let (name, rest) = stat.rsplit_once(')')?;
        let ticks: u64 = rest.split_whitespace().nth(19)?.parse().ok()?;
        name.ends_with("(nix-daemon").then_some(booted + ticks / TICKS)
    });
    // The first one: each connection has one more.
    written.checked_sub(started.min()?).filter(|after| *after > 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::{NarHash, Signature, StorePath};

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
