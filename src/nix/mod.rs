//! Formats that Nix defines, as pure functions: they parse text and bytes into typed values and
//! print these. No I/O.

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

/// A parse error. It holds no part of the input, which may come from a hostile peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed {
    /// The thing that was parsed: "hash part", "narinfo".
    pub what: &'static str,
    /// What is wrong with it: "not 32 characters".
    pub why: &'static str,
    /// Whether the input may be valid but exceeds what peerix or some version of Nix handles. Such
    /// an input is no evidence against its sender.
    pub is_unsupported: bool,
}

impl Malformed {
    pub(crate) const fn new(what: &'static str, why: &'static str) -> Self {
        Malformed { what, why, is_unsupported: false }
    }

    /// An error with [`Malformed::is_unsupported`] set.
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
