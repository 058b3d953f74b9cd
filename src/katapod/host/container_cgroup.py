"""The cgroup that an engine names for one container (linux.cgroupsPath), in which its processes are to be on the host.

Of a container in a VM that is its proxy. The VM's own groups lie below it, where the container is the first of its
sandbox: what engines read of the group counts them in. Source: cgroups(7); host/cgroup.py has the sandbox's groups.
"""

import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from katapod.host.cgroup import host_hierarchies, make_directory
from katapod.plan.cgroup import Hierarchy

__all__ = ["container_cgroups", "made_cgroups", "make_container_cgroups", "remove_container_cgroups"]

log = logging.getLogger(__name__)

REMOVE_LIMIT_S = 5.0  # a killed process counts until the kernel is done with it
MEMBERS = "kata_members"


def container_cgroups(path: str) -> tuple[Path, ...]:
    """The directory of `path` (plan.cgroup.path_of_container) in each hierarchy that limits or counts. In version 2 a
    group with groups below it has no members (cgroups(7), no internal processes): there it is one below."""
    return tuple(
        hierarchy.mount / path.lstrip("/") / (MEMBERS if hierarchy.version == 2 else "") for hierarchy in _hierarchies()
    )


def _hierarchies() -> tuple[Hierarchy, ...]:
    """As plan_cgroup: with one of version 2 beside those of version 1, these."""
    found = host_hierarchies()
    v1 = tuple(each for each in found if each.version == 1 and each.controllers)
    return v1 or tuple(each for each in found if each.version == 2)


def made_cgroups(directories: Iterable[Path]) -> tuple[str, ...]:
    """Those that are to be made for these, the deepest first: for the record, before they are made."""
    mounts = {each.mount for each in _hierarchies()}
    missing = set()
    for directory in directories:
        path = directory
        while path not in mounts and not path.exists():
            missing.add(path)
            path = path.parent
    return tuple(str(path) for path in sorted(missing, key=lambda path: -len(path.parts)))


def make_container_cgroups(directories: Iterable[Path]) -> tuple[str, ...]:
    """Make them, and return those that are there. One that cannot be made is a warning."""
    mounts = {each.mount for each in _hierarchies()}
    made = []
    for directory in directories:
        mount = next(mount for mount in mounts if mount in directory.parents)
        try:
            make_directory(directory, mount)
        except OSError as exc:
            log.warning("the container is not in the cgroup %s: %s", directory, exc.strerror)
            continue
        made.append(str(directory))
    return tuple(made)


def remove_container_cgroups(directories: Iterable[str], limit_s: float = REMOVE_LIMIT_S) -> None:
    """Remove those that nobody else is in. Blocks while a process that has ended is still counted."""
    end = time.monotonic() + limit_s
    for name in directories:
        while True:
            try:
                Path(name).rmdir()
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as exc:
                if time.monotonic() < end and not _others(Path(name)):
                    time.sleep(0.01)
                    continue
                log.debug("the cgroup %s stays: %s", name, exc.strerror)
            break


def _others(directory: Path) -> bool:
    """Whether there is more than a process that is about to go."""
    with contextlib.suppress(OSError):
        return any(entry.is_dir() for entry in directory.iterdir()) or bool((directory / "cgroup.procs").read_text())
    return True
