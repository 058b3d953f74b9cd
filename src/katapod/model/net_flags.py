"""Values of the flags of `run` that are about networks, in the syntax that users of `docker run` know. Pure."""

import ipaddress
import re
from typing import NoReturn

from msgspec import Struct

from katapod.model.errors import UsageError

__all__ = [
    "HOST_GATEWAY",
    "NO_NETWORK",
    "NetworkRequest",
    "PortRequest",
    "parse_add_host",
    "parse_dns",
    "parse_dns_option",
    "parse_dns_search",
    "parse_expose",
    "parse_ip",
    "parse_mac",
    "parse_network",
    "parse_publish",
]

NO_NETWORK = "none"
HOST_GATEWAY = "host-gateway"
"""Docker's word for the host's address as the container sees it."""

_EXAMPLE = "8080:80"
_PORTS = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_HOST = re.compile(r"[a-zA-Z0-9_](?:[a-zA-Z0-9_.-]{0,252}[a-zA-Z0-9_])?")
_NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}")


class PortRequest(Struct, frozen=True, kw_only=True):
    """A port of the container that is to be reached by one of the host's: any from first to last; 0: any at all."""

    container_port: int
    host_first: int = 0
    host_last: int = 0
    host_ip: str = ""  # empty: all addresses
    protocol: str = "tcp"


class NetworkRequest(Struct, frozen=True, kw_only=True):
    """What the caller wants of networks. `name`: empty means what the configuration says."""

    name: str = ""
    ports: tuple[PortRequest, ...] = ()
    dns: tuple[str, ...] = ()
    hosts: tuple[tuple[str, str], ...] = ()  # name, address or HOST_GATEWAY
    ip: str = ""
    mac: str = ""
    search: tuple[str, ...] = ()  # domains; ("",) is none, whatever the host has
    options: tuple[str, ...] = ()  # of resolv.conf(5)
    no_hosts: bool = False  # the image's /etc/hosts stays as it is


def _refuse(flag: str, value: str, cause: str, example: str) -> NoReturn:
    raise UsageError(f"cannot use {flag} {value[:200]!r}: {cause}", hint=f"for example: {flag} {example}")


def parse_network(text: str, flag: str = "--net") -> str:
    """The name of a network, or "none"."""
    if text == "host":
        _refuse(flag, text, "a virtual machine has a kernel of its own and cannot share the host's network", "bridge")
    if text.startswith("container:"):
        _refuse(flag, text, "the network of another container belongs to another virtual machine", "bridge")
    if not _NETWORK.fullmatch(text):
        _refuse(flag, text, "it is not a network name", "bridge")
    return text


def parse_publish(text: str, flag: str = "-p") -> tuple[PortRequest, ...]:
    """[IP:][HOST:]CONTAINER[/tcp|udp]. HOST and CONTAINER are ports or ranges of equal length; a range of HOST with
    one port of CONTAINER means one that is free. Without HOST any free port is taken."""
    ports, slash, protocol = text.partition("/")
    protocol = protocol.lower() if slash else "tcp"
    if protocol not in ("tcp", "udp"):
        _refuse(flag, text, f"{protocol!r} is not a protocol that can be forwarded: tcp and udp are", _EXAMPLE)
    host_ip, host, container = _parts(flag, text, ports)
    first, last = _range(flag, text, container, least=1)
    if not host:
        wanted = [(port, 0, 0) for port in range(first, last + 1)]
    else:
        host_first, host_last = _range(flag, text, host, least=0)
        if first == last:
            wanted = [(first, host_first, host_last)]
        elif host_last - host_first == last - first:
            wanted = [(port, host_first + port - first, host_first + port - first) for port in range(first, last + 1)]
        else:
            _refuse(flag, text, "the two ranges are not of one length", "8000-8010:80-90")
    return tuple(
        PortRequest(container_port=port, host_first=low, host_last=high, host_ip=host_ip, protocol=protocol)
        for port, low, high in wanted
    )


def _parts(flag: str, text: str, ports: str) -> tuple[str, str, str]:
    if ports.startswith("["):
        address, bracket, rest = ports[1:].partition("]")
        if not bracket or not rest.startswith(":"):
            _refuse(flag, text, "an address in brackets is followed by ':'", "[::1]:8080:80")
        parts = [address, *rest[1:].split(":")]
        if len(parts) == 2:
            parts.insert(1, "")
    else:
        parts = ports.split(":")
    if len(parts) > 3:
        _refuse(flag, text, "it has more than three parts between colons", "127.0.0.1:8080:80")
    address, host, container = ["", "", *parts][-3:]
    if address:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            _refuse(flag, text, f"{address!r} is not an IP address", "127.0.0.1:8080:80")
        address = "" if parsed.is_unspecified and parsed.version == 4 else str(parsed)
    return address, host, container


def _range(flag: str, text: str, ports: str, *, least: int) -> tuple[int, int]:
    found = _PORTS.fullmatch(ports)
    if not found:
        _refuse(flag, text, f"{ports!r} is neither a port nor a range of ports", _EXAMPLE)
    first = int(found[1])
    last = int(found[2]) if found[2] else first
    if not least <= first <= last <= 65535:
        _refuse(flag, text, f"{ports} is not within 1 and 65535", _EXAMPLE)
    return first, last


def parse_dns(text: str, flag: str = "--dns") -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        _refuse(flag, text, "it is not an IP address", "192.0.2.53")


def parse_dns_search(text: str, flag: str = "--dns-search") -> str:
    """A domain; "." is none at all, as in Docker."""
    if text == ".":
        return ""
    if not _HOST.fullmatch(text.removesuffix(".")):
        _refuse(flag, text, "it is not a domain", "example.org")
    return text


def parse_dns_option(text: str, flag: str = "--dns-option") -> str:
    if not re.fullmatch(r"[a-z0-9-]{1,40}(:[0-9]{1,5})?", text):
        _refuse(flag, text, "it is no option of resolv.conf(5)", "ndots:2")
    return text


def parse_expose(text: str, flag: str = "--expose") -> tuple[PortRequest, ...]:
    """PORT[-PORT][/tcp|udp] of the container, each to be published on any free port of the host."""
    if ":" in text:
        _refuse(flag, text, "it is neither a port nor a range of ports", "8080")
    return parse_publish(text, flag)


def parse_ip(text: str, flag: str = "--ip") -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        _refuse(flag, text, "it is not an IP address", "10.186.0.20")


def parse_mac(text: str, flag: str = "--mac-address") -> str:
    mac = text.lower().replace("-", ":")
    if not re.fullmatch(r"([0-9a-f]{2}:){5}[0-9a-f]{2}", mac):
        _refuse(flag, text, "it is not a MAC address", "02:42:ac:11:00:02")
    if int(mac[:2], 16) & 1:
        _refuse(flag, text, "it is the address of a group (the first byte is odd)", "02:42:ac:11:00:02")
    return mac


def parse_add_host(text: str, flag: str = "--add-host") -> tuple[str, str]:
    """NAME:ADDRESS or NAME=ADDRESS; the address may be host-gateway."""
    name, mark, address = text.partition("=" if "=" in text else ":")
    address = address.removeprefix("[").removesuffix("]")
    if not mark or not _HOST.fullmatch(name):
        _refuse(flag, text, "it has no name of a host before the address", "db:10.1.2.3")
    if address == HOST_GATEWAY:
        return name, address
    try:
        return name, str(ipaddress.ip_address(address))
    except ValueError:
        _refuse(flag, text, f"{address!r} is not an IP address", "db:10.1.2.3")
