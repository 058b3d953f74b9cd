"""The built-in network: a bridge on the host with a private subnet, behind the host's addresses. Pure."""

import ipaddress
from collections.abc import Iterable

from katapod.model.cni import NetworkConfig, PluginConfig
from katapod.model.errors import HostLacks

__all__ = ["BRIDGE", "BRIDGE_DEVICE", "LEASES", "choose_subnet", "plan_bridge"]

BRIDGE = "bridge"
BRIDGE_DEVICE = "kata0"
LEASES = "/run/katapod/networks"
"""Where host-local keeps its leases: gone after a restart of the host, as their holders are."""

_CANDIDATES = (
    *(f"10.{number}.0.0/16" for number in range(186, 200)),
    *(f"172.{number}.0.0/16" for number in range(28, 32)),
    *(f"192.168.{number}.0/24" for number in range(186, 200)),
)
"""In this order. None is the first choice of Docker (172.17), Podman (10.88), Kubernetes (10.244) or home routers."""


def choose_subnet(taken: Iterable[str]) -> str:
    """The first candidate that does not overlap the networks and addresses `taken`. Raises HostLacks."""
    others = [ipaddress.ip_network(one, strict=False) for one in taken]
    for candidate in _CANDIDATES:
        network = ipaddress.ip_network(candidate)
        if not any(network.overlaps(other) for other in others if other.version == 4):
            return candidate
    raise HostLacks(
        f"cannot make network {BRIDGE}: the host has routes into all private subnets that it could have",
        hint="configure a network with a subnet of your choice in /etc/cni/net.d, and name it with --net",
    )


def plan_bridge(subnet: str, *, firewall: bool, publish: bool) -> NetworkConfig:
    """The plugins of the built-in network. `firewall`: the host filters what it forwards, so that it has to be told
    to let ours pass. Every plugin costs some 30 ms, so those that have nothing to do are left out."""
    bridge = PluginConfig(
        type="bridge",
        capabilities=("ips", "mac"),
        settings={
            "bridge": BRIDGE_DEVICE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,  # a container reaches itself through its published port
            "ipam": {
                "type": "host-local",
                "dataDir": LEASES,
                "ranges": [[{"subnet": subnet}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
    )
    plugins = [bridge]
    if publish:
        plugins.append(PluginConfig(type="portmap", capabilities=("portMappings",), settings={"snat": True}))
    if firewall:
        plugins.append(PluginConfig(type="firewall", settings={"backend": "iptables"}))
    return NetworkConfig(name=BRIDGE, cni_version="1.0.0", plugins=tuple(plugins))
