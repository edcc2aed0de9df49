//! Friends: their keys, and connections in TLS as a friend or a stranger makes them.

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

/// Where a friend keeps its identity.
pub const STATE: &str = "/var/lib/peerix";

/// The key of a host, made if there is none, as its user gets it.
pub fn key(host: &Host) -> NodeKey {
    let text =
        host.cmd(&binary().display().to_string()).args(["identity", "--state-dir", STATE]).okay();
    text.trim().parse().expect("a key and nothing else")
}

/// The value of `--friend` for a host, at an address or wherever it turns out to be.
pub fn friend(host: &Host, at: Option<SocketAddr>) -> String {
    let at = at.map(|at| format!("@{at}")).unwrap_or_default();
    format!("{}={}{at}", host.name, key(host))
}

/// What the peerix on `host` says of its friend called `name`.
pub fn seen(host: &Host, name: &str) -> Value {
    let status = daemon::status(host);
    let mut friends = status["friends"].as_array().expect("a list").iter();
    friends
        .find(|friend| friend["name"] == name)
        .cloned()
        .unwrap_or_else(|| panic!("no friend {name}: {status:#}"))
}

/// Waits until the peerix on `host` reaches its friend called `name`, or does not, and returns what
/// it says of it.
pub fn wait_until_reached(host: &Host, name: &str, reached: bool) -> Value {
    wait_for("a friend is reached or not", || {
        Some(seen(host, name)).filter(|friend| friend["reached"] == reached)
    })
}

/// The identity of nobody's machine.
pub fn identity(n: u8) -> Identity {
    Identity::from_seed(&[n; 32])
}

/// A connection in TLS.
pub struct TlsConnection(BufReader<StreamOwned<ClientConnection, TcpStream>>);

impl TlsConnection {
    /// Connects from `host` with the given identity to the node with that key.
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

    /// The status and the body of an answer to `GET`.
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
