//! Keys of friends, and TLS connections with the identity of a friend or of a stranger.

use super::daemon::{self, binary};
use super::lan::{Host, Run};
use super::{DEADLINE, wait_for};
use peerix::friends::tls;
use peerix::wire::NodeKey;
use peerix::wire::tracker::Identity;
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use serde_json::Value;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};

/// Directory in which a host keeps its identity.
pub const STATE: &str = "/var/lib/peerix";

/// The public key of a host, from `peerix identity`, which creates one if there is none.
pub fn key(host: &Host) -> NodeKey {
    let text =
        host.cmd(&binary().display().to_string()).args(["identity", "--state-dir", STATE]).okay();
    text.trim().parse().expect("a key and nothing else")
}

/// The value of `--friend` for a host, with its address or without.
pub fn friend(host: &Host, at: Option<SocketAddr>) -> String {
    let at = at.map(|at| format!("@{at}")).unwrap_or_default();
    format!("{}={}{at}", host.name, key(host))
}

/// The entry of the friend `name` in the status of the peerix on `host`.
pub fn seen(host: &Host, name: &str) -> Value {
    let status = daemon::status(host);
    let mut friends = status["friends"].as_array().expect("a list").iter();
    friends
        .find(|friend| friend["name"] == name)
        .cloned()
        .unwrap_or_else(|| panic!("no friend {name}: {status:#}"))
}

/// Waits until the peerix on `host` reports `reached` for the friend `name`. Returns the entry of
/// that friend.
pub fn wait_until_reached(host: &Host, name: &str, reached: bool) -> Value {
    wait_for("a friend is reached or not", || {
        Some(seen(host, name)).filter(|friend| friend["reached"] == reached)
    })
}

/// An identity from a fixed seed, which belongs to no host.
pub fn identity(n: u8) -> Identity {
    Identity::from_seed(&[n; 32])
}

/// A TLS connection that stays open between requests.
pub struct TlsConnection(BufReader<StreamOwned<ClientConnection, TcpStream>>);

impl TlsConnection {
    /// Connects from `host` with `identity`, to the node with the public key `key`.
    pub fn open(
        host: &Host,
        to: SocketAddr,
        identity: &Identity,
        key: NodeKey,
    ) -> io::Result<TlsConnection> {
        let config = tls::client_config(identity, key).expect("keys fit");
        let name = ServerName::try_from(tls::NO_NAME).expect("a name");
        let session = ClientConnection::new(config, name).map_err(io::Error::other)?;
        let socket = host.connect(to)?;
        socket.set_read_timeout(Some(DEADLINE))?;
        Ok(TlsConnection(BufReader::new(StreamOwned::new(session, socket))))
    }

    /// Sends a `GET` and returns the status and the body of the answer.
    pub fn get(&mut self, path: &str) -> io::Result<(u16, Vec<u8>)> {
        write!(self.0.get_mut(), "GET {path} HTTP/1.1\r\nHost: friend\r\n\r\n")?;
        let (mut status, mut length) = (None, 0);
        loop {
            let mut line = String::new();
            if self.0.read_line(&mut line)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            status =
                status.or_else(|| line.split(' ').nth(1).and_then(|status| status.parse().ok()));
            if let Some(value) = line.strip_prefix("Content-Length: ") {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            if line == "\r\n" {
                break;
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body)?;
        Ok((status.ok_or(io::ErrorKind::InvalidData)?, body))
    }
}
