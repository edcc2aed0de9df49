//! Addresses of friends (`POST /meet`). A node stores its address under a tag that only nodes with
//! both friends' keys can compute, and gets the addresses that others stored there. All of it is in
//! memory only, as nodes repeat the request within a minute.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Maximum number of tags in one request, one for each of 16 friends. More are refused.
pub const MAX_TAGS_OF_ONE: usize = 16;
/// Length of a tag in hexadecimal digits.
const TAG_LEN: usize = 64;
/// Maximum number of addresses under one tag. Two friends need two. At the bound, a new one
/// replaces the oldest, which may be a forged one.
const MAX_PLACES: usize = 4;
/// Maximum number of tags, of about 300 bytes each with two addresses. At the bound, new tags are
/// refused until others expire.
const MAX_TAGS: usize = 16_384;
/// Lifetime of an address: two intervals at which nodes repeat the request.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(120);
/// Maximum length in bytes of an address or host name in a request. Longer ones are refused.
const MAX_ADDR: usize = 253;

/// Body of `POST /meet`.
#[derive(Deserialize)]
pub struct MeetBody {
    /// TCP port of the node. Without it, the request only reads.
    pub port: Option<u16>,
    /// Address or host name of the node, if it is not the request's source address.
    pub addr: Option<String>,
    /// Tags under which the address is stored, and others are returned. At most
    /// [`MAX_TAGS_OF_ONE`].
    pub tags: Vec<String>,
}

/// Address and TCP port of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeetingPlace {
    addr: String,
    port: u16,
}

/// Answer to `POST /meet`.
#[derive(Serialize)]
pub struct MeetReply {
    /// Source address of the request.
    addr: IpAddr,
    /// For each tag in the request's order: the addresses of others, the latest first.
    places: Vec<Vec<MeetingPlace>>,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum MeetingRefusal {
    /// A field is malformed, for this reason.
    Malformed(&'static str),
    /// There are [`MAX_TAGS`] tags already.
    Full,
}

/// Addresses by tag, each with the time when it was stored; the latest comes last.
type PlacesByTag = HashMap<[u8; TAG_LEN], Vec<(MeetingPlace, Instant)>>;

/// All stored addresses.
#[derive(Default)]
pub struct Meetings(Mutex<PlacesByTag>);

impl Meetings {
    /// Stores a node's address under its tags, and returns the addresses of others. After
    /// [`MeetingRefusal::Full`], it may be stored under some of the tags.
    pub fn meet(
        &self,
        ask: &MeetBody,
        from: IpAddr,
        now: Instant,
    ) -> Result<MeetReply, MeetingRefusal> {
        if ask.tags.len() > MAX_TAGS_OF_ONE {
            return Err(MeetingRefusal::Malformed("tags: more than 16"));
        }
        let tags = ask.tags.iter().map(|tag| parse(tag)).collect::<Option<Vec<_>>>();
        let tags = tags.ok_or(MeetingRefusal::Malformed("tags: not 64 hexadecimal digits each"))?;
        let addr = ask.addr.clone().unwrap_or_else(|| from.to_string());
        let is_name =
            |addr: &str| addr.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._:".contains(&b));
        if addr.is_empty() || addr.len() > MAX_ADDR || !is_name(&addr) {
            return Err(MeetingRefusal::Malformed("addr: not a host name or address"));
        }
        if ask.port == Some(0) {
            return Err(MeetingRefusal::Malformed("port: not from 1 to 65535"));
        }
        let own = ask.port.map(|port| MeetingPlace { addr, port });
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places = Vec::new();
        for tag in tags {
            places.push(others(&all, &tag, own.as_ref(), now));
            if let Some(own) = &own {
                if !all.contains_key(&tag) && all.len() >= MAX_TAGS {
                    all.retain(|_, places| {
                        places.iter().any(|(_, at)| now.duration_since(*at) < FORGOTTEN_AFTER)
                    });
                    if all.len() >= MAX_TAGS {
                        return Err(MeetingRefusal::Full);
                    }
                }
                leave(all.entry(tag).or_default(), own, now);
            }
        }
        Ok(MeetReply { addr: from, places })
    }
}

fn parse(tag: &str) -> Option<[u8; TAG_LEN]> {
    let digits: [u8; TAG_LEN] = tag.as_bytes().try_into().ok()?;
    digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(digits)
}

fn others(
    all: &PlacesByTag,
    tag: &[u8; TAG_LEN],
    own: Option<&MeetingPlace>,
    now: Instant,
) -> Vec<MeetingPlace> {
    let places = all.get(tag).map_or(&[][..], Vec::as_slice).iter().rev();
    let is_other = |(place, at): &&(MeetingPlace, Instant)| {
        Some(place) != own && now.duration_since(*at) < FORGOTTEN_AFTER
    };
    places.filter(is_other).map(|(place, _)| place.clone()).collect()
}

/// Stores `own` as the latest address, and drops expired ones.
fn leave(places: &mut Vec<(MeetingPlace, Instant)>, own: &MeetingPlace, now: Instant) {
    places.retain(|(place, at)| place != own && now.duration_since(*at) < FORGOTTEN_AFTER);
    if places.len() >= MAX_PLACES {
        places.remove(0);
    }
    places.push((own.clone(), now));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(port: Option<u16>, tags: &[String]) -> MeetBody {
        MeetBody { port, addr: None, tags: tags.to_vec() }
    }

    fn tag(n: u32) -> String {
        format!("{n:064x}")
    }

    fn ip(last: u8) -> IpAddr {
        [203, 0, 113, last].into()
    }

    #[test]
    fn meet_returns_unexpired_addresses_under_same_tag_only() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        let both = [tag(1), tag(2)];
        assert_eq!(
            meetings.meet(&ask(Some(1), &both), ip(1), now).unwrap().places,
            [vec![], vec![]]
        );
        let met = meetings.meet(&ask(Some(2), &[tag(2), tag(3)]), ip(2), now).unwrap();
        assert_eq!(
            met.places,
            [vec![MeetingPlace { addr: "203.0.113.1".into(), port: 1 }], vec![]]
        );
        assert_eq!(met.addr, ip(2));
        // A request without a port stores nothing.
        assert_eq!(meetings.meet(&ask(None, &[tag(3)]), ip(3), now).unwrap().places[0].len(), 1);
        assert_eq!(meetings.meet(&ask(Some(1), &both), ip(1), now).unwrap().places[1].len(), 1);
        let later = now + FORGOTTEN_AFTER;
        assert_eq!(
            meetings.meet(&ask(None, &both), ip(1), later).unwrap().places,
            [vec![], vec![]]
        );
    }

    #[test]
    fn meet_beyond_limits_drops_oldest_address_and_refuses_tags() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        (0..10).for_each(|n| drop(meetings.meet(&ask(Some(9), &[tag(0)]), ip(n), now).unwrap()));
        assert_eq!(
            meetings.meet(&ask(None, &[tag(0)]), ip(99), now).unwrap().places[0].len(),
            MAX_PLACES
        );
        for n in 1..MAX_TAGS as u32 {
            meetings.meet(&ask(Some(9), &[tag(n)]), ip(1), now).unwrap();
        }
        let full = |now| meetings.meet(&ask(Some(9), &[tag(u32::MAX)]), ip(1), now).err();
        assert_eq!(full(now), Some(MeetingRefusal::Full));
        assert_eq!(full(now + FORGOTTEN_AFTER), None);
    }

    #[test]
    fn malformed_request_is_refused() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        let refused = |ask: &MeetBody| {
            matches!(meetings.meet(ask, ip(1), now), Err(MeetingRefusal::Malformed(_)))
        };
        for tags in
            [vec!["".into()], vec!["g".repeat(64)], vec!["A".repeat(64)], vec!["0".repeat(65)]]
        {
            assert!(refused(&ask(Some(1), &tags)), "{tags:?}");
        }
        assert!(refused(&ask(Some(1), &(0..17).map(tag).collect::<Vec<_>>())));
        assert!(refused(&ask(Some(0), &[])));
        for addr in ["", "a b", "a/b", &"a".repeat(254)] {
            assert!(refused(&MeetBody { addr: Some(addr.into()), ..ask(Some(1), &[]) }), "{addr}");
        }
    }
}
