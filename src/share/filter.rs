//! Which paths stay here because of their names: shell patterns, as Python's `fnmatch` reads them on Linux.
//!
//! Not by the crate `glob`: it refuses `**` within a name, an unclosed `[` and other patterns that `fnmatch`
//! takes, and a pattern that is refused, or matches less than its writer thinks, gives away what it should keep.

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
pub struct Filter(Vec<Pattern>);

impl Filter {
    /// The built-in patterns, if `defaults`, and these.
    pub fn new(defaults: bool, patterns: &[String]) -> Self {
        let defaults = if defaults { DEFAULT_PATTERNS } else { &[] };
        Filter(defaults.iter().copied().chain(patterns.iter().map(String::as_str)).map(Pattern::parse).collect())
    }

    /// Whether the path stays here: a pattern matches its base name, from its first to its last character.
    pub fn keeps(&self, path: &StorePath) -> bool {
        self.0.iter().any(|pattern| pattern.matches(path.base_name()))
    }
}

/// The first pattern that keeps a path here, as [`Filter::keeps`] does without a name for it.
pub fn kept_by<'a>(defaults: bool, patterns: &'a [String], path: &StorePath) -> Option<&'a str> {
    let defaults = if defaults { DEFAULT_PATTERNS } else { &[] };
    let mut all = defaults.iter().copied().chain(patterns.iter().map(String::as_str));
    all.find(|pattern| Pattern::parse(pattern).matches(path.base_name()))
}

#[derive(Debug)]
struct Pattern(Vec<Token>);

#[derive(Debug)]
enum Token {
    /// `*`
    Any,
    /// `?`, or the character itself, or `[…]`
    One(Set),
}

/// Characters, by their ranges.
#[derive(Debug, Default)]
struct Set {
    ranges: Vec<(char, char)>,
    /// All but these.
    negated: bool,
}

impl Set {
    fn has(&self, c: char) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&c)) != self.negated
    }

    /// Reads what is between the brackets, which is not empty.
    fn parse(text: &[char]) -> Self {
        // A range cannot begin with the mark of negation.
        let (mark, mut rest) = text.split_at(usize::from(text[0] == '!'));
        let mut ranges: Vec<(char, char)> = mark.iter().map(|&c| (c, c)).collect();
        loop {
            rest = match *rest {
                [first, '-', last, ref rest @ ..] => {
                    // Backwards, it is empty.
                    ranges.extend((first <= last).then_some((first, last)));
                    rest
                }
                [c, ref rest @ ..] => {
                    ranges.push((c, c));
                    rest
                }
                [] => break,
            };
        }
        // Python cuts empty ranges out before it looks for the mark, so that a later character may come to be it.
        let negated = ranges.first().is_some_and(|(first, _)| *first == '!');
        if negated && let (_, last @ '"'..) = ranges.remove(0) {
            ranges.extend([('-', '-'), (last, last)]);
        }
        Set { ranges, negated }
    }
}

impl Pattern {
    fn parse(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        let (mut tokens, mut rest) = (Vec::new(), &text[..]);
        while let [c, after @ ..] = rest {
            rest = after;
            tokens.push(match c {
                // Any number of them is one.
                '*' if matches!(tokens.last(), Some(Token::Any)) => continue,
                '*' => Token::Any,
                '?' => Token::One(Set { ranges: Vec::new(), negated: true }),
                '[' => {
                    // A closing bracket that comes first is one of the characters.
                    let least = usize::from(after.first() == Some(&'!')) + 1;
                    match after.iter().skip(least).position(|c| *c == ']') {
                        Some(more) => {
                            rest = &after[least + more + 1..];
                            Token::One(Set::parse(&after[..least + more]))
                        }
                        // Without an end it is itself.
                        None => Token::One(Set { ranges: vec![('[', '[')], negated: false }),
                    }
                }
                c => Token::One(Set { ranges: vec![(*c, *c)], negated: false }),
            });
        }
        Pattern(tokens)
    }

    /// Takes at most as many steps as the product of the two lengths: when a character does not fit, the last `*`
    /// takes one more, and no earlier one can do better.
    fn matches(&self, name: &str) -> bool {
        let name = name.chars();
        let (mut tokens, mut left) = (&self.0[..], name);
        let mut last_any = None;
        loop {
            match tokens {
                [Token::Any, rest @ ..] => {
                    tokens = rest;
                    last_any = Some((rest, left.clone()));
                    continue;
                }
                [Token::One(set), rest @ ..] => {
                    let mut after = left.clone();
                    if after.next().is_some_and(|c| set.has(c)) {
                        (tokens, left) = (rest, after);
                        continue;
                    }
                }
                [] if left.as_str().is_empty() => return true,
                [] => {}
            }
            let Some((after_any, taken)) = &mut last_any else { return false };
            if taken.next().is_none() {
                return false;
            }
            (tokens, left) = (*after_any, taken.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pattern, name and whether `fnmatch.fnmatch` of Python 3.11 says that they match; as Python writes strings.
    const GOLDEN: &str = include_str!("../../tests/data/fnmatch");

    #[test]
    fn as_python_matches() {
        let text = |field: &str| field.replace("\\n", "\n").replace("\\\\", "\\");
        let (mut cases, mut wrong) = ([0, 0], Vec::new());
        for line in GOLDEN.lines() {
            let [pattern, name, expected] = line.split('\t').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let expected = expected == "yes";
            cases[usize::from(expected)] += 1;
            if Pattern::parse(&text(pattern)).matches(&text(name)) != expected {
                wrong.push(line);
            }
        }
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(cases[0] > 300 && cases[1] > 300, "{cases:?}");
    }

    #[test]
    fn no_pattern_takes_exponential_time() {
        let name = "a".repeat(StorePath::MAX_NAME_LEN);
        assert!(!Pattern::parse(&format!("{}b", "*a".repeat(128))).matches(&name));
        assert!(!Pattern::parse(&format!("{}b", "*?[a-z]".repeat(50))).matches(&name));
        assert!(Pattern::parse(&format!("{}*", "*a".repeat(128))).matches(&name));
    }

    #[test]
    fn which_patterns_apply() {
        let path = |name: &str| StorePath::parse(&format!("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-{name}")).unwrap();
        let more = ["*-mine".to_owned()];
        let (all, own) = (Filter::new(true, &more), Filter::new(false, &more));
        for name in
            ["nixos-system-host-24.05", "etc-1", "unit-sshd.service", "system-path", "my-secret-x", "tls.pem", "a.key"]
        {
            assert!(all.keeps(&path(name)), "{name}");
            assert!(!own.keeps(&path(name)), "{name}");
            assert!(!Filter::default().keeps(&path(name)), "{name}");
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
