//! The workloads. Each goes round by round through its contenders, and adds rows to the table.

use crate::common::lan::Run;
use crate::common::{Host, Lan, PORT, Process, World, daemon, http, nix, wait_for, world};
use crate::scene::{self, LARGE, Large, Peer, STATIC};
use crate::table::{Series, Table};
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

/// Lookups a round, one after the other.
const LOOKUPS: usize = 300;
/// Paths that Nix asks for at once.
const MISSES: usize = 1000;
/// Times that the many files are asked for in a round: once is over before CPU time is told apart.
const MANY: u32 = 10;
/// Seconds that wrk runs.
const WRK: u32 = 2;

/// Everything that is there from the first workload to the last.
pub struct Bench {
    /// Grows with every workload.
    pub table: Table,
    rounds: usize,
    large: Large,
    closure: Vec<String>,
    asker: Peer,
    holder: Peer,
    _other: Peer,
    marks: Vec<String>,
    nginx: Process,
    world: World,
    lan: Lan,
}

impl Bench {
    /// Two holders of everything, the first with nginx too, and an asker; all know one another.
    pub fn new(rounds: usize) -> Bench {
        let lan = Lan::new();
        let world = World::on(&lan);
        let (holder, first) = Peer::holder(&lan, &world, "holder");
        let (other, second) = Peer::holder(&lan, &world, "other");
        let large = Large::make(&holder.host);
        let nginx = scene::nginx(&holder.host, &world);
        let closure = nix::closure(&holder.host, &[world.path("closure1000")]);
        let marks = vec![first, second];
        let asker = Peer::asker(&lan, &world, &marks);
        Bench { table: Table::new(), rounds, large, closure, asker, holder, _other: other, marks, nginx, world, lan }
    }

    fn at(&self, port: u16) -> SocketAddr {
        (self.holder.host.address, port).into()
    }

    /// One path at a time.
    pub fn lookups(&mut self) {
        let local = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        let present: Vec<String> = scene::hash_parts(&self.closure).into_iter().take(LOOKUPS).collect();
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
            self.table.beside(&format!("1. {what} among two peers, median ms"), own, nginx, its, goal);
            self.table.beside(&format!("1. {what} among two peers, p99 ms"), own99, nginx, its99, "");
        }
    }

    /// Nix asks for paths that nobody has.
    pub fn misses(&mut self) {
        let [own, its] = self.nix_runs(|host, _| {
            let mut command = host.cmd("nix-store");
            command.args(["--realise", "--dry-run"]);
            command.args(scene::absent(MISSES).iter().map(|part| format!("/nix/store/{part}-missing")));
            let took = timed(&mut command, |output| {
                let said = String::from_utf8_lossy(&output.stderr);
                assert!(said.contains("don't know how to build"), "{said}");
            });
            host.sh("rm -r /root/.cache");
            took
        });
        self.table.beside("2. Nix asks for 1,000 missing paths, s", &own, "nginx, asked directly", &its, "ratio ≤ 1.5");
    }

    /// Nix fetches a closure into an empty store.
    pub fn closures(&mut self) {
        let path = self.world.path("closure1000").to_owned();
        let number = self.closure.len();
        let [own, its] = self.nix_runs(|host, _| {
            let took = timed(&mut nix::realising(host, &[&path]), nix::assert_quiet);
            assert_eq!(nix::closure(host, &[&path]).len(), number);
            took
        });
        let nginx = "nginx, asked directly";
        self.table.beside("3. nix-store --realise of 1,000 paths, s", &own, nginx, &its, "ratio ≤ 1.5");
        let [own, its] =
            self.nix_runs(|host, url| timed(host.cmd("nix").args(["copy", "--from", url, &path]), nix::assert_quiet));
        self.table.beside("3. nix copy --from of 1,000 paths, s", &own, nginx, &its, "ratio ≤ 1.5");
    }

    /// Runs Nix on a new host each time, which asks its own peerix or nginx.
    fn nix_runs(&self, run: impl Fn(&Host, &str) -> f64) -> [Series; 2] {
        let mut series: [Series; 2] = Default::default();
        for _ in 0..self.rounds {
            let mut asker = Peer::asker(&self.lan, &self.world, &self.marks);
            series[0].push(run(&asker.host, &format!("http://127.0.0.1:{PORT}")));
            // Says goodbye, so that nobody waits for it.
            asker.daemon.terminate();
            let url = format!("http://{}", self.at(STATIC));
            series[1].push(run(&scene::client(&self.lan, &self.world, &url), &url));
        }
        series
    }

    /// 1 GiB in one file.
    pub fn large_nar(&mut self) {
        let hash_part = world::hash_part(&self.large.file).to_owned();
        let (asker, holder) = (self.asker.daemon.pid(), self.holder.daemon.pid());
        let mut series: [Series; 7] = Default::default();
        let zeros = vec![0; 1 << 20];
        for _ in 0..self.rounds {
            let own = self.through_peer(&hash_part, 1);
            let route = scene::nar_route(&self.asker.host, self.at(PORT), &format!("/local/{hash_part}.narinfo"));
            let peer = scene::stream(&self.asker.host, self.at(PORT), &route, 1, &[asker, holder]);
            let nginx = self.by_nginx(&hash_part, 1);
            let began = Instant::now();
            let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
            (0..1024).for_each(|_| digest.update(&zeros));
            std::hint::black_box(digest.finish());
            let sha256 = scene::rates(1 << 30, began, 0.0).0;
            let figures = [own.0, own.1, peer.0, peer.1, nginx.0, nginx.1, sha256];
            series.iter_mut().zip(figures).for_each(|(series, figure)| series.push(figure));
        }
        let [own, own_cpu, peer, peer_cpu, nginx, nginx_cpu, sha256] = &series;
        let table = &mut self.table;
        table.beside("4. 1 GiB from a peer, checked, GB/s", own, "sha256 alone", sha256, "≥ 0.9");
        table.beside("4. the same beside nginx, unchecked", own, "nginx, asked directly", nginx, "");
        table.beside("4. 1 GiB from a peer, both daemons, CPU-s/GiB", own_cpu, "nginx", nginx_cpu, "≤ 1.6");
        table.beside("4. 1 GiB, the peer alone, GB/s", peer, "nginx (sendfile)", nginx, "");
        table.beside("4. 1 GiB, the peer alone, CPU-s/GiB", peer_cpu, "nginx (sendfile)", nginx_cpu, "");
    }

    /// Rate and CPU of a NAR that the asker's peerix gets from the holder's.
    fn through_peer(&self, hash_part: &str, times: u32) -> (f64, f64) {
        let local = (Ipv4Addr::LOCALHOST, PORT);
        let route = scene::nar_route(&self.asker.host, local, &format!("/{hash_part}.narinfo"));
        let daemons = [self.asker.daemon.pid(), self.holder.daemon.pid()];
        scene::stream(&self.asker.host, local, &route, times, &daemons)
    }

    fn by_nginx(&self, hash_part: &str, times: u32) -> (f64, f64) {
        let route = scene::nar_route(&self.asker.host, self.at(LARGE), &format!("/{hash_part}.narinfo"));
        scene::stream(&self.asker.host, self.at(LARGE), &route, times, &[self.nginx.pid()])
    }

    /// 20,000 files in one NAR.
    pub fn many_files(&mut self) {
        let hash_part = world::hash_part(&self.large.many).to_owned();
        let local = (Ipv4Addr::LOCALHOST, PORT);
        let mut series: [Series; 8] = Default::default();
        for _ in 0..self.rounds {
            let route = scene::nar_route(&self.holder.host, local, &format!("/store/{hash_part}.narinfo"));
            let own = scene::stream(&self.holder.host, local, &route, MANY, &[self.holder.daemon.pid()]);
            let dump = self.dump();
            let through = self.through_peer(&hash_part, MANY);
            let nginx = self.by_nginx(&hash_part, MANY);
            let figures = [own.0, own.1, dump.0, dump.1, through.0, through.1, nginx.0, nginx.1];
            series.iter_mut().zip(figures).for_each(|(series, figure)| series.push(figure));
        }
        let [own, own_cpu, dump, dump_cpu, through, through_cpu, nginx, nginx_cpu] = &series;
        let (dumped, table) = ("nix-store --dump (as the original)", &mut self.table);
        table.beside("5. 20,000 files, the peer alone, GB/s", own, dumped, dump, "ratio ≥ 1.5");
        table.beside("5. 20,000 files, the peer alone, CPU-s/GiB", own_cpu, dumped, dump_cpu, "ratio ≤ 0.5");
        let nar = "nginx (a ready NAR)";
        table.beside("5. 20,000 files from a peer, checked, GB/s", through, nar, nginx, "");
        table.beside("5. 20,000 files from a peer, both daemons, CPU-s/GiB", through_cpu, nar, nginx_cpu, "");
    }

    /// `nix-store --dump` of the many files, by one process as often as peerix is asked.
    fn dump(&self) -> (f64, f64) {
        let (before, began) = (scene::cpu_of_ended(), Instant::now());
        let script = format!("for n in $(seq {MANY}); do nix-store --dump {}; done | wc -c", self.large.many);
        let bytes = self.holder.host.sh(&script).trim().parse().expect("a number");
        scene::rates(bytes, began, scene::cpu_of_ended() - before)
    }

    /// Memory, size, time to start.
    pub fn footprint(&mut self) {
        let mut series: [Series; 8] = Default::default();
        for _ in 0..self.rounds {
            let host = scene::client(&self.lan, &self.world, "");
            let began = Instant::now();
            let mut daemon = scene::start(&host);
            first_answer(&host, PORT, "/nix-cache-info");
            series[0].push(began.elapsed().as_secs_f64() * 1e3);
            // It has begun by then whatever it does at the start.
            std::thread::sleep(Duration::from_secs(2));
            series[1].push(scene::memory(daemon.pid(), "VmRSS"));
            series[2].push(scene::memory(daemon.pid(), "RssAnon"));
            daemon.terminate();
            let began = Instant::now();
            let _nginx = scene::nginx(&host, &self.world);
            first_answer(&host, STATIC, "/nix-cache-info");
            series[3].push(began.elapsed().as_secs_f64() * 1e3);
        }
        for (peer, at) in [(&self.asker, 4), (&self.holder, 6)] {
            series[at].push(scene::memory(peer.daemon.pid(), "VmRSS"));
            series[at + 1].push(scene::memory(peer.daemon.pid(), "RssAnon"));
        }
        let mut size = Series::default();
        size.push(std::fs::metadata(daemon::binary()).expect("it was run").len() as f64 / 1048576.0);
        let [start, rss, anon, nginx, asker, asker_anon, holder, holder_anon] = &series;
        let table = &mut self.table;
        table.beside("6. from start to first answer, ms", start, "nginx", nginx, "≤ 50");
        table.alone("6. idle memory (RSS), MiB", rss, "≤ 8");
        table.alone("6. idle memory that is not of the program's file (RssAnon), MiB", anon, "");
        table.alone("6. asker's memory after what came before (RSS), MiB", asker, "");
        table.alone("6. … RssAnon, MiB", asker_anon, "");
        table.alone("6. holder's memory after what came before (RSS), MiB", holder, "");
        table.alone("6. … RssAnon, MiB", holder_anon, "");
        table.alone("6. program, MiB", &size, "≤ 6");
    }

    /// Narinfos of the own store to a neighbour that asks for as many as it can.
    pub fn narinfos(&mut self) {
        let present = scene::hash_parts(&self.closure);
        let absent = scene::absent(present.len());
        for (what, parts, connections, goal) in
            [("hits", &present, 16, "≥ 26,000, ≤ 50"), ("hits", &present, 25, ""), ("misses", &absent, 16, "")]
        {
            let mut series: [Series; 4] = Default::default();
            for _ in 0..self.rounds {
                let own = self.wrk(PORT, "local/", parts, connections, self.holder.daemon.pid());
                let its = self.wrk(STATIC, "", parts, connections, self.nginx.pid());
                series.iter_mut().zip([own.0, own.1, its.0, its.1]).for_each(|(series, figure)| series.push(figure));
            }
            let [own, own_cpu, its, its_cpu] = &series;
            let table = &mut self.table;
            table.beside(&format!("7. narinfo {what}/s, {connections} connections"), own, "nginx", its, goal);
            table.beside(
                &format!("7. narinfo {what}, {connections} connections, CPU µs each"),
                own_cpu,
                "nginx",
                its_cpu,
                "",
            );
        }
    }

    /// Requests a second, and CPU microseconds of the server for each.
    fn wrk(&self, port: u16, prefix: &str, parts: &[String], connections: u32, server: u32) -> (f64, f64) {
        let routes: Vec<String> = scene::narinfos(prefix, parts).iter().map(|route| format!("{route:?}")).collect();
        // Requests are made beforehand: wrk has one of the two processors at most.
        let script = format!(
            "local requests = {{}}
             function init() for n, route in ipairs({{ {} }}) do requests[n] = wrk.format(nil, route) end end
             function request() return requests[math.random(#requests)] end",
            routes.join(", ")
        );
        let host = &self.asker.host;
        host.write("/tmp/ask.lua", script);
        let before = scene::cpu(server);
        let text = host
            .cmd("wrk")
            .args(["-t1", "-s", "/tmp/ask.lua", &format!("-c{connections}"), &format!("-d{WRK}")])
            .arg(format!("http://{}", self.at(port)))
            .okay();
        let cpu = scene::cpu(server) - before;
        let number = |end: &str, start: &str| -> f64 {
            let line = text.lines().find(|line| line.contains(end) && line.contains(start));
            let line = line.unwrap_or_else(|| panic!("wrk says no {start}{end}: {text}"));
            line.replace(start, "").split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
        };
        assert_eq!(text.contains("Non-2xx"), !self.closure.iter().any(|path| path.contains(&parts[0])), "{text}");
        (number("", "Requests/sec:"), cpu * 1e6 / number(" requests in ", ""))
    }
}

/// Seconds that a command takes.
fn timed(command: &mut Command, check: impl Fn(&std::process::Output)) -> f64 {
    let began = Instant::now();
    let output = command.ran();
    let took = began.elapsed().as_secs_f64();
    check(&output);
    took
}

fn first_answer(host: &Host, port: u16, route: &str) {
    wait_for("the first answer", || {
        let answer = http::get(host, (Ipv4Addr::LOCALHOST, port), route).ok()?;
        (answer.status == 200).then_some(())
    });
}
