"""The record of a sandbox's network: enough for a fresh process to undo it."""

from typing import Any

from msgspec import Struct

from katapod.model.cni import NetworkConfig

__all__ = ["AttachmentRecord", "PublishedPort"]


class PublishedPort(Struct, frozen=True, forbid_unknown_fields=True):
    """A port of the host that leads to one of the container. `host_ip`: empty means all addresses."""

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_ip: str = ""

    def __str__(self) -> str:
        host = f"[{self.host_ip}]" if ":" in self.host_ip else self.host_ip or "0.0.0.0"  # noqa: S104 - shown only
        return f"{host}:{self.host_port}->{self.container_port}/{self.protocol}"


class AttachmentRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """A sandbox on a network, written before it is attached.

    `config` is what ADD was called with, since its file may have changed by the time of DEL. The plugins work in the
    network namespace of who calls them, beside the sandbox's own: `host_netns` tells which that was (device:inode).
    """

    config: NetworkConfig
    netns: str  # path of the sandbox's network namespace
    plugin_dirs: tuple[str, ...]
    host_netns: str
    ifname: str = "eth0"
    ports: tuple[PublishedPort, ...] = ()
    dns: tuple[str, ...] = ()
    ip: str = ""  # as asked for
    mac: str = ""
    result: dict[str, Any] | None = None  # of ADD, once that is done
    addresses: tuple[str, ...] = ()  # of the interface inside, without prefix
    gateway: str = ""

    @property
    def network(self) -> str:
        return self.config.name
