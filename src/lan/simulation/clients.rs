//! Nix's side of the simulation: lookups, requests of narinfos, and their outcomes.

use super::super::discovery::Event;
use super::super::lookups::{LookupId, LookupRequest, LookupUpdate};
use super::{Act, Active, Host, Kind, MS, Outcome, Simulation, US, Workload};
use crate::nix::HashPart;
use crossbeam_channel::{TryRecvError, bounded};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

impl Simulation {
    /// Looks up `paths` over `connections` connections from `start` on.
    pub(super) fn ask(
        &mut self,
        node: usize,
        paths: Vec<HashPart>,
        connections: u32,
        start: Duration,
        repeats: bool,
    ) {
        self.clients.workloads.insert(node, Workload { paths, next: 0, repeats });
        for connection in 0..connections {
            let jitter = self.random.between(Duration::ZERO, MS);
            self.at(start + jitter, Act::Begin { node, connection });
        }
    }

    pub(super) fn begin(&mut self, node: usize, connection: u32) {
        let Some(work) = self.clients.workloads.get_mut(&node) else { return };
        if work.next >= work.paths.len() && work.repeats {
            work.next = 0;
        }
        let Some(path) = work.paths.get(work.next).copied() else { return };
        work.next += 1;
        let id = self.clients.next_lookup;
        self.clients.next_lookup += 1;
        let (updates, receiver) = bounded(LookupRequest::CAPACITY);
        let active = Active {
            path,
            began: self.now,
            updates: receiver,
            waiting: VecDeque::new(),
            requests: 0,
            connection,
        };
        self.hosts[node].active.insert(id, active);
        self.event(node, Event::LookUp(LookupRequest { id, hash_part: path, updates }));
    }

    /// Handles the updates of all lookups of a node.
    pub(super) fn collect(&mut self, node: usize) {
        let ids: Vec<LookupId> = self.hosts[node].active.keys().copied().collect();
        for id in ids {
            while let Some(active) = self.hosts[node].active.get_mut(&id) {
                match active.updates.try_recv() {
                    Ok(LookupUpdate::Holder { peer, .. }) => {
                        active.waiting.push_back(peer);
                        if active.requests == 0 {
                            self.hedge(node, id);
                        }
                    }
                    Ok(LookupUpdate::Ended { .. }) | Err(TryRecvError::Disconnected) => {
                        self.end(node, id, false)
                    }
                    Err(TryRecvError::Empty) => break,
                }
            }
        }
    }

    /// Requests the narinfo from the next holder, and from another one after 100 ms.
    pub(super) fn hedge(&mut self, node: usize, lookup: LookupId) {
        let Some(active) = self.hosts[node].active.get_mut(&lookup) else { return };
        let Some(peer) = active.waiting.pop_front() else { return };
        active.requests += 1;
        let Some(holder) = self.host_at(peer.ip()) else { return };
        let (low, high) = self.hosts[holder].link.latency.max(self.hosts[node].link.latency);
        // Time of connection, request and answer. TCP repeats a lost segment after 200 ms.
        let lost = if self.network.loss > 0.0 && self.random.chance(self.network.loss * 2.0) {
            200 * MS
        } else {
            Duration::ZERO
        };
        let time = 300 * US + self.random.between(low, high) * 2 + lost;
        self.at(self.now + time, Act::Narinfo { node, lookup, peer, holder });
        self.at(self.now + 100 * MS, Act::Hedge { node, lookup });
    }

    pub(super) fn narinfo(
        &mut self,
        node: usize,
        lookup: LookupId,
        peer: SocketAddr,
        holder: usize,
    ) {
        let Some(active) = self.hosts[node].active.get(&lookup) else { return };
        let (path, host) = (active.path, &self.hosts[holder]);
        let until = host.paused_until.unwrap_or_default().max(host.link.unplugged_until);
        let until = until.max(self.hosts[node].link.unplugged_until);
        if until > self.now || !host.is_up {
            // The answer comes once both hosts are reachable. TCP, or the next request, needs up to
            // 200 ms more.
            let again = until.max(self.now) + self.random.between(MS, 200 * MS);
            return self.at(again, Act::Narinfo { node, lookup, peer, holder });
        }
        if host.held.lock().contains(&path) {
            self.end(node, lookup, true);
            self.event(node, Event::Settled { lookup, found: Some(peer) });
        } else {
            self.failed(node, lookup, peer);
        }
    }

    fn failed(&mut self, node: usize, lookup: LookupId, peer: SocketAddr) {
        if let Some(active) = self.hosts[node].active.get_mut(&lookup) {
            active.requests = 0;
        }
        self.event(node, Event::Failed { lookup, peer });
        self.hedge(node, lookup);
    }

    fn end(&mut self, node: usize, lookup: LookupId, found: bool) {
        let Some(active) = self.hosts[node].active.remove(&lookup) else { return };
        let elapsed = self.now - active.began;
        self.clients.outcomes.push(Outcome {
            path: active.path,
            node,
            began: active.began,
            elapsed,
            found,
        });
        self.at(self.now + self.clients.think, Act::Begin { node, connection: active.connection });
    }

    /// The misses of paths that a live host has.
    pub(super) fn wrong_misses(&self) -> Vec<&Outcome> {
        let is_live =
            |host: &Host| host.is_up && !matches!(host.kind, Kind::Firewalled | Kind::Forged);
        let is_wrong = |outcome: &&Outcome| {
            let mut others =
                self.hosts.iter().enumerate().filter(|(index, _)| *index != outcome.node);
            !outcome.found
                && others.any(|(_, host)| is_live(host) && host.held.lock().contains(&outcome.path))
        };
        self.clients.outcomes.iter().filter(is_wrong).collect()
    }

    pub(super) fn slowest(&self) -> Duration {
        self.clients.outcomes.iter().map(|outcome| outcome.elapsed).max().unwrap_or_default()
    }

    pub(super) fn longer_than(&self, time: Duration) -> usize {
        self.clients.outcomes.iter().filter(|outcome| outcome.elapsed > time).count()
    }
}
