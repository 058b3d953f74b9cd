"""`network ls`, `inspect`, `create`, `rm`, `prune`: what `run --net` can name."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from katapod.cli.asking import agreed
from katapod.cli.command import argument, flag, group, option, repeatable
from katapod.cli.filters import chosen
from katapod.cli.formats import print_each, print_rows, the_format
from katapod.cli.settings import Globals, need_root, print_error
from katapod.cli.tables import Column, print_table
from katapod.model.errors import AlreadyExists, InvalidState, KatapodError, NotFound, UsageError
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


NOWHERE: dict[str, Any] = {"name": "none", "plugins": ["null"], "subnet": "", "source": "", "containers": []}
FILTERS: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "name": lambda row, value: value in row["name"],
    "driver": lambda row, value: value == row["plugins"][0],
}


@network.command("ls", short_help="List networks.")
@flag("--json", "as_json", help="Print JSON.")
@flag("-q", "--quiet", help="Print only names.")
@flag("--no-trunc", help="Taken; nothing is shortened.")
@repeatable("-f", "--filter", "wanted", metavar="K=V", help="Only those: name, driver.")
@the_format
@click.pass_obj
def list_networks(
    settings: Globals, /, as_json: bool, quiet: bool, wanted: tuple[str, ...], form: str, **_: Any
) -> None:
    """List the built-in network and the configured ones.

    The fields of --format are docker's: .Name, .ID, .Driver, .Scope. They have a row for none, too.
    """
    need_root("network ls")
    by_docker = bool(form or quiet)
    rows = chosen([*_networks(settings), *([NOWHERE] if by_docker else [])], wanted, FILTERS)
    if by_docker:
        documents = [_document(row) for row in rows]
        titles = {"NETWORK ID": "ID", "NAME": "Name", "DRIVER": "Driver", "SCOPE": "Scope"}
        print_rows(documents, "{{.Name}}" if quiet else form, titles)
        return
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


def _networks(settings: Globals) -> list[dict[str, Any]]:
    """The built-in one first. Files that are wrong are told of."""
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
    return rows


def _document(row: Mapping[str, Any]) -> dict[str, Any]:
    """What docker prints of a network; a container's only ID is its name, as is a network's."""
    return {
        "Name": row["name"],
        "Id": row["name"],
        "ID": row["name"],
        "Driver": row["plugins"][0],
        "Scope": "local",
        "IPAM": {"Config": [{"Subnet": row["subnet"]}] if row["subnet"] else []},
        "Containers": {name: {"Name": name} for name in row["containers"]},
    }


def _describe(found: "NetworkConfig", users: dict[str, list[str]]) -> dict[str, Any]:
    from katapod.host.network_files import subnet_of

    return {
        "name": found.name,
        "plugins": [plugin.type for plugin in found.plugins],
        "subnet": subnet_of(found),
        "source": found.source,
        "containers": users.get(found.name, []),
    }


@network.command("inspect", short_help="Show what the plugins of a network are given.")
@argument("name", metavar="NAME")
@option(
    "-f", "--format", "form", metavar="TEMPLATE", help="Go template over what docker prints of it; json: all of it."
)
@click.pass_obj
def inspect(settings: Globals, name: str, form: str) -> None:
    """Print a network as JSON, as `run --net NAME -p ...` would use it now.

    The fields of --format are docker's: .Name, .Driver, .IPAM.Config, .Containers.
    """
    need_root("network inspect")
    if form:
        found = [_document(row) for row in _networks(settings) if row["name"] == name]
        if not found:
            raise NotFound(f"cannot find network {name}", hint="see: kata-runtime network ls")
        print_each(found, form)
        return
    import msgspec

    from katapod.sandbox.attachment import find_config

    katapod = settings.load_config(need_files=False).katapod
    config = asyncio.run(find_config(parse_network(name), katapod, publish=True))
    print(msgspec.json.format(msgspec.json.encode(config), indent=2).decode())


@network.command("create", short_help="Make a network with a bridge of its own.")
@argument("name", metavar="NAME", help="Of letters, digits, '_', '.', '-'.")
@option("-d", "--driver", metavar="DRIVER", help="bridge, the only one.")
@option("--subnet", metavar="CIDR", help="Its IPv4 addresses; default: a private subnet that is free.")
@option("--gateway", metavar="IP", help="The host's address in it; default: the first one.")
@option("--ip-range", "ip_range", metavar="CIDR", help="Containers get addresses of this part of it.")
@flag("--internal", help="Containers reach only each other.")
@repeatable("-o", "--opt", "options", metavar="K=V", help="mtu=N, also by docker's name com.docker.network.driver.mtu.")
@repeatable("--label", "labels", metavar="K=V", help="Set a label.")
@click.pass_obj
def create(settings: Globals, /, name: str, driver: str, **flags: Any) -> None:
    """Make a network for run --net NAME, and print its name.

    It is a file katapod-NAME.conflist in the directory of CNI's configurations; its bridge is made for the first
    container on it.
    """
    need_root("network create")
    from katapod.host.network_files import write_network_file
    from katapod.model.flags import parse_label, refuse
    from katapod.plan.bridge import BRIDGE
    from katapod.plan.user_network import NetworkWish, check_wish, plan_user_network

    if driver not in ("", "bridge"):
        refuse("--driver", driver, "networks of others are files of /etc/cni/net.d", "bridge")
    if parse_network(name) in (BRIDGE, "none", "host", "default"):
        raise AlreadyExists(f"cannot create network {name}: the name has a meaning of its own")
    wish = NetworkWish(
        name=name,
        subnet=flags["subnet"],
        gateway=flags["gateway"],
        ip_range=flags["ip_range"],
        internal=flags["internal"],
        mtu=_mtu(flags["options"]),
        labels=dict(parse_label(item) for item in flags["labels"]),
    )
    check_wish(wish)
    directory = Path(settings.load_config(need_files=False).katapod.cni_conf_dir)
    subnet = asyncio.run(_free_subnet(directory, wish.subnet, name))
    write_network_file(directory, name, plan_user_network(wish, subnet))
    print(name)


def _mtu(options: tuple[str, ...]) -> int:
    from katapod.model.flags import refuse

    found = 0
    for text in options:
        key, _, value = text.partition("=")
        if key.removeprefix("com.docker.network.driver.") != "mtu" or not value.isascii() or not value.isdigit():
            refuse("--opt", text, "known is mtu=N", "mtu=1400")
        found = int(value[:9])
    return found


async def _free_subnet(directory: Path, wanted: str, name: str) -> str:
    """Raises AlreadyExists if another network has that name, or addresses of `wanted`; HostLacks."""
    import ipaddress

    from katapod.host.bridge import bridge_subnet, networks_in_use
    from katapod.host.cni import load_networks
    from katapod.host.network_files import subnet_of
    from katapod.plan.bridge import choose_subnet

    configured, _ = load_networks(directory)
    if any(each.name == name for each in configured):
        raise AlreadyExists(f"cannot create network {name}: there is one of that name")
    taken = {each.name: subnet_of(each) for each in configured if subnet_of(each)}
    if built_in := bridge_subnet():
        taken["bridge"] = built_in
    if not wanted:
        return choose_subnet([*taken.values(), *await networks_in_use()])
    network = ipaddress.ip_network(wanted)
    for other, subnet in taken.items():
        if ipaddress.ip_network(subnet).version == 4 and network.overlaps(ipaddress.ip_network(subnet)):
            raise AlreadyExists(f"cannot create network {name}: network {other} has addresses of {wanted}: {subnet}")
    return wanted


@network.command("rm", short_help="Remove networks that create has made, or the built-in one's bridge.")
@argument("names", nargs=-1, required=True, metavar="NAME...")
@flag("-f", "--force", help="One that is not there is no error.")
@click.pass_obj
def remove(settings: Globals, names: tuple[str, ...], force: bool) -> int:
    """Remove networks of network create, with their bridges, and print their names.

    Of the built-in network only the bridge is removed; the next container on it makes it again.
    """
    need_root("network rm")
    return _remove_each(settings, names, may_be_gone=force)


def _remove_each(settings: Globals, names: Sequence[str], *, may_be_gone: bool = False) -> int:
    """All are tried, errors are printed, the status says."""
    failed = 0
    for name in names:
        try:
            _remove(settings, name)
        except KatapodError as exc:
            if not (may_be_gone and isinstance(exc, NotFound)):
                failed = 1
                print_error(exc)
    return failed


def _remove(settings: Globals, name: str) -> None:
    """Raises NotFound, InvalidState if containers are on it, UsageError if it is somebody else's, KatapodError."""
    from katapod.host.bridge import remove_bridge
    from katapod.host.cni import find_network
    from katapod.host.network_files import is_ours, remove_network_file
    from katapod.plan.bridge import BRIDGE
    from katapod.plan.user_network import bridge_device

    if name != BRIDGE:
        found = find_network(Path(settings.load_config(need_files=False).katapod.cni_conf_dir), name, (BRIDGE,))
        if not is_ours(found):
            raise UsageError(
                f"cannot remove network {name}: network create has not made it", hint=f"remove its file: {found.source}"
            )
    if users := _users(settings).get(name):
        raise InvalidState(f"cannot remove network {name}: {', '.join(users)} use it", hint="delete them first")
    if name != BRIDGE:
        asyncio.run(remove_network_file(Path(found.source), bridge_device(name)))
        print(name)
        return
    print("removed" if asyncio.run(remove_bridge()) else f"network {BRIDGE} has no bridge")


@network.command("prune", short_help="Remove networks of create that no container is on.")
@flag("-f", "--force", help="Do not ask.")
@click.pass_obj
def prune(settings: Globals, force: bool) -> int:
    """Remove all networks of network create that no container is on, and print their names."""
    need_root("network prune")
    from katapod.host.cni import load_networks
    from katapod.host.network_files import is_ours

    configured, _ = load_networks(Path(settings.load_config(need_files=False).katapod.cni_conf_dir))
    users = _users(settings)
    unused = [each.name for each in configured if is_ours(each) and each.name not in users]
    if unused and not agreed(f"remove {len(unused)} networks that no container is on?", force):
        return 1
    return _remove_each(settings, unused)
