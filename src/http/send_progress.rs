//! How a client takes what it is sent: since when its send buffer has been full, whether it takes
//! enough, and whether it has to give way to others.

use crate::lock::Mutex;
use crate::time_scale::Timeout;
use scopeguard::{ScopeGuard, guard};
use std::io;
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

/// Time that a client may take no bytes before its connection is cut. Also the waiting time over
/// which [`MIN_RATE`] is averaged.
pub(super) const WRITE_TIMEOUT: Timeout = Timeout::from_secs(30);

/// Time for which a client takes nothing before it is ended for another client at a limit. A Nix
/// that unpacks a large file pauses for seconds.
pub(super) const STALL_TIMEOUT: Timeout = Timeout::from_secs(10);

/// Bytes per second that another machine has to take while the send buffer is full. A client that
/// takes a few bytes now and then would otherwise hold a thread and a stream without end. Slower
/// links carry no NAR in reasonable time. This machine's Nix is exempt: it pauses a download while
/// it unpacks.
const MIN_RATE: u64 = 8 << 10;

/// Zero of the clock of [`SendProgress::stalled_since`], an hour ago, so that no moment is 0.
static CLOCK_ZERO: LazyLock<Instant> = LazyLock::new(|| Instant::now() - Duration::from_secs(3600));

/// The progress of sending to one client. Written by the thread that sends, read by all.
#[derive(Default)]
pub(super) struct SendProgress {
    has_min_rate: bool,
    /// Milliseconds since [`CLOCK_ZERO`] at which the send buffer became full; 0 while it has room.
    full_since: AtomicU64,
    gives_way: AtomicBool,
    is_closed: AtomicBool,
    window: Mutex<RateWindow>,
}

/// Waiting time since the rate was last judged, and the bytes that the client took in it.
#[derive(Default)]
struct RateWindow {
    waited: Duration,
    taken: u64,
    /// Time left for all waits together.
    left: Option<Duration>,
}

impl RateWindow {
    /// Bytes before the first wait do not count: they only filled the send buffer.
    fn record_taken(&mut self, bytes: usize) {
        if !self.waited.is_zero() {
            self.taken += bytes as u64;
        }
    }

    /// Returns false if the client took less than [`MIN_RATE`] over a whole window.
    fn record_wait(&mut self, wait: Duration) -> bool {
        self.waited += wait;
        if self.waited < WRITE_TIMEOUT.get() {
            return true;
        }
        let (waited, taken) = (mem::take(&mut self.waited), mem::take(&mut self.taken));
        taken as f64 >= waited.as_secs_f64() * MIN_RATE as f64
    }
}

impl SendProgress {
    /// `has_min_rate` says that the client has to take [`MIN_RATE`].
    pub(super) fn new(has_min_rate: bool) -> Self {
        SendProgress { has_min_rate, ..SendProgress::default() }
    }

    /// Milliseconds on a clock common to all clients since which the client has taken nothing;
    /// `None` if the send buffer has room.
    pub(super) fn stalled_since(&self) -> Option<u64> {
        Some(self.full_since.load(Ordering::Relaxed)).filter(|&since| since != 0)
    }

    /// Time for which the client has taken nothing at `now`.
    pub(super) fn stalled_for(&self, now: Instant) -> Duration {
        let since = self.stalled_since().unwrap_or(u64::MAX);
        Duration::from_millis(moment(now).saturating_sub(since))
    }

    /// Makes the next or current wait for this client fail, because others need what it holds.
    pub(super) fn give_way(&self) {
        self.gives_way.store(true, Ordering::Relaxed);
    }

    /// Forgets [`SendProgress::give_way`]: what this client held is returned.
    pub(super) fn clear_give_way(&self) {
        self.gives_way.store(false, Ordering::Relaxed);
    }

    /// Records that the connection was closed, for threads that wait for something else than room.
    pub(super) fn record_closed(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    /// Whether the connection was closed from this side.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Relaxed)
    }

    /// A client that has taken nothing for `time`, for tests.
    #[cfg(test)]
    pub(super) fn stalled(time: Duration) -> Self {
        let full_since = AtomicU64::new(moment(Instant::now()) - time.as_millis() as u64);
        SendProgress { full_since, ..SendProgress::default() }
    }

    /// Makes waits for this client fail once they have taken `time` together, until the result is
    /// dropped. Waits for the upload limit do not count.
    pub(super) fn limit_waits(
        self: &Arc<Self>,
        time: Duration,
    ) -> ScopeGuard<(), impl FnOnce(()) + use<>> {
        self.window.lock().left = Some(time);
        let progress = self.clone();
        guard((), move |()| progress.window.lock().left = None)
    }

    /// Whether [`SendProgress::give_way`] was called.
    pub(super) fn has_to_give_way(&self) -> bool {
        self.gives_way.load(Ordering::Relaxed)
    }

    pub(super) fn record_taken(&self, bytes: usize) {
        self.window.lock().record_taken(bytes);
    }

    /// Waits until the send buffer has room. `wait` waits for that at most as long as it is told,
    /// and returns whether there is room.
    ///
    /// # Errors
    /// [`io::ErrorKind::TimedOut`] if the client takes nothing for [`WRITE_TIMEOUT`], exceeds the
    /// time of [`SendProgress::limit_waits`], takes too little, or gives way. Errors of `wait`.
    pub(super) fn wait_for_room(
        &self,
        wait: impl Fn(Duration) -> io::Result<bool>,
    ) -> io::Result<()> {
        /// A sender notices within this time that it gives way.
        const PART: Duration = Duration::from_millis(250);
        let began = Instant::now();
        let left = self.window.lock().left;
        let max = left.unwrap_or(Duration::MAX).min(WRITE_TIMEOUT.get());
        let deadline = began + max;
        self.full_since.store(moment(began), Ordering::Relaxed);
        let has_room = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || self.has_to_give_way() {
                break Ok(false);
            }
            match wait(PART.min(left)) {
                Ok(false) => {}
                ended => break ended,
            }
        };
        self.full_since.store(0, Ordering::Relaxed);
        let waited = began.elapsed();
        let mut window = self.window.lock();
        window.left = window.left.map(|left| left.saturating_sub(waited));
        let is_fast = window.record_wait(waited) || !self.has_min_rate;
        if has_room? && is_fast { Ok(()) } else { Err(io::ErrorKind::TimedOut.into()) }
    }
}

/// Milliseconds from [`CLOCK_ZERO`] to `now`.
fn moment(now: Instant) -> u64 {
    now.saturating_duration_since(*CLOCK_ZERO).as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn client_below_least_rate_is_cut_and_faster_one_is_not() {
        let seconds = WRITE_TIMEOUT.get().as_secs();
        for (per_second, is_cut) in [(1, true), (MIN_RATE / 2, true), (MIN_RATE * 2, false)] {
            let mut window = RateWindow::default();
            window.record_taken(4 << 20); // into the send buffer
            let goes_on = (0..4 * seconds).all(|_| {
                let goes_on = window.record_wait(Duration::from_secs(1));
                window.record_taken(per_second as usize);
                goes_on
            });
            assert_eq!(goes_on, !is_cut, "{per_second}");
        }
    }

    #[test]
    fn giving_way_ends_the_wait() {
        let progress = SendProgress::default();
        assert_eq!(progress.stalled_for(Instant::now()), Duration::ZERO);
        progress.wait_for_room(|_| Ok(true)).unwrap();
        assert_eq!(progress.stalled_since(), None);
        let waited = progress.wait_for_room(|_| {
            assert!(progress.stalled_since().is_some());
            progress.give_way();
            Ok(false)
        });
        assert_eq!(waited.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }

    /// Regression test: the wait for the own upload limit counted as the client's.
    #[test]
    fn limit_counts_waits_for_room_only_and_until_it_is_dropped() {
        let progress = Arc::new(SendProgress::default());
        let (short, long) = (Duration::from_millis(5), Duration::from_millis(50));
        let limit = progress.limit_waits(long);
        thread::sleep(2 * long);
        progress.wait_for_room(|_| Ok(true)).unwrap();
        let wait = |_| {
            thread::sleep(short);
            Ok(true)
        };
        let waits = (0..11).filter(|_| progress.wait_for_room(wait).is_ok()).count();
        assert!((1..11).contains(&waits), "{waits}");
        drop(limit);
        progress.wait_for_room(|_| Ok(true)).unwrap();
    }
}
