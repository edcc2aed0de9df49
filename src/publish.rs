//! What this node would share with strangers, kept as the filter that trackers get: a thread of its
//! own reads the store once, and after that only what is new.

use crate::access::{AccessPolicy, Scope};
use crate::deferred::Deferred;
use crate::nix::HashPart;
use crate::peers::announce::Publication;
use crate::store::{Store, StoreError, StoreVersion};
use crate::time_scale::Interval;
use crate::wire::filter::{BloomFilter, MAX_BYTES};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use std::{io, thread};

/// How often it is looked whether the store has changed, which costs 10 µs.
const LOOK: Interval = Interval::from_secs(5);
/// Paths read at once.
const BATCH: usize = 256;
/// Once so many in a hundred of the paths that were added are gone, the filter is made anew: what
/// is gone stays in it, and every peer that wants it asks in vain.
const GONE_PERCENT: u64 = 10;
/// A filter is made anew when it has fewer tenths of a bit for each path than this, for each bit
/// that it was made with: its paths have grown by a quarter.
const LEAST_TENTHS: u64 = 8;
/// And than this, in any case: trackers refuse filters that are a little fuller.
const LEAST_TENTHS_EVER: u64 = 95;
/// Paths of which only the upstream cache can tell whether they are its own: so many at most are
/// looked into. Beyond, those that would be asked about last are left out.
const MAX_OPEN: usize = 16 * 1024;
/// The pause between two such questions: no more of them than a person's updates cause.
const PAUSE: Duration = Duration::from_millis(20);
/// They are looked into before the first filter goes out, for so long: without one, peers ask by
/// HTTP.
const FIRST_FILTER: Duration = Duration::from_secs(20);

/// The end of the thread is waited for so long; one that waits for the upstream cache is left
/// behind.
const END: Duration = Duration::from_millis(200);

/// The running thread. Dropping it ends it.
pub struct Publisher {
    running: Option<Sender<()>>,
    ended: Receiver<()>,
}

impl Publisher {
    /// Publishes what `share` lets strangers have of `store`. `on_end` runs when the thread ends,
    /// for whatever reason.
    ///
    /// # Errors
    /// No thread to be had.
    pub fn start(
        store: Arc<Store>,
        share: Arc<AccessPolicy>,
        publication: Arc<Publication>,
        on_end: impl FnOnce() + Send + 'static,
    ) -> io::Result<Publisher> {
        let (running, stopped) = bounded(0);
        let reader = RowReader { store, share, stopped };
        let (end, ended) = bounded::<()>(0);
        thread::Builder::new().name("publish".into()).spawn(move || {
            let _end = (Deferred::new(on_end), end);
            reader.run(&publication);
        })?;
        Ok(Publisher { running: Some(running), ended })
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        drop(self.running.take());
        let _ = self.ended.recv_timeout(END);
    }
}

/// What is shared, and the state of the store that it was read from.
struct PublishedState {
    filter: BloomFilter,
    /// In the filter.
    paths: u64,
    /// Paths that were in the store and are gone.
    gone: u64,
    /// Those of which it is not known whether they are shared, and when to ask.
    open: BTreeSet<(Instant, HashPart)>,
    /// Bits for each path that the filter was made with.
    bits_per_path: u64,
    census: StoreVersion,
}

/// What was found in some rows.
#[derive(Default)]
struct SharedRows {
    count: u64,
    shared: Vec<HashPart>,
    open: BTreeSet<(Instant, HashPart)>,
}

struct RowReader {
    store: Arc<Store>,
    share: Arc<AccessPolicy>,
    /// Closed when it is time to end.
    stopped: Receiver<()>,
}

impl RowReader {
    fn run(&self, publication: &Publication) {
        let (mut shared, mut changed) = (None, false);
        let first_filter = Instant::now() + FIRST_FILTER;
        let mut pause = Duration::ZERO;
        while !self.waited(pause) {
            pause = LOOK.get();
            match self.update(&mut shared, publication.bits_per_path()) {
                Ok(anything) => changed |= anything,
                Err(e) => log::warn!("what would be shared with strangers cannot be told: {e}"),
            }
            let Some(shared) = &mut shared else { continue };
            changed |= self.look_into(shared);
            let now = Instant::now();
            let is_asked = shared.open.first().is_none_or(|(at, _)| *at > now);
            if changed && (is_asked || now > first_filter) {
                log::debug!("{} paths would be shared with strangers", shared.paths);
                publication.set(shared.filter.clone());
                changed = false;
            }
        }
    }

    /// Waits. True if it is time to end.
    fn waited(&self, time: Duration) -> bool {
        self.stopped.recv_timeout(time) != Err(RecvTimeoutError::Timeout)
    }

    /// Follows what changed in the store. True if the filter did.
    fn update(
        &self,
        shared: &mut Option<PublishedState>,
        bits_per_path: u64,
    ) -> Result<bool, StoreError> {
        let census = self.store.census()?;
        let Some(last) = shared else {
            let SharedRows { shared: paths, open, .. } = self.read(0)?;
            let mut filter =
                BloomFilter::with_bits((paths.len() + open.len()) as u64, bits_per_path);
            paths.iter().for_each(|hash_part| {
                filter.insert(hash_part);
            });
            *shared = Some(PublishedState {
                filter,
                paths: paths.len() as u64,
                gone: 0,
                open,
                bits_per_path,
                census,
            });
            return Ok(true);
        };
        // Trackers that run out of memory want a smaller one.
        if bits_per_path < last.bits_per_path {
            *shared = None;
            return self.update(shared, bits_per_path);
        }
        if last.census.version == census.version {
            return Ok(false);
        }
        let SharedRows { count, shared: paths, open } = self.read(last.census.last_id)?;
        let changed =
            paths.iter().fold(false, |changed, hash_part| changed | last.filter.insert(hash_part));
        last.paths += paths.len() as u64;
        last.gone += (last.census.count + count).saturating_sub(census.count);
        last.open.extend(open);
        while last.open.len() > MAX_OPEN {
            last.open.pop_last();
        }
        last.census = census;
        let needed = last.paths * (last.bits_per_path * LEAST_TENTHS).max(LEAST_TENTHS_EVER) / 10;
        let is_full = last.filter.len_bits() < needed.min(8 * MAX_BYTES as u64);
        if is_full || last.gone * 100 > last.paths * GONE_PERCENT && last.gone > 0 {
            *shared = None;
            return self.update(shared, bits_per_path);
        }
        Ok(changed)
    }

    /// The paths after that row.
    fn read(&self, row_id: i64) -> Result<SharedRows, StoreError> {
        let (mut rows, mut last_id) = (SharedRows::default(), row_id);
        loop {
            let began = Instant::now();
            let batch = self.store.paths_after(last_id, BATCH)?;
            let Some((id, _)) = batch.last() else { return Ok(rows) };
            last_id = *id;
            rows.count += batch.len() as u64;
            for (_, info) in &batch {
                if self.share.allows_now(Scope::Wan, info) {
                    rows.shared.push(info.path.hash_part());
                } else if let Some(at) = self.share.ask_upstream_at(info) {
                    rows.open.insert((at, info.path.hash_part()));
                    if rows.open.len() > MAX_OPEN {
                        rows.open.pop_last();
                    }
                }
            }
            // Half of the time is left to others: a signature takes 0.1 ms to check, and a store
            // may have 100,000 paths.
            if self.waited(began.elapsed()) {
                return Ok(rows);
            }
        }
    }

    /// Asks the upstream cache about open questions, for a while. True if that changed the filter.
    fn look_into(&self, shared: &mut PublishedState) -> bool {
        let (mut changed, until) = (false, Instant::now() + LOOK.get());
        while let Some(question) =
            shared.open.first().copied().filter(|(at, _)| *at <= Instant::now())
        {
            let hash_part = question.1;
            match self.store.path_info(&hash_part) {
                Ok(Some(info)) if self.share.allows(Scope::Wan, &info) => {
                    changed |= shared.filter.insert(&hash_part);
                    shared.paths += 1;
                }
                // Upstream lacks it, or does not answer at the moment.
                Ok(Some(info)) => shared.open.extend(self.share.ask_upstream_at(&info).map(|at| {
                    // What may be asked about now was asked about just now, without an answer.
                    (at.max(Instant::now() + LOOK.get()), hash_part)
                })),
                // It is not there any more.
                Ok(None) => {}
                Err(e) => {
                    log::debug!("{hash_part}: {e}");
                    break;
                }
            }
            shared.open.remove(&question);
            if Instant::now() > until || self.waited(PAUSE) {
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

    /// The sender keeps the reader running.
    fn reader(fixture: &Fixture, config: &Config) -> (RowReader, Sender<()>) {
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        let share = Arc::new(AccessPolicy::new(networks, config));
        let (running, stopped) = bounded(0);
        (RowReader { store: Arc::new(fixture.open()), share, stopped }, running)
    }

    fn unverified() -> Config {
        Config { mode: Mode::Wan, verify: false, ..Config::default() }
    }

    fn register(fixture: &Fixture, numbers: std::ops::Range<u32>) {
        numbers.for_each(|i| drop(fixture.register(&digits(i), 120)));
    }

    #[test]
    fn what_is_new_is_added_and_what_is_unchanged_costs_nothing() {
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

    #[test]
    fn it_grows_with_the_store_and_forgets_what_is_gone() {
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
        assert_eq!((last.gone, last.paths), (100, 2000), "a few stay in it");
        fixture.execute("delete from ValidPaths where id <= 1500");
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_ref().unwrap();
        assert_eq!((last.gone, last.paths), (0, 500));
        assert!((0..1500).filter(|i| last.filter.contains(&part(*i))).count() < 30);
    }

    #[test]
    fn what_strangers_may_not_have_is_not_in_it() {
        let fixture = Fixture::new();
        register(&fixture, 0..20);
        // The default upstream's paths have signatures, and these have none: nobody is asked about
        // them.
        let config = Config { verify: true, ..unverified() };
        let (reader, _running) = reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_ref().unwrap();
        assert_eq!((last.paths, last.open.len()), (0, 0));
        let config = Config { filter_patterns: vec![format!("{}-*", digits(7))], ..unverified() };
        let (reader, _running) = self::reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        assert_eq!(shared.unwrap().paths, 19);
    }

    #[test]
    fn where_only_upstream_can_tell_it_is_asked_until_it_answers() {
        let fixture = Fixture::new();
        register(&fixture, 0..20);
        let config =
            Config { verify: true, upstream_cache: "http://127.0.0.1:9".into(), ..unverified() };
        let (reader, _running) = reader(&fixture, &config);
        let mut shared = None;
        reader.update(&mut shared, 16).unwrap();
        let last = shared.as_mut().unwrap();
        assert_eq!(last.open.len(), 20);
        let before = last.open.clone();
        assert!(!reader.look_into(last));
        assert_eq!((last.paths, last.open.len()), (0, 20), "nobody is there");
        assert!(last.open.iter().all(|(at, _)| *at > Instant::now()), "and is asked again at once");
        // A path that is gone is no question, and a store that cannot be read is not a path that is
        // gone.
        fixture.execute("delete from ValidPaths where id <= 5");
        last.open = before.clone();
        reader.look_into(last);
        assert_eq!(last.open.len(), 15);
        last.open = before;
        fixture.execute("alter table ValidPaths rename to Elsewhere");
        reader.look_into(last);
        assert_eq!(last.open.len(), 20);
    }

    #[test]
    fn filter_is_made_smaller_when_trackers_want_that() {
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
