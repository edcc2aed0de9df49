//! Test data that Nix 2.8.0 wrote.
//!
//! * `narinfos`: output of `nix copy --to file://…?compression=none` (the last one: bzip2) for
//!   paths made by `nix-store --add`, `--add-fixed` with each algorithm, `builtins.toFile`, two
//!   builds, and `nix store make-content-addressed` of these. Some are signed by `nix store sign -k
//!   secret-key`.
//! * `tree.nar`: output of `nix-store --dump`.
//! * `tree.ls`: output of `write-nar-listing=true`.
//! * `secret-key` and `public-key`: made by `nix-store --generate-binary-cache-key`, used in tests
//!   only.

use super::{NarInfo, StoreDir, nar};

pub const SECRET_KEY: &str = include_str!("../../tests/data/secret-key");
pub const PUBLIC_KEY: &str = include_str!("../../tests/data/public-key");
pub const TREE_NAR: &[u8] = include_bytes!("../../tests/data/tree.nar");
pub const TREE_LS: &[u8] = include_bytes!("../../tests/data/tree.ls");
const NARINFOS: &str = include_str!("../../tests/data/narinfos");

pub fn store_dir() -> StoreDir {
    StoreDir::parse("/nix/store").unwrap()
}

pub fn narinfo_texts() -> Vec<String> {
    NARINFOS.split("StorePath: ").skip(1).map(|text| format!("StorePath: {text}")).collect()
}

pub fn narinfos() -> Vec<NarInfo> {
    narinfo_texts()
        .iter()
        .map(|text| NarInfo::parse(text.as_bytes(), &store_dir()).unwrap())
        .collect()
}

pub fn narinfo(hash_part: &str) -> NarInfo {
    narinfos().into_iter().find(|n| n.info.path.hash_part().as_str() == hash_part).unwrap()
}

pub enum Node {
    /// Whether it is executable, and its contents.
    Regular(bool, Vec<u8>),
    Symlink(Vec<u8>),
    /// Entries in the order of their names' bytes.
    Directory(Vec<(Vec<u8>, Node)>),
}

pub fn directory(entries: Vec<(&[u8], Node)>) -> Node {
    Node::Directory(entries.into_iter().map(|(name, node)| (name.to_vec(), node)).collect())
}

pub fn regular(contents: &[u8]) -> Node {
    Node::Regular(false, contents.to_vec())
}

/// The tree that `tree.nar` and `tree.ls` describe.
pub fn tree() -> Node {
    let lens =
        (1..10).map(|n: u8| (format!("len{n}").into_bytes(), regular(&(0..n).collect::<Vec<_>>())));
    let empty = (b"empty-dir".to_vec(), Node::Directory(vec![]));
    let sub = Node::Directory(std::iter::once(empty).chain(lens).collect());
    let dir = directory(vec![
        (b"empty", regular(b"")),
        (b"run", Node::Regular(true, b"#!/bin/sh\necho hello\n".to_vec())),
        (b"sub", sub),
    ]);
    let same = |name: &'static [u8]| (name, regular(name));
    let long: &[u8] = &[b'n'; 255];
    directory(vec![
        same(b"\x01"),
        same(b"%s"),
        same(b"..."),
        same(b".hidden"),
        same(b"A"),
        same(b"a"),
        same(b"a\nnewline"),
        same(b"a.b"),
        same(b"aB"),
        (b"dir", dir),
        (b"exec-empty", Node::Regular(true, vec![])),
        (b"link", Node::Symlink(b"../dir/run".to_vec())),
        (long, regular(long)),
        (b"odd-target", Node::Symlink(b"/no where/\xff".to_vec())),
        same(b"quo\"te\\"),
        same(b"sp ace"),
        same(b"~"),
        same("é".as_bytes()),
        same(b"\xff\xfe"),
    ])
}

/// Writes a NAR with the functions of [`nar`].
pub fn write_nar(root: &Node) -> Vec<u8> {
    fn write(out: &mut Vec<u8>, node: &Node) {
        match node {
            Node::Regular(executable, contents) => {
                let start = out.len() as u64;
                nar::regular_open(out, *executable, contents.len() as u64);
                assert_eq!(out.len() as u64, start + nar::regular_open_len(*executable));
                out.extend_from_slice(contents);
                out.extend_from_slice(nar::padding(contents.len() as u64));
                out.extend_from_slice(&nar::CLOSE);
            }
            Node::Symlink(target) => nar::symlink(out, target),
            Node::Directory(entries) => {
                out.extend_from_slice(&nar::DIRECTORY_OPEN);
                for (name, node) in entries {
                    nar::entry_open(out, name);
                    write(out, node);
                    out.extend_from_slice(&nar::CLOSE);
                }
                out.extend_from_slice(&nar::CLOSE);
            }
        }
    }
    let mut out = nar::MAGIC.to_vec();
    write(&mut out, root);
    out
}
