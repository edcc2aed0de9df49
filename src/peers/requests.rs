//! Requests for narinfos, each in a thread of a pool: a request cannot be taken back, and a peer that hangs must not keep
//! other peers from being asked.

use crate::on_drop::OnDrop;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Requests under way, of all lookups together. Beyond, a lookup waits for its turn.
const MAX_REQUESTS: u32 = 256;
/// Of these, requests to one address: Nix looks up 25 paths at once.
const MAX_REQUESTS_TO_ONE: u32 = 32;
/// Requests to an address that has not answered before, or failed lately: those that hang leave room for the others.
const MAX_REQUESTS_TO_UNPROVEN: u32 = 4;
/// A thread without work ends after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// Stack of a thread: the client's buffers are not on it, and TLS is not used.
const STACK_BYTES: usize = 256 * 1024;

type Job = Box<dyn FnOnce() + Send>;

/// The pool. Its threads end when it is dropped.
pub struct Requests {
    jobs: Sender<Job>,
    waiting: Receiver<Job>,
    under_way: Arc<Mutex<HashMap<IpAddr, u32>>>,
}

impl Default for Requests {
    fn default() -> Self {
        // Without capacity: a job is handed to a thread that waits for one, or to a new thread.
        let (jobs, waiting) = bounded(0);
        Requests { jobs, waiting, under_way: Arc::default() }
    }
}

impl Requests {
    /// Runs `request`, which asks the peer at `ip`, in another thread. Returns false and does nothing if there are too many.
    /// `is_proven`: the peer has answered before, and has done so since it failed.
    pub fn start(&self, ip: IpAddr, is_proven: bool, request: impl FnOnce() + Send + 'static) -> bool {
        if !self.begin(ip, is_proven) {
            return false;
        }
        let under_way = self.under_way.clone();
        let end = OnDrop::new(move || end(&under_way, ip));
        let job: Job = Box::new(move || {
            let _end = end;
            request();
        });
        let job = match self.jobs.try_send(job) {
            Ok(()) => return true,
            Err(TrySendError::Full(job) | TrySendError::Disconnected(job)) => job,
        };
        let waiting = self.waiting.clone();
        let started = thread::Builder::new().name("narinfo".into()).stack_size(STACK_BYTES).spawn(move || {
            job();
            while let Ok(job) = waiting.recv_timeout(IDLE_TIMEOUT) {
                job();
            }
        });
        if let Err(e) = &started {
            log::debug!("thread for a narinfo: {e}");
        }
        started.is_ok()
    }

    fn begin(&self, ip: IpAddr, is_proven: bool) -> bool {
        let most = if is_proven { MAX_REQUESTS_TO_ONE } else { MAX_REQUESTS_TO_UNPROVEN };
        let mut under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        let all: u32 = under_way.values().sum();
        let to_one = under_way.get(&ip).copied().unwrap_or_default();
        let fits = all < MAX_REQUESTS && to_one < most;
        if fits {
            under_way.insert(ip, to_one + 1);
        }
        fits
    }
}

fn end(under_way: &Mutex<HashMap<IpAddr, u32>>, ip: IpAddr) {
    let mut under_way = under_way.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(to_one) = under_way.get_mut(&ip) {
        *to_one -= 1;
        if *to_one == 0 {
            under_way.remove(&ip);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([203, 0, 113, last])
    }

    #[test]
    fn unproven_peer_takes_few_places() {
        let requests = Requests::default();
        let taken = |ip, is_proven| (0..1000).filter(|_| requests.begin(ip, is_proven)).count();
        assert_eq!(taken(ip(1), false), MAX_REQUESTS_TO_UNPROVEN as usize);
        assert_eq!(taken(ip(2), true), MAX_REQUESTS_TO_ONE as usize);
        end(&requests.under_way, ip(1));
        assert_eq!(taken(ip(1), false), 1);
        let all: usize = (3..=255).map(|last| taken(ip(last), false)).sum();
        assert_eq!(all as u32, MAX_REQUESTS - MAX_REQUESTS_TO_UNPROVEN - MAX_REQUESTS_TO_ONE);
        (0..MAX_REQUESTS_TO_ONE).for_each(|_| end(&requests.under_way, ip(2)));
        assert!(!requests.under_way.lock().unwrap().contains_key(&ip(2)));
    }

    #[test]
    fn request_runs_and_gives_its_place_back_also_after_a_panic() {
        let requests = Requests::default();
        let (done, ended) = bounded(1);
        for _ in 0..2 * MAX_REQUESTS_TO_UNPROVEN {
            let done = done.clone();
            assert!(requests.start(ip(1), false, move || {
                let _done = OnDrop::new(|| done.send(()).unwrap());
                std::panic::resume_unwind(Box::new("on purpose"));
            }));
            ended.recv().unwrap();
            while requests.under_way.lock().unwrap().contains_key(&ip(1)) {
                thread::yield_now();
            }
        }
    }
}
