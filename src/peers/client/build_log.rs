//! Build log from a peer, made safe for the terminal.

use super::error::PeerError;
use crate::nix::Malformed;
use std::io::{self, Read};

/// Largest build log, in bytes. It equals the limit that peerix serves.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// Build log from a peer.
pub struct LogBody {
    /// Length in bytes.
    pub len: u64,
    /// Reader of the text.
    pub text: PrintableReader<ureq::BodyReader<'static>>,
}

impl LogBody {
    /// Checks the length of the body of a response.
    ///
    /// # Errors
    /// [`PeerError::Malformed`] if the body has no length or more than 64 MiB.
    pub(super) fn new(body: ureq::Body) -> Result<Self, PeerError> {
        match body.content_length() {
            Some(len) if len <= MAX_LOG_BYTES => {
                let text = body.into_with_config().limit(u64::MAX).reader();
                Ok(LogBody { len, text: PrintableReader { text, last: 0 } })
            }
            _ => {
                Err(Malformed::unsupported("build log", "without a length, or over 64 MiB").into())
            }
        }
    }
}

/// Replaces control characters other than tabs and line ends by question marks. Nix prints logs to
/// the terminal, and logs are not signed.
pub struct PrintableReader<R> {
    text: R,
    last: u8,
}

impl<R: Read> Read for PrintableReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.text.read(buf)?;
        for byte in &mut buf[..read] {
            let before = std::mem::replace(&mut self.last, *byte);
            if byte.is_ascii_control() && !b"\t\n\r".contains(byte) {
                *byte = b'?';
            } else if before == 0xc2 && (0x80..0xa0).contains(byte) {
                // U+0080 to U+009F become an inverted question mark, which has the same first byte.
                *byte = 0xbf;
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn build_log_has_no_control_characters() {
        let log = "tab\t line\r\n \u{1b}[2J \u{9b}2J \u{85} ä \u{a0} €";
        // One byte at a time: a character may span two reads.
        struct Bytes<'a>(&'a [u8]);
        impl Read for Bytes<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let max = buf.len().min(1);
                self.0.read(&mut buf[..max])
            }
        }
        let read = |log| {
            let mut text = Vec::new();
            PrintableReader { text: Bytes(log), last: 0 }.read_to_end(&mut text).unwrap();
            text
        };
        let expected = "tab\t line\r\n ?[2J ¿2J ¿ ä \u{a0} €";
        assert_eq!(read(log.as_bytes()), expected.as_bytes());
        // In Latin-1, 0xc2 is a letter of its own.
        assert_eq!(read(b"\xc2A \xc2\n\xc2\x1b"), b"\xc2A \xc2\n\xc2?");
    }
}
