//! Sends NARs: of the own store to peers and Nix, and of peers to this machine's Nix.

use super::Request;
use super::binary_cache::BinaryCache;
use super::crowd::{CrowdAnswer, CrowdStream, PieceDigest};
use super::encoding::{Compressor, accepts_zstd};
use super::error::{NOT_THERE, RequestError};
use super::range::{self, RequestedRange};
use super::response::{Exchange, HeaderFields, ShortResponse};
use super::route::NarFileName;
use super::stream_limits::CompressionPermit;
use crate::access::Scope;
use crate::fetch::spool::{self, Spool};
use crate::nix::PathInfo;
use crate::stats::{Network, TransferGuard};
use crate::store::{NarError, NarSink};
use crate::wire::relay::{DIGEST_LEN, DIGEST_PIECE, MAX_DIGESTS, PACE_HEADER, RELAY_HEADER};
use crate::wire::tracker::{Role, TRANSFER_HEADER, TransferName};
use ring::digest::{Context, SHA256};
use std::io::{self, Write};
use std::net::IpAddr;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Instant;

/// Content coding of a NAR response.
#[derive(Clone, Copy, PartialEq, Eq)]
enum ContentCoding {
    /// Identity, whatever the client accepts.
    Never,
    /// Identity, in a response that could also be compressed. It carries `Vary`.
    Identity,
    /// zstd, in chunks.
    Zstd,
}

/// Returns the whole response for a small NAR of this machine's store; `None` if that might wait.
/// The caller excludes WAN requests.
pub(super) fn try_own(
    cache: &BinaryCache,
    name: &NarFileName,
    info: &PathInfo,
    scope: Scope,
    request: &Request<'_>,
) -> Option<ShortResponse> {
    if info.nar_hash != name.nar_hash || request.field("range").is_some() {
        return None;
    }
    let body = cache.store.try_nar(info)?;
    if scope == Scope::Lan && request.method != "HEAD" {
        let transfer = cache.stats.begin_send(
            info.path.base_name(),
            info.nar_size,
            Network::Lan,
            request.peer_address,
        );
        transfer.record_bytes(info.nar_size);
        transfer.record_whole();
    }
    Some(ShortResponse { status: 200, fields: fields(name, ContentCoding::Never), body })
}

/// Sends the NAR of a valid path of this machine's store, or responds with 404 if its NAR hash is
/// no longer the requested one. `is_far` says that the asker is a peer on another network, to which
/// the NAR may be compressed.
pub(super) fn own(
    cache: &BinaryCache,
    name: &NarFileName,
    info: &PathInfo,
    scope: Scope,
    is_far: bool,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    if info.nar_hash != name.nar_hash {
        return Err(NOT_THERE);
    }
    let (coding, _compression_permit) = choose_coding(cache, is_far, request);
    let (status, part) = requested_range(request, name, coding, info.nar_size)?;
    let is_large = info.nar_size >= spool::MIN_SIZE && scope == Scope::Lan && exchange.wants_body();
    let crowd_stream = match is_large.then(|| crowd_answer(cache, name, request)) {
        Some(CrowdAnswer::Name(others)) => {
            let others = others.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(", ");
            return Ok(exchange.send(307, &[(RELAY_HEADER, others)], b"")?);
        }
        Some(CrowdAnswer::Send(crowd_stream)) => Some(crowd_stream),
        None => None,
    };
    begin(exchange, name, coding, status, &part, info.nar_size)?;
    if !exchange.wants_body() {
        return Ok(());
    }
    let transfer_name =
        request.field(TRANSFER_HEADER).filter(|_| is_far).and_then(TransferName::parse);
    let len = part.end - part.start;
    let transfer = counted_network(scope).map(|network| {
        cache.stats.begin_send(info.path.base_name(), len, network, request.peer_address)
    });
    let mut sent = SentBytes { total: 0, transfer, crowd_stream };
    let write = |out: &mut dyn NarSink| {
        cache.store.write_nar(info, part, &mut CountingSink { out, sent: &mut sent })
    };
    let written = if coding == ContentCoding::Zstd {
        let mut out = Compressor::new(exchange, len)?;
        write(&mut out).and_then(|()| out.finish().map_err(NarError::Write))
    } else {
        write(exchange)
    };
    if let Some(transfer_name) = transfer_name {
        cache.lookup.report(&transfer_name, Role::Sender, sent.total);
    }
    match written {
        Ok(()) => {
            sent.record_whole();
            Ok(())
        }
        Err(NarError::Write(e)) => Err(e.into()),
        Err(fault) if exchange.discard_unsent() => Err(cache.not_served(&info.path, &fault)),
        Err(fault) => {
            cache.warn(format_args!("{}: NAR cut: {fault}", info.path));
            Err(io::Error::other("NAR cut").into())
        }
    }
}

/// The network to which bytes sent to this scope count in the statistics, if they do.
fn counted_network(scope: Scope) -> Option<Network> {
    match scope {
        Scope::ThisMachine => None,
        Scope::Lan => Some(Network::Lan),
        Scope::Wan | Scope::Friend => Some(Network::Wan),
    }
}

/// Chooses zstd, with the permit for it, if the client accepts it and not too many NARs are being
/// compressed.
fn choose_coding<'a>(
    cache: &'a BinaryCache,
    is_far: bool,
    request: &Request<'_>,
) -> (ContentCoding, Option<CompressionPermit<'a>>) {
    let is_accepted =
        is_far && request.knows_chunks && accepts_zstd(request.field("accept-encoding"));
    let permit = if is_accepted { cache.stream_limits.try_compression_permit() } else { None };
    let coding = match permit {
        Some(_) => ContentCoding::Zstd,
        None if is_far => ContentCoding::Identity,
        None => ContentCoding::Never,
    };
    (coding, permit)
}

/// Decides whether a neighbour gets a large NAR from this node, or the addresses of neighbours that
/// are getting it.
fn crowd_answer<'a>(
    cache: &'a BinaryCache,
    name: &NarFileName,
    request: &Request<'_>,
) -> CrowdAnswer<'a> {
    let asker = request.peer_address.ip().to_canonical();
    let accepts_relays = request.field(RELAY_HEADER).is_some() && request.field("range").is_none();
    cache.crowds.answer_request(name.nar_hash, asker, accepts_relays, Instant::now())
}

/// Sends a neighbour a NAR that this machine is still downloading.
pub(super) fn from_spool(
    cache: &BinaryCache,
    name: &NarFileName,
    spool: &Spool,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    let (status, part) = requested_range(request, name, ContentCoding::Never, spool.size())?;
    begin(exchange, name, ContentCoding::Never, status, &part, spool.size())?;
    if !exchange.wants_body() {
        return Ok(());
    }
    let (len, peer) = (part.end - part.start, request.peer_address);
    let transfer = Some(cache.stats.begin_send(&spool.name, len, Network::Lan, peer));
    let mut sent = SentBytes { total: 0, transfer, crowd_stream: None };
    spool.write_to(part, &mut CountingSink { out: exchange, sent: &mut sent })?;
    sent.record_whole();
    Ok(())
}

/// Sends the SHA-256 digests of a NAR's pieces, as many as the request's range names, up to
/// `MAX_DIGESTS`.
pub(super) fn digests(
    cache: &BinaryCache,
    name: &NarFileName,
    info: &PathInfo,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    // No client uses HEAD here, and it would cost as much as GET.
    if info.nar_hash != name.nar_hash || !exchange.wants_body() {
        return Err(NOT_THERE);
    }
    let size = info.nar_size.div_ceil(DIGEST_PIECE as u64) * DIGEST_LEN;
    let (status, part) = match range::part(request.field("range"), size) {
        RequestedRange::Whole => (206, 0..size),
        RequestedRange::Bytes(part) => (206, part),
        RequestedRange::Unsatisfiable => return Err(RequestError::Unsatisfiable(size)),
    };
    let first = part.start / DIGEST_LEN;
    let last = part.end.div_ceil(DIGEST_LEN).min(first + MAX_DIGESTS);
    let digests = piece_digests(cache, info, first..last)?.concat();
    let range = format!(
        "bytes {}-{}/{size}",
        first * DIGEST_LEN,
        first * DIGEST_LEN + digests.len() as u64 - 1
    );
    let mut fields = vec![("Content-Type", "application/octet-stream"), ("Content-Range", &range)];
    let pace =
        cache.crowds.pace_for_next(name.nar_hash, Instant::now()).map(|pace| pace.to_string());
    fields.extend(pace.as_deref().map(|pace| (PACE_HEADER, pace)));
    Ok(exchange.send(status, &fields, &digests)?)
}

/// Returns the SHA-256 digests of these pieces of a NAR. They are computed once for all neighbours.
fn piece_digests(
    cache: &BinaryCache,
    info: &PathInfo,
    pieces: Range<u64>,
) -> Result<Vec<PieceDigest>, RequestError> {
    let stored = || cache.crowds.digests(info.nar_hash, pieces.clone());
    if let Some(digests) = stored() {
        return Ok(digests);
    }
    let _permit = cache.crowds.acquire_hashing_permit().ok_or(RequestError::Busy)?;
    // Another request may have computed them during the wait.
    if let Some(digests) = stored() {
        return Ok(digests);
    }
    let bytes =
        pieces.start * DIGEST_PIECE as u64..info.nar_size.min(pieces.end * DIGEST_PIECE as u64);
    let mut sink =
        HashingSink { context: Context::new(&SHA256), left: DIGEST_PIECE, digests: Vec::new() };
    cache.store.write_nar(info, bytes, &mut sink).map_err(|e| cache.not_served(&info.path, &e))?;
    let digests = sink.finish();
    cache.crowds.store_digests(info.nar_hash, pieces.start, &digests);
    Ok(digests)
}

/// Hashes each piece of the bytes written to it.
struct HashingSink {
    context: Context,
    /// Bytes until the piece ends.
    left: usize,
    digests: Vec<PieceDigest>,
}

impl HashingSink {
    fn end_piece(&mut self) {
        let context = std::mem::replace(&mut self.context, Context::new(&SHA256));
        self.digests.push(context.finish().as_ref().try_into().expect("SHA-256 has 32 bytes"));
        self.left = DIGEST_PIECE;
    }

    fn finish(mut self) -> Vec<PieceDigest> {
        if self.left < DIGEST_PIECE {
            self.end_piece();
        }
        self.digests
    }
}

impl Write for HashingSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let part = &bytes[..bytes.len().min(self.left)];
        self.context.update(part);
        self.left -= part.len();
        if self.left == 0 {
            self.end_piece();
        }
        Ok(part.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl NarSink for HashingSink {}

/// Counts the bytes of one NAR that were sent.
struct SentBytes<'a> {
    total: u64,
    /// The transfer in the statistics, if a peer gets the NAR.
    transfer: Option<TransferGuard<'a>>,
    /// The stream in its crowd, if a neighbour gets a large NAR.
    crowd_stream: Option<CrowdStream<'a>>,
}

impl SentBytes<'_> {
    fn add(&mut self, bytes: u64) {
        self.total += bytes;
        if let Some(transfer) = &self.transfer {
            transfer.record_bytes(bytes);
            transfer.set_progress(self.total);
        }
        self.crowd_stream.iter().for_each(|crowd_stream| crowd_stream.record_sent(bytes));
    }

    fn record_whole(&self) {
        self.transfer.iter().for_each(TransferGuard::record_whole);
    }
}

/// Counts the NAR's bytes that pass through it.
struct CountingSink<'a, 's> {
    out: &'a mut dyn NarSink,
    sent: &'a mut SentBytes<'s>,
}

impl Write for CountingSink<'_, '_> {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        let written = self.out.write(piece)?;
        self.sent.add(written as u64);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl NarSink for CountingSink<'_, '_> {
    fn send_file(&mut self, file: BorrowedFd<'_>, at: u64, len: u64) -> io::Result<Option<u64>> {
        let sent = self.out.send_file(file, at, len)?;
        self.sent.add(sent.unwrap_or_default());
        Ok(sent)
    }
}

/// Downloads a NAR from peers and sends it to this machine's Nix during the download. Blocks for up
/// to 20 s until a peer sends its first bytes.
pub(super) fn from_peer(
    cache: &BinaryCache,
    name: &NarFileName,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), RequestError> {
    let resumes = request.field("range").is_some_and(|range| range.trim() != "bytes=0-");
    if resumes && cache.downloader.is_cut(name.nar_hash) {
        // Nix resumes a NAR of which peerix cut the transfer: the bytes that Nix has were wrong, or
        // the upstream cache is to deliver the rest. A request from the start is served.
        return Err(NOT_THERE);
    }
    let nar = cache.downloader.find(&name.hash_part, &name.nar_hash).ok_or(NOT_THERE)?;
    let size = nar.size();
    let (status, part) = requested_range(request, name, ContentCoding::Never, size)?;
    if !exchange.wants_body() {
        return Ok(begin(exchange, name, ContentCoding::Never, status, &part, size)?);
    }
    // A 200 is sent only after the first bytes arrived; until then a 404 sends Nix to its next
    // substituter.
    let started = nar.start().ok_or(NOT_THERE)?;
    begin(exchange, name, ContentCoding::Never, status, &part, size)?;
    match started.relay(&part, exchange) {
        // If the range begins late, nothing was sent yet. Without a response Nix would retry.
        Err(_) if exchange.discard_unsent() => Err(NOT_THERE),
        relayed => Ok(relayed?),
    }
}

/// Returns the status and the requested bytes of the NAR. They are positions in the uncompressed
/// NAR, because the next part may come from a peer that compresses differently or not at all.
fn requested_range(
    request: &Request<'_>,
    name: &NarFileName,
    coding: ContentCoding,
    size: u64,
) -> Result<(u16, Range<u64>), RequestError> {
    let is_current = request.field("if-range").is_none_or(|tag| tag == etag(name, coding));
    match range::part(request.field("range").filter(|_| is_current), size) {
        RequestedRange::Whole => Ok((200, 0..size)),
        RequestedRange::Bytes(part) => Ok((206, part)),
        RequestedRange::Unsatisfiable => Err(RequestError::Unsatisfiable(size)),
    }
}

/// The entity tag. Responses with the same tag have the same bytes (RFC 9110, section 8.8.3).
fn etag(name: &NarFileName, coding: ContentCoding) -> String {
    let suffix = if coding == ContentCoding::Zstd { "-zstd" } else { "" };
    format!("\"{}{suffix}\"", name.nar_hash.to_nix32())
}

/// Header fields of every NAR response.
fn fields(name: &NarFileName, coding: ContentCoding) -> HeaderFields {
    let etag = etag(name, coding).into();
    vec![
        ("Content-Type", "application/x-nix-nar".into()),
        ("Accept-Ranges", "bytes".into()),
        ("ETag", etag),
    ]
}

fn begin(
    exchange: &mut Exchange<'_>,
    name: &NarFileName,
    coding: ContentCoding,
    status: u16,
    part: &Range<u64>,
    size: u64,
) -> io::Result<()> {
    let mut fields = fields(name, coding);
    if status == 206 {
        fields.push((
            "Content-Range",
            format!("bytes {}-{}/{size}", part.start, part.end.saturating_sub(1)).into(),
        ));
    }
    if coding != ContentCoding::Never {
        fields.push(("Vary", "Accept-Encoding".into()));
    }
    if coding == ContentCoding::Zstd {
        fields.push(("Content-Encoding", "zstd".into()));
        return exchange.begin_chunked(status, &fields);
    }
    exchange.begin(status, &fields, part.end - part.start)
}
