//! Friends as peers: where each is, whether it is reached, and what it has.
//!
//! Each friend has a thread that keeps a connection to it. It tries the addresses that are known,
//! and once one of them has proven that it is the friend, greets it now and again, so that a lookup
//! finds a connection and a friend that is away is known before anybody asks. Lookups ask all
//! friends that are reached, at once, beside the LAN. One that is not reached costs them nothing.

use super::client::{PeerClient, PeerError, PeerNarinfo};
use super::request_pool::RequestPool;
use crate::config::FriendConfig;
use crate::friends::{FriendList, tls};
use crate::lan::Holder;
use crate::network::Networks;
use crate::nix::{HashPart, StoreDir};
use crate::time_scale::{Interval, Timeout};
use crate::wire::tracker::{Identity, can_be_peer};
use crate::wire::{HelloDigest, NodeKey};
use crossbeam_channel::{Receiver, Sender, TrySendError, after, bounded, never, select};
use std::collections::VecDeque;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Time between two greetings of a friend that is reached. It is less than a kept connection lasts
/// unused, 15 s.
const GREETING_INTERVAL: Interval = Interval::from_secs(10);

/// A friend answers a greeting within this: three round trips of TCP and TLS over the slowest link.
const GREETING_TIMEOUT: Timeout = Timeout::from_secs(5);

/// Pause after all addresses of a friend failed; it doubles.
const FIRST_PAUSE: Interval = Interval::from_secs(1);

/// The longest pause. A friend that wakes up says hello on the LAN, or greets this node, both of
/// which end the pause.
const LONGEST_PAUSE: Interval = Interval::from_secs(60);

/// A narinfo of a friend comes within this, or the friend counts as away.
const NARINFO_TIMEOUT: Timeout = Timeout::from_secs(2);

/// After a start, lookups wait this long for friends that have not been tried yet: a wrong miss
/// fails a build.
const FIRST_TRY: Timeout = Timeout::from_secs(1);

/// Addresses of one friend that others named and that have not proven to be its. The oldest make
/// room.
const MAX_UNPROVEN: usize = 4;

/// Interval at which the friends' file is read again, and it is seen whether the network is
/// another.
const LOOK_INTERVAL: Interval = Interval::from_secs(2);

/// When there are too many requests, the next attempt to begin one is after this.
const BLOCKED_DELAY: Duration = Duration::from_millis(2);

/// Stack of a thread that greets a friend. TLS in a build without optimisation takes 100 KiB.
const STACK_BYTES: usize = 512 * 1024;

/// How an address of a friend is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FoundBy {
    /// `--friend` names it.
    Flag,
    /// Its hello on the LAN.
    Hello,
    /// A tracker.
    Tracker,
}

impl FoundBy {
    /// For programs.
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
    /// Closing it ends the threads.
    running: Mutex<Option<Sender<()>>>,
    stopped: Receiver<()>,
}

/// One friend.
pub struct FriendLink {
    /// Who it is.
    pub friend: Arc<FriendConfig>,
    /// What it is asked with, over connections on which it has proven who it is.
    pub client: PeerClient,
    networks: Arc<Networks>,
    state: Mutex<FriendState>,
    changed: Condvar,
    wake: Sender<()>,
    woken: Receiver<()>,
}

#[derive(Default)]
struct FriendState {
    /// Those that others named and that have not proven to be the friend's, the latest first.
    unproven: VecDeque<(SocketAddr, FoundBy)>,
    /// Where it was last, which is tried first.
    proven: Option<(SocketAddr, FoundBy)>,
    is_up: bool,
    since: Option<Instant>,
    /// All addresses were tried once.
    was_tried: bool,
    error: Option<String>,
    is_removed: bool,
}

/// A friend, for people.
pub struct FriendSnapshot {
    /// Its name.
    pub name: String,
    /// Its key.
    pub key: NodeKey,
    /// Where it is, or was last.
    pub address: Option<SocketAddr>,
    /// How that is known.
    pub found_by: Option<FoundBy>,
    /// Whether it is reached.
    pub is_up: bool,
    /// Since when it is, or is not.
    pub since: Option<Instant>,
    /// Why it is not.
    pub error: Option<String>,
}

impl Friends {
    /// Begins to look for the friends of `list`.
    ///
    /// # Errors
    /// No thread to be had.
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
        friends.follow_list();
        let following = friends.clone();
        thread::Builder::new().name("friends".into()).spawn(move || {
            let mut current = following.networks.current();
            while following.stopped.recv_timeout(LOOK_INTERVAL.get()).is_err_and(|e| e.is_timeout())
            {
                if following.list.reload() {
                    following.follow_list();
                }
                let before = std::mem::replace(&mut current, following.networks.current());
                if !Arc::ptr_eq(&before, &current) {
                    following.network_changed();
                }
            }
        })?;
        Ok(friends)
    }

    /// Ends the threads, which is not waited for.
    pub fn stop(&self) {
        drop(self.running.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    /// Closed when the threads are to end.
    pub fn stopped(&self) -> &Receiver<()> {
        &self.stopped
    }

    /// Who the friends are.
    pub fn list(&self) -> &Arc<FriendList> {
        &self.list
    }

    /// Makes the links those of the list.
    fn follow_list(&self) {
        let friends = self.list.all();
        let mut links = self.links();
        links.retain(|link| {
            let is_friend = friends.contains(&link.friend);
            if !is_friend {
                link.remove();
            }
            is_friend
        });
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
        let (wake, woken) = bounded(1);
        let link = Arc::new(FriendLink {
            client: PeerClient::for_friend(self.store_dir.clone(), config),
            friend,
            networks: self.networks.clone(),
            state: Mutex::default(),
            changed: Condvar::new(),
            wake,
            woken,
        });
        let (running, stopped) = (link.clone(), self.stopped.clone());
        let own = *self.list.own();
        let spawned = thread::Builder::new().name("friend".into()).stack_size(STACK_BYTES);
        spawned.spawn(move || running.run(&stopped, &own)).map_err(|e| e.to_string())?;
        Ok(link)
    }

    fn links(&self) -> MutexGuard<'_, Vec<Arc<FriendLink>>> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of them, for people.
    pub fn seen(&self) -> Vec<FriendSnapshot> {
        self.links().iter().map(|link| link.seen()).collect()
    }

    /// A *hello* with that digest came from a neighbour, whose HTTP server is at `address`.
    pub fn heard_hello(&self, instance: &[u8; 8], digest: &HelloDigest, address: SocketAddr) {
        for link in self.links().iter().filter(|link| link.friend.key.digest(instance) == *digest) {
            link.add(address, FoundBy::Hello);
        }
    }

    /// A tracker names an address of the friend with that key.
    pub fn found_at_tracker(&self, key: &NodeKey, address: SocketAddr) {
        if !can_be_peer(address.ip()) {
            return;
        }
        for link in self.links().iter().filter(|link| link.friend.key == *key) {
            link.add(address, FoundBy::Tracker);
        }
    }

    /// All are tried at once: those that were reached may be gone, and others be here.
    fn network_changed(&self) {
        self.links().iter().for_each(|link| link.wake());
    }

    /// Asks all friends that are reached for a path. The requests leave at once.
    pub fn search(self: &Arc<Self>, hash_part: &HashPart) -> FriendSearch {
        let links = self.links().clone();
        let (answer, answers) = bounded(links.len());
        let (found, is_found) = bounded(1);
        let waits = self.started.elapsed() < FIRST_TRY.get();
        let to_ask =
            links.into_iter().filter(|link| link.address().is_some() || waits && !link.was_tried());
        let mut search = FriendSearch {
            friends: self.clone(),
            hash_part: *hash_part,
            to_ask: to_ask.collect(),
            asked: 0,
            unanswered: 0,
            until: Instant::now() + NARINFO_TIMEOUT.get(),
            answer,
            answers,
            found,
            is_found,
        };
        search.ask();
        search
    }
}

impl FriendLink {
    /// Its address, if it is reached.
    fn address(&self) -> Option<SocketAddr> {
        let state = self.state();
        state.proven.filter(|_| state.is_up).map(|(address, _)| address)
    }

    fn was_tried(&self) -> bool {
        self.state().was_tried
    }

    /// Its address as soon as it is reached. Blocks until it was tried, or until `until`.
    fn wait_for_address(&self, until: Instant) -> Option<SocketAddr> {
        let state = self.state();
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(state, left, |state| !state.was_tried);
        drop(waited);
        self.address()
    }

    /// Whether what lies between is faster than compressing.
    pub fn is_near(&self, address: SocketAddr) -> bool {
        address.ip().to_canonical().is_loopback() || self.networks.is_lan(address)
    }

    fn seen(&self) -> FriendSnapshot {
        let state = self.state();
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

    /// Somebody says that it is at this address. That displaces nothing that has proven to be the
    /// friend.
    fn add(&self, address: SocketAddr, found_by: FoundBy) {
        let mut state = self.state();
        let is_known = state.proven.is_some_and(|(known, _)| known == address);
        if is_known && state.is_up {
            return;
        }
        if !is_known && !state.unproven.iter().any(|(known, _)| *known == address) {
            state.unproven.truncate(MAX_UNPROVEN - 1);
            state.unproven.push_front((address, found_by));
        }
        drop(state);
        self.wake();
    }

    fn wake(&self) {
        if let Err(TrySendError::Disconnected(())) = self.wake.try_send(()) {
            log::debug!("friend {}: its thread has ended", self.friend.name);
        }
    }

    fn remove(&self) {
        let mut state = self.state();
        (state.is_removed, state.is_up) = (true, false);
        drop(state);
        self.wake();
    }

    fn run(&self, stopped: &Receiver<()>, own: &NodeKey) {
        let mut pause = FIRST_PAUSE.get();
        loop {
            let is_up = self.try_addresses(own);
            if self.state().is_removed {
                return;
            }
            pause = if is_up { FIRST_PAUSE.get() } else { LONGEST_PAUSE.get().min(pause * 2) };
            let wait = if is_up { GREETING_INTERVAL.get() } else { pause };
            select! {
                recv(stopped) -> _ => return,
                recv(self.woken) -> _ => {
                    // Whoever says hello without end causes one attempt a pause.
                    if stopped.recv_timeout(FIRST_PAUSE.get() / 10).is_err_and(|e| e.is_disconnected()) {
                        return;
                    }
                }
                recv(after(wait)) -> _ => {}
            }
        }
    }

    /// Greets the friend where it was last, and at other addresses if it is not there. True if it
    /// answers.
    fn try_addresses(&self, own: &NodeKey) -> bool {
        let (proven, unproven) = {
            let state = self.state();
            (state.proven, state.unproven.clone())
        };
        let mut error = None;
        let mut is_up = proven.is_some_and(|place| self.greet(place, own, &mut error));
        // What claims to be it on the LAN is worth a look while it is reached from farther away.
        let is_far = is_up && proven.is_some_and(|(address, _)| !self.is_near(address));
        let configured = if is_up { Vec::new() } else { self.configured(&mut error) };
        let configured = configured.into_iter().map(|address| (address, FoundBy::Flag));
        for place in configured.chain(unproven).filter(|place| Some(*place) != proven) {
            if is_up && !(is_far && place.1 == FoundBy::Hello) {
                continue;
            }
            let mut why = None;
            let answers = self.greet(place, own, &mut why);
            is_up |= answers;
            if !answers {
                self.state().unproven.retain(|other| *other != place);
            }
            // Who said that it is there may be anybody: only where the user said it is an error
            // one.
            error = error.or(why.filter(|_| place.1 == FoundBy::Flag));
            if answers {
                break;
            }
        }
        if !is_up {
            self.down(error);
        }
        is_up
    }

    fn configured(&self, error: &mut Option<String>) -> Vec<SocketAddr> {
        let Some((host, port)) = &self.friend.host else { return Vec::new() };
        match (host.as_str(), *port).to_socket_addrs() {
            Ok(addresses) => addresses.take(MAX_UNPROVEN).collect(),
            Err(e) => {
                *error = Some(format!("{host}: {e}"));
                Vec::new()
            }
        }
    }

    fn greet(
        &self,
        place: (SocketAddr, FoundBy),
        own: &NodeKey,
        error: &mut Option<String>,
    ) -> bool {
        match self.client.greet(place.0, GREETING_TIMEOUT.get()) {
            Ok(()) => {
                self.up(place);
                true
            }
            Err(e) => {
                log::debug!("friend {}: {}: {e}", self.friend.name, place.0);
                *error = Some(explain(place.0, &e, own));
                false
            }
        }
    }

    fn up(&self, place: (SocketAddr, FoundBy)) {
        let mut state = self.state();
        if state.is_removed {
            return;
        }
        if !state.is_up || state.proven != Some(place) {
            log::info!("friend {}: reached at {}", self.friend.name, place.0);
            state.since = Some(Instant::now());
        }
        (state.is_up, state.proven, state.was_tried, state.error) = (true, Some(place), true, None);
        state.unproven.retain(|(address, _)| *address != place.0);
        drop(state);
        self.changed.notify_all();
    }

    fn down(&self, error: Option<String>) {
        let mut state = self.state();
        if state.is_up || !state.was_tried {
            state.since = Some(Instant::now());
        }
        if error.is_some() && error != state.error {
            error.iter().for_each(|error| log::warn!("friend {}: {error}", self.friend.name));
        }
        (state.is_up, state.was_tried) = (false, true);
        state.error = error.or(state.error.take());
        drop(state);
        self.changed.notify_all();
    }

    /// A request found it away: it is not asked until it has answered a greeting.
    fn lost(&self) {
        let mut state = self.state();
        if state.is_up {
            (state.is_up, state.since) = (false, Some(Instant::now()));
        }
        drop(state);
        self.wake();
    }

    fn state(&self) -> MutexGuard<'_, FriendState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a friend is not reached, with the remedy where it is known.
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
        write!(f, "Link({})", self.friend.name)
    }
}

/// The friends that are asked for one path.
pub struct FriendSearch {
    friends: Arc<Friends>,
    hash_part: HashPart,
    /// Those whose turn has not come.
    to_ask: Vec<Arc<FriendLink>>,
    asked: u32,
    unanswered: u32,
    until: Instant,
    answer: Sender<FriendAnswer>,
    answers: Receiver<FriendAnswer>,
    /// Tells whoever waits for the LAN that a friend has the path.
    found: Sender<()>,
    is_found: Receiver<()>,
}

struct FriendAnswer {
    link: Arc<FriendLink>,
    address: SocketAddr,
    /// `None`: it is away.
    narinfo: Option<Result<PeerNarinfo, PeerError>>,
}

/// A friend that has the path, and its narinfo.
pub struct FriendOffer {
    /// Who has it.
    pub link: Arc<FriendLink>,
    /// Its HTTP server.
    pub address: SocketAddr,
    /// The narinfo; its form is checked, its signatures are not.
    pub narinfo: PeerNarinfo,
}

impl FriendSearch {
    /// Has something in it as soon as a friend has the path.
    pub fn is_found(&self) -> &Receiver<()> {
        &self.is_found
    }

    /// Gives the search its time anew, but none after `until`.
    pub fn resume(&mut self, until: Instant) {
        self.until = until.min(Instant::now() + NARINFO_TIMEOUT.get());
    }

    /// How many friends were asked, and how many of them have not answered.
    pub fn asked_and_unanswered(&self) -> (u32, u32) {
        (self.asked, self.unanswered)
    }

    /// The next friend that has it. Blocks until all have answered, for `NARINFO_TIMEOUT` at most.
    pub fn next_offer(&mut self) -> Option<FriendOffer> {
        loop {
            self.ask();
            if self.unanswered == 0 && self.to_ask.is_empty() {
                return None;
            }
            let now = Instant::now();
            if now >= self.until {
                return None;
            }
            let wake_up = if self.to_ask.is_empty() { self.until } else { now + BLOCKED_DELAY };
            let Ok(FriendAnswer { link, address, narinfo }) =
                self.answers.recv_deadline(wake_up.min(self.until))
            else {
                continue;
            };
            self.unanswered -= 1;
            match narinfo {
                Some(Ok(narinfo)) => return Some(FriendOffer { link, address, narinfo }),
                Some(Err(e)) => log::debug!("{}: friend {}: {e}", self.hash_part, link.friend.name),
                None => {}
            }
        }
    }

    /// Asks those whose turn it is, each in a thread of a pool.
    fn ask(&mut self) {
        while let Some(link) = self.to_ask.pop() {
            let (hash_part, answer, found) =
                (self.hash_part, self.answer.clone(), self.found.clone());
            let (asked, tried_by) = (link.clone(), self.friends.started + FIRST_TRY.get());
            let started =
                self.friends.requests.start(place_of(&link.friend.key), true, move || {
                    let Some(address) = asked.wait_for_address(tried_by) else {
                        let answered =
                            FriendAnswer { link: asked, address: UNKNOWN, narinfo: None };
                        return drop(answer.try_send(answered));
                    };
                    let holder =
                        Holder { http: address, url_path: format!("local/{hash_part}.narinfo") };
                    let narinfo = asked.client.narinfo(&holder, &hash_part, NARINFO_TIMEOUT.get());
                    if let Err(PeerError::Unreachable(e)) = &narinfo {
                        log::debug!("friend {}: {address}: {e}", asked.friend.name);
                        asked.lost();
                    }
                    let has_it = narinfo.is_ok();
                    let _ = answer.try_send(FriendAnswer {
                        link: asked,
                        address,
                        narinfo: Some(narinfo),
                    });
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

/// Where a friend is that is nowhere.
const UNKNOWN: SocketAddr = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// What stands for a friend where requests are counted by address: its address may change in
/// between.
fn place_of(key: &NodeKey) -> IpAddr {
    let bytes = key.as_bytes().first_chunk().expect("a key has 32 bytes");
    Ipv6Addr::from_bits(u128::from_be_bytes(*bytes)).into()
}

/// What never has anything in it, for a search without friends.
pub fn nobody() -> Receiver<()> {
    never()
}
