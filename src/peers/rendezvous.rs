//! Rendezvous with friends at trackers. A thread leaves this node's address there under one tag per
//! friend, which only the two nodes can compute, and learns the friends' addresses.

use super::friends::Friends;
use crate::http_client;
use crate::resolver::{NameResolver, parse_address};
use crate::time_scale::Interval;
use crate::wire::TrackerName;
use crate::wire::tracker::{MAX_ADDR, can_be_peer};
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::Agent;

/// Interval between two rounds. A tracker drops an address after twice this.
const MEET_INTERVAL: Interval = Interval::from_secs(60);

/// Interval while a tracker does not answer or a friend is unreachable.
const RETRY_INTERVAL: Interval = Interval::from_secs(10);

/// Time limit of one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest wait for the addresses of the host names in one answer. Names that take longer are used
/// in a later round.
const NAMES_TIMEOUT: Duration = Duration::from_secs(2);

/// Largest answer, in bytes: 16 tags with four addresses of 300 bytes each. A larger one is
/// ignored.
const MAX_ANSWER_BYTES: u64 = 32 * 1024;

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
    fn announced_to(&self, seen: Option<IpAddr>) -> (Option<String>, u16) {
        match (&self.host, self.mapped) {
            (None, Some(mapped)) if seen == Some(mapped.ip()) => (None, mapped.port()),
            (host, _) => (host.clone(), self.port),
        }
    }
}

#[derive(Serialize)]
struct MeetRequest<'a> {
    port: u16,
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

/// Exchanges addresses with friends at the trackers until [`Friends::stop`]. `outside_address`
/// returns this node's current outside address. Blocks the calling thread.
pub fn run(urls: &[String], friends: &Arc<Friends>, outside_address: impl Fn() -> OutsideAddress) {
    let agent: Agent =
        http_client::https_config().timeout_global(Some(CALL_TIMEOUT)).build().into();
    let names = Arc::new(NameResolver::default());
    let mut seen_as = vec![None; urls.len()];
    let meet = |url: &String, outside_address| meet(&agent, &names, url, friends, outside_address);
    loop {
        let outside_address = outside_address();
        let mut reached = 0;
        for (url, seen_as) in urls.iter().zip(&mut seen_as) {
            let before = *seen_as;
            *seen_as = meet(url, outside_address.announced_to(before));
            // The first answer tells where the tracker sees this node, which decides which port to
            // announce.
            if seen_as.is_some()
                && outside_address.announced_to(before) != outside_address.announced_to(*seen_as)
            {
                *seen_as = meet(url, outside_address.announced_to(*seen_as));
            }
            if let Some(pinhole) = outside_address.pinhole.filter(|_| seen_as.is_some()) {
                meet(url, (Some(pinhole.ip().to_string()), pinhole.port()));
            }
            reached += usize::from(seen_as.is_some());
        }
        let is_any_away = friends.snapshots().iter().any(|friend| !friend.is_up);
        let pause =
            if reached < urls.len() || is_any_away { RETRY_INTERVAL } else { MEET_INTERVAL };
        if !friends.stopped().recv_timeout(pause.get()).is_err_and(|e| e.is_timeout()) {
            return;
        }
    }
}

/// Asks one tracker for the addresses of all friends, and leaves `host` and `port` there. Returns
/// the address at which the tracker sees this node; `None` if the tracker does not answer or does
/// not support this call.
fn meet(
    agent: &Agent,
    names: &Arc<NameResolver>,
    url: &str,
    friends: &Arc<Friends>,
    (host, port): (Option<String>, u16),
) -> Option<IpAddr> {
    let tracker = TrackerName::of_url(url);
    let (own, all) = (*friends.list().own(), friends.list().all());
    let tags: Vec<String> = all.iter().map(|friend| own.tag(&friend.key, &tracker)).collect();
    let request = MeetRequest { port, addr: host.as_deref(), tags: &tags };
    let body = serde_json::to_vec(&request).ok()?;
    let answer = agent
        .post(format!("{url}/meet"))
        .header("Content-Type", "application/json")
        .send(&body[..]);
    let mut answer = answer.map_err(|e| log::debug!("tracker {url}: friends: {e}")).ok()?;
    if answer.status().as_u16() != 200 {
        log::debug!("tracker {url}: friends: status {}", answer.status());
        return None;
    }
    let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_string().ok()?;
    let response: MeetResponse =
        serde_json::from_str(&text).map_err(|e| log::debug!("tracker {url}: friends: {e}")).ok()?;
    let places = response.places.iter().zip(all).flat_map(|(places, friend)| {
        places.iter().take(MAX_PLACES).map(move |place| (friend.key, place))
    });
    for (key, address) in addresses(names, places.collect(), Instant::now() + NAMES_TIMEOUT) {
        friends.record_tracker_address(&key, address);
    }
    Some(response.addr)
}

/// Addresses that a tracker names, each with what belongs to it. Host names are resolved. Blocks
/// until `deadline` at most.
fn addresses<T>(
    names: &Arc<NameResolver>,
    mut places: Vec<(T, &MetFriend)>,
    deadline: Instant,
) -> Vec<(T, SocketAddr)> {
    places.retain(|(_, place)| place.port != 0 && (1..=MAX_ADDR).contains(&place.addr.len()));
    let is_name = |addr: &&str| parse_address(addr).is_none();
    let hosts: Vec<&str> = places.iter().map(|(_, place)| &*place.addr).filter(is_name).collect();
    let mut resolved = names.addresses(&hosts, deadline).into_iter();
    let address = |(key, place): (T, &MetFriend)| {
        let ip = parse_address(&place.addr).or_else(|| resolved.next()??)?;
        can_be_peer(ip).then(|| (key, SocketAddr::new(ip, place.port)))
    };
    places.into_iter().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_port_is_announced_only_if_tracker_sees_router() {
        let mapped = Some("203.0.113.7:4000".parse().unwrap());
        let place = OutsideAddress { host: None, port: 12304, mapped, pinhole: None };
        assert_eq!(place.announced_to(Some("203.0.113.7".parse().unwrap())), (None, 4000));
        // Another router is in between, or this router reports a false address.
        assert_eq!(place.announced_to(Some("203.0.113.8".parse().unwrap())), (None, 12304));
        assert_eq!(place.announced_to(None), (None, 12304));
        let named = OutsideAddress { host: Some("home.example".into()), ..place };
        assert_eq!(
            named.announced_to(Some("203.0.113.7".parse().unwrap())),
            (Some("home.example".into()), 12304)
        );
    }

    #[test]
    fn address_that_cannot_be_peer_is_ignored() {
        let names = Arc::new(NameResolver::new(|_| Vec::new()));
        let at = |addr: &str, port| {
            let place = MetFriend { addr: addr.into(), port };
            addresses(&names, vec![((), &place)], Instant::now()).pop().map(|((), at)| at)
        };
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

    /// Guards against a name server that does not answer, and so hides all friends.
    #[test]
    fn slow_name_does_not_hide_other_addresses() {
        let (release, released) = crossbeam_channel::bounded::<()>(0);
        let (slow_asked, is_asked) = crossbeam_channel::bounded::<()>(1);
        let names = Arc::new(NameResolver::new(move |name| {
            if name == "slow.example" {
                let _ = slow_asked.send(());
                let _ = released.recv();
            }
            vec!["::ffff:203.0.113.9".parse().unwrap()]
        }));
        let met = |addr: &str| MetFriend { addr: addr.into(), port: 7 };
        let places = [met("slow.example"), met("2001:db8::1"), met("fast.example")];
        let places: Vec<_> = places.iter().enumerate().collect();
        let of = |deadline| addresses(&names, places.clone(), deadline);
        let numeric = (1, "[2001:db8::1]:7".parse().unwrap());
        assert!(of(Instant::now()).contains(&numeric));
        is_asked.recv().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while of(Instant::now()).len() < 2 {
            assert!(Instant::now() < deadline, "the other name is not resolved");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(of(Instant::now()), [numeric, (2, "203.0.113.9:7".parse().unwrap())]);
        drop(release);
        assert_eq!(of(deadline).len(), 3);
    }
}
