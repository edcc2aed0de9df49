//! Faults of networks and machines, made with `iptables`, `tc`, bridge ports and busy processes.

use super::lan::{Host, Run};
use super::packet::hello;
use super::process::Process;
use super::{PORT, thread};
use nfq::{Queue, Verdict};
use std::collections::VecDeque;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// IPv4 and IPv6, because discovery uses both.
const TABLES: [&str; 2] = ["iptables", "ip6tables"];

impl Host {
    /// Drops this percentage of the incoming packets at random.
    pub fn lose(&self, percent: u32) {
        let probability = format!("{:.2}", f64::from(percent) / 100.0);
        // Without this limit, one drop loses a merged packet of up to 64 KiB.
        self.net("ip link set eth0 gso_max_segs 1");
        for table in TABLES {
            self.net_cmd(table)
                .args(["-A", "INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random"])
                .args(["--probability", &probability, "-j", "DROP"])
                .okay();
        }
    }

    /// Drops all incoming and outgoing packets, without a reset or an error, like a suspended
    /// machine.
    pub fn fall_silent(&self) {
        for table in TABLES {
            self.net_cmd(table).args(["-I", "INPUT", "-i", "eth0", "-j", "DROP"]).okay();
            self.net_cmd(table).args(["-I", "OUTPUT", "-o", "eth0", "-j", "DROP"]).okay();
        }
    }

    /// Drops all incoming packets, like a firewall that accepts nothing.
    pub fn drop_incoming(&self) {
        for table in TABLES {
            self.net_cmd(table).args(["-I", "INPUT", "-i", "eth0", "-j", "DROP"]).okay();
        }
    }

    /// Unplugs the cable: the interface stays, without a carrier.
    pub fn unplug(&self) {
        self.switch("ip link set {port} down");
    }

    /// Undoes [`Host::unplug`].
    pub fn plug(&self) {
        self.switch("ip link set {port} up");
    }

    /// Limits the traffic to this host, in Mbit/s. A packet that would wait for over 50 ms is
    /// dropped.
    pub fn slow(&self, megabits: u32) {
        self.switch("ip link set {port} gso_max_segs 8");
        self.switch(&format!(
            "tc qdisc add dev {{port}} root tbf rate {megabits}mbit burst 256kb latency 50ms"
        ));
    }

    /// Undoes [`Host::slow`].
    pub fn quick(&self) {
        self.switch("tc qdisc del dev {port} root");
    }

    /// Delays every incoming packet by `time`, until the returned `Delay` is dropped.
    pub fn delay(&self, time: Duration) -> Delay {
        let mut queue = self.in_net(|| {
            let mut queue = Queue::open().expect("a netfilter queue");
            queue.bind(0).expect("queue 0 is free in a new network");
            queue.set_recv_gso(0, true).expect("large packets may stay large");
            queue.set_copy_range(0, 64).expect("headers are enough");
            queue.set_queue_max_len(0, 100_000).expect("a long queue");
            queue
        });
        queue.set_nonblocking(true);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn("delay", move || hold(&mut queue, time, &stopped));
        for table in TABLES {
            self.net_cmd(table)
                .args([
                    "-A",
                    "INPUT",
                    "-i",
                    "eth0",
                    "-j",
                    "NFQUEUE",
                    "--queue-num",
                    "0",
                    "--queue-bypass",
                ])
                .okay();
        }
        Delay { stop, thread: Some(thread) }
    }

    /// Limits the traffic from this host, in Mbit/s. A packet that would wait for over 50 ms is
    /// dropped.
    pub fn slow_sending(&self, megabits: u32) {
        self.net("ip link set eth0 gso_max_segs 8");
        self.net(&format!(
            "tc qdisc add dev eth0 root tbf rate {megabits}mbit burst 256kb latency 50ms"
        ));
    }

    /// Keeps all processors busy at normal priority, until the returned processes are dropped.
    pub fn be_busy(&self) -> Vec<Process> {
        let processors = std::thread::available_parallelism().map_or(2, usize::from);
        (0..2 * processors).map(|_| self.spawn_sh("while :; do :; done")).collect()
    }
}

/// Sends hello packets with forged source addresses. Answers to them reach no host.
pub struct Forger {
    sockets: Vec<UdpSocket>,
}

impl Forger {
    /// Makes `host` send from the addresses `sources`.
    pub fn new(host: &Host, sources: &[Ipv4Addr]) -> Forger {
        let forge = |source: &Ipv4Addr| {
            let socket = host.udp(0);
            let port = socket.local_addr().expect("a bound socket").port().to_string();
            host.net_cmd("iptables")
                .args([
                    "-t",
                    "nat",
                    "-A",
                    "POSTROUTING",
                    "-p",
                    "udp",
                    "--sport",
                    &port,
                    "-j",
                    "SNAT",
                ])
                .args(["--to-source", &format!("{source}:{PORT}")])
                .okay();
            socket
        };
        Forger { sockets: sources.iter().map(forge).collect() }
    }

    /// Sends one hello per source address. Each has a different instance ID, also from round to
    /// round.
    pub fn say_hello(&self, to: Ipv4Addr, round: u32) {
        for (socket, number) in self.sockets.iter().zip(0_u32..) {
            let mut instance = [0; 8];
            instance[..4].copy_from_slice(&round.to_be_bytes());
            instance[4..].copy_from_slice(&number.to_be_bytes());
            let _ = socket.send_to(&hello(instance), (to, PORT));
        }
    }
}

/// Delay of the incoming packets of a host. Dropping it ends the delay.
pub struct Delay {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hold(queue: &mut Queue, time: Duration, stop: &AtomicBool) {
    let mut held = VecDeque::new();
    while !stop.load(Ordering::Relaxed) {
        let idle = match queue.recv() {
            Ok(message) => {
                held.push_back((Instant::now() + time, message));
                false
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => true,
            Err(error) => panic!("netfilter queue: {error}"),
        };
        while held.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, mut message)) = held.pop_front() {
                message.set_verdict(Verdict::Accept);
                queue.verdict(message).expect("the queue is there");
            }
        }
        if idle {
            std::thread::sleep(Duration::from_micros(300));
        }
    }
}
