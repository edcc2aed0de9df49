//! Writes a store path as a NAR, or a range of one, directly from its files.

use super::{
    NarError,
    walk::{Walk, WalkStep},
};
use crate::nix::{PathInfo, nar};
use rustix::{
    fs::{
        AtFlags, CWD, FileType, FsWord, Mode, OFlags, ResolveFlags, Stat, fstat, fstatfs, openat,
        openat2, statat,
    },
    io::{Errno, ReadWriteFlags, pread, preadv2},
};
use std::{
    io::{self, IoSliceMut, Write},
    ops::Range,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

/// The largest piece that is written at once, in bytes. Larger pieces were not faster.
pub(super) const PIECE: usize = 256 << 10;

/// The destination of a NAR.
pub trait NarSink: Write {
    /// Sends up to `len` bytes of `file` from offset `at` on without copying them through this
    /// process, and returns the number of bytes sent: 0 at the end of the file, `None` if this sink
    /// cannot do so. The default returns `None`.
    ///
    /// # Errors
    /// Errors of the sink. After an error of the file, the caller meets it again by reading the
    /// file.
    fn send_file(&mut self, _file: BorrowedFd<'_>, _at: u64, _len: u64) -> io::Result<Option<u64>> {
        Ok(None)
    }
}

impl NarSink for Vec<u8> {}

/// Writes `range` of the NAR of the tree that `walk` visits, which has `nar_size` bytes according
/// to the database. Files outside the range are not opened; only their size is read. `still_valid`
/// is called before the last piece, unless that is the only one.
pub(super) fn write(
    mut walk: Walk,
    nar_size: u64,
    range: Range<u64>,
    out: &mut dyn NarSink,
    still_valid: &dyn Fn() -> Result<(), NarError>,
) -> Result<(), NarError> {
    if range.start > range.end || range.end > nar_size {
        return Err(NarError::Range);
    }
    let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
    let mut structure = nar::MAGIC.to_vec();
    let (mut position, mut pieces) = (0, 0);
    if len > PIECE && range.start == 0 {
        // Listing a directory may take long, and a piece may be hundreds of files. The magic is
        // sent first, so that the receiver sees at once that the NAR comes.
        walk.check_exists()?;
        out.write_all(&structure).map_err(NarError::Write)?;
        (position, pieces) = (structure.len() as u64, 1);
        structure.clear();
        // The receiver may be scheduled on this processor. Without a yield it would run only when
        // this thread's time slice ends, 2 ms later.
        std::thread::yield_now();
    }
    // Most NARs are smaller than a piece, and zeroing a whole piece takes longer than writing them.
    let mut stream =
        NarStream { out, range, buffer: vec![0; len.min(PIECE) + 1], filled: 0, pieces, position };
    while let Some(step) = walk.advance()? {
        if step != WalkStep::Leave && !walk.at_root() {
            nar::entry_open(&mut structure, walk.name().to_bytes());
        }
        match step {
            WalkStep::Enter => structure.extend_from_slice(&nar::DIRECTORY_OPEN),
            WalkStep::Leave => structure.extend_from_slice(&nar::CLOSE),
            WalkStep::Symlink => nar::symlink(&mut structure, walk.target()?.to_bytes()),
            WalkStep::Regular => stream.put_regular(&walk, &mut structure, nar_size)?,
        }
        if step != WalkStep::Enter && !walk.at_root() {
            structure.extend_from_slice(&nar::CLOSE);
        }
        if stream.position + structure.len() as u64 > nar_size {
            return Err(walk.changed(LARGER_THAN_REGISTERED));
        }
        if structure.len() >= MAX_STRUCTURE_BYTES {
            stream.put(&structure)?;
            structure.clear();
        }
    }
    stream.put(&structure)?;
    if stream.position != nar_size {
        return Err(walk.changed("smaller than what was registered"));
    }
    if stream.pieces > 0 {
        still_valid()?;
    }
    stream.flush()
}

/// The largest NAR that [`try_small`] makes, in bytes; larger ones give `None`.
const MAX_SMALL_NAR_BYTES: u64 = 16 << 10;

/// Returns the NAR of a path that is one small file, if the kernel has the file in memory. Never
/// blocks on the disk.
pub(super) fn try_small(files: &Path, info: &PathInfo) -> Option<Vec<u8>> {
    if info.nar_size > MAX_SMALL_NAR_BYTES {
        return None;
    }
    let file = openat2(
        CWD,
        files.join(info.path.base_name()),
        FILE_FLAGS,
        Mode::empty(),
        ResolveFlags::CACHED,
    )
    .ok()?;
    let (size, executable) = regular(&fstat(&file).ok()?)?;
    if nar::MAGIC.len() as u64 + nar::regular_len(executable, size) != info.nar_size {
        return None;
    }
    // At most [`MAX_SMALL_NAR_BYTES`]. One byte more is read, to see that the file ends there.
    let size = size as usize;
    let mut nar = Vec::with_capacity(MAX_SMALL_NAR_BYTES as usize + 1);
    nar.extend_from_slice(&nar::MAGIC);
    nar::regular_open(&mut nar, executable, size as u64);
    let begin = nar.len();
    nar.resize(begin + size + 1, 0);
    let read = match preadv2(
        &file,
        &mut [IoSliceMut::new(&mut nar[begin..])],
        0,
        ReadWriteFlags::NOWAIT,
    ) {
        // tmpfs does not support RWF_NOWAIT, but is always in memory.
        Err(Errno::OPNOTSUPP) if fstatfs(&file).ok()?.f_type == TMPFS_MAGIC => {
            pread(&file, &mut nar[begin..], 0)
        }
        read => read,
    };
    if read != Ok(size) {
        return None;
    }
    nar.truncate(begin + size);
    nar.extend_from_slice(nar::padding(size as u64));
    nar.extend_from_slice(&nar::CLOSE);
    Some(nar)
}

/// `TMPFS_MAGIC` of Linux, for systems whose store is in memory.
const TMPFS_MAGIC: FsWord = 0x0102_1994;

/// Flags to open a file. With NONBLOCK, opening a FIFO that replaced the file does not wait for a
/// writer.
const FILE_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC).union(OFlags::NONBLOCK);

/// Structure (all bytes but file contents) is put into the stream before the next file, or when it
/// reaches this many bytes.
const MAX_STRUCTURE_BYTES: usize = 16 << 10;
const LARGER_THAN_REGISTERED: &str = "larger than what was registered";

/// A regular file as it was found, opened or not.
pub(super) struct OpenedFile {
    pub(super) size: u64,
    pub(super) executable: bool,
    descriptor: Option<OwnedFd>,
}

impl OpenedFile {
    /// Finds the current entry of `walk`. The file is opened if `open` is set; otherwise only its
    /// metadata is read.
    pub(super) fn find(walk: &Walk, open: bool) -> Result<OpenedFile, NarError> {
        let (directory, name) = walk.location();
        let failed = |error| walk.failed(error);
        if open {
            let descriptor = open_file(directory, name).map_err(failed)?;
            Self::from_stat(walk, &fstat(&descriptor).map_err(failed)?, Some(descriptor))
        } else {
            Self::from_stat(
                walk,
                &statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).map_err(failed)?,
                None,
            )
        }
    }

    fn from_stat(
        walk: &Walk,
        stat: &Stat,
        descriptor: Option<OwnedFd>,
    ) -> Result<OpenedFile, NarError> {
        let (size, executable) = regular(stat).ok_or_else(|| walk.failed(Errno::LOOP))?;
        Ok(OpenedFile { size, executable, descriptor })
    }
}

/// Returns the size of a regular file and whether its owner may execute it; `None` for other types.
fn regular(stat: &Stat) -> Option<(u64, bool)> {
    let is_regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
    is_regular.then(|| {
        (stat.st_size.unsigned_abs(), Mode::from_raw_mode(stat.st_mode).contains(Mode::XUSR))
    })
}

fn open_file(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> rustix::io::Result<OwnedFd> {
    openat(directory, name, FILE_FLAGS, Mode::empty())
}

/// Output stream of a NAR. It drops the bytes outside the range, and always retains the last piece
/// until [`NarStream::flush`].
struct NarStream<'a> {
    out: &'a mut dyn NarSink,
    range: Range<u64>,
    /// One byte longer than a piece, so that a file that has grown is noticed without another read.
    buffer: Vec<u8>,
    filled: usize,
    pieces: u64,
    /// Offset in the NAR.
    position: u64,
}

impl NarStream<'_> {
    /// Advances the position by `len`. Returns which of these `len` bytes are in the range, as
    /// offsets from the old position.
    fn pass(&mut self, len: u64) -> Range<u64> {
        let start = self.range.start.saturating_sub(self.position).min(len);
        let end = self.range.end.saturating_sub(self.position).min(len);
        self.position += len;
        start..end.max(start)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), NarError> {
        let range = self.pass(bytes.len() as u64);
        // Fits `usize`: no larger than the length of `bytes`.
        let mut rest = &bytes[range.start as usize..range.end as usize];
        while !rest.is_empty() {
            self.make_room()?;
            let count = rest.len().min(self.room());
            self.buffer[self.filled..self.filled + count].copy_from_slice(&rest[..count]);
            self.filled += count;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Puts `structure` and the contents of the regular file at which `walk` is. Leaves the end of
    /// the file's node in `structure`.
    fn put_regular(
        &mut self,
        walk: &Walk,
        structure: &mut Vec<u8>,
        nar_size: u64,
    ) -> Result<(), NarError> {
        // Offset of the file's node. The file is opened at once if that is in the range, which
        // saves a stat.
        let near = self.position + structure.len() as u64;
        let mut file = OpenedFile::find(walk, self.range.contains(&near))?;
        nar::regular_open(structure, file.executable, file.size);
        self.put(structure)?;
        structure.clear();
        if self.position.checked_add(file.size).is_none_or(|end| end > nar_size) {
            return Err(walk.changed(LARGER_THAN_REGISTERED));
        }
        self.put_contents(walk, &mut file)?;
        structure.extend_from_slice(nar::padding(file.size));
        structure.extend_from_slice(&nar::CLOSE);
        Ok(())
    }

    fn put_contents(&mut self, walk: &Walk, file: &mut OpenedFile) -> Result<(), NarError> {
        let range = self.pass(file.size);
        if range.is_empty() {
            return Ok(());
        }
        if file.descriptor.is_none() {
            let opened = OpenedFile::find(walk, true)?;
            if (opened.size, opened.executable) != (file.size, file.executable) {
                return Err(walk.changed("changed while it was read"));
            }
            *file = opened;
        }
        let Some(descriptor) = &file.descriptor else { return Ok(()) };
        let mut at = range.start;
        // All but the end of a large file goes directly to the sink. The end is read into the
        // buffer, so that the file's length is verified and the last piece is retained.
        while range.end - at > 2 * PIECE as u64 {
            self.flush()?;
            let max = range.end - at - PIECE as u64;
            match self.out.send_file(descriptor.as_fd(), at, max).map_err(NarError::Write)? {
                None => break,
                Some(0) => return Err(walk.changed("became shorter while it was read")),
                Some(count) => {
                    at += count;
                    self.pieces += 1;
                }
            }
        }
        while at < range.end {
            self.make_room()?;
            let left = range.end - at;
            let room = self.room();
            // At the end of the file, one byte more is requested, to notice that the file has
            // grown.
            let (asked, max) = match usize::try_from(left) {
                Ok(left) if left <= room => (left + usize::from(range.end == file.size), left),
                _ => (room, room),
            };
            let count =
                match pread(descriptor, &mut self.buffer[self.filled..self.filled + asked], at) {
                    Ok(0) => return Err(walk.changed("became shorter while it was read")),
                    Ok(count) if count > max => {
                        return Err(walk.changed("became longer while it was read"));
                    }
                    Ok(count) => count,
                    Err(Errno::INTR) => continue,
                    Err(error) => return Err(walk.failed(error)),
                };
            self.filled += count;
            at += count as u64;
        }
        Ok(())
    }

    fn room(&self) -> usize {
        self.buffer.len() - 1 - self.filled
    }

    fn make_room(&mut self) -> Result<(), NarError> {
        if self.room() == 0 {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), NarError> {
        if self.filled == 0 {
            return Ok(());
        }
        self.out.write_all(&self.buffer[..self.filled]).map_err(NarError::Write)?;
        self.filled = 0;
        self.pieces += 1;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Fixture, Receiver, odd_tree};
    use super::*;
    use crate::nix::PathInfo;
    use std::{fs, os::unix::fs::symlink, path::Path};

    fn range(fixture: &Fixture, info: &PathInfo, range: Range<u64>) -> Result<Vec<u8>, NarError> {
        let mut out = Vec::new();
        fixture.open().write_nar(info, range, &mut out)?;
        Ok(out)
    }

    /// Returns the number of bytes written, the size of the NAR, and the result, if `damage` runs
    /// when the first piece is written.
    fn damaged(
        make: impl FnOnce(&Path),
        damage: impl Fn(&Fixture, &Path),
    ) -> (usize, usize, Result<(), NarError>) {
        let fixture = Fixture::new();
        let (info, nar) = fixture.add(make);
        let files = fixture.absolute(info.path.base_name());
        let mut out =
            Receiver { bytes: Vec::new(), at_first: || damage(&fixture, Path::new(&files)) };
        let end = fixture.open().write_nar(&info, 0..info.nar_size, &mut out);
        if end.is_ok() {
            assert!(out.bytes == nar);
        }
        (out.bytes.len(), nar.len(), end)
    }

    fn two_files(root: &Path) {
        fs::create_dir(root).unwrap();
        fs::write(root.join("a"), vec![b'a'; PIECE]).unwrap();
        fs::write(root.join("b"), vec![b'b'; 3 * PIECE]).unwrap();
        fs::write(root.join("c"), "c").unwrap();
    }

    #[test]
    fn every_range_equals_part_of_whole() {
        let fixture = Fixture::new();
        let (info, nar) = fixture.add(odd_tree);
        let store = fixture.open();
        for start in 0..=nar.len() {
            for end in [start, start + 1, start + 8, start + 301, nar.len() - 1, nar.len()] {
                let range = start as u64..end as u64;
                let mut out = Vec::new();
                let result = store.write_nar(&info, range, &mut out);
                if start <= end && end <= nar.len() {
                    result.unwrap();
                    assert!(out == nar[start..end], "{start}..{end}");
                } else {
                    assert!(matches!(result, Err(NarError::Range)));
                    assert!(out.is_empty());
                }
            }
        }
    }

    #[test]
    fn nar_at_once_is_none_for_large_or_changed_files() {
        use std::os::unix::fs::PermissionsExt;
        for size in [0, 1, 7, 8, 3900, MAX_SMALL_NAR_BYTES as usize - 160] {
            for mode in [0o444, 0o555] {
                let fixture = Fixture::in_memory();
                let (info, nar) = fixture.add(|root| {
                    fs::write(root, vec![b'x'; size]).unwrap();
                    fs::set_permissions(root, fs::Permissions::from_mode(mode)).unwrap();
                });
                let store = fixture.open();
                assert_eq!(store.try_nar(&info), Some(nar), "{size}");
                let file = fixture.absolute(info.path.base_name());
                fs::set_permissions(&file, fs::Permissions::from_mode(0o644)).unwrap();
                fs::write(&file, vec![b'x'; size + 9]).unwrap();
                assert_eq!(store.try_nar(&info), None, "{size}: has grown");
                fs::remove_file(&file).unwrap();
                assert_eq!(store.try_nar(&info), None, "{size}: is gone");
            }
        }
        let makes: [fn(&Path); 3] = [
            |root| fs::write(root, vec![b'x'; MAX_SMALL_NAR_BYTES as usize]).unwrap(),
            |root| symlink("/etc/passwd", root).unwrap(),
            |root| fs::create_dir(root).unwrap(),
        ];
        for make in makes {
            let fixture = Fixture::in_memory();
            let (info, _) = fixture.add(make);
            assert_eq!(fixture.open().try_nar(&info), None);
        }
    }

    #[test]
    fn root_of_any_type_is_written() {
        let makes: [fn(&Path); 4] = [
            |root| fs::write(root, "contents").unwrap(),
            |root| fs::write(root, "").unwrap(),
            |root| symlink("/etc/passwd", root).unwrap(),
            |root| fs::create_dir(root).unwrap(),
        ];
        for make in makes {
            let fixture = Fixture::new();
            let (info, nar) = fixture.add(make);
            assert_eq!(range(&fixture, &info, 0..info.nar_size).unwrap(), nar);
        }
    }

    #[test]
    fn file_sizes_around_piece_size_are_written_whole() {
        for size in
            [PIECE - 200, PIECE - 121, PIECE - 120, PIECE - 119, PIECE - 97, PIECE, 3 * PIECE + 5]
        {
            let fixture = Fixture::new();
            let (info, nar) = fixture.add(|root| fs::write(root, vec![b'x'; size]).unwrap());
            assert!(range(&fixture, &info, 0..info.nar_size).unwrap() == nar, "{size}");
            for start in [PIECE - 1, PIECE, PIECE + 1].map(|start| start.min(nar.len())) {
                assert!(
                    range(&fixture, &info, start as u64..info.nar_size).unwrap() == nar[start..]
                );
            }
        }
    }

    #[test]
    fn path_changed_before_is_never_completed() {
        let changes: [fn(&Path); 7] = [
            |files| fs::write(files.join("a"), "").unwrap(),
            |files| fs::write(files.join("c"), [b'c'; 100]).unwrap(),
            |files| fs::write(files.join("d"), "").unwrap(),
            |files| fs::remove_file(files.join("c")).unwrap(),
            |files| fs::remove_dir_all(files).unwrap(),
            |files| {
                fs::remove_file(files.join("b")).unwrap();
                rustix::fs::mkfifoat(rustix::fs::CWD, files.join("b"), Mode::RUSR).unwrap();
            },
            |files| {
                fs::set_permissions(
                    files.join("c"),
                    std::os::unix::fs::PermissionsExt::from_mode(0o755),
                )
                .unwrap()
            },
        ];
        for (number, change) in changes.into_iter().enumerate() {
            let fixture = Fixture::new();
            let (info, nar) = fixture.add(two_files);
            change(Path::new(&fixture.absolute(info.path.base_name())));
            for range in [0..info.nar_size, 0..1, PIECE as u64 * 2..info.nar_size] {
                let mut out = Vec::new();
                let error = fixture.open().write_nar(&info, range.clone(), &mut out).unwrap_err();
                assert!(
                    matches!(error, NarError::Changed { .. } | NarError::Unsupported { .. }),
                    "{number}: {error}"
                );
                assert!((out.len() as u64) < range.end - range.start);
            }
            assert!(fixture.open().listing(&info).is_err(), "{number}");
            assert!(!nar.is_empty());
        }
    }

    #[test]
    fn path_changed_while_written_is_never_completed() {
        let damages: [fn(&Fixture, &Path); 8] = [
            |_, files| {
                fs::File::options()
                    .write(true)
                    .open(files.join("b"))
                    .unwrap()
                    .set_len(PIECE as u64)
                    .unwrap()
            },
            |_, files| {
                fs::File::options()
                    .write(true)
                    .open(files.join("b"))
                    .unwrap()
                    .set_len(9 << 20)
                    .unwrap()
            },
            |_, files| fs::write(files.join("c"), "").unwrap(),
            |_, files| fs::remove_file(files.join("c")).unwrap(),
            |_, files| fs::rename(files.join("c"), files.join("e")).unwrap(),
            |_, files| {
                fs::remove_file(files.join("c")).unwrap();
                symlink("b", files.join("c")).unwrap();
            },
            |fixture, _| fixture.execute("delete from ValidPaths"),
            |fixture, _| fixture.execute("update ValidPaths set hash = replace(hash, 'ab', 'cd')"),
        ];
        for (number, damage) in damages.into_iter().enumerate() {
            let (came, whole, end) = damaged(two_files, damage);
            assert!(matches!(end, Err(NarError::Changed { .. })), "{number}: {end:?}");
            assert!((PIECE..whole).contains(&came), "{number}: {came} of {whole}");
        }
        assert!(damaged(two_files, |_, _| {}).2.is_ok());
    }

    /// A sink that accepts files like a socket, but at most 100,000 bytes per call.
    #[derive(Default)]
    struct Socket {
        bytes: Vec<u8>,
        from_files: usize,
    }

    impl Write for Socket {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.bytes.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl NarSink for Socket {
        fn send_file(
            &mut self,
            file: BorrowedFd<'_>,
            at: u64,
            len: u64,
        ) -> io::Result<Option<u64>> {
            let mut piece = vec![0; len.min(100_000) as usize];
            let count = pread(file, &mut piece, at)?;
            self.bytes.extend_from_slice(&piece[..count]);
            self.from_files += count;
            Ok(Some(count as u64))
        }
    }

    #[test]
    fn sink_with_send_file_gets_same_bytes() {
        let size = 4 * PIECE + 5;
        let content: Vec<u8> = (0..size).map(|i| (i * 7 / 3) as u8).collect();
        let fixture = Fixture::new();
        let (info, nar) = fixture.add(|root| fs::write(root, &content).unwrap());
        for range in [
            0..nar.len(),
            1..nar.len(),
            PIECE..nar.len(),
            200..nar.len() - 1,
            7..3 * PIECE,
            5..6,
            9..9,
        ] {
            let mut out = Socket::default();
            let part = range.start as u64..range.end as u64;
            fixture.open().write_nar(&info, part, &mut out).unwrap();
            assert!(out.bytes == nar[range.clone()], "{range:?}");
            assert_eq!(out.from_files > 0, range.len() > 2 * PIECE + 200, "{range:?}");
        }
        // A file that is too short is never completed.
        let mut out = Socket::default();
        let files = fixture.absolute(info.path.base_name());
        fs::File::options().write(true).open(files).unwrap().set_len(size as u64 - 8).unwrap();
        assert!(fixture.open().write_nar(&info, 0..info.nar_size, &mut out).is_err());
        assert!(out.bytes.len() < nar.len());
    }

    #[test]
    fn failing_sink_ends_write() {
        struct Full;
        impl NarSink for Full {}
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let fixture = Fixture::new();
        let (info, _) = fixture.add(odd_tree);
        let end = fixture.open().write_nar(&info, 0..info.nar_size, &mut Full);
        assert!(matches!(end, Err(NarError::Write(_))));
    }

    #[test]
    fn tree_deeper_than_maximum_is_refused() {
        for (depth, good) in
            [(super::super::walk::MAX_DEPTH, true), (super::super::walk::MAX_DEPTH + 1, false)]
        {
            let fixture = Fixture::new();
            let (info, nar) = fixture.add(|root| {
                let mut dir = root.to_owned();
                for _ in 1..depth {
                    dir.push("d");
                }
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join("f"), "x").unwrap();
            });
            let result = range(&fixture, &info, 0..info.nar_size);
            assert_eq!(result.as_ref().ok() == Some(&nar), good);
            assert_eq!(matches!(result, Err(NarError::Unsupported { .. })), !good);
        }
    }
}
