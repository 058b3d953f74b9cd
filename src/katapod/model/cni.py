"""CNI's documents: network configurations, results and errors of plugins, parsed once into frozen values.

Source: the CNI specification 0.3.0 to 1.1.0. What a plugin is told beyond the keys of the specification is between
its owner and the plugin: such keys are kept and passed on as they are.
"""

import ipaddress
import json
import re
from typing import Any

import msgspec
from msgspec import Struct

from katapod.model.errors import ConfigError, KatapodError

__all__ = [
    "CNI_VERSIONS",
    "CniAddress",
    "CniDns",
    "CniError",
    "CniInterface",
    "CniResult",
    "CniRoute",
    "NetworkConfig",
    "PluginConfig",
    "parse_error",
    "parse_network",
    "parse_result",
]

CNI_VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""In order of age. Older ones have results of another shape, and no chains of plugins."""

DOCUMENT_MAX = 1 << 20  # bytes of a configuration or a result; real ones have some hundred
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]*")
_TYPE = re.compile(r"[a-zA-Z0-9_.-]+")


class PluginConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """One plugin of a network. `settings` are all keys of its object but those that have a field here."""

    type: str  # the file name of its program
    capabilities: tuple[str, ...] = ()  # of the runtime's arguments, those that it takes
    settings: dict[str, Any] = {}


class NetworkConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """A network: the plugins that attach to it, in the order of ADD."""

    name: str
    cni_version: str
    plugins: tuple[PluginConfig, ...]
    disable_check: bool = False
    source: str = ""  # the file it came from; empty: built in

    def takes(self, capability: str) -> bool:
        """Whether one of its plugins takes a capability, such as portMappings."""
        return any(capability in plugin.capabilities for plugin in self.plugins)


class CniInterface(Struct, frozen=True):
    name: str = ""
    mac: str = ""
    sandbox: str = ""  # the network namespace's path; empty on the host's side


class CniAddress(Struct, frozen=True):
    address: str  # with its prefix length: 10.1.2.3/16
    gateway: str = ""
    interface: int | None = None  # an index of CniResult.interfaces

    @property
    def ip(self) -> str:
        return self.address.partition("/")[0]


class CniRoute(Struct, frozen=True):
    dst: str
    gw: str = ""


class CniDns(Struct, frozen=True):
    nameservers: tuple[str, ...] = ()
    domain: str = ""
    search: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


class CniResult(Struct, frozen=True):
    """What ADD has made. `document` is all of it, for the plugins that come next."""

    interfaces: tuple[CniInterface, ...] = ()
    ips: tuple[CniAddress, ...] = ()
    routes: tuple[CniRoute, ...] = ()
    dns: CniDns = CniDns()
    document: dict[str, Any] = {}

    def addresses(self, ifname: str) -> tuple[CniAddress, ...]:
        """Those of the interface `ifname` inside; addresses that name no interface count as its own."""
        found = []
        for one in self.ips:
            if one.interface is None:
                found.append(one)
            elif one.interface in range(len(self.interfaces)):
                interface = self.interfaces[one.interface]
                if interface.name == ifname and interface.sandbox:
                    found.append(one)
        return tuple(found)


class CniError(Struct, frozen=True):
    """What a plugin prints when it fails. Codes below 100 are defined by the specification."""

    code: int
    msg: str = ""
    details: str = ""

    def __str__(self) -> str:
        text = ": ".join(part.strip() for part in (self.msg, self.details) if part.strip()) or "it did not say why"
        return f"{text} (code {self.code})"


def parse_network(data: bytes, where: str) -> NetworkConfig:
    """Parse a .conflist, or a .conf of one plugin, as the versions before 1.0.0 have it. Raises ConfigError."""
    document = _object(data, where)
    name, version = document.get("name"), _version(document, where)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ConfigError(f"cannot use {where}: {name!r} is not a network name")
    chain = document.get("plugins") if "plugins" in document else [document]
    if not isinstance(chain, list) or not chain:
        raise ConfigError(f"cannot use {where}: it has no plugins")
    if "plugins" not in document and version in ("1.0.0", "1.1.0"):
        raise ConfigError(
            f"cannot use {where}: CNI {version} knows lists of plugins only",
            hint='put its plugin into "plugins": [...]',
        )
    return NetworkConfig(
        name=name,
        cni_version=version,
        plugins=tuple(_plugin(item, where) for item in chain),
        disable_check=document.get("disableCheck") in (True, "true"),
        source=where,
    )


def _object(data: bytes, where: str) -> dict[str, Any]:
    if len(data) > DOCUMENT_MAX:
        raise ConfigError(f"cannot use {where}: it is larger than {DOCUMENT_MAX >> 20} MiB")
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise ConfigError(f"cannot use {where}: it is not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"cannot use {where}: it is no JSON object")
    return document


def _version(document: dict[str, Any], where: str) -> str:
    offered = document.get("cniVersions")  # since 1.1.0
    given = [document.get("cniVersion"), *(offered if isinstance(offered, list) else [])]
    known = [version for version in CNI_VERSIONS if version in given]
    if not known:
        raise ConfigError(
            f"cannot use {where}: its cniVersion is {given[0]!r}",
            hint=f"this version knows {', '.join(CNI_VERSIONS)}",
        )
    # what all plugins understand: the newest is for those who asked for nothing else
    return str(given[0]) if given[0] in known else known[-1]


def _plugin(item: object, where: str) -> PluginConfig:
    kind = item.get("type") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(kind, str) or not _TYPE.fullmatch(kind) or kind in (".", ".."):
        raise ConfigError(f"cannot use {where}: a plugin's type is the name of its program, not {kind!r}")
    capabilities = item.get("capabilities", {})
    if not isinstance(capabilities, dict):
        raise ConfigError(f"cannot use {where}: the capabilities of {kind} are no JSON object")
    own = {"type", "capabilities", "name", "cniVersion", "cniVersions", "disableCheck", "prevResult", "runtimeConfig"}
    return PluginConfig(
        type=kind,
        capabilities=tuple(name for name, taken in capabilities.items() if taken is True),
        settings={key: value for key, value in item.items() if key not in own},
    )


def parse_result(data: bytes, where: str) -> CniResult:
    """Parse what a plugin printed after ADD. Raises KatapodError."""
    try:
        document = _object(data, where)
        known = {key: value for key, value in document.items() if key != "document"}
        result = msgspec.convert(known, CniResult)
        for one in result.ips:
            ipaddress.ip_interface(one.address)
    except (ConfigError, ValueError) as exc:  # msgspec's errors are ValueErrors, too
        raise KatapodError(f"cannot understand the result of {where}: {exc}") from exc
    return msgspec.structs.replace(result, document=document)


def parse_error(data: bytes) -> CniError | None:
    """What a failed plugin printed; None if that is no error of CNI's form."""
    try:
        return msgspec.json.decode(data[:DOCUMENT_MAX], type=CniError)
    except msgspec.DecodeError:
        return None
