//! Files that a user names: those of keys, as Nix writes them, and longer ones.

use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// A key file has 200 bytes; whoever lists many keys has a few thousand. In bytes.
const MAX_KEY_FILE: u64 = 4096;

/// The text of a key file. Nothing is waited for, or read without end, whatever is there under that
/// name.
///
/// # Errors
/// The system's; or it is no file, too large, or no text.
pub fn read(path: &Path) -> io::Result<String> {
    let is_refused = |e: &io::Error| e.kind() == io::ErrorKind::Other;
    let bytes = read_bytes(path, MAX_KEY_FILE)
        .map_err(|e| if is_refused(&e) { io::Error::other("not a key file") } else { e })?;
    String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// The content of a file of at most `max` bytes. Does not wait for a pipe or a device.
///
/// # Errors
/// The system's; or it is no regular file, or larger.
pub fn read_bytes(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    // A pipe would wait for somebody to write.
    let file =
        OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() || meta.len() > max {
        return Err(io::Error::other(format!("not a file of at most {} KiB", max >> 10)));
    }
    let mut bytes = Vec::new();
    file.take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_is_no_key_file_is_neither_waited_for_nor_read() {
        let dir = std::env::temp_dir().join(format!("peerix-key-file-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let (key, large, pipe) = (dir.join("key"), dir.join("large"), dir.join("pipe"));
        fs::write(&key, "a-1:x\n").unwrap();
        fs::write(&large, "x".repeat(4097)).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .unwrap();
        assert_eq!(read(&key).unwrap(), "a-1:x\n");
        for path in [&large, &pipe, &dir, Path::new("/dev/zero")] {
            assert_eq!(read(path).unwrap_err().to_string(), "not a key file", "{}", path.display());
        }
        assert_eq!(read(&dir.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        fs::remove_dir_all(&dir).unwrap();
    }
}
