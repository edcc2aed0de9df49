//! The friend list: the union of the `--friend` options and the current content of
//! `--friends-file`.

use crate::config::{FriendConfig, MAX_FRIENDS};
use crate::key_file;
use crate::lock::RwLock;
use crate::wire::NodeKey;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Largest friends file, in bytes. 16 friends take about 2 KiB; the rest is room for comments. A
/// larger file counts as unreadable, so it names no friends.
const MAX_FILE_BYTES: u64 = 64 * 1024;

/// The current friends. All threads share one list.
pub struct FriendList {
    flags: Vec<FriendConfig>,
    file: Option<PathBuf>,
    own: NodeKey,
    current: RwLock<CurrentFriends>,
}

#[derive(Clone, Default)]
struct CurrentFriends {
    friends: Vec<Arc<FriendConfig>>,
    /// Error of the last reload, for the status output. `None` if every line was valid.
    problem: Option<String>,
    /// Line of the file that is malformed, if that is the error.
    problem_line: Option<usize>,
}

impl FriendList {
    /// Reads `file` and combines it with `flags`. The list never contains `own`, this node's key.
    pub fn new(flags: Vec<FriendConfig>, file: Option<PathBuf>, own: NodeKey) -> Self {
        let list = FriendList { flags, file, own, current: RwLock::default() };
        list.reload();
        list
    }

    /// Reads the file again and returns true if the friends changed. A malformed line, or a file
    /// that cannot be read, names no friend: a mistake never admits a peer. A friend whose line was
    /// removed loses access. The list keeps the first [`MAX_FRIENDS`] friends and reports the rest
    /// as a problem.
    pub fn reload(&self) -> bool {
        let (mut friends, mut problem, mut problem_line) = (self.flags.clone(), None, None);
        if let Some(file) = &self.file {
            match read(file) {
                Ok(text) => {
                    for (number, line) in text.lines().enumerate() {
                        match parse_line(line) {
                            None => {}
                            Some(Ok(friend)) => friends.push(friend),
                            Some(Err(why)) => {
                                problem = Some(format!("line {}: {why}", number + 1));
                                problem_line = Some(number + 1);
                            }
                        }
                    }
                }
                Err(e) => problem = Some(e.to_string()),
            }
        }
        let mut known: Vec<Arc<FriendConfig>> = Vec::new();
        for friend in friends {
            // The first line for a key counts. This node's own key is skipped because all machines
            // may share one file.
            if friend.key == self.own || known.iter().any(|other| other.key == friend.key) {
                continue;
            }
            if known.len() == MAX_FRIENDS {
                problem_line = None;
                problem = Some(format!(
                    "more than {MAX_FRIENDS} friends; {} and those after are left out",
                    friend.name
                ));
                break;
            }
            known.push(Arc::new(friend));
        }
        let problem = problem.map(|why| {
            format!("{}: {why}", self.file.as_deref().unwrap_or(Path::new("--friend")).display())
        });
        let current = CurrentFriends { friends: known, problem, problem_line };
        let before = std::mem::replace(&mut *self.current.write(), current.clone());
        if current.problem != before.problem {
            current.problem.iter().for_each(|problem| log::error!("friends {problem}"));
        }
        current.friends != before.friends
    }

    /// All current friends.
    pub fn all(&self) -> Vec<Arc<FriendConfig>> {
        self.current.read().friends.clone()
    }

    /// The friend with this key, if there is one.
    pub fn get(&self, key: &NodeKey) -> Option<Arc<FriendConfig>> {
        self.current.read().friends.iter().find(|friend| friend.key == *key).cloned()
    }

    /// Message that describes the last error in the list; `None` if there is none.
    pub fn problem(&self) -> Option<String> {
        self.current.read().problem.clone()
    }

    /// Line of the file to which [`FriendList::problem`] refers, without its text.
    pub fn problem_line(&self) -> Option<usize> {
        self.current.read().problem_line
    }

    /// This node's key.
    pub fn own(&self) -> &NodeKey {
        &self.own
    }
}

fn read(file: &Path) -> io::Result<String> {
    let bytes = key_file::read_bytes(file, MAX_FILE_BYTES)?;
    String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Parses one line in the syntax of `--friend`. `None` for an empty line or a comment.
fn parse_line(line: &str) -> Option<Result<FriendConfig, String>> {
    let line = line.split('#').next().unwrap_or_default().trim();
    (!line.is_empty()).then(|| line.parse())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u8) -> NodeKey {
        NodeKey::from_bytes([n; 32])
    }

    fn names(list: &FriendList) -> Vec<String> {
        list.all().iter().map(|friend| friend.name.clone()).collect()
    }

    #[test]
    fn changed_or_malformed_file_never_adds_unlisted_friend() {
        let file = std::env::temp_dir().join(format!("peerix-friends-{}", std::process::id()));
        let flag: FriendConfig = format!("flag={}", key(1)).parse().unwrap();
        std::fs::write(
            &file,
            format!("# mine\n\nhome={}@home.example # desk\nme={}\n", key(2), key(9)),
        )
        .unwrap();
        let list = FriendList::new(vec![flag], Some(file.clone()), key(9));
        assert_eq!(names(&list), ["flag", "home"]);
        assert!(
            list.get(&key(2)).is_some() && list.get(&key(9)).is_none() && list.problem().is_none()
        );
        assert!(!list.reload());

        std::fs::write(&file, format!("home={}\nbad\nwork={}\n", "ed25519:AAAA", key(3))).unwrap();
        assert!(list.reload());
        assert_eq!(names(&list), ["flag", "work"]);
        assert!(list.problem().unwrap().contains("line 2"), "{:?}", list.problem());
        assert_eq!(list.problem_line(), Some(2));

        std::fs::remove_file(&file).unwrap();
        assert!(list.reload());
        assert_eq!(names(&list), ["flag"]);
        assert!(list.problem().is_some());
    }

    #[test]
    fn pipe_as_friends_file_does_not_block() {
        let dir = std::env::temp_dir().join(format!("peerix-friends-pipe-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let pipe = dir.join("friends");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        let list = FriendList::new(Vec::new(), Some(pipe), key(9));
        assert!(list.problem().unwrap().contains("not a file"), "{:?}", list.problem());
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn friends_beyond_maximum_are_left_out() {
        let flags = (0..100).map(|n| format!("f{n}={}", key(n)).parse().unwrap()).collect();
        let list = FriendList::new(flags, None, key(200));
        assert_eq!(list.all().len(), MAX_FRIENDS);
        assert!(list.problem().unwrap().contains("f16"), "{:?}", list.problem());
    }
}
