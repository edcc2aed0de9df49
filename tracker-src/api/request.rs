//! Reads and checks the parts of a request.

use super::error::ApiError;
use crate::address;
use crate::table::Claim;
use data_encoding::BASE64;
use peerix::http::{Exchange, Request};
use peerix::wire::tracker::{
    KEY_HEADER, MAX_BODY, Proof, ProofCheck, SIGNATURE_HEADER, SignedText, TIMESTAMP_HEADER,
    can_be_peer, is_peer_id,
};
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use std::net::IpAddr;

/// Reads and parses the JSON body.
pub(super) fn read<T: DeserializeOwned>(exchange: &mut Exchange<'_>) -> Result<T, ApiError> {
    let body = exchange.body().read(MAX_BODY)?;
    // serde's error messages are not passed on, as they repeat the input.
    serde_json::from_slice(&body).map_err(|e| {
        let what =
            if e.is_data() { "a field of another type, or out of range" } else { "not JSON" };
        ApiError::new(400, format!("body: {what}, at line {}, column {}", e.line(), e.column()))
    })
}

/// An empty field counts as absent, as in the original.
pub(super) fn non_empty(field: &Option<String>) -> Option<&str> {
    field.as_deref().filter(|text| !text.is_empty())
}

pub(super) fn check_peer_id(field: &str, id: &str) -> Result<(), ApiError> {
    if is_peer_id(id) {
        Ok(())
    } else {
        Err(ApiError::new(400, format!("{field}: too long, or has control characters")))
    }
}

/// Parses a percent-encoded peer ID in a path.
pub(super) fn peer_id_in(segment: &str) -> Result<String, ApiError> {
    let id = percent_decode_str(segment)
        .decode_utf8()
        .map_err(|_| ApiError::new(400, "peer_id: not UTF-8"))?;
    check_peer_id("peer_id", &id)?;
    Ok(id.into_owned())
}

pub(super) fn unproven() -> ApiError {
    ApiError::new(403, "public_key, timestamp and signature: missing or malformed")
}

/// Takes the proof of a request without a JSON body from its header fields.
pub(super) fn proof_in_fields(request: &Request<'_>) -> Result<Proof, ApiError> {
    let timestamp = request.field(TIMESTAMP_HEADER).map(str::parse).transpose();
    Ok(Proof {
        public_key: request.field(KEY_HEADER).map(str::to_owned),
        timestamp: timestamp.map_err(|_| unproven())?,
        signature: request.field(SIGNATURE_HEADER).map(str::to_owned),
    })
}

/// Parses the key and time of a signed request. The signature is not checked yet.
pub(super) fn claim(proof: &Proof) -> Result<Option<Claim>, ApiError> {
    let (key, timestamp, signature) = match (&proof.public_key, proof.timestamp, &proof.signature) {
        (None, None, None) => return Ok(None),
        (Some(key), Some(timestamp), Some(signature)) => (key, timestamp, signature),
        _ => return Err(unproven()),
    };
    let bytes = |text: &str| BASE64.decode(text.as_bytes()).ok();
    let key = bytes(key).and_then(|key| key.try_into().ok()).ok_or_else(unproven)?;
    bytes(signature).filter(|bytes| bytes.len() == 64).ok_or_else(unproven)?;
    Ok(Some(Claim { key, timestamp }))
}

/// Checks the signature of a request, if it is signed.
pub(super) fn verify(proof: &Proof, signed_text: &SignedText<'_>) -> Result<(), ApiError> {
    match proof.check(signed_text) {
        ProofCheck::Unsigned | ProofCheck::By(..) => Ok(()),
        ProofCheck::Wrong => Err(ApiError::new(403, "signature: wrong")),
    }
}

/// Returns the address at which others reach a node: the one that it gives, or the source address
/// of its request. `None` if the former is missing and the latter is a proxy's or no peer's.
pub(super) fn reachable_addr(
    addr: &Option<String>,
    from: IpAddr,
    is_client_hidden: bool,
) -> Result<Option<String>, ApiError> {
    match non_empty(addr) {
        Some(addr) => {
            address::check(addr).map_err(|why| ApiError::new(400, why))?;
            Ok(Some(addr.to_owned()))
        }
        None => Ok((!is_client_hidden && can_be_peer(from)).then(|| from.to_string())),
    }
}

/// Returns the address under which a node is announced.
///
/// # Errors
/// The node gives none, and its request does not show one.
pub(super) fn announced_addr(
    addr: &Option<String>,
    from: IpAddr,
    is_client_hidden: bool,
) -> Result<String, ApiError> {
    reachable_addr(addr, from, is_client_hidden)?.ok_or_else(|| {
        let why = if is_client_hidden {
            "the request came through a proxy; set --announce-addr, or --proxy of the tracker"
        } else {
            "no other peer can reach the request's source; set --announce-addr"
        };
        ApiError::new(400, format!("addr: required, as {why}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reachable_addr_is_never_that_of_proxy_or_of_no_peer() {
        let source = IpAddr::from([203, 0, 113, 7]);
        let of = |addr: Option<&str>, from, is_client_hidden| {
            let addr = addr.map(str::to_owned);
            reachable_addr(&addr, from, is_client_hidden).map_err(|refused| refused.status)
        };
        assert_eq!(of(None, source, false), Ok(Some("203.0.113.7".into())));
        assert_eq!(of(Some(""), source, false), Ok(Some("203.0.113.7".into())));
        assert_eq!(of(None, source, true), Ok(None));
        assert_eq!(of(None, IpAddr::from([127, 0, 0, 1]), false), Ok(None));
        assert_eq!(of(Some("a.example"), source, true), Ok(Some("a.example".into())));
        for bad in ["127.0.0.1", "localhost", "a b", "169.254.169.254"] {
            assert_eq!(of(Some(bad), source, false), Err(400), "{bad}");
        }
    }
}
