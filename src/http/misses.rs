//! What a node answers that cannot serve: every path is a miss, so that Nix goes to its next cache, and this machine's
//! people are told why.

use super::Request;
use super::browser;
use super::response::Exchange;
use super::route::{Route, Told, route};
use super::server::Handler;
use super::status::FIELDS;
use crate::config::Config;
use crate::nix::StoreDir;
use crate::share::Scope;
use crate::status;
use crate::status::report::Report;
use std::io;

/// Answers for a node that cannot serve.
pub struct Misses {
    store_dir: StoreDir,
    priority: u32,
    report: Box<dyn Fn() -> Report + Send + Sync>,
    problem: String,
}

impl Misses {
    /// `code` and `problem` say what is wrong, to programs and to people.
    pub fn new(config: &Config, port: u16, code: &'static str, problem: String) -> Misses {
        let (store_dir, priority) = (config.store_dir.clone(), config.priority);
        let (config, text) = (config.clone(), problem.clone());
        let report = Box::new(move || status::of_problem(&config, port, code, &text));
        Misses { store_dir, priority, report, problem }
    }

    /// What is wrong, for the log: with the way out for whoever cannot mend it now.
    pub fn problem(&self) -> String {
        format!("{}; to build without any cache: --option substituters ''", self.problem)
    }

    fn tell(&self, what: Told, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let mut fields = FIELDS.to_vec();
        let (status, kind, body) = match what {
            Told::Page => {
                let page = status::page(&(self.report)());
                fields.push(("Content-Security-Policy", page.policy));
                (200, "text/html; charset=utf-8", page.html.into_bytes())
            }
            Told::Json => (200, "application/json", serde_json::to_vec(&(self.report)()).map_err(io::Error::other)?),
            // No numbers are better than wrong ones.
            Told::Metrics => return exchange.say(404, &self.problem),
            Told::Health => {
                let problems = (self.report)().health.problems;
                let lines = problems.iter().map(|p| format!("{}: {}\n", p.code, status::text::line(&p.text)));
                (503, "text/plain; charset=utf-8", lines.collect::<String>().into_bytes())
            }
        };
        fields.push(("Content-Type", kind));
        exchange.send(status, &fields, &body)
    }
}

impl Handler for Misses {
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let is_this_machine = request.asker.ip().to_canonical().is_loopback();
        let scope = if is_this_machine { Scope::ThisMachine } else { Scope::Wan };
        match route(request.method, request.target, scope, false) {
            Ok(Route::CacheInfo(_)) => {
                let (dir, priority) = (self.store_dir.as_str(), self.priority);
                let text = format!("StoreDir: {dir}\nWantMassQuery: 1\nPriority: {priority}\n");
                exchange.send(200, &[("Content-Type", "text/x-nix-cache-info")], text.as_bytes())
            }
            Ok(Route::Status(what)) if browser::is_suspect(request, true).is_none() => self.tell(what, exchange),
            // Others are not told what is wrong here.
            _ => exchange.say(404, if is_this_machine { "not found: this peerix cannot serve" } else { "not found" }),
        }
    }

    fn after_panic(&self, _request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        exchange.say(404, "not available")
    }
}
