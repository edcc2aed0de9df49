//! Holders of a path that wait for their narinfo request.

use crate::lan::Holder;
use crate::peers::health::PeerHealth;
use crate::peers::picker::HealthRank;
use std::net::SocketAddr;
use std::time::Instant;

/// A peer that says that it has the path.
#[derive(Debug, Clone)]
pub(super) struct LanHolder {
    /// Address that identifies the peer in discovery.
    pub(super) peer: SocketAddr,
    pub(super) holder: Holder,
    /// Reliability of the peer when it was found. A holder that is asked again counts as good.
    pub(super) rank: HealthRank,
    /// Number of requests that failed for a temporary reason.
    pub(super) failures: u32,
    /// True if a failure of this holder was recorded.
    pub(super) is_blamed: bool,
}

impl LanHolder {
    /// Address of the peer's HTTP server.
    pub(super) fn http(&self) -> SocketAddr {
        self.holder.http
    }
}

/// Holders that wait for their narinfo request.
#[derive(Default)]
pub(super) struct HolderQueue {
    /// Holders that may be asked, the most reliable first.
    waiting: Vec<LanHolder>,
    /// Holders that are asked again, and when.
    retries: Vec<(Instant, LanHolder)>,
}

impl HolderQueue {
    /// Adds the holder that identifies itself as `peer`, unless it is excluded. Returns true if
    /// nothing is known against it.
    pub(super) fn add(
        &mut self,
        peer: SocketAddr,
        holder: Holder,
        health: &PeerHealth,
        now: Instant,
    ) -> bool {
        let Some(rank) = HealthRank::of(holder.http, health, now) else { return false };
        self.insert(LanHolder { peer, holder, rank, failures: 0, is_blamed: false });
        rank == HealthRank::Good
    }

    /// Adds a holder that may be asked again at once.
    pub(super) fn add_again(&mut self, holder: LanHolder) {
        self.insert(LanHolder { rank: HealthRank::Good, ..holder });
    }

    fn insert(&mut self, holder: LanHolder) {
        let index = self.waiting.partition_point(|other| other.rank <= holder.rank);
        self.waiting.insert(index, holder);
    }

    /// Adds a holder that may be asked again at `due`.
    pub(super) fn add_retry(&mut self, holder: LanHolder, due: Instant) {
        self.retries.push((due, holder));
    }

    /// Time of the next retry.
    pub(super) fn next_retry(&self) -> Option<Instant> {
        self.retries.iter().map(|(due, _)| *due).min()
    }

    /// Drops the holders whose retries are not due yet.
    pub(super) fn clear_retries(&mut self) {
        self.retries.clear();
    }

    /// Adds the retries that are due at `now`, and sorts the good holders by their health.
    pub(super) fn update(&mut self, health: &PeerHealth, now: Instant) {
        let due: Vec<_> = self.retries.extract_if(.., |(due, _)| *due <= now).collect();
        due.into_iter().for_each(|(_, holder)| self.add_again(holder));
        let good = self.waiting.partition_point(|holder| holder.rank == HealthRank::Good);
        health.sort_by_health(&mut self.waiting[..good], LanHolder::http);
    }

    /// Takes the most reliable holder if its rank is `worst` or better.
    pub(super) fn pop(&mut self, worst: HealthRank) -> Option<LanHolder> {
        (self.waiting.first()?.rank <= worst).then(|| self.waiting.remove(0))
    }

    /// Puts back the holder that [`HolderQueue::pop`] returned last.
    pub(super) fn put_back(&mut self, holder: LanHolder) {
        self.waiting.insert(0, holder);
    }

    /// Holders that may be asked, the most reliable first.
    pub(super) fn iter(&self) -> impl Iterator<Item = &LanHolder> {
        self.waiting.iter()
    }
}
