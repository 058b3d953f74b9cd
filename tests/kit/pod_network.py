"""The network that the pods of a test containerd get, in a network namespace of containerd's own.

    pod --- veth --- kt0 (bridge, gateway) --- veth --- another host
    |                |                                  |
    its own netns    containerd's netns                 a netns made by other_host()

CNI's plugins `bridge`, `host-local` and `portmap` do the work, as on a small cluster's node.
"""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BRIDGE", "GATEWAY", "GATEWAY6", "OtherHost", "in_netns", "open_netns", "other_host", "write_cni_config"]

BRIDGE = "kt0"
GATEWAY, GATEWAY6 = "10.88.7.1", "fd00:88:7::1"
POD_RANGE, POD_RANGE6 = ("10.88.7.10", "10.88.7.199"), ("fd00:88:7::10", "fd00:88:7::199")
HOST_ADDRESS, HOST_ADDRESS6 = "10.88.7.250", "fd00:88:7::250"
NETNS = Path("/run/netns")


def write_cni_config(folder: Path, data: Path, mtu: int = 1500) -> None:
    """The network list that CRI reads from `folder`; host-local keeps its leases below `data`."""
    ranges = [
        [{"subnet": "10.88.7.0/24", "rangeStart": POD_RANGE[0], "rangeEnd": POD_RANGE[1], "gateway": GATEWAY}],
        [{"subnet": "fd00:88:7::/64", "rangeStart": POD_RANGE6[0], "rangeEnd": POD_RANGE6[1], "gateway": GATEWAY6}],
    ]
    ipam = {
        "type": "host-local",
        "dataDir": str(data),
        "ranges": ranges,
        "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
    }
    bridge = {"type": "bridge", "bridge": BRIDGE, "isGateway": True, "hairpinMode": True, "mtu": mtu, "ipam": ipam}
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}, "snat": True}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"cniVersion": "0.4.0", "name": "katapod-tests", "plugins": [bridge, portmap]}
    (folder / "10-katapod-tests.conflist").write_text(json.dumps(config, indent=1))


def in_netns(name: str, command: Sequence[str]) -> list[str]:
    """`command` inside. `ip netns exec` would mount a new /sys, without the cgroups below it."""
    return ["nsenter", f"--net={NETNS / name}", "--", *command]


@contextlib.contextmanager
def open_netns(name: str) -> Iterator[None]:
    """A network namespace with nothing but its loopback."""
    _ip("netns", "add", name)
    try:
        _run(in_netns(name, ["ip", "link", "set", "lo", "up"]))
        yield
    finally:
        _ip("netns", "delete", name)


@dataclass(frozen=True, slots=True)
class OtherHost:
    """A machine beside the pods, on the same bridge."""

    netns: str
    address: str
    address6: str

    def command(self, *command: str) -> list[str]:
        return in_netns(self.netns, command)

    def run(self, *command: str, timeout: float = 180) -> str:
        """Run a command there that has to succeed; returns what it said on both streams."""
        done = subprocess.run(
            self.command(*command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, f"{command} on the other host: status {done.returncode}: {done.stdout}"
        return done.stdout


@contextlib.contextmanager
def other_host(bridge_netns: str, mtu: int = 1500) -> Iterator[OtherHost]:
    """Another host on the bridge of the pods, which must be there: after the first pod has been started."""
    name = f"{bridge_netns}h"
    with open_netns(name):
        ends = ["type", "veth", "peer", "name", "eth0", "netns", name]
        _run(in_netns(bridge_netns, ["ip", "link", "add", "kth0", "mtu", str(mtu), *ends]))
        _run(in_netns(bridge_netns, ["ip", "link", "set", "kth0", "master", BRIDGE, "up"]))
        _run(in_netns(name, ["ip", "link", "set", "eth0", "mtu", str(mtu), "up"]))
        _run(in_netns(name, ["ip", "address", "add", f"{HOST_ADDRESS}/24", "dev", "eth0"]))
        # duplicate address detection would keep it from use for a second or two
        _run(in_netns(name, ["ip", "address", "add", f"{HOST_ADDRESS6}/64", "dev", "eth0", "nodad"]))
        yield OtherHost(name, HOST_ADDRESS, HOST_ADDRESS6)


def _ip(*args: str) -> None:
    _run(["ip", *args])


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0:
        raise AssertionError(f"cannot run {' '.join(command)}: {done.stderr.strip()}")
