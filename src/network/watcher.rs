//! Keeps [`Networks`] up to date. The kernel reports changes of interfaces and addresses on a
//! netlink socket; without that socket the addresses are polled.

use super::interfaces::{self, InterfaceAddress};
use super::netlink;
use super::networks::Networks;
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, recv};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A netlink socket on which the kernel reports changes of interfaces and addresses.
pub struct ChangeMonitor {
    socket: OwnedFd,
}

/// Bit mask `RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR` of rtnetlink(7).
const GROUPS: u32 = 0x1 | 0x10 | 0x100;

/// Maximum number of datagrams that one call of [`ChangeMonitor::drain`] reads. At the bound the
/// socket stays readable.
const MAX_DATAGRAMS: usize = 1024;

impl ChangeMonitor {
    /// Opens the socket. The kernel reports changes from then on.
    ///
    /// # Errors
    /// No netlink socket is allowed (in a systemd unit, by `RestrictAddressFamilies=`), or no file
    /// descriptor is left.
    pub fn open() -> io::Result<Self> {
        Ok(ChangeMonitor { socket: netlink::open(GROUPS)? })
    }

    /// Reads the reports so far, without blocking. Returns whether an interface or an address may
    /// have changed since the last call. Reports that were lost, and errors, count as a change.
    pub fn drain(&self) -> bool {
        // The header of a message, which holds its type, fits.
        let mut buffer = [0; 4096];
        let mut has_changed = false;
        for _ in 0..MAX_DATAGRAMS {
            match retry_on_intr(|| recv(&self.socket, &mut buffer[..], RecvFlags::TRUNC)) {
                Ok((len, whole)) => has_changed |= whole > len || reports_change(&buffer[..len]),
                Err(Errno::NOBUFS) => has_changed = true,
                Err(Errno::AGAIN) => break,
                Err(e) => {
                    log::error!("news of network interfaces: {e}");
                    return true;
                }
            }
        }
        has_changed
    }
}

impl AsFd for ChangeMonitor {
    /// Readable when the kernel has reported something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn reports_change(datagram: &[u8]) -> bool {
    let kinds = [netlink::LINK, netlink::LINK_GONE, netlink::ADDRESS, netlink::ADDRESS_GONE];
    netlink::messages(datagram).any(|message| kinds.contains(&message.kind))
}

/// Interval between two readings of the addresses without a [`ChangeMonitor`].
pub const POLL_INTERVAL: Duration = Duration::from_secs(30);

/// Minimum interval between two readings that a failed send or a failed reading causes.
pub const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Reads the addresses of this machine again when the kernel reports a change.
///
/// Without a [`ChangeMonitor`] it reads them every [`POLL_INTERVAL`], and after a failed send, at
/// most once in [`RETRY_INTERVAL`].
pub struct NetworkWatcher {
    networks: Arc<Networks>,
    monitor: Option<ChangeMonitor>,
    last_read: Instant,
    /// When the addresses are read again even if the kernel reports nothing.
    next_read: Option<Instant>,
    is_failing: bool,
}

impl NetworkWatcher {
    /// Opens a [`ChangeMonitor`] and reads the addresses once, because a change between their first
    /// reading and now is not reported. If no monitor can be opened, it logs a warning and polls.
    /// Blocks as long as [`interfaces::read`].
    pub fn new(networks: Arc<Networks>, now: Instant) -> Self {
        let monitor = ChangeMonitor::open().inspect_err(|e| {
            let pause = POLL_INTERVAL.as_secs();
            log::warn!(
                "no news of network interfaces from the kernel: {e}; they are read every {pause} s \
                 and when something cannot be sent (a unit needs \
                 RestrictAddressFamilies=AF_NETLINK)"
            );
        });
        let (monitor, next_read) = (monitor.ok(), Some(now));
        let (last_read, is_failing) = (now, false);
        let mut watcher = NetworkWatcher { networks, monitor, last_read, next_read, is_failing };
        watcher.update(false, now);
        watcher
    }

    /// File descriptor that is readable when [`NetworkWatcher::update`] has reports to read. `None`
    /// without a monitor.
    pub fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.monitor.as_ref().map(AsFd::as_fd)
    }

    /// When [`NetworkWatcher::update`] must be called even if the kernel reports nothing.
    pub fn next_due(&self) -> Option<Instant> {
        self.next_read
    }

    /// Reads the addresses again if there is a reason to. Returns whether the interfaces in use or
    /// their addresses changed. `send_failed` tells whether a send failed since the last call.
    /// Blocks as long as [`interfaces::read`], if it reads. On an error it logs the first one and
    /// keeps the old addresses.
    pub fn update(&mut self, send_failed: bool, now: Instant) -> bool {
        let is_reported = self.monitor.as_ref().is_some_and(ChangeMonitor::drain);
        let is_due = is_reported || self.is_due(send_failed, now);
        is_due && self.apply_reading(interfaces::read(), now)
    }

    fn is_due(&self, send_failed: bool, now: Instant) -> bool {
        let is_late = self.next_read.is_some_and(|at| at <= now);
        let may_retry = now.saturating_duration_since(self.last_read) >= RETRY_INTERVAL;
        is_late || send_failed && self.monitor.is_none() && may_retry
    }

    fn apply_reading(&mut self, read: io::Result<Vec<InterfaceAddress>>, now: Instant) -> bool {
        self.last_read = now;
        match read {
            Ok(interfaces) => {
                self.is_failing = false;
                self.next_read = self.monitor.is_none().then_some(now + POLL_INTERVAL);
                self.networks.replace(interfaces)
            }
            Err(e) => {
                if !self.is_failing {
                    log::error!("network interfaces: {e}");
                }
                self.is_failing = true;
                let may_be_forbidden = self.monitor.is_none();
                let pause = if may_be_forbidden { POLL_INTERVAL } else { RETRY_INTERVAL };
                self.next_read = Some(now + pause);
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::policy::NetworkPolicy;

    fn watcher(monitor: Option<ChangeMonitor>, now: Instant) -> NetworkWatcher {
        let networks = Arc::new(Networks::new(NetworkPolicy::default(), Vec::new()));
        NetworkWatcher { networks, monitor, last_read: now, next_read: None, is_failing: false }
    }

    fn eth0() -> InterfaceAddress {
        InterfaceAddress {
            name: "eth0".into(),
            index: 2,
            address: "10.0.0.1".parse().unwrap(),
            prefix_len: 24,
            broadcast: None,
            running: true,
        }
    }

    #[test]
    fn only_interface_and_address_messages_report_a_change() {
        let header = |kind: u16| [&16u32.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10]].concat();
        for (kind, expected) in [(16, true), (17, true), (20, true), (21, true), (24, false)] {
            assert_eq!(reports_change(&header(kind)), expected, "{kind}");
            let second = [header(24), header(kind)].concat();
            assert_eq!(reports_change(&second), expected, "{kind}");
        }
        assert!(!reports_change(b"short"));
    }

    #[test]
    fn new_monitor_reports_no_change() {
        // Other interfaces may change meanwhile, but not each of 100 times.
        let is_silent = || !ChangeMonitor::open().unwrap().drain();
        assert!((0..100).any(|_| is_silent()));
    }

    #[test]
    fn changed_addresses_are_reported_once() {
        let now = Instant::now();
        let mut watcher = watcher(None, now);
        assert!(watcher.apply_reading(Ok(vec![eth0()]), now));
        assert!(!watcher.apply_reading(Ok(vec![eth0()]), now));
        assert!(watcher.apply_reading(Ok(Vec::new()), now));
    }

    #[test]
    fn addresses_without_a_monitor_are_polled() {
        let now = Instant::now();
        let mut watcher = watcher(None, now);
        watcher.apply_reading(Ok(Vec::new()), now);
        assert_eq!(watcher.next_due(), Some(now + POLL_INTERVAL));
        assert!(!watcher.is_due(false, now + POLL_INTERVAL - Duration::from_millis(1)));
        assert!(watcher.is_due(false, now + POLL_INTERVAL));
        assert!(!watcher.is_due(true, now + RETRY_INTERVAL - Duration::from_millis(1)));
        assert!(watcher.is_due(true, now + RETRY_INTERVAL));
        watcher.apply_reading(Err(io::ErrorKind::PermissionDenied.into()), now);
        assert_eq!(watcher.next_due(), Some(now + POLL_INTERVAL));
    }

    #[test]
    fn failed_reading_with_a_monitor_is_retried() {
        let now = Instant::now();
        let mut watcher = watcher(Some(ChangeMonitor::open().unwrap()), now);
        watcher.apply_reading(Ok(vec![eth0()]), now);
        assert_eq!(watcher.next_due(), None);
        assert!(!watcher.is_due(true, now + POLL_INTERVAL));
        assert!(!watcher.apply_reading(Err(io::ErrorKind::OutOfMemory.into()), now));
        assert!(watcher.networks.is_own(eth0().address), "what was read before stays");
        assert_eq!(watcher.next_due(), Some(now + RETRY_INTERVAL));
        assert!(watcher.is_due(false, now + RETRY_INTERVAL));
        watcher.apply_reading(Ok(Vec::new()), now + RETRY_INTERVAL);
        assert_eq!(watcher.next_due(), None);
    }
}
