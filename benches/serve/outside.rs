//! An optional contender named by the environment: any binary cache outside the namespaces that
//! serves over `http`.

use super::cache::Cache;
use super::fixture::Fixture;
use std::net::{SocketAddr, ToSocketAddrs};
use std::process::{Command, Stdio};

/// The cache described by `CACHE_URL`, `CACHE_PID` and `CACHE_FILL`.
pub struct Outside {
    name: String,
    address: SocketAddr,
    prefix: String,
    pids: Vec<u32>,
}

impl Outside {
    /// Returns the cache, or `None` if `CACHE_URL` is unset or empty. If the cache lacks paths, it
    /// fills it (`CACHE_FILL=1`) or ends the program with instructions.
    pub fn from_environment(fixture: &Fixture) -> Option<Outside> {
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let url = variable("CACHE_URL")?;
        let Some(rest) = url.strip_prefix("http://") else {
            fail(&format!("CACHE_URL={url}: http:// is all it can be"))
        };
        let (server, path) = rest.split_once('/').unwrap_or((rest, ""));
        let server = if server.contains(':') { server.to_owned() } else { format!("{server}:80") };
        let address = server.to_socket_addrs().ok().and_then(|mut all| all.next());
        let Some(address) = address else {
            fail(&format!("CACHE_URL={url}: no address for {server}"))
        };
        let path = path.trim_matches('/');
        let prefix = if path.is_empty() { "/".to_owned() } else { format!("/{path}/") };
        let pids = variable("CACHE_PID").map(|pid| {
            let pid = pid
                .parse()
                .ok()
                .filter(|pid| std::path::Path::new(&format!("/proc/{pid}/stat")).exists());
            pid.unwrap_or_else(|| fail("CACHE_PID: no process has this number"))
        });
        let outside = Outside {
            name: rest.trim_end_matches('/').to_owned(),
            address,
            prefix,
            pids: pids.into_iter().collect(),
        };
        if let Err(missing) = outside.has_all(fixture) {
            let count = fixture.paths().count();
            let what =
                format!("{count} paths of this benchmark, with {} MiB", fixture.mebibytes() / 2);
            if variable("CACHE_FILL").as_deref() != Some("1") {
                let cache = fixture.cache();
                fail(&format!(
                    "CACHE_URL={url}: {missing}\nThe cache needs the {what}. If it serves this machine's /nix/store, \
                     CACHE_FILL=1 adds them to that, until the next garbage collection removes them. For any other, \
                     copy them from the static cache in {}",
                    cache.display()
                ));
            }
            eprintln!(
                "adding the {what}, to this machine's /nix/store; the next garbage collection removes them"
            );
            fill(fixture);
            outside
                .has_all(fixture)
                .unwrap_or_else(|missing| fail(&format!("CACHE_URL={url}: still, {missing}")));
        }
        Some(outside)
    }

    /// This cache as a contender.
    pub fn cache(&self) -> Cache<'_> {
        Cache::new(&self.name, None, self.address, &self.prefix, &self.pids)
    }

    /// Checks one path of each kind, which stands for all. Errors: which path is missing.
    fn has_all(&self, fixture: &Fixture) -> Result<(), String> {
        let cache = self.cache();
        let some = [
            &fixture.small[0],
            &fixture.update[0],
            &fixture.quarters[0],
            &fixture.large,
            &fixture.tree,
        ];
        for path in some.into_iter().chain([&fixture.last_of_large, &fixture.last_of_tree]) {
            cache.look_up(path).map_err(|status| format!("{path} is not there ({status})"))?;
        }
        Ok(())
    }
}

fn fill(fixture: &Fixture) {
    // `nix copy` is still experimental, and no store trusts the benchmark's key.
    let from = format!("file://{}", fixture.cache().display());
    let options = [
        "--extra-experimental-features",
        "nix-command",
        "copy",
        "--quiet",
        "--no-check-sigs",
        "--from",
        &from,
    ];
    let paths: Vec<&String> = fixture.paths().collect();
    // 5,000 paths fit on a command line.
    for paths in paths.chunks(5000) {
        let status = Command::new("nix").args(options).args(paths).stdin(Stdio::null()).status();
        if !status.is_ok_and(|status| status.success()) {
            fail("CACHE_FILL=1: nix copy failed");
        }
    }
}

fn fail(what: &str) -> ! {
    eprintln!("{what}");
    std::process::exit(2)
}
