"""CNI plugins on this machine: their configurations are read, their programs run.

KatapodError
`-- CniFailed    a plugin refused or broke; the message names network, plugin and what it said
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

from katapod.host.process import Completed, describe_status, run
from katapod.model.cni import CniResult, NetworkConfig, parse_error, parse_network, parse_result
from katapod.model.errors import ConfigError, KatapodError, MissingProgram, NotFound
from katapod.plan.cni import Attachment, Invocation, plan_add, plan_check, plan_delete

__all__ = [
    "PLUGIN_PACKAGE",
    "CniFailed",
    "attach",
    "check",
    "detach",
    "find_network",
    "find_plugin",
    "in_turn",
    "load_networks",
]

log = logging.getLogger(__name__)

PLUGIN_PACKAGE = "containernetworking-plugins"  # Debian's and RHEL's name
PLUGIN_LIMIT_S = 60.0  # DHCP may take its time
SHARE_CHAINS = ("portmap", "firewall")
"""Plugins that look whether the host has their chain of the firewall and then make it: of two at once, one fails."""
TURN_POLL_S = 0.01
SUFFIXES = (".conflist", ".conf", ".json")  # as libcni


class CniFailed(KatapodError):
    """A plugin refused or broke."""


def load_networks(directory: Path) -> tuple[list[NetworkConfig], list[ConfigError]]:
    """The networks configured in `directory`, in the order of their files, and what is wrong with other files.

    A list comes before a single configuration of the same name; of several lists the first file wins, as with libcni.
    """
    found: dict[str, NetworkConfig] = {}
    problems: list[ConfigError] = []
    try:
        files = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.is_dir())
    except FileNotFoundError:
        return [], []
    except OSError as exc:
        return [], [ConfigError(f"cannot read {directory}: {exc.strerror}")]
    for path in sorted(files, key=lambda path: path.suffix != ".conflist"):
        try:
            network = parse_network(path.read_bytes(), str(path))
        except OSError as exc:
            problems.append(ConfigError(f"cannot read {path}: {exc.strerror}"))
        except ConfigError as exc:
            problems.append(exc)
        else:
            found.setdefault(network.name, network)
    return sorted(found.values(), key=lambda network: network.source), problems


def find_network(directory: Path, name: str, built_in: tuple[str, ...] = ()) -> NetworkConfig:
    """The network `name` of `directory`. Raises NotFound, with the names that there are, `built_in` among them."""
    networks, problems = load_networks(directory)
    for network in networks:
        if network.name == name:
            return network
    names = ", ".join(sorted({*built_in, *(network.name for network in networks)}))
    broken = "".join(f"; {problem}" for problem in problems)
    raise NotFound(
        f"cannot find network {name}: no file in {directory} has this name{broken}",
        hint=f"the networks are: {names}" if names else f"put its .conflist into {directory}",
    )


def find_plugin(name: str, directories: tuple[str, ...]) -> str:
    """The program of a plugin. Raises MissingProgram that names the package."""
    found = shutil.which(name, path=":".join(directories))
    if found is None:
        raise MissingProgram(
            f"cannot find the CNI plugin {name}: it is not in {' or '.join(directories)}",
            hint=f"install the package {PLUGIN_PACKAGE}: apt-get install {PLUGIN_PACKAGE}",
        )
    return found


async def attach(attachment: Attachment) -> CniResult:
    """ADD: the plugins make the interface and what belongs to it.

    When it fails, or is cancelled, what the first plugins made is still there: `detach` is the caller's to call.
    Raises MissingProgram, CniFailed, KatapodError.
    """
    result = CniResult()
    previous: CniResult | None = None
    for invocation in plan_add(attachment):
        async with in_turn() if invocation.plugin in SHARE_CHAINS else contextlib.nullcontext():
            done = await _call(attachment, invocation, previous)
        previous = result = parse_result(done.stdout.encode(), f"the CNI plugin {invocation.plugin}")
    return result


async def detach(attachment: Attachment, result: CniResult | None) -> list[KatapodError]:
    """DEL: take away what ADD made, as far as that came. Idempotent. Every plugin is asked even if one fails;
    returns what did not work."""
    problems: list[KatapodError] = []
    for invocation in plan_delete(attachment, result):
        try:
            await _call(attachment, invocation, None)
        except KatapodError as exc:
            problems.append(exc)
    return problems


async def check(attachment: Attachment, result: CniResult) -> None:
    """CHECK: whether all is as ADD has made it. Raises CniFailed, MissingProgram."""
    for invocation in plan_check(attachment, result):
        await _call(attachment, invocation, None)


@contextlib.asynccontextmanager
async def in_turn() -> AsyncIterator[None]:
    """One at a time on this host: the lock is on its network namespace itself, and ends with the process."""
    fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(TURN_POLL_S)  # a thread that waits in flock(2) could not be cancelled
        yield
    finally:
        os.close(fd)


async def _call(attachment: Attachment, invocation: Invocation, previous: CniResult | None) -> Completed:
    log.debug("cni: %s", invocation.describe())
    name, verb = attachment.network.name, {"ADD": "attach to", "DEL": "detach from"}.get(invocation.command, "check")
    program = find_plugin(invocation.plugin, attachment.plugin_dirs)
    # they call iptables, which users' PATHs often lack
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin", "/bin")).lstrip(os.pathsep)
    done = await run(
        [program],
        timeout_s=PLUGIN_LIMIT_S,
        env={**invocation.environment, "PATH": path},
        input=invocation.stdin(previous),
        check=False,
        host_mounts=True,
    )
    if done.returncode != 0:
        said = parse_error(done.stdout.encode())
        text = str(said) if said is not None else f"{describe_status(done.returncode)}: {_tail(done)}".rstrip(": ")
        raise CniFailed(
            f"cannot {verb} network {name}: the CNI plugin {invocation.plugin} failed: {text}",
            hint=_hint(text, attachment.network),
        )
    return done


def _tail(done: Completed) -> str:
    return (done.stderr or done.stdout).strip()[-500:]


def _hint(text: str, network: NetworkConfig) -> str:
    if "no IP addresses available" in text:
        return "all addresses of the network are taken: remove containers, or give its configuration a larger subnet"
    if "iptables" in text and "not found" in text:
        return "install the package iptables: apt-get install iptables"
    if "incompatible CNI versions" in text:
        return f"change cniVersion in {network.source}, or install newer plugins"
    if "failed to find plugin" in text:
        return f"install the package {PLUGIN_PACKAGE}: apt-get install {PLUGIN_PACKAGE}"
    return f"the network is configured in {network.source}" if network.source else ""
