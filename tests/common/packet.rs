//! The datagrams of SPEC section 3, written and read here apart from the program's own code.

/// A datagram, read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Kind 0.
    Query { id: u32, hash_part: String },
    /// Kind 1.
    Have { id: u32, port: u32, path: String },
    /// Kind 2.
    HaveNot { id: u32 },
    /// Kind 3.
    Hello { version: u8, port: u16, instance: [u8; 8], flags: u8 },
    /// Kind 4.
    Bye { version: u8, port: u16, instance: [u8; 8], flags: u8 },
}

impl Packet {
    /// Reads a datagram; `None` if it is none of these.
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
            _ => return None,
        })
    }

    /// The datagram.
    pub fn write(&self) -> Vec<u8> {
        match self {
            Packet::Query { id, hash_part } => [&[0], &id.to_be_bytes()[..], hash_part.as_bytes()].concat(),
            Packet::Have { id, port, path } => {
                [&[1], &id.to_be_bytes()[..], &port.to_be_bytes(), path.as_bytes()].concat()
            }
            Packet::HaveNot { id } => [&[2], &id.to_be_bytes()[..]].concat(),
            Packet::Hello { version, port, instance, flags } => node(3, *version, *port, instance, *flags),
            Packet::Bye { version, port, instance, flags } => node(4, *version, *port, instance, *flags),
        }
    }
}

fn node(kind: u8, version: u8, port: u16, instance: &[u8; 8], flags: u8) -> Vec<u8> {
    [&[kind, version], &port.to_be_bytes()[..], instance, &[flags]].concat()
}
