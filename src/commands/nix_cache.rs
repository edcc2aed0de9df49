//! Nix's binary-cache cache: the answers of substituters that Nix remembers, read from its SQLite
//! files.

use super::nix::{MISSING_HASH_PREFIX, NixSettings};
use crate::trust::Substituter;
use rusqlite::{Connection, OpenFlags};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Maximum number of misses that are read from each file, the latest first.
const MAX_MISSES: usize = 16;

/// Answer of a substituter that Nix still believes.
pub struct CachedAnswer {
    /// Hash part of the path.
    pub hash_part: String,
    /// NAR hash in the format of narinfos. `None` for a miss.
    pub nar_hash: Option<String>,
    /// Time since Nix asked the substituter.
    pub age: Duration,
    /// Time until Nix asks again.
    pub left: Duration,
    /// Cache file that contains the entry.
    pub file: PathBuf,
}

/// Misses of the substituter `url` that Nix still believes: of one path, or the latest ones. Reads
/// the caches of this user and of root. Skips files that this user cannot read.
pub fn misses(settings: &NixSettings, url: &str, hash_part: Option<&str>) -> Vec<CachedAnswer> {
    let believed = settings.get("narinfo-cache-negative-ttl").parse().unwrap_or(3600);
    answers(url, hash_part, false, believed, MAX_MISSES)
}

/// Narinfos of a path from the substituter `url` that Nix still believes, at most one from each
/// file. Reads the caches of this user and of root. Skips files that this user cannot read.
pub fn narinfos(settings: &NixSettings, url: &str, hash_part: &str) -> Vec<CachedAnswer> {
    let believed = settings.get("narinfo-cache-positive-ttl").parse().unwrap_or(30 * 86400);
    answers(url, Some(hash_part), true, believed, 1)
}

/// Hits or misses of the substituter `url` that are younger than `believed`, in seconds. Reads at
/// most `limit` from each file.
fn answers(
    url: &str,
    hash_part: Option<&str>,
    is_hit: bool,
    believed: u64,
    limit: usize,
) -> Vec<CachedAnswer> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let since = i64::try_from(now.saturating_sub(believed)).unwrap_or(i64::MAX);
    let (url, probes) = (Substituter::parse(url).url, format!("{MISSING_HASH_PREFIX}%"));
    let read = |file: &PathBuf| -> rusqlite::Result<Vec<CachedAnswer>> {
        let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
        connection.busy_timeout(Duration::from_secs(1))?;
        let mut statement = connection.prepare(
            "select hashPart, narHash, NARs.timestamp from NARs \
             join BinaryCaches on BinaryCaches.id = NARs.cache \
             where rtrim(BinaryCaches.url, '/') = ?1 and present = ?2 and NARs.timestamp > ?3 \
             and (?4 is null or hashPart = ?4) and hashPart not like ?6 \
             order by NARs.timestamp desc limit ?5",
        )?;
        let values = (url, is_hit, since, hash_part, limit as i64, &probes);
        let rows = statement.query_map(values, |row| {
            let age = now.saturating_sub(row.get::<_, i64>(2)?.max(0) as u64);
            Ok(CachedAnswer {
                hash_part: row.get(0)?,
                nar_hash: row.get(1)?,
                age: Duration::from_secs(age),
                left: Duration::from_secs(believed.saturating_sub(age)),
                file: file.clone(),
            })
        })?;
        rows.collect()
    };
    binary_cache_files().iter().flat_map(|file| read(file).unwrap_or_default()).collect()
}

/// Nix's binary-cache cache files: of this user, and of root, whose nix-daemon asks for other
/// users.
fn binary_cache_files() -> Vec<PathBuf> {
    let home = |home: PathBuf| home.join(".cache");
    let user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let user = user.or_else(|| std::env::var_os("HOME").map(|dir| home(dir.into())));
    let mut caches: Vec<PathBuf> = user.into_iter().chain([home("/root".into())]).collect();
    caches.dedup();
    caches.iter().flat_map(|dir| databases(&dir.join("nix"))).collect()
}

fn databases(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    let is_it = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.starts_with("binary-cache-v") && name.ends_with(".sqlite")
    };
    entries.filter(is_it).collect()
}
