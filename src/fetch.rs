//! NARs from peers, for this machine's Nix. `supply` is where the bytes come from, `verified` what is checked of them.

mod supply;
mod verified;

use crate::lookup::Lookup;
use crate::nix::{HashPart, NarHash};
use crate::peers::client::Client;
use crate::peers::pace::Paces;
use crate::peers::standing::Standing;
use crate::record::Record;
use crate::time_scale::Timeout;
use std::collections::HashMap;
use std::fmt;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use supply::Supply;
use verified::{Incoming, NotWhole, Piece, part};

/// By then the first piece is there, or Nix is told that the NAR is not: it waits for an answer.
const START: Timeout = Timeout::from_secs(20);

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
    paces: Arc<Paces>,
    record: Arc<Record>,
    tainted: Mutex<HashMap<NarHash, Instant>>,
}

impl Fetch {
    /// The parts it works with.
    pub fn new(
        lookup: Arc<Lookup>,
        client: Arc<Client>,
        standing: Arc<Standing>,
        paces: Arc<Paces>,
        record: Arc<Record>,
    ) -> Self {
        Fetch { lookup, client, standing, paces, record, tainted: Mutex::default() }
    }

    /// A NAR that some peer says it has. Blocks until one does, for 20 s at most.
    pub fn find(&self, hash_part: &HashPart, nar_hash: &NarHash) -> Option<Nar<'_>> {
        let asked = Instant::now();
        let until = asked + START.get();
        let found = self.lookup.find(hash_part, nar_hash, until)?;
        Some(Nar { asked, until, hash: *nar_hash, size: found.nar_size, found, fetch: self })
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

/// A NAR that a peer says it has.
pub struct Nar<'a> {
    fetch: &'a Fetch,
    /// When this machine asked for it.
    asked: Instant,
    /// The first piece has to be there by then.
    until: Instant,
    hash: NarHash,
    size: u64,
    found: crate::lookup::Found,
}

/// A NAR of which the first piece has come.
pub struct Begun<'a> {
    fetch: &'a Fetch,
    supply: Supply<'a>,
    hash: NarHash,
    incoming: Incoming,
    first: Piece,
}

/// Why a NAR could not be passed on as a whole.
#[derive(Debug)]
enum Cut {
    /// No peer is left.
    NoPeer(String),
    /// What came is wrong.
    Wrong(String),
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Cut::NoPeer(why) | Cut::Wrong(why)) = self;
        f.write_str(why)
    }
}

impl std::error::Error for Cut {}

impl<'a> Nar<'a> {
    /// Bytes in the whole NAR.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Gets the first piece, from whichever peer gives it. `None`: none does within 20 s of [`Fetch::find`].
    pub fn start(self) -> Option<Begun<'a>> {
        let Nar { fetch, asked, until, hash, found, .. } = self;
        let mut supply = Supply::new(fetch, found, until);
        // A first piece that is the whole NAR has to be right before any of it is passed on.
        let is_right = |incoming: &Incoming, piece: &Piece| incoming.rest() > 0 || incoming.is_right(piece);
        let Some((incoming, first)) = supply.first_piece(is_right) else {
            supply.fail();
            return None;
        };
        if let Some(source) = supply.current() {
            fetch.record.first_byte(source.network(), asked.elapsed());
        }
        Some(Begun { fetch, supply, hash, incoming, first })
    }
}

impl Begun<'_> {
    /// Passes the range of the NAR on. All before its end is fetched, or it could not be checked.
    ///
    /// # Errors
    /// The writer's, or no peer is left, or what came is wrong: then the last piece was not written.
    pub fn relay(self, range: &Range<u64>, out: &mut dyn Write) -> io::Result<()> {
        let Begun { fetch, mut supply, hash, mut incoming, first } = self;
        if incoming.rest() == 0 {
            out.write_all(part(first.bytes(), 0, range))?;
            supply.delivered();
            return Ok(());
        }
        let next =
            |incoming: &mut Incoming, piece: &mut Piece| supply.next_piece(incoming, piece).map_err(io::Error::other);
        let passed = incoming.pass_on(first, range, out, next);
        let wrong = match passed {
            Ok(()) => {
                if incoming.rest() == 0 {
                    supply.delivered();
                }
                return Ok(());
            }
            Err(NotWhole::Hash) => "sent a NAR with another hash".to_owned(),
            Err(NotWhole::Io(e)) => match e.get_ref().and_then(|e| e.downcast_ref::<Cut>()) {
                Some(Cut::Wrong(why)) => why.clone(),
                Some(Cut::NoPeer(_)) => {
                    supply.fail();
                    return Err(e);
                }
                None => return Err(e),
            },
        };
        fetch.taint(hash);
        let why = format!("NAR {hash}: {wrong}");
        supply.blame(&why);
        Err(io::Error::other(why))
    }
}
