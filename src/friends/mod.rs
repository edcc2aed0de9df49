//! Friends: machines that this node knows by their public key. A friend may fetch every store path,
//! from any network, over TLS with mutual authentication. This module holds the friend list and the
//! TLS configuration; `peers/friends.rs` connects to friends and sends them requests.

mod list;
pub mod tls;

pub use list::FriendList;
