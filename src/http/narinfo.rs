//! Narinfos: of the own store, for peers; and of peers, for this machine's Nix.

use super::cache::Cache;
use super::route::View;
use crate::nix::{HashPart, PathInfo, SecretKey, Signature, StoreDir, narinfo};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

/// Signing takes 40 µs, more than all else in a narinfo, so signatures are kept; so many take about 2 MiB.
const SIGNATURES_KEPT: usize = 8192;

/// Signs paths of the own store, and nothing else: never what comes from a peer.
pub struct Signer {
    key: SecretKey,
    /// By fingerprint, which holds everything that is signed.
    kept: Mutex<HashMap<String, Signature>>,
}

impl Signer {
    pub(super) fn new(key: SecretKey) -> Self {
        Signer { key, kept: Mutex::default() }
    }

    fn sign(&self, info: &PathInfo, store_dir: &StoreDir) -> Signature {
        let fingerprint = info.fingerprint(store_dir);
        if let Some(signature) = self.lock().get(&fingerprint) {
            return signature.clone();
        }
        let signature = self.key.sign(fingerprint.as_bytes());
        let mut kept = self.lock();
        if kept.len() >= SIGNATURES_KEPT {
            kept.clear();
        }
        kept.insert(fingerprint, signature.clone());
        signature
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Signature>> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// One with more references than this is not made while others wait for it; most have ten.
pub(super) const MANY_REFERENCES: usize = 500;

/// Of a narinfo.
pub(super) const CONTENT_TYPE: &str = "text/x-nix-narinfo";

/// A valid path of this machine's store.
pub(super) fn own(cache: &Cache, info: &PathInfo, view: View) -> String {
    let signature = cache.signer.as_ref().map(|signer| signer.sign(info, &cache.store_dir));
    let root = match view {
        View::Peers => "local/",
        View::Cache => "",
    };
    print(cache, info, root, "none", signature.as_ref())
}

/// A path that a peer has.
pub(super) fn from_peer(cache: &Cache, hash_part: &HashPart) -> Option<String> {
    let found = cache.lookup.narinfo(hash_part)?;
    Some(print(cache, &found.info, "peer/", &found.compression, None))
}

/// The URL is the [`NarName`](super::route::NarName) below `root`.
fn print(cache: &Cache, info: &PathInfo, root: &str, compression: &str, signature: Option<&Signature>) -> String {
    let (hash_part, nar_hash) = (info.path.hash_part(), info.nar_hash.to_nix32());
    let url = [root, "nar/", hash_part.as_str(), "-", &nar_hash, ".nar"];
    narinfo::print(info, &url, compression, signature, &cache.store_dir)
}
