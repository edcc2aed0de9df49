//! Which address a request comes from, if it comes through a reverse proxy.

use peerix::http::Request;
use std::net::IpAddr;

/// Header fields that mark a proxied request, whose source address is the proxy's.
const PROXY_FIELDS: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// Trusted reverse proxies. Their `X-Forwarded-For` has the client's address.
pub(super) struct TrustedProxies(pub(super) Vec<IpAddr>);

impl TrustedProxies {
    /// The client's address: the socket's peer, or what a trusted proxy reports.
    pub(super) fn client(&self, request: &Request<'_>) -> IpAddr {
        self.reported_client(request).unwrap_or(request.peer_address.ip().to_canonical())
    }

    /// Whether the request came through a proxy and the client's address is unknown.
    pub(super) fn is_client_hidden(&self, request: &Request<'_>) -> bool {
        self.reported_client(request).is_none()
            && (self.is_sender(request) || PROXY_FIELDS.iter().any(|field| request.has(field)))
    }

    /// The client's address according to a trusted proxy: the last one in `X-Forwarded-For`, which
    /// the proxy itself added. The client may have forged what precedes it.
    fn reported_client(&self, request: &Request<'_>) -> Option<IpAddr> {
        if !self.is_sender(request) {
            return None;
        }
        let last = request.last_field("X-Forwarded-For")?.rsplit(',').next()?;
        last.trim().parse().ok().map(|client: IpAddr| client.to_canonical())
    }

    /// Whether a trusted proxy sent the request.
    fn is_sender(&self, request: &Request<'_>) -> bool {
        self.0.contains(&request.peer_address.ip().to_canonical())
    }
}
