//! Who the friends are: those of `--friend`, and those of `--friends-file` as it is now.

use crate::config::{FriendConfig, MAX_FRIENDS};
use crate::key_file;
use crate::wire::NodeKey;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

/// Largest file: 16 friends take 2 KiB, and comments are welcome.
const MAX_FILE: u64 = 64 * 1024;

/// The friends at the moment, shared by all threads.
pub struct FriendList {
    flags: Vec<FriendConfig>,
    file: Option<PathBuf>,
    own: NodeKey,
    current: RwLock<CurrentFriends>,
}

#[derive(Default)]
struct CurrentFriends {
    friends: Vec<Arc<FriendConfig>>,
    /// What is wrong with the file.
    problem: Option<String>,
}

impl FriendList {
    /// The friends that `flags` and `file` name, but this node itself, whose key is `own`.
    pub fn new(flags: Vec<FriendConfig>, file: Option<PathBuf>, own: NodeKey) -> Self {
        let list = FriendList { flags, file, own, current: RwLock::default() };
        list.reload();
        list
    }

    /// Reads the file again. A line that is no friend, or a file that cannot be read, names none: a
    /// mistake never lets anybody in, and one whose line is gone is no friend any more. True if the
    /// friends are others than before.
    pub fn reload(&self) -> bool {
        let (mut friends, mut problem) = (self.flags.clone(), None);
        if let Some(file) = &self.file {
            match read(file) {
                Ok(text) => {
                    for (number, line) in text.lines().enumerate() {
                        match parse_line(line) {
                            None => {}
                            Some(Ok(friend)) => friends.push(friend),
                            Some(Err(why)) => problem = Some(format!("line {}: {why}", number + 1)),
                        }
                    }
                }
                Err(e) => problem = Some(e.to_string()),
            }
        }
        let mut known: Vec<Arc<FriendConfig>> = Vec::new();
        for friend in friends {
            // The first line of a key counts; the own key may be in a file that all machines share.
            if friend.key == self.own || known.iter().any(|other| other.key == friend.key) {
                continue;
            }
            if known.len() == MAX_FRIENDS {
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
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if problem != current.problem {
            problem.iter().for_each(|problem| log::error!("friends {problem}"));
        }
        let is_other = known != current.friends;
        *current = CurrentFriends { friends: known, problem };
        is_other
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<FriendConfig>> {
        self.current().friends.clone()
    }

    /// The one with this key.
    pub fn get(&self, key: &NodeKey) -> Option<Arc<FriendConfig>> {
        self.current().friends.iter().find(|friend| friend.key == *key).cloned()
    }

    /// What is wrong with the list, for people.
    pub fn problem(&self) -> Option<String> {
        self.current().problem.clone()
    }

    /// This node's key.
    pub fn own(&self) -> &NodeKey {
        &self.own
    }

    fn current(&self) -> std::sync::RwLockReadGuard<'_, CurrentFriends> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(file: &Path) -> io::Result<String> {
    let bytes = key_file::read_bytes(file, MAX_FILE)?;
    String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// One friend, in the form of `--friend`; `None` for an empty line or a comment.
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
    fn file_is_followed_and_mistakes_let_nobody_in() {
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

        std::fs::remove_file(&file).unwrap();
        assert!(list.reload());
        assert_eq!(names(&list), ["flag"]);
        assert!(list.problem().is_some());
    }

    #[test]
    fn friends_file_that_is_a_pipe_is_not_waited_for() {
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
    fn number_of_friends_is_bounded() {
        let flags = (0..100).map(|n| format!("f{n}={}", key(n)).parse().unwrap()).collect();
        let list = FriendList::new(flags, None, key(200));
        assert_eq!(list.all().len(), MAX_FRIENDS);
        assert!(list.problem().unwrap().contains("f16"), "{:?}", list.problem());
    }
}
