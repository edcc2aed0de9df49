//! SHA-256 hashes of NARs in the notations of Nix (Nix manual, "nix-hash" and
//! "Content-addressing").

use super::{Malformed, nix32};
use data_encoding::{BASE64, HEXLOWER_PERMISSIVE};
use std::fmt;

/// The SHA-256 of a NAR. `Display` writes `sha256:<Nix32>`, as in narinfos and fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NarHash([u8; 32]);

const WHAT: &str = "NAR hash";
const NIX32_LEN: usize = 52;

impl NarHash {
    /// Wraps the 32 bytes of the digest.
    pub fn from_bytes(digest: [u8; 32]) -> Self {
        NarHash(digest)
    }

    /// Returns the 32 bytes of the digest.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Parses `sha256:<Nix32>` (narinfo), `sha256:<hex>` (Nix's database) or `sha256-<base64>`
    /// (SRI).
    ///
    /// # Errors
    /// Another algorithm (unsupported), or digits of a wrong length or alphabet.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        if let Some(base64) = text.strip_prefix("sha256-") {
            let bytes =
                BASE64.decode(base64.as_bytes()).map_err(|_| Malformed::new(WHAT, "not base64"))?;
            return Self::from_slice(&bytes);
        }
        let Some(digits) = text.strip_prefix("sha256:") else {
            return Err(Malformed::unsupported(WHAT, "not sha256"));
        };
        match digits.len() {
            NIX32_LEN => Self::from_nix32(digits),
            64 => {
                let bytes = HEXLOWER_PERMISSIVE
                    .decode(digits.as_bytes())
                    .map_err(|_| Malformed::new(WHAT, "not hexadecimal"))?;
                Self::from_slice(&bytes)
            }
            _ => Err(Malformed::new(WHAT, "neither 52 Nix32 nor 64 hexadecimal digits")),
        }
    }

    /// Parses 52 Nix32 digits without a prefix, as in the NAR URLs of peerix.
    ///
    /// # Errors
    /// The text is not 52 Nix32 digits, or they encode more than 256 bits.
    pub fn from_nix32(digits: &str) -> Result<Self, Malformed> {
        if digits.len() != NIX32_LEN {
            return Err(Malformed::new(WHAT, "not 52 Nix32 digits"));
        }
        Self::from_slice(&nix32::decode(digits.as_bytes())?)
    }

    /// Returns the 52 Nix32 digits without a prefix.
    pub fn to_nix32(self) -> String {
        nix32::encode(&self.0)
    }

    fn from_slice(bytes: &[u8]) -> Result<Self, Malformed> {
        bytes.try_into().map(NarHash).map_err(|_| Malformed::new(WHAT, "not 32 bytes"))
    }
}

impl fmt::Display for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.to_nix32())
    }
}

impl fmt::Debug for NarHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // One hash in three notations, printed by `nix-hash --to-base32` and `nix hash to-sri` (Nix
    // 2.8).
    const NIX32: &str = "sha256:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";
    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    const SRI: &str = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=";

    #[test]
    fn every_notation_parses_to_same_hash() {
        let hash = NarHash::parse(NIX32).unwrap();
        assert_eq!(NarHash::parse(HEX).unwrap(), hash);
        assert_eq!(NarHash::parse(&HEX.to_uppercase().replace("SHA256", "sha256")).unwrap(), hash);
        assert_eq!(NarHash::parse(SRI).unwrap(), hash);
        assert_eq!(hash.to_string(), NIX32);
        assert_eq!(NarHash::from_nix32(&NIX32[7..]).unwrap(), hash);
    }

    #[test]
    fn truncated_or_unknown_notation_is_refused() {
        for good in [NIX32, HEX, SRI] {
            for end in 0..good.len() {
                assert!(NarHash::parse(&good[..end]).is_err(), "{}", &good[..end]);
            }
            assert!(NarHash::parse(&format!("{good}0")).is_err());
        }
        for bad in [
            "md5:0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73",
            "sha256:é",
            "sha256-é",
            "sha512-AAAA",
        ] {
            assert!(NarHash::parse(bad).is_err(), "{bad}");
        }
    }
}
