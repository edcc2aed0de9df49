//! The other nodes: who they are, which of them has a path, and what they serve.

pub mod announce;
pub mod client;
mod decoder;
mod friend_transport;
pub mod friends;
pub mod kept_paces;
pub mod lan;
pub mod meeting;
mod names;
mod nearby;
pub mod pace;
mod patience;
pub mod picker;
pub mod requests;
pub mod standing;
pub mod tracker;
pub mod wan;
