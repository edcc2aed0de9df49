//! Neighbours that answer late, only some of the queries, or none. They may delay lookups within
//! the bounds that the simulation of `lan` measures, but they hide no path of a live holder.

use crate::common::lan::PATIENCE;
use crate::common::packet::{Packet, hello};
use crate::common::standin::receive;
use crate::common::{Asker, Bystander, Holder, Host, Lan, PORT, World, daemon, thread};
use std::collections::VecDeque;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// How long lookups run beside an odd neighbour.
const SCENE: Duration = Duration::from_secs(20);

/// A neighbour without any paths, which answers queries late or only some of them.
struct OddNeighbour {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    host: Host,
}

impl OddNeighbour {
    /// Answers every `nth` query `delay` after it arrives.
    fn start(lan: &Lan, delay: Duration, nth: u64) -> OddNeighbour {
        let host = lan.host("odd");
        let socket = host.udp(PORT);
        let own = host.address;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn("odd neighbour", move || {
            let mut answers = VecDeque::new();
            let mut queries = 0;
            while !stopped.load(Ordering::Relaxed) {
                let datagram =
                    receive(&socket, Duration::from_millis(5)).filter(|(from, _)| from.ip() != own);
                if let Some((from, Some(answer))) =
                    datagram.map(|(from, datagram)| (from, answer(&datagram)))
                {
                    queries += 1;
                    if queries % nth == 0 {
                        answers.push_back((Instant::now() + delay, from, answer));
                    }
                }
                while answers.front().is_some_and(|(due, ..)| *due <= Instant::now()) {
                    if let Some((_, to, answer)) = answers.pop_front() {
                        let _ = socket.send_to(&answer, to);
                    }
                }
            }
        });
        OddNeighbour { stop, thread: Some(thread), host }
    }
}

impl Drop for OddNeighbour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The answer of a node without any paths.
fn answer(datagram: &[u8]) -> Option<Vec<u8>> {
    Some(match Packet::read(datagram)? {
        Packet::Hello { .. } => hello(*b"an odd 1"),
        Packet::Query { id, .. } => Packet::HaveNot { id }.write(),
        // A query with a flag byte is a broadcast, which only holders answer.
        Packet::QueryMany { id, rest } if rest.len() % 20 == 0 => {
            Packet::AnswerMany { id, bits: vec![0; (rest.len() / 20).div_ceil(8)] }.write()
        }
        _ => return None,
    })
}

/// Looks paths up on a LAN with a holder, an asker and an odd neighbour known to the asker.
fn scene(delay: Duration, nth: u64) {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let odd = OddNeighbour::start(&lan, delay, nth);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_listed(&asker.host, odd.host.address);
    asker.look_up_closure_during(&world, || std::thread::sleep(SCENE));
}

#[test]
fn neighbour_answering_just_before_timeout_hides_no_path() {
    scene(Duration::from_millis(2900).mul_f64(PATIENCE), 1);
}

#[test]
fn neighbour_that_ignores_half_of_the_queries_hides_no_path() {
    scene(Duration::ZERO, 2);
}

#[test]
fn flapping_neighbour_hides_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let neighbour = Bystander::new(&lan, "neighbour");
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    daemon::wait_until_live(&asker.host, 2);
    asker.look_up_closure_during(&world, || {
        for _ in 0..4 {
            neighbour.host.unplug();
            std::thread::sleep(4 * SECOND);
            neighbour.host.plug();
            std::thread::sleep(SECOND);
        }
    });
}

#[test]
fn firewalled_newcomers_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let firewalled = lan.host("firewalled");
    firewalled.drop_incoming();
    asker.look_up_closure_during(&world, || {
        for number in 200..205 {
            let address = lan.address(number);
            firewalled.net(&format!("ip addr add {address}/24 dev eth0"));
            let socket = firewalled.bind(|| UdpSocket::bind((address, PORT)));
            let instance = [number; 8];
            socket.send_to(&hello(instance), (asker.host.address, PORT)).expect("a network");
            daemon::wait_until_listed(&asker.host, address);
            std::thread::sleep(4 * SECOND);
        }
    });
}
