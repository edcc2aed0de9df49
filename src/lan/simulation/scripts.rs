//! Hosts that do not run this release: peers of other versions, and faulty ones.

use super::super::outgoing::DatagramTarget;
use super::{Act, Host, Kind, MS, PORT, SECOND, Simulation};
use crate::nix::HashPart;
use crate::wire::{AnswerBits, Hello, Packet};
use std::net::SocketAddr;
use std::time::Duration;

impl Simulation {
    /// Makes a host of a scripted kind say hello now and every 30 s.
    pub(super) fn say_hello(&mut self, index: usize) {
        let host = &self.hosts[index];
        if host.is_up && host.kind != Kind::Original {
            let hello = self.hello_of(index);
            self.send(index, PORT, DatagramTarget::Everyone, &hello);
            self.run_at(self.now + 30 * SECOND, move |simulation| simulation.say_hello(index));
        }
    }

    fn hello_of(&self, index: usize) -> Packet {
        let host = &self.hosts[index];
        let batches = host.kind != Kind::Single;
        Packet::Hello(Hello {
            port: PORT,
            instance: host.instance.to_le_bytes(),
            crowded: false,
            batches,
            digest: None,
        })
    }

    /// Handles a datagram at a host of a scripted kind.
    pub(super) fn script(&mut self, index: usize, from: SocketAddr, bytes: &[u8]) {
        let Ok(packet) = Packet::parse(bytes) else { return };
        let (kind, now) = (self.hosts[index].kind, self.now);
        let has = |host: &Host, hash_part: &HashPart| host.held.lock().contains(hash_part);
        let have = |id, hash_part: HashPart| {
            let url_path = format!("local/{hash_part}.narinfo");
            Packet::Have { id, port: PORT, url_path }
        };
        match (kind, packet) {
            (Kind::Single, Packet::Query { id, hash_part }) => {
                let held = has(&self.hosts[index], &hash_part);
                let packet = if held { have(id, hash_part) } else { Packet::HaveNot { id } };
                self.at(now, Act::Answer { from: index, to: from, packet });
            }
            (Kind::Original, Packet::Query { id, hash_part }) => {
                let host = &mut self.hosts[index];
                host.busy_until = host.busy_until.max(now) + 20 * MS;
                let (at, held) = (host.busy_until, has(host, &hash_part));
                if held {
                    self.at(at, Act::Answer { from: index, to: from, packet: have(id, hash_part) });
                }
            }
            (Kind::Late | Kind::Half, Packet::QueryMany { id, hash_parts, holders_only }) => {
                let is_ignored = |part: HashPart| part.to_bytes()[1] & 1 == 1;
                if kind == Kind::Half && hash_parts.iter().any(is_ignored) {
                    return;
                }
                let held =
                    AnswerBits::pack(hash_parts.iter().map(|part| has(&self.hosts[index], &part)));
                let is_probe = hash_parts.is_empty();
                let delay =
                    if kind == Kind::Late && !is_probe { 2900 * MS } else { Duration::ZERO };
                if held.any() || !holders_only {
                    let packet = Packet::AnswerMany { id, held };
                    self.at(now + delay, Act::Answer { from: index, to: from, packet });
                }
            }
            (
                Kind::Single | Kind::Late | Kind::Half | Kind::Firewalled | Kind::Forged,
                Packet::Hello(_),
            ) => {
                let packet = self.hello_of(index);
                let delay = self.random.between(Duration::ZERO, 50 * MS);
                // Half of the hellos get no reply, so that two such hosts stop greeting each other.
                if self.random.chance(0.5) {
                    self.at(now + delay, Act::Answer { from: index, to: from, packet });
                }
            }
            _ => {}
        }
    }
}
