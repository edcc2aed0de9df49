//! Transport for ureq to a friend: TCP with mutually authenticated TLS.

use crate::friends::tls::NO_NAME;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, ClientConnection, StreamOwned};
use std::fmt;
use std::io::{Read, Write};
use std::sync::Arc;
use ureq::Error;
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport, TransportAdapter,
};

/// ureq connector that wraps the chained TCP connection in TLS. The handshake blocks for at most
/// ureq's current timeout.
pub(super) struct FriendConnector(pub Arc<ClientConfig>);

impl fmt::Debug for FriendConnector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FriendConnector")
    }
}

impl<In: Transport> Connector<In> for FriendConnector {
    type Out = FriendTransport;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        chained: Option<In>,
    ) -> Result<Option<FriendTransport>, Error> {
        let Some(tcp) = chained else { return Ok(None) };
        let name = ServerName::try_from(NO_NAME).map_err(|_| Error::Tls("a name that is none"))?;
        let mut session = ClientConnection::new(self.0.clone(), name)?;
        let mut socket = TransportAdapter::new(tcp.boxed(), details.current_time.clone());
        // Without this, a friend that stops responding during the handshake blocks the thread
        // forever.
        socket.set_timeout(details.timeout);
        session.complete_io(&mut socket)?;
        let buffers = LazyBuffers::new(
            details.config.input_buffer_size(),
            details.config.output_buffer_size(),
        );
        Ok(Some(FriendTransport { buffers, stream: StreamOwned::new(session, socket) }))
    }
}

/// TLS connection to a friend.
pub(super) struct FriendTransport {
    buffers: LazyBuffers,
    stream: StreamOwned<ClientConnection, TransportAdapter>,
}

impl fmt::Debug for FriendTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FriendTransport")
    }
}

impl Transport for FriendTransport {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, timeout: NextTimeout) -> Result<(), Error> {
        self.stream.sock.set_timeout(timeout);
        self.stream.write_all(&self.buffers.output()[..amount])?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, Error> {
        self.stream.sock.set_timeout(timeout);
        let input = self.buffers.input_append_buf();
        let amount = self.stream.read(input)?;
        self.buffers.input_appended(amount);
        Ok(amount > 0)
    }

    fn is_open(&mut self) -> bool {
        self.stream.sock.get_mut().is_open()
    }

    fn is_tls(&self) -> bool {
        true
    }
}
