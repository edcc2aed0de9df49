//! Checks announced addresses, and groups addresses for limits.
//!
//! Nodes connect to whatever is announced. So an announced address must not lead them to
//! themselves, to services of their own machine, or to a cloud's metadata service.

use peerix::wire::tracker::{MAX_ADDR, can_be_peer};
use std::net::{IpAddr, Ipv4Addr};

/// Maximum length in bytes of one label of a host name (RFC 1035).
const MAX_LABEL: usize = 63;

/// Checks that an announced address is an IP address that a peer can have, or a host name.
///
/// # Errors
/// Returns the reason why not.
pub fn check(addr: &str) -> Result<(), &'static str> {
    if let Ok(ip) = addr.parse() {
        return if can_be_peer(ip) { Ok(()) } else { Err("addr: no peer can be reached there") };
    }
    if addr.len() > MAX_ADDR {
        return Err("addr: longer than host names are");
    }
    let name = addr.strip_suffix('.').unwrap_or(addr);
    let label = |label: &str| {
        let fine = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
        fine && !label.is_empty() && label.len() <= MAX_LABEL
    };
    if !name.split('.').all(label) {
        return Err("addr: neither an IP address nor a host name");
    }
    let last = name.rsplit('.').next().unwrap_or_default();
    // System resolvers read 127.1, 2130706433 and 0x7f.1 as IPv4 addresses. No top-level domain is
    // a number.
    let hexadecimal = last.strip_prefix("0x").or(last.strip_prefix("0X"));
    if last.bytes().all(|b| b.is_ascii_digit())
        || hexadecimal.is_some_and(|d| d.bytes().all(|b| b.is_ascii_hexdigit()))
    {
        return Err("addr: a number, but not an IP address as it is usually written");
    }
    if last.eq_ignore_ascii_case("localhost") || last.eq_ignore_ascii_case("localdomain") {
        return Err("addr: every machine calls itself so");
    }
    Ok(())
}

/// Number of low bits of an IPv6 address that one customer of a provider controls: a /56.
const CUSTOMER_BITS: u32 = 72;

/// The key under which an address is limited: an IPv4 address, or an IPv6 /56.
pub fn limit_key(ip: IpAddr) -> u128 {
    match ip.to_canonical() {
        IpAddr::V4(ip) => u128::from(Ipv4Addr::to_ipv6_mapped(&ip)),
        IpAddr::V6(ip) => u128::from(ip) >> CUSTOMER_BITS << CUSTOMER_BITS,
    }
}

/// The key of the network of an address: an IPv4 /24, or an IPv6 /56. One operator easily gets
/// several addresses in it.
pub fn network(ip: IpAddr) -> u128 {
    match ip.to_canonical() {
        IpAddr::V4(_) => limit_key(ip) >> 8 << 8,
        IpAddr::V6(_) => limit_key(ip),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn check_accepts_peer_addresses_and_refuses_others() {
        for good in [
            "10.0.0.1",
            "192.168.1.9",
            "100.64.0.1",
            "203.0.113.7",
            "fd00::1",
            "2001:db8::1",
            "::ffff:10.0.0.1",
            "example.org",
            "example.org.",
            "a",
            "my_host-1.lan",
            "xn--bcher-kva.example",
            "1.2.3.4.example",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            ".",
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::7f00:1",
            "fe80::1",
            "fe80::1%eth0",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::ffff:0.0.0.0",
            "[fd00::1]",
            "10.0.0.1:80",
            "a b",
            "a/b",
            "a@b",
            "a..b",
            ".a",
            "é",
            "a\n",
            "localhost",
            "LOCALHOST.",
            "a.localhost",
            "1.2.3",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "127.0.0.0x1",
            "0177.0.0.1",
            "1.2.3.4.5",
            "256.1.1.1",
            "10.0.0.1.",
            &"a".repeat(64),
            &"a.".repeat(127),
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn household_and_network_group_neighbouring_addresses() {
        let household = |text: &str| limit_key(text.parse().unwrap());
        assert_eq!(household("10.0.0.1"), household("::ffff:10.0.0.1"));
        assert_ne!(household("10.0.0.1"), household("10.0.0.2"));
        assert_eq!(household("2001:db8::1"), household("2001:db8::ffff:1"));
        assert_eq!(household("2001:db8::1"), household("2001:db8:0:ff::1"));
        assert_ne!(household("2001:db8::1"), household("2001:db8:0:100::1"));
        let network = |text: &str| network(text.parse().unwrap());
        assert_eq!(network("10.0.0.1"), network("10.0.0.2"));
        assert_ne!(network("10.0.0.1"), network("10.0.1.1"));
        assert_eq!(network("2001:db8::1"), network("2001:db8:0:ff::1"));
    }
}
