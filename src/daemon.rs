//! Starts, runs and stops the daemon.
//!
//! The main thread opens the sockets and the store, starts one thread for each service, and then
//! waits for a signal. If a setting that failed at the start becomes usable, the main thread stops
//! the services and starts them again with the same sockets. `serve` contains the order of both.

use crate::access::{AccessPolicy, Scope};
use crate::backoff::Backoff;
use crate::config::Config;
use crate::degraded::Degraded;
use crate::fetch::Downloader;
use crate::fetch::spool::Spools;
use crate::friends::{FriendList, tls};
use crate::http::binary_cache::{BinaryCache, CacheInfo};
use crate::http::crowd::Crowds;
use crate::http::handler::{CacheHandler, signer};
use crate::http::metrics::MetricsHandler;
use crate::http::miss_handler::MissHandler;
use crate::http::narinfo::Signer;
use crate::http::server::Server;
use crate::http::stream_limits::StreamLimits;
use crate::identity;
use crate::key_file;
use crate::lan::{
    DigestObserver, Discovery, DiscoveryClient, DiscoverySettings, DiscoveryThread,
    StoreEnvironment,
};
use crate::lock::Mutex;
use crate::log_throttle::LogThrottle;
use crate::lookup::LookupService;
use crate::network::{LanNetworks, Networks};
use crate::nix::SecretKey;
use crate::peers::announce::{Publication, Trackers};
use crate::peers::client::PeerClient;
use crate::peers::friends::Friends;
use crate::peers::health::PeerHealth;
use crate::peers::lan::LanSource;
use crate::peers::pace::Paces;
use crate::peers::rendezvous::{self, OutsideAddress};
use crate::peers::request_pool::RequestPool;
use crate::peers::saved_paces;
use crate::peers::tracker::NodeIdentity;
use crate::peers::wan::WanSource;
use crate::port_mapper::{Mapping, PortMapper};
use crate::publish::Publisher;
use crate::service::{self, SignalWatch, notify};
use crate::sockets::{self, BoundSockets};
use crate::stats::Stats;
use crate::status::{NodeFacts, PRIVATE_KEY, StatusService};
use crate::store::{Store, StoreConfig, StoreError};
use crate::time_scale::{Interval, Timeout};
use crate::trust::TrustedKeys;
use crate::upload_limit::UploadLimit;
use crate::upstream::Upstream;
use crate::wire::tracker::Identity;
use crossbeam_channel::{
    Receiver, RecvError, RecvTimeoutError, Sender, at, bounded, never, select,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::ServerConfig;
use sd_notify::NotifyState;
use std::net::{SocketAddr, TcpListener, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};
use std::{fmt, io};

/// Interval between resolutions of the hosts of `--peer`, because their addresses may change.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(60);

/// Longest interval between updates of the hourly totals. Counts of the last interval before a full
/// hour may be counted for the next one. It is shorter if systemd's watchdog wants that.
const TICK_INTERVAL: Duration = Duration::from_secs(10);

/// File descriptors that the daemon requests from the system. A connection needs one; a stream
/// needs one for each open directory level, and one for a file or a peer. systemd gives services
/// 1,024 by default.
const FILE_DESCRIPTORS: u64 = 8192;

/// Interval between retries of what failed at the start: keys, the identity, the metrics address;
/// and at last the database. nix.conf is checked for changes in the same interval.
const RETRY_INTERVAL: Interval = Interval::from_secs(60);

/// First pause after a failure to open the store. It doubles up to [`RETRY_INTERVAL`].
const FIRST_RETRY_PAUSE: Interval = Interval::from_secs(1);

/// Longest wait for the store at the start, before lookups are answered with misses. It covers
/// three tries, and a nix-daemon that starts at the same time.
const FIRST_OPEN_TIMEOUT: Timeout = Timeout::from_secs(4);

/// Problem code of an unusable identity.
const IDENTITY_PROBLEM: &str = "identity";

/// Time after the start of the shutdown at which the daemon stops waiting for trackers and for the
/// counters' file. The whole shutdown takes at most 2 s.
const STOP_TIMEOUT: Duration = Duration::from_millis(1700);

/// Interval between writes of the counters. A power failure loses at most this much.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);

/// Why the daemon cannot start or continue: one line with the remedy.
#[derive(Debug)]
pub struct FatalError(String);

impl fmt::Display for FatalError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for FatalError {}

/// Converts the error of a step of the start into a [`FatalError`] that names the step.
fn fatal<E: fmt::Display>(what: &'static str) -> impl FnOnce(E) -> FatalError {
    move |e| FatalError(format!("{what}: {e}"))
}

/// Reason why the main thread wakes up.
enum Wakeup {
    /// SIGTERM or SIGINT.
    Signal,
    /// A thread ended that should run until the shutdown. Contains its name.
    Ended(&'static str),
    /// A resource that was missing at the start is available. The services restart with the same
    /// sockets.
    Restart,
}

/// Reason why the services stop.
enum ExitReason {
    /// A signal.
    Stopped,
    /// A restart of the services.
    Restart,
}

/// Runs the daemon until SIGTERM or SIGINT.
///
/// # Errors
/// The daemon cannot start, or one of its threads ended.
pub fn run(config: Config) -> Result<(), FatalError> {
    run_with(config, Stats::new())
}

/// Runs the daemon until SIGTERM or SIGINT and records into `stats`. A benchmark passes
/// [`Stats::off`] to measure the cost of recording. After a restart of the services, a new
/// [`Stats`] is used.
///
/// # Errors
/// The daemon cannot start, or one of its threads ended.
pub fn run_with(config: Config, stats: Stats) -> Result<(), FatalError> {
    service::allow_descriptors(FILE_DESCRIPTORS);
    let process = Process::start(&config)?;
    let mut stats = Some(stats);
    loop {
        let Some(store) = open_store(&config, &process)? else { return Ok(()) };
        let stats = stats.take().unwrap_or_default();
        if let ExitReason::Stopped = serve(config.clone(), stats, store, &process)? {
            return Ok(());
        }
        log::info!("starting again");
    }
}

/// Answers every lookup of this machine's Nix with a miss, until SIGTERM or SIGINT. `config` is
/// what `cli::salvage` got from a malformed command line, and `problem` is the error. Used
/// with sockets from systemd: their port is open even if this process exits, so Nix would wait or
/// fail.
///
/// # Errors
/// The daemon cannot start, or one of its threads ended.
pub fn run_without_flags(config: &Config, problem: &str) -> Result<(), FatalError> {
    let process = Process::start(config)?;
    let text = format!(
        "{problem}; until that is mended, all that Nix asks this node is answered with a miss"
    );
    let misses = MissHandler::new(config, process.sockets.port, "flags", text);
    answer_misses::<()>(misses, &process, &never()).map(|_| ())
}

/// Resources that last from the start of the process to its end.
struct Process {
    networks: Arc<Networks>,
    sockets: BoundSockets,
    wakeups: Sender<Wakeup>,
    woken: Receiver<Wakeup>,
    _signals: SignalWatch,
}

impl Process {
    fn start(config: &Config) -> Result<Process, FatalError> {
        let networks = Arc::new(Networks::read(config.networks.clone()));
        let (wakeups, woken) = bounded(8);
        let signal = wakeups.clone();
        let on_signal = move || drop(signal.try_send(Wakeup::Signal));
        let signals = service::watch_signals(on_signal).map_err(fatal("signals"))?;
        // The signal handlers are installed first, because another process may send a signal as
        // soon as the port is open.
        let sockets = sockets::open(config, &networks.current()).map_err(FatalError)?;
        Ok(Process { networks, sockets, wakeups, woken, _signals: signals })
    }

    /// Returns a callback that wakes the main thread when the thread `what` ends.
    fn on_end(&self, what: &'static str) -> impl Fn() + Clone + Send + 'static {
        let wakeups = self.wakeups.clone();
        move || drop(wakeups.try_send(Wakeup::Ended(what)))
    }

    /// Discards the wakeups of threads that ended with a run. Returns [`ExitReason::Stopped`] if a
    /// signal was among them.
    fn drain(&self) -> ExitReason {
        let is_signal = self.woken.try_iter().any(|wakeup| matches!(wakeup, Wakeup::Signal));
        if is_signal { ExitReason::Stopped } else { ExitReason::Restart }
    }
}

/// Opens Nix's database. If that fails for a time, or if systemd passed the sockets, answers misses
/// until it succeeds. `None` if a signal came first.
///
/// # Errors
/// There is no usable database, and without systemd's sockets the port may as well be closed.
fn open_store(config: &Config, process: &Process) -> Result<Option<Arc<Store>>, FatalError> {
    let store = StoreConfig {
        store_dir: config.store_dir.clone(),
        db: config.db.clone(),
        root: config.root.clone(),
    };
    let opened = open_with_retries(move || Store::open(store.clone()).map(Arc::new));
    let opened = opened.map_err(fatal("store"))?;
    let problem =
        match first_store(&opened, &process.woken, Instant::now() + FIRST_OPEN_TIMEOUT.get())? {
            FirstStore::Opened(store) => return Ok(Some(store)),
            FirstStore::Stopped => return Ok(None),
            FirstStore::Opening => {
                "nix database: it takes long to open; another process may be upgrading it".into()
            }
            FirstStore::Failed(e) if process.sockets.are_passed || may_recover(&e) => e.to_string(),
            FirstStore::Failed(e) => return Err(FatalError(e.to_string())),
        };
    let misses = MissHandler::new(config, process.sockets.port, "store", problem);
    answer_misses(misses, process, &opened)
}

/// Starts a thread that calls `open` until it succeeds, after pauses that grow from 1 s to
/// [`RETRY_INTERVAL`]. Returns the channel of the results. It is a thread of its own because a
/// locked database delays each call by seconds. The thread ends after the first call that follows
/// the drop of the channel.
///
/// # Errors
/// No thread can be started.
fn open_with_retries<T: Send + 'static>(
    open: impl Fn() -> Result<T, StoreError> + Send + 'static,
) -> io::Result<Receiver<Result<T, StoreError>>> {
    let (sender, results) = bounded(1);
    let mut backoff = Backoff::new(FIRST_RETRY_PAUSE, RETRY_INTERVAL);
    thread::Builder::new().name("store".into()).spawn(move || {
        loop {
            let opened = open();
            let is_open = opened.is_ok();
            if sender.send(opened).is_err() || is_open {
                return;
            }
            let now = Instant::now();
            backoff.record_failure(None, now);
            thread::sleep(backoff.due().unwrap_or(now).saturating_duration_since(now));
        }
    })?;
    Ok(results)
}

/// What the first tries to open the store came to.
enum FirstStore<T> {
    Opened(T),
    /// A signal came.
    Stopped,
    /// The last error, or the first one that does not pass within seconds.
    Failed(StoreError),
    /// No try has ended.
    Opening,
}

/// Waits until the store is open, until `deadline` at most if it may open within seconds. Requests
/// wait in the backlog of the sockets meanwhile, because Nix remembers a miss for an hour.
///
/// # Errors
/// A thread ended.
fn first_store<T>(
    opened: &Receiver<Result<T, StoreError>>,
    woken: &Receiver<Wakeup>,
    deadline: Instant,
) -> Result<FirstStore<T>, FatalError> {
    let mut first = FirstStore::Opening;
    loop {
        select! {
            recv(opened) -> result => match result {
                Ok(Ok(store)) => return Ok(FirstStore::Opened(store)),
                Ok(Err(e)) if may_recover_soon(&e) => {
                    log::info!("{e}; trying again");
                    first = FirstStore::Failed(e);
                }
                Ok(Err(e)) => return Ok(FirstStore::Failed(e)),
                Err(_) => return Err(thread_ended("store")),
            },
            recv(woken) -> wakeup => if handle_early_wakeup(wakeup)? {
                return Ok(FirstStore::Stopped);
            },
            recv(at(deadline)) -> _ => return Ok(first),
        }
    }
}

fn thread_ended(what: &str) -> FatalError {
    FatalError(format!("the {what} thread ended; see the log"))
}

/// Handles a wakeup before the store is open. Returns true after a signal, of which it notifies
/// systemd.
///
/// # Errors
/// A thread ended.
fn handle_early_wakeup(wakeup: Result<Wakeup, RecvError>) -> Result<bool, FatalError> {
    match wakeup {
        Ok(Wakeup::Signal) => {
            notify(&[NotifyState::Stopping]);
            Ok(true)
        }
        Ok(Wakeup::Ended(what)) => Err(thread_ended(what)),
        Ok(Wakeup::Restart) | Err(_) => Ok(false),
    }
}

/// Whether a store that failed with `e` may work later without a change of the settings: its files
/// may be mounted late, and the database may be locked or lack a running nix-daemon.
fn may_recover(e: &StoreError) -> bool {
    may_recover_soon(e) || matches!(e, StoreError::NoFiles { .. })
}

/// Whether a store that failed with `e` may work within seconds, as when nix-daemon starts.
fn may_recover_soon(e: &StoreError) -> bool {
    matches!(e, StoreError::Busy { .. } | StoreError::WalUnavailable { .. })
}

/// Answers lookups with misses until `opened` receives a value, and returns that value. `None` if a
/// signal came.
fn answer_misses<T>(
    misses: MissHandler,
    process: &Process,
    opened: &Receiver<Result<T, StoreError>>,
) -> Result<Option<T>, FatalError> {
    log::error!("{}", misses.problem());
    let sockets = process.sockets.try_clone().map_err(fatal("sockets"))?;
    let server = Server::start(sockets.listeners, Arc::new(misses), process.on_end("http"));
    let server = server.map_err(fatal("http server"))?;
    notify(&[NotifyState::Ready]);
    let pause = sd_notify::watchdog_enabled()
        .map_or(RETRY_INTERVAL.get(), |limit| RETRY_INTERVAL.get().min(limit / 3));
    loop {
        select! {
            recv(process.woken) -> wakeup => if handle_early_wakeup(wakeup)? {
                return Ok(None);
            },
            recv(opened) -> result => match result {
                Ok(Ok(value)) => {
                    drop(server);
                    return Ok(match process.drain() {
                        ExitReason::Stopped => None,
                        ExitReason::Restart => Some(value),
                    });
                }
                Ok(Err(e)) => log::debug!("{e}"),
                Err(_) => return Err(thread_ended("store")),
            },
            default(pause) => notify(&[NotifyState::Watchdog]),
        }
    }
}

/// Starts all services and runs them until a signal, or until a resource that was missing at the
/// start is available. Then stops them.
fn serve(
    config: Config,
    stats: Stats,
    store: Arc<Store>,
    process: &Process,
) -> Result<ExitReason, FatalError> {
    let now = Instant::now();
    let BoundSockets { listeners, datagrams, port, .. } =
        process.sockets.try_clone().map_err(fatal("sockets"))?;
    let networks = process.networks.clone();
    if config.mode.has_lan() {
        log_networks(&networks.current());
    }
    let access = Arc::new(AccessPolicy::new(networks.clone(), &config));
    let on_end = |what| process.on_end(what);
    let degraded = Arc::new(Degraded::default());
    let own_key = LateSigningKey::new(&config, &access, &degraded);

    let is_stopping = Arc::new(AtomicBool::new(false));
    let requests = Arc::new(RequestPool::default());
    let identity = find_identity(&config, &degraded);
    let friend_services = FriendServices::start(&config, identity.as_ref(), &networks, &requests);
    let friend_list = friend_services.as_ref().map(|services| services.friends.list().clone());
    let trusted = Arc::new(TrustedKeys::read(&config, port, friend_list, &degraded));
    let mut environment =
        StoreEnvironment::new(access.clone(), store.clone(), networks.clone(), is_stopping.clone());
    if let Some(FriendServices { friends, .. }) = &friend_services {
        let (key, friends) = (*friends.list().own(), friends.clone());
        let observer: DigestObserver =
            Box::new(move |instance, digest, at| friends.record_hello(instance, digest, at));
        environment = environment.with_friends(key, observer);
    }
    let has_lan = config.mode.has_lan();
    let settings = DiscoverySettings { port, has_lan, timeout: config.timeout };
    let random =
        random_numbers().ok_or_else(|| FatalError("the system gives no random numbers".into()))?;
    let (outside, mapper) = map_port(&config, port, &networks).unzip();
    let discovery = Discovery::new(environment, settings, random, now);
    let discovery =
        DiscoveryThread::spawn(discovery, datagrams, networks.clone(), on_end("discovery"))
            .map_err(fatal("discovery"))?;
    let resolver = resolve_peers(config.peers.clone(), discovery.client(), access.clone())
        .map_err(fatal("resolve"))?;

    let client = Arc::new(PeerClient::new(config.store_dir.clone()));
    let health = Arc::new(PeerHealth::default());
    let stats = Arc::new(stats);
    let paces = Arc::new(Paces::default());
    let counters = start_counters_thread(&config, &stats, &paces).map_err(fatal("counters"))?;
    // Friends need a key that lasts; without a state directory it changes with each start.
    let lasting_identity = identity.as_ref().filter(|_| config.state_dir.is_some());
    let facts = NodeFacts::new(&config, port, lasting_identity.map(|identity| identity.key()));
    let wan_services = identity.filter(|_| config.mode.has_wan()).map(|identity| {
        WanServices::start(&config, identity, port, &store, &access, &networks, on_end)
    });
    let wan_services = wan_services.transpose()?;
    let wan = wan_services.as_ref().map(|wan_services| {
        let trackers = wan_services.trackers.clone();
        let (client, health, requests) = (client.clone(), health.clone(), requests.clone());
        Arc::new(WanSource::new(trackers, client, health, networks.clone(), requests))
    });
    let lan = config.mode.has_lan().then(|| {
        let (client, health) = (client.clone(), health.clone());
        Arc::new(LanSource::new(discovery.client(), client, health, requests))
    });
    let known_keys = trusted.keys().unwrap_or_default().into_iter().map(|trusted| trusted.key);
    let upstream = Upstream::new(&config, &known_keys.collect::<Vec<_>>());
    let spools = Spools::new(config.state_dir.clone());
    let friends = friend_services.as_ref().map(|friend_services| friend_services.friends.clone());
    let lookup =
        Arc::new(LookupService::new(lan, wan, friends.clone(), trusted.clone(), stats.clone()));
    if let Some(friends) = friends.clone().filter(|_| !config.tracker_urls.is_empty()) {
        let mapping = mapper.as_ref().map(PortMapper::current);
        meet_friends(&config, port, mapping, friends).map_err(fatal("meet"))?;
    }
    let status = StatusService {
        stats: stats.clone(),
        discovery: discovery.client(),
        health: health.clone(),
        trackers: wan_services.as_ref().map(|wan_services| wan_services.trackers.clone()),
        friends: friends.clone(),
        mapping: mapper.as_ref().map(PortMapper::current),
        store: store.clone(),
        networks,
        trusted: trusted.clone(),
        degraded: degraded.clone(),
        facts,
    };
    let upload_limit = config.upload_limit.map(UploadLimit::new);
    let cache = BinaryCache {
        info: CacheInfo { store_dir: config.store_dir.clone(), priority: config.priority },
        store,
        access,
        lookup: lookup.clone(),
        downloader: Downloader::new(lookup, client, health, paces, stats.clone(), upstream, spools),
        signer: own_key.signer.clone(),
        stream_limits: StreamLimits::new(upload_limit.as_ref()),
        crowds: Crowds::default(),
        stats: stats.clone(),
        faults: LogThrottle::default(),
    };
    let cache = CacheHandler {
        cache,
        status,
        friends: friend_services
            .as_ref()
            .map(|services| (services.tls.clone(), services.friends.list().clone())),
        upload_limit,
        refusals: LogThrottle::default(),
    };
    let cache = Arc::new(cache);
    let metrics = Arc::new(MetricsServer::new(config.metrics, &cache, &degraded));
    let server = Server::start_with_outside(listeners, outside, cache, on_end("http"))
        .map_err(fatal("http server"))?;

    let retries = RetryThread {
        config,
        own_key,
        trusted,
        degraded,
        metrics: metrics.clone(),
        wakeups: process.wakeups.clone(),
    };
    let retrying = retries.spawn().map_err(fatal("retries"))?;

    log::info!("peerix {} serves on port {port}", env!("CARGO_PKG_VERSION"));
    notify(&[NotifyState::Ready]);
    let result = wait(&process.woken, &discovery, &stats);
    if !matches!(result, Ok(ExitReason::Restart)) {
        notify(&[NotifyState::Stopping]);
        log::info!("stopping");
    }
    drop(retrying);
    metrics.stop();
    // First peers and trackers learn that this node leaves, then running requests finish, then the
    // services that they use stop. An aborted lookup would be a miss for Nix, which caches it for
    // an hour.
    let stopping = Instant::now();
    is_stopping.store(true, Ordering::Relaxed);
    discovery.say_bye();
    wan_services.iter().for_each(|wan_services| wan_services.trackers.leave());
    drop(server);
    // Starts the last write now, so that a tracker that does not answer cannot use up its time.
    drop(counters.running);
    if let Some(WanServices { trackers, publisher }) = wan_services {
        trackers.wait(stopping + STOP_TIMEOUT);
        drop(publisher);
    }
    // Bounded, because the disk may hang.
    let _ = counters.ended.recv_deadline(stopping + STOP_TIMEOUT);
    friends.iter().for_each(|friends| friends.stop());
    drop(mapper);
    drop(discovery);
    drop(resolver);
    match result {
        Ok(ExitReason::Restart) => Ok(process.drain()),
        other => other,
    }
}

/// The secret key of `--private-key`, which may become readable after the start.
struct LateSigningKey {
    file: Option<PathBuf>,
    signer: Arc<OnceLock<Signer>>,
    access: Arc<AccessPolicy>,
}

impl LateSigningKey {
    /// Tries to read the key. Blocks on the disk.
    fn new(config: &Config, access: &Arc<AccessPolicy>, degraded: &Degraded) -> LateSigningKey {
        let key = LateSigningKey {
            file: config.private_key.clone(),
            signer: Arc::default(),
            access: access.clone(),
        };
        key.read(degraded);
        key
    }

    /// Reads the key if it has not been read yet. Returns true if this call read it. Blocks on the
    /// disk.
    fn read(&self, degraded: &Degraded) -> bool {
        let Some(file) = self.file.as_deref().filter(|_| self.signer.get().is_none()) else {
            return false;
        };
        let Some(key) = degraded.note(PRIVATE_KEY, read_key(file)) else { return false };
        self.signer.get_or_init(|| signer(key));
        self.access.set_has_key();
        true
    }
}

/// The HTTP server of `--metrics`. Its address may become available after the start, as that of a
/// VPN.
struct MetricsServer {
    address: Option<SocketAddr>,
    cache: Arc<CacheHandler>,
    server: Mutex<Option<Server>>,
}

impl MetricsServer {
    fn new(
        address: Option<SocketAddr>,
        cache: &Arc<CacheHandler>,
        degraded: &Degraded,
    ) -> MetricsServer {
        let server = MetricsServer { address, cache: cache.clone(), server: Mutex::default() };
        server.start(degraded);
        server
    }

    /// Starts the server if it does not run yet. Records a failure in `degraded`.
    fn start(&self, degraded: &Degraded) {
        let outcome = {
            let mut server = self.server.lock();
            let Some(address) = self.address.filter(|_| server.is_none()) else { return };
            let started = TcpListener::bind(address).and_then(|listener| {
                let handler = Arc::new(MetricsHandler(self.cache.clone()));
                // The daemon works without this server, so its end is ignored.
                Server::start(vec![listener], handler, || {})
            });
            let started = started.map_err(|e| format!("--metrics {address}: {e}"));
            started.map(|started| *server = Some(started))
        };
        degraded.note("metrics", outcome);
    }

    /// Stops the server, so that the next run can bind the address.
    fn stop(&self) {
        drop(self.server.lock().take());
    }
}

/// A thread that retries every [`RETRY_INTERVAL`] what failed at the start. It is separate because
/// the disk may hang.
struct RetryThread {
    config: Config,
    own_key: LateSigningKey,
    trusted: Arc<TrustedKeys>,
    degraded: Arc<Degraded>,
    metrics: Arc<MetricsServer>,
    wakeups: Sender<Wakeup>,
}

impl RetryThread {
    /// Starts the thread. Dropping the returned sender ends it, without waiting for a running try.
    ///
    /// # Errors
    /// No thread can be started.
    fn spawn(self) -> io::Result<Sender<()>> {
        let (running, stopped) = bounded::<()>(0);
        thread::Builder::new().name("retries".into()).spawn(move || {
            while stopped.recv_timeout(RETRY_INTERVAL.get()) == Err(RecvTimeoutError::Timeout) {
                // The published filter lacks the paths that were withheld without the key. A
                // restart rebuilds it.
                let has_more_to_publish =
                    self.own_key.read(&self.degraded) && self.config.mode.has_wan();
                self.trusted.refresh(&self.degraded);
                self.metrics.start(&self.degraded);
                let lacks_identity =
                    self.degraded.all().iter().any(|(code, _)| *code == IDENTITY_PROBLEM);
                if has_more_to_publish || (lacks_identity && load_identity(&self.config).is_ok()) {
                    let _ = self.wakeups.try_send(Wakeup::Restart);
                    return;
                }
            }
        })?;
        Ok(running)
    }
}

/// Logs the LAN networks, and warns of each `--lan` on an excluded interface.
fn log_networks(networks: &LanNetworks) {
    log::info!("LAN: {networks}");
    for (network, interface) in networks.ineffective_networks() {
        let remedy = format!("--interface {interface} uses it");
        log::warn!("--lan {network}: is on {interface}, which is excluded; {remedy}");
    }
}

/// The thread that writes the counters. None runs without a state directory.
struct CountersThread {
    /// Dropping it ends the thread after a last write.
    running: Sender<()>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

/// Loads counters and paces from the state directory, and starts a thread that writes them at once,
/// every [`SAVE_INTERVAL`] and at the end. It is separate because the disk may hang.
///
/// # Errors
/// No thread can be started.
fn start_counters_thread(
    config: &Config,
    stats: &Arc<Stats>,
    paces: &Arc<Paces>,
) -> io::Result<CountersThread> {
    let (running, stopped) = bounded::<()>(0);
    let (end, ended) = bounded::<()>(0);
    let Some(dir) = &config.state_dir else { return Ok(CountersThread { running, ended }) };
    stats.load_earlier(dir, SystemTime::now());
    saved_paces::load(paces, dir);
    let (stats, paces, dir) = (stats.clone(), paces.clone(), dir.clone());
    let save = move || {
        stats.save(SystemTime::now());
        // Debug level only: the counters report a failing disk.
        if let Err(e) = saved_paces::save(&paces, &dir) {
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
    Ok(CountersThread { running, ended })
}

/// Interval between updates of the hourly totals and notifications of a watchdog with this limit.
fn tick_interval(watchdog: Option<Duration>) -> Duration {
    watchdog.map_or(TICK_INTERVAL, |limit| TICK_INTERVAL.min(limit / 3))
}

/// Waits for the reason to stop. Meanwhile notifies systemd's watchdog as long as the discovery
/// loop makes progress, and updates the hourly totals.
///
/// # Errors
/// A thread ended that should run until the shutdown.
fn wait(
    woken: &Receiver<Wakeup>,
    discovery: &DiscoveryThread,
    stats: &Stats,
) -> Result<ExitReason, FatalError> {
    let watchdog = sd_notify::watchdog_enabled();
    let interval = tick_interval(watchdog);
    let mut last_turn = 0;
    loop {
        match woken.recv_timeout(interval) {
            Ok(Wakeup::Signal) => return Ok(ExitReason::Stopped),
            Ok(Wakeup::Restart) => return Ok(ExitReason::Restart),
            Ok(Wakeup::Ended(what)) => return Err(thread_ended(what)),
            Err(RecvTimeoutError::Disconnected) => {
                return Err(FatalError("nobody is left to wake the daemon".into()));
            }
            Err(RecvTimeoutError::Timeout) => {
                stats.update_hours(SystemTime::now());
                if watchdog.is_some() {
                    let turn = discovery.request_turn();
                    if turn != last_turn {
                        notify(&[NotifyState::Watchdog]);
                    }
                    last_turn = turn;
                }
            }
        }
    }
}

/// Reads the secret key of `--private-key`.
///
/// # Errors
/// One line: what is wrong with the file, and what the node does without the key.
fn read_key(path: &Path) -> Result<SecretKey, String> {
    let name = path.display();
    let without = "until --private-key names a file of nix-store --generate-binary-cache-key that this user can read, \
                   paths without another signature are not shared";
    let text = key_file::read(path).map_err(|e| format!("private key {name}: {e}; {without}"))?;
    // Content that the systemd units provide by SetCredential= if the file is missing.
    if text.trim() == "missing" {
        return Err(format!(
            "private key {name}: the file that systemd should take it from is missing; {without}"
        ));
    }
    SecretKey::parse(&text).map_err(|e| format!("private key {name}: {e}; {without}"))
}

/// Loads the identity from the state directory, or creates one for this run if there is no
/// directory.
///
/// # Errors
/// One line: what is wrong with the file, and what the node does without it.
fn load_identity(config: &Config) -> Result<Identity, String> {
    let without = |e| {
        format!("{e}; until then, peers on other networks neither find this node nor are found")
    };
    match &config.state_dir {
        Some(dir) => identity::load(dir).map_err(without),
        None => {
            log::warn!(
                "no --state-dir: this node is another peer to its trackers after each start"
            );
            identity::for_this_run().map_err(without)
        }
    }
}

/// Services that run only in modes with WAN.
struct WanServices {
    trackers: Arc<Trackers>,
    /// `None` if nothing is shared with WAN peers.
    publisher: Option<Publisher>,
}

impl WanServices {
    fn start<F: Fn() + Clone + Send + 'static>(
        config: &Config,
        identity: Arc<Identity>,
        port: u16,
        store: &Arc<Store>,
        access: &Arc<AccessPolicy>,
        networks: &Arc<Networks>,
        on_end: impl Fn(&'static str) -> F,
    ) -> Result<WanServices, FatalError> {
        let (addr, announced_port) = config.announce_addr.clone().unzip();
        let port = announced_port.flatten().unwrap_or(port);
        let instance = Identity::random_seed()
            .map_err(|_| FatalError("the system gives no random numbers".into()))?;
        let instance = u64::from_ne_bytes(instance[..8].try_into().expect("8 bytes")) >> 1;
        let me = NodeIdentity { identity, peer_id: config.peer_id.clone(), port, addr, instance };
        let shares_with_wan = access.serves(Scope::Wan);
        let publication =
            Arc::new(if shares_with_wan { Publication::default() } else { Publication::empty() });
        let urls = config.tracker_urls.clone();
        let trackers = Trackers::start(urls, me, &publication, networks, on_end("announce"));
        let trackers = Arc::new(trackers.map_err(fatal("announce"))?);
        let publish =
            || Publisher::start(store.clone(), access.clone(), publication, on_end("publish"));
        let publisher = shares_with_wan.then(publish).transpose().map_err(fatal("publish"))?;
        Ok(WanServices { trackers, publisher })
    }
}

/// Loads this node's identity, and creates it if there is a state directory, so that the user can
/// give it to friends in advance. `None` if the node needs no identity, or if it cannot be loaded.
/// In modes with WAN or with friends, a failure is recorded in `degraded` and retried.
fn find_identity(config: &Config, degraded: &Degraded) -> Option<Arc<Identity>> {
    if config.mode.has_wan() || config.has_friends() && config.state_dir.is_some() {
        return degraded.note(IDENTITY_PROBLEM, load_identity(config)).map(Arc::new);
    }
    identity::load(config.state_dir.as_ref()?).map_err(|e| log::warn!("{e}")).ok().map(Arc::new)
}

/// Connections to and from friends, and the TLS configuration for accepting theirs.
struct FriendServices {
    friends: Arc<Friends>,
    tls: Arc<ServerConfig>,
}

impl FriendServices {
    /// Starts the services for friends. `None` if no friends are configured, or after an error,
    /// which is logged.
    fn start(
        config: &Config,
        identity: Option<&Arc<Identity>>,
        networks: &Arc<Networks>,
        requests: &Arc<RequestPool>,
    ) -> Option<FriendServices> {
        if !config.has_friends() {
            return None;
        }
        if config.state_dir.is_none() {
            log::error!(
                "no friends: --friend needs --state-dir, where this node's identity is kept"
            );
        }
        let identity = identity.filter(|_| config.state_dir.is_some())?.clone();
        Self::try_start(config, identity, networks, requests)
            .map_err(|e| log::error!("no friends: {e}"))
            .ok()
    }

    fn try_start(
        config: &Config,
        identity: Arc<Identity>,
        networks: &Arc<Networks>,
        requests: &Arc<RequestPool>,
    ) -> Result<Self, String> {
        let list =
            FriendList::new(config.friends.clone(), config.friends_file.clone(), identity.key());
        let list = Arc::new(list);
        let tls = tls::server_config(&identity, list.clone()).map_err(|e| format!("TLS: {e}"))?;
        let (networks, requests) = (networks.clone(), requests.clone());
        let friends = Friends::start(list, identity, config.store_dir.clone(), networks, requests);
        Ok(FriendServices { friends: friends.map_err(|e| format!("thread: {e}"))?, tls })
    }
}

/// Opens the socket to which the router forwards connections, and starts the thread that maps the
/// port. `None` without `--map-port`, or after an error, which is logged.
fn map_port(
    config: &Config,
    port: u16,
    networks: &Arc<Networks>,
) -> Option<(TcpListener, PortMapper)> {
    let start = || {
        let listener = sockets::open_outside(port)?;
        let port = listener.local_addr()?.port();
        Ok::<_, io::Error>((
            listener,
            PortMapper::start(port, config.state_dir.clone(), networks.clone())?,
        ))
    };
    let started = config.map_port.then(start)?;
    started.map_err(|e| log::error!("port mapping: {e}")).ok()
}

/// Starts the thread that meets friends at trackers. It ends when `friends` stops; a running
/// request is not waited for.
///
/// # Errors
/// No thread can be started.
fn meet_friends(
    config: &Config,
    port: u16,
    mapping: Option<Arc<Mutex<Mapping>>>,
    friends: Arc<Friends>,
) -> io::Result<()> {
    let (host, announced_port) = config.announce_addr.clone().unzip();
    let port = announced_port.flatten().unwrap_or(port);
    let outside_address = move || {
        let current = |mapping: &Arc<Mutex<Mapping>>| mapping.lock().clone();
        let mapping = mapping.as_ref().map(current).unwrap_or_default();
        OutsideAddress {
            host: host.clone(),
            port,
            mapped: mapping.outside,
            pinhole: mapping.pinhole,
        }
    };
    let urls = config.tracker_urls.clone();
    thread::Builder::new().name("meet".into()).spawn(move || {
        rendezvous::run(&urls, &friends, outside_address);
    })?;
    Ok(())
}

/// Returns a source of random numbers. `None` if the system has none. If the system fails later,
/// the source repeats its last 64 numbers, so that discovery can continue.
fn random_numbers() -> Option<crate::lan::RandomSource> {
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

    fn busy() -> StoreError {
        StoreError::Busy { db: PathBuf::from("/db") }
    }

    /// Guards against misses that Nix remembers for an hour, because nix-daemon starts a second
    /// after this node.
    #[test]
    fn store_that_opens_at_second_try_is_awaited() {
        let was_tried = AtomicBool::new(false);
        let opened = open_with_retries(move || {
            if was_tried.swap(true, Ordering::Relaxed) { Ok("store") } else { Err(busy()) }
        });
        let deadline = Instant::now() + Duration::from_secs(60);
        let first = first_store(&opened.unwrap(), &never(), deadline).unwrap();
        assert!(matches!(first, FirstStore::Opened("store")));
    }

    #[test]
    fn store_that_does_not_open_soon_is_not_awaited_longer() {
        let (opened, results) = bounded::<Result<(), _>>(1);
        let past = Instant::now();
        let first = |deadline| first_store(&results, &never(), deadline).unwrap();
        assert!(matches!(first(past), FirstStore::Opening));
        opened.send(Err(StoreError::Missing { db: PathBuf::from("/db") })).unwrap();
        let late = past + Duration::from_secs(3600);
        assert!(matches!(first(late), FirstStore::Failed(StoreError::Missing { .. })));
    }

    #[test]
    fn signal_ends_wait_for_store_that_hangs() {
        let (_opened, results) = bounded::<Result<(), _>>(1);
        let (wakeups, woken) = bounded(1);
        wakeups.send(Wakeup::Signal).unwrap();
        let late = Instant::now() + Duration::from_secs(3600);
        assert!(matches!(first_store(&results, &woken, late).unwrap(), FirstStore::Stopped));
    }

    /// docs/status.md promises that counts are off by at most ten seconds.
    #[test]
    fn hourly_totals_are_updated_every_ten_seconds_with_and_without_a_watchdog() {
        let limit = |seconds| tick_interval(Some(Duration::from_secs(seconds))).as_secs();
        assert_eq!((tick_interval(None).as_secs(), limit(600), limit(15)), (10, 10, 5));
    }

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
