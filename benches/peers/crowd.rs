//! Cost of lookups on LANs with many nodes: latency, packets, and processor time of the neighbours.

use super::common::lan::introduce;
use super::common::{Host, Lan, PORT, daemon, stock};
use super::loads::Bench;
use super::shared::cost::{nanoseconds, wake_ups};
use super::shared::scene::{self, Peer};
use super::shared::table::Series;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Number of nodes of each LAN, and the goal for the median latency of a miss, in milliseconds.
const SIZES: [(usize, &str); 4] = [(2, "≤ 0.2"), (30, "≤ 1"), (64, "≤ 2"), (100, "≤ 3")];
/// Sequential lookups per round.
const LONE: usize = 300;
/// Lookups per round whose packets are counted.
const COUNTED: usize = 3000;
/// Lookups per round over which a neighbour's processor time is measured.
const FOREIGN: usize = 20_000;
/// Parallel connections, as many as Nix opens.
const CONNECTIONS: usize = 25;
/// Interval over which an idle node's wake-ups are counted.
const REST: Duration = Duration::from_secs(60);

/// Nodes on one LAN. The first holds one path, the last sends the lookups.
struct Crowd {
    nodes: Vec<Peer>,
}

impl Crowd {
    fn new(size: usize) -> Crowd {
        let lan = Lan::new();
        let hosts: Vec<Host> =
            (0..size).map(|number| lan.host(&format!("node-{number}"))).collect();
        introduce(&hosts.iter().collect::<Vec<_>>());
        hosts.iter().for_each(stock::ready);
        let mark = daemon::add_unique_path(&hosts[0]);
        let nodes: Vec<Peer> = hosts.into_iter().map(Peer::start).collect();
        let crowd = Crowd { nodes };
        daemon::wait_until_known(&crowd.asker().host, &mark);
        daemon::wait_until_live(&crowd.asker().host, size - 1);
        crowd
    }

    fn asker(&self) -> &Peer {
        self.nodes.last().expect("a crowd")
    }

    /// Looks up `count` absent paths over [`CONNECTIONS`] parallel connections.
    fn ask(&self, count: usize) {
        let absent = |part: String| format!("/nix/store/{part}-absent");
        let paths: Vec<String> = scene::absent(count).into_iter().map(absent).collect();
        assert_eq!(daemon::found(&self.asker().host, &paths, CONNECTIONS), 0);
    }
}

impl Bench {
    /// Measures the latency of misses on LANs of each size in [`SIZES`].
    pub fn crowds(&mut self) {
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        for (size, goal) in SIZES {
            let crowd = Crowd::new(size);
            // Warm-up: afterwards no lookup waits for answers to broadcasts of single queries.
            crowd.ask(COUNTED);
            let mut series = Series::default();
            for _ in 0..self.rounds {
                let routes = scene::narinfos("", &scene::absent(LONE));
                series.push(scene::latencies(&crowd.asker().host, local, &routes, 404).median());
            }
            self.table.alone(
                &format!("4. lone LAN miss among {size} nodes, median ms"),
                &series,
                goal,
            );
        }
    }

    /// Measures packets per lookup, a neighbour's processor time, and wake-ups of an idle node.
    pub fn neighbours(&mut self) {
        let crowd = Crowd::new(32);
        let mut packets = Series::default();
        let mut foreign = Series::default();
        for _ in 0..self.rounds {
            let before = crowd.asker().host.packets();
            crowd.ask(COUNTED);
            packets.push((crowd.asker().host.packets() - before) as f64);
            let neighbour = crowd.nodes[1].daemon.pid();
            let before = nanoseconds(neighbour);
            crowd.ask(FOREIGN);
            foreign.push((nanoseconds(neighbour) - before) as f64 / 1e3 / FOREIGN as f64);
        }
        self.table.alone("5. packets for 3,000 misses among 32 nodes", &packets, "≤ 30,000");
        self.table.alone("5. processor time of a neighbour for each lookup, µs", &foreign, "≤ 5");
        drop(crowd);
        let crowd = Crowd::new(6);
        // The nodes send hellos after their start; they must not count.
        std::thread::sleep(REST);
        let mut at_rest = Series::default();
        for _ in 0..self.rounds.min(2) {
            let pid = crowd.asker().daemon.pid();
            let before = wake_ups(pid);
            std::thread::sleep(REST);
            at_rest.push((wake_ups(pid) - before) as f64);
        }
        self.table.alone("5. wake-ups in a minute at rest, five peers", &at_rest, "≤ 12");
    }
}
