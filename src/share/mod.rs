//! What leaves this machine, and to whom. Every answer to somebody else, over HTTP or UDP, asks here first.

use crate::config::Mode;
use crate::interfaces::{self, Interfaces};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

/// Who asks, by the address of the socket and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// A loopback address: this machine's Nix and its users.
    ThisMachine,
    /// A neighbour in a directly connected private network, or a node named by `--peer`.
    Lan,
    /// Anybody else.
    Wan,
}

/// Tells scopes apart.
pub struct Share {
    interfaces: Arc<Interfaces>,
    named_peers: std::sync::RwLock<Vec<IpAddr>>,
    mode: Mode,
}

impl Share {
    /// With the mode the user chose.
    pub fn new(interfaces: Arc<Interfaces>, mode: Mode) -> Self {
        Share { interfaces, named_peers: Default::default(), mode }
    }

    /// The addresses that `--peer` names now: who names a node shares with it as with a neighbour.
    pub fn set_named_peers(&self, addresses: Vec<IpAddr>) {
        *self.named_peers.write().unwrap_or_else(|e| e.into_inner()) = addresses;
    }

    /// The scope of an asker. A private address that the interface table does not know makes the table be read
    /// again: a laptop's new neighbours should not wait for the next regular look.
    pub fn scope(&self, asker: IpAddr) -> Scope {
        let asker = asker.to_canonical();
        if asker.is_loopback() {
            return Scope::ThisMachine;
        }
        let is_lan = || {
            self.interfaces.is_neighbour(asker)
                || self.named_peers.read().unwrap_or_else(|e| e.into_inner()).contains(&asker)
        };
        if is_lan() {
            return Scope::Lan;
        }
        // At most once a second, however many strangers ask.
        let stale = std::time::Duration::from_secs(1);
        if interfaces::is_private(asker) {
            self.interfaces.refresh(Instant::now(), stale);
            if is_lan() {
                return Scope::Lan;
            }
        }
        Scope::Wan
    }

    /// Whether an asker of that scope may have any valid path at all. On the LAN that is every one.
    pub fn serves(&self, scope: Scope) -> bool {
        match scope {
            Scope::ThisMachine => true,
            Scope::Lan => self.mode.has_lan(),
            Scope::Wan => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interfaces::Interface;

    fn share(mode: Mode) -> Share {
        let eth0 = Interface {
            name: "eth0".into(),
            index: 2,
            address: "192.168.10.5".parse().unwrap(),
            prefix_len: 24,
            broadcast: None,
            running: true,
        };
        // Read in the future, so that no stranger's address makes the test read the real machine's interfaces.
        let later = Instant::now() + std::time::Duration::from_secs(3600);
        Share::new(Arc::new(Interfaces::fixed(vec![eth0], later)), mode)
    }

    #[test]
    fn scope_is_decided_by_address() {
        let share = share(Mode::Lan);
        share.set_named_peers(vec!["10.9.8.7".parse().unwrap()]);
        for (ip, scope) in [
            ("127.0.0.1", Scope::ThisMachine),
            ("127.8.8.8", Scope::ThisMachine),
            ("::1", Scope::ThisMachine),
            ("::ffff:127.0.0.1", Scope::ThisMachine),
            ("192.168.10.77", Scope::Lan),
            ("::ffff:192.168.10.77", Scope::Lan),
            ("10.9.8.7", Scope::Lan),
            ("192.168.11.1", Scope::Wan),
            ("10.9.8.8", Scope::Wan),
            ("8.8.8.8", Scope::Wan),
            ("2001:db8::1", Scope::Wan),
        ] {
            assert_eq!(share.scope(ip.parse().unwrap()), scope, "{ip}");
        }
    }

    #[test]
    fn who_is_served_in_which_mode() {
        for (mode, lan) in [(Mode::Lan, true), (Mode::Both, true), (Mode::Wan, false)] {
            let share = share(mode);
            assert!(share.serves(Scope::ThisMachine));
            assert_eq!(share.serves(Scope::Lan), lan, "{mode:?}");
            assert!(!share.serves(Scope::Wan));
        }
    }
}
