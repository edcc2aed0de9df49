//! Real network configurations: IPv6 only, interfaces that appear and change, peers beyond the
//! broadcast domain, and a daemon bound to one address of several.

use crate::common::lan::Run;
use crate::common::{Daemon, Host, Lan, PORT, daemon, http, nix, packet, wait_for, world};
use std::net::{Ipv4Addr, SocketAddr};

/// Adds a host with an empty store.
fn host_with_store(lan: &Lan, name: &str) -> Host {
    let host = lan.host(name);
    nix::init_store(&host);
    host
}

fn hits(asker: &Host, mark: &str) -> bool {
    http::get_local(asker, &format!("/{}.narinfo", world::hash_part(mark)))
        .expect("peerix answers")
        .status
        == 200
}

/// Fetches the path with real Nix. The URL in the narinfo must lead to the holder's NAR.
fn fetches(asker: &Host, mark: &str) {
    asker.write(
        "/etc/nix/nix.conf",
        format!("substituters = http://127.0.0.1:{PORT}\nrequire-sigs = false\n"),
    );
    asker.cmd("nix-store").args(["--realise", mark]).okay();
    asker.cmd("nix-store").args(["--verify-path", mark]).okay();
}

#[test]
fn peers_with_only_link_local_ipv6_find_each_other() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    for host in [&holder, &asker] {
        host.net(&format!("ip addr del {}/24 dev eth0", host.address));
    }
    let flags = ["--bind", "[::]", "--bind", "127.0.0.1"];
    let _daemons = [Daemon::start(&holder, &flags), Daemon::start(&asker, &flags)];
    daemon::wait_until_known(&asker, &mark);
    fetches(&asker, &mark);
}

#[test]
fn network_that_appears_or_changes_after_start_is_used() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    let _holder = Daemon::start(&holder, &[]);
    asker.net("ip link set eth0 down");
    asker.net(&format!("ip addr del {}/24 dev eth0", asker.address));
    let _asker = Daemon::start(&asker, &[]);
    assert!(!hits(&asker, &mark));
    // The cable is plugged in.
    asker.net(&format!("ip addr add {}/24 dev eth0", asker.address));
    asker.net("ip link set eth0 up");
    daemon::wait_until_known(&asker, &mark);
    // Both move to another network. `ip addr add` sets no broadcast address.
    for (host, last) in [(&holder, 1), (&asker, 2)] {
        host.net(&format!("ip addr del {}/24 dev eth0", host.address));
        host.net(&format!("ip addr add 192.168.44.{last}/24 dev eth0"));
    }
    wait_for("they find one another again", || hits(&asker, &mark).then_some(()));
    fetches(&asker, &mark);
}

#[test]
fn named_peer_in_other_subnet_answers_if_it_names_asker() {
    let lan = Lan::new();
    let (holder, router, asker) =
        (lan.host("holder"), lan.host("router"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    for (host, subnet) in [(&holder, 1), (&asker, 2)] {
        host.net(&format!("ip addr del {}/24 dev eth0", host.address));
        host.net(&format!("ip addr add 172.20.{subnet}.1/24 dev eth0"));
        host.net(&format!("ip route add default via 172.20.{subnet}.254"));
        router.net(&format!("ip addr add 172.20.{subnet}.254/24 dev eth0"));
    }
    router.net_cmd("sh").args(["-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"]).okay();
    let named_holder = ["--peer", "172.20.1.1"];
    let asking = Daemon::start(&asker, &named_holder);
    {
        // The holder does not name the asker: it does not answer queries, and refuses HTTP with
        // 403.
        let _daemon = Daemon::start(&holder, &[]);
        assert!(!hits(&asker, &mark));
        let route = format!("/local/{}.narinfo", world::hash_part(&mark));
        let address = SocketAddr::from((Ipv4Addr::new(172, 20, 1, 1), PORT));
        assert_eq!(http::get(&asker, address, &route).expect("an answer").status, 403);
    }
    let _daemon = Daemon::start(&holder, &["--peer", "172.20.2.1:12304"]);
    daemon::wait_until_known(&asker, &mark);
    fetches(&asker, &mark);
    drop(asking);
}

#[test]
fn daemon_bound_to_one_address_answers_broadcasts() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    let address = holder.address.to_string();
    let _holder = Daemon::start(&holder, &["--bind", &address, "--bind", "127.0.0.1"]);
    let socket = asker.udp(PORT);
    socket.set_read_timeout(Some(crate::common::DEADLINE)).unwrap();
    let query =
        packet::Packet::Query { id: 7, hash_part: world::hash_part(&mark).to_owned() }.write();
    let mut answer = [0; 512];
    socket.send_to(&query, (Ipv4Addr::new(10, 77, 0, 255), PORT)).unwrap();
    loop {
        let (len, from) = socket.recv_from(&mut answer).expect("an answer to a broadcast");
        // Skips the hello that greets a newcomer.
        if answer[0] == 1 {
            assert_eq!(from.ip(), holder.address);
            assert_eq!(&answer[1..5], &7u32.to_be_bytes());
            assert!(len > 9);
            break;
        }
    }
    // The daemon does not listen on other addresses of the host.
    holder.net("ip addr add 10.77.0.99/24 dev eth0");
    assert!(asker.connect((Ipv4Addr::new(10, 77, 0, 99), PORT)).is_err());
}

#[test]
fn peer_that_says_bye_is_not_waited_for() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    let mut leaving = Daemon::start(&holder, &[]);
    let asking = Daemon::start(&asker, &[]);
    daemon::wait_until_known(&asker, &mark);
    assert!(leaving.stop().success());
    wait_for("bye is heard", || asking.log().contains(": bye").then_some(()));
    assert!(!hits(&asker, &mark));
    // After a restart it is found again.
    let _daemon = Daemon::start(&holder, &[]);
    daemon::wait_until_known(&asker, &mark);
}
