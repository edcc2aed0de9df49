//! How often an address may ask: a token bucket for each kind of call. Takes the time; no I/O.

use crate::address::household;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What is limited together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitKind {
    /// `GET /lookup`, `/health` and whatever is refused for what it is. Nix asks for thousands of
    /// paths at once, and a site behind one address has several machines.
    Lookup,
    /// `POST` and `DELETE /announce`. A node announces once a minute: enough for a site of
    /// hundreds, not for inventing peers.
    Announce,
    /// `POST /transfer/init` and `/report`, `GET /reputation`: each is work for the database, and a
    /// node fetches at most some dozens of paths a second.
    Transfer,
    /// `PUT /filter`. A node sends one in 25 s at most, and most have nothing new.
    Filter,
    /// `GET /reach`, which makes a connection and may wait for it. Somebody sets up a machine, and
    /// tries.
    Reach,
    /// Transfers begun, each of which is kept for two hours at least: the NARs of a large closure
    /// for each machine of a site.
    Stored,
    /// `GET /peers` and `/metrics`, whose answers are long. Peers of the original list the peers
    /// for every path that they look up.
    List,
}

/// Of each kind, in order: how many a second, and how many at once after a rest.
const RATES: [(f64, f64); 7] = [
    (1000.0, 10_000.0),
    (10.0, 200.0),
    (50.0, 5_000.0),
    (2.0, 100.0),
    (0.2, 20.0),
    (3.0, 20_000.0),
    (200.0, 5_000.0),
];

/// Addresses remembered, some 4 MiB. What comes beyond shares one allowance, until others are at
/// rest.
const MAX_ADDRESSES: usize = 65_536;

/// When the table is full, those at rest are looked for this often.
const SWEEP: Duration = Duration::from_secs(1);

/// The key of all addresses that have no entry; no address has it, for it is `::`'s.
const THE_REST: u128 = 0;

#[derive(Clone, Copy)]
struct TokenBuckets {
    left: [f64; RATES.len()],
    at: Instant,
}

impl TokenBuckets {
    fn full(now: Instant) -> Self {
        TokenBuckets { left: RATES.map(|(_, most)| most), at: now }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        for (left, (rate, most)) in self.left.iter_mut().zip(RATES) {
            *left = (*left + passed * rate).min(most);
        }
    }

    fn is_full(&self) -> bool {
        self.left.iter().zip(RATES).all(|(left, (_, most))| *left >= most)
    }
}

struct LimitsState {
    buckets: HashMap<u128, TokenBuckets>,
    swept: Option<Instant>,
}

/// What every address has left.
pub struct RateLimits(Mutex<LimitsState>);

impl Default for RateLimits {
    fn default() -> Self {
        RateLimits(Mutex::new(LimitsState { buckets: HashMap::new(), swept: None }))
    }
}

impl RateLimits {
    /// Takes one call from what the address has left.
    ///
    /// # Errors
    /// It has nothing left. So long it takes until it has.
    pub fn take(&self, ip: IpAddr, kind: LimitKind, now: Instant) -> Result<(), Duration> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = household(ip);
        if !inner.buckets.contains_key(&key) && inner.buckets.len() >= MAX_ADDRESSES {
            let due = inner.swept.is_none_or(|swept| now.saturating_duration_since(swept) >= SWEEP);
            if due {
                inner.swept = Some(now);
                inner.buckets.retain(|_, buckets| {
                    buckets.refill(now);
                    !buckets.is_full()
                });
            }
            if inner.buckets.len() >= MAX_ADDRESSES {
                key = THE_REST;
            }
        }
        let buckets = inner.buckets.entry(key).or_insert_with(|| TokenBuckets::full(now));
        buckets.refill(now);
        let left = &mut buckets.left[kind as usize];
        if *left >= 1.0 {
            *left -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - *left) / RATES[kind as usize].0))
    }

    /// Takes more, for a call that turned out to be so many. The address may then have less than
    /// nothing left.
    pub fn charge(&self, ip: IpAddr, kind: LimitKind, more: u32, now: Instant) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = if inner.buckets.contains_key(&household(ip)) { household(ip) } else { THE_REST };
        let buckets = inner.buckets.entry(key).or_insert_with(|| TokenBuckets::full(now));
        buckets.left[kind as usize] -= f64::from(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: usize) -> IpAddr {
        IpAddr::from([10, (n >> 16) as u8, (n >> 8) as u8, n as u8])
    }

    /// 256 transfers used to cost what one does: one address could use up all that a tracker can
    /// hold.
    #[test]
    fn a_call_that_is_many_costs_as_many() {
        let (limits, start) = (RateLimits::default(), Instant::now());
        let begun = (0..1000).take_while(|_| {
            let may = limits.take(ip(1), LimitKind::Transfer, start).is_ok();
            limits.charge(ip(1), LimitKind::Transfer, 255, start);
            may
        });
        assert_eq!(begun.count(), 20);
        assert!(limits.take(ip(2), LimitKind::Transfer, start).is_ok());
        assert!(
            limits.take(ip(1), LimitKind::Transfer, start).unwrap_err() > Duration::from_secs(1)
        );
    }

    #[test]
    fn a_burst_then_a_rate_for_each_kind_and_address() {
        let (limits, start) = (RateLimits::default(), Instant::now());
        let burst = (0..1000)
            .take_while(|_| limits.take(ip(1), LimitKind::Announce, start).is_ok())
            .count();
        assert_eq!(burst, 200);
        let wait = limits.take(ip(1), LimitKind::Announce, start).unwrap_err();
        assert!(wait <= Duration::from_millis(100), "{wait:?}");
        assert_eq!(limits.take(ip(1), LimitKind::Lookup, start), Ok(()));
        assert_eq!(limits.take(ip(2), LimitKind::Announce, start), Ok(()));
        let later = start + Duration::from_secs(2);
        let more = (0..1000)
            .take_while(|_| limits.take(ip(1), LimitKind::Announce, later).is_ok())
            .count();
        assert_eq!(more, 20);
        let lookups = (0..20_000)
            .take_while(|_| limits.take(ip(3), LimitKind::Lookup, start).is_ok())
            .count();
        assert_eq!(lookups, 10_000);
    }

    #[test]
    fn the_table_of_addresses_is_bounded() {
        let (limits, start) = (RateLimits::default(), Instant::now());
        for n in 0..MAX_ADDRESSES + 1000 {
            let _ = limits.take(ip(n), LimitKind::Announce, start);
        }
        assert_eq!(limits.0.lock().unwrap().buckets.len(), MAX_ADDRESSES + 1);
        // Those that come beyond have one allowance between them.
        assert!(limits.take(ip(200_000), LimitKind::Announce, start).is_err());
        assert_eq!(limits.take(ip(5), LimitKind::Announce, start), Ok(()));
        // Until the others have rested.
        let later = start + Duration::from_secs(30);
        assert_eq!(limits.take(ip(200_000), LimitKind::Announce, later), Ok(()));
        assert!(limits.0.lock().unwrap().buckets.len() < 10);
    }
}
