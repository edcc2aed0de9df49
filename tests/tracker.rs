//! The tracker as a process: its answers to original peers, to peers with keys and to attackers,
//! and its limits.
//!
//! The tests use loopback, where each address stands for one machine. Only the test of `/reach`
//! uses a LAN of namespaces.

use crate::common::http::{Answer, Connection, Reply, Server};
use crate::common::solo::{
    LoopbackTracker, TempDir, announce, clock, fresh_network, fresh_source, identity, post,
    signed_announce, signed_filter_headers, signed_report, stamp,
};
use crate::common::tracker::Tracker;
use crate::common::{DEADLINE, Lan, PORT, Scale, wait_for};
use peerix::nix::{HashPart, nix32};
use peerix::wire::filter::BloomFilter;
use peerix::wire::tracker::{Identity, Proof, SignedText};
use serde_json::{Value, json};
use std::net::Ipv4Addr;

/// Starts a tracker; returns the directory of its database and the tracker.
fn tracker() -> (TempDir, LoopbackTracker) {
    let dir = TempDir::new();
    let tracker = LoopbackTracker::start(&dir.file("db"));
    (dir, tracker)
}

/// Checks an answer's status and body.
#[track_caller]
fn assert_answer(answer: &Answer, status: u16, body: &str) {
    assert_eq!((answer.status, answer.text().as_str()), (status, body));
}

/// Checks an answer's status, and returns its error text.
#[track_caller]
fn assert_error(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", answer.text());
    assert_eq!(answer.header("content-type"), Some("application/json"));
    let body: Value = serde_json::from_slice(&answer.body).expect("JSON");
    body["error"].as_str().expect("an error").to_owned()
}

/// Sends a request with the headers of the original's client (aiohttp).
fn as_the_original(
    connection: &mut Connection,
    method: &str,
    path: &str,
    body: Option<&str>,
) -> Answer {
    let mut request = format!(
        "{method} {path} HTTP/1.1\r\nHost: tracker:12305\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n\
         User-Agent: Python/3.11 aiohttp/3.8.4\r\n"
    );
    if let Some(body) = body {
        request += &format!("Content-Length: {}\r\nContent-Type: application/json\r\n", body.len());
    }
    request += "\r\n";
    request += body.unwrap_or_default();
    connection.send(request.as_bytes()).unwrap();
    connection.answer(true).unwrap()
}

/// The answers equal those of the original's server (Starlette) byte by byte, except for times.
#[test]
fn original_client_requests_get_original_answers() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    let mut ask = |method: &str, path: &str, body: Option<&str>, status: u16, expected: &str| {
        let answer = as_the_original(&mut c, method, path, body);
        assert_eq!(answer.header("content-type"), Some("application/json"));
        assert_answer(&answer, status, expected);
    };
    ask("GET", "/peers", None, 200, r#"{"peers":[]}"#);
    let announce = r#"{"peer_id": "9f3c", "port": 12304, "addr": "10.0.0.1"}"#;
    ask("POST", "/announce", Some(announce), 200, r#"{"status":"ok"}"#);
    ask("POST", "/announce", Some(announce), 200, r#"{"status":"ok"}"#);
    for incomplete in
        ["{}", r#"{"peer_id": "x"}"#, r#"{"port": 1}"#, r#"{"peer_id": "", "port": 1}"#]
    {
        ask("POST", "/announce", Some(incomplete), 400, r#"{"error":"peer_id and port required"}"#);
    }
    let init = r#"{"sender_id": "9f3c", "receiver_id": "77aa"}"#;
    ask("POST", "/transfer/init", Some(init), 200, r#"{"transfer_id":1}"#);
    ask("POST", "/transfer/init", Some(init), 200, r#"{"transfer_id":2}"#);
    ask(
        "POST",
        "/transfer/init",
        Some("{}"),
        400,
        r#"{"error":"sender_id and receiver_id required"}"#,
    );
    let nobody = "\"total_shared\":0,\"total_received\":0,\"successful_transfers\":0,\"failed_transfers\":0,\"score\":0.0";
    ask("GET", "/reputation/9f3c", None, 200, &format!("{{\"peer_id\":\"9f3c\",{nobody}}}"));

    let mut report = |id: u64, peer: &str, role: &str, bytes: &str, status: u16, expected: &str| {
        let body = format!(
            r#"{{"transfer_id": {id}, "peer_id": "{peer}", "role": "{role}", "bytes": {bytes}}}"#
        );
        ask("POST", "/report", Some(&body), status, expected);
    };
    let incomplete = r#"{"error":"transfer_id, peer_id, role, and bytes required"}"#;
    report(0, "9f3c", "sender", "1", 400, incomplete);
    report(1, "", "sender", "1", 400, incomplete);
    report(1, "9f3c", "sender", "null", 400, incomplete);
    report(1, "9f3c", "both", "1", 400, r#"{"error":"role must be 'sender' or 'receiver'"}"#);
    report(9, "9f3c", "sender", "1", 404, r#"{"error":"transfer not found"}"#);
    report(1, "77aa", "sender", "1", 403, r#"{"error":"peer_id does not match sender"}"#);
    report(1, "9f3c", "receiver", "1", 403, r#"{"error":"peer_id does not match receiver"}"#);
    report(1, "77aa", "receiver", "1000", 200, r#"{"status":"pending"}"#);
    report(1, "77aa", "receiver", "1000", 409, r#"{"error":"receiver already reported"}"#);
    report(1, "9f3c", "sender", "1000", 200, r#"{"status":"resolved","consistent":true}"#);
    report(1, "9f3c", "sender", "1000", 409, r#"{"error":"transfer already resolved"}"#);
    report(2, "9f3c", "sender", "100", 200, r#"{"status":"pending"}"#);
    report(2, "9f3c", "sender", "100", 409, r#"{"error":"sender already reported"}"#);
    report(2, "77aa", "receiver", "94", 200, r#"{"status":"resolved","consistent":false}"#);

    // Unsigned reports change no reputation, unlike in the original.
    ask("GET", "/reputation/9f3c", None, 200, &format!("{{\"peer_id\":\"9f3c\",{nobody}}}"));
    ask("GET", "/reputation/77aa", None, 200, &format!("{{\"peer_id\":\"77aa\",{nobody}}}"));

    let before = clock();
    let answer = as_the_original(&mut c, "GET", "/peers", None);
    let text = answer.text();
    let (head, rest) = text.split_once(",\"last_seen\":").unwrap();
    let (seen, tail) = rest.split_once(',').unwrap();
    assert_eq!(head, r#"{"peers":[{"peer_id":"9f3c","addr":"10.0.0.1","port":12304"#);
    assert_eq!(tail, format!("\"reputation\":{{{nobody}}}}}]}}"));
    let seen: f64 = seen.parse().unwrap();
    assert!((before as f64 / 1000.0 - seen).abs() < DEADLINE.as_secs_f64(), "{seen}");
}

/// Announces two peers with keys, each from an address in another network.
fn two_networks(tracker: &LoopbackTracker, keys: [(&str, &Identity); 2]) -> [Connection; 2] {
    keys.map(|(id, key)| {
        let mut c = tracker.connect_from(fresh_network()).unwrap();
        let announced = post(&mut c, "/announce", &signed_announce(key, id, 1, "10.0.0.1"));
        assert_eq!(announced.status, 200, "{}", announced.text());
        c
    })
}

#[test]
fn reports_within_five_percent_are_consistent() {
    let (_dir, tracker) = tracker();
    let (a, b) = (identity(40), identity(41));
    let [mut at_a, mut at_b] = two_networks(&tracker, [("a", &a), ("b", &b)]);
    for (sent, received, consistent) in [
        (0, 0, true),
        (1, 0, false),
        (100, 95, true),
        (100, 94, false),
        (95, 100, true),
        (94, 100, false),
        (1 << 44, 1 << 44, true),
        (1 << 44, 1, false),
    ] {
        let begun = post(&mut at_b, "/transfer/init", br#"{"sender_id":"a","receiver_id":"b"}"#);
        let id =
            serde_json::from_slice::<Value>(&begun.body).unwrap()["transfer_id"].as_u64().unwrap();
        assert_answer(
            &post(&mut at_a, "/report", &signed_report(&a, id, "a", "sender", sent)),
            200,
            r#"{"status":"pending"}"#,
        );
        let resolved = format!(r#"{{"status":"resolved","consistent":{consistent}}}"#);
        let mut receive =
            || post(&mut at_b, "/report", &signed_report(&b, id, "b", "receiver", received));
        assert_answer(&receive(), 200, &resolved);
        assert_answer(&receive(), 409, r#"{"error":"transfer already resolved"}"#);
    }
    let reputation = tracker.get("/reputation/a");
    let total = 100 + 95 + (1u64 << 44);
    assert_eq!(
        (reputation["total_shared"].as_u64(), reputation["total_received"].as_u64()),
        (Some(total), Some(0))
    );
    // Reports from one network count as at most one failure of a peer per day.
    assert_eq!(
        (reputation["successful_transfers"].as_u64(), reputation["failed_transfers"].as_u64()),
        (Some(4), Some(1))
    );
    assert_eq!(tracker.get("/reputation/b")["total_received"].as_u64(), Some(95 + 100 + (1 << 44)));
}

#[test]
fn transfer_init_accepts_counts_from_1_to_256() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    let mut init = |count: &str| {
        post(
            &mut c,
            "/transfer/init",
            format!(r#"{{"sender_id":"a","receiver_id":"b","count":{count}}}"#).as_bytes(),
        )
    };
    assert_answer(&init("1"), 200, r#"{"transfer_id":1,"count":1}"#);
    assert_answer(&init("256"), 200, r#"{"transfer_id":2,"count":256}"#);
    assert_answer(&init("null"), 200, r#"{"transfer_id":258}"#);
    for count in ["0", "257", "4294967295"] {
        assert_eq!(assert_error(&init(count), 400), "count: not from 1 to 256");
    }
    for count in ["-1", "4294967296", "1e308", "\"1\"", "1.5", "[]"] {
        assert!(assert_error(&init(count), 400).starts_with("body: "));
    }
    assert_answer(&init("1"), 200, r#"{"transfer_id":259,"count":1}"#);
    let same = post(&mut c, "/transfer/init", br#"{"sender_id":"a","receiver_id":"a"}"#);
    assert_eq!(assert_error(&same, 400), "sender_id and receiver_id are the same");
}

/// Only the holder of the key that is bound to a peer ID may announce an address for it.
#[test]
fn bound_peer_id_rejects_other_keys() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    let (owner, thief) = (identity(1), identity(2));
    let welcome = post(&mut c, "/announce", &signed_announce(&owner, "mine", 1, "10.0.0.1"));
    let body: Value = serde_json::from_slice(&welcome.body).unwrap();
    assert_eq!((welcome.status, body["status"].as_str()), (200, Some("ok")));
    assert_eq!(body["tracker"].as_str().map(str::len), Some(16));

    let mut c = tracker.connect();
    let unsigned = announce("mine", 2, "10.0.0.2", Proof::default());
    assert_eq!(
        assert_error(&post(&mut c, "/announce", &unsigned), 403),
        "peer_id: bound to a key, which has to sign"
    );
    let theirs = signed_announce(&thief, "mine", 2, "10.0.0.2");
    assert_eq!(
        assert_error(&post(&mut c, "/announce", &theirs), 403),
        "peer_id: bound to another key"
    );
    // The owner's public key with a signature by another key.
    let mut proof =
        thief.sign(&SignedText::Announce { peer_id: "mine", port: 2, addr: "10.0.0.2" }, stamp());
    proof.public_key = Some(owner.public().into());
    assert_eq!(
        assert_error(&post(&mut c, "/announce", &announce("mine", 2, "10.0.0.2", proof)), 403),
        "signature: wrong"
    );
    let mut leave = |proof: &Proof| {
        let mut body = serde_json::to_value(proof).unwrap();
        body["peer_id"] = "mine".into();
        c.request_with_body("DELETE", "/announce", "", body.to_string().as_bytes()).unwrap()
    };
    assert_error(&leave(&Proof::default()), 403);
    assert_error(&leave(&thief.sign(&SignedText::Leave { peer_id: "mine" }, stamp())), 403);
    let bits = BloomFilter::for_paths(1);
    let headers = signed_filter_headers(&thief, "mine", bits.as_bytes());
    assert_error(
        &tracker
            .connect()
            .request_with_body("PUT", "/filter/mine", &headers, bits.as_bytes())
            .unwrap(),
        403,
    );
    // The thief cannot report for the owner either.
    assert_answer(
        &post(&mut c, "/transfer/init", br#"{"sender_id":"mine","receiver_id":"b"}"#),
        200,
        r#"{"transfer_id":1}"#,
    );
    let report = json!({ "transfer_id": 1, "peer_id": "mine", "role": "sender", "bytes": 5 });
    assert_error(&post(&mut c, "/report", report.to_string().as_bytes()), 403);
    assert_answer(
        &post(&mut c, "/report", &signed_report(&owner, 1, "mine", "sender", 5)),
        200,
        r#"{"status":"pending"}"#,
    );

    let peers = tracker.get("/peers");
    assert_eq!(peers["peers"].as_array().unwrap().len(), 1);
    assert_eq!(
        (peers["peers"][0]["addr"].as_str(), peers["peers"][0]["port"].as_u64()),
        (Some("10.0.0.1"), Some(1))
    );
}

#[test]
fn signatures_outside_time_window_are_rejected() {
    let dir = TempDir::new();
    let early = clock() - 2000;
    let tracker = LoopbackTracker::start(&dir.file("db"));
    let mut c = tracker.connect();
    let key = identity(3);
    let at = |peer_id: &str, stamp: u64| {
        let statement = SignedText::Announce { peer_id, port: 1, addr: "10.0.0.1" };
        announce(peer_id, 1, "10.0.0.1", key.sign(&statement, stamp))
    };
    let first = at("p", stamp());
    assert_eq!(post(&mut c, "/announce", &first).status, 200);
    for (what, body, why) in [
        ("replayed", first, "not later than the last one"),
        ("expired", at("p", clock() - 400_000), "not within 5 minutes"),
        ("of the future", at("p", clock() + 400_000), "not within 5 minutes"),
        ("of the end of time", at("p", u64::MAX), "not within 5 minutes"),
        ("before the start", at("q", early), "earlier than the tracker's start"),
    ] {
        let answer = post(&mut c, "/announce", &body);
        assert!(assert_error(&answer, 403).contains(why), "{what}: {}", answer.text());
        let now = serde_json::from_slice::<Value>(&answer.body).unwrap()["now"].as_u64().unwrap();
        assert!(now.abs_diff(clock()) < 60_000, "{what}: {now}");
    }
    // A client that adopts the tracker's time succeeds.
    assert_eq!(post(&mut c, "/announce", &at("p", stamp() + 1)).status, 200);
    assert_eq!(tracker.get("/peers")["peers"].as_array().unwrap().len(), 1);
    // An unused signature does not survive a restart, because the tracker forgets used ones.
    let then = stamp() + 2;
    let unused = at("p", then);
    drop(tracker);
    wait_for("the clock", || (clock() > then).then_some(()));
    let tracker = LoopbackTracker::start(&dir.file("db"));
    let answer = post(&mut tracker.connect(), "/announce", &unused);
    assert!(assert_error(&answer, 403).contains("earlier than the tracker's start"));
}

#[test]
fn signature_of_other_statement_is_rejected() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    let key = identity(4);
    let mut wrong = |proof: Proof| {
        let answer = post(&mut c, "/announce", &announce("p", 1, "10.0.0.1", proof));
        assert_error(&answer, 403)
    };
    let other =
        |peer_id, port, addr| key.sign(&SignedText::Announce { peer_id, port, addr }, stamp());
    for proof in [
        other("q", 1, "10.0.0.1"),
        other("p", 2, "10.0.0.1"),
        other("p", 1, "10.0.0.2"),
        other("p", 1, ""),
        key.sign(&SignedText::Leave { peer_id: "p" }, stamp()),
        Proof { timestamp: Some(stamp()), ..other("p", 1, "10.0.0.1") },
    ] {
        assert_eq!(wrong(proof), "signature: wrong");
    }
    let whole = || other("p", 1, "10.0.0.1");
    for proof in [
        Proof { public_key: None, ..whole() },
        Proof { timestamp: None, ..whole() },
        Proof { signature: None, ..whole() },
        Proof { public_key: Some("AAAA".into()), ..whole() },
        Proof { public_key: Some("?".into()), ..whole() },
        Proof { signature: Some(String::new()), ..whole() },
        Proof { signature: Some("A".repeat(60_000)), ..whole() },
    ] {
        assert_eq!(wrong(proof), "public_key, timestamp and signature: missing or malformed");
    }
    // None of these requests has bound the ID to a key.
    assert_eq!(tracker.get("/peers")["peers"].as_array().map(Vec::len), Some(0));
    assert_eq!(
        post(&mut c, "/announce", &announce("p", 1, "10.0.0.1", Proof::default())).status,
        200
    );
}

/// Any invalid field gets a 4xx status with an error in JSON, stores nothing, and leaves the
/// connection usable.
#[test]
fn invalid_fields_get_4xx_and_store_nothing() {
    let (_dir, tracker) = tracker();
    let values = [
        "-1",
        "-0.5",
        "1e308",
        "-1e308",
        "1e999",
        "18446744073709551616",
        "99999999999999999999999999",
        "0.1",
        "\"1\"",
        "true",
        "[]",
        "{}",
        "[1]",
        "\"\\u0000\"",
        "\"\\ud800\"",
    ];
    let texts = [
        "1",
        "-1",
        "1e308",
        "true",
        "[]",
        "{}",
        "[\"a\"]",
        "\"a\\u0000b\"",
        "\"\\n\"",
        "\"\\ud800\"",
    ];
    let long = format!("\"{}\"", "x".repeat(129));
    let texts: Vec<&str> = texts.into_iter().chain([long.as_str()]).collect();
    let mut c = tracker.connect();
    let mut refused = |path: &str, fields: &[(&str, &str)], change: (&str, &str)| {
        let field = |(name, value): &(&str, &str)| {
            format!("\"{name}\":{}", if *name == change.0 { change.1 } else { value })
        };
        let body = format!("{{{}}}", fields.iter().map(field).collect::<Vec<_>>().join(","));
        let answer = post(&mut c, path, body.as_bytes());
        assert!(
            (400..500).contains(&answer.status),
            "{path} {body}: {} {}",
            answer.status,
            answer.text()
        );
        let error = assert_error(&answer, answer.status);
        assert!(!error.contains("1e308") && error.len() < 200, "{error}");
    };
    let announce = [("peer_id", "\"p\""), ("port", "1"), ("addr", "\"10.0.0.1\"")];
    let init = [("sender_id", "\"a\""), ("receiver_id", "\"b\""), ("count", "1")];
    let report =
        [("transfer_id", "1"), ("peer_id", "\"a\""), ("role", "\"sender\""), ("bytes", "1")];
    for value in values {
        refused("/announce", &announce, ("port", value));
        refused("/transfer/init", &init, ("count", value));
        refused("/report", &report, ("transfer_id", value));
        refused("/report", &report, ("bytes", value));
    }
    for value in &texts {
        refused("/announce", &announce, ("peer_id", value));
        refused("/announce", &announce, ("addr", value));
        refused("/transfer/init", &init, ("sender_id", value));
        refused("/transfer/init", &init, ("receiver_id", value));
        refused("/report", &report, ("peer_id", value));
        refused("/report", &report, ("role", value));
    }
    for port in ["0", "65536", "70000"] {
        refused("/announce", &announce, ("port", port));
    }
    refused("/report", &report, ("bytes", "17592186044417"));
    for name in ["peer_id", "port"] {
        refused("/announce", &announce, (name, "null"));
    }
    let mut c = tracker.connect();
    let deep = "[".repeat(60_000);
    let deeper = "{\"a\":".repeat(10_000);
    let latin = b"{\"peer_id\":\"\xe9\"}";
    for path in ["/announce", "/transfer/init", "/report"] {
        for body in [
            deep.as_bytes(),
            deeper.as_bytes(),
            latin,
            b"",
            b"null",
            b"[]",
            b"1",
            b"{",
            b"{}{}",
            b"\xff\xfe",
        ] {
            let answer = post(&mut c, path, body);
            assert!((400..500).contains(&answer.status), "{path}: {}", answer.text());
        }
    }
    assert_eq!(tracker.get("/peers")["peers"].as_array().map(Vec::len), Some(0));
    assert_answer(
        &post(&mut c, "/transfer/init", br#"{"sender_id":"a","receiver_id":"b"}"#),
        200,
        r#"{"transfer_id":1}"#,
    );
    let nobody = tracker.get("/reputation/a");
    assert_eq!(nobody["failed_transfers"].as_u64(), Some(0));
}

#[test]
fn announced_addresses_are_validated() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    let long = format!("{}a", "a.".repeat(127));
    for bad in [
        "169.254.169.254",
        "::1",
        "0.0.0.0",
        "a b",
        "localhost",
        "127.1",
        "0x7f000001",
        "2130706433",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "fe80::1",
        "224.0.0.1",
        "255.255.255.255",
        "10.0.0.1:80",
        "http://10.0.0.1",
        "a/b",
        "é.example",
        &long[..254],
    ] {
        let answer = post(&mut c, "/announce", &announce("p", 1, bad, Proof::default()));
        assert!(assert_error(&answer, 400).starts_with("addr: "), "{bad}: {}", answer.text());
    }
    // An empty address counts as missing, and the tracker rejects loopback as the sender's address.
    let answer = post(&mut c, "/announce", &announce("p", 1, "", Proof::default()));
    assert!(assert_error(&answer, 400).starts_with("addr: required"));
    assert_eq!(tracker.get("/peers")["peers"].as_array().map(Vec::len), Some(0));
    let longest = format!("{}a", "a.".repeat(126));
    let good = [
        "10.0.0.1",
        "100.64.0.1",
        "192.168.1.9",
        "2001:db8::1",
        "fd00::1",
        "host.example.org",
        &longest,
    ];
    for (port, addr) in (1..).zip(good) {
        let body = announce(&format!("peer {port}"), port, addr, Proof::default());
        assert_answer(&post(&mut c, "/announce", &body), 200, r#"{"status":"ok"}"#);
    }
    let peers = tracker.get("/peers");
    let mut listed: Vec<&str> =
        peers["peers"].as_array().unwrap().iter().map(|p| p["addr"].as_str().unwrap()).collect();
    listed.sort_unstable();
    let mut good = good;
    good.sort_unstable();
    assert_eq!(listed, good);
}

/// A filter for 50 paths that contains the paths with these numbers.
fn filter(paths: impl IntoIterator<Item = u64>) -> BloomFilter {
    let mut filter = BloomFilter::for_paths(50);
    paths.into_iter().for_each(|path| {
        filter.insert(&hash_part(path));
    });
    filter
}

fn hash_part(path: u64) -> HashPart {
    let digest = ring::digest::digest(&ring::digest::SHA256, &path.to_le_bytes());
    HashPart::parse(nix32::encode(&digest.as_ref()[..20]).as_bytes()).unwrap()
}

/// Announces a peer with that key and publishes its filter, from fresh addresses.
fn publish(tracker: &LoopbackTracker, key: &Identity, peer_id: &str, filter: &BloomFilter) {
    let mut c = tracker.connect();
    let announced = post(&mut c, "/announce", &signed_announce(key, peer_id, 1, "10.0.0.1"));
    assert_eq!(announced.status, 200, "{}", announced.text());
    let headers = signed_filter_headers(key, peer_id, filter.as_bytes());
    assert_answer(
        &c.request_with_body("PUT", &format!("/filter/{peer_id}"), &headers, filter.as_bytes())
            .unwrap(),
        200,
        r#"{"status":"ok"}"#,
    );
}

/// The peer IDs in the list `list` of a lookup's answer.
fn found(tracker: &LoopbackTracker, list: &str, path: u64) -> Vec<String> {
    let answer = tracker.get(&format!("/lookup/{}", hash_part(path)));
    let ids = answer[list].as_array().unwrap().iter();
    ids.map(|peer| peer["peer_id"].as_str().unwrap().to_owned()).collect()
}

/// Makes a transfer of `bytes` bytes to another peer on which both sides agree.
fn transfer(tracker: &LoopbackTracker, sender: (&str, &Identity), bytes: u64) {
    let receiver = ("someone", &identity(99));
    let [mut at_sender, mut at_receiver] = two_networks(tracker, [sender, receiver]);
    let init = json!({ "sender_id": sender.0, "receiver_id": receiver.0 });
    let begun = post(&mut at_receiver, "/transfer/init", init.to_string().as_bytes());
    let id = serde_json::from_slice::<Value>(&begun.body).unwrap()["transfer_id"].as_u64().unwrap();
    let sent = signed_report(sender.1, id, sender.0, "sender", bytes);
    assert_answer(&post(&mut at_sender, "/report", &sent), 200, r#"{"status":"pending"}"#);
    let received = signed_report(receiver.1, id, receiver.0, "receiver", bytes);
    assert_answer(
        &post(&mut at_receiver, "/report", &received),
        200,
        r#"{"status":"resolved","consistent":true}"#,
    );
    let proof = receiver.1.sign(&SignedText::Leave { peer_id: receiver.0 }, stamp());
    let mut body = serde_json::to_value(proof).unwrap();
    body["peer_id"] = receiver.0.into();
    assert_answer(
        &at_receiver
            .request_with_body("DELETE", "/announce", "", body.to_string().as_bytes())
            .unwrap(),
        200,
        r#"{"status":"ok"}"#,
    );
}

#[test]
fn lookups_list_peers_by_reputation_without_departed_ones() {
    let (_dir, tracker) = tracker();
    let names = ["none", "little", "much"];
    let keys = [identity(10), identity(11), identity(12)];
    for (name, key) in names.iter().zip(&keys) {
        publish(&tracker, key, name, &filter([1, 2]));
    }
    publish(&tracker, &identity(13), "elsewhere", &filter([3]));
    let mut c = tracker.connect();
    for name in ["old", "old and good"] {
        post(&mut c, "/announce", &announce(name, 1, "10.0.0.2", Proof::default()));
    }
    transfer(&tracker, ("little", &keys[1]), 10);
    transfer(&tracker, ("much", &keys[2]), 1_000_000);
    // The tracker tests meanwhile whether each peer can be reached. None can, and those that are
    // known to be unreachable sort last.
    wait_for("the order of reputation", || {
        (found(&tracker, "candidates", 1) == ["much", "little", "none"]).then_some(())
    });
    assert_eq!(found(&tracker, "candidates", 3), ["elsewhere"]);
    assert_eq!(found(&tracker, "candidates", 4), [""; 0]);
    for path in [1, 4] {
        assert_eq!(found(&tracker, "others", path), ["old", "old and good"]);
    }
    wait_for("the list in the order of reputation", || {
        let listed = tracker.get("/peers");
        let listed = listed["peers"].as_array()?.iter().map(|p| p["peer_id"].as_str());
        let order = ["much", "little", "none", "elsewhere", "old", "old and good"];
        listed.eq(order.map(Some)).then_some(())
    });

    let answer = c.get(&format!("/lookup/{}", hash_part(3))).unwrap();
    let elsewhere = r#"{"candidates":[{"peer_id":"elsewhere","addr":"10.0.0.1","port":1,"score":0.0}],"others":["#;
    assert!(answer.text().starts_with(elsewhere), "{}", answer.text());

    let mut leave = |peer: &str, key: Option<&Identity>| {
        let proof = key
            .map(|key| key.sign(&SignedText::Leave { peer_id: peer }, stamp()))
            .unwrap_or_default();
        let mut body = serde_json::to_value(proof).unwrap();
        body["peer_id"] = peer.into();
        c.request_with_body("DELETE", "/announce", "", body.to_string().as_bytes()).unwrap()
    };
    assert_answer(&leave("much", Some(&keys[2])), 200, r#"{"status":"ok"}"#);
    assert_answer(&leave("old", None), 200, r#"{"status":"ok"}"#);
    for gone in [leave("much", Some(&keys[2])), leave("old", None), leave("never", None)] {
        assert_eq!(assert_error(&gone, 404), "announce first");
    }
    assert_eq!(found(&tracker, "candidates", 2), ["little", "none"]);
    assert_eq!(found(&tracker, "others", 2), ["old and good"]);
    assert_eq!(tracker.get("/peers")["peers"].as_array().map(Vec::len), Some(4));
    // Only the address that announced an ID without a key can remove it.
    let mut other = tracker.connect();
    let answer = other
        .request_with_body("DELETE", "/announce", "", br#"{"peer_id":"old and good"}"#)
        .unwrap();
    assert_eq!(assert_error(&answer, 403), "peer_id: announced from another address");
    // A peer that announces itself again has no filter until it uploads one.
    post(&mut other, "/announce", &signed_announce(&keys[2], "much", 1, "10.0.0.1"));
    assert_eq!(found(&tracker, "candidates", 2), ["little", "none"]);
    assert_eq!(found(&tracker, "others", 2), ["much", "old and good"]);
}

#[test]
fn unknown_targets_and_methods_get_4xx() {
    let (_dir, tracker) = tracker();
    let mut c = tracker.connect();
    for (method, path, status) in [
        ("GET", "/", 404),
        ("GET", "/nix-cache-info", 404),
        ("GET", "/announce", 405),
        ("PUT", "/announce", 405),
        ("POST", "/peers", 405),
        ("DELETE", "/peers", 405),
        ("GET", "/report", 405),
        ("GET", "/transfer/init", 405),
        ("GET", "/filter/x", 405),
        ("GET", "/lookup/", 400),
        ("GET", "/lookup/x", 400),
        ("GET", "/lookup/EEEEEEEEEEEEEEEEEEEEEEEEEEEEEEEE", 400),
        ("GET", "/lookup/00000000000000000000000000000000/x", 400),
        ("GET", "/reputation/", 400),
        ("GET", "/reputation/%ff", 400),
        ("GET", "/reputation/%0a", 400),
        ("POST", "/reach/1", 405),
        ("GET", "/reach/", 400),
        ("GET", "/reach/0", 400),
        ("GET", "/reach/65536", 400),
        ("GET", "/reach/x", 400),
        // The tracker does not connect back to a loopback address.
        ("GET", "/reach/12304", 400),
    ] {
        let answer = c.ask(method, path, "").unwrap();
        assert_error(&answer, status);
        assert_eq!(answer.header("allow").is_some(), status == 405, "{method} {path}");
    }
    let long = tracker.connect().get(&format!("/reputation/{}", "x".repeat(1100))).unwrap();
    assert_eq!(assert_error(&long, 400), "target: too long");
    let id = "ein peer/é";
    transfer(&tracker, (id, &identity(42)), 7);
    let reputation = tracker.get("/reputation/ein%20peer%2F%C3%A9");
    assert_eq!(
        (reputation["peer_id"].as_str(), reputation["total_shared"].as_u64()),
        (Some(id), Some(7))
    );
}

/// Regressions: the answer revealed open ports of another machine at a shared address, one client
/// used up all attempts, and the tracker probed the ports of a proxy for its clients.
#[test]
fn reach_reports_peerix_at_client_address() {
    let lan = Lan::new();
    let tracker = Tracker::start(lan.host("tracker"));
    let (node, other) = (lan.host("node"), lan.host("other"));
    let at = (tracker.host.address, crate::common::tracker::PORT);
    let connect = || Connection::new(node.connect(at).unwrap()).unwrap();
    let target = format!("/reach/{PORT}");
    let ask = |fields: &str| connect().ask("GET", &target, fields).unwrap();
    let said = |reached: bool| {
        format!("{{\"addr\":\"{}\",\"port\":{PORT},\"reached\":{reached}}}", node.address)
    };

    assert_answer(&ask(""), 200, &said(false));
    let server = |body: &'static [u8]| {
        Server::start(node.listen(PORT), move |_| Reply::Whole(200, body.to_vec()))
    };
    let program = server(b"hello");
    assert_answer(&ask(""), 200, &said(false));
    drop(program);
    let peerix = server(b"StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 20\n");
    assert_answer(&ask(""), 200, &said(true));
    for field in [
        "X-Forwarded-For: 10.0.0.1",
        "Forwarded: for=10.0.0.1",
        "X-Real-IP: 10.0.0.1",
        "Via: 1.1 proxy",
    ] {
        assert!(assert_error(&ask(&format!("{field}\r\n")), 400).contains("proxy"), "{field}");
    }

    // No answer arrives: while the tracker waits, it blocks this address and no other one.
    node.net(&format!("iptables -A INPUT -p tcp --dport {PORT} -j DROP"));
    let mut both = [connect(), connect()];
    let request = format!("GET {target} HTTP/1.1\r\nHost: tracker\r\n\r\n");
    both.iter_mut().for_each(|connection| connection.send(request.as_bytes()).unwrap());
    let mut elsewhere = Connection::new(other.connect(at).unwrap()).unwrap();
    assert_eq!(elsewhere.ask("GET", &target, "").unwrap().status, 200);
    let mut answers = both.map(|mut connection| connection.answer(true).unwrap());
    answers.sort_by_key(|answer| answer.status);
    assert_answer(&answers[0], 200, &said(false));
    assert!(
        assert_error(&answers[1], 429).contains("one at a time")
            && answers[1].header("retry-after").is_some()
    );
    drop(peerix);
}

#[test]
fn invalid_filters_are_rejected() {
    let (_dir, tracker) = tracker();
    let key = identity(20);
    let good = filter([1]);
    let put = |headers: &str, peer_id: &str, body: &[u8]| {
        tracker
            .connect()
            .request_with_body("PUT", &format!("/filter/{peer_id}"), headers, body)
            .unwrap()
    };
    let signed = |peer_id: &str, body: &[u8]| {
        put(&signed_filter_headers(&key, peer_id, body), peer_id, body)
    };
    assert_eq!(assert_error(&signed("f", good.as_bytes()), 404), "announce first");
    post(
        &mut tracker.connect(),
        "/announce",
        &announce("unbound", 1, "10.0.0.1", Proof::default()),
    );
    assert_eq!(assert_error(&signed("unbound", good.as_bytes()), 404), "announce first");
    assert_eq!(
        assert_error(&put("", "f", good.as_bytes()), 403),
        "public_key, timestamp and signature: missing or malformed"
    );

    post(&mut tracker.connect(), "/announce", &signed_announce(&key, "f", 1, "10.0.0.1"));
    for size in [0, 1, 1023, 1025, 1200, 100_000] {
        let answer = signed("f", &vec![0; size]);
        assert_eq!(
            assert_error(&answer, 400),
            "body: of a size that filters do not have",
            "{size}"
        );
    }
    // The signature is for other bits.
    let headers = signed_filter_headers(&key, "f", good.as_bytes());
    assert_eq!(assert_error(&put(&headers, "f", filter([2]).as_bytes()), 403), "signature: wrong");
    assert_eq!(found(&tracker, "candidates", 1), [""; 0]);
    assert_answer(&signed("f", good.as_bytes()), 200, r#"{"status":"ok"}"#);
    assert_eq!(found(&tracker, "candidates", 1), ["f"]);
    let soon = signed("f", filter([2]).as_bytes());
    assert_eq!(assert_error(&soon, 429), "too soon after the last one");
    let wait: u64 = soon.header("retry-after").unwrap().parse().unwrap();
    assert!((1..=25).contains(&wait), "{wait}");
    assert_eq!(
        (found(&tracker, "candidates", 1), found(&tracker, "candidates", 2)),
        (vec!["f".to_owned()], vec![])
    );
    // A filter with all bits set would make its peer a candidate for every path.
    let full = identity(22);
    post(&mut tracker.connect(), "/announce", &signed_announce(&full, "full", 1, "10.0.0.1"));
    let answer = put(&signed_filter_headers(&full, "full", &[0xff; 1024]), "full", &[0xff; 1024]);
    assert_eq!(
        assert_error(&answer, 400),
        "body: more bits are set than a filter of its size may have"
    );
    // The largest filter size.
    let large = identity(21);
    let mut most = BloomFilter::for_paths(u64::MAX);
    most.insert(&hash_part(2));
    let bits = most.as_bytes().to_vec();
    post(&mut tracker.connect(), "/announce", &signed_announce(&large, "large", 1, "10.0.0.1"));
    assert_answer(
        &put(&signed_filter_headers(&large, "large", &bits), "large", &bits),
        200,
        r#"{"status":"ok"}"#,
    );
    assert_eq!(found(&tracker, "candidates", 2), ["large"]);
    // The answer to the next announce tells which filter the tracker has.
    let proof =
        key.sign(&SignedText::Announce { peer_id: "f", port: 1, addr: "10.0.0.1" }, stamp());
    let answer = post(&mut tracker.connect(), "/announce", &announce("f", 1, "10.0.0.1", proof));
    assert!(
        serde_json::from_slice::<Value>(&answer.body).unwrap()["filter"].is_u64(),
        "{}",
        answer.text()
    );
}

/// Bodies that are too large, or never arrive.
#[test]
fn oversized_or_missing_bodies_do_not_block_others() {
    let (_dir, tracker) = tracker();
    let five = vec![b' '; 5 << 20];
    for (method, path) in [
        ("POST", "/announce"),
        ("POST", "/transfer/init"),
        ("POST", "/report"),
        ("DELETE", "/announce"),
    ] {
        let mut c = tracker.connect();
        // The tracker may close the connection before the whole body is sent.
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n\r\n",
            five.len()
        );
        c.send(head.as_bytes()).unwrap();
        let _ = c.send(&five);
        assert_eq!(assert_error(&c.answer(true).unwrap(), 413), "body: too large");
    }
    let key = identity(30);
    post(&mut tracker.connect(), "/announce", &signed_announce(&key, "p", 1, "10.0.0.1"));
    let headers = signed_filter_headers(&key, "p", &five);
    let mut c = tracker.connect();
    let head = format!(
        "PUT /filter/p HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n{headers}\r\n",
        five.len()
    );
    c.send(head.as_bytes()).unwrap();
    let _ = c.send(&five);
    assert_error(&c.answer(true).unwrap(), 413);

    // Twenty announced filters that never arrive occupy at most eight places, for a limited time.
    let bits = vec![0; 1 << 20];
    let mut waiting: Vec<Connection> = (0..20)
        .map(|_| {
            let digest = signed_filter_headers(&key, "p", &bits);
            let head = format!(
                "PUT /filter/p HTTP/1.1\r\nHost: t\r\nContent-Length: {}\r\n{digest}\r\n",
                bits.len()
            );
            let mut c = tracker.connect();
            c.send(head.as_bytes()).unwrap();
            c
        })
        .collect();
    // Meanwhile the tracker serves other clients.
    assert_eq!(
        post(&mut tracker.connect(), "/announce", &announce("q", 1, "10.0.0.1", Proof::default()))
            .status,
        200
    );
    let answers: Vec<Option<Answer>> = waiting.iter_mut().map(|c| c.answer(true).ok()).collect();
    let refused = answers.iter().flatten().filter(|answer| answer.status == 503).count();
    assert_eq!(refused, 12, "{answers:?}");
    for answer in answers.iter().flatten().filter(|answer| answer.status == 503) {
        assert_eq!(
            (assert_error(answer, 503).as_str(), answer.header("retry-after")),
            ("too many filters at once", Some("2"))
        );
    }
    // All places are free again.
    let bits = filter([1]);
    let headers = signed_filter_headers(&key, "p", bits.as_bytes());
    assert_answer(
        &tracker
            .connect()
            .request_with_body("PUT", "/filter/p", &headers, bits.as_bytes())
            .unwrap(),
        200,
        r#"{"status":"ok"}"#,
    );
}

#[test]
fn requests_above_rate_limit_get_429() {
    let (_dir, tracker) = tracker();
    let greedy = fresh_source();
    let mut c = tracker.connect_from(greedy).unwrap();
    let body = announce("p", 1, "10.0.0.1", Proof::default());
    // A burst of 200, and ten per second.
    let answers: Vec<Answer> = (0..2000).map(|_| post(&mut c, "/announce", &body)).collect();
    let refused: Vec<&Answer> = answers.iter().filter(|answer| answer.status == 429).collect();
    assert!(answers[..200].iter().all(|answer| answer.status == 200));
    assert!(!refused.is_empty());
    for answer in &refused {
        assert_eq!(
            (assert_error(answer, 429).as_str(), answer.header("retry-after")),
            ("too many requests", Some("1"))
        );
    }
    // The limit covers new connections of the address, but no other kind of request and no other
    // address.
    let more = (0..2000)
        .map(|_| post(&mut tracker.connect_from(greedy).unwrap(), "/announce", &body).status);
    assert!(more.into_iter().any(|status| status == 429));
    assert_eq!(c.get(&format!("/lookup/{}", hash_part(1))).unwrap().status, 200);
    assert_eq!(post(&mut tracker.connect(), "/announce", &body).status, 200);
    let metrics = tracker.connect().get("/metrics").unwrap().text();
    let counted = metrics
        .lines()
        .find_map(|line| line.strip_prefix("peerix_tracker_rate_limited_total "))
        .unwrap();
    assert!(counted.parse::<usize>().unwrap() >= refused.len());
}

/// Regression: the tracker took a proxy's address for the address of every node behind it.
#[test]
fn address_behind_known_proxy_is_the_forwarded_one() {
    let dir = TempDir::new();
    let plain = LoopbackTracker::start(&dir.file("plain"));
    let known =
        LoopbackTracker::flagged(&dir.file("known"), Scale::default(), &["--proxy", "127.0.0.1"]);
    let announce = |tracker: &LoopbackTracker, from: Ipv4Addr, forwarded: &str| {
        let mut c = tracker.connect_from(from).unwrap();
        let headers = format!("Content-Type: application/json\r\nX-Forwarded-For: {forwarded}\r\n");
        c.request_with_body("POST", "/announce", &headers, br#"{"peer_id":"a","port":1}"#).unwrap()
    };
    let (proxy, stranger) = (Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2));
    let refused = assert_error(&announce(&plain, proxy, "192.0.2.7"), 400);
    assert!(refused.contains("--announce-addr") && refused.contains("--proxy"), "{refused}");
    assert_answer(&announce(&known, proxy, "198.51.100.1, 192.0.2.7"), 200, r#"{"status":"ok"}"#);
    assert_eq!(
        known.get("/peers")["peers"][0]["addr"],
        "192.0.2.7",
        "the last one, which the proxy itself has seen"
    );
    // A proxy may append a second field after the client's, or forward an invalid address.
    assert_answer(
        &announce(&known, proxy, "192.0.2.9\r\nX-Forwarded-For: 192.0.2.7"),
        200,
        r#"{"status":"ok"}"#,
    );
    assert_eq!(known.get("/peers")["peers"][0]["addr"], "192.0.2.7");
    assert!(assert_error(&announce(&known, proxy, "192.0.2.9, unknown"), 400).contains("proxy"));
    // Fields from other clients than the proxy are refused.
    assert!(assert_error(&announce(&known, stranger, "192.0.2.8"), 400).contains("proxy"));
    assert_eq!(known.get("/peers")["peers"][0]["addr"], "192.0.2.7");
}
