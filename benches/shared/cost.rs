//! CPU time, memory, wake-ups and connections of processes, as the kernel counts them.

use std::fs;
use std::time::Instant;

const GIB: f64 = (1u64 << 30) as f64;

/// CPU seconds that a process and its living children have used.
pub fn cpu(pid: u32) -> f64 {
    let own: f64 = times(&format!("/proc/{pid}/stat"))[..2].iter().sum();
    own + children(pid).into_iter().map(cpu).sum::<f64>()
}

/// Nanoseconds that the threads of a process have spent on a processor.
pub fn nanoseconds(pid: u32) -> u64 {
    of_threads(pid, "schedstat", |text| text.split(' ').next()?.parse().ok())
}

/// Number of voluntary context switches of a process: how often its threads went to sleep.
pub fn wake_ups(pid: u32) -> u64 {
    of_threads(pid, "status", |text| {
        let count = text.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"))?;
        count.trim().parse().ok()
    })
}

/// Sum over all threads of the number that `read` finds in `/proc/<pid>/task/<tid>/<file>`.
fn of_threads(pid: u32, file: &str, read: impl Fn(&str) -> Option<u64>) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    let text = |thread: fs::DirEntry| fs::read_to_string(thread.path().join(file)).ok();
    threads.flatten().filter_map(text).map(|text| read(&text).expect("Linux tells it")).sum()
}

/// CPU seconds that several processes and their living children have used.
pub fn cpu_of(pids: &[u32]) -> f64 {
    pids.iter().copied().map(cpu).sum()
}

/// CPU seconds of the ended children that this process has waited for.
pub fn cpu_of_ended() -> f64 {
    times("/proc/self/stat")[2..].iter().sum()
}

/// Returns GB/s and CPU seconds per GiB.
pub fn rates(bytes: u64, began: Instant, cpu: f64) -> (f64, f64) {
    (bytes as f64 / began.elapsed().as_secs_f64() / 1e9, cpu / (bytes as f64 / GIB))
}

/// MiB in the named line of `/proc/<pid>/status`, for one process.
pub fn memory(pid: u32, line: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let value =
        text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(':')).expect("Linux tells it");
    value.trim().trim_end_matches(" kB").parse::<f64>().expect("a number") / 1024.0
}

/// MiB in the named line of `/proc/<pid>/status`, for a process and its descendants. Shared pages
/// count once per process.
pub fn memory_of_all(pid: u32, line: &str) -> f64 {
    memory(pid, line)
        + children(pid).into_iter().map(|child| memory_of_all(child, line)).sum::<f64>()
}

/// Number of TCP connections to a local port in the network namespace of a process. Counts also
/// those that only the client has closed.
pub fn connections(pid: u32, port: u16) -> usize {
    let read =
        |table| fs::read_to_string(format!("/proc/{pid}/net/{table}")).expect("the process runs");
    let port = format!(":{port:04X}");
    let open = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next().is_some_and(|local| local.ends_with(&port));
        // 01 is ESTABLISHED and 08 is CLOSE_WAIT (include/net/tcp_states.h).
        local && words.nth(1).is_some_and(|state| state == "01" || state == "08")
    };
    [read("tcp"), read("tcp6")].iter().map(|table| table.lines().filter(open).count()).sum()
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().filter_map(|child| child.parse().ok()).collect()
}

/// User and system time of a process, then of the children it has waited for, in seconds.
fn times(stat: &str) -> [f64; 4] {
    let text = fs::read_to_string(stat).expect("the process runs");
    let fields = text.rsplit_once(") ").expect("the name is in parentheses").1;
    let mut ticks = fields.split(' ').skip(11).map(|field| field.parse::<f64>().expect("a number"));
    // USER_HZ is 100 on every Linux platform that Nix supports.
    std::array::from_fn(|_| ticks.next().expect("four times") / 100.0)
}
