//! Transfers as the database stores them, and the reports of their two sides.

use super::schema::MAX_COLUMN;
use peerix::wire::tracker::Role;
use rusqlite::{Connection, OptionalExtension, Result, Row, params};

/// Two reports agree if they differ by at most one part in this many of the greater: 5 %.
const TOLERANCE_DIVISOR: u64 = 20;

/// The report of one side of a transfer.
#[derive(Debug, Clone)]
pub struct SideReport {
    /// ID of the transfer.
    pub transfer: u64,
    /// ID of the reporting peer.
    pub peer_id: String,
    /// Its side of the transfer.
    pub role: Role,
    /// Transferred bytes according to it.
    pub bytes: u64,
    /// The key that signed the report.
    pub key: Option<[u8; 32]>,
    /// The network (see [`crate::address::network`]) from which it came.
    pub network: u128,
}

/// Result of [`crate::database::TrackerDatabase::report`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReportOutcome {
    /// The other side has not reported yet.
    Pending,
    /// Both sides have reported; true if they agree.
    Resolved(bool),
    /// There is no such transfer.
    NotFound,
    /// Both sides had reported before.
    AlreadyResolved,
    /// Another peer has this side of the transfer.
    WrongPeer,
    /// This side had reported before.
    SameSideAgain,
    /// The ID is bound to a key that has not signed the report.
    Unproven,
}

/// One side of a stored transfer.
pub(super) struct TransferSide {
    pub(super) peer_id: String,
    /// Bytes according to its report; 0 without a report.
    pub(super) bytes: u64,
    has_reported: bool,
    /// The network from which its report came, in hexadecimal digits; empty without a
    /// report.
    pub(super) network: String,
}

impl TransferSide {
    /// Reads a side from four consecutive columns, starting at `first`: peer ID, bytes, whether it
    /// has reported, network.
    fn read(row: &Row<'_>, first: usize) -> Result<TransferSide> {
        let bytes: Option<i64> = row.get(first + 1)?;
        let network: Option<String> = row.get(first + 3)?;
        Ok(TransferSide {
            peer_id: row.get(first)?,
            bytes: bytes.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0),
            has_reported: row.get(first + 2)?,
            network: network.unwrap_or_default(),
        })
    }
}

/// A stored transfer.
pub(super) struct StoredTransfer {
    id: i64,
    pub(super) sender: TransferSide,
    pub(super) receiver: TransferSide,
    /// Whether both sides have reported.
    pub(super) resolved: bool,
}

impl StoredTransfer {
    /// Reads a transfer. Returns `None` if there is none with this ID.
    ///
    /// # Errors
    /// Returns SQLite's error.
    pub(super) fn load(db: &Connection, id: u64) -> Result<Option<StoredTransfer>> {
        let Ok(id) = i64::try_from(id) else { return Ok(None) };
        let sql = "select
            sender_id, sender_bytes, coalesce(sender_confirmed, 0) <> 0, sender_network,
            receiver_id, receiver_bytes, coalesce(receiver_confirmed, 0) <> 0, receiver_network,
            coalesce(resolved, 0) <> 0 from transfers where id = ?";
        let transfer = db.prepare_cached(sql)?.query_row([id], |row| {
            let (sender, receiver) = (TransferSide::read(row, 0)?, TransferSide::read(row, 4)?);
            Ok(StoredTransfer { id, sender, receiver, resolved: row.get(8)? })
        });
        transfer.optional()
    }

    /// Returns why a report does not fit the transfer; `None` if it does.
    pub(super) fn refusal(&self, report: &SideReport) -> Option<ReportOutcome> {
        let side = match report.role {
            Role::Sender => &self.sender,
            Role::Receiver => &self.receiver,
        };
        if self.resolved {
            Some(ReportOutcome::AlreadyResolved)
        } else if side.peer_id != report.peer_id {
            Some(ReportOutcome::WrongPeer)
        } else if side.has_reported {
            Some(ReportOutcome::SameSideAgain)
        } else {
            None
        }
    }

    /// Stores the report of one side. The transfer is resolved if the other side had reported.
    ///
    /// # Errors
    /// Returns SQLite's error.
    pub(super) fn record(&mut self, db: &Connection, report: &SideReport) -> Result<()> {
        let (side, other, sql) = match report.role {
            Role::Sender => (
                &mut self.sender,
                &self.receiver,
                "update transfers set sender_bytes = ?, sender_confirmed = 1, resolved = ?, sender_network = ? where id = ?",
            ),
            Role::Receiver => (
                &mut self.receiver,
                &self.sender,
                "update transfers set receiver_bytes = ?, receiver_confirmed = 1, resolved = ?, receiver_network = ?
                    where id = ?",
            ),
        };
        side.bytes = report.bytes;
        side.has_reported = true;
        side.network = format!("{:x}", report.network);
        self.resolved = other.has_reported;
        let bytes = report.bytes.min(MAX_COLUMN) as i64;
        let values = params![bytes, self.resolved, side.network, self.id];
        db.prepare_cached(sql)?.execute(values).map(drop)
    }
}

/// Whether two reported sizes differ by at most 5 % of the greater.
pub(super) fn sizes_agree(a: u64, b: u64) -> bool {
    u128::from(a.abs_diff(b)) * u128::from(TOLERANCE_DIVISOR) <= u128::from(a.max(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_agree_within_a_twentieth_of_the_greater() {
        for (a, b, agrees) in [
            (0, 0, true),
            (0, 1, false),
            (100, 95, true),
            (100, 94, false),
            (95, 100, true),
            (1 << 44, 1 << 44, true),
            (1 << 44, 0, false),
            (u64::MAX, u64::MAX - 1, true),
        ] {
            assert_eq!(sizes_agree(a, b), agrees, "{a}, {b}");
        }
    }
}
