"""`kata-runtime port`: the ports of the host that lead to a container."""

import click

from katapod.cli.command import argument, verb
from katapod.cli.settings import Globals, need_root
from katapod.model.errors import NotFound
from katapod.model.ids import parse_container_name
from katapod.model.net_flags import parse_publish

__all__ = ["port"]


@verb("port")
@argument("name", metavar="NAME", help="Name of a container.")
@argument("wanted", required=False, metavar="[PORT[/udp]]", help="Only what leads to this port.")
@click.pass_obj
def port(settings: Globals, name: str, wanted: str | None) -> None:
    """Print the published ports of a container, one a line: 80/tcp -> 0.0.0.0:8080; of one PORT the host's side."""
    need_root("port")
    record = settings.states().read(parse_container_name(name))
    ports = record.attachment.ports if record.attachment else ()
    if wanted is None:
        for each in ports:
            print(f"{each.container_port}/{each.protocol} -> {str(each).partition('->')[0]}")
        return
    (asked,) = parse_publish(wanted, "port")[:1]
    found = [each for each in ports if (each.container_port, each.protocol) == (asked.container_port, asked.protocol)]
    if not found:
        raise NotFound(f"cannot find port {wanted} of container {name}: it is not published")
    for each in found:
        print(str(each).partition("->")[0])
