//! The binary cache that this node offers to peers and to this machine's Nix.

use super::crowd::Crowds;
use super::error::{NOT_THERE, RequestError};
use super::narinfo::Signer;
use super::response::Exchange;
use super::stream_limits::StreamLimits;
use crate::access::{AccessPolicy, Scope};
use crate::config::Config;
use crate::fetch::Downloader;
use crate::log_throttle::LogThrottle;
use crate::lookup::LookupService;
use crate::nix::{HashPart, PathInfo, StoreDir, StorePath};
use crate::stats::Stats;
use crate::store::{Store, StoreError};
use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Instant;

/// What this node serves: the own store, and the paths of peers.
pub struct BinaryCache {
    /// Contents of nix-cache-info.
    pub info: CacheInfo,
    /// This machine's store.
    pub store: Arc<Store>,
    /// Decides which paths each asker may have.
    pub access: Arc<AccessPolicy>,
    /// Finds paths at peers.
    pub lookup: Arc<LookupService>,
    /// Downloads NARs from peers.
    pub downloader: Downloader,
    /// Signs narinfos of the own store. Empty until the secret key has been read.
    pub signer: Arc<OnceLock<Signer>>,
    /// Limits concurrent NARs, listings and logs.
    pub stream_limits: StreamLimits,
    /// Tracks the neighbours that are downloading a large NAR.
    pub crowds: Crowds,
    /// Counts the transfers to peers.
    pub stats: Arc<Stats>,
    /// Limits log messages about the own store.
    pub faults: LogThrottle,
}

/// Contents of nix-cache-info.
pub struct CacheInfo {
    /// `StoreDir`.
    pub(super) store_dir: StoreDir,
    /// `Priority`.
    priority: u32,
}

impl BinaryCache {
    /// Returns a valid path of the own store, or [`NOT_THERE`] if there is none or the asker may
    /// not have it. Blocks up to 5 s for the database, and for WAN up to 15 s more for the upstream
    /// cache.
    pub(super) fn path_info(
        &self,
        hash_part: &HashPart,
        scope: Scope,
    ) -> Result<Arc<PathInfo>, RequestError> {
        let info = self.found_or_not_there(self.store.path_info(hash_part))?;
        if self.access.allows(scope, &info) { Ok(info) } else { Err(NOT_THERE) }
    }

    /// Returns [`NOT_THERE`] unless `path` is a valid path of the own store that the asker may
    /// have. Blocks for at most 5 s on the database, and for a stranger for up to 15 s on the
    /// upstream cache.
    pub(super) fn check_path(&self, path: &StorePath, scope: Scope) -> Result<(), RequestError> {
        let info = self.path_info(&path.hash_part(), scope)?;
        if info.path == *path { Ok(()) } else { Err(NOT_THERE) }
    }

    /// The result of a query of the own store, or [`NOT_THERE`] if there is none. A row that peerix
    /// cannot represent is logged; it is no failure of the store as a whole.
    pub(super) fn found_or_not_there<T>(
        &self,
        result: Result<Option<T>, StoreError>,
    ) -> Result<T, RequestError> {
        match result {
            Err(e @ StoreError::Row { .. }) => {
                self.warn(format_args!("{e}"));
                Err(NOT_THERE)
            }
            result => result?.ok_or(NOT_THERE),
        }
    }

    /// Logs why a valid path cannot be read from the store, and returns a 404 for it.
    pub(super) fn not_served(&self, path: &StorePath, why: &dyn fmt::Display) -> RequestError {
        self.warn(format_args!("{path}: {why}"));
        NOT_THERE
    }

    /// Logs a problem of the own store, at a limited rate.
    pub(super) fn warn(&self, what: fmt::Arguments<'_>) {
        if self.faults.allow(Instant::now()) {
            log::warn!("{what}");
        }
    }
}

impl CacheInfo {
    /// Takes the contents from the settings of the node.
    pub fn new(config: &Config) -> CacheInfo {
        CacheInfo { store_dir: config.store_dir.clone(), priority: config.priority }
    }

    pub(super) fn send(&self, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let (dir, priority) = (self.store_dir.as_str(), self.priority);
        let text = format!("StoreDir: {dir}\nWantMassQuery: 1\nPriority: {priority}\n");
        exchange.send(200, &[("Content-Type", "text/x-nix-cache-info")], text.as_bytes())
    }
}
