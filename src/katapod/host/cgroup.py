"""The cgroups of a sandbox on this host: made, joined, limited, removed. Carries out a CgroupPlan.

The process that owns the sandbox joins the groups itself before it starts a child, so that children are in them from
their first instruction, and leaves when they have ended. A group that cannot be made is a warning: the sandbox runs
without it. Blocking calls on cgroupfs are short; removal, which waits for the kernel, goes to a thread.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import time
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from katapod.plan.cgroup import CgroupPlan, Group, Hierarchy, parse_hierarchies, plan_cgroup, plan_vmm_cgroup
from katapod.tasks import finish

__all__ = [
    "HostCgroup",
    "host_cgroup_version",
    "host_hierarchies",
    "joined_cgroup",
    "make_directory",
    "prepare_cgroup",
    "remove_cgroups",
]

log = logging.getLogger(__name__)

CGROUP_ROOT = Path("/sys/fs/cgroup")
REMOVE_LIMIT_S = 5.0  # a killed task counts until the kernel is done with it
MEMBERS_GRACE_S = 1.0  # for a logger of the supervisor's that still has something to write
MAKE_ATTEMPTS = 5
LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")  # of cgroup v2, of v1
UNLIMITED = 1 << 60  # bytes: v1 shows "no limit" as the largest number of pages


def host_hierarchies() -> tuple[Hierarchy, ...]:
    """The cgroup hierarchies mounted on this host."""
    text = Path("/proc/self/mountinfo").read_text()
    v2: dict[Path, str] = {}
    for found in parse_hierarchies(text, {}):
        if found.version == 2:
            with contextlib.suppress(OSError):
                v2[found.mount] = (found.mount / "cgroup.controllers").read_text()
    return parse_hierarchies(text, v2)


def host_cgroup_version() -> int:
    """2 if /sys/fs/cgroup itself is the v2 hierarchy, as engines tell it; else 1, even with one of v2 beside."""
    return 2 if (CGROUP_ROOT / "cgroup.controllers").exists() else 1


def prepare_cgroup(
    sandbox_id: str,
    cgroups_path: str | None,
    *,
    sandbox_cgroup_only: bool,
    mem_mib: int,
    beside_mib: int,
    limited: bool = False,
) -> CgroupPlan | None:
    """Plan a sandbox's groups for this host: mem_mib is VmSize.mem_mib, beside_mib its host_overhead_mib. Without
    `cgroups_path` it stays in those of who starts it, but for a limit of its VMM's memory if it is to be `limited`.

    Its `directories` belong into the sandbox's record before they are made. None where there are no cgroups.
    Raises SpecError for a `cgroups_path` (linux.cgroupsPath) that makes no sense.
    """
    if cgroups_path is None:
        if not limited:
            return None
        plan = plan_vmm_cgroup(sandbox_id, host_hierarchies(), mem_mib=mem_mib, beside_mib=beside_mib)
    else:
        plan = plan_cgroup(
            sandbox_id,
            cgroups_path,
            host_hierarchies(),
            sandbox_cgroup_only=sandbox_cgroup_only,
            mem_mib=mem_mib,
            beside_mib=beside_mib,
            limited=limited,
        )
    if plan is None:
        return None
    return plan.without(frozenset(path for group in plan.groups for path in group.parents if path.exists()))


class HostCgroup:
    """Groups that are there, with this process in them."""

    def __init__(self, plan: CgroupPlan, groups: list[Group], origins: dict[Path, Path]) -> None:
        self.plan = plan
        self._groups = groups
        self._origins = origins  # mount of a hierarchy -> the directory that we came from

    @property
    def wants_vcpus(self) -> bool:
        """Whether the threads of vCPUs have a group of their own."""
        return any(not group.processes and not group.of_vmm for group in self._groups)

    @property
    def of_vmm(self) -> tuple[Path, ...]:
        """Groups for the VMM to join, which its supervisor has not."""
        return tuple(group.directory for group in self._groups if group.of_vmm)

    def allow(self, guest_mib: int) -> None:
        """Set the memory limit for a guest of that size: called before memory is plugged. A limit that cannot be
        changed is a warning, since what it would do to the VM is not certain."""
        for group in self._groups:
            if group.limit_file:
                limit = self.plan.limit_bytes(guest_mib)
                _warn_of_less(group, limit)
                try:
                    (group.directory / group.limit_file).write_text(str(limit))
                except OSError as exc:
                    log.warning("cannot set the memory limit of the cgroup %s: %s", group.directory, exc.strerror)

    def place_vcpus(self, thread_ids: Iterable[int]) -> None:
        """Move the threads of vCPUs into their group. A thread that has ended is none."""
        for thread in thread_ids:
            for group in self._groups:
                if not group.processes and not group.of_vmm:
                    try:
                        (group.directory / "tasks").write_text(str(thread))
                    except ProcessLookupError:
                        break
                    except OSError as exc:
                        log.warning("cannot put a vCPU into the cgroup %s: %s", group.directory, exc.strerror)

    async def leave(self) -> None:
        """Go back to where we came from and remove the groups. Idempotent. Raises OSError if one stays."""
        for mount, origin in self._origins.items():
            _move(origin, mount)
        left = await asyncio.to_thread(remove_cgroups, self.plan.directories)
        if left:
            raise OSError(errno.EBUSY, "; ".join(left))


@contextlib.asynccontextmanager
async def joined_cgroup(plan: CgroupPlan | None) -> AsyncIterator[HostCgroup | None]:
    """Make the groups of `plan` and join them while the block runs; None without a plan, or if none could be made."""
    if plan is None:
        yield None
        return
    groups: list[Group] = []
    cgroup = HostCgroup(plan, groups, {})
    try:
        for group in plan.groups:
            try:
                origin = _own_group(group.hierarchy) if group.processes else None
                _make(group)
                if origin is not None:
                    (group.directory / "cgroup.procs").write_text("0")  # 0: the writing process
                    cgroup._origins[group.hierarchy.mount] = origin
            except OSError as exc:
                log.warning("the sandbox runs without the cgroup %s: %s", group.directory, exc.strerror)
                continue
            groups.append(group)
        cgroup.allow(plan.mem_mib)
        yield cgroup if groups else None
    finally:
        await finish(cgroup.leave(), name="leave-cgroups")


def raise_limits(directories: Iterable[str], more_mib: int) -> None:
    """Raise the memory limits of a sandbox's groups, `directories` of its record, before memory is plugged by another
    process than its supervisor. As HostCgroup.allow, a limit that cannot be changed is a warning."""
    for name in filter(_is_sandboxs, directories):
        for file in LIMIT_FILES:
            path = Path(name) / file
            try:
                limit = int(path.read_text())
                if limit < UNLIMITED:
                    path.write_text(str(limit + (more_mib << 20)))
            except FileNotFoundError:
                continue
            except ValueError:  # "max"
                continue
            except OSError as exc:
                log.warning("cannot raise the memory limit of the cgroup %s: %s", name, exc.strerror)


def remove_cgroups(directories: Iterable[str], limit_s: float = REMOVE_LIMIT_S) -> list[str]:
    """Remove groups, in the order given, with what is left of their processes; returns what stays, in words.

    Parents that hold another sandbox stay without a word. `directories` are CgroupPlan.directories; of anything else
    this removes nothing, since rmdir(2) takes no directory with files, except groups without members.
    """
    left = []
    began = time.monotonic()
    for name in directories:
        directory = Path(name)
        own = _is_sandboxs(name)
        while True:
            try:
                directory.rmdir()
                break
            except (FileNotFoundError, NotADirectoryError):
                break
            except OSError as exc:
                if not own:
                    break  # it holds a group of somebody else
                if exc.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() > began + limit_s:
                    left.append(f"cgroup {directory}: {exc.strerror}")
                    break
                if time.monotonic() > began + MEMBERS_GRACE_S:
                    _kill_members(directory)
                time.sleep(0.02)
    return left


def _is_sandboxs(directory: str) -> bool:
    """Not a parent, which other sandboxes may have groups in."""
    path = Path(directory)
    return (path.name.startswith("kata_") and path.name != "kata_overhead") or path.parent.name == "kata_overhead"


def _kill_members(directory: Path) -> None:
    """Whoever is in a group of a sandbox that ends was started by its supervisor, which may have been killed. Not
    ourself: who removes may have been started from within."""
    with contextlib.suppress(OSError):
        for line in (directory / "cgroup.procs").read_text().split():
            if int(line) != os.getpid() and int(line) > 0:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(line), signal.SIGKILL)


def make_directory(directory: Path, mount: Path) -> None:
    """Make a group, and those above it; in cpuset v1 a new one has its parent's CPUs. Raises OSError."""
    for attempt in range(MAKE_ATTEMPTS):
        try:
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
            break
        except FileNotFoundError:  # another sandbox, at its end, has removed a parent that it shared with us
            if attempt + 1 == MAKE_ATTEMPTS:
                raise
    for file in ("cpuset.cpus", "cpuset.mems"):
        if (directory / "cpuset.sched_load_balance").exists():  # which version 2 does not have
            _inherit(directory, file, mount)


def _make(group: Group) -> None:
    """Raises OSError."""
    make_directory(group.directory, group.hierarchy.mount)
    if group.hierarchy.version == 2:
        _enable(group)
    for setting in group.settings:
        if setting.value is not None:
            (group.directory / setting.file).write_text(setting.value)
        else:
            _inherit(group.directory, setting.file, group.hierarchy.mount)


def _inherit(directory: Path, file: str, mount: Path) -> None:
    """Give an empty file of cpuset the parent's value; parents that we made are as empty."""
    own = directory / file
    if own.read_text().strip() or directory == mount:
        return
    _inherit(directory.parent, file, mount)
    own.write_text((directory.parent / file).read_text().strip())


def _enable(group: Group) -> None:
    """Hand the controllers down to the group. A parent with processes of its own refuses: then it goes without."""
    for parent in reversed((*group.parents, group.hierarchy.mount)):
        for name in sorted(group.hierarchy.controllers):
            with contextlib.suppress(OSError):
                (parent / "cgroup.subtree_control").write_text(f"+{name}")


def _own_group(hierarchy: Hierarchy) -> Path:
    """Where this process is now. Source: cgroups(7), /proc/pid/cgroup."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if (hierarchy.version == 2 and not names) or hierarchy.controllers & set(names.split(",")):
            return hierarchy.mount / path.lstrip("/")
    return hierarchy.mount


def _move(directory: Path, fallback: Path) -> None:
    for target in (directory, fallback):
        try:
            (target / "cgroup.procs").write_text("0")
            return
        except OSError as exc:
            log.debug("cannot go back to the cgroup %s: %s", target, exc.strerror)


def _warn_of_less(group: Group, needed_bytes: int) -> None:
    """Say so where a limit above the group is lower than what the VM may use: there the kernel would kill the VM."""
    for parent in group.parents:
        try:
            text = (parent / group.limit_file).read_text().strip()
        except OSError:
            continue
        if text.isdigit() and int(text) < min(needed_bytes, UNLIMITED):
            log.warning(
                "the cgroup %s allows %d MiB, but the sandbox may come to use %d MiB, and the host would kill its VM "
                "then: book the difference as overhead in the RuntimeClass (kata-runtime overhead tells how much)",
                parent,
                int(text) >> 20,
                needed_bytes >> 20,
            )
            return
