# a is on one network and b on another; c is their router and has the tracker.

TRACKER = "http://127.0.0.1:12305"


def reputation(peer_id):
    return c.succeed(f"curl --silent --fail {TRACKER}/reputation/{peer_id}").strip()


def peer_id(machine):
    said = "knows this node as "
    wait_for_log(machine, "peerix", said)
    lines = [line for line in peerix_log(machine).splitlines() if said in line]
    return lines[-1].split(said)[1].split()[0]


with subtest("three machines boot: a and b on networks of their own, the tracker between them"):
    start_all()
    c.wait_for_unit("peerix-tracker.service")
    c.succeed("sysctl -q net.ipv4.ip_forward=1")
    for machine, network, gateway in [(a, "192.168.2.0/24", "192.168.1.3"), (b, "192.168.1.0/24", "192.168.2.3")]:
        get_ready(machine)
        machine.succeed(f"ip route add {network} via {gateway}")
        machine.wait_for_unit("peerix.service")

with subtest("the tracker runs as its user, without any privilege, and locked up"):
    assert_hardened(c, "peerix-tracker.service", "peerix-tracker")
    assert_hardened(a, "peerix.service", "peerix")

with subtest("b fetches a path that only a has, across the router, found through the tracker"):
    path = build(a, "far", size=256)
    # The tracker knows within 30 s what a shares.
    fetch(b, path)
    as_alice(b, f"nix-store --verify-path {path}")
    assert "copying" not in c.succeed("journalctl -o cat -u peerix-tracker")

with subtest("both sides report the transfer, and a has a reputation for it"):
    ids = [peer_id(machine) for machine in (a, b)]
    c.wait_until_succeeds(
        f"curl --silent --fail {TRACKER}/reputation/{ids[0]}"
        " | grep -Eq '\"successful_transfers\":[1-9]'",
        timeout=LONG,
    )
    before = [reputation(peer) for peer in ids]
    print(f"        {before[0]}")

with subtest("the tracker is killed, and comes back with all reputations"):
    pid = c.succeed("pidof peerix-tracker").strip()
    c.succeed(f"kill -KILL {pid}")
    c.wait_until_succeeds(f"curl --silent --fail {TRACKER}/health", timeout=LONG)
    assert c.succeed("pidof peerix-tracker").strip() != pid
    assert [reputation(peer) for peer in ids] == before

with subtest("peers find one another again through it, a machine that booted keeps its identity"):
    a.shutdown()
    a.start()
    get_ready(a)
    a.succeed("ip route add 192.168.2.0/24 via 192.168.1.3")
    a.wait_for_unit("peerix.service")
    assert peer_id(a) == ids[0]
    fetch(b, build(a, "far-again", size=256))
