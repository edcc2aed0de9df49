//! The original peerix (the Python program) and this one on one LAN, in both directions.
//!
//! The stand-in behaves like the original: it answers a query only when it has the path, ignores
//! all other packets, and serves HTTP as [`standin::original`](crate::common::standin) documents.
//! `data/original-query` and `data/original-have` are the original's datagrams with request ID 1,
//! for the content-addressed file that [`golden`] adds.

use crate::common::http::{self, Reply};
use crate::common::lan::Run;
use crate::common::packet::Packet;
use crate::common::standin::{BROADCAST, StandIn, StaticCache, field, receive};
use crate::common::{Asker, Holder, Host, Lan, PORT, World, nix, tree, wait_for, world};
use std::collections::HashMap;
use std::fs;
use std::time::Duration;

const SECOND: Duration = Duration::from_secs(1);

const QUERY: &[u8] = include_bytes!("data/original-query");
const HAVE: &[u8] = include_bytes!("data/original-have");

/// Adds the path of the recorded datagrams to a store.
fn golden(host: &Host) -> String {
    host.write("/tmp/golden", "golden\n");
    let path = host.cmd("nix-store").args(["--add", "/tmp/golden"]).okay().trim().to_owned();
    assert_eq!(world::hash_part(&path).as_bytes(), &QUERY[5..]);
    path
}

#[test]
fn closure_is_fetched_from_original_peerix() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let peer = lan.host("original");
    let original = StandIn::original(&peer, &world);
    let asker = Asker::with(&lan, "", &[&world.cache_key]);
    let probe = format!("/{}.narinfo", world::hash_part(world.path("little")));
    wait_for("the original is heard", || {
        (http::get_local(&asker.host, &probe).unwrap().status == 200).then_some(())
    });
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);
    asker.fetch_and_check(&world, world.path("large"));
    asker.fetch_and_check(&world, world.path("odd"));

    // The original does not answer queries for paths that it lacks: a miss.
    let missing = http::get_local(&asker.host, &format!("/{}.narinfo", "0".repeat(32))).unwrap();
    assert_eq!(missing.status, 404);

    // The daemon sends queries that equal the original's byte by byte, and packets that the
    // original ignores.
    let little = world::hash_part(world.path("little"));
    let heard = original.heard.lock().unwrap();
    let mut queries = 0;
    for (_, datagram) in heard.iter() {
        match Packet::read(datagram) {
            Some(Packet::Query { id, hash_part }) if hash_part == little => {
                let expected = [&QUERY[..1], &id.to_be_bytes(), little.as_bytes()].concat();
                assert_eq!(datagram, &expected);
                queries += 1;
            }
            Some(_) => {}
            None => panic!("a datagram of no known kind: {datagram:?}"),
        }
    }
    assert!(queries > 0);
}

#[test]
fn recorded_have_datagram_is_understood() {
    let lan = Lan::new();
    let asker = Asker::with(&lan, "", &[]);
    let host = lan.host("original");
    let narinfo = format!("/local/{}.narinfo", std::str::from_utf8(&QUERY[5..]).unwrap());
    let peer = StandIn::start(
        &host,
        |datagram| {
            // The recorded answer, with the ID of the query.
            (datagram[0] == 0 && datagram[5..] == QUERY[5..])
                .then(|| [&HAVE[..1], &datagram[1..5], &HAVE[5..]].concat())
        },
        |_| Reply::Whole(404, vec![]),
    );
    wait_for("the narinfo is asked for where the golden answer says", || {
        let route = format!("/{}", narinfo.trim_start_matches("/local/"));
        assert_eq!(http::get_local(&asker.host, &route).unwrap().status, 404);
        peer.was_asked(&narinfo).then_some(())
    });
}

/// Parses a narinfo like the original: lines with a colon, the last value of a key wins, all
/// signatures are collected.
fn read_as_original(text: &str) -> (HashMap<String, String>, Vec<String>) {
    let mut fields = HashMap::new();
    let mut signatures = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else { continue };
        match key.trim() {
            "Sig" => signatures.push(value.trim().to_owned()),
            key => {
                fields.insert(key.to_owned(), value.trim().to_owned());
            }
        }
    }
    (fields, signatures)
}

#[test]
fn original_peerix_fetches_from_daemon() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let golden = golden(&holder.host);
    let original = lan.host("original");
    let socket = original.udp(PORT);

    // Any datagram may be lost, so each query is repeated until it is answered.
    let ask = |query: &[u8], is_answer: &dyn Fn(&[u8]) -> bool| {
        wait_for("an answer", || {
            socket.send_to(query, (BROADCAST, PORT)).unwrap();
            let mut heard = std::iter::from_fn(|| receive(&socket, SECOND));
            heard.find(|(from, datagram)| from.ip() == holder.host.address && is_answer(datagram))
        })
    };
    // The first datagram that the original would take for an answer is the recorded one.
    let (from, answer) = ask(QUERY, &|datagram| matches!(datagram[0], 0 | 1));
    assert_eq!(answer, HAVE);

    let fetch = |id: u32, path: &str| {
        let query = Packet::Query { id, hash_part: world::hash_part(path).to_owned() }.write();
        let is_answer = |datagram: &[u8]| matches!(Packet::read(datagram), Some(Packet::Have { id: of, .. }) if of == id);
        let (_, answer) = ask(&query, &is_answer);
        let Some(Packet::Have { port, path: route, .. }) = Packet::read(&answer) else {
            unreachable!("an answer")
        };
        let server = (from.ip(), u16::try_from(port).unwrap());
        let answer = http::get(&original, server, &format!("/{route}")).unwrap();
        assert_eq!(answer.status, 200);
        let (fields, signatures) = read_as_original(&answer.text());
        assert_eq!(fields["StorePath"], path);
        assert_eq!(fields["Compression"], "none");
        // The original resolves the URL against the root of the server.
        let nar = http::get(&original, server, &format!("/{}", fields["URL"])).unwrap();
        assert_eq!((nar.status, nar.whole), (200, true));
        assert_eq!(fields["NarSize"], nar.body.len().to_string());
        assert_eq!(fields["NarHash"], nix::hash(&original, &nar.body));
        (fields, signatures, nar.body)
    };
    fetch(2, &golden);
    for (id, name) in [(3, "large"), (4, "odd"), (5, "closure300")] {
        let path = world.path(name);
        let (fields, signatures, nar) = fetch(id, path);
        let lines = StaticCache::of(&world).narinfo(world::hash_part(path)).unwrap();
        assert_eq!(fields["References"], field(&lines, "References"));
        assert_eq!(signatures, [field(&lines, "Sig")]);
        // The NAR unpacks to the path.
        original.write("/tmp/nar", nar);
        original.sh(&format!("nix-store --restore /tmp/{name} < /tmp/nar"));
        tree::assert_same(
            &world.store().join(world::base_name(path)),
            &original.path(&format!("/tmp/{name}")),
        );
    }

    // For a path that the daemon lacks, it sends no answer that the original would act upon.
    let query = Packet::Query { id: 9, hash_part: "0".repeat(32) }.write();
    socket.send_to(&query, (BROADCAST, PORT)).unwrap();
    ask(QUERY, &|datagram| {
        assert!(
            datagram[0] != 1 || datagram[1..5] != 9_u32.to_be_bytes(),
            "have, for what is not there"
        );
        datagram == HAVE
    });
}

#[test]
fn closure_is_fetched_beside_original_peerix() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let old = lan.host("original");
    let _original = StandIn::original(&old, &world);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    assert_eq!(asker.fetch_and_check(&world, world.path("closure300")).len(), 300);
    assert!(fs::exists(asker.host.path(world.path("closure300"))).unwrap());
}
