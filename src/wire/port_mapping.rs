//! Requests and answers of PCP (RFC 6887) and NAT-PMP (RFC 6886), by which a router forwards a TCP
//! port. No I/O.

use crate::nix::Malformed;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// UDP port of both protocols on the router.
pub const PORT: u16 = 5351;

const PCP: u8 = 2;
const NAT_PMP: u8 = 0;
const PCP_MAP: u8 = 1;
const NAT_PMP_ADDRESS: u8 = 0;
const NAT_PMP_MAP_TCP: u8 = 2;
const ANSWER: u8 = 0x80;
const TCP: u8 = 6;

/// Result code of both protocols: the router does not support this version.
const UNSUPPORTED_VERSION: u16 = 1;

const WHAT: &str = "answer of the router";

/// A mapping that the router is asked to create, renew or delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingRequest {
    /// This machine's address, from which the request is sent.
    pub client: IpAddr,
    /// Random number that stays the same for the life of the mapping. The router refuses changes
    /// with another one (PCP only).
    pub nonce: [u8; 12],
    /// The TCP port on this machine.
    pub internal_port: u16,
    /// The suggested external port, as in the previous grant; 0 for any.
    pub external_port: u16,
    /// Requested lifetime in seconds; 0 deletes the mapping.
    pub lifetime: u32,
}

/// A mapping as the router granted it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MappingGrant {
    /// The external address; `None` with NAT-PMP, whose answer has none.
    pub external_ip: Option<IpAddr>,
    /// The external TCP port; not 0.
    pub external_port: u16,
    /// Granted lifetime in seconds.
    pub lifetime: u32,
    /// Seconds since the router last lost its mappings, by its own clock.
    pub epoch: u32,
}

/// An answer of a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingResponse {
    /// The mapping exists.
    Mapped(MappingGrant),
    /// The external address (NAT-PMP only).
    Address(Ipv4Addr),
    /// The router does not support this protocol version.
    UnknownVersion,
    /// The router refused, with this result code.
    Refused(u16),
}

/// Encodes a PCP MAP request: a port mapping for IPv4, a firewall pinhole for IPv6 (RFC 6887,
/// section 11).
pub fn pcp_request(request: &MappingRequest) -> Vec<u8> {
    let any = match request.client {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED,
    };
    [
        &[PCP, PCP_MAP, 0, 0][..],
        &request.lifetime.to_be_bytes(),
        &v6(request.client).octets(),
        &request.nonce,
        &[TCP, 0, 0, 0],
        &request.internal_port.to_be_bytes(),
        &request.external_port.to_be_bytes(),
        &any.octets(),
    ]
    .concat()
}

/// Encodes a NAT-PMP request for a TCP mapping (RFC 6886, section 3.3).
pub fn nat_pmp_request(request: &MappingRequest) -> Vec<u8> {
    let (internal, external) =
        (request.internal_port.to_be_bytes(), request.external_port.to_be_bytes());
    [&[NAT_PMP, NAT_PMP_MAP_TCP, 0, 0][..], &internal, &external, &request.lifetime.to_be_bytes()]
        .concat()
}

/// Encodes a NAT-PMP request for the router's external address (RFC 6886, section 3.2).
pub fn nat_pmp_address_request() -> Vec<u8> {
    vec![NAT_PMP, NAT_PMP_ADDRESS]
}

/// Parses an answer to one of the datagrams for `request`.
///
/// # Errors
/// The datagram is not an answer, or it answers another request.
pub fn parse(datagram: &[u8], request: &MappingRequest) -> Result<MappingResponse, Malformed> {
    let bad = |why| Malformed::new(WHAT, why);
    match datagram {
        [PCP, kind, ..] if *kind == ANSWER | PCP_MAP => {
            let code = u16::from(*datagram.get(3).ok_or(bad("too short"))?);
            match code {
                0 => parse_pcp(datagram, request).ok_or(bad("of another mapping")),
                UNSUPPORTED_VERSION => Ok(MappingResponse::UnknownVersion),
                code => Ok(MappingResponse::Refused(code)),
            }
        }
        [NAT_PMP, kind, high, low, rest @ ..] if kind & ANSWER != 0 => {
            match u16::from_be_bytes([*high, *low]) {
                0 => parse_nat_pmp(*kind, rest, request).ok_or(bad("of another mapping")),
                UNSUPPORTED_VERSION => Ok(MappingResponse::UnknownVersion),
                code => Ok(MappingResponse::Refused(code)),
            }
        }
        _ => Err(bad("of an unknown kind")),
    }
}

fn parse_pcp(datagram: &[u8], request: &MappingRequest) -> Option<MappingResponse> {
    let map = datagram.get(24..60)?;
    let is_ours =
        map[..12] == request.nonce && map[12] == TCP && port(&map[16..18]) == request.internal_port;
    let ip = Ipv6Addr::from(<[u8; 16]>::try_from(&map[20..36]).ok()?).to_canonical();
    (is_ours && port(&map[18..20]) != 0).then(|| {
        MappingResponse::Mapped(MappingGrant {
            external_ip: Some(ip),
            external_port: port(&map[18..20]),
            lifetime: number(&datagram[4..8]),
            epoch: number(&datagram[8..12]),
        })
    })
}

fn parse_nat_pmp(kind: u8, rest: &[u8], request: &MappingRequest) -> Option<MappingResponse> {
    match (kind & !ANSWER, rest.len()) {
        (NAT_PMP_ADDRESS, 8) => {
            Some(MappingResponse::Address(Ipv4Addr::new(rest[4], rest[5], rest[6], rest[7])))
        }
        (NAT_PMP_MAP_TCP, 12)
            if port(&rest[4..6]) == request.internal_port && port(&rest[6..8]) != 0 =>
        {
            Some(MappingResponse::Mapped(MappingGrant {
                external_ip: None,
                external_port: port(&rest[6..8]),
                lifetime: number(&rest[8..12]),
                epoch: number(&rest[..4]),
            }))
        }
        _ => None,
    }
}

fn port(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn number(bytes: &[u8]) -> u32 {
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted() -> MappingRequest {
        MappingRequest {
            client: "192.168.1.7".parse().unwrap(),
            nonce: *b"abcdefghijkl",
            internal_port: 0x1234,
            external_port: 0x5678,
            lifetime: 600,
        }
    }

    fn pcp_answer(code: u8) -> Vec<u8> {
        let ip: Ipv4Addr = "203.0.113.7".parse().unwrap();
        let head = [&[2, 0x81, 0, code][..], &300u32.to_be_bytes(), &77u32.to_be_bytes(), &[0; 12]]
            .concat();
        let ports = [0x12, 0x34, 0x99, 0x99];
        [&head[..], b"abcdefghijkl", &[6, 0, 0, 0], &ports, &ip.to_ipv6_mapped().octets()].concat()
    }

    #[test]
    fn requests_match_rfc_layout() {
        let request = pcp_request(&wanted());
        assert_eq!(request.len(), 60);
        assert_eq!(request[..8], [2, 1, 0, 0, 0, 0, 2, 88]);
        assert_eq!(request[8..24], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 192, 168, 1, 7]);
        assert_eq!(request[24..36], *b"abcdefghijkl");
        assert_eq!(request[36..44], [6, 0, 0, 0, 0x12, 0x34, 0x56, 0x78]);
        assert_eq!(nat_pmp_request(&wanted()), [0, 2, 0, 0, 0x12, 0x34, 0x56, 0x78, 0, 0, 2, 88]);
        assert_eq!(nat_pmp_address_request(), [0, 0]);
    }

    #[test]
    fn parse_accepts_own_answers_and_refuses_others() {
        let mapped = |external_ip: Option<&str>, external_port| {
            let external_ip = external_ip.map(|ip| ip.parse().unwrap());
            Ok(MappingResponse::Mapped(MappingGrant {
                external_ip,
                external_port,
                lifetime: 300,
                epoch: 77,
            }))
        };
        assert_eq!(parse(&pcp_answer(0), &wanted()), mapped(Some("203.0.113.7"), 0x9999));
        assert_eq!(parse(&pcp_answer(8), &wanted()), Ok(MappingResponse::Refused(8)));
        assert_eq!(parse(&pcp_answer(1), &wanted()), Ok(MappingResponse::UnknownVersion));
        let other = MappingRequest { nonce: [0; 12], ..wanted() };
        assert!(parse(&pcp_answer(0), &other).is_err());
        assert!(parse(&pcp_answer(0)[..59], &wanted()).is_err());
        let mut no_port = pcp_answer(0);
        no_port[42..44].fill(0);
        assert!(parse(&no_port, &wanted()).is_err());
        let no_port = [0, 130, 0, 0, 0, 0, 0, 77, 0x12, 0x34, 0, 0, 0, 0, 1, 44];
        assert!(parse(&no_port, &wanted()).is_err());

        let nat_pmp = [0, 130, 0, 0, 0, 0, 0, 77, 0x12, 0x34, 0x99, 0x99, 0, 0, 1, 44];
        assert_eq!(parse(&nat_pmp, &wanted()), mapped(None, 0x9999));
        assert!(parse(&nat_pmp, &MappingRequest { internal_port: 1, ..wanted() }).is_err());
        assert_eq!(parse(&[0, 129, 0, 3], &wanted()), Ok(MappingResponse::Refused(3)));
        assert_eq!(
            parse(&[0, 0, 0, 1, 0, 0, 0, 0], &wanted()).ok(),
            None,
            "a request is no answer"
        );
        // What a router that only supports NAT-PMP answers to PCP.
        assert_eq!(
            parse(&[0, 129, 0, 1, 0, 0, 0, 9], &wanted()),
            Ok(MappingResponse::UnknownVersion)
        );
        assert_eq!(
            parse(&[0, 128, 0, 0, 0, 0, 0, 9, 203, 0, 113, 7], &wanted()),
            Ok(MappingResponse::Address([203, 0, 113, 7].into()))
        );
        for length in 0..60 {
            assert!(
                parse(&vec![2; length], &wanted()).is_err()
                    && parse(&vec![0; length], &wanted()).is_err()
            );
        }
    }
}
