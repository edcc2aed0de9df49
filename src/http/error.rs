//! Errors of requests. `handler.rs` maps them to HTTP statuses.

use super::route::RouteError;
use crate::store::StoreError;
use std::io;

/// Why a request gets an error response.
pub(super) enum RequestError {
    /// 400, 403, 404 or 405.
    Refused(RouteError),
    /// 403, because a web page may have made the request; the text of the response, and why the
    /// request is suspect if it came from this machine, where it may have been Nix's.
    Suspect(&'static str, Option<String>),
    /// 416, with the representation's size in bytes.
    Unsatisfiable(u64),
    /// Too many long responses at once: 503 for peers, 404 for Nix.
    Busy,
    /// The own store failed: 503 for peers, 404 for Nix.
    Store(StoreError),
    /// The connection failed, or a begun body cannot be completed. The connection is cut.
    Io(io::Error),
}

impl From<StoreError> for RequestError {
    fn from(e: StoreError) -> Self {
        RequestError::Store(e)
    }
}

impl From<io::Error> for RequestError {
    fn from(e: io::Error) -> Self {
        RequestError::Io(e)
    }
}

/// A 404 response.
pub(super) const NOT_THERE: RequestError = RequestError::Refused(RouteError::NotThere);
