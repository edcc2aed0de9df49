//! Build logs as Nix keeps them: `<log dir>/drvs/<first two digits>/<the rest>`, usually with bzip2.

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

/// The longest log that is served, in bytes of text. Its length is found by decompressing it once.
pub const MAX_LOG: u64 = 64 << 20;

/// A build log, to be read as the text that it is.
pub struct BuildLog {
    /// Bytes in the text.
    pub len: u64,
    /// The text: `len` bytes and then the end; fewer, or an error, if somebody changes the file meanwhile.
    pub reader: Box<dyn Read + Send>,
}

impl BuildLog {
    /// `None` if there is no log.
    pub(super) fn open(log_dir: &Path, derivation: &StorePath) -> Result<Option<BuildLog>, StoreError> {
        if !derivation.is_derivation() {
            return Ok(None);
        }
        let (shard, rest) = derivation.base_name().split_at(2);
        let dir = log_dir.join("drvs").join(shard);
        for compressed in [false, true] {
            let name = if compressed { format!("{rest}.bz2") } else { rest.to_owned() };
            let failed = |cause: io::Error| StoreError::Log { file: dir.join(&name), cause };
            let Some(file) = open_file(&dir, &name).map_err(failed)? else { continue };
            return Self::measure(file, compressed).map(Some).map_err(failed);
        }
        Ok(None)
    }

    fn measure(mut file: File, compressed: bool) -> io::Result<BuildLog> {
        let bound = |len| if len > MAX_LOG { Err(io::Error::other("larger than 64 MiB")) } else { Ok(len) };
        if !compressed {
            let len = bound(file.metadata()?.len())?;
            return Ok(BuildLog { len, reader: Box::new(file.take(len)) });
        }
        let mut text = MultiBzDecoder::new(BufReader::new(&mut file));
        let len = bound(io::copy(&mut (&mut text).take(MAX_LOG + 1), &mut io::sink())?)?;
        drop(text);
        file.rewind()?;
        Ok(BuildLog { len, reader: Box::new(MultiBzDecoder::new(BufReader::new(file)).take(len)) })
    }
}

// The directories belong to root and may be anything; what the name leads to must be a file and no symlink.
fn open_file(dir: &Path, name: &str) -> io::Result<Option<File>> {
    let there = |result: rustix::io::Result<_>| match result {
        Ok(descriptor) => Ok(Some(descriptor)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let Some(dir) = there(open(dir, flags, Mode::empty()))? else { return Ok(None) };
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let Some(descriptor) = there(openat(&dir, name, flags, Mode::empty()))? else { return Ok(None) };
    if FileType::from_raw_mode(fstat(&descriptor)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(Some(File::from(descriptor)))
}
