//! Rate limits: a token bucket for each address and kind of call. The time is passed in; no I/O.

use crate::address::limit_key;
use peerix::lock::Mutex;
use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Calls that share a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitKind {
    /// `GET /lookup`, `GET /health`, and requests that match no route. Nix asks for thousands of
    /// paths at once, and several machines may share an address.
    Lookup,
    /// `POST` and `DELETE /announce`, `POST /meet`. A node announces itself once a minute. The rate
    /// fits a site of hundreds of nodes, and is too low for inventing peers.
    Announce,
    /// `POST /transfer/init`, `POST /report` and `GET /reputation`, which the database has to
    /// handle. A node downloads at most some dozens of paths a second.
    Transfer,
    /// `PUT /filter`. A node publishes at most one in 25 s, and most have nothing new.
    Filter,
    /// `GET /reach`, which connects to the node and waits for it. Operators use it during setup.
    Reach,
    /// Transfers begun, each of which is stored for two hours or longer. The burst fits the NARs of
    /// a large closure for each machine of a site.
    Stored,
    /// `GET /peers` and `GET /metrics`, whose answers are long. Nodes of the original get the list
    /// for every path.
    List,
}

/// For each [`LimitKind`] in order: calls a second, and burst.
const RATES: [(f64, f64); 7] = [
    (1000.0, 10_000.0),
    (10.0, 200.0),
    (50.0, 5_000.0),
    (2.0, 100.0),
    (0.2, 20.0),
    (3.0, 20_000.0),
    (200.0, 5_000.0),
];

/// Maximum number of addresses with buckets of their own, about 4 MiB. At the bound, further
/// addresses share one set of buckets until others are full again and are dropped.
const MAX_ADDRESSES: usize = 65_536;

/// Minimum interval between scans for full buckets when the table is full.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);

/// Key of the shared buckets. It is that of `::`, which is no source address.
const SHARED_KEY: u128 = 0;

#[derive(Clone, Copy)]
struct TokenBuckets {
    tokens: [f64; RATES.len()],
    refilled_at: Instant,
}

impl TokenBuckets {
    fn full(now: Instant) -> Self {
        TokenBuckets { tokens: RATES.map(|(_, max)| max), refilled_at: now }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled_at).as_secs_f64();
        self.refilled_at = self.refilled_at.max(now);
        for (tokens, (rate, max)) in self.tokens.iter_mut().zip(RATES) {
            *tokens = (*tokens + passed * rate).min(max);
        }
    }

    fn is_full(&self) -> bool {
        self.tokens.iter().zip(RATES).all(|(tokens, (_, max))| *tokens >= max)
    }
}

#[derive(Default)]
struct LimitsState {
    buckets: HashMap<u128, TokenBuckets>,
    last_sweep: Option<Instant>,
}

/// The token buckets of all addresses.
#[derive(Default)]
pub struct RateLimits(Mutex<LimitsState>);

impl RateLimits {
    /// Takes one token of the address.
    ///
    /// # Errors
    /// No token is left. Returns the time until there is one.
    pub fn take(&self, ip: IpAddr, kind: LimitKind, now: Instant) -> Result<(), Duration> {
        let mut state = self.0.lock();
        let mut key = limit_key(ip);
        if !state.buckets.contains_key(&key) && state.buckets.len() >= MAX_ADDRESSES {
            let due = state.last_sweep.is_none_or(|last_sweep| {
                now.saturating_duration_since(last_sweep) >= SWEEP_INTERVAL
            });
            if due {
                state.last_sweep = Some(now);
                state.buckets.retain(|_, buckets| {
                    buckets.refill(now);
                    !buckets.is_full()
                });
            }
            if state.buckets.len() >= MAX_ADDRESSES {
                key = SHARED_KEY;
            }
        }
        let buckets = state.buckets.entry(key).or_insert_with(|| TokenBuckets::full(now));
        buckets.refill(now);
        let tokens = &mut buckets.tokens[kind as usize];
        if *tokens >= 1.0 {
            *tokens -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - *tokens) / RATES[kind as usize].0))
    }

    /// Takes `more` tokens for a call that is worth several. The bucket may go negative.
    pub fn charge(&self, ip: IpAddr, kind: LimitKind, more: u32, now: Instant) {
        let mut state = self.0.lock();
        let key =
            if state.buckets.contains_key(&limit_key(ip)) { limit_key(ip) } else { SHARED_KEY };
        let buckets = state.buckets.entry(key).or_insert_with(|| TokenBuckets::full(now));
        buckets.tokens[kind as usize] -= f64::from(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(n: usize) -> IpAddr {
        IpAddr::from([10, (n >> 16) as u8, (n >> 8) as u8, n as u8])
    }

    /// One request may begin 256 transfers, so its cost must be theirs.
    #[test]
    fn charge_takes_further_tokens() {
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
    fn take_beyond_burst_is_limited_by_kind_and_address() {
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
    fn take_beyond_address_limit_shares_one_bucket() {
        let (limits, start) = (RateLimits::default(), Instant::now());
        for n in 0..MAX_ADDRESSES + 1000 {
            let _ = limits.take(ip(n), LimitKind::Announce, start);
        }
        assert_eq!(limits.0.lock().buckets.len(), MAX_ADDRESSES + 1);
        // Addresses beyond the bound share one bucket.
        assert!(limits.take(ip(200_000), LimitKind::Announce, start).is_err());
        assert_eq!(limits.take(ip(5), LimitKind::Announce, start), Ok(()));
        // Full buckets are dropped, which makes room.
        let later = start + Duration::from_secs(30);
        assert_eq!(limits.take(ip(200_000), LimitKind::Announce, later), Ok(()));
        assert!(limits.0.lock().buckets.len() < 10);
    }
}
