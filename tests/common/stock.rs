//! Small store paths made during a test, and the answers of a node about them.

use super::http::{self, Answer};
use super::lan::{Host, Run};
use super::nix;
use super::packet::Packet;
use super::standin::receive;
use super::{PORT, world};
use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

/// Sets Nix up on a host, with an empty store.
pub fn ready(host: &Host) {
    nix::configure(host, "");
    nix::init_store(host);
}

/// Runs `script`, which creates `$n`, adds the result to the store and returns the store path.
pub fn add(host: &Host, name: &str, script: &str) -> String {
    let script = format!(
        "mkdir -p /tmp/made; cd /tmp/made; rm -rf {name}; n={name}; {script}\nnix-store --add {name}"
    );
    host.sh(&script).trim().to_owned()
}

/// Builds a path that is not content-addressed. `nix-store --add` makes paths that need no
/// signature.
pub fn build(host: &Host, name: &str) -> String {
    let expression = format!(
        "derivation {{ name = \"{name}\"; system = builtins.currentSystem; builder = \"/bin/sh\"; args = [ \"-ec\" \"echo {name} > $out\" ]; }}"
    );
    host.write("/tmp/build.nix", expression);
    host.sh("nix-store --realise $(nix-instantiate /tmp/build.nix 2>/dev/null) 2>/dev/null")
        .trim()
        .to_owned()
}

/// Adds a file of this many MiB. It has no repeated blocks, so a test notices data at a wrong
/// offset.
pub fn add_large(host: &Host, name: &str, mebibytes: u32) -> String {
    add(host, name, &format!("seq 100000000 | head -c {mebibytes}M > $n"))
}

/// The NAR of a path, from `nix-store --dump`.
pub fn dump(host: &Host, path: &str) -> Vec<u8> {
    let output = host.cmd("nix-store").args(["--dump", path]).ran();
    assert!(output.status.success(), "nix-store --dump {path}");
    output.stdout
}

/// The value of a line of a narinfo. Panics if there is no such line.
pub fn line<'a>(narinfo: &'a str, key: &str) -> &'a str {
    let line = narinfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("no {key} in\n{narinfo}"))
}

/// The route of a path's narinfo under `/local`.
pub fn narinfo_route(path: &str) -> String {
    format!("/local/{}.narinfo", world::hash_part(path))
}

/// The answer of `server` to a request of `asker` for the narinfo of `path`.
pub fn narinfo(asker: &Host, server: &Host, path: &str) -> Answer {
    http::get(asker, (server.address, PORT), &narinfo_route(path)).expect("peerix answers")
}

/// The route of a path's NAR, from the `URL` of its narinfo.
pub fn nar_route(asker: &Host, server: &Host, path: &str) -> String {
    let answer = narinfo(asker, server, path);
    assert_eq!(answer.status, 200, "{path}");
    format!("/{}", line(&answer.text(), "URL"))
}

/// Queries `server` by UDP until it answers, because datagrams may be lost. Returns whether the
/// answer is *have*. Panics after 100 queries of 500 ms each.
pub fn query_has(socket: &UdpSocket, server: &Host, path: &str) -> bool {
    let hash_part = world::hash_part(path).to_owned();
    for id in 0.. {
        assert!(id < 100, "no answer to {id} queries for {path}");
        let query = Packet::Query { id, hash_part: hash_part.clone() };
        socket.send_to(&query.write(), (server.address, PORT)).expect("a socket to send from");
        while let Some((from, datagram)) = receive(socket, Duration::from_millis(500)) {
            match Packet::read(&datagram) {
                _ if from.ip() != server.address => {}
                Some(Packet::Have { id: answered, .. }) if answered == id => return true,
                Some(Packet::HaveNot { id: answered }) if answered == id => return false,
                _ => {}
            }
        }
    }
    unreachable!("the loop has an end by its assertion")
}

/// The derivation of a path that the store of `host` has built.
pub fn deriver(host: &Host, path: &str) -> String {
    host.cmd("nix-store").args(["--query", "--deriver", path]).okay().trim().to_owned()
}

/// Queries a node at `address` by UDP from `machine` ten times, 100 ms apart. Returns whether an
/// answer is *have*. A node need not answer.
pub fn is_told_have(machine: &Host, address: SocketAddr, path: &str) -> bool {
    let socket = machine.udp(0);
    let hash_part = world::hash_part(path).to_owned();
    (0..10).any(|id| {
        let query = Packet::Query { id, hash_part: hash_part.clone() };
        // A router may refuse it.
        let _ = socket.send_to(&query.write(), address);
        let answer = receive(&socket, Duration::from_millis(100));
        answer.is_some_and(|(_, datagram)| {
            matches!(Packet::read(&datagram), Some(Packet::Have { .. }))
        })
    })
}
