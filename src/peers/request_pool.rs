//! Thread pool for the requests of lookups to peers and trackers. Each request has its own thread:
//! it cannot be cancelled, and a hanging peer must not delay requests to other peers.

use crate::connect_rate::ConnectDecision;
use crate::lock::Mutex;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use scopeguard::guard;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// Largest number of concurrent requests to peers. At the bound, lookups wait for their turn.
const MAX_REQUESTS: u32 = 256;
/// Largest number of concurrent requests to one address: Nix looks up 25 paths at once.
const MAX_REQUESTS_TO_ONE: u32 = 32;
/// Largest number of concurrent requests to unproven peers of other networks. Peers that a tracker
/// names must not keep neighbours from being asked.
const MAX_REQUESTS_TO_STRANGERS: u32 = 64;
/// Largest number of concurrent calls of trackers. 25 lookups call two trackers twice each; the
/// bound is more than twice that.
const MAX_TRACKER_CALLS: u32 = 256;
/// Largest number of concurrent requests to one address that has not answered yet or failed
/// recently. Requests that hang leave room for others.
const MAX_REQUESTS_TO_UNPROVEN: u32 = 4;
/// Idle time after which a thread ends.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Stack of a thread, in bytes. The client's buffers are on the heap. TLS to trackers takes 100 KiB
/// in a build without optimization.
const STACK_BYTES: usize = 512 * 1024;
/// Delay before the next attempt at a request that the pool refuses, except to candidates of
/// trackers.
pub const POOL_RETRY_DELAY: Duration = Duration::from_millis(2);

type RequestJob = Box<dyn FnOnce() + Send>;

/// Target of a request, which decides the limits that apply to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestTarget {
    /// A peer that has answered since its last failure.
    Proven(IpAddr),
    /// Any other neighbour.
    Neighbour(IpAddr),
    /// Any other peer that a tracker named.
    Stranger(IpAddr),
    /// A tracker.
    Tracker,
}

impl RequestTarget {
    /// Address of the peer; `None` for a tracker.
    fn ip(self) -> Option<IpAddr> {
        match self {
            RequestTarget::Tracker => None,
            RequestTarget::Proven(ip)
            | RequestTarget::Neighbour(ip)
            | RequestTarget::Stranger(ip) => Some(ip),
        }
    }
}

/// Pool of request threads. The threads end when the pool is dropped.
pub struct RequestPool {
    jobs: Sender<RequestJob>,
    job_receiver: Receiver<RequestJob>,
    in_flight: Arc<Mutex<InFlightCounts>>,
}

#[derive(Default)]
struct InFlightCounts {
    per_address: HashMap<IpAddr, u32>,
    to_strangers: u32,
    tracker_calls: u32,
}

impl InFlightCounts {
    fn admits(&self, target: RequestTarget) -> ConnectDecision {
        let Some(ip) = target.ip() else {
            let is_full = self.tracker_calls >= MAX_TRACKER_CALLS;
            return if is_full { ConnectDecision::Later } else { ConnectDecision::Now };
        };
        let is_proven = matches!(target, RequestTarget::Proven(_));
        let max = if is_proven { MAX_REQUESTS_TO_ONE } else { MAX_REQUESTS_TO_UNPROVEN };
        let is_stranger = matches!(target, RequestTarget::Stranger(_));
        let total: u32 = self.per_address.values().sum();
        let to_one = self.per_address.get(&ip).copied().unwrap_or_default();
        let is_full = is_stranger && self.to_strangers >= MAX_REQUESTS_TO_STRANGERS;
        match (to_one < max, total < MAX_REQUESTS && !is_full) {
            (false, _) => ConnectDecision::NotThis,
            (true, false) => ConnectDecision::Later,
            (true, true) => ConnectDecision::Now,
        }
    }

    fn begin(&mut self, target: RequestTarget) -> bool {
        let is_admitted = self.admits(target) == ConnectDecision::Now;
        if is_admitted {
            match target.ip() {
                None => self.tracker_calls += 1,
                Some(ip) => *self.per_address.entry(ip).or_default() += 1,
            }
            self.to_strangers += u32::from(matches!(target, RequestTarget::Stranger(_)));
        }
        is_admitted
    }

    fn end(&mut self, target: RequestTarget) {
        let Some(ip) = target.ip() else { return self.tracker_calls -= 1 };
        self.to_strangers -= u32::from(matches!(target, RequestTarget::Stranger(_)));
        if let Some(to_one) = self.per_address.get_mut(&ip) {
            *to_one -= 1;
            if *to_one == 0 {
                self.per_address.remove(&ip);
            }
        }
    }
}

impl Default for RequestPool {
    fn default() -> Self {
        // Zero capacity hands a job to an idle thread, or makes `try_send` fail so that a new
        // thread starts.
        let (jobs, waiting) = bounded(0);
        RequestPool { jobs, job_receiver: waiting, in_flight: Arc::default() }
    }
}

impl RequestPool {
    /// Runs `request` to a neighbour at `ip` in another thread. Returns false and does nothing if a
    /// limit is reached. `is_proven` says that the peer has answered since its last failure. Does
    /// not block.
    pub fn start(
        &self,
        ip: IpAddr,
        is_proven: bool,
        request: impl FnOnce() + Send + 'static,
    ) -> bool {
        self.run(
            if is_proven { RequestTarget::Proven(ip) } else { RequestTarget::Neighbour(ip) },
            request,
        )
    }

    /// Runs `request` in another thread. Returns false and does nothing if a limit is reached or no
    /// thread can be created. Does not block.
    pub fn run(&self, target: RequestTarget, request: impl FnOnce() + Send + 'static) -> bool {
        if !self.in_flight.lock().begin(target) {
            return false;
        }
        let in_flight = self.in_flight.clone();
        let end = guard((), move |()| in_flight.lock().end(target));
        let job: RequestJob = Box::new(move || {
            let _end = end;
            request();
        });
        let job = match self.jobs.try_send(job) {
            Ok(()) => return true,
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
        };
        let job_receiver = self.job_receiver.clone();
        let started = thread::Builder::new().name("narinfo".into()).stack_size(STACK_BYTES).spawn(
            move || {
                job();
                while let Ok(job) = job_receiver.recv_timeout(IDLE_TIMEOUT) {
                    job();
                }
            },
        );
        if let Err(e) = &started {
            log::debug!("thread for a narinfo: {e}");
        }
        started.is_ok()
    }

    /// Returns whether the limits admit a request to `target`, or which kind of limit refuses it.
    /// Does not count it.
    pub fn admits(&self, target: RequestTarget) -> ConnectDecision {
        self.in_flight.lock().admits(target)
    }

    /// Returns true if a request to `ip` is in progress.
    pub fn has_request_to(&self, ip: IpAddr) -> bool {
        self.in_flight.lock().per_address.contains_key(&ip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([203, 0, 113, last])
    }

    fn taken(in_flight: &mut InFlightCounts, to: RequestTarget) -> u32 {
        (0..1000).filter(|_| in_flight.begin(to)).count() as u32
    }

    #[test]
    fn requests_to_unproven_peer_are_limited() {
        let mut all = InFlightCounts::default();
        assert_eq!(taken(&mut all, RequestTarget::Neighbour(ip(1))), MAX_REQUESTS_TO_UNPROVEN);
        assert_eq!(taken(&mut all, RequestTarget::Proven(ip(2))), MAX_REQUESTS_TO_ONE);
        all.end(RequestTarget::Neighbour(ip(1)));
        assert_eq!(taken(&mut all, RequestTarget::Neighbour(ip(1))), 1);
        let others: u32 =
            (3..=255).map(|last| taken(&mut all, RequestTarget::Neighbour(ip(last)))).sum();
        assert_eq!(others, MAX_REQUESTS - MAX_REQUESTS_TO_UNPROVEN - MAX_REQUESTS_TO_ONE);
        (0..MAX_REQUESTS_TO_ONE).for_each(|_| all.end(RequestTarget::Proven(ip(2))));
        assert!(!all.per_address.contains_key(&ip(2)));
    }

    /// Guards against peers that a tracker invented taking all places, so that neighbours are not
    /// asked.
    #[test]
    fn requests_to_strangers_leave_places_for_neighbours() {
        let mut all = InFlightCounts::default();
        let strangers: u32 =
            (1..=200).map(|last| taken(&mut all, RequestTarget::Stranger(ip(last)))).sum();
        assert_eq!(strangers, MAX_REQUESTS_TO_STRANGERS);
        assert_eq!(taken(&mut all, RequestTarget::Neighbour(ip(250))), MAX_REQUESTS_TO_UNPROVEN);
        assert_eq!(
            taken(&mut all, RequestTarget::Proven(ip(1))),
            MAX_REQUESTS_TO_ONE - MAX_REQUESTS_TO_UNPROVEN
        );
        assert_eq!(taken(&mut all, RequestTarget::Tracker), MAX_TRACKER_CALLS);
        all.end(RequestTarget::Tracker);
        all.end(RequestTarget::Stranger(ip(1)));
        assert_eq!(
            (
                taken(&mut all, RequestTarget::Tracker),
                taken(&mut all, RequestTarget::Stranger(ip(250)))
            ),
            (1, 0)
        );
        assert_eq!(taken(&mut all, RequestTarget::Stranger(ip(251))), 1);
    }

    #[test]
    fn panicking_request_releases_its_place() {
        let requests = RequestPool::default();
        let (done, ended) = bounded(1);
        for _ in 0..2 * MAX_REQUESTS_TO_UNPROVEN {
            let done = done.clone();
            assert!(requests.start(ip(1), false, move || {
                scopeguard::defer!(done.send(()).unwrap());
                std::panic::resume_unwind(Box::new("on purpose"));
            }));
            ended.recv().unwrap();
            while requests.has_request_to(ip(1)) {
                thread::yield_now();
            }
        }
    }
}
