//! A NAR from peers, on its way to this machine's Nix: hashed and framing-checked as it passes, and continued from
//! another peer at the same byte when one fails.
//!
//! Nix unpacks while it downloads, as root, before it knows the hash. So nothing malformed is passed on, and the last
//! piece only when size and hash are right. A NAR of one piece, as most are, is checked before Nix sees any of it.

use crate::lookup::{Lookup, Search, Source};
use crate::nix::{Framing, HashPart, NarHash};
use crate::peers::client::{Client, Error, NarBody, STALL, TOO_SLOW, Way};
use crate::peers::standing::{Fault, Standing, Who};
use crate::record::{Record, Transfer};
use crate::time_scale::Timeout;
use crate::wire::tracker::TransferName;
use crossbeam_channel::{Receiver, Sender, bounded};
use ring::digest::{Context, SHA256};
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes that are read, checked and passed on at once.
const PIECE: usize = 256 * 1024;

/// Pieces that wait for the hashing thread: enough that neither waits for the other's hiccups.
const QUEUE: usize = 2;

/// Peers tried for one NAR in all. A NAR that twelve peers could not deliver will not come.
const MAX_TRIES: u32 = 12;
/// A peer that answered 503, or broke off, is asked again after this, if there is no other.
const PAUSE: Duration = Duration::from_secs(1);
/// A busy one so often: then Nix is better served by its next substituter.
const MAX_BUSY: u32 = 10;
/// One that broke off so often.
const MAX_BROKEN: u32 = 1;
/// Times the LAN is asked anew for one NAR.
const MAX_SEARCHES: u32 = 3;

/// A peer's pace is looked at each time it was waited for so long.
const PACE_WINDOW: Timeout = Timeout::from_secs(5);
/// A peer that is slower than this, in bytes a second, is left for another one if there is one.
const SLOW: u64 = 128 * 1024;

/// A peer begins to send within this, if there may be another; else within [`STALL`].
const FIRST_BYTE: Duration = Duration::from_secs(2);
/// By then the first piece is there, or Nix is told that the NAR is not: it waits for an answer.
const START: Timeout = Timeout::from_secs(20);

/// After a pause this long, which Nix made, a peer that closed the connection is not to blame.
const LONG_PAUSE: Duration = Duration::from_secs(20);

/// A NAR that turned out wrong when part of it was with Nix already is not continued for so long: Nix asks for the rest
/// within a second.
const TAINTED_FOR: Duration = Duration::from_secs(60);
/// Such NARs remembered.
const MAX_TAINTED: usize = 256;

/// Gets NARs from peers.
pub struct Fetch {
    lookup: Arc<Lookup>,
    client: Arc<Client>,
    standing: Arc<Standing>,
    record: Arc<Record>,
    tainted: Mutex<HashMap<NarHash, Instant>>,
}

impl Fetch {
    /// The parts it works with.
    pub fn new(lookup: Arc<Lookup>, client: Arc<Client>, standing: Arc<Standing>, record: Arc<Record>) -> Self {
        Fetch { lookup, client, standing, record, tainted: Mutex::default() }
    }

    /// A NAR that some peer says it has.
    pub fn find(&self, hash_part: &HashPart, nar_hash: &NarHash) -> Option<Nar<'_>> {
        let asked = Instant::now();
        let (source, search) = self.lookup.sources(hash_part, nar_hash)?;
        let nar_size = source.nar_size;
        Some(Nar {
            fetch: self,
            asked,
            transfer: None,
            hash: *nar_hash,
            size: nar_size,
            range: 0..nar_size,
            next: Some(source),
            search,
            searches: 1,
            tries: 0,
            again: None,
            busy_left: MAX_BUSY,
            broken_left: MAX_BROKEN,
            current: None,
            contributors: Vec::new(),
            framing: Framing::with_nar_size(nar_size),
            at: 0,
            first: None,
            start_until: None,
            checked: false,
        })
    }

    /// Whether part of this NAR, and a wrong one, was passed on lately.
    pub fn is_tainted(&self, nar_hash: NarHash) -> bool {
        let tainted = self.tainted.lock().unwrap_or_else(PoisonError::into_inner);
        tainted.get(&nar_hash).is_some_and(|since| since.elapsed() < TAINTED_FOR)
    }

    fn taint(&self, nar_hash: NarHash) {
        let mut tainted = self.tainted.lock().unwrap_or_else(PoisonError::into_inner);
        if tainted.len() >= MAX_TAINTED {
            tainted.clear();
        }
        tainted.insert(nar_hash, Instant::now());
    }
}

/// One NAR under way.
pub struct Nar<'a> {
    fetch: &'a Fetch,
    /// When this machine asked for it.
    asked: Instant,
    /// For the record, once it begins.
    transfer: Option<Transfer<'a>>,
    hash: NarHash,
    size: u64,
    /// What Nix wants of it. All before the range's end is fetched, or it could not be checked.
    range: Range<u64>,
    next: Option<Source>,
    search: Search,
    searches: u32,
    tries: u32,
    /// The last peer that may be asked again, and how often more.
    again: Option<Source>,
    busy_left: u32,
    broken_left: u32,
    current: Option<Current<'a>>,
    contributors: Vec<Who>,
    framing: Framing,
    /// Bytes received and framing-checked.
    at: u64,
    first: Option<Piece>,
    /// While the first piece has to come by then.
    start_until: Option<Instant>,
    /// The first piece is the whole NAR, and its hash is right.
    checked: bool,
}

/// The peer that is sending.
struct Current<'a> {
    source: Source,
    body: NarBody,
    received: Option<Received<'a>>,
    began: Instant,
    last_read: Instant,
    /// How long Nix kept us from reading before the last read.
    pause: Duration,
    /// Time waited for the peer in this pace window, and bytes that came in it.
    waited: Duration,
    got: u64,
}

/// What came of a transfer that a tracker counts; reported when it is over, however it ends.
struct Received<'a> {
    lookup: &'a Lookup,
    transfer: TransferName,
    bytes: u64,
}

impl Drop for Received<'_> {
    fn drop(&mut self) {
        self.lookup.received(&self.transfer, self.bytes);
    }
}

/// Why a peer's stream ended.
struct Broken {
    fault: Fault,
    why: String,
}

impl Broken {
    fn new(fault: Fault, why: impl fmt::Display) -> Self {
        Broken { fault, why: why.to_string() }
    }
}

impl Nar<'_> {
    /// Bytes in the whole NAR.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gets the first piece, from whichever peer gives it. `None`: none does.
    pub fn start(&mut self, range: Range<u64>) -> Option<()> {
        self.range = range;
        let path = self.next.as_ref().map(|source| source.path.base_name()).unwrap_or_default();
        self.transfer = Some(self.fetch.record.receive(path, self.size));
        let started = self.first_piece();
        match (&started, &self.current, &self.transfer) {
            (Some(()), Some(current), _) => {
                self.fetch.record.first_byte(current.source.network(), self.asked.elapsed())
            }
            (None, _, Some(transfer)) => transfer.has_failed(),
            _ => {}
        }
        started
    }

    fn first_piece(&mut self) -> Option<()> {
        let mut piece = Piece::new(self.size);
        let until = Instant::now() + START.get();
        self.start_until = Some(until);
        while Instant::now() < until {
            self.connect()?;
            piece.filled = 0;
            match self.fill(&mut piece).and_then(|()| self.check_whole(piece.bytes())) {
                Ok(()) => {
                    self.start_until = None;
                    self.first = Some(piece);
                    return Some(());
                }
                Err(broken) => self.drop_current(&broken),
            }
            // Nothing has been passed on, so the next peer can begin from the beginning.
            self.framing = Framing::with_nar_size(self.size);
            self.at = 0;
            self.contributors.clear();
        }
        None
    }

    /// Passes the NAR, or the range of it, on.
    ///
    /// # Errors
    /// The writer's, or no peer is left, or what came is wrong: then the last piece was not written.
    pub fn relay(mut self, out: &mut dyn Write) -> io::Result<()> {
        let first = self.first.take().ok_or_else(|| io::Error::other("NAR not started"))?;
        if self.checked {
            out.write_all(part(first.bytes(), 0, &self.range))?;
            self.delivered();
            return Ok(());
        }
        let (pieces, queue) = bounded(QUEUE);
        let (recycle, recycled) = bounded(QUEUE + 2);
        thread::scope(|scope| {
            let hashing =
                thread::Builder::new().name("nar-hash".into()).spawn_scoped(scope, move || hash(&queue, &recycle))?;
            self.pass_on(first, pieces, &recycled, out, || hashing.join().ok())
        })
    }

    fn pass_on(
        &mut self,
        mut piece: Piece,
        pieces: Sender<Arc<Piece>>,
        recycled: &Receiver<Piece>,
        out: &mut dyn Write,
        digest: impl FnOnce() -> Option<NarHash>,
    ) -> io::Result<()> {
        let mut from = 0;
        while self.at < self.size {
            let shared = Arc::new(piece);
            let _ = pieces.send(shared.clone());
            out.write_all(part(shared.bytes(), from, &self.range))?;
            from = self.at;
            if from >= self.range.end {
                // Nix wanted no more; it cannot take a part for the whole.
                return Ok(());
            }
            piece = recycled.try_recv().unwrap_or_else(|_| Piece::new(self.size));
            piece.filled = 0;
            self.next_piece(&mut piece)?;
        }
        let last = Arc::new(piece);
        let _ = pieces.send(last.clone());
        drop(pieces);
        if digest() != Some(self.hash) {
            return Err(self.wrong(&"sent a NAR with another hash"));
        }
        out.write_all(part(last.bytes(), from, &self.range))?;
        self.delivered();
        Ok(())
    }

    /// One more piece, from whichever peer gives it.
    fn next_piece(&mut self, piece: &mut Piece) -> io::Result<()> {
        loop {
            if self.current.is_none() && self.connect().is_none() {
                let why = format!("NAR {}: no peer left at byte {} of {}", self.hash, self.at, self.size);
                log::warn!("{why}");
                self.transfer.iter().for_each(Transfer::has_failed);
                return Err(io::Error::other(why));
            }
            match self.fill(piece) {
                Ok(()) => return Ok(()),
                // The framing has seen the bad bytes, and who knows which bytes before were bad.
                Err(Broken { fault: Fault::BadData, why }) => return Err(self.wrong(&why)),
                Err(broken) => self.drop_current(&broken),
            }
        }
    }

    /// Reads the rest of a piece from the current peer.
    fn fill(&mut self, piece: &mut Piece) -> Result<(), Broken> {
        let Some(current) = &mut self.current else {
            return Err(Broken::new(Fault::BrokenStream, "not connected"));
        };
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        let mut want = left.min(piece.buffer.len() - piece.filled);
        while want > 0 {
            let began = Instant::now();
            current.pause = began - current.last_read;
            let skip = current.body.skip;
            // What is skipped goes to the same place, and is written over.
            let most = if skip == 0 { want } else { want.min(usize::try_from(skip).unwrap_or(want)) };
            let room = piece.filled..piece.filled + most;
            let room = &mut piece.buffer[room];
            let got = current
                .body
                .read(room)
                .map_err(|e| Broken::new(Fault::BrokenStream, format_args!("stream broke at byte {}: {e}", self.at)))?;
            if got == 0 {
                let why = format_args!("stream ended at byte {} of {}", self.at, self.size);
                return Err(Broken::new(Fault::BrokenStream, why));
            }
            if skip > 0 {
                current.body.skip -= got as u64;
            } else {
                self.framing.push(&room[..got]).map_err(|e| Broken::new(Fault::BadData, e))?;
                piece.filled += got;
                self.at += got as u64;
                want -= got;
            }
            current.last_read = Instant::now();
            current.got += got as u64;
            if let Some(transfer) = &self.transfer {
                transfer.moved(got as u64);
                transfer.progress(self.at);
            }
            if let Some(received) = &mut current.received {
                received.bytes += got as u64;
            }
            current.waited += current.last_read - began;
            if current.waited >= PACE_WINDOW.get() {
                let pace = (current.got as f64 / current.waited.as_secs_f64()) as u64;
                if pace < TOO_SLOW || pace < SLOW && self.search.has_more() {
                    return Err(Broken::new(Fault::BrokenStream, format_args!("too slow, {pace} bytes a second")));
                }
                (current.waited, current.got) = (Duration::ZERO, 0);
            }
        }
        Ok(())
    }

    /// Connects to the next peer, at the byte that is wanted next.
    fn connect(&mut self) -> Option<()> {
        while self.tries < MAX_TRIES {
            self.tries += 1;
            let mut source = self.next_source()?;
            let began = Instant::now();
            let patience = if self.search.may_have_more() { FIRST_BYTE } else { STALL.get() };
            let left = self.start_until.map(|until| until.saturating_duration_since(began).max(FIRST_BYTE));
            let patience = left.map_or(patience, |left| patience.min(left));
            let client = &self.fetch.client;
            let way = source.take_way();
            match client.nar(source.peer, &source.url_path, self.at, self.size, patience, &way) {
                Ok(body) => {
                    if self.at > 0 {
                        log::info!("NAR {}: continued from peer {} at byte {}", self.hash, source.peer, self.at);
                    }
                    if !self.contributors.contains(&source.who()) {
                        self.contributors.push(source.who());
                    }
                    if let Some(transfer) = &mut self.transfer {
                        transfer.with(source.network(), source.peer);
                    }
                    let last_read = Instant::now();
                    let received = match way {
                        Way::Wan(Some(transfer)) => Some(Received { lookup: &self.fetch.lookup, transfer, bytes: 0 }),
                        _ => None,
                    };
                    self.current = Some(Current {
                        source,
                        body,
                        received,
                        began,
                        last_read,
                        pause: Duration::ZERO,
                        waited: Duration::ZERO,
                        got: 0,
                    });
                    return Some(());
                }
                Err(Error::Busy) => {
                    if let Some(left) = self.busy_left.checked_sub(1) {
                        self.busy_left = left;
                        self.again = Some(source);
                    }
                }
                Err(e) => {
                    log::debug!("NAR {}: peer {}: {e}", self.hash, source.peer);
                    if let Some(fault) = e.fault() {
                        self.fetch.standing.failed(source.who(), fault, began, Instant::now(), &e);
                    }
                }
            }
        }
        None
    }

    fn next_source(&mut self) -> Option<Source> {
        if let Some(source) = self.next.take() {
            return Some(source);
        }
        if let Some(source) = self.next_found() {
            return Some(source);
        }
        let source = self.again.take()?;
        thread::sleep(PAUSE);
        Some(source)
    }

    fn next_found(&mut self) -> Option<Source> {
        loop {
            self.search.resume();
            if let Some(source) = self.fetch.lookup.next_source(&mut self.search, &self.hash, Some(self.size)) {
                return Some(source);
            }
            if self.searches >= MAX_SEARCHES {
                return None;
            }
            self.searches += 1;
            let hash_part = *self.search.hash_part();
            self.search = self.fetch.lookup.search(&hash_part);
        }
    }

    fn drop_current(&mut self, broken: &Broken) {
        let Some(current) = self.current.take() else { return };
        let peer = current.source.peer;
        if broken.fault == Fault::BrokenStream && current.pause >= LONG_PAUSE {
            log::debug!("NAR {}: peer {peer} closed in a pause: {}", self.hash, broken.why);
            self.next = Some(current.source);
            return;
        }
        log::debug!("NAR {}: peer {peer}: {}", self.hash, broken.why);
        self.fetch.standing.failed(current.source.who(), broken.fault, current.began, Instant::now(), &broken.why);
        if broken.fault == Fault::BrokenStream
            && let Some(left) = self.broken_left.checked_sub(1)
        {
            self.broken_left = left;
            self.again = Some(current.source);
        }
    }

    /// A first piece that is the whole NAR has to be right before any of it is passed on.
    fn check_whole(&mut self, piece: &[u8]) -> Result<(), Broken> {
        if self.at < self.size {
            return Ok(());
        }
        let digest = ring::digest::digest(&SHA256, piece);
        if digest.as_ref() != self.hash.as_bytes() || !self.framing.is_complete() {
            return Err(Broken::new(Fault::BadData, "sent a NAR with another hash"));
        }
        self.checked = true;
        Ok(())
    }

    /// What came is wrong, and part of it is with Nix. Which of several peers sent it is not known, but those that
    /// broke off have more against them than the one that went on for them.
    fn wrong(&mut self, why: &dyn fmt::Display) -> io::Error {
        self.fetch.taint(self.hash);
        self.transfer.iter().for_each(Transfer::has_failed);
        let now = Instant::now();
        let last = self.current.as_ref().map(|current| current.source.who());
        for peer in &self.contributors {
            let innocent = self.contributors.len() > 1 && Some(*peer) == last;
            let fault = if innocent { Fault::BrokenPromise } else { Fault::BadData };
            self.fetch.standing.failed(*peer, fault, now, now, &format_args!("NAR {}: {why}", self.hash));
        }
        io::Error::other(format!("NAR {}: {why}", self.hash))
    }

    fn delivered(&mut self) {
        if let Some(current) = self.current.take() {
            current.body.finish();
        }
        let now = Instant::now();
        let peers: Vec<String> = self.contributors.iter().map(Who::to_string).collect();
        log::debug!("{}: NAR of {} bytes from peer {}", self.search.hash_part(), self.size, peers.join(" and "));
        self.contributors.iter().for_each(|peer| {
            self.fetch.standing.delivered(*peer, now);
            self.fetch.record.delivered(peer.network(), peer.address());
        });
        self.transfer.iter().for_each(Transfer::is_whole);
    }
}

/// A piece of a NAR. Its memory is used again and again, and cleared only once.
struct Piece {
    buffer: Box<[u8]>,
    filled: usize,
}

impl Piece {
    /// An empty one, of the NAR's size if that is less.
    fn new(nar_size: u64) -> Self {
        let len = usize::try_from(nar_size).unwrap_or(PIECE).min(PIECE);
        Piece { buffer: vec![0; len].into_boxed_slice(), filled: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.buffer[..self.filled]
    }
}

/// The bytes of a piece, which is at `from` in the NAR, that lie in `range`.
fn part<'a>(piece: &'a [u8], from: u64, range: &Range<u64>) -> &'a [u8] {
    let within = |at: u64| usize::try_from(at.saturating_sub(from)).map_or(piece.len(), |at| at.min(piece.len()));
    &piece[within(range.start)..within(range.end)]
}

/// Hashes pieces until there are no more, and gives back those that nobody else uses any longer.
fn hash(pieces: &Receiver<Arc<Piece>>, recycle: &Sender<Piece>) -> NarHash {
    let mut context = Context::new(&SHA256);
    for piece in pieces {
        context.update(piece.bytes());
        if let Some(piece) = Arc::into_inner(piece) {
            let _ = recycle.try_send(piece);
        }
    }
    let digest = context.finish();
    NarHash::from_bytes(digest.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_part_of_a_piece_in_a_range() {
        let piece = b"0123456789";
        for (from, range, expected) in [
            (0, 0..10, &b"0123456789"[..]),
            (100, 0..200, b"0123456789"),
            (100, 103..105, b"34"),
            (100, 0..105, b"01234"),
            (100, 105..200, b"56789"),
            (100, 0..100, b""),
            (100, 110..200, b""),
            (u64::MAX - 10, 0..u64::MAX, b"0123456789"),
        ] {
            assert_eq!(part(piece, from, &range), expected, "{from} {range:?}");
        }
    }
}
