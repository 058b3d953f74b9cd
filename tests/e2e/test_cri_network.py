"""The network of pods: from another host on the bridge, from pod to pod, outwards, and by a port of the node."""

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest
from faults import vmm_of

from kit.cri import Cri, Pod
from kit.cri_stream import connect_inside
from kit.kata import wait_for
from kit.large import LARGE
from kit.pod_network import GATEWAY, GATEWAY6, other_host, write_cni_config

SLEEP = ("sleep", "100000")
MUCH_MIB = 1024 if LARGE else 64
LINE = b"what the pod says\n"


def listen(pod: Pod, port: int, answer: str) -> str:
    """A container that answers each connection to a port with a line."""
    container = pod.start("nc", "-ll", "-p", str(port), "-e", "echo", answer)
    wait_for(lambda: f":{port} " in pod.sh(container, "netstat -ltn"), "it listens")
    return container


@pytest.mark.reference
def test_addresses(pod: Pod) -> None:
    """What CNI gave is what the CRI tells, and what the container has on eth0."""
    container = pod.start(*SLEEP)
    inside = pod.sh(container, "ip -o address show dev eth0")
    routes = pod.sh(container, "ip route") + pod.sh(container, "ip -6 route")
    four, six = pod.addresses
    assert f"inet {four}/24" in inside
    assert f"inet6 {six}/64" in inside
    assert f"default via {GATEWAY} " in routes
    assert f"default via {GATEWAY6} " in routes
    assert "LOOPBACK,UP" in pod.sh(container, "ip link show lo")


@pytest.mark.reference
def test_from_and_to_another_host(pod: Pod) -> None:
    container = listen(pod, 8080, "from the pod")
    with other_host(pod.cri.node.netns) as host:
        four, six = pod.addresses
        for address in (four, six):
            host.run("busybox", "ping", "-c", "3", "-W", "20", address)
            assert host.run("busybox", "nc", "-w", "20", address, "8080") == "from the pod\n"
        for address in (host.address, host.address6, GATEWAY, GATEWAY6):
            pod.sh(container, f"ping -c 3 -W 20 {address}")
        server = host.command("busybox", "nc", "-l", "-p", "9090", "-e", "echo", "from the host")
        with subprocess.Popen(server) as process:
            wait_for(lambda: ":9090 " in host.run("busybox", "netstat", "-ltn"), "the host listens")
            assert pod.sh(container, f"nc -w 20 {host.address} 9090") == "from the host\n"
            assert process.wait(180) == 0


@pytest.mark.reference
def test_pod_to_pod(cri: Cri) -> None:
    server, client = cri.run_pod(), cri.run_pod()
    listen(server, 8080, "from the other pod")
    container = client.start(*SLEEP)
    for address in server.addresses:
        assert client.sh(container, f"nc -w 20 {address} 8080") == "from the other pod\n"


@pytest.mark.reference
def test_much_each_way(cri: Cri) -> None:
    """Equal checksums, and all of it goes by the pod's interface and the tap, whose filters count it."""
    pod = cri.run_pod()
    to_sum, source = "nc -ll -p 8080 -e md5sum", f"nc -ll -p 8081 -e sh -c 'yes {LINE.decode().strip()}'"
    container = pod.start("sh", "-c", f"{to_sum} & {source} & sleep 100000")
    wait_for(lambda: pod.sh(container, "netstat -ltn").count(":808") == 2, "they listen")
    block, address = os.urandom(1 << 20), pod.addresses[0]
    with other_host(cri.node.netns) as host:
        began = time.monotonic()
        with connect_inside(host.netns, address, 8080) as peer:
            for _ in range(MUCH_MIB):
                peer.sendall(block)
            peer.shutdown(socket.SHUT_WR)
            said = peer.recv(100).decode().split()[0]
        assert said == hashlib.md5(block * MUCH_MIB).hexdigest()
        middle = time.monotonic()
        heard, wanted = hashlib.md5(), hashlib.md5()
        size = (MUCH_MIB << 20) // len(LINE) * len(LINE)
        with connect_inside(host.netns, address, 8081) as peer:
            left = size
            while left and (data := peer.recv(min(left, 1 << 20))):
                heard.update(data)
                left -= len(data)
        for _ in range(size // len(LINE) // 1024):
            wanted.update(LINE * 1024)
        wanted.update(LINE * (size // len(LINE) % 1024))
        assert (left, heard.hexdigest()) == (0, wanted.hexdigest())
    print(f"{MUCH_MIB} MiB in: {middle - began:.1f} s, out: {time.monotonic() - middle:.1f} s")
    if cri.handler == "kata":
        assert os.stat(f"/proc/{vmm_of(pod.id)}/ns/net").st_ino == os.stat(pod.netns).st_ino
        assert redirected(pod, "eth0") > MUCH_MIB << 20
        assert redirected(pod, "tap0_kata") > MUCH_MIB << 20


def redirected(pod: Pod, device: str) -> int:
    """Bytes that the device's filter has counted."""
    command = [f"--net={pod.netns}", "tc", "-s", "-j", "filter", "show", "dev", device, "ingress"]
    done = subprocess.run(["nsenter", *command], check=True, capture_output=True, text=True)
    actions = [action for entry in json.loads(done.stdout) for action in entry.get("options", {}).get("actions", ())]
    return sum(int(action["stats"]["bytes"]) for action in actions)


@pytest.fixture
def jumbo(cri: Cri) -> Iterator[int]:
    """The CNI network has this MTU while the test runs. containerd reads the files of CNI when they change."""
    node = cri.node

    def give(mtu: int) -> None:
        write_cni_config(node.run_dir / "cni", node.data_dir / "leases", mtu=mtu)
        known = f'\\"mtu\\": {mtu},'  # it quotes the file
        wait_for(lambda: known in str(cri("Status", verbose=True).info["cniconfig"]), f"CNI has the MTU {mtu}")

    give(9000)
    yield 9000
    give(1500)


@pytest.mark.reference
def test_jumbo_frames(cri: Cri, jumbo: int) -> None:
    """Full frames, which nobody may cut, both ways; and answers as large, since the guest has the MTU too."""
    pod = cri.run_pod()
    container = pod.start(*SLEEP)
    devices = ["eth0", "tap0_kata"] if cri.handler == "kata" else ["eth0"]
    for device in devices:
        command = ["nsenter", f"--net={pod.netns}", "ip", "link", "show", device]
        assert f" mtu {jumbo} " in subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert f" mtu {jumbo} " in pod.sh(container, "ip link show eth0")
    four, six = pod.addresses
    with other_host(cri.node.netns, mtu=jumbo) as host:
        for address, payload, peer in ((four, jumbo - 28, host.address), (six, jumbo - 48, host.address6)):
            said = host.run("ping", "-M", "do", "-c", "2", "-W", "20", "-s", str(payload), address)
            assert f"{payload + 8} bytes from {address}" in said
            pod.sh(container, f"ping -c 2 -W 20 -s {payload} {peer}")


def test_containers_share_the_network(pod: Pod) -> None:
    listen(pod, 8080, "from beside")
    container = pod.start(*SLEEP)
    assert pod.sh(container, "nc -w 20 127.0.0.1 8080") == "from beside\n"
    assert pod.sh(container, "nc -w 20 ::1 8080") == "from beside\n"


@pytest.mark.reference
def test_host_port(cri: Cri) -> None:
    pod = cri.run_pod(port_mappings=[{"protocol": 0, "container_port": 8080, "host_port": 18080}])
    listen(pod, 8080, "through the node")
    with other_host(cri.node.netns) as host:
        assert host.run("busybox", "nc", "-w", "20", GATEWAY, "18080") == "through the node\n"


def test_network_outlives_its_containers(cri: Cri) -> None:
    """The address belongs to the sandbox: it stays when the workload is restarted."""
    pod = cri.run_pod()
    before = pod.addresses
    pod.remove_container(listen(pod, 8080, "first"))
    listen(pod, 8080, "second")
    assert pod.addresses == before
    with other_host(cri.node.netns) as host:
        assert host.run("busybox", "nc", "-w", "20", before[0], "8080") == "second\n"


def test_a_stopped_pod_gives_its_address_back(cri: Cri) -> None:
    pod = cri.run_pod()
    address = pod.addresses[0]
    listen(pod, 8080, "here")
    leases = cri.node.data_dir / "leases" / "katapod-tests"
    assert (leases / address).exists()
    pod.stop_and_remove()
    assert not (leases / address).exists()
    with pytest.raises(OSError):
        connect_inside(cri.node.netns, address, 8080)
