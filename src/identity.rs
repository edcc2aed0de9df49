//! This node's key pair, by which trackers and friends recognise it. The daemon creates it at the
//! first start and keeps it in the state directory.
//!
//! The file `identity` has one line, `peerix-identity:<base64 of the 32 secret bytes>`. An existing
//! file is never replaced: with another key, the node would be a new peer without its reputation.

use crate::wire::tracker::Identity;
use data_encoding::BASE64;
use rustix::fs::{AtFlags, Mode, OFlags, fsync, linkat, open, unlinkat};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

const FILE: &str = "identity";
const PREFIX: &str = "peerix-identity:";
/// Number of hexadecimal digits at the end of a temporary file's name.
const SUFFIX_LEN: usize = 16;
/// Maximum size that is read, in bytes; a longer file counts as damaged. The line has 61 bytes.
const MAX_FILE_BYTES: u64 = 256;

/// Loads the key pair from `state_dir`, or creates it if the file is missing. Blocks on the disk.
///
/// # Errors
/// One line that names the file, the fault and the remedy: the file is unreadable or damaged, or
/// cannot be written.
pub fn load(state_dir: &Path) -> Result<Identity, String> {
    let path = state_dir.join(FILE);
    let failed = |e: io::Error| {
        format!(
            "identity {}: {e}; --state-dir has to name a directory that this user can write",
            path.display()
        )
    };
    let seed = match read(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let seed = new_seed()?;
            match write(state_dir, &seed) {
                Ok(()) => {
                    log::info!("identity {}: made", path.display());
                    seed
                }
                // Another process may have created the file since.
                Err(e) => read(&path).map_err(|_| failed(e))??,
            }
        }
        seed => seed.map_err(failed)??,
    };
    if let Err(e) = remove_temporaries(state_dir) {
        log::warn!("identity {}: temporary files beside it: {e}", path.display());
    }
    Ok(Identity::from_seed(&seed))
}

/// Removes temporary files of processes that were killed in `write`; they contain secret keys. It
/// is called only when the identity exists, so that a process which is still writing fails in any
/// case, and reads the identity instead.
///
/// # Errors
/// The system's error.
fn remove_temporaries(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let suffix = name.to_str().and_then(|name| name.strip_prefix(FILE)?.strip_prefix('.'));
        let is_temporary = suffix.is_some_and(|suffix| {
            suffix.len() == SUFFIX_LEN && suffix.bytes().all(|b| b.is_ascii_hexdigit())
        });
        if is_temporary {
            match fs::remove_file(entry.path()) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Creates a key pair that is not saved.
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
    file.take(MAX_FILE_BYTES).read_to_string(&mut text)?;
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

/// Writes the file atomically: writes and syncs a temporary file and links it to the final name.
/// Fails with [`io::ErrorKind::AlreadyExists`] if the file exists.
fn write(dir: &Path, seed: &[u8]) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let dir = open(dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let random =
        Identity::random_seed().map_err(|_| io::Error::other("no random numbers to be had"))?;
    let random = data_encoding::HEXLOWER.encode(&random[..SUFFIX_LEN / 2]);
    let temporary = format!("{FILE}.{random}");
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
    fn identity_is_created_once_and_kept() {
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
    fn concurrent_starts_create_one_identity() {
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

    #[test]
    fn temporary_files_of_killed_processes_are_removed() {
        let dir = dir("killed");
        fs::create_dir_all(&dir).unwrap();
        let (left, other) = (dir.join("identity.0123456789abcdef"), dir.join("identity.old"));
        for exists in [false, true] {
            for file in [&left, &other] {
                fs::write(file, "peerix-identity:").unwrap();
            }
            assert_eq!(dir.join(FILE).exists(), exists);
            load(&dir).unwrap();
            assert!(!left.exists() && other.exists());
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    /// Replacing a damaged key would turn this node into another peer.
    #[test]
    fn damaged_identity_is_an_error_and_not_replaced() {
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
