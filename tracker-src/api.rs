//! The HTTP API: routes a request, checks limits and signatures, and answers. docs/protocol.md has
//! the table of calls.

mod error;
mod proxies;
mod request;
mod response;
mod route;

use crate::address;
use crate::clock::TrackerTime;
use crate::database::{BindOutcome, KnownIdentity, ReportOutcome, SideReport};
use crate::db_thread::DatabaseThread;
use crate::limits::{LimitKind, RateLimits};
use crate::meeting::{MeetBody, MeetingPlace, Meetings};
use crate::metrics::{CountedCall, TrackerMetrics};
use crate::reachability::{AnnouncedAddress, ReachabilityTester};
use crate::reputation::Reputation;
use crate::table::{AnnounceOutcome, Claim, ClaimRefusal, PeerAddress, TrackerTable};
use error::ApiError;
use peerix::http::body::BodyError;
use peerix::http::server::Handler;
use peerix::http::{Exchange, Request};
use peerix::lock::Mutex;
use peerix::log_throttle::LogThrottle;
use peerix::nix::HashPart;
use peerix::wire::filter::{BloomFilter, MAX_BYTES};
use peerix::wire::tracker::{
    Announce, AnnounceResponse, MAX_BODY, MAX_TRANSFER, MAX_TRANSFERS_AT_ONCE, Proof, Role,
    SignedText, TransferInit, TransferInitResponse, TransferReportBody, can_be_peer,
};
use proxies::TrustedProxies;
use request::{
    announced_addr, check_peer_id, claim, non_empty, peer_id_in, proof_in_fields, reachable_addr,
    read, unproven, verify,
};
use response::{
    ApiResponse, ApiResult, PeersBody, ReachBody, ReputationBody, StatusBody, json, status,
};
use route::{ApiRoute, route};
use scopeguard::defer;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Maximum number of filters, of up to 4 MiB each, received at once. Further uploads get 503.
const MAX_UPLOADS: usize = 8;

/// `Retry-After` of an upload that was refused by [`MAX_UPLOADS`].
const UPLOAD_RETRY: Duration = Duration::from_secs(2);

/// Maximum number of peers in `GET /peers`, best first. Nodes of the original read the whole list
/// for every path.
const MAX_LISTED: usize = 1000;

/// Lifetime of a cached `GET /peers` answer, if it has more than [`SHORT_LIST`] peers.
const LIST_TTL: Duration = Duration::from_secs(1);

/// Number of peers up to which `GET /peers` is not cached, as it is cheap.
const SHORT_LIST: usize = 100;

type CachedList = Option<(Instant, Arc<Vec<u8>>)>;

/// Answers the tracker's HTTP requests.
pub struct Api {
    table: Arc<TrackerTable>,
    database: Arc<DatabaseThread>,
    limits: RateLimits,
    metrics: TrackerMetrics,
    uploads: AtomicUsize,
    reachability: ReachabilityTester,
    proxies: TrustedProxies,
    cached_list: Mutex<CachedList>,
    meetings: Meetings,
    faults: LogThrottle,
}

impl Handler for Api {
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let from = self.proxies.client(request);
        let route = route(request.method, request.target);
        let (call, kind) =
            route.as_ref().map_or((CountedCall::Other, LimitKind::Lookup), ApiRoute::kind);
        let outcome = self
            .limit(from, kind)
            .and(route)
            .and_then(|route| self.answer(&route, request, from, exchange));
        match outcome {
            Ok(answer) => {
                self.metrics.record_answer(call, 200);
                answer.send(exchange)
            }
            Err(ApiError { connection_error: Some(e), .. }) => Err(e),
            Err(refusal) => {
                self.metrics.record_answer(call, refusal.status);
                log::debug!(
                    "{from}: {} {}: {}: {}",
                    request.method,
                    request.target,
                    refusal.status,
                    refusal.error
                );
                // Reads a small body, so that the connection can be reused: new connections cost
                // more.
                match exchange.body().read(MAX_BODY) {
                    Ok(_) | Err(BodyError::TooLarge) => refusal.send(exchange),
                    Err(BodyError::Io(e)) => Err(e),
                }
            }
        }
    }

    fn after_panic(&self, _: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        if self.faults.allow(Instant::now()) {
            log::error!("a request made a handler panic; the log has the place");
        }
        self.metrics.record_answer(CountedCall::Other, 500);
        ApiError::new(500, "internal error").send(exchange)
    }
}

impl Api {
    /// Creates the handler. `proxies` are trusted reverse proxies.
    pub fn new(
        table: Arc<TrackerTable>,
        database: Arc<DatabaseThread>,
        reachability: ReachabilityTester,
        proxies: Vec<IpAddr>,
    ) -> Self {
        Api {
            table,
            database,
            limits: RateLimits::default(),
            metrics: TrackerMetrics::default(),
            uploads: AtomicUsize::new(0),
            reachability,
            proxies: TrustedProxies(proxies),
            cached_list: Mutex::default(),
            meetings: Meetings::default(),
            faults: LogThrottle::default(),
        }
    }

    fn limit(&self, from: IpAddr, kind: LimitKind) -> Result<(), ApiError> {
        self.limits.take(from, kind, Instant::now()).map_err(|wait| {
            self.metrics.record_limited();
            ApiError::later(429, "too many requests", wait)
        })
    }

    fn answer(
        &self,
        route: &ApiRoute<'_>,
        request: &Request<'_>,
        from: IpAddr,
        exchange: &mut Exchange<'_>,
    ) -> ApiResult {
        match route {
            ApiRoute::Announce => {
                self.announce(&read(exchange)?, from, self.proxies.is_client_hidden(request))
            }
            ApiRoute::Meet => {
                self.meet(&read(exchange)?, from, self.proxies.is_client_hidden(request))
            }
            ApiRoute::Leave => self.leave(&read(exchange)?, from),
            ApiRoute::Filter(id) => self.filter(&peer_id_in(id)?, request, exchange),
            ApiRoute::Lookup(hash_part) => self.lookup(hash_part),
            ApiRoute::Peers => self.peers(),
            ApiRoute::TransferInit => self.begin_transfers(read(exchange)?, from),
            ApiRoute::Report => self.report(read(exchange)?, from),
            ApiRoute::Reputation(id) => {
                let id = peer_id_in(id)?;
                json(&ReputationBody::new(Some(&id), &self.database.reputation(&id)?))
            }
            ApiRoute::Health => {
                self.database.probe().map_err(ApiError::from).and_then(|()| status("ok"))
            }
            ApiRoute::Reach(port) => self.reach(port, request, from),
            ApiRoute::Metrics => Ok(ApiResponse::Metrics(
                self.metrics.page(self.table.counts(), self.database.stats()),
            )),
        }
    }

    fn announce(&self, body: &Announce, from: IpAddr, is_client_hidden: bool) -> ApiResult {
        let (Some(id), Some(port)) = (non_empty(&body.peer_id), body.port) else {
            return Err(ApiError::new(400, "peer_id and port required"));
        };
        check_peer_id("peer_id", id)?;
        if port == 0 {
            return Err(ApiError::new(400, "port: not from 1 to 65535"));
        }
        let addr = announced_addr(&body.addr, from, is_client_hidden)?;
        let signed = body.addr.as_deref().unwrap_or_default();
        let signed_text = SignedText::Announce { peer_id: id, port, addr: signed };
        let now = TrackerTime::now();
        let (claim, known) = self.check_proof(id, &body.proof, &signed_text, now)?;
        let reputation = if known { None } else { Some(self.bind_identity(id, claim.as_ref())?) };
        log::debug!("{id} announces itself at {addr}, port {port}");
        let address = PeerAddress { addr, port, from };
        let outcome = self.table.announce(
            id,
            address.clone(),
            claim.as_ref(),
            body.instance,
            reputation,
            now,
        )?;
        self.after_announce(id, address, &outcome);
        if claim.is_none() {
            return status("ok");
        }
        let tracker = Some(self.database.tracker_id().to_owned());
        json(&AnnounceResponse {
            status: "ok".into(),
            tracker,
            filter: outcome.filter,
            bits_per_path: Some(self.table.bits_per_path()),
            reachable: outcome.reachable,
            also_at: outcome.also_at.map(|ip| ip.to_string()),
        })
    }

    /// Checks a request for an ID: its time, its key and its signature. Returns its claim, if it is
    /// signed, and whether the peer is live and the database need not be asked about it.
    fn check_proof(
        &self,
        id: &str,
        proof: &Proof,
        signed_text: &SignedText<'_>,
        now: TrackerTime,
    ) -> Result<(Option<Claim>, bool), ApiError> {
        let claim = claim(proof)?;
        let known = self.table.check(id, claim.as_ref(), now)?;
        verify(proof, signed_text)?;
        Ok((claim, known))
    }

    /// Passes an announce that the table accepted to the database and to the reachability tests.
    /// Does not block.
    fn after_announce(&self, id: &str, address: PeerAddress, outcome: &AnnounceOutcome) {
        if outcome.first_today {
            self.database.record_seen(id);
        }
        if outcome.has_moved {
            self.database.record_address(id, &address);
        }
        if outcome.needs_reach_test {
            let PeerAddress { addr, port, .. } = address;
            self.reachability.request_test(AnnouncedAddress { id: id.to_owned(), addr, port });
        }
    }

    /// Returns the reputation of an ID. Binds the ID to the claim's key, if there is one; the
    /// binding is durable when this returns. Blocks while the database is busy, for 10 s at most.
    fn bind_identity(&self, id: &str, claim: Option<&Claim>) -> Result<Reputation, ApiError> {
        let refusal = match claim {
            Some(claim) => match self.database.bind(id, claim.key)? {
                BindOutcome::Bound(reputation) => return Ok(reputation),
                BindOutcome::OtherKey => ClaimRefusal::OtherKey,
                BindOutcome::Full => ClaimRefusal::Full,
            },
            None => match self.database.known_identity(id)? {
                KnownIdentity { key: None, reputation } => return Ok(reputation),
                KnownIdentity { key: Some(_), .. } => ClaimRefusal::Bound,
            },
        };
        Err(refusal.into())
    }

    fn meet(&self, body: &MeetBody, from: IpAddr, is_client_hidden: bool) -> ApiResult {
        if body.port == Some(0) {
            return Err(ApiError::new(400, "port: not from 1 to 65535"));
        }
        // A node at which nobody would be found only learns where its friends are.
        let addr = reachable_addr(&body.addr, from, is_client_hidden)?;
        let own = body.port.zip(addr).map(|(port, addr)| MeetingPlace { addr, port });
        let met = self.meetings.meet(&body.tags, own.as_ref(), from, Instant::now());
        json(&met.map_err(|why| ApiError::new(400, why))?)
    }

    fn leave(&self, body: &Announce, from: IpAddr) -> ApiResult {
        let id = non_empty(&body.peer_id).ok_or_else(|| ApiError::new(400, "peer_id required"))?;
        check_peer_id("peer_id", id)?;
        let now = TrackerTime::now();
        let (claim, _) =
            self.check_proof(id, &body.proof, &SignedText::Leave { peer_id: id }, now)?;
        self.table.leave(id, claim.as_ref(), from, now)?;
        self.database.remove_live(vec![id.into()], self.table.clone());
        log::debug!("{id} leaves");
        status("ok")
    }

    fn filter(&self, id: &str, request: &Request<'_>, exchange: &mut Exchange<'_>) -> ApiResult {
        let proof = proof_in_fields(request)?;
        let claim = claim(&proof)?.ok_or_else(unproven)?;
        if request.body_len > MAX_BYTES as u64 {
            return Err(BodyError::TooLarge.into());
        }
        if BloomFilter::size_for(request.body_len * 8) != request.body_len * 8 {
            return Err(ApiError::new(400, "body: of a size that filters do not have"));
        }
        // All checks that need no body come first, so that refused uploads are not read.
        self.table.may_publish(id, &claim, TrackerTime::now())?;
        let uploads = self.uploads.fetch_add(1, Ordering::Relaxed);
        defer! {
            self.uploads.fetch_sub(1, Ordering::Relaxed);
        }
        if uploads >= MAX_UPLOADS {
            return Err(ApiError::later(503, "too many filters at once", UPLOAD_RETRY));
        }
        let bits = exchange.body().read(MAX_BYTES)?;
        let digest = ring::digest::digest(&ring::digest::SHA256, &bits);
        verify(&proof, &SignedText::Filter { peer_id: id, digest: digest.as_ref() })?;
        let filter = BloomFilter::parse(bits).map_err(|e| ApiError::new(400, e.to_string()))?;
        if filter.is_overfull() {
            return Err(ApiError::new(
                400,
                "body: more bits are set than a filter of its size may have",
            ));
        }
        let (now, bits) = (TrackerTime::now(), filter.as_bytes().to_vec());
        self.table.publish(id, &claim, filter, now)?;
        self.database.record_filter(id, claim.timestamp, bits);
        log::debug!("{id} publishes a filter of {} bytes", request.body_len);
        status("ok")
    }

    fn lookup(&self, hash_part: &str) -> ApiResult {
        let hash_part =
            HashPart::parse(hash_part.as_bytes()).map_err(|e| ApiError::new(400, e.to_string()))?;
        let found = self.table.lookup(&hash_part, TrackerTime::now());
        self.metrics.record_candidates(found.candidates.len());
        json(&found)
    }

    fn peers(&self) -> ApiResult {
        let now = TrackerTime::now();
        let cached = self.cached_list.lock().clone();
        if let Some((at, body)) = cached.filter(|_| self.table.counts().peers > SHORT_LIST)
            && now.at.saturating_duration_since(at) < LIST_TTL
        {
            return Ok(ApiResponse::Json(body.to_vec()));
        }
        let best = self.table.best_peers(MAX_LISTED, now);
        let answer = json(&PeersBody::new(&best))?;
        if let ApiResponse::Json(body) = &answer {
            *self.cached_list.lock() = Some((now.at, Arc::new(body.clone())));
        }
        Ok(answer)
    }

    fn reach(&self, port: &str, request: &Request<'_>, from: IpAddr) -> ApiResult {
        let port = port.parse().ok().filter(|port| *port != 0);
        let port: u16 = port.ok_or_else(|| ApiError::new(400, "port: not from 1 to 65535"))?;
        if !can_be_peer(from) {
            return Err(ApiError::new(400, format!("no other peer can reach {from}")));
        }
        if self.proxies.is_client_hidden(request) {
            return Err(ApiError::new(
                400,
                "asked through a proxy, which is what would be reached",
            ));
        }
        let reached = self.reachability.test_client((from, port).into())?;
        json(&ReachBody { addr: from, port, reached })
    }

    fn begin_transfers(&self, body: TransferInit, from: IpAddr) -> ApiResult {
        let (Some(sender), Some(receiver)) =
            (non_empty(&body.sender_id), non_empty(&body.receiver_id))
        else {
            return Err(ApiError::new(400, "sender_id and receiver_id required"));
        };
        check_peer_id("sender_id", sender)?;
        check_peer_id("receiver_id", receiver)?;
        if sender == receiver {
            return Err(ApiError::new(400, "sender_id and receiver_id are the same"));
        }
        let count = body.count.unwrap_or(1);
        if !(1..=MAX_TRANSFERS_AT_ONCE).contains(&count) {
            return Err(ApiError::new(
                400,
                format!("count: not from 1 to {MAX_TRANSFERS_AT_ONCE}"),
            ));
        }
        self.limits.charge(from, LimitKind::Transfer, count - 1, Instant::now());
        self.limit(from, LimitKind::Stored)?;
        self.limits.charge(from, LimitKind::Stored, count - 1, Instant::now());
        let transfer_id =
            self.database.begin_transfers(sender.to_owned(), receiver.to_owned(), count)?;
        self.metrics.record_transfers(count);
        json(&TransferInitResponse { transfer_id, count: body.count })
    }

    fn report(&self, body: TransferReportBody, from: IpAddr) -> ApiResult {
        let given_id = body.transfer_id.filter(|id| *id != 0);
        let (Some(transfer), Some(id), Some(role), Some(bytes)) =
            (given_id, non_empty(&body.peer_id), non_empty(&body.role), body.bytes)
        else {
            return Err(ApiError::new(400, "transfer_id, peer_id, role, and bytes required"));
        };
        let role = match role {
            "sender" => Role::Sender,
            "receiver" => Role::Receiver,
            _ => return Err(ApiError::new(400, "role must be 'sender' or 'receiver'")),
        };
        check_peer_id("peer_id", id)?;
        if bytes > MAX_TRANSFER {
            return Err(ApiError::new(400, format!("bytes: more than {MAX_TRANSFER}")));
        }
        let side = role.as_str();
        let signed_text =
            SignedText::Report { transfer_id: transfer, peer_id: id, role: side, bytes };
        let now = TrackerTime::now();
        let (claim, _) = self.check_proof(id, &body.proof, &signed_text, now)?;
        if let Some(claim) = &claim {
            self.table.record_known_claim(id, claim, now)?;
        }
        let key = claim.map(|claim| claim.key);
        let network = address::network(from);
        let report = SideReport { transfer, peer_id: id.to_owned(), role, bytes, key, network };
        match self.database.report(report)? {
            ReportOutcome::Pending => status("pending"),
            ReportOutcome::Resolved(consistent) => {
                self.metrics.record_resolved(consistent);
                json(&StatusBody { status: "resolved", consistent: Some(consistent) })
            }
            ReportOutcome::NotFound => Err(ApiError::new(404, "transfer not found")),
            ReportOutcome::AlreadyResolved => Err(ApiError::new(409, "transfer already resolved")),
            ReportOutcome::WrongPeer => {
                Err(ApiError::new(403, format!("peer_id does not match {side}")))
            }
            ReportOutcome::SameSideAgain => {
                Err(ApiError::new(409, format!("{side} already reported")))
            }
            ReportOutcome::Unproven => Err(ClaimRefusal::Bound.into()),
        }
    }
}
