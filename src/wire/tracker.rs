//! What nodes and trackers say to one another, over HTTP, as JSON.
//!
//! The calls are those of the original (`POST /announce`, `GET /peers`, `POST /transfer/init`,
//! `POST /report`, `GET /reputation/<peer id>`); what peerix adds are fields that the original
//! ignores, and calls it does not have: `GET /lookup/<hash part>`, `PUT /filter/<peer id>`, `DELETE
//! /announce`, `GET /health`. docs/protocol.md has the table.

use super::node_key::NodeKey;
use crate::nix::HashPart;
use data_encoding::{BASE64, HEXLOWER};
use ring::hmac;
use ring::rand::SystemRandom;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::net::IpAddr;

/// A peer ID has so many bytes at most. Those of the original are UUIDs.
pub const MAX_PEER_ID: usize = 128;
/// A host name has so many at most (RFC 1035).
pub const MAX_ADDR: usize = 253;
/// Bytes that a transfer can have: 16 TiB, as a NAR's.
pub const MAX_TRANSFER: u64 = 1 << 44;
/// A request's body but that of a filter.
pub const MAX_BODY: usize = 64 * 1024;
/// Transfers begun by one request.
pub const MAX_TRANSFERS_AT_ONCE: u32 = 256;
/// A lookup's answer names so many candidates at most. Of 10,000 peers, 50 seem to have every path.
pub const MAX_CANDIDATES: usize = 64;
/// And so many peers that have no filter.
pub const MAX_OTHERS: usize = 8;

/// The header in which the asker of a NAR names the transfer: `<tracker ID>-<transfer ID>`.
pub const TRANSFER_HEADER: &str = "X-Peerix-Transfer";
/// The headers that prove whose filter it is.
pub const KEY_HEADER: &str = "X-Peerix-Public-Key";
/// See [`KEY_HEADER`].
pub const TIMESTAMP_HEADER: &str = "X-Peerix-Timestamp";
/// See [`KEY_HEADER`].
pub const SIGNATURE_HEADER: &str = "X-Peerix-Signature";

/// Whether a text can be a peer's ID: not empty, at most [`MAX_PEER_ID`] bytes, no control
/// characters.
pub fn is_peer_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_PEER_ID && !text.chars().any(char::is_control)
}

/// Whether a peer can be at an address: one that others can be told to ask, so not their own
/// machine, a network's, or the link's, where clouds keep their metadata. Private ones are fine:
/// they may be a VPN's.
pub fn can_be_peer(ip: IpAddr) -> bool {
    match ip.to_canonical() {
        // "This network", and what was left for the future.
        IpAddr::V4(ip) => {
            let special = ip.is_loopback() || ip.is_link_local() || ip.is_multicast();
            !special && (1..240).contains(&ip.octets()[0])
        }
        IpAddr::V6(ip) => {
            // `::1`, and IPv4 addresses in a form that is no longer used.
            let is_embedded = ip.segments()[..6] == [0; 6];
            !(is_embedded || ip.is_multicast() || ip.is_unicast_link_local())
        }
    }
}

/// `POST /announce`; `DELETE /announce` without port.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Announce {
    /// Who.
    pub peer_id: Option<String>,
    /// Where its HTTP server is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Address or host name; else the tracker takes the one it sees.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub addr: Option<String>,
    /// Random at every start of the node, so that two machines with one identity are told from a
    /// restart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub instance: Option<u64>,
    /// Who says so.
    #[serde(flatten)]
    pub proof: Proof,
}

/// The answer to a signed announce. To others it is `{"status":"ok"}`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct AnnounceResponse {
    /// `ok`.
    pub status: String,
    /// The tracker's ID, which tells it from others under whatever name it is reached.
    pub tracker: Option<String>,
    /// The timestamp with which the filter came that it has of this peer.
    pub filter: Option<u64>,
    /// Bits for each path that the tracker wants filters to have, from [`LEAST_BITS_PER_PATH`] to
    /// [`MOST_BITS_PER_PATH`].
    ///
    /// [`LEAST_BITS_PER_PATH`]: crate::wire::filter::LEAST_BITS_PER_PATH
    /// [`MOST_BITS_PER_PATH`]: crate::wire::filter::MOST_BITS_PER_PATH
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bits_per_path: Option<u64>,
    /// Whether the tracker reached a peerix at the announced address; absent as long as it has not
    /// tried.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reachable: Option<bool>,
    /// The address from which another machine announces itself with the same identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub also_at: Option<String>,
}

/// `POST /transfer/init`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferInit {
    /// Who sends.
    pub sender_id: Option<String>,
    /// Who receives.
    pub receiver_id: Option<String>,
    /// How many transfers begin; without it, one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// The answer to [`TransferInit`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TransferInitResponse {
    /// The first one's ID; the others' follow it.
    pub transfer_id: u64,
    /// How many there are, if the request said how many there should be.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub count: Option<u32>,
}

/// A side of a transfer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Of the path.
    Sender,
    /// Of the path.
    Receiver,
}

impl Role {
    /// As in a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Sender => "sender",
            Role::Receiver => "receiver",
        }
    }
}

/// `POST /report`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TransferReportBody {
    /// Which transfer.
    pub transfer_id: Option<u64>,
    /// Who reports.
    pub peer_id: Option<String>,
    /// `sender` or `receiver`.
    pub role: Option<String>,
    /// Bytes of the NAR, uncompressed.
    pub bytes: Option<u64>,
    /// Who says so.
    #[serde(flatten)]
    pub proof: Proof,
}

/// The answer to `GET /lookup/<hash part>`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct CandidateList {
    /// Peers whose filter has the hash part; best reputation first.
    pub candidates: Vec<Candidate>,
    /// Peers without a filter; best reputation first.
    #[serde(default)]
    pub others: Vec<Candidate>,
}

/// A peer that may have a path.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Candidate {
    /// Its ID.
    pub peer_id: String,
    /// Address or host name.
    pub addr: String,
    /// TCP, for HTTP, and UDP, for queries.
    pub port: u16,
    /// Its reputation.
    pub score: f64,
}

/// What a signature is made over. The text names the call and every field, one a line, so that no
/// statement can be taken for another.
#[derive(Debug, Clone, Copy)]
pub enum SignedText<'a> {
    /// `POST /announce`.
    Announce {
        /// As in the request.
        peer_id: &'a str,
        /// As in the request.
        port: u16,
        /// As in the request, empty if it has none.
        addr: &'a str,
    },
    /// `DELETE /announce`.
    Leave {
        /// As in the request.
        peer_id: &'a str,
    },
    /// `PUT /filter/<peer id>`.
    Filter {
        /// As in the path.
        peer_id: &'a str,
        /// SHA-256 of the body.
        digest: &'a [u8],
    },
    /// `POST /report`.
    Report {
        /// As in the request.
        transfer_id: u64,
        /// As in the request.
        peer_id: &'a str,
        /// As in the request.
        role: &'a str,
        /// As in the request.
        bytes: u64,
    },
}

impl SignedText<'_> {
    /// The text that is signed.
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

/// Who makes a statement, and when. Requests of the original have none of the three fields.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Base64 of the 32 bytes of an ed25519 key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public_key: Option<String>,
    /// Milliseconds since 1970. Each of a peer's statements has a later one than the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timestamp: Option<u64>,
    /// Base64 of the 64 bytes of the signature over [`SignedText::text`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub signature: Option<String>,
}

/// What a [`Proof`] turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProofCheck {
    /// Nothing is claimed.
    Unsigned,
    /// The key with these bytes said it at that time.
    By([u8; 32], u64),
    /// One of the fields is missing, no base64, of another length, or the signature is not the
    /// key's.
    Wrong,
}

impl Proof {
    /// Checks the signature, which takes about 0.1 ms.
    pub fn check(&self, statement: &SignedText<'_>) -> ProofCheck {
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
        let text = statement.text(timestamp, public_key);
        match UnparsedPublicKey::new(&ED25519, key).verify(text.as_bytes(), &signature) {
            Ok(()) => ProofCheck::By(key, timestamp),
            Err(_) => ProofCheck::Wrong,
        }
    }
}

/// A node's secret key, with which it speaks to trackers. Never printed.
pub struct Identity {
    seed: [u8; Identity::SEED_LEN],
    key: Ed25519KeyPair,
    public: String,
}

impl Identity {
    /// Bytes of the secret.
    pub const SEED_LEN: usize = 32;

    /// The key that such a secret makes.
    pub fn from_seed(seed: &[u8; Self::SEED_LEN]) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 bytes are a seed");
        let public = BASE64.encode(key.public_key().as_ref());
        Identity { seed: *seed, key, public }
    }

    /// The key for one tracker, named by its host and port as configured
    /// (`tracker.example.org:12305`). A statement that is made to one tracker proves nothing to
    /// another, and no tracker can tell who this node is elsewhere.
    pub fn for_tracker(&self, authority: &str) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.seed);
        let seed = hmac::sign(&key, format!("peerix tracker key 1\n{authority}\n").as_bytes());
        Identity::from_seed(seed.as_ref().try_into().expect("SHA-256 has the 32 bytes of a seed"))
    }

    /// The public key.
    pub fn key(&self) -> NodeKey {
        NodeKey::from_bytes(
            self.key.public_key().as_ref().try_into().expect("an ed25519 key has 32 bytes"),
        )
    }

    /// The secret as TLS libraries take it: PKCS #8 without the public key (RFC 8410, section 7).
    pub fn to_pkcs8(&self) -> Vec<u8> {
        const PREFIX: [u8; 16] =
            [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
        [&PREFIX[..], &self.seed].concat()
    }

    /// A secret that nobody knows.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn random_seed() -> Result<[u8; Self::SEED_LEN], ring::error::Unspecified> {
        Ok(ring::rand::generate(&SystemRandom::new())?.expose())
    }

    /// Base64 of the public key.
    pub fn public(&self) -> &str {
        &self.public
    }

    /// The peer ID that goes with the key, if the user names none: 32 digits of its digest, in the
    /// form of a UUID as the original has.
    pub fn peer_id(&self) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, self.public.as_bytes());
        let digits = HEXLOWER.encode(&digest.as_ref()[..16]);
        [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
    }

    /// Signs a statement made at that time, in milliseconds since 1970.
    pub fn sign(&self, statement: &SignedText<'_>, timestamp: u64) -> Proof {
        let signature = self.key.sign(statement.text(timestamp, &self.public).as_bytes());
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

/// A transfer, as [`TRANSFER_HEADER`] names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransferName {
    /// The tracker that counts it.
    pub tracker: String,
    /// Its ID there.
    pub id: u64,
}

impl TransferName {
    /// Trackers choose so many hexadecimal digits for their IDs.
    pub const TRACKER_ID_LEN: usize = 16;

    /// Reads `<tracker ID>-<transfer ID>`.
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

/// The target of a lookup.
pub fn lookup_target(hash_part: &HashPart) -> String {
    format!("/lookup/{hash_part}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity::from_seed(&[7; 32])
    }

    /// Golden: other programs have to make the same text.
    #[test]
    fn statements_are_told_apart() {
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
        for statement in &statements {
            let proof = identity().sign(statement, 5);
            for other in &statements {
                let same = statement.text(5, "") == other.text(5, "");
                assert_eq!(matches!(proof.check(other), ProofCheck::By(_, 5)), same);
            }
        }
    }

    #[test]
    fn every_field_is_signed() {
        let statement = |port, addr| SignedText::Announce { peer_id: "a", port, addr };
        let proof = identity().sign(&statement(1, "x"), 5);
        let key =
            <[u8; 32]>::try_from(BASE64.decode(identity().public().as_bytes()).unwrap()).unwrap();
        assert_eq!(proof.check(&statement(1, "x")), ProofCheck::By(key, 5));
        assert_eq!(proof.check(&statement(2, "x")), ProofCheck::Wrong);
        assert_eq!(proof.check(&statement(1, "")), ProofCheck::Wrong);
        let with = |change: fn(&mut Proof)| {
            let mut changed = proof.clone();
            change(&mut changed);
            changed.check(&statement(1, "x"))
        };
        assert_eq!(with(|p| p.timestamp = Some(6)), ProofCheck::Wrong);
        assert_eq!(with(|p| p.timestamp = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.public_key = None), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = Some("AAAA".into())), ProofCheck::Wrong);
        assert_eq!(with(|p| p.signature = Some("?".into())), ProofCheck::Wrong);
        let other = Identity::from_seed(&[8; 32]).public().to_owned();
        assert_eq!(
            Proof { public_key: Some(other), ..proof.clone() }.check(&statement(1, "x")),
            ProofCheck::Wrong
        );
        assert_eq!(Proof::default().check(&statement(1, "x")), ProofCheck::Unsigned);
    }

    /// What the original sends, and what it makes of our answers.
    #[test]
    fn bodies_of_the_original() {
        let announce: Announce =
            serde_json::from_str(r#"{"peer_id": "a", "port": 12304}"#).unwrap();
        assert_eq!(
            (announce.peer_id.as_deref(), announce.port, announce.addr),
            (Some("a"), Some(12304), None)
        );
        assert_eq!(announce.proof, Proof::default());
        let announce = Announce { peer_id: Some("a".into()), port: Some(1), ..Announce::default() };
        assert_eq!(serde_json::to_string(&announce).unwrap(), r#"{"peer_id":"a","port":1}"#);
        let begun = TransferInitResponse { transfer_id: 3, count: None };
        assert_eq!(serde_json::to_string(&begun).unwrap(), r#"{"transfer_id":3}"#);
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
    fn key_of_a_tracker_is_stable_and_no_other_trackers() {
        let of = |name: &str| identity().for_tracker(name).public().to_owned();
        assert_eq!(of("a.example:12305"), of("a.example:12305"));
        let other =
            Identity::from_seed(&[8; 32]).for_tracker("a.example:12305").public().to_owned();
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
    fn where_peers_can_be() {
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
    fn names_of_transfers() {
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
