//! Decoder for `Content-Encoding: zstd` with a single frame (RFC 8878). The peer may be hostile:
//! memory and the duration of a read are bounded.

use std::io::{self, Read};
use std::time::{Duration, Instant};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// Largest window, as a power of two: 2 MiB, which is the memory of one stream. Larger windows are
/// an error. peerix itself compresses with 512 KiB.
const MAX_WINDOW_LOG: u32 = 21;

/// Largest number of compressed bytes that yield no output: two blocks of the maximum size. More
/// are an error. A valid peer sends at most one such block, because the first bytes of a block may
/// wait for its last.
const MAX_EMPTY_READS: usize = 256 * 1024;

/// Size of the input buffer, in bytes. It equals the size of the connection's buffer.
const INPUT_BYTES: usize = 128 * 1024;

/// Reader of the decompressed bytes of a body. They end where the frame and the body end together;
/// a shorter frame, or bytes after it, are an error.
pub(super) struct ZstdReader<R> {
    body: R,
    decoder: Decoder<'static>,
    input: Box<[u8]>,
    /// Range of the input that is not decoded yet.
    start: usize,
    end: usize,
    /// True if the last read filled its buffer: the decoder may hold more output.
    output_was_full: bool,
    has_ended: bool,
    /// Compressed bytes consumed since the last output.
    empty_reads: usize,
    /// Time limit of a read without output. It may be exceeded by one read of the body.
    timeout: Duration,
}

impl<R: Read> ZstdReader<R> {
    /// Creates a decoder of `body`.
    ///
    /// # Errors
    /// Out of memory.
    pub(super) fn new(body: R, timeout: Duration) -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        let input = vec![0; INPUT_BYTES].into_boxed_slice();
        Ok(ZstdReader {
            body,
            decoder,
            input,
            start: 0,
            end: 0,
            output_was_full: false,
            has_ended: false,
            empty_reads: 0,
            timeout,
        })
    }

    /// Returns 0 at the end of the body.
    ///
    /// # Errors
    /// Bytes follow the frame.
    fn read_end(&mut self) -> io::Result<usize> {
        if self.start < self.end || self.body.read(&mut self.input)? > 0 {
            return Err(invalid("bytes after the zstd frame"));
        }
        Ok(0)
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl<R: Read> Read for ZstdReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let began = Instant::now();
        loop {
            if self.has_ended {
                return self.read_end();
            }
            if self.start == self.end && !self.output_was_full {
                (self.start, self.end) = (0, self.body.read(&mut self.input)?);
                if self.end == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "zstd frame ends early",
                    ));
                }
            }
            let mut input = InBuffer::around(&self.input[self.start..self.end]);
            let mut output = OutBuffer::around(buf);
            self.has_ended = self.decoder.run(&mut input, &mut output)? == 0;
            let (taken, decoded) = (input.pos(), output.pos());
            self.start += taken;
            self.output_was_full = decoded == output.capacity();
            if decoded > 0 {
                self.empty_reads = 0;
                return Ok(decoded);
            }
            self.empty_reads += taken;
            if self.empty_reads > MAX_EMPTY_READS {
                return Err(invalid("zstd frame with nothing in it"));
            }
            if began.elapsed() > self.timeout {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "nothing to decode"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;
    use zstd::stream::raw::CParameter;

    fn decode(body: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        ZstdReader::new(body, Duration::from_secs(60))?.read_to_end(&mut out)?;
        Ok(out)
    }

    fn kind(body: &[u8]) -> io::ErrorKind {
        decode(body).unwrap_err().kind()
    }

    /// Compresses `plain` into a frame with a window of 2^`window_log` bytes.
    fn frame(plain: &[u8], window_log: u32) -> Vec<u8> {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.set_parameter(CParameter::WindowLog(window_log)).unwrap();
        io::copy(&mut Cursor::new(plain), &mut encoder).unwrap();
        encoder.finish().unwrap()
    }

    fn noise(len: usize) -> Vec<u8> {
        let mut x = 1u64;
        let mut next = || {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (x >> 56) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    /// Reader that returns one byte at a time.
    struct Drops<'a>(&'a [u8]);

    impl Read for Drops<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let len = buf.len().min(1);
            self.0.read(&mut buf[..len])
        }
    }

    #[test]
    fn compressed_body_is_decoded() {
        let plains =
            [vec![], vec![1], noise(5_000_000), vec![7; 5_000_000], noise(1000).repeat(3000)];
        for plain in plains {
            for window_log in [10, 19, MAX_WINDOW_LOG] {
                let body = frame(&plain, window_log);
                assert!(decode(&body).unwrap() == plain);
                if body.len() < 100_000 {
                    let mut out = Vec::new();
                    ZstdReader::new(Drops(&body), Duration::MAX)
                        .unwrap()
                        .read_to_end(&mut out)
                        .unwrap();
                    assert!(out == plain);
                }
            }
        }
    }

    #[test]
    fn body_is_decoded_with_any_buffer_size() {
        let plain = noise(1000).repeat(300);
        let body = frame(&plain, 19);
        for size in [1, 7, 1000, 131_072, 300_000, 300_001] {
            let mut decoded = ZstdReader::new(&body[..], Duration::from_secs(60)).unwrap();
            let (mut out, mut buf) = (Vec::new(), vec![0; size]);
            loop {
                match decoded.read(&mut buf).unwrap() {
                    0 => break,
                    len => out.extend_from_slice(&buf[..len]),
                }
            }
            assert!(out == plain, "{size}");
            assert_eq!(decoded.read(&mut buf).unwrap(), 0);
        }
    }

    #[test]
    fn truncated_frame_is_error() {
        let body = frame(&noise(200).repeat(10), 19);
        for len in 0..body.len() {
            assert_eq!(kind(&body[..len]), io::ErrorKind::UnexpectedEof, "{len} of {}", body.len());
        }
    }

    #[test]
    fn invalid_frame_or_trailing_bytes_are_error() {
        let good = frame(b"good", 19);
        decode(&noise(1000)).unwrap_err();
        decode(b"nix-archive-1").unwrap_err();
        for after in [&b"\0"[..], &good] {
            assert_eq!(kind(&[&good, after].concat()), io::ErrorKind::InvalidData);
        }
        // A skippable frame counts as the one frame, without content.
        let skippable = [&0x184D_2A50u32.to_le_bytes()[..], &4u32.to_le_bytes(), b"skip"].concat();
        assert_eq!(decode(&skippable).unwrap(), b"");
        assert_eq!(kind(&[&skippable[..], &good].concat()), io::ErrorKind::InvalidData);
    }

    #[test]
    fn window_above_limit_is_refused() {
        for window_log in [MAX_WINDOW_LOG + 1, 27] {
            let body = frame(&noise(8 << 20), window_log);
            let error = decode(&body).unwrap_err().to_string();
            assert!(error.contains("too much memory"), "{error}");
        }
    }

    /// Header of a frame with a window of 1 KiB and without a content size.
    const HEAD: [u8; 6] = [0x28, 0xb5, 0x2f, 0xfd, 0, 0];
    /// Empty block that is not the last one.
    const NOTHING: [u8; 3] = [0, 0, 0];

    #[test]
    fn frame_without_output_is_error() {
        let blocks = [&HEAD[..], &NOTHING.repeat(MAX_EMPTY_READS)].concat();
        let skipped = (2 * MAX_EMPTY_READS as u32).to_le_bytes();
        let skipped =
            [&0x184D_2A5Fu32.to_le_bytes()[..], &skipped, &vec![0; 2 * MAX_EMPTY_READS]].concat();
        for body in [blocks, skipped] {
            let error = decode(&body).unwrap_err();
            assert_eq!(error.to_string(), "zstd frame with nothing in it");
            let mut drops = ZstdReader::new(Drops(&body), Duration::ZERO).unwrap();
            assert_eq!(drops.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        // A moderate number of empty blocks is accepted.
        let body = [&HEAD[..], &NOTHING.repeat(1000), &[0x09, 0, 0, b'x']].concat();
        assert_eq!(decode(&body).unwrap(), b"x");
    }

    #[test]
    fn decompression_bomb_is_decoded_only_as_read() {
        let body = frame(&vec![0; 64 << 20], 19);
        assert!(body.len() < 10_000);
        let mut decoded = ZstdReader::new(&body[..], Duration::from_secs(60)).unwrap();
        let mut piece = vec![1; 1000];
        decoded.read_exact(&mut piece).unwrap();
        assert_eq!(piece, [0; 1000]);
        // The input is not decoded further than one window ahead.
        assert!(decoded.start < 200, "{} of {} bytes", decoded.start, body.len());
    }
}
