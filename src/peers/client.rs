//! HTTP client for peers, based on blocking ureq. It checks the form of answers but trusts nothing
//! else in them, and it uses no redirects, proxies or name servers.

use super::friend_transport::FriendConnector;
use super::health::{Fault, PeerHealth, PeerKey};
use super::read_timeout::{self, ReadTimeoutConnector};
use super::zstd_reader::ZstdReader;
use crate::bounded_map::BoundedMap;
use crate::http_client;
use crate::lan::Holder;
use crate::lock::Mutex;
use crate::nix::{DrvOutput, HashPart, Malformed, NarInfo, Realisation, StoreDir, StorePath};
use crate::time_scale::Timeout;
use crate::wire::relay::{DIGEST_LEN, MAX_NAMED, PACE_HEADER, RELAY_HEADER};
use crate::wire::tracker::{TRANSFER_HEADER, TransferName};
use crossbeam_channel::{Receiver, Sender, bounded};
use rustls::ClientConfig;
use scopeguard::guard;
use std::fmt;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::config::Config;
use ureq::http::{Response, Uri};
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{Connector, DefaultConnector, NextTimeout, TcpConnector};

/// Timeout of a connection attempt. A LAN peer that takes longer counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// Longest wait for the first byte of a NAR, and for each further byte.
pub const READ_TIMEOUT: Timeout = Timeout::from_secs(10);

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

/// Error of a request to a peer.
#[derive(Debug)]
pub enum PeerError {
    /// No connection, no answer in time, or the connection broke.
    Unreachable(ureq::Error),
    /// Status 404 or 410: the peer does not have the path.
    NotThere,
    /// Status 503: the peer is overloaded. Also returned if this node already holds the largest
    /// permitted number of large narinfos.
    Busy,
    /// Status 307: the peers with these addresses are fetching the NAR from this peer.
    Named(Vec<IpAddr>),
    /// Any other status.
    Status(u16),
    /// The answer violates its format or is unsupported.
    Malformed(Malformed),
}

impl PeerError {
    /// Returns true if the same request may succeed soon: the peer is overloaded or restarts, or
    /// the connection lost packets. A late answer does not count as temporary.
    pub fn is_temporary(&self) -> bool {
        match self {
            PeerError::Unreachable(ureq::Error::Timeout(timeout)) => {
                *timeout == ureq::Timeout::Connect
            }
            PeerError::Unreachable(_) | PeerError::Busy => true,
            _ => false,
        }
    }

    /// The failure that this error means for the peer's health; `None` if the peer is not to blame.
    pub fn fault(&self) -> Option<Fault> {
        match self {
            PeerError::Unreachable(_) => Some(Fault::Unreachable),
            PeerError::Malformed(malformed) if malformed.is_unsupported => Some(Fault::OddPath),
            PeerError::NotThere | PeerError::Status(_) | PeerError::Malformed(_) => {
                Some(Fault::BrokenPromise)
            }
            PeerError::Busy | PeerError::Named(_) => None,
        }
    }

    /// Records that a request to the peer that began at `began` failed, if the peer is to blame.
    pub fn record(&self, health: &PeerHealth, peer: impl Into<PeerKey>, began: Instant) {
        if let Some(fault) = self.fault() {
            health.record_failure(peer, fault, began, Instant::now(), self);
        }
    }
}

impl From<ureq::Error> for PeerError {
    fn from(e: ureq::Error) -> Self {
        PeerError::Unreachable(e)
    }
}

impl From<io::Error> for PeerError {
    fn from(e: io::Error) -> Self {
        PeerError::Unreachable(e.into())
    }
}

impl From<Malformed> for PeerError {
    fn from(e: Malformed) -> Self {
        PeerError::Malformed(e)
    }
}

impl fmt::Display for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PeerError::Unreachable(e) => write!(f, "{e}"),
            PeerError::NotThere => f.write_str("said it had the path, and has not"),
            PeerError::Busy => f.write_str("busy"),
            PeerError::Named(_) => f.write_str("named others that are getting it"),
            PeerError::Status(status) => write!(f, "status {status}"),
            PeerError::Malformed(e) => write!(f, "{e}"),
        }
    }
}

impl std::error::Error for PeerError {}

/// Size in bytes above which a narinfo needs a reservation. Paths with fewer than 900 references
/// stay below it.
const LARGE_NARINFO_BYTES: u64 = 64 * 1024;
/// Largest number of large narinfos in memory. Each takes up to 3 MiB as text and as references. At
/// the bound, further ones wait until an earlier one is dropped, and fail with [`PeerError::Busy`]
/// at the deadline of their request.
const MAX_LARGE_NARINFOS: usize = 2;
/// Number of threads that read large narinfos, so that one slow peer does not block all. The C
/// library keeps freed memory per thread: if all 256 request threads read them, it would keep 60
/// MiB.
const LARGE_READERS: usize = 2;
/// Time past its deadline that a large narinfo is still waited for. The reader notices the deadline
/// itself.
const LARGE_NARINFO_GRACE: Duration = Duration::from_secs(1);
/// Stack of such a thread, in bytes. The buffers are on the heap.
const LARGE_READER_STACK_BYTES: usize = 256 << 10;

/// Largest build log, in bytes. It equals the limit that peerix serves.
const MAX_LOG_BYTES: u64 = 64 << 20;

/// Number of odd paths remembered so that each is logged once. When it is reached, the one met
/// longest ago is forgotten and may be logged again.
const MAX_LOGGED_PATHS: usize = 1024;

/// HTTP client for peers; shared by all threads.
pub struct PeerClient {
    idle: Mutex<IdleConnections>,
    /// TLS configuration; set for a friend only.
    tls: Option<Arc<ClientConfig>>,
    store_dir: StoreDir,
    logged_paths: Mutex<BoundedMap<HashPart, (), MAX_LOGGED_PATHS>>,
    /// Queue of the threads that read large narinfos.
    large_narinfos: Sender<LargeNarinfoBody>,
}

/// Body of a narinfo that exceeds [`LARGE_NARINFO_BYTES`], with the part that was already read.
struct LargeNarinfoBody {
    start: Vec<u8>,
    rest: ureq::BodyReader<'static>,
    deadline: Instant,
    store_dir: StoreDir,
    reply: Sender<Result<PeerNarinfo, PeerError>>,
}

impl LargeNarinfoBody {
    fn read(self, reservations: &(Sender<()>, Receiver<()>)) {
        let LargeNarinfoBody { start, mut rest, deadline, store_dir, reply } = self;
        let mut read = || {
            reservations.0.send_deadline((), deadline).map_err(|_| PeerError::Busy)?;
            let reservation = Some(LargeNarinfoReservation(reservations.1.clone()));
            let mut bytes = Vec::with_capacity(NarInfo::MAX_LEN + 1);
            bytes.extend(&start);
            let max = (NarInfo::MAX_LEN + 1 - bytes.len()) as u64;
            rest.by_ref().take(max).read_to_end(&mut bytes)?;
            let narinfo = NarInfo::parse(&bytes, &store_dir)?;
            Ok(PeerNarinfo { narinfo, _reservation: reservation })
        };
        let _ = reply.try_send(read());
    }
}

/// Starts the threads that read large narinfos. They end when the returned sender is dropped.
fn start_large_readers() -> Sender<LargeNarinfoBody> {
    let (sender, jobs) = bounded::<LargeNarinfoBody>(0);
    let reservations = bounded(MAX_LARGE_NARINFOS);
    for _ in 0..LARGE_READERS {
        let (jobs, reservations) = (jobs.clone(), reservations.clone());
        let started = thread::Builder::new()
            .name("narinfo-large".into())
            .stack_size(LARGE_READER_STACK_BYTES)
            .spawn(move || {
                jobs.iter().for_each(|job: LargeNarinfoBody| job.read(&reservations));
            });
        if let Err(e) = started {
            log::error!("thread for large narinfos: {e}");
        }
    }
    sender
}

/// Narinfo from a peer. Its form is checked, its signatures are not. A large one holds a
/// reservation until it is dropped.
#[derive(Debug)]
pub struct PeerNarinfo {
    narinfo: NarInfo,
    _reservation: Option<LargeNarinfoReservation>,
}

impl PeerNarinfo {
    /// Returns the narinfo and releases its reservation. Only for programs that read few narinfos.
    pub fn into_inner(self) -> NarInfo {
        self.narinfo
    }
}

impl Deref for PeerNarinfo {
    type Target = NarInfo;

    fn deref(&self) -> &NarInfo {
        &self.narinfo
    }
}

/// Reservation for one of the [`MAX_LARGE_NARINFOS`] large narinfos in memory.
#[derive(Debug)]
struct LargeNarinfoReservation(Receiver<()>);

impl Drop for LargeNarinfoReservation {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

/// Build log from a peer.
pub struct LogBody {
    /// Length in bytes.
    pub len: u64,
    /// Reader of the text.
    pub text: PrintableReader<ureq::BodyReader<'static>>,
}

/// Replaces control characters other than tabs and line ends by question marks. Nix prints logs to
/// the terminal, and logs are not signed.
pub struct PrintableReader<R> {
    text: R,
    last: u8,
}

impl<R> PrintableReader<R> {
    fn new(text: R) -> Self {
        PrintableReader { text, last: 0 }
    }
}

impl<R: Read> Read for PrintableReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.text.read(buf)?;
        for byte in &mut buf[..read] {
            let before = std::mem::replace(&mut self.last, *byte);
            if byte.is_ascii_control() && !b"\t\n\r".contains(byte) {
                *byte = b'?';
            } else if before == 0xc2 && (0x80..0xa0).contains(byte) {
                // U+0080 to U+009F become an inverted question mark, which has the same first byte.
                *byte = 0xbf;
            }
        }
        Ok(read)
    }
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

/// Body of a NAR response. Reading it yields the bytes of the NAR, decompressed if necessary.
pub struct NarBody {
    bytes: BodyReader,
    /// Bytes to skip before the requested offset: a peer without range support starts at byte 0.
    pub skip: u64,
    /// True if the body has a length, or a zstd frame that marks its end.
    has_end: bool,
}

enum BodyReader {
    Plain(ureq::BodyReader<'static>),
    Compressed(Box<ZstdReader<ureq::BodyReader<'static>>>),
}

impl NarBody {
    /// Reads the end of the body, which ureq requires before it reuses the connection. A plain body
    /// without a length is not read to its end, because the peer could delay it. The end of a
    /// compressed body is read in another thread, and this call blocks for 50 ms at most.
    pub fn finish(mut self) {
        /// Compressed bodies whose end is being read. Further connections are closed instead.
        const MAX_FINISHING: usize = 32;
        /// Wait for the end, which usually has arrived already.
        const END_TIMEOUT: Duration = Duration::from_millis(50);
        static FINISHING: AtomicUsize = AtomicUsize::new(0);
        match self.bytes {
            BodyReader::Plain(_) if self.has_end => {
                let _ = self.read(&mut [0]);
            }
            BodyReader::Compressed(_)
                if FINISHING.fetch_add(1, Ordering::Relaxed) < MAX_FINISHING =>
            {
                let permit = guard((), |()| {
                    FINISHING.fetch_sub(1, Ordering::Relaxed);
                });
                let (end, ended) = bounded::<()>(0);
                let finish = thread::Builder::new().name("nar-end".into()).spawn(move || {
                    let _permit = (permit, end);
                    let _ = self.read(&mut [0]);
                    drop(self);
                });
                match finish {
                    Ok(_) => drop(ended.recv_timeout(END_TIMEOUT)),
                    Err(e) => log::debug!("thread for the end of a NAR: {e}"),
                }
            }
            BodyReader::Compressed(_) => {
                FINISHING.fetch_sub(1, Ordering::Relaxed);
            }
            BodyReader::Plain(_) => {}
        }
    }

    /// Like [`Read::read`], but blocks for at most `timeout`. Returns `None` if nothing arrived in
    /// that time; a later read continues at the same byte.
    ///
    /// # Errors
    /// Errors of the connection and of the zstd decoder.
    pub fn read_within(&mut self, buf: &mut [u8], timeout: Duration) -> io::Result<Option<usize>> {
        match read_timeout::with_timeout(timeout, || self.read(buf)) {
            Err(e) if read_timeout::is_read_timeout(&e) => Ok(None),
            read => read.map(Some),
        }
    }
}

impl Read for NarBody {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.bytes {
            BodyReader::Plain(reader) => reader.read(buf),
            BodyReader::Compressed(reader) => reader.read(buf),
        }
    }
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
            store_dir,
            logged_paths: Mutex::default(),
            large_narinfos: start_large_readers(),
        }
    }

    /// Requests `nix-cache-info`. Success shows that the peer is reachable and, over TLS, that it
    /// has the expected key. Blocks for at most `timeout`.
    ///
    /// # Errors
    /// See [`PeerError`].
    pub fn greet(&self, peer: SocketAddr, timeout: Duration) -> Result<(), PeerError> {
        let response = expect_status(self.get(peer, "nix-cache-info", None, timeout)?, &[200])?;
        read_up_to(MAX_GREETING_BYTES, &mut response.into_body().as_reader())?;
        Ok(())
    }

    /// Sends a request, and repeats it once as [`retry_once_if_stale`] does. Reading the body has
    /// the same time limit.
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
        Ok(retry_once_if_stale(timeout, call)?)
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
        let response =
            expect_status(self.get(holder.http, &holder.url_path, None, timeout)?, &[200])?;
        let mut reader = response.into_body().into_reader();
        let start = read_up_to(LARGE_NARINFO_BYTES + 1, &mut reader)?;
        let narinfo = if start.len() as u64 > LARGE_NARINFO_BYTES {
            let (reply, result) = bounded(1);
            let job = LargeNarinfoBody {
                start,
                rest: reader,
                deadline,
                store_dir: self.store_dir.clone(),
                reply,
            };
            self.large_narinfos.send_deadline(job, deadline).map_err(|_| PeerError::Busy)?;
            result.recv_deadline(deadline + LARGE_NARINFO_GRACE).map_err(|_| PeerError::Busy)??
        } else {
            let narinfo = NarInfo::parse(&start, &self.store_dir)?;
            PeerNarinfo { narinfo, _reservation: None }
        };
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
        let response = expect_status(self.get(peer, &path, None, timeout)?, &[200])?;
        let max = Realisation::MAX_LEN as u64 + 1;
        let bytes = read_up_to(max, &mut response.into_body().as_reader())?;
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
        let body = expect_status(retry_once_if_stale(timeout, call)?, &[200])?.into_body();
        match body.content_length() {
            Some(len) if len <= MAX_LOG_BYTES => Ok(LogBody {
                len,
                text: PrintableReader::new(body.into_with_config().limit(u64::MAX).reader()),
            }),
            _ => {
                Err(Malformed::unsupported("build log", "without a length, or over 64 MiB").into())
            }
        }
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
        let response = expect_status(self.get(peer, &path, Some(&range), timeout)?, &[206])?;
        let pace = response
            .headers()
            .get(PACE_HEADER)
            .and_then(|field| field.to_str().ok()?.parse::<u32>().ok());
        let bytes = read_up_to(count * DIGEST_LEN, &mut response.into_body().as_reader())?;
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
        let from = if response.status() == 206 { offset } else { 0 };
        if response.status() == 206 {
            let range =
                response.headers().get("content-range").and_then(|field| field.to_str().ok());
            // RFC 9110, section 15.3.7: a single part has the field.
            if !range.is_some_and(|range| range.starts_with(&format!("bytes {offset}-"))) {
                return Err(Malformed::new("NAR", "from another byte than was asked for").into());
            }
        }
        let encoding = response.headers().get("content-encoding").map(|field| field.as_bytes());
        let is_compressed = match encoding {
            None => false,
            Some(encoding)
                if matches!(link, LinkKind::Wan(_)) && encoding.eq_ignore_ascii_case(b"zstd") =>
            {
                true
            }
            Some(_) => return Err(Malformed::new("NAR", "in an encoding not asked for").into()),
        };
        let body = response.into_body();
        if is_compressed {
            let reader = body.into_with_config().limit(u64::MAX).reader();
            let decoded = ZstdReader::new(reader, READ_TIMEOUT.get())?;
            let bytes = BodyReader::Compressed(Box::new(decoded));
            return Ok(NarBody { bytes, skip: offset - from, has_end: true });
        }
        let length = body.content_length();
        if length.is_some_and(|len| from.checked_add(len) != Some(nar_size)) {
            return Err(Malformed::new("NAR", "of another size than its narinfo says").into());
        }
        let reader = body.into_with_config().limit(u64::MAX).reader();
        Ok(NarBody {
            bytes: BodyReader::Plain(reader),
            skip: offset - from,
            has_end: length.is_some(),
        })
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

/// Repeats a call once unless it timed out or could not connect. The peer may close a kept
/// connection at the moment of its reuse; the second call opens a new one. `call` gets its time
/// limit: `timeout`, or what remains of it.
pub(super) fn retry_once_if_stale<T>(
    timeout: Duration,
    call: impl Fn(Duration) -> Result<T, ureq::Error>,
) -> Result<T, ureq::Error> {
    let deadline = Instant::now() + timeout;
    match call(timeout) {
        Err(e) if !matches!(e, ureq::Error::Timeout(_) | ureq::Error::ConnectionFailed) => {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() { Err(e) } else { call(left) }
        }
        result => result,
    }
}

/// Reads at most `max` bytes of a body.
fn read_up_to(max: u64, body: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    body.take(max).read_to_end(&mut bytes)?;
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

/// Builds the URL of `path` at a peer. URLs cannot hold the interface of a link-local address, so
/// it is encoded in a host name that only [`PeerAddressResolver`] understands.
fn url(peer: SocketAddr, path: &str) -> String {
    let path = path.trim_start_matches('/');
    match peer {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            format!(
                "http://{:032x}.{}{LINK_LOCAL_SUFFIX}:{}/{path}",
                v6.ip().to_bits(),
                v6.scope_id(),
                v6.port()
            )
        }
        _ => format!("http://{peer}/{path}"),
    }
}

const LINK_LOCAL_SUFFIX: &str = ".link-local.invalid";

/// Decodes the host names that [`url`] builds, and resolves nothing else: a peer is always an
/// address.
#[derive(Debug)]
struct PeerAddressResolver;

impl Resolver for PeerAddressResolver {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        _: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut addresses = self.empty();
        addresses.push(address(uri).ok_or(ureq::Error::HostNotFound)?);
        Ok(addresses)
    }
}

fn address(uri: &Uri) -> Option<SocketAddr> {
    let authority = uri.authority()?;
    let port = authority.port_u16()?;
    let Some(scoped) = authority.host().strip_suffix(LINK_LOCAL_SUFFIX) else {
        return authority.as_str().parse().ok();
    };
    let (ip, scope) = scoped.split_once('.')?;
    let ip = Ipv6Addr::from_bits(u128::from_str_radix(ip, 16).ok()?);
    Some(SocketAddr::V6(SocketAddrV6::new(ip, port, 0, scope.parse().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::super::test_server::{answer, serve};
    use super::*;

    #[test]
    fn peer_address_survives_url_round_trip() {
        let scoped = SocketAddrV6::new("fe80::1:2".parse().unwrap(), 12304, 0, 7);
        for peer in [
            "192.168.1.9:12304".parse().unwrap(),
            "[fd00::1]:80".parse().unwrap(),
            SocketAddr::V6(scoped),
        ] {
            let uri: Uri = url(peer, "/local/x.narinfo").parse().unwrap();
            assert_eq!(uri.path(), "/local/x.narinfo");
            assert_eq!(address(&uri), Some(peer));
        }
        for name in
            ["http://example.org:80/", "http://10.0.0.1/", "http://x.y.link-local.invalid:1/"]
        {
            assert_eq!(address(&name.parse().unwrap()), None, "{name}");
        }
    }

    #[test]
    fn second_attempt_gets_remaining_time() {
        let given = Mutex::new(Vec::new());
        let pause = Duration::from_millis(2);
        let call = |left| {
            given.lock().push(left);
            thread::sleep(pause);
            Err::<(), _>(ureq::Error::Io(io::ErrorKind::BrokenPipe.into()))
        };
        let timeout = Duration::from_secs(3600);
        retry_once_if_stale(timeout, call).unwrap_err();
        let calls = std::mem::take(&mut *given.lock());
        assert!(calls.len() == 2 && calls[0] == timeout && calls[1] <= timeout - pause);
        retry_once_if_stale(pause, call).unwrap_err();
        assert_eq!(*given.lock(), [pause], "no time is left");
    }

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

    #[test]
    fn build_log_has_no_control_characters() {
        let log = "tab\t line\r\n \u{1b}[2J \u{9b}2J \u{85} ä \u{a0} €";
        // One byte at a time: a character may span two reads.
        struct Bytes<'a>(&'a [u8]);
        impl Read for Bytes<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                let max = buf.len().min(1);
                self.0.read(&mut buf[..max])
            }
        }
        let read = |log| {
            let mut text = Vec::new();
            PrintableReader::new(Bytes(log)).read_to_end(&mut text).unwrap();
            text
        };
        let expected = "tab\t line\r\n ?[2J ¿2J ¿ ä \u{a0} €";
        assert_eq!(read(log.as_bytes()), expected.as_bytes());
        // In Latin-1, 0xc2 is a letter of its own.
        assert_eq!(read(b"\xc2A \xc2\n\xc2\x1b"), b"\xc2A \xc2\n\xc2?");
    }
}
