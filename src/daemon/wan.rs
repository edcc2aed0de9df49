//! Services that find peers on other networks.

use super::node::{Node, PeerRequests};
use super::process::{FatalError, fatal};
use crate::access::Scope;
use crate::peers::announce::{Publication, Trackers};
use crate::peers::tracker::NodeIdentity;
use crate::peers::wan::WanSource;
use crate::publish::Publisher;
use crate::wire::tracker::Identity;
use std::sync::Arc;

/// Services that run only in modes with WAN.
pub(super) struct WanServices {
    pub(super) trackers: Arc<Trackers>,
    /// `None` if nothing is shared with WAN peers.
    pub(super) publisher: Option<Publisher>,
}

impl WanServices {
    /// Starts the threads of the trackers and of the publisher. `None` in mode `lan`, or without an
    /// identity.
    pub(super) fn start<F: Fn() + Clone + Send + 'static>(
        node: &Node,
        on_end: impl Fn(&'static str) -> F,
    ) -> Result<Option<WanServices>, FatalError> {
        let Some(identity) = node.identity.clone().filter(|_| node.config.mode.has_wan()) else {
            return Ok(None);
        };
        let (addr, port) = node.config.announced_address(node.port);
        let instance = Identity::random_seed()
            .map_err(|_| FatalError("the system gives no random numbers".into()))?;
        let instance = u64::from_ne_bytes(instance[..8].try_into().expect("8 bytes")) >> 1;
        let peer_id = node.config.peer_id.clone();
        let me = NodeIdentity { identity, peer_id, port, addr, instance };
        let shares_with_wan = node.access.serves(Scope::Wan);
        let publication =
            Arc::new(if shares_with_wan { Publication::default() } else { Publication::empty() });
        let urls = node.config.tracker_urls.clone();
        let trackers = Trackers::start(urls, me, &publication, &node.networks, on_end("announce"));
        let trackers = Arc::new(trackers.map_err(fatal("announce"))?);
        let publish = || {
            let (store, access) = (node.store.clone(), node.access.clone());
            Publisher::start(store, access, publication, on_end("publish"))
        };
        let publisher = shares_with_wan.then(publish).transpose().map_err(fatal("publish"))?;
        Ok(Some(WanServices { trackers, publisher }))
    }

    /// Returns the source that asks the trackers and their candidates.
    pub(super) fn source(&self, node: &Node, requests: &PeerRequests) -> Arc<WanSource> {
        Arc::new(WanSource::new(
            self.trackers.clone(),
            requests.client.clone(),
            requests.health.clone(),
            node.networks.clone(),
            requests.pool.clone(),
        ))
    }
}
