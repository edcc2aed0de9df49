//! The public key that identifies a node, and the digests of it by which only friends recognise it.

use super::tracker_name::TrackerName;
use crate::nix::Malformed;
use data_encoding::{BASE64, HEXLOWER};
use ring::digest::{Context, SHA256};
use std::fmt;
use std::str::FromStr;

/// Prefix of the text form.
const PREFIX: &str = "ed25519:";

/// DER prefix of an ed25519 SubjectPublicKeyInfo, before the 32 bytes of the key (RFC 8410, section
/// 4).
const INFO_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The public ed25519 key of a node's identity.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeKey([u8; 32]);

/// Sent in a *hello* so that friends recognise its sender; see [`NodeKey::digest`].
pub type HelloDigest = [u8; 16];

impl NodeKey {
    /// Wraps the 32 bytes of a public key. Does not check that they are a valid point.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        NodeKey(bytes)
    }

    /// The 32 bytes of the key.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The key as a SubjectPublicKeyInfo, as TLS carries raw public keys (RFC 7250).
    pub fn to_info(&self) -> Vec<u8> {
        [&INFO_PREFIX[..], &self.0].concat()
    }

    /// Parses the output of [`NodeKey::to_info`]; `None` for any other kind of key.
    pub fn from_info(info: &[u8]) -> Option<Self> {
        info.strip_prefix(&INFO_PREFIX)?.try_into().ok().map(NodeKey)
    }

    /// Returns the first 16 bytes of the SHA-256 of key and instance ID. Only nodes that know the
    /// key can recognise it. Others cannot tell two starts of one node from two nodes.
    pub fn digest(&self, instance: &[u8; 8]) -> HelloDigest {
        let digest = sha256(&[&self.0, instance]);
        *digest.first_chunk().expect("SHA-256 has more bytes")
    }

    /// Returns the tag under which two friends find each other at a tracker, 64 hexadecimal digits.
    /// It depends on both keys, so only nodes that know both can look it up. It depends on the
    /// tracker, so trackers cannot compare tags.
    pub fn tag(&self, other: &NodeKey, tracker: &TrackerName) -> String {
        let (low, high) = (self.min(other), self.max(other));
        HEXLOWER.encode(&sha256(&[
            b"peerix friends 1\n",
            &low.0,
            &high.0,
            tracker.as_str().as_bytes(),
        ]))
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

    /// Parses `ed25519:` and 44 digits of base64.
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
    fn text_and_tls_forms_parse_back_to_key() {
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
    fn tag_is_symmetric_and_differs_by_tracker() {
        let (a, b, c) = (NodeKey([1; 32]), NodeKey([2; 32]), NodeKey([3; 32]));
        let tracker = TrackerName::of_url("http://tracker.example:12305");
        let other = TrackerName::of_url("http://other.example:12305");
        let tag = a.tag(&b, &tracker);
        assert_eq!(tag, b.tag(&a, &tracker));
        assert_eq!(tag.len(), 64);
        assert!(tag != a.tag(&c, &tracker) && tag != a.tag(&b, &other));
    }
}
