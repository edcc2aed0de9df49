//! The last lookups of this machine's Nix, and why those that missed did.

use super::Network;
use crate::nix::HashPart;
use std::collections::VecDeque;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

/// Lookups remembered.
pub const MAX_LOOKUPS: usize = 200;

/// A reason has no more bytes than this of what a peer said.
const MAX_REASON: usize = 200;

/// One lookup.
#[derive(Debug, Clone)]
pub struct LookupRecord {
    /// When it was over.
    pub at: SystemTime,
    /// What was looked for.
    pub hash_part: HashPart,
    /// How long it took.
    pub took: Duration,
    /// What came of it.
    pub result: Result<HitRecord, MissReason>,
}

/// Who has it.
#[derive(Debug, Clone)]
pub struct HitRecord {
    /// The name of the store path, without its hash part.
    pub name: Box<str>,
    /// Where the peer is.
    pub network: Network,
    /// Its HTTP server.
    pub peer: SocketAddr,
}

/// Why nothing was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MissReason {
    /// There is nobody to ask.
    Alone {
        /// Trackers are set, and none of them is there.
        no_tracker: bool,
    },
    /// Too many lookups at once: nobody was asked.
    Busy,
    /// All said no.
    Nobody {
        /// So many.
        asked: u32,
    },
    /// Not all of them said anything in time.
    Silent {
        /// Who were asked.
        asked: u32,
        /// Who did not answer.
        silent: u32,
    },
    /// A peer has it, and no trusted key signed it.
    Untrusted(SocketAddr),
    /// A peer has it, and gave nothing that could be used.
    Failed(SocketAddr, Box<str>),
    /// A peer has it that is avoided now.
    Avoided(SocketAddr),
}

impl MissReason {
    /// All codes.
    pub const CODES: [&'static str; 7] =
        ["alone", "busy", "nobody", "silent", "untrusted", "failed", "avoided"];

    /// A peer gave nothing usable; of what it said, no more than is read.
    pub fn failed(peer: SocketAddr, reason: &dyn fmt::Display) -> MissReason {
        MissReason::Failed(peer, short(reason))
    }

    /// The place of its code among all.
    pub(super) fn kind(&self) -> usize {
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

    /// One word for programs.
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

/// A text of others, as much of it as people read.
pub fn short(text: &dyn fmt::Display) -> Box<str> {
    let mut text = text.to_string();
    if text.len() > MAX_REASON {
        let end = (0..=MAX_REASON).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default();
        text.truncate(end);
        text.push('…');
    }
    text.into()
}

/// The last ones.
#[derive(Default)]
pub(super) struct RecentLookups(VecDeque<LookupRecord>);

impl RecentLookups {
    pub fn add(&mut self, looked: LookupRecord) {
        if self.0.len() >= MAX_LOOKUPS {
            self.0.pop_front();
        }
        self.0.push_back(looked);
    }

    /// The latest first.
    pub fn all(&self) -> Vec<LookupRecord> {
        self.0.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_a_code_and_a_sentence() {
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
    fn what_a_peer_says_is_cut() {
        for text in ["x".repeat(10_000), "ä".repeat(10_000)] {
            let cut = short(&text);
            assert!(cut.len() <= MAX_REASON + 3 && cut.ends_with('…'), "{}", cut.len());
        }
        assert_eq!(&*short(&"short"), "short");
    }

    #[test]
    fn the_last_ones_are_kept_the_latest_first() {
        let mut lookups = RecentLookups::default();
        let hash_part = HashPart::parse(&[b'0'; 32]).unwrap();
        for asked in 0..1000 {
            let result = Err(MissReason::Nobody { asked });
            lookups.add(LookupRecord {
                at: SystemTime::UNIX_EPOCH,
                hash_part,
                took: Duration::ZERO,
                result,
            });
        }
        let all = lookups.all();
        assert_eq!(all.len(), MAX_LOOKUPS);
        assert_eq!(all[0].result.as_ref().unwrap_err(), &MissReason::Nobody { asked: 999 });
    }
}
