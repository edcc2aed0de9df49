//! LAN discovery, and the resolution of the hosts of `--peer`.

use super::friends::FriendServices;
use super::node::{Node, PeerRequests};
use super::process::{FatalError, fatal};
use crate::access::AccessPolicy;
use crate::lan::{
    DigestObserver, Discovery, DiscoveryClient, DiscoverySettings, DiscoveryThread, RandomSource,
    StoreEnvironment,
};
use crate::peers::lan::LanSource;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use ring::rand::{SecureRandom, SystemRandom};
use std::io;
use std::net::{SocketAddr, ToSocketAddrs, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Interval between resolutions of the hosts of `--peer`, because their addresses may change.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(60);

/// The discovery thread, and the thread that resolves the hosts of `--peer`.
pub(super) struct LanServices {
    pub(super) discovery: DiscoveryThread,
    /// Dropping it ends the thread. `None` without `--peer`.
    _resolver: Option<Sender<()>>,
    is_stopping: Arc<AtomicBool>,
}

impl LanServices {
    /// Starts both threads.
    pub(super) fn start(
        node: &Node,
        datagrams: Vec<UdpSocket>,
        friends: Option<&FriendServices>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> Result<LanServices, FatalError> {
        let is_stopping = Arc::new(AtomicBool::new(false));
        let (access, networks) = (&node.access, &node.networks);
        let mut environment = StoreEnvironment::new(
            access.clone(),
            node.store.clone(),
            networks.clone(),
            is_stopping.clone(),
        );
        if let Some(FriendServices { friends, .. }) = friends {
            let (key, friends) = (*friends.list().own(), friends.clone());
            let observer: DigestObserver =
                Box::new(move |instance, digest, at| friends.record_hello(instance, digest, at));
            environment = environment.with_friends(key, observer);
        }
        let has_lan = node.config.mode.has_lan();
        let settings = DiscoverySettings { port: node.port, has_lan, timeout: node.config.timeout };
        let random = random_numbers()
            .ok_or_else(|| FatalError("the system gives no random numbers".into()))?;
        let discovery = Discovery::new(environment, settings, random, Instant::now());
        let discovery = DiscoveryThread::spawn(discovery, datagrams, networks.clone(), on_end)
            .map_err(fatal("discovery"))?;
        let peers = node.config.peers.clone();
        let resolver = resolve_peers(peers, discovery.client(), access.clone());
        let resolver = resolver.map_err(fatal("resolve"))?;
        Ok(LanServices { discovery, _resolver: resolver, is_stopping })
    }

    /// Returns the source that asks the holders which discovery reports.
    pub(super) fn source(&self, requests: &PeerRequests) -> Arc<LanSource> {
        let (client, health) = (requests.client.clone(), requests.health.clone());
        Arc::new(LanSource::new(self.discovery.client(), client, health, requests.pool.clone()))
    }

    /// Tells the peers that this node leaves. Queries are no longer answered.
    pub(super) fn leave(&self) {
        self.is_stopping.store(true, Ordering::Relaxed);
        self.discovery.say_bye();
    }
}

/// Returns a source of random numbers. `None` if the system has none. If the system fails later,
/// the source repeats its last 64 numbers, so that discovery can continue.
fn random_numbers() -> Option<RandomSource> {
    let system = SystemRandom::new();
    let mut bytes = [0; 256];
    system.fill(&mut bytes).ok()?;
    let mut at = 0;
    Some(Box::new(move || {
        if at + 4 > bytes.len() {
            at = 0;
            let _ = system.fill(&mut bytes);
        }
        at += 4;
        u32::from_ne_bytes([bytes[at - 4], bytes[at - 3], bytes[at - 2], bytes[at - 1]])
    }))
}

/// Starts a thread that resolves the hosts of `--peer` now and every [`RESOLVE_INTERVAL`], so that
/// a slow name server delays nothing else. Dropping the returned sender ends it, without waiting
/// for a running resolution.
///
/// # Errors
/// No thread can be started.
fn resolve_peers(
    peers: Vec<(String, u16)>,
    discovery: Arc<DiscoveryClient>,
    access: Arc<AccessPolicy>,
) -> io::Result<Option<Sender<()>>> {
    if peers.is_empty() {
        return Ok(None);
    }
    let (running, stopped) = bounded::<()>(0);
    thread::Builder::new().name("resolve".into()).spawn(move || {
        let mut last = vec![Vec::new(); peers.len()];
        loop {
            let lookup = |host: &str, port| (host, port).to_socket_addrs().map(Iterator::collect);
            let addresses = resolve(&peers, &mut last, lookup);
            access.set_named_peers(addresses.clone());
            discovery.set_named(addresses);
            if stopped.recv_timeout(RESOLVE_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(Some(running))
}

/// Returns the addresses of all peers. A host that cannot be resolved keeps its addresses in
/// `last`, so that a failing name server does not remove peers. Blocks as long as `lookup` does.
fn resolve(
    peers: &[(String, u16)],
    last: &mut [Vec<SocketAddr>],
    lookup: impl Fn(&str, u16) -> io::Result<Vec<SocketAddr>>,
) -> Vec<SocketAddr> {
    for ((host, port), last) in peers.iter().zip(last.iter_mut()) {
        match lookup(host, *port) {
            Ok(found) => *last = found,
            Err(e) => log::warn!("--peer {host}: {e}"),
        }
    }
    last.concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_resolution_keeps_the_last_addresses() {
        let peers = [("a".to_owned(), 1), ("b".to_owned(), 2)];
        let mut last = vec![Vec::new(); 2];
        let at = |last_octet, port| SocketAddr::from(([10, 0, 0, last_octet], port));
        let fails = |_: &str, _| Err(io::ErrorKind::TimedOut.into());
        assert_eq!(resolve(&peers, &mut last, fails), []);
        let first = resolve(&peers, &mut last, |host, port| Ok(vec![at(host.as_bytes()[0], port)]));
        assert_eq!(first, [at(b'a', 1), at(b'b', 2)]);
        assert_eq!(resolve(&peers, &mut last, fails), first);
        let moved =
            |host: &str, port| if host == "a" { fails(host, port) } else { Ok(vec![at(9, port)]) };
        assert_eq!(resolve(&peers, &mut last, moved), [at(b'a', 1), at(9, 2)]);
    }
}
