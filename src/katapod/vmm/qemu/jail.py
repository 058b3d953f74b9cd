"""The jail of a QEMU: what it, and with it a guest that has broken out of its machine, finds of the host.

It has its own files at their own paths, so that its command line and its messages name what people know: the program,
its libraries and firmware, the guest's kernel and initrd, all read-only. Disks, taps, sockets and the guest's memory
are descriptors. HostFiles tell what of that this host has.
"""

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from katapod.plan.jail import Access, Bind, JailLimits, JailPlan, Node, Tmpfs
from katapod.vmm.qemu.command_line import FD_DIRECTORY, QemuPlan
from katapod.vmm.qemu.jail_calls import QEMU_CALLS, QEMU_CALLS_WITH_IO_URING

__all__ = ["HostFiles", "look_at_host", "plan_jail"]

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
FIRMWARE = ("share/qemu", "share/qemu-kvm", "share/kata-qemu", "share/seabios", "share/seavgabios", "lib/ipxe")
LIBRARY_CACHE = Path("/etc/ld.so.cache")
NULL = Path("/dev/null")  # QEMU locks it once, to learn which locks of files the kernel has; see fcntl(2)
KVM = Path("/dev/kvm")
OWN_FDS = Path("/proc/self/fd")
PID_FILE_BYTES = 64 * 1024
OPEN_FILES = 65536  # with KVM, each queue of each disk has descriptors of its own
READ_BY_ALL, WRITTEN_BY_ALL = stat.S_IROTH, stat.S_IWOTH


class HostFiles(Struct, frozen=True):
    """`program` is where it really is; the values of `libraries` are, too. `sources` has what of the plan's files and
    devices is not the file of that name: another with the same content, that everybody may read. `own_nodes` are
    devices that not everybody may open."""

    program: Path
    libraries: Mapping[str, Path]
    data: tuple[Path, ...]
    sources: Mapping[Path, Path]
    own_nodes: frozenset[Path]
    devices: frozenset[Path]  # which of the plan's files are


def plan_jail(plan: QemuPlan, host: HostFiles, netns: Path | None = None) -> JailPlan:
    """Raises ValueError if a file has a name that a jail cannot have."""
    binds = [Bind(real, target, Access.EXECUTE) for target, real in host.libraries.items()]
    binds += [Bind(each, str(each), Access.READ) for each in _outer(host.data, host.libraries)]
    if not _is_in(host.program, host.libraries):
        binds.append(Bind(host.program, str(host.program), Access.EXECUTE))
    binds.append(Bind(NULL, str(NULL), Access.DEVICE))
    binds.append(Bind(OWN_FDS, FD_DIRECTORY))
    there = {*host.libraries, *map(str, host.data)}
    nodes = [Node(device, str(device)) for device in sorted(host.own_nodes)]
    for file in dict.fromkeys(plan.files):
        source = host.sources.get(file, file)
        if file in host.own_nodes or file == NULL or (source == file and _is_in(file, there)):
            continue
        binds.append(Bind(source, str(file), Access.DEVICE if file in host.devices else Access.READ))
    return JailPlan(
        uid=plan.uid,
        binds=tuple(binds),
        tmpfs=(Tmpfs(str(plan.pid_file.parent), PID_FILE_BYTES, files_max=8),),
        limits=JailLimits(open_files=OPEN_FILES),
        calls=QEMU_CALLS_WITH_IO_URING if plan.io_uring else QEMU_CALLS,
        netns=netns,
        hostname="qemu",
        nodes=tuple(nodes),
    )


def _is_in(path: Path, directories: Iterable[str]) -> bool:
    return any(path.is_relative_to(each) for each in directories)


def _outer(paths: Iterable[Path], others: Iterable[str]) -> Iterator[Path]:
    """Those that are not in others."""
    taken = list(others)
    for path in paths:
        if not _is_in(path, taken):
            yield path


def look_at_host(plan: QemuPlan, program: Path) -> HostFiles:
    """Copies of files that only root may read are made in the plan's directory. Raises OSError."""
    program = program.resolve()
    prefix = program.parent.parent
    libraries = {path: Path(path).resolve() for path in LIBRARIES if Path(path).is_dir()}
    if not _is_in(prefix, ("/usr", *libraries)) and str(prefix) != "/":
        for each in ("lib", "lib64"):
            if (prefix / each).is_dir():
                libraries[str(prefix / each)] = prefix / each
    prefixes = dict.fromkeys((prefix, Path("/usr")))
    data = [each / name for each in prefixes for name in FIRMWARE if (each / name).is_dir()]
    if LIBRARY_CACHE.is_file():
        data.append(LIBRARY_CACHE)
    sources: dict[Path, Path] = {}
    own_nodes, devices = set(), set()
    for file in plan.files:
        found = file.stat()
        if stat.S_ISCHR(found.st_mode):
            devices.add(file)
            wanted = READ_BY_ALL | (WRITTEN_BY_ALL if file == KVM else 0)
            if found.st_mode & wanted != wanted:
                own_nodes.add(file)
        elif not found.st_mode & READ_BY_ALL:
            sources[file] = _copy(file, plan.vm_dir)
    return HostFiles(program, libraries, tuple(data), sources, frozenset(own_nodes), frozenset(devices))


def _copy(file: Path, directory: Path) -> Path:
    copy = directory / f"{file.name}.copy"
    with file.open("rb") as source, open(os.open(copy, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o444), "wb") as target:
        shutil.copyfileobj(source, target)
    copy.chmod(0o444)
    return copy
