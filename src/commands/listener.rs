//! Whose the port is. While the daemon is down any user may listen there, and would be asked which
//! files to open and which addresses to fetch, by root as a rule.
//!
//! The rule: root believes root, to whom the sockets of systemd's socket units belong too, whoever
//! runs behind them. Other users risk what is theirs, and believe everybody.

use std::fs::File;
use std::io::Read;

/// As much of the kernel's tables as is read. Listening sockets come first, with 150 bytes each.
const MAX_TABLE: u64 = 1 << 20;

/// The user, other than root, who listens on `port` of this machine, if this is root.
pub fn stranger(port: u16) -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().find_map(|name| {
        let mut table = String::new();
        File::open(name).ok()?.take(MAX_TABLE).read_to_string(&mut table).ok()?;
        owners(&table, port).find(|uid| *uid != 0)
    })
}

/// Who listens on `port`, by a table as `/proc/net/tcp` is.
fn owners(table: &str, port: u16) -> impl Iterator<Item = u32> {
    let local = format!(":{port:04X}");
    // `0: 0100007F:3010 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 …`: the state
    // is listening, and the user.
    table.lines().filter_map(move |line| {
        let fields: Vec<&str> = line.split_whitespace().take(8).collect();
        let [_, address, _, "0A", _, _, _, uid] = fields[..] else { return None };
        if address.ends_with(&local) { uid.parse().ok() } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn who_listens_is_read_from_the_kernels_tables() {
        for (name, address) in [("/proc/net/tcp", "127.0.0.1:0"), ("/proc/net/tcp6", "[::1]:0")] {
            let Ok(listener) = TcpListener::bind(address) else { continue };
            let port = listener.local_addr().unwrap().port();
            let table = std::fs::read_to_string(name).unwrap();
            assert_eq!(
                owners(&table, port).collect::<Vec<_>>(),
                [rustix::process::geteuid().as_raw()]
            );
            assert_eq!(owners(&table, 0).count(), 0);
        }
    }
}
