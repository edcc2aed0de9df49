//! The NAR format (Nix manual, "Nix Archive (NAR) format"): its tokens and their exact lengths.
//! With these a file's offset in a NAR is known before the NAR is written.
//!
//! A NAR is [`MAGIC`] and one node. A regular file is [`regular_open`], its contents, [`padding`]
//! and [`CLOSE`]. A symlink is [`symlink`]. A directory is [`DIRECTORY_OPEN`], then [`entry_open`],
//! a node and [`CLOSE`] for each entry in the order of the names' bytes, then [`CLOSE`].

/// The longest path inside a NAR, in bytes: `PATH_MAX` of Linux without its NUL. Longer paths are
/// refused, as Nix unpacks by path and fails on them. This bounds the depth to 2,047 levels below
/// the root. (Nix 2.34 and later refuse more than 64; 2.8 and 2.26 unpack 2,020.)
pub const MAX_PATH_LEN: usize = 4095;

/// The longest name of a directory entry, in bytes: `NAME_MAX` of Linux, and Nix's own bound. NARs
/// with longer names are refused.
pub const MAX_NAME_LEN: usize = 255;

/// The longest target of a symlink, in bytes: `PATH_MAX` of Linux without its NUL, and Nix's own
/// bound. NARs with longer targets are refused.
pub const MAX_TARGET_LEN: usize = 4095;

/// The first token of every NAR.
pub const MAGIC: [u8; 24] = tokens(&["nix-archive-1"]);
/// The tokens that begin a directory's node.
pub const DIRECTORY_OPEN: [u8; 56] = tokens(&["(", "type", "directory"]);
/// The token that ends a regular file's node, a directory's node, and an entry.
pub const CLOSE: [u8; 16] = tokens(&[")"]);

const REGULAR: [u8; 64] = tokens(&["(", "type", "regular", "contents"]);
const EXECUTABLE: [u8; 96] = tokens(&["(", "type", "regular", "executable", "", "contents"]);
const SYMLINK: [u8; 64] = tokens(&["(", "type", "symlink", "target"]);
const ENTRY: [u8; 48] = tokens(&["entry", "(", "name"]);
const NODE: [u8; 16] = tokens(&["node"]);

const LENGTH: u64 = size_of::<u64>() as u64;

/// Rounds `len` up to the next multiple of 8: the bytes that a string of `len` bytes takes after
/// its length field. Overflows above `u64::MAX - 7`.
pub const fn padded(len: u64) -> u64 {
    len.next_multiple_of(8)
}

/// Returns the zero bytes that follow file contents of `size` bytes.
pub fn padding(size: u64) -> &'static [u8] {
    &[0; 8][..(size.wrapping_neg() % 8) as usize]
}

/// Appends everything before the contents of a regular file of `size` bytes.
pub fn regular_open(out: &mut Vec<u8>, executable: bool, size: u64) {
    out.extend_from_slice(if executable { &EXECUTABLE } else { &REGULAR });
    out.extend_from_slice(&size.to_le_bytes());
}

/// Returns the number of bytes that [`regular_open`] appends.
pub const fn regular_open_len(executable: bool) -> u64 {
    (if executable { EXECUTABLE.len() } else { REGULAR.len() }) as u64 + LENGTH
}

/// Returns the number of bytes in the whole node of a regular file of `size` bytes.
pub const fn regular_len(executable: bool, size: u64) -> u64 {
    regular_open_len(executable) + padded(size) + CLOSE.len() as u64
}

/// Appends the whole node of a symlink.
pub fn symlink(out: &mut Vec<u8>, target: &[u8]) {
    out.extend_from_slice(&SYMLINK);
    string(out, target);
    out.extend_from_slice(&CLOSE);
}

/// Returns the number of bytes in the whole node of a symlink with a target of `target_len` bytes.
pub const fn symlink_len(target_len: u64) -> u64 {
    SYMLINK.len() as u64 + LENGTH + padded(target_len) + CLOSE.len() as u64
}

/// Appends everything before the node of a directory entry.
pub fn entry_open(out: &mut Vec<u8>, name: &[u8]) {
    out.extend_from_slice(&ENTRY);
    string(out, name);
    out.extend_from_slice(&NODE);
}

/// Returns the number of bytes that [`entry_open`] appends for a name of `name_len` bytes.
pub const fn entry_open_len(name_len: u64) -> u64 {
    (ENTRY.len() + NODE.len()) as u64 + LENGTH + padded(name_len)
}

fn string(out: &mut Vec<u8>, bytes: &[u8]) {
    let len = bytes.len() as u64;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(bytes);
    out.extend_from_slice(padding(len));
}

/// Encodes words as NAR strings: each with its length before it and zeros up to a multiple of 8
/// after it. In a constant, a wrong `N` is a compile error.
pub(super) const fn tokens<const N: usize>(words: &[&str]) -> [u8; N] {
    let mut out = [0; N];
    let (mut at, mut i) = (0, 0);
    while i < words.len() {
        let word = words[i].as_bytes();
        assert!(word.len() < 256);
        out[at] = word.len() as u8;
        let mut j = 0;
        while j < word.len() {
            out[at + 8 + j] = word[j];
            j += 1;
        }
        at += 8 + word.len().next_multiple_of(8);
        i += 1;
    }
    assert!(at == N);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden::{self, Node};

    fn len(node: &Node) -> u64 {
        match node {
            Node::Regular(executable, contents) => regular_len(*executable, contents.len() as u64),
            Node::Symlink(target) => symlink_len(target.len() as u64),
            Node::Directory(entries) => {
                let entry = |(name, node): &(Vec<u8>, Node)| {
                    entry_open_len(name.len() as u64) + len(node) + 16
                };
                56 + entries.iter().map(entry).sum::<u64>() + 16
            }
        }
    }

    #[test]
    fn written_nar_equals_that_of_nix_store_dump() {
        let nar = golden::write_nar(&golden::tree());
        assert!(nar == golden::TREE_NAR);
        assert_eq!(MAGIC.len() as u64 + len(&golden::tree()), nar.len() as u64);
    }

    #[test]
    fn padding_reaches_next_multiple_of_eight() {
        for size in [0, 1, 7, 8, 9, u64::MAX - 8, u64::MAX - 7] {
            assert_eq!(padded(size), size + padding(size).len() as u64);
            assert_eq!(padded(size) % 8, 0);
        }
    }
}
