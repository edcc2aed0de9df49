//! Who owns which thread, how the daemon starts, and how it stops.

use crate::config::Config;
use crate::fetch::Fetch;
use crate::fetch::spool::Spools;
use crate::http::cache::{Cache, signer};
use crate::http::crowd::Crowds;
use crate::http::permits::Permits;
use crate::http::server::Server;
use crate::identity;
use crate::key_file;
use crate::lan::{Discovery, DiscoveryClient, DiscoveryThread, Settings, StoreEnvironment};
use crate::lookup::Lookup;
use crate::network::{LanNetworks, Networks};
use crate::nix::{PublicKey, SecretKey};
use crate::peers::announce::{Publication, Trackers};
use crate::peers::client::Client;
use crate::peers::kept_paces;
use crate::peers::lan::Lan;
use crate::peers::nearby::Nearby;
use crate::peers::pace::Paces;
use crate::peers::requests::Requests;
use crate::peers::standing::Standing;
use crate::peers::tracker::Me;
use crate::peers::wan::Wan;
use crate::publish::Publisher;
use crate::record::Record;
use crate::seldom::Seldom;
use crate::service::{self, notify};
use crate::share::Share;
use crate::sockets::{self, Sockets};
use crate::status::{Facts, Status};
use crate::store::{Store, StoreConfig};
use crate::upstream::Upstream;
use crate::wire::tracker::Identity;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use ring::rand::{SecureRandom, SystemRandom};
use sd_notify::NotifyState;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};

/// Names given by `--peer` are resolved again this often: addresses change.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(60);

/// How often the main thread puts what was counted into its hour when systemd's watchdog is off.
const LOOK: Duration = Duration::from_secs(60);

/// Descriptors for every connection, and for every stream with a directory of each level and a file or a peer; services
/// get 1,024 unless they ask for more.
const DESCRIPTORS: u64 = 8192;

/// The daemon ends within 2 s; a tracker that does not take its leave is not waited for longer than this.
const STOP_LIMIT: Duration = Duration::from_millis(1700);

/// How often counters are written: so much of them is lost when the power goes.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);

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
    run_with(config, Record::new())
}

/// The same with that record, which the benchmark of what recording costs leaves off.
///
/// # Errors
/// As [`run`].
pub fn run_with(config: Config, record: Record) -> Result<(), Fatal> {
    service::allow_descriptors(DESCRIPTORS);
    let now = Instant::now();
    let key = config.private_key.as_deref().map(read_key).transpose()?;
    let mut trusted = config.trusted_public_keys.clone();
    for file in &config.trusted_public_key_files {
        trusted.extend(read_public_keys(file)?);
    }
    let store = StoreConfig { store_dir: config.store_dir.clone(), db: config.db.clone(), root: config.root.clone() };
    let store = Arc::new(Store::open(store).map_err(|e| Fatal(e.to_string()))?);
    let networks = Arc::new(Networks::read(config.networks.clone()));
    if config.mode.has_lan() {
        log_networks(&networks.current());
    }
    let share = Arc::new(Share::new(networks.clone(), &config));

    let (wakeups, woken) = bounded(8);
    let ended = |what| {
        let wakeups = wakeups.clone();
        move || drop(wakeups.try_send(Wakeup::Ended(what)))
    };
    let signal = wakeups.clone();
    let on_signal = move || drop(signal.try_send(Wakeup::Signal));
    let signals = service::watch_signals(on_signal).map_err(|e| Fatal::from(("signals", e)))?;
    // After the signals: who sees the port open may stop it in good order.
    let Sockets { listeners, datagrams, port } = sockets::open(&config, &networks.current()).map_err(Fatal)?;

    let leaving = Arc::new(AtomicBool::new(false));
    let environment = StoreEnvironment::new(share.clone(), store.clone(), networks.clone(), leaving.clone());
    let settings = Settings { http_port: port, udp_port: port, timeout: config.timeout };
    let random = random_numbers().ok_or_else(|| Fatal("the system gives no random numbers".into()))?;
    let discovery = Discovery::new(environment, settings, random, now);
    let discovery = DiscoveryThread::spawn(discovery, datagrams, networks.clone(), ended("discovery"))
        .map_err(|e| Fatal::from(("discovery", e)))?;
    let resolver = resolve_peers(config.peers.clone(), discovery.client(), share.clone())
        .map_err(|e| Fatal::from(("resolve", e)))?;

    let client = Arc::new(Client::new(config.store_dir.clone()));
    let standing = Arc::new(Standing::default());
    let requests = Arc::new(Requests::default());
    let record = Arc::new(record);
    let paces = Arc::new(Paces::default());
    let counters = keep_counters(&config, &record, &paces).map_err(|e| Fatal::from(("counters", e)))?;
    let facts = Facts::new(&config, port);
    let strangers = match config.mode.has_wan() {
        true => Some(Strangers::start(&config, port, &store, &share, &networks, ended)?),
        false => None,
    };
    let wan = strangers.as_ref().map(|strangers| {
        let trackers = strangers.trackers.clone();
        let (client, standing, requests) = (client.clone(), standing.clone(), requests.clone());
        Arc::new(Wan::new(trackers, client, standing, networks.clone(), requests))
    });
    let lan = config
        .mode
        .has_lan()
        .then(|| Arc::new(Lan::new(discovery.client(), client.clone(), standing.clone(), requests.clone())));
    let nearby = config
        .mode
        .has_lan()
        .then(|| Nearby::new(discovery.client(), client.clone(), standing.clone(), requests.clone()));
    let store_dir = config.store_dir.clone();
    let upstream = Upstream::new(&config, &trusted);
    let spools = Spools::new(config.state_dir.clone());
    let lookup = Lookup::new(lan, wan, nearby, trusted, store_dir, record.clone());
    let lookup = Arc::new(lookup);
    let status = Status {
        record: record.clone(),
        discovery: discovery.client(),
        standing: standing.clone(),
        trackers: strangers.as_ref().map(|strangers| strangers.trackers.clone()),
        store: store.clone(),
        networks,
        facts,
    };
    let cache = Cache {
        store,
        share,
        lookup: lookup.clone(),
        fetch: Fetch::new(lookup, client, standing, paces, record.clone(), upstream, spools),
        signer: key.map(signer),
        store_dir: config.store_dir,
        priority: config.priority,
        permits: Permits::default(),
        crowds: Crowds::default(),
        record: record.clone(),
        status,
        faults: Seldom::default(),
    };
    let server =
        Server::start(listeners, Arc::new(cache), ended("http")).map_err(|e| Fatal::from(("http server", e)))?;

    log::info!("peerix {} serves on port {port}", env!("CARGO_PKG_VERSION"));
    notify(&[NotifyState::Ready]);
    let result = wait(&woken, &discovery, &record);
    notify(&[NotifyState::Stopping]);
    log::info!("stopping");
    // Peers learn that this node leaves; then the answers under way end; then what they used. A lookup cut short would
    // tell Nix that a path is nowhere, which it remembers for an hour.
    let stopping = Instant::now();
    leaving.store(true, Ordering::Relaxed);
    discovery.say_bye();
    strangers.iter().for_each(|strangers| strangers.trackers.leave());
    drop(server);
    // The counters are saved meanwhile: a tracker that does not answer used up the time for it.
    drop(counters.running);
    if let Some(Strangers { trackers, publisher }) = strangers {
        trackers.wait(stopping + STOP_LIMIT);
        drop(publisher);
    }
    // A disk that hangs is not waited for.
    let _ = counters.ended.recv_deadline(stopping + STOP_LIMIT);
    drop(discovery);
    drop(resolver);
    drop(signals);
    result
}

/// Logs which networks are LAN, and which of the user's choices have no effect.
fn log_networks(networks: &LanNetworks) {
    log::info!("LAN: {networks}");
    for (network, interface) in networks.ineffective_networks() {
        let remedy = format!("--interface {interface} uses it");
        log::warn!("--lan {network}: is on {interface}, which is excluded; {remedy}");
    }
}

/// The thread that writes the counters, if they are kept.
struct Counters {
    /// Closing it ends the thread.
    running: Sender<()>,
    /// Closed at its end.
    ended: Receiver<()>,
}

/// Goes on from the counters and paces in the state directory, and has them written there, at once, each minute and at the
/// end. In a thread of its own: a disk may hang.
fn keep_counters(config: &Config, record: &Arc<Record>, paces: &Arc<Paces>) -> io::Result<Counters> {
    let (running, stopped) = bounded::<()>(0);
    let (end, ended) = bounded::<()>(0);
    let Some(dir) = &config.state_dir else { return Ok(Counters { running, ended }) };
    record.keep_in(dir, SystemTime::now());
    kept_paces::load(paces, dir);
    let (record, paces, dir) = (record.clone(), paces.clone(), dir.clone());
    let save = move || {
        record.save(SystemTime::now());
        // That the disk fails is told of the counters.
        if let Err(e) = kept_paces::save(&paces, &dir) {
            log::debug!("paces: {e}");
        }
    };
    thread::Builder::new().name("counters".into()).spawn(move || {
        let _end = end;
        save();
        while stopped.recv_timeout(SAVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
            save();
        }
        save();
    })?;
    Ok(Counters { running, ended })
}

/// Waits for the end, and tells systemd's watchdog that discovery still turns.
fn wait(woken: &Receiver<Wakeup>, discovery: &DiscoveryThread, record: &Record) -> Result<(), Fatal> {
    let watchdog = sd_notify::watchdog_enabled();
    let look = watchdog.map_or(LOOK, |limit| limit / 3);
    let mut turns = 0;
    loop {
        match woken.recv_timeout(look) {
            Ok(Wakeup::Signal) => return Ok(()),
            Ok(Wakeup::Ended(what)) => return Err(Fatal(format!("the {what} thread ended; see the log"))),
            Err(RecvTimeoutError::Disconnected) => return Err(Fatal("nobody is left to wake the daemon".into())),
            Err(RecvTimeoutError::Timeout) => {
                record.tick(SystemTime::now());
                if watchdog.is_some() {
                    let now = discovery.count_turns();
                    if now != turns {
                        notify(&[NotifyState::Watchdog]);
                    }
                    turns = now;
                }
            }
        }
    }
}

/// The secret key of `--private-key`.
fn read_key(path: &Path) -> Result<SecretKey, Fatal> {
    let name = path.display();
    let text = key_file::read(path).map_err(|e| {
        Fatal(format!("private key {name}: {e}; --private-key needs a file of nix-store --generate-binary-cache-key that this user can read"))
    })?;
    SecretKey::parse(&text).map_err(|e| Fatal(format!("private key {name}: {e}")))
}

/// The keys in a file of `--trusted-public-key-file`. One that is not there is told, and no reason not to start: it may
/// come late, and Nix goes by its own list. A file without any would let every peer in.
fn read_public_keys(path: &Path) -> Result<Vec<PublicKey>, Fatal> {
    let name = path.display();
    let text = key_file::read(path);
    if text.as_ref().is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
        log::warn!("public key {name}: not there; paths that only it signed are passed over");
        return Ok(Vec::new());
    }
    let text = text.map_err(|e| {
        Fatal(format!(
            "public key {name}: {e}; --trusted-public-key-file needs a file with NAME:KEY in it that this user can read"
        ))
    })?;
    let keys = text.split_whitespace().map(PublicKey::parse).collect::<Result<Vec<_>, _>>();
    match keys {
        Ok(keys) if keys.is_empty() => Err(Fatal(format!("public key {name}: there is none in it"))),
        keys => keys.map_err(|e| Fatal(format!("public key {name}: {e}"))),
    }
}

/// What the WAN mode runs beside the rest.
struct Strangers {
    trackers: Arc<Trackers>,
    publisher: Publisher,
}

impl Strangers {
    fn start<F: Fn() + Clone + Send + 'static>(
        config: &Config,
        port: u16,
        store: &Arc<Store>,
        share: &Arc<Share>,
        networks: &Arc<Networks>,
        ended: impl Fn(&'static str) -> F,
    ) -> Result<Strangers, Fatal> {
        let identity = match &config.state_dir {
            Some(dir) => identity::load(dir),
            None => {
                log::warn!("no --state-dir: this node is another peer to its trackers after each start");
                identity::for_this_run()
            }
        };
        let identity = identity.map_err(Fatal)?;
        let (addr, announced_port) = config.announce_addr.clone().unzip();
        let port = announced_port.flatten().unwrap_or(port);
        let instance = Identity::random_seed().map_err(|_| Fatal("the system gives no random numbers".into()))?;
        let instance = u64::from_ne_bytes(instance[..8].try_into().expect("8 bytes")) >> 1;
        let me = Me { identity, peer_id: config.peer_id.clone(), port, addr, instance };
        let publication = Arc::new(Publication::default());
        let urls = config.tracker_urls.clone();
        let trackers = Trackers::start(urls, me, &publication, networks, ended("announce"));
        let trackers = Arc::new(trackers.map_err(|e| Fatal::from(("announce", e)))?);
        let publisher = Publisher::start(store.clone(), share.clone(), publication, ended("publish"));
        let publisher = publisher.map_err(|e| Fatal::from(("publish", e)))?;
        Ok(Strangers { trackers, publisher })
    }
}

/// A source of random numbers; `None` if the system has none. One that fails later repeats its last numbers, as discovery
/// must go on.
fn random_numbers() -> Option<crate::lan::Random> {
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

/// Resolves the names of `--peer`, now and again, where a slow name server delays nothing else. Ends when the sender
/// that is returned is dropped; a resolution under way is not waited for.
fn resolve_peers(
    peers: Vec<(String, u16)>,
    lan: Arc<DiscoveryClient>,
    share: Arc<Share>,
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
            share.set_named_peers(addresses.clone());
            lan.set_named(addresses);
            if stopped.recv_timeout(RESOLVE_INTERVAL) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    })?;
    Ok(Some(running))
}

/// The addresses of all peers. Those of a name that cannot be looked up now stay as they were, in `last`: a name
/// server that is away for a moment must not take peers along.
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
    use std::fs;

    #[test]
    fn a_file_may_have_several_public_keys_and_has_one() {
        let file = std::env::temp_dir().join(format!("peerix-public-keys-{}", std::process::id()));
        let key = "dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";
        fs::write(&file, format!("a-1:{key}\nb-1:{key} c-1:{key}\n")).unwrap();
        assert_eq!(read_public_keys(&file).unwrap().len(), 3);
        for (text, why) in [("", "none"), ("a-1:nonsense", "key")] {
            fs::write(&file, text).unwrap();
            let Fatal(error) = read_public_keys(&file).unwrap_err();
            assert!(error.contains(why) && !error.contains('\n'), "{error}");
        }
        fs::remove_file(&file).unwrap();
    }

    #[test]
    fn a_failed_lookup_leaves_the_addresses_as_they_were() {
        let peers = [("a".to_owned(), 1), ("b".to_owned(), 2)];
        let mut last = vec![Vec::new(); 2];
        let at = |last_octet, port| SocketAddr::from(([10, 0, 0, last_octet], port));
        let fails = |_: &str, _| Err(io::ErrorKind::TimedOut.into());
        assert_eq!(resolve(&peers, &mut last, fails), []);
        let first = resolve(&peers, &mut last, |host, port| Ok(vec![at(host.as_bytes()[0], port)]));
        assert_eq!(first, [at(b'a', 1), at(b'b', 2)]);
        assert_eq!(resolve(&peers, &mut last, fails), first);
        let moved = |host: &str, port| if host == "a" { fails(host, port) } else { Ok(vec![at(9, port)]) };
        assert_eq!(resolve(&peers, &mut last, moved), [at(b'a', 1), at(9, 2)]);
    }
}
