//! The UDP packets of LAN discovery. Numbers are big-endian.
//!
//! | byte 0 | bytes | meaning |
//! |---|---|---|
//! | 0 query | 1–4 request ID, 5–36 hash part | who has this? |
//! | 1 have | 1–4 request ID, 5–8 HTTP port, 9… URL path | I do: `http://<sender>:<port>/<path>` |
//! | 2 have not | 1–4 request ID | I don't |
//! | 3 hello | 1 version, 2–3 HTTP port, 4–11 instance ID, 12 flags | I am here |
//! | 4 bye | as hello | I am leaving |
//!
//! Kinds 0 and 1 are those of the Python peerix, which ignores the others. Flag 1 of *hello* says that the
//! sender knows so many peers that it sends no *have not* ([`Hello::crowded`]). Bytes after the flags are for
//! later versions and not looked at.

use crate::nix::{HashPart, Malformed};

/// What one datagram says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Who has the path with this hash part?
    Query {
        /// Names the query in its answers.
        id: u32,
        /// The path that is looked for.
        hash_part: HashPart,
    },
    /// The sender has it.
    Have {
        /// Of the query this answers.
        id: u32,
        /// TCP port of the sender's HTTP server, never 0.
        port: u16,
        /// Where its narinfo is, relative to the root of that server, without a slash in front.
        url_path: String,
    },
    /// The sender does not have it.
    HaveNot {
        /// Of the query this answers.
        id: u32,
    },
    /// The sender is there.
    Hello(Hello),
    /// The sender is leaving.
    Bye(Hello),
}

/// What a node says of itself in *hello* and *bye*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hello {
    /// TCP port of the sender's HTTP server, never 0.
    pub port: u16,
    /// Random at every start, so that a restart shows.
    pub instance: [u8; 8],
    /// The sender sends no *have not*; nobody should wait for one.
    pub crowded: bool,
}

const QUERY: u8 = 0;
const HAVE: u8 = 1;
const HAVE_NOT: u8 = 2;
const HELLO: u8 = 3;
const BYE: u8 = 4;

const HELLO_VERSION: u8 = 1;
const FLAG_CROWDED: u8 = 1;

/// A hash part and a route take well under 100 bytes; more is no URL path of a peer.
const MAX_URL_PATH: usize = 256;

const WHAT: &str = "packet";

impl Packet {
    /// The longest datagram that can be a packet, in bytes.
    pub const MAX_LEN: usize = 9 + MAX_URL_PATH;

    /// Reads one datagram.
    ///
    /// # Errors
    /// Anything that is not one of the packets above, whole.
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
                let (port, url_path) = rest.split_first_chunk().ok_or(Malformed::new(WHAT, "too short"))?;
                Ok(Packet::Have { id, port: port_of(u32::from_be_bytes(*port))?, url_path: url_path_of(url_path)? })
            }
            HAVE_NOT if rest.is_empty() => Ok(Packet::HaveNot { id }),
            HAVE_NOT => Err(Malformed::new(WHAT, "too long")),
            _ => Err(Malformed::new(WHAT, "of an unknown kind")),
        }
    }

    /// The bytes of one datagram.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Packet::Query { id, hash_part } => {
                [&[QUERY][..], &id.to_be_bytes(), hash_part.as_str().as_bytes()].concat()
            }
            Packet::Have { id, port, url_path } => {
                [&[HAVE][..], &id.to_be_bytes(), &u32::from(*port).to_be_bytes(), url_path.as_bytes()].concat()
            }
            Packet::HaveNot { id } => [&[HAVE_NOT][..], &id.to_be_bytes()].concat(),
            Packet::Hello(hello) => hello.encode(HELLO),
            Packet::Bye(hello) => hello.encode(BYE),
        }
    }
}

impl Hello {
    fn parse(rest: &[u8]) -> Result<Self, Malformed> {
        let &[version, port_high, port_low, a, b, c, d, e, f, g, h, flags, ..] = rest else {
            return Err(Malformed::new(WHAT, "too short"));
        };
        if version != HELLO_VERSION {
            return Err(Malformed::new(WHAT, "hello of another version"));
        }
        Ok(Hello {
            port: port_of(u32::from(u16::from_be_bytes([port_high, port_low])))?,
            instance: [a, b, c, d, e, f, g, h],
            crowded: flags & FLAG_CROWDED != 0,
        })
    }

    fn encode(&self, kind: u8) -> Vec<u8> {
        let flags = if self.crowded { FLAG_CROWDED } else { 0 };
        [&[kind, HELLO_VERSION][..], &self.port.to_be_bytes(), &self.instance, &[flags]].concat()
    }
}

fn port_of(number: u32) -> Result<u16, Malformed> {
    u16::try_from(number).ok().filter(|&port| port != 0).ok_or(Malformed::new(WHAT, "port outside 1 to 65535"))
}

/// A URL path goes into a request line, so only characters that a path has are let through.
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

    /// Written by hand from the packet table and, for kinds 0 and 1, as captured from the Python peerix.
    fn golden() -> Vec<(Packet, Vec<u8>)> {
        let hash_part = HashPart::parse(HASH_PART.as_bytes()).unwrap();
        let hello = Hello { port: 12304, instance: *b"\x01\x02\x03\x04\x05\x06\x07\x08", crowded: false };
        let url_path = format!("local/{HASH_PART}.narinfo");
        vec![
            (Packet::Query { id: 0x0102_0304, hash_part }, [b"\0\x01\x02\x03\x04", HASH_PART.as_bytes()].concat()),
            (
                Packet::Have { id: 7, port: 12304, url_path: url_path.clone() },
                [b"\x01\0\0\0\x07\0\0\x30\x10", url_path.as_bytes()].concat(),
            ),
            (Packet::HaveNot { id: 0xffff_ffff }, b"\x02\xff\xff\xff\xff".to_vec()),
            (Packet::Hello(hello), b"\x03\x01\x30\x10\x01\x02\x03\x04\x05\x06\x07\x08\0".to_vec()),
            (
                Packet::Bye(Hello { crowded: true, ..hello }),
                b"\x04\x01\x30\x10\x01\x02\x03\x04\x05\x06\x07\x08\x01".to_vec(),
            ),
        ]
    }

    #[test]
    fn golden_bytes_both_ways() {
        for (packet, bytes) in golden() {
            assert_eq!(packet.encode(), bytes, "{packet:?}");
            assert_eq!(Packet::parse(&bytes).as_ref(), Ok(&packet));
            assert!(bytes.len() <= Packet::MAX_LEN);
        }
    }

    #[test]
    fn no_truncation_is_taken_for_another_packet() {
        for (packet, bytes) in golden() {
            for end in 0..bytes.len() {
                match (Packet::parse(&bytes[..end]), &packet) {
                    // A shorter URL path is a URL path.
                    (Ok(Packet::Have { .. }), Packet::Have { .. }) if end > 9 => {}
                    (parsed, _) => assert!(parsed.is_err(), "{packet:?} cut at {end}"),
                }
            }
        }
    }

    #[test]
    fn every_first_byte_with_every_length_is_survived() {
        for kind in 0..=255u8 {
            for len in 0..600 {
                for fill in [0, b'0', b'/', 0xff] {
                    let mut datagram = vec![fill; len];
                    if let Some(first) = datagram.first_mut() {
                        *first = kind;
                    }
                    if let Ok(packet) = Packet::parse(&datagram) {
                        assert!(kind <= BYE);
                        assert_eq!(Packet::parse(&packet.encode()), Ok(packet));
                    }
                }
            }
        }
    }

    #[test]
    fn what_could_reach_past_a_request_line_is_refused() {
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
    fn a_longer_hello_of_a_later_release_is_understood() {
        let (packet, mut bytes) = golden().swap_remove(3);
        bytes.extend_from_slice(b"more");
        assert_eq!(Packet::parse(&bytes), Ok(packet));
        bytes[1] = 2;
        assert!(Packet::parse(&bytes).is_err());
    }
}
