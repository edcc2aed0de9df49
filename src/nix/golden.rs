//! What Nix 2.8.0 wrote, for the tests of these formats.
//!
//! `narinfos`: `nix copy --to file://…?compression=none` (the last one: bzip2) of paths made by `nix-store
//! --add`, `--add-fixed` with each algorithm, `builtins.toFile`, two builds, `nix store make-content-addressed`
//! of these, some signed by `nix store sign -k secret-key`. The key pair
//! is of `nix-store --generate-binary-cache-key` and signs nothing else.

use super::{NarInfo, StoreDir};

pub const SECRET_KEY: &str = include_str!("../../tests/data/secret-key");
pub const PUBLIC_KEY: &str = include_str!("../../tests/data/public-key");
const NARINFOS: &str = include_str!("../../tests/data/narinfos");

pub fn store_dir() -> StoreDir {
    StoreDir::parse("/nix/store").unwrap()
}

pub fn narinfo_texts() -> Vec<String> {
    NARINFOS.split("StorePath: ").skip(1).map(|text| format!("StorePath: {text}")).collect()
}

pub fn narinfos() -> Vec<NarInfo> {
    narinfo_texts().iter().map(|text| NarInfo::parse(text.as_bytes(), &store_dir()).unwrap()).collect()
}

pub fn narinfo(hash_part: &str) -> NarInfo {
    narinfos().into_iter().find(|n| n.info.path.hash_part().as_str() == hash_part).unwrap()
}
