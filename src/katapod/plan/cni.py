"""The calls of CNI plugins: their order, environment and input. Pure.

Source: the CNI specification 1.0.0, sections 2 and 3; capabilities: its CONVENTIONS.md.
"""

import json
from typing import Any

from msgspec import Struct, field

from katapod.model.cni import CniResult, NetworkConfig, PluginConfig

__all__ = ["Attachment", "Invocation", "plan_add", "plan_check", "plan_delete", "port_mapping"]

_PASSES_RESULT_TO_DELETE = ("0.4.0", "1.0.0", "1.1.0")
"""CHECK exists, and DEL gets the result of ADD, since 0.4.0."""


class Attachment(Struct, frozen=True):
    """A sandbox on a network: the parameters that every operation gets alike.

    `capability_args` by capability, in the shape of the conventions: portMappings, ips, mac, dns. A plugin hears of
    those that its configuration names.
    """

    network: NetworkConfig
    container_id: str
    netns: str
    ifname: str
    plugin_dirs: tuple[str, ...]
    capability_args: dict[str, Any] = field(default_factory=dict)


class Invocation(Struct, frozen=True):
    """One call of one plugin: `plugin` is the file name of its program."""

    plugin: str
    command: str
    environment: dict[str, str]
    config: dict[str, Any]

    def stdin(self, previous: CniResult | None = None) -> bytes:
        """Its input; `previous` is what the plugin before it in the chain of ADD has returned."""
        more = {"prevResult": previous.document} if previous is not None else {}
        return json.dumps({**self.config, **more}).encode()

    def describe(self) -> str:
        words = [f"{name}={value}" for name, value in sorted(self.environment.items())]
        return f"{' '.join(words)} {self.plugin} <<< {self.stdin().decode()}"


def plan_add(attachment: Attachment) -> tuple[Invocation, ...]:
    """In this order; each gets the result of the one before it."""
    return tuple(_invocation(attachment, plugin, "ADD", None) for plugin in attachment.network.plugins)


def plan_delete(attachment: Attachment, result: CniResult | None) -> tuple[Invocation, ...]:
    """The plugins in reverse. `result` is the last one of ADD; None if it is not known how far that came."""
    known = result if attachment.network.cni_version in _PASSES_RESULT_TO_DELETE else None
    return tuple(_invocation(attachment, plugin, "DEL", known) for plugin in reversed(attachment.network.plugins))


def plan_check(attachment: Attachment, result: CniResult) -> tuple[Invocation, ...]:
    """Nothing to do where the network forbids it or its version does not have it."""
    network = attachment.network
    if network.disable_check or network.cni_version not in _PASSES_RESULT_TO_DELETE:
        return ()
    return tuple(_invocation(attachment, plugin, "CHECK", result) for plugin in network.plugins)


def port_mapping(host_port: int, container_port: int, protocol: str, host_ip: str = "") -> dict[str, Any]:
    """One entry of the capability portMappings; without a host address all addresses are meant."""
    found: dict[str, Any] = {"hostPort": host_port, "containerPort": container_port, "protocol": protocol}
    if host_ip:
        found["hostIP"] = host_ip
    return found


def _invocation(attachment: Attachment, plugin: PluginConfig, command: str, result: CniResult | None) -> Invocation:
    network = attachment.network
    config: dict[str, Any] = {
        **plugin.settings,
        "cniVersion": network.cni_version,
        "name": network.name,
        "type": plugin.type,
    }
    told = {name: value for name, value in attachment.capability_args.items() if name in plugin.capabilities}
    if told:
        config["runtimeConfig"] = told
    if result is not None:
        config["prevResult"] = result.document
    return Invocation(
        plugin=plugin.type,
        command=command,
        environment={
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": attachment.container_id,
            "CNI_NETNS": attachment.netns,
            "CNI_IFNAME": attachment.ifname,
            "CNI_PATH": ":".join(attachment.plugin_dirs),
            "CNI_ARGS": "IgnoreUnknown=1",  # plugins refuse arguments they do not know, but not with this one
        },
        config=config,
    )
