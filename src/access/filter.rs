//! Name filter of the access policy. A path whose base name matches one of the shell patterns is
//! withheld from WAN peers. The patterns are the built-in ones (see [`DEFAULT_PATTERNS`]) and those
//! of `--filter-patterns`.

use crate::fnmatch::Pattern;
use crate::nix::StorePath;

/// Patterns that apply unless `--no-default-filters` is given. The Python version of peerix has the
/// same list.
const DEFAULT_PATTERNS: &[&str] = &[
    // Parts of this machine's NixOS configuration.
    "*-nixos-system-*",
    "*-etc-*",
    "*-nixos-*-config",
    "*-unit-*.service",
    "*-system-path",
    "*-booted-system",
    "*-toplevel",
    "*-activation-script-*",
    "*-systemd-*",
    // Paths that may hold secrets.
    "*-sops-nix-*",
    "*-agenix-*",
    "*-secret-*",
    "*-secrets-*",
    "*-password-*",
    "*-private-key-*",
    "*-credentials-*",
    "*.key",
    "*.pem",
    // Files of this machine's users.
    "*-home-manager-*",
    "*-home-files-*",
];

/// The name patterns of this node.
#[derive(Debug, Default)]
pub struct NameFilter(Vec<Pattern>);

impl NameFilter {
    /// Compiles `patterns`, preceded by the built-in patterns if `defaults` is set.
    pub fn new(defaults: bool, patterns: &[String]) -> Self {
        let defaults = if defaults { DEFAULT_PATTERNS } else { &[] };
        NameFilter(
            defaults
                .iter()
                .copied()
                .chain(patterns.iter().map(String::as_str))
                .map(Pattern::parse)
                .collect(),
        )
    }

    /// Returns whether a pattern matches the whole base name of `path`, so that the path is
    /// withheld from WAN peers. Matching is case-sensitive.
    pub fn matches(&self, path: &StorePath) -> bool {
        self.0.iter().any(|pattern| pattern.matches(path.base_name()))
    }
}

/// Returns the first pattern that matches the base name of `path`. [`NameFilter::matches`] gives the
/// same verdict without naming the pattern.
pub fn matching_pattern<'a>(
    defaults: bool,
    patterns: &'a [String],
    path: &StorePath,
) -> Option<&'a str> {
    let defaults = if defaults { DEFAULT_PATTERNS } else { &[] };
    let mut all = defaults.iter().copied().chain(patterns.iter().map(String::as_str));
    all.find(|pattern| Pattern::parse(pattern).matches(path.base_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_and_own_patterns_match_whole_base_names() {
        let path = |name: &str| {
            StorePath::parse(&format!("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-{name}")).unwrap()
        };
        let more = ["*-mine".to_owned()];
        let (all, own) = (NameFilter::new(true, &more), NameFilter::new(false, &more));
        for name in [
            "nixos-system-host-24.05",
            "etc-1",
            "unit-sshd.service",
            "system-path",
            "my-secret-x",
            "tls.pem",
            "a.key",
        ] {
            assert!(all.matches(&path(name)), "{name}");
            assert!(!own.matches(&path(name)), "{name}");
            assert!(!NameFilter::default().matches(&path(name)), "{name}");
        }
        assert!(all.matches(&path("mine")) && own.matches(&path("mine")));
        assert_eq!(matching_pattern(true, &more, &path("my-secret-mine")), Some("*-secret-*"));
        assert_eq!(matching_pattern(false, &more, &path("my-secret-mine")), Some("*-mine"));
        assert_eq!(matching_pattern(true, &more, &path("hello-2.12")), None);
        for name in ["hello-2.12", "Mine", "my-SECRET-x", "mine.drv"] {
            assert!(!all.matches(&path(name)), "{name}");
        }
    }
}
