//! Saves the paces of peers across restarts, in the file `paces` of the state directory. The file
//! is JSON and is replaced atomically.

use super::health::PeerKey;
use super::pace::Paces;
use crate::stats::Network;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

const FILE: &str = "paces";
/// Temporary file while the paces are written. A leftover one is overwritten.
const TEMPORARY_FILE: &str = "paces.new";
/// Largest number of saved peers: as many as a node is likely to meet again. Further ones are not
/// saved.
const MAX_PEERS: usize = 256;
/// Largest file, in bytes. A full file has about 20 KiB; a larger one than this is ignored.
const MAX_FILE_BYTES: u64 = 64 * 1024;

#[derive(Serialize, Deserialize)]
struct SavedPaces {
    address: SocketAddr,
    is_far: bool,
    bytes_per_second: f64,
}

/// Writes the known paces to `dir`. Leaves the file of the last run unchanged if none is known.
///
/// # Errors
/// Errors of the file system. The old file is unchanged then.
pub fn save(paces: &Paces, dir: &Path) -> io::Result<()> {
    let saved = |(peer_key, bytes_per_second): (PeerKey, f64)| SavedPaces {
        address: peer_key.address(),
        is_far: peer_key.network() == Network::Wan,
        bytes_per_second,
    };
    let all: Vec<SavedPaces> =
        paces.known_paces(Instant::now()).into_iter().take(MAX_PEERS).map(saved).collect();
    if all.is_empty() {
        return Ok(());
    }
    fs::write(dir.join(TEMPORARY_FILE), serde_json::to_vec(&all).map_err(io::Error::other)?)?;
    fs::rename(dir.join(TEMPORARY_FILE), dir.join(FILE))
}

/// Reads the paces of the last run from `dir`. Ignores an unreadable file, because paces are soon
/// measured again.
pub fn load(paces: &Paces, dir: &Path) {
    let mut bytes = Vec::new();
    let read = File::open(dir.join(FILE))
        .and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes));
    if read.is_err() || bytes.len() as u64 > MAX_FILE_BYTES {
        return;
    }
    let all: Vec<SavedPaces> = serde_json::from_slice(&bytes).unwrap_or_default();
    let now = Instant::now();
    for SavedPaces { address, is_far, bytes_per_second } in all.into_iter().take(MAX_PEERS) {
        let peer_key = if is_far { PeerKey::far(address) } else { address.into() };
        paces.restore(peer_key, bytes_per_second, now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn saved_paces_are_restored_and_damaged_file_is_ignored() {
        let dir = std::env::temp_dir().join(format!("peerix-paces-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (paces, now) = (Paces::default(), Instant::now());
        let near = PeerKey::from(SocketAddr::from(([10, 0, 0, 1], 12304)));
        let far = PeerKey::far(SocketAddr::from(([203, 0, 113, 1], 999)));
        for (peer_key, millis) in [(near, 100), (far, 1000)] {
            paces
                .begin(peer_key, 1 << 20, now)
                .record_bytes(1 << 20, now + Duration::from_millis(millis));
        }
        save(&paces, &dir).unwrap();
        let next = Paces::default();
        load(&next, &dir);
        let known = |paces: &Paces, peer_key| paces.load(peer_key, Instant::now()).pace.known;
        assert!(known(&next, near).unwrap() > 9e6 && known(&next, far).unwrap() < 2e6);
        for damage in ["", "[", "[{}]", "{\"address\":1}"] {
            fs::write(dir.join(FILE), damage).unwrap();
            let next = Paces::default();
            load(&next, &dir);
            assert!(next.known_paces(Instant::now()).is_empty());
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}
