//! The last lookups of this machine's Nix, with the reasons of misses.

use super::Network;
use super::counters::Histogram;
use crate::lock::Mutex;
use crate::nix::HashPart;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

/// Maximum number of lookups that are kept; the oldest are dropped.
pub const MAX_LOOKUPS: usize = 200;

/// Maximum length of a peer's text in a reason, in bytes; the rest is cut off.
const MAX_REASON: usize = 200;

/// A finished lookup.
#[derive(Debug, Clone)]
pub struct LookupRecord {
    /// Time of its end.
    pub at: SystemTime,
    /// Hash part that was looked up.
    pub hash_part: HashPart,
    /// Duration of the lookup.
    pub elapsed: Duration,
    /// The peer that has the path, or the reason of the miss.
    pub result: Result<HitRecord, MissReason>,
}

/// A peer that has the path.
#[derive(Debug, Clone)]
pub struct HitRecord {
    /// Name of the store path, without its hash part.
    pub name: Box<str>,
    /// Network of the peer.
    pub network: Network,
    /// Address of the peer's HTTP server.
    pub peer: SocketAddr,
}

/// Why a lookup missed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MissReason {
    /// No peer is known.
    Alone {
        /// Whether trackers are configured and none is reached.
        no_tracker: bool,
    },
    /// Too many lookups ran at once, so no peer was asked.
    Busy,
    /// All peers that were asked do not have the path.
    Nobody {
        /// Number of peers that were asked.
        asked: u32,
    },
    /// Some peers did not answer in time, and the others do not have the path.
    Silent {
        /// Number of peers that were asked.
        asked: u32,
        /// Number of peers that did not answer.
        silent: u32,
    },
    /// A peer has the path, but no trusted key signed it.
    Untrusted(SocketAddr),
    /// A peer said that it has the path, but gave nothing usable. Contains the reason.
    Failed(SocketAddr, Box<str>),
    /// A peer has the path, but is avoided now.
    Avoided(SocketAddr),
}

impl MissReason {
    /// All codes, in the order of the variants.
    pub const CODES: [&'static str; 7] =
        ["alone", "busy", "nobody", "silent", "untrusted", "failed", "avoided"];

    /// Reason that a peer gave nothing usable. Cuts `reason` after 200 bytes.
    pub fn failed(peer: SocketAddr, reason: &dyn fmt::Display) -> MissReason {
        MissReason::Failed(peer, short(reason))
    }

    /// Index of the code in [`MissReason::CODES`].
    fn kind(&self) -> usize {
        match self {
            MissReason::Alone { .. } => 0,
            MissReason::Busy => 1,
            MissReason::Nobody { .. } => 2,
            MissReason::Silent { .. } => 3,
            MissReason::Untrusted(_) => 4,
            MissReason::Failed(..) => 5,
            MissReason::Avoided(_) => 6,
        }
    }

    /// Code in JSON and metrics.
    pub fn code(&self) -> &'static str {
        MissReason::CODES[self.kind()]
    }
}

impl fmt::Display for MissReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let peers = |count: &u32| if *count == 1 { "peer was" } else { "peers were" };
        match self {
            MissReason::Alone { no_tracker: false } => f.write_str("no peer is known"),
            MissReason::Alone { no_tracker: true } => {
                f.write_str("no tracker is reached, and no other peer is known")
            }
            MissReason::Busy => f.write_str("too many lookups at once, so nobody was asked"),
            MissReason::Nobody { asked } => {
                write!(f, "{asked} {} asked, none has it", peers(asked))
            }
            MissReason::Silent { asked, silent } => {
                write!(
                    f,
                    "{asked} {} asked, {silent} did not answer in time, none said it has it",
                    peers(asked)
                )
            }
            MissReason::Untrusted(peer) => {
                write!(f, "{peer} has it, but no key of --trusted-public-key signed it")
            }
            MissReason::Failed(peer, reason) => write!(f, "{peer} said it has it, but: {reason}"),
            MissReason::Avoided(peer) => write!(f, "{peer} has it, but is avoided after failures"),
        }
    }
}

/// Cuts a text from another machine after 200 bytes and marks the cut with `…`.
pub fn short(text: &dyn fmt::Display) -> Box<str> {
    let mut text = text.to_string();
    if text.len() > MAX_REASON {
        let end = (0..=MAX_REASON).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text.into()
}

/// Statistics of the lookups of this machine's Nix.
#[derive(Default)]
pub struct LookupStats {
    /// Durations of lookups that hit.
    pub hit_time: Histogram,
    /// Durations of lookups that missed.
    pub miss_time: Histogram,
    /// Number of misses for each of [`MissReason::CODES`].
    misses: [AtomicU64; MissReason::CODES.len()],
    /// The last lookups, the latest last.
    recent: Mutex<VecDeque<LookupRecord>>,
}

impl LookupStats {
    /// Records a lookup that has just ended.
    pub(super) fn record(
        &self,
        hash_part: HashPart,
        result: Result<HitRecord, MissReason>,
        elapsed: Duration,
    ) {
        match &result {
            Ok(_) => self.hit_time.observe(elapsed),
            Err(miss) => {
                self.misses[miss.kind()].fetch_add(1, Ordering::Relaxed);
                self.miss_time.observe(elapsed);
            }
        }
        let lookup = LookupRecord { at: SystemTime::now(), hash_part, elapsed, result };
        let mut recent = self.recent.lock();
        if recent.len() >= MAX_LOOKUPS {
            recent.pop_front();
        }
        recent.push_back(lookup);
    }

    /// Number of misses for each code.
    pub fn misses(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let counts = self.misses.iter().map(|count| count.load(Ordering::Relaxed));
        MissReason::CODES.into_iter().zip(counts)
    }

    /// The last lookups, at most [`MAX_LOOKUPS`], the latest first.
    pub fn recent(&self) -> Vec<LookupRecord> {
        self.recent.lock().iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_has_a_code_and_a_text() {
        let peer = SocketAddr::from(([10, 0, 0, 1], 12304));
        let all = [
            MissReason::Alone { no_tracker: false },
            MissReason::Busy,
            MissReason::Nobody { asked: 1 },
            MissReason::Silent { asked: 3, silent: 1 },
            MissReason::Untrusted(peer),
            MissReason::failed(peer, &"status 500"),
            MissReason::Avoided(peer),
        ];
        assert_eq!(all.each_ref().map(MissReason::code), MissReason::CODES);
        assert_eq!(all[2].to_string(), "1 peer was asked, none has it");
        assert!(
            all[5].to_string().contains("10.0.0.1:12304")
                && all[5].to_string().contains("status 500")
        );
    }

    #[test]
    fn long_text_of_a_peer_is_cut() {
        for text in ["x".repeat(10_000), "ä".repeat(10_000)] {
            let cut = short(&text);
            assert!(cut.len() <= MAX_REASON + 3 && cut.ends_with('…'), "{}", cut.len());
        }
        assert_eq!(&*short(&"short"), "short");
    }

    #[test]
    fn recent_lookups_are_bounded_and_the_latest_first() {
        let lookups = LookupStats::default();
        let hash_part = HashPart::ZERO;
        for asked in 0..1000 {
            lookups.record(hash_part, Err(MissReason::Nobody { asked }), Duration::ZERO);
        }
        let all = lookups.recent();
        assert_eq!(all.len(), MAX_LOOKUPS);
        assert_eq!(all[0].result.as_ref().unwrap_err(), &MissReason::Nobody { asked: 999 });
    }
}
