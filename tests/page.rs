//! What a person sees of a node: the status page in a real Chromium, beside real traffic, and who may not see it.

mod common;

use common::http::{self, Reply};
use common::scene::Places;
use common::standin::{StandIn, have};
use common::{Asker, Browser, Holder, Host, PORT, directory, nix, tracker, wait_for};
use serde_json::Value;

/// What a peer would like to be called.
const HOSTILE: &str = "<img src=x onerror=\"document.title='taken over'\">";

/// A hash part that nobody has.
const ABSENT: &str = "00000000000000000000000000000000";

/// And one that only a liar has.
const LIE: &str = "11111111111111111111111111111111";

fn page() -> String {
    format!("http://127.0.0.1:{PORT}/")
}

fn status(host: &Host) -> Value {
    let answer = http::get_local(host, "/status.json").unwrap();
    assert_eq!(answer.status, 200);
    serde_json::from_slice(&answer.body).unwrap()
}

/// The text of the page without what depends on the moment at which it was made.
const TEXT: &str = "(() => {
    const page = document.querySelector('main').cloneNode(true);
    page.querySelectorAll('time, #uptime, [data-is=Heard], script').forEach(element => element.remove());
    page.querySelectorAll('*').forEach(element => element.before(' '));
    return page.textContent.replace(/\\s+/g, ' ').trim();
})()";

#[test]
fn the_page_tells_what_happens_and_the_same_without_scripts() {
    let places = Places::new();
    let (lan, world, tracker) = (&places.home, &places.world, &places.tracker);
    let holder = Holder::new(lan, world, "holder");
    // A peer on another network, with a name of its choice.
    let hostile = Holder::with(&places.away, world, "hostile", |host| {
        world.sign(host);
        let mut flags = tracker::open(host, "wan", &[&tracker.host]);
        flags.extend(["--peer-id".into(), HOSTILE.into()]);
        flags
    });
    // And a neighbour whose narinfos are of the same kind.
    let liar = lan.host("liar");
    let narinfo = format!("StorePath: /nix/store/{LIE}-{HOSTILE}\nURL: {HOSTILE}\nCompression: none\n");
    let liar = StandIn::start(&liar, have(|hash_part| hash_part == LIE), move |_| {
        Reply::Whole(200, narinfo.clone().into_bytes())
    });
    let asker = Asker::flagged(lan, "", &[&world.cache_key], |host| tracker::flags(host, "both", &[&tracker.host]));
    wait_for("the hostile peer is at the tracker", || tracker.lists(HOSTILE).then_some(()));
    asker.meet(&[&holder, &hostile]);

    let mut browser = Browser::start(&asker.host, &[]);
    browser.look(1280, "light");
    browser.open(&page());
    let near = format!("{}:{PORT}", holder.host.address);
    let far = format!("{}:{PORT}", hostile.host.address);
    let peers = browser.wait_until_shown("peers", &[&near, &far, HOSTILE]);
    assert!(peers.contains("broadcast") && peers.contains("tracker"), "{peers}");
    assert!(browser.shown("health").starts_with("working"));

    // A miss and a lie appear without a reload.
    assert_eq!(http::get_local(&asker.host, &format!("/{ABSENT}.narinfo")).unwrap().status, 404);
    assert_eq!(http::get_local(&asker.host, &format!("/{LIE}.narinfo")).unwrap().status, 404);
    assert_eq!(http::get_local(&asker.host, &format!("/{}", HOSTILE.replace(' ', "%20"))).unwrap().status, 404);
    let lookups = browser.wait_until_shown("lookups", &[ABSENT, LIE, "not found"]);
    assert!(lookups.contains("said it has it, but"), "{lookups}");
    assert!(liar.was_asked(&format!("{LIE}.narinfo")));

    // A NAR under way moves.
    asker.host.slow(100);
    let realising = nix::realising(&asker.host, &[world.path("middle")]).spawn().expect("nsenter starts");
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
    for (width, scheme) in [(360, "light"), (360, "dark"), (1280, "dark"), (1280, "light")] {
        browser.look(width, scheme);
        browser.picture(&directory().join(format!("page/status-{width}-{scheme}.png")), None);
        let wide = browser.value("document.documentElement.scrollWidth").as_u64().unwrap();
        assert!(wide <= width.into(), "{wide} of {width} pixels are used");
    }
    browser.picture(&directory().join("page/readme.png"), Some(1000));
    asker.host.quick();
    nix::assert_quiet(&realising.wait_with_output().unwrap());

    // And is a hit, at its peer.
    let row = browser.wait_until_shown("lookups", &["middle", &near]);
    assert!(row.contains("found"), "{row}");
    browser.wait_until_shown("transfers", &["Nothing is being transferred"]);
    let totals = &status(&asker.host)["totals"];
    assert!(totals["start"]["received_lan_bytes"].as_u64().unwrap() > 64 << 20, "{totals}");
    assert_eq!(totals["installation"]["received_lan_bytes"], totals["start"]["received_lan_bytes"]);

    // Nobody who named themselves oddly has become an element, and nothing was asked of anybody else.
    let title = browser.text("document.title");
    assert!(title.starts_with("peerix on "), "{title}");
    assert_eq!(browser.value("document.images.length"), 0);
    let elsewhere: Vec<&String> =
        browser.requested.iter().filter(|url| !url.starts_with(&page()) && !url.starts_with("data:")).collect();
    assert!(elsewhere.is_empty() && browser.requested.len() > 5, "{:?}", browser.requested);
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
    // Nor could it be: the policy does not let it.
    let other = format!("fetch('http://{near}/nix-cache-info').then(() => 'got it', () => 'refused')");
    assert_eq!(browser.text(&other), "refused");
    assert!(!browser.complaints.is_empty(), "the browser does not say so");

    // With the keyboard alone: first to the facts, then to the button, then into the long table.
    browser.open(&page());
    let mut reached = Vec::new();
    for _ in 0..4 {
        browser.press("Tab", 9);
        reached.push(browser.text("document.activeElement.id || document.activeElement.className || 'summary'"));
    }
    assert_eq!(reached, ["skip", "pause", "summary", "lookups-table"]);
    // Everything that can be operated or looked at has a name.
    let nameless = browser.value(
        "[...document.querySelectorAll('section, table, [role=region], svg, progress, button')].filter(e =>
         !e.ariaLabel && !e.getAttribute('aria-labelledby') && !e.textContent.trim()).map(e => e.outerHTML)",
    );
    assert_eq!(nameless, Value::Array(vec![]));

    // Without scripts it tells the same.
    let after = |browser: &mut Browser| {
        wait_for("the script's clock", || {
            let asof = browser.shown("asof");
            (!asof.contains("UTC")).then_some(())
        })
    };
    after(&mut browser);
    let scripted = browser.text(TEXT);
    browser.allow_scripts(false);
    browser.open(&page());
    assert!(browser.shown("asof").contains("UTC"), "a script ran");
    let still = browser.text(TEXT);
    assert_eq!(scripted, still);
    for text in [&near, &far, HOSTILE, "middle", ABSENT, LIE] {
        assert!(still.contains(text), "{text} is not in {still}");
    }
    assert_eq!(browser.value("document.images.length"), 0);
    browser.allow_scripts(true);
}
