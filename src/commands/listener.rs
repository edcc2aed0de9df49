//! Checks which user listens on the daemon's port. While the daemon is down, any user may listen
//! there. A command trusts the answers: they tell it which files to open and which URLs to request,
//! usually as root.
//!
//! Root trusts only sockets that root owns; systemd creates the sockets of its units as root,
//! whichever user the service has. Other users trust every listener, because they risk only their
//! own files.

use std::fs::File;
use std::io::Read;

/// Maximum size that is read of each kernel table, in bytes; the rest is ignored. Listening sockets
/// come first, with 150 bytes each.
const MAX_TABLE_BYTES: u64 = 1 << 20;

/// Returns the user ID of a listener on `port` that does not belong to root. `None` if there is
/// none, or if this process does not run as root.
pub fn foreign_listener_uid(port: u16) -> Option<u32> {
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    ["/proc/net/tcp", "/proc/net/tcp6"].into_iter().find_map(|name| {
        let mut table = String::new();
        File::open(name).ok()?.take(MAX_TABLE_BYTES).read_to_string(&mut table).ok()?;
        owners(&table, port).find(|uid| *uid != 0)
    })
}

/// User IDs of the listeners on `port` in `table`, which has the format of `/proc/net/tcp` (man
/// page proc_pid_net(5)).
fn owners(table: &str, port: u16) -> impl Iterator<Item = u32> {
    let local = format!(":{port:04X}");
    // `0: 0100007F:3010 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1000 …`: the fourth
    // field is the state, 0A for listening, and the eighth is the user ID.
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
    fn owner_of_a_listener_is_read_from_the_kernel_tables() {
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
