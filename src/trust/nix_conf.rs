//! Parses nix.conf (Nix manual, "nix.conf") for the settings that decide whose signatures Nix
//! accepts.

use crate::config::{DEFAULT_UPSTREAM, UPSTREAM_KEY};
use crate::key_file;
use crate::nix::PublicKey;
use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Maximum size of one file, in bytes. A larger file is a fault and is not read, because its end
/// may override its beginning. Files written by hand have a few hundred bytes, generated ones some
/// thousand.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Maximum number of files, with all includes. More are a fault. Ends the recursion if a file
/// includes itself.
const MAX_FILES: usize = 64;

/// Names and aliases of the settings that are parsed, and the name under which each is stored.
const NAMES: [(&str, &str); 7] = [
    ("trusted-public-keys", "trusted-public-keys"),
    ("binary-cache-public-keys", "trusted-public-keys"),
    ("secret-key-files", "secret-key-files"),
    ("require-sigs", "require-sigs"),
    ("substituters", "substituters"),
    ("binary-caches", "substituters"),
    ("substitute", "substitute"),
];

/// A substituter as Nix's settings name it, for example `http://127.0.0.1:12304/?priority=10`.
#[derive(Debug, Clone, Copy)]
pub struct Substituter<'a> {
    /// URL without settings and without a slash at the end, as Nix's binary-cache cache has it.
    pub url: &'a str,
    settings: &'a str,
}

impl<'a> Substituter<'a> {
    /// Splits a word of `substituters` into the URL and its settings.
    pub fn parse(word: &'a str) -> Self {
        let (url, settings) = word.split_once('?').unwrap_or((word, ""));
        Substituter { url: url.trim_end_matches('/'), settings }
    }

    /// Value of a setting in the URL.
    pub fn setting(&self, name: &str) -> Option<&'a str> {
        let mut pairs = self.settings.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
    }

    /// Port of a server on this machine. `None` if the host is another or there is no port.
    pub fn local_port(&self) -> Option<u16> {
        let (host, port) = self.url.strip_prefix("http://")?.rsplit_once(':')?;
        matches!(host, "127.0.0.1" | "localhost" | "[::1]").then(|| port.parse().ok())?
    }

    /// Whether it is the peerix on `port` of this machine.
    pub fn is_peerix(&self, port: u16) -> bool {
        self.local_port() == Some(port)
    }

    /// Whether Nix accepts its paths without a signature.
    pub fn is_trusted(&self) -> bool {
        matches!(self.setting("trusted"), Some("true" | "yes" | "1"))
    }
}

/// Settings in nix.conf and in the files that it includes.
#[derive(Default)]
pub struct NixConf {
    settings: HashMap<&'static str, String>,
    /// The files that were looked for, with their stamps at that time. `None` for a missing file.
    files: Vec<(PathBuf, Option<NixConfStamp>)>,
    /// Parts that cannot be parsed or read, in one line each. Nix may be able to read them.
    pub faults: Vec<String>,
}

/// Device, inode, size in bytes, and modification time in nanoseconds since 1970. Changes when a
/// file is written or replaced.
type NixConfStamp = (u64, u64, u64, i64);

impl NixConf {
    /// Reads `nix.conf` in `dir` and its includes. Blocks on the disk. A missing file gives Nix's
    /// defaults.
    pub fn read(dir: &Path) -> NixConf {
        let mut conf = NixConf::default();
        conf.apply(&dir.join("nix.conf"), None);
        conf
    }

    /// Whether one of the files has been changed, removed or created since it was read. Blocks on
    /// the disk.
    pub fn check_for_changes(&self) -> bool {
        self.files.iter().any(|(file, then)| stamp(file) != *then)
    }

    /// Trusted public keys in the order of nix.conf. Nix uses the first of several keys with one
    /// name. Malformed keys are left out.
    pub fn public_keys(&self) -> Vec<PublicKey> {
        self.public_key_words().filter_map(|word| PublicKey::parse(word).ok()).collect()
    }

    /// Trusted public keys as words of nix.conf. Malformed keys are included.
    fn public_key_words(&self) -> impl Iterator<Item = &str> {
        self.get("trusted-public-keys").unwrap_or(UPSTREAM_KEY).split_whitespace()
    }

    /// Secret key files. Nix also trusts the public halves of their keys.
    pub fn secret_key_files(&self) -> impl Iterator<Item = &Path> {
        self.get("secret-key-files").unwrap_or_default().split_whitespace().map(Path::new)
    }

    /// Whether `require-sigs` is on, as it is by default.
    pub fn has_require_sigs(&self) -> bool {
        !matches!(self.get("require-sigs"), Some("false" | "no" | "0"))
    }

    /// Whether Nix requires signatures from the peerix on `port` of this machine.
    pub fn requires_signatures(&self, port: u16) -> bool {
        let takes_unsigned = |cache: Substituter<'_>| cache.is_peerix(port) && cache.is_trusted();
        self.has_require_sigs() && !self.substituters("").any(takes_unsigned)
    }

    /// The substituters of nix.conf. `default` is the setting's value if nix.conf does not have it.
    fn substituters<'a>(&'a self, default: &'a str) -> impl Iterator<Item = Substituter<'a>> {
        self.get("substituters").unwrap_or(default).split_whitespace().map(Substituter::parse)
    }

    /// The trusted keys, if the cache at `url` is certain to be one of Nix's substituters. `None`
    /// without a nix.conf, if it includes other files, has faults, or does not name the cache.
    pub fn keys_for_substituter(&self, url: &str) -> Option<Vec<PublicKey>> {
        let is_certain = matches!(self.files[..], [(_, Some(_))]) && self.faults.is_empty();
        let is_on = self.get("substitute").is_none_or(|value| value == "true");
        let url = Substituter::parse(url).url;
        let is_named = || self.substituters(DEFAULT_UPSTREAM).any(|cache| cache.url == url);
        (is_certain && is_on && is_named()).then(|| self.public_keys())
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// Applies the settings of `file`. `included_from` is the file that includes it; without one, a
    /// missing file is no fault.
    fn apply(&mut self, file: &Path, included_from: Option<&Path>) {
        if self.files.len() >= MAX_FILES {
            return self
                .faults
                .push(format!("{}: more than {MAX_FILES} files are included", file.display()));
        }
        self.files.push((file.to_owned(), stamp(file)));
        let text = match key_file::read_bytes(file, MAX_FILE_BYTES) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == ErrorKind::NotFound && included_from.is_none() => return,
            Err(e) => return self.faults.push(format!("{}: {e}", file.display())),
        };
        for line in text.lines() {
            let words: Vec<&str> =
                line.split('#').next().unwrap_or_default().split_whitespace().collect();
            match words[..] {
                [] => {}
                ["include", name] => self.apply(&beside(file, name), Some(file)),
                ["!include", name] => {
                    let name = beside(file, name);
                    match fs::metadata(&name) {
                        Err(e) if e.kind() == ErrorKind::NotFound => self.files.push((name, None)),
                        _ => self.apply(&name, Some(file)),
                    }
                }
                [name, "=", ref values @ ..] => self.set(name, &values.join(" ")),
                _ => self.faults.push(format!(
                    "{}: Nix does not take the line: {}",
                    file.display(),
                    line.trim()
                )),
            }
        }
    }

    fn set(&mut self, name: &str, value: &str) {
        let (name, adds) = name.strip_prefix("extra-").map_or((name, false), |name| (name, true));
        let Some((_, name)) = NAMES.iter().find(|(alias, _)| *alias == name) else { return };
        let before = match (adds, self.get(name), *name) {
            (false, ..) => "",
            (true, Some(before), _) => before,
            (true, None, "trusted-public-keys") => UPSTREAM_KEY,
            (true, None, "substituters") => DEFAULT_UPSTREAM,
            (true, None, _) => "",
        };
        let value = format!("{before} {value}").trim().to_owned();
        self.settings.insert(name, value);
    }
}

/// Resolves an included path relative to the directory of the including file.
fn beside(file: &Path, name: &str) -> PathBuf {
    file.parent().unwrap_or(Path::new("/")).join(name)
}

fn stamp(file: &Path) -> Option<NixConfStamp> {
    let meta = fs::metadata(file).ok()?;
    let nanoseconds = meta.mtime().wrapping_mul(1_000_000_000).wrapping_add(meta.mtime_nsec());
    Some((meta.dev(), meta.ino(), meta.len(), nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: &str = "dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Dir {
            let dir =
                std::env::temp_dir().join(format!("peerix-nix-conf-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.0.join(name), text).unwrap();
        }

        fn read(&self) -> NixConf {
            NixConf::read(&self.0)
        }

        fn names(&self) -> Vec<String> {
            self.read().public_keys().iter().map(|key| key.name().to_owned()).collect()
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn missing_file_gives_the_defaults_of_nix() {
        let dir = Dir::new("missing");
        let conf = dir.read();
        assert_eq!(dir.names(), ["cache.nixos.org-1"]);
        assert!(
            conf.faults.is_empty() && conf.requires_signatures(12304) && !conf.check_for_changes()
        );
        dir.write("nix.conf", "");
        assert!(conf.check_for_changes());
    }

    #[test]
    fn assignment_replaces_and_extra_assignment_appends() {
        let dir = Dir::new("assignments");
        for (text, expected) in [
            (format!("extra-trusted-public-keys = a-1:{KEY}"), &["cache.nixos.org-1", "a-1"][..]),
            (format!("trusted-public-keys = a-1:{KEY} b-1:{KEY} # c-1:{KEY}"), &["a-1", "b-1"]),
            (
                format!(
                    "binary-cache-public-keys = a-1:{KEY}\nextra-trusted-public-keys = b-1:{KEY}"
                ),
                &["a-1", "b-1"],
            ),
            (
                format!("extra-trusted-public-keys = a-1:{KEY}\ntrusted-public-keys = b-1:{KEY}"),
                &["b-1"],
            ),
            (format!("trusted-public-keys = a-1:nonsense b-1:{KEY}"), &["b-1"]),
            ("trusted-public-keys =".to_owned(), &[]),
        ] {
            dir.write("nix.conf", &text);
            assert_eq!(dir.names(), expected, "{text}");
        }
    }

    #[test]
    fn includes_are_followed_and_unreadable_includes_are_faults() {
        let dir = Dir::new("includes");
        dir.write("nix.conf", "include keys.conf\n!include custom.conf\n");
        dir.write("keys.conf", &format!("trusted-public-keys = a-1:{KEY}\n"));
        let conf = dir.read();
        assert_eq!((dir.names(), &conf.faults), (vec!["a-1".to_owned()], &vec![]));
        dir.write("custom.conf", &format!("extra-trusted-public-keys = b-1:{KEY}\n"));
        assert!(conf.check_for_changes());
        assert_eq!(dir.names(), ["a-1", "b-1"]);
        fs::remove_file(dir.0.join("custom.conf")).unwrap();
        fs::create_dir(dir.0.join("custom.conf")).unwrap();
        assert!(dir.read().faults[0].contains("custom.conf: not a file"));
        fs::remove_file(dir.0.join("keys.conf")).unwrap();
        assert_eq!(dir.read().faults.len(), 2, "include, unlike !include, needs its file");
        dir.write("nix.conf", "include nix.conf\n");
        assert!(dir.read().faults[0].contains("more than 64 files"));
        dir.write("nix.conf", "trusted-public-keys a-1\n");
        assert!(dir.read().faults[0].contains("does not take the line"));
    }

    #[test]
    fn signatures_are_required_unless_nix_conf_says_otherwise() {
        let dir = Dir::new("required");
        for (text, required) in [
            ("", true),
            ("require-sigs = true", true),
            ("require-sigs = false", false),
            ("require-sigs = no", false),
            ("substituters = http://127.0.0.1:12304?trusted=true", false),
            ("extra-substituters = http://localhost:12304/?priority=1&trusted=1", false),
            ("substituters = http://127.0.0.1:12304 http://other:12304?trusted=true", true),
            ("substituters = http://[::1]:12304/?trusted=yes", false),
            ("substituters = http://127.0.0.1:12305?trusted=true", true),
            ("substituters = http://127.0.0.1:12304/x?trusted=true", true),
        ] {
            dir.write("nix.conf", text);
            assert_eq!(dir.read().requires_signatures(12304), required, "{text}");
        }
    }

    #[test]
    fn substituter_is_known_only_if_nix_conf_is_certain() {
        let dir = Dir::new("substituters");
        let keys = |conf: &str, url: &str| {
            dir.write("nix.conf", conf);
            dir.read().keys_for_substituter(url)
        };
        let is = |conf| keys(conf, "https://cache.example").is_some();
        assert!(is("substituters = https://cache.nixos.org https://cache.example/\n"));
        assert!(is("extra-substituters = https://cache.example?priority=10 # ours\n"));
        assert!(is(
            "substituters = http://127.0.0.1:12304\nextra-substituters = https://cache.example"
        ));
        assert!(keys("max-jobs = 4\n", DEFAULT_UPSTREAM).is_some());
        assert!(keys("extra-substituters = https://cache.example", DEFAULT_UPSTREAM).is_some());
        for conf in [
            "",
            "#substituters = https://cache.example",
            // The second line replaces the first.
            "extra-substituters = https://cache.example\nsubstituters = http://127.0.0.1:12304",
            "trusted-substituters = https://cache.example",
            "substituters = https://cache.example.org",
            "substituters = https://cache.example\nsubstituters = http://127.0.0.1:12304",
            "substituters = https://cache.example\n!include more.conf",
            "substituters = https://cache.example\nsubstitute = false",
        ] {
            assert!(!is(conf), "{conf}");
        }
        assert!(keys("substituters = http://127.0.0.1:12304", DEFAULT_UPSTREAM).is_none());
        // Nothing is certain if the file has a fault.
        assert!(
            keys("substituters = https://cache.example\nnonsense", "https://cache.example")
                .is_none()
        );
    }

    #[test]
    fn substituter_keys_are_those_of_nix_conf() {
        let dir = Dir::new("keys");
        let other = format!("other-1:{KEY}");
        let names = |conf: &str| -> Vec<String> {
            dir.write("nix.conf", conf);
            let keys = dir.read().keys_for_substituter(DEFAULT_UPSTREAM).unwrap();
            keys.iter().map(|key| key.name().to_owned()).collect()
        };
        assert_eq!(names(""), ["cache.nixos.org-1"]);
        assert_eq!(names(&format!("trusted-public-keys = {other}")), ["other-1"]);
        assert_eq!(
            names(&format!("extra-trusted-public-keys = {other} nonsense")),
            ["cache.nixos.org-1", "other-1"]
        );
        assert_eq!(
            names(&format!("extra-trusted-public-keys = {other}\ntrusted-public-keys =")),
            [""; 0]
        );
    }
}
