//! The workloads of the benchmark among two peers and nginx.
//!
//! Each workload alternates between its contenders in every round and adds rows to the table.

use crate::common::{Host, Lan, PORT, Process, World, daemon, http, nix, wait_for};
use crate::shared::cost::memory;
use crate::shared::scene::{self, Peer, timed};
use crate::shared::table::{Series, Table};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

/// Sequential lookups per round.
const LOOKUPS: usize = 300;
/// Missing paths that Nix looks up in one run.
const MISSES: usize = 1000;
/// TCP port on which nginx serves the static cache of [`World`].
const STATIC: u16 = 8080;

/// Hosts and processes shared by all workloads.
pub struct Bench {
    /// Results; every workload appends rows.
    pub table: Table,
    pub(super) rounds: usize,
    closure: Vec<String>,
    asker: Peer,
    holder: Peer,
    _other: Peer,
    marks: Vec<String>,
    _nginx: Process,
    world: World,
    lan: Lan,
}

impl Bench {
    /// Starts two holders of the whole world and an asker that knows both. The first holder also
    /// runs nginx.
    pub fn new(rounds: usize) -> Bench {
        let lan = Lan::new();
        let world = World::on(&lan);
        let (holder, first) = holding(&lan, &world, "holder");
        let (other, second) = holding(&lan, &world, "other");
        let nginx = nginx(&holder.host, &world);
        let closure = nix::closure(&holder.host, &[world.path("closure1000")]);
        let marks = vec![first, second];
        let asker = Peer::asker(&lan, &world.cache_key, &marks);
        Bench {
            table: Table::new(),
            rounds,
            closure,
            asker,
            holder,
            _other: other,
            marks,
            _nginx: nginx,
            world,
            lan,
        }
    }

    fn at(&self, port: u16) -> SocketAddr {
        (self.holder.host.address, port).into()
    }

    /// Workload 1: latency of sequential lookups, misses and hits.
    pub fn lookups(&mut self) {
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let present: Vec<String> =
            scene::hash_parts(&self.closure).into_iter().take(LOOKUPS).collect();
        for (what, status, goal) in [("LAN miss", 404, "≤ 1"), ("LAN hit", 200, "< 1")] {
            let mut series: [Series; 4] = Default::default();
            for _ in 0..self.rounds {
                let parts = if status == 200 { present.clone() } else { scene::absent(LOOKUPS) };
                let routes = scene::narinfos("", &parts);
                let own = scene::latencies(&self.asker.host, local, &routes, status);
                let its = scene::latencies(&self.asker.host, self.at(STATIC), &routes, status);
                let figures = [own.median(), its.median(), own.percentile(99), its.percentile(99)];
                series.iter_mut().zip(figures).for_each(|(series, figure)| series.push(figure));
            }
            let [own, its, own99, its99] = &series;
            let nginx = "nginx, asked directly";
            self.table.beside(
                &format!("1. {what} among two peers, median ms"),
                own,
                nginx,
                its,
                goal,
            );
            self.table.beside(
                &format!("1. {what} among two peers, p99 ms"),
                own99,
                nginx,
                its99,
                "",
            );
        }
    }

    /// Workload 2: real Nix looks up paths that no peer has.
    pub fn misses(&mut self) {
        let [own, its] = self.nix_runs(|host, _| {
            let mut command = host.cmd("nix-store");
            command.args(["--realise", "--dry-run"]);
            command.args(
                scene::absent(MISSES).iter().map(|part| format!("/nix/store/{part}-missing")),
            );
            let elapsed = timed(&mut command, |output| {
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(said.contains("don't know how to build"), "{said}");
            });
            host.sh("rm -r /root/.cache");
            elapsed
        });
        self.table.beside(
            "2. Nix asks for 1,000 missing paths, s",
            &own,
            "nginx, asked directly",
            &its,
            "ratio ≤ 1.0",
        );
    }

    /// Runs Nix in every round on two new hosts: one asks its own peerix, the other nginx. Returns
    /// seconds.
    fn nix_runs(&self, run: impl Fn(&Host, &str) -> f64) -> [Series; 2] {
        let mut series: [Series; 2] = Default::default();
        for _ in 0..self.rounds {
            let mut asker = Peer::asker(&self.lan, &self.world.cache_key, &self.marks);
            // For half a second after its start, peerix waits for peers that it does not know yet.
            std::thread::sleep(Duration::from_secs(1));
            series[0].push(run(&asker.host, &format!("http://127.0.0.1:{PORT}")));
            // The daemon sends bye on SIGTERM, so that no peer waits for its answers.
            asker.daemon.terminate();
            let url = format!("http://{}", self.at(STATIC));
            series[1].push(run(&scene::client(&self.lan, &self.world.cache_key, &url), &url));
        }
        series
    }

    /// Workload 3: memory, size of the binary, and time to start.
    pub fn footprint(&mut self) {
        let mut series: [Series; 8] = Default::default();
        for _ in 0..self.rounds {
            let host = scene::client(&self.lan, &self.world.cache_key, "");
            let began = Instant::now();
            let mut daemon = scene::start(&host);
            first_answer(&host, PORT, "/nix-cache-info");
            series[0].push(began.elapsed().as_secs_f64() * 1e3);
            // Two seconds cover the work that the daemon does at its start.
            std::thread::sleep(Duration::from_secs(2));
            series[1].push(memory(daemon.pid(), "VmRSS"));
            series[2].push(memory(daemon.pid(), "RssAnon"));
            daemon.terminate();
            let began = Instant::now();
            let _nginx = nginx(&host, &self.world);
            first_answer(&host, STATIC, "/nix-cache-info");
            series[3].push(began.elapsed().as_secs_f64() * 1e3);
        }
        for (peer, at) in [(&self.asker, 4), (&self.holder, 6)] {
            series[at].push(memory(peer.daemon.pid(), "VmRSS"));
            series[at + 1].push(memory(peer.daemon.pid(), "RssAnon"));
        }
        let mut size = Series::default();
        size.push(
            std::fs::metadata(daemon::binary()).expect("it was run").len() as f64 / 1048576.0,
        );
        let [start, rss, anon, nginx, asker, asker_anon, holder, holder_anon] = &series;
        let table = &mut self.table;
        table.beside("3. from start to first answer, ms", start, "nginx", nginx, "≤ 50");
        table.alone("3. idle memory (RSS), MiB", rss, "≤ 8");
        table.alone("3. idle memory that is not of the program's file (RssAnon), MiB", anon, "");
        table.alone("3. asker's memory after what came before (RSS), MiB", asker, "");
        table.alone("3. … RssAnon, MiB", asker_anon, "");
        table.alone("3. holder's memory after what came before (RSS), MiB", holder, "");
        table.alone("3. … RssAnon, MiB", holder_anon, "");
        table.alone("3. program, MiB", &size, "≤ 6");
    }
}

/// Starts a peer with all paths of the world, signed by the static cache's key, on a tmpfs. Returns
/// it with a path that no other host has.
fn holding(lan: &Lan, world: &World, name: &str) -> (Peer, String) {
    let host = lan.host(name);
    nix::configure(&host, "");
    let (store, var) = (world.store(), world.store().with_file_name("var"));
    host.sh(&format!("cp -a {} /nix/store; cp -a {} /nix/var", store.display(), var.display()));
    world.sign(&host);
    let mark = daemon::add_unique_path(&host);
    (Peer::start(host), mark)
}

fn nginx(host: &Host, world: &World) -> Process {
    scene::nginx(host, &[(STATIC, &world.cache(), true)])
}

fn first_answer(host: &Host, port: u16, route: &str) {
    wait_for("the first answer", || {
        let answer = http::get(host, (Ipv4Addr::LOCALHOST, port), route).ok()?;
        (answer.status == 200).then_some(())
    });
}
