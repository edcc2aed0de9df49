//! The file of the database: how it is opened, and the tables of each version.

use peerix::wire::tracker::{MAX_PEER_ID, TransferName};
use ring::rand::{SecureRandom, SystemRandom};
use rusqlite::{Connection, ErrorCode, Result};
use std::path::Path;
use std::time::Duration;

/// Version of the schema, stored as `user_version`. The original's databases have 0.
const SCHEMA_VERSION: i64 = 2;

/// Maximum wait for another process to release the database, such as a tracker that is stopping.
/// After it, opening fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Largest number that a column holds. Sums are capped here.
pub(super) const MAX_COLUMN: u64 = i64::MAX as u64;

const TABLES: &str = "
    create table if not exists transfers (
        id integer primary key autoincrement,
        sender_id text not null,
        receiver_id text not null,
        sender_bytes integer,
        receiver_bytes integer,
        sender_confirmed integer default 0,
        receiver_confirmed integer default 0,
        resolved integer default 0,
        created_at real not null
    );
    create table if not exists reputation (
        peer_id text primary key,
        total_shared integer default 0,
        total_received integer default 0,
        successful_transfers integer default 0,
        failed_transfers integer default 0
    );
    alter table reputation add column changed_day integer not null default 0;
    create table identities (
        peer_id text primary key,
        public_key blob not null,
        seen_day integer not null
    ) without rowid;
    create index identities_seen on identities (seen_day);
    create table meta (key text primary key, value) without rowid;
    drop table if exists peers;
";

/// Schema changes of version 2: the live peers, the first day of bound IDs, networks of reports.
const TABLES_2: &str = "
    create table present (
        peer_id text primary key,
        addr text not null,
        port integer not null,
        came_from text not null,
        filter_stamp integer,
        filter blob
    ) without rowid;
    alter table identities add column first_day integer not null default 0;
    create index identities_once on identities (seen_day) where first_day = seen_day;
    alter table transfers add column sender_network text;
    alter table transfers add column receiver_network text;
";

/// Repairs a database of the original, which checks neither types nor signs of its values.
const CLEAN: &str = "
    delete from reputation where typeof(peer_id) <> 'text' or length(cast(peer_id as blob)) not between 1 and ?1;
    update reputation set total_shared = 0 where typeof(total_shared) <> 'integer' or total_shared < 0;
    update reputation set total_received = 0 where typeof(total_received) <> 'integer' or total_received < 0;
    update reputation set successful_transfers = 0
        where typeof(successful_transfers) <> 'integer' or successful_transfers < 0;
    update reputation set failed_transfers = 0 where typeof(failed_transfers) <> 'integer' or failed_transfers < 0;
    delete from transfers where typeof(sender_id) <> 'text' or typeof(receiver_id) <> 'text'
        or length(cast(sender_id as blob)) not between 1 and ?1 or length(cast(receiver_id as blob)) not between 1 and ?1
        or typeof(sender_bytes) not in ('integer', 'null') or sender_bytes < 0
        or typeof(receiver_bytes) not in ('integer', 'null') or receiver_bytes < 0
        or typeof(created_at) not in ('integer', 'real');
";

/// Opens the database. Creates or migrates its tables. Returns it with the tracker's ID. Blocks for
/// up to 5 s while another process has it.
///
/// # Errors
/// Returns one line that says what is wrong and what to do.
pub(super) fn open(path: &Path) -> std::result::Result<(Connection, String), String> {
    let wrong = |e| open_error(path, e);
    let db = Connection::open(path).map_err(wrong)?;
    prepare(&db).map_err(wrong)?;
    let version: i64 =
        db.pragma_query_value(None, "user_version", |row| row.get(0)).map_err(wrong)?;
    match version {
        0 => migrate(&db).and_then(|()| migrate_2(&db)).map_err(wrong)?,
        1 => migrate_2(&db).map_err(wrong)?,
        SCHEMA_VERSION => {}
        newer => {
            return Err(format!(
                "database {}: of version {newer}, which a newer peerix-tracker made; this one knows {SCHEMA_VERSION}: run the newer one, or name another --db-path",
                path.display()
            ));
        }
    }
    let tracker_id =
        db.query_row("select value from meta where key = 'tracker_id'", [], |row| row.get(0));
    let tracker_id: String = tracker_id.map_err(wrong)?;
    if tracker_id.len() != TransferName::TRACKER_ID_LEN
        || !tracker_id.bytes().all(|b| b.is_ascii_hexdigit())
    {
        return Err(format!(
            "database {}: its tracker ID is none; --db-path names another",
            path.display()
        ));
    }
    Ok((db, tracker_id))
}

/// One line on an error at the start: what is wrong and what to do.
pub(super) fn open_error(path: &Path, e: rusqlite::Error) -> String {
    let remedy = match e.sqlite_error_code() {
        Some(ErrorCode::DatabaseBusy) => "another tracker has it; one database is for one tracker",
        Some(ErrorCode::NotADatabase) => "not an SQLite database; --db-path names another",
        _ => "--db-path needs a file in a directory that this user can write to",
    };
    format!("database {}: {e}; {remedy}", path.display())
}

fn prepare(db: &Connection) -> Result<()> {
    db.busy_timeout(BUSY_TIMEOUT)?;
    // No other process may change the database while it is open, as row counts are kept in memory.
    db.pragma_update(None, "locking_mode", "exclusive")?;
    db.pragma_update_and_check(None, "journal_mode", "wal", |_| Ok(()))?;
    // A commit returns only when its data is on the disk.
    db.pragma_update(None, "synchronous", "full")?;
    db.set_prepared_statement_cache_capacity(64);
    // Takes the lock now, so that a second tracker fails at its start.
    db.execute_batch("begin immediate; commit")
}

fn migrate(db: &Connection) -> Result<()> {
    db.execute_batch("begin immediate")?;
    db.execute_batch(TABLES)?;
    let today =
        "update reputation set changed_day = cast(strftime('%s', 'now') / 86400 as integer)";
    db.execute_batch(today)?;
    for statement in CLEAN.split_inclusive(';').filter(|statement| statement.contains(';')) {
        let values: &[&dyn rusqlite::ToSql] =
            if statement.contains("?1") { &[&(MAX_PEER_ID as i64)] } else { &[] };
        db.execute(statement.trim(), values)?;
    }
    let mut random = [0; TransferName::TRACKER_ID_LEN / 2];
    if SystemRandom::new().fill(&mut random).is_err() {
        return Err(rusqlite::Error::ToSqlConversionFailure("no random numbers to be had".into()));
    }
    let id = data_encoding::HEXLOWER.encode(&random);
    db.execute("insert into meta (key, value) values ('tracker_id', ?)", [id])?;
    db.pragma_update(None, "user_version", 1)?;
    db.execute_batch("commit")
}

fn migrate_2(db: &Connection) -> Result<()> {
    db.execute_batch("begin immediate")?;
    db.execute_batch(TABLES_2)?;
    db.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    db.execute_batch("commit")
}
