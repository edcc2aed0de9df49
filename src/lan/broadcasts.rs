//! Queries that are broadcast, and how long lookups wait for peers that are not known. No I/O.
//! `now` is real time.

use super::sent_queries::SentBatch;
use crate::bounded_map::BoundedMap;
use crate::time_scale::Timeout;
use std::time::{Duration, Instant};

/// After a start, a wake-up or a change of network, no lookup ends as a miss before this time:
/// peers may still answer the hellos.
const HELLO_GRACE: Timeout = Timeout::from_millis(500);
/// Minimum interval between windows of one `--timeout`, in which lookups are broadcast as single
/// queries. While a Python peerix is known, all lookups are broadcast so.
const BROADCAST_INTERVAL: Duration = Duration::from_secs(30);
/// Maximum number of broadcast queries whose answers are understood. At the bound the oldest is
/// forgotten.
const MAX_BROADCASTS: usize = 1024;

/// The latest broadcast queries, and the times in which peers that are not known may answer.
pub struct Broadcasts {
    /// How long lookups wait for answers to single queries: `--timeout`.
    pub timeout: Duration,
    /// The latest broadcast queries by request ID.
    pub sent: BoundedMap<u32, SentBatch, MAX_BROADCASTS>,
    /// End of [`HELLO_GRACE`].
    grace_until: Instant,
    /// End of the window in which lookups are broadcast as single queries.
    window_until: Instant,
    /// The first lookup after this time opens the next window.
    next_window: Instant,
}

impl Broadcasts {
    /// Creates the state of a node that starts at `now`. The first lookup opens a window.
    pub fn new(timeout: Duration, now: Instant) -> Self {
        let grace_until = now + HELLO_GRACE.get();
        let sent = BoundedMap::default();
        Broadcasts { timeout, sent, grace_until, window_until: now, next_window: now }
    }

    /// Begins [`HELLO_GRACE`], and makes the next lookup open a window, because the network has
    /// changed.
    pub fn restart(&mut self, now: Instant) {
        (self.grace_until, self.next_window) = (now + HELLO_GRACE.get(), now);
    }

    /// How long a lookup that begins at `now` waits for peers that answer hellos.
    pub fn grace(&self, now: Instant) -> Duration {
        self.grace_until.saturating_duration_since(now)
    }

    /// Opens a window for a lookup that leaves at `now`, at most one per [`BROADCAST_INTERVAL`].
    /// Returns whether a window is open.
    pub fn enter_window(&mut self, now: Instant) -> bool {
        if now >= self.next_window {
            self.window_until = now + self.timeout;
            self.next_window = now + BROADCAST_INTERVAL;
        }
        now < self.window_until
    }
}
