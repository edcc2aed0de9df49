//! Addresses of friends (`POST /meet`). A node stores its address under a tag that only nodes with
//! both friends' keys can compute, and gets the addresses that others stored there. All of it is in
//! memory only, as nodes repeat the request within a minute.

use crate::address;
use peerix::lock::Mutex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Maximum number of tags in one request, one for each of 16 friends. More are refused.
pub const MAX_TAGS: usize = 16;
/// Length of a tag in hexadecimal digits.
const TAG_LEN: usize = 64;
/// Maximum number of addresses under one tag. Two friends need two. At the bound, a new one
/// replaces the oldest, which may be a forged one.
const MAX_PLACES: usize = 4;
/// Maximum number of stored addresses under all tags, of about 300 bytes each. At the bound, a new
/// one replaces the oldest of the household that stored most, so that no household shuts out the
/// others.
const MAX_STORED: usize = 32_768;
/// Lifetime of an address: two intervals at which nodes repeat the request.
const PLACE_TTL: Duration = Duration::from_secs(120);
/// Minimum interval between scans for expired addresses when the table is full.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Body of `POST /meet`.
#[derive(Deserialize)]
pub struct MeetBody {
    /// TCP port of the node. Without it, the request only reads.
    pub port: Option<u16>,
    /// Address or host name of the node, if it is not the request's source address.
    pub addr: Option<String>,
    /// Tags under which the address is stored, and others are returned. At most [`MAX_TAGS`].
    pub tags: Vec<String>,
}

/// Address and TCP port of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct MeetingPlace {
    /// Address or host name.
    pub addr: String,
    /// TCP port.
    pub port: u16,
}

/// Answer to `POST /meet`.
#[derive(Serialize)]
pub struct MeetReply {
    /// Source address of the request.
    addr: IpAddr,
    /// For each tag in the request's order: the addresses of others, the latest first.
    places: Vec<Vec<MeetingPlace>>,
}

type Tag = [u8; TAG_LEN];

/// An address under a tag.
struct StoredPlace {
    place: MeetingPlace,
    stored_at: Instant,
    /// Household (see [`address::limit_key`]) of the request that stored it.
    household: u128,
    /// Sequence number; later ones are greater.
    sequence: u64,
}

impl StoredPlace {
    fn is_live(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.stored_at) < PLACE_TTL
    }
}

#[derive(Default)]
struct MeetingTable {
    /// The stored addresses, the latest last.
    by_tag: HashMap<Tag, Vec<StoredPlace>>,
    /// Tags of each household's addresses by sequence number, so that its oldest one is first.
    by_household: HashMap<u128, BTreeMap<u64, Tag>>,
    /// Households by number of stored addresses.
    sizes: BTreeSet<(usize, u128)>,
    stored: usize,
    next_sequence: u64,
    last_sweep: Option<Instant>,
}

/// All stored addresses.
#[derive(Default)]
pub struct Meetings(Mutex<MeetingTable>);

impl Meetings {
    /// Returns the addresses that others stored under the tags, and stores `own` under them, if
    /// there is one. `from` is the request's source address.
    ///
    /// # Errors
    /// Returns which tags are malformed. Nothing is stored then.
    pub fn meet(
        &self,
        tags: &[String],
        own: Option<&MeetingPlace>,
        from: IpAddr,
        now: Instant,
    ) -> Result<MeetReply, &'static str> {
        if tags.len() > MAX_TAGS {
            return Err("tags: more than 16");
        }
        let tags = tags.iter().map(|tag| parse(tag)).collect::<Option<Vec<_>>>();
        let tags = tags.ok_or("tags: not 64 hexadecimal digits each")?;
        let household = address::limit_key(from);
        let mut table = self.0.lock();
        let mut places = Vec::new();
        for tag in tags {
            places.push(table.others(&tag, own, now));
            if let Some(own) = own {
                table.store(tag, own, household, now);
            }
        }
        Ok(MeetReply { addr: from, places })
    }
}

impl MeetingTable {
    fn others(&self, tag: &Tag, own: Option<&MeetingPlace>, now: Instant) -> Vec<MeetingPlace> {
        let places = self.by_tag.get(tag).map_or(&[][..], Vec::as_slice).iter().rev();
        let is_other = |stored: &&StoredPlace| Some(&stored.place) != own && stored.is_live(now);
        places.filter(is_other).map(|stored| stored.place.clone()).collect()
    }

    /// Stores `own` as the latest address under the tag.
    fn store(&mut self, tag: Tag, own: &MeetingPlace, household: u128, now: Instant) {
        self.remove(&tag, |stored| stored.place == *own || !stored.is_live(now));
        let oldest = self.by_tag.get(&tag).filter(|places| places.len() >= MAX_PLACES);
        if let Some(oldest) = oldest.and_then(|places| places.first()).map(|stored| stored.sequence)
        {
            self.remove(&tag, |stored| stored.sequence == oldest);
        }
        self.make_room(now);
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let stored = StoredPlace { place: own.clone(), stored_at: now, household, sequence };
        self.by_tag.entry(tag).or_default().push(stored);
        self.stored += 1;
        self.change_household(household, |tags| {
            tags.insert(sequence, tag);
        });
    }

    /// Makes sure that there is room for one more address.
    fn make_room(&mut self, now: Instant) {
        if self.stored < MAX_STORED {
            return;
        }
        if self
            .last_sweep
            .is_none_or(|last_sweep| now.saturating_duration_since(last_sweep) >= SWEEP_INTERVAL)
        {
            self.last_sweep = Some(now);
            let tags: Vec<Tag> = self.by_tag.keys().copied().collect();
            tags.iter().for_each(|tag| self.remove(tag, |stored| !stored.is_live(now)));
        }
        while self.stored >= MAX_STORED
            && let Some((_, household)) = self.sizes.last()
            && let Some((sequence, tag)) =
                self.by_household.get(household).and_then(BTreeMap::first_key_value)
        {
            let (sequence, tag) = (*sequence, *tag);
            self.remove(&tag, |stored| stored.sequence == sequence);
        }
    }

    /// Removes the addresses under a tag for which `is_gone` returns true.
    fn remove(&mut self, tag: &Tag, is_gone: impl Fn(&StoredPlace) -> bool) {
        let Some(places) = self.by_tag.get_mut(tag) else { return };
        let gone: Vec<StoredPlace> = places.extract_if(.., |stored| is_gone(stored)).collect();
        if places.is_empty() {
            self.by_tag.remove(tag);
        }
        self.stored -= gone.len();
        for StoredPlace { household, sequence, .. } in gone {
            self.change_household(household, |tags| {
                tags.remove(&sequence);
            });
        }
    }

    /// Changes what a household holds, and updates its size.
    fn change_household(&mut self, household: u128, change: impl FnOnce(&mut BTreeMap<u64, Tag>)) {
        let tags = self.by_household.entry(household).or_default();
        self.sizes.remove(&(tags.len(), household));
        change(tags);
        if tags.is_empty() {
            self.by_household.remove(&household);
        } else {
            self.sizes.insert((tags.len(), household));
        }
    }
}

fn parse(tag: &str) -> Option<Tag> {
    let digits: Tag = tag.as_bytes().try_into().ok()?;
    digits.iter().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')).then_some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(port: u16) -> MeetingPlace {
        MeetingPlace { addr: "203.0.113.1".into(), port }
    }

    fn tag(n: u32) -> String {
        format!("{n:064x}")
    }

    fn ip(last: u8) -> IpAddr {
        [203, 0, 113, last].into()
    }

    fn places(meetings: &Meetings, tags: &[String], now: Instant) -> Vec<Vec<MeetingPlace>> {
        meetings.meet(tags, None, ip(99), now).unwrap().places
    }

    #[test]
    fn meet_returns_unexpired_addresses_under_same_tag_only() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        let both = [tag(1), tag(2)];
        let met = meetings.meet(&both, Some(&place(1)), ip(1), now).unwrap();
        assert_eq!(met.places, [vec![], vec![]]);
        let met = meetings.meet(&[tag(2), tag(3)], Some(&place(2)), ip(2), now).unwrap();
        assert_eq!(met.places, [vec![place(1)], vec![]]);
        assert_eq!(met.addr, ip(2));
        // A request without an address stores nothing.
        assert_eq!(places(&meetings, &[tag(3)], now), [[place(2)]]);
        let met = meetings.meet(&both, Some(&place(1)), ip(1), now).unwrap();
        assert_eq!(met.places, [vec![], vec![place(2)]]);
        assert_eq!(places(&meetings, &both, now + PLACE_TTL), [vec![], vec![]]);
    }

    #[test]
    fn address_beyond_limit_of_tag_replaces_oldest() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        for port in 1..=10 {
            meetings.meet(&[tag(0)], Some(&place(port)), ip(1), now).unwrap();
        }
        assert_eq!(places(&meetings, &[tag(0)], now), [[10, 9, 8, 7].map(place)]);
    }

    /// Guards against one household that fills the table, so that nobody else can meet.
    #[test]
    fn address_beyond_limit_of_table_replaces_oldest_of_largest_household() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        meetings.meet(&[tag(u32::MAX)], Some(&place(7)), ip(2), now).unwrap();
        for n in 0..2 * MAX_STORED as u32 {
            meetings.meet(&[tag(n)], Some(&place(9)), ip(1), now).unwrap();
        }
        meetings.meet(&[tag(u32::MAX - 1)], Some(&place(8)), ip(3), now).unwrap();
        let last = 2 * MAX_STORED as u32 - 1;
        let tags = [tag(u32::MAX), tag(u32::MAX - 1), tag(last), tag(0)];
        let kept = [vec![place(7)], vec![place(8)], vec![place(9)], vec![]];
        assert_eq!(places(&meetings, &tags, now), kept);
        let table = meetings.0.lock();
        let sizes: Vec<usize> = table.sizes.iter().map(|(size, _)| *size).collect();
        assert_eq!((table.stored, sizes), (MAX_STORED, vec![1, 1, MAX_STORED - 2]));
    }

    #[test]
    fn expired_addresses_leave_full_table() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        for n in 0..MAX_STORED as u32 {
            meetings.meet(&[tag(n)], Some(&place(9)), ip(1), now).unwrap();
        }
        let later = now + PLACE_TTL;
        meetings.meet(&[tag(u32::MAX)], Some(&place(9)), ip(2), later).unwrap();
        let table = meetings.0.lock();
        assert_eq!((table.stored, table.by_tag.len(), table.by_household.len()), (1, 1, 1));
    }

    #[test]
    fn malformed_tags_are_refused() {
        let (meetings, now) = (Meetings::default(), Instant::now());
        let too_many: Vec<String> = (0..17).map(tag).collect();
        for tags in [
            vec!["".into()],
            vec!["g".repeat(64)],
            vec!["A".repeat(64)],
            vec!["0".repeat(65)],
            too_many,
        ] {
            assert!(meetings.meet(&tags, Some(&place(1)), ip(1), now).is_err(), "{tags:?}");
        }
    }
}
