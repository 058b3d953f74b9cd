"""From an attachment's record to the calls of its plugins, and to the container's files of /etc. Pure."""

import ipaddress
import json
from collections.abc import Iterable
from typing import Any

import msgspec

from katapod.model.attachment import AttachmentRecord
from katapod.model.cni import CniDns, CniResult, parse_result
from katapod.model.errors import UsageError
from katapod.model.net_flags import HOST_GATEWAY
from katapod.plan.cni import Attachment, port_mapping

__all__ = ["attachment_of", "check_capabilities", "hosts_file", "resolv_conf", "result_of", "with_result"]

NO_DNS = CniDns()


def attachment_of(record: AttachmentRecord, container_id: str) -> Attachment:
    asked: dict[str, Any] = {}
    if record.ports:
        asked["portMappings"] = [
            port_mapping(port.host_port, port.container_port, port.protocol, port.host_ip) for port in record.ports
        ]
    if record.ip:
        asked["ips"] = [record.ip]
    if record.mac:
        asked["mac"] = record.mac
    if record.dns:
        asked["dns"] = {"servers": list(record.dns)}
    return Attachment(record.config, container_id, record.netns, record.ifname, record.plugin_dirs, asked)


def check_capabilities(record: AttachmentRecord) -> None:
    """Raises UsageError if the caller asks for what no plugin of the network supports."""
    wanted = (
        ("portMappings", record.ports, "publish ports", "a plugin such as portmap"),
        ("ips", record.ip, "choose the address", "a plugin such as bridge with host-local"),
        ("mac", record.mac, "choose the MAC address", "a plugin such as bridge or tuning"),
    )
    for capability, value, what, example in wanted:
        if value and not record.config.takes(capability):
            raise UsageError(
                f"cannot {what} on network {record.network}: none of its plugins takes {capability}",
                hint=f'give {example} "capabilities": {{"{capability}": true}} in {record.config.source}',
            )


def result_of(record: AttachmentRecord) -> CniResult | None:
    """What ADD has returned; None if that is not known. Raises KatapodError."""
    if record.result is None:
        return None
    return parse_result(json.dumps(record.result).encode(), f"network {record.network}")


def with_result(record: AttachmentRecord, result: CniResult) -> AttachmentRecord:
    addresses = result.addresses(record.ifname)
    return msgspec.structs.replace(
        record,
        result=result.document,
        addresses=tuple(one.ip for one in addresses),
        gateway=next((one.gateway for one in addresses if one.gateway), ""),
    )


def hosts_file(hostname: str, addresses: Iterable[str], extra: Iterable[tuple[str, str]], gateway: str = "") -> str:
    """/etc/hosts: the container's own name has its address, or the usual one of loopback without a network.

    Raises UsageError if a host has the address host-gateway and there is no gateway.
    """
    lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
    lines += [f"{address}\t{hostname}" for address in addresses] or [f"127.0.1.1\t{hostname}"]
    for name, address in extra:
        if address == HOST_GATEWAY and not gateway:
            raise UsageError(f"cannot use --add-host {name}:{HOST_GATEWAY}: the network has no gateway")
        lines.append(f"{gateway if address == HOST_GATEWAY else address}\t{name}")
    return "".join(f"{line}\n" for line in lines)


def resolv_conf(
    host: str,
    asked: tuple[str, ...],
    network: CniDns = NO_DNS,
    *,
    search: tuple[str, ...] = (),
    options: tuple[str, ...] = (),
) -> str:
    """/etc/resolv.conf: the caller's servers, else the network's, else the host's but those on its loopback.

    `host` is the text of the host's file; its search domains and options are kept unless the network, or the caller by
    `search` and `options`, has some.
    """
    servers, rest = list[str](), list[str]()
    for line in host.splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == "nameserver":
            if not _is_loopback(words[1]):
                servers.append(words[1])
        elif len(words) >= 2 and words[0] in ("search", "domain", "options"):
            rest.append(" ".join(words))
    if network.domain or network.search or network.options:
        rest = [f"search {' '.join(network.search or (network.domain,))}"] if network.search or network.domain else []
        rest += [f"options {' '.join(network.options)}"] if network.options else []
    if search:
        rest = [line for line in rest if not line.startswith(("search ", "domain "))]
        rest += [f"search {' '.join(filter(None, search))}"] if any(search) else []
    if options:
        rest = [line for line in rest if not line.startswith("options ")]
        rest.append(f"options {' '.join(options)}")
    chosen = asked or network.nameservers or tuple(servers)
    return "".join(f"{line}\n" for line in [*rest, *(f"nameserver {server}" for server in chosen)])


def _is_loopback(server: str) -> bool:
    try:
        return ipaddress.ip_address(server.partition("%")[0]).is_loopback
    except ValueError:
        return True  # no address: a container could not use it either
