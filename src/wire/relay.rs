//! Constants of the relay protocol, by which several neighbours that download a large NAR at the
//! same time pass it on to each other (docs/protocol.md, "Crowds").

/// In a NAR request: the sender accepts the addresses of relays as an answer. In that answer: those
/// addresses.
pub const RELAY_HEADER: &str = "X-Peerix-Relay";

/// In an answer with digests: bytes per second of the NAR that one more neighbour would get.
pub const PACE_HEADER: &str = "X-Peerix-Pace";

/// Maximum number of neighbours named in one answer. The last one is nearest to the chain's end.
pub const MAX_NAMED: usize = 16;

/// Bytes of a NAR that one digest covers. The last piece may be shorter.
pub const DIGEST_PIECE: usize = 256 * 1024;

/// Length of a digest (SHA-256) in bytes.
pub const DIGEST_LEN: u64 = 32;

/// Maximum number of digests in one answer; 64 cover 16 MiB. Nodes request further ones separately.
pub const MAX_DIGESTS: u64 = 64;
