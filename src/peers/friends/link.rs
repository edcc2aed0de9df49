//! Connection to one friend: which of its addresses answers, and since when.

use crate::backoff::Backoff;
use crate::config::FriendConfig;
use crate::lock::{Condvar, Mutex};
use crate::network::Networks;
use crate::peers::client::{PeerClient, PeerError};
use crate::time_scale::{Interval, Timeout};
use crate::wire::NodeKey;
use crossbeam_channel::{Receiver, Sender, at, bounded, select};
use std::collections::VecDeque;
use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Interval between greetings of a reachable friend. It is shorter than the 15 s for which an idle
/// connection is kept.
const GREETING_INTERVAL: Interval = Interval::from_secs(10);

/// Timeout of a greeting: three round trips of TCP and TLS over the slowest link.
const GREETING_TIMEOUT: Timeout = Timeout::from_secs(5);

/// Pause after the first failure of all addresses. It doubles with each further failure.
const FIRST_PAUSE: Interval = Interval::from_secs(1);

/// Longest pause between attempts. A request or a LAN hello of the friend, an address from a
/// tracker, or a change of the network ends the pause.
const MAX_PAUSE: Interval = Interval::from_secs(60);

/// Delay of an attempt after an event that ends the pause. Anybody can send hellos, so it bounds
/// the attempts that they cause.
const WAKE_DELAY: Duration = Duration::from_millis(100);

/// Shortest time between two requests of a friend that end its pause. The friend may be able to
/// call and not be reachable.
pub(super) const MIN_CALL_INTERVAL: Interval = Interval::from_secs(5);

/// Time after the start during which lookups wait for friends that have not been tried yet, because
/// a wrong miss fails a build.
const FIRST_TRY_TIMEOUT: Timeout = Timeout::from_secs(1);

/// Largest number of unproven addresses per friend. When it is reached, the oldest one is dropped.
const MAX_UNPROVEN_ADDRESSES: usize = 4;

/// Source of a friend's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// The `--friend` option or the friends file.
    Flag,
    /// A hello on the LAN.
    Hello,
    /// A tracker.
    Tracker,
}

impl FoundBy {
    /// Name of the source in machine-readable output.
    pub fn code(self) -> &'static str {
        match self {
            FoundBy::Flag => "flag",
            FoundBy::Hello => "hello",
            FoundBy::Tracker => "tracker",
        }
    }
}

/// Connection to one friend.
pub struct FriendLink {
    /// Configuration of the friend.
    pub friend: Arc<FriendConfig>,
    /// Client whose connections authenticate the friend.
    pub client: PeerClient,
    networks: Arc<Networks>,
    /// End of the wait of lookups for the first attempt.
    first_try_deadline: Instant,
    state: Mutex<FriendState>,
    changed: Condvar,
    wake: Sender<()>,
    pub(super) woken: Receiver<()>,
}

#[derive(Default)]
struct FriendState {
    /// Addresses that others named and that have not proven to be the friend's; the latest comes
    /// first.
    unproven: VecDeque<(SocketAddr, FoundBy)>,
    /// The last address that proved to be the friend's. It is tried first.
    proven: Option<(SocketAddr, FoundBy)>,
    is_up: bool,
    since: Option<Instant>,
    /// True once the friend was reached or all its addresses have failed.
    was_tried: bool,
    error: Option<String>,
    /// Time of the last request of the friend that ended a pause.
    last_call: Option<Instant>,
    is_removed: bool,
}

/// State of a friend, for the status output.
pub struct FriendSnapshot {
    /// Name from the configuration.
    pub name: String,
    /// Public key.
    pub key: NodeKey,
    /// Current or last proven address.
    pub address: Option<SocketAddr>,
    /// Source of that address.
    pub found_by: Option<FoundBy>,
    /// True if the friend is reachable.
    pub is_up: bool,
    /// Time since when the friend is reachable, or unreachable.
    pub since: Option<Instant>,
    /// Reason why the friend is unreachable.
    pub error: Option<String>,
}

impl FriendLink {
    /// Creates a connection that has not been tried yet, for a program that started at `started`.
    pub(super) fn new(
        friend: Arc<FriendConfig>,
        client: PeerClient,
        networks: Arc<Networks>,
        started: Instant,
    ) -> Self {
        let (wake, woken) = bounded(1);
        let first_try_deadline = started + FIRST_TRY_TIMEOUT.get();
        let (state, changed) = Default::default();
        FriendLink { friend, client, networks, first_try_deadline, state, changed, wake, woken }
    }

    /// Returns true if the friend is reachable, or may be once it was tried.
    pub(super) fn may_have_address(&self) -> bool {
        let state = self.state.lock();
        state.is_up && state.proven.is_some()
            || !state.was_tried && Instant::now() < self.first_try_deadline
    }

    /// Returns the address of the friend if it is reachable. Right after the start, blocks for 1 s
    /// at most until the friend was tried once.
    pub(super) fn wait_for_address(&self) -> Option<SocketAddr> {
        let state = self.state.lock();
        let left = self.first_try_deadline.saturating_duration_since(Instant::now());
        let state = self.changed.wait_timeout_while(state, left, |state| !state.was_tried);
        state.proven.filter(|_| state.is_up).map(|(address, _)| address)
    }

    /// Returns true if `address` is on a network that is faster than compression.
    pub fn is_near(&self, address: SocketAddr) -> bool {
        address.ip().to_canonical().is_loopback() || self.networks.is_lan(address)
    }

    pub(super) fn snapshot(&self) -> FriendSnapshot {
        let state = self.state.lock();
        let (address, found_by) = state.proven.unzip();
        FriendSnapshot {
            name: self.friend.name.clone(),
            key: self.friend.key,
            address,
            found_by,
            is_up: state.is_up,
            since: state.since,
            error: state.error.clone(),
        }
    }

    /// Adds an unproven address and wakes the thread. It never replaces the proven address.
    pub(super) fn add_address(&self, address: SocketAddr, found_by: FoundBy) {
        let mut state = self.state.lock();
        let is_known = state.proven.is_some_and(|(known, _)| known == address);
        if is_known && state.is_up {
            return;
        }
        if !is_known && !state.unproven.iter().any(|(known, _)| *known == address) {
            state.unproven.truncate(MAX_UNPROVEN_ADDRESSES - 1);
            state.unproven.push_front((address, found_by));
        }
        drop(state);
        self.wake();
    }

    pub(super) fn record_request(&self, now: Instant) {
        let mut state = self.state.lock();
        if state.is_up || state.last_call.is_some_and(|at| now < at + MIN_CALL_INTERVAL.get()) {
            return;
        }
        state.last_call = Some(now);
        drop(state);
        self.wake();
    }

    pub(super) fn wake(&self) {
        // One message in the channel is enough. Without a receiver, the friend was removed.
        let _ = self.wake.try_send(());
    }

    pub(super) fn remove(&self) {
        let mut state = self.state.lock();
        (state.is_removed, state.is_up) = (true, false);
        drop(state);
        self.wake();
    }

    pub(super) fn run(&self, stopped: &Receiver<()>, own: &NodeKey) {
        let mut backoff = Backoff::new(FIRST_PAUSE, MAX_PAUSE);
        loop {
            let is_up = self.try_addresses(own);
            if self.state.lock().is_removed {
                return;
            }
            let next = next_attempt(&mut backoff, is_up, Instant::now());
            select! {
                recv(stopped) -> _ => return,
                recv(self.woken) -> _ => {
                    if stopped.recv_timeout(WAKE_DELAY).is_err_and(|e| e.is_disconnected()) {
                        return;
                    }
                }
                recv(at(next)) -> _ => {}
            }
        }
    }

    /// Greets the friend at its last address, and at the other addresses if that fails. Returns
    /// true if the friend answers. Blocks for up to 5 s per attempt, and for the name lookup of a
    /// configured host.
    fn try_addresses(&self, own: &NodeKey) -> bool {
        let (proven, unproven) = {
            let state = self.state.lock();
            (state.proven, state.unproven.clone())
        };
        let mut error = None;
        let mut is_up = proven.is_some_and(|candidate| self.greet(candidate, own, &mut error));
        // While the friend is reached on a distant network, an address from a LAN hello is worth a
        // try.
        let is_far = is_up && proven.is_some_and(|(address, _)| !self.is_near(address));
        let configured = if is_up { Vec::new() } else { self.configured_addresses(&mut error) };
        let configured = configured.into_iter().map(|address| (address, FoundBy::Flag));
        for candidate in configured.chain(unproven).filter(|candidate| Some(*candidate) != proven) {
            if is_up && !(is_far && candidate.1 == FoundBy::Hello) {
                continue;
            }
            let mut why = None;
            let answers = self.greet(candidate, own, &mut why);
            is_up |= answers;
            if !answers {
                self.state.lock().unproven.retain(|other| *other != candidate);
            }
            // Anybody may send a hello or an announcement, so only an address that the user
            // configured causes an error message.
            error = error.or(why.filter(|_| candidate.1 == FoundBy::Flag));
            if answers {
                break;
            }
        }
        if !is_up {
            self.record_down(error);
        }
        is_up
    }

    fn configured_addresses(&self, error: &mut Option<String>) -> Vec<SocketAddr> {
        let Some((host, port)) = &self.friend.host else { return Vec::new() };
        match (host.as_str(), *port).to_socket_addrs() {
            Ok(addresses) => addresses.take(MAX_UNPROVEN_ADDRESSES).collect(),
            Err(e) => {
                *error = Some(format!("{host}: {e}"));
                Vec::new()
            }
        }
    }

    fn greet(
        &self,
        candidate: (SocketAddr, FoundBy),
        own: &NodeKey,
        error: &mut Option<String>,
    ) -> bool {
        match self.client.greet(candidate.0, GREETING_TIMEOUT.get()) {
            Ok(()) => {
                self.record_up(candidate);
                true
            }
            Err(e) => {
                log::debug!("friend {}: {}: {e}", self.friend.name, candidate.0);
                *error = Some(explain(candidate.0, &e, own));
                false
            }
        }
    }

    fn record_up(&self, candidate: (SocketAddr, FoundBy)) {
        let mut state = self.state.lock();
        if state.is_removed {
            return;
        }
        let is_news = !state.is_up || state.proven != Some(candidate);
        if is_news {
            state.since = Some(Instant::now());
        }
        (state.is_up, state.proven, state.was_tried, state.error) =
            (true, Some(candidate), true, None);
        state.unproven.retain(|(address, _)| *address != candidate.0);
        drop(state);
        self.changed.notify_all();
        if is_news {
            log::info!("friend {}: reached at {}", self.friend.name, candidate.0);
        }
    }

    fn record_down(&self, error: Option<String>) {
        let mut state = self.state.lock();
        if state.is_up || !state.was_tried {
            state.since = Some(Instant::now());
        }
        let news = error.clone().filter(|_| error != state.error);
        (state.is_up, state.was_tried) = (false, true);
        state.error = error.or(state.error.take());
        drop(state);
        self.changed.notify_all();
        news.iter().for_each(|error| log::warn!("friend {}: {error}", self.friend.name));
    }

    /// Marks the friend as unreachable after a failed request. It gets no more requests until it
    /// answers a greeting.
    pub(super) fn mark_unreachable(&self) {
        let mut state = self.state.lock();
        if state.is_up {
            (state.is_up, state.since) = (false, Some(Instant::now()));
        }
        drop(state);
        self.wake();
    }
}

/// Time of the attempt after one that ended at `now`. `is_up` says whether that one reached the
/// friend.
fn next_attempt(backoff: &mut Backoff, is_up: bool, now: Instant) -> Instant {
    if is_up {
        backoff.reset();
        return now + GREETING_INTERVAL.get();
    }
    backoff.record_failure(None, now);
    backoff.due().unwrap_or(now)
}

/// Message why a friend is unreachable, with the remedy if it is known.
fn explain(address: SocketAddr, error: &PeerError, own: &NodeKey) -> String {
    let text = error.to_string();
    if text.contains("AccessDenied") {
        return format!(
            "{address} does not know this node's key: give it there as --friend NAME={own}"
        );
    }
    format!("{address}: {text}")
}

impl fmt::Debug for FriendLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FriendLink({})", self.friend.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_begin_with_one_second_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new(FIRST_PAUSE, MAX_PAUSE);
        let now = Instant::now();
        let mut pause = |is_up| (next_attempt(&mut backoff, is_up, now) - now).as_secs();
        assert_eq!([false; 8].map(&mut pause), [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!([true, true, false].map(&mut pause), [10, 10, 1]);
    }
}
