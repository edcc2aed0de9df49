//! Hosts, the switches that join them, and the namespaces behind both.

use super::{DEADLINE, directory, process::Process, thread, wait_for};
use peerix::time_scale::{INTERVAL_SCALE, TIMEOUT_SCALE};
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::fs::File;
use std::io::{self, BufRead, BufReader, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::channel;

/// A network: one switch, to which [`Lan::host`] connects hosts.
pub struct Lan {
    /// Namespace of the switch.
    namespace: Arc<Namespace>,
    switch: String,
    subnet: Subnet,
    /// Address of the default gateway, if there is one.
    gateway: Option<Ipv4Addr>,
    pub(super) scale: Scale,
    hosts: AtomicU8,
}

/// Factor by which the nodes of a [`Lan::patient`] scale their timeouts.
pub const PATIENCE: f64 = 5.0;

/// The first three bytes of the addresses of a /24 network.
pub type Subnet = [u8; 3];

/// Factors for the intervals and timeouts of the daemons and trackers on a network: see
/// [`peerix::time_scale`].
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    intervals: f64,
    timeouts: f64,
}

impl Default for Scale {
    fn default() -> Scale {
        Scale { intervals: 1.0, timeouts: 1.0 }
    }
}

impl Scale {
    /// Scales announces and other periodic actions.
    pub fn intervals(factor: f64) -> Scale {
        Scale { intervals: factor, ..Scale::default() }
    }

    /// Scales timeouts for clients and peers.
    pub fn timeouts(factor: f64) -> Scale {
        Scale { timeouts: factor, ..Scale::default() }
    }

    /// Timeouts of 20 times their length, for tests whose connections stay idle or unread, or whose
    /// peers stay listed, also on a slow machine.
    pub fn without_timeouts() -> Scale {
        Scale::timeouts(20.0)
    }

    /// The environment variables that give a program these factors.
    pub fn variables(self) -> impl Iterator<Item = (&'static str, String)> {
        let scales = [(INTERVAL_SCALE, self.intervals), (TIMEOUT_SCALE, self.timeouts)];
        scales
            .into_iter()
            .filter(|(_, factor)| *factor != 1.0)
            .map(|(variable, factor)| (variable, factor.to_string()))
    }
}

impl Lan {
    /// An empty network, 10.77.0.0/24, without a gateway.
    pub fn new() -> Lan {
        Lan::of(&Arc::new(Namespace::bare()), "switch", [10, 77, 0])
    }

    /// An empty network, 10.77.0.0/24, with timeouts scaled by [`PATIENCE`], so that peers do not
    /// time out on a busy machine.
    pub fn patient() -> Lan {
        Lan::new().with_scale(Scale::timeouts(PATIENCE))
    }

    /// An empty network without a gateway. Its switch is called `switch` in `namespace`.
    pub(super) fn of(namespace: &Arc<Namespace>, switch: &str, subnet: Subnet) -> Lan {
        run(namespace, &format!("ip link add {switch} type bridge mcast_snooping 0"));
        run(namespace, &format!("ip link set {switch} up"));
        let (namespace, switch) = (Arc::clone(namespace), switch.to_owned());
        Lan {
            namespace,
            switch,
            subnet,
            gateway: None,
            scale: Scale::default(),
            hosts: AtomicU8::new(0),
        }
    }

    /// An empty network whose gateway, at number 254, is the machine of `namespace`.
    pub(super) fn routed(namespace: &Arc<Namespace>, switch: &str, subnet: Subnet) -> Lan {
        let mut lan = Lan::of(namespace, switch, subnet);
        let gateway = lan.address(254);
        run(namespace, &format!("ip addr add {gateway}/24 brd + dev {switch}"));
        lan.gateway = Some(gateway);
        lan
    }

    /// Sets the factors for the programs on hosts that are added later.
    pub fn with_scale(mut self, scale: Scale) -> Lan {
        self.scale = scale;
        self
    }

    /// The address with this last byte, whether or not a host has it.
    pub fn address(&self, number: u8) -> Ipv4Addr {
        let [a, b, c] = self.subnet;
        Ipv4Addr::new(a, b, c, number)
    }

    /// Adds a host with an empty store.
    pub fn host(&self, name: &str) -> Host {
        let number = self.hosts.fetch_add(1, Ordering::Relaxed) + 1;
        let mountpoint = directory().join("root");
        std::fs::create_dir_all(&mountpoint).expect("a directory to mount on");
        let namespace = Namespace::start(
            Command::new("unshare")
                .args(["--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c"])
                .arg(include_str!("host.sh"))
                .arg("host")
                .arg(&mountpoint)
                .arg(super::nix::root())
                .arg(directory())
                .args(super::program_dirs()),
        );
        let host = Host {
            name: name.to_owned(),
            address: self.address(number),
            port: format!("{}-{number}", self.switch),
            scale: self.scale,
            namespace: Arc::new(namespace),
            switch: Arc::clone(&self.namespace),
        };
        let (address, pid) = (host.address, host.namespace.pid());
        let (port, switch) = (&host.port, &self.switch);
        let links = [
            format!("link add {port} type veth peer name eth0 netns {pid}"),
            format!("link set {port} master {switch} up"),
        ];
        batch(&self.namespace, &links);
        let mut links = vec![
            "link set lo up".to_owned(),
            format!("addr add {address}/24 brd + dev eth0"),
            "link set eth0 up".to_owned(),
        ];
        links.extend(self.gateway.map(|gateway| format!("route add default via {gateway}")));
        batch(&host.namespace, &links);
        host
    }
}

/// Gives each host permanent neighbour entries for the others. Without them, many hosts that all
/// talk to each other fill the kernel's neighbour table (1,024 entries for all namespaces
/// together), and tests that run at the same time lose packets.
pub fn introduce(hosts: &[&Host]) {
    let link = |host: &Host| {
        let link = host.net_cmd("ip").args(["-oneline", "link", "show", "eth0"]).okay();
        let address = link.split_once("link/ether ").and_then(|(_, rest)| rest.split(' ').next());
        let address = address.expect("Ethernet has addresses");
        format!("neigh replace {} lladdr {address} dev eth0 nud permanent\n", host.address)
    };
    let links: Vec<String> = hosts.iter().map(|host| link(host)).collect();
    for (at, host) in hosts.iter().enumerate() {
        let others = links
            .iter()
            .enumerate()
            .filter(|(other, _)| *other != at)
            .map(|(_, line)| line.as_str());
        host.write("/tmp/neighbours", others.collect::<String>());
        host.net_cmd("ip").arg("-batch").arg(host.path("/tmp/neighbours")).okay();
    }
}

/// A machine with its own network, processes, root directory and Nix store.
pub struct Host {
    /// Name in messages and in the names of logs.
    pub name: String,
    /// Address on the network.
    pub address: Ipv4Addr,
    port: String,
    scale: Scale,
    pub(super) namespace: Arc<Namespace>,
    switch: Arc<Namespace>,
}

impl Host {
    /// A command on this host, as root, with a clean environment.
    pub fn cmd(&self, program: &str) -> Command {
        self.cmd_as(0, program)
    }

    /// A command on this host, as the user `uid`, with a clean environment.
    pub fn cmd_as(&self, uid: u32, program: &str) -> Command {
        self.cmd_in(&["net", "mnt", "pid_for_children"], uid, program)
    }

    /// A command with the files of this host and the network of the real machine.
    pub fn cmd_outside(&self, program: &str) -> Command {
        self.cmd_in(&["mnt", "pid_for_children"], 0, program)
    }

    fn cmd_in(&self, kinds: &[&str], uid: u32, program: &str) -> Command {
        let mut command = self.namespace.nsenter(kinds);
        if uid != 0 {
            command.arg(format!("--setuid={uid}")).arg(format!("--setgid={uid}"));
        }
        command.arg("--").arg(program);
        command.env_clear().envs([
            ("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", super::nix::bin_dir_inside())),
            ("HOME", "/root".to_owned()),
            ("USER", "root".to_owned()),
            ("NIX_CONF_DIR", "/etc/nix".to_owned()),
            ("LC_ALL", "C.UTF-8".to_owned()),
        ]);
        command.envs(self.scale.variables());
        command
    }

    /// A command of the real machine (`ip`, `iptables`) in the network of this host.
    pub fn net_cmd(&self, program: &str) -> Command {
        let mut command = self.namespace.nsenter(&["net"]);
        command.arg("--").arg(program);
        command
    }

    /// Runs one command line (`ip`, `tc`) of the real machine in the network of this host.
    pub fn net(&self, line: &str) {
        run(&self.namespace, line);
    }

    /// Runs one command line in the namespace of the switch. `{port}` stands for this host's port.
    pub fn switch(&self, line: &str) {
        run(&self.switch, &line.replace("{port}", &self.port));
    }

    /// Starts a shell script on the host.
    pub fn spawn_sh(&self, script: &str) -> Process {
        let mut command = self.cmd("sh");
        command.args(["-c", script]).stdin(Stdio::null());
        Process::start(command)
    }

    /// Runs a shell script on the host and returns its output. Panics if it fails.
    pub fn sh(&self, script: &str) -> String {
        self.cmd("sh").args(["-ec", script]).okay()
    }

    /// The path under which the test reaches `path` of this host.
    pub fn path(&self, path: &str) -> PathBuf {
        let inside = path.strip_prefix('/').expect("an absolute path");
        Path::new("/proc").join(self.namespace.pid().to_string()).join("root").join(inside)
    }

    /// Writes a file and creates its parent directories.
    pub fn write(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().expect("a file is in a directory"))
            .expect("the host's directories");
        std::fs::write(path, content).expect("the host's file");
    }

    /// Runs `work` in a new thread in this host's network. A socket stays in the network in which
    /// it was created, so `work` only has to create it.
    pub fn in_net<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(self.namespace.file("net")).expect("the host is there");
        std::thread::scope(|scope| {
            let thread = thread::spawn_in(scope, &self.name, move || {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("enter the host's network");
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Binds a socket in this host's network, once its port is free. After the test has closed a
    /// socket, its port stays in use while another thread starts a program: until it executes that
    /// program, the new process has copies of all sockets of this one.
    pub fn bind<T: Send>(&self, bind: impl Fn() -> io::Result<T> + Sync) -> T {
        wait_for("a free port", || match self.in_net(&bind) {
            Err(e) if e.kind() == ErrorKind::AddrInUse => None,
            bound => Some(bound.expect("the host has this address")),
        })
    }

    /// Connects from this host. Times out after [`DEADLINE`].
    pub fn connect(&self, to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
        let to = to.into();
        self.in_net(|| TcpStream::connect_timeout(&to, DEADLINE))
    }

    /// Connects from this host to its own peerix, as the local Nix does.
    pub fn connect_local(&self) -> io::Result<TcpStream> {
        self.connect((IpAddr::from(Ipv4Addr::LOCALHOST), super::PORT))
    }

    /// A listener on all IPv4 addresses of this host.
    pub fn listen(&self, port: u16) -> TcpListener {
        self.bind(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
    }

    /// A UDP socket on all IPv4 addresses of this host, with permission to broadcast.
    pub fn udp(&self, port: u16) -> UdpSocket {
        let socket = self.bind(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)));
        socket.set_broadcast(true).expect("a socket may broadcast");
        socket
    }

    /// Bytes received from the network so far.
    pub fn received(&self) -> u64 {
        self.counter(0)
    }

    /// Bytes sent to the network so far.
    pub fn sent(&self) -> u64 {
        self.counter(8)
    }

    /// Packets received from and sent to the network so far.
    pub fn packets(&self) -> u64 {
        self.counter(1) + self.counter(9)
    }

    fn counter(&self, column: usize) -> u64 {
        let table = std::fs::read_to_string(format!("/proc/{}/net/dev", self.namespace.pid()))
            .expect("the host is there");
        let line = table
            .lines()
            .find_map(|line| line.trim().strip_prefix("eth0:"))
            .expect("the host has eth0");
        line.split_whitespace()
            .nth(column)
            .and_then(|count| count.parse().ok())
            .expect("a table of counts")
    }
}

/// The namespaces of a host or a switch. A child process keeps them until its standard input
/// closes.
pub(super) struct Namespace {
    holder: Child,
}

impl Namespace {
    /// Namespaces for a switch: its own network and processes, and the files of the real machine.
    pub(super) fn bare() -> Namespace {
        let script = ["sh", "-ec", "echo ready; exec cat"];
        Namespace::start(
            Command::new("unshare")
                .args(["--net", "--mount", "--pid", "--fork", "--mount-proc"])
                .args(script),
        )
    }

    /// Enables IPv4 forwarding between the networks of this namespace.
    pub(super) fn forward(&self) {
        let script = "echo 1 > /proc/sys/net/ipv4/ip_forward";
        self.nsenter(&["net"]).args(["--", "sh", "-ec", script]).okay();
    }

    fn start(command: &mut Command) -> Namespace {
        let mut holder = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare starts (it is in util-linux)");
        let mut line = String::new();
        let output = holder.stdout.take().expect("it was asked for");
        BufReader::new(output).read_line(&mut line).expect("what unshare prints is text");
        if line != "ready\n" {
            let _ = holder.kill();
            let status = holder.wait();
            panic!(
                "no namespaces ({status:?}): run as root or under `unshare --map-root-user --net --mount`"
            );
        }
        Namespace { holder }
    }

    fn pid(&self) -> u32 {
        self.holder.id()
    }

    fn file(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.pid())
    }

    fn nsenter(&self, kinds: &[&str]) -> Command {
        // With an absolute path, the standard library uses posix_spawn. If it had to search the
        // changed PATH, it would fork, which copies the page tables of the tests.
        let mut command = Command::new("/usr/bin/nsenter");
        for kind in kinds {
            let option = match *kind {
                "net" => "--net",
                "mnt" => "--mount",
                _ => "--pid",
            };
            command.arg(format!("{option}={}", self.file(kind)));
            // `nsenter --mount` alone enters the root of the mount namespace. For a test in a
            // chroot, that is the machine outside the chroot.
            if *kind == "mnt" {
                command.arg(format!("--root=/proc/{}/root", self.pid()));
            }
        }
        command
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.wait();
    }
}

/// Runs commands of `ip` in the network of `namespace`, in one process.
fn batch(namespace: &Namespace, commands: &[String]) {
    let mut ip = namespace.nsenter(&["net"]);
    ip.args(["--", "sh", "-c", "printf '%s\\n' \"$@\" | ip -batch -", "batch"])
        .args(commands)
        .okay();
}

/// Runs one command line of the real machine in the network of `namespace`.
pub(super) fn run(namespace: &Namespace, line: &str) {
    namespace.nsenter(&["net"]).arg("--").args(line.split(' ')).okay();
}

/// Runs a command to its end.
pub trait Run {
    /// Runs the command and returns its standard output. Panics with its standard error if it
    /// fails.
    fn okay(&mut self) -> String;
    /// Runs the command and returns its output. Kills it and panics after [`DEADLINE`].
    fn ran(&mut self) -> Output;
}

impl Run for Command {
    fn okay(&mut self) -> String {
        let output = self.ran();
        let error = super::last_lines(&String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{self:?}: {}\n{error}", output.status);
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    fn ran(&mut self) -> Output {
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = self.spawn().expect("nsenter starts");
        let pid = Pid::from_child(&child);
        let (ended, output) = channel();
        thread::spawn("a command", move || drop(ended.send(child.wait_with_output())));
        let output = output.recv_timeout(DEADLINE).unwrap_or_else(|_| {
            let _ = kill_process(pid, Signal::KILL);
            panic!("{self:?}: not within {DEADLINE:?}")
        });
        output.expect("nsenter is ours")
    }
}
