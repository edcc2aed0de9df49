//! The name of a tracker, which does not depend on how its URL is written.

use ureq::http::Uri;

/// Identifies a tracker where keys and tags are derived: host and port of its URL, as
/// `tracker.example.org:12305`. The host is in lower case and the port is always present, so
/// different spellings of a URL give the same name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrackerName(String);

impl TrackerName {
    /// Returns the name of the tracker at `url`: the whole text if that is not a valid URL.
    pub fn of_url(url: &str) -> TrackerName {
        let Ok(uri) = url.parse::<Uri>() else { return TrackerName(url.to_owned()) };
        let default = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        let host = uri.host().unwrap_or_default().to_ascii_lowercase();
        TrackerName(format!("{host}:{}", uri.port_u16().unwrap_or(default)))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tracker_name_is_host_and_port_of_url() {
        for (url, name) in [
            ("http://Tracker.example:12305", "tracker.example:12305"),
            ("https://tracker.example", "tracker.example:443"),
            ("http://tracker.example/path", "tracker.example:80"),
            ("http://[2001:db8::1]:9", "[2001:db8::1]:9"),
        ] {
            assert_eq!(TrackerName::of_url(url).as_str(), name);
        }
    }
}
