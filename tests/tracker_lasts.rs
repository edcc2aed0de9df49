//! What a tracker keeps when it is killed, restarted or replaces an original tracker, and its
//! limits with very many peers.

use crate::common::http::{Answer, Connection};
use crate::common::solo::{
    LoopbackTracker, TempDir, announce, clock, command, connect, fresh_network, fresh_source,
    identity, post, signed_announce, signed_filter_headers, signed_report,
};
use crate::common::{Scale, thread, wait_for};
use peerix::wire::tracker::{Proof, SignedText};
use rusqlite::Connection as Database;
use scopeguard::guard;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::TcpListener;
use std::path::Path;
use std::process::Output;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

const KILLS: u64 = 20;
const THREADS: u64 = 4;

/// Base numbers of the keys of senders and receivers.
const SENDERS: u64 = 1 << 40;
const RECEIVERS: u64 = 1 << 41;

/// Requests that the tracker acknowledged with 200, and requests it was sent.
#[derive(Default)]
struct Acknowledged {
    /// Numbers of keys and of the IDs bound to them.
    identities: Vec<u64>,
    transfers: Vec<u64>,
    /// Senders by transfer, for transfers of which only the sender's report was acknowledged.
    half: HashMap<u64, String>,
    /// Number of transfers by sender that the tracker reported as resolved.
    resolved: HashMap<String, u64>,
    /// Number of transfers by sender that may be resolved, including unacknowledged ones.
    tried: HashMap<String, u64>,
}

fn value(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).expect("JSON")
}

/// Sends requests like a node that transfers very many paths. Errors: the connection failed,
/// because the tracker was killed.
fn load(
    port: u16,
    thread: u64,
    next: &AtomicU64,
    heard: &Mutex<Acknowledged>,
) -> std::io::Result<()> {
    let mut c = connect(port, fresh_source())?;
    let json = "Content-Type: application/json\r\n";
    let (sender, receiver) = (format!("sender-{thread}"), format!("receiver-{thread}"));
    let (sender_key, receiver_key) = (identity(SENDERS + thread), identity(RECEIVERS + thread));
    let mut at_sender = connect(port, fresh_network())?;
    for (c, key, peer) in
        [(&mut at_sender, &sender_key, &sender), (&mut c, &receiver_key, &receiver)]
    {
        let answer = c.request_with_body(
            "POST",
            "/announce",
            json,
            &signed_announce(key, peer, 1, "10.0.0.1"),
        )?;
        assert_eq!(answer.status, 200, "{}", answer.text());
    }
    // The tracker accepts a burst of 200 announces from one address.
    for _ in 0..180 {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let body = signed_announce(&identity(number), &format!("peer-{number}"), 1, "10.0.0.1");
        let answer = c.request_with_body("POST", "/announce", json, &body)?;
        assert_eq!(answer.status, 200, "{}", answer.text());
        heard.lock().unwrap().identities.push(number);

        let body = json!({"sender_id": sender, "receiver_id": receiver}).to_string();
        let answer = c.request_with_body("POST", "/transfer/init", json, body.as_bytes())?;
        assert_eq!(answer.status, 200, "{}", answer.text());
        let id = value(&answer)["transfer_id"].as_u64().unwrap();
        heard.lock().unwrap().transfers.push(id);

        let answer = at_sender.request_with_body(
            "POST",
            "/report",
            json,
            &signed_report(&sender_key, id, &sender, "sender", 100),
        )?;
        assert_eq!((answer.status, answer.text().as_str()), (200, r#"{"status":"pending"}"#));
        {
            let mut heard = heard.lock().unwrap();
            *heard.tried.entry(sender.clone()).or_default() += 1;
            heard.half.insert(id, sender.clone());
        }
        let answer = c.request_with_body(
            "POST",
            "/report",
            json,
            &signed_report(&receiver_key, id, &receiver, "receiver", 100),
        )?;
        assert_eq!(
            (answer.status, answer.text().as_str()),
            (200, r#"{"status":"resolved","consistent":true}"#)
        );
        let mut heard = heard.lock().unwrap();
        heard.half.remove(&id);
        *heard.resolved.entry(sender.clone()).or_default() += 1;
    }
    Ok(())
}

#[test]
fn tracker_killed_under_load_keeps_everything_acknowledged() {
    let dir = TempDir::new();
    let db = dir.file("db");
    let (next, all) = (AtomicU64::new(1), Mutex::new(Acknowledged::default()));
    for round in 0..KILLS {
        let mut tracker = LoopbackTracker::start(&db);
        let (identities, transfers) = {
            let heard = all.lock().unwrap();
            (heard.identities.len(), heard.transfers.len())
        };
        let dead = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (port, next, all, dead) = (tracker.port, &next, &all, &dead);
                thread::spawn_in(scope, "load", move || {
                    while !dead.load(Ordering::Relaxed) && load(port, thread, next, all).is_ok() {}
                });
            }
            // Ends the threads even if the expected requests never arrive; otherwise the test would
            // hang.
            let is_dead = guard((), |()| dead.store(true, Ordering::Relaxed));
            // A different moment in each round, always under load.
            let enough = transfers + 20 + 7 * round as usize;
            wait_for("enough transfers", || {
                (all.lock().unwrap().transfers.len() >= enough).then_some(())
            });
            drop(is_dead);
            tracker.kill();
        });
        let tracker = LoopbackTracker::start(&db);
        let mut heard = all.lock().unwrap();
        // Checks everything new since the last kill, and a sample of everything older.
        let old = heard.identities[..identities].iter().rev().step_by(50);
        for number in heard.identities[identities..].iter().take(60).chain(old) {
            let id = format!("peer-{number}");
            let mut c = tracker.connect();
            let stolen = post(
                &mut c,
                "/announce",
                &signed_announce(&identity(number + (1 << 32)), &id, 1, "10.0.0.1"),
            );
            assert_eq!(stolen.status, 403, "{id} was bound to a key: {}", stolen.text());
            let own =
                post(&mut c, "/announce", &signed_announce(&identity(*number), &id, 1, "10.0.0.1"));
            assert_eq!(own.status, 200, "{id}: {}", own.text());
        }
        let mut c = tracker.connect();
        let old = heard.transfers[..transfers].iter().rev().step_by(50);
        for id in heard.transfers[transfers..].iter().chain(old) {
            let body =
                json!({"transfer_id": id, "peer_id": "nobody", "role": "sender", "bytes": 1})
                    .to_string();
            let answer = post(&mut c, "/report", body.as_bytes());
            assert!([403, 409].contains(&answer.status), "transfer {id}: {}", answer.text());
        }
        for (id, sender) in heard.half.drain() {
            let thread: u64 = sender.trim_start_matches("sender-").parse().unwrap();
            let body = signed_report(&identity(SENDERS + thread), id, &sender, "sender", 100);
            let answer = post(&mut c, "/report", &body);
            assert_eq!(
                answer.status,
                409,
                "transfer {id}: the sender's report was acknowledged: {}",
                answer.text()
            );
        }
        for (sender, tried) in &heard.tried {
            let reputation = tracker.get(&format!("/reputation/{sender}"));
            let counted = reputation["successful_transfers"].as_u64().unwrap();
            let resolved = heard.resolved.get(sender).copied().unwrap_or_default();
            assert!(
                (resolved..=*tried).contains(&counted),
                "{sender}: {resolved} of {tried}, and {counted} counted"
            );
            assert_eq!(reputation["total_shared"].as_u64(), Some(counted * 100));
            assert_eq!(reputation["failed_transfers"].as_u64(), Some(0));
        }
    }
}

/// Regression: after a restart, every lookup was a miss for a minute, until the nodes announced
/// themselves again.
#[test]
fn peers_filters_and_reputation_survive_restart() {
    let dir = TempDir::new();
    let mut tracker = LoopbackTracker::start(&dir.file("db"));
    let keys = [identity(1), identity(2)];
    // From the clock itself: the shared stamp of other statements runs ahead of it when parallel
    // tests sign many.
    let now = clock();
    let at = |stamp| {
        let proof =
            keys[0].sign(&SignedText::Announce { peer_id: "a", port: 1, addr: "10.0.0.1" }, stamp);
        announce("a", 1, "10.0.0.1", proof)
    };
    let [mut c, mut other] =
        [fresh_network(), fresh_network()].map(|from| tracker.connect_from(from).unwrap());
    let welcome = value(&post(&mut c, "/announce", &at(now)));
    let replay = at(now + 1);
    post(&mut other, "/announce", &signed_announce(&keys[1], "b", 2, "10.0.0.2"));
    post(&mut other, "/announce", &signed_announce(&keys[1], "b", 3, "10.0.0.2"));
    post(
        &mut tracker.connect(),
        "/announce",
        &announce("unsigned", 4, "10.0.0.3", Proof::default()),
    );
    let hash_part = peerix::nix::HashPart::parse(&[b'7'; 32]).unwrap();
    let mut filter = peerix::wire::filter::BloomFilter::for_paths(10);
    filter.insert(&hash_part);
    let headers = signed_filter_headers(&keys[1], "b", filter.as_bytes());
    assert_eq!(
        other.request_with_body("PUT", "/filter/b", &headers, filter.as_bytes()).unwrap().status,
        200
    );
    post(&mut c, "/transfer/init", br#"{"sender_id":"b","receiver_id":"a"}"#);
    assert_eq!(
        post(&mut other, "/report", &signed_report(&keys[1], 1, "b", "sender", 1000)).status,
        200
    );
    assert_eq!(
        post(&mut c, "/report", &signed_report(&keys[0], 1, "a", "receiver", 1000)).status,
        200
    );
    let reputation = tracker.get("/reputation/b");
    assert_eq!(reputation["total_shared"].as_u64(), Some(1000));
    let found = tracker.get(&format!("/lookup/{hash_part}"));
    assert_eq!(found["candidates"][0]["port"], 3);
    // Addresses by peer ID: the order of the list need not survive a restart.
    let here = |tracker: &LoopbackTracker| {
        let list = tracker.get("/peers");
        let row = |peer: &Value| {
            (peer["peer_id"].to_string(), peer["addr"].to_string(), peer["port"].to_string())
        };
        let mut rows: Vec<_> = list["peers"].as_array().unwrap().iter().map(row).collect();
        rows.sort();
        rows
    };
    let before = here(&tracker);
    assert_eq!(before.len(), 3);
    assert!(tracker.terminate().success());
    assert!(tracker.log().ends_with("info: stopping\n"));
    // The tracker closed the database: SQLite keeps this file until then.
    assert!(!dir.file("db-wal").exists());
    drop(tracker);

    for is_killed in [false, true] {
        let mut tracker = LoopbackTracker::start(&dir.file("db"));
        assert_eq!(here(&tracker), before);
        assert_eq!(tracker.get(&format!("/lookup/{hash_part}"))["candidates"], found["candidates"]);
        assert_eq!(tracker.get("/reputation/b"), reputation);
        let mut c = tracker.connect();
        let unsigned = post(&mut c, "/announce", &announce("a", 1, "10.0.0.1", Proof::default()));
        assert_eq!(unsigned.status, 403, "its key lasts: {}", unsigned.text());
        let answer = post(&mut c, "/announce", &replay);
        assert_eq!(answer.status, 403, "made before the start: {}", answer.text());
        assert!(value(&answer)["now"].is_u64());
        let again =
            value(&post(&mut c, "/announce", &signed_announce(&keys[0], "a", 1, "10.0.0.1")));
        assert_eq!((&again["tracker"], again["filter"].is_null()), (&welcome["tracker"], true));
        let again =
            value(&post(&mut c, "/announce", &signed_announce(&keys[1], "b", 3, "10.0.0.2")));
        assert!(again["filter"].is_u64(), "its filter need not be sent again: {again}");
        match is_killed {
            false => tracker.kill(),
            true => drop(tracker),
        }
    }
}

#[test]
fn database_of_original_tracker_is_migrated() {
    let dir = TempDir::new();
    let db = dir.file("db");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
    let original = Database::open(&db).unwrap();
    original
        .execute_batch(&format!(
            "pragma journal_mode = wal;
             create table peers (peer_id text primary key, addr text not null, port integer not null, last_seen real not null);
             create table transfers (id integer primary key autoincrement, sender_id text not null,
                 receiver_id text not null, sender_bytes integer, receiver_bytes integer,
                 sender_confirmed integer default 0, receiver_confirmed integer default 0, resolved integer default 0,
                 created_at real not null);
             create table reputation (peer_id text primary key, total_shared integer default 0,
                 total_received integer default 0, successful_transfers integer default 0,
                 failed_transfers integer default 0);
             insert into peers values ('old', '10.0.0.1', 12304, {now});
             insert into transfers (id, sender_id, receiver_id, receiver_bytes, receiver_confirmed, created_at)
                 values (41, 'old', 'other', 500, 1, {now});
             insert into reputation values ('old', 1000, 50, 3, 1);
             -- It checked neither kinds nor signs of what strangers sent.
             insert into peers values (x'00', 'x', 'y', 'z');
             insert into transfers (id, sender_id, receiver_id, receiver_bytes, receiver_confirmed, created_at)
                 values (42, 'old', 'other', 'lots', 1, {now}), (43, 'old', 'other', -7, 1, {now});
             insert into reputation values ('bad', -5, 'many', 1e308, null), (x'ff00', 1, 1, 1, 1);"
        ))
        .unwrap();
    drop(original);
    let tracker = LoopbackTracker::start(&db);
    let body =
        json!({"transfer_id": 41, "peer_id": "old", "role": "sender", "bytes": 501}).to_string();
    let answer = post(&mut tracker.connect(), "/report", body.as_bytes());
    assert_eq!(
        (answer.status, answer.text().as_str()),
        (200, r#"{"status":"resolved","consistent":true}"#)
    );
    let reputation = tracker.get("/reputation/old");
    assert_eq!(
        (reputation["total_shared"].as_u64(), reputation["successful_transfers"].as_u64()),
        (Some(1000), Some(3)),
        "what nobody signed counts for nobody"
    );
    let begun =
        post(&mut tracker.connect(), "/transfer/init", br#"{"sender_id":"a","receiver_id":"b"}"#);
    assert_eq!(begun.text(), r#"{"transfer_id":44}"#);
    for id in [42, 43] {
        let body =
            json!({"transfer_id": id, "peer_id": "old", "role": "sender", "bytes": 1}).to_string();
        assert_eq!(post(&mut tracker.connect(), "/report", body.as_bytes()).status, 404);
    }
    let bad = tracker.get("/reputation/bad");
    assert_eq!((bad["total_shared"].as_u64(), bad["total_received"].as_u64()), (Some(0), Some(0)));
    assert_eq!(
        (bad["successful_transfers"].as_u64(), bad["failed_transfers"].as_u64()),
        (Some(0), Some(0))
    );
    assert_eq!(tracker.get("/peers"), json!({"peers": []}));
}

/// Runs the tracker with arguments or a database with which it cannot start.
fn fails(args: &[&str], db: &Path) -> Output {
    command(args).arg("--db-path").arg(db).env("RUST_LOG", "off").output().unwrap()
}

#[test]
fn startup_failure_is_one_line_on_stderr() {
    let dir = TempDir::new();
    let db = dir.file("newer");
    Database::open(&db)
        .unwrap()
        .execute_batch("pragma user_version = 99; create table t (x);")
        .unwrap();
    std::fs::write(
        dir.file("none"),
        "this is no database, and long enough to look like one ".repeat(100),
    )
    .unwrap();
    std::fs::create_dir(dir.file("directory")).unwrap();
    let other = LoopbackTracker::start(&dir.file("other"));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (output, status, words) in [
        (fails(&["--port", "0"], &db), 1, vec!["newer", "99"]),
        (fails(&["--port", "0"], &dir.file("none")), 1, vec!["none"]),
        (fails(&["--port", "0"], &dir.file("missing/db")), 1, vec!["missing/db"]),
        (fails(&["--port", "0"], &dir.file("directory")), 1, vec!["directory", "--db-path"]),
        (fails(&["--port", "0"], &dir.file("other")), 1, vec!["another tracker has it"]),
        (
            fails(&["--host", "127.0.0.1", "--port", &port], &dir.file("db")),
            1,
            vec![&port, "--port"],
        ),
        (command(&["--prot", "1"]).output().unwrap(), 2, vec!["--prot"]),
        (command(&["--port", "x"]).output().unwrap(), 2, vec!["--port x"]),
        (command(&["word"]).output().unwrap(), 2, vec!["word"]),
    ] {
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{said}");
        assert!(said.starts_with("peerix-tracker: ") && said.lines().count() == 1, "{said:?}");
        assert!(words.iter().all(|word| said.contains(word)), "{words:?} in {said:?}");
    }
    assert_eq!(other.get("/health"), json!({"status": "ok"}));
    let newer: i64 = Database::open(&db)
        .unwrap()
        .pragma_query_value(None, "user_version", |row| row.get(0))
        .unwrap();
    assert_eq!(newer, 99, "left as it was");
    let help = String::from_utf8(command(&["--help"]).output().unwrap().stdout).unwrap();
    for word in ["--port", "12305", "--host", "--db-path", "--verbose"] {
        assert!(help.contains(word), "no {word} in\n{help}");
    }
    let version = command(&["--version"]).output().unwrap().stdout;
    assert_eq!(
        String::from_utf8(version).unwrap(),
        format!("peerix-tracker {}\n", env!("CARGO_PKG_VERSION"))
    );
}

/// The value of a metric without labels.
fn metric(tracker: &LoopbackTracker, name: &str) -> f64 {
    let text = tracker.connect().get("/metrics").unwrap().text();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in\n{text}")).parse().unwrap()
}

/// Checks the form like `promtool check metrics`: help and type before values, conventional names
/// and suffixes.
#[test]
fn metrics_have_prometheus_text_form() {
    let dir = TempDir::new();
    let tracker = LoopbackTracker::start(&dir.file("db"));
    let health = tracker.connect().get("/health").unwrap();
    assert_eq!((health.status, health.text().as_str()), (200, r#"{"status":"ok"}"#));
    post(&mut tracker.connect(), "/announce", &announce("a", 1, "10.0.0.1", Proof::default()));
    assert_eq!(metric(&tracker, "peerix_tracker_peers"), 1.0);
    let text = tracker.connect().get("/metrics").unwrap().text();
    let mut kinds = HashMap::new();
    let mut values = 0;
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(kinds.insert(name, kind).is_none(), "{name} twice");
            assert!(kind != "counter" || name.ends_with("_total"), "{line}");
            continue;
        } else if let Some(help) = line.strip_prefix("# HELP ") {
            assert!(help.starts_with("peerix_tracker_") && help.split(' ').count() > 2, "{line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let base = ["_sum", "_count"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(name);
        assert!(kinds.contains_key(name) || kinds.contains_key(base), "{line}");
        assert!(series.split_once('{').is_none_or(|(_, labels)| labels.ends_with('}')), "{line}");
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
        values += 1;
    }
    assert!(values > 10 && text.ends_with('\n'), "{text}");
}

#[test]
fn hundred_thousand_peers_take_under_2_kib_each() {
    const PEERS: u64 = 100_000;
    /// The tracker accepts a burst of 200 announces from one address.
    const FROM_ONE: u64 = 190;
    let dir = TempDir::new();
    let tracker = LoopbackTracker::start_with(&dir.file("db"), Scale::without_timeouts());
    let next = AtomicU64::new(0);
    let number = |at: &AtomicU64| at.fetch_add(1, Ordering::Relaxed);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            thread::spawn_in(scope, "announcing", || {
                let mut c: Option<(Connection, u64)> = None;
                loop {
                    let n = number(&next);
                    if n >= PEERS {
                        return;
                    }
                    let (mut connection, asked) =
                        c.take().unwrap_or_else(|| (tracker.connect(), 0));
                    let addr = std::net::Ipv4Addr::from_bits(0x0a00_0001 + n as u32).to_string();
                    let body = announce(&format!("peer-{n}"), 12304, &addr, Proof::default());
                    let answer = post(&mut connection, "/announce", &body);
                    assert_eq!(
                        (answer.status, answer.text().as_str()),
                        (200, r#"{"status":"ok"}"#)
                    );
                    c = (asked + 1 < FROM_ONE).then_some((connection, asked + 1));
                }
            });
        }
    });
    assert_eq!(metric(&tracker, "peerix_tracker_peers"), PEERS as f64);
    assert_eq!(tracker.get("/peers")["peers"].as_array().map(Vec::len), Some(1000));
    let found = tracker.get("/lookup/00000000000000000000000000000001");
    assert_eq!(
        (found["candidates"].as_array().map(Vec::len), found["others"].as_array().map(Vec::len)),
        (Some(0), Some(8))
    );
    let bytes = tracker.rss() / PEERS;
    assert!(bytes < 2048, "{bytes} bytes for each peer without a filter");
}
