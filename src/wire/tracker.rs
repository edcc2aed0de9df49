//! Messages between nodes and trackers: JSON over HTTP, signatures, and the node's identity.
//!
//! The original tracker defines `POST /announce`, `GET /peers`, `POST /transfer/init`,
//! `POST /report` and `GET /reputation/<peer id>`. peerix adds fields that the original ignores,
//! and further calls such as `GET /lookup/<hash part>` and `PUT /filter/<peer id>`.
//! docs/protocol.md has the table.

use super::node_key::NodeKey;
use super::tracker_name::TrackerName;
use crate::nix::HashPart;
use data_encoding::{BASE64, HEXLOWER};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// Maximum length of a peer ID in bytes. IDs of the original are UUIDs. Longer ones are refused.
pub const MAX_PEER_ID: usize = 128;
/// Maximum length of a host name in bytes (RFC 1035). Longer ones are refused.
pub const MAX_ADDR: usize = 253;
/// Maximum bytes of a transfer: 16 TiB, as for a NAR. Reports of more are refused.
pub const MAX_TRANSFER: u64 = 1 << 44;
/// Maximum bytes of a request's body, filters excepted. Longer ones are refused.
pub const MAX_BODY: usize = 64 * 1024;
/// Maximum number of transfers begun by one request. More are refused.
pub const MAX_TRANSFERS_AT_ONCE: u32 = 256;
/// Maximum number of candidates in a lookup's answer; the best remain. Of 10,000 peers, 1 to 140
/// are false positives for a path, depending on the bits of their filters.
pub const MAX_CANDIDATES: usize = 64;
/// Maximum number of peers without a filter in a lookup's answer.
pub const MAX_OTHERS: usize = 8;

/// Header of a NAR request that names the transfer: `<tracker ID>-<transfer ID>`.
pub const TRANSFER_HEADER: &str = "X-Peerix-Transfer";
/// Header of `PUT /filter` with the public key. The other two have the timestamp and the signature;
/// see [`Proof`].
pub const KEY_HEADER: &str = "X-Peerix-Public-Key";
/// Header of `PUT /filter` with the [`Proof`]'s timestamp.
pub const TIMESTAMP_HEADER: &str = "X-Peerix-Timestamp";
/// Header of `PUT /filter` with the [`Proof`]'s signature.
pub const SIGNATURE_HEADER: &str = "X-Peerix-Signature";

/// Whether a text can be a peer ID: 1 to [`MAX_PEER_ID`] bytes without control characters.
pub fn is_peer_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_PEER_ID && !text.chars().any(char::is_control)
}

/// Whether a peer can have this address. Other nodes connect to it, so loopback, link-local (where
/// clouds serve metadata) and multicast addresses are refused. Private ones are accepted: they may
/// belong to a VPN.
pub fn can_be_peer(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        // Refuses 0.0.0.0/8 ("this network") and 240.0.0.0/4 (reserved).
        IpAddr::V4(ip) => {
            let special = ip.is_loopback() || ip.is_link_local() || ip.is_multicast();
            !special && (1..240).contains(&ip.octets()[0])
        }
        IpAddr::V6(ip) => {
            // Refuses `::`, `::1` and IPv4-compatible addresses (deprecated by RFC 4291).
            let is_embedded = ip.segments()[..6] == [0; 6];
            !(is_embedded || ip.is_multicast() || ip.is_unicast_link_local())
        }
    }
}

/// Body of `POST /announce`, and of `DELETE /announce`, which has no port.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Announce {
    /// ID of the announced peer.
    pub peer_id: Option<String>,
    /// TCP port of its HTTP server.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its address or host name; without it, the tracker takes the request's source address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addr: Option<String>,
    /// Random number of this start of the node. It lets the tracker tell two machines with one
    /// identity from a restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
    /// The node's signature.
    #[serde(flatten)]
    pub proof: Proof,
}

/// Answer to a signed announce. The answer to an unsigned one is `{"status":"ok"}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AnnounceResponse {
    /// Always `ok`.
    pub status: String,
    /// The tracker's ID, by which nodes recognise it under several names.
    pub tracker: Option<String>,
    /// Timestamp of the peer's filter that the tracker has; `None` if it has none.
    pub filter: Option<u64>,
    /// Bits for each path that new filters should have, from [`MIN_BITS_PER_PATH`] to
    /// [`MAX_BITS_PER_PATH`].
    ///
    /// [`MIN_BITS_PER_PATH`]: crate::wire::filter::MIN_BITS_PER_PATH
    /// [`MAX_BITS_PER_PATH`]: crate::wire::filter::MAX_BITS_PER_PATH
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_path: Option<u64>,
    /// Whether the tracker reached a peerix at the announced address; `None` if it has not tried
    /// yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reachable: Option<bool>,
    /// Address of another machine that announces itself with the same identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub also_at: Option<String>,
}

/// Body of `POST /transfer/init`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferInit {
    /// ID of the peer that sends.
    pub sender_id: Option<String>,
    /// ID of the peer that receives.
    pub receiver_id: Option<String>,
    /// Number of transfers to begin, from 1 to [`MAX_TRANSFERS_AT_ONCE`]; one if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// Answer to [`TransferInit`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferInitResponse {
    /// ID of the first transfer. The IDs of the others follow it.
    pub transfer_id: u64,
    /// Number of transfers begun, if the request had a number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// A side of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The peer that sends the path.
    Sender,
    /// The peer that receives the path.
    Receiver,
}

impl Role {
    /// The name in a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Sender => "sender",
            Role::Receiver => "receiver",
        }
    }
}

/// Body of `POST /report`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferReportBody {
    /// ID of the transfer.
    pub transfer_id: Option<u64>,
    /// ID of the reporting peer.
    pub peer_id: Option<String>,
    /// `sender` or `receiver`.
    pub role: Option<String>,
    /// Transferred bytes of the NAR, uncompressed.
    pub bytes: Option<u64>,
    /// The reporting peer's signature.
    #[serde(flatten)]
    pub proof: Proof,
}

/// Answer to `GET /lookup/<hash part>`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CandidateList {
    /// Peers whose filter contains the hash part, in the order in which they should be asked; at
    /// most [`MAX_CANDIDATES`].
    pub candidates: Vec<Candidate>,
    /// Peers without a filter, in the order in which they should be asked; at most [`MAX_OTHERS`].
    #[serde(default)]
    pub others: Vec<Candidate>,
}

/// A peer that may have a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its peer ID.
    pub peer_id: String,
    /// Its address or host name.
    pub addr: String,
    /// TCP port for HTTP, and UDP port for queries.
    pub port: u16,
    /// Its reputation score, 0 or more.
    pub score: f64,
}

/// The text that a node signs. It names the call and every field, one a line, so that a signature
/// of one call is not valid for another.
#[derive(Debug, Clone, Copy)]
pub enum SignedText<'a> {
    /// For `POST /announce`.
    Announce {
        /// Peer ID, as in the request.
        peer_id: &'a str,
        /// TCP port, as in the request.
        port: u16,
        /// Address as in the request; empty if it has none.
        addr: &'a str,
    },
    /// For `DELETE /announce`.
    Leave {
        /// Peer ID, as in the request.
        peer_id: &'a str,
    },
    /// For `PUT /filter/<peer id>`.
    Filter {
        /// Peer ID, as in the request's path.
        peer_id: &'a str,
        /// SHA-256 of the request's body.
        digest: &'a [u8],
    },
    /// For `POST /report`.
    Report {
        /// Transfer ID, as in the request.
        transfer_id: u64,
        /// Peer ID, as in the request.
        peer_id: &'a str,
        /// `sender` or `receiver`, as in the request.
        role: &'a str,
        /// Transferred bytes, as in the request.
        bytes: u64,
    },
}

impl SignedText<'_> {
    /// Returns the signed text. `timestamp` is in milliseconds since 1970, `public_key` in base64.
    pub fn text(&self, timestamp: u64, public_key: &str) -> String {
        let fields = match self {
            SignedText::Announce { peer_id, port, addr } => {
                format!("call: announce\npeer_id: {peer_id}\nport: {port}\naddr: {addr}\n")
            }
            SignedText::Leave { peer_id } => format!("call: leave\npeer_id: {peer_id}\n"),
            SignedText::Filter { peer_id, digest } => {
                format!("call: filter\npeer_id: {peer_id}\nsha256: {}\n", HEXLOWER.encode(digest))
            }
            SignedText::Report { transfer_id, peer_id, role, bytes } => {
                format!(
                    "call: report\ntransfer_id: {transfer_id}\npeer_id: {peer_id}\nrole: {role}\nbytes: {bytes}\n"
                )
            }
        };
        format!("peerix tracker 1\n{fields}timestamp: {timestamp}\npublic_key: {public_key}\n")
    }
}

/// Signature of a request, with key and time. Requests of the original have none of the fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Base64 of the 32 bytes of the ed25519 public key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// Milliseconds since 1970. It must be greater than in the peer's last signed request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// Base64 of the 64 bytes of the ed25519 signature of [`SignedText::text`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// Result of [`Proof::check`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProofCheck {
    /// The proof has no fields.
    Unsigned,
    /// The signature is valid: the public key, and the time in milliseconds since 1970.
    By([u8; 32], u64),
    /// A field is missing or malformed, or the signature is not valid.
    Wrong,
}

impl Proof {
    /// Checks the signature, which takes about 0.1 ms of CPU time. Does not check the time.
    pub fn check(&self, signed_text: &SignedText<'_>) -> ProofCheck {
        let (public_key, timestamp, signature) =
            match (&self.public_key, self.timestamp, &self.signature) {
                (None, None, None) => return ProofCheck::Unsigned,
                (Some(key), Some(timestamp), Some(signature)) => (key, timestamp, signature),
                _ => return ProofCheck::Wrong,
            };
        let bytes = |text: &str| BASE64.decode(text.as_bytes()).ok();
        let Some(key) = bytes(public_key).and_then(|key| <[u8; 32]>::try_from(key).ok()) else {
            return ProofCheck::Wrong;
        };
        let Some(signature) = bytes(signature) else { return ProofCheck::Wrong };
        let text = signed_text.text(timestamp, public_key);
        match UnparsedPublicKey::new(&ED25519, key).verify(text.as_bytes(), &signature) {
            Ok(()) => ProofCheck::By(key, timestamp),
            Err(_) => ProofCheck::Wrong,
        }
    }
}

/// The secret ed25519 key of a node. Its `Debug` output has only the public key.
pub struct Identity {
    seed: [u8; Identity::SEED_LEN],
    key: Ed25519KeyPair,
    public: String,
}

impl Identity {
    /// Length of the seed in bytes.
    pub const SEED_LEN: usize = 32;

    /// Derives the key from a seed (RFC 8032, section 5.1.5).
    pub fn from_seed(seed: &[u8; Self::SEED_LEN]) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 bytes are a seed");
        let public = BASE64.encode(key.public_key().as_ref());
        Identity { seed: *seed, key, public }
    }

    /// Derives the identity for one tracker. A request signed for one tracker is not valid for
    /// another, and trackers cannot tell that two of their peers are one node.
    pub fn for_tracker(&self, tracker: &TrackerName) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.seed);
        let text = format!("peerix tracker key 1\n{}\n", tracker.as_str());
        let seed = hmac::sign(&key, text.as_bytes());
        Identity::from_seed(seed.as_ref().try_into().expect("SHA-256 has the 32 bytes of a seed"))
    }

    /// The public key.
    pub fn key(&self) -> NodeKey {
        NodeKey::from_bytes(
            self.key.public_key().as_ref().try_into().expect("an ed25519 key has 32 bytes"),
        )
    }

    /// The secret key in the form for TLS libraries: PKCS #8 without the public key (RFC 8410,
    /// section 7).
    pub fn to_pkcs8(&self) -> Vec<u8> {
        const PREFIX: [u8; 16] =
            [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        [&PREFIX[..], &self.seed].concat()
    }

    /// Generates a random seed.
    ///
    /// # Errors
    /// The system's random number generator failed.
    pub fn random_seed() -> Result<[u8; Self::SEED_LEN], ring::error::Unspecified> {
        Ok(ring::rand::generate(&SystemRandom::new())?.expose())
    }

    /// Base64 of the public key.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// The default peer ID, in the form of a UUID as in the original: the first 16 bytes of the
    /// SHA-256 of the public key's base64.
    pub fn peer_id(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.public.as_bytes());
        let digits = HEXLOWER.encode(&digest.as_ref()[..16]);
        [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
    }

    /// Signs a statement. `timestamp` is in milliseconds since 1970.
    pub fn sign(&self, signed_text: &SignedText<'_>, timestamp: u64) -> Proof {
        let signature = self.key.sign(signed_text.text(timestamp, &self.public).as_bytes());
        Proof {
            public_key: Some(self.public.clone()),
            timestamp: Some(timestamp),
            signature: Some(BASE64.encode(signature.as_ref())),
        }
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.public)
    }
}

/// The name of a transfer, as in [`TRANSFER_HEADER`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferName {
    /// ID of the tracker that counts the transfer.
    pub tracker: String,
    /// ID of the transfer at that tracker.
    pub id: u64,
}

impl TransferName {
    /// Length of a tracker ID in hexadecimal digits.
    pub const TRACKER_ID_LEN: usize = 16;

    /// Parses `<tracker ID>-<transfer ID>`; `None` if it is malformed.
    pub fn parse(text: &str) -> Option<Self> {
        let (tracker, id) = text.trim().split_once('-')?;
        let is_id =
            tracker.len() == Self::TRACKER_ID_LEN && tracker.bytes().all(|b| b.is_ascii_hexdigit());
        let id = id.parse().ok().filter(|_| is_id && id.bytes().all(|b| b.is_ascii_digit()))?;
        Some(TransferName { tracker: tracker.to_owned(), id })
    }
}

impl fmt::Display for TransferName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.tracker, self.id)
    }
}

/// The request target of a lookup.
pub fn lookup_target(hash_part: &HashPart) -> String {
    format!("/lookup/{hash_part}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity::from_seed(&[7; 32])
    }

    /// The exact texts are part of the protocol: other programs have to sign the same.
    #[test]
    fn signed_text_of_each_call_is_distinct() {
        let statements = [
            SignedText::Announce { peer_id: "a", port: 12304, addr: "" },
            SignedText::Leave { peer_id: "a" },
            SignedText::Filter { peer_id: "a", digest: &[0xab; 32] },
            SignedText::Report { transfer_id: 7, peer_id: "a", role: "sender", bytes: 9 },
        ];
        let texts: Vec<String> = statements.iter().map(|s| s.text(5, "KEY")).collect();
        assert_eq!(
            texts[0],
            "peerix tracker 1\ncall: announce\npeer_id: a\nport: 12304\naddr: \ntimestamp: 5\npublic_key: KEY\n"
        );
        assert_eq!(
            texts[1],
            "peerix tracker 1\ncall: leave\npeer_id: a\ntimestamp: 5\npublic_key: KEY\n"
        );
        assert!(texts[2].contains(&format!("\nsha256: {}\n", "ab".repeat(32))));
        assert!(texts[3].contains("\ntransfer_id: 7\npeer_id: a\nrole: sender\nbytes: 9\n"));
        for signed_text in &statements {
            let proof = identity().sign(signed_text, 5);
            for other in &statements {
                let same = signed_text.text(5, "") == other.text(5, "");
                assert_eq!(matches!(proof.check(other), ProofCheck::By(_, 5)), same);
            }
        }
    }

    #[test]
    fn proof_with_any_changed_field_is_wrong() {
        let signed_text = |port, addr| SignedText::Announce { peer_id: "a", port, addr };
        let proof = identity().sign(&signed_text(1, "x"), 5);
        let key =
            <[u8; 32]>::try_from(BASE64.decode(identity().public().as_bytes()).unwrap()).unwrap();
        assert_eq!(proof.check(&signed_text(1, "x")), ProofCheck::By(key, 5));
        assert_eq!(proof.check(&signed_text(2, "x")), ProofCheck::Wrong);
        assert_eq!(proof.check(&signed_text(1, "")), ProofCheck::Wrong);
        let with = |change: fn(&mut Proof)| {
            let mut changed = proof.clone();
            change(&mut changed);
            changed.check(&signed_text(1, "x"))
        };
        assert_eq!(with(|p| p.timestamp = Some(6)), ProofCheck::Wrong);
        assert_eq!(with(|p| p.timestamp = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.public_key = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = Some("AAAA".into())), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = Some("?".into())), ProofCheck::Wrong);
        let other = Identity::from_seed(&[8; 32]).public().to_owned();
        assert_eq!(
            Proof { public_key: Some(other), ..proof.clone() }.check(&signed_text(1, "x")),
            ProofCheck::Wrong
        );
        assert_eq!(Proof::default().check(&signed_text(1, "x")), ProofCheck::Unsigned);
    }

    /// The original's requests parse, and answers have no fields that it does not expect.
    #[test]
    fn body_of_original_parses_and_malformed_body_does_not() {
        let announce: Announce =
            serde_json::from_str(r#"{"peer_id": "a", "port": 12304}"#).unwrap();
        assert_eq!(
            (announce.peer_id.as_deref(), announce.port, announce.addr),
            (Some("a"), Some(12304), None)
        );
        assert_eq!(announce.proof, Proof::default());
        let announce = Announce { peer_id: Some("a".into()), port: Some(1), ..Announce::default() };
        assert_eq!(serde_json::to_string(&announce).unwrap(), r#"{"peer_id":"a","port":1}"#);
        let response = TransferInitResponse { transfer_id: 3, count: None };
        assert_eq!(serde_json::to_string(&response).unwrap(), r#"{"transfer_id":3}"#);
        for bad in [
            r#"{"peer_id": 1, "port": 1}"#,
            r#"{"peer_id": "a", "port": "1"}"#,
            r#"{"peer_id": "a", "port": -1}"#,
            r#"{"peer_id": "a", "port": 65536}"#,
            r#"{"peer_id": "a", "port": 1.5}"#,
            r#"{"peer_id": "a", "port": 1e308}"#,
            r#"{"peer_id": "a", "port": 1, "addr": 5}"#,
            r#"{"peer_id": "a", "port": 1, "timestamp": "5"}"#,
            "[]",
            "",
        ] {
            assert!(serde_json::from_str::<Announce>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn key_for_tracker_is_stable_and_unique() {
        let named = |name: &str| TrackerName::of_url(&format!("http://{name}"));
        let of = |name: &str| identity().for_tracker(&named(name)).public().to_owned();
        assert_eq!(of("a.example:12305"), of("a.example:12305"));
        let other = Identity::from_seed(&[8; 32])
            .for_tracker(&named("a.example:12305"))
            .public()
            .to_owned();
        let keys = [
            of("a.example:12305"),
            of("a.example:80"),
            of("b.example:12305"),
            other,
            identity().public().into(),
        ];
        let distinct: std::collections::BTreeSet<_> = keys.iter().collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn can_be_peer_refuses_special_addresses() {
        for good in [
            "1.2.3.4",
            "10.0.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "2001:db8::1",
            "fd00::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(can_be_peer(good.parse().unwrap()), "{good}");
        }
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.1.1",
        ] {
            assert!(!can_be_peer(bad.parse().unwrap()), "{bad}");
        }
    }

    #[test]
    fn transfer_name_parses_back_and_malformed_one_does_not() {
        let name = TransferName { tracker: "0123456789abcdef".into(), id: 42 };
        assert_eq!(TransferName::parse(&name.to_string()), Some(name));
        for bad in [
            "",
            "42",
            "0123456789abcdef-",
            "0123456789abcdef-+1",
            "0123456789abcde-1",
            "x123456789abcdef-1",
        ] {
            assert_eq!(TransferName::parse(bad), None, "{bad}");
        }
    }
}
