//! Which networks peerix uses: those of `--lan` and `--interface`, and none of containers.

use crate::common::lan::{PATIENCE, Run};
use crate::common::packet::Packet;
use crate::common::{
    Asker, Bystander, DEADLINE, Daemon, Holder, Host, Lan, PORT, Scale, Wan, World, daemon, http,
    nix, stock, wait_for, world,
};
use peerix::network::neighbours::{self, NeighbourState};
use peerix::network::{ChangeMonitor, NetworkPolicy, NetworkWatcher, Networks};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::sync::Arc;
use std::time::Instant;

const BIND_BOTH: [&str; 4] = ["--bind", "0.0.0.0", "--bind", "[::]"];

fn host_with_store(lan: &Lan, name: &str) -> Host {
    let host = lan.host(name);
    nix::init_store(&host);
    host
}

/// Fetches `mark` by Nix on `asker`, narinfo and NAR.
fn fetches(asker: &Host, mark: &str) {
    let conf = format!("substituters = http://127.0.0.1:{PORT}\nrequire-sigs = false\n");
    asker.write("/etc/nix/nix.conf", conf);
    asker.cmd("nix-store").args(["--realise", mark]).okay();
    asker.cmd("nix-store").args(["--verify-path", mark]).okay();
}

/// Requests the narinfo of `path` from the node at `to`, and returns the status.
fn narinfo_status(from: &Host, to: impl Into<SocketAddr>, path: &str) -> u16 {
    let route = format!("/local/{}.narinfo", world::hash_part(path));
    http::get(from, to.into(), &route).expect("peerix answers").status
}

fn v4(a: u8, b: u8, c: u8, d: u8) -> SocketAddr {
    (Ipv4Addr::new(a, b, c, d), PORT).into()
}

/// Replaces the address of `host` on eth0.
fn readdress(host: &Host, address: &str) {
    host.net(&format!("ip addr del {}/24 dev eth0", host.address));
    host.net(&format!("ip addr add {address} brd + dev eth0"));
}

/// Joins hosts by a second network. Each host gets an interface with this name and address.
fn join(hosts: &[(&Host, &str, &str)]) {
    hosts[0].0.switch("ip link add second type bridge mcast_snooping 0");
    hosts[0].0.switch("ip link set second up");
    for (host, name, address) in hosts {
        // `host.path` begins with /proc/PID/root.
        let root = host.path("/");
        let pid = root.iter().nth(2).and_then(|pid| pid.to_str()).expect("a process id");
        host.switch(&format!("ip link add {{port}}b type veth peer name {name} netns {pid}"));
        host.switch("ip link set {port}b master second up");
        host.net(&format!("ip addr add {address} brd + dev {name}"));
        host.net(&format!("ip link set {name} up"));
    }
}

/// Waits until an interface has a usable link-local IPv6 address, and returns it.
fn link_local(host: &Host, interface: &str) -> Ipv6Addr {
    wait_for("a link-local address", || {
        let show = ["-6", "-o", "addr", "show", "dev", interface, "scope", "link"];
        // A tentative address is not usable yet.
        let text = Some(host.net_cmd("ip").args(show).okay())
            .filter(|text| !text.contains("tentative"))?;
        let address = text.split_whitespace().find(|word| word.starts_with("fe80:"))?;
        address.split('/').next()?.parse().ok()
    })
}

/// Index of an interface.
fn index(host: &Host, interface: &str) -> u32 {
    let text = host.net_cmd("ip").args(["-o", "link", "show", "dev", interface]).okay();
    text.split(':').next().and_then(|index| index.trim().parse().ok()).expect("a number")
}

/// Sockets for both address families that send queries for one path.
struct Asking {
    sockets: Vec<UdpSocket>,
    query: Vec<u8>,
}

impl Asking {
    fn from(host: &Host, path: &str) -> Asking {
        let bind = |ip: IpAddr| host.in_net(|| UdpSocket::bind((ip, 0)).expect("a free port"));
        let sockets = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()].map(bind);
        for socket in &sockets {
            socket.set_read_timeout(Some(DEADLINE)).unwrap();
        }
        sockets[0].set_broadcast(true).unwrap();
        let query = Packet::Query { id: 7, hash_part: world::hash_part(path).to_owned() }.write();
        Asking { sockets: sockets.into(), query }
    }

    fn socket(&self, target: &SocketAddr) -> &UdpSocket {
        &self.sockets[usize::from(target.is_ipv6())]
    }

    fn send(&self, target: SocketAddr) {
        // An interface that has just come up lacks an IPv6 address for a moment.
        wait_for("a way to the target", || self.socket(&target).send_to(&self.query, target).ok());
    }

    /// Sends a query and waits until the node at `target` answers *have*.
    fn answers(&self, target: SocketAddr) {
        self.send(target);
        let mut buffer = [0; 512];
        loop {
            let (len, from) = self.socket(&target).recv_from(&mut buffer).expect("an answer");
            let packet = Packet::read(&buffer[..len]);
            if from.ip() == target.ip() && matches!(packet, Some(Packet::Have { id: 7, .. })) {
                return;
            }
        }
    }

    /// Panics if a datagram has arrived.
    fn heard_nothing(&self) {
        for socket in &self.sockets {
            socket.set_nonblocking(true).unwrap();
            if let Ok((len, from)) = socket.recv_from(&mut [0; 512]) {
                panic!("{len} bytes came from {from}");
            }
        }
    }
}

/// Counts the datagrams that a host sends to peerix's port, by outgoing interface.
struct Counters<'a>(&'a Host);

impl Counters<'_> {
    fn start(host: &Host) -> Counters<'_> {
        for program in ["iptables", "ip6tables"] {
            for way in [&["-o", "eth0"][..], &["!", "-o", "eth0"]] {
                let rule = ["-w", "-A", "OUTPUT", "-p", "udp", "--dport", "12304"];
                host.net_cmd(program).args(rule).args(way).okay();
            }
        }
        Counters(host)
    }

    /// Datagrams through eth0 and through all other interfaces, for IPv4 and then IPv6.
    fn read(&self) -> [[u64; 2]; 2] {
        ["iptables-save", "ip6tables-save"].map(|program| {
            let text = self.0.net_cmd(program).arg("-c").okay();
            ["-A OUTPUT -o eth0 ", "-A OUTPUT ! -o eth0 "].map(|rule| {
                let line = text.lines().find(|line| line.contains(rule)).expect("the rule");
                let count = line.strip_prefix('[').and_then(|line| line.split(':').next());
                count.and_then(|count| count.parse().ok()).expect("a count")
            })
        })
    }
}

/// Names that programs for containers and virtual machines give to interfaces.
fn container_interfaces() -> Vec<String> {
    let names = "docker0 docker_gwbridge cni0 cni-podman0 podman1 lxcbr0 lxdbr0 virbr0 virbr1 \
                 vmnet1 vmnet8 vboxnet0 veth12ab34c";
    let mut names: Vec<String> = names.split_whitespace().map(str::to_owned).collect();
    names.extend((names.len()..40).map(|number| format!("br-{number:012x}")));
    names
}

/// Adds 40 such interfaces to a host and returns their names after all of them can send.
fn add_container_interfaces(host: &Host) -> Vec<String> {
    let names = container_interfaces();
    assert_eq!(names.len(), 40);
    let mut script = String::new();
    for (name, number) in names.iter().zip(1..) {
        // A bridge is up only with a port whose link is up.
        let (port, far) = (format!("veth{number}a"), format!("veth{number}b"));
        script += &format!(
            "ip link add {name} type bridge; ip addr add 172.20.{number}.1/24 brd + dev {name}
             ip link add {port} type veth peer name {far}; ip link set {port} master {name} up
             ip link set {far} up; ip link set {name} up\n"
        );
    }
    host.net_cmd("sh").args(["-ec", &script]).okay();
    for name in &names {
        link_local(host, name);
    }
    names
}

#[test]
fn container_interface_changes_hide_no_path() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let holder = Holder::new(&lan, &world, "holder");
    let mut neighbour = Bystander::new(&lan, "neighbour");
    let asker = Asker::new(&lan, &world, &[&holder]);
    let names = add_container_interfaces(&asker.host);
    daemon::wait_until_live(&asker.host, 2);
    let counters = Counters::start(&asker.host);
    asker.fetch_closure_during(&world, || {
        for (name, number) in names[..20].iter().zip(60..) {
            asker.host.net(&format!("ip link del {name}"));
            asker.host.net(&format!("ip link add {name} type bridge"));
            asker.host.net(&format!("ip addr add 172.20.{number}.1/24 brd + dev {name}"));
        }
        neighbour.vanish();
    });
    let [[_, v4_elsewhere], [_, v6_elsewhere]] = counters.read();
    assert_eq!((v4_elsewhere, v6_elsewhere), (0, 0));
}

#[test]
fn container_networks_get_no_datagram() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    add_container_interfaces(&asker);
    let counters = Counters::start(&asker);
    let _holder = Daemon::start(&holder, &BIND_BOTH);
    let mut asking = Daemon::start(&asker, &BIND_BOTH);
    daemon::wait_until_known(&asker, &mark);
    let absent = format!("/nix/store/{}-absent", "0".repeat(32));
    assert_eq!(daemon::narinfo_status(&asker, &absent), 404);
    // A change of the network triggers another hello; a stop triggers a bye.
    let [[before, _], _] = counters.read();
    asker.net("ip addr add 10.77.0.200/24 dev eth0");
    wait_for("hello after a change", || (counters.read()[0][0] > before).then_some(()));
    assert!(asking.stop().success());
    let [[v4, v4_elsewhere], [v6, v6_elsewhere]] = counters.read();
    assert!(v4 > 2 && v6 > 2, "{v4} and {v6} datagrams");
    assert_eq!((v4_elsewhere, v6_elsewhere), (0, 0));

    // Control: the counters see datagrams to a container's interface.
    let flags = [&BIND_BOTH[..], &["--interface", "docker0"]].concat();
    let _asking = Daemon::start(&asker, &flags);
    wait_for("hello to a named interface", || {
        let [[v4_now, v4_elsewhere], [v6_now, v6_elsewhere]] = counters.read();
        assert_eq!((v4_now, v6_now), (v4, v6), "nothing to eth0");
        (v4_elsewhere > 0 && v6_elsewhere > 0).then_some(())
    });
}

#[test]
fn public_network_named_by_flag_is_lan() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    readdress(&holder, "203.0.113.1/24");
    readdress(&asker, "203.0.113.2/24");
    // Without IPv6: link-local addresses always belong to the LAN.
    asker.net("ip -6 addr flush dev eth0");
    let at = v4(203, 0, 113, 1);
    {
        let daemons = [Daemon::start(&holder, &[]), Daemon::start(&asker, &[])];
        assert_eq!(daemon::narinfo_status(&asker, &mark), 404);
        assert_eq!(narinfo_status(&asker, at, &mark), 403);
        let status = http::get_local(&asker, "/status.json").expect("peerix answers").text();
        assert!(status.contains("--lan names networks"), "{status}");
        drop(daemons);
    }
    let flags = ["--lan", "203.0.113.0/24"];
    let _daemons = [Daemon::start(&holder, &flags), Daemon::start(&asker, &flags)];
    daemon::wait_until_known(&asker, &mark);
    fetches(&asker, &mark);
    assert_eq!(narinfo_status(&asker, at, &mark), 200);
    // An address outside the named network is still a stranger's.
    asker.net("ip addr add 203.0.114.2/24 dev eth0");
    holder.net("ip addr add 203.0.114.1/24 dev eth0");
    assert_eq!(narinfo_status(&asker, v4(203, 0, 114, 1), &mark), 403);
}

#[test]
fn vanished_neighbour_on_named_public_network_hides_no_path() {
    let wan = Wan::new().with_scale(Scale::timeouts(PATIENCE));
    let lan = wan.lan([203, 0, 113]);
    let world = World::on(&lan);
    let flags = || vec!["--lan".to_owned(), "203.0.113.0/24".to_owned()];
    let holder = Holder::with(&lan, &world, "holder", |host| {
        world.sign(host);
        flags()
    });
    let host = lan.host("neighbour");
    stock::ready(&host);
    let daemon = Daemon::start(&host, &["--lan", "203.0.113.0/24"]);
    let mut neighbour = Bystander { daemon, host };
    let asker = Asker::flagged(&lan, "", &[&world.cache_key], |_| flags());
    asker.meet(&[&holder]);
    daemon::wait_until_live(&asker.host, 2);
    asker.fetch_closure_during(&world, || neighbour.vanish());
}

#[test]
fn vanished_holder_on_small_network_is_replaced_by_one_on_large() {
    let lan = Lan::patient();
    let world = World::on(&lan);
    let mut near = Holder::new(&lan, &world, "near");
    let host = lan.host("asker");
    let far = Holder::with(&lan, &world, "far", |far| {
        join(&[(&host, "eth1", "172.20.1.1/16"), (far, "eth1", "172.20.200.2/16")]);
        far.net("ip link set eth0 down");
        world.sign(far);
        vec![]
    });
    let asker = Asker::on(host, "", &[&world.cache_key], |_| vec![]);
    asker.meet(&[&near, &far]);
    asker.fetch_closure_during(&world, || {
        near.host.unplug();
        near.daemon.kill();
    });
}

#[test]
fn routed_network_named_by_flag_is_lan() {
    let wan = Wan::new();
    let (here, there) = (wan.lan([172, 20, 1]), wan.lan([100, 64, 2]));
    let (holder, asker) = (here.host("holder"), host_with_store(&there, "asker"));
    let mark = daemon::add_unique_path(&holder);
    let named = holder.address.to_string();
    let _asking = Daemon::start(&asker, &["--peer", &named]);
    {
        let _daemon = Daemon::start(&holder, &[]);
        assert_eq!(narinfo_status(&asker, (holder.address, PORT), &mark), 403);
        assert_eq!(daemon::narinfo_status(&asker, &mark), 404);
    }
    let _daemon = Daemon::start(&holder, &["--lan", "100.64.0.0/10"]);
    daemon::wait_until_known(&asker, &mark);
    fetches(&asker, &mark);
}

#[test]
fn small_and_large_networks_are_both_lan() {
    let lan = Lan::new();
    let (near, far) = (lan.host("near"), lan.host("far"));
    let asker = host_with_store(&lan, "asker");
    let marks = [daemon::add_unique_path(&near), daemon::add_unique_path(&far)];
    join(&[(&asker, "eth1", "172.20.1.1/16"), (&far, "eth1", "172.20.200.2/16")]);
    far.net("ip link set eth0 down");
    let _daemons = [&near, &far, &asker].map(|host| Daemon::start(host, &[]));
    for mark in &marks {
        daemon::wait_until_known(&asker, mark);
        fetches(&asker, mark);
    }
}

#[test]
fn interface_not_named_by_flag_is_unused() {
    let lan = Lan::new();
    let (holder, asker) = (lan.host("holder"), host_with_store(&lan, "asker"));
    let mark = daemon::add_unique_path(&holder);
    join(&[(&holder, "eth1", "172.20.1.1/24"), (&asker, "eth1", "172.20.1.2/24")]);
    let (used, unused) = (v4(172, 20, 1, 1), SocketAddr::from((holder.address, PORT)));
    let listening = asker.udp(PORT);
    listening.set_read_timeout(Some(DEADLINE)).unwrap();
    let serving = Daemon::start(&holder, &["--interface", "eth1", "--lan", "10.77.0.0/24"]);
    // Broadcasts go out in the order of the interfaces, so one to eth0 would arrive first.
    let mut senders = Vec::new();
    while !senders.contains(&used) {
        let (_, from) = listening.recv_from(&mut [0; 512]).expect("hello");
        senders.push(from);
    }
    assert_eq!(senders, [used]);
    drop(listening);

    let strange = Asking::from(&asker, &mark);
    strange.send(unused);
    strange.send((lan.address(255), PORT).into());
    Asking::from(&asker, &mark).answers(used);
    // The node received these queries before the one that it answered.
    strange.heard_nothing();
    assert_eq!(narinfo_status(&asker, unused, &mark), 403);
    assert_eq!(narinfo_status(&asker, used, &mark), 200);

    let log = serving.log();
    assert!(log.contains("info: LAN: 172.20.1.1/24 on eth1"), "{log}");
    assert!(log.contains("warn: --lan 10.77.0.0/24: is on eth0, which is excluded"), "{log}");

    // Nodes find each other only if they use a common network.
    let asking = Daemon::start(&asker, &["--interface", "!eth1"]);
    assert_eq!(daemon::narinfo_status(&asker, &mark), 404);
    drop(asking);
    let _asking = Daemon::start(&asker, &["--interface", "eth?"]);
    daemon::wait_until_known(&asker, &mark);
    fetches(&asker, &mark);
}

#[test]
fn excluded_interface_gets_no_answer() {
    let lan = Lan::new();
    let (holder, neighbour) = (lan.host("holder"), lan.host("neighbour"));
    let container = lan.host("container");
    nix::init_store(&holder);
    let mark = daemon::add_unique_path(&holder);
    join(&[(&holder, "docker0", "172.17.0.1/16"), (&container, "eth1", "172.17.0.2/16")]);
    container.net("ip link set eth0 down");
    let v6 = |ip, host, interface| SocketAddrV6::new(ip, PORT, 0, index(host, interface)).into();
    let group = "ff02::7065:6572".parse().unwrap();
    let docker0 = link_local(&holder, "docker0");
    let inside: [SocketAddr; 2] = [v4(172, 17, 0, 1), v6(docker0, &container, "eth1")];
    let everybody: [SocketAddr; 2] = [v4(172, 17, 255, 255), v6(group, &container, "eth1")];
    let eth0 = link_local(&holder, "eth0");
    let outside: [SocketAddr; 2] = [(holder.address, PORT).into(), v6(eth0, &neighbour, "eth0")];
    {
        let _daemon = Daemon::start(&holder, &BIND_BOTH);
        let strange = Asking::from(&container, &mark);
        for target in inside.iter().chain(&everybody) {
            strange.send(*target);
        }
        for target in outside {
            Asking::from(&neighbour, &mark).answers(target);
            assert_eq!(narinfo_status(&neighbour, target, &mark), 200, "{target}");
        }
        // The container's queries arrived before the neighbour's, which has its answer.
        strange.heard_nothing();
        for target in inside {
            assert_eq!(narinfo_status(&container, target, &mark), 403, "{target}");
        }
        // Another address of the same machine does not help the container either.
        container.net("ip route add default via 172.17.0.1");
        assert_eq!(narinfo_status(&container, outside[0], &mark), 403);
    }
    let flags = [&BIND_BOTH[..], &["--interface", "docker0"]].concat();
    let _daemon = Daemon::start(&holder, &flags);
    for target in inside {
        Asking::from(&container, &mark).answers(target);
        assert_eq!(narinfo_status(&container, target, &mark), 200, "{target}");
    }
    for target in outside {
        assert_eq!(narinfo_status(&neighbour, target, &mark), 403, "{target}");
    }
}

/// Waits until the kernel reports a change, for at most [`DEADLINE`].
fn wait_for_news(monitor: &ChangeMonitor, what: &str) {
    let timeout = Timespec::try_from(DEADLINE).unwrap();
    let ready = poll(&mut [PollFd::new(monitor, PollFlags::IN)], Some(&timeout)).unwrap();
    assert_eq!(ready, 1, "{what}: no news within {DEADLINE:?}");
}

#[test]
fn change_monitor_reports_link_and_address_changes() {
    let lan = Lan::new();
    let host = lan.host("host");
    // The last change that the kernel makes by itself.
    link_local(&host, "eth0");
    let monitor = host.in_net(|| ChangeMonitor::open().expect("a netlink socket"));
    // Discards reports of the link that has just come up.
    monitor.drain();
    for change in [
        "ip addr add 10.77.0.99/24 dev eth0",
        "ip addr del 10.77.0.99/24 dev eth0",
        "ip -6 addr add fd00::1/64 dev eth0 nodad",
        "ip -6 addr del fd00::1/64 dev eth0",
        "ip link add docker0 type bridge",
        "ip link set docker0 name docker1",
        "ip link del docker1",
        "ip link set eth0 down",
        "ip link set eth0 up",
    ] {
        host.net(change);
        wait_for_news(&monitor, change);
        assert!(monitor.drain(), "{change}");
    }
}

#[test]
fn lost_kernel_reports_count_as_change() {
    let lan = Lan::new();
    let host = lan.host("host");
    link_local(&host, "eth0");
    let networks = Arc::new(host.in_net(|| Networks::new(NetworkPolicy::default(), Vec::new())));
    let (monitor, mut watcher) = host.in_net(|| {
        let watcher = NetworkWatcher::new(networks.clone(), Instant::now());
        (ChangeMonitor::open().expect("a netlink socket"), watcher)
    });
    assert!(networks.is_lan((lan.address(9), PORT).into()), "read when it began to watch");
    // The socket's buffer holds fewer than 2,000 reports.
    let add_and_remove = "addr add 10.9.9.9/24 dev eth0\naddr del 10.9.9.9/24 dev eth0\n";
    host.write("/tmp/batch", add_and_remove.repeat(1000) + "addr add 10.8.8.8/24 dev eth0\n");
    let batch = host.path("/tmp/batch");
    host.net_cmd("ip").arg("-batch").arg(batch).okay();
    assert!(monitor.drain());
    assert!(!monitor.drain());
    assert!(host.in_net(|| watcher.update(false, Instant::now())));
    assert!(networks.is_lan(v4(10, 8, 8, 1)) && !networks.is_lan(v4(10, 9, 9, 1)));
    assert!(!host.in_net(|| watcher.update(false, Instant::now())), "a change is told once");
}

#[test]
fn reachable_neighbours_of_kernel_are_listed() {
    let lan = Lan::new();
    let (host, other) = (lan.host("host"), lan.host("other"));
    let v6 = SocketAddrV6::new(link_local(&other, "eth0"), 9, 0, index(&host, "eth0"));
    link_local(&host, "eth0");
    for target in [SocketAddr::from((other.address, 9)), v6.into()] {
        let refused = host.connect(target).expect_err("nobody listens there");
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    let nobody = SocketAddr::from((lan.address(77), 9));
    host.udp(9).send_to(b"x", nobody).unwrap();
    let entries = host.in_net(|| neighbours::read().expect("the tables"));
    let state_of = |ip: IpAddr| {
        let mut found = entries.iter().filter(|entry| entry.ip == ip);
        let entry = found.next().unwrap_or_else(|| panic!("no {ip} in {entries:?}"));
        assert_eq!(entry.interface, index(&host, "eth0"));
        assert!(found.next().is_none());
        entry.state
    };
    assert_eq!(state_of(other.address.into()), NeighbourState::Reachable);
    assert!(
        [NeighbourState::Reachable, NeighbourState::Stale, NeighbourState::Delay]
            .contains(&state_of((*v6.ip()).into()))
    );
    assert!(entries.iter().all(|entry| entry.ip != nobody.ip()), "{entries:?}");
}
