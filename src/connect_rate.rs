//! Rate limit for connections to addresses that a tracker named and that have never answered this
//! program. It prevents a hostile tracker from making its nodes flood a third party, and a node
//! from making the tracker do so. The module does no I/O; the caller passes the current time.

use crate::bounded_map::BoundedMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Average interval between two connections to one address. A connection that is not accepted costs
/// two datagrams before it times out, so one address gets at most 10 datagrams per second.
const ADDRESS_INTERVAL: Duration = Duration::from_millis(200);
/// Burst of connections to one address after a rest. It covers several nodes behind one router.
const ADDRESS_BURST: u32 = 4;
/// Average interval between two connections to any of these addresses: at most 100 datagrams per
/// second.
const TOTAL_INTERVAL: Duration = Duration::from_millis(20);
/// Burst of connections to all of these addresses after a rest. It covers all peers that the
/// trackers name for one lookup.
const TOTAL_BURST: u32 = 64;
/// Number of remembered addresses; beyond it, the oldest is dropped. It is twice the number that
/// [`TOTAL_INTERVAL`] admits within one second, and an address expires within 0.8 s.
const MAX_ADDRESSES: usize = 2 * (TOTAL_BURST as usize + 50);

/// Rate limiter for one address and for all addresses together. Each entry is the time from which
/// on the average rate allows the next connection.
#[derive(Default)]
pub struct ConnectRate {
    total_time: Option<Instant>,
    address_times: BoundedMap<IpAddr, Instant, MAX_ADDRESSES>,
}

/// Whether the limits of an address and of all addresses admit a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum ConnectDecision {
    /// The connection may be made.
    Now,
    /// Connections to other addresses have used up the common limit. Try again later.
    Later,
    /// Connections to this address have used up its limit. Other addresses may still be free.
    NotThis,
}

impl ConnectRate {
    /// Admits a connection to `ip` at `now` and counts it, or says which limit refuses it. Does not
    /// block.
    pub fn take(&mut self, ip: IpAddr, now: Instant) -> ConnectDecision {
        let Some(one) =
            next(self.address_times.get(&ip).copied(), ADDRESS_INTERVAL, ADDRESS_BURST, now)
        else {
            return ConnectDecision::NotThis;
        };
        let Some(all) = next(self.total_time, TOTAL_INTERVAL, TOTAL_BURST, now) else {
            return ConnectDecision::Later;
        };
        self.total_time = Some(all);
        self.address_times.insert(ip, one);
        ConnectDecision::Now
    }
}

/// Next free time of a limiter after an event at `now`; `None` if the event exceeds the burst.
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

    /// Guards against a hostile tracker that names many ports of one victim: without this limit,
    /// one node sent the victim 58,000 datagrams per second.
    #[test]
    fn connections_to_one_address_are_limited_to_five_a_second() {
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
    fn connections_to_all_addresses_are_limited_to_fifty_a_second() {
        let (mut pace, start) = (ConnectRate::default(), Instant::now());
        let at = |n: u32| start + Duration::from_millis(u64::from(n) / 10);
        let taken =
            (0..100_000).filter(|n| pace.take(ip(*n), at(*n)) == ConnectDecision::Now).count();
        assert!((500..=564).contains(&taken), "{taken} in 10 s");
        pace.take(ip(100_000), at(100_000));
        assert_eq!(pace.take(ip(100_001), at(100_000)), ConnectDecision::Later);
    }
}
