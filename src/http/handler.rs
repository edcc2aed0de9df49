//! Request handling: evaluates the route and the access rules, calls the module for the response,
//! and maps errors to HTTP statuses. No other module does the mapping.

use super::binary_cache::BinaryCache;
use super::error::{NOT_THERE, RequestError};
use super::response::{Exchange, ShortResponse};
use super::route::{NarFileName, Route, RouteError, StoreView, route};
use super::server::{Handler, PollGeneration};
use super::stream_limits::StreamPermit;
use super::{AuthenticatedKey, Request, nar, narinfo, origin, status};
use crate::access::Scope;
use crate::friends::FriendList;
use crate::log_throttle::LogThrottle;
use crate::nix::{DrvOutput, HashPart, SecretKey, StorePath};
use crate::status::StatusService;
use crate::upload_limit::UploadLimit;
use crate::wire::NodeKey;
use rustls::ServerConfig;
use std::io;
use std::sync::Arc;
use std::time::Instant;

/// The [`Handler`] of the daemon.
pub struct CacheHandler {
    /// What is served.
    pub cache: BinaryCache,
    /// Reports this node's status.
    pub status: StatusService,
    /// TLS settings and list of friends; `None` disables TLS.
    pub friends: Option<(Arc<ServerConfig>, Arc<FriendList>)>,
    /// Upload rate limit for all other machines together.
    pub upload_limit: Option<UploadLimit>,
    /// Limits log messages about requests that web pages may have made.
    pub refusals: LogThrottle,
}

/// Body of a 404 response.
const NOT_FOUND: &str = "not found";

impl Handler for CacheHandler {
    /// Answers narinfos and small NARs of the own store, which many clients request at the same
    /// time. WAN requests are left to [`Handler::handle`].
    fn try_cached(
        &self,
        request: &Request<'_>,
        generation: &mut PollGeneration,
    ) -> Option<ShortResponse> {
        let scope = self.scope(request);
        let route =
            route(request.method, request.target, scope, self.cache.access.serves(scope)).ok()?;
        let hash_part = match &route {
            Route::OwnNarinfo(hash_part, _) => hash_part,
            Route::OwnNar(name, _) => &name.hash_part,
            _ => return None,
        };
        // For these, `handle` may have to wait: for the upload limit, for the upstream cache (WAN),
        // or for `/etc/hosts` (a `Host` that is a name).
        let is_limited = scope != Scope::ThisMachine && self.upload_limit.is_some();
        let waits = is_limited || scope == Scope::Wan || origin::needs_hosts_file(request);
        if waits || self.refuse_web_pages(&route, request, scope).is_err() {
            return None;
        }
        match (self.cache.store.try_path_info(hash_part, generation)?, &route) {
            (Some(info), _) if !self.cache.access.allows_now(scope, &info) => {
                Some(ShortResponse::text(404, NOT_FOUND))
            }
            (Some(info), Route::OwnNarinfo(..))
                if info.references.len() > narinfo::MAX_SHORT_REFERENCES =>
            {
                None
            }
            (Some(info), Route::OwnNarinfo(_, view)) => {
                let signer = self.cache.signer.get();
                let store_dir = &self.cache.info.store_dir;
                Some(narinfo::own(store_dir, signer, &info, *view, request).answer())
            }
            (Some(info), Route::OwnNar(name, _)) => {
                nar::try_own(&self.cache, name, &info, scope, request)
            }
            // This machine is downloading the NAR.
            (None, Route::OwnNar(name, StoreView::Peers))
                if self.cache.downloader.spools.get(&name.nar_hash).is_some() =>
            {
                None
            }
            _ => Some(ShortResponse::text(404, NOT_FOUND)),
        }
    }

    fn on_idle(&self) {
        self.cache.store.clear_cache();
        self.cache.downloader.free_memory();
    }

    fn tls(&self) -> Option<Arc<ServerConfig>> {
        self.friends.as_ref().map(|(config, _)| config.clone())
    }

    fn is_friend(&self, key: &AuthenticatedKey) -> bool {
        self.friends
            .as_ref()
            .is_some_and(|(_, friends)| friends.get(&NodeKey::from_bytes(*key)).is_some())
    }

    fn answers_outside(&self) -> bool {
        self.cache.access.serves(Scope::Wan)
    }

    fn upload_limit(&self) -> Option<&UploadLimit> {
        self.upload_limit.as_ref()
    }

    fn handle(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        let scope = self.scope(request);
        request
            .key
            .iter()
            .for_each(|key| self.cache.lookup.record_friend_request(&NodeKey::from_bytes(*key)));
        let answered =
            route(request.method, request.target, scope, self.cache.access.serves(scope))
                .map_err(RequestError::Refused)
                .and_then(|route| self.refuse_web_pages(&route, request, scope).map(|()| route))
                .and_then(|route| self.answer(&route, request, scope, exchange));
        let Err(failure) = answered else { return Ok(()) };
        let busy = |exchange: &mut Exchange<'_>, line| match knows_busy(request, scope) {
            false => exchange.say(404, line),
            true => {
                let retry = [("Retry-After", "1"), ("Content-Type", "text/plain; charset=utf-8")];
                exchange.send(503, &retry, format!("{line}\n").as_bytes())
            }
        };
        match failure {
            RequestError::Refused(RouteError::Malformed) => exchange.say(400, "bad request"),
            RequestError::Refused(RouteError::Forbidden) => {
                exchange.say(403, "not for this address")
            }
            RequestError::Suspect(line, why) => {
                if let Some(why) = why.filter(|_| self.refusals.allow(Instant::now())) {
                    log::warn!(
                        "refused a request from this machine that a web page may have made ({}); \
                         if it was Nix's, have it ask for 127.0.0.1, or put the name into /etc/hosts",
                        why.escape_debug()
                    );
                }
                exchange.say(403, line)
            }
            RequestError::Refused(RouteError::NotThere) => exchange.say(404, NOT_FOUND),
            RequestError::Refused(RouteError::Method) => {
                let fields =
                    [("Allow", "GET, HEAD"), ("Content-Type", "text/plain; charset=utf-8")];
                exchange.send(405, &fields, b"only GET and HEAD\n")
            }
            RequestError::Unsatisfiable(size) => {
                exchange.send(416, &[("Content-Range", &format!("bytes */{size}"))], b"")
            }
            RequestError::Busy => busy(exchange, "busy"),
            RequestError::Store(e) => {
                if self.cache.faults.allow(Instant::now()) {
                    log::error!("{e}");
                }
                busy(exchange, "not available")
            }
            RequestError::Io(e) => Err(e),
        }
    }

    fn after_panic(&self, request: &Request<'_>, exchange: &mut Exchange<'_>) -> io::Result<()> {
        match knows_busy(request, self.scope(request)) {
            false => exchange.say(404, "not available"),
            true => exchange.say(500, "not available"),
        }
    }
}

impl CacheHandler {
    fn scope(&self, request: &Request<'_>) -> Scope {
        match request.key {
            Some(_) => Scope::Friend,
            None if request.is_outside => Scope::Wan,
            None if request.is_own => Scope::ThisMachine,
            None => self.cache.access.scope(request.peer_address),
        }
    }

    /// Refuses requests that a web page in a browser may have made. nix-cache-info is exempt: it
    /// discloses nothing, and Nix considers a cache without it broken. Nix treats a 403 as a
    /// missing path.
    fn refuse_web_pages(
        &self,
        route: &Route,
        request: &Request<'_>,
        scope: Scope,
    ) -> Result<(), RequestError> {
        if matches!(route, Route::CacheInfo(_)) {
            return Ok(());
        }
        // Browsers send no `Sec-Fetch-Site` to this machine's LAN addresses, to which a page may
        // also rebind its name.
        let is_loopback = request.peer_address.ip().to_canonical().is_loopback();
        if scope != Scope::ThisMachine || !is_loopback {
            let is_browser = origin::is_browser(request);
            return if is_browser {
                Err(RequestError::Suspect("not for browsers; ask with nix or curl", None))
            } else {
                Ok(())
            };
        }
        let line = "not under this name; ask for 127.0.0.1, localhost or [::1]";
        origin::suspicion(request, matches!(route, Route::Status(_)))
            .map_or(Ok(()), |why| Err(RequestError::Suspect(line, Some(why))))
    }

    fn answer(
        &self,
        route: &Route,
        request: &Request<'_>,
        scope: Scope,
        exchange: &mut Exchange<'_>,
    ) -> Result<(), RequestError> {
        let cache = &self.cache;
        match route {
            Route::Status(what) => Ok(status::send_status(&self.status, *what, true, exchange)?),
            Route::CacheInfo(_) => Ok(cache.info.send(exchange)?),
            Route::PeerNarinfo(hash_part) => {
                // `found` keeps the memory reservation of a large narinfo until it is sent.
                let found = cache.lookup.narinfo(hash_part).ok_or(NOT_THERE)?;
                Ok(narinfo::from_peer(&cache.info.store_dir, &found, request).send(exchange)?)
            }
            Route::OwnNarinfo(hash_part, view) => {
                self.own_narinfo(hash_part, *view, scope, request, exchange)
            }
            Route::PeerNar(name) => {
                let _permit = self.permit(request, scope, exchange)?;
                nar::from_peer(cache, name, request, exchange)
            }
            Route::PeerAnyNar(hash_part) => {
                let _permit = self.permit(request, scope, exchange)?;
                let nar_hash = cache.lookup.agreed_nar_hash(hash_part).ok_or(NOT_THERE)?;
                let name = NarFileName { hash_part: *hash_part, nar_hash };
                nar::from_peer(cache, &name, request, exchange)
            }
            Route::PeerLog(derivation) => {
                let log = cache.lookup.log(derivation).ok_or(NOT_THERE)?;
                let _permit = self.permit(request, scope, exchange)?;
                send_log(log.len, log.text, exchange)
            }
            Route::PeerRealisation(id) => {
                let realisation = cache.lookup.realisation(id).ok_or(NOT_THERE)?;
                Ok(exchange.send(200, &JSON, realisation.print(None).as_bytes())?)
            }
            Route::OwnRealisation(id) => self.own_realisation(id, scope, exchange),
            Route::OwnNar(name, view) => self.own_nar(name, *view, scope, request, exchange),
            // Refused, because a small request of a stranger would make this node hash 16 MiB.
            Route::Digests(_) if scope == Scope::Wan => Err(NOT_THERE),
            Route::Digests(name) => {
                let info = cache.path_info(&name.hash_part, scope)?;
                let _permit = self.permit(request, scope, exchange)?;
                nar::digests(cache, name, &info, request, exchange)
            }
            Route::Listing(hash_part) => {
                let info = cache.path_info(hash_part, scope)?;
                let _permit = self.permit(request, scope, exchange)?;
                let json =
                    cache.store.listing(&info).map_err(|e| cache.not_served(&info.path, &e))?;
                Ok(exchange.send(200, &JSON, &json)?)
            }
            Route::Log(derivation) => self.own_log(derivation, scope, request, exchange),
        }
    }

    /// Sends a NAR of the own store, or one that this machine is still downloading.
    fn own_nar(
        &self,
        name: &NarFileName,
        view: StoreView,
        scope: Scope,
        request: &Request<'_>,
        exchange: &mut Exchange<'_>,
    ) -> Result<(), RequestError> {
        // The access check precedes the permit, because it may wait for the upstream cache.
        let info = match self.cache.path_info(&name.hash_part, scope) {
            Err(RequestError::Refused(RouteError::NotThere))
                if scope == Scope::Lan && view == StoreView::Peers =>
            {
                let spool = self.cache.downloader.spools.get(&name.nar_hash).ok_or(NOT_THERE)?;
                let _permit = self.permit(request, scope, exchange)?;
                return nar::from_spool(&self.cache, name, &spool, request, exchange);
            }
            info => info?,
        };
        let _permit = self.permit(request, scope, exchange)?;
        // Compression is slower than a LAN. Nix reads the other view and cannot resume a compressed
        // NAR.
        let is_far = view == StoreView::Peers
            && self.cache.access.is_outside_lan(scope, request.peer_address);
        nar::own(&self.cache, name, &info, scope, is_far, request, exchange)
    }

    fn own_narinfo(
        &self,
        hash_part: &HashPart,
        view: StoreView,
        scope: Scope,
        request: &Request<'_>,
        exchange: &mut Exchange<'_>,
    ) -> Result<(), RequestError> {
        let mut info = self.cache.path_info(hash_part, scope)?;
        let mut permit = None;
        if info.references.len() > narinfo::MAX_SHORT_REFERENCES {
            // Requests that wait for a permit hold no path info, which may be large.
            drop(info);
            let is_own = scope == Scope::ThisMachine;
            let got = self.cache.stream_limits.for_large_narinfo(is_own, exchange.progress());
            permit = Some(got.ok_or(RequestError::Busy)?);
            info = self.cache.path_info(hash_part, scope)?;
        }
        let (store_dir, signer) = (&self.cache.info.store_dir, self.cache.signer.get());
        narinfo::own(store_dir, signer, &info, view, request).send(exchange)?;
        drop(permit);
        Ok(())
    }

    /// Sends the own store's realisation of an output, if the asker may have the output's path.
    fn own_realisation(
        &self,
        id: &DrvOutput,
        scope: Scope,
        exchange: &mut Exchange<'_>,
    ) -> Result<(), RequestError> {
        let realisation = self.cache.found_or_not_there(self.cache.store.realisation(id))?;
        self.cache.check_path(&realisation.out_path, scope)?;
        let signer = self.cache.signer.get();
        let signature = signer.map(|signer| signer.sign_text(&realisation.fingerprint()));
        Ok(exchange.send(200, &JSON, realisation.print(signature.as_ref()).as_bytes())?)
    }

    /// Sends the own store's build log of a derivation. Only this machine may read logs of
    /// derivations that are no valid paths.
    fn own_log(
        &self,
        derivation: &StorePath,
        scope: Scope,
        request: &Request<'_>,
        exchange: &mut Exchange<'_>,
    ) -> Result<(), RequestError> {
        if scope != Scope::ThisMachine {
            self.cache.check_path(derivation, scope)?;
        }
        let _permit = self.permit(request, scope, exchange)?;
        let log = self.cache.store.log(derivation)?.ok_or(NOT_THERE)?;
        send_log(log.len, log.reader, exchange)
    }

    fn permit(
        &self,
        request: &Request<'_>,
        scope: Scope,
        exchange: &Exchange<'_>,
    ) -> Result<StreamPermit<'_>, RequestError> {
        let ip = request.peer_address.ip().to_canonical();
        let peer = (scope != Scope::ThisMachine).then_some(ip);
        let waits = !knows_busy(request, scope);
        self.cache
            .stream_limits
            .for_stream(peer, exchange.progress(), waits)
            .ok_or(RequestError::Busy)
    }
}

/// Whether the client understands a 503 and asks another peer, as peerix does. Nix fails the build
/// on a 5xx; after a 404 it tries its next substituter.
fn knows_busy(request: &Request<'_>, scope: Scope) -> bool {
    scope != Scope::ThisMachine && request.target.starts_with("/local/")
}

const JSON: [(&str, &str); 1] = [("Content-Type", "application/json")];

fn send_log(
    len: u64,
    text: impl io::Read,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    exchange.begin(200, &[("Content-Type", "text/plain; charset=utf-8")], len)?;
    if exchange.wants_body() {
        io::copy(&mut text.take(len), exchange)?;
    }
    Ok(())
}

/// Creates a signer for the narinfos of the own store.
pub fn signer(key: SecretKey) -> narinfo::Signer {
    narinfo::Signer::new(key)
}
