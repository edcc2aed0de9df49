//! What a request asks for, and whether its asker may ask that. Pure: decided from method, target
//! and scope.

use crate::access::Scope;
use crate::nix::{DrvOutput, HashPart, NarHash, StorePath};
use percent_encoding::percent_decode_str;

/// A NAR by name: `<hash part>-<NAR hash>.nar`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NarFileName {
    /// The path.
    pub hash_part: HashPart,
    /// The NAR it must have.
    pub nar_hash: NarHash,
}

impl NarFileName {
    fn parse(text: &str) -> Option<Self> {
        let (hash_part, nar_hash) = text.strip_suffix(".nar")?.split_once('-')?;
        Some(NarFileName {
            hash_part: HashPart::parse(hash_part.as_bytes()).ok()?,
            nar_hash: NarHash::from_nix32(nar_hash).ok()?,
        })
    }
}

impl std::fmt::Display for NarFileName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let nar_hash = self.nar_hash.to_nix32();
        // Without arguments to format, as there is one in every narinfo.
        [self.hash_part.as_str(), "-", &nar_hash, ".nar"]
            .iter()
            .try_for_each(|part| f.write_str(part))
    }
}

/// Which of the two views of the own store; they differ in what a narinfo's `URL` is relative to,
/// and in that a NAR may be compressed on its way to a peer, and never to Nix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreView {
    /// `/local`: URLs are relative to the server's root, as peers expect.
    Peers,
    /// `/store`: a standard cache.
    Cache,
}

/// What this node tells of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusRoute {
    /// `/`: for people.
    Page,
    /// `/status.json`: the same for programs.
    Json,
    /// `/metrics`: for Prometheus.
    Metrics,
    /// `/health`: whether it is well.
    Health,
}

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// `/`, `/status.json`, `/metrics`, `/health`.
    Status(StatusRoute),
    /// `/nix-cache-info`, which tells nobody anything, and `/store/nix-cache-info`.
    CacheInfo(StoreView),
    /// `/<hash part>.narinfo`: does any peer have it?
    PeerNarinfo(HashPart),
    /// `/peer/nar/…`: from a peer.
    PeerNar(NarFileName),
    /// `/v2/remote/<address>/<port>/<hash part>/…` and `/v3/wan/wan/<address>/<port>/<peer
    /// ID>/<hash part>/…`: the same, as the Python peerix wrote it into what Nix remembers for 30
    /// days. Which NAR that was is not in it.
    PeerAnyNar(HashPart),
    /// `/log/<derivation>`: from a peer.
    PeerLog(StorePath),
    /// `/realisations/….doi`, `/build-trace-v2/….doi`: from a peer.
    PeerRealisation(DrvOutput),
    /// `/local/….narinfo`, `/store/….narinfo`: of the own store.
    OwnNarinfo(HashPart, StoreView),
    /// `/local/nar/…`, `/store/nar/…`: of the own store.
    OwnNar(NarFileName, StoreView),
    /// `/local/digests/…`: the digests of a NAR's pieces.
    Digests(NarFileName),
    /// `/store/<hash part>.ls`.
    Listing(HashPart),
    /// `/store/log/<derivation>`.
    Log(StorePath),
    /// `/store/realisations/….doi`, `/store/build-trace-v2/….doi`: of the own store.
    OwnRealisation(DrvOutput),
}

/// Why a request gets no answer of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteError {
    /// 400.
    Malformed,
    /// 403.
    Forbidden,
    /// 404.
    NotThere,
    /// 405.
    Method,
}

/// A target longer than this has no route; the longest that has is a log's, with a name of 211
/// bytes that may all be percent-encoded.
const MAX_TARGET: usize = 1024;

/// Decides. `served` is whether the asker's scope is served at all.
///
/// # Errors
/// See [`RouteError`].
pub fn route(method: &str, target: &str, scope: Scope, served: bool) -> Result<Route, RouteError> {
    if !matches!(method, "GET" | "HEAD") {
        return Err(RouteError::Method);
    }
    if target.len() > MAX_TARGET {
        return Err(RouteError::NotThere);
    }
    let path = match target.strip_prefix("http://") {
        // The absolute form, which a server has to understand.
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let path = match path.contains('%') {
        true => percent_decode_str(path).decode_utf8().map_err(|_| RouteError::Malformed)?,
        false => path.into(),
    };
    let Some(path) = path.strip_prefix('/') else { return Err(RouteError::Malformed) };
    if path.bytes().any(|b| b.is_ascii_control()) {
        return Err(RouteError::Malformed);
    }
    // For everybody but this machine's own Nix, the root is a standard cache of the own store.
    let at_root =
        if scope == Scope::ThisMachine { from_peers(path) } else { own(path, StoreView::Cache) };
    let route = anywhere(path).or(at_root).ok_or(RouteError::NotThere)?;
    let allowed = match route {
        Route::CacheInfo(StoreView::Peers) => true,
        Route::Status(_) | Route::PeerNarinfo(_) | Route::PeerNar(_) => scope == Scope::ThisMachine,
        _ => served,
    };
    if allowed { Ok(route) } else { Err(RouteError::Forbidden) }
}

/// What means the same for everybody who may ask for it.
fn anywhere(path: &str) -> Option<Route> {
    match path {
        "" => Some(Route::Status(StatusRoute::Page)),
        "status.json" => Some(Route::Status(StatusRoute::Json)),
        "metrics" => Some(Route::Status(StatusRoute::Metrics)),
        "health" => Some(Route::Status(StatusRoute::Health)),
        "nix-cache-info" => Some(Route::CacheInfo(StoreView::Peers)),
        "store/nix-cache-info" => Some(Route::CacheInfo(StoreView::Cache)),
        _ => match path.split_once('/')? {
            ("peer", rest) => NarFileName::parse(rest.strip_prefix("nar/")?).map(Route::PeerNar),
            ("local", rest) => own(rest, StoreView::Peers),
            ("store", rest) => own(rest, StoreView::Cache),
            _ => None,
        },
    }
}

/// What the own store is asked for, relative to `/local` or `/store`.
fn own(path: &str, view: StoreView) -> Option<Route> {
    match path.split_once('/') {
        Some(("nar", name)) => NarFileName::parse(name).map(|name| Route::OwnNar(name, view)),
        Some(("digests", name)) => NarFileName::parse(name).map(Route::Digests),
        Some(("log", name)) => derivation(name).map(Route::Log),
        Some(_) => drv_output(path).map(Route::OwnRealisation),
        None => match path.strip_suffix(".ls") {
            Some(hash_part) => HashPart::parse(hash_part.as_bytes()).ok().map(Route::Listing),
            None => narinfo(path).map(|hash_part| Route::OwnNarinfo(hash_part, view)),
        },
    }
}

/// What this machine's Nix asks peers for.
fn from_peers(path: &str) -> Option<Route> {
    match path.split_once('/') {
        Some(("log", name)) => derivation(name).map(Route::PeerLog),
        Some(("v2", rest)) => remembered(rest.strip_prefix("remote/")?.split('/').nth(2)?),
        Some(("v3", rest)) => remembered(rest.strip_prefix("wan/wan/")?.split('/').nth(3)?),
        Some(_) => drv_output(path).map(Route::PeerRealisation),
        None => narinfo(path).map(Route::PeerNarinfo),
    }
}

fn remembered(hash_part: &str) -> Option<Route> {
    HashPart::parse(hash_part.as_bytes()).ok().map(Route::PeerAnyNar)
}

fn narinfo(name: &str) -> Option<HashPart> {
    HashPart::parse(name.strip_suffix(".narinfo")?.as_bytes()).ok()
}

fn derivation(name: &str) -> Option<StorePath> {
    StorePath::parse(name).ok().filter(StorePath::is_derivation)
}

fn drv_output(path: &str) -> Option<DrvOutput> {
    let path = path.strip_suffix(".doi")?;
    match path.split_once('/')? {
        ("realisations", id) => DrvOutput::parse_id(id).ok(),
        ("build-trace-v2", rest) => {
            let (derivation, output) = rest.split_once('/')?;
            DrvOutput::parse_path(derivation, output).ok()
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HASH_PART: &str = "7h7qgvs4kgzsn8a6rb273saxyqh4jxlz";
    const NAR_HASH: &str = "0mdqa9w1p6cmli6976v4wi0sw9r4p5prkj7lzfd1877wk11c9c73";

    fn get(target: &str, scope: Scope) -> Result<Route, RouteError> {
        route("GET", target, scope, scope != Scope::Wan)
    }

    #[test]
    fn every_route_and_who_may_ask() {
        let hash_part = HashPart::parse(HASH_PART.as_bytes()).unwrap();
        let name = NarFileName { hash_part, nar_hash: NarHash::from_nix32(NAR_HASH).unwrap() };
        let drv = StorePath::parse(&format!("{HASH_PART}-a.drv")).unwrap();
        let id = DrvOutput::parse_id(&format!("sha256:{}!out", "0".repeat(64))).unwrap();
        let trace = DrvOutput::parse_path(drv.base_name(), "out").unwrap();
        for (target, expected, only_this_machine) in [
            ("/".into(), Route::Status(StatusRoute::Page), true),
            ("/status.json".into(), Route::Status(StatusRoute::Json), true),
            ("/metrics".into(), Route::Status(StatusRoute::Metrics), true),
            ("/health".into(), Route::Status(StatusRoute::Health), true),
            ("/store/nix-cache-info".into(), Route::CacheInfo(StoreView::Cache), false),
            (format!("/peer/nar/{name}"), Route::PeerNar(name), true),
            (
                format!("/local/{HASH_PART}.narinfo"),
                Route::OwnNarinfo(hash_part, StoreView::Peers),
                false,
            ),
            (
                format!("/store/{HASH_PART}.narinfo"),
                Route::OwnNarinfo(hash_part, StoreView::Cache),
                false,
            ),
            (format!("/local/nar/{name}"), Route::OwnNar(name, StoreView::Peers), false),
            (format!("/store/nar/{name}"), Route::OwnNar(name, StoreView::Cache), false),
            (format!("/local/digests/{name}"), Route::Digests(name), false),
            (format!("/store/{HASH_PART}.ls"), Route::Listing(hash_part), false),
            (format!("/store/log/{drv}"), Route::Log(drv.clone()), false),
            (format!("/local/{}", id.url_path()), Route::OwnRealisation(id.clone()), false),
            (format!("/store/{}", trace.url_path()), Route::OwnRealisation(trace.clone()), false),
        ] {
            for method in ["GET", "HEAD"] {
                assert_eq!(
                    route(method, &target, Scope::ThisMachine, true).as_ref(),
                    Ok(&expected),
                    "{target}"
                );
            }
            for method in ["PUT", "POST", "DELETE", "OPTIONS", "get"] {
                assert_eq!(
                    route(method, &target, Scope::ThisMachine, true),
                    Err(RouteError::Method)
                );
            }
            let lan = get(&target, Scope::Lan);
            assert_eq!(
                lan,
                if only_this_machine { Err(RouteError::Forbidden) } else { Ok(expected) },
                "{target}"
            );
            assert_eq!(get(&target, Scope::Wan), Err(RouteError::Forbidden), "{target}");
        }
        // At the root, this machine asks its peers, and others ask for its store.
        for (target, here, there) in [
            (
                format!("/{HASH_PART}.narinfo"),
                Route::PeerNarinfo(hash_part),
                Route::OwnNarinfo(hash_part, StoreView::Cache),
            ),
            (format!("/log/{drv}"), Route::PeerLog(drv.clone()), Route::Log(drv)),
            (
                format!("/{}", id.url_path()),
                Route::PeerRealisation(id.clone()),
                Route::OwnRealisation(id.clone()),
            ),
            (
                format!("/{}", trace.url_path()),
                Route::PeerRealisation(trace.clone()),
                Route::OwnRealisation(trace),
            ),
            (
                format!("/{}", id.url_path().replace('!', "%21")),
                Route::PeerRealisation(id.clone()),
                Route::OwnRealisation(id),
            ),
        ] {
            assert_eq!(get(&target, Scope::ThisMachine), Ok(here), "{target}");
            assert_eq!(get(&target, Scope::Lan), Ok(there), "{target}");
            assert_eq!(get(&target, Scope::Wan), Err(RouteError::Forbidden), "{target}");
        }
        let old = format!("/v2/remote/192.168.7.20/12304/{HASH_PART}/local/nar/remembered.nar");
        assert_eq!(get(&old, Scope::ThisMachine), Ok(Route::PeerAnyNar(hash_part)));
        let far =
            format!("/v3/wan/wan/203.0.113.7/12304/peer-1/{HASH_PART}/local/nar/remembered.nar");
        assert_eq!(get(&far, Scope::ThisMachine), Ok(Route::PeerAnyNar(hash_part)));
        assert_eq!(
            get(&format!("/nar/{name}"), Scope::Lan),
            Ok(Route::OwnNar(name, StoreView::Cache))
        );
        assert_eq!(get(&format!("/{HASH_PART}.ls"), Scope::Lan), Ok(Route::Listing(hash_part)));
        for target in [format!("/nar/{name}"), format!("/{HASH_PART}.ls")] {
            assert_eq!(get(&target, Scope::ThisMachine), Err(RouteError::NotThere), "{target}");
        }
        assert_eq!(get(&old, Scope::Lan), Err(RouteError::NotThere));
        for scope in [Scope::ThisMachine, Scope::Lan, Scope::Wan] {
            assert_eq!(get("/nix-cache-info", scope), Ok(Route::CacheInfo(StoreView::Peers)));
        }
    }

    #[test]
    fn encodings_that_nix_may_choose() {
        let hash_part = HashPart::parse(HASH_PART.as_bytes()).unwrap();
        for target in [
            format!("/%37{}.narinfo", &HASH_PART[1..]),
            format!("/{HASH_PART}%2Enarinfo"),
            format!("/{HASH_PART}.narinfo?x=%2Fy"),
            format!("http://127.0.0.1:12304/{HASH_PART}.narinfo"),
        ] {
            assert_eq!(
                get(&target, Scope::ThisMachine),
                Ok(Route::PeerNarinfo(hash_part)),
                "{target}"
            );
        }
    }

    #[test]
    fn nothing_but_typed_names_gets_through() {
        let secret = format!("/local/nar/{HASH_PART}-../../../etc/passwd");
        for target in [
            "/index.html",
            "/status.json/",
            "//",
            "/../../etc/passwd",
            "/%2e%2e/%2e%2e/etc/passwd",
            "/local/../etc/passwd",
            "/local/nar//nix/store/../../etc/passwd",
            "/local/nar/L25peC9zdG9yZS8uLi8uLi9ldGMvcGFzc3dk.nar",
            "/store/log/../../etc/passwd",
            "/store/log/7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-not-a-derivation",
            "/7h7qgvs4kgzsn8a6rb273saxyqh4jxl.narinfo",
            "/7h7qgvs4kgzsn8a6rb273saxyqh4jxlzz.narinfo",
            "/7h7qgvs4kgzsn8a6rb273saxyqh4jxlu.narinfo",
            "//7h7qgvs4kgzsn8a6rb273saxyqh4jxlz.narinfo",
            "/realisations/sha256:00!out.doi",
            "/realisations/sha256:00%21out.doi",
            "/build-trace-v2/7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-not-a-derivation/out.doi",
            "/v2/remote/10.0.0.1/12304/../../etc/passwd",
            &secret,
            &format!("/{}", "a".repeat(16000)),
        ] {
            assert_eq!(get(target, Scope::ThisMachine), Err(RouteError::NotThere), "{target}");
        }
        for target in ["/%00", "/a%0ab", "/%ff", "x", "*", ""] {
            assert_eq!(get(target, Scope::ThisMachine), Err(RouteError::Malformed), "{target}");
        }
    }
}
