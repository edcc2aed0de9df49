//! What Nix knows of a valid path.

use super::{NarHash, Signature, StorePath};

/// The facts that Nix's database holds of a valid path and that a narinfo carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathInfo {
    /// The path itself.
    pub path: StorePath,
    /// Hash of its NAR.
    pub nar_hash: NarHash,
    /// Bytes in its NAR.
    pub nar_size: u64,
    /// The store paths it refers to, itself perhaps among them; sorted, each once.
    pub references: Vec<StorePath>,
    /// The derivation that made it, where that is known.
    pub deriver: Option<StorePath>,
    /// Every stored signature, in the stored order.
    pub signatures: Vec<Signature>,
    /// The content address (`fixed:r:sha256:…`, `text:sha256:…`), for content-addressed paths.
    pub ca: Option<String>,
}
