//! HTTP calls of one tracker, by blocking ureq.

use super::answer::{ServerRefusal, TrackerError, parse_answer, parse_body};
use super::clock::SigningClock;
use crate::http_client::{self, retry_once_if_stale};
use crate::lock::{Mutex, RwLock};
use crate::nix::HashPart;
use crate::time_scale::Timeout;
use crate::wire::TrackerName;
use crate::wire::filter::BloomFilter;
use crate::wire::tracker::{
    Announce, AnnounceResponse, Candidate, CandidateList, Identity, KEY_HEADER, MAX_CANDIDATES,
    MAX_OTHERS, Proof, Role, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER, TransferInit,
    TransferInitResponse, TransferReportBody, lookup_target,
};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use ureq::Agent;
use ureq::http::Response;

/// Time limit of a call outside of lookups. No request of Nix waits for such a call.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// Time limit of the upload of a filter, which has up to 4 MiB.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Time limit of the sign-off, which delays the end of the daemon.
const LEAVE_TIMEOUT: Duration = Duration::from_millis(700);

/// Largest number of idle connections: as many as Nix runs lookups.
const MAX_IDLE: usize = 25;
/// Age after which an idle connection is closed. Trackers close theirs after 30 s.
const MAX_IDLE_AGE: Timeout = Timeout::from_secs(25);

/// This node as trackers know it.
#[derive(Debug)]
pub struct NodeIdentity {
    /// The node's key, from which a separate key for each tracker is derived.
    pub identity: Arc<Identity>,
    /// Peer ID that the user chose; without one, the key for the tracker determines it.
    pub peer_id: Option<String>,
    /// Port of the node's HTTP server.
    pub port: u16,
    /// Address to announce, if it differs from the one that the tracker sees.
    pub addr: Option<String>,
    /// Random number of this run of the daemon.
    pub instance: u64,
}

#[cfg(test)]
impl NodeIdentity {
    /// A node with the peer ID `me`.
    pub fn for_test() -> Self {
        let identity = Identity::from_seed(&[1; 32]).into();
        NodeIdentity { identity, peer_id: Some("me".into()), port: 1, addr: None, instance: 1 }
    }
}

/// HTTP client of one tracker; shared by all threads. It does not know whether the tracker is
/// reachable.
pub struct TrackerClient {
    pub(super) url: String,
    pub(super) peer_id: String,
    identity: Identity,
    /// HTTP client with kept connections.
    agent: RwLock<Agent>,
    /// HTTP client without kept connections, for a call while the kept ones may be dead.
    unpooled: Agent,
    clock: Mutex<SigningClock>,
}

impl TrackerClient {
    /// Creates a client for the tracker at `url`, which must not end with a slash, and for the node
    /// `me`.
    pub(super) fn new(url: String, me: &NodeIdentity) -> Self {
        let identity = me.identity.for_tracker(&TrackerName::of_url(&url));
        let peer_id = me.peer_id.clone().unwrap_or_else(|| identity.peer_id());
        TrackerClient {
            url,
            peer_id,
            identity,
            agent: RwLock::new(agent(MAX_IDLE)),
            unpooled: agent(0),
            clock: Mutex::default(),
        }
    }

    /// Client for lookups. `is_hedge` selects one that makes a new connection for each call.
    pub(super) fn lookup_agent(&self, is_hedge: bool) -> Agent {
        if is_hedge { self.unpooled.clone() } else { self.agent() }
    }

    /// Closes the kept connections.
    pub(super) fn close_connections(&self) {
        *self.agent.write() = agent(MAX_IDLE);
    }

    /// Returns the peers that may have a path, without this node. Blocks for `timeout` at most.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub(super) fn lookup(
        &self,
        agent: &Agent,
        hash_part: &HashPart,
        timeout: Duration,
    ) -> Result<CandidateList, TrackerError> {
        let mut found: CandidateList =
            self.get(agent, &lookup_target(hash_part), timeout).and_then(parse_answer)?;
        found.candidates.truncate(MAX_CANDIDATES);
        found.others.truncate(MAX_OTHERS);
        for list in [&mut found.candidates, &mut found.others] {
            list.retain(|candidate| candidate.peer_id != self.peer_id);
        }
        Ok(found)
    }

    /// Returns all peers without this node, the best first, of a tracker of the original peerix,
    /// which has no lookups. Blocks for `timeout` at most.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub(super) fn peers(
        &self,
        agent: &Agent,
        timeout: Duration,
    ) -> Result<Vec<Candidate>, TrackerError> {
        let answer: Value = self.get(agent, "/peers", timeout).and_then(parse_answer)?;
        let candidate = |peer: &Value| {
            let text = |field: &str| peer[field].as_str().map(str::to_owned);
            let port = u16::try_from(peer["port"].as_u64()?).ok()?;
            let score = peer["reputation"]["score"].as_f64().unwrap_or_default();
            Some(Candidate { peer_id: text("peer_id")?, addr: text("addr")?, port, score })
        };
        let peers = answer["peers"].as_array().ok_or(TrackerError::Malformed)?;
        let mut others: Vec<Candidate> = peers.iter().filter_map(candidate).collect();
        others.retain(|peer| peer.peer_id != self.peer_id);
        others.sort_by(|a, b| b.score.total_cmp(&a.score));
        others.truncate(MAX_CANDIDATES);
        Ok(others)
    }

    fn get(
        &self,
        agent: &Agent,
        path: &str,
        timeout: Duration,
    ) -> Result<Response<ureq::Body>, TrackerError> {
        let url = format!("{}{path}", self.url);
        let call = |left| agent.get(&url).config().timeout_global(Some(left)).build().call();
        retry_once_if_stale(timeout, call).map_err(TrackerError::Unreachable)
    }

    /// Announces this node. Blocks for 10 s at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub(super) fn announce(&self, me: &NodeIdentity) -> Result<AnnounceResponse, TrackerError> {
        let addr = me.addr.as_deref().unwrap_or_default();
        let signed_text = SignedText::Announce { peer_id: &self.peer_id, port: me.port, addr };
        self.send_signed(&signed_text, |proof| {
            let announce = Announce {
                peer_id: Some(self.peer_id.clone()),
                port: Some(me.port),
                addr: me.addr.clone(),
                instance: Some(me.instance),
                proof,
            };
            self.post("/announce", &announce)
        })
    }

    /// Signs off at the tracker. Blocks for 700 ms at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn leave(&self) -> Result<(), TrackerError> {
        self.send_signed(&SignedText::Leave { peer_id: &self.peer_id }, |proof| {
            let body =
                Announce { peer_id: Some(self.peer_id.clone()), proof, ..Announce::default() };
            self.agent()
                .delete(format!("{}/announce", self.url))
                .header("Content-Type", "application/json")
                .config()
                .timeout_global(Some(LEAVE_TIMEOUT))
                .build()
                .force_send_body()
                .send(json(&body))
        })
        .map(|_: IgnoredAny| ())
    }

    /// Uploads the filter of shared paths and returns the timestamp by which the tracker identifies
    /// it. Blocks for 60 s at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn put_filter(&self, filter: &BloomFilter) -> Result<u64, TrackerError> {
        let digest = ring::digest::digest(&ring::digest::SHA256, filter.as_bytes());
        let signed_text = SignedText::Filter { peer_id: &self.peer_id, digest: digest.as_ref() };
        let id = percent_encoding::utf8_percent_encode(
            &self.peer_id,
            percent_encoding::NON_ALPHANUMERIC,
        );
        let url = format!("{}/filter/{id}", self.url);
        let mut timestamp = 0;
        let answer: Result<IgnoredAny, TrackerError> = self.send_signed(&signed_text, |proof| {
            timestamp = proof.timestamp.unwrap_or_default();
            self.agent()
                .put(&url)
                .header(KEY_HEADER, proof.public_key.unwrap_or_default())
                .header(TIMESTAMP_HEADER, timestamp.to_string())
                .header(SIGNATURE_HEADER, proof.signature.unwrap_or_default())
                .config()
                .timeout_global(Some(UPLOAD_TIMEOUT))
                .build()
                .send(filter.as_bytes())
        });
        answer.map(|_| timestamp)
    }

    /// Begins up to `count` transfers from the peer `sender_id` to this node. Returns the first ID
    /// and the number of transfers, which have consecutive IDs. Blocks for 10 s at most.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn begin_transfers(&self, sender_id: &str, count: u32) -> Result<(u64, u32), TrackerError> {
        let init = TransferInit {
            sender_id: Some(sender_id.to_owned()),
            receiver_id: Some(self.peer_id.clone()),
            count: Some(count),
        };
        let response: TransferInitResponse = self
            .post("/transfer/init", &init)
            .map_err(TrackerError::Unreachable)
            .and_then(parse_answer)?;
        // The original tracker begins one transfer regardless of `count`.
        Ok((response.transfer_id, response.count.unwrap_or(1).min(count)))
    }

    /// Reports the bytes that this node sent or received. Blocks for 10 s at most per attempt.
    ///
    /// # Errors
    /// See [`TrackerError`].
    pub fn report(&self, transfer_id: u64, role: Role, bytes: u64) -> Result<(), TrackerError> {
        let signed_text =
            SignedText::Report { transfer_id, peer_id: &self.peer_id, role: role.as_str(), bytes };
        self.send_signed(&signed_text, |proof| {
            let report = TransferReportBody {
                transfer_id: Some(transfer_id),
                peer_id: Some(self.peer_id.clone()),
                role: Some(role.as_str().to_owned()),
                bytes: Some(bytes),
                proof,
            };
            self.post("/report", &report)
        })
        .map(|_: IgnoredAny| ())
    }

    fn agent(&self) -> Agent {
        self.agent.read().clone()
    }

    fn post(
        &self,
        path: &str,
        body: &impl serde::Serialize,
    ) -> Result<Response<ureq::Body>, ureq::Error> {
        self.agent()
            .post(format!("{}{path}", self.url))
            .header("Content-Type", "application/json")
            .send(json(body))
    }

    /// Signs and sends a statement. Repeats it once with the tracker's time if the tracker rejects
    /// the timestamp and its clock differs only slightly.
    fn send_signed<T: DeserializeOwned>(
        &self,
        signed_text: &SignedText<'_>,
        mut send: impl FnMut(Proof) -> Result<Response<ureq::Body>, ureq::Error>,
    ) -> Result<T, TrackerError> {
        let mut send = || {
            // A separate statement, because the lock must not be held during the call.
            let timestamp = self.clock.lock().timestamp();
            send(self.identity.sign(signed_text, timestamp)).map_err(TrackerError::Unreachable)
        };
        let response = send()?;
        if response.status() != 403 {
            return parse_answer(response);
        }
        let refusal: ServerRefusal = parse_body(response).unwrap_or_default();
        match refusal.now {
            Some(now) => {
                let offset = self.clock.lock().set(now)?;
                log::debug!("tracker {}: its clock is {offset} ms ahead of ours", self.url);
                parse_answer(send()?)
            }
            None => Err(TrackerError::Refused(403, refusal.error.unwrap_or_default(), None)),
        }
    }
}

/// Creates a client that keeps up to `idle` connections.
fn agent(idle: usize) -> Agent {
    http_client::https_config()
        .timeout_global(Some(CALL_TIMEOUT))
        .max_idle_connections(idle)
        .max_idle_connections_per_host(idle)
        .max_idle_age(MAX_IDLE_AGE.get())
        .build()
        .into()
}

fn json(body: &impl serde::Serialize) -> Vec<u8> {
    serde_json::to_vec(body).expect("text and numbers are JSON")
}
