//! Store paths built by real Nix: closures, many files, large files, odd names. They are built once
//! and kept between runs.

use super::lan::{Host, Lan, Run};
use super::{directory, nix};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const EXPRESSION: &str = include_str!("world.nix");

/// Builds the fixture in the directory `$1`.
const SCRIPT: &str = r#"
cd "$1"
nix-store --generate-binary-cache-key cache-1 cache.sec cache.pub
mkdir nix cache
printf 'StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 90\n' > cache/nix-cache-info
for name in closure300 closure1000 big middle many odd large little other; do
    derivation=$(nix-instantiate /tmp/world.nix --argstr salt peerix -A $name 2> /tmp/said || { cat /tmp/said >&2; exit 1; })
    path=$(nix-store --realise $derivation 2> /tmp/said || { cat /tmp/said >&2; exit 1; })
    echo $name $path >> /tmp/paths
    [ $name = big ] || echo $path >> /tmp/cached
done
nix copy --to "file://$PWD/cache?compression=none&secret-key=$PWD/cache.sec" $(cat /tmp/cached)
cp -a /nix/store /nix/var nix/
mv /tmp/paths .
"#;

/// The fixture: a store directory with its database, and a static cache with all paths but `big`,
/// signed with [`World::cache_key`].
pub struct World {
    dir: PathBuf,
    paths: BTreeMap<String, String>,
    /// Public key of the static cache.
    pub cache_key: String,
}

impl World {
    /// Opens the fixture. Builds it on a host of `lan` first if there is none, which takes a
    /// minute.
    pub fn on(lan: &Lan) -> World {
        let dir = nix::fixture_dir("world", (EXPRESSION, SCRIPT));
        // Test programs that run at the same time may build the same fixture.
        let lock = fs::File::create(directory().join("world.lock"))
            .expect("the directory for fixtures is writable");
        flock(&lock, FlockOperation::LockExclusive).expect("one at a time");
        if !dir.join("paths").exists() {
            eprintln!("making store paths, once; this takes a minute");
            make(lan, &dir);
        }
        let read = |name: &str| fs::read_to_string(dir.join(name)).expect("the fixture is whole");
        let paths = read("paths")
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, path)| (name.to_owned(), path.to_owned()))
            .collect();
        World { paths, cache_key: read("cache.pub").trim().to_owned(), dir }
    }

    /// The store path that `world.nix` calls `name`.
    pub fn path(&self, name: &str) -> &str {
        &self.paths[name]
    }

    /// The store directory of the fixture, for comparisons.
    pub fn store(&self) -> PathBuf {
        self.dir.join("nix/store")
    }

    /// The directory of the uncompressed static cache, which every host sees at the same path.
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// The URL of the static cache as a substituter.
    pub fn next(&self) -> String {
        format!("file://{}", self.cache().display())
    }

    /// Gives `host` a writable copy-on-write view of the store. The fixture does not change.
    pub fn give(&self, host: &Host) {
        nix::configure(host, "");
        let dir = self.dir.join("nix");
        let dir = dir.display();
        host.sh(&format!(
            "mkdir /nix/.upper /nix/.work /nix/store
             mount -t overlay peerix-store -o lowerdir={dir}/store,upperdir=/nix/.upper,workdir=/nix/.work /nix/store
             cp -a {dir}/var /nix/var"
        ));
    }

    /// Signs all paths in the store of `host` with the key of the static cache.
    pub fn sign(&self, host: &Host) {
        let key = self.dir.join("cache.sec");
        host.cmd("nix").args(["store", "sign", "--all", "--key-file"]).arg(key).okay();
    }
}

/// The base name of a store path.
pub fn base_name(path: &str) -> &str {
    path.rsplit('/').next().expect("a path has a name")
}

/// The hash part of a store path: the first 32 characters of its base name.
pub fn hash_part(path: &str) -> &str {
    &base_name(path)[..32]
}

fn make(lan: &Lan, dir: &Path) {
    let parts = dir.with_extension("part");
    let _ = fs::remove_dir_all(&parts);
    fs::create_dir_all(&parts).expect("a directory for the fixture");
    let host = lan.host("maker");
    nix::configure(&host, "");
    host.write("/tmp/world.nix", EXPRESSION);
    host.cmd("sh").args(["-ec", SCRIPT, "make"]).arg(&parts).okay();
    let _ = fs::remove_dir_all(dir);
    fs::rename(&parts, dir).expect("the fixture gets its name");
}
