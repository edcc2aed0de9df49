//! The handler of a node that cannot serve. It answers every path as a miss, so that Nix tries its
//! next cache, and tells users of this machine the reason.

use super::Request;
use super::binary_cache::CacheInfo;
use super::origin;
use super::response::Exchange;
use super::route::{Route, StatusRoute, route};
use super::server::Handler;
use super::status::{send_health, send_json, send_page};
use crate::access::Scope;
use crate::config::Config;
use crate::status;
use crate::status::report::StatusReport;
use std::io;

/// Handler of a node that cannot serve.
pub struct MissHandler {
    info: CacheInfo,
    report: Box<dyn Fn() -> StatusReport + Send + Sync>,
    problem: String,
}

impl MissHandler {
    /// Creates a handler. `code` identifies the problem for programs, `problem` describes it for
    /// people.
    pub fn new(config: &Config, port: u16, code: &'static str, problem: String) -> MissHandler {
        let info = CacheInfo::new(config);
        let (config, text) = (config.clone(), problem.clone());
        let report = Box::new(move || status::of_problem(&config, port, code, &text));
        MissHandler { info, report, problem }
    }

    /// Description of the problem for the log, with a workaround.
    pub fn problem(&self) -> String {
        format!("{}; to build without any cache: --option substituters ''", self.problem)
    }

    fn send_status(&self, route: StatusRoute, exchange: &mut Exchange<'_>) -> io::Result<()> {
        match route {
            StatusRoute::Page => send_page(&(self.report)(), exchange),
            StatusRoute::Json => send_json(&(self.report)(), exchange),
            // No metrics, because their values would be wrong.
            StatusRoute::Metrics => exchange.say(404, &self.problem),
            StatusRoute::Health => {
                let problems = (self.report)().health.problems;
                let lines = problems
                    .iter()
                    .map(|p| format!("{}: {}\n", p.code, status::text::line(&p.text)));
                send_health(false, &lines.collect::<String>(), exchange)
            }
        }
    }
}

impl Handler for MissHandler {
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let is_this_machine = request.peer_address.ip().to_canonical().is_loopback();
        let scope = if is_this_machine { Scope::ThisMachine } else { Scope::Wan };
        match route(request.method, request.target, scope, false) {
            Ok(Route::CacheInfo(_)) => self.info.send(exchange),
            Ok(Route::Status(what)) if origin::suspicion(request, true).is_none() => {
                self.send_status(what, exchange)
            }
            // Other machines do not learn the problem.
            _ => exchange.say(
                404,
                if is_this_machine { "not found: this peerix cannot serve" } else { "not found" },
            ),
        }
    }

    fn after_panic(&self, _request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        exchange.say(404, "not available")
    }
}
