"""`run` with networks, in a network namespace of the tests' own that plays the host: bridge kata0 is made in there."""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Finished, leftovers, record_of, wait_until, write_config

from kit.kata import RUN_PREFIX, Kata
from kit.templates import kata_command

HOST = f"{RUN_PREFIX}host"
NETNS = Path("/run/netns", HOST)
SERVER = "mkdir /w; echo hello > /w/x; httpd -f -p 80 -h /w"
LIMIT_S = 90.0


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
        f"sys.stdout.write(opener.open('http://{address}:{port}/x', timeout=20).read().decode())\n"
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


@pytest.mark.smoke
def test_it_reaches_the_host_and_another_container(name: str, kata: Kata) -> None:
    other = kata.name()
    with started(other, "--net", "bridge", "busybox", "sh", "-c", SERVER) as address:
        script = f"nproc; ping -c 1 -w 20 10.186.0.1 && ping -c 1 -w 20 {address} && wget -q -O - http://{address}/x"
        done = run("--name", name, "--cpus", "2", "--net", "bridge", "busybox", "sh", "-c", script)
        assert (done.code, done.err) == (0, ""), done
        assert done.out.startswith("2\n")
        assert done.out.endswith("hello\n")


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
                process.wait(timeout=15)
                break
        _, said = process.communicate(timeout=LIMIT_S)
        assert "Traceback" not in said
    assert traces(name) == []


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_next_run_undoes_what_a_killed_owner_left(name: str, moment: str, kata: Kata) -> None:
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


def test_a_machine_of_the_pool_gets_the_network(name: str, kata: Kata, tmp_path: Path) -> None:
    """The pool's server is on the host of the tests, as its clients are."""
    endpoint = tmp_path / "cache.sock"
    config = write_config(tmp_path, factory={"vm_cache_number": 1, "vm_cache_endpoint": str(endpoint)})
    command = on_host(*kata_command("--config", str(config)))

    def machines() -> list[dict[str, int]]:
        said = subprocess.run([*command, "factory", "status", "--json"], capture_output=True, text=True, check=True)
        cache = json.loads(said.stdout)["cache"]
        return list(cache["vms"]) if cache else []

    with subprocess.Popen([*command, "factory", "init"], stdin=subprocess.DEVNULL) as server:
        try:
            wait_until("a machine that is ready", machines, limit_s=120, period_s=0.2)
            ready = machines()[0]["pid"]
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
