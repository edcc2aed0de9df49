# a has paths and signs them; b and c are on its network.

import time

A, B = "192.168.1.1", "192.168.1.2"

with subtest("a and b boot; peerix is up on both, by its module's units"):
    a.start()
    b.start()
    for machine in (a, b):
        get_ready(machine)
        machine.wait_for_unit("peerix.socket")
        machine.wait_for_unit("peerix.service")
        assert "serves on port 12304" in peerix_log(machine)
        assert "nix database" in peerix_log(machine)

with subtest("the unit runs as its user, without any privilege, and locked up"):
    for machine in (a, b):
        assert_hardened(machine, "peerix.service", "peerix")

with subtest("b fetches a path that only a has, through nix-daemon, as an ordinary user, signatures required"):
    only_a = build(a, "only-a")
    assert "require-sigs = true" in as_alice(b, "nix --extra-experimental-features nix-command show-config || nix config show")
    b.fail(f"test -e {only_a}")
    as_alice(b, f"nix-store --realise {only_a}")
    as_alice(b, f"nix-store --verify-path {only_a}")
    signed = as_alice(b, f"nix --extra-experimental-features nix-command path-info --json {only_a}")
    assert f"{KEY_NAME}:" in signed, signed

with subtest("a path is there for b as soon as a has registered it"):
    for number in range(5):
        new = build(a, f"new-{number}")
        as_alice(b, f"nix-store --realise {new}")

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
    as_alice(c, f"nix-store --realise {only_a}")

with subtest("the key file changes, and is gone: nix-daemon reads it when it starts, and peerix goes on without"):
    conf = "/run/peerix-public-key/nix.conf"
    key = c.succeed("cat /etc/peerix/public-key")
    c.succeed("echo 'other-1:bfb1tHzyJC4nHA9pr2zF9z0OI/lJ6WIWbI4+SeAZQXs=' > /root/other && ln -sf /root/other /etc/peerix/public-key")
    c.succeed("systemctl restart nix-daemon")
    assert c.succeed(f"cat {conf}").startswith("extra-trusted-public-keys = other-1:")
    c.succeed("rm /root/other")
    c.execute("systemctl restart nix-daemon")
    c.succeed("systemctl restart peerix")
    assert "keys: not there" in peerix_log(c)
    c.succeed(f"echo '{key}' > /root/other && systemctl restart nix-daemon && systemctl restart peerix")
    as_alice(c, f"nix-store --verify-path {only_a}")

with subtest("c has no key: what it built itself, b does not take"):
    unsigned = build(c, "unsigned")
    b.fail(f"su - alice -c 'nix-store --realise {unsigned}'")

with subtest("a is switched off in the middle of a transfer; b gets its path all the same, from c"):
    large = build(a, "large", size=48 * 1024)
    as_alice(c, f"nix-store --realise {large}")
    # a is so much the better peer that b begins there; and it is slow enough to be caught at it.
    slow(c, B, "256kbit")
    slow(a, B, "60mbit")
    before = sent(a)
    start_build(b, "fetch-large", f"nix-store --realise {large}")
    for _ in range(600):
        if sent(a) - before > 6 << 20:
            break
        time.sleep(0.1)
    from_a = sent(a) - before
    a.crash()
    assert 6 << 20 < from_a < 46 << 20, f"a had sent {from_a} bytes"
    slow(c, B, None)
    assert is_running(b, "fetch-large")
    end_build(b, "fetch-large")
    as_alice(b, f"nix-store --verify-path {large}")
    print(f"        {from_a >> 20} of 48 MiB came from a")

with subtest("a is back, and b boots again: all is as before"):
    a.start()
    a.wait_for_unit("peerix.service")
    b.shutdown()
    b.start()
    b.wait_for_unit("peerix.service")
    b.wait_for_unit("multi-user.target")
    rebooted = build(a, "rebooted")
    as_alice(b, f"nix-store --realise {rebooted}")

with subtest("peerix is restarted on b and on a while b builds, ten times; no build fails"):
    fetched = 0
    # So slow that a fast machine is not done before.
    slow(a, B, "2mbit")
    for number in range(10):
        name = f"busy-{number}"
        build(a, name, size=64, count=20)
        start_build(b, name, f"nix-build {paths(name, 64, 20)}")
        b.wait_until_succeeds(f"journalctl -o cat -u {name} | grep -q .", timeout=60)
        during = is_running(b, name)
        b.succeed("systemctl restart peerix")
        during = during and is_running(b, name)
        a.succeed("systemctl restart peerix")
        fetched += end_build(b, name).count("copying path")
        assert during, f"{name} was over before the restarts"
    print(f"        {fetched} of {10 * 21} paths were fetched from a while it went on")
    assert fetched > 100

with subtest("nix-daemon is restarted on both under load"):
    build(a, "load", size=64, count=60)
    slow(a, B, "3mbit")
    start_build(b, "load", f"nix-build {paths('load', 64, 60)}")
    b.wait_until_succeeds("journalctl -o cat -u load | grep -q 'copying path'", timeout=60)
    for machine in (a, b):
        assert is_running(b, "load"), f"over before nix-daemon was restarted on {machine.name}"
        machine.succeed("systemctl reload-or-restart nix-daemon")
    end_build(b, "load")
    slow(a, B, None)
    after = build(a, "after-restart")
    as_alice(b, f"nix-store --realise {after}")
    for machine in (a, b, c):
        assert "error:" not in peerix_log(machine), peerix_log(machine)

with subtest("a's firewall is open, then closed: a is not reached, and b's build goes on without it"):
    reach = f"curl --silent --fail --max-time 5 http://{A}:{PORT}/nix-cache-info"
    assert "StoreDir: /nix/store" in b.succeed(reach)
    # The firewall is really there: what it was not opened for is not reached.
    a.succeed("systemd-run --quiet --unit=other $(readlink -f /etc/peerix-test/busybox) httpd -f -p 9999 -h /tmp")
    a.wait_until_succeeds("curl --silent --output /dev/null --max-time 5 http://127.0.0.1:9999/", timeout=60)
    b.fail(f"curl --silent --output /dev/null --max-time 5 http://{A}:9999/")
    build(a, "behind", count=5)
    a.succeed("/run/current-system/specialisation/closed/bin/switch-to-configuration test")
    b.fail(reach)
    a.succeed(reach)
    said = b.succeed(f"su - alice -c {shlex.quote('nix-build ' + paths('behind', count=5))} 2>&1")
    assert "copying path" not in said and said.count("building '") == 6, said
    # From a others are still reached: it is its own port that is closed.
    a.succeed(f"curl --silent --fail --max-time 5 http://{B}:{PORT}/nix-cache-info")
