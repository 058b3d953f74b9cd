"""What a sandbox takes of its host beyond what its containers may use, and the RuntimeClass overhead that follows.

The arithmetic alone: observe/memory_use.py reads the figures, observe/overhead.py takes the observations.
"""

import math
from collections.abc import Sequence

from msgspec import Struct

__all__ = ["MemoryParts", "Observation", "PodOverhead", "pod_overhead"]

MEMORY_STEP_MIB = 10
CPU_STEP_MILLIS = 10


class MemoryParts(Struct, frozen=True, kw_only=True):
    """Host memory of one sandbox in KiB. Pages that processes share count in proportion (PSS), so that the sum over
    all sandboxes is what they take together. Guest memory counts in full: VMM and virtiofsd share it with nobody
    else, and what a clone was given takes memory even before the guest touches it."""

    guest_mapped_kib: int = 0
    """Touched by the guest since this VMM started, or by virtiofsd for it."""
    guest_unmapped_kib: int = 0
    """There, but no process maps it: what a clone's guest has not touched yet, and pages that User-mode Linux maps only
    when it needs them. In nobody's PSS."""
    translated_kib: int = 0
    """Code that QEMU's emulator has made of the guest's."""
    vmm_heap_kib: int = 0
    vmm_program_kib: int = 0
    """The VMM's code, its libraries and what it maps from files, under a cold boot the guest's kernel too."""
    virtiofsd_kib: int = 0
    disk_server_kib: int = 0
    """qemu-storage-daemon, which serves disks to User-mode Linux; QEMU does it itself."""
    supervisor_kib: int = 0
    """Katapod's own process."""

    @property
    def guest_kib(self) -> int:
        return self.guest_mapped_kib + self.guest_unmapped_kib

    @property
    def pss_kib(self) -> int:
        """What the processes' PSS add up to, as other tools see it."""
        return self.total_kib - self.guest_unmapped_kib

    @property
    def host_kib(self) -> int:
        """Beside the guest's memory and the translated code: what HOST_OVERHEAD_MIB of sizing.py allows for."""
        return (
            self.vmm_heap_kib + self.vmm_program_kib + self.virtiofsd_kib + self.disk_server_kib + self.supervisor_kib
        )

    @property
    def total_kib(self) -> int:
        return self.guest_kib + self.translated_kib + self.host_kib

    def rows(self) -> list[tuple[str, int]]:
        """(part, KiB), in the order in which people read them."""
        return [
            ("guest memory, mapped", self.guest_mapped_kib),
            ("guest memory, not mapped", self.guest_unmapped_kib),
            ("QEMU, translated code", self.translated_kib),
            ("VMM, heap", self.vmm_heap_kib),
            ("VMM, program and files", self.vmm_program_kib),
            ("virtiofsd", self.virtiofsd_kib),
            ("qemu-storage-daemon", self.disk_server_kib),
            ("kata-runtime, the supervisor", self.supervisor_kib),
        ]


class Observation(Struct, frozen=True, kw_only=True):
    """A sandbox over `seconds`; memory as it was at their end."""

    phase: str
    memory: MemoryParts
    containers_kib: int
    """Charged to the containers' own limits, by the guest's cgroups."""
    cpu_s: float
    """CPU time of all its host processes in that time."""
    containers_cpu_s: float
    """Part of it that the guest charged to the containers."""
    seconds: float

    @property
    def beyond_kib(self) -> int:
        """Memory beyond the containers' own."""
        return max(0, self.memory.total_kib - self.containers_kib)

    @property
    def beyond_cpu_millis(self) -> float:
        """CPU beyond the containers' own, in thousandths of one CPU. The guest counts by its own clock, which may
        run ahead of the CPU time that a busy host gives it: never below 0."""
        return max(0.0, self.cpu_s - self.containers_cpu_s) / self.seconds * 1000


class PodOverhead(Struct, frozen=True, kw_only=True):
    """The podFixed entries of a RuntimeClass."""

    memory_mib: int
    cpu_millis: int

    def yaml(self) -> str:
        return f'overhead:\n  podFixed:\n    memory: "{self.memory_mib}Mi"\n    cpu: "{self.cpu_millis}m"'


def pod_overhead(observations: Sequence[Observation], *, translation_cache_mib: int = 0) -> PodOverhead:
    """The most that was observed, rounded up. `translation_cache_mib`, the bound of translated code, counts in full
    (0 under KVM): a container that runs long and much fills it. Raises ValueError without an observation."""
    memory_kib = max(
        each.beyond_kib + max(0, translation_cache_mib * 1024 - each.memory.translated_kib) for each in observations
    )
    cpu_millis = max(each.beyond_cpu_millis for each in observations)
    return PodOverhead(
        memory_mib=_round_up(memory_kib / 1024, MEMORY_STEP_MIB), cpu_millis=_round_up(cpu_millis, CPU_STEP_MILLIS)
    )


def _round_up(value: float, step: int) -> int:
    return max(step, math.ceil(value / step) * step)
