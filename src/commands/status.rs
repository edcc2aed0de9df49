//! `peerix status`: prints the daemon's status as text or JSON.

use super::report::{print, say};
use super::{
    EXIT_NO, EXIT_YES, RunningDaemon, found_by, list, liveness, long, moment, short, text,
};
use crate::service::clean;
use serde_json::Value;

/// Maximum number of lookups that are shown, the latest first.
const MAX_LOOKUPS: usize = 10;

pub fn run(node: &RunningDaemon, json: bool) -> u8 {
    let status = &node.status;
    let well = status["health"]["ok"] == true;
    if json {
        print(status);
    } else {
        say(&shown(status));
    }
    if well { EXIT_YES } else { EXIT_NO }
}

fn shown(status: &Value) -> String {
    let (node, mut out) = (&status["node"], String::new());
    let now = moment(status);
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
    for (name, what) in [("outside", "outside"), ("pinhole", "by IPv6")] {
        if let Some(at) = status["port_mapping"][name].as_str() {
            line(format!("reached {what} at {at}"));
        }
    }
    for friend in list(&status["friends"]) {
        line(friend_line(friend, now));
    }
    let peers = list(&status["peers"]);
    line(String::new());
    line(format!(
        "peers: {}",
        peers.len() as u64 + status["peers_omitted"].as_u64().unwrap_or_default()
    ));
    for peer in peers {
        line(format!("  {}", peer_line(peer, now)));
        if let Some(end) = peer["avoided"]["until"].as_f64() {
            line(format!(
                "    avoided for {}: {}",
                long(end - now),
                text(&peer["avoided"]["reason"])
            ));
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
            let (lan, wan) =
                (bytes(&totals["received_lan_bytes"]), bytes(&totals["received_wan_bytes"]));
            let sent = [&totals["sent_lan_bytes"], &totals["sent_wan_bytes"]]
                .map(|bytes| bytes.as_u64().unwrap_or_default());
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
    for lookup in lookups.iter().take(MAX_LOOKUPS) {
        let what =
            format!("{}-{}", text(&lookup["hash_part"]), lookup["name"].as_str().unwrap_or("?"));
        let came = if lookup["hit"] == true {
            text(&lookup["peer"])
        } else {
            text(&lookup["miss"]["text"])
        };
        let elapsed = short(number(&lookup["seconds"]));
        line(format!(
            "  {} {what} {elapsed}: {came}",
            if lookup["hit"] == true { "hit " } else { "miss" }
        ));
    }
    out
}

/// A friend's name, key, whether it is reached, where and since when, or why not.
pub fn friend_line(friend: &Value, now: f64) -> String {
    let since = friend["since"]
        .as_f64()
        .map(|since| format!(" for {}", long(now - since)))
        .unwrap_or_default();
    let how = match friend["reached"] == true {
        true => format!(
            "reached at {} ({}){since}",
            text(&friend["address"]),
            text(&friend["found_by"])
        ),
        false => format!("not reached{since}"),
    };
    let error = friend["error"].as_str().filter(|_| friend["reached"] != true);
    let error = error.map(|error| format!(": {error}")).unwrap_or_default();
    format!("friend {} {}: {how}{error}", text(&friend["name"]), text(&friend["key"]))
}

/// A peer's address, how it was found, its liveness, and its traffic.
fn peer_line(peer: &Value, now: f64) -> String {
    let id = peer["id"].as_str().map(|id| format!(" ({id})")).unwrap_or_default();
    let trip = peer["round_trip_seconds"].as_f64().or_else(|| peer["narinfo_seconds"].as_f64());
    let facts = [
        liveness(peer, now),
        Some(format!("found by {}", found_by(text(&peer["found_by"])))),
        peer["last_heard"].as_f64().map(|at| format!("heard {} ago", long(now - at))),
        trip.map(short),
        Some(format!("{} hits, {} failures", peer["hits"], peer["failures"])),
        Some(format!("{} in", bytes(&peer["received_bytes"]))),
        Some(format!("{} out", bytes(&peer["sent_bytes"]))),
    ];
    let facts: Vec<String> = facts.into_iter().flatten().collect();
    format!("{}{id}: {}", text(&peer["address"]), facts.join(", "))
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_default()
}

fn bytes(value: &Value) -> String {
    super::bytes(value.as_u64().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn peer_line_contains_state_and_how_the_peer_was_found() {
        // Line of a peer with these facts, without the traffic at its end.
        let line = |facts: Value| {
            let mut peer = json!({"hits": 120, "failures": 2});
            peer["received_bytes"] = (7 << 20).into();
            peer["sent_bytes"] = 0.into();
            let facts = facts.as_object().unwrap().clone();
            peer.as_object_mut().unwrap().extend(facts);
            let line = peer_line(&peer, 1180.0);
            let facts = line.strip_suffix(", 120 hits, 2 failures, 7.0 MiB in, 0 B out");
            facts.unwrap_or_else(|| panic!("{line}")).to_owned()
        };
        let live = line(json!({
            "address": "10.0.0.1:1", "found_by": "query", "state": "live", "last_heard": 1177.0,
            "round_trip_seconds": 0.0004,
        }));
        assert_eq!(live, "10.0.0.1:1: live, found by its query, heard 3 s ago, 0.40 ms");
        let silent = line(json!({
            "address": "10.0.0.2:1", "found_by": "broadcast", "state": "silent",
            "silent_since": 1000.0, "last_heard": 880.0,
        }));
        assert_eq!(silent, "10.0.0.2:1: silent for 3 min, found by hello, heard 5 min ago");
        let unheard = json!({"address": "10.0.0.3:1", "found_by": "flag", "state": "unheard"});
        assert_eq!(line(unheard.clone()), "10.0.0.3:1: never heard, found by --peer");
        let far = line(json!({
            "address": "192.0.2.1:1", "found_by": "tracker", "id": "desk", "last_heard": 1177.0,
            "narinfo_seconds": 0.0011,
        }));
        assert_eq!(far, "192.0.2.1:1 (desk): found by tracker, heard 3 s ago, 1.10 ms");
        let shown = shown(&json!({"time": 1180.0, "peers": [unheard]}));
        assert!(shown.contains("\n  10.0.0.3:1: never heard, "), "{shown}");
    }
}
