//! Formats numbers and texts for people. The page's script formats them in the same way, so that
//! nothing changes when it takes over. `peerix status` uses these functions too.

use std::fmt::Write;

/// Escapes a text for HTML, between tags or in a quoted attribute.
pub(super) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

/// Replaces control characters by spaces, so that the text has one line.
pub(crate) fn line(text: &str) -> String {
    text.replace(|c: char| c.is_control(), " ")
}

/// Formats a number with `digits` digits after the point, 2 at most. Rounds halves up, as the
/// script does.
fn fixed(number: f64, digits: usize) -> String {
    let steps = [1.0, 10.0, 100.0][digits];
    format!("{:.digits$}", (number * steps).round() / steps)
}

/// Formats a size in bytes: `512 B`, `1.5 KiB`, `120 MiB`.
pub fn bytes(count: u64) -> String {
    if count < 1024 {
        return format!("{count} B");
    }
    let (mut number, mut unit) = (count as f64 / 1024.0, 0);
    while number >= 999.5 && unit < 4 {
        number /= 1024.0;
        unit += 1;
    }
    let unit = ["KiB", "MiB", "GiB", "TiB", "PiB"][unit];
    format!("{} {unit}", fixed(number, usize::from(number < 99.95)))
}

/// Formats a short duration in seconds: `0.25 ms`, `12 ms`, `1.5 s`.
pub fn short(seconds: f64) -> String {
    let millis = seconds * 1e3;
    if millis < 9.995 {
        format!("{} ms", fixed(millis, 2))
    } else if millis < 999.5 {
        format!("{} ms", fixed(millis, 0))
    } else {
        format!("{} s", fixed(seconds, 1))
    }
}

/// Formats a long duration in seconds, rounded down: `42 s`, `5 min`, `3 h 12 min`, `4 d 7 h`.
/// Negative durations are `0 s`.
pub fn long(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// Formats a percentage: `75 %`. A dash if `whole` is 0.
pub(super) fn percent(part: u64, whole: u64) -> String {
    if whole == 0 {
        "–".into()
    } else {
        format!("{} %", fixed(part as f64 * 100.0 / whole as f64, 0))
    }
}

/// Formats a count with its noun: `1 peer`, `2 peers`.
pub(super) fn plural(count: u64, one: &str) -> String {
    format!("{count} {one}{}", if count == 1 { "" } else { "s" })
}

/// Describes how a peer was found. `code` is a value of `found_by` in docs/status.md; an unknown
/// one gives `its request`.
pub fn found_by(code: &str) -> &'static str {
    match code {
        "broadcast" => "hello",
        "neighbour-table" => "neighbour table",
        "query" => "its query",
        "answer" => "answer to a broadcast",
        "flag" => "--peer",
        "tracker" => "tracker",
        _ => "its request",
    }
}

/// Converts seconds since 1970 to year, month, day and second of the day, in UTC. Uses Howard
/// Hinnant's `civil_from_days`.
fn civil(seconds: u64) -> (u64, u64, u64, u64) {
    let (days, second) = (seconds / 86400 + 719_468, seconds % 86400);
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day, second)
}

/// Formats a time in seconds since 1970 as a `<time>` element in UTC. The date is left out within a
/// day of `now`.
pub(super) fn moment(unix: f64, now: f64) -> String {
    let (year, month, day, second) = civil(unix.max(0.0) as u64);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut text = String::new();
    let date = format!("{year:04}-{month:02}-{day:02}");
    let clock = format!("{hour:02}:{minute:02}:{second:02}");
    let shown = if (now - unix).abs() < 86400.0 {
        format!("{clock} UTC")
    } else {
        format!("{date} {hour:02}:{minute:02} UTC")
    };
    let _ = write!(text, "<time datetime=\"{date}T{clock}Z\">{shown}</time>");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lan::MetBy;

    #[test]
    fn found_by_describes_every_way_to_meet_a_peer() {
        let ways = [MetBy::Hello, MetBy::NeighbourTable, MetBy::Query, MetBy::Answer, MetBy::Named];
        let words = ways.map(|way| found_by(way.code())).join(", ");
        assert_eq!(words, "hello, neighbour table, its query, answer to a broadcast, --peer");
        assert_eq!(["tracker", "request"].map(found_by), ["tracker", "its request"]);
    }

    #[test]
    fn escape_replaces_all_markup_characters() {
        assert_eq!(escape("<img src=x onerror='a'>"), "&lt;img src=x onerror=&#39;a&#39;&gt;");
        assert_eq!(escape("a\" b=\"&amp;"), "a&quot; b=&quot;&amp;amp;");
    }

    #[test]
    fn sizes_and_durations_are_rounded_for_people() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1536, "1.5 KiB"),
            (102_350, "100 KiB"),
            (1_048_000, "1.0 MiB"),
            (5 << 30, "5.0 GiB"),
            (u64::MAX, "16384 PiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        assert_eq!(
            [0.002125, 0.012, 0.9996, 1.54].map(short),
            ["2.13 ms", "12 ms", "1.0 s", "1.5 s"]
        );
        let all = [-1.0, 59.9, 60.0, 3600.0 * 3.2, 86400.0 * 4.3].map(long);
        assert_eq!(all, ["0 s", "59 s", "1 min", "3 h 12 min", "4 d 7 h"]);
        assert_eq!((percent(3, 4), percent(0, 0)), ("75 %".into(), "–".into()));
        assert_eq!((plural(1, "peer"), plural(0, "peer")), ("1 peer".into(), "0 peers".into()));
    }

    #[test]
    fn moment_shows_the_date_only_if_it_is_another_day() {
        let midnight = 951_782_400.0;
        assert_eq!(
            moment(midnight, midnight),
            "<time datetime=\"2000-02-29T00:00:00Z\">00:00:00 UTC</time>"
        );
        assert_eq!(
            moment(0.0, midnight),
            "<time datetime=\"1970-01-01T00:00:00Z\">1970-01-01 00:00 UTC</time>"
        );
        let last = 4_102_444_799.9;
        assert!(moment(last, last).contains("2099-12-31T23:59:59Z"));
    }
}
