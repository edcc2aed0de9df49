//! Search for one path among the friends.

use super::link::FriendLink;
use crate::lan::Holder;
use crate::nix::HashPart;
use crate::peers::client::{PeerError, PeerNarinfo};
use crate::peers::request_pool::{POOL_RETRY_DELAY, RequestPool};
use crate::time_scale::Timeout;
use crate::wire::NodeKey;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

/// Timeout of a narinfo request to a friend. A friend that exceeds it counts as unreachable.
const NARINFO_TIMEOUT: Timeout = Timeout::from_secs(2);

/// Search for one path among the friends.
pub struct FriendSearch {
    requests: Arc<RequestPool>,
    hash_part: HashPart,
    /// Friends that have not been asked yet.
    to_ask: Vec<Arc<FriendLink>>,
    asked: u32,
    unanswered: u32,
    deadline: Instant,
    answer: Sender<FriendAnswer>,
    answers: Receiver<FriendAnswer>,
    /// Signals the LAN search that a friend has the path.
    found: Sender<()>,
    found_signal: Receiver<()>,
}

struct FriendAnswer {
    link: Arc<FriendLink>,
    /// The address that was asked; `None` if the friend is unreachable.
    result: Option<(SocketAddr, Result<PeerNarinfo, PeerError>)>,
}

/// Narinfo from a friend that has the path.
pub struct FriendOffer {
    /// The friend.
    pub link: Arc<FriendLink>,
    /// Address of the friend's HTTP server.
    pub address: SocketAddr,
    /// The narinfo. Its form is checked, its signatures are not.
    pub narinfo: PeerNarinfo,
}

impl FriendSearch {
    /// Asks the friends `to_ask`. Sends the requests at once and does not wait for answers.
    pub(super) fn start(
        requests: Arc<RequestPool>,
        hash_part: &HashPart,
        to_ask: Vec<Arc<FriendLink>>,
    ) -> Self {
        let (answer, answers) = bounded(to_ask.len());
        let (found, found_signal) = bounded(1);
        let mut search = FriendSearch {
            requests,
            hash_part: *hash_part,
            to_ask,
            asked: 0,
            unanswered: 0,
            deadline: Instant::now() + NARINFO_TIMEOUT.get(),
            answer,
            answers,
            found,
            found_signal,
        };
        search.ask();
        search
    }

    /// Channel that receives one message as soon as a friend has the path.
    pub fn found_signal(&self) -> &Receiver<()> {
        &self.found_signal
    }

    /// Restarts the time limit of the search, which ends at `deadline` at the latest.
    pub fn resume(&mut self, deadline: Instant) {
        self.deadline = deadline.min(Instant::now() + NARINFO_TIMEOUT.get());
    }

    /// Number of friends that were asked, and number of those that have not answered.
    pub fn asked_and_unanswered(&self) -> (u32, u32) {
        (self.asked, self.unanswered)
    }

    /// Returns the next friend that has the path; `None` if all have answered or time is up. Blocks
    /// for `NARINFO_TIMEOUT` at most.
    pub fn next_offer(&mut self) -> Option<FriendOffer> {
        loop {
            self.ask();
            if self.unanswered == 0 && self.to_ask.is_empty() {
                return None;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return None;
            }
            let wake_up =
                if self.to_ask.is_empty() { self.deadline } else { now + POOL_RETRY_DELAY };
            let Ok(FriendAnswer { link, result }) =
                self.answers.recv_deadline(wake_up.min(self.deadline))
            else {
                continue;
            };
            self.unanswered -= 1;
            let Some((address, narinfo)) = result else { continue };
            match narinfo {
                Ok(narinfo) => return Some(FriendOffer { link, address, narinfo }),
                Err(e) => log::debug!("{}: friend {}: {e}", self.hash_part, link.friend.name),
            }
        }
    }

    /// Asks the remaining friends, each in a thread of the pool, until the pool is full.
    fn ask(&mut self) {
        while let Some(link) = self.to_ask.pop() {
            let (hash_part, answer, found) =
                (self.hash_part, self.answer.clone(), self.found.clone());
            let asked_link = link.clone();
            let started = self.requests.start(request_key(&link.friend.key), true, move || {
                let result = request_narinfo(&asked_link, &hash_part);
                let has_it = result.as_ref().is_some_and(|(_, narinfo)| narinfo.is_ok());
                let _ = answer.try_send(FriendAnswer { link: asked_link, result });
                if has_it {
                    let _ = found.try_send(());
                }
            });
            if !started {
                self.to_ask.push(link);
                return;
            }
            self.asked += 1;
            self.unanswered += 1;
        }
    }
}

/// Requests the narinfo from a friend at its current address. Returns `None` if the friend is
/// unreachable. Blocks for 2 s at most, and right after the start for up to 1 s more.
fn request_narinfo(
    link: &FriendLink,
    hash_part: &HashPart,
) -> Option<(SocketAddr, Result<PeerNarinfo, PeerError>)> {
    let address = link.wait_for_address()?;
    let holder = Holder::peerix(address, hash_part);
    let narinfo = link.client.narinfo(&holder, hash_part, NARINFO_TIMEOUT.get());
    if let Err(PeerError::Unreachable(e)) = &narinfo {
        log::debug!("friend {}: {address}: {e}", link.friend.name);
        link.mark_unreachable();
    }
    Some((address, narinfo))
}

/// Stands for a friend in the per-address request counts. It is derived from the key, because the
/// address may change while a request runs.
fn request_key(key: &NodeKey) -> IpAddr {
    let bytes = key.as_bytes().first_chunk().expect("a key has 32 bytes");
    Ipv6Addr::from_bits(u128::from_be_bytes(*bytes)).into()
}
