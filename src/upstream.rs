//! Whether this machine's Nix is certain to get a path from the upstream cache instead, and how
//! fast.
//!
//! A slow peer is left for the upstream cache only if nothing can be lost by it: Nix has it among
//! its substituters, it has this very NAR with a signature that Nix trusts, and it is reachable and
//! fast enough now. Whatever cannot be told counts against it, as on a network without a way out a
//! slow peer is all there is.

use crate::config::{Config, DEFAULT_UPSTREAM, UPSTREAM_KEY};
use crate::http_client;
use crate::lookup::FoundNar;
use crate::nix::{HashPart, NarInfo, PublicKey, StoreDir};
use crate::trust::NixConf;
use std::collections::HashMap;
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use ureq::Agent;

/// What upstream said of a path is true for this long, and so is that it gave no answer.
const KEPT: Duration = Duration::from_secs(60);
/// Answers remembered. Beyond, all are forgotten.
const MAX_ANSWERS: usize = 1024;
/// Its pace is remembered for this long.
const PACE_KEPT: Duration = Duration::from_secs(600);
/// A request to the upstream cache takes no longer. A slow peer sends meanwhile.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Bytes of a NAR by which the pace is measured, and the longest time for them.
const SAMPLE: u64 = 1 << 20;
const SAMPLE_TIME: Duration = Duration::from_secs(1);
/// As many redirects as caches of object stores need.
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
    /// Whether it has a path, and since when that is known.
    answers: HashMap<HashPart, (Instant, bool)>,
    /// Bytes per second, and when they were measured.
    pace: Option<(Instant, f64)>,
    /// When what was left to it lately has come from there, at its pace.
    busy_until: Option<Instant>,
    /// It gave no answer, and is left alone until then.
    paused_until: Option<Instant>,
}

impl UpstreamState {
    /// How long a NAR of so many bytes takes, which shares the link with those that were left to it
    /// before.
    fn time(&self, nar_size: u64, now: Instant) -> Option<Duration> {
        let pace = self.pace.filter(|(at, _)| now.saturating_duration_since(*at) < PACE_KEPT)?.1;
        let before =
            self.busy_until.map_or(Duration::ZERO, |until| until.saturating_duration_since(now));
        before.checked_add(Duration::try_from_secs_f64(nar_size as f64 / pace.max(1.0)).ok()?)
    }
}

impl Upstream {
    /// The upstream cache that the user chose. `trusted` are the keys that Nix trusts, as far as
    /// they are known.
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

    /// How long the whole NAR takes from there; `None` unless Nix is certain to get it. Blocks for
    /// 5 s at most, and mostly not at all.
    pub fn time(&self, found: &FoundNar) -> Option<Duration> {
        let now = Instant::now();
        let hash_part = found.path.hash_part();
        let known = {
            let state = self.lock();
            if state.paused_until.is_some_and(|until| now < until) {
                return None;
            }
            state
                .answers
                .get(&hash_part)
                .filter(|(at, _)| now.saturating_duration_since(*at) < KEPT)
                .map(|(_, has)| *has)
        };
        let has = match known {
            Some(has) => has,
            None => self.look_up(&hash_part, found)?,
        };
        has.then(|| self.lock().time(found.nar_size, Instant::now()))?
    }

    /// Nix is about to get so many bytes of a NAR from there.
    pub fn left(&self, nar_size: u64) {
        let now = Instant::now();
        let mut state = self.lock();
        if let Some(time) = state.time(nar_size, now) {
            state.busy_until = now.checked_add(time);
        }
    }

    /// Asks whether it has the NAR, and measures its pace by it if that is not known. `None`: no
    /// answer.
    fn look_up(&self, hash_part: &HashPart, found: &FoundNar) -> Option<bool> {
        let keys = NixConf::read(&self.nix_conf_dir).keys_for_substituter(&self.url);
        let has = keys.map(|keys| self.request(hash_part, found, &keys));
        let now = Instant::now();
        let mut state = self.lock();
        let has = match has {
            None => false,
            Some(Ok(has)) => has,
            Some(Err(e)) => {
                log::debug!(
                    "{hash_part}: upstream cache {}: {e}; slow peers are not left for it",
                    self.url
                );
                state.paused_until = Some(now + KEPT);
                return None;
            }
        };
        if state.answers.len() >= MAX_ANSWERS {
            state.answers.clear();
        }
        state.answers.insert(*hash_part, (now, has));
        Some(has)
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
        if !self.is_it(&narinfo, found, in_nix_conf) || narinfo.url.contains("://") {
            return Ok(false);
        }
        let is_measured = |(at, _): (Instant, f64)| at.elapsed() < PACE_KEPT;
        if !self.lock().pace.is_some_and(is_measured) {
            let pace = self.measure(&narinfo.url)?;
            log::debug!("upstream cache {}: {:.0} KiB/s", self.url, pace / 1024.0);
            self.lock().pace = Some((Instant::now(), pace));
        }
        Ok(true)
    }

    /// Whether it is the same NAR, with the signature of a key that both peerix and nix.conf trust.
    fn is_it(&self, narinfo: &NarInfo, found: &FoundNar, in_nix_conf: &[PublicKey]) -> bool {
        let info = &narinfo.info;
        let is_same = info.path == found.path
            && info.nar_hash == found.nar_hash
            && info.nar_size == found.nar_size;
        let fingerprint = info.fingerprint(&self.store_dir);
        let mut keys = self.keys.iter().filter(|key| in_nix_conf.contains(key));
        is_same
            && keys.any(|key| info.signatures.iter().any(|s| key.verify(fingerprint.as_bytes(), s)))
    }

    /// Bytes per second that its NARs come with, of which those of a compressed NAR count as they
    /// come.
    fn measure(&self, nar_url: &str) -> Result<f64, ureq::Error> {
        let began = Instant::now();
        let range = format!("bytes=0-{}", SAMPLE - 1);
        let mut response =
            self.agent.get(format!("{}/{nar_url}", self.url)).header("Range", range).call()?;
        if !matches!(response.status().as_u16(), 200 | 206) {
            return Err(ureq::Error::StatusCode(response.status().as_u16()));
        }
        let mut body = response.body_mut().as_reader().take(SAMPLE);
        let (mut buffer, mut bytes) = (vec![0; 64 * 1024], 0);
        while began.elapsed() < SAMPLE_TIME {
            match body.read(&mut buffer)? {
                0 => break,
                got => bytes += got,
            }
        }
        Ok(bytes as f64 / began.elapsed().as_secs_f64())
    }

    fn lock(&self) -> MutexGuard<'_, UpstreamState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From cache.nixos.org, with its signature.
    const NARINFO: &str = include_str!("../tests/data/cache.nixos.org.narinfo");

    #[test]
    fn nar_is_the_same_only_with_a_trusted_signature_and_equal_in_hash_and_size() {
        let with = |url: &str| {
            Upstream::new(&Config { upstream_cache: url.into(), ..Config::default() }, &[])
        };
        let upstream = with(DEFAULT_UPSTREAM);
        let narinfo = NarInfo::parse(NARINFO.as_bytes(), &upstream.store_dir).unwrap();
        let found = || {
            let info = narinfo.info.clone();
            FoundNar {
                path: info.path,
                nar_hash: info.nar_hash,
                nar_size: info.nar_size,
                sources: Vec::new(),
            }
        };
        let keys = [PublicKey::parse(UPSTREAM_KEY).unwrap()];
        assert!(upstream.is_it(&narinfo, &found(), &keys));
        // Nix would refuse what it gets there.
        assert!(!upstream.is_it(&narinfo, &found(), &[]));
        assert!(!upstream.is_it(&narinfo, &FoundNar { nar_size: 1, ..found() }, &keys));
        let mut forged = narinfo.clone();
        forged.info.references.clear();
        assert!(!upstream.is_it(&forged, &found(), &keys));
        // Its key is not known.
        assert!(!with("https://cache.example").is_it(&narinfo, &found(), &keys));
    }

    #[test]
    fn what_was_left_to_it_before_takes_its_part_of_the_pace() {
        let upstream = Upstream::new(&Config::default(), &[]);
        upstream.left(1000);
        let now = Instant::now();
        upstream.lock().pace = Some((now, 1000.0));
        assert_eq!(upstream.lock().time(2000, now), Some(Duration::from_secs(2)));
        upstream.left(50_000);
        assert_eq!(upstream.lock().time(2000, now).map(|time| time.as_secs()), Some(52));
        assert_eq!(
            upstream.lock().time(2000, now + Duration::from_secs(100)),
            Some(Duration::from_secs(2))
        );
        assert_eq!(upstream.lock().time(2000, now + PACE_KEPT), None);
    }
}
