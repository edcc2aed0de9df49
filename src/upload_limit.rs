//! `--upload-limit`: limits the rate at which all connections together send to other machines.
//!
//! A sender reserves the time that its bytes take at the rate, after all earlier reservations, and
//! waits until that time begins. So connections take turns, piece by piece.

use crate::lock::Mutex;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

/// Least rate of a stream, in bytes per second. Peers abandon a slower one, so only as many streams
/// are admitted as get this rate.
const MIN_RATE: u64 = 64 * 1024;

/// Highest rate that can be configured, in bytes per second. It exceeds every link and prevents
/// overflows.
const MAX_RATE: u64 = 1 << 40;

/// Time that a piece takes at the configured rate. It is short, so that connections wait little for
/// one another.
const PIECE_TIME: Duration = Duration::from_millis(20);

/// Least and greatest size of a piece, in bytes. Smaller pieces cost too much processor time.
const PIECE_BYTES: (u64, u64) = (4096, 256 * 1024);

/// Unused time that senders can make up for. Without it, each delay of a thread would lower the
/// rate.
const BURST: Duration = Duration::from_millis(100);

/// Longest wait for a piece. Beyond it, the reservation fails and the connection is cut, as may
/// happen with 1,000 connections that all send.
const MAX_WAIT: Duration = Duration::from_secs(20);

/// An upload rate limit and its reservations.
pub struct UploadLimit {
    bytes_per_second: u64,
    /// End of the last reservation.
    reserved_until: Mutex<Instant>,
}

impl UploadLimit {
    /// Creates a limit of `bytes_per_second`; 0 counts as 1.
    pub fn new(bytes_per_second: u64) -> Self {
        UploadLimit {
            bytes_per_second: bytes_per_second.max(1),
            reserved_until: Mutex::new(Instant::now()),
        }
    }

    /// Parses a rate in bytes per second: digits, optionally followed by `K`, `M` or `G` (powers of
    /// 1,024) in either case.
    ///
    /// # Errors
    /// A message for the user if the text has another form, or the rate is not from 64K to 1024G.
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
            Some(rate) if (MIN_RATE..=MAX_RATE).contains(&rate) => Ok(rate),
            Some(_) => Err("not from 64K to 1024G bytes a second".into()),
            None => Err("not a number of bytes a second, as 65536, 500K, 2M or 1G".into()),
        }
    }

    /// Number of streams that get 64 KiB/s each; at least one.
    pub fn streams(&self) -> usize {
        usize::try_from((self.bytes_per_second / MIN_RATE).max(1)).unwrap_or(usize::MAX)
    }

    /// Bytes to send between two calls of [`UploadLimit::take`]: those of 20 ms, from 4 to 256 KiB.
    pub fn piece(&self) -> usize {
        let bytes = self.bytes_per_second * PIECE_TIME.as_millis() as u64 / 1000;
        bytes.clamp(PIECE_BYTES.0, PIECE_BYTES.1) as usize
    }

    /// Waits until `bytes` more bytes may be sent, for at most 20 s.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`], without waiting, if the wait would be longer than 20 s.
    pub fn take(&self, bytes: usize) -> io::Result<()> {
        let wait = self.reserve(bytes as u64, Instant::now()).ok_or(io::ErrorKind::TimedOut)?;
        if !wait.is_zero() {
            thread::sleep(wait);
        }
        Ok(())
    }

    /// Reserves `bytes` bytes and returns the wait from `now`; `None` without a reservation if the
    /// wait would exceed [`MAX_WAIT`].
    fn reserve(&self, bytes: u64, now: Instant) -> Option<Duration> {
        let mut reserved_until = self.reserved_until.lock();
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
    fn rate_is_parsed_with_its_unit() {
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
    fn bytes_sent_match_the_rate() {
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
    fn unused_time_is_made_up_for_up_to_burst() {
        let limit = UploadLimit::new(1 << 20);
        let late = Instant::now() + Duration::from_secs(3600);
        assert_eq!(limit.reserve(1 << 20, late), Some(Duration::ZERO));
        let wait = limit.reserve(1, late).unwrap();
        assert_eq!(wait, Duration::from_secs(1) - BURST);
    }

    #[test]
    fn reservation_beyond_longest_wait_is_refused_and_takes_nothing() {
        let limit = UploadLimit::new(MIN_RATE);
        let now = Instant::now() + Duration::from_secs(1);
        assert!(limit.reserve(30 * MIN_RATE, now).is_some());
        assert_eq!(limit.reserve(MIN_RATE, now), None);
        assert_eq!(limit.reserve(MIN_RATE, now + Duration::from_secs(31)), Some(Duration::ZERO));
    }

    #[test]
    fn streams_get_at_least_the_least_rate() {
        let streams = |rate| UploadLimit::new(rate).streams();
        assert_eq!([streams(1), streams(MIN_RATE), streams(10 * MIN_RATE)], [1, 1, 10]);
    }
}
