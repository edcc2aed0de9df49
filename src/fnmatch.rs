//! Shell patterns with the semantics of Python's `fnmatch.fnmatch` on Linux.
//!
//! The crate `glob` is not used because it refuses patterns that `fnmatch` accepts, such as `**`
//! within a name or an unclosed `[`. A pattern that is refused or matches too little would share a
//! path that its author wants to withhold.

/// A compiled pattern: `*` matches any characters, `?` one character, `[…]` one character of a set.
#[derive(Debug, Clone)]
pub struct Pattern(Vec<Token>);

#[derive(Debug, Clone)]
enum Token {
    /// `*`
    Any,
    /// `?`, a literal character, or `[…]`
    One(Set),
}

/// A set of characters, as ranges.
#[derive(Debug, Clone, Default)]
struct Set {
    ranges: Vec<(char, char)>,
    /// Whether the set contains all characters outside the ranges instead.
    negated: bool,
}

impl Set {
    fn has(&self, c: char) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&c)) != self.negated
    }

    /// Parses the text between the brackets. Panics if it is empty.
    fn parse(text: &[char]) -> Self {
        // A leading `!` negates the set and cannot begin a range.
        let (mark, mut rest) = text.split_at(usize::from(text[0] == '!'));
        let mut ranges: Vec<(char, char)> = mark.iter().map(|&c| (c, c)).collect();
        loop {
            rest = match *rest {
                [first, '-', last, ref rest @ ..] => {
                    // A backwards range is empty.
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
        // Python removes empty ranges before it looks for the leading `!`, so a later `!` can
        // become the negation.
        let negated = ranges.first().is_some_and(|(first, _)| *first == '!');
        if negated && let (_, last @ '"'..) = ranges.remove(0) {
            ranges.extend([('-', '-'), (last, last)]);
        }
        Set { ranges, negated }
    }
}

impl Pattern {
    /// Compiles a pattern. Every text is a valid pattern.
    pub fn parse(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        let (mut tokens, mut rest) = (Vec::new(), &text[..]);
        while let [c, after @ ..] = rest {
            rest = after;
            tokens.push(match c {
                // Consecutive `*` match the same as one.
                '*' if matches!(tokens.last(), Some(Token::Any)) => continue,
                '*' => Token::Any,
                '?' => Token::One(Set { ranges: Vec::new(), negated: true }),
                '[' => {
                    // A `]` in first place is a member of the set.
                    let min = usize::from(after.first() == Some(&'!')) + 1;
                    match after.iter().skip(min).position(|c| *c == ']') {
                        Some(more) => {
                            rest = &after[min + more + 1..];
                            Token::One(Set::parse(&after[..min + more]))
                        }
                        // A `[` without a closing bracket is a literal.
                        None => Token::One(Set { ranges: vec![('[', '[')], negated: false }),
                    }
                }
                c => Token::One(Set { ranges: vec![(*c, *c)], negated: false }),
            });
        }
        Pattern(tokens)
    }

    /// Whether the pattern matches the whole of `name`. Takes at most as many steps as the product
    /// of both lengths: after a mismatch it extends only the match of the last `*`, because
    /// extending an earlier one cannot help.
    pub fn matches(&self, name: &str) -> bool {
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

    /// Golden results of `fnmatch.fnmatch` in Python 3.11. Each line has a pattern, a name and
    /// `yes` or `no`, with Python's escapes.
    const GOLDEN: &str = include_str!("../tests/data/fnmatch");

    #[test]
    fn pattern_matches_as_in_python() {
        let text = |field: &str| field.replace("\\n", "\n").replace("\\\\", "\\");
        let (mut cases, mut wrong) = ([0, 0], Vec::new());
        for line in GOLDEN.lines() {
            let fields: Vec<_> = line.split('\t').collect();
            let [pattern, name, expected] = fields[..] else { panic!("{line}") };
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
    fn pattern_with_many_stars_takes_polynomial_time() {
        // Maximum length of the name of a store path.
        let name = "a".repeat(211);
        assert!(!Pattern::parse(&format!("{}b", "*a".repeat(128))).matches(&name));
        assert!(!Pattern::parse(&format!("{}b", "*?[a-z]".repeat(50))).matches(&name));
        assert!(Pattern::parse(&format!("{}*", "*a".repeat(128))).matches(&name));
    }
}
