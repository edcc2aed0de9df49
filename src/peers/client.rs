//! HTTP client for peers, based on blocking ureq. It checks the form of answers but trusts nothing
//! else in them, and it uses no redirects, proxies or name servers.

mod address;
mod build_log;
mod error;
mod nar_body;
mod narinfo;

pub use build_log::LogBody;
pub use error::PeerError;
pub use nar_body::{NarBody, READ_TIMEOUT};
pub use narinfo::PeerNarinfo;

use super::friend_transport::FriendConnector;
use super::read_timeout::{self, ReadTimeoutConnector};
use crate::bounded_map::BoundedMap;
use crate::http_client::{self, retry_once_if_stale};
use crate::lan::Holder;
use crate::lock::Mutex;
use crate::nix::{DrvOutput, HashPart, Malformed, Realisation, StoreDir, StorePath};
use crate::time_scale::Timeout;
use crate::wire::relay::{DIGEST_LEN, MAX_NAMED, PACE_HEADER, RELAY_HEADER};
use crate::wire::tracker::{TRANSFER_HEADER, TransferName};
use address::{PeerAddressResolver, url};
use narinfo::NarinfoReader;
use rustls::ClientConfig;
use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::http::Response;
use ureq::unversioned::transport::{Connector, DefaultConnector, TcpConnector};

/// Timeout of a connection attempt. A LAN peer that takes longer counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Slowest acceptable rate of one stream, in bytes per second. A slower peer is always abandoned,
/// because Nix would wait for it without end. Each of sixteen streams over the slowest Wi-Fi has
/// twice this rate.
pub const MIN_BYTES_PER_SECOND: u64 = 8 * 1024;
/// Time limit of a NAR body, in addition to the time that its size takes at [`MIN_BYTES_PER_SECOND`].
const BODY_GRACE: Duration = Duration::from_secs(30);

/// Idle connections kept per peer: as many as Nix opens to this node. Further ones are closed.
const MAX_IDLE_PER_PEER: usize = 25;
/// Idle connections kept in all. Further ones are closed.
const MAX_IDLE: usize = 100;
/// Age after which an idle connection is closed. Peers close theirs after 30 s, so a request rarely
/// meets a closed connection.
const MAX_IDLE_AGE: Timeout = Timeout::from_secs(15);

/// Size of ureq's input buffer, in bytes, which bounds one read of a NAR body. 128 KiB was the
/// fastest size between 16 and 512 KiB.
const INPUT_BUFFER_BYTES: usize = 128 * 1024;

/// Bytes that [`PeerClient::greet`] reads of an answer. peerix sends 60 bytes.
const MAX_GREETING_BYTES: u64 = 4096;

/// Number of odd paths remembered so that each is logged once. When it is reached, the one met
/// longest ago is forgotten and may be logged again.
const MAX_LOGGED_PATHS: usize = 1024;

/// HTTP client for peers; shared by all threads.
pub struct PeerClient {
    idle: Mutex<IdleConnections>,
    /// TLS configuration; set for a friend only.
    tls: Option<Arc<ClientConfig>>,
    narinfos: NarinfoReader,
    logged_paths: Mutex<BoundedMap<HashPart, (), MAX_LOGGED_PATHS>>,
}

/// The client with its idle connections.
struct IdleConnections {
    agent: Agent,
    /// Time of the last request; `None` if there was none since the connections were closed.
    used: Option<Instant>,
}

/// Kind of network between this node and a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// LAN: faster than compression.
    Lan,
    /// LAN, and the peer may answer with the addresses of peers that are fetching the NAR from it.
    LanOrOthers,
    /// Another network: the peer may compress. The tracker counts the transfer under this name, if
    /// it has assigned one.
    Wan(Option<TransferName>),
}

/// Creates a client without connections, for peers or for one friend.
fn agent(tls: Option<&Arc<ClientConfig>>) -> Agent {
    let config = http_client::config()
        .proxy(None)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_per_read(Some(READ_TIMEOUT.get()))
        .timeout_recv_response(Some(READ_TIMEOUT.get()))
        .input_buffer_size(INPUT_BUFFER_BYTES)
        .max_idle_connections(MAX_IDLE)
        .max_idle_connections_per_host(MAX_IDLE_PER_PEER)
        .max_idle_age(MAX_IDLE_AGE.get())
        .build();
    match tls {
        None => Agent::with_parts(
            config,
            DefaultConnector::default().chain(ReadTimeoutConnector),
            PeerAddressResolver,
        ),
        Some(tls) => {
            let friend = ().chain(TcpConnector::default()).chain(FriendConnector(tls.clone()));
            Agent::with_parts(config, friend.chain(ReadTimeoutConnector), PeerAddressResolver)
        }
    }
}

impl PeerClient {
    /// Creates a client that accepts narinfos of `store_dir` only.
    pub fn new(store_dir: StoreDir) -> Self {
        PeerClient::with(store_dir, None)
    }

    /// Creates a client for one friend. All its connections use TLS.
    pub fn for_friend(store_dir: StoreDir, tls: Arc<ClientConfig>) -> Self {
        PeerClient::with(store_dir, Some(tls))
    }

    fn with(store_dir: StoreDir, tls: Option<Arc<ClientConfig>>) -> Self {
        PeerClient {
            idle: Mutex::new(IdleConnections { agent: agent(tls.as_ref()), used: None }),
            tls,
            narinfos: NarinfoReader::start(store_dir),
            logged_paths: Mutex::default(),
        }
    }

    /// Requests `nix-cache-info`. Success shows that the peer is reachable and, over TLS, that it
    /// has the expected key. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub fn greet(&self, peer: SocketAddr, timeout: Duration) -> Result<(), PeerError> {
        read_up_to(MAX_GREETING_BYTES, self.get(peer, "nix-cache-info", None, timeout)?)?;
        Ok(())
    }

    /// Sends a request, and repeats it once as [`retry_once_if_stale`] does. The status must be 200,
    /// or 206 for a range. Reading the body has the same time limit.
    fn get(
        &self,
        peer: SocketAddr,
        path: &str,
        range: Option<&str>,
        timeout: Duration,
    ) -> Result<Response<ureq::Body>, PeerError> {
        let call = |left| {
            let request = self.agent().get(url(peer, path));
            let request =
                range.into_iter().fold(request, |request, of| request.header("Range", of));
            request.config().timeout_global(Some(left)).build().call()
        };
        let status = if range.is_some() { 206 } else { 200 };
        expect_status(retry_once_if_stale(timeout, call)?, &[status])
    }

    fn agent(&self) -> Agent {
        let mut idle = self.idle.lock();
        idle.used = Some(Instant::now());
        idle.agent.clone()
    }

    /// Closes the idle connections if all of them are too old to be reused. ureq does so only at
    /// the next request, and each connection holds 256 KiB of buffers.
    pub fn close_idle_connections(&self) {
        let mut idle = self.idle.lock();
        if idle.used.is_some_and(|used| used.elapsed() >= MAX_IDLE_AGE.get()) {
            *idle = IdleConnections { agent: agent(self.tls.as_ref()), used: None };
        }
    }

    /// Logs that a path is unsupported. Logs each path once.
    pub fn log_unsupported_path(
        &self,
        hash_part: &HashPart,
        peer: SocketAddr,
        why: &dyn fmt::Display,
    ) {
        let is_new = self.logged_paths.lock().insert(*hash_part, ()).is_none();
        if is_new {
            log::warn!("{hash_part}: cannot be had from peer {peer}: {why}");
        }
    }

    /// Requests a narinfo from a peer that has the path. Checks that it is of this path and
    /// describes an uncompressed NAR. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// See [`PeerError`]. A timeout is [`PeerError::Unreachable`].
    pub fn narinfo(
        &self,
        holder: &Holder,
        hash_part: &HashPart,
        timeout: Duration,
    ) -> Result<PeerNarinfo, PeerError> {
        let result = self.read_narinfo(holder, hash_part, timeout);
        if let Err(PeerError::Malformed(why)) = &result
            && why.is_unsupported
        {
            self.log_unsupported_path(hash_part, holder.http, why);
        }
        result
    }

    fn read_narinfo(
        &self,
        holder: &Holder,
        hash_part: &HashPart,
        timeout: Duration,
    ) -> Result<PeerNarinfo, PeerError> {
        let deadline = Instant::now() + timeout;
        let response = self.get(holder.http, &holder.url_path, None, timeout)?;
        let narinfo = self.narinfos.read(response.into_body().into_reader(), deadline)?;
        if narinfo.info.path.hash_part() != *hash_part {
            return Err(Malformed::new("narinfo", "of another path").into());
        }
        if narinfo.compression != "none" {
            return Err(Malformed::unsupported("narinfo", "of a compressed NAR").into());
        }
        Ok(narinfo)
    }

    /// Requests the realisation of a derivation output. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// See [`PeerError`]. A timeout is [`PeerError::Unreachable`].
    pub fn realisation(
        &self,
        peer: SocketAddr,
        id: &DrvOutput,
        timeout: Duration,
    ) -> Result<Realisation, PeerError> {
        let path = format!("local/{}", id.url_path());
        let response = self.get(peer, &path, None, timeout)?;
        let bytes = read_up_to(Realisation::MAX_LEN as u64 + 1, response)?;
        Ok(Realisation::parse(&bytes, id)?)
    }

    /// Requests the build log of a derivation. The response head must arrive within `timeout`, and
    /// the body within 30 s.
    ///
    /// # Errors
    /// See [`PeerError`]. A log without a length, or of more than 64 MiB, is unsupported.
    pub fn log(
        &self,
        peer: SocketAddr,
        derivation: &StorePath,
        timeout: Duration,
    ) -> Result<LogBody, PeerError> {
        let url = url(peer, &format!("store/log/{derivation}").replace('?', "%3F"));
        let call = |left| {
            let config = self.agent().get(&url).config().timeout_recv_response(Some(left));
            config.timeout_recv_body(Some(BODY_GRACE)).build().call()
        };
        let response = expect_status(retry_once_if_stale(timeout, call)?, &[200])?;
        LogBody::new(response.into_body())
    }

    /// Requests the SHA-256 digests of up to `count` pieces of a NAR from piece `first` on. Also
    /// returns the rate in bytes per second at which the peer would send the NAR, if it says so.
    /// The peer may return fewer digests. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// See [`PeerError`]. A timeout is [`PeerError::Unreachable`].
    pub fn digests(
        &self,
        peer: SocketAddr,
        nar_name: &str,
        first: u64,
        count: u64,
        timeout: Duration,
    ) -> Result<(Vec<[u8; 32]>, Option<f64>), PeerError> {
        let range = format!("bytes={}-{}", first * DIGEST_LEN, (first + count) * DIGEST_LEN - 1);
        let path = format!("local/digests/{nar_name}");
        let response = self.get(peer, &path, Some(&range), timeout)?;
        let pace = response
            .headers()
            .get(PACE_HEADER)
            .and_then(|field| field.to_str().ok()?.parse::<u32>().ok());
        let bytes = read_up_to(count * DIGEST_LEN, response)?;
        Ok((bytes.as_chunks::<32>().0.to_vec(), pace.map(f64::from)))
    }

    /// Requests a NAR from byte `offset` on. The response, including the time to connect, must
    /// begin within `timeout`. `url_path` is the `URL` of the narinfo, relative to the root of the
    /// peer's server. On other networks than the LAN the peer may compress; `offset` and the
    /// returned bytes refer to the uncompressed NAR in any case.
    ///
    /// # Errors
    /// See [`PeerError`]. A body whose length does not match `nar_size` is malformed, and so is an
    /// encoding that was not requested.
    pub fn nar(
        &self,
        peer: SocketAddr,
        url_path: &str,
        offset: u64,
        nar_size: u64,
        timeout: Duration,
        link: &LinkKind,
    ) -> Result<NarBody, PeerError> {
        let body_timeout = BODY_GRACE + Duration::from_secs(nar_size / MIN_BYTES_PER_SECOND);
        let request = |left: Duration| {
            let mut request = self.agent().get(url(peer, url_path));
            if let LinkKind::Wan(transfer) = link {
                request = request.header("Accept-Encoding", "zstd");
                if let Some(transfer) = transfer {
                    request = request.header(TRANSFER_HEADER, transfer.to_string());
                }
            }
            if *link == LinkKind::LanOrOthers {
                request = request.header(RELAY_HEADER, "1");
            }
            if offset > 0 {
                request = request.header("Range", format!("bytes={offset}-"));
            }
            let config = request.config().timeout_connect(Some(left.min(CONNECT_TIMEOUT)));
            config.timeout_recv_response(Some(left)).timeout_recv_body(Some(body_timeout)).build()
        };
        let call = |left| match request(left).call() {
            Err(ureq::Error::Io(e)) if read_timeout::is_read_timeout(&e) => {
                Err(ureq::Error::Timeout(ureq::Timeout::RecvResponse))
            }
            result => result,
        };
        let response = read_timeout::with_timeout(timeout, || retry_once_if_stale(timeout, call))?;
        if *link == LinkKind::LanOrOthers && response.status() == 307 {
            return Err(PeerError::Named(parse_relay_addresses(&response)));
        }
        let response = expect_status(response, &[200, 206])?;
        NarBody::new(response, offset, nar_size, matches!(link, LinkKind::Wan(_)))
    }
}

fn parse_relay_addresses<B>(response: &Response<B>) -> Vec<IpAddr> {
    let field = response
        .headers()
        .get(RELAY_HEADER)
        .and_then(|field| field.to_str().ok())
        .unwrap_or_default();
    field.split(',').filter_map(|name| name.trim().parse().ok()).take(MAX_NAMED).collect()
}

/// Reads at most `max` bytes of a body.
fn read_up_to(max: u64, response: Response<ureq::Body>) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    response.into_body().into_reader().take(max).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn expect_status<B>(response: Response<B>, statuses: &[u16]) -> Result<Response<B>, PeerError> {
    match response.status().as_u16() {
        status if statuses.contains(&status) => Ok(response),
        404 | 410 => Err(PeerError::NotThere),
        503 => Err(PeerError::Busy),
        status => Err(PeerError::Status(status)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_server::{answer, serve};
    use super::*;

    #[test]
    fn part_of_nar_without_content_range_is_malformed() {
        let part = |field: &str| {
            let (peer, server) = serve(vec![answer(&format!("206 x{field}"), "abcd")], true);
            let client = PeerClient::new(StoreDir::parse("/nix/store").unwrap());
            let timeout = Duration::from_secs(60);
            let nar = client.nar(peer, "a.nar", 2, 6, timeout, &LinkKind::Lan);
            server.join().unwrap();
            nar.map(|nar| nar.skip)
        };
        assert_eq!(part("\r\nContent-Range: bytes 2-5/6").unwrap(), 0);
        for field in ["", "\r\nContent-Range: bytes 0-3/6"] {
            assert!(matches!(part(field), Err(PeerError::Malformed(_))), "{field:?}");
        }
    }
}
