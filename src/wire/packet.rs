//! The UDP packets of LAN discovery. Numbers are big-endian.
//!
//! | byte 0 | bytes | meaning |
//! |---|---|---|
//! | 0 query | 1–4 request ID, 5–36 hash part as Nix32 digits | asks for holders of the path |
//! | 1 have | 1–4 request ID, 5–8 HTTP port, 9… URL path | is at `http://<sender>:<port>/<path>` |
//! | 2 have not | 1–4 request ID | the sender does not have it |
//! | 3 hello | 1 version, 2–3 HTTP port, 4–11 instance ID, 12 flags | the sender is alive |
//! | 4 bye | as hello | the sender leaves |
//! | 5 query many | 1–4 request ID, 20 bytes per hash part, maybe 1 flag byte | asks for paths |
//! | 6 answer many | 1–4 request ID, one bit for each hash part | the paths that the sender has |
//!
//! The Python peerix defines kinds 0 and 1, and ignores the others. [`Hello`] documents the flags
//! of *hello*. Bytes after them belong to later versions and are ignored.
//!
//! *Query many* names up to [`MAX_BATCH`] hash parts; without any, it only asks whether the
//! receiver is alive. Bit 0 of its flag byte marks a broadcast, which only nodes that have one of
//! the paths answer. In *answer many*, bit `i % 8` (the lowest is 0) of byte `i / 8` is set if the
//! sender has path `i`. An answer is never longer than its query, so a forged source address gives
//! no amplification.

use super::node_key::HelloDigest;
use crate::nix::{HashPart, Malformed};
use std::sync::Arc;

/// Maximum number of hash parts in one *query many*. The datagram then has 806 bytes and fits every
/// link's MTU. Longer ones are refused.
pub const MAX_BATCH: usize = 40;

/// A parsed datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Asks for holders of one path.
    Query {
        /// Request ID, repeated in the answers.
        id: u32,
        /// Hash part of the wanted path.
        hash_part: HashPart,
    },
    /// The sender has the path.
    Have {
        /// Request ID of the query.
        id: u32,
        /// TCP port of the sender's HTTP server, never 0.
        port: u16,
        /// Path of the narinfo relative to the root of that server, without a leading slash.
        url_path: String,
    },
    /// The sender does not have the path.
    HaveNot {
        /// Request ID of the query.
        id: u32,
    },
    /// The sender is alive.
    Hello(Hello),
    /// The sender is leaving.
    Bye(Hello),
    /// Asks which of several paths the receiver has.
    QueryMany {
        /// Request ID, repeated in the answer.
        id: u32,
        /// Hash parts of the wanted paths.
        hash_parts: HashParts,
        /// Set in broadcasts: nodes that have none of the paths do not answer.
        holders_only: bool,
    },
    /// The sender has the paths whose bits are set.
    AnswerMany {
        /// Request ID of the query.
        id: u32,
        /// One bit for each hash part of the query, in its order.
        held: AnswerBits,
    },
}

/// The sender's description of itself in *hello* and *bye*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// TCP port of the sender's HTTP server, never 0.
    pub port: u16,
    /// Random number of this start of the node, so that receivers notice a restart.
    pub instance: [u8; 8],
    /// Flag bit 0, from peerix 0.1: the sender never sends *have not*, so receivers do not wait for
    /// one.
    pub crowded: bool,
    /// Flag bit 1: the sender answers *query many*.
    pub batches: bool,
    /// The 16 bytes after the flags if flag bit 2 is set: friends recognise the sender by them.
    pub digest: Option<HelloDigest>,
}

/// Up to [`MAX_BATCH`] hash parts in the encoding of *query many*. Clones share the bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashParts(Arc<[u8]>);

impl HashParts {
    /// Packs the first [`MAX_BATCH`] of `hash_parts`. Further ones are dropped.
    pub fn pack<'a>(hash_parts: impl IntoIterator<Item = &'a HashPart>) -> Self {
        HashParts(hash_parts.into_iter().take(MAX_BATCH).flat_map(HashPart::to_bytes).collect())
    }

    /// Number of hash parts.
    pub fn len(&self) -> usize {
        self.0.len() / HashPart::BYTES
    }

    /// Whether there are none: the query only asks whether the receiver is alive.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The hash parts in their order.
    pub fn iter(&self) -> impl Iterator<Item = HashPart> {
        self.0.as_chunks::<{ HashPart::BYTES }>().0.iter().map(HashPart::from_bytes)
    }
}

/// The bits of an *answer many*, at most [`MAX_BATCH`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AnswerBits(Vec<u8>);

impl AnswerBits {
    /// Packs one bit for each of the first [`MAX_BATCH`] of `held`. Further ones are dropped.
    pub fn pack(held: impl IntoIterator<Item = bool>) -> Self {
        let mut bytes = Vec::new();
        for (at, is_held) in held.into_iter().take(MAX_BATCH).enumerate() {
            if at % 8 == 0 {
                bytes.push(0);
            }
            bytes[at / 8] |= u8::from(is_held) << (at % 8);
        }
        AnswerBits(bytes)
    }

    /// Whether the length is that of an answer to `count` hash parts.
    pub fn fits(&self, count: usize) -> bool {
        self.0.len() == count.div_ceil(8)
    }

    /// Whether bit `at` is set.
    pub fn is_set(&self, at: usize) -> bool {
        self.0.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1)
    }

    /// Whether any bit is set.
    pub fn any(&self) -> bool {
        self.0.iter().any(|byte| *byte != 0)
    }
}

const QUERY: u8 = 0;
const HAVE: u8 = 1;
const HAVE_NOT: u8 = 2;
const HELLO: u8 = 3;
const BYE: u8 = 4;
const QUERY_MANY: u8 = 5;
const ANSWER_MANY: u8 = 6;

const HELLO_VERSION: u8 = 1;
const FLAG_CROWDED: u8 = 1;
const FLAG_BATCHES: u8 = 2;
const FLAG_DIGEST: u8 = 4;
const FLAG_HOLDERS_ONLY: u8 = 1;

/// Maximum length in bytes of a narinfo's URL path. A hash part and a route take less than 100.
/// Longer ones are refused.
const MAX_URL_PATH: usize = 256;

const WHAT: &str = "packet";

impl Packet {
    /// Maximum length in bytes of any packet but *hello* and *bye*, which later versions may
    /// extend.
    pub const MAX_LEN: usize = 6 + MAX_BATCH * HashPart::BYTES;

    /// Parses one datagram.
    ///
    /// # Errors
    /// The datagram is not exactly one of the packets of this module.
    pub fn parse(datagram: &[u8]) -> Result<Self, Malformed> {
        let (&kind, rest) = datagram.split_first().ok_or(Malformed::new(WHAT, "empty"))?;
        if matches!(kind, HELLO | BYE) {
            let hello = Hello::parse(rest)?;
            return Ok(if kind == HELLO { Packet::Hello(hello) } else { Packet::Bye(hello) });
        }
        let (id, rest) = rest.split_first_chunk().ok_or(Malformed::new(WHAT, "too short"))?;
        let id = u32::from_be_bytes(*id);
        match kind {
            QUERY => Ok(Packet::Query { id, hash_part: HashPart::parse(rest)? }),
            HAVE => {
                let (port, url_path) =
                    rest.split_first_chunk().ok_or(Malformed::new(WHAT, "too short"))?;
                Ok(Packet::Have {
                    id,
                    port: port_of(u32::from_be_bytes(*port))?,
                    url_path: url_path_of(url_path)?,
                })
            }
            HAVE_NOT if rest.is_empty() => Ok(Packet::HaveNot { id }),
            HAVE_NOT => Err(Malformed::new(WHAT, "too long")),
            QUERY_MANY => {
                let (hash_parts, flags) = rest.split_at(rest.len() - rest.len() % HashPart::BYTES);
                let holders_only = match flags {
                    [] => false,
                    [flags] => flags & FLAG_HOLDERS_ONLY != 0,
                    _ => return Err(Malformed::new(WHAT, "a hash part is cut")),
                };
                if hash_parts.len() > MAX_BATCH * HashPart::BYTES {
                    return Err(Malformed::new(WHAT, "more than 40 hash parts"));
                }
                Ok(Packet::QueryMany { id, hash_parts: HashParts(hash_parts.into()), holders_only })
            }
            ANSWER_MANY if rest.len() <= MAX_BATCH.div_ceil(8) => {
                Ok(Packet::AnswerMany { id, held: AnswerBits(rest.to_vec()) })
            }
            ANSWER_MANY => Err(Malformed::new(WHAT, "more than 40 bits")),
            _ => Err(Malformed::new(WHAT, "of an unknown kind")),
        }
    }

    /// Encodes the packet as one datagram.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Packet::Query { id, hash_part } => {
                [&[QUERY][..], &id.to_be_bytes(), hash_part.as_str().as_bytes()].concat()
            }
            Packet::Have { id, port, url_path } => [
                &[HAVE][..],
                &id.to_be_bytes(),
                &u32::from(*port).to_be_bytes(),
                url_path.as_bytes(),
            ]
            .concat(),
            Packet::HaveNot { id } => [&[HAVE_NOT][..], &id.to_be_bytes()].concat(),
            Packet::Hello(hello) => hello.encode(HELLO),
            Packet::Bye(hello) => hello.encode(BYE),
            Packet::QueryMany { id, hash_parts, holders_only } => {
                let flags: &[u8] = if *holders_only { &[FLAG_HOLDERS_ONLY] } else { &[] };
                [&[QUERY_MANY][..], &id.to_be_bytes(), &hash_parts.0, flags].concat()
            }
            Packet::AnswerMany { id, held } => {
                [&[ANSWER_MANY][..], &id.to_be_bytes(), &held.0].concat()
            }
        }
    }
}

impl Hello {
    fn parse(rest: &[u8]) -> Result<Self, Malformed> {
        let &[version, port_high, port_low, a, b, c, d, e, f, g, h, flags, ref rest @ ..] = rest
        else {
            return Err(Malformed::new(WHAT, "too short"));
        };
        if version != HELLO_VERSION {
            return Err(Malformed::new(WHAT, "hello of another version"));
        }
        Ok(Hello {
            port: port_of(u32::from(u16::from_be_bytes([port_high, port_low])))?,
            instance: [a, b, c, d, e, f, g, h],
            crowded: flags & FLAG_CROWDED != 0,
            batches: flags & FLAG_BATCHES != 0,
            digest: rest.first_chunk().copied().filter(|_| flags & FLAG_DIGEST != 0),
        })
    }

    fn encode(&self, kind: u8) -> Vec<u8> {
        let flag = |is_set, bit| if is_set { bit } else { 0 };
        let flags = flag(self.crowded, FLAG_CROWDED) | flag(self.batches, FLAG_BATCHES);
        let flags = flags | flag(self.digest.is_some(), FLAG_DIGEST);
        let digest = self.digest.as_ref().map_or(&[][..], |digest| digest);
        [&[kind, HELLO_VERSION][..], &self.port.to_be_bytes(), &self.instance, &[flags], digest]
            .concat()
    }
}

fn port_of(number: u32) -> Result<u16, Malformed> {
    u16::try_from(number)
        .ok()
        .filter(|&port| port != 0)
        .ok_or(Malformed::new(WHAT, "port outside 1 to 65535"))
}

/// Checks a URL path. It goes into a request line, so only characters of a path are accepted.
fn url_path_of(bytes: &[u8]) -> Result<String, Malformed> {
    if bytes.is_empty() || bytes.len() > MAX_URL_PATH {
        return Err(Malformed::new(WHAT, "URL path empty or too long"));
    }
    let legal = |b: &u8| b.is_ascii_alphanumeric() || b"/-._~%+=!,".contains(b);
    match std::str::from_utf8(bytes) {
        Ok(text) if bytes.iter().all(legal) && !text.starts_with('/') => Ok(text.to_owned()),
        _ => Err(Malformed::new(WHAT, "URL path with other characters than a path has")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH_PART: &str = "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz";

    /// Written by hand from the packet table; kinds 0 and 1 as captured from the Python peerix.
    fn golden() -> Vec<(Packet, Vec<u8>)> {
        let hash_part = HashPart::parse(HASH_PART.as_bytes()).unwrap();
        let instance = *b"\x01\x02\x03\x04\x05\x06\x07\x08";
        let hello = Hello { port: 12304, instance, crowded: false, batches: true, digest: None };
        let url_path = format!("local/{HASH_PART}.narinfo");
        let zeros = HashPart::ZERO;
        let ones = HashPart::parse(&[b'z'; 32]).unwrap();
        let probe =
            Packet::QueryMany { id: 3, hash_parts: HashParts::pack([]), holders_only: false };
        let two = HashParts::pack([&zeros, &ones]);
        vec![
            (
                Packet::Query { id: 0x0102_0304, hash_part },
                [b"\0\x01\x02\x03\x04", HASH_PART.as_bytes()].concat(),
            ),
            (
                Packet::Have { id: 7, port: 12304, url_path: url_path.clone() },
                [b"\x01\0\0\0\x07\0\0\x30\x10", url_path.as_bytes()].concat(),
            ),
            (Packet::HaveNot { id: 0xffff_ffff }, b"\x02\xff\xff\xff\xff".to_vec()),
            (
                Packet::Hello(hello),
                b"\x03\x01\x30\x10\x01\x02\x03\x04\x05\x06\x07\x08\x02".to_vec(),
            ),
            (
                Packet::Bye(Hello { crowded: true, batches: false, ..hello }),
                b"\x04\x01\x30\x10\x01\x02\x03\x04\x05\x06\x07\x08\x01".to_vec(),
            ),
            (probe, b"\x05\0\0\0\x03".to_vec()),
            (
                Packet::QueryMany { id: 4, hash_parts: two.clone(), holders_only: false },
                [&b"\x05\0\0\0\x04"[..], &[0; 20], &[0xff; 20]].concat(),
            ),
            (
                Packet::QueryMany { id: 4, hash_parts: two, holders_only: true },
                [&b"\x05\0\0\0\x04"[..], &[0; 20], &[0xff; 20], &[1]].concat(),
            ),
            (Packet::AnswerMany { id: 3, held: AnswerBits::pack([]) }, b"\x06\0\0\0\x03".to_vec()),
            (
                Packet::AnswerMany {
                    id: 5,
                    held: AnswerBits::pack((0..10).map(|at| at == 1 || at == 9)),
                },
                b"\x06\0\0\0\x05\x02\x02".to_vec(),
            ),
        ]
    }

    #[test]
    fn packet_and_golden_bytes_convert_both_ways() {
        for (packet, bytes) in golden() {
            assert_eq!(packet.encode(), bytes, "{packet:?}");
            assert_eq!(Packet::parse(&bytes).as_ref(), Ok(&packet));
            assert!(bytes.len() <= Packet::MAX_LEN);
        }
    }

    #[test]
    fn truncated_packet_is_not_another_packet() {
        for (packet, bytes) in golden() {
            for end in 0..bytes.len() {
                match (Packet::parse(&bytes[..end]), &packet) {
                    // A shorter URL path is still a URL path. Fewer hash parts or bits are still a
                    // batch or an answer.
                    (Ok(Packet::Have { .. }), Packet::Have { .. }) if end > 9 => {}
                    (Ok(Packet::QueryMany { .. }), Packet::QueryMany { .. })
                        if (end - 5) % 20 <= 1 => {}
                    (Ok(Packet::AnswerMany { .. }), Packet::AnswerMany { .. }) if end >= 5 => {}
                    (parsed, _) => assert!(parsed.is_err(), "{packet:?} cut at {end}"),
                }
            }
        }
    }

    #[test]
    fn parse_of_any_kind_and_length_does_not_panic() {
        for kind in 0..=255u8 {
            for len in 0..900 {
                for fill in [0, b'0', b'/', 0xff] {
                    let mut datagram = vec![fill; len];
                    if let Some(first) = datagram.first_mut() {
                        *first = kind;
                    }
                    if let Ok(packet) = Packet::parse(&datagram) {
                        assert!(
                            kind <= ANSWER_MANY && len <= Packet::MAX_LEN
                                || kind == HELLO
                                || kind == BYE
                        );
                        assert_eq!(Packet::parse(&packet.encode()), Ok(packet));
                    }
                }
            }
        }
    }

    #[test]
    fn batch_of_forty_is_longest_packet_and_parses_back() {
        let hash_parts: Vec<HashPart> =
            (0..=MAX_BATCH as u8).map(|n| HashPart::from_bytes(&[n; 20])).collect();
        let packed = HashParts::pack(&hash_parts);
        assert_eq!((packed.len(), packed.is_empty()), (MAX_BATCH, false));
        assert!(packed.iter().eq(hash_parts[..MAX_BATCH].iter().copied()));
        let query = Packet::QueryMany { id: 1, hash_parts: packed, holders_only: true }.encode();
        assert_eq!(query.len(), Packet::MAX_LEN);
        let held = AnswerBits::pack((0..MAX_BATCH).map(|at| at % 3 == 0));
        assert!(held.fits(MAX_BATCH) && !held.fits(MAX_BATCH - 8) && held.any());
        assert!((0..MAX_BATCH).all(|at| held.is_set(at) == (at % 3 == 0)));
        assert!(!held.is_set(MAX_BATCH));
        let answer = Packet::AnswerMany { id: 1, held }.encode();
        assert!(answer.len() <= query.len());
        let probe =
            Packet::QueryMany { id: 1, hash_parts: HashParts::pack([]), holders_only: false };
        assert_eq!(
            probe.encode().len(),
            Packet::AnswerMany { id: 1, held: AnswerBits::pack([]) }.encode().len()
        );
    }

    #[test]
    fn url_path_or_port_out_of_range_is_refused() {
        for path in ["a b", "a\r\nb", "/a", "a?b", "a#b", "http://a", "\u{e9}", "a@b", ""] {
            let datagram = [b"\x01\0\0\0\x07\0\0\x30\x10", path.as_bytes()].concat();
            assert!(Packet::parse(&datagram).is_err(), "{path:?}");
        }
        for port in [[0, 0, 0, 0], [0, 1, 0, 0], [0xff; 4]] {
            let datagram = [&b"\x01\0\0\0\x07"[..], &port, b"local/x"].concat();
            assert!(Packet::parse(&datagram).is_err(), "{port:?}");
        }
    }

    #[test]
    fn longer_hello_of_same_version_is_parsed() {
        let (packet, mut bytes) = golden().swap_remove(3);
        bytes.extend_from_slice(b"more");
        assert_eq!(Packet::parse(&bytes), Ok(packet));
        bytes[1] = 2;
        assert!(Packet::parse(&bytes).is_err());
    }
}
