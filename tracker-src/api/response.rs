//! Bodies of answers with status 200.

use super::error::ApiError;
use crate::reputation::Reputation;
use crate::table::PeerRow;
use peerix::http::Exchange;
use serde::Serialize;
use std::io;
use std::net::IpAddr;

/// The body of a 200 answer.
pub(super) enum ApiResponse {
    Json(Vec<u8>),
    /// Metrics in the text format of Prometheus.
    Metrics(String),
}

impl ApiResponse {
    /// Sends the answer.
    ///
    /// # Errors
    /// The connection fails.
    pub(super) fn send(&self, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let (kind, body) = match self {
            ApiResponse::Json(body) => ("application/json", body.as_slice()),
            ApiResponse::Metrics(body) => {
                ("text/plain; version=0.0.4; charset=utf-8", body.as_bytes())
            }
        };
        exchange.send(200, &[("Content-Type", kind)], body)
    }
}

pub(super) type ApiResult = Result<ApiResponse, ApiError>;

#[derive(Serialize)]
pub(super) struct StatusBody {
    pub(super) status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) consistent: Option<bool>,
}

#[derive(Serialize)]
pub(super) struct ReachBody {
    pub(super) addr: IpAddr,
    pub(super) port: u16,
    pub(super) reached: bool,
}

#[derive(Serialize)]
pub(super) struct ReputationBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_id: Option<&'a str>,
    total_shared: u64,
    total_received: u64,
    successful_transfers: u64,
    failed_transfers: u64,
    score: f64,
}

impl<'a> ReputationBody<'a> {
    pub(super) fn new(peer_id: Option<&'a str>, of: &Reputation) -> Self {
        ReputationBody {
            peer_id,
            total_shared: of.shared,
            total_received: of.received,
            successful_transfers: of.successful,
            failed_transfers: of.failed,
            score: of.rounded_score(),
        }
    }
}

#[derive(Serialize)]
struct PeerBody<'a> {
    peer_id: &'a str,
    addr: &'a str,
    port: u16,
    last_seen: f64,
    reputation: ReputationBody<'a>,
}

#[derive(Serialize)]
pub(super) struct PeersBody<'a> {
    peers: Vec<PeerBody<'a>>,
}

impl<'a> PeersBody<'a> {
    pub(super) fn new(rows: &'a [PeerRow]) -> Self {
        let body = |row: &'a PeerRow| PeerBody {
            peer_id: &row.peer_id,
            addr: &row.address.addr,
            port: row.address.port,
            last_seen: row.last_seen_ms as f64 / 1000.0,
            reputation: ReputationBody::new(None, &row.reputation),
        };
        PeersBody { peers: rows.iter().map(body).collect() }
    }
}

pub(super) fn json(body: &impl Serialize) -> ApiResult {
    let bytes = serde_json::to_vec(body).map_err(|e| ApiError::new(500, format!("answer: {e}")))?;
    Ok(ApiResponse::Json(bytes))
}

pub(super) fn status(status: &'static str) -> ApiResult {
    json(&StatusBody { status, consistent: None })
}
