"""What of a container's spec its guest goes without: for the log, by its place in config.json. Pure.

Where a container would do what it must not, or not do what it must, the spec is refused instead (model/oci.py).
"""

import re
from collections.abc import Iterable, Iterator

from msgspec import Struct

from katapod.model import oci

__all__ = ["Gap", "left_out"]


class Gap(Struct, frozen=True):
    """`matters`: it was asked for, and nothing else does it."""

    place: str
    why: str
    matters: bool


_ENGINES_PROFILE = re.compile(
    r"cri-containerd\.apparmor\.d|crio-default|(docker|nerdctl|containers)-default.*|unconfined"
)
"""AppArmor profiles that engines give to every container."""

_UNKNOWN_THAT_MATTER = re.compile(
    r"linux\.(seccomp|resources\.rdma|memoryPolicy|intelRdt)\b.*|process\.execCPUAffinity"
)


def left_out(spec: oci.Spec, unknown: Iterable[str]) -> tuple[Gap, ...]:
    """`unknown`: places that the model does not know."""
    return (*_of_process(spec.process), *_of_linux(spec.linux), *(_unknown(place) for place in unknown))


def _unknown(place: str) -> Gap:
    known = _UNKNOWN_THAT_MATTER.fullmatch(place)
    return Gap(place, "it is not supported" if known else "the key is not known", matters=bool(known))


def _of_process(process: oci.Process) -> Iterator[Gap]:
    if process.apparmor_profile:
        usual = _ENGINES_PROFILE.fullmatch(process.apparmor_profile)
        yield Gap("process.apparmorProfile", "the guest's kernel has no such profile", matters=not usual)
    if process.selinux_label:
        yield Gap("process.selinuxLabel", "the guest has no SELinux policy", matters=False)


def _of_linux(linux: oci.Linux) -> Iterator[Gap]:
    if linux.mount_label:
        yield Gap("linux.mountLabel", "the guest has no SELinux policy", matters=False)
    if linux.intel_rdt:
        yield Gap("linux.intelRdt", "the guest has no such control over the host's caches", matters=True)
    if linux.resources:
        yield from _of_resources(linux.resources)


def _of_resources(resources: oci.Resources) -> Iterator[Gap]:
    memory, cpu = resources.memory or oci.Memory(), resources.cpu or oci.Cpu()
    version_1 = "the guest has version 2 of cgroups, which does not have it"
    host = "it speaks of devices of the host"
    for place, given, why in (
        ("memory.kernel", memory.kernel, version_1),
        ("memory.kernelTCP", memory.kernel_tcp, version_1),
        ("memory.swappiness", memory.swappiness is not None, version_1),
        ("memory.disableOOMKiller", memory.disable_oom_killer, version_1),
        ("cpu.realtimeRuntime", cpu.realtime_runtime, version_1),
        ("network", resources.network and (resources.network.class_id or resources.network.priorities), version_1),
        ("blockIO", _limits_disks(resources.block_io), host),
    ):
        if given:
            yield Gap(f"linux.resources.{place}", why, matters=True)
    for place, text in (("cpu.cpus", cpu.cpus), ("cpu.mems", cpu.mems)):
        if text:
            yield Gap(f"linux.resources.{place}", "the numbers are the host's, not the guest's", matters=False)


def _limits_disks(block_io: oci.BlockIO | None) -> bool:
    """Engines write an object whose weight is 0."""
    return block_io is not None and any(getattr(block_io, name) for name in block_io.__struct_fields__)
