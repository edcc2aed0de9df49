//! Requests and messages of the kernel's netlink protocol for networks: netlink(7), rtnetlink(7).
//!
//! A datagram holds messages. A message has a header, a fixed part and attributes. Numbers are in
//! native byte order. An incomplete message or attribute, which the kernel never sends, ends the
//! iteration.

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::net::{bind, recv, send, socket_with};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

/// An interface exists or has changed: `RTM_NEWLINK`.
pub const LINK: u16 = 16;
/// An interface was removed: `RTM_DELLINK`.
pub const LINK_GONE: u16 = 17;
/// An address exists or has changed: `RTM_NEWADDR`.
pub const ADDRESS: u16 = 20;
/// An address was removed: `RTM_DELADDR`.
pub const ADDRESS_GONE: u16 = 21;
/// An entry of a neighbour table: `RTM_NEWNEIGH`.
pub const NEIGHBOUR: u16 = 28;

/// A kernel table that can be requested as a whole.
pub struct KernelTable {
    /// Message type of the request.
    request: u16,
    /// Message type of the messages in the answer.
    reply: u16,
    /// Length of the fixed part of both, in bytes.
    pub fixed_len: usize,
}

/// The interfaces: `RTM_GETLINK`, `struct ifinfomsg`.
pub const LINKS: KernelTable = KernelTable { request: 18, reply: LINK, fixed_len: 16 };
/// The addresses: `RTM_GETADDR`, `struct ifaddrmsg`.
pub const ADDRESSES: KernelTable = KernelTable { request: 22, reply: ADDRESS, fixed_len: 8 };
/// The neighbour tables: `RTM_GETNEIGH`, `struct ndmsg`.
pub const NEIGHBOURS: KernelTable = KernelTable { request: 30, reply: NEIGHBOUR, fixed_len: 12 };

/// The end of the answer to a request: `NLMSG_DONE`.
const DONE: u16 = 3;
/// A request failed: `NLMSG_ERROR`.
const ERROR: u16 = 2;

/// Flags of a request for a whole table: `NLM_F_REQUEST | NLM_F_DUMP`.
const REQUEST_DUMP: u16 = 0x301;

/// Length of a message's header, in bytes: `struct nlmsghdr`.
const HEADER_LEN: usize = 16;

/// Maximum time for the answer to a request, which the kernel usually sends at once. At the bound
/// the request fails.
pub const DUMP_TIMEOUT: Duration = Duration::from_secs(1);

/// Size of the receive buffer, in bytes. The kernel sends datagrams of up to this size if the
/// buffer has it, and no larger ones.
const BUFFER_LEN: usize = 32 << 10;

/// A message without its header.
#[derive(Debug, Clone, Copy)]
pub struct NetlinkMessage<'a> {
    /// Message type, such as [`LINK`].
    pub kind: u16,
    /// The fixed part and the attributes.
    pub body: &'a [u8],
}

/// Iterates over the messages of a datagram.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = NetlinkMessage<'_>> {
    std::iter::from_fn(move || {
        let len = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let kind = u16_at(bytes, 4)?;
        let body = bytes.get(HEADER_LEN..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some(NetlinkMessage { kind, body })
    })
}

/// Iterates over the attributes of a message, with the type and the value of each. `bytes` begins
/// after the fixed part.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let len = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)?;
        let value = bytes.get(4..len)?;
        bytes = bytes.get(aligned(len)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// Returns the first attribute of this type in a message about an entry of `table`.
pub fn attribute<'a>(body: &'a [u8], table: &KernelTable, kind: u16) -> Option<&'a [u8]> {
    let found = attributes(body.get(table.fixed_len..)?).find(|(other, _)| *other == kind);
    found.map(|(_, value)| value)
}

/// Parses an address of 4 or 16 bytes. Returns `None` for any other length.
pub fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(Ipv4Addr::from(v4).into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(|v6| Ipv6Addr::from(v6).into())
}

/// Reads a number of two bytes at an offset. Returns `None` beyond the end.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Reads a number of four bytes at an offset. Returns `None` beyond the end.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// Rounds `len` up to the alignment of messages and attributes, four bytes.
fn aligned(len: usize) -> usize {
    len.next_multiple_of(4)
}

/// Opens a nonblocking socket that receives the kernel's reports to `groups`, a bit mask of
/// `RTMGRP_…`.
///
/// # Errors
/// No netlink socket is allowed, or no file descriptor is left.
pub fn open(groups: u32) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, groups))?;
    Ok(socket)
}

/// Requests a whole table, for all interfaces and both address families, and calls `each` with the
/// body of every message in the answer. Usually blocks as long as the kernel takes to list the
/// table, and for [`DUMP_TIMEOUT`] at most.
///
/// # Errors
/// No socket is allowed, the kernel refuses the request, the answer is not complete after
/// [`DUMP_TIMEOUT`], or a datagram is larger than [`BUFFER_LEN`].
pub fn dump(table: &KernelTable, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    send(&socket, &dump_request(table), SendFlags::empty())?;
    let deadline = Instant::now() + DUMP_TIMEOUT;
    let mut buffer = vec![0; BUFFER_LEN];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        set_socket_timeout(&socket, Timeout::Recv, Some(left))?;
        let (len, whole) = retry_on_intr(|| recv(&socket, &mut buffer[..], RecvFlags::TRUNC))?;
        if whole > len {
            return Err(Errno::MSGSIZE.into());
        }
        for message in messages(&buffer[..len]) {
            match message.kind {
                DONE => return Ok(()),
                ERROR => return Err(error(message.body)),
                kind if kind == table.reply => each(message.body),
                _ => {}
            }
        }
    }
}

/// Builds a request whose fixed part is all zeros, which selects all entries.
fn dump_request(table: &KernelTable) -> Vec<u8> {
    let mut request = vec![0; HEADER_LEN + table.fixed_len];
    let len = request.len() as u32;
    request[..4].copy_from_slice(&len.to_ne_bytes());
    request[4..6].copy_from_slice(&table.request.to_ne_bytes());
    request[6..8].copy_from_slice(&REQUEST_DUMP.to_ne_bytes());
    request
}

/// Parses the error of an [`ERROR`] message, a negative error number.
fn error(body: &[u8]) -> io::Error {
    let number = u32_at(body, 0).map_or(0, |bits| bits.cast_signed());
    io::Error::from_raw_os_error(number.wrapping_neg())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A message of this type with this body, padded.
    fn message(kind: u16, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_LEN];
        bytes[..4].copy_from_slice(&((HEADER_LEN + body.len()) as u32).to_ne_bytes());
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes.extend(body);
        bytes.resize(aligned(bytes.len()), 0);
        bytes
    }

    #[test]
    fn truncated_message_ends_the_iteration() {
        let datagram = [message(LINK, b"abcde"), message(DONE, b"")].concat();
        let whole: Vec<_> = messages(&datagram).map(|m| (m.kind, m.body)).collect();
        assert_eq!(whole, [(LINK, &b"abcde"[..]), (DONE, b"")]);
        for len in 0..datagram.len() {
            let count = messages(&datagram[..len]).count();
            // The padding of the first message may be missing.
            let expected = if len >= HEADER_LEN + 5 { 1 } else { 0 };
            assert_eq!(count, expected, "{len}");
        }
    }

    #[test]
    fn invalid_lengths_end_the_iteration() {
        for len in [0u32, 1, 15, 17, u32::MAX] {
            let mut bytes = message(LINK, b"");
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(messages(&bytes).count(), 0, "{len}");
        }
        for len in [0u16, 3, 5, u16::MAX] {
            let bytes = [&len.to_ne_bytes()[..], &[7, 0]].concat();
            assert_eq!(attributes(&bytes).count(), 0, "{len}");
        }
    }

    #[test]
    fn attributes_are_found_by_kind() {
        let attribute_of = |kind: u16, value: &[u8]| {
            let len = (4 + value.len()) as u16;
            let mut bytes = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
            bytes.resize(aligned(bytes.len()), 0);
            bytes
        };
        let fixed = b"12345678".to_vec();
        let body = [fixed, attribute_of(3, b"eth0\0"), attribute_of(1, &[10, 0, 0, 1])].concat();
        assert_eq!(attribute(&body, &ADDRESSES, 3), Some(&b"eth0\0"[..]));
        assert_eq!(attribute(&body, &ADDRESSES, 1).and_then(ip), Some([10, 0, 0, 1].into()));
        assert_eq!(attribute(&body, &ADDRESSES, 2), None);
        assert_eq!(attribute(b"short", &ADDRESSES, 1), None);
        assert_eq!(ip(&[0; 16]), Some(Ipv6Addr::UNSPECIFIED.into()));
        assert_eq!(ip(&[1, 2, 3]), None);
    }

    #[test]
    fn error_message_yields_the_error_number() {
        assert_eq!(error(&(-13i32).to_ne_bytes()).raw_os_error(), Some(13));
        assert_eq!(error(&i32::MIN.to_ne_bytes()).raw_os_error(), Some(i32::MIN));
        assert_eq!(error(b"").raw_os_error(), Some(0));
    }

    #[test]
    fn unknown_request_fails() {
        // The message types of rtnetlink end far below.
        let unknown = KernelTable { request: 0xfff0, reply: LINK, fixed_len: 4 };
        let error = dump(&unknown, |_| panic!("no message")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::OPNOTSUPP.raw_os_error()));
    }
}
