//! A contender: a binary cache, where it is asked from, and what it costs.

use crate::common::{Host, world};
use crate::shared::client::{Body, Client};
use crate::shared::cost;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::sync::Mutex;

/// A cache that is asked from one place.
pub struct Cache<'a> {
    /// For the table.
    pub name: String,
    /// Where it listens.
    pub address: SocketAddr,
    /// What its routes begin with: `/`, `/store/`.
    pub prefix: String,
    /// The processes that serve; none if that is not known.
    pub pids: Vec<u32>,
    /// Who asks: a host, or this machine itself.
    from: Option<&'a Host>,
    /// Narinfos that it has given.
    narinfos: Mutex<HashMap<String, Narinfo>>,
}

/// What counts of one.
#[derive(Clone)]
pub struct Narinfo {
    /// The route of the NAR.
    pub nar: String,
    /// `sha256:…`, of the NAR.
    pub hash: String,
    /// Of the NAR.
    pub size: u64,
    /// `none`, or how the NAR is compressed when it comes.
    pub compression: String,
}

impl<'a> Cache<'a> {
    /// One that is asked from `from`, or from outside of the namespaces.
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

    /// The same under another name.
    pub fn named(self, name: &str) -> Cache<'a> {
        Cache { name: name.to_owned(), ..self }
    }

    /// The same with [`Cache::label`] as its name.
    pub fn labelled(self, path: &str) -> Cache<'a> {
        let label = self.label(path);
        self.named(&label)
    }

    /// As a substituter.
    pub fn url(&self) -> String {
        format!("http://{}{}", self.address, self.prefix)
    }

    /// A program where it is asked from.
    pub fn command(&self, program: &str) -> Command {
        self.from.map_or_else(|| Command::new(program), |host| host.cmd(program))
    }

    /// A connection to it.
    pub fn client(&self) -> Client {
        let stream = match self.from {
            Some(host) => host.connect(self.address),
            None => TcpStream::connect_timeout(&self.address, crate::common::DEADLINE),
        };
        Client::new(stream.unwrap_or_else(|error| panic!("{}: {error}", self.url())))
    }

    /// CPU seconds that it has used, or no number.
    pub fn cpu(&self) -> f64 {
        if self.pids.is_empty() { f64::NAN } else { cost::cpu_of(&self.pids) }
    }

    /// The route of the narinfo of a hash part.
    pub fn route(&self, hash_part: &str) -> String {
        format!("{}{hash_part}.narinfo", self.prefix)
    }

    /// What its narinfo of a path says, or the status if there is none.
    pub fn look_up(&self, path: &str) -> Result<Narinfo, u16> {
        let mut kept = self.narinfos.lock().expect("nobody panics while it is held");
        if let Some(narinfo) = kept.get(path) {
            return Ok(narinfo.clone());
        }
        let narinfo = self.ask(&mut self.client(), path)?;
        kept.insert(path.to_owned(), narinfo.clone());
        Ok(narinfo)
    }

    /// Asks for the narinfo of a path; the status if there is none.
    pub fn ask(&self, client: &mut Client, path: &str) -> Result<Narinfo, u16> {
        let (status, text) = client.text(&self.route(world::hash_part(path)));
        self.parse(&text).filter(|_| status == 200).ok_or(status)
    }

    /// The same of a path that it has to have.
    pub fn narinfo(&self, path: &str) -> Narinfo {
        self.look_up(path).unwrap_or_else(|status| panic!("{}: {status} for {path}", self.name))
    }

    /// Its name, with how it compresses the NAR of a path.
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

    /// Reads a whole NAR and checks that it is what its narinfo promises.
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
