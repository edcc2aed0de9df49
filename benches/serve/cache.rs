//! A contender: a binary cache, the host it is asked from, and what it costs.

use crate::common::{Host, world};
use crate::shared::client::{Body, Client};
use crate::shared::cost;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;

/// A binary cache as seen from one host.
pub struct Cache<'a> {
    /// Name in the table.
    pub name: String,
    /// Address on which it listens.
    pub address: SocketAddr,
    /// Prefix of its routes: `/` or `/store/`.
    pub prefix: String,
    /// The serving processes; empty if unknown.
    pub pids: Vec<u32>,
    /// The host that sends the requests; `None` for this machine, outside the namespaces.
    from: Option<&'a Host>,
    /// Narinfos fetched so far, by store path.
    narinfos: Mutex<HashMap<String, Narinfo>>,
}

/// The fields of a narinfo that the benchmark uses.
#[derive(Clone)]
pub struct Narinfo {
    /// The route of the NAR.
    pub nar: String,
    /// `NarHash`: `sha256:…` in Nix32.
    pub hash: String,
    /// `NarSize` in bytes, uncompressed.
    pub size: u64,
    /// `Compression`: `none`, or the method by which the served file is compressed.
    pub compression: String,
}

impl<'a> Cache<'a> {
    /// A cache asked from host `from`, or from outside the namespaces if that is `None`.
    pub fn new(
        name: &str,
        from: Option<&'a Host>,
        address: SocketAddr,
        prefix: &str,
        pids: &[u32],
    ) -> Cache<'a> {
        let (name, prefix) = (name.to_owned(), prefix.to_owned());
        Cache { name, address, prefix, pids: pids.to_vec(), from, narinfos: Mutex::default() }
    }

    /// Returns this cache under another name.
    pub fn named(self, name: &str) -> Cache<'a> {
        Cache { name: name.to_owned(), ..self }
    }

    /// Returns this cache with [`Cache::label`] as its name.
    pub fn labelled(self, path: &str) -> Cache<'a> {
        let label = self.label(path);
        self.named(&label)
    }

    /// The URL of this cache as a substituter.
    pub fn url(&self) -> String {
        format!("http://{}{}", self.address, self.prefix)
    }

    /// A command that runs on the host that asks this cache.
    pub fn command(&self, program: &str) -> Command {
        self.from.map_or_else(|| Command::new(program), |host| host.cmd(program))
    }

    /// Opens a connection; panics if there is none within [`DEADLINE`](crate::common::DEADLINE).
    pub fn client(&self) -> Client {
        let stream = match self.from {
            Some(host) => host.connect(self.address),
            None => TcpStream::connect_timeout(&self.address, crate::common::DEADLINE),
        };
        Client::new(stream.unwrap_or_else(|error| panic!("{}: {error}", self.url())))
    }

    /// CPU seconds that its processes have used, or NaN if they are unknown.
    pub fn cpu(&self) -> f64 {
        if self.pids.is_empty() { f64::NAN } else { cost::cpu_of(&self.pids) }
    }

    /// The route of the narinfo with this hash part.
    pub fn route(&self, hash_part: &str) -> String {
        format!("{}{hash_part}.narinfo", self.prefix)
    }

    /// Returns the narinfo of a store path, cached from the first request. Errors: the HTTP status
    /// if the cache has no such narinfo.
    pub fn look_up(&self, path: &str) -> Result<Narinfo, u16> {
        let mut kept = self.narinfos.lock().expect("nobody panics while it is held");
        if let Some(narinfo) = kept.get(path) {
            return Ok(narinfo.clone());
        }
        let narinfo = self.ask(&mut self.client(), path)?;
        kept.insert(path.to_owned(), narinfo.clone());
        Ok(narinfo)
    }

    /// Requests the narinfo of a store path over `client`. Errors: the HTTP status if the cache has
    /// no such narinfo.
    pub fn ask(&self, client: &mut Client, path: &str) -> Result<Narinfo, u16> {
        let (status, text) = client.text(&self.route(world::hash_part(path)));
        self.parse(&text).filter(|_| status == 200).ok_or(status)
    }

    /// Returns the narinfo of a store path; panics if the cache lacks it.
    pub fn narinfo(&self, path: &str) -> Narinfo {
        self.look_up(path).unwrap_or_else(|status| panic!("{}: {status} for {path}", self.name))
    }

    /// The name, followed by the compression of the path's NAR unless that is `none`.
    pub fn label(&self, path: &str) -> String {
        match self.narinfo(path).compression.as_str() {
            "none" => self.name.clone(),
            compression => format!("{} ({compression}, bytes as they come)", self.name),
        }
    }

    fn parse(&self, text: &str) -> Option<Narinfo> {
        let line =
            |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        let url = line("URL")?;
        let nar = match url.strip_prefix("http://") {
            Some(rest) => rest[rest.find('/')?..].to_owned(),
            None => format!("{}{url}", self.prefix),
        };
        Some(Narinfo {
            nar,
            hash: line("NarHash")?.to_owned(),
            size: line("NarSize")?.parse().ok()?,
            compression: line("Compression").unwrap_or("bzip2").to_owned(),
        })
    }

    /// Reads a whole NAR. Panics if it is uncompressed and its size or hash differs from the
    /// narinfo.
    pub fn check(&self, path: &str) {
        let narinfo = self.narinfo(path);
        let mut digest = ring::digest::Context::new(&ring::digest::SHA256);
        let came =
            self.client().get(&narinfo.nar, "", Body::Read(&mut |bytes| digest.update(bytes)));
        if narinfo.compression == "none" {
            let hash = format!("sha256:{}", peerix::nix::nix32::encode(digest.finish().as_ref()));
            assert_eq!(
                (came, &hash),
                (narinfo.size, &narinfo.hash),
                "{} {}",
                self.name,
                narinfo.nar
            );
        }
    }
}
