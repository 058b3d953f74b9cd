"""One formula for the size of a sandbox: its VM, its host cgroup and the overhead that a cluster books.

Upstream computes them apart (VM = default_memory + limits, cgroup = overhead + limits), so that a VM can
be bigger than the cgroup that it lives in and gets killed. Here all come from `size_sandbox`.

Terms of memory, in MiB unless a name says otherwise; QEMU's and Linux's where they have one:

    memory size      what the guest has: boot memory and plugged DIMMs
    boot memory      QEMU's -m size; a clone's is its template's, and DIMMs make up its memory size
    maximum memory   the ceiling of hot-plug: QEMU's maxmem without memory_offset
    memory block     what the guest's kernel takes a DIMM online by
    guest overhead   the part of the memory size that the containers' limits leave to kernel and agent
    host overhead    memory of the host that is not the guest's: of QEMU, virtiofsd and Katapod
    memory limit     of a container, in bytes: memory.max of its cgroup

Memory. With a limit on every container the VM has

    guest overhead + sum of the limits, rounded up to 128 MiB

so that a container can use its whole limit before the guest runs out, and a container over its limit is
killed alone by its own cgroup. A container without a limit may use what default_memory gives the VM; containers
with limits come on top. So without limits the VM has default_memory, or what the host has if that is less. Limits
above what the host has are usual, in pods above all: the VM gets what there is, and the containers' cgroups keep
the limits as they were asked for.

vCPUs. With a quota on every container the sum of quotas, rounded up: `--cpus 2` shows two CPUs,
`--cpus 0.5` one, of which the container's cgroup gives it a half. Containers without a quota share
default_vcpus, quotas come on top.
"""

import math

import msgspec
from msgspec import Struct

from katapod.model.config_keys import Config
from katapod.model.errors import UsageError

__all__ = [
    "HOST_OVERHEAD_MIB",
    "MEMORY_BLOCK_MIB",
    "MIN_BOOT_MIB",
    "QEMU_MAX_VCPUS",
    "ContainerLimits",
    "HostCapacity",
    "SizeSettings",
    "VmSize",
    "processes_mib",
    "size_pod",
    "size_sandbox",
]

MEMORY_BLOCK_MIB = 128
"""x86 Linux adds hot-plugged memory in blocks of 128 MiB (MIN_MEMORY_BLOCK_SIZE)."""

MIN_BOOT_MIB = 256
"""The least a guest is started with, upstream's minimum too: kernel, unpacked initrd and agent fit."""

HOST_OVERHEAD_MIB = 128
"""Host memory of a sandbox beside the guest's: QEMU's own, virtiofsd and Katapod's process. A clone takes 42, a
sandbox that boots and is alone on its host 112, since nobody shares the files of QEMU and of its kernel with it:
docs/adr/0011-memory.md."""

HOST_MIB_OF_PROCESSES = 1.0
"""Host memory, in MiB for each MiB of the guest's, that User-mode Linux may need for processes: each of the guest's is
one of the host's, which takes 112 KiB of page tables and stacks where a `sleep` takes 105 KiB of the guest's memory."""

QEMU_MAX_VCPUS = 240
"""Upstream's ceiling for q35; above 255 the machine needs an IOMMU with interrupt remapping."""

PAGE_STRUCTS_COVERED_MIB = 4096
"""The guest kernel keeps 1/64 of memory as page structures (64 bytes a 4 KiB page). guest_base_memory
covers those of 4 GiB; limits above that add their 1/64."""


class SizeSettings(Struct, frozen=True, kw_only=True):
    """The parts of the configuration that matter: config_keys.py explains each."""

    default_memory_mib: int = 2048
    default_maxmemory_mib: int = 0
    guest_base_memory_mib: int = 192
    """What a guest needs beside its containers' limits. Default 192: kernel with page structures up to
    100, unpacked initrd 30 to 40, agent and crun 30, the rest is room for slab and page cache, so that a
    container at its limit does not make the guest reclaim the agent's own pages."""
    default_vcpus: float = 1
    default_maxvcpus: int = 0

    @classmethod
    def of(cls, config: Config) -> "SizeSettings":
        return cls(
            default_memory_mib=config.qemu.default_memory,
            default_maxmemory_mib=config.qemu.default_maxmemory,
            guest_base_memory_mib=config.katapod.guest_base_memory,
            default_vcpus=config.qemu.default_vcpus,
            default_maxvcpus=config.qemu.default_maxvcpus,
        )


class HostCapacity(Struct, frozen=True, kw_only=True):
    """Facts about the host."""

    cpus: int
    """Those that are online."""
    memory_mib: int
    """MemTotal of proc_meminfo(5)."""


class ContainerLimits(Struct, frozen=True, kw_only=True):
    """Of one container. None: no limit."""

    memory_bytes: int | None = None
    cpus: float | None = None
    """CFS quota divided by its period."""


class VmSize(Struct, frozen=True, kw_only=True):
    mem_mib: int
    """Memory size for the containers that are known. A guest that boots has it as its boot memory; a clone has it once
    its DIMMs are plugged, which is before its first container."""
    max_mem_mib: int
    """Maximum memory; at least mem_mib."""
    vcpus: int
    max_vcpus: int
    guest_overhead_mib: int
    """Part of the memory size that containers cannot count on."""
    host_overhead_mib: int
    """Host memory beside the guest's: HOST_OVERHEAD_MIB and, under TCG, its translation cache."""
    clamped: tuple[str, ...] = ()
    """What the limits ask for and the VM cannot have: worth a warning."""

    @property
    def sandbox_cgroup_mib(self) -> int:
        """Memory limit of the host cgroup that holds QEMU and its helpers: it can never be hit by a guest
        that uses all of its memory."""
        return self.mem_mib + self.host_overhead_mib

    @property
    def pod_overhead_mib(self) -> int:
        """What a RuntimeClass has to book beside the containers' limits, rounding included."""
        return self.guest_overhead_mib + MEMORY_BLOCK_MIB + self.host_overhead_mib

    def describe(self) -> str:
        return (
            f"{self.vcpus} of at most {self.max_vcpus} vCPUs, {self.mem_mib} of at most "
            f"{self.max_mem_mib} MiB, of which {self.guest_overhead_mib} for the guest; "
            f"{self.host_overhead_mib} MiB beside on the host"
        )


def processes_mib(mem_mib: int) -> int:
    """Host memory for the guest's processes under User-mode Linux, where each is one of the host's."""
    return math.ceil(mem_mib * HOST_MIB_OF_PROCESSES)


def size_sandbox(
    settings: SizeSettings,
    host: HostCapacity,
    containers: tuple[ContainerLimits, ...] = (),
    *,
    translation_cache_mib: int = 0,
) -> VmSize:
    """Size a sandbox for the containers that are known at its start.

    `translation_cache_mib` is what QEMU may use for translated code: 0 under KVM, its tb-size under TCG.
    Raises UsageError if the host has not even the memory that any guest needs.
    """
    bound_mib = min(settings.default_maxmemory_mib or host.memory_mib, host.memory_mib)
    mem_mib, guest_overhead_mib = _memory(settings, containers)
    if bound_mib < MIN_BOOT_MIB:
        raise UsageError(
            f"cannot give the sandbox {MIN_BOOT_MIB} MiB of memory: {_bound(bound_mib, host)}",
            hint=f"a sandbox needs {MIN_BOOT_MIB} MiB at least",
        )
    clamped: list[str] = []
    max_mem_mib = max(bound_mib // MEMORY_BLOCK_MIB * MEMORY_BLOCK_MIB, MIN_BOOT_MIB)
    if mem_mib > max_mem_mib:
        if any(container.memory_bytes is not None for container in containers):
            clamped.append(
                f"its memory limits ask for a VM of {mem_mib} MiB and {_bound(bound_mib, host)}: it gets "
                f"{max_mem_mib} MiB, and the limits stay"
            )
        mem_mib = max_mem_mib
    max_vcpus = _max_vcpus(settings, host)
    for container in containers:
        if container.cpus is not None and container.cpus > max_vcpus:
            clamped.append(f"its CPU limit of {container.cpus:g} is more than the {max_vcpus} vCPUs that it can have")
    vcpus = _vcpus(settings, max_vcpus, tuple(_capped(container, max_vcpus) for container in containers))
    return VmSize(
        mem_mib=mem_mib,
        max_mem_mib=max_mem_mib,
        vcpus=vcpus,
        max_vcpus=max_vcpus,
        guest_overhead_mib=guest_overhead_mib,
        host_overhead_mib=HOST_OVERHEAD_MIB + translation_cache_mib,
        clamped=tuple(clamped),
    )


def size_pod(
    settings: SizeSettings,
    host: HostCapacity,
    containers: tuple[ContainerLimits, ...] = (),
    *,
    announced: ContainerLimits | None = None,
    cpus_asked: int = 0,
    static: bool = False,
    translation_cache_mib: int = 0,
) -> VmSize:
    """Size a pod's sandbox for the containers that it has so far, the pause container left out.

    `announced` is what the pod's limits add up to (annotations.py): what no container has taken of it yet counts as
    one more container, so the VM is big enough before the first one comes. `cpus_asked` are the CPUs that a pod
    without a CPU limit requests, of which it gets as many as there are. Without `announced` a pod starts small and
    grows. As containers end the answer gets smaller; what is plugged stays plugged.

    `static` (static_sandbox_resource_mgmt) sizes once, for what is announced, with no room to grow: the caller gives
    a single container's limits as `announced`.

    A limit of more CPUs than there are is usual in a pod, and asks for all of them. Raises UsageError as size_sandbox.
    """
    max_vcpus = _max_vcpus(settings, host)
    if static:
        containers = (announced or ContainerLimits(),)
    elif announced is not None:
        containers = (*containers, _remainder(announced, containers))
    known = tuple(_capped(container, max_vcpus) for container in containers)
    size = size_sandbox(settings, host, known, translation_cache_mib=translation_cache_mib)
    if not known:
        return msgspec.structs.replace(size, mem_mib=MIN_BOOT_MIB, vcpus=1)
    vcpus = max(size.vcpus, min(cpus_asked, max_vcpus))
    if static:
        return msgspec.structs.replace(size, max_mem_mib=size.mem_mib, vcpus=vcpus, max_vcpus=vcpus)
    return msgspec.structs.replace(size, vcpus=vcpus)


def _remainder(announced: ContainerLimits, containers: tuple[ContainerLimits, ...]) -> ContainerLimits:
    memory_bytes, cpus = announced.memory_bytes, announced.cpus
    if memory_bytes is not None:
        memory_bytes = max(0, memory_bytes - sum(each.memory_bytes or 0 for each in containers))
    if cpus is not None:
        cpus = max(0.0, cpus - sum(each.cpus or 0 for each in containers))
    return ContainerLimits(memory_bytes=memory_bytes, cpus=cpus)


def _capped(container: ContainerLimits, max_vcpus: int) -> ContainerLimits:
    if container.cpus is None or container.cpus <= max_vcpus:
        return container
    return msgspec.structs.replace(container, cpus=float(max_vcpus))


def _max_vcpus(settings: SizeSettings, host: HostCapacity) -> int:
    return min(settings.default_maxvcpus or host.cpus, host.cpus, QEMU_MAX_VCPUS)


def _memory(settings: SizeSettings, containers: tuple[ContainerLimits, ...]) -> tuple[int, int]:
    """(memory size, guest overhead), both in MiB, without regard to what there is."""
    limits = [c.memory_bytes for c in containers if c.memory_bytes is not None]
    limits_mib = math.ceil(sum(limits) / 2**20)
    pages_mib = max(0, math.ceil((limits_mib - PAGE_STRUCTS_COVERED_MIB) / 64))
    overhead_mib = settings.guest_base_memory_mib + pages_mib
    if not limits:
        return max(settings.default_memory_mib, MIN_BOOT_MIB), overhead_mib
    own_mib = overhead_mib
    if len(limits) < len(containers):
        own_mib = max(settings.default_memory_mib, overhead_mib) + pages_mib
    blocks = math.ceil((own_mib + limits_mib) / MEMORY_BLOCK_MIB)
    return max(blocks * MEMORY_BLOCK_MIB, MIN_BOOT_MIB), overhead_mib


def _vcpus(settings: SizeSettings, max_vcpus: int, containers: tuple[ContainerLimits, ...]) -> int:
    quotas = [c.cpus for c in containers if c.cpus is not None]
    default = settings.default_vcpus or 1
    if default < 0:
        default = max_vcpus
    total = sum(quotas)
    if not containers or len(quotas) < len(containers):
        total += default
    # A quota of 0.1 three times is 0.30000000000000004; the seventh decimal is no reason for a vCPU.
    return max(1, min(math.ceil(round(total, 6)), max_vcpus))


def _bound(bound_mib: int, host: HostCapacity) -> str:
    if bound_mib < host.memory_mib:
        return f"default_maxmemory is {bound_mib} MiB"
    return f"this host has {host.memory_mib} MiB"
