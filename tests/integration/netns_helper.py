"""Pods' network namespaces for tests, each wired to a peer namespace, and what to look for in them."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def ip(*arguments: str, netns: str = "") -> str:
    command = ["ip", *(["-n", netns] if netns else []), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def inside(netns: str, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    entered = ["nsenter", f"--net=/run/netns/{netns}", *command]
    return subprocess.run(entered, check=check, capture_output=True, text=True, timeout=180, **options)


def links(netns: str) -> list[str]:
    return sorted(link["ifname"] for link in json.loads(ip("-j", "link", netns=netns)))


def qdiscs(netns: str) -> list[str]:
    """Those that somebody has set, as "device kind"."""
    found = json.loads(inside(netns, "tc", "-j", "qdisc", "show").stdout)
    return sorted(f"{entry['dev']} {entry['kind']}" for entry in found if entry["kind"] in ("ingress", "htb", "clsact"))


def redirected_bytes(netns: str, device: str) -> int:
    """What the device's u32 filter has redirected."""
    found = json.loads(inside(netns, "tc", "-s", "-j", "filter", "show", "dev", device, "ingress").stdout)
    assert {entry["kind"] for entry in found} == {"u32"}
    return sum(
        int(action["stats"]["bytes"]) for entry in found for action in entry.get("options", {}).get("actions", ())
    )


@dataclass(frozen=True)
class Pod:
    """A pod's namespace and the namespace at the other ends of its veths."""

    netns: str
    peer: str

    @property
    def path(self) -> Path:
        return Path("/run/netns") / self.netns

    @property
    def inode(self) -> int:
        return os.stat(self.path).st_ino

    def plug(self, name: str, number: int, *, mtu: int = 1500, mac: str = "") -> None:
        """A veth: 10.97.NUMBER.2 in the pod, 10.97.NUMBER.1 in the peer, and the same with fd97::NUMBER:."""
        there = f"p{number}"
        ip("link", "add", name, "mtu", str(mtu), "type", "veth", "peer", there, "mtu", str(mtu), netns=self.netns)
        ip("link", "set", there, "netns", self.peer, netns=self.netns)
        if mac:
            ip("link", "set", name, "address", mac, netns=self.netns)
        self._address(name, there, number)

    def plug_child(self, kind: str, mode: str, name: str, number: int) -> None:
        """As plug, by a macvlan or ipvlan whose parent, in the peer's namespace without an address, is wired to the
        peer. Raises CalledProcessError if the kernel has none of that kind."""
        there, parent = f"p{number}", f"m{number}"
        ip("link", "add", parent, "type", "veth", "peer", there, netns=self.peer)
        ip("link", "set", parent, "up", netns=self.peer)
        ip("link", "add", "link", parent, "name", name, "type", kind, "mode", mode, netns=self.peer)
        ip("link", "set", name, "netns", self.netns, netns=self.peer)
        self._address(name, there, number)

    def _address(self, name: str, there: str, number: int) -> None:
        for netns, device, last in ((self.netns, name, 2), (self.peer, there, 1)):
            ip("addr", "add", f"10.97.{number}.{last}/24", "brd", "+", "dev", device, netns=netns)
            ip("addr", "add", f"fd97:0:0:{number}::{last}/64", "dev", device, "nodad", netns=netns)
            ip("link", "set", device, "up", netns=netns)


@contextmanager
def pod(name: str) -> Iterator[Pod]:
    made = Pod(f"kt-{name}-{os.getpid()}", f"kt-{name}-{os.getpid()}-peer")
    try:
        for netns in (made.netns, made.peer):
            ip("netns", "add", netns)
            ip("link", "set", "lo", "up", netns=netns)
        yield made
    finally:
        for netns in (made.netns, made.peer):
            subprocess.run(["ip", "netns", "del", netns], check=False, capture_output=True)
