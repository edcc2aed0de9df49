//! The usual cast: hosts that hold everything and run peerix, and hosts that have nothing and ask.

use super::daemon::{Daemon, mark, wait_until_known};
use super::lan::{Host, Lan, Run};
use super::{World, nix};

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
    /// One whose `closure1000`, `middle`, `large` … carry the signature of the world's static cache, not its own.
    pub fn new(lan: &Lan, world: &World, name: &str) -> Holder {
        Self::with(lan, world, name, |host| {
            world.sign(host);
            vec![]
        })
    }

    /// One that `prepare` makes ready, which returns peerix's flags.
    pub fn with(lan: &Lan, world: &World, name: &str, prepare: impl FnOnce(&Host) -> Vec<String>) -> Holder {
        let host = lan.host(name);
        world.give(&host);
        let mark = mark(&host);
        let flags = prepare(&host);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Holder { daemon: Daemon::start(&host, &flags), mark, host }
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
    /// One that trusts the world's static cache, knows every one of `holders`, and has no other substituter.
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
    pub fn flagged(lan: &Lan, next: &str, keys: &[&str], more: impl FnOnce(&Host) -> Vec<String>) -> Asker {
        let host = lan.host("asker");
        nix::configure_client(&host, next, keys);
        let more = more(&host);
        let mut flags: Vec<&str> = keys.iter().flat_map(|key| ["--trusted-public-key", key]).collect();
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

    /// Checks that `path` and all it needs is there and right.
    pub fn has_whole(&self, world: &World, path: &str) -> Vec<String> {
        let closure = nix::closure(&self.host, &[path]);
        let all: Vec<&str> = closure.iter().map(String::as_str).collect();
        nix::assert_whole(&self.host, &all, &world.store());
        closure
    }
}
