//! `--upload-limit`: how much is sent to other machines in a second, by all connections together.
//!
//! Whoever sends reserves the time that its bytes take at that rate, behind all that was reserved
//! before, and waits for the beginning of it. So connections take turns, piece by piece.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Least rate of a stream, in bytes a second: peers leave a slower one. Only as many streams are
/// admitted as get it.
const LEAST_RATE: u64 = 64 * 1024;

/// Highest rate that can be given, in bytes a second. It is far above any link, and keeps the
/// arithmetic from overflowing.
const MAX_RATE: u64 = 1 << 40;

/// Time that a piece takes at the rate: short, so that connections that take turns wait little for
/// one another.
const PIECE_TIME: Duration = Duration::from_millis(20);

/// Least and most bytes of a piece. Smaller ones cost more processor time than they are worth.
const PIECE_BYTES: (u64, u64) = (4096, 256 * 1024);

/// Unused time that may be made up for. Without it every delay of a thread would lower the rate.
const BURST: Duration = Duration::from_millis(100);

/// Longest wait of one piece. With 1,000 connections that all have a piece to send, the last ones
/// wait longer, and are cut.
const MAX_WAIT: Duration = Duration::from_secs(20);

/// The limit, and what of it is taken.
pub struct UploadLimit {
    bytes_per_second: u64,
    /// When all that was reserved will have been sent.
    reserved_until: Mutex<Instant>,
}

impl UploadLimit {
    /// That many bytes a second.
    pub fn new(bytes_per_second: u64) -> Self {
        UploadLimit {
            bytes_per_second: bytes_per_second.max(1),
            reserved_until: Mutex::new(Instant::now()),
        }
    }

    /// Reads a rate in bytes a second: digits, and `K`, `M` or `G` (powers of 1,024) if there are
    /// many.
    ///
    /// # Errors
    /// Anything else, and rates that are too low for one stream or higher than any link.
    pub fn parse_rate(text: &str) -> Result<u64, String> {
        let (digits, unit) = match text.char_indices().last() {
            Some((at, 'K' | 'k')) => (&text[..at], 1 << 10),
            Some((at, 'M' | 'm')) => (&text[..at], 1 << 20),
            Some((at, 'G' | 'g')) => (&text[..at], 1 << 30),
            _ => (text, 1),
        };
        let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let rate = digits
            .parse::<u64>()
            .ok()
            .filter(|_| is_number)
            .and_then(|number| number.checked_mul(unit));
        match rate {
            Some(rate) if (LEAST_RATE..=MAX_RATE).contains(&rate) => Ok(rate),
            Some(_) => Err("not from 64K to 1024G bytes a second".into()),
            None => Err("not a number of bytes a second, as 65536, 500K, 2M or 1G".into()),
        }
    }

    /// Streams that get `LEAST_RATE` each; at least one.
    pub fn streams(&self) -> usize {
        usize::try_from((self.bytes_per_second / LEAST_RATE).max(1)).unwrap_or(usize::MAX)
    }

    /// Bytes to send at once, between two calls of [`UploadLimit::take`].
    pub fn piece(&self) -> usize {
        let bytes = self.bytes_per_second * PIECE_TIME.as_millis() as u64 / 1000;
        bytes.clamp(PIECE_BYTES.0, PIECE_BYTES.1) as usize
    }

    /// Waits until so many bytes may be sent.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if that would take longer than 20 s.
    pub fn take(&self, bytes: usize) -> io::Result<()> {
        let wait = self.reserve(bytes as u64, Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        if !wait.is_zero() {
            thread::sleep(wait);
        }
        Ok(())
    }

    /// How long to wait at `now` before so many bytes are sent; `None` if that is too long.
    fn reserve(&self, bytes: u64, now: Instant) -> Option<Duration> {
        let mut reserved_until = self.reserved_until.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = (*reserved_until).max(now.checked_sub(BURST).unwrap_or(now));
        let wait = begin.saturating_duration_since(now);
        if wait > MAX_WAIT {
            return None;
        }
        *reserved_until =
            begin + Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        Some(wait)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_with_their_units() {
        for (text, rate) in [("65536", 65536), ("500K", 512_000), ("2m", 2 << 20), ("1G", 1 << 30)]
        {
            assert_eq!(UploadLimit::parse_rate(text), Ok(rate));
        }
        for text in [
            "",
            "K",
            "-1M",
            "+1M",
            "1.5M",
            "2MB",
            "63K",
            "0",
            "1025G",
            "99999999999999999999G",
            "ü",
        ] {
            assert!(UploadLimit::parse_rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_sent_in_a_time_are_what_the_rate_allows() {
        let rate = 1 << 20;
        let limit = UploadLimit::new(rate);
        let start = Instant::now() + Duration::from_secs(1);
        let (mut now, mut sent) = (start, 0);
        while now < start + Duration::from_secs(10) {
            let bytes = limit.piece() as u64;
            now += limit.reserve(bytes, now).unwrap();
            sent += bytes;
        }
        let allowed = 10 * rate;
        assert!(sent.abs_diff(allowed) < allowed / 50, "{sent} of {allowed}");
    }

    #[test]
    fn unused_time_is_not_saved_up() {
        let limit = UploadLimit::new(1 << 20);
        let late = Instant::now() + Duration::from_secs(3600);
        assert_eq!(limit.reserve(1 << 20, late), Some(Duration::ZERO));
        let wait = limit.reserve(1, late).unwrap();
        assert_eq!(wait, Duration::from_secs(1) - BURST);
    }

    #[test]
    fn waits_are_bounded_and_a_refused_piece_takes_nothing() {
        let limit = UploadLimit::new(LEAST_RATE);
        let now = Instant::now() + Duration::from_secs(1);
        assert!(limit.reserve(30 * LEAST_RATE, now).is_some());
        assert_eq!(limit.reserve(LEAST_RATE, now), None);
        assert_eq!(limit.reserve(LEAST_RATE, now + Duration::from_secs(31)), Some(Duration::ZERO));
    }

    #[test]
    fn as_many_streams_as_get_the_least_rate() {
        let streams = |rate| UploadLimit::new(rate).streams();
        assert_eq!([streams(1), streams(LEAST_RATE), streams(10 * LEAST_RATE)], [1, 1, 10]);
    }
}
