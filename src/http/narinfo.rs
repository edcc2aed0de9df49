//! Sends narinfos: of the own store to peers and Nix, and of peers to this machine's Nix.

use super::Request;
use super::response::{Exchange, ShortResponse};
use super::route::{NarFileName, StoreView};
use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
use crate::nix::{
    NarInfo, PathInfo, SecretKey, Signature, StoreDir, is_content_addressed, is_known_to_every_nix,
    narinfo,
};
use crate::time_scale::Timeout;
use ring::digest::{SHA256, digest};
use std::fmt;
use std::io::{self, BufWriter, Write};

/// Signatures that are cached, about 2 MiB. Signing takes 40 µs, more than the rest of a narinfo.
/// At the bound, the oldest is dropped.
const MAX_SIGNATURES: usize = 8192;

/// Signs paths of the own store with the node's key. It never signs what comes from a peer.
pub struct Signer {
    key: SecretKey,
    /// Cache of signatures by the SHA-256 of the signed text, which may have 1 MiB.
    signatures: Mutex<BoundedMap<[u8; 32], Signature, MAX_SIGNATURES>>,
}

impl Signer {
    pub(super) fn new(key: SecretKey) -> Self {
        Signer { key, signatures: Mutex::default() }
    }

    fn sign(&self, info: &PathInfo, store_dir: &StoreDir) -> Signature {
        self.sign_text(&info.fingerprint(store_dir))
    }

    /// Returns the signature of a fingerprint, from the cache if it is there.
    pub(super) fn sign_text(&self, fingerprint: &str) -> Signature {
        let digest: [u8; 32] = digest(&SHA256, fingerprint.as_bytes())
            .as_ref()
            .try_into()
            .expect("SHA-256 has 32 bytes");
        if let Some(signature) = self.signatures.lock().get(&digest) {
            return signature.clone();
        }
        let signature = self.key.sign(fingerprint.as_bytes());
        self.signatures.lock().insert(digest, signature.clone());
        signature
    }
}

/// References above which a narinfo is large: it is not built on the event loop, and only a few are
/// built at once. Most narinfos have ten references.
pub(super) const MAX_SHORT_REFERENCES: usize = 500;

/// First version of Nix that tries its next substituter if it cannot parse a content address.
/// Earlier ones fail the whole build.
const NIX_TOLERATES_UNKNOWN_CA: (u32, u32) = (2, 34);

/// A narinfo with the fields that depend on the server that sends it.
pub(super) struct NarinfoLocation<'a> {
    store_dir: &'a StoreDir,
    info: &'a PathInfo,
    /// Prefix of `URL`, relative to the URL of the cache.
    root: &'static str,
    compression: &'a str,
    signature: Option<Signature>,
    /// The content address. No signature covers it; without it, Nix requires a signature.
    ca: Option<&'a str>,
}

/// The narinfo of a valid path of this machine's store, signed by `signer` if there is one.
pub(super) fn own<'a>(
    store_dir: &'a StoreDir,
    signer: Option<&Signer>,
    info: &'a PathInfo,
    view: StoreView,
    request: &Request<'_>,
) -> NarinfoLocation<'a> {
    let root = match view {
        StoreView::Peers => "local/",
        StoreView::Cache => "",
    };
    let signature = signer.map(|signer| signer.sign(info, store_dir));
    NarinfoLocation {
        store_dir,
        info,
        root,
        compression: "none",
        signature,
        ca: ca(info, view == StoreView::Peers, request, store_dir),
    }
}

/// The narinfo of a path that a peer has, for this machine's Nix.
pub(super) fn from_peer<'a>(
    store_dir: &'a StoreDir,
    found: &'a NarInfo,
    request: &Request<'_>,
) -> NarinfoLocation<'a> {
    let (info, compression) = (&found.info, found.compression.as_str());
    NarinfoLocation {
        store_dir,
        info,
        root: "peer/",
        compression,
        signature: None,
        ca: ca(info, false, request, store_dir),
    }
}

/// Returns the content address. Peers get every form. Nix gets one only if it is true of the path
/// and this Nix can read it: Nix refuses the narinfo, or fails the build, over any other.
fn ca<'a>(
    info: &'a PathInfo,
    is_peer: bool,
    request: &Request<'_>,
    store_dir: &StoreDir,
) -> Option<&'a str> {
    let is_readable = |ca: &str| is_known_to_every_nix(ca) || tolerates_unknown_ca(request);
    let is_for_nix = |ca: &str| is_readable(ca) && is_content_addressed(info, store_dir);
    info.ca.as_deref().filter(|ca| is_peer || is_for_nix(ca))
}

const CONTENT_TYPE: &str = "text/x-nix-narinfo";

impl NarinfoLocation<'_> {
    /// Returns the whole response.
    pub(super) fn answer(&self) -> ShortResponse {
        let mut text = String::with_capacity(1024);
        let _ = self.write(&mut text);
        ShortResponse::new(200, CONTENT_TYPE, text.into())
    }

    /// Sends the narinfo. A large one is sent in pieces and is never in memory as a whole.
    pub(super) fn send(&self, exchange: &mut Exchange<'_>) -> io::Result<()> {
        if self.info.references.len() <= MAX_SHORT_REFERENCES {
            return exchange.answer(&self.answer());
        }
        let mut len = CountingWriter(0);
        let _ = self.write(&mut len);
        exchange.begin(200, &[("Content-Type", CONTENT_TYPE)], len.0)?;
        if exchange.wants_body() {
            let _limit = exchange.progress().limit_waits(SEND_TIMEOUT.get());
            let mut pieces =
                ChunkWriter { out: BufWriter::with_capacity(PIECE, exchange), failed: None };
            if self.write(&mut pieces).is_err() {
                return Err(pieces.failed.unwrap_or_else(|| io::ErrorKind::Other.into()));
            }
            pieces.out.flush()?;
        }
        Ok(())
    }

    fn write(&self, out: &mut impl fmt::Write) -> fmt::Result {
        let NarinfoLocation { store_dir, info, root, compression, signature, ca } = self;
        let name =
            NarFileName { hash_part: info.path.hash_part(), nar_hash: info.nar_hash }.to_string();
        narinfo::write(
            out,
            info,
            &[root, "nar/", &name],
            compression,
            signature.as_ref(),
            *ca,
            store_dir,
        )
    }
}

/// Time that a client may let this node wait for it while it takes a large narinfo. Beyond, the
/// connection is cut. Few large narinfos are in memory at once, so others wait meanwhile. 1 MiB
/// takes 20 s at 52 KiB/s.
const SEND_TIMEOUT: Timeout = Timeout::from_secs(20);

/// Buffer for a large narinfo, in bytes. Each full buffer is sent.
const PIECE: usize = 64 << 10;

/// Counts the bytes written to it.
struct CountingWriter(u64);

impl fmt::Write for CountingWriter {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0 += text.len() as u64;
        Ok(())
    }
}

/// Sends the text written to it and keeps the error, for which `fmt::Error` has no room.
struct ChunkWriter<W: Write> {
    out: BufWriter<W>,
    failed: Option<io::Error>,
}

impl<W: Write> fmt::Write for ChunkWriter<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.out.write_all(text.as_bytes()).map_err(|e| {
            self.failed = Some(e);
            fmt::Error
        })
    }
}

/// Whether the client is a Nix that tolerates every form of content address. Its `User-Agent` is
/// like `curl/8.23.0 Nix/2.34.8`.
fn tolerates_unknown_ca(request: &Request<'_>) -> bool {
    let version = request
        .field("user-agent")
        .and_then(|agent| agent.split(' ').find_map(|w| w.strip_prefix("Nix/")));
    let mut numbers = version
        .unwrap_or_default()
        .split(|c: char| !c.is_ascii_digit())
        .map(|n| n.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= NIX_TOLERATES_UNKNOWN_CA
}

#[cfg(test)]
mod tests {
    use super::super::head;
    use super::*;
    use crate::nix::{StorePath, golden};

    #[test]
    fn nix_gets_true_and_readable_content_addresses_only() {
        let dir = golden::store_dir();
        let given = |info: &PathInfo, is_peer: bool, agent: &str| {
            let text = format!("GET / HTTP/1.1\r\nUser-Agent: {agent}\r\n\r\n");
            head::parse(text.as_bytes(), "127.0.0.1:1".parse().unwrap(), None, |request| {
                ca(info, is_peer, &request.unwrap(), &dir).map(str::to_owned)
            })
        };
        let (new, old) = ("curl/8.23.0 Nix/2.34.8", "curl/7.85.0 Nix/2.8.0");
        for info in golden::narinfos().into_iter().map(|narinfo| narinfo.info) {
            assert_eq!(given(&info, false, new), info.ca);
            assert_eq!(given(&info, false, old), info.ca);
        }
        let some = golden::narinfos().into_iter().find(|n| n.info.ca.is_some()).unwrap().info;
        let zeros = "0".repeat(52);
        for wrong in ["fixed:sha3:", "what:ever:", "text:sha256:", "fixed:r:blake3:"] {
            let info = PathInfo { ca: Some(format!("{wrong}{zeros}")), ..some.clone() };
            assert_eq!(given(&info, true, ""), info.ca);
            assert_eq!(given(&info, false, new), None, "{wrong}");
            assert_eq!(given(&info, false, old), None, "{wrong}");
        }
        // True of its path, and unknown to Nix before 2.34.
        let path = StorePath::parse("gc4gpxylxh6pjh5k1jnb1sg0x9634hdf-x").unwrap();
        let info = PathInfo {
            path,
            references: Vec::new(),
            ca: Some(format!("fixed:r:blake3:{zeros}")),
            ..some
        };
        assert_eq!(given(&info, false, new), info.ca);
        for unable in [old, "curl/8"] {
            assert_eq!(given(&info, false, unable), None, "{unable}");
        }
    }
}
