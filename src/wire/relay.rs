//! What nodes say to one another of large NARs that several of them get at the same time
//! (docs/protocol.md, "Crowds").

/// Sent with a request for a NAR by who takes the names of others that are getting it for an
/// answer; has them in that answer.
pub const RELAY_HEADER: &str = "X-Peerix-Relay";

/// With digests: bytes per second that one more neighbour would get of the NAR.
pub const PACE_HEADER: &str = "X-Peerix-Pace";

/// Neighbours named in one answer. The last ones are nearest to the chain's end.
pub const MAX_NAMED: usize = 16;

/// Bytes of a NAR for each digest.
pub const DIGEST_PIECE: usize = 256 * 1024;

/// Bytes of a digest (SHA-256).
pub const DIGEST_LEN: u64 = 32;

/// Digests in one answer: of 16 MiB. Who wants more asks again.
pub const MAX_DIGESTS: u64 = 64;
