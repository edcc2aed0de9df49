//! The HTTP server of `--metrics`.

use crate::degraded::Degraded;
use crate::http::handler::CacheHandler;
use crate::http::metrics::MetricsHandler;
use crate::http::server::Server;
use crate::lock::Mutex;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;

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
    pub(super) fn start(&self, degraded: &Degraded) {
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
