//! Keys and signatures as Nix writes them: `name:base64` (Nix manual, "nix-store --generate-binary-cache-key"
//! and "Signatures").

use super::Malformed;
use data_encoding::BASE64;
use std::fmt;

/// A detached ed25519 signature and the name of the key that made it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature {
    name: String,
    bytes: [u8; 64],
}

impl Signature {
    /// Reads `name:base64`.
    ///
    /// # Errors
    /// No colon, no name, a name with white space, or other than 64 bytes of base64.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let (name, bytes) = split("signature", text)?;
        let bytes = bytes.try_into().map_err(|_| Malformed::new("signature", "not 64 bytes"))?;
        Ok(Signature { name, bytes })
    }

    /// The name of the key.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode(&self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn split(what: &'static str, text: &str) -> Result<(String, Vec<u8>), Malformed> {
    let (name, base64) = text.split_once(':').ok_or(Malformed::new(what, "not name:base64"))?;
    if name.is_empty() || name.bytes().any(|b| b <= b' ' || b == 0x7f) {
        return Err(Malformed::new(what, "no name, or one with white space"));
    }
    let bytes = BASE64.decode(base64.as_bytes()).map_err(|_| Malformed::new(what, "not base64"))?;
    Ok((name.to_owned(), bytes))
}
