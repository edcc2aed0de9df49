//! Tells whether this machine's Nix is certain to get a path from the upstream cache, and how fast.
//!
//! A slow peer is left for the upstream cache only if Nix cannot lose by it. Upstream must be among
//! Nix's substituters, have the same NAR with a signature that Nix trusts, and be reachable and
//! fast enough now. Whatever is unknown counts against upstream: on a network without Internet
//! access, a slow peer is the only source.

use crate::bounded_map::BoundedMap;
use crate::config::{Config, DEFAULT_UPSTREAM, UPSTREAM_KEY};
use crate::http_client;
use crate::lock::Mutex;
use crate::lookup::FoundNar;
use crate::nix::{HashPart, NarInfo, PublicKey, StoreDir};
use crate::trust::NixConf;
use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use ureq::Agent;

/// Lifetime of an answer about a path, and pause after a failed request.
const ANSWER_TTL: Duration = Duration::from_secs(60);
/// Maximum number of remembered answers. At the bound, the oldest is dropped.
const MAX_ANSWERS: usize = 1024;
/// Lifetime of the measured pace.
const PACE_TTL: Duration = Duration::from_secs(600);
/// Timeout of a request to the upstream cache. The slow peer sends meanwhile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Maximum bytes of a NAR that are read to measure the pace.
const SAMPLE_BYTES: u64 = 1 << 20;
/// Maximum time of that measurement. At the bound, the bytes so far give the pace.
const SAMPLE_TIME: Duration = Duration::from_secs(1);
/// Maximum number of redirects. Caches in object stores need some.
const MAX_REDIRECTS: u32 = 3;

/// The upstream cache, as this machine's Nix would use it.
pub struct Upstream {
    agent: Agent,
    url: String,
    keys: Vec<PublicKey>,
    store_dir: StoreDir,
    nix_conf_dir: PathBuf,
    state: Mutex<UpstreamState>,
}

#[derive(Default)]
struct UpstreamState {
    /// Whether upstream has a path, and when that was learned.
    answers: BoundedMap<HashPart, (Instant, bool), MAX_ANSWERS>,
    /// Bytes per second, and when they were measured.
    pace: Option<(Instant, f64)>,
    /// When the NARs that were left to upstream should have arrived, at its pace.
    busy_until: Option<Instant>,
    /// No request before this time, as the last one failed.
    paused_until: Option<Instant>,
}

impl UpstreamState {
    /// Expected time of a NAR of `nar_size` bytes, which shares the link with NARs that were left
    /// to upstream before. `None` if the pace is not known.
    fn time(&self, nar_size: u64, now: Instant) -> Option<Duration> {
        let pace = self.pace.filter(|(at, _)| now.saturating_duration_since(*at) < PACE_TTL)?.1;
        let before =
            self.busy_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        before.checked_add(Duration::try_from_secs_f64(nar_size as f64 / pace.max(1.0)).ok()?)
    }
}

impl Upstream {
    /// Creates a client of the configured upstream cache. `trusted` are the keys that Nix trusts,
    /// as far as they are known.
    pub fn new(config: &Config, trusted: &[PublicKey]) -> Self {
        let agent = http_client::cache_config(&config.upstream_cache, MAX_REDIRECTS)
            .timeout_global(Some(REQUEST_TIMEOUT))
            .build();
        let mut keys = trusted.to_vec();
        if config.upstream_cache == DEFAULT_UPSTREAM {
            keys.extend(PublicKey::parse(UPSTREAM_KEY));
        }
        Upstream {
            agent: agent.new_agent(),
            url: config.upstream_cache.clone(),
            keys,
            store_dir: config.store_dir.clone(),
            nix_conf_dir: config.nix_conf_dir.clone(),
            state: Mutex::default(),
        }
    }

    /// Returns the expected time of the whole NAR from upstream; `None` unless Nix is certain to
    /// get it there. Mostly answers from memory. Otherwise blocks for at most 4 s: two requests of
    /// 2 s. With less than that in `left`, it asks nobody.
    pub fn time(&self, found: &FoundNar, left: Duration) -> Option<Duration> {
        let now = Instant::now();
        let hash_part = found.path.hash_part();
        let known = {
            let state = self.state.lock();
            if state.paused_until.is_some_and(|until| now < until) {
                return None;
            }
            state
                .answers
                .get(&hash_part)
                .filter(|(at, _)| now.saturating_duration_since(*at) < ANSWER_TTL)
                .map(|(_, has_path)| *has_path)
        };
        let has_path = match known {
            Some(has_path) => has_path,
            None if left < 2 * REQUEST_TIMEOUT => return None,
            None => self.look_up(&hash_part, found)?,
        };
        has_path.then(|| self.state.lock().time(found.nar_size, Instant::now()))?
    }

    /// Records that Nix is about to get `nar_size` bytes of a NAR from upstream.
    pub fn record_left_nar(&self, nar_size: u64) {
        let now = Instant::now();
        let mut state = self.state.lock();
        if let Some(time) = state.time(nar_size, now) {
            state.busy_until = now.checked_add(time);
        }
    }

    /// Asks upstream whether it has the NAR, and measures the pace if that is not known. Returns
    /// `None` if upstream does not answer.
    fn look_up(&self, hash_part: &HashPart, found: &FoundNar) -> Option<bool> {
        let keys = NixConf::read(&self.nix_conf_dir).keys_for_substituter(&self.url);
        let has_path = keys.map(|keys| self.request(hash_part, found, &keys));
        let now = Instant::now();
        let has_path = match has_path {
            None => false,
            Some(Ok(has_path)) => has_path,
            Some(Err(e)) => {
                log::debug!(
                    "{hash_part}: upstream cache {}: {e}; slow peers are not left for it",
                    self.url
                );
                self.state.lock().paused_until = Some(now + ANSWER_TTL);
                return None;
            }
        };
        self.state.lock().answers.insert(*hash_part, (now, has_path));
        Some(has_path)
    }

    fn request(
        &self,
        hash_part: &HashPart,
        found: &FoundNar,
        in_nix_conf: &[PublicKey],
    ) -> Result<bool, ureq::Error> {
        let mut response = self.agent.get(format!("{}/{hash_part}.narinfo", self.url)).call()?;
        if response.status() != 200 {
            return Ok(false);
        }
        let mut bytes = Vec::new();
        response
            .body_mut()
            .as_reader()
            .take(NarInfo::MAX_LEN as u64 + 1)
            .read_to_end(&mut bytes)?;
        let Ok(narinfo) = NarInfo::parse(&bytes, &self.store_dir) else { return Ok(false) };
        if !self.matches_nar(&narinfo, found, in_nix_conf) || narinfo.url.contains("://") {
            return Ok(false);
        }
        let is_measured = |(at, _): (Instant, f64)| at.elapsed() < PACE_TTL;
        if !self.state.lock().pace.is_some_and(is_measured) {
            let pace = self.measure(&narinfo.url)?;
            log::debug!("upstream cache {}: {:.0} KiB/s", self.url, pace / 1024.0);
            self.state.lock().pace = Some((Instant::now(), pace));
        }
        Ok(true)
    }

    /// Whether upstream has the same NAR, signed by a key that both peerix and nix.conf trust.
    fn matches_nar(&self, narinfo: &NarInfo, found: &FoundNar, in_nix_conf: &[PublicKey]) -> bool {
        let info = &narinfo.info;
        let fingerprint = info.fingerprint(&self.store_dir);
        let mut keys = self.keys.iter().filter(|key| in_nix_conf.contains(key));
        info.path == found.path
            && found.is_nar_of(info)
            && keys.any(|key| info.signatures.iter().any(|s| key.verify(fingerprint.as_bytes(), s)))
    }

    /// Measures the bytes per second of a NAR from upstream. Bytes of a compressed NAR count as
    /// they are sent, so the pace is a lower bound.
    fn measure(&self, nar_url: &str) -> Result<f64, ureq::Error> {
        let began = Instant::now();
        let range = format!("bytes=0-{}", SAMPLE_BYTES - 1);
        let mut response =
            self.agent.get(format!("{}/{nar_url}", self.url)).header("Range", range).call()?;
        if !matches!(response.status().as_u16(), 200 | 206) {
            return Err(ureq::Error::StatusCode(response.status().as_u16()));
        }
        let mut body = response.body_mut().as_reader().take(SAMPLE_BYTES);
        let (mut buffer, mut bytes) = (vec![0; 64 * 1024], 0);
        while began.elapsed() < SAMPLE_TIME {
            match body.read(&mut buffer)? {
                0 => break,
                received => bytes += received,
            }
        }
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::ErrorKind;
    use std::net::TcpListener;

    /// A narinfo of cache.nixos.org, with its signature.
    const NARINFO: &str = include_str!("../tests/data/cache.nixos.org.narinfo");

    #[test]
    fn is_it_without_trusted_signature_or_with_other_nar_is_false() {
        let with = |url: &str| {
            Upstream::new(&Config { upstream_cache: url.into(), ..Config::default() }, &[])
        };
        let upstream = with(DEFAULT_UPSTREAM);
        let narinfo = NarInfo::parse(NARINFO.as_bytes(), &upstream.store_dir).unwrap();
        let found = || FoundNar::new(&narinfo.info, Vec::new());
        let keys = [PublicKey::parse(UPSTREAM_KEY).unwrap()];
        assert!(upstream.matches_nar(&narinfo, &found(), &keys));
        // Nix does not trust the key, so it would refuse the path.
        assert!(!upstream.matches_nar(&narinfo, &found(), &[]));
        assert!(!upstream.matches_nar(&narinfo, &FoundNar { nar_size: 1, ..found() }, &keys));
        let mut forged = narinfo.clone();
        forged.info.references.clear();
        assert!(!upstream.matches_nar(&forged, &found(), &keys));
        // The key of this cache is unknown.
        assert!(!with("https://cache.example").matches_nar(&narinfo, &found(), &keys));
    }

    #[test]
    fn time_close_to_deadline_asks_nobody() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let dir = std::env::temp_dir().join(format!("peerix-upstream-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let conf = format!("substituters = {url}\ntrusted-public-keys = {UPSTREAM_KEY}\n");
        fs::write(dir.join("nix.conf"), conf).unwrap();
        let config = Config { upstream_cache: url, nix_conf_dir: dir.clone(), ..Config::default() };
        let upstream = Upstream::new(&config, &[]);
        let info = NarInfo::parse(NARINFO.as_bytes(), &upstream.store_dir).unwrap().info;
        let found = FoundNar::new(&info, Vec::new());
        assert_eq!(upstream.time(&found, Duration::from_millis(3999)), None);
        assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
        assert_eq!(upstream.time(&found, Duration::from_secs(4)), None, "it does not answer");
        assert!(listener.accept().is_ok());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn time_includes_nars_left_before() {
        let upstream = Upstream::new(&Config::default(), &[]);
        upstream.record_left_nar(1000);
        let now = Instant::now();
        upstream.state.lock().pace = Some((now, 1000.0));
        assert_eq!(upstream.state.lock().time(2000, now), Some(Duration::from_secs(2)));
        upstream.record_left_nar(50_000);
        assert_eq!(upstream.state.lock().time(2000, now).map(|time| time.as_secs()), Some(52));
        assert_eq!(
            upstream.state.lock().time(2000, now + Duration::from_secs(100)),
            Some(Duration::from_secs(2))
        );
        assert_eq!(upstream.state.lock().time(2000, now + PACE_TTL), None);
    }
}
