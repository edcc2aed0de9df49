//! Maps a request's method, target and scope to a [`Route`], and decides whether the scope may use
//! it. It does no I/O.

use crate::access::Scope;
use crate::nix::{DrvOutput, HashPart, NarHash, StorePath};
use percent_encoding::percent_decode_str;

/// Name of a NAR: `<hash part>-<NAR hash>.nar`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NarFileName {
    /// Hash part of the store path.
    pub hash_part: HashPart,
    /// NAR hash that the path must have.
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
        // Avoids formatting machinery, because every narinfo contains such a name.
        [self.hash_part.as_str(), "-", &nar_hash, ".nar"]
            .iter()
            .try_for_each(|part| f.write_str(part))
    }
}

/// The two views of the own store. They differ in the base of a narinfo's `URL`, and only the view
/// for peers compresses NARs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreView {
    /// `/local`: URLs are relative to the server's root, as peers expect.
    Peers,
    /// `/store`: a standard binary cache.
    Cache,
}

/// Resources that describe this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusRoute {
    /// `/`: status page for people.
    Page,
    /// `/status.json`: the status page's data as JSON.
    Json,
    /// `/metrics`: for Prometheus.
    Metrics,
    /// `/health`: whether the node works.
    Health,
}

/// The resource that a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Route {
    /// `/`, `/status.json`, `/metrics`, `/health`.
    Status(StatusRoute),
    /// `/nix-cache-info`, which everybody may read because it discloses nothing, and
    /// `/store/nix-cache-info`.
    CacheInfo(StoreView),
    /// `/<hash part>.narinfo`: a path's narinfo from any peer.
    PeerNarinfo(HashPart),
    /// `/peer/nar/…`: a NAR from a peer.
    PeerNar(NarFileName),
    /// `/v2/remote/<address>/<port>/<hash part>/…` and `/v3/wan/wan/<address>/<port>/<peer
    /// ID>/<hash part>/…`: a NAR from any peer. The Python peerix put these into narinfos, which
    /// Nix caches for 30 days. They do not contain the NAR hash.
    PeerAnyNar(HashPart),
    /// `/log/<derivation>`: a build log from a peer.
    PeerLog(StorePath),
    /// `/realisations/….doi`, `/build-trace-v2/….doi`: a realisation from a peer.
    PeerRealisation(DrvOutput),
    /// `/local/….narinfo`, `/store/….narinfo`: a narinfo of the own store.
    OwnNarinfo(HashPart, StoreView),
    /// `/local/nar/…`, `/store/nar/…`: a NAR of the own store.
    OwnNar(NarFileName, StoreView),
    /// `/local/digests/…`: digests of a NAR's pieces.
    Digests(NarFileName),
    /// `/store/<hash part>.ls`: the listing of a path of the own store.
    Listing(HashPart),
    /// `/store/log/<derivation>`: a build log of this machine.
    Log(StorePath),
    /// `/store/realisations/….doi`, `/store/build-trace-v2/….doi`: a realisation of the own store.
    OwnRealisation(DrvOutput),
}

/// Why a request has no route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteError {
    /// 400: malformed target.
    Malformed,
    /// 403: the scope may not use the route.
    Forbidden,
    /// 404: no such resource.
    NotThere,
    /// 405: the method is neither GET nor HEAD.
    Method,
}

/// Longest target, in bytes. A longer one gets a 404. The longest valid one names a log: a name of
/// 211 bytes, all of which may be percent-encoded.
const MAX_TARGET: usize = 1024;

/// Returns the route of a request. `served` says whether the asker's scope is served at all.
///
/// # Errors
/// The [`RouteError`] that determines the response's status.
pub fn route(method: &str, target: &str, scope: Scope, served: bool) -> Result<Route, RouteError> {
    if !matches!(method, "GET" | "HEAD") {
        return Err(RouteError::Method);
    }
    if target.len() > MAX_TARGET {
        return Err(RouteError::NotThere);
    }
    let path = match target.strip_prefix("http://") {
        // Servers must accept the absolute form (RFC 9112, section 3.2.2).
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
    // For other machines, the root is a standard binary cache of the own store.
    let at_root =
        if scope == Scope::ThisMachine { from_peers(path) } else { own(path, StoreView::Cache) };
    let route = common_route(path).or(at_root).ok_or(RouteError::NotThere)?;
    let allowed = match route {
        Route::CacheInfo(StoreView::Peers) => true,
        Route::Status(_) | Route::PeerNarinfo(_) | Route::PeerNar(_) => scope == Scope::ThisMachine,
        _ => served,
    };
    if allowed { Ok(route) } else { Err(RouteError::Forbidden) }
}

/// Routes that have the same meaning for every scope.
fn common_route(path: &str) -> Option<Route> {
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

/// Routes of the own store, relative to `/local` or `/store`.
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

/// Routes with which this machine's Nix asks peers.
fn from_peers(path: &str) -> Option<Route> {
    match path.split_once('/') {
        Some(("log", name)) => derivation(name).map(Route::PeerLog),
        Some(("v2", rest)) => earlier_nar(rest.strip_prefix("remote/")?.split('/').nth(2)?),
        Some(("v3", rest)) => earlier_nar(rest.strip_prefix("wan/wan/")?.split('/').nth(3)?),
        Some(_) => drv_output(path).map(Route::PeerRealisation),
        None => narinfo(path).map(Route::PeerNarinfo),
    }
}

fn earlier_nar(hash_part: &str) -> Option<Route> {
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
    fn each_route_is_allowed_for_its_scopes_only() {
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
    fn equivalent_targets_have_the_same_route() {
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
    fn target_with_invalid_name_has_no_route() {
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
