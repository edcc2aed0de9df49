//! Answers of a tracker, and the errors of its calls.

use crate::backoff::retry_after;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::fmt;
use std::time::Duration;
use ureq::http::Response;

/// Largest answer, in bytes; a larger one is malformed. 72 candidates with the longest IDs and
/// names take 30 KiB. The list of 1,000 peers of the original peerix takes 250 KiB.
const MAX_ANSWER_BYTES: u64 = 512 * 1024;

/// Error of a call.
#[derive(Debug)]
pub enum TrackerError {
    /// No connection, no answer in time, or the connection broke.
    Unreachable(ureq::Error),
    /// A status other than 200, the tracker's message, and its `Retry-After`.
    Refused(u16, String, Option<Duration>),
    /// The answer violates its format.
    Malformed,
    /// The tracker's clock is this many milliseconds ahead of this machine's, which is more than
    /// the accepted difference.
    Clock(i64),
}

impl TrackerError {
    /// Returns true if the same call may succeed later: the tracker is unreachable or overloaded.
    pub fn is_temporary(&self) -> bool {
        matches!(self, TrackerError::Unreachable(_) | TrackerError::Refused(429 | 500.., ..))
    }

    /// Time after which the tracker wants the next call, if it sent `Retry-After`.
    pub fn retry_after(&self) -> Option<Duration> {
        if let TrackerError::Refused(_, _, retry_after) = self { *retry_after } else { None }
    }

    /// Returns true if a lookup may try again at once: the tracker restarts, or the connection
    /// broke.
    pub(super) fn is_transient(&self) -> bool {
        self.is_temporary() && !matches!(self, TrackerError::Unreachable(ureq::Error::Timeout(_)))
    }
}

impl fmt::Display for TrackerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TrackerError::Unreachable(e) => write!(f, "{e}"),
            TrackerError::Refused(status, why, _) => write!(f, "status {status} {why}"),
            TrackerError::Malformed => f.write_str("its answer is none of a tracker"),
            TrackerError::Clock(ahead) => {
                let (seconds, direction) = (ahead / 1000, if *ahead > 0 { "slow" } else { "fast" });
                write!(
                    f,
                    "this machine's clock is {} s {direction} by the tracker's; set it",
                    seconds.abs()
                )
            }
        }
    }
}

impl std::error::Error for TrackerError {}

/// Body of an answer with an error status.
#[derive(Deserialize, Default)]
pub(super) struct ServerRefusal {
    pub(super) error: Option<String>,
    /// The tracker's time, in milliseconds since 1970, if it refused a timestamp.
    pub(super) now: Option<u64>,
}

/// Reads and parses a body. Returns `None` if that fails.
pub(super) fn parse_body<T: DeserializeOwned>(response: Response<ureq::Body>) -> Option<T> {
    let bytes =
        response.into_body().into_with_config().limit(MAX_ANSWER_BYTES).read_to_vec().ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// Reads and parses an answer.
///
/// # Errors
/// A status other than 200, or a malformed body.
pub(super) fn parse_answer<T: DeserializeOwned>(
    response: Response<ureq::Body>,
) -> Result<T, TrackerError> {
    match response.status().as_u16() {
        200 => parse_body(response).ok_or(TrackerError::Malformed),
        status => {
            let retry_after = retry_after(response.headers());
            let why = parse_body::<ServerRefusal>(response)
                .and_then(|refusal| refusal.error)
                .unwrap_or_default();
            Err(TrackerError::Refused(status, why, retry_after))
        }
    }
}
