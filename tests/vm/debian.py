#!/usr/bin/env python3
"""Runs the steps of a test in virtual machines with Debian, where there is no nixpkgs for the NixOS test driver.

    debian.py NAME MACHINES.json STEPS.py IMAGE-DIRECTORY WORK-DIRECTORY PROGRAM...

MACHINES.json is what tests/module/eval.nix makes of the same configurations that the NixOS test driver gets; IMAGE-DIRECTORY
is made by tests/vm/image. Each machine boots that image with a disk of its own on top, its network cards in bridges of
this process's network namespace, which has to be one of its own (`unshare --net`): nothing leaves it. The steps see the
part of the NixOS test driver's interface that they need. A run ends all that it started, also when it fails.
"""

import atexit
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

# Emulated processors are slow, and two machines may have to share one real one.
BOOT_LIMIT = 300
COMMAND_LIMIT = 600
STOP_LIMIT = 120

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
    subprocess.run([str(word) for word in words], check=True, stdin=subprocess.DEVNULL)


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
        log = open(self.dir / "qemu.log", "ab")
        self.process = subprocess.Popen(command, cwd=self.dir, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def connect(self):
        """Waits for the machine to take commands."""
        deadline = time.monotonic() + BOOT_LIMIT
        while not self.shell:
            if time.monotonic() > deadline or not self.process or self.process.poll() is not None:
                raise Failed(f"{self.name} does not boot")
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
        self.shell.settimeout(timeout + 60)
        save = f"echo {script} | base64 -d > /run/script"
        run_it = f"timeout {timeout} bash /run/script 2>>/run/errors | base64 -w 0"
        self.shell.sendall(f'{save}; {run_it}; echo " ${{PIPESTATUS[0]}}"\n'.encode())
        said, _, status = self.read_line().rpartition(" ")
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
        self.process.wait(STOP_LIMIT)
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
        """What a person wants to see of a machine when a step failed."""
        if not self.process:
            return "is off"
        with contextlib.suppress(Exception):
            return self.execute("tail -n 20 /run/errors; journalctl --no-pager -n 60 2>&1", timeout=60)[1]
        return (self.dir / "console.log").read_text(errors="replace")[-4000:]


def main():
    name, machines, steps, image, work, *programs = sys.argv[1:]
    spec = json.loads(Path(machines).read_text())
    work = Path(work)
    shutil.rmtree(work, ignore_errors=True)
    numbers = {machine: number for number, machine in enumerate(sorted(spec), 1)}
    hosts = "".join(
        f"192.168.{vlan}.{numbers[machine]} {machine}\n" for machine in numbers for vlan in spec[machine]["vlans"][:1]
    )
    ip("link set lo up")
    for vlan in sorted({vlan for machine in spec.values() for vlan in machine["vlans"]}):
        ip(f"link add vlan{vlan} type bridge mcast_snooping 0")
        ip(f"link set vlan{vlan} up")
    all_machines = [Machine(m, n, spec[m], hosts, image, work, programs) for m, n in numbers.items()]

    def end_all():
        for machine in all_machines:
            if machine.process:
                machine.crash()

    atexit.register(end_all)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))

    @contextlib.contextmanager
    def subtest(what):
        say(what)
        yield

    def start_all():
        for machine in all_machines:
            machine.start()

    say(f"{name}: {len(all_machines)} machines, {'KVM' if has_kvm() else 'emulated processors'}")
    names = {machine.name: machine for machine in all_machines}
    names |= {"subtest": subtest, "start_all": start_all, "__name__": "steps"}
    try:
        exec(compile(Path(steps).read_text(), steps, "exec"), names)
    except Exception as failure:
        for machine in all_machines:
            print(f"--- {machine.name}\n{machine.explain()}", file=sys.stderr)
        if isinstance(failure, (Failed, AssertionError)):
            line = next((entry.lineno for entry in walk(failure.__traceback__) if entry.filename == steps), "?")
            sys.exit(f"{name}: line {line} of {steps}: {failure}")
        raise
    say(f"{name}: all steps passed")


def walk(traceback):
    while traceback:
        yield type("Entry", (), {"filename": traceback.tb_frame.f_code.co_filename, "lineno": traceback.tb_lineno})
        traceback = traceback.tb_next


if __name__ == "__main__":
    main()
