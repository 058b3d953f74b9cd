"""The network of pods: from another host on the bridge, from pod to pod, outwards, and by a port of the node."""

import subprocess

import pytest

from kit.cri import Cri, Pod
from kit.cri_stream import connect_inside
from kit.kata import wait_for
from kit.pod_network import GATEWAY, GATEWAY6, other_host

SLEEP = ("sleep", "100000")


def listen(pod: Pod, port: int, answer: str) -> str:
    """A container that answers each connection to a port with a line."""
    container = pod.start("nc", "-ll", "-p", str(port), "-e", "echo", answer)
    wait_for(lambda: f":{port} " in pod.sh(container, "netstat -ltn"), "it listens", 60)
    return container


@pytest.mark.reference
def test_addresses(cri: Cri) -> None:
    """What CNI gave is what the CRI tells, and what the container has on eth0."""
    pod = cri.run_pod()
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
def test_from_and_to_another_host(cri: Cri) -> None:
    pod = cri.run_pod()
    container = listen(pod, 8080, "from the pod")
    with other_host(cri.node.netns) as host:
        four, six = pod.addresses
        for address in (four, six):
            host.run("busybox", "ping", "-c", "3", "-W", "20", address)
            assert host.run("busybox", "nc", "-w", "20", address, "8080") == "from the pod\n"
        for address in (host.address, host.address6, GATEWAY, GATEWAY6):
            pod.sh(container, f"ping -c 3 -W 20 {address}")
        server = host.command("busybox", "nc", "-l", "-p", "9090", "-e", "echo", "from the host")
        with subprocess.Popen(server) as process:
            wait_for(lambda: ":9090 " in host.run("busybox", "netstat", "-ltn"), "the host listens", 30)
            assert pod.sh(container, f"nc -w 20 {host.address} 9090") == "from the host\n"
            assert process.wait(30) == 0


@pytest.mark.reference
def test_pod_to_pod(cri: Cri) -> None:
    server, client = cri.run_pod(), cri.run_pod()
    listen(server, 8080, "from the other pod")
    container = client.start(*SLEEP)
    for address in server.addresses:
        assert client.sh(container, f"nc -w 20 {address} 8080") == "from the other pod\n"


def test_containers_share_the_network(cri: Cri) -> None:
    pod = cri.run_pod()
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
