//! Which peers an answer to a lookup names, and in what order. Each network gets one place before
//! any gets a second, so that invented peers of one network do not hide others.

use super::peer::{CandidateRank, PeerEntry};
use super::peers::Peers;
use peerix::wire::tracker::{Candidate, MAX_CANDIDATES, MAX_OTHERS};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

/// Maximum number of peers without a filter that a lookup examines for networks that it does not
/// list yet.
const MAX_EXAMINED: usize = 256;

/// Number of best peers among those without a filter in an answer. The other places rotate, so that
/// new peers without reputation are asked, too.
const BEST_OTHERS: usize = MAX_OTHERS / 2;

/// Returns the best [`MAX_CANDIDATES`] of the live peers in `slots`, best first. The filters of all
/// these peers match the path. `salt` is derived from the path.
pub(super) fn with_path(peers: &Peers, slots: Vec<u32>, salt: u64, now: Instant) -> Vec<Candidate> {
    let mut ranked: Vec<(CandidateRank, &PeerEntry)> = slots
        .into_iter()
        .filter_map(|slot| {
            let peer = peers.live_peer_in(slot, now)?;
            // The order of peers with equal scores depends on the path, so that they share the
            // load.
            let tie_break = (peer.sequence ^ salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            Some((CandidateRank { sequence: tie_break, ..peer.rank(slot) }, peer))
        })
        .collect();
    ranked.sort_unstable_by_key(|(rank, _)| *rank);
    // Number of peers of each class and network so far.
    let mut counts: HashMap<(u8, u128), u32> = HashMap::new();
    let mut ordered: Vec<((u8, u32), &PeerEntry)> = ranked
        .into_iter()
        .map(|(CandidateRank { class, .. }, peer)| {
            let round = counts.entry((class, peer.network())).or_default();
            *round += 1;
            ((class, *round), peer)
        })
        .collect();
    ordered.sort_by_key(|(turn, _)| *turn);
    ordered.iter().take(MAX_CANDIDATES).map(|(_, peer)| peer.candidate()).collect()
}

/// Returns at most [`MAX_OTHERS`] live peers without a filter, best first: the best ones, and some
/// that take turns. `turn` is derived from the path and determines which.
pub(super) fn others(peers: &Peers, turn: u64, now: Instant) -> Vec<Candidate> {
    let best = || {
        peers.others.iter().filter_map(|rank| Some((*rank, peers.live_peer_in(rank.slot, now)?)))
    };
    if peers.others.len() <= MAX_OTHERS {
        return best().map(|(_, peer)| peer.candidate()).collect();
    }
    // The turns start at a sequence number that the path determines, and wrap around once.
    let turns = peers.turns.range(turn % peers.next_sequence.max(1)..).chain(&peers.turns);
    let rank = |slot: u32| peers.live_peer_in(slot, now).map(|peer| (peer.rank(slot), peer));
    let in_turn = || turns.clone().filter_map(|(_, slot)| rank(*slot)).take(MAX_EXAMINED);
    let mut networks = HashSet::new();
    let mut is_new = |(_, peer): &(CandidateRank, &PeerEntry)| networks.insert(peer.network());
    let mut chosen: BTreeMap<CandidateRank, &PeerEntry> =
        best().take(MAX_EXAMINED).filter(&mut is_new).take(BEST_OTHERS).collect();
    let left = MAX_OTHERS - chosen.len();
    chosen.extend(in_turn().filter(&mut is_new).take(left));
    for (rank, peer) in best().take(BEST_OTHERS).chain(in_turn()) {
        if chosen.len() >= MAX_OTHERS {
            break;
        }
        chosen.insert(rank, peer);
    }
    chosen.values().map(|peer| peer.candidate()).collect()
}
