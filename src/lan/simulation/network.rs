//! The simulated network, and the turns of the hosts that receive its packets.

use super::super::discovery::Event;
use super::super::outgoing::DatagramTarget;
use super::{Act, Kind, PORT, Simulation, US, ip_of};
use crate::wire::Packet;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

/// Source ports of a node's three sockets.
const PORTS: [u16; 3] = [PORT, 40_000, 40_001];
/// Capacity of a node's receive buffer, in datagrams. A full buffer drops further datagrams.
const RECEIVE_BUFFER: usize = 1000;
/// Capacity of a socket's send buffer, in datagrams: the kernel grants 416 KiB, of which a datagram
/// with 25 hash parts takes 1,280 bytes. A full buffer drops further datagrams.
const SEND_BUFFER: usize = 332;
/// Time for which a datagram to a host that does not answer ARP stays in the send buffer.
const ARP_TIMEOUT: Duration = Duration::from_secs(3);

impl Simulation {
    fn is_reachable(&self, index: usize) -> bool {
        self.hosts[index].is_up && self.hosts[index].link.unplugged_until <= self.now
    }

    /// Whether the host answers ARP. As the worst case, no host has a valid ARP entry of another.
    fn answers_arp(&self, index: usize) -> bool {
        self.is_reachable(index) && self.hosts[index].kind != Kind::Forged
    }

    pub(super) fn send(&mut self, from: usize, port: u16, to: DatagramTarget, packet: &Packet) {
        let bytes: Rc<[u8]> = packet.encode().into();
        self.network.packets += 1;
        self.network.bytes += bytes.len() as u64 + 28;
        let source = SocketAddr::new(ip_of(from), port);
        if self.network.is_traced {
            println!("{:?} {source} to {to:?}: {packet:?}", self.now);
        }
        if self.hosts[from].link.unplugged_until > self.now {
            return;
        }
        let waiting = self.hosts[from].link.waiting_for_arp.entry(port).or_default();
        while waiting.front().is_some_and(|until| *until <= self.now) {
            waiting.pop_front();
        }
        if waiting.len() >= SEND_BUFFER {
            self.network.dropped += u64::from(port != PORTS[2]);
            return;
        }
        let targets: Vec<usize> = match to {
            DatagramTarget::Peer(to)
            | DatagramTarget::Behind(to)
            | DatagramTarget::Unproven(to) => {
                let target = self.host_at(to.ip());
                if target.is_none_or(|target| !self.answers_arp(target)) {
                    let until = self.now + ARP_TIMEOUT;
                    self.hosts[from].link.waiting_for_arp.entry(port).or_default().push_back(until);
                    return;
                }
                target.into_iter().collect()
            }
            DatagramTarget::Everyone => {
                (0..self.hosts.len()).filter(|index| *index != from).collect()
            }
        };
        for to in targets {
            let copies = 1 + u32::from(
                self.network.duplication > 0.0 && self.random.chance(self.network.duplication),
            );
            for _ in 0..copies {
                if self.network.loss > 0.0 && self.random.chance(self.network.loss)
                    || !self.is_reachable(to)
                {
                    continue;
                }
                let (low, high) = self.hosts[to].link.latency.max(self.hosts[from].link.latency);
                let latency = self.random.between(low, high);
                self.at(
                    self.now + latency,
                    Act::Deliver { to, from: source, bytes: bytes.clone() },
                );
            }
        }
    }

    /// Sends the datagrams that the node's state machine has ready.
    pub(super) fn send_all(&mut self, from: usize) {
        let Some(machine) = &mut self.hosts[from].machine else { return };
        for (to, packet) in std::mem::take(machine.outgoing()) {
            self.send(from, PORTS[to.socket()], to, &packet);
        }
    }

    pub(super) fn deliver(&mut self, to: usize, from: SocketAddr, bytes: Rc<[u8]>) {
        let host = &mut self.hosts[to];
        if !host.is_up {
            return;
        }
        if host.link.inbox.len() < RECEIVE_BUFFER {
            host.link.inbox.push_back((from, bytes));
        }
        if host.paused_until.is_none() {
            self.turn(to);
        }
    }

    /// Runs one turn of a node's event loop, or the script of another kind.
    pub(super) fn turn(&mut self, index: usize) {
        let now = self.base + self.now;
        let host = &mut self.hosts[index];
        if !host.is_up || host.paused_until.is_some() {
            return;
        }
        let inbox = std::mem::take(&mut host.link.inbox);
        if let Some(machine) = &mut host.machine {
            for (from, bytes) in inbox {
                machine.handle(Event::Datagram { from, bytes: &bytes }, now);
            }
            machine.handle(Event::Tick { drained: true }, now);
            self.send_all(index);
            self.collect(index);
            self.plan(index);
        } else {
            for (from, bytes) in inbox {
                self.script(index, from, &bytes);
            }
        }
    }

    fn plan(&mut self, index: usize) {
        let Some(machine) = &self.hosts[index].machine else { return };
        // A turn takes some time, even if the next one is due at once.
        let wake =
            (machine.next_turn().saturating_duration_since(self.base)).max(self.now + 5 * US);
        // A turn that comes too early plans the next one.
        if wake < self.hosts[index].wake || self.hosts[index].wake <= self.now {
            self.hosts[index].wake = wake;
            self.at(wake, Act::Wake(index));
        }
    }

    pub(super) fn event(&mut self, index: usize, event: Event<'_>) {
        let now = self.base + self.now;
        if let Some(machine) = &mut self.hosts[index].machine {
            machine.handle(event, now);
        }
        self.send_all(index);
        self.turn(index);
    }
}
