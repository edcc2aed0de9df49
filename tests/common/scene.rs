//! The usual cast: hosts that hold everything and run peerix, and hosts that have nothing and ask;
//! and the places they are in when they need a tracker to find one another.

use super::daemon::{Daemon, mark, wait_until_known};
use super::lan::{Host, Lan, Run, Scale, introduce};
use super::tracker::{self, Tracker};
use super::wan::Wan;
use super::{World, daemon, nix, stock, thread, wait_for};
use std::process::Output;
use std::time::Duration;

/// Paths of a closure of 1,000 that are found when its middle is said to be reached.
const MIDDLE: u64 = 100;

/// Between two rounds of lookups, so that other scenes get their share of the processors.
const BETWEEN_ROUNDS: Duration = Duration::from_millis(500);

/// A host with all of the world's paths, running peerix.
pub struct Holder {
    /// Its peerix.
    pub daemon: Daemon,
    /// A path that only this host has.
    pub mark: String,
    /// The machine.
    pub host: Host,
}

impl Holder {
    /// One whose `closure1000`, `middle`, `large` … carry the signature of the world's static
    /// cache, not its own.
    pub fn new(lan: &Lan, world: &World, name: &str) -> Holder {
        Self::with(lan, world, name, |host| {
            world.sign(host);
            vec![]
        })
    }

    /// One that `prepare` makes ready, which returns peerix's flags.
    pub fn with(
        lan: &Lan,
        world: &World,
        name: &str,
        prepare: impl FnOnce(&Host) -> Vec<String>,
    ) -> Holder {
        let host = lan.host(name);
        world.give(&host);
        let mark = mark(&host);
        let flags = prepare(&host);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Holder { daemon: Daemon::start(&host, &flags), mark, host }
    }
}

/// A neighbour that runs peerix and has nothing.
pub struct Bystander {
    /// Its peerix.
    pub daemon: Daemon,
    /// The machine.
    pub host: Host,
}

impl Bystander {
    /// Starts it.
    pub fn new(lan: &Lan, name: &str) -> Bystander {
        Bystander::on(lan.host(name))
    }

    fn on(host: Host) -> Bystander {
        stock::ready(&host);
        Bystander { daemon: Daemon::start(&host, &[]), host }
    }

    /// Starts many.
    pub fn crowd(lan: &Lan, count: usize) -> Vec<Bystander> {
        let hosts: Vec<Host> =
            (0..count).map(|number| lan.host(&format!("neighbour-{number}"))).collect();
        introduce(&hosts.iter().collect::<Vec<_>>());
        hosts.into_iter().map(Bystander::on).collect()
    }

    /// As when power fails: it ends at once, and the network learns nothing of it.
    pub fn vanish(&mut self) {
        self.host.unplug();
        self.daemon.kill();
    }
}

/// A host with an empty store whose Nix asks its own peerix, then `next`.
pub struct Asker {
    /// Its peerix.
    pub daemon: Daemon,
    /// The machine.
    pub host: Host,
}

impl Asker {
    /// One that trusts the world's static cache, knows every one of `holders`, and has no other
    /// substituter.
    pub fn new(lan: &Lan, world: &World, holders: &[&Holder]) -> Asker {
        let asker = Self::with(lan, "", &[&world.cache_key]);
        asker.meet(holders);
        asker
    }

    /// The same with the world's static cache as next substituter.
    pub fn with_next(lan: &Lan, world: &World, holders: &[&Holder]) -> Asker {
        let asker = Self::with(lan, &world.next(), &[&world.cache_key]);
        asker.meet(holders);
        asker
    }

    /// One that trusts `keys`, as a user would set it up: Nix and peerix are told of the same keys.
    pub fn with(lan: &Lan, next: &str, keys: &[&str]) -> Asker {
        Self::flagged(lan, next, keys, |_| vec![])
    }

    /// The same with the flags that `more` returns.
    pub fn flagged(
        lan: &Lan,
        next: &str,
        keys: &[&str],
        more: impl FnOnce(&Host) -> Vec<String>,
    ) -> Asker {
        Self::on(lan.host("asker"), next, keys, more)
    }

    /// The same on a given host.
    pub fn on(
        host: Host,
        next: &str,
        keys: &[&str],
        more: impl FnOnce(&Host) -> Vec<String>,
    ) -> Asker {
        nix::configure_client(&host, next, keys);
        if keys.is_empty() {
            // Peers are held to the keys of nix.conf. Whoever has none to name believes everybody.
            host.sh("echo 'require-sigs = false' >> /etc/nix/nix.conf");
        }
        let more = more(&host);
        let mut flags: Vec<&str> =
            keys.iter().flat_map(|key| ["--trusted-public-key", key]).collect();
        flags.extend(more.iter().map(String::as_str));
        Asker { daemon: Daemon::start(&host, &flags), host }
    }

    /// Waits until it knows all of `holders`.
    pub fn meet(&self, holders: &[&Holder]) {
        for holder in holders {
            wait_until_known(&self.host, &holder.mark);
        }
    }

    /// Realises `path` quietly, and checks that all it needs is there and right.
    pub fn fetches(&self, world: &World, path: &str) -> Vec<String> {
        nix::realise_quietly(&self.host, &[path]);
        self.has_whole(world, path)
    }

    /// Realises `path`, and calls `event` in the middle, when some of what it needs has been found.
    pub fn realises_while<T>(&self, path: &str, event: impl FnOnce() -> T) -> (Output, T) {
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

    /// The same for the closure of 1,000. All of it has to be there and right at the end.
    pub fn fetches_while<T>(&self, world: &World, event: impl FnOnce() -> T) -> T {
        let path = world.path("closure1000");
        let (output, event) = self.realises_while(path, event);
        nix::assert_quiet(&output);
        assert_eq!(self.has_whole(world, path).len(), 1000);
        event
    }

    /// Nix looks up the closure of 1,000 again and again while `event` takes its course, and once
    /// more; then fetches it. All has to be found each time.
    pub fn looks_up_while(&self, world: &World, event: impl FnOnce() + Send) {
        let path = world.path("closure1000");
        std::thread::scope(|scope| {
            let event = thread::spawn_in(scope, "event", event);
            let mut rounds = 0;
            loop {
                let last = event.is_finished();
                rounds += 1;
                let paths = nix::look_up_closure(&self.host, path);
                assert_eq!(paths.lines().count(), 1000, "round {rounds}");
                if last {
                    break;
                }
                std::thread::sleep(BETWEEN_ROUNDS);
            }
        });
        assert_eq!(self.fetches(world, path).len(), 1000);
    }

    /// Lookups that found a peer.
    fn hits(&self) -> u64 {
        daemon::status(&self.host)["totals"]["start"]["hits"].as_u64().expect("a count")
    }

    /// Checks that `path` and all it needs is there and right.
    pub fn has_whole(&self, world: &World, path: &str) -> Vec<String> {
        let closure = nix::closure(&self.host, &[path]);
        let all: Vec<&str> = closure.iter().map(String::as_str).collect();
        nix::assert_whole(&self.host, &all, &world.store());
        closure
    }
}

/// Three networks, the asker's, the holders' and the tracker's, with a router between them.
pub struct Places {
    /// A running tracker in `centre`.
    pub tracker: Tracker,
    /// Where askers are.
    pub home: Lan,
    /// Where holders are.
    pub away: Lan,
    /// Where the tracker is.
    pub centre: Lan,
    /// What holders hold.
    pub world: World,
    /// All of it.
    pub wan: Wan,
}

impl Places {
    /// Starts the tracker.
    pub fn new() -> Places {
        Places::in_wan(Wan::new())
    }

    /// The same, where all programs scale their times.
    pub fn with_scale(scale: Scale) -> Places {
        Places::in_wan(Wan::new().with_scale(scale))
    }

    fn in_wan(wan: Wan) -> Places {
        let (home, away, centre) =
            (wan.lan([10, 1, 0]), wan.lan([203, 0, 113]), wan.lan([198, 51, 100]));
        let world = World::on(&home);
        Places { tracker: Tracker::start(centre.host("tracker")), home, away, centre, world, wan }
    }

    /// One that shares everything by the tracker, with the signatures of the world's static cache.
    pub fn holder(&self, name: &str) -> Holder {
        Holder::with(&self.away, &self.world, name, |host| {
            self.world.sign(host);
            tracker::open(host, "wan", &[&self.tracker.host])
        })
    }

    /// One that trusts the world's static cache, finds every one of `holders` by the tracker, and
    /// has no other substituter.
    pub fn asker(&self, holders: &[&Holder]) -> Asker {
        let asker = Asker::flagged(&self.home, "", &[&self.world.cache_key], |host| {
            tracker::flags(host, "wan", &[&self.tracker.host])
        });
        asker.meet(holders);
        asker
    }
}
