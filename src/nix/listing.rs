//! NAR listings, the `.ls` files of a binary cache: JSON, version 1 (Nix manual, "NAR listing
//! format"). The functions append to a buffer while the caller walks the tree:
//!
//! [`open`], one node, [`close`]. A node is [`regular`], [`symlink`], or a directory:
//! [`directory_open`], then [`entry`] and a node for each entry in the order of the NAR, then
//! [`directory_close`].
//!
//! Nix writes names that are not UTF-8 as raw bytes, which is not valid JSON. Here each invalid
//! sequence becomes U+FFFD, so two different names may look the same.

use std::io::Write;

/// Appends the beginning of the listing.
pub fn open(out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"version":1,"root":"#);
}

/// Appends the end of the listing.
pub fn close(out: &mut Vec<u8>) {
    out.push(b'}');
}

/// Appends a regular file of `size` bytes, whose contents begin at byte `nar_offset` of the NAR.
pub fn regular(out: &mut Vec<u8>, size: u64, executable: bool, nar_offset: u64) {
    let executable = if executable { r#","executable":true"# } else { "" };
    write!(out, r#"{{"type":"regular","size":{size}{executable},"narOffset":{nar_offset}}}"#)
        .expect(MEMORY);
}

/// Appends a symlink.
pub fn symlink(out: &mut Vec<u8>, target: &[u8]) {
    out.extend_from_slice(br#"{"type":"symlink","target":"#);
    string(out, target);
    out.push(b'}');
}

/// Appends the beginning of a directory.
pub fn directory_open(out: &mut Vec<u8>) {
    out.extend_from_slice(br#"{"type":"directory","entries":{"#);
}

/// Appends the name of the node that follows. `first` must be set for the first entry of a
/// directory.
pub fn entry(out: &mut Vec<u8>, first: bool, name: &[u8]) {
    if !first {
        out.push(b',');
    }
    string(out, name);
    out.push(b':');
}

/// Appends the end of a directory.
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

    /// Appends the node that begins at byte `at` of the NAR and returns where it ends.
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
    fn listing_equals_that_of_nix_copy() {
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
