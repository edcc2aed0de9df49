//! Decoding what a peer compressed: `Content-Encoding: zstd`, of one frame (RFC 8878). The peer may
//! be hostile: it decides neither how much memory this takes nor how long a read lasts.

use std::io::{self, Read};
use std::time::{Duration, Instant};
use zstd::stream::raw::{DParameter, Decoder, InBuffer, Operation, OutBuffer};

/// A stream may refer so far back, as a power of two: 2 MiB, which is what a stream takes here.
/// peerix itself needs 512 KiB.
const MAX_WINDOW_LOG: u32 = 21;

/// Compressed bytes that are taken without one byte coming out: two blocks of the largest size
/// there is. A good peer has one such block at most, as the first bytes of a block may wait for its
/// last.
const MAX_FRUITLESS: usize = 256 * 1024;

/// Compressed bytes read at once; the connection's buffer is as large.
const INPUT: usize = 128 * 1024;

/// The bytes that are in a compressed body. They end where the frame and the body end together;
/// everything else is an error.
pub(super) struct ZstdReader<R> {
    body: R,
    decoder: Decoder<'static>,
    input: Box<[u8]>,
    /// What of the input is not decoded yet.
    start: usize,
    end: usize,
    /// The last read was filled to the brim: there may be more without further input.
    is_brimful: bool,
    has_ended: bool,
    /// Compressed bytes taken since something came out.
    fruitless: usize,
    /// A read that has nothing to show for this long is given up, within one further read of the
    /// body.
    patience: Duration,
}

impl<R: Read> ZstdReader<R> {
    /// # Errors
    /// No memory.
    pub(super) fn new(body: R, patience: Duration) -> io::Result<Self> {
        let mut decoder = Decoder::new()?;
        decoder.set_parameter(DParameter::WindowLogMax(MAX_WINDOW_LOG))?;
        let input = vec![0; INPUT].into_boxed_slice();
        Ok(ZstdReader {
            body,
            decoder,
            input,
            start: 0,
            end: 0,
            is_brimful: false,
            has_ended: false,
            fruitless: 0,
            patience,
        })
    }

    /// Nothing, if nothing follows the frame.
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
            if self.start == self.end && !self.is_brimful {
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
            self.is_brimful = decoded == output.capacity();
            if decoded > 0 {
                self.fruitless = 0;
                return Ok(decoded);
            }
            self.fruitless += taken;
            if self.fruitless > MAX_FRUITLESS {
                return Err(invalid("zstd frame with nothing in it"));
            }
            if began.elapsed() > self.patience {
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

    /// A frame as large windows as `window_log` says.
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

    /// Gives one byte at a time.
    struct Drops<'a>(&'a [u8]);

    impl Read for Drops<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let len = buf.len().min(1);
            self.0.read(&mut buf[..len])
        }
    }

    #[test]
    fn what_was_compressed_comes_out() {
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
    fn in_reads_of_any_size() {
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
    fn a_frame_cut_anywhere_is_an_error() {
        let body = frame(&noise(200).repeat(10), 19);
        for len in 0..body.len() {
            assert_eq!(kind(&body[..len]), io::ErrorKind::UnexpectedEof, "{len} of {}", body.len());
        }
    }

    #[test]
    fn what_is_no_frame_or_not_alone_is_an_error() {
        let good = frame(b"good", 19);
        decode(&noise(1000)).unwrap_err();
        decode(b"nix-archive-1").unwrap_err();
        for after in [&b"\0"[..], &good] {
            assert_eq!(kind(&[&good, after].concat()), io::ErrorKind::InvalidData);
        }
        // A skippable frame is the one frame, of nothing.
        let skippable = [&0x184D_2A50u32.to_le_bytes()[..], &4u32.to_le_bytes(), b"skip"].concat();
        assert_eq!(decode(&skippable).unwrap(), b"");
        assert_eq!(kind(&[&skippable[..], &good].concat()), io::ErrorKind::InvalidData);
    }

    #[test]
    fn a_large_window_is_refused() {
        for window_log in [MAX_WINDOW_LOG + 1, 27] {
            let body = frame(&noise(8 << 20), window_log);
            let error = decode(&body).unwrap_err().to_string();
            assert!(error.contains("too much memory"), "{error}");
        }
    }

    /// The head of a frame with a window of 1 KiB, without a size.
    const HEAD: [u8; 6] = [0x28, 0xb5, 0x2f, 0xfd, 0, 0];
    /// A block of no bytes that is not the last.
    const NOTHING: [u8; 3] = [0, 0, 0];

    #[test]
    fn bytes_of_which_nothing_comes_are_an_error() {
        let blocks = [&HEAD[..], &NOTHING.repeat(MAX_FRUITLESS)].concat();
        let skipped = (2 * MAX_FRUITLESS as u32).to_le_bytes();
        let skipped =
            [&0x184D_2A5Fu32.to_le_bytes()[..], &skipped, &vec![0; 2 * MAX_FRUITLESS]].concat();
        for body in [blocks, skipped] {
            let error = decode(&body).unwrap_err();
            assert_eq!(error.to_string(), "zstd frame with nothing in it");
            let mut drops = ZstdReader::new(Drops(&body), Duration::ZERO).unwrap();
            assert_eq!(drops.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
        // A few of them do no harm.
        let body = [&HEAD[..], &NOTHING.repeat(1000), &[0x09, 0, 0, b'x']].concat();
        assert_eq!(decode(&body).unwrap(), b"x");
    }

    #[test]
    fn a_bomb_fills_no_more_than_what_is_read() {
        let body = frame(&vec![0; 64 << 20], 19);
        assert!(body.len() < 10_000);
        let mut decoded = ZstdReader::new(&body[..], Duration::from_secs(60)).unwrap();
        let mut piece = vec![1; 1000];
        decoded.read_exact(&mut piece).unwrap();
        assert_eq!(piece, [0; 1000]);
        // Not decoded further than a window.
        assert!(decoded.start < 200, "{} of {} bytes", decoded.start, body.len());
    }
}
