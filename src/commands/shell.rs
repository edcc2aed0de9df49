//! Words for a shell. What mends something is there to be pasted, by root as a rule, and names in
//! it may be anybody's.

/// A text as one word of a command line, quoted if it needs to be. Characters that are not for a
/// terminal are replaced: a line's end would begin another command.
pub fn quote(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_/.,:@%+=-".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        return text.to_owned();
    }
    format!("'{}'", crate::service::clean(text).replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_shell_takes_it_for_one_word() {
        assert_eq!(quote("/etc/nix/peerix-1.sec"), "/etc/nix/peerix-1.sec");
        assert_eq!(quote("http://10.0.0.1:12305/health"), "http://10.0.0.1:12305/health");
        assert_eq!(quote("/a\nreboot"), "'/a\u{fffd}reboot'");
        for text in ["", "it's", "a b", "$(reboot)", "`reboot`;&|>", "''", "\\", "~", "*", "ü", "#"]
        {
            let script = format!("printf '%s|' {}", quote(text));
            let output = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), format!("{text}|"), "{script}");
        }
    }
}
