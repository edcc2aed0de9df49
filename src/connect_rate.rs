//! How often a program connects to addresses that a stranger named and that have never answered it:
//! whoever runs a tracker must not be able to have its nodes flood somebody, nor a node the
//! tracker. No I/O; the time is passed in.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Between two connections to one address, on average. A connection that nobody accepts is two
/// datagrams within its time-out, so that 10 datagrams a second are the most.
const TO_ONE: Duration = Duration::from_millis(200);
/// Connections to one address at once after a rest: several nodes behind one router.
const TO_ONE_AT_ONCE: u32 = 4;
/// Between two connections to any such address, on average: 100 datagrams a second.
const TO_ALL: Duration = Duration::from_millis(20);
/// Connections to such addresses at once after a rest: all that a lookup's trackers name.
const TO_ALL_AT_ONCE: u32 = 64;
/// Addresses remembered: those that were connected to in the last second, at [`TO_ALL`], and as
/// many again.
const MAX_ADDRESSES: usize = 2 * (TO_ALL_AT_ONCE as usize + 50);

/// Times from which on a further connection is within the average, for one address and for all.
#[derive(Default)]
pub struct ConnectRate {
    all: Option<Instant>,
    each: HashMap<IpAddr, Instant>,
}

/// Whether a connection may be made.
#[derive(Debug, PartialEq, Eq)]
pub enum ConnectDecision {
    /// It may, and is counted.
    Now,
    /// Not yet, because of connections to other addresses.
    Later,
    /// Not yet, because of connections to the same address.
    NotThis,
}

impl ConnectRate {
    /// Counts a connection to `ip`, if there may be one.
    pub fn take(&mut self, ip: IpAddr, now: Instant) -> ConnectDecision {
        let Some(one) = next(self.each.get(&ip).copied(), TO_ONE, TO_ONE_AT_ONCE, now) else {
            return ConnectDecision::NotThis;
        };
        let Some(all) = next(self.all, TO_ALL, TO_ALL_AT_ONCE, now) else {
            return ConnectDecision::Later;
        };
        if self.each.len() >= MAX_ADDRESSES {
            self.each.retain(|_, at| *at > now);
        }
        self.all = Some(all);
        self.each.insert(ip, one);
        ConnectDecision::Now
    }
}

/// The next such time after an event at `now`; `None` if that is one too many.
fn next(last: Option<Instant>, interval: Duration, at_once: u32, now: Instant) -> Option<Instant> {
    let from = last.map_or(now, |at| at.max(now));
    (from - now <= interval * (at_once - 1)).then_some(from + interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u32) -> IpAddr {
        std::net::Ipv4Addr::from_bits(0xcb00_7100 + last).into()
    }

    /// A hostile tracker that named the ports of a victim used to have one node send it 58,000
    /// datagrams a second.
    #[test]
    fn one_address_gets_five_connections_a_second() {
        let (mut pace, start) = (ConnectRate::default(), Instant::now());
        let taken = (0..10_000)
            .filter(|ms| {
                pace.take(ip(1), start + Duration::from_millis(*ms)) == ConnectDecision::Now
            })
            .count();
        assert!((50..=54).contains(&taken), "{taken} in 10 s");
        let end = start + Duration::from_secs(10);
        while pace.take(ip(1), end) == ConnectDecision::Now {}
        assert_eq!(pace.take(ip(1), end), ConnectDecision::NotThis);
        assert_eq!(pace.take(ip(2), start + Duration::from_secs(10)), ConnectDecision::Now);
    }

    #[test]
    fn all_addresses_get_fifty_connections_a_second_and_little_memory() {
        let (mut pace, start) = (ConnectRate::default(), Instant::now());
        let at = |n: u32| start + Duration::from_millis(u64::from(n) / 10);
        let taken =
            (0..100_000).filter(|n| pace.take(ip(*n), at(*n)) == ConnectDecision::Now).count();
        assert!((500..=564).contains(&taken), "{taken} in 10 s");
        pace.take(ip(100_000), at(100_000));
        assert_eq!(pace.take(ip(100_001), at(100_000)), ConnectDecision::Later);
        assert!(pace.each.len() <= MAX_ADDRESSES);
    }
}
