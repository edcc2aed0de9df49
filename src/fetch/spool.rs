//! Keeps large NARs in files during their download, so that neighbours can get them before they are
//! complete.
//!
//! Each file has no name (`O_TMPFILE`), so none is left when the process ends. A thread of its own
//! writes it. If the disk is slower than the network, the NAR is given up: Nix never waits for the
//! disk.

use super::verified::Piece;
use crate::lock::{Condvar, Mutex};
use crate::nix::NarHash;
use crate::store::NarSink;
use crate::time_scale::Timeout;
use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::{Mode, OFlags, StatVfs, fstatvfs, open, statvfs};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Instant;

/// Minimum NAR size in bytes. Smaller NARs are complete before a neighbour could ask for them.
pub const MIN_SIZE: u64 = 16 << 20;
/// Maximum bytes of all files together. A NAR that would exceed it is not kept.
const MAX_BYTES: u64 = 2 << 30;
/// Maximum number of files. At the bound, further NARs are not kept.
const MAX_SPOOLS: usize = 8;
/// One part in this many of the disk stays free.
const FREE_PARTS: u64 = 10;
/// Maximum number of pieces of 256 KiB that wait for the disk. At the bound, the NAR is given up.
const MAX_QUEUED_PIECES: usize = 16;
/// Maximum wait of a reader for the next bytes. After it, the read fails and the neighbour asks
/// another peer.
const READ_TIMEOUT: Timeout = Timeout::from_secs(10);
/// Buffer size in bytes of a copy through user space, for sinks that do not take files.
const COPY_BUFFER_BYTES: usize = 64 * 1024;

/// The NARs that are kept, at most 8 and 2 GiB. Shared by all threads.
pub struct Spools {
    dir: Option<PathBuf>,
    spools: Mutex<HashMap<NarHash, Arc<Spool>>>,
    disk_usage: Arc<Mutex<DiskUsage>>,
}

/// Number and bytes of the reserved files, including those that are only read any longer.
#[derive(Default)]
struct DiskUsage {
    spools: usize,
    bytes: u64,
}

/// A reservation in [`DiskUsage`]. Dropping it frees the space for others.
struct DiskReservation {
    disk_usage: Arc<Mutex<DiskUsage>>,
    bytes: u64,
}

/// The file of one NAR, which grows while the NAR is downloaded.
pub struct Spool {
    /// Base name of the store path.
    pub name: String,
    size: u64,
    file: File,
    _reserved: DiskReservation,
    progress: Mutex<SpoolProgress>,
    changed: Condvar,
}

#[derive(Default)]
struct SpoolProgress {
    /// Bytes from the start of the NAR that are in the file.
    written: u64,
    /// No further bytes will be written.
    has_ended: bool,
}

/// The write end of a [`Spool`]. Dropping it ends the NAR and hides it from further neighbours.
pub(super) struct SpoolWriter<'a> {
    spools: &'a Spools,
    hash: NarHash,
    spool: Arc<Spool>,
    pieces: Option<Sender<Arc<Piece>>>,
}

impl Spools {
    /// Keeps NARs on the file system of `dir`, or none without it.
    pub fn new(dir: Option<PathBuf>) -> Self {
        Spools { dir, spools: Mutex::default(), disk_usage: Arc::default() }
    }

    /// The file of this NAR, if it is being downloaded and kept.
    pub fn get(&self, hash: &NarHash) -> Option<Arc<Spool>> {
        self.spools.lock().get(hash).cloned()
    }

    /// Starts to keep a NAR of `size` bytes. Returns `None` if it is smaller than [`MIN_SIZE`], is
    /// kept already, or has no room. Does disk I/O.
    pub(super) fn begin(&self, name: &str, hash: NarHash, size: u64) -> Option<SpoolWriter<'_>> {
        let dir = self.dir.as_ref().filter(|_| size >= MIN_SIZE)?;
        if self.spools.lock().contains_key(&hash) {
            return None;
        }
        let (reserved, total) = DiskReservation::of(&self.disk_usage, size)?;
        // Done without the lock, which the event loop takes, too: disks may hang.
        let spool = match Spool::open(dir, name, size, reserved, total) {
            Ok(spool) => Arc::new(spool?),
            Err(e) => {
                log::debug!("{}: {e}; NARs are not passed on while they come", dir.display());
                return None;
            }
        };
        let (pieces, queue) = bounded(MAX_QUEUED_PIECES);
        let writer_spool = spool.clone();
        let thread = thread::Builder::new()
            .name("nar-spool".into())
            .spawn(move || writer_spool.write(&queue));
        thread.inspect_err(|e| log::debug!("thread for a NAR: {e}")).ok()?;
        match self.spools.lock().entry(hash) {
            Entry::Vacant(entry) => entry.insert(spool.clone()),
            Entry::Occupied(_) => return None,
        };
        Some(SpoolWriter { spools: self, hash, spool, pieces: Some(pieces) })
    }
}

impl DiskReservation {
    /// Reserves `size` bytes. Also returns the sum of all reservations. `None` if a bound is
    /// exceeded.
    fn of(disk_usage: &Arc<Mutex<DiskUsage>>, size: u64) -> Option<(DiskReservation, u64)> {
        let mut usage = disk_usage.lock();
        let bytes = usage.bytes.checked_add(size).filter(|bytes| *bytes <= MAX_BYTES)?;
        if usage.spools >= MAX_SPOOLS {
            return None;
        }
        *usage = DiskUsage { spools: usage.spools + 1, bytes };
        Some((DiskReservation { disk_usage: disk_usage.clone(), bytes: size }, bytes))
    }
}

impl Drop for DiskReservation {
    fn drop(&mut self) {
        let mut usage = self.disk_usage.lock();
        *usage = DiskUsage { spools: usage.spools - 1, bytes: usage.bytes - self.bytes };
    }
}

impl SpoolWriter<'_> {
    /// Queues the next piece of the NAR. Never blocks: a full queue gives the NAR up.
    pub(super) fn push(&mut self, piece: Arc<Piece>) {
        let Some(pieces) = &self.pieces else { return };
        if pieces.try_send(piece).is_err() {
            log::debug!("NAR {}: the disk is slower than the network", self.hash);
            self.pieces = None;
            self.spools.spools.lock().remove(&self.hash);
        }
    }
}

impl Drop for SpoolWriter<'_> {
    fn drop(&mut self) {
        self.pieces = None;
        let mut spools = self.spools.spools.lock();
        if spools.get(&self.hash).is_some_and(|spool| Arc::ptr_eq(spool, &self.spool)) {
            spools.remove(&self.hash);
        }
    }
}

impl Spool {
    /// Creates the file. Returns `None` if the disk lacks room for `total`, the bytes of all
    /// reservations.
    fn open(
        dir: &Path,
        name: &str,
        size: u64,
        reserved: DiskReservation,
        total: u64,
    ) -> io::Result<Option<Spool>> {
        if !has_room(&statvfs(dir)?, total) {
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

    /// Writes the queued pieces until the sender is dropped or the disk fails.
    fn write(&self, queue: &Receiver<Arc<Piece>>) {
        let mut offset = 0;
        for piece in queue {
            if let Err(e) = self.write_piece(&piece, offset) {
                log::debug!("spool: {e}");
                // Frees the disk at once. Readers find the file shorter than announced, and ask
                // another peer.
                self.progress.lock().has_ended = true;
                let _ = self.file.set_len(0);
                break;
            }
            offset += piece.bytes().len() as u64;
            self.progress.lock().written = offset;
            self.changed.notify_all();
        }
        self.progress.lock().has_ended = true;
        self.changed.notify_all();
    }

    /// Writes one piece at byte `offset`. Fails if the disk does, or with `StorageFull` if other
    /// programs have filled it.
    fn write_piece(&self, piece: &Piece, offset: u64) -> io::Result<()> {
        if !has_room(&fstatvfs(&self.file)?, self.size.saturating_sub(offset)) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.file.write_all_at(piece.bytes(), offset)
    }

    /// Size of the whole NAR in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes `range` of the NAR to `out`. Blocks until the download has reached its end.
    ///
    /// # Errors
    /// Returns the error of `out`, or `UnexpectedEof` if the download ends early or no byte arrives
    /// for 10 s.
    pub fn write_to(&self, range: Range<u64>, out: &mut dyn NarSink) -> io::Result<()> {
        let mut offset = range.start;
        while offset < range.end {
            let end = self.wait(offset)?.min(range.end);
            offset += self.copy(offset, end - offset, out)?;
        }
        Ok(())
    }

    /// Blocks until more than `offset` bytes are written, for at most [`READ_TIMEOUT`]. Returns
    /// their number.
    fn wait(&self, offset: u64) -> io::Result<u64> {
        let deadline = Instant::now() + READ_TIMEOUT.get();
        let mut progress = self.progress.lock();
        while progress.written <= offset {
            let left = deadline.saturating_duration_since(Instant::now());
            if progress.has_ended || left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "the rest of the NAR does not come",
                ));
            }
            progress = self.changed.wait_timeout(progress, left);
        }
        Ok(progress.written)
    }

    fn copy(&self, offset: u64, len: u64, out: &mut dyn NarSink) -> io::Result<u64> {
        if let Some(sent) = out.send_file(self.file.as_fd(), offset, len)? {
            return if sent == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(sent) };
        }
        let mut buffer =
            vec![0; usize::try_from(len).unwrap_or(COPY_BUFFER_BYTES).min(COPY_BUFFER_BYTES)];
        self.file.read_exact_at(&mut buffer, offset)?;
        out.write_all(&buffer)?;
        Ok(buffer.len() as u64)
    }
}

/// Whether the disk has room for `bytes` twice, as Nix writes the same NARs to its store, and a
/// tenth of the disk stays free.
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

    /// Reads through a sink that takes no files.
    fn read(spool: &Spool, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        spool.write_to(range, &mut out).map(|()| out)
    }

    /// The writer threads end shortly after their senders. Waits until each has freed its file.
    fn wait_until_empty(spools: &Spools) {
        let deadline = Instant::now() + std::time::Duration::from_secs(120);
        while spools.disk_usage.lock().spools > 0 {
            assert!(Instant::now() < deadline, "files are left");
            thread::sleep(std::time::Duration::from_millis(5));
        }
        assert_eq!(spools.disk_usage.lock().bytes, 0);
    }

    #[test]
    fn has_room_needs_twice_the_bytes_and_a_free_tenth() {
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
    fn full_disk_empties_file_and_fails_readers() {
        let spools = spools();
        let (reserved, total) = DiskReservation::of(&spools.disk_usage, MIN_SIZE).unwrap();
        let mut spool = Spool::open(&std::env::temp_dir(), "a", MIN_SIZE, reserved, total)
            .unwrap()
            .expect("room");
        spool.file.set_len(1 << 20).unwrap();
        // No disk has room for this size.
        spool.size = u64::MAX;
        let (pieces, queue) = bounded(1);
        pieces.send(piece()).unwrap();
        spool.write(&queue);
        assert!(spool.progress.lock().has_ended);
        assert_eq!(spool.file.metadata().unwrap().len(), 0);
        // As if a part had been written before.
        spool.progress.lock().written = 1;
        assert_eq!(read(&spool, 0..1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    fn piece() -> Arc<Piece> {
        let mut piece = VerifiedStream::new(NarHash::from_bytes(HASH), MIN_SIZE).piece();
        piece.room(MIN_SIZE).fill(7);
        Arc::new(piece.filled())
    }

    #[test]
    fn reader_follows_download_and_fails_after_early_end() {
        let spools = spools();
        let mut keeping = spools.begin("a", hash(1), MIN_SIZE).expect("room on the disk");
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
        // Readers that have started can read on.
        assert_eq!(read(&spool, 0..len).unwrap().len() as u64, len);
    }

    #[test]
    fn begin_beyond_bounds_or_for_small_or_kept_nar_is_refused() {
        let spools = spools();
        assert!(spools.begin("a", hash(1), MIN_SIZE - 1).is_none());
        assert!(Spools::new(None).begin("a", hash(1), MIN_SIZE).is_none());
        assert!(Spools::new(Some("/proc".into())).begin("a", hash(1), MIN_SIZE).is_none());
        let writers: Vec<_> =
            (0..20).map_while(|number| spools.begin("a", hash(number), MIN_SIZE)).collect();
        assert_eq!(writers.len(), MAX_SPOOLS);
        assert!(spools.begin("a", hash(0), MIN_SIZE).is_none());
        // Files that are still read count, although no further neighbour finds them.
        let reading: Vec<_> = (0..20).filter_map(|number| spools.get(&hash(number))).collect();
        drop(writers);
        assert!(spools.get(&hash(1)).is_none() && spools.begin("a", hash(1), MIN_SIZE).is_none());
        drop(reading);
        wait_until_empty(&spools);
        assert!(spools.begin("a", hash(0), MAX_BYTES + 1).is_none());
        assert!(spools.begin("a", hash(0), MIN_SIZE).is_some());
    }
}
