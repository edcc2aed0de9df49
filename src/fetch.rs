//! Downloads NARs from peers for this machine's Nix.
//!
//! `failover` reads from one peer, and from the next when that fails or is slow. `requests`
//! connects to the peer that `sources` chooses, and `peer_stream` reads from it. `relay` compares a
//! peer that is still downloading the NAR with a holder. `contributors` finds the peer at fault.
//! `verified` checks the bytes before Nix gets them. `spool` keeps large NARs in a file, so that
//! neighbours can get them during the download.

mod contributors;
mod failover;
mod peer_stream;
mod relay;
mod requests;
mod sources;
pub mod spool;
mod verified;

use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
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
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};
use verified::{IncompleteNar, Piece, VerifiedStream, part};

/// Maximum time from Nix's request to the first piece of the NAR. After it, Nix gets 404.
const FIRST_PIECE_TIMEOUT: Timeout = Timeout::from_secs(20);

/// Time during which [`Downloader::is_cut`] refuses a NAR whose transfer was cut on purpose. Nix
/// retries such a transfer within a second.
const RESUME_REFUSED_FOR: Duration = Duration::from_secs(60);
/// Time during which a NAR is not left to the upstream cache a second time. Nix asked here again,
/// so it did not get the NAR there.
const UPSTREAM_LEAVE_INTERVAL: Duration = Duration::from_secs(600);
/// Maximum number of NARs in `Downloader::given_up`. At the bound, the oldest is forgotten.
const MAX_GIVEN_UP: usize = 1024;

/// Why a transfer was cut on purpose.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AbortReason {
    /// The NAR was malformed, unsupported or had another hash.
    Wrong,
    /// The upstream cache is faster.
    Left,
}

/// Downloads NARs from peers. Shared by all threads.
pub struct Downloader {
    lookup: Arc<LookupService>,
    client: Arc<PeerClient>,
    health: Arc<PeerHealth>,
    paces: Arc<Paces>,
    stats: Arc<Stats>,
    upstream: Upstream,
    /// Large NARs during their download, for the HTTP server to pass on to neighbours.
    pub spools: Spools,
    given_up: Mutex<BoundedMap<NarHash, (Instant, AbortReason), MAX_GIVEN_UP>>,
}

impl Downloader {
    /// Creates a downloader. `lookup` finds peers, `client` requests NARs, `health` and `paces`
    /// rank the peers, and `stats` counts the transfers.
    pub fn new(
        lookup: Arc<LookupService>,
        client: Arc<PeerClient>,
        health: Arc<PeerHealth>,
        paces: Arc<Paces>,
        stats: Arc<Stats>,
        upstream: Upstream,
        spools: Spools,
    ) -> Self {
        Downloader {
            lookup,
            client,
            health,
            paces,
            stats,
            upstream,
            spools,
            given_up: Mutex::default(),
        }
    }

    /// Frees the memory of found paths, and idle connections.
    pub fn free_memory(&self) {
        self.lookup.free_memory();
        self.client.close_idle_connections();
    }

    /// Finds a peer that claims to have the NAR. Blocks for at most 20 s.
    pub fn find(&self, hash_part: &HashPart, nar_hash: &NarHash) -> Option<Download<'_>> {
        let asked = Instant::now();
        let deadline = asked + FIRST_PIECE_TIMEOUT.get();
        let found = self.lookup.find(hash_part, nar_hash, deadline)?;
        Some(Download { downloader: self, asked, deadline, found })
    }

    /// Whether the transfer of this NAR was cut on purpose in the last 60 s.
    pub fn is_cut(&self, nar_hash: NarHash) -> bool {
        self.given_up(nar_hash).is_some_and(|(at, _)| at.elapsed() < RESUME_REFUSED_FOR)
    }

    fn may_leave(&self, nar_hash: NarHash) -> bool {
        self.given_up(nar_hash).is_none_or(|(at, reason)| {
            reason != AbortReason::Left || at.elapsed() >= UPSTREAM_LEAVE_INTERVAL
        })
    }

    fn given_up(&self, nar_hash: NarHash) -> Option<(Instant, AbortReason)> {
        self.given_up.lock().get(&nar_hash).copied()
    }

    fn leave_to_upstream(&self, nar_hash: NarHash, nar_size: u64) {
        self.give_up(nar_hash, AbortReason::Left);
        self.upstream.record_left_nar(nar_size);
    }

    fn give_up(&self, nar_hash: NarHash, reason: AbortReason) {
        self.given_up.lock().insert(nar_hash, (Instant::now(), reason));
    }
}

/// A NAR that a peer claims to have.
pub struct Download<'a> {
    downloader: &'a Downloader,
    /// When Nix asked for the NAR.
    asked: Instant,
    /// Deadline for the first piece.
    deadline: Instant,
    found: FoundNar,
}

/// A download whose first piece is there and checked.
pub struct StartedDownload<'a> {
    downloader: &'a Downloader,
    reader: FailoverReader<'a>,
    /// Writes the NAR to a file for neighbours, if it is kept.
    spool_writer: Option<SpoolWriter<'a>>,
    hash: NarHash,
    incoming: VerifiedStream,
    first: Piece,
}

/// Why a NAR could not be passed on as a whole.
#[derive(Debug)]
enum DownloadError {
    /// No peer is left that could send the rest.
    NoPeer(String),
    /// The bytes are malformed or have the wrong hash.
    Wrong(String),
    /// peerix or Nix does not support the NAR.
    Unsupported(String),
    /// Nix gets the NAR sooner from the upstream cache.
    Upstream(String),
}

impl fmt::Display for DownloadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DownloadError::NoPeer(why)
            | DownloadError::Wrong(why)
            | DownloadError::Unsupported(why)
            | DownloadError::Upstream(why) => f.write_str(why),
        }
    }
}

impl std::error::Error for DownloadError {}

impl<'a> Download<'a> {
    /// Size of the whole NAR in bytes.
    pub fn size(&self) -> u64 {
        self.found.nar_size
    }

    /// Gets the first piece from any of the peers. Blocks until 20 s after the call of
    /// [`Downloader::find`] at most. Returns `None` if no peer sends the piece by then, or if the
    /// upstream cache is certain to be faster.
    pub fn start(self) -> Option<StartedDownload<'a>> {
        let Download { downloader, asked, deadline, found } = self;
        let (hash, size) = (found.nar_hash, found.nar_size);
        // The spool begins before the request: the asked peer may name this node to a neighbour,
        // which then asks this node at once.
        let spool_writer = downloader.spools.begin(found.path.base_name(), hash, size);
        let mut reader =
            FailoverReader::new(downloader, found, deadline, downloader.may_leave(hash));
        let (incoming, first) = match reader.first_piece() {
            Ok(started) => started,
            Err(error) => {
                log::debug!("NAR {hash}: not begun: {error}");
                reader.record_failed();
                if matches!(error, DownloadError::Upstream(_)) {
                    downloader.leave_to_upstream(hash, size);
                }
                return None;
            }
        };
        if let Some(source) = reader.current() {
            downloader.stats.record_first_byte(source.network(), asked.elapsed());
        }
        Some(StartedDownload { downloader, reader, spool_writer, hash, incoming, first })
    }
}

impl StartedDownload<'_> {
    /// Writes `range` of the NAR to `out`. Downloads everything before the end of the range, as the
    /// hash covers it. Blocks until `range` is written or the transfer fails.
    ///
    /// # Errors
    /// Returns the error of `out`, or an error of its own if no peer is left, if the NAR is wrong,
    /// or if the upstream cache is faster. If the hash is wrong, the last piece is not written.
    pub fn relay(self, range: &Range<u64>, out: &mut dyn Write) -> io::Result<()> {
        let Self { downloader, mut reader, mut spool_writer, hash, mut incoming, first } = self;
        if incoming.rest() == 0 {
            out.write_all(part(first.bytes(), 0, range))?;
            reader.record_delivered();
            return Ok(());
        }
        let next = |incoming: &mut VerifiedStream, piece: &mut Piece| {
            reader.next_piece(incoming, piece).map_err(io::Error::other)
        };
        let keep = |piece: Arc<Piece>| {
            spool_writer.iter_mut().for_each(|writer| writer.push(piece.clone()))
        };
        let fault = match incoming.pass_on(first, range, out, next, keep) {
            Ok(()) => {
                if incoming.rest() == 0 {
                    reader.record_delivered();
                }
                return Ok(());
            }
            Err(IncompleteNar::Hash) => "sent a NAR with another hash".to_owned(),
            Err(IncompleteNar::Unsupported(why)) => {
                log::info!("NAR {hash}: cut: {why}");
                reader.record_unsupported(why);
                downloader.give_up(hash, AbortReason::Wrong);
                return Err(io::Error::other(DownloadError::Unsupported(why.to_string())));
            }
            Err(IncompleteNar::Io(e)) => match e.downcast()? {
                DownloadError::Wrong(why) => why,
                error => {
                    log::info!("NAR {hash}: cut: {error}");
                    reader.record_failed();
                    match &error {
                        DownloadError::Upstream(_) => downloader
                            .leave_to_upstream(hash, incoming.received() + incoming.rest()),
                        DownloadError::Unsupported(_) => {
                            downloader.give_up(hash, AbortReason::Wrong)
                        }
                        DownloadError::NoPeer(_) | DownloadError::Wrong(_) => {}
                    }
                    return Err(io::Error::other(error));
                }
            },
        };
        downloader.give_up(hash, AbortReason::Wrong);
        let why = format!("NAR {hash}: {fault}");
        reader.record_wrong_nar(&why);
        Err(io::Error::other(why))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::degraded::Degraded;
    use crate::lookup::NarSource;
    use crate::nix::{StorePath, nar};
    use crate::peers::health::Eligibility;
    use crate::peers::test_server::serve;
    use crate::trust::TrustedKeys;
    use std::net::SocketAddr;
    use std::thread::JoinHandle;

    /// A NAR of a directory with a file of `size` bytes and a path of more than 4,095 bytes after
    /// it, which peerix does not support.
    pub(super) fn odd_nar(size: usize) -> Vec<u8> {
        let directory = |out: &mut Vec<u8>, name: &str| {
            nar::entry_open(out, name.as_bytes());
            out.extend(nar::DIRECTORY_OPEN);
        };
        let mut bytes = nar::MAGIC.to_vec();
        bytes.extend(nar::DIRECTORY_OPEN);
        nar::entry_open(&mut bytes, b"a");
        nar::regular_open(&mut bytes, false, size as u64);
        bytes.resize(bytes.len() + size, 7);
        bytes.extend(nar::padding(size as u64));
        bytes.extend([nar::CLOSE, nar::CLOSE].concat());
        let levels = nar::MAX_PATH_LEN / 2 + 1;
        (0..levels).for_each(|_| directory(&mut bytes, "d"));
        (0..2 * levels + 1).for_each(|_| bytes.extend(nar::CLOSE));
        bytes
    }

    /// Starts a peer that announces the hash of a NAR as `nar_hash` and sends `sent` bytes of it.
    pub(super) fn peer_with(
        nar: Vec<u8>,
        nar_hash: Option<NarHash>,
        sent: usize,
    ) -> (FoundNar, JoinHandle<Vec<(String, String)>>) {
        let digest = ring::digest::digest(&ring::digest::SHA256, &nar);
        let digest = NarHash::from_bytes(digest.as_ref().try_into().unwrap());
        let nar_size = nar.len() as u64;
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {nar_size}\r\n\r\n");
        let answer = [head.as_bytes(), &nar[..sent.min(nar.len())]].concat();
        let (peer, serving) = serve(vec![answer], true);
        let path = StorePath::parse(&format!("{}-odd", "0".repeat(32))).unwrap();
        let source = NarSource { peer, url_path: Some("x.nar".into()), wan: None, friend: None };
        let nar_hash = nar_hash.unwrap_or(digest);
        (FoundNar { path, nar_hash, nar_size, sources: vec![source] }, serving)
    }

    /// A downloader without neighbours and trackers.
    pub(super) fn downloader() -> Downloader {
        let config = Config::default();
        let trusted = Arc::new(TrustedKeys::read(&config, 1, None, &Degraded::default()));
        let stats = Arc::new(Stats::new());
        Downloader::new(
            Arc::new(LookupService::new(None, None, None, trusted, stats.clone())),
            Arc::new(PeerClient::new(config.store_dir.clone())),
            Arc::new(PeerHealth::default()),
            Arc::new(Paces::default()),
            stats,
            Upstream::new(&config, &[]),
            Spools::new(None),
        )
    }

    /// Passes a NAR of [`peer_with`] on whose framing is not supported after the first piece.
    /// Returns the health of peers, and the peer.
    fn pass_odd_nar_on(nar_hash: Option<NarHash>, sent: usize) -> (Arc<PeerHealth>, SocketAddr) {
        let downloader = downloader();
        let (found, serving) = peer_with(odd_nar(2 << 20), nar_hash, sent);
        let (peer, hash, size) = (found.sources[0].peer, found.nar_hash, found.nar_size);
        let asked = Instant::now();
        let deadline = asked + Duration::from_secs(20);
        let download = Download { downloader: &downloader, asked, deadline, found };
        let mut out = Vec::new();
        let failed = download.start().unwrap().relay(&(0..size), &mut out).unwrap_err();
        assert!(!out.is_empty() && (out.len() as u64) < size, "{failed}");
        let health = downloader.health.clone();
        // Nix, which resumes the transfer, gets a 404 and tries its next substituter.
        assert!(downloader.is_cut(hash) || health.is_doubtful(peer), "{failed}");
        serving.join().unwrap();
        (health, peer)
    }

    #[test]
    fn unsupported_path_after_first_piece_is_not_held_against_peer() {
        let (health, peer) = pass_odd_nar_on(None, usize::MAX);
        assert!(!health.is_doubtful(peer));
        assert_eq!(health.eligibility(peer, Instant::now()), Eligibility::Now);
    }

    /// Regression test: a peer cut every NAR by unsupported bytes that it had invented.
    #[test]
    fn invented_unsupported_path_is_held_against_peer() {
        let (health, peer) = pass_odd_nar_on(Some(NarHash::from_bytes([7; 32])), usize::MAX);
        assert!(health.is_doubtful(peer), "another hash");
        // The unsupported bytes are there, and the end of the NAR is missing.
        let (health, peer) = pass_odd_nar_on(None, odd_nar(2 << 20).len() - 100);
        assert!(health.is_doubtful(peer), "broken off");
    }
}
