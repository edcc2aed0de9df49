//! Load from wrk, which sends as many requests as it can over persistent connections.

use super::cache::Cache;
use crate::common::directory;
use crate::common::lan::Run;

/// Duration of a measurement, in seconds.
const SECONDS: u32 = 2;

/// Requests per second, median and 99th percentile in milliseconds, and CPU microseconds of the
/// server per request.
pub type Figures = [f64; 4];

/// Routes that wrk requests in random order.
pub struct Load<'a> {
    cache: &'a Cache<'a>,
    script: String,
    present: bool,
}

impl<'a> Load<'a> {
    /// Prepares a load. Either all routes are present or none is. Requests them for one second over
    /// 64 connections, so that caches are warm.
    pub fn new(cache: &'a Cache<'a>, routes: &[String], present: bool) -> Load<'a> {
        // The script formats requests in advance: wrk shares the processors with the server.
        let file = directory().join(format!(
            "routes-{}-{}",
            cache.address.port(),
            cache.prefix.replace('/', "")
        ));
        std::fs::write(&file, routes.join("\n")).expect("a file of routes");
        let text = format!(
            "local requests = {{}}
             function init() for route in io.lines({file:?}) do requests[#requests + 1] = wrk.format(nil, route) end end
             function request() return requests[math.random(#requests)] end"
        );
        let script = file.with_extension("lua");
        std::fs::write(&script, text).expect("a script");
        let load = Load { cache, script: script.display().to_string(), present };
        load.run_for(64, 1);
        load
    }

    /// Name of the cache under load.
    pub fn name(&self) -> String {
        self.cache.name.clone()
    }

    /// Measures for [`SECONDS`] over `connections` connections.
    pub fn run(&self, connections: u32) -> Figures {
        self.run_for(connections, SECONDS)
    }

    fn run_for(&self, connections: u32, seconds: u32) -> Figures {
        let before = self.cache.cpu();
        let text = self
            .cache
            .command("wrk")
            .args([
                "-t1",
                "--latency",
                "-s",
                &self.script,
                &format!("-c{connections}"),
                &format!("-d{seconds}"),
            ])
            .arg(format!("http://{}", self.cache.address))
            .okay();
        let cpu = self.cache.cpu() - before;
        // Returns the words of the first line that contains `word`.
        let words = |word: &str| {
            let line = text
                .lines()
                .find(|line| line.contains(word))
                .unwrap_or_else(|| panic!("no {word}: {text}"));
            line.split_whitespace().collect::<Vec<_>>()
        };
        let number = |text: &str| text.parse::<f64>().unwrap_or_else(|_| panic!("wrk says {text}"));
        let milliseconds = |text: &str| match text.strip_suffix("us") {
            Some(micro) => number(micro) / 1e3,
            None if text.ends_with("ms") => number(&text[..text.len() - 2]),
            None => number(text.trim_end_matches('s')) * 1e3,
        };
        let requests = number(words(" requests in ")[0]);
        let refused = if text.contains("Non-2xx") { number(words("Non-2xx")[4]) } else { 0.0 };
        assert_eq!(
            refused,
            if self.present { 0.0 } else { requests },
            "{}: {text}",
            self.cache.name
        );
        assert!(
            !text.contains("Socket errors") || text.contains("connect 0, read 0, write 0"),
            "{text}"
        );
        let rate = number(words("Requests/sec:")[1]);
        [
            rate,
            milliseconds(words("  50%")[1]),
            milliseconds(words("  99%")[1]),
            cpu * 1e6 / requests,
        ]
    }
}
