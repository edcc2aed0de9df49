//! Which peers to give up: lets wait budgets run down while answers are overdue. No I/O. Time is
//! passed in as lookup time (see [`super`]).

use super::budget::WaitBudget;
use super::peer::LanPeer;
use super::peer_table::PeerTable;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// The wait budget that peers share, and whether any budget runs down.
pub struct OverdueCheck {
    /// Wait budget shared by all peers through which no path was found.
    shared_budget: WaitBudget,
    /// Whether any wait budget ran down after the last check.
    is_waiting: bool,
}

impl OverdueCheck {
    /// Creates a check with a full shared budget at `t`.
    pub fn new(t: Instant) -> Self {
        OverdueCheck { shared_budget: WaitBudget::full(t), is_waiting: false }
    }

    /// When the peer has to be checked: its wait budget is used up, an answer becomes overdue, or
    /// the wait after its *bye* is over.
    fn due_at(&self, peer: &LanPeer, median: Option<Duration>) -> Option<Instant> {
        let budget = peer.hits.as_ref().map_or(&self.shared_budget, |hits| &hits.budget);
        let overdue = || peer.oldest_owed().map(|since| since + peer.due_after(median));
        budget.used_up_at().or_else(overdue).into_iter().chain(peer.liveness.leaves_at()).min()
    }

    /// Lets each wait budget run down while answers that it covers are overdue, and stops it when
    /// none is. To be called in each turn. Returns the peers to give up: those with overdue answers
    /// whose budget is used up, and those that have left.
    ///
    /// `drained` tells whether all received datagrams were handled. If not, no budget begins to run
    /// down and no peer is given up, because the answer may be among the others.
    pub fn run(&mut self, peers: &mut PeerTable, drained: bool, t: Instant) -> Vec<SocketAddr> {
        let is_due = drained && peers.next_check.is_some_and(|at| at <= t);
        if !is_due && !self.is_waiting {
            return Vec::new();
        }
        let median = peers.median_usual();
        let (mut given_up, mut sharing) = (Vec::new(), Vec::new());
        self.is_waiting = false;
        for (address, peer) in peers.iter_mut() {
            let is_overdue = peer.overdue(peer.due_after(median), t).next().is_some();
            let mut is_used_up = false;
            if let Some(hits) = &mut peer.hits {
                is_used_up = hits.budget.judge(is_overdue, drained, t);
                self.is_waiting |= hits.budget.used_up_at().is_some();
            } else if is_overdue {
                sharing.push(address);
            }
            if is_used_up || peer.liveness.has_left(t) {
                given_up.push(address);
            }
        }
        if self.shared_budget.judge(!sharing.is_empty(), drained, t) {
            given_up.append(&mut sharing);
        }
        self.is_waiting |= self.shared_budget.used_up_at().is_some();
        if !drained {
            return Vec::new();
        }
        peers.next_check = peers.iter().filter_map(|(_, peer)| self.due_at(peer, median)).min();
        given_up
    }
}

#[cfg(test)]
mod tests {
    use super::super::peer::MetBy;
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn shared_budget_runs_down_once_while_any_peer_is_overdue() {
        let start = Instant::now();
        let (mut peers, mut check) = (PeerTable::default(), OverdueCheck::new(start));
        let addresses = [1, 2].map(|host| SocketAddr::from(([10, 0, 0, host], 12304)));
        let owe = |peers: &mut PeerTable, address, t| {
            let (peer, _) = peers.record_heard(address, MetBy::Query, t).unwrap();
            peer.owe(&[1], true, t);
            let due = [Some(Duration::ZERO), None].map(|median| t + peer.due_after(median));
            peers.plan();
            due
        };
        let [[earliest, overdue], _] = addresses.map(|address| owe(&mut peers, address, start));
        assert!(earliest < overdue);
        assert_eq!(peers.next_check, Some(earliest), "while the median is not known");
        assert!(check.run(&mut peers, true, earliest).is_empty());
        assert_eq!(peers.next_check, Some(overdue));
        assert!(check.run(&mut peers, false, overdue).is_empty());
        assert_eq!(peers.next_check, Some(overdue), "no wait begins while datagrams are unread");
        assert!(check.run(&mut peers, true, overdue).is_empty());
        assert_eq!(peers.next_check, Some(overdue + WaitBudget::MAX.get()), "once for both peers");

        peers.get_mut(addresses[0]).unwrap().settle(1);
        assert!(check.run(&mut peers, true, overdue + SECOND).is_empty());
        assert_eq!(peers.next_check, Some(overdue + WaitBudget::MAX.get()), "one is still overdue");
        peers.get_mut(addresses[1]).unwrap().settle(1);
        let answered = overdue + 2 * SECOND;
        assert!(check.run(&mut peers, false, answered).is_empty(), "the answer stops the budget");

        let [_, late] = owe(&mut peers, addresses[1], answered);
        assert!(check.run(&mut peers, true, late).is_empty());
        let left = SECOND + (late - answered) / WaitBudget::RECOVERY;
        assert_eq!(peers.next_check, Some(late + left));
        assert!(check.run(&mut peers, false, late + left).is_empty(), "datagrams are unread");
        assert_eq!(check.run(&mut peers, true, late + left), [addresses[1]]);
    }
}
