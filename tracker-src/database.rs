//! The durable state in SQLite: bound IDs, transfers, reputations, and the peers for a restart. Has
//! no threads; [`crate::db_thread`] runs it.

mod schema;
mod transfer;

use crate::reputation::Reputation;
use crate::table::{PeerAddress, PersistedPeer};
use rusqlite::{Connection, OptionalExtension, Params, Result, params};
use schema::MAX_COLUMN;
use std::collections::HashSet;
use std::path::Path;
pub use transfer::{ReportOutcome, SideReport};
use transfer::{StoredTransfer, sizes_agree};

/// Maximum number of bound IDs, about 200 MB. At the bound, no further ID is bound until others are
/// forgotten.
const MAX_IDENTITIES: u64 = 1_000_000;
/// Number of bound IDs from which on IDs are forgotten, first those seen on one day only, as
/// invented ones are.
const FORGET_FROM: u64 = MAX_IDENTITIES / 10 * 8;
/// Days without an announce after which a bound ID may be forgotten. Also the days without a change
/// after which the reputation of an unbound ID is deleted.
const FORGOTTEN_AFTER_DAYS: i64 = 90;
/// Maximum number of pairs of blamed peer and blaming network on one day. At the bound, further
/// failures do not count until the next day.
const MAX_BLAMED: usize = 100_000;
/// Maximum downtime in milliseconds after which a restarted tracker still counts its former peers
/// as live. Beyond, it forgets them. Nodes announce themselves each minute.
const PRESENT_FOR_MS: u64 = 10 * 60 * 1000;
/// Maximum number of IDs with a reputation. At the bound, transfers of further IDs resolve, but do
/// not count.
const MAX_REPUTATIONS: u64 = 1_000_000;
/// Maximum number of transfers, about 500 MB. At the bound, new ones replace the oldest. Ninety
/// addresses at their rate limits do not reach it within [`TRANSFER_TTL_SECONDS`].
const MAX_TRANSFERS: u64 = 4_000_000;
/// Seconds until a transfer is pruned, whether or not both sides have reported: longer than any NAR
/// takes. Reputations have counted those with both reports, and a later report of them is refused
/// in any case.
const TRANSFER_TTL_SECONDS: i64 = 2 * 3600;

/// Transfers examined in one pruning step, which takes some milliseconds.
const MAX_PRUNED_TRANSFERS: i64 = 2_000;
/// Maximum number of IDs or reputations deleted in one pruning step.
const MAX_PRUNED_ROWS: i64 = 500;

/// What the database knows of an ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownIdentity {
    /// The key that the ID is bound to; `None` if it is not bound.
    pub key: Option<[u8; 32]>,
    /// Its reputation, zero if unknown.
    pub reputation: Reputation,
}

/// Result of [`TrackerDatabase::bind`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BindOutcome {
    /// The ID is bound to the key, now or since before; its reputation.
    Bound(Reputation),
    /// The ID is bound to another key.
    OtherKey,
    /// There are too many bound IDs.
    Full,
}

/// Row counts, kept in memory so that checks of the bounds need no `count(*)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct RowCounts {
    identities: u64,
    reputations: u64,
    transfers: u64,
}

impl RowCounts {
    fn read(db: &Connection) -> Result<RowCounts> {
        let count = |table: &str| {
            db.query_row(&format!("select count(*) from {table}"), [], |row| {
                row.get::<_, i64>(0).map(|n| n.unsigned_abs())
            })
        };
        Ok(RowCounts {
            identities: count("identities")?,
            reputations: count("reputation")?,
            transfers: count("transfers")?,
        })
    }
}

/// The open database. Its methods do disk I/O and block for it.
pub struct TrackerDatabase {
    db: Connection,
    counts: RowCounts,
    /// The counts as of the last commit.
    committed: RowCounts,
    changed: Vec<(String, Reputation)>,
    /// Pairs of blamed peer and blaming network of today. One failure a day and pair counts, so
    /// that one network cannot ruin a peer with false reports.
    blamed: HashSet<(String, String)>,
    blamed_day: i64,
    pruned_to: i64,
    tracker_id: String,
}

impl TrackerDatabase {
    /// Opens the database. Creates or migrates its tables. Blocks for up to 5 s while another
    /// process has it.
    ///
    /// # Errors
    /// Returns one line that says what is wrong and what to do.
    pub fn open(path: &Path) -> std::result::Result<TrackerDatabase, String> {
        let (db, tracker_id) = schema::open(path)?;
        let counts = RowCounts::read(&db).map_err(|e| schema::open_error(path, e))?;
        Ok(TrackerDatabase {
            db,
            counts,
            committed: counts,
            changed: Vec::new(),
            blamed: HashSet::new(),
            blamed_day: 0,
            pruned_to: 0,
            tracker_id,
        })
    }

    /// The tracker's random ID, created with the database.
    pub fn tracker_id(&self) -> &str {
        &self.tracker_id
    }

    /// Begins a transaction.
    ///
    /// # Errors
    /// Returns SQLite's error.
    pub fn begin(&self) -> Result<()> {
        self.db.execute_batch("begin")
    }

    /// Commits the transaction. Returns the reputations that it changed.
    ///
    /// # Errors
    /// Returns SQLite's error. The transaction is then still to be rolled back.
    pub fn commit(&mut self) -> Result<Vec<(String, Reputation)>> {
        self.db.execute_batch("commit")?;
        self.committed = self.counts;
        Ok(std::mem::take(&mut self.changed))
    }

    /// Undoes everything since [`TrackerDatabase::begin`].
    pub fn roll_back(&mut self) {
        // After some errors SQLite has rolled back already.
        if !self.db.is_autocommit()
            && let Err(e) = self.db.execute_batch("rollback")
        {
            log::error!("database: rollback: {e}");
        }
        self.counts = self.committed;
        self.changed.clear();
    }

    /// Runs one job in a savepoint of the transaction. If it fails, only its own changes are
    /// undone.
    ///
    /// # Errors
    /// Returns the job's error or SQLite's. After an error that undid the whole transaction, all
    /// further jobs fail.
    pub fn run_job(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        if self.db.is_autocommit() {
            // An earlier error has rolled back the whole transaction.
            return Err(rusqlite::Error::SqliteFailure(
                rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_ABORT),
                None,
            ));
        }
        let (counts, changed) = (self.counts, self.changed.len());
        self.execute("savepoint job", [])?;
        let done = work(self);
        if done.is_err() {
            self.counts = counts;
            self.changed.truncate(changed);
            if self.db.is_autocommit() {
                return done;
            }
            self.db.execute_batch("rollback to job")?;
        }
        self.execute("release job", [])?;
        done
    }

    /// Runs a statement. Returns the number of rows that it changed.
    fn execute(&self, sql: &str, values: impl Params) -> Result<usize> {
        self.db.prepare_cached(sql)?.execute(values)
    }

    /// Returns the peers that were live when the tracker stopped, if that was at most 10 minutes
    /// before `now_ms` (milliseconds since 1970). Otherwise deletes them.
    ///
    /// # Errors
    /// Returns SQLite's error.
    pub fn live_peers(&self, now_ms: u64) -> Result<Vec<PersistedPeer>> {
        let sql = "select value from meta where key = 'alive'";
        let alive: Option<i64> = self.db.query_row(sql, [], |row| row.get(0)).optional()?;
        if alive.is_none_or(|alive| now_ms.abs_diff(alive.unsigned_abs()) > PRESENT_FOR_MS) {
            self.db.execute("delete from present", [])?;
            return Ok(Vec::new());
        }
        let sql = "select peer_id, addr, port, came_from, filter_stamp, filter, public_key
            from present left join identities using (peer_id)";
        let mut statement = self.db.prepare(sql)?;
        let rows = statement.query_map([], |row| {
            let from: String = row.get(3)?;
            let from = from.parse().map_err(|_| rusqlite::Error::IntegralValueOutOfRange(3, 0))?;
            let timestamp: Option<i64> = row.get(4)?;
            let filter: Option<Vec<u8>> = row.get(5)?;
            let address = PeerAddress { addr: row.get(1)?, port: row.get(2)?, from };
            let filter = timestamp.map(i64::unsigned_abs).zip(filter);
            let reputation = Reputation::default();
            Ok(PersistedPeer { id: row.get(0)?, address, key: row.get(6)?, reputation, filter })
        })?;
        // An unreadable row is skipped: its peer announces itself again within a minute.
        let mut present: Vec<PersistedPeer> = rows.filter_map(Result::ok).collect();
        for peer in &mut present {
            peer.reputation = self.reputation(&peer.id)?;
        }
        Ok(present)
    }

    /// Stores the address of a live peer.
    pub fn record_address(&mut self, id: &str, at: &PeerAddress) -> Result<()> {
        let sql = "insert into present (peer_id, addr, port, came_from) values (?, ?, ?, ?) on conflict do update
            set addr = excluded.addr, port = excluded.port, came_from = excluded.came_from";
        self.execute(sql, params![id, at.addr, at.port, at.from.to_string()]).map(drop)
    }

    /// Stores the filter of a live peer, and the timestamp of its request.
    pub fn record_filter(&mut self, id: &str, timestamp: u64, filter: &[u8]) -> Result<()> {
        let sql = "update present set filter_stamp = ?2, filter = ?3 where peer_id = ?1";
        self.execute(sql, params![id, timestamp.min(MAX_COLUMN) as i64, filter]).map(drop)
    }

    /// Deletes a peer from the live ones.
    pub fn remove_live(&mut self, id: &str) -> Result<()> {
        self.execute("delete from present where peer_id = ?", [id]).map(drop)
    }

    /// Stores the time, in milliseconds since 1970, at which the tracker was last running.
    pub fn record_alive(&mut self, now_ms: u64) -> Result<()> {
        let sql = "insert into meta (key, value) values ('alive', ?) on conflict do update set value = excluded.value";
        self.execute(sql, [now_ms.min(MAX_COLUMN) as i64]).map(drop)
    }

    /// Returns the key and reputation of an ID.
    pub fn known_identity(&self, id: &str) -> Result<KnownIdentity> {
        Ok(KnownIdentity { key: self.key(id)?, reputation: self.reputation(id)? })
    }

    fn key(&self, id: &str) -> Result<Option<[u8; 32]>> {
        let mut statement =
            self.db.prepare_cached("select public_key from identities where peer_id = ?")?;
        statement.query_row([id], |row| row.get(0)).optional()
    }

    /// Binds an ID to a key, unless it is bound to another. `day` is counted from 1970.
    pub fn bind(&mut self, id: &str, key: &[u8; 32], day: i64) -> Result<BindOutcome> {
        match self.key(id)? {
            Some(bound) if bound != *key => return Ok(BindOutcome::OtherKey),
            Some(_) => self.record_seen(id, day)?,
            None if self.counts.identities >= MAX_IDENTITIES => return Ok(BindOutcome::Full),
            None => {
                let sql = "insert into identities (peer_id, public_key, seen_day, first_day) values (?1, ?2, ?3, ?3)";
                self.execute(sql, params![id, key, day])?;
                self.counts.identities += 1;
            }
        }
        Ok(BindOutcome::Bound(self.reputation(id)?))
    }

    /// Stores the day, counted from 1970, on which a bound ID was last seen.
    pub fn record_seen(&mut self, id: &str, day: i64) -> Result<()> {
        let sql = "update identities set seen_day = ?2 where peer_id = ?1 and seen_day < ?2";
        self.execute(sql, params![id, day]).map(drop)
    }

    /// Returns the reputation of an ID; zeros if it is unknown.
    pub fn reputation(&self, id: &str) -> Result<Reputation> {
        let sql = "select total_shared, total_received, successful_transfers, failed_transfers from reputation where peer_id = ?";
        let found = self.db.prepare_cached(sql)?.query_row([id], |row| {
            let count = |at| row.get(at).map(|count: i64| u64::try_from(count).unwrap_or(0));
            Ok(Reputation {
                shared: count(0)?,
                received: count(1)?,
                successful: count(2)?,
                failed: count(3)?,
            })
        });
        Ok(found.optional()?.unwrap_or_default())
    }

    /// Begins `count` transfers. Returns the ID of the first; the others follow it. If there would
    /// be more than [`MAX_TRANSFERS`], deletes as many of the oldest.
    pub fn begin_transfers(
        &mut self,
        sender: &str,
        receiver: &str,
        count: u32,
        seconds: f64,
    ) -> Result<u64> {
        if self.counts.transfers + u64::from(count) > MAX_TRANSFERS {
            let sql = "delete from transfers where id in
                (select id from transfers order by id limit ?)";
            let deleted = self.execute(sql, [count])?;
            self.counts.transfers = self.counts.transfers.saturating_sub(deleted as u64);
        }
        let sql = "insert into transfers (sender_id, receiver_id, created_at) values (?, ?, ?)";
        let mut statement = self.db.prepare_cached(sql)?;
        for _ in 0..count {
            statement.execute(params![sender, receiver, seconds])?;
        }
        self.counts.transfers += u64::from(count);
        let last = u64::try_from(self.db.last_insert_rowid()).unwrap_or(0);
        Ok((last + 1).saturating_sub(count.into()))
    }

    /// Stores the report of one side. If both have reported, updates the reputations.
    pub fn report(&mut self, report: &SideReport, day: i64) -> Result<ReportOutcome> {
        let Some(mut transfer) = StoredTransfer::load(&self.db, report.transfer)? else {
            return Ok(ReportOutcome::NotFound);
        };
        if let Some(refusal) = transfer.refusal(report) {
            return Ok(refusal);
        }
        if self.key(&report.peer_id)?.is_some_and(|key| report.key != Some(key)) {
            return Ok(ReportOutcome::Unproven);
        }
        transfer.record(&self.db, report)?;
        if !transfer.resolved {
            return Ok(ReportOutcome::Pending);
        }
        let StoredTransfer { sender, receiver, .. } = transfer;
        let consistent = sizes_agree(sender.bytes, receiver.bytes);
        // Identities cost nothing. So unsigned reports, and those of two peers in one network, do
        // not change a reputation.
        if sender.network == receiver.network
            || self.key(&sender.peer_id)?.is_none()
            || self.key(&receiver.peer_id)?.is_none()
        {
            return Ok(ReportOutcome::Resolved(consistent));
        }
        if consistent || self.record_blame(&sender.peer_id, receiver.network, day) {
            self.add_to_reputation(&sender.peer_id, consistent, sender.bytes, 0, day)?;
        }
        if consistent || self.record_blame(&receiver.peer_id, sender.network, day) {
            self.add_to_reputation(&receiver.peer_id, consistent, 0, receiver.bytes, day)?;
        }
        Ok(ReportOutcome::Resolved(consistent))
    }

    /// Records a failure. Returns true if it is the first one of that peer, network and day, and
    /// [`MAX_BLAMED`] is not reached.
    fn record_blame(&mut self, id: &str, network: String, day: i64) -> bool {
        if std::mem::replace(&mut self.blamed_day, day) != day {
            self.blamed.clear();
        }
        self.blamed.len() < MAX_BLAMED && self.blamed.insert((id.to_owned(), network))
    }

    fn add_to_reputation(
        &mut self,
        id: &str,
        consistent: bool,
        shared: u64,
        received: u64,
        day: i64,
    ) -> Result<()> {
        let sum = |a: u64, b: u64| a.saturating_add(b).min(MAX_COLUMN);
        let mut new = self.reputation(id)?;
        if consistent {
            new.shared = sum(new.shared, shared);
            new.received = sum(new.received, received);
            new.successful = sum(new.successful, 1);
        } else {
            new.failed = sum(new.failed, 1);
        }
        let numbers =
            [new.shared, new.received, new.successful, new.failed].map(|number| number as i64);
        let values = params![id, numbers[0], numbers[1], numbers[2], numbers[3], day];
        let sql = "update reputation set total_shared = ?2, total_received = ?3, successful_transfers = ?4,
            failed_transfers = ?5, changed_day = ?6 where peer_id = ?1";
        if self.execute(sql, values)? == 0 {
            if self.counts.reputations >= MAX_REPUTATIONS {
                return Ok(());
            }
            let sql = "insert into reputation (peer_id, total_shared, total_received, successful_transfers,
                failed_transfers, changed_day) values (?, ?, ?, ?, ?, ?)";
            self.execute(sql, values)?;
            self.counts.reputations += 1;
        }
        self.changed.push((id.to_owned(), new));
        Ok(())
    }

    /// Writes a value, to test that the database is writable.
    pub fn probe(&mut self, seconds: f64) -> Result<()> {
        let sql = "insert into meta (key, value) values ('probed', ?) on conflict do update set value = excluded.value";
        self.execute(sql, [seconds]).map(drop)
    }

    /// Deletes old transfers in one small step. Each step continues where the last one ended.
    pub fn prune_transfers(&mut self, seconds: f64) -> Result<()> {
        let sql = "select max(id), count(*), min(created_at) from
            (select id, created_at from transfers where id > ? order by id limit ?)";
        let mut statement = self.db.prepare_cached(sql)?;
        let (last, looked_at, oldest): (Option<i64>, i64, Option<f64>) =
            statement.query_row([self.pruned_to, MAX_PRUNED_TRANSFERS], |row| row.try_into())?;
        let kept_from = seconds - TRANSFER_TTL_SECONDS as f64;
        let from = self.pruned_to;
        // IDs ascend with time, so all later transfers are younger still.
        let young = oldest.is_none_or(|oldest| oldest >= kept_from);
        self.pruned_to = last.filter(|_| looked_at == MAX_PRUNED_TRANSFERS && !young).unwrap_or(0);
        let Some(last) = last.filter(|_| !young) else { return Ok(()) };
        let sql = "delete from transfers where id > ? and id <= ? and created_at < ?";
        let deleted = self.execute(sql, params![from, last, kept_from])?;
        self.counts.transfers = self.counts.transfers.saturating_sub(deleted as u64);
        Ok(())
    }

    /// Forgets IDs in one small step, if there are [`FORGET_FROM`] or more. First go the oldest of
    /// those that were seen on one day only and are not live, then those not seen for 90 days.
    pub fn prune_identities(&mut self, day: i64) -> Result<()> {
        if self.counts.identities < FORGET_FROM {
            return Ok(());
        }
        let once = "delete from identities where peer_id in (select peer_id from identities where first_day = seen_day
            and peer_id not in (select peer_id from present) order by seen_day limit ?)";
        let mut deleted = self.execute(once, [MAX_PRUNED_ROWS])?;
        if deleted == 0 {
            let old = "delete from identities where peer_id in
                (select peer_id from identities where seen_day < ? limit ?)";
            deleted = self.execute(old, [day - FORGOTTEN_AFTER_DAYS, MAX_PRUNED_ROWS])?;
        }
        self.counts.identities = self.counts.identities.saturating_sub(deleted as u64);
        Ok(())
    }

    /// Deletes reputations of unbound IDs in one small step, if they have not changed for 90 days.
    /// Scans the whole table.
    pub fn prune_reputations(&mut self, day: i64) -> Result<()> {
        let before = day - FORGOTTEN_AFTER_DAYS;
        let sql = "delete from reputation where peer_id in (select peer_id from reputation where changed_day < ?
            and peer_id not in (select peer_id from identities) limit ?)";
        let deleted = self.execute(sql, [before, MAX_PRUNED_ROWS])?;
        self.counts.reputations = self.counts.reputations.saturating_sub(deleted as u64);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use peerix::wire::tracker::Role;

    const DAY: f64 = 24.0 * 3600.0;

    fn in_memory() -> TrackerDatabase {
        let database = TrackerDatabase::open(Path::new(":memory:")).unwrap();
        database.begin().unwrap();
        database
    }

    fn report(
        database: &mut TrackerDatabase,
        transfer: u64,
        role: Role,
        bytes: u64,
    ) -> ReportOutcome {
        let peer_id = if role == Role::Sender { "a" } else { "b" }.to_owned();
        let network = if role == Role::Sender { 1 } else { 2 };
        database
            .report(&SideReport { transfer, peer_id, role, bytes, key: None, network }, 0)
            .unwrap()
    }

    /// Reports one side, signed by key 1 for `a` and by key 2 for everybody else.
    fn signed(
        database: &mut TrackerDatabase,
        transfer: u64,
        peer_id: &str,
        role: Role,
        bytes: u64,
        network: u128,
    ) -> ReportOutcome {
        let key = Some([if peer_id == "a" { 1 } else { 2 }; 32]);
        let told = SideReport { transfer, peer_id: peer_id.into(), role, bytes, key, network };
        database.report(&told, 7).unwrap()
    }

    #[test]
    fn reputation_sums_are_capped() {
        let mut database = in_memory();
        let huge = (1u64 << 44).to_string();
        let max = i64::MAX.to_string();
        let sql = format!(
            "insert into reputation values ('a', {max}, 0, {max}, 0, 0), ('b', 0, {huge}, 0, {max}, 0)"
        );
        database.db.execute_batch(&sql).unwrap();
        database.bind("a", &[1; 32], 0).unwrap();
        database.bind("b", &[2; 32], 0).unwrap();
        let id = database.begin_transfers("a", "b", 1, 0.0).unwrap();
        signed(&mut database, id, "a", Role::Sender, 1 << 44, 1);
        assert_eq!(
            signed(&mut database, id, "b", Role::Receiver, 1 << 44, 2),
            ReportOutcome::Resolved(true)
        );
        let a = database.reputation("a").unwrap();
        assert_eq!((a.shared, a.successful), (MAX_COLUMN, MAX_COLUMN));
        assert_eq!(database.reputation("b").unwrap().received, 1 << 45);
    }

    #[test]
    fn prune_transfers_deletes_only_expired_transfers() {
        let mut database = in_memory();
        let mut begin = |days: f64| database.begin_transfers("a", "b", 3, days * DAY).unwrap();
        // More rows than one step examines.
        let begun: Vec<u64> = (0..1500).map(|_| begin(0.0)).collect();
        let young = begin(0.05);
        for first in &begun {
            report(&mut database, *first, Role::Sender, 1);
            report(&mut database, *first, Role::Receiver, 1);
        }
        let mut left = |now: f64| {
            // Eight steps examine the whole table twice.
            for _ in 0..8 {
                database.prune_transfers(now * DAY).unwrap();
            }
            let rows: i64 = database
                .db
                .query_row("select count(*) from transfers", [], |row| row.get(0))
                .unwrap();
            assert_eq!(rows as u64, database.counts.transfers);
            rows
        };
        assert_eq!(left(0.08), 4503);
        assert_eq!(left(0.09), 3, "resolved ones are not kept for longer");
        assert_eq!(left(0.14), 0);
        assert_eq!(report(&mut database, young, Role::Sender, 1), ReportOutcome::NotFound);
        assert!(
            database.begin_transfers("a", "b", 1, 0.0).unwrap() > young + 2,
            "no ID is given twice"
        );
    }

    #[test]
    fn prune_identities_near_limit_forgets_ids_of_one_day_first() {
        let mut database = in_memory();
        for (id, day) in [("once", 10), ("here", 40), ("used", 10), ("old", 5), ("new", 50)] {
            assert_eq!(
                database.bind(id, &[7; 32], day).unwrap(),
                BindOutcome::Bound(Reputation::default())
            );
        }
        for (id, day) in [("used", 60), ("old", 6), ("new", 51)] {
            database.record_seen(id, day).unwrap();
        }
        let here =
            PeerAddress { addr: "a".into(), port: 1, from: std::net::Ipv4Addr::LOCALHOST.into() };
        database.record_address("here", &here).unwrap();
        let known =
            |database: &TrackerDatabase, id| database.known_identity(id).unwrap().key.is_some();
        let day = 20 + FORGOTTEN_AFTER_DAYS;
        database.prune_identities(day).unwrap();
        assert_eq!(database.counts.identities, 5, "there is room");
        database.counts.identities = FORGET_FROM;
        database.prune_identities(day).unwrap();
        assert!(!known(&database, "once") && known(&database, "old") && known(&database, "here"));
        database.counts.identities = FORGET_FROM;
        database.prune_identities(day).unwrap();
        assert!(
            !known(&database, "old")
                && known(&database, "used")
                && known(&database, "new")
                && known(&database, "here")
        );
        assert_eq!(database.bind("used", &[8; 32], day).unwrap(), BindOutcome::OtherKey);
        assert_eq!(
            database.bind("old", &[8; 32], day).unwrap(),
            BindOutcome::Bound(Reputation::default())
        );
        database.add_to_reputation("unbound", true, 1, 0, 10).unwrap();
        database.add_to_reputation("used", true, 1, 0, 10).unwrap();
        database.prune_reputations(11 + FORGOTTEN_AFTER_DAYS).unwrap();
        assert_eq!(database.counts.reputations, 1);
    }

    /// Invented peers must not gain reputation, and false reports of one peer must not ruin
    /// another's.
    #[test]
    fn reputation_counts_signed_reports_of_different_networks_only() {
        let mut database = in_memory();
        database.bind("a", &[1; 32], 0).unwrap();
        database.bind("b", &[2; 32], 0).unwrap();
        let mut transfer = |receiver: &str, bytes: u64, networks: (u128, u128)| {
            let id = database.begin_transfers("a", receiver, 1, 0.0).unwrap();
            assert_eq!(
                signed(&mut database, id, "a", Role::Sender, 100, networks.0),
                ReportOutcome::Pending
            );
            let consistent = (95..=105).contains(&bytes);
            let outcome = match receiver {
                "b" => signed(&mut database, id, "b", Role::Receiver, bytes, networks.1),
                _ => {
                    let (peer_id, key) = (receiver.to_owned(), None);
                    let told = SideReport {
                        transfer: id,
                        peer_id,
                        role: Role::Receiver,
                        bytes,
                        key,
                        network: networks.1,
                    };
                    database.report(&told, 7).unwrap()
                }
            };
            assert_eq!(outcome, ReportOutcome::Resolved(consistent));
            let of = |database: &TrackerDatabase, id: &str| {
                let of = database.reputation(id).unwrap();
                (of.successful, of.failed)
            };
            (of(&database, "a"), of(&database, receiver))
        };
        let nothing = (0, 0);
        assert_eq!(transfer("unbound", 100, (1, 2)), (nothing, nothing));
        assert_eq!(transfer("b", 100, (1, 1)), (nothing, nothing));
        assert_eq!(transfer("b", 100, (1, 2)), ((1, 0), (1, 0)));
        // A false report costs the reporter as much, and only the first one of a day counts.
        for _ in 0..256 {
            assert_eq!(transfer("b", 1 << 44, (1, 2)), ((1, 1), (1, 1)));
        }
        assert_eq!(transfer("b", 1 << 44, (1, 3)), ((1, 2), (1, 1)), "of another network");
        assert_eq!(transfer("b", 100, (1, 2)), ((2, 2), (2, 1)));
    }

    #[test]
    fn present_after_long_downtime_is_empty() {
        let mut database = in_memory();
        let at = |port| PeerAddress {
            addr: "example.org".into(),
            port,
            from: "2001:db8::1".parse().unwrap(),
        };
        database.bind("a", &[1; 32], 0).unwrap();
        for (id, port) in [("a", 1), ("a", 2), ("b", 3), ("gone", 4)] {
            database.record_address(id, &at(port)).unwrap();
        }
        database.record_filter("a", 77, &[1, 2, 3]).unwrap();
        database.record_address("a", &at(5)).unwrap();
        database.record_filter("nobody", 77, &[1]).unwrap();
        database.remove_live("gone").unwrap();
        assert!(database.live_peers(1_000_000).unwrap().is_empty(), "not known when that was");
        database.roll_back();
        let mut database = self::in_memory();
        database.bind("a", &[1; 32], 0).unwrap();
        database.record_address("a", &at(5)).unwrap();
        database.record_address("b", &at(3)).unwrap();
        database.record_filter("a", 77, &[1, 2, 3]).unwrap();
        database.record_alive(1_000_000).unwrap();
        let present = database.live_peers(1_000_000 + PRESENT_FOR_MS).unwrap();
        let seen: Vec<_> =
            present.iter().map(|p| (&*p.id, p.address.port, p.key, p.filter.clone())).collect();
        assert_eq!(
            seen,
            [("a", 5, Some([1; 32]), Some((77, vec![1, 2, 3]))), ("b", 3, None, None)]
        );
        assert_eq!(present[0].address, at(5));
        assert!(database.live_peers(1_000_001 + PRESENT_FOR_MS).unwrap().is_empty());
        assert!(database.live_peers(1_000_000).unwrap().is_empty(), "they were forgotten");
    }

    #[test]
    fn failed_job_undoes_only_its_own_changes() {
        let mut database = in_memory();
        database.run_job(|database| database.bind("a", &[1; 32], 0).map(drop)).unwrap();
        let failed = database.run_job(|database| {
            database.bind("b", &[1; 32], 0)?;
            database.add_to_reputation("b", true, 1, 0, 0)?;
            database.db.execute("insert into nothing values (1)", []).map(drop)
        });
        assert!(failed.is_err());
        database.run_job(|database| database.bind("c", &[1; 32], 0).map(drop)).unwrap();
        assert_eq!((database.counts.identities, database.counts.reputations), (2, 0));
        assert_eq!(database.commit().unwrap(), []);
        let known = |id| database.known_identity(id).unwrap().key.is_some();
        assert!(known("a") && !known("b") && known("c"));
    }

    #[test]
    fn full_tables_refuse_new_rows_and_keep_old_ones() {
        let mut database = in_memory();
        database.bind("a", &[1; 32], 0).unwrap();
        let id = database.begin_transfers("a", "b", 1, 0.0).unwrap();
        database.counts = RowCounts {
            identities: MAX_IDENTITIES,
            reputations: MAX_REPUTATIONS,
            transfers: MAX_TRANSFERS,
        };
        assert_eq!(database.bind("b", &[1; 32], 0).unwrap(), BindOutcome::Full);
        assert!(matches!(database.bind("a", &[1; 32], 1).unwrap(), BindOutcome::Bound(_)));
        assert_eq!(signed(&mut database, id, "a", Role::Sender, 1, 1), ReportOutcome::Pending);
        assert_eq!(report(&mut database, id, Role::Receiver, 1), ReportOutcome::Resolved(true));
        database.add_to_reputation("a", true, 1, 0, 0).unwrap();
        assert_eq!(database.reputation("a").unwrap(), Reputation::default());
    }

    /// Guards against a few addresses that fill the table, so that nobody else begins transfers.
    #[test]
    fn transfers_beyond_limit_replace_oldest() {
        let mut database = in_memory();
        let [first, second] = [1, 2].map(|n| database.begin_transfers("a", "b", n, 0.0).unwrap());
        database.counts.transfers = MAX_TRANSFERS;
        let new = database.begin_transfers("a", "b", 2, 0.0).unwrap();
        assert_eq!(database.counts.transfers, MAX_TRANSFERS);
        let mut send = |id| report(&mut database, id, Role::Sender, 1);
        assert_eq!([send(first), send(second)], [ReportOutcome::NotFound; 2]);
        assert_eq!([send(second + 1), send(new), send(new + 1)], [ReportOutcome::Pending; 3]);
    }

    /// A limit on the number of pages stands for a full disk.
    #[test]
    fn full_disk_rolls_back_transaction_and_recovers() {
        let mut database = in_memory();
        database.begin_transfers("a", "b", 1, 0.0).unwrap();
        database.commit().unwrap();
        let pages: i64 =
            database.db.pragma_query_value(None, "page_count", |row| row.get(0)).unwrap();
        let allow = |database: &TrackerDatabase, max: i64| {
            database
                .db
                .query_row(&format!("pragma max_page_count = {max}"), [], |_| Ok(()))
                .unwrap();
        };
        allow(&database, pages);
        database.begin().unwrap();
        database.add_to_reputation("a", true, 5, 0, 0).unwrap();
        let full =
            (0..10_000).find_map(|_| database.begin_transfers("a", "b", 256, 0.0).err()).unwrap();
        assert_eq!(full.sqlite_error_code(), Some(rusqlite::ErrorCode::DiskFull));
        database.roll_back();
        assert_eq!((database.counts.transfers, database.counts.reputations), (1, 0));
        assert_eq!(database.reputation("a").unwrap(), Reputation::default());
        allow(&database, 1 << 20);
        database.begin().unwrap();
        assert_eq!(database.begin_transfers("a", "b", 256, 0.0).unwrap(), 2);
        assert_eq!(database.commit().unwrap(), []);
        assert_eq!(database.counts.transfers, 257);
    }
}
