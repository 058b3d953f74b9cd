"""Files of networks that `network create` has made: katapod-NAME.conflist, where CNI's configurations are."""

import ipaddress
import json
import os
import socket
from pathlib import Path
from typing import Any

from katapod.host.hints import hint_for
from katapod.host.process import find_program, run
from katapod.model.cni import NetworkConfig, parse_network
from katapod.model.errors import AlreadyExists, KatapodError

__all__ = ["is_ours", "network_file", "remove_network_file", "subnet_of", "write_network_file"]

PREFIX = "katapod-"
IP_LIMIT_S = 30.0


def network_file(directory: Path, name: str) -> Path:
    return directory / f"{PREFIX}{name}.conflist"


def is_ours(network: NetworkConfig) -> bool:
    return bool(network.source) and Path(network.source).name == f"{PREFIX}{network.name}.conflist"


def subnet_of(network: NetworkConfig) -> str:
    """The first of its addresses, as host-local has it; empty if it has none there."""
    for plugin in network.plugins:
        try:
            found = str(plugin.settings["ipam"]["ranges"][0][0]["subnet"])
            return str(ipaddress.ip_network(found))
        except (KeyError, IndexError, TypeError, ValueError):
            continue
    return ""


def write_network_file(directory: Path, name: str, document: dict[str, Any]) -> Path:
    """Make its file, as a whole or not at all. Raises AlreadyExists, KatapodError."""
    path = network_file(directory, name)
    text = json.dumps(document, indent=2).encode() + b"\n"
    parse_network(text, str(path))  # what we could not read ourselves is not written
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        staged.write_bytes(text)
        try:
            os.link(staged, path)
        except FileExistsError as exc:
            raise AlreadyExists(f"cannot create network {name}: there is one of that name") from exc
        finally:
            staged.unlink()
    except OSError as exc:
        raise KatapodError(f"cannot write {path}: {exc.strerror}", hint=hint_for(exc)) from exc
    return path


async def remove_network_file(path: Path, bridge: str) -> None:
    """Remove the file, and the bridge if it is there. The caller has seen that nobody uses it. Raises KatapodError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise KatapodError(f"cannot remove {path}: {exc.strerror}") from exc
    if bridge in (name for _, name in socket.if_nameindex()):
        await run([find_program("ip", package="iproute2"), "link", "delete", bridge], timeout_s=IP_LIMIT_S)
