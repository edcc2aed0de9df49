//! Who owns which thread, how the daemon starts, and how it stops.

use crate::config::{Config, Mode};
use crate::fetch::Fetch;
use crate::http::cache::{Cache, signer};
use crate::http::permits::Permits;
use crate::http::server::Server;
use crate::interfaces::Interfaces;
use crate::lookup::Lookup;
use crate::nix::{HashPart, SecretKey};
use crate::peers::client::Client;
use crate::peers::discovery::{Discovery, Handle, Neighbourhood, Wake};
use crate::peers::standing::Standing;
use crate::seldom::Seldom;
use crate::share::{Scope, Share};
use crate::sockets::{self, Sockets};
use crate::store::{Store, StoreConfig};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ring::rand::{SecureRandom, SystemRandom};
use sd_notify::NotifyState;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fmt, fs};

/// Names given by `--peer` are resolved again this often: addresses change.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(60);

/// A secret key file larger than this is none.
const MAX_KEY_FILE: u64 = 4096;

/// How often the main thread looks at the others when systemd's watchdog is off.
const LOOK: Duration = Duration::from_secs(10);

/// Why the daemon could not start or go on: one line, with what to do.
#[derive(Debug)]
pub struct Fatal(String);

impl fmt::Display for Fatal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Fatal {}

impl<E: fmt::Display> From<(&str, E)> for Fatal {
    fn from((what, e): (&str, E)) -> Self {
        Fatal(format!("{what}: {e}"))
    }
}

/// Why the main thread wakes up.
enum Wakeup {
    /// SIGTERM or SIGINT.
    Signal,
    /// A thread that should run until the end has ended.
    Ended(&'static str),
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// What kept it from starting, or which thread died.
pub fn run(config: Config) -> Result<(), Fatal> {
    if config.mode != Mode::Lan {
        return Err(Fatal("--mode wan and --mode both need the WAN part, which this release does not have".into()));
    }
    let now = Instant::now();
    let key = config.private_key.as_deref().map(read_key).transpose()?;
    let store = StoreConfig { store_dir: config.store_dir.clone(), db: config.db.clone() };
    let store = Arc::new(Store::open(store).map_err(|e| Fatal(e.to_string()))?);
    let interfaces = Arc::new(Interfaces::read(now));
    let share = Arc::new(Share::new(interfaces.clone(), config.mode));
    let Sockets { listeners, datagrams, port } = sockets::open(&config, &interfaces).map_err(Fatal)?;

    let (wakeups, woken) = bounded(8);
    let ended = |what| {
        let wakeups = wakeups.clone();
        move || drop(wakeups.try_send(Wakeup::Ended(what)))
    };
    let signals = watch_signals(wakeups.clone()).map_err(|e| Fatal::from(("signals", e)))?;

    let neighbourhood = LanNeighbourhood {
        share: share.clone(),
        store: store.clone(),
        interfaces: interfaces.clone(),
        faults: Seldom::default(),
    };
    let mut random = [0; 12];
    SystemRandom::new().fill(&mut random).map_err(|_| Fatal("no random numbers to be had".into()))?;
    let discovery = Discovery::new(neighbourhood, port, port, config.timeout, random, now);
    let discovery = Handle::spawn(discovery, datagrams, interfaces, ended("discovery"))
        .map_err(|e| Fatal::from(("discovery", e)))?;
    let resolver =
        resolve_peers(config.peers, discovery.wake(), share.clone()).map_err(|e| Fatal::from(("resolve", e)))?;

    let client = Arc::new(Client::new(config.store_dir.clone()));
    let standing = Arc::new(Standing::default());
    let trusted = config.trusted_public_keys;
    let lookup = Lookup::new(discovery.wake(), client.clone(), standing.clone(), trusted, config.store_dir.clone());
    let lookup = Arc::new(lookup);
    let cache = Cache {
        store,
        share,
        lookup: lookup.clone(),
        fetch: Fetch::new(lookup, client, standing),
        signer: key.map(signer),
        store_dir: config.store_dir,
        priority: config.priority,
        permits: Permits::default(),
        faults: Seldom::default(),
    };
    let server =
        Server::start(listeners, Arc::new(cache), ended("http")).map_err(|e| Fatal::from(("http server", e)))?;

    log::info!("peerix {} serves on port {port}", env!("CARGO_PKG_VERSION"));
    notify(&[NotifyState::Ready]);
    let result = wait(&woken, &discovery);
    notify(&[NotifyState::Stopping]);
    log::info!("stopping");
    // Peers learn that this node leaves before its answers end; then the answers end; then what they used.
    drop(discovery);
    drop(server);
    drop(resolver);
    drop(signals);
    result
}

/// Waits for the end, and tells systemd's watchdog that discovery still turns.
fn wait(woken: &Receiver<Wakeup>, discovery: &Handle) -> Result<(), Fatal> {
    let watchdog = sd_notify::watchdog_enabled();
    let look = watchdog.map_or(LOOK, |limit| limit / 3);
    let mut turns = discovery.turns();
    loop {
        match woken.recv_timeout(look) {
            Ok(Wakeup::Signal) => return Ok(()),
            Ok(Wakeup::Ended(what)) => return Err(Fatal(format!("the {what} thread ended; see the log"))),
            Err(RecvTimeoutError::Disconnected) => return Err(Fatal("nobody is left to wake the daemon".into())),
            Err(RecvTimeoutError::Timeout) => {
                let now = discovery.turns();
                if now != turns && watchdog.is_some() {
                    notify(&[NotifyState::Watchdog]);
                }
                turns = now;
            }
        }
    }
}

/// Tells systemd; elsewhere nothing.
fn notify(state: &[NotifyState<'_>]) {
    if let Err(e) = sd_notify::notify(state) {
        log::error!("notifying systemd: {e}");
    }
}

/// The secret key of `--private-key`.
fn read_key(path: &std::path::Path) -> Result<SecretKey, Fatal> {
    let name = path.display();
    let file = fs::metadata(path).and_then(|meta| {
        if !meta.is_file() || meta.len() > MAX_KEY_FILE {
            return Err(std::io::Error::other("not a key file"));
        }
        fs::read_to_string(path)
    });
    let text = file.map_err(|e| {
        Fatal(format!("private key {name}: {e}; --private-key needs a file of nix-store --generate-binary-cache-key that this user can read"))
    })?;
    SecretKey::parse(&text).map_err(|e| Fatal(format!("private key {name}: {e}")))
}

/// What discovery may know: networks, and the store through what is shared.
struct LanNeighbourhood {
    share: Arc<Share>,
    store: Arc<Store>,
    interfaces: Arc<Interfaces>,
    faults: Seldom,
}

impl Neighbourhood for LanNeighbourhood {
    fn is_lan(&self, ip: IpAddr) -> bool {
        self.share.scope(ip) == Scope::Lan
    }

    fn is_own(&self, ip: IpAddr) -> bool {
        self.interfaces.is_own(ip)
    }

    fn would_serve(&mut self, hash_part: &HashPart, asker: IpAddr) -> bool {
        if !self.share.serves(self.share.scope(asker)) {
            return false;
        }
        match self.store.path_info_quickly(hash_part) {
            Ok(info) => info.is_some(),
            Err(e) => {
                if self.faults.now(Instant::now()) {
                    log::error!("{e}");
                }
                false
            }
        }
    }
}

/// The thread that waits for signals; dropping it ends it.
struct SignalWatch {
    handle: signal_hook::iterator::Handle,
    thread: Option<JoinHandle<()>>,
}

fn watch_signals(wakeups: Sender<Wakeup>) -> std::io::Result<SignalWatch> {
    let mut signals = Signals::new([SIGTERM, SIGINT])?;
    let handle = signals.handle();
    let thread = thread::Builder::new().name("signals".into()).spawn(move || {
        for _ in signals.forever() {
            let _ = wakeups.try_send(Wakeup::Signal);
        }
    })?;
    Ok(SignalWatch { handle, thread: Some(thread) })
}

impl Drop for SignalWatch {
    fn drop(&mut self) {
        self.handle.close();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Resolves the names of `--peer`, now and again, where a slow name server delays nothing else. Ends when the sender
/// that is returned is dropped; a resolution under way is not waited for.
fn resolve_peers(peers: Vec<(String, u16)>, lan: Arc<Wake>, share: Arc<Share>) -> std::io::Result<Option<Sender<()>>> {
    if peers.is_empty() {
        return Ok(None);
    }
    let (running, stopped) = bounded::<()>(0);
    thread::Builder::new().name("resolve".into()).spawn(move || {
        loop {
            let mut addresses: Vec<SocketAddr> = Vec::new();
            for (host, port) in &peers {
                match (host.as_str(), *port).to_socket_addrs() {
                    Ok(found) => addresses.extend(found),
                    Err(e) => log::warn!("--peer {host}: {e}"),
                }
            }
            share.set_named_peers(addresses.iter().map(|a| a.ip().to_canonical()).collect());
            lan.set_named(addresses);
            if stopped.recv_timeout(RESOLVE_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(Some(running))
}
