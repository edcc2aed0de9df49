//! Lookup of a path in discovery that settles itself when it is dropped.

use crate::lan::{DiscoveryClient, LookupId, LookupUpdate};
use crate::nix::HashPart;
use crossbeam_channel::Receiver;
use std::net::SocketAddr;
use std::sync::Arc;

/// Lookup of a path in discovery. While it is open, discovery waits for the requests to the holders
/// that it named, and must learn their outcome. Dropping the lookup settles it.
pub(super) struct DiscoveryLookup {
    discovery: Arc<DiscoveryClient>,
    id: LookupId,
    /// Holders that discovery finds; `None` when no further holder will come.
    pub(super) updates: Option<Receiver<LookupUpdate>>,
    is_open: bool,
    /// Number of peers that discovery asked, and number of those that did not answer. `None` while
    /// the lookup runs, or if there were too many lookups.
    pub(super) counts: Option<(u32, u32)>,
}

impl DiscoveryLookup {
    /// Starts a lookup. Does not block.
    pub(super) fn start(discovery: &Arc<DiscoveryClient>, hash_part: &HashPart) -> Self {
        let (id, updates) = discovery.look_up(*hash_part);
        let discovery = discovery.clone();
        DiscoveryLookup { discovery, id, updates: Some(updates), is_open: true, counts: None }
    }

    /// Returns true while discovery waits for the outcome of requests.
    pub(super) fn is_open(&self) -> bool {
        self.is_open
    }

    /// Tells discovery to stop waiting, because the narinfo of `holder`, or of a peer elsewhere, was
    /// accepted. Returns false and does nothing if the lookup is not open.
    pub(super) fn settle(&mut self, holder: Option<SocketAddr>) -> bool {
        let was_open = std::mem::replace(&mut self.is_open, false);
        if was_open {
            self.discovery.settle(self.id, holder);
        }
        was_open
    }

    /// Records that discovery stopped waiting and names no further holder. Returns true if the
    /// lookup was open.
    pub(super) fn end(&mut self) -> bool {
        self.updates = None;
        std::mem::replace(&mut self.is_open, false)
    }

    /// Tells discovery that the lookup no longer waits for the narinfo of `holder`.
    pub(super) fn report_failed(&self, holder: SocketAddr) {
        if self.is_open {
            self.discovery.report_failed(self.id, holder);
        }
    }
}

impl Drop for DiscoveryLookup {
    fn drop(&mut self) {
        self.settle(None);
    }
}
