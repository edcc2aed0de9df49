//! Chooses the peer that a NAR is fetched from. The module does no I/O and has no clock; the caller
//! passes what is known of the peers.
//!
//! The choice is the peer from which the NAR is expected to be complete first, given the peer's
//! pace and the bytes that this node already fetches from it. A closure with several equal holders
//! therefore uses all their links. A peer with unknown pace counts as fast as the fastest known
//! one, so that its pace is measured.

use super::health::{Eligibility, PeerHealth, PeerKey};
use super::pace::PeerLoad;
use std::cmp::Ordering;
use std::time::{Duration, Instant};

/// Assumed pace, in bytes per second, while no peer's pace is known: a LAN of 100 Mbit/s.
const DEFAULT_PACE: f64 = 12.5e6;

/// Shortest time that a NAR waits for its peer before it may move to another one because of the
/// pace.
pub const MIN_WAIT: Duration = Duration::from_millis(200);
/// Upper bound of the cost of a move: a new connection, and files that the old peer opened in vain.
const MOVE_COST: Duration = Duration::from_millis(100);
/// Factor by which another source must be faster before a NAR moves to it.
const FASTER_FACTOR: f64 = 2.0;
/// Remaining time above which a NAR may move to a peer with unknown pace.
const MIN_TIME_FOR_UNKNOWN: Duration = Duration::from_secs(2);
/// Transfer time above which a NAR is too long for a trial: an unknown peer then counts as half as
/// fast.
const MAX_TRIAL_TIME: Duration = Duration::from_secs(1);

/// Reliability of a peer. Lower values are preferred.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HealthRank {
    /// Nothing is known against the peer.
    Good,
    /// The peer failed or hung recently.
    Doubtful,
    /// The peer is in a pause after a failure.
    LastResort,
}

impl HealthRank {
    /// Rank of a peer at `now`. `None` if it must not be asked.
    pub fn of(peer: impl Into<PeerKey>, health: &PeerHealth, now: Instant) -> Option<HealthRank> {
        let peer = peer.into();
        Some(match health.eligibility(peer, now) {
            Eligibility::Now if health.is_doubtful(peer) => HealthRank::Doubtful,
            Eligibility::Now => HealthRank::Good,
            Eligibility::Last => HealthRank::LastResort,
            Eligibility::Never => return None,
        })
    }
}

/// What the choice knows about one holder of the NAR.
#[derive(Debug, Clone, Copy)]
pub struct HolderFacts {
    /// Reliability of the holder.
    pub health: HealthRank,
    /// Pace of the holder and the NARs in progress from it.
    pub load: PeerLoad,
}

/// Result of [`choose`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Index of the chosen holder in the given slice.
    pub index: usize,
    /// Expected time until the NAR is complete.
    pub expected: Duration,
}

/// Chooses the best holder for `bytes` of a NAR; `None` if there is no holder.
pub fn choose(holders: &[HolderFacts], bytes: u64) -> Option<Choice> {
    let usual = usual_pace(holders);
    // A peer without a complete NAR yet gets one NAR at a time, because it may hang.
    let is_on_trial = |holder: &HolderFacts| !holder.load.is_proven && holder.load.streams > 0;
    // A NAR of several seconds is no trial: an unknown peer gets it only if the known ones are
    // busy.
    let is_long = bytes as f64 / usual > MAX_TRIAL_TIME.as_secs_f64();
    let trial_factor = |holder: &HolderFacts| {
        if is_long && holder.load.pace.known.is_none() { FASTER_FACTOR } else { 1.0 }
    };
    let key = |holder: &HolderFacts| {
        (
            holder.health,
            is_on_trial(holder),
            trial_factor(holder) * expected(&holder.load, bytes, usual),
            holder.load.chosen,
        )
    };
    let order = |a: &(usize, &HolderFacts), b: &(usize, &HolderFacts)| {
        key(a.1).partial_cmp(&key(b.1)).unwrap_or(Ordering::Equal)
    };
    let (index, best) = holders.iter().enumerate().min_by(order)?;
    Some(Choice { index, expected: duration(expected(&best.load, bytes, usual)) })
}

/// Returns the index of a holder that is at least twice as fast as the peer that sends the NAR, if
/// there is one. `current` is the load of the sending peer including this NAR, `rest` the missing
/// bytes of the NAR, and `waited` the time that the NAR has waited for the peer so far.
pub fn faster(
    current: &PeerLoad,
    waited: Duration,
    rest: u64,
    others: &[HolderFacts],
) -> Option<usize> {
    if waited < MIN_WAIT {
        return None;
    }
    // The samples of a fast peer are too short to judge, so its smoothed pace counts between them.
    let pace = if current.pace.waited < MIN_WAIT {
        current.pace.lasting?
    } else {
        // The lower of the current sample's pace and the known pace.
        current.pace.known.unwrap_or(f64::INFINITY).min(current.pace.measured)
    };
    let pace = pace.max(1.0);
    let time = work_left(current, rest) / pace;
    let usual = usual_pace(others);
    let is_better = |holder: &HolderFacts| {
        let holder_pace = holder.load.pace.known.unwrap_or(usual.min(holder.load.pace.upper_bound));
        let is_sure = holder.load.pace.known.is_some() || time > MIN_TIME_FOR_UNKNOWN.as_secs_f64();
        holder.health == HealthRank::Good
            && is_sure
            && holder_pace >= FASTER_FACTOR * pace
            && time >= FASTER_FACTOR * expected(&holder.load, rest, usual) + MOVE_COST.as_secs_f64()
    };
    let better: Vec<usize> = (0..others.len()).filter(|index| is_better(&others[*index])).collect();
    let holders: Vec<HolderFacts> = better.iter().map(|index| others[*index]).collect();
    choose(&holders, rest).map(|choice| better[choice.index])
}

/// Estimates the time for the last `rest` bytes of a NAR that is part of `load`; `None` while the
/// pace is unknown. `own` is the lasting pace of this NAR alone, if it is known. The greater of
/// `own` and the peer's lasting pace counts, because small NARs from a Wi-Fi card in power-save
/// mode say nothing about a large one.
pub fn time_left(load: &PeerLoad, own: Option<f64>, rest: u64) -> Option<Duration> {
    let pace = load.after_begin.lasting.into_iter().chain(own).reduce(f64::max)?;
    Some(duration(work_left(load, rest) / pace.max(1.0)))
}

/// Bytes that must arrive before the last `rest` bytes of a NAR in `load` have arrived. Streams
/// share the link equally, so the NAR waits for at most `rest` bytes of each other stream.
fn work_left(load: &PeerLoad, rest: u64) -> f64 {
    load.outstanding.min(rest.saturating_mul(load.streams.max(1).into())) as f64
}

/// Expected seconds until `bytes` more have arrived, in parallel to the NARs in progress.
fn expected(load: &PeerLoad, bytes: u64, usual: f64) -> f64 {
    let pace = load.pace.known.unwrap_or(usual.min(load.pace.upper_bound)).max(1.0);
    work_left(&load.with(bytes), bytes) / pace
}

fn usual_pace(holders: &[HolderFacts]) -> f64 {
    holders
        .iter()
        .filter_map(|holder| holder.load.pace.known)
        .reduce(f64::max)
        .unwrap_or(DEFAULT_PACE)
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

#[cfg(test)]
mod tests {
    use super::super::pace::PaceEstimate;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn holding(known: Option<f64>) -> HolderFacts {
        let pace = PaceEstimate {
            known,
            lasting: known,
            measured: known.unwrap_or(0.0),
            upper_bound: f64::INFINITY,
            waited: Duration::ZERO,
        };
        let load = PeerLoad {
            streams: 0,
            outstanding: 0,
            pace,
            after_begin: pace,
            chosen: 0,
            is_proven: true,
        };
        HolderFacts { health: HealthRank::Good, load }
    }

    /// Chooses a holder for `nars` NARs. Each stays in progress while the next is chosen.
    fn spread(mut holders: Vec<HolderFacts>, nars: u32, size: u64) -> Vec<u32> {
        for turn in 1..=nars {
            let index = choose(&holders, size).unwrap().index;
            let load = &mut holders[index].load;
            (load.streams, load.outstanding, load.chosen) =
                (load.streams + 1, load.outstanding + size, turn.into());
        }
        holders.iter().map(|holder| holder.load.streams).collect()
    }

    #[test]
    fn equal_holders_get_equal_share() {
        assert_eq!(spread(vec![holding(None); 8], 16, 25_000), [2; 8]);
        assert_eq!(spread(vec![holding(Some(2.5e6)); 4], 16, MIB), [4; 4]);
    }

    #[test]
    fn unequal_holders_get_share_by_pace() {
        let parts = spread(vec![holding(Some(10e6)), holding(Some(2.5e6))], 20, MIB);
        assert_eq!(parts, [16, 4]);
        // A very slow peer gets nothing.
        assert_eq!(spread(vec![holding(Some(9e3)), holding(Some(10e6))], 16, 25_000), [0, 16]);
    }

    #[test]
    fn long_nar_is_not_given_to_unknown_holder() {
        let holders = || vec![holding(None), holding(Some(10e6))];
        assert_eq!(spread(holders(), 1, 64 * MIB), [0, 1]);
        assert_eq!(spread(holders(), 1, MIB), [1, 0]);
        // When the known peer is busy, the unknown one gets the second NAR.
        assert_eq!(spread(holders(), 3, 64 * MIB), [1, 2]);
        assert_eq!(spread(vec![holding(None); 2], 2, 64 * MIB), [1, 1]);
    }

    #[test]
    fn unknown_holder_is_tried_beside_known_one() {
        let parts = spread(vec![holding(Some(10e6)), holding(None)], 10, MIB);
        assert_eq!(parts, [5, 5]);
    }

    #[test]
    fn unproven_holder_gets_one_nar_at_a_time() {
        let mut claimant = holding(None);
        claimant.load.is_proven = false;
        assert_eq!(spread(vec![claimant, holding(Some(10e6))], 10, MIB), [1, 9]);
        assert_eq!(spread(vec![claimant], 3, MIB), [3]);
    }

    #[test]
    fn doubtful_holder_is_not_chosen_despite_faster_pace() {
        let mut doubtful = holding(Some(100e6));
        doubtful.health = HealthRank::Doubtful;
        assert_eq!(spread(vec![doubtful, holding(Some(1e6))], 4, MIB), [0, 4]);
        assert_eq!(choose(&[], 1), None);
    }

    #[test]
    fn small_nar_does_not_wait_for_large_one() {
        let mut busy = holding(Some(10e6));
        (busy.load.streams, busy.load.outstanding) = (1, 1 << 30);
        let choice = choose(&[busy], 25_000).unwrap();
        assert!(choice.expected < Duration::from_millis(6), "{choice:?}");
    }

    fn sending(measured: f64, waited: u64, rest: u64) -> PeerLoad {
        let pace = PaceEstimate {
            known: None,
            lasting: None,
            measured,
            upper_bound: f64::INFINITY,
            waited: Duration::from_millis(waited),
        };
        PeerLoad {
            streams: 1,
            outstanding: rest,
            pace,
            after_begin: pace,
            chosen: 0,
            is_proven: true,
        }
    }

    /// The holder to which a NAR moves that has waited long enough, at a pace of `measured`.
    fn moves(measured: f64, rest: u64, others: &[HolderFacts]) -> Option<usize> {
        faster(&sending(measured, 300, rest), MIN_WAIT, rest, others)
    }

    #[test]
    fn nar_moves_only_to_holder_twice_as_fast() {
        let moves = |others: &[HolderFacts]| moves(140e3, 20 * MIB, others);
        assert_eq!(moves(&[holding(Some(250e3)), holding(Some(10e6))]), Some(1));
        assert_eq!(moves(&[holding(Some(270e3))]), None);
        assert_eq!(moves(&[]), None);
        let mut doubtful = holding(Some(10e6));
        doubtful.health = HealthRank::Doubtful;
        assert_eq!(moves(&[doubtful]), None);
    }

    #[test]
    fn nar_does_not_move_early_or_for_small_gain() {
        // A Wi-Fi card that sleeps 100 ms has sent nothing yet.
        let others = [holding(Some(10e6))];
        let waited = Duration::from_millis(100);
        assert_eq!(faster(&sending(0.0, 100, MIB), waited, MIB, &others), None);
        // The rest arrives sooner than a new connection would.
        assert_eq!(moves(1e6, 50_000, &others), None);
        // Small NARs of a dripping peer are worth the move.
        assert_eq!(moves(9e3, 22_000, &others), Some(0));
    }

    /// The samples of 256 KiB take less than [`MIN_WAIT`].
    #[test]
    fn fast_peer_is_left_by_smoothed_pace() {
        let mut current = sending(0.0, 20, 640 * MIB);
        (current.pace.known, current.pace.lasting) = (Some(5e6), Some(5e6));
        let moves = |current: &PeerLoad, waited, to| {
            faster(current, Duration::from_millis(waited), 640 * MIB, &[holding(Some(to))])
        };
        assert_eq!(moves(&current, 200, 100e6), Some(0));
        assert_eq!(moves(&current, 199, 100e6), None);
        assert_eq!(moves(&current, 200, 9e6), None);
        // One stall of 150 ms.
        (current.pace.known, current.pace.waited) = (Some(1.7e6), Duration::from_millis(150));
        assert_eq!(moves(&current, 1000, 9e6), None);
        (current.pace.known, current.pace.lasting) = (None, None);
        assert_eq!(moves(&current, 1000, 100e6), None);
    }

    #[test]
    fn nar_moves_to_unknown_holder_only_if_rest_takes_long() {
        assert_eq!(moves(140e3, 20 * MIB, &[holding(None)]), Some(0));
        assert_eq!(moves(140e3, 100_000, &[holding(None)]), None);
        assert_eq!(moves(11e6, 1 << 30, &[holding(None)]), None);
    }

    #[test]
    fn time_left_uses_greater_of_own_and_peer_pace() {
        let load = sending(9e3, 3000, 25_000);
        assert_eq!(time_left(&load, None, 25_000), None);
        let mut slow = load;
        slow.after_begin.lasting = Some(10e3);
        assert_eq!(time_left(&slow, None, 25_000), Some(Duration::from_millis(2500)));
        assert_eq!(time_left(&slow, Some(100e3), 25_000), Some(Duration::from_millis(250)));
        assert_eq!(time_left(&load, Some(100e3), 25_000), Some(Duration::from_millis(250)));
        // If sixteen streams share the link, each takes sixteen times as long.
        (slow.streams, slow.outstanding) = (16, 16 * 25_000);
        assert_eq!(time_left(&slow, None, 25_000), Some(Duration::from_secs(40)));
    }

    #[test]
    fn nar_does_not_move_to_busy_holder() {
        let mut busy = holding(Some(10e6));
        (busy.load.streams, busy.load.outstanding) = (100, 100 * MIB);
        assert_eq!(moves(1e6, MIB, &[busy]), None);
    }
}
