//! Datagrams to send, each with its target and the socket that sends it.

use crate::wire::Packet;
use std::net::SocketAddr;

/// Where a datagram goes, and which socket sends it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DatagramTarget {
    /// To a peer from the first socket: everything but the datagrams of the other variants.
    Peer(SocketAddr),
    /// To a peer from the second socket: queries to a peer that is behind and through which paths
    /// were found. These may wait for ARP. In the first socket's send buffer they would displace
    /// datagrams to peers that answer.
    Behind(SocketAddr),
    /// To a peer from the third socket: probes, and queries to any other peer that is behind or has
    /// not answered yet. There may be many, because anybody can forge source addresses.
    Unproven(SocketAddr),
    /// To the broadcast address or multicast group of every LAN network, from the first socket.
    Everyone,
}

impl DatagramTarget {
    /// Number of the socket that sends the datagram: 0 for the first, up to 2 for the third.
    pub fn socket(self) -> usize {
        match self {
            DatagramTarget::Peer(_) | DatagramTarget::Everyone => 0,
            DatagramTarget::Behind(_) => 1,
            DatagramTarget::Unproven(_) => 2,
        }
    }
}

/// Datagrams to send, each with its target.
pub type OutgoingDatagrams = Vec<(DatagramTarget, Packet)>;
