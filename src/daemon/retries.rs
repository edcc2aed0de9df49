//! Retries what failed at the start: keys, the identity and the metrics address.

use super::node::Node;
use super::process::Wakeup;
use crate::degraded::Degraded;
use crate::http::handler::CacheHandler;
use crate::http::metrics::MetricsHandler;
use crate::http::server::Server;
use crate::lock::Mutex;
use crate::time_scale::Interval;
use crate::trust::TrustedKeys;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread;

/// Interval between retries of what failed at the start: keys, the identity, the metrics address;
/// and at last the database. nix.conf is checked for changes in the same interval.
pub(super) const RETRY_INTERVAL: Interval = Interval::from_secs(60);

/// The HTTP server of `--metrics`. Its address may become available after the start, as that of a
/// VPN.
pub(super) struct MetricsServer {
    address: Option<SocketAddr>,
    cache: Arc<CacheHandler>,
    server: Mutex<Option<Server>>,
}

impl MetricsServer {
    pub(super) fn new(
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
    pub(super) fn stop(&self) {
        drop(self.server.lock().take());
    }
}

/// Starts a thread that retries every [`RETRY_INTERVAL`] what failed at the start. It is separate
/// because the disk may hang. Dropping the returned sender ends it, without waiting for a running
/// try.
///
/// # Errors
/// No thread can be started.
pub(super) fn start_retries(
    node: Arc<Node>,
    trusted: Arc<TrustedKeys>,
    metrics: Arc<MetricsServer>,
    wakeups: Sender<Wakeup>,
) -> io::Result<Sender<()>> {
    let (running, stopped) = bounded::<()>(0);
    thread::Builder::new().name("retries".into()).spawn(move || {
        while stopped.recv_timeout(RETRY_INTERVAL.get()) == Err(RecvTimeoutError::Timeout) {
            // The published filter lacks the paths that were withheld without the key. A restart
            // rebuilds it.
            let has_more_to_publish = node.read_own_key() && node.config.mode.has_wan();
            trusted.refresh(&node.degraded);
            metrics.start(&node.degraded);
            if has_more_to_publish || node.retry_identity() {
                let _ = wakeups.try_send(Wakeup::Restart);
                return;
            }
        }
    })?;
    Ok(running)
}
