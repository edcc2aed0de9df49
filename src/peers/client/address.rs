//! Addresses of peers in URLs, including link-local ones.

use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

const LINK_LOCAL_SUFFIX: &str = ".link-local.invalid";

/// Builds the URL of `path` at a peer. URLs cannot hold the interface of a link-local address, so
/// it is encoded in a host name that only [`PeerAddressResolver`] understands.
pub(super) fn url(peer: SocketAddr, path: &str) -> String {
    let path = path.trim_start_matches('/');
    match peer {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            format!(
                "http://{:032x}.{}{LINK_LOCAL_SUFFIX}:{}/{path}",
                v6.ip().to_bits(),
                v6.scope_id(),
                v6.port()
            )
        }
        _ => format!("http://{peer}/{path}"),
    }
}

/// Decodes the host names that [`url`] builds, and resolves nothing else: a peer is always an
/// address.
#[derive(Debug)]
pub(super) struct PeerAddressResolver;

impl Resolver for PeerAddressResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(address(uri).ok_or(ureq::Error::HostNotFound)?);
        Ok(addresses)
    }
}

fn address(uri: &Uri) -> Option<SocketAddr> {
    let authority = uri.authority()?;
    let port = authority.port_u16()?;
    let Some(scoped) = authority.host().strip_suffix(LINK_LOCAL_SUFFIX) else {
        return authority.as_str().parse().ok();
    };
    let (ip, scope) = scoped.split_once('.')?;
    let ip = Ipv6Addr::from_bits(u128::from_str_radix(ip, 16).ok()?);
    Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peer_address_survives_url_round_trip() {
        let scoped = SocketAddrV6::new("fe80::1:2".parse().unwrap(), 12304, 0, 7);
        for peer in [
            "192.168.1.9:12304".parse().unwrap(),
            "[fd00::1]:80".parse().unwrap(),
            SocketAddr::V6(scoped),
        ] {
            let uri: Uri = url(peer, "/local/x.narinfo").parse().unwrap();
            assert_eq!(uri.path(), "/local/x.narinfo");
            assert_eq!(address(&uri), Some(peer));
        }
        for name in
            ["http://example.org:80/", "http://10.0.0.1/", "http://x.y.link-local.invalid:1/"]
        {
            assert_eq!(address(&name.parse().unwrap()), None, "{name}");
        }
    }
}
