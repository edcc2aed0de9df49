//! Bounded reads of files that the user names, such as key files and nix.conf.

use rustix::fs::OFlags;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Maximum size of a key file, in bytes; a larger file is an error. One key takes 200 bytes, a long
/// list of keys a few thousand.
const MAX_KEY_FILE_BYTES: u64 = 4096;

/// Reads a key file as text. Does not wait for a pipe or a device.
///
/// # Errors
/// The system's error; the file is not regular or larger than 4,096 bytes; or it is not UTF-8.
pub fn read(path: &Path) -> io::Result<String> {
    let is_refused = |e: &io::Error| e.kind() == io::ErrorKind::Other;
    let bytes = read_bytes(path, MAX_KEY_FILE_BYTES)
        .map_err(|e| if is_refused(&e) { io::Error::other("not a key file") } else { e })?;
    String::from_utf8(bytes).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// Reads a regular file of at most `max` bytes. Does not wait for a pipe or a device.
///
/// # Errors
/// The system's error, or the file is not regular or larger than `max`.
pub fn read_bytes(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    // Without O_NONBLOCK, opening a named pipe waits for a writer.
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
    fn pipe_device_or_large_file_is_refused_without_waiting() {
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
