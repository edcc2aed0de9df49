//! A store with a database for tests, in a temporary directory and with the tables of Nix 2.8.

use super::*;
use crate::lock::Mutex;
use crate::nix::NarHash;
use rusqlite::Connection;
use std::{
    fs,
    io::{self, Read},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt},
    },
    path::Path,
    sync::atomic::{AtomicU32, Ordering},
};

const TABLES: &str = "
    pragma journal_mode = wal;
    create table ValidPaths (id integer primary key autoincrement not null, path text unique not null,
        hash text not null, registrationTime integer not null, deriver text, narSize integer, ultimate integer,
        sigs text, ca text);
    create table Refs (referrer integer not null, reference integer not null, primary key (referrer, reference),
        foreign key (referrer) references ValidPaths(id) on delete cascade,
        foreign key (reference) references ValidPaths(id) on delete restrict);
    create index IndexReferrer on Refs(referrer);
    create index IndexReference on Refs(reference);";

/// A directory that is removed on drop.
pub(super) struct TempDir(PathBuf);

impl TempDir {
    pub(super) fn new() -> Self {
        TempDir::within(&std::env::temp_dir())
    }

    fn within(parent: &Path) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name =
            format!("peerix-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = parent.join(name);
        fs::create_dir(&dir).unwrap();
        TempDir(dir)
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The store, with a connection that writes to its database.
pub(crate) struct Fixture {
    dir: TempDir,
    writer: Mutex<Option<Connection>>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Fixture::within(TempDir::new())
    }

    /// Creates the store on a tmpfs: the overlayfs of containers does not support reads with
    /// RWF_NOWAIT.
    pub(super) fn in_memory() -> Self {
        Fixture::within(TempDir::within(Path::new("/dev/shm")))
    }

    fn within(dir: TempDir) -> Self {
        fs::create_dir_all(dir.path().join("store")).unwrap();
        fs::create_dir_all(dir.path().join("var/nix/db")).unwrap();
        fs::write(dir.path().join("var/nix/db/schema"), "10").unwrap();
        let writer = Connection::open(dir.path().join("var/nix/db/db.sqlite")).unwrap();
        writer.execute_batch(TABLES).unwrap();
        Fixture { dir, writer: Mutex::new(Some(writer)) }
    }

    pub(super) fn db(&self) -> PathBuf {
        self.dir.path().join("var/nix/db/db.sqlite")
    }

    pub(super) fn config(&self) -> StoreConfig {
        StoreConfig {
            store_dir: StoreDir::parse(&self.absolute("")).unwrap(),
            db: self.db(),
            root: "/".into(),
        }
    }

    pub(crate) fn open(&self) -> Store {
        Store::open_database(self.config()).unwrap()
    }

    /// Returns a store that has not opened its database.
    pub(super) fn closed(&self) -> Store {
        Store::new(self.config())
    }

    pub(crate) fn absolute(&self, base_name: &str) -> String {
        format!("{}/store/{base_name}", self.dir.path().display())
    }

    pub(super) fn log_dir(&self) -> PathBuf {
        self.dir.path().join("var/log/nix")
    }

    pub(crate) fn execute(&self, sql: &str) {
        self.writer.lock().as_ref().unwrap().execute_batch(sql).unwrap();
    }

    pub(super) fn close(&self) {
        *self.writer.lock() = None;
    }

    /// Registers a path `<hash part>-name` without files.
    pub(crate) fn register(&self, hash_part: &str, nar_size: u64) -> StorePath {
        let path = StorePath::parse(&format!("{hash_part}-name")).unwrap();
        let absolute = self.absolute(path.base_name());
        let hash = "ab".repeat(32);
        self.execute(&format!(
            "insert into ValidPaths (path, hash, registrationTime, narSize) \
             values ('{absolute}', 'sha256:{hash}', 1, {nar_size})"
        ));
        path
    }

    pub(super) fn refers(&self, from: &StorePath, to: &[&StorePath]) {
        for target in to {
            self.execute(&format!(
                "insert into Refs select a.id, b.id from ValidPaths a, ValidPaths b \
                 where a.path = '{}' and b.path = '{}'",
                self.absolute(from.base_name()),
                self.absolute(target.base_name())
            ));
        }
    }

    /// Registers a path whose files `make` creates, and returns its metadata and its NAR.
    pub(super) fn add(&self, make: impl FnOnce(&Path)) -> (PathInfo, Vec<u8>) {
        let base_name = format!("{}-name", "7".repeat(32));
        let files = PathBuf::from(self.absolute(&base_name));
        make(&files);
        let mut nar = token(b"nix-archive-1");
        plain_nar(&files, &mut nar);
        let path = self.register(&"7".repeat(32), nar.len() as u64);
        let info = PathInfo {
            path,
            nar_hash: NarHash::from_bytes([0xab; 32]),
            nar_size: nar.len() as u64,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        };
        (info, nar)
    }
}

fn token(bytes: &[u8]) -> Vec<u8> {
    let mut out = (bytes.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(bytes);
    out.resize(out.len().next_multiple_of(8), 0);
    out
}

// An independent, simple implementation of the NAR format, to compare with.
fn plain_nar(file: &Path, out: &mut Vec<u8>) {
    let words =
        |out: &mut Vec<u8>, words: &[&[u8]]| words.iter().for_each(|word| out.extend(token(word)));
    let metadata = fs::symlink_metadata(file).unwrap();
    words(out, &[b"(", b"type"]);
    if metadata.is_symlink() {
        words(out, &[b"symlink", b"target", fs::read_link(file).unwrap().as_os_str().as_bytes()]);
    } else if metadata.is_file() {
        words(out, &[b"regular"]);
        if metadata.mode() & 0o100 != 0 {
            words(out, &[b"executable", b""]);
        }
        words(out, &[b"contents", &fs::read(file).unwrap()]);
    } else {
        words(out, &[b"directory"]);
        let mut names: Vec<_> =
            fs::read_dir(file).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        for name in names {
            words(out, &[b"entry", b"(", b"name", name.as_bytes(), b"node"]);
            plain_nar(&file.join(&name), out);
            words(out, &[b")"]);
        }
    }
    words(out, &[b")"]);
}

/// Creates a small tree with every kind of entry that a NAR can hold.
pub(super) fn odd_tree(root: &Path) {
    let name = |bytes: &[u8]| root.join(std::ffi::OsStr::from_bytes(bytes));
    fs::create_dir(root).unwrap();
    fs::create_dir(name(b"empty")).unwrap();
    fs::create_dir_all(name(b"b/c/d")).unwrap();
    for (file, len) in
        [(&b"a"[..], 0), (b"a.b", 1), (b"a-b", 7), (b"B", 8), (b"b/x", 9), (b"\xff\xfe", 100)]
    {
        fs::write(name(file), vec![b'x'; len]).unwrap();
    }
    fs::write(name("ä b\n".as_bytes()), "text").unwrap();
    fs::write(name(b"b/c/run"), "#!/bin/sh").unwrap();
    fs::set_permissions(name(b"b/c/run"), fs::Permissions::from_mode(0o555)).unwrap();
    fs::write(name(b"b/c/group"), "only others may run it").unwrap();
    fs::set_permissions(name(b"b/c/group"), fs::Permissions::from_mode(0o455)).unwrap();
    std::os::unix::fs::symlink("../../nowhere", name(b"b/link")).unwrap();
    std::os::unix::fs::symlink("empty", name(b"dir-link")).unwrap();
}

/// Accepts all bytes, and calls `at_first` at the first write that has more bytes than the NAR's
/// magic.
pub(super) struct Receiver<F: FnMut()> {
    pub(super) bytes: Vec<u8>,
    pub(super) at_first: F,
}

impl<F: FnMut()> super::NarSink for Receiver<F> {}

impl<F: FnMut()> io::Write for Receiver<F> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() <= crate::nix::nar::MAGIC.len()
            && bytes.len() > crate::nix::nar::MAGIC.len()
        {
            (self.at_first)();
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads to the end.
pub(super) fn all(mut reader: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes)?;
    Ok(bytes)
}
