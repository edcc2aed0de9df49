//! Addresses of the candidates that a tracker names.

use crate::resolver::{NameResolver, parse_address};
use crate::wire::tracker::{Candidate, CandidateList, MAX_ADDR, can_be_peer, is_peer_id};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// Returns true if a candidate has a valid form. IDs and host names are stored and sent to others,
/// so their length and characters are checked.
fn can_be_asked(candidate: &Candidate) -> bool {
    is_peer_id(&candidate.peer_id)
        && (1..=MAX_ADDR).contains(&candidate.addr.len())
        && candidate.port != 0
}

/// Candidate with its IP address.
pub(super) struct LocatedCandidate {
    pub(super) address: SocketAddr,
    pub(super) peer_id: String,
    /// Position in the tracker's list.
    pub(super) rank: usize,
}

/// Candidate with a host name, and its position in the tracker's list.
pub(super) type NamedCandidate = (usize, Candidate);

/// Splits the valid candidates of a list into those with IP addresses and those with host names.
pub(super) fn split(list: CandidateList) -> (Vec<LocatedCandidate>, Vec<NamedCandidate>) {
    let (mut located, mut named) = (Vec::new(), Vec::new());
    let CandidateList { candidates, others } = list;
    for (rank, candidate) in
        candidates.into_iter().enumerate().chain(others.into_iter().enumerate())
    {
        if !can_be_asked(&candidate) {
            continue;
        }
        match parse_address(&candidate.addr) {
            Some(ip) => located.extend(locate(candidate, rank, ip)),
            None => named.push((rank, candidate)),
        }
    }
    (located, named)
}

/// Resolves host names, and calls `found` with each candidate as soon as its address is known, and
/// with `None` at the end. Blocks until `deadline` at most; later names are left out.
pub(super) fn resolve(
    names: &Arc<NameResolver>,
    named: &[NamedCandidate],
    deadline: Instant,
    found: impl Fn(Option<LocatedCandidate>),
) {
    let hosts: Vec<&str> = named.iter().map(|(_, candidate)| &*candidate.addr).collect();
    names.resolve(&hosts, deadline, |index, ip| {
        let (rank, candidate) = &named[index];
        let located = ip.and_then(|ip| locate(candidate.clone(), *rank, ip));
        if located.is_some() {
            found(located);
        }
    });
    found(None);
}

fn locate(candidate: Candidate, rank: usize, ip: IpAddr) -> Option<LocatedCandidate> {
    let Candidate { peer_id, port, .. } = candidate;
    let address = SocketAddr::new(ip, port);
    can_be_peer(ip).then_some(LocatedCandidate { address, peer_id, rank })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards against a tracker that fills the memory with long host names.
    #[test]
    fn malformed_candidate_is_not_asked() {
        let candidate = |peer_id: &str, addr: &str, port| {
            can_be_asked(&Candidate {
                peer_id: peer_id.into(),
                addr: addr.into(),
                port,
                score: 0.0,
            })
        };
        assert!(candidate("a", "example.org", 1) && candidate("a", "203.0.113.1", 65535));
        assert!(!candidate("", "example.org", 1) && !candidate("a\n", "example.org", 1));
        assert!(!candidate(&"a".repeat(129), "example.org", 1));
        assert!(!candidate("a", "", 1) && !candidate("a", &"a".repeat(MAX_ADDR + 1), 1));
        assert!(!candidate("a", "example.org", 0));
    }
}
