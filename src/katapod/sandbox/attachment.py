"""A sandbox on a network: chosen, recorded, attached by CNI plugins, and undone from its record alone."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.bridge import bridge_subnet, filters_forwarding, networks_in_use, resolv_conf_text
from katapod.host.cni import attach, detach, find_network, find_plugin, load_networks
from katapod.host.named_netns import current_netns, is_netns, make_netns, netns_path, remove_netns
from katapod.host.ports import hold_ports
from katapod.host.trace import span
from katapod.model.attachment import AttachmentRecord
from katapod.model.cni import NetworkConfig
from katapod.model.config import KatapodConfig
from katapod.model.errors import HostLacks, KatapodError, UsageError
from katapod.model.net_flags import NO_NETWORK, NetworkRequest
from katapod.plan.attachment import (
    attachment_of,
    check_capabilities,
    hosts_file,
    resolv_conf,
    result_of,
    with_result,
)
from katapod.plan.bridge import BRIDGE, choose_subnet, plan_bridge
from katapod.tasks import beside

__all__ = [
    "AUTO",
    "attached",
    "container_files",
    "detach_attachment",
    "find_config",
    "prepare_attachment",
    "release_attachment",
]

log = logging.getLogger(__name__)

AUTO = "auto"
WARNED = Path("/run/katapod/without-network")
RELEASE_TRIES = 3
RELEASE_PAUSE_S = 0.3


async def prepare_attachment(
    request: NetworkRequest, settings: KatapodConfig, sandbox_id: str, held: contextlib.ExitStack
) -> AttachmentRecord | None:
    """What is going to be attached; None for no network. Ports are held from here on, until `held` is closed.

    Raises UsageError, NotFound, AlreadyExists (a port), HostLacks, ConfigError.
    """
    name = request.name or settings.network
    for given, what in (
        (request.ports, "publish ports"),
        (request.ip, "choose the address"),
        (request.mac, "choose the MAC address"),
    ):
        if given and name == NO_NETWORK:
            raise UsageError(f"cannot {what}: the container has no network", hint=f"for example: --net {BRIDGE}")
    if name == NO_NETWORK:
        return None
    wanted = bool(request.ports or request.ip or request.mac)
    try:
        config = await find_config(BRIDGE if name == AUTO else name, settings, publish=bool(request.ports))
    except HostLacks as exc:
        if name != AUTO or wanted:
            raise
        _warn_once(exc)
        return None
    record = AttachmentRecord(
        config=config,
        netns=str(netns_path(sandbox_id)),
        plugin_dirs=tuple(settings.cni_plugin_dirs),
        host_netns=current_netns(),
        dns=request.dns,
        ip=request.ip,
        mac=request.mac,
        ports=hold_ports(request.ports, held),
    )
    check_capabilities(record)
    return record


async def find_config(name: str, settings: KatapodConfig, *, publish: bool) -> NetworkConfig:
    """The network `name`: from its file, or built in. Raises NotFound, HostLacks, ConfigError."""
    directory = Path(settings.cni_conf_dir)
    if name != BRIDGE or any(network.name == BRIDGE for network in load_networks(directory)[0]):
        config = find_network(directory, name, (BRIDGE, NO_NETWORK))
    else:
        find_plugin("bridge", tuple(settings.cni_plugin_dirs))
        subnet = bridge_subnet()
        with span("look at the host's firewall and routes"):
            firewall = await filters_forwarding()
            if not subnet:
                subnet = choose_subnet(await networks_in_use())
        config = plan_bridge(subnet, firewall=firewall, publish=publish)
    for plugin in config.plugins:
        find_plugin(plugin.type, tuple(settings.cni_plugin_dirs))
    return config


def _warn_once(exc: HostLacks) -> None:
    """The first time after a start of the host: who runs containers without networks knows it then."""
    with contextlib.suppress(OSError):
        WARNED.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.close(os.open(WARNED, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        log.warning("containers have no network on this host: %s (%s); use --net none to silence this", exc, exc.hint)


@contextlib.asynccontextmanager
async def attached(
    record: AttachmentRecord, sandbox_id: str, netns: int | None = None
) -> AsyncIterator["asyncio.Task[AttachmentRecord]"]:
    """Attach beside what the block does; the task gives the record with its result, or raises. The namespace is
    there when the block begins, so that the VMM can be started in it meanwhile: a new one, or that of the descriptor
    `netns`, in which a VMM is already.

    Nothing is undone here: the sandbox's record names it, and it goes with that (release_attachment).
    """
    with span("make network namespace"):
        await make_netns(Path(record.netns), netns)
    async with beside(_attach(record, sandbox_id), name="attach-network") as task:
        yield task


async def _attach(record: AttachmentRecord, sandbox_id: str) -> AttachmentRecord:
    with span("attach to network", "network"):
        return with_result(record, await attach(attachment_of(record, sandbox_id)))


def container_files(hostname: str, request: NetworkRequest, record: AttachmentRecord | None) -> dict[str, str]:
    """The container's files of /etc, by name. Without a network there is no resolv.conf unless the caller wants one.

    Raises UsageError.
    """
    found = {
        "hostname": f"{hostname}\n",
        "hosts": hosts_file(
            hostname,
            record.addresses if record is not None else (),
            request.hosts,
            record.gateway if record is not None else "",
        ),
    }
    if request.no_hosts:
        del found["hosts"]
    if record is not None or request.dns or request.search or request.options:
        result = result_of(record) if record is not None else None
        dns = (result.dns,) if result is not None else ()
        found["resolv.conf"] = resolv_conf(
            resolv_conf_text(), request.dns, *dns, search=request.search, options=request.options
        )
    return found


async def detach_attachment(record: AttachmentRecord, sandbox_id: str) -> list[KatapodError]:
    """Have the plugins undo what they did; returns what did not work. Idempotent. The namespace stays."""
    with span("detach from network", "network"):
        return await detach(attachment_of(record, sandbox_id), result_of(record))


async def release_attachment(record: AttachmentRecord, sandbox_id: str) -> list[KatapodError]:
    """Undo all of it, however far it came. Idempotent. Returns what did not work, after some tries: the interface is
    gone all the same, but plugins may have left addresses taken, or rules of the firewall."""
    problems: list[KatapodError] = []
    with contextlib.suppress(OSError, KatapodError):  # the end tries again, and reports it
        if not is_netns(Path(record.netns)):  # plugins can do without a namespace, but not with what is none
            remove_netns(Path(record.netns))
    for number in range(RELEASE_TRIES):
        if number:
            await asyncio.sleep(RELEASE_PAUSE_S)
        if not (problems := await detach_attachment(record, sandbox_id)):
            break
    try:
        remove_netns(Path(record.netns))
    except KatapodError as exc:
        problems.append(exc)
    return problems
