//! Visits the files of a store path in NAR order, without recursion and without following symlinks.

use super::NarError;
use crate::nix::StorePath;
use rustix::{
    fs::{AtFlags, FileType, Mode, OFlags, RawDir, openat, readlinkat, statat},
    io::Errno,
};
use std::{
    ffi::{CStr, CString},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

/// Most directories inside each other; deeper trees are unsupported. Nix can create such a path
/// only if its names have at most 15 bytes on average (`PATH_MAX`). Each open level costs a file
/// descriptor.
pub(super) const MAX_DEPTH: usize = 256;
/// Most bytes of lists of entries in all open directories together; more are unsupported. 450,000
/// files in one directory with names of 40 bytes fit.
const MAX_LISTED: usize = 24 << 20;
/// Buffer of one `getdents` call, in bytes: about 1,000 names.
const ENTRIES_BUFFER: usize = 32 << 10;

/// One step of a walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WalkStep {
    /// A directory; its entries follow.
    Enter,
    /// The end of the most recently entered directory.
    Leave,
    /// A regular file, as listed; it may be replaced before it is opened.
    Regular,
    /// A symbolic link.
    Symlink,
}

/// A walk through one store path, by file descriptors only, so that a directory that is moved or
/// replaced meanwhile cannot lead elsewhere.
#[derive(Debug)]
pub(super) struct Walk {
    store: OwnedFd,
    root: CString,
    store_dir: String,
    has_begun: bool,
    directories: Vec<OpenDirectory>,
    /// How many of `directories` enclose the current entry.
    depth: usize,
    /// Bytes of the lists of entries in `directories`.
    listed: usize,
    buffer: Vec<u8>,
}

#[derive(Debug)]
struct OpenDirectory {
    descriptor: OwnedFd,
    /// The names of the entries, each with its NUL.
    names: Vec<u8>,
    entries: Vec<DirectoryEntry>,
    /// Index of the entry after the current one.
    next: usize,
}

#[derive(Debug, Clone, Copy)]
struct DirectoryEntry {
    /// Where its name is in `names`, which [`MAX_LISTED`] bounds.
    start: u32,
    end: u32,
    kind: FileType,
}

impl DirectoryEntry {
    fn name(self, names: &[u8]) -> &[u8] {
        &names[self.start as usize..self.end as usize]
    }
}

/// Memory of a list of entries, in bytes.
fn listed(names: &[u8], entries: &[DirectoryEntry]) -> usize {
    names.len() + size_of_val(entries)
}

impl OpenDirectory {
    fn name(&self, entry: DirectoryEntry) -> &CStr {
        CStr::from_bytes_with_nul(entry.name(&self.names)).expect("copied from a CStr")
    }

    /// Memory of the list of entries, in bytes.
    fn listed(&self) -> usize {
        listed(&self.names, &self.entries)
    }

    fn current(&self) -> Option<&CStr> {
        self.next.checked_sub(1).map(|index| self.name(self.entries[index]))
    }
}

impl Walk {
    /// Creates a walk through `path` in the directory `store`. `store_dir` is that directory's
    /// path, for messages.
    pub(super) fn new(store: OwnedFd, store_dir: &str, path: &StorePath) -> Self {
        Walk {
            store,
            root: CString::new(path.base_name()).expect("store paths have no NUL"),
            store_dir: store_dir.to_owned(),
            has_begun: false,
            directories: Vec::new(),
            depth: 0,
            listed: 0,
            buffer: Vec::new(),
        }
    }

    /// Advances to the next step; `None` after the last one. Blocks on the disk.
    pub(super) fn advance(&mut self) -> Result<Option<WalkStep>, NarError> {
        let listed = if self.has_begun {
            let Some(directory) = self.directories.last_mut() else { return Ok(None) };
            let Some(entry) = directory.entries.get(directory.next) else {
                self.listed -= directory.listed();
                self.directories.pop();
                self.depth = self.directories.len();
                return Ok(Some(WalkStep::Leave));
            };
            directory.next += 1;
            entry.kind
        } else {
            self.has_begun = true;
            FileType::Unknown
        };
        self.depth = self.directories.len();
        let kind = match listed {
            FileType::Unknown => self.ask_kind()?,
            known => known,
        };
        match kind {
            FileType::RegularFile => Ok(Some(WalkStep::Regular)),
            FileType::Symlink => Ok(Some(WalkStep::Symlink)),
            FileType::Directory => {
                let directory = self.read_directory()?;
                self.directories.push(directory);
                Ok(Some(WalkStep::Enter))
            }
            _ => Err(NarError::Unsupported {
                path: self.path(),
                why: "neither file, directory nor symlink",
            }),
        }
    }

    /// Checks that the store path exists, before the first step. Blocks on the disk.
    pub(super) fn check_exists(&self) -> Result<(), NarError> {
        self.ask_kind().map(drop)
    }

    /// Returns whether the current entry is the store path itself.
    pub(super) fn at_root(&self) -> bool {
        self.depth == 0
    }

    /// Returns the current entry's name. At [`WalkStep::Leave`] that is the directory that ended.
    pub(super) fn name(&self) -> &CStr {
        self.location().1
    }

    /// Returns the current entry's directory and name, for `openat` and its like.
    pub(super) fn location(&self) -> (BorrowedFd<'_>, &CStr) {
        match self.depth.checked_sub(1).map(|index| &self.directories[index]) {
            Some(directory) => (directory.descriptor.as_fd(), directory.current().unwrap_or(c"")),
            None => (self.store.as_fd(), &self.root),
        }
    }

    /// Reads the target of the current symlink.
    pub(super) fn target(&self) -> Result<CString, NarError> {
        let (directory, name) = self.location();
        readlinkat(directory, name, Vec::new()).map_err(|error| self.failed(error))
    }

    /// Returns the current entry's full path, for messages.
    pub(super) fn path(&self) -> String {
        let mut path = format!("{}/{}", self.store_dir, self.root.to_string_lossy());
        for name in self.directories[..self.depth].iter().filter_map(OpenDirectory::current) {
            path.push('/');
            path.push_str(&name.to_string_lossy());
        }
        path
    }

    /// Returns the error for a failed system call on the current entry.
    pub(super) fn failed(&self, error: Errno) -> NarError {
        match error {
            Errno::NOENT => self.changed("vanished"),
            Errno::LOOP | Errno::NOTDIR | Errno::NXIO | Errno::INVAL => {
                self.changed("became another kind of file")
            }
            _ => NarError::Read { path: self.path(), cause: error.into() },
        }
    }

    /// Returns the error that the current entry differs from the registered one.
    pub(super) fn changed(&self, why: &'static str) -> NarError {
        NarError::Changed { path: self.path(), why }
    }

    fn ask_kind(&self) -> Result<FileType, NarError> {
        let (directory, name) = self.location();
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| self.failed(error))?;
        Ok(FileType::from_raw_mode(stat.st_mode))
    }

    fn read_directory(&mut self) -> Result<OpenDirectory, NarError> {
        if self.directories.len() == MAX_DEPTH {
            return Err(NarError::Unsupported {
                path: self.path(),
                why: "more than 256 directories deep",
            });
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let (parent, name) = self.location();
        let descriptor =
            openat(parent, name, flags, Mode::empty()).map_err(|error| self.failed(error))?;

        let mut names = Vec::new();
        let mut entries = Vec::new();
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.reserve(ENTRIES_BUFFER);
        let mut listing = RawDir::new(&descriptor, buffer.spare_capacity_mut());
        while let Some(entry) = listing.next() {
            let entry = entry.map_err(|error| self.failed(error))?;
            let name = entry.file_name().to_bytes_with_nul();
            if matches!(name, b".\0" | b"..\0") {
                continue;
            }
            let start = names.len() as u32;
            names.extend_from_slice(name);
            let end = names.len() as u32;
            entries.push(DirectoryEntry { start, end, kind: entry.file_type() });
            if self.listed + listed(&names, &entries) > MAX_LISTED {
                return Err(NarError::Unsupported {
                    path: self.path(),
                    why: "more than 24 MiB of lists of files",
                });
            }
        }
        self.buffer = buffer;
        self.listed += listed(&names, &entries);
        // The NULs do not change the order: every byte of a name is greater.
        entries.sort_unstable_by(|a, b| a.name(&names).cmp(b.name(&names)));
        Ok(OpenDirectory { descriptor, names, entries, next: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_with_short_names_count_with_their_own_size() {
        let entry = DirectoryEntry { start: 0, end: 2, kind: FileType::RegularFile };
        // A million names of one letter, each with its NUL.
        let million = listed(&vec![0; 2_000_000], &vec![entry; 1_000_000]);
        assert!((12_000_000..=MAX_LISTED).contains(&million), "{million}");
        let long = listed(&vec![0; 41 * 450_000], &vec![entry; 450_000]);
        assert!(long <= MAX_LISTED, "{long}");
    }
}
