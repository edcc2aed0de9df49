//! The HTTP API: routes a request, checks limits and signatures, and answers. docs/protocol.md has
//! the table of calls.

use crate::address;
use crate::clock::TrackerTime;
use crate::database::{BindOutcome, ReportOutcome, SideReport};
use crate::db_thread::{DatabaseThread, DatabaseUnavailable};
use crate::limits::{LimitKind, RateLimits};
use crate::meeting::{MeetBody, MeetingPlace, Meetings};
use crate::metrics::{CountedCall, TrackerMetrics};
use crate::reachability::{AnnouncedAddress, ClientTestRefusal, ReachabilityTester};
use crate::reputation::Reputation;
use crate::table::{Claim, ClaimRefusal, PeerAddress, PeerRow, TrackerTable};
use data_encoding::BASE64;
use peerix::http::body::BodyError;
use peerix::http::server::Handler;
use peerix::http::{Exchange, Request};
use peerix::lock::Mutex;
use peerix::log_throttle::LogThrottle;
use peerix::nix::HashPart;
use peerix::wire::filter::{BloomFilter, MAX_BYTES};
use peerix::wire::tracker::{
    Announce, AnnounceResponse, KEY_HEADER, MAX_BODY, MAX_TRANSFER, MAX_TRANSFERS_AT_ONCE, Proof,
    ProofCheck, Role, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER, TransferInit,
    TransferInitResponse, TransferReportBody, can_be_peer, is_peer_id,
};
use percent_encoding::percent_decode_str;
use scopeguard::defer;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Maximum length of a request target in bytes. A percent-encoded peer ID of 128 bytes fits. Longer
/// targets get 400.
const MAX_TARGET: usize = 1024;

/// Maximum number of filters, of up to 4 MiB each, received at once. Further uploads get 503.
const MAX_UPLOADS: usize = 8;

/// `Retry-After` in seconds of an upload that was refused by [`MAX_UPLOADS`].
const UPLOAD_RETRY_SECONDS: u64 = 2;

/// `Retry-After` in seconds of a refused `GET /reach`. A test takes no longer.
const REACH_RETRY_SECONDS: u64 = 2;

/// Header fields that mark a proxied request, whose source address is the proxy's.
const PROXY_FIELDS: [&str; 4] = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

/// `Retry-After` in seconds when a table is full or the database is unavailable.
const FULL_RETRY_SECONDS: u64 = 60;

/// Maximum number of peers in `GET /peers`, best first. Nodes of the original read the whole list
/// for every path.
const MAX_LISTED: usize = 1000;

/// Lifetime of a cached `GET /peers` answer, if it has more than [`SHORT_LIST`] peers.
const LIST_TTL: Duration = Duration::from_secs(1);

/// Number of peers up to which `GET /peers` is not cached, as it is cheap.
const SHORT_LIST: usize = 100;

/// Why a request fails.
#[derive(Debug)]
struct ApiError {
    status: u16,
    error: String,
    /// `Retry-After` in seconds.
    retry_after: Option<u64>,
    /// The tracker's time in milliseconds since 1970, for a node whose clock differs.
    now: Option<u64>,
    /// Methods that the path supports, for 405.
    allow: Option<&'static str>,
    /// Set if the connection broke: no answer is possible.
    connection_error: Option<io::Error>,
}

impl ApiError {
    fn new(status: u16, error: impl Into<String>) -> Self {
        ApiError {
            status,
            error: error.into(),
            retry_after: None,
            now: None,
            allow: None,
            connection_error: None,
        }
    }

    fn later(status: u16, error: impl Into<String>, seconds: u64) -> Self {
        ApiError { retry_after: Some(seconds), ..ApiError::new(status, error) }
    }
}

impl From<BodyError> for ApiError {
    fn from(e: BodyError) -> Self {
        match e {
            BodyError::TooLarge => ApiError::new(413, "body: too large"),
            BodyError::Io(e) => {
                ApiError { connection_error: Some(e), ..ApiError::new(400, "body: incomplete") }
            }
        }
    }
}

impl From<DatabaseUnavailable> for ApiError {
    fn from(e: DatabaseUnavailable) -> Self {
        ApiError::later(503, e.to_string(), FULL_RETRY_SECONDS)
    }
}

impl From<(ClaimRefusal, TrackerTime)> for ApiError {
    fn from((refused, now): (ClaimRefusal, TrackerTime)) -> Self {
        match refused {
            ClaimRefusal::Bound => ApiError::new(403, "peer_id: bound to a key, which has to sign"),
            ClaimRefusal::OtherKey => ApiError::new(403, "peer_id: bound to another key"),
            ClaimRefusal::Time(why) => ApiError { now: Some(now.ms), ..ApiError::new(403, why) },
            ClaimRefusal::NotHere => ApiError::new(404, "announce first"),
            ClaimRefusal::OtherAddress => {
                ApiError::new(403, "peer_id: announced from another address")
            }
            ClaimRefusal::TooSoon(wait) => {
                ApiError::later(429, "too soon after the last one", whole_seconds(wait))
            }
            ClaimRefusal::Full => ApiError::later(503, "no room for more", FULL_RETRY_SECONDS),
        }
    }
}

fn whole_seconds(wait: Duration) -> u64 {
    wait.as_secs() + u64::from(wait.subsec_nanos() > 0)
}

/// The body of a 200 answer.
enum ApiResponse {
    Json(Vec<u8>),
    Text(String),
}

type ApiResult = Result<ApiResponse, ApiError>;

#[derive(Serialize)]
struct StatusBody {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    consistent: Option<bool>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    now: Option<u64>,
}

#[derive(Serialize)]
struct ReachBody {
    addr: IpAddr,
    port: u16,
    reached: bool,
}

#[derive(Serialize)]
struct ReputationBody<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_id: Option<&'a str>,
    total_shared: u64,
    total_received: u64,
    successful_transfers: u64,
    failed_transfers: u64,
    score: f64,
}

impl<'a> ReputationBody<'a> {
    fn new(peer_id: Option<&'a str>, of: &Reputation) -> Self {
        ReputationBody {
            peer_id,
            total_shared: of.shared,
            total_received: of.received,
            successful_transfers: of.successful,
            failed_transfers: of.failed,
            score: of.rounded_score(),
        }
    }
}

#[derive(Serialize)]
struct PeerBody<'a> {
    peer_id: &'a str,
    addr: &'a str,
    port: u16,
    last_seen: f64,
    reputation: ReputationBody<'a>,
}

#[derive(Serialize)]
struct PeersBody<'a> {
    peers: Vec<PeerBody<'a>>,
}

fn json(body: &impl Serialize) -> ApiResult {
    let bytes = serde_json::to_vec(body).map_err(|e| ApiError::new(500, format!("answer: {e}")))?;
    Ok(ApiResponse::Json(bytes))
}

fn status(status: &'static str) -> ApiResult {
    json(&StatusBody { status, consistent: None })
}

type CachedList = Option<(Instant, Arc<Vec<u8>>)>;

/// Answers the tracker's HTTP requests.
pub struct Api {
    table: Arc<TrackerTable>,
    database: Arc<DatabaseThread>,
    limits: RateLimits,
    metrics: TrackerMetrics,
    uploads: AtomicUsize,
    reachability: ReachabilityTester,
    /// Trusted reverse proxies. Their `X-Forwarded-For` has the client's address.
    proxies: Vec<IpAddr>,
    cached_list: Mutex<CachedList>,
    meetings: Meetings,
    faults: LogThrottle,
}

/// The call that a request makes.
enum ApiRoute<'a> {
    Announce,
    Leave,
    Meet,
    Filter(&'a str),
    Lookup(&'a str),
    Peers,
    TransferInit,
    Report,
    Reputation(&'a str),
    Health,
    Metrics,
    Reach(&'a str),
}

impl ApiRoute<'_> {
    /// The call's metrics label and its rate limit.
    fn kind(&self) -> (CountedCall, LimitKind) {
        match self {
            ApiRoute::Announce => (CountedCall::Announce, LimitKind::Announce),
            ApiRoute::Leave => (CountedCall::Leave, LimitKind::Announce),
            ApiRoute::Meet => (CountedCall::Meet, LimitKind::Announce),
            ApiRoute::Filter(_) => (CountedCall::Filter, LimitKind::Filter),
            ApiRoute::Lookup(_) => (CountedCall::Lookup, LimitKind::Lookup),
            ApiRoute::Peers => (CountedCall::Peers, LimitKind::List),
            ApiRoute::TransferInit => (CountedCall::TransferInit, LimitKind::Transfer),
            ApiRoute::Report => (CountedCall::Report, LimitKind::Transfer),
            ApiRoute::Reputation(_) => (CountedCall::Reputation, LimitKind::Transfer),
            ApiRoute::Health => (CountedCall::Health, LimitKind::Lookup),
            ApiRoute::Metrics => (CountedCall::Metrics, LimitKind::List),
            ApiRoute::Reach(_) => (CountedCall::Reach, LimitKind::Reach),
        }
    }
}

fn route<'a>(method: &str, target: &'a str) -> Result<ApiRoute<'a>, ApiError> {
    if target.len() > MAX_TARGET {
        return Err(ApiError::new(400, "target: too long"));
    }
    let path = target.split('?').next().unwrap_or_default();
    let get = matches!(method, "GET" | "HEAD");
    let (route, allow) = match path {
        "/announce" if method == "DELETE" => (Some(ApiRoute::Leave), ""),
        "/announce" => ((method == "POST").then_some(ApiRoute::Announce), "POST, DELETE"),
        "/meet" => ((method == "POST").then_some(ApiRoute::Meet), "POST"),
        "/transfer/init" => ((method == "POST").then_some(ApiRoute::TransferInit), "POST"),
        "/report" => ((method == "POST").then_some(ApiRoute::Report), "POST"),
        "/peers" => (get.then_some(ApiRoute::Peers), "GET, HEAD"),
        "/health" => (get.then_some(ApiRoute::Health), "GET, HEAD"),
        "/metrics" => (get.then_some(ApiRoute::Metrics), "GET, HEAD"),
        _ => match path.strip_prefix('/').and_then(|path| path.split_once('/')) {
            Some(("lookup", rest)) => (get.then_some(ApiRoute::Lookup(rest)), "GET, HEAD"),
            Some(("reputation", rest)) => (get.then_some(ApiRoute::Reputation(rest)), "GET, HEAD"),
            Some(("reach", rest)) => (get.then_some(ApiRoute::Reach(rest)), "GET, HEAD"),
            Some(("filter", rest)) => ((method == "PUT").then_some(ApiRoute::Filter(rest)), "PUT"),
            _ => return Err(ApiError::new(404, "not found")),
        },
    };
    route.ok_or_else(|| ApiError { allow: Some(allow), ..ApiError::new(405, "method not allowed") })
}

impl Handler for Api {
    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let from = self.client(request);
        let (call, outcome) = match route(request.method, request.target) {
            Ok(route) => {
                let (call, kind) = route.kind();
                (
                    call,
                    self.limit(from, kind)
                        .and_then(|()| self.answer(&route, request, from, exchange)),
                )
            }
            Err(refusal) => {
                (CountedCall::Other, self.limit(from, LimitKind::Lookup).and(Err(refusal)))
            }
        };
        match outcome {
            Ok(answer) => {
                self.metrics.record_answer(call, 200);
                let (kind, body) = match &answer {
                    ApiResponse::Json(body) => ("application/json", body.as_slice()),
                    ApiResponse::Text(body) => {
                        ("text/plain; version=0.0.4; charset=utf-8", body.as_bytes())
                    }
                };
                exchange.send(200, &[("Content-Type", kind)], body)
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
                    Ok(_) | Err(BodyError::TooLarge) => refuse(&refusal, exchange),
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
        refuse(&ApiError::new(500, "internal error"), exchange)
    }
}

fn refuse(refusal: &ApiError, exchange: &mut Exchange<'_>) -> io::Result<()> {
    let body = serde_json::to_vec(&ErrorBody { error: &refusal.error, now: refusal.now })?;
    let retry_after = refusal.retry_after.map(|seconds| seconds.max(1).to_string());
    let mut fields = vec![("Content-Type", "application/json")];
    fields.extend(retry_after.as_deref().map(|seconds| ("Retry-After", seconds)));
    fields.extend(refusal.allow.map(|allow| ("Allow", allow)));
    exchange.send(refusal.status, &fields, &body)
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
            proxies,
            cached_list: Mutex::default(),
            meetings: Meetings::default(),
            faults: LogThrottle::default(),
        }
    }

    /// The client's address: the socket's peer, or what a trusted proxy reports.
    fn client(&self, request: &Request<'_>) -> IpAddr {
        self.forwarded_client(request).unwrap_or(request.peer_address.ip().to_canonical())
    }

    /// The client's address according to a trusted proxy: the last one in `X-Forwarded-For`, which
    /// the proxy itself added. The client may have forged what precedes it.
    fn forwarded_client(&self, request: &Request<'_>) -> Option<IpAddr> {
        if !self.proxies.contains(&request.peer_address.ip().to_canonical()) {
            return None;
        }
        let last = request.last_field("X-Forwarded-For")?.rsplit(',').next()?;
        last.trim().parse().ok().map(|client: IpAddr| client.to_canonical())
    }

    /// Whether the request came through a proxy and the client's address is unknown.
    fn is_forwarded(&self, request: &Request<'_>) -> bool {
        let is_ours = self.proxies.contains(&request.peer_address.ip().to_canonical());
        self.forwarded_client(request).is_none()
            && (is_ours || PROXY_FIELDS.iter().any(|field| request.has(field)))
    }

    fn limit(&self, from: IpAddr, kind: LimitKind) -> Result<(), ApiError> {
        self.limits.take(from, kind, Instant::now()).map_err(|wait| {
            self.metrics.record_limited();
            ApiError::later(429, "too many requests", whole_seconds(wait))
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
            ApiRoute::Announce => self.announce(&read(exchange)?, from, self.is_forwarded(request)),
            ApiRoute::Meet => self.meet(&read(exchange)?, from, self.is_forwarded(request)),
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
            ApiRoute::Metrics => {
                Ok(ApiResponse::Text(self.metrics.page(self.table.counts(), self.database.stats())))
            }
        }
    }

    fn announce(&self, body: &Announce, from: IpAddr, is_forwarded: bool) -> ApiResult {
        let (Some(id), Some(port)) = (non_empty(&body.peer_id), body.port) else {
            return Err(ApiError::new(400, "peer_id and port required"));
        };
        check_peer_id("peer_id", id)?;
        if port == 0 {
            return Err(ApiError::new(400, "port: not from 1 to 65535"));
        }
        let addr = reachable_addr(&body.addr, from, is_forwarded)?.ok_or_else(|| {
            let why = if is_forwarded {
                "the request came through a proxy; set --announce-addr, or --proxy of the tracker"
            } else {
                "no other peer can reach the request's source; set --announce-addr"
            };
            ApiError::new(400, format!("addr: required, as {why}"))
        })?;
        let claim = claim(&body.proof)?;
        let now = TrackerTime::now();
        let known = self.table.check(id, claim.as_ref(), now).map_err(|e| (e, now))?;
        let signed = body.addr.as_deref().unwrap_or_default();
        verify(&body.proof, &SignedText::Announce { peer_id: id, port, addr: signed })?;
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
        );
        let outcome = outcome.map_err(|e| (e, now))?;
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

    /// Returns the reputation of an ID. Binds the ID to the claim's key, if there is one; the
    /// binding is durable when this returns. Blocks while the database is busy, for 10 s at most.
    fn bind_identity(&self, id: &str, claim: Option<&Claim>) -> Result<Reputation, ApiError> {
        let refused = |refused| ApiError::from((refused, TrackerTime::now()));
        match claim {
            Some(claim) => match self.database.bind(id, claim.key)? {
                BindOutcome::Bound(reputation) => Ok(reputation),
                BindOutcome::OtherKey => Err(refused(ClaimRefusal::OtherKey)),
                BindOutcome::Full => Err(refused(ClaimRefusal::Full)),
            },
            None => {
                let known = self.database.known_identity(id)?;
                if known.key.is_some() {
                    Err(refused(ClaimRefusal::Bound))
                } else {
                    Ok(known.reputation)
                }
            }
        }
    }

    fn meet(&self, body: &MeetBody, from: IpAddr, is_forwarded: bool) -> ApiResult {
        if body.port == Some(0) {
            return Err(ApiError::new(400, "port: not from 1 to 65535"));
        }
        // A node at which nobody would be found only learns where its friends are.
        let addr = reachable_addr(&body.addr, from, is_forwarded)?;
        let own = body.port.zip(addr).map(|(port, addr)| MeetingPlace { addr, port });
        let met = self.meetings.meet(&body.tags, own.as_ref(), from, Instant::now());
        json(&met.map_err(|why| ApiError::new(400, why))?)
    }

    fn leave(&self, body: &Announce, from: IpAddr) -> ApiResult {
        let id = non_empty(&body.peer_id).ok_or_else(|| ApiError::new(400, "peer_id required"))?;
        check_peer_id("peer_id", id)?;
        let claim = claim(&body.proof)?;
        let now = TrackerTime::now();
        self.table.check(id, claim.as_ref(), now).map_err(|e| (e, now))?;
        verify(&body.proof, &SignedText::Leave { peer_id: id })?;
        self.table.leave(id, claim.as_ref(), from, now).map_err(|e| (e, now))?;
        self.database.remove_live(vec![id.into()], self.table.clone());
        log::debug!("{id} leaves");
        status("ok")
    }

    fn filter(&self, id: &str, request: &Request<'_>, exchange: &mut Exchange<'_>) -> ApiResult {
        let proof = Proof {
            public_key: request.field(KEY_HEADER).map(str::to_owned),
            timestamp: request
                .field(TIMESTAMP_HEADER)
                .map(str::parse)
                .transpose()
                .map_err(|_| unproven())?,
            signature: request.field(SIGNATURE_HEADER).map(str::to_owned),
        };
        let claim = claim(&proof)?.ok_or_else(unproven)?;
        if request.body_len > MAX_BYTES as u64 {
            return Err(BodyError::TooLarge.into());
        }
        if BloomFilter::size_for(request.body_len * 8) != request.body_len * 8 {
            return Err(ApiError::new(400, "body: of a size that filters do not have"));
        }
        // All checks that need no body come first, so that refused uploads are not read.
        let before = TrackerTime::now();
        self.table.may_publish(id, &claim, before).map_err(|e| (e, before))?;
        let uploads = self.uploads.fetch_add(1, Ordering::Relaxed);
        defer! {
            self.uploads.fetch_sub(1, Ordering::Relaxed);
        }
        if uploads >= MAX_UPLOADS {
            return Err(ApiError::later(503, "too many filters at once", UPLOAD_RETRY_SECONDS));
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
        self.table.publish(id, &claim, filter, now).map_err(|e| (e, now))?;
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
        let answer = json(&PeersBody { peers: best.iter().map(listed).collect() })?;
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
        if self.is_forwarded(request) {
            return Err(ApiError::new(
                400,
                "asked through a proxy, which is what would be reached",
            ));
        }
        let reached =
            self.reachability.test_client((from, port).into()).map_err(
                |refusal| match refusal {
                    ClientTestRefusal::SameHousehold => {
                        ApiError::later(429, "one at a time", REACH_RETRY_SECONDS)
                    }
                    ClientTestRefusal::TooMany => {
                        ApiError::later(503, "too many at once", REACH_RETRY_SECONDS)
                    }
                },
            )?;
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
        let (role, side) = match role {
            "sender" => (Role::Sender, "sender"),
            "receiver" => (Role::Receiver, "receiver"),
            _ => return Err(ApiError::new(400, "role must be 'sender' or 'receiver'")),
        };
        check_peer_id("peer_id", id)?;
        if bytes > MAX_TRANSFER {
            return Err(ApiError::new(400, format!("bytes: more than {MAX_TRANSFER}")));
        }
        let claim = claim(&body.proof)?;
        let now = TrackerTime::now();
        self.table.check(id, claim.as_ref(), now).map_err(|e| (e, now))?;
        verify(
            &body.proof,
            &SignedText::Report { transfer_id: transfer, peer_id: id, role: side, bytes },
        )?;
        if let Some(claim) = &claim {
            self.table.record_known_claim(id, claim, now).map_err(|e| (e, now))?;
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
            ReportOutcome::Unproven => Err((ClaimRefusal::Bound, now).into()),
        }
    }
}

/// Returns the address at which others reach a node: the one that it gives, or the source address
/// of its request. `None` if the former is missing and the latter is a proxy's or no peer's.
fn reachable_addr(
    addr: &Option<String>,
    from: IpAddr,
    is_forwarded: bool,
) -> Result<Option<String>, ApiError> {
    match non_empty(addr) {
        Some(addr) => {
            address::check(addr).map_err(|why| ApiError::new(400, why))?;
            Ok(Some(addr.to_owned()))
        }
        None => Ok((!is_forwarded && can_be_peer(from)).then(|| from.to_string())),
    }
}

fn listed(row: &PeerRow) -> PeerBody<'_> {
    PeerBody {
        peer_id: &row.peer_id,
        addr: &row.address.addr,
        port: row.address.port,
        last_seen: row.last_seen_ms as f64 / 1000.0,
        reputation: ReputationBody::new(None, &row.reputation),
    }
}

/// Reads and parses the JSON body.
fn read<T: DeserializeOwned>(exchange: &mut Exchange<'_>) -> Result<T, ApiError> {
    let body = exchange.body().read(MAX_BODY)?;
    // serde's error messages are not passed on, as they repeat the input.
    serde_json::from_slice(&body).map_err(|e| {
        let what =
            if e.is_data() { "a field of another type, or out of range" } else { "not JSON" };
        ApiError::new(400, format!("body: {what}, at line {}, column {}", e.line(), e.column()))
    })
}

/// An empty field counts as absent, as in the original.
fn non_empty(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

fn check_peer_id(field: &str, id: &str) -> Result<(), ApiError> {
    if is_peer_id(id) {
        Ok(())
    } else {
        Err(ApiError::new(400, format!("{field}: too long, or has control characters")))
    }
}

fn peer_id_in(segment: &str) -> Result<String, ApiError> {
    let id = percent_decode_str(segment)
        .decode_utf8()
        .map_err(|_| ApiError::new(400, "peer_id: not UTF-8"))?;
    check_peer_id("peer_id", &id)?;
    Ok(id.into_owned())
}

fn unproven() -> ApiError {
    ApiError::new(403, "public_key, timestamp and signature: missing or malformed")
}

/// Parses the key and time of a signed request. The signature is not checked yet.
fn claim(proof: &Proof) -> Result<Option<Claim>, ApiError> {
    let (key, timestamp, signature) = match (&proof.public_key, proof.timestamp, &proof.signature) {
        (None, None, None) => return Ok(None),
        (Some(key), Some(timestamp), Some(signature)) => (key, timestamp, signature),
        _ => return Err(unproven()),
    };
    let bytes = |text: &str| BASE64.decode(text.as_bytes()).ok();
    let key = bytes(key).and_then(|key| key.try_into().ok()).ok_or_else(unproven)?;
    bytes(signature).filter(|bytes| bytes.len() == 64).ok_or_else(unproven)?;
    Ok(Some(Claim { key, timestamp }))
}

fn verify(proof: &Proof, signed_text: &SignedText<'_>) -> Result<(), ApiError> {
    match proof.check(signed_text) {
        ProofCheck::Unsigned | ProofCheck::By(..) => Ok(()),
        ProofCheck::Wrong => Err(ApiError::new(403, "signature: wrong")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reachable_addr_is_never_that_of_proxy_or_of_no_peer() {
        let source = IpAddr::from([203, 0, 113, 7]);
        let of = |addr: Option<&str>, from, is_forwarded| {
            let addr = addr.map(str::to_owned);
            reachable_addr(&addr, from, is_forwarded).map_err(|refused| refused.status)
        };
        assert_eq!(of(None, source, false), Ok(Some("203.0.113.7".into())));
        assert_eq!(of(Some(""), source, false), Ok(Some("203.0.113.7".into())));
        assert_eq!(of(None, source, true), Ok(None));
        assert_eq!(of(None, IpAddr::from([127, 0, 0, 1]), false), Ok(None));
        assert_eq!(of(Some("a.example"), source, true), Ok(Some("a.example".into())));
        for bad in ["127.0.0.1", "localhost", "a b", "169.254.169.254"] {
            assert_eq!(of(Some(bad), source, false), Err(400), "{bad}");
        }
    }
}
