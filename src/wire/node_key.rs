//! The public key by which nodes know one another, and what is made of it so that only friends
//! recognise it.

use crate::nix::Malformed;
use data_encoding::{BASE64, HEXLOWER};
use ring::digest::{Context, SHA256};
use std::fmt;
use std::str::FromStr;

/// In front of a key for people.
const PREFIX: &str = "ed25519:";

/// In front of a SubjectPublicKeyInfo's 32 bytes of key (RFC 8410, section 4).
const INFO_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The public ed25519 key of a node's identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeKey([u8; 32]);

/// What a *hello* carries so that friends recognise its sender.
pub type HelloDigest = [u8; 16];

impl NodeKey {
    /// These bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        NodeKey(bytes)
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key as TLS carries it (RFC 7250).
    pub fn to_info(&self) -> Vec<u8> {
        [&INFO_PREFIX[..], &self.0].concat()
    }

    /// Reads what [`NodeKey::to_info`] writes; `None` for any other key.
    pub fn from_info(info: &[u8]) -> Option<Self> {
        info.strip_prefix(&INFO_PREFIX)?.try_into().ok().map(NodeKey)
    }

    /// The first 16 bytes of the SHA-256 of key and instance ID: whoever knows the key can tell
    /// that it is meant, and nobody else can tell two starts of a node from two nodes.
    pub fn digest(&self, instance: &[u8; 8]) -> HelloDigest {
        let digest = sha256(&[&self.0, instance]);
        *digest.first_chunk().expect("SHA-256 has more bytes")
    }

    /// The tag under which two friends find one another at a tracker, 64 hexadecimal digits. Both
    /// keys are in it, so that only who knows both can look it up; and the tracker's name (host and
    /// port), so that trackers cannot compare.
    pub fn tag(&self, other: &NodeKey, tracker: &str) -> String {
        let (low, high) = (self.min(other), self.max(other));
        HEXLOWER.encode(&sha256(&[b"peerix friends 1\n", &low.0, &high.0, tracker.as_bytes()]))
    }
}

fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    let mut context = Context::new(&SHA256);
    parts.iter().for_each(|part| context.update(part));
    context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes")
}

impl fmt::Display for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", BASE64.encode(&self.0))
    }
}

impl fmt::Debug for NodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for NodeKey {
    type Err = Malformed;

    /// Reads `ed25519:` and 44 digits of base64.
    fn from_str(text: &str) -> Result<Self, Malformed> {
        let bytes =
            text.strip_prefix(PREFIX).and_then(|base64| BASE64.decode(base64.as_bytes()).ok());
        let key = bytes.and_then(|bytes| bytes.try_into().ok()).map(NodeKey);
        key.ok_or(Malformed::new(
            "key",
            "not ed25519: and 44 digits of base64, as peerix identity prints it",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_tls_form_come_back() {
        let key = NodeKey([7; 32]);
        assert_eq!(key.to_string(), "ed25519:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=");
        assert_eq!(key.to_string().parse(), Ok(key));
        assert_eq!(NodeKey::from_info(&key.to_info()), Some(key));
        for text in [
            "",
            "ed25519:",
            "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc=",
            "ed25519:BwcH",
            "rsa:BwcH",
        ] {
            assert!(text.parse::<NodeKey>().is_err(), "{text}");
        }
        let info = key.to_info();
        assert_eq!(NodeKey::from_info(&info[..43]), None);
        assert_eq!(NodeKey::from_info(&[&info[..], &[0]].concat()), None);
    }

    #[test]
    fn digests_differ_with_key_and_instance() {
        let (a, b) = (NodeKey([1; 32]), NodeKey([2; 32]));
        let digests = [a.digest(&[1; 8]), a.digest(&[2; 8]), b.digest(&[1; 8])];
        assert!(digests[0] != digests[1] && digests[0] != digests[2]);
    }

    #[test]
    fn tag_is_the_same_for_both_and_another_at_another_tracker() {
        let (a, b, c) = (NodeKey([1; 32]), NodeKey([2; 32]), NodeKey([3; 32]));
        let tag = a.tag(&b, "tracker.example:12305");
        assert_eq!(tag, b.tag(&a, "tracker.example:12305"));
        assert_eq!(tag.len(), 64);
        assert!(
            tag != a.tag(&c, "tracker.example:12305") && tag != a.tag(&b, "other.example:12305")
        );
    }
}
