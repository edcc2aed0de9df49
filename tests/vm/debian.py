#!/usr/bin/env python3
"""Runs the steps of a test in virtual machines with Debian, where there is no nixpkgs for the NixOS test driver.

    debian.py NAME MACHINES.json IMAGE-DIRECTORY WORK-DIRECTORY PROGRAM-DIRECTORY STEPS.py...

MACHINES.json is what tests/module/eval.nix makes of the same configurations that the NixOS test
driver gets; IMAGE-DIRECTORY is made by tests/vm/image. Each machine boots that image with a disk of
its own on top, its network cards in bridges of this process's network namespace, which has to be
one of its own (`unshare --net`): nothing leaves it. The steps see the part of the NixOS test
driver's interface that they need. A run ends all that it started, also when it fails. A failure
names the step and its line, and shows the last lines of each machine's logs.
"""

import atexit
import base64
import contextlib
import json
import linecache
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Deadlines in seconds, far beyond what anything takes on an idle host: a boot 20 s, a command 1 s.
# Emulated processors that share two real ones with 25 other processes took nine minutes to boot.
BOOT_LIMIT = 1800
STOP_LIMIT = 900
# The machine itself ends a command after this; the answer may then take its own time to come.
COMMAND_LIMIT = 1800
ANSWER_LIMIT = 300
# For each log that a failure shows.
EXPLAIN_LIMIT = 60

# The programs under test, in PROGRAM-DIRECTORY.
PROGRAMS = ["peerix", "peerix-tracker"]

started = time.monotonic()


class Failed(Exception):
    """A step did not come out as it should."""


def say(text):
    print(f"  {time.monotonic() - started:7.1f} s  {text}", flush=True)


def has_kvm():
    """Whether unmodified guests run by KVM here: it can be there without a processor that does it."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def run(*words):
    """Runs a program of the host; what it prints is shown only if it fails."""
    words = [str(word) for word in words]
    try:
        subprocess.run(
            words,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=COMMAND_LIMIT,
        )
    except FileNotFoundError:
        raise Failed(f"{words[0]} is not installed: scripts/deps vm installs it") from None
    except subprocess.CalledProcessError as failure:
        said = failure.stdout.decode(errors="replace").strip()
        raise Failed(f"{' '.join(words)}: status {failure.returncode}\n{said}") from None


def ip(line):
    run("ip", *line.split())


def as_value(path):
    """A path among the settings that a comma separates."""
    return str(path).replace(",", ",,")


class Machine:
    def __init__(self, name, number, spec, hosts, image, work, programs):
        self.name, self.number, self.spec, self.hosts = name, number, spec, hosts
        self.image, self.dir, self.programs = image, work / name, programs
        self.dir.mkdir(parents=True)
        self.process = self.shell = None
        for vlan in spec["vlans"]:
            tap = f"{name}-{vlan}"
            ip(f"tuntap add {tap} mode tap")
            ip(f"link set {tap} master vlan{vlan} up")
        run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", f"{image}/disk.img", self.dir / "disk.qcow2")
        self.write_profile()

    def write_profile(self):
        """A small disk with all that is this machine's: its /etc, the programs, how to take on a configuration."""
        profile = self.dir / "profile"
        self.write_configuration(profile / "etc", self.spec)
        for name, variant in self.spec["specialisation"].items():
            self.write_configuration(profile / "specialisation" / name, variant)
        (profile / "bin").mkdir()
        for program in self.programs:
            shutil.copy2(program, profile / "bin")
        addresses = "".join(
            f"ip link set eth{card} up\nip addr add 192.168.{vlan}.{self.number}/24 brd + dev eth{card}\n"
            for card, vlan in enumerate(self.spec["vlans"])
        )
        (profile / "network").write_text(addresses)
        run("mke2fs", "-q", "-t", "ext4", "-L", "profile", "-d", profile, self.dir / "profile.img", "64M")

    def write_configuration(self, etc, spec):
        if spec["failed"]:
            raise Failed(f"{self.name}: {spec['failed']}")
        ports = lambda kind: f"{kind} dport {{ {', '.join(map(str, spec[kind]))} }} accept\n" if spec[kind] else ""
        rules = "flush ruleset\ntable inet filter {\nchain input { type filter hook input priority 0; policy drop;\n"
        rules += "ct state established,related accept\niif lo accept\nmeta l4proto { 1, 58 } accept\n"
        rules += ports("tcp") + ports("udp") + "}\n}\n"
        files = {f"systemd/system/{name}": text for name, text in spec["units"].items()}
        files |= {"nix/nix.conf": spec["nixConf"], "nftables.conf": rules, "hostname": f"{self.name}\n"}
        files["hosts"] = "127.0.0.1 localhost\n" + self.hosts
        files["tmpfiles.d/module.conf"] = "".join(f"{rule}\n" for rule in spec["tmpfiles"])
        for path, text in files.items():
            self.write(etc / path, text.encode(), 0o644)
        for name, text in spec["scripts"].items():
            self.write(etc / "peerix-scripts" / name, text.encode(), 0o755)
        for path, file in spec["etc"].items():
            if file.get("source", "").startswith("/usr/"):
                (etc / path).parent.mkdir(parents=True, exist_ok=True)
                (etc / path).symlink_to(file["source"])
            else:
                content = file["text"].encode() if "text" in file else Path(file["source"]).read_bytes()
                self.write(etc / path, content, int(file["mode"], 8))

    @staticmethod
    def write(path, content, mode):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.chmod(mode)

    def start(self):
        """Begins to boot; the first command waits for that."""
        if self.process:
            return
        accel = ["kvm", "-cpu", "host"] if has_kvm() else ["tcg,thread=multi", "-cpu", "max"]
        command = ["qemu-system-x86_64", "-accel", *accel, "-m", str(self.spec["memory"]), "-nodefaults", "-no-user-config"]
        command += ["-display", "none", "-no-reboot", "-serial", f"file:{as_value(self.dir)}/console.log"]
        command += ["-kernel", f"{self.image}/vmlinuz", "-initrd", f"{self.image}/initrd.img"]
        command += ["-append", "console=ttyS0 root=/dev/vda rw init=/sbin/vm-init net.ifnames=0 quiet"]
        for disk, kind in [("disk.qcow2", "format=qcow2"), ("profile.img", "format=raw,readonly=on")]:
            command += ["-drive", f"file={as_value(self.dir / disk)},{kind},if=virtio,cache=unsafe"]
        for vlan in self.spec["vlans"]:
            tap, mac = f"{self.name}-{vlan}", f"52:54:00:12:{vlan:02x}:{self.number:02x}"
            command += ["-netdev", f"tap,id=n{vlan},ifname={tap},script=no,downscript=no"]
            command += ["-device", f"virtio-net-pci,netdev=n{vlan},mac={mac},romfile="]
        command += ["-device", "virtio-rng-pci", "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=shell,name=shell"]
        command += ["-chardev", "socket,id=shell,path=shell,server=on,wait=off"]
        with open(self.dir / "qemu.log", "ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def connect(self):
        """Waits for the machine to take commands."""
        deadline = time.monotonic() + BOOT_LIMIT
        while not self.shell:
            if not self.process:
                raise Failed(f"{self.name} is off")
            if self.process.poll() is not None:
                raise Failed(f"{self.name}: QEMU has ended with status {self.process.returncode}")
            if time.monotonic() > deadline:
                raise Failed(f"{self.name} has not booted within {BOOT_LIMIT} s")
            with contextlib.suppress(OSError):
                shell = socket.socket(socket.AF_UNIX)
                # By a short name: a socket's has 107 bytes at most.
                directory = os.open(self.dir, os.O_PATH)
                try:
                    shell.connect(f"/proc/self/fd/{directory}/shell")
                finally:
                    os.close(directory)
                shell.settimeout(BOOT_LIMIT)
                self.shell = shell
                if self.read_line() == "ready":
                    return
                self.shell = None
            time.sleep(0.2)

    def read_line(self):
        line = b""
        while not line.endswith(b"\n"):
            part = self.shell.recv(65536)
            if not part:
                raise OSError("the machine is gone")
            line += part
        return line.decode().strip()

    def execute(self, command, timeout=COMMAND_LIMIT):
        """Runs a command as root, by bash; returns its status and what it printed."""
        self.connect()
        script = base64.b64encode(f"set -euo pipefail\n{command}\n".encode()).decode()
        self.shell.settimeout(timeout + ANSWER_LIMIT)
        save = f"echo {script} | base64 -d > /run/script"
        run_it = f"timeout {timeout} bash /run/script 2>>/run/errors | base64 -w 0"
        self.shell.sendall(f'{save}; {run_it}; echo " ${{PIPESTATUS[0]}}"\n'.encode())
        try:
            said, _, status = self.read_line().rpartition(" ")
        except OSError as failure:
            raise Failed(f"{self.name}: {command}: no answer: {failure}") from None
        return int(status), base64.b64decode(said).decode(errors="replace")

    def succeed(self, command, timeout=COMMAND_LIMIT):
        status, said = self.execute(command, timeout)
        if status != 0:
            raise Failed(f"{self.name}: {command}: status {status}\n{said}")
        return said

    def fail(self, command, timeout=COMMAND_LIMIT):
        status, said = self.execute(command, timeout)
        if status == 0:
            raise Failed(f"{self.name}: {command}: should have failed\n{said}")
        return said

    def wait_until_succeeds(self, command, timeout=COMMAND_LIMIT):
        deadline = time.monotonic() + timeout
        while True:
            status, said = self.execute(command, timeout)
            if status == 0:
                return said
            if time.monotonic() > deadline:
                raise Failed(f"{self.name}: {command}: not within {timeout} s\n{said}")
            time.sleep(0.3)

    def wait_for_unit(self, unit):
        self.wait_until_succeeds(f"systemctl is-active --quiet {unit}", timeout=BOOT_LIMIT)

    def shutdown(self):
        """As by its power button: everything is stopped in order."""
        self.connect()
        self.shell.sendall(b"systemctl poweroff\n")
        try:
            self.process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            raise Failed(f"{self.name} has not stopped within {STOP_LIMIT} s") from None
        self.gone()

    def crash(self):
        """Power is cut."""
        self.process.kill()
        self.process.wait()
        self.gone()

    def gone(self):
        if self.shell:
            self.shell.close()
        self.process = self.shell = None

    def explain(self):
        """The last lines of the machine's logs, for the person who reads about a failed step."""
        if not self.process:
            return "is off"
        logs = {
            "errors of commands": "tail -n 10 /run/errors",
            "peerix, tracker, nix-daemon": "journalctl --no-pager -o short-precise -n 40"
            " -u peerix.service -u peerix-tracker.service -u nix-daemon.service",
            "everything else": "journalctl --no-pager -o short-precise -n 15 -p notice",
        }
        said = ""
        with contextlib.suppress(Exception):
            for what, command in logs.items():
                said += f"[{what}]\n{self.execute(f'{command} 2>&1', timeout=EXPLAIN_LIMIT)[1]}"
            return said
        for log in ["qemu.log", "console.log"]:
            with contextlib.suppress(OSError):
                said += f"[{log}]\n{(self.dir / log).read_text(errors='replace')[-2000:]}"
        return said


class Run:
    """The steps of one test, and which of them is under way."""

    def __init__(self, name, machines):
        self.name, self.machines, self.step = name, machines, None

    @contextlib.contextmanager
    def subtest(self, what):
        self.step = what
        say(what)
        yield
        self.step = None

    def start_all(self):
        for machine in self.machines:
            machine.start()

    def execute(self, steps):
        names = {machine.name: machine for machine in self.machines}
        names |= {"subtest": self.subtest, "start_all": self.start_all, "__name__": "steps"}
        for file in steps:
            exec(compile(Path(file).read_text(), file, "exec"), names)

    def fail(self, failure, steps):
        """Reports the failure and ends the process."""
        for machine in self.machines:
            print(f"--- {machine.name}\n{machine.explain()}", file=sys.stderr)
        lines = [f"peerix: vm-test {self.name} failed"]
        if self.step:
            lines.append(f"  step: {self.step}")
        reason, files = str(failure), steps
        if not isinstance(failure, (Failed, AssertionError)):
            reason, files = f"{type(failure).__name__}: {reason}", [*steps, __file__]
        for file, line in calls(failure.__traceback__, files):
            lines.append(f"  {file}:{line}: {linecache.getline(file, line).strip()}")
        sys.exit("\n".join([*lines, f"  {reason}"]))


def calls(traceback, files):
    """File and line of each call on the way to the failure that is in one of the files."""
    while traceback:
        file = traceback.tb_frame.f_code.co_filename
        if file in files:
            yield file, traceback.tb_lineno
        traceback = traceback.tb_next


def main():
    name, machines, image, work, programs, *steps = sys.argv[1:]
    spec = json.loads(Path(machines).read_text())
    work = Path(work)
    programs = [Path(programs) / program for program in PROGRAMS]
    test = Run(name, [])

    def end_all():
        for machine in test.machines:
            if machine.process:
                machine.crash()

    atexit.register(end_all)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    try:
        make_machines(test, spec, image, work, programs)
        kind = "KVM" if has_kvm() else "emulated processors"
        say(f"{name}: {len(test.machines)} machines, {kind}")
        test.execute(steps)
    except Exception as failure:
        test.fail(failure, steps)
    say(f"{name}: all steps passed")


def make_machines(test, spec, image, work, programs):
    """Makes the networks, and the machines with their disks, in an empty directory."""
    shutil.rmtree(work, ignore_errors=True)
    numbers = {machine: number for number, machine in enumerate(sorted(spec), 1)}
    hosts = "".join(
        f"192.168.{vlan}.{numbers[machine]} {machine}\n"
        for machine in numbers
        for vlan in spec[machine]["vlans"][:1]
    )
    ip("link set lo up")
    for vlan in sorted({vlan for machine in spec.values() for vlan in machine["vlans"]}):
        ip(f"link add vlan{vlan} type bridge mcast_snooping 0")
        ip(f"link set vlan{vlan} up")
    for machine, number in numbers.items():
        test.machines.append(Machine(machine, number, spec[machine], hosts, image, work, programs))


if __name__ == "__main__":
    main()
