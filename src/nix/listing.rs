//! NAR listings, the `.ls` files of a binary cache: version 1, JSON, as Nix writes them (Nix
//! manual, "NAR listing format"). Appended piece by piece by whoever walks the tree:
//!
//! [`open`], one node, [`close`]. A node is [`regular`], [`symlink`], or [`directory_open`], for
//! each entry in the order of the NAR [`entry`] and a node, and [`directory_close`].
//!
//! JSON has no way to write bytes that are not UTF-8, which Nix puts in as they are. Here each such
//! sequence becomes U+FFFD, so that the listing stays JSON; two names may then look the same.

use std::io::Write;

/// Begins the listing.
pub fn open(out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"version":1,"root":"#);
}

/// Ends the listing.
pub fn close(out: &mut Vec<u8>) {
    out.push(b'}');
}

/// A regular file of `size` bytes, whose contents begin at byte `nar_offset` of the NAR.
pub fn regular(out: &mut Vec<u8>, size: u64, executable: bool, nar_offset: u64) {
    let executable = if executable { r#","executable":true"# } else { "" };
    write!(out, r#"{{"type":"regular","size":{size}{executable},"narOffset":{nar_offset}}}"#)
        .expect(MEMORY);
}

/// A symlink.
pub fn symlink(out: &mut Vec<u8>, target: &[u8]) {
    out.extend_from_slice(br#"{"type":"symlink","target":"#);
    string(out, target);
    out.push(b'}');
}

/// Begins a directory.
pub fn directory_open(out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"type":"directory","entries":{"#);
}

/// Names the node that follows; `first` says that no entry of the directory came before.
pub fn entry(out: &mut Vec<u8>, first: bool, name: &[u8]) {
    if !first {
        out.push(b',');
    }
    string(out, name);
    out.push(b':');
}

/// Ends a directory.
pub fn directory_close(out: &mut Vec<u8>) {
    out.extend_from_slice(b"}}");
}

const MEMORY: &str = "a Vec takes every byte";

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    serde_json::to_writer(out, &String::from_utf8_lossy(bytes)).expect(MEMORY);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden::{self, Node};
    use crate::nix::nar;

    /// Appends the node that begins at byte `at` of the NAR and tells where it ends.
    fn list(out: &mut Vec<u8>, node: &Node, mut at: u64) -> u64 {
        match node {
            Node::Regular(executable, contents) => {
                let size = contents.len() as u64;
                regular(out, size, *executable, at + nar::regular_open_len(*executable));
                at + nar::regular_len(*executable, size)
            }
            Node::Symlink(target) => {
                symlink(out, target);
                at + nar::symlink_len(target.len() as u64)
            }
            Node::Directory(entries) => {
                directory_open(out);
                at += nar::DIRECTORY_OPEN.len() as u64;
                for (i, (name, node)) in entries.iter().enumerate() {
                    entry(out, i == 0, name);
                    at = list(out, node, at + nar::entry_open_len(name.len() as u64))
                        + nar::CLOSE.len() as u64;
                }
                directory_close(out);
                at + nar::CLOSE.len() as u64
            }
        }
    }

    #[test]
    fn lists_as_nix_copy_did() {
        let mut out = Vec::new();
        open(&mut out);
        let end = list(&mut out, &golden::tree(), nar::MAGIC.len() as u64);
        close(&mut out);
        assert_eq!(end, golden::TREE_NAR.len() as u64);
        assert_eq!(
            String::from_utf8(out.clone()).unwrap(),
            String::from_utf8_lossy(golden::TREE_LS)
        );
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let run = &json["root"]["entries"]["dir"]["entries"]["run"];
        let at = run["narOffset"].as_u64().unwrap() as usize;
        assert!(golden::TREE_NAR[at..].starts_with(b"#!/bin/sh\necho hello\n"));
    }
}
