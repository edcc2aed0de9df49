//! The peers that have one NAR, and which of them is asked next.

use super::Downloader;
use crate::lookup::{FoundNar, HolderSearch, NarSource};
use crate::peers::health::PeerKey;
use crate::peers::pace::PeerLoad;
use crate::peers::picker::{self, HealthRank, HolderFacts};
use std::thread;
use std::time::{Duration, Instant};

/// Pause before a busy peer (503), or one that broke off, is asked again. Only if no other is left.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of 503 answers to one NAR's requests after which the peer is asked again. Beyond,
/// Nix is better served by its next substituter.
const MAX_BUSY: u32 = 10;
/// Maximum number of broken streams in a row after which the same peer is asked again. Each piece
/// that arrives resets the count.
const MAX_BROKEN: u32 = 1;
/// Maximum number of searches for further holders of one NAR. At the bound, none follows.
const MAX_SEARCHES: u32 = 3;
/// Maximum number of moves of one NAR to a faster peer. At the bound, it stays with its peer.
const MAX_MOVES: u32 = 3;

/// Maximum duration of a search without a deadline.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(60);

/// Expected transfer time from which on the LAN is asked again for further holders.
const MIN_TIME_TO_ASK: Duration = Duration::from_millis(50);
/// Minimum interval between two such queries for one NAR.
const HOLDER_QUERY_INTERVAL: Duration = Duration::from_secs(10);
/// Maximum wait for the answers to such a query.
const HOLDER_QUERY_TIMEOUT: Duration = Duration::from_millis(20);

/// The peers from which one NAR may be requested.
pub(super) struct Sources<'a> {
    downloader: &'a Downloader,
    /// The NAR, and the known holders that are neither in use nor given up.
    pub(super) found: FoundNar,
    search: Option<HolderSearch>,
    searches: u32,
    /// The last peer that was busy or broke off, to be asked again if no other is left.
    retry: Option<NarSource>,
    /// How often a peer that is busy, or that breaks off, may still be asked again.
    busy_left: u32,
    broken_left: u32,
    moves_left: u32,
    /// The faster peer for which the last one was left.
    faster_peer: Option<PeerKey>,
    /// When the LAN was last asked for further holders.
    last_holder_query: Option<Instant>,
}

impl<'a> Sources<'a> {
    pub(super) fn new(downloader: &'a Downloader, found: FoundNar) -> Self {
        Sources {
            downloader,
            found,
            search: None,
            searches: 0,
            retry: None,
            busy_left: MAX_BUSY,
            broken_left: MAX_BROKEN,
            moves_left: MAX_MOVES,
            faster_peer: None,
            last_holder_query: None,
        }
    }

    /// Adds a holder, or puts back one that is no longer in use.
    pub(super) fn add(&mut self, source: NarSource) {
        self.found.sources.push(source);
    }

    /// Remembers a busy peer, to ask it again if no other is left.
    pub(super) fn retry_busy(&mut self, source: NarSource) {
        if let Some(left) = self.busy_left.checked_sub(1) {
            (self.busy_left, self.retry) = (left, Some(source));
        }
    }

    /// Remembers a peer that broke off, to ask it again if no other is left.
    pub(super) fn retry_broken(&mut self, source: NarSource) {
        if let Some(left) = self.broken_left.checked_sub(1) {
            (self.broken_left, self.retry) = (left, Some(source));
        }
    }

    /// Resets the count of broken streams, because a piece arrived.
    pub(super) fn reset_broken(&mut self) {
        self.broken_left = MAX_BROKEN;
    }

    /// Whether there may be another peer than those asked so far.
    pub(super) fn may_have_another(&self) -> bool {
        !self.found.sources.is_empty() || self.downloader.lookup.has_trackers()
    }

    /// Removes the best source for `rest` bytes, and returns it with the reason for the choice.
    /// Blocks until `deadline` at most, or for about a minute without one.
    pub(super) fn next(
        &mut self,
        rest: u64,
        deadline: Option<Instant>,
    ) -> Option<(NarSource, String)> {
        // The pace of the peer that was left is smoothed, so it may still look best.
        let faster_peer = self.faster_peer.take();
        let sources = &mut self.found.sources;
        if let Some(index) =
            sources.iter().position(|source| Some(source.peer_key()) == faster_peer)
        {
            return Some((sources.swap_remove(index), "twice as fast as the last one".into()));
        }
        if let Some(best) = self.best(rest, deadline) {
            return Some(best);
        }
        if let Some(source) = self.next_searched(deadline) {
            return Some((source, "the only one found by another search".into()));
        }
        let source = self.retry.take()?;
        thread::sleep(RETRY_DELAY.min(time_left(deadline, Instant::now())));
        Some((source, "asked again, as there is no other".into()))
    }

    fn best(&mut self, bytes: u64, deadline: Option<Instant>) -> Option<(NarSource, String)> {
        let (_, holders) = self.holders(Instant::now());
        let choice = picker::choose(&holders, bytes)?;
        self.find_holders(choice.expected.as_secs_f64(), None, deadline);
        let (indices, holders) = self.holders(Instant::now());
        let choice = picker::choose(&holders, bytes)?;
        let why = format!("best of {}: {}", holders.len(), holders[choice.index].load);
        Some((self.found.sources.swap_remove(indices[choice.index]), why))
    }

    /// Returns a further source from a search that checks narinfos.
    fn next_searched(&mut self, deadline: Option<Instant>) -> Option<NarSource> {
        let deadline = deadline.unwrap_or_else(|| Instant::now() + SEARCH_TIMEOUT);
        let lookup = &self.downloader.lookup;
        loop {
            if let Some(search) = &mut self.search
                && let Some(source) = lookup.next_source(search, &self.found, deadline)
            {
                // The next source is wanted only if this one fails.
                search.suspend();
                return Some(source);
            }
            if self.searches >= MAX_SEARCHES || Instant::now() >= deadline {
                return None;
            }
            self.searches += 1;
            self.search = Some(lookup.search(&self.found.path.hash_part()));
        }
    }

    /// Finds a peer that is twice as fast as `current`, which has `load` and was waited for
    /// `waited`, for the missing `rest` bytes. Returns the reason to move; the caller then leaves
    /// `current`, and [`Sources::next`] returns the faster peer. Blocks for
    /// [`HOLDER_QUERY_TIMEOUT`] at most.
    pub(super) fn find_faster(
        &mut self,
        current: &NarSource,
        load: &PeerLoad,
        waited: Duration,
        rest: u64,
        deadline: Option<Instant>,
        now: Instant,
    ) -> Option<String> {
        if self.moves_left == 0 || waited < picker::MIN_WAIT {
            return None;
        }
        let seconds = rest as f64 / load.pace.known.unwrap_or(load.pace.measured);
        self.find_holders(seconds, Some(current), deadline);
        let (indices, others) = self.holders(now);
        // The last allowed move only goes to a peer whose pace is known.
        let is_fit = |holder: &HolderFacts| self.moves_left > 1 || holder.load.pace.known.is_some();
        let (indices, others): (Vec<usize>, Vec<HolderFacts>) =
            indices.into_iter().zip(others).filter(|(_, holder)| is_fit(holder)).unzip();
        let at = picker::faster(load, waited, rest, &others)?;
        self.faster_peer = Some(self.found.sources[indices[at]].peer_key());
        self.moves_left -= 1;
        Some(format!("slow ({load}), another has {}", others[at].load))
    }

    /// Indices of the known sources that may be asked, and what is known of each.
    fn holders(&self, now: Instant) -> (Vec<usize>, Vec<HolderFacts>) {
        let health = &self.downloader.health;
        let holder = |(index, source): (usize, &NarSource)| {
            let peer_key = source.peer_key();
            let rank = HealthRank::of(peer_key, health, now)?;
            let is_odd = health.has_many_odd_paths(peer_key, now);
            let rank = if is_odd { HealthRank::LastResort } else { rank };
            let load = self.downloader.paces.load(peer_key, now);
            Some((index, HolderFacts { health: rank, load }))
        };
        self.found.sources.iter().enumerate().filter_map(holder).unzip()
    }

    /// Asks the LAN for holders other than `current` and the known ones, if the rest takes
    /// [`MIN_TIME_TO_ASK`] or longer. Blocks for [`HOLDER_QUERY_TIMEOUT`] at most.
    fn find_holders(
        &mut self,
        seconds: f64,
        current: Option<&NarSource>,
        deadline: Option<Instant>,
    ) {
        let now = Instant::now();
        let is_early = self
            .last_holder_query
            .is_some_and(|at| now.saturating_duration_since(at) < HOLDER_QUERY_INTERVAL);
        if is_early || seconds < MIN_TIME_TO_ASK.as_secs_f64() {
            return;
        }
        self.last_holder_query = Some(now);
        let left = HOLDER_QUERY_TIMEOUT.min(time_left(deadline, now));
        for source in self.downloader.lookup.holders(&self.found.path.hash_part(), left) {
            let is_same = |known: &NarSource| known.peer.ip() == source.peer.ip();
            if !self.found.sources.iter().chain(current).any(is_same) {
                self.add(source);
            }
        }
    }
}

/// Time until `deadline`; [`Duration::MAX`] without one.
pub(super) fn time_left(deadline: Option<Instant>, now: Instant) -> Duration {
    deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(now))
}
