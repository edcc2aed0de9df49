//! What this node has done, for whoever looks: counters, the last lookups, NARs under way, what
//! each peer gave and took, and the hours. Whoever does something tells it here; nothing here knows
//! who asks.
//!
//! It is cheap, as it is told of every lookup and every piece of a NAR, and bounded, as peers
//! decide how much there is to tell.

mod counters;
mod hours;
mod lookups;
mod persistence;
mod traffic;
mod transfers;

pub use counters::{Counter, Histogram, Totals};
pub use hours::{HOUR, Hour};
pub use lookups::{HitRecord, LookupRecord, MAX_LOOKUPS, MissReason, short};
pub use traffic::{MAX_PEERS, PeerTraffic, TrafficKey};
pub use transfers::{Direction, RunningTransfer, TransferGuard};

use crate::nix::{HashPart, StorePath};
use counters::Counters;
use hours::Hours;
use lookups::RecentLookups;
use persistence::{LoadError, SavedCounters};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use traffic::Traffic;

/// Where a peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// A neighbour, or named by `--peer`.
    Lan,
    /// Elsewhere.
    Wan,
}

impl Network {
    /// `lan` or `wan`.
    pub fn as_str(self) -> &'static str {
        match self {
            Network::Lan => "lan",
            Network::Wan => "wan",
        }
    }
}

/// The record of this run, and of those before as far as it was kept.
pub struct Stats {
    is_on: bool,
    /// When it began, by [`since_boot`] and by the clock.
    started: Duration,
    started_at: Mutex<SystemTime>,
    counters: Counters,
    misses: [AtomicU64; MissReason::CODES.len()],
    /// How long lookups took that found something.
    pub hit_time: Histogram,
    /// And those that did not.
    pub miss_time: Histogram,
    /// From this machine's request for a NAR to its first piece, from a neighbour.
    pub first_byte_lan: Histogram,
    /// And from a peer elsewhere.
    pub first_byte_wan: Histogram,
    lookups: Mutex<RecentLookups>,
    traffic: Mutex<Traffic>,
    /// Bytes received from and sent to peers without a series, whether they are still among the
    /// others or not.
    others: [AtomicU64; 2],
    transfers: Mutex<BTreeMap<u64, Arc<RunningTransfer>>>,
    next_id: AtomicU64,
    hours: Mutex<Hours>,
    kept: Mutex<Option<EarlierTotals>>,
}

/// The counters of the starts before, and their file.
struct EarlierTotals {
    dir: PathBuf,
    /// What was counted before this start, and since when.
    before: SavedCounters,
    /// Whether the file may be written over.
    is_ours: bool,
    /// What was last written, and since when it counts.
    written: Option<(u64, Totals)>,
    /// What was wrong with the file at the start.
    problem: Option<String>,
    /// Why it cannot be written now.
    fails: Option<String>,
}

impl Stats {
    /// An empty one.
    pub fn new() -> Self {
        Stats {
            is_on: true,
            started: since_boot(),
            started_at: Mutex::new(SystemTime::now()),
            counters: Counters::default(),
            misses: Default::default(),
            hit_time: Histogram::default(),
            miss_time: Histogram::default(),
            first_byte_lan: Histogram::default(),
            first_byte_wan: Histogram::default(),
            lookups: Mutex::default(),
            traffic: Mutex::new(Traffic::new(Instant::now())),
            others: Default::default(),
            transfers: Mutex::default(),
            next_id: AtomicU64::new(1),
            hours: Mutex::default(),
            kept: Mutex::default(),
        }
    }

    /// One that stays empty, to measure what recording costs.
    pub fn off() -> Self {
        Stats { is_on: false, ..Stats::new() }
    }

    /// How long it has been kept, the machine's sleep included.
    pub fn age(&self) -> Duration {
        since_boot().saturating_sub(self.started)
    }

    /// When it began, by the clock that says `now`. That may have been set since, as on machines
    /// that begin in 1970.
    pub fn started(&self, now: SystemTime) -> SystemTime {
        let mut at = lock(&self.started_at);
        let by_now = now.checked_sub(self.age()).unwrap_or(SystemTime::UNIX_EPOCH);
        let off = by_now.duration_since(*at).unwrap_or_else(|e| e.duration());
        // Not at every look another.
        if off > CLOCK_SET {
            *at = by_now;
        }
        *at
    }

    /// A lookup found the path at a peer, which a tracker may call `id`.
    pub fn hit(
        &self,
        path: &StorePath,
        network: Network,
        peer: SocketAddr,
        id: Option<&str>,
        took: Duration,
    ) {
        if !self.is_on {
            return;
        }
        self.counters.add(Counter::Hits, 1);
        self.hit_time.observe(took);
        let counts = self.counts(TrafficKey::server(network, peer));
        counts.hits.fetch_add(1, Ordering::Relaxed);
        id.iter().for_each(|id| counts.set_id(id));
        let result = Ok(HitRecord { name: path.name().into(), network, peer });
        lock(&self.lookups).add(LookupRecord {
            at: SystemTime::now(),
            hash_part: path.hash_part(),
            took,
            result,
        });
    }

    /// A lookup found nothing.
    pub fn missed(&self, hash_part: &HashPart, miss: MissReason, took: Duration) {
        if !self.is_on {
            return;
        }
        self.counters.add(Counter::Misses, 1);
        self.misses[miss.kind()].fetch_add(1, Ordering::Relaxed);
        self.miss_time.observe(took);
        let looked =
            LookupRecord { at: SystemTime::now(), hash_part: *hash_part, took, result: Err(miss) };
        lock(&self.lookups).add(looked);
    }

    /// The first piece of a NAR has come, so long after this machine asked for it.
    pub fn first_byte(&self, network: Network, took: Duration) {
        match network {
            _ if !self.is_on => {}
            Network::Lan => self.first_byte_lan.observe(took),
            Network::Wan => self.first_byte_wan.observe(took),
        }
    }

    /// A NAR of so many bytes begins to come.
    pub fn receive(&self, name: &str, size: u64) -> TransferGuard<'_> {
        self.begin(Direction::In, name, size)
    }

    /// So many bytes of a NAR begin to go to a peer.
    pub fn send(
        &self,
        name: &str,
        size: u64,
        network: Network,
        peer: SocketAddr,
    ) -> TransferGuard<'_> {
        let mut transfer = self.begin(Direction::Out, name, size);
        transfer.with(network, peer);
        transfer
    }

    fn begin(&self, direction: Direction, name: &str, size: u64) -> TransferGuard<'_> {
        if !self.is_on {
            return TransferGuard::none(self);
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let transfer = TransferGuard::begin(self, id, direction, name.to_owned(), size);
        // As many as there are permits for long answers.
        lock(&self.transfers).extend(transfer.running().map(|running| (id, running.clone())));
        transfer
    }

    /// A whole NAR came from this peer, or a part of it.
    pub fn delivered(&self, network: Network, peer: SocketAddr) {
        if self.is_on {
            self.counts(TrafficKey::server(network, peer)).nars.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn add(&self, count: Counter, more: u64) {
        self.counters.add(count, more);
    }

    fn ended(&self, id: u64) {
        lock(&self.transfers).remove(&id);
    }

    fn counts(&self, who: TrafficKey) -> Arc<PeerTraffic> {
        lock(&self.traffic).of(who, Instant::now())
    }

    /// What was counted since the start.
    pub fn totals(&self) -> Totals {
        self.counters.totals()
    }

    /// What was counted since when, in seconds since 1970, in all starts; `None` if that is not
    /// kept.
    pub fn totals_ever(&self) -> Option<(u64, Totals)> {
        let kept = lock(&self.kept);
        kept.as_ref().map(|kept| (kept.before.since, kept.before.totals.plus(&self.totals())))
    }

    /// How often lookups missed for which reason, by code.
    pub fn misses(&self) -> impl Iterator<Item = (&'static str, u64)> {
        MissReason::CODES
            .into_iter()
            .zip(self.misses.iter().map(|count| count.load(Ordering::Relaxed)))
    }

    /// The last lookups, the latest first.
    pub fn lookups(&self) -> Vec<LookupRecord> {
        lock(&self.lookups).all()
    }

    /// NARs under way, the oldest first.
    pub fn transfers(&self) -> Vec<Arc<RunningTransfer>> {
        lock(&self.transfers).values().cloned().collect()
    }

    /// What each peer gave and took.
    pub fn traffic(&self) -> Vec<(TrafficKey, Arc<PeerTraffic>)> {
        lock(&self.traffic).all()
    }

    /// Bytes received from and sent to all those that ever were without a series.
    pub fn others(&self) -> [u64; 2] {
        self.others.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// The hours in which something happened, the oldest first.
    pub fn hours(&self) -> Vec<Hour> {
        self.tick(SystemTime::now());
        lock(&self.hours).all().to_vec()
    }

    /// Puts what was counted into its hour. To be called now and then: what comes between two calls
    /// counts for the hour of the second.
    pub fn tick(&self, now: SystemTime) {
        lock(&self.hours).fold(&self.totals(), seconds(now));
    }

    /// Goes on from the counters in `dir`, and has them written there by [`Stats::save`]. Nothing
    /// that is wrong there is an error: it is logged, and [`Stats::problem`] tells of it.
    pub fn keep_in(&self, dir: &Path, now: SystemTime) {
        let nothing = || SavedCounters::new(seconds(now), Totals::default(), Vec::new());
        let (before, is_ours, problem) = match persistence::load(dir) {
            Ok(before) => (before.unwrap_or_else(nothing), true, None),
            Err(LoadError::Damaged(why)) => (
                nothing(),
                true,
                Some(format!("{why}; what was counted before this start is lost")),
            ),
            Err(LoadError::Unreadable(why)) => (
                nothing(),
                false,
                Some(format!("{why}; it is left alone, and nothing that is counted now is kept")),
            ),
        };
        problem.iter().for_each(|why| log::warn!("counters {why}"));
        lock(&self.hours).restore(before.hours.clone(), seconds(now));
        *lock(&self.kept) = Some(EarlierTotals {
            dir: dir.to_owned(),
            before,
            is_ours,
            written: None,
            problem,
            fails: None,
        });
    }

    /// Writes the counters to the directory of [`Stats::keep_in`], unless they are there already.
    /// Waits for the disk.
    pub fn save(&self, now: SystemTime) {
        self.tick(now);
        let totals = self.totals();
        let hours = lock(&self.hours).all().to_vec();
        let (dir, saved) = {
            let mut kept = lock(&self.kept);
            let Some(kept) = kept.as_mut().filter(|kept| kept.is_ours) else { return };
            // As a clock said that was wrong.
            let sane = FIRST..=seconds(now).saturating_add(24 * HOUR);
            if seconds(now) >= FIRST && !sane.contains(&kept.before.since) {
                kept.before.since = seconds(self.started(now));
            }
            if kept.written == Some((kept.before.since, totals)) {
                return;
            }
            (
                kept.dir.clone(),
                SavedCounters::new(kept.before.since, kept.before.totals.plus(&totals), hours),
            )
        };
        // Not while others are kept from looking.
        let stored = persistence::store(&dir, &saved);
        let mut kept = lock(&self.kept);
        let Some(kept) = kept.as_mut() else { return };
        match stored {
            Ok(()) => {
                if kept.fails.take().is_some() {
                    log::info!("counters {}: written again", dir.display());
                }
                kept.written = Some((saved.since, totals));
            }
            Err(e) => {
                let problem = format!("{}: {e}; {NOT_KEPT}", dir.display());
                if kept.fails.as_ref() != Some(&problem) {
                    log::warn!("counters {problem}");
                }
                kept.fails = Some(problem);
            }
        }
    }

    /// What is wrong with the counters' file, if anything is: one line.
    pub fn problem(&self) -> Option<String> {
        lock(&self.kept)
            .as_ref()
            .and_then(|kept| kept.fails.clone().or_else(|| kept.problem.clone()))
    }

    /// Where counters are kept.
    pub fn kept_in(&self) -> Option<PathBuf> {
        lock(&self.kept).as_ref().map(|kept| kept.dir.clone())
    }
}

/// A clock that is off by more than this was set; by less, it is kept right.
const CLOCK_SET: Duration = Duration::from_secs(10);

/// The beginning of 2020, in seconds since 1970. Nobody counted anything before that.
const FIRST: u64 = 1_577_836_800;

/// How long the machine has been up, its sleep included.
fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::try_from(time).unwrap_or_default()
}

/// What is said of counters that cannot be written.
const NOT_KEPT: &str = "what is counted is lost with this process until that is mended";

impl Default for Stats {
    fn default() -> Self {
        Stats::new()
    }
}

/// Seconds since 1970, by a clock that may be wrong.
fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn path() -> StorePath {
        StorePath::parse("7h7qgvs4kgzsn8a6rb273saxyqh4jxlz-hello").unwrap()
    }

    fn peer() -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], 12304))
    }

    fn at(second: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(FIRST + second)
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("peerix-record-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn what_is_told_is_told_on() {
        let record = Stats::new();
        record.hit(&path(), Network::Wan, peer(), Some("<b>"), Duration::from_millis(1));
        record.missed(
            &path().hash_part(),
            MissReason::Nobody { asked: 2 },
            Duration::from_millis(2),
        );
        let lookups = record.lookups();
        assert_eq!(lookups.len(), 2);
        assert_eq!(lookups[0].result.as_ref().unwrap_err().code(), "nobody");
        assert_eq!(&*lookups[1].result.as_ref().unwrap().name, "hello");
        assert_eq!(record.misses().find(|(code, _)| *code == "nobody"), Some(("nobody", 1)));
        assert_eq!((record.hit_time.cumulative()[15], record.miss_time.cumulative()[15]), (1, 1));
        let traffic = record.traffic();
        assert_eq!((traffic.len(), traffic[0].1.id().as_deref()), (1, Some("<b>")));
    }

    #[test]
    fn a_transfer_is_seen_while_it_lasts_and_counted_where_it_belongs() {
        let record = Stats::new();
        let mut transfer = record.receive(path().base_name(), 100);
        assert_eq!(record.transfers()[0].peer(), None);
        transfer.with(Network::Lan, peer());
        transfer.moved(60);
        transfer.progress(60);
        // Another peer goes on.
        transfer.with(Network::Wan, peer());
        transfer.moved(40);
        transfer.progress(100);
        assert_eq!((record.transfers()[0].bytes(), record.transfers()[0].size), (100, 100));
        transfer.record_whole();
        drop(transfer);
        assert!(record.transfers().is_empty());
        let sending = record.send(path().base_name(), 10, Network::Lan, peer());
        sending.moved(7);
        drop(sending);
        let totals = record.totals();
        let counted = [
            Counter::ReceivedLan,
            Counter::ReceivedWan,
            Counter::ReceivedNars,
            Counter::SentLan,
            Counter::SentNars,
        ];
        assert_eq!(counted.map(|count| totals.get(count)), [60, 40, 1, 7, 0]);
        let traffic = record.traffic();
        let lan = traffic.iter().find(|(who, _)| who.network == Network::Lan).unwrap();
        assert_eq!(
            (lan.1.received.load(Ordering::Relaxed), lan.1.sent.load(Ordering::Relaxed)),
            (60, 7)
        );
    }

    /// What a transfer moved after its peer was forgotten was in no sum.
    #[test]
    fn every_byte_is_in_a_series_or_among_the_others() {
        let record = Stats::new();
        let running: Vec<TransferGuard<'_>> = (0..2 * MAX_PEERS as u32)
            .map(|number| {
                let peer =
                    SocketAddr::from((std::net::Ipv4Addr::from_bits(0x0a00_0000 + number), 1));
                let transfer = record.send(path().base_name(), 10, Network::Lan, peer);
                transfer.moved(3);
                transfer
            })
            .collect();
        running.iter().for_each(|transfer| transfer.moved(4));
        let named = record.traffic().into_iter().filter(|(_, counts)| counts.has_series());
        let named: u64 = named.map(|(_, counts)| counts.sent.load(Ordering::Relaxed)).sum();
        let others = record.others();
        assert!(named > 0 && others[0] == 0);
        assert_eq!(named + others[1], record.totals().get(Counter::SentLan));
        assert_eq!(named + others[1], 7 * 2 * MAX_PEERS as u64);
    }

    #[test]
    fn one_that_is_off_stays_empty() {
        let record = Stats::off();
        record.hit(&path(), Network::Lan, peer(), None, Duration::ZERO);
        record.missed(&path().hash_part(), MissReason::Busy, Duration::ZERO);
        record.first_byte(Network::Lan, Duration::ZERO);
        let mut transfer = record.receive("x", 1);
        transfer.with(Network::Lan, peer());
        transfer.moved(1);
        transfer.record_whole();
        transfer.record_failure();
        assert!(
            record.transfers().is_empty()
                && record.lookups().is_empty()
                && record.traffic().is_empty()
        );
        assert_eq!(
            (record.totals(), record.first_byte_lan.cumulative()[15]),
            (Totals::default(), 0)
        );
    }

    #[test]
    fn counters_survive_restarts() {
        let dir = dir("restarts");
        for start in 1..=3 {
            let record = Stats::new();
            record.keep_in(&dir, at(start * 10_000));
            record.missed(&path().hash_part(), MissReason::Busy, Duration::ZERO);
            record.save(at(start * 10_000));
            let (since, ever) = record.totals_ever().unwrap();
            let (ever, now) = (ever.get(Counter::Misses), record.totals().get(Counter::Misses));
            assert_eq!((since, ever, now), (FIRST + 10_000, start, 1));
            assert_eq!(lock(&record.hours).all().len() as u64, start);
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    /// A machine without a battery for its clock begins in 1970, and is told the time when it has a
    /// network: it went on to count since 1970. Another's battery was empty, and it began in 2099.
    #[test]
    fn a_clock_that_was_wrong_does_not_stay() {
        for wrong in [SystemTime::UNIX_EPOCH + Duration::from_secs(20), at(80 * 365 * 24 * HOUR)] {
            let dir = dir("clock");
            let record = Stats::new();
            *lock(&record.started_at) = wrong;
            record.keep_in(&dir, wrong);
            record.save(wrong);
            assert_eq!(record.totals_ever().unwrap().0, seconds(wrong));
            let now = at(365 * 24 * HOUR);
            let started = record.started(now);
            assert!(now.duration_since(started).unwrap() < Duration::from_secs(600), "{started:?}");
            assert_eq!(record.started(now + Duration::from_secs(5)), started, "it is one moment");
            // Though nothing was counted.
            record.save(now);
            assert_eq!(record.totals_ever().unwrap().0, seconds(started));
            let next = Stats::new();
            next.keep_in(&dir, now);
            next.save(SystemTime::UNIX_EPOCH);
            assert_eq!(
                next.totals_ever().unwrap().0,
                seconds(started),
                "corrected by a clock that is wrong now"
            );
            fs::remove_dir_all(&dir).unwrap();
        }
    }

    #[test]
    fn nothing_new_is_not_written() {
        let dir = dir("new");
        let record = Stats::new();
        record.keep_in(&dir, at(1));
        record.save(at(1));
        fs::remove_file(dir.join("counters")).unwrap();
        record.save(at(2));
        assert!(!dir.join("counters").exists());
        record.missed(&path().hash_part(), MissReason::Busy, Duration::ZERO);
        record.save(at(3));
        assert!(dir.join("counters").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn a_damaged_file_is_told_and_counting_goes_on() {
        let dir = dir("damage");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("counters"), "nonsense").unwrap();
        let record = Stats::new();
        record.keep_in(&dir, at(1));
        assert!(record.problem().unwrap().contains("damaged"));
        record.save(at(2));
        assert!(record.problem().unwrap().contains("lost"), "a person may not have seen it yet");
        let next = Stats::new();
        next.keep_in(&dir, at(3));
        assert_eq!((next.problem(), next.totals_ever().unwrap().0), (None, FIRST + 1));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn what_cannot_be_written_is_told_until_it_can() {
        let dir = dir("unwritable");
        fs::write(&dir, "a file where the directory should be").unwrap();
        let record = Stats::new();
        record.keep_in(&dir, at(1));
        for second in 2..5 {
            record.save(at(second));
            assert!(record.problem().is_some());
        }
        // That it is no directory was found out at once; it was not read, so it is not ours.
        fs::remove_file(&dir).unwrap();
        let record = Stats::new();
        record.keep_in(&dir, at(1));
        fs::write(&dir, "again").unwrap();
        record.save(at(2));
        assert!(record.problem().unwrap().contains(NOT_KEPT));
        fs::remove_file(&dir).unwrap();
        record.save(at(3));
        assert_eq!(record.problem(), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
