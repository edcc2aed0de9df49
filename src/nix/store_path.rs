//! Store paths and the store directory (Nix manual, "Store Path"). The types hold validated text
//! only.

use super::{Malformed, nix32};
use std::fmt;

/// The 32 Nix32 digits at the beginning of a store path's base name. It holds nothing else, so it
/// is safe in a file name, a URL, a packet and an SQL parameter.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HashPart([u8; HashPart::LEN]);

impl HashPart {
    /// Number of digits in a hash part.
    pub const LEN: usize = 32;

    /// The hash part whose digits are all zeros. No store path has it.
    pub const ZERO: HashPart = HashPart([b'0'; HashPart::LEN]);

    /// Parses exactly 32 Nix32 digits.
    ///
    /// # Errors
    /// Another length, or a byte that is no Nix32 digit.
    pub fn parse(text: &[u8]) -> Result<Self, Malformed> {
        let digits: [u8; Self::LEN] =
            text.try_into().map_err(|_| Malformed::new("hash part", "not 32 characters"))?;
        if !nix32::is_nix32(&digits) {
            return Err(Malformed::new("hash part", "not Nix32"));
        }
        Ok(HashPart(digits))
    }

    /// Number of bytes that a hash part encodes (160 bits).
    pub const BYTES: usize = 20;

    /// Encodes these bytes as a hash part. Every 20 bytes are valid.
    pub fn from_bytes(bytes: &[u8; Self::BYTES]) -> Self {
        // Nix32 writes the lowest five bits last, and five bytes are eight digits.
        let mut digits = [0; Self::LEN];
        for (group, five) in bytes.as_chunks::<5>().0.iter().enumerate() {
            let bits = five.iter().rev().fold(0, |bits, byte| bits << 8 | u64::from(*byte));
            for at in 0..8 {
                digits[Self::LEN - 1 - 8 * group - at] = nix32::digit((bits >> (5 * at)) as u8);
            }
        }
        HashPart(digits)
    }

    /// Returns the bytes that the digits encode.
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        for (group, five) in bytes.as_chunks_mut::<5>().0.iter_mut().enumerate() {
            let end = Self::LEN - 8 * group;
            let digits = &self.0[end - 8..end];
            let bits =
                digits.iter().fold(0, |bits, digit| bits << 5 | u64::from(nix32::value(*digit)));
            five.copy_from_slice(&bits.to_le_bytes()[..5]);
        }
        bytes
    }

    /// Returns digits 0 to 11 and 12 to 23 as two 60-bit numbers, the first digit highest.
    pub fn prefixes(&self) -> (u64, u64) {
        let number = |digits: &[u8]| {
            digits.iter().fold(0, |n, digit| n << 5 | u64::from(nix32::value(*digit)))
        };
        (number(&self.0[..12]), number(&self.0[12..24]))
    }

    /// Returns the 32 digits.
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("Nix32 digits are ASCII")
    }
}

impl fmt::Display for HashPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for HashPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A store path, held as its base name: `<hash part>-<name>`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StorePath(String);

impl StorePath {
    /// The longest name that Nix permits, in bytes; longer names are refused as unsupported.
    pub const MAX_NAME_LEN: usize = 211;

    /// Parses a base name.
    ///
    /// # Errors
    /// No hash part, no dash, or a name that Nix does not permit: empty, over 211 bytes, other
    /// characters than `0-9 a-z A-Z + - . _ ? =`, `.` or `..`, or beginning with `.-` or `..-`.
    pub fn parse(base_name: &str) -> Result<Self, Malformed> {
        const WHAT: &str = "store path";
        let bytes = base_name.as_bytes();
        if bytes.len() < HashPart::LEN + 2 || bytes[HashPart::LEN] != b'-' {
            return Err(Malformed::new(WHAT, "not a hash part, a dash and a name"));
        }
        HashPart::parse(&bytes[..HashPart::LEN])?;
        let name = &bytes[HashPart::LEN + 1..];
        if name.len() > Self::MAX_NAME_LEN {
            return Err(Malformed::unsupported(WHAT, "name longer than 211 bytes"));
        }
        let legal = |b: &u8| b.is_ascii_alphanumeric() || b"+-._?=".contains(b);
        if !name.iter().all(legal) {
            return Err(Malformed::new(WHAT, "a character that names do not have"));
        }
        // Nix permitted one and two leading dots until 2.20, which forbids these four forms.
        if name == b"." || name == b".." || name.starts_with(b".-") || name.starts_with(b"..-") {
            return Err(Malformed::unsupported(WHAT, "name is a dot directory"));
        }
        Ok(StorePath(base_name.to_owned()))
    }

    /// Returns `<hash part>-<name>`.
    pub fn base_name(&self) -> &str {
        &self.0
    }

    /// Returns the first 32 digits.
    pub fn hash_part(&self) -> HashPart {
        HashPart::parse(&self.0.as_bytes()[..HashPart::LEN]).expect("checked when parsed")
    }

    /// Returns the text after the dash.
    pub fn name(&self) -> &str {
        &self.0[HashPart::LEN + 1..]
    }

    /// Returns whether the name ends in `.drv`, as that of every derivation does.
    pub fn is_derivation(&self) -> bool {
        self.0.ends_with(".drv")
    }
}

impl fmt::Display for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for StorePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The store directory, almost always `/nix/store`: an absolute path without a slash at the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreDir(String);

impl StoreDir {
    /// Parses an absolute path; slashes at its end are removed.
    ///
    /// # Errors
    /// A relative path, the root directory, or a path with control characters.
    pub fn parse(dir: &str) -> Result<Self, Malformed> {
        const WHAT: &str = "store directory";
        let dir = dir.trim_end_matches('/');
        if !dir.starts_with('/') {
            return Err(Malformed::new(WHAT, "not an absolute path"));
        }
        if dir.bytes().any(|b| b.is_ascii_control()) {
            return Err(Malformed::new(WHAT, "has a control character"));
        }
        Ok(StoreDir(dir.to_owned()))
    }

    /// Returns the absolute path of the directory.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns `<store directory>/<base name>`.
    pub fn join(&self, path: &StorePath) -> String {
        format!("{}/{}", self.0, path.base_name())
    }

    /// Parses the absolute path of a store path in this directory. A file inside a store path is
    /// refused.
    ///
    /// # Errors
    /// A path elsewhere, or a malformed base name.
    pub fn parse_path(&self, absolute: &str) -> Result<StorePath, Malformed> {
        absolute
            .strip_prefix(self.0.as_str())
            .and_then(|rest| rest.strip_prefix('/'))
            .ok_or(Malformed::new("store path", "not in the store directory"))
            .and_then(StorePath::parse)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: &str = "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-konsole-18.12.3";

    #[test]
    fn hash_part_and_bytes_convert_as_nix32_does() {
        for seed in 0..=255u8 {
            let bytes: [u8; HashPart::BYTES] =
                std::array::from_fn(|at| seed.wrapping_mul(at as u8 ^ 0x5b));
            let hash_part = HashPart::from_bytes(&bytes);
            assert_eq!(hash_part.as_str(), nix32::encode(&bytes));
            assert_eq!(hash_part.to_bytes(), bytes);
            assert_eq!(nix32::decode(hash_part.as_str().as_bytes()).unwrap(), bytes);
        }
    }

    #[test]
    fn store_path_splits_and_joins() {
        let path = StorePath::parse(BASE).unwrap();
        assert_eq!(path.hash_part().as_str(), "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz");
        assert_eq!(path.name(), "konsole-18.12.3");
        let dir = StoreDir::parse("/nix/store/").unwrap();
        assert_eq!(dir.join(&path), format!("/nix/store/{BASE}"));
        assert_eq!(dir.parse_path(&dir.join(&path)), Ok(path));
    }

    #[test]
    fn malformed_store_path_is_refused() {
        for end in 0..34 {
            assert!(StorePath::parse(&BASE[..end]).is_err());
        }
        let hash = &BASE[..32];
        for name in [
            "",
            ".",
            "..",
            ".-x",
            "..-x",
            "a/b",
            "a\0b",
            "a b",
            "é",
            "../../etc/passwd",
            &"n".repeat(212),
        ] {
            assert!(StorePath::parse(&format!("{hash}-{name}")).is_err(), "{name}");
        }
        for name in [".x", "...", "a", "+-._?=", &"n".repeat(211)] {
            assert!(StorePath::parse(&format!("{hash}-{name}")).is_ok(), "{name}");
        }
        let dir = StoreDir::parse("/nix/store").unwrap();
        for bad in [BASE, "/nix/storex/7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-a", "/nix/store/.links"] {
            assert!(dir.parse_path(bad).is_err(), "{bad}");
        }
        assert!(StoreDir::parse("nix/store").is_err());
        assert!(StoreDir::parse("/").is_err());
    }

    #[test]
    fn hash_part_of_other_length_or_digits_is_refused() {
        for len in 0..=64 {
            assert_eq!(HashPart::parse(&vec![b'0'; len]).is_ok(), len == 32);
        }
        assert!(HashPart::parse(b"../../../../../../../../etc/passw").is_err());
        assert!(HashPart::parse(b"7h7qgvs4kgzsn8a6rb273saxyqh4jxlu").is_err());
        assert!(HashPart::parse(b"7H7qgvs4kgzsn8a6rb273saxyqh4jxlz").is_err());
    }
}
