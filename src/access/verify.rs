//! Verifies that the upstream cache has the same path: sharing it over WAN then reveals nothing
//! that upstream does not publish.
//!
//! A stored signature by upstream's key proves it offline. Otherwise [`Verifier`] asks the upstream
//! cache. If upstream lacks the path it is asked again later, as paths are often built first and
//! uploaded afterwards. A path that is not known to be equal counts as not verified.

use crate::backoff::{Backoff, retry_after};
use crate::bounded_map::BoundedMap;
use crate::config::{Config, DEFAULT_UPSTREAM, UPSTREAM_KEY};
use crate::http_client;
use crate::lock::{Condvar, Mutex};
use crate::log_throttle::LogThrottle;
use crate::nix::{HashPart, Malformed, NarHash, NarInfo, PathInfo, PublicKey, StoreDir};
use crate::time_scale::Interval;
use scopeguard::defer;
use std::collections::HashSet;
use std::fmt;
use std::io::Read;
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::http::Response;

/// Most signatures with upstream's key name that are checked per path; further ones are ignored. A
/// check takes 0.1 ms. Upstream makes one signature per path.
const MAX_SIGNATURES: usize = 4;

/// How long the answer that upstream lacks a path, or has another NAR, is cached: after the first
/// such answer, the second, and so on. The last interval applies to all later answers.
const MISSING_TTL: [Interval; 4] = [
    Interval::from_secs(60),
    Interval::from_secs(300),
    Interval::from_secs(3600),
    Interval::from_secs(24 * 3600),
];
/// How long it is cached that no signature proves a path.
const UNPROVEN_TTL: Duration = Duration::from_secs(3600);
/// How long a positive answer is cached. It stays true, as NARs in a binary cache do not change.
const PROVEN_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Most cached answers; beyond them, the oldest is dropped. They take 7 MiB.
const MAX_ANSWERS: usize = 42_000;

/// Longest request to the upstream cache, from name resolution to the last byte of the answer. A
/// request that takes longer fails.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Most concurrent requests to the upstream cache; further ones wait up to [`SLOT_TIMEOUT`].
const MAX_REQUESTS: usize = 4;
/// Most redirects that are followed. Caches redirect to one other place; more is a loop.
const MAX_REDIRECTS: u32 = 3;

/// Longest wait for a free request slot, or for another thread's answer about the same path. After
/// that the path counts as not verified. Peers give up sooner, and find the answer in the cache
/// when they ask again.
const SLOT_TIMEOUT: Duration = Duration::from_secs(5);
/// Most callers that wait at a time; further ones get the answer "not verified". Each waiting
/// caller occupies a thread and a connection; the limit leaves most of these to LAN peers.
const MAX_WAITING: usize = 32;

/// First pause of requests after upstream failed to answer. It doubles with each failure. Meanwhile
/// unverified paths are not shared.
const FIRST_PAUSE: Interval = Interval::from_secs(5);
/// Longest pause of requests after upstream failed. A `Retry-After` of upstream can lengthen a
/// pause up to this.
const MAX_PAUSE: Interval = Interval::from_secs(300);
/// Pause of requests about one path after an answer that is not a valid narinfo. Behind a captive
/// portal every path gets such answers, and no signal marks the end of that.
const MALFORMED_ANSWER_PAUSE: Interval = Interval::from_secs(5);
/// Most bytes read of a response body before decompression; the rest is cut off. A compressed
/// narinfo is smaller than [`NarInfo::MAX_LEN`] unless its sender is hostile.
const MAX_RESPONSE_BYTES: u64 = NarInfo::MAX_LEN as u64 + 4096;

/// Largest zstd window as a power of two: 8 MiB, which every decoder supports (RFC 8878, section
/// 3.1.1.1.2). A narinfo with a larger one is malformed. The decoder allocates the window.
const MAX_WINDOW_LOG: u32 = 23;

/// A path and the hash of its NAR in the local store.
type VerifiedPath = (HashPart, NarHash);

/// Compares local paths with those of the upstream cache, and caches the results.
pub struct Verifier {
    agent: Agent,
    url: String,
    key: Option<PublicKey>,
    store_dir: StoreDir,
    state: Mutex<VerifierState>,
    /// Signalled when a request ends.
    request_ended: Condvar,
    log_throttle: LogThrottle,
}

struct VerifierState {
    answers: UpstreamAnswers,
    /// Paths with a request in progress.
    in_flight: HashSet<VerifiedPath>,
    waiting: usize,
    backoff: Backoff,
}

/// Why upstream gave no usable answer.
enum UpstreamError {
    Unreachable(ureq::Error),
    Status(u16, Option<Duration>),
    /// Concerns this path alone, so it does not pause other requests.
    Malformed(Malformed),
}

impl fmt::Display for UpstreamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            UpstreamError::Unreachable(e) => write!(f, "{e}"),
            UpstreamError::Status(status, _) => write!(f, "status {status}"),
            UpstreamError::Malformed(e) => write!(f, "{e}"),
        }
    }
}

impl Verifier {
    /// Creates a verifier for the upstream cache in `config`. Only the default upstream's key is
    /// known.
    pub fn new(config: &Config) -> Self {
        let is_default = config.upstream_cache == DEFAULT_UPSTREAM;
        let key = is_default.then(|| PublicKey::parse(UPSTREAM_KEY).expect("a public key"));
        Self::with(config.upstream_cache.clone(), key, config.store_dir.clone())
    }

    fn with(url: String, key: Option<PublicKey>, store_dir: StoreDir) -> Self {
        let config = http_client::cache_config(&url, MAX_REDIRECTS)
            .timeout_global(Some(REQUEST_TIMEOUT))
            .max_idle_connections(MAX_REQUESTS)
            .max_idle_connections_per_host(MAX_REQUESTS)
            .build();
        Verifier {
            agent: config.new_agent(),
            url,
            key,
            store_dir,
            state: Mutex::new(VerifierState {
                answers: UpstreamAnswers::default(),
                in_flight: HashSet::new(),
                waiting: 0,
                backoff: Backoff::new(FIRST_PAUSE, MAX_PAUSE),
            }),
            request_ended: Condvar::default(),
            log_throttle: LogThrottle::default(),
        }
    }

    /// Returns whether upstream has the path, or `None` if that is not known without asking. Checks
    /// signatures but never blocks on the network: takes 0.5 ms at most, mostly 1 µs.
    pub fn cached_result(&self, info: &PathInfo) -> Option<bool> {
        let key = key(info);
        if let Some(known) = self.state.lock().answers.get(&key, Instant::now()) {
            return known;
        }
        let is_signed = self.is_signed(info)?;
        let (proof, now) = (is_signed.then_some(true), Instant::now());
        let mut state = self.state.lock();
        // The result of a failed check is cached too, but must not replace an answer of upstream.
        if is_signed || state.answers.get(&key, now).is_none() {
            let answer_count = state.answers.answer_count(&key);
            state.answers.put(key, proof, now + UNPROVEN_TTL, answer_count);
        }
        proof
    }

    /// Returns when to ask upstream about a path: now, or when its cached answer expires, or when
    /// the pause after a failure ends. `None` if upstream has the path or if upstream's key is
    /// known.
    pub fn next_request_at(&self, info: &PathInfo) -> Option<Instant> {
        let now = Instant::now();
        match self.cached_result(info) {
            Some(true) => None,
            _ if self.has_key() => None,
            Some(false) => self.state.lock().answers.expiry(&key(info)),
            None => Some(self.state.lock().backoff.due().map_or(now, |due| due.max(now))),
        }
    }

    /// Returns whether upstream has the path, and asks upstream if that is not known. Blocks for at
    /// most 15 s ([`SLOT_TIMEOUT`] and [`REQUEST_TIMEOUT`]). False if no answer can be had now.
    pub fn verified(&self, info: &PathInfo) -> bool {
        if let Some(answer) = self.cached_result(info) {
            return answer;
        }
        let key = key(info);
        match self.acquire_request_slot(&key) {
            RequestTurn::Answered(answer) => answer,
            RequestTurn::NotNow => false,
            RequestTurn::Mine => self.ask(&key, info),
        }
    }

    /// Returns whether upstream's key is known. A signature then proves upstream's paths, and a
    /// path without one is most likely not upstream's.
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Returns whether a signature proves the path; `None` if no signature has the key's name or no
    /// key is known.
    fn is_signed(&self, info: &PathInfo) -> Option<bool> {
        let key = self.key.as_ref()?;
        let mut signatures = info
            .signatures
            .iter()
            .filter(|s| s.name() == key.name())
            .take(MAX_SIGNATURES)
            .peekable();
        signatures.peek()?;
        let fingerprint = info.fingerprint(&self.store_dir);
        Some(signatures.any(|signature| key.verify(fingerprint.as_bytes(), signature)))
    }

    /// Waits up to [`SLOT_TIMEOUT`] until a request about `key` may start or another thread has its
    /// answer.
    fn acquire_request_slot(&self, key: &VerifiedPath) -> RequestTurn {
        let deadline = Instant::now() + SLOT_TIMEOUT;
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            if let Some(Some(answer)) = state.answers.get(key, now) {
                return RequestTurn::Answered(answer);
            }
            if !state.backoff.is_due(now) || state.answers.is_unreadable(key, now) {
                return RequestTurn::NotNow;
            }
            if state.in_flight.len() < MAX_REQUESTS && !state.in_flight.contains(key) {
                state.in_flight.insert(*key);
                return RequestTurn::Mine;
            }
            if state.waiting >= MAX_WAITING || now >= deadline {
                return RequestTurn::NotNow;
            }
            state.waiting += 1;
            state = self.request_ended.wait_timeout(state, deadline - now);
            state.waiting -= 1;
        }
    }

    fn ask(&self, key: &VerifiedPath, info: &PathInfo) -> bool {
        defer! {
            self.state.lock().in_flight.remove(key);
            self.request_ended.notify_all();
        }
        let answer = self.request(info);
        let now = Instant::now();
        match answer {
            Ok(answer) => {
                log::debug!(
                    "{}: {} upstream",
                    info.path,
                    if answer { "the same" } else { "not, or not the same," }
                );
                let mut state = self.state.lock();
                state.backoff.reset();
                let answer_count = state.answers.answer_count(key);
                let lasts = if answer {
                    PROVEN_TTL
                } else {
                    MISSING_TTL[answer_count.min(MISSING_TTL.len() - 1)].get()
                };
                state.answers.put(*key, Some(answer), now + lasts, answer_count + 1);
                answer
            }
            Err(e) => {
                let retry_after =
                    if let UpstreamError::Status(_, retry_after) = e { retry_after } else { None };
                let mut state = self.state.lock();
                if let UpstreamError::Malformed(_) = e {
                    state.answers.put_unreadable(*key, now + MALFORMED_ANSWER_PAUSE.get());
                } else {
                    state.backoff.record_failure(retry_after, now);
                }
                drop(state);
                if self.log_throttle.allow(now) {
                    log::warn!(
                        "upstream cache {}: {e}; what it did not confirm before is not shared over WAN",
                        self.url
                    );
                }
                false
            }
        }
    }

    fn request(&self, info: &PathInfo) -> Result<bool, UpstreamError> {
        let url = format!("{}/{}.narinfo", self.url, info.path.hash_part());
        let response = self.agent.get(url).call().map_err(UpstreamError::Unreachable)?;
        match response.status().as_u16() {
            200 => {}
            // Object stores answer 403 instead of 404 if listing the bucket is not permitted.
            403 | 404 | 410 => return Ok(false),
            status => return Err(UpstreamError::Status(status, retry_after(response.headers()))),
        }
        let bytes = read(response)?;
        let theirs =
            NarInfo::parse(&bytes, &self.store_dir).map_err(UpstreamError::Malformed)?.info;
        Ok(theirs.path == info.path
            && theirs.nar_hash == info.nar_hash
            && theirs.nar_size == info.nar_size)
    }
}

/// Reads the narinfo from the body and decompresses it (`narinfo-compression` of Nix). Returns at
/// most one byte more than [`NarInfo::MAX_LEN`], so that the parser refuses a longer one.
fn read(response: Response<ureq::Body>) -> Result<Vec<u8>, UpstreamError> {
    let encoding = response
        .headers()
        .get("content-encoding")
        .and_then(|e| e.to_str().ok())
        .unwrap_or("identity");
    let encoding = encoding.to_ascii_lowercase();
    let sent =
        response.into_body().into_with_config().limit(u64::MAX).reader().take(MAX_RESPONSE_BYTES);
    let decoded: Box<dyn Read> = match encoding.as_str() {
        "identity" => Box::new(sent),
        "gzip" | "x-gzip" => Box::new(flate2::read::MultiGzDecoder::new(sent)),
        "zstd" => {
            let mut decoder = zstd::stream::read::Decoder::new(sent)
                .map_err(|e| UpstreamError::Unreachable(e.into()))?;
            decoder
                .window_log_max(MAX_WINDOW_LOG)
                .map_err(|e| UpstreamError::Unreachable(e.into()))?;
            Box::new(decoder)
        }
        _ => {
            return Err(UpstreamError::Malformed(Malformed::new(
                "narinfo",
                "compressed neither by gzip nor by zstd",
            )));
        }
    };
    let mut bytes = Vec::new();
    let max = NarInfo::MAX_LEN as u64 + 1;
    let read = decoded.take(max).read_to_end(&mut bytes);
    match read {
        Ok(_) => Ok(bytes),
        Err(_) if encoding != "identity" => {
            Err(UpstreamError::Malformed(Malformed::new("narinfo", "badly compressed")))
        }
        Err(e) => Err(UpstreamError::Unreachable(e.into())),
    }
}

enum RequestTurn {
    Answered(bool),
    /// Upstream failed recently, or too many callers wait.
    NotNow,
    Mine,
}

fn key(info: &PathInfo) -> VerifiedPath {
    (info.path.hash_part(), info.nar_hash)
}

/// Cached answers.
#[derive(Default)]
struct UpstreamAnswers(BoundedMap<VerifiedPath, UpstreamAnswer, MAX_ANSWERS>);

struct UpstreamAnswer {
    is_upstream: Option<bool>,
    expires: Instant,
    /// Number of answers of upstream so far; index into [`MISSING_TTL`].
    answer_count: usize,
    /// Set if the last answer was not a valid narinfo: upstream is not asked again before this
    /// time.
    unreadable: Option<Instant>,
}

impl UpstreamAnswers {
    fn get(&self, key: &VerifiedPath, now: Instant) -> Option<Option<bool>> {
        Some(self.0.get(key).filter(|answer| answer.expires > now)?.is_upstream)
    }

    /// Number of answers of upstream about this path.
    fn answer_count(&self, key: &VerifiedPath) -> usize {
        self.0.get(key).map_or(0, |answer| answer.answer_count)
    }

    /// Returns when the last answer expires.
    fn expiry(&self, key: &VerifiedPath) -> Option<Instant> {
        self.0.get(key).map(|answer| answer.expires)
    }

    fn is_unreadable(&self, key: &VerifiedPath, now: Instant) -> bool {
        self.0.get(key).and_then(|answer| answer.unreadable).is_some_and(|expires| expires > now)
    }

    fn put(
        &mut self,
        key: VerifiedPath,
        is_upstream: Option<bool>,
        expires: Instant,
        answer_count: usize,
    ) {
        self.0.insert(key, UpstreamAnswer { is_upstream, expires, answer_count, unreadable: None });
    }

    /// Records that upstream's answer was not a valid narinfo. The path counts as unknown, and
    /// upstream is not asked about it again before `expires`.
    fn put_unreadable(&mut self, key: VerifiedPath, expires: Instant) {
        let answer_count = self.answer_count(&key);
        self.0.insert(
            key,
            UpstreamAnswer {
                is_upstream: None,
                expires: Instant::now(),
                answer_count,
                unreadable: Some(expires),
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden;
    use std::io::Write;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{self, JoinHandle};
    use tiny_http::{Header, Response, Server};

    /// A narinfo from cache.nixos.org, with its signature.
    const UPSTREAM_NARINFO: &str = include_str!("../../tests/data/cache.nixos.org.narinfo");

    const SIGNED: &str = "vx8ssdprqbd8zwyipycgh6jp25k69rx6";

    fn upstreams() -> PathInfo {
        NarInfo::parse(UPSTREAM_NARINFO.as_bytes(), &golden::store_dir()).unwrap().info
    }

    /// A verifier whose upstream URL has no server.
    fn unreachable(key: Option<PublicKey>) -> Verifier {
        Verifier::with("http://127.0.0.1:9".into(), key, golden::store_dir())
    }

    /// An HTTP server that answers each request with the status and body that a function returns.
    struct Upstream {
        server: Arc<Server>,
        requests: Arc<AtomicUsize>,
        thread: Option<JoinHandle<()>>,
    }

    impl Upstream {
        fn start(answer: impl Fn(&str) -> (u16, String) + Send + 'static) -> (Upstream, Verifier) {
            let server = Arc::new(Server::http("127.0.0.1:0").unwrap());
            let requests = Arc::new(AtomicUsize::new(0));
            let (serving, counted) = (server.clone(), requests.clone());
            let thread = thread::spawn(move || {
                for request in serving.incoming_requests() {
                    counted.fetch_add(1, Ordering::SeqCst);
                    let (status, body) = answer(request.url());
                    let mut response = Response::from_string(&body).with_status_code(status);
                    if status == 302 {
                        response.add_header(Header::from_bytes("Location", body).unwrap());
                    }
                    // The client may close the connection before it has read all.
                    let _ = request.respond(response);
                }
            });
            let url = format!("http://{}/base", server.server_addr().to_ip().unwrap());
            let verifier = Verifier::with(url, None, golden::store_dir());
            (Upstream { server, requests, thread: Some(thread) }, verifier)
        }

        fn requests(&self) -> usize {
            self.requests.load(Ordering::SeqCst)
        }
    }

    impl Drop for Upstream {
        fn drop(&mut self) {
            self.server.unblock();
            self.thread.take().unwrap().join().unwrap();
        }
    }

    fn narinfo() -> NarInfo {
        golden::narinfo(SIGNED)
    }

    #[test]
    fn failed_signature_keeps_number_of_upstreams_answers() {
        let verifier = unreachable(PublicKey::parse(UPSTREAM_KEY).ok());
        let info = PathInfo { nar_size: 1, ..upstreams() };
        verifier.state.lock().answers.put(key(&info), Some(false), Instant::now(), 3);
        assert_eq!(verifier.cached_result(&info), None);
        assert_eq!(verifier.state.lock().answers.answer_count(&key(&info)), 3);
    }

    #[test]
    fn compressed_narinfo_with_large_window_is_malformed() {
        let narinfo = |window_log| {
            let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).unwrap();
            encoder.set_parameter(zstd::zstd_safe::CParameter::WindowLog(window_log)).unwrap();
            encoder.write_all(UPSTREAM_NARINFO.as_bytes()).unwrap();
            encoder.flush().unwrap();
            let body = ureq::Body::builder().data(encoder.finish().unwrap());
            let response = ureq::http::Response::builder();
            read(response.header("Content-Encoding", "zstd").body(body).unwrap())
        };
        for window_log in [10, MAX_WINDOW_LOG] {
            assert_eq!(narinfo(window_log).ok().unwrap(), UPSTREAM_NARINFO.as_bytes());
        }
        assert!(matches!(narinfo(MAX_WINDOW_LOG + 1), Err(UpstreamError::Malformed(_))));
    }

    #[test]
    fn default_upstreams_signature_proves_path() {
        let config = Config::default();
        assert_eq!(Verifier::new(&config).cached_result(&upstreams()), Some(true));
        // The key of another upstream is not known.
        let other = Verifier::new(&Config {
            upstream_cache: "https://cache.example".into(),
            ..config.clone()
        });
        assert_eq!(other.cached_result(&upstreams()), None);
        // The signature covers each of these fields.
        let changes: [fn(&mut PathInfo); 5] = [
            |info| info.nar_size += 1,
            |info| info.nar_hash = NarHash::from_bytes([0; 32]),
            |info| info.path = golden::narinfo(SIGNED).info.path,
            |info| info.references.clear(),
            |info| info.signatures.clear(),
        ];
        for (at, change) in changes.into_iter().enumerate() {
            let mut info = upstreams();
            change(&mut info);
            assert_eq!(Verifier::new(&config).cached_result(&info), None, "change {at}");
        }
    }

    #[test]
    fn signature_check_result_is_cached() {
        let public = PublicKey::parse(golden::PUBLIC_KEY.trim()).unwrap();
        let secret = crate::nix::SecretKey::parse(golden::SECRET_KEY).unwrap();
        let mut info = narinfo().info;
        let fingerprint = info.fingerprint(&golden::store_dir());
        info.signatures = vec![secret.sign(fingerprint.as_bytes())];
        let verifier = unreachable(Some(public));
        assert_eq!(verifier.cached_result(&info), Some(true));
        // The result is cached: the signature is not checked again.
        info.signatures.clear();
        assert_eq!(verifier.cached_result(&info), Some(true));
        assert!(verifier.verified(&info));

        let mut forged =
            golden::narinfos().into_iter().map(|n| n.info).find(|i| i.path != info.path).unwrap();
        forged.signatures = vec![secret.sign(b"something else")];
        assert_eq!(verifier.cached_result(&forged), None);
        assert_eq!(verifier.state.lock().answers.get(&key(&forged), Instant::now()), Some(None));
        forged.signatures = vec![secret.sign(forged.fingerprint(&golden::store_dir()).as_bytes())];
        assert_eq!(verifier.cached_result(&forged), None, "it was checked again");
        assert!(!verifier.verified(&forged), "nobody is there to ask");
    }

    #[test]
    fn upstream_answer_decides_result_cache_and_pause() {
        let text = |change: fn(&mut NarInfo)| {
            let mut narinfo = narinfo();
            narinfo.compression = "xz".into();
            change(&mut narinfo);
            narinfo.print(&golden::store_dir())
        };
        let elsewhere = text(|_| {}).replace("/nix/store", "/other/store");
        let long = format!("{}Sig: {}\n", text(|_| {}), "x".repeat(NarInfo::MAX_LEN));
        // Status, body, result, whether the result is cached, and whether requests pause.
        for (status, body, answer, kept, pauses) in [
            (200, text(|_| {}), true, true, false),
            (200, text(|n| n.info.nar_hash = NarHash::from_bytes([1; 32])), false, true, false),
            (200, text(|n| n.info.nar_size += 1), false, true, false),
            (200, text(|n| n.info.path = upstreams().path), false, true, false),
            (200, elsewhere, false, false, false),
            (200, long, false, false, false),
            (200, "<html>please log in</html>".into(), false, false, false),
            (200, String::new(), false, false, false),
            (404, text(|_| {}), false, true, false),
            (403, text(|_| {}), false, true, false),
            (410, text(|_| {}), false, true, false),
            (500, text(|_| {}), false, false, true),
            (503, text(|_| {}), false, false, true),
            (429, text(|_| {}), false, false, true),
            (204, String::new(), false, false, true),
        ] {
            let info = narinfo().info;
            let case = format!("{status} {body:.40}");
            let (upstream, verifier) = Upstream::start(move |url| {
                assert_eq!(url, format!("/base/{SIGNED}.narinfo"));
                (status, body.clone())
            });
            assert_eq!(verifier.cached_result(&info), None, "{case}");
            assert_eq!(verifier.verified(&info), answer, "{case}");
            assert_eq!(verifier.cached_result(&info), kept.then_some(answer), "{case}");
            // A second call at once sends no request.
            assert_eq!(verifier.verified(&info), answer, "{case}");
            assert_eq!(upstream.requests(), 1, "{case}");
            assert_eq!(verifier.state.lock().backoff.failures() > 0, pauses, "{case}");
            // Another NAR hash is another cache key.
            let other = PathInfo { nar_hash: NarHash::from_bytes([2; 32]), ..info };
            assert_eq!(verifier.cached_result(&other), None, "{case}");
            assert!(!verifier.verified(&other), "{case}");
        }
    }

    /// A path that is uploaded after it was built must become verified without a restart.
    #[test]
    fn missing_path_is_asked_about_at_growing_intervals() {
        let (upstream, verifier) = Upstream::start(|_| (404, String::new()));
        let info = narinfo().info;
        let known = |after| verifier.state.lock().answers.get(&key(&info), Instant::now() + after);
        for seconds in [60, 300, 3600, 24 * 3600, 24 * 3600] {
            assert!(!verifier.verified(&info) && !verifier.verified(&info));
            assert_eq!(known(Duration::from_secs(seconds - 5)), Some(Some(false)));
            assert_eq!(known(Duration::from_secs(seconds)), None);
            let at = verifier.next_request_at(&info).unwrap();
            assert!(at > Instant::now() + Duration::from_secs(seconds - 5));
            // Expires the answer.
            let mut state = verifier.state.lock();
            state.answers.0.get_mut(&key(&info)).unwrap().expires = Instant::now();
        }
        assert_eq!(upstream.requests(), 5);
        assert_eq!(verifier.cached_result(&info), None);
        assert!(verifier.next_request_at(&info).unwrap() <= Instant::now());
    }

    /// Captive portals answer every request with a login page, which must not count as "upstream
    /// lacks the path".
    #[test]
    fn malformed_answer_is_not_cached_as_missing() {
        let is_portal = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let portal = is_portal.clone();
        let (upstream, verifier) = Upstream::start(move |_| match portal.load(Ordering::SeqCst) {
            true => (200, "<html>please log in</html>".into()),
            false => (200, narinfo().print(&golden::store_dir())),
        });
        let info = narinfo().info;
        assert!(!verifier.verified(&info) && !verifier.verified(&info));
        assert_eq!((upstream.requests(), verifier.cached_result(&info)), (1, None));
        assert!(verifier.next_request_at(&info).is_some());
        is_portal.store(false, Ordering::SeqCst);
        verifier.state.lock().answers.0.get_mut(&key(&info)).unwrap().unreadable =
            Some(Instant::now());
        assert!(verifier.verified(&info));
        assert_eq!(verifier.next_request_at(&info), None);
    }

    #[test]
    fn upstream_is_asked_again_after_pause() {
        let calls = AtomicUsize::new(0);
        let (upstream, verifier) =
            Upstream::start(move |_| match calls.fetch_add(1, Ordering::SeqCst) {
                0 => (500, String::new()),
                _ => (200, narinfo().print(&golden::store_dir())),
            });
        let info = narinfo().info;
        assert!(!verifier.verified(&info));
        assert!(!verifier.verified(&info));
        assert_eq!(upstream.requests(), 1);
        verifier.state.lock().backoff.reset();
        assert!(verifier.verified(&info));
    }

    /// Nix 2.32 and later can compress the narinfos that they upload.
    #[test]
    fn compressed_narinfo_is_read_and_bomb_is_refused() {
        let text = narinfo().print(&golden::store_dir()).into_bytes();
        let gzip = |bytes: &[u8]| {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            std::io::Write::write_all(&mut encoder, bytes).unwrap();
            encoder.finish().unwrap()
        };
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 3).unwrap();
        let bomb = [text.clone(), b"Sig: ".to_vec(), vec![b'x'; 64 << 20]].concat();
        let mut damaged = gzip(&text);
        damaged.truncate(damaged.len() - 20);
        for (encoding, body, is_upstream) in [
            ("gzip", gzip(&text), true),
            ("zstd", zstd(&text), true),
            ("identity", text.clone(), true),
            ("gzip", text.clone(), false),
            ("gzip", damaged, false),
            ("gzip", gzip(&bomb), false),
            ("zstd", zstd(&bomb), false),
            ("br", text.clone(), false),
        ] {
            let server = Server::http("127.0.0.1:0").unwrap();
            let url = format!("http://{}", server.server_addr().to_ip().unwrap());
            let verifier = Verifier::with(url, None, golden::store_dir());
            thread::scope(|scope| {
                scope.spawn(|| {
                    let response = Response::from_data(body)
                        .with_header(Header::from_bytes("Content-Encoding", encoding).unwrap());
                    let _ = server.recv().unwrap().respond(response);
                });
                assert_eq!(verifier.verified(&narinfo().info), is_upstream, "{encoding}");
            });
        }
    }

    #[test]
    fn redirects_are_followed_up_to_the_maximum() {
        let (upstream, verifier) = Upstream::start(|url| match url.strip_prefix("/base") {
            Some(rest) => (302, format!("/elsewhere{rest}")),
            None => (200, narinfo().print(&golden::store_dir())),
        });
        assert!(verifier.verified(&narinfo().info));
        assert_eq!(upstream.requests(), 2);
        let (upstream, verifier) = Upstream::start(|url| (302, url.to_owned()));
        assert!(!verifier.verified(&narinfo().info));
        assert_eq!(upstream.requests(), 1 + MAX_REDIRECTS as usize);
    }

    #[test]
    fn waiting_callers_are_limited() {
        let verifier = unreachable(None);
        let info = narinfo().info;
        let others = || {
            (0..MAX_REQUESTS as u8).map(|n| (info.path.hash_part(), NarHash::from_bytes([n; 32])))
        };
        verifier.state.lock().in_flight.extend(others());
        verifier.state.lock().waiting = MAX_WAITING;
        thread::scope(|scope| {
            let refused = scope.spawn(|| verifier.acquire_request_slot(&key(&info)));
            while !refused.is_finished() {
                assert_eq!(verifier.state.lock().waiting, MAX_WAITING, "one more waits");
                thread::yield_now();
            }
            assert!(matches!(refused.join().unwrap(), RequestTurn::NotNow));
        });
        verifier.state.lock().waiting = 0;
        thread::scope(|scope| {
            let waiter = scope.spawn(|| verifier.acquire_request_slot(&key(&info)));
            while verifier.state.lock().waiting == 0 {
                thread::yield_now();
            }
            let first = others().next().unwrap();
            verifier.state.lock().in_flight.remove(&first);
            verifier.request_ended.notify_all();
            assert!(matches!(waiter.join().unwrap(), RequestTurn::Mine));
        });
        assert_eq!(verifier.state.lock().in_flight.len(), MAX_REQUESTS);
    }

    #[test]
    fn full_cache_drops_oldest_answer() {
        let (mut answers, now) = (UpstreamAnswers::default(), Instant::now());
        let hash_part = narinfo().info.path.hash_part();
        let key = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            (hash_part, NarHash::from_bytes(bytes))
        };
        (0..=MAX_ANSWERS).for_each(|n| answers.put(key(n), Some(true), now + UNPROVEN_TTL, 1));
        let is_known = |n| answers.get(&key(n), now).is_some();
        assert!(!is_known(0) && is_known(1) && is_known(MAX_ANSWERS));
    }
}
