//! Addresses of the host names that trackers hand out for peers. A name server may take its time:
//! it is asked in threads of their own, and what it said is remembered.

use crate::wire::tracker::can_be_peer;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, ToSocketAddrs};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Names remembered.
const MAX_NAMES: usize = 1024;
/// And so long: addresses at home change daily.
const REMEMBERED: Duration = Duration::from_secs(300);
/// A name that has no address is asked for again after this.
const FAILED_FOR: Duration = Duration::from_secs(30);
/// Asked for at once. A name server that hangs keeps each for some 10 to 30 s.
const MAX_ASKED: usize = 8;

/// Shared by all threads.
#[derive(Default)]
pub struct NameResolver {
    table: Mutex<NameTable>,
    changed: Condvar,
}

#[derive(Default)]
struct NameTable {
    known: HashMap<String, (Option<IpAddr>, Instant)>,
    asked: HashSet<String>,
}

impl NameTable {
    /// `None` if it is not known; else what it is, if anything.
    fn get(&self, name: &str, now: Instant) -> Option<Option<IpAddr>> {
        let (address, at) = self.known.get(name)?;
        let lasts = if address.is_some() { REMEMBERED } else { FAILED_FOR };
        (now.saturating_duration_since(*at) < lasts).then_some(*address)
    }

    fn keep(&mut self, name: &str, address: Option<IpAddr>, now: Instant) {
        if self.known.len() >= MAX_NAMES {
            self.known.retain(|_, (_, at)| now.saturating_duration_since(*at) < FAILED_FOR);
            if self.known.len() >= MAX_NAMES {
                self.known.clear();
            }
        }
        self.known.insert(name.to_owned(), (address, now));
    }
}

impl NameResolver {
    /// The address of each of these names, as far as it is known by `until`.
    pub fn addresses(self: &Arc<Self>, names: &[&str], until: Instant) -> Vec<Option<IpAddr>> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        for name in names {
            let is_wanted =
                table.get(name, Instant::now()).is_none() && !table.asked.contains(*name);
            // Without a thread it is asked for by the next lookup.
            if is_wanted && table.asked.len() < MAX_ASKED && self.ask((*name).to_owned()) {
                table.asked.insert((*name).to_owned());
            }
        }
        let unknown = |table: &mut NameTable| {
            names.iter().any(|name| {
                table.asked.contains(*name) && table.get(name, Instant::now()).is_none()
            })
        };
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(table, left, unknown);
        let table = waited.unwrap_or_else(PoisonError::into_inner).0;
        names.iter().map(|name| table.get(name, Instant::now()).flatten()).collect()
    }

    /// Begins to resolve a name, whose result waits for the caller to unlock the table. False if
    /// there is no thread for it.
    fn ask(self: &Arc<Self>, name: String) -> bool {
        let names = self.clone();
        let spawned = thread::Builder::new().name("names".into()).spawn(move || {
            let found = (&*name, 0).to_socket_addrs();
            let address =
                found.ok().and_then(|mut all| all.find(|address| can_be_peer(address.ip())));
            names.learn(&name, address.map(|address| address.ip().to_canonical()));
        });
        spawned.inspect_err(|e| log::debug!("resolving a name: {e}")).is_ok()
    }

    fn learn(&self, name: &str, address: Option<IpAddr>) {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        table.asked.remove(name);
        table.keep(name, address, Instant::now());
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_this_machine_is_no_peer() {
        let names = Arc::new(NameResolver::default());
        let until = Instant::now() + Duration::from_secs(60);
        assert_eq!(names.addresses(&["localhost"], until), [None]);
        assert_eq!(names.table.lock().unwrap().known.len(), 1);
    }

    #[test]
    fn what_is_known_is_not_asked_for_again_until_it_is_old() {
        let (mut table, now) = (NameTable::default(), Instant::now());
        let address = IpAddr::from([203, 0, 113, 1]);
        table.keep("a", Some(address), now);
        table.keep("b", None, now);
        assert_eq!(table.get("a", now), Some(Some(address)));
        assert_eq!(table.get("b", now), Some(None));
        assert_eq!(table.get("c", now), None);
        assert_eq!(table.get("b", now + FAILED_FOR), None);
        assert_eq!(table.get("a", now + FAILED_FOR), Some(Some(address)));
        assert_eq!(table.get("a", now + REMEMBERED), None);
        for i in 0..3 * MAX_NAMES {
            table.keep(&i.to_string(), None, now);
        }
        assert!(table.known.len() <= MAX_NAMES);
    }

    #[test]
    fn one_that_is_asked_for_is_waited_for_until_the_deadline() {
        let names = Arc::new(NameResolver::default());
        names.table.lock().unwrap().asked.insert("slow.invalid".into());
        assert_eq!(
            names.addresses(&["slow.invalid"], Instant::now() + Duration::from_millis(20)),
            [None]
        );
        let waiting = names.clone();
        let thread = thread::spawn(move || {
            waiting.addresses(&["slow.invalid"], Instant::now() + Duration::from_secs(60))
        });
        names.learn("slow.invalid", Some(IpAddr::from([203, 0, 113, 1])));
        assert_eq!(thread.join().unwrap(), [Some(IpAddr::from([203, 0, 113, 1]))]);
    }
}
