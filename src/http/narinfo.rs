//! Narinfos: of the own store, for peers; and of peers, for this machine's Nix.

use super::cache::Cache;
use super::response::Answer;
use super::route::{NarName, View};
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

/// A valid path of this machine's store.
pub(super) fn own(cache: &Cache, info: &PathInfo, view: View) -> Answer {
    let signature = cache.signer.as_ref().map(|signer| signer.sign(info, &cache.store_dir));
    let root = match view {
        View::Peers => "local/",
        View::Cache => "",
    };
    answer(cache, info, root, "none", signature.as_ref())
}

/// A path that a peer has.
pub(super) fn from_peer(cache: &Cache, hash_part: &HashPart) -> Option<Answer> {
    let found = cache.lookup.narinfo(hash_part)?;
    Some(answer(cache, &found.info, "peer/", &found.compression, None))
}

fn answer(cache: &Cache, info: &PathInfo, root: &str, compression: &str, signature: Option<&Signature>) -> Answer {
    let name = NarName { hash_part: info.path.hash_part(), nar_hash: info.nar_hash }.to_string();
    let text = narinfo::print(info, &[root, "nar/", &name], compression, signature, &cache.store_dir);
    Answer::new(200, "text/x-nix-narinfo", text.into())
}
