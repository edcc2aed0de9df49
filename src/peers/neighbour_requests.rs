//! Requests to neighbours for realisations and build logs.
//!
//! The name of a realisation does not identify a store path, so no datagram can ask for its
//! holders: all live neighbours are asked over HTTP. A build log is requested from the holders of
//! its derivation. The first good answer wins, and each search ends within 2 s.

use super::client::{LogBody, PeerClient, PeerError};
use super::discovery_lookup::DiscoveryLookup;
use super::health::Eligibility;
use super::lan::LanSource;
use super::request_pool::POOL_RETRY_DELAY;
use crate::lan::{LookupUpdate, Neighbour};
use crate::nix::{DrvOutput, Realisation, StorePath};
use crate::time_scale::Timeout;
use crossbeam_channel::{Sender, bounded, never, select};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Time limit of a search. When it is reached, Nix gets the answer that there is none.
const SEARCH_TIMEOUT: Timeout = Timeout::from_secs(2);
/// Largest number of neighbours that are asked for a realisation, the nearest first. It equals the
/// number that lookups ask by unicast.
const MAX_ASKED: usize = 256;
/// Largest number of concurrent realisation requests of one search.
const MAX_IN_FLIGHT: usize = 16;
/// Largest number of holders that are asked for a log.
const MAX_LOG_HOLDERS: usize = 4;

impl LanSource {
    /// Returns the first realisation of `id` for which `is_good` returns true. Blocks for 2 s at
    /// most.
    pub fn realisation(
        &self,
        id: &DrvOutput,
        is_good: impl Fn(&Realisation) -> bool,
    ) -> Option<Realisation> {
        let deadline = Instant::now() + SEARCH_TIMEOUT.get();
        let mut unasked: VecDeque<SocketAddr> =
            self.live_neighbours(SEARCH_TIMEOUT.get()).into_iter().take(MAX_ASKED).collect();
        let (result_sender, results) = bounded(MAX_ASKED);
        let mut in_flight = 0;
        while !unasked.is_empty() || in_flight > 0 {
            // A neighbour with too many requests in progress does not delay the next one.
            for _ in 0..unasked.len() {
                if in_flight >= MAX_IN_FLIGHT {
                    break;
                }
                let Some(http) = unasked.pop_front() else { break };
                let id = id.clone();
                match self.send_request(http, &result_sender, deadline, move |client, left| {
                    client.realisation(http, &id, left)
                }) {
                    true => in_flight += 1,
                    false => unasked.push_back(http),
                }
            }
            let is_blocked = !unasked.is_empty() && in_flight < MAX_IN_FLIGHT;
            let wake_up =
                if is_blocked { deadline.min(Instant::now() + POOL_RETRY_DELAY) } else { deadline };
            match results.recv_deadline(wake_up) {
                Ok((_, Some(realisation))) if is_good(&realisation) => return Some(realisation),
                Ok((http, Some(_))) => {
                    log::debug!("{id}: peer {http} has a realisation without a trusted signature");
                    in_flight -= 1;
                }
                Ok((_, None)) => in_flight -= 1,
                Err(_) if Instant::now() >= deadline => return None,
                Err(_) => {}
            }
        }
        None
    }

    /// Returns the build log of a derivation from the first holder that has it. Blocks for 2 s at
    /// most.
    pub fn log(&self, derivation: &StorePath) -> Option<LogBody> {
        let deadline = Instant::now() + SEARCH_TIMEOUT.get();
        let mut lookup = DiscoveryLookup::start(&self.discovery, &derivation.hash_part());
        let (result_sender, results) = bounded(MAX_LOG_HOLDERS);
        let (mut asked, mut in_flight, no_updates) = (0, 0, never());
        while in_flight > 0 || lookup.updates.is_some() && asked < MAX_LOG_HOLDERS {
            select! {
                recv(lookup.updates.as_ref().unwrap_or(&no_updates)) -> update => match update {
                    Ok(LookupUpdate::Holder { peer, holder }) => {
                        // Discovery must not wait for logs, because its time budgets are for
                        // narinfos.
                        lookup.report_failed(peer);
                        let (http, derivation) = (holder.http, derivation.clone());
                        let request = move |client: &PeerClient, left| client.log(http, &derivation, left);
                        if asked < MAX_LOG_HOLDERS
                            && self.send_request(http, &result_sender, deadline, request)
                        {
                            (asked, in_flight) = (asked + 1, in_flight + 1);
                        }
                    }
                    Ok(LookupUpdate::Ended { .. }) | Err(_) => { lookup.end(); }
                },
                recv(results) -> answer => match answer {
                    Ok((_, Some(log))) => return Some(log),
                    _ => in_flight -= 1,
                },
                default(deadline.saturating_duration_since(Instant::now())) => return None,
            }
        }
        None
    }

    /// Live neighbours with an HTTP server, the nearest first. Blocks for at most `timeout`; empty
    /// if discovery does not answer in that time.
    fn live_neighbours(&self, timeout: Duration) -> Vec<SocketAddr> {
        let mut live = self.discovery.neighbours(timeout).unwrap_or_default();
        live.retain(|neighbour| neighbour.silent_since.is_none());
        live.sort_by_key(|neighbour| neighbour.round_trip.unwrap_or(Duration::MAX));
        let now = Instant::now();
        live.iter()
            .filter_map(Neighbour::http)
            .filter(|http| self.health.eligibility(*http, now) != Eligibility::Never)
            .collect()
    }

    /// Sends one request in another thread. Returns false if the request pool is full.
    fn send_request<T: Send + 'static>(
        &self,
        http: SocketAddr,
        result_sender: &Sender<(SocketAddr, Option<T>)>,
        deadline: Instant,
        request: impl FnOnce(&PeerClient, Duration) -> Result<T, PeerError> + Send + 'static,
    ) -> bool {
        let (client, health, result_sender) =
            (self.client.clone(), self.health.clone(), result_sender.clone());
        self.requests.start(http.ip(), health.is_proven(http), move || {
            let began = Instant::now();
            let result = request(&client, deadline.saturating_duration_since(began));
            match &result {
                // The peer had promised nothing, and a timeout may be due to the little time left.
                Ok(_)
                | Err(
                    PeerError::NotThere
                    | PeerError::Status(_)
                    | PeerError::Unreachable(ureq::Error::Timeout(_)),
                ) => {}
                Err(e) => e.record(&health, http, began),
            }
            let _ = result_sender.try_send((http, result.ok()));
        })
    }
}
