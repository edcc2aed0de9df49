//! A packet filter that restricts a wildcard socket to some destination addresses (classic BPF,
//! `SO_ATTACH_FILTER` in socket(7)). A connection to another address gets no response, as behind a
//! firewall.

use socket2::SockFilter;
use std::net::{IpAddr, Ipv6Addr};

const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;

/// Base of loads from the IP header (`SKF_NET_OFF`).
const IP_HEADER: u32 = 0xfff0_0000;
/// Offset of the packet type (`SKF_AD_PKTTYPE`). Type 0 is unicast to this host.
const PACKET_TYPE: u32 = 0xffff_f004;
/// Offset of the receiving interface's index (`SKF_AD_IFINDEX`).
const INTERFACE: u32 = 0xffff_f008;

/// Builds a program that accepts packets to one of `addresses`, to loopback, and broadcast and
/// multicast packets received on one of `interfaces`. It drops all others.
pub(super) fn program(addresses: &[IpAddr], interfaces: &[u32]) -> Vec<SockFilter> {
    let instructions = instructions(addresses, interfaces);
    instructions.into_iter().map(|(code, yes, no, k)| SockFilter::new(code, yes, no, k)).collect()
}

/// An instruction: operation, instructions to skip if a comparison holds, those to skip if not, and
/// operand.
type BpfInstruction = (u16, u8, u8, u32);

const ACCEPT: BpfInstruction = (RETURN, 0, 0, u32::MAX);
const DROP: BpfInstruction = (RETURN, 0, 0, 0);

fn instructions(addresses: &[IpAddr], interfaces: &[u32]) -> Vec<BpfInstruction> {
    let mut v4: Vec<BpfInstruction> = vec![(LOAD_WORD, 0, 0, IP_HEADER + 16)];
    let mut v6: Vec<BpfInstruction> = Vec::new();
    for address in addresses.iter().chain(&[IpAddr::V6(Ipv6Addr::LOCALHOST)]) {
        match address {
            IpAddr::V4(address) => v4.extend([(JUMP_IF_EQUAL, 0, 1, address.to_bits()), ACCEPT]),
            IpAddr::V6(address) => {
                for (at, word) in
                    (0u8..4).zip([96, 64, 32, 0].map(|shift| (address.to_bits() >> shift) as u32))
                {
                    // Number of instructions from this comparison to the end of the address.
                    let to_next = 2 * (3 - at) + 1;
                    v6.extend([
                        (LOAD_WORD, 0, 0, IP_HEADER + 24 + 4 * u32::from(at)),
                        (JUMP_IF_EQUAL, 0, to_next, word),
                    ]);
                }
                v6.push(ACCEPT);
            }
        }
    }
    v4.extend([(AND, 0, 0, 0xff00_0000), (JUMP_IF_EQUAL, 0, 1, 0x7f00_0000), ACCEPT]);
    let mut to_several: Vec<BpfInstruction> = vec![
        (LOAD_WORD, 0, 0, PACKET_TYPE),
        (JUMP_IF_EQUAL, 0, 1, 0),
        DROP,
        (LOAD_WORD, 0, 0, INTERFACE),
    ];
    interfaces.iter().for_each(|index| to_several.extend([(JUMP_IF_EQUAL, 0, 1, *index), ACCEPT]));
    to_several.push(DROP);
    v4.extend(&to_several);
    v6.extend(&to_several);
    // The IP version is in the first four bits.
    let mut all = vec![
        (LOAD_BYTE, 0, 0, IP_HEADER),
        (AND, 0, 0, 0xf0),
        (JUMP_IF_EQUAL, 0, 1, 0x60),
        (JUMP, 0, 0, v4.len() as u32),
    ];
    all.extend(v4);
    all.extend(v6);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Interprets the program for a packet to `to` of this type, received on `interface`.
    fn accepts(program: &[BpfInstruction], to: &str, packet_type: u32, interface: u32) -> bool {
        let mut header = [0u8; 40];
        match to.parse().unwrap() {
            IpAddr::V4(address) => {
                header[0] = 0x45;
                header[16..20].copy_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                header[0] = 0x6f;
                header[24..40].copy_from_slice(&address.octets());
            }
        }
        let (mut at, mut value) = (0, 0);
        loop {
            let (code, yes, no, k) = program[at];
            at += 1;
            match code {
                LOAD_BYTE => value = u32::from(header[(k - IP_HEADER) as usize]),
                LOAD_WORD if k == PACKET_TYPE => value = packet_type,
                LOAD_WORD if k == INTERFACE => value = interface,
                LOAD_WORD => {
                    let from = (k - IP_HEADER) as usize;
                    value = u32::from_be_bytes(header[from..from + 4].try_into().unwrap());
                }
                AND => value &= k,
                JUMP => at += k as usize,
                JUMP_IF_EQUAL => at += usize::from(if value == k { yes } else { no }),
                RETURN => return k != 0,
                _ => panic!("{code}"),
            }
        }
    }

    #[test]
    fn filter_accepts_bound_and_loopback_addresses_only() {
        let many = (0..200).map(|n| IpAddr::from([10, 9, 0, n]));
        let given = ["10.0.0.1", "fd00::1", "fe80::7"].map(|text| text.parse().unwrap());
        let program = instructions(&many.chain(given).collect::<Vec<_>>(), &[2, 5]);
        for (to, accepted) in [
            ("10.0.0.1", true),
            ("10.9.0.199", true),
            ("10.0.0.2", false),
            ("0.0.0.0", false),
            ("127.0.0.1", true),
            ("127.8.8.8", true),
            ("128.0.0.1", false),
            ("::1", true),
            ("fd00::1", true),
            ("fe80::7", true),
            ("fd00::2", false),
            ("fd00:0:1::1", false),
            ("::", false),
        ] {
            assert_eq!(accepts(&program, to, 0, 2), accepted, "{to}");
        }
        for (interface, accepted) in [(2, true), (5, true), (3, false)] {
            assert_eq!(accepts(&program, "10.0.0.255", 1, interface), accepted);
            assert_eq!(accepts(&program, "ff02::1", 2, interface), accepted);
        }
    }
}
