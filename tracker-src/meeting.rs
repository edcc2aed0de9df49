//! Where friends meet: under a tag that only those know who know both their keys, a node leaves
//! where it is, and finds where the other was last. Nothing of it lasts: nodes come again within a
//! minute.

use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Tags that one node may name: one for each of 16 friends.
pub const MAX_TAGS_OF_ONE: usize = 16;
/// Hexadecimal digits of a tag.
const TAG_LEN: usize = 64;
/// Places under one tag. Two friends have two; a forger may add others, and takes the place of the
/// oldest.
const MAX_PLACES: usize = 4;
/// Tags in all, some 300 bytes each with two places. Beyond, new ones are refused until old ones
/// are forgotten.
const MAX_TAGS: usize = 16_384;
/// A place is forgotten after this: two intervals at which nodes come again.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(120);
/// Longest host name that a node may give for itself, in bytes.
const MAX_ADDR: usize = 253;

/// What a node asks.
#[derive(Deserialize)]
pub struct MeetBody {
    /// The TCP port at which it is reached; without one it only asks.
    pub port: Option<u16>,
    /// The host, if it is not where the request comes from.
    pub addr: Option<String>,
    /// Under which it is to be found, and looks for others.
    pub tags: Vec<String>,
}

/// A place where a node is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeetingPlace {
    addr: String,
    port: u16,
}

/// What it is told.
#[derive(Serialize)]
pub struct MeetReply {
    /// Where the request came from.
    addr: IpAddr,
    /// The other places under each tag, in the order of the tags, the latest first.
    places: Vec<Vec<MeetingPlace>>,
}

/// Why a request is refused.
#[derive(Debug, PartialEq, Eq)]
pub enum MeetingRefusal {
    /// It is malformed: what is.
    Malformed(&'static str),
    /// There is no room for more tags.
    Full,
}

/// Where nodes are, by tag, and since when that is known.
type PlacesByTag = HashMap<[u8; TAG_LEN], Vec<(MeetingPlace, Instant)>>;

/// The places, by tag.
#[derive(Default)]
pub struct Meetings(Mutex<PlacesByTag>);

impl Meetings {
    /// Leaves a node's place under its tags, and tells it the others.
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

/// The latest comes last.
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
    fn friends_find_one_another_and_nobody_else_does() {
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
        // Who only asks leaves nothing.
        assert_eq!(meetings.meet(&ask(None, &[tag(3)]), ip(3), now).unwrap().places[0].len(), 1);
        assert_eq!(meetings.meet(&ask(Some(1), &both), ip(1), now).unwrap().places[1].len(), 1);
        let later = now + FORGOTTEN_AFTER;
        assert_eq!(
            meetings.meet(&ask(None, &both), ip(1), later).unwrap().places,
            [vec![], vec![]]
        );
    }

    #[test]
    fn numbers_are_bounded() {
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
    fn what_is_malformed_is_refused() {
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
