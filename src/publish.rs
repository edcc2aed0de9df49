//! Maintains the Bloom filter of the paths that this node shares with WAN peers, and publishes it
//! to the trackers. A thread reads the whole store once, and then only new paths.

use crate::access::{AccessPolicy, Scope};
use crate::nix::HashPart;
use crate::peers::announce::Publication;
use crate::store::{Store, StoreError, StoreVersion};
use crate::time_scale::Interval;
use crate::wire::filter::{BloomFilter, MAX_BYTES};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use scopeguard::guard;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// Interval between checks whether the store has changed. A check takes 10 µs.
const CHECK_INTERVAL: Interval = Interval::from_secs(5);
/// Number of paths that are read at once.
const MAX_ROWS: usize = 256;
/// Limit of the removed paths, in percent of the paths in the filter. Beyond, the filter is
/// rebuilt: it still contains removed paths, and peers ask for them in vain.
const MAX_REMOVED_PERCENT: u64 = 10;
/// Limit of the bits per path, in tenths of those that the filter was made with. Below, after the
/// number of paths has grown by a quarter, the filter is rebuilt.
const MIN_SIZE_TENTHS: u64 = 8;
/// Limit of the bits per path, in tenths of a bit. Below, the filter is rebuilt in any case:
/// trackers refuse a filter with 72 % of its bits set, which 9.4 bits per path reach.
const MIN_SIZE_TENTHS_EVER: u64 = 95;
/// Maximum number of paths that wait for the upstream cache to tell whether it has them. Beyond,
/// those that would be asked about last are not published.
const MAX_UNDECIDED: usize = 16 * 1024;
/// Pause between two requests to the upstream cache, so that they cause no more load than a user's
/// updates.
const REQUEST_PAUSE: Duration = Duration::from_millis(20);
/// Time for which the first filter waits for the upstream cache's answers. Without a filter, peers
/// ask this node by HTTP.
const FIRST_FILTER_TIMEOUT: Duration = Duration::from_secs(20);

/// Maximum time that dropping the [`Publisher`] waits for the thread. A thread that waits for the
/// upstream cache is left running.
const JOIN_TIMEOUT: Duration = Duration::from_millis(200);

/// The publishing thread. Dropping it ends the thread and waits for at most 200 ms.
pub struct Publisher {
    running: Option<Sender<()>>,
    ended: Receiver<()>,
}

impl Publisher {
    /// Starts to publish the paths of `store` that `access` allows WAN peers to have. `on_end` runs
    /// when the thread ends, also by a panic.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(
        store: Arc<Store>,
        access: Arc<AccessPolicy>,
        publication: Arc<Publication>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Publisher> {
        let (running, stopped) = bounded(0);
        let reader = RowReader { store, access, stopped };
        let (end, ended) = bounded::<()>(0);
        thread::Builder::new().name("publish".into()).spawn(move || {
            let _end = (guard((), |()| on_end()), end);
            reader.run(&publication);
        })?;
        Ok(Publisher { running: Some(running), ended })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        drop(self.running.take());
        let _ = self.ended.recv_timeout(JOIN_TIMEOUT);
    }
}

/// The filter, and the state of the store from which it was made.
struct PublishedState {
    filter: BloomFilter,
    /// Number of paths in the filter.
    paths: u64,
    /// Number of paths that have been removed from the store since the filter was made.
    removed: u64,
    /// Paths of which only the upstream cache can tell whether they are shared, and when to ask it.
    undecided: BTreeSet<(Instant, HashPart)>,
    /// Bits per path with which the filter was made.
    bits_per_path: u64,
    census: StoreVersion,
}

/// Result of reading rows of the store.
#[derive(Default)]
struct SharedRows {
    count: u64,
    shared: Vec<HashPart>,
    undecided: BTreeSet<(Instant, HashPart)>,
}

struct RowReader {
    store: Arc<Store>,
    access: Arc<AccessPolicy>,
    /// Disconnected when the thread has to end.
    stopped: Receiver<()>,
}

impl RowReader {
    fn run(&self, publication: &Publication) {
        let (mut shared, mut changed) = (None, false);
        let first_filter_deadline = Instant::now() + FIRST_FILTER_TIMEOUT;
        let mut pause = Duration::ZERO;
        while !self.wait_for_stop(pause) {
            pause = CHECK_INTERVAL.get();
            match self.update(&mut shared, publication.bits_per_path()) {
                Ok(has_changed) => changed |= has_changed,
                Err(e) => log::warn!("what would be shared with strangers cannot be told: {e}"),
            }
            let Some(shared) = &mut shared else { continue };
            changed |= self.verify_pending(shared);
            let now = Instant::now();
            let is_decided = shared.undecided.first().is_none_or(|(at, _)| *at > now);
            if changed && (is_decided || now > first_filter_deadline) {
                log::debug!("{} paths would be shared with strangers", shared.paths);
                publication.set(shared.filter.clone());
                changed = false;
            }
        }
    }

    /// Waits for `time`. Returns true at once if the thread has to end.
    fn wait_for_stop(&self, time: Duration) -> bool {
        self.stopped.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
    }

    /// Applies changes of the store to the filter. Returns true if the filter changed. Changes
    /// nothing if the thread has to end.
    fn update(
        &self,
        shared: &mut Option<PublishedState>,
        bits_per_path: u64,
    ) -> Result<bool, StoreError> {
        let census = self.store.census()?;
        let Some(last) = shared else {
            let Some(SharedRows { shared: paths, undecided, .. }) = self.read(0)? else {
                return Ok(false);
            };
            let mut filter =
                BloomFilter::with_bits((paths.len() + undecided.len()) as u64, bits_per_path);
            paths.iter().for_each(|hash_part| {
                filter.insert(hash_part);
            });
            *shared = Some(PublishedState {
                filter,
                paths: paths.len() as u64,
                removed: 0,
                undecided,
                bits_per_path,
                census,
            });
            return Ok(true);
        };
        // A tracker that runs out of memory requests smaller filters.
        if bits_per_path < last.bits_per_path {
            *shared = None;
            return self.update(shared, bits_per_path);
        }
        if last.census.version == census.version {
            return Ok(false);
        }
        let Some(SharedRows { count, shared: paths, undecided }) =
            self.read(last.census.last_id)?
        else {
            return Ok(false);
        };
        let changed =
            paths.iter().fold(false, |changed, hash_part| changed | last.filter.insert(hash_part));
        last.paths += paths.len() as u64;
        last.removed += (last.census.count + count).saturating_sub(census.count);
        last.undecided.extend(undecided);
        while last.undecided.len() > MAX_UNDECIDED {
            last.undecided.pop_last();
        }
        last.census = census;
        let needed =
            last.paths * (last.bits_per_path * MIN_SIZE_TENTHS).max(MIN_SIZE_TENTHS_EVER) / 10;
        let is_full = last.filter.len_bits() < needed.min(8 * MAX_BYTES as u64);
        if is_full || last.removed * 100 > last.paths * MAX_REMOVED_PERCENT && last.removed > 0 {
            *shared = None;
            return self.update(shared, bits_per_path);
        }
        Ok(changed)
    }

    /// Reads the paths after the row `row_id`; `None` if the thread has to end.
    fn read(&self, row_id: i64) -> Result<Option<SharedRows>, StoreError> {
        let (mut rows, mut last_id) = (SharedRows::default(), row_id);
        loop {
            let began = Instant::now();
            let batch = self.store.paths_after(last_id, MAX_ROWS)?;
            let Some((id, _)) = batch.last() else { return Ok(Some(rows)) };
            last_id = *id;
            rows.count += batch.len() as u64;
            for (_, info) in &batch {
                if self.access.allows_now(Scope::Wan, info) {
                    rows.shared.push(info.path.hash_part());
                } else if let Some(at) = self.access.next_upstream_request(info) {
                    rows.undecided.insert((at, info.path.hash_part()));
                    if rows.undecided.len() > MAX_UNDECIDED {
                        rows.undecided.pop_last();
                    }
                }
            }
            // Pauses as long as it worked, to leave half of the processor time to others: checking
            // a signature takes 0.1 ms, and a store may have 100,000 paths.
            if self.wait_for_stop(began.elapsed()) {
                return Ok(None);
            }
        }
    }

    /// Asks the upstream cache about the paths that are due, for at most [`CHECK_INTERVAL`] and one more
    /// request. Returns true if the filter changed.
    fn verify_pending(&self, shared: &mut PublishedState) -> bool {
        let (mut changed, deadline) = (false, Instant::now() + CHECK_INTERVAL.get());
        while let Some(question) =
            shared.undecided.first().copied().filter(|(at, _)| *at <= Instant::now())
        {
            let hash_part = question.1;
            match self.store.path_info(&hash_part) {
                Ok(Some(info)) if self.access.allows(Scope::Wan, &info) => {
                    changed |= shared.filter.insert(&hash_part);
                    shared.paths += 1;
                }
                // The upstream cache lacks the path, or does not answer now.
                Ok(Some(info)) => {
                    shared.undecided.extend(self.access.next_upstream_request(&info).map(|at| {
                        // An immediate retry would fail again.
                        (at.max(Instant::now() + CHECK_INTERVAL.get()), hash_part)
                    }))
                }
                // The path has been removed from the store.
                Ok(None) => {}
                Err(e) => {
                    log::debug!("{hash_part}: {e}");
                    break;
                }
            }
            shared.undecided.remove(&question);
            if Instant::now() > deadline || self.wait_for_stop(REQUEST_PAUSE) {
                break;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Mode};
    use crate::network::{NetworkPolicy, Networks};
    use crate::nix::nix32;
    use crate::store::fixture::Fixture;

    fn digits(i: u32) -> String {
        let digest = ring::digest::digest(&ring::digest::SHA256, &i.to_le_bytes());
        nix32::encode(&digest.as_ref()[..20])
    }

    fn part(i: u32) -> HashPart {
        HashPart::parse(digits(i).as_bytes()).unwrap()
    }

    /// Dropping the returned sender ends the reader.
    fn reader(fixture: &Fixture, config: &Config) -> (RowReader, Sender<()>) {
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let access = Arc::new(AccessPolicy::new(networks, config));
        let (running, stopped) = bounded(0);
        (RowReader { store: Arc::new(fixture.open()), access, stopped }, running)
    }

    fn unverified() -> Config {
        Config { mode: Mode::Wan, verify: false, ..Config::default() }
    }

    fn register(fixture: &Fixture, numbers: std::ops::Range<u32>) {
        numbers.for_each(|i| drop(fixture.register(&digits(i), 120)));
    }

    #[test]
    fn new_paths_are_added_and_an_unchanged_store_is_not_read() {
        let fixture = Fixture::new();
        register(&fixture, 0..600);
        let (reader, _running) = reader(&fixture, &unverified());
        let mut shared = None;
        assert!(reader.update(&mut shared, 16).unwrap());
        assert!(!reader.update(&mut shared, 16).unwrap());
        let has =
            |shared: &Option<PublishedState>, i| shared.as_ref().unwrap().filter.contains(&part(i));
        assert!((0..600).all(|i| has(&shared, i)) && !(600..620).all(|i| has(&shared, i)));
        register(&fixture, 600..620);
        assert!(reader.update(&mut shared, 16).unwrap());
        assert!((0..620).all(|i| has(&shared, i)));
        assert_eq!(shared.unwrap().paths, 620);
    }

    /// Guards against a filter of the first paths that replaces the whole one at the trackers.
    #[test]
    fn paths_read_until_the_thread_has_to_end_are_not_published() {
        let fixture = Fixture::new();
        register(&fixture, 0..2 * MAX_ROWS as u32);
        let (reader, running) = reader(&fixture, &unverified());
        drop(running);
        let mut shared = None;
        assert!(!reader.update(&mut shared, 16).unwrap() && shared.is_none());
    }

    #[test]
    fn filter_is_rebuilt_when_it_is_too_full_or_too_many_paths_are_gone() {
        let fixture = Fixture::new();
        register(&fixture, 0..500);
        let (reader, _running) = reader(&fixture, &unverified());
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        assert_eq!(shared.as_ref().unwrap().filter.as_bytes().len(), 1024);
        register(&fixture, 500..2000);
        reader.update(&mut shared, 16).unwrap();
        assert!(shared.as_ref().unwrap().filter.as_bytes().len() >= 2000 * 16 / 8);
        fixture.execute("delete from ValidPaths where id <= 100");
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_ref().unwrap();
        assert_eq!((last.removed, last.paths), (100, 2000), "a few stay in it");
        fixture.execute("delete from ValidPaths where id <= 1500");
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_ref().unwrap();
        assert_eq!((last.removed, last.paths), (0, 500));
        assert!((0..1500).filter(|i| last.filter.contains(&part(*i))).count() < 30);
    }

    #[test]
    fn withheld_paths_are_not_in_the_filter() {
        let fixture = Fixture::new();
        register(&fixture, 0..20);
        // The default upstream cache signs its paths. These are unsigned, so nothing is asked.
        let config = Config { verify: true, ..unverified() };
        let (reader, _running) = reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_ref().unwrap();
        assert_eq!((last.paths, last.undecided.len()), (0, 0));
        let config = Config { filter_patterns: vec![format!("{}-*", digits(7))], ..unverified() };
        let (reader, _running) = self::reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        assert_eq!(shared.unwrap().paths, 19);
    }

    #[test]
    fn unanswered_upstream_is_asked_again() {
        let fixture = Fixture::new();
        register(&fixture, 0..20);
        let config =
            Config { verify: true, upstream_cache: "http://127.0.0.1:9".into(), ..unverified() };
        let (reader, _running) = reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_mut().unwrap();
        assert_eq!(last.undecided.len(), 20);
        let before = last.undecided.clone();
        assert!(!reader.verify_pending(last));
        assert_eq!((last.paths, last.undecided.len()), (0, 20), "nobody is there");
        assert!(
            last.undecided.iter().all(|(at, _)| *at > Instant::now()),
            "and is asked again at once"
        );
        // A removed path leaves the queue. An unreadable store keeps the path in it.
        fixture.execute("delete from ValidPaths where id <= 5");
        last.undecided = before.clone();
        reader.verify_pending(last);
        assert_eq!(last.undecided.len(), 15);
        last.undecided = before;
        fixture.execute("alter table ValidPaths rename to Elsewhere");
        reader.verify_pending(last);
        assert_eq!(last.undecided.len(), 20);
    }

    #[test]
    fn filter_shrinks_when_trackers_request_fewer_bits() {
        let fixture = Fixture::new();
        register(&fixture, 0..2000);
        let (reader, _running) = reader(&fixture, &unverified());
        let mut shared = None;
        reader.update(&mut shared, 20).unwrap();
        let large = shared.as_ref().unwrap().filter.len_bits();
        assert!(reader.update(&mut shared, 10).unwrap());
        assert!(shared.as_ref().unwrap().filter.len_bits() <= large * 5 / 8);
        assert!(
            !reader.update(&mut shared, 20).unwrap(),
            "it is no larger before it has to be made anew"
        );
    }
}
