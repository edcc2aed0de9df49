//! NARs from peers, for this machine's Nix. `supply` is where the bytes come from, `verified` what
//! is checked of them.

mod failover;
pub mod spool;
mod verified;

use crate::lookup::{FoundNar, LookupService};
use crate::nix::{HashPart, NarHash};
use crate::peers::client::PeerClient;
use crate::peers::health::PeerHealth;
use crate::peers::pace::Paces;
use crate::stats::Stats;
use crate::time_scale::Timeout;
use crate::upstream::Upstream;
use failover::FailoverReader;
use spool::{SpoolWriter, Spools};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use verified::{IncompleteNar, Piece, VerifiedStream, part};

/// By then the first piece is there, or Nix is told that the NAR is not: it waits for an answer.
const START: Timeout = Timeout::from_secs(20);

/// A NAR that was cut when part of it was with Nix already, as it was wrong or is left to the
/// upstream cache, is not continued for so long: Nix asks for the rest within a second.
const NOT_CONTINUED: Duration = Duration::from_secs(60);
/// A NAR that was left to the upstream cache is not left again for so long: Nix did not get it
/// there.
const NOT_LEFT_AGAIN: Duration = Duration::from_secs(600);
/// Such NARs remembered. Beyond, all are forgotten.
const MAX_GIVEN_UP: usize = 1024;

/// Why a NAR was cut.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AbortReason {
    /// What Nix got of it was wrong.
    Wrong,
    /// The upstream cache is faster.
    Left,
}

/// Gets NARs from peers.
pub struct Downloader {
    lookup: Arc<LookupService>,
    client: Arc<PeerClient>,
    standing: Arc<PeerHealth>,
    paces: Arc<Paces>,
    record: Arc<Stats>,
    upstream: Upstream,
    /// NARs that neighbours may have while they come.
    pub spools: Spools,
    given_up: Mutex<HashMap<NarHash, (Instant, AbortReason)>>,
}

impl Downloader {
    /// The parts it works with.
    pub fn new(
        lookup: Arc<LookupService>,
        client: Arc<PeerClient>,
        standing: Arc<PeerHealth>,
        paces: Arc<Paces>,
        record: Arc<Stats>,
        upstream: Upstream,
        spools: Spools,
    ) -> Self {
        Downloader {
            lookup,
            client,
            standing,
            paces,
            record,
            upstream,
            spools,
            given_up: Mutex::default(),
        }
    }

    /// Gives back the memory of what nobody asked for lately.
    pub fn rest(&self) {
        self.lookup.rest();
        self.client.rest();
    }

    /// A NAR that some peer says it has. Blocks until one does, for 20 s at most.
    pub fn find(&self, hash_part: &HashPart, nar_hash: &NarHash) -> Option<Download<'_>> {
        let asked = Instant::now();
        let until = asked + START.get();
        let found = self.lookup.find(hash_part, nar_hash, until)?;
        Some(Download { asked, until, hash: *nar_hash, size: found.nar_size, found, fetch: self })
    }

    /// Whether the rest of this NAR is not passed on, as it was cut lately on purpose.
    pub fn is_cut(&self, nar_hash: NarHash) -> bool {
        self.given_up(nar_hash).is_some_and(|(at, _)| at.elapsed() < NOT_CONTINUED)
    }

    fn may_leave(&self, nar_hash: NarHash) -> bool {
        self.given_up(nar_hash)
            .is_none_or(|(at, why)| why != AbortReason::Left || at.elapsed() >= NOT_LEFT_AGAIN)
    }

    fn given_up(&self, nar_hash: NarHash) -> Option<(Instant, AbortReason)> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner).get(&nar_hash).copied()
    }

    fn give_up(&self, nar_hash: NarHash, why: AbortReason) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up.len() >= MAX_GIVEN_UP {
            given_up.clear();
        }
        given_up.insert(nar_hash, (Instant::now(), why));
    }
}

/// A NAR that a peer says it has.
pub struct Download<'a> {
    fetch: &'a Downloader,
    /// When this machine asked for it.
    asked: Instant,
    /// The first piece has to be there by then.
    until: Instant,
    hash: NarHash,
    size: u64,
    found: FoundNar,
}

/// A NAR of which the first piece has come.
pub struct StartedDownload<'a> {
    fetch: &'a Downloader,
    supply: FailoverReader<'a>,
    /// Neighbours have it from there while it comes.
    keeping: Option<SpoolWriter<'a>>,
    hash: NarHash,
    incoming: VerifiedStream,
    first: Piece,
}

/// Why a NAR could not be passed on as a whole.
#[derive(Debug)]
enum DownloadError {
    /// No peer is left.
    NoPeer(String),
    /// What came is wrong, or beyond what Nix takes.
    Wrong(String),
    /// Nix gets it sooner from the upstream cache.
    Upstream(String),
}

impl fmt::Display for DownloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (DownloadError::NoPeer(why) | DownloadError::Wrong(why) | DownloadError::Upstream(why)) =
            self;
        f.write_str(why)
    }
}

impl std::error::Error for DownloadError {}

impl<'a> Download<'a> {
    /// Bytes in the whole NAR.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gets the first piece, from whichever peer gives it. `None`: none does within 20 s of
    /// [`Downloader::find`], or the upstream cache is certain to be faster.
    pub fn start(self) -> Option<StartedDownload<'a>> {
        let Download { fetch, asked, until, hash, size, found } = self;
        // Before any peer is asked: who is named to a neighbour is asked at once.
        let keeping = fetch.spools.begin(found.path.base_name(), hash, found.nar_size);
        let mut supply = FailoverReader::new(fetch, found, until, fetch.may_leave(hash));
        // A first piece that is the whole NAR has to be right before any of it is passed on.
        let is_right = |incoming: &VerifiedStream, piece: &Piece| {
            incoming.rest() > 0 || incoming.is_right(piece)
        };
        let (incoming, first) = match supply.first_piece(is_right) {
            Ok(begun) => begun,
            Err(cut) => {
                log::debug!("NAR {hash}: not begun: {cut}");
                supply.fail();
                if matches!(cut, DownloadError::Upstream(_)) {
                    fetch.give_up(hash, AbortReason::Left);
                    fetch.upstream.left(size);
                }
                return None;
            }
        };
        if let Some(source) = supply.current() {
            fetch.record.first_byte(source.network(), asked.elapsed());
        }
        Some(StartedDownload { fetch, supply, keeping, hash, incoming, first })
    }
}

impl StartedDownload<'_> {
    /// Passes the range of the NAR on. All before its end is fetched, or it could not be checked.
    ///
    /// # Errors
    /// The writer's, or no peer is left, or what came is wrong: then the last piece was not
    /// written.
    pub fn relay(self, range: &Range<u64>, out: &mut dyn Write) -> io::Result<()> {
        let StartedDownload { fetch, mut supply, mut keeping, hash, mut incoming, first } = self;
        if incoming.rest() == 0 {
            out.write_all(part(first.bytes(), 0, range))?;
            supply.delivered();
            return Ok(());
        }
        let next = |incoming: &mut VerifiedStream, piece: &mut Piece| {
            supply.next_piece(incoming, piece).map_err(io::Error::other)
        };
        let keep =
            |piece: Arc<Piece>| keeping.iter_mut().for_each(|keeping| keeping.push(piece.clone()));
        let passed = incoming.pass_on(first, range, out, next, keep);
        let wrong = match passed {
            Ok(()) => {
                if incoming.rest() == 0 {
                    supply.delivered();
                }
                return Ok(());
            }
            Err(IncompleteNar::Hash) => "sent a NAR with another hash".to_owned(),
            Err(IncompleteNar::Io(e)) => {
                match e.get_ref().and_then(|e| e.downcast_ref::<DownloadError>()) {
                    Some(DownloadError::Wrong(why)) => why.clone(),
                    Some(cut) => {
                        log::info!("NAR {hash}: cut: {cut}");
                        supply.fail();
                        if matches!(cut, DownloadError::Upstream(_)) {
                            fetch.give_up(hash, AbortReason::Left);
                            fetch.upstream.left(incoming.at() + incoming.rest());
                        }
                        return Err(e);
                    }
                    None => return Err(e),
                }
            }
        };
        fetch.give_up(hash, AbortReason::Wrong);
        let why = format!("NAR {hash}: {wrong}");
        supply.blame(&why);
        Err(io::Error::other(why))
    }
}
