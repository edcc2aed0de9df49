//! Every route of the daemon as clients on a LAN see it: which clients it serves, what it answers,
//! and what real Nix without a peerix of its own makes of it.

use crate::common::http::{Answer, Connection, get, get_local};
use crate::common::lan::Run;
use crate::common::stock::{self, line, nar_route, narinfo};
use crate::common::{Daemon, Holder, Host, Lan, PORT, World, nix, wait_for, world};
use std::fs;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// A derivation that builds a directory and prints output, which Nix keeps as a log.
const DERIVATION: &str = r#"derivation {
  name = "logged"; system = builtins.currentSystem; builder = "/bin/sh"; PATH = "/usr/bin:/bin";
  args = [ "-ec" "seq 3000; echo 'ümlaut end' >&2; mkdir $out; echo run > $out/run; chmod +x $out/run; ln -s run $out/link; mkdir $out/dir; : > $out/dir/empty" ];
}"#;

/// A server with one built path, and a neighbour that sends requests.
struct Scene {
    _daemon: Daemon,
    /// A directory that has a build log.
    path: String,
    derivation: String,
    server: Host,
    neighbour: Host,
    _lan: Lan,
}

impl Scene {
    fn new(flags: &[&str]) -> Scene {
        let lan = Lan::new();
        let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
        stock::ready(&server);
        stock::ready(&neighbour);
        server.write("/tmp/logged.nix", DERIVATION);
        let derivation =
            server.sh("nix-instantiate /tmp/logged.nix 2> /tmp/said").trim().to_owned();
        let path =
            server.sh(&format!("nix-store --realise {derivation} 2> /tmp/said")).trim().to_owned();
        let daemon = Daemon::start(&server, flags);
        Scene { _daemon: daemon, path, derivation, server, neighbour, _lan: lan }
    }

    fn hash_part(&self) -> &str {
        world::hash_part(&self.path)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}:{PORT}{path}", self.server.address)
    }

    fn get(&self, path: &str) -> Answer {
        get(&self.neighbour, (self.server.address, PORT), path).unwrap()
    }

    fn connect(&self) -> Connection {
        Connection::new(self.neighbour.connect((self.server.address, PORT)).unwrap()).unwrap()
    }

    /// Routes that serve the local store, with their content types.
    fn own_routes(&self) -> Vec<(String, &'static str)> {
        let hash_part = self.hash_part();
        let nar = nar_route(&self.server, &self.server, &self.path);
        let name = nar.strip_prefix("/local/nar/").unwrap();
        let (info, nar_type) = ("text/x-nix-narinfo", "application/x-nix-nar");
        vec![
            ("/nix-cache-info".into(), "text/x-nix-cache-info"),
            ("/store/nix-cache-info".into(), "text/x-nix-cache-info"),
            (format!("/local/{hash_part}.narinfo"), info),
            (format!("/store/{hash_part}.narinfo"), info),
            (format!("/local/nar/{name}"), nar_type),
            (format!("/store/nar/{name}"), nar_type),
            (format!("/store/{hash_part}.ls"), "application/json"),
            (
                format!("/store/log/{}", world::base_name(&self.derivation)),
                "text/plain; charset=utf-8",
            ),
        ]
    }
}

#[test]
fn routes_serve_only_permitted_clients() {
    let scene = Scene::new(&["--bind", "0.0.0.0", "--bind", "[::]"]);
    let (server, neighbour) = (&scene.server, &scene.neighbour);
    let unknown = format!("/local/{}.narinfo", "0".repeat(32));
    let at_root = format!("/{}.narinfo", scene.hash_part());
    let relayed = nar_route(server, server, &scene.path).replace("/local/", "/peer/");
    let check = |who: &str, from: &Host, to: SocketAddr, own: u16, peers: u16| {
        for (route, _) in scene.own_routes() {
            let expected = if route == "/nix-cache-info" { 200 } else { own };
            assert_eq!(get(from, to, &route).unwrap().status, expected, "{who}: {route}");
        }
        assert_eq!(get(from, to, &relayed).unwrap().status, peers, "{who}: {relayed}");
        // At the root, this machine looks paths up at its peers; others get the local store.
        let expected = if peers == 404 { peers } else { own };
        assert_eq!(get(from, to, &at_root).unwrap().status, expected, "{who}: {at_root}");
    };
    let socket = |ip: &str| SocketAddr::new(ip.parse().unwrap(), PORT);
    let address = SocketAddr::new(server.address.into(), PORT);
    // No other host runs peerix, so this machine's lookups at peers are misses.
    check("127.0.0.1", server, socket("127.0.0.1"), 200, 404);
    check("::1", server, socket("::1"), 200, 404);
    check("a neighbour", neighbour, address, 200, 403);
    check("this machine's address", server, address, 200, 404);

    for (host, number) in [(server, 1), (neighbour, 2)] {
        host.net(&format!("ip addr add 203.0.113.{number}/24 dev eth0"));
        host.net(&format!("ip -6 addr add fd00:77::{number}/64 dev eth0 nodad"));
        host.net(&format!("ip -6 addr add 2001:db8::{number}/64 dev eth0 nodad"));
    }
    neighbour.net("ip addr add 192.168.50.2/32 dev lo");
    server.net(&format!("ip route add 192.168.50.2/32 via {}", neighbour.address));
    let link_local = link_local(server);
    let scope = index(neighbour);
    check("fe80::", neighbour, SocketAddrV6::new(link_local, PORT, 0, scope).into(), 200, 403);
    // The kernel reports the new addresses to the daemon.
    wait_for("a new private network is noticed", || {
        (get(neighbour, socket("fd00:77::1"), "/store/nix-cache-info").unwrap().status == 200)
            .then_some(())
    });
    check("fd00::", neighbour, socket("fd00:77::1"), 200, 403);
    check("a public address on the same link", neighbour, socket("203.0.113.1"), 403, 403);
    check("a global IPv6 address on the same link", neighbour, socket("2001:db8::1"), 403, 403);
    neighbour.net(&format!("ip route add {} dev eth0 src 192.168.50.2", server.address));
    check("a private address behind a router", neighbour, address, 403, 403);
    // A stranger's answer does not depend on whether the path exists.
    let (there, not_there) =
        (narinfo(neighbour, server, &scene.path), get(neighbour, address, &unknown).unwrap());
    assert_eq!((there.status, there.body), (not_there.status, not_there.body));

    // By UDP: the same query from the same host, once with the address behind a router and once
    // with the neighbour's address.
    let query =
        crate::common::packet::Packet::Query { id: 7, hash_part: scene.hash_part().to_owned() }
            .write();
    let ask_from = |from: &str| {
        let from: IpAddr = from.parse().unwrap();
        let udp = neighbour.in_net(|| std::net::UdpSocket::bind((from, 0)).unwrap());
        udp.send_to(&query, address).unwrap();
        udp
    };
    let strange = ask_from("192.168.50.2");
    let known = ask_from(&neighbour.address.to_string());
    assert!(stock::query_has(&known, server, &scene.path));
    // The stranger's query arrived before the neighbour's, which has its answer.
    strange.set_nonblocking(true).unwrap();
    assert!(strange.recv_from(&mut [0; 2048]).is_err(), "a stranger was answered by UDP");
}

fn link_local(host: &Host) -> Ipv6Addr {
    wait_for("a link-local address", || {
        let text = host
            .net_cmd("ip")
            .args(["-6", "-o", "addr", "show", "dev", "eth0", "scope", "link"])
            .okay();
        let address = text.split_whitespace().find(|word| word.starts_with("fe80:"))?;
        address.split('/').next()?.parse().ok()
    })
}

fn index(host: &Host) -> u32 {
    let text = host.net_cmd("cat").arg("/proc/net/if_inet6").okay();
    let line = text.lines().find(|line| line.ends_with("eth0")).expect("eth0 has an IPv6 address");
    u32::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
}

#[test]
fn named_peer_outside_lan_is_served_as_neighbour() {
    let lan = Lan::new();
    let (server, far) = (lan.host("server"), lan.host("far"));
    stock::ready(&server);
    let path = stock::add(&server, "file", "echo file > $n");
    far.net("ip addr add 192.168.50.2/32 dev lo");
    server.net(&format!("ip route add 192.168.50.2/32 via {}", far.address));
    far.net(&format!("ip route add {} dev eth0 src 192.168.50.2", server.address));
    let daemon = Daemon::start(&server, &[]);
    assert_eq!(narinfo(&far, &server, &path).status, 403);
    drop(daemon);
    let _daemon = Daemon::start(&server, &["--peer", "192.168.50.2"]);
    wait_for("the name is resolved", || {
        (narinfo(&far, &server, &path).status == 200).then_some(())
    });
}

#[test]
fn answers_have_expected_headers() {
    let scene = Scene::new(&[]);
    let encodings = "Accept-Encoding: zstd, br, gzip, deflate\r\n";
    let mut connection = scene.connect();
    let nothing = format!("/local/{}.narinfo", "0".repeat(32));
    let mut routes = scene.own_routes();
    routes.push((nothing, "text/plain; charset=utf-8"));
    for (route, content_type) in routes {
        let answer = connection.ask("GET", &route, encodings).unwrap();
        assert!(answer.whole && !answer.body.is_empty(), "{route}");
        assert_eq!(answer.header("content-type"), Some(content_type), "{route}");
        assert_eq!(
            answer.header("content-length"),
            Some(&*answer.body.len().to_string()),
            "{route}"
        );
        for never in ["transfer-encoding", "content-encoding", "trailer"] {
            assert_eq!(answer.header(never), None, "{route}: {never}");
        }
        // A body after HEAD would appear in place of the next answer.
        let head = connection.ask("HEAD", &route, encodings).unwrap();
        assert_eq!(head.status, answer.status, "{route}");
        let but_date = |answer: &Answer| {
            let fields = answer.headers.iter().filter(|(name, _)| name != "date").cloned();
            fields.collect::<Vec<_>>()
        };
        assert_eq!(but_date(&head), but_date(&answer), "{route}");
        if content_type == "application/x-nix-nar" {
            assert_eq!(answer.header("accept-ranges"), Some("bytes"), "{route}");
            let hash = route.rsplit('-').next().unwrap().strip_suffix(".nar").unwrap();
            assert_eq!(answer.header("etag"), Some(&*format!("\"{hash}\"")), "{route}");
            assert!(answer.body == stock::dump(&scene.server, &scene.path), "{route}");
        }
        let single = answer
            .headers
            .iter()
            .all(|(name, _)| answer.headers.iter().filter(|(n, _)| n == name).count() == 1);
        assert!(single, "{route}: a header twice: {:?}", answer.headers);
    }

    let info = scene.get("/nix-cache-info").text();
    assert_eq!(info, "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 20\n");
    for (view, url) in [("local", "local/nar/"), ("store", "nar/")] {
        let text = scene.get(&format!("/{view}/{}.narinfo", scene.hash_part())).text();
        assert!(text.ends_with('\n') && !text.contains("\n\n"), "{text:?}");
        assert_eq!(line(&text, "StorePath"), scene.path);
        assert_eq!(line(&text, "Compression"), "none");
        assert_eq!(line(&text, "Deriver"), world::base_name(&scene.derivation));
        assert_eq!(line(&text, "References"), "");
        let nar = stock::dump(&scene.server, &scene.path);
        assert_eq!(line(&text, "NarSize"), nar.len().to_string());
        let hash = nix::hash(&scene.server, &nar);
        assert_eq!(line(&text, "NarHash"), hash);
        let hash = hash.strip_prefix("sha256:").unwrap();
        assert_eq!(line(&text, "URL"), format!("{url}{}-{hash}.nar", scene.hash_part()));
        assert!(!text.contains("Sig:"), "{text}");
    }
}

#[test]
fn nar_ranges_return_requested_bytes() {
    let scene = Scene::new(&[]);
    let make = "mkdir $n; printf 12345 > $n/five; printf x > $n/one; seq 100000 > $n/numbers; ln -s five $n/link; : > $n/zero";
    let path = stock::add(&scene.server, "padded", make);
    let nar = stock::dump(&scene.server, &path);
    let size = nar.len();
    let route = nar_route(&scene.neighbour, &scene.server, &path);
    let padding = nar.windows(8).position(|word| word == b"12345\0\0\0").unwrap() + 6;
    let mut connection = scene.connect();
    let mut part = |range: &str, more: &str| {
        let answer = connection.ask("GET", &route, &format!("Range: {range}\r\n{more}")).unwrap();
        assert!(answer.whole, "{range}");
        assert_eq!(
            answer.header("content-length"),
            Some(&*answer.body.len().to_string()),
            "{range}"
        );
        answer
    };
    for (range, first, last) in [
        ("bytes=0-0".to_owned(), 0, 0),
        ("bytes=0-".to_owned(), 0, size - 1),
        (format!("bytes={}-", size - 1), size - 1, size - 1),
        (format!("bytes={}-{}", size - 1, size + 5), size - 1, size - 1),
        (format!("bytes={padding}-"), padding, size - 1),
        (format!("bytes={padding}-{padding}"), padding, padding),
        (format!("bytes={}-{}", padding - 3, padding + 1), padding - 3, padding + 1),
        (
            format!("bytes={}-{}", size / 2, size / 2 + 300_000),
            size / 2,
            (size / 2 + 300_000).min(size - 1),
        ),
        ("bytes=-1".to_owned(), size - 1, size - 1),
        (format!("bytes=-{}", size + 9), 0, size - 1),
    ] {
        let answer = part(&range, "");
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(
            answer.header("content-range"),
            Some(&*format!("bytes {first}-{last}/{size}")),
            "{range}"
        );
        assert!(answer.body == nar[first..=last], "{range}");
    }
    for range in [
        format!("bytes={size}-"),
        format!("bytes={}-{}", size + 1, size + 2),
        "bytes=-0".to_owned(),
    ] {
        let answer = part(&range, "");
        assert_eq!((answer.status, answer.body.len()), (416, 0), "{range}");
        assert_eq!(answer.header("content-range"), Some(&*format!("bytes */{size}")), "{range}");
    }
    for range in ["bytes=0-0,5-6", "bytes=5-4", "bytes=x-", "lines=1-2"] {
        let answer = part(range, "");
        assert_eq!((answer.status, answer.header("content-range")), (200, None), "{range}");
        assert!(answer.body == nar, "{range}");
    }
    // `If-Range` continues a NAR only if the client has part of the same NAR (RFC 9110, 13.1.5).
    let hash = route.rsplit('-').next().unwrap().strip_suffix(".nar").unwrap();
    for (tag, status) in
        [(format!("\"{hash}\""), 206), ("\"other\"".into(), 200), (format!("W/\"{hash}\""), 200)]
    {
        let answer = part("bytes=8-15", &format!("If-Range: {tag}\r\n"));
        assert_eq!(answer.status, status, "{tag}");
    }
    // In a small NAR, a range may begin at every byte.
    let path = stock::add(
        &scene.server,
        "small",
        "mkdir $n; printf 123 > $n/a; ln -s a $n/b; mkdir $n/c; : > $n/d; chmod +x $n/a",
    );
    let nar = stock::dump(&scene.server, &path);
    let route = nar_route(&scene.neighbour, &scene.server, &path);
    for first in 0..nar.len() {
        let answer = connection.ask("GET", &route, &format!("Range: bytes={first}-\r\n")).unwrap();
        assert_eq!(answer.status, 206);
        assert!(answer.body == nar[first..], "from byte {first}");
    }
}

#[test]
fn malformed_targets_get_400_or_404() {
    let scene = Scene::new(&[]);
    let hash_part = scene.hash_part();
    let nar = nar_route(&scene.neighbour, &scene.server, &scene.path);
    let (name, derivation) =
        (nar.strip_prefix("/local/nar/").unwrap(), world::base_name(&scene.derivation));
    let base = world::base_name(&scene.path);
    let mut upper = hash_part.to_ascii_uppercase();
    upper.truncate(32);
    let targets = [
        "/%".to_owned(),
        "/%zz".into(),
        "/%00".into(),
        "/%ff%fe".into(),
        "/..".into(),
        "/../../etc/passwd".into(),
        "/%2e%2e/%2e%2e/etc/passwd".into(),
        "/%2e%2e%2f%2e%2e%2fetc%2fpasswd".into(),
        "//etc/passwd".into(),
        "/local/../../etc/passwd".into(),
        format!("/local/%2e%2e/store/{hash_part}.narinfo"),
        format!("/local/nar/../{hash_part}.narinfo"),
        format!("/local//{hash_part}.narinfo"),
        format!("//local/{hash_part}.narinfo"),
        format!("/local/{hash_part}.narinfo/"),
        format!("/local/{hash_part}.narinfo%00"),
        format!("/local/{hash_part}%00.narinfo"),
        format!("/local/{hash_part}.narinfo%0d%0aX:y"),
        format!("/local/{}.narinfo", &hash_part[1..]),
        format!("/local/{hash_part}0.narinfo"),
        format!("/local/{upper}.narinfo"),
        format!("/local/e{}.narinfo", &hash_part[1..]),
        format!("/local/{hash_part}"),
        format!("/local/{base}.narinfo"),
        format!("/local/nix/store/{base}"),
        format!("/local/nar{}", scene.path),
        format!("/local/nar/{}", name.strip_suffix(".nar").unwrap()),
        format!("/local/nar/{}", name.replace(".nar", "0.nar")),
        format!("/local/nar/{}", name.replace(".nar", ".nar.xz")),
        format!("/local/nar/{}", name.replace('-', "_")),
        format!("/local/nar/{hash_part}-{}.nar", "0".repeat(52)),
        "/local/nar/L25peC9zdG9yZS8uLi8uLi9ldGMvcGFzc3dk.nar".into(),
        format!("/store/nar/../log/{derivation}"),
        format!("/store/log/../../{derivation}"),
        format!("/store/log/{base}"),
        format!("/store/log/x%2f..%2f{derivation}"),
        format!("/store/{hash_part}.ls/run"),
        format!("/realisations/sha256:{}!out.doi", "0".repeat(64)),
        "/nix-cache-info/".into(),
        "/NIX-CACHE-INFO".into(),
        "nix-cache-info".into(),
        "*".into(),
        "ftp://x/nix-cache-info".into(),
        "https:/nix-cache-info".into(),
        format!("/local/{}", "a".repeat(10_000)),
    ];
    let mut connection = scene.connect();
    for target in &targets {
        // All targets go over one connection: none of them confuses the next request.
        let answer = connection.get(target).unwrap();
        assert!(matches!(answer.status, 400 | 404), "{target}: {}", answer.status);
        let text = answer.text();
        assert!(
            text.lines().count() == 1 && !text.contains('/') && text.len() < 80,
            "{target}: {text:?}"
        );
    }
    assert_eq!(connection.get("/nix-cache-info").unwrap().status, 200);

    // Unusual, but valid targets.
    for target in [
        format!("/local/{hash_part}.narinfo?query"),
        format!("/l%6fcal/{hash_part}%2Enarinfo"),
        format!("http://elsewhere:1/local/{hash_part}.narinfo"),
        format!("/local/nar/{}", name.replace('-', "%2d")),
    ] {
        assert_eq!(connection.get(&target).unwrap().status, 200, "{target}");
    }

    // Malformed requests get 400, and the daemon closes the connection.
    for bytes in [
        &b"GET /nix-cache-info\0 HTTP/1.1\r\n\r\n"[..],
        b"GET /nix cache-info HTTP/1.1\r\n\r\n",
        b"GET  /nix-cache-info HTTP/1.1\r\n\r\n",
        b"GET /nix-cache-info HTTP/1.1\n\n\r\n\r\n",
        b"GET /nix-cache-info HTTP/3\r\n\r\n",
        b"GET /nix-cache-info HTTP/1.1\r\nName\r\n\r\n",
        b"GET /nix-cache-info HTTP/1.1\r\nA: b\r\n c\r\n\r\n",
        b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03\r\n\r\n",
        b"\r\n\r\n\r\n\r\n",
    ] {
        let answer = raw(&scene, bytes);
        let shown = String::from_utf8_lossy(bytes);
        assert!(answer.starts_with("HTTP/1.1 400 "), "{shown:?}: {answer:?}");
        assert!(answer.contains("Connection: close"), "{shown:?}: {answer:?}");
        assert_eq!(answer.matches("Content-Length:").count(), 1, "{shown:?}: {answer:?}");
    }
}

/// Sends bytes on a new connection and returns everything up to its close.
fn raw(scene: &Scene, bytes: &[u8]) -> String {
    let mut stream = scene.neighbour.connect((scene.server.address, PORT)).unwrap();
    stream.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("the connection is closed in order");
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn methods_other_than_get_and_head_get_405() {
    let scene = Scene::new(&[]);
    let mut connection = scene.connect();
    for method in ["POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "get"] {
        for (route, _) in scene.own_routes() {
            let answer = connection.ask(method, &route, "").unwrap();
            assert_eq!(
                (answer.status, answer.header("allow")),
                (405, Some("GET, HEAD")),
                "{method} {route}"
            );
        }
    }
    // The daemon never parses a body as the next request, and answers without waiting for the body.
    let smuggled = "GET /nix-cache-info HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
    for head in [
        format!("POST /nix-cache-info HTTP/1.1\r\nContent-Length: {}\r\n\r\n", smuggled.len()),
        format!(
            "PUT /store/x.narinfo HTTP/1.1\r\nContent-Length: {}\r\nExpect: 100-continue\r\n\r\n",
            smuggled.len()
        ),
    ] {
        let answer = raw(&scene, format!("{head}{smuggled}").as_bytes());
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        assert!(answer.contains("Connection: close"), "{answer}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
    }
    let with_body = format!(
        "GET /nix-cache-info HTTP/1.1\r\nContent-Length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    );
    let answer = raw(&scene, with_body.as_bytes());
    assert_eq!(
        (answer.matches("HTTP/1.1").count(), answer.matches("StoreDir").count()),
        (1, 1),
        "{answer}"
    );

    // Uploads of real clients are refused at once.
    scene.neighbour.sh("head -c 3000000 /dev/zero > /tmp/upload");
    let url = scene.url("/store/x.narinfo");
    let curl =
        ["-sS", "--max-time", "300", "-o", "/dev/null", "-w", "%{http_code}", "-T", "/tmp/upload"];
    let status = scene.neighbour.cmd("curl").args(curl).arg(&url).ran();
    assert_eq!(String::from_utf8_lossy(&status.stdout), "405");
    let to = [
        "copy",
        "--to",
        &scene.url("/store"),
        &stock::add(&scene.neighbour, "own", "echo own > $n"),
    ];
    let copied = scene.neighbour.cmd("timeout").args(["300", "nix"]).args(to).ran();
    assert!(!copied.status.success());
}

#[test]
fn plain_nix_reads_paths_logs_and_listings() {
    let scene = Scene::new(&[]);
    let (server, client) = (&scene.server, &scene.neighbour);
    server.write("/tmp/user", format!("uses {}", scene.path));
    let user = server.cmd("nix-store").args(["--add", "/tmp/user"]).okay().trim().to_owned();
    let store = scene.url("/store");

    let shown = client
        .cmd("nix")
        .args(["path-info", "--store", &store, "--json", &scene.path, &user])
        .okay();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    assert_eq!(
        shown[0]["path"].as_str().max(shown[1]["path"].as_str()),
        Some(&*scene.path).max(Some(&*user))
    );
    let missing = format!("/nix/store/{}-missing", "0".repeat(32));
    let output = client.cmd("nix").args(["path-info", "--store", &store, &missing]).ran();
    assert!(
        !output.status.success()
            && String::from_utf8_lossy(&output.stderr).contains("is not valid")
    );

    nix::assert_quiet(
        &client.cmd("nix").args(["copy", "--no-check-sigs", "--from", &store, &scene.path]).ran(),
    );
    nix::assert_whole(client, &[&scene.path], &server.path("/nix/store"));

    // As a substituter in nix.conf. A content-addressed path needs no signature.
    nix::configure(client, &format!("substituters = {store}\nrequire-sigs = true\n"));
    nix::realise_quietly(client, &[&user]);
    nix::assert_whole(client, &[&user], &server.path("/nix/store"));

    // Nix stores the log compressed; the daemon serves it as text.
    let log = server.cmd("nix-store").args(["--read-log", &scene.derivation]).okay();
    assert!(log.contains("\n3000\n") && log.ends_with("ümlaut end\n"));
    assert_eq!(
        scene.get(&format!("/store/log/{}", world::base_name(&scene.derivation))).text(),
        log
    );
    for of in [&scene.path, &scene.derivation] {
        let fetched = client.cmd("nix").args(["log", "--store", &store, of]).okay();
        assert_eq!(fetched, log, "{of}");
    }

    // Listings equal those that Nix writes.
    let odd = stock::add(
        server,
        "odd",
        "mkdir -p $n/a/b/c $n/e; printf 12345 > $n/a/b/f; echo x > \"$n/quote\\\"d \\\\ ü\"; : > $n/z; chmod +x $n/z; ln -s a/b $n/link",
    );
    let file = stock::add(server, "flat", "echo flat > $n");
    server.sh(&format!(
        "nix copy --to 'file:///tmp/cache?write-nar-listing=1&compression=none' {odd} {file} {}",
        scene.path
    ));
    for path in [&odd, &file, &scene.path] {
        let expected =
            fs::read(server.path(&format!("/tmp/cache/{}.ls", world::hash_part(path)))).unwrap();
        let expected: serde_json::Value = serde_json::from_slice(&expected).unwrap();
        let listing = scene.get(&format!("/store/{}.ls", world::hash_part(path)));
        let found: serde_json::Value = serde_json::from_slice(&listing.body).unwrap();
        assert_eq!(found, expected, "{path}");
    }
    let seen = client.cmd("nix").args(["store", "ls", "--store", &store, "-R", &odd]).okay();
    assert!(seen.contains("./a/b/f"), "{seen}");
}

#[test]
fn only_own_paths_are_signed() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let mut key = String::new();
    let holder = Holder::with(&lan, &world, "holder", |host| {
        world.sign(host);
        key = nix::generate_key(host);
        vec!["--private-key".into(), "/etc/peerix.sec".into()]
    });
    let little = world.path("little");
    let text = narinfo(&holder.host, &holder.host, little).text();
    // The daemon adds its own signature to the stored one.
    let signers: Vec<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("Sig: ")?.split_once(':'))
        .map(|(name, _)| name)
        .collect();
    assert_eq!(signers, ["cache-1", "holder-1"]);

    // Real Nix verifies the daemon's signature, because it trusts no other key.
    let plain = lan.host("plain");
    let store = format!("http://{}:{PORT}/store", holder.host.address);
    nix::configure(
        &plain,
        &format!("substituters = {store}\nrequire-sigs = true\ntrusted-public-keys = {key}\n"),
    );
    nix::realise_quietly(&plain, &[little]);
    plain.cmd("nix").args(["store", "verify", "--no-contents", little]).okay();

    // A node with a key relays other peers' narinfos without its own signature.
    let relay = lan.host("relay");
    nix::configure_client(&relay, "", &[&key]);
    let relay_key = nix::generate_key(&relay);
    let _relaying = Daemon::start(&relay, &["--private-key", "/etc/peerix.sec"]);
    crate::common::daemon::wait_until_known(&relay, &holder.mark);
    let answer = get_local(&relay, &format!("/{}.narinfo", world::hash_part(little))).unwrap();
    let relayed = answer.text();
    assert_eq!(answer.status, 200);
    let but_url = |text: &str| {
        text.lines().filter(|line| !line.starts_with("URL: ")).collect::<Vec<_>>().join("\n")
    };
    assert_eq!(but_url(&relayed), but_url(&text), "relayed with another signature");
    let own = crate::common::daemon::add_unique_path(&relay);
    assert!(
        narinfo(&relay, &relay, &own).text().contains("Sig: relay-1:"),
        "the relay does sign what it has"
    );
    let distrusting = lan.host("distrusting");
    nix::configure_client(&distrusting, "", &[&relay_key]);
    let _daemon = Daemon::start(&distrusting, &[]);
    crate::common::daemon::wait_until_known(&distrusting, &holder.mark);
    assert!(
        !nix::realise(&distrusting, &[little]).status.success(),
        "the relay's key made others' paths acceptable"
    );

    // A relayed NAR has the same headers and ranges as one of the local store.
    let route = format!("/{}", line(&relayed, "URL"));
    let nar = fs::read(
        world.cache().join(line(
            &fs::read_to_string(
                world.cache().join(format!("{}.narinfo", world::hash_part(little))),
            )
            .unwrap(),
            "URL",
        )),
    )
    .unwrap();
    let mut connection = Connection::new(relay.connect_local().unwrap()).unwrap();
    let head = connection.ask("HEAD", &route, "").unwrap();
    let whole = connection.get(&route).unwrap();
    assert_eq!((head.status, whole.status, whole.whole), (200, 200, true));
    assert!(whole.body == nar);
    for name in ["content-length", "content-type", "etag", "accept-ranges"] {
        assert_eq!(head.header(name), whole.header(name), "{name}");
    }
    assert_eq!(whole.header("content-type"), Some("application/x-nix-nar"));
    assert_eq!(whole.header("accept-ranges"), Some("bytes"));
    assert_eq!((whole.header("transfer-encoding"), whole.header("content-encoding")), (None, None));
    for (range, part) in [("0-0", 0..1), ("100-1003", 100..1004), ("-1", nar.len() - 1..nar.len())]
    {
        let answer = connection.ask("GET", &route, &format!("Range: bytes={range}\r\n")).unwrap();
        assert_eq!(answer.status, 206, "{range}");
        assert!(answer.body == nar[part], "{range}");
    }
    let answer =
        connection.ask("GET", &route, &format!("Range: bytes={}-\r\n", nar.len())).unwrap();
    assert_eq!(answer.status, 416);
    // Another NAR of the same path, and a NAR of an absent path, are misses.
    for route in [
        format!("/peer/nar/{}-{}.nar", world::hash_part(little), "0".repeat(52)),
        format!("/peer/nar/{}-{}.nar", "0".repeat(32), "0".repeat(52)),
    ] {
        assert_eq!(connection.get(&route).unwrap().status, 404, "{route}");
    }
}

#[test]
fn changed_or_deleted_path_is_a_miss_until_registered_again() {
    let scene = Scene::new(&[]);
    let server = &scene.server;
    let path = stock::add(server, "file", "echo file > $n");
    let other = stock::add(server, "other", "echo other > $n");
    let (narinfo_route, nar, listing) = (
        stock::narinfo_route(&path),
        nar_route(&scene.neighbour, server, &path),
        format!("/store/{}.ls", world::hash_part(&path)),
    );
    let routes = [narinfo_route.clone(), nar.clone(), nar.replace("/local/", "/store/"), listing];
    let socket = scene.neighbour.udp(0);
    routes.iter().for_each(|route| assert_eq!(scene.get(route).status, 200, "{route}"));
    assert!(stock::query_has(&socket, server, &path));

    // The path is registered with other content, as by `nix-store --repair-path`.
    let register = |content: &str| {
        server.sh(&format!(
            "echo {content} > {path}; printf '{path}\\n\\n0\\n' | nix-store --register-validity --reregister"
        ));
    };
    register("changed");
    assert_eq!(scene.get(&nar).status, 404, "a NAR that is no longer the path's");
    let text = scene.get(&narinfo_route).text();
    assert_eq!(line(&text, "NarHash"), nix::hash(server, &stock::dump(server, &path)));
    let answer = scene.get(&format!("/{}", line(&text, "URL")));
    assert!(answer.status == 200 && answer.body == stock::dump(server, &path));
    register("file");
    assert_eq!(scene.get(&nar).status, 200);

    // A valid path without files is a miss, and the connection stays open.
    server.sh(&format!("rm {other}"));
    let route = nar_route(&scene.neighbour, server, &other);
    let mut connection = scene.connect();
    for _ in 0..2 {
        assert_eq!(connection.get(&route).unwrap().status, 404, "a path without files");
    }

    // After garbage collection.
    server.cmd("nix-store").args(["--delete", &path]).okay();
    routes.iter().for_each(|route| assert_eq!(scene.get(route).status, 404, "{route}"));
    assert!(!stock::query_has(&socket, server, &path));
    // Registered again with the same content.
    assert_eq!(stock::add(server, "file", "echo file > $n"), path);
    routes.iter().for_each(|route| assert_eq!(scene.get(route).status, 200, "{route}"));
}

#[test]
fn log_of_invalid_derivation_is_served_only_locally() {
    let scene = Scene::new(&[]);
    let log = format!("/store/log/{}", world::base_name(&scene.derivation));
    assert_eq!(scene.get(&log).status, 200);
    scene
        .server
        .cmd("nix-store")
        .args(["--option", "keep-derivations", "false", "--delete", &scene.derivation])
        .okay();
    assert_eq!(scene.get(&log).status, 404, "the log of a derivation that is no valid path");
    assert_eq!(get_local(&scene.server, &log).unwrap().status, 200);
}

/// The daemon repeats a cached answer until the next write to the database, and no longer.
#[test]
fn cached_answers_follow_every_change_of_nix() {
    let lan = Lan::new();
    let (server, neighbour) = (lan.host("server"), lan.host("neighbour"));
    stock::ready(&server);
    let _daemon = Daemon::start(&server, &[]);
    let connect =
        |host: &Host, to: IpAddr| Connection::new(host.connect((to, PORT)).unwrap()).unwrap();
    let mut connections = [
        (connect(&server, "127.0.0.1".parse().unwrap()), "/store"),
        (connect(&neighbour, server.address.into()), "/local"),
    ];
    let mut statuses = |route: &str| -> Vec<u16> {
        let mut all = Vec::new();
        // The second answer comes from the cache.
        for _ in 0..2 {
            for (connection, root) in &mut connections {
                all.push(connection.get(&format!("{root}{route}")).unwrap().status);
            }
        }
        all
    };
    server.write("/tmp/moment", "one");
    let mut nar = String::new();
    for round in 0..12 {
        // Each round also adds other paths.
        server.write("/tmp/other", round.to_string());
        let path = server.cmd("nix-store").args(["--add", "/tmp/moment"]).okay().trim().to_owned();
        let route = format!("/{}.narinfo", world::hash_part(&path));
        assert_eq!(statuses(&route), [200; 4], "{round}: just added");
        nar = nar_route(&neighbour, &server, &path).strip_prefix("/local").unwrap().to_owned();
        assert_eq!(statuses(&nar), [200; 4], "{round}: just added");
        server.cmd("nix-store").args(["--add", "/tmp/other"]).okay();
        assert_eq!(statuses(&route), [200; 4], "{round}: another was added");
        server.cmd("nix-store").args(["--delete", &path]).okay();
        assert_eq!(statuses(&nar), [404; 4], "{round}: just deleted");
        assert_eq!(statuses(&route), [404; 4], "{round}: just deleted");
    }
    assert!(!nar.is_empty());
}
