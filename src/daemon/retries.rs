//! Retries what failed at the start: keys, the identity and the metrics address.

use super::metrics::MetricsServer;
use super::node::Node;
use super::process::Wakeup;
use crate::time_scale::Interval;
use crate::trust::TrustedKeys;
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use std::io;
use std::sync::Arc;
use std::thread;

/// Interval between retries of what failed at the start: keys, the identity, the metrics address;
/// and at last the database. nix.conf is checked for changes in the same interval.
pub(super) const RETRY_INTERVAL: Interval = Interval::from_secs(60);

/// Starts a thread that retries every [`RETRY_INTERVAL`] what failed at the start. It is separate
/// because the disk may hang. Dropping the returned sender ends it, without waiting for a running
/// try.
///
/// # Errors
/// No thread can be started.
pub(super) fn start_retries(
    node: Arc<Node>,
    trusted: Arc<TrustedKeys>,
    metrics: Arc<MetricsServer>,
    wakeups: Sender<Wakeup>,
) -> io::Result<Sender<()>> {
    let (running, stopped) = bounded::<()>(0);
    thread::Builder::new().name("retries".into()).spawn(move || {
        while stopped.recv_timeout(RETRY_INTERVAL.get()) == Err(RecvTimeoutError::Timeout) {
            // The published filter lacks the paths that were withheld without the key. A restart
            // rebuilds it.
            let has_more_to_publish = node.read_own_key() && node.config.mode.has_wan();
            trusted.refresh(&node.degraded);
            metrics.start(&node.degraded);
            if has_more_to_publish || node.retry_identity() {
                let _ = wakeups.try_send(Wakeup::Restart);
                return;
            }
        }
    })?;
    Ok(running)
}
