//! The status page `/`: the report as a self-contained HTML file that also works without its
//! script.
//!
//! Each changing part is an element with an ID. The script updates it from `/status.json`. All text
//! is escaped by [`escape`].

use super::report::{
    FriendReport, LookupReport, NodeReport, PeerReport, PeerState, StatusReport, TotalsSince,
    TransferReport,
};
use super::text::{bytes, escape, found_by, long, moment, percent, plural, short};
use crate::stats::{Counter, HOUR, Hour};
use data_encoding::BASE64;
use ring::digest::{SHA256, digest};
use std::collections::HashMap;
use std::sync::OnceLock;

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// Number of hours in the chart.
const CHART_HOURS: u64 = 48;
/// Width of the chart in SVG units, 10 for each hour.
const CHART_WIDTH: u64 = CHART_HOURS * 10;
/// Height of the bars above the axis (received) and below it (sent), in SVG units.
const CHART_UP: f64 = 84.0;
const CHART_DOWN: f64 = 36.0;

/// Inline icon, so that browsers do not request `/favicon.ico`.
const ICON: &str = "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'%3E%3Cg fill='%230b7a75'%3E%3Ccircle cx='2' cy='2' r='1.8'/%3E%3Ccircle cx='6' cy='6' r='1.8'/%3E%3Cpath d='M2 2l4 4' stroke='%230b7a75'/%3E%3C/g%3E%3C/svg%3E";

/// The page and its security policy.
pub struct StatusPage {
    /// The HTML document.
    pub html: String,
    /// Value of `Content-Security-Policy`: allows this style, this script and requests to this node
    /// only.
    pub policy: &'static str,
}

/// Renders the page.
pub fn page(report: &StatusReport) -> StatusPage {
    static POLICY: OnceLock<String> = OnceLock::new();
    let policy = POLICY.get_or_init(|| {
        let hash = |text: &str| BASE64.encode(digest(&SHA256, text.as_bytes()).as_ref());
        format!(
            "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; connect-src 'self'; img-src data:; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            hash(STYLE),
            hash(SCRIPT)
        )
    });
    StatusPage { html: html(report), policy }
}

fn html(r: &StatusReport) -> String {
    [head(r), tiles(r), node(r), under_way(r), peers(r), history(r), lookups(r)].concat()
        + &format!(
            r##"</main>
<footer><p>For programs: <a href="status.json">status.json</a>, <a href="metrics">metrics</a>, <a href="health">health</a>. <noscript>Without scripts this page stays as it is: reload it for later news.</noscript></p></footer>
<script>{SCRIPT}</script>
</body>
</html>
"##
        )
}

fn head(r: &StatusReport) -> String {
    let (name, asof, problems) = (escape(&r.node.name), moment(r.time, r.time), problems(r));
    let (health, good) = health(r);
    format!(
        r##"<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>peerix on {name}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="{ICON}">
<style>{STYLE}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the facts</a>
<header>
<h1>peerix <span>on {name}</span></h1>
<p id="health" class="pill {good}" role="status">{health}</p>
<p class="asof"><span>As of <span id="asof">{asof}</span></span><button id="pause" type="button" aria-pressed="false" hidden>Pause</button></p>
</header>
<main id="main">
<ul id="problems" class="notes">{problems}</ul>
"##
    )
}

fn tiles(r: &StatusReport) -> String {
    let (which, since) = match &r.totals.installation {
        Some(since) => ("installation", since),
        None => ("the start", &r.totals.start),
    };
    let totals = &since.totals;
    let found = totals.get(Counter::Hits);
    format!(
        r##"<section class="tiles" aria-labelledby="h-tiles"><h2 id="h-tiles">Since {which}, <span id="since">{since_when}</span></h2>
<div class="tile"><span>From peers</span><b id="t-received">{t_received}</b><span id="t-received-of">{t_received_of}</span></div>
<div class="tile"><span>Paths found at peers</span><b id="t-found">{t_found}</b><span id="t-found-of">{t_found_of}</span></div>
<div class="tile"><span>Downloads saved</span><b id="t-saved">{t_saved}</b><span>estimated, at 50 Mbit/s</span></div>
<div class="tile"><span>To peers</span><b id="t-sent">{t_sent}</b><span id="t-sent-of">{t_sent_of}</span></div>
</section>
"##,
        since_when = moment(since.since, r.time),
        t_received = bytes(totals.received()),
        t_received_of = received_of(since),
        t_found = percent(found, asked(since)),
        t_found_of = format_args!("{found} of {}", plural(asked(since), "lookup")),
        t_saved = long(since.upstream_seconds),
        t_sent = bytes(totals.sent()),
        t_sent_of = plural(totals.get(Counter::SentNars), "NAR"),
    )
}

fn node(r: &StatusReport) -> String {
    let NodeReport { version, mode, port, .. } = r.node;
    let last_asked = r.lookups.first().map(|lookup| format!("{} ago", long(r.time - lookup.time)));
    format!(
        r##"<section aria-labelledby="h-node"><h2 id="h-node">This node</h2>
<p>{shares}</p>
<div class="pair"><dl>
<dt>Version</dt><dd>{version}</dd>
<dt>Mode</dt><dd>{mode}, port {port}</dd>
<dt>Running for</dt><dd id="uptime">{uptime}</dd>
<dt>Nix last asked</dt><dd id="last-asked">{last_asked}</dd>
</dl><dl>
<dt>Networks</dt><dd id="networks">{networks}</dd>
<dt>Trackers</dt><dd id="trackers">{trackers}</dd>
<dt>Friends</dt><dd id="friends">{friends}</dd>
<dt>Signs</dt><dd>{signs}</dd>
</dl></div>
</section>
"##,
        shares = escape(&r.node.shares),
        uptime = long(r.node.uptime_seconds),
        last_asked = last_asked.unwrap_or_else(|| "never".into()),
        networks = networks(r),
        trackers = trackers(r),
        friends = friends(r),
        signs = if r.node.signs { "what it serves of the own store" } else { "nothing" },
    )
}

fn under_way(r: &StatusReport) -> String {
    let transfers = transfers(&r.transfers);
    format!(
        r##"<section aria-labelledby="h-transfers"><h2 id="h-transfers">Under way</h2><div id="transfers">{transfers}</div></section>
"##
    )
}

fn peers(r: &StatusReport) -> String {
    let columns =
        ["Peer", "Found by", "State", "Round trip", "Gave", "From it", "To it", "Avoided"];
    format!(
        r##"<section aria-labelledby="h-peers"><h2 id="h-peers">Peers</h2>
<p id="no-peers" class="none"{hide_no_peers}>No peer is known yet. Other machines that run peerix on the same network are found within seconds, if UDP and TCP port {port} are open on both.</p>
<table class="cards" role="table" aria-labelledby="h-peers"{hide_peers} id="peers-table"><thead role="rowgroup"><tr role="row">{peer_heads}</tr></thead><tbody role="rowgroup" id="peers">{peers}</tbody></table>
<p id="omitted" class="soft">{omitted}</p>
</section>
"##,
        port = r.node.port,
        hide_no_peers = hidden(!r.peers.is_empty()),
        hide_peers = hidden(r.peers.is_empty()),
        peer_heads = heads(&columns, 5..7),
        peers = r.peers.iter().map(|peer| self::peer(peer, r.time)).collect::<String>(),
        omitted = omitted(r.peers_omitted),
    )
}

fn history(r: &StatusReport) -> String {
    let (hours, totals) = (hours(&r.history.hours, r.time), totals(r));
    format!(
        r##"<section aria-labelledby="h-hours"><h2 id="h-hours">The last 48 hours</h2><figure id="hours">{hours}</figure></section>
<section aria-labelledby="h-totals"><h2 id="h-totals">Totals</h2>
<table aria-labelledby="h-totals"><thead><tr><th scope="col">What</th><th scope="col" class="n">Since the start</th><th scope="col" class="n">Since installation</th></tr></thead><tbody id="totals">{totals}</tbody></table>
</section>
"##
    )
}

fn lookups(r: &StatusReport) -> String {
    format!(
        r##"<section aria-labelledby="h-lookups"><h2 id="h-lookups">Last lookups of this machine’s Nix</h2>
<p id="no-lookups" class="none"{hide_no_lookups}>Nix has not asked yet. Is <code>http://127.0.0.1:{port}</code> among its substituters?</p>
<div class="scroll" tabindex="0" role="region" aria-labelledby="h-lookups"{hide_lookups} id="lookups-table"><table class="cards" role="table" aria-labelledby="h-lookups"><thead role="rowgroup"><tr role="row">{lookup_heads}</tr></thead><tbody role="rowgroup" id="lookups">{lookups}</tbody></table></div>
</section>
"##,
        port = r.node.port,
        hide_no_lookups = hidden(!r.lookups.is_empty()),
        hide_lookups = hidden(r.lookups.is_empty()),
        lookup_heads = heads(&["Path", "At", "Result", "Took"], 3..4),
        lookups = r.lookups.iter().map(|lookup| self::lookup(lookup, r.time)).collect::<String>(),
    )
}

fn hidden(yes: bool) -> &'static str {
    if yes { " hidden" } else { "" }
}

fn heads(names: &[&str], numbers: std::ops::Range<usize>) -> String {
    let head = |(at, name): (usize, &&str)| {
        let class = if numbers.contains(&at) { " class=\"n\"" } else { "" };
        format!("<th role=\"columnheader\" scope=\"col\"{class}>{name}</th>")
    };
    names.iter().enumerate().map(head).collect()
}

/// A cell of a table whose rows become cards on small screens. `html` is not escaped.
fn cell(name: &str, class: &str, html: &str) -> String {
    let (html, empty) = if html.is_empty() { ("–", " none") } else { (html, "") };
    format!("<td role=\"cell\" data-is=\"{name}\" class=\"{class}{empty}\">{html}</td>")
}

fn health(r: &StatusReport) -> (&'static str, &'static str) {
    match (r.health.ok, r.health.problems.is_empty()) {
        (true, true) => ("working", "good"),
        (true, false) => ("working, but see below", "good"),
        (false, _) => ("not working", "bad"),
    }
}

fn problems(r: &StatusReport) -> String {
    let item = |problem: &super::report::Problem| {
        format!(
            "<li class=\"{}\">{}</li>",
            if problem.serious { "bad" } else { "" },
            escape(&problem.text)
        )
    };
    r.health.problems.iter().map(item).collect()
}

fn asked(since: &TotalsSince) -> u64 {
    since.totals.get(Counter::Hits).saturating_add(since.totals.get(Counter::Misses))
}

fn received_of(since: &TotalsSince) -> String {
    let of = |count| bytes(since.totals.get(count));
    format!("LAN {} · WAN {}", of(Counter::ReceivedLan), of(Counter::ReceivedWan))
}

fn networks(r: &StatusReport) -> String {
    let network = |n: &super::report::OwnNetwork| {
        let interface = n.interface.as_deref().unwrap_or("routed");
        format!("{} {}", escape(interface), escape(&n.address))
    };
    let all: Vec<_> = r.networks.iter().map(network).collect();
    if all.is_empty() { "none".into() } else { all.join("<br>") }
}

fn trackers(r: &StatusReport) -> String {
    let state = |reached| match reached {
        Some(true) => "reached",
        Some(false) => "not reached",
        None => "asked",
    };
    let all: Vec<_> =
        r.trackers.iter().map(|t| format!("{}, {}", escape(&t.url), state(t.reached))).collect();
    if all.is_empty() { "none".into() } else { all.join("<br>") }
}

fn friends(r: &StatusReport) -> String {
    let friend = |friend: &FriendReport| {
        let address = friend.address.as_deref().unwrap_or_default();
        let state =
            if friend.reached { format!("reached at {address}") } else { "not reached".into() };
        format!("{}, {}", escape(&friend.name), escape(&state))
    };
    let all: Vec<_> = r.friends.iter().map(friend).collect();
    if all.is_empty() { "none".into() } else { all.join("<br>") }
}

fn omitted(count: usize) -> String {
    if count == 0 { String::new() } else { format!("And {count} more.") }
}

fn transfers(all: &[TransferReport]) -> String {
    if all.is_empty() {
        return "<p class=\"none\">Nothing is being transferred.</p>".into();
    }
    let one = |t: &TransferReport| {
        let name = escape(&t.name);
        let peer = t.peer.as_deref().map_or("a peer".into(), escape);
        let way = if t.direction == "in" { "from" } else { "to" };
        let why = t.reason.as_deref().map(escape).unwrap_or_default();
        format!(
            "<div class=\"run\"><p><span>{name}</span><span class=\"soft\" title=\"{why}\">{way} {peer}</span></p>\
             <progress class=\"{}\" max=\"{}\" value=\"{}\" aria-label=\"{name}, {way} {peer}\"></progress>\
             <p class=\"soft\"><span>{} of {}</span><span>{}/s</span></p></div>",
            t.direction,
            t.size.max(1),
            t.bytes,
            bytes(t.bytes),
            bytes(t.size),
            bytes(t.bytes_per_second)
        )
    };
    all.iter().map(one).collect()
}

fn tag(network: &str) -> String {
    format!("<span class=\"tag {network}\">{}</span>", network.to_uppercase())
}

/// Liveness of a peer, and when it was last heard. A `--peer` that does not answer is highlighted,
/// because the user expects it to be there.
fn state(p: &PeerReport, now: f64) -> String {
    let state = match (p.state, p.silent_since) {
        (Some(PeerState::Live), _) => "live".into(),
        (Some(PeerState::Silent), Some(since)) => format!("silent since {}", moment(since, now)),
        (Some(PeerState::Silent), None) => "silent".into(),
        (Some(PeerState::Unheard), _) => "never heard".into(),
        (None, _) => String::new(),
    };
    let is_missed = p.found_by == "flag" && p.state.is_some_and(|state| state != PeerState::Live);
    let state = if is_missed { format!("<span class=\"bad\">{state}</span>") } else { state };
    let heard = p.last_heard.map(|at| long(now - at));
    let heard = heard.map(|age| format!("<span class=\"soft\">heard {age} ago</span>"));
    let parts = [state, heard.unwrap_or_default()];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(", ")
}

fn peer(p: &PeerReport, now: f64) -> String {
    let id = p.id.as_deref().map(|id| format!("<code>{}</code>", escape(id))).unwrap_or_default();
    let round_trip = p.round_trip_seconds.or(p.narinfo_seconds).map(short).unwrap_or_default();
    let failures = if p.failures == 0 {
        String::new()
    } else {
        format!(", {}", plural(p.failures, "failure"))
    };
    let avoided = p.avoided.as_ref().map(|a| {
        let last = if a.wholly { "" } else { ", unless nobody else has a path" };
        format!(
            "<span class=\"bad\">until {}{last}:</span> {}",
            moment(a.until, now),
            escape(&a.reason)
        )
    });
    [
        "<tr role=\"row\">".into(),
        cell("Peer", "", &format!("{} {}{id}", escape(&p.address), tag(p.network))),
        cell("Found by", "", found_by(p.found_by)),
        cell("State", "", &state(p, now)),
        cell("Round trip", "", &round_trip),
        cell(
            "Gave",
            "",
            &format!("{}, {}{failures}", plural(p.hits, "hit"), plural(p.nars, "NAR")),
        ),
        cell("From it", "n", &bytes(p.received_bytes)),
        cell("To it", "n", &bytes(p.sent_bytes)),
        cell("Avoided", "", &avoided.unwrap_or_default()),
        "</tr>".into(),
    ]
    .concat()
}

fn lookup(l: &LookupReport, now: f64) -> String {
    let result = match (&l.peer, &l.miss) {
        (Some(peer), _) => {
            format!(
                "<span class=\"good\">found</span> at {} {}",
                escape(peer),
                tag(l.network.unwrap_or_default())
            )
        }
        (None, Some(miss)) => {
            format!("<span class=\"bad\">not found</span>: {}", escape(&miss.text))
        }
        (None, None) => String::new(),
    };
    let name = l.name.as_deref().map(escape).unwrap_or_default();
    [
        "<tr role=\"row\">".into(),
        cell("Path", "", &format!("{name}<code>{}</code>", escape(&l.hash_part))),
        cell("At", "", &moment(l.time, now)),
        cell("Result", "", &result),
        cell("Took", "n", &short(l.seconds)),
        "</tr>".into(),
    ]
    .concat()
}

fn totals(r: &StatusReport) -> String {
    let columns = [Some(&r.totals.start), r.totals.installation.as_ref()];
    let row = |what: &str, value: &dyn Fn(&TotalsSince) -> String| {
        let cells = columns
            .map(|since| format!("<td class=\"n\">{}</td>", since.map_or("–".into(), value)));
        format!("<tr><th scope=\"row\">{what}</th>{}</tr>", cells.concat())
    };
    let count = |count: Counter| move |since: &TotalsSince| since.totals.get(count).to_string();
    let size = |count: Counter| move |since: &TotalsSince| bytes(since.totals.get(count));
    [
        row("Received from LAN", &size(Counter::ReceivedLan)),
        row("Received from WAN", &size(Counter::ReceivedWan)),
        row("Whole NARs received", &count(Counter::ReceivedNars)),
        row("NARs that no peer could deliver", &count(Counter::FailedNars)),
        row("The same from upstream would have taken about", &|since| long(since.upstream_seconds)),
        row("Sent to LAN", &size(Counter::SentLan)),
        row("Sent to WAN", &size(Counter::SentWan)),
        row("NARs sent", &count(Counter::SentNars)),
        row("Paths found", &count(Counter::Hits)),
        row("Paths not found", &count(Counter::Misses)),
    ]
    .concat()
}

/// The chart: bars for each hour in which something was counted, and the same data as a table.
fn hours(hours: &[Hour], now: f64) -> String {
    let last = now.max(0.0) as u64 / HOUR;
    let first = last.saturating_sub(CHART_HOURS - 1);
    let by_hour: HashMap<u64, &Hour> = hours.iter().map(|hour| (hour.start / HOUR, hour)).collect();
    let shown: Vec<(u64, &Hour)> = (0..CHART_HOURS)
        .filter_map(|at| by_hour.get(&(first + at)).map(|hour| (at, *hour)))
        .collect();
    let max = |bytes: fn(&Hour) -> u64| {
        shown.iter().map(|(_, hour)| bytes(hour)).max().unwrap_or_default()
    };
    let (up, down) = (max(|hour| hour.totals.received()), max(|hour| hour.totals.sent()));
    // Received and sent bytes have the same scale, the largest at which both fit.
    let scale = (CHART_UP / up.max(1) as f64).min(CHART_DOWN / down.max(1) as f64);
    let bars: String = shown.iter().map(|(at, hour)| bars(at * 10 + 1, hour, scale)).collect();
    let tall = CHART_UP + CHART_DOWN;
    let label = format!("Most in an hour: {} from peers, {} to peers.", bytes(up), bytes(down));
    let table = hour_table(&shown, now);
    format!(
        "<figcaption><span class=\"lan\"><i></i>from LAN</span><span class=\"wan\"><i></i>from WAN</span>\
         <span class=\"sent\"><i></i>to peers</span><span class=\"soft\">{label}</span></figcaption>\
         <svg viewBox=\"0 0 {CHART_WIDTH} {tall}\" preserveAspectRatio=\"none\" role=\"img\" aria-label=\"{label}\">{bars}\
         <line class=\"axis\" x1=\"0\" x2=\"{CHART_WIDTH}\" y1=\"{CHART_UP}\" y2=\"{CHART_UP}\"/></svg>\
         <div class=\"ends\"><span>48 h ago</span><span>24 h ago</span><span>now</span></div>{table}"
    )
}

/// The bars of an hour at `x`: what was received above the axis, what was sent below it.
fn bars(x: u64, hour: &Hour, scale: f64) -> String {
    let height = |bytes: u64| if bytes == 0 { 0.0 } else { (bytes as f64 * scale).max(1.0) };
    let lan = height(hour.totals.get(Counter::ReceivedLan));
    let wan = height(hour.totals.get(Counter::ReceivedWan));
    let (lan_top, wan_top) = (CHART_UP - lan, CHART_UP - lan - wan);
    let sent = height(hour.totals.sent());
    format!(
        "<rect class=\"lan\" x=\"{x}\" y=\"{lan_top:.1}\" width=\"8\" height=\"{lan:.1}\"/>\
         <rect class=\"wan\" x=\"{x}\" y=\"{wan_top:.1}\" width=\"8\" height=\"{wan:.1}\"/>\
         <rect class=\"sent\" x=\"{x}\" y=\"{CHART_UP}\" width=\"8\" height=\"{sent:.1}\"/>"
    )
}

/// Table of the hours in the chart, folded at first.
fn hour_table(shown: &[(u64, &Hour)], now: f64) -> String {
    if shown.is_empty() {
        return "<p class=\"none\">Nothing happened in these hours.</p>".into();
    }
    let row = |(_, hour): &(u64, &Hour)| {
        let get = |count| hour.totals.get(count);
        let hits = get(Counter::Hits);
        let cells = [
            bytes(get(Counter::ReceivedLan)),
            bytes(get(Counter::ReceivedWan)),
            bytes(hour.totals.sent()),
            format!("{hits} of {}", hits.saturating_add(get(Counter::Misses))),
        ];
        let cells = cells.map(|cell| format!("<td class=\"n\">{cell}</td>")).concat();
        format!("<tr><th scope=\"row\">{}</th>{cells}</tr>", moment(hour.start as f64, now))
    };
    let rows: String = shown.iter().map(row).collect();
    format!(
        "<details><summary>The same as a table</summary><table><thead><tr><th scope=\"col\">From</th>\
         <th scope=\"col\" class=\"n\">LAN</th><th scope=\"col\" class=\"n\">WAN</th>\
         <th scope=\"col\" class=\"n\">Sent</th><th scope=\"col\" class=\"n\">Found</th></tr></thead>\
         <tbody>{rows}</tbody></table></details>"
    )
}

#[cfg(test)]
mod tests {
    use super::super::peers::empty;
    use super::*;
    use crate::stats::Network;
    use std::net::{Ipv4Addr, SocketAddr};

    /// Row of a LAN peer at 1180 s. A silent peer has been silent since 1000 s.
    fn row(found_by: &'static str, state: Option<PeerState>, last_heard: Option<f64>) -> String {
        let silent_since = (state == Some(PeerState::Silent)).then_some(1000.0);
        let address = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 1), 1));
        let unknown = empty(address, Network::Lan);
        peer(&PeerReport { found_by, state, silent_since, last_heard, ..unknown }, 1180.0)
    }

    #[test]
    fn peer_state_and_last_heard_are_shown() {
        let live = row("query", Some(PeerState::Live), Some(1177.0));
        assert!(live.contains(">its query<"), "{live}");
        assert!(live.contains(">live, <span class=\"soft\">heard 3 s ago</span><"), "{live}");
        let silent = row("broadcast", Some(PeerState::Silent), Some(880.0));
        assert!(silent.contains(">hello<") && silent.contains(">silent since <time "), "{silent}");
        let heard = ">00:16:40 UTC</time>, <span class=\"soft\">heard 5 min ago</span><";
        assert!(silent.contains(heard), "{silent}");
        assert!(!silent.contains("class=\"bad\""), "a neighbour may be switched off: {silent}");
        let far = row("tracker", None, Some(1177.0));
        let heard = "data-is=\"State\" class=\"\"><span class=\"soft\">heard 3 s ago</span><";
        assert!(far.contains(heard), "{far}");
        let asks = row("request", None, None);
        assert!(asks.contains("data-is=\"State\" class=\" none\">–<"), "{asks}");
    }

    #[test]
    fn named_peer_without_answer_is_highlighted() {
        let live = row("flag", Some(PeerState::Live), Some(1177.0));
        assert!(live.contains(">--peer<") && !live.contains("class=\"bad\""), "{live}");
        let silent = row("flag", Some(PeerState::Silent), None);
        assert!(silent.contains("<span class=\"bad\">silent since <time "), "{silent}");
        let unheard = row("flag", Some(PeerState::Unheard), None);
        assert!(unheard.contains("<span class=\"bad\">never heard</span><"), "{unheard}");
    }

    #[test]
    fn script_contains_the_words_of_the_page() {
        let near = ["broadcast", "neighbour-table", "query", "answer", "flag"];
        for code in near.into_iter().chain(["tracker", "request"]) {
            let words = format!("'{}'", found_by(code));
            assert!(SCRIPT.contains(&words), "{words} is not in the script");
        }
        for words in ["'silent since '", "'never heard'"] {
            assert!(SCRIPT.contains(words), "{words} is not in the script");
        }
    }
}
