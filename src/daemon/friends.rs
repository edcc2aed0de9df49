//! Services for friends.

use super::node::{Node, PeerRequests};
use crate::friends::{FriendList, tls};
use crate::lock::Mutex;
use crate::peers::friends::Friends;
use crate::peers::rendezvous::{self, OutsideAddress};
use crate::port_mapper::Mapping;
use crate::wire::tracker::Identity;
use rustls::ServerConfig;
use std::io;
use std::sync::Arc;
use std::thread;

/// Connections to and from friends, and the TLS configuration for accepting theirs.
pub(super) struct FriendServices {
    pub(super) friends: Arc<Friends>,
    pub(super) tls: Arc<ServerConfig>,
}

impl FriendServices {
    /// Starts the services for friends. `None` if no friends are configured, or after an error,
    /// which is logged.
    pub(super) fn start(node: &Node, requests: &PeerRequests) -> Option<FriendServices> {
        if !node.config.has_friends() {
            return None;
        }
        if node.config.state_dir.is_none() {
            log::error!(
                "no friends: --friend needs --state-dir, where this node's identity is kept"
            );
        }
        let identity = node.lasting_identity()?.clone();
        Self::try_start(node, identity, requests).map_err(|e| log::error!("no friends: {e}")).ok()
    }

    fn try_start(
        node: &Node,
        identity: Arc<Identity>,
        requests: &PeerRequests,
    ) -> Result<Self, String> {
        let config = &node.config;
        let list =
            FriendList::new(config.friends.clone(), config.friends_file.clone(), identity.key());
        let list = Arc::new(list);
        let tls = tls::server_config(&identity, list.clone()).map_err(|e| format!("TLS: {e}"))?;
        let (networks, pool) = (node.networks.clone(), requests.pool.clone());
        let friends = Friends::start(list, identity, config.store_dir.clone(), networks, pool);
        Ok(FriendServices { friends: friends.map_err(|e| format!("thread: {e}"))?, tls })
    }

    /// Starts the thread that meets friends at trackers. It ends when the friends stop; a running
    /// request is not waited for.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn meet(&self, node: &Node, mapping: Option<Arc<Mutex<Mapping>>>) -> io::Result<()> {
        let (host, port) = node.config.announced_address(node.port);
        let outside_address = move || {
            let current = |mapping: &Arc<Mutex<Mapping>>| mapping.lock().clone();
            let mapping = mapping.as_ref().map(current).unwrap_or_default();
            OutsideAddress {
                host: host.clone(),
                port,
                mapped: mapping.outside,
                pinhole: mapping.pinhole,
            }
        };
        let (urls, friends) = (node.config.tracker_urls.clone(), self.friends.clone());
        thread::Builder::new().name("meet".into()).spawn(move || {
            rendezvous::run(&urls, &friends, outside_address);
        })?;
        Ok(())
    }
}
