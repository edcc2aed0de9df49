//! Body of a NAR response: plain or compressed, from the requested byte or from the first.

use super::error::PeerError;
use crate::nix::Malformed;
use crate::peers::read_timeout;
use crate::peers::zstd_reader::ZstdReader;
use crate::time_scale::Timeout;
use crossbeam_channel::bounded;
use scopeguard::guard;
use std::io::{self, Read};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;
use ureq::http::Response;

/// Longest wait for the first byte of a NAR, and for each further byte.
pub const READ_TIMEOUT: Timeout = Timeout::from_secs(10);

/// Body of a NAR response. Reading it yields the bytes of the NAR, decompressed if necessary.
pub struct NarBody {
    bytes: BodyReader,
    /// Bytes to skip before the requested offset: a peer without range support starts at byte 0.
    pub skip: u64,
    /// True if the body has a length, or a zstd frame that marks its end.
    has_end: bool,
}

enum BodyReader {
    Plain(ureq::BodyReader<'static>),
    Compressed(Box<ZstdReader<ureq::BodyReader<'static>>>),
}

impl NarBody {
    /// Checks the head of a response with status 200 or 206 to a request of a NAR of `nar_size`
    /// bytes from byte `offset` on. `accepts_zstd` says that the request permitted compression.
    ///
    /// # Errors
    /// [`PeerError::Malformed`] if the body begins at another byte, has another length, or has an
    /// encoding that was not requested. [`PeerError::Unreachable`] if no decoder can be created.
    pub(super) fn new(
        response: Response<ureq::Body>,
        offset: u64,
        nar_size: u64,
        accepts_zstd: bool,
    ) -> Result<Self, PeerError> {
        let is_part = response.status() == 206;
        let range = response.headers().get("content-range").and_then(|field| field.to_str().ok());
        // RFC 9110, section 15.3.7: a single part has the field.
        if is_part && !range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-"))) {
            return Err(Malformed::new("NAR", "from another byte than was asked for").into());
        }
        let is_compressed = match response.headers().get("content-encoding") {
            None => false,
            Some(encoding) if accepts_zstd && encoding.as_bytes().eq_ignore_ascii_case(b"zstd") => {
                true
            }
            Some(_) => return Err(Malformed::new("NAR", "in an encoding not asked for").into()),
        };
        let from = if is_part { offset } else { 0 };
        let body = response.into_body();
        let length = body.content_length();
        if !is_compressed && length.is_some_and(|len| from.checked_add(len) != Some(nar_size)) {
            return Err(Malformed::new("NAR", "of another size than its narinfo says").into());
        }
        let reader = body.into_with_config().limit(u64::MAX).reader();
        let bytes = if is_compressed {
            BodyReader::Compressed(Box::new(ZstdReader::new(reader, READ_TIMEOUT.get())?))
        } else {
            BodyReader::Plain(reader)
        };
        Ok(NarBody { bytes, skip: offset - from, has_end: is_compressed || length.is_some() })
    }

    /// Reads the end of the body, which ureq requires before it reuses the connection. A plain body
    /// without a length is not read to its end, because the peer could delay it. The end of a
    /// compressed body is read in another thread, and this call blocks for 50 ms at most.
    pub fn finish(mut self) {
        /// Compressed bodies whose end is being read. Further connections are closed instead.
        const MAX_FINISHING: usize = 32;
        /// Wait for the end, which usually has arrived already.
        const END_TIMEOUT: Duration = Duration::from_millis(50);
        static FINISHING: AtomicUsize = AtomicUsize::new(0);
        match self.bytes {
            BodyReader::Plain(_) if self.has_end => {
                let _ = self.read(&mut [0]);
            }
            BodyReader::Compressed(_)
                if FINISHING.fetch_add(1, Ordering::Relaxed) < MAX_FINISHING =>
            {
                let permit = guard((), |()| {
                    FINISHING.fetch_sub(1, Ordering::Relaxed);
                });
                let (end, ended) = bounded::<()>(0);
                let finish = thread::Builder::new().name("nar-end".into()).spawn(move || {
                    let _permit = (permit, end);
                    let _ = self.read(&mut [0]);
                    drop(self);
                });
                match finish {
                    Ok(_) => drop(ended.recv_timeout(END_TIMEOUT)),
                    Err(e) => log::debug!("thread for the end of a NAR: {e}"),
                }
            }
            BodyReader::Compressed(_) => {
                FINISHING.fetch_sub(1, Ordering::Relaxed);
            }
            BodyReader::Plain(_) => {}
        }
    }

    /// Like [`Read::read`], but blocks for at most `timeout`. Returns `None` if nothing arrived in
    /// that time; a later read continues at the same byte.
    ///
    /// # Errors
    /// Errors of the connection and of the zstd decoder.
    pub fn read_within(&mut self, buf: &mut [u8], timeout: Duration) -> io::Result<Option<usize>> {
        match read_timeout::with_timeout(timeout, || self.read(buf)) {
            Err(e) if read_timeout::is_read_timeout(&e) => Ok(None),
            read => read.map(Some),
        }
    }
}

impl Read for NarBody {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.bytes {
            BodyReader::Plain(reader) => reader.read(buf),
            BodyReader::Compressed(reader) => reader.read(buf),
        }
    }
}
