//! Shell patterns, matched as Python's `fnmatch` does on Linux.
//!
//! The crate `glob` does not do: it refuses `**` within a name, an unclosed `[` and other patterns
//! that `fnmatch` takes. A refused pattern, or one that matches less than its author thinks,
//! would give away what it should hold back.

/// A compiled pattern: `*` is any characters, `?` is one character, `[…]` is one of a set.
#[derive(Debug, Clone)]
pub struct Pattern(Vec<Token>);

#[derive(Debug, Clone)]
enum Token {
    /// `*`
    Any,
    /// `?`, or the character itself, or `[…]`
    One(Set),
}

/// A set of characters, as ranges.
#[derive(Debug, Clone, Default)]
struct Set {
    ranges: Vec<(char, char)>,
    /// The set is all characters outside the ranges.
    negated: bool,
}

impl Set {
    fn has(&self, c: char) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&c)) != self.negated
    }

    /// Parses the text between the brackets, which is not empty.
    fn parse(text: &[char]) -> Self {
        // A range cannot begin with the mark of negation.
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
        // Python removes empty ranges before it looks for the mark of negation, so a later
        // character can become the mark.
        let negated = ranges.first().is_some_and(|(first, _)| *first == '!');
        if negated && let (_, last @ '"'..) = ranges.remove(0) {
            ranges.extend([('-', '-'), (last, last)]);
        }
        Set { ranges, negated }
    }
}

impl Pattern {
    /// Compiles a pattern. Every text is one.
    pub fn parse(text: &str) -> Self {
        let text: Vec<char> = text.chars().collect();
        let (mut tokens, mut rest) = (Vec::new(), &text[..]);
        while let [c, after @ ..] = rest {
            rest = after;
            tokens.push(match c {
                // Several in a row match what one does.
                '*' if matches!(tokens.last(), Some(Token::Any)) => continue,
                '*' => Token::Any,
                '?' => Token::One(Set { ranges: Vec::new(), negated: true }),
                '[' => {
                    // A closing bracket that comes first is a member of the set.
                    let least = usize::from(after.first() == Some(&'!')) + 1;
                    match after.iter().skip(least).position(|c| *c == ']') {
                        Some(more) => {
                            rest = &after[least + more + 1..];
                            Token::One(Set::parse(&after[..least + more]))
                        }
                        // Without a closing bracket it is a literal.
                        None => Token::One(Set { ranges: vec![('[', '[')], negated: false }),
                    }
                }
                c => Token::One(Set { ranges: vec![(*c, *c)], negated: false }),
            });
        }
        Pattern(tokens)
    }

    /// Whether the pattern matches the whole of `name`. Takes at most as many steps as the product
    /// of the two lengths: on a mismatch the last `*` takes one more character, and no earlier one
    /// can do better.
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

    /// Lines of pattern, name, and whether `fnmatch.fnmatch` of Python 3.11 matches them, written
    /// as Python writes strings.
    const GOLDEN: &str = include_str!("../tests/data/fnmatch");

    #[test]
    fn patterns_match_as_in_python() {
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
    fn no_pattern_takes_exponential_time() {
        // The longest name of a store path.
        let name = "a".repeat(211);
        assert!(!Pattern::parse(&format!("{}b", "*a".repeat(128))).matches(&name));
        assert!(!Pattern::parse(&format!("{}b", "*?[a-z]".repeat(50))).matches(&name));
        assert!(Pattern::parse(&format!("{}*", "*a".repeat(128))).matches(&name));
    }
}
