//! The store that is served: made, registered and signed once by real Nix, exported as a static
//! cache as well, and kept between runs.

use crate::common::lan::Run;
use crate::common::{Host, Lan, directory, nix};
use peerix::nix::nix32;
use rustix::fs::{FlockOperation, flock};
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Version of the fixture. Increase it when a change below alters the paths or their content.
const VERSION: u32 = 1;
/// Number of paths of about 4 KiB. Every block of [`BLOCK`] is the closure of its first path.
const SMALL: usize = 20_000;
pub const BLOCK: usize = 1000;
/// References within a block: a tree with this many branches that reaches all of it.
const BRANCHES: usize = 4;
/// Exclusive bound of the additional random references of a path.
const MAX_EXTRA_REFERENCES: u64 = 9;
/// Paths whose NARs a system update asks for. Sizes in bytes are log-normal, [`LARGEST`] at most.
const UPDATE: usize = 300;
const MEDIAN: f64 = 60.0 * 1024.0;
const SIGMA: f64 = 2.0;
const LARGEST: f64 = 64.0 * 1024.0 * 1024.0;
/// Such a path has one file per [`FILE`] bytes, but at most [`FILES`].
const FILE: usize = 16 << 10;
const FILES: usize = 64;
/// Directories of the tree, with [`IN_EACH`] files in each.
const DIRECTORIES: usize = 200;
const IN_EACH: usize = 100;
/// Length of a hash part in Nix32 digits of five bits each.
const HASH_PART: usize = 32;
const MIB: usize = 1 << 20;
/// Bytes of memory that must stay available when the store is copied to a tmpfs.
const SPARE: u64 = 2 << 30;

/// Registers the content of `$1/nix` with real Nix, which hashes and canonicalises it.
const SCRIPT: &str = r#"
cd "$1"
mount --bind nix /nix
nix-store --init
nix-store --generate-binary-cache-key bench-1 key.sec key.pub
nix-store --register-validity < registration
nix-store --verify --check-contents
nix store sign --all --key-file key.sec
mkdir cache
nix copy --to "file://$PWD/cache?compression=none" --all
rm key.sec
umount /nix
du -sm nix cache | awk '{ n += $1 } END { print n }' > size
"#;

/// Full store paths of the fixture.
pub struct Fixture {
    dir: PathBuf,
    /// Held while the fixture is in use, because two concurrent runs would distort the results.
    _lock: File,
    /// Public key of all signatures.
    pub key: String,
    /// 20,000 paths of about 4 KiB.
    pub small: Vec<String>,
    /// 300 paths of log-normal size.
    pub update: Vec<String>,
    /// A file of 1 GiB that does not compress.
    pub large: String,
    /// A file with the last tenth of [`Fixture::large`].
    pub last_of_large: String,
    /// Four files of 256 MiB, parts of [`Fixture::large`].
    pub quarters: Vec<String>,
    /// 20,000 files of 658 bytes in 200 directories.
    pub tree: String,
    /// 2,000 files of 658 bytes in 20 directories.
    pub last_of_tree: String,
}

impl Fixture {
    /// Finds the fixture, or makes it, which takes some minutes. Blocks without a bound while
    /// another run holds the lock.
    pub fn on(lan: &Lan) -> Fixture {
        let dir = directory().join(format!("serve-{VERSION}"));
        let lock = File::create(directory().join("serve.lock"))
            .expect("the directory for fixtures is writable");
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            eprintln!("another run of this benchmark is at work: waiting for its end");
            flock(&lock, FlockOperation::LockExclusive).expect("one at a time");
        }
        let mut fixture = Fixture {
            key: String::new(),
            small: (0..SMALL).map(|n| path(&format!("small-{n}"))).collect(),
            update: (0..UPDATE).map(|n| path(&format!("update-{n}"))).collect(),
            large: path("large"),
            last_of_large: path("last-of-large"),
            quarters: (0..4).map(|n| path(&format!("quarter-{n}"))).collect(),
            tree: path("tree"),
            last_of_tree: path("last-of-tree"),
            dir,
            _lock: lock,
        };
        if !fixture.dir.join("size").exists() {
            eprintln!(
                "making a store of 20,000 paths and its static cache in {}, once",
                fixture.dir.display()
            );
            fixture.make(lan);
        }
        fixture.key = fs::read_to_string(fixture.dir.join("key.pub"))
            .expect("the fixture is whole")
            .trim()
            .to_owned();
        fixture
    }

    /// Directory of the static cache, as this machine sees it.
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// All paths of the fixture.
    pub fn paths(&self) -> impl Iterator<Item = &String> {
        let single = [&self.large, &self.last_of_large, &self.tree, &self.last_of_tree];
        self.small.iter().chain(&self.update).chain(&self.quarters).chain(single)
    }

    /// Size of the store and the static cache together, in MiB.
    pub fn mebibytes(&self) -> u64 {
        let text = fs::read_to_string(self.dir.join("size")).expect("the fixture is whole");
        text.trim().parse().expect("a number")
    }

    /// Gives the store to `host`. Returns the directory of the static cache on that host, and true
    /// if both are on a tmpfs.
    pub fn give(&self, host: &Host) -> (PathBuf, bool) {
        nix::configure(host, "");
        let dir = self.dir.display();
        let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let free = info
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix(" kB"));
        let free = free.and_then(|free| free.parse().ok()).unwrap_or(0u64) << 10;
        host.sh(&format!("cp -a {dir}/nix/var /nix/var"));
        if free > (self.mebibytes() << 20) + SPARE {
            host.sh(&format!("cp -a {dir}/nix/store /nix/store; cp -a {dir}/cache /nix/cache"));
            return (PathBuf::from("/nix/cache"), true);
        }
        host.sh(&format!("mkdir /nix/store; mount --bind -o ro {dir}/nix/store /nix/store"));
        (self.cache(), false)
    }

    fn make(&self, lan: &Lan) {
        for entry in fs::read_dir(directory()).expect("the directory for fixtures").flatten() {
            if entry.file_name().to_string_lossy().starts_with("serve-") {
                fs::remove_dir_all(entry.path()).expect("an older fixture can be removed");
            }
        }
        let parts = self.dir.with_extension("part");
        let _ = fs::remove_dir_all(&parts);
        let at = |path: &str| parts.join(path.strip_prefix('/').expect("an absolute path"));
        fs::create_dir_all(at("/nix/store")).expect("a directory for the fixture");
        let mut registration = String::new();
        let mut register = |path: &str, references: &[&String]| {
            let name = &path["/nix/store/".len() + HASH_PART + 1..];
            let deriver = self::path(&format!("{name}.drv"));
            write!(registration, "{path}\n{deriver}\n{}\n", references.len())
                .expect("a string takes everything");
            references.iter().for_each(|path| registration.extend([path.as_str(), "\n"]));
        };
        for (n, path) in self.small.iter().enumerate() {
            let references: Vec<&String> =
                references(n).into_iter().map(|n| &self.small[n]).collect();
            file(&at(path), text(path, &references).as_bytes());
            register(path, &references);
        }
        let mut bytes = Bytes(1);
        for path in &self.update {
            let size = bytes.log_normal();
            let count = size.div_ceil(FILE).min(FILES);
            for n in 0..count {
                file(&at(path).join(n.to_string()), &bytes.some(size / count));
            }
            register(path, &[]);
        }
        let large = bytes.some(1024 * MIB);
        file(&at(&self.large), &large);
        file(&at(&self.last_of_large), &large[large.len() / 10 * 9..]);
        for (path, part) in self.quarters.iter().zip(large.chunks(256 * MIB)) {
            file(&at(path), part);
        }
        for (path, directories) in
            [(&self.tree, DIRECTORIES), (&self.last_of_tree, DIRECTORIES / 10)]
        {
            for (d, f) in (0..directories).flat_map(|d| (0..IN_EACH).map(move |f| (d, f))) {
                file(
                    &at(path).join(format!("{d}/{f}")),
                    format!("{d:03} {f:02}\n").repeat(94).as_bytes(),
                );
            }
        }
        let single = [&self.large, &self.last_of_large, &self.tree, &self.last_of_tree];
        single.into_iter().chain(&self.quarters).for_each(|path| register(path, &[]));
        fs::write(parts.join("registration"), registration).expect("the fixture can be written");
        let host = lan.host("maker");
        nix::configure(&host, "");
        host.cmd("sh").args(["-ec", SCRIPT, "make"]).arg(&parts).okay();
        fs::rename(&parts, &self.dir).expect("the fixture gets its name");
    }
}

/// A store path whose hash part is derived from its name, as for an input-addressed path.
fn path(name: &str) -> String {
    let digest =
        ring::digest::digest(&ring::digest::SHA256, format!("{VERSION} {name}").as_bytes());
    format!("/nix/store/{}-{name}", nix32::encode(&digest.as_ref()[..HASH_PART * 5 / 8]))
}

/// Indices of the paths that small path `n` refers to: later ones of its block.
fn references(n: usize) -> Vec<usize> {
    let (block, place) = (n / BLOCK * BLOCK, n % BLOCK);
    let tree =
        (1..=BRANCHES).map(|branch| place * BRANCHES + branch).filter(|place| *place < BLOCK);
    let mut random = Bytes(n as u64);
    let later = BLOCK - 1 - place;
    let more: Vec<usize> = (0..random.below(MAX_EXTRA_REFERENCES))
        .map(|_| place + 1 + random.below(later.max(1) as u64))
        .collect();
    let mut all: Vec<usize> =
        tree.chain(more).filter(|place| *place < BLOCK).map(|place| block + place).collect();
    all.sort_unstable();
    all.dedup();
    all
}

/// Unique text of about 3.9 KB for a small path.
fn text(path: &str, references: &[&String]) -> String {
    let mut text = format!("# {path}\n");
    references.iter().for_each(|path| text.extend([path.as_str(), "\n"]));
    let mut random =
        Bytes(path.bytes().fold(0, |sum, byte| sum * 31 % 1_000_000_007 + u64::from(byte)));
    while text.len() < 3900 {
        writeln!(text, "set value-{:05} {}", random.below(100_000), random.below(1_000_000))
            .expect("a string");
    }
    text
}

fn file(path: &Path, content: &[u8]) {
    fs::create_dir_all(path.parent().expect("a file is in a directory"))
        .expect("the fixture can be written");
    fs::write(path, content).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// A deterministic random number generator (splitmix64).
struct Bytes(u64);

impl Bytes {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut n = self.0;
        n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        n ^ (n >> 31)
    }

    fn below(&mut self, end: u64) -> usize {
        usize::try_from(self.next() % end).expect("small")
    }

    fn some(&mut self, count: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(count);
        bytes
    }

    /// A log-normal size in bytes, by the Box–Muller transform.
    fn log_normal(&mut self) -> usize {
        let mut uniform = || (self.below(1 << 53) as f64 + 1.0) / (1u64 << 53) as f64;
        let normal = (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
        let size = (MEDIAN * (SIGMA * normal).exp()).clamp(1.0, LARGEST);
        size as usize
    }
}
