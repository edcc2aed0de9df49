//! Large NARs on their way in, kept in a file so that neighbours can have them while they come.
//!
//! The file has no name (`O_TMPFILE`): however this process ends, nothing is left. It is written in
//! a thread of its own, and given up when the disk is slower than the network: Nix never waits for
//! it.

use super::verified::Piece;
use crate::nix::NarHash;
use crate::store::NarSink;
use crate::time_scale::Timeout;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::fs::{Mode, OFlags, StatVfs, fstatvfs, open, statvfs};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

/// Smaller NARs are not kept: they have come before a neighbour could ask for them here.
pub const LEAST_SIZE: u64 = 16 << 20;
/// Bytes kept at once, of all NARs. A NAR for which there is no room is not kept.
const MAX_BYTES: u64 = 2 << 30;
/// NARs kept at once.
const MAX_SPOOLS: usize = 8;
/// Parts of the disk of which one has to stay free.
const FREE_PARTS: u64 = 10;
/// Pieces that wait to be written, of 256 KiB each. When there are more, the disk is too slow, and
/// the NAR is given up.
const QUEUE: usize = 16;
/// A neighbour waits for the next bytes for this long, and then for another source.
const PATIENCE: Timeout = Timeout::from_secs(10);
/// Bytes copied at once where the kernel cannot pass them on.
const COPY: usize = 64 * 1024;

/// The NARs that are kept.
pub struct Spools {
    dir: Option<PathBuf>,
    kept: Mutex<HashMap<NarHash, Arc<Spool>>>,
    taken: Arc<Mutex<DiskUsage>>,
}

/// What the files on the disk take, also of NARs that are no longer found but still being read.
#[derive(Default)]
struct DiskUsage {
    spools: usize,
    bytes: u64,
}

/// A part of [`DiskUsage`], until it is dropped.
struct DiskReservation {
    taken: Arc<Mutex<DiskUsage>>,
    bytes: u64,
}

/// One NAR that is kept while it comes.
pub struct Spool {
    /// The store path's base name.
    pub name: String,
    size: u64,
    file: File,
    _reserved: DiskReservation,
    progress: Mutex<SpoolProgress>,
    changed: Condvar,
}

#[derive(Default)]
struct SpoolProgress {
    /// Bytes from the beginning that are in the file.
    written: u64,
    /// No more bytes come.
    has_ended: bool,
}

/// Keeps one NAR. When it is dropped, no more bytes come, and no further neighbour finds it.
pub(super) struct SpoolWriter<'a> {
    spools: &'a Spools,
    hash: NarHash,
    spool: Arc<Spool>,
    pieces: Option<Sender<Arc<Piece>>>,
}

impl Spools {
    /// NARs are kept on the file system of `dir`; without one, none is.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Spools { dir, kept: Mutex::default(), taken: Arc::default() }
    }

    /// What is kept of this NAR.
    pub fn get(&self, hash: &NarHash) -> Option<Arc<Spool>> {
        self.lock().get(hash).cloned()
    }

    /// Begins to keep a NAR, if it is large and there is room for it.
    pub(super) fn begin(&self, name: &str, hash: NarHash, size: u64) -> Option<SpoolWriter<'_>> {
        let dir = self.dir.as_ref().filter(|_| size >= LEAST_SIZE)?;
        if self.lock().contains_key(&hash) {
            return None;
        }
        let (reserved, all) = DiskReservation::of(&self.taken, size)?;
        // Not under the lock, which the event loop takes, too: disks may hang.
        let spool = match Spool::open(dir, name, size, reserved, all) {
            Ok(spool) => Arc::new(spool?),
            Err(e) => {
                log::debug!("{}: {e}; NARs are not passed on while they come", dir.display());
                return None;
            }
        };
        let (pieces, queue) = bounded(QUEUE);
        let writing = spool.clone();
        let thread =
            thread::Builder::new().name("nar-spool".into()).spawn(move || writing.write(&queue));
        thread.inspect_err(|e| log::debug!("thread for a NAR: {e}")).ok()?;
        match self.lock().entry(hash) {
            Entry::Vacant(place) => place.insert(spool.clone()),
            Entry::Occupied(_) => return None,
        };
        Some(SpoolWriter { spools: self, hash, spool, pieces: Some(pieces) })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<NarHash, Arc<Spool>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DiskReservation {
    /// Room for a NAR of that size, and the bytes that are then reserved in all; `None` if there
    /// are too many.
    fn of(taken: &Arc<Mutex<DiskUsage>>, size: u64) -> Option<(DiskReservation, u64)> {
        let mut now = taken.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = now.bytes.checked_add(size).filter(|bytes| *bytes <= MAX_BYTES)?;
        if now.spools >= MAX_SPOOLS {
            return None;
        }
        *now = DiskUsage { spools: now.spools + 1, bytes };
        Some((DiskReservation { taken: taken.clone(), bytes: size }, bytes))
    }
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        let mut now = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        *now = DiskUsage { spools: now.spools - 1, bytes: now.bytes - self.bytes };
    }
}

impl SpoolWriter<'_> {
    /// The next piece of the NAR. Never blocks.
    pub(super) fn push(&mut self, piece: Arc<Piece>) {
        let Some(pieces) = &self.pieces else { return };
        if let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) = pieces.try_send(piece) {
            log::debug!("NAR {}: the disk is slower than the network", self.hash);
            self.pieces = None;
            self.spools.lock().remove(&self.hash);
        }
    }
}

impl Drop for SpoolWriter<'_> {
    fn drop(&mut self) {
        self.pieces = None;
        let mut kept = self.spools.lock();
        if kept.get(&self.hash).is_some_and(|spool| Arc::ptr_eq(spool, &self.spool)) {
            kept.remove(&self.hash);
        }
    }
}

impl Spool {
    /// A file for a NAR of that size; `None` if the disk has too little room for all the bytes
    /// reserved.
    fn open(
        dir: &Path,
        name: &str,
        size: u64,
        reserved: DiskReservation,
        all: u64,
    ) -> io::Result<Option<Spool>> {
        if !has_room(&statvfs(dir)?, all) {
            return Ok(None);
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(open(dir, flags, Mode::RUSR | Mode::WUSR)?);
        let (progress, changed) = Default::default();
        Ok(Some(Spool {
            name: name.to_owned(),
            size,
            file,
            _reserved: reserved,
            progress,
            changed,
        }))
    }

    /// Writes pieces until no more come or the disk fails.
    fn write(&self, queue: &Receiver<Arc<Piece>>) {
        let mut at = 0;
        for piece in queue {
            if let Err(e) = self.write_piece(&piece, at) {
                log::debug!("spool: {e}");
                // Readers find the file shorter than was said, and go elsewhere: others need the
                // disk.
                self.lock().has_ended = true;
                let _ = self.file.set_len(0);
                break;
            }
            at += piece.bytes().len() as u64;
            self.lock().written = at;
            self.changed.notify_all();
        }
        self.lock().has_ended = true;
        self.changed.notify_all();
    }

    /// # Errors
    /// The disk's, or others have filled it meanwhile.
    fn write_piece(&self, piece: &Piece, at: u64) -> io::Result<()> {
        if !has_room(&fstatvfs(&self.file)?, self.size.saturating_sub(at)) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(piece.bytes(), at)
    }

    /// Bytes in the whole NAR.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Passes `range` of the NAR on as it comes.
    ///
    /// # Errors
    /// The sink's, or the rest of the NAR does not come.
    pub fn write_to(&self, range: Range<u64>, out: &mut dyn NarSink) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let end = self.wait(at)?.min(range.end);
            at += self.copy(at, end - at, out)?;
        }
        Ok(())
    }

    /// Waits until there is more than `at` bytes; returns how many there are.
    fn wait(&self, at: u64) -> io::Result<u64> {
        let until = Instant::now() + PATIENCE.get();
        let mut progress = self.lock();
        while progress.written <= at {
            let left = until.saturating_duration_since(Instant::now());
            if progress.has_ended || left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the rest of the NAR does not come",
                ));
            }
            progress =
                self.changed.wait_timeout(progress, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(progress.written)
    }

    fn copy(&self, at: u64, len: u64, out: &mut dyn NarSink) -> io::Result<u64> {
        if let Some(sent) = out.send_file(self.file.as_fd(), at, len)? {
            return if sent == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(sent) };
        }
        let mut buffer = vec![0; usize::try_from(len).unwrap_or(COPY).min(COPY)];
        self.file.read_exact_at(&mut buffer, at)?;
        out.write_all(&buffer)?;
        Ok(buffer.len() as u64)
    }

    fn lock(&self) -> MutexGuard<'_, SpoolProgress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the disk has room for so many bytes of NARs, which Nix writes, too, and for others.
fn has_room(disk: &StatVfs, bytes: u64) -> bool {
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    free >= bytes
        .saturating_mul(2)
        .saturating_add(disk.f_blocks.saturating_mul(disk.f_frsize) / FREE_PARTS)
}

#[cfg(test)]
mod tests {
    use super::super::verified::VerifiedStream;
    use super::*;

    const HASH: [u8; 32] = [1; 32];

    fn spools() -> Spools {
        Spools::new(Some(std::env::temp_dir()))
    }

    fn hash(number: u8) -> NarHash {
        NarHash::from_bytes([number; 32])
    }

    /// A sink that takes no files.
    fn read(spool: &Spool, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        spool.write_to(range, &mut out).map(|()| out)
    }

    /// The writing threads end soon, each with its file.
    fn wait_until_empty(spools: &Spools) {
        let until = Instant::now() + std::time::Duration::from_secs(120);
        while spools.taken.lock().unwrap().spools > 0 {
            assert!(Instant::now() < until, "files are left");
            thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(spools.taken.lock().unwrap().bytes, 0);
    }

    #[test]
    fn room_is_for_nix_too_and_a_tenth_stays_free() {
        let disk = |free| StatVfs {
            f_bavail: free,
            f_frsize: 4096,
            f_blocks: 1000,
            ..statvfs("/").unwrap()
        };
        assert!(has_room(&disk(102), 4096));
        assert!(!has_room(&disk(101), 4096));
        assert!(!has_room(&disk(101), u64::MAX));
    }

    #[test]
    fn file_on_a_full_disk_is_emptied_and_its_readers_are_told() {
        let spools = spools();
        let (reserved, all) = DiskReservation::of(&spools.taken, LEAST_SIZE).unwrap();
        let mut spool = Spool::open(&std::env::temp_dir(), "a", LEAST_SIZE, reserved, all)
            .unwrap()
            .expect("room");
        spool.file.set_len(1 << 20).unwrap();
        // Of which there is never so much room.
        spool.size = u64::MAX;
        let (pieces, queue) = bounded(1);
        pieces.send(piece()).unwrap();
        spool.write(&queue);
        assert!(spool.lock().has_ended);
        assert_eq!(spool.file.metadata().unwrap().len(), 0);
        // Some of it was written before.
        spool.lock().written = 1;
        assert_eq!(read(&spool, 0..1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    fn piece() -> Arc<Piece> {
        let mut piece = VerifiedStream::new(NarHash::from_bytes(HASH), LEAST_SIZE).piece();
        piece.room(LEAST_SIZE).fill(7);
        Arc::new(piece.filled())
    }

    #[test]
    fn bytes_are_read_while_they_come_and_no_more_after_the_end() {
        let spools = spools();
        let mut keeping = spools.begin("a", hash(1), LEAST_SIZE).expect("room on the disk");
        let spool = spools.get(&hash(1)).expect("it is kept");
        let piece = piece();
        let len = piece.bytes().len() as u64;
        thread::scope(|scope| {
            let reading = scope.spawn(|| read(&spool, 5..2 * len));
            keeping.push(piece.clone());
            keeping.push(piece.clone());
            assert_eq!(reading.join().unwrap().unwrap(), vec![7; 2 * len as usize - 5]);
            let reading = scope.spawn(|| read(&spool, 0..3 * len));
            drop(keeping);
            assert_eq!(reading.join().unwrap().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        });
        assert!(spools.get(&hash(1)).is_none());
        // Those who have begun go on.
        assert_eq!(read(&spool, 0..len).unwrap().len() as u64, len);
    }

    #[test]
    fn room_is_bounded_and_small_nars_and_a_second_stream_are_not_kept() {
        let spools = spools();
        assert!(spools.begin("a", hash(1), LEAST_SIZE - 1).is_none());
        assert!(Spools::new(None).begin("a", hash(1), LEAST_SIZE).is_none());
        assert!(Spools::new(Some("/proc".into())).begin("a", hash(1), LEAST_SIZE).is_none());
        let kept: Vec<_> =
            (0..20).map_while(|number| spools.begin("a", hash(number), LEAST_SIZE)).collect();
        assert_eq!(kept.len(), MAX_SPOOLS);
        assert!(spools.begin("a", hash(0), LEAST_SIZE).is_none());
        // The files of those that are still read are there, although no further neighbour finds
        // them.
        let reading: Vec<_> = (0..20).filter_map(|number| spools.get(&hash(number))).collect();
        drop(kept);
        assert!(spools.get(&hash(1)).is_none() && spools.begin("a", hash(1), LEAST_SIZE).is_none());
        drop(reading);
        wait_until_empty(&spools);
        assert!(spools.begin("a", hash(0), MAX_BYTES + 1).is_none());
        assert!(spools.begin("a", hash(0), LEAST_SIZE).is_some());
    }
}
