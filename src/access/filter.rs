//! The filter by name: which paths are not shared with WAN peers because a shell pattern matches
//! their base names.

use crate::fnmatch::Pattern;
use crate::nix::StorePath;

/// What the original keeps back unless it is told not to.
const DEFAULT_PATTERNS: &[&str] = &[
    // What NixOS builds of this machine's configuration.
    "*-nixos-system-*",
    "*-etc-*",
    "*-nixos-*-config",
    "*-unit-*.service",
    "*-system-path",
    "*-booted-system",
    "*-toplevel",
    "*-activation-script-*",
    "*-systemd-*",
    // What may hold secrets.
    "*-sops-nix-*",
    "*-agenix-*",
    "*-secret-*",
    "*-secrets-*",
    "*-password-*",
    "*-private-key-*",
    "*-credentials-*",
    "*.key",
    "*.pem",
    // What is of its users.
    "*-home-manager-*",
    "*-home-files-*",
];

/// The patterns of this node.
#[derive(Debug, Default)]
pub struct NameFilter(Vec<Pattern>);

impl NameFilter {
    /// The built-in patterns, if `defaults`, and these.
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

    /// Whether the path stays here: a pattern matches its base name, from its first to its last
    /// character.
    pub fn keeps(&self, path: &StorePath) -> bool {
        self.0.iter().any(|pattern| pattern.matches(path.base_name()))
    }
}

/// The first pattern that keeps a path here, as [`NameFilter::keeps`] does without a name for it.
pub fn kept_by<'a>(defaults: bool, patterns: &'a [String], path: &StorePath) -> Option<&'a str> {
    let defaults = if defaults { DEFAULT_PATTERNS } else { &[] };
    let mut all = defaults.iter().copied().chain(patterns.iter().map(String::as_str));
    all.find(|pattern| Pattern::parse(pattern).matches(path.base_name()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn which_patterns_apply() {
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
            assert!(all.keeps(&path(name)), "{name}");
            assert!(!own.keeps(&path(name)), "{name}");
            assert!(!NameFilter::default().keeps(&path(name)), "{name}");
        }
        assert!(all.keeps(&path("mine")) && own.keeps(&path("mine")));
        assert_eq!(kept_by(true, &more, &path("my-secret-mine")), Some("*-secret-*"));
        assert_eq!(kept_by(false, &more, &path("my-secret-mine")), Some("*-mine"));
        assert_eq!(kept_by(true, &more, &path("hello-2.12")), None);
        for name in ["hello-2.12", "Mine", "my-SECRET-x", "mine.drv"] {
            assert!(!all.keeps(&path(name)), "{name}");
        }
    }
}
