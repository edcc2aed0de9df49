//! NARs: of the own store, and from peers for this machine's Nix.

use super::Request;
use super::cache::{Cache, Failure, NOT_THERE};
use super::range::{self, Part};
use super::response::Exchange;
use super::route::NarName;
use crate::nix::PathInfo;
use crate::store::NarError;
use std::io;
use std::ops::Range;

/// A valid path of this machine's store, if it still has that NAR hash.
pub(super) fn own(
    cache: &Cache,
    name: &NarName,
    info: &PathInfo,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), Failure> {
    if info.nar_hash != name.nar_hash {
        return Err(NOT_THERE);
    }
    let (status, part) = wanted(request, name, info.nar_size)?;
    begin(exchange, name, status, &part, info.nar_size)?;
    if !exchange.wants_body() {
        return Ok(());
    }
    match cache.store.write_nar(info, part, exchange) {
        Ok(()) => Ok(()),
        Err(NarError::Write(e)) => Err(e.into()),
        Err(fault) if exchange.take_back() => Err(cache.not_served(&info.path, &fault)),
        Err(fault) => {
            cache.warn(format_args!("{}: NAR cut: {fault}", info.path));
            Err(io::Error::other("NAR cut").into())
        }
    }
}

/// A NAR that some peer has.
pub(super) fn from_peer(
    cache: &Cache,
    name: &NarName,
    request: &Request<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<(), Failure> {
    let resumes = request.field("range").is_some_and(|range| range.trim() != "bytes=0-");
    if resumes && cache.fetch.is_tainted(name.nar_hash) {
        // What Nix holds of it already was wrong, so that no rest can make it right. From the start is fine.
        return Err(NOT_THERE);
    }
    let mut nar = cache.fetch.find(&name.hash_part, &name.nar_hash).ok_or(NOT_THERE)?;
    let (status, part) = wanted(request, name, nar.size())?;
    if exchange.wants_body() {
        // Only a NAR that did begin to arrive is answered with 200: for Nix, a 404 is no error.
        nar.start(part.clone()).ok_or(NOT_THERE)?;
    }
    begin(exchange, name, status, &part, nar.size())?;
    if exchange.wants_body() {
        nar.relay(exchange)?;
    }
    Ok(())
}

fn wanted(request: &Request<'_>, name: &NarName, size: u64) -> Result<(u16, Range<u64>), Failure> {
    let field = request.field("range").filter(|_| request.field("if-range").is_none_or(|tag| tag == etag(name)));
    match range::part(field, size) {
        Part::Whole => Ok((200, 0..size)),
        Part::Bytes(part) => Ok((206, part)),
        Part::Unsatisfiable => Err(Failure::Unsatisfiable(size)),
    }
}

fn etag(name: &NarName) -> String {
    format!("\"{}\"", name.nar_hash.to_nix32())
}

fn begin(exchange: &mut Exchange<'_>, name: &NarName, status: u16, part: &Range<u64>, size: u64) -> io::Result<()> {
    let etag = etag(name);
    let content_range = format!("bytes {}-{}/{size}", part.start, part.end.saturating_sub(1));
    let mut fields = vec![("Content-Type", "application/x-nix-nar"), ("Accept-Ranges", "bytes"), ("ETag", &*etag)];
    if status == 206 {
        fields.push(("Content-Range", &content_range));
    }
    exchange.begin(status, &fields, part.end - part.start)
}
