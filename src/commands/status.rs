//! `peerix status`: what the daemon tells of itself, in a terminal.

use super::report::{print, say};
use super::{NO, Node, YES, list, long, short, text};
use crate::service::clean;
use serde_json::Value;

/// Lookups that are shown.
const LOOKUPS: usize = 10;

pub fn run(node: &Node, json: bool) -> u8 {
    let status = &node.status;
    let well = status["health"]["ok"] == true;
    if json {
        print(status);
    } else {
        say(&shown(status));
    }
    if well { YES } else { NO }
}

fn shown(status: &Value) -> String {
    let (node, mut out) = (&status["node"], String::new());
    let now = status["time"].as_f64().unwrap_or_default();
    let ago = |then: &Value| then.as_f64().map_or("never".to_owned(), |then| format!("{} ago", long(now - then)));
    let mut line = |text: String| {
        out.push_str(&clean(&text));
        out.push('\n');
    };
    let (name, version, mode) = (text(&node["name"]), text(&node["version"]), text(&node["mode"]));
    let up = long(number(&node["uptime_seconds"]));
    line(format!("{name}: peerix {version}, mode {mode}, port {}, up {up}", node["port"]));
    line(text(&node["shares"]).to_owned());
    for problem in list(&status["health"]["problems"]) {
        line(format!("! {}", text(&problem["text"])));
    }
    for tracker in list(&status["trackers"]) {
        let reached = match tracker["reached"].as_bool() {
            Some(true) => "reached",
            Some(false) => "not reached",
            None => "not heard of yet",
        };
        line(format!("tracker {}: {reached}", text(&tracker["url"])));
    }
    let peers = list(&status["peers"]);
    line(String::new());
    line(format!("peers: {}", peers.len() as u64 + status["peers_omitted"].as_u64().unwrap_or_default()));
    for peer in peers {
        let trip = peer["round_trip_seconds"].as_f64().or_else(|| peer["narinfo_seconds"].as_f64());
        let trip = trip.map_or("?".into(), short);
        let (received, sent) = (bytes(&peer["received_bytes"]), bytes(&peer["sent_bytes"]));
        let (address, found_by, id) = (text(&peer["address"]), text(&peer["found_by"]), text(&peer["id"]));
        let counts = format!("{} hits, {} failures", peer["hits"], peer["failures"]);
        let heard = ago(&peer["last_heard"]);
        line(format!("  {address} {id} by {found_by}, heard {heard}, {trip}, {counts}, {received} in, {sent} out"));
        if let Some(until) = peer["avoided"]["until"].as_f64() {
            line(format!("    avoided for {}: {}", long(until - now), text(&peer["avoided"]["reason"])));
        }
    }
    let transfers = list(&status["transfers"]);
    line(String::new());
    line(format!("transfers: {}", transfers.len()));
    for transfer in transfers {
        let (done, size) = (bytes(&transfer["bytes"]), bytes(&transfer["size"]));
        let (way, name) = (text(&transfer["direction"]), text(&transfer["name"]));
        line(format!("  {way:3} {done} of {size}, {name}, {}", text(&transfer["peer"])));
    }
    line(String::new());
    line("totals".into());
    for (when, title) in [("start", "since the start"), ("installation", "since installation")] {
        let totals = &status["totals"][when];
        if totals.is_object() {
            let (hits, misses) = (&totals["hits"], &totals["misses"]);
            let (lan, wan) = (bytes(&totals["received_lan_bytes"]), bytes(&totals["received_wan_bytes"]));
            let sent =
                [&totals["sent_lan_bytes"], &totals["sent_wan_bytes"]].map(|bytes| bytes.as_u64().unwrap_or_default());
            let saved = long(number(&totals["upstream_seconds"]));
            let sent = super::bytes(sent.iter().fold(0, |all, bytes| all.saturating_add(*bytes)));
            line(format!(
                "  {title}: {hits} hits, {misses} misses; {lan} from the LAN, {wan} from further; {sent} sent"
            ));
            line(format!("    which upstream would have taken some {saved}"));
        }
    }
    let lookups = list(&status["lookups"]);
    line(String::new());
    line(format!("last lookups: {}", lookups.len()));
    for lookup in lookups.iter().take(LOOKUPS) {
        let what = format!("{}-{}", text(&lookup["hash_part"]), lookup["name"].as_str().unwrap_or("?"));
        let came = if lookup["hit"] == true { text(&lookup["peer"]) } else { text(&lookup["miss"]["text"]) };
        let took = short(number(&lookup["seconds"]));
        line(format!("  {} {what} {took}: {came}", if lookup["hit"] == true { "hit " } else { "miss" }));
    }
    out
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    super::bytes(value.as_u64().unwrap_or_default())
}
