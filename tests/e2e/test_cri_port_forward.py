"""What a forwarded port has to bear. The connections are made where container engines make them: on the host, in the
pod's network namespace, to its loopback. Through an engine: test_cri_exec.py."""

import contextlib
import hashlib
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kit.containerd import K8S
from kit.cri import Cri, Pod
from kit.cri_stream import connect_inside
from kit.kata import wait_for
from kit.large import LARGE

ECHO, SUM, SOURCE, SINK, NOBODY = range(9001, 9006)
SERVERS = (
    f"nc -ll -p {ECHO} -e cat & nc -ll -p {SUM} -e md5sum & nc -ll -p {SOURCE} -e cat /dev/zero & "
    f"nc -ll -p {SINK} -e sh -c 'echo here; exec sleep 100001' & sleep 100000"
)
MUCH_MIB = 100 if LARGE else 16
AT_ONCE = 20
CONNECTIONS_MAX = 64
STUFFED_MAX = 32 << 20  # bytes that a connection takes although nobody reads them, all buffers together
MEMORY_KIB = 16 << 10
TASKS = "state/io.containerd.runtime.v2.task"


@pytest.fixture(autouse=True)
def _only_kata(handler: str) -> None:
    if handler != "kata":
        pytest.skip("what carries into a virtual machine")


@pytest.fixture
def pod(cri: Cri) -> Pod:
    """With servers on ECHO, SUM, SOURCE, which sends zeros for ever, and SINK, which reads nothing and ends never.

    Their queues hold two connections: tests wait for a first answer on each before they make more.
    """
    pod = cri.run_pod()
    container = pod.start("sh", "-c", SERVERS, name="servers")
    wait_for(lambda: pod.sh(container, "netstat -ltn").count(":900") == 4, "they listen")
    return pod


def connect(pod: Pod, port: int, host: str = "127.0.0.1") -> socket.socket:
    return connect_inside(os.path.basename(pod.netns), host, port)


def read_all(peer: socket.socket) -> bytes:
    return b"".join(iter(lambda: peer.recv(1 << 20), b""))


def shim_kib(pod: Pod) -> int:
    """What the pod's shim has resident."""
    pid = (pod.cri.node.run_dir / TASKS / K8S / pod.id / "shim.pid").read_text()
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def send_and_hear_sum(pod: Pod) -> None:
    """All of it, then the end of the stream in one direction, then what comes in the other."""
    block = os.urandom(1 << 20)
    with connect(pod, SUM) as peer:
        for _ in range(MUCH_MIB):
            peer.sendall(block)
        peer.shutdown(socket.SHUT_WR)
        said = read_all(peer).decode().split()[0]
    assert said == hashlib.md5(block * MUCH_MIB).hexdigest()


def open_echo(pod: Pod, host: str = "127.0.0.1") -> socket.socket:
    with contextlib.ExitStack() as until_it_echoes:
        peer = until_it_echoes.enter_context(connect(pod, ECHO, host))
        peer.sendall(b"x")
        assert peer.recv(1) == b"x"
        until_it_echoes.pop_all()
    return peer


def echo(peer: socket.socket, kib: int = 64) -> None:
    """Both directions at once, and to the end."""
    sent = os.urandom(kib << 10)
    with peer, ThreadPoolExecutor(1) as reader:
        heard = reader.submit(read_all, peer)
        peer.sendall(sent)
        peer.shutdown(socket.SHUT_WR)
        assert heard.result() == sent


def open_sink(pod: Pod) -> socket.socket:
    with contextlib.ExitStack() as until_it_speaks:
        peer = until_it_speaks.enter_context(connect(pod, SINK))
        assert peer.recv(5) == b"here\n"
        until_it_speaks.pop_all()
    return peer


def expect_refusal(pod: Pod, host: str = "127.0.0.1", port: int = NOBODY) -> None:
    """The reset may be there before the connecting thread has run again: then it is `connect` that reports it."""
    began = time.monotonic()
    with pytest.raises(ConnectionResetError), connect(pod, port, host) as peer:
        peer.recv(1)
    assert time.monotonic() - began < 180


def test_much_and_many(pod: Pod) -> None:
    before = shim_kib(pod)
    send_and_hear_sum(pod)
    with connect(pod, SOURCE) as peer:
        got = 0
        while got < MUCH_MIB << 20:
            data = peer.recv(1 << 20)
            assert data.count(0) == len(data) > 0
            got += len(data)
    peers = [open_echo(pod, "::1" if number % 2 else "127.0.0.1") for number in range(AT_ONCE)]
    with ThreadPoolExecutor(AT_ONCE) as clients:
        for one in [clients.submit(echo, peer, 64 + number) for number, peer in enumerate(peers)]:
            one.result()
    for host in ("127.0.0.1", "127.1.2.3", "::1"):
        expect_refusal(pod, host)
    assert shim_kib(pod) < before + MEMORY_KIB


def test_who_does_not_read(pod: Pod) -> None:
    """Neither end makes anybody hold more than buffers; exec goes on; what stands makes way for what comes."""
    container = pod.start("sleep", "100000", name="other")
    before = shim_kib(pod)
    with contextlib.ExitStack() as peers:
        for _ in range(3):
            assert stuff(peers.enter_context(open_sink(pod))) < STUFFED_MAX
            peers.enter_context(connect(pod, SOURCE))  # it sends, and we do not read
        assert pod.sh(container, "echo well") == "well\n"
        echo(open_echo(pod))
        assert shim_kib(pod) < before + MEMORY_KIB

        for _ in range(CONNECTIONS_MAX):  # whose clients have ended their stream, while the server does not care
            peers.enter_context(open_sink(pod)).shutdown(socket.SHUT_WR)
        echo(open_echo(pod))  # they hold a place only until it is needed
    wait_for(lambda: "\ncat /dev/zero" not in pod.sh(container, "ps -o args"), "the senders end")


def stuff(peer: socket.socket) -> int:
    """Send until nothing more is taken; returns how much was."""
    peer.settimeout(3)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < STUFFED_MAX:
            sent += peer.send(bytes(1 << 20))
    return sent


def test_too_many(pod: Pod) -> None:
    with contextlib.ExitStack() as peers:
        for _ in range(CONNECTIONS_MAX):
            peers.enter_context(open_sink(pod))
        expect_refusal(pod, port=SINK)
    wait_for(lambda: is_served(pod), "there is room again")


def is_served(pod: Pod) -> bool:
    try:
        echo(open_echo(pod))
    except ConnectionError:
        return False
    return True
