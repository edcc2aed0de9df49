//! Responses with this node's status, for its own machine and for the clients of `--metrics`.

use super::error::RequestError;
use super::response::Exchange;
use super::route::StatusRoute;
use crate::status::{self, StatusService};

/// Header fields of every status response. They forbid caching, and keep pages of other origins
/// from reading it.
pub(super) const FIELDS: [(&str, &str); 4] = [
    ("Cache-Control", "no-store"),
    ("X-Content-Type-Options", "nosniff"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
];

pub(super) fn send_status(
    service: &StatusService,
    route: StatusRoute,
    is_this_machine: bool,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    let mut fields = FIELDS.to_vec();
    let mut send = |status, kind, body: &[u8]| {
        fields.push(("Content-Type", kind));
        Ok(exchange.send(status, &fields, body)?)
    };
    match route {
        StatusRoute::Page => {
            let page = status::page(&service.report());
            fields.push(("Content-Security-Policy", page.policy));
            fields.push(("Content-Type", "text/html; charset=utf-8"));
            Ok(exchange.send(200, &fields, page.html.as_bytes())?)
        }
        StatusRoute::Json => {
            let json = serde_json::to_vec(&service.report()).map_err(std::io::Error::other)?;
            send(200, "application/json", &json)
        }
        StatusRoute::Metrics => {
            send(200, "text/plain; version=0.0.4; charset=utf-8", service.metrics().as_bytes())
        }
        StatusRoute::Health => {
            let (is_well, text) = service.health_text(is_this_machine);
            send(if is_well { 200 } else { 503 }, "text/plain; charset=utf-8", text.as_bytes())
        }
    }
}
