//! Requests one NAR from one peer after the other, until one begins to send.

use super::peer_stream::{CountedTransfer, PeerStream};
use super::relay::{RelayCheck, Relays};
use super::sources::{Sources, time_left};
use super::{DownloadError, Downloader, spool};
use crate::lookup::{FoundNar, NarSource, nar_name};
use crate::peers::client::{LinkKind, PeerError, READ_TIMEOUT};
use crate::peers::health::{Eligibility, Fault};
use crate::peers::picker;
use crate::time_scale::Timeout;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// Maximum number of requests for one NAR, without those to relays. At the bound, the NAR fails.
const MAX_TRIES: u32 = 12;

/// A NAR is left to the upstream cache only if its rest takes longer from peers than this plus
/// twice the time of the whole NAR from upstream.
const UPSTREAM_GRACE: Duration = Duration::from_secs(2);

/// Maximum time for the first piece from any of the relays that a holder named. After it, the
/// holder is asked again. Relays may wait for further relays, so this ends before the NAR's own
/// deadline.
const RELAY_TIMEOUT: Timeout = Timeout::from_secs(5);

/// Maximum wait for the first byte if there may be another peer; otherwise [`READ_TIMEOUT`].
const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(2);

/// The requests for one NAR.
pub(super) struct NarRequests<'a> {
    downloader: &'a Downloader,
    pub(super) sources: Sources<'a>,
    /// Set once a holder has named relays. No further holder may name some, so that no two nodes
    /// wait for each other.
    pub(super) relays: Option<Relays>,
    tries: u32,
    /// Whether the NAR may be left to the upstream cache. False if that happened lately, and Nix
    /// asked here again.
    may_leave: bool,
    /// Deadline for the first piece; `None` once it is there. Later, the deadline for the rest of
    /// an unsupported NAR.
    pub(super) deadline: Option<Instant>,
}

/// A peer that has begun to send the NAR.
pub(super) struct ActiveSource<'a> {
    pub(super) source: NarSource,
    /// Why this peer was chosen.
    pub(super) reason: String,
    /// When the request began.
    pub(super) began: Instant,
    pub(super) stream: PeerStream<'a>,
    /// Set if the peer is a relay.
    pub(super) relay_check: Option<RelayCheck<'a>>,
}

impl<'a> NarRequests<'a> {
    /// Sends no request yet. `deadline` is that of the first piece. `may_leave`: the NAR may be
    /// left to the upstream cache.
    pub(super) fn new(
        downloader: &'a Downloader,
        found: FoundNar,
        deadline: Instant,
        may_leave: bool,
    ) -> Self {
        let (sources, deadline) = (Sources::new(downloader, found), Some(deadline));
        NarRequests { downloader, sources, relays: None, tries: 0, may_leave, deadline }
    }

    /// Connects to the best source at byte `offset`. Returns `None` if there is none.
    pub(super) fn connect(
        &mut self,
        offset: u64,
    ) -> Result<Option<ActiveSource<'a>>, DownloadError> {
        loop {
            if offset == 0
                && let Some(relay) = self.connect_to_relay()
            {
                return Ok(Some(relay));
            }
            if self.tries >= MAX_TRIES {
                return Ok(None);
            }
            let rest = self.sources.found.nar_size - offset;
            let Some((source, reason)) = self.sources.next(rest, self.deadline) else {
                return Ok(None);
            };
            // Checked before the request: a NAR of a peer that is known to be slow need not wait
            // for it.
            let load = self.downloader.paces.load(source.peer_key(), Instant::now());
            let time = picker::time_left(&load.with(rest), None, rest);
            if let Some(why) = time.and_then(|time| self.upstream_is_faster(time)) {
                return Err(DownloadError::Upstream(why));
            }
            let has_another = self.sources.may_have_another();
            let timeout = if has_another { FIRST_BYTE_TIMEOUT } else { READ_TIMEOUT.get() };
            let timeout = timeout.min(self.time_left(Instant::now()));
            if timeout.is_zero() {
                return Ok(None);
            }
            self.tries += 1;
            let sending = self.request(source, reason, offset, timeout, false);
            if sending.is_some() {
                return Ok(sending);
            }
        }
    }

    /// Connects to a relay that was not asked yet, at byte 0. Returns `None` if there is none.
    fn connect_to_relay(&mut self) -> Option<ActiveSource<'a>> {
        loop {
            let timeout = self.relay_time_left(Instant::now());
            let relays = self.relays.as_mut()?;
            let relay = relays.unasked.pop()?;
            if timeout.is_zero() {
                relays.unasked.clear();
                return None;
            }
            let reason = "it is getting the NAR, too".into();
            let sending = self.request(relay, reason, 0, timeout, true);
            if sending.is_some() {
                return sending;
            }
        }
    }

    /// Requests the NAR from byte `offset` on. Returns `None` if the peer does not begin to send
    /// within `timeout`.
    fn request(
        &mut self,
        mut source: NarSource,
        reason: String,
        offset: u64,
        timeout: Duration,
        is_relay: bool,
    ) -> Option<ActiveSource<'a>> {
        let (downloader, peer, began) = (self.downloader, source.peer, Instant::now());
        let FoundNar { path, nar_hash: hash, nar_size, .. } = &self.sources.found;
        let mut incoming_nar = downloader.paces.begin(source.peer_key(), nar_size - offset, began);
        if is_relay {
            // A relay may wait for its own source before it answers.
            incoming_nar.stop_waiting(began);
        }
        let url_path = source.nar_path(&path.hash_part(), hash);
        let mut link = source.take_link_kind();
        let accepts_relays = self.relays.is_none() && *nar_size >= spool::MIN_SIZE && offset == 0;
        if link == LinkKind::Lan && source.friend.is_none() && accepts_relays {
            link = LinkKind::LanOrOthers;
        }
        let client = source.client(&downloader.client);
        match client.nar(peer, &url_path, offset, *nar_size, timeout, &link) {
            Ok(body) => {
                log::debug!("NAR {hash}: from peer {peer} at byte {offset}: {reason}");
                if offset > 0 {
                    log::info!("NAR {hash}: continued from peer {peer} at byte {offset}");
                }
                let relays = self.relays.as_ref().filter(|_| is_relay);
                let relay_check = relays.map(|relays| {
                    let nar_name = nar_name(&path.hash_part(), hash);
                    RelayCheck::new(relays, &downloader.client, nar_name)
                });
                let counted = match link {
                    LinkKind::Wan(Some(transfer)) => {
                        Some(CountedTransfer { lookup: &downloader.lookup, transfer, bytes: 0 })
                    }
                    _ => None,
                };
                let stream = PeerStream::new(body, incoming_nar, counted);
                return Some(ActiveSource { source, reason, began, stream, relay_check });
            }
            // The relay has not begun its download, or cannot pass it on.
            Err(e) if is_relay => log::debug!("NAR {hash}: peer {peer}: {e}"),
            Err(e) => self.handle_failure(source, e, began, timeout),
        }
        None
    }

    /// Handles the failure of a request to a holder that began at `began` and had `timeout`.
    fn handle_failure(
        &mut self,
        source: NarSource,
        error: PeerError,
        began: Instant,
        timeout: Duration,
    ) {
        let (hash, peer, peer_key) = (self.sources.found.nar_hash, source.peer, source.peer_key());
        let Downloader { lookup, health, .. } = self.downloader;
        match error {
            PeerError::Named(ips) => {
                let deadline = Some(Instant::now() + RELAY_TIMEOUT.get());
                log::debug!("NAR {hash}: peer {peer} names {ips:?}");
                let mut unasked = lookup.live_neighbours(&ips);
                let mut seen = HashSet::from([peer_key]);
                unasked.retain(|relay| {
                    let relay = relay.peer_key();
                    let is_eligible = health.eligibility(relay, Instant::now()) == Eligibility::Now;
                    is_eligible && !health.is_doubtful(relay) && seen.insert(relay)
                });
                self.relays = Some(Relays { holder: peer, unasked, deadline });
                self.sources.add(source);
            }
            PeerError::Busy => self.sources.retry_busy(source),
            // The peer only answered that it has the path. It may have another NAR, or the same one
            // at another URL, as the Python peerix has. Its narinfo tells.
            PeerError::NotThere
                if source.url_path.is_none() && source.wan.is_none() && source.friend.is_none() =>
            {
                log::debug!("NAR {hash}: peer {peer} has it elsewhere, or another one");
                let left = timeout.min(self.time_left(Instant::now()));
                match lookup.locate_nar(peer, &self.sources.found, left) {
                    Some(elsewhere) if elsewhere.url_path.is_some() => self.sources.add(elsewhere),
                    Some(_) => {
                        let (now, why) = (Instant::now(), "says that it has a NAR, and has not");
                        health.record_failure(peer_key, Fault::BrokenPromise, began, now, &why);
                    }
                    None => {}
                }
            }
            e => {
                log::debug!("NAR {hash}: peer {peer}: {e}");
                e.record(health, peer_key, began);
            }
        }
    }

    /// The reason why the upstream cache is certain to be faster than a peer that needs `time` for
    /// the rest; `None` if it is not. Blocks for at most two requests to upstream, and never beyond
    /// the deadline of the first piece.
    pub(super) fn upstream_is_faster(&self, time: Duration) -> Option<String> {
        if !self.may_leave || time <= UPSTREAM_GRACE {
            return None;
        }
        let left = self.time_left(Instant::now());
        let upstream_time = self.downloader.upstream.time(&self.sources.found, left)?;
        (time > UPSTREAM_GRACE + 2 * upstream_time).then(|| {
            format!(
                "{time:.1?} more from the best peer, {upstream_time:.1?} from the upstream cache"
            )
        })
    }

    /// Time until the deadline of the first piece, or of the rest of an unsupported NAR;
    /// [`Duration::MAX`] if there is none.
    pub(super) fn time_left(&self, now: Instant) -> Duration {
        time_left(self.deadline, now)
    }

    /// Time left for relays and digests: until the deadline for relays or that of
    /// [`NarRequests::time_left`], whichever is earlier.
    pub(super) fn relay_time_left(&self, now: Instant) -> Duration {
        let deadline = self.relays.as_ref().and_then(|relays| relays.deadline);
        self.time_left(now).min(time_left(deadline, now))
    }
}
