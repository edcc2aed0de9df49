//! Lookups of one path at all trackers.

use super::addresses::{LocatedCandidate, resolve, split};
use crate::nix::HashPart;
use crate::peers::announce::Trackers;
use crate::peers::request_pool::{POOL_RETRY_DELAY, RequestPool, RequestTarget};
use crate::peers::tracker::{LOOKUP_TIMEOUT, Tracker, TrackerError};
use crate::resolver::NameResolver;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Delay after which a tracker is asked again on another connection. Most trackers answer sooner.
/// The kernel repeats a lost packet after 200 ms on an established connection, but only after 1 s
/// on a new one.
const HEDGE_DELAY: Duration = Duration::from_millis(300);
/// Longest wait for the addresses of the host names in one list of candidates.
pub(super) const NAMES_TIMEOUT: Duration = Duration::from_millis(500);

/// Candidates of a tracker.
pub(super) struct FoundCandidates {
    /// Those with IP addresses.
    pub(super) located: Vec<LocatedCandidate>,
    /// True if those with host names follow, each in [`TrackerAnswer::Name`].
    pub(super) has_names: bool,
}

/// Message from the lookup at one tracker.
pub(super) enum TrackerAnswer {
    /// The tracker's list.
    List(Result<FoundCandidates, TrackerError>),
    /// A candidate whose host name was resolved; `None` at the end of the list.
    Name(Option<LocatedCandidate>),
}

/// Lookup at one tracker.
pub(super) struct TrackerLookup {
    pub(super) tracker: Arc<Tracker>,
    /// Index of the tracker in [`Trackers::all`].
    pub(super) index: usize,
    /// Number of connections on which the tracker was asked, and number of those that failed.
    sent: u32,
    failed: u32,
    error: Option<TrackerError>,
    pub(super) is_answered: bool,
    /// Number of answers whose host names are being resolved. [`TrackerAnswer::Name`] says when
    /// that ends.
    resolving: u32,
    /// True if the failure of this lookup was recorded.
    is_recorded: bool,
}

impl TrackerLookup {
    fn new(tracker: Arc<Tracker>, index: usize) -> Self {
        TrackerLookup {
            tracker,
            index,
            sent: 0,
            failed: 0,
            error: None,
            is_answered: false,
            resolving: 0,
            is_recorded: false,
        }
    }

    fn is_awaited(&self) -> bool {
        !self.is_answered && (self.sent == 0 || self.failed < self.sent)
    }
}

/// Lookups of one path at all trackers that are usable.
#[derive(Default)]
pub(super) struct TrackerLookups {
    began: Option<Instant>,
    pub(super) lookups: Vec<TrackerLookup>,
}

impl TrackerLookups {
    /// Creates lookups of which the tracker with index 0 has been asked, and answers nothing.
    #[cfg(test)]
    pub(super) fn asked(tracker: Arc<Tracker>, now: Instant) -> Self {
        let lookup = TrackerLookup { sent: 1, ..TrackerLookup::new(tracker, 0) };
        TrackerLookups { began: Some(now), lookups: vec![lookup] }
    }

    /// Begins the lookups, at the trackers that are usable now. Blocks for 2 s at most, right after
    /// the start or a network change.
    pub(super) fn begin(&mut self, trackers: &Trackers) {
        let usable = |(index, tracker): (usize, &Arc<Tracker>)| {
            tracker.await_usable().then(|| TrackerLookup::new(tracker.clone(), index))
        };
        self.lookups = trackers.all().enumerate().filter_map(usable).collect();
        self.began = Some(Instant::now());
    }

    /// Time at which the lookups began; `None` before it.
    pub(super) fn began(&self) -> Option<Instant> {
        self.began
    }

    fn deadline(&self, now: Instant) -> Instant {
        self.began.unwrap_or(now) + LOOKUP_TIMEOUT.get()
    }

    fn hedge_time(&self, now: Instant) -> Instant {
        self.began.unwrap_or(now) + HEDGE_DELAY
    }

    /// Asks each tracker, and asks a slow one a second time. `send` gets the answers with the index
    /// of the tracker, in another thread. Returns false if the request pool is full.
    pub(super) fn call(
        &mut self,
        hash_part: HashPart,
        requests: &RequestPool,
        names: &Arc<NameResolver>,
        now: Instant,
        send: impl Fn(usize, TrackerAnswer) + Clone + Send + 'static,
    ) -> bool {
        let (deadline, hedge) = (self.deadline(now), self.hedge_time(now));
        let mut may_ask = true;
        for lookup in self.lookups.iter_mut().filter(|lookup| now < deadline && lookup.is_awaited())
        {
            if lookup.sent == 0 || lookup.sent == 1 && now >= hedge {
                let (tracker, index, is_hedge) =
                    (lookup.tracker.clone(), lookup.index, lookup.sent == 1);
                let (names, send) = (names.clone(), send.clone());
                let started = requests.run(RequestTarget::Tracker, move || {
                    let (result, named) = match tracker.lookup(&hash_part, is_hedge, deadline) {
                        Ok(list) => {
                            let (located, named) = split(list);
                            (Ok(FoundCandidates { located, has_names: !named.is_empty() }), named)
                        }
                        Err(e) => (Err(e), Vec::new()),
                    };
                    send(index, TrackerAnswer::List(result));
                    // Candidates with IP addresses do not wait for these.
                    if !named.is_empty() {
                        let deadline = Instant::now() + NAMES_TIMEOUT;
                        let found = |located| send(index, TrackerAnswer::Name(located));
                        resolve(&names, &named, deadline, found);
                    }
                });
                lookup.sent += u32::from(started);
                may_ask &= started;
            }
        }
        may_ask
    }

    /// Time of the next call or timeout; `None` if no tracker's list is awaited.
    pub(super) fn next_wake_up(&self, now: Instant) -> Option<Instant> {
        let (deadline, hedge) = (self.deadline(now), self.hedge_time(now));
        let is_awaited = |lookup: &&TrackerLookup| now < deadline && lookup.is_awaited();
        let wake_up = |lookup: &TrackerLookup| {
            if lookup.sent < 2 { hedge.max(now + POOL_RETRY_DELAY) } else { deadline }
        };
        self.lookups.iter().filter(is_awaited).map(wake_up).min()
    }

    /// Returns true if host names of candidates are being resolved.
    pub(super) fn is_resolving(&self) -> bool {
        self.lookups.iter().any(|lookup| lookup.resolving > 0)
    }

    /// Returns true if further candidates may be named.
    pub(super) fn may_name_more(&self, now: Instant) -> bool {
        self.lookups.iter().any(TrackerLookup::is_awaited) && now < self.deadline(now)
            || self.is_resolving()
    }

    /// Handles an answer of the tracker with the index `index`, and returns the candidates in it.
    pub(super) fn handle(&mut self, index: usize, answer: TrackerAnswer) -> Vec<LocatedCandidate> {
        let Some(lookup) = self.lookups.iter_mut().find(|lookup| lookup.index == index) else {
            return Vec::new();
        };
        match answer {
            TrackerAnswer::List(Ok(found)) => {
                lookup.resolving += u32::from(found.has_names);
                if !std::mem::replace(&mut lookup.is_answered, true) {
                    return found.located;
                }
            }
            TrackerAnswer::List(Err(e)) => {
                lookup.failed += 1;
                lookup.error = Some(e);
            }
            TrackerAnswer::Name(Some(located)) => return vec![located],
            TrackerAnswer::Name(None) => lookup.resolving -= 1,
        }
        Vec::new()
    }

    /// Reports failed lookups to their trackers, each once. After a narinfo was `found`, a lookup
    /// that is still awaited has not failed.
    pub(super) fn record_failures(&mut self, found: bool, now: Instant) {
        let began = self.began.unwrap_or(now);
        for lookup in &mut self.lookups {
            if lookup.is_answered
                || found && lookup.is_awaited()
                || std::mem::replace(&mut lookup.is_recorded, true)
            {
                continue;
            }
            match &lookup.error {
                // The tracker is reachable but overloaded.
                Some(TrackerError::Refused(429, ..)) => {}
                Some(e) => lookup.tracker.record_failed_lookup(e, began),
                None => lookup.tracker.record_failed_lookup(&"lookups take too long", began),
            }
        }
    }
}
