//! Why requests fail, and with which status that is answered.

use crate::db_thread::DatabaseUnavailable;
use crate::reachability::ClientTestRefusal;
use crate::table::ClaimRefusal;
use peerix::http::Exchange;
use peerix::http::body::BodyError;
use serde::Serialize;
use std::io;
use std::time::Duration;

/// `Retry-After` when a table is full or the database is unavailable.
const FULL_RETRY: Duration = Duration::from_secs(60);

/// `Retry-After` of a refused `GET /reach`. A test takes no longer.
const REACH_RETRY: Duration = Duration::from_secs(2);

/// Why a request fails.
#[derive(Debug)]
pub(super) struct ApiError {
    pub(super) status: u16,
    pub(super) error: String,
    /// `Retry-After` in seconds.
    retry_after: Option<u64>,
    /// The tracker's time in milliseconds since 1970, for a node whose clock differs.
    now: Option<u64>,
    /// Methods that the path supports, for 405.
    allow: Option<&'static str>,
    /// Set if the connection broke: no answer is possible.
    pub(super) connection_error: Option<io::Error>,
}

impl ApiError {
    pub(super) fn new(status: u16, error: impl Into<String>) -> Self {
        ApiError {
            status,
            error: error.into(),
            retry_after: None,
            now: None,
            allow: None,
            connection_error: None,
        }
    }

    /// An error that the client may retry after `wait`, rounded up to whole seconds.
    pub(super) fn later(status: u16, error: impl Into<String>, wait: Duration) -> Self {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        ApiError { retry_after: Some(seconds), ..ApiError::new(status, error) }
    }

    /// The path supports only the methods in `allow`.
    pub(super) fn method_not_allowed(allow: &'static str) -> Self {
        ApiError { allow: Some(allow), ..ApiError::new(405, "method not allowed") }
    }

    /// Sends the error as the answer.
    ///
    /// # Errors
    /// The connection fails.
    pub(super) fn send(&self, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let body = serde_json::to_vec(&ErrorBody { error: &self.error, now: self.now })?;
        let retry_after = self.retry_after.map(|seconds| seconds.max(1).to_string());
        let mut fields = vec![("Content-Type", "application/json")];
        fields.extend(retry_after.as_deref().map(|seconds| ("Retry-After", seconds)));
        fields.extend(self.allow.map(|allow| ("Allow", allow)));
        exchange.send(self.status, &fields, &body)
    }
}

impl From<BodyError> for ApiError {
    fn from(e: BodyError) -> Self {
        match e {
            BodyError::TooLarge => ApiError::new(413, "body: too large"),
            BodyError::Io(e) => {
                ApiError { connection_error: Some(e), ..ApiError::new(400, "body: incomplete") }
            }
        }
    }
}

impl From<DatabaseUnavailable> for ApiError {
    fn from(e: DatabaseUnavailable) -> Self {
        ApiError::later(503, e.to_string(), FULL_RETRY)
    }
}

impl From<ClientTestRefusal> for ApiError {
    fn from(refusal: ClientTestRefusal) -> Self {
        match refusal {
            ClientTestRefusal::SameHousehold => ApiError::later(429, "one at a time", REACH_RETRY),
            ClientTestRefusal::TooMany => ApiError::later(503, "too many at once", REACH_RETRY),
        }
    }
}

impl From<ClaimRefusal> for ApiError {
    fn from(refusal: ClaimRefusal) -> Self {
        match refusal {
            ClaimRefusal::Bound => ApiError::new(403, "peer_id: bound to a key, which has to sign"),
            ClaimRefusal::OtherKey => ApiError::new(403, "peer_id: bound to another key"),
            ClaimRefusal::Time { why, now_ms } => {
                ApiError { now: Some(now_ms), ..ApiError::new(403, why) }
            }
            ClaimRefusal::NotHere => ApiError::new(404, "announce first"),
            ClaimRefusal::OtherAddress => {
                ApiError::new(403, "peer_id: announced from another address")
            }
            ClaimRefusal::TooSoon(wait) => {
                ApiError::later(429, "too soon after the last one", wait)
            }
            ClaimRefusal::Full => ApiError::later(503, "no room for more", FULL_RETRY),
        }
    }
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    now: Option<u64>,
}
