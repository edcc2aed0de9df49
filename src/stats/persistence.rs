//! Reads and atomically writes the file `counters` in the state directory, in JSON.

use super::counters::Totals;
use super::hours::{Hour, MAX_HOURS};
use rustix::fs::{Mode, OFlags, fsync, open, renameat};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

const FILE: &str = "counters";
/// Temporary file. A killed process leaves it behind, and the next write truncates it.
const TEMPORARY_FILE: &str = "counters.new";
/// Name that a damaged file is renamed to.
const DAMAGED_FILE: &str = "counters.damaged";

const VERSION: u32 = 1;

/// Maximum size of the file, in bytes; a larger file counts as damaged. With all hours it has 30
/// KiB.
const MAX_FILE_BYTES: u64 = 256 * 1024;

/// Content of the file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(super) struct SavedCounters {
    version: u32,
    /// Start of counting, in seconds since 1970.
    pub since: u64,
    pub totals: Totals,
    pub hours: Vec<Hour>,
}

impl SavedCounters {
    pub fn new(since: u64, totals: Totals, hours: Vec<Hour>) -> Self {
        SavedCounters { version: VERSION, since, totals, hours }
    }
}

/// Why the totals of earlier runs are not available.
#[derive(Debug)]
pub(super) enum LoadError {
    /// The file was malformed. It has been renamed.
    Damaged(String),
    /// The file cannot be read but may be intact, so it must not be overwritten.
    Unreadable(String),
}

/// Reads the counters in `dir`. `None` if there is no file. Renames a malformed file.
pub(super) fn load(dir: &Path) -> Result<Option<SavedCounters>, LoadError> {
    let path = dir.join(FILE);
    let name = path.display();
    let read = File::open(&path).and_then(|file| {
        let mut bytes = Vec::new();
        file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    });
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(LoadError::Unreadable(format!("{name}: {e}"))),
    };
    let json: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    let version = json.as_ref().and_then(|json| json.get("version")?.as_u64());
    if version.is_some_and(|version| version > VERSION.into()) {
        return Err(LoadError::Unreadable(format!("{name}: of a later version of peerix")));
    }
    let saved = json.and_then(|json| serde_json::from_value::<SavedCounters>(json).ok());
    match saved.filter(|saved| saved.version == VERSION && saved.hours.len() <= MAX_HOURS) {
        Some(saved) => Ok(Some(saved)),
        None => match fs::rename(&path, dir.join(DAMAGED_FILE)) {
            Ok(()) => {
                Err(LoadError::Damaged(format!("{name}: damaged, and now called {DAMAGED_FILE}")))
            }
            Err(e) => {
                Err(LoadError::Unreadable(format!("{name}: damaged, and cannot be renamed: {e}")))
            }
        },
    }
}

/// Writes the counters to `dir` and syncs them. Creates `dir` if it is missing. After an error, the
/// old file is unchanged.
pub(super) fn store(dir: &Path, saved: &SavedCounters) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let dir = open(dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let flags =
        OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    let mut file = File::from(rustix::fs::openat(&dir, TEMPORARY_FILE, flags, mode)?);
    file.write_all(&serde_json::to_vec(saved)?)?;
    file.sync_all()?;
    renameat(&dir, TEMPORARY_FILE, &dir, FILE)?;
    Ok(fsync(&dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    fn dir(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("peerix-counters-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    fn saved() -> SavedCounters {
        SavedCounters::new(
            12,
            Totals::default(),
            vec![Hour { start: 3600, totals: Totals::default() }],
        )
    }

    #[test]
    fn stored_counters_are_loaded_despite_a_partial_write() {
        let dir = dir("round").join("made");
        assert!(load(&dir).unwrap().is_none());
        store(&dir, &saved()).unwrap();
        assert_eq!(load(&dir).unwrap(), Some(saved()));
        // A partial file, as after a power failure.
        fs::write(dir.join(TEMPORARY_FILE), b"{\"versi").unwrap();
        assert_eq!(load(&dir).unwrap(), Some(saved()));
        store(&dir, &saved()).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
        fs::remove_dir_all(dir.parent().unwrap()).unwrap();
    }

    #[test]
    fn damaged_file_is_renamed() {
        let dir = dir("damaged");
        fs::create_dir_all(&dir).unwrap();
        let whole = serde_json::to_string(&saved()).unwrap();
        let hours = format!("[{}]", vec![r#"{"start":0}"#; MAX_HOURS + 1].join(","));
        for text in [
            String::new(),
            whole[..whole.len() - 1].to_owned(),
            whole.replace("\"version\":1", "\"version\":0"),
            whole.replace("12", "-12"),
            whole.replace(&whole[whole.find("[{").unwrap()..whole.len() - 1], &hours),
            "[".repeat(100_000),
            " ".repeat(300_000),
        ] {
            fs::write(dir.join(FILE), &text).unwrap();
            let Err(LoadError::Damaged(why)) = load(&dir) else { panic!("{text:.80}") };
            assert!(why.contains("counters: damaged") && !why.contains('\n'), "{why}");
            assert_eq!(fs::read_to_string(dir.join(DAMAGED_FILE)).unwrap(), text);
            assert!(load(&dir).unwrap().is_none());
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn unreadable_or_later_file_is_not_renamed() {
        let dir = dir("later");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(FILE), r#"{"version":2,"what":"ever"}"#).unwrap();
        assert!(
            matches!(load(&dir), Err(LoadError::Unreadable(why)) if why.contains("later version"))
        );
        assert!(dir.join(FILE).exists());
        fs::remove_file(dir.join(FILE)).unwrap();
        fs::create_dir(dir.join(FILE)).unwrap();
        assert!(matches!(load(&dir), Err(LoadError::Unreadable(_))));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn store_in_a_file_instead_of_a_directory_is_an_error() {
        let dir = dir("file");
        fs::write(&dir, "a file where the directory should be").unwrap();
        assert!(store(&dir, &saved()).is_err());
        fs::remove_file(&dir).unwrap();
    }
}
