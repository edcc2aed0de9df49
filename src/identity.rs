//! This node's key, by which trackers know it again: made at the first start, kept in the state
//! directory.
//!
//! One file, `identity`, of one line, `peerix-identity:<base64 of the 32 secret bytes>`. It is
//! never replaced: who has another key is another peer, with another peer's reputation.

use crate::wire::tracker::Identity;
use data_encoding::BASE64;
use rustix::fs::{AtFlags, Mode, OFlags, fsync, linkat, open, unlinkat};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const FILE: &str = "identity";
const PREFIX: &str = "peerix-identity:";
/// The line has 61 bytes.
const MAX_FILE: u64 = 256;

/// Reads the key in `state_dir`, or makes one if there is none.
///
/// # Errors
/// One line: what is wrong with which file, and what to do.
pub fn load(state_dir: &Path) -> Result<Identity, String> {
    let path = state_dir.join(FILE);
    let failed = |e: io::Error| {
        format!(
            "identity {}: {e}; --state-dir has to name a directory that this user can write",
            path.display()
        )
    };
    match read(&path) {
        Ok(seed) => return seed.map(|seed| Identity::from_seed(&seed)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let seed = new_seed()?;
    match write(state_dir, &seed) {
        Ok(()) => {
            log::info!("identity {}: made", path.display());
            Ok(Identity::from_seed(&seed))
        }
        // Another start was faster.
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
            read(&path).map_err(failed)?.map(|seed| Identity::from_seed(&seed))
        }
        Err(e) => Err(failed(e)),
    }
}

/// A key for this run only.
///
/// # Errors
/// The system has no random numbers.
pub fn for_this_run() -> Result<Identity, String> {
    new_seed().map(|seed| Identity::from_seed(&seed))
}

fn new_seed() -> Result<[u8; Identity::SEED_LEN], String> {
    Identity::random_seed().map_err(|_| "identity: no random numbers to be had".into())
}

fn read(path: &Path) -> io::Result<Result<[u8; Identity::SEED_LEN], String>> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    if meta.mode() & 0o077 != 0 {
        log::warn!("identity {}: others may read it; chmod 600 it", path.display());
    }
    let mut text = String::new();
    file.take(MAX_FILE).read_to_string(&mut text)?;
    let seed = text
        .trim_end()
        .strip_prefix(PREFIX)
        .and_then(|base64| BASE64.decode(base64.as_bytes()).ok());
    Ok(seed.and_then(|seed| seed.try_into().ok()).ok_or_else(|| {
        format!(
            "identity {}: damaged; put it back from a backup, or remove it to become a new peer to the trackers",
            path.display()
        )
    }))
}

/// Writes the file whole or not at all: under another name first, which is then linked to its own.
fn write(dir: &Path, seed: &[u8]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let dir = open(dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let random =
        Identity::random_seed().map_err(|_| io::Error::other("no random numbers to be had"))?;
    let temporary = format!("{FILE}.{}", data_encoding::HEXLOWER.encode(&random[..8]));
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let mut file =
        File::from(rustix::fs::openat(&dir, &*temporary, flags, Mode::RUSR | Mode::WUSR)?);
    let written = file
        .write_all(format!("{PREFIX}{}\n", BASE64.encode(seed)).as_bytes())
        .and_then(|()| file.sync_all())
        .and_then(|()| Ok(linkat(&dir, &*temporary, &dir, FILE, AtFlags::empty())?));
    let removed = unlinkat(&dir, &*temporary, AtFlags::empty());
    written?;
    removed?;
    Ok(fsync(&dir)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::path::PathBuf;

    fn dir(name: &str) -> PathBuf {
        let dir =
            std::env::temp_dir().join(format!("peerix-identity-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn made_once_and_kept() {
        let dir = dir("once");
        let first = load(&dir).unwrap();
        assert_eq!(fs::metadata(dir.join(FILE)).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing is left beside it");
        assert_eq!(load(&dir).unwrap().public(), first.public());
        assert_ne!(for_this_run().unwrap().public(), first.public());
        let id = first.peer_id();
        assert_eq!((id.len(), id.matches('-').count()), (36, 4));
        assert_eq!(load(&dir).unwrap().peer_id(), id);
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn two_starts_at_once_make_one() {
        let dir = dir("race");
        let keys: Vec<String> = std::thread::scope(|scope| {
            let starts: Vec<_> =
                (0..8).map(|_| scope.spawn(|| load(&dir).map(|i| i.public().to_owned()))).collect();
            starts.into_iter().map(|start| start.join().unwrap().unwrap()).collect()
        });
        let kept = load(&dir).unwrap();
        assert!(keys.iter().all(|key| key == kept.public()));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
        fs::remove_dir_all(&dir).unwrap();
    }

    /// A damaged key silently replaced would be another peer.
    #[test]
    fn what_is_damaged_or_unreadable_is_an_error_and_stays() {
        let dir = dir("damaged");
        fs::create_dir_all(&dir).unwrap();
        let file = dir.join(FILE);
        for text in [
            "",
            "peerix-identity:",
            "peerix-identity:AAAA\n",
            "something else",
            &"x".repeat(10_000),
        ] {
            fs::write(&file, text).unwrap();
            let error = load(&dir).unwrap_err();
            assert!(error.contains("identity: damaged") && !error.contains('\n'), "{error}");
            assert_eq!(fs::read_to_string(&file).unwrap(), text);
        }
        fs::write(&file, [0xff; 10]).unwrap();
        assert!(load(&dir).unwrap_err().contains("UTF-8"));
        fs::remove_file(&file).unwrap();
        fs::create_dir(&file).unwrap();
        assert!(load(&dir).is_err());
        fs::remove_dir_all(&dir).unwrap();
        fs::write(&dir, "a file where the directory should be").unwrap();
        assert!(load(&dir).unwrap_err().contains("--state-dir"));
        fs::remove_file(&dir).unwrap();
    }
}
