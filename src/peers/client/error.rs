//! Error of a request to a peer, and what it says about the peer's health.

use crate::nix::Malformed;
use crate::peers::health::{Fault, PeerHealth, PeerKey};
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::time::Instant;

/// Error of a request to a peer.
#[derive(Debug)]
pub enum PeerError {
    /// No connection, no answer in time, or the connection broke.
    Unreachable(ureq::Error),
    /// Status 404 or 410: the peer does not have the path.
    NotThere,
    /// Status 503: the peer is overloaded. Also returned if this node already holds the largest
    /// permitted number of large narinfos.
    Busy,
    /// Status 307: the peers with these addresses are fetching the NAR from this peer.
    Named(Vec<IpAddr>),
    /// Any other status.
    Status(u16),
    /// The answer violates its format or is unsupported.
    Malformed(Malformed),
}

impl PeerError {
    /// Returns true if the same request may succeed soon: the peer is overloaded or restarts, or
    /// the connection lost packets. A late answer does not count as temporary.
    pub fn is_temporary(&self) -> bool {
        match self {
            PeerError::Unreachable(ureq::Error::Timeout(timeout)) => {
                *timeout == ureq::Timeout::Connect
            }
            PeerError::Unreachable(_) | PeerError::Busy => true,
            _ => false,
        }
    }

    /// The failure that this error means for the peer's health; `None` if the peer is not to blame.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            PeerError::Unreachable(_) => Some(Fault::Unreachable),
            PeerError::Malformed(malformed) if malformed.is_unsupported => Some(Fault::OddPath),
            PeerError::NotThere | PeerError::Status(_) | PeerError::Malformed(_) => {
                Some(Fault::BrokenPromise)
            }
            PeerError::Busy | PeerError::Named(_) => None,
        }
    }

    /// Records that a request to the peer that began at `began` failed, if the peer is to blame.
    pub fn record(&self, health: &PeerHealth, peer: impl Into<PeerKey>, began: Instant) {
        if let Some(fault) = self.fault() {
            health.record_failure(peer, fault, began, Instant::now(), self);
        }
    }
}

impl From<ureq::Error> for PeerError {
    fn from(e: ureq::Error) -> Self {
        PeerError::Unreachable(e)
    }
}

impl From<io::Error> for PeerError {
    fn from(e: io::Error) -> Self {
        PeerError::Unreachable(e.into())
    }
}

impl From<Malformed> for PeerError {
    fn from(e: Malformed) -> Self {
        PeerError::Malformed(e)
    }
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerError::Unreachable(e) => write!(f, "{e}"),
            PeerError::NotThere => f.write_str("said it had the path, and has not"),
            PeerError::Busy => f.write_str("busy"),
            PeerError::Named(_) => f.write_str("named others that are getting it"),
            PeerError::Status(status) => write!(f, "status {status}"),
            PeerError::Malformed(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for PeerError {}
