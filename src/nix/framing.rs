//! Streaming check of a NAR's framing (Nix manual, "Nix Archive (NAR) format"). Nix unpacks a NAR
//! as root while it arrives, before it knows the hash. The proxy therefore refuses, on the way,
//! everything that Nix fails on and everything that older versions of Nix do not check.

use super::nar::{
    CLOSE, MAGIC, MAX_NAME_LEN, MAX_PATH_LEN, MAX_TARGET_LEN, padded, padding, tokens,
};
use super::{Malformed, NarInfo};

/// Checks a NAR's framing piece by piece as the bytes arrive.
///
/// Bytes for which [`push`](Self::push) returned `Ok` may be forwarded: every name, target and size
/// is checked when its last byte arrives. Memory is bounded: one incomplete piece (4,112 bytes),
/// and one name of at most 255 bytes for each of at most 2,048 levels of directories.
#[derive(Debug)]
pub struct Framing {
    state: FramingState,
    /// Bytes of the announced size that have not arrived.
    left: u64,
    /// The beginning of a piece that has not arrived whole.
    carry: Vec<u8>,
    /// Name of the newest entry of each open directory. Entries beyond `depth` are kept to reuse
    /// their buffers.
    names: Vec<Vec<u8>>,
    /// Number of open directories.
    depth: usize,
    /// Bytes in the path of the current entry, including a slash before each name.
    path_len: usize,
}

/// The piece that must come next. For speed, tokens that always come together form one piece.
#[derive(Debug, Clone, Copy)]
enum FramingState {
    /// Magic and the root's `(` `type`.
    Root,
    /// `regular`, `symlink`, or the first 16 of the 24 bytes of `directory`.
    Type,
    /// The last 8 of the 24 bytes of `directory`.
    DirectoryType,
    /// `contents` and the size, or the first 24 of the 32 bytes of `executable` and its empty
    /// value.
    Contents,
    /// The last 8 bytes of `executable` and its empty value, `contents` and the size.
    ExecutableContents,
    /// Remaining bytes of a file's contents, at least one, and the padding after them.
    Data(u64, &'static [u8]),
    /// The padding after a file's contents and the `)` of the node.
    RegularClose(&'static [u8]),
    /// `target` and its length.
    TargetLen,
    /// A target of this many bytes, its padding and the `)` of the node.
    Target(usize),
    /// `entry`, or the `)` of the directory.
    Entry,
    /// `(` `name` and the name's length.
    NameLen,
    /// A name of this many bytes and its padding.
    Name(usize),
    /// `node` and its `(` `type`.
    Node,
    /// The `)` of an entry.
    EntryClose,
    Complete,
    Failed(Malformed),
}

const ROOT: [u8; 56] = tokens(&["nix-archive-1", "(", "type"]);
const REGULAR: [u8; 16] = tokens(&["regular"]);
const SYMLINK: [u8; 16] = tokens(&["symlink"]);
const DIRECTORY: [u8; 24] = tokens(&["directory"]);
const CONTENTS: [u8; 16] = tokens(&["contents"]);
const EXECUTABLE_CONTENTS: [u8; 48] = tokens(&["executable", "", "contents"]);
const TARGET: [u8; 16] = tokens(&["target"]);
const ENTRY: [u8; 16] = tokens(&["entry"]);
const NAME: [u8; 32] = tokens(&["(", "name"]);
const NODE: [u8; 48] = tokens(&["node", "(", "type"]);

/// Bytes of a length field.
const LENGTH: usize = 8;

const fn malformed(why: &'static str) -> Malformed {
    Malformed::new("NAR", why)
}

const UNEXPECTED: Malformed = malformed("another token than must come here");

impl Framing {
    /// Begins a NAR of at most [`NarInfo::MAX_NAR_SIZE`] bytes (16 TiB).
    pub fn new() -> Self {
        Self::with_nar_size(NarInfo::MAX_NAR_SIZE)
    }

    /// Begins a NAR of at most `nar_size` bytes. A file that exceeds the remaining bytes is refused
    /// when its size arrives, before Nix allocates space for it.
    pub fn with_nar_size(nar_size: u64) -> Self {
        Framing {
            state: FramingState::Root,
            left: nar_size,
            carry: Vec::new(),
            names: Vec::new(),
            depth: 0,
            path_len: 0,
        }
    }

    /// Checks the next bytes. They may be split anywhere.
    ///
    /// # Errors
    /// The bytes so far are not the beginning of a NAR as Nix writes it, or exceed the size given
    /// at construction. After an error every call with at least one byte fails.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        let checked = self.check(bytes);
        if let Err(why) = checked {
            self.state = FramingState::Failed(why);
        }
        checked
    }

    /// Returns whether the whole NAR has arrived.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, FramingState::Complete)
    }

    fn check(&mut self, mut bytes: &[u8]) -> Result<(), Malformed> {
        if bytes.len() as u64 > self.left {
            return Err(malformed("longer than announced"));
        }
        while !bytes.is_empty() {
            let expected = match self.state {
                FramingState::Data(left, padding) => {
                    let skipped = bytes.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    bytes = &bytes[skipped..];
                    self.left -= skipped as u64;
                    self.state = match left - skipped as u64 {
                        0 => FramingState::RegularClose(padding),
                        left => FramingState::Data(left, padding),
                    };
                    continue;
                }
                FramingState::Complete => return Err(malformed("bytes after its end")),
                FramingState::Failed(why) => return Err(why),
                FramingState::Root => ROOT.len(),
                FramingState::Type | FramingState::Entry | FramingState::EntryClose => 16,
                FramingState::DirectoryType => DIRECTORY.len() - 16,
                FramingState::Contents => CONTENTS.len() + LENGTH,
                FramingState::ExecutableContents => EXECUTABLE_CONTENTS.len() - 24 + LENGTH,
                FramingState::RegularClose(padding) => padding.len() + CLOSE.len(),
                FramingState::TargetLen => TARGET.len() + LENGTH,
                FramingState::Target(len) => len.next_multiple_of(8) + CLOSE.len(),
                FramingState::NameLen => NAME.len() + LENGTH,
                FramingState::Name(len) => len.next_multiple_of(8),
                FramingState::Node => NODE.len(),
            };
            let taken = bytes.len().min(expected - self.carry.len());
            let (begin, rest) = bytes.split_at(taken);
            bytes = rest;
            self.left -= taken as u64;
            if taken == expected {
                self.state = self.next(begin)?;
                continue;
            }
            self.carry.extend_from_slice(begin);
            if self.carry.len() == expected {
                let piece = std::mem::take(&mut self.carry);
                self.state = self.next(&piece)?;
                self.carry = piece;
                self.carry.clear();
            }
        }
        Ok(())
    }

    /// Checks `piece`, the complete piece that `self.state` requires, and returns the next state.
    fn next(&mut self, piece: &[u8]) -> Result<FramingState, Malformed> {
        match self.state {
            FramingState::Root if piece == ROOT => Ok(FramingState::Type),
            FramingState::Root if piece[..MAGIC.len()] != MAGIC => {
                Err(malformed("does not begin as one"))
            }
            FramingState::Type if piece == REGULAR => Ok(FramingState::Contents),
            FramingState::Type if piece == SYMLINK => Ok(FramingState::TargetLen),
            FramingState::Type if piece == &DIRECTORY[..16] => Ok(FramingState::DirectoryType),
            FramingState::DirectoryType if piece == &DIRECTORY[16..] => Ok(self.enter_directory()),
            FramingState::Contents if piece[..CONTENTS.len()] == CONTENTS => {
                self.data(&piece[CONTENTS.len()..])
            }
            FramingState::Contents if piece == &EXECUTABLE_CONTENTS[..24] => {
                Ok(FramingState::ExecutableContents)
            }
            FramingState::ExecutableContents if piece[..24] == EXECUTABLE_CONTENTS[24..] => {
                self.data(&piece[24..])
            }
            FramingState::RegularClose(padding) if piece[padding.len()..] == CLOSE => {
                zero(&piece[..padding.len()])?;
                Ok(self.after_node())
            }
            FramingState::TargetLen if piece[..TARGET.len()] == TARGET => {
                let len = length(&piece[TARGET.len()..], MAX_TARGET_LEN)
                    .ok_or(malformed("symlink target empty or longer than 4095 bytes"))?;
                Ok(FramingState::Target(len))
            }
            FramingState::Target(len) if piece[len.next_multiple_of(8)..] == CLOSE => {
                if piece[..len].contains(&0) {
                    return Err(malformed("symlink target with a NUL"));
                }
                zero(&piece[len..len.next_multiple_of(8)])?;
                Ok(self.after_node())
            }
            FramingState::Entry if piece == ENTRY => Ok(FramingState::NameLen),
            FramingState::Entry if piece == CLOSE => {
                self.depth -= 1;
                Ok(self.after_node())
            }
            FramingState::NameLen if piece[..NAME.len()] == NAME => {
                let len = length(&piece[NAME.len()..], MAX_NAME_LEN)
                    .ok_or(malformed("name empty or longer than 255 bytes"))?;
                Ok(FramingState::Name(len))
            }
            FramingState::Name(len) => {
                let (name, padding) = piece.split_at(len);
                zero(padding)?;
                self.enter_entry(name)
            }
            FramingState::Node if piece == NODE => Ok(FramingState::Type),
            FramingState::EntryClose if piece == CLOSE => {
                self.path_len -= 1 + self.names[self.depth - 1].len();
                Ok(FramingState::Entry)
            }
            _ => Err(UNEXPECTED),
        }
    }

    /// Checks the name of an entry of the current directory, and appends it to the path.
    fn enter_entry(&mut self, name: &[u8]) -> Result<FramingState, Malformed> {
        if name == b"." || name == b".." || name.iter().any(|b| matches!(b, b'/' | 0)) {
            return Err(malformed("name is a dot directory or has a slash or a NUL"));
        }
        // Nix 2.8 does not check the order of names.
        let before = &mut self.names[self.depth - 1];
        if name <= before.as_slice() {
            return Err(malformed("names not in ascending order"));
        }
        before.clear();
        before.extend_from_slice(name);
        self.path_len += 1 + name.len();
        if self.path_len > MAX_PATH_LEN {
            return Err(Malformed::unsupported("NAR", "a path longer than 4095 bytes"));
        }
        Ok(FramingState::Node)
    }

    /// Opens a directory.
    fn enter_directory(&mut self) -> FramingState {
        match self.names.get_mut(self.depth) {
            Some(name) => name.clear(),
            None => self.names.push(Vec::new()),
        }
        self.depth += 1;
        FramingState::Entry
    }

    fn data(&self, size: &[u8]) -> Result<FramingState, Malformed> {
        let size = number(size);
        // `padded` cannot overflow: at least 80 bytes have arrived, so `left` is far enough below
        // 2^64.
        if size > self.left || padded(size) > self.left {
            return Err(malformed("a file larger than what is left of it"));
        }
        Ok(if size == 0 {
            FramingState::RegularClose(&[])
        } else {
            FramingState::Data(size, padding(size))
        })
    }

    fn after_node(&self) -> FramingState {
        if self.depth == 0 { FramingState::Complete } else { FramingState::EntryClose }
    }
}

impl Default for Framing {
    fn default() -> Self {
        Self::new()
    }
}

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("a piece has a whole length"))
}

fn length(bytes: &[u8], max: usize) -> Option<usize> {
    usize::try_from(number(bytes)).ok().filter(|len| (1..=max).contains(len))
}

fn zero(padding: &[u8]) -> Result<(), Malformed> {
    if padding.iter().all(|b| *b == 0) {
        Ok(())
    } else {
        Err(malformed("padding that is not zero"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden::{self, Node, directory, regular, write_nar};

    fn check(nar: &[u8]) -> Result<bool, &'static str> {
        let mut framing = Framing::new();
        framing.push(nar).map_err(|malformed| malformed.why)?;
        Ok(framing.is_complete())
    }

    fn symlink(target: &[u8]) -> Vec<u8> {
        write_nar(&Node::Symlink(target.to_vec()))
    }

    fn named(name: &[u8]) -> Vec<u8> {
        write_nar(&directory(vec![(name, regular(b"contents"))]))
    }

    #[test]
    fn nar_of_nix_is_accepted_in_any_split() {
        let nar = golden::TREE_NAR;
        for at in 0..=nar.len() {
            let mut framing = Framing::with_nar_size(nar.len() as u64);
            framing.push(&nar[..at]).unwrap();
            assert_eq!(framing.is_complete(), at == nar.len(), "{at}");
            framing.push(&nar[at..]).unwrap();
            assert!(framing.is_complete(), "{at}");
        }
        for step in [1, 3, 7, 8, 24, 1000] {
            let mut framing = Framing::new();
            nar.chunks(step).for_each(|bytes| framing.push(bytes).unwrap());
            assert!(framing.is_complete());
            assert!(framing.carry.capacity() <= 8192);
        }
        for root in
            [regular(b""), regular(b"x"), Node::Regular(true, vec![7; 4096]), directory(vec![])]
        {
            assert_eq!(check(&write_nar(&root)), Ok(true));
        }
    }

    #[test]
    fn flipped_bit_of_framing_is_refused() {
        // Eight bytes: shorter contents could grow into their padding by a changed size.
        let contents = b"XXXXXXXX";
        let root = directory(vec![
            (b"a", Node::Regular(true, contents.to_vec())),
            (b"b", regular(b"")),
            (b"c", directory(vec![])),
            (b"d", Node::Symlink(b"t".to_vec())),
        ]);
        let nar = write_nar(&root);
        // Contents, and the names and the target: one letter each after its length.
        let may_change = |at: usize| {
            nar[at] == b'X'
                || nar[at].is_ascii_lowercase() && nar[at - 8..at] == [1, 0, 0, 0, 0, 0, 0, 0]
        };
        for bit in 0..nar.len() * 8 {
            let at = bit / 8;
            let mut changed = nar.clone();
            changed[at] ^= 1 << (bit % 8);
            let verdict = check(&changed);
            assert!(verdict != Ok(true) || may_change(at), "bit {bit}");
            let mut framing = Framing::new();
            let split = changed.iter().try_for_each(|byte| framing.push(&[*byte]));
            assert_eq!(split.is_ok() && framing.is_complete(), verdict == Ok(true), "bit {bit}");
        }
        for more in 1..20 {
            assert!(check(&[&nar[..], &vec![0; more]].concat()).is_err());
        }
    }

    #[test]
    fn illegal_name_is_refused() {
        const BAD: Result<bool, &str> = Err("name is a dot directory or has a slash or a NUL");
        const LEN: Result<bool, &str> = Err("name empty or longer than 255 bytes");
        for name in [&b"."[..], b"..", b"/", b"a/b", b"../x", b"a\0b", b"\0", b"a\0"] {
            assert_eq!(check(&named(name)), BAD, "{name:?}");
        }
        for name in [&b"..."[..], b".a", b"a\n", b"\xff", b"a b", b"\\", &[b'n'; 255]] {
            assert_eq!(check(&named(name)), Ok(true), "{name:?}");
        }
        assert_eq!(check(&named(b"")), LEN);
        assert_eq!(check(&named(&[b'n'; 256])), LEN);
    }

    #[test]
    fn unsorted_or_repeated_name_is_refused() {
        for (first, second, good) in [
            (&b"a"[..], &b"b"[..], true),
            (b"a", b"a", false),
            (b"b", b"a", false),
            (b"a", b"aa", true),
            (b"aa", b"a", false),
            (b"B", b"a", true),
            (b"a", b"\xff", true),
            (b"\xff", b"a", false),
        ] {
            let nar = write_nar(&directory(vec![(first, regular(b"")), (second, regular(b""))]));
            assert_eq!(
                check(&nar),
                if good { Ok(true) } else { Err("names not in ascending order") }
            );
        }
        let three = [&b"a"[..], b"b", b"aba"].map(|name| (name, regular(b"")));
        assert_eq!(
            check(&write_nar(&directory(three.into()))),
            Err("names not in ascending order")
        );
        // The order is checked per directory, independently of its parent and siblings.
        let inner = || directory(vec![(b"z", regular(b""))]);
        assert_eq!(check(&write_nar(&directory(vec![(b"a", inner()), (b"b", inner())]))), Ok(true));
    }

    #[test]
    fn illegal_symlink_target_is_refused() {
        assert_eq!(check(&symlink(b"/a/../b c")), Ok(true));
        assert_eq!(check(&symlink(&[b't'; 4095])), Ok(true));
        let len = Err("symlink target empty or longer than 4095 bytes");
        assert_eq!(check(&symlink(&[b't'; 4096])), len);
        assert_eq!(check(&symlink(b"")), len);
        assert_eq!(check(&symlink(b"a\0b")), Err("symlink target with a NUL"));
    }

    #[test]
    fn path_over_4095_bytes_is_refused() {
        const TOO_LONG: Result<bool, &str> = Err("a path longer than 4095 bytes");
        // Written from the outside in: `write_nar` would copy the NAR once for each level.
        let nested = |name: &[u8], around: usize| {
            let mut nar = MAGIC.to_vec();
            for _ in 0..around {
                nar.extend(crate::nix::nar::DIRECTORY_OPEN);
                crate::nix::nar::entry_open(&mut nar, name);
            }
            crate::nix::nar::regular_open(&mut nar, false, 0);
            nar.extend(CLOSE);
            (0..around).for_each(|_| nar.extend([CLOSE, CLOSE].concat()));
            nar
        };
        assert_eq!(check(&nested(b"d", 2047)), Ok(true));
        assert_eq!(check(&nested(b"d", 2048)), TOO_LONG);
        assert_eq!(check(&nested(&[b'd'; 255], 15)), Ok(true));
        assert_eq!(check(&nested(&[b'd'; 255], 16)), TOO_LONG);
        let mut framing = Framing::new();
        assert!(framing.push(&nested(b"d", 2048)).unwrap_err().is_unsupported);
        // Directories that were closed do not count.
        let long = |first: u8| [&[first][..], &[b'n'; 254]].concat();
        let inner =
            || Node::Directory((b'a'..=b'z').map(|first| (long(first), regular(b""))).collect());
        let wide = Node::Directory((b'a'..=b'z').map(|first| (long(first), inner())).collect());
        assert_eq!(check(&write_nar(&wide)), Ok(true));
    }

    #[test]
    fn nonzero_padding_is_refused() {
        for (nar, text) in
            [(named(b"name"), &b"name\0\0\0\0"[..]), (symlink(b"tar"), b"tar\0\0\0\0\0")]
        {
            let at = nar.windows(text.len()).rposition(|window| window == text).unwrap();
            for place in at + text.iter().position(|b| *b == 0).unwrap()..at + 8 {
                let mut changed = nar.clone();
                changed[place] = 1;
                assert_eq!(check(&changed), Err("padding that is not zero"));
            }
        }
        let mut changed = write_nar(&regular(b"x"));
        let last = changed.len() - CLOSE.len() - 1;
        changed[last] = 1;
        assert_eq!(check(&changed), Err("padding that is not zero"));
    }

    #[test]
    fn file_larger_than_rest_is_refused() {
        let nar = write_nar(&regular(b"12345"));
        let size = nar.len() - CLOSE.len() - 16;
        for huge in [u64::MAX, u64::MAX - 7, 1 << 63, NarInfo::MAX_NAR_SIZE] {
            let mut changed = nar.clone();
            changed[size..size + 8].copy_from_slice(&huge.to_le_bytes());
            assert_eq!(check(&changed), Err("a file larger than what is left of it"));
            let mut framing = Framing::with_nar_size(u64::MAX);
            assert_eq!(framing.push(&changed).is_ok(), huge <= 1 << 63);
        }
        let announced = |nar_size| Framing::with_nar_size(nar_size).push(&nar[..size + 8]).is_ok();
        assert!(announced(nar.len() as u64));
        assert!(!announced(size as u64 + 8 + 7));
        let mut framing = Framing::with_nar_size(nar.len() as u64 - 1);
        assert!(nar.iter().any(|byte| framing.push(&[*byte]).is_err()));
    }

    #[test]
    fn unexpected_token_is_refused() {
        let cases: &[&[&str]] = &[
            &["nix-archive-2", "(", "type", "regular"],
            &["nix-archive-1", "(", "type", "device", "", ")"],
            &["nix-archive-1", "(", "type", "regular", ")", "", "", ""],
            &["nix-archive-1", "(", "type", "regular", "executable", "x", "contents", "", ")"],
            &["nix-archive-1", "(", "type", "regular", "contents", "", "executable", "", ")"],
            &["nix-archive-1", "(", "type", "symlink", ")", "", "", ""],
            &["nix-archive-1", "(", "type", "symlink", "target", "x", "target", "y", ")"],
            &["nix-archive-1", "(", "type", "directory", "contents", "", ")"],
            &[
                "nix-archive-1",
                "(",
                "type",
                "directory",
                "entry",
                "(",
                "node",
                "(",
                "type",
                "regular",
            ],
            &[
                "nix-archive-1",
                "(",
                "type",
                "directory",
                "entry",
                "(",
                "name",
                "a",
                ")",
                ")",
                ")",
                ")",
            ],
            &["nix-archive-1", "type", "(", "regular", "contents", "", ")"],
        ];
        for words in cases {
            let token = |word: &&str| {
                let len = word.len() as u64;
                [&len.to_le_bytes()[..], word.as_bytes(), padding(len)].concat()
            };
            assert!(check(&words.iter().flat_map(token).collect::<Vec<_>>()).is_err(), "{words:?}");
        }
    }

    #[test]
    fn failure_is_permanent() {
        let mut framing = Framing::new();
        let why = framing.push(&[0; 56]).unwrap_err();
        assert_eq!(why, malformed("does not begin as one"));
        assert_eq!(framing.push(golden::TREE_NAR), Err(why));
        assert_eq!(framing.push(&[]), Ok(()));
        assert!(!framing.is_complete());
    }
}
