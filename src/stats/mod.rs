//! Statistics of this node: counters, the last lookups, running transfers, traffic of each peer,
//! and hourly totals. Other modules record events here; the status and the metrics read them.
//!
//! Recording is cheap, because it happens for every lookup and every piece of a NAR. All memory is
//! bounded, because peers cause the events.

mod counters;
mod hours;
mod lookups;
mod persistence;
mod start_time;
mod traffic;
mod transfers;

pub use counters::{Counter, Histogram, Totals};
pub use hours::{HOUR, Hour};
pub use lookups::{HitRecord, LookupRecord, LookupStats, MAX_LOOKUPS, MissReason, short};
pub use start_time::StartTime;
pub use traffic::{MAX_PEERS, PeerTraffic, TrafficKey};
pub use transfers::{Direction, RunningTransfer, TransferGuard, TransferStats};

use crate::lock::Mutex;
use crate::nix::{HashPart, StorePath};
use counters::Counters;
use hours::Hours;
use persistence::{LoadError, SavedCounters};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use traffic::Traffic;

/// Network of a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Network {
    /// The LAN, or a node that `--peer` names.
    Lan,
    /// Any other network.
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

/// Statistics of this run, and the saved totals of earlier runs.
pub struct Stats {
    is_on: bool,
    /// Time of the start.
    pub start: StartTime,
    counters: Counters,
    /// Lookups of this machine's Nix.
    pub lookups: LookupStats,
    /// Transfers of NARs.
    pub transfers: TransferStats,
    traffic: Mutex<Traffic>,
    /// Bytes received from, and sent to, peers without a metrics series. Includes peers whose
    /// counts have been dropped.
    others: [AtomicU64; 2],
    hours: Mutex<Hours>,
    earlier: Mutex<Option<EarlierTotals>>,
}

/// Totals of earlier runs, and the state of their file.
struct EarlierTotals {
    dir: PathBuf,
    /// Content of the file at the start.
    saved: SavedCounters,
    /// Whether the file may be overwritten.
    may_overwrite: bool,
    /// `since` and totals of the last write.
    last_written: Option<(u64, Totals)>,
    /// Problem with the file at the start.
    problem: Option<String>,
    /// Why the last write failed.
    write_error: Option<String>,
}

impl Stats {
    /// Empty statistics that start now.
    pub fn new() -> Self {
        Stats {
            is_on: true,
            start: StartTime::now(),
            counters: Counters::default(),
            lookups: LookupStats::default(),
            transfers: TransferStats::default(),
            traffic: Mutex::new(Traffic::new(Instant::now())),
            others: Default::default(),
            hours: Mutex::default(),
            earlier: Mutex::default(),
        }
    }

    /// Statistics that record nothing. A benchmark uses them to measure the cost of recording.
    pub fn off() -> Self {
        Stats { is_on: false, ..Stats::new() }
    }

    /// Records a lookup that found the path at a peer. `id` is the peer's ID at a tracker.
    pub fn record_hit(
        &self,
        path: &StorePath,
        network: Network,
        peer: SocketAddr,
        id: Option<&str>,
        elapsed: Duration,
    ) {
        if !self.is_on {
            return;
        }
        self.counters.add(Counter::Hits, 1);
        let counts = self.peer_traffic(TrafficKey::server(network, peer));
        counts.hits.fetch_add(1, Ordering::Relaxed);
        id.iter().for_each(|id| counts.set_id(id));
        let hit = HitRecord { name: path.name().into(), network, peer };
        self.lookups.record(path.hash_part(), Ok(hit), elapsed);
    }

    /// Records a lookup that missed.
    pub fn record_miss(&self, hash_part: &HashPart, miss: MissReason, elapsed: Duration) {
        if self.is_on {
            self.counters.add(Counter::Misses, 1);
            self.lookups.record(*hash_part, Err(miss), elapsed);
        }
    }

    /// Records the time from the request for a NAR to its first piece.
    pub fn record_first_byte(&self, network: Network, elapsed: Duration) {
        match network {
            _ if !self.is_on => {}
            Network::Lan => self.transfers.first_byte_lan.observe(elapsed),
            Network::Wan => self.transfers.first_byte_wan.observe(elapsed),
        }
    }

    /// Starts to record a NAR of `size` bytes that this machine receives.
    pub fn begin_receive(&self, name: &str, size: u64) -> TransferGuard<'_> {
        self.begin(Direction::In, name, size)
    }

    /// Starts to record `size` bytes of a NAR that are sent to a peer.
    pub fn begin_send(
        &self,
        name: &str,
        size: u64,
        network: Network,
        peer: SocketAddr,
    ) -> TransferGuard<'_> {
        let mut transfer = self.begin(Direction::Out, name, size);
        transfer.set_peer(network, peer);
        transfer
    }

    fn begin(&self, direction: Direction, name: &str, size: u64) -> TransferGuard<'_> {
        let begin = || self.transfers.begin(direction, name, size);
        TransferGuard::new(self, self.is_on.then(begin))
    }

    /// Counts a whole NAR to which this peer contributed.
    pub fn record_delivered(&self, network: Network, peer: SocketAddr) {
        if self.is_on {
            self.peer_traffic(TrafficKey::server(network, peer))
                .nars
                .fetch_add(1, Ordering::Relaxed);
        }
    }

    fn add(&self, count: Counter, more: u64) {
        self.counters.add(count, more);
    }

    fn peer_traffic(&self, key: TrafficKey) -> Arc<PeerTraffic> {
        self.traffic.lock().entry(key, Instant::now())
    }

    /// Totals since the start of this run.
    pub fn totals(&self) -> Totals {
        self.counters.totals()
    }

    /// Totals of all runs and their start in seconds since 1970. `None` if they are not saved.
    pub fn totals_ever(&self) -> Option<(u64, Totals)> {
        let earlier = self.earlier.lock();
        earlier
            .as_ref()
            .map(|earlier| (earlier.saved.since, earlier.saved.totals.plus(&self.totals())))
    }

    /// Traffic of each peer, in no order.
    pub fn traffic(&self) -> Vec<(TrafficKey, Arc<PeerTraffic>)> {
        self.traffic.lock().all()
    }

    /// Bytes received from, and sent to, peers without a metrics series since the start.
    pub fn others(&self) -> [u64; 2] {
        self.others.each_ref().map(|bytes| bytes.load(Ordering::Relaxed))
    }

    /// Hours in which something was counted, the oldest first.
    pub fn hours(&self) -> Vec<Hour> {
        self.update_hours(SystemTime::now());
        self.hours.lock().all().to_vec()
    }

    /// Adds what was counted since the last call to the current hour. Has to be called regularly:
    /// counts between two calls belong to the hour of the second.
    pub fn update_hours(&self, now: SystemTime) {
        self.hours.lock().fold(&self.totals(), seconds(now));
    }

    /// Loads the totals of earlier runs from `dir`, where [`Stats::save`] will write. Blocks on the
    /// disk. Errors are logged and returned by [`Stats::problem`].
    pub fn load_earlier(&self, dir: &Path, now: SystemTime) {
        let nothing = || SavedCounters::new(seconds(now), Totals::default(), Vec::new());
        let (saved, may_overwrite, problem) = match persistence::load(dir) {
            Ok(saved) => (saved.unwrap_or_else(nothing), true, None),
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
        self.hours.lock().restore(saved.hours.clone(), seconds(now));
        *self.earlier.lock() = Some(EarlierTotals {
            dir: dir.to_owned(),
            saved,
            may_overwrite,
            last_written: None,
            problem,
            write_error: None,
        });
    }

    /// Writes the counters to the directory of [`Stats::load_earlier`] if they have changed. Blocks
    /// on the disk. Errors are logged and returned by [`Stats::problem`].
    pub fn save(&self, now: SystemTime) {
        self.update_hours(now);
        let totals = self.totals();
        let hours = self.hours.lock().all().to_vec();
        let (dir, saved) = {
            let mut earlier = self.earlier.lock();
            let Some(earlier) = earlier.as_mut().filter(|earlier| earlier.may_overwrite) else {
                return;
            };
            // A `since` out of this range comes from a wrong clock.
            let sane = EARLIEST_START..=seconds(now).saturating_add(24 * HOUR);
            if seconds(now) >= EARLIEST_START && !sane.contains(&earlier.saved.since) {
                earlier.saved.since = seconds(self.start.by_wall_clock(now));
            }
            if earlier.last_written == Some((earlier.saved.since, totals)) {
                return;
            }
            (
                earlier.dir.clone(),
                SavedCounters::new(earlier.saved.since, earlier.saved.totals.plus(&totals), hours),
            )
        };
        // The lock is released, so that readers do not wait for the disk.
        let stored = persistence::store(&dir, &saved);
        let problem = stored.err().map(|e| format!("{}: {e}; {NOT_KEPT}", dir.display()));
        let before = {
            let mut earlier = self.earlier.lock();
            let Some(earlier) = earlier.as_mut() else { return };
            if problem.is_none() {
                earlier.last_written = Some((saved.since, totals));
            }
            std::mem::replace(&mut earlier.write_error, problem.clone())
        };
        match problem {
            Some(problem) if before.as_ref() != Some(&problem) => log::warn!("counters {problem}"),
            None if before.is_some() => log::info!("counters {}: written again", dir.display()),
            _ => {}
        }
    }

    /// Problem with the counters' file, in one line. `None` if there is none.
    pub fn problem(&self) -> Option<String> {
        let earlier = self.earlier.lock();
        earlier
            .as_ref()
            .and_then(|earlier| earlier.write_error.clone().or_else(|| earlier.problem.clone()))
    }

    /// Directory of the counters' file. `None` if they are not saved.
    pub fn state_dir(&self) -> Option<PathBuf> {
        self.earlier.lock().as_ref().map(|earlier| earlier.dir.clone())
    }
}

/// Start of 2020, in seconds since 1970. Earlier times come from a wrong clock.
const EARLIEST_START: u64 = 1_577_836_800;

/// End of the message that the counters cannot be written.
const NOT_KEPT: &str = "what is counted is lost with this process until that is mended";

impl Default for Stats {
    fn default() -> Self {
        Stats::new()
    }
}

/// Seconds since 1970; 0 for earlier times.
fn seconds(at: SystemTime) -> u64 {
    at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
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
        SystemTime::UNIX_EPOCH + Duration::from_secs(EARLIEST_START + second)
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("peerix-record-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        dir
    }

    #[test]
    fn recorded_lookups_appear_in_all_reports() {
        let stats = Stats::new();
        stats.record_hit(&path(), Network::Wan, peer(), Some("<b>"), Duration::from_millis(1));
        stats.record_miss(
            &path().hash_part(),
            MissReason::Nobody { asked: 2 },
            Duration::from_millis(2),
        );
        let lookups = stats.lookups.recent();
        assert_eq!(lookups.len(), 2);
        assert_eq!(lookups[0].result.as_ref().unwrap_err().code(), "nobody");
        assert_eq!(&*lookups[1].result.as_ref().unwrap().name, "hello");
        assert_eq!(stats.lookups.misses().find(|(code, _)| *code == "nobody"), Some(("nobody", 1)));
        assert_eq!(
            (stats.lookups.hit_time.cumulative()[15], stats.lookups.miss_time.cumulative()[15]),
            (1, 1)
        );
        let traffic = stats.traffic();
        assert_eq!((traffic.len(), traffic[0].1.id().as_deref()), (1, Some("<b>")));
    }

    #[test]
    fn transfer_is_listed_while_it_runs_and_counted_by_network() {
        let stats = Stats::new();
        let mut transfer = stats.begin_receive(path().base_name(), 100);
        assert_eq!(stats.transfers.running()[0].peer(), None);
        transfer.set_peer(Network::Lan, peer());
        transfer.record_bytes(60);
        transfer.set_progress(60);
        // Another peer continues the transfer.
        transfer.set_peer(Network::Wan, peer());
        transfer.record_bytes(40);
        transfer.set_progress(100);
        assert_eq!(
            (stats.transfers.running()[0].bytes(), stats.transfers.running()[0].size),
            (100, 100)
        );
        transfer.record_whole();
        drop(transfer);
        assert!(stats.transfers.running().is_empty());
        let sending = stats.begin_send(path().base_name(), 10, Network::Lan, peer());
        sending.record_bytes(7);
        drop(sending);
        let totals = stats.totals();
        let counted = [
            Counter::ReceivedLan,
            Counter::ReceivedWan,
            Counter::ReceivedNars,
            Counter::SentLan,
            Counter::SentNars,
        ];
        assert_eq!(counted.map(|count| totals.get(count)), [60, 40, 1, 7, 0]);
        let traffic = stats.traffic();
        let lan = traffic.iter().find(|(key, _)| key.network == Network::Lan).unwrap();
        assert_eq!(
            (lan.1.received.load(Ordering::Relaxed), lan.1.sent.load(Ordering::Relaxed)),
            (60, 7)
        );
    }

    /// Regression: the sums lacked what a transfer moved after its peer's counts were dropped.
    #[test]
    fn every_sent_byte_is_in_a_series_or_in_others() {
        let stats = Stats::new();
        let running: Vec<TransferGuard<'_>> = (0..2 * MAX_PEERS as u32)
            .map(|number| {
                let peer =
                    SocketAddr::from((std::net::Ipv4Addr::from_bits(0x0a00_0000 + number), 1));
                let transfer = stats.begin_send(path().base_name(), 10, Network::Lan, peer);
                transfer.record_bytes(3);
                transfer
            })
            .collect();
        running.iter().for_each(|transfer| transfer.record_bytes(4));
        let named = stats.traffic().into_iter().filter(|(_, counts)| counts.has_series());
        let named: u64 = named.map(|(_, counts)| counts.sent.load(Ordering::Relaxed)).sum();
        let others = stats.others();
        assert!(named > 0 && others[0] == 0);
        assert_eq!(named + others[1], stats.totals().get(Counter::SentLan));
        assert_eq!(named + others[1], 7 * 2 * MAX_PEERS as u64);
    }

    #[test]
    fn disabled_stats_stay_empty() {
        let stats = Stats::off();
        stats.record_hit(&path(), Network::Lan, peer(), None, Duration::ZERO);
        stats.record_miss(&path().hash_part(), MissReason::Busy, Duration::ZERO);
        stats.record_first_byte(Network::Lan, Duration::ZERO);
        let mut transfer = stats.begin_receive("x", 1);
        transfer.set_peer(Network::Lan, peer());
        transfer.record_bytes(1);
        transfer.record_whole();
        transfer.record_failure();
        assert!(
            stats.transfers.running().is_empty()
                && stats.lookups.recent().is_empty()
                && stats.traffic().is_empty()
        );
        assert_eq!(
            (stats.totals(), stats.transfers.first_byte_lan.cumulative()[15]),
            (Totals::default(), 0)
        );
    }

    #[test]
    fn counters_continue_after_a_restart() {
        let dir = dir("restarts");
        for start in 1..=3 {
            let stats = Stats::new();
            stats.load_earlier(&dir, at(start * 10_000));
            stats.record_miss(&path().hash_part(), MissReason::Busy, Duration::ZERO);
            stats.save(at(start * 10_000));
            let (since, ever) = stats.totals_ever().unwrap();
            let (ever, now) = (ever.get(Counter::Misses), stats.totals().get(Counter::Misses));
            assert_eq!((since, ever, now), (EARLIEST_START + 10_000, start, 1));
            assert_eq!(stats.hours.lock().all().len() as u64, start);
        }
        fs::remove_dir_all(&dir).unwrap();
    }

    /// Without a battery, a clock starts in 1970, or with garbage in 2099, until the network time
    /// is known. Regression: `since` kept the wrong time.
    #[test]
    fn wrong_clock_at_start_is_corrected_in_since() {
        for wrong in [SystemTime::UNIX_EPOCH + Duration::from_secs(20), at(80 * 365 * 24 * HOUR)] {
            let dir = dir("clock");
            let stats = Stats::new();
            *stats.start.wall.lock() = wrong;
            stats.load_earlier(&dir, wrong);
            stats.save(wrong);
            assert_eq!(stats.totals_ever().unwrap().0, seconds(wrong));
            let now = at(365 * 24 * HOUR);
            let started = stats.start.by_wall_clock(now);
            assert!(now.duration_since(started).unwrap() < Duration::from_secs(600), "{started:?}");
            assert_eq!(
                stats.start.by_wall_clock(now + Duration::from_secs(5)),
                started,
                "it is one moment"
            );
            // The new `since` is written even if the counts are the same.
            stats.save(now);
            assert_eq!(stats.totals_ever().unwrap().0, seconds(started));
            let next = Stats::new();
            next.load_earlier(&dir, now);
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
    fn unchanged_counters_are_not_written() {
        let dir = dir("new");
        let stats = Stats::new();
        stats.load_earlier(&dir, at(1));
        stats.save(at(1));
        fs::remove_file(dir.join("counters")).unwrap();
        stats.save(at(2));
        assert!(!dir.join("counters").exists());
        stats.record_miss(&path().hash_part(), MissReason::Busy, Duration::ZERO);
        stats.save(at(3));
        assert!(dir.join("counters").exists());
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn damaged_file_is_reported_and_counting_continues() {
        let dir = dir("damage");
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("counters"), "nonsense").unwrap();
        let stats = Stats::new();
        stats.load_earlier(&dir, at(1));
        assert!(stats.problem().unwrap().contains("damaged"));
        stats.save(at(2));
        assert!(stats.problem().unwrap().contains("lost"), "a person may not have seen it yet");
        let next = Stats::new();
        next.load_earlier(&dir, at(3));
        assert_eq!((next.problem(), next.totals_ever().unwrap().0), (None, EARLIEST_START + 1));
        fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn write_error_is_reported_until_a_write_succeeds() {
        let dir = dir("unwritable");
        fs::write(&dir, "a file where the directory should be").unwrap();
        let stats = Stats::new();
        stats.load_earlier(&dir, at(1));
        for second in 2..5 {
            stats.save(at(second));
            assert!(stats.problem().is_some());
        }
        // The directory was a file, so the counters could not be read and must not be overwritten.
        fs::remove_file(&dir).unwrap();
        let stats = Stats::new();
        stats.load_earlier(&dir, at(1));
        fs::write(&dir, "again").unwrap();
        stats.save(at(2));
        assert!(stats.problem().unwrap().contains(NOT_KEPT));
        fs::remove_file(&dir).unwrap();
        stats.save(at(3));
        assert_eq!(stats.problem(), None);
        fs::remove_dir_all(&dir).unwrap();
    }
}
