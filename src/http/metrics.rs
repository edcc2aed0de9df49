//! The handler of `--metrics`: serves `/metrics` and `/health`, and nothing else, to every client
//! that reaches the address that the user chose.

use super::handler::CacheHandler;
use super::response::Exchange;
use super::route::StatusRoute;
use super::server::Handler;
use super::{Request, status};
use std::io;
use std::sync::Arc;

/// Serves `/metrics` and `/health` to monitoring systems on other machines.
pub struct MetricsHandler(pub Arc<CacheHandler>);

impl Handler for MetricsHandler {
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let route = match request.target.split('?').next() {
            _ if !matches!(request.method, "GET" | "HEAD") => {
                return exchange.say(405, "only GET and HEAD");
            }
            Some("/metrics") => StatusRoute::Metrics,
            Some("/health") => StatusRoute::Health,
            _ => return exchange.say(404, "not found; there is /metrics and /health"),
        };
        status::send_status(&self.0.status, route, false, exchange)
    }

    fn after_panic(&self, _request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        exchange.say(500, "not available")
    }
}
