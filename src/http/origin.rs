//! Refuses requests that web pages make. A browser on this machine connects from loopback, as Nix
//! does, but on behalf of pages from anywhere.
//!
//! With DNS rebinding, a page changes its name's address to 127.0.0.1 after it was loaded, and can
//! then read every response. Its requests carry that name in `Host`. So loopback is served only
//! under names to which nobody else can give an address: IP addresses, `localhost`, and names that
//! this machine's `/etc/hosts` gives a loopback address.
//!
//! Other machines may use any name, because trackers name peers and people name caches. Browsers
//! there are recognized by header fields that other clients do not send.

use super::Request;
use crate::bounded_map::BoundedMap;
use crate::lock::Mutex;
use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::LazyLock;

/// File in which an operator may give 127.0.0.1 other names.
const HOSTS_FILE: &str = "/etc/hosts";

/// Bytes of the file that are read, the rest being ignored. Files that block advertisers have 1 MB.
const MAX_HOSTS: u64 = 4 << 20;

/// Names whose result is cached, so that the file is not read for every request. At the bound, the
/// oldest is dropped. An operator uses few.
const MAX_NAMES: usize = 16;

/// Longest name in DNS, in bytes. A longer one is never an own name.
const MAX_NAME: usize = 253;

/// Header fields that browsers send and a page cannot suppress. Nix, curl, ureq and Python's
/// clients do not send them.
const BROWSER_FIELDS: [&str; 3] = ["accept-language", "origin", "sec-fetch-site"];

/// Whether the request has a header field that only browsers send.
pub(super) fn is_browser(request: &Request<'_>) -> bool {
    BROWSER_FIELDS.iter().any(|mark| request.has(mark))
}

/// Returns why a request from this machine may come from another server's web page, or `None` if it
/// does not. `is_page` says that the resource is for people, so that other pages may link to it.
/// May read `/etc/hosts`.
pub(super) fn suspicion(request: &Request<'_>, is_page: bool) -> Option<String> {
    if let Some(host) = request.field("host")
        && !check_own_name(host, Path::new(HOSTS_FILE))
    {
        return Some(format!("Host {host}"));
    }
    // Browsers send `Origin` with requests whose response a page may read, and `null` for a page
    // that has none.
    let host = request.field("host");
    let own = |origin: &str| origin.strip_prefix("http://").is_some_and(|name| Some(name) == host);
    if request.field("origin").is_some_and(|origin| !own(origin)) {
        return Some("a page of another server".into());
    }
    // Browsers send this with requests of a page to another server. Following a link is harmless,
    // because the page cannot read the response.
    let of_other_page = request
        .field("sec-fetch-site")
        .is_some_and(|site| matches!(site, "cross-site" | "same-site"));
    let is_link = is_page && request.field("sec-fetch-mode") == Some("navigate");
    (of_other_page && !is_link).then(|| "a page of another server".into())
}

/// Whether [`suspicion`] would have to read `/etc/hosts` for this request.
pub(super) fn needs_hosts_file(request: &Request<'_>) -> bool {
    request.field("host").is_some_and(|host| !is_number_or_localhost(without_port(host)))
}

/// Whether a `Host` value names this machine and nobody else can give the name an address.
fn check_own_name(host: &str, hosts: &Path) -> bool {
    let name = without_port(host);
    is_number_or_localhost(name)
        || (name.len() <= MAX_NAME && look_up_loopback(hosts, name).unwrap_or(false))
}

fn is_number_or_localhost(name: &str) -> bool {
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    // An IP address needs no DNS. Browsers resolve `localhost` to loopback (RFC 6761, section 6.3).
    // The unspecified address also reaches loopback, but browsers send no `Sec-Fetch-Site` to it,
    // and no client but pages that attack local servers uses it.
    address.parse::<IpAddr>().is_ok_and(|ip| !ip.to_canonical().is_unspecified())
        || name.eq_ignore_ascii_case("localhost")
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

/// Whether a file like `/etc/hosts` gives the name loopback addresses only, and at least one.
fn look_up_loopback(hosts: &Path, name: &str) -> io::Result<bool> {
    static HOSTS_CACHE: LazyLock<Mutex<HostsCache>> = LazyLock::new(Mutex::default);
    let file = File::open(hosts)?;
    HOSTS_CACHE.lock().look_up_cached(&file, name)
}

/// Results of earlier lookups in one version of the file.
#[derive(Default)]
struct HostsCache {
    /// Device, inode, size in bytes, and modification time in seconds and nanoseconds.
    file: [i64; 5],
    names: BoundedMap<String, bool, MAX_NAMES>,
}

impl HostsCache {
    fn look_up_cached(&mut self, hosts: &File, name: &str) -> io::Result<bool> {
        let (name, meta) = (name.to_ascii_lowercase(), hosts.metadata()?);
        let file = [
            meta.dev() as i64,
            meta.ino() as i64,
            meta.len() as i64,
            meta.mtime(),
            meta.mtime_nsec(),
        ];
        if self.file != file {
            *self = HostsCache { file, ..HostsCache::default() };
        }
        if let Some(is_loopback) = self.names.get(&name) {
            return Ok(*is_loopback);
        }
        let is_loopback = look_up(hosts, &name)?;
        self.names.insert(name, is_loopback);
        Ok(is_loopback)
    }
}

/// Reads the file and returns whether it gives the name, in lower case, loopback addresses only.
fn look_up(hosts: &File, name: &str) -> io::Result<bool> {
    let mut bytes = Vec::new();
    hosts.take(MAX_HOSTS).read_to_end(&mut bytes)?;
    bytes.make_ascii_lowercase();
    // Comments may be in any encoding.
    let text = String::from_utf8_lossy(&bytes);
    // Parsing each of 80,000 lines takes ten times as long.
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
    fn browser_fields_identify_browsers_only() {
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
    fn own_names_are_numbers_localhost_and_loopback_in_hosts() {
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
            assert!(check_own_name(host, &hosts), "{host}");
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
            "0.0.0.0:12304",
            "0.0.0.0",
            "[::]:12304",
            "[::ffff:0.0.0.0]",
            "[::1",
        ] {
            assert!(!check_own_name(host, &hosts), "{host}");
        }
        fs::remove_file(&hosts).unwrap();
        assert!(!check_own_name("desk", &hosts), "no such file");
    }

    /// Regression test: with a file of 80,000 lines, each request under a name took 32 ms.
    #[test]
    fn hosts_file_is_read_once_per_name_and_after_replacement() {
        let hosts = std::env::temp_dir().join(format!("peerix-hosts-once-{}", std::process::id()));
        fs::write(&hosts, "127.0.0.1 desk\n").unwrap();
        let mut remembered = HostsCache::default();
        // The file's position is at its end after the first read, so a second read would find
        // nothing.
        let file = File::open(&hosts).unwrap();
        let mut ask = |file: &File, name: &str| remembered.look_up_cached(file, name).unwrap();
        assert!(ask(&file, "desk") && ask(&file, "DESK") && !ask(&file, "other"));
        // Names of strangers displace the entry only until the next request.
        (0..100).for_each(|number| assert!(!ask(&file, &format!("{number}.evil.example"))));
        assert!(ask(&File::open(&hosts).unwrap(), "desk"));
        // Editors replace the file by another one.
        let new = hosts.with_extension("new");
        fs::write(&new, "10.0.0.1 desk\n").unwrap();
        fs::rename(&new, &hosts).unwrap();
        assert!(!ask(&File::open(&hosts).unwrap(), "desk"));
        fs::remove_file(&hosts).unwrap();
    }

    #[test]
    fn requests_of_other_servers_pages_are_suspect() {
        let sought = |fields: &str| with(fields, |request| suspicion(request, false));
        let suspect = |fields: &str| {
            // A request that is suspect for a page is suspect for every other resource.
            let told = with(fields, |request| suspicion(request, true));
            assert!(told.is_none() || sought(fields).is_some());
            told
        };
        // Nix, curl and Prometheus, and a client without `Host`, which is no browser.
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
        // Regression test: a hidden frame made this machine look paths up.
        assert!(sought(&format!("{own} cross-site\r\nSec-Fetch-Mode: navigate\r\n")).is_some());
        assert!(suspect(&format!("{own} cross-site\r\nSec-Fetch-Mode: no-cors\r\n")).is_some());
        // Another port of this machine.
        assert!(suspect(&format!("{own} same-site\r\nSec-Fetch-Mode: cors\r\n")).is_some());
        assert_eq!(suspect("Host: evil.example\r\n").as_deref(), Some("Host evil.example"));
        // Browsers send no `Sec-Fetch-Site` to this address, which reaches loopback.
        assert!(suspect("Host: 0.0.0.0:12304\r\n").is_some());
        let own = "Host: 127.0.0.1:12304\r\nOrigin:";
        assert_eq!(suspect(&format!("{own} http://127.0.0.1:12304\r\n")), None);
        for origin in ["https://evil.example", "http://127.0.0.1:80", "null", ""] {
            assert!(suspect(&format!("{own} {origin}\r\n")).is_some(), "{origin}");
        }
        for origin in ["http://127.0.0.1:12304", "https://evil.example", "null"] {
            assert!(suspect(&format!("Origin: {origin}\r\n")).is_some(), "{origin} without Host");
        }
    }
}
