//! Friends as peers: the address of each friend, whether it is reachable, and whether it has a
//! path.
//!
//! Each friend has a thread that keeps a connection to it. The thread tries the known addresses.
//! Once one of them has proven to be the friend's, it sends a greeting there at regular intervals,
//! so that a lookup finds an open connection and an unreachable friend is known before a lookup. A
//! lookup asks all reachable friends at once, in parallel with the LAN. An unreachable friend costs
//! it no time.

use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::request_pool::RequestPool;
use crate::backoff::Backoff;
use crate::config::FriendConfig;
use crate::friends::{FriendList, tls};
use crate::lan::Holder;
use crate::lock::{Condvar, Mutex};
use crate::network::Networks;
use crate::nix::{HashPart, StoreDir};
use crate::time_scale::{Interval, Timeout};
use crate::wire::tracker::{Identity, can_be_peer};
use crate::wire::{HelloDigest, NodeKey};
use crossbeam_channel::{Receiver, Sender, at, bounded, select};
use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
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
const MIN_CALL_INTERVAL: Interval = Interval::from_secs(5);

/// Timeout of a narinfo request to a friend. A friend that exceeds it counts as unreachable.
const NARINFO_TIMEOUT: Timeout = Timeout::from_secs(2);

/// Time after the start during which lookups wait for friends that have not been tried yet, because
/// a wrong miss fails a build.
const FIRST_TRY_TIMEOUT: Timeout = Timeout::from_secs(1);

/// Largest number of unproven addresses per friend. When it is reached, the oldest one is dropped.
const MAX_UNPROVEN_ADDRESSES: usize = 4;

/// Interval at which the friends file is read again and the network is checked for changes.
const POLL_INTERVAL: Interval = Interval::from_secs(2);

/// Delay before the next attempt while the request pool is full.
const POOL_RETRY_DELAY: Duration = Duration::from_millis(2);

/// Stack of a thread that greets a friend, in bytes. TLS takes 100 KiB in a build without
/// optimization.
const STACK_BYTES: usize = 512 * 1024;

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

/// All friends.
pub struct Friends {
    list: Arc<FriendList>,
    identity: Arc<Identity>,
    store_dir: StoreDir,
    networks: Arc<Networks>,
    requests: Arc<RequestPool>,
    started: Instant,
    links: Mutex<Vec<Arc<FriendLink>>>,
    /// Dropping the sender ends the threads.
    running: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
}

/// Connection to one friend.
pub struct FriendLink {
    /// Configuration of the friend.
    pub friend: Arc<FriendConfig>,
    /// Client whose connections authenticate the friend.
    pub client: PeerClient,
    networks: Arc<Networks>,
    state: Mutex<FriendState>,
    changed: Condvar,
    wake: Sender<()>,
    woken: Receiver<()>,
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

impl Friends {
    /// Starts one thread per friend of `list`, and one that follows changes of the list and the
    /// network.
    ///
    /// # Errors
    /// The system cannot create a thread.
    pub fn start(
        list: Arc<FriendList>,
        identity: Arc<Identity>,
        store_dir: StoreDir,
        networks: Arc<Networks>,
        requests: Arc<RequestPool>,
    ) -> std::io::Result<Arc<Friends>> {
        let (running, stopped) = bounded(0);
        let friends = Arc::new(Friends {
            list,
            identity,
            store_dir,
            networks,
            requests,
            started: Instant::now(),
            links: Mutex::default(),
            running: Mutex::new(Some(running)),
            stopped,
        });
        friends.update_links();
        let follower = friends.clone();
        thread::Builder::new().name("friends".into()).spawn(move || {
            let mut current = follower.networks.current();
            while follower.stopped.recv_timeout(POLL_INTERVAL.get()).is_err_and(|e| e.is_timeout())
            {
                if follower.list.reload() {
                    follower.update_links();
                }
                let before = std::mem::replace(&mut current, follower.networks.current());
                if !Arc::ptr_eq(&before, &current) {
                    follower.wake_all();
                }
            }
        })?;
        Ok(friends)
    }

    /// Tells the threads to end. Does not wait for them.
    pub fn stop(&self) {
        drop(self.running.lock().take());
    }

    /// Channel that closes when the threads must end.
    pub(super) fn stopped(&self) -> &Receiver<()> {
        &self.stopped
    }

    /// The friend list.
    pub fn list(&self) -> &Arc<FriendList> {
        &self.list
    }

    /// Adds and removes links so that they match the list.
    fn update_links(&self) {
        let friends = self.list.all();
        let mut links = self.links.lock();
        for removed in links.extract_if(.., |link| !friends.contains(&link.friend)) {
            removed.remove();
        }
        for friend in friends {
            if links.iter().any(|link| link.friend == friend) {
                continue;
            }
            match self.connect(friend.clone()) {
                Ok(link) => links.push(link),
                Err(e) => log::error!("friend {}: {e}", friend.name),
            }
        }
    }

    fn connect(&self, friend: Arc<FriendConfig>) -> Result<Arc<FriendLink>, String> {
        let config = tls::client_config(&self.identity, friend.key).map_err(|e| e.to_string())?;
        let client = PeerClient::for_friend(self.store_dir.clone(), config);
        let link = Arc::new(FriendLink::new(friend, client, self.networks.clone()));
        let (thread_link, stopped) = (link.clone(), self.stopped.clone());
        let own = *self.list.own();
        let builder = thread::Builder::new().name("friend".into()).stack_size(STACK_BYTES);
        builder.spawn(move || thread_link.run(&stopped, &own)).map_err(|e| e.to_string())?;
        Ok(link)
    }

    /// State of all friends, for the status output.
    pub fn snapshots(&self) -> Vec<FriendSnapshot> {
        self.links.lock().iter().map(|link| link.snapshot()).collect()
    }

    /// Handles a *hello* with the digest `digest` from a neighbour whose HTTP server is at
    /// `address`. If a friend's key matches the digest, the friend's thread tries the address.
    pub fn record_hello(&self, instance: &[u8; 8], digest: &HelloDigest, address: SocketAddr) {
        for link in
            self.links.lock().iter().filter(|link| link.friend.key.digest(instance) == *digest)
        {
            link.add_address(address, FoundBy::Hello);
        }
    }

    /// Handles an address that a tracker named for the friend with the key `key`.
    pub fn record_tracker_address(&self, key: &NodeKey, address: SocketAddr) {
        if !can_be_peer(address.ip()) {
            return;
        }
        for link in self.links.lock().iter().filter(|link| link.friend.key == *key) {
            link.add_address(address, FoundBy::Tracker);
        }
    }

    /// Handles a request of the friend with the key `key`. The friend may have just become
    /// reachable, so the next attempt to reach it is made at once, but only once in 5 s.
    pub fn record_request(&self, key: &NodeKey) {
        for link in self.links.lock().iter().filter(|link| link.friend.key == *key) {
            link.record_request(Instant::now());
        }
    }

    /// Wakes all threads: after a network change, friends may have become reachable or unreachable.
    fn wake_all(&self) {
        self.links.lock().iter().for_each(|link| link.wake());
    }

    /// Asks all reachable friends for a path. Sends the requests at once and does not wait for
    /// answers.
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> FriendSearch {
        let links = self.links.lock().clone();
        let (answer, answers) = bounded(links.len());
        let (found, found_signal) = bounded(1);
        let waits = self.started.elapsed() < FIRST_TRY_TIMEOUT.get();
        let to_ask = links
            .into_iter()
            .filter(|link| link.address().is_some() || waits && !link.state.lock().was_tried);
        let mut search = FriendSearch {
            friends: self.clone(),
            hash_part: *hash_part,
            to_ask: to_ask.collect(),
            asked: 0,
            unanswered: 0,
            deadline: Instant::now() + NARINFO_TIMEOUT.get(),
            answer,
            answers,
            found,
            found_signal,
        };
        search.ask();
        search
    }
}

impl FriendLink {
    fn new(friend: Arc<FriendConfig>, client: PeerClient, networks: Arc<Networks>) -> Self {
        let (wake, woken) = bounded(1);
        let (state, changed) = Default::default();
        FriendLink { friend, client, networks, state, changed, wake, woken }
    }

    /// Address of the friend if it is reachable.
    fn address(&self) -> Option<SocketAddr> {
        let state = self.state.lock();
        state.proven.filter(|_| state.is_up).map(|(address, _)| address)
    }

    /// Waits until the friend was tried once, and returns its address if it is reachable. Blocks
    /// until `deadline` at most.
    fn wait_for_address(&self, deadline: Instant) -> Option<SocketAddr> {
        let state = self.state.lock();
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, |state| !state.was_tried);
        drop(waited);
        self.address()
    }

    /// Returns true if `address` is on a network that is faster than compression.
    pub fn is_near(&self, address: SocketAddr) -> bool {
        address.ip().to_canonical().is_loopback() || self.networks.is_lan(address)
    }

    fn snapshot(&self) -> FriendSnapshot {
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
    fn add_address(&self, address: SocketAddr, found_by: FoundBy) {
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

    fn record_request(&self, now: Instant) {
        let mut state = self.state.lock();
        if state.is_up || state.last_call.is_some_and(|at| now < at + MIN_CALL_INTERVAL.get()) {
            return;
        }
        state.last_call = Some(now);
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        // One message in the channel is enough. Without a receiver, the friend was removed.
        let _ = self.wake.try_send(());
    }

    fn remove(&self) {
        let mut state = self.state.lock();
        (state.is_removed, state.is_up) = (true, false);
        drop(state);
        self.wake();
    }

    fn run(&self, stopped: &Receiver<()>, own: &NodeKey) {
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
    fn mark_unreachable(&self) {
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

/// Search for one path among the friends.
pub struct FriendSearch {
    friends: Arc<Friends>,
    hash_part: HashPart,
    /// Friends that have not been asked yet.
    to_ask: Vec<Arc<FriendLink>>,
    asked: u32,
    unanswered: u32,
    deadline: Instant,
    answer: Sender<FriendAnswer>,
    answers: Receiver<FriendAnswer>,
    /// Signals the LAN search that a friend has the path.
    found: Sender<()>,
    found_signal: Receiver<()>,
}

struct FriendAnswer {
    link: Arc<FriendLink>,
    /// The address that was asked; `None` if the friend is unreachable.
    result: Option<(SocketAddr, Result<PeerNarinfo, PeerError>)>,
}

/// Narinfo from a friend that has the path.
pub struct FriendOffer {
    /// The friend.
    pub link: Arc<FriendLink>,
    /// Address of the friend's HTTP server.
    pub address: SocketAddr,
    /// The narinfo. Its form is checked, its signatures are not.
    pub narinfo: PeerNarinfo,
}

impl FriendSearch {
    /// Channel that receives one message as soon as a friend has the path.
    pub fn found_signal(&self) -> &Receiver<()> {
        &self.found_signal
    }

    /// Restarts the time limit of the search, which ends at `deadline` at the latest.
    pub fn resume(&mut self, deadline: Instant) {
        self.deadline = deadline.min(Instant::now() + NARINFO_TIMEOUT.get());
    }

    /// Number of friends that were asked, and number of those that have not answered.
    pub fn asked_and_unanswered(&self) -> (u32, u32) {
        (self.asked, self.unanswered)
    }

    /// Returns the next friend that has the path; `None` if all have answered or time is up. Blocks
    /// for `NARINFO_TIMEOUT` at most.
    pub fn next_offer(&mut self) -> Option<FriendOffer> {
        loop {
            self.ask();
            if self.unanswered == 0 && self.to_ask.is_empty() {
                return None;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return None;
            }
            let wake_up =
                if self.to_ask.is_empty() { self.deadline } else { now + POOL_RETRY_DELAY };
            let Ok(FriendAnswer { link, result }) =
                self.answers.recv_deadline(wake_up.min(self.deadline))
            else {
                continue;
            };
            self.unanswered -= 1;
            let Some((address, narinfo)) = result else { continue };
            match narinfo {
                Ok(narinfo) => return Some(FriendOffer { link, address, narinfo }),
                Err(e) => log::debug!("{}: friend {}: {e}", self.hash_part, link.friend.name),
            }
        }
    }

    /// Asks the remaining friends, each in a thread of the pool, until the pool is full.
    fn ask(&mut self) {
        while let Some(link) = self.to_ask.pop() {
            let (hash_part, answer, found) =
                (self.hash_part, self.answer.clone(), self.found.clone());
            let (asked_link, first_try_deadline) =
                (link.clone(), self.friends.started + FIRST_TRY_TIMEOUT.get());
            let started =
                self.friends.requests.start(request_key(&link.friend.key), true, move || {
                    let Some(address) = asked_link.wait_for_address(first_try_deadline) else {
                        return drop(
                            answer.try_send(FriendAnswer { link: asked_link, result: None }),
                        );
                    };
                    let holder = Holder::peerix(address, &hash_part);
                    let narinfo =
                        asked_link.client.narinfo(&holder, &hash_part, NARINFO_TIMEOUT.get());
                    if let Err(PeerError::Unreachable(e)) = &narinfo {
                        log::debug!("friend {}: {address}: {e}", asked_link.friend.name);
                        asked_link.mark_unreachable();
                    }
                    let has_it = narinfo.is_ok();
                    let result = Some((address, narinfo));
                    let _ = answer.try_send(FriendAnswer { link: asked_link, result });
                    if has_it {
                        let _ = found.try_send(());
                    }
                });
            if !started {
                self.to_ask.push(link);
                return;
            }
            self.asked += 1;
            self.unanswered += 1;
        }
    }
}

/// Stands for a friend in the per-address request counts. It is derived from the key, because the
/// address may change while a request runs.
fn request_key(key: &NodeKey) -> IpAddr {
    let bytes = key.as_bytes().first_chunk().expect("a key has 32 bytes");
    Ipv6Addr::from_bits(u128::from_be_bytes(*bytes)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::NetworkPolicy;
    use crossbeam_channel::never;

    /// Guards against ten connections a second to a friend that calls but does not answer.
    #[test]
    fn requests_of_friend_end_its_pause_at_most_once_in_interval() {
        let identity = Arc::new(Identity::from_seed(&[1; 32]));
        let key = Identity::from_seed(&[2; 32]).key();
        let friend: FriendConfig = format!("a={key}").parse().unwrap();
        let store_dir = StoreDir::parse("/nix/store").unwrap();
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let client = PeerClient::new(store_dir.clone());
        let link = Arc::new(FriendLink::new(Arc::new(friend), client, networks.clone()));
        let friends = Friends {
            list: Arc::new(FriendList::new(Vec::new(), None, identity.key())),
            identity,
            store_dir,
            networks,
            requests: Arc::default(),
            started: Instant::now(),
            links: Mutex::new(vec![link.clone()]),
            running: Mutex::default(),
            stopped: never(),
        };
        friends.record_request(&key);
        assert!(link.woken.try_recv().is_ok());
        friends.record_request(&key);
        assert!(link.woken.try_recv().is_err(), "it has just been tried");
        link.record_request(Instant::now() + MIN_CALL_INTERVAL.get());
        assert!(link.woken.try_recv().is_ok());
    }

    #[test]
    fn pauses_begin_with_one_second_and_begin_again_after_a_success() {
        let mut backoff = Backoff::new(FIRST_PAUSE, MAX_PAUSE);
        let now = Instant::now();
        let mut pause = |is_up| (next_attempt(&mut backoff, is_up, now) - now).as_secs();
        assert_eq!([false; 8].map(&mut pause), [1, 2, 4, 8, 16, 32, 60, 60]);
        assert_eq!([true, true, false].map(&mut pause), [10, 10, 1]);
    }
}
