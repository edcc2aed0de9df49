//! Friends: machines that are known by their key. They may have every path, wherever they are, over
//! TLS in which both sides prove who they are. This is the list of them, and how TLS is set up;
//! `peers/friends.rs` finds them and asks them.

mod list;
pub mod tls;

pub use list::FriendList;
