//! Reads narinfos of peers. Few large ones are in memory at a time.

use super::error::PeerError;
use crate::nix::{NarInfo, StoreDir};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::io::Read;
use std::ops::Deref;
use std::thread;
use std::time::{Duration, Instant};

/// Size in bytes above which a narinfo needs a reservation. Paths with fewer than 900 references
/// stay below it.
const LARGE_NARINFO_BYTES: u64 = 64 * 1024;
/// Largest number of large narinfos in memory. Each takes up to 3 MiB as text and as references. At
/// the bound, further ones wait until an earlier one is dropped, and fail with [`PeerError::Busy`]
/// at the deadline of their request.
const MAX_LARGE_NARINFOS: usize = 2;
/// Number of threads that read large narinfos, so that one slow peer does not block all. The C
/// library keeps freed memory per thread: if all 256 request threads read them, it would keep 60
/// MiB.
const LARGE_READERS: usize = 2;
/// Time past its deadline that a large narinfo is still waited for. The reader notices the deadline
/// itself.
const LARGE_NARINFO_GRACE: Duration = Duration::from_secs(1);
/// Stack of a thread that reads large narinfos, in bytes. The buffers are on the heap.
const LARGE_READER_STACK_BYTES: usize = 256 << 10;

/// Reader of narinfos; shared by all threads. Large ones are read by threads of their own, which end
/// when the reader is dropped.
pub(super) struct NarinfoReader {
    store_dir: StoreDir,
    /// Queue of the threads that read large narinfos.
    large: Sender<LargeNarinfoBody>,
}

impl NarinfoReader {
    /// Creates a reader that accepts narinfos of `store_dir` only, and starts its threads.
    pub(super) fn start(store_dir: StoreDir) -> Self {
        let (large, jobs) = bounded::<LargeNarinfoBody>(0);
        let reservations = bounded(MAX_LARGE_NARINFOS);
        for _ in 0..LARGE_READERS {
            let (jobs, reservations) = (jobs.clone(), reservations.clone());
            let started = thread::Builder::new()
                .name("narinfo-large".into())
                .stack_size(LARGE_READER_STACK_BYTES)
                .spawn(move || {
                    jobs.iter().for_each(|job: LargeNarinfoBody| job.read(&reservations));
                });
            if let Err(e) = started {
                log::error!("thread for large narinfos: {e}");
            }
        }
        NarinfoReader { store_dir, large }
    }

    /// Reads and parses a narinfo. Blocks until `deadline` at most, and for a large one up to 1 s
    /// longer. The caller limits the reads of `body`.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub(super) fn read(
        &self,
        mut body: ureq::BodyReader<'static>,
        deadline: Instant,
    ) -> Result<PeerNarinfo, PeerError> {
        let mut start = Vec::new();
        body.by_ref().take(LARGE_NARINFO_BYTES + 1).read_to_end(&mut start)?;
        if start.len() as u64 <= LARGE_NARINFO_BYTES {
            let narinfo = NarInfo::parse(&start, &self.store_dir)?;
            return Ok(PeerNarinfo { narinfo, _reservation: None });
        }
        let (reply, result) = bounded(1);
        let store_dir = self.store_dir.clone();
        let job = LargeNarinfoBody { start, rest: body, deadline, store_dir, reply };
        self.large.send_deadline(job, deadline).map_err(|_| PeerError::Busy)?;
        result.recv_deadline(deadline + LARGE_NARINFO_GRACE).map_err(|_| PeerError::Busy)?
    }
}

/// Body of a narinfo that exceeds [`LARGE_NARINFO_BYTES`], with the part that was already read.
struct LargeNarinfoBody {
    start: Vec<u8>,
    rest: ureq::BodyReader<'static>,
    deadline: Instant,
    store_dir: StoreDir,
    reply: Sender<Result<PeerNarinfo, PeerError>>,
}

impl LargeNarinfoBody {
    fn read(self, reservations: &(Sender<()>, Receiver<()>)) {
        let LargeNarinfoBody { start, mut rest, deadline, store_dir, reply } = self;
        let mut read = || {
            reservations.0.send_deadline((), deadline).map_err(|_| PeerError::Busy)?;
            let reservation = Some(LargeNarinfoReservation(reservations.1.clone()));
            let mut bytes = Vec::with_capacity(NarInfo::MAX_LEN + 1);
            bytes.extend(&start);
            let max = (NarInfo::MAX_LEN + 1 - bytes.len()) as u64;
            rest.by_ref().take(max).read_to_end(&mut bytes)?;
            let narinfo = NarInfo::parse(&bytes, &store_dir)?;
            Ok(PeerNarinfo { narinfo, _reservation: reservation })
        };
        let _ = reply.try_send(read());
    }
}

/// Narinfo from a peer. Its form is checked, its signatures are not. A large one holds a
/// reservation until it is dropped.
#[derive(Debug)]
pub struct PeerNarinfo {
    narinfo: NarInfo,
    _reservation: Option<LargeNarinfoReservation>,
}

impl PeerNarinfo {
    /// Returns the narinfo and releases its reservation. Only for programs that read few narinfos.
    pub fn into_inner(self) -> NarInfo {
        self.narinfo
    }
}

impl Deref for PeerNarinfo {
    type Target = NarInfo;

    fn deref(&self) -> &NarInfo {
        &self.narinfo
    }
}

/// Reservation for one of the [`MAX_LARGE_NARINFOS`] large narinfos in memory.
#[derive(Debug)]
struct LargeNarinfoReservation(Receiver<()>);

impl Drop for LargeNarinfoReservation {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}
