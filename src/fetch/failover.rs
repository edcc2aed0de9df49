//! Where the bytes of one NAR come from: the best source, and another one at the same byte when it
//! fails or is slow.

use super::verified::{PIECE, Piece, VerifiedStream};
use super::{DownloadError, Downloader, spool};
use crate::lookup::{FoundNar, HolderSearch, NarSource, nar_name};
use crate::nix::HashPart;
use crate::peers::client::{LinkKind, NarBody, PeerError, STALL, TOO_SLOW};
use crate::peers::health::{Eligibility, Fault, PeerKey};
use crate::peers::pace::{IncomingNar, PaceEstimate, PaceMeter};
use crate::peers::picker::{self, HealthRank, HolderFacts};
use crate::stats::TransferGuard;
use crate::time_scale::Timeout;
use crate::wire::relay::MAX_DIGESTS;
use crate::wire::tracker::TransferName;
use ring::digest::SHA256;
use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::thread;
use std::time::{Duration, Instant};

/// Peers tried for one NAR in all. A NAR that twelve peers could not deliver will not come.
const MAX_TRIES: u32 = 12;
/// A peer that answered 503, or broke off, is asked again after this, if there is no other.
const PAUSE: Duration = Duration::from_secs(1);
/// A busy one so often: then Nix is better served by its next substituter.
const MAX_BUSY: u32 = 10;
/// Times in a row that one peer may break off and be asked again. One that sent a piece in between
/// may so again.
const MAX_BROKEN: u32 = 1;
/// Times the peers are asked anew for one NAR.
const MAX_SEARCHES: u32 = 3;
/// Times that one NAR leaves a peer for a faster one. Then it stays.
const MAX_MOVES: u32 = 3;

/// A transfer that takes longer than this is worth asking the LAN again for further holders.
const LONG: Duration = Duration::from_millis(50);
/// It is asked at most once in this time for one NAR.
const ASK_PAUSE: Duration = Duration::from_secs(10);
/// Longest wait for their answers.
const ASK_AGAIN: Duration = Duration::from_millis(20);

/// A NAR is left to the upstream cache only if the rest needs longer than this, and twice the whole
/// NAR's time there.
const UPSTREAM_GRACE: Duration = Duration::from_secs(2);

/// Of the peers that a holder names one has sent the first piece within this, or the holder is
/// asked again: each may wait for another one itself, and the holder must be asked in time.
const RELAY_PATIENCE: Timeout = Timeout::from_secs(5);
/// A peer that is still getting the NAR is left after so long without a byte, or while the holder
/// is twice as fast, for each peer that is before it in the chain. The holder is asked as often how
/// fast it is.
const RELAY_STEP: Timeout = Timeout::from_secs(1);
/// A holder hashes them within this.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(5);

/// While nothing comes from a peer, this often it is looked at whether another one is better.
const LOOK: Duration = Duration::from_millis(100);
/// A peer that sent less than [`TOO_SLOW`] for this long is left.
const PACE_WINDOW: Timeout = Timeout::from_secs(5);

/// A peer begins to send within this, if there may be another; else within [`STALL`].
const FIRST_BYTE: Duration = Duration::from_secs(2);

/// After a pause this long, which Nix made, a peer that closed the connection is not to blame.
const LONG_PAUSE: Duration = Duration::from_secs(20);

/// The sources of one NAR, and the peer that is sending.
pub(super) struct FailoverReader<'a> {
    fetch: &'a Downloader,
    found: FoundNar,
    hash_part: HashPart,
    /// For the record.
    transfer: TransferGuard<'a>,
    search: Option<HolderSearch>,
    searches: u32,
    tries: u32,
    /// The last peer that may be asked again, and how often more.
    again: Option<NarSource>,
    busy_left: u32,
    broken_left: u32,
    moves_left: u32,
    /// The source for which the last peer was left.
    moves_to: Option<PeerKey>,
    /// The NAR may be left to the upstream cache. Nix did not ask for it again after that.
    may_leave: bool,
    /// When the LAN was last asked again for further holders.
    asked_again: Option<Instant>,
    /// A holder may name others that are getting the NAR. Each NAR is asked for so once, so that no
    /// two nodes wait for each other.
    takes_names: bool,
    /// Those that a holder named, the first to be asked last, and the holder.
    relays: Vec<(NarSource, SocketAddr)>,
    /// One of them has sent the first piece by then, or the holder is asked again.
    relays_until: Instant,
    current: Option<ActiveSource<'a>>,
    contributors: Vec<Contributor>,
    accusations: Vec<DigestMismatch>,
    /// While the first piece has to come by then.
    until: Option<Instant>,
}

/// A peer that may have sent a part of what came.
struct Contributor {
    who: PeerKey,
    /// It failed after it had begun.
    has_failed: bool,
}

/// A peer passed on another piece than the one of which the holder told a digest. Which of the two
/// was wrong shows when the whole NAR is right.
struct DigestMismatch {
    relay: PeerKey,
    holder: PeerKey,
    began: Instant,
    /// The byte at which the piece begins, and what the holder says of it.
    at: u64,
    digest: [u8; 32],
    /// Whether the digest was that of the piece that then came, once it has come.
    is_true: Option<bool>,
}

/// The peer that is sending.
struct ActiveSource<'a> {
    source: NarSource,
    body: NarBody,
    /// Some of it has come.
    has_begun: bool,
    intake: IncomingNar<'a>,
    counted: Option<CountedTransfer<'a>>,
    began: Instant,
    last_read: Instant,
    /// When the read under way, or the last one, began.
    read_began: Instant,
    /// How long Nix kept us from reading before the last read.
    pause: Duration,
    /// Time waited for the peer in this pace window, and bytes that came in it.
    waited: Duration,
    got: u64,
    /// Time waited for it in all.
    waited_in_all: Duration,
    /// Time waited since it was last looked at whether another peer is better.
    unlooked: Duration,
    /// The pace of this one stream, once it has begun.
    meter: PaceMeter,
    /// Set if the peer is still getting the NAR itself: what its pieces are compared with.
    digests: Option<PieceDigests>,
}

/// Digests of pieces, as a holder has them.
struct PieceDigests {
    holder: SocketAddr,
    /// The first piece of which there is one.
    first: u64,
    list: Vec<[u8; 32]>,
    /// How many were named that are before the peer, or are the peer, in the chain.
    position: u32,
    /// When the holder was last asked how fast it is, and since when it is said to be twice as
    /// fast.
    asked: Instant,
    slow_since: Option<Instant>,
}

/// What came of a transfer that a tracker counts; reported when it is over, however it ends.
struct CountedTransfer<'a> {
    fetch: &'a Downloader,
    transfer: TransferName,
    bytes: u64,
}

impl Drop for CountedTransfer<'_> {
    fn drop(&mut self) {
        self.fetch.lookup.received(&self.transfer, self.bytes);
    }
}

/// Why a peer's stream ended.
#[derive(Debug)]
pub(super) enum StreamError {
    /// The peer did something wrong.
    Failed(Fault, String),
    /// Another peer is twice as fast.
    Slow(String),
    /// The upstream cache is certain to be faster.
    Upstream(String),
    /// A peer that is still getting the NAR sent a piece that is not the holder's, which has this
    /// digest.
    WrongPiece([u8; 32]),
    /// The holder does not tell its digests, and whether that breaks its promise: it may be busy,
    /// or the time is up.
    Unchecked(bool, String),
    /// The first piece has not come in time.
    Late,
}

impl StreamError {
    fn failed(fault: Fault, why: impl fmt::Display) -> Self {
        StreamError::Failed(fault, why.to_string())
    }
}

impl ActiveSource<'_> {
    fn start_waiting(&mut self, now: Instant) {
        self.intake.wait(now);
        if self.has_begun {
            self.meter.wait(now);
        }
    }

    fn stop_waiting(&mut self, now: Instant) {
        self.intake.pause(now);
        if self.has_begun {
            self.meter.pause(now);
        }
    }
}

impl PieceDigests {
    fn of(holder: SocketAddr, named_before: usize) -> PieceDigests {
        let position = u32::try_from(named_before).unwrap_or(u32::MAX).saturating_add(1);
        PieceDigests {
            holder,
            first: 0,
            list: Vec::new(),
            position,
            asked: Instant::now(),
            slow_since: None,
        }
    }
}

impl<'a> FailoverReader<'a> {
    /// Nothing is asked of any peer yet. The first piece has to come until `until`. `may_leave`:
    /// the NAR may be left to the upstream cache.
    pub(super) fn new(
        fetch: &'a Downloader,
        found: FoundNar,
        until: Instant,
        may_leave: bool,
    ) -> Self {
        let transfer = fetch.record.receive(found.path.base_name(), found.nar_size);
        let found_size = found.nar_size;
        FailoverReader {
            fetch,
            hash_part: found.path.hash_part(),
            found,
            transfer,
            search: None,
            searches: 0,
            tries: 0,
            again: None,
            busy_left: MAX_BUSY,
            broken_left: MAX_BROKEN,
            moves_left: MAX_MOVES,
            moves_to: None,
            may_leave,
            asked_again: None,
            takes_names: found_size >= spool::LEAST_SIZE,
            relays: Vec::new(),
            relays_until: until,
            current: None,
            contributors: Vec::new(),
            accusations: Vec::new(),
            until: Some(until),
        }
    }

    /// The peer that is sending.
    pub(super) fn current(&self) -> Option<&NarSource> {
        self.current.as_ref().map(|current| &current.source)
    }

    /// Gets the first piece, which is checked by `is_right`, from whichever peer gives it in time.
    ///
    /// # Errors
    /// See [`DownloadError`].
    pub(super) fn first_piece(
        &mut self,
        is_right: impl Fn(&VerifiedStream, &Piece) -> bool,
    ) -> Result<(VerifiedStream, Piece), DownloadError> {
        let mut incoming = VerifiedStream::new(self.found.nar_hash, self.found.nar_size);
        let mut piece = incoming.piece();
        loop {
            self.connect(0)?
                .ok_or_else(|| DownloadError::NoPeer("no peer begins to send".into()))?;
            match self.fill(&mut incoming, &mut piece) {
                Ok(()) if is_right(&incoming, &piece) => {
                    self.try_accusations(0, &piece);
                    self.until = None;
                    return Ok((incoming, piece));
                }
                Ok(()) => self
                    .leave(&StreamError::failed(Fault::BadData, "sent a NAR with another hash"), 0),
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.leave(&broken, 0),
            }
            // Nothing has been passed on, so the next peer can begin from the beginning.
            incoming = VerifiedStream::new(self.found.nar_hash, self.found.nar_size);
            piece = incoming.piece();
            self.contributors.clear();
        }
    }

    /// One more piece, from whichever peer gives it.
    ///
    /// # Errors
    /// No peer is left, or what came is no part of a NAR.
    pub(super) fn next_piece(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), DownloadError> {
        loop {
            let at = incoming.at();
            if self.current.is_none() && self.connect(at)?.is_none() {
                let hash = self.found.nar_hash;
                let why =
                    format!("NAR {hash}: no peer left at byte {at} of {}", self.found.nar_size);
                log::warn!("{why}");
                return Err(DownloadError::NoPeer(why));
            }
            match self.fill(incoming, piece) {
                Ok(()) => {
                    self.try_accusations(at, piece);
                    return Ok(());
                }
                // The framing has seen the bad bytes, and who knows which bytes before were bad.
                Err(StreamError::Failed(Fault::BadData | Fault::OddPath, why)) => {
                    return Err(DownloadError::Wrong(why));
                }
                Err(StreamError::Upstream(why)) => return Err(DownloadError::Upstream(why)),
                Err(broken) => self.leave(&broken, incoming.at()),
            }
        }
    }

    /// Reads the rest of a piece from the current peer.
    fn fill(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        if self.current.as_ref().is_some_and(|current| current.digests.is_some()) {
            return self.fill_compared(incoming, piece);
        }
        while incoming.rest() > 0 {
            let skip = self.current.as_ref().map_or(0, |current| current.body.skip);
            // What is skipped goes to the same place, and is written over.
            let room = piece.room(if skip > 0 { skip } else { incoming.rest() });
            if room.is_empty() {
                break;
            }
            let got = self.read(room, incoming.at(), incoming.rest())?;
            if skip > 0 {
                if let Some(current) = &mut self.current {
                    current.body.skip -= got as u64;
                }
                continue;
            }
            incoming.take(piece, got).map_err(|e| {
                StreamError::failed(
                    if e.is_unsupported { Fault::OddPath } else { Fault::BadData },
                    e,
                )
            })?;
            self.transfer.progress(incoming.at());
        }
        self.broken_left = MAX_BROKEN;
        Ok(())
    }

    /// Reads a whole piece from a peer that is still getting the NAR, and takes it if it is the
    /// holder's.
    fn fill_compared(
        &mut self,
        incoming: &mut VerifiedStream,
        piece: &mut Piece,
    ) -> Result<(), StreamError> {
        let (at, rest) = (incoming.at(), incoming.rest());
        let len = piece.room(rest).len();
        let mut filled = 0;
        while filled < len {
            let room = &mut piece.room(rest)[filled..];
            filled += self.read(room, at + filled as u64, rest - filled as u64)?;
        }
        let digest = self.digest(at / PIECE as u64)?;
        if ring::digest::digest(&SHA256, piece.room(rest)).as_ref() != digest {
            return Err(StreamError::WrongPiece(digest));
        }
        // It is the holder's word, then.
        incoming.take(piece, len).map_err(|e| StreamError::failed(Fault::BadData, e))?;
        self.transfer.progress(incoming.at());
        Ok(())
    }

    /// Compares the piece at byte `at` with what holders have said of it.
    fn try_accusations(&mut self, at: u64, piece: &Piece) {
        for accusation in self.accusations.iter_mut().filter(|accusation| accusation.at == at) {
            accusation.is_true =
                Some(ring::digest::digest(&SHA256, piece.bytes()).as_ref() == accusation.digest);
        }
    }

    /// SHA-256 of a piece, as the holder has it.
    fn digest(&mut self, piece: u64) -> Result<[u8; 32], StreamError> {
        let Some(digests) = self.current.as_mut().and_then(|current| current.digests.as_mut())
        else {
            return Err(StreamError::Unchecked(false, "not compared".into()));
        };
        let place = piece.checked_sub(digests.first).and_then(|place| usize::try_from(place).ok());
        if let Some(digest) = place.and_then(|place| digests.list.get(place)) {
            return Ok(*digest);
        }
        let name = nar_name(&self.hash_part, &self.found.nar_hash);
        let left = relay_time_left(self.until, self.relays_until, Instant::now());
        let asked = self.fetch.client.digests(
            digests.holder,
            &name,
            piece,
            MAX_DIGESTS,
            DIGEST_TIMEOUT.min(left),
        );
        digests.first = piece;
        let unchecked = |e: PeerError| {
            StreamError::Unchecked(e.fault() == Some(Fault::BrokenPromise), e.to_string())
        };
        digests.list = asked.map_err(unchecked)?.0;
        digests
            .list
            .first()
            .copied()
            .ok_or_else(|| StreamError::Unchecked(true, "no digests".into()))
    }

    /// Reads from the current peer, at least one byte; `rest` bytes of the NAR are to come, from
    /// byte `at` on.
    fn read(&mut self, room: &mut [u8], at: u64, rest: u64) -> Result<usize, StreamError> {
        let began = Instant::now();
        let Some(current) = &mut self.current else {
            return Err(StreamError::failed(Fault::BrokenStream, "not connected"));
        };
        current.pause = began - current.last_read;
        current.read_began = began;
        current.start_waiting(began);
        loop {
            let look = LOOK.min(self.left(Instant::now()));
            let Some(current) = &mut self.current else { break };
            let before = Instant::now();
            let read = current.body.read_within(room, look);
            let now = Instant::now();
            current.unlooked += now - before;
            current.waited_in_all += now - before;
            match read {
                Ok(Some(0)) => {
                    let why = format_args!("stream ended at byte {at} of {}", self.found.nar_size);
                    return Err(StreamError::failed(Fault::BrokenStream, why));
                }
                Ok(Some(got)) => {
                    self.count(got as u64, began, now);
                    self.judge(now, rest - (got as u64).min(rest))?;
                    return Ok(got);
                }
                Ok(None) if now - began >= STALL.get() => {
                    return Err(StreamError::failed(
                        Fault::BrokenStream,
                        format_args!("sent nothing more at byte {at}"),
                    ));
                }
                Ok(None) => {
                    // Other peers, or upstream, may be asked in it, which is not this one's time.
                    current.stop_waiting(now);
                    self.judge(now, rest)?;
                    self.current
                        .iter_mut()
                        .for_each(|current| current.start_waiting(Instant::now()));
                }
                Err(e) => {
                    return Err(StreamError::failed(
                        Fault::BrokenStream,
                        format_args!("stream broke at byte {at}: {e}"),
                    ));
                }
            }
        }
        Err(StreamError::Late)
    }

    /// Counts bytes for which the peer was waited for since `began`.
    fn count(&mut self, got: u64, began: Instant, now: Instant) {
        let Some(current) = &mut self.current else { return };
        current.last_read = now;
        current.intake.got(got, now);
        if std::mem::replace(&mut current.has_begun, true) {
            current.meter.got(got, now);
        }
        current.waited += now - began;
        current.got += got;
        self.transfer.moved(got);
        if let Some(counted) = &mut current.counted {
            counted.bytes += got;
        }
    }

    /// Whether the current peer is to be left, of which `rest` bytes are to come.
    fn judge(&mut self, now: Instant, rest: u64) -> Result<(), StreamError> {
        if self.until.is_some_and(|until| now >= until) {
            return Err(StreamError::Late);
        }
        let Some(current) = &mut self.current else { return Ok(()) };
        if current.waited >= PACE_WINDOW.get() {
            let pace = (current.got as f64 / current.waited.as_secs_f64()) as u64;
            if pace < TOO_SLOW {
                return Err(StreamError::failed(
                    Fault::BrokenStream,
                    format_args!("too slow, {pace} bytes a second"),
                ));
            }
            (current.waited, current.got) = (Duration::ZERO, 0);
        }
        if rest == 0 || current.unlooked < LOOK {
            return Ok(());
        }
        current.unlooked = Duration::ZERO;
        let load = current.intake.load(now);
        let own = current.meter.pace(now);
        if current.digests.is_some() {
            return self.judge_relay(own, now);
        }
        let waited = current.waited_in_all;
        if self.moves_left > 0 && waited >= picker::LEAST_WAIT {
            self.ask_again(rest as f64 / load.pace.known.unwrap_or(load.pace.measured));
            let (places, others) = self.holdings(now);
            // It stays where the last move leads.
            let is_fit =
                |holding: &HolderFacts| self.moves_left > 1 || holding.load.pace.known.is_some();
            let (places, others): (Vec<usize>, Vec<HolderFacts>) =
                places.into_iter().zip(others).filter(|(_, holding)| is_fit(holding)).unzip();
            if let Some(at) = picker::faster(&load, waited, rest, &others) {
                self.moves_to = Some(self.found.sources[places[at]].who());
                return Err(StreamError::Slow(format!(
                    "slow ({load}), another has {}",
                    others[at].load
                )));
            }
        }
        match picker::time_left(&load, own.lasting, rest)
            .and_then(|time| self.upstream_is_faster(time))
        {
            // When upstream was slow to answer, the next look decides, by what has come meanwhile.
            Some(why) if now.elapsed() < LOOK => Err(StreamError::Upstream(why)),
            _ => Ok(()),
        }
    }

    /// Whether a peer that is still getting the NAR itself is to be left for the holder. All behind
    /// one that is slow are slow; the first of them leaves first, and the others see that it
    /// helped.
    fn judge_relay(&mut self, own: PaceEstimate, now: Instant) -> Result<(), StreamError> {
        let Some(current) = &mut self.current else { return Ok(()) };
        if relay_time_left(self.until, self.relays_until, now).is_zero() {
            return Err(StreamError::Slow("the first piece has not come in time".into()));
        }
        let silent = now.saturating_duration_since(current.read_began.max(current.last_read));
        let Some(digests) = &mut current.digests else { return Ok(()) };
        if silent >= RELAY_STEP.get() * digests.position {
            return Err(StreamError::Slow(format!("nothing came for {silent:.1?}")));
        }
        if now.saturating_duration_since(digests.asked) < RELAY_STEP.get() || own.waited.is_zero() {
            return Ok(());
        }
        digests.asked = now;
        let name = nar_name(&self.hash_part, &self.found.nar_hash);
        let there = match self.fetch.client.digests(digests.holder, &name, 0, 1, RELAY_STEP.get()) {
            Ok((_, Some(there))) => there,
            _ => return Ok(()),
        };
        let here = own.known.unwrap_or(own.measured);
        if there < 2.0 * here {
            digests.slow_since = None;
            return Ok(());
        }
        let since = *digests.slow_since.get_or_insert(now);
        if now.saturating_duration_since(since) < RELAY_STEP.get() * digests.position {
            return Ok(());
        }
        Err(StreamError::Slow(format!(
            "{:.0} KiB/s, the holder has {:.0} KiB/s",
            here / 1024.0,
            there / 1024.0
        )))
    }

    /// Why the upstream cache is certain to be faster than a peer that needs `time` for the rest;
    /// `None` if it is not.
    fn upstream_is_faster(&mut self, time: Duration) -> Option<String> {
        if !self.may_leave || time <= UPSTREAM_GRACE {
            return None;
        }
        let there = self.fetch.upstream.time(&self.found)?;
        let why =
            || format!("{time:.1?} more from the best peer, {there:.1?} from the upstream cache");
        (time > UPSTREAM_GRACE + 2 * there).then(why)
    }

    /// The known sources that may be asked, by their places, and what is known of them.
    fn holdings(&self, now: Instant) -> (Vec<usize>, Vec<HolderFacts>) {
        let standing = &self.fetch.standing;
        let holding = |(at, source): (usize, &NarSource)| {
            let who = source.who();
            let health = match standing.turn(who, now) {
                Eligibility::Now if !standing.is_doubtful(who) => HealthRank::Good,
                Eligibility::Now => HealthRank::Doubtful,
                Eligibility::Last => HealthRank::LastResort,
                Eligibility::Never => return None,
            };
            Some((at, HolderFacts { health, load: self.fetch.paces.load(who, now) }))
        };
        self.found.sources.iter().enumerate().filter_map(holding).unzip()
    }

    /// Asks the LAN for further holders, if what is to come takes so many seconds that it is worth
    /// it.
    fn ask_again(&mut self, seconds: f64) {
        let now = Instant::now();
        let is_early =
            self.asked_again.is_some_and(|at| now.saturating_duration_since(at) < ASK_PAUSE);
        if is_early || seconds < LONG.as_secs_f64() {
            return;
        }
        self.asked_again = Some(now);
        let left = ASK_AGAIN.min(self.left(now));
        for source in self.fetch.lookup.holders(&self.hash_part, left) {
            let is_same = |known: &NarSource| known.peer.ip() == source.peer.ip();
            if !self.found.sources.iter().chain(self.current()).any(is_same) {
                self.found.sources.push(source);
            }
        }
    }

    /// Connects to the best source, at the byte that is wanted next. `None`: there is none.
    fn connect(&mut self, at: u64) -> Result<Option<()>, DownloadError> {
        while at == 0
            && let Some((relay, holder)) = self.relays.pop()
        {
            let now = Instant::now();
            let patience = relay_time_left(self.until, self.relays_until, now);
            if patience.is_zero() {
                self.relays.clear();
                break;
            }
            if self.ask(relay, at, patience, "it is getting the NAR, too", Some(holder)) {
                return Ok(Some(()));
            }
        }
        while self.tries < MAX_TRIES {
            let rest = self.found.nar_size - at;
            let Some((source, why)) = self.next_source(rest) else { break };
            // Before it is asked: NARs of a peer that is known to be slow wait for nothing.
            let load = self.fetch.paces.load(source.who(), Instant::now());
            let time = picker::time_left(&load.with(rest), None, rest);
            if let Some(why) = time.and_then(|time| self.upstream_is_faster(time)) {
                return Err(DownloadError::Upstream(why));
            }
            let patience = if self.may_have_another() { FIRST_BYTE } else { STALL.get() };
            let patience = patience.min(self.left(Instant::now()));
            if patience.is_zero() {
                break;
            }
            self.tries += 1;
            if self.ask(source, at, patience, &why, None) {
                return Ok(Some(()));
            }
            if !self.relays.is_empty() {
                return self.connect(at);
            }
        }
        Ok(None)
    }

    /// Asks a peer for the NAR from a byte on. False if it does not begin to send. `holder`: the
    /// peer is still getting the NAR itself, and that one has it.
    fn ask(
        &mut self,
        mut source: NarSource,
        at: u64,
        patience: Duration,
        why: &str,
        holder: Option<SocketAddr>,
    ) -> bool {
        let (who, began) = (source.who(), Instant::now());
        let mut intake = self.fetch.paces.begin(who, self.found.nar_size - at, began);
        if holder.is_some() {
            // It may wait for its own source before it answers.
            intake.pause(began);
        }
        let url_path = source.nar_path(&self.hash_part, &self.found.nar_hash);
        let mut way = source.take_way();
        if way == LinkKind::Lan
            && source.friend.is_none()
            && self.takes_names
            && at == 0
            && holder.is_none()
        {
            way = LinkKind::LanOrOthers;
        }
        match source.client(&self.fetch.client).nar(
            source.peer,
            &url_path,
            at,
            self.found.nar_size,
            patience,
            &way,
        ) {
            Ok(body) => {
                log::debug!(
                    "NAR {}: from peer {} at byte {at}: {why}",
                    self.found.nar_hash,
                    source.peer
                );
                if at > 0 {
                    log::info!(
                        "NAR {}: continued from peer {} at byte {at}",
                        self.found.nar_hash,
                        source.peer
                    );
                }
                // What is compared with a holder's digests is the holder's word.
                let who = holder.map_or(who, PeerKey::from);
                if !self.contributors.iter().any(|contributor| contributor.who == who) {
                    self.contributors.push(Contributor { who, has_failed: false });
                }
                self.transfer.with(source.network(), source.peer);
                self.transfer.explain(why);
                let counted = match way {
                    LinkKind::Wan(Some(transfer)) => {
                        Some(CountedTransfer { fetch: self.fetch, transfer, bytes: 0 })
                    }
                    _ => None,
                };
                self.current = Some(ActiveSource {
                    source,
                    body,
                    has_begun: false,
                    intake,
                    counted,
                    began,
                    last_read: Instant::now(),
                    read_began: Instant::now(),
                    pause: Duration::ZERO,
                    waited: Duration::ZERO,
                    got: 0,
                    waited_in_all: Duration::ZERO,
                    unlooked: Duration::ZERO,
                    meter: PaceMeter::default(),
                    digests: holder.map(|holder| PieceDigests::of(holder, self.relays.len())),
                });
                return true;
            }
            Err(PeerError::Named(ips)) => {
                self.takes_names = false;
                self.relays_until = Instant::now() + RELAY_PATIENCE.get();
                log::debug!("NAR {}: peer {} names {ips:?}", self.found.nar_hash, source.peer);
                let mut relays = self.fetch.lookup.live_neighbours(&ips);
                relays.retain(|relay| self.is_good(relay.who()) && relay.who() != who);
                let mut seen = HashSet::new();
                relays.retain(|relay| seen.insert(relay.who()));
                self.relays = relays.into_iter().map(|relay| (relay, source.peer)).collect();
                self.found.sources.push(source);
            }
            // It has not begun to get the NAR, or cannot pass it on.
            Err(e) if holder.is_some() => {
                log::debug!("NAR {}: peer {}: {e}", self.found.nar_hash, source.peer)
            }
            Err(PeerError::Busy) => {
                if let Some(left) = self.busy_left.checked_sub(1) {
                    self.busy_left = left;
                    self.again = Some(source);
                }
            }
            // It said that it has the path, not which NAR, nor where: those of the original's kind
            // have it elsewhere.
            Err(PeerError::NotThere)
                if source.url_path.is_none() && source.wan.is_none() && source.friend.is_none() =>
            {
                log::debug!(
                    "NAR {}: peer {} has it elsewhere, or another one",
                    self.found.nar_hash,
                    source.peer
                );
                let left = patience.min(self.left(Instant::now()));
                match self.fetch.lookup.nar_place(source.peer, &self.found, left) {
                    Some(elsewhere) if elsewhere.url_path.is_some() => {
                        self.found.sources.push(elsewhere)
                    }
                    Some(_) => {
                        let why = "says that it has a NAR, and has not";
                        self.fetch.standing.failed(
                            who,
                            Fault::BrokenPromise,
                            began,
                            Instant::now(),
                            &why,
                        );
                    }
                    None => {}
                }
            }
            Err(e) => {
                log::debug!("NAR {}: peer {}: {e}", self.found.nar_hash, source.peer);
                if let Some(fault) = e.fault() {
                    self.fetch.standing.failed(who, fault, began, Instant::now(), &e);
                }
            }
        }
        false
    }

    /// Whether nothing is against the peer.
    fn is_good(&self, who: PeerKey) -> bool {
        let standing = &self.fetch.standing;
        standing.turn(who, Instant::now()) == Eligibility::Now && !standing.is_doubtful(who)
    }

    /// Time until the first piece has to be there; without end when it is.
    fn left(&self, now: Instant) -> Duration {
        self.until.map_or(Duration::MAX, |until| until.saturating_duration_since(now))
    }

    fn may_have_another(&self) -> bool {
        !self.found.sources.is_empty() || self.fetch.lookup.has_trackers()
    }

    /// The best source, which is then no longer among the known ones, and why it is the best.
    fn next_source(&mut self, rest: u64) -> Option<(NarSource, String)> {
        // The smoothed pace of the one that was left may still be the best.
        let moves_to = self.moves_to.take();
        if let Some(place) =
            self.found.sources.iter().position(|source| Some(source.who()) == moves_to)
        {
            return Some((
                self.found.sources.swap_remove(place),
                "twice as fast as the last one".into(),
            ));
        }
        if let Some(best) = self.best(rest) {
            return Some(best);
        }
        if let Some(source) = self.searched() {
            return Some((source, "the only one found by another search".into()));
        }
        let source = self.again.take()?;
        thread::sleep(PAUSE.min(self.left(Instant::now())));
        Some((source, "asked again, as there is no other".into()))
    }

    fn best(&mut self, bytes: u64) -> Option<(NarSource, String)> {
        let (_, holdings) = self.holdings(Instant::now());
        let choice = picker::choose(&holdings, bytes)?;
        self.ask_again(choice.expected.as_secs_f64());
        let (places, holdings) = self.holdings(Instant::now());
        let choice = picker::choose(&holdings, bytes)?;
        let why = format!("best of {}: {}", holdings.len(), holdings[choice.at].load);
        Some((self.found.sources.swap_remove(places[choice.at]), why))
    }

    /// One more source, from a search with narinfos.
    fn searched(&mut self) -> Option<NarSource> {
        let latest = self.until.unwrap_or_else(|| Instant::now() + Duration::from_secs(60));
        loop {
            if let Some(search) = &mut self.search
                && let Some(source) = self.fetch.lookup.next_source(search, &self.found, latest)
            {
                return Some(source);
            }
            if self.searches >= MAX_SEARCHES || Instant::now() >= latest {
                return None;
            }
            self.searches += 1;
            self.search = Some(self.fetch.lookup.search(&self.hash_part));
        }
    }

    /// Leaves the current peer, at that byte.
    fn leave(&mut self, broken: &StreamError, at: u64) {
        let Some(current) = self.current.take() else { return };
        let (hash, peer, now) = (self.found.nar_hash, current.source.peer, Instant::now());
        match broken {
            StreamError::WrongPiece(digest) => {
                log::debug!(
                    "NAR {hash}: peer {peer} passed on another piece than the holder has, at byte {at}"
                );
                let holder = current.digests.as_ref().map(|digests| PeerKey::from(digests.holder));
                self.accusations.extend(holder.map(|holder| DigestMismatch {
                    relay: current.source.who(),
                    holder,
                    began: current.began,
                    at,
                    digest: *digest,
                    is_true: None,
                }));
            }
            // It named others, so it is to tell digests.
            StreamError::Unchecked(is_broken, why) => {
                self.relays.clear();
                if let Some(digests) = &current.digests {
                    log::debug!("NAR {hash}: peer {} does not tell digests: {why}", digests.holder);
                    let holder = PeerKey::from(digests.holder);
                    if *is_broken {
                        self.fetch.standing.failed(
                            holder,
                            Fault::BrokenPromise,
                            current.began,
                            now,
                            why,
                        );
                    }
                }
            }
            // It may have lost its own source, or its Nix was stopped.
            StreamError::Failed(_, why) | StreamError::Slow(why) if current.digests.is_some() => {
                log::debug!(
                    "NAR {hash}: leaves peer {peer}, which is getting it, at byte {at}: {why}"
                );
            }
            StreamError::Slow(why) => {
                log::debug!("NAR {hash}: leaves peer {peer} at byte {at}: {why}");
                self.moves_left -= 1;
                self.found.sources.push(current.source);
            }
            // The caller has left it to the upstream cache.
            StreamError::Upstream(_) => {}
            StreamError::Late => {
                log::debug!("NAR {hash}: the first piece has not come in time from peer {peer}")
            }
            StreamError::Failed(Fault::BrokenStream, why) if current.pause >= LONG_PAUSE => {
                log::debug!("NAR {hash}: peer {peer} closed in a pause: {why}");
                self.found.sources.push(current.source);
            }
            StreamError::Failed(fault, why) => {
                log::debug!("NAR {hash}: peer {peer}: {why}");
                if *fault == Fault::OddPath {
                    self.fetch.client.warn_of_odd_path(&self.hash_part, peer, why);
                }
                let who = current.source.who();
                self.contributors
                    .iter_mut()
                    .filter(|c| c.who == who)
                    .for_each(|c| c.has_failed = true);
                self.fetch.standing.failed(current.source.who(), *fault, current.began, now, why);
                if *fault == Fault::BrokenStream
                    && let Some(left) = self.broken_left.checked_sub(1)
                {
                    self.broken_left = left;
                    self.again = Some(current.source);
                }
            }
        }
    }

    /// What came is wrong, and part of it is with Nix. Which of several peers sent it is not known,
    /// but those that broke off have more against them than those that went on for them. If none
    /// did, as the NAR moved for pace, all have.
    pub(super) fn blame(&mut self, why: &dyn fmt::Display) {
        self.transfer.record_failure();
        let now = Instant::now();
        for (peer, fault) in blamed(&self.contributors) {
            self.fetch.standing.failed(peer, fault, now, now, why);
        }
    }

    /// No peer could deliver the NAR.
    pub(super) fn fail(&self) {
        self.transfer.record_failure();
    }

    /// The whole NAR came, and it was right.
    pub(super) fn delivered(&mut self) {
        let now = Instant::now();
        if let Some(mut current) = self.current.take() {
            current.intake.prove();
            current.body.finish();
        }
        let peers: Vec<String> =
            self.contributors.iter().map(|peer| peer.who.to_string()).collect();
        log::debug!(
            "{}: NAR of {} bytes from peer {}",
            self.hash_part,
            self.found.nar_size,
            peers.join(" and ")
        );
        self.contributors.iter().for_each(|Contributor { who, .. }| {
            self.fetch.standing.delivered(*who, now);
            self.fetch.record.delivered(who.network(), who.address());
        });
        for accusation in &self.accusations {
            let (peer, why) = match accusation.is_true {
                Some(true) => (accusation.relay, "passed on another piece than the holder has"),
                Some(false) => (accusation.holder, "told a wrong digest"),
                None => continue,
            };
            self.fetch.standing.failed(peer, Fault::BadData, accusation.began, now, &why);
        }
        self.transfer.record_whole();
    }
}

/// Time for peers that a holder named, and for its digests: while the first piece has to come,
/// until `relays_until`.
fn relay_time_left(until: Option<Instant>, relays_until: Instant, now: Instant) -> Duration {
    until.map_or(Duration::MAX, |until| until.min(relays_until).saturating_duration_since(now))
}

/// What each peer that may have sent a wrong part of a NAR is blamed for.
fn blamed(contributors: &[Contributor]) -> Vec<(PeerKey, Fault)> {
    let is_known = contributors.iter().any(|peer| peer.has_failed);
    let fault = |peer: &Contributor| {
        if is_known && !peer.has_failed { Fault::BrokenPromise } else { Fault::BadData }
    };
    contributors.iter().map(|peer| (peer.who, fault(peer))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contributor(last: u8, has_failed: bool) -> Contributor {
        Contributor { who: PeerKey::from(SocketAddr::from(([10, 0, 0, last], 1))), has_failed }
    }

    #[test]
    fn relays_and_digests_share_one_time_until_the_first_piece_is_there() {
        let now = Instant::now();
        let (two, five) = (now + Duration::from_secs(2), now + Duration::from_secs(5));
        assert_eq!(relay_time_left(Some(five), two, now), Duration::from_secs(2));
        assert_eq!(relay_time_left(Some(two), five, now), Duration::from_secs(2));
        assert_eq!(relay_time_left(Some(five), two, five), Duration::ZERO);
        assert_eq!(relay_time_left(None, two, five), Duration::MAX);
    }

    #[test]
    fn blame_is_on_those_that_broke_off_or_on_all() {
        let faults = |contributors: &[Contributor]| -> Vec<Fault> {
            blamed(contributors).into_iter().map(|(_, fault)| fault).collect()
        };
        let (bad, little) = (Fault::BadData, Fault::BrokenPromise);
        assert_eq!(faults(&[contributor(1, false)]), [bad]);
        assert_eq!(faults(&[contributor(1, true), contributor(2, false)]), [bad, little]);
        // It was left for its pace: that it went on with another one proves neither.
        assert_eq!(faults(&[contributor(1, false), contributor(2, false)]), [bad, bad]);
        assert_eq!(
            faults(&[contributor(1, false), contributor(2, true), contributor(3, false)]),
            [little, bad, little]
        );
    }
}
