//! Formats that Nix defines. No I/O happens here: text and bytes in, typed values out, and back.

mod content_address;
mod framing;
#[cfg(test)]
pub(crate) mod golden;
mod hash;
pub mod listing;
pub mod nar;
pub mod narinfo;
pub mod nix32;
mod path_info;
mod realisation;
mod signature;
mod store_path;

pub use content_address::{is_content_addressed, is_known_to_every_nix};
pub use framing::Framing;
pub use hash::NarHash;
pub use narinfo::NarInfo;
pub use path_info::PathInfo;
pub use realisation::{DerivationId, DrvOutput, Realisation};
pub use signature::{PublicKey, SecretKey, Signature};
pub use store_path::{HashPart, StoreDir, StorePath};

use std::fmt;

/// Text that is not what its format says. Holds no part of that text, as it may come from a hostile
/// peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    /// The thing that was to be read: "hash part", "narinfo".
    pub what: &'static str,
    /// What is wrong with it: "not 32 characters".
    pub why: &'static str,
    /// Whether it may be true, but is beyond what peerix or Nix handles. Then it says nothing about
    /// who sent it.
    pub is_unsupported: bool,
}

impl Malformed {
    pub(crate) const fn new(what: &'static str, why: &'static str) -> Self {
        Malformed { what, why, is_unsupported: false }
    }

    /// The thing may be true, but is beyond what peerix or Nix handles.
    pub(crate) const fn unsupported(what: &'static str, why: &'static str) -> Self {
        Malformed { what, why, is_unsupported: true }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)
    }
}

impl std::error::Error for Malformed {}
