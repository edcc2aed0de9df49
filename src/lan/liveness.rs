//! Whether a peer is live, and when it is probed. No I/O. `now` is real time, `t` is lookup time
//! (see [`super`]).

use crate::backoff;
use crate::time_scale::Timeout;
use std::time::{Duration, Instant};

/// Delay of the first probe of a silent peer. The pause doubles with each probe, up to
/// [`MAX_PROBE`].
const FIRST_PROBE: Duration = Duration::from_secs(1);
/// Maximum pause between two probes of a silent peer.
const MAX_PROBE: Duration = Duration::from_secs(30);
/// A live peer from which nothing came for this long is probed: the network may filter its
/// broadcasts.
const PROBE_UNHEARD: Duration = Duration::from_secs(60);
/// Interval between two probes of a live peer from which nothing comes.
const PROBE_UNHEARD_AGAIN: Duration = Duration::from_secs(10);

/// Time for which lookups wait for a peer after its *bye*, from the first probe on. A restart of
/// the daemon takes less. At the bound the peer becomes silent.
const BYE_WAIT: Timeout = Timeout::from_secs(1);
/// Interval between probes in [`BYE_WAIT`]. One may be lost, or come before the daemon is back.
const PROBE_AFTER_BYE: Duration = Duration::from_millis(200);

/// Whether a peer gets queries.
#[derive(Debug, Clone, Copy, Default)]
enum State {
    /// It gets queries.
    #[default]
    Live,
    /// It gets queries, but said *bye* at `bye`, in real time. `probed` is when it was first probed
    /// after that, in lookup time. [`BYE_WAIT`] begins then.
    Leaving { bye: Instant, probed: Option<Instant> },
    /// It was given up at `since` and gets probes only. `probes` counts those since then, or since
    /// the network changed. All times are real time.
    Silent { since: Instant, next_probe: Instant, probes: u32 },
}

/// Whether a peer is live, and when it is probed.
#[derive(Debug, Default)]
pub struct Liveness {
    state: State,
    /// When it was last probed, in real time.
    last_probe: Option<Instant>,
}

impl Liveness {
    /// Since when the peer is silent, in real time. `None` for a live peer.
    pub fn silent_since(&self) -> Option<Instant> {
        match self.state {
            State::Silent { since, .. } => Some(since),
            _ => None,
        }
    }

    /// Whether the peer said *bye* and has answered no query since.
    pub fn is_leaving(&self) -> bool {
        matches!(self.state, State::Leaving { .. })
    }

    /// When [`BYE_WAIT`] ends, in lookup time. `None` if the peer said no *bye*, or was not probed
    /// since.
    pub fn leaves_at(&self) -> Option<Instant> {
        match self.state {
            State::Leaving { probed, .. } => Some(probed? + BYE_WAIT.get()),
            _ => None,
        }
    }

    /// Whether the peer said *bye*, and [`BYE_WAIT`] after the first probe is over.
    pub fn has_left(&self, t: Instant) -> bool {
        self.leaves_at().is_some_and(|at| at <= t)
    }

    /// When the peer is probed next, in real time. A live peer is probed only after its *bye*, and
    /// if no packet comes from it. `heard` is when the last one came. It is `None` if the peer says
    /// no hellos, and then nothing is expected from it.
    pub fn next_probe(&self, heard: Option<Instant>) -> Option<Instant> {
        let after_last = |pause| self.last_probe.map(|last| last + pause);
        match self.state {
            State::Live => Some(heard? + PROBE_UNHEARD).max(after_last(PROBE_UNHEARD_AGAIN)),
            State::Leaving { bye, probed: None } => Some(bye),
            State::Leaving { .. } => after_last(PROBE_AFTER_BYE),
            State::Silent { next_probe, .. } => Some(next_probe),
        }
    }

    /// Records that a probe is sent at `now` and plans the next one.
    pub fn record_probe(&mut self, now: Instant, t: Instant) {
        self.last_probe = Some(now);
        match &mut self.state {
            State::Live => {}
            State::Leaving { probed, .. } => *probed = probed.or(Some(t)),
            State::Silent { next_probe, probes, .. } => {
                *next_probe = now + backoff::pause(FIRST_PROBE, *probes, MAX_PROBE);
                *probes += 1;
            }
        }
    }

    /// Moves the next probe of a silent peer forward to `now`, but not within [`FIRST_PROBE`] of
    /// the last one.
    pub fn advance_probe(&mut self, now: Instant) {
        if let State::Silent { next_probe, .. } = &mut self.state {
            let earliest = self.last_probe.map_or(now, |last| last + FIRST_PROBE);
            *next_probe = earliest.max(now).min(*next_probe);
        }
    }

    /// Makes the next probe due and its pause short again, because the network has changed.
    pub fn restart_probes(&mut self, now: Instant) {
        if let State::Silent { probes, .. } = &mut self.state {
            *probes = 0;
        }
        self.advance_probe(now);
    }

    /// Records a *bye*.
    pub fn record_bye(&mut self, now: Instant) {
        if let State::Live = self.state {
            self.state = State::Leaving { bye: now, probed: None };
        }
    }

    /// Records an answer to a query sent at `sent`, in lookup time. Returns whether that made a
    /// silent peer live.
    pub fn record_answer(&mut self, sent: Instant) -> bool {
        let was_silent = self.silent_since().is_some();
        match self.state {
            // The peer may have answered before its *bye*.
            State::Leaving { probed, .. } if probed.is_none_or(|probed| sent < probed) => {}
            _ => self.state = State::Live,
        }
        was_silent
    }

    /// Makes the peer silent.
    pub fn mark_silent(&mut self, now: Instant) {
        if self.silent_since().is_none() {
            self.state = State::Silent { since: now, next_probe: now + FIRST_PROBE, probes: 0 };
        }
    }
}
