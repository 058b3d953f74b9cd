"""`network ls`, `inspect`, `rm`: what `run --net` can name."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.command import argument, flag, group
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table
from katapod.model.errors import InvalidState, UsageError
from katapod.model.net_flags import parse_network

if TYPE_CHECKING:
    from katapod.model.cni import NetworkConfig

__all__ = ["network"]


@group()
def network() -> None:
    """Manage container networks."""


def _users(settings: Globals) -> dict[str, list[str]]:
    """The containers on each network, by its name."""
    found: dict[str, list[str]] = {}
    for record in settings.states().records():
        if record.attachment is not None:
            found.setdefault(record.attachment.network, []).append(record.sandbox_id)
    return found


@network.command("ls", short_help="List networks.")
@flag("--json", "as_json", help="Print JSON.")
@click.pass_obj
def list_networks(settings: Globals, as_json: bool) -> None:
    """List the built-in network and the configured ones."""
    need_root("network ls")
    from katapod.host.bridge import bridge_subnet
    from katapod.host.cni import load_networks
    from katapod.plan.bridge import BRIDGE

    configured, problems = load_networks(Path(settings.load_config(need_files=False).katapod.cni_conf_dir))
    for problem in problems:
        print_error(problem)
    users = _users(settings)
    rows = [_describe(found, users) for found in configured]
    if all(row["name"] != BRIDGE for row in rows):
        subnet = bridge_subnet()
        plugins = ["bridge", "portmap", "firewall"]
        rows.insert(
            0,
            {"name": BRIDGE, "plugins": plugins, "subnet": subnet, "source": "", "containers": users.get(BRIDGE, [])},
        )
    if as_json:
        import json

        print(json.dumps(rows, indent=2))
        return
    columns = [
        Column("NAME", lambda row: row["name"]),
        Column("PLUGINS", lambda row: ",".join(row["plugins"])),
        Column("SUBNET", lambda row: row["subnet"] or "-"),
        Column("CONTAINERS", lambda row: str(len(row["containers"]))),
        Column("SOURCE", lambda row: row["source"] or "built in"),
    ]
    print_table(columns, rows)


def _describe(found: "NetworkConfig", users: dict[str, list[str]]) -> dict[str, Any]:
    return {
        "name": found.name,
        "plugins": [plugin.type for plugin in found.plugins],
        "subnet": "",
        "source": found.source,
        "containers": users.get(found.name, []),
    }


@network.command("inspect", short_help="Show what the plugins of a network are given.")
@argument("name", metavar="NAME")
@click.pass_obj
def inspect(settings: Globals, name: str) -> None:
    """Print a network as JSON, as `run --net NAME -p ...` would use it now."""
    need_root("network inspect")
    import msgspec

    from katapod.sandbox.attachment import find_config

    katapod = settings.load_config(need_files=False).katapod
    found = asyncio.run(find_config(parse_network(name), katapod, publish=True))
    print(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())


@network.command("rm", short_help="Remove the built-in network's bridge.")
@argument("name", metavar="NAME")
@click.pass_obj
def remove(settings: Globals, name: str) -> None:
    """Remove the bridge of the built-in network. The next container on it makes it again."""
    need_root("network rm")
    from katapod.host.bridge import remove_bridge
    from katapod.host.cni import find_network
    from katapod.plan.bridge import BRIDGE

    if name != BRIDGE:
        found = find_network(Path(settings.load_config(need_files=False).katapod.cni_conf_dir), name, (BRIDGE,))
        raise UsageError(
            f"cannot remove network {name}: only {BRIDGE} is Katapod's own", hint=f"remove its file: {found.source}"
        )
    if users := _users(settings).get(BRIDGE):
        raise InvalidState(f"cannot remove network {BRIDGE}: {', '.join(users)} use it", hint="delete them first")
    print("removed" if asyncio.run(remove_bridge()) else f"network {BRIDGE} has no bridge")
