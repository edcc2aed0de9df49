# a has paths and signs them; b and c are on its network.

A, B = "192.168.1.1", "192.168.1.2"
MIB = 1 << 20
# What a logs of the faults that this test makes.
FAULTS = ["the file that systemd should take it from is missing", "--flag-of-tomorrow: no such option"]

with subtest("a and b boot; peerix is up on both, by its module's units"):
    a.start()
    b.start()
    for machine in (a, b):
        get_ready(machine)
        machine.wait_for_unit("peerix.socket")
        machine.wait_for_unit("peerix.service")
        wait_for_log(machine, "peerix", "serves on port 12304")
        assert "nix database" in peerix_log(machine)

with subtest("the unit runs as its user, without any privilege, and locked up"):
    for machine in (a, b):
        assert_hardened(machine, "peerix.service", "peerix")

with subtest("b fetches a path that only a has, through nix-daemon, as an ordinary user, signatures required"):
    only_a = build(a, "only-a")
    assert "require-sigs = true" in as_alice(b, "nix --extra-experimental-features nix-command show-config || nix config show")
    b.fail(f"test -e {only_a}")
    fetch(b, only_a)
    as_alice(b, f"nix-store --verify-path {only_a}")
    signed = as_alice(b, f"nix --extra-experimental-features nix-command path-info --json {only_a}")
    assert f"{KEY_NAME}:" in signed, signed

with subtest("a path is there for b as soon as a has registered it"):
    for number in range(5):
        fetch(b, build(a, f"new-{number}"))

with subtest("the secret key is root's alone, and signs all the same"):
    assert a.succeed("stat -L -c %a /etc/peerix/secret-key").strip() == "400"
    for user in ("alice", "nobody"):
        a.fail(f"su -s /bin/sh {user} -c 'cat /etc/peerix/secret-key'")
        a.fail(f"su -s /bin/sh {user} -c 'cat /run/credentials/peerix.service/private-key'")
    assert "secret" not in a.succeed("systemctl show -p Environment peerix; tr '\\0' ' ' < /proc/$(pidof peerix)/cmdline")

with subtest("c joins; what it is told has arrived unharmed, and the key it trusts is read from a file"):
    c.start()
    get_ready(c)
    c.wait_for_unit("peerix.service")
    told = c.succeed("tr '\\0' '\\n' < /proc/$(pidof peerix)/cmdline").split("\n")
    for flag in [
        """--peer-id=c "%i" '$HOME' \\n; *""",
        "--filter-patterns=-*",
        "--filter-patterns=[a-z] ü%%",
        "--filter-patterns=${x}",
    ]:
        assert flag in told, f"no {flag} in {told}"
    fetch(c, only_a)

with subtest("the key file changes, and is gone: nix-daemon reads it when it starts, and peerix goes on without"):
    conf = "/run/peerix-public-key/nix.conf"
    key = c.succeed("cat /etc/peerix/public-key")
    c.succeed("echo 'other-1:bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=' > /root/other && ln -sf /root/other /etc/peerix/public-key")
    c.succeed("systemctl restart nix-daemon")
    assert c.succeed(f"cat {conf}").startswith("extra-trusted-public-keys = other-1:")
    c.succeed("rm /root/other")
    c.execute("systemctl restart nix-daemon")
    c.succeed("systemctl restart peerix")
    c.fail(f"grep other-1 {conf}")
    c.succeed(f"echo '{key}' > /root/other && systemctl restart nix-daemon && systemctl restart peerix")
    as_alice(c, f"nix-store --verify-path {only_a}")

with subtest("a's secret key is gone: the port stays open, builds go on, and nothing unsigned is shared; then it is back"):
    health = f"curl --silent --fail --max-time 60 http://127.0.0.1:{PORT}/health"
    a.succeed("mv /etc/peerix/secret-key /root/away")
    # Its directory is watched, so that the daemon starts again without it.
    a.wait_until_succeeds(f"{health} | grep '^private-key: .*is missing'", timeout=LONG)
    a.succeed("systemctl is-active peerix.socket peerix.service")
    without_key = build(a, "without-key")
    b.fail(f"su - alice -c 'nix-store --realise {without_key}'")
    a.succeed("mv /root/away /etc/peerix/secret-key")
    a.wait_until_succeeds(f"test \"$({health})\" = ok", timeout=LONG)
    fetch(b, without_key)

with subtest("a's unit has a flag that the program does not know: all is a miss, and nothing fails"):
    a.succeed(
        "mkdir -p /run/systemd/system/peerix.service.d && printf '[Service]\\nExecStart=\\nExecStart=%s --flag-of-tomorrow\\n'"
        " $(readlink -f /proc/$(pidof peerix)/exe) > /run/systemd/system/peerix.service.d/flag.conf"
        " && systemctl daemon-reload && systemctl restart peerix"
    )
    a.wait_until_succeeds(f"curl --silent --max-time 60 http://127.0.0.1:{PORT}/health | grep '^flags: '", timeout=LONG)
    build(a, "with-a-wrong-flag")
    a.succeed("rm /run/systemd/system/peerix.service.d/flag.conf && systemctl daemon-reload && systemctl restart peerix")
    a.wait_until_succeeds(f"test \"$({health})\" = ok", timeout=LONG)

with subtest("c has no key: what it built itself, b does not take"):
    unsigned = build(c, "unsigned")
    b.fail(f"su - alice -c 'nix-store --realise {unsigned}'")

with subtest("a peer is switched off in the middle of a transfer; another peer sends the rest"):
    large = build(a, "large", size=48 * 1024)
    fetch(c, large)
    # 1 MiB/s leaves time to switch off a peer between its 6th MiB and its last.
    peers = [a, c]
    for peer in peers:
        slow(peer, B, "8mbit")
    before = {peer: sent(peer) for peer in peers}
    start_build(b, "fetch-large", f"nix-store --realise {large}")
    deadline = time.monotonic() + LONG
    victim = None
    while victim is None:
        assert time.monotonic() < deadline, "no peer has sent 6 MiB"
        assert is_running(b, "fetch-large"), b.succeed("journalctl -o cat -u fetch-large")
        for peer in peers:
            from_victim = sent(peer) - before[peer]
            if from_victim > 6 * MIB:
                victim = peer
                break
    victim.crash()
    assert from_victim < 46 * MIB, f"{victim.name} had sent {from_victim} bytes"
    assert is_running(b, "fetch-large")
    other = c if victim is a else a
    slow(other, B, None)
    end_build(b, "fetch-large")
    as_alice(b, f"nix-store --verify-path {large}")
    print(f"        {from_victim // MIB} of 48 MiB came from {victim.name}")

with subtest("that peer is back, and b boots again: everything works as before"):
    victim.start()
    victim.wait_for_unit("peerix.service")
    victim.wait_for_unit("multi-user.target")
    b.shutdown()
    b.start()
    b.wait_for_unit("peerix.service")
    b.wait_for_unit("multi-user.target")
    fetch(b, build(a, "rebooted"))


def build_during(name, count, interrupt):
    """Has b build a path with `count` references, which a has, and interrupts something meanwhile.

    `interrupt` gets a function that says whether the build is still running. The build is repeated
    on a slower network until that was so before and after; it never fails. Returns b's log of that
    build.
    """
    for attempt, rate in enumerate(["2mbit", "1mbit", "512kbit", "256kbit", "128kbit"]):
        path = f"{name}-{attempt}"
        build(a, path, size=64, count=count)
        slow(a, B, rate)
        start_build(b, path, f"nix-build {paths(path, 64, count)}")
        wait_for_log(b, path, "copying path")
        in_time = interrupt(lambda: is_running(b, path))
        slow(a, B, None)
        said = end_build(b, path)
        if in_time:
            return said
        print(f"        {path} was over too early at {rate}")
    raise AssertionError(f"{name}: every build was over too early")


with subtest("peerix is restarted on b and on a while b builds, ten times; no build fails"):

    def restart_peerix(is_going_on):
        b.succeed("systemctl restart peerix")
        between = is_going_on()
        a.succeed("systemctl restart peerix")
        return between

    fetched = 0
    for number in range(10):
        said = build_during(f"busy-{number}", 20, restart_peerix)
        # Nix names a path again when it resumes a copy that a restart cut off.
        copied = {line.split()[2] for line in said.splitlines() if line.startswith("copying path ")}
        print(f"        {number + 1} of 10: {len(copied)} of 21 paths came from a", flush=True)
        fetched += len(copied)
    assert fetched > 100, f"{fetched} of {10 * 21} paths came from a"

with subtest("nix-daemon is restarted on b and on a while b builds; the build does not fail"):

    def restart_nix_daemon(is_going_on):
        for machine in (a, b):
            if not is_going_on():
                return False
            machine.succeed("systemctl reload-or-restart nix-daemon")
        return True

    build_during("load", 60, restart_nix_daemon)
    fetch(b, build(a, "after-restart"))
    for machine in (a, b, c):
        assert_recovered(machine, FAULTS)

with subtest("a's firewall is open, then closed: a is not reached, and b's build goes on without it"):
    reach = f"curl --silent --fail --max-time 60 http://{A}:{PORT}/nix-cache-info"
    assert "StoreDir: /nix/store" in b.succeed(reach)
    # The firewall is really there: what it was not opened for is not reached.
    a.succeed("systemd-run --quiet --unit=other $(readlink -f /etc/peerix-test/busybox) httpd -f -p 9999 -h /tmp")
    # It answers 404 or a listing; that it answers is enough.
    other_port = "curl --silent --output /dev/null --max-time 60 http://{}:9999/"
    a.wait_until_succeeds(other_port.format("127.0.0.1"), timeout=LONG)
    b.fail(other_port.format(A))
    build(a, "behind", count=5)
    a.succeed("/run/current-system/specialisation/closed/bin/switch-to-configuration test")
    b.fail(reach)
    a.succeed(reach)
    said = b.succeed(f"su - alice -c {shlex.quote('nix-build ' + paths('behind', count=5))} 2>&1")
    assert "copying path" not in said and said.count("building '") == 6, said
    # From a others are still reached: it is its own port that is closed.
    a.succeed(f"curl --silent --fail --max-time 60 http://{B}:{PORT}/nix-cache-info")
