//! `Range` (RFC 9110, section 14): single byte ranges. Several ranges at once, and units other than
//! bytes, are answered with the whole, as the RFC allows.

use std::ops::Range;

/// What to send of a representation.
#[derive(Debug, PartialEq, Eq)]
pub enum RequestedRange {
    /// 200: everything.
    Whole,
    /// 206: these bytes, never none.
    Bytes(Range<u64>),
    /// 416: the range begins behind the end.
    Unsatisfiable,
}

/// What the field's value asks for, of `size` bytes.
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
    // More digits than fit mean a place behind every end.
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
    fn every_form_of_range() {
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
