//! The contenders: hosts with peerix and nginx, what they cost, and a client that throws away what it gets.

use crate::common::http::{self, Connection};
use crate::common::lan::Run;
use crate::common::{Host, Lan, PORT, Process, World, daemon, nix, wait_for, world};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Instant;

/// Where nginx serves the world's static cache.
pub const STATIC: u16 = 8080;
/// And the one with the [`Large`] paths.
pub const LARGE: u16 = 8081;

const GIB: f64 = (1u64 << 30) as f64;

/// A host that runs peerix. Without `--verbose`, which would be measured too.
pub struct Peer {
    pub daemon: Process,
    pub host: Host,
}

impl Peer {
    fn start(host: Host) -> Peer {
        let daemon = start(&host);
        wait_for("peerix answers", || host.connect_local().ok());
        Peer { daemon, host }
    }

    /// One with all of the world's paths, signed by the static cache's key, on a tmpfs, and a path that only it has.
    pub fn holder(lan: &Lan, world: &World, name: &str) -> (Peer, String) {
        let host = lan.host(name);
        nix::configure(&host, "");
        let (store, var) = (world.store(), world.store().with_file_name("var"));
        host.sh(&format!("cp -a {} /nix/store; cp -a {} /nix/var", store.display(), var.display()));
        world.sign(&host);
        let mark = daemon::mark(&host);
        (Peer::start(host), mark)
    }

    /// One with an empty store, that knows those who have `marks`.
    pub fn asker(lan: &Lan, world: &World, marks: &[String]) -> Peer {
        let peer = Peer::start(client(lan, world, &format!("http://127.0.0.1:{PORT}")));
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

/// A host with an empty store and empty caches whose Nix asks `substituter`.
pub fn client(lan: &Lan, world: &World, substituter: &str) -> Host {
    let host = lan.host("client");
    let key = &world.cache_key;
    nix::configure(&host, &format!("substituters = {substituter}\nrequire-sigs = true\ntrusted-public-keys = {key}\n"));
    host.cmd("nix-store").arg("--init").okay();
    host
}

/// nginx on `host`, with the world's static cache and, once they are there, the large paths.
pub fn nginx(host: &Host, world: &World) -> Process {
    let server = |port: u16, root: &str| {
        format!("server {{ listen {port} reuseport; root {root}; default_type application/octet-stream; }}")
    };
    let servers = server(STATIC, &world.cache().display().to_string()) + &server(LARGE, "/tmp/cache");
    host.write(
        "/tmp/nginx.conf",
        format!(
            "user root; worker_processes auto; pid /tmp/nginx.pid; error_log stderr crit; daemon off;
             events {{ worker_connections 1024; }}
             http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000000;
             client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u;
             scgi_temp_path /tmp/s; {servers} }}"
        ),
    );
    let mut command = host.cmd("nginx");
    command.args(["-e", "/dev/null", "-c", "/tmp/nginx.conf"]).stdin(Stdio::null());
    let process = Process::start(command);
    wait_for("nginx answers", || host.connect((Ipv4Addr::LOCALHOST, STATIC)).ok());
    process
}

/// Paths that the tests' world does not have, made on the host that serves them; addressed by content.
pub struct Large {
    /// A file of 1 GiB that does not compress.
    pub file: String,
    /// 20,000 files of 658 bytes, together 17 MB.
    pub many: String,
}

impl Large {
    /// Makes both, also as a static cache.
    pub fn make(host: &Host) -> Large {
        for dir in 0..200 {
            for file in 0..100 {
                host.write(&format!("/tmp/many/{dir}/{file}"), format!("{dir:03} {file:02}\n").repeat(94));
            }
        }
        let add = |file: &str| host.cmd("nix-store").args(["--add", file]).okay().trim().to_owned();
        host.sh("head -c 1073741824 /dev/urandom > /tmp/file");
        let large = Large { file: add("/tmp/file"), many: add("/tmp/many") };
        host.sh(&format!("nix copy --to 'file:///tmp/cache?compression=none' {} {}", large.file, large.many));
        host.sh("rm -r /tmp/file /tmp/many");
        large
    }
}

/// CPU seconds that a process has used, and its children that live.
pub fn cpu(pid: u32) -> f64 {
    let own: f64 = times(&format!("/proc/{pid}/stat"))[..2].iter().sum();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    own + children.split_whitespace().filter_map(|child| child.parse().ok()).map(cpu).sum::<f64>()
}

/// CPU seconds that processes have used which this one has started and waited for.
pub fn cpu_of_ended() -> f64 {
    times("/proc/self/stat")[2..].iter().sum()
}

/// User and system time of a process, and of the children it has waited for, in seconds.
fn times(stat: &str) -> [f64; 4] {
    let text = fs::read_to_string(stat).expect("the process runs");
    let fields = text.rsplit_once(") ").expect("the name is in parentheses").1;
    let mut ticks = fields.split(' ').skip(11).map(|field| field.parse::<f64>().expect("a number"));
    // USER_HZ is 100 on every Linux that Nix knows.
    std::array::from_fn(|_| ticks.next().expect("four times") / 100.0)
}

/// KiB of a line of `/proc/<pid>/status`, as MiB.
pub fn memory(pid: u32, line: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let value = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':')).expect("Linux tells it");
    value.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// The route of the NAR that `route`, a narinfo, names.
pub fn nar_route(host: &Host, to: impl Into<SocketAddr>, route: &str) -> String {
    let root = &route[..=route.rfind('/').expect("a route")];
    let text = http::get(host, to, route).expect("a server").text();
    let url = text.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap_or_else(|| panic!("{route}: {text}"));
    // Those under /local are relative to the root.
    if url.starts_with("local/") { format!("/{url}") } else { format!("{root}{url}") }
}

/// Bytes a second, and CPU seconds a GiB of `servers`, of a body that is asked for `times` times and thrown away.
pub fn stream(host: &Host, to: impl Into<SocketAddr>, route: &str, times: u32, servers: &[u32]) -> (f64, f64) {
    let to = to.into();
    let mut connection = BufReader::new(host.connect(to).expect("a server"));
    let (before, began) = (all(servers), Instant::now());
    let mut bytes = 0;
    let mut waste = vec![0; 256 << 10];
    for _ in 0..times {
        write!(connection.get_mut(), "GET {route} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").expect("a server");
        let mut left = head(&mut connection, route);
        bytes += left;
        while left > 0 {
            let most = waste.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let got = connection.read(&mut waste[..most]).expect("the body");
            assert!(got > 0, "{route} was cut");
            left -= got as u64;
        }
    }
    rates(bytes, began, all(servers) - before)
}

/// GB/s and CPU seconds a GiB.
pub fn rates(bytes: u64, began: Instant, cpu: f64) -> (f64, f64) {
    (bytes as f64 / began.elapsed().as_secs_f64() / 1e9, cpu / (bytes as f64 / GIB))
}

fn all(pids: &[u32]) -> f64 {
    pids.iter().copied().map(cpu).sum()
}

fn head(connection: &mut impl BufRead, route: &str) -> u64 {
    let (mut length, mut status) = (None, None);
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).expect("a head");
        status = status.or_else(|| line.split(' ').nth(1).map(str::to_owned));
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => length = value.parse().ok(),
            None if line.trim().is_empty() => break,
            _ => {}
        }
    }
    assert_eq!(status.as_deref(), Some("200"), "{route}");
    length.expect("a length")
}

/// Milliseconds that each of `routes` takes, one after the other on one connection.
pub fn latencies(host: &Host, to: impl Into<SocketAddr>, routes: &[String], status: u16) -> crate::table::Series {
    let mut connection = Connection::new(host.connect(to).expect("a server")).expect("a connection");
    let mut series = crate::table::Series::default();
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
    let digit = |n: u64| char::from(b"0123456789abcdfghijklmnpqrsvwxyz"[usize::try_from(n % 32).expect("a digit")]);
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
