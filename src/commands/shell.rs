//! Quoting for remedies. Users paste them into a shell, usually as root, and they may contain names
//! that other machines chose.

/// Quotes `text` as one word of a shell command. Plain words stay as they are. Control characters
/// and bidirectional overrides are replaced by U+FFFD, because a line break would begin another
/// command.
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
    fn quoted_text_is_one_word_to_a_shell() {
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
