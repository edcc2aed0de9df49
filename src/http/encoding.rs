//! `Content-Encoding: zstd` for NARs sent to peers over slow links: negotiation and compression.

use super::response::Exchange;
use crate::store::NarSink;
use std::io::{self, Write};
use zstd::stream::raw::{CParameter, Encoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::CCtx;

/// zstd level. It was measured on NARs of programs (`/usr/bin`, 270 MB) and of shared data
/// (`/usr/share`, 256 MiB), on one core of a server, with zstd 1.5.7; each cell has both values.
/// The last two columns say how many times sooner a NAR arrives over such a link if one core does
/// all the compression:
///
/// | level | ratio | s/GiB to compress | to decompress | at 100 Mbit/s | at 1 Gbit/s |
/// |---|---|---|---|---|---|
/// | -5 | 1.8 · 2.0 | 3.7 · 2.3 | 0.9 · 0.6 | 1.8 · 2.0 | 1.8 · 2.0 |
/// | -1 | 2.2 · 2.2 | 3.5 · 2.5 | 0.8 · 0.6 | 2.2 · 2.2 | 2.2 · 2.2 |
/// | **1** | 2.5 · 2.4 | 3.8 · 3.2 | 1.2 · 0.8 | 2.5 · 2.4 | 2.3 · 2.4 |
/// | 2 | 2.7 · 2.5 | 5.1 · 3.5 | 1.3 · 0.8 | 2.7 · 2.5 | 1.7 · 2.4 |
/// | 3 | 2.9 · 2.7 | 7.5 · 5.1 | 1.3 · 0.8 | 2.9 · 2.7 | 1.1 · 1.7 |
/// | 4 | 3.0 · 2.7 | 8.8 · 4.7 | 2.0 · 0.9 | 3.0 · 2.7 | 1.0 · 1.8 |
/// | 6 | 3.1 · 2.9 | 24 · 13 | 1.7 · 0.8 | 3.1 · 2.9 | 0.4 · 0.6 |
///
/// Level 1 is the highest that keeps up with 1 Gbit/s. Above it, each further byte saved costs
/// several times as much. Incompressible bytes take 1.2 s/GiB at every level.
const LEVEL: i32 = 1;

/// Window size as a power of two: 512 KiB, the default of level 1. A window of 1 MiB saves 2 % at
/// most. Peers refuse more than 2 MiB, because a decoder has to allocate the window.
const WINDOW_LOG: u32 = 19;

/// Whether an `Accept-Encoding` field (RFC 9110, section 12.5.3) names zstd with a weight above 0.
/// `*` and malformed values do not count, because every client understands an unencoded body.
pub(super) fn accepts_zstd(field: Option<&str>) -> bool {
    let mut codings = field.unwrap_or_default().split(',').map(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        (parts.next().unwrap_or_default(), parts)
    });
    let zstd = codings.find(|(name, _)| name.eq_ignore_ascii_case("zstd"));
    zstd.is_some_and(|(_, mut parameters)| match (parameters.next(), parameters.next()) {
        (None, _) => true,
        (Some(weight), None) => weight.split_once('=').is_some_and(|(name, value)| {
            name.trim().eq_ignore_ascii_case("q") && is_positive_weight(value.trim())
        }),
        (Some(_), Some(_)) => false,
    })
}

/// Whether `text` is a *qvalue* above 0: at most 1, with at most three digits after the point (RFC
/// 9110, section 12.4.2).
fn is_positive_weight(text: &str) -> bool {
    let (whole, digits) = text.split_once('.').unwrap_or((text, ""));
    let is_zero = digits.bytes().all(|b| b == b'0');
    let is_number = digits.len() <= 3 && digits.bytes().all(|b| b.is_ascii_digit());
    match whole {
        "0" => is_number && !is_zero,
        "1" => is_zero && is_number,
        _ => false,
    }
}

/// Compresses the bytes written to it into the chunks of a response. It holds about 1.4 MiB.
pub(super) struct Compressor<'a, 'e> {
    encoder: Encoder<'static>,
    buffer: Box<[u8]>,
    exchange: &'a mut Exchange<'e>,
}

impl<'a, 'e> Compressor<'a, 'e> {
    /// Creates a compressor for exactly `len` bytes, into the chunked response that `exchange` has
    /// begun.
    ///
    /// # Errors
    /// zstd cannot allocate its memory.
    pub(super) fn new(exchange: &'a mut Exchange<'e>, len: u64) -> io::Result<Self> {
        let mut encoder = Encoder::new(LEVEL)?;
        encoder.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        // With the size, small NARs take less memory, and a different number of bytes is an error.
        encoder.set_pledged_src_size(Some(len))?;
        Ok(Compressor { encoder, buffer: vec![0; CCtx::out_size()].into_boxed_slice(), exchange })
    }

    /// Ends the zstd stream and the response. Without this call the response stays incomplete.
    /// Blocks while the socket takes no bytes, for at most the write timeout.
    ///
    /// # Errors
    /// The socket fails, or the number of bytes written differs from `len`.
    pub(super) fn finish(mut self) -> io::Result<()> {
        loop {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            let left = self.encoder.finish(&mut output, true)?;
            let len = output.pos();
            self.exchange.chunk(&self.buffer[..len], left == 0)?;
            if left == 0 {
                return Ok(());
            }
        }
    }
}

impl Write for Compressor<'_, '_> {
    /// Takes all of the piece. Compressed bytes are sent at once, so that the client sees progress.
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let mut input = InBuffer::around(piece);
        while input.pos() < piece.len() {
            let mut output = OutBuffer::around(&mut self.buffer[..]);
            self.encoder.run(&mut input, &mut output)?;
            let len = output.pos();
            self.exchange.chunk(&self.buffer[..len], false)?;
        }
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The default methods copy a file's bytes, because the kernel cannot compress them.
impl NarSink for Compressor<'_, '_> {}

#[cfg(test)]
mod tests {
    use super::super::stream::ConnectionStream;
    use super::*;
    use crate::http::body::RequestBody;
    use std::io::Read;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::thread;

    #[test]
    fn zstd_is_accepted_only_by_name_with_positive_weight() {
        for field in [
            "zstd",
            "ZSTD",
            "gzip, zstd",
            "gzip;q=0.5 ,\tzstd ; Q=0.001",
            "zstd;q=1.000",
            "*;q=0, zstd",
        ] {
            assert!(accepts_zstd(Some(field)), "{field}");
        }
        for field in [
            "",
            "*",
            "gzip",
            "identity",
            "xzstd",
            "zstd2",
            "zstd;q=0",
            "zstd;q=0.",
            "zstd;q=0.000",
            "zstd; q = 0.0",
            "zstd;q=0.0000",
            "zstd;q=0.0001",
            "zstd;q=1.001",
            "zstd;q=2",
            "zstd;q=-1",
            "zstd;q=",
            "zstd;q",
            "zstd;",
            "zstd;level=3",
            "zstd;q=1;q=0",
            "zstd;q=0, zstd",
            "z std",
            "zstd q=1",
            ";zstd",
        ] {
            assert!(!accepts_zstd(Some(field)), "{field}");
        }
        assert!(!accepts_zstd(None));
    }

    const NO_FIELDS: [(&str, &str); 0] = [];

    /// Returns all that `write` sends, head included.
    fn sent(write: impl FnOnce(&mut Exchange<'_>) + Send) -> Vec<u8> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut reader = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let writer = ConnectionStream::new(listener.accept().unwrap().0, false);
        thread::scope(|scope| {
            scope.spawn(move || {
                write(&mut Exchange::new(&writer, false, false, RequestBody::none(&writer)));
                writer.socket().shutdown(Shutdown::Write).unwrap();
            });
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    /// Returns the body of a chunked response and the number of its chunks; `None` if the last
    /// chunk is missing.
    fn unchunk(response: &[u8]) -> Option<(Vec<u8>, usize)> {
        let head = response.windows(4).position(|w| w == b"\r\n\r\n")? + 4;
        let (mut rest, mut body, mut count) = (&response[head..], Vec::new(), 0);
        loop {
            let line = rest.windows(2).position(|w| w == b"\r\n")?;
            let len =
                usize::from_str_radix(std::str::from_utf8(&rest[..line]).unwrap(), 16).unwrap();
            rest = &rest[line + 2..];
            body.extend_from_slice(rest.get(..len)?);
            assert_eq!(&rest[len..len + 2], b"\r\n");
            rest = &rest[len + 2..];
            if len == 0 {
                assert!(rest.is_empty());
                return Some((body, count));
            }
            count += 1;
        }
    }

    /// Bytes that compress a little.
    fn text(len: usize) -> Vec<u8> {
        (0u64..)
            .flat_map(|n| format!("{:x}\n", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)).into_bytes())
            .take(len)
            .collect()
    }

    #[test]
    fn compressed_body_decompresses_for_any_piece_size() {
        for (len, piece) in
            [(1, 1), (1000, 7), (300_000, 262_144), (5_000_000, 262_144), (5_000_000, 5_000_000)]
        {
            let plain = text(len);
            let response = sent(|exchange| {
                exchange.begin_chunked(200, &NO_FIELDS).unwrap();
                let mut out = Compressor::new(exchange, len as u64).unwrap();
                plain.chunks(piece).for_each(|piece| out.write_all(piece).unwrap());
                out.finish().unwrap();
                assert!(exchange.is_whole());
            });
            let (body, count) = unchunk(&response).unwrap();
            assert!(body.len() < len + 20);
            assert!(count <= len / 65536 + 2, "{count} chunks of {len} bytes");
            assert!(zstd::decode_all(&body[..]).unwrap() == plain);
        }
    }

    #[test]
    fn unfinished_or_wrongly_sized_body_is_incomplete() {
        let plain = text(1 << 20);
        for promised in [plain.len(), plain.len() + 1] {
            let response = sent(|exchange| {
                exchange.begin_chunked(200, &NO_FIELDS).unwrap();
                let mut out = Compressor::new(exchange, promised as u64).unwrap();
                out.write_all(&plain).unwrap();
                if promised > plain.len() {
                    out.finish().unwrap_err();
                }
                assert!(!exchange.is_whole());
            });
            assert_eq!(unchunk(&response), None);
        }
        sent(|exchange| {
            exchange.begin_chunked(200, &NO_FIELDS).unwrap();
            let mut out = Compressor::new(exchange, plain.len() as u64 - 1).unwrap();
            assert!(out.write_all(&plain).and_then(|()| out.finish()).is_err());
            assert!(!exchange.is_whole());
        });
    }
}
