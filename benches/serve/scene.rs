//! The hosts: a holder of the fixture with peerix and nginx, an asker with peerix, and optionally a
//! cache outside the namespaces.

use super::cache::Cache;
use super::fixture::Fixture;
use super::outside::Outside;
use crate::common::{Host, Lan, PORT, Process};
use crate::shared::scene::{self, Peer};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

/// Ports of nginx with `sendfile` and without it.
const SENDFILE: u16 = 8080;
const PLAIN: u16 = 8081;

/// Hosts and processes shared by all workloads.
pub struct Bench {
    pub asker: Peer,
    pub holder: Peer,
    pub nginx: Process,
    pub on_tmpfs: bool,
    /// Directory of the static cache on the holder.
    pub cache: std::path::PathBuf,
    pub outside: Option<Outside>,
    pub fixture: Fixture,
    pub lan: Lan,
}

impl Bench {
    /// Starts all hosts and servers. Makes the fixture if it does not exist.
    pub fn new() -> Bench {
        let lan = Lan::new();
        let fixture = Fixture::on(&lan);
        let outside = Outside::from_environment(&fixture);
        let host = lan.host("holder");
        let (cache, on_tmpfs) = fixture.give(&host);
        let nginx = scene::nginx(&host, &[(SENDFILE, &cache, true), (PLAIN, &cache, false)]);
        let holder = Peer::start(host);
        // Only the holder has the path.
        let asker = Peer::asker(&lan, &fixture.key, &fixture.small[..1]);
        Bench { asker, holder, nginx, on_tmpfs, cache, outside, fixture, lan }
    }

    /// The servers of the holder's store, asked locally: peerix, nginx with `sendfile`, nginx
    /// without it, and the cache from outside if there is one.
    pub fn servers(&self) -> Vec<Cache<'_>> {
        let here = Ipv4Addr::LOCALHOST;
        let mut servers = vec![
            self.own_store(&self.holder.host, here),
            self.nginx(&self.holder.host, here, SENDFILE),
            self.nginx(&self.holder.host, here, PLAIN),
        ];
        servers.extend(self.outside.as_ref().map(Outside::cache));
        servers
    }

    /// The asker's peerix, the holder's peerix, and the holder's nginx, all asked from the asker.
    pub fn through(&self) -> [Cache<'_>; 3] {
        let (asker, holder) = (&self.asker.host, self.holder.host.address);
        let pids = [self.asker.daemon.pid(), self.holder.daemon.pid()];
        let own = SocketAddr::from((Ipv4Addr::LOCALHOST, PORT));
        [
            Cache::new("peerix", Some(asker), own, "/", &pids),
            self.own_store(asker, holder).named("the peer's own stream"),
            self.nginx(asker, holder, SENDFILE).named("nginx, asked directly"),
        ]
    }

    fn own_store<'a>(&self, from: &'a Host, at: impl Into<IpAddr>) -> Cache<'a> {
        Cache::new(
            "peerix",
            Some(from),
            (at.into(), PORT).into(),
            "/store/",
            &[self.holder.daemon.pid()],
        )
    }

    fn nginx<'a>(&self, from: &'a Host, at: impl Into<IpAddr>, port: u16) -> Cache<'a> {
        let name = if port == SENDFILE { "nginx" } else { "nginx, plain" };
        Cache::new(name, Some(from), (at.into(), port).into(), "/", &[self.nginx.pid()])
    }
}
