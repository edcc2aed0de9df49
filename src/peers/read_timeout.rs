//! Limits how long one read waits, shorter than the connection's own time-out, without losing the
//! connection.
//!
//! ureq has a time-out for each connection, not for each call of `read`. The transport here asks
//! the thread that reads how long it wants to wait: a read happens in the thread that calls it.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};
use ureq::unversioned::transport::{Buffers, ConnectionDetails, Connector, NextTimeout, Transport};

thread_local! {
    static UNTIL: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// A read did not wait longer than it was allowed to by [`limit`].
#[derive(Debug)]
struct ReadTimedOut;

impl std::fmt::Display for ReadTimedOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("nothing came in time")
    }
}

impl std::error::Error for ReadTimedOut {}

/// Has every read of a connection that `read` makes in this thread wait for `patience` at most, in
/// all.
pub(super) fn limit<T>(patience: Duration, read: impl FnOnce() -> T) -> T {
    UNTIL.set(Some(Instant::now() + patience));
    let result = read();
    UNTIL.set(None);
    result
}

/// Whether a read ended because of [`limit`].
pub(super) fn is_over(e: &io::Error) -> bool {
    e.get_ref().is_some_and(|inner| inner.is::<ReadTimedOut>())
}

/// Makes connections whose reads heed [`limit`].
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

/// A connection whose reads heed [`limit`].
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
        let left = UNTIL.get().map(|until| until.saturating_duration_since(Instant::now()));
        let Some(left) = left.filter(|left| *left < *timeout.for_read().after) else {
            return self.0.await_input(timeout);
        };
        let over = || Err(ureq::Error::Io(io::Error::other(ReadTimedOut)));
        if left.is_zero() {
            return over();
        }
        timeout.after = left.into();
        match self.0.await_input(timeout) {
            Err(ureq::Error::Timeout(_)) => over(),
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
