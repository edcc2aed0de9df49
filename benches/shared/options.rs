//! Command-line flags of a benchmark, and the description of the machine it runs on.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The parsed flags of a benchmark.
pub struct Options {
    /// How many times each contender is measured, 1 to 1,000.
    pub rounds: usize,
    /// Numbers of the workloads to run.
    pub only: Vec<u32>,
    name: String,
}

impl Options {
    /// Parses the command line; ends the program with status 2 if it is invalid. `name` is the
    /// default name of the result files. Workloads have the numbers 1 to `workloads`.
    pub fn read(name: &str, workloads: u32) -> Options {
        let rounds = std::env::var("PEERIX_BENCH_ROUNDS").unwrap_or_else(|_| "5".into());
        let usage = |what: &str| -> ! {
            let all: Vec<String> = (1..=workloads).map(|number| number.to_string()).collect();
            eprintln!("{what}: --rounds N, --name NAME, --only {}", all.join(","));
            std::process::exit(2)
        };
        let number = |text: &str, most| text.parse::<u32>().ok().filter(|n| (1..=most).contains(n));
        let mut options =
            Options { rounds: 0, only: (1..=workloads).collect(), name: name.to_owned() };
        let mut set = |flag: &str, value: &str| match flag {
            "--rounds" => {
                options.rounds =
                    number(value, 1000).unwrap_or_else(|| usage(value)).try_into().expect("small");
            }
            "--name" => options.name = value.to_owned(),
            "--only" => {
                let numbers = value
                    .split(',')
                    .map(|text| number(text, workloads).unwrap_or_else(|| usage(text)));
                options.only = numbers.collect();
            }
            _ => usage(flag),
        };
        set("--rounds", &rounds);
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            // cargo passes `--bench`.
            if argument != "--bench" {
                let value = arguments.next().unwrap_or_else(|| usage(&argument));
                set(&argument, &value);
            }
        }
        options
    }

    /// Writes a result file with extension `kind`, and returns its path.
    pub fn save(&self, kind: &str, text: &str) -> PathBuf {
        let results: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("bench/results");
        std::fs::create_dir_all(&results).expect("a directory for results");
        let file = results.join(format!("{}.{kind}", self.name));
        std::fs::write(&file, text).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        file
    }

    /// Describes the machine and the rounds in words.
    pub fn machine(&self) -> String {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let info = read("/proc/cpuinfo");
        let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let model = model.map_or("", |(_, model)| model);
        let kernel = read("/proc/sys/kernel/osrelease");
        let load = read("/proc/loadavg");
        let load = load.split(' ').next().unwrap_or_default();
        let nix = Command::new("nix-store").arg("--version").output();
        let nix = nix
            .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
            .unwrap_or_default();
        format!(
            "{cores} cores ({model}), Linux {}, {nix}, load {load} at the start. Medians of {} rounds, in brackets the \
             least and the most; contenders take turns.",
            kernel.trim(),
            self.rounds
        )
    }
}
