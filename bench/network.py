"""Networks: a pod of runc, one of Katapod, and a guest that QEMU runs by hand, each asked by a host beside it.

    asking host (netns) --- veth --- the pod's netns: a process of runc's
                                     or eth0 <- tc, both ways -> tap <- virtio-net -> guest

The asking host sends, receives and pings; who answers runs the same two commands of busybox in all three.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.by_hand import initrd_with
from bench.containerd import Ctr
from bench.measure import BenchError, execute, quietly
from bench.raw_boot import RawBoot, bare_qemu

__all__ = [
    "BY_HAND_NET",
    "SERVE",
    "NetReadings",
    "PodNetns",
    "by_hand_net_initrd",
    "guest_by_hand",
    "pod_of",
    "readings",
]

BY_HAND_NET = "QEMU, tap by hand"
SENT_MB = 96
IN_PORT, OUT_PORT = 5001, 5002
POD, ASKING, PREFIX = "10.89.3.2", "10.89.3.1", 24
MEMORY_MIB = 256
PINGS = 200
REACH_LIMIT_S = 60.0
SERVE = (
    f"(while :; do nc -l -p {IN_PORT} >/dev/null; done) & "
    f"(while :; do nc -l -p {OUT_PORT} </dev/zero 2>/dev/null; done) & wait"
)


@dataclass(frozen=True)
class NetReadings:
    """MB/s into and out of the pod; median of the round trip in ms."""

    into: float
    out_of: float
    round_trip_ms: float


@dataclass(frozen=True)
class PodNetns:
    """Two network namespaces and the veth pair between them."""

    pod: str
    asking: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.pod}"

    def in_pod(self, *command: str) -> list[str]:
        return ["nsenter", f"--net={self.path}", "--", *command]

    def asked(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.asking}", "--", *command]


@contextlib.contextmanager
def pod_netns() -> Iterator[PodNetns]:
    """Both are gone at the end of the block. Raises BenchError."""
    names = PodNetns(f"bench-{os.getpid()}-pod", f"bench-{os.getpid()}-ask")
    with contextlib.ExitStack() as stack:
        for name in (names.pod, names.asking):
            execute(["ip", "netns", "add", name])
            stack.callback(quietly, ["ip", "netns", "delete", name])
        pair = ["eth0", "type", "veth", "peer", "name", "eth0", "netns", names.asking]
        execute(names.in_pod("ip", "link", "add", *pair))
        for address, command in ((POD, names.in_pod), (ASKING, names.asked)):
            execute(command("ip", "address", "add", f"{address}/{PREFIX}", "dev", "eth0"))
            for link in ("lo", "eth0"):
                execute(command("ip", "link", "set", link, "up"))
        yield names


def readings(netns: PodNetns) -> NetReadings:
    """Ask who serves in the pod, once it answers. Raises BenchError."""
    outcome = execute(netns.asked(sys.executable, "-m", "bench.network"))
    figures = json.loads(outcome.lines[-1][1])
    pings = execute(netns.asked("ping", "-n", "-i", "0.002", "-c", str(PINGS), POD))
    trips = [float(line.partition("time=")[2].split()[0]) for _, line in pings.lines if "time=" in line]
    if not trips:
        raise BenchError(f"{pings.command}: no answer")
    return NetReadings(figures["into"], figures["out_of"], median(trips))


@contextlib.contextmanager
def pod_of(contestant: Ctr) -> Iterator[PodNetns]:
    """A container of containerd in the namespace, serving, until the end of the block. Raises BenchError."""
    with pod_netns() as netns:
        name = contestant.new_id()
        try:
            execute(contestant.run_in_netns(name, netns.path, ("sh", "-c", SERVE)))
            yield netns
        finally:
            quietly(contestant.delete(name))


# By hand


def by_hand_net_initrd(rootfs: Path, folder: Path, version: str) -> Path:
    """The benchmark's root file system as an initrd that gives its NIC the pod's address, and serves."""
    root = folder / "by-hand-net"
    shutil.copytree(rootfs, root, symlinks=True)
    addressed = f"ip link set eth0 up && ip address add {POD}/{PREFIX} dev eth0 || poweroff -f"
    return initrd_with(root, version, ("virtio_pci", "virtio_net"), [addressed, SERVE])


@contextlib.contextmanager
def guest_by_hand(raw: RawBoot, initrd: Path) -> Iterator[PodNetns]:
    """QEMU in the pod's namespace, its tap and the veth joined by tc as in the walkthrough. Raises BenchError."""
    with pod_netns() as netns:
        execute(netns.in_pod("ip", "address", "flush", "dev", "eth0"))
        execute(netns.in_pod("ip", "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr"))
        execute(netns.in_pod("ip", "link", "set", "tap0", "up"))
        for source, target in (("eth0", "tap0"), ("tap0", "eth0")):
            execute(netns.in_pod("tc", "qdisc", "add", "dev", source, "ingress"))
            match = ["protocol", "all", "u32", "match", "u8", "0", "0"]
            action = ["action", "mirred", "egress", "redirect", "dev", target]
            execute(netns.in_pod("tc", "filter", "add", "dev", source, "parent", "ffff:", *match, *action))
        links = json.loads("".join(line for _, line in execute(netns.in_pod("ip", "-j", "link", "show", "eth0")).lines))
        qemu = subprocess.Popen(
            netns.in_pod(*_qemu(raw, initrd, links[0]["address"])),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield netns
        finally:
            qemu.kill()
            qemu.wait()


def _qemu(raw: RawBoot, initrd: Path, mac: str) -> list[str]:
    kernel = raw.kernels.get("PVH", raw.kernels["bzImage"])
    return [
        *bare_qemu(raw.accelerator, MEMORY_MIB),
        *("-netdev", "tap,id=net,ifname=tap0,script=no,downscript=no,vhost=off"),
        *("-device", f"virtio-net-pci,netdev=net,mac={mac}"),
        *("-kernel", str(kernel)),
        *("-initrd", str(initrd)),
        *("-append", "quiet panic=1"),
    ]


# What the asking host runs


def _connect(port: int) -> socket.socket:
    deadline = time.monotonic() + REACH_LIMIT_S
    while True:
        try:
            return socket.create_connection((POD, port), timeout=REACH_LIMIT_S)
        except OSError:  # no guest yet, or nc between two calls
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _send(megabytes: int) -> float:
    block = bytes(1_000_000)
    with _connect(IN_PORT) as link:
        began = time.monotonic()
        for _ in range(megabytes):
            link.sendall(block)
        link.shutdown(socket.SHUT_WR)
        while link.recv(65536):  # its end says that all was taken
            pass
        return megabytes / (time.monotonic() - began)


def _receive(megabytes: int) -> float:
    buffer = bytearray(1 << 20)
    with _connect(OUT_PORT) as link:
        began, left = time.monotonic(), megabytes * 1_000_000
        while left > 0:
            taken = link.recv_into(buffer)
            if not taken:
                raise OSError("the pod ended its stream")
            left -= taken
        return megabytes / (time.monotonic() - began)


def _measured(one: Callable[[int], float]) -> float:
    one(8)  # what is loaded at the first use is not measured
    return max(one(SENT_MB) for _ in range(2))  # of two, the one that was disturbed less


if __name__ == "__main__":
    print(json.dumps({"into": _measured(_send), "out_of": _measured(_receive)}))
