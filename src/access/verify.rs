//! Whether a path is the upstream cache's own: what everybody can have from there gives nothing
//! away.
//!
//! A signature by the upstream's key, stored with the path, proves it without a word to anybody.
//! Otherwise the upstream cache is asked, and asked again if it does not have the path: to build
//! first and to upload later is the usual order. Whatever is not known to be equal counts as not.

use crate::backoff::{Backoff, retry_after};
use crate::config::{Config, DEFAULT_UPSTREAM, UPSTREAM_KEY};
use crate::deferred::Deferred;
use crate::http_client;
use crate::log_throttle::LogThrottle;
use crate::nix::{HashPart, Malformed, NarHash, NarInfo, PathInfo, PublicKey, StoreDir};
use crate::time_scale::Interval;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Read;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::http::Response;

/// Signatures of the upstream's name that are checked of one path, 0.1 ms each. Upstream makes one.
const MAX_SIGNATURES: usize = 4;

/// How long it is remembered that upstream does not have a path, or another NAR, after the first
/// such answer and the next ones; from the last on always as long.
const NOT_THERE: [Interval; 4] = [
    Interval::from_secs(60),
    Interval::from_secs(300),
    Interval::from_secs(3600),
    Interval::from_secs(24 * 3600),
];
/// How long it is remembered that no signature proves a path.
const UNPROVEN: Duration = Duration::from_secs(3600);
/// That it had this very NAR stays true.
const PROVEN: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// When so many new ones have come, those before them are forgotten: so up to twice as many are
/// kept. A hash table of 32,768 places is then full, and two take 6 MiB, on a node that shares as
/// many paths.
const GENERATION: usize = 28_672;

/// A request to the upstream cache takes no longer, from the name's resolution to the answer's last
/// byte.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests at once.
const MAX_REQUESTS: usize = 4;
/// Caches send from one place to another, not in circles.
const MAX_REDIRECTS: u32 = 3;

/// How long an asker waits for its turn, or for an equal question's answer. Peers give up sooner,
/// and find the answer when they come again.
const PATIENCE: Duration = Duration::from_secs(5);
/// Askers that wait. Each holds a thread and a connection, of which neighbours are to have most.
const MAX_WAITING: usize = 32;

/// When upstream gave no answer it is left alone this long, doubling, and what is not known is not
/// shared.
const FIRST_PAUSE: Interval = Interval::from_secs(5);
/// The longest such pause, unless upstream asks for a longer one, which is obeyed up to this.
const LONGEST_PAUSE: Interval = Interval::from_secs(300);
/// A path of which upstream said nothing that can be read is left alone this long. Behind the login
/// page of a hotel that is every path, and nothing else tells when it is gone.
const UNREADABLE: Interval = Interval::from_secs(5);
/// Bytes of a narinfo as it is sent: compressed it is smaller than its bound, or its sender is
/// hostile.
const MAX_SENT: u64 = NarInfo::MAX_LEN as u64 + 4096;

/// A path, and the NAR that it has here.
type VerifiedPath = (HashPart, NarHash);

/// Compares paths with the upstream cache's, and remembers.
pub struct Verifier {
    agent: Agent,
    url: String,
    key: Option<PublicKey>,
    store_dir: StoreDir,
    state: Mutex<VerifierState>,
    /// A request ended.
    ended: Condvar,
    faults: LogThrottle,
}

struct VerifierState {
    answers: UpstreamAnswers,
    /// What is being asked.
    asked: HashSet<VerifiedPath>,
    waiting: usize,
    backoff: Backoff,
}

/// Why there is no answer.
enum UpstreamError {
    Unreachable(ureq::Error),
    Status(u16, Option<Duration>),
    /// Of this path alone.
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
    /// Of the upstream cache that the user chose.
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
                asked: HashSet::new(),
                waiting: 0,
                backoff: Backoff::new(FIRST_PAUSE, LONGEST_PAUSE),
            }),
            ended: Condvar::new(),
            faults: LogThrottle::default(),
        }
    }

    /// Whether the path is upstream's, if that is known without asking. Takes 0.5 ms at most, and
    /// mostly 1 µs.
    pub fn verified_now(&self, info: &PathInfo) -> Option<bool> {
        let key = key(info);
        if let Some(known) = self.lock().answers.get(&key, Instant::now()) {
            return known;
        }
        let is_signed = self.is_signed(info)?;
        let (proof, now) = (is_signed.then_some(true), Instant::now());
        let mut state = self.lock();
        // That its signatures are none is remembered too, but must not take the place of upstream's
        // own answer.
        if is_signed || state.answers.get(&key, now).is_none() {
            state.answers.put(key, proof, now + UNPROVEN, 0);
        }
        proof
    }

    /// When it makes sense to ask upstream about a path: now, or once its last answer is old.
    /// `None` if it said that it has it, or if its paths have a signature.
    pub fn ask_at(&self, info: &PathInfo) -> Option<Instant> {
        let now = Instant::now();
        match self.verified_now(info) {
            Some(true) => None,
            _ if self.has_key() => None,
            Some(false) => self.lock().answers.until(&key(info)),
            None => Some(self.lock().backoff.due().map_or(now, |due| due.max(now))),
        }
    }

    /// Whether the path is upstream's; asks upstream if need be. False if that cannot be told now.
    /// Takes 15 s at most.
    pub fn verified(&self, info: &PathInfo) -> bool {
        if let Some(answer) = self.verified_now(info) {
            return answer;
        }
        let key = key(info);
        match self.turn(&key) {
            RequestTurn::Answered(answer) => answer,
            RequestTurn::NotNow => false,
            RequestTurn::Mine => self.ask(&key, info),
        }
    }

    /// Whether upstream's own paths carry a signature that proves it, so that it need not be asked
    /// about any that has none.
    pub fn has_key(&self) -> bool {
        self.key.is_some()
    }

    /// Whether a signature proves it; `None` if there is none by that name.
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

    /// Waits until upstream may be asked this.
    fn turn(&self, key: &VerifiedPath) -> RequestTurn {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            if let Some(Some(answer)) = state.answers.get(key, now) {
                return RequestTurn::Answered(answer);
            }
            if !state.backoff.is_due(now) || state.answers.is_unreadable(key, now) {
                return RequestTurn::NotNow;
            }
            if state.asked.len() < MAX_REQUESTS && !state.asked.contains(key) {
                state.asked.insert(*key);
                return RequestTurn::Mine;
            }
            if state.waiting >= MAX_WAITING || now >= deadline {
                return RequestTurn::NotNow;
            }
            state.waiting += 1;
            state = self
                .ended
                .wait_timeout(state, deadline - now)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            state.waiting -= 1;
        }
    }

    fn ask(&self, key: &VerifiedPath, info: &PathInfo) -> bool {
        let _end = Deferred::new(|| {
            self.lock().asked.remove(key);
            self.ended.notify_all();
        });
        let answer = self.request(info);
        let now = Instant::now();
        let mut state = self.lock();
        match answer {
            Ok(answer) => {
                log::debug!(
                    "{}: {} upstream",
                    info.path,
                    if answer { "the same" } else { "not, or not the same," }
                );
                state.backoff.reset();
                let times = state.answers.times(key);
                let lasts =
                    if answer { PROVEN } else { NOT_THERE[times.min(NOT_THERE.len() - 1)].get() };
                state.answers.put(*key, Some(answer), now + lasts, times + 1);
                answer
            }
            Err(e) => {
                let retry_after =
                    if let UpstreamError::Status(_, retry_after) = e { retry_after } else { None };
                if let UpstreamError::Malformed(_) = e {
                    state.answers.put_unreadable(*key, now + UNREADABLE.get());
                } else {
                    state.backoff.record_failure(retry_after, now);
                }
                drop(state);
                if self.faults.now(now) {
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
            // Object stores say 403 where they may not say 404.
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

    fn lock(&self) -> MutexGuard<'_, VerifierState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The narinfo, as it was before a cache compressed it (`narinfo-compression` of Nix), and at most
/// a byte more of it than one may have.
fn read(response: Response<ureq::Body>) -> Result<Vec<u8>, UpstreamError> {
    let encoding = response
        .headers()
        .get("content-encoding")
        .and_then(|e| e.to_str().ok())
        .unwrap_or("identity");
    let encoding = encoding.to_ascii_lowercase();
    let sent = response.into_body().into_with_config().limit(u64::MAX).reader().take(MAX_SENT);
    let decoded: Box<dyn Read> = match encoding.as_str() {
        "identity" => Box::new(sent),
        "gzip" | "x-gzip" => Box::new(flate2::read::MultiGzDecoder::new(sent)),
        "zstd" => Box::new(
            zstd::stream::read::Decoder::new(sent)
                .map_err(|e| UpstreamError::Unreachable(e.into()))?,
        ),
        _ => {
            return Err(UpstreamError::Malformed(Malformed::new(
                "narinfo",
                "compressed neither by gzip nor by zstd",
            )));
        }
    };
    let mut bytes = Vec::new();
    let most = NarInfo::MAX_LEN as u64 + 1;
    let read = decoded.take(most).read_to_end(&mut bytes);
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
    /// Upstream failed just now, or is asked too much.
    NotNow,
    Mine,
}

fn key(info: &PathInfo) -> VerifiedPath {
    (info.path.hash_part(), info.nar_hash)
}

/// What is known of which path: an answer, or that its signatures give none.
#[derive(Default)]
struct UpstreamAnswers {
    young: HashMap<VerifiedPath, UpstreamAnswer>,
    old: HashMap<VerifiedPath, UpstreamAnswer>,
}

struct UpstreamAnswer {
    is_upstreams: Option<bool>,
    until: Instant,
    /// How often upstream was asked.
    times: usize,
    /// What it said last cannot be read, until then.
    unreadable: Option<Instant>,
}

impl UpstreamAnswers {
    fn find(&self, key: &VerifiedPath) -> Option<&UpstreamAnswer> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    fn get(&self, key: &VerifiedPath, now: Instant) -> Option<Option<bool>> {
        Some(self.find(key).filter(|answer| answer.until > now)?.is_upstreams)
    }

    /// How often upstream was asked about it.
    fn times(&self, key: &VerifiedPath) -> usize {
        self.find(key).map_or(0, |answer| answer.times)
    }

    /// Until when the last answer counts.
    fn until(&self, key: &VerifiedPath) -> Option<Instant> {
        self.find(key).map(|answer| answer.until)
    }

    fn is_unreadable(&self, key: &VerifiedPath, now: Instant) -> bool {
        self.find(key).and_then(|answer| answer.unreadable).is_some_and(|until| until > now)
    }

    fn put(&mut self, key: VerifiedPath, is_upstreams: Option<bool>, until: Instant, times: usize) {
        self.insert(key, UpstreamAnswer { is_upstreams, until, times, unreadable: None });
    }

    /// What upstream said cannot be read, so that it is as if it had said nothing; it is not asked
    /// again before `until`.
    fn put_unreadable(&mut self, key: VerifiedPath, until: Instant) {
        let times = self.times(&key);
        self.insert(
            key,
            UpstreamAnswer {
                is_upstreams: None,
                until: Instant::now(),
                times,
                unreadable: Some(until),
            },
        );
    }

    fn insert(&mut self, key: VerifiedPath, answer: UpstreamAnswer) {
        if self.young.len() >= GENERATION {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, answer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nix::golden;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{self, JoinHandle};
    use tiny_http::{Header, Response, Server};

    /// From cache.nixos.org, with its signature.
    const UPSTREAM_NARINFO: &str = include_str!("../../tests/data/cache.nixos.org.narinfo");

    const SIGNED: &str = "vx8ssdprqbd8zwyipycgh6jp25k69rx6";

    fn upstreams() -> PathInfo {
        NarInfo::parse(UPSTREAM_NARINFO.as_bytes(), &golden::store_dir()).unwrap().info
    }

    /// Where nobody is.
    fn unreachable(key: Option<PublicKey>) -> Verifier {
        Verifier::with("http://127.0.0.1:9".into(), key, golden::store_dir())
    }

    /// Answers each request as it is told: status and body.
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
                    // A client that has read enough goes away.
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
    fn the_signature_of_the_default_upstream_is_proof() {
        let config = Config::default();
        assert_eq!(Verifier::new(&config).verified_now(&upstreams()), Some(true));
        // Of another upstream no key is known.
        let other = Verifier::new(&Config {
            upstream_cache: "https://cache.example".into(),
            ..config.clone()
        });
        assert_eq!(other.verified_now(&upstreams()), None);
        // It covers all of these.
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
            assert_eq!(Verifier::new(&config).verified_now(&info), None, "change {at}");
        }
    }

    #[test]
    fn signatures_are_checked_once_and_only_of_the_right_name() {
        let public = PublicKey::parse(golden::PUBLIC_KEY.trim()).unwrap();
        let secret = crate::nix::SecretKey::parse(golden::SECRET_KEY).unwrap();
        let mut info = narinfo().info;
        let fingerprint = info.fingerprint(&golden::store_dir());
        info.signatures = vec![secret.sign(fingerprint.as_bytes())];
        let verifier = unreachable(Some(public));
        assert_eq!(verifier.verified_now(&info), Some(true));
        // Remembered: the signature is not looked at again.
        info.signatures.clear();
        assert_eq!(verifier.verified_now(&info), Some(true));
        assert!(verifier.verified(&info));

        let mut forged =
            golden::narinfos().into_iter().map(|n| n.info).find(|i| i.path != info.path).unwrap();
        forged.signatures = vec![secret.sign(b"something else")];
        assert_eq!(verifier.verified_now(&forged), None);
        assert_eq!(verifier.lock().answers.get(&key(&forged), Instant::now()), Some(None));
        forged.signatures = vec![secret.sign(forged.fingerprint(&golden::store_dir()).as_bytes())];
        assert_eq!(verifier.verified_now(&forged), None, "it was checked again");
        assert!(!verifier.verified(&forged), "nobody is there to ask");
    }

    #[test]
    fn what_upstream_says_and_what_follows() {
        let text = |change: fn(&mut NarInfo)| {
            let mut narinfo = narinfo();
            narinfo.compression = "xz".into();
            change(&mut narinfo);
            narinfo.print(&golden::store_dir())
        };
        let elsewhere = text(|_| {}).replace("/nix/store", "/other/store");
        let long = format!("{}Sig: {}\n", text(|_| {}), "x".repeat(NarInfo::MAX_LEN));
        // Status, body, answer, whether it is remembered, and whether upstream is left alone.
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
            assert_eq!(verifier.verified_now(&info), None, "{case}");
            assert_eq!(verifier.verified(&info), answer, "{case}");
            assert_eq!(verifier.verified_now(&info), kept.then_some(answer), "{case}");
            // Neither is asked again at once.
            assert_eq!(verifier.verified(&info), answer, "{case}");
            assert_eq!(upstream.requests(), 1, "{case}");
            assert_eq!(verifier.lock().backoff.failures() > 0, pauses, "{case}");
            // With another NAR it is another question.
            let other = PathInfo { nar_hash: NarHash::from_bytes([2; 32]), ..info };
            assert_eq!(verifier.verified_now(&other), None, "{case}");
            assert!(!verifier.verified(&other), "{case}");
        }
    }

    /// A path that was built before it was uploaded used to be shared an hour later, or never.
    #[test]
    fn path_that_upstream_lacks_is_asked_about_again_ever_later() {
        let (upstream, verifier) = Upstream::start(|_| (404, String::new()));
        let info = narinfo().info;
        let known = |after| verifier.lock().answers.get(&key(&info), Instant::now() + after);
        for seconds in [60, 300, 3600, 24 * 3600, 24 * 3600] {
            assert!(!verifier.verified(&info) && !verifier.verified(&info));
            assert_eq!(known(Duration::from_secs(seconds - 5)), Some(Some(false)));
            assert_eq!(known(Duration::from_secs(seconds)), None);
            let at = verifier.ask_at(&info).unwrap();
            assert!(at > Instant::now() + Duration::from_secs(seconds - 5));
            // Time passes.
            let mut state = verifier.lock();
            state.answers.young.get_mut(&key(&info)).unwrap().until = Instant::now();
        }
        assert_eq!(upstream.requests(), 5);
        assert_eq!(verifier.verified_now(&info), None);
        assert!(verifier.ask_at(&info).unwrap() <= Instant::now());
    }

    /// The login page of a network, at which paths used to be taken for missing.
    #[test]
    fn unreadable_answer_is_none() {
        let is_portal = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let portal = is_portal.clone();
        let (upstream, verifier) = Upstream::start(move |_| match portal.load(Ordering::SeqCst) {
            true => (200, "<html>please log in</html>".into()),
            false => (200, narinfo().print(&golden::store_dir())),
        });
        let info = narinfo().info;
        assert!(!verifier.verified(&info) && !verifier.verified(&info));
        assert_eq!((upstream.requests(), verifier.verified_now(&info)), (1, None));
        assert!(verifier.ask_at(&info).is_some());
        is_portal.store(false, Ordering::SeqCst);
        verifier.lock().answers.young.get_mut(&key(&info)).unwrap().unreadable =
            Some(Instant::now());
        assert!(verifier.verified(&info));
        assert_eq!(verifier.ask_at(&info), None);
    }

    #[test]
    fn after_the_pause_upstream_is_asked_again() {
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
        verifier.lock().backoff.reset();
        assert!(verifier.verified(&info));
    }

    /// Nix 2.32 compresses narinfos that it uploads, if it is told to.
    #[test]
    fn compressed_narinfos_are_read_and_bombs_are_not() {
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
        for (encoding, body, is_upstreams) in [
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
                assert_eq!(verifier.verified(&narinfo().info), is_upstreams, "{encoding}");
            });
        }
    }

    #[test]
    fn redirects_are_followed_and_have_an_end() {
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
    fn so_many_wait_and_no_more() {
        let verifier = unreachable(None);
        let info = narinfo().info;
        let others = || {
            (0..MAX_REQUESTS as u8).map(|n| (info.path.hash_part(), NarHash::from_bytes([n; 32])))
        };
        verifier.lock().asked.extend(others());
        verifier.lock().waiting = MAX_WAITING;
        thread::scope(|scope| {
            let refused = scope.spawn(|| verifier.turn(&key(&info)));
            while !refused.is_finished() {
                assert_eq!(verifier.lock().waiting, MAX_WAITING, "one more waits");
                thread::yield_now();
            }
            assert!(matches!(refused.join().unwrap(), RequestTurn::NotNow));
        });
        verifier.lock().waiting = 0;
        thread::scope(|scope| {
            let waiter = scope.spawn(|| verifier.turn(&key(&info)));
            while verifier.lock().waiting == 0 {
                thread::yield_now();
            }
            let first = others().next().unwrap();
            verifier.lock().asked.remove(&first);
            verifier.ended.notify_all();
            assert!(matches!(waiter.join().unwrap(), RequestTurn::Mine));
        });
        assert_eq!(verifier.lock().asked.len(), MAX_REQUESTS);
    }

    #[test]
    fn of_many_answers_the_oldest_are_forgotten() {
        let (mut answers, now) = (UpstreamAnswers::default(), Instant::now());
        let hash_part = narinfo().info.path.hash_part();
        let key = |n: usize| {
            let mut bytes = [0; 32];
            bytes[..8].copy_from_slice(&n.to_le_bytes());
            (hash_part, NarHash::from_bytes(bytes))
        };
        for n in 0..10 * GENERATION {
            answers.put(key(n), Some(true), now + UNPROVEN, 1);
            assert!(answers.young.len() + answers.old.len() <= 2 * GENERATION);
        }
        let known = (0..10 * GENERATION).filter(|n| answers.get(&key(*n), now).is_some()).count();
        assert_eq!(known, 2 * GENERATION);
        assert!(answers.get(&key(10 * GENERATION - 1), now).is_some());
    }
}
