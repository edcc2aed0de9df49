//! Resolves the host names of peers that trackers name, and of peers that announce themselves at a
//! tracker. A name server may be slow, so each name is resolved in its own thread, and results are
//! cached.

use crate::bounded_map::BoundedMap;
use crate::lock::{Condvar, Mutex};
use crate::wire::tracker::can_be_peer;
use std::collections::HashSet;
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Largest number of cached names. When it is reached, the oldest result is dropped.
const MAX_NAMES: usize = 1024;
/// Lifetime of a cached address: home connections change theirs daily.
const ADDRESS_TTL: Duration = Duration::from_secs(300);
/// Lifetime of a failed lookup, after which the name is resolved again.
const FAILURE_TTL: Duration = Duration::from_secs(30);
/// Largest number of concurrent lookups; further names wait for their turn. A hanging name server
/// blocks each for about 10 to 30 s.
const MAX_LOOKUPS: usize = 32;
/// Largest number of concurrent lookups for one list of names, so that hosts whose name servers
/// hang leave room for other lists.
const MAX_LOOKUPS_PER_CALL: usize = 8;

/// Finds the addresses of a host name. Blocks for as long as a name server takes.
type NameLookup = dyn Fn(&str) -> Vec<IpAddr> + Send + Sync;

/// Resolver with a cache; shared by all threads.
pub struct NameResolver {
    table: Mutex<NameTable>,
    changed: Condvar,
    look_up: Box<NameLookup>,
}

impl Default for NameResolver {
    /// Creates a resolver that asks the system's one.
    fn default() -> Self {
        NameResolver::new(|name| {
            let found = (name, 0).to_socket_addrs();
            found.map(|all| all.map(|address| address.ip()).collect()).unwrap_or_default()
        })
    }
}

/// Parses an IP address in the forms in which trackers name one, with or without brackets.
pub fn parse_address(addr: &str) -> Option<IpAddr> {
    let bare = addr.trim_start_matches('[').trim_end_matches(']');
    bare.parse().ok().map(|ip: IpAddr| ip.to_canonical())
}

#[derive(Default)]
struct NameTable {
    cached: BoundedMap<String, (Option<IpAddr>, Instant), MAX_NAMES>,
    in_flight: HashSet<String>,
}

impl NameTable {
    /// Cached result of a name. The outer `None` means unknown, the inner one that the name has no
    /// address.
    fn get(&self, name: &str, now: Instant) -> Option<Option<IpAddr>> {
        let (address, at) = self.cached.get(name)?;
        let lasts = if address.is_some() { ADDRESS_TTL } else { FAILURE_TTL };
        (now.saturating_duration_since(*at) < lasts).then_some(*address)
    }
}

impl NameResolver {
    /// Creates a resolver that asks `look_up`.
    pub fn new(look_up: impl Fn(&str) -> Vec<IpAddr> + Send + Sync + 'static) -> Self {
        let (table, changed) = Default::default();
        NameResolver { table, changed, look_up: Box::new(look_up) }
    }

    /// Returns the address of each name, the inner `None` if it has none that a peer can have. The
    /// outer one means that nothing is known at `deadline`. Blocks until `deadline` at most.
    pub fn addresses(
        self: &Arc<Self>,
        names: &[&str],
        deadline: Instant,
    ) -> Vec<Option<Option<IpAddr>>> {
        let mut all = vec![None; names.len()];
        self.resolve(names, deadline, |at, address| all[at] = Some(address));
        all
    }

    /// Calls `found` with the index and the address of each name as soon as it is known, with
    /// `None` if the name has no address that a peer can have. Names that are not known at
    /// `deadline` are left out. Blocks until `deadline` at most.
    pub fn resolve(
        self: &Arc<Self>,
        names: &[&str],
        deadline: Instant,
        mut found: impl FnMut(usize, Option<IpAddr>),
    ) {
        let mut unknown: Vec<usize> = (0..names.len()).collect();
        // Names whose lookups this call started.
        let mut asked: Vec<&str> = Vec::new();
        let mut table = self.table.lock();
        loop {
            let now = Instant::now();
            let mut known = Vec::new();
            unknown.retain(|at| match table.get(names[*at], now) {
                Some(address) => {
                    known.push((*at, address));
                    false
                }
                None => true,
            });
            asked.retain(|name| table.in_flight.contains(*name));
            for name in unknown.iter().map(|at| names[*at]) {
                if table.in_flight.len() >= MAX_LOOKUPS || asked.len() >= MAX_LOOKUPS_PER_CALL {
                    break;
                }
                // Without a thread, the next call tries again.
                if !table.in_flight.contains(name) && self.ask(name.to_owned()) {
                    table.in_flight.insert(name.to_owned());
                    asked.push(name);
                }
            }
            if !known.is_empty() {
                drop(table);
                known.into_iter().for_each(|(at, address)| found(at, address));
                table = self.table.lock();
            } else if unknown.is_empty() || table.in_flight.is_empty() || now >= deadline {
                return;
            } else {
                table = self.changed.wait_timeout(table, deadline - now);
            }
        }
    }

    /// Starts a thread that resolves `name`. The thread stores its result once the caller unlocks
    /// the table. Returns false if the system cannot create a thread.
    fn ask(self: &Arc<Self>, name: String) -> bool {
        let names = self.clone();
        let spawned = thread::Builder::new().name("names".into()).spawn(move || {
            let address = (names.look_up)(&name).into_iter().find(|ip| can_be_peer(*ip));
            names.record_result(&name, address.map(|ip| ip.to_canonical()));
        });
        spawned.is_ok()
    }

    fn record_result(&self, name: &str, address: Option<IpAddr>) {
        let mut table = self.table.lock();
        table.in_flight.remove(name);
        table.cached.insert(name.to_owned(), (address, Instant::now()));
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_of_loopback_address_has_no_address() {
        let names = Arc::new(NameResolver::default());
        let deadline = Instant::now() + Duration::from_secs(60);
        assert_eq!(names.addresses(&["localhost"], deadline), [Some(None)]);
        assert_eq!(names.table.lock().cached.used(), 1);
    }

    #[test]
    fn cached_name_expires_after_lifetime() {
        let (mut table, now) = (NameTable::default(), Instant::now());
        let address = IpAddr::from([203, 0, 113, 1]);
        table.cached.insert("a".into(), (Some(address), now));
        table.cached.insert("b".into(), (None, now));
        assert_eq!(table.get("a", now), Some(Some(address)));
        assert_eq!(table.get("b", now), Some(None));
        assert_eq!(table.get("c", now), None);
        assert_eq!(table.get("b", now + FAILURE_TTL), None);
        assert_eq!(table.get("a", now + FAILURE_TTL), Some(Some(address)));
        assert_eq!(table.get("a", now + ADDRESS_TTL), None);
    }

    /// Guards against a list whose later names were never asked for.
    #[test]
    fn names_beyond_limit_are_asked_for_as_others_are_known() {
        let names = Arc::new(NameResolver::new(|_| vec![IpAddr::from([203, 0, 113, 1])]));
        let hosts: Vec<String> = (0..100).map(|i| format!("{i}.example")).collect();
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        let found = names.addresses(&hosts, Instant::now() + Duration::from_secs(60));
        assert!(found.iter().all(|found| matches!(found, Some(Some(_)))), "{found:?}");
    }

    /// Guards against a tracker that names hosts whose name servers hang: they hid the names of
    /// all other trackers.
    #[test]
    fn one_list_of_names_that_hang_leaves_room_for_others() {
        let (release, released) = crossbeam_channel::bounded::<()>(0);
        let names = Arc::new(NameResolver::new(move |name| {
            if name != "fast" {
                let _ = released.recv();
            }
            vec![IpAddr::from([203, 0, 113, 1])]
        }));
        let hosts: Vec<String> = (0..64).map(|i| format!("{i}.example")).collect();
        let hosts: Vec<&str> = hosts.iter().map(String::as_str).collect();
        assert_eq!(names.addresses(&hosts, Instant::now()), [None; 64]);
        let found = names.addresses(&["fast"], Instant::now() + Duration::from_secs(60));
        assert!(matches!(found[..], [Some(Some(_))]), "{found:?}");
        drop(release);
    }

    #[test]
    fn lookup_in_progress_is_awaited_until_deadline() {
        let names = Arc::new(NameResolver::default());
        names.table.lock().in_flight.insert("slow.invalid".into());
        assert_eq!(
            names.addresses(&["slow.invalid"], Instant::now() + Duration::from_millis(20)),
            [None]
        );
        let waiting = names.clone();
        let thread = thread::spawn(move || {
            waiting.addresses(&["slow.invalid"], Instant::now() + Duration::from_secs(60))
        });
        names.record_result("slow.invalid", Some(IpAddr::from([203, 0, 113, 1])));
        assert_eq!(thread.join().unwrap(), [Some(Some(IpAddr::from([203, 0, 113, 1])))]);
    }
}
