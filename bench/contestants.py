"""How each runtime is called. A contestant is a name and command lines; starting them is measure.py's work.

Katapod is there in variants: what differs is a configuration file. A variant that this version does not know is
told by the warning about its key, and reported as missing.
"""

import itertools
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.workload import Bundles

__all__ = [
    "COLD",
    "DEFAULT",
    "PEERS",
    "POOL",
    "TEMPLATE",
    "UML",
    "UML_POOL",
    "Contestant",
    "Katapod",
    "Peer",
    "katapod_variants",
    "peer_contestants",
]

KATA = str(Path(sys.executable).with_name("kata-runtime"))
PEERS = ("crun", "runc", "runsc")
COLD, TEMPLATE, POOL = "Katapod cold", "Katapod template", "Katapod pool"  # QEMU
UML, UML_POOL = "Katapod UML", "Katapod UML pool"
DEFAULT = "Katapod default"  # what `auto` takes here
MEMORY, SMALL_MIB = "64m", 256  # which makes a VM of so many MiB
_numbers = itertools.count(1)


class Contestant(ABC):
    """One way to run a container. All methods are pure, but for bundles, which are written once for each command."""

    name: str

    def new_id(self) -> str:
        return f"bench-{os.getpid()}-{next(_numbers)}"

    @abstractmethod
    def missing(self) -> str:
        """Why it cannot take part; empty if it can."""

    @abstractmethod
    def run(self, name: str, command: Sequence[str]) -> list[str]:
        """In the foreground; the container is gone when it ends."""

    @abstractmethod
    def run_detached(self, name: str, command: Sequence[str]) -> list[str]:
        """Ends as soon as the container runs."""

    @abstractmethod
    def exec(self, name: str, command: Sequence[str]) -> list[str]: ...

    @abstractmethod
    def delete(self, name: str) -> list[str]:
        """Kill and remove the container, in whatever state."""


@dataclass(frozen=True)
class Peer(Contestant):
    """crun, runc or runsc: the same verbs. `state` is their --root: nothing of ours is where theirs is."""

    name: str
    program: str
    bundles: Bundles
    state: Path
    prefix: tuple[str, ...] = ()  # what the command line starts with
    flags: tuple[str, ...] = ()

    def missing(self) -> str:
        return "" if shutil.which(self.program) else f"{self.program} is not installed"

    def _call(self, *arguments: str) -> list[str]:
        return [*self.prefix, self.program, "--root", str(self.state), *self.flags, *arguments]

    def run(self, name: str, command: Sequence[str]) -> list[str]:
        return self._call("run", "--bundle", str(self.bundles.bundle(command)), name)

    def run_detached(self, name: str, command: Sequence[str]) -> list[str]:
        bundle = str(self.bundles.bundle(command))
        return self._call("run", "--detach", "--pid-file", str(self.pid_file(name)), "--bundle", bundle, name)

    def exec(self, name: str, command: Sequence[str]) -> list[str]:
        return self._call("exec", name, *command)

    def delete(self, name: str) -> list[str]:
        return self._call("delete", "--force", name)

    def pid_file(self, name: str) -> Path:
        """Holds the id of the container's first process; for runsc, of its sandbox."""
        return self.state.parent / f"{name}.pid"


@dataclass(frozen=True)
class Katapod(Contestant):
    """`kata-runtime` with a configuration: `sections` are tables of configuration.toml."""

    name: str
    folder: Path  # for the configuration file
    sections: dict[str, dict[str, str]] = field(default_factory=dict)  # values in TOML's notation
    needs_key: str = ""  # a key that must be understood
    image: str = "busybox"
    bundles: Bundles | None = None  # set: run bundles instead of the image
    memory: str = MEMORY  # empty: the default
    network: str = "none"  # empty: the default
    volumes: tuple[str, ...] = ()  # SRC:DST
    pool: int = 0  # machines that a server keeps ready

    def missing(self) -> str:
        return "" if Path(KATA).exists() else f"{KATA} does not exist"

    @property
    def config(self) -> Path:
        return self.folder / f"{self.name.replace(' ', '-').replace(',', '')}.toml"

    def write_config(self) -> None:
        lines = []
        for section, keys in self.sections.items():
            lines += [f"[{section}]", *(f"{key} = {value}" for key, value in keys.items())]
        self.config.write_text("\n".join(lines) + "\n")

    def call(self, *arguments: str) -> list[str]:
        return [KATA, "--config", str(self.config), *arguments]

    def _what(self, command: Sequence[str]) -> list[str]:
        flags = ["-m", self.memory] if self.memory else []
        flags += ["--net", self.network] if self.network else []
        flags += [word for volume in self.volumes for word in ("-v", volume)]
        if self.bundles is not None:
            return [*flags, "--bundle", str(self.bundles.bundle(command))]
        return [*flags, self.image, *command]

    def run(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("run", "--rm", "--name", name, *self._what(command))

    def run_detached(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("run", "--detach", "--rm", "--name", name, *self._what(command))

    def exec(self, name: str, command: Sequence[str]) -> list[str]:
        return self.call("exec", name, *command)

    def delete(self, name: str) -> list[str]:
        return self.call("delete", "--force", name)

    def refused(self, errors: str) -> str:
        """Why the variant does not exist in this version, from what a first run wrote to standard error."""
        for line in errors.splitlines():
            if self.needs_key and self.needs_key in line and ("not supported" in line or "unknown key" in line):
                return f"this version does not know {self.needs_key}"
        return ""


def peer_contestants(bundles: Bundles, folder: Path, crun_prefix: tuple[str, ...]) -> list[Peer]:
    """crun is called through `crun_prefix`, which puts it where it can work with the host's cgroups."""
    return [
        Peer("crun", "crun", bundles, folder / "crun", prefix=crun_prefix),
        Peer("runc", "runc", bundles, folder / "runc"),
        Peer("runsc", "runsc", bundles, folder / "runsc", flags=("--platform", "ptrace", "--network", "none")),
    ]


def katapod_variants(folder: Path, own: Path, accelerator: str) -> list[Katapod]:
    """QEMU cold, from a template, from the pool, and User-mode Linux: small, without a network; and what `run` is
    without flags.

    `accelerator` is QEMU's. Templates and the pools' sockets are in a folder of ours: the host's stay as they are.
    """

    def variant(
        name: str, factory: dict[str, str], needs_key: str = "", pool: int = 0, accelerator: str = accelerator
    ) -> Katapod:
        path = {"template_path": f'"{own / "template"}"'}
        katapod = {"accelerator": f'"{accelerator}"'}
        return Katapod(name, folder, {"factory": path | factory, "katapod": katapod}, needs_key, pool=pool)

    def cache(name: str) -> dict[str, str]:
        return {"vm_cache_number": "1", "vm_cache_endpoint": f'"{own / name}"'}

    uml_pool = variant(UML_POOL, cache("uml-cache.sock"), "vm_cache_number", pool=1, accelerator="uml")
    # its machines are for containers without limits only, and get the size of the others by the configuration
    uml_pool.sections["hypervisor.qemu"] = {"default_memory": str(SMALL_MIB)}
    uml_pool = replace(uml_pool, memory="")
    return [
        variant(COLD, {"enable_template": "false"}),
        variant(TEMPLATE, {"enable_template": "true"}, "enable_template"),
        variant(POOL, {"enable_template": "true"} | cache("cache.sock"), "vm_cache_number", pool=1),
        variant(UML, {}, accelerator="uml"),
        uml_pool,
        replace(variant(DEFAULT, {}, accelerator="auto"), memory="", network=""),
    ]
