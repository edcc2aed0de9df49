//! Limits the wait of a single read to less than the connection's own timeout, without losing the
//! connection.
//!
//! ureq has one timeout per connection and none per call of `read`. [`with_timeout`] stores the
//! limit in a thread-local variable; the transport reads it, because a read runs in the thread that
//! calls it.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

thread_local! {
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Runs `read` with a time limit of `timeout` for all reads of connections that it makes in this
/// thread, taken together.
pub(super) fn with_timeout<T>(timeout: Duration, read: impl FnOnce() -> T) -> T {
    DEADLINE.set(Some(Instant::now() + timeout));
    let result = read();
    DEADLINE.set(None);
    result
}

/// Returns true if a read ended because of [`with_timeout`]. The connection's own timeouts have
/// other kinds of errors, and its socket blocks.
pub(super) fn is_read_timeout(e: &io::Error) -> bool {
    e.kind() == io::ErrorKind::WouldBlock
}

/// Connector for connections whose reads obey [`with_timeout`].
#[derive(Debug)]
pub(super) struct ReadTimeoutConnector;

impl<In: Transport> Connector<In> for ReadTimeoutConnector {
    type Out = ReadTimeoutTransport<In>;

    fn connect(
        &self,
        _: &ConnectionDetails,
        chained: Option<In>,
    ) -> Result<Option<ReadTimeoutTransport<In>>, ureq::Error> {
        Ok(chained.map(ReadTimeoutTransport))
    }
}

/// Connection whose reads obey [`with_timeout`].
#[derive(Debug)]
pub(super) struct ReadTimeoutTransport<T>(T);

impl<T: Transport> Transport for ReadTimeoutTransport<T> {
    fn buffers(&mut self) -> &mut dyn Buffers {
        self.0.buffers()
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), ureq::Error> {
        self.0.transmit_output(amount, timeout)
    }

    fn await_input(&mut self, mut timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let left =
            DEADLINE.get().map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let Some(left) = left.filter(|left| *left < *timeout.for_read().after) else {
            return self.0.await_input(timeout);
        };
        let timed_out = || Err(ureq::Error::Io(io::ErrorKind::WouldBlock.into()));
        if left.is_zero() {
            return timed_out();
        }
        timeout.after = left.into();
        match self.0.await_input(timeout) {
            Err(ureq::Error::Timeout(_)) => timed_out(),
            result => result,
        }
    }

    fn is_open(&mut self) -> bool {
        self.0.is_open()
    }

    fn is_tls(&self) -> bool {
        self.0.is_tls()
    }
}
