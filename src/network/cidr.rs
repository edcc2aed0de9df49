//! Networks in CIDR notation (RFC 4632; RFC 4291, section 2.3).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A network in CIDR notation: an address whose host bits are zero, and a prefix length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix_len: u8,
}

impl Cidr {
    /// Returns the network with this prefix length that contains `address`. A prefix length above
    /// 32 (IPv4) or 128 (IPv6) counts as that number.
    pub fn of(address: IpAddr, prefix_len: u8) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let prefix_len = prefix_len.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix_len)).unwrap_or(0);
                Cidr { address: Ipv4Addr::from_bits(v4.to_bits() & mask).into(), prefix_len }
            }
            IpAddr::V6(v6) => {
                let prefix_len = prefix_len.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix_len)).unwrap_or(0);
                Cidr { address: Ipv6Addr::from_bits(v6.to_bits() & mask).into(), prefix_len }
            }
        }
    }

    /// The first address of the network.
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// Number of leading bits that all addresses of the network share.
    pub fn prefix_len(&self) -> u8 {
        self.prefix_len
    }

    /// Whether `ip` is in this network. No IPv4 network contains an IPv4-mapped IPv6 address.
    pub fn contains(&self, ip: IpAddr) -> bool {
        Cidr::of(ip, self.prefix_len).address == self.address
    }
}

impl FromStr for Cidr {
    type Err = String;

    /// The text is no address, has no prefix length or an invalid one, or has host bits set. The
    /// error is a phrase for the user, with the correct form where there is one.
    fn from_str(text: &str) -> Result<Self, String> {
        let no_network = || "not a network; write ADDRESS/LENGTH, as in 100.64.0.0/10".to_owned();
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| no_network())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let Some(length) = length else {
            return Err(format!("no prefix length; did you mean {address}/{bits}?"));
        };
        // `parse` alone would accept "+8" and "08".
        let is_number = length.bytes().all(|byte| byte.is_ascii_digit());
        let is_canonical = is_number && (length == "0" || !length.starts_with('0'));
        let prefix_len = length.parse().ok().filter(|length| is_canonical && *length <= bits);
        let Some(prefix_len) = prefix_len else {
            return Err(format!("the prefix length is not a number from 0 to {bits}"));
        };
        let network = Cidr::of(address, prefix_len);
        if network.address != address {
            return Err(format!("host bits are set; did you mean {network}?"));
        }
        Ok(network)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn contains_compares_only_prefix_bits() {
        for (address, bits) in [("10.20.30.40", 32), ("fd12:3456:789a:1::5", 128)] {
            let address = ip(address);
            let flipped = |bit: u8| -> IpAddr {
                match address {
                    IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ 1 << (31 - bit)).into(),
                    IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() ^ 1 << (127 - bit)).into(),
                }
            };
            for len in 0..=bits {
                let network = Cidr::of(address, len);
                assert!(network.contains(address));
                if len > 0 {
                    assert!(!network.contains(flipped(len - 1)), "/{len}");
                }
                if len < bits {
                    assert!(network.contains(flipped(len)), "/{len}");
                }
            }
        }
        assert_eq!(Cidr::of(ip("10.0.0.1"), 200), Cidr::of(ip("10.0.0.1"), 32));
        assert!(!Cidr::of(ip("0.0.0.0"), 0).contains(ip("::")));
        assert!(!Cidr::of(ip("::"), 0).contains(ip("0.0.0.0")));
        assert!(!Cidr::of(ip("10.0.0.0"), 8).contains(ip("::ffff:10.0.0.1")));
    }

    #[test]
    fn canonical_text_round_trips() {
        for text in ["100.64.0.0/10", "10.0.0.0/8", "10.1.2.3/32", "fd7a:115c:a1e0::/48", "::/0"] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn invalid_text_is_refused_with_a_remedy() {
        for (text, error) in [
            ("10.0.0.5/8", "host bits are set; did you mean 10.0.0.0/8?"),
            ("fd00::1/64", "host bits are set; did you mean fd00::/64?"),
            ("10.0.0.5", "no prefix length; did you mean 10.0.0.5/32?"),
            ("fd00::1", "no prefix length; did you mean fd00::1/128?"),
            ("10.0.0.0/33", "the prefix length is not a number from 0 to 32"),
            ("fd00::/129", "the prefix length is not a number from 0 to 128"),
            ("10.0.0.0/", "the prefix length is not a number from 0 to 32"),
            ("10.0.0.0/+8", "the prefix length is not a number from 0 to 32"),
            ("10.0.0.0/08", "the prefix length is not a number from 0 to 32"),
            ("10.0.0.0/8/8", "the prefix length is not a number from 0 to 32"),
            ("10.0.0.0/255.0.0.0", "the prefix length is not a number from 0 to 32"),
            ("10.0.0/8", "not a network; write ADDRESS/LENGTH, as in 100.64.0.0/10"),
            ("eth0", "not a network; write ADDRESS/LENGTH, as in 100.64.0.0/10"),
            ("", "not a network; write ADDRESS/LENGTH, as in 100.64.0.0/10"),
        ] {
            assert_eq!(text.parse::<Cidr>(), Err(error.to_owned()), "{text}");
        }
    }
}
