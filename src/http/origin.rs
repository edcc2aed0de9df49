//! Keeps web pages out. A browser on this machine connects from loopback like Nix does, on behalf
//! of pages from anywhere.
//!
//! A page whose name's address is changed to 127.0.0.1 after it was loaded (DNS rebinding) may read
//! whatever is answered there; what gives it away is the `Host` field, which has that name. So from
//! loopback only names are served that nobody else can give an address to: numbers, `localhost`,
//! and what this machine's own `/etc/hosts` says is loopback.
//!
//! Other machines may ask under any name, as trackers name peers and people caches. Browsers there
//! are known by what they say beside.

use super::Request;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// Where an operator may have named 127.0.0.1 otherwise.
const HOSTS: &str = "/etc/hosts";

/// As much of it as is read: those that list advertisers have 1 MB. It is read only for a name that
/// is no number.
const MAX_HOSTS: u64 = 4 << 20;

/// Names of which it is remembered what the file says, so that it is not read for every request; an
/// operator gives a few.
const MAX_NAMES: usize = 16;

/// DNS has no longer names.
const MAX_NAME: usize = 253;

/// Fields of browsers that a page cannot keep them from sending. Nix, curl, ureq, and Python's
/// clients have none of them.
const MARKS: [&str; 3] = ["accept-language", "origin", "sec-fetch-site"];

/// Whether a browser made a request, as far as browsers tell.
pub(super) fn is_browser(request: &Request<'_>) -> bool {
    MARKS.iter().any(|mark| request.has(mark))
}

/// Whether a request from this machine is to be refused, because a web page from elsewhere may have
/// made it; says what is wrong with it. `is_page`: what is asked for is for people, and other pages
/// may have a link to it.
pub(super) fn is_suspect(request: &Request<'_>, is_page: bool) -> Option<String> {
    if let Some(host) = request.field("host")
        && !is_own_name(host, Path::new(HOSTS))
    {
        return Some(format!("Host {host}"));
    }
    // What a browser says of a page that asks another server than its own. Following a link is
    // fine: the page does not see what comes.
    let of_other_page = request
        .field("sec-fetch-site")
        .is_some_and(|site| matches!(site, "cross-site" | "same-site"));
    let is_link = is_page && request.field("sec-fetch-mode") == Some("navigate");
    (of_other_page && !is_link).then(|| "a page of another server".into())
}

/// Whether a file has to be read to tell whether a request from this machine is suspect.
pub(super) fn is_under_a_name(request: &Request<'_>) -> bool {
    request.field("host").is_some_and(|host| !is_number_or_localhost(without_port(host)))
}

/// Whether a `Host` field's value names this machine, and nobody else can make it do so.
fn is_own_name(host: &str, hosts: &Path) -> bool {
    let name = without_port(host);
    is_number_or_localhost(name)
        || (name.len() <= MAX_NAME && is_loopback_in(hosts, name).unwrap_or(false))
}

fn is_number_or_localhost(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    // With an address in it, no name was looked up. Browsers, and RFC 6761, keep the other name for
    // loopback.
    address.parse::<IpAddr>().is_ok() || name.eq_ignore_ascii_case("localhost")
}

fn without_port(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|b| b.is_ascii_digit())
                && (name.ends_with(']') || !name.contains(':')) =>
        {
            name
        }
        _ => host,
    };
    name.strip_suffix('.').unwrap_or(name)
}

/// Whether a file like `/etc/hosts` gives the name a loopback address, and no other.
fn is_loopback_in(hosts: &Path, name: &str) -> io::Result<bool> {
    static REMEMBERED: Mutex<HostsCache> =
        Mutex::new(HostsCache { file: [0; 5], names: Vec::new() });
    let file = File::open(hosts)?;
    REMEMBERED.lock().unwrap_or_else(PoisonError::into_inner).is_loopback(&file, name)
}

/// What the file said of which name, while it was this one.
struct HostsCache {
    /// Device, inode, size, and when it was changed.
    file: [i64; 5],
    names: Vec<(String, bool)>,
}

impl HostsCache {
    fn is_loopback(&mut self, hosts: &File, name: &str) -> io::Result<bool> {
        let (name, meta) = (name.to_ascii_lowercase(), hosts.metadata()?);
        let file = [
            meta.dev() as i64,
            meta.ino() as i64,
            meta.len() as i64,
            meta.mtime(),
            meta.mtime_nsec(),
        ];
        if self.file != file {
            *self = HostsCache { file, names: Vec::new() };
        }
        if let Some((_, said)) = self.names.iter().find(|(known, _)| *known == name) {
            return Ok(*said);
        }
        let said = look_up(hosts, &name)?;
        if self.names.len() >= MAX_NAMES {
            self.names.remove(0);
        }
        self.names.push((name, said));
        Ok(said)
    }
}

/// The same, read from the file; of a name in lower case.
fn look_up(hosts: &File, name: &str) -> io::Result<bool> {
    let mut bytes = Vec::new();
    hosts.take(MAX_HOSTS).read_to_end(&mut bytes)?;
    bytes.make_ascii_lowercase();
    // Comments may be in any encoding.
    let text = String::from_utf8_lossy(&bytes);
    // To parse all of 80,000 lines takes ten times as long.
    let addresses = text.lines().filter(|line| line.contains(name)).filter_map(|line| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let address: IpAddr = words.next()?.parse().ok()?;
        words.any(|word| word == name).then_some(address)
    });
    let mut addresses = addresses.peekable();
    Ok(addresses.peek().is_some() && addresses.all(|address| address.is_loopback()))
}

#[cfg(test)]
mod tests {
    use super::super::head;
    use super::*;
    use std::fs;

    fn with<T>(fields: &str, then: impl FnOnce(&Request<'_>) -> T) -> T {
        let text = format!("GET / HTTP/1.1\r\n{fields}\r\n");
        head::parse(text.as_bytes(), "127.0.0.1:1".parse().unwrap(), None, |request| {
            then(&request.unwrap())
        })
    }

    #[test]
    fn browsers_are_known_by_what_a_page_cannot_leave_out() {
        let host = "Host: desk.example:12304\r\n";
        for field in [
            "Accept-Language: en",
            "accept-language: ",
            "Origin: null",
            "Sec-Fetch-Site: same-origin",
        ] {
            assert!(with(&format!("{host}{field}\r\n"), is_browser), "{field}");
        }
        for fields in [
            "User-Agent: curl/8.13.0 Nix/2.26.3\r\nAccept: */*\r\nAccept-Encoding: zstd, br, gzip\r\n",
            "User-Agent: Python/3.11 aiohttp/3.8.4\r\nAccept: */*\r\nAccept-Encoding: gzip, deflate\r\n",
            "User-Agent: peerix/0.1.0\r\nX-Peerix-Transfer: a-1\r\nRange: bytes=1-\r\n",
        ] {
            assert!(!with(&format!("{host}{fields}"), is_browser), "{fields}");
        }
    }

    #[test]
    fn names_that_nobody_else_can_point_here() {
        let hosts = std::env::temp_dir().join(format!("peerix-hosts-{}", std::process::id()));
        let text =
            b"# \xfcber\n127.0.0.1 localhost\n127.0.1.1\tdesk.lan desk # cache.example\n10.0.0.7 server\n::1 two\n10.0.0.8 two\n";
        fs::write(&hosts, text).unwrap();
        for host in [
            "127.0.0.1:12304",
            "127.0.0.1",
            "127.0.0.1.",
            "127.8.8.8:1",
            "localhost:12304",
            "LocalHost",
            "localhost.",
            "[::1]:12304",
            "[::1]",
            "192.168.1.7:12304",
            "desk:12304",
            "DESK.lan",
        ] {
            assert!(is_own_name(host, &hosts), "{host}");
        }
        for host in [
            "",
            ":12304",
            "evil.example",
            "evil.example:12304",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "127.0.0.1@evil.example",
            "evil.localhost.example",
            "cache.example",
            "server",
            "two",
            "desk:12304:80",
            "[::1",
        ] {
            assert!(!is_own_name(host, &hosts), "{host}");
        }
        fs::remove_file(&hosts).unwrap();
        assert!(!is_own_name("desk", &hosts), "no such file");
    }

    /// Of 80,000 lines each request under a name took 32 ms.
    #[test]
    fn the_file_is_read_once_for_a_name_and_again_when_it_is_another() {
        let hosts = std::env::temp_dir().join(format!("peerix-hosts-once-{}", std::process::id()));
        fs::write(&hosts, "127.0.0.1 desk\n").unwrap();
        let mut remembered = HostsCache { file: [0; 5], names: Vec::new() };
        // What is read from a file is not read from it again: there is nothing more to come.
        let file = File::open(&hosts).unwrap();
        let mut ask = |file: &File, name: &str| remembered.is_loopback(file, name).unwrap();
        assert!(ask(&file, "desk") && ask(&file, "DESK") && !ask(&file, "other"));
        // Nobody's names push it out for longer than until it is asked for again.
        (0..100).for_each(|number| assert!(!ask(&file, &format!("{number}.evil.example"))));
        assert!(ask(&File::open(&hosts).unwrap(), "desk"));
        // An editor puts another file in its place.
        let new = hosts.with_extension("new");
        fs::write(&new, "10.0.0.1 desk\n").unwrap();
        fs::rename(&new, &hosts).unwrap();
        assert!(!ask(&File::open(&hosts).unwrap(), "desk"));
        assert!(remembered.names.len() <= MAX_NAMES);
        fs::remove_file(&hosts).unwrap();
    }

    #[test]
    fn pages_of_other_servers_get_nothing() {
        let sought = |fields: &str| with(fields, |request| is_suspect(request, false));
        let suspect = |fields: &str| {
            // Whatever a page must not have, it must not make this machine look for either.
            let told = with(fields, |request| is_suspect(request, true));
            assert!(told.is_none() || sought(fields).is_some());
            told
        };
        // Nix, curl, Prometheus; somebody without a Host, who is no browser.
        assert_eq!(
            suspect("Host: 127.0.0.1:12304\r\nUser-Agent: curl/8.13.0 Nix/2.26.3\r\n"),
            None
        );
        assert_eq!(suspect(""), None);
        let own = "Host: 127.0.0.1:12304\r\nSec-Fetch-Site:";
        assert_eq!(suspect(&format!("{own} none\r\nSec-Fetch-Mode: navigate\r\n")), None);
        assert_eq!(suspect(&format!("{own} same-origin\r\nSec-Fetch-Mode: cors\r\n")), None);
        assert_eq!(
            suspect(&format!("{own} cross-site\r\nSec-Fetch-Mode: navigate\r\n")),
            None,
            "a link"
        );
        // A frame that nobody sees made this machine look paths up.
        assert!(sought(&format!("{own} cross-site\r\nSec-Fetch-Mode: navigate\r\n")).is_some());
        assert!(suspect(&format!("{own} cross-site\r\nSec-Fetch-Mode: no-cors\r\n")).is_some());
        // Another port of this machine.
        assert!(suspect(&format!("{own} same-site\r\nSec-Fetch-Mode: cors\r\n")).is_some());
        assert_eq!(suspect("Host: evil.example\r\n").as_deref(), Some("Host evil.example"));
    }
}
