//! Build logs in the layout of Nix: `<log dir>/drvs/<first two digits>/<rest>`, usually compressed
//! with bzip2 (suffix `.bz2`).

use super::StoreError;
use crate::nix::StorePath;
use bzip2::bufread::MultiBzDecoder;
use rustix::{
    fs::{FileType, Mode, OFlags, fstat, open, openat},
    io::Errno,
};
use std::{
    fs::File,
    io::{self, BufReader, Read, Seek},
    path::Path,
};

/// The longest log that is served, in bytes after decompression; longer logs are an error. The
/// length is found by decompressing the log once.
pub const MAX_LOG_BYTES: u64 = 64 << 20;

/// An open build log, decompressed.
pub struct BuildLog {
    /// Size of the text in bytes.
    pub len: u64,
    /// The text, `len` bytes. If the file changes meanwhile it may yield fewer bytes or an error.
    pub reader: Box<dyn Read + Send>,
}

impl BuildLog {
    /// Opens the log of `derivation`; `None` if there is no log or the path is no derivation.
    /// Decompresses a bzip2 log once to find its length, up to 64 MiB of text.
    pub(super) fn open(
        log_dir: &Path,
        derivation: &StorePath,
    ) -> Result<Option<BuildLog>, StoreError> {
        if !derivation.is_derivation() {
            return Ok(None);
        }
        let (shard, rest) = derivation.base_name().split_at(2);
        let dir = log_dir.join("drvs").join(shard);
        for compressed in [false, true] {
            let name = if compressed { format!("{rest}.bz2") } else { rest.to_owned() };
            let failed = |cause: io::Error| StoreError::Log { file: dir.join(&name), cause };
            let Some(file) = open_file(&dir, &name).map_err(failed)? else { continue };
            return Self::measure(file, compressed, MAX_LOG_BYTES).map(Some).map_err(failed);
        }
        Ok(None)
    }

    fn measure(mut file: File, compressed: bool, max: u64) -> io::Result<BuildLog> {
        let bound = |len| {
            if len > max {
                Err(io::Error::other(format!("larger than {max} bytes")))
            } else {
                Ok(len)
            }
        };
        if !compressed {
            let len = bound(file.metadata()?.len())?;
            return Ok(BuildLog { len, reader: Box::new(file.take(len)) });
        }
        let mut text = MultiBzDecoder::new(BufReader::new(&mut file));
        let len = bound(io::copy(&mut (&mut text).take(max + 1), &mut io::sink())?)?;
        drop(text);
        file.rewind()?;
        Ok(BuildLog { len, reader: Box::new(MultiBzDecoder::new(BufReader::new(file)).take(len)) })
    }
}

// Opens a log without following symlinks, and refuses anything but a regular file: other software
// may have put anything into these directories.
fn open_file(dir: &Path, name: &str) -> io::Result<Option<File>> {
    let there = |result: rustix::io::Result<_>| match result {
        Ok(descriptor) => Ok(Some(descriptor)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Some(dir) = there(open(dir, flags, Mode::empty()))? else { return Ok(None) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Some(descriptor) = there(openat(&dir, name, flags, Mode::empty()))? else {
        return Ok(None);
    };
    if FileType::from_raw_mode(fstat(&descriptor)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(Some(File::from(descriptor)))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Fixture, all};
    use super::*;
    use bzip2::{Compression, read::BzEncoder};
    use std::{fs, os::unix::fs::symlink};

    const DERIVATION: &str = "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-konsole.drv";

    fn read(fixture: &Fixture, path: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let log = fixture.open().log(&StorePath::parse(path).unwrap())?;
        Ok(log.map(|log| {
            let text = all(log.reader).unwrap();
            assert_eq!(text.len() as u64, log.len);
            text
        }))
    }

    #[test]
    fn plain_and_compressed_logs_are_read() {
        let fixture = Fixture::new();
        assert_eq!(read(&fixture, DERIVATION).unwrap(), None);
        let dir = fixture.log_dir().join("drvs/7h");
        fs::create_dir_all(&dir).unwrap();
        assert_eq!(read(&fixture, DERIVATION).unwrap(), None);
        let file = dir.join(format!("{}.bz2", &DERIVATION[2..]));
        let text = "building\n".repeat(10_000).into_bytes();
        let compressed = all(BzEncoder::new(&text[..], Compression::best())).unwrap();
        fs::write(&file, &compressed).unwrap();
        assert_eq!(read(&fixture, DERIVATION).unwrap(), Some(text.clone()));
        // A file of several bzip2 streams is one text.
        fs::write(&file, [&compressed[..], &compressed].concat()).unwrap();
        assert_eq!(read(&fixture, DERIVATION).unwrap(), Some(text.repeat(2)));
        fs::write(&file, &compressed[..compressed.len() / 2]).unwrap();
        assert!(matches!(read(&fixture, DERIVATION), Err(StoreError::Log { .. })));
        fs::write(&file, &compressed).unwrap();
        for (max, good) in [(text.len() as u64, true), (text.len() as u64 - 1, false), (0, false)] {
            assert_eq!(BuildLog::measure(File::open(&file).unwrap(), true, max).is_ok(), good);
        }
        fs::write(dir.join(&DERIVATION[2..]), "plain").unwrap();
        assert_eq!(read(&fixture, DERIVATION).unwrap(), Some(b"plain".to_vec()));
        assert!(
            BuildLog::measure(File::open(dir.join(&DERIVATION[2..])).unwrap(), false, 4).is_err()
        );
    }

    #[test]
    fn log_that_is_no_regular_file_is_refused() {
        let fixture = Fixture::new();
        let dir = fixture.log_dir().join("drvs/7h");
        fs::create_dir_all(&dir).unwrap();
        let name = &DERIVATION[2..];
        fs::write(dir.join(name.trim_end_matches(".drv")), "no derivation").unwrap();
        assert_eq!(read(&fixture, DERIVATION.trim_end_matches(".drv")).unwrap(), None);
        symlink("/etc/passwd", dir.join(name)).unwrap();
        assert!(matches!(read(&fixture, DERIVATION), Err(StoreError::Log { .. })));
        fs::remove_file(dir.join(name)).unwrap();
        fs::create_dir(dir.join(name)).unwrap();
        assert!(matches!(read(&fixture, DERIVATION), Err(StoreError::Log { .. })));
        fs::remove_dir_all(&dir).unwrap();
        symlink("/etc", &dir).unwrap();
        assert!(matches!(read(&fixture, DERIVATION), Err(StoreError::Log { .. }) | Ok(None)));
    }
}
