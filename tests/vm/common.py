# What the steps of all tests use. They run under the NixOS test driver and under tests/vm/debian.py, which give them
# the machines as `a`, `b` and `c`, and `subtest`.

import shlex
import time

KEY_NAME = "test.example-1"
PORT = 12304
TOOLS = "peerix-test-tools"

# Deadline in seconds for what takes seconds on an idle host.
LONG = 1800


def as_alice(machine, command):
    """Runs a command as an ordinary user, whose Nix is nix-daemon's, and returns what it prints."""
    return machine.succeed(f"su - alice -c {shlex.quote(command)}")


def get_ready(machine):
    """Waits for the machine's peerix, and gives its store what builders need. The same path on all machines."""
    machine.wait_for_unit("multi-user.target")
    tools = "cp -L /etc/peerix-test/busybox busybox && for t in sh mkdir head; do ln -s busybox $t; done"
    return machine.succeed(
        f"rm -rf /tmp/{TOOLS} && mkdir /tmp/{TOOLS} && cd /tmp/{TOOLS} && {tools} && nix-store --add /tmp/{TOOLS}"
    ).strip()


def paths(name, size=4, count=0):
    """Arguments for nix-build: see nix/tests/paths.nix."""
    return (
        f"--no-out-link /etc/peerix-test/paths.nix --argstr shell $(echo /nix/store/*-{TOOLS})"
        f" --argstr name {name} --arg size {size} --arg count {count}"
    )


def fetch(machine, path):
    """Has an ordinary user's Nix fetch the path from a peer.

    On a machine that is short of processor time a peer's answer can come after the lookup has
    ended, which Nix takes for a miss. The nix.conf of these machines lets it ask again at once, so
    the fetch is tried until it succeeds.
    """
    command = f"su - alice -c {shlex.quote(f'nix-store --realise {path} 2>&1')}"
    deadline = time.monotonic() + LONG
    tries = 0
    while True:
        status, said = machine.execute(command)
        tries += 1
        if status == 0:
            break
        assert time.monotonic() < deadline, f"{machine.name} has not found {path}:\n{said}"
        time.sleep(0.5)
    if tries > 1:
        print(f"        {machine.name} found {path} at attempt {tries}")


def build(machine, name, size=4, count=0):
    return machine.succeed(f"nix-build {paths(name, size, count)}").strip()


def peerix_log(machine):
    return machine.succeed("journalctl -o cat -u peerix")


# What the daemon logs when Nix's database was out of reach for as long as a lookup waits: 50 ms for a
# query by UDP. nix-daemon, which has to open the database, takes longer on a busy machine.
TRANSIENT_ERRORS = ["locked or overloaded", "no other process has it open"]


def assert_recovered(machine, expected=()):
    """The daemon has logged no error but that Nix's database was out of reach, and reads it again.

    `expected` has texts of the errors that the test caused before.
    """
    errors = [line for line in peerix_log(machine).splitlines() if "error:" in line]
    for line in errors:
        print(f"        {machine.name} logged {line}")
    lasting = [line for line in errors if not any(text in line for text in [*TRANSIENT_ERRORS, *expected])]
    assert not lasting, peerix_log(machine)
    own = f"ls -d /nix/store/*-{TOOLS} | cut -c 12-43"
    url = f"http://127.0.0.1:{PORT}/store/$({own}).narinfo"
    machine.wait_until_succeeds(f"curl --silent --fail --max-time 60 {url}", timeout=LONG)


def start_build(machine, unit, command):
    """Starts a command as an ordinary user, beside what comes next."""
    script = shlex.quote(f"cd; {command}")
    machine.succeed(f"systemd-run --quiet --unit={unit} --uid=alice -p RemainAfterExit=yes -- $(command -v bash) -lc {script}")


def is_running(machine, unit):
    return machine.succeed(f"systemctl show --value -p SubState {unit}").strip() == "running"


def end_build(machine, unit):
    """Waits for what `start_build` started; it has to have succeeded."""
    state = f"systemctl show --value -p SubState {unit}"
    machine.wait_until_succeeds(f"{state} | grep -Ev '^(running|start)$'", timeout=LONG)
    result = machine.succeed(f"systemctl show --value -p Result {unit}").strip()
    said = machine.succeed(f"journalctl -o cat -u {unit}")
    assert result == "success", f"{unit}: {result}\n{said}"
    machine.succeed(f"systemctl stop {unit}")
    return said


def wait_for_log(machine, unit, text):
    """Waits for a line with the text in the unit's log."""
    wanted = f"journalctl -o cat -u {unit} | grep -F -q {shlex.quote(text)}"
    machine.wait_until_succeeds(wanted, timeout=LONG)


def sent(machine):
    """Bytes that the machine has sent to the network so far."""
    return int(machine.succeed("cat /sys/class/net/eth*/statistics/tx_bytes | paste -sd+ | { read sum; echo $((sum)); }"))


def slow(machine, to, rate):
    """Limits what the machine sends on its network, from where it would send to that address; no rate, no limit."""
    device = machine.succeed(f"ip -o route get {to} | sed 's/.* dev \\([^ ]*\\).*/\\1/'").strip()
    machine.execute(f"tc qdisc del dev {device} root 2>&1")
    if rate is not None:
        machine.succeed(f"tc qdisc add dev {device} root tbf rate {rate} burst 64k latency 500ms")


def assert_hardened(machine, unit, user):
    """The unit runs as its user, can become nobody else, and is as locked up as can be."""
    pid = machine.succeed(f"systemctl show --value -p MainPID {unit}").strip()
    assert machine.succeed(f"ps -o user= -p {pid}").strip() == user
    status = machine.succeed(f"cat /proc/{pid}/status")
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"]:
        assert line in status, f"{unit}: not {line} in\n{status}"
    said = machine.succeed(f"systemd-analyze security --no-pager --threshold=15 {unit} | tail -n 1")
    print(f"        {said.strip()}")
