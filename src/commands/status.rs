//! `peerix status`: prints the daemon's status as text or JSON.

use super::report::{print, say};
use super::{
    EXIT_NO, EXIT_YES, RunningDaemon, found_by, list, long, moment, peer_state, short, text,
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

/// The status as text, in sections with an empty line between them.
fn shown(status: &Value) -> String {
    let sections =
        [node(status), peers(status), transfers(status), totals(status), lookups(status)];
    let line = |line: &String| clean(line) + "\n";
    sections.map(|lines| lines.iter().map(line).collect::<String>()).join("\n")
}

/// Lines on this node, its problems, its trackers, its addresses outside and its friends.
fn node(status: &Value) -> Vec<String> {
    let (node, now) = (&status["node"], moment(status));
    let (name, version, mode) = (text(&node["name"]), text(&node["version"]), text(&node["mode"]));
    let up = long(number(&node["uptime_seconds"]));
    let mut lines = vec![
        format!("{name}: peerix {version}, mode {mode}, port {}, up {up}", node["port"]),
        text(&node["shares"]).to_owned(),
    ];
    let problems = list(&status["health"]["problems"]).iter();
    lines.extend(problems.map(|problem| format!("! {}", text(&problem["text"]))));
    for tracker in list(&status["trackers"]) {
        let reached = match tracker["reached"].as_bool() {
            Some(true) => "reached",
            Some(false) => "not reached",
            None => "not heard of yet",
        };
        lines.push(format!("tracker {}: {reached}", text(&tracker["url"])));
    }
    for (name, what) in [("outside", "outside"), ("pinhole", "by IPv6")] {
        let at = status["port_mapping"][name].as_str();
        lines.extend(at.map(|at| format!("reached {what} at {at}")));
    }
    lines.extend(list(&status["friends"]).iter().map(|friend| friend_line(friend, now)));
    lines
}

fn peers(status: &Value) -> Vec<String> {
    let (peers, now) = (list(&status["peers"]), moment(status));
    let omitted = status["peers_omitted"].as_u64().unwrap_or_default();
    let mut lines = vec![format!("peers: {}", peers.len() as u64 + omitted)];
    for peer in peers {
        lines.push(format!("  {}", peer_line(peer, now)));
        if let Some(end) = peer["avoided"]["until"].as_f64() {
            let reason = text(&peer["avoided"]["reason"]);
            lines.push(format!("    avoided for {}: {reason}", long(end - now)));
        }
    }
    lines
}

fn transfers(status: &Value) -> Vec<String> {
    let transfers = list(&status["transfers"]);
    let mut lines = vec![format!("transfers: {}", transfers.len())];
    for transfer in transfers {
        let (done, size) = (bytes(&transfer["bytes"]), bytes(&transfer["size"]));
        let (way, name) = (text(&transfer["direction"]), text(&transfer["name"]));
        lines.push(format!("  {way:3} {done} of {size}, {name}, {}", text(&transfer["peer"])));
    }
    lines
}

fn totals(status: &Value) -> Vec<String> {
    let mut lines = vec!["totals".into()];
    for (when, title) in [("start", "since the start"), ("installation", "since installation")] {
        let totals = &status["totals"][when];
        if totals.is_object() {
            let (hits, misses) = (&totals["hits"], &totals["misses"]);
            let (lan, wan) =
                (bytes(&totals["received_lan_bytes"]), bytes(&totals["received_wan_bytes"]));
            let sent = [&totals["sent_lan_bytes"], &totals["sent_wan_bytes"]]
                .map(|bytes| bytes.as_u64().unwrap_or_default());
            let sent = super::bytes(sent[0].saturating_add(sent[1]));
            lines.push(format!(
                "  {title}: {hits} hits, {misses} misses; {lan} from the LAN, {wan} from further; {sent} sent"
            ));
            let saved = long(number(&totals["upstream_seconds"]));
            lines.push(format!("    which upstream would have taken some {saved}"));
        }
    }
    lines
}

fn lookups(status: &Value) -> Vec<String> {
    let lookups = list(&status["lookups"]);
    let mut lines = vec![format!("last lookups: {}", lookups.len())];
    for lookup in lookups.iter().take(MAX_LOOKUPS) {
        let (hash_part, name) = (text(&lookup["hash_part"]), lookup["name"].as_str());
        let (result, came) = match lookup["hit"] == true {
            true => ("hit ", text(&lookup["peer"])),
            false => ("miss", text(&lookup["miss"]["text"])),
        };
        let elapsed = short(number(&lookup["seconds"]));
        lines.push(format!("  {result} {hash_part}-{} {elapsed}: {came}", name.unwrap_or("?")));
    }
    lines
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

/// A peer's address, how it was found, its state, and its traffic.
fn peer_line(peer: &Value, now: f64) -> String {
    let id = peer["id"].as_str().map(|id| format!(" ({id})")).unwrap_or_default();
    let trip = peer["round_trip_seconds"].as_f64().or_else(|| peer["narinfo_seconds"].as_f64());
    let facts = [
        peer_state(peer, now),
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
