//! Findings of a command, printed as text with one line each, or as JSON.

use super::{EXIT_NO, EXIT_YES};
use crate::service::{clean, is_plain};
use serde_json::{Value, json};
use std::io::{self, Write};

/// Severity of a finding.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// All is well.
    Ok,
    /// Information.
    Note,
    /// A fault.
    Fail,
}

struct Finding {
    state: Severity,
    what: &'static str,
    text: String,
    remedy: String,
}

/// A list of findings, printed in the order in which they were added.
#[derive(Default)]
pub struct Findings(Vec<Finding>);

impl Findings {
    /// Adds a finding without a remedy. `what` is its name in JSON and text.
    pub fn add(&mut self, state: Severity, what: &'static str, text: String) {
        self.0.push(Finding { state, what, text, remedy: String::new() });
    }

    /// Adds a finding with [`Severity::Ok`].
    pub fn ok(&mut self, what: &'static str, text: String) {
        self.add(Severity::Ok, what, text);
    }

    /// Adds a finding with [`Severity::Note`].
    pub fn note(&mut self, what: &'static str, text: String) {
        self.add(Severity::Note, what, text);
    }

    /// Adds a finding with [`Severity::Fail`] and its remedy, one command or hint a line.
    pub fn fail(&mut self, what: &'static str, text: String, remedy: String) {
        self.0.push(Finding { state: Severity::Fail, what, text, remedy });
    }

    /// Whether no finding is a failure.
    pub fn is_well(&self) -> bool {
        self.0.iter().all(|finding| finding.state != Severity::Fail)
    }

    /// Whether a failure has one of these names.
    pub fn has_failed(&self, names: &[&str]) -> bool {
        self.0
            .iter()
            .any(|finding| finding.state == Severity::Fail && names.contains(&finding.what))
    }

    /// All findings as JSON, in their order.
    pub fn findings(&self) -> Vec<Value> {
        let finding = |finding: &Finding| {
            let Finding { state, what, text, remedy } = finding;
            let remedy = (!remedy.is_empty()).then_some(remedy);
            json!({"state": word(*state), "what": what, "text": text, "remedy": remedy})
        };
        self.0.iter().map(finding).collect()
    }

    /// Prints all findings and returns the exit status: [`EXIT_YES`] if `well` is set, otherwise
    /// [`EXIT_NO`].
    pub fn print(&self, json: bool, well: bool) -> u8 {
        if json {
            print(&json!({"version": 1, "ok": well, "findings": self.findings()}));
        } else {
            let mut out = String::new();
            for finding in &self.0 {
                let mark =
                    if finding.state == Severity::Fail { "FAIL" } else { word(finding.state) };
                out.push_str(&format!("{mark:5} {}: {}\n", finding.what, clean(&finding.text)));
                finding
                    .remedy
                    .lines()
                    .for_each(|line| out.push_str(&format!("        {}\n", clean(line))));
            }
            say(&out);
        }
        if well { EXIT_YES } else { EXIT_NO }
    }
}

fn word(state: Severity) -> &'static str {
    match state {
        Severity::Ok => "ok",
        Severity::Note => "note",
        Severity::Fail => "fail",
    }
}

/// Prints JSON with all characters escaped that a terminal may interpret.
pub fn print(value: &Value) {
    // serde_json escapes only ASCII control characters. Text from peers may contain others, such as
    // bidirectional overrides.
    let text = format!("{value:#}\n");
    let escaped: String = text
        .chars()
        .map(|c| {
            if c == '\n' || is_plain(c) {
                c.to_string()
            } else {
                format!("\\u{:04x}", u32::from(c))
            }
        })
        .collect();
    say(&escaped);
}

/// Prints text to standard output. Ignores errors, such as a pipe that `head` has closed.
pub fn say(text: &str) {
    let _ = io::stdout().write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clean_replaces_control_and_bidi_characters() {
        assert_eq!(
            clean("a\u{1b}[2Jb\nc\u{202e}d\u{2067}é"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d\u{fffd}é"
        );
    }
}
