//! Narinfos: of the own store, for peers; and of peers, for this machine's Nix.

use super::cache::{Cache, Failure, NOT_THERE};
use super::response::Exchange;
use super::route::{NarName, View};
use crate::nix::{HashPart, NarInfo, PathInfo, SecretKey, Signature, StoreDir};
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

/// A valid path of this machine's store.
pub(super) fn own(cache: &Cache, mut info: PathInfo, view: View, exchange: &mut Exchange<'_>) -> Result<(), Failure> {
    if let Some(signer) = &cache.signer {
        let signature = signer.sign(&info, &cache.store_dir);
        if !info.signatures.contains(&signature) {
            info.signatures.push(signature);
        }
    }
    let name = NarName { hash_part: info.path.hash_part(), nar_hash: info.nar_hash };
    let url = match view {
        View::Peers => format!("local/nar/{name}"),
        View::Cache => format!("nar/{name}"),
    };
    send(cache, &NarInfo { info, url, compression: "none".into() }, exchange)
}

/// A path that a peer has.
pub(super) fn from_peer(cache: &Cache, hash_part: &HashPart, exchange: &mut Exchange<'_>) -> Result<(), Failure> {
    let mut narinfo = cache.lookup.narinfo(hash_part).ok_or(NOT_THERE)?;
    let name = NarName { hash_part: *hash_part, nar_hash: narinfo.info.nar_hash };
    narinfo.url = format!("peer/nar/{name}");
    send(cache, &narinfo, exchange)
}

fn send(cache: &Cache, narinfo: &NarInfo, exchange: &mut Exchange<'_>) -> Result<(), Failure> {
    let text = narinfo.print(&cache.store_dir);
    Ok(exchange.send(200, &[("Content-Type", "text/x-nix-narinfo")], text.as_bytes())?)
}
