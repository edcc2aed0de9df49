//! Friends as peers: the address of each friend, whether it is reachable, and whether it has a
//! path.
//!
//! Each friend has a thread that keeps a connection to it. The thread tries the known addresses.
//! Once one of them has proven to be the friend's, it sends a greeting there at regular intervals,
//! so that a lookup finds an open connection and an unreachable friend is known before a lookup. A
//! lookup asks all reachable friends at once, in parallel with the LAN. An unreachable friend costs
//! it no time.

mod link;
mod search;

pub use link::{FoundBy, FriendLink, FriendSnapshot};
pub use search::{FriendOffer, FriendSearch};

use super::client::PeerClient;
use super::request_pool::RequestPool;
use crate::config::FriendConfig;
use crate::friends::{FriendList, tls};
use crate::lock::Mutex;
use crate::network::Networks;
use crate::nix::{HashPart, StoreDir};
use crate::time_scale::Interval;
use crate::wire::tracker::{Identity, can_be_peer};
use crate::wire::{HelloDigest, NodeKey};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Interval at which the friends file is read again and the network is checked for changes.
const POLL_INTERVAL: Interval = Interval::from_secs(2);

/// Stack of a thread that greets a friend, in bytes. TLS takes 100 KiB in a build without
/// optimization.
const STACK_BYTES: usize = 512 * 1024;

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
        let link = Arc::new(FriendLink::new(friend, client, self.networks.clone(), self.started));
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
    pub fn search(&self, hash_part: &HashPart) -> FriendSearch {
        let mut to_ask = self.links.lock().clone();
        to_ask.retain(|link| link.may_have_address());
        FriendSearch::start(self.requests.clone(), hash_part, to_ask)
    }
}

#[cfg(test)]
mod tests {
    use super::link::MIN_CALL_INTERVAL;
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
        let link =
            Arc::new(FriendLink::new(Arc::new(friend), client, networks.clone(), Instant::now()));
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
}
