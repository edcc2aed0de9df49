//! The contenders: hosts with peerix and nginx, and what they are asked for.

use super::client::Client;
use crate::common::http::Connection;
use crate::common::lan::Run;
use crate::common::{Host, Lan, PORT, Process, daemon, nix, wait_for, world};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// A host that runs peerix. Without `--verbose`, which would be measured too.
pub struct Peer {
    pub daemon: Process,
    pub host: Host,
}

impl Peer {
    /// On a host that is ready.
    pub fn start(host: Host) -> Peer {
        let daemon = start(&host);
        wait_for("peerix answers", || host.connect_local().ok());
        Peer { daemon, host }
    }

    /// One with an empty store whose Nix trusts `key`. It knows those who have `marks`, which
    /// nobody else has.
    pub fn asker(lan: &Lan, key: &str, marks: &[String]) -> Peer {
        let peer = Peer::start(client(lan, key, &format!("http://127.0.0.1:{PORT}")));
        marks.iter().for_each(|mark| daemon::wait_until_known(&peer.host, mark));
        peer
    }
}

/// peerix on a host, not waited for.
pub fn start(host: &Host) -> Process {
    let mut command = host.cmd(&daemon::binary().display().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Process::start(command)
}

/// A host with an empty store and empty caches whose Nix asks `substituter` and trusts `key`.
pub fn client(lan: &Lan, key: &str, substituter: &str) -> Host {
    let host = lan.host("client");
    nix::configure(
        &host,
        &format!(
            "substituters = {substituter}\nrequire-sigs = true\ntrusted-public-keys = {key}\n"
        ),
    );
    host.cmd("nix-store").arg("--init").okay();
    host
}

/// nginx on `host`, with a static cache at each port, which it sends by `sendfile` or not.
pub fn nginx(host: &Host, caches: &[(u16, &Path, bool)]) -> Process {
    let server = |(port, root, sendfile): &(u16, &Path, bool)| {
        let (root, sendfile) = (root.display(), if *sendfile { "on" } else { "off" });
        format!(
            "server {{ listen {port} reuseport; root {root}; sendfile {sendfile}; default_type application/octet-stream; }}"
        )
    };
    let servers: String = caches.iter().map(server).collect();
    host.write(
        "/tmp/nginx.conf",
        format!(
            "user root; worker_processes auto; pid /tmp/nginx.pid; error_log stderr crit; daemon off;
             events {{ worker_connections 1024; }}
             http {{ access_log off; tcp_nopush on; keepalive_requests 100000000;
             client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u;
             scgi_temp_path /tmp/s; {servers} }}"
        ),
    );
    let mut command = host.cmd("nginx");
    command.args(["-e", "/dev/null", "-c", "/tmp/nginx.conf"]).stdin(Stdio::null());
    let process = Process::start(command);
    for (port, ..) in caches {
        wait_for("nginx answers", || host.connect((Ipv4Addr::LOCALHOST, *port)).ok());
    }
    process
}

/// The route of the NAR that `route`, a narinfo, names.
pub fn nar_route(host: &Host, to: impl Into<SocketAddr>, route: &str) -> String {
    let text = Client::new(host.connect(to).expect("a server")).text(route).1;
    let url = text
        .lines()
        .find_map(|line| line.strip_prefix("URL: "))
        .unwrap_or_else(|| panic!("{route}: {text}"));
    // Those under /local are relative to the root.
    let root =
        if url.starts_with("local/") { "/" } else { &route[..=route.rfind('/').expect("a route")] };
    format!("{root}{url}")
}

/// Milliseconds that each of `routes` takes, one after the other on one connection.
pub fn latencies(
    host: &Host,
    to: impl Into<SocketAddr>,
    routes: &[String],
    status: u16,
) -> super::table::Series {
    let mut connection =
        Connection::new(host.connect(to).expect("a server")).expect("a connection");
    let mut series = super::table::Series::default();
    for route in routes {
        let began = Instant::now();
        let answer = connection.get(route).expect("an answer");
        series.push(began.elapsed().as_secs_f64() * 1e3);
        assert_eq!(answer.status, status, "{route}");
    }
    series
}

/// Hash parts that no path has, never the same again.
pub fn absent(count: usize) -> Vec<String> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let digit = |n: u64| {
        char::from(b"0123456789abcdfghijklmnpqrsvwxyz"[usize::try_from(n % 32).expect("a digit")])
    };
    (0..count)
        .map(|_| {
            // A multiplier makes them differ in all digits, as real ones do.
            let n = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (0..32).map(|place| digit(n.rotate_left(place * 5) >> (place / 13))).collect()
        })
        .collect()
}

/// `/<prefix><hash part>.narinfo` of each.
pub fn narinfos(prefix: &str, hash_parts: &[String]) -> Vec<String> {
    hash_parts.iter().map(|part| format!("/{prefix}{part}.narinfo")).collect()
}

/// The hash parts of paths.
pub fn hash_parts(paths: &[String]) -> Vec<String> {
    paths.iter().map(|path| world::hash_part(path).to_owned()).collect()
}

/// Seconds that a command takes.
pub fn timed(command: &mut Command, check: impl Fn(&Output)) -> f64 {
    let began = Instant::now();
    let output = command.ran();
    let took = began.elapsed().as_secs_f64();
    check(&output);
    took
}
