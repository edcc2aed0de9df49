//! `--map-port` with a real router: nftables and miniupnpd, NAT-PMP and PCP.

use crate::common::daemon::{self, add_unique_path};
use crate::common::friend::{STATE, TlsConnection, friend, key, wait_until_reached};
use crate::common::http::get;
use crate::common::lan::Run;
use crate::common::stock::{self, narinfo_route};
use crate::common::{Daemon, Host, Nat, Scale, Tracker, Wan, directory, nix, wait_for};
use peerix::wire::tracker::Identity;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};

/// nftables chains into which miniupnpd writes its rules.
const CHAINS: &str = "
table inet filter {
  chain forward { type filter hook forward priority 0; policy accept; jump miniupnpd;
    meta nfproto ipv6 iifname \"eth0\" ct state new reject with tcp reset; }
  chain miniupnpd { }
  chain prerouting { type nat hook prerouting priority -100; jump prerouting_miniupnpd; }
  chain prerouting_miniupnpd { }
  chain postrouting { type nat hook postrouting priority 100; jump postrouting_miniupnpd; }
  chain postrouting_miniupnpd { }
}";

/// Configuration of miniupnpd.
const CONFIGURATION: &str = "ext_ifname=eth0
listening_ip=inside
enable_natpmp=yes
enable_upnp=no
secure_mode=yes
uuid=7ac0bdb4-3c0d-4a3a-9d2d-3b1f5a1f0001
min_lifetime=120
max_lifetime=86400
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
allow 1024-65535 192.168.0.0/16 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
";

/// A running miniupnpd on a router.
struct Mapper {
    process: Child,
    dir: PathBuf,
}

impl Mapper {
    fn start(router: &Host, name: &str) -> Mapper {
        let dir = directory().join(format!("miniupnpd-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let _ = router.net_cmd("nft").args(["delete", "table", "inet", "filter"]).ran();
        std::fs::write(dir.join("chains"), CHAINS).unwrap();
        router.net_cmd("nft").arg("-f").arg(dir.join("chains")).okay();
        std::fs::write(dir.join("conf"), CONFIGURATION).unwrap();
        let log = std::fs::File::create(dir.join("log")).unwrap();
        let mut command = router.net_cmd("miniupnpd");
        command.arg("-d").arg("-f").arg(dir.join("conf")).arg("-P").arg(dir.join("pid"));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mapper = Mapper { process: command.spawn().expect("miniupnpd starts"), dir };
        wait_for("miniupnpd listens", || {
            mapper.log().contains("Listening for NAT-PMP/PCP").then_some(())
        });
        mapper
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }

    /// Restarts miniupnpd without its mappings, as after a power failure of the router.
    fn restart(self, router: &Host, name: &str) -> Mapper {
        drop(self);
        Mapper::start(router, name)
    }
}

impl Drop for Mapper {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Two homes behind routers, one of which maps ports, and hosts outside.
struct Scene {
    home: Host,
    laptop: Host,
    stranger: Host,
    /// A host on the outer network of the home's router.
    next_door: Host,
    inside: Nat,
    tracker: Tracker,
    path: String,
    _cafe: Nat,
}

impl Scene {
    fn new() -> Scene {
        let wan = Wan::new().with_scale(Scale::intervals(0.1));
        // miniupnpd rejects outer addresses from the ranges reserved for documentation.
        let (here, there) = (wan.lan([5, 5, 5]), wan.lan([5, 5, 6]));
        let (inside, cafe) = (Nat::new(&here, [192, 168, 1]), Nat::new(&there, [192, 168, 7]));
        let (home, laptop) = (inside.lan.host("home"), cafe.lan.host("laptop"));
        let (stranger, next_door) = (there.host("stranger"), here.host("next-door"));
        [&home, &laptop].into_iter().for_each(|host| nix::configure_client(host, "", &[]));
        stock::ready(&stranger);
        let tracker = Tracker::start(there.host("tracker"));
        let path = add_unique_path(&home);
        Scene { home, laptop, stranger, next_door, inside, tracker, path, _cafe: cafe }
    }

    fn start(&self, host: &Host, other: &Host, more: &[&str]) -> Daemon {
        let (url, friend) = (self.tracker.url(), friend(other, None));
        let flags = [
            "--state-dir",
            STATE,
            "--share",
            "friends",
            "--tracker-url",
            &url,
            "--friend",
            &friend,
        ];
        Daemon::start(host, &[&flags, more].concat())
    }
}

/// Waits until the peerix on a host reports a mapped port, and returns the outer address.
fn wait_until_mapped(host: &Host) -> SocketAddr {
    wait_for("a port is mapped", || {
        daemon::status(host)["port_mapping"]["outside"].as_str().map(|at| at.parse().unwrap())
    })
}

#[test]
fn mapped_home_is_reached_only_by_its_friend() {
    let scene = Scene::new();
    let mapper = Mapper::start(&scene.inside.router, "maps");
    let mut home = scene.start(&scene.home, &scene.laptop, &["--map-port"]);
    let _laptop = scene.start(&scene.laptop, &scene.home, &["--map-port"]);
    let outside = wait_until_mapped(&scene.home);
    assert_eq!(outside.ip(), scene.inside.address());
    let reached = wait_until_reached(&scene.laptop, "home", true);
    assert_eq!(
        (reached["found_by"].as_str(), reached["address"].as_str()),
        (Some("tracker"), Some(&*outside.to_string()))
    );
    nix::realise_quietly(&scene.laptop, &[&scene.path]);

    // The daemon closes a stranger's connection, even if the router masquerades it as a LAN
    // address.
    for _ in 0..2 {
        let got = get(&scene.stranger, outside, &narinfo_route(&scene.path));
        assert!(got.is_err(), "a stranger was answered: {got:?}");
        scene.inside.router.net("iptables -t nat -A POSTROUTING -o inside -j MASQUERADE");
    }

    // The router loses all mappings and announces its restart.
    let _mapper = mapper.restart(&scene.inside.router, "maps");
    let later = stock::add(&scene.home, "later", "echo later > $n");
    daemon::wait_until_known(&scene.laptop, &later);
    let outside = wait_until_mapped(&scene.home);

    // The daemon removes its mappings when it stops.
    assert!(home.stop().success());
    assert!(get(&scene.stranger, outside, "/nix-cache-info").is_err());
    let left = scene
        .inside
        .router
        .net_cmd("nft")
        .args(["list", "chain", "inet", "filter", "prerouting_miniupnpd"])
        .okay();
    assert!(!left.contains("dnat"), "{left}");
}

#[test]
fn unknown_router_gets_no_mapping() {
    let scene = Scene::new();
    let _mapper = Mapper::start(&scene.inside.router, "cafe");
    let first = scene.start(&scene.home, &scene.laptop, &["--map-port"]);
    wait_until_mapped(&scene.home);
    drop(first);
    // The same address with another router, as in a café.
    scene.inside.router.net("ip link set inside address 02:00:00:00:00:99");
    scene.home.net("ip neigh flush all");
    let _second = scene.start(&scene.home, &scene.laptop, &["--map-port"]);
    let problem = wait_for("it says why", || {
        let status = daemon::status(&scene.home);
        let problems = status["health"]["problems"].as_array().unwrap().clone();
        problems
            .iter()
            .find(|problem| problem["code"] == "port_mapping")
            .map(|problem| problem["text"].to_string())
    });
    assert!(problem.contains("02:00:00:00:00:99") && problem.contains("remove"), "{problem}");
    assert_eq!(daemon::status(&scene.home)["port_mapping"]["outside"], serde_json::Value::Null);
}

#[test]
fn router_without_port_mapping_is_reported_and_lookups_work() {
    let scene = Scene::new();
    let _home = scene.start(&scene.home, &scene.laptop, &["--map-port"]);
    wait_for("it says why", || {
        let status = daemon::status(&scene.home);
        let problems = status["health"]["problems"].as_array().unwrap().clone();
        problems
            .iter()
            .any(|problem| problem["text"].to_string().contains("neither PCP nor NAT-PMP"))
            .then_some(())
    });
    assert_eq!(
        daemon::narinfo_status(&scene.home, "/nix/store/00000000000000000000000000000000-none"),
        404
    );
}

#[test]
fn ipv6_pinhole_admits_friend_until_daemon_stops() {
    let scene = Scene::new();
    let router = &scene.inside.router;
    let _mapper = Mapper::start(router, "pinhole");
    router.net_cmd("sh").args(["-ec", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"]).okay();
    router.net("ip addr add 2001:db8:1::254/64 dev inside nodad");
    router.net("ip addr add 2001:db8:5::7/64 dev eth0 nodad");
    scene.home.net("ip addr add 2001:db8:1::1/64 dev eth0 nodad");
    scene.home.net("ip -6 route add default via 2001:db8:1::254");
    scene.next_door.net("ip addr add 2001:db8:5::1/64 dev eth0 nodad");
    scene.next_door.net("ip -6 route add default via 2001:db8:5::7");
    let pinhole: SocketAddr = "[2001:db8:1::1]:12306".parse().unwrap();
    // Without a pinhole, the router rejects connections to a listening port.
    let listener = scene.home.bind(|| std::net::TcpListener::bind(("::", 12306)));
    assert!(scene.next_door.connect(pinhole).is_err(), "the router lets everybody in");
    // A program that another test starts may still have a copy of the listener.
    rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
    drop(listener);

    let mut home = scene.start(&scene.home, &scene.laptop, &["--map-port"]);
    let said = wait_for("a pinhole", || {
        daemon::status(&scene.home)["port_mapping"]["pinhole"].as_str().map(str::to_owned)
    });
    assert_eq!(said, pinhole.to_string());
    // The daemon serves a friend and closes a stranger's connection.
    let (home_key, laptop_key) = (key(&scene.home), identity_of(&scene.laptop));
    let mut connection =
        TlsConnection::open(&scene.next_door, pinhole, &laptop_key, home_key).unwrap();
    assert_eq!(connection.get(&narinfo_route(&scene.path)).unwrap().0, 200);
    assert!(get(&scene.next_door, pinhole, "/nix-cache-info").is_err());
    assert!(home.stop().success());
    assert!(scene.next_door.connect(pinhole).is_err(), "the pinhole stays");
}

/// The identity of a host, so that the test can connect in its name.
fn identity_of(host: &Host) -> Identity {
    peerix::identity::load(&host.path(STATE)).unwrap()
}
