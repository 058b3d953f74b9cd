"""What a program that a hostile guest may take over can see and do on this host. Pure.

A jail is a root directory with what is listed here and nothing else, a user of its own, namespaces, no capability,
limits, and a list of system calls. The program is process 1 of its PID namespace: when it ends, the kernel ends all
that it has started.
"""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path, PurePosixPath

from msgspec import Struct, field

from katapod.plan.call_filter import CallFilter

__all__ = ["Access", "Bind", "JailLimits", "JailPlan", "Node", "Tmpfs"]


class Access(Enum):
    """What can be done with a file of the host in a jail, as far as its owner and mode allow it."""

    READ = "read"  # read-only; no programs, no set-user-ID, no device nodes. Sockets can be connected to
    EXECUTE = "execute"  # read-only, programs and shared libraries
    WRITE = "write"
    DEVICE = "device"  # a device node


class Bind(Struct, frozen=True):
    """A file or directory of the host at `target`, with what is mounted below it."""

    source: Path
    target: str
    access: Access = Access.READ


class Node(Struct, frozen=True):
    """A device node of the program's own user, of the same device as `source`, whoever that belongs to."""

    source: Path
    target: str


class Tmpfs(Struct, frozen=True):
    """An empty directory of the program's own, in memory, which goes with it."""

    target: str
    size_bytes: int
    executable: bool = False  # files may be mapped as code
    files_max: int = 1024  # inodes
    huge_pages: bool = False  # of large files, where the host's kernel has them


class JailLimits(Struct, frozen=True):
    """setrlimit(2), soft and hard. Processes count by user, so with a user of its own they are the program's own."""

    open_files: int = 1024
    processes: int = 4096
    file_bytes: int | None = None  # of the largest file that it may write
    locked_bytes: int = 0


class JailPlan(Struct, frozen=True):
    """Raises ValueError if a target is no plain absolute path, or if two are the same."""

    uid: int  # and the group's number
    binds: tuple[Bind, ...]
    tmpfs: tuple[Tmpfs, ...] = ()
    limits: JailLimits = field(default_factory=JailLimits)
    calls: CallFilter | None = None  # None: all
    netns: Path | None = None  # None: an empty one of its own
    capabilities: frozenset[int] = frozenset()  # CAP_... of linux/capability.h; the bounding set is the same
    hostname: str = "jail"
    cgroups: tuple[Path, ...] = ()  # of the host, in place of its supervisor's in those hierarchies
    fixed_addresses: bool = False  # its program has nothing at random addresses
    nodes: tuple[Node, ...] = ()

    def __post_init__(self) -> None:
        if self.uid <= 0:
            raise ValueError("a jail has a user other than root")
        targets = self._targets()
        for target in targets:
            parts = PurePosixPath(target).parts
            if len(parts) < 2 or parts[0] != "/" or ".." in parts or str(PurePosixPath(target)) != target:
                raise ValueError(f"{target!r} is no place in a jail")
        if len(set(targets)) != len(targets):
            raise ValueError("two things at the same place of a jail")

    def _targets(self) -> list[str]:
        return (
            [bind.target for bind in self.binds]
            + [tmpfs.target for tmpfs in self.tmpfs]
            + [node.target for node in self.nodes]
        )

    def describe(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"user and group {self.uid}, no other groups"
        names = ", ".join(map(str, sorted(self.capabilities)))
        yield f"capabilities {names}" if names else "no capability; the bounding set is empty"
        yield "no_new_privs"
        for cgroup in self.cgroups:
            yield f"cgroup {cgroup}"
        if self.fixed_addresses:
            yield "no random addresses"
        network = f"network {self.netns}" if self.netns is not None else "an empty network"
        yield f"namespaces of its own: mount, PID, IPC, UTS, cgroup; {network}"
        yield "root: empty, read-only, with"
        for bind in self.binds:
            yield f"  {bind.target} = {bind.source} ({bind.access.value})"
        for node in self.nodes:
            yield f"  {node.target} = a device node like {node.source}, its own"
        for tmpfs in self.tmpfs:
            kind = ("exec" if tmpfs.executable else "noexec") + (", huge pages" if tmpfs.huge_pages else "")
            yield f"  {tmpfs.target} = tmpfs, {tmpfs.size_bytes} bytes, {tmpfs.files_max} files, {kind}"
        limits = self.limits
        size = f", {limits.file_bytes} bytes a file" if limits.file_bytes is not None else ""
        yield (
            f"limits: {limits.processes} processes, {limits.open_files} open files, {limits.locked_bytes} bytes locked"
            f"{size}, no core dump"
        )
        yield f"system calls: {self.calls.describe()}" if self.calls is not None else "system calls: all"
