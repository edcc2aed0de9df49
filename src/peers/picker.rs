//! Which of the peers that have a NAR it comes from. No I/O and no clock: what is known of the
//! peers is passed in.
//!
//! The peer is chosen from which the NAR is expected to be whole first. That is decided by the
//! peer's pace and by what this node already gets from it, so that a closure from several equal
//! peers uses all their links. A peer whose pace is unknown counts as fast as the fastest known
//! one, and is found out that way.

use super::pace::PeerLoad;
use std::cmp::Ordering;
use std::time::Duration;

/// Assumed pace, in bytes per second, while no peer's pace is known: a LAN of 100 Mbit/s.
const USUAL_PACE: f64 = 12.5e6;

/// A peer was waited for this long before a NAR leaves it for its pace.
pub const LEAST_WAIT: Duration = Duration::from_millis(200);
/// What a change of peers costs, at most: another connection, and a peer that closes files it has
/// opened.
const MOVE_COST: Duration = Duration::from_millis(100);
/// A NAR leaves a peer for a source that is this many times as fast.
const FASTER: f64 = 2.0;
/// A NAR leaves a peer for one whose pace is unknown only if the rest would take longer than this.
const WORTH_A_TRY: Duration = Duration::from_secs(2);
/// A NAR that takes longer than this from the fastest known peer counts as twice as long from an
/// unknown one.
const LONG_FOR_A_TRIAL: Duration = Duration::from_secs(1);

/// How far a peer is trusted to answer. The order is that of preference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HealthRank {
    /// Nothing is against it.
    Good,
    /// It failed or hung lately.
    Doubtful,
    /// It is to be left alone for a while.
    LastResort,
}

/// A peer that has the NAR.
#[derive(Debug, Clone, Copy)]
pub struct HolderFacts {
    /// How far it is trusted.
    pub health: HealthRank,
    /// Its pace, and what is under way from it.
    pub load: PeerLoad,
}

/// The peer that was chosen.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// Its place among the peers that were given.
    pub at: usize,
    /// When the NAR is expected to be whole.
    pub expected: Duration,
}

/// The best source for `bytes` of a NAR; `None` if there is none.
pub fn choose(holdings: &[HolderFacts], bytes: u64) -> Option<Choice> {
    let usual = usual_pace(holdings);
    // A peer that only claims to have paths gets one NAR at a time until one was whole: it may
    // hang.
    let is_taken = |h: &HolderFacts| !h.load.is_proven && h.load.streams > 0;
    // A NAR of seconds is no trial: an unknown peer gets it only beside known ones that are busy.
    let is_long = bytes as f64 / usual > LONG_FOR_A_TRIAL.as_secs_f64();
    let trial = |h: &HolderFacts| if is_long && h.load.pace.known.is_none() { FASTER } else { 1.0 };
    let key = |h: &HolderFacts| {
        (h.health, is_taken(h), trial(h) * expected(&h.load, bytes, usual), h.load.chosen)
    };
    let order = |a: &(usize, &HolderFacts), b: &(usize, &HolderFacts)| {
        key(a.1).partial_cmp(&key(b.1)).unwrap_or(Ordering::Equal)
    };
    let (at, best) = holdings.iter().enumerate().min_by(order)?;
    Some(Choice { at, expected: duration(expected(&best.load, bytes, usual)) })
}

/// The source for which a NAR leaves the peer that sends it, if one is twice as fast. `current` is
/// the load of that peer, this NAR included, of which `rest` bytes are to come. This NAR has
/// `waited` for it so far.
pub fn faster(
    current: &PeerLoad,
    waited: Duration,
    rest: u64,
    others: &[HolderFacts],
) -> Option<usize> {
    if waited < LEAST_WAIT {
        return None;
    }
    // A fast peer's samples are too short to be looked at, so that its smoothed pace counts between
    // them.
    let pace = if current.pace.waited < LEAST_WAIT {
        current.pace.lasting?
    } else {
        // No faster than it was in this sample, and no faster than it is known to be.
        current.pace.known.unwrap_or(f64::INFINITY).min(current.pace.measured)
    };
    let pace = pace.max(1.0);
    let time = work_left(current, rest) / pace;
    let usual = usual_pace(others);
    let is_better = |h: &HolderFacts| {
        let there = h.load.pace.known.unwrap_or(usual.min(h.load.pace.at_most));
        let is_sure = h.load.pace.known.is_some() || time > WORTH_A_TRY.as_secs_f64();
        h.health == HealthRank::Good
            && is_sure
            && there >= FASTER * pace
            && time >= FASTER * expected(&h.load, rest, usual) + MOVE_COST.as_secs_f64()
    };
    let better: Vec<usize> = (0..others.len()).filter(|at| is_better(&others[*at])).collect();
    let holdings: Vec<HolderFacts> = better.iter().map(|at| others[*at]).collect();
    choose(&holdings, rest).map(|choice| better[choice.at])
}

/// How long `rest` bytes of a NAR take, which `load` includes, at the pace of what has begun to
/// come; `None` while that is unknown. `own` is that pace of this NAR alone, if it is known. Both
/// are lasting ones. The greater pace counts: of small NARs from a Wi-Fi card that sleeps, the
/// peer's says nothing of a large one.
pub fn time_left(load: &PeerLoad, own: Option<f64>, rest: u64) -> Option<Duration> {
    let pace = load
        .after_begin
        .lasting
        .into_iter()
        .chain(own)
        .fold(None, |most: Option<f64>, pace| Some(most.map_or(pace, |most| most.max(pace))))?;
    Some(duration(work_left(load, rest) / pace.max(1.0)))
}

/// Bytes until `rest` bytes of a NAR have come that `load` includes. Streams share the link, so it
/// need not wait for more of the others than there is of it.
fn work_left(load: &PeerLoad, rest: u64) -> f64 {
    load.outstanding.min(rest.saturating_mul(load.streams.max(1).into())) as f64
}

/// Seconds until `bytes` more are there, behind or beside what is under way.
fn expected(load: &PeerLoad, bytes: u64, usual: f64) -> f64 {
    let pace = load.pace.known.unwrap_or(usual.min(load.pace.at_most)).max(1.0);
    work_left(&load.with(bytes), bytes) / pace
}

fn usual_pace(holdings: &[HolderFacts]) -> f64 {
    holdings
        .iter()
        .filter_map(|h| h.load.pace.known)
        .fold(None, |best: Option<f64>, pace| Some(best.map_or(pace, |b| b.max(pace))))
        .unwrap_or(USUAL_PACE)
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
            at_most: f64::INFINITY,
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

    /// Chooses for one NAR after the other, each of which is still under way when the next is asked
    /// for.
    fn spread(mut holdings: Vec<HolderFacts>, nars: u32, size: u64) -> Vec<u32> {
        for turn in 1..=nars {
            let at = choose(&holdings, size).unwrap().at;
            let load = &mut holdings[at].load;
            (load.streams, load.outstanding, load.chosen) =
                (load.streams + 1, load.outstanding + size, turn.into());
        }
        holdings.iter().map(|h| h.load.streams).collect()
    }

    #[test]
    fn equal_holders_get_equal_parts() {
        assert_eq!(spread(vec![holding(None); 8], 16, 25_000), [2; 8]);
        assert_eq!(spread(vec![holding(Some(2.5e6)); 4], 16, MIB), [4; 4]);
    }

    #[test]
    fn unequal_holders_get_parts_by_their_pace() {
        let parts = spread(vec![holding(Some(10e6)), holding(Some(2.5e6))], 20, MIB);
        assert_eq!(parts, [16, 4]);
        // One that is slow beyond measure gets nothing.
        assert_eq!(spread(vec![holding(Some(9e3)), holding(Some(10e6))], 16, 25_000), [0, 16]);
    }

    #[test]
    fn nar_of_seconds_is_no_trial_of_an_unknown_holder() {
        let holders = || vec![holding(None), holding(Some(10e6))];
        assert_eq!(spread(holders(), 1, 64 * MIB), [0, 1]);
        assert_eq!(spread(holders(), 1, MIB), [1, 0]);
        // When the known one is busy with others, its link is not all there is.
        assert_eq!(spread(holders(), 3, 64 * MIB), [1, 2]);
        assert_eq!(spread(vec![holding(None); 2], 2, 64 * MIB), [1, 1]);
    }

    #[test]
    fn unknown_holder_is_tried_beside_a_known_one() {
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
    fn health_comes_before_pace() {
        let mut doubtful = holding(Some(100e6));
        doubtful.health = HealthRank::Doubtful;
        assert_eq!(spread(vec![doubtful, holding(Some(1e6))], 4, MIB), [0, 4]);
        assert_eq!(choose(&[], 1), None);
    }

    #[test]
    fn small_nar_is_not_put_behind_a_large_one_without_need() {
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
            at_most: f64::INFINITY,
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

    #[test]
    fn slow_peer_is_left_for_one_twice_as_fast_and_for_no_other() {
        let current = sending(140e3, 300, 20 * MIB);
        assert_eq!(
            faster(&current, LEAST_WAIT, 20 * MIB, &[holding(Some(250e3)), holding(Some(10e6))]),
            Some(1)
        );
        assert_eq!(faster(&current, LEAST_WAIT, 20 * MIB, &[holding(Some(270e3))]), None);
        assert_eq!(faster(&current, LEAST_WAIT, 20 * MIB, &[]), None);
        let mut doubtful = holding(Some(10e6));
        doubtful.health = HealthRank::Doubtful;
        assert_eq!(faster(&current, LEAST_WAIT, 20 * MIB, &[doubtful]), None);
    }

    #[test]
    fn peer_is_not_left_early_nor_for_little() {
        // A Wi-Fi card that sleeps 100 ms has sent nothing yet.
        assert_eq!(
            faster(
                &sending(0.0, 100, MIB),
                Duration::from_millis(100),
                MIB,
                &[holding(Some(10e6))]
            ),
            None
        );
        // The rest is there sooner than another connection.
        assert_eq!(
            faster(&sending(1e6, 300, 50_000), LEAST_WAIT, 50_000, &[holding(Some(10e6))]),
            None
        );
        // Small NARs of a peer that drips are worth it.
        assert_eq!(
            faster(&sending(9e3, 300, 22_000), LEAST_WAIT, 22_000, &[holding(Some(10e6))]),
            Some(0)
        );
    }

    /// Its samples of 256 KiB take less than [`LEAST_WAIT`].
    #[test]
    fn fast_peer_is_left_for_one_far_faster_by_its_smoothed_pace() {
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
    fn unknown_peer_is_tried_only_if_the_rest_takes_long() {
        assert_eq!(
            faster(&sending(140e3, 300, 20 * MIB), LEAST_WAIT, 20 * MIB, &[holding(None)]),
            Some(0)
        );
        assert_eq!(
            faster(&sending(140e3, 300, 100_000), LEAST_WAIT, 100_000, &[holding(None)]),
            None
        );
        assert_eq!(
            faster(&sending(11e6, 300, 1 << 30), LEAST_WAIT, 1 << 30, &[holding(None)]),
            None
        );
    }

    #[test]
    fn time_left_is_known_with_the_pace_of_what_has_begun_and_never_overestimated() {
        let load = sending(9e3, 3000, 25_000);
        assert_eq!(time_left(&load, None, 25_000), None);
        let mut slow = load;
        slow.after_begin.lasting = Some(10e3);
        assert_eq!(time_left(&slow, None, 25_000), Some(Duration::from_millis(2500)));
        assert_eq!(time_left(&slow, Some(100e3), 25_000), Some(Duration::from_millis(250)));
        assert_eq!(time_left(&load, Some(100e3), 25_000), Some(Duration::from_millis(250)));
        // Of sixteen that share the link, each takes sixteen times as long.
        (slow.streams, slow.outstanding) = (16, 16 * 25_000);
        assert_eq!(time_left(&slow, None, 25_000), Some(Duration::from_secs(40)));
    }

    #[test]
    fn load_of_this_nodes_own_does_not_make_a_peer_slow() {
        let mut busy = holding(Some(10e6));
        (busy.load.streams, busy.load.outstanding) = (100, 100 * MIB);
        assert_eq!(faster(&sending(1e6, 300, MIB), LEAST_WAIT, MIB, &[busy]), None);
    }
}
