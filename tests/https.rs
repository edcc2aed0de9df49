//! Trackers behind HTTPS. The node checks their certificates against the authorities that this
//! machine trusts.

use crate::common::{DEADLINE, Daemon, Lan, stock, thread, wait_for};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, Stream};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

/// Test certificates for the names `localhost` and 127.0.0.1.
const AUTHORITY: &str = include_str!("data/tls/ca.pem");
const CERTIFICATE: &str = include_str!("data/tls/tracker.pem");
const KEY: &str = include_str!("data/tls/tracker.key");

/// A tracker that accepts one connection. Sends the first line of the request, or the TLS error.
fn tracker(listener: TcpListener) -> Receiver<Result<String, String>> {
    let certificate = CertificateDer::from_pem_slice(CERTIFICATE.as_bytes()).unwrap();
    let key = PrivateKeyDer::from_pem_slice(KEY.as_bytes()).unwrap();
    let config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(vec![certificate], key)
        .unwrap();
    let (asked, receiver) = channel();
    thread::spawn("tracker", move || {
        let (mut tcp, _) = listener.accept().unwrap();
        tcp.set_read_timeout(Some(DEADLINE)).unwrap();
        let mut tls = ServerConnection::new(Arc::new(config)).unwrap();
        let mut stream = Stream::new(&mut tls, &mut tcp);
        let mut bytes = [0; 4096];
        let line = stream.read(&mut bytes).map_err(|e| e.to_string()).map(|count| {
            let _ = stream.write_all(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n");
            String::from_utf8_lossy(&bytes[..count]).lines().next().unwrap_or_default().to_owned()
        });
        drop(asked.send(line));
    });
    receiver
}

/// The node must use the machine's authorities, not those built into ureq, so that an operator can
/// use a private authority.
#[test]
fn only_authorities_of_this_machine_are_trusted() {
    let lan = Lan::new();
    for (trusted, name) in [(AUTHORITY, "trusts"), (CERTIFICATE, "trusts-others")] {
        let host = lan.host(name);
        stock::ready(&host);
        host.write("/etc/ssl/certs/ca-certificates.crt", trusted);
        let asked = tracker(host.listen(8443));
        let daemon =
            Daemon::start(&host, &["--mode", "wan", "--tracker-url", "https://127.0.0.1:8443"]);
        let asked = asked.recv_timeout(DEADLINE).expect("the tracker is asked");
        if trusted == AUTHORITY {
            assert_eq!(asked.as_deref(), Ok("POST /announce HTTP/1.1"));
        } else {
            assert!(asked.is_err(), "{asked:?}");
            wait_for("the certificate is refused", || {
                daemon.log().contains("UnknownIssuer").then_some(())
            });
        }
    }
}
