//! Which call a request makes.

use super::error::ApiError;
use crate::limits::LimitKind;
use crate::metrics::CountedCall;

/// Maximum length of a request target in bytes. A percent-encoded peer ID of 128 bytes fits. Longer
/// targets get 400.
const MAX_TARGET: usize = 1024;

/// The call that a request makes.
pub(super) enum ApiRoute<'a> {
    Announce,
    Leave,
    Meet,
    Filter(&'a str),
    Lookup(&'a str),
    Peers,
    TransferInit,
    Report,
    Reputation(&'a str),
    Health,
    Metrics,
    Reach(&'a str),
}

impl ApiRoute<'_> {
    /// The call's metrics label and its rate limit.
    pub(super) fn kind(&self) -> (CountedCall, LimitKind) {
        match self {
            ApiRoute::Announce => (CountedCall::Announce, LimitKind::Announce),
            ApiRoute::Leave => (CountedCall::Leave, LimitKind::Announce),
            ApiRoute::Meet => (CountedCall::Meet, LimitKind::Announce),
            ApiRoute::Filter(_) => (CountedCall::Filter, LimitKind::Filter),
            ApiRoute::Lookup(_) => (CountedCall::Lookup, LimitKind::Lookup),
            ApiRoute::Peers => (CountedCall::Peers, LimitKind::List),
            ApiRoute::TransferInit => (CountedCall::TransferInit, LimitKind::Transfer),
            ApiRoute::Report => (CountedCall::Report, LimitKind::Transfer),
            ApiRoute::Reputation(_) => (CountedCall::Reputation, LimitKind::Transfer),
            ApiRoute::Health => (CountedCall::Health, LimitKind::Lookup),
            ApiRoute::Metrics => (CountedCall::Metrics, LimitKind::List),
            ApiRoute::Reach(_) => (CountedCall::Reach, LimitKind::Reach),
        }
    }
}

/// Determines the call of a request.
///
/// # Errors
/// There is no such path, or it does not support the method.
pub(super) fn route<'a>(method: &str, target: &'a str) -> Result<ApiRoute<'a>, ApiError> {
    if target.len() > MAX_TARGET {
        return Err(ApiError::new(400, "target: too long"));
    }
    let path = target.split('?').next().unwrap_or_default();
    let get = matches!(method, "GET" | "HEAD");
    let (route, allow) = match path {
        "/announce" if method == "DELETE" => (Some(ApiRoute::Leave), ""),
        "/announce" => ((method == "POST").then_some(ApiRoute::Announce), "POST, DELETE"),
        "/meet" => ((method == "POST").then_some(ApiRoute::Meet), "POST"),
        "/transfer/init" => ((method == "POST").then_some(ApiRoute::TransferInit), "POST"),
        "/report" => ((method == "POST").then_some(ApiRoute::Report), "POST"),
        "/peers" => (get.then_some(ApiRoute::Peers), "GET, HEAD"),
        "/health" => (get.then_some(ApiRoute::Health), "GET, HEAD"),
        "/metrics" => (get.then_some(ApiRoute::Metrics), "GET, HEAD"),
        _ => match path.strip_prefix('/').and_then(|path| path.split_once('/')) {
            Some(("lookup", rest)) => (get.then_some(ApiRoute::Lookup(rest)), "GET, HEAD"),
            Some(("reputation", rest)) => (get.then_some(ApiRoute::Reputation(rest)), "GET, HEAD"),
            Some(("reach", rest)) => (get.then_some(ApiRoute::Reach(rest)), "GET, HEAD"),
            Some(("filter", rest)) => ((method == "PUT").then_some(ApiRoute::Filter(rest)), "PUT"),
            _ => return Err(ApiError::new(404, "not found")),
        },
    };
    route.ok_or_else(|| ApiError::method_not_allowed(allow))
}
