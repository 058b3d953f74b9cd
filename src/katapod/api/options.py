"""What may be asked of a container and of its sandbox, by keyword, and what the supervisor is asked for then.

Texts have the syntax of the flags of `kata-runtime run`, and its meanings. Whatever is wrong raises UsageError.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypedDict

from msgspec import Struct

from katapod.api.image import Image
from katapod.model.errors import UsageError
from katapod.model.flags import (
    parse_accelerator,
    parse_cap,
    parse_cpus,
    parse_env,
    parse_hostname,
    parse_memory,
    parse_pids_limit,
    parse_signal,
    parse_user,
    parse_workdir,
)
from katapod.model.ids import name_or_new
from katapod.model.mount_flags import NamedVolume, Volume, parse_tmpfs, parse_volume, tidy_volume
from katapod.model.net_flags import NetworkRequest, parse_add_host, parse_dns, parse_network, parse_publish
from katapod.model.text import need_text
from katapod.plan.container_spec import ContainerOptions as Planned
from katapod.supervisor.run_request import RunRequest

__all__ = [
    "ContainerOptions",
    "ImageSource",
    "Joined",
    "Options",
    "SandboxOptions",
    "container_request",
    "environment",
    "hostname_of",
    "network_of",
    "signal_number",
]

ImageSource: TypeAlias = str | Path | Image
"""The name of an image, or a reference, which is imported if need be; a directory, which is not changed; an Image."""


class ContainerOptions(TypedDict, total=False):
    """Of one container. What is left out is the image's, or as Docker has it."""

    env: Mapping[str, str]
    cwd: str
    user: str  # USER[:GROUP], by name or number
    terminal: bool
    memory: int | str  # the limit: bytes, or text such as "512m"; it sizes the VM, too
    cpus: float  # the limit; likewise
    pids_limit: int
    read_only: bool  # the root file system
    privileged: bool  # all rights inside the VM, none outside
    cap_add: Sequence[str]
    cap_drop: Sequence[str]
    entrypoint: str  # "" takes the image's away
    volumes: Sequence[Volume | str]  # Volume(source=, destination=, read_only=), or "SRC:DST[:ro]"
    tmpfs: Sequence[str]  # "DST[:OPTIONS]"
    stop_signal: int | str  # asks it to end; default: the image's, else SIGTERM


class SandboxOptions(TypedDict, total=False):
    """Of a sandbox: the VM that one container has, or several share."""

    hostname: str  # default: its name; all its containers have it
    network: str  # "none", "bridge" or the name of a network; default: KATAPOD_NETWORK, else the configuration's
    ports: Sequence[str]  # "[IP:]HOST:CONTAINER[/udp]"
    dns: Sequence[str]  # addresses
    hosts: Mapping[str, str]  # lines of /etc/hosts: name, address
    labels: Mapping[str, str]
    accelerator: str  # "auto", "kvm", "uml" or "tcg"; default: the configuration's
    config_file: str  # in place of configuration.toml where it is usually found


class Options(ContainerOptions, SandboxOptions, total=False):
    """Of a container with a sandbox of its own."""


class Joined(Struct, frozen=True):
    """A sandbox that is open, to which a container comes."""

    sandbox_id: str
    hostname: str
    network: NetworkRequest


def container_request(
    image: ImageSource,
    command: Sequence[str],
    name: str,
    options: Options,
    *,
    joins: Joined | None = None,
) -> RunRequest:
    """`joins`: the sandbox that it comes to; None: it gets one of its own."""
    allowed = ContainerOptions.__annotations__ if joins else Options.__annotations__
    if unknown := sorted(set(options) - set(allowed)):
        raise TypeError(f"unknown option of a container: {', '.join(unknown)}")
    for word in command:
        if not isinstance(word, str):
            raise UsageError(f"cannot use {word!r} as a part of the command: it is not a text")
        need_text("command", word)
    container_id = name_or_new(name)
    stop_signal = options.get("stop_signal")
    return RunRequest(
        container_id=container_id,
        image=_image_name(image),
        rootfs=image.absolute() if isinstance(image, Path) else None,
        bundle=None,
        options=_planned(tuple(command), joins.hostname if joins else hostname_of(options, container_id), options),
        remove=True,
        interactive=False,
        accel=parse_accelerator(options.get("accelerator", ""), "accelerator"),
        labels=dict(options.get("labels", {})),
        stop_signal=signal_number(stop_signal, "stop_signal") if stop_signal is not None else None,
        network=joins.network if joins else network_of(options),
        joins=joins.sandbox_id if joins else "",
    )


def hostname_of(options: SandboxOptions, sandbox_id: str) -> str:
    return parse_hostname(options["hostname"], "hostname") if options.get("hostname") else sandbox_id[:63]


def _image_name(image: ImageSource) -> str:
    if isinstance(image, Image):
        if not image.names:
            raise UsageError(f"cannot use image {image.digest}: it has no name any more")
        return image.names[0]
    if isinstance(image, str):
        if not image:
            raise UsageError("cannot use '' as an image: it is empty", hint='for example: "busybox"')
        return image
    return ""


def _planned(command: tuple[str, ...], hostname: str, options: Options) -> Planned:
    volumes = [_volume(item) for item in options.get("volumes", ())]
    memory, cpus, pids = options.get("memory"), options.get("cpus"), options.get("pids_limit")
    return Planned(
        args=command,
        entrypoint=options.get("entrypoint"),
        env=environment(options.get("env", {})),
        cwd=parse_workdir(options["cwd"], "cwd") if options.get("cwd") else "",
        user=parse_user(options["user"], "user") if options.get("user") else None,
        hostname=hostname,
        tty=options.get("terminal", False),
        memory_bytes=parse_memory(str(memory), "memory") if memory is not None else None,
        cpus=parse_cpus(str(cpus), "cpus") if cpus is not None else None,
        pids_limit=parse_pids_limit(str(pids), "pids_limit") if pids is not None else None,
        read_only=options.get("read_only", False),
        cap_add=tuple(parse_cap(item, "cap_add") for item in options.get("cap_add", ())),
        cap_drop=tuple(parse_cap(item, "cap_drop") for item in options.get("cap_drop", ())),
        volumes=tuple(item for item in volumes if isinstance(item, Volume)),
        named_volumes=tuple(item for item in volumes if isinstance(item, NamedVolume)),
        tmpfs=tuple(parse_tmpfs(item, "tmpfs") for item in options.get("tmpfs", ())),
        privileged=options.get("privileged", False),
    )


def _volume(given: Volume | str) -> Volume | NamedVolume:
    return parse_volume(given, os.getcwd(), "volumes") if isinstance(given, str) else tidy_volume(given, "volumes")


def environment(env: Mapping[str, str]) -> tuple[str, ...]:
    for name, value in env.items():
        need_text("env", f"{name}={value}")
    return parse_env([f"{name}={value}" for name, value in env.items()], {}, "env")


def network_of(options: SandboxOptions) -> NetworkRequest:
    """The environment stands in for the configuration, as it does for `kata-runtime run`."""
    wanted = options.get("network", "") or os.environ.get("KATAPOD_NETWORK", "")
    return NetworkRequest(
        name=parse_network(wanted, "network") if wanted else "",
        ports=tuple(port for item in options.get("ports", ()) for port in parse_publish(item, "ports")),
        dns=tuple(parse_dns(item, "dns") for item in options.get("dns", ())),
        hosts=tuple(parse_add_host(f"{name}={to}", "hosts") for name, to in options.get("hosts", {}).items()),
    )


def signal_number(wanted: int | str, what: str = "signal") -> int:
    return parse_signal(str(int(wanted)) if isinstance(wanted, int) else wanted, what)
