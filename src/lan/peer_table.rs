//! Table of the peers on the LAN. No I/O. `now` is real time, `t` is lookup time (see [`super`]).

use super::lookups::LookupId;
use super::peer::{LanPeer, MetBy};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Maximum number of peers in the table, more than the 1,022 hosts of a /22 network. At the bound a
/// newcomer replaces a peer through which no path was found, first one that is silent or never
/// answered. So forged addresses cost no more memory.
const MAX_PEERS: usize = 1024;

/// All peers by the address that their datagrams come from.
#[derive(Default)]
pub struct PeerTable {
    peers: BTreeMap<SocketAddr, LanPeer>,
    /// The peers that were changed since the last [`PeerTable::plan`], which is called in each
    /// turn. So their number is bounded by the events of a turn.
    changed: Vec<SocketAddr>,
    /// No peer's [`LanPeer::next_probe`] is earlier, so the peers need not be searched before.
    pub next_probe: Option<Instant>,
    /// No peer's [`LanPeer::repeat_at`] is earlier, in lookup time.
    pub next_repeat: Option<Instant>,
    /// No answer becomes overdue, no wait after a *bye* ends, and no wait budget is used up before
    /// this lookup time.
    pub next_check: Option<Instant>,
}

impl PeerTable {
    /// The peer at this address.
    pub fn get(&self, address: SocketAddr) -> Option<&LanPeer> {
        self.peers.get(&address)
    }

    /// Returns the peer at this address for changes. The next [`PeerTable::plan`] takes its due
    /// times into account.
    pub fn get_mut(&mut self, address: SocketAddr) -> Option<&mut LanPeer> {
        let peer = self.peers.get_mut(&address)?;
        if self.changed.last() != Some(&address) {
            self.changed.push(address);
        }
        Some(peer)
    }

    /// Lowers [`PeerTable::next_probe`], [`PeerTable::next_repeat`] and [`PeerTable::next_check`]
    /// to the earliest times of the peers that were changed. To be called before these are used.
    pub fn plan(&mut self) {
        let earlier = |a: Option<Instant>, b: Option<Instant>| a.into_iter().chain(b).min();
        for address in self.changed.drain(..) {
            let Some(peer) = self.peers.get(&address) else { continue };
            self.next_probe = earlier(self.next_probe, peer.next_probe());
            self.next_repeat = earlier(self.next_repeat, peer.repeat_at());
            // The median is not known here. A median of zero gives the earliest due time.
            let due = peer.due_after(Some(Duration::ZERO));
            let overdue = peer.oldest_owed().map(|since| since + due);
            self.next_check = earlier(self.next_check, earlier(overdue, peer.liveness.leaves_at()));
        }
    }

    /// Returns the peers to probe at `now`: first those that `--peer` names, then those through
    /// which paths were found.
    pub fn due_probes(&mut self, now: Instant) -> Vec<SocketAddr> {
        if self.next_probe.is_none_or(|at| at > now) {
            return Vec::new();
        }
        let planned = self.iter().filter_map(|(address, peer)| {
            Some((!peer.is_named, peer.hits.is_none(), peer.next_probe()?, address))
        });
        let (mut due, later): (Vec<_>, Vec<_>) = planned.partition(|(_, _, at, _)| *at <= now);
        self.next_probe = later.iter().map(|(_, _, at, _)| *at).min();
        due.sort();
        let due: Vec<SocketAddr> = due.into_iter().map(|(_, _, _, address)| address).collect();
        // Those that are not probed now are still due.
        self.changed.extend(&due);
        due
    }

    /// Makes the next probe of each silent peer due, because the network has changed.
    pub fn restart_probes(&mut self, now: Instant) {
        self.peers.values_mut().for_each(|peer| peer.liveness.restart_probes(now));
        self.next_probe = Some(now);
    }

    /// Returns the peers that are asked again at lookup time `t`, each with the lookups.
    pub fn due_repeats(&mut self, t: Instant) -> Vec<(SocketAddr, Vec<LookupId>)> {
        if self.next_repeat.is_none_or(|at| at > t) {
            return Vec::new();
        }
        let repeats = self.iter_mut().map(|(address, peer)| (address, peer.due_repeats(t)));
        let repeats = repeats.filter(|(_, lookups)| !lookups.is_empty()).collect();
        self.next_repeat = self.peers.values().filter_map(LanPeer::repeat_at).min();
        repeats
    }

    /// All peers by address, for changes that make nothing due earlier.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (SocketAddr, &mut LanPeer)> {
        self.peers.iter_mut().map(|(address, peer)| (*address, peer))
    }

    /// All peers by address.
    pub fn iter(&self) -> impl Iterator<Item = (SocketAddr, &LanPeer)> {
        self.peers.iter().map(|(address, peer)| (*address, peer))
    }

    /// Addresses of the live peers.
    pub fn live(&self) -> impl Iterator<Item = SocketAddr> {
        self.iter().filter(|(_, peer)| peer.is_live()).map(|(address, _)| address)
    }

    /// Records a packet from `address`. Returns the peer, and whether this is its first packet.
    /// Returns `None` if the table is full of peers that must stay.
    pub fn record_heard(
        &mut self,
        address: SocketAddr,
        met_by: MetBy,
        now: Instant,
    ) -> Option<(&mut LanPeer, bool)> {
        let is_full = self.peers.len() >= MAX_PEERS && !self.peers.contains_key(&address);
        if is_full && !self.evict() {
            return None;
        }
        self.peers.entry(address).or_insert_with(|| LanPeer::new(met_by));
        let peer = self.get_mut(address)?;
        let is_first = peer.record_heard(now);
        Some((peer, is_first))
    }

    /// Replaces the addresses that `--peer` names. Returns those that were no peers before.
    pub fn set_named(&mut self, named: &[SocketAddr]) -> Vec<SocketAddr> {
        for (address, peer) in &mut self.peers {
            peer.is_named = named.contains(address);
        }
        let mut added = Vec::new();
        for address in named {
            self.peers.entry(*address).or_insert_with(|| {
                added.push(*address);
                LanPeer::new(MetBy::Named)
            });
        }
        added
    }

    /// Usual answer time of the median peer. `None` while no peer has been measured.
    pub fn median_usual(&self) -> Option<Duration> {
        let mut usual: Vec<Duration> =
            self.peers.values().filter_map(|peer| peer.queries.round_trip.usual()).collect();
        let middle = usual.len() / 2;
        (!usual.is_empty()).then(|| *usual.select_nth_unstable(middle).1)
    }

    /// Removes the peers that need not be remembered. Returns those that become silent because
    /// nothing came from them.
    pub fn forget_old(&mut self, now: Instant) -> Vec<SocketAddr> {
        self.peers.retain(|_, peer| peer.is_remembered(now));
        let unheard = self.iter().filter(|(_, peer)| peer.is_unheard(now));
        unheard.map(|(address, _)| address).collect()
    }

    /// Removes the peer heard longest ago among those through which no path was found and that owe
    /// nothing, first a silent one or one that never answered. Returns false if there is none.
    fn evict(&mut self) -> bool {
        let is_candidate =
            |peer: &LanPeer| peer.hits.is_none() && !peer.is_named && peer.oldest_owed().is_none();
        let candidates = self.iter().filter(|(_, peer)| is_candidate(peer));
        let idlest = candidates.min_by_key(|(_, peer)| (peer.is_proven(), peer.heard()));
        let Some((address, _)) = idlest else { return false };
        self.peers.remove(&address).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl PeerTable {
        /// Panics if the table or the state of a peer is larger than its bound.
        pub fn assert_bounds(&self) {
            assert!(self.peers.len() <= MAX_PEERS);
            self.peers.values().for_each(LanPeer::assert_bounds);
        }
    }
}
