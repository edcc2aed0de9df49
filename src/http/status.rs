//! Responses with this node's status, for its own machine and for the clients of `--metrics`.

use super::response::Exchange;
use super::route::StatusRoute;
use crate::status::report::StatusReport;
use crate::status::{self, StatusService};
use std::io;

/// Header fields of every status response. They forbid caching, and keep pages of other origins
/// from reading it.
const FIELDS: [(&str, &str); 4] = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
];

/// Sends the status of a node that serves. Texts about problems are for this machine only.
pub(super) fn send_status(
    service: &StatusService,
    route: StatusRoute,
    is_this_machine: bool,
    exchange: &mut Exchange<'_>,
) -> io::Result<()> {
    match route {
        StatusRoute::Page => send_page(&service.report(), exchange),
        StatusRoute::Json => send_json(&service.report(), exchange),
        StatusRoute::Metrics => {
            let content_type = "text/plain; version=0.0.4; charset=utf-8";
            send(200, content_type, service.metrics().as_bytes(), exchange)
        }
        StatusRoute::Health => {
            let (is_well, text) = service.health_text(is_this_machine);
            send_health(is_well, &text, exchange)
        }
    }
}

/// Sends the status page.
pub(super) fn send_page(report: &StatusReport, exchange: &mut Exchange<'_>) -> io::Result<()> {
    let page = status::page(report);
    let mut fields = FIELDS.to_vec();
    fields.push(("Content-Security-Policy", page.policy));
    fields.push(("Content-Type", "text/html; charset=utf-8"));
    exchange.send(200, &fields, page.html.as_bytes())
}

/// Sends the data of the status page.
pub(super) fn send_json(report: &StatusReport, exchange: &mut Exchange<'_>) -> io::Result<()> {
    let json = serde_json::to_vec(report).map_err(io::Error::other)?;
    send(200, "application/json", &json, exchange)
}

/// Sends whether the node works, with the lines of `text`.
pub(super) fn send_health(
    is_well: bool,
    text: &str,
    exchange: &mut Exchange<'_>,
) -> io::Result<()> {
    let status = if is_well { 200 } else { 503 };
    send(status, "text/plain; charset=utf-8", text.as_bytes(), exchange)
}

fn send(
    status: u16,
    content_type: &'static str,
    body: &[u8],
    exchange: &mut Exchange<'_>,
) -> io::Result<()> {
    let mut fields = FIELDS.to_vec();
    fields.push(("Content-Type", content_type));
    exchange.send(status, &fields, body)
}
