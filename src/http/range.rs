//! `Range` (RFC 9110, section 14): single byte ranges. Several ranges, other units and malformed
//! values get the whole representation, as section 14.2 allows.

use std::ops::Range;

/// The part of a representation that a request asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestedRange {
    /// All of it: status 200.
    Whole,
    /// These bytes, at least one: status 206.
    Bytes(Range<u64>),
    /// No byte of the range exists: status 416.
    Unsatisfiable,
}

/// Evaluates the value of a `Range` field for a representation of `size` bytes.
pub fn part(field: Option<&str>, size: u64) -> RequestedRange {
    let Some(spec) = field.and_then(|f| f.trim().strip_prefix("bytes=")) else {
        return RequestedRange::Whole;
    };
    let Some((first, last)) = spec.trim().split_once('-') else { return RequestedRange::Whole };
    let (first, last) = (first.trim(), last.trim());
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    if !digits(first) || !digits(last) {
        return RequestedRange::Whole;
    }
    // A number that does not fit in 64 bits lies beyond the end of every representation.
    let number = |text: &str| text.parse().unwrap_or(u64::MAX);
    let range = match (first.is_empty(), last.is_empty()) {
        (true, true) => return RequestedRange::Whole,
        (true, false) => size.saturating_sub(number(last))..size,
        (false, true) => number(first)..size,
        (false, false) if number(first) > number(last) => return RequestedRange::Whole,
        (false, false) => number(first)..size.min(number(last).saturating_add(1)),
    };
    if range.is_empty() { RequestedRange::Unsatisfiable } else { RequestedRange::Bytes(range) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn range_field_selects_part() {
        for (field, expected) in [
            ("bytes=0-", RequestedRange::Bytes(0..100)),
            ("bytes=0-0", RequestedRange::Bytes(0..1)),
            ("bytes=99-", RequestedRange::Bytes(99..100)),
            ("bytes=99-99", RequestedRange::Bytes(99..100)),
            ("bytes=10-19", RequestedRange::Bytes(10..20)),
            ("bytes=10-1000", RequestedRange::Bytes(10..100)),
            ("bytes=-1", RequestedRange::Bytes(99..100)),
            ("bytes=-1000", RequestedRange::Bytes(0..100)),
            ("bytes=5-99999999999999999999999", RequestedRange::Bytes(5..100)),
            ("bytes=100-", RequestedRange::Unsatisfiable),
            ("bytes=99999999999999999999999-", RequestedRange::Unsatisfiable),
            ("bytes=-0", RequestedRange::Unsatisfiable),
            ("bytes=0-0,5-6", RequestedRange::Whole),
            ("bytes=6-5", RequestedRange::Whole),
            ("bytes=-", RequestedRange::Whole),
            ("bytes=a-b", RequestedRange::Whole),
            ("bytes=+1-2", RequestedRange::Whole),
            ("lines=1-2", RequestedRange::Whole),
            ("", RequestedRange::Whole),
        ] {
            assert_eq!(part(Some(field), 100), expected, "{field}");
        }
        assert_eq!(part(None, 100), RequestedRange::Whole);
    }
}
