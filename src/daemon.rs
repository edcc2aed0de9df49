//! Starts, runs and stops the daemon.
//!
//! The main thread opens the sockets and the store, starts one thread for each service, and then
//! waits for a signal. If a setting that failed at the start becomes usable, the main thread stops
//! the services and starts them again with the same sockets. `Services` contains the order of
//! both.

mod counters;
mod friends;
mod lan;
mod metrics;
mod node;
mod open_store;
mod process;
mod retries;
mod wan;

pub use process::FatalError;

use crate::config::Config;
use crate::fetch::Downloader;
use crate::fetch::spool::Spools;
use crate::http::binary_cache::{BinaryCache, CacheInfo};
use crate::http::crowd::Crowds;
use crate::http::handler::CacheHandler;
use crate::http::miss_handler::MissHandler;
use crate::http::server::Server;
use crate::http::stream_limits::StreamLimits;
use crate::lan::DiscoveryThread;
use crate::log_throttle::LogThrottle;
use crate::lookup::LookupService;
use crate::port_mapper::PortMapper;
use crate::service::{self, notify};
use crate::sockets::{self, BoundSockets};
use crate::stats::Stats;
use crate::status::{NodeFacts, StatusService};
use crate::store::Store;
use crate::trust::TrustedKeys;
use crate::upload_limit::UploadLimit;
use crate::upstream::Upstream;
use counters::CountersThread;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, never};
use friends::FriendServices;
use lan::LanServices;
use metrics::MetricsServer;
use node::{Node, PeerRequests};
use open_store::{answer_misses, open_store};
use process::{ExitReason, Process, Wakeup, fatal, thread_ended};
use retries::start_retries;
use sd_notify::NotifyState;
use std::io;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use wan::WanServices;

/// Longest interval between updates of the hourly totals. Counts of the last interval before a full
/// hour may be counted for the next one. It is shorter if systemd's watchdog wants that.
const TICK_INTERVAL: Duration = Duration::from_secs(10);

/// File descriptors that the daemon requests from the system. A connection needs one; a stream
/// needs one for each open directory level, and one for a file or a peer. systemd gives services
/// 1,024 by default.
const FILE_DESCRIPTORS: u64 = 8192;

/// Time after the start of the shutdown at which the daemon stops waiting for trackers and for the
/// counters' file. The whole shutdown takes at most 2 s.
const STOP_TIMEOUT: Duration = Duration::from_millis(1700);

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

/// Starts all services and runs them until a signal, or until a resource that was missing at the
/// start is available. Then stops them.
fn serve(
    config: Config,
    stats: Stats,
    store: Arc<Store>,
    process: &Process,
) -> Result<ExitReason, FatalError> {
    let services = Services::start(config, stats, store, process)?;
    log::info!("peerix {} serves on port {}", env!("CARGO_PKG_VERSION"), services.node.port);
    notify(&[NotifyState::Ready]);
    let result = wait(&process.woken, &services.lan.discovery, &services.node.stats);
    if !matches!(result, Ok(ExitReason::Restart)) {
        notify(&[NotifyState::Stopping]);
        log::info!("stopping");
    }
    services.stop();
    match result {
        Ok(ExitReason::Restart) => Ok(process.drain()),
        other => other,
    }
}

/// The running services.
struct Services {
    node: Arc<Node>,
    lan: LanServices,
    /// `None` in mode `lan`, or without an identity.
    wan: Option<WanServices>,
    friends: Option<FriendServices>,
    mapper: Option<PortMapper>,
    counters: CountersThread,
    server: Server,
    metrics: Arc<MetricsServer>,
    /// Dropping it ends the retries.
    retrying: Sender<()>,
}

impl Services {
    fn start(
        config: Config,
        stats: Stats,
        store: Arc<Store>,
        process: &Process,
    ) -> Result<Services, FatalError> {
        let BoundSockets { listeners, datagrams, port, .. } =
            process.sockets.try_clone().map_err(fatal("sockets"))?;
        let on_end = |what| process.on_end(what);
        let node = Arc::new(Node::new(config, port, process.networks.clone(), store, stats));
        let requests = PeerRequests::new(node.config.store_dir.clone());
        let friends = FriendServices::start(&node, &requests);
        let friend_list = friends.as_ref().map(|services| services.friends.list().clone());
        let trusted = Arc::new(TrustedKeys::read(&node.config, port, friend_list, &node.degraded));
        let (outside, mapper) = map_port(&node).unzip();
        let lan = LanServices::start(&node, datagrams, friends.as_ref(), on_end("discovery"))?;
        let (stats, paces) = (node.stats.clone(), requests.paces.clone());
        let counters = CountersThread::start(node.config.state_dir.clone(), stats, paces)
            .map_err(fatal("counters"))?;
        let wan = WanServices::start(&node, on_end)?;
        if let Some(friends) = friends.as_ref().filter(|_| !node.config.tracker_urls.is_empty()) {
            let mapping = mapper.as_ref().map(PortMapper::current);
            friends.meet(&node, mapping).map_err(fatal("meet"))?;
        }
        let friend_source = friends.as_ref().map(|services| services.friends.clone());
        let identity = node.lasting_identity().map(|identity| identity.key());
        let status = StatusService {
            stats: node.stats.clone(),
            discovery: lan.discovery.client(),
            health: requests.health.clone(),
            trackers: wan.as_ref().map(|wan| wan.trackers.clone()),
            friends: friend_source.clone(),
            mapping: mapper.as_ref().map(PortMapper::current),
            store: node.store.clone(),
            networks: node.networks.clone(),
            trusted: trusted.clone(),
            degraded: node.degraded.clone(),
            facts: NodeFacts::new(&node.config, port, identity),
        };
        let lan_source = node.config.mode.has_lan().then(|| lan.source(&requests));
        let wan_source = wan.as_ref().map(|wan| wan.source(&node, &requests));
        let stats = node.stats.clone();
        let lookup =
            LookupService::new(lan_source, wan_source, friend_source, trusted.clone(), stats);
        let cache = cache_handler(&node, requests, lookup, &trusted, status, friends.as_ref());
        let cache = Arc::new(cache);
        let metrics = Arc::new(MetricsServer::new(node.config.metrics, &cache, &node.degraded));
        let server = Server::start_with_outside(listeners, outside, cache, on_end("http"))
            .map_err(fatal("http server"))?;
        let wakeups = process.wakeups.clone();
        let retrying = start_retries(node.clone(), trusted, metrics.clone(), wakeups)
            .map_err(fatal("retries"))?;
        Ok(Services { node, lan, wan, friends, mapper, counters, server, metrics, retrying })
    }

    /// Stops the services. First peers and trackers learn that this node leaves, then running
    /// requests finish, then the services that they use stop. An aborted lookup would be a miss for
    /// Nix, which caches it for an hour.
    fn stop(self) {
        drop(self.retrying);
        self.metrics.stop();
        let deadline = Instant::now() + STOP_TIMEOUT;
        self.lan.leave();
        self.wan.iter().for_each(|wan| wan.trackers.leave());
        drop(self.server);
        // Starts the last write now, so that a tracker that does not answer cannot use up its time.
        drop(self.counters.running);
        if let Some(WanServices { trackers, publisher }) = self.wan {
            trackers.wait(deadline);
            drop(publisher);
        }
        // Bounded, because the disk may hang.
        let _ = self.counters.ended.recv_deadline(deadline);
        self.friends.iter().for_each(|services| services.friends.stop());
        drop(self.mapper);
        drop(self.lan);
    }
}

/// Returns the handler of all requests to this node.
fn cache_handler(
    node: &Node,
    requests: PeerRequests,
    lookup: LookupService,
    trusted: &TrustedKeys,
    status: StatusService,
    friends: Option<&FriendServices>,
) -> CacheHandler {
    let config = &node.config;
    let PeerRequests { client, health, paces, .. } = requests;
    let stats = node.stats.clone();
    let lookup = Arc::new(lookup);
    let known_keys = trusted.keys().unwrap_or_default().into_iter().map(|trusted| trusted.key);
    let upstream = Upstream::new(config, &known_keys.collect::<Vec<_>>());
    let spools = Spools::new(config.state_dir.clone());
    let upload_limit = config.upload_limit.map(UploadLimit::new);
    CacheHandler {
        cache: BinaryCache {
            info: CacheInfo::new(config),
            store: node.store.clone(),
            access: node.access.clone(),
            lookup: lookup.clone(),
            downloader: Downloader::new(
                lookup,
                client,
                health,
                paces,
                stats.clone(),
                upstream,
                spools,
            ),
            signer: node.signer.clone(),
            stream_limits: StreamLimits::new(upload_limit.as_ref()),
            crowds: Crowds::default(),
            stats,
            faults: LogThrottle::default(),
        },
        status,
        friends: friends.map(|services| (services.tls.clone(), services.friends.list().clone())),
        upload_limit,
        refusals: LogThrottle::default(),
    }
}

/// Opens the socket to which the router forwards connections, and starts the thread that maps the
/// port. `None` without `--map-port`, or after an error, which is logged.
fn map_port(node: &Node) -> Option<(TcpListener, PortMapper)> {
    let start = || {
        let listener = sockets::open_outside(node.port)?;
        let port = listener.local_addr()?.port();
        let (state_dir, networks) = (node.config.state_dir.clone(), node.networks.clone());
        Ok::<_, io::Error>((listener, PortMapper::start(port, state_dir, networks)?))
    };
    let started = node.config.map_port.then(start)?;
    started.map_err(|e| log::error!("port mapping: {e}")).ok()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// docs/status.md promises that counts are off by at most ten seconds.
    #[test]
    fn hourly_totals_are_updated_every_ten_seconds_with_and_without_a_watchdog() {
        let limit = |seconds| tick_interval(Some(Duration::from_secs(seconds))).as_secs();
        assert_eq!((tick_interval(None).as_secs(), limit(600), limit(15)), (10, 10, 5));
    }
}
