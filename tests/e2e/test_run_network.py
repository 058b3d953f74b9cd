"""`run` with networks, in a network namespace of the tests' own that plays the host: bridge kata0 is made in there."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import Finished, leftovers, record_of, wait_until, write_config

from katapod.plan.loopback_guard import guard_rules
from kit.kata import RUN_PREFIX, Kata
from kit.pool import Pool
from kit.templates import kata_command

HOST = f"{RUN_PREFIX}host"
NETNS = Path("/run/netns", HOST)
SERVER = "mkdir /w; echo hello > /w/x; httpd -f -p 80 -h /w"
LIMIT_S = 240.0


def on_host(*words: str) -> list[str]:
    return ["nsenter", f"--net={NETNS}", "--", *words]


def run(*words: str, limit_s: float = LIMIT_S) -> Finished:
    """`kata-runtime run --rm WORDS` on the host of the tests."""
    began = time.monotonic()
    done = subprocess.run(
        on_host(*kata_command("run", "--rm", *words)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=limit_s,
    )
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def host(*words: str) -> str:
    return subprocess.run(on_host(*words), check=True, capture_output=True, text=True, timeout=LIMIT_S).stdout


def traces(name: str) -> list[str]:
    """What is there of a container: rules, interfaces, leases, and all that it could leave without a network."""
    rules = host("iptables-save", "-t", "nat").splitlines() + host("iptables-save", "-t", "filter").splitlines()
    found = [line for line in rules if f'"{name}"' in line]
    for lease in Path("/run/katapod/networks/bridge").glob("*.*.*.*"):
        with contextlib.suppress(OSError):
            if lease.read_text().split()[:1] == [name]:  # empty for a moment while it is written
                found.append(str(lease))
    return [*found, *leftovers(name)]


@pytest.fixture(scope="module", autouse=True)
def _host_of_tests() -> Iterator[None]:
    subprocess.run(["ip", "netns", "add", HOST], check=True)
    try:
        host("ip", "link", "set", "lo", "up")
        yield
    finally:
        subprocess.run(["ip", "netns", "delete", HOST], check=True)


@contextlib.contextmanager
def started(name: str, *words: str) -> Iterator[str]:
    """A container in the background; returns its address."""
    done = subprocess.run(
        on_host(*kata_command("run", "-d", "--name", name, *words)),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    try:
        assert done.returncode == 0, done
        attachment = record_of(name)["attachment"]
        assert isinstance(attachment, dict)
        yield attachment["addresses"][0]
    finally:
        removed = subprocess.run(on_host(*kata_command("delete", "--force", name)), capture_output=True, text=True)
        assert (removed.returncode, removed.stderr) == (0, ""), removed
        assert traces(name) == []


def fetch(address: str, port: int) -> str:
    """What the container's web server says to a client on the host; it may be about to open its port."""
    code = (
        "import sys, urllib.request\n"
        "opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))\n"
        f"sys.stdout.write(opener.open('http://{address}:{port}/x', timeout=60).read().decode())\n"
    )
    said: list[str] = []

    def answered() -> bool:
        done = subprocess.run(on_host("python3", "-c", code), capture_output=True, text=True, timeout=LIMIT_S)
        said.append(done.stdout)
        return done.returncode == 0

    wait_until(f"an answer of {address}:{port}", answered, period_s=0.2)
    return said[-1]


@pytest.fixture
def name(kata: Kata) -> Iterator[str]:
    chosen = kata.name()
    yield chosen
    assert traces(chosen) == []


def test_a_container_on_the_bridge(name: str) -> None:
    done = run(
        "--name", name, "--net", "bridge", "busybox", "sh", "-c", "ip -4 addr show eth0; ip route; cat /etc/hosts"
    )
    assert (done.code, done.err) == (0, "")
    assert "inet 10.186." in done.out
    assert "default via 10.186.0.1 dev eth0" in done.out
    assert f"\t{name[:63]}\n" in done.out
    assert "kata0" in host("ip", "link")


@pytest.mark.core
@pytest.mark.smoke
def test_it_reaches_the_host_and_another_container(name: str, kata: Kata, accelerator: str) -> None:
    vcpus = "1" if accelerator == "uml" else "2"
    other = kata.name()
    with started(other, "--net", "bridge", "busybox", "sh", "-c", SERVER) as address:
        script = f"nproc; ping -c 1 -w 20 10.186.0.1 && ping -c 1 -w 20 {address} && wget -q -O - http://{address}/x"
        done = run("--name", name, "--cpus", vcpus, "--net", "bridge", "busybox", "sh", "-c", script)
        assert (done.code, done.err) == (0, ""), done
        assert done.out.startswith(f"{vcpus}\n")
        assert done.out.endswith("hello\n")


def test_what_the_how_to_forbids_is_forbidden(name: str, kata: Kata) -> None:
    """The page's own commands; what the host begins, and published ports, still work."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "network-run.md"
    commands = [line.partition("#")[0].split() for line in page.read_text().splitlines() if line[:9] == "iptables "]
    assert len(commands) == 3
    other = kata.name()
    with started(other, "--net", "bridge", "-p", "18096:80", "busybox", "sh", "-c", SERVER) as address:
        for command in commands:
            host(*command)
        try:
            reach = f"ping -c 1 -w 3 10.186.0.1; ping -c 1 -w 3 {address}; echo end"
            done = run("--name", name, "--net", "bridge", "busybox", "sh", "-c", reach)
            assert (done.out.count("100% packet loss"), done.out.split()[-1]) == (2, "end"), done
            assert fetch("127.0.0.1", 18096) == "hello\n"
        finally:
            for command in commands:
                host(*("-D" if word == "-I" else word for word in command))


def test_published_ports(kata: Kata, name: str) -> None:
    server = kata.name()
    with started(
        server, "--net", "bridge", "-p", "18080:80", "-p", "127.0.0.1:18081:80", "busybox", "sh", "-c", SERVER
    ):
        assert fetch("10.186.0.1", 18080) == "hello\n"
        assert fetch("127.0.0.1", 18080) == "hello\n"
        assert fetch("127.0.0.1", 18081) == "hello\n"
        row = kata.listed(server)
        assert row["network"] == "bridge"
        assert row["addresses"][0].startswith("10.186.")
        assert row["ports"] == ["0.0.0.0:18080->80/tcp", "127.0.0.1:18081->80/tcp"]
        taken = run("--name", name, "--net", "bridge", "-p", "18080:80", "busybox", "true")
        taken.assert_clean_error()
        assert "cannot publish port 18080/tcp: it is in use" in taken.err


def test_the_default_is_the_bridge(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KATAPOD_NETWORK")
    done = run("--name", name, "busybox", "ip", "-4", "addr", "show", "eth0")
    assert (done.code, done.err) == (0, "")
    assert "inet 10.186." in done.out


def test_the_loopback_of_its_namespace_is_the_guests(name: str) -> None:
    """As port-forwarding finds it with pods: a connection there is one inside."""
    with started(name, "--net", "bridge", "busybox", "sh", "-c", SERVER):
        code = (
            "import socket\n"
            "s = socket.create_connection(('127.0.0.1', 80), 20)\n"
            "s.sendall(b'GET /x\\r\\n\\r\\n')\n"
            "print(s.recv(4096))\n"
        )
        asked = ["nsenter", f"--net=/run/netns/kata-{name}", "--", "python3", "-c", code]
        wait_until(
            "an answer", lambda: subprocess.run(asked, capture_output=True).stdout.startswith(b"b'"), period_s=0.2
        )


def test_no_network(name: str) -> None:
    done = run("--name", name, "--net", "none", "busybox", "ls", "/sys/class/net")
    assert (done.code, done.err, done.out.split()) == (0, "", ["lo"])


def test_names_and_servers(name: str) -> None:
    words = ("--dns", "192.0.2.53", "--add-host", "db:10.9.9.9", "--add-host", "up:host-gateway", "--hostname", "web")
    done = run("--name", name, "--net", "bridge", *words, "busybox", "cat", "/etc/resolv.conf", "/etc/hosts")
    assert (done.code, done.err) == (0, "")
    assert "nameserver 192.0.2.53\n" in done.out
    assert "10.9.9.9\tdb\n10.186.0.1\tup\n" in done.out
    assert "\tweb\n" in done.out


def test_an_address_of_ones_own(name: str) -> None:
    words = ("--ip", "10.186.44.4", "--mac-address", "02:00:5e:00:53:02")
    done = run("--name", name, "--net", "bridge", *words, "busybox", "ip", "addr", "show", "eth0")
    assert (done.code, done.err) == (0, "")
    assert "10.186.44.4/16" in done.out
    assert "02:00:5e:00:53:02" in done.out


def test_a_network_that_does_not_exist(name: str) -> None:
    done = run("--name", name, "--net", "nowhere", "busybox", "true")
    done.assert_clean_error()
    assert "cannot find network nowhere" in done.err
    assert "bridge" in done.err


@pytest.mark.parametrize(
    "words", [("--net", "host"), ("--net", "none", "-p", "80:80"), ("-p", "http"), ("--add-host", "x")], ids=" ".join
)
def test_refused(name: str, words: tuple[str, ...]) -> None:
    run("--name", name, *words, "busybox", "true").assert_clean_error()


def test_missing_plugins_are_named(name: str, tmp_path: Path) -> None:
    config = write_config(tmp_path, katapod={"cni_plugin_dirs": [str(tmp_path)]})
    words = kata_command("--config", str(config), "run", "--rm", "--name", name, "--net", "bridge", "busybox", "true")
    done = subprocess.run(on_host(*words), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 125
    assert "cannot find the CNI plugin bridge" in done.stderr
    assert "containernetworking-plugins" in done.stderr


WATCH = """
import select, socket, sys
def udp(address, port):
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))
    return sock
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("kata0", 0))
places = {udp("127.0.0.1", 7777): "loopback", udp("10.186.0.1", 7777): "gateway", wire: "bridge"}
print("ready", flush=True)
while ready := select.select(list(places), [], [], 60)[0]:
    for sock in ready:
        data, peer = sock.recvfrom(2048)
        mark = data.find(b"mark:")
        if mark >= 0:
            print(places[sock], data[mark + 5 :].split(b";")[0].decode(), flush=True)
"""
"""Says where a frame with a mark has come to."""

SEND = """
import socket, struct, sys
device, own = sys.argv[1:3]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind((device, 0))
mac = wire.getsockname()[4]
gateway = bytes.fromhex(sys.argv[3].replace(":", ""))
def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
def ip4(mark, source, dest):
    text = f"mark:{mark};".encode()
    udp = struct.pack("!HHHH", 9999, 7777, 8 + len(text), 0) + text
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0,
                       socket.inet_aton(source), socket.inet_aton(dest))
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + udp
def send(kind, payload, source=mac, dest=gateway):
    wire.send(dest + source + struct.pack("!H", kind) + payload)
def arp(mark, sender, hardware=mac):
    text = f"mark:{mark};".encode()
    body = struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, hardware, socket.inet_aton(sender), bytes(6),
                       socket.inet_aton("10.186.0.1"))
    return body + text
other = bytes.fromhex("0200000000aa")
for _ in range(3):  # the gateway's bridge learns, and a first frame may come before all is up
    send(0x800, ip4("honest", own, "10.186.0.1"))
    send(0x806, arp("honest-arp", own), dest=b"\\xff" * 6)
    send(0x800, ip4("to-loopback", own, "127.0.0.1"))
    send(0x8100, b"\\0\\0\\x08\\0" + ip4("tagged", own, "127.0.0.1"))
    send(0x8100, b"\\0\\0\\x81\\0\\0\\0\\x08\\0" + ip4("tagged-twice", own, "127.0.0.1"))
    send(0x800, ip4("from-loopback", "127.0.0.1", "10.186.0.1"))
    send(0x800, ip4("another-address", "10.186.200.200", "10.186.0.1"))
    send(0x800, ip4("another-mac", own, "10.186.0.1"), source=other)
    send(0x806, arp("another-arp", "10.186.0.1"), dest=b"\\xff" * 6)
    send(0x806, arp("arp-of-another-mac", own, other), dest=b"\\xff" * 6)
    ip6 = bytes.fromhex("6000000000101140" + 2 * ("fe80" + "00" * 13 + "aa"))
    send(0x86DD, ip6 + b"mark:ipv6;      ")
    send(0x88CC, b"mark:another-kind;" + bytes(40))
send(0x800, ip4("end", own, "10.186.0.1"))
print("sent")
"""
"""Frames of a hostile neighbour: device, its address, the gateway's MAC address."""


@contextlib.contextmanager
def watching() -> Iterator[Callable[[], set[tuple[str, str]]]]:
    """Look at the bridge and the host's sockets; what is returned waits for the last frame and tells of all."""
    with subprocess.Popen(on_host("python3", "-c", WATCH), stdout=subprocess.PIPE, text=True) as watcher:
        try:
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == "ready\n"

            def seen() -> set[tuple[str, str]]:
                found: set[tuple[str, str]] = set()
                assert watcher.stdout is not None
                for line in watcher.stdout:
                    place, mark = line.split()
                    found.add((place, mark))
                    if (place, mark) == ("gateway", "end"):
                        break
                return found - {("gateway", "end"), ("bridge", "end")}

            yield seen
        finally:
            watcher.kill()


@pytest.fixture(scope="module")
def routed_loopback(module_kata: Kata) -> None:
    """A port has been published, so the kernel of the host routes 127.0.0.0/8 that comes in by the bridge."""
    done = run("--name", module_kata.name(), "--net", "bridge", "-p", "18095:80", "busybox", "true")
    assert done.code == 0, done
    assert host("sysctl", "-n", "net.ipv4.conf.kata0.route_localnet") == "1\n"


def gateway_mac() -> str:
    link = json.loads(host("ip", "-j", "link", "show", "kata0"))[0]
    return str(link["address"])


@pytest.mark.usefixtures("routed_loopback")
def test_a_guest_sends_from_its_own_addresses_only(name: str, kata: Kata, debian_rootfs: Path) -> None:
    words = ("--net", "bridge", "--ip", "10.186.55.5", "--rootfs", str(debian_rootfs), "--read-only")
    with watching() as seen:
        done = run("--name", name, *words, "python3", "-c", SEND, "eth0", "10.186.55.5", gateway_mac())
        assert (done.code, done.out) == (0, "sent\n"), done
        found = seen()
    assert found == {("bridge", "honest"), ("gateway", "honest"), ("bridge", "honest-arp")}


@pytest.mark.usefixtures("routed_loopback")
def test_the_host_keeps_its_loopback_from_all_that_is_on_the_bridge(name: str) -> None:
    """Also from what no filter of ours is in front of: here another port of the bridge."""
    other = f"{HOST}-port"
    subprocess.run(["ip", "netns", "add", other], check=True)
    try:
        host("ip", "link", "add", "ktport0", "type", "veth", "peer", "name", "eth0", "netns", other)
        host("ip", "link", "set", "ktport0", "master", "kata0", "up")
        for words in (("addr", "add", "10.186.66.6/16", "dev", "eth0"), ("link", "set", "eth0", "up")):
            subprocess.run(["ip", "-n", other, *words], check=True)
        command = ["ip", "netns", "exec", other, "python3", "-c", SEND, "eth0", "10.186.66.6", gateway_mac()]
        with watching() as seen:
            subprocess.run(command, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
            found = seen()
        assert {mark for place, mark in found if place == "loopback"} == set()
        assert ("gateway", "from-loopback") not in found
        rules = [line for line in host("iptables", "-t", "raw", "-S").splitlines() if "kata0" in line]
        assert sorted(rules) == sorted(guard_rules("kata0")), "once each, however many sandboxes there were"
        assert ("gateway", "honest") in found
        assert ("bridge", "another-address") in found  # so whatever it sends gets that far
    finally:
        subprocess.run(["ip", "netns", "delete", other], check=True)


@pytest.mark.usefixtures("routed_loopback")
def test_a_privileged_guest_finds_no_route_to_the_hosts_loopback(name: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("secret\n")
    server = on_host("python3", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(tmp_path), "7780")
    script = (
        "echo 1 > /proc/sys/net/ipv4/conf/all/route_localnet; ip addr del 127.0.0.1/8 dev lo;"
        "ip route add 127.0.0.1 via 10.186.0.1; ip route get 127.0.0.1;"
        r"printf 'GET /x HTTP/1.0\r\n\r\n' | nc -w 3 127.0.0.1 7780"
    )
    with subprocess.Popen(server, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as serving:
        try:
            assert fetch("127.0.0.1", 7780) == "secret\n"
            done = run("--name", name, "--net", "bridge", "--privileged", "busybox", "sh", "-c", script)
        finally:
            serving.kill()
    assert "via 10.186.0.1" in done.out
    assert "secret" not in done.out
    assert "nc: timed out" in done.err


def attachment_of(name: str) -> dict[str, object]:
    found = record_of(name).get("attachment")
    return found if isinstance(found, dict) else {}


MOMENTS = {
    "recorded": lambda name: bool(record_of(name)),
    "namespace": lambda name: Path(f"/run/netns/kata-{name}").exists(),
    "attached": lambda name: bool(attachment_of(name).get("addresses")),
    "running": lambda name: record_of(name).get("state") == "running",
}


@contextlib.contextmanager
def beside(name: str) -> Iterator[subprocess.Popen[str]]:
    words = ("run", "--rm", "--name", name, "--net", "bridge", "-p", "18090:80", "busybox", "sleep", "1000")
    with subprocess.Popen(
        on_host(*kata_command(*words)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_leaves_nothing(name: str, moment: str) -> None:
    with beside(name) as process:
        wait_until(moment, lambda: MOMENTS[moment](name) or process.poll() is not None, period_s=0.001)
        # a running container's init takes no SIGINT: the second request to end is SIGKILL, the third ends it all
        for _ in range(3):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=180)
                break
        _, said = process.communicate(timeout=LIMIT_S)
        assert "Traceback" not in said
    assert traces(name) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_undoes_what_a_killed_supervisor_left(name: str, moment: str, kata: Kata) -> None:
    with beside(name) as process:
        wait_until(moment, lambda: MOMENTS[moment](name) or process.poll() is not None, period_s=0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=LIMIT_S)
    done = run("--name", kata.name(), "--net", "none", "busybox", "true")
    assert done.code == 0, done
    assert traces(name) == []


def test_what_is_kept_of_a_stopped_container_has_no_network(name: str) -> None:
    words = kata_command("run", "--name", name, "--net", "bridge", "-p", "18091:80", "busybox", "true")
    done = subprocess.run(on_host(*words), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done
    assert record_of(name)["attachment"] is None
    rules = host("iptables-save", "-t", "nat")
    assert f'"{name}"' not in rules
    assert not Path(f"/run/netns/kata-{name}").exists()
    shown = json.loads(subprocess.run(kata_command("list", "--json"), capture_output=True, text=True).stdout)
    assert [row["network"] for row in shown if row["name"] == name] == ["none"]
    assert subprocess.run(kata_command("delete", name), capture_output=True).returncode == 0


@pytest.mark.core
def test_a_machine_of_the_pool_gets_the_network(name: str, kata: Kata, tmp_path: Path) -> None:
    """The pool's server is on the host of the tests, as its clients are."""
    pool = Pool(kata, tmp_path, 1)
    command = on_host(*pool.command())
    with subprocess.Popen([*command, "factory", "init"], stdin=subprocess.DEVNULL) as server:
        try:
            (ready,) = pool.wait_full()
            script = "ip -4 addr show eth0; cat /etc/hosts; ping -c 1 -w 20 10.186.0.1"
            words = ("run", "--name", name, "--net", "bridge", "busybox", "sh", "-c", script)
            done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=LIMIT_S)
            assert (done.returncode, done.stderr) == (0, ""), done
            assert "inet 10.186." in done.stdout
            assert f"\t{name[:63]}\n" in done.stdout
            assert str(record_of(name)["machine_id"]).startswith("pool-")
            assert not Path(f"/proc/{ready}").exists()
        finally:
            server.terminate()
            server.wait(timeout=LIMIT_S)
    assert subprocess.run([*command, "delete", name], capture_output=True).returncode == 0


def test_a_network_that_cannot_be_undone_is_reported_and_tried_again(name: str, kata: Kata, tmp_path: Path) -> None:
    """A plugin that refuses every DEL, and then does not: the sandbox goes, with a word each time."""
    good, programs = tmp_path / "good", tmp_path / "bin"
    programs.mkdir()
    for plugin in ("bridge", "static"):
        (programs / plugin).symlink_to(f"/usr/lib/cni/{plugin}")
    refusing = programs / "refusing"
    refusing.write_text(f'#!/bin/sh\n[ -e {good} ] && exit 0\necho \'{{"code": 100, "msg": "not today"}}\'; exit 1\n')
    refusing.chmod(0o755)
    ipam = {"type": "static", "addresses": [{"address": "10.99.1.7/24"}]}
    chain = [{"type": "bridge", "bridge": "own1", "ipam": ipam}, {"type": "refusing"}]
    (tmp_path / "1.conflist").write_text(json.dumps({"cniVersion": "1.0.0", "name": "odd", "plugins": chain}))
    config = write_config(tmp_path, katapod={"cni_conf_dir": str(tmp_path), "cni_plugin_dirs": [str(programs)]})
    words = kata_command("--config", str(config), "run", "--rm", "--name", name, "--net", "odd", "busybox", "true")
    done = subprocess.run(on_host(*words), capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 125
    said = done.stderr.splitlines()
    assert any(
        "cannot attach to network odd: the CNI plugin refusing failed: not today (code 100)" in line for line in said
    )
    assert any("cannot detach from network odd: the CNI plugin refusing failed" in line for line in said)
    assert record_of(name)["attachment"], "what is not undone has to stay on record"
    again = run("--name", kata.name(), "--net", "none", "busybox", "true")
    assert again.code == 0
    assert f"cannot clean up after {name}" in again.err
    good.touch()
    assert run("--name", kata.name(), "--net", "none", "busybox", "true").err == ""
    assert traces(name) == []


def test_a_network_of_ones_own(kata: Kata, tmp_path: Path) -> None:
    """Made, used by two that reach each other, kept while they run, and gone with its bridge."""
    configured = tmp_path / "net.d"
    config = write_config(tmp_path, katapod={"cni_conf_dir": str(configured)})

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        words = tuple(on_host(*kata_command("--config", str(config), *words)))
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT_S)

    made = call("network", "create", "--subnet", "10.201.7.0/24", "--ip-range", "10.201.7.128/25", "own")
    assert (made.returncode, made.stdout, made.stderr) == (0, "own\n", "")
    name = kata.remove_later(kata.name())
    server = call("run", "-d", "--name", name, "--net", "own", "busybox", "sh", "-c", SERVER)
    assert server.returncode == 0, server
    try:
        (address,) = (row["addresses"][0] for row in json.loads(call("list", "--json").stdout) if row["name"] == name)
        assert address.startswith("10.201.7.1")
        get = f"until wget -q -O - http://{address}/x; do sleep 0.2; done"
        got = call("run", "--rm", "--name", kata.name(), "--net", "own", "busybox", "sh", "-c", get)
        assert (got.returncode, got.stdout) == (0, "hello\n"), got
        refused = call("network", "rm", "own")
        assert (refused.returncode, f"{name} use it" in refused.stderr) == (1, True)
        assert call("network", "prune", "-f").stdout == ""
    finally:
        call("delete", "--force", name)
    assert call("network", "rm", "own").stdout == "own\n"
    assert list(configured.iterdir()) == []
    assert "kata-" not in host("ip", "-brief", "link")
