//! Keys and signatures in the notation of Nix, `name:base64` (Nix manual, "nix-store
//! --generate-binary-cache-key" and "Signatures"). The algorithm is ed25519 (RFC 8032).

use super::Malformed;
use data_encoding::BASE64;
use ed25519_compact as ed25519;
use std::fmt;

/// A detached ed25519 signature and the name of its key.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature {
    name: String,
    bytes: [u8; 64],
}

impl Signature {
    /// Parses `name:base64`.
    ///
    /// # Errors
    /// No colon, no name, a name with white space or control characters, or other than 64 bytes of
    /// base64.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let (name, bytes) = split("signature", text)?;
        let bytes = bytes.try_into().map_err(|_| Malformed::new("signature", "not 64 bytes"))?;
        Ok(Signature { name, bytes })
    }

    /// Returns the name of the key.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Appends `name:base64`.
    pub fn append_to(&self, out: &mut String) {
        out.push_str(&self.name);
        out.push(':');
        BASE64.encode_append(&self.bytes, out);
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode_display(&self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A key that verifies signatures, such as `cache.nixos.org-1:6NCH…`.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: String,
    key: ed25519::PublicKey,
}

impl PublicKey {
    /// Parses `name:base64`.
    ///
    /// # Errors
    /// No colon, no name, a name with white space or control characters, or other than 32 bytes of
    /// base64.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        let (name, bytes) = split("public key", text)?;
        let key = ed25519::PublicKey::from_slice(&bytes)
            .map_err(|_| Malformed::new("public key", "not 32 bytes"))?;
        Ok(PublicKey { name, key })
    }

    /// Returns the name of the key, which its signatures carry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether `signature` carries this key's name and is valid for exactly `message`.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        self.name == signature.name
            && self.key.verify(message, &ed25519::Signature::new(signature.bytes)).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name, BASE64.encode_display(&*self.key))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A key that makes signatures. It is never printed: it has no `Display`, and its `Debug` shows
/// only the name.
pub struct SecretKey {
    name: String,
    key: ed25519::SecretKey,
}

impl SecretKey {
    /// Parses `name:base64`, where the base64 is the seed followed by the public key. White space
    /// at the end of `text` is ignored.
    ///
    /// # Errors
    /// No colon, no name, a name with white space or control characters, other than 64 bytes of
    /// base64, or a public key that does not belong to the seed: such a key would make signatures
    /// that nothing verifies.
    pub fn parse(text: &str) -> Result<Self, Malformed> {
        const WHAT: &str = "secret key";
        let (name, bytes) = split(WHAT, text.trim_end())?;
        let key = ed25519::SecretKey::from_slice(&bytes)
            .map_err(|_| Malformed::new(WHAT, "not 64 bytes"))?;
        key.validate_public_key(&key.public_key())
            .map_err(|_| Malformed::new(WHAT, "public half does not belong to its seed"))?;
        Ok(SecretKey { name, key })
    }

    /// Signs `message`. ed25519 is deterministic, so the signature equals the one that Nix makes.
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature { name: self.name.clone(), bytes: *self.key.sign(message, None) }
    }

    /// Returns the key that verifies this key's signatures.
    pub fn public(&self) -> PublicKey {
        PublicKey { name: self.name.clone(), key: self.key.public_key() }
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({})", self.name)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden;

    #[test]
    fn signature_equals_that_of_nix() {
        let secret = SecretKey::parse(golden::SECRET_KEY).unwrap();
        assert_eq!(secret.public().to_string(), golden::PUBLIC_KEY);
        let mut compared = 0;
        for narinfo in golden::narinfos() {
            let message = narinfo.info.fingerprint(&golden::store_dir());
            for signature in narinfo.info.signatures.iter().filter(|s| s.name() == "test.example-1")
            {
                assert_eq!(secret.sign(message.as_bytes()), *signature, "{message}");
                compared += 1;
            }
        }
        assert_eq!(compared, 4);
    }

    #[test]
    fn signature_with_changed_bit_name_or_message_is_refused() {
        let public = PublicKey::parse(golden::PUBLIC_KEY).unwrap();
        let signature = SecretKey::parse(golden::SECRET_KEY).unwrap().sign(b"message");
        assert!(public.verify(b"message", &signature));
        assert!(!public.verify(b"messagf", &signature));
        let renamed = |text: String| text.replacen("test.example-1", "test.example-2", 1);
        assert!(
            !public.verify(b"message", &Signature::parse(&renamed(signature.to_string())).unwrap())
        );
        assert!(
            !PublicKey::parse(&renamed(public.to_string())).unwrap().verify(b"message", &signature)
        );
        for bit in 0..512 {
            let mut wrong = signature.clone();
            wrong.bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(!public.verify(b"message", &wrong), "bit {bit}");
        }
    }

    #[test]
    fn malformed_key_is_refused() {
        assert!(SecretKey::parse(&format!("{}\n", golden::SECRET_KEY)).is_ok());
        for end in 0..golden::SECRET_KEY.len() {
            assert!(SecretKey::parse(&golden::SECRET_KEY[..end]).is_err());
        }
        for end in 0..golden::PUBLIC_KEY.len() {
            assert!(PublicKey::parse(&golden::PUBLIC_KEY[..end]).is_err());
            assert!(Signature::parse(&golden::PUBLIC_KEY[..end]).is_err());
        }
        assert!(PublicKey::parse(golden::SECRET_KEY).is_err());
        assert!(SecretKey::parse(golden::PUBLIC_KEY).is_err());
        let (_, mut bytes) = split("secret key", golden::SECRET_KEY).unwrap();
        for at in [0, 63] {
            bytes[at] ^= 1;
            let why = SecretKey::parse(&format!("n:{}", BASE64.encode(&bytes))).unwrap_err().why;
            assert_eq!(why, "public half does not belong to its seed");
            bytes[at] ^= 1;
        }
        assert!(SecretKey::parse(&format!("n:{}", BASE64.encode(&[0; 64]))).is_err());
    }

    #[test]
    fn secret_key_debug_shows_only_name() {
        let secret = SecretKey::parse(golden::SECRET_KEY).unwrap();
        assert_eq!(format!("{secret:?}"), "SecretKey(test.example-1)");
    }
}
