//! The thread that writes the counters.

use crate::peers::pace::Paces;
use crate::peers::saved_paces;
use crate::stats::Stats;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

/// Interval between writes of the counters. A power failure loses at most this much.
const SAVE_INTERVAL: Duration = Duration::from_secs(60);

/// The thread that writes the counters. None runs without a state directory.
pub(super) struct CountersThread {
    /// Dropping it ends the thread after a last write.
    pub(super) running: Sender<()>,
    /// Disconnected when the thread has ended.
    pub(super) ended: Receiver<()>,
}

impl CountersThread {
    /// Loads counters and paces from the state directory, and starts a thread that writes them at
    /// once, every [`SAVE_INTERVAL`] and at the end. It is separate because the disk may hang.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(
        state_dir: Option<PathBuf>,
        stats: Arc<Stats>,
        paces: Arc<Paces>,
    ) -> io::Result<CountersThread> {
        let (running, stopped) = bounded::<()>(0);
        let (end, ended) = bounded::<()>(0);
        let Some(dir) = state_dir else { return Ok(CountersThread { running, ended }) };
        stats.load_earlier(&dir, SystemTime::now());
        saved_paces::load(&paces, &dir);
        let save = move || {
            stats.save(SystemTime::now());
            // Debug level only: the counters report a failing disk.
            if let Err(e) = saved_paces::save(&paces, &dir) {
                log::debug!("paces: {e}");
            }
        };
        thread::Builder::new().name("counters".into()).spawn(move || {
            let _end = end;
            save();
            while stopped.recv_timeout(SAVE_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                save();
            }
            save();
        })?;
        Ok(CountersThread { running, ended })
    }
}
