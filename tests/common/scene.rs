//! The usual hosts of a test: holders that have all store paths and run peerix, and askers that
//! have none and fetch. Also the networks that these are in when they find each other through a
//! tracker.

use super::daemon::{Daemon, add_unique_path, wait_until_known};
use super::lan::{Host, Lan, Run, Scale, introduce};
use super::tracker::{self, Tracker};
use super::wan::Wan;
use super::{World, daemon, nix, stock, thread, wait_for};
use std::process::Output;
use std::time::Duration;

/// Hits that mark the middle of the fetch of `closure1000`, which has 1,000 paths.
const MIDDLE: u64 = 100;

/// Pause between two rounds of lookups, which leaves processor time to other tests.
const BETWEEN_ROUNDS: Duration = Duration::from_secs(6);

/// A host that has all paths of the [`World`] and runs peerix.
pub struct Holder {
    /// The running peerix.
    pub daemon: Daemon,
    /// Store path that only this host has.
    pub mark: String,
    /// The machine.
    pub host: Host,
}

impl Holder {
    /// Starts a holder whose paths carry the signature of the world's static cache.
    pub fn new(lan: &Lan, world: &World, name: &str) -> Holder {
        Self::with(lan, world, name, |host| {
            world.sign(host);
            vec![]
        })
    }

    /// Starts a holder after `prepare` has set up the host and returned peerix's flags.
    pub fn with(
        lan: &Lan,
        world: &World,
        name: &str,
        prepare: impl FnOnce(&Host) -> Vec<String>,
    ) -> Holder {
        let host = lan.host(name);
        world.give(&host);
        let mark = add_unique_path(&host);
        let flags = prepare(&host);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Holder { daemon: Daemon::start(&host, &flags), mark, host }
    }
}

/// A neighbour that runs peerix and has an empty store.
pub struct Bystander {
    /// The running peerix.
    pub daemon: Daemon,
    /// The machine.
    pub host: Host,
}

impl Bystander {
    /// Starts a bystander on a new host.
    pub fn new(lan: &Lan, name: &str) -> Bystander {
        Bystander::on(lan.host(name))
    }

    fn on(host: Host) -> Bystander {
        stock::ready(&host);
        Bystander { daemon: Daemon::start(&host, &[]), host }
    }

    /// Starts `count` bystanders.
    pub fn crowd(lan: &Lan, count: usize) -> Vec<Bystander> {
        let hosts: Vec<Host> =
            (0..count).map(|number| lan.host(&format!("neighbour-{number}"))).collect();
        introduce(&hosts.iter().collect::<Vec<_>>());
        hosts.into_iter().map(Bystander::on).collect()
    }

    /// Simulates a power failure: the process ends at once, and the network gets no notice.
    pub fn vanish(&mut self) {
        self.host.unplug();
        self.daemon.kill();
    }
}

/// A host with an empty store. Its Nix asks its own peerix and then the substituter `next`.
pub struct Asker {
    /// The running peerix.
    pub daemon: Daemon,
    /// The machine.
    pub host: Host,
}

impl Asker {
    /// Starts an asker that trusts the world's static cache and has no other substituter. Waits
    /// until it knows all `holders`.
    pub fn new(lan: &Lan, world: &World, holders: &[&Holder]) -> Asker {
        let asker = Self::with(lan, "", &[&world.cache_key]);
        asker.meet(holders);
        asker
    }

    /// Starts an asker that trusts the world's static cache and has it as the next substituter.
    /// Waits until it knows all `holders`.
    pub fn with_next(lan: &Lan, world: &World, holders: &[&Holder]) -> Asker {
        let asker = Self::with(lan, &world.next(), &[&world.cache_key]);
        asker.meet(holders);
        asker
    }

    /// Starts an asker whose Nix and peerix both trust `keys`.
    pub fn with(lan: &Lan, next: &str, keys: &[&str]) -> Asker {
        Self::flagged(lan, next, keys, |_| vec![])
    }

    /// Starts an asker whose Nix and peerix both trust `keys`, with the flags that `more` returns.
    pub fn flagged(
        lan: &Lan,
        next: &str,
        keys: &[&str],
        more: impl FnOnce(&Host) -> Vec<String>,
    ) -> Asker {
        Self::on(lan.host("asker"), next, keys, more)
    }

    /// Starts an asker on `host`, with the flags that `more` returns.
    pub fn on(
        host: Host,
        next: &str,
        keys: &[&str],
        more: impl FnOnce(&Host) -> Vec<String>,
    ) -> Asker {
        nix::configure_client(&host, next, keys);
        if keys.is_empty() {
            // peerix checks peers' signatures against nix.conf too. Without keys, disable the
            // check.
            host.sh("echo 'require-sigs = false' >> /etc/nix/nix.conf");
        }
        let more = more(&host);
        let mut flags: Vec<&str> =
            keys.iter().flat_map(|key| ["--trusted-public-key", key]).collect();
        flags.extend(more.iter().map(String::as_str));
        Asker { daemon: Daemon::start(&host, &flags), host }
    }

    /// Waits until peerix knows all of `holders`.
    pub fn meet(&self, holders: &[&Holder]) {
        for holder in holders {
            wait_until_known(&self.host, &holder.mark);
        }
    }

    /// Realises `path`. Panics if Nix complains or the closure is not complete. Returns the
    /// closure.
    pub fn fetch_and_check(&self, world: &World, path: &str) -> Vec<String> {
        nix::realise_quietly(&self.host, &[path]);
        self.assert_closure_complete(world, path)
    }

    /// Realises `path` and calls `event` after [`MIDDLE`] hits. Panics if Nix ends earlier.
    pub fn realise_during<T>(&self, path: &str, event: impl FnOnce() -> T) -> (Output, T) {
        let before = self.hits();
        let mut nix = nix::realising(&self.host, &[path]).spawn().expect("nsenter starts");
        let is_early = wait_for("the middle of the closure", || {
            let has_ended = nix.try_wait().expect("nsenter is ours").is_some();
            (has_ended || self.hits() >= before + MIDDLE).then_some(has_ended)
        });
        let event = (!is_early).then(event);
        let output = nix.wait_with_output().expect("nsenter is ours");
        let event = event
            .unwrap_or_else(|| panic!("it ended before the middle: {:?}", nix::complaint(&output)));
        (output, event)
    }

    /// Realises `closure1000` and calls `event` after [`MIDDLE`] hits. Panics if Nix complains or
    /// the closure is not complete.
    pub fn fetch_closure_during<T>(&self, world: &World, event: impl FnOnce() -> T) -> T {
        let path = world.path("closure1000");
        let (output, event) = self.realise_during(path, event);
        nix::assert_quiet(&output);
        assert_eq!(self.assert_closure_complete(world, path).len(), 1000);
        event
    }

    /// Makes Nix look up `closure1000` repeatedly until `event` has ended, and once more, then
    /// fetches it. Panics if a lookup misses a path.
    pub fn look_up_closure_during(&self, world: &World, event: impl FnOnce() + Send) {
        let path = world.path("closure1000");
        std::thread::scope(|scope| {
            let event = thread::spawn_in(scope, "event", event);
            let mut rounds = 0;
            loop {
                let last = event.is_finished();
                rounds += 1;
                let paths = nix::look_up_closure(&self.host, path);
                assert_eq!(paths.len(), 1000, "round {rounds}");
                if last {
                    break;
                }
                std::thread::sleep(BETWEEN_ROUNDS);
            }
        });
        assert_eq!(self.fetch_and_check(world, path).len(), 1000);
    }

    /// Lookups that found a peer, since peerix started.
    fn hits(&self) -> u64 {
        daemon::status(&self.host)["totals"]["start"]["hits"].as_u64().expect("a count")
    }

    /// Panics unless the closure of `path` is complete. Returns the closure.
    pub fn assert_closure_complete(&self, world: &World, path: &str) -> Vec<String> {
        let closure = nix::closure(&self.host, &[path]);
        let all: Vec<&str> = closure.iter().map(String::as_str).collect();
        nix::assert_whole(&self.host, &all, &world.store());
        closure
    }
}

/// Three networks, for askers, holders and the tracker, joined by a router.
pub struct WanScene {
    /// A running tracker in `centre`.
    pub tracker: Tracker,
    /// Network of the askers.
    pub home: Lan,
    /// Network of the holders.
    pub away: Lan,
    /// Network of the tracker.
    pub centre: Lan,
    /// The store paths of the holders.
    pub world: World,
    /// The router between the networks.
    pub wan: Wan,
}

impl WanScene {
    /// Creates the networks and starts the tracker.
    pub fn new() -> WanScene {
        WanScene::in_wan(Wan::new())
    }

    /// Creates the networks and starts the tracker, with scaled times in all programs.
    pub fn with_scale(scale: Scale) -> WanScene {
        WanScene::in_wan(Wan::new().with_scale(scale))
    }

    fn in_wan(wan: Wan) -> WanScene {
        let (home, away, centre) =
            (wan.lan([10, 1, 0]), wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
        let world = World::on(&home);
        WanScene { tracker: Tracker::start(centre.host("tracker")), home, away, centre, world, wan }
    }

    /// Starts a holder that shares everything through the tracker, with the signatures of the
    /// world's static cache.
    pub fn holder(&self, name: &str) -> Holder {
        Holder::with(&self.away, &self.world, name, |host| {
            self.world.sign(host);
            tracker::open(host, "wan", &[&self.tracker.host])
        })
    }

    /// Starts an asker that trusts the world's static cache, has no other substituter, and knows
    /// all `holders` through the tracker.
    pub fn asker(&self, holders: &[&Holder]) -> Asker {
        let asker = Asker::flagged(&self.home, "", &[&self.world.cache_key], |host| {
            tracker::flags(host, "wan", &[&self.tracker.host])
        });
        asker.meet(holders);
        asker
    }
}
