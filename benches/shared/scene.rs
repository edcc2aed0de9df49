//! Hosts with peerix and nginx, the paths they are asked for, and timing helpers.

use super::client::Client;
use crate::common::http::Connection;
use crate::common::lan::Run;
use crate::common::{Host, Lan, PORT, Process, daemon, nix, wait_for, world};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Instant;

/// A host that runs peerix, without `--verbose`, whose cost would be measured too.
pub struct Peer {
    pub daemon: Process,
    pub host: Host,
}

impl Peer {
    /// Starts peerix on a host with a store, and blocks until it answers.
    pub fn start(host: Host) -> Peer {
        let daemon = start(&host);
        wait_for("peerix answers", || host.connect_local().ok());
        Peer { daemon, host }
    }

    /// Starts a peer with an empty store whose Nix trusts `key`. Blocks until it knows the holders
    /// of `marks`; each mark is a path that only its holder has.
    pub fn asker(lan: &Lan, key: &str, marks: &[String]) -> Peer {
        let peer = Peer::start(client(lan, key, &format!("http://127.0.0.1:{PORT}")));
        marks.iter().for_each(|mark| daemon::wait_until_known(&peer.host, mark));
        peer
    }
}

/// Starts peerix on a host, and does not wait until it answers.
pub fn start(host: &Host) -> Process {
    let mut command = host.cmd(&daemon::binary().display().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    Process::start(command)
}

/// Adds a host with an empty store and empty caches whose Nix asks `substituter` and trusts `key`.
pub fn client(lan: &Lan, key: &str, substituter: &str) -> Host {
    let host = lan.host("client");
    nix::configure(
        &host,
        &format!(
            "substituters = {substituter}\nrequire-sigs = true\ntrusted-public-keys = {key}\n"
        ),
    );
    nix::init_store(&host);
    host
}

/// Starts nginx on `host`, and blocks until it answers. Each of `caches` is a port, the directory
/// served there, and true for `sendfile`.
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

/// Requests the narinfo at `route` and returns the route of its NAR.
pub fn nar_route(host: &Host, to: impl Into<SocketAddr>, route: &str) -> String {
    let text = Client::new(host.connect(to).expect("a server")).text(route).1;
    let url = text
        .lines()
        .find_map(|line| line.strip_prefix("URL: "))
        .unwrap_or_else(|| panic!("{route}: {text}"));
    // URLs that begin with `local/` are relative to the root.
    let root =
        if url.starts_with("local/") { "/" } else { &route[..=route.rfind('/').expect("a route")] };
    format!("{root}{url}")
}

/// Milliseconds of each request for one of `routes`, sequentially on one connection. Panics if an
/// answer has another status than `status`.
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

/// Returns hash parts that no path has. They differ from those of all earlier calls.
pub fn absent(count: usize) -> Vec<String> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let digit = |n: u64| {
        char::from(b"0123456789abcdfghijklmnpqrsvwxyz"[usize::try_from(n % 32).expect("a digit")])
    };
    (0..count)
        .map(|_| {
            // The multiplier makes them differ in all digits, like real hash parts.
            let n = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (0..32).map(|place| digit(n.rotate_left(place * 5) >> (place / 13))).collect()
        })
        .collect()
}

/// Returns `/<prefix><hash part>.narinfo` for each hash part.
pub fn narinfos(prefix: &str, hash_parts: &[String]) -> Vec<String> {
    hash_parts.iter().map(|part| format!("/{prefix}{part}.narinfo")).collect()
}

/// The hash parts of store paths.
pub fn hash_parts(paths: &[String]) -> Vec<String> {
    paths.iter().map(|path| world::hash_part(path).to_owned()).collect()
}

/// Runs a command, passes its output to `check`, and returns its duration in seconds.
pub fn timed(command: &mut Command, check: impl Fn(&Output)) -> f64 {
    let began = Instant::now();
    let output = command.ran();
    let elapsed = began.elapsed().as_secs_f64();
    check(&output);
    elapsed
}
