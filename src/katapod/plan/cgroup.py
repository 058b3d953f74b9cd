"""Which cgroups of the host a sandbox gets, and what is in each. Pure: host/cgroup.py collects facts and carries out.

sandbox_cgroup_only=true: supervisor, QEMU and virtiofsd are in `kata_SID` below the pod's cgroup, with a memory limit
by the formula of sizing.py, so that a guest that uses all of its memory does not reach it. false: they are in
/kata_overhead/SID, where no limit of the pod reaches them, and only the threads of the vCPUs are in `kata_SID`, which
cgroup v1 can do for the cpu and cpuset hierarchies. In v2 a thread cannot leave its process for another branch of the
tree, so false puts all into /kata_overhead/SID there.

A sandbox that is to be `limited` has a memory limit in any case: on /kata_overhead/SID, or, where it stays in the
cgroups of who starts it, on /vc/kata_SID, of which its VMM alone is a member.

Source: cgroups(7); Kata Containers, docs/design/host-cgroups.md.
"""

from pathlib import Path, PurePosixPath

from msgspec import Struct
from msgspec.structs import replace

from katapod.model.errors import SpecError

__all__ = [
    "CgroupPlan",
    "Group",
    "Hierarchy",
    "Setting",
    "parent_of_sandbox",
    "parse_hierarchies",
    "path_of_container",
    "path_without_engine",
    "plan_cgroup",
    "plan_vmm_cgroup",
]

OVERHEAD = "/kata_overhead"
DEFAULT_PARENT = "/vc"  # upstream's too, of sandboxes that no engine has a cgroup for
V1_CONTROLLERS = frozenset({"cpu", "cpuacct", "cpuset", "memory", "pids", "blkio"})
"""Those that limit or count. devices and freezer stay as they are for the supervisor."""
V2_CONTROLLERS = ("cpu", "cpuset", "memory", "pids", "io")
VCPU_CONTROLLERS = frozenset({"cpu", "cpuacct", "cpuset"})
"""Those of which a thread can be a member without its process. Memory is the process's."""


class Hierarchy(Struct, frozen=True):
    """A mounted tree of cgroups."""

    mount: Path
    version: int  # 1 or 2
    controllers: frozenset[str]


class Setting(Struct, frozen=True):
    """A value for a file of a group; None: the parent's own, since a new group of cpuset v1 has none."""

    file: str
    value: str | None


class Group(Struct, frozen=True):
    """A directory to make in one hierarchy."""

    directory: Path
    hierarchy: Hierarchy
    settings: tuple[Setting, ...] = ()
    processes: bool = True  # supervisor, QEMU, virtiofsd are members; if not, the threads of the vCPUs
    limit_file: str = ""  # holds the memory limit, in bytes; empty: no limit here
    of_vmm: bool = False  # the VMM's own process and what that starts are members, and nobody else

    @property
    def parents(self) -> tuple[Path, ...]:
        """The directories between it and the mount, the nearest first."""
        found = []
        directory = self.directory.parent
        while directory != self.hierarchy.mount:
            found.append(directory)
            directory = directory.parent
        return tuple(found)


class CgroupPlan(Struct, frozen=True):
    groups: tuple[Group, ...]
    mem_mib: int  # of the guest at its start
    beside_mib: int  # what the sandbox takes of the host beside that
    new_parents: tuple[Path, ...] = ()  # go with the sandbox, if nobody else is in them; the deepest first

    @property
    def directories(self) -> tuple[str, ...]:
        """All that goes with the sandbox, in the order of removal: for the record on disk."""
        return tuple(str(path) for path in (*(group.directory for group in self.groups), *self.new_parents))

    @property
    def holds_supervisor(self) -> bool:
        """Whether the supervisor leaves the cgroups of who started it."""
        return any(group.processes for group in self.groups)

    def limit_bytes(self, guest_mib: int) -> int:
        """The memory limit with a guest of that size."""
        return (guest_mib + self.beside_mib) << 20

    def without(self, present: frozenset[Path]) -> "CgroupPlan":
        """This plan on a host where the directories `present` are there already: they stay, but for /kata_overhead and
        /vc. Whichever sandbox made those may end before others that are in them, so the last one removes them."""
        wanted = dict.fromkeys(
            path
            for group in self.groups
            for path in group.parents
            if path not in present or path in (_join(group.hierarchy, OVERHEAD), _join(group.hierarchy, DEFAULT_PARENT))
        )
        return replace(self, new_parents=tuple(sorted(wanted, key=lambda path: -len(path.parts))))

    def describe(self) -> str:
        lines = []
        for group in self.groups:
            members = "supervisor, QEMU, virtiofsd" if group.processes else "vCPU threads"
            members = "the VMM" if group.of_vmm else members
            settings = [
                f"{each.file}={'as the parent' if each.value is None else each.value}" for each in group.settings
            ]
            if group.limit_file:
                settings.append(f"{group.limit_file}={self.limit_bytes(self.mem_mib)}")
            lines.append(" ".join([f"cgroup v{group.hierarchy.version} {group.directory}: {members};", *settings]))
        return "\n".join(lines)


def plan_cgroup(
    sandbox_id: str,
    cgroups_path: str,
    hierarchies: tuple[Hierarchy, ...],
    *,
    sandbox_cgroup_only: bool,
    mem_mib: int,
    beside_mib: int,
    limited: bool = False,
) -> CgroupPlan | None:
    """Plan the groups of a sandbox whose OCI spec has `cgroups_path`. None if the host has no hierarchy to use. With
    `limited` there is a memory limit without sandbox_cgroup_only, too.

    With a v2 hierarchy beside those of v1, which hold the controllers then, v1 is used. Raises SpecError.
    """
    inside = f"{parent_of_sandbox(cgroups_path).rstrip('/')}/kata_{sandbox_id}"
    overhead = f"{OVERHEAD}/{sandbox_id}"
    groups: list[Group] = []
    v1 = [each for each in hierarchies if each.version == 1 and each.controllers & V1_CONTROLLERS]
    for hierarchy in v1:
        inherited = ("cpuset.cpus", "cpuset.mems") if "cpuset" in hierarchy.controllers else ()
        settings = tuple(Setting(file, None) for file in inherited)
        limit = _limit_file(hierarchy)
        if sandbox_cgroup_only:
            groups.append(Group(_join(hierarchy, inside), hierarchy, settings, limit_file=limit))
        else:
            groups.append(Group(_join(hierarchy, overhead), hierarchy, settings, limit_file=limit if limited else ""))
            if hierarchy.controllers <= VCPU_CONTROLLERS:
                groups.append(Group(_join(hierarchy, inside), hierarchy, settings, processes=False))
    if not v1:
        for hierarchy in hierarchies:
            if hierarchy.version == 2:
                path = inside if sandbox_cgroup_only else overhead
                limit = _limit_file(hierarchy) if limited or sandbox_cgroup_only else ""
                groups.append(Group(_join(hierarchy, path), hierarchy, limit_file=limit))
    return CgroupPlan(tuple(groups), mem_mib, beside_mib) if groups else None


def plan_vmm_cgroup(
    sandbox_id: str, hierarchies: tuple[Hierarchy, ...], *, mem_mib: int, beside_mib: int
) -> CgroupPlan | None:
    """Plan a memory limit for the VMM of a sandbox that stays in the cgroups of who starts it: a group for that process
    alone. None if no hierarchy of the host can limit memory."""
    path = f"{DEFAULT_PARENT}/kata_{sandbox_id}"
    for hierarchy in sorted(hierarchies, key=lambda each: each.version):
        if limit := _limit_file(hierarchy):
            group = Group(_join(hierarchy, path), hierarchy, processes=False, limit_file=limit, of_vmm=True)
            return CgroupPlan((group,), mem_mib, beside_mib)
    return None


def _limit_file(hierarchy: Hierarchy) -> str:
    if "memory" not in hierarchy.controllers:
        return ""
    return "memory.max" if hierarchy.version == 2 else "memory.limit_in_bytes"


def parent_of_sandbox(cgroups_path: str) -> str:
    """The pod's cgroup, below which the sandbox's goes: absolute, from the root of a hierarchy.

    `cgroups_path` is linux.cgroupsPath of an OCI spec: a path, whose last component is the container's, or
    SLICE:PREFIX:NAME for systemd, whose slices lie in each other by their names (systemd.slice(5)). Raises SpecError.
    """
    if cgroups_path.count(":") == 2 and "/" not in cgroups_path:
        return _slice_path(cgroups_path.partition(":")[0] or "system.slice")
    parts = PurePosixPath("/" + cgroups_path).parts[1:]
    if ".." in parts or "\0" in cgroups_path:
        raise SpecError(f"cannot use linux.cgroupsPath {cgroups_path!r}: it leads out of the cgroups")
    return "/" + "/".join(parts[:-1])


def path_of_container(container_id: str, cgroups_path: str) -> str:
    """The container's own cgroup: absolute, from the root of a hierarchy. Raises SpecError. A scope of systemd is named
    PREFIX-NAME (docs/systemd.md of opencontainers/runc)."""
    path = path_without_engine(container_id, cgroups_path)
    parent = parent_of_sandbox(path).rstrip("/")
    if not path.startswith("/"):
        _, prefix, name = path.split(":")
        scope = name if name.endswith(".slice") else f"{prefix}-{name}.scope".removeprefix("-")
        if "/" in scope or "\0" in scope:
            raise SpecError(f"cannot use linux.cgroupsPath {cgroups_path!r}: it leads out of the cgroups")
        return f"{parent}/{scope}"
    return f"{parent}/{PurePosixPath(path).name}"


def path_without_engine(sandbox_id: str, cgroups_path: str = "") -> str:
    """The cgroupsPath of a sandbox that no engine asks for: `cgroups_path` if its spec has one, else below /vc, as a
    relative path is. Source: OCI runtime-spec, config-linux.md (Cgroups Path); Kata Containers, pkg/resourcecontrol."""
    is_slice = cgroups_path.count(":") == 2 and "/" not in cgroups_path
    if cgroups_path.startswith("/") or is_slice:
        return cgroups_path
    return f"{DEFAULT_PARENT}/{cgroups_path or sandbox_id}"


def _slice_path(name: str) -> str:
    """a-b.slice is in a.slice; the root slice is `-.slice`."""
    if name == "-.slice":
        return "/"
    stem = name.removesuffix(".slice")
    parts = stem.split("-")
    if stem == name or not all(parts) or "\0" in name:
        raise SpecError(f"cannot use linux.cgroupsPath of {name!r}: it is not the name of a systemd slice")
    return "".join(f"/{'-'.join(parts[: count + 1])}.slice" for count in range(len(parts)))


def _join(hierarchy: Hierarchy, path: str) -> Path:
    return hierarchy.mount / path.lstrip("/")


def parse_hierarchies(mountinfo: str, v2_controllers: dict[Path, str]) -> tuple[Hierarchy, ...]:
    """The hierarchies in the text of /proc/self/mountinfo; `v2_controllers` has the text of cgroup.controllers for
    each mount of v2. One that is mounted twice counts once. Source: proc_pid_mountinfo(5)."""
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, rest = before.split(), after.split()
        if len(fields) < 6 or len(rest) < 3 or rest[0] not in ("cgroup", "cgroup2") or fields[3] != "/":
            continue
        mount = Path(fields[4].replace("\\040", " "))
        if rest[0] == "cgroup2":
            names = frozenset(v2_controllers.get(mount, "").split())
            found.setdefault(fields[2], Hierarchy(mount, 2, names & frozenset(V2_CONTROLLERS)))
        else:
            names = frozenset(name for name in rest[2].split(",") if not name.startswith("name="))
            found.setdefault(fields[2], Hierarchy(mount, 1, names & V1_CONTROLLERS))
    return tuple(found.values())
