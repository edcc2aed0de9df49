//! The status page in a real Chromium beside real traffic, `/metrics` and `/health`, and which
//! clients may not read them.

use crate::common::daemon::status;
use crate::common::http::{self, Connection, Reply, Server};
use crate::common::lan::Run;
use crate::common::packet::Packet;
use crate::common::scene::WanScene;
use crate::common::standin::{StandIn, have};
use crate::common::{
    Asker, Browser, Daemon, Holder, Lan, PORT, World, daemon, directory, nix, thread, tracker,
    wait_for, world,
};
use scopeguard::guard;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

/// A peer ID that is HTML with a script.
const HOSTILE: &str = "<img src=x onerror=\"document.title='taken over'\">";

/// A hash part that no peer has.
const ABSENT: &str = "00000000000000000000000000000000";

/// A hash part that only the lying peer claims to have.
const LIE: &str = "11111111111111111111111111111111";

fn page() -> String {
    format!("http://127.0.0.1:{PORT}/")
}

/// JavaScript that returns the text of the page without its time-dependent parts.
const TEXT: &str = "(() => {
    const page = document.querySelector('main').cloneNode(true);
    const moving = 'time, #uptime, #last-asked, [data-is=State] .soft, script';
    page.querySelectorAll(moving).forEach(element => element.remove());
    page.querySelectorAll('*').forEach(element => element.before(' '));
    return page.textContent.replace(/\\s+/g, ' ').trim();
})()";

#[test]
fn page_shows_traffic_with_and_without_scripts() {
    let places = WanScene::new();
    let (lan, world, tracker) = (&places.home, &places.world, &places.tracker);
    let holder = Holder::new(lan, world, "holder");
    // A peer on another network.
    let office = places.holder("office");
    // A LAN peer that claims a path and sends an invalid narinfo.
    let liar = lan.host("liar");
    let narinfo =
        format!("StorePath: /nix/store/{LIE}-{HOSTILE}\nURL: {HOSTILE}\nCompression: none\n");
    let says = |datagram: &[u8]| match Packet::read(datagram)? {
        Packet::Query { hash_part, .. } if hash_part == LIE => have(|_| true)(datagram),
        Packet::Query { id, .. } => Some(Packet::HaveNot { id }.write()),
        _ => None,
    };
    let liar =
        StandIn::start(&liar, says, move |_| Reply::Whole(200, narinfo.clone().into_bytes()));
    let asker = Asker::flagged(lan, "", &[&world.cache_key], |host| {
        tracker::flags(host, "both", &[&tracker.host])
    });
    wait_for("the far peer is at the tracker", || tracker.lists("office").then_some(()));
    asker.meet(&[&holder, &office]);

    let mut browser = Browser::start(&asker.host, &[]);
    browser.look(1280, "light");
    browser.open(&page());
    let near = format!("{}:{PORT}", holder.host.address);
    let far = format!("{}:{PORT}", office.host.address);
    let peers = browser.wait_until_shown("peers", &[&near, &far, "office"]);
    // The asker discovers the holder by its hello, its query, or its answer to the first lookup.
    let ways = ["hello", "its query", "answer to a broadcast"];
    let is_met = ways.iter().any(|way| peers.contains(way));
    assert!(is_met && peers.contains("tracker"), "{peers}");
    browser.wait_until_shown("peers", &["live, heard"]);
    assert!(browser.shown("health").starts_with("working"));

    // A large closure, so that the tables of the page are full.
    let closure = asker.fetch_and_check(world, world.path("closure300"));
    nix::realise_quietly(&asker.host, &[&office.mark]);
    browser.wait_until_shown("peers", &["300 NARs", "1 NAR\t"]);
    // The holder fetches 100 of the paths from the asker.
    for path in &closure[..100] {
        let to = (asker.host.address, PORT);
        let narinfo =
            http::get(&holder.host, to, &format!("/local/{}.narinfo", world::hash_part(path)))
                .unwrap()
                .text();
        let url = narinfo.lines().find_map(|line| line.strip_prefix("URL: ")).unwrap();
        assert!(http::get(&holder.host, to, &format!("/{url}")).unwrap().whole);
    }

    // A miss and the liar's invalid narinfo appear without a reload.
    assert_eq!(http::get_local(&asker.host, &format!("/{ABSENT}.narinfo")).unwrap().status, 404);
    assert_eq!(http::get_local(&asker.host, &format!("/{LIE}.narinfo")).unwrap().status, 404);
    assert_eq!(
        http::get_local(&asker.host, &format!("/{}", HOSTILE.replace(' ', "%20"))).unwrap().status,
        404
    );
    let lookups = browser.wait_until_shown("lookups", &[ABSENT, LIE, "not found"]);
    assert!(lookups.contains("said it has it, but"), "{lookups}");
    assert!(liar.was_asked(&format!("{LIE}.narinfo")));

    // The page shows the progress of a running transfer. At 20 Mbit/s it lasts about half a minute.
    asker.host.slow(20);
    let realising =
        nix::realising(&asker.host, &[world.path("middle")]).spawn().expect("nsenter starts");
    let under_way = "document.querySelector('#transfers progress')?.value ?? 0";
    browser.wait_until_shown("transfers", &["-middle", &near]);
    let mut last = browser.value(under_way).as_f64().unwrap();
    for _ in 0..3 {
        last = wait_for("the bar moves", || {
            let now = browser.value(under_way).as_f64().unwrap();
            (now > last).then_some(now)
        });
    }
    assert_eq!(status(&asker.host)["transfers"][0]["direction"], "in");
    assert_eq!(status(&holder.host)["transfers"][0]["direction"], "out");
    browser.look(960, "light");
    let upper = "Math.floor(document.getElementById('hours').closest('section').getBoundingClientRect().top)";
    let upper = browser.value(upper).as_u64().and_then(|pixels| u32::try_from(pixels).ok());
    browser.picture(&directory().join("page/readme.png"), upper);
    for (width, scheme) in [(360, "light"), (360, "dark"), (1280, "dark"), (1280, "light")] {
        browser.look(width, scheme);
        browser.picture(&directory().join(format!("page/status-{width}-{scheme}.png")), None);
        let wide = browser.value("document.documentElement.scrollWidth").as_u64().unwrap();
        assert!(wide <= width.into(), "{wide} of {width} pixels are used");
        let cut = "[...document.querySelectorAll('main *')].filter(e => e.checkVisibility() && !e.closest('thead') &&
            e.getBoundingClientRect().right > innerWidth).map(e => e.outerHTML)";
        assert_eq!(browser.value(cut), Value::Array(vec![]), "at {width} pixels");
    }
    asker.host.quick();
    nix::assert_quiet(&realising.wait_with_output().unwrap());

    // After the transfer, the path is listed as a hit with its peer.
    let row = browser.wait_until_shown("lookups", &["middle", &near]);
    assert!(row.contains("found"), "{row}");
    browser.wait_until_shown("transfers", &["Nothing is being transferred"]);
    let totals = &status(&asker.host)["totals"];
    assert!(totals["start"]["received_lan_bytes"].as_u64().unwrap() > 64 << 20, "{totals}");
    assert!(totals["start"]["received_wan_bytes"].as_u64().unwrap() > 0, "{totals}");
    assert_eq!(totals["start"]["sent_nars"], 100, "{totals}");
    assert_eq!(totals["installation"]["received_lan_bytes"], totals["start"]["received_lan_bytes"]);

    // A remote peer with a hostile peer ID appears on the page.
    let hostile = Holder::with(&places.away, world, "hostile", |host| {
        world.sign(host);
        let mut flags = tracker::open(host, "wan", &[&tracker.host]);
        flags.extend(["--peer-id".into(), HOSTILE.into()]);
        flags
    });
    wait_for("the hostile peer is at the tracker", || tracker.lists(HOSTILE).then_some(()));
    asker.meet(&[&hostile]);
    browser.wait_until_shown("peers", &[HOSTILE]);

    // No hostile text became an element, and the browser sent no request to another server.
    let title = browser.text("document.title");
    assert!(title.starts_with("peerix on "), "{title}");
    assert_eq!(browser.value("document.images.length"), 0);
    let elsewhere: Vec<&String> = browser
        .requested
        .iter()
        .filter(|url| !url.starts_with(&page()) && !url.starts_with("data:"))
        .collect();
    assert!(elsewhere.is_empty() && browser.requested.len() > 5, "{:?}", browser.requested);
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    // The content security policy blocks requests even if a text became an element.
    let other =
        format!("fetch('http://{near}/nix-cache-info').then(() => 'got it', () => 'refused')");
    assert_eq!(browser.text(&other), "refused");
    browser.value(&format!("document.body.insertAdjacentHTML('beforeend', `{HOSTILE}`)"));
    wait_for("the browser says what it refused", || {
        let refused = |what: &str| browser.complaints.iter().any(|said| said.contains(what));
        let both =
            refused("connect-src") && (refused("inline event handler") || refused("script-src"));
        browser.value("0");
        both.then_some(())
    });
    assert_eq!(browser.text("document.title"), title);

    // Keyboard order: skip link, pause button, summary, the long table.
    browser.open(&page());
    let mut reached = Vec::new();
    for _ in 0..4 {
        browser.press("Tab", 9);
        reached
            .push(browser.text(
                "document.activeElement.id || document.activeElement.className || 'summary'",
            ));
    }
    assert_eq!(reached, ["skip", "pause", "summary", "lookups-table"]);
    // Every element that is operable or visible has an accessible name.
    let nameless = browser.value(
        "[...document.querySelectorAll('section, table, [role=region], svg, progress, button')].filter(e =>
         !e.ariaLabel && !e.getAttribute('aria-labelledby') && !e.textContent.trim()).map(e => e.outerHTML)",
    );
    assert_eq!(nameless, Value::Array(vec![]));

    // Without scripts the page shows the same text.
    wait_for("the script's clock", || (!browser.shown("asof").contains("UTC")).then_some(()));
    let scripted = browser.text(TEXT);
    browser.allow_scripts(false);
    browser.open(&page());
    assert!(browser.shown("asof").contains("UTC"), "a script ran");
    let still = browser.text(TEXT);
    let differs = scripted.split(' ').zip(still.split(' ')).find(|(one, other)| one != other);
    assert_eq!((differs, scripted.len()), (None, still.len()));
    for text in [&near, &far, HOSTILE, "middle", ABSENT, LIE] {
        assert!(still.contains(text), "{text} is not in {still}");
    }
    assert_eq!(browser.value("document.images.length"), 0);
    browser.allow_scripts(true);
}

/// All routes that report the state of a node.
const ROUTES: [&str; 4] = ["/", "/status.json", "/metrics", "/health"];

#[test]
fn status_routes_refuse_other_machines_and_host_names() {
    let lan = Lan::new();
    let (node, neighbour) = (lan.host("node"), lan.host("neighbour"));
    nix::configure_client(&node, "", &[]);
    node.write(
        "/etc/hosts",
        "127.0.0.1 localhost\n127.0.0.1 cache.lan # by the operator\n10.77.0.9 other.lan\n",
    );
    let daemon = Daemon::start(&node, &["--bind", "0.0.0.0", "--bind", "[::]"]);
    let mark = daemon::add_unique_path(&node);

    // Requests from another machine, and from this one by its loopback and its LAN address.
    for route in ROUTES {
        assert_eq!(
            http::get(&neighbour, (node.address, PORT), route).unwrap().status,
            403,
            "{route}"
        );
        assert_eq!(http::get(&node, (node.address, PORT), route).unwrap().status, 200, "{route}");
        assert_eq!(http::get_local(&node, route).unwrap().status, 200, "{route}");
    }

    let narinfo = format!("/store/{}.narinfo", world::hash_part(&mark));
    let lookup = format!("/{}.narinfo", world::hash_part(&mark));
    let ask = |host: &str, route: &str, fields: &str| {
        let mut connection = Connection::new(node.connect_local().unwrap()).unwrap();
        connection
            .send(format!("GET {route} HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n").as_bytes())
            .unwrap();
        connection.answer(true).unwrap().status
    };
    for host in [
        "127.0.0.1:12304",
        "127.0.0.1",
        "localhost:12304",
        "localhost",
        "[::1]:12304",
        "cache.lan:12304",
    ] {
        ROUTES
            .iter()
            .chain([&&*narinfo])
            .for_each(|route| assert_eq!(ask(host, route, ""), 200, "{host} {route}"));
    }
    for host in ["evil.example:12304", "evil.example", "other.lan:12304", "127.0.0.1.evil.example"]
    {
        for route in ROUTES.iter().chain([&&*narinfo, &&*lookup]) {
            assert_eq!(ask(host, route, ""), 403, "{host} {route}");
        }
        // `/nix-cache-info` reveals nothing and stays open. Without it, or with a 403 for an absent
        // path, Nix takes the cache for broken.
        assert_eq!(ask(host, "/nix-cache-info", ""), 200);
    }
    // Two Host fields: the daemon and a proxy before it could choose different ones.
    assert_eq!(ask("127.0.0.1\r\nHost: evil.example", "/status.json", ""), 400);
    assert_eq!(
        ask(
            "127.0.0.1:12304",
            &narinfo,
            "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\n"
        ),
        403
    );
    assert!(daemon.log().contains("evil.example"), "nobody is told why");
    // Browsers connect to loopback for this address, and send no Sec-Fetch-Site to it.
    assert_eq!(ask("0.0.0.0:12304", "/status.json", "Origin: http://evil.example\r\n"), 403);
    assert_eq!(ask("0.0.0.0:12304", "/status.json", ""), 403);
    // Real Nix, by each host name that nix.conf may contain.
    for host in ["127.0.0.1", "localhost", "[::1]", "cache.lan"] {
        let url = format!("http://{host}:{PORT}/store");
        let path = node.cmd("nix").args(["path-info", "--store", &url, &mark]).okay();
        assert_eq!(path.trim(), mark, "{host}");
    }

    // Two hostile pages: one rebinds its DNS name to this machine's address after it loads, the
    // other keeps its own address.
    let rules = format!(
        "--host-resolver-rules=MAP evil.example 127.0.0.1, MAP wider.example {}, MAP wicked.example {}",
        node.address, neighbour.address
    );
    // Headless Chromium has no languages of its own, unlike a desktop's.
    let mut browser = Browser::start(&node, &[&rules, "--accept-lang=en-US"]);
    browser.open(&format!("http://evil.example:{PORT}/status.json"));
    let said = browser.text("document.body.innerText");
    assert!(said.contains("not under this name") && !said.contains("uptime"), "{said}");
    let wicked =
        Server::start(neighbour.listen(80), |_| Reply::Whole(200, b"<!doctype html>".to_vec()));
    browser.open("http://wicked.example/");
    for url in [
        page(),
        format!("http://localhost:{PORT}/status.json"),
        format!("http://evil.example:{PORT}/metrics"),
    ] {
        let read = format!("fetch({url:?}).then(answer => answer.text(), () => 'refused')");
        assert_eq!(browser.text(&read), "refused", "{url}");
    }
    // Scripts must not read what LAN peers may read: neither a page rebound to the LAN address, nor
    // any page that knows this address.
    let there = format!("{}:{PORT}", node.address);
    browser.open(&format!("http://wider.example:{PORT}/nix-cache-info"));
    assert!(
        browser.text("document.body.innerText").contains("StoreDir"),
        "it is another origin's page"
    );
    for url in
        [narinfo.clone(), narinfo.replace("/store", "/local"), format!("http://{there}{narinfo}")]
    {
        let read = format!("fetch({url:?}).then(answer => String(answer.status), () => 'refused')");
        let answer = browser.text(&read);
        assert!(["403", "refused"].contains(&&*answer), "{url}: {answer}");
        // Whether a script loads reveals as much as its content.
        let load = "new Promise(done => { const script = document.createElement('script'); script.onload = () =>
            done('it is there'); script.onerror = () => done('nothing'); script.src = URL_; document.body.append(script); })";
        assert_eq!(browser.text(&load.replace("URL_", &format!("{url:?}"))), "nothing", "{url}");
    }
    for from in [&node, &neighbour] {
        assert_eq!(
            http::get(from, (node.address, PORT), &narinfo).unwrap().status,
            200,
            "programs may have it"
        );
    }
    browser.open("http://wicked.example/");
    let framed = "new Promise(done => { const frame = document.createElement('iframe'); frame.onload = () =>
        done(String(frame.contentDocument === null)); frame.src = URL_; document.body.append(frame); })";
    assert_eq!(browser.text(&framed.replace("URL_", &format!("{:?}", page()))), "true");
    wait_for("the browser says that it does not frame", || {
        browser.value("0");
        browser.complaints.iter().any(|said| said.contains("frame-ancestors")).then_some(())
    });
    browser.open(&page());
    assert!(browser.shown("health").starts_with("working"));
    drop(wicked);
}

#[test]
fn metrics_under_load_pass_promtool() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let done = AtomicBool::new(false);
    let checked = std::thread::scope(|scope| {
        let scraping = thread::spawn_in(scope, "scraping", || {
            let mut texts = Vec::new();
            while !done.load(Ordering::Relaxed) {
                let answer = http::get_local(&asker.host, "/metrics").unwrap();
                assert_eq!(
                    answer.header("content-type"),
                    Some("text/plain; version=0.0.4; charset=utf-8")
                );
                texts.push(answer.text());
            }
            texts
        });
        // Ends the scraping thread even if Nix fails; otherwise the test would hang.
        let is_done = guard((), |()| done.store(true, Ordering::Relaxed));
        asker.fetch_and_check(&world, world.path("closure300"));
        drop(is_done);
        scraping.join().unwrap()
    });
    let last = http::get_local(&asker.host, "/metrics").unwrap().text();
    for text in [
        &checked[0],
        &checked[checked.len() / 2],
        &last,
        &http::get_local(&holder.host, "/metrics").unwrap().text(),
    ] {
        let mut promtool = Command::new("promtool");
        let mut promtool = promtool
            .args(["check", "metrics"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        promtool.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = promtool.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{said}\n{text}");
    }
    let number = |text: &str, series: &str| -> f64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(series))
            .unwrap_or_else(|| panic!("{series}: {text}"));
        line.trim().parse().unwrap()
    };
    // Counters never decrease.
    for pair in checked.windows(2) {
        for series in [
            "peerix_lookup_seconds_count{result=\"hit\"}",
            "peerix_received_bytes_total{network=\"lan\"}",
        ] {
            assert!(number(&pair[0], series) <= number(&pair[1], series));
        }
    }
    assert!(number(&last, "peerix_lookup_seconds_count{result=\"hit\"}") >= 300.0);
    assert!(number(&last, "peerix_received_nars_total") >= 300.0);
    assert!(number(&last, "peerix_first_byte_seconds_count{network=\"lan\"}") >= 300.0);
    let peer = format!(
        "peerix_peer_received_bytes_total{{peer=\"{}\",network=\"lan\"}}",
        holder.host.address
    );
    assert_eq!(number(&last, &peer), number(&last, "peerix_received_bytes_total{network=\"lan\"}"));
    assert_eq!(number(&last, "peerix_healthy"), 1.0);

    // Every metric that `contrib/` uses exists, and its alerts fire when they should.
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let trackers = ["peerix_tracker_reached"];
    let mut asked = 0;
    for file in ["contrib/grafana-dashboard.json", "contrib/prometheus-alerts.yml"] {
        let text = std::fs::read_to_string(root.join(file)).unwrap();
        for (at, _) in text.match_indices("peerix_") {
            let end = text[at..].find(|c: char| !c.is_ascii_lowercase() && c != '_').unwrap();
            let name = &text[at..at + end];
            asked += 1;
            let is_there =
                last.contains(&format!("\n{name}{{")) || last.contains(&format!("\n{name} "));
            assert!(is_there || trackers.contains(&name), "{file}: {name}");
        }
    }
    assert!(asked > 20);
    let dashboard = std::fs::read(root.join("contrib/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_slice(&dashboard).unwrap();
    assert!(dashboard["panels"].as_array().unwrap().len() > 10);
    for arguments in [
        ["check", "rules", "contrib/prometheus-alerts.yml"],
        ["test", "rules", "tests/data/alerts.yml"],
    ] {
        let output = Command::new("promtool").args(arguments).current_dir(root).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

#[test]
fn health_names_missing_database() {
    let lan = Lan::new();
    let host = lan.host("node");
    nix::configure_client(&host, "", &[]);
    let _daemon = Daemon::start(&host, &[]);
    let health = || http::get_local(&host, "/health").unwrap();
    assert_eq!((health().status, health().text().as_str()), (200, "ok\n"));
    // The Nix database disappears, as on a disk that was not mounted again.
    host.sh("mv /nix/var/nix/db /nix/var/nix/away");
    wait_for("health notices", || (health().status == 503).then_some(()));
    let said = health().text();
    assert!(said.starts_with("store: ") && said.contains("/nix/var/nix/db/db.sqlite"), "{said}");
    assert_eq!(status(&host)["health"]["ok"], false);
    // Nix gets a miss, so no build fails.
    assert_eq!(http::get_local(&host, &format!("/store/{ABSENT}.narinfo")).unwrap().status, 404);
    host.sh("mv /nix/var/nix/away /nix/var/nix/db");
    wait_for("health notices", || (health().status == 200).then_some(()));
}

#[test]
fn miss_reports_its_reason() {
    let lan = Lan::new();
    let world = World::on(&lan);
    let stranger = "stranger-1:dw6gRsgENbg3ZRarDaIEP6t3wwkl5ML26Gov7r1VLrA=";
    let asker = Asker::with(&lan, "", &[stranger]);
    let miss = |path: &str| {
        assert_eq!(daemon::narinfo_status(&asker.host, path), 404);
        let lookup = status(&asker.host)["lookups"][0].take();
        assert_eq!(
            (lookup["hash_part"].as_str(), &lookup["hit"]),
            (Some(world::hash_part(path)), &Value::Bool(false))
        );
        let word = |name: &str| lookup["miss"][name].as_str().unwrap().to_owned();
        (word("code"), word("text"))
    };
    let absent = format!("/nix/store/{ABSENT}-x");
    assert_eq!(miss(&absent).0, "alone");
    let holder = Holder::new(&lan, &world, "holder");
    asker.meet(&[&holder]);
    assert_eq!(miss(&absent), ("nobody".into(), "1 peer was asked, none has it".into()));
    let near = format!("{}:{PORT}", holder.host.address);
    let (code, text) = miss(world.path("little"));
    assert_eq!(code, "untrusted");
    assert!(text.starts_with(&near), "{text}");

    // The holder claims the path and rejects connections. As the only holder it is tried three
    // times, and then avoided for a while.
    let reject =
        ["INPUT", "-p", "tcp", "--dport", "12304", "-j", "REJECT", "--reject-with", "tcp-reset"];
    holder.host.net_cmd("iptables").arg("-I").args(reject).okay();
    let codes: Vec<String> = (0..4).map(|_| miss(world.path("little")).0).collect();
    assert_eq!(codes, ["failed", "failed", "failed", "avoided"]);
    let peer = status(&asker.host)["peers"][0].take();
    assert_eq!((peer["address"].as_str(), &peer["failures"]), (Some(&*near), &Value::from(3)));
    assert_eq!(peer["avoided"]["wholly"], true);
    assert!(peer["avoided"]["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{peer}");
    assert!(
        http::get_local(&asker.host, "/").unwrap().text().contains("class=\"bad\">until <time")
    );
    assert_eq!(peer["state"], "live", "{peer}");
    let metrics = || http::get_local(&asker.host, "/metrics").unwrap().text();
    let counts = metrics();
    for (state, count) in [("live", 1), ("silent", 0)] {
        let series = format!("peerix_lan_peers{{state=\"{state}\"}} {count}\n");
        assert!(counts.contains(&series), "{series}{counts}");
    }

    holder.host.fall_silent();
    assert_eq!(
        miss(&absent),
        ("silent".into(), "1 peer was asked, 1 did not answer in time, none said it has it".into())
    );
    let peer = wait_for("the peer is silent", || {
        let peer = status(&asker.host)["peers"][0].take();
        (peer["state"] == "silent").then_some(peer)
    });
    assert!(peer["silent_since"].as_f64() > peer["last_heard"].as_f64(), "{peer}");
    assert!(metrics().contains("peerix_lan_peers{state=\"silent\"} 1\n"), "{}", metrics());
    assert!(http::get_local(&asker.host, "/").unwrap().text().contains("silent since <time"));
}
