//! The keys that decide which peers' paths peerix offers to this machine's Nix.
//!
//! They are the keys of the local nix.conf, so that no flag has to repeat them, those of
//! `--trusted-public-key` and `--trusted-public-key-file`, and those that friends sign with. If a
//! file cannot be read, its keys are not trusted and a fault is recorded.

mod nix_conf;

pub use nix_conf::{NixConf, Substituter};

use crate::config::Config;
use crate::degraded::Degraded;
use crate::friends::FriendList;
use crate::key_file;
use crate::lock::{Mutex, RwLock};
use crate::nix::{
    PathInfo, PublicKey, Realisation, SecretKey, Signature, StoreDir, is_content_addressed,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum number of signatures that are checked per path, at 0.1 ms each; the rest is ignored.
/// Real paths have one to three.
const MAX_SIGNATURES: usize = 16;

/// Problem code of an unusable `--trusted-public-key-file`.
pub const PUBLIC_KEY: &str = "public-key";

/// Problem code of a nix.conf that cannot be read completely.
pub const NIX_CONF: &str = "nix-conf";

/// Where a trusted key is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeySource {
    /// `trusted-public-keys` or `secret-key-files` of nix.conf.
    NixConf,
    /// `--trusted-public-key` or a file of `--trusted-public-key-file`.
    Flag,
    /// `sign=` of `--friend` or of a line in `--friends-file`.
    Friend,
}

impl KeySource {
    /// Name of the source in machine-readable output.
    pub fn code(self) -> &'static str {
        match self {
            KeySource::NixConf => "nix.conf",
            KeySource::Flag => "flag",
            KeySource::Friend => "friend",
        }
    }
}

/// A trusted key and its source.
#[derive(Clone)]
pub struct TrustedKey {
    /// The key.
    pub key: PublicKey,
    /// Where it is configured.
    pub source: KeySource,
}

/// The trusted keys at one moment.
#[derive(Clone, Default)]
struct KeySnapshot {
    /// Whether paths without a signature by one of the keys are refused.
    is_on: bool,
    /// Whether realisations without a signature by one of the keys are accepted.
    takes_unsigned_realisations: bool,
    keys: Vec<TrustedKey>,
}

impl KeySnapshot {
    /// Adds a key. Of several keys with one name, the first counts, as in Nix.
    fn add(&mut self, key: PublicKey, source: KeySource) {
        if !self.has_name_of(&key) {
            self.keys.push(TrustedKey { key, source });
        }
    }

    fn has_name_of(&self, key: &PublicKey) -> bool {
        self.keys.iter().any(|known| known.key.name() == key.name())
    }

    /// Whether one of the keys made one of the signatures of `fingerprint`.
    fn has_signed(&self, fingerprint: &str, signatures: &[Signature]) -> bool {
        let mut signatures = signatures.iter().take(MAX_SIGNATURES);
        let verifies = |signature: &Signature| {
            self.keys.iter().any(|known| known.key.verify(fingerprint.as_bytes(), signature))
        };
        signatures.any(verifies)
    }
}

/// The trusted keys of this node. They follow changes of nix.conf, of the key files and of the
/// friends.
pub struct TrustedKeys {
    flags: Vec<PublicKey>,
    /// Keys of `--friend`. They count even if this node cannot have friends, as without its
    /// identity.
    friend_flags: Vec<PublicKey>,
    /// Friends, whose keys are trusted as long as they are friends. They do not turn checking on,
    /// because that would refuse the paths of all other peers.
    friends: Option<Arc<FriendList>>,
    files: Vec<PathBuf>,
    conf_dir: PathBuf,
    port: u16,
    store_dir: StoreDir,
    /// All keys but those of the friends file.
    snapshot: RwLock<Arc<KeySnapshot>>,
    /// The last nix.conf that was read. Lookups never lock it.
    conf: Mutex<NixConf>,
}

impl TrustedKeys {
    /// Reads all keys. Blocks on the disk. Records in `degraded` what cannot be read. `friends` is
    /// `None` if this node has no friends.
    pub fn read(
        config: &Config,
        port: u16,
        friends: Option<Arc<FriendList>>,
        degraded: &Degraded,
    ) -> TrustedKeys {
        let keys = TrustedKeys {
            flags: config.trusted_public_keys.clone(),
            friend_flags: config.friends.iter().filter_map(|f| f.signing_key.clone()).collect(),
            friends,
            files: config.trusted_public_key_files.clone(),
            conf_dir: config.nix_conf_dir.clone(),
            port,
            store_dir: config.store_dir.clone(),
            snapshot: RwLock::default(),
            conf: Mutex::new(NixConf::read(&config.nix_conf_dir)),
        };
        keys.combine(degraded);
        keys
    }

    /// Reads nix.conf again if it has changed or had faults, and all key files. Blocks on the disk.
    pub fn refresh(&self, degraded: &Degraded) {
        {
            let mut conf = self.conf.lock();
            if conf.check_for_changes() || !conf.faults.is_empty() {
                *conf = NixConf::read(&self.conf_dir);
            }
        }
        self.combine(degraded);
    }

    fn combine(&self, degraded: &Degraded) {
        let conf = self.conf.lock();
        let mut keys = conf.public_keys();
        keys.extend(conf.secret_key_files().filter_map(public_half));
        let mut faults = Vec::new();
        let mut named = self.flags.clone();
        for file in &self.files {
            match read_public_keys(file) {
                Ok(more) => named.extend(more),
                Err(e) => faults.push(e),
            }
        }
        let by_flags = !self.flags.is_empty() || !self.files.is_empty();
        let is_whole = conf.faults.is_empty();
        let is_on = by_flags || (is_whole && conf.requires_signatures(self.port));
        let nix_conf = match is_whole {
            true => Ok(()),
            false => Err(format!(
                "nix.conf cannot be read whole: {}; until it can, {}",
                conf.faults.join("; "),
                if by_flags {
                    "only keys of flags and of the rest count"
                } else {
                    "peers are not chosen by signature, Nix checks all the same"
                },
            )),
        };
        let takes_unsigned_realisations = !by_flags && is_whole && !conf.has_require_sigs();
        let mut snapshot =
            KeySnapshot { is_on, takes_unsigned_realisations, ..KeySnapshot::default() };
        keys.into_iter().for_each(|key| snapshot.add(key, KeySource::NixConf));
        named.into_iter().for_each(|key| snapshot.add(key, KeySource::Flag));
        let of_friends = self.friend_flags.iter().cloned();
        of_friends.for_each(|key| snapshot.add(key, KeySource::Friend));
        *self.snapshot.write() = Arc::new(snapshot);
        drop(conf);
        degraded.note(PUBLIC_KEY, if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) });
        degraded.note(NIX_CONF, nix_conf);
    }

    /// The keys of this moment, with those of the current friends. They are copied only if the
    /// friends file has one that is not in the snapshot.
    fn current(&self) -> Arc<KeySnapshot> {
        let mut current = self.snapshot.read().clone();
        for friend in self.friends.iter().flat_map(|friends| friends.all()) {
            if let Some(key) = friend.signing_key.as_ref().filter(|key| !current.has_name_of(key)) {
                Arc::make_mut(&mut current).add(key.clone(), KeySource::Friend);
            }
        }
        current
    }

    /// Whether a path may be offered to Nix: it is content-addressed, a trusted key signed it, or
    /// checking is off.
    pub fn accepts(&self, info: &PathInfo) -> bool {
        let current = self.current();
        !current.is_on
            || is_content_addressed(info, &self.store_dir)
            || current.has_signed(&info.fingerprint(&self.store_dir), &info.signatures)
    }

    /// Whether a realisation may be offered to Nix: a trusted key signed it, or nix.conf has
    /// `require-sigs = false` and no flag names keys. Nix 2.8 to 2.34 register a substituter's
    /// realisation unchecked, and accept the content-addressed path that it names without a
    /// signature. So the realisation needs one also where paths do not.
    pub fn accepts_realisation(&self, realisation: &Realisation) -> bool {
        let current = self.current();
        current.takes_unsigned_realisations
            || current.has_signed(&realisation.fingerprint(), &realisation.signatures)
    }

    /// All trusted keys. `None` if paths are accepted without a signature.
    pub fn keys(&self) -> Option<Vec<TrustedKey>> {
        let current = self.current();
        current.is_on.then(|| current.keys.clone())
    }
}

/// The public key of a secret key file in nix.conf. `None` if it cannot be read, which is no fault:
/// Nix signs this machine's own paths with it, and Nix does not ask peers for those.
fn public_half(file: &Path) -> Option<PublicKey> {
    Some(SecretKey::parse(&key_file::read(file).ok()?).ok()?.public())
}

/// Reads the keys in a file of `--trusted-public-key-file`.
///
/// # Errors
/// One line: the file cannot be read, is empty, or contains a malformed key.
fn read_public_keys(path: &Path) -> Result<Vec<PublicKey>, String> {
    let name = path.display();
    let without = "paths that only it signed are passed over";
    let text = key_file::read(path).map_err(|e| format!("public key {name}: {e}; {without}"))?;
    let keys = text.split_whitespace().map(PublicKey::parse).collect::<Result<Vec<_>, _>>();
    match keys {
        Ok(keys) if keys.is_empty() => {
            Err(format!("public key {name}: there is none in it; {without}"))
        }
        keys => keys.map_err(|e| format!("public key {name}: {e}; {without}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::{DrvOutput, NarHash, StorePath};
    use crate::wire::NodeKey;
    use std::fs;

    const KEY: &str = "dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";

    fn unsigned() -> PathInfo {
        PathInfo {
            path: StorePath::parse("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-x").unwrap(),
            nar_hash: NarHash::from_bytes([0; 32]),
            nar_size: 1,
            references: Vec::new(),
            deriver: None,
            signatures: Vec::new(),
            ca: None,
        }
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("peerix-trust-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    fn names(keys: &TrustedKeys) -> Option<Vec<String>> {
        Some(keys.keys()?.iter().map(|known| known.key.name().to_owned()).collect())
    }

    fn known(names: &[&str]) -> Option<Vec<String>> {
        Some(names.iter().map(|name| (*name).to_owned()).collect())
    }

    #[test]
    fn keys_follow_changes_of_nix_conf() {
        let dir = dir("conf");
        let config = Config { nix_conf_dir: dir.clone(), ..Config::default() };
        fs::write(dir.join("nix.conf"), format!("trusted-public-keys = a-1:{KEY}\n")).unwrap();
        let degraded = Degraded::default();
        let keys = TrustedKeys::read(&config, 12304, None, &degraded);
        assert_eq!(names(&keys), known(&["a-1"]));
        assert!(!keys.accepts(&unsigned()) && degraded.all().is_empty());
        fs::write(dir.join("nix.conf"), "require-sigs = false\n").unwrap();
        keys.refresh(&degraded);
        assert!(names(&keys).is_none() && keys.accepts(&unsigned()));
        // An unreadable file may contain keys, so signatures are not checked.
        fs::write(dir.join("nix.conf"), "include missing.conf\n").unwrap();
        keys.refresh(&degraded);
        assert!(keys.accepts(&unsigned()) && degraded.all()[0].1.contains("missing.conf"));
        fs::write(
            dir.join("missing.conf"),
            format!("trusted-public-keys = b-1:{KEY} b-1:{KEY} a-1:{KEY}"),
        )
        .unwrap();
        keys.refresh(&degraded);
        assert!(degraded.all().is_empty());
        assert_eq!(names(&keys), known(&["b-1", "a-1"]));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn signing_keys_follow_the_friends_file() {
        let dir = dir("friends");
        let file = dir.join("friends");
        let friend = |n: u8| NodeKey::from_bytes([n; 32]);
        let line = |n: u8, key: &str| format!("f{n}={},sign={key}:{KEY}\n", friend(n));
        let written = line(1, "a-1") + &line(2, "cache.nixos.org-1");
        fs::write(&file, &written).unwrap();
        let list = Arc::new(FriendList::new(Vec::new(), Some(file.clone()), friend(9)));
        let config = Config { nix_conf_dir: dir.clone(), ..Config::default() };
        let keys = TrustedKeys::read(&config, 12304, Some(list.clone()), &Degraded::default());
        let sources = || {
            let all = keys.keys().unwrap();
            let all: Vec<String> =
                all.iter().map(|known| format!("{} {}", known.key, known.source.code())).collect();
            all
        };
        // Of two keys of one name, that of nix.conf counts.
        let of_nix_conf = format!("{} nix.conf", crate::config::UPSTREAM_KEY);
        assert_eq!(sources(), [of_nix_conf.clone(), format!("a-1:{KEY} friend")]);
        fs::write(&file, line(1, "b-1")).unwrap();
        list.reload();
        assert_eq!(sources(), [of_nix_conf.clone(), format!("b-1:{KEY} friend")]);
        fs::write(&file, "").unwrap();
        list.reload();
        assert_eq!(sources(), [of_nix_conf]);
        // The keys of friends do not turn checking on.
        fs::write(dir.join("nix.conf"), "require-sigs = false\n").unwrap();
        fs::write(&file, written).unwrap();
        list.reload();
        keys.refresh(&Degraded::default());
        assert!(keys.keys().is_none() && keys.accepts(&unsigned()));
        fs::remove_dir_all(&dir).unwrap();
    }

    /// Guards against paths that disappear with an unreadable identity.
    #[test]
    fn signing_keys_of_friend_flags_count_without_friends() {
        let dir = dir("flags");
        let friend = format!("a={},sign=a-1:{KEY}", NodeKey::from_bytes([1; 32])).parse();
        let config = Config {
            nix_conf_dir: dir.clone(),
            friends: vec![friend.unwrap()],
            ..Config::default()
        };
        let keys = TrustedKeys::read(&config, 12304, None, &Degraded::default());
        assert_eq!(names(&keys), known(&["cache.nixos.org-1", "a-1"]));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn unsigned_realisation_needs_require_sigs_off_and_no_keys_of_flags() {
        let dir = dir("realisations");
        let realisation = Realisation {
            id: DrvOutput::parse_id(&format!("sha256:{}!out", "0".repeat(64))).unwrap(),
            out_path: unsigned().path,
            dependencies: Default::default(),
            signatures: Vec::new(),
        };
        let by_flag = [PublicKey::parse(&format!("a-1:{KEY}")).unwrap()];
        let trusted = "substituters = http://127.0.0.1:12304?trusted=true";
        for (conf, flags, accepted) in [
            ("", &[][..], false),
            ("require-sigs = false", &[], true),
            ("require-sigs = false", &by_flag, false),
            // These two lift the check of narinfos only.
            (trusted, &[], false),
            ("include missing.conf", &[], false),
            ("require-sigs = false\ninclude missing.conf", &[], false),
        ] {
            fs::write(dir.join("nix.conf"), conf).unwrap();
            let config = Config {
                nix_conf_dir: dir.clone(),
                trusted_public_keys: flags.to_vec(),
                ..Config::default()
            };
            let keys = TrustedKeys::read(&config, 12304, None, &Degraded::default());
            assert_eq!(keys.accepts_realisation(&realisation), accepted, "{conf} {flags:?}");
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn unreadable_public_key_file_does_not_turn_checking_off() {
        let dir = dir("files");
        let file = dir.join("keys");
        fs::write(dir.join("nix.conf"), "require-sigs = false\n").unwrap();
        let config = Config {
            nix_conf_dir: dir.clone(),
            trusted_public_key_files: vec![file.clone()],
            ..Config::default()
        };
        let degraded = Degraded::default();
        let keys = TrustedKeys::read(&config, 12304, None, &degraded);
        for (text, why) in [("", "none"), ("b-1:!", "base64"), ("b-1:AAAA", "32 bytes")] {
            assert!(!keys.accepts(&unsigned()), "{text}");
            fs::write(&file, text).unwrap();
            keys.refresh(&degraded);
            let (code, said) = degraded.all().remove(0);
            assert!(code == PUBLIC_KEY && said.contains(why) && !said.contains('\n'), "{said}");
        }
        fs::write(&file, format!("b-1:{KEY}\nc-1:{KEY}")).unwrap();
        keys.refresh(&degraded);
        assert!(degraded.all().is_empty());
        assert_eq!(names(&keys), known(&["cache.nixos.org-1", "b-1", "c-1"]));
        fs::remove_dir_all(&dir).unwrap();
    }
}
