//! Rendezvous with friends at trackers. A thread leaves this node's address there under one tag per
//! friend, which only the two nodes can compute, and learns the friends' addresses.

use super::friends::Friends;
use crate::http_client;
use crate::time_scale::Interval;
use crate::wire::tracker::{MAX_ADDR, can_be_peer};
use crossbeam_channel::Receiver;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;
use ureq::Agent;

/// Interval between two rounds. A tracker drops an address after twice this.
const INTERVAL: Interval = Interval::from_secs(60);

/// Interval while a tracker does not answer or a friend is unreachable.
const RETRY: Interval = Interval::from_secs(10);

/// Time limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest answer, in bytes: 16 tags with four addresses of 300 bytes each. A larger one is
/// ignored.
const MAX_ANSWER: u64 = 32 * 1024;

/// Addresses that one tracker may name for one friend. Further ones are ignored.
const MAX_PLACES: usize = 4;

/// Address at which this node is reachable from outside its network.
#[derive(Debug, Clone)]
pub struct OutsideAddress {
    /// Host to announce, if it differs from the address that the tracker sees.
    pub host: Option<String>,
    /// TCP port.
    pub port: u16,
    /// Mapped address at the router. It is used only if the tracker sees this node at the same IP
    /// address.
    pub mapped: Option<SocketAddr>,
    /// IPv6 address for which the router admits incoming connections.
    pub pinhole: Option<SocketAddr>,
}

impl OutsideAddress {
    /// Host and port to leave at a tracker that sees this node at `seen`.
    fn at(&self, seen: Option<IpAddr>) -> (Option<String>, u16) {
        match (&self.host, self.mapped) {
            (None, Some(mapped)) if seen == Some(mapped.ip()) => (None, mapped.port()),
            (host, _) => (host.clone(), self.port),
        }
    }
}

#[derive(Serialize)]
struct MeetRequest<'a> {
    port: Option<u16>,
    addr: Option<&'a str>,
    tags: &'a [String],
}

#[derive(Deserialize)]
struct MeetResponse {
    addr: IpAddr,
    places: Vec<Vec<MetFriend>>,
}

#[derive(Deserialize)]
struct MetFriend {
    addr: String,
    port: u16,
}

/// Exchanges addresses with friends at the trackers until `stopped` closes. `place` returns this
/// node's current outside address. Blocks the calling thread.
pub fn run(
    urls: &[String],
    friends: &Arc<Friends>,
    place: impl Fn() -> OutsideAddress,
    stopped: &Receiver<()>,
) {
    let agent: Agent =
        http_client::https_config().timeout_global(Some(CALL_TIMEOUT)).build().into();
    let mut seen = vec![None; urls.len()];
    loop {
        let place = place();
        let mut reached = 0;
        for (url, seen) in urls.iter().zip(&mut seen) {
            let before = *seen;
            *seen = meet(&agent, url, friends, place.at(before));
            // The first answer tells where the tracker sees this node, which decides which port to
            // announce.
            if seen.is_some() && place.at(before) != place.at(*seen) {
                *seen = meet(&agent, url, friends, place.at(*seen));
            }
            if let Some(pinhole) = place.pinhole.filter(|_| seen.is_some()) {
                meet(&agent, url, friends, (Some(pinhole.ip().to_string()), pinhole.port()));
            }
            reached += usize::from(seen.is_some());
        }
        let is_any_away = friends.seen().iter().any(|friend| !friend.is_up);
        let pause = if reached < urls.len() || is_any_away { RETRY } else { INTERVAL };
        if !stopped.recv_timeout(pause.get()).is_err_and(|e| e.is_timeout()) {
            return;
        }
    }
}

/// Asks one tracker for the addresses of all friends, and leaves `host` and `port` there. Returns
/// the address at which the tracker sees this node; `None` if the tracker does not answer or does
/// not support this call.
fn meet(
    agent: &Agent,
    url: &str,
    friends: &Arc<Friends>,
    (host, port): (Option<String>, u16),
) -> Option<IpAddr> {
    let tracker =
        url.split_once("://").map_or(url, |(_, rest)| rest).split('/').next().unwrap_or_default();
    let (own, all) = (*friends.list().own(), friends.list().all());
    let tags: Vec<String> = all.iter().map(|friend| own.tag(&friend.key, tracker)).collect();
    let ask = MeetRequest { port: Some(port), addr: host.as_deref(), tags: &tags };
    let body = serde_json::to_vec(&ask).ok()?;
    let answer = agent
        .post(format!("{url}/meet"))
        .header("Content-Type", "application/json")
        .send(&body[..]);
    let mut answer = answer.map_err(|e| log::debug!("tracker {url}: friends: {e}")).ok()?;
    if answer.status().as_u16() != 200 {
        log::debug!("tracker {url}: friends: status {}", answer.status());
        return None;
    }
    let text = answer.body_mut().with_config().limit(MAX_ANSWER).read_to_string().ok()?;
    let met: MeetResponse =
        serde_json::from_str(&text).map_err(|e| log::debug!("tracker {url}: friends: {e}")).ok()?;
    for (friend, places) in all.iter().zip(met.places) {
        for address in places.iter().take(MAX_PLACES).filter_map(address) {
            friends.found_at_tracker(&friend.key, address);
        }
    }
    Some(met.addr)
}

/// Address that a tracker names. A host name is resolved, which blocks, and its first address is
/// used.
fn address(found: &MetFriend) -> Option<SocketAddr> {
    if found.port == 0 || found.addr.is_empty() || found.addr.len() > MAX_ADDR {
        return None;
    }
    let bare = found.addr.trim_start_matches('[').trim_end_matches(']');
    let address = match bare.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip.to_canonical(), found.port),
        Err(_) => (bare, found.port).to_socket_addrs().ok()?.next()?,
    };
    can_be_peer(address.ip()).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_port_is_announced_only_if_tracker_sees_router() {
        let mapped = Some("203.0.113.7:4000".parse().unwrap());
        let place = OutsideAddress { host: None, port: 12304, mapped, pinhole: None };
        assert_eq!(place.at(Some("203.0.113.7".parse().unwrap())), (None, 4000));
        // Another router is in between, or this router reports a false address.
        assert_eq!(place.at(Some("203.0.113.8".parse().unwrap())), (None, 12304));
        assert_eq!(place.at(None), (None, 12304));
        let named = OutsideAddress { host: Some("home.example".into()), ..place };
        assert_eq!(
            named.at(Some("203.0.113.7".parse().unwrap())),
            (Some("home.example".into()), 12304)
        );
    }

    #[test]
    fn address_that_cannot_be_peer_is_ignored() {
        let at = |addr: &str, port| address(&MetFriend { addr: addr.into(), port });
        assert_eq!(at("203.0.113.7", 4000), Some("203.0.113.7:4000".parse().unwrap()));
        assert_eq!(at("[2001:db8::1]", 1), Some("[2001:db8::1]:1".parse().unwrap()));
        for (addr, port) in [
            ("127.0.0.1", 1),
            ("203.0.113.7", 0),
            ("", 1),
            ("224.0.0.1", 1),
            ("::1", 1),
            ("::ffff:127.0.0.1", 1),
        ] {
            assert_eq!(at(addr, port), None, "{addr}");
        }
    }
}
