//! Store paths made by real Nix: closures, many files, large files, odd names. Made once and kept.

use super::lan::{Host, Lan, Run};
use super::{directory, nix};
use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

const EXPRESSION: &str = include_str!("world.nix");

/// The fixture: a Nix store directory with its database, and all of it (but `big`) as a static cache signed by
/// [`World::cache_key`].
pub struct World {
    dir: PathBuf,
    paths: BTreeMap<String, String>,
    /// Public key of the static cache.
    pub cache_key: String,
}

impl World {
    /// Finds it, or makes it, which takes a minute, on a host of `lan`.
    pub fn on(lan: &Lan) -> World {
        let version = nix::version();
        let mut hasher = DefaultHasher::new();
        (EXPRESSION, include_str!("world.rs"), &version).hash(&mut hasher);
        let dir = directory().join(format!("world-{:016x}", hasher.finish()));
        if !dir.join("paths").exists() {
            eprintln!("making store paths with {version}, once; this takes a minute");
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

    /// The store path called `name` in `world.nix`.
    pub fn path(&self, name: &str) -> &str {
        &self.paths[name]
    }

    /// The store directory, to compare with.
    pub fn store(&self) -> PathBuf {
        self.dir.join("nix/store")
    }

    /// The static cache, without compression, as every host can see it.
    pub fn cache(&self) -> PathBuf {
        self.dir.join("cache")
    }

    /// The static cache as a substituter that comes after peerix.
    pub fn next(&self) -> String {
        format!("file://{}", self.cache().display())
    }

    /// Gives `host` everything, writable, and changes nothing in the fixture.
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

    /// Signs `paths` and what they need in the store of `host` as the static cache does.
    pub fn sign(&self, host: &Host, paths: &[&str]) {
        let key = self.dir.join("cache.sec");
        host.cmd("nix").args(["store", "sign", "--recursive", "--key-file"]).arg(key).args(paths).okay();
    }
}

/// The base name of a store path.
pub fn base_name(path: &str) -> &str {
    path.rsplit('/').next().expect("a path has a name")
}

/// The 32 digits that peers are asked for.
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
    let names = "closure300 closure1000 big middle many odd large little other";
    let output = parts.display();
    host.sh(&format!(
        "cd /tmp
         nix-store --generate-binary-cache-key cache-1 {output}/cache.sec {output}/cache.pub
         mkdir {output}/nix {output}/cache
         echo 'StoreDir: /nix/store
WantMassQuery: 1
Priority: 90' > {output}/cache/nix-cache-info
         for name in {names}; do
             drv=$(nix-instantiate world.nix --argstr salt peerix -A $name 2>/dev/null)
             path=$(nix-store --realise $drv 2>/dev/null)
             echo $name $path >> paths
             [ $name = big ] || echo $path >> cached
         done
         nix copy --to 'file://{output}/cache?compression=none&secret-key={output}/cache.sec' $(cat cached)
         cp -a /nix/store /nix/var {output}/nix/
         mv paths {output}/paths"
    ));
    let _ = fs::remove_dir_all(dir);
    fs::rename(&parts, dir).expect("the fixture gets its name");
}
