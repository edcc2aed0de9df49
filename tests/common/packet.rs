//! Encoder and decoder for the datagrams of docs/protocol.md, independent of the program's code.

use super::PORT;

/// Flag of a hello: the sender answers [`Packet::QueryMany`].
const FLAG_BATCHES: u8 = 2;

/// A decoded datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Kind 0: a query for one path.
    Query { id: u32, hash_part: String },
    /// Kind 1: the sender has the path.
    Have { id: u32, port: u32, path: String },
    /// Kind 2: the sender does not have the path.
    HaveNot { id: u32 },
    /// Kind 3: announcement of a running node.
    Hello { version: u8, port: u16, instance: [u8; 8], flags: u8 },
    /// Kind 4: announcement of a node that stops.
    Bye { version: u8, port: u16, instance: [u8; 8], flags: u8 },
    /// Kind 5, with its hash parts and flag byte undecoded.
    QueryMany { id: u32, rest: Vec<u8> },
    /// Kind 6: one bit per queried path.
    AnswerMany { id: u32, bits: Vec<u8> },
}

impl Packet {
    /// Decodes a datagram. `None` if its kind is unknown or it is malformed.
    pub fn read(bytes: &[u8]) -> Option<Packet> {
        let number = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let text = |at: usize| String::from_utf8(bytes.get(at..)?.to_vec()).ok();
        Some(match bytes.first()? {
            0 => Packet::Query { id: number(1)?, hash_part: text(5)? },
            1 => Packet::Have { id: number(1)?, port: number(5)?, path: text(9)? },
            2 => Packet::HaveNot { id: number(1)? },
            kind @ (3 | 4) => {
                let (version, flags) = (*bytes.get(1)?, *bytes.get(12)?);
                let port = u16::from_be_bytes(bytes[2..4].try_into().ok()?);
                let instance = bytes[4..12].try_into().ok()?;
                if *kind == 3 {
                    Packet::Hello { version, port, instance, flags }
                } else {
                    Packet::Bye { version, port, instance, flags }
                }
            }
            5 => Packet::QueryMany { id: number(1)?, rest: bytes[5..].to_vec() },
            6 => Packet::AnswerMany { id: number(1)?, bits: bytes[5..].to_vec() },
            _ => return None,
        })
    }

    /// Encodes the datagram.
    pub fn write(&self) -> Vec<u8> {
        match self {
            Packet::Query { id, hash_part } => {
                [&[0], &id.to_be_bytes()[..], hash_part.as_bytes()].concat()
            }
            Packet::Have { id, port, path } => {
                [&[1], &id.to_be_bytes()[..], &port.to_be_bytes(), path.as_bytes()].concat()
            }
            Packet::HaveNot { id } => [&[2], &id.to_be_bytes()[..]].concat(),
            Packet::QueryMany { id, rest } => [&[5], &id.to_be_bytes()[..], rest].concat(),
            Packet::AnswerMany { id, bits } => [&[6], &id.to_be_bytes()[..], bits].concat(),
            Packet::Hello { version, port, instance, flags } => {
                node(3, *version, *port, instance, *flags)
            }
            Packet::Bye { version, port, instance, flags } => {
                node(4, *version, *port, instance, *flags)
            }
        }
    }
}

/// The hello of a node that answers batched queries.
pub fn hello(instance: [u8; 8]) -> Vec<u8> {
    Packet::Hello { version: 1, port: PORT, instance, flags: FLAG_BATCHES }.write()
}

fn node(kind: u8, version: u8, port: u16, instance: &[u8; 8], flags: u8) -> Vec<u8> {
    [&[kind, version], &port.to_be_bytes()[..], instance, &[flags]].concat()
}
